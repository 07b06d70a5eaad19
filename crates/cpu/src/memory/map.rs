//! The guest-physical address space at one moment.
//!
//! A map is never changed, for processors use it without locks; a new one takes its place. So that one slot among
//! tens of thousands can come and go, the slots are kept in runs of neighbours, and a new map shares all runs with
//! the old one but those that differ.

use std::sync::Arc;

use super::Slot;

/// Most slots of a run: about as many runs as slots in a run, with as many slots as a VM may have.
const MOST: usize = 256;

/// Neighbours, by ascending address; never empty.
#[derive(Clone, Debug)]
struct Run {
    /// Where the first begins.
    first: u64,
    slots: Arc<Vec<Arc<Slot>>>,
}

impl Run {
    /// Runs of these slots, none too long.
    fn of(slots: &[Arc<Slot>]) -> impl Iterator<Item = Self> {
        let len = if slots.len() > MOST { MOST / 2 } else { MOST };
        slots.chunks(len).map(|part| Self {
            first: part.first().map_or(0, |s| s.gpa),
            slots: Arc::new(part.to_vec()),
        })
    }
}

/// The guest-physical address space at one moment.
#[derive(Clone, Debug, Default)]
pub struct MemoryMap {
    runs: Vec<Run>,
    /// Bytes of the slots' descriptions.
    memory: usize,
}

impl MemoryMap {
    /// A map of these slots, which must not overlap; `None` if they do.
    pub fn new(mut slots: Vec<Arc<Slot>>) -> Option<Self> {
        slots.sort_by_key(|s| s.gpa);
        if slots.windows(2).any(|w| w[0].end() > w[1].gpa) {
            return None;
        }
        Some(Self {
            runs: Run::of(&slots).collect(),
            memory: slots.iter().map(|s| s.memory()).sum(),
        })
    }

    /// The run in which an address is, if it is in any.
    #[inline]
    fn run(&self, gpa: u64) -> Option<usize> {
        self.runs.partition_point(|r| r.first <= gpa).checked_sub(1)
    }

    /// The last slot that begins at this address or below.
    #[inline]
    fn at_or_below(&self, gpa: u64) -> Option<&Arc<Slot>> {
        let slots = &self.runs.get(self.run(gpa)?)?.slots;
        let i = slots.partition_point(|s| s.gpa <= gpa);
        slots.get(i.checked_sub(1)?)
    }

    /// The slot that holds this address.
    #[inline]
    pub fn find(&self, gpa: u64) -> Option<&Arc<Slot>> {
        self.at_or_below(gpa).filter(|s| s.contains(gpa))
    }

    /// All slots, by ascending address.
    pub fn slots(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.runs.iter().flat_map(|run| run.slots.iter())
    }

    /// Bytes that the slots' descriptions take.
    pub(super) fn memory(&self) -> usize {
        self.memory
    }

    /// This map without the slot that begins at `old`, and with a new one. `None` if there is no such slot, or the
    /// new one overlaps another.
    pub(super) fn changed(&self, old: Option<u64>, new: Option<Arc<Slot>>) -> Option<Self> {
        let mut map = self.clone();
        if let Some(gpa) = old {
            map.remove(gpa)?;
        }
        if let Some(slot) = new {
            map.insert(slot)?;
        }
        Some(map)
    }

    fn remove(&mut self, gpa: u64) -> Option<()> {
        let run = self.run(gpa)?;
        let mut slots = Vec::clone(&self.runs[run].slots);
        let at = slots.binary_search_by_key(&gpa, |s| s.gpa).ok()?;
        self.memory -= slots.remove(at).memory();
        // Short runs are joined, else there would be ever more of them.
        let mut end = run + 1;
        if let Some(next) = self.runs.get(end)
            && slots.len() + next.slots.len() <= MOST / 2
        {
            slots.extend(next.slots.iter().cloned());
            end += 1;
        }
        self.runs.splice(run..end, Run::of(&slots));
        Some(())
    }

    fn insert(&mut self, slot: Arc<Slot>) -> Option<()> {
        if self
            .at_or_below(slot.end() - 1)
            .is_some_and(|s| s.end() > slot.gpa)
        {
            return None;
        }
        self.memory += slot.memory();
        // In front of all others it is in the first run.
        let run = self.run(slot.gpa).unwrap_or(0);
        let end = self.runs.len().min(run + 1);
        let mut slots = self
            .runs
            .get(run)
            .map_or_else(Vec::new, |run| Vec::clone(&run.slots));
        let at = slots.partition_point(|s| s.gpa < slot.gpa);
        slots.insert(at, slot);
        self.runs.splice(run..end, Run::of(&slots));
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::memory::PAGE;
    use crate::memory::mapping::Mapping;

    fn slot(backing: &Arc<Mapping>, id: u32, gpa: u64, pages: u64) -> Arc<Slot> {
        let slot = Slot::owned(id, gpa, pages * PAGE, backing.clone(), 0, false, None);
        Arc::new(slot.unwrap())
    }

    #[test]
    fn slots_come_and_go_as_in_a_plain_list() {
        let backing = Arc::new(Mapping::anonymous(4 * PAGE as usize).unwrap());
        let mut map = MemoryMap::default();
        let mut list: BTreeMap<u64, u64> = BTreeMap::new();
        let mut random = 1u64;
        let mut next = |n: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) % n
        };
        for turn in 0..20_000u64 {
            // First it grows, then it shrinks.
            let grows = turn < 10_000;
            let gpa = next(8192) * PAGE;
            if list.contains_key(&gpa) && (!grows || next(4) == 0) {
                list.remove(&gpa);
                map = map.changed(Some(gpa), None).unwrap();
            } else {
                let pages = 1 + next(4);
                let end = gpa + pages * PAGE;
                let overlaps = list.range(..end).next_back().is_some_and(|(_, e)| *e > gpa);
                let changed = map.changed(None, Some(slot(&backing, 0, gpa, pages)));
                assert_eq!(changed.is_none(), overlaps, "{gpa:#x} {pages}");
                if let (true, Some(changed)) = (grows, changed) {
                    list.insert(gpa, end);
                    map = changed;
                }
            }
            if turn % 1000 == 0 {
                let now: Vec<_> = map.slots().map(|s| (s.gpa, s.end())).collect();
                assert_eq!(now, list.clone().into_iter().collect::<Vec<_>>());
                assert!(
                    map.runs
                        .iter()
                        .all(|r| !r.slots.is_empty() && r.slots.len() <= MOST)
                );
                let all = MemoryMap::new(map.slots().cloned().collect()).unwrap();
                assert_eq!(map.memory, all.memory);
            }
            let at = next(8200) * PAGE + 5;
            let holds = list.range(..=at).next_back().is_some_and(|(_, e)| *e > at);
            assert_eq!(map.find(at).is_some(), holds, "{at:#x}");
        }
        assert!(map.changed(Some(PAGE / 2), None).is_none());
        let left: Vec<u64> = list.keys().copied().collect();
        for gpa in left {
            map = map.changed(Some(gpa), None).unwrap();
        }
        assert!(map.runs.is_empty() && map.memory == 0);
    }

    #[test]
    fn a_slot_takes_the_place_of_one_that_it_overlaps() {
        let backing = Arc::new(Mapping::anonymous(4 * PAGE as usize).unwrap());
        let map = MemoryMap::new(vec![slot(&backing, 1, 0, 2), slot(&backing, 2, 0x4000, 2)]);
        let map = map.unwrap();
        let moved = slot(&backing, 1, 0x1000, 2);
        assert!(map.changed(None, Some(moved.clone())).is_none());
        let map = map.changed(Some(0), Some(moved)).unwrap();
        assert!(map.find(0).is_none() && map.find(0x2fff).is_some());
        assert!(
            map.changed(Some(0x1000), Some(slot(&backing, 1, 0x3000, 2)))
                .is_none()
        );
    }
}
