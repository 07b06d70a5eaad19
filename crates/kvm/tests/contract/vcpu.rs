//! A vCPU to test with, and what holds for all its ioctls.

use anykvm::{Errno, Object, ObjectKind, UserMemory, Vcpu};
use anykvm_abi::ioctl::*;
use anykvm_abi::*;
use anykvm_cpu::memory::mapping::Mapping;

use crate::support::*;

/// A VM with one vCPU.
pub struct VcpuFixture {
    pub f: Fixture,
    pub vcpu: Handle,
}

impl VcpuFixture {
    pub fn of(f: Fixture) -> Self {
        let vcpu = f.vcpu(0).unwrap();
        Self { f, vcpu }
    }
    pub fn new() -> Self {
        Self::of(Fixture::new())
    }
    pub fn with_irqchip() -> Self {
        Self::of(Fixture::with_irqchip())
    }
    pub fn inner(&self) -> &Vcpu {
        match &self.vcpu {
            Handle::Object(Object::Vcpu(vcpu)) => vcpu,
            other => panic!("not a vCPU of this crate: {other:?}"),
        }
    }
    /// An ioctl with this number or pointer.
    pub fn call(&self, request: u32, arg: u64) -> Result<i32, Errno> {
        self.vcpu.call(request, arg, &self.f.user)
    }
    /// An ioctl with this argument behind the pointer.
    pub fn set<T: Plain>(&self, request: u32, arg: &T) -> Result<i32, Errno> {
        let at = self.f.user.at(arg);
        self.call(request, at)
    }
    /// An ioctl that fills a structure.
    pub fn get<T: Plain>(&self, request: u32) -> T {
        let at = self.f.user.room(size_of::<T>());
        assert_eq!(self.call(request, at), Ok(0));
        self.f.user.value(at)
    }
    /// An ioctl on a flexible array: count, padding, entries. The result and the entries after it.
    pub fn list<T: Plain>(&self, request: u32, entries: &[T]) -> (Result<i32, Errno>, Vec<T>) {
        let at = self.f.user.array(&[entries.len() as u32, 0], entries);
        let result = self.call(request, at);
        let after = (0..entries.len()).map(|i| {
            let offset = 8 + i * size_of::<T>();
            self.f.user.value(at + offset as u64)
        });
        (result, after.collect())
    }
    /// `struct kvm_run` and the data page.
    pub fn page(&self) -> Mapping {
        Mapping::new(self.vcpu.fd(), 0, 8192).unwrap()
    }
}

#[test]
pub fn pointers_to_nowhere_fault() {
    let v = VcpuFixture::with_irqchip();
    for request in [
        KVM_GET_REGS,
        KVM_SET_REGS,
        KVM_GET_SREGS,
        KVM_SET_SREGS,
        KVM_GET_SREGS2,
        KVM_SET_SREGS2,
        KVM_GET_FPU,
        KVM_SET_FPU,
        KVM_GET_XSAVE,
        KVM_SET_XSAVE,
        KVM_GET_XSAVE2,
        KVM_GET_XCRS,
        KVM_SET_XCRS,
        KVM_GET_DEBUGREGS,
        KVM_SET_DEBUGREGS,
        KVM_SET_GUEST_DEBUG,
        KVM_TRANSLATE,
        KVM_GET_VCPU_EVENTS,
        KVM_SET_VCPU_EVENTS,
        KVM_GET_MP_STATE,
        KVM_SET_MP_STATE,
        KVM_INTERRUPT,
        KVM_SET_CPUID,
        KVM_SET_CPUID2,
        KVM_GET_CPUID2,
        KVM_GET_MSRS,
        KVM_SET_MSRS,
        KVM_GET_LAPIC,
        KVM_SET_LAPIC,
        KVM_TPR_ACCESS_REPORTING,
        KVM_SET_VAPIC_ADDR,
        KVM_X86_SETUP_MCE,
        KVM_X86_SET_MCE,
        KVM_HAS_DEVICE_ATTR,
        KVM_GET_DEVICE_ATTR,
        KVM_SET_DEVICE_ATTR,
        KVM_ENABLE_CAP,
    ] {
        for pointer in [0, NOWHERE, u64::MAX] {
            let name = name(request).unwrap_or("?");
            assert_eq!(
                v.call(request, pointer),
                Err(Errno::EFAULT),
                "{name} at {pointer:#x}"
            );
        }
    }
}

#[test]
pub fn unknown_ioctls_are_einval() {
    let v = VcpuFixture::new();
    for request in [0, 0xae00, 0xaeff, 0xdead_beef, KVM_CREATE_VCPU] {
        assert_eq!(v.call(request, 0), Err(Errno::EINVAL), "{request:#x}");
    }
}

#[test]
pub fn signal_mask() {
    let v = VcpuFixture::new();
    let mask = v.f.user.array(&8u32, &[0x1234_5678u32, 0]);
    assert_eq!(v.call(KVM_SET_SIGNAL_MASK, mask), Ok(0));
    for len in [0u32, 4, 16] {
        let bad = v.f.user.array(&len, &[1u32, 1]);
        assert_eq!(v.call(KVM_SET_SIGNAL_MASK, bad), Err(Errno::EINVAL));
    }
    assert_eq!(v.call(KVM_SET_SIGNAL_MASK, NOWHERE), Err(Errno::EFAULT));
    let before = (!on_device()).then(|| v.inner().signal_mask());
    assert_eq!(v.call(KVM_SET_SIGNAL_MASK, 0), Ok(0));
    software_only!();
    assert_eq!(before, Some(Some(0x1234_5678)));
    assert_eq!(v.inner().signal_mask(), None);
}

#[test]
pub fn tsc_frequency_and_offset() {
    let v = VcpuFixture::new();
    let host = v.call(KVM_GET_TSC_KHZ, 0).unwrap();
    assert!(host > 100_000);
    assert_eq!(v.call(KVM_SET_TSC_KHZ, 1_000_000), Ok(0));
    assert_eq!(v.call(KVM_GET_TSC_KHZ, 0), Ok(1_000_000));
    assert_eq!(v.call(KVM_SET_TSC_KHZ, 0), Ok(0));
    assert_eq!(v.call(KVM_GET_TSC_KHZ, 0), Ok(host));

    for too_high in [i32::MAX as u64, u64::from(u32::MAX)] {
        assert_eq!(v.call(KVM_SET_TSC_KHZ, too_high), Err(Errno::EINVAL));
    }
    assert_eq!(v.call(KVM_GET_TSC_KHZ, 0), Ok(host));

    let offset = v.f.user.at(&0x1234_0000u64);
    let attr = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: offset,
    };
    assert_eq!(v.set(KVM_HAS_DEVICE_ATTR, &attr), Ok(0));
    assert_eq!(v.set(KVM_SET_DEVICE_ATTR, &attr), Ok(0));
    let back = kvm_device_attr {
        addr: v.f.user.room(8),
        ..attr
    };
    assert_eq!(v.set(KVM_GET_DEVICE_ATTR, &back), Ok(0));
    assert_eq!(v.f.user.value::<u64>(back.addr), 0x1234_0000);
    let unknown = kvm_device_attr { attr: 9, ..attr };
    for request in [
        KVM_HAS_DEVICE_ATTR,
        KVM_GET_DEVICE_ATTR,
        KVM_SET_DEVICE_ATTR,
    ] {
        assert_eq!(v.set(request, &unknown), Err(Errno::ENXIO));
    }
}

#[test]
pub fn capabilities_of_a_vcpu() {
    let v = VcpuFixture::new();
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        args: [1, 0, 0, 0],
        ..Default::default()
    };
    assert_eq!(v.set(KVM_ENABLE_CAP, &cap), Ok(0));
    cap.flags = 1;
    assert_eq!(v.set(KVM_ENABLE_CAP, &cap), Err(Errno::EINVAL));
    cap = kvm_enable_cap {
        cap: 60000,
        ..Default::default()
    };
    assert_eq!(v.set(KVM_ENABLE_CAP, &cap), Err(Errno::EINVAL));
}

#[test]
pub fn local_apic_and_vapic_need_an_irqchip() {
    let v = VcpuFixture::new();
    let lapic = v.f.user.room(1024);
    let vapic = v.f.user.at(&kvm_vapic_addr { vapic_addr: 0x1000 });
    assert_eq!(v.call(KVM_GET_LAPIC, lapic), Err(Errno::EINVAL));
    assert_eq!(v.call(KVM_SET_LAPIC, lapic), Err(Errno::EINVAL));
    assert_eq!(v.call(KVM_SET_VAPIC_ADDR, vapic), Err(Errno::EINVAL));

    let v = VcpuFixture::with_irqchip();
    let state: kvm_lapic_state = v.get(KVM_GET_LAPIC);
    assert_eq!(v.set(KVM_SET_LAPIC, &state), Ok(0));
    let again: kvm_lapic_state = v.get(KVM_GET_LAPIC);
    assert_eq!(state.regs, again.regs);
    let off = kvm_vapic_addr { vapic_addr: 0 };
    assert_eq!(v.set(KVM_SET_VAPIC_ADDR, &off), Ok(0));
    let not_ram = kvm_vapic_addr {
        vapic_addr: 0x4000_0000,
    };
    assert_eq!(v.set(KVM_SET_VAPIC_ADDR, &not_ram), Err(Errno::EINVAL));
}

#[test]
pub fn tpr_access_reporting() {
    let v = VcpuFixture::with_irqchip();
    let mut control = kvm_tpr_access_ctl {
        enabled: 1,
        ..Default::default()
    };
    assert_eq!(v.set(KVM_TPR_ACCESS_REPORTING, &control), Ok(0));
    control.flags = 1;
    assert_eq!(
        v.set(KVM_TPR_ACCESS_REPORTING, &control),
        Err(Errno::EINVAL)
    );
}

#[test]
pub fn machine_check() {
    let v = VcpuFixture::new();
    for bad in [0u64, 33, 10 | 1 << 40] {
        assert_eq!(v.set(KVM_X86_SETUP_MCE, &bad), Err(Errno::EINVAL));
    }
    assert_eq!(v.set(KVM_X86_SETUP_MCE, &(10u64 | 1 << 8 | 1 << 24)), Ok(0));
    let mut mce = kvm_x86_mce {
        status: 1 << 63,
        bank: 10,
        ..Default::default()
    };
    assert_eq!(v.set(KVM_X86_SET_MCE, &mce), Err(Errno::EINVAL));
    mce.bank = 9;
    assert_eq!(v.set(KVM_X86_SET_MCE, &mce), Ok(0));
    mce.status = 0;
    assert_eq!(v.set(KVM_X86_SET_MCE, &mce), Err(Errno::EINVAL));
}

#[test]
pub fn statistics_are_live() {
    let v = VcpuFixture::new();
    let stats = v.vcpu.make(KVM_GET_STATS_FD, 0, &v.f.user).unwrap();
    assert_eq!(stats.kind(), ObjectKind::Stats);
    software_only!();
    let Handle::Object(Object::Stats(stats)) = stats else {
        panic!("not statistics");
    };
    let value = |name: &str| stats.values().iter().find(|(n, _)| *n == name).unwrap().1;
    let before = value("exits");
    v.page().write(1, 1u8);
    assert_eq!(v.call(KVM_RUN, 0), Err(Errno::EINTR));
    assert_eq!(value("exits"), before + 1);
}

#[test]
pub fn guest_debug() {
    let v = VcpuFixture::new();
    let control = |control| kvm_guest_debug {
        control,
        ..Default::default()
    };
    let all =
        v.f.system(KVM_CHECK_EXTENSION, KVM_CAP_SET_GUEST_DEBUG2.into());
    let modes = all.unwrap() as u32 & !(KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP);
    assert_eq!(v.set(KVM_SET_GUEST_DEBUG, &control(modes)), Ok(0));
    assert_eq!(v.set(KVM_SET_GUEST_DEBUG, &control(0)), Ok(0));
    let inject = control(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_INJECT_DB);
    assert_eq!(v.set(KVM_SET_GUEST_DEBUG, &inject), Ok(0));
    // One is pending already.
    assert_eq!(v.set(KVM_SET_GUEST_DEBUG, &inject), Err(Errno::EBUSY));
    let events: kvm_vcpu_events = v.get(KVM_GET_VCPU_EVENTS);
    assert_eq!((events.exception.injected, events.exception.nr), (1, 1));
}

#[test]
pub fn nested_state_says_that_there_is_none() {
    let v = VcpuFixture::new();
    let size = v.f.system(KVM_CHECK_EXTENSION, KVM_CAP_NESTED_STATE.into());
    let size = size.unwrap() as u32;
    let at = v.f.user.room(size as usize);
    let with_room = |n: u32| {
        v.f.user.write(at + 4, n.as_bytes()).unwrap();
        v.call(KVM_GET_NESTED_STATE, at)
    };
    assert_eq!(with_room(0), Err(Errno::E2BIG));
    // It says how much is needed.
    assert_eq!(v.f.user.value::<u32>(at + 4), size);
    assert_eq!(with_room(size), Ok(0));
    assert_eq!(v.call(KVM_SET_NESTED_STATE, at), Ok(0));
    let flags: u16 = v.f.user.value(at);
    // KVM_STATE_NESTED_GUEST_MODE.
    v.f.user.write(at, (flags | 1).as_bytes()).unwrap();
    assert_eq!(v.call(KVM_SET_NESTED_STATE, at), Err(Errno::EINVAL));
    v.f.user.write(at, flags.as_bytes()).unwrap();
    v.f.user.write(at + 4, (size - 1).as_bytes()).unwrap();
    assert_eq!(v.call(KVM_SET_NESTED_STATE, at), Err(Errno::EINVAL));
    for request in [KVM_GET_NESTED_STATE, KVM_SET_NESTED_STATE] {
        assert_eq!(v.call(request, NOWHERE), Err(Errno::EFAULT));
    }
}
