//! Choosing one term of each class so that the whole graph, with a shared term counted once, costs least.
//!
//! Finding the cheapest graph is NP-hard; this is a greedy choice with the cost of sets, then improvement one class at a
//! time, or one class with everything that can use it, until nothing gets cheaper. It starts from the greedy choice and from
//! the graph as it was given, so it never returns anything dearer than what it was given. The same input gives the same
//! output. A choice in which a term depends on itself, or two terms write one version of a state, is no choice at all.

use std::collections::{BTreeSet, HashMap};

/// One term of a class.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Alternative {
    /// What the term itself costs.
    pub cost: f64,
    /// The classes it needs.
    pub children: Vec<usize>,
    /// Those of them that are states it writes.
    pub writes: Vec<usize>,
}

/// Classes of equal terms, and the classes that are wanted.
#[derive(Clone, Debug, Default)]
pub struct Problem {
    /// The alternatives of each class.
    pub classes: Vec<Vec<Alternative>>,
    /// The classes wanted.
    pub roots: Vec<usize>,
}

/// The alternative taken in each class, and what the graph costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Index of the alternative in each class (0 in classes that are not used).
    pub taken: Vec<usize>,
    /// The cost of all used classes.
    pub cost: f64,
}

impl Problem {
    /// The cheapest choice found; `given` is a choice that is known to work (`None` in classes it does not use).
    pub fn solve(&self, given: &[Option<usize>]) -> Option<Choice> {
        let greedy = self.greedy();
        let start: Vec<usize> = given.iter().zip(&greedy).map(|(g, &greedy)| g.unwrap_or(greedy)).collect();
        let starts = [greedy, start].map(|taken| self.improve(taken));
        starts.into_iter().filter(|c| c.cost.is_finite()).reduce(|a, b| if b.cost < a.cost { b } else { a })
    }

    /// What the graph costs under `taken`: infinite if it is no choice.
    pub fn cost(&self, taken: &[usize]) -> f64 {
        self.walk(taken).map_or(f64::INFINITY, |(cost, _)| cost)
    }

    /// Cost and used classes, or `None` if a class needs itself or a state is written twice.
    fn walk(&self, taken: &[usize]) -> Option<(f64, Vec<bool>)> {
        #[derive(Clone, Copy, PartialEq)]
        enum Seen {
            No,
            Open,
            Done,
        }
        let mut seen = vec![Seen::No; self.classes.len()];
        let mut writers: HashMap<usize, usize> = HashMap::new();
        let mut cost = 0.0;
        let mut stack: Vec<(usize, usize)> = Vec::new();
        for &root in &self.roots {
            if seen[root] == Seen::No {
                seen[root] = Seen::Open;
                stack.push((root, 0));
            }
            while let Some((class, next)) = stack.pop() {
                let term = self.classes[class].get(taken[class])?;
                if let Some(&child) = term.children.get(next) {
                    stack.push((class, next + 1));
                    match seen[child] {
                        Seen::Done => {}
                        Seen::Open => return None,
                        Seen::No => {
                            seen[child] = Seen::Open;
                            stack.push((child, 0));
                        }
                    }
                    continue;
                }
                seen[class] = Seen::Done;
                cost += term.cost;
                if term.writes.iter().any(|&state| writers.insert(state, class).is_some_and(|other| other != class)) {
                    return None;
                }
            }
        }
        Some((cost, seen.into_iter().map(|s| s == Seen::Done).collect()))
    }

    /// Bottom up: in each class the term whose set of needed classes costs least.
    fn greedy(&self) -> Vec<usize> {
        let mut best: Vec<Option<Set>> = vec![None; self.classes.len()];
        // each round lowers at least one cost; the bound only guards against rounding that never settles
        for _ in 0..=self.classes.len() {
            let mut changed = false;
            for class in 0..self.classes.len() {
                for index in 0..self.classes[class].len() {
                    let Some(set) = self.set_of(class, index, &best) else { continue };
                    if best[class].as_ref().is_none_or(|old| cheaper(set.cost, old.cost)) {
                        best[class] = Some(set);
                        changed = true;
                    }
                }
            }
            if !changed {
                break;
            }
        }
        best.into_iter().map(|set| set.map_or(0, |s| s.taken)).collect()
    }

    fn set_of(&self, class: usize, index: usize, best: &[Option<Set>]) -> Option<Set> {
        let term = &self.classes[class][index];
        let mut needs = BTreeSet::new();
        for &child in &term.children {
            needs.extend(&best[child].as_ref()?.needs);
        }
        if !needs.insert(class) {
            return None;
        }
        let own = |c: usize| best[c].as_ref().map_or(0.0, |set| self.classes[c][set.taken].cost);
        let others: f64 = needs.iter().filter(|&&c| c != class).map(|&c| own(c)).sum();
        Some(Set { taken: index, cost: others + term.cost, needs })
    }

    /// Moves to a cheaper neighbour until there is none.
    fn improve(&self, mut taken: Vec<usize>) -> Choice {
        let readers = self.readers();
        let mut cost = self.cost(&taken);
        loop {
            let before = cost;
            for class in 0..self.classes.len() {
                for index in 0..self.classes[class].len() {
                    for change in self.moves(class, index, &readers) {
                        let old: Vec<(usize, usize)> = change.iter().map(|&(c, _)| (c, taken[c])).collect();
                        if old == change {
                            continue;
                        }
                        change.iter().for_each(|&(c, i)| taken[c] = i);
                        let new = self.cost(&taken);
                        if cheaper(new, cost) {
                            cost = new;
                        } else {
                            old.iter().for_each(|&(c, i)| taken[c] = i);
                        }
                    }
                }
            }
            if !cheaper(cost, before) {
                return Choice { taken, cost };
            }
        }
    }

    /// Taking `index` in `class` alone, and taking it together with every term that can use it.
    fn moves(&self, class: usize, index: usize, readers: &[Vec<(usize, usize)>]) -> Vec<Vec<(usize, usize)>> {
        let alone = vec![(class, index)];
        if readers[class].is_empty() {
            return vec![alone];
        }
        let together = alone.iter().chain(&readers[class]).copied().collect();
        vec![alone, together]
    }

    /// For each class, the alternatives elsewhere that need it.
    fn readers(&self) -> Vec<Vec<(usize, usize)>> {
        let mut readers = vec![Vec::new(); self.classes.len()];
        for (class, terms) in self.classes.iter().enumerate() {
            for (index, term) in terms.iter().enumerate() {
                term.children.iter().for_each(|&child| readers[child].push((class, index)));
            }
        }
        readers
    }
}

#[derive(Clone, Debug)]
struct Set {
    taken: usize,
    cost: f64,
    needs: BTreeSet<usize>,
}

/// Less by more than rounding; anything finite is cheaper than the infinite.
fn cheaper(new: f64, old: f64) -> bool {
    new < old && (old.is_infinite() || old - new > 1e-9 * old.abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn term(cost: f64, children: &[usize]) -> Alternative {
        Alternative { cost, children: children.to_vec(), ..Alternative::default() }
    }

    fn check(classes: Vec<Vec<Alternative>>, roots: &[usize], cost: f64) {
        let problem = Problem { classes, roots: roots.to_vec() };
        let choice = problem.solve(&vec![None; problem.classes.len()]).expect("there is a choice");
        assert_eq!(choice.cost, cost, "{:?}", choice.taken);
    }

    #[test]
    fn a_shared_term_is_counted_once() {
        // 0 is a leaf of cost 10 that both halves of one alternative share; a tree cost would see 21 and take 15
        let shared = vec![term(1.0, &[1, 2]), term(15.0, &[])];
        check(vec![shared, vec![term(0.5, &[3])], vec![term(0.5, &[3])], vec![term(10.0, &[])]], &[0], 12.0);
    }

    #[test]
    fn sharing_across_roots_pays_for_a_dearer_term() {
        // alone each root takes its own term of cost 4; both together take the shared one of cost 6
        let root = || vec![term(4.0, &[]), term(0.0, &[2])];
        check(vec![root(), root(), vec![term(6.0, &[])]], &[0, 1], 6.0);
    }

    #[test]
    fn a_term_never_depends_on_itself() {
        check(vec![vec![term(0.0, &[1]), term(9.0, &[])], vec![term(0.0, &[0]), term(9.0, &[])]], &[0, 1], 9.0);
    }

    #[test]
    fn one_version_of_a_state_has_one_writer() {
        let writer = |cost| Alternative { writes: vec![2], ..term(cost, &[2]) };
        // class 3 and 4 are two ops on state 2; output 0 is cheaper from 3, new state 1 only from 4
        let classes = vec![
            vec![term(0.0, &[3]), term(5.0, &[4])],
            vec![term(0.0, &[4])],
            vec![term(0.0, &[])],
            vec![writer(1.0)],
            vec![writer(1.0)],
        ];
        check(classes, &[0, 1], 6.0);
    }

    fn problems() -> impl Strategy<Value = Problem> {
        let alternative = (0u32..20, proptest::collection::vec(0usize..100, 0..3));
        proptest::collection::vec(proptest::collection::vec(alternative, 1..3), 2..8).prop_map(|raw| {
            let count = raw.len();
            let mut classes: Vec<Vec<Alternative>> = raw
                .into_iter()
                .map(|terms| {
                    terms
                        .iter()
                        .map(|(c, ch)| term(f64::from(*c), &ch.iter().map(|i| i % count).collect::<Vec<_>>()))
                        .collect()
                })
                .collect();
            // the first alternatives alone are a graph without cycles
            for (class, terms) in classes.iter_mut().enumerate() {
                terms[0].children.retain(|&child| child > class);
            }
            Problem { classes, roots: vec![0, 1] }
        })
    }

    fn cheapest(problem: &Problem) -> f64 {
        let mut taken = vec![0; problem.classes.len()];
        let mut best = f64::INFINITY;
        loop {
            best = best.min(problem.cost(&taken));
            let Some(class) = (0..taken.len()).find(|&c| taken[c] + 1 < problem.classes[c].len()) else { return best };
            taken[..class].fill(0);
            taken[class] += 1;
        }
    }

    proptest! {
        #[test]
        fn the_choice_is_valid_and_no_dearer_than_the_given_graph(problem in problems()) {
            let given = vec![Some(0); problem.classes.len()];
            let choice = problem.solve(&given).expect("the given graph is a choice");
            prop_assert_eq!(problem.cost(&choice.taken), choice.cost);
            prop_assert!(choice.cost <= problem.cost(&vec![0; problem.classes.len()]));
            prop_assert!(choice.cost >= cheapest(&problem));
            prop_assert_eq!(problem.solve(&given), Some(choice));
        }
    }
}
