//! The dirty ring by itself: entries, their flags, and what happens when there is no room.

use std::sync::Arc;

use anykvm_cpu::Requests;
use anykvm_cpu::memory::DirtyLog;
use anykvm_cpu::memory::dirty::{DirtyRing, RESERVED_ENTRIES, RingName, Running};
use anykvm_cpu::memory::mapping::Mapping;
use anykvm_cpu::requests::OWNER;

const SIZE: u32 = 256;
const DIRTY: u32 = 1;
const RESET: u32 = 2;

struct Fixture {
    ring: Arc<DirtyRing>,
    /// The VMM's view of the same memory.
    view: Mapping,
    log: DirtyLog,
    requests: Arc<Requests>,
}

impl Fixture {
    fn new() -> Self {
        let file = rustix::fs::memfd_create("ring", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let bytes = SIZE as usize * 16;
        rustix::fs::ftruncate(&file, bytes as u64).unwrap();
        let map = || Mapping::new(std::os::fd::AsFd::as_fd(&file), 0, bytes).unwrap();
        let requests = Arc::new(Requests::default());
        let name = RingName {
            slot: 0x1_0003,
            page: 5,
        };
        Self {
            ring: Arc::new(DirtyRing::new(map(), requests.clone())),
            view: map(),
            log: DirtyLog::new(1000, false).with_ring(name),
            requests,
        }
    }

    /// Collects entries from this index on; their pages.
    fn harvest(&self, next: &mut u32) -> Vec<u64> {
        let mut pages = Vec::new();
        loop {
            let at = (*next % SIZE) as usize * 16;
            if self.view.read::<u32>(at) != DIRTY {
                return pages;
            }
            assert_eq!(self.view.read::<u32>(at + 4), 0x1_0003);
            pages.push(self.view.read(at + 8));
            self.view.write(at, RESET);
            *next += 1;
        }
    }

    /// Resets what was collected; how many entries.
    fn reset(&self) -> u32 {
        self.ring.reset(|slot, page| {
            assert_eq!(slot, 0x1_0003);
            self.log.clear(page - 5);
        })
    }
}

#[test]
fn a_page_is_in_the_ring_once_until_it_is_reset() {
    let f = Fixture::new();
    let _running = Running::new(f.ring.clone());
    let mut next = 0;
    for page in [7, 0, 7, 7, 0] {
        f.log.mark(page);
    }
    assert_eq!(f.harvest(&mut next), [12, 5]);
    // Collected, but not reset: still known to be dirty.
    f.log.mark(7);
    assert_eq!(f.harvest(&mut next), [0u64; 0]);
    assert_eq!(f.reset(), 2);
    assert_eq!(f.reset(), 0);
    f.log.mark(7);
    assert_eq!(f.harvest(&mut next), [12]);
}

#[test]
fn entries_are_reset_in_order() {
    let f = Fixture::new();
    let _running = Running::new(f.ring.clone());
    for page in 0..3 {
        f.log.mark(page);
    }
    // The second and third only: the first is in their way.
    f.view.write(16, RESET);
    f.view.write(32, RESET);
    assert_eq!(f.reset(), 0);
    f.view.write(0, RESET);
    assert_eq!(f.reset(), 3);
    // Flags that the VMM makes up free nothing that is not in use.
    f.view.write(48, RESET);
    assert_eq!(f.reset(), 0);
}

#[test]
fn the_owner_is_asked_for_when_it_is_nearly_full() {
    let f = Fixture::new();
    let _running = Running::new(f.ring.clone());
    let limit = u64::from(SIZE - RESERVED_ENTRIES);
    (0..limit - 1).for_each(|page| f.log.mark(page));
    assert!(!f.ring.soft_full());
    assert_eq!(f.requests.pending(), 0);
    f.log.mark(limit);
    assert!(f.ring.soft_full());
    assert_eq!(f.requests.pending(), OWNER);
    f.view.write(0, RESET);
    assert_eq!(f.reset(), 1);
    assert!(!f.ring.soft_full());
}

#[test]
fn pages_without_room_wait() {
    let f = Fixture::new();
    let _running = Running::new(f.ring.clone());
    (0..1000).for_each(|page| f.log.mark(page));
    let (mut next, mut all) = (0, Vec::new());
    while all.len() < 1000 {
        let pages = f.harvest(&mut next);
        assert!(!pages.is_empty(), "{} of 1000", all.len());
        assert_eq!(f.reset() as usize, pages.len());
        all.extend(pages);
    }
    assert_eq!(all, (5..1005).collect::<Vec<u64>>());
    assert!(!f.ring.soft_full());
}

#[test]
fn the_thread_that_runs_a_processor_fills_its_ring() {
    let (outer, inner) = (Fixture::new(), Fixture::new());
    let running = Running::new(outer.ring.clone());
    {
        let _nested = Running::new(inner.ring.clone());
        outer.log.mark(1);
    }
    outer.log.mark(2);
    drop(running);
    assert_eq!(inner.harvest(&mut 0), [6]);
    assert_eq!(outer.harvest(&mut 0), [7]);
}
