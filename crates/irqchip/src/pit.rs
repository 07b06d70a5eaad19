//! The 8254 programmable interval timer and the speaker port (61H) that gates its third channel.
//! Specified by the Intel 8254 data sheet; channel 0 as KVM drives it, with the reinjection of ticks
//! that the guest was too slow to acknowledge (KVM_REINJECT_CONTROL).
//!
//! Counters are not stepped: each remembers when it was loaded, and what it reads as follows from the
//! time since.

mod carried;
#[cfg(test)]
mod tests;

use carried::Carried;

use anykvm_abi::{
    KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_FLAGS_SPEAKER_DATA_ON, kvm_pit_channel_state, kvm_pit_state2,
};

/// The input clock, in Hz.
const FREQUENCY: u64 = 1_193_182;
const NS_PER_S: u64 = 1_000_000_000;
/// A guest cannot make channel 0 periodic faster than this (kvm.min_timer_period_us).
const MIN_PERIOD_NS: u64 = 200_000;
/// A channel's mode before the guest has programmed one.
const MODE_NONE: u8 = 0xff;

/// Access modes of a counter (1, the rest, is the low byte only), and the states of a two-byte
/// access.
const MSB: u8 = 2;
const WORD0: u8 = 3;
const WORD1: u8 = 4;

/// The timer behind channel 0.
#[derive(Clone, Copy, Debug, Default)]
struct Timer {
    /// 0: never started.
    period: u64,
    periodic: bool,
    armed: bool,
    /// When it next goes (went, if not armed) off.
    expires: u64,
}

/// One 8254.
pub(crate) struct Pit {
    channels: [kvm_pit_channel_state; 3],
    flags: u32,
    timer: Timer,
    reinject: bool,
    /// Ticks the guest has yet to acknowledge (only when reinjecting).
    pending: u32,
    /// The last tick injected has been acknowledged.
    acked: bool,
    /// Whether port 61H is answered.
    speaker: bool,
}

impl Pit {
    pub fn new(speaker: bool, now: u64) -> Self {
        let channel = |gate| kvm_pit_channel_state {
            count: 0x1_0000,
            mode: MODE_NONE,
            gate,
            count_load_time: now as i64,
            ..Default::default()
        };
        Self {
            channels: [channel(1), channel(1), channel(0)],
            flags: 0,
            timer: Timer::default(),
            reinject: true,
            pending: 0,
            acked: true,
            speaker,
        }
    }

    /// Whether it answers at this port.
    pub fn decodes(&self, port: u16) -> bool {
        matches!(port, 0x40..=0x43) || port == 0x61 && self.speaker
    }

    /// When channel 0 next goes off.
    pub fn deadline(&self) -> Option<u64> {
        self.timer.armed.then_some(self.timer.expires)
    }

    /// Counts the ticks due at `now`; true if there is one to inject.
    pub fn timer_expired(&mut self, now: u64) -> bool {
        let timer = &mut self.timer;
        if !timer.armed || timer.expires > now {
            return false;
        }
        let mut ticks = 1;
        if timer.periodic {
            ticks += (now - timer.expires) / timer.period.max(1);
            timer.expires = timer
                .expires
                .saturating_add(ticks.saturating_mul(timer.period));
        } else {
            timer.armed = false;
        }
        if self.reinject {
            let ticks = u32::try_from(ticks).unwrap_or(u32::MAX);
            self.pending = self.pending.saturating_add(ticks);
        }
        self.may_inject()
    }

    /// Takes the right to inject a tick: always, unless reinjecting and the last one is still
    /// unacknowledged.
    fn may_inject(&mut self) -> bool {
        !self.reinject || std::mem::take(&mut self.acked)
    }

    /// GSI 0 was acknowledged; true if there is a missed tick to inject.
    pub fn irq_acked(&mut self) -> bool {
        if !self.reinject {
            return false;
        }
        self.acked = true;
        self.pending = self.pending.saturating_sub(1);
        self.pending > 0 && self.may_inject()
    }

    /// Forgets missed ticks: GSI 0 was unmasked or the timer reprogrammed.
    pub fn reset_reinject(&mut self) {
        self.pending = 0;
        self.acked = true;
    }

    /// KVM_REINJECT_CONTROL.
    pub fn set_reinject(&mut self, reinject: bool) {
        if self.reinject != reinject {
            self.reset_reinject();
            self.reinject = reinject;
        }
    }

    /// Input clocks since the counter was loaded (channel 0: since its period began).
    fn clocks(&self, channel: usize, now: u64) -> i64 {
        let elapsed = if channel == 0 {
            match self.timer.period {
                0 => 0,
                period => i128::from(period) + i128::from(now) - i128::from(self.timer.expires),
            }
        } else {
            i128::from(now) - i128::from(self.channels[channel].count_load_time)
        };
        (elapsed * i128::from(FREQUENCY) / i128::from(NS_PER_S)) as i64
    }

    fn count(&self, channel: usize, now: u64) -> u32 {
        let c = &self.channels[channel];
        let (count, clocks) = (i64::from(c.count.max(1)), self.clocks(channel, now));
        let value = match c.mode {
            // These wrap around after zero and go on.
            0 | 1 | 4 | 5 => count.wrapping_sub(clocks) & 0xffff,
            // The square wave counts down by two, once for each half.
            3 => count - clocks.wrapping_mul(2).rem_euclid(count),
            _ => count - clocks.rem_euclid(count),
        };
        value as u32
    }

    fn out(&self, channel: usize, now: u64) -> bool {
        let c = &self.channels[channel];
        let (count, clocks) = (i64::from(c.count.max(1)), self.clocks(channel, now));
        match c.mode {
            1 => clocks < count,
            2 => clocks != 0 && clocks.rem_euclid(count) == 0,
            3 => clocks.rem_euclid(count) < (count + 1) / 2,
            4 | 5 => clocks == count,
            _ => clocks >= count,
        }
    }

    fn latch_count(&mut self, channel: usize, now: u64) {
        if self.channels[channel].count_latched == 0 {
            let count = self.count(channel, now) as u16;
            let c = &mut self.channels[channel];
            c.latched_count = count;
            c.count_latched = c.rw_mode;
        }
    }

    fn latch_status(&mut self, channel: usize, now: u64) {
        if self.channels[channel].status_latched == 0 {
            let out = self.out(channel, now);
            let c = &mut self.channels[channel];
            c.status = u8::from(out) << 7 | (c.rw_mode & 3) << 4 | (c.mode & 7) << 1 | c.bcd & 1;
            c.status_latched = 1;
        }
    }

    /// A byte written to 40H-43H or 61H.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        match port {
            0x61 => self.write_speaker(value, now),
            0x43 => self.write_control(value, now),
            _ => self.write_counter(usize::from(port & 3), value, now),
        }
    }

    fn write_control(&mut self, value: u8, now: u64) {
        let channel = usize::from(value >> 6);
        if channel == 3 {
            // Read-back: bits 3:1 choose counters, a clear bit 5 latches counts, a clear 4 status.
            for channel in (0..3).filter(|channel| value & 2 << channel != 0) {
                if value & 0x20 == 0 {
                    self.latch_count(channel, now);
                }
                if value & 0x10 == 0 {
                    self.latch_status(channel, now);
                }
            }
            return;
        }
        let access = value >> 4 & 3;
        if access == 0 {
            self.latch_count(channel, now);
            return;
        }
        let c = &mut self.channels[channel];
        c.rw_mode = access;
        c.read_state = access;
        c.write_state = access;
        c.mode = value >> 1 & 7;
        // Modes 2 and 3 have a don't-care bit.
        if c.mode > 5 {
            c.mode -= 4;
        }
        c.bcd = value & 1;
    }

    fn write_counter(&mut self, channel: usize, value: u8, now: u64) {
        let c = &mut self.channels[channel];
        let count = match c.write_state {
            MSB => u32::from(value) << 8,
            WORD0 => {
                c.write_latch = value;
                c.write_state = WORD1;
                return;
            }
            WORD1 => {
                c.write_state = WORD0;
                u32::from(c.write_latch) | u32::from(value) << 8
            }
            _ => u32::from(value),
        };
        self.load(channel, count, now);
    }

    fn load(&mut self, channel: usize, count: u32, now: u64) {
        let c = &mut self.channels[channel];
        // Zero is the largest count.
        c.count = if count == 0 { 0x1_0000 } else { count };
        c.count_load_time = now as i64;
        if channel == 0 {
            self.start_timer(now);
        }
    }

    /// Starts channel 0's timer for its mode and count.
    fn start_timer(&mut self, now: u64) {
        let c = &self.channels[0];
        let periodic = match c.mode {
            0 | 1 | 4 => false,
            2 | 3 => true,
            _ => {
                self.timer.armed = false;
                return;
            }
        };
        // With the HPET in legacy mode the interrupt is the HPET's to make.
        if self.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0 {
            return;
        }
        let interval = u64::from(c.count) * NS_PER_S / FREQUENCY;
        self.timer = Timer {
            period: if periodic {
                interval.max(MIN_PERIOD_NS)
            } else {
                interval
            },
            periodic,
            armed: true,
            expires: now.saturating_add(interval),
        };
        self.reset_reinject();
    }

    /// A byte read from 40H-43H or 61H.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        match port {
            0x61 => self.read_speaker(now),
            // The control word cannot be read.
            0x43 => 0,
            _ => self.read_counter(usize::from(port & 3), now),
        }
    }

    fn read_counter(&mut self, channel: usize, now: u64) -> u8 {
        let c = &mut self.channels[channel];
        if c.status_latched != 0 {
            c.status_latched = 0;
            return c.status;
        }
        if c.count_latched != 0 {
            let [low, high] = c.latched_count.to_le_bytes();
            return match std::mem::take(&mut c.count_latched) {
                MSB => high,
                WORD0 => {
                    c.count_latched = MSB;
                    low
                }
                _ => low,
            };
        }
        let high = match c.read_state {
            MSB => true,
            WORD0 => {
                c.read_state = WORD1;
                false
            }
            WORD1 => {
                c.read_state = WORD0;
                true
            }
            _ => false,
        };
        let count = self.count(channel, now);
        if high {
            (count >> 8) as u8
        } else {
            count as u8
        }
    }

    fn write_speaker(&mut self, value: u8, now: u64) {
        if value & 2 != 0 {
            self.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
        } else {
            self.flags &= !KVM_PIT_FLAGS_SPEAKER_DATA_ON;
        }
        let gate = value & 1;
        let c = &mut self.channels[2];
        // A rising gate restarts these modes; in 0 and 4 it only lets the counter count.
        if matches!(c.mode, 1 | 2 | 3 | 5) && c.gate < gate {
            c.count_load_time = now as i64;
        }
        c.gate = gate;
    }

    fn read_speaker(&self, now: u64) -> u8 {
        let data = self.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0;
        // DRAM refresh toggles about every 15 us.
        let refresh = (now >> 14 & 1) as u8;
        u8::from(data) << 1
            | self.channels[2].gate & 1
            | u8::from(self.out(2, now)) << 5
            | refresh << 4
    }

    /// KVM_GET_PIT2. What KVM's structure has no field for is in its padding ([`Carried`]).
    pub fn state(&self) -> kvm_pit_state2 {
        let carried = Carried {
            timer: self.timer,
            pending: self.pending,
            acked: self.acked,
        };
        let mut state = kvm_pit_state2 {
            channels: self.channels,
            flags: self.flags,
            ..Default::default()
        };
        if self.timer.armed {
            let began = self.timer.expires.saturating_sub(self.timer.period);
            state.channels[0].count_load_time = began as i64;
        }
        if state.channels[0].mode != MODE_NONE {
            state.reserved = carried.words(&state.channels[0]);
        }
        state
    }

    /// KVM_SET_PIT2. A `count_load_time` that this clock can have had puts the counter back where it
    /// was; any other (another machine's clock, or none) starts it anew, as KVM always does.
    pub fn set_state(&mut self, state: &kvm_pit_state2, now: u64) {
        let was_legacy = self.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0;
        self.channels = state.channels;
        self.flags = state.flags;
        let becomes_legacy = !was_legacy && self.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0;
        for channel in 0..3 {
            let c = self.channels[channel];
            let loaded = u64::try_from(c.count_load_time)
                .ok()
                .filter(|loaded| (1..=now).contains(loaded));
            self.channels[channel].count = match c.count {
                0 => 0x1_0000,
                count => count,
            };
            self.channels[channel].count_load_time = loaded.unwrap_or(now) as i64;
            if channel == 0 {
                if becomes_legacy {
                    self.timer.armed = false;
                } else if let Some(carried) =
                    Carried::from_words(&state.reserved, &state.channels[0])
                {
                    self.timer = carried.timer;
                    self.pending = carried.pending;
                    self.acked = carried.acked;
                    if self.timer.armed {
                        self.timer.expires = now.saturating_add(self.timer.period);
                        self.resume_timer(loaded, now);
                    } else {
                        let loaded = loaded.unwrap_or(now);
                        self.timer.expires = loaded.saturating_add(self.timer.period);
                    }
                } else {
                    self.start_timer(now);
                    self.resume_timer(loaded, now);
                }
            }
        }
    }

    /// Gives the timer just started the phase of one whose period began at `loaded`. A one-shot that
    /// would have gone off since keeps its new start: a tick too many is harmless, a lost one is not.
    fn resume_timer(&mut self, loaded: Option<u64>, now: u64) {
        let Some(elapsed) = loaded.map(|loaded| now - loaded) else {
            return;
        };
        let timer = &mut self.timer;
        if timer.armed && timer.periodic {
            timer.expires = now.saturating_add(timer.period - elapsed % timer.period.max(1));
        } else if timer.armed && elapsed < timer.period {
            timer.expires = now.saturating_add(timer.period - elapsed);
        }
    }
}
