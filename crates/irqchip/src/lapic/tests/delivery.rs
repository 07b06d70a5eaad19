use crate::tests::{Event, TestVm};
use crate::{ChipMode, IrqChip};

/// The APICs (by position) at which something is pending, which is then taken.
fn receivers(vm: &TestVm) -> Vec<usize> {
    (0..vm.lapics.len())
        .filter(|i| !vm.drain(*i).is_empty())
        .collect()
}

fn send(vm: &TestVm, from: usize, dest: u32, icr: u32) -> Vec<usize> {
    vm.write(from, 0x310, dest << 24);
    vm.write(from, 0x300, icr);
    receivers(vm)
}

const ASSERT: u32 = 1 << 14;
const LOGICAL: u32 = 1 << 11;
const LOWEST_PRIORITY: u32 = 1 << 8;

#[test]
fn xapic_destinations() {
    let flat: [u32; 4] = [1, 2, 4, 8];
    let cluster: [u32; 4] = [0x11, 0x12, 0x21, 0x22];
    // (name, cluster model, destination, ICR, from APIC 1 to)
    let cases: [(&str, bool, u32, u32, &[usize]); 19] = [
        ("physical", false, 2, 0x41, &[2]),
        ("physical, oneself", false, 1, 0x41, &[1]),
        ("physical, nobody", false, 7, 0x41, &[]),
        ("physical broadcast", false, 0xff, 0x41, &[0, 1, 2, 3]),
        ("self", false, 3, 0x40041, &[1]),
        ("all", false, 3, 0x80041, &[0, 1, 2, 3]),
        ("all but self", false, 3, 0xc0041, &[0, 2, 3]),
        ("flat, one", false, 4, LOGICAL | 0x41, &[2]),
        ("flat, three", false, 0xd, LOGICAL | 0x41, &[0, 2, 3]),
        ("flat, none", false, 0x30, LOGICAL | 0x41, &[]),
        ("flat broadcast", false, 0xff, LOGICAL | 0x41, &[0, 1, 2, 3]),
        (
            "flat, lowest priority",
            false,
            0xd,
            LOGICAL | LOWEST_PRIORITY | 0x40,
            &[2],
        ),
        (
            "flat, lowest priority",
            false,
            0xd,
            LOGICAL | LOWEST_PRIORITY | 0x41,
            &[3],
        ),
        ("cluster, one", true, 0x12, LOGICAL | 0x41, &[1]),
        ("cluster, two", true, 0x23, LOGICAL | 0x41, &[2, 3]),
        ("cluster, none", true, 0x31, LOGICAL | 0x41, &[]),
        (
            "cluster broadcast",
            true,
            0xff,
            LOGICAL | 0x41,
            &[0, 1, 2, 3],
        ),
        (
            "cluster, lowest priority",
            true,
            0x13,
            LOGICAL | LOWEST_PRIORITY | 0x43,
            &[1],
        ),
        ("level de-assert", false, 2, 1 << 15 | 0x41, &[]),
    ];
    for (name, by_cluster, dest, icr, expected) in cases {
        let vm = TestVm::new(4);
        for i in 0..4 {
            let ids = if by_cluster { cluster } else { flat };
            vm.write(i, 0xd0, ids[i] << 24);
            vm.write(i, 0xe0, if by_cluster { 0 } else { 0xf000_0000 });
        }
        let icr = if name == "level de-assert" {
            icr
        } else {
            icr | ASSERT
        };
        assert_eq!(send(&vm, 1, dest, icr), expected, "{name}");
        assert_eq!(vm.read(1, 0x300), icr);
    }
}

#[test]
fn lowest_priority_picks_among_those_that_are_there() {
    let vm = TestVm::new(2);
    vm.write(0, 0xd0, 1 << 24);
    vm.write(1, 0xd0, 4 << 24);
    for (vector, expected) in [(0x40, 0), (0x41, 1), (0x42, 0), (0x43, 1)] {
        let icr = LOGICAL | LOWEST_PRIORITY | ASSERT | vector;
        assert_eq!(send(&vm, 0, 0x3f, icr), [expected]);
    }
}

#[test]
fn mixed_models_and_shared_ids_are_asked_one_by_one() {
    let vm = TestVm::new(4);
    for (i, ldr, dfr) in [(0, 0x01, !0), (1, 0x02, !0), (2, 0x11, 0), (3, 0x12, 0)] {
        vm.write(i, 0xd0, ldr << 24);
        vm.write(i, 0xe0, dfr);
    }
    assert_eq!(send(&vm, 0, 0x03, LOGICAL | ASSERT | 0x41), [0, 1]);
    assert_eq!(send(&vm, 0, 0x12, LOGICAL | ASSERT | 0x41), [1, 3]);
    // Two bits in one logical id; two APICs with one bit.
    for i in 0..4 {
        vm.write(i, 0xe0, !0);
    }
    vm.write(0, 0xd0, 0x05 << 24);
    vm.write(1, 0xd0, 0x04 << 24);
    assert_eq!(send(&vm, 0, 0x04, LOGICAL | ASSERT | 0x41), [0, 1]);
    // Two APICs with one physical id.
    vm.write(2, 0x20, 3 << 24);
    assert_eq!(send(&vm, 0, 3, ASSERT | 0x41), [2, 3]);
    assert_eq!(send(&vm, 0, 2, ASSERT | 0x41), []);
}

#[test]
fn x2apic_destinations() {
    let ids = [0, 1, 0x11, 0x1f, 0x123, 1030];
    // (name, ICR, to)
    let cases: [(&str, u64, &[usize]); 11] = [
        ("physical", 0x123 << 32 | 0x41, &[4]),
        ("physical, high id", 1030 << 32 | 0x41, &[5]),
        ("physical, nobody", 0xffff_fff0 << 32 | 0x41, &[]),
        ("255 is no broadcast", 0xff << 32 | 0x41, &[]),
        ("broadcast", 0xffff_ffff << 32 | 0x41, &[0, 1, 2, 3, 4, 5]),
        ("logical, a cluster", 0x1_8002 << 32 | 0x841, &[2, 3]),
        ("logical, nobody", 0x7_ffff << 32 | 0x841, &[]),
        ("logical, far cluster", 0xfffe_ffff << 32 | 0x841, &[]),
        (
            "logical broadcast",
            0xffff_ffff << 32 | 0x841,
            &[0, 1, 2, 3, 4, 5],
        ),
        ("last cluster", (0x40 << 16 | 1 << 6) << 32 | 0x841, &[5]),
        ("all but self", 0xc0041, &[0, 2, 3, 4, 5]),
    ];
    for (name, icr, expected) in cases {
        let vm = TestVm::with_mode(ChipMode::Full, &ids);
        vm.enter_x2apic();
        vm.lapics[1].msr_write(0x830, icr).unwrap();
        assert_eq!(receivers(&vm), expected, "{name}");
    }
}

#[test]
fn an_apic_above_255_is_started_by_its_full_id() {
    let vm = TestVm::with_mode(ChipMode::Full, &[0, 1, 0x101]);
    vm.chip.set_x2apic_api(3).unwrap();
    let bsp = &vm.lapics[0];
    bsp.set_base(bsp.base() | 0xc00, false).unwrap();
    bsp.msr_write(0x830, 0x101 << 32 | 0x4500).unwrap();
    bsp.msr_write(0x830, 0x101 << 32 | 0x4699).unwrap();
    assert_eq!(vm.take_events(2), [Event::Init, Event::Sipi(0x99)]);
    assert_eq!(vm.take_events(1), []);
    // MSIs carry the upper bits in the upper half of the address.
    assert_eq!(vm.chip.send_msi(0x100_fee0_1000, 0x41), Ok(1));
    assert_eq!(receivers(&vm), [2]);
    assert!(vm.chip.send_msi(0x101_fee0_1000, 0x41).is_err());
}

#[test]
fn broadcast_of_messages_to_x2apics() {
    let vm = TestVm::with_mode(ChipMode::Full, &[0, 1]);
    vm.enter_x2apic();
    let broadcast = |chip: &IrqChip| chip.send_msi(0xfeef_f000, 0x41);
    assert_eq!(broadcast(&vm.chip), Ok(2), "the quirk");
    receivers(&vm);
    vm.chip.set_x2apic_api(2).unwrap();
    assert_eq!(broadcast(&vm.chip), Ok(0), "id 255");
    // Logical: cluster 0, APICs 0 to 7.
    assert_eq!(vm.chip.send_msi(0xfeef_f004, 0x41), Ok(2));
}

#[test]
fn delivery_modes() {
    // (ICR, what the target is told)
    let cases = [
        (0x4241, vec![Event::Smi]),
        (0x4441, vec![Event::Nmi]),
        (0x4500, vec![Event::Init]),
        (0xc500, vec![Event::Init]),
        (0x8500, vec![]),
        (0x4699, vec![Event::Sipi(0x99)]),
        (0x4341, vec![Event::Unhalt]),
        (0x4741, vec![]),
    ];
    for (icr, events) in cases {
        let vm = TestVm::new(2);
        // None of them needs the target software-enabled.
        vm.write(1, 0xf0, 0xff);
        assert_eq!(send(&vm, 0, 1, icr), []);
        assert_eq!(vm.take_events(1), events, "{icr:#x}");
        assert_eq!(vm.take_events(0), []);
    }
}

#[test]
fn msi_fields() {
    let vm = TestVm::new(3);
    for i in 0..3 {
        vm.write(i, 0xd0, 1 << (24 + i));
    }
    // (address, data, to)
    let cases: [(u64, u32, &[usize]); 6] = [
        (0xfee0_1000, 0x41, &[1]),
        (0xfee0_5004, 0x41, &[0, 2]),
        (0xfee0_500c, 0x40, &[0]),
        (0xfee0_500c, 0x41, &[2]),
        (0xfee0_7004, 0x140, &[1]),
        // Physical broadcast with the hint goes to everyone.
        (0xfeef_f008, 0x41, &[0, 1, 2]),
    ];
    for (address, data, expected) in cases {
        assert_eq!(vm.chip.send_msi(address, data), Ok(expected.len() as i32));
        assert_eq!(receivers(&vm), expected, "{address:#x}, {data:#x}");
    }
}

#[test]
fn the_trigger_mode_register_follows_the_last_message() {
    let vm = TestVm::new(1);
    vm.chip.send_msi(0xfee0_0000, 0xc041).unwrap();
    assert_eq!(vm.read(0, 0x1a0), 1 << 1);
    vm.chip.send_msi(0xfee0_0000, 0x41).unwrap();
    assert_eq!(vm.read(0, 0x1a0), 0);
    assert_eq!(vm.read(0, 0x220), 1 << 1, "IRR");
}

#[test]
fn disabled_apics_take_nothing() {
    let vm = TestVm::new(2);
    vm.lapics[1].set_base(0xfee0_0000, false).unwrap();
    assert_eq!(send(&vm, 0, 1, ASSERT | 0x41), []);
    assert_eq!(send(&vm, 0, 0xff, ASSERT | 0x41), [0]);
    vm.write(0, 0x300, 0xc0000 | ASSERT | 0x400);
    assert_eq!(vm.take_events(1), []);
    assert_eq!(vm.chip.send_msi(0xfee0_1000, 0x41), Ok(0));
    vm.write(0, 0xf0, 0xff);
    assert_eq!(
        vm.chip.send_msi(0xfee0_0000, 0x41),
        Ok(0),
        "software-disabled"
    );
}

#[test]
fn senders_from_many_threads_lose_nothing() {
    let vm = TestVm::new(5);
    let target = &vm.lapics[0];
    std::thread::scope(|scope| {
        for sender in 1..5usize {
            let vm = &vm;
            scope.spawn(move || {
                for round in 0..5_000u32 {
                    let vector = 0x20 + sender as u32 * 16 + round % 16;
                    vm.write(sender, 0x310, 0);
                    vm.write(sender, 0x300, ASSERT | vector);
                    if round % 100 == 0 {
                        // Rebuilds the map under the other senders' feet.
                        vm.write(sender, 0xd0, (1 << sender) << 24);
                    }
                }
            });
        }
        let mut seen = std::collections::HashSet::new();
        while seen.len() < 64 {
            if let Some(vector) = target.has_interrupt() {
                target.ack(vector);
                target.eoi();
                seen.insert(vector);
            }
            std::thread::yield_now();
        }
    });
}
