//! Event state in KVM's own terms (`struct kvm_vcpu_events`; SDM Vol. 3, ch. 6 and 35): exceptions,
//! interrupts, NMI and SMI pending and injected, the interrupt shadow, the multiprocessing state.
//!
//! *Pending*: raised, not yet seen by the delivery machinery; a payload (CR2, DR6) is not yet in its
//! register. *Injected*: delivery has begun; if it was cut short it starts again at the next entry.

/// Vectors with a meaning of their own (SDM Vol. 3, table 6-1).
pub mod vector {
    #![allow(missing_docs)]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// An exception raised or being delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ExceptionEvent {
    /// Raised; delivery has not begun.
    pub pending: bool,
    /// Delivery has begun.
    pub injected: bool,
    /// 0-31.
    pub vector: u8,
    /// Whether `error_code` is pushed.
    pub has_error_code: bool,
    /// The error code.
    pub error_code: u32,
    /// Whether `payload` is still to be moved into its register.
    pub has_payload: bool,
    /// #PF: CR2. #DB: the DR6 bits (active high).
    pub payload: u64,
}

/// An external interrupt (or software interrupt) being delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct InterruptEvent {
    /// Delivery has begun (the vector was taken from the controller).
    pub injected: bool,
    /// The vector.
    pub vector: u8,
    /// INT n, not an external interrupt.
    pub soft: bool,
}

/// `KVM_MP_STATE_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum MpState {
    /// Running.
    #[default]
    Runnable = 0,
    /// An application processor that has not received INIT.
    Uninitialized = 1,
    /// Has received INIT, waits for SIPI.
    InitReceived = 2,
    /// In HLT, waiting for an interrupt.
    Halted = 3,
    /// Has received SIPI, about to start.
    SipiReceived = 4,
}

/// Interrupt shadow: MOV SS / POP SS (`KVM_X86_SHADOW_INT_MOV_SS`).
pub const SHADOW_MOV_SS: u8 = 1;
/// Interrupt shadow: STI (`KVM_X86_SHADOW_INT_STI`).
pub const SHADOW_STI: u8 = 2;

/// All event state of one processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Events {
    /// The exception, if one is pending or injected.
    pub exception: ExceptionEvent,
    /// The interrupt, if one is injected.
    pub interrupt: InterruptEvent,
    /// NMIs waiting (at most 2: one being handled and one more are remembered).
    pub nmi_pending: u8,
    /// An NMI's delivery has begun.
    pub nmi_injected: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// An SMI waits.
    pub smi_pending: bool,
    /// In system-management mode.
    pub smm: bool,
    /// NMIs were blocked when SMM was entered.
    pub smm_inside_nmi: bool,
    /// INIT arrived while it was blocked (SMM).
    pub latched_init: bool,
    /// A triple fault happened and waits to be reported.
    pub triple_fault: bool,
    /// Interrupt shadow of the last instruction: [`SHADOW_MOV_SS`], [`SHADOW_STI`].
    pub shadow: u8,
    /// Multiprocessing state.
    pub mp_state: MpState,
    /// Vector of the last SIPI.
    pub sipi_vector: u8,
}
