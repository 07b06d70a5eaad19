//! The memory translations are in: one memfd mapped twice, once writable and once executable, so
//! that no page is ever both. It is mapped whole when it is created, because a VMM's seccomp filter
//! may later forbid executable mappings on processor threads; pages are only taken when code fills
//! them.

use std::ffi::c_void;
use std::io;
use std::os::fd::OwnedFd;
use std::ptr;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Code starts on cache lines.
const LINE: usize = 64;

/// The two mappings.
#[derive(Debug)]
pub struct Cache {
    write: *mut c_void,
    exec: *mut c_void,
    size: usize,
    used: usize,
    /// Bytes in use that [`Cache::clear`] keeps.
    kept: usize,
    /// Bytes ever in use: the pages that are taken.
    touched: usize,
    fd: OwnedFd,
}

// SAFETY: the mappings belong to this value alone and are unmapped when it is dropped.
unsafe impl Send for Cache {}

impl Cache {
    /// Maps an empty cache of `size` bytes.
    pub fn new(size: usize) -> io::Result<Self> {
        let name = "anykvm-code";
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| memfd_create(name, MemfdFlags::CLOEXEC))?;
        ftruncate(&fd, size as u64)?;
        let map = |prot| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            unsafe { mmap(ptr::null_mut(), size, prot, MapFlags::SHARED, &fd, 0) }
        };
        let write = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let exec = map(ProtFlags::READ | ProtFlags::EXEC).inspect_err(|_| {
            // SAFETY: just mapped, not used yet.
            let _ = unsafe { munmap(write, size) };
        })?;
        Ok(Self {
            write,
            exec,
            size,
            used: 0,
            kept: 0,
            touched: 0,
            fd,
        })
    }
    /// Where the next code will be.
    pub fn next(&self) -> u64 {
        self.exec as u64 + self.used as u64
    }
    /// Bytes that code of this length takes.
    pub fn room(len: usize) -> usize {
        len.next_multiple_of(LINE)
    }
    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }
    /// Bytes that [`Cache::clear`] leaves in use.
    pub fn kept(&self) -> usize {
        self.kept
    }
    /// Bytes of memory that the cache holds: those that have been in use since it was last shrunk.
    pub fn touched(&self) -> usize {
        self.touched
    }
    /// Copies code in, at [`Cache::next`]; `None` when it is full.
    pub fn add(&mut self, code: &[u8]) -> Option<u64> {
        let room = Self::room(code.len());
        let end = self.used.checked_add(room).filter(|e| *e <= self.size)?;
        let at = self.used;
        // SAFETY: `at..end` lies inside the mapping, and only this value writes to it.
        unsafe {
            ptr::copy_nonoverlapping(code.as_ptr(), self.write.cast::<u8>().add(at), code.len());
        }
        self.used = end;
        self.touched = self.touched.max(end);
        Some(self.exec as u64 + at as u64)
    }
    /// What is there now survives [`Cache::clear`].
    pub fn keep(&mut self) {
        self.kept = self.used;
    }
    /// Forgets all code but what is kept.
    pub fn clear(&mut self) {
        self.used = self.kept;
    }
    /// Gives the memory behind what is in use back to the system. Where that is refused it stays, and
    /// is used again.
    pub fn shrink(&mut self) {
        let from = self.used.next_multiple_of(4096) as u64;
        let len = (self.size as u64).saturating_sub(from);
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if len > 0 && fallocate(&self.fd, mode, from, len).is_ok() {
            self.touched = self.used;
        }
    }
    /// Code at an executable address; nothing if it is not in the cache.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let offset = at.wrapping_sub(self.exec as u64) as usize;
        let mut code = vec![0; len];
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Vec::new();
        }
        // SAFETY: inside the mapping, as just checked; only this value writes to it.
        unsafe {
            ptr::copy_nonoverlapping(self.write.cast::<u8>().add(offset), code.as_mut_ptr(), len);
        }
        code
    }
    /// Writes a branch displacement at an executable address. False if it is not in the cache.
    pub fn patch(&mut self, at: u64, displacement: i32) -> bool {
        let offset = at.wrapping_sub(self.exec as u64) as usize;
        if offset.checked_add(4).is_none_or(|end| end > self.used) {
            return false;
        }
        // SAFETY: inside the mapping, as just checked. The processor that executes this code is the one
        // that runs this function.
        unsafe {
            self.write
                .cast::<u8>()
                .add(offset)
                .cast::<i32>()
                .write_unaligned(displacement);
        }
        true
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        // SAFETY: both mappings are this value's own, and nothing runs in them any more.
        unsafe {
            let _ = munmap(self.write, self.size);
            let _ = munmap(self.exec, self.size);
        }
    }
}
