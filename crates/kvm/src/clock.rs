//! Time: the clock timers run on, kvmclock (KVM_GET_CLOCK, KVM_SET_CLOCK) and the TSC's frequency
//! (KVM API, sections 4.29, 4.30, 4.55 and 4.56).
//!
//! kvmclock is the nanoseconds since the VM was created, plus what KVM_SET_CLOCK adds. With a TSC
//! that every processor of the host shares (an invariant TSC, and the host uses it itself) kvmclock is
//! computed from it by one pair (TSC, nanoseconds) for the whole VM, as Linux's master clock, so that
//! the vCPUs' readings agree with each other and with KVM_GET_CLOCK. Else it is CLOCK_MONOTONIC_RAW,
//! which, unlike CLOCK_MONOTONIC, NTP does not slew.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use anykvm_abi::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, kvm_clock_data};
use anykvm_cpu::host_tsc;
use rustix::time::{ClockId, clock_gettime};

use crate::error::{Errno, Result};
use crate::paravirt::time_scale;
use crate::time::Time;

/// Flags that KVM_SET_CLOCK takes (and KVM_CAP_ADJUST_CLOCK reports).
pub(crate) const VALID_FLAGS: u32 = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;

fn read_ns(clock: ClockId) -> u64 {
    let t = clock_gettime(clock);
    (t.tv_sec as u64)
        .wrapping_mul(1_000_000_000)
        .wrapping_add(t.tv_nsec as u64)
}

/// Nanoseconds of CLOCK_MONOTONIC: what all timers and deadlines of a VM are in.
pub fn monotonic_ns() -> u64 {
    read_ns(ClockId::Monotonic)
}

/// Nanoseconds since 1970.
pub(crate) fn realtime_ns() -> u64 {
    read_ns(ClockId::Realtime)
}

fn raw_ns() -> u64 {
    read_ns(ClockId::MonotonicRaw)
}

/// The host's TSC as a clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostTsc {
    /// Its frequency.
    pub khz: u32,
    /// Whether it is invariant and the host's own clock source, so that all processors agree.
    pub stable: bool,
}

/// Measures the host's TSC, once a process.
pub fn host() -> HostTsc {
    static HOST: OnceLock<HostTsc> = OnceLock::new();
    *HOST.get_or_init(|| HostTsc {
        khz: measure_khz(),
        stable: is_stable(),
    })
}

/// A clock and the TSC at one instant, as nearly as can be told: the pair that took least time.
pub(crate) fn simultaneous(clock: fn() -> u64) -> (u64, u64) {
    (0..16)
        .map(|_| {
            let before = host_tsc();
            let ns = clock();
            let after = host_tsc();
            (
                after.wrapping_sub(before),
                ns,
                before.wrapping_add(after.wrapping_sub(before) / 2),
            )
        })
        .min_by_key(|(width, ..)| *width)
        .map(|(_, ns, tsc)| (ns, tsc))
        .unwrap_or_default()
}

fn measure_khz() -> u32 {
    let (ns0, tsc0) = simultaneous(raw_ns);
    std::thread::sleep(std::time::Duration::from_millis(20));
    let (ns1, tsc1) = simultaneous(raw_ns);
    let (cycles, ns) = (tsc1.wrapping_sub(tsc0), ns1.wrapping_sub(ns0).max(1));
    ((u128::from(cycles) * 1_000_000 + u128::from(ns) / 2) / u128::from(ns)) as u32
}

fn is_stable() -> bool {
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let host_uses_it = std::fs::read_to_string(source).is_ok_and(|s| s.trim() == "tsc");
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let invariant = flags
        .lines()
        .find(|l| l.starts_with("flags"))
        .is_some_and(|l| l.split_whitespace().any(|f| f == "nonstop_tsc"));
    host_uses_it && invariant
}

/// kvmclock at one instant: `ns` when the host's TSC was `tsc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockPair {
    /// The host's TSC.
    pub tsc: u64,
    /// kvmclock.
    pub ns: u64,
}

/// A VM's kvmclock and its TSC's default frequency.
#[derive(Debug)]
pub struct Clock {
    host: HostTsc,
    /// Multiplier and shift that turn cycles into nanoseconds.
    scale: (u32, i8),
    time: Arc<Time>,
    /// Stable TSC: the master pair. Else `ns` is what is added to the raw clock.
    base: Mutex<ClockPair>,
    default_tsc_khz: AtomicU32,
    /// Incremented by KVM_SET_CLOCK: the guest's pages are to be written anew.
    generation: AtomicU32,
}

impl Clock {
    /// A clock that shows 0 now.
    pub(crate) fn new(time: Arc<Time>) -> Self {
        let host = time.host_tsc();
        let clock = Self {
            host,
            scale: time_scale(host.khz),
            time,
            base: Mutex::new(ClockPair { tsc: 0, ns: 0 }),
            default_tsc_khz: AtomicU32::new(host.khz),
            generation: AtomicU32::new(0),
        };
        clock.set_ns(0);
        clock
    }

    /// The host's TSC.
    pub fn host(&self) -> HostTsc {
        self.host
    }

    /// Incremented whenever the clock was set.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// A pair to compute kvmclock from. With a stable TSC it is the same for every vCPU until the
    /// clock is set; else it is of this moment.
    pub fn pair(&self) -> ClockPair {
        let base = *self.lock();
        if self.host.stable {
            return base;
        }
        let (raw, tsc) = simultaneous(raw_ns);
        ClockPair {
            tsc,
            ns: raw.wrapping_add(base.ns),
        }
    }

    /// kvmclock and the host's TSC now.
    pub fn now(&self) -> ClockPair {
        let pair = self.pair();
        if !self.host.stable {
            return pair;
        }
        let tsc = self.time.tsc();
        ClockPair {
            tsc,
            ns: pair
                .ns
                .wrapping_add(self.cycles_to_ns(tsc.wrapping_sub(pair.tsc))),
        }
    }

    /// As a guest computes it (`pvclock_scale_delta`), to the nanosecond: what KVM_GET_CLOCK shows must not
    /// be behind what the guest has read.
    fn cycles_to_ns(&self, cycles: u64) -> u64 {
        let (mul, shift) = self.scale;
        let shifted = if shift < 0 {
            cycles >> -shift
        } else {
            cycles << shift
        };
        ((u128::from(shifted) * u128::from(mul)) >> 32) as u64
    }

    fn set_ns(&self, ns: u64) {
        *self.lock() = if self.host.stable {
            ClockPair {
                tsc: self.time.tsc(),
                ns,
            }
        } else {
            ClockPair {
                tsc: 0,
                ns: ns.wrapping_sub(raw_ns()),
            }
        };
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ClockPair> {
        self.base.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// KVM_GET_CLOCK.
    pub(crate) fn get(&self) -> kvm_clock_data {
        let now = self.now();
        let mut data = kvm_clock_data {
            clock: now.ns,
            ..Default::default()
        };
        if self.host.stable {
            data.flags = VALID_FLAGS;
            data.realtime = self.time.realtime_ns();
            data.host_tsc = now.tsc;
        }
        data
    }

    /// KVM_SET_CLOCK. With KVM_CLOCK_REALTIME the time that has passed since the state was saved is
    /// added.
    pub(crate) fn set(&self, data: &kvm_clock_data) -> Result<()> {
        if data.flags & !VALID_FLAGS != 0 {
            return Err(Errno::EINVAL);
        }
        let mut ns = data.clock;
        if data.flags & KVM_CLOCK_REALTIME != 0 {
            ns = ns.wrapping_add(self.time.realtime_ns().saturating_sub(data.realtime));
        }
        self.set_ns(ns);
        Ok(())
    }

    /// The TSC frequency new vCPUs get (KVM_GET_TSC_KHZ on the VM).
    pub fn default_tsc_khz(&self) -> u32 {
        self.default_tsc_khz.load(Ordering::Relaxed)
    }

    /// KVM_SET_TSC_KHZ on the VM; 0 is the host's frequency.
    pub(crate) fn set_default_tsc_khz(&self, khz: u32) {
        let khz = if khz == 0 { self.host.khz } else { khz };
        self.default_tsc_khz.store(khz, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_at_zero_and_goes_on_from_what_is_set() {
        let clock = Clock::new(Time::of_host());
        let first = clock.get().clock;
        assert!(first < 1_000_000_000);
        clock
            .set(&kvm_clock_data {
                clock: 5_000_000_000_000,
                ..Default::default()
            })
            .unwrap();
        let mut last = clock.get().clock;
        assert!((5_000_000_000_000..5_001_000_000_000).contains(&last));
        for _ in 0..1000 {
            let now = clock.get().clock;
            assert!(now >= last);
            last = now;
        }
    }

    #[test]
    fn unknown_flags_change_nothing() {
        let clock = Clock::new(Time::of_host());
        let bad = kvm_clock_data {
            clock: 1 << 60,
            flags: 1,
            ..Default::default()
        };
        assert_eq!(clock.set(&bad), Err(Errno::EINVAL));
        assert!(clock.get().clock < 1 << 50);
    }

    #[test]
    fn frequency_is_plausible() {
        assert!((100_000..10_000_000).contains(&host().khz));
    }
}
