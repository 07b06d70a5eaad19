//! 16-byte accesses to guest RAM, each one host instruction: aligned ones are atomic on processors
//! with AVX (SDM Vol. 3, 9.1.1).

use std::arch::asm;
use std::arch::x86_64::{__m128i, _mm_setzero_si128};
use std::mem::transmute;

use super::access::guarded;

/// Loads 16 bytes from a host address.
///
/// # Safety
/// `at` must come from a memory slot of a map this processor holds.
#[inline(always)]
pub(crate) unsafe fn load_16(at: u64) -> [u8; 16] {
    // SAFETY: reads one operand at an address the caller vouches for; a fault is resumed behind the
    // instruction, leaving zero. The two types are 16 plain bytes.
    unsafe {
        let mut v: __m128i = _mm_setzero_si128();
        asm!(guarded!("movups {v}, [{p}]"), v = inout(xmm_reg) v, p = in(reg) at, options(nostack, preserves_flags));
        transmute::<__m128i, [u8; 16]>(v)
    }
}

/// Stores 16 bytes to a host address.
///
/// # Safety
/// As [`load_16`].
#[inline(always)]
pub(crate) unsafe fn store_16(at: u64, v: [u8; 16]) {
    // SAFETY: writes one operand at an address the caller vouches for. The two types are 16 plain
    // bytes.
    unsafe {
        let v = transmute::<[u8; 16], __m128i>(v);
        asm!(guarded!("movups [{p}], {v}"), v = in(xmm_reg) v, p = in(reg) at, options(nostack, preserves_flags));
    }
}
