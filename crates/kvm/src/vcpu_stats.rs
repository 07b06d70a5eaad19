//! The statistics of a vCPU (KVM_GET_STATS_FD): exits by reason, halts, and the processor's own
//! counters. The names are KVM's where KVM has them. The processor's are brought up to date when KVM_RUN
//! returns and when the vCPU halts.

use anykvm_cpu::Cpu;

use crate::stats::{Statistic, StatsFile};

macro_rules! vcpu_statistics {
    ($($(#[$doc:meta])* $name:ident = $kind:ident $text:literal;)*) => {
        /// The statistics of a vCPU.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum VcpuStat {
            $($(#[$doc])* $name,)*
        }
        /// Their descriptors, in the same order.
        pub(crate) const VCPU_STATISTICS: &[Statistic] = &[$(Statistic::$kind($text)),*];
    };
}

vcpu_statistics! {
    /// Returns of KVM_RUN.
    Exits = counter "exits";
    /// KVM_EXIT_IO.
    IoExits = counter "io_exits";
    /// KVM_EXIT_MMIO.
    MmioExits = counter "mmio_exits";
    /// KVM_RUN ended with EINTR.
    SignalExits = counter "signal_exits";
    /// KVM_EXIT_IRQ_WINDOW_OPEN.
    IrqWindowExits = counter "irq_window_exits";
    /// HLT.
    HaltExits = counter "halt_exits";
    /// An event came while polling in HLT.
    HaltSuccessfulPoll = counter "halt_successful_poll";
    /// Sleeps in HLT.
    HaltSleeps = counter "halt_sleeps";
    /// The guest was told that the vCPU does not run ([`crate::steal_time`]).
    PreemptionReported = counter "preemption_reported";
    /// TLB flushes that another vCPU has left to this one because of that.
    TlbFlushes = counter "tlb_flush";
    /// KVM_EXIT_INTERNAL_ERROR.
    InternalErrors = counter "internal_errors";
    /// Instructions completed.
    Instructions = counter "instructions";
    /// Blocks of decoded instructions entered.
    Blocks = counter "blocks";
    /// Blocks decoded.
    DecodedBlocks = counter "decoded_blocks";
    /// Events delivered through the IDT.
    EventsDelivered = counter "events_delivered";
    /// Blocks translated.
    JitBlocks = counter "jit_blocks";
    /// Guest instructions in them.
    JitBlockInstructions = counter "jit_block_instructions";
    /// Time spent translating.
    JitTranslationTime = nanoseconds "jit_translation_ns";
    /// Instructions executed by translated code. 0 unless they are counted
    /// ([`crate::TranslationMode::Count`]); then `instructions` has them, too.
    JitTranslatedInstructions = counter "jit_translated_instructions";
    /// Instructions executed by the interpreter where there is a translator.
    JitInterpretedInstructions = counter "jit_interpreted_instructions";
    /// Those of them that translated code was left for.
    JitLeft = counter "jit_left_instructions";
    /// Times translated code was entered from the run loop.
    JitEntries = counter "jit_entries";
    /// Translations dropped because the guest's code changed.
    JitDropped = counter "jit_dropped_blocks";
    /// Times all translations were dropped because there was no room for one more.
    JitFlushes = counter "jit_flushes";
    /// Instructions of translated code that were compared with the interpreter
    /// ([`crate::TranslationMode::Lockstep`]).
    JitCompared = counter "jit_compared_instructions";
    /// Differences that did not come again: a device, or another thread of the VMM, has written to memory.
    JitDisturbed = counter "jit_disturbed_stretches";
    /// Translated code there is now.
    JitCodeBytes = bytes "jit_code_bytes";
    /// Memory that the processor holds beside guest RAM: decoded blocks, TLB, translations.
    EngineMemory = bytes "engine_memory_bytes";
}

/// Puts the processor's counters into the file.
pub(crate) fn publish(stats: &StatsFile, cpu: &Cpu) {
    let set = |stat: VcpuStat, value: u64| stats.set(stat as usize, value);
    let counters = &cpu.counters;
    let jit = cpu.translator_stats();
    let translated = jit.map_or(0, |jit| jit.executed);
    set(VcpuStat::Instructions, counters.instructions + translated);
    set(VcpuStat::Blocks, counters.blocks);
    set(VcpuStat::DecodedBlocks, counters.decoded);
    set(VcpuStat::EventsDelivered, counters.events);
    set(VcpuStat::EngineMemory, cpu.memory_bytes());
    let Some(jit) = jit else { return };
    set(VcpuStat::JitBlocks, jit.blocks);
    set(VcpuStat::JitBlockInstructions, jit.block_instructions);
    set(VcpuStat::JitTranslationTime, jit.translation_ns);
    set(VcpuStat::JitTranslatedInstructions, translated);
    set(VcpuStat::JitInterpretedInstructions, counters.instructions);
    set(VcpuStat::JitLeft, jit.left);
    set(VcpuStat::JitEntries, jit.entries);
    set(VcpuStat::JitDropped, jit.dropped);
    set(VcpuStat::JitFlushes, jit.flushes);
    set(VcpuStat::JitCompared, jit.compared);
    set(VcpuStat::JitDisturbed, jit.disturbed);
    set(VcpuStat::JitCodeBytes, jit.code_bytes);
}
