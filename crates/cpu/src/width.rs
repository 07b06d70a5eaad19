//! The four operand sizes of integer instructions, as a trait the handlers are generic over, and
//! the register file's rules for each: 8- and 16-bit writes keep the rest of the register, 32-bit
//! writes clear the upper half (SDM Vol. 1, 3.4.1.1).

use crate::state::Regs;

/// An integer operand size.
///
/// Register codes (`u8`) are those of [`crate::decode::Insn`]: the register's number for 16, 32 and
/// 64 bits; for 8 bits the byte's offset in the register file (`number * 8`, plus 1 for AH..BH).
pub trait Width:
    Copy
    + Eq
    + Ord
    + Default
    + std::fmt::Debug
    + std::fmt::LowerHex
    + std::ops::BitAnd<Output = Self>
    + std::ops::BitOr<Output = Self>
    + std::ops::BitXor<Output = Self>
    + std::ops::Not<Output = Self>
    + Send
    + Sync
    + 'static
{
    /// Size in bytes.
    const BYTES: usize;
    /// Size in bits.
    const BITS: u32 = Self::BYTES as u32 * 8;
    /// Truncates.
    fn from_u64(v: u64) -> Self;
    /// Zero-extends.
    fn to_u64(self) -> u64;
    /// Sign-extends.
    fn to_i64(self) -> i64;
    /// Reads the register with this code.
    fn get(regs: &Regs, code: u8) -> Self;
    /// Writes the register with this code.
    fn set(self, regs: &mut Regs, code: u8);
}

impl Width for u8 {
    const BYTES: usize = 1;
    #[inline(always)]
    fn from_u64(v: u64) -> Self {
        v as u8
    }
    #[inline(always)]
    fn to_u64(self) -> u64 {
        self.into()
    }
    #[inline(always)]
    fn to_i64(self) -> i64 {
        (self as i8).into()
    }
    #[inline(always)]
    fn get(regs: &Regs, code: u8) -> Self {
        (regs[code >> 3] >> ((code & 1) * 8)) as u8
    }
    #[inline(always)]
    fn set(self, regs: &mut Regs, code: u8) {
        let shift = (code & 1) * 8;
        let r = &mut regs[code >> 3];
        *r = *r & !(0xff << shift) | u64::from(self) << shift;
    }
}

impl Width for u16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn from_u64(v: u64) -> Self {
        v as u16
    }
    #[inline(always)]
    fn to_u64(self) -> u64 {
        self.into()
    }
    #[inline(always)]
    fn to_i64(self) -> i64 {
        (self as i16).into()
    }
    #[inline(always)]
    fn get(regs: &Regs, code: u8) -> Self {
        regs[code] as u16
    }
    #[inline(always)]
    fn set(self, regs: &mut Regs, code: u8) {
        let r = &mut regs[code];
        *r = *r & !0xffff | u64::from(self);
    }
}

impl Width for u32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn from_u64(v: u64) -> Self {
        v as u32
    }
    #[inline(always)]
    fn to_u64(self) -> u64 {
        self.into()
    }
    #[inline(always)]
    fn to_i64(self) -> i64 {
        (self as i32).into()
    }
    #[inline(always)]
    fn get(regs: &Regs, code: u8) -> Self {
        regs[code] as u32
    }
    #[inline(always)]
    fn set(self, regs: &mut Regs, code: u8) {
        regs[code] = self.into();
    }
}

impl Width for u64 {
    const BYTES: usize = 8;
    #[inline(always)]
    fn from_u64(v: u64) -> Self {
        v
    }
    #[inline(always)]
    fn to_u64(self) -> u64 {
        self
    }
    #[inline(always)]
    fn to_i64(self) -> i64 {
        self as i64
    }
    #[inline(always)]
    fn get(regs: &Regs, code: u8) -> Self {
        regs[code]
    }
    #[inline(always)]
    fn set(self, regs: &mut Regs, code: u8) {
        regs[code] = self;
    }
}
