//! The operands of a run: a step, and a value for each parameter from a seeded generator.
//!
//! - `; step 0+5@1 63+3@2`: sequences as FIRST+TOKENS@SLOT; several lines are several steps, none stands for [`STEPS`]
//! - `; parts 4 1 2`: a new sequence of 7 tokens, in one step and in three, must give the same bits
//! - `; rows 4 0`: the rows that are gathered (else the first)
//! - `; value NAME spread X`: between -X and X (else 1); `cycle A B ..`: these in turn; `below N`: integers;
//!   `choices N`: different experts of N for each token, to which `order` and `table` are made

use nextc_ir::build::FunctionBuilder;
use nextc_ir::eval::{Cx, Datum, Sequences, State, WeightStore, evaluate};
use nextc_ir::graph::{Function, NodeId};
use nextc_ir::schedule::Input;
use nextc_ir::shape::{Dim, Shape, Sym};
use nextc_ir::types::{StateKind, StateType, TensorType, WeightType};
use nextc_ir::{Attrs, DType, Op, Type};

use super::{Case, Checked, codes, memory, text};

/// Tokens in a page of KV.
pub const PAGE_TOKENS: usize = 64;

/// One token of a new sequence and of an old one, a run that fills no block, and sequences that begin, go on across a page's
/// border, are padding, and reach into a third page; the last again, tentative (`?`) and after tentative steps (`~` accepted).
const STEPS: [&str; 5] =
    ["0+1@0", "70+1@0", "0+7@0", "0+5@1 63+3@2 9+2@-1 130+1@0", "0+5@1? 63+3@2~2? 9+2@-1 130+1@0~3"];

/// A step.
#[derive(Debug)]
pub struct Step {
    /// First position, tokens, slot.
    runs: Vec<(i32, usize, i32)>,
    /// Replayed tokens of each run, and 1 if it is tentative.
    kept: Vec<[i32; 2]>,
    rows: Vec<i32>,
}

/// The steps of a case.
pub fn steps(case: &Case) -> Checked<Vec<Step>> {
    let mut lines: Vec<&str> = case.directives("step").collect();
    if lines.is_empty() {
        lines = STEPS.to_vec();
    }
    let rows = case.directives("rows").next().unwrap_or("0");
    let rows: Vec<i32> = rows.split_whitespace().map(number).collect::<Checked<_>>()?;
    lines.into_iter().map(|l| Step::parse(l, &rows)).collect()
}

/// New sequences in slot 0, each as one step and in parts.
pub fn parts(case: &Case) -> Checked<Vec<(Step, Vec<Step>)>> {
    let one = |line: &str| {
        let counts: Vec<usize> = line.split_whitespace().map(number).collect::<Checked<_>>()?;
        let mut first = 0;
        let parts = counts.into_iter().map(|tokens| {
            first += tokens;
            Step { runs: vec![((first - tokens) as i32, tokens, 0)], kept: vec![[0, 0]], rows: vec![0] }
        });
        let parts: Vec<Step> = parts.collect();
        Ok((Step { runs: vec![(0, first, 0)], kept: vec![[0, 0]], rows: vec![0] }, parts))
    };
    case.directives("parts").map(one).collect()
}

fn number<T: std::str::FromStr>(text: &str) -> Checked<T> {
    text.parse().map_err(|_| format!("`{text}` is no number of its kind"))
}

impl Step {
    fn parse(line: &str, rows: &[i32]) -> Checked<Self> {
        let run = |word: &str| {
            let (first, rest) = word.split_once('+').ok_or("a run is FIRST+TOKENS@SLOT")?;
            let (tokens, slot) = rest.split_once('@').ok_or("a run is FIRST+TOKENS@SLOT")?;
            let tentative = slot.ends_with('?');
            let (slot, replay) =
                slot.trim_end_matches('?').split_once('~').unwrap_or((slot.trim_end_matches('?'), "0"));
            let kept = [number(replay)?, i32::from(tentative)];
            Ok(((number(first)?, number(tokens)?, number(slot)?), kept))
        };
        let (runs, kept) = line.split_whitespace().map(run).collect::<Checked<Vec<_>>>()?.into_iter().unzip();
        Ok(Self { runs, kept, rows: rows.to_vec() })
    }

    fn tokens(&self) -> usize {
        self.runs.iter().map(|r| r.1).sum()
    }

    /// Pages of one sequence.
    fn pages(&self) -> usize {
        self.runs.iter().map(|r| (r.0 as usize + r.1).div_ceil(PAGE_TOKENS)).max().unwrap_or(1)
    }

    /// Pages or slots that a state has.
    pub fn units(&self, kind: StateKind) -> usize {
        if kind == StateKind::Kv { self.pages() * self.runs.len() } else { self.runs.len() }
    }

    /// How far the sequence of a slot is known after the step: the position from which on its inputs may be read again, and the one after the last; `None` if it has no tokens.
    pub fn moves(&self, slot: u32) -> Option<(i64, i64)> {
        let mut runs = self.runs.iter().zip(&self.kept);
        let (&(first, tokens, _), kept) = runs.find(|(r, _)| r.2 == slot as i32 && r.1 > 0)?;
        let end = i64::from(first) + tokens as i64;
        Some((if kept[1] == 0 { end } else { first.into() }, end))
    }

    /// The position of its first token.
    pub fn position(&self) -> u64 {
        self.runs.first().map_or(0, |r| r.0 as u64)
    }

    /// T, B, P and R.
    pub fn syms(&self) -> [u64; 4] {
        [self.tokens(), self.runs.len(), self.pages(), self.rows.len()].map(|n| n as u64)
    }

    /// What kernels read of the step.
    pub fn input(&self, input: Input) -> Vec<i32> {
        match input {
            Input::Positions => self.runs.iter().flat_map(|&(first, n, _)| first..first + n as i32).collect(),
            Input::CuSeqlens => std::iter::once(0).chain(self.ends()).collect(),
            Input::Slot => self.runs.iter().map(|r| r.2).collect(),
            Input::Replay => self.kept.iter().map(|k| k[0]).collect(),
            Input::Tentative => self.kept.iter().map(|k| k[1]).collect(),
            // backwards, so that no page lies where its position would put it
            Input::PageTable => (0..self.units(StateKind::Kv) as i32).rev().collect(),
            Input::LogitRows => self.rows.clone(),
            Input::Tokens | Input::Hidden | Input::Wanted => unreachable!("operands of their own"),
            Input::Factors | Input::Choices | Input::EditTokens | Input::EditCounts | Input::EditBiases => {
                unreachable!("operands of their own")
            }
        }
    }

    fn ends(&self) -> impl Iterator<Item = i32> {
        self.runs.iter().scan(0, |end, r| {
            *end += r.1 as i32;
            Some(*end)
        })
    }

    /// The rows of an argument that this part of a step has, from row `first` on; what is no tensor has none.
    pub fn rows_of(&self, ty: &Type, arg: &Datum<f32>, first: usize) -> Checked<Datum<f32>> {
        let of = |dims: &[usize]| {
            let row: usize = dims.iter().skip(1).product();
            let dims: Vec<usize> = std::iter::once(self.tokens()).chain(dims.iter().skip(1).copied()).collect();
            (dims, first * row..(first + self.tokens()) * row)
        };
        match (ty, arg) {
            (Type::Sequences, _) => self.sequences(),
            // a table that is not of tokens
            (Type::Tensor(t), other) if matches!(t.shape.0.first(), Some(Dim::Const(_))) => Ok(other.clone()),
            (Type::Tensor(_), Datum::Float(a)) => {
                let (dims, range) = of(a.dims());
                Datum::floats(&dims, a.data()[range].to_vec()).map_err(text)
            }
            (Type::Tensor(_), Datum::Int(a)) => {
                let (dims, range) = of(a.dims());
                Datum::ints(&dims, a.data()[range].to_vec()).map_err(text)
            }
            (_, other) => Ok(other.clone()),
        }
    }

    fn sequences(&self) -> Checked<Datum<f32>> {
        let array = |input, dims: &[usize]| {
            let datum = Datum::<f32>::ints(dims, self.input(input)).map_err(text)?;
            datum.int().map_err(text).cloned()
        };
        let (t, b) = (self.tokens(), self.runs.len());
        let (positions, cu_seqlens) = (array(Input::Positions, &[t])?, array(Input::CuSeqlens, &[b + 1])?);
        let (slot, table) = (array(Input::Slot, &[b])?, array(Input::PageTable, &[b, self.pages()])?);
        let sequences = Sequences::new(&positions, &cu_seqlens, &slot, &table).map_err(text)?;
        let (replay, tentative) = (array(Input::Replay, &[b])?, array(Input::Tentative, &[b])?);
        let sequences = sequences.with_tentative(&replay, &tentative).map_err(text)?;
        Ok(Datum::Sequences(sequences.into()))
    }
}

/// Uniform numbers: xorshift.
struct Random(u64);

impl Random {
    /// Between -1 and 1.
    fn one(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// What a case says of the values of a parameter.
#[derive(Clone, Debug)]
enum Fill {
    Spread(f32),
    /// Like a sum of squares: positive.
    Positive,
    Cycle(Vec<f32>),
    Below(i32),
    Choices(usize),
}

impl Fill {
    fn of(case: &Case, name: &str) -> Checked<Self> {
        let mut lines = case.directives("value").filter_map(|l| l.split_once(' '));
        match lines.find(|(n, _)| *n == name).map(|(_, fill)| fill.split_once(' ').unwrap_or((fill, ""))) {
            None if name == "ssq" => Ok(Self::Positive),
            None => Ok(Self::Spread(1.0)),
            Some(("spread", x)) => Ok(Self::Spread(number(x)?)),
            Some(("cycle", xs)) => Ok(Self::Cycle(xs.split(' ').map(number).collect::<Checked<_>>()?)),
            Some(("below", n)) => Ok(Self::Below(number(n)?)),
            Some(("choices", n)) => Ok(Self::Choices(number(n)?)),
            Some((word, _)) => Err(format!("`{word}`, expected `spread`, `cycle`, `below` or `choices`")),
        }
    }

    fn floats(&self, count: usize, random: &mut Random) -> Checked<Vec<f32>> {
        Ok(match self {
            Self::Spread(x) => (0..count).map(|_| random.one() * x).collect(),
            Self::Positive => (0..count).map(|_| random.one().abs() * 16.0 + 0.1).collect(),
            Self::Cycle(xs) => xs.iter().copied().cycle().take(count).collect(),
            Self::Below(_) | Self::Choices(_) => return Err("these are floats".to_owned()),
        })
    }

    fn ints(&self, dims: &[usize]) -> Checked<Vec<i32>> {
        let count: usize = dims.iter().product();
        match (self, dims) {
            (Self::Cycle(xs), _) => Ok(xs.iter().map(|&x| x as i32).cycle().take(count).collect()),
            (Self::Below(n), _) => Ok((0..count as i32).map(|i| (i * i + 7 * i) % n).collect()),
            (&Self::Choices(n), &[tokens, k]) => {
                Ok((0..tokens).flat_map(|t| (0..k).map(move |s| ((t * t + s * 5) % n) as i32)).collect())
            }
            _ => Err("integers need `; value NAME below N`, `cycle A B ..` or `choices N`".to_owned()),
        }
    }
}

/// A value for each parameter of a function.
pub fn arguments(case: &Case, function: &Function, step: &Step) -> Checked<Vec<Datum<f32>>> {
    let names: Vec<&str> = function.params.iter().filter_map(|&p| function.node(p).name.as_deref()).collect();
    let named = case.directives("value").map(|l| l.split(' ').next().unwrap_or_default());
    if let Some(name) = named.into_iter().find(|name| !names.contains(name)) {
        return Err(format!("`; value {name}`: there is no such parameter"));
    }
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let one = |&param| {
        let node = function.node(param);
        let name = node.name.as_deref().unwrap_or_default();
        argument(case, name, (&node.types[0], in_rank(function, param)), step, &mut random)
            .map_err(|e| format!("%{name}: {e}"))
    };
    function.params.iter().map(one).collect()
}

fn argument(
    case: &Case,
    name: &str,
    (ty, in_rank): (&Type, usize),
    step: &Step,
    random: &mut Random,
) -> Checked<Datum<f32>> {
    match ty {
        Type::Tensor(t) if t.dtype == DType::I32 => integers(case, name, t, step),
        Type::Tensor(t) => {
            let dims = t.shape.eval(&step.syms());
            let values = Fill::of(case, name)?.floats(dims.iter().product(), random)?;
            Datum::floats(&dims, values).map_err(text)
        }
        Type::Weight(w) => weight(w, in_rank, &Fill::of(case, name)?, random),
        Type::State(s) => state(s, &Fill::of(case, name)?, step, random),
        Type::Sequences => step.sequences(),
        Type::Bundle(_) => Err("a bundle is no parameter of a test; make it in the function".to_owned()),
    }
}

/// Integers: `order` and `table` belong to the choices of experts.
fn integers(case: &Case, name: &str, ty: &TensorType, step: &Step) -> Checked<Datum<f32>> {
    let dispatched = ["order", "table"].iter().position(|n| *n == name);
    if let (Some(result), Fill::Choices(experts)) = (dispatched, Fill::of(case, "ids")?) {
        return dispatch(case, experts, step)?.into_iter().nth(result).ok_or_else(|| "no such result".to_owned());
    }
    if name == "rows" {
        return Datum::ints(&[step.rows.len()], step.rows.clone()).map_err(text);
    }
    let dims = ty.shape.eval(&step.syms());
    Datum::ints(&dims, Fill::of(case, name)?.ints(&dims)?).map_err(text)
}

/// `order` and `table` of the choices.
fn dispatch(case: &Case, experts: usize, step: &Step) -> Checked<Vec<Datum<f32>>> {
    let per_token =
        case.directives("per-token").next().ok_or("`; per-token K` must say how many experts a token has")?;
    let k: usize = number(per_token)?;
    let ids = Fill::Choices(experts).ints(&[step.tokens(), k])?;
    let mut b = FunctionBuilder::new("dispatch");
    let param = b.param("ids", Type::i32(Shape::rows(Sym::T, &[k as u64])));
    let results = b.op_n(Op::Dispatch, &[param], Attrs::none().with("experts", experts as i64)).map_err(text)?;
    let ids = Datum::ints(&[step.tokens(), k], ids).map_err(text)?;
    evaluate(&b.finish(results), vec![ids], &WeightStore::new(), &Cx::new(PAGE_TOKENS)).map_err(text)
}

/// How many dimensions of a matrix are inputs: those of the rows that it is multiplied with.
pub fn in_rank(function: &Function, param: NodeId) -> usize {
    let by_user = |(user, _): &(NodeId, nextc_ir::graph::Use)| {
        let multiplies = matches!(function.node(*user).op, Op::Linear | Op::LinearResidual);
        let x = function.operands(*user)[0];
        function.ty(x).as_tensor().filter(|_| multiplies).map(|t| t.shape.rank() - 1)
    };
    function.users(param).iter().find_map(by_user).unwrap_or(1)
}

/// Numbers as they come back from the weight's format; those of a scaled one come from its codes.
fn weight(ty: &WeightType, in_rank: usize, fill: &Fill, random: &mut Random) -> Checked<Datum<f32>> {
    let dims: Vec<usize> = ty.shape.iter().map(|&d| d as usize).collect();
    if ty.format.blocks().is_some() {
        return Datum::floats(&dims, codes::numbers(ty, in_rank)).map_err(text);
    }
    let def = ty.format.def();
    let stored = fill.floats(dims.iter().product(), random)?.into_iter().map(|x| (def.decode)((def.encode)(x)));
    Datum::floats(&dims, stored.collect()).map_err(text)
}

/// A state that holds something in every slot and page.
fn state(ty: &StateType, fill: &Fill, step: &Step, random: &mut Random) -> Checked<Datum<f32>> {
    let mut state = State::new(ty, PAGE_TOKENS);
    let elems = state.unit_elems();
    for unit in 0..step.units(ty.kind) {
        let mut values = fill.floats(elems, random)?;
        memory::round(ty, &mut values);
        state.unit_mut(unit as u32).copy_from_slice(&values);
    }
    Ok(Datum::State(state))
}
