//! Invariants of kernels and of kernel modules, checked after lowering, after legalisation and before code is made.
//!
//! Every error is reported, not the first alone. What holds for a kernel that passes: operands and results have the types
//! that the op table asks for; each value is defined once, before its uses and in a region that encloses them; scratch is
//! allocated at the top level; stores go through scratch or through parameters marked as written. In memory are only `f32`,
//! `i32` and `i64`. For a module also: launches bind every parameter, to something that exists and may be written.

use std::collections::{BTreeSet, HashSet};

use super::{KOp, KType, Kernel, Region, Space, Stmt, Val};
use crate::dtype::DType;
use crate::graph::Placement;
use crate::schedule::{Arg, Extent, KernelModule, Launch, Program};
use crate::shape::Sym;

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel @{kernel}: {place}: {broken}")]
pub struct KernelError {
    /// The kernel, or the program with its launch.
    pub kernel: String,
    /// The statement, or the part of the kernel.
    pub place: String,
    /// What is wrong.
    pub broken: Broken,
}

/// What can be wrong with a kernel or a schedule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A wrong number of things.
    #[error("{found} {of}, expected {expected}")]
    Count {
        /// What is counted.
        of: &'static str,
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// An operand of a wrong type.
    #[error("operand {index} is {found}, expected {expected}")]
    Operand {
        /// Which operand.
        index: usize,
        /// Its type.
        found: String,
        /// What the op takes.
        expected: String,
    },
    /// A result, a yield or a parameter of a region of a wrong type.
    #[error("{what} %{} is {found}, expected {expected}", value.0)]
    Type {
        /// What it is.
        what: &'static str,
        /// The value.
        value: Val,
        /// Its type.
        found: KType,
        /// The type it should have.
        expected: KType,
    },
    /// A type that no value may have.
    #[error("value %{} has type {ty}, expected f32, i32, i64 or bool of 1, 2, 4, 8 or 16 lanes", value.0)]
    NoSuchType {
        /// The value.
        value: Val,
        /// Its type.
        ty: KType,
    },
    /// A use of a value that is not defined there.
    #[error("%{} is used where it is not defined", .0.0)]
    Undefined(Val),
    /// A second definition.
    #[error("%{} is defined twice", .0.0)]
    Redefined(Val),
    /// An op's constant is out of range.
    #[error("{what} is {found}, expected {expected}")]
    Constant {
        /// The constant.
        what: &'static str,
        /// What it is.
        found: i64,
        /// What it may be.
        expected: &'static str,
    },
    /// An allocation in a loop or a condition.
    #[error("scratch is allocated inside a region, expected at the top level")]
    NestedAlloc,
    /// A store through a parameter that is not marked as written.
    #[error("stores through parameter `{0}`, which is not marked `mut`")]
    ReadOnly(String),
    /// A bad or doubled name.
    #[error("name `{0}` is taken, reserved, or not made of letters, digits, `_` and `.`")]
    Name(String),
    /// A launch or output refers to something that does not exist.
    #[error("{what} {index} does not exist, there are {len}")]
    Missing {
        /// What.
        what: &'static str,
        /// Its index.
        index: u64,
        /// How many there are.
        len: u64,
    },
    /// A written parameter is bound to an input or a weight.
    #[error("parameter `{0}` is written, but bound to an input or a weight")]
    Constness(String),
    /// A placement outside the arena's plan.
    #[error("{} B .. {end} B per {} is outside the arena, which has {plan} B", at.at_bytes, unit(*at))]
    Placement {
        /// The placement.
        at: Placement,
        /// Its end, as far as known.
        end: u64,
        /// Bytes that the plan has for its unit.
        plan: u64,
    },
}

fn unit(at: Placement) -> &'static str {
    at.unit.map_or("step", Sym::name)
}

/// Checks one kernel.
/// # Errors
/// Every invariant it breaks.
pub fn verify_kernel(kernel: &Kernel) -> Result<(), Vec<KernelError>> {
    let mut checker = Checker::new(kernel);
    checker.header();
    if checker.errors.is_empty() {
        checker.kernel();
    }
    if checker.errors.is_empty() { Ok(()) } else { Err(checker.errors) }
}

/// Checks every kernel, and that schedules and tables fit together.
/// # Errors
/// Every invariant that is broken.
pub fn verify(module: &KernelModule) -> Result<(), Vec<KernelError>> {
    let mut errors: Vec<KernelError> = module.kernels.iter().filter_map(|k| verify_kernel(k).err()).flatten().collect();
    let mut names = HashSet::new();
    for kernel in &module.kernels {
        if !names.insert(&kernel.name) {
            errors.push(error(&kernel.name, "module", Broken::Name(kernel.name.clone())));
        }
    }
    for (i, &bytes) in module.arena.unit_bytes.iter().enumerate() {
        if !bytes.is_multiple_of(64) {
            let broken = Broken::Constant { what: "bytes a unit", found: bytes as i64, expected: "a multiple of 64" };
            errors.push(error("arena", Sym::ALL[i].name(), broken));
        }
    }
    for program in &module.programs {
        verify_program(module, program, &mut errors);
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn error(kernel: &str, place: &str, broken: Broken) -> KernelError {
    KernelError { kernel: kernel.to_owned(), place: place.to_owned(), broken }
}

fn verify_program(module: &KernelModule, program: &Program, errors: &mut Vec<KernelError>) {
    for (i, launch) in program.launches.iter().enumerate() {
        let place = format!("launch {i} of program `{}` ({})", program.name, launch.label);
        let name = module.kernels.get(launch.kernel as usize).map_or("?", |k| &k.name);
        errors.extend(launch_problems(module, launch).into_iter().map(|b| error(name, &place, b)));
    }
    for out in &program.outputs {
        let row_bytes = if out.at.unit == Some(out.rows) { out.stride * 4 } else { 1 };
        let place = format!("output `{}`", out.name);
        if let Some(b) = outside(module, out.at, row_bytes) {
            errors.push(error(&program.name, &place, b));
        }
        if out.width > out.stride {
            let broken = Broken::Constant { what: "width", found: out.width as i64, expected: "at most the stride" };
            errors.push(error(&program.name, &place, broken));
        }
    }
}

fn launch_problems(module: &KernelModule, launch: &Launch) -> Vec<Broken> {
    let Some(kernel) = module.kernels.get(launch.kernel as usize) else {
        let len = module.kernels.len() as u64;
        return vec![Broken::Missing { what: "kernel", index: launch.kernel.into(), len }];
    };
    let mut problems = Vec::new();
    if launch.args.len() != kernel.params.len() {
        let (found, expected) = (launch.args.len(), kernel.params.len());
        problems.push(Broken::Count { of: "arguments", found, expected });
    }
    for (arg, param) in launch.args.iter().zip(&kernel.params) {
        let table = |what, index: u32, len: usize| {
            (index as usize >= len).then_some(Broken::Missing { what, index: index.into(), len: len as u64 })
        };
        problems.extend(match *arg {
            Arg::Arena(at) => outside(module, at, 1),
            Arg::Weight(w) => table("weight", w, module.weights.len()),
            Arg::State(s) => table("state", s, module.states.len()),
            Arg::Input(_) => None,
        });
        if param.written && matches!(arg, Arg::Input(_) | Arg::Weight(_)) {
            problems.push(Broken::Constness(param.name.clone()));
        }
    }
    problems
}

/// A problem if `bytes` at a placement are not inside the plan, or not aligned to an element.
fn outside(module: &KernelModule, at: Placement, bytes: u64) -> Option<Broken> {
    let plan = at.unit.map_or(module.arena.fixed_bytes, |s| module.arena.unit_bytes[s.index()]);
    let end = at.at_bytes.saturating_add(bytes);
    if !at.at_bytes.is_multiple_of(4) {
        return Some(Broken::Constant { what: "placement", found: at.at_bytes as i64, expected: "a multiple of 4 B" });
    }
    (end > plan).then_some(Broken::Placement { at, end, plan })
}

/// The type of the result of an op without regions, from its operands' types; `None` for a store.
///
/// The parser types what it reads with this, the verifier compares.
/// # Errors
/// What is wrong with the operands or the op's constants.
pub fn infer(op: KOp, args: &[KType]) -> Result<Option<KType>, Broken> {
    let i64_scalar = KType::scalar(DType::I64);
    let like_first = |want: &str, ok: bool| if ok { Ok(Some(args[0])) } else { Err(operand(args, 0, want)) };
    count("operands", args.len(), arity(op))?;
    Ok(match op {
        KOp::Const { dtype, bits } => Some(constant(dtype, bits)?),
        KOp::Alloc { dtype, elems } => {
            in_memory(dtype)?;
            range("elements", elems, (1..=1 << 40).contains(&elems), "1 to 2^40")?;
            Some(KType::Ptr(Space::Scratch))
        }
        KOp::Splat { lanes } => {
            range("lanes", lanes.into(), lanes > 1 && lanes_exist(lanes), "2, 4, 8 or 16")?;
            let dtype = element(args, 0, 1)?;
            Some(KType::vector(dtype, lanes))
        }
        KOp::Extract { lane } => {
            let dtype = value(args, 0)?;
            range("lane", lane.into(), lane < args[0].lanes(), "less than the lanes")?;
            Some(KType::scalar(dtype))
        }
        KOp::Add | KOp::Sub | KOp::Mul | KOp::Shl | KOp::Ushr | KOp::Sshr => {
            same(args, 1)?;
            like_first("i32 or i64", is_int(args[0]))?
        }
        KOp::Div | KOp::Rem => {
            same(args, 1)?;
            like_first("an i32 or i64 scalar", is_int(args[0]) && args[0].lanes() == 1)?
        }
        KOp::And | KOp::Or | KOp::Xor => {
            same(args, 1)?;
            like_first("i32, i64 or bool", is_int(args[0]) || args[0].dtype() == Some(DType::Bool))?
        }
        KOp::Fadd | KOp::Fsub | KOp::Fmul | KOp::Fdiv | KOp::Fmin | KOp::Fmax | KOp::Fma => {
            (1..args.len()).try_for_each(|i| same(args, i))?;
            like_first("f32", is(args[0], DType::F32))?
        }
        KOp::Fneg | KOp::Fabs | KOp::Fsqrt | KOp::Fround => like_first("f32", is(args[0], DType::F32))?,
        KOp::Cmp { .. } => {
            same(args, 1)?;
            like_first("f32, i32 or i64", is_int(args[0]) || is(args[0], DType::F32))?;
            Some(KType::vector(DType::Bool, args[0].lanes()))
        }
        KOp::Select => {
            if args[1] != args[2] {
                return Err(operand(args, 2, &args[1].to_string()));
            }
            let lanes = args[0].lanes();
            if !is(args[0], DType::Bool) || (lanes != 1 && lanes != args[1].lanes()) {
                return Err(operand(args, 0, "bool of the same lanes, or one"));
            }
            Some(args[1])
        }
        KOp::ToFloat => Some(convert(args, DType::I32, DType::F32)?),
        KOp::ToInt => Some(convert(args, DType::F32, DType::I32)?),
        KOp::Widen => Some(convert(args, DType::I32, DType::I64)?),
        KOp::Narrow => Some(convert(args, DType::I64, DType::I32)?),
        KOp::Bitcast { dtype } => {
            in_memory(dtype)?;
            let from = value(args, 0)?;
            if from == DType::Bool || from.bytes() != dtype.bytes() {
                return Err(operand(args, 0, &format!("as wide as {dtype}")));
            }
            Some(KType::vector(dtype, args[0].lanes()))
        }
        KOp::ReduceAdd | KOp::ReduceMax => {
            like_first("an f32 vector", is(args[0], DType::F32) && args[0].lanes() > 1)?;
            Some(KType::scalar(DType::F32))
        }
        KOp::Load { dtype, lanes } => {
            pointer(args, 0)?;
            exact(args, 1, i64_scalar)?;
            in_memory(dtype)?;
            range("lanes", lanes.into(), lanes_exist(lanes), "1, 2, 4, 8 or 16")?;
            Some(KType::vector(dtype, lanes))
        }
        KOp::Store => {
            pointer(args, 0)?;
            exact(args, 1, i64_scalar)?;
            if value(args, 2)? == DType::Bool {
                return Err(operand(args, 2, "f32, i32 or i64"));
            }
            None
        }
        KOp::Offset => {
            pointer(args, 0)?;
            exact(args, 1, i64_scalar)?;
            Some(args[0])
        }
        // checked with their regions
        KOp::For | KOp::If => None,
    })
}

/// How many operands an op has (for a loop: at least).
const fn arity(op: KOp) -> usize {
    use super::op::Sig;
    match op {
        KOp::Splat { .. } | KOp::Extract { .. } | KOp::If => 1,
        KOp::Load { .. } | KOp::Offset => 2,
        KOp::Store | KOp::For => 3,
        _ => match op.sig() {
            Sig::Leaf | Sig::Special => 0,
            Sig::Unary | Sig::FloatUnary | Sig::Convert | Sig::Reduce => 1,
            Sig::IntBinary | Sig::FloatBinary | Sig::Compare => 2,
            Sig::FloatTernary | Sig::Select => 3,
        },
    }
}

fn count(of: &'static str, found: usize, expected: usize) -> Result<(), Broken> {
    if found == expected { Ok(()) } else { Err(Broken::Count { of, found, expected }) }
}

fn range(what: &'static str, found: u64, ok: bool, expected: &'static str) -> Result<(), Broken> {
    if ok { Ok(()) } else { Err(Broken::Constant { what, found: found as i64, expected }) }
}

fn constant(dtype: DType, bits: i64) -> Result<KType, Broken> {
    let fits = match dtype {
        DType::I64 => true,
        DType::I32 => i32::try_from(bits).is_ok(),
        DType::F32 => u32::try_from(bits).is_ok(),
        DType::Bool => (0..=1).contains(&bits),
        DType::F16 | DType::BF16 | DType::U8 => false,
    };
    let ty = KType::scalar(dtype);
    if fits { Ok(ty) } else { Err(Broken::Constant { what: "bits", found: bits, expected: "of the constant's type" }) }
}

fn operand(args: &[KType], index: usize, expected: &str) -> Broken {
    Broken::Operand { index, found: args[index].to_string(), expected: expected.to_owned() }
}

fn exact(args: &[KType], i: usize, want: KType) -> Result<(), Broken> {
    if args[i] == want { Ok(()) } else { Err(operand(args, i, &want.to_string())) }
}

fn same(args: &[KType], i: usize) -> Result<(), Broken> {
    exact(args, i, args[0])
}

fn value(args: &[KType], i: usize) -> Result<DType, Broken> {
    args[i].dtype().ok_or_else(|| operand(args, i, "a number"))
}

fn element(args: &[KType], i: usize, lanes: u32) -> Result<DType, Broken> {
    if args[i].lanes() != lanes {
        return Err(operand(args, i, "a scalar"));
    }
    value(args, i)
}

fn convert(args: &[KType], from: DType, to: DType) -> Result<KType, Broken> {
    if !is(args[0], from) {
        return Err(operand(args, 0, from.name()));
    }
    Ok(KType::vector(to, args[0].lanes()))
}

fn pointer(args: &[KType], i: usize) -> Result<(), Broken> {
    if matches!(args[i], KType::Ptr(_)) { Ok(()) } else { Err(operand(args, i, "a pointer")) }
}

fn in_memory(dtype: DType) -> Result<(), Broken> {
    let ok = matches!(dtype, DType::F32 | DType::I32 | DType::I64);
    if ok {
        return Ok(());
    }
    let expected = "f32, i32 or i64".to_owned();
    Err(Broken::Operand { index: 0, found: dtype.name().to_owned(), expected })
}

fn is(ty: KType, dtype: DType) -> bool {
    ty.dtype() == Some(dtype)
}

fn is_int(ty: KType) -> bool {
    is(ty, DType::I32) || is(ty, DType::I64)
}

const fn lanes_exist(lanes: u32) -> bool {
    matches!(lanes, 1 | 2 | 4 | 8 | 16)
}

/// Names with a meaning of their own in text.
pub(super) const RESERVED: [&str; 5] = ["T", "B", "P", "R", "task"];

/// True for a name made of letters, digits, `_` and `.` that does not begin with a digit.
pub(super) fn is_name(name: &str) -> bool {
    let begins = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    begins && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
}

struct Checker<'k> {
    kernel: &'k Kernel,
    /// Defined here: in scope.
    visible: Vec<bool>,
    /// Defined anywhere so far.
    defined: Vec<bool>,
    depth: usize,
    errors: Vec<KernelError>,
}

impl<'k> Checker<'k> {
    fn new(kernel: &'k Kernel) -> Self {
        let (visible, defined) = (vec![false; kernel.types.len()], vec![false; kernel.types.len()]);
        Self { kernel, visible, defined, depth: 0, errors: Vec::new() }
    }

    fn fail(&mut self, place: &str, broken: Broken) {
        self.errors.push(error(&self.kernel.name, place, broken));
    }

    fn header(&mut self) {
        let k = self.kernel;
        if !is_name(&k.name) {
            self.fail("name", Broken::Name(k.name.clone()));
        }
        let mut names = HashSet::new();
        for p in &k.params {
            if !is_name(&p.name) || RESERVED.contains(&p.name.as_str()) || !names.insert(&p.name) {
                self.fail("parameters", Broken::Name(p.name.clone()));
            }
        }
        let first = Kernel::FIRST_PARAM as usize;
        let implied = (0..first).map(|_| KType::scalar(DType::I64));
        let implied = implied.chain(k.params.iter().map(|_| KType::Ptr(Space::Global)));
        for (i, expected) in implied.enumerate() {
            match k.types.get(i) {
                Some(&found) if found == expected => {}
                Some(&found) => {
                    self.fail("parameters", Broken::Type { what: "value", value: Val(i as u32), found, expected });
                }
                None => self.fail("parameters", Broken::Undefined(Val(i as u32))),
            }
        }
        for (i, &ty) in k.types.iter().enumerate() {
            let exists = match ty {
                KType::Value { dtype, lanes } => {
                    lanes_exist(lanes) && matches!(dtype, DType::F32 | DType::I32 | DType::I64 | DType::Bool)
                }
                KType::Ptr(_) => true,
            };
            if !exists {
                self.fail("types", Broken::NoSuchType { value: Val(i as u32), ty });
            }
        }
        if divides_by_zero(&k.grid) {
            self.fail("grid", Broken::Constant { what: "divisor", found: 0, expected: "positive" });
        }
    }

    fn kernel(&mut self) {
        let k = self.kernel;
        let implied = Kernel::FIRST_PARAM as usize + k.params.len();
        self.visible[..implied].fill(true);
        self.defined[..implied].fill(true);
        self.top(&k.body, "body");
        self.visible.fill(false);
        self.visible[..implied].fill(true);
        self.visible[Kernel::TASK.0 as usize] = false;
        if let Some(tail) = &k.tail {
            self.top(tail, "tail");
        }
        if self.errors.is_empty() {
            self.stores();
        }
    }

    fn top(&mut self, region: &'k Region, place: &str) {
        for (of, found) in [("parameters", region.params.len()), ("yields", region.yields.len())] {
            if let Err(broken) = count(of, found, 0) {
                self.fail(place, broken);
            }
        }
        region.stmts.iter().for_each(|s| self.stmt(s));
    }

    fn stmt(&mut self, stmt: &'k Stmt) {
        let text = super::print::statement(stmt);
        let before = self.errors.len();
        for &v in &stmt.args {
            self.used(v, &text);
        }
        let regions = match stmt.op {
            KOp::For => 1,
            KOp::If => 2,
            _ => 0,
        };
        if let Err(broken) = count("regions", stmt.regions.len(), regions) {
            self.fail(&text, broken);
        }
        if matches!(stmt.op, KOp::Alloc { .. }) && self.depth > 0 {
            self.fail(&text, Broken::NestedAlloc);
        }
        if self.errors.len() == before {
            match stmt.op {
                KOp::For => self.for_loop(stmt, &text),
                KOp::If => self.condition(stmt, &text),
                op => match infer(op, &self.types_of(&stmt.args)) {
                    Ok(ty) => self.results(stmt, &Vec::from_iter(ty), &text),
                    Err(broken) => self.fail(&text, broken),
                },
            }
        }
        // After an error the results count as defined, so that it is reported once.
        for &v in &stmt.results {
            self.define(v, &text);
        }
    }

    fn types_of(&self, vals: &[Val]) -> Vec<KType> {
        vals.iter().map(|&v| self.kernel.ty(v)).collect()
    }

    fn used(&mut self, v: Val, text: &str) {
        if self.visible.get(v.0 as usize) != Some(&true) {
            self.fail(text, Broken::Undefined(v));
        }
    }

    fn define(&mut self, v: Val, text: &str) {
        match self.defined.get_mut(v.0 as usize) {
            None => self.fail(text, Broken::Undefined(v)),
            Some(true) => self.fail(text, Broken::Redefined(v)),
            Some(defined) => {
                *defined = true;
                self.visible[v.0 as usize] = true;
            }
        }
    }

    fn results(&mut self, stmt: &Stmt, expected: &[KType], text: &str) {
        self.typed("result", &stmt.results, expected, text);
    }

    fn typed(&mut self, what: &'static str, vals: &[Val], expected: &[KType], text: &str) {
        if let Err(broken) = count(what, vals.len(), expected.len()) {
            return self.fail(text, broken);
        }
        for (&value, &expected) in vals.iter().zip(expected) {
            match self.kernel.types.get(value.0 as usize) {
                Some(&found) if found == expected => {}
                Some(&found) => self.fail(text, Broken::Type { what, value, found, expected }),
                None => self.fail(text, Broken::Undefined(value)),
            }
        }
    }

    fn for_loop(&mut self, stmt: &'k Stmt, text: &str) {
        let types = self.types_of(&stmt.args);
        if types.len() < 3 {
            return self.fail(text, Broken::Count { of: "operands", found: types.len(), expected: 3 });
        }
        let counter = KType::scalar(DType::I64);
        for i in 0..3 {
            if let Err(broken) = exact(&types, i, counter) {
                self.fail(text, broken);
            }
        }
        let carried = &types[3..];
        let params: Vec<KType> = std::iter::once(counter).chain(carried.iter().copied()).collect();
        self.typed("parameter", &stmt.regions[0].params, &params, text);
        self.region(&stmt.regions[0], carried, text);
        self.results(stmt, carried, text);
    }

    fn condition(&mut self, stmt: &'k Stmt, text: &str) {
        let types = self.types_of(&stmt.args);
        let checked = count("operands", types.len(), 1).and_then(|()| exact(&types, 0, KType::scalar(DType::Bool)));
        if let Err(broken) = checked {
            self.fail(text, broken);
        }
        let known = stmt.results.iter().all(|v| (v.0 as usize) < self.kernel.types.len());
        let results = if known { self.types_of(&stmt.results) } else { Vec::new() };
        for region in &stmt.regions {
            self.typed("parameter", &region.params, &[], text);
            self.region(region, &results, text);
        }
    }

    fn region(&mut self, region: &'k Region, yields: &[KType], text: &str) {
        let outer = self.visible.clone();
        self.depth += 1;
        for &v in &region.params {
            self.define(v, text);
        }
        region.stmts.iter().for_each(|s| self.stmt(s));
        for &v in &region.yields {
            self.used(v, text);
        }
        self.typed("yield", &region.yields, yields, text);
        self.depth -= 1;
        self.visible = outer;
    }

    /// Stores go through scratch or through written parameters, whichever way the pointer came.
    fn stores(&mut self) {
        let k = self.kernel;
        let mut flows = Vec::new();
        let mut stores = Vec::new();
        for region in std::iter::once(&k.body).chain(&k.tail) {
            collect(region, &mut flows, &mut stores);
        }
        let mut roots: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); k.types.len()];
        for i in 0..k.params.len() {
            roots[k.param(i).0 as usize].insert(i);
        }
        let mut changed = true;
        while changed {
            changed = false;
            for &(from, to) in &flows {
                let add: Vec<usize> = roots[from.0 as usize].difference(&roots[to.0 as usize]).copied().collect();
                changed |= !add.is_empty();
                roots[to.0 as usize].extend(add);
            }
        }
        for stmt in stores {
            for &i in &roots[stmt.args[0].0 as usize] {
                if !k.params[i].written {
                    self.fail(&super::print::statement(stmt), Broken::ReadOnly(k.params[i].name.clone()));
                }
            }
        }
    }
}

/// Which values become which others unchanged but for an offset, and all stores.
fn collect<'k>(region: &'k Region, flows: &mut Vec<(Val, Val)>, stores: &mut Vec<&'k Stmt>) {
    for s in &region.stmts {
        match s.op {
            KOp::Offset => flows.push((s.args[0], s.results[0])),
            KOp::Select => flows.extend([(s.args[1], s.results[0]), (s.args[2], s.results[0])]),
            KOp::For => {
                let (init, inner) = (&s.args[3..], &s.regions[0]);
                flows.extend(init.iter().copied().zip(inner.params[1..].iter().copied()));
                flows.extend(inner.yields.iter().copied().zip(inner.params[1..].iter().copied()));
                flows.extend(inner.params[1..].iter().copied().zip(s.results.iter().copied()));
            }
            KOp::If => {
                flows.extend(s.regions.iter().flat_map(|r| r.yields.iter().copied().zip(s.results.iter().copied())));
            }
            KOp::Store => stores.push(s),
            _ => {}
        }
        s.regions.iter().for_each(|r| collect(r, flows, stores));
    }
}

fn divides_by_zero(extent: &Extent) -> bool {
    match extent {
        Extent::Const(_) | Extent::Sym(_) => false,
        Extent::CeilDiv(a, n) => *n == 0 || divides_by_zero(a),
        Extent::Add(a, b) | Extent::Mul(a, b) | Extent::Min(a, b) => divides_by_zero(a) || divides_by_zero(b),
    }
}
