use crate::tests::TestVm;

#[test]
fn a_higher_class_interrupts_a_lower_one() {
    let vm = TestVm::new(1);
    let lapic = &vm.lapics[0];
    for vector in [0x31, 0x42, 0x4f] {
        vm.write(0, 0x300, 0x40000 | vector);
    }
    assert_eq!(lapic.has_interrupt(), Some(0x4f));
    lapic.ack(0x4f);
    assert_eq!(vm.read(0, 0xa0), 0x40);
    assert_eq!(lapic.has_interrupt(), None);
    vm.write(0, 0x300, 0x40051);
    assert_eq!(lapic.has_interrupt(), Some(0x51));
    lapic.ack(0x51);
    assert_eq!(lapic.eoi(), Some(0x51));
    assert_eq!(lapic.eoi(), Some(0x4f));
    assert_eq!(vm.drain(0), [0x42, 0x31]);
    assert_eq!(lapic.eoi(), None);
}
