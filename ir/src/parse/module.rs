//! Modules in text: facts, weight table, functions.

use super::lexer::Token;
use super::{ParseError, Parser, Problem};
use crate::graph::{Module, Origin, RowRun, WeightDecl};

/// Most runs that one pattern may stand for.
const MAX_RUNS: u64 = 1 << 20;

impl Parser {
    /// `module "name" {..}`, `weights {..}`, then functions; the first two may be missing.
    pub(super) fn module(&mut self) -> Result<Module, ParseError> {
        let mut module = Module::default();
        if self.accept_word("module") {
            self.info(&mut module)?;
        }
        if self.accept_word("weights") {
            self.weights(&mut module)?;
        }
        while self.peek() != &Token::End {
            let at = self.at;
            let function = self.function(&module.functions)?;
            if module.function(&function.name).is_some() {
                let problem = Problem::Duplicate { what: "function", name: format!("@{}", function.name) };
                return Err(self.error_at(at, problem));
            }
            module.functions.push(function);
        }
        Ok(module)
    }

    fn info(&mut self, module: &mut Module) -> Result<(), ParseError> {
        let info = &mut module.info;
        info.name = self.text("the model's name")?;
        self.sign('{')?;
        while !self.accept_sign('}') {
            let at = self.at;
            let key = self.word("a fact's name")?;
            self.sign('=')?;
            match key.as_str() {
                "vocab_size" => info.vocab_size = self.number()?,
                "hidden_size" => info.hidden_size = self.number()?,
                "num_layers" => info.num_layers = self.number()?,
                "max_context" => info.max_context = self.number()?,
                "eos_token_ids" => {
                    self.sign('[')?;
                    info.eos_token_ids = self.list(']', Self::number)?;
                }
                "mtp" => info.mtp = self.truth()?,
                "has_weights" => info.has_weights = self.truth()?,
                _ => return Err(self.error_at(at, Problem::Unknown { what: "fact", name: key })),
            }
        }
        Ok(())
    }

    fn truth(&mut self) -> Result<bool, ParseError> {
        if self.accept_word("true") {
            return Ok(true);
        }
        self.keyword("false").map(|()| false)
    }

    fn weights(&mut self, module: &mut Module) -> Result<(), ParseError> {
        self.sign('{')?;
        while !self.accept_sign('}') {
            let at = self.at;
            let name = self.text("a weight's name")?;
            let decl = self.weight_decl()?;
            if module.weights.insert(name.clone(), decl).is_some() {
                return Err(self.error_at(at, Problem::Duplicate { what: "weight", name }));
            }
        }
        Ok(())
    }

    /// `: weight<512 x 64 x bf16> in 1 rows ..`
    fn weight_decl(&mut self) -> Result<WeightDecl, ParseError> {
        self.sign(':')?;
        let at = self.at;
        let ty = self.ty()?;
        let Some(ty) = ty.as_weight().filter(|w| w.layout.is_none()) else {
            let problem = Problem::Unexpected { found: ty.to_string(), expected: "a weight without a layout".into() };
            return Err(self.error_at(at, problem));
        };
        self.keyword("in")?;
        let in_rank: usize = self.number()?;
        if in_rank > ty.shape.len() {
            return Err(self.error(Problem::Number(in_rank.to_string())));
        }
        let origin = if self.accept_word("values") {
            self.sign('[')?;
            Origin::Values(self.list(']', Self::single)?)
        } else {
            self.keyword("rows")?;
            Origin::Rows(self.rows()?)
        };
        Ok(WeightDecl { shape: ty.shape.clone(), in_rank, format: ty.format, origin })
    }

    fn single(&mut self) -> Result<f32, ParseError> {
        if self.accept_word("NaN") {
            return Ok(f32::NAN);
        }
        if self.accept_word("inf") { Ok(f32::INFINITY) } else { self.number() }
    }

    /// Runs of rows, patterns written out; perhaps none.
    fn rows(&mut self) -> Result<Vec<RowRun>, ParseError> {
        let mut runs = Vec::new();
        while matches!(self.peek(), Token::Text(_)) {
            // the name of the next weight is a text too, but a `:` follows it
            if matches!(self.tokens.get(self.at + 1), Some((Token::Sign(':'), _))) {
                break;
            }
            self.run(&mut runs)?;
            if !self.accept_sign(',') {
                break;
            }
        }
        Ok(runs)
    }

    fn range(&mut self) -> Result<(u64, u64), ParseError> {
        let (first, at) = (self.number()?, self.at);
        self.expect(&Token::Range)?;
        let end: u64 = self.number()?;
        if end < first {
            return Err(self.error_at(at + 1, Problem::Number(end.to_string())));
        }
        Ok((first, end))
    }

    /// `"t"[0..128 by 768 x 16, col 64]` or `"t.{}.w"[0..32] for 0..8`
    fn run(&mut self, runs: &mut Vec<RowRun>) -> Result<(), ParseError> {
        let tensor = self.text("a tensor's name")?;
        self.sign('[')?;
        let (first, end) = self.range()?;
        let (mut step, mut count) = (0u64, 1u64);
        if self.accept_word("by") {
            step = self.number()?;
            self.keyword("x")?;
            count = self.count()?;
        }
        let mut column = 0;
        if self.accept_sign(',') {
            self.keyword("col")?;
            column = self.number()?;
        }
        self.sign(']')?;
        let rows = end - first;
        if self.accept_word("for") {
            let (from, to) = self.range()?;
            if to - from > MAX_RUNS {
                return Err(self.error(Problem::Number(to.to_string())));
            }
            let named = |i: u64| RowRun { tensor: tensor.replacen("{}", &i.to_string(), 1), first, rows, column };
            runs.extend((from..to).map(named));
            return Ok(());
        }
        for i in 0..count {
            let first = step.checked_mul(i).and_then(|offset| offset.checked_add(first));
            let first = first.ok_or_else(|| self.error(Problem::Number(step.to_string())))?;
            runs.push(RowRun { tensor: tensor.clone(), first, rows, column });
        }
        Ok(())
    }

    fn count(&mut self) -> Result<u64, ParseError> {
        let count: u64 = self.number()?;
        if count > MAX_RUNS { Err(self.error(Problem::Number(count.to_string()))) } else { Ok(count) }
    }
}
