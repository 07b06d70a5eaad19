//! A stopped vCPU's APIC timer goes off: what a VMM reads before and after that, by two calls, gives the guest
//! one interrupt in a new VM, as it gets where it is. Time is counted, so that nothing depends on the host.

use anykvm::bindings::{kvm_lapic_state, kvm_regs, kvm_sregs};
use anykvm::{CountedTime, Errno, Kvm, VcpuExit, VcpuFd};

use crate::{Guest, msr, set_msr};

const MSR_TSC: u32 = 0x10;
const MSR_APIC_BASE: u32 = 0x1b;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// IA32_APIC_BASE of a bootstrap processor in x2APIC mode, whose EOI a real-mode guest can write.
const X2APIC: u64 = 0xfee0_0d00;
const VECTOR: u8 = 0x41;
const DELAY_NS: u32 = 1_000_000;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 2 << 17;

/// What is read of the timer, and the rest of what the guest needs.
struct Saved {
    regs: kvm_regs,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    tsc: u64,
    deadline: u64,
}

fn put(state: &mut kvm_lapic_state, at: usize, value: u32) {
    for (byte, value) in state.regs[at..].iter_mut().zip(value.to_le_bytes()) {
        *byte = value as _;
    }
}

/// STI; HLT again and again, and a handler that writes to a port before its EOI.
fn guest(start_ns: u64) -> (Guest, VcpuFd) {
    const WAIT: [u8; 4] = [0xfb, 0xf4, 0xeb, 0xfd];
    const HANDLER: [u8; 17] = [
        0xe6, 0xe9, // out 0xe9, al
        0x66, 0xb9, 0x0b, 0x08, 0, 0, // mov ecx, IA32_X2APIC_EOI
        0x66, 0x31, 0xc0, // xor eax, eax
        0x66, 0x31, 0xd2, // xor edx, edx
        0x0f, 0x30, // wrmsr
        0xcf, // iret
    ];
    let time = CountedTime {
        start_ns,
        ns_per_instruction: 1,
    };
    let kvm = Kvm::new().unwrap();
    let guest = Guest::of(kvm.create_vm_with_counted_time(time).unwrap(), 0);
    guest.vm.create_irq_chip().unwrap();
    guest.ram.write(usize::from(VECTOR) * 4, 0x2000u32);
    guest.ram.write_bytes(0x2000, &HANDLER);
    let vcpu = guest.vcpu(&WAIT);
    let mut cpuid = kvm.get_supported_cpuid(256).unwrap();
    for entry in cpuid.as_mut_slice() {
        if entry.function == 1 {
            // The timer is the local APIC's, which is there.
            entry.ecx |= 1 << 24;
        }
    }
    vcpu.set_cpuid2(&cpuid).unwrap();
    set_msr(&vcpu, MSR_APIC_BASE, X2APIC);
    (guest, vcpu)
}

/// A guest whose timer goes off in [`DELAY_NS`].
fn waiting(mode: u32) -> (Guest, VcpuFd) {
    let (guest, mut vcpu) = guest(1_000_000_000);
    assert_eq!(interrupts(&mut vcpu), 0);
    let mut lapic = vcpu.get_lapic().unwrap();
    let registers = [
        (0xf0, 0x1ff),
        (0x320, mode | u32::from(VECTOR)),
        (0x3e0, 0xb), // divide by 1
        (0x380, DELAY_NS),
        (0x390, DELAY_NS),
    ];
    for (register, value) in registers {
        put(&mut lapic, register, value);
    }
    vcpu.set_lapic(&lapic).unwrap();
    let deadline = msr(&vcpu, MSR_TSC) + u64::from(DELAY_NS);
    set_msr(&vcpu, MSR_TSC_DEADLINE, deadline);
    (guest, vcpu)
}

fn restored(guest_ns: u64, saved: &Saved) -> (Guest, VcpuFd) {
    let (guest, vcpu) = guest(guest_ns);
    vcpu.set_sregs(&saved.sregs).unwrap();
    vcpu.set_regs(&saved.regs).unwrap();
    vcpu.set_lapic(&saved.lapic).unwrap();
    set_msr(&vcpu, MSR_TSC, saved.tsc);
    set_msr(&vcpu, MSR_TSC_DEADLINE, saved.deadline);
    (guest, vcpu)
}

/// Runs until the guest waits; how often its handler ran.
fn interrupts(vcpu: &mut VcpuFd) -> usize {
    let mut count = 0;
    loop {
        match vcpu.run_counted(1000, u64::MAX) {
            Ok(VcpuExit::IoOut(0xe9, _)) => count += 1,
            Err(Errno::EAGAIN) => return count,
            other => panic!("{other:?}"),
        }
    }
}

/// Before the first read, between the two, or behind the second.
#[test]
fn a_timer_goes_off_while_its_state_is_read() {
    for mode in [0, PERIODIC, TSC_DEADLINE] {
        for lapic_first in [true, false] {
            for goes_off_before in 0..=2 {
                goes_off(mode, lapic_first, goes_off_before);
            }
        }
    }
}

fn goes_off(mode: u32, lapic_first: bool, goes_off_before: usize) {
    let case = (mode, lapic_first, goes_off_before);
    let (guest, mut vcpu) = waiting(mode);
    let mut saved = Saved {
        regs: vcpu.get_regs().unwrap(),
        sregs: vcpu.get_sregs().unwrap(),
        lapic: vcpu.get_lapic().unwrap(),
        tsc: 0,
        deadline: 0,
    };
    for read in 0..2 {
        if read == goes_off_before {
            assert!(guest.vm.skip_to_next_timer());
        }
        if lapic_first == (read == 0) {
            saved.lapic = vcpu.get_lapic().unwrap();
        } else {
            saved.deadline = msr(&vcpu, MSR_TSC_DEADLINE);
        }
    }
    if goes_off_before == 2 {
        assert!(guest.vm.skip_to_next_timer());
    }
    saved.tsc = msr(&vcpu, MSR_TSC);
    let (copy, mut copy_vcpu) = restored(guest.vm.counted_ns().unwrap(), &saved);
    // A count that was read before goes on from there.
    let count_was_running = goes_off_before > usize::from(!lapic_first);
    if mode != TSC_DEADLINE && count_was_running {
        assert_eq!(interrupts(&mut copy_vcpu), 0, "{case:?}");
        assert!(copy.vm.skip_to_next_timer());
    }
    for (guest, vcpu) in [(&guest, &mut vcpu), (&copy, &mut copy_vcpu)] {
        assert_eq!(interrupts(vcpu), 1, "{case:?}");
        let again = guest.vm.skip_to_next_timer();
        assert_eq!(again, mode == PERIODIC, "{case:?}");
        assert_eq!(interrupts(vcpu), usize::from(again), "{case:?}");
        assert_eq!(msr(vcpu, MSR_TSC_DEADLINE), 0, "{case:?}");
    }
}

/// KVM_RUN that ends at once leaves the timer as it is.
#[test]
fn immediate_exit_delivers_nothing() {
    let (guest, mut vcpu) = waiting(TSC_DEADLINE);
    let deadline = msr(&vcpu, MSR_TSC_DEADLINE);
    assert!(guest.vm.skip_to_next_timer());
    vcpu.set_kvm_immediate_exit(1);
    assert!(matches!(vcpu.run(), Err(Errno::EINTR)));
    vcpu.set_kvm_immediate_exit(0);
    assert_eq!(msr(&vcpu, MSR_TSC_DEADLINE), deadline);
    assert_eq!(interrupts(&mut vcpu), 1);
    assert_eq!(msr(&vcpu, MSR_TSC_DEADLINE), 0);
}
