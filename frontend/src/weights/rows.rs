//! Row order inside the fused projections of a checkpoint.
//!
//! `in_proj_qkvz` and `in_proj_ba` are grouped by key head, `q_proj` holds each query head's query and output gate side by
//! side. The functions here give, for each part, the runs of rows that make it, heads in natural order; together the
//! parts take every row once.

use nextc_ir::graph::RowRun;

use crate::config::ModelConfig;

/// The parts of `in_proj_qkvz`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as the projections")]
pub struct Qkvz {
    pub q: Vec<RowRun>,
    pub k: Vec<RowRun>,
    pub v: Vec<RowRun>,
    pub z: Vec<RowRun>,
}

/// The rows of `in_proj_qkvz`. A group, one a key head: `[q | k | v of its value heads | z of its value heads]`.
pub fn qkvz(c: &ModelConfig, tensor: &str) -> Qkvz {
    let values = c.num_v_heads / c.num_k_heads * c.head_v_dim;
    let group = 2 * c.head_k_dim + 2 * values;
    let part = |offset: u64, rows: u64| grouped(tensor, c.num_k_heads, group, offset, rows);
    Qkvz {
        q: part(0, c.head_k_dim),
        k: part(c.head_k_dim, c.head_k_dim),
        v: part(2 * c.head_k_dim, values),
        z: part(2 * c.head_k_dim + values, values),
    }
}

/// The same parts where projections are apart: all of q, all of k and all of v in `qkv`, and `z`, heads in natural order.
pub fn qkv_z(c: &ModelConfig, qkv: &str, z: &str) -> Qkvz {
    let (keys, values) = (c.num_k_heads * c.head_k_dim, c.num_v_heads * c.head_v_dim);
    let part = |first: u64, rows: u64| vec![run(qkv, first, rows)];
    Qkvz { q: part(0, keys), k: part(keys, keys), v: part(2 * keys, values), z: vec![run(z, 0, values)] }
}

/// The rows of `in_proj_ba`: those of b and those of a. A group, one a key head: `[b of its value heads | a of them]`.
pub fn ba(c: &ModelConfig, tensor: &str) -> [Vec<RowRun>; 2] {
    let values = c.num_v_heads / c.num_k_heads;
    [0, values].map(|offset| grouped(tensor, c.num_k_heads, 2 * values, offset, values))
}

/// The rows of `q_proj`: those of the query and those of the output gate. A group, one a query head: `[query | gate]`.
pub fn query_gate(c: &ModelConfig, tensor: &str) -> [Vec<RowRun>; 2] {
    [0, c.head_dim].map(|offset| grouped(tensor, c.num_heads, 2 * c.head_dim, offset, c.head_dim))
}

/// One part of `num_experts` stacked matrices: `rows` rows from `offset` on in each group of `group` rows.
pub fn stacked(tensor: &str, num_experts: u64, group: u64, offset: u64, rows: u64) -> Vec<RowRun> {
    grouped(tensor, num_experts, group, offset, rows)
}

fn grouped(tensor: &str, groups: u64, group: u64, offset: u64, rows: u64) -> Vec<RowRun> {
    (0..groups).map(|g| run(tensor, g * group + offset, rows)).collect()
}

/// A run of whole rows.
pub fn run(tensor: &str, first: u64, rows: u64) -> RowRun {
    RowRun { tensor: tensor.to_owned(), first, rows, column: 0 }
}
