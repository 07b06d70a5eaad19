//! KVM in user space: the objects behind the file descriptors of the KVM API, with a software
//! processor where KVM has the hardware's.
//!
//! [`Object`] is the KVM API as a VMM sees it: ioctl numbers, structures, errno values.

#![deny(unsafe_code)]
#![warn(missing_docs)]

mod capability;
pub mod clock;
mod coalesced;
mod cpuid;
mod device;
mod dirty_log;
mod dispatch;
mod error;
mod event_thread;
mod eventfd;
mod events;
mod guest_debug;
mod halt;
mod io_bus;
mod ioeventfd;
mod irq;
mod irqfd;
mod kick;
mod lapic;
mod machine;
mod mce;
mod memory;
mod memory_alias;
mod msr;
mod msr_filter;
mod object;
mod paravirt;
mod registers;
mod run;
mod run_page;
#[cfg(test)]
mod run_tests;
mod stats;
mod system;
mod trace;
mod tsc;
mod user;
mod vcpu;
mod vcpu_exit;
mod vcpu_fd;
mod vcpu_ioctl;
mod vcpu_requests;
mod vcpu_state;
mod vcpu_stats;
mod vm;
mod xen;
mod xsave;

pub use capability::EnabledCapabilities;
pub use device::Device;
pub use error::{Errno, Result};
pub use event_thread::Deadline;
pub use kick::Kick;
pub use object::{Object, Reply};
pub use stats::{Statistic, StatsFile, VmStat};
pub use system::System;
pub use user::{Efault, NoMemory, UserMemory};
pub use vcpu::{KickHandle, Vcpu};
pub use vcpu_exit::{HypercallExit, MsrExitReason, ReadMsrExit, VcpuExit, WriteMsrExit};
pub use vcpu_fd::{SyncReg, VcpuFd};
pub use vcpu_stats::VcpuStat;
pub use vm::Vm;
