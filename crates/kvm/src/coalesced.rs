//! Coalesced MMIO and port I/O (KVM API, section 4.116, KVM_REGISTER_COALESCED_MMIO): writes to a
//! zone are put into a ring that the VMM reads at its next exit. The ring is one page a VM, which a
//! mapping of a vCPU's fd shows as page `KVM_COALESCED_MMIO_PAGE_OFFSET`.

use std::mem::offset_of;
use std::sync::Mutex;
use std::sync::atomic::{Ordering, fence};

use anykvm_abi::{Plain, kvm_coalesced_mmio, kvm_coalesced_mmio_ring, kvm_coalesced_mmio_zone};
use anykvm_cpu::memory::mapping::Mapping;

use crate::error::{Errno, Result};
use crate::io_bus::Space;
use crate::vm::Vm;

const FIRST: usize = offset_of!(kvm_coalesced_mmio_ring, first);
const LAST: usize = offset_of!(kvm_coalesced_mmio_ring, last);
const ENTRIES: usize = offset_of!(kvm_coalesced_mmio_ring, coalesced_mmio);
const ENTRY: usize = size_of::<kvm_coalesced_mmio>();
/// Zones of one space (`NR_IOBUS_DEVS`).
const MAX_ZONES: usize = 1000;
/// KVM_COALESCED_MMIO_MAX.
const CAPACITY: u32 = ((4096 - ENTRIES) / ENTRY) as u32;

/// A range whose writes are coalesced.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Zone {
    address: u64,
    size: u64,
}

impl Zone {
    /// Whether an access of this length is within the zone.
    pub fn contains(&self, address: u64, len: u64) -> bool {
        let end = address.checked_add(len);
        address >= self.address
            && end.is_some_and(|end| end <= self.address.saturating_add(self.size))
    }
}

/// The ring page. `first` is the VMM's, `last` is ours; it may write either at any time.
#[derive(Debug)]
pub(crate) struct Ring(Mutex<Mapping>);

impl Ring {
    pub fn new(page: Mapping) -> Self {
        Self(Mutex::new(page))
    }

    /// Puts a write in; false if there is no room, or it is longer than an entry.
    pub fn push(&self, space: Space, address: u64, data: &[u8]) -> bool {
        let page = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let (first, last) = (page.read::<u32>(FIRST), page.read::<u32>(LAST));
        let next = (last.wrapping_add(1)) % CAPACITY;
        if last >= CAPACITY || next == first || data.len() > 8 {
            return false;
        }
        let mut entry = kvm_coalesced_mmio {
            phys_addr: address,
            len: data.len() as u32,
            ..Plain::zeroed()
        };
        entry.__bindgen_anon_1.pio = u32::from(space == Space::Pio);
        entry.data[..data.len()].copy_from_slice(data);
        page.write_bytes(ENTRIES + last as usize * ENTRY, entry.as_bytes());
        // The entry is there before the VMM can see that it is.
        fence(Ordering::Release);
        page.write(LAST, next);
        true
    }
}

fn space(zone: &kvm_coalesced_mmio_zone) -> Result<Space> {
    // `pio` is the last field, and a union with the padding it once was.
    match zone.as_bytes()[12..] {
        [0, 0, 0, 0] => Ok(Space::Mmio),
        [1, 0, 0, 0] => Ok(Space::Pio),
        _ => Err(Errno::EINVAL),
    }
}

impl Vm {
    /// KVM_REGISTER_COALESCED_MMIO.
    pub(crate) fn register_coalesced(&self, zone: &kvm_coalesced_mmio_zone) -> Result<()> {
        let space = space(zone)?;
        let zone = Zone {
            address: zone.addr,
            size: zone.size.into(),
        };
        self.bus.change(|table| {
            let zones = &mut table.space(space).zones;
            if zones.len() >= MAX_ZONES {
                return Err(Errno::ENOSPC);
            }
            zones.push(zone);
            Ok(())
        })
    }

    /// KVM_UNREGISTER_COALESCED_MMIO: every zone that contains the range.
    pub(crate) fn unregister_coalesced(&self, range: &kvm_coalesced_mmio_zone) -> Result<()> {
        let space = space(range)?;
        self.bus.change(|table| {
            table
                .space(space)
                .zones
                .retain(|z| !z.contains(range.addr, range.size.into()));
            Ok(())
        })
    }
}
