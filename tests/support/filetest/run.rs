//! `test run`: a function of plain or fused ops on seeded inputs.
//!
//! The graph interpreter evaluates it as it stands; then it goes through the passes and is lowered for each backend and width
//! of vectors. The kernel interpreter must agree with the graph interpreter within the case's tolerance, the backend's machine
//! code with the kernel interpreter bit for bit, all widths with each other, and a sequence in parts with the same sequence in
//! one step. `not-on NAME` leaves out backends that have no kernel for the case: those whose names end so (`gpu` is the small one
//! too). [`values`](super::values) says what the other lines of the header mean.

use std::collections::HashMap;

use nextc_ir::eval::{Cx, Datum, WeightStore, evaluate};
use nextc_ir::graph::{Function, NodeId, Value};
use nextc_ir::kernel::eval::{Buffer, Options, Place, run};
use nextc_ir::kernel::verify::verify_kernel;
use nextc_ir::kernel::{KOp, Kernel};
use nextc_ir::schedule::KernelModule;
use nextc_ir::target::BulkKind;
use nextc_ir::types::{CHUNK_TOKENS, DECODE_TOKENS};
use nextc_ir::verify::verify;
use nextc_ir::{Module, Op, Target, Type};
use nextc_passes::lower::{lower_group, ports::Bind};
use nextc_passes::{PIPELINE, legalise::legalise, partition};

use super::machine::{Loaded, Memory, allows_tiles, module};
use super::tolerance::Tolerance;
use super::values::{PAGE_TOKENS, Step, arguments, parts, steps};
use super::{Case, Checked, graph, lines, memory, text};

/// `test run`.
pub fn check(case: &Case) -> Checked {
    case.only(&["step", "parts", "rows", "value", "per-token", "not-on"])?;
    let tolerance = Tolerance::named(case.option("tol").ok_or("`tol=NAME` is missing")?)?;
    let plain = graph::module(case)?;
    verify(&plain).map_err(lines)?;
    let [function] = plain.functions.as_slice() else { return Err("expected one function".to_owned()) };
    let absent: Vec<&str> = case.directives("not-on").collect();
    let chosen = backends().into_iter().filter(|b| !absent.iter().any(|name| b.name.ends_with(name)));
    let codes = chosen.map(|b| b.compile(&plain)).collect::<Checked<Vec<_>>>()?;
    for parts in parts(case)? {
        for code in &codes {
            code.check_parts(case, function, &parts).map_err(|e| format!("{}, {parts:?}: {e}", code.backend))?;
        }
    }
    for step in steps(case)? {
        let args = arguments(case, function, &step)?;
        let wanted = evaluate(function, args.clone(), &WeightStore::new(), &Cx::new(PAGE_TOKENS)).map_err(text)?;
        let mut first: Option<Vec<Vec<u32>>> = None;
        for code in &codes {
            let tolerance = code.rounds.map_or(Ok(tolerance), |n| Tolerance::named(n).map(|t| tolerance.or_more(t)))?;
            let at = |e| format!("{}, {step:?}: {e}", code.backend);
            let bits = code.check(&step, &args, &wanted, tolerance).map_err(at)?;
            if code.rounds.is_none() && *first.get_or_insert_with(|| bits.clone()) != bits {
                return Err(at(format!("other bits than {}", codes[0].backend)));
            }
        }
    }
    Ok(())
}

/// What kernels are lowered for, and what makes objects of them.
struct Backend {
    name: &'static str,
    target: Target,
    /// `None` if this machine cannot run its code: then the kernel interpreter alone does.
    objects: Option<Compile>,
    /// The tolerance of a machine that computes in another way than those without one, which all give the same bits.
    rounds: Option<&'static str>,
}

type Compile = fn(&KernelModule, &Target) -> Checked<Vec<Vec<u8>>>;

/// One for each width of vectors, a matrix unit, products of bytes, and blocks of threads.
fn backends() -> [Backend; 8] {
    let cranelift: Compile = |module, target| Ok(vec![nextc_cranelift::compile(module, target).map_err(text)?]);
    let native = Target::native();
    let runs_wide = native.as_ref().is_ok_and(|native| native.vector_bits == 512);
    let runs_tiles = native.as_ref().is_ok_and(|native| native.has_tiles()) && allows_tiles();
    let runs_bytes = native.as_ref().is_ok_and(|native| native.has_byte_dots());
    let runs_pairs = native.is_ok_and(|native| native.has_pair_dots());
    [
        Backend { name: "cranelift", target: graph::target().for_cranelift(), objects: Some(cranelift), rounds: None },
        Backend { name: "256 bits", target: graph::target(), objects: LLVM, rounds: None },
        Backend { name: "512 bits", target: graph::wide_target(), objects: LLVM.filter(|_| runs_wide), rounds: None },
        Backend {
            name: "tiles",
            target: graph::tiles_target(),
            objects: LLVM.filter(|_| runs_tiles),
            rounds: Some("tiles"),
        },
        Backend {
            name: "bytes",
            target: graph::bytes_target(),
            objects: LLVM.filter(|_| runs_bytes),
            rounds: Some("bytes"),
        },
        Backend {
            name: "pairs",
            target: graph::pairs_target(),
            objects: LLVM.filter(|_| runs_pairs),
            rounds: Some("tiles"),
        },
        Backend { name: "gpu", target: graph::gpu_target(), objects: None, rounds: Some("half") },
        Backend { name: "small gpu", target: graph::small_gpu_target(), objects: None, rounds: Some("half") },
    ]
}

#[cfg(feature = "llvm")]
const LLVM: Option<Compile> = Some(|module, target| nextc_llvm::compile(module, target).map_err(text));
#[cfg(not(feature = "llvm"))]
const LLVM: Option<Compile> = None;

/// The passes that a function without callers needs.
const PASSES: [&str; 4] = ["join", "rewrite", "layout", "partition"];

/// The kernels of a function, and what each parameter is bound to.
pub struct Kernels {
    /// The function after the passes.
    pub function: Function,
    /// The kernels, in order.
    pub module: KernelModule,
    binds: Vec<Vec<Bind>>,
}

/// Lowers the only function of a module for a target.
pub fn kernels(plain: &Module, target: &Target) -> Checked<Kernels> {
    let chosen = PIPELINE.iter().filter(|p| PASSES.contains(&p.name));
    let mut fused = chosen.into_iter().try_fold(plain.clone(), |m, p| (p.run)(m, target)).map_err(text)?;
    verify(&fused).map_err(lines)?;
    let function = fused.functions.pop().ok_or("there is no function")?;
    let groups = partition::kernels(&function).into_iter();
    let lowered = groups.map(|group| lower_group(&function, &group, target)).collect::<Result<Vec<_>, _>>();
    let parts = lowered.map_err(text)?.into_iter().flat_map(|l| l.parts);
    let (kernels, binds) = parts.map(|p| (p.kernel, p.binds)).unzip();
    let module = legalise(module(kernels), target).map_err(text)?;
    for kernel in &module.kernels {
        verify_kernel(kernel).map_err(lines)?;
    }
    Ok(Kernels { function, module, binds })
}

impl Backend {
    fn compile(self, plain: &Module) -> Checked<Code> {
        let kernels = kernels(plain, &self.target)?;
        let load = |compile: Compile| Loaded::new(&compile(&kernels.module, &self.target)?);
        let loaded = self.objects.map(load).transpose()?;
        let tile = self.target.bulk_tile();
        // where no weight can be multiplied as bytes, or as pairs, nothing is rounded
        let rounded =
            kernels.module.kernels.iter().any(|k| k.body.has(&|op| matches!(op, KOp::ByteDot | KOp::PairDot)));
        let bulk = tile.map(|tile| tile.kind).filter(|&kind| kind == BulkKind::Tiles || rounded);
        let rounds = self.rounds.filter(|_| tile.is_none() || bulk.is_some());
        let in_chunks = self.target.has_chunks();
        Ok(Code { backend: self.name, rounds, bulk, in_chunks, kernels, loaded })
    }
}

/// A function as kernels and as machine code.
struct Code {
    backend: &'static str,
    rounds: Option<&'static str>,
    /// How long runs are multiplied, if not as others are.
    bulk: Option<BulkKind>,
    /// Whether the delta rule of long runs goes by chunks.
    in_chunks: bool,
    kernels: Kernels,
    loaded: Option<Loaded>,
}

impl Code {
    /// Checks one step, and gives the bits of all results.
    fn check(
        &self,
        step: &Step,
        args: &[Datum<f32>],
        wanted: &[Datum<f32>],
        tolerance: Tolerance,
    ) -> Checked<Vec<Vec<u32>>> {
        let mut frame = Frame::new(&self.kernels.function, step, args)?;
        self.run(&mut frame)?;
        frame.compare(wanted, tolerance)
    }

    /// Runs all kernels.
    fn run(&self, frame: &mut Frame<'_>) -> Checked {
        let step = frame.step;
        let mut memory = Memory::of(&frame.buffers);
        for (i, (kernel, binds)) in self.kernels.module.kernels.iter().zip(&self.kernels.binds).enumerate() {
            let places = binds.iter().map(|&b| frame.place(b)).collect::<Checked<Vec<_>>>()?;
            memory.grow(&frame.buffers);
            run(kernel, step.syms(), &mut frame.buffers, &places, Options::default()).map_err(text)?;
            if let Some(code) = &self.loaded {
                code.run(i, kernel, step.syms(), &mut memory, &places)?;
                same_bits(kernel, &memory, frame, &places)?;
            }
        }
        Ok(())
    }

    /// Whether a part of a sequence is computed in the way in which its tokens are in the whole step: long runs may be another class than those that are decoded,
    /// and begin in the middle of a chunk.
    fn computes_alike(&self, whole: &Step, part: &Step) -> bool {
        let has_chunks = self.in_chunks && self.has(Op::GatedDeltaNet);
        let has_classes = self.keeps_classes() || self.rounds.is_some() && self.has(Op::GatedAttention);
        let same_class = is_long(whole) == is_long(part);
        (same_class || !has_classes) && (part.position().is_multiple_of(CHUNK_TOKENS) || !has_chunks)
    }

    /// Whether what is kept of a token depends on its class.
    fn keeps_classes(&self) -> bool {
        self.bulk.is_some() || self.in_chunks && self.has(Op::GatedDeltaNet)
    }

    fn has(&self, op: Op) -> bool {
        self.kernels.function.graph.node_weights().any(|n| n.op == op)
    }

    /// A step in parts, each on the states that the one before has left, must give the bits of the whole step, where both compute in the same way.
    fn check_parts(&self, case: &Case, plain: &Function, (whole, parts): &(Step, Vec<Step>)) -> Checked {
        let args = arguments(case, plain, whole)?;
        let mut frame = Frame::new(&self.kernels.function, whole, &args)?;
        self.run(&mut frame)?;
        let (mut left, mut all_alike): (Option<Frame<'_>>, bool) = (None, true);
        for (part, first) in parts.iter().zip(starts(parts)) {
            let typed = plain.params.iter().map(|&p| &plain.node(p).types[0]).zip(&args);
            let rows = typed.map(|(ty, arg)| part.rows_of(ty, arg, first)).collect::<Checked<Vec<_>>>()?;
            let mut next = Frame::new(&self.kernels.function, part, &rows)?;
            if let Some(left) = &left {
                next.take_states(left);
            }
            self.run(&mut next)?;
            let alike = self.computes_alike(whole, part);
            // where it does, what is kept of a token depends on its class too, and what comes after it on that
            all_alike &= alike || !self.keeps_classes();
            if alike && all_alike {
                frame.same_rows(&next, first)?;
            }
            left = Some(next);
        }
        left.filter(|_| all_alike).map_or(Ok(()), |left| frame.same_states(&left))
    }
}

/// Machine code must have left what the kernel interpreter has left.
fn same_bits(kernel: &Kernel, memory: &Memory, frame: &Frame<'_>, places: &[Place]) -> Checked {
    let Some((buffer, word)) = memory.difference(&frame.buffers) else { return Ok(()) };
    let param = places.iter().position(|p| p.buffer == buffer).map_or("?", |i| kernel.params[i].name.as_str());
    Err(format!("machine code of @{} differs from the kernel interpreter in word {word} of %{param}", kernel.name))
}

/// The memory of one run of a function.
struct Frame<'a> {
    function: &'a Function,
    step: &'a Step,
    buffers: Vec<Buffer>,
    values: HashMap<Value, usize>,
    inputs: HashMap<&'static str, usize>,
    /// For each version of a state the parameter that it began as.
    origins: HashMap<Value, Value>,
}

impl<'a> Frame<'a> {
    fn new(function: &'a Function, step: &'a Step, args: &[Datum<f32>]) -> Checked<Self> {
        let (buffers, values, inputs) = (Vec::new(), HashMap::new(), HashMap::new());
        let mut frame = Self { function, step, buffers, values, inputs, origins: origins(function) };
        for (&param, arg) in function.params.iter().zip(args) {
            if !matches!(arg, Datum::Sequences(_)) {
                let buffer = memory::of_param(function, param, arg, step)?;
                frame.add(Value { node: param, result: 0 }, buffer);
            }
        }
        for id in function.order() {
            for (result, ty) in (0..).zip(&function.node(id).types) {
                let v = Value { node: id, result };
                if let (Type::Tensor(t), false) = (ty, frame.values.contains_key(&v)) {
                    frame.add(v, memory::of_result(t, step));
                }
            }
        }
        Ok(frame)
    }

    fn add(&mut self, v: Value, buffer: Buffer) {
        self.values.insert(v, self.buffers.len());
        self.buffers.push(buffer);
    }

    fn buffer_of(&self, v: Value) -> Checked<usize> {
        let v = self.origins.get(&v).unwrap_or(&v);
        self.values.get(v).copied().ok_or_else(|| "a kernel is bound to a value that is nowhere".to_owned())
    }

    fn place(&mut self, bind: Bind) -> Checked<Place> {
        match bind {
            Bind::Value(v) => self.buffer_of(v).map(Place::start),
            Bind::Step(input) => {
                let next = self.buffers.len();
                let at = *self.inputs.entry(input.name()).or_insert(next);
                if at == next {
                    self.buffers.push(Buffer::from_i32(&self.step.input(input)));
                }
                Ok(Place::start(at))
            }
        }
    }

    /// The states, as they came.
    fn states(&self) -> impl Iterator<Item = Value> {
        let params = self.function.params.iter().map(|&node| Value { node, result: 0 });
        params.filter(|v| matches!(self.function.ty(*v), Type::State(_)))
    }

    fn take_states(&mut self, before: &Frame<'_>) {
        for state in self.states().map(|v| self.values[&v]).collect::<Vec<_>>() {
            self.buffers[state] = before.buffers[state].clone();
        }
    }

    fn same_states(&self, other: &Frame<'_>) -> Checked {
        let words = |frame: &Frame<'_>, v: Value| {
            let buffer = &frame.buffers[frame.values[&v]];
            let words = buffer.to_i32();
            let mut words: Vec<_> =
                words.into_iter().enumerate().map(|(i, w)| buffer.is_written(i).then_some(w)).collect();
            if let Type::State(ty) = frame.function.ty(v) {
                let slots: Vec<u32> = (0..frame.step.units(ty.kind) as u32).collect();
                memory::clear_unread(ty, frame.step, &slots, &mut words);
            }
            words
        };
        match self.states().find(|&v| words(self, v) != words(other, v)) {
            Some(v) => {
                Err(format!("in parts, state parameter {} ends with other bits than in one step", v.node.index()))
            }
            None => Ok(()),
        }
    }

    /// The rows of `part` must be those of this step from row `first` on.
    fn same_rows(&self, part: &Frame<'_>, first: usize) -> Checked {
        for (i, &v) in self.function.results.iter().enumerate() {
            let Type::Tensor(t) = self.function.ty(v) else { continue };
            let row: usize = t.shape.eval(&[1; 4]).iter().product();
            let count = part.step.syms()[0] as usize * row;
            let buffers = (self.buffer_of(v)?, part.buffer_of(v)?);
            let whole = memory::read(t, false, first * row + count, &self.buffers[buffers.0].to_i32());
            let found = memory::read(t, false, count, &part.buffers[buffers.1].to_i32());
            if whole[first * row..] != found {
                return Err(format!("in parts, result {i} has other bits from row {first} on than in one step"));
            }
        }
        Ok(())
    }

    /// Compares all results with those of the graph interpreter, and gives their bits.
    fn compare(&self, wanted: &[Datum<f32>], tolerance: Tolerance) -> Checked<Vec<Vec<u32>>> {
        if wanted.len() != self.function.results.len() {
            return Err("the passes changed the number of results".to_owned());
        }
        let each = self.function.results.iter().zip(wanted).enumerate();
        each.map(|(i, (&v, wanted))| self.compare_one(v, wanted, tolerance).map_err(|e| format!("result {i}, {e}")))
            .collect()
    }

    fn compare_one(&self, v: Value, wanted: &Datum<f32>, tolerance: Tolerance) -> Checked<Vec<u32>> {
        let buffer = &self.buffers[self.buffer_of(v)?];
        let (found, wanted) = match (self.function.ty(v), wanted) {
            (Type::Tensor(t), Datum::Int(array)) => {
                let flat = self.function.node(v.node).op == Op::NormRouter && v.result == 2;
                let (found, wanted) = (memory::read(t, flat, array.data().len(), &buffer.to_i32()), array.data());
                return match found == wanted {
                    true => Ok(found.into_iter().map(i32::cast_unsigned).collect()),
                    false => Err(format!("found {found:?}, expected {wanted:?}")),
                };
            }
            (Type::Tensor(t), Datum::Float(array)) => {
                (memory::read(t, false, array.data().len(), &buffer.to_f32()), array.data().to_vec())
            }
            (Type::State(_), Datum::State(state)) => {
                let slots: Vec<u32> = state.units().map(|unit| unit.0).collect();
                let mut both = [memory::read_state(state, &buffer.to_bytes()), memory::numbers(state)];
                both.iter_mut().for_each(|values| memory::clear_unread(state.ty(), self.step, &slots, values));
                let [found, wanted] = both;
                (found, wanted)
            }
            (ty, _) => return Err(format!("of type {ty}")),
        };
        match tolerance.violation(&found, &wanted) {
            Some(violation) => Err(format!("{}: {violation}", tolerance.name)),
            None => Ok(found.into_iter().map(f32::to_bits).collect()),
        }
    }
}

/// Whether the run of a step of one sequence is long.
fn is_long(step: &Step) -> bool {
    step.syms()[0] > DECODE_TOKENS
}

/// The first row of each part.
fn starts(parts: &[Step]) -> impl Iterator<Item = usize> {
    parts.iter().scan(0, |next, part| {
        let first = *next;
        *next += part.syms()[0] as usize;
        Some(first)
    })
}

/// States are updated in place: every version lies where the parameter lies that it began as.
fn origins(function: &Function) -> HashMap<Value, Value> {
    let is_state = |v: &Value| matches!(function.ty(*v), Type::State(_));
    let mut origins: HashMap<Value, Value> = HashMap::new();
    for id in function.order().into_iter().filter(|id| !is_param(function, *id)) {
        let taken: Vec<Value> = function.operands(id).into_iter().filter(is_state).collect();
        let results = (0..function.node(id).types.len() as u32).map(|result| Value { node: id, result });
        for (old, new) in taken.into_iter().zip(results.filter(is_state)) {
            origins.insert(new, origins.get(&old).copied().unwrap_or(old));
        }
    }
    origins
}

fn is_param(function: &Function, id: NodeId) -> bool {
    function.node(id).op == Op::Param
}
