//! KVM_GET/SET_VCPU_EVENTS, MP_STATE, KVM_INTERRUPT, KVM_NMI, KVM_SMI.

use anykvm::Errno;
use anykvm_abi::ioctl::*;
use anykvm_abi::*;

use crate::support::Fixture;
use crate::vcpu::VcpuFixture;

const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;

fn enable(f: &Fixture, cap: u32) {
    let cap = kvm_enable_cap {
        cap,
        args: [1, 0, 0, 0],
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_ENABLE_CAP, &cap), Ok(0));
}

fn events(v: &VcpuFixture) -> kvm_vcpu_events {
    v.get(KVM_GET_VCPU_EVENTS)
}

#[test]
pub fn reset_state_and_flags() {
    let v = VcpuFixture::new();
    let mut e = events(&v);
    let base =
        KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
    assert_eq!(e.flags, base);
    e.flags = 0;
    assert_eq!(e, kvm_vcpu_events::default());
    enable(&v.f, KVM_CAP_EXCEPTION_PAYLOAD);
    assert_eq!(events(&v).flags, base | KVM_VCPUEVENT_VALID_PAYLOAD);
    enable(&v.f, KVM_CAP_X86_TRIPLE_FAULT_EVENT);
    assert_eq!(
        events(&v).flags,
        base | KVM_VCPUEVENT_VALID_PAYLOAD | KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    );
}

#[test]
pub fn round_trip_of_everything() {
    let v = VcpuFixture::new();
    enable(&v.f, KVM_CAP_EXCEPTION_PAYLOAD);
    enable(&v.f, KVM_CAP_X86_TRIPLE_FAULT_EVENT);
    let mut e = events(&v);
    e.exception.pending = 1;
    e.exception.nr = 14;
    e.exception.has_error_code = 1;
    e.exception.error_code = 6;
    e.exception_has_payload = 1;
    e.exception_payload = 0x1234_5000;
    e.interrupt.injected = 1;
    e.interrupt.nr = 0x31;
    e.interrupt.shadow = SHADOW_MOV_SS;
    e.nmi.injected = 1;
    e.nmi.pending = 1;
    e.nmi.masked = 1;
    e.triple_fault.pending = 1;
    assert_eq!(v.set(KVM_SET_VCPU_EVENTS, &e), Ok(0));
    assert_eq!(events(&v), e);
}

#[test]
pub fn shadow_bits_are_distinct_and_need_their_flag() {
    let v = VcpuFixture::new();
    let mut e = events(&v);
    for shadow in [SHADOW_MOV_SS, SHADOW_STI, 0, SHADOW_STI] {
        e.interrupt.shadow = shadow;
        assert_eq!(v.set(KVM_SET_VCPU_EVENTS, &e), Ok(0));
        assert_eq!(events(&v).interrupt.shadow, shadow);
    }
    e.interrupt.shadow = 0;
    e.flags &= !KVM_VCPUEVENT_VALID_SHADOW;
    assert_eq!(v.set(KVM_SET_VCPU_EVENTS, &e), Ok(0));
    assert_eq!(events(&v).interrupt.shadow, SHADOW_STI);
}

#[test]
pub fn refused_states_change_nothing() {
    let v = VcpuFixture::new();
    let before = events(&v);
    let with = |change: fn(&mut kvm_vcpu_events)| {
        let mut e = before;
        e.nmi.masked = 1;
        change(&mut e);
        assert_eq!(v.set(KVM_SET_VCPU_EVENTS, &e), Err(Errno::EINVAL), "{e:?}");
        assert_eq!(events(&v), before);
    };
    with(|e| e.flags |= 1 << 30);
    with(|e| e.flags |= KVM_VCPUEVENT_VALID_PAYLOAD);
    with(|e| e.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT);
    with(|e| (e.exception.injected, e.exception.nr) = (1, 32));
    with(|e| (e.exception.injected, e.exception.nr) = (1, 2));
    // QEMU sends vector 255 with neither pending nor injected.
    let mut e = before;
    e.exception.nr = 255;
    assert_eq!(v.set(KVM_SET_VCPU_EVENTS, &e), Ok(0));
}

#[test]
pub fn without_the_payload_capability_pending_is_not_taken() {
    let v = VcpuFixture::new();
    let mut e = events(&v);
    e.exception.pending = 1;
    e.exception.nr = 13;
    assert_eq!(v.set(KVM_SET_VCPU_EVENTS, &e), Ok(0));
    let e = events(&v);
    assert_eq!((e.exception.pending, e.exception.injected), (0, 0));
}

/// A trap that waits behind MOV SS: carried where payloads are.
#[test]
pub fn a_trap_behind_mov_ss_is_a_pending_db_beside_the_shadow() {
    let v = VcpuFixture::new();
    enable(&v.f, KVM_CAP_EXCEPTION_PAYLOAD);
    let mut e = events(&v);
    e.exception.pending = 1;
    e.exception.nr = 1;
    e.exception_has_payload = 1;
    e.exception_payload = 2;
    e.interrupt.shadow = SHADOW_MOV_SS;
    assert_eq!(v.set(KVM_SET_VCPU_EVENTS, &e), Ok(0));
    assert_eq!(events(&v), e);
    // Without the shadow it is not there any more.
    e = events(&v);
    e.exception.pending = 0;
    e.exception_has_payload = 0;
    e.interrupt.shadow = 0;
    assert_eq!(v.set(KVM_SET_VCPU_EVENTS, &e), Ok(0));
    let e = events(&v);
    assert_eq!((e.exception.pending, e.exception.injected), (0, 0));
}

#[test]
pub fn nmis_are_counted_to_two() {
    let v = VcpuFixture::new();
    for want in [1, 2, 2] {
        assert_eq!(v.call(KVM_NMI, 0), Ok(0));
        assert_eq!(events(&v).nmi.pending, want);
    }
    let mut e = events(&v);
    (e.nmi.pending, e.nmi.masked) = (0, 1);
    assert_eq!(v.set(KVM_SET_VCPU_EVENTS, &e), Ok(0));
    for _ in 0..2 {
        assert_eq!(v.call(KVM_NMI, 0), Ok(0));
        assert_eq!(events(&v).nmi.pending, 1);
    }
    assert_eq!(v.call(KVM_SMI, 0), Ok(0));
    assert_eq!(events(&v).smi.pending, 1);
}

#[test]
pub fn interrupts_from_user_space() {
    let v = VcpuFixture::new();
    assert_eq!(
        v.set(KVM_INTERRUPT, &kvm_interrupt { irq: 256 }),
        Err(Errno::EINVAL)
    );
    for irq in [0x20, 0x30] {
        assert_eq!(v.set(KVM_INTERRUPT, &kvm_interrupt { irq }), Ok(0));
        let e = events(&v);
        assert_eq!((e.interrupt.injected, u32::from(e.interrupt.nr)), (1, irq));
    }
    let bitmap = v.get::<kvm_sregs>(KVM_GET_SREGS).interrupt_bitmap;
    assert_eq!(bitmap, [1 << 0x30, 0, 0, 0]);

    let v = VcpuFixture::with_irqchip();
    assert_eq!(
        v.set(KVM_INTERRUPT, &kvm_interrupt { irq: 0x20 }),
        Err(Errno::ENXIO)
    );

    let f = Fixture::new();
    let split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        args: [24, 0, 0, 0],
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_ENABLE_CAP, &split), Ok(0));
    let v = VcpuFixture::of(f);
    assert_eq!(v.set(KVM_INTERRUPT, &kvm_interrupt { irq: 0x20 }), Ok(0));
    assert_eq!(
        v.set(KVM_INTERRUPT, &kvm_interrupt { irq: 0x21 }),
        Err(Errno::EEXIST)
    );
}

#[test]
pub fn mp_state() {
    let v = VcpuFixture::new();
    let state = |v: &VcpuFixture| v.get::<kvm_mp_state>(KVM_GET_MP_STATE).mp_state;
    let set = |v: &VcpuFixture, mp_state| v.set(KVM_SET_MP_STATE, &kvm_mp_state { mp_state });
    assert_eq!(state(&v), KVM_MP_STATE_RUNNABLE);
    assert_eq!(set(&v, KVM_MP_STATE_RUNNABLE), Ok(0));
    for other in [
        KVM_MP_STATE_UNINITIALIZED,
        KVM_MP_STATE_INIT_RECEIVED,
        KVM_MP_STATE_HALTED,
        KVM_MP_STATE_SIPI_RECEIVED,
        5,
        99,
    ] {
        assert_eq!(set(&v, other), Err(Errno::EINVAL), "{other}");
    }

    let v = VcpuFixture::with_irqchip();
    for new in [
        KVM_MP_STATE_HALTED,
        KVM_MP_STATE_INIT_RECEIVED,
        KVM_MP_STATE_UNINITIALIZED,
        KVM_MP_STATE_RUNNABLE,
    ] {
        assert_eq!(set(&v, new), Ok(0), "{new}");
        assert_eq!(state(&v), new);
    }
    assert_eq!(set(&v, 99), Err(Errno::EINVAL));
}
