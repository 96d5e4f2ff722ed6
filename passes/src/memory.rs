//! stub
use nextc_ir::{graph::Function, schedule::ArenaPlan};
/// stub
pub fn frame(_: &Function) -> ArenaPlan {
    todo!()
}
