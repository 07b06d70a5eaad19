//! What a stub sees: the guest's registers it needs, its memory operand and the host's state to
//! put back, at fixed offsets from the one register (RDI) that points here.

use std::mem::offset_of;

use super::stack::MAX_STORES;

/// Vector registers one instruction can use (four operands, or three and XMM0).
pub const VECTORS: usize = 4;
/// General registers one instruction can use.
pub const GPRS: usize = 4;

/// Opmask registers one instruction can use.
pub const OPMASKS: usize = 3;

/// An FXSAVE image.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Image(pub [u8; 512]);

/// The exchange area of one processor.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Frame {
    /// The memory operand, before or after the instruction.
    pub memory: [u8; 64],
    /// Vector registers, a ZMM register's room each, in quarters.
    pub vectors: [[[u8; 16]; 4]; VECTORS],
    /// General registers.
    pub gprs: [u64; GPRS],
    /// Opmask registers.
    pub opmasks: [u64; OPMASKS],
    /// Status flags, in and out, as SAHF and LAHF have them in AX, and OF in bit 0.
    pub flags: u32,
    /// MXCSR to run with; afterwards, what the instruction left in it.
    pub mxcsr: u32,
    /// Where the stub keeps the host's MXCSR.
    pub host_mxcsr: u32,
    /// Where the stub keeps the host's x87 control word.
    pub host_fcw: u32,
    /// x87 control word, for the short way.
    pub fcw: u32,
    /// x87 status word after the short way.
    pub fsw: u32,
    /// x87 registers, for the short way: ST0 first.
    pub st: [[u8; 16]; MAX_STORES],
    /// x87 and MMX state, in and out.
    pub x87: Image,
}

impl Default for Frame {
    fn default() -> Self {
        Self {
            memory: [0; 64],
            vectors: [[[0; 16]; 4]; VECTORS],
            gprs: [0; GPRS],
            opmasks: [0; OPMASKS],
            flags: 0,
            mxcsr: 0,
            host_mxcsr: 0,
            host_fcw: 0,
            fcw: 0,
            fsw: 0,
            st: [[0; 16]; MAX_STORES],
            x87: Image([0; 512]),
        }
    }
}

impl Frame {
    /// Sets the status flags to run with.
    #[inline(always)]
    pub fn set_flags(&mut self, rflags: u64) {
        self.flags = (rflags as u32 & 0xff) << 8 | (rflags >> 11 & 1) as u32;
    }
    /// The status flags after the instruction.
    #[inline(always)]
    pub fn flags(&self) -> u64 {
        u64::from(self.flags >> 8 & 0xff) | u64::from(self.flags & 1) << 11
    }
}

/// Offsets for generated code.
pub mod offset {
    use super::{Frame, offset_of};

    /// `Frame::memory`: the memory operand's address is the frame's.
    pub const MEMORY: i64 = offset_of!(Frame, memory) as i64;
    /// `Frame::flags`.
    pub const FLAGS: i64 = offset_of!(Frame, flags) as i64;
    /// `Frame::mxcsr`.
    pub const MXCSR: i64 = offset_of!(Frame, mxcsr) as i64;
    /// `Frame::host_mxcsr`.
    pub const HOST_MXCSR: i64 = offset_of!(Frame, host_mxcsr) as i64;
    /// `Frame::host_fcw`.
    pub const HOST_FCW: i64 = offset_of!(Frame, host_fcw) as i64;
    /// `Frame::x87`.
    pub const X87: i64 = offset_of!(Frame, x87) as i64;

    /// `Frame::fcw`.
    pub const FCW: i64 = offset_of!(Frame, fcw) as i64;
    /// `Frame::fsw`.
    pub const FSW: i64 = offset_of!(Frame, fsw) as i64;

    /// A slot of `Frame::st`.
    pub fn st(slot: u8) -> i64 {
        offset_of!(Frame, st) as i64 + i64::from(slot) * 16
    }
    /// A slot of `Frame::vectors`.
    pub fn vector(slot: usize) -> i64 {
        (offset_of!(Frame, vectors) + slot * 64) as i64
    }
    /// A slot of `Frame::gprs`.
    pub fn gpr(slot: usize) -> i64 {
        (offset_of!(Frame, gprs) + slot * 8) as i64
    }
    /// A slot of `Frame::opmasks`.
    pub fn opmask(slot: usize) -> i64 {
        (offset_of!(Frame, opmasks) + slot * 8) as i64
    }
}
