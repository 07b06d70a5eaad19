//! One x86 processor in software: state, decoding, interpreter, MMU and TLB, events, debug
//! registers, CPUID and MSRs.
//!
//! The crate knows nothing of file descriptors, threads or KVM. A [`Cpu`] is given guest memory
//! ([`memory::GuestMemory`]) and a [`Machine`] to run against, and [`Cpu::run`] returns an
//! [`Exit`]. Section references are to the Intel SDM unless they say AMD APM.

pub mod assist;
pub mod block;
mod control;
mod counted;
mod cpu;
pub mod cpuid;
pub mod crregs;
pub mod debug;
pub mod decode;
mod descriptor;
mod drregs;
pub mod dump;
mod eflags;
pub mod events;
pub mod exception;
mod exec;
pub mod exit;
mod far;
mod fetch;
mod hypercall;
pub mod interp;
mod interrupt;
pub mod io;
mod iret;
pub mod lockstep;
pub mod machine;
pub mod memory;
pub mod mmu;
pub mod mode;
pub mod msr;
mod native;
mod pkru;
pub mod requests;
mod segment;
mod smm;
mod stack;
pub mod state;
pub(crate) mod step;
pub mod syscall;
mod tables;
mod task;
pub mod trace;
pub mod translator;
pub mod turns;
pub mod width;

pub use counted::CountedTime;
pub use cpu::{Cpu, GuestDebug, host_tsc};
pub use decode::Insn;
pub use exit::{Exit, Fault, Stop};
pub use machine::Machine;
pub use mode::Mode;
pub use requests::Requests;
pub use state::CpuState;
