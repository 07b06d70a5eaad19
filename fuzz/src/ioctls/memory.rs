//! The caller's memory: a buffer for arguments that ends at a page without access, a page that is read-only, and
//! RAM for slots; eventfds.

use std::cell::Cell;
use std::os::fd::OwnedFd;

use anykvm::bindings::Plain;
use anykvm::{Efault, UserMemory};
use anykvm_cpu::memory::mapping::Mapping;
use rustix::event::{EventfdFlags, eventfd};
use rustix::mm::MprotectFlags;

const PAGE: usize = 4096;
const BUFFER: usize = 256 * PAGE;
/// Bytes of RAM for slots.
pub const RAM: usize = 64 * PAGE;

pub struct Arena {
    /// The buffer, a page without access, a read-only page, and one without access.
    memory: Mapping,
    pub ram: Mapping,
    pub eventfds: [OwnedFd; 2],
    next: Cell<usize>,
}

impl Arena {
    pub fn new() -> Self {
        let memory = Mapping::anonymous(BUFFER + 3 * PAGE).expect("memory");
        let at = |page: usize| (memory.address() as usize + BUFFER + page * PAGE) as *mut _;
        for (page, flags) in [
            (0, MprotectFlags::empty()),
            (1, MprotectFlags::READ),
            (2, MprotectFlags::empty()),
        ] {
            // SAFETY: pages of the mapping just made, which nothing here writes to.
            unsafe { rustix::mm::mprotect(at(page), PAGE, flags) }.expect("mprotect");
        }
        Self {
            memory,
            ram: Mapping::anonymous(RAM).expect("memory"),
            eventfds: std::array::from_fn(|_| {
                eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd")
            }),
            next: Cell::new(0),
        }
    }
    /// The first address that faults.
    pub fn end(&self) -> u64 {
        self.memory.address() + BUFFER as u64
    }
    /// A page that can only be read.
    pub fn read_only(&self) -> u64 {
        self.end() + PAGE as u64
    }
    /// Room for so many bytes; used again after some time.
    pub fn room(&self, len: usize) -> u64 {
        let mut at = self.next.get();
        if at + len > BUFFER {
            at = 0;
        }
        self.next.set((at + len + 15) & !15);
        self.memory.address() + at as u64
    }
    /// The address of a copy.
    pub fn put<T: Plain>(&self, value: &T) -> u64 {
        let at = self.room(size_of::<T>());
        self.write(at, value.as_bytes()).expect("room");
        at
    }
    fn offset(&self, address: u64, len: usize, end: usize) -> Result<usize, Efault> {
        let start = address.checked_sub(self.memory.address()).ok_or(Efault)?;
        let start = usize::try_from(start).map_err(|_| Efault)?;
        match start.checked_add(len) {
            Some(last) if last <= end => Ok(start),
            _ => Err(Efault),
        }
    }
}

impl UserMemory for Arena {
    fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), Efault> {
        let read_only = BUFFER + PAGE..=BUFFER + 2 * PAGE;
        let at = match self.offset(address, buf.len(), BUFFER) {
            Ok(at) => at,
            Err(e) => {
                let at = self.offset(address, buf.len(), *read_only.end())?;
                if !read_only.contains(&at) {
                    return Err(e);
                }
                at
            }
        };
        self.memory.read_bytes(at, buf);
        Ok(())
    }
    fn write(&self, address: u64, buf: &[u8]) -> Result<(), Efault> {
        let at = self.offset(address, buf.len(), BUFFER)?;
        self.memory.write_bytes(at, buf);
        Ok(())
    }
}
