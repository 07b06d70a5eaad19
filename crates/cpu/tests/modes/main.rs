//! System behaviour mode by mode, as tables of cases. Each table names the manual section it is
//! written from: SDM is Intel's, APM is AMD's.

#[path = "../harness/mod.rs"]
mod harness;

mod call_gates;
mod control;
mod delivery;
mod events;
mod fast_calls;
mod gates;
mod iret;
mod limits;
mod loads;
mod machine;
mod opcodes;
mod prefixes;
mod privilege;
mod quirks;
mod sizes;
mod smm;
mod task_faults;
mod tasks;
mod transfers;
mod v86;
