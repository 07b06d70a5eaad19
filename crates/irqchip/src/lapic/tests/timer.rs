use std::sync::atomic::Ordering;

use anykvm_abi::kvm_lapic_state;

use crate::sync::lock;
use crate::tests::{TSC_PER_NS, TestVm};

const ONE_SHOT: u32 = 0;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 2 << 17;
const MASKED: u32 = 1 << 16;
const INITIAL: u32 = 0x380;
const CURRENT: u32 = 0x390;
const DIVIDE: u32 = 0x3e0;
/// Divide by one.
const BY_1: u32 = 0xb;

fn vm(mode: u32) -> TestVm {
    let vm = TestVm::new(1);
    vm.write(0, DIVIDE, BY_1);
    vm.write(0, 0x320, mode | 0x41);
    vm
}

/// Lets time pass, then runs the vCPU; the vectors that came of it.
fn pass(vm: &TestVm, ns: u64) -> Vec<u8> {
    vm.clock.advance(ns);
    run(vm)
}

/// What the vCPU takes as soon as it runs.
fn run(vm: &TestVm) -> Vec<u8> {
    vm.lapics[0].deliver_timer();
    vm.drain(0)
}

/// Lets time pass, and the timer go off, while the vCPU does not run; true if it is told.
fn pass_stopped(vm: &TestVm, ns: u64) -> bool {
    let told = || vm.vcpus[0].notified.load(Ordering::Relaxed);
    let before = told();
    vm.lapics[0].timer_expired(vm.clock.advance(ns));
    assert_eq!(vm.lapics[0].highest_irr(), None);
    told() != before
}

#[test]
fn one_shot() {
    let vm = vm(ONE_SHOT);
    let lapic = &vm.lapics[0];
    vm.write(0, INITIAL, 1_000_000);
    assert_eq!(vm.read(0, CURRENT), 1_000_000);
    let deadline = Some(vm.clock.now() + 1_000_000);
    assert_eq!(lapic.next_deadline(), deadline);
    assert_eq!(*lock(&vm.vcpus[0].armed), deadline);
    assert_eq!(pass(&vm, 400_000), []);
    assert_eq!(vm.read(0, CURRENT), 600_000);
    assert_eq!(pass(&vm, 600_000), [0x41]);
    assert_eq!(vm.read(0, CURRENT), 0);
    assert_eq!(lapic.next_deadline(), None);
    assert_eq!(*lock(&vm.vcpus[0].armed), None);
    assert_eq!(pass(&vm, 10_000_000), []);
    // Writing the count starts over, zero stops.
    vm.write(0, INITIAL, 5);
    vm.write(0, INITIAL, 0);
    assert_eq!(lapic.next_deadline(), None);
    assert_eq!(vm.read(0, CURRENT), 0);
}

#[test]
fn periodic() {
    let vm = vm(PERIODIC);
    vm.write(0, INITIAL, 300_000);
    for _ in 0..3 {
        assert_eq!(pass(&vm, 299_999), []);
        assert_eq!(pass(&vm, 1), [0x41]);
    }
    // Several at once are one interrupt, and the phase stays.
    assert_eq!(pass(&vm, 1_000_000), [0x41]);
    assert_eq!(vm.read(0, CURRENT), 200_000);
    assert_eq!(pass(&vm, 200_000), [0x41]);
    // Never more often than every 200 us.
    vm.write(0, INITIAL, 10);
    assert_eq!(vm.lapics[0].next_deadline(), Some(vm.clock.now() + 200_000));
}

#[test]
fn divisors() {
    let divisors = [
        (0b0000, 2),
        (0b0001, 4),
        (0b0010, 8),
        (0b0011, 16),
        (0b1000, 32),
        (0b1001, 64),
        (0b1010, 128),
        (0b1011, 1),
    ];
    for (tdcr, divisor) in divisors {
        let vm = vm(ONE_SHOT);
        vm.write(0, DIVIDE, tdcr | 0xffff_fff4);
        assert_eq!(vm.read(0, DIVIDE), tdcr);
        vm.write(0, INITIAL, 1000);
        assert_eq!(
            vm.lapics[0].next_deadline(),
            Some(vm.clock.now() + 1000 * divisor)
        );
        pass(&vm, 500 * divisor);
        assert_eq!(vm.read(0, CURRENT), 500);
        // Another divisor on the way: the count goes on at the other rate.
        vm.write(0, DIVIDE, BY_1);
        assert_eq!(vm.read(0, CURRENT), 500);
        assert_eq!(pass(&vm, 499), []);
        assert_eq!(pass(&vm, 1), [0x41]);
    }
}

#[test]
fn tsc_deadline() {
    let vm = vm(TSC_DEADLINE);
    let lapic = &vm.lapics[0];
    let tsc = |ns| (vm.clock.now() + ns) * TSC_PER_NS;
    lapic.set_tsc_deadline(tsc(5000));
    assert_eq!(lapic.tsc_deadline(), tsc(5000));
    assert_eq!(lapic.next_deadline(), Some(vm.clock.now() + 5000));
    vm.write(0, INITIAL, 7);
    assert_eq!((vm.read(0, INITIAL), vm.read(0, CURRENT)), (0, 0));
    lapic.tsc_changed();
    assert_eq!(pass(&vm, 4999), []);
    assert_eq!(pass(&vm, 1), [0x41]);
    assert_eq!(lapic.tsc_deadline(), 0);
    // In the past: at once. Zero: never.
    lapic.set_tsc_deadline(1);
    assert!(pass_stopped(&vm, 0));
    assert_eq!(run(&vm), [0x41]);
    assert_eq!(lapic.tsc_deadline(), 0);
    lapic.set_tsc_deadline(tsc(5000));
    lapic.set_tsc_deadline(0);
    assert_eq!(lapic.next_deadline(), None);
    lapic.set_tsc_deadline(u64::MAX);
    assert!(lapic.next_deadline().is_some());

    // Leaving the mode forgets the deadline; outside it the MSR does nothing.
    vm.write(0, 0x320, 0x41);
    assert_eq!((lapic.tsc_deadline(), lapic.next_deadline()), (0, None));
    lapic.set_tsc_deadline(tsc(5000));
    assert_eq!((lapic.tsc_deadline(), lapic.next_deadline()), (0, None));
}

#[test]
fn modes_do_not_mix() {
    // Entering TSC-deadline mode stops a count; one-shot and periodic go over into each other.
    let vm = vm(ONE_SHOT);
    vm.write(0, INITIAL, 1_000_000);
    vm.write(0, 0x320, PERIODIC | 0x41);
    assert_eq!(pass(&vm, 1_000_000), [0x41]);
    assert_eq!(pass(&vm, 1_000_000), [0x41]);
    vm.write(0, 0x320, TSC_DEADLINE | 0x41);
    assert_eq!(vm.lapics[0].next_deadline(), None);
    assert_eq!(vm.read(0, INITIAL), 0);
    // Both bits: reserved, nothing runs.
    vm.write(0, 0x320, 3 << 17 | 0x41);
    vm.write(0, INITIAL, 1000);
    assert_eq!(vm.lapics[0].next_deadline(), None);
}

#[test]
fn a_masked_timer_runs_silently() {
    let vm = vm(PERIODIC | MASKED);
    vm.write(0, INITIAL, 300_000);
    assert_eq!(pass(&vm, 300_000), []);
    vm.write(0, 0x320, PERIODIC | 0x41);
    assert_eq!(pass(&vm, 299_999), []);
    assert_eq!(pass(&vm, 1), [0x41]);
}

/// The state of `vm` in another VM whose clock reads the same.
fn restored(vm: &TestVm) -> TestVm {
    restored_from(vm, &vm.lapics[0].state(), vm.lapics[0].tsc_deadline())
}

/// Another VM whose clock reads what `vm`'s does, with this state.
fn restored_from(vm: &TestVm, state: &kvm_lapic_state, tsc_deadline: u64) -> TestVm {
    let copy = TestVm::new(1);
    copy.clock.advance(vm.clock.now() - copy.clock.now());
    copy.lapics[0].set_state(state).unwrap();
    copy.lapics[0].set_tsc_deadline(tsc_deadline);
    copy
}

/// The registers and the deadline are read by two calls. A timer that goes off before, between or behind
/// them gives one interrupt in the VM that is read, and one in the VM that is made of what was read.
#[test]
fn a_timer_goes_off_between_two_reads() {
    const READS: usize = 2;
    for mode in [ONE_SHOT, PERIODIC, TSC_DEADLINE] {
        for lapic_first in [true, false] {
            for goes_off_before in 0..=READS {
                let vm = vm(mode);
                let lapic = &vm.lapics[0];
                vm.write(0, INITIAL, 1_000_000);
                lapic.set_tsc_deadline((vm.clock.now() + 1_000_000) * TSC_PER_NS);
                vm.clock.advance(999_999);
                let (mut state, mut deadline) = (None, 0);
                for read in 0..READS {
                    if read == goes_off_before {
                        assert!(pass_stopped(&vm, 1));
                    }
                    if lapic_first == (read == 0) {
                        state = Some(lapic.state());
                    } else {
                        deadline = lapic.tsc_deadline();
                    }
                }
                if goes_off_before == READS {
                    assert!(pass_stopped(&vm, 1));
                }
                let copy = restored_from(&vm, &state.unwrap(), deadline);
                // Read before it went off, a count goes on from there.
                pass_stopped(&copy, 1);
                for vm in [&vm, &copy] {
                    let case = (mode, lapic_first, goes_off_before);
                    assert_eq!(run(vm), [0x41], "{case:?}");
                    assert_eq!(run(vm), [], "{case:?}");
                    let again = if mode == PERIODIC { vec![0x41] } else { vec![] };
                    assert_eq!(pass(vm, 1_000_000), again, "{case:?}");
                    assert_eq!(vm.lapics[0].tsc_deadline(), 0);
                }
            }
        }
    }
}

/// A periodic timer that is due goes on counting: the tick and the phase are both restored.
#[test]
fn a_periodic_timer_that_is_due_keeps_its_phase() {
    let vm = vm(PERIODIC);
    vm.write(0, INITIAL, 300_000);
    assert!(pass_stopped(&vm, 700_000));
    let copy = restored(&vm);
    let copy_of_copy = restored(&copy);
    for vm in [&vm, &copy, &copy_of_copy] {
        assert_eq!(vm.read(0, CURRENT), 200_000);
        assert_eq!(run(vm), [0x41]);
        assert_eq!(vm.read(0, CURRENT), 200_000);
        assert_eq!(pass(vm, 199_999), []);
        assert_eq!(pass(vm, 1), [0x41]);
    }
    // Another rate on the way loses neither.
    let vm = self::vm(PERIODIC);
    vm.write(0, INITIAL, 300_000);
    assert!(pass_stopped(&vm, 400_000));
    vm.write(0, DIVIDE, 0); // 2
    assert_eq!(run(&vm), [0x41]);
    assert_eq!(pass(&vm, 399_999), []);
    assert_eq!(pass(&vm, 1), [0x41]);
}

/// Starting or stopping a timer that is due forgets the interrupt (`cancel_apic_timer`).
#[test]
fn a_timer_that_is_due_is_written() {
    for (offset, value) in [(INITIAL, 0), (INITIAL, 1_000_000), (0x320, TSC_DEADLINE)] {
        let vm = vm(ONE_SHOT);
        vm.write(0, INITIAL, 1000);
        assert!(pass_stopped(&vm, 1000));
        vm.write(0, offset, value);
        assert_eq!(run(&vm), []);
    }
}

#[test]
fn a_restored_timer_goes_on() {
    for mode in [ONE_SHOT, PERIODIC] {
        let vm = vm(mode);
        vm.write(0, INITIAL, 1_000_000);
        pass(&vm, 400_000);
        let copy = restored(&vm);
        for vm in [&vm, &copy] {
            assert_eq!(vm.read(0, CURRENT), 600_000);
            assert_eq!(pass(vm, 599_999), []);
            assert_eq!(pass(vm, 1), [0x41]);
            let again = if mode == PERIODIC { vec![0x41] } else { vec![] };
            assert_eq!(pass(vm, 1_000_000), again);
        }
    }
    let vm = vm(TSC_DEADLINE);
    let deadline = (vm.clock.now() + 5000) * TSC_PER_NS;
    vm.lapics[0].set_tsc_deadline(deadline);
    let copy = restored(&vm);
    assert_eq!(copy.lapics[0].tsc_deadline(), deadline);
    assert_eq!(pass(&copy, 5000), [0x41]);
}

#[test]
fn a_timer_that_has_run_out_does_so_once() {
    // Due, but the vCPU has not run since.
    let vm = vm(ONE_SHOT);
    vm.write(0, INITIAL, 1000);
    vm.clock.advance(2000);
    let copy = restored(&vm);
    assert_eq!(run(&copy), [0x41]);
    assert_eq!(pass(&copy, 1_000_000), []);
    assert_eq!(run(&vm), [0x41]);
    assert_eq!(run(&restored(&vm)), []);
    // A state that does not say so, KVM's or QEMU's, has the interrupt still to come.
    let mut state = vm.lapics[0].state();
    state.regs[0x394..0x398].fill(0);
    vm.lapics[0].set_state(&state).unwrap();
    assert_eq!(pass(&vm, 0), [0x41]);
}

/// What the current count does not tell goes with it: less than one count, whole periods of a one-shot
/// whose divisor was changed under way, and a timer that stands.
#[test]
fn a_restored_timer_goes_off_at_the_same_nanosecond() {
    let vm = vm(ONE_SHOT);
    vm.write(0, DIVIDE, 3); // 16
    vm.write(0, INITIAL, 1000);
    pass(&vm, 4001);
    let copy = restored(&vm);
    assert_eq!(pass(&copy, 11_998), []);
    assert_eq!(pass(&copy, 1), [0x41]);

    let vm = vm_with_long_one_shot();
    let (count, copy) = (vm.read(0, CURRENT), restored(&vm));
    assert_eq!(copy.read(0, CURRENT), count);
    let deadline = vm.lapics[0].next_deadline();
    assert_eq!(copy.lapics[0].next_deadline(), deadline);

    let vm = self::vm(ONE_SHOT);
    vm.write(0, INITIAL, 1000);
    assert_eq!(pass(&vm, 1000), [0x41]);
    vm.write(0, 0x320, PERIODIC | 0x41);
    let copy = restored(&vm);
    assert_eq!(copy.lapics[0].next_deadline(), None);
}

/// Periodic at the least period, then a one-shot, then at another rate.
fn vm_with_long_one_shot() -> TestVm {
    let vm = vm(PERIODIC);
    vm.write(0, INITIAL, 30_000);
    vm.write(0, 0x320, ONE_SHOT | 0x41);
    pass(&vm, 10_000);
    vm.write(0, DIVIDE, 1); // 4
    vm
}

/// A current count that the VMM has changed is believed.
#[test]
fn a_changed_current_count_counts() {
    let vm = vm(ONE_SHOT);
    vm.write(0, INITIAL, 100_000);
    pass(&vm, 1000);
    let mut state = vm.lapics[0].state();
    for (to, byte) in state.regs[0x390..].iter_mut().zip(5000u32.to_le_bytes()) {
        *to = byte as _;
    }
    vm.lapics[0].set_state(&state).unwrap();
    assert_eq!(pass(&vm, 4999), []);
    assert_eq!(pass(&vm, 1), [0x41]);
}

#[test]
fn any_state_is_survived() {
    let vm = TestVm::new(1);
    for byte in [0xff, 0x7f, 0x20, 0x02] {
        let state = kvm_lapic_state {
            regs: [byte as _; 1024],
        };
        vm.lapics[0].set_state(&state).unwrap();
        pass(&vm, 1 << 60);
        vm.write(0, INITIAL, u32::MAX);
        vm.write(0, DIVIDE, 0xa);
        vm.read(0, CURRENT);
        vm.drain(0);
    }
}
