//! Waking and interrupting a vCPU: its requests word, and the futex on that word that a halted vCPU
//! sleeps on (Linux: `Documentation/virt/kvm/vcpu-requests.rst`, "Waiting for Acknowledgements" and
//! `kvm_vcpu_kick`).
//!
//! The word itself is the futex, so a bit set between the vCPU's last look and its sleep is not
//! lost: the sleep then does not begin. A signal handler may set a bit with nothing but
//! [`Requests::set`]: the signal itself ends the sleep.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anykvm_cpu::Requests;
use anykvm_cpu::requests::{EVENT, EXITS};
use rustix::thread::futex;
use rustix::time::Timespec;

/// Bits that end a sleep. The others wait: a sleeping vCPU is outside the run loop.
const WAKING: u32 = EVENT | EXITS;

/// The requests of one vCPU and its sleep.
#[derive(Debug, Default)]
pub struct Kick {
    requests: Arc<Requests>,
    asleep: AtomicBool,
}

impl Kick {
    /// The requests word, shared with the processor.
    pub fn requests(&self) -> &Arc<Requests> {
        &self.requests
    }

    /// Sets request bits and, if the vCPU sleeps, wakes it.
    pub fn request(&self, bits: u32) {
        self.requests.set(bits);
        if self.asleep.load(Ordering::SeqCst) {
            // Fails only for an address that is not mapped.
            let _ = futex::wake(self.requests.word(), futex::Flags::PRIVATE, 1);
        }
    }

    /// Sleeps until a waking bit is set, a signal arrives, or the deadline (nanoseconds of
    /// CLOCK_MONOTONIC) has passed. May return early.
    pub fn sleep(&self, deadline: Option<u64>) {
        self.asleep.store(true, Ordering::SeqCst);
        let word = self.requests.word().load(Ordering::SeqCst);
        if word & WAKING == 0 {
            match deadline {
                None => {
                    let _ = futex::wait(self.requests.word(), futex::Flags::PRIVATE, word, None);
                }
                Some(at) => {
                    let left = at.saturating_sub(crate::clock::monotonic_ns());
                    if left > 0 {
                        let timeout = Timespec {
                            tv_sec: (left / 1_000_000_000) as i64,
                            tv_nsec: (left % 1_000_000_000) as i64,
                        };
                        let _ = futex::wait(
                            self.requests.word(),
                            futex::Flags::PRIVATE,
                            word,
                            Some(&timeout),
                        );
                    }
                }
            }
        }
        self.asleep.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn request_wakes_and_is_not_lost() {
        let kick = Arc::new(Kick::default());
        kick.request(EVENT);
        kick.sleep(None);
        assert_eq!(kick.requests().take(EVENT), EVENT);

        let sleeper = {
            let kick = kick.clone();
            std::thread::spawn(move || {
                for _ in 0..1000 {
                    while kick.requests().take(EVENT) == 0 {
                        kick.sleep(None);
                    }
                }
            })
        };
        while !sleeper.is_finished() {
            kick.request(EVENT);
            std::thread::yield_now();
        }
        sleeper.join().unwrap();
    }

    #[test]
    fn deadline_ends_sleep() {
        let kick = Kick::default();
        let start = Instant::now();
        kick.sleep(Some(crate::clock::monotonic_ns() + 5_000_000));
        assert!(start.elapsed() >= Duration::from_millis(4));
    }
}
