//! Running whole schedules: what the runtime does with machine code, in the interpreter.

use super::{Buffer, Code, EvalError, Options, Place, Settled, Slot};
use crate::graph::Placement;
use crate::schedule::{Arg, Input, KernelModule, Launch, Output, Program};
use crate::shape::Sym;
use crate::types::StateKind;

/// A module made ready to run.
#[derive(Debug)]
pub struct Interpreter<'m> {
    module: &'m KernelModule,
    codes: Vec<Code>,
    options: Options,
}

/// An output of a program, without padding.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputRows {
    /// Its name: `logits`, `hidden`.
    pub name: String,
    /// Floats of one row.
    pub width: usize,
    /// The rows, one after the other.
    pub values: Vec<f32>,
}

impl<'m> Interpreter<'m> {
    /// Checks a module's kernels and makes them ready.
    /// # Errors
    /// [`EvalError::Invalid`] with every invariant that a kernel or a schedule breaks.
    pub fn new(module: &'m KernelModule, options: Options) -> Result<Self, EvalError> {
        crate::kernel::verify::verify(module).map_err(EvalError::Invalid)?;
        let codes = module.kernels.iter().map(Code::new).collect::<Result<_, _>>()?;
        Ok(Self { module, codes, options })
    }

    /// Unwritten states for `pages` pages of KV and `slots` sequences, in the order of the state table.
    pub fn states(&self, pages: u64, slots: u64) -> Vec<Buffer> {
        let bytes = |kind| if kind == StateKind::Kv { pages * self.module.page_tokens } else { slots };
        self.module.states.iter().map(|s| Buffer::uninit(s.ty.bytes() * bytes(s.ty.kind))).collect()
    }

    /// Runs a program: `syms` are T, B, P and R; `weights` are packed, one buffer for each entry of the weight table; the arena
    /// is unwritten at the start.
    /// # Errors
    /// [`EvalError`] if a kernel misbehaves, something is missing, or an output is not written in full.
    pub fn run_program(
        &self,
        program: &str,
        syms: [u64; 4],
        inputs: &[(Input, Buffer)],
        weights: &[Buffer],
        states: &mut [Buffer],
    ) -> Result<Vec<OutputRows>, EvalError> {
        let found = self.module.programs.iter().find(|p| p.name == program);
        let program = found.ok_or_else(|| missing("program", program))?;
        table("weights", weights.len(), self.module.weights.len())?;
        table("states", states.len(), self.module.states.len())?;
        let mut arena = Buffer::uninit(self.module.arena.bytes(&syms));
        arena.take_recent();
        let mut slots = vec![Slot::Own { buffer: &mut arena, settled: Settled::None }];
        slots.extend(inputs.iter().map(|(_, b)| Slot::Constant(b)));
        slots.extend(weights.iter().map(Slot::Constant));
        slots.extend(states.iter_mut().map(|buffer| Slot::Own { buffer, settled: Settled::All }));
        let places = Places { module: self.module, syms, inputs, weights: weights.len() };
        for (i, launch) in program.launches.iter().enumerate() {
            let args = places.of_launch(launch)?;
            let options = Options { seed: self.options.seed.wrapping_add(i as u64), ..self.options };
            self.codes[launch.kernel as usize].run(syms, &mut slots, &args, options)?;
            let kernel = &self.module.kernels[launch.kernel as usize];
            if kernel.grid.eval(&syms) > 0 {
                let writes = kernel.params.iter().zip(&args).filter(|(param, _)| param.written);
                writes.for_each(|(_, place)| slots[place.buffer].settle(Settled::None));
                let tail = kernel.tail.as_ref().filter(|_| kernel.tail_grid.eval(&syms) > 0);
                slots[0].settle_recent(tail.unwrap_or(&kernel.body).waits_first());
            }
        }
        drop(slots);
        self.outputs(program, &arena, &syms)
    }

    fn outputs(&self, program: &Program, arena: &Buffer, syms: &[u64; 4]) -> Result<Vec<OutputRows>, EvalError> {
        program.outputs.iter().map(|o| self.output(o, arena, syms)).collect()
    }

    fn output(&self, o: &Output, arena: &Buffer, syms: &[u64; 4]) -> Result<OutputRows, EvalError> {
        let at = place(self.module, o.at, syms);
        let mut values = Vec::new();
        for row in 0..syms[o.rows.index()] {
            for i in 0..o.width {
                let byte = at + (row * o.stride + i) * 4;
                let word = arena.range(byte as i64, 1, 4).and_then(|r| arena.read(r));
                let word = word.map_err(|what| EvalError::Output { output: o.name.clone(), row, what })?;
                values.push(f32::from_bits(word[0]));
            }
        }
        Ok(OutputRows { name: o.name.clone(), width: o.width as usize, values })
    }
}

/// Byte of a placement in the arena: regions follow one another, fixed, then T, B, P, R.
fn place(module: &KernelModule, at: Placement, syms: &[u64; 4]) -> u64 {
    let Some(unit) = at.unit else { return at.at_bytes };
    let before = Sym::ALL.iter().take(unit.index());
    let before: u64 = before.map(|s| module.arena.unit_bytes[s.index()] * syms[s.index()]).sum();
    module.arena.fixed_bytes + before + at.at_bytes * syms[unit.index()]
}

/// Which buffer is what: the arena, then inputs as given, weights, states.
struct Places<'a> {
    module: &'a KernelModule,
    syms: [u64; 4],
    inputs: &'a [(Input, Buffer)],
    weights: usize,
}

impl Places<'_> {
    fn of_launch(&self, launch: &Launch) -> Result<Vec<Place>, EvalError> {
        launch.args.iter().map(|&a| self.of(a)).collect()
    }

    fn of(&self, arg: Arg) -> Result<Place, EvalError> {
        let first_weight = 1 + self.inputs.len();
        Ok(match arg {
            Arg::Arena(at) => Place { buffer: 0, at_bytes: place(self.module, at, &self.syms) },
            Arg::Input(input) => {
                let found = self.inputs.iter().position(|(i, _)| *i == input);
                Place::start(1 + found.ok_or_else(|| missing("input", input.name()))?)
            }
            Arg::Weight(w) => Place::start(first_weight + w as usize),
            Arg::State(s) => Place::start(first_weight + self.weights + s as usize),
        })
    }
}

fn missing(what: &'static str, name: &str) -> EvalError {
    EvalError::Missing { what, name: name.to_owned() }
}

fn table(what: &'static str, found: usize, expected: usize) -> Result<(), EvalError> {
    if found == expected { Ok(()) } else { Err(EvalError::Table { what, found, expected }) }
}
