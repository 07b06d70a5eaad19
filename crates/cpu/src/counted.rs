//! Running by count: exactly so many turns of the run loop, with a clock that counts instructions
//! instead of nanoseconds. For tests that stop a processor at every boundary it has, and for runs
//! that must be the same each time.
//!
//! A turn is an instruction's completion, its fault becoming pending, an iteration of a REP instruction,
//! or the delivery of an event. Between any two turns the state is one that a VMM may read out and put
//! into another processor. Time passes with completed instructions and delivered events, so that it does
//! not depend on where a run was cut.

use crate::cpu::Cpu;
use crate::events::vector;
use crate::exec::Step;
use crate::exit::Exit;

/// Time where a machine counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CountedTime {
    /// What the host's time-stamp counter is taken to show.
    pub host_tsc: u64,
    /// The run is over.
    pub stop: bool,
}

/// What a processor that runs by count keeps.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counted {
    /// Turns that are left.
    left: u64,
    /// Instructions and events the machine has been told of.
    told: u64,
    /// Time is up.
    stop: bool,
    /// Such a run is under way.
    pub running: bool,
}

impl Cpu {
    /// As [`Cpu::run`], but for exactly `turns` turns or until the machine says stop
    /// ([`crate::Machine::count_time`]); ends with [`Exit::Budget`] then. An operation that the last exit
    /// left half done is finished first, whatever the number. A software exception and its delivery are
    /// not told apart: no API can carry what is between them.
    pub fn run_counted(&mut self, turns: u64) -> Exit {
        self.counted.left = turns;
        self.counted.stop = false;
        self.counted.running = true;
        let exit = self.run_watched(|cpu| cpu.counted_turns());
        self.counted.running = false;
        exit
    }

    fn counted_turns(&mut self) -> Step {
        self.count_time();
        if self.io.pending() {
            let done = self.complete_io();
            self.count_time();
            done?;
        }
        loop {
            if self.check_events {
                self.raise_noted_traps()?;
                self.exit_behind_instruction()?;
            }
            if !self.software_exception_waits() {
                if self.requests.pending() != 0 {
                    self.serve_requests()?;
                }
                if self.counted.left == 0 || self.counted.stop {
                    return Ok(());
                }
            }
            self.counted.left = self.counted.left.saturating_sub(1);
            let done = if self.check_events {
                match self.serve_events() {
                    Ok(false) => self.step(),
                    Ok(true) => Ok(()),
                    Err(exit) => Err(exit),
                }
            } else {
                self.step()
            };
            self.count_time();
            done?;
        }
    }

    /// #BP and #OF, raised and not delivered.
    fn software_exception_waits(&self) -> bool {
        let e = &self.state.events.exception;
        e.pending && matches!(e.vector, vector::BP | vector::OF)
    }

    /// Tells the machine what was done since it was told last, and takes its time.
    fn count_time(&mut self) {
        let done = self
            .counters
            .instructions
            .wrapping_add(self.counters.events);
        let passed = done.wrapping_sub(std::mem::replace(&mut self.counted.told, done));
        if let Some(time) = self.machine.count_time(passed) {
            self.state.host_tsc = Some(time.host_tsc);
            self.counted.stop |= time.stop;
        }
    }
}
