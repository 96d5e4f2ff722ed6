//! One kernel: header, definitions and uses by region, loops and conditions, and where stores go.

use std::collections::{BTreeSet, HashSet};

use super::infer::{MOST_GROUPS, count, exact, infer, lanes_exist};
use super::{Broken, KernelError, RESERVED, error, is_name};
use crate::dtype::DType;
use crate::kernel::op::Sig;
use crate::kernel::print;
use crate::kernel::{KOp, KType, Kernel, Region, Space, Stmt, Val};
use crate::schedule::Extent;

/// Every invariant that a kernel breaks; what its header says wrong comes alone.
pub(super) fn check(kernel: &Kernel) -> Vec<KernelError> {
    let mut checker = Checker::new(kernel);
    checker.header();
    if checker.errors.is_empty() {
        checker.kernel();
    }
    checker.errors
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
                // what groups of warps multiply
                KType::Value { dtype: DType::F32, lanes } if lanes.is_multiple_of(4) && lanes <= 4 * MOST_GROUPS => {
                    true
                }
                KType::Value { dtype, lanes } => {
                    lanes_exist(lanes) && matches!(dtype, DType::F32 | DType::I32 | DType::I64 | DType::Bool)
                }
                KType::Ptr(_) => true,
            };
            if !exists {
                self.fail("types", Broken::NoSuchType { value: Val(i as u32), ty });
            }
        }
        let warps = k.threads.is_multiple_of(Kernel::WARP) && k.threads <= Kernel::MAX_THREADS;
        if k.threads != 1 && (k.threads == 0 || !warps) {
            let found = k.threads.into();
            self.fail(
                "threads",
                Broken::Constant { what: "threads", found, expected: "1, or a multiple of 32 up to 1024" },
            );
        }
        if divides_by_zero(&k.grid) || divides_by_zero(&k.tail_grid) {
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
        if let Some(tail) = &k.tail {
            self.top(tail, "tail");
        }
        self.partials();
        if self.errors.is_empty() {
            self.stores();
        }
    }

    /// Body and tail share one piece of memory: each names it once at most, and both alike.
    fn partials(&mut self) {
        let of = |region: &'k Region| region.stmts.iter().filter(|s| matches!(s.op, KOp::Partials { .. }));
        let k = self.kernel;
        let found: Vec<_> = k.regions().map(|r| of(r).collect::<Vec<_>>()).collect();
        for again in found.iter().flat_map(|stmts| stmts.iter().skip(1)) {
            self.fail(&print::statement(again), Broken::Partials);
        }
        if let [Some(body), Some(tail)] = [0, 1].map(|i| found.get(i).and_then(|stmts| stmts.first()))
            && body.op != tail.op
        {
            self.fail(&print::statement(tail), Broken::Partials);
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
        let text = print::statement(stmt);
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
        let allocates = matches!(stmt.op, KOp::Alloc { .. } | KOp::Shared { .. } | KOp::Partials { .. });
        if allocates && self.depth > 0 {
            self.fail(&text, Broken::NestedAlloc);
        }
        let misplaced = match stmt.op.sig() {
            Sig::Tile => self.kernel.is_block(),
            Sig::Block => !self.kernel.is_block() && stmt.op != KOp::Prefetch,
            _ => self.kernel.is_block() && matches!(stmt.op, KOp::Alloc { .. }),
        };
        if misplaced {
            self.fail(&text, Broken::Threads(self.kernel.threads));
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
        for region in k.regions() {
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
                    self.fail(&print::statement(stmt), Broken::ReadOnly(k.params[i].name.clone()));
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
            KOp::Store | KOp::AtomicAdd | KOp::TileTurn | KOp::TileStore { .. } => stores.push(s),
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
        Extent::Above(parts) => parts.iter().any(divides_by_zero),
    }
}
