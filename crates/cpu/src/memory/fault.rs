//! Faults on guest RAM: the VMM unmapped memory that a slot still names (or a file behind it was
//! truncated).
//!
//! The process's SIGSEGV/SIGBUS handler passes the faulting instruction's address to [`handle`]. If it is
//! one of [`super::access`]'s, the handler resumes behind it and the processor that ran on this
//! thread stops with [`crate::Exit::BadMemory`] at the next block boundary.

use crate::requests::Requests;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where to go on when an access to guest RAM in generated code faults: an instruction's address, and
/// the address of the code that leaves it undone.
#[derive(Debug, Default)]
pub struct CodeMap {
    /// What the entries' addresses are relative to.
    base: u64,
    /// Sorted by the first.
    entries: Vec<(u32, u32)>,
}

impl CodeMap {
    /// An empty map for code from `base`.
    pub fn new(base: u64) -> Self {
        Self {
            base,
            entries: Vec::new(),
        }
    }
    /// Adds an access; addresses are added in ascending order, within 4 GiB behind the base.
    pub fn push(&mut self, access: u64, resume: u64) {
        let relative = |a: u64| a.wrapping_sub(self.base) as u32;
        let entry = (relative(access), relative(resume));
        debug_assert!(self.entries.last().is_none_or(|last| last.0 < entry.0));
        self.entries.push(entry);
    }
    /// Forgets the accesses.
    pub fn clear(&mut self) {
        self.entries.clear();
    }
    /// Bytes of memory that the map takes.
    pub fn memory(&self) -> usize {
        self.entries.capacity() * size_of::<(u32, u32)>()
    }
    fn find(&self, rip: u64) -> Option<u64> {
        let offset = u32::try_from(rip.checked_sub(self.base)?).ok()?;
        let at = self.entries.binary_search_by_key(&offset, |e| e.0).ok()?;
        self.entries.get(at).map(|e| self.base + u64::from(e.1))
    }
}

/// Runs `f`, in which generated code runs whose accesses are in `map`. `f` must not change the map:
/// it is looked at in the signal handler.
pub fn in_code<R>(map: &CodeMap, f: impl FnOnce() -> R) -> R {
    CODE.set(map);
    let r = f();
    CODE.set(std::ptr::null());
    r
}

thread_local! {
    static CODE: Cell<*const CodeMap> = const { Cell::new(std::ptr::null()) };
    // What the handler marks; const-initialised and without a destructor, so that the handler's
    // access neither allocates nor registers anything.
    static CURRENT: Cell<*const Guard> = const { Cell::new(std::ptr::null()) };
}

#[derive(Debug)]
struct Guard {
    requests: *const Requests,
    faulted: AtomicBool,
}

/// Runs `f` with faults on this thread reported to `requests`; returns whether there was one.
pub(crate) fn watch<R>(requests: &Requests, f: impl FnOnce() -> R) -> (R, bool) {
    let guard = Guard {
        requests,
        faulted: AtomicBool::new(false),
    };
    let outer = CURRENT.replace(&guard);
    let r = f();
    CURRENT.set(outer);
    (r, guard.faulted.load(Ordering::Relaxed))
}

// An entry that matches nothing: the section, and with it the linker's symbols, exists in every program.
std::arch::global_asm!(
    ".pushsection anykvm_extable,\"aR\",@progbits",
    ".balign 4",
    ".long 0, 0",
    ".popsection"
);

unsafe extern "C" {
    #[link_name = "__start_anykvm_extable"]
    static TABLE_START: [i32; 2];
    #[link_name = "__stop_anykvm_extable"]
    static TABLE_END: [i32; 2];
}

/// Looks the faulting instruction up; returns where to resume. Async-signal-safe.
pub fn handle(rip: u64) -> Option<u64> {
    let code = CODE.get();
    if !code.is_null() {
        // SAFETY: `in_code` keeps the map alive and unchanged while CODE points to it.
        if let Some(resume) = unsafe { (*code).find(rip) } {
            return Some(resume);
        }
    }
    let mut entry = &raw const TABLE_START;
    let end = &raw const TABLE_END;
    while entry < end {
        // SAFETY: between the linker's start and stop symbols the section is an array of such pairs.
        let [offset, len] = unsafe { *entry };
        let address = (entry as u64).wrapping_add_signed(offset.into());
        if address == rip {
            let guard = CURRENT.get();
            if !guard.is_null() {
                // SAFETY: `watch` keeps the guard and the requests alive while CURRENT points to it.
                unsafe {
                    (*guard).faulted.store(true, Ordering::Relaxed);
                    (*(*guard).requests).set(crate::requests::KICK);
                }
            }
            return Some(rip + len as u64);
        }
        entry = entry.wrapping_add(1);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::access::Ram;

    #[test]
    fn accesses_are_in_the_table() {
        let value = 7u64;
        // SAFETY: reads a live integer.
        assert_eq!(unsafe { u64::load(&raw const value as u64) }, 7);
        // SAFETY: the first entry always exists; the next one is a real access's.
        let (entry, [offset, len]) = unsafe {
            let entry = (&raw const TABLE_START).add(1);
            assert!(entry < &raw const TABLE_END);
            (entry, *entry)
        };
        let rip = (entry as u64).wrapping_add_signed(offset.into());
        assert_eq!(handle(rip), Some(rip + len as u64));
        assert_eq!(handle(rip + 1), None);
    }
}
