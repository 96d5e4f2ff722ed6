//! Functions in text.

use std::collections::HashMap;

use super::lexer::Token;
use super::types::symbol;
use super::{ParseError, Parser, Problem};
use crate::attr::{Attr, Attrs};
use crate::graph::{Function, NodeId, Placement, Value};
use crate::op::Op;
use crate::types::Type;

/// The function being read, and what its names stand for.
struct Scope<'a> {
    function: Function,
    values: HashMap<String, Value>,
    callees: &'a [Function],
}

impl Scope<'_> {
    /// Binds names to the results of a node; the first keeps its name if it is no number.
    fn bind(&mut self, node: NodeId, names: &[String]) -> Result<(), Problem> {
        for (result, name) in names.iter().enumerate() {
            let value = Value { node, result: result as u32 };
            if self.values.insert(name.clone(), value).is_some() {
                return Err(Problem::Duplicate { what: "value", name: name.clone() });
            }
        }
        let own = names.first().filter(|name| !name.starts_with(|c: char| c.is_ascii_digit()));
        self.function.graph[node].name = own.cloned();
        Ok(())
    }
}

impl Parser {
    /// `func @name(%x: type, ...) -> (type, ...) { ... }`; calls name one of `callees`.
    pub(super) fn function(&mut self, callees: &[Function]) -> Result<Function, ParseError> {
        self.keyword("func")?;
        let Token::Function(name) = self.peek().clone() else { return self.unexpected("a function's name") };
        self.next();
        let mut scope = Scope { function: Function::new(&name), values: HashMap::new(), callees };
        self.sign('(')?;
        self.list(')', |p| p.parameter(&mut scope))?;
        let declared = if self.accept(&Token::Arrow) {
            self.sign('(')?;
            Some(self.list(')', Self::ty)?)
        } else {
            None
        };
        self.sign('{')?;
        while !self.accept_word("return") {
            self.statement(&mut scope)?;
        }
        self.results(&mut scope, declared)?;
        self.sign('}')?;
        Ok(scope.function)
    }

    fn parameter(&mut self, scope: &mut Scope) -> Result<(), ParseError> {
        let name = self.value_name()?;
        self.sign(':')?;
        let ty = self.ty()?;
        let attrs = Attrs::none().with("index", scope.function.params.len() as u64);
        let node = scope.function.add_node(Op::Param, &[], attrs, vec![ty]);
        scope.function.params.push(node);
        scope.bind(node, &[name]).map_err(|problem| self.error(problem))?;
        self.annotations(scope, node)
    }

    fn results(&mut self, scope: &mut Scope, declared: Option<Vec<Type>>) -> Result<(), ParseError> {
        scope.function.results = self.operands(scope)?;
        let found: Vec<Type> = scope.function.results.iter().map(|&v| scope.function.ty(v).clone()).collect();
        match declared {
            Some(declared) if declared != found => {
                let text = |types: &[Type]| types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let problem = Problem::Returns { found: text(&found), declared: text(&declared) };
                Err(self.error(problem))
            }
            _ => Ok(()),
        }
    }

    fn value_name(&mut self) -> Result<String, ParseError> {
        match self.peek().clone() {
            Token::Value(name) => {
                self.next();
                Ok(name)
            }
            _ => self.unexpected("a value"),
        }
    }

    /// Values between commas, perhaps none.
    fn operands(&mut self, scope: &Scope) -> Result<Vec<Value>, ParseError> {
        let mut operands = Vec::new();
        while matches!(self.peek(), Token::Value(_)) {
            let name = self.value_name()?;
            let value = scope.values.get(&name).copied();
            operands.push(value.ok_or_else(|| self.error(Problem::Unknown { what: "value", name }))?);
            if !self.accept_sign(',') {
                break;
            }
        }
        Ok(operands)
    }

    /// `%0, %1 = op %a, %b {eps = 1e-6} !kernel 3`
    fn statement(&mut self, scope: &mut Scope) -> Result<(), ParseError> {
        let mut names = Vec::new();
        if matches!(self.peek(), Token::Value(_)) {
            names.push(self.value_name()?);
            while self.accept_sign(',') {
                names.push(self.value_name()?);
            }
            self.sign('=')?;
        }
        let at = self.at;
        let name = self.word("an op")?;
        let op = Op::from_name(&name).filter(|&op| op != Op::Param);
        let op = op.ok_or_else(|| self.error_at(at, Problem::Unknown { what: "op", name }))?;
        let (operands, attrs, types) = match op {
            Op::Weight => self.weight()?,
            Op::Call => self.call(scope)?,
            _ => self.plain(op, at, scope)?,
        };
        if types.len() != names.len() {
            let problem = Problem::Results { op, found: types.len(), named: names.len() };
            return Err(self.error_at(at, problem));
        }
        let node = scope.function.add_node(op, &operands, attrs, types);
        scope.bind(node, &names).map_err(|problem| self.error_at(at, problem))?;
        self.annotations(scope, node)
    }

    /// `"name" : type`
    fn weight(&mut self) -> Result<(Vec<Value>, Attrs, Vec<Type>), ParseError> {
        let name = self.text("a weight's name")?;
        self.sign(':')?;
        Ok((Vec::new(), Attrs::none().with("name", name), vec![self.ty()?]))
    }

    /// `@callee(%a, %b)`
    fn call(&mut self, scope: &Scope) -> Result<(Vec<Value>, Attrs, Vec<Type>), ParseError> {
        let Token::Function(name) = self.peek().clone() else { return self.unexpected("a function's name") };
        let callee = scope.callees.iter().find(|f| f.name == name);
        let unknown = Problem::Unknown { what: "function", name: format!("@{name}") };
        let callee = callee.ok_or_else(|| self.error_at(self.at, unknown))?;
        self.next();
        self.sign('(')?;
        let operands = self.operands(scope)?;
        self.sign(')')?;
        let types = callee.results.iter().map(|&v| callee.ty(v).clone()).collect();
        Ok((operands, Attrs::none().with("function", name), types))
    }

    /// Operands and attributes of any other op, whose shape rule gives the types.
    fn plain(&mut self, op: Op, at: usize, scope: &Scope) -> Result<(Vec<Value>, Attrs, Vec<Type>), ParseError> {
        let operands = self.operands(scope)?;
        let mut attrs = Attrs::none();
        if self.accept_sign('{') {
            attrs.0.extend(self.list('}', Self::attribute)?);
        }
        let types: Vec<&Type> = operands.iter().map(|&v| scope.function.ty(v)).collect();
        let types = (op.def().shape)(&types, &attrs);
        let types = types.map_err(|error| self.error_at(at, Problem::Shape { op, error }))?;
        Ok((operands, attrs, types))
    }

    fn attribute(&mut self) -> Result<(String, Attr), ParseError> {
        let name = self.word("an attribute")?;
        self.sign('=')?;
        Ok((name, self.attr()?))
    }

    fn attr(&mut self) -> Result<Attr, ParseError> {
        match self.peek().clone() {
            Token::Text(text) => {
                self.next();
                Ok(text.into())
            }
            Token::Number(n) if n.parse::<i64>().is_err() => Ok(self.number::<f64>()?.into()),
            Token::Number(_) => Ok(self.number::<i64>()?.into()),
            Token::Word(w) if w == "NaN" || w == "inf" => {
                self.next();
                Ok(if w == "inf" { f64::INFINITY } else { f64::NAN }.into())
            }
            Token::Sign('[') => {
                self.next();
                Ok(self.list(']', Self::number::<i64>)?.into())
            }
            _ => self.unexpected("a number, a text or a list of integers"),
        }
    }

    /// `!kernel 3 !at T:512 _`
    fn annotations(&mut self, scope: &mut Scope, node: NodeId) -> Result<(), ParseError> {
        while self.accept_sign('!') {
            let at = self.at;
            let node = &mut scope.function.graph[node];
            match self.word("`kernel` or `at`")?.as_str() {
                "kernel" => node.kernel = Some(self.number()?),
                "at" => {
                    for place in &mut node.placement {
                        *place = self.place()?;
                    }
                }
                name => {
                    let problem = Problem::Unknown { what: "annotation", name: name.to_owned() };
                    return Err(self.error_at(at, problem));
                }
            }
        }
        Ok(())
    }

    fn place(&mut self) -> Result<Option<Placement>, ParseError> {
        let at = self.at;
        let name = self.word("`_`, `fixed` or a symbol")?;
        if name == "_" {
            return Ok(None);
        }
        let unit = symbol(&name);
        if unit.is_none() && name != "fixed" {
            return Err(self.error_at(at, Problem::Unknown { what: "symbol", name }));
        }
        self.sign(':')?;
        Ok(Some(Placement { unit, at_bytes: self.number()? }))
    }
}
