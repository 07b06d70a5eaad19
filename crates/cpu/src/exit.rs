//! Why the processor stops: a fault inside an instruction ([`Fault`], [`Stop`]) and the reasons
//! [`crate::Cpu::run`] returns ([`Exit`]).

/// An exception raised by an instruction before any of its effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Vector, 0-31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// #PF: the faulting linear address. #DB: DR6 bits. Otherwise 0.
    pub payload: u64,
    /// The exception is a trap: RIP points behind the instruction, whose effects stay.
    pub trap: bool,
}

/// How an instruction handler ends when it does not simply complete. One byte, so that
/// `Result<(), Stop>` is one register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stop {
    /// A fault is in `Cpu::fault`; nothing of the instruction has happened.
    Fault,
    /// An exit is in `Cpu::exit`; nothing of the instruction has happened, and it is executed again
    /// (from its decoded form, with the data supplied) on re-entry.
    Exit,
    /// The instruction is not implemented: an emulation failure.
    Unimplemented,
}

/// Direction of port I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// IN, INS.
    In,
    /// OUT, OUTS.
    Out,
}

/// Why an emulation failure happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InternalError {
    /// An instruction the processor does not implement (or could not decode: see `bytes`).
    Emulation {
        /// RIP of the instruction.
        rip: u64,
        /// Its bytes, as many as could be read.
        bytes: [u8; 15],
        /// How many of `bytes` are valid.
        len: u8,
    },
    /// Translated code differs from the interpreter, which [`crate::lockstep`] has found. The state is that
    /// before the stretch.
    Lockstep {
        /// RIP of the wrong instruction, or if that is not known where the stretch began.
        rip: u64,
    },
    /// Event delivery met memory that is not RAM.
    DeliveryEvent {
        /// The vector being delivered.
        vector: u8,
    },
}

/// Why [`crate::Cpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Port I/O no in-kernel device took: `Cpu::io` holds the data (out) or wants it (in).
    Io {
        /// In or out.
        direction: Direction,
        /// Bytes of one item: 1, 2 or 4.
        size: u8,
        /// Port number.
        port: u16,
        /// Items (string forms).
        count: u32,
    },
    /// A load from no memslot and no in-kernel device. Answer with `Cpu::complete_mmio_read`.
    MmioRead {
        /// Guest-physical address.
        gpa: u64,
        /// 1 to 8 bytes.
        len: u8,
    },
    /// A store to no memslot and no in-kernel device; it has retired.
    MmioWrite {
        /// Guest-physical address.
        gpa: u64,
        /// 1 to 8 bytes.
        len: u8,
        /// The data, in the first `len` bytes.
        data: [u8; 8],
    },
    /// HLT (or MWAIT) was executed; RIP is past it and `mp_state` is still `Runnable`.
    Hlt,
    /// A request bit wants the caller's attention ([`crate::requests`]).
    Request,
    /// Triple fault.
    Shutdown,
    /// Guest debugging (KVM_SET_GUEST_DEBUG): a #DB or #BP meant for the debugger.
    Debug {
        /// 1 (#DB) or 3 (#BP).
        vector: u8,
        /// DR6 at the time.
        dr6: u64,
        /// DR7 at the time.
        dr7: u64,
    },
    /// RDMSR that user space wants to see (KVM_CAP_X86_USER_SPACE_MSR).
    MsrRead {
        /// MSR number.
        index: u32,
        /// `KVM_MSR_EXIT_REASON_*`.
        reason: u32,
    },
    /// WRMSR that user space wants to see.
    MsrWrite {
        /// MSR number.
        index: u32,
        /// The value.
        value: u64,
        /// `KVM_MSR_EXIT_REASON_*`.
        reason: u32,
    },
    /// VMCALL/VMMCALL that user space handles.
    Hypercall {
        /// Hypercall number.
        nr: u64,
        /// RBX, RCX, RDX, RSI and, from long mode, RDI.
        args: [u64; 5],
    },
    /// A CR8 write that user space must see (no in-kernel APIC).
    SetTpr,
    /// EOI of a level-triggered vector that the VMM's IOAPIC handles (split irqchip).
    IoapicEoi {
        /// The vector.
        vector: u8,
    },
    /// The interrupt window that was asked for is open.
    IrqWindowOpen,
    /// The processor could not go on.
    InternalError(InternalError),
    /// Guest RAM that a memslot names is not mapped in the host process.
    BadMemory,
    /// The instruction budget of [`crate::Cpu::run`] is used up.
    Budget,
}
