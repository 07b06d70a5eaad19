//! Guest RAM in this process, read and written while no vCPU runs.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Zeroed pages of its own, reached by raw pointers only.
pub struct Ram {
    start: NonNull<u8>,
    layout: Layout,
}

impl Ram {
    /// So many bytes, whole pages.
    pub fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len, PAGE).expect("a size that fits");
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) });
        Self {
            start: start.unwrap_or_else(|| handle_alloc_error(layout)),
            layout,
        }
    }

    /// Its address, for a memory slot.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Writes bytes that lie inside.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.layout.size());
        // SAFETY: inside, as was just checked, and no one else uses it now.
        unsafe {
            self.start
                .as_ptr()
                .add(at)
                .copy_from(bytes.as_ptr(), bytes.len());
        }
    }

    /// The pages that are not all zero, with their addresses.
    pub fn pages(&self) -> Vec<(usize, Box<[u8; PAGE]>)> {
        (0..self.layout.size())
            .step_by(PAGE)
            .filter_map(|at| {
                // SAFETY: a whole page inside; nobody writes while no vCPU runs.
                let page = unsafe { &*self.start.as_ptr().add(at).cast::<[u8; PAGE]>() };
                (*page != [0; PAGE]).then(|| (at, Box::new(*page)))
            })
            .collect()
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; the VM that had it is gone.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}
