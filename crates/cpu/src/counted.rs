//! Running by count: exactly so many turns of the run loop, with a clock that counts instructions
//! instead of nanoseconds. For tests that stop a processor at every boundary it has, and for runs
//! that must be the same each time.
//!
//! A turn is an instruction's completion, its fault becoming pending, an iteration of a REP instruction,
//! or the delivery of an event. Between any two turns the state is one that a VMM may read out and put
//! into another processor. Time passes with completed instructions and delivered events, so that it does
//! not depend on where a run was cut.
//!
//! A translator that can stop at any instruction ([`Translator::run_by_count`]) executes what it has translated,
//! up to where turns or time end or a timer is due. All else is done here, instruction by instruction. So turns and time are
//! the same with it and without.
//!
//! [`Translator::run_by_count`]: crate::translator::Translator::run_by_count

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
    /// After so many instructions, at least one, the machine must be told, because a timer is due then or the
    /// run is over.
    pub most: u64,
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
    /// Instructions that may be executed before the machine is told.
    most: u64,
    /// Nothing is translated from here to the next branch.
    cold: bool,
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
        self.counted.cold = false;
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
        let mut alone = false;
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
            if !alone && self.translated_turns() {
                // What it has stopped at is not translated, or time is up.
                alone = true;
                self.count_time();
                continue;
            }
            alone = false;
            self.counted.left = self.counted.left.saturating_sub(1);
            let done = self.counted_turn();
            self.count_time();
            done?;
        }
    }

    fn counted_turn(&mut self) -> Step {
        if self.check_events && self.serve_events()? {
            return Ok(());
        }
        let rip = self.state.rip();
        let done = self.step();
        self.counted.cold &= self.state.rip() == rip.wrapping_add(self.last_len.into());
        done
    }

    /// How many elements of a string instruction may be done at once: where instructions are counted, each is
    /// one, so that it does not matter what the TLB holds.
    #[inline]
    pub(crate) fn most_elements(&self) -> u64 {
        if !self.counted.running {
            return u64::MAX;
        }
        // One turn has been taken off for this instruction.
        let turns = self.counted.left.saturating_add(1);
        turns.min(self.counted.most)
    }

    /// So many elements were done at once. One of them counts as the instruction itself.
    #[inline]
    pub(crate) fn note_elements(&mut self, count: u64) {
        if self.counted.running {
            self.counted.left -= count - 1;
            self.counters.instructions += count - 1;
        }
    }

    /// Executes translated code from RIP on, if there is any; false if it does nothing.
    fn translated_turns(&mut self) -> bool {
        if self.counted.cold || self.check_events || self.must_step() {
            return false;
        }
        let most = self.counted.left.min(self.counted.most);
        let Some(mut translator) = self.translator.take() else {
            return false;
        };
        let done = translator.run_by_count(self, most);
        self.translator = Some(translator);
        self.counted.cold = done.is_none();
        let done = done.unwrap_or_default();
        self.counted.left -= done;
        self.counters.instructions += done;
        done != 0
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
        self.counted.most = u64::MAX;
        if let Some(time) = self.machine.count_time(passed) {
            self.state.host_tsc = Some(time.host_tsc);
            self.counted.stop |= time.stop;
            self.counted.most = time.most;
        }
    }
}
