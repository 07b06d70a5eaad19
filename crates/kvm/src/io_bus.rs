//! What the VM does itself with port I/O and MMIO that no interrupt controller takes: ioeventfds and
//! coalesced zones. vCPUs look here on every such access, so the table is an immutable snapshot that
//! is read without locks; registering builds a new one.

use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;

use crate::coalesced::{Ring, Zone};
use crate::ioeventfd::IoEventFd;
use crate::stats::VmStat;
use crate::vm::Vm;

/// Which address space an access is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Pio,
    Mmio,
}

/// What is registered in one address space.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registered {
    /// By ascending address.
    pub ioeventfds: Vec<Arc<IoEventFd>>,
    pub zones: Vec<Zone>,
}

/// What is registered in both.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    pio: Registered,
    mmio: Registered,
}

impl Table {
    pub fn space(&mut self, space: Space) -> &mut Registered {
        match space {
            Space::Pio => &mut self.pio,
            Space::Mmio => &mut self.mmio,
        }
    }
}

/// The table in force, and the ring that coalesced writes go to.
#[derive(Debug)]
pub(crate) struct IoBus {
    table: ArcSwap<Table>,
    changing: Mutex<()>,
    ring: Ring,
}

/// What became of a write.
enum Outcome {
    Signalled,
    Coalesced,
    NotTaken,
}

impl IoBus {
    pub fn new(ring: Ring) -> Self {
        Self {
            table: ArcSwap::default(),
            changing: Mutex::new(()),
            ring,
        }
    }

    /// Changes the table; a change that fails leaves it as it was.
    pub fn change<T>(
        &self,
        change: impl FnOnce(&mut Table) -> crate::error::Result<T>,
    ) -> crate::error::Result<T> {
        let _changing = self.changing.lock().unwrap_or_else(|e| e.into_inner());
        let mut table = Table::clone(&self.table.load());
        let result = change(&mut table)?;
        self.table.store(Arc::new(table));
        Ok(result)
    }

    fn write(&self, space: Space, address: u64, data: &[u8]) -> Outcome {
        let table = self.table.load();
        let registered = match space {
            Space::Pio => &table.pio,
            Space::Mmio => &table.mmio,
        };
        let all = &registered.ioeventfds;
        let first = all.partition_point(|e| e.address < address);
        let here = all[first..].iter().take_while(|e| e.address == address);
        for ioeventfd in here {
            if ioeventfd.matches(data) {
                ioeventfd.eventfd.signal();
                return Outcome::Signalled;
            }
        }
        let zone = registered
            .zones
            .iter()
            .find(|z| z.contains(address, data.len() as u64));
        if zone.is_some() && self.ring.push(space, address, data) {
            return Outcome::Coalesced;
        }
        Outcome::NotTaken
    }
}

impl Vm {
    /// A port write that no device took: true if an ioeventfd or a coalesced zone did.
    pub(crate) fn pio_written(&self, port: u16, data: &[u8]) -> bool {
        self.bus_write(Space::Pio, port.into(), data)
    }

    /// A memory write that no device took: true if an ioeventfd or a coalesced zone did.
    pub(crate) fn mmio_written(&self, gpa: u64, data: &[u8]) -> bool {
        self.bus_write(Space::Mmio, gpa, data)
    }

    fn bus_write(&self, space: Space, address: u64, data: &[u8]) -> bool {
        match self.bus.write(space, address, data) {
            Outcome::Signalled => self.count(VmStat::Ioeventfds),
            Outcome::Coalesced => self.count(VmStat::Coalesced),
            Outcome::NotTaken => return false,
        }
        true
    }
}
