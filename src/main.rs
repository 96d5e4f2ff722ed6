//! The `nextc` command.
fn main() {}
