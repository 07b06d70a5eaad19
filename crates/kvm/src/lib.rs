//! KVM in user space: the objects behind the file descriptors of the KVM API, with a software
//! processor where KVM has the hardware's.
//!
//! Two ways in: [`Kvm`], [`VmFd`] and [`VcpuFd`] are for Rust programs and have the shapes and names
//! of the kvm-ioctls crate; [`Object`] is the KVM API as a VMM sees it: ioctl numbers, structures,
//! errno values.
//!
//! A few bytes of real-mode code that add two numbers and write the sum to a port:
//!
//! ```
//! use anykvm::bindings::{kvm_regs, kvm_userspace_memory_region};
//! use anykvm::{Kvm, VcpuExit};
//!
//! let code = [
//!     0xba, 0xf8, 0x03, // mov dx, 0x3f8
//!     0x00, 0xd8, // add al, bl
//!     0x04, b'0', // add al, '0'
//!     0xee, // out dx, al
//!     0xf4, // hlt
//! ];
//!
//! let kvm = Kvm::new()?;
//! let vm = kvm.create_vm()?;
//!
//! // A page of guest memory at 0x1000, with the code in it.
//! # use anykvm_cpu::memory::mapping::Mapping;
//! let memory = Mapping::anonymous(0x1000)?;
//! memory.write_bytes(0, &code);
//! let region = kvm_userspace_memory_region {
//!     slot: 0,
//!     flags: 0,
//!     guest_phys_addr: 0x1000,
//!     memory_size: 0x1000,
//!     userspace_addr: memory.address(),
//! };
//! // SAFETY: a mapping of its own, which outlives the VM.
//! unsafe { vm.set_user_memory_region(region)? };
//!
//! let mut vcpu = vm.create_vcpu(0)?;
//! let mut sregs = vcpu.get_sregs()?;
//! sregs.cs.base = 0;
//! sregs.cs.selector = 0;
//! vcpu.set_sregs(&sregs)?;
//! vcpu.set_regs(&kvm_regs { rip: 0x1000, rax: 2, rbx: 2, rflags: 2, ..Default::default() })?;
//!
//! let mut written = Vec::new();
//! loop {
//!     match vcpu.run()? {
//!         VcpuExit::IoOut(port, data) => {
//!             assert_eq!(port, 0x3f8);
//!             written.extend_from_slice(data);
//!         }
//!         VcpuExit::Hlt => break,
//!         exit => panic!("unexpected exit: {exit:?}"),
//!     }
//! }
//! assert_eq!(written, b"4");
//! # drop((vcpu, vm));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(unsafe_code)]
#![warn(missing_docs)]

#[cfg(test)]
mod api_page;
mod cap;
mod capability;
mod capability_table;
pub mod clock;
mod clock_pages;
mod coalesced;
mod counted;
mod cpuid;
mod device;
mod device_fd;
mod dirty_log;
mod dirty_ring;
mod dispatch;
mod error;
mod event_thread;
mod eventfd;
mod events;
mod guest_debug;
mod guest_memfd;
mod halt;
mod hypercall;
mod io_bus;
mod ioctl_table;
mod ioeventfd;
mod irq;
mod irqfd;
mod kick;
mod kvm_fd;
mod lapic;
mod machine;
mod mce;
mod memory;
mod memory_alias;
mod msr;
mod msr_filter;
mod nested;
mod object;
#[cfg(test)]
mod pages;
mod paravirt;
mod paravirt_table;
#[cfg(test)]
mod processor_page;
mod registers;
mod run;
mod run_page;
#[cfg(test)]
mod run_tests;
mod stats;
mod steal_time;
mod system;
mod time;
mod trace;
mod translation;
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
mod vm_fd;
mod xen;
mod xsave;

pub use anykvm_abi as bindings;
pub use cap::Cap;
pub use capability::EnabledCapabilities;
pub use capability_table::{CAPABILITIES, Capability, CapabilityValue};
pub use device::Device;
pub use device_fd::DeviceFd;
pub use error::{Errno, Error, Result};
pub use event_thread::Deadline;
pub use guest_memfd::GuestMemfd;
pub use ioctl_table::{IOCTLS, IoctlRow, IoctlState, ObjectKind};
pub use kick::Kick;
pub use kvm_fd::Kvm;
pub use object::{Object, Reply};
pub use stats::{Statistic, StatsFile, VmStat};
pub use system::System;
pub use time::CountedTime;
pub use translation::{Translation, TranslationMode, cache_size};
pub use user::{Efault, NoMemory, UserMemory};
pub use vcpu::{KickHandle, Vcpu};
pub use vcpu_exit::{HypercallExit, MsrExitReason, ReadMsrExit, VcpuExit, WriteMsrExit};
pub use vcpu_fd::{SyncReg, VcpuFd};
pub use vcpu_stats::VcpuStat;
pub use vm::Vm;
pub use vm_fd::{
    IoEventAddress, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, NoDatamatch, VmFd,
    VmStats,
};
