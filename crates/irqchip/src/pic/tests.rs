use super::*;

/// The sequence a PC's firmware or kernel writes: vectors 20H and 28H.
fn initialised(icw4: u8) -> PicPair {
    let mut pic = PicPair::new();
    for (port, icw3, base) in [(0x20, 0x04, 0x20), (0xa0, 0x02, 0x28)] {
        pic.write(port, 0x11, false);
        for value in [base, icw3, icw4] {
            pic.write(port + 1, value, false);
        }
        pic.write(port + 1, 0, false);
    }
    pic.take_effects();
    pic
}

fn raise(pic: &mut PicPair, pin: usize) -> i32 {
    pic.set_irq(pin, 0, true)
}

fn pulse(pic: &mut PicPair, pin: usize) -> i32 {
    let result = raise(pic, pin);
    pic.set_irq(pin, 0, false);
    result
}

#[test]
fn initialisation_sequence() {
    let mut pic = PicPair::new();
    pic.write(0x20, 0x11, false);
    pic.write(0x21, 0x73, false);
    pic.write(0x21, 0x04, false);
    pic.write(0x21, 0x01, false);
    pic.write(0x21, 0xfe, false);
    assert_eq!(pic.read(0x21), 0xfe);
    let state = pic.state(0).unwrap();
    assert_eq!(
        (state.irq_base, state.init_state, state.auto_eoi),
        (0x70, 0, 0)
    );

    // Without ICW4 the sequence is one word shorter.
    pic.write(0xa0, 0x10, false);
    pic.write(0xa1, 0x78, false);
    pic.write(0xa1, 0x02, false);
    pic.write(0xa1, 0x55, false);
    assert_eq!(pic.read(0xa1), 0x55);
    assert!(pic.state(2).is_none());
}

#[test]
fn fixed_priorities_and_nesting() {
    let mut pic = initialised(0x01);
    assert_eq!(raise(&mut pic, 4), 1);
    assert!(pic.take_effects().raised);
    raise(&mut pic, 6);
    assert_eq!(pic.acknowledge(), 0x24);
    assert!(!pic.output(), "6 is below what is in service");
    raise(&mut pic, 1);
    assert_eq!(pic.acknowledge(), 0x21);
    pic.write(0x20, 0x20, false);
    assert_eq!(pic.take_effects().acked, 1 << 1);
    assert!(!pic.output());
    pic.write(0x20, 0x20, false);
    assert_eq!(pic.acknowledge(), 0x26);
}

#[test]
fn a_source_that_goes_away_leaves_a_spurious_interrupt() {
    let mut pic = initialised(0x01);
    assert_eq!(pic.acknowledge(), 0x27);
    assert_eq!(pic.state(0).unwrap().isr, 0);
    // Level-triggered on the slave, gone between INT and INTA: the master's 2 stays requested.
    pic.write(0x4d1, 0x08, false);
    raise(&mut pic, 11);
    pic.set_irq(11, 0, false);
    assert_eq!(pic.acknowledge(), 0x2f);
}

#[test]
fn the_slave_is_the_masters_input_2() {
    let mut pic = initialised(0x01);
    raise(&mut pic, 12);
    raise(&mut pic, 3);
    assert_eq!(pic.acknowledge(), 0x2c, "2 goes before 3");
    assert_eq!(
        (pic.state(0).unwrap().isr, pic.state(1).unwrap().isr),
        (0x04, 0x10)
    );
    pic.write(0xa0, 0x20, false);
    assert_eq!(pic.take_effects().acked, 1 << 12);
    assert!(!pic.output(), "the master's 2 is still in service");
    pic.write(0x20, 0x62, false);
    assert_eq!(pic.acknowledge(), 0x23);
}

#[test]
fn special_fully_nested_mode_lets_the_slave_nest() {
    for (icw4, nests) in [(0x01, false), (0x11, true)] {
        let mut pic = initialised(icw4);
        raise(&mut pic, 12);
        pic.acknowledge();
        raise(&mut pic, 8);
        assert_eq!(pic.output(), nests, "ICW4 {icw4:#x}");
    }
}

#[test]
fn automatic_end_of_interrupt_and_rotation() {
    let mut pic = initialised(0x03);
    pulse(&mut pic, 5);
    assert_eq!(pic.acknowledge(), 0x25);
    assert_eq!(pic.take_effects().acked, 1 << 5);
    assert_eq!(pic.state(0).unwrap().isr, 0);

    pic.write(0x20, 0x80, false);
    for pin in [1, 3] {
        pulse(&mut pic, pin);
    }
    assert_eq!(pic.acknowledge(), 0x21);
    // 1 is now the lowest, 2 the highest.
    pulse(&mut pic, 0);
    pulse(&mut pic, 1);
    assert_eq!(pic.acknowledge(), 0x23);
    assert_eq!(pic.acknowledge(), 0x20);
    assert_eq!(pic.acknowledge(), 0x21);
}

#[test]
fn ocw2_commands() {
    // (OCW2 with 4 and 6 in service, what stays in service, the highest priority afterwards)
    let cases = [
        ("non-specific EOI", 0x20, 0x40, 0),
        ("specific EOI of 6", 0x66, 0x10, 0),
        ("rotate on non-specific EOI", 0xa0, 0x40, 5),
        ("rotate on specific EOI of 6", 0xe6, 0x10, 7),
        ("set priority: 3 lowest", 0xc3, 0x50, 4),
        ("no operation", 0x40, 0x50, 0),
    ];
    for (name, ocw2, isr, highest) in cases {
        let mut pic = initialised(0x01);
        for pin in [6, 4] {
            pulse(&mut pic, pin);
            pic.acknowledge();
        }
        pic.write(0x20, ocw2, false);
        let state = pic.state(0).unwrap();
        assert_eq!((state.isr, state.priority_add), (isr, highest), "{name}");
    }
}

#[test]
fn special_mask_lets_lower_priorities_through() {
    let mut pic = initialised(0x01);
    pulse(&mut pic, 1);
    pic.acknowledge();
    pulse(&mut pic, 5);
    assert!(!pic.output());
    pic.write(0x21, 0x02, false);
    assert!(!pic.output(), "masked, but still in service");
    pic.write(0x20, 0x68, false);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), 0x25);
    pic.write(0x20, 0x48, false);
    assert!(!pic.output());
}

#[test]
fn edges_and_levels() {
    let mut pic = initialised(0x01);
    pic.write(0x4d0, 0xff, false);
    assert_eq!(pic.read(0x4d0), 0xf8, "0-2 are edges on every PC");
    pic.write(0x4d1, 0xff, false);
    assert_eq!(pic.read(0x4d1), 0xde);
    pic.write(0x4d1, 0, false);

    // An edge counts once, however long it lasts.
    assert_eq!(raise(&mut pic, 1), 1);
    assert_eq!(pic.acknowledge(), 0x21);
    pic.write(0x20, 0x20, false);
    assert!(!pic.output());
    assert_eq!(pulse(&mut pic, 1), 1);
    assert_eq!(pulse(&mut pic, 1), 1);
    assert_eq!(pulse(&mut pic, 1), 0, "coalesced");
    pic.write(0x20, 0x20, false);
    pic.acknowledge();
    pic.write(0x20, 0x20, false);

    // A level asks again until it falls.
    assert_eq!(raise(&mut pic, 5), 1);
    assert_eq!(raise(&mut pic, 5), 0);
    assert_eq!(pic.acknowledge(), 0x25);
    pic.write(0x20, 0x20, false);
    assert!(pic.output());
    pic.set_irq(5, 0, false);
    assert!(!pic.output());
}

#[test]
fn a_shared_line_is_high_while_any_source_holds_it() {
    let mut pic = initialised(0x01);
    pic.write(0x4d0, 0x20, false);
    pic.set_irq(5, 0, true);
    pic.set_irq(5, 1, true);
    pic.set_irq(5, 0, false);
    assert!(pic.output());
    pic.set_irq(5, 1, false);
    assert!(!pic.output());
    assert_eq!(pic.set_irq(16, 0, true), -1);
}

#[test]
fn masks_hold_requests_back() {
    let mut pic = initialised(0x01);
    pic.write(0x21, 0xff, false);
    pic.write(0xa1, 0xff, false);
    assert_eq!(raise(&mut pic, 3), -1);
    assert!(!pic.output());
    pic.write(0x21, 0xf7, false);
    let effects = pic.take_effects();
    assert_eq!((effects.unmasked, effects.raised), (1 << 3, true));
    pic.write(0xa1, 0x7f, false);
    assert_eq!(pic.take_effects().unmasked, 1 << 15);
}

#[test]
fn registers_and_poll() {
    let mut pic = initialised(0x01);
    pulse(&mut pic, 3);
    pulse(&mut pic, 6);
    assert_eq!(pic.read(0x20), 0x48);
    pic.acknowledge();
    pic.write(0x20, 0x0b, false);
    assert_eq!(pic.read(0x20), 0x08);
    pic.write(0x20, 0x0a, false);
    assert_eq!(pic.read(0x20), 0x40);
    pic.write(0x20, 0x20, false);
    pic.take_effects();
    pic.write(0x20, 0x0c, false);
    assert_eq!(pic.read(0x20), 6);
    assert_eq!(pic.take_effects().acked, 1 << 6);
    assert_eq!(pic.read(0x20), 0, "polling ends the interrupt");
    pic.write(0xa0, 0x0c, false);
    assert_eq!(pic.read(0xa0), 7, "nothing");
}

#[test]
fn icw1_drops_edges_but_not_levels() {
    let mut pic = initialised(0x01);
    pic.write(0x4d0, 0x20, false);
    raise(&mut pic, 1);
    raise(&mut pic, 5);
    pic.take_effects();
    pic.write(0x20, 0x11, true);
    assert_eq!(pic.state(0).unwrap().irr, 0x20);
    assert_eq!(pic.take_effects().acked, 1 << 1);
}

#[test]
fn state_round_trip() {
    let mut pic = initialised(0x01);
    pulse(&mut pic, 4);
    raise(&mut pic, 12);
    let mut copy = PicPair::new();
    for chip in 0..2 {
        copy.set_state(chip, &pic.state(chip).unwrap()).unwrap();
        assert_eq!(copy.state(chip), pic.state(chip));
    }
    assert!(copy.output());
    assert_eq!(copy.acknowledge(), pic.acknowledge());

    // Whatever a VMM sets, nothing breaks.
    let garbage = kvm_pic_state {
        last_irr: 0xff,
        irr: 0xff,
        isr: 0xa5,
        priority_add: 0xff,
        irq_base: 0xff,
        init_state: 0xff,
        auto_eoi: 0xff,
        rotate_on_auto_eoi: 0xff,
        poll: 0xff,
        elcr: 0xff,
        elcr_mask: 0xff,
        ..Default::default()
    };
    copy.set_state(0, &garbage).unwrap();
    copy.set_state(1, &garbage).unwrap();
    for _ in 0..20 {
        copy.acknowledge();
        copy.read(0x20);
        copy.write(0x20, 0xa0, true);
        copy.write(0x21, 0x00, true);
    }
}
