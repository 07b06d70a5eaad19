//! The VM's event thread: what happens without any vCPU running. It waits in epoll for irqfds and
//! resample requests, and in one timerfd for the earliest deadline of the PIT, the I/O APIC and the
//! local APICs.
//!
//! Setting a deadline is a store, and a write to an eventfd only if it is earlier than what the
//! timerfd is set to: vCPU threads do it often, and their seccomp filters allow them `write` but not
//! `timerfd_settime`. An expiry that finds nothing due sets the timerfd to the earliest deadline left.
//!
//! Where time is counted there is no thread: the vCPU that runs looks here ([`EventThread::look`]).

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};
use std::thread::JoinHandle;

use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vmm_sys_util::signal::{SIGRTMAX, block_signal, get_blocked_signals, unblock_signal};

use crate::error::Result;
use crate::stats::{StatsFile, VmStat};
use crate::time::Time;

/// No deadline.
const NEVER: u64 = u64::MAX;
/// epoll tokens of the thread's own descriptors; sources get the numbers above.
const TOKEN_WAKE: u64 = 0;
const TOKEN_TIMER: u64 = 1;
const FIRST_SOURCE: u64 = 2;

/// A file descriptor the thread watches for input.
pub(crate) trait Source: Send + Sync {
    /// It is readable: take what is there. Called on the event thread; must not watch or unwatch.
    fn ready(&self);
}

/// Something with a deadline.
pub(crate) trait Expire: Send + Sync {
    /// The deadline may have passed. Called on the event thread.
    fn expired(&self, now_ns: u64);
}

/// The deadline of one timer, which the thread watches as long as the owner keeps it.
pub struct Deadline {
    at: AtomicU64,
    expire: Mutex<Option<Arc<dyn Expire>>>,
    shared: Arc<Shared>,
}

impl fmt::Debug for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deadline")
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}

impl Deadline {
    /// Sets it (nanoseconds of the VM's clock, the host's CLOCK_MONOTONIC), or clears it. From any thread.
    pub fn set(&self, at: Option<u64>) {
        let at = at.unwrap_or(NEVER);
        self.at.store(at, Ordering::SeqCst);
        // The thread stores NEVER before it looks at all deadlines: either it sees this one, or this
        // sees NEVER and wakes it once more.
        if at != NEVER && at < self.shared.programmed.fetch_min(at, Ordering::SeqCst) {
            self.shared.wake();
        }
    }

    /// Calls the timer if it is due.
    fn run(&self, now: u64) {
        let at = self.at.load(Ordering::SeqCst);
        if at > now {
            return;
        }
        let expire = self
            .expire
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .clone();
        if let Some(expire) = expire {
            // Cleared first, so that the owner may set the next one in the call.
            let order = Ordering::SeqCst;
            let _ = self.at.compare_exchange(at, NEVER, order, order);
            expire.expired(now);
        }
    }
}

fn earliest(deadlines: &[Arc<Deadline>]) -> u64 {
    let times = deadlines.iter().map(|d| d.at.load(Ordering::SeqCst));
    times.min().unwrap_or(NEVER)
}

struct Shared {
    epoll: OwnedFd,
    wake: OwnedFd,
    timer: OwnedFd,
    stop: AtomicBool,
    /// What the timerfd is, or is about to be, set to.
    programmed: AtomicU64,
    deadlines: RwLock<Vec<Weak<Deadline>>>,
    sources: Mutex<Sources>,
    stats: Arc<StatsFile>,
    time: Arc<Time>,
}

#[derive(Default)]
struct Sources {
    next: u64,
    by_token: HashMap<u64, Arc<dyn Source>>,
}

/// The thread; stopped and joined when dropped.
pub struct EventThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for EventThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventThread").finish_non_exhaustive()
    }
}

impl EventThread {
    /// Starts the thread, with all signals blocked that are not faults: the VMM's handlers are for
    /// its own threads.
    pub(crate) fn start(stats: Arc<StatsFile>, time: Arc<Time>) -> Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &wake,
            epoll::EventData::new_u64(TOKEN_WAKE),
            epoll::EventFlags::IN,
        )?;
        epoll::add(
            &epoll,
            &timer,
            epoll::EventData::new_u64(TOKEN_TIMER),
            epoll::EventFlags::IN,
        )?;
        let shared = Arc::new(Shared {
            epoll,
            wake,
            timer,
            stop: AtomicBool::new(false),
            programmed: AtomicU64::new(NEVER),
            deadlines: RwLock::default(),
            sources: Mutex::new(Sources {
                next: FIRST_SOURCE,
                ..Default::default()
            }),
            stats,
            time,
        });
        if shared.time.is_counted() {
            return Ok(Self {
                shared,
                thread: None,
            });
        }
        let blocked = BlockedSignals::block_all();
        let run = shared.clone();
        let thread = std::thread::Builder::new()
            .name("kvm-events".into())
            .spawn(move || run.run());
        drop(blocked);
        Ok(Self {
            shared,
            thread: Some(thread?),
        })
    }

    /// Where time is counted: does what is due now, and takes what has come in by descriptors.
    pub(crate) fn look(&self) {
        self.shared.take_input(Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }));
        self.expire();
    }

    /// Where time is counted: calls the timers that are due.
    pub(crate) fn expire(&self) {
        if self.shared.programmed.load(Ordering::SeqCst) <= self.shared.time.ns() {
            self.shared.run_timers();
        }
    }

    /// Where time is counted: no timer is due before this.
    pub(crate) fn programmed(&self) -> u64 {
        self.shared.programmed.load(Ordering::SeqCst)
    }

    /// When the next timer is due.
    pub(crate) fn next_deadline(&self) -> Option<u64> {
        Some(earliest(&self.shared.deadlines())).filter(|at| *at != NEVER)
    }

    /// A new deadline, not set, whose owner is not there yet; see [`Self::connect`].
    pub(crate) fn unconnected_deadline(&self) -> Arc<Deadline> {
        let deadline = Arc::new(Deadline {
            at: AtomicU64::new(NEVER),
            expire: Mutex::new(None),
            shared: self.shared.clone(),
        });
        let mut all = self
            .shared
            .deadlines
            .write()
            .unwrap_or_else(|e| e.into_inner());
        all.retain(|d| d.strong_count() > 0);
        all.push(Arc::downgrade(&deadline));
        deadline
    }

    /// Says who is called when the deadline has passed.
    pub(crate) fn connect(&self, deadline: &Deadline, expire: Arc<dyn Expire>) {
        *deadline.expire.lock().unwrap_or_else(|e| e.into_inner()) = Some(expire);
        self.shared.wake();
    }

    /// Watches a descriptor for input; returns a token for [`Self::unwatch`].
    pub(crate) fn watch(&self, fd: &OwnedFd, source: Arc<dyn Source>) -> Result<u64> {
        let mut sources = self.shared.sources();
        let token = sources.next;
        sources.next += 1;
        sources.by_token.insert(token, source);
        let data = epoll::EventData::new_u64(token);
        if let Err(e) = epoll::add(&self.shared.epoll, fd, data, epoll::EventFlags::IN) {
            sources.by_token.remove(&token);
            return Err(e.into());
        }
        Ok(token)
    }

    /// Stops watching. When it returns, no call of [`Source::ready`] is under way.
    pub(crate) fn unwatch(&self, fd: &OwnedFd, token: u64) {
        // Fails only if the descriptor is not watched.
        let _ = epoll::delete(&self.shared.epoll, fd.as_fd());
        self.shared.sources().by_token.remove(&token);
    }
}

impl Drop for EventThread {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // The thread does not panic; if it did there is nothing to add to its message.
            let _ = thread.join();
        }
        self.shared.sources().by_token.clear();
    }
}

impl Shared {
    fn sources(&self) -> std::sync::MutexGuard<'_, Sources> {
        self.sources.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn deadlines(&self) -> Vec<Arc<Deadline>> {
        let all = self.deadlines.read().unwrap_or_else(|e| e.into_inner());
        all.iter().filter_map(Weak::upgrade).collect()
    }

    fn wake(&self) {
        if self.time.is_counted() {
            return;
        }
        // EAGAIN: the counter is full, so the thread is about to wake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn run(&self) {
        while let Some(timers) = self.take_input(None) {
            if timers {
                self.run_timers();
            }
        }
    }

    /// Waits for input (at most so long) and hands it to its sources. True if timers are to be looked at;
    /// `None` if the thread is to end.
    fn take_input(&self, timeout: Option<&Timespec>) -> Option<bool> {
        // Looked at behind the reading of the eventfd below, which may have taken the wake that came with it.
        if self.stop.load(Ordering::SeqCst) {
            return None;
        }
        let mut events = Vec::with_capacity(32);
        match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
        if self.stop.load(Ordering::SeqCst) {
            return None;
        }
        self.stats.add(VmStat::EventThread as usize, 1);
        let mut timers = false;
        for event in &events {
            match event.data.u64() {
                TOKEN_WAKE => {
                    let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                    timers = true;
                }
                TOKEN_TIMER => {
                    let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                    timers = true;
                }
                token => {
                    // Locked over the call: once `unwatch` has returned there is none any more.
                    if let Some(source) = self.sources().by_token.get(&token) {
                        source.ready();
                    }
                }
            }
        }
        Some(timers)
    }

    /// Calls what is due and sets the timerfd to the earliest deadline left.
    fn run_timers(&self) {
        // As long as it is 0 nobody wakes the thread: the look below comes after the calls.
        self.programmed.store(0, Ordering::SeqCst);
        let deadlines = self.deadlines();
        let now = self.time.ns();
        for deadline in &deadlines {
            deadline.run(now);
        }
        self.programmed.store(NEVER, Ordering::SeqCst);
        let earliest = earliest(&deadlines);
        let earliest = earliest.min(self.programmed.fetch_min(earliest, Ordering::SeqCst));
        if earliest != NEVER && !self.time.is_counted() {
            let value = Timespec {
                tv_sec: (earliest / 1_000_000_000) as i64,
                // All 0 would disarm it.
                tv_nsec: (earliest % 1_000_000_000) as i64 | 1,
            };
            let zero = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let spec = Itimerspec {
                it_interval: zero,
                it_value: value,
            };
            // Fails only for times that do not fit; those do not come.
            let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &spec);
        }
    }
}

/// All signals but faults blocked on this thread, as long as it lives; a thread started meanwhile
/// inherits that.
struct BlockedSignals(Vec<i32>);

impl BlockedSignals {
    fn block_all() -> Self {
        const FAULTS: [i32; 6] = [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGTRAP,
            libc::SIGABRT,
        ];
        let before = get_blocked_signals().unwrap_or_default();
        let block = (1..=SIGRTMAX()).filter(|s| !FAULTS.contains(s) && !before.contains(s));
        Self(block.filter(|s| block_signal(*s).is_ok()).collect())
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        for signal in &self.0 {
            let _ = unblock_signal(*signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::monotonic_ns;
    use crate::stats::VM_STATISTICS;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;
    use std::time::Duration;

    fn thread() -> EventThread {
        let stats = StatsFile::new("test", VM_STATISTICS).unwrap();
        EventThread::start(stats, Time::of_host()).unwrap()
    }

    struct Report(mpsc::SyncSender<u64>);
    impl Expire for Report {
        fn expired(&self, now_ns: u64) {
            let _ = self.0.try_send(now_ns);
        }
    }

    #[test]
    fn deadlines_in_any_order() {
        let thread = thread();
        let (send, receive) = mpsc::sync_channel(8);
        let [late, early] = [(); 2].map(|()| {
            let deadline = thread.unconnected_deadline();
            thread.connect(&deadline, Arc::new(Report(send.clone())));
            deadline
        });
        let now = monotonic_ns();
        late.set(Some(now + 20_000_000));
        early.set(Some(now + 5_000_000));
        let first = receive.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(first >= now + 5_000_000 && first < now + 20_000_000);
        assert!(receive.recv_timeout(Duration::from_secs(5)).unwrap() >= now + 20_000_000);
        early.set(Some(now));
        receive.recv_timeout(Duration::from_secs(5)).unwrap();
        early.set(Some(monotonic_ns() + 10_000_000));
        early.set(None);
        assert!(receive.recv_timeout(Duration::from_millis(50)).is_err());
    }

    struct Count {
        fd: OwnedFd,
        count: AtomicUsize,
        sender: mpsc::SyncSender<()>,
    }
    impl Source for Count {
        fn ready(&self) {
            let _ = rustix::io::read(&self.fd, &mut [0; 8]);
            self.count.fetch_add(1, Ordering::SeqCst);
            let _ = self.sender.try_send(());
        }
    }

    #[test]
    fn sources_until_unwatched() {
        let thread = thread();
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let (sender, receive) = mpsc::sync_channel(8);
        let source = Arc::new(Count {
            fd: fd.try_clone().unwrap(),
            count: AtomicUsize::new(0),
            sender,
        });
        let token = thread.watch(&source.fd, source.clone()).unwrap();
        rustix::io::write(&fd, &1u64.to_ne_bytes()).unwrap();
        receive.recv_timeout(Duration::from_secs(5)).unwrap();
        thread.unwatch(&source.fd, token);
        rustix::io::write(&fd, &1u64.to_ne_bytes()).unwrap();
        assert!(receive.recv_timeout(Duration::from_millis(50)).is_err());
        assert_eq!(source.count.load(Ordering::SeqCst), 1);
        drop(thread);
        assert_eq!(Arc::strong_count(&source), 1);
    }
}
