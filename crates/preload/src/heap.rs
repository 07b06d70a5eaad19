//! The library's own heap. The C library's grows by brk and mprotect, which the seccomp filters that
//! VMMs put on vCPU threads forbid, and KVM_RUN does allocate (decoded code). This one asks the
//! kernel with mmap and munmap only. It also keeps our memory apart from the program's: neither its
//! allocator nor its mistakes reach here.
//!
//! Blocks up to [`LARGEST`] come in size classes, four to each doubling, each with a list of free blocks; larger
//! ones are mappings of their own. A block freed stays in its class.

use std::alloc::{GlobalAlloc, Layout};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use crate::{process, sys};

/// The smallest block, and the alignment of all.
const SMALLEST: usize = 16;
/// The largest block that is not a mapping of its own.
const LARGEST: usize = 32 << 10;
const PAGE: usize = 4096;
/// How much a class asks the kernel for, at least.
const CHUNK: usize = 64 << 10;
/// Blocks that a class gets at once, at least.
const BLOCKS: usize = 8;

/// 16 to 64 in steps of 16, then four a doubling.
const CLASSES: usize = class_of(LARGEST) + 1;

/// The class whose blocks are the smallest that hold `size` bytes.
const fn class_of(size: usize) -> usize {
    if size <= 4 * SMALLEST {
        return size.saturating_sub(1) / SMALLEST;
    }
    // The top three bits of the last byte's offset: a one, and which quarter of the doubling.
    let last = size - 1;
    let doubling = last.ilog2() as usize;
    let quarter = (last >> (doubling - 2)) & 3;
    4 * (doubling - 5) + quarter
}

/// The size of a class's blocks.
const fn size_of_class(class: usize) -> usize {
    if class < 4 {
        return (class + 1) * SMALLEST;
    }
    let doubling = class / 4 + 5;
    let quarter = class % 4;
    (5 + quarter) << (doubling - 2)
}

/// One size class.
struct Class {
    /// Generation of the process one of whose threads is changing the rest; 0: none.
    locked: AtomicU64,
    /// Free blocks, each of which holds the address of the next.
    free: AtomicPtr<u8>,
    /// Memory that has not been a block yet.
    fresh: AtomicUsize,
    end: AtomicUsize,
}

impl Class {
    const fn new() -> Self {
        Self {
            locked: AtomicU64::new(0),
            free: AtomicPtr::new(null_mut()),
            fresh: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
        }
    }

    /// Holds the lock for a few instructions. Every store leaves the class usable, so a lock whose holder is
    /// not here (it is a thread of the process that this one was forked from) can be taken over.
    fn with<R>(&self, f: impl FnOnce() -> R) -> R {
        let us = process::generation();
        let mut holder = 0;
        while let Err(now) =
            self.locked
                .compare_exchange(holder, us, Ordering::Acquire, Ordering::Relaxed)
        {
            holder = if now == us { 0 } else { now };
            std::hint::spin_loop();
        }
        let value = f();
        self.locked.store(0, Ordering::Release);
        value
    }

    fn allocate(&self, size: usize) -> *mut u8 {
        self.with(|| {
            let block = self.free.load(Ordering::Relaxed);
            if !block.is_null() {
                // SAFETY: a free block of this class holds the address of the next.
                let next = unsafe { block.cast::<*mut u8>().read() };
                self.free.store(next, Ordering::Relaxed);
                return block;
            }
            let mut fresh = self.fresh.load(Ordering::Relaxed);
            if fresh + size > self.end.load(Ordering::Relaxed) {
                let len = CHUNK.max(BLOCKS * size).next_multiple_of(PAGE);
                let Some(chunk) = sys::allocate(len) else {
                    return null_mut();
                };
                fresh = chunk as usize;
                // First nothing is fresh, then what is: see `with`.
                self.fresh.store(usize::MAX - LARGEST, Ordering::Relaxed);
                self.end.store(fresh + len, Ordering::Relaxed);
            }
            self.fresh.store(fresh + size, Ordering::Relaxed);
            fresh as *mut u8
        })
    }

    /// # Safety
    /// The block must be one of this class, and in nobody's use.
    unsafe fn free(&self, block: *mut u8) {
        self.with(|| {
            // SAFETY: at least 16 bytes, by the caller's promise nobody's.
            unsafe {
                block
                    .cast::<*mut u8>()
                    .write(self.free.load(Ordering::Relaxed))
            };
            self.free.store(block, Ordering::Relaxed);
        });
    }
}

static HEAP: [Class; CLASSES] = [const { Class::new() }; CLASSES];

/// The allocator of this library.
pub struct Heap;

/// The class a layout is served from; None: by a mapping of its own. Blocks of a power of two up to a
/// page are aligned to their size, because chunks begin at a page.
fn class_for(layout: Layout) -> Option<usize> {
    let (size, align) = (layout.size(), layout.align());
    let size = if align <= SMALLEST {
        size
    } else if align <= PAGE {
        size.max(align).checked_next_power_of_two()?
    } else {
        return None;
    };
    (size <= LARGEST).then(|| class_of(size))
}

// SAFETY: blocks are disjoint, as large and aligned as asked, and stay until they are freed.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match class_for(layout) {
            Some(class) => HEAP[class].allocate(size_of_class(class)),
            None => map(layout),
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match class_for(layout) {
            // SAFETY: allocated with the same layout, hence from the same class.
            Some(class) => unsafe { HEAP[class].free(block) },
            // SAFETY: allocated with the same layout, hence mapped.
            None => unsafe { sys::release(block.cast(), layout.size()) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if class_for(layout).is_none() {
            return map(layout);
        }
        // SAFETY: by the caller's promise.
        let block = unsafe { self.alloc(layout) };
        if !block.is_null() {
            // SAFETY: a block of that size.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Ok(new) = Layout::from_size_align(size, layout.align()) else {
            return null_mut();
        };
        if class_for(layout).is_some() && class_for(layout) == class_for(new) {
            return block;
        }
        // SAFETY: by the caller's promise; the blocks are disjoint.
        unsafe {
            let moved = self.alloc(new);
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(block, size.min(layout.size()));
                self.dealloc(block, layout);
            }
            moved
        }
    }
}

/// A mapping for one block, zeroed.
fn map(layout: Layout) -> *mut u8 {
    let (len, align) = (layout.size(), layout.align());
    if align <= PAGE {
        return sys::allocate(len).map_or(null_mut(), |p| p.cast());
    }
    // More than is needed, then the rest on both sides is given back.
    let len = len.next_multiple_of(PAGE);
    let Some(start) = len.checked_add(align).and_then(sys::allocate) else {
        return null_mut();
    };
    let before = (start as usize).next_multiple_of(align) - start as usize;
    let block = start.wrapping_byte_add(before);
    // SAFETY: parts of the mapping just made that are not the block.
    unsafe {
        if before > 0 {
            sys::release(start, before);
        }
        sys::release(block.wrapping_byte_add(len), align - before);
    }
    block.cast()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_their_sizes_and_waste_little() {
        for size in 1..=LARGEST {
            let class = class_of(size);
            let block = size_of_class(class);
            assert!(block >= size && block <= (size + size / 4).max(size + SMALLEST));
            assert!(class == 0 || size_of_class(class - 1) < size);
            assert!(block.is_multiple_of(SMALLEST));
        }
        assert_eq!(size_of_class(CLASSES - 1), LARGEST);
    }

    #[test]
    fn blocks_are_aligned_disjoint_and_used_again() {
        for size in [
            1,
            16,
            17,
            100,
            1000,
            4096,
            5000,
            LARGEST,
            LARGEST + 1,
            1 << 20,
        ] {
            for align in [1, 16, 64, 4096, 1 << 16] {
                let layout = Layout::from_size_align(size, align).unwrap();
                // SAFETY: the blocks are used within their layout and freed with it.
                unsafe {
                    let blocks = [(); 20].map(|()| Heap.alloc(layout));
                    for (i, &block) in blocks.iter().enumerate() {
                        assert!(!block.is_null() && (block as usize).is_multiple_of(align));
                        block.write_bytes(i as u8, size);
                    }
                    for (i, &block) in blocks.iter().enumerate() {
                        assert!((0..size).all(|at| *block.add(at) == i as u8));
                        Heap.dealloc(block, layout);
                    }
                    let zeroed = Heap.alloc_zeroed(layout);
                    assert!((0..size).all(|at| *zeroed.add(at) == 0));
                    let grown = Heap.realloc(zeroed, layout, size * 3);
                    assert!((0..size).all(|at| *grown.add(at) == 0));
                    let layout = Layout::from_size_align(size * 3, align).unwrap();
                    Heap.dealloc(grown, layout);
                }
            }
        }
    }
}
