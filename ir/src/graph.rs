//! The graph IR: a module of functions, each a DAG of ops over typed values.
//!
//! A function is a petgraph whose nodes are ops and whose edges are uses; an edge's weight says which operand it feeds and
//! which result it takes. Indices survive removal, so side tables keyed by node stay valid.

use indexmap::IndexMap;
use petgraph::Direction;
use petgraph::stable_graph::{NodeIndex, StableDiGraph};
use petgraph::visit::EdgeRef;

use crate::attr::Attrs;
use crate::format::Format;
use crate::op::Op;
use crate::shape::Sym;
use crate::types::Type;

/// A node of a function.
pub type NodeId = NodeIndex<u32>;

/// One result of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value {
    /// The node that makes it.
    pub node: NodeId,
    /// Which of its results.
    pub result: u32,
}

/// Where a value lies in the arena: `at_bytes` for each unit of `unit` (`at_bytes · T`), or a fixed place if there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Placement {
    /// The symbol that the value's size is a multiple of.
    pub unit: Option<Sym>,
    /// Offset in bytes a unit, inside the region of that unit.
    pub at_bytes: u64,
}

/// An op with its attributes and the types of its results.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// The op.
    pub op: Op,
    /// Its attributes.
    pub attrs: Attrs,
    /// The types of its results.
    pub types: Vec<Type>,
    /// The name of a parameter, or of a value that keeps one in text; otherwise values are numbered.
    pub name: Option<String>,
    /// The kernel it belongs to, from the pass `partition`: nodes of a function with one number are one kernel.
    pub kernel: Option<u32>,
    /// Where each result lies, from the pass `memory`; `None` for what is not in the arena.
    pub placement: Vec<Option<Placement>>,
}

/// A use: operand `operand` of the target takes result `result` of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// Position among the operands of the user.
    pub operand: u32,
    /// Which result of the maker.
    pub result: u32,
}

/// A function of the graph IR.
#[derive(Clone, Debug, Default)]
pub struct Function {
    /// Its name, without the `@`.
    pub name: String,
    /// The graph. Parameters are nodes with [`Op::Param`].
    pub graph: StableDiGraph<Node, Use, u32>,
    /// The parameters in order.
    pub params: Vec<NodeId>,
    /// What it returns.
    pub results: Vec<Value>,
}

impl Function {
    /// An empty function.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// Adds a node with the given result types; [`crate::build`] computes them from the op's shape rule.
    pub fn add_node(&mut self, op: Op, operands: &[Value], attrs: Attrs, types: Vec<Type>) -> NodeId {
        let placement = vec![None; types.len()];
        let node = self.graph.add_node(Node { op, attrs, types, name: None, kernel: None, placement });
        for (i, v) in operands.iter().enumerate() {
            self.graph.add_edge(v.node, node, Use { operand: i as u32, result: v.result });
        }
        node
    }

    /// The node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.graph[id]
    }

    /// The type of a value.
    pub fn ty(&self, v: Value) -> &Type {
        &self.graph[v.node].types[v.result as usize]
    }

    /// Operands of a node in order.
    pub fn operands(&self, id: NodeId) -> Vec<Value> {
        let mut uses: Vec<_> = self
            .graph
            .edges_directed(id, Direction::Incoming)
            .map(|e| (e.weight().operand, Value { node: e.source(), result: e.weight().result }))
            .collect();
        uses.sort_unstable();
        uses.into_iter().map(|(_, v)| v).collect()
    }

    /// Users of any result of a node: (user, operand, result), ordered.
    pub fn users(&self, id: NodeId) -> Vec<(NodeId, Use)> {
        let mut users: Vec<_> =
            self.graph.edges_directed(id, Direction::Outgoing).map(|e| (e.target(), *e.weight())).collect();
        users.sort_unstable_by_key(|(n, u)| (*n, u.operand));
        users
    }

    /// Nodes in an order in which makers come before users: the parameters, then a depth-first walk from the results, then
    /// what is left. The order depends on the graph's structure alone.
    pub fn order(&self) -> Vec<NodeId> {
        let mut done = std::collections::HashSet::new();
        let mut order = Vec::with_capacity(self.graph.node_count());
        for &p in &self.params {
            done.insert(p);
            order.push(p);
        }
        let roots = self.results.iter().map(|v| v.node).chain(self.graph.node_indices());
        let mut stack: Vec<(NodeId, bool)> = Vec::new();
        for root in roots {
            stack.push((root, false));
            while let Some((id, ready)) = stack.pop() {
                if ready {
                    if done.insert(id) {
                        order.push(id);
                    }
                } else if !done.contains(&id) {
                    stack.push((id, true));
                    for v in self.operands(id).into_iter().rev() {
                        if !done.contains(&v.node) {
                            stack.push((v.node, false));
                        }
                    }
                }
            }
        }
        order
    }
}

/// A run of rows taken from a checkpoint tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RowRun {
    /// The checkpoint tensor.
    pub tensor: String,
    /// First row of it.
    pub first: u64,
    /// Rows.
    pub rows: u64,
    /// First column taken; as many columns follow as the weight has inputs.
    pub column: u64,
}

/// Where the numbers of a weight come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    /// Rows of checkpoint tensors, one run after the other, in the order of the weight's own rows (all dimensions but the last
    /// `in_rank` flattened).
    Rows(Vec<RowRun>),
    /// Given here: small tables such as RoPE frequencies.
    Values(Vec<f32>),
}

/// An entry of the weight table.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightDecl {
    /// Dimensions: see [`crate::types::WeightType`].
    pub shape: Vec<u64>,
    /// How many of the innermost dimensions are inputs (columns of the matrix); 0 for a vector or table.
    pub in_rank: usize,
    /// How its numbers are stored in the executable's weights.
    pub format: Format,
    /// Where they come from.
    pub origin: Origin,
}

impl WeightDecl {
    /// Its type, before a layout is assigned.
    pub fn ty(&self) -> Type {
        Type::weight(&self.shape, self.format)
    }

    /// The output dimensions (experts first where there are any).
    pub fn out_dims(&self) -> &[u64] {
        &self.shape[..self.shape.len() - self.in_rank]
    }

    /// The input dimensions.
    pub fn in_dims(&self) -> &[u64] {
        &self.shape[self.shape.len() - self.in_rank..]
    }
}

/// What the compiler knows of a model beyond its graph; `info` and the runtime read it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelInfo {
    /// The model's name: the last part of its directory.
    pub name: String,
    /// Rows of the embedding and the head.
    pub vocab_size: u64,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Layers of the trunk.
    pub num_layers: u64,
    /// The longest context.
    pub max_context: u64,
    /// Stop tokens.
    pub eos_token_ids: Vec<u32>,
    /// True if `@draft` is there.
    pub mtp: bool,
    /// False if it was built from a `config.json` alone.
    pub has_weights: bool,
}

/// A whole program: functions, the weight table and what is known of the model. Entry points are `@step` and, where the
/// model has MTP, `@draft`; the other functions are called by them.
#[derive(Clone, Debug, Default)]
pub struct Module {
    /// Facts of the model.
    pub info: ModelInfo,
    /// Functions, callees before callers.
    pub functions: Vec<Function>,
    /// The weight table.
    pub weights: IndexMap<String, WeightDecl>,
}

impl Module {
    /// The function called `name`.
    pub fn function(&self, name: &str) -> Option<&Function> {
        self.functions.iter().find(|f| f.name == name)
    }

    /// The function called `name`, to change it.
    pub fn function_mut(&mut self, name: &str) -> Option<&mut Function> {
        self.functions.iter_mut().find(|f| f.name == name)
    }
}
