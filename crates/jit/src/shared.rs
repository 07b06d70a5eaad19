//! What translated code and the translator share, one a processor. While translated code runs, the
//! host's GS base points here.

use std::sync::atomic::AtomicU32;

use anykvm_cpu::state::CpuState;

use crate::control::Offers;
use crate::privilege::Side;
use crate::sharing::GROUPS;
use crate::views::Jump;
use crate::window::Windows;
use crate::x87::X87;

/// See the module's description; [`Slot`] has the fields' offsets.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Shared {
    /// Guest R10, R11 and R15.
    pub spilled: [u64; 3],
    /// The current view's number.
    pub view: u64,
    /// The page of RIP: translations are made for a host page and may run at several addresses.
    pub page: u64,
    /// The status flags when translated code is entered or left: AH as LAHF makes it, AL is OF.
    pub flags: u64,
    /// The same inside a block, where a memory check would destroy them.
    pub kept_flags: u64,
    /// RAX, while LAHF or SAHF needs it.
    pub rax: u64,
    /// An operand of the last flag-setting instruction, to carry it out again.
    pub operand: u64,
    /// A branch's target.
    pub target: u64,
    /// The target's entry point.
    pub entry: u64,
    /// Number of the exit taken.
    pub exit: u64,
    /// Address-space number: low bits of every TLB tag.
    pub asn: u64,
    /// Bases of the guest's FS and GS.
    pub fs_base: u64,
    /// See `fs_base`.
    pub gs_base: u64,
    /// Level-1 entries of the TLB for the running code's privilege.
    pub level1: u64,
    /// The processor's state.
    pub state: *mut CpuState,
    /// Zero when the processor is wanted in the run loop.
    pub go: *const AtomicU32,
    /// The current view's table ([`crate::views`]).
    pub jumps: *const Jump,
    /// Instructions executed by translated code; with a bound, how many it may still execute.
    pub instructions: u64,
    /// Not zero while the XMM, YMM and AVX-512 registers are in the host's.
    pub live: [u64; 3],
    /// Not zero if translated code may use them.
    pub allow: [u64; 3],
    /// The host's MXCSR, while the guest's is in force.
    pub host_mxcsr: u64,
    /// The function that loads the vector registers the entry point expects, or one that does nothing.
    pub load: u64,
    /// `asn`, with bit 63 set, which no tag has with an address of 32 bits, if 32-bit code may not use its
    /// FS without looking at the segment's limit and rights; then for GS.
    pub whole_asn: [u64; 2],
    /// What a probe of the TLB is given and saves.
    pub probe: [u64; 4],
    /// What a refill of level 1 saves.
    pub refill: [u64; 2],
    /// The TLB's entries behind level 1 for the running code's privilege, and the counts they must rest on.
    pub ready: [u64; 2],
    /// Not zero if nothing was waiting for RFLAGS.IF to be set when translated code was entered.
    pub quiet: u64,
    /// The interrupt shadow of the last STI.
    pub shadow: u64,
    /// What changes with the privilege level: for CPL 0, and for CPL 3.
    pub sides: [Side; 2],
    /// What a change of the privilege level saves.
    pub change: [u64; 4],
    /// What a register will hold when a loop has to be checked again ([`crate::loops`]).
    pub loop_end: u64,
    /// Addends that accesses of the running block share.
    pub kept: [u64; GROUPS],
    /// See [`crate::window`].
    pub windows: Windows,
    /// See [`crate::x87`].
    pub x87: X87,
    /// See [`crate::control`].
    pub offers: Offers,
}

/// Offsets in [`Shared`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
#[allow(missing_docs)]
pub enum Slot {
    Spilled0 = 0,
    Spilled1 = 8,
    Spilled2 = 16,
    View = 24,
    Page = 32,
    Flags = 40,
    KeptFlags = 48,
    Rax = 56,
    Operand = 64,
    Target = 72,
    Entry = 80,
    Exit = 88,
    Asn = 96,
    FsBase = 104,
    GsBase = 112,
    Level1 = 120,
    State = 128,
    Go = 136,
    Jumps = 144,
    Instructions = 152,
    LiveSse = 160,
    LiveAvx = 168,
    LiveAvx512 = 176,
    AllowSse = 184,
    AllowAvx = 192,
    AllowAvx512 = 200,
    HostMxcsr = 208,
    Load = 216,
    WholeFsAsn = 224,
    WholeGsAsn = 232,
    Probe0 = 240,
    Probe1 = 248,
    Probe2 = 256,
    Probe3 = 264,
    Refill0 = 272,
    Refill1 = 280,
    Ready = 288,
    ReadyCounts = 296,
    Quiet = 304,
    Shadow = 312,
    Sides = 320,
    Change0 = 384,
    Change1 = 392,
    Change2 = 400,
    Change3 = 408,
    LoopEnd = 416,
}

const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(Shared, page) == Slot::Page as usize);
    assert!(offset_of!(Shared, operand) == Slot::Operand as usize);
    assert!(offset_of!(Shared, exit) == Slot::Exit as usize);
    assert!(offset_of!(Shared, level1) == Slot::Level1 as usize);
    assert!(offset_of!(Shared, instructions) == Slot::Instructions as usize);
    assert!(offset_of!(Shared, live) == Slot::LiveSse as usize);
    assert!(offset_of!(Shared, whole_asn) == Slot::WholeFsAsn as usize);
    assert!(offset_of!(Shared, load) == Slot::Load as usize);
    assert!(offset_of!(Shared, probe) == Slot::Probe0 as usize);
    assert!(offset_of!(Shared, refill) == Slot::Refill0 as usize);
    assert!(offset_of!(Shared, ready) == Slot::Ready as usize);
    assert!(offset_of!(Shared, loop_end) == Slot::LoopEnd as usize);
    assert!(offset_of!(Shared, view) == Slot::View as usize);
    assert!(offset_of!(Shared, quiet) == Slot::Quiet as usize);
    assert!(offset_of!(Shared, sides) == Slot::Sides as usize);
    assert!(offset_of!(Shared, change) == Slot::Change0 as usize);
    assert!(offset_of!(Shared, jumps) == Slot::Jumps as usize);
};

impl Shared {
    /// A zeroed area.
    pub fn new() -> Box<Self> {
        // SAFETY: all fields are integers and raw pointers, for which zero is a value; the layout is
        // the type's own.
        unsafe {
            let layout = std::alloc::Layout::new::<Self>();
            let p = std::alloc::alloc_zeroed(layout).cast::<Self>();
            if p.is_null() {
                std::alloc::handle_alloc_error(layout);
            }
            Box::from_raw(p)
        }
    }
}
