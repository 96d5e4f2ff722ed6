//! How things are shown to people.

use std::io::{IsTerminal, Write};

/// Writes to standard output.
/// # Errors
/// What the system says; a closed pipe is told apart by `main`.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Says what is being done, where somebody is watching.
pub fn progress(text: &str) {
    if std::io::stderr().is_terminal() {
        eprintln!("{text}");
    }
}

/// Warns.
pub fn warn(text: &dyn std::fmt::Display) {
    let prefix = if std::io::stderr().is_terminal() { "\x1b[1;33mwarning:\x1b[0m" } else { "warning:" };
    eprintln!("{prefix} {text}");
}

/// What stands before the message of an error.
pub fn error_prefix() -> &'static str {
    if std::io::stderr().is_terminal() { "\x1b[1;31merror:\x1b[0m" } else { "error:" }
}

/// A doc comment's text without the spaces and blank lines around it.
pub fn tidy(doc: &str) -> String {
    doc.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
}

/// `text` with `columns` spaces before each line.
pub fn indent(text: &str, columns: usize) -> String {
    text.lines().map(|line| format!("{:columns$}{line}", "")).collect::<Vec<_>>().join("\n")
}

/// A number of bytes with three digits: `2.95 GB`.
pub fn bytes(n: f64) -> String {
    scaled(n, 1000.0, &["B", "kB", "MB", "GB", "TB", "PB"])
}

/// A number of operations with three digits: `1.2 GFLOP`.
pub fn flops(n: f64) -> String {
    scaled(n, 1000.0, &["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"])
}

/// A time with three digits, from nanoseconds: `1.93 us`.
pub fn time_ns(n: f64) -> String {
    scaled(n, 1000.0, &["ns", "us", "ms", "s"])
}

fn scaled(mut n: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while n >= 999.5 && unit + 1 < units.len() {
        n /= step;
        unit += 1;
    }
    let digits = match n {
        n if unit == 0 || n >= 99.95 => 0,
        n if n >= 9.995 => 1,
        _ => 2,
    };
    format!("{n:.digits$} {}", units[unit])
}

/// A bar of at most `columns` cells for `share` of the whole.
pub fn bar(share: f64, columns: usize) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let cells = (share.clamp(0.0, 1.0) * columns as f64 * 8.0).round() as usize;
    format!("{}{}", "█".repeat(cells / 8), EIGHTHS[cells % 8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        for (n, expected) in [
            (0.0, "0 B"),
            (999.0, "999 B"),
            (1000.0, "1.00 kB"),
            (12_345.0, "12.3 kB"),
            (999_499.0, "999 kB"),
            (999_600.0, "1.00 MB"),
            (160e9, "160 GB"),
        ] {
            assert_eq!(bytes(n), expected);
        }
        assert_eq!(time_ns(1934.0), "1.93 us");
        assert_eq!(flops(3e9), "3.00 GFLOP");
    }

    #[test]
    fn bars_are_as_long_as_their_share() {
        assert_eq!(bar(0.0, 8), "");
        assert_eq!(bar(0.5, 8), "████");
        assert_eq!(bar(0.5 / 8.0, 8), "▌");
        assert_eq!(bar(7.0, 4), "████");
        assert_eq!(bar(f64::NAN, 4), "");
    }

    #[test]
    fn text_is_tidied() {
        assert_eq!(tidy(" a\n\n b \n"), "a\nb");
        assert_eq!(indent("a\nb", 2), "  a\n  b");
    }
}
