//! What the PIT has beside `struct kvm_pit_state2`, carried in the structure's padding: channel 0's timer as
//! it runs, and the ticks that the guest has yet to acknowledge. KVM leaves the padding zero; there a
//! restored one-shot goes off once more, a timer whose control word has been written runs by the new
//! mode before its count is loaded, and missed ticks are forgotten. So they are here for a state whose
//! padding is zero, or belongs to another channel 0 than the one beside it (the VMM has changed that).

use anykvm_abi::kvm_pit_channel_state;

use super::Timer;

/// The words that follow hold something.
const VALID: u32 = 1;
const PERIODIC: u32 = 1 << 1;
const ARMED: u32 = 1 << 2;
const ACKED: u32 = 1 << 3;

#[derive(Clone, Copy, Debug)]
pub(super) struct Carried {
    /// Its `expires` is not carried: `count_load_time` tells the phase.
    pub timer: Timer,
    /// Ticks to acknowledge.
    pub pending: u32,
    /// The last tick was acknowledged.
    pub acked: bool,
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

fn whole(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

impl Carried {
    /// `kvm_pit_state2.reserved` beside this channel 0.
    pub fn words(&self, channel: &kvm_pit_channel_state) -> [u32; 9] {
        let flag = |on, bit| if on { bit } else { 0 };
        let flags = VALID
            | flag(self.timer.periodic, PERIODIC)
            | flag(self.timer.armed, ARMED)
            | flag(self.acked, ACKED);
        let [period_low, period_high] = halves(self.timer.period);
        [
            flags,
            self.pending,
            period_low,
            period_high,
            0,
            0,
            channel.count,
            channel.mode.into(),
            channel.count_load_time as u32,
        ]
    }

    /// The other way round; `None` if nothing is carried.
    pub fn from_words(words: &[u32; 9], channel: &kvm_pit_channel_state) -> Option<Self> {
        let [flags, pending, period_low, period_high, _, _, of @ ..] = *words;
        let now = [
            channel.count,
            channel.mode.into(),
            channel.count_load_time as u32,
        ];
        (flags & VALID != 0 && of == now).then(|| Self {
            timer: Timer {
                period: whole(period_low, period_high),
                periodic: flags & PERIODIC != 0,
                armed: flags & ARMED != 0,
                expires: 0,
            },
            pending,
            acked: flags & ACKED != 0,
        })
    }
}
