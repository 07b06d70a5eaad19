//! KVM_GET_CLOCK, KVM_SET_CLOCK, the VM's TSC frequency.

use anykvm::Errno;
use anykvm_abi::ioctl::*;
use anykvm_abi::{KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, kvm_clock_data};

use crate::support::*;

#[test]
pub fn set_and_get() {
    let f = Fixture::new();
    let start: kvm_clock_data = f.vm_get(KVM_GET_CLOCK).unwrap();
    assert!(start.clock < 1_000_000_000);
    let set = kvm_clock_data {
        clock: 1 << 50,
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_SET_CLOCK, &set), Ok(0));
    let now: kvm_clock_data = f.vm_get(KVM_GET_CLOCK).unwrap();
    assert!((1 << 50..(1 << 50) + 1_000_000_000).contains(&now.clock));
    // What KVM_GET_CLOCK gives may be handed back.
    assert_eq!(f.vm_with(KVM_SET_CLOCK, &now), Ok(0));
    for flags in [1, 1 << 4, 1 << 31] {
        let bad = kvm_clock_data {
            clock: 5,
            flags,
            ..Default::default()
        };
        assert_eq!(f.vm_with(KVM_SET_CLOCK, &bad), Err(Errno::EINVAL));
    }
    assert!(f.vm_get::<kvm_clock_data>(KVM_GET_CLOCK).unwrap().clock >= 1 << 50);
}

#[test]
pub fn realtime_adds_what_has_passed() {
    let f = Fixture::new();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let saved = kvm_clock_data {
        clock: 1_000_000_000,
        flags: KVM_CLOCK_REALTIME,
        realtime: now.as_nanos() as u64 - 3_600_000_000_000,
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_SET_CLOCK, &saved), Ok(0));
    let clock = f.vm_get::<kvm_clock_data>(KVM_GET_CLOCK).unwrap().clock;
    assert!(
        (3_601_000_000_000..3_602_000_000_000).contains(&clock),
        "{clock}"
    );
}

#[test]
pub fn flags_tell_what_is_filled_in() {
    software_only!();
    let f = Fixture::new();
    let data: kvm_clock_data = f.vm_get(KVM_GET_CLOCK).unwrap();
    let stable = f.inner().clock().host().stable;
    assert_eq!(data.flags & KVM_CLOCK_TSC_STABLE != 0, stable);
    assert_eq!(data.realtime != 0 && data.host_tsc != 0, stable);
}

#[test]
pub fn tsc_frequency() {
    let f = Fixture::new();
    let host = f.vm(KVM_GET_TSC_KHZ, 0).unwrap();
    assert!(host > 100_000);
    for too_high in [i32::MAX as u64, u64::from(u32::MAX)] {
        assert_eq!(f.vm(KVM_SET_TSC_KHZ, too_high), Err(Errno::EINVAL));
    }
    assert_eq!(f.vm(KVM_SET_TSC_KHZ, 2_000_000), Ok(0));
    assert_eq!(f.vm(KVM_GET_TSC_KHZ, 0), Ok(2_000_000));
    assert_eq!(f.vm(KVM_SET_TSC_KHZ, 0), Ok(0));
    assert_eq!(f.vm(KVM_GET_TSC_KHZ, 0), Ok(host));
    let _vcpu = f.vcpu(0).unwrap();
    assert_eq!(f.vm(KVM_SET_TSC_KHZ, 1_000_000), Err(Errno::EINVAL));
}
