//! Which translation stands at a RIP: a table that translated code looks targets of branches up in.
//!
//! That depends on the processor's mode, the address space, and on nothing having happened since that
//! could have changed the code or where it is mapped: together a *view*. Each view has a table of its own,
//! and translated code is given the current one's, so that an entry need hold nothing but RIP.
//!
//! A direct branch to another page is good in one view, and only while its own page has one linear address
//! there: the target is given relative to that. So the views know the addresses of all pages that code in
//! them runs from.
//!
//! A supervisor's code is mostly in global pages, which no change of the address space touches. So a
//! supervisor's view is good in all address spaces while only such pages are in it.

use std::collections::{HashMap, HashSet};

use anykvm_cpu::Cpu;
use anykvm_cpu::mode::Mode;

/// Entries of a table: one for each value of RIP's low 16 bits.
const JUMPS: usize = 1 << 16;
/// Views kept.
const VIEWS: usize = 8;

/// One entry.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub struct Jump {
    /// RIP; in an empty entry one that would not be looked for here.
    pub rip: u64,
    /// Entry point of the translation; it expects the page of RIP in [`crate::shared::Slot::Page`].
    pub code: u64,
}

const EMPTY: Jump = Jump { rip: 0, code: 0 };

/// What is the same for all of a view, but for the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct When {
    mode: u32,
    /// [`Cpu::code_flushes`].
    flushes: u64,
    /// [`Cpu::code_epoch`].
    epoch: u64,
}

impl When {
    fn of(cpu: &Cpu, mode: Mode) -> Self {
        Self {
            mode: mode.bits_packed(),
            flushes: cpu.code_flushes(),
            epoch: cpu.code_epoch(),
        }
    }
}

#[derive(Debug)]
struct View {
    when: When,
    /// The one address space it is good for, or `None` if all.
    space: Option<u64>,
    /// Never 0 and never used twice.
    id: u64,
    jumps: Box<[Jump]>,
    /// Indices of entries that are not empty.
    used: Vec<u16>,
    /// The linear address of each host page that code ran from.
    linear: HashMap<u64, u64>,
    /// Host pages that code ran from at several.
    several: HashSet<u64>,
    last: u64,
}

/// All views of a processor.
#[derive(Debug, Default)]
pub struct Views {
    all: Vec<View>,
    current: usize,
    /// Perhaps the one of the other privilege level.
    other: usize,
    ids: u64,
}

fn index(rip: u64) -> usize {
    rip as usize & (JUMPS - 1)
}

/// RIP 0 is looked for at index 0.
fn empty(index: usize) -> Jump {
    Jump {
        rip: u64::from(index == 0),
        ..EMPTY
    }
}

impl View {
    fn clear(&mut self) {
        for i in self.used.drain(..) {
            self.jumps[usize::from(i)] = empty(i.into());
        }
        self.linear.clear();
        self.several.clear();
    }
}

impl Views {
    /// Bytes of memory that the tables take.
    pub fn memory(&self) -> usize {
        self.all
            .iter()
            .map(|v| size_of_val(&*v.jumps) + v.used.capacity() * size_of::<u16>())
            .sum()
    }
    /// Makes the view that the processor has now current, and returns its number.
    pub fn select(&mut self, cpu: &Cpu) -> u64 {
        let when = When::of(cpu, cpu.mode());
        let space = cpu.address_space();
        let is = |v: &View| v.when == when && v.space.is_none_or(|s| s == space);
        if !self.all.get(self.current).is_some_and(is) {
            self.current = match self.all.iter().position(is) {
                Some(found) => found,
                None => self.start(when, cpu.mode().user().then_some(space)),
            };
        }
        let Some(view) = self.all.get_mut(self.current) else {
            return 0;
        };
        view.last = self.ids;
        view.id
    }

    /// A new view, in the place of the one that was longest not used.
    fn start(&mut self, when: When, space: Option<u64>) -> usize {
        self.ids += 1;
        let fresh = |jumps, used| View {
            when,
            space,
            id: self.ids,
            jumps,
            used,
            linear: HashMap::new(),
            several: HashSet::new(),
            last: self.ids,
        };
        if self.all.len() < VIEWS {
            let mut jumps = vec![EMPTY; JUMPS].into_boxed_slice();
            jumps[0] = empty(0);
            self.all.push(fresh(jumps, Vec::new()));
            return self.all.len() - 1;
        }
        // A view that nothing selects any more is older than all that are in use.
        let (oldest, _) = (self.all.iter().enumerate())
            .min_by_key(|(_, v)| (v.when.flushes, v.when.epoch, v.last))
            .unwrap_or((0, &self.all[0]));
        let view = &mut self.all[oldest];
        view.clear();
        let jumps = std::mem::take(&mut view.jumps);
        let used = std::mem::take(&mut view.used);
        *view = fresh(jumps, used);
        oldest
    }

    /// The entry point for a RIP in the current view.
    pub fn find(&self, rip: u64) -> Option<u64> {
        let jump = self.all.get(self.current)?.jumps.get(index(rip))?;
        (jump.rip == rip).then_some(jump.code)
    }

    /// The current view's table, for [`crate::shared::Slot::Jumps`].
    pub fn jumps(&self) -> *const Jump {
        self.all
            .get(self.current)
            .map_or(std::ptr::null(), |v| v.jumps.as_ptr())
    }

    /// The current view's number for [`crate::shared::Slot::View`], if it has one there: it must not come
    /// again.
    pub fn number(&self) -> Option<u32> {
        let view = self.all.get(self.current)?;
        u32::try_from(view.id).ok()
    }

    /// The table and the number of the view that the processor has in another mode, if there is one.
    pub fn in_mode(&mut self, cpu: &Cpu, mode: Mode) -> Option<(*const Jump, u32)> {
        let when = When::of(cpu, mode);
        let space = cpu.address_space();
        let is = |v: &View| v.when == when && v.space.is_none_or(|s| s == space);
        if !self.all.get(self.other).is_some_and(is) {
            self.other = self.all.iter().position(is)?;
        }
        let view = self.all.get(self.other)?;
        Some((view.jumps.as_ptr(), u32::try_from(view.id).ok()?))
    }

    /// [`Cpu::code_epoch`] when the current view was chosen.
    pub fn epoch(&self) -> u64 {
        let view = self.all.get(self.current);
        view.map_or(0, |v| v.when.epoch)
    }

    /// Whether code of this host page has run at several linear addresses in the current view.
    pub fn is_several(&self, host: u64) -> bool {
        self.all
            .get(self.current)
            .is_none_or(|v| v.several.contains(&(host & !0xfff)))
    }

    /// Notes that code at a host address is about to run at this RIP. True if the page has got its second
    /// linear address by that.
    pub fn note(&mut self, rip: u64, host: u64) -> bool {
        let Some(view) = self.all.get_mut(self.current) else {
            return false;
        };
        let (linear, host) = (rip & !0xfff, host & !0xfff);
        *view.linear.entry(host).or_insert(linear) != linear && view.several.insert(host)
    }

    /// Enters a translation into the current view. `global`: RIP's page is the same in all address spaces.
    pub fn insert(&mut self, rip: u64, code: u64, global: bool, space: u64) {
        let Some(view) = self.all.get_mut(self.current) else {
            return;
        };
        if !global {
            view.space = Some(space);
        }
        let entry = &mut view.jumps[index(rip)];
        if entry.code == 0 {
            view.used.push(index(rip) as u16);
        }
        *entry = Jump { rip, code };
    }

    /// No view leads to these entry points any more.
    pub fn remove(&mut self, codes: &[u64]) {
        for view in &mut self.all {
            let jumps = &mut view.jumps;
            view.used.retain(|i| {
                let i = usize::from(*i);
                let goes = codes.contains(&jumps[i].code);
                if goes {
                    jumps[i] = empty(i);
                }
                !goes
            });
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for view in &mut self.all {
            view.clear();
        }
    }
}
