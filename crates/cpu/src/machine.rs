//! What the processor needs from the rest of the computer.
//!
//! One [`Machine`] belongs to one processor. Its methods are called on the processor's own thread
//! and must not call back into the [`crate::Cpu`]; whatever they want of it later they put into its
//! [`crate::Requests`].

use crate::counted::CountedTime;
use crate::exit::Exit;
use crate::state::CpuState;

/// Outcome of an MSR access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrResult<T> {
    /// Done.
    Done(T),
    /// #GP(0).
    Fault,
    /// The user of the API must see it: `KVM_MSR_EXIT_REASON_*`.
    UserSpace(u32),
}

/// What a hypercall does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hypercall {
    /// RAX becomes this value.
    Done(u64),
    /// User space completes it.
    Exit(Exit),
}

/// What KVM does and a processor would not, unless KVM_CAP_DISABLE_QUIRKS2 turns it off (KVM API,
/// 7.32).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quirk {
    /// MONITOR and MWAIT are never #UD at CPL 0: `KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS`.
    MwaitNeverFaults,
    /// CPUID's MONITOR flag does not follow IA32_MISC_ENABLE: `KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT`.
    MwaitOfCpuid,
    /// OUT to port 0x7E has retired when its exit is seen: `KVM_X86_QUIRK_OUT_7E_INC_RIP`.
    Out7eRetires,
    /// The other vendor's VMCALL or VMMCALL is rewritten: `KVM_X86_QUIRK_FIX_HYPERCALL_INSN`.
    FixHypercall,
}

/// Ports, device memory, the interrupt controller and the clock, as one processor sees them.
pub trait Machine: Send + Sync {
    /// An IN of `data.len()` bytes; false if no device here has that port.
    fn pio_read(&self, port: u16, data: &mut [u8]) -> bool;
    /// An OUT; false if no device here has that port.
    fn pio_write(&self, port: u16, data: &[u8]) -> bool;
    /// A load of 1 to 8 bytes outside RAM; false if no device here has that address.
    fn mmio_read(&self, state: &CpuState, gpa: u64, data: &mut [u8]) -> bool;
    /// A store of 1 to 8 bytes outside RAM; false if no device here has that address.
    fn mmio_write(&self, state: &CpuState, gpa: u64, data: &[u8]) -> bool;

    /// Whether an external interrupt could be taken now (RFLAGS.IF and the shadow apart).
    fn interrupt_pending(&self) -> bool;
    /// Takes the vector of that interrupt (interrupt acknowledge).
    fn acknowledge_interrupt(&self) -> Option<u8>;
    /// Whether the caller of the API asked to be told when an interrupt could be injected
    /// (`request_interrupt_window`).
    fn wants_interrupt_window(&self) -> bool;
    /// CR8 (the task priority, 0-15).
    fn read_cr8(&self) -> u64;
    /// Sets CR8; true if user space must see it (KVM_EXIT_SET_TPR).
    fn write_cr8(&self, value: u64) -> bool;

    /// RDMSR of an MSR the processor does not keep itself.
    fn read_msr(&self, state: &CpuState, index: u32) -> MsrResult<u64>;
    /// WRMSR of an MSR the processor does not keep itself.
    fn write_msr(&self, state: &mut CpuState, index: u32, value: u64) -> MsrResult<()>;
    /// What follows an access that the processor refuses to an MSR it keeps itself: #GP, unless user
    /// space wants to see it.
    fn msr_refused(&self, _index: u32, _write: bool) -> MsrResult<()> {
        MsrResult::Fault
    }
    /// Whether guest access to the MSR is allowed at all (KVM_X86_SET_MSR_FILTER).
    fn msr_filter(&self, index: u32, write: bool) -> MsrResult<()>;

    /// Whether a quirk of KVM's is in force.
    fn has_quirk(&self, _: Quirk) -> bool {
        true
    }

    /// VMCALL or VMMCALL: number and arguments as KVM passes them.
    fn hypercall(&self, state: &mut CpuState, nr: u64, args: [u64; 5]) -> Hypercall;

    /// The EOI of a vector the VMM's IOAPIC must hear about, if one happened since the last call.
    fn take_ioapic_eoi(&self) -> Option<u8>;

    /// Where time is counted ([`crate::Cpu::run_counted`]): so many instructions and deliveries have been
    /// done since the last call. The machine lets that much time pass, with the timers that it makes due,
    /// and says what time it is. `None` where time is the host's.
    fn count_time(&self, _done: u64) -> Option<CountedTime> {
        None
    }

    /// Takes NMI/SMI that arrived from other threads into the event state, and delivers what timers of the
    /// vCPU's own make due; called when [`crate::requests::EVENT`] was set.
    fn collect_events(&self, state: &mut CpuState);
}
