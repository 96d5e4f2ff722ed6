//! Values of the graph interpreter in the memory of kernels, and back: where ARCHITECTURE.md says that things lie.

use nextc_ir::eval::{Datum, State};
use nextc_ir::graph::{Function, NodeId};
use nextc_ir::kernel::eval::Buffer;
use nextc_ir::layout::{Planes, padded_index};
use nextc_ir::shape::{pad, padded_elems};
use nextc_ir::types::{StateKind, StateType, TENTATIVE_TOKENS, TensorType, WeightType};
use nextc_ir::{Layout, Type};

use super::values::{PAGE_TOKENS, Step, in_rank};
use super::{Checked, codes};

/// The memory of a parameter.
pub fn of_param(function: &Function, param: NodeId, value: &Datum<f32>, step: &Step) -> Checked<Buffer> {
    let ty = &function.node(param).types[0];
    match (ty, value) {
        (Type::Weight(w), Datum::Float(a)) => weight(w, in_rank(function, param), a.data()),
        (Type::Tensor(t), Datum::Float(a)) => Ok(rows(t, false, words(a.data().iter().map(|x| x.to_bits())))),
        (Type::Tensor(t), Datum::Int(a)) => {
            let flat = function.node(param).name.as_deref() == Some("order");
            Ok(rows(t, flat, words(a.data().iter().map(|x| x.cast_unsigned()))))
        }
        (Type::State(s), Datum::State(state)) => Ok(units(s, state, step.units(s.kind))),
        _ => Err(format!("no memory for {ty}")),
    }
}

/// Memory for a tensor that nobody has written yet.
pub fn of_result(ty: &TensorType, step: &Step) -> Buffer {
    let dims: Vec<u64> = ty.shape.eval(&step.syms()).into_iter().map(|d| d as u64).collect();
    Buffer::uninit(padded_elems(&dims) * 4)
}

fn words(words: impl Iterator<Item = u32>) -> Vec<u32> {
    words.collect()
}

fn from_words(words: &[u32]) -> Buffer {
    Buffer::from_bytes(&words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>())
}

/// Where element `i` of a tensor lies: rows with their innermost dimension padded, or flat.
fn element(ty: &TensorType, flat: bool, i: usize) -> usize {
    match ty.shape.inner() {
        Some(inner) if !flat && !inner.is_empty() => {
            let elems: u64 = inner.iter().product();
            (i as u64 / elems * padded_elems(&inner) + padded_index(&inner, i as u64 % elems)) as usize
        }
        _ => i,
    }
}

fn rows(ty: &TensorType, flat: bool, words: Vec<u32>) -> Buffer {
    let last = words.len().checked_sub(1).map_or(0, |i| element(ty, flat, i) + 1);
    let mut out = vec![0; last.next_multiple_of(16)];
    for (i, word) in words.into_iter().enumerate() {
        out[element(ty, flat, i)] = word;
    }
    from_words(&out)
}

/// The numbers of a tensor in memory.
pub fn read<E>(ty: &TensorType, flat: bool, count: usize, memory: &[E]) -> Vec<E>
where
    E: Copy,
{
    (0..count).map(|i| memory[element(ty, flat, i)]).collect()
}

/// A weight as the packer lays it out; the pass `layout` has said how.
fn weight(ty: &WeightType, in_rank: usize, values: &[f32]) -> Checked<Buffer> {
    match ty.layout.ok_or("the weight has no layout")? {
        Layout::Flat => Ok(flat(&ty.shape, values)),
        layout @ (Layout::Tile16 | Layout::Mma16) => Ok(tiles(ty, layout, in_rank, values)),
    }
}

fn flat(shape: &[u64], values: &[f32]) -> Buffer {
    let (width, values) = match *shape {
        [heads, width, taps] => {
            let at = |i: u64| values[((i % (heads * width)) * taps + i / (heads * width)) as usize];
            (width, (0..heads * width * taps).map(at).collect())
        }
        _ => (shape.last().copied().unwrap_or(1), values.to_vec()),
    };
    let mut out = vec![0; (values.len() as u64 / width * pad(width)) as usize];
    for (i, x) in (0u64..).zip(values) {
        out[padded_index(&[width], i) as usize] = x.to_bits();
    }
    from_words(&out)
}

fn tiles(ty: &WeightType, layout: Layout, in_rank: usize, values: &[f32]) -> Buffer {
    let (out_dims, in_dims) = ty.shape.split_at(ty.shape.len() - in_rank);
    let planes = Planes::new(layout, ty.format, out_dims, in_dims);
    if ty.format.blocks().is_some() {
        return Buffer::from_bytes(&codes::bytes(ty, in_rank, &planes));
    }
    let columns: u64 = in_dims.iter().product();
    let mut bytes = vec![0; planes.bytes() as usize];
    for (i, &x) in (0u64..).zip(values) {
        let at = planes.code(padded_index(out_dims, i / columns), padded_index(in_dims, i % columns))[0].byte as usize;
        let width = ty.format.def().bits as usize / 8;
        bytes[at..at + width].copy_from_slice(&(ty.format.def().encode)(x).to_le_bytes()[..width]);
    }
    Buffer::from_bytes(&bytes)
}

fn unit_bytes(ty: &StateType) -> u64 {
    ty.bytes() * if ty.kind == StateKind::Kv { PAGE_TOKENS as u64 } else { 1 }
}

/// Where an element of a state lies: the byte that it begins in, and that of its row's scale, where there is one.
struct Place {
    code: usize,
    scale: Option<usize>,
}

/// The places of a state's elements, in the order in which [`State::units`] has them.
fn places(ty: &StateType, state: &State<f32>) -> Vec<Place> {
    let page_tokens = PAGE_TOKENS as u64;
    let of_unit = |(unit, values): (u32, &[f32])| {
        let start = u64::from(unit) * unit_bytes(ty);
        let place = |i: u64| Place {
            code: (start + ty.stored_byte(i, page_tokens)) as usize,
            scale: ty.scale_byte(i, page_tokens).map(|at| (start + at) as usize),
        };
        (0..values.len() as u64).map(place).collect::<Vec<_>>()
    };
    state.units().flat_map(of_unit).collect()
}

/// Rounds the numbers of a unit to what a state keeps: row by row.
pub fn round(ty: &StateType, values: &mut [f32]) {
    values.chunks_mut(ty.row_elems()).for_each(|row| ty.stored.round(row));
}

fn units(ty: &StateType, state: &State<f32>, units: usize) -> Buffer {
    let mut out = vec![0; unit_bytes(ty) as usize * units];
    let numbers = numbers(state);
    let scales = numbers.chunks(ty.row_elems()).flat_map(|row| vec![ty.stored.scale(row); row.len()]);
    for ((place, &x), scale) in places(ty, state).iter().zip(&numbers).zip(scales) {
        let width = ty.stored.code_bytes();
        out[place.code..place.code + width].copy_from_slice(&ty.stored.encode(x, scale).to_le_bytes()[..width]);
        if let Some(at) = place.scale {
            out[at..at + 4].copy_from_slice(&scale.to_le_bytes());
        }
    }
    Buffer::from_bytes(&out)
}

/// Zeros what nobody will read of the windows of convolutions, a slot after the other: of a sequence that a step has moved on all but its last inputs, and those of
/// tentative tokens. How much more of a run is kept is a kernel's own affair.
pub fn clear_unread<T: Default>(ty: &StateType, step: &Step, slots: &[u32], values: &mut [T]) {
    if ty.kind != StateKind::Conv || values.is_empty() {
        return;
    }
    let (seen, rows) = (ty.dims[2] as i64, ty.dims[2] as usize + TENTATIVE_TOKENS as usize);
    let each = values.len() / slots.len();
    for (slot, unit) in slots.iter().zip(values.chunks_mut(each)) {
        let Some((first, end)) = step.moves(*slot) else { continue };
        let read: Vec<i64> = (first - seen..end).map(|position| position.rem_euclid(rows as i64)).collect();
        for (row, numbers) in (0..).zip(unit.chunks_mut(each / rows)) {
            if !read.contains(&row) {
                numbers.fill_with(T::default);
            }
        }
    }
}

/// The numbers of a state, slot by slot.
pub fn numbers(state: &State<f32>) -> Vec<f32> {
    state.units().flat_map(|(_, values)| values.to_vec()).collect()
}

/// The numbers of a state in memory, in the order of [`numbers`].
pub fn read_state(state: &State<f32>, memory: &[u8]) -> Vec<f32> {
    let stored = state.ty().stored;
    let word = |at: usize, width: usize| {
        let mut code = [0; 4];
        code[..width].copy_from_slice(&memory[at..at + width]);
        u32::from_le_bytes(code)
    };
    let number = |place: &Place| {
        let scale = place.scale.map_or(1.0, |at| f32::from_bits(word(at, 4)));
        stored.decode(word(place.code, stored.code_bytes()), scale)
    };
    places(state.ty(), state).iter().map(number).collect()
}
