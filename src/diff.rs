//! What changed between two modules, function by function.

use std::fmt::Write;

/// Lines around a change that are shown.
const CONTEXT: usize = 2;
/// Above this many line pairs a function is shown as replaced.
const MAX_PAIRS: usize = 25_000_000;

/// A function by name with its text.
pub type Named = (String, String);

/// The functions that are gone, new or different.
pub fn functions(before: &[Named], after: &[Named]) -> String {
    let mut out = String::new();
    let text_of = |side: &[Named], name: &str| side.iter().find(|(n, _)| n == name).map(|(_, text)| text.clone());
    let gone: Vec<&str> = before.iter().filter(|(n, _)| text_of(after, n).is_none()).map(|(n, _)| n.as_str()).collect();
    if !gone.is_empty() {
        put(
            &mut out,
            format_args!(
                "- {} functions are gone: {}\n",
                gone.len(),
                gone.iter().map(|n| format!("@{n}")).collect::<Vec<_>>().join(" ")
            ),
        );
    }
    let mut same = 0;
    for (name, text) in after {
        match text_of(before, name) {
            Some(old) if old == *text => same += 1,
            Some(old) => put(&mut out, format_args!("@@ @{name}\n{}", lines(&old, text))),
            None => put(&mut out, format_args!("@@ @{name} is new\n{}", lines("", text))),
        }
    }
    if same > 0 {
        put(&mut out, format_args!("{same} functions are unchanged\n"));
    }
    out
}

fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a string takes all text");
}

/// A line that is in both texts, or in one of them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Line<'a> {
    Same(&'a str),
    Old(&'a str),
    New(&'a str),
}

/// The lines that differ, with a few around them.
pub fn lines(old: &str, new: &str) -> String {
    let all = compare(&old.lines().collect::<Vec<_>>(), &new.lines().collect::<Vec<_>>());
    let near = |i: usize| {
        let window = &all[i.saturating_sub(CONTEXT)..(i + CONTEXT + 1).min(all.len())];
        window.iter().any(|l| !matches!(l, Line::Same(_)))
    };
    let mut out = String::new();
    let mut skipped = false;
    for (i, line) in all.iter().enumerate() {
        match line {
            Line::Same(_) if !near(i) => {
                if !std::mem::replace(&mut skipped, true) {
                    out.push_str("  ...\n");
                }
                continue;
            }
            Line::Same(text) => put(&mut out, format_args!("  {text}\n")),
            Line::Old(text) => put(&mut out, format_args!("- {text}\n")),
            Line::New(text) => put(&mut out, format_args!("+ {text}\n")),
        }
        skipped = false;
    }
    out
}

/// The longest common subsequence as a list of lines; what is equal at both ends is taken off first.
fn compare<'a>(old: &[&'a str], new: &[&'a str]) -> Vec<Line<'a>> {
    let front = old.iter().zip(new).take_while(|(a, b)| a == b).count();
    let (old_rest, new_rest) = (&old[front..], &new[front..]);
    let back = old_rest.iter().rev().zip(new_rest.iter().rev()).take_while(|(a, b)| a == b).count();
    let (a, b) = (&old_rest[..old_rest.len() - back], &new_rest[..new_rest.len() - back]);
    let mut out: Vec<Line<'a>> = old[..front].iter().map(|l| Line::Same(l)).collect();
    if a.len().saturating_mul(b.len()) > MAX_PAIRS {
        out.extend(a.iter().map(|l| Line::Old(l)));
        out.extend(b.iter().map(|l| Line::New(l)));
    } else {
        common(a, b, &mut out);
    }
    out.extend(old_rest[a.len()..].iter().map(|l| Line::Same(l)));
    out
}

fn common<'a>(a: &[&'a str], b: &[&'a str], out: &mut Vec<Line<'a>>) {
    let width = b.len() + 1;
    let mut longest = vec![0u32; (a.len() + 1) * width];
    for i in (0..a.len()).rev() {
        for j in (0..b.len()).rev() {
            longest[i * width + j] = if a[i] == b[j] {
                longest[(i + 1) * width + j + 1] + 1
            } else {
                longest[(i + 1) * width + j].max(longest[i * width + j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    while i < a.len() || j < b.len() {
        if i < a.len() && j < b.len() && a[i] == b[j] {
            out.push(Line::Same(a[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == b.len() || (i < a.len() && longest[(i + 1) * width + j] >= longest[i * width + j + 1]) {
            out.push(Line::Old(a[i]));
            i += 1;
        } else {
            out.push(Line::New(b[j]));
            j += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_differ_are_shown_with_context() {
        assert_eq!(lines("a\nb\nc", "a\nx\nc"), "  a\n- b\n+ x\n  c\n");
        assert_eq!(lines("a\nb", "a\nb"), "  ...\n");
        assert_eq!(lines("1\n2\n3\n4\n5\n6\n7", "1\n2\n3\n4\n5\n6"), "  ...\n  5\n  6\n- 7\n");
        assert_eq!(lines("", "a"), "+ a\n");
    }

    #[test]
    fn applying_a_comparison_gives_both_sides() {
        let (old, new) = (["a", "b", "c", "a", "b", "b", "a"], ["c", "b", "a", "b", "a", "c"]);
        let all = compare(&old, &new);
        let side = |keep: fn(&Line) -> bool| {
            all.iter()
                .filter(|l| keep(l))
                .map(|l| match l {
                    Line::Same(t) | Line::Old(t) | Line::New(t) => *t,
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(side(|l| !matches!(l, Line::New(_))), old);
        assert_eq!(side(|l| !matches!(l, Line::Old(_))), new);
        assert_eq!(all.iter().filter(|l| matches!(l, Line::Same(_))).count(), 4);
    }

    #[test]
    fn functions_are_compared_by_name() {
        let named =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(n, t)| ((*n).to_owned(), (*t).to_owned())).collect::<Vec<_>>();
        let before = named(&[("delta.0", "x"), ("delta.1", "x"), ("step", "call 0"), ("head", "h")]);
        let after = named(&[("delta", "x"), ("step", "call"), ("head", "h")]);
        let text = functions(&before, &after);
        assert!(
            text.starts_with(
                "- 2 functions are gone: @delta.0 @delta.1\n@@ @delta is new\n+ x\n@@ @step\n- call 0\n+ call\n"
            ),
            "{text}"
        );
        assert!(text.ends_with("1 functions are unchanged\n"));
    }
}
