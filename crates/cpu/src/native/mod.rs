//! What runs on the host processor itself.

pub mod alu;
pub mod equal;
