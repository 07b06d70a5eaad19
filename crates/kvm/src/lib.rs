//! KVM in user space: the objects behind the file descriptors of the KVM API, with a software
//! processor where KVM has the hardware's.
//!
//! [`Object`] is the KVM API as a VMM sees it: ioctl numbers, structures, errno values.

#![deny(unsafe_code)]
#![warn(missing_docs)]

mod capability;
pub mod clock;
mod coalesced;
mod device;
mod dirty_log;
mod dispatch;
mod error;
mod event_thread;
mod eventfd;
mod io_bus;
mod ioeventfd;
mod irq;
mod irqfd;
mod kick;
mod memory;
mod memory_alias;
mod msr_filter;
mod object;
mod stats;
mod system;
mod user;
mod vcpu;
mod vm;
mod xen;

pub use capability::EnabledCapabilities;
pub use device::Device;
pub use error::{Errno, Result};
pub use event_thread::Deadline;
pub use kick::Kick;
pub use object::{Object, Reply};
pub use stats::{Statistic, StatsFile, VmStat};
pub use system::System;
pub use user::{Efault, NoMemory, UserMemory};
pub use vcpu::Vcpu;
pub use vm::Vm;
