mod access;
mod delivery;
mod timer;

use crate::tests::TestVm;
use crate::{CpuFeatures, Error, LvtEntry};

/// ICR: to self, asserted.
const TO_SELF: u32 = 0x44000;

#[test]
fn a_higher_class_interrupts_a_lower_one() {
    let vm = TestVm::new(1);
    let lapic = &vm.lapics[0];
    for vector in [0x31, 0x42, 0x4f] {
        vm.write(0, 0x300, TO_SELF | vector);
    }
    assert_eq!(lapic.has_interrupt(), Some(0x4f));
    lapic.ack(0x4f);
    assert_eq!(vm.read(0, 0xa0), 0x40);
    assert_eq!(lapic.has_interrupt(), None);
    vm.write(0, 0x300, TO_SELF | 0x51);
    assert_eq!(lapic.has_interrupt(), Some(0x51));
    lapic.ack(0x51);
    assert_eq!(lapic.highest_isr(), Some(0x51));
    assert_eq!(lapic.eoi(), Some(0x51));
    assert_eq!(lapic.eoi(), Some(0x4f));
    assert_eq!(vm.drain(0), [0x42, 0x31]);
    assert_eq!(lapic.eoi(), None);
}

#[test]
fn processor_priority() {
    // (TPR, in service, PPR, the lowest vector of those above that gets through)
    let cases = [
        (0x00, None, 0x00, Some(0x10)),
        (0x25, None, 0x25, Some(0x30)),
        (0x2f, Some(0x22), 0x2f, Some(0x30)),
        (0x20, Some(0x3a), 0x30, Some(0x40)),
        (0x30, Some(0x3a), 0x30, Some(0x40)),
        (0xff, None, 0xff, None),
        (0x00, Some(0xf1), 0xf0, None),
    ];
    for (tpr, in_service, ppr, lowest) in cases {
        let deliverable = |vector: u32| {
            let vm = TestVm::new(1);
            if let Some(vector) = in_service {
                vm.write(0, 0x300, TO_SELF | vector);
                vm.lapics[0].ack(vector as u8);
            }
            vm.write(0, 0x80, tpr);
            assert_eq!(vm.read(0, 0xa0), ppr, "TPR {tpr:#x}, {in_service:x?}");
            vm.write(0, 0x300, TO_SELF | vector);
            vm.lapics[0].has_interrupt().is_some()
        };
        let found = (0..=0xf).map(|class| class << 4).find(|v| deliverable(*v));
        assert_eq!(found, lowest, "TPR {tpr:#x}, {in_service:x?}");
    }
}

#[test]
fn lowering_the_priority_notifies() {
    use std::sync::atomic::Ordering;
    let vm = TestVm::new(1);
    let lapic = &vm.lapics[0];
    lapic.set_cr8(0xf);
    assert_eq!((lapic.tpr(), lapic.cr8()), (0xf0, 0xf));
    vm.write(0, 0x300, TO_SELF | 0x41);
    assert_eq!(lapic.has_interrupt(), None);
    let before = vm.vcpus[0].notified.load(Ordering::Relaxed);
    lapic.set_cr8(0x4);
    assert_eq!(vm.vcpus[0].notified.load(Ordering::Relaxed), before);
    lapic.set_cr8(0x3);
    assert_eq!(vm.vcpus[0].notified.load(Ordering::Relaxed), before + 1);
    assert_eq!(lapic.has_interrupt(), Some(0x41));
}

#[test]
fn reset_values() {
    let vm = TestVm::new(2);
    let lapic = &vm.lapics[1];
    vm.write(1, 0x80, 0x40);
    vm.write(1, 0xd0, 2 << 24);
    vm.write(1, 0x300, TO_SELF | 0x61);
    vm.write(1, 0x380, 1000);
    lapic.reset(false);
    let expected = [
        (0x20, 1 << 24),
        (0x30, 0x0005_0014),
        (0x80, 0),
        (0xa0, 0),
        (0xd0, 0),
        (0xe0, 0xffff_ffff),
        (0xf0, 0xff),
        (0x100, 0),
        (0x230, 0),
        (0x300, 0),
        (0x320, 0x10000),
        (0x350, 0x10000),
        (0x380, 0),
        (0x390, 0),
        (0x3e0, 0),
    ];
    for (offset, value) in expected {
        assert_eq!(vm.read(1, offset), value, "{offset:#x}");
    }
    assert_eq!(lapic.base(), 0xfee0_0800);
    assert_eq!(lapic.next_deadline(), None);
    assert!(!lapic.enabled());

    let bsp = &vm.lapics[0];
    bsp.reset(false);
    assert_eq!(bsp.base(), 0xfee0_0900);
    assert_eq!(vm.read(0, 0x350), 0x700, "LINT0 is ExtINT");
    vm.chip.disable_quirks(1);
    bsp.reset(false);
    assert_eq!(vm.read(0, 0x350), 0x10000);

    // INIT leaves the base, the mode and the id.
    vm.enter_x2apic();
    lapic.reset(true);
    assert!(lapic.x2apic_mode());
    assert_eq!(lapic.msr_read(0x802), Ok(1));
    assert_eq!(lapic.msr_read(0x80d), Ok(2));
    assert_eq!(lapic.msr_read(0x80f), Ok(0xff));
}

#[test]
fn apic_base_transitions() {
    const DISABLED: u64 = 0xfee0_0000;
    const XAPIC: u64 = 0xfee0_0800;
    const X2APIC: u64 = 0xfee0_0c00;
    const INVALID: u64 = 0xfee0_0400;
    // (from, to, the guest may, the VMM may)
    let cases = [
        (DISABLED, XAPIC, true, true),
        (DISABLED, X2APIC, false, true),
        (XAPIC, DISABLED, true, true),
        (XAPIC, X2APIC, true, true),
        (X2APIC, DISABLED, true, true),
        (X2APIC, XAPIC, false, true),
        (XAPIC, INVALID, false, false),
        (DISABLED, INVALID, false, false),
        (XAPIC, XAPIC | 1, false, false),
        (XAPIC, XAPIC | 0x200, false, false),
        (XAPIC, XAPIC | 1 << 46, false, false),
        (XAPIC, XAPIC | 0x100, true, true),
        (XAPIC, 0xd000_0800, true, true),
    ];
    for (from, to, guest, host) in cases {
        for (host_initiated, allowed) in [(false, guest), (true, host)] {
            let vm = TestVm::new(1);
            let lapic = &vm.lapics[0];
            lapic.set_base(from, true).unwrap();
            let result = lapic.set_base(to, host_initiated);
            let name = format!("{from:#x} to {to:#x}, host {host_initiated}");
            assert_eq!(result.is_ok(), allowed, "{name}");
            assert_eq!(lapic.base(), if allowed { to } else { from }, "{name}");
        }
    }
    // Without x2APIC in CPUID there is no such mode.
    let vm = TestVm::new(1);
    vm.lapics[0].set_features(CpuFeatures::default());
    let refused = vm.lapics[0].set_base(X2APIC, true);
    assert_eq!(refused, Err(Error::GeneralProtection));
    assert_eq!(vm.lapics[0].set_base(XAPIC | 1 << 36, true), refused);
}

#[test]
fn local_vector_table() {
    let vm = TestVm::new(1);
    let lapic = &vm.lapics[0];
    // (register, what stays of all ones)
    let cases = [
        (0x2f0, 0),
        (0x320, 0x710ff),
        (0x330, 0x117ff),
        (0x340, 0x117ff),
        (0x350, 0x1f7ff),
        (0x360, 0x1f7ff),
        (0x370, 0x110ff),
    ];
    for (offset, value) in cases {
        vm.write(0, offset, 0xffff_ffff);
        assert_eq!(vm.read(0, offset), value, "{offset:#x}");
    }
    lapic.set_cmci(true);
    assert_eq!(vm.read(0, 0x30), 0x0006_0014);
    assert_eq!(vm.read(0, 0x2f0), 0x10000);
    vm.write(0, 0x2f0, 0x10081);
    assert!(!lapic.deliver_lvt(LvtEntry::Cmci));
    vm.write(0, 0x2f0, 0x81);
    assert!(lapic.deliver_lvt(LvtEntry::Cmci));
    assert_eq!(vm.drain(0), [0x81]);

    // The performance-counter entry masks itself.
    vm.write(0, 0x340, 0x400);
    assert!(lapic.deliver_lvt(LvtEntry::PerformanceCounter));
    assert_eq!(vm.read(0, 0x340), 0x10400);
    assert_eq!(vm.take_events(0), [crate::tests::Event::Nmi]);
}

#[test]
fn software_disable_masks_the_lvt() {
    let vm = TestVm::new(1);
    let lapic = &vm.lapics[0];
    vm.write(0, 0x320, 0x41);
    vm.write(0, 0x370, 0x42);
    vm.write(0, 0x300, TO_SELF | 0x51);
    vm.write(0, 0xf0, 0xff);
    assert_eq!(vm.read(0, 0x320), 0x10041);
    vm.write(0, 0x370, 0x42);
    assert_eq!(vm.read(0, 0x370), 0x10042, "stays masked while disabled");
    vm.write(0, 0x300, TO_SELF | 0x61);
    assert_eq!(
        vm.drain(0),
        [0x51],
        "what was accepted is delivered, nothing new is accepted"
    );
    assert!(!lapic.enabled());
    vm.write(0, 0xf0, 0x1ff);
    vm.write(0, 0x320, 0x41);
    assert_eq!(vm.read(0, 0x320), 0x41);
}
