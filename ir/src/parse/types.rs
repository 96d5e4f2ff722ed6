//! Types in text: `tensor<T x 64 x f32>`, `weight<16 x 64 x bf16 @ tile16>`, `state<kv x 2 x 256 x bf16>`, `sequences`, `bundle<..>`.

use super::lexer::Token;
use super::{ParseError, Parser, Problem};

use crate::dtype::DType;
use crate::format::Format;
use crate::layout::Layout;
use crate::shape::{Dim, Shape, Sym};
use crate::stored::Stored;
use crate::types::{StateKind, StateType, TensorType, Type, WeightType};

/// How deep bundles may lie in bundles.
const MAX_DEPTH: usize = 16;

impl Parser {
    /// A type.
    pub(super) fn ty(&mut self) -> Result<Type, ParseError> {
        self.type_at_depth(0)
    }

    fn type_at_depth(&mut self, depth: usize) -> Result<Type, ParseError> {
        if depth > MAX_DEPTH {
            return Err(self.error(Problem::TooDeep));
        }
        let name = self.word("a type")?;
        if name == "sequences" {
            return Ok(Type::Sequences);
        }
        let here = self.at.saturating_sub(1);
        if !["tensor", "weight", "state", "bundle"].contains(&name.as_str()) {
            return Err(self.error_at(here, Problem::Unknown { what: "type", name }));
        }
        self.sign('<')?;
        match name.as_str() {
            "bundle" => return self.list('>', |p| p.type_at_depth(depth + 1)).map(Type::Bundle),
            "tensor" => self.tensor(),
            "weight" => self.weight_type().map(Type::Weight),
            _ => self.state(),
        }
        .and_then(|ty| self.sign('>').map(|()| ty))
    }

    /// `T x 64 x f32`
    fn tensor(&mut self) -> Result<Type, ParseError> {
        let mut dims = Vec::new();
        loop {
            match self.peek().clone() {
                Token::Number(_) => dims.push(Dim::Const(self.number()?)),
                Token::Word(w) => match (symbol(&w), DType::from_name(&w)) {
                    (Some(sym), _) => {
                        self.next();
                        dims.push(if self.accept_sign('+') {
                            Dim::SymPlus(sym, self.number()?)
                        } else {
                            Dim::Sym(sym)
                        });
                    }
                    (_, Some(dtype)) => {
                        self.next();
                        return Ok(Type::Tensor(TensorType { shape: Shape(dims), dtype }));
                    }
                    _ => return self.unexpected("a dimension or an element type"),
                },
                _ => return self.unexpected("a dimension or an element type"),
            }
            self.keyword("x")?;
        }
    }

    /// `16 x 64 x bf16 @ tile16`
    fn weight_type(&mut self) -> Result<WeightType, ParseError> {
        let mut shape = Vec::new();
        while matches!(self.peek(), Token::Number(_)) {
            shape.push(self.number()?);
            self.keyword("x")?;
        }
        let name = self.format_name()?;
        let unknown = |what, name: String| Problem::Unknown { what, name };
        let format = Format::from_name(&name).ok_or_else(|| self.error(unknown("weight format", name)))?;
        let mut layout = None;
        if self.accept_sign('@') {
            let name = self.word("a layout")?;
            layout = Some(Layout::from_name(&name).ok_or_else(|| self.error(unknown("layout", name)))?);
        }
        Ok(WeightType { shape, format, layout })
    }

    /// `bf16`, `q4<g32>`, `fp8<128x128>`: a word, and what stands in brackets behind it.
    fn format_name(&mut self) -> Result<String, ParseError> {
        let mut name = self.word("a weight format")?;
        if !self.accept_sign('<') {
            return Ok(name);
        }
        name.push('<');
        while !self.accept_sign('>') {
            match self.peek().clone() {
                Token::Word(text) | Token::Number(text) => name.push_str(&text),
                Token::Sign(',') => name.push(','),
                _ => return self.unexpected("the blocks of a weight format"),
            }
            self.next();
        }
        Ok(name + ">")
    }

    /// `kv x 2 x 256`; a state always has the dimensions of its kind. What KV is stored in follows them if it is not f32.
    fn state(&mut self) -> Result<Type, ParseError> {
        let name = self.word("a kind of state")?;
        let unknown = |name| Problem::Unknown { what: "kind of state", name };
        let kind = StateKind::from_name(&name).ok_or_else(|| self.error(unknown(name)))?;
        let rank = if kind == StateKind::Kv { 2 } else { 3 };
        let mut dims = Vec::new();
        for _ in 0..rank {
            self.keyword("x")?;
            dims.push(self.number()?);
        }
        let mut stored = Stored::F32;
        if kind == StateKind::Kv && matches!(self.peek(), Token::Word(w) if w == "x") {
            self.next();
            let name = self.word("what KV is stored in")?;
            stored =
                Stored::from_name(&name).ok_or_else(|| self.error(Problem::Unknown { what: "type of KV", name }))?;
        }
        Ok(Type::State(StateType { kind, dims, stored }))
    }
}

/// The symbol called `name`.
pub(super) fn symbol(name: &str) -> Option<Sym> {
    Sym::ALL.into_iter().find(|s| s.name() == name)
}
