//! Kernel IR: its text and its verifier.

use nextc_ir::kernel::parse::{ParseError, kernel as parse};
use nextc_ir::kernel::print::kernel as print;
use nextc_ir::kernel::verify::{KernelError, verify_kernel};

use super::{Case, Checked, text};

/// `test text`.
pub fn check_text(case: &Case) -> Checked {
    case.only(&[])?;
    case.compare_body(&print(&parse(&case.body_in_place()).map_err(text)?))
}

/// `test verify`.
pub fn check_verify(case: &Case) -> Checked {
    case.only(&[])?;
    let body = case.body_in_place();
    let errors = match parse(&body) {
        Err(error) => vec![parse_error(&error)],
        Ok(kernel) => {
            let errors = verify_kernel(&kernel).err().unwrap_or_default();
            errors.into_iter().map(|e| (place(&body, &e), format!("{}: {}", e.place, e.broken))).collect()
        }
    };
    case.compare_errors(&errors)
}

/// The line, and the message without it.
fn parse_error(error: &ParseError) -> (usize, String) {
    let (ParseError::Syntax { line, .. }
    | ParseError::Op { line, .. }
    | ParseError::Name { line, .. }
    | ParseError::Depth { line }) = error;
    let message = error.to_string();
    let message = message.strip_prefix(&format!("line {line}: ")).unwrap_or(&message).to_owned();
    (*line, message)
}

/// The line of the statement that an error speaks of, or the head of the kernel.
fn place(body: &str, error: &KernelError) -> usize {
    let statement = error.place.trim().trim_matches('`');
    let code = |l: &str| l.split(';').next().unwrap_or_default().trim().to_owned();
    let at = body.lines().position(|l| !statement.is_empty() && code(l).starts_with(statement));
    let head = || body.lines().position(|l| l.starts_with("kernel "));
    at.or_else(head).map_or(1, |i| i + 1)
}
