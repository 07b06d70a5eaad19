//! KVM_SET_CPUID2, KVM_GET_CPUID2, KVM_GET_MSRS, KVM_SET_MSRS.

use std::mem::offset_of;

use anykvm::{Errno, UserMemory};
use anykvm_abi::ioctl::*;
use anykvm_abi::*;

use crate::vcpu::VcpuFixture;

const APIC_BASE: u32 = 0x1b;
const PAT: u32 = 0x277;
const LSTAR: u32 = 0xc000_0082;

fn leaf(function: u32, eax: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        eax,
        ..Default::default()
    }
}

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

#[test]
pub fn cpuid_round_trip() {
    let v = VcpuFixture::new();
    let entries = [leaf(0, 1), leaf(1, 0x600), leaf(0x4000_0000, 0x4000_0001)];
    assert_eq!(v.list(KVM_SET_CPUID2, &entries).0, Ok(0));
    let (result, back) = v.list(KVM_GET_CPUID2, &[leaf(99, 99); 3]);
    assert_eq!(result, Ok(0));
    assert_eq!((back[0], back[2]), (entries[0], entries[2]));
    // The APIC flag follows IA32_APIC_BASE.
    assert_eq!((back[1].eax, back[1].edx), (0x600, 1 << 9));
    assert_eq!(
        v.list(KVM_GET_CPUID2, &[leaf(99, 99); 2]).0,
        Err(Errno::E2BIG)
    );
}

#[test]
pub fn bad_cpuid_changes_nothing() {
    let v = VcpuFixture::new();
    assert_eq!(v.list(KVM_SET_CPUID2, &[leaf(0, 7)]).0, Ok(0));
    let wrong_width = leaf(0x8000_0008, 47 << 8 | 40);
    assert_eq!(
        v.list(KVM_SET_CPUID2, &[leaf(0, 8), wrong_width]).0,
        Err(Errno::EINVAL)
    );
    let too_many = vec![leaf(0, 9); 257];
    assert_eq!(v.list(KVM_SET_CPUID2, &too_many).0, Err(Errno::E2BIG));
    assert_eq!(v.list(KVM_GET_CPUID2, &[leaf(0, 0)]).1, [leaf(0, 7)]);
}

#[test]
pub fn after_the_first_run_only_the_same_cpuid_is_taken() {
    let v = VcpuFixture::new();
    let features = leaf(1, 0x600);
    assert_eq!(v.list(KVM_SET_CPUID2, &[leaf(0, 7)]).0, Ok(0));
    let page = v.page();
    page.write(offset_of!(kvm_run, immediate_exit), 1u8);
    assert_eq!(v.call(KVM_RUN, 0), Err(Errno::EINTR));
    page.write(offset_of!(kvm_run, immediate_exit), 0u8);
    // Nothing has run yet.
    assert_eq!(v.list(KVM_SET_CPUID2, &[leaf(0, 8), features]).0, Ok(0));
    // At the reset vector there is no memory: the fetch fails, but the vCPU has run.
    let _ = v.call(KVM_RUN, 0);
    assert_eq!(v.list(KVM_SET_CPUID2, &[leaf(0, 8), features]).0, Ok(0));
    // With the bits that follow the processor's state, as it is read.
    let read = v.list(KVM_GET_CPUID2, &[leaf(0, 0); 2]).1;
    assert_ne!(read[1], features);
    assert_eq!(v.list(KVM_SET_CPUID2, &read).0, Ok(0));
    assert_eq!(
        v.list(KVM_SET_CPUID2, &[leaf(0, 9), features]).0,
        Err(Errno::EINVAL)
    );
}

#[test]
pub fn msrs_stop_at_the_first_bad_one() {
    let v = VcpuFixture::new();
    let pat = 0x0007_0406_0007_0406;
    let set = [
        msr(LSTAR, 0xffff_8000_0000_1000),
        msr(0xdead, 1),
        msr(PAT, 0),
    ];
    assert_eq!(v.list(KVM_SET_MSRS, &set).0, Ok(1));
    let (n, got) = v.list(
        KVM_GET_MSRS,
        &[msr(LSTAR, 0), msr(PAT, 0), msr(0xdead, 7), msr(PAT, 5)],
    );
    assert_eq!(n, Ok(2));
    assert_eq!(
        (got[0].data, got[1].data, got[2].data, got[3].data),
        (0xffff_8000_0000_1000, pat, 7, 5)
    );
    // A value the register cannot have.
    assert_eq!(v.list(KVM_SET_MSRS, &[msr(PAT, 2)]).0, Ok(0));
    assert_eq!(v.list(KVM_SET_MSRS, &[msr(APIC_BASE, 1)]).0, Ok(0));
    assert_eq!(v.list(KVM_SET_MSRS, &vec![msr(PAT, pat); 255]).0, Ok(255));
    assert_eq!(
        v.list(KVM_SET_MSRS, &vec![msr(PAT, pat); 256]).0,
        Err(Errno::E2BIG)
    );
    assert_eq!(
        v.list(KVM_GET_MSRS, &vec![msr(PAT, pat); 256]).0,
        Err(Errno::E2BIG)
    );
}

#[test]
pub fn the_clock_msrs_of_kvm() {
    let v = VcpuFixture::new();
    for index in [MSR_KVM_SYSTEM_TIME, MSR_KVM_SYSTEM_TIME_NEW] {
        assert_eq!(v.list(KVM_SET_MSRS, &[msr(index, 0x5001)]).0, Ok(1));
        assert_eq!(v.list(KVM_GET_MSRS, &[msr(index, 0)]).1[0].data, 0x5001);
    }
    assert_eq!(v.call(KVM_KVMCLOCK_CTRL, 0), Ok(0));
    assert_eq!(
        v.list(KVM_SET_MSRS, &[msr(MSR_KVM_SYSTEM_TIME, 0)]).0,
        Ok(1)
    );
    assert_eq!(v.call(KVM_KVMCLOCK_CTRL, 0), Err(Errno::EINVAL));
    assert_eq!(
        v.list(KVM_SET_MSRS, &[msr(MSR_KVM_POLL_CONTROL, 2)]).0,
        Ok(0)
    );
}

#[test]
pub fn the_tsc_goes_on_from_what_is_set() {
    let v = VcpuFixture::new();
    assert_eq!(v.list(KVM_SET_MSRS, &[msr(0x10, 1 << 40)]).0, Ok(1));
    let now = v.list(KVM_GET_MSRS, &[msr(0x10, 0)]).1[0].data;
    assert!((1 << 40..(1 << 40) + (1 << 33)).contains(&now), "{now:#x}");
}

/// KVM_SET_CPUID: entries without index.
#[test]
pub fn the_first_form_of_cpuid() {
    let v = VcpuFixture::new();
    let entry = |function, eax| kvm_cpuid_entry {
        function,
        eax,
        ..Default::default()
    };
    let entries = [entry(0, 1), entry(0x8000_0000, 0x8000_0001)];
    assert_eq!(v.list(KVM_SET_CPUID, &entries).0, Ok(0));
    let back = v.list(KVM_GET_CPUID2, &[leaf(9, 9); 2]).1;
    assert_eq!(back, [leaf(0, 1), leaf(0x8000_0000, 0x8000_0001)]);
    let too_many = vec![entry(0, 2); 257];
    assert_eq!(v.list(KVM_SET_CPUID, &too_many).0, Err(Errno::E2BIG));
    let wrong_width = kvm_cpuid_entry {
        eax: 47 << 8 | 40,
        ..entry(0x8000_0008, 0)
    };
    assert_eq!(v.list(KVM_SET_CPUID, &[wrong_width]).0, Err(Errno::EINVAL));
    assert_eq!(v.list(KVM_GET_CPUID2, &[leaf(9, 9); 2]).1, back);
}

/// A list whose entries lead out of memory: nothing of it is taken.
#[test]
pub fn lists_that_end_nowhere() {
    let v = VcpuFixture::new();
    let before = v.list(KVM_GET_MSRS, &[msr(LSTAR, 1)]).1;
    let user = &v.f.user;
    for (request, entry) in [
        (KVM_SET_MSRS, size_of::<kvm_msr_entry>()),
        (KVM_GET_MSRS, size_of::<kvm_msr_entry>()),
        (KVM_SET_CPUID, size_of::<kvm_cpuid_entry>()),
        (KVM_SET_CPUID2, size_of::<kvm_cpuid_entry2>()),
    ] {
        let at = user.end() - 8 - entry as u64;
        user.write(at, [2u32, 0].as_bytes()).unwrap();
        let first = [u64::from(LSTAR), 0x1234_0000, 0, 0, 0];
        user.write(at + 8, &first.as_bytes()[..entry]).unwrap();
        assert_eq!(v.call(request, at), Err(Errno::EFAULT), "{request:#x}");
    }
    assert_eq!(v.list(KVM_GET_MSRS, &[msr(LSTAR, 1)]).1, before);
    for count in [u32::MAX, 1 << 31, 257] {
        let at = user.at(&[count, 0]);
        for request in [KVM_SET_MSRS, KVM_GET_MSRS, KVM_SET_CPUID, KVM_SET_CPUID2] {
            assert_eq!(v.call(request, at), Err(Errno::E2BIG), "{count}");
        }
    }
}
