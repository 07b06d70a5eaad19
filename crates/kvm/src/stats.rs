//! Statistics (KVM API, section 4.133, KVM_GET_STATS_FD): a file of header, id, descriptors and the
//! counters themselves. The file is a memfd and the counters live in it, so that reading it is live.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anykvm_abi::{
    KVM_STATS_BASE_POW2, KVM_STATS_BASE_POW10, KVM_STATS_NAME_SIZE, KVM_STATS_TYPE_CUMULATIVE,
    KVM_STATS_TYPE_INSTANT, KVM_STATS_UNIT_BYTES, KVM_STATS_UNIT_NONE, KVM_STATS_UNIT_SECONDS,
    Plain, kvm_stats_descriptor, kvm_stats_header,
};
use anykvm_cpu::memory::mapping::Mapping;

use crate::error::Result;
use crate::object::memfd;

const HEADER: usize = size_of::<kvm_stats_header>();
const DESCRIPTOR: usize = size_of::<kvm_stats_descriptor>();

/// One statistic: its name and whether it only grows.
#[derive(Clone, Copy, Debug)]
pub struct Statistic {
    /// As KVM or this implementation names it.
    pub name: &'static str,
    /// `KVM_STATS_TYPE_*`, `KVM_STATS_UNIT_*` and `KVM_STATS_BASE_*`.
    pub flags: u32,
    /// The unit is multiplied by the base to this power.
    pub exponent: i16,
}

impl Statistic {
    /// A count of events.
    pub const fn counter(name: &'static str) -> Self {
        Self {
            name,
            flags: KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_NONE | KVM_STATS_BASE_POW10,
            exponent: 0,
        }
    }
    /// Nanoseconds spent.
    pub const fn nanoseconds(name: &'static str) -> Self {
        Self {
            name,
            flags: KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_SECONDS | KVM_STATS_BASE_POW10,
            exponent: -9,
        }
    }
    /// Bytes held now.
    pub const fn bytes(name: &'static str) -> Self {
        Self {
            name,
            flags: KVM_STATS_TYPE_INSTANT | KVM_STATS_UNIT_BYTES | KVM_STATS_BASE_POW2,
            exponent: 0,
        }
    }
}

/// A statistics file and the counters in it.
#[derive(Debug)]
pub struct StatsFile {
    fd: OwnedFd,
    mapping: Mapping,
    table: &'static [Statistic],
    data: usize,
}

impl StatsFile {
    /// A file of these statistics, all 0. `id` is the id string (`kvm-PID` or `kvm-PID/vcpu-ID`).
    pub fn new(id: &str, table: &'static [Statistic]) -> Result<Arc<Self>> {
        let descriptors = HEADER + KVM_STATS_NAME_SIZE;
        let data = descriptors + table.len() * DESCRIPTOR;
        let len = data + table.len() * 8;
        let fd = memfd("kvm-stats", len as u64)?;
        let mapping = Mapping::new(fd.as_fd(), 0, len)?;
        let header = kvm_stats_header {
            flags: 0,
            name_size: KVM_STATS_NAME_SIZE as u32,
            num_desc: table.len() as u32,
            id_offset: HEADER as u32,
            desc_offset: descriptors as u32,
            data_offset: data as u32,
        };
        mapping.write_bytes(0, header.as_bytes());
        mapping.write_bytes(HEADER, &name(id));
        for (i, statistic) in table.iter().enumerate() {
            let descriptor = kvm_stats_descriptor {
                flags: statistic.flags,
                exponent: statistic.exponent,
                size: 1,
                offset: (i * 8) as u32,
                bucket_size: 0,
                name: name(statistic.name),
            };
            mapping.write_bytes(descriptors + i * DESCRIPTOR, descriptor.as_bytes());
        }
        Ok(Arc::new(Self {
            fd,
            mapping,
            table,
            data,
        }))
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Adds to a counter, from any thread.
    pub fn add(&self, index: usize, n: u64) {
        self.mapping
            .atomic(self.data + index * 8)
            .fetch_add(n, Ordering::Relaxed);
    }

    /// Sets a value: for those that have one writer.
    pub fn set(&self, index: usize, value: u64) {
        self.mapping
            .atomic(self.data + index * 8)
            .store(value, Ordering::Relaxed);
    }

    /// A counter's value.
    pub fn get(&self, index: usize) -> u64 {
        self.mapping
            .atomic(self.data + index * 8)
            .load(Ordering::Relaxed)
    }

    /// All values with their names.
    pub fn values(&self) -> Vec<(&'static str, u64)> {
        self.table
            .iter()
            .enumerate()
            .map(|(i, s)| (s.name, self.get(i)))
            .collect()
    }
}

fn name(text: &str) -> [u8; KVM_STATS_NAME_SIZE] {
    let mut name = [0; KVM_STATS_NAME_SIZE];
    let len = text.len().min(KVM_STATS_NAME_SIZE - 1);
    name[..len].copy_from_slice(&text.as_bytes()[..len]);
    name
}

macro_rules! vm_statistics {
    ($($(#[$doc:meta])* $name:ident = $kind:ident $text:literal;)*) => {
        /// The statistics of a VM.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum VmStat {
            $($(#[$doc])* $name,)*
        }
        /// Their descriptors, in the same order.
        pub(crate) const VM_STATISTICS: &[Statistic] = &[$(Statistic::$kind($text)),*];
    };
}

vm_statistics! {
    /// Changes of memory slots.
    MemslotChanges = counter "memslot_changes";
    /// Levels given to GSIs by KVM_IRQ_LINE.
    IrqLines = counter "irq_lines";
    /// Interrupts from irqfds.
    Irqfds = counter "irqfd_injections";
    /// Interrupts from KVM_SIGNAL_MSI.
    Msis = counter "msi_injections";
    /// Accesses that signalled an ioeventfd.
    Ioeventfds = counter "ioeventfd_signals";
    /// Writes put into the coalesced ring.
    Coalesced = counter "coalesced_writes";
    /// Wake-ups of the event thread.
    EventThread = counter "event_thread_wakeups";
    /// Memory that the VM holds beside guest RAM and what its processors hold: records of the pages that code
    /// ran from, dirty logs.
    EngineMemory = bytes "vm_engine_memory_bytes";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_is_live() {
        let stats = StatsFile::new("kvm-1", VM_STATISTICS).unwrap();
        stats.add(VmStat::Irqfds as usize, 3);
        let mut header = [0; HEADER];
        rustix::io::pread(stats.fd(), &mut header, 0).unwrap();
        let header = kvm_stats_header::from_bytes(&header).unwrap();
        assert_eq!(header.num_desc as usize, VM_STATISTICS.len());
        let mut bytes = [0; DESCRIPTOR];
        let at = u64::from(header.desc_offset) + (VmStat::Irqfds as usize * DESCRIPTOR) as u64;
        rustix::io::pread(stats.fd(), &mut bytes, at).unwrap();
        let descriptor = kvm_stats_descriptor::from_bytes(&bytes).unwrap();
        assert_eq!(&descriptor.name[..17], b"irqfd_injections\0");
        let mut value = [0; 8];
        let at = u64::from(header.data_offset) + u64::from(descriptor.offset);
        rustix::io::pread(stats.fd(), &mut value, at).unwrap();
        assert_eq!(u64::from_le_bytes(value), 3);
        stats.add(VmStat::Irqfds as usize, 1);
        rustix::io::pread(stats.fd(), &mut value, at).unwrap();
        assert_eq!(u64::from_le_bytes(value), 4);
        assert_eq!(
            stats.values()[VmStat::Irqfds as usize],
            ("irqfd_injections", 4)
        );
    }
}
