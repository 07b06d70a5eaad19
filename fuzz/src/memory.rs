//! The guest's memory: slots that lie between pages without access, so that an access beyond a slot
//! ends the process.

use std::sync::Arc;

use anykvm_cpu::memory::{DirtyLog, GuestMemory, MemoryMap, PAGE, Slot};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};

use crate::layout::{HIGH, HIGH_SIZE, RAM_SIZE, ROM, ROM_SIZE, TOP, TOP_SIZE};

/// Pages without access before and behind each slot.
const GUARD: u64 = 16 * PAGE;

/// Memory of this process for one slot; kept as long as the process runs.
#[derive(Clone, Copy)]
struct Backing {
    host: u64,
    size: u64,
}

impl Backing {
    fn new(size: u64) -> Self {
        let whole = (size + 2 * GUARD) as usize;
        // SAFETY: a new mapping at an address the kernel chooses.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                whole,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .expect("address space for a slot");
        let host = start as u64 + GUARD;
        // SAFETY: the middle of that mapping, which nothing uses yet.
        unsafe {
            mprotect(
                host as *mut _,
                size as usize,
                MprotectFlags::READ | MprotectFlags::WRITE,
            )
        }
        .expect("memory for a slot");
        Self { host, size }
    }

    fn slot(self, id: u32, gpa: u64, readonly: bool, dirty: Option<DirtyLog>) -> Arc<Slot> {
        // SAFETY: the memory stays mapped for good, and is reached through slots only.
        Arc::new(unsafe { Slot::new(id, gpa, self.size, self.host, readonly, dirty) })
    }
}

/// The memory of all guests, which run one after another.
pub struct Slots {
    ram: Backing,
    rom: Backing,
    top: Backing,
    high: Backing,
}

impl Slots {
    pub fn new() -> Self {
        Self {
            ram: Backing::new(RAM_SIZE),
            rom: Backing::new(ROM_SIZE),
            top: Backing::new(TOP_SIZE),
            high: Backing::new(HIGH_SIZE),
        }
    }

    /// The map of all slots, or of those that `present` has bits for.
    pub fn map(&self, present: u8) -> MemoryMap {
        let dirty = DirtyLog::new(HIGH_SIZE / PAGE, false);
        let slots = [
            self.ram.slot(0, 0, false, None),
            self.rom.slot(1, ROM, true, None),
            self.top.slot(2, TOP, false, None),
            self.high.slot(3, HIGH, false, Some(dirty)),
        ];
        let chosen = slots
            .into_iter()
            .enumerate()
            .filter(|(n, _)| present >> n & 1 != 0)
            .map(|(_, slot)| slot)
            .collect();
        MemoryMap::new(chosen).expect("slots that do not overlap")
    }

    /// A guest's memory with these contents from 0, all else zero.
    pub fn guest(&self, image: &[u8]) -> Arc<GuestMemory> {
        let memory = Arc::new(GuestMemory::new());
        // Writable for a moment, to clear it.
        let rom = self.rom.slot(1, ROM, false, None);
        let map = MemoryMap::new(vec![rom]).expect("one slot");
        memory.replace(0, map, None);
        write(&memory, ROM, &[0; ROM_SIZE as usize]);
        memory.replace(0, self.map(0xf), None);
        write(&memory, 0, image);
        write(&memory, TOP, &[0; TOP_SIZE as usize]);
        write(&memory, HIGH, &[0; HIGH_SIZE as usize]);
        memory.replace(1, self.map(0xf), None);
        memory
    }
}

fn write(memory: &GuestMemory, gpa: u64, data: &[u8]) {
    memory.write(gpa, data).expect("RAM");
}
