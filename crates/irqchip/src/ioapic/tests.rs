use crate::sync::lock;
use crate::tests::TestVm;
use crate::{ChipMode, USERSPACE_IRQ_SOURCE_ID};

const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const MASKED: u64 = 1 << 16;

fn vm() -> TestVm {
    let vm = TestVm::with_mode(ChipMode::Full, &[0, 1]);
    // Nothing of this is for the PIC.
    vm.outb(0x21, 0xff);
    vm.outb(0xa1, 0xff);
    vm
}

/// The I/O APIC's input of this number, which the default routing gives the same GSI.
fn set(vm: &TestVm, pin: u32, level: bool) -> i32 {
    vm.chip.set_irq(pin, USERSPACE_IRQ_SOURCE_ID, level, true)
}

fn entry(vm: &TestVm, pin: u32) -> u64 {
    u64::from(vm.ioapic_read(0x11 + 2 * pin)) << 32 | u64::from(vm.ioapic_read(0x10 + 2 * pin))
}

#[test]
fn registers() {
    let vm = vm();
    assert_eq!(vm.ioapic_read(1), 0x0017_0011);
    vm.ioapic_write(1, 0xffff_ffff);
    vm.ioapic_write(0, 0xffff_ffff);
    assert_eq!(vm.ioapic_read(0), 0x0f00_0000);
    assert_eq!(vm.ioapic_read(2), 0x0f00_0000, "arbitration id");
    for pin in 0..24 {
        assert_eq!(entry(&vm, pin), MASKED);
    }
    // No such entry.
    for register in [0x03, 0x0f, 0x40, 0xff] {
        vm.ioapic_write(register, 0);
        assert_eq!(vm.ioapic_read(register), 0xffff_ffff);
    }
    // Delivery status and remote IRR cannot be written.
    vm.redirect(3, !0);
    assert_eq!(entry(&vm, 3), !(REMOTE_IRR | 1 << 12));

    let mut bytes = [0xaa; 8];
    assert!(vm.chip.mmio_read(0xfec0_0010, &mut bytes));
    assert_eq!(bytes[4..], [0; 4]);
    assert!(vm.chip.mmio_read(0xfec0_0020, &mut bytes[..2]));
    assert!(!vm.chip.mmio_read(0xfec0_0100, &mut bytes));
    assert!(!vm.chip.mmio_write(0xfebf_ffff, &bytes));
}

#[test]
fn an_edge_is_delivered_once() {
    let vm = vm();
    vm.redirect(17, 0x41);
    assert_eq!(set(&vm, 17, true), 1);
    assert_eq!(set(&vm, 17, true), 0, "no new edge");
    assert_eq!(vm.drain(0), [0x41]);
    assert_eq!(set(&vm, 17, false), 1);
    assert_eq!(set(&vm, 17, true), 1);
    assert_eq!(vm.drain(0), [0x41]);
    assert_eq!(entry(&vm, 17) & REMOTE_IRR, 0);
}

#[test]
fn an_edge_while_masked_is_lost() {
    let vm = vm();
    vm.redirect(17, 0x41 | MASKED);
    assert_eq!(set(&vm, 17, true), -1);
    assert_eq!(set(&vm, 17, true), 0);
    vm.redirect(17, 0x41);
    assert_eq!(vm.drain(0), []);
    set(&vm, 17, false);
    assert_eq!(set(&vm, 17, true), 1);
    assert_eq!(vm.drain(0), [0x41]);
}

#[test]
fn a_level_waits_for_its_eoi() {
    let vm = vm();
    let lapic = &vm.lapics[0];
    vm.redirect(18, 0x51 | LEVEL);
    assert_eq!(set(&vm, 18, true), 1);
    assert_eq!(entry(&vm, 18) & REMOTE_IRR, REMOTE_IRR);
    assert_eq!(set(&vm, 18, true), -1, "no second message before the EOI");
    lapic.ack(0x51);
    assert_eq!(lapic.has_interrupt(), None);
    // Still high: again. Then it falls, and the EOI ends it.
    lapic.eoi();
    assert_eq!(lapic.has_interrupt(), Some(0x51));
    lapic.ack(0x51);
    set(&vm, 18, false);
    lapic.eoi();
    assert_eq!(lapic.has_interrupt(), None);
    assert_eq!(entry(&vm, 18) & REMOTE_IRR, 0);
}

#[test]
fn a_level_while_masked_is_delivered_on_unmasking() {
    let vm = vm();
    vm.redirect(18, 0x51 | LEVEL | MASKED);
    assert_eq!(set(&vm, 18, true), -1);
    vm.redirect(18, 0x51 | LEVEL);
    assert_eq!(vm.lapics[0].has_interrupt(), Some(0x51));
}

#[test]
fn becoming_an_edge_clears_remote_irr() {
    let vm = vm();
    vm.redirect(18, 0x51 | LEVEL);
    set(&vm, 18, true);
    vm.lapics[0].ack(0x51);
    // How a kernel without an EOI register makes an explicit EOI.
    vm.redirect(18, 0x51 | MASKED);
    vm.redirect(18, 0x51 | LEVEL | MASKED);
    assert_eq!(entry(&vm, 18) & REMOTE_IRR, 0);
    set(&vm, 18, false);
    vm.redirect(18, 0x51 | LEVEL);
    vm.lapics[0].eoi();
    assert_eq!(set(&vm, 18, true), 1);
}

#[test]
fn one_vector_on_two_pins() {
    let vm = vm();
    let lapic = &vm.lapics[0];
    vm.redirect(18, 0x51 | LEVEL);
    vm.redirect(19, 0x51 | LEVEL);
    set(&vm, 18, true);
    set(&vm, 19, true);
    lapic.ack(0x51);
    set(&vm, 18, false);
    lapic.eoi();
    assert_eq!(entry(&vm, 18) & REMOTE_IRR, 0);
    assert_eq!(
        entry(&vm, 19) & REMOTE_IRR,
        REMOTE_IRR,
        "19 is still up and sent again"
    );
    assert_eq!(lapic.has_interrupt(), Some(0x51));
}

#[test]
fn destinations() {
    let dest = |id: u64| id << 56;
    let logical = 1u64 << 11;
    // (entry, line result, who got it)
    let cases: [(&str, u64, i32, [bool; 2]); 6] = [
        ("physical", 0x61 | dest(1), 1, [false, true]),
        ("physical, nobody", 0x61 | dest(9), 0, [false, false]),
        ("physical broadcast", 0x61 | dest(0xff), 2, [true, true]),
        ("logical", 0x61 | logical | dest(3), 2, [true, true]),
        (
            "lowest priority",
            0x161 | logical | dest(3),
            1,
            [false, true],
        ),
        (
            "lowest priority, even vector",
            0x162 | logical | dest(3),
            1,
            [true, false],
        ),
    ];
    for (name, entry, result, got) in cases {
        let vm = vm();
        vm.write(0, 0xd0, 1 << 24);
        vm.write(1, 0xd0, 2 << 24);
        vm.redirect(20, entry);
        assert_eq!(set(&vm, 20, true), result, "{name}");
        let have = [0, 1].map(|i| vm.lapics[i].has_interrupt().is_some());
        assert_eq!(have, got, "{name}");
    }
}

#[test]
fn an_rtc_tick_is_coalesced_until_its_eoi() {
    let vm = vm();
    vm.redirect(8, 0x71);
    let tick = || {
        let result = set(&vm, 8, true);
        set(&vm, 8, false);
        result
    };
    assert_eq!(tick(), 1);
    assert_eq!(tick(), 0);
    let lapic = &vm.lapics[0];
    lapic.ack(0x71);
    assert_eq!(tick(), 0);
    lapic.eoi();
    assert_eq!(tick(), 1);

    // The state of a local APIC alone tells that an EOI is outstanding.
    let state = lapic.state();
    vm.drain(0);
    lapic.set_state(&state).unwrap();
    assert_eq!(tick(), 0);
    vm.drain(0);
    assert_eq!(tick(), 1);
}

#[test]
fn a_storm_is_slowed_down() {
    let vm = vm();
    let lapic = &vm.lapics[0];
    vm.redirect(18, 0x51 | LEVEL);
    set(&vm, 18, true);
    let mut deliveries = 0;
    while let Some(vector) = lapic.has_interrupt() {
        lapic.ack(vector);
        lapic.eoi();
        deliveries += 1;
        assert!(deliveries <= 10_000);
    }
    assert_eq!(deliveries, 10_000);
    let deadline = vm.chip.next_deadline().unwrap();
    assert_eq!(*lock(&vm.events.armed), Some(deadline));
    vm.chip.timer_expired(deadline);
    assert_eq!(lapic.has_interrupt(), Some(0x51));
    assert_eq!(vm.chip.next_deadline(), None);
}

#[test]
fn state_round_trip() {
    let vm = vm();
    vm.redirect(17, 0x41 | 1 << 56);
    vm.redirect(18, 0x51 | LEVEL);
    vm.redirect(19, 0x52 | LEVEL | MASKED);
    for pin in [17, 18, 19] {
        set(&vm, pin, true);
    }
    let state = vm.chip.ioapic_state().unwrap();
    assert_eq!(state.irr, 1 << 18 | 1 << 19, "the edge has been delivered");
    assert_eq!(state.base_address, 0xfec0_0000);

    let copy = self::vm();
    copy.chip.set_ioapic_state(&state).unwrap();
    assert_eq!(entry(&copy, 18), entry(&vm, 18));
    assert_eq!(copy.lapics[0].has_interrupt(), None, "remote IRR is set");
    let again = copy.chip.ioapic_state().unwrap();
    assert_eq!(again.irr, state.irr);
    // Whatever the padding holds, the next edge is delivered.
    assert_eq!(state.pad, 0);
    let padded = anykvm_abi::kvm_ioapic_state { pad: !0, ..state };
    copy.chip.set_ioapic_state(&padded).unwrap();
    assert_eq!(set(&copy, 17, true), 1);
    copy.chip.set_ioapic_state(&state).unwrap();
    // Its EOI is seen, and the line is known to be up.
    copy.lapics[0].set_state(&vm.lapics[0].state()).unwrap();
    copy.lapics[0].ack(0x51);
    copy.lapics[0].eoi();
    assert_eq!(copy.lapics[0].has_interrupt(), Some(0x51));
}
