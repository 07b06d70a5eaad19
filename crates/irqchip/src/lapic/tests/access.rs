use crate::tests::TestVm;
use crate::{ChipMode, Error};

use super::TO_SELF;

#[test]
fn the_page_is_read_in_pieces_and_written_whole() {
    let vm = TestVm::new(1);
    let lapic = &vm.lapics[0];
    vm.write(0, 0xd0, 0xa5b6_c7d8);
    assert_eq!(vm.read(0, 0xd0), 0xa500_0000);
    vm.write(0, 0x320, 0x310ef);
    // (offset, length, bytes)
    let cases: [(u32, &[u8]); 9] = [
        (0x320, &[0xef, 0x10, 0x03, 0x00]),
        (0x320, &[0xef]),
        (0x321, &[0x10]),
        (0x322, &[0x03, 0x00]),
        (0x323, &[0x00]),
        // Across the register, beside it, wider than it, nowhere.
        (0x323, &[0, 0]),
        (0x324, &[0, 0, 0, 0]),
        (0x320, &[0; 8]),
        (0xff0, &[0; 4]),
    ];
    for (offset, expected) in cases {
        let mut data = vec![0xaa; expected.len()];
        assert!(lapic.mmio_read(offset, &mut data));
        assert_eq!(data, expected, "{offset:#x}");
    }
    for (offset, data) in [(0x320, &[1u8, 2][..]), (0x321, &[1; 4]), (0x320, &[1; 8])] {
        assert!(lapic.mmio_write(offset, data));
        assert_eq!(vm.read(0, 0x320), 0x310ef, "{offset:#x}");
    }
}

#[test]
fn no_access_does_harm() {
    let vm = TestVm::new(2);
    for mode in [0x800, 0xc00] {
        for (lapic, offset) in (0..0x1000).flat_map(|o| vm.lapics.iter().map(move |l| (l, o))) {
            lapic.set_base(0xfee0_0000 | mode, true).unwrap();
            for value in [0, 0x8000_0000, u32::MAX] {
                lapic.mmio_write(offset, &value.to_le_bytes());
                for length in [0, 1, 2, 4, 8, 16] {
                    lapic.mmio_read(offset, &mut vec![0; length]);
                }
            }
        }
    }
    for msr in 0x7f0..0x910 {
        for value in [0, 1 << 31, u64::from(u32::MAX), u64::MAX] {
            let _ = vm.lapics[0].msr_write(msr, value);
            let _ = vm.lapics[0].msr_read(msr);
        }
    }
}

#[test]
fn a_page_that_is_not_there() {
    let vm = TestVm::new(1);
    let lapic = &vm.lapics[0];
    for base in [0xfee0_0000, 0xfee0_0c00] {
        lapic.set_base(base, true).unwrap();
        let mut data = [0; 4];
        assert!(lapic.mmio_read(0x20, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(lapic.mmio_write(0x80, &[0x40, 0, 0, 0]));
        assert_eq!(lapic.tpr(), 0);
    }
    vm.chip.disable_quirks(4);
    assert!(!lapic.mmio_read(0x20, &mut [0; 4]));
    assert!(!lapic.mmio_write(0x80, &[0; 4]));
    lapic.set_base(0xd000_0800, true).unwrap();
    assert_eq!(lapic.mmio_base(), 0xd000_0000);
    assert!(lapic.mmio_write(0x80, &[0x40, 0, 0, 0]));
    assert_eq!(lapic.tpr(), 0x40);
}

#[test]
fn x2apic_registers() {
    let vm = TestVm::with_mode(ChipMode::Full, &[0, 0x123]);
    vm.enter_x2apic();
    let lapic = &vm.lapics[1];
    const GP: Result<u64, Error> = Err(Error::GeneralProtection);
    // (MSR, reads as)
    let reads = [
        (0x800, GP),
        (0x802, Ok(0x123)),
        (0x803, Ok(0x0005_0014)),
        (0x808, Ok(0)),
        (0x809, GP),
        (0x80a, Ok(0)),
        (0x80b, GP),
        (0x80d, Ok(0x12 << 16 | 1 << 3)),
        (0x80e, GP),
        (0x80f, Ok(0x1ff)),
        (0x810, Ok(0)),
        (0x827, Ok(0)),
        (0x828, Ok(0)),
        (0x82f, GP),
        (0x830, Ok(0)),
        (0x831, GP),
        (0x832, Ok(0x10000)),
        (0x837, Ok(0x10000)),
        (0x83a, GP),
        (0x83e, Ok(0)),
        (0x83f, GP),
        (0x840, GP),
        (0x8ff, GP),
        (0x900, GP),
    ];
    for (msr, value) in reads {
        assert_eq!(lapic.msr_read(msr), value, "{msr:#x}");
    }
    // (MSR, value, accepted)
    let writes = [
        (0x802, 1, false),
        (0x803, 0, false),
        (0x808, 0x40, true),
        (0x808, 1 << 32, false),
        (0x80a, 0, false),
        (0x80b, 0, true),
        (0x80d, 0, false),
        (0x80e, 0, false),
        (0x80f, 0x1ff, true),
        (0x810, 0, false),
        (0x828, 0, true),
        (0x828, 1, false),
        (0x82f, 0, false),
        (0x830, 1 << 13, false),
        (0x830, 1 << 16, false),
        (0x830, 1 << 20, false),
        (0x830, 0x7_0000_4041, true),
        (0x831, 0, false),
        (0x832, 0x10041, true),
        (0x838, 1000, true),
        (0x839, 0, false),
        (0x83e, 0xb, true),
        (0x83f, 0x41, true),
        (0x83f, 0x141, false),
    ];
    for (msr, value, accepted) in writes {
        assert_eq!(
            lapic.msr_write(msr, value).is_ok(),
            accepted,
            "{msr:#x}, {value:#x}"
        );
    }
    assert_eq!(lapic.msr_read(0x830), Ok(0x7_0000_4041));
    lapic.set_tpr(0);
    assert_eq!(lapic.has_interrupt(), Some(0x41), "the self-IPI");

    let xapic = TestVm::new(1);
    assert_eq!(xapic.lapics[0].msr_read(0x802), GP);
    assert!(xapic.lapics[0].msr_write(0x808, 0).is_err());
    // No self-IPI register in xAPIC mode.
    xapic.write(0, 0x3f0, 0x41);
    assert_eq!(xapic.lapics[0].has_interrupt(), None);
}

#[test]
fn the_version_offers_directed_eoi_only_with_a_split_chip() {
    let vm = TestVm::with_mode(ChipMode::Split { ioapic_pins: 24 }, &[0]);
    assert_eq!(vm.read(0, 0x30), 0x0105_0014);
    vm.write(0, 0xf0, 0x11ff);
    assert_eq!(vm.read(0, 0xf0), 0x11ff);
    let vm = TestVm::new(1);
    vm.write(0, 0xf0, 0x11ff);
    assert_eq!(vm.read(0, 0xf0), 0x1ff);
}

#[test]
fn state_round_trip() {
    let vm = TestVm::new(1);
    let lapic = &vm.lapics[0];
    vm.write(0, 0x80, 0x10);
    vm.write(0, 0xd0, 4 << 24);
    vm.write(0, 0xe0, 0x0fff_ffff);
    vm.write(0, 0x310, 5 << 24);
    vm.write(0, 0x320, 0x30041);
    vm.write(0, 0x350, 0x400);
    for vector in [0x31, 0x32, 0x91] {
        vm.write(0, 0x300, TO_SELF | vector);
    }
    lapic.ack(0x91);
    let state = lapic.state();
    let copy = TestVm::new(1);
    copy.lapics[0].set_state(&state).unwrap();
    assert!(copy.lapics[0].state().regs == state.regs);
    for offset in (0..0x400).step_by(16) {
        assert_eq!(copy.read(0, offset), vm.read(0, offset), "{offset:#x}");
    }
    for vm in [&vm, &copy] {
        assert_eq!(vm.lapics[0].has_interrupt(), None);
        assert_eq!(vm.lapics[0].eoi(), Some(0x91));
        assert_eq!(vm.drain(0), [0x32, 0x31]);
    }
}

#[test]
fn x2apic_state_has_the_id_in_the_format_asked_for() {
    let vm = TestVm::with_mode(ChipMode::Full, &[0, 0x45]);
    vm.enter_x2apic();
    let lapic = &vm.lapics[1];
    lapic.msr_write(0x830, 0x77_0000_40f1).unwrap();
    let word = |state: &anykvm_abi::kvm_lapic_state, at: usize| {
        u32::from_le_bytes(std::array::from_fn(|i| state.regs[at + i] as u8))
    };
    let mut state = lapic.state();
    assert_eq!(word(&state, 0x20), 0x4500_0000);
    assert_eq!((word(&state, 0x300), word(&state, 0x310)), (0x40f1, 0x77));
    // In the old format the id is not looked at.
    state.regs[0x23] = 9;
    lapic.set_state(&state).unwrap();
    assert_eq!(lapic.msr_read(0x802), Ok(0x45));
    assert_eq!(lapic.msr_read(0x80d), Ok(4 << 16 | 1 << 5));

    assert_eq!(vm.chip.set_x2apic_api(4), Err(Error::Invalid));
    vm.chip.set_x2apic_api(1).unwrap();
    assert_eq!(lapic.set_state(&state), Err(Error::Invalid));
    let state = lapic.state();
    assert_eq!(word(&state, 0x20), 0x45);
    lapic.set_state(&state).unwrap();
    assert_eq!(lapic.msr_read(0x830), Ok(0x77_0000_40f1));
}
