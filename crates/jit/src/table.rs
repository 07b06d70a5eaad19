//! All translations of a processor: where they are found, how they are linked to each other, and
//! which are dropped when a page's bytes change.

use std::collections::HashMap;
use std::sync::Arc;

use anykvm_cpu::Insn;

use crate::translate::Wish;
use crate::vectors::Level;

/// A translation in the code cache.
#[derive(Debug)]
pub struct Translated {
    /// Entry point that looks at requests first.
    pub checked: u64,
    /// Entry point for linked branches that lead forward.
    pub plain: u64,
    /// The guest's instructions.
    pub insns: Arc<[Insn]>,
    /// Their bytes.
    pub bytes: Box<[u8]>,
    /// The vector registers its code needs.
    pub level: Level,
    /// Host address of the first byte.
    pub host: u64,
    /// Exits linked to this translation.
    pub incoming: Vec<u32>,
}

/// Host address and mode: what a translation is made for.
pub type Place = (u64, u32);

#[derive(Debug)]
struct Exit {
    translation: u32,
    /// With absolute addresses for positions.
    wish: Wish,
    linked: Option<u32>,
}

#[derive(Debug, Default)]
struct Page {
    translations: Vec<u32>,
    /// The views in which they were compared with memory.
    checked: Vec<u64>,
}

/// Most checks remembered for a page.
const CHECKS: usize = 8;

/// See the module's description.
#[derive(Debug, Default)]
pub struct Table {
    by_place: HashMap<Place, u32>,
    all: Vec<Option<Translated>>,
    modes: Vec<u32>,
    exits: Vec<Exit>,
    pages: HashMap<u64, Page>,
    /// Bytes behind the translations.
    behind: usize,
}

/// Bytes of memory behind a translation.
fn behind(t: &Translated) -> usize {
    size_of_val(&*t.insns) + t.bytes.len()
}

impl Table {
    /// The number the next translation's first exit gets.
    pub fn next_exit(&self) -> u32 {
        self.exits.len() as u32
    }
    /// The translation for a place, if it begins with these bytes.
    pub fn find(&self, place: Place, bytes: &[u8]) -> Option<u32> {
        let n = *self.by_place.get(&place)?;
        let t = self.get(n)?;
        t.bytes.starts_with(bytes).then_some(n)
    }
    /// Bytes of memory that the table and the translations in it take, without the links between
    /// translations.
    pub fn memory(&self) -> usize {
        self.behind
            + self.by_place.capacity() * size_of::<(Place, u32)>()
            + self.all.capacity() * size_of::<Option<Translated>>()
            + self.modes.capacity() * size_of::<u32>()
            + self.exits.capacity() * size_of::<Exit>()
            + self.pages.capacity() * size_of::<(u64, Page)>()
    }
    /// A translation.
    pub fn get(&self, n: u32) -> Option<&Translated> {
        self.all.get(n as usize)?.as_ref()
    }
    /// Adds a translation whose code is at `base`.
    pub fn insert(&mut self, place: Place, t: Translated, wishes: &[Wish], base: u64) -> u32 {
        let n = self.all.len() as u32;
        for wish in wishes {
            let absolute = |at: usize| at + base as usize;
            let wish = match *wish {
                Wish::Interpret { insn, resume } => Wish::Interpret {
                    insn,
                    resume: resume.map(absolute),
                },
                Wish::Link {
                    hole,
                    unlinked,
                    offset,
                } => Wish::Link {
                    hole: absolute(hole),
                    unlinked: absolute(unlinked),
                    offset,
                },
                other => other,
            };
            self.exits.push(Exit {
                translation: n,
                wish,
                linked: None,
            });
        }
        let page = self.pages.entry(t.host & !0xfff).or_default();
        page.translations.push(n);
        self.behind += behind(&t);
        self.all.push(Some(t));
        self.modes.push(place.1);
        self.by_place.insert(place, n);
        n
    }
    /// The instructions of the translation an exit belongs to, the vector registers it needs, and what the exit asks.
    pub fn exit(&self, number: u32) -> Option<(Arc<[Insn]>, Level, Wish)> {
        let e = self.exits.get(number as usize)?;
        let t = self.get(e.translation)?;
        Some((t.insns.clone(), t.level, e.wish))
    }
    /// Links an exit to a translation; returns which displacement must lead where. `None` if the
    /// translation is not where the exit goes.
    pub fn link(&mut self, exit: u32, to: u32) -> Option<(u64, u64)> {
        let e = self.exits.get(exit as usize)?;
        let Wish::Link { hole, offset, .. } = e.wish else {
            return None;
        };
        let from = self.get(e.translation)?;
        let target = self.get(to)?;
        let same_mode = self.modes[e.translation as usize] == self.modes[to as usize];
        if e.linked.is_some() || !same_mode || from.host & !0xfff | offset != target.host {
            return None;
        }
        // Each loop of linked branches has one that does not lead forward.
        let entry = if target.host > from.host {
            target.plain
        } else {
            target.checked
        };
        self.exits[exit as usize].linked = Some(to);
        self.all[to as usize].as_mut()?.incoming.push(exit);
        Some((hole as u64, entry))
    }
    /// Whether a page's translations have not been compared with memory in a view.
    pub fn page_needs_check(&mut self, host: u64, view: u64) -> bool {
        let Some(page) = self.pages.get_mut(&(host & !0xfff)) else {
            return false;
        };
        if page.checked.contains(&view) {
            return false;
        }
        if page.checked.len() >= CHECKS {
            page.checked.remove(0);
        }
        page.checked.push(view);
        true
    }
    /// The translations of a page whose bytes are not what `is` finds.
    pub fn changed(&self, host: u64, mut is: impl FnMut(u64, &[u8]) -> bool) -> Vec<u32> {
        let Some(page) = self.pages.get(&(host & !0xfff)) else {
            return Vec::new();
        };
        let mut list = Vec::new();
        for n in &page.translations {
            if let Some(t) = self.get(*n)
                && !is(t.host, &t.bytes)
            {
                list.push(*n);
            }
        }
        list
    }
    /// Removes a translation; returns which displacements must lead where instead.
    pub fn remove(&mut self, n: u32) -> Vec<(u64, u64)> {
        let Some(t) = self.all.get_mut(n as usize).and_then(Option::take) else {
            return Vec::new();
        };
        self.behind -= behind(&t);
        let place = (t.host, self.modes[n as usize]);
        if self.by_place.get(&place) == Some(&n) {
            self.by_place.remove(&place);
        }
        if let Some(page) = self.pages.get_mut(&(t.host & !0xfff)) {
            page.translations.retain(|m| *m != n);
        }
        let mut holes = Vec::new();
        for exit in t.incoming {
            if let Some(e) = self.exits.get_mut(exit as usize)
                && e.linked.take() == Some(n)
                && let Wish::Link { hole, unlinked, .. } = e.wish
            {
                holes.push((hole as u64, unlinked as u64));
            }
        }
        holes
    }
}
