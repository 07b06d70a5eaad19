//! KVM's interface for guests: hypercalls in both widths, and what its MSRs take, show and do
//! (`Documentation/virt/kvm/x86/hypercalls.rst`, `msr.rst`).

use std::mem::offset_of;

use anykvm::Errno;
use anykvm_abi::ioctl::*;
use anykvm_abi::*;
use anykvm_cpu::memory::mapping::Mapping;

use crate::support::*;
use crate::vcpu::VcpuFixture;

const PAGES: usize = 16;
const PML4: u64 = 0x1000;
const CODE: u64 = 0x4000;
const DATA: u64 = 0x5000;
/// Behind the RAM.
const NO_RAM: u64 = 0x10_0000;
const ENABLED: u64 = 1;

/// The code that makes the hypercall.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Protected,
    Long,
}

/// A machine whose first processor makes hypercalls.
struct Guest {
    v: VcpuFixture,
    ram: Mapping,
}

impl Guest {
    fn of(f: Fixture) -> Self {
        let ram = ram(PAGES);
        let region = kvm_userspace_memory_region {
            memory_size: PAGES as u64 * 4096,
            userspace_addr: ram.address(),
            ..Default::default()
        };
        assert_eq!(f.vm_with(KVM_SET_USER_MEMORY_REGION, &region), Ok(0));
        for (at, entry) in [(PML4, 0x2007), (0x2000, 0x3007), (0x3000, 0x87u64)] {
            ram.write(at as usize, entry);
        }
        // vmcall; out 0x10, al
        ram.write_bytes(CODE as usize, &[0x0f, 0x01, 0xc1, 0xe6, 0x10]);
        let v = VcpuFixture::of(f);
        Self { v, ram }
    }

    /// 64-bit or 32-bit code at this privilege level.
    fn enter(&self, mode: Mode, cpl: u8) {
        let mut sregs: kvm_sregs = self.v.get(KVM_GET_SREGS);
        let long = u8::from(mode == Mode::Long);
        let segment = |selector: u16, type_, code: u8| kvm_segment {
            limit: u32::MAX,
            selector: selector | u16::from(cpl),
            type_,
            present: 1,
            dpl: cpl,
            s: 1,
            l: code & long,
            db: 1 - (code & long),
            g: 1,
            ..Default::default()
        };
        sregs.cs = segment(8, 11, 1);
        for s in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            *s = segment(16, 3, 0);
        }
        (sregs.cr0, sregs.cr4, sregs.efer) = match mode {
            Mode::Protected => (0x11, 0, 0),
            Mode::Long => (0x8000_0011, 0x20, 0x500),
        };
        sregs.cr3 = PML4;
        assert_eq!(self.v.set(KVM_SET_SREGS, &sregs), Ok(0));
    }

    /// Makes a hypercall; RAX behind it.
    fn call(&self, nr: u64, [rbx, rcx, rdx, rsi]: [u64; 4]) -> u64 {
        let regs = kvm_regs {
            rip: CODE,
            // IOPL 3, for the port.
            rflags: 0x3002,
            rax: nr,
            rbx,
            rcx,
            rdx,
            rsi,
            ..Default::default()
        };
        assert_eq!(self.v.set(KVM_SET_REGS, &regs), Ok(0));
        assert_eq!(self.v.call(KVM_RUN, 0), Ok(0));
        let reason: u32 = self.v.page().read(offset_of!(kvm_run, exit_reason));
        assert_eq!(reason, KVM_EXIT_IO);
        self.v.get::<kvm_regs>(KVM_GET_REGS).rax
    }

    fn set(&self, index: u32, data: u64) -> bool {
        set_msr(&self.v, index, data)
    }

    fn get(&self, index: u32) -> Option<u64> {
        get_msr(&self.v, index)
    }
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn set_msr(v: &VcpuFixture, index: u32, data: u64) -> bool {
    v.list(KVM_SET_MSRS, &[entry(index, data)]).0 == Ok(1)
}

fn get_msr(v: &VcpuFixture, index: u32) -> Option<u64> {
    let (done, entries) = v.list(KVM_GET_MSRS, &[entry(index, 0)]);
    (done == Ok(1)).then(|| entries[0].data)
}

/// What a hypercall that is refused leaves in RAX.
fn refusal(mode: Mode, error: u32) -> u64 {
    let result = u64::from(error).wrapping_neg();
    match mode {
        Mode::Long => result,
        Mode::Protected => u64::from(result as u32),
    }
}

#[test]
pub fn hypercalls_have_the_width_of_the_code() {
    let g = Guest::of(Fixture::new());
    let poll = u64::from(KVM_HC_VAPIC_POLL_IRQ);
    for mode in [Mode::Protected, Mode::Long] {
        g.enter(mode, 0);
        assert_eq!(g.call(poll, [0; 4]), 0);
        assert_eq!(g.call(100, [0; 4]), refusal(mode, KVM_ENOSYS));
        g.enter(mode, 3);
        assert_eq!(g.call(poll, [0; 4]), refusal(mode, KVM_EPERM));
        assert_eq!(g.call(100, [0; 4]), refusal(mode, KVM_EPERM));
    }
    // The upper half of the number counts in 64-bit code only.
    g.enter(Mode::Protected, 0);
    assert_eq!(g.call(1 << 32 | poll, [0; 4]), 0);
    g.enter(Mode::Long, 0);
    let refused = refusal(Mode::Long, KVM_ENOSYS);
    assert_eq!(g.call(1 << 32 | poll, [0; 4]), refused);
}

#[test]
pub fn clock_pairing() {
    let g = Guest::of(Fixture::new());
    let nr = u64::from(KVM_HC_CLOCK_PAIRING);
    for mode in [Mode::Protected, Mode::Long] {
        g.enter(mode, 0);
        let unsupported = refusal(mode, KVM_EOPNOTSUPP);
        assert_eq!(g.call(nr, [DATA, 1, 0, 0]), unsupported);
        g.ram.write_bytes(DATA as usize, &[0xff; 64]);
        let before = std::time::SystemTime::now();
        let result = g.call(nr, [DATA, 0, 0, 0]);
        if result == unsupported {
            // The host's TSC does not tell the time.
            return;
        }
        assert_eq!(result, 0);
        let [sec, nsec, tsc]: [u64; 3] = [0, 8, 16].map(|at| g.ram.read(DATA as usize + at));
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(sec, nsec as u32);
        assert!(nsec < 1_000_000_000 && time >= before && time <= std::time::SystemTime::now());
        assert!(tsc <= g.get(0x10).unwrap());
        // Flags and padding.
        for at in (24..64).step_by(8) {
            assert_eq!(g.ram.read::<u64>(DATA as usize + at), 0);
        }
        assert_eq!(g.call(nr, [NO_RAM, 0, 0, 0]), refusal(mode, KVM_EFAULT));
    }
}

#[test]
pub fn map_gpa_range() {
    let g = Guest::of(Fixture::new());
    let nr = u64::from(KVM_HC_MAP_GPA_RANGE);
    g.enter(Mode::Long, 0);
    let call = |gpa, pages| g.call(nr, [gpa, pages, 0, 0]);
    assert_eq!(call(0, 1), refusal(Mode::Long, KVM_ENOSYS));
    let cap = kvm_enable_cap {
        cap: KVM_CAP_EXIT_HYPERCALL,
        args: [1 << KVM_HC_MAP_GPA_RANGE, 0, 0, 0],
        ..Default::default()
    };
    assert_eq!(g.v.f.vm_with(KVM_ENABLE_CAP, &cap), Ok(0));
    for (gpa, pages) in [(1, 1), (0, 0), (0x1000, u64::MAX)] {
        assert_eq!(call(gpa, pages), refusal(Mode::Long, KVM_EINVAL));
    }
}

/// Two processors, ids 0 and 33, with their local APICs on.
fn two() -> (Guest, Handle) {
    let g = Guest::of(Fixture::with_irqchip());
    let other = g.v.f.vcpu(33).unwrap();
    for vcpu in [&g.v.vcpu, &other] {
        let mut state = lapic(&g, vcpu);
        // The spurious-interrupt vector register.
        state.regs[0xf1] = 1;
        let at = g.v.f.user.at(&state);
        assert_eq!(vcpu.call(KVM_SET_LAPIC, at, &g.v.f.user), Ok(0));
    }
    (g, other)
}

fn lapic(g: &Guest, vcpu: &Handle) -> kvm_lapic_state {
    let at = g.v.f.user.room(size_of::<kvm_lapic_state>());
    assert_eq!(vcpu.call(KVM_GET_LAPIC, at, &g.v.f.user), Ok(0));
    g.v.f.user.value(at)
}

/// Whether vector 0x45 is in the interrupt-request register.
fn has_0x45(g: &Guest, vcpu: &Handle) -> bool {
    lapic(g, vcpu).regs[0x220] & 1 << 5 != 0
}

#[test]
pub fn send_ipi_by_bitmap() {
    let nr = u64::from(KVM_HC_SEND_IPI);
    for mode in [Mode::Protected, Mode::Long] {
        let none = Guest::of(Fixture::new());
        none.enter(mode, 0);
        let unsupported = refusal(mode, KVM_EOPNOTSUPP);
        assert_eq!(none.call(nr, [1, 0, 0, 0x45]), unsupported);

        let (g, other) = two();
        g.enter(mode, 0);
        let ipi =
            |bitmap: [u64; 2], first: u64, icr: u64| g.call(nr, [bitmap[0], bitmap[1], first, icr]);
        // Destination mode and shorthand are not for the guest to choose.
        for icr in [0x845, 0x4_0045, 0x8_0045] {
            assert_eq!(ipi([1, 0], 0, icr), refusal(mode, KVM_EINVAL));
        }
        // Nobody: no bit, ids that nobody has, ids beyond all there are.
        for (bitmap, first) in [([0, 0], 0), ([0xfffe, 0], 0), ([1, 1], 0x8000_0000)] {
            assert_eq!(ipi(bitmap, first, 0x45), 0);
        }
        assert!(!has_0x45(&g, &g.v.vcpu) && !has_0x45(&g, &other));
        // The second word begins behind 32 or 64 ids. An INIT-free, edge-triggered vector.
        let (far, near) = match mode {
            Mode::Protected => ([0, 2], [1, 0]),
            Mode::Long => ([1 << 33, 0], [1, 0]),
        };
        assert_eq!(ipi(far, 0, 0x45), 1);
        assert!(!has_0x45(&g, &g.v.vcpu) && has_0x45(&g, &other));
        assert_eq!(ipi(near, 0, 0x45), 1);
        assert!(has_0x45(&g, &g.v.vcpu));
        assert_eq!(ipi([1 << 1, 0], 32, 0x46), 1);
        let both = [near[0] | far[0], near[1] | far[1]];
        assert_eq!(ipi(both, 0, 0x47), 2);
    }
}

#[test]
pub fn kicks_and_yields_are_never_refused() {
    for f in [Fixture::new(), Fixture::with_irqchip()] {
        let g = Guest::of(f);
        g.enter(Mode::Long, 0);
        for id in [0, 1, 0xffff_ffff] {
            assert_eq!(g.call(KVM_HC_KICK_CPU.into(), [0, id, 0, 0]), 0);
            assert_eq!(g.call(KVM_HC_SCHED_YIELD.into(), [id, 0, 0, 0]), 0);
        }
    }
}

/// KVM's leaves with these features.
fn kvm_cpuid(features: u32) -> [kvm_cpuid_entry2; 2] {
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    let signature = kvm_cpuid_entry2 {
        function: 0x4000_0000,
        eax: 0x4000_0001,
        ebx: word(b"KVMK"),
        ecx: word(b"VMKV"),
        edx: word(b"M\0\0\0"),
        ..Default::default()
    };
    let features = kvm_cpuid_entry2 {
        function: 0x4000_0001,
        eax: features,
        ..Default::default()
    };
    [signature, features]
}

/// KVM_CAP_ENFORCE_PV_FEATURE_CPUID.
#[test]
pub fn what_cpuid_does_not_announce_is_not_there_when_enforced() {
    let g = Guest::of(Fixture::with_irqchip());
    let cpuid = kvm_cpuid(1 << KVM_FEATURE_CLOCKSOURCE2 | 1 << KVM_FEATURE_PV_UNHALT);
    assert_eq!(g.v.list(KVM_SET_CPUID2, &cpuid).0, Ok(0));
    g.enter(Mode::Protected, 0);
    let yields = || g.call(KVM_HC_SCHED_YIELD.into(), [0; 4]);
    assert_eq!(yields(), 0);
    assert!(g.set(MSR_KVM_POLL_CONTROL, 0));
    let cap = kvm_enable_cap {
        cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        args: [1, 0, 0, 0],
        ..Default::default()
    };
    assert_eq!(g.v.set(KVM_ENABLE_CAP, &cap), Ok(0));
    let refused = refusal(Mode::Protected, KVM_ENOSYS);
    assert_eq!(yields(), refused);
    assert_eq!(g.call(KVM_HC_SEND_IPI.into(), [0; 4]), refused);
    assert_eq!(g.call(KVM_HC_KICK_CPU.into(), [0, 9, 0, 0]), 0);
    assert!(g.set(MSR_KVM_WALL_CLOCK_NEW, 0));
    // A list of all MSRs can still be read and written back.
    software_only!();
    assert_eq!(g.get(MSR_KVM_POLL_CONTROL), Some(0));
    assert!(g.set(MSR_KVM_POLL_CONTROL, 0) && !g.set(MSR_KVM_POLL_CONTROL, 1));
    assert!(g.set(MSR_KVM_SYSTEM_TIME, 0) && !g.set(MSR_KVM_SYSTEM_TIME, DATA | ENABLED));
}

/// A guest that halts for itself cannot be woken by a hypercall.
#[test]
pub fn no_unhalt_without_exits_of_hlt() {
    for (disabled, announced) in [
        (KVM_X86_DISABLE_EXITS_MWAIT, true),
        (KVM_X86_DISABLE_EXITS_HLT, false),
    ] {
        let f = Fixture::with_irqchip();
        let cap = kvm_enable_cap {
            cap: KVM_CAP_X86_DISABLE_EXITS,
            args: [disabled.into(), 0, 0, 0],
            ..Default::default()
        };
        if f.vm_with(KVM_ENABLE_CAP, &cap).is_err() {
            // A host that does not have it.
            continue;
        }
        let v = VcpuFixture::of(f);
        let cpuid = kvm_cpuid(1 << KVM_FEATURE_CLOCKSOURCE2 | 1 << KVM_FEATURE_PV_UNHALT);
        assert_eq!(v.list(KVM_SET_CPUID2, &cpuid).0, Ok(0));
        let entries = v.list(KVM_GET_CPUID2, &cpuid).1;
        let unhalt = entries[1].eax & 1 << KVM_FEATURE_PV_UNHALT != 0;
        assert_eq!(unhalt, announced, "{disabled:#x}");
    }
}

#[test]
pub fn msrs_take_what_is_well_formed_and_possible() {
    const ON: u64 = ENABLED | 1 << 3;
    // The value, and whether it is taken.
    let cases = [
        (MSR_KVM_ASYNC_PF_EN, 0, true),
        (MSR_KVM_ASYNC_PF_EN, DATA | ENABLED, true),
        (MSR_KVM_ASYNC_PF_EN, DATA | ON, true),
        (MSR_KVM_ASYNC_PF_EN, NO_RAM | ON, false),
        (MSR_KVM_ASYNC_PF_EN, NO_RAM | ENABLED, true),
        (MSR_KVM_ASYNC_PF_EN, DATA | 0x10, false),
        (MSR_KVM_ASYNC_PF_EN, DATA | 0x20, false),
        (MSR_KVM_ASYNC_PF_INT, 0xff, true),
        (MSR_KVM_ASYNC_PF_INT, 0, true),
        (MSR_KVM_ASYNC_PF_INT, 0x100, false),
        (MSR_KVM_ASYNC_PF_ACK, 1, true),
        (MSR_KVM_PV_EOI_EN, DATA | ENABLED, true),
        (MSR_KVM_PV_EOI_EN, (DATA + 2) | ENABLED, false),
        (MSR_KVM_PV_EOI_EN, NO_RAM | ENABLED, false),
        (MSR_KVM_PV_EOI_EN, NO_RAM, true),
        (MSR_KVM_POLL_CONTROL, 0, true),
        (MSR_KVM_POLL_CONTROL, 1, true),
        (MSR_KVM_POLL_CONTROL, 2, false),
    ];
    for chip in [false, true] {
        let f = if chip {
            Fixture::with_irqchip()
        } else {
            Fixture::new()
        };
        let g = Guest::of(f);
        for (index, value, taken) in cases {
            let async_pf = [MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_INT].contains(&index);
            if on_device() && async_pf && !chip {
                // Refused there.
                continue;
            }
            let before = g.get(index).unwrap();
            assert_eq!(g.set(index, value), taken, "{index:#x} {value:#x} {chip}");
            let after = match (index, taken) {
                (MSR_KVM_ASYNC_PF_ACK, _) => 0,
                (_, true) => value,
                (_, false) => before,
            };
            // Linux keeps an address that it has refused because it is not RAM.
            if value & NO_RAM == 0 {
                assert_eq!(g.get(index), Some(after), "{index:#x} {value:#x}");
            }
        }
    }
}

#[test]
pub fn the_wall_clock_is_the_machines() {
    let g = Guest::of(Fixture::new());
    let other = g.v.f.vcpu(1).unwrap();
    // A version that is odd is moved on, too.
    for (before, after) in [(0u32, 2u32), (5, 8), (6, 8)] {
        g.ram.write(DATA as usize, before);
        assert!(g.set(MSR_KVM_WALL_CLOCK_NEW, DATA));
        assert_eq!(g.ram.read::<u32>(DATA as usize), after);
        assert_ne!(g.ram.read::<u32>(DATA as usize + 4), 0);
    }
    let user = &g.v.f.user;
    let at = user.array(&[1u32, 0], &[entry(MSR_KVM_WALL_CLOCK, 0)]);
    assert_eq!(other.call(KVM_GET_MSRS, at, user), Ok(1));
    assert_eq!(user.value::<kvm_msr_entry>(at + 8).data, DATA);
}

/// PVCLOCK_GUEST_STOPPED stays until the guest has cleared it.
#[test]
pub fn the_guest_is_told_that_it_was_stopped() {
    let g = Guest::of(Fixture::new());
    g.enter(Mode::Long, 0);
    let enter = || g.call(KVM_HC_VAPIC_POLL_IRQ.into(), [0; 4]);
    let flags = || g.ram.read::<u8>(DATA as usize + 29) & 2;
    assert!(g.set(MSR_KVM_SYSTEM_TIME_NEW, DATA | ENABLED));
    enter();
    assert_eq!(flags(), 0);
    assert_eq!(g.v.call(KVM_KVMCLOCK_CTRL, 0), Ok(0));
    enter();
    assert_eq!(flags(), 2);
    let again = || {
        assert!(g.set(MSR_KVM_SYSTEM_TIME_NEW, DATA | ENABLED));
        enter();
        flags()
    };
    assert_eq!(again(), 2);
    g.ram.write(DATA as usize + 29, 1u8);
    assert_eq!(again(), 0);
}

/// INIT by a message; what leads into the guest's memory is off behind it.
#[test]
pub fn init_switches_off_what_points_to_memory() {
    const RESET: [u32; 5] = [
        MSR_KVM_SYSTEM_TIME_NEW,
        MSR_KVM_ASYNC_PF_EN,
        MSR_KVM_ASYNC_PF_INT,
        MSR_KVM_STEAL_TIME,
        MSR_KVM_PV_EOI_EN,
    ];
    let g = Guest::of(Fixture::with_irqchip());
    let ap = VcpuFixture {
        vcpu: g.v.f.vcpu(1).unwrap(),
        f: g.v.f,
    };
    let user = &ap.f.user;
    for (i, index) in RESET.iter().enumerate() {
        let value = match *index {
            MSR_KVM_ASYNC_PF_INT => 0x50,
            MSR_KVM_ASYNC_PF_EN => DATA | 9,
            _ => (DATA + 64 * i as u64) | ENABLED,
        };
        let taken = set_msr(&ap, *index, value);
        assert!(taken || *index == MSR_KVM_STEAL_TIME, "{index:#x}");
    }
    assert!(set_msr(&ap, MSR_KVM_POLL_CONTROL, 0));
    assert!(set_msr(&ap, MSR_KVM_WALL_CLOCK_NEW, DATA));
    // SIPI with vector 4: the code, where OUT is `out 0x10, al` in real mode, too.
    let runnable = user.at(&kvm_mp_state { mp_state: 0 });
    assert_eq!(ap.call(KVM_SET_MP_STATE, runnable), Ok(0));
    for data in [5u32 << 8, 6 << 8 | 4] {
        let msi = kvm_msi {
            address_lo: 0xfee0_1000,
            data,
            ..Default::default()
        };
        assert_eq!(ap.f.vm_with(KVM_SIGNAL_MSI, &msi), Ok(1), "{data:#x}");
    }
    g.ram.write_bytes(CODE as usize, &[0xe6, 0x10]);
    assert_eq!(ap.call(KVM_RUN, 0), Ok(0));
    let reason: u32 = ap.page().read(offset_of!(kvm_run, exit_reason));
    assert_eq!(reason, KVM_EXIT_IO);
    for index in RESET {
        assert_eq!(get_msr(&ap, index), Some(0), "{index:#x}");
    }
    assert_eq!(get_msr(&ap, MSR_KVM_POLL_CONTROL), Some(0));
    assert_eq!(get_msr(&ap, MSR_KVM_WALL_CLOCK), Some(DATA));
    assert_eq!(ap.call(KVM_KVMCLOCK_CTRL, 0), Err(Errno::EINVAL));
}
