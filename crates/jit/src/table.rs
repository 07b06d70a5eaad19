//! All translations of a processor: where they are found, how they are linked to each other, and
//! which are dropped when a page's bytes change.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use anykvm_cpu::Insn;
use anykvm_cpu::block::Mix;

use crate::branch::Crossing;
use crate::exits::{Exit, Wish};
use crate::flags::Recipe;
use crate::vectors::Level;

/// A translation in the code cache.
#[derive(Debug)]
pub struct Translated {
    /// Entry point that looks at requests first.
    pub checked: u64,
    /// The same where the vector registers it needs are in the host's.
    pub warm: u64,
    /// It needs the x87 state loaded.
    pub x87: bool,
    /// Entry point for linked branches that lead forward.
    pub plain: u64,
    /// The guest's instructions.
    pub insns: Arc<[Insn]>,
    /// Their bytes.
    pub bytes: Box<[u8]>,
    /// The vector registers its code needs.
    pub level: Level,
    /// How flags can be made behind its links.
    pub recipes: Vec<Recipe>,
    /// It keeps the flags it is entered with, because it does not know how to make them.
    pub wants_recipe: bool,
    /// Host address of the first byte.
    pub host: u64,
    /// Where the code is: what positions in it are relative to.
    pub base: u64,
    /// How long it is.
    pub len: usize,
    /// Exits linked to this translation.
    pub incoming: Vec<u32>,
}

/// In a place's mode: each access is checked by itself.
pub const APART: u32 = 1 << 31;
/// In a place's mode: where the number, from 1, of what is known of the flags begins.
const RECIPE: u32 = 24;
/// Most things that are known of the flags at a place.
const RECIPES: usize = 4;
/// What a place's mode has besides the mode.
const EXTRA: u32 = APART | 7 << RECIPE;

/// Host address and mode: what a translation is made for.
pub type Place = (u64, u32);

#[derive(Debug)]
struct Known {
    translation: u32,
    exit: Exit,
    /// The branch to another page that the exit belongs to.
    crossing: Option<Crossing>,
    linked: Option<u32>,
}

/// An exit of translated code that has been taken.
pub struct Taken<'a> {
    /// The translation's instructions.
    pub insns: &'a [Insn],
    /// The vector registers it needs.
    pub level: Level,
    /// Where its code is.
    pub base: u64,
    /// What the exit asks.
    pub wish: Wish,
}

#[derive(Debug, Default)]
struct Page {
    translations: Vec<u32>,
}

/// See the module's description.
#[derive(Debug, Default)]
pub struct Table {
    by_place: HashMap<Place, u32, BuildHasherDefault<Mix>>,
    all: Vec<Option<Translated>>,
    modes: Vec<u32>,
    exits: Vec<Known>,
    pages: HashMap<u64, Page, BuildHasherDefault<Mix>>,
    /// Bytes behind the translations.
    behind: usize,
    /// What may be known of the flags when a place is entered.
    recipes: HashMap<Place, Vec<Recipe>>,
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
            + self.exits.capacity() * size_of::<Known>()
            + self.pages.capacity() * size_of::<(u64, Page)>()
    }
    /// The translation for a place; its page has been checked.
    pub fn at(&self, place: Place) -> Option<u32> {
        self.by_place.get(&place).copied()
    }
    /// Whether a translation shares no checks.
    pub fn is_apart(&self, n: u32) -> bool {
        self.modes.get(n as usize).is_some_and(|m| m & APART != 0)
    }
    /// A translation.
    pub fn get(&self, n: u32) -> Option<&Translated> {
        self.all.get(n as usize)?.as_ref()
    }
    /// The translation whose code this address is in.
    pub fn containing(&self, address: u64) -> Option<&Translated> {
        let holds = |t: &&Translated| (t.base..t.base + t.len as u64).contains(&address);
        self.all.iter().flatten().find(holds)
    }
    /// Adds a translation.
    pub fn insert(&mut self, place: Place, t: Translated, exits: &[Exit]) -> u32 {
        let n = self.all.len() as u32;
        self.exits.extend(exits.iter().map(|exit| Known {
            translation: n,
            exit: *exit,
            crossing: None,
            linked: None,
        }));
        let page = self.pages.entry(t.host & !0xfff).or_default();
        page.translations.push(n);
        self.behind += behind(&t);
        self.all.push(Some(t));
        self.modes.push(place.1);
        self.by_place.insert(place, n);
        n
    }
    /// RIP's offset from the page where an exit was taken.
    pub fn offset(&self, exit: u32) -> Option<i64> {
        let e = self.exits.get(exit as usize)?;
        Some(e.exit.offset.into())
    }
    /// An exit and the translation it belongs to.
    pub fn taken(&self, exit: u32) -> Option<Taken<'_>> {
        let e = self.exits.get(exit as usize)?;
        let t = self.get(e.translation)?;
        Some(Taken {
            insns: &t.insns,
            level: t.level,
            base: t.base,
            wish: e.exit.wish,
        })
    }
    /// The recipe for the flags behind an exit, and the place of the translation that is to be entered with
    /// it instead of `to`, to which the exit leads. `None` if that one is good.
    pub fn better_place(&mut self, exit: u32, to: u32) -> Option<(Place, Recipe)> {
        let e = self.exits.get(exit as usize)?;
        let Wish::Link { recipe, apart, .. } = e.exit.wish else {
            return None;
        };
        let target = self.get(to)?;
        if apart.is_some() || !target.wants_recipe {
            return None;
        }
        let recipe = self
            .get(e.translation)?
            .recipes
            .get(usize::from(recipe?))?
            .clone();
        let place = (target.host, self.modes[to as usize] & !EXTRA);
        let known = self.recipes.entry(place).or_default();
        let n = match known.iter().position(|r| *r == recipe) {
            Some(n) => n,
            None if known.len() < RECIPES => {
                known.push(recipe.clone());
                known.len() - 1
            }
            None => return None,
        };
        Some(((place.0, place.1 | (n as u32 + 1) << RECIPE), recipe))
    }
    /// Whether an exit leads to the translation at a host address that shares no checks.
    pub fn leads_apart(&self, exit: u32, host: u64) -> bool {
        let Some(e) = self.exits.get(exit as usize) else {
            return false;
        };
        let from = self.get(e.translation).map(|t| t.host & !0xfff);
        matches!(e.exit.wish, Wish::Link { apart: Some(_), .. }
            if from.is_some_and(|page| page | e.exit.offset as u64 == host))
    }
    /// Whether an exit is a branch, not linked yet, to where a translation was made for.
    pub fn leads_to(&self, exit: u32, to: u32) -> bool {
        let find = || {
            let e = self.exits.get(exit as usize)?;
            let Wish::Link { apart, .. } = e.exit.wish else {
                return None;
            };
            let (from, target) = (self.get(e.translation)?, self.get(to)?);
            let (mode, other) = (self.modes[e.translation as usize], self.modes[to as usize]);
            let same_mode = mode & !EXTRA == other & !EXTRA;
            let same_manner = apart.is_some() == (other & APART != 0);
            let same_place = from.host & !0xfff | e.exit.offset as u64 == target.host;
            Some(e.linked.is_none() && same_mode && same_manner && same_place)
        };
        find().unwrap_or(false)
    }
    /// Links an exit to a translation; returns which displacement must lead where. `None` if the
    /// translation is not where the exit goes.
    pub fn link(&mut self, exit: u32, to: u32) -> Option<(u64, u64)> {
        if !self.leads_to(exit, to) {
            return None;
        }
        let e = self.exits.get(exit as usize)?;
        let Wish::Link { hole, .. } = e.exit.wish else {
            return None;
        };
        let from = self.get(e.translation)?;
        let (from, level, x87, base) = (from.host, from.level, from.x87, from.base);
        let target = self.all.get_mut(to as usize)?.as_mut()?;
        // Each loop of linked branches has one that does not lead forward.
        let loaded = level >= target.level && x87 >= target.x87;
        let entry = match (loaded, target.host > from) {
            (true, true) => target.plain,
            (true, false) => target.warm,
            (false, _) => target.checked,
        };
        target.incoming.push(exit);
        self.exits[exit as usize].linked = Some(to);
        Some((base + u64::from(hole), entry))
    }
    /// Adds the branches to other pages of the translation that was added last, whose first exit has this
    /// number.
    pub fn insert_crossings(&mut self, first: u32, crossings: &[(usize, Crossing)]) {
        for (exit, c) in crossings {
            if let Some(e) = self.exits.get_mut(first as usize + exit) {
                e.crossing = Some(*c);
            }
        }
    }
    /// Whether an exit belongs to a branch to another page.
    pub fn crosses(&self, exit: u32) -> bool {
        (self.exits.get(exit as usize)).is_some_and(|e| e.crossing.is_some())
    }
    /// The host address of the translation an exit belongs to.
    pub fn origin(&self, exit: u32) -> Option<u64> {
        let e = self.exits.get(exit as usize)?;
        Some(self.get(e.translation)?.host)
    }
    /// Links a branch to another page, which was taken with its own page at `page`, to the translation
    /// that runs at `rip`; returns where the view's number is, and which displacement must lead where. `None`
    /// if that is not where it goes.
    pub fn cross(&mut self, exit: u32, to: u32, page: u64, rip: u64) -> Option<(u64, u64, u64)> {
        let e = self.exits.get(exit as usize)?;
        let crossing = e.crossing?;
        let same_mode = self.modes[e.translation as usize] & !EXTRA == self.modes[to as usize];
        let there = page.wrapping_add(crossing.offset as u64) == rip;
        let base = self.get(e.translation)?.base;
        if !same_mode || !there {
            return None;
        }
        let before = self.exits[exit as usize].linked.replace(to);
        if let Some(old) = before
            && let Some(t) = self.all.get_mut(old as usize)?.as_mut()
        {
            t.incoming.retain(|e| *e != exit);
        }
        let target = self.all.get_mut(to as usize)?.as_mut()?;
        target.incoming.push(exit);
        let position = |at| base + u64::from(at);
        let (guard, hole) = (position(crossing.guard), position(crossing.hole));
        Some((guard, hole, target.checked))
    }
    /// Unlinks all branches from a page to others; returns where their views' numbers are.
    pub fn uncross(&mut self, host: u64) -> Vec<u64> {
        let Some(page) = self.pages.get(&(host & !0xfff)) else {
            return Vec::new();
        };
        let mut guards = Vec::new();
        for (n, e) in self.exits.iter_mut().enumerate() {
            if let Some(c) = e.crossing
                && page.translations.contains(&e.translation)
                && let Some(to) = e.linked.take()
            {
                let origin = self.all.get(e.translation as usize);
                if let Some(Some(origin)) = origin {
                    guards.push(origin.base + u64::from(c.guard));
                }
                if let Some(Some(t)) = self.all.get_mut(to as usize) {
                    t.incoming.retain(|e| *e != n as u32);
                }
            }
        }
        guards
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
    /// Removes a translation; returns which displacements must lead where instead, and where the numbers of
    /// views are that must be 0.
    pub fn remove(&mut self, n: u32) -> (Vec<(u64, u64)>, Vec<u64>) {
        let Some(t) = self.all.get_mut(n as usize).and_then(Option::take) else {
            return Default::default();
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
        let mut guards = Vec::new();
        for exit in t.incoming {
            let Some(e) = self.exits.get_mut(exit as usize) else {
                continue;
            };
            if e.linked.take_if(|to| *to == n).is_none() {
                continue;
            }
            let (exit, crossing) = (e.exit, e.crossing);
            // Nothing leads to the code of a translation that was removed.
            let Some(origin) = self
                .all
                .get(e.translation as usize)
                .and_then(Option::as_ref)
            else {
                continue;
            };
            let position = |at| origin.base + u64::from(at);
            if let Some(c) = crossing {
                guards.push(position(c.guard));
            } else if let Wish::Link { hole, unlinked, .. } = exit.wish {
                holes.push((position(hole), position(unlinked)));
            }
        }
        (holes, guards)
    }
}
