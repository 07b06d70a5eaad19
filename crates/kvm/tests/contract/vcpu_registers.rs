//! Registers of every kind: what is set is what is read, and a refused state changes nothing.

use anykvm::Errno;
use anykvm_abi::ioctl::*;
use anykvm_abi::*;

use crate::vcpu::VcpuFixture;

const CR0_PE: u64 = 1;
const CR0_NW: u64 = 1 << 29;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const MSR_EFER: u32 = 0xc000_0080;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

#[test]
pub fn reset_values() {
    let v = VcpuFixture::new();
    let regs: kvm_regs = v.get(KVM_GET_REGS);
    assert_eq!((regs.rip, regs.rflags, regs.rax), (0xfff0, 2, 0));
    let s: kvm_sregs = v.get(KVM_GET_SREGS);
    assert_eq!(
        (s.cs.selector, s.cs.base, s.cs.limit),
        (0xf000, 0xffff_0000, 0xffff)
    );
    assert_eq!((s.cs.type_, s.cs.present, s.cs.s), (0xb, 1, 1));
    assert_eq!((s.tr.type_, s.ldt.type_), (0xb, 2));
    assert_eq!((s.cr0, s.cr3, s.cr4, s.efer), (0x6000_0010, 0, 0, 0));
    assert_eq!((s.gdt.limit, s.idt.limit), (0xffff, 0xffff));
    assert_eq!(s.apic_base, 0xfee0_0900);
    let d: kvm_debugregs = v.get(KVM_GET_DEBUGREGS);
    assert_eq!((d.dr6, d.dr7), (0xffff_0ff0, 0x400));
    let x: kvm_xcrs = v.get(KVM_GET_XCRS);
    assert_eq!((x.nr_xcrs, x.xcrs[0].xcr, x.xcrs[0].value), (1, 0, 1));
}

#[test]
pub fn general_registers() {
    let v = VcpuFixture::new();
    let set = kvm_regs {
        rax: 1,
        rbx: 2,
        rcx: 3,
        rdx: 4,
        rsi: 5,
        rdi: 6,
        rsp: 7,
        rbp: 8,
        r8: 9,
        r9: 10,
        r10: 11,
        r11: 12,
        r12: 13,
        r13: 14,
        r14: 15,
        r15: u64::MAX,
        rip: 0x1_0000_0000,
        rflags: 0x3246 | 2,
    };
    assert_eq!(v.set(KVM_SET_REGS, &set), Ok(0));
    assert_eq!(v.get::<kvm_regs>(KVM_GET_REGS), set);
    // The fixed bit is always there.
    assert_eq!(v.set(KVM_SET_REGS, &kvm_regs { rflags: 0, ..set }), Ok(0));
    assert_eq!(v.get::<kvm_regs>(KVM_GET_REGS).rflags, 2);
}

/// 64-bit mode with paging.
fn long_mode(mut s: kvm_sregs) -> kvm_sregs {
    s.cr0 = CR0_PE | CR0_PG | 1 << 4;
    s.cr3 = 0x1000;
    s.cr4 = CR4_PAE;
    s.efer = EFER_LME | EFER_LMA;
    s.cs = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 8,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    s
}

#[test]
pub fn system_registers() {
    let v = VcpuFixture::new();
    let reset: kvm_sregs = v.get(KVM_GET_SREGS);
    let mut s = long_mode(reset);
    s.cr2 = 0xdead_b000;
    s.cr8 = 5;
    s.fs.base = 0x7fff_0000_1234;
    s.gdt = kvm_dtable {
        base: 0xffff_8000_0000_0000,
        limit: 0x7f,
        ..Default::default()
    };
    s.interrupt_bitmap[1] = 1 << 5;
    assert_eq!(v.set(KVM_SET_SREGS, &s), Ok(0));
    assert_eq!(v.get::<kvm_sregs>(KVM_GET_SREGS), s);
    let two: kvm_sregs2 = v.get(KVM_GET_SREGS2);
    assert_eq!((two.cr3, two.flags), (0x1000, 0));
}

#[test]
pub fn every_bit_of_efer_is_restored() {
    let v = VcpuFixture::new();
    let mut restored = 0;
    for efer in (0..64).map(|bit| 1 << bit).filter(|&bit| bit != EFER_LMA) {
        let msr = kvm_msr_entry {
            index: MSR_EFER,
            data: efer,
            ..Default::default()
        };
        if v.list(KVM_SET_MSRS, &[msr]).0 != Ok(1) {
            continue;
        }
        let s: kvm_sregs = v.get(KVM_GET_SREGS);
        assert_eq!(s.efer, efer);
        assert_eq!(v.set(KVM_SET_SREGS, &kvm_sregs { efer: 0, ..s }), Ok(0));
        assert_eq!(v.set(KVM_SET_SREGS, &s), Ok(0), "EFER {efer:#x}");
        assert_eq!(v.get::<kvm_sregs>(KVM_GET_SREGS).efer, efer);
        restored += 1;
    }
    assert!(restored > 2, "IA32_EFER can hardly be written");
}

#[test]
pub fn inconsistent_system_registers_change_nothing() {
    let v = VcpuFixture::new();
    let good: kvm_sregs = v.get(KVM_GET_SREGS);
    let long = long_mode(good);
    let bad = [
        kvm_sregs {
            cr0: CR0_PG,
            ..good
        },
        kvm_sregs {
            cr0: CR0_NW,
            ..good
        },
        kvm_sregs {
            cr0: 1 << 32,
            ..good
        },
        kvm_sregs {
            cr4: 1 << 63,
            ..good
        },
        kvm_sregs {
            efer: EFER_LMA,
            ..good
        },
        kvm_sregs {
            efer: 1 << 40,
            ..good
        },
        kvm_sregs {
            apic_base: 1 << 10,
            ..good
        },
        kvm_sregs {
            apic_base: 0xfee0_0001,
            ..good
        },
        kvm_sregs { cr4: 0, ..long },
        kvm_sregs {
            efer: EFER_LME,
            ..long
        },
        kvm_sregs {
            cr3: 1 << 62,
            ..long
        },
        kvm_sregs {
            cs: long.cs,
            ..good
        },
    ];
    for (n, sregs) in bad.into_iter().enumerate() {
        let changed = kvm_sregs {
            cr2: 0x1234,
            ..sregs
        };
        assert_eq!(v.set(KVM_SET_SREGS, &changed), Err(Errno::EINVAL), "{n}");
        assert_eq!(v.get::<kvm_sregs>(KVM_GET_SREGS), good, "{n}");
    }
}

#[test]
pub fn sregs2_carry_page_directory_pointers() {
    let v = VcpuFixture::new();
    let mut s: kvm_sregs2 = v.get(KVM_GET_SREGS2);
    for flags in [1, 2] {
        let bad = kvm_sregs2 { flags, ..s };
        assert_eq!(v.set(KVM_SET_SREGS2, &bad), Err(Errno::EINVAL));
    }
    s.cr0 = CR0_PE | CR0_PG | 1 << 4;
    s.cr4 = CR4_PAE;
    s.flags = 1;
    s.pdptrs = [0x1001, 0x2001, 0, 0x3001];
    assert_eq!(v.set(KVM_SET_SREGS2, &s), Ok(0));
    let back: kvm_sregs2 = v.get(KVM_GET_SREGS2);
    assert_eq!((back.flags, back.pdptrs), (1, s.pdptrs));
}

#[test]
pub fn debug_registers() {
    let v = VcpuFixture::new();
    let set = kvm_debugregs {
        db: [1, 2, 3, 0xffff_8000_0000_0004],
        dr6: 0xffff_0ff1,
        dr7: 0x0000_0455,
        ..Default::default()
    };
    assert_eq!(v.set(KVM_SET_DEBUGREGS, &set), Ok(0));
    assert_eq!(v.get::<kvm_debugregs>(KVM_GET_DEBUGREGS), set);
    for bad in [
        kvm_debugregs { flags: 1, ..set },
        kvm_debugregs {
            dr6: 1 << 32,
            ..set
        },
        kvm_debugregs {
            dr7: 1 << 63,
            ..set
        },
    ] {
        let bad = kvm_debugregs { db: [9; 4], ..bad };
        assert_eq!(v.set(KVM_SET_DEBUGREGS, &bad), Err(Errno::EINVAL));
        assert_eq!(v.get::<kvm_debugregs>(KVM_GET_DEBUGREGS), set);
    }
}

#[test]
pub fn floating_point() {
    let v = VcpuFixture::new();
    let mut set = kvm_fpu {
        fcw: 0x37f,
        fsw: 0x3800,
        ftwx: 0x81,
        last_opcode: 0x123,
        last_ip: 0x4567,
        last_dp: 0x89ab,
        mxcsr: 0x1fa0,
        ..Default::default()
    };
    set.fpr[7] = [7; 16];
    set.fpr[7][10..].fill(0);
    set.xmm[15] = [15; 16];
    assert_eq!(v.set(KVM_SET_FPU, &set), Ok(0));
    assert_eq!(v.get::<kvm_fpu>(KVM_GET_FPU), set);

    let area: [u8; 4096] = v.get(KVM_GET_XSAVE);
    assert_eq!(area[160 + 15 * 16..][..16], [15; 16]);
    assert_eq!(area[512] & 3, 3);
    let other = VcpuFixture::new();
    assert_eq!(other.set(KVM_SET_XSAVE, &area), Ok(0));
    assert_eq!(other.get::<kvm_fpu>(KVM_GET_FPU), set);
    for (at, value) in [(519, 0x80), (520, 1), (575, 1), (27, 1)] {
        let mut bad = area;
        bad[at] = value;
        assert_eq!(
            other.set(KVM_SET_XSAVE, &bad),
            Err(Errno::EINVAL),
            "byte {at}"
        );
        assert_eq!(other.get::<kvm_fpu>(KVM_GET_FPU), set);
    }
}

#[test]
pub fn extended_control_registers() {
    let v = VcpuFixture::new();
    let mut x: kvm_xcrs = v.get(KVM_GET_XCRS);
    x.xcrs[0].value = 3;
    assert_eq!(v.set(KVM_SET_XCRS, &x), Ok(0));
    assert_eq!(v.get::<kvm_xcrs>(KVM_GET_XCRS).xcrs[0].value, 3);
    for (nr, flags, value) in [
        (17, 0, 1),
        (1, 1, 1),
        (1, 0, 0),
        (1, 0, 2),
        (1, 0, 5),
        (1, 0, 1 << 62),
    ] {
        let mut bad = x;
        (bad.nr_xcrs, bad.flags, bad.xcrs[0].value) = (nr, flags, value);
        assert_eq!(v.set(KVM_SET_XCRS, &bad), Err(Errno::EINVAL));
        assert_eq!(v.get::<kvm_xcrs>(KVM_GET_XCRS).xcrs[0].value, 3);
    }
}

#[test]
pub fn translation_without_paging_is_the_identity() {
    let v = VcpuFixture::new();
    let at = v.f.user.at(&kvm_translation {
        linear_address: 0x12345,
        ..Default::default()
    });
    assert_eq!(v.call(KVM_TRANSLATE, at), Ok(0));
    let t: kvm_translation = v.f.user.value(at);
    assert_eq!(
        (t.physical_address, t.valid, t.writeable, t.usermode),
        (0x12345, 1, 1, 0)
    );
    // The highest address is how KVM says that there is no translation.
    let highest = v.f.user.at(&kvm_translation {
        linear_address: u64::MAX,
        ..Default::default()
    });
    assert_eq!(v.call(KVM_TRANSLATE, highest), Ok(0));
    assert_eq!(v.f.user.value::<kvm_translation>(highest).valid, 0);
    // With paging and no page tables in RAM there is no translation.
    let s = long_mode(v.get(KVM_GET_SREGS));
    assert_eq!(v.set(KVM_SET_SREGS, &s), Ok(0));
    assert_eq!(v.call(KVM_TRANSLATE, at), Ok(0));
    let t: kvm_translation = v.f.user.value(at);
    assert_eq!((t.physical_address, t.valid), (u64::MAX, 0));
}
