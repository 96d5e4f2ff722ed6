//! Thoughts in a stream of text: what stands between `<think>` and `</think>` is told apart from the answer.

use super::conversation::THINK;

/// A run of text, inside thoughts or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The text, without the marks.
    pub text: String,
    /// True inside thoughts.
    pub thought: bool,
}

/// Splits a stream at the marks, which may come in pieces.
#[derive(Clone, Debug)]
pub struct Thoughts {
    inside: bool,
    held: String,
}

impl Thoughts {
    /// A stream that begins `inside` thoughts, or not.
    pub fn new(inside: bool) -> Self {
        Self { inside, held: String::new() }
    }

    /// True while thoughts have not ended.
    pub fn inside(&self) -> bool {
        self.inside
    }

    /// Takes more text; gives what is known to be inside or outside.
    pub fn push(&mut self, text: &str) -> Vec<Run> {
        self.held.push_str(text);
        let mut runs = Vec::new();
        while let Some(at) = self.held.find(self.mark()) {
            let after = self.held.split_off(at + self.mark().len());
            self.held.truncate(at);
            self.take(&mut runs);
            self.inside = !self.inside;
            self.held = after;
        }
        let kept = self.held.split_off(self.held.len() - self.begun());
        self.take(&mut runs);
        self.held = kept;
        runs
    }

    /// Ends the stream: gives what was held back.
    pub fn finish(&mut self) -> Vec<Run> {
        let mut runs = Vec::new();
        self.take(&mut runs);
        runs
    }

    /// The mark that comes next.
    fn mark(&self) -> &'static str {
        THINK[usize::from(self.inside)]
    }

    fn take(&mut self, runs: &mut Vec<Run>) {
        let text = std::mem::take(&mut self.held);
        if !text.is_empty() {
            runs.push(Run { text, thought: self.inside });
        }
    }

    /// Bytes at the end of what is held that begin the mark.
    fn begun(&self) -> usize {
        let mark = self.mark();
        (1..mark.len()).rev().find(|&n| self.held.ends_with(&mark[..n])).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(inside: bool, pieces: &[&str], expected: &[(&str, bool)]) {
        let mut thoughts = Thoughts::new(inside);
        let mut runs: Vec<Run> = pieces.iter().flat_map(|p| thoughts.push(p)).collect();
        runs.extend(thoughts.finish());
        let mut joined: Vec<(String, bool)> = Vec::new();
        for run in runs {
            match joined.last_mut() {
                Some((text, thought)) if *thought == run.thought => text.push_str(&run.text),
                _ => joined.push((run.text, run.thought)),
            }
        }
        let expected: Vec<_> = expected.iter().map(|&(t, b)| (t.to_owned(), b)).collect();
        assert_eq!(joined, expected, "{pieces:?}");
    }

    #[test]
    fn marks_are_found_over_pieces_and_not_shown() {
        check(false, &["a<think>b</think>c"], &[("a", false), ("b", true), ("c", false)]);
        check(false, &["<th", "ink>", "b</", "think", ">c"], &[("b", true), ("c", false)]);
        check(true, &["b</think>\n", "c"], &[("b", true), ("\nc", false)]);
        check(true, &["b"], &[("b", true)]);
        check(false, &["a <", "b> <thin", "g"], &[("a <b> <thing", false)]);
        check(false, &["é<", "think>ü</think>"], &[("é", false), ("ü", true)]);
        check(false, &["a</think>b<"], &[("a</think>b<", false)]);
    }

    #[test]
    fn text_that_cannot_be_a_mark_is_given_at_once() {
        let mut thoughts = Thoughts::new(false);
        assert_eq!(thoughts.push("a<b"), [Run { text: "a<b".to_owned(), thought: false }]);
        assert_eq!(thoughts.push("<t"), []);
        assert_eq!(thoughts.push("x"), [Run { text: "<tx".to_owned(), thought: false }]);
    }
}
