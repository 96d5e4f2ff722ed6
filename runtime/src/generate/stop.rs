//! Stop texts: generation ends where one appears, and neither it nor what follows is shown.

use std::ops::ControlFlow;

/// Watches a stream of text. What may be the beginning of a stop text is held back.
#[derive(Clone, Debug)]
pub struct StopTexts {
    stops: Vec<String>,
    held: String,
}

impl StopTexts {
    /// Watches for any of `stops`; empty ones are left out.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes more text; gives what can be shown, and `Break` once a stop text has appeared.
    pub fn push(&mut self, text: &str) -> (String, ControlFlow<()>) {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = found {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), ControlFlow::Break(()));
        }
        let kept = self.held.split_off(self.held.len() - self.begun());
        (std::mem::replace(&mut self.held, kept), ControlFlow::Continue(()))
    }

    /// Ends the stream: takes its last text and gives all that was held back, up to a stop text.
    pub fn finish(&mut self, text: &str) -> String {
        let (mut shown, flow) = self.push(text);
        if flow.is_continue() {
            shown.push_str(&std::mem::take(&mut self.held));
        }
        shown
    }

    /// Bytes at the end of what is held that begin a stop text.
    fn begun(&self) -> usize {
        let begins = |n: usize| {
            let end = &self.held.as_bytes()[self.held.len() - n..];
            self.stops.iter().any(|s| s.as_bytes().starts_with(end))
        };
        let longest = self.stops.iter().map(|s| s.len() - 1).max().unwrap_or(0).min(self.held.len());
        let at_character = |n: &usize| self.held.is_char_boundary(self.held.len() - n);
        (1..=longest).rev().filter(at_character).find(|&n| begins(n)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(stops: &[&str], pieces: &[&str], expected: &str, stopped: bool) {
        let stops: Vec<String> = stops.iter().map(|&s| s.to_owned()).collect();
        let mut watch = StopTexts::new(&stops);
        let mut shown = String::new();
        for piece in pieces {
            let (text, flow) = watch.push(piece);
            shown.push_str(&text);
            if flow.is_break() {
                assert_eq!((shown.as_str(), true), (expected, stopped));
                return;
            }
        }
        shown.push_str(&watch.finish(""));
        assert_eq!((shown.as_str(), false), (expected, stopped));
    }

    #[test]
    fn stop_texts_are_found_over_pieces_and_never_shown() {
        check(&[], &["a", "b"], "ab", false);
        check(&[""], &["a", "b"], "ab", false);
        check(&["END"], &["xE", "N", "Dy"], "x", true);
        check(&["END"], &["xE", "N", "E"], "xENE", false);
        check(&["aab"], &["a", "a", "a", "b"], "a", true);
        check(&["\n\n", "Q:"], &["hm\n", "Q", ": \n\n"], "hm\n", true);
        check(&["é!"], &["è", "é", "é!"], "èé", true);
        check(&["bc", "abcd"], &["xabcd"], "x", true);
        check(&["bc", "abcd"], &["xab", "c"], "xa", true);
    }

    #[test]
    fn text_that_cannot_be_a_stop_is_shown_at_once() {
        let mut watch = StopTexts::new(&["###".to_owned()]);
        assert_eq!(watch.push("a#b#").0, "a#b");
        assert_eq!(watch.push("c").0, "#c");
    }
}
