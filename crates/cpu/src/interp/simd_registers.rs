//! The vector and opmask registers, which live in the XSAVE area in pieces (SDM Vol. 1, 13.5).

use super::simd::xcr0;
use crate::cpu::Cpu;
use crate::state::XsaveArea;

/// A ZMM register or the low part of one, 16 bytes each.
pub(crate) type Quarters = [[u8; 16]; 4];

impl Cpu {
    #[inline(always)]
    fn piece(&self, at: usize) -> [u8; 16] {
        let mut v = [0; 16];
        v.copy_from_slice(&self.state.xsave.0[at..at + 16]);
        v
    }
    #[inline(always)]
    fn set_piece(&mut self, at: usize, v: &[u8; 16]) {
        self.state.xsave.0[at..at + 16].copy_from_slice(v);
    }

    /// Low 16 bytes of vector register 0-15.
    #[inline(always)]
    pub(crate) fn xmm(&self, n: u8) -> [u8; 16] {
        self.piece(XsaveArea::XMM + usize::from(n & 15) * 16)
    }
    /// Bytes 16-31 of vector register 0-15.
    #[inline(always)]
    pub(crate) fn ymm_hi(&self, n: u8) -> [u8; 16] {
        self.piece(XsaveArea::YMM_HI + usize::from(n & 15) * 16)
    }
    /// Sets the low 16 bytes of vector register 0-15, the rest stays (legacy SSE).
    #[inline(always)]
    pub(crate) fn set_xmm(&mut self, n: u8, v: &[u8; 16]) {
        self.set_piece(XsaveArea::XMM + usize::from(n & 15) * 16, v);
    }
    /// Sets 32 bytes of vector register 0-15 and clears the rest (VEX).
    #[inline(always)]
    pub(crate) fn set_ymm(&mut self, n: u8, lo: &[u8; 16], hi: &[u8; 16]) {
        self.set_xmm(n, lo);
        let n = usize::from(n & 15);
        self.set_piece(XsaveArea::YMM_HI + n * 16, hi);
        if self.state.xcr0 & xcr0::ZMM_HI256 != 0 {
            let at = XsaveArea::ZMM_HI + n * 32;
            self.state.xsave.0[at..at + 32].fill(0);
        }
    }

    /// Where the four quarters of vector register 0-31 are.
    #[inline(always)]
    fn quarter_places(n: u8) -> [usize; 4] {
        let n = usize::from(n & 31);
        if n < 16 {
            let hi = XsaveArea::ZMM_HI + n * 32;
            [
                XsaveArea::XMM + n * 16,
                XsaveArea::YMM_HI + n * 16,
                hi,
                hi + 16,
            ]
        } else {
            let at = XsaveArea::HI16_ZMM + (n - 16) * 64;
            [at, at + 16, at + 32, at + 48]
        }
    }
    /// The low `count` quarters of vector register 0-31; the others are zero in the result.
    #[inline(always)]
    pub(crate) fn quarters(&self, n: u8, count: usize) -> Quarters {
        let mut v = [[0; 16]; 4];
        for (to, at) in v.iter_mut().zip(Self::quarter_places(n)).take(count) {
            *to = self.piece(at);
        }
        v
    }
    /// Sets vector register 0-31 (EVEX, which clears what it does not write).
    #[inline(always)]
    pub(crate) fn set_quarters(&mut self, n: u8, v: &Quarters) {
        for (from, at) in v.iter().zip(Self::quarter_places(n)) {
            self.set_piece(at, from);
        }
    }

    /// An opmask register.
    #[inline(always)]
    pub(crate) fn opmask(&self, n: u8) -> u64 {
        self.state
            .xsave
            .u64(XsaveArea::OPMASK + usize::from(n & 7) * 8)
    }
    /// Sets an opmask register, all 64 bits of it.
    #[inline(always)]
    pub(crate) fn set_opmask(&mut self, n: u8, v: u64) {
        self.state
            .xsave
            .set_u64(XsaveArea::OPMASK + usize::from(n & 7) * 8, v);
    }
}
