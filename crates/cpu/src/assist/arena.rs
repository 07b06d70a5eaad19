//! The memory stubs are in: one memfd mapped twice, once writable and once executable, so that no
//! page is ever both.
//!
//! The whole arena is mapped when it is created, because a VMM's seccomp filter may later forbid
//! executable mappings on processor threads. Its first cache line holds the allocation cursor: a
//! forked child shares the mappings with its parent, and a cursor in the shared memory keeps the
//! two from using the same bytes.

use std::ffi::c_void;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Size of the arena; pages are only taken when stubs fill them.
const BYTES: usize = 192 << 20;
/// Stubs start on cache lines, so that no line is written after code in it has run.
const LINE: usize = 64;

/// The two mappings.
#[derive(Debug)]
pub struct Arena {
    write: *mut c_void,
    exec: *mut c_void,
}

// SAFETY: the mappings live as long as the process; bytes are handed out once, by an atomic cursor,
// and not written again.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps an empty arena.
    pub fn new() -> io::Result<Self> {
        // A system may insist that memfds are no programs (sysctl vm.memfd_noexec), which keeps them
        // from being executed as files, not from being mapped; kernels before 6.3 do not know the flag.
        let name = "anykvm-stubs";
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| memfd_create(name, MemfdFlags::CLOEXEC))?;
        ftruncate(&fd, BYTES as u64)?;
        let map = |prot| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            unsafe { mmap(ptr::null_mut(), BYTES, prot, MapFlags::SHARED, &fd, 0) }
        };
        let write = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let exec = map(ProtFlags::READ | ProtFlags::EXEC).inspect_err(|_| {
            // SAFETY: just mapped, not used yet.
            let _ = unsafe { munmap(write, BYTES) };
        })?;
        let arena = Self { write, exec };
        arena.cursor().store(LINE as u64, Ordering::Release);
        Ok(arena)
    }

    fn cursor(&self) -> &AtomicU64 {
        // SAFETY: the first 8 bytes of the writable mapping are only ever used as this atomic.
        unsafe { AtomicU64::from_ptr(self.write.cast()) }
    }

    /// Copies code into the arena and returns its executable address; `None` when it is full.
    pub fn add(&self, code: &[u8]) -> Option<*const u8> {
        let room = code.len().next_multiple_of(LINE);
        let at = self
            .cursor()
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |at| {
                let end = at.checked_add(room as u64)?;
                (end <= BYTES as u64).then_some(end)
            })
            .ok()? as usize;
        // SAFETY: the cursor gave `room` bytes inside the mapping to this call alone.
        unsafe {
            ptr::copy_nonoverlapping(code.as_ptr(), self.write.cast::<u8>().add(at), code.len());
            Some(self.exec.cast::<u8>().add(at).cast_const())
        }
    }
}
