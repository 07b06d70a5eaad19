//! General, system, floating-point and debug registers (KVM API, sections 4.11 to 4.14, 4.29,
//! KVM_GET_SREGS2, KVM_GET_XSAVE, KVM_GET_XCRS, KVM_GET_DEBUGREGS): conversions between the
//! processor's state and the API's structures, and the checks that a new state must pass. A refused
//! state changes nothing: every check is made before the first register is written.

use anykvm_abi::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, kvm_debugregs, kvm_dtable, kvm_fpu, kvm_regs, kvm_segment,
    kvm_sregs, kvm_sregs2, kvm_xcrs,
};
use anykvm_cpu::state::{CpuState, Segment, Table, cr0, cr4, efer, reg, rflags, seg};

use crate::cpuid::GuestCpuid;
use crate::error::{Errno, Result};

/// KVM_GET_REGS.
pub(crate) fn regs(s: &CpuState) -> kvm_regs {
    kvm_regs {
        rax: s.regs[reg::RAX],
        rbx: s.regs[reg::RBX],
        rcx: s.regs[reg::RCX],
        rdx: s.regs[reg::RDX],
        rsi: s.regs[reg::RSI],
        rdi: s.regs[reg::RDI],
        rsp: s.regs[reg::RSP],
        rbp: s.regs[reg::RBP],
        r8: s.regs[8],
        r9: s.regs[9],
        r10: s.regs[10],
        r11: s.regs[11],
        r12: s.regs[12],
        r13: s.regs[13],
        r14: s.regs[14],
        r15: s.regs[15],
        rip: s.rip(),
        rflags: s.rflags,
    }
}

/// KVM_SET_REGS. Reserved bits of RFLAGS keep their fixed values, and an exception that was raised
/// but not yet delivered is forgotten, as it belonged to the instruction that RIP has left.
pub(crate) fn set_regs(s: &mut CpuState, r: &kvm_regs) {
    s.regs[reg::RAX] = r.rax;
    s.regs[reg::RBX] = r.rbx;
    s.regs[reg::RCX] = r.rcx;
    s.regs[reg::RDX] = r.rdx;
    s.regs[reg::RSI] = r.rsi;
    s.regs[reg::RDI] = r.rdi;
    s.regs[reg::RSP] = r.rsp;
    s.regs[reg::RBP] = r.rbp;
    s.regs[8] = r.r8;
    s.regs[9] = r.r9;
    s.regs[10] = r.r10;
    s.regs[11] = r.r11;
    s.regs[12] = r.r12;
    s.regs[13] = r.r13;
    s.regs[14] = r.r14;
    s.regs[15] = r.r15;
    s.set_rip(r.rip);
    s.rflags = r.rflags & rflags::WRITABLE | rflags::FIXED;
    s.events.exception.pending = false;
    s.events.exception.has_payload = false;
}

fn segment(s: &Segment) -> kvm_segment {
    let bit = |mask: u32| u8::from(s.attr & mask != 0);
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind(),
        present: bit(Segment::P),
        dpl: s.dpl(),
        db: bit(Segment::DB),
        s: bit(Segment::S),
        l: bit(Segment::L),
        g: bit(Segment::G),
        avl: bit(1 << 12),
        unusable: bit(Segment::UNUSABLE),
        padding: 0,
    }
}

/// As on hardware with VMX, a segment that is not present counts as unusable.
fn set_segment(s: &mut Segment, k: &kvm_segment) {
    let bit = |value: u8, mask: u32| if value & 1 != 0 { mask } else { 0 };
    let unusable = k.unusable != 0 || k.present == 0;
    *s = Segment {
        base: k.base,
        limit: k.limit,
        selector: k.selector,
        attr: u32::from(k.type_ & 15)
            | bit(k.s, Segment::S)
            | u32::from(k.dpl & 3) << 5
            | bit(k.present, Segment::P)
            | bit(k.avl, 1 << 12)
            | bit(k.l, Segment::L)
            | bit(k.db, Segment::DB)
            | bit(k.g, Segment::G)
            | if unusable { Segment::UNUSABLE } else { 0 },
        ..Segment::default()
    };
}

fn table(t: &Table) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit,
        padding: [0; 3],
    }
}

/// What KVM_GET_SREGS carries beside the processor's own state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ApicView {
    pub cr8: u64,
    pub apic_base: u64,
}

/// KVM_GET_SREGS2. PDPTRs are valid while PAE paging is on.
pub(crate) fn sregs2(s: &CpuState, apic: ApicView) -> kvm_sregs2 {
    let pae = pae_paging(s.cr0, s.cr4, s.msr.efer);
    let at = |n: u8| segment(&s.seg[usize::from(n)]);
    kvm_sregs2 {
        cs: at(seg::CS),
        ds: at(seg::DS),
        es: at(seg::ES),
        fs: at(seg::FS),
        gs: at(seg::GS),
        ss: at(seg::SS),
        tr: segment(&s.tr),
        ldt: segment(&s.ldtr),
        gdt: table(&s.gdtr),
        idt: table(&s.idtr),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: apic.cr8,
        efer: s.msr.efer,
        apic_base: apic.apic_base,
        flags: if pae {
            KVM_SREGS2_FLAGS_PDPTRS_VALID.into()
        } else {
            0
        },
        pdptrs: if pae { s.pdptr } else { [0; 4] },
    }
}

/// KVM_GET_SREGS: the same with the queued external interrupt in place of the PDPTRs.
pub(crate) fn sregs(s: &CpuState, apic: ApicView) -> kvm_sregs {
    let r = sregs2(s, apic);
    let mut interrupt_bitmap = [0u64; 4];
    let interrupt = &s.events.interrupt;
    if interrupt.injected && !interrupt.soft {
        interrupt_bitmap[usize::from(interrupt.vector / 64)] |= 1 << (interrupt.vector % 64);
    }
    kvm_sregs {
        cs: r.cs,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
        ss: r.ss,
        tr: r.tr,
        ldt: r.ldt,
        gdt: r.gdt,
        idt: r.idt,
        cr0: r.cr0,
        cr2: r.cr2,
        cr3: r.cr3,
        cr4: r.cr4,
        cr8: r.cr8,
        efer: r.efer,
        apic_base: r.apic_base,
        interrupt_bitmap,
    }
}

/// The part of `kvm_sregs` that `kvm_sregs2` has too.
pub(crate) fn as_sregs2(r: &kvm_sregs) -> kvm_sregs2 {
    kvm_sregs2 {
        cs: r.cs,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
        ss: r.ss,
        tr: r.tr,
        ldt: r.ldt,
        gdt: r.gdt,
        idt: r.idt,
        cr0: r.cr0,
        cr2: r.cr2,
        cr3: r.cr3,
        cr4: r.cr4,
        cr8: r.cr8,
        efer: r.efer,
        apic_base: r.apic_base,
        flags: 0,
        pdptrs: [0; 4],
    }
}

/// The lowest vector in `kvm_sregs.interrupt_bitmap`.
pub(crate) fn first_interrupt(bitmap: &[u64; 4]) -> Option<u8> {
    let word = bitmap.iter().position(|w| *w != 0)?;
    Some((word * 64) as u8 + bitmap[word].trailing_zeros() as u8)
}

pub(crate) fn pae_paging(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && efer & efer::LMA == 0
}

/// CR0 as an instruction may load it: SDM Vol. 3, 2.5.
fn valid_cr0(v: u64) -> bool {
    v >> 32 == 0
        && !(v & cr0::NW != 0 && v & cr0::CD == 0)
        && !(v & cr0::PG != 0 && v & cr0::PE == 0)
}

/// Whether SREGS are a state the processor can be in (`kvm_is_valid_sregs`).
pub(crate) fn check_sregs(r: &kvm_sregs2, cpuid: &GuestCpuid) -> Result<()> {
    let long = r.efer & efer::LME != 0 && r.cr0 & cr0::PG != 0;
    let modes = if long {
        // SDM Vol. 3, 10.8.5: paging with EFER.LME is IA-32e mode, which needs PAE.
        r.cr4 & cr4::PAE != 0 && r.efer & efer::LMA != 0 && r.cr3 & cpuid.reserved_gpa_bits() == 0
    } else {
        r.efer & efer::LMA == 0 && r.cs.l == 0
    };
    if modes
        && valid_cr0(r.cr0)
        && r.cr4 & cpuid.table().cr4_reserved() == 0
        && r.efer & !efer::IMPLEMENTED == 0
    {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}

/// `flags` of KVM_SET_SREGS2.
pub(crate) fn check_sregs2_flags(r: &kvm_sregs2) -> Result<()> {
    let valid = u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
    if r.flags & !valid != 0 || r.flags & valid != 0 && !pae_paging(r.cr0, r.cr4, r.efer) {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

/// Writes SREGS that passed the checks. CR8 and APIC base are the caller's.
pub(crate) fn set_sregs(s: &mut CpuState, r: &kvm_sregs2) {
    for (n, from) in [
        (seg::CS, &r.cs),
        (seg::DS, &r.ds),
        (seg::ES, &r.es),
        (seg::FS, &r.fs),
        (seg::GS, &r.gs),
        (seg::SS, &r.ss),
    ] {
        set_segment(&mut s.seg[usize::from(n)], from);
    }
    set_segment(&mut s.tr, &r.tr);
    set_segment(&mut s.ldtr, &r.ldt);
    for (to, from) in [(&mut s.gdtr, &r.gdt), (&mut s.idtr, &r.idt)] {
        *to = Table {
            base: from.base,
            limit: from.limit,
            ..Table::default()
        };
    }
    s.cr0 = r.cr0 | cr0::ET;
    s.cr2 = r.cr2;
    s.cr3 = r.cr3;
    s.cr4 = r.cr4;
    s.msr.efer = r.efer;
    if r.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0 {
        s.pdptr = r.pdptrs;
    }
}

/// KVM_GET_XCRS.
pub(crate) fn xcrs(s: &CpuState) -> kvm_xcrs {
    let mut x = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    x.xcrs[0].value = s.xcr0;
    x
}

/// XCR0 bits (SDM Vol. 1, 13.3).
pub(crate) mod xcr0 {
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    pub const AVX512: u64 = 7 << 5;
}

/// Whether the guest may load XCR0 with this (SDM Vol. 2, XSETBV).
fn valid_xcr0(v: u64, cpuid: &GuestCpuid) -> bool {
    let avx512 = v & xcr0::AVX512;
    v & xcr0::X87 != 0
        && !(v & xcr0::AVX != 0 && v & xcr0::SSE == 0)
        && v & !(cpuid.supported_xcr0() | xcr0::X87) == 0
        && (avx512 == 0 || avx512 == xcr0::AVX512 && v & xcr0::AVX != 0)
}

/// KVM_SET_XCRS. Entries other than XCR0's are ignored, as Linux does.
pub(crate) fn set_xcrs(s: &mut CpuState, x: &kvm_xcrs, cpuid: &GuestCpuid) -> Result<()> {
    if x.flags != 0 {
        return Err(Errno::EINVAL);
    }
    let entries = x.xcrs.get(..x.nr_xcrs as usize).ok_or(Errno::EINVAL)?;
    if let Some(x) = entries.iter().find(|x| x.xcr == 0) {
        if !valid_xcr0(x.value, cpuid) {
            return Err(Errno::EINVAL);
        }
        s.xcr0 = x.value;
    }
    Ok(())
}

/// KVM_GET_DEBUGREGS.
pub(crate) fn debugregs(s: &CpuState) -> kvm_debugregs {
    kvm_debugregs {
        db: s.db,
        dr6: s.dr6,
        dr7: s.dr7,
        ..Default::default()
    }
}

/// KVM_SET_DEBUGREGS.
pub(crate) fn set_debugregs(s: &mut CpuState, d: &kvm_debugregs) -> Result<()> {
    if d.flags != 0 || d.dr6 >> 32 != 0 || d.dr7 >> 32 != 0 {
        return Err(Errno::EINVAL);
    }
    s.db = d.db;
    s.dr6 = d.dr6;
    s.dr7 = d.dr7;
    Ok(())
}

/// KVM_GET_FPU: the legacy region of the XSAVE area (SDM Vol. 1, 10.5.1).
pub(crate) fn fpu(s: &CpuState) -> kvm_fpu {
    let x = &s.xsave;
    let mut f = kvm_fpu {
        fcw: x.u16(0),
        fsw: x.u16(2),
        ftwx: x.0[4],
        last_opcode: x.u16(6),
        last_ip: x.u64(8),
        last_dp: x.u64(16),
        mxcsr: x.u32(24),
        ..Default::default()
    };
    for (to, from) in f.fpr.iter_mut().zip(x.0[32..160].chunks_exact(16)) {
        to.copy_from_slice(from);
    }
    for (to, from) in f.xmm.iter_mut().zip(x.0[160..416].chunks_exact(16)) {
        to.copy_from_slice(from);
    }
    f
}

/// MXCSR bits that are not reserved (SDM Vol. 1, 10.2.3).
pub(crate) const MXCSR_MASK: u32 = 0xffff;

/// KVM_SET_FPU. Reserved bits of MXCSR are dropped.
pub(crate) fn set_fpu(s: &mut CpuState, f: &kvm_fpu) {
    let x = &mut s.xsave;
    x.set_u16(0, f.fcw);
    x.set_u16(2, f.fsw);
    x.set_u16(4, f.ftwx.into());
    x.set_u16(6, f.last_opcode);
    x.set_u64(8, f.last_ip);
    x.set_u64(16, f.last_dp);
    x.set_u32(24, f.mxcsr & MXCSR_MASK);
    for (from, to) in f.fpr.iter().zip(x.0[32..160].chunks_exact_mut(16)) {
        to.copy_from_slice(from);
    }
    for (from, to) in f.xmm.iter().zip(x.0[160..416].chunks_exact_mut(16)) {
        to.copy_from_slice(from);
    }
    let in_use = x.u64(512) | xcr0::X87 | xcr0::SSE;
    x.set_u64(512, in_use);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive() {
        let k = kvm_segment {
            base: 0x1234,
            limit: 0xf_ffff,
            selector: 0x10,
            type_: 11,
            present: 1,
            dpl: 3,
            db: 1,
            s: 1,
            l: 0,
            g: 1,
            avl: 1,
            unusable: 0,
            padding: 0,
        };
        let mut s = Segment::default();
        set_segment(&mut s, &k);
        assert_eq!(segment(&s), k);
    }

    #[test]
    fn first_interrupt_is_the_lowest() {
        assert_eq!(first_interrupt(&[0; 4]), None);
        assert_eq!(first_interrupt(&[0, 1 << 3, 1, 0]), Some(67));
    }

    #[test]
    fn inconsistent_modes_are_refused() {
        let cpuid = GuestCpuid::default();
        let good = sregs2(
            &CpuState::new(),
            ApicView {
                cr8: 0,
                apic_base: 0,
            },
        );
        check_sregs(&good, &cpuid).unwrap();
        let mut bad = good;
        bad.cr0 |= cr0::PG;
        assert!(check_sregs(&bad, &cpuid).is_err());
        let mut bad = good;
        bad.efer = efer::LMA;
        assert!(check_sregs(&bad, &cpuid).is_err());
        let mut bad = good;
        bad.cr4 = 1 << 63;
        assert!(check_sregs(&bad, &cpuid).is_err());
        let mut bad = good;
        bad.flags = 1;
        assert!(check_sregs2_flags(&bad).is_err());
    }
}
