//! The rewrite rules: each states that terms are equal, in the words of the op table.
//!
//! A rule has equations, `left => right`; where the pattern it looks for is matched (the first left side, unless it says
//! otherwise), both sides of every equation become one class. Several equations at once are needed where an op with
//! several results replaces several ops: the new version of a state must come from the same op as the output. A rule
//! applies only where both sides of all its equations have a type, and the same one; other side conditions are named
//! functions of [`conditions`]. `%name` stands for a term the rule spells once.

pub mod algebra;
pub mod attention;
pub mod conditions;
pub mod delta;
pub mod experts;
pub mod norm;

use std::fmt;

use egg::{Applier, ENodeOrVar, Id, Pattern, PatternAst, Rewrite, Subst, Symbol, Var};

use crate::egraph::{Data, Graph, Term, Typing};
pub use conditions::{Computed, Condition};

/// One rule.
#[derive(Clone, Debug)]
pub struct Rule {
    /// What it makes, kebab-case, unique.
    pub name: &'static str,
    /// The pattern looked for, if it is not the first left side.
    pub find: Option<&'static str>,
    /// Terms spelled once: `%name`, term.
    pub terms: Vec<(&'static str, &'static str)>,
    /// What becomes equal: left side, right side.
    pub equations: Vec<(&'static str, &'static str)>,
    /// When it applies.
    pub conditions: Vec<Condition>,
    /// Attributes that the right sides need and the left sides do not have.
    pub computed: Vec<Computed>,
    /// The float sum whose order differs between the sides, if one does.
    pub reorders: Option<&'static str>,
}

/// A rule of equations: `rw!("name"; "left" => "right")`.
macro_rules! rw {
    ($name:literal; $($left:literal => $right:literal),+ $(,)?) => {
        $crate::rules::Rule::new($name, vec![$(($left, $right)),+])
    };
}
pub(crate) use rw;

/// A family of rules: its name, and the rules.
pub type Family = (&'static str, fn() -> Vec<Rule>);

/// The families.
pub const FAMILIES: &[Family] = &[
    ("algebra", algebra::rules),
    ("norm", norm::rules),
    ("attention", attention::rules),
    ("delta", delta::rules),
    ("experts", experts::rules),
];

/// Every rule, family by family.
pub fn all() -> Vec<Rule> {
    FAMILIES.iter().flat_map(|(_, rules)| rules()).collect()
}

impl Rule {
    /// A rule of these equations that looks for the first left side.
    pub fn new(name: &'static str, equations: Vec<(&'static str, &'static str)>) -> Self {
        let (terms, conditions, computed) = (Vec::new(), Vec::new(), Vec::new());
        Self { name, find: None, terms, equations, conditions, computed, reorders: None }
    }

    /// Spells a term once; it may use those spelled before it.
    #[must_use]
    pub fn term(mut self, name: &'static str, term: &'static str) -> Self {
        self.terms.push((name, term));
        self
    }

    /// Looks for `pattern`, in which the left sides stand.
    #[must_use]
    pub fn find(mut self, pattern: &'static str) -> Self {
        self.find = Some(pattern);
        self
    }

    /// Applies only where `condition` holds.
    #[must_use]
    pub fn when(mut self, condition: Condition) -> Self {
        self.conditions.push(condition);
        self
    }

    /// Computes an attribute.
    #[must_use]
    pub fn computing(mut self, computed: Computed) -> Self {
        self.computed.push(computed);
        self
    }

    /// Says which float sum is added in another order.
    #[must_use]
    pub fn reorders(mut self, sum: &'static str) -> Self {
        self.reorders = Some(sum);
        self
    }

    /// The rule with its patterns parsed.
    /// # Errors
    /// [`RuleError`] if one is no pattern over the op table, or uses a variable that the pattern looked for does not bind.
    pub fn compile(&self) -> Result<Compiled, RuleError> {
        let find = self.find.or_else(|| self.equations.first().map(|e| e.0)).unwrap_or_default();
        let find = Pattern::new(self.parse(find)?);
        let sides = self.equations.iter().map(|(l, r)| Ok((self.parse(l)?, self.parse(r)?)));
        let equations: Vec<(PatternAst<Term>, PatternAst<Term>)> = sides.collect::<Result<_, RuleError>>()?;
        let (conditions, computed) = (self.conditions.clone(), self.computed.clone());
        let compiled = Compiled { name: self.name, find, equations, conditions, computed };
        match compiled.unbound() {
            Some(var) => Err(RuleError { rule: self.name, pattern: var.to_string(), reason: "is not bound".into() }),
            None => Ok(compiled),
        }
    }

    fn parse(&self, pattern: &str) -> Result<PatternAst<Term>, RuleError> {
        let text = self.spell(pattern);
        text.parse::<Pattern<Term>>().map(|p| p.ast).map_err(|error| RuleError {
            rule: self.name,
            pattern: text,
            reason: error.to_string(),
        })
    }

    /// `pattern` with the terms spelled out.
    fn spell(&self, pattern: &str) -> String {
        spell(pattern, &self.terms)
    }
}

/// `pattern` with each `%name` replaced; a term is spelled in the words of those before it.
fn spell(pattern: &str, terms: &[(&str, &str)]) -> String {
    let mut parts = pattern.split('%');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(part.len());
        let (name, rest) = part.split_at(end);
        match terms.iter().rposition(|(term, _)| term.strip_prefix('%') == Some(name)) {
            Some(at) => text.push_str(&spell(terms[at].1, &terms[..at])),
            None => text.push_str(&format!("%{name}")),
        }
        text.push_str(rest);
    }
    text
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let equations: Vec<String> =
            self.equations.iter().map(|(l, r)| format!("{} => {}", self.spell(l), self.spell(r))).collect();
        f.write_str(&equations.join(";  "))?;
        if let Some(find) = self.find {
            write!(f, ";  where {} stands", self.spell(find))?;
        }
        let conditions: Vec<&str> = self.conditions.iter().map(|c| c.text.as_str()).collect();
        if !conditions.is_empty() {
            write!(f, ";  if {}", conditions.join(" and "))?;
        }
        Ok(())
    }
}

/// Why a rule is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rule `{rule}`: `{pattern}`: {reason}")]
pub struct RuleError {
    /// The rule.
    pub rule: &'static str,
    /// The pattern, or the variable.
    pub pattern: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A rule whose patterns are parsed.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Its name.
    pub name: &'static str,
    /// The pattern looked for.
    pub find: Pattern<Term>,
    /// What becomes equal.
    pub equations: Vec<(PatternAst<Term>, PatternAst<Term>)>,
    /// When it applies.
    pub conditions: Vec<Condition>,
    /// Attributes to compute.
    pub computed: Vec<Computed>,
}

impl Compiled {
    /// The rule for `egg`.
    pub fn rewrite(self) -> Rewrite<Term, Typing> {
        let find = self.find.clone();
        Rewrite::new(self.name, find, self).expect("an applier that names no variables is accepted")
    }

    /// A variable that the pattern looked for does not bind and nothing computes.
    fn unbound(&self) -> Option<Var> {
        let mut bound = self.find.vars();
        bound.extend(self.computed.iter().map(|c| c.var));
        let sides = self.equations.iter().flat_map(|(l, r)| [l, r]);
        let used = sides.flat_map(|side| side.iter()).filter_map(|node| match node {
            ENodeOrVar::Var(var) => Some(*var),
            ENodeOrVar::ENode(_) => None,
        });
        let needed = self.conditions.iter().flat_map(|c| c.vars.iter().copied());
        used.chain(needed).find(|var| !bound.contains(var))
    }

    /// The computed attributes where the rule applies: its conditions hold and its equations are well typed.
    pub fn applies(&self, typing: &Typing, data: &dyn Fn(Var) -> Option<Data>) -> Option<Vec<(Var, Data)>> {
        let of = |vars: &[Var]| vars.iter().map(|&var| data(var)).collect::<Option<Vec<Data>>>();
        for condition in &self.conditions {
            if !(condition.holds)(&of(&condition.vars)?) {
                return None;
            }
        }
        let mut computed = Vec::new();
        for c in &self.computed {
            computed.push((c.var, Data::Attr((c.compute)(&of(&c.vars)?)?)));
        }
        let all = |var: Var| computed.iter().find(|(v, _)| *v == var).map(|(_, d)| d.clone()).or_else(|| data(var));
        let same = |(left, right): &(PatternAst<Term>, PatternAst<Term>)| {
            let left = infer(typing, left, &all);
            left.is_some() && left == infer(typing, right, &all)
        };
        self.equations.iter().all(same).then_some(computed)
    }
}

/// What a pattern is under a binding of its variables, if it is well typed.
pub fn infer(typing: &Typing, pattern: &PatternAst<Term>, data: &dyn Fn(Var) -> Option<Data>) -> Option<Data> {
    let mut known: Vec<Data> = Vec::with_capacity(pattern.len());
    for node in pattern {
        known.push(match node {
            ENodeOrVar::Var(var) => data(*var)?,
            ENodeOrVar::ENode(Term::Attr(attr)) => Data::Attr(attr.clone()),
            ENodeOrVar::ENode(Term::Op(op, children)) => {
                let children: Vec<&Data> = children.iter().map(|&id| &known[usize::from(id)]).collect();
                typing.infer(*op, &children).ok()?
            }
        });
    }
    known.pop()
}

impl Applier<Term, Typing> for Compiled {
    fn apply_one(&self, graph: &mut Graph, _: Id, subst: &Subst, _: Option<&PatternAst<Term>>, _: Symbol) -> Vec<Id> {
        let data = |var: Var| subst.get(var).map(|&id| graph[id].data.clone());
        let Some(computed) = self.applies(&graph.analysis, &data) else { return Vec::new() };
        let mut subst = subst.clone();
        for (var, data) in computed {
            if let Data::Attr(attr) = data {
                subst.insert(var, graph.add(Term::Attr(attr)));
            }
        }
        let mut changed = Vec::new();
        for (left, right) in &self.equations {
            let (left, right) = (graph.add_instantiation(left, &subst), graph.add_instantiation(right, &subst));
            if graph.union(left, right) {
                changed.push(left);
            }
        }
        changed
    }
}
