//! Why KVM_RUN returned, as the public API shows it. Names and shapes are those of the kvm-ioctls
//! crate.

use anykvm_abi::{
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN,
    kvm_debug_exit_arch,
};

/// A hypercall that the caller completes (`KVM_EXIT_HYPERCALL`).
#[derive(Debug)]
pub struct HypercallExit<'a> {
    /// The hypercall's number.
    pub nr: u64,
    /// Its arguments.
    pub args: [u64; 6],
    /// What the guest gets as its result.
    pub ret: &'a mut u64,
    /// Whether it was made in 64-bit mode.
    pub longmode: u32,
}

/// An RDMSR that the caller answers (`KVM_EXIT_X86_RDMSR`).
#[derive(Debug)]
pub struct ReadMsrExit<'a> {
    /// Set to 1 to fail the access: the guest gets #GP.
    pub error: &'a mut u8,
    /// Why the caller is asked.
    pub reason: MsrExitReason,
    /// The MSR.
    pub index: u32,
    /// What the guest reads.
    pub data: &'a mut u64,
}

/// A WRMSR that the caller decides on (`KVM_EXIT_X86_WRMSR`).
#[derive(Debug)]
pub struct WriteMsrExit<'a> {
    /// Set to 1 to fail the access: the guest gets #GP.
    pub error: &'a mut u8,
    /// Why the caller is asked.
    pub reason: MsrExitReason,
    /// The MSR.
    pub index: u32,
    /// What the guest writes.
    pub data: u64,
}

bitflags::bitflags! {
    /// Why an MSR access ends KVM_RUN; also what KVM_CAP_X86_USER_SPACE_MSR asks for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct MsrExitReason: u32 {
        /// There is no such MSR.
        const Unknown = KVM_MSR_EXIT_REASON_UNKNOWN;
        /// The MSR does not have this access or value.
        const Inval = KVM_MSR_EXIT_REASON_INVAL;
        /// The filter forbids it.
        const Filter = KVM_MSR_EXIT_REASON_FILTER;
    }
}

/// Why KVM_RUN returned (`KVM_EXIT_*`).
#[derive(Debug)]
pub enum VcpuExit<'a> {
    /// The guest wrote this data to a port.
    IoOut(u16, &'a [u8]),
    /// The guest reads from a port: the slice is to be filled before the next run.
    IoIn(u16, &'a mut [u8]),
    /// The guest reads device memory: the slice is to be filled before the next run.
    MmioRead(u64, &'a mut [u8]),
    /// The guest wrote this data to device memory.
    MmioWrite(u64, &'a [u8]),
    /// `KVM_EXIT_UNKNOWN`.
    Unknown,
    /// `KVM_EXIT_EXCEPTION`.
    Exception,
    /// `KVM_EXIT_HYPERCALL`.
    Hypercall(HypercallExit<'a>),
    /// `KVM_EXIT_DEBUG`: a breakpoint or step of [`crate::VcpuFd::set_guest_debug`].
    Debug(kvm_debug_exit_arch),
    /// `KVM_EXIT_HLT`.
    Hlt,
    /// `KVM_EXIT_IRQ_WINDOW_OPEN`.
    IrqWindowOpen,
    /// `KVM_EXIT_SHUTDOWN`: a triple fault.
    Shutdown,
    /// `KVM_EXIT_FAIL_ENTRY`: reason and processor.
    FailEntry(u64, u32),
    /// `KVM_EXIT_INTR`.
    Intr,
    /// `KVM_EXIT_SET_TPR`.
    SetTpr,
    /// `KVM_EXIT_TPR_ACCESS`.
    TprAccess,
    /// `KVM_EXIT_NMI`.
    Nmi,
    /// `KVM_EXIT_INTERNAL_ERROR`: [`crate::VcpuFd::dump`] tells more.
    InternalError,
    /// `KVM_EXIT_IOAPIC_EOI`: the vector.
    IoapicEoi(u8),
    /// `KVM_EXIT_X86_RDMSR`.
    X86Rdmsr(ReadMsrExit<'a>),
    /// `KVM_EXIT_X86_WRMSR`.
    X86Wrmsr(WriteMsrExit<'a>),
    /// An exit reason this enumeration does not name.
    Unsupported(u32),
}
