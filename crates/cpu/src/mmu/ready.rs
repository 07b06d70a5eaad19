//! Level-1 entries that had to make room, and copies of those that did not: where translated code looks before
//! it leaves a missed access to the interpreter.
//!
//! An entry is as level 1's, but those of global pages are good in every address space. It rests on two counts:
//! one goes up with everything that empties level 1, the other when a page loses its fast writes because it
//! holds code. Only translated code looks things up here, and copies what it finds to level 1.

use super::tlb::{Entry, GLOBAL, INVALID, index, page_of};

/// Entries for each set of level 1.
pub(super) const READY: usize = 8192;

/// The fields of an [`Entry`] in order, the last the counts it rests on. All zero is an entry that nothing
/// matches: no address space has the number 0.
type Words = [u64; size_of::<Entry>() / 8];

/// See the module's description.
#[derive(Debug)]
pub(crate) struct Ready {
    /// Zeroed by the allocator, so that no memory is taken before it is used.
    entries: Vec<Words>,
    /// The count of writes, and that of all.
    counts: [u32; 2],
}

impl Default for Ready {
    fn default() -> Self {
        Self {
            entries: vec![[0; _]; 4 * READY],
            counts: [1, 1],
        }
    }
}

impl Ready {
    fn slot(&mut self, set: usize, linear: u64) -> &mut Words {
        &mut self.entries[set * READY + index(linear, READY)]
    }

    /// Keeps what level 1 was filled with. `asn`: the address space.
    pub fn keep(&mut self, set: usize, linear: u64, entry: &Entry, asn: u64, global: bool) {
        let tag = page_of(linear) | if global { GLOBAL } else { asn };
        let tag_if = |known: u64| if known == INVALID { INVALID } else { tag };
        *self.slot(set, linear) = [
            tag_if(entry.read),
            tag_if(entry.write),
            entry.addend,
            self.counts(),
        ];
    }

    /// Drops a page.
    pub fn invalidate(&mut self, linear: u64) {
        for set in 0..3 {
            let e = self.slot(set, linear);
            if page_of(e[0]) == page_of(linear) || page_of(e[1]) == page_of(linear) {
                *e = [0; _];
            }
        }
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.count(1);
    }

    /// Drops all rights to write.
    pub fn clear_writes(&mut self) {
        self.count(0);
    }

    fn count(&mut self, n: usize) {
        if self.counts[n] == u32::MAX {
            self.entries.fill([0; _]);
            self.counts = [1, 1];
        } else {
            self.counts[n] += 1;
        }
    }

    /// The count of writes, and from bit 32 that of all.
    pub fn counts(&self) -> u64 {
        u64::from(self.counts[1]) << 32 | u64::from(self.counts[0])
    }

    /// Address of a set's entries.
    pub fn address(&mut self, set: usize) -> u64 {
        self.entries[set * READY..].as_mut_ptr() as u64
    }

    /// Bytes of memory that it takes at most.
    pub fn memory(&self) -> usize {
        size_of_val(&*self.entries)
    }
}
