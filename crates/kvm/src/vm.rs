//! A virtual machine: what KVM_CREATE_VM makes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use anykvm_cpu::memory::GuestMemory;
use anykvm_cpu::memory::mapping::Mapping;

use crate::clock::Clock;
use crate::error::{Errno, Result};
use crate::event_thread::EventThread;
use crate::object::memfd;
use crate::stats::{StatsFile, VM_STATISTICS, VmStat};
use crate::vcpu::Vcpu;

/// vCPUs of one VM (KVM_CAP_MAX_VCPUS).
pub const MAX_VCPUS: usize = 1024;
/// vCPU ids are below this (KVM_CAP_MAX_VCPU_ID).
pub const MAX_VCPU_IDS: u32 = 4096;

const PAGE: usize = 4096;

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    fd: OwnedFd,
    /// Guest RAM, shared with the processors.
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) clock: Clock,
    pub(crate) stats: Arc<StatsFile>,
    pub(crate) events: EventThread,
    coalesced_ring: OwnedFd,
    /// `kvm->lock`: creation of vCPUs and of what must come before or after them.
    vcpus: Mutex<Vcpus>,
}

/// The vCPUs a VM has and had. One whose last descriptor is closed is gone, but its id stays taken,
/// as with KVM.
#[derive(Debug, Default)]
pub(crate) struct Vcpus {
    created: Vec<(u32, Weak<Vcpu>)>,
    /// The id of the bootstrap processor (KVM_SET_BOOT_CPU_ID).
    pub(crate) boot_id: u32,
    /// KVM_CAP_MAX_VCPU_ID, when set.
    pub(crate) max_id: Option<u32>,
}

impl Vcpus {
    /// Whether KVM_CREATE_VCPU has ever succeeded.
    pub(crate) fn any_created(&self) -> bool {
        !self.created.is_empty()
    }
}

impl Vm {
    /// KVM_CREATE_VM.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let id = format!("kvm-{}", std::process::id());
        let stats = StatsFile::new(&id, VM_STATISTICS)?;
        Ok(Arc::new(Self {
            fd: memfd("kvm-vm", 0)?,
            memory: Arc::new(GuestMemory::new()),
            clock: Clock::new(),
            events: EventThread::start(stats.clone())?,
            stats,
            coalesced_ring: memfd("kvm-coalesced", PAGE as u64)?,
            vcpus: Mutex::default(),
        }))
    }

    /// The VM's memfd: guest-physical memory made by KVM_SET_MEMORY_REGION, by its address.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Guest RAM.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// kvmclock and the TSC's frequency.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The memfd of the coalesced ring, one page.
    pub fn coalesced_ring_fd(&self) -> BorrowedFd<'_> {
        self.coalesced_ring.as_fd()
    }

    /// Counts an event.
    pub(crate) fn count(&self, stat: VmStat) {
        self.stats.add(stat as usize, 1);
    }

    pub(crate) fn lock_vcpus(&self) -> MutexGuard<'_, Vcpus> {
        self.vcpus.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The vCPUs there are, in the order of their creation.
    pub fn vcpus(&self) -> Vec<Arc<Vcpu>> {
        self.lock_vcpus()
            .created
            .iter()
            .filter_map(|(_, vcpu)| vcpu.upgrade())
            .collect()
    }

    /// Whether this id is the bootstrap processor's.
    pub fn is_boot_vcpu(&self, id: u32) -> bool {
        self.lock_vcpus().boot_id == id
    }

    /// Sets request bits on every vCPU.
    pub(crate) fn request_all(&self, bits: u32) {
        for vcpu in self.vcpus() {
            vcpu.kick().request(bits);
        }
    }

    /// KVM_CREATE_VCPU.
    pub(crate) fn create_vcpu(self: &Arc<Self>, id: u64) -> Result<Arc<Vcpu>> {
        let mut vcpus = self.lock_vcpus();
        let limit = vcpus.max_id.unwrap_or(MAX_VCPU_IDS);
        let id = u32::try_from(id)
            .ok()
            .filter(|id| *id < limit)
            .ok_or(Errno::EINVAL)?;
        if vcpus.created.len() >= MAX_VCPUS {
            return Err(Errno::EINVAL);
        }
        if vcpus.created.iter().any(|(taken, _)| *taken == id) {
            return Err(Errno::EEXIST);
        }
        let boot = vcpus.boot_id == id;
        let vcpu = Vcpu::new(self.clone(), id, boot)?;
        vcpus.created.push((id, Arc::downgrade(&vcpu)));
        Ok(vcpu)
    }
}
