//! The interrupt controllers of a PC as KVM models them: the 8259 pair, the I/O APIC, the local APIC
//! (xAPIC and x2APIC), the 8254 timer, GSI routing and MSI. Specified by the Intel SDM volume 3,
//! chapter "Advanced Programmable Interrupt Controller (APIC)", the 8259A, 82093AA and 8254 data
//! sheets, and the KVM API document; where these leave room, the behaviour is Linux's
//! `arch/x86/kvm`.
//!
//! How the pieces hang together:
//!
//! - [`IrqChip`] is one a VM: it owns the PIC pair, the I/O APIC, the PIT, the GSI routing table and
//!   the list of local APICs. Everything that crosses from one device to another (a GSI level, an MSI,
//!   an IPI, an EOI broadcast, an acknowledgement) goes through it.
//! - [`Lapic`] is one a vCPU, shared by the vCPU's own thread, the other vCPUs' threads (IPIs) and the
//!   VM's event thread (timers, irqfds). Its registers are atomics: setting a bit in the IRR is one
//!   `fetch_or`; only the timer has a lock.
//! - [`VcpuEvents`] and [`VmEvents`] are what the embedder implements. Their methods are called from
//!   whichever thread caused the event, some of them with the I/O APIC locked, so they must only set
//!   request bits, wake threads and read clocks, and never call back into this crate. The exception is
//!   [`VmEvents::gsi_acked`], which is called with nothing locked and may call
//!   [`IrqChip::set_irq`].
//!
//! Time is nanoseconds of one clock of the embedder's choice that never goes back; a deadline is in
//! the same clock. `timer_armed` tells of every change of a deadline; whoever sleeps until it calls
//! `timer_expired`, from any thread, early and late calls being harmless. Of a local APIC that only
//! tells the vCPU, whose own thread then calls [`Lapic::deliver_timer`].

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod apic_bus;
mod chip;
mod events;
mod interrupt;
mod ioapic;
mod lapic;
mod pic;
mod pit;
mod routing;
mod sync;

#[cfg(test)]
mod tests;

pub use chip::{ChipCounters, ChipMode, IrqChip};
pub use events::{VcpuEvents, VmEvents};
pub use lapic::{CpuFeatures, Lapic, LapicConfig, LapicCounters, LvtEntry};
pub use routing::MAX_IRQ_ROUTES;

/// `irq_source_id` of `KVM_IRQ_LINE` and plain irqfds.
pub const USERSPACE_IRQ_SOURCE_ID: u32 = 0;
/// `irq_source_id` of irqfds with a resample eventfd.
pub const RESAMPLE_IRQ_SOURCE_ID: u32 = 1;
/// `irq_source_id` of the PIT.
const PIT_IRQ_SOURCE_ID: u32 = 2;

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The guest's access is not one the register has: #GP(0).
    #[error("access to the APIC that raises #GP")]
    GeneralProtection,
    /// The state or routing table given is not one the device can be in: EINVAL.
    #[error("state that the device cannot be in")]
    Invalid,
    /// The device is not in this irqchip: ENXIO.
    #[error("no such device in this irqchip")]
    NoDevice,
    /// It exists already: EEXIST.
    #[error("exists already")]
    Exists,
}
