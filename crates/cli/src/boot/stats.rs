//! What `--stats` prints: the time to the boot mark and to the end, the guest's instructions and how
//! fast they went.

use std::fmt::Write;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anykvm::VmFd;
use rustix::time::{ClockId, clock_gettime};

/// Measures a machine from its start.
pub struct Meter {
    start: Instant,
    start_cpu: Duration,
    mark: OnceLock<Reading>,
}

/// The state of the clocks and counters at one moment.
#[derive(Clone, Copy)]
struct Reading {
    wall: Duration,
    /// Processor time of the whole process: all vCPUs and the devices.
    cpu: Duration,
    instructions: u64,
}

impl Meter {
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            start_cpu: process_time(),
            mark: OnceLock::new(),
        }
    }

    /// Keeps the time of the first boot mark.
    pub fn mark(&self, vm: &VmFd) {
        self.mark.get_or_init(|| self.read(vm));
    }

    fn read(&self, vm: &VmFd) -> Reading {
        Reading {
            wall: self.start.elapsed(),
            cpu: process_time().saturating_sub(self.start_cpu),
            instructions: vm.stats().instructions,
        }
    }

    /// One line for each phase, and one for the exits.
    pub fn report(&self, vm: &VmFd) -> String {
        let mut text = String::new();
        if let Some(mark) = self.mark.get() {
            text.push_str(&line("boot to user space", mark));
        }
        text.push_str(&line("start to stop", &self.read(vm)));
        let _ = write!(text, "anykvm: {}", vm.stats());
        text
    }
}

/// Instructions that translated code executes are not counted, unless the translator was asked to.
fn line(phase: &str, reading: &Reading) -> String {
    let cpu = reading.cpu.as_secs_f64();
    format!(
        "anykvm: {phase}: {:.2} s, {cpu:.2} s of processor time, {:.1} million instructions counted\n",
        reading.wall.as_secs_f64(),
        reading.instructions as f64 / 1e6,
    )
}

fn process_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_times_and_instructions() {
        let reading = Reading {
            wall: Duration::from_millis(2500),
            cpu: Duration::from_secs(2),
            instructions: 150_000_000,
        };
        assert_eq!(
            line("boot", &reading),
            "anykvm: boot: 2.50 s, 2.00 s of processor time, 150.0 million instructions counted\n"
        );
    }
}
