use super::*;

const START: u64 = 1_000_000_000;

/// The time after so many input clocks (rounded up to where the clock has ticked).
fn after(clocks: u64) -> u64 {
    START + (clocks * NS_PER_S).div_ceil(FREQUENCY)
}

fn pit() -> Pit {
    Pit::new(true, START)
}

/// Writes a control word and a two-byte count.
fn program(pit: &mut Pit, channel: u16, mode: u8, count: u16) {
    pit.write(0x43, (channel as u8) << 6 | 0x30 | mode << 1, START);
    let [low, high] = count.to_le_bytes();
    pit.write(0x40 + channel, low, START);
    pit.write(0x40 + channel, high, START);
}

fn read_word(pit: &mut Pit, channel: u16, now: u64) -> u16 {
    let low = pit.read(0x40 + channel, now);
    u16::from_le_bytes([low, pit.read(0x40 + channel, now)])
}

#[test]
fn counts_by_mode() {
    // (mode, count, clocks gone, reads as, OUT)
    let cases: [(u8, u16, u64, u16, bool); 12] = [
        (0, 1000, 0, 1000, false),
        (0, 1000, 999, 1, false),
        (0, 1000, 1000, 0, true),
        (0, 1000, 1001, 0xffff, true),
        (2, 1000, 1, 999, false),
        (2, 1000, 1000, 1000, true),
        (2, 1000, 2500, 500, false),
        (3, 1000, 1, 998, true),
        (3, 1000, 500, 1000, false),
        (3, 1000, 1100, 800, true),
        (4, 1000, 1000, 0, true),
        (4, 1000, 1001, 0xffff, false),
    ];
    for (mode, count, clocks, value, out) in cases {
        let mut pit = pit();
        program(&mut pit, 2, mode, count);
        let now = after(clocks);
        let name = format!("mode {mode}, {clocks} of {count}");
        assert_eq!(read_word(&mut pit, 2, now), value, "{name}");
        assert_eq!(pit.read(0x61, now) & 0x20 != 0, out, "{name}");
    }
}

#[test]
fn zero_is_the_largest_count() {
    let mut pit = pit();
    program(&mut pit, 2, 0, 0);
    assert_eq!(read_word(&mut pit, 2, after(1)), 0xffff);
    assert_eq!(pit.read(0x61, after(65_535)) & 0x20, 0);
    assert_eq!(pit.read(0x61, after(65_536)) & 0x20, 0x20);
}

#[test]
fn access_modes() {
    let mut pit = pit();
    pit.write(0x43, 0x90, START);
    pit.write(0x42, 0x34, START);
    assert_eq!(pit.read(0x42, START), 0x34);
    assert_eq!(pit.read(0x42, START), 0x34);
    pit.write(0x43, 0xa0, START);
    pit.write(0x42, 0x12, START);
    assert_eq!(pit.read(0x42, START), 0x12);
    assert_eq!(pit.read(0x43, START), 0);
}

#[test]
fn a_latched_count_holds_still() {
    let mut pit = pit();
    program(&mut pit, 2, 2, 0x1234);
    pit.write(0x43, 0x80, after(0x34));
    // A second latch before the first is read is ignored.
    pit.write(0x43, 0x80, after(0x100));
    assert_eq!(read_word(&mut pit, 2, after(0x200)), 0x1200);
    assert_eq!(read_word(&mut pit, 2, after(0x34)), 0x1200);
    assert_eq!(read_word(&mut pit, 2, after(0x234)), 0x1000);
}

#[test]
fn read_back_latches_status_and_counts() {
    let mut pit = pit();
    program(&mut pit, 0, 2, 0x1000);
    program(&mut pit, 2, 3, 0x2000);
    // Both, of channels 0 and 2.
    pit.write(0x43, 0xc0 | 1 << 1 | 1 << 3, after(0x10));
    let later = after(0x800);
    assert_eq!(pit.read(0x40, later), 0x34, "OUT low, two bytes, mode 2");
    assert_eq!(read_word(&mut pit, 0, later), 0x0ff0);
    assert_eq!(pit.read(0x42, later), 0xb6, "OUT high, two bytes, mode 3");
    assert_eq!(read_word(&mut pit, 2, later), 0x1fe0);
    assert_eq!(read_word(&mut pit, 2, later), 0x1000);
    // Status only.
    pit.write(0x43, 0xe0 | 1 << 3, later);
    assert_eq!(pit.read(0x42, later) & 0x3f, 0x36);
    // Modes 6 and 7 are 2 and 3.
    pit.write(0x43, 0xbe, later);
    pit.write(0x43, 0xe8, later);
    assert_eq!(pit.read(0x42, later) & 0x0e, 3 << 1);
}

#[test]
fn speaker_port() {
    let mut pit = pit();
    assert_eq!(pit.read(0x61, START) & 0x23, 0x00);
    pit.write(0x61, 0x03, START);
    assert_eq!(pit.read(0x61, START) & 0x03, 0x03);
    let refresh = |now| pit.read_speaker(now) & 0x10;
    assert_ne!(refresh(START), refresh(START + (1 << 14)));
    assert!(pit.decodes(0x61) && !pit.decodes(0x62));
    assert!(!Pit::new(false, START).decodes(0x61));
}

#[test]
fn a_rising_gate_restarts() {
    let mut pit = pit();
    program(&mut pit, 2, 2, 1000);
    pit.write(0x61, 1, after(400));
    let since = |clocks| after(400) + after(clocks) - START;
    assert_eq!(read_word(&mut pit, 2, since(100)), 900);
    pit.write(0x61, 0, since(100));
    assert_eq!(read_word(&mut pit, 2, since(200)), 800);
}

#[test]
fn channel_0_goes_off() {
    let ns = |count: u64| count * NS_PER_S / FREQUENCY;
    // (mode, count, deadline, next deadline)
    let cases = [
        (0, 1193, Some(ns(1193)), None),
        (4, 1193, Some(ns(1193)), None),
        (2, 1193, Some(ns(1193)), Some(2 * ns(1193))),
        (3, 0, Some(ns(0x1_0000)), Some(2 * ns(0x1_0000))),
        // Periodic no faster than 200 us.
        (2, 10, Some(ns(10)), Some(ns(10) + MIN_PERIOD_NS)),
        (5, 1193, None, None),
    ];
    for (mode, count, first, second) in cases {
        let mut pit = pit();
        program(&mut pit, 0, mode, count);
        assert_eq!(pit.deadline(), first.map(|ns| START + ns), "mode {mode}");
        let Some(first) = first else { continue };
        assert!(!pit.timer_expired(START + first - 1));
        assert!(pit.timer_expired(START + first));
        assert_eq!(pit.deadline(), second.map(|ns| START + ns), "mode {mode}");
    }
}

#[test]
fn missed_ticks_are_reinjected() {
    let mut pit = pit();
    program(&mut pit, 0, 2, 1193);
    let first = pit.deadline().unwrap();
    let period = first - START;
    assert!(pit.timer_expired(first));
    // Three more while the guest has yet to acknowledge.
    assert!(!pit.timer_expired(first + 3 * period + 5));
    assert_eq!(pit.deadline(), Some(first + 4 * period));
    assert!(pit.irq_acked());
    assert!(pit.irq_acked());
    assert!(pit.irq_acked());
    assert!(!pit.irq_acked());

    // Unmasking and reprogramming forget them.
    pit.timer_expired(first + 6 * period);
    pit.reset_reinject();
    assert!(!pit.irq_acked());

    // Without reinjection every tick is tried.
    pit.set_reinject(false);
    for tick in 7..10 {
        assert!(pit.timer_expired(first + tick * period));
    }
    assert!(!pit.irq_acked());
}

#[test]
fn state_round_trip_keeps_the_phase() {
    let mut pit = pit();
    program(&mut pit, 0, 2, 11932);
    program(&mut pit, 2, 0, 5000);
    pit.write(0x61, 3, START);
    let now = after(3000);
    let state = pit.state();
    let mut copy = Pit::new(true, now);
    copy.set_state(&state, now);
    assert_eq!(copy.deadline(), pit.deadline());
    for clocks in [3000, 4999, 5000, 12_000, 40_000] {
        let now = after(clocks);
        assert_eq!(read_word(&mut copy, 0, now), read_word(&mut pit, 0, now));
        assert_eq!(copy.read(0x61, now), pit.read(0x61, now));
    }
    assert_eq!(copy.state().flags, KVM_PIT_FLAGS_SPEAKER_DATA_ON);

    // A latched half-read count goes with it.
    pit.write(0x43, 0x80, now);
    pit.read(0x42, now);
    copy.set_state(&pit.state(), now);
    assert_eq!(copy.read(0x42, now), pit.read(0x42, now));
}

#[test]
fn a_state_of_another_clock_starts_anew() {
    for load_time in [0, -5, (START + 1_000_000_000) as i64] {
        let mut pit = pit();
        program(&mut pit, 0, 2, 11932);
        let mut state = pit.state();
        state
            .channels
            .iter_mut()
            .for_each(|c| c.count_load_time = load_time);
        let now = after(7000);
        pit.set_state(&state, now);
        assert_eq!(pit.deadline(), Some(now + 11932 * NS_PER_S / FREQUENCY));
    }
}

#[test]
fn a_one_shot_keeps_what_remains() {
    let mut pit = pit();
    program(&mut pit, 0, 0, 11932);
    let (state, deadline) = (pit.state(), pit.deadline());
    pit.set_state(&state, after(4000));
    assert_eq!(pit.deadline(), deadline);
    // Long over by the new clock: whole once more.
    pit.set_state(&state, after(50_000));
    assert!(pit.deadline().unwrap() > after(50_000));
}

/// What KVM's structure has no field for is in its padding.
#[test]
fn what_has_no_field_is_carried() {
    // A one-shot that has gone off does not do so again.
    let mut pit = pit();
    program(&mut pit, 0, 0, 1000);
    assert!(pit.timer_expired(after(1001)));
    let mut copy = Pit::new(true, START);
    copy.set_state(&pit.state(), after(2000));
    assert_eq!(copy.deadline(), None);
    // The tick is still to be acknowledged.
    assert!(!copy.may_inject());
    // A control word without its count does not change what runs.
    program(&mut pit, 0, 2, 11932);
    pit.write(0x43, 0x30, after(3000));
    copy.set_state(&pit.state(), after(3000));
    assert_eq!(copy.deadline(), pit.deadline());
    assert!(copy.timer.periodic);
    // Missed ticks.
    let late = after(11932 * 4);
    pit.timer_expired(late);
    copy.set_state(&pit.state(), late);
    assert_eq!((copy.pending, copy.acked), (pit.pending, pit.acked));
    assert!(copy.pending > 1);
}

#[test]
fn the_padding_counts_only_beside_its_own_channel() {
    let mut pit = pit();
    assert_eq!(pit.state().reserved, [0; 9]);
    program(&mut pit, 0, 0, 1000);
    pit.timer_expired(after(1001));
    let mut state = pit.state();
    state.channels[0].count = 2000;
    pit.set_state(&state, START);
    assert!(pit.deadline().is_some());
}

#[test]
fn hpet_legacy_mode_takes_the_interrupt_away() {
    let mut pit = pit();
    program(&mut pit, 0, 2, 11932);
    let mut state = pit.state();
    state.flags = KVM_PIT_FLAGS_HPET_LEGACY;
    pit.set_state(&state, START);
    assert_eq!(pit.deadline(), None);
    pit.write(0x40, 0, START);
    pit.write(0x40, 0x10, START);
    assert_eq!(pit.deadline(), None);
    state.flags = 0;
    pit.set_state(&state, START);
    assert!(pit.deadline().is_some());
}

#[test]
fn any_state_is_survived() {
    let garbage = kvm_pit_channel_state {
        count: u32::MAX,
        latched_count: 0xffff,
        count_latched: 0xff,
        status_latched: 0xff,
        status: 0xff,
        read_state: 0xff,
        write_state: 0xff,
        write_latch: 0xff,
        rw_mode: 0xff,
        mode: 2,
        bcd: 0xff,
        gate: 0xff,
        count_load_time: i64::MIN,
    };
    for mode in 0..=255 {
        let mut state = kvm_pit_state2 {
            channels: [garbage; 3],
            ..Default::default()
        };
        state.channels.iter_mut().for_each(|c| c.mode = mode);
        let mut pit = pit();
        pit.set_state(&state, START);
        pit.timer_expired(u64::MAX);
        for port in [0x40, 0x41, 0x42, 0x43, 0x61] {
            for now in [0, START, u64::MAX] {
                pit.write(0x43, 0xce, now);
                pit.read(port, now);
                pit.read(port, now);
                pit.read(port, now);
                pit.write(port, 0xff, now);
            }
        }
    }
}
