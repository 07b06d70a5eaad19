//! The state of a new vCPU (SDM Vol. 3, table 10-1, and `kvm_vcpu_reset`), every byte of it: what is read is put
//! into memory full of other bytes, so that padding is seen to be written.

use anykvm_abi::ioctl::*;
use anykvm_abi::*;

use crate::support::*;
use crate::vcpu::VcpuFixture;

#[test]
pub fn registers() {
    let v = VcpuFixture::new();
    let want = kvm_regs {
        rip: 0xfff0,
        rflags: 2,
        // Family 6, when no CPUID says otherwise.
        rdx: 0x600,
        ..Default::default()
    };
    assert_eq!(v.get::<kvm_regs>(KVM_GET_REGS), want);
}

#[test]
pub fn system_registers() {
    let v = VcpuFixture::new();
    let data = kvm_segment {
        limit: 0xffff,
        type_: 3,
        present: 1,
        s: 1,
        ..Default::default()
    };
    let system = |type_| kvm_segment {
        s: 0,
        type_,
        ..data
    };
    let table = kvm_dtable {
        limit: 0xffff,
        ..Default::default()
    };
    let want = kvm_sregs {
        cs: kvm_segment {
            base: 0xffff_0000,
            selector: 0xf000,
            type_: 0xb,
            ..data
        },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: system(0xb),
        ldt: system(2),
        gdt: table,
        idt: table,
        cr0: 0x6000_0010,
        // Enabled, at its usual place, of the bootstrap processor.
        apic_base: 0xfee0_0900,
        ..Default::default()
    };
    assert_eq!(v.get::<kvm_sregs>(KVM_GET_SREGS), want);
    let two: kvm_sregs2 = v.get(KVM_GET_SREGS2);
    assert_eq!((two.cr0, two.flags, two.pdptrs), (want.cr0, 0, [0; 4]));
    assert_eq!((two.cs, two.tr, two.idt), (want.cs, want.tr, want.idt));
}

#[test]
pub fn floating_point() {
    let v = VcpuFixture::new();
    let want = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    assert_eq!(v.get::<kvm_fpu>(KVM_GET_FPU), want);
    let area: [u8; 4096] = v.get(KVM_GET_XSAVE);
    assert_eq!(area[..2], [0x7f, 3]);
    assert_eq!(area[24..28], 0x1f80u32.to_ne_bytes());
    // The header says which components are in use; behind it every register is 0.
    assert!(area[528..].iter().all(|b| *b == 0));
    let size =
        v.f.system(KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2.into())
            .unwrap() as usize;
    let at = v.f.user.room(size);
    assert_eq!(v.call(KVM_GET_XSAVE2, at), Ok(0));
    assert_eq!(v.f.user.value::<[u8; 4096]>(at), area);
}

#[test]
pub fn the_others() {
    let v = VcpuFixture::new();
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = 1;
    assert_eq!(v.get::<kvm_xcrs>(KVM_GET_XCRS).as_bytes(), xcrs.as_bytes());
    let debugregs = kvm_debugregs {
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        ..Default::default()
    };
    assert_eq!(v.get::<kvm_debugregs>(KVM_GET_DEBUGREGS), debugregs);
    let runnable = kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    };
    assert_eq!(v.get::<kvm_mp_state>(KVM_GET_MP_STATE), runnable);
}

#[test]
pub fn model_specific_registers() {
    let v = VcpuFixture::new();
    let values = [
        (0x1b, 0xfee0_0900),
        // IA32_TSC_ADJUST, IA32_SYSENTER_CS, IA32_PAT, EFER, STAR, LSTAR, FMASK, KERNEL_GS_BASE.
        (0x3b, 0),
        (0x174, 0),
        (0x277, 0x0007_0406_0007_0406),
        (0xc000_0080, 0),
        (0xc000_0081, 0),
        (0xc000_0082, 0),
        (0xc000_0084, 0),
        (0xc000_0102, 0),
        (MSR_KVM_SYSTEM_TIME_NEW, 0),
        (MSR_KVM_ASYNC_PF_EN, 0),
        (MSR_KVM_STEAL_TIME, 0),
        (MSR_KVM_PV_EOI_EN, 0),
        (MSR_KVM_POLL_CONTROL, 1),
    ];
    let asked = values.map(|(index, _)| kvm_msr_entry {
        index,
        data: 0xdead,
        ..Default::default()
    });
    let (n, got) = v.list(KVM_GET_MSRS, &asked);
    assert_eq!(n, Ok(values.len() as i32));
    for ((index, value), entry) in values.iter().zip(got) {
        assert_eq!((entry.index, entry.data), (*index, *value));
    }
}

/// The local APIC (SDM Vol. 3, 11.4.7.1), virtual wire mode on the bootstrap processor as KVM sets it.
#[test]
pub fn local_apic() {
    let v = VcpuFixture::of(Fixture::with_irqchip());
    let state: kvm_lapic_state = v.get(KVM_GET_LAPIC);
    let register = |offset: usize| {
        let bytes: Vec<u8> = state.regs[offset..offset + 4]
            .iter()
            .map(|b| *b as u8)
            .collect();
        u32::from_bytes(&bytes).unwrap()
    };
    // Id, TPR, LDR, DFR, spurious vector.
    assert_eq!((register(0x20), register(0x80), register(0xd0)), (0, 0, 0));
    assert_eq!((register(0xe0), register(0xf0)), (u32::MAX, 0xff));
    for masked in [0x320, 0x330, 0x340, 0x360, 0x370] {
        assert_eq!(register(masked), 1 << 16, "{masked:#x}");
    }
    // KVM_X86_QUIRK_LINT0_REENABLED: the PIC's interrupts.
    assert_eq!(register(0x350), 0x700);
    for empty in (0x100..0x280)
        .step_by(0x10)
        .chain([0x280, 0x300, 0x310, 0x380, 0x390])
    {
        assert_eq!(register(empty), 0, "{empty:#x}");
    }
}
