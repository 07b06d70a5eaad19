//! Which local APICs a message reaches. SDM volume 3, "Determining IPI Destination", "Logical
//! Destination Mode", "Lowest Priority Delivery Mode" and "x2APIC" counterparts.
//!
//! The common destinations are looked up in [`ApicMap`], which is rebuilt whenever an id, a logical
//! destination, an enable or a mode changes and swapped in whole, so that senders never wait. Where
//! the map cannot tell (broadcasts, ids that several APICs share, APICs in different logical modes)
//! every APIC is asked in turn, as they do on a real bus.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;

use crate::interrupt::{Interrupt, Shorthand};
use crate::lapic::{Lapic, LogicalMode};
use crate::sync::lock;

/// Message destination that means everyone, in xAPIC and x2APIC mode.
const XAPIC_BROADCAST: u32 = 0xff;
const X2APIC_BROADCAST: u32 = 0xffff_ffff;

/// How logical destinations are resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MapMode {
    /// No APIC is software-enabled: a logical destination reaches nobody.
    Nobody,
    /// All are in this mode, and no two have the same logical id.
    All(LogicalMode),
    /// The map cannot tell.
    Unusable,
}

/// Slots of one logical group (a flat set, or a cluster): the APIC for each bit.
type Slot = Option<Arc<Lapic>>;

struct ApicMap {
    /// By physical id; at least the 256 ids of xAPIC. `None`: ids are shared, so no lookup.
    physical: Option<Vec<Slot>>,
    logical_mode: MapMode,
    flat: [Slot; 8],
    cluster: [[Slot; 4]; 16],
}

impl ApicMap {
    fn build(lapics: &[Arc<Lapic>], ids_32bit: bool) -> Self {
        let present = || lapics.iter().filter(|lapic| lapic.present());
        let ids = present().map(|l| l.apic_id() as usize).max().unwrap_or(0);
        let mut map = Self {
            physical: Some(vec![None; ids.max(255) + 1]),
            logical_mode: MapMode::Nobody,
            flat: Default::default(),
            cluster: Default::default(),
        };
        for lapic in present() {
            map.add_physical(lapic, ids_32bit);
            map.add_logical(lapic);
        }
        if map.physical.is_none() {
            map.logical_mode = MapMode::Unusable;
        }
        map
    }

    fn add_physical(&mut self, lapic: &Arc<Lapic>, ids_32bit: bool) {
        let Some(physical) = &mut self.physical else {
            return;
        };
        let x2apic = lapic.x2apic_mode();
        let (x2apic_id, xapic_id) = (lapic.apic_id() as usize, lapic.xapic_id() as usize);
        if ids_32bit {
            // An APIC above 255 is reachable before it has entered x2APIC mode: that is how it is
            // started. Its truncated xAPIC id gives way to whoever has that id in full.
            if x2apic || x2apic_id > 0xff {
                physical[x2apic_id] = Some(lapic.clone());
            }
            if !x2apic && physical[xapic_id].is_none() {
                physical[xapic_id] = Some(lapic.clone());
            }
        } else {
            let slot = &mut physical[if x2apic { x2apic_id } else { xapic_id }];
            if slot.is_some() {
                self.physical = None;
            } else {
                *slot = Some(lapic.clone());
            }
        }
    }

    fn add_logical(&mut self, lapic: &Arc<Lapic>) {
        let Some((mode, ldr)) = lapic.logical_id() else {
            return;
        };
        match self.logical_mode {
            MapMode::Unusable => return,
            MapMode::Nobody => self.logical_mode = MapMode::All(mode),
            MapMode::All(all) if all == mode => {}
            MapMode::All(_) => {
                self.logical_mode = MapMode::Unusable;
                return;
            }
        }
        let (group, bits): (&mut [Slot], u32) = match mode {
            // The logical id is a function of the physical one: the physical table serves.
            LogicalMode::X2Apic => return,
            LogicalMode::Flat => (&mut self.flat, ldr & 0xff),
            LogicalMode::Cluster => (&mut self.cluster[(ldr >> 4 & 0xf) as usize], ldr & 0xf),
        };
        if bits == 0 {
            return;
        }
        let slot = &mut group[bits.trailing_zeros() as usize];
        if !bits.is_power_of_two() || slot.is_some() {
            self.logical_mode = MapMode::Unusable;
        } else {
            *slot = Some(lapic.clone());
        }
    }

    /// The group of a logical destination and the bits of it that are meant; `None`: ask everyone.
    fn logical_group(&self, dest: u32) -> Option<(&[Slot], u32)> {
        match self.logical_mode {
            MapMode::Unusable => None,
            MapMode::Nobody => Some((&[], 0)),
            MapMode::All(LogicalMode::Flat) => Some((&self.flat, dest & 0xff)),
            MapMode::All(LogicalMode::Cluster) => {
                Some((&self.cluster[(dest >> 4 & 0xf) as usize], dest & 0xf))
            }
            MapMode::All(LogicalMode::X2Apic) => {
                let first = (dest >> 16) as usize * 16;
                let group = self.physical.as_deref()?.get(first..).unwrap_or(&[]);
                let group = &group[..group.len().min(16)];
                Some((group, dest & ((1u32 << group.len()) - 1)))
            }
        }
    }
}

/// All local APICs of a VM.
pub(crate) struct ApicBus {
    lapics: ArcSwap<Vec<Arc<Lapic>>>,
    map: ArcSwap<ApicMap>,
    /// Held while the list or the map is replaced.
    replacing: Mutex<()>,
    /// KVM_X2APIC_API_USE_32BIT_IDS.
    ids_32bit: AtomicBool,
    /// KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK.
    broadcast_quirk_disabled: AtomicBool,
}

impl ApicBus {
    pub fn new() -> Self {
        Self {
            lapics: ArcSwap::default(),
            map: ArcSwap::from_pointee(ApicMap::build(&[], false)),
            replacing: Mutex::default(),
            ids_32bit: AtomicBool::new(false),
            broadcast_quirk_disabled: AtomicBool::new(false),
        }
    }

    pub fn add(&self, lapic: Arc<Lapic>) {
        {
            let _replacing = lock(&self.replacing);
            let mut lapics = Vec::clone(&self.lapics.load());
            lapics.push(lapic);
            self.lapics.store(Arc::new(lapics));
        }
        self.rebuild_map();
    }

    /// To be called after a change that [`ApicMap`] depends on.
    pub fn rebuild_map(&self) {
        let _replacing = lock(&self.replacing);
        let map = ApicMap::build(&self.lapics.load(), self.ids_32bit());
        self.map.store(Arc::new(map));
    }

    /// Forgets every APIC, each of which may refer back to the VM.
    pub fn clear(&self) {
        let _replacing = lock(&self.replacing);
        self.lapics.store(Arc::default());
        self.map.store(Arc::new(ApicMap::build(&[], false)));
    }

    pub fn ids_32bit(&self) -> bool {
        self.ids_32bit.load(Ordering::Relaxed)
    }

    pub fn use_32bit_ids(&self) {
        self.ids_32bit.store(true, Ordering::Relaxed);
        self.rebuild_map();
    }

    pub fn disable_broadcast_quirk(&self) {
        self.broadcast_quirk_disabled.store(true, Ordering::Relaxed);
    }

    pub fn for_each(&self, mut visit: impl FnMut(&Arc<Lapic>)) {
        self.lapics.load().iter().for_each(&mut visit);
    }

    pub fn find(&self, matches: impl Fn(&Lapic) -> bool) -> Option<Arc<Lapic>> {
        let lapics = self.lapics.load();
        lapics.iter().find(|lapic| matches(lapic)).cloned()
    }

    /// Whether `lapic` is a destination of the message (shorthands included).
    pub fn matches(&self, lapic: &Lapic, source: Option<&Lapic>, irq: &Interrupt) -> bool {
        let is_source = source.is_some_and(|source| std::ptr::eq(source, lapic));
        match irq.shorthand {
            Shorthand::ToSelf => is_source,
            Shorthand::AllIncludingSelf => true,
            Shorthand::AllExcludingSelf => !is_source,
            Shorthand::None => {
                let x2apic = lapic.x2apic_mode();
                let mut dest = irq.dest;
                // The I/O APIC and MSIs have 8-bit destinations; KVM lets their broadcast reach
                // x2APICs too unless told not to.
                if x2apic
                    && source.is_none()
                    && dest == XAPIC_BROADCAST
                    && !self.broadcast_quirk_disabled.load(Ordering::Relaxed)
                {
                    dest = X2APIC_BROADCAST;
                }
                let everyone = if x2apic {
                    X2APIC_BROADCAST
                } else {
                    XAPIC_BROADCAST
                };
                if dest == everyone {
                    true
                } else if irq.logical {
                    lapic.matches_logical(dest)
                } else if x2apic || dest > 0xff {
                    dest == lapic.apic_id()
                } else {
                    dest == lapic.xapic_id()
                }
            }
        }
    }

    fn is_broadcast(&self, map: &ApicMap, source: Option<&Lapic>, dest: u32) -> bool {
        if self.broadcast_quirk_disabled.load(Ordering::Relaxed) {
            dest == X2APIC_BROADCAST
                || dest == XAPIC_BROADCAST && map.logical_mode != MapMode::All(LogicalMode::X2Apic)
        } else if source.is_some_and(Lapic::x2apic_mode) {
            dest == X2APIC_BROADCAST
        } else {
            dest == XAPIC_BROADCAST
        }
    }

    /// Delivers a message. Returns how many APICs took it; negative if none was a destination.
    /// `accepted` collects the ids of those that took a fixed or lowest-priority interrupt.
    pub fn deliver(
        &self,
        source: Option<&Lapic>,
        irq: &Interrupt,
        mut accepted: Option<&mut Vec<u32>>,
    ) -> i32 {
        let mut give = |lapic: &Lapic| {
            let taken = lapic.accept(irq);
            if let (true, Some(accepted)) = (taken, accepted.as_mut()) {
                accepted.push(lapic.apic_id());
            }
            i32::from(taken)
        };
        if irq.shorthand == Shorthand::ToSelf {
            return source.map_or(-1, give);
        }
        if irq.shorthand == Shorthand::None {
            let map = self.map.load();
            if let (false, Some(physical)) = (
                self.is_broadcast(&map, source, irq.dest),
                map.physical.as_ref(),
            ) {
                if !irq.logical {
                    let lapic = physical.get(irq.dest as usize).and_then(Option::as_ref);
                    return lapic.map_or(0, |lapic| give(lapic));
                }
                if let Some((group, mut bits)) = map.logical_group(irq.dest) {
                    if irq.is_lowest_priority() {
                        let absent = |bit: &usize| group[*bit].is_none();
                        let absent = (0..group.len()).filter(absent);
                        bits &= !absent.fold(0, |bits, bit| bits | 1 << bit);
                        bits = nth_bit(bits, irq.vector);
                    }
                    let members = group.iter().enumerate().filter(|(i, _)| bits >> i & 1 != 0);
                    return members.flat_map(|(_, slot)| slot).map(|l| give(l)).sum();
                }
            }
        }
        self.deliver_by_asking(source, irq, &mut give)
    }

    /// Asks every APIC. Lowest priority among several is spread by vector, as KVM does.
    fn deliver_by_asking(
        &self,
        source: Option<&Lapic>,
        irq: &Interrupt,
        give: &mut dyn FnMut(&Lapic) -> i32,
    ) -> i32 {
        let physical_broadcast = !irq.logical && irq.dest == XAPIC_BROADCAST;
        let lowest_priority = irq.is_lowest_priority() && !physical_broadcast;
        let lapics = self.lapics.load();
        let targets = || {
            let present = lapics.iter().filter(|lapic| lapic.present());
            present.filter(|lapic| self.matches(lapic, source, irq))
        };
        if !lowest_priority {
            return targets()
                .map(|lapic| give(lapic))
                .reduce(|sum, taken| sum + taken)
                .unwrap_or(-1);
        }
        let candidates: Vec<_> = targets().filter(|l| l.software_enabled()).collect();
        match candidates.len() {
            0 => -1,
            n => give(candidates[usize::from(irq.vector) % n]),
        }
    }

    /// Delivers to the APICs whose physical ids are the bits of `bitmap`, from `first` on.
    pub fn deliver_to_bitmap(&self, first: u32, bitmap: u64, irq: &Interrupt) -> Option<i32> {
        let map = self.map.load();
        let group = map.physical.as_ref()?.get(first as usize..).unwrap_or(&[]);
        let members = group.iter().take(64).enumerate();
        let members = members.filter(|(i, _)| bitmap >> i & 1 != 0);
        Some(
            members
                .flat_map(|(_, slot)| slot)
                .map(|lapic| i32::from(lapic.accept(irq)))
                .sum(),
        )
    }
}

/// The bit of `bits` that a vector picks when only one of them may get it.
fn nth_bit(bits: u32, vector: u8) -> u32 {
    let count = bits.count_ones();
    if count == 0 {
        return 0;
    }
    let skipped = (0..u32::from(vector) % count).fold(bits, |rest, _| rest & (rest - 1));
    skipped & skipped.wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::nth_bit;

    #[test]
    fn a_vector_picks_one_bit() {
        assert_eq!(nth_bit(0, 5), 0);
        assert_eq!(nth_bit(0b1010, 0), 0b10);
        assert_eq!(nth_bit(0b1010, 1), 0b1000);
        assert_eq!(nth_bit(0b1010, 2), 0b10);
    }
}
