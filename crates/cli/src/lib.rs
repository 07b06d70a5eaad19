//! What the `anykvm` command is made of. Tests make machines as `anykvm boot` makes them ([`boot::guest`]).

#![deny(unsafe_code)]

pub mod boot;
mod jit;
pub mod run;
