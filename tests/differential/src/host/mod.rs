//! The host's processor as an engine: cases run in a child process, which may die or hang of them.

mod child;
mod shared;

use crate::case::{Case, End, Engine, Outcome, State};
use crate::layout::{KNOWN, Layout};
use shared::Shared;
pub use shared::{BATCH, MAX_PATCH_BYTES, PATCH_HEAD};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;

/// Milliseconds a batch may take before its child is ended.
const PATIENCE_MS: i32 = 10_000;

/// The processor this program runs on.
pub struct Host {
    shared: *mut Shared,
    layout: Layout,
    child: Option<Child>,
    /// Outcomes of the batches that are finished.
    done: Vec<Outcome>,
    /// Cases that were given to the child.
    given: usize,
}

struct Child {
    pid: libc::pid_t,
    commands: OwnedFd,
    answers: OwnedFd,
}

/// What the host lacks, if cases cannot run on it.
pub fn missing() -> Option<&'static str> {
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    // SAFETY: reads the auxiliary vector.
    let hwcap2 = unsafe { libc::getauxval(libc::AT_HWCAP2) };
    if hwcap2 & HWCAP2_FSGSBASE == 0 {
        return Some("FSGSBASE");
    }
    (!std::arch::is_x86_feature_detected!("avx2")).then_some("AVX2")
}

/// The host's XCR0.
pub fn host_xcr0() -> u64 {
    // SAFETY: AVX needs XGETBV.
    unsafe { std::arch::x86_64::_xgetbv(0) }
}

impl Host {
    /// The engine, and its first child.
    pub fn new() -> std::io::Result<Self> {
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        );
        let size = std::mem::size_of::<Shared>();
        // SAFETY: a new mapping.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), size, prot, flags, -1, 0) };
        if p == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self {
            shared: p.cast(),
            layout: Layout::of_host(host_xcr0() & KNOWN),
            child: None,
            done: Vec::new(),
            given: 0,
        })
    }

    /// The components of [`State`] the host has.
    pub fn components(&self) -> u64 {
        self.layout.components
    }

    fn child(&mut self) -> &Child {
        let (shared, layout) = (self.shared, self.layout);
        self.child.get_or_insert_with(|| Child::new(shared, layout))
    }

    /// Gives the child the cases of one batch from `first`.
    fn give(&mut self, cases: &[Case], first: usize) {
        // SAFETY: the child waits for a command, so nobody else uses the memory.
        let shared = unsafe { &mut *self.shared };
        for (slot, case) in shared.slots.iter_mut().zip(cases).skip(first) {
            slot.set(case);
        }
        shared.first.store(first as u32, Relaxed);
        shared.end.store(cases.len() as u32, Relaxed);
        let byte = 0u8;
        let fd = self.child().commands.as_raw_fd();
        // SAFETY: writes a byte. A child that is gone is noticed by what it does not answer.
        unsafe { libc::write(fd, (&raw const byte).cast(), 1) };
    }

    /// Takes the outcomes of the batch that was given; a case that ends the child has none but that.
    fn take(&mut self, cases: &[Case]) {
        let mut first = 0;
        loop {
            let died = self.child.as_mut().and_then(Child::wait);
            // SAFETY: the child waits for a command or is gone.
            let shared = unsafe { &*self.shared };
            let end = match &died {
                None => cases.len(),
                Some(_) => (shared.current.load(Relaxed) as usize).clamp(first, cases.len() - 1),
            };
            let finished = shared.slots.iter().zip(&cases[..end]).skip(first);
            self.done
                .extend(finished.map(|(slot, case)| slot.outcome(case)));
            let Some(end_of_child) = died else {
                return;
            };
            self.child = None;
            self.done.push(Outcome {
                state: State::new(64),
                end: end_of_child,
                pages: Vec::new(),
                rest: None,
            });
            first = end + 1;
            if first >= cases.len() {
                return;
            }
            self.give(cases, first);
        }
    }
}

impl Engine for Host {
    fn name(&self) -> &str {
        "host"
    }

    fn start(&mut self, cases: &[Case]) {
        self.done.clear();
        self.given = cases.len().min(BATCH);
        if self.given > 0 {
            self.give(&cases[..self.given], 0);
        }
    }

    fn finish(&mut self, cases: &[Case]) -> Vec<Outcome> {
        let mut rest = cases;
        let mut now = self.given;
        while !rest.is_empty() {
            let (batch, more) = rest.split_at(now);
            self.take(batch);
            rest = more;
            now = rest.len().min(BATCH);
            if now > 0 {
                self.give(&rest[..now], 0);
            }
        }
        std::mem::take(&mut self.done)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.child = None;
        // SAFETY: mapped in `new`; the child is gone.
        unsafe { libc::munmap(self.shared.cast(), std::mem::size_of::<Shared>()) };
    }
}

impl Child {
    fn new(shared: *mut Shared, layout: Layout) -> Self {
        let pipe = || {
            let mut fds = [0; 2];
            // SAFETY: room for two descriptors, which are new and ours.
            unsafe {
                assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC), 0, "no pipe");
                (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
            }
        };
        let (commands, to) = pipe();
        let (from, answers) = pipe();
        // SAFETY: the child calls nothing that needs another thread.
        match unsafe { libc::fork() } {
            0 => {
                drop((to, from));
                // SAFETY: this is the new process.
                unsafe { child::serve(shared, layout, commands.as_raw_fd(), answers.as_raw_fd()) }
            }
            pid => {
                assert!(pid > 0, "no process: {}", std::io::Error::last_os_error());
                Self {
                    pid,
                    commands: to,
                    answers: from,
                }
            }
        }
    }

    /// Waits until the batch is done; how the child ended, if it did that instead.
    fn wait(&mut self) -> Option<End> {
        let mut poll = libc::pollfd {
            fd: self.answers.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let mut byte = 0u8;
        // SAFETY: waits for, and reads, one byte.
        unsafe {
            if libc::poll(&mut poll, 1, PATIENCE_MS) == 0 {
                return Some(End::Failed("the process hangs".to_owned()));
            }
            if libc::read(poll.fd, (&raw mut byte).cast(), 1) == 1 {
                return None;
            }
            let mut status = 0;
            libc::waitpid(self.pid, &mut status, 0);
            self.pid = 0;
            Some(End::Failed(format!(
                "the process ended, wait status {status:#x}"
            )))
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.pid != 0 {
            // SAFETY: our own child, which has not been waited for.
            unsafe {
                libc::kill(self.pid, libc::SIGKILL);
                libc::waitpid(self.pid, std::ptr::null_mut(), 0);
            }
        }
    }
}
