//! The compiler's schedule as the metadata of an executable.

use nextc_abi as abi;
use nextc_abi::hash;
use nextc_ir::Target;
use nextc_ir::cost::Cost;
use nextc_ir::format::Format;
use nextc_ir::graph::{Function, Module};
use nextc_ir::kernel::Region;
use nextc_ir::layout::Layout;
use nextc_ir::op::Op;
use nextc_ir::schedule::{Arg, Extent, Input, KernelModule, Launch, Output, PackedWeight, Program};
use nextc_ir::shape::{Dim, Sym};
use nextc_ir::types::{StateKind, Type};

use crate::error::LinkError;
use crate::image::Image;
use crate::{LinkInputs, Version, pack};

// kernels and the runtime that cuts prompts for them mean the same
const _: () = assert!(abi::DECODE_TOKENS as u64 == nextc_ir::types::DECODE_TOKENS);
const _: () = assert!(abi::CHUNK_TOKENS as u64 == nextc_ir::types::CHUNK_TOKENS);

/// The metadata, without what only packing finds out: checksums and fingerprints.
pub(crate) fn metadata(inputs: &LinkInputs<'_>, images: &[Image]) -> Result<abi::Metadata, LinkError> {
    let Some((first, others)) = inputs.versions.split_first() else { return Err(LinkError::NoVersion) };
    let module = first.module;
    if let Some(other) = others.iter().find(|v| v.module.weights != module.weights || v.module.states != module.states)
    {
        let [first, other] = [first, other].map(|v| v.target.cpu.clone());
        return Err(LinkError::Versions { first, other });
    }
    let mut versions =
        inputs.versions.iter().zip(images).map(|(v, image)| version(v, image)).collect::<Result<Vec<_>, _>>()?;
    let abi::Version { target, kernels, programs, arena } = versions.remove(0);
    Ok(abi::Metadata {
        version: abi::VERSION,
        compiler: inputs.compiler.to_owned(),
        backend: inputs.backend.to_owned(),
        fingerprint: String::new(),
        model: model(module),
        target,
        kernels,
        programs,
        weights: weight_table(module),
        states: module.states.iter().map(state).collect(),
        arena,
        page_tokens: module.page_tokens,
        tentative_tokens: nextc_ir::types::TENTATIVE_TOKENS,
        assets: assets(inputs.assets),
        others: versions,
    })
}

fn version(v: &Version<'_>, image: &Image) -> Result<abi::Version, LinkError> {
    let module = v.module;
    Ok(abi::Version {
        target: target(v.target),
        kernels: kernels(module, image)?,
        programs: module.programs.iter().map(|p| program(p, v)).collect(),
        arena: abi::Arena { fixed_bytes: module.arena.fixed_bytes, unit_bytes: module.arena.unit_bytes },
    })
}

/// The fingerprint of everything that decides what the executable computes.
pub(crate) fn fingerprint(metadata: &abi::Metadata, code: &[u8]) -> Result<String, LinkError> {
    let text = serde_json::to_vec(&abi::Metadata { fingerprint: String::new(), ..metadata.clone() })?;
    Ok(abi::to_hex(&hash::of_parts([text.as_slice(), code])))
}

fn model(module: &KernelModule) -> abi::Model {
    let info = &module.info;
    abi::Model {
        name: info.name.clone(),
        vocab_size: info.vocab_size,
        hidden_size: info.hidden_size,
        num_layers: info.num_layers,
        max_context: info.max_context,
        eos_token_ids: info.eos_token_ids.clone(),
        mtp: info.mtp,
    }
}

/// The architecture that an executable for a target names.
pub fn arch(target: &Target) -> &'static str {
    if target.gpu.is_some() { abi::metadata::NVPTX64 } else { abi::metadata::X86_64 }
}

fn target(target: &Target) -> abi::Target {
    let features = target.gpu.as_ref().map_or_else(|| target.required_features(), |gpu| gpu.features.to_vec());
    let features = features.into_iter().map(str::to_owned).collect();
    abi::Target { arch: arch(target).to_owned(), cpu: target.cpu.clone(), features }
}

fn kernels(module: &KernelModule, image: &Image) -> Result<Vec<abi::Kernel>, LinkError> {
    let symbol = |prefix: &str, i: usize, kernel: &str| {
        let symbol = format!("nextc_{prefix}_{i}");
        let found = image.symbols.get(&symbol).copied();
        found.ok_or_else(|| LinkError::NoCode { symbol, kernel: kernel.to_owned() })
    };
    let convert = |(i, k): (usize, &nextc_ir::kernel::Kernel)| {
        Ok(abi::Kernel {
            name: k.name.clone(),
            doc: k.doc.clone(),
            entry: symbol("kernel", i, &k.name)?,
            tail: k.tail.as_ref().map(|_| symbol("tail", i, &k.name)).transpose()?,
            binary: image.binaries.get(i).copied(),
            scratch_bytes: k.scratch_bytes(),
            partial_bytes: k.partial_bytes(),
            threads: k.threads,
            shared_bytes: k.shared_bytes(),
            waits: k.is_block() && k.body.waits(),
            tail_waits: k.is_block() && k.tail.as_ref().is_some_and(Region::waits),
            params: k.params.len() as u32,
            grid: extent(&k.grid),
            tail_grid: extent(&k.tail_grid),
        })
    };
    module.kernels.iter().enumerate().map(convert).collect()
}

fn sym(s: Sym) -> abi::Sym {
    match s {
        Sym::T => abi::Sym::T,
        Sym::B => abi::Sym::B,
        Sym::P => abi::Sym::P,
        Sym::R => abi::Sym::R,
    }
}

fn extent(e: &Extent) -> abi::Extent {
    let boxed = |e: &Extent| Box::new(extent(e));
    match e {
        Extent::Const(n) => abi::Extent::Const(*n),
        Extent::Sym(s) => abi::Extent::Sym(sym(*s)),
        Extent::Add(a, b) => abi::Extent::Add(boxed(a), boxed(b)),
        Extent::Mul(a, b) => abi::Extent::Mul(boxed(a), boxed(b)),
        Extent::CeilDiv(a, n) => abi::Extent::CeilDiv(boxed(a), *n),
        Extent::Min(a, b) => abi::Extent::Min(boxed(a), boxed(b)),
        Extent::Above(parts) => abi::Extent::Above(Box::new(std::array::from_fn(|i| extent(&parts[i])))),
    }
}

fn placement(p: nextc_ir::graph::Placement) -> abi::Placement {
    abi::Placement { unit: p.unit.map(sym), at_bytes: p.at_bytes }
}

fn arg(a: Arg) -> abi::Arg {
    match a {
        Arg::Input(i) => abi::Arg::Input(input(i)),
        Arg::Arena(p) => abi::Arg::Arena(placement(p)),
        Arg::Weight(i) => abi::Arg::Weight(i),
        Arg::State(i) => abi::Arg::State(i),
    }
}

fn input(i: Input) -> abi::Input {
    match i {
        Input::Tokens => abi::Input::Tokens,
        Input::Positions => abi::Input::Positions,
        Input::CuSeqlens => abi::Input::CuSeqlens,
        Input::Slot => abi::Input::Slot,
        Input::Replay => abi::Input::Replay,
        Input::Tentative => abi::Input::Tentative,
        Input::PageTable => abi::Input::PageTable,
        Input::LogitRows => abi::Input::LogitRows,
        Input::Hidden => abi::Input::Hidden,
        Input::Factors => abi::Input::Factors,
        Input::Choices => abi::Input::Choices,
        Input::EditTokens => abi::Input::EditTokens,
        Input::EditCounts => abi::Input::EditCounts,
        Input::EditBiases => abi::Input::EditBiases,
        Input::Wanted => abi::Input::Wanted,
    }
}

fn launch(l: &Launch) -> abi::Launch {
    abi::Launch { kernel: l.kernel, args: l.args.iter().map(|&a| arg(a)).collect(), label: l.label.clone() }
}

fn output(o: &Output) -> abi::Output {
    abi::Output { name: o.name.clone(), at: placement(o.at), rows: sym(o.rows), width: o.width, stride: o.stride }
}

fn program(p: &Program, version: &Version<'_>) -> abi::Program {
    abi::Program {
        name: p.name.clone(),
        launches: p.launches.iter().map(launch).collect(),
        outputs: p.outputs.iter().map(output).collect(),
        row_bytes: p.row_bytes,
        cost: cost_of_entry(version, p),
    }
}

/// The cost of an entry point: from the graph, or as if it read every weight that it is launched with.
fn cost_of_entry(version: &Version<'_>, program: &Program) -> abi::Cost {
    let entry = version.graph.and_then(|g| Some((g, g.function(&program.name)?)));
    let Some((module, function)) = entry else {
        let args = program.launches.iter().flat_map(|l| &l.args);
        let weights = args.filter_map(|a| if let Arg::Weight(i) = a { Some(*i) } else { None });
        let once: std::collections::BTreeSet<u32> = weights.collect();
        let bytes: u64 = once.iter().map(|&i| version.module.weights[i as usize].bytes()).sum();
        return abi::Cost { weight_bytes: bytes as f64, ..abi::Cost::default() };
    };
    let (c, row_flops) = cost_of(module, function);
    abi::Cost {
        weight_bytes: c.weight_bytes,
        expert_bytes: c.expert_bytes,
        experts: c.experts.0,
        experts_per_token: c.experts.1,
        token_bytes: c.token_bytes,
        state_bytes: c.state_bytes,
        context_bytes: c.context_bytes,
        token_flops: c.token_flops,
        row_flops,
        context_flops: c.context_flops,
    }
}

/// The summed cost of a function and what it calls, and its FLOPs a row of logits. Activations count as staying in the caches;
/// rows of the embedding do not.
fn cost_of(module: &Module, function: &Function) -> (Cost, f64) {
    let mut total = (Cost::default(), 0.0);
    for id in function.order() {
        let node = function.node(id);
        let callee = node.attrs.str("function").filter(|_| node.op == Op::Call).and_then(|name| module.function(name));
        let (cost, row_flops) = match callee {
            Some(callee) => cost_of(module, callee),
            None => cost_of_node(function, id),
        };
        total = (total.0 + cost, total.1 + row_flops);
    }
    total
}

fn cost_of_node(function: &Function, id: nextc_ir::NodeId) -> (Cost, f64) {
    let node = function.node(id);
    let operands = function.operands(id);
    let types: Vec<&Type> = operands.iter().map(|&v| function.ty(v)).collect();
    let cost = (node.op.def().cost)(&types, &node.types, &node.attrs);
    let token_bytes = match (node.op, types.as_slice()) {
        (Op::Embed, [.., Type::Weight(w)]) => w.format.bytes(w.shape.iter().skip(1).product()) as f64,
        _ => 0.0,
    };
    let cost = Cost { token_bytes, ..cost };
    let first = node.types.first().and_then(Type::as_tensor).and_then(|t| t.shape.0.first().copied());
    match first {
        Some(Dim::Sym(Sym::R)) => (Cost { token_flops: 0.0, ..cost }, cost.token_flops),
        _ => (cost, 0.0),
    }
}

fn weight_table(module: &KernelModule) -> abi::WeightTable {
    let placement = pack::place(&module.weights);
    let entry = |(w, &offset): (&PackedWeight, &u64)| abi::Weight {
        name: w.name.clone(),
        shape: w.decl.shape.clone(),
        in_rank: w.decl.in_rank as u64,
        format: w.decl.format.to_string(),
        layout: w.layout.name().to_owned(),
        offset,
        bytes: w.bytes(),
        parts: parts(w),
        checksum: String::new(),
    };
    abi::WeightTable {
        place: abi::WeightsPlace::None,
        bytes: placement.bytes,
        fingerprint: String::new(),
        entries: module.weights.iter().zip(&placement.offsets).map(entry).collect(),
    }
}

/// What the bytes of a packed weight mean.
fn parts(w: &PackedWeight) -> Vec<abi::Part> {
    let part = |at, bytes, holds| abi::Part { at, bytes, holds };
    if w.layout == Layout::Flat {
        return vec![part(0, w.bytes(), abi::Holds::Numbers(abi::Number::F32))];
    }
    let (planes, codes) = (w.planes(), number(w.decl.format));
    let mut parts = vec![part(0, planes.code_bytes(), abi::Holds::Numbers(codes))];
    if let Some(blocks) = w.decl.format.blocks() {
        let stored = Format::plain(blocks.scale).map_or(abi::Number::F32, number);
        let bytes = planes.tiles() * planes.tile_scale_bytes();
        match blocks.unit {
            0 => parts.push(part(planes.scales_at(), bytes, abi::Holds::Scales { stored, codes })),
            _ => {
                parts.push(part(planes.scales_at(), bytes, abi::Holds::Numbers(abi::Number::I8)));
                let bytes = planes.tiles() * planes.tile_unit_bytes();
                parts.push(part(planes.units_at(), bytes, abi::Holds::Units { stored, codes }));
            }
        }
        if blocks.ordered {
            let order = abi::Holds::Order { columns: planes.columns };
            parts.push(part(planes.order_at(), planes.bytes() - planes.order_at(), order));
        }
    }
    parts
}

const fn number(format: Format) -> abi::Number {
    match format {
        Format::F32 => abi::Number::F32,
        Format::F16 => abi::Number::F16,
        Format::Bf16 => abi::Number::Bf16,
        Format::Fp8(_) => abi::Number::E4m3,
        Format::Q8(_) => abi::Number::I8,
        Format::Q4(_) | Format::U4(_) => abi::Number::U4,
        Format::Q6(_) => abi::Number::U6,
    }
}

fn state(s: &nextc_ir::schedule::StateDecl) -> abi::State {
    let kind = match s.ty.kind {
        StateKind::Kv => abi::StateKind::Kv,
        StateKind::Conv => abi::StateKind::Conv,
        StateKind::Delta => abi::StateKind::Delta,
    };
    let bytes = s.ty.bytes();
    abi::State { name: s.name.clone(), kind, bytes, rollback_bytes: bytes - s.ty.step_bytes() }
}

fn assets(files: &[(String, Vec<u8>)]) -> Vec<abi::Asset> {
    let mut offset = 0;
    let mut place = |(name, contents): &(String, Vec<u8>)| {
        let asset = abi::Asset { name: name.clone(), offset, bytes: contents.len() as u64 };
        offset += asset.bytes;
        asset
    };
    files.iter().map(&mut place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_the_sampling_tables_are_those_of_the_graph() {
        use nextc_ir::ops::sample::{Choice, Factor};
        assert_eq!(format!("{:?}", abi::Factor::ALL), format!("{:?}", Factor::ALL));
        assert_eq!(format!("{:?}", abi::Choice::ALL), format!("{:?}", Choice::ALL));
        let stride = nextc_abi::sampling::ROW_STRIDE as u64;
        assert_eq!([Factor::COUNT, Choice::COUNT].map(nextc_ir::shape::pad), [stride; 2]);
    }

    #[test]
    fn tasks_of_one_thread_are_launched_as_they_are_compiled() {
        assert_eq!(abi::metadata::SINGLE_THREADS, nextc_ir::kernel::Kernel::SINGLE_THREADS);
    }
}
