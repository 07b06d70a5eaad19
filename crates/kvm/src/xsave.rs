//! KVM_GET_XSAVE, KVM_GET_XSAVE2 and KVM_SET_XSAVE: the standard-format XSAVE area (SDM Vol. 1, 13.4)
//! of the registers, its components where the host has them.

use anykvm_cpu::cpuid::components;
use anykvm_cpu::state::{CpuState, XsaveArea};

use crate::cpuid;
use crate::error::{Errno, Result};
use crate::registers::{MXCSR_MASK, xcr0};

/// Size of `struct kvm_xsave`, and what KVM_CAP_XSAVE2 reports: no component reaches further.
pub(crate) const REGION: usize = 4096;
const HEADER: std::ops::Range<usize> = 512..576;

/// The registers as user space sees them. XSTATE_BV names every component that is not in its
/// initial configuration, and x87 and SSE always.
pub(crate) fn get(s: &CpuState) -> [u8; REGION] {
    let mut out = [0; REGION];
    out[..HEADER.start].copy_from_slice(&s.xsave.0[..HEADER.start]);
    let mut in_use = xcr0::X87 | xcr0::SSE;
    for c in components() {
        let value = &s.xsave.0[c.register..c.register + c.size];
        if value.iter().any(|b| *b != 0) {
            in_use |= 1 << c.bit;
        }
        out[c.offset..c.offset + c.size].copy_from_slice(value);
    }
    in_use &= cpuid::host_xcr0();
    out[512..520].copy_from_slice(&in_use.to_le_bytes());
    out[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    out
}

/// Takes what [`get`] gave. Components that XSTATE_BV does not name are put in their initial
/// configuration.
pub(crate) fn set(s: &mut CpuState, area: &[u8; REGION]) -> Result<()> {
    let in_use = u64::from_le_bytes(area[512..520].try_into().unwrap_or_default());
    // SDM Vol. 1, 13.8.1: XRSTOR's checks of the header; the compacted form is not taken.
    if in_use & !cpuid::host_xcr0() != 0 || area[520..576].iter().any(|b| *b != 0) {
        return Err(Errno::EINVAL);
    }
    let mxcsr = u32::from_le_bytes(area[24..28].try_into().unwrap_or_default());
    let loads_mxcsr = in_use & (xcr0::SSE | xcr0::AVX) != 0;
    if loads_mxcsr && mxcsr & !MXCSR_MASK != 0 {
        return Err(Errno::EINVAL);
    }
    let mut new = XsaveArea::default();
    if in_use & xcr0::X87 != 0 {
        new.0[..24].copy_from_slice(&area[..24]);
        new.0[32..160].copy_from_slice(&area[32..160]);
    }
    if loads_mxcsr {
        new.set_u32(XsaveArea::MXCSR, mxcsr);
    }
    if in_use & xcr0::SSE != 0 {
        new.0[160..416].copy_from_slice(&area[160..416]);
    }
    for c in components() {
        if in_use >> c.bit & 1 != 0 {
            new.0[c.register..c.register + c.size]
                .copy_from_slice(&area[c.offset..c.offset + c.size]);
        }
    }
    // The component's upper half is reserved (SDM Vol. 1, 13.5.7).
    new.0[XsaveArea::PKRU + 4..XsaveArea::PKRU + 8].fill(0);
    s.xsave = new;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_initial_components() {
        let mut s = CpuState::new();
        s.xsave.set_u64(XsaveArea::XMM, 0x1122_3344);
        s.xsave.set_u16(0, 0x27f);
        let area = get(&s);
        let mut t = CpuState::new();
        set(&mut t, &area).unwrap();
        assert_eq!(get(&t), area);

        let mut only_x87 = area;
        only_x87[512] = 1;
        set(&mut t, &only_x87).unwrap();
        assert_eq!(t.xsave.u64(XsaveArea::XMM), 0);
        assert_eq!(t.xsave.u16(0), 0x27f);
    }

    /// What is in use is told by the registers: a component that was not initial once is, when the guest
    /// makes it so.
    #[test]
    fn a_component_becomes_initial_again() {
        let Some(c) = components().first() else {
            return;
        };
        let mut s = CpuState::new();
        let fresh = get(&s);
        s.xsave.set_u64(c.register, 5);
        let area = get(&s);
        assert_ne!(area[512..520], fresh[512..520]);
        set(&mut s, &area).unwrap();
        s.xsave.set_u64(c.register, 0);
        assert_eq!(get(&s), fresh);
    }

    #[test]
    fn avx_512_state_is_carried_where_there_is_any() {
        const AVX512: u64 = 7 << 5;
        let mut s = CpuState::new();
        let places = [
            XsaveArea::OPMASK + 56,
            XsaveArea::ZMM_HI + 504,
            XsaveArea::HI16_ZMM + 1016,
        ];
        for at in places {
            s.xsave.set_u64(at, at as u64);
        }
        let area = get(&s);
        let in_use = u64::from_le_bytes(area[512..520].try_into().unwrap());
        assert_eq!(in_use & AVX512, cpuid::host_xcr0() & AVX512);
        if in_use & AVX512 == 0 {
            return;
        }
        let mut t = CpuState::new();
        set(&mut t, &area).unwrap();
        for at in places {
            assert_eq!(t.xsave.u64(at), at as u64);
        }
    }

    #[test]
    fn bad_headers_change_nothing() {
        let mut s = CpuState::new();
        let good = get(&s);
        for (at, value) in [(519, 0x40), (520, 1), (530, 1), (26, 1)] {
            let mut bad = good;
            bad[at] = value;
            assert!(set(&mut s, &bad).is_err(), "byte {at}");
            assert_eq!(get(&s), good);
        }
    }
}
