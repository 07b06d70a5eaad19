//! The statistics of a vCPU (KVM_GET_STATS_FD): exits by reason, halts, and the processor's own
//! counters. The names are KVM's where KVM has them.

use crate::stats::Statistic;

macro_rules! vcpu_statistics {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// The statistics of a vCPU.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum VcpuStat {
            $($(#[$doc])* $name,)*
        }
        /// Their descriptors, in the same order.
        pub(crate) const VCPU_STATISTICS: &[Statistic] = &[$(Statistic::counter($text)),*];
    };
}

vcpu_statistics! {
    /// Returns of KVM_RUN.
    Exits = "exits";
    /// KVM_EXIT_IO.
    IoExits = "io_exits";
    /// KVM_EXIT_MMIO.
    MmioExits = "mmio_exits";
    /// KVM_RUN ended with EINTR.
    SignalExits = "signal_exits";
    /// KVM_EXIT_IRQ_WINDOW_OPEN.
    IrqWindowExits = "irq_window_exits";
    /// HLT.
    HaltExits = "halt_exits";
    /// An event came while polling in HLT.
    HaltSuccessfulPoll = "halt_successful_poll";
    /// Sleeps in HLT.
    HaltSleeps = "halt_sleeps";
    /// KVM_EXIT_INTERNAL_ERROR.
    InternalErrors = "internal_errors";
    /// Instructions completed.
    Instructions = "instructions";
    /// Blocks of decoded instructions entered.
    Blocks = "blocks";
    /// Blocks decoded.
    DecodedBlocks = "decoded_blocks";
    /// Events delivered through the IDT.
    EventsDelivered = "events_delivered";
}
