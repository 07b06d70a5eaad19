//! What takes several controllers: the PIC behind LINT0, the PIT's way to the vCPU, the split chip.

use crate::sync::lock;
use crate::tests::{Event, TestVm};
use crate::{ChipMode, Error, RESAMPLE_IRQ_SOURCE_ID, USERSPACE_IRQ_SOURCE_ID};

use anykvm_abi::{
    KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};

/// The PC's usual initialisation: vectors 20H and 28H, nothing masked.
fn init_pic(vm: &TestVm) {
    for (port, base) in [(0x20, 0x20), (0xa0, 0x28)] {
        vm.outb(port, 0x11);
        for value in [base, 0, 1, 0] {
            vm.outb(port + 1, value);
        }
    }
}

fn msi(gsi: u32, address: u64, data: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        flags: 0,
        pad: 0,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: address as u32,
                address_hi: (address >> 32) as u32,
                data,
                ..Default::default()
            },
        },
    }
}

#[test]
fn the_pic_reaches_the_vcpu_whose_lint0_takes_it() {
    let vm = TestVm::new(2);
    let (chip, bsp) = (&vm.chip, &vm.lapics[0]);
    init_pic(&vm);
    assert!(bsp.accepts_pic_intr(), "LINT0 is ExtINT at reset");
    assert!(!vm.lapics[1].accepts_pic_intr());
    assert_eq!(chip.set_irq(4, USERSPACE_IRQ_SOURCE_ID, true, false), 1);
    assert!(chip.has_interrupt(bsp));
    assert!(!chip.has_interrupt(&vm.lapics[1]));
    // ExtINT goes before the APIC's own.
    vm.write(0, 0x300, 0x40061);
    assert_eq!(chip.ack_interrupt(bsp), Some(0x24));
    assert_eq!(chip.ack_interrupt(bsp), Some(0x61));
    assert_eq!(chip.ack_interrupt(bsp), None);

    vm.outb(0x20, 0x20);
    vm.write(0, 0x350, 0x10700);
    chip.set_irq(3, USERSPACE_IRQ_SOURCE_ID, true, false);
    assert!(!chip.has_interrupt(bsp), "LINT0 is masked");
    bsp.set_base(0xfee0_0000, false).unwrap();
    assert_eq!(chip.ack_interrupt(bsp), Some(0x23), "no APIC, no mask");
}

#[test]
fn pit_ticks_go_through_pic_and_ioapic() {
    let vm = TestVm::new(1);
    let (chip, lapic) = (&vm.chip, &vm.lapics[0]);
    init_pic(&vm);
    chip.create_pit(true).unwrap();
    assert_eq!(chip.create_pit(true), Err(Error::Exists));
    vm.outb(0x43, 0x34);
    vm.outb(0x40, 0xa9);
    vm.outb(0x40, 0x04);
    let first = chip.next_deadline().unwrap();
    let period = first - vm.clock.now();
    assert_eq!(*lock(&vm.events.armed), Some(first));
    chip.timer_expired(first - 1);
    assert!(!chip.has_interrupt(lapic));
    chip.timer_expired(first);
    assert_eq!(chip.next_deadline(), Some(first + period));
    assert_eq!(chip.ack_interrupt(lapic), Some(0x20));
    // Two ticks pass before the EOI; both come after it, one at a time.
    chip.timer_expired(first + 2 * period);
    assert!(!chip.has_interrupt(lapic));
    for _ in 0..2 {
        vm.outb(0x20, 0x20);
        assert_eq!(chip.ack_interrupt(lapic), Some(0x20));
    }
    vm.outb(0x20, 0x20);
    assert!(!chip.has_interrupt(lapic));

    // Through the I/O APIC the acknowledgement is the local APIC's EOI.
    vm.outb(0x21, 0xff);
    vm.redirect(0, 0x31);
    chip.timer_expired(first + 4 * period);
    for _ in 0..2 {
        assert_eq!(chip.ack_interrupt(lapic), Some(0x31));
        assert!(!chip.has_interrupt(lapic));
        lapic.eoi();
    }
    assert!(!chip.has_interrupt(lapic));
}

/// The guest ends the interrupt while the thread that made it has not gone on: the tick made up for then is
/// another edge.
#[test]
fn a_tick_that_is_acknowledged_at_once() {
    let vm = TestVm::new(1);
    let (chip, lapic) = (&vm.chip, &vm.lapics[0]);
    init_pic(&vm);
    chip.create_pit(false).unwrap();
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        vm.outb(port, value);
    }
    let first = chip.next_deadline().unwrap();
    let period = first - vm.clock.now();
    let guest = (chip.clone(), lapic.clone());
    *lock(&vm.vcpus[0].at_once) = Some(Box::new(move || {
        let (chip, lapic) = guest;
        assert_eq!(chip.ack_interrupt(&lapic), Some(0x20));
        assert!(chip.pio_write(0x20, &[0x20]));
    }));
    // Two ticks, the second to be made up for.
    chip.timer_expired(first + period);
    assert_eq!(chip.ack_interrupt(lapic), Some(0x20));
    vm.outb(0x20, 0x20);
    // And on it goes.
    chip.timer_expired(first + 2 * period);
    assert_eq!(chip.ack_interrupt(lapic), Some(0x20));
}

#[test]
fn the_pit_as_nmi_watchdog() {
    let vm = TestVm::new(2);
    vm.chip.create_pit(false).unwrap();
    vm.write(1, 0x350, 0x400);
    vm.outb(0x43, 0x30);
    vm.outb(0x40, 0x00);
    vm.outb(0x40, 0x10);
    vm.chip.timer_expired(vm.chip.next_deadline().unwrap());
    assert_eq!(vm.take_events(0), []);
    assert_eq!(vm.take_events(1), [Event::Nmi]);
    assert_eq!(vm.chip.next_deadline(), None);
}

#[test]
fn ports() {
    let vm = TestVm::new(1);
    let mut bytes = [0xaa; 4];
    assert!(!vm.chip.pio_read(0x40, &mut bytes[..1]), "no PIT yet");
    vm.chip.create_pit(false).unwrap();
    // (port, length, answered)
    let cases = [
        (0x20, 1, true),
        (0x21, 1, true),
        (0x20, 2, true),
        (0x21, 2, false),
        (0x22, 1, false),
        (0xa0, 1, true),
        (0x4d1, 1, true),
        (0x4d2, 1, false),
        (0x40, 1, true),
        (0x43, 1, true),
        (0x43, 2, false),
        (0x40, 4, true),
        (0x44, 1, false),
        (0x61, 1, false),
        (0x80, 1, false),
    ];
    for (port, length, answered) in cases {
        let data = &mut bytes[..length];
        assert_eq!(
            vm.chip.pio_read(port, data),
            answered,
            "{port:#x}, {length}"
        );
        assert_eq!(
            vm.chip.pio_write(port, data),
            answered,
            "{port:#x}, {length}"
        );
    }
}

#[test]
fn ack_notifiers_hear_of_every_way_to_acknowledge() {
    let vm = TestVm::new(1);
    let (chip, lapic) = (&vm.chip, &vm.lapics[0]);
    let acked = || std::mem::take(&mut *lock(&vm.events.acked));
    init_pic(&vm);
    chip.add_ack_notifier(10);
    chip.add_ack_notifier(10);
    vm.redirect(10, 0x41 | 1 << 15 | 1 << 16);

    chip.set_irq(10, RESAMPLE_IRQ_SOURCE_ID, true, false);
    assert_eq!(chip.ack_interrupt(lapic), Some(0x2a));
    assert_eq!(acked(), []);
    vm.outb(0xa0, 0x20);
    assert_eq!(acked(), [10]);
    chip.set_irq(10, RESAMPLE_IRQ_SOURCE_ID, false, false);

    vm.outb(0xa1, 0xff);
    vm.redirect(10, 0x41 | 1 << 15);
    chip.set_irq(10, RESAMPLE_IRQ_SOURCE_ID, true, false);
    assert_eq!(vm.lapics[0].has_interrupt(), Some(0x41));
    lapic.ack(0x41);
    lapic.eoi();
    assert_eq!(acked(), [10]);
    chip.remove_ack_notifier(10);
    lapic.ack(0x41);
    lapic.eoi();
    assert_eq!(acked(), [10]);
    chip.remove_ack_notifier(10);
    chip.remove_ack_notifier(10);
    lapic.ack(0x41);
    lapic.eoi();
    assert_eq!(acked(), []);
}

#[test]
fn routed_and_direct_msis() {
    let vm = TestVm::new(2);
    let chip = &vm.chip;
    chip.set_routing(&[msi(40, 0xfee0_1000, 0x55)]).unwrap();
    assert_eq!(chip.set_irq(40, USERSPACE_IRQ_SOURCE_ID, true, false), 1);
    assert_eq!(chip.set_irq(40, USERSPACE_IRQ_SOURCE_ID, false, false), -1);
    assert_eq!(chip.set_irq(4, USERSPACE_IRQ_SOURCE_ID, true, false), -1);
    assert_eq!(vm.drain(1), [0x55]);
    assert_eq!(chip.send_msi(0xfee0_0000, 0x56), Ok(1));
    assert_eq!(chip.send_msi(0xfee0_9000, 0x56), Ok(0));
    assert_eq!(vm.drain(0), [0x56]);
    assert_eq!(chip.send_msi(0xfee0_1000, 0x400), Ok(1));
    assert_eq!(vm.take_events(1), [Event::Nmi]);
    // A table that is refused leaves the old one.
    assert_eq!(chip.set_routing(&[msi(5000, 0, 0)]), Err(Error::Invalid));
    assert_eq!(chip.set_irq(40, USERSPACE_IRQ_SOURCE_ID, true, false), 1);
}

#[test]
fn split_chip() {
    let vm = TestVm::with_mode(ChipMode::Split { ioapic_pins: 24 }, &[0, 1]);
    let (chip, lapic) = (&vm.chip, &vm.lapics[0]);
    assert_eq!(chip.pic_state(0), Err(Error::NoDevice));
    assert!(chip.ioapic_state().is_err());
    assert_eq!(chip.create_pit(false), Err(Error::NoDevice));
    assert!(!chip.pio_write(0x20, &[0x11]));
    assert!(!chip.mmio_write(0xfec0_0000, &[0; 4]));

    // Pin 5 is level-triggered (its EOI is an exit), pin 6 an edge, GSI 30 not the I/O APIC's.
    let level = 1 << 15 | 1 << 14;
    let table = [
        msi(5, 0xfee0_0000, 0x45 | level),
        msi(6, 0xfee0_0000, 0x46),
        msi(30, 0xfee0_0000, 0x47 | level),
    ];
    chip.set_routing(&table).unwrap();
    for gsi in [5, 6, 30] {
        assert_eq!(chip.set_irq(gsi, USERSPACE_IRQ_SOURCE_ID, true, false), 1);
    }
    assert_eq!(vm.drain(0), [0x47, 0x46, 0x45]);
    assert_eq!(vm.take_events(0), [Event::IoapicEoi(0x45)]);

    // KVM_INTERRUPT stands in for the PIC.
    assert_eq!(lapic.queue_external_interrupt(0x20), Ok(()));
    assert_eq!(lapic.queue_external_interrupt(0x21), Err(Error::Exists));
    assert!(chip.has_interrupt(lapic));
    assert_eq!(chip.ack_interrupt(lapic), Some(0x20));
    assert_eq!(lapic.external_interrupt(), None);
    assert!(!chip.has_interrupt(lapic));
}

#[test]
fn paravirtual_ipis_and_kicks() {
    let ids: Vec<u32> = (0..70).collect();
    let vm = TestVm::with_mode(ChipMode::Full, &ids);
    let chip = &vm.chip;
    assert_eq!(chip.pv_send_ipi([0b101, 1], 1, 0x40, true), Ok(3));
    for index in [1, 3, 65] {
        assert_eq!(vm.drain(index), [0x40]);
    }
    assert_eq!(chip.pv_send_ipi([u64::MAX, 1], 2, 0x40, false), Ok(33));
    assert_eq!(vm.drain(34), [0x40]);
    // The second half begins 64 behind that, which is at 63.
    assert_eq!(chip.pv_send_ipi([u64::MAX; 2], u32::MAX, 0x40, true), Ok(7));
    assert_eq!(
        chip.pv_send_ipi([1, 0], 0, 1 << 11, true),
        Err(Error::Invalid)
    );
    chip.pv_kick(7);
    assert_eq!(vm.take_events(7), [Event::Unhalt]);
}

#[test]
fn disconnect_lets_go_of_the_vcpus() {
    let vm = TestVm::new(1);
    assert!(vm.chip.lapic(0).is_some());
    vm.chip.disconnect();
    assert!(vm.chip.lapic(0).is_none());
    assert_eq!(vm.chip.send_msi(0xfee0_0000, 0x41), Ok(0));
}

/// Three vCPUs, the event thread and a VMM do anything at all at once: nothing panics (overflow checks
/// are on) and nobody waits for anybody for ever.
#[test]
fn whatever_is_done_at_once_is_survived() {
    let vm = TestVm::new(3);
    let vm = &vm;
    vm.chip.create_pit(true).unwrap();
    vm.chip.add_ack_notifier(5);
    init_pic(vm);
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            scope.spawn(move || {
                let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(thread + 1);
                let mut random = move || {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state
                };
                for _ in 0..30_000 {
                    let (what, value) = (random() % 16, random());
                    any_access(vm, thread as usize, what, random(), value);
                }
            });
        }
    });
}

fn any_access(vm: &TestVm, index: usize, what: u64, place: u64, value: u64) {
    let (chip, lapic) = (&vm.chip, &vm.lapics[index]);
    let ports = [
        0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61,
    ];
    let port = ports[place as usize % ports.len()];
    match what {
        0 | 1 => {
            lapic.mmio_write(place as u32 & 0xff0, &(value as u32).to_le_bytes());
        }
        2 => {
            lapic.mmio_write(0x300, &(value as u32 | 0x4000).to_le_bytes());
        }
        3 => {
            lapic.mmio_read(place as u32 & 0xfff, &mut [0; 4]);
        }
        4 => {
            let _ = lapic.msr_write(0x800 + (place as u32 & 0x3f), value as u32 as u64);
        }
        5 => {
            let _ = lapic.set_base(0xfee0_0000 | value & 0xd00, place & 1 == 0);
            lapic.mmio_write(0xf0, &0x1ffu32.to_le_bytes());
        }
        6 | 7 => {
            if chip.ack_interrupt(lapic).is_some() && place & 1 == 0 {
                lapic.eoi();
            }
        }
        8 => {
            chip.pio_write(port, &[value as u8]);
        }
        9 => {
            chip.pio_read(port, &mut [0]);
        }
        10 => vm.redirect(place as u32 % 24, value),
        11 | 12 => {
            chip.set_irq(
                place as u32 % 25,
                value as u32 % 3,
                value & 4 != 0,
                value & 8 != 0,
            );
        }
        13 => {
            let _ = chip.send_msi(0xfee0_0000 | place & 0xf_fffc, value as u32);
        }
        14 => {
            let now = vm.clock.advance(value % 1_000_000);
            chip.timer_expired(now);
            vm.lapics.iter().for_each(|lapic| lapic.deliver_timer());
        }
        _ => {
            let _ = lapic.set_state(&vm.lapics[place as usize % 3].state());
            chip.set_pit_state(&chip.pit_state().unwrap()).unwrap();
            let pic = chip.pic_state(0).unwrap();
            chip.set_pic_state(1, &pic).unwrap();
            let ioapic = chip.ioapic_state().unwrap();
            chip.set_ioapic_state(&ioapic).unwrap();
        }
    }
}
