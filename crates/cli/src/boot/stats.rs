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
    /// Those of them that were executed by translated code.
    translated: u64,
}

impl Meter {
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            start_cpu: process_time(),
            mark: OnceLock::new(),
        }
    }

    /// The guest has made a mark: number 1, the first time, is the boot mark, whose time is kept. Of others
    /// a line says which instructions were executed up to there.
    pub fn mark(&self, vm: &VmFd, number: u32) {
        let reading = self.read(vm);
        if number == 1 {
            self.mark.get_or_init(|| reading);
        } else {
            eprint!("{}", line(&format!("mark {number}"), &reading));
        }
    }

    fn read(&self, vm: &VmFd) -> Reading {
        let stats = vm.stats();
        let mut counters = stats.counters.iter();
        let translated = counters.find(|(name, _)| *name == "jit_translated_instructions");
        Reading {
            wall: self.start.elapsed(),
            cpu: process_time().saturating_sub(self.start_cpu),
            instructions: stats.instructions,
            translated: translated.map_or(0, |(_, value)| *value),
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

/// Instructions that translated code executes are not counted, unless the translator was asked to. Then the
/// line says how many of all these were.
fn line(phase: &str, reading: &Reading) -> String {
    let cpu = reading.cpu.as_secs_f64();
    let mut text = format!(
        "anykvm: {phase}: {:.2} s, {cpu:.2} s of processor time, {:.1} million instructions counted",
        reading.wall.as_secs_f64(),
        reading.instructions as f64 / 1e6,
    );
    if reading.translated != 0 {
        let Reading {
            instructions: all,
            translated,
            ..
        } = reading;
        let share = *translated as f64 * 100.0 / *all as f64;
        let _ = write!(text, ", {translated} of {all} translated ({share:.3} %)");
    }
    text.push('\n');
    text
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
            translated: 0,
        };
        let expected =
            "anykvm: boot: 2.50 s, 2.00 s of processor time, 150.0 million instructions counted";
        assert_eq!(line("boot", &reading), format!("{expected}\n"));
        let reading = Reading {
            translated: 149_925_000,
            ..reading
        };
        let counted = ", 149925000 of 150000000 translated (99.950 %)\n";
        assert_eq!(line("boot", &reading), format!("{expected}{counted}"));
    }
}
