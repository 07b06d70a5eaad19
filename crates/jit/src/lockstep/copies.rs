//! What the state and the open pages were before a stretch, and what translated code made of them.

use std::fmt::Write;

use anykvm_cpu::lockstep::OPEN_PAGES;
use anykvm_cpu::memory::PAGE;
use anykvm_cpu::memory::access::HostPage;
use anykvm_cpu::{Cpu, CpuState};

type Bytes = [u8; PAGE as usize];

/// Lines about one page at most.
const LINES: usize = 16;

struct Copy {
    page: HostPage,
    before: Box<Bytes>,
    /// What translated code, or somebody else meanwhile, made of it.
    after: Box<Bytes>,
}

/// A byte that somebody else may have written.
pub(super) struct Foreign {
    page: HostPage,
    offset: usize,
    /// What it was.
    was: u8,
    /// What it became.
    byte: u8,
}

/// See the module's description.
#[derive(Default)]
pub(super) struct Copies {
    state: CpuState,
    pages: Vec<Copy>,
    used: usize,
}

fn bytes(page: HostPage) -> Bytes {
    let mut bytes = [0; PAGE as usize];
    page.read(0, &mut bytes);
    bytes
}

/// Where bytes differ from here on; what is equal is passed by in large pieces.
fn next_difference(one: &Bytes, two: &Bytes, from: usize) -> Option<usize> {
    const STEP: usize = 512;
    let mut at = from;
    while at < one.len() {
        let end = (at / STEP + 1) * STEP;
        if one[at..end] != two[at..end] {
            return (at..end).find(|n| one[*n] != two[*n]);
        }
        at = end;
    }
    None
}

/// The runs of bytes that differ: offsets of the first and behind the last.
fn runs<'a>(one: &'a Bytes, two: &'a Bytes) -> impl Iterator<Item = (usize, usize)> + 'a {
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = next_difference(one, two, at)?;
        let end = (first..one.len()).find(|n| one[*n] == two[*n]);
        at = end.unwrap_or(one.len());
        Some((first, at))
    })
}

impl Copies {
    /// The state before the stretch.
    pub fn state(&self) -> &CpuState {
        &self.state
    }
    fn pages(&self) -> &[Copy] {
        &self.pages[..self.used]
    }
    /// Copies the state and the open pages, before a stretch.
    pub fn take(&mut self, cpu: &Cpu) {
        self.state.clone_from(&cpu.state);
        self.used = 0;
        for page in cpu.open_pages().take(OPEN_PAGES) {
            if self.used == self.pages.len() {
                self.pages.push(Copy {
                    page,
                    before: Box::new([0; _]),
                    after: Box::new([0; _]),
                });
            }
            let copy = &mut self.pages[self.used];
            copy.page = page;
            page.read(0, &mut *copy.before);
            self.used += 1;
        }
    }
    /// Copies the open pages behind translated code.
    pub fn take_results(&mut self) {
        for copy in &mut self.pages[..self.used] {
            copy.page.read(0, &mut *copy.after);
        }
    }
    /// Puts the pages' bytes back that translated code has changed.
    pub fn undo_translated(&self, cpu: &Cpu) {
        for copy in self.pages() {
            for (first, end) in runs(&copy.after, &copy.before) {
                cpu.put_into_open_page(copy.page, first, &copy.before[first..end]);
            }
        }
    }
    /// Puts the pages' bytes back that are not what they were.
    pub fn undo(&self, cpu: &Cpu) {
        for copy in self.pages() {
            let now = bytes(copy.page);
            for (first, end) in runs(&now, &copy.before) {
                cpu.put_into_open_page(copy.page, first, &copy.before[first..end]);
            }
        }
    }
    /// Notes the bytes that the two did not leave the same, with what they became last.
    pub fn note_foreign(&self, list: &mut Vec<Foreign>) {
        for copy in self.pages() {
            let now = bytes(copy.page);
            for offset in runs(&now, &copy.after).flat_map(|(first, end)| first..end) {
                let (was, one, two) = (copy.before[offset], copy.after[offset], now[offset]);
                list.push(Foreign {
                    page: copy.page,
                    offset,
                    was,
                    byte: if was == two { one } else { two },
                });
            }
        }
    }
    /// Puts those bytes where they belong that nobody has written since.
    pub fn put_foreign(&self, cpu: &Cpu, list: &[Foreign]) {
        for foreign in list {
            let copy = self.pages().iter().find(|c| c.page == foreign.page);
            let is_as_it_was = copy.is_some_and(|c| {
                let (before, after) = (c.before[foreign.offset], c.after[foreign.offset]);
                before == foreign.was && after == foreign.was
            });
            if is_as_it_was {
                cpu.put_into_open_page(foreign.page, foreign.offset, &[foreign.byte]);
            }
        }
    }
    /// What is different in memory now from what translated code made of it.
    pub fn difference(&self, cpu: &Cpu) -> String {
        let mut text = String::new();
        for copy in self.pages() {
            let now = bytes(copy.page);
            let place = cpu.guest_physical(copy.page);
            for (first, end) in runs(&now, &copy.after).take(LINES) {
                let at = place.map_or(format!("host page {:#x}", copy.page.number()), |gpa| {
                    format!("{:#x}", gpa + first as u64)
                });
                let hex = |bytes: &Bytes| {
                    bytes[first..end.min(first + 64)]
                        .iter()
                        .map(|b| format!("{b:02x}"))
                        .collect::<Vec<_>>()
                        .join(" ")
                };
                let _ = writeln!(
                    text,
                    "  memory at guest-physical {at}: was {}, interpreted {}, translated {}",
                    hex(&copy.before),
                    hex(&now),
                    hex(&copy.after),
                );
            }
        }
        text
    }
}
