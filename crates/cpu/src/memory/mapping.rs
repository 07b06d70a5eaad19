//! Shared mappings of file descriptors, owned and accessed without references: RAM made by
//! KVM_SET_MEMORY_REGION, and `struct kvm_run` pages, which the VMM writes at any time.

use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

/// A shared, writable mapping; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    address: u64,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset`.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, len: usize) -> std::io::Result<Self> {
        // SAFETY: a new mapping at an address the kernel chooses.
        let p = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                offset,
            )?
        };
        Ok(Self {
            address: p as u64,
            len,
        })
    }
    /// Maps `len` bytes of zeroed memory that belongs to no file.
    pub fn anonymous(len: usize) -> std::io::Result<Self> {
        // SAFETY: a new mapping at an address the kernel chooses.
        let p = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )?
        };
        Ok(Self {
            address: p as u64,
            len,
        })
    }
    /// Where it is mapped.
    pub fn address(&self) -> u64 {
        self.address
    }
    /// Its size in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }
    fn pointer<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.len && offset.is_multiple_of(align_of::<T>()));
        (self.address as usize + offset) as *mut T
    }
    /// Reads one naturally aligned integer (volatile: others write concurrently).
    pub fn read<T: Plain>(&self, offset: usize) -> T {
        // SAFETY: inside the mapping and aligned (checked); any bit pattern is a T.
        unsafe { self.pointer::<T>(offset).read_volatile() }
    }
    /// Writes one naturally aligned integer.
    pub fn write<T: Plain>(&self, offset: usize, v: T) {
        // SAFETY: inside the mapping and aligned (checked).
        unsafe { self.pointer::<T>(offset).write_volatile(v) }
    }
    /// One naturally aligned counter that several threads here update; others only read it.
    pub fn atomic(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: inside the mapping and aligned (checked); it lives as long as self.
        unsafe { AtomicU64::from_ptr(self.pointer(offset)) }
    }
    /// Copies bytes out.
    pub fn read_bytes(&self, offset: usize, buf: &mut [u8]) {
        for (i, b) in buf.iter_mut().enumerate() {
            *b = self.read(offset + i);
        }
    }
    /// Copies bytes in.
    pub fn write_bytes(&self, offset: usize, data: &[u8]) {
        for (i, b) in data.iter().enumerate() {
            self.write(offset + i, *b);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's own, and no reference into it outlives it.
        let _ = unsafe { rustix::mm::munmap(self.address as *mut _, self.len) };
    }
}

/// Integers that any bytes are a value of.
pub trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for u64 {}
