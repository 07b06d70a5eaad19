//! Private memory of a KVM_X86_SW_PROTECTED_VM (KVM API: KVM_CREATE_GUEST_MEMFD, KVM_SET_USER_MEMORY_REGION2,
//! KVM_SET_MEMORY_ATTRIBUTES): memory that is the guest's alone, in a file that cannot be mapped, and for each
//! page of guest-physical memory whether the guest sees that or what the monitor shares with it.
//!
//! A slot shows its pages as the attributes say: the processors' memory map has one piece for each range that is
//! private or shared. A private page of a slot without a file is in no piece; an access to it ends KVM_RUN with
//! KVM_EXIT_MEMORY_FAULT.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};

use anykvm_abi::{
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd,
    kvm_memory_attributes, kvm_userspace_memory_region2,
};
use anykvm_cpu::memory::mapping::Mapping;
use anykvm_cpu::memory::{PAGE, Slot};
use rustix::fs::{MemfdFlags, SealFlags};

use crate::error::{Errno, Result};
use crate::eventfd::duplicate;
use crate::memory::{Backing, Place, Record, Region};
use crate::vm::Vm;

/// A file of private memory: what KVM_CREATE_GUEST_MEMFD makes. Keeps its VM alive, as with KVM.
#[derive(Debug)]
pub struct GuestMemfd {
    vm: Arc<Vm>,
    fd: OwnedFd,
    size: u64,
    /// Ranges that slots show.
    bound: Mutex<Vec<Range<u64>>>,
}

impl GuestMemfd {
    /// The VM it belongs to.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }
    /// Its memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The part of a file that a slot shows, taken as long as this exists.
#[derive(Debug)]
pub(crate) struct Binding {
    file: Weak<GuestMemfd>,
    range: Range<u64>,
    memory: Arc<Mapping>,
}

impl Drop for Binding {
    fn drop(&mut self) {
        if let Some(file) = self.file.upgrade() {
            let mut bound = file.bound.lock().unwrap_or_else(|e| e.into_inner());
            bound.retain(|range| *range != self.range);
        }
    }
}

/// Which guest-physical memory is private: ranges that do not touch, by their first address.
#[derive(Debug, Default)]
pub(crate) struct PrivateRanges(BTreeMap<u64, u64>);

impl PrivateRanges {
    /// Makes a range private, or shared.
    fn set(&mut self, range: Range<u64>, private: bool) {
        let touched = |(start, end): &(&u64, &u64)| **start <= range.end && **end >= range.start;
        let old: Vec<_> = self
            .0
            .iter()
            .filter(touched)
            .map(|(start, end)| (*start, *end))
            .collect();
        let (mut first, mut last) = (range.start, range.end);
        for (start, end) in old {
            self.0.remove(&start);
            if private {
                first = first.min(start);
                last = last.max(end);
            } else {
                if start < range.start {
                    self.0.insert(start, range.start.min(end));
                }
                if end > range.end {
                    self.0.insert(start.max(range.end), end);
                }
            }
        }
        if private {
            self.0.insert(first, last);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn contains(&self, gpa: u64) -> bool {
        self.0
            .range(..=gpa)
            .next_back()
            .is_some_and(|(_, end)| gpa < *end)
    }

    /// A range in parts, each private or not.
    fn parts(&self, range: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let mut parts = Vec::new();
        let mut at = range.start;
        for (start, end) in &self.0 {
            let (start, end) = ((*start).max(range.start), (*end).min(range.end));
            if start >= end {
                continue;
            }
            if at < start {
                parts.push((at..start, false));
            }
            parts.push((start..end, true));
            at = end;
        }
        if at < range.end {
            parts.push((at..range.end, false));
        }
        parts
    }

    /// What the processors see of a slot.
    pub fn pieces(&self, record: &Record) -> Vec<Arc<Slot>> {
        let slot = &record.slot;
        let parts = self.parts(slot.gpa..slot.gpa + slot.size);
        if parts.iter().all(|(_, private)| !private) {
            return vec![slot.clone()];
        }
        let piece = |(range, private): (Range<u64>, bool)| {
            let (own, base) = match (&record.private, private) {
                (Some(binding), true) => (Some(&binding.memory), binding.memory.address()),
                (None, true) => return None,
                (_, false) => (record.own.as_ref(), slot.host()),
            };
            let place = Place {
                id: slot.id,
                gpa: range.start,
                size: range.end - range.start,
                host: base + (range.start - slot.gpa),
                readonly: slot.readonly,
            };
            Some(Arc::new(place.slot(own.cloned(), None)))
        };
        parts.into_iter().filter_map(piece).collect()
    }
}

impl Vm {
    /// KVM_CREATE_GUEST_MEMFD.
    pub(crate) fn create_guest_memfd(
        self: &Arc<Self>,
        request: &kvm_create_guest_memfd,
    ) -> Result<Arc<GuestMemfd>> {
        let size = request.size;
        if !self.has_private_memory()
            || request.flags != 0
            || size == 0
            || !size.is_multiple_of(PAGE)
            || size > i64::MAX as u64
        {
            return Err(Errno::EINVAL);
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("kvm-gmem", flags)?;
        rustix::fs::ftruncate(&fd, size)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let file = Arc::new(GuestMemfd {
            vm: self.clone(),
            fd,
            size,
            bound: Mutex::default(),
        });
        let mut all = self.guest_memfds.lock().unwrap_or_else(|e| e.into_inner());
        all.retain(|file| file.strong_count() > 0);
        all.push(Arc::downgrade(&file));
        Ok(file)
    }

    /// The file of this VM behind a descriptor of the monitor's.
    fn guest_memfd(&self, fd: u32) -> Result<Arc<GuestMemfd>> {
        let stat = rustix::fs::fstat(duplicate(fd as i32)?)?;
        let all = self.guest_memfds.lock().unwrap_or_else(|e| e.into_inner());
        let same = |file: &Arc<GuestMemfd>| {
            rustix::fs::fstat(&file.fd)
                .is_ok_and(|own| (own.st_dev, own.st_ino) == (stat.st_dev, stat.st_ino))
        };
        let mut files = all.iter().filter_map(Weak::upgrade);
        files.find(same).ok_or(Errno::EINVAL)
    }

    /// KVM_SET_USER_MEMORY_REGION2.
    ///
    /// # Safety
    /// As [`Self::set_user_memory_region`].
    #[allow(unsafe_code)]
    pub(crate) unsafe fn set_user_memory_region2(
        &self,
        region: &kvm_userspace_memory_region2,
    ) -> Result<()> {
        let mut new = Region {
            slot: region.slot,
            flags: region.flags,
            gpa: region.guest_phys_addr,
            size: region.memory_size,
            backing: Backing::User(region.userspace_addr),
            private: None,
        };
        if region.flags & KVM_MEM_GUEST_MEMFD != 0 {
            new.check(self)?;
            if region.memory_size != 0 {
                new.private = Some(self.bind(region)?);
            }
        }
        self.set_region(new)
    }

    /// Takes the part of a file that a slot shall show.
    fn bind(&self, region: &kvm_userspace_memory_region2) -> Result<Binding> {
        let start = region.guest_memfd_offset;
        let end = start.checked_add(region.memory_size).ok_or(Errno::EINVAL)?;
        let file = self.guest_memfd(region.guest_memfd)?;
        if !start.is_multiple_of(PAGE) || end > file.size {
            return Err(Errno::EINVAL);
        }
        let len = usize::try_from(region.memory_size).map_err(|_| Errno::ENOMEM)?;
        let memory = Mapping::new(file.fd(), start, len).map_err(|_| Errno::ENOMEM)?;
        let mut bound = file.bound.lock().unwrap_or_else(|e| e.into_inner());
        if bound.iter().any(|r| start < r.end && r.start < end) {
            return Err(Errno::EINVAL);
        }
        bound.push(start..end);
        Ok(Binding {
            file: Arc::downgrade(&file),
            range: start..end,
            memory: Arc::new(memory),
        })
    }

    /// The attributes that pages of this VM can have (KVM_CAP_MEMORY_ATTRIBUTES).
    pub(crate) fn memory_attributes(&self) -> u32 {
        if self.has_private_memory() {
            KVM_MEMORY_ATTRIBUTE_PRIVATE
        } else {
            0
        }
    }

    /// KVM_SET_MEMORY_ATTRIBUTES. When it returns no vCPU sees the pages as they were.
    pub(crate) fn set_memory_attributes(&self, new: &kvm_memory_attributes) -> Result<()> {
        let end = new.address.checked_add(new.size).ok_or(Errno::EINVAL)?;
        if new.flags != 0
            || new.attributes & !u64::from(self.memory_attributes()) != 0
            || new.size == 0
            || !new.address.is_multiple_of(PAGE)
            || !new.size.is_multiple_of(PAGE)
        {
            return Err(Errno::EINVAL);
        }
        let private = new.attributes & u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) != 0;
        let mut table = self.lock_slots();
        table.private.set(new.address..end, private);
        self.put_in_force(&mut table, 0);
        Ok(())
    }

    /// Whether the page is private.
    pub(crate) fn is_private(&self, gpa: u64) -> bool {
        self.has_private_memory() && self.lock_slots().private.contains(gpa)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_and_split() {
        let mut r = PrivateRanges::default();
        let all = |r: &PrivateRanges| r.0.iter().map(|(a, b)| (*a, *b)).collect::<Vec<_>>();
        r.set(10..20, true);
        r.set(30..40, true);
        r.set(20..25, true);
        assert_eq!(all(&r), [(10, 25), (30, 40)]);
        r.set(12..14, false);
        assert_eq!(all(&r), [(10, 12), (14, 25), (30, 40)]);
        assert!(r.contains(10) && !r.contains(12) && r.contains(14) && !r.contains(40));
        assert_eq!(
            r.parts(11..35),
            [
                (11..12, true),
                (12..14, false),
                (14..25, true),
                (25..30, false),
                (30..35, true)
            ]
        );
        r.set(0..100, false);
        assert_eq!(all(&r), []);
        r.set(0..100, true);
        r.set(40..60, true);
        assert_eq!(all(&r), [(0, 100)]);
        r.set(0..50, false);
        assert_eq!(all(&r), [(50, 100)]);
        r.set(0..50, false);
        assert_eq!(all(&r), [(50, 100)]);
    }
}
