//! KVM_RUN through the ioctl interface and the mapped run page.

use std::mem::offset_of;

use anykvm::Errno;
use anykvm_abi::ioctl::*;
use anykvm_abi::*;

use crate::vcpu::VcpuFixture;

#[test]
pub fn argument_must_be_zero() {
    let v = VcpuFixture::new();
    assert_eq!(v.call(KVM_RUN, 1), Err(Errno::EINVAL));
}

#[test]
pub fn immediate_exit_enters_nothing() {
    let v = VcpuFixture::new();
    let page = v.page();
    page.write(offset_of!(kvm_run, immediate_exit), 1u8);
    page.write(offset_of!(kvm_run, exit_reason), KVM_EXIT_MMIO);
    for _ in 0..3 {
        assert_eq!(v.call(KVM_RUN, 0), Err(Errno::EINTR));
        // The last exit's reason stays readable.
        let reason: u32 = page.read(offset_of!(kvm_run, exit_reason));
        assert_eq!(reason, KVM_EXIT_MMIO);
    }
    assert_eq!(v.get::<kvm_regs>(KVM_GET_REGS).rip, 0xfff0);
    let apic_base: u64 = page.read(offset_of!(kvm_run, apic_base));
    assert_eq!(apic_base, 0xfee0_0900);
}

#[test]
pub fn cr8_goes_in_and_out_without_an_irqchip() {
    let v = VcpuFixture::new();
    let page = v.page();
    page.write(offset_of!(kvm_run, immediate_exit), 1u8);
    page.write(offset_of!(kvm_run, cr8), 7u64);
    assert_eq!(v.call(KVM_RUN, 0), Err(Errno::EINTR));
    assert_eq!(v.get::<kvm_sregs>(KVM_GET_SREGS).cr8, 7);
    page.write(offset_of!(kvm_run, cr8), 16u64);
    assert_eq!(v.call(KVM_RUN, 0), Err(Errno::EINVAL));
    assert_eq!(v.get::<kvm_sregs>(KVM_GET_SREGS).cr8, 7);
}

#[test]
pub fn unknown_synchronised_registers_are_refused() {
    let v = VcpuFixture::new();
    let page = v.page();
    for field in [
        offset_of!(kvm_run, kvm_valid_regs),
        offset_of!(kvm_run, kvm_dirty_regs),
    ] {
        page.write(field, 8u64);
        assert_eq!(v.call(KVM_RUN, 0), Err(Errno::EINVAL));
        page.write(field, 0u64);
    }
    page.write(offset_of!(kvm_run, immediate_exit), 1u8);
    page.write(offset_of!(kvm_run, kvm_valid_regs), 7u64);
    assert_eq!(v.call(KVM_RUN, 0), Err(Errno::EINTR));
    let mut bytes = [0; size_of::<kvm_regs>()];
    page.read_bytes(offset_of!(kvm_run, s), &mut bytes);
    let regs = kvm_regs::from_bytes(&bytes).unwrap();
    assert_eq!(regs, v.get::<kvm_regs>(KVM_GET_REGS));
}

#[test]
pub fn application_processors_begin_uninitialised() {
    let v = VcpuFixture::with_irqchip();
    let ap = v.f.vcpu(1).unwrap();
    let at = v.f.user.room(4);
    ap.call(KVM_GET_MP_STATE, at, &v.f.user).unwrap();
    let state: kvm_mp_state = v.f.user.value(at);
    assert_eq!(state.mp_state, KVM_MP_STATE_UNINITIALIZED);
}
