//! Comparison of 16 bytes element by element, as a bit for each element: what SSE2 does in two
//! instructions, and a loop over elements in many.

use std::arch::x86_64::{
    __m128i, _mm_castsi128_ps, _mm_cmpeq_epi8, _mm_cmpeq_epi16, _mm_cmpeq_epi32, _mm_movemask_epi8,
    _mm_movemask_ps, _mm_packs_epi16, _mm_set_epi64x, _mm_setzero_si128,
};

/// An element size.
pub trait Element {
    /// Elements in 16 bytes.
    const COUNT: u32;
    /// A bit for each.
    const ALL: u64 = (1 << Self::COUNT) - 1;
    /// A bit for each element that is equal.
    fn equal(a: [u8; 16], b: [u8; 16]) -> u64;
}

#[target_feature(enable = "sse2")]
#[inline]
fn vector(v: [u8; 16]) -> __m128i {
    let v = u128::from_le_bytes(v);
    _mm_set_epi64x((v >> 64) as i64, v as i64)
}

#[target_feature(enable = "sse2")]
#[inline]
fn equal_8(a: [u8; 16], b: [u8; 16]) -> i32 {
    _mm_movemask_epi8(_mm_cmpeq_epi8(vector(a), vector(b)))
}

#[target_feature(enable = "sse2")]
#[inline]
fn equal_16(a: [u8; 16], b: [u8; 16]) -> i32 {
    let equal = _mm_cmpeq_epi16(vector(a), vector(b));
    _mm_movemask_epi8(_mm_packs_epi16(equal, _mm_setzero_si128()))
}

#[target_feature(enable = "sse2")]
#[inline]
fn equal_32(a: [u8; 16], b: [u8; 16]) -> i32 {
    _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(vector(a), vector(b))))
}

impl Element for u8 {
    const COUNT: u32 = 16;
    #[inline(always)]
    fn equal(a: [u8; 16], b: [u8; 16]) -> u64 {
        // SAFETY: every x86-64 processor has SSE2.
        unsafe { equal_8(a, b) as u64 }
    }
}

impl Element for u16 {
    const COUNT: u32 = 8;
    #[inline(always)]
    fn equal(a: [u8; 16], b: [u8; 16]) -> u64 {
        // SAFETY: as above.
        unsafe { equal_16(a, b) as u64 }
    }
}

impl Element for u32 {
    const COUNT: u32 = 4;
    #[inline(always)]
    fn equal(a: [u8; 16], b: [u8; 16]) -> u64 {
        // SAFETY: as above.
        unsafe { equal_32(a, b) as u64 }
    }
}

impl Element for u64 {
    const COUNT: u32 = 2;
    #[inline(always)]
    fn equal(a: [u8; 16], b: [u8; 16]) -> u64 {
        let different = u128::from_le_bytes(a) ^ u128::from_le_bytes(b);
        u64::from(different as u64 == 0) | u64::from(different >> 64 == 0) << 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_in_order() {
        let zero = [0; 16];
        for i in 0..16 {
            let mut v = zero;
            v[i] = 1;
            assert_eq!(u8::equal(v, zero), u8::ALL & !(1 << i));
            assert_eq!(u16::equal(v, zero), u16::ALL & !(1 << (i / 2)));
            assert_eq!(u32::equal(v, zero), u32::ALL & !(1 << (i / 4)));
            assert_eq!(u64::equal(v, zero), u64::ALL & !(1 << (i / 8)));
        }
    }
}
