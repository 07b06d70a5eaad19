//! The APIC timer: one-shot, periodic and TSC-deadline. SDM volume 3, "APIC Timer". The bus clock is
//! 1 GHz, so a count divided by nothing is nanoseconds.
//!
//! A timer whose deadline has passed is due: it stays armed until the vCPU's thread delivers its
//! interrupt within KVM_RUN (`kvm_inject_pending_timer_irqs`), and whoever sees the deadline pass only
//! tells the vCPU. So a stopped vCPU's registers stand still, and what a VMM reads by several calls fits
//! together.
//!
//! Only this part of the APIC has a lock: its deadline is looked at by the event thread while the vCPU
//! runs. The deadline is also kept in an atomic, for those who only want to know when.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::registers::{LvtEntry, TIMER_MODE_PERIODIC, TIMER_MODE_TSC_DEADLINE, offset};
use super::{Lapic, VcpuEvents};
use crate::sync::lock;

/// A guest cannot make the timer periodic faster than this (kvm.min_timer_period_us).
const MIN_PERIOD_NS: u64 = 200_000;
/// In the deadline's atomic: none.
const NEVER: u64 = u64::MAX;

/// LVT timer bits 18:17.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum TimerMode {
    #[default]
    OneShot,
    Periodic,
    TscDeadline,
    /// Both bits set: the timer does not run.
    Reserved,
}

impl TimerMode {
    fn from_lvt(lvt: u32) -> Self {
        match (
            lvt & TIMER_MODE_PERIODIC != 0,
            lvt & TIMER_MODE_TSC_DEADLINE != 0,
        ) {
            (false, false) => Self::OneShot,
            (true, false) => Self::Periodic,
            (false, true) => Self::TscDeadline,
            (true, true) => Self::Reserved,
        }
    }

    fn counts(self) -> bool {
        matches!(self, Self::OneShot | Self::Periodic)
    }
}

/// What follows from the registers and the times they were written at.
#[derive(Clone, Copy, Debug, Default)]
struct TimerState {
    mode: TimerMode,
    /// Divisor from the divide configuration register.
    divide: u32,
    /// Initial count in nanoseconds (bounded below when periodic); 0: never started.
    period: u64,
    /// When the count reaches zero, or did: of a periodic timer that is due, the first time or the next.
    target: u64,
    /// IA32_TSC_DEADLINE.
    tsc_deadline: u64,
    /// When the interrupt is due, until it is delivered.
    armed: Option<u64>,
}

impl TimerState {
    fn bound_period(&mut self) {
        if self.mode == TimerMode::Periodic && self.period != 0 {
            self.period = self.period.max(MIN_PERIOD_NS);
        }
    }

    /// The interrupt is due and given; what comes next.
    fn advance(&mut self, now: u64) {
        self.armed = None;
        match self.mode {
            TimerMode::Periodic if self.period != 0 => {
                // Ticks that nobody was there to take are lost, the phase is kept.
                self.target = now.saturating_add(self.left_ns(now));
                self.armed = Some(self.target);
            }
            TimerMode::TscDeadline => self.tsc_deadline = 0,
            _ => self.target = 0,
        }
    }

    fn is_due(&self, now: u64) -> bool {
        self.armed.is_some_and(|at| at <= now)
    }

    /// Nanoseconds until the count is zero (again, if it is periodic).
    fn left_ns(&self, now: u64) -> u64 {
        if self.mode == TimerMode::Periodic && self.target <= now {
            let passed = (now - self.target).checked_rem(self.period);
            return passed.map_or(0, |passed| self.period - passed);
        }
        self.target.saturating_sub(now)
    }

    /// The current count with so much time left.
    fn count(&self, left_ns: u64) -> u32 {
        let in_period = match left_ns.checked_rem(self.period) {
            Some(0) if left_ns != 0 => self.period,
            rest => rest.unwrap_or(0),
        };
        u32::try_from(in_period / u64::from(self.divide.max(1))).unwrap_or(u32::MAX)
    }
}

/// How far a timer that counts has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TimeLeft {
    /// The current-count register.
    pub count: u32,
    /// Nanoseconds until it is zero.
    pub ns: u64,
    /// It has run out and does not run.
    pub stopped: bool,
    /// It is periodic, and the interrupt of an earlier zero is still to come.
    pub due: bool,
    /// Its period is [`MIN_PERIOD_NS`], more than the initial count's.
    pub bounded: bool,
}

/// The timer of one local APIC.
pub(super) struct Timer {
    state: Mutex<TimerState>,
    deadline: AtomicU64,
}

impl Timer {
    pub fn new() -> Self {
        Self {
            state: Mutex::new(TimerState {
                divide: divisor(0),
                ..TimerState::default()
            }),
            deadline: AtomicU64::new(NEVER),
        }
    }

    pub fn deadline(&self) -> Option<u64> {
        match self.deadline.load(Ordering::SeqCst) {
            NEVER => None,
            deadline => Some(deadline),
        }
    }
}

/// The divisor of a divide configuration register: bits 3, 1 and 0.
fn divisor(tdcr: u32) -> u32 {
    let log2 = (tdcr & 3 | tdcr >> 1 & 4) + 1;
    1 << (log2 & 7)
}

fn bus_ns(count: u32, divide: u32) -> u64 {
    u64::from(count) * u64::from(divide)
}

/// The lock, and whether the deadline is another when it is released.
struct Guard<'a> {
    state: MutexGuard<'a, TimerState>,
    timer: &'a Timer,
}

impl Guard<'_> {
    /// Unlocks, and tells of a new deadline; if it has passed already (`due`), the vCPU too.
    fn finish(self, lapic: &Lapic, due: bool) {
        let mut armed = self.state.armed;
        let changed = armed != self.timer.deadline();
        self.timer
            .deadline
            .store(armed.unwrap_or(NEVER), Ordering::SeqCst);
        drop(self.state);
        if due {
            lapic.events.notify();
        }
        let mut untold = changed;
        while untold {
            lapic.events.timer_armed(armed);
            // Another thread may have told of its later deadline before this one told of its own:
            // whoever is last makes it right.
            let current = self.timer.deadline();
            untold = current != armed;
            armed = current;
        }
    }
}

impl Lapic {
    fn lock_timer(&self) -> Guard<'_> {
        Guard {
            state: lock(&self.timer.state),
            timer: &self.timer,
        }
    }

    /// The timer's deadline, lock-free.
    pub fn next_deadline(&self) -> Option<u64> {
        self.timer.deadline()
    }

    /// Tells the vCPU if the deadline has passed at `now`. Any thread.
    pub fn timer_expired(&self, now: u64) {
        if self.timer_is_due(now) {
            self.events.notify();
        }
    }

    fn timer_is_due(&self, now: u64) -> bool {
        self.next_deadline().is_some_and(|deadline| deadline <= now)
    }

    /// Delivers the interrupt of a timer that is due, and rearms a periodic one. On the vCPU's own thread,
    /// before it looks for interrupts.
    pub fn deliver_timer(&self) {
        if self.next_deadline().is_none() {
            return;
        }
        let now = self.events.now_ns();
        if !self.timer_is_due(now) {
            return;
        }
        let mut timer = self.lock_timer();
        if timer.state.is_due(now) {
            timer.state.advance(now);
            self.deliver_lvt(LvtEntry::Timer);
        }
        timer.finish(self, false);
    }

    /// IA32_TSC_DEADLINE: 0 unless the timer is in that mode and armed.
    pub fn tsc_deadline(&self) -> u64 {
        let timer = self.lock_timer();
        if self.present() && timer.state.mode == TimerMode::TscDeadline {
            timer.state.tsc_deadline
        } else {
            0
        }
    }

    /// Writes IA32_TSC_DEADLINE; ignored unless the timer is in that mode.
    pub fn set_tsc_deadline(&self, value: u64) {
        let mut timer = self.lock_timer();
        if !self.present() || timer.state.mode != TimerMode::TscDeadline {
            return;
        }
        timer.state.tsc_deadline = value;
        let due = arm_tsc_deadline(&mut timer.state, self.events.as_ref());
        timer.finish(self, due);
    }

    /// The guest TSC's offset or rate changed: an armed TSC deadline gets a new time.
    pub fn tsc_changed(&self) {
        let mut timer = self.lock_timer();
        let due = timer.state.mode == TimerMode::TscDeadline
            && arm_tsc_deadline(&mut timer.state, self.events.as_ref());
        timer.finish(self, due);
    }

    pub(super) fn timer_current_count(&self) -> u32 {
        self.timer_left().count
    }

    pub(super) fn timer_left(&self) -> TimeLeft {
        let initial = self.regs.get(offset::TIMER_INITIAL_COUNT);
        let timer = self.lock_timer();
        let state = &timer.state;
        let now = self.events.now_ns();
        let runs = state.mode.counts() && initial != 0 && state.armed.is_some();
        let ns = if runs { state.left_ns(now) } else { 0 };
        TimeLeft {
            count: state.count(ns),
            ns,
            stopped: state.mode.counts() && state.period != 0 && state.armed.is_none(),
            due: runs && state.mode == TimerMode::Periodic && state.is_due(now),
            bounded: state.period > bus_ns(initial, state.divide),
        }
    }

    /// The LVT timer register or its writable bits changed.
    pub(super) fn timer_lvt_changed(&self) {
        let mode = TimerMode::from_lvt(self.regs.get(offset::LVT_TIMER) & self.timer_mode_mask());
        let mut timer = self.lock_timer();
        let state = &mut timer.state;
        if state.mode != mode {
            if (state.mode == TimerMode::TscDeadline) != (mode == TimerMode::TscDeadline) {
                self.regs.set(offset::TIMER_INITIAL_COUNT, 0);
                state.period = 0;
                state.tsc_deadline = 0;
                state.armed = None;
            }
            state.mode = mode;
            state.bound_period();
        }
        timer.finish(self, false);
    }

    /// Writes the initial count, which starts the timer (or with 0 stops it).
    pub(super) fn set_timer_initial_count(&self, count: u32) {
        let mut timer = self.lock_timer();
        let state = &mut timer.state;
        if state.mode == TimerMode::TscDeadline {
            return;
        }
        self.regs.set(offset::TIMER_INITIAL_COUNT, count);
        state.period = bus_ns(count, state.divide);
        state.bound_period();
        state.armed = None;
        if state.period != 0 && state.mode.counts() {
            state.target = self.events.now_ns().saturating_add(state.period);
            state.armed = Some(state.target);
        }
        timer.finish(self, false);
    }

    /// Writes the divide configuration: what remains of the count goes on at the new rate.
    pub(super) fn set_timer_divide(&self, value: u32) {
        self.regs.set(offset::TIMER_DIVIDE, value & 0xb);
        let mut timer = self.lock_timer();
        let state = &mut timer.state;
        let old = std::mem::replace(&mut state.divide, divisor(value));
        if old != state.divide && state.period != 0 {
            let now = self.events.now_ns();
            let left = state.left_ns(now);
            let initial = self.regs.get(offset::TIMER_INITIAL_COUNT);
            state.period = bus_ns(initial, state.divide);
            state.bound_period();
            if state.armed.is_some() && state.mode.counts() {
                let remaining =
                    u128::from(left) * u128::from(state.divide) / u128::from(old.max(1));
                let remaining = u64::try_from(remaining).unwrap_or(u64::MAX);
                state.target = now.saturating_add(remaining);
                if !state.is_due(now) {
                    state.armed = Some(state.target);
                }
            }
        }
        timer.finish(self, false);
    }

    /// Sets the timer up from the registers just restored, to go on from where it was. A count of 0 is a
    /// timer that is due at once (or, periodic, starts over) unless it is stopped.
    pub(super) fn restore_timer(&self, left: TimeLeft) {
        let mode = TimerMode::from_lvt(self.regs.get(offset::LVT_TIMER) & self.timer_mode_mask());
        let mut timer = self.lock_timer();
        let deadline_kept = timer.state.mode == mode && mode == TimerMode::TscDeadline;
        let divide = divisor(self.regs.get(offset::TIMER_DIVIDE));
        let mut state = TimerState {
            mode,
            divide,
            period: bus_ns(self.regs.get(offset::TIMER_INITIAL_COUNT), divide),
            tsc_deadline: if deadline_kept {
                timer.state.tsc_deadline
            } else {
                0
            },
            ..TimerState::default()
        };
        let mut due = false;
        if mode == TimerMode::TscDeadline {
            // TSC-deadline mode has no count; entering it clears what is left of one.
            if !deadline_kept {
                self.regs.set(offset::TIMER_INITIAL_COUNT, 0);
            }
            state.period = 0;
            due = arm_tsc_deadline(&mut state, self.events.as_ref());
        } else if mode.counts() && state.period != 0 {
            state.bound_period();
            if left.bounded {
                state.period = state.period.max(MIN_PERIOD_NS);
            }
            let remaining = match bus_ns(left.count, divide) {
                _ if left.ns != 0 && state.count(left.ns) == left.count => left.ns,
                0 if mode == TimerMode::Periodic && !left.stopped => state.period,
                remaining => remaining.min(state.period),
            };
            if !(left.stopped && remaining == 0) {
                let now = self.events.now_ns();
                state.target = now.saturating_add(remaining);
                let earlier = left.due && mode == TimerMode::Periodic;
                state.armed = Some(if earlier { now } else { state.target });
                due = state.is_due(now);
            }
        }
        *timer.state = state;
        timer.finish(self, due);
    }

    /// RESET and INIT: the count is gone; the registers are the caller's to clear.
    pub(super) fn reset_timer(&self) {
        let mut timer = self.lock_timer();
        *timer.state = TimerState {
            divide: divisor(0),
            ..TimerState::default()
        };
        timer.finish(self, false);
    }
}

/// Arms the TSC deadline; true if it has passed.
fn arm_tsc_deadline(state: &mut TimerState, events: &dyn VcpuEvents) -> bool {
    state.armed = None;
    if state.tsc_deadline == 0 {
        return false;
    }
    let due = events.tsc_to_ns(state.tsc_deadline);
    state.armed = Some(due.min(NEVER - 1));
    state.is_due(events.now_ns())
}
