//! Reads the text of kernels, as [`super::print`] writes it.
//!
//! Values may have any names; regions are scopes. The types of results follow from the ops ([`infer`]), so a kernel that was
//! read has well-typed ops; whether it keeps the other invariants is for [`super::verify`] to say.

mod lex;

use std::collections::HashMap;

use self::lex::{Kind, Token};
use super::verify::{Broken, RESERVED, infer};
use super::{KOp, KParam, KType, Kernel, Pred, Region, Space, Stmt, Val};
use crate::dtype::DType;
use crate::schedule::Extent;
use crate::shape::Sym;

/// Why a text is no kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Something else was expected.
    #[error("line {line}: found `{found}`, expected {expected}")]
    Syntax {
        /// Line, from 1.
        line: usize,
        /// What is there.
        found: String,
        /// What could be there.
        expected: &'static str,
    },
    /// An op with wrong operands or constants.
    #[error("line {line}: {op}: {broken}")]
    Op {
        /// Line, from 1.
        line: usize,
        /// The op.
        op: &'static str,
        /// What is wrong.
        broken: Broken,
    },
    /// A name without a value, or a name for a second one.
    #[error("line {line}: `%{name}` is {what}")]
    Name {
        /// Line, from 1.
        line: usize,
        /// The name.
        name: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Brackets in brackets, more than any kernel needs.
    #[error("line {line}: nested more than {MAX_DEPTH} deep")]
    Depth {
        /// Line, from 1.
        line: usize,
    },
}

/// Regions in regions, or brackets of an extent.
const MAX_DEPTH: usize = 64;

/// Ops whose text is their name and their operands.
const PLAIN: [KOp; 42] = [
    KOp::Add,
    KOp::Sub,
    KOp::Mul,
    KOp::Div,
    KOp::Rem,
    KOp::And,
    KOp::Or,
    KOp::Xor,
    KOp::Shl,
    KOp::Ushr,
    KOp::Sshr,
    KOp::Fadd,
    KOp::Fsub,
    KOp::Fmul,
    KOp::Fdiv,
    KOp::Fmin,
    KOp::Fmax,
    KOp::Fma,
    KOp::ShortDot,
    KOp::Fneg,
    KOp::Fabs,
    KOp::Fsqrt,
    KOp::Fround,
    KOp::Select,
    KOp::ToFloat,
    KOp::ToInt,
    KOp::Widen,
    KOp::Narrow,
    KOp::ReduceAdd,
    KOp::ReduceMax,
    KOp::Offset,
    KOp::HalfToFloat,
    KOp::Fp8ToF16,
    KOp::WarpMax,
    KOp::WarpMin,
    KOp::Quad,
    KOp::Bf16Row,
    KOp::Bf16Pairs,
    KOp::ByteRow,
    KOp::ByteDot,
    KOp::PairDot,
    KOp::TileTurn,
];

/// Reads one kernel.
/// # Errors
/// [`ParseError`] with the line and what was expected there.
pub fn kernel(text: &str) -> Result<Kernel, ParseError> {
    let tokens = lex::tokens(text)?;
    let mut parser = Parser { tokens, at: 0, types: Vec::new(), scopes: vec![HashMap::new()], depth: 0 };
    let kernel = parser.kernel()?;
    parser.expect(Kind::End, "the end of the text")?;
    Ok(kernel)
}

struct Parser<'t> {
    tokens: Vec<Token<'t>>,
    at: usize,
    types: Vec<KType>,
    /// Names of values, one map for each open region.
    scopes: Vec<HashMap<&'t str, Val>>,
    depth: usize,
}

type Parsed<T> = Result<T, ParseError>;

impl<'t> Parser<'t> {
    // ---- tokens
    fn peek(&self) -> Token<'t> {
        self.tokens[self.at.min(self.tokens.len() - 1)]
    }

    fn next(&mut self) -> Token<'t> {
        let token = self.peek();
        self.at += 1;
        token
    }

    fn unexpected<T>(&self, token: Token<'t>, expected: &'static str) -> Parsed<T> {
        Err(ParseError::Syntax { line: token.line, found: token.to_string(), expected })
    }

    fn expect(&mut self, kind: Kind, expected: &'static str) -> Parsed<&'t str> {
        let token = self.next();
        if token.kind == kind { Ok(token.text) } else { self.unexpected(token, expected) }
    }

    fn is_punct(&self, text: &str) -> bool {
        let token = self.peek();
        token.kind == Kind::Punct && token.text == text
    }

    fn eat(&mut self, punct: &str) -> bool {
        let found = self.is_punct(punct);
        self.at += usize::from(found);
        found
    }

    fn punct(&mut self, text: &'static str) -> Parsed<()> {
        if self.eat(text) {
            return Ok(());
        }
        self.unexpected(self.peek(), text)
    }

    fn eat_word(&mut self, word: &str) -> bool {
        let token = self.peek();
        let found = token.kind == Kind::Word && token.text == word;
        self.at += usize::from(found);
        found
    }

    fn word(&mut self, word: &'static str) -> Parsed<()> {
        if self.eat_word(word) {
            return Ok(());
        }
        self.unexpected(self.peek(), word)
    }

    /// A word that `read` understands.
    fn read<T>(&mut self, expected: &'static str, read: impl FnOnce(&str) -> Option<T>) -> Parsed<T> {
        let token = self.next();
        let value = if token.kind == Kind::Word { read(token.text) } else { None };
        value.map_or_else(|| self.unexpected(token, expected), Ok)
    }

    fn number(&mut self) -> Parsed<u64> {
        self.read("a number", |w| w.parse().ok())
    }

    fn deeper<T>(&mut self, inner: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        if self.depth == MAX_DEPTH {
            return Err(ParseError::Depth { line: self.peek().line });
        }
        self.depth += 1;
        let result = inner(self);
        self.depth -= 1;
        result
    }

    // ---- values
    fn define(&mut self, (name, line): (&'t str, usize), ty: KType) -> Parsed<Val> {
        if self.scopes.iter().any(|s| s.contains_key(name)) {
            return Err(ParseError::Name { line, name: name.to_owned(), what: "already defined" });
        }
        let v = Val(self.types.len() as u32);
        self.types.push(ty);
        self.scopes.last_mut().expect("a scope is open").insert(name, v);
        Ok(v)
    }

    fn new_name(&mut self) -> Parsed<(&'t str, usize)> {
        let line = self.peek().line;
        Ok((self.expect(Kind::Value, "a value's name")?, line))
    }

    fn value(&mut self) -> Parsed<Val> {
        let (name, line) = self.new_name()?;
        let found = self.scopes.iter().rev().find_map(|s| s.get(name)).copied();
        found.ok_or_else(|| ParseError::Name { line, name: name.to_owned(), what: "not defined" })
    }

    /// How many tiles of rows and of columns.
    fn tiles(&mut self) -> Parsed<(u32, u32)> {
        let [rows, columns] = [(); 2].map(|()| self.read("a number of tiles", |w| w.parse().ok()));
        Ok((rows?, columns?))
    }

    fn small(&mut self, what: &'static str) -> Parsed<u32> {
        self.read(what, |w| w.parse().ok())
    }

    fn values(&mut self) -> Parsed<Vec<Val>> {
        let mut values = vec![self.value()?];
        while self.eat(",") {
            values.push(self.value()?);
        }
        Ok(values)
    }

    fn types_of(&self, vals: &[Val]) -> Vec<KType> {
        vals.iter().map(|v| self.types[v.0 as usize]).collect()
    }

    // ---- a kernel
    fn kernel(&mut self) -> Parsed<Kernel> {
        let mut doc = Vec::new();
        while self.peek().kind == Kind::Doc {
            doc.push(self.next().text);
        }
        for name in RESERVED {
            self.define((name, 0), KType::scalar(DType::I64))?;
        }
        self.word("kernel")?;
        let name = self.expect(Kind::Global, "a kernel's name, as `@name`")?.to_owned();
        let params = self.params()?;
        self.word("grid")?;
        self.punct("=")?;
        let grid = self.extent()?;
        let mut number = |word: &str, what: &'static str| {
            if !self.eat_word(word) {
                return Ok(1);
            }
            self.punct("=")?;
            self.read(what, |w| w.parse().ok())
        };
        let threads = number("threads", "a number of threads")?;
        let together = number("together", "a number of blocks")?;
        let body = self.block()?;
        let (tail, tail_grid) = self.tail()?;
        Ok(Kernel {
            name,
            doc: doc.join("\n"),
            params,
            grid,
            threads,
            together,
            body,
            tail,
            tail_grid,
            types: std::mem::take(&mut self.types),
        })
    }

    fn tail(&mut self) -> Parsed<(Option<Region>, Extent)> {
        if !self.eat_word("tail") {
            return Ok((None, 1.into()));
        }
        let grid = if self.eat_word("grid") {
            self.punct("=")?;
            self.extent()?
        } else {
            1.into()
        };
        Ok((Some(self.block()?), grid))
    }

    fn params(&mut self) -> Parsed<Vec<KParam>> {
        let mut params = Vec::new();
        self.punct("(")?;
        while !self.eat(")") {
            if !params.is_empty() {
                self.punct(",")?;
            }
            let name = self.new_name()?;
            self.punct(":")?;
            let written = self.eat_word("mut");
            self.word("ptr")?;
            self.punct("<")?;
            self.word("global")?;
            self.punct(">")?;
            self.define(name, KType::Ptr(Space::Global))?;
            params.push(KParam { name: name.0.to_owned(), written });
        }
        Ok(params)
    }

    fn extent(&mut self) -> Parsed<Extent> {
        self.deeper(|p| {
            if p.eat("(") {
                return p.sum_or_product();
            }
            if p.eat_word("ceil") {
                p.punct("(")?;
                let a = p.extent()?;
                p.punct("/")?;
                let n = p.read("a positive number", |w| w.parse().ok().filter(|&n: &u64| n > 0))?;
                p.punct(")")?;
                return Ok(a.ceil_div(n));
            }
            if p.eat_word("min") {
                p.punct("(")?;
                let a = p.extent()?;
                p.punct(",")?;
                let b = p.extent()?;
                p.punct(")")?;
                return Ok(a.min(b));
            }
            if p.eat_word("if") {
                p.punct("(")?;
                let a = p.extent()?;
                p.punct(">")?;
                let b = p.extent()?;
                p.punct(",")?;
                let then = p.extent()?;
                p.punct(",")?;
                let otherwise = p.extent()?;
                p.punct(")")?;
                return Ok(then.if_above(a, b, otherwise));
            }
            p.read("a number, T, B, P, R, `ceil(`, `min(` or `if(`", |w| {
                let sym = Sym::ALL.into_iter().find(|s| s.name() == w);
                sym.map(Extent::Sym).or_else(|| w.parse().ok().map(Extent::Const))
            })
        })
    }

    fn sum_or_product(&mut self) -> Parsed<Extent> {
        let a = self.extent()?;
        let sum = self.eat("+");
        if !sum {
            self.punct("*")?;
        }
        let b = self.extent()?;
        self.punct(")")?;
        Ok(if sum { a + b } else { a * b })
    }

    /// Statements in braces, with the values that they yield.
    fn block(&mut self) -> Parsed<Region> {
        self.scopes.push(HashMap::new());
        let region = self.open_block(Vec::new());
        self.scopes.pop();
        region
    }

    /// As [`Self::block`], in a scope that is already open and holds `params`.
    fn open_block(&mut self, params: Vec<Val>) -> Parsed<Region> {
        self.deeper(|p| {
            p.punct("{")?;
            let (mut stmts, mut yields) = (Vec::new(), Vec::new());
            while !p.eat("}") {
                if p.eat_word("yield") {
                    yields = p.values()?;
                    p.punct("}")?;
                    break;
                }
                stmts.push(p.stmt()?);
            }
            Ok(Region { params, stmts, yields })
        })
    }

    fn stmt(&mut self) -> Parsed<Stmt> {
        let mut names = Vec::new();
        if self.peek().kind == Kind::Value {
            names.push(self.new_name()?);
            while self.eat(",") {
                names.push(self.new_name()?);
            }
            self.punct("=")?;
        }
        let line = self.peek().line;
        let name = self.expect(Kind::Word, "an op")?;
        match name {
            "for" => self.for_loop(&names, line),
            "if" => self.condition(&names, line),
            _ => {
                let (op, args) = self.op(name, line)?;
                let fail = |broken| ParseError::Op { line, op: op.name(), broken };
                let ty = infer(op, &self.types_of(&args)).map_err(fail)?;
                let results = self.results(&names, &Vec::from_iter(ty), op, line)?;
                Ok(Stmt { op, args, results, regions: Vec::new() })
            }
        }
    }

    fn results(&mut self, names: &[(&'t str, usize)], types: &[KType], op: KOp, line: usize) -> Parsed<Vec<Val>> {
        if names.len() != types.len() {
            let broken = Broken::Count { of: "results", found: names.len(), expected: types.len() };
            return Err(ParseError::Op { line, op: op.name(), broken });
        }
        names.iter().zip(types).map(|(&name, &ty)| self.define(name, ty)).collect()
    }

    /// The constants and operands of an op without regions.
    fn op(&mut self, name: &str, line: usize) -> Parsed<(KOp, Vec<Val>)> {
        if let Some(&op) = PLAIN.iter().find(|op| op.name() == name) {
            return Ok((op, self.values()?));
        }
        Ok(match name {
            "const" => {
                let dtype = self.dtype()?;
                (KOp::Const { dtype, bits: self.constant(dtype)? }, Vec::new())
            }
            "alloc" => (KOp::Alloc { dtype: self.dtype()?, elems: self.number()? }, Vec::new()),
            "shared" => (KOp::Shared { dtype: self.dtype()?, elems: self.number()? }, Vec::new()),
            "partials" => (KOp::Partials { dtype: self.dtype()?, elems: self.number()? }, Vec::new()),
            "team" => (KOp::Team, Vec::new()),
            "thread" => (KOp::Thread, Vec::new()),
            "barrier" => (KOp::Barrier, Vec::new()),
            "wait" => (KOp::Wait, Vec::new()),
            "release" => (KOp::Release, Vec::new()),
            "shuffle_xor" => {
                let x = self.value()?;
                (KOp::ShuffleXor { mask: self.read("a lane mask", |w| w.parse().ok())? }, vec![x])
            }
            "pack" => (KOp::Pack { dtype: self.dtype()? }, self.values()?),
            "half_fma" => (KOp::HalfFma { dtype: self.dtype()? }, self.values()?),
            "mma" => (KOp::Mma { dtype: self.dtype()? }, self.values()?),
            "mma_group" => {
                let (dtype, steps, groups) = (self.dtype()?, self.small("steps")?, self.small("groups")?);
                (KOp::MmaGroup { dtype, steps, groups }, self.values()?)
            }
            "copy_async" => {
                let to = self.element()?;
                self.punct(",")?;
                (KOp::CopyAsync, [to, self.element()?].concat())
            }
            "copy_commit" => (KOp::CopyCommit, Vec::new()),
            "copy_wait" => (KOp::CopyWait { left: self.small("groups")? }, Vec::new()),
            "nibble" => {
                let words = self.value()?;
                (KOp::Nibble { shift: self.read("a shift", |w| w.parse().ok())? }, vec![words])
            }
            "tile_zero" => (KOp::TileZero, Vec::new()),
            "tile_step" => {
                let (rows, columns) = self.tiles()?;
                let once = self.eat_word("once");
                (KOp::TileStep { rows, columns, once }, self.values()?)
            }
            "tile_store" => {
                let (rows, columns) = self.tiles()?;
                (KOp::TileStore { rows, columns }, self.values()?)
            }
            "tile_load" => {
                let (rows, columns) = self.tiles()?;
                (KOp::TileLoad { rows, columns }, self.values()?)
            }
            "atomic_add" => (KOp::AtomicAdd, self.element_and_value()?),
            "prefetch" => (KOp::Prefetch, self.element_and_value()?),
            "splat" => {
                let lanes = self.read("lanes, as `x16`", |w| w.strip_prefix('x')?.parse().ok())?;
                (KOp::Splat { lanes }, vec![self.value()?])
            }
            "extract" => {
                let x = self.value()?;
                self.punct("[")?;
                let lane = self.read("a lane", |w| w.parse().ok())?;
                self.punct("]")?;
                (KOp::Extract { lane }, vec![x])
            }
            "cmp" => {
                let pred = self.read("eq, ne, lt, le, gt or ge", |w| Pred::ALL.into_iter().find(|p| p.name() == w))?;
                (KOp::Cmp { pred }, self.values()?)
            }
            "bitcast" => (KOp::Bitcast { dtype: self.dtype()? }, vec![self.value()?]),
            "load" => {
                let (dtype, lanes) = self.read("a type, as `f32x16`", vector)?;
                (KOp::Load { dtype, lanes }, self.element()?.to_vec())
            }
            "store" => (KOp::Store, self.element_and_value()?),
            _ => return Err(ParseError::Syntax { line, found: name.to_owned(), expected: "an op" }),
        })
    }

    fn dtype(&mut self) -> Parsed<DType> {
        self.read("an element type", DType::from_name)
    }

    fn constant(&mut self, dtype: DType) -> Parsed<i64> {
        match dtype {
            DType::F32 => self.read("an f32, or its bits in hex", |w| match w.strip_prefix("0x") {
                Some(hex) => u32::from_str_radix(hex, 16).ok().map(i64::from),
                None => w.parse().ok().filter(|x: &f32| x.is_finite()).map(|x| i64::from(x.to_bits())),
            }),
            DType::Bool => self.read("true or false", |w| w.parse().ok().map(|b: bool| i64::from(b))),
            _ => self.read("an integer", |w| w.parse().ok()),
        }
    }

    /// `%pointer[%index]`.
    fn element(&mut self) -> Parsed<[Val; 2]> {
        let pointer = self.value()?;
        self.punct("[")?;
        let index = self.value()?;
        self.punct("]")?;
        Ok([pointer, index])
    }

    /// `%pointer[%index], %value`.
    fn element_and_value(&mut self) -> Parsed<Vec<Val>> {
        let [pointer, index] = self.element()?;
        self.punct(",")?;
        Ok(vec![pointer, index, self.value()?])
    }

    fn for_loop(&mut self, names: &[(&'t str, usize)], line: usize) -> Parsed<Stmt> {
        let counter = self.new_name()?;
        self.punct("=")?;
        let mut args = vec![self.value()?];
        self.word("to")?;
        args.push(self.value()?);
        self.word("step")?;
        args.push(self.value()?);
        let mut carried = vec![counter];
        if self.eat_word("carry") {
            self.punct("(")?;
            while !self.eat(")") {
                if carried.len() > 1 {
                    self.punct(",")?;
                }
                carried.push(self.new_name()?);
                self.punct("=")?;
                args.push(self.value()?);
            }
        }
        let types = self.types_of(&args[3..]);
        self.scopes.push(HashMap::new());
        let region = self.loop_region(&carried, &types);
        self.scopes.pop();
        let regions = vec![region?];
        let results = self.results(names, &types, KOp::For, line)?;
        Ok(Stmt { op: KOp::For, args, results, regions })
    }

    fn loop_region(&mut self, names: &[(&'t str, usize)], carried: &[KType]) -> Parsed<Region> {
        let types = std::iter::once(KType::scalar(DType::I64)).chain(carried.iter().copied());
        let params = names.iter().zip(types).map(|(&name, ty)| self.define(name, ty)).collect::<Parsed<_>>()?;
        self.open_block(params)
    }

    fn condition(&mut self, names: &[(&'t str, usize)], line: usize) -> Parsed<Stmt> {
        let args = vec![self.value()?];
        let first = self.block()?;
        let second = if self.eat_word("else") { self.block()? } else { Region::default() };
        let types = self.types_of(&first.yields);
        let results = self.results(names, &types, KOp::If, line)?;
        Ok(Stmt { op: KOp::If, args, results, regions: vec![first, second] })
    }
}

/// `f32x16`, or `f32` for one lane.
fn vector(word: &str) -> Option<(DType, u32)> {
    match word.split_once('x') {
        Some((dtype, lanes)) => Some((DType::from_name(dtype)?, lanes.parse().ok()?)),
        None => Some((DType::from_name(word)?, 1)),
    }
}
