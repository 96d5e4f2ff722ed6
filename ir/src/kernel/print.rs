//! Text of kernels and kernel modules; [`super::parse`] reads the kernels back.
//!
//! Values are numbered in the order in which the text names them, so that printing what was parsed gives the same text.

use std::collections::HashMap;
use std::fmt::Write;

use super::{KOp, Kernel, Region, Stmt, Val};
use crate::dtype::DType;
use crate::graph::Placement;
use crate::schedule::{Arg, KernelModule, Program};
use crate::shape::Sym;

/// The text of one kernel.
pub fn kernel(kernel: &Kernel) -> String {
    let names = Names::of(kernel);
    let mut out = String::new();
    for line in kernel.doc.lines() {
        put(&mut out, format_args!("/// {line}\n"));
    }
    let params =
        kernel.params.iter().map(|p| format!("%{}: {}ptr<global>", p.name, if p.written { "mut " } else { "" }));
    let params = params.collect::<Vec<_>>().join(", ");
    let mut threads = if kernel.is_block() { format!(" threads = {}", kernel.threads) } else { String::new() };
    if kernel.together > 1 {
        put(&mut threads, format_args!(" together = {}", kernel.together));
    }
    put(&mut out, format_args!("kernel @{}({params}) grid = {}{threads} {{\n", kernel.name, kernel.grid));
    region(&mut out, &kernel.body, &names, 1);
    out.push('}');
    if let Some(tail) = &kernel.tail {
        let is_single = !kernel.is_block() && kernel.tail_grid == crate::schedule::Extent::Const(1);
        let grid = if is_single { String::new() } else { format!("grid = {} ", kernel.tail_grid) };
        put(&mut out, format_args!(" tail {grid}{{\n"));
        region(&mut out, tail, &names, 1);
        out.push('}');
    }
    out.push('\n');
    out
}

/// The text of a module: its kernels, then what its programs run, the arena and the tables.
pub fn module(module: &KernelModule) -> String {
    let mut out = module.kernels.iter().map(|k| kernel(k) + "\n").collect::<String>();
    for p in &module.programs {
        program(&mut out, module, p);
    }
    let arena = &module.arena;
    put(&mut out, format_args!("arena {{ {} B", arena.fixed_bytes));
    for (sym, bytes) in Sym::ALL.iter().zip(arena.unit_bytes) {
        put(&mut out, format_args!(" + {bytes} B * {}", sym.name()));
    }
    out.push_str(" }\n\nweights {\n");
    for (i, w) in module.weights.iter().enumerate() {
        let shape = w.decl.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
        put(&mut out, format_args!("  {i}: {} {shape} x {} @ {}, {} B\n", w.name, w.decl.format, w.layout, w.bytes()));
    }
    out.push_str("}\n\nstates {\n");
    for (i, s) in module.states.iter().enumerate() {
        let per = if s.ty.kind == crate::types::StateKind::Kv { "token" } else { "slot" };
        let ty = crate::types::Type::State(s.ty.clone());
        put(&mut out, format_args!("  {i}: {} {ty}, {} B a {per}\n", s.name, s.ty.bytes()));
    }
    put(&mut out, format_args!("}}\n\npage {} tokens\n", module.page_tokens));
    out
}

/// One statement on its own, values by their raw numbers: for messages about kernels that may be broken.
pub fn statement(stmt: &Stmt) -> String {
    let mut out = String::new();
    head(&mut out, stmt, &Names::default());
    out
}

/// One statement as the text of its kernel has it, without what it encloses.
pub(super) fn statement_in(kernel: &Kernel, stmt: &Stmt) -> String {
    let mut out = String::new();
    head(&mut out, stmt, &Names::of(kernel));
    out
}

fn program(out: &mut String, module: &KernelModule, p: &Program) {
    put(out, format_args!("program @{} {{\n", p.name));
    for launch in &p.launches {
        let kernel = module.kernels.get(launch.kernel as usize);
        let name = kernel.map_or("?", |k| &k.name);
        let args = launch.args.iter().enumerate().map(|(i, a)| {
            let param = kernel.and_then(|k| k.params.get(i)).map_or("?", |p| &p.name);
            format!("{param} = {}", arg(module, *a))
        });
        let args = args.collect::<Vec<_>>().join(", ");
        put(out, format_args!("  launch @{name}({args})  ; {}\n", launch.label));
    }
    for o in &p.outputs {
        let (at, rows) = (placement(o.at), o.rows.name());
        put(out, format_args!("  output {} = {at} as f32[{rows}, {}], stride {}\n", o.name, o.width, o.stride));
    }
    out.push_str("}\n\n");
}

fn arg(module: &KernelModule, arg: Arg) -> String {
    match arg {
        Arg::Input(i) => i.name().to_owned(),
        Arg::Arena(at) => placement(at),
        Arg::Weight(w) => format!("weight {}", module.weights.get(w as usize).map_or("?", |w| &w.name)),
        Arg::State(s) => format!("state {}", module.states.get(s as usize).map_or("?", |s| &s.name)),
    }
}

fn placement(at: Placement) -> String {
    match at.unit {
        Some(sym) => format!("arena[{} * {}]", at.at_bytes, sym.name()),
        None => format!("arena[{}]", at.at_bytes),
    }
}

/// Names of a kernel's values in text; values without one go by their raw number.
#[derive(Default)]
struct Names(HashMap<Val, String>);

impl Names {
    fn of(kernel: &Kernel) -> Self {
        let mut names = Self::default();
        for (i, name) in super::verify::RESERVED.iter().enumerate() {
            names.0.insert(Val(i as u32), (*name).to_owned());
        }
        for (i, p) in kernel.params.iter().enumerate() {
            names.0.insert(kernel.param(i), p.name.clone());
        }
        let mut next = 0;
        names.region(&kernel.body, &mut next);
        if let Some(tail) = &kernel.tail {
            names.region(tail, &mut next);
        }
        names
    }

    fn region(&mut self, region: &Region, next: &mut u32) {
        self.number(&region.params, next);
        for s in &region.stmts {
            self.number(&s.results, next);
            s.regions.iter().for_each(|r| self.region(r, next));
        }
    }

    fn number(&mut self, vals: &[Val], next: &mut u32) {
        for &v in vals {
            self.0.insert(v, next.to_string());
            *next += 1;
        }
    }

    fn get(&self, v: Val) -> String {
        self.0.get(&v).map_or_else(|| format!("%{}", v.0), |name| format!("%{name}"))
    }

    fn list(&self, vals: &[Val]) -> String {
        vals.iter().map(|&v| self.get(v)).collect::<Vec<_>>().join(", ")
    }
}

fn put(out: &mut String, args: std::fmt::Arguments<'_>) {
    out.write_fmt(args).expect("a string takes what is written");
}

fn indent(out: &mut String, depth: usize) {
    out.extend(std::iter::repeat_n("  ", depth));
}

fn region(out: &mut String, region: &Region, names: &Names, depth: usize) {
    for s in &region.stmts {
        indent(out, depth);
        head(out, s, names);
        for (i, inner) in s.regions.iter().enumerate() {
            let empty = inner.stmts.is_empty() && inner.yields.is_empty();
            if i > 0 && empty {
                continue;
            }
            out.push_str(if i > 0 { " else {\n" } else { " {\n" });
            self::region(out, inner, names, depth + 1);
            indent(out, depth);
            out.push('}');
        }
        out.push('\n');
    }
    if !region.yields.is_empty() {
        indent(out, depth);
        put(out, format_args!("yield {}\n", names.list(&region.yields)));
    }
}

/// A statement up to its regions.
fn head(out: &mut String, s: &Stmt, names: &Names) {
    if !s.results.is_empty() {
        put(out, format_args!("{} = ", names.list(&s.results)));
    }
    out.push_str(s.op.name());
    let arg = |i: usize| s.args.get(i).map_or_else(|| "%?".to_owned(), |&v| names.get(v));
    match s.op {
        KOp::Const { dtype, bits } => put(out, format_args!(" {dtype} {}", constant(dtype, bits))),
        KOp::Alloc { dtype, elems } | KOp::Shared { dtype, elems } | KOp::Partials { dtype, elems } => {
            put(out, format_args!(" {dtype} {elems}"))
        }
        KOp::Splat { lanes } => put(out, format_args!(" x{lanes} {}", arg(0))),
        KOp::Extract { lane } => put(out, format_args!(" {}[{lane}]", arg(0))),
        KOp::Cmp { pred } => put(out, format_args!(" {} {}", pred.name(), names.list(&s.args))),
        KOp::Bitcast { dtype } | KOp::Pack { dtype } | KOp::HalfFma { dtype } | KOp::Mma { dtype } => {
            put(out, format_args!(" {dtype} {}", names.list(&s.args)));
        }
        KOp::MmaGroup { dtype, steps, groups } => {
            put(out, format_args!(" {dtype} {steps} {groups} {}", names.list(&s.args)));
        }
        KOp::CopyAsync => put(out, format_args!(" {}[{}], {}[{}]", arg(0), arg(1), arg(2), arg(3))),
        KOp::CopyWait { left } => put(out, format_args!(" {left}")),
        KOp::TileStep { rows, columns, once } => {
            let once = if once { "once " } else { "" };
            put(out, format_args!(" {rows} {columns} {once}{}", names.list(&s.args)));
        }
        KOp::TileStore { rows, columns } | KOp::TileLoad { rows, columns } => {
            put(out, format_args!(" {rows} {columns} {}", names.list(&s.args)));
        }
        KOp::Nibble { shift } => put(out, format_args!(" {} {shift}", arg(0))),
        KOp::ShuffleXor { mask } => put(out, format_args!(" {} {mask}", arg(0))),
        KOp::Load { dtype, lanes } => {
            put(out, format_args!(" {} {}[{}]", super::KType::vector(dtype, lanes), arg(0), arg(1)));
        }
        KOp::Store | KOp::AtomicAdd | KOp::Prefetch => put(out, format_args!(" {}[{}], {}", arg(0), arg(1), arg(2))),
        KOp::Team | KOp::Thread | KOp::Barrier | KOp::Wait | KOp::Release | KOp::CopyCommit | KOp::TileZero => {}
        KOp::For => for_head(out, s, names, &arg),
        _ => put(out, format_args!(" {}", names.list(&s.args))),
    }
}

fn for_head(out: &mut String, s: &Stmt, names: &Names, arg: &dyn Fn(usize) -> String) {
    let params = s.regions.first().map_or(&[][..], |r| &r.params);
    let counter = params.first().map_or_else(|| "%?".to_owned(), |&v| names.get(v));
    put(out, format_args!(" {counter} = {} to {} step {}", arg(0), arg(1), arg(2)));
    let carried = params.iter().skip(1).enumerate();
    let carried: Vec<String> = carried.map(|(i, &v)| format!("{} = {}", names.get(v), arg(3 + i))).collect();
    if !carried.is_empty() {
        put(out, format_args!(" carry ({})", carried.join(", ")));
    }
}

/// A constant: floats that are numbers in decimal, others by their bits.
fn constant(dtype: DType, bits: i64) -> String {
    match dtype {
        DType::F32 => {
            let x = f32::from_bits(bits as u32);
            if x.is_finite() { format!("{x:?}") } else { format!("{bits:#x}") }
        }
        DType::Bool => (bits != 0).to_string(),
        _ => bits.to_string(),
    }
}
