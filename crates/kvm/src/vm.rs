//! A virtual machine: what KVM_CREATE_VM makes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use anykvm_abi::{
    KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_MULTI_ADDRESS_SPACE, kvm_clock_data,
};
use anykvm_cpu::Cpu;
use anykvm_cpu::memory::GuestMemory;
use anykvm_cpu::memory::mapping::Mapping;
use anykvm_cpu::requests::OWNER;
use anykvm_cpu::turns::Turns;
use anykvm_jit::Budget;
use arc_swap::ArcSwapOption;

use crate::capability::EnabledCapabilities;
use crate::capability_table::check_extension;
use crate::clock::Clock;
use crate::clock_pages::ClockPages;
use crate::coalesced::Ring;
use crate::error::{Errno, Result};
use crate::event_thread::EventThread;
use crate::guest_memfd::GuestMemfd;
use crate::io_bus::IoBus;
use crate::irq::Irq;
use crate::memory::SlotTable;
use crate::msr_filter::MsrFilter;
use crate::object::memfd;
use crate::stats::{StatsFile, VM_STATISTICS, VmStat};
use crate::time::{CountedTime, Time};
use crate::translation::{self, Translation, TranslationMode};
use crate::vcpu::Vcpu;
use crate::xen::XenHvm;

/// vCPUs of one VM (KVM_CAP_MAX_VCPUS).
pub const MAX_VCPUS: usize = 1024;
/// vCPU ids are below this (KVM_CAP_MAX_VCPU_ID).
pub const MAX_VCPU_IDS: u32 = 4096;

const PAGE: usize = 4096;
/// The least KVM_SET_NR_MMU_PAGES takes.
const MIN_MMU_PAGES: u64 = 64;

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    fd: OwnedFd,
    /// Guest RAM, shared with the processors.
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) time: Arc<Time>,
    pub(crate) clock: Clock,
    pub(crate) clock_pages: ClockPages,
    /// MSR_KVM_WALL_CLOCK, one for all vCPUs.
    pub(crate) wall_clock: AtomicU64,
    /// The last TSC written, which the vCPUs share.
    pub(crate) tsc_sync: crate::tsc::TscSync,
    pub(crate) stats: Arc<StatsFile>,
    translation: Mutex<VmTranslation>,
    pub(crate) events: EventThread,
    pub(crate) enabled: EnabledCapabilities,
    /// Memory slots and aliases.
    pub(crate) slots: Mutex<SlotTable>,
    pub(crate) irq: Irq,
    pub(crate) bus: IoBus,
    pub(crate) msr_filter: ArcSwapOption<MsrFilter>,
    pub(crate) xen_hvm: ArcSwapOption<XenHvm>,
    /// Whether the VFIO device exists.
    pub(crate) vfio_device: Mutex<bool>,
    /// KVM_SET_NR_MMU_PAGES: kept, there is no shadow MMU to limit.
    mmu_pages: AtomicU32,
    /// KVM_X86_SW_PROTECTED_VM: its pages can be private.
    private_memory: bool,
    pub(crate) guest_memfds: Mutex<Vec<Weak<GuestMemfd>>>,
    coalesced_ring: OwnedFd,
    /// KVM_CAP_DIRTY_LOG_RING: bytes of each vCPU's ring, 0 if there are none.
    pub(crate) dirty_ring_bytes: AtomicU32,
    /// `kvm->lock`: creation of vCPUs and of what must come before or after them.
    vcpus: Mutex<Vcpus>,
}

/// How guest code is run, and the limit of translated code that the vCPUs share.
#[derive(Debug)]
pub(crate) struct VmTranslation {
    pub how: Translation,
    pub budget: Arc<Budget>,
    /// For [`TranslationMode::Lockstep`].
    pub turns: Arc<Turns>,
}

impl VmTranslation {
    /// Gives vCPU `id`'s processor its translator. `counted`: time is.
    pub fn equip(&self, cpu: &mut Cpu, id: u32, counted: bool) {
        let translator = self.how.translator(id, &self.budget, counted);
        if translator.is_some() && self.how.mode == TranslationMode::Lockstep && !counted {
            cpu.set_lockstep(self.turns.clone());
        }
        cpu.set_translator(translator);
    }
}

impl From<Translation> for VmTranslation {
    fn from(how: Translation) -> Self {
        Self {
            budget: how.budget(),
            turns: Arc::default(),
            how,
        }
    }
}

/// The vCPUs a VM has and had. One whose last descriptor is closed is gone, but its id stays taken,
/// as with KVM.
#[derive(Debug, Default)]
pub(crate) struct Vcpus {
    created: Vec<(u32, Weak<Vcpu>)>,
    /// The statistics of all of them, which outlive them.
    stats: Vec<Arc<StatsFile>>,
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
    /// KVM_CREATE_VM. `private_memory`: KVM_X86_SW_PROTECTED_VM. `counted`: time is counted, not the host's.
    pub(crate) fn new(private_memory: bool, counted: Option<CountedTime>) -> Result<Arc<Self>> {
        // Before the VMM's seccomp filters, which may forbid executable mappings.
        anykvm_cpu::assist::prepare();
        let translation = Translation::from_env().map_err(|e| {
            translation::say_once(&e);
            Errno::EINVAL
        })?;
        let time = Time::new(counted);
        let id = format!("kvm-{}", std::process::id());
        let stats = StatsFile::new(&id, VM_STATISTICS)?;
        let coalesced_ring = memfd("kvm-coalesced", PAGE as u64)?;
        Ok(Arc::new(Self {
            fd: memfd("kvm-vm", 0)?,
            memory: Arc::new(GuestMemory::new()),
            clock: Clock::new(time.clone()),
            clock_pages: ClockPages::default(),
            wall_clock: AtomicU64::new(0),
            tsc_sync: Default::default(),
            events: EventThread::start(stats.clone(), time.clone())?,
            time,
            stats,
            translation: Mutex::new(translation.into()),
            enabled: EnabledCapabilities::default(),
            slots: Mutex::default(),
            irq: Irq::default(),
            bus: IoBus::new(Ring::new(Mapping::new(coalesced_ring.as_fd(), 0, PAGE)?)),
            msr_filter: ArcSwapOption::empty(),
            xen_hvm: ArcSwapOption::empty(),
            vfio_device: Mutex::default(),
            mmu_pages: AtomicU32::new(0),
            private_memory,
            guest_memfds: Mutex::default(),
            coalesced_ring,
            dirty_ring_bytes: AtomicU32::new(0),
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

    /// What KVM_ENABLE_CAP has switched on.
    pub fn enabled(&self) -> &EnabledCapabilities {
        &self.enabled
    }

    /// The VM's statistics.
    pub fn stats(&self) -> &Arc<StatsFile> {
        &self.stats
    }

    /// The memfd of the coalesced ring, one page.
    pub fn coalesced_ring_fd(&self) -> BorrowedFd<'_> {
        self.coalesced_ring.as_fd()
    }

    /// Counts an event.
    pub(crate) fn count(&self, stat: VmStat) {
        self.stats.add(stat as usize, 1);
    }

    /// Whether its pages can be private (KVM_X86_SW_PROTECTED_VM).
    pub(crate) fn has_private_memory(&self) -> bool {
        self.private_memory
    }

    /// KVM_CHECK_EXTENSION on the VM: what depends on its type, and for all others what `/dev/kvm` says.
    pub(crate) fn check_extension(&self, capability: u64) -> i32 {
        let private = self.has_private_memory();
        match u32::try_from(capability) {
            Ok(KVM_CAP_GUEST_MEMFD) => private.into(),
            Ok(KVM_CAP_MEMORY_ATTRIBUTES) => self.memory_attributes() as i32,
            Ok(KVM_CAP_MULTI_ADDRESS_SPACE) if private => 1,
            _ => check_extension(capability),
        }
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

    /// The statistics of every vCPU there has been.
    pub(crate) fn vcpu_stats(&self) -> Vec<Arc<StatsFile>> {
        self.lock_vcpus().stats.clone()
    }

    /// KVM_SET_BOOT_CPU_ID: before the first vCPU.
    pub(crate) fn set_boot_vcpu(&self, id: u64) -> Result<()> {
        let mut vcpus = self.lock_vcpus();
        if vcpus.any_created() {
            return Err(Errno::EBUSY);
        }
        vcpus.boot_id = id as u32;
        Ok(())
    }

    /// How guest code is to be run: before the first vCPU.
    pub(crate) fn set_translation(&self, how: Translation) -> Result<()> {
        if how.cache < Translation::MIN_CACHE || how.cache > Translation::MAX_CACHE {
            return Err(Errno::EINVAL);
        }
        let vcpus = self.lock_vcpus();
        if vcpus.any_created() {
            return Err(Errno::EBUSY);
        }
        *self.lock_translation() = how.into();
        Ok(())
    }

    pub(crate) fn lock_translation(&self) -> MutexGuard<'_, VmTranslation> {
        self.translation.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// KVM_SET_TSC_KHZ on the VM: before the first vCPU.
    pub(crate) fn set_default_tsc_khz(&self, khz: u64) -> Result<()> {
        let khz = khz as u32;
        if khz >= crate::tsc::MAX_KHZ || self.lock_vcpus().any_created() {
            return Err(Errno::EINVAL);
        }
        self.clock.set_default_tsc_khz(khz);
        Ok(())
    }

    /// KVM_SET_CLOCK: the guest's clock pages are written anew.
    pub(crate) fn set_clock(&self, data: &kvm_clock_data) -> Result<()> {
        self.clock.set(data)?;
        self.clock_pages.request();
        for vcpu in self.vcpus() {
            vcpu.kick().request(OWNER);
        }
        Ok(())
    }

    /// KVM_SET_TSS_ADDR: three pages below 4 GiB. The processor needs no such memory; the address is
    /// only checked.
    pub(crate) fn set_tss_addr(&self, address: u64) -> Result<()> {
        if address > u64::from(u32::MAX) + 1 - 3 * PAGE as u64 {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    /// KVM_SET_IDENTITY_MAP_ADDR: before the first vCPU.
    pub(crate) fn may_set_identity_map_addr(&self) -> Result<()> {
        if self.lock_vcpus().any_created() {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    /// KVM_SET_NR_MMU_PAGES.
    pub(crate) fn set_mmu_pages(&self, pages: u64) -> Result<()> {
        if pages < MIN_MMU_PAGES {
            return Err(Errno::EINVAL);
        }
        self.mmu_pages.store(pages as u32, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_GET_NR_MMU_PAGES.
    pub(crate) fn mmu_pages(&self) -> i32 {
        self.mmu_pages.load(Ordering::Relaxed) as i32
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
        vcpus.stats.push(vcpu.stats().clone());
        Ok(vcpu)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(chip) = self.irq.chip() {
            chip.disconnect();
        }
    }
}
