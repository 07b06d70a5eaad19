//! `kvm_steal_time.preempted` and KVM_FEATURE_PV_TLB_FLUSH: when a guest sees that a processor does not run, and
//! the TLB flush that is left to it.

use std::mem::offset_of;
use std::time::{Duration, Instant};

use anykvm::{Errno, VcpuStat};
use anykvm_abi::ioctl::*;
use anykvm_abi::*;
use anykvm_cpu::memory::mapping::Mapping;

use crate::support::*;
use crate::vcpu::VcpuFixture;

const CODE: u64 = 0x1000;
const PML4: u64 = 0x2000;
const TABLE: u64 = 0x5000;
/// Two pages of data.
const PAGES: [u64; 2] = [0x6000, 0x7000];
/// Where the guest sees one of them.
const WINDOW: u64 = 0x8000;
/// `struct kvm_steal_time`.
const STEAL_TIME: usize = 0x9040;
const PREEMPTED: usize = STEAL_TIME + 16;
const RAM: usize = 0xa000;

fn guest(f: Fixture, code: &[u8]) -> (VcpuFixture, Mapping) {
    let ram = ram(RAM / 4096);
    ram.write_bytes(CODE as usize, code);
    let region = kvm_userspace_memory_region {
        memory_size: RAM as u64,
        userspace_addr: ram.address(),
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_SET_USER_MEMORY_REGION, &region), Ok(0));
    let v = VcpuFixture::of(f);
    let mut sregs: kvm_sregs = v.get(KVM_GET_SREGS);
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    assert_eq!(v.set(KVM_SET_SREGS, &sregs), Ok(0));
    let regs = kvm_regs {
        rip: CODE,
        rsp: 0x800,
        rflags: 2,
        ..Default::default()
    };
    assert_eq!(v.set(KVM_SET_REGS, &regs), Ok(0));
    let steal_time = kvm_msr_entry {
        index: MSR_KVM_STEAL_TIME,
        data: STEAL_TIME as u64 | 1,
        ..Default::default()
    };
    assert_eq!(v.list(KVM_SET_MSRS, &[steal_time]).0, Ok(1));
    (v, ram)
}

/// Whether the host counts run delay, without which there is no stolen time.
fn measured(f: &Fixture) -> bool {
    f.system(KVM_CHECK_EXTENSION, KVM_CAP_STEAL_TIME.into()) == Ok(1)
}

fn stat(v: &VcpuFixture, stat: VcpuStat) -> u64 {
    v.inner().stats().get(stat as usize)
}

/// 64-bit mode with small pages.
fn enter_long_mode(v: &VcpuFixture, ram: &Mapping) {
    for (at, entry) in [
        (PML4, PML4 + 0x1007),
        (PML4 + 0x1000, PML4 + 0x2007),
        (PML4 + 0x2000, TABLE | 7),
    ] {
        ram.write(at as usize, entry);
    }
    for n in 0..RAM as u64 >> 12 {
        ram.write((TABLE + n * 8) as usize, n << 12 | 7);
    }
    let mut sregs: kvm_sregs = v.get(KVM_GET_SREGS);
    let segment = |type_, l: u8| kvm_segment {
        limit: u32::MAX,
        selector: 8,
        type_,
        present: 1,
        s: 1,
        l,
        db: 1 - l,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(11, 1);
    for s in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        *s = segment(3, 0);
    }
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, PML4, 0x20, 0x500);
    assert_eq!(v.set(KVM_SET_SREGS, &sregs), Ok(0));
}

#[test]
pub fn a_flush_is_left_to_a_processor_that_was_interrupted() {
    software_only!();
    let f = Fixture::new();
    if !measured(&f) {
        return;
    }
    // mov al, [WINDOW]; out 0x10, al; jmp back
    let code = [0x8a, 0x04, 0x25, 0, 0x80, 0, 0, 0xe6, 0x10, 0xeb, 0xf5];
    let (v, ram) = guest(f, &code);
    enter_long_mode(&v, &ram);
    let show = |page: u64| ram.write((TABLE + (WINDOW >> 12) * 8) as usize, page | 7);
    show(PAGES[0]);
    for (n, page) in PAGES.iter().enumerate() {
        ram.write(*page as usize, n as u8 + 1);
    }
    let run_page = v.page();
    let seen = || {
        assert_eq!(v.call(KVM_RUN, 0), Ok(0));
        v.get::<kvm_regs>(KVM_GET_REGS).rax as u8
    };
    let interrupt = || {
        run_page.write(offset_of!(kvm_run, immediate_exit), 1u8);
        assert_eq!(v.call(KVM_RUN, 0), Err(Errno::EINTR));
        run_page.write(offset_of!(kvm_run, immediate_exit), 0u8);
    };
    let preempted = || ram.read::<u8>(PREEMPTED);
    assert_eq!(seen(), 1);
    // In the middle of OUT: its exit says nothing.
    assert_eq!(preempted(), 0);
    interrupt();
    assert_eq!(preempted(), KVM_VCPU_PREEMPTED);
    // Another processor changes the table.
    show(PAGES[1]);
    ram.write(PREEMPTED, KVM_VCPU_PREEMPTED | KVM_VCPU_FLUSH_TLB);
    // It is not forgotten when KVM_RUN ends again at once.
    interrupt();
    assert_eq!(preempted(), KVM_VCPU_PREEMPTED | KVM_VCPU_FLUSH_TLB);
    assert_eq!(stat(&v, VcpuStat::TlbFlushes), 0);
    assert_eq!(seen(), 2);
    assert_eq!(preempted(), 0);
    assert_eq!(stat(&v, VcpuStat::TlbFlushes), 1);
    assert_eq!(stat(&v, VcpuStat::PreemptionReported), 1);
    // Nothing asked for, nothing flushed.
    interrupt();
    assert_eq!(seen(), 2);
    assert_eq!(stat(&v, VcpuStat::TlbFlushes), 1);
    assert_eq!(stat(&v, VcpuStat::PreemptionReported), 2);
}

#[test]
pub fn a_processor_that_sleeps_in_hlt_is_not_marked() {
    software_only!();
    let f = Fixture::with_irqchip();
    if !measured(&f) {
        return;
    }
    // hlt; the handler of vector 2: out 0x11, al
    let (v, ram) = guest(f, &[0xf4, 0xe6, 0x11]);
    ram.write(8, CODE as u32 + 1);
    let vcpu = v.inner();
    std::thread::scope(|scope| {
        let runs = scope.spawn(|| vcpu.run());
        let end = Instant::now() + Duration::from_secs(10);
        while stat(&v, VcpuStat::HaltSleeps) == 0 {
            assert!(Instant::now() < end, "it does not sleep");
            std::thread::yield_now();
        }
        assert_eq!(ram.read::<u8>(PREEMPTED), 0);
        // An NMI for APIC 0.
        let msi = kvm_msi {
            address_lo: 0xfee0_0000,
            data: 4 << 8,
            ..Default::default()
        };
        assert_eq!(v.f.vm_with(KVM_SIGNAL_MSI, &msi), Ok(1));
        assert_eq!(runs.join().unwrap(), Ok(()));
    });
    let reason: u32 = v.page().read(offset_of!(kvm_run, exit_reason));
    assert_eq!(reason, KVM_EXIT_IO);
    assert_eq!(stat(&v, VcpuStat::PreemptionReported), 0);
}
