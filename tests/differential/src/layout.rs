//! Where the parts of [`State`] are in an XSAVE area of the standard format (SDM Vol. 1, 13.4; CPUID
//! leaf 0xD).

use crate::case::State;
use anykvm_cpu::interp::simd::xcr0;
use anykvm_cpu::state::XsaveArea;
use std::arch::x86_64::__cpuid_count;

/// All of AVX-512's components.
pub const AVX512: u64 = xcr0::OPMASK | xcr0::ZMM_HI256 | xcr0::HI16_ZMM;
/// The components that [`State`] has.
pub const KNOWN: u64 = xcr0::X87 | xcr0::SSE | xcr0::AVX | AVX512;

/// Offsets of one processor's components.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The components there are, as XCR0 has them.
    pub components: u64,
    ymm_hi: usize,
    opmask: usize,
    zmm_hi: usize,
    hi16_zmm: usize,
}

const XMM: usize = XsaveArea::XMM;
const ST: usize = 32;
const XSTATE_BV: usize = XsaveArea::XSTATE_BV;

impl Layout {
    /// The host's, of those components.
    pub fn of_host(components: u64) -> Self {
        let offset = |n| __cpuid_count(0xd, n).ebx as usize;
        Self {
            components: components & KNOWN,
            ymm_hi: offset(2),
            opmask: offset(5),
            zmm_hi: offset(6),
            hi16_zmm: offset(7),
        }
    }

    /// The one of this project's processor.
    pub fn of_guest(components: u64) -> Self {
        Self {
            components: components & KNOWN,
            ymm_hi: XsaveArea::YMM_HI,
            opmask: XsaveArea::OPMASK,
            zmm_hi: XsaveArea::ZMM_HI,
            hi16_zmm: XsaveArea::HI16_ZMM,
        }
    }

    /// Puts the registers into an area, all components marked as in use.
    pub fn store(&self, s: &State, area: &mut [u8]) {
        area[0..2].copy_from_slice(&s.fcw.to_le_bytes());
        area[2..4].copy_from_slice(&s.fsw.to_le_bytes());
        area[4..6].copy_from_slice(&s.ftw.to_le_bytes());
        area[6..24].fill(0);
        area[24..28].copy_from_slice(&s.mxcsr.to_le_bytes());
        for (n, st) in s.st.iter().enumerate() {
            area[ST + n * 16..][..10].copy_from_slice(&st[..10]);
        }
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&self.components.to_le_bytes());
        area[XSTATE_BV + 8..XSTATE_BV + 64].fill(0);
        for (n, zmm) in s.zmm[..16].iter().enumerate() {
            area[XMM + n * 16..][..16].copy_from_slice(&zmm[..16]);
            if self.components & xcr0::AVX != 0 {
                area[self.ymm_hi + n * 16..][..16].copy_from_slice(&zmm[16..32]);
            }
            if self.components & xcr0::ZMM_HI256 != 0 {
                area[self.zmm_hi + n * 32..][..32].copy_from_slice(&zmm[32..]);
            }
        }
        if self.components & xcr0::HI16_ZMM != 0 {
            for (n, zmm) in s.zmm[16..].iter().enumerate() {
                area[self.hi16_zmm + n * 64..][..64].copy_from_slice(zmm);
            }
        }
        if self.components & xcr0::OPMASK != 0 {
            for (n, k) in s.k.iter().enumerate() {
                area[self.opmask + n * 8..][..8].copy_from_slice(&k.to_le_bytes());
            }
        }
    }

    /// Takes the registers from an area; a component that XSTATE_BV says is unused is in its initial
    /// configuration whatever the area holds.
    pub fn load(&self, s: &mut State, area: &[u8]) {
        let word = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
        let used = u64::from_le_bytes(area[XSTATE_BV..XSTATE_BV + 8].try_into().unwrap_or([0; 8]))
            & self.components;
        let initial = State::new(64);
        s.mxcsr = u32::from(word(24)) | u32::from(word(26)) << 16;
        s.st = initial.st;
        s.zmm = initial.zmm;
        s.k = initial.k;
        (s.fcw, s.fsw, s.ftw) = (initial.fcw, 0, 0);
        if used & xcr0::X87 != 0 {
            (s.fcw, s.fsw, s.ftw) = (word(0), word(2), word(4) & 0xff);
            for (n, st) in s.st.iter_mut().enumerate() {
                st[..10].copy_from_slice(&area[ST + n * 16..][..10]);
            }
        }
        for (n, zmm) in s.zmm[..16].iter_mut().enumerate() {
            if used & xcr0::SSE != 0 {
                zmm[..16].copy_from_slice(&area[XMM + n * 16..][..16]);
            }
            if used & xcr0::AVX != 0 {
                zmm[16..32].copy_from_slice(&area[self.ymm_hi + n * 16..][..16]);
            }
            if used & xcr0::ZMM_HI256 != 0 {
                zmm[32..].copy_from_slice(&area[self.zmm_hi + n * 32..][..32]);
            }
        }
        if used & xcr0::HI16_ZMM != 0 {
            for (n, zmm) in s.zmm[16..].iter_mut().enumerate() {
                zmm.copy_from_slice(&area[self.hi16_zmm + n * 64..][..64]);
            }
        }
        if used & xcr0::OPMASK != 0 {
            for (n, k) in s.k.iter_mut().enumerate() {
                let bytes = area[self.opmask + n * 8..][..8].try_into();
                *k = u64::from_le_bytes(bytes.unwrap_or([0; 8]));
            }
        }
    }
}
