//! The public handle of a VM, with the methods of the kvm-ioctls crate's `VmFd`. Section numbers are
//! the KVM API document's.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use anykvm_abi::{
    KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, KVM_MSR_FILTER_DEFAULT_ALLOW,
    KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE, KvmIrqRouting,
    kvm_clock_data, kvm_coalesced_mmio_zone, kvm_create_device, kvm_create_guest_memfd,
    kvm_enable_cap, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio, kvm_irqchip, kvm_irqfd, kvm_memory_alias, kvm_memory_attributes,
    kvm_memory_region, kvm_msi, kvm_pit_config, kvm_pit_state2, kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
};

use crate::cap::Cap;
use crate::device_fd::DeviceFd;
use crate::error::{Errno, Result};
use crate::guest_memfd::GuestMemfd;
use crate::irq::Controllers;
use crate::object::Object;
use crate::system::VCPU_MMAP_SIZE;
use crate::translation::Translation;
use crate::vcpu_fd::VcpuFd;
use crate::vcpu_stats::VcpuStat;
use crate::vm::Vm;

/// An address in port or memory space.
#[derive(Clone, Copy, Debug)]
pub enum IoEventAddress {
    /// A port.
    Pio(u64),
    /// A guest-physical address.
    Mmio(u64),
}

/// For [`VmFd::register_ioevent`]: any write to the address, whatever its length and value.
#[derive(Clone, Copy, Debug)]
pub struct NoDatamatch;

impl From<NoDatamatch> for u64 {
    fn from(_: NoDatamatch) -> Self {
        0
    }
}

/// What an MSR filter does with MSRs in no range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MsrFilterDefaultAction {
    /// Allows access.
    ALLOW = KVM_MSR_FILTER_DEFAULT_ALLOW,
    /// Denies access.
    DENY = KVM_MSR_FILTER_DEFAULT_DENY,
}

bitflags::bitflags! {
    /// Which accesses a range of an MSR filter is about.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct MsrFilterRangeFlags: u32 {
        /// RDMSR.
        const READ = KVM_MSR_FILTER_READ;
        /// WRMSR.
        const WRITE = KVM_MSR_FILTER_WRITE;
    }
}

/// One range of an MSR filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrFilterRange<'a> {
    /// Which accesses.
    pub flags: MsrFilterRangeFlags,
    /// The first MSR.
    pub base: u32,
    /// How many.
    pub msr_count: u32,
    /// One bit each; set: allowed.
    pub bitmap: &'a [u8],
}

/// A VM's counters at one moment: its own and the sum of its vCPUs'.
#[derive(Clone, Debug)]
pub struct VmStats {
    /// Instructions completed by all vCPUs.
    pub instructions: u64,
    /// Returns of KVM_RUN on all vCPUs.
    pub exits: u64,
    /// Everything that is counted, by the names of the statistics files.
    pub counters: Vec<(&'static str, u64)>,
}

impl fmt::Display for VmStats {
    /// The counters that are not 0, on one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (name, value) in self.counters.iter().filter(|(_, value)| *value != 0) {
            write!(f, "{separator}{name} {value}")?;
            separator = ", ";
        }
        Ok(())
    }
}

/// A virtual machine.
///
/// ```
/// let kvm = anykvm::Kvm::new().unwrap();
/// let vm = kvm.create_vm().unwrap();
/// ```
#[derive(Debug)]
pub struct VmFd {
    vm: Arc<Vm>,
}

impl From<Arc<Vm>> for VmFd {
    fn from(vm: Arc<Vm>) -> Self {
        Self { vm }
    }
}

impl AsFd for VmFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.vm.fd()
    }
}

impl AsRawFd for VmFd {
    fn as_raw_fd(&self) -> RawFd {
        self.vm.fd().as_raw_fd()
    }
}

impl VmFd {
    /// The object behind the handle, for ioctls by number.
    pub fn object(&self) -> Object {
        Object::Vm(self.vm.clone())
    }

    /// What the VM and its vCPUs have counted so far.
    pub fn stats(&self) -> VmStats {
        let mut counters = self.vm.stats().values();
        let vcpus = self.vm.vcpu_stats();
        let sum = |stat: VcpuStat| vcpus.iter().map(|v| v.get(stat as usize)).sum();
        let per_vcpu = vcpus.iter().map(|v| v.values());
        let totals = per_vcpu.reduce(|mut totals, values| {
            for (total, value) in totals.iter_mut().zip(values) {
                total.1 += value.1;
            }
            totals
        });
        counters.extend(totals.into_iter().flatten());
        VmStats {
            instructions: sum(VcpuStat::Instructions),
            exits: sum(VcpuStat::Exits),
            counters,
        }
    }

    /// Creates, changes, moves or deletes a slot of guest memory (section 4.35,
    /// KVM_SET_USER_MEMORY_REGION). When it returns, no vCPU uses the slot's old memory any more.
    ///
    /// # Safety
    ///
    /// `userspace_addr` must lead to memory that this program reaches only through raw pointers or
    /// atomics while the guest may, for as long as the slot exists: the guest reads and writes it.
    ///
    /// ```
    /// # use anykvm::Kvm;
    /// use anykvm::bindings::kvm_userspace_memory_region;
    ///
    /// let vm = Kvm::new().unwrap().create_vm().unwrap();
    /// let region = kvm_userspace_memory_region {
    ///     slot: 0,
    ///     flags: 0,
    ///     guest_phys_addr: 0x10000,
    ///     memory_size: 0x10000,
    ///     userspace_addr: 0,
    /// };
    /// // SAFETY: no vCPU runs, so the memory is not used.
    /// unsafe { vm.set_user_memory_region(region) }.unwrap();
    /// ```
    #[allow(unsafe_code)]
    pub unsafe fn set_user_memory_region(
        &self,
        user_memory_region: kvm_userspace_memory_region,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.vm.set_user_memory_region(&user_memory_region) }
    }

    /// As [`Self::set_user_memory_region`], with the longer structure, which can name private memory
    /// (section 4.140, KVM_SET_USER_MEMORY_REGION2).
    ///
    /// # Safety
    ///
    /// As [`Self::set_user_memory_region`].
    #[allow(unsafe_code)]
    pub unsafe fn set_user_memory_region2(
        &self,
        user_memory_region2: kvm_userspace_memory_region2,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.vm.set_user_memory_region2(&user_memory_region2) }
    }

    /// Makes a file of private memory (section 4.142, KVM_CREATE_GUEST_MEMFD). EINVAL on a VM that is not a
    /// KVM_X86_SW_PROTECTED_VM.
    pub fn create_guest_memfd(&self, gmem: kvm_create_guest_memfd) -> Result<Arc<GuestMemfd>> {
        self.vm.create_guest_memfd(&gmem)
    }

    /// Says which guest-physical memory is private (section 4.141, KVM_SET_MEMORY_ATTRIBUTES).
    pub fn set_memory_attributes(&self, attributes: kvm_memory_attributes) -> Result<()> {
        self.vm.set_memory_attributes(&attributes)
    }

    /// Makes guest memory that KVM provides (KVM_SET_MEMORY_REGION of the first KVM API). A mapping
    /// of the VM's descriptor shows it at the offset that is its guest-physical address.
    pub fn set_memory_region(&self, region: kvm_memory_region) -> Result<()> {
        self.vm.set_memory_region(&region)
    }

    /// Makes a guest-physical window onto other slots (KVM_SET_MEMORY_ALIAS of the first KVM API).
    pub fn set_memory_alias(&self, alias: kvm_memory_alias) -> Result<()> {
        self.vm.set_memory_alias(&alias)
    }

    /// Names three pages of guest-physical space that Intel's processors need (section 4.36,
    /// KVM_SET_TSS_ADDR).
    pub fn set_tss_address(&self, offset: usize) -> Result<()> {
        self.vm.set_tss_addr(offset as u64)
    }

    /// Names one page of guest-physical space that Intel's processors need (section 4.44,
    /// KVM_SET_IDENTITY_MAP_ADDR).
    pub fn set_identity_map_address(&self, address: u64) -> Result<()> {
        let _ = address;
        self.vm.may_set_identity_map_addr()
    }

    /// Creates PIC pair, I/O APIC and, for every vCPU from now on, a local APIC (section 4.24,
    /// KVM_CREATE_IRQCHIP).
    pub fn create_irq_chip(&self) -> Result<()> {
        self.vm.create_controllers(Controllers::Full)
    }

    /// Gets the state of the controller that `chip_id` names (section 4.26, KVM_GET_IRQCHIP).
    pub fn get_irqchip(&self, irqchip: &mut kvm_irqchip) -> Result<()> {
        self.vm.get_irqchip(irqchip)
    }

    /// Sets the state of the controller that `chip_id` names (section 4.27, KVM_SET_IRQCHIP).
    pub fn set_irqchip(&self, irqchip: &kvm_irqchip) -> Result<()> {
        self.vm.set_irqchip(irqchip)
    }

    /// Creates the interval timer (section 4.71, KVM_CREATE_PIT2).
    ///
    /// ```
    /// # use anykvm::Kvm;
    /// let vm = Kvm::new().unwrap().create_vm().unwrap();
    /// vm.create_irq_chip().unwrap();
    /// vm.create_pit2(Default::default()).unwrap();
    /// ```
    pub fn create_pit2(&self, pit_config: kvm_pit_config) -> Result<()> {
        self.vm.create_pit(&pit_config)
    }

    /// Gets the interval timer's state (section 4.72, KVM_GET_PIT2).
    pub fn get_pit2(&self) -> Result<kvm_pit_state2> {
        self.vm.get_pit2()
    }

    /// Sets the interval timer's state (section 4.73, KVM_SET_PIT2).
    pub fn set_pit2(&self, pitstate: &kvm_pit_state2) -> Result<()> {
        self.vm.set_pit2(pitstate)
    }

    /// Gets kvmclock (section 4.29, KVM_GET_CLOCK).
    pub fn get_clock(&self) -> Result<kvm_clock_data> {
        Ok(self.vm.clock().get())
    }

    /// Sets kvmclock (section 4.30, KVM_SET_CLOCK).
    pub fn set_clock(&self, clock: &kvm_clock_data) -> Result<()> {
        self.vm.set_clock(clock)
    }

    /// Sets which MSRs the guest may touch (section 4.97, KVM_X86_SET_MSR_FILTER).
    pub fn set_msr_filter(
        &self,
        default_action: MsrFilterDefaultAction,
        ranges: &[MsrFilterRange<'_>],
    ) -> Result<()> {
        self.vm.set_msr_filter_ranges(default_action as u32, ranges)
    }

    /// Sends an MSI; how many vCPUs got it, 0 if it was blocked (section 4.70, KVM_SIGNAL_MSI).
    pub fn signal_msi(&self, msi: kvm_msi) -> Result<i32> {
        self.vm.signal_msi(&msi)
    }

    /// Replaces the table of where GSIs lead (section 4.52, KVM_SET_GSI_ROUTING).
    pub fn set_gsi_routing(&self, irq_routing: &KvmIrqRouting) -> Result<()> {
        self.vm.set_gsi_routing(irq_routing.as_slice())
    }

    /// From now on a guest's write to the address signals the eventfd instead of being an exit
    /// (section 4.59, KVM_IOEVENTFD). With a `datamatch` that is an integer, only a write of its
    /// size and value.
    ///
    /// ```
    /// # use anykvm::{IoEventAddress, Kvm, NoDatamatch};
    /// use vmm_sys_util::eventfd::EventFd;
    ///
    /// let vm = Kvm::new().unwrap().create_vm().unwrap();
    /// let event = EventFd::new(0).unwrap();
    /// vm.register_ioevent(&event, &IoEventAddress::Pio(0xf4), NoDatamatch).unwrap();
    /// vm.register_ioevent(&event, &IoEventAddress::Mmio(0x1000), 5u32).unwrap();
    /// ```
    pub fn register_ioevent<T: Into<u64>>(
        &self,
        fd: &impl AsRawFd,
        addr: &IoEventAddress,
        datamatch: T,
    ) -> Result<()> {
        self.vm.ioeventfd(&ioeventfd(fd, addr, datamatch, 0))
    }

    /// Undoes [`Self::register_ioevent`] (section 4.59).
    pub fn unregister_ioevent<T: Into<u64>>(
        &self,
        fd: &impl AsRawFd,
        addr: &IoEventAddress,
        datamatch: T,
    ) -> Result<()> {
        let deassign = 1 << kvm_ioeventfd_flag_nr_deassign;
        self.vm.ioeventfd(&ioeventfd(fd, addr, datamatch, deassign))
    }

    /// The pages of a slot that were written since the last call, one bit each (section 4.8,
    /// KVM_GET_DIRTY_LOG).
    pub fn get_dirty_log(&self, slot: u32, memory_size: usize) -> Result<Vec<u64>> {
        let mut bitmap = self.vm.fetch_dirty_log(slot)?;
        bitmap.resize(memory_size.div_ceil(4096 * 64), 0);
        Ok(bitmap)
    }

    /// Has pages that are written put into a ring of each vCPU to come, of so many bytes, by default the
    /// most there may be (section 8.29, KVM_CAP_DIRTY_LOG_RING). [`crate::VcpuFd::dirty_log_ring_iter`]
    /// takes them out.
    pub fn enable_dirty_log_ring(&self, bytes: Option<i32>) -> Result<()> {
        let bytes = match bytes {
            Some(bytes) => u64::try_from(bytes).map_err(|_| Errno::EINVAL)?,
            None => u64::from(crate::dirty_ring::MAX_RING_BYTES),
        };
        self.vm.enable_dirty_ring(bytes)
    }

    /// Frees the entries of dirty rings that were collected; how many. To be called before the pages are
    /// read: from then on they are put into a ring again when they are written (section 8.29,
    /// KVM_RESET_DIRTY_RINGS).
    pub fn reset_dirty_rings(&self) -> Result<u64> {
        Ok(self.vm.reset_dirty_rings()? as u64)
    }

    /// From now on a signal of the eventfd is an interrupt on the GSI (section 4.75, KVM_IRQFD).
    pub fn register_irqfd(&self, fd: &impl AsRawFd, gsi: u32) -> Result<()> {
        self.irqfd(fd, gsi, 0, 0)
    }

    /// As [`Self::register_irqfd`] for a level-triggered GSI: `resamplefd` is signalled when the
    /// guest has acknowledged it (section 4.75).
    pub fn register_irqfd_with_resample(
        &self,
        fd: &impl AsRawFd,
        resamplefd: &impl AsRawFd,
        gsi: u32,
    ) -> Result<()> {
        self.irqfd(
            fd,
            gsi,
            KVM_IRQFD_FLAG_RESAMPLE,
            resamplefd.as_raw_fd() as u32,
        )
    }

    /// Undoes [`Self::register_irqfd`] (section 4.75).
    pub fn unregister_irqfd(&self, fd: &impl AsRawFd, gsi: u32) -> Result<()> {
        self.irqfd(fd, gsi, KVM_IRQFD_FLAG_DEASSIGN, 0)
    }

    fn irqfd(&self, fd: &impl AsRawFd, gsi: u32, flags: u32, resamplefd: u32) -> Result<()> {
        self.vm.irqfd(&kvm_irqfd {
            fd: fd.as_raw_fd() as u32,
            gsi,
            flags,
            resamplefd,
            ..Default::default()
        })
    }

    /// Sets the level of a GSI (section 4.25, KVM_IRQ_LINE).
    pub fn set_irq_line(&self, irq: u32, active: bool) -> Result<()> {
        self.vm.irq_line(irq, active, false).map(|_| ())
    }

    /// Creates a vCPU; its id is its APIC id (section 4.7, KVM_CREATE_VCPU).
    pub fn create_vcpu(&self, id: u64) -> Result<VcpuFd> {
        self.vm.create_vcpu(id).map(VcpuFd::from)
    }

    /// The VM's clock in nanoseconds, if its time is counted
    /// ([`crate::Kvm::create_vm_with_counted_time`]).
    pub fn counted_ns(&self) -> Option<u64> {
        self.vm.counted_ns()
    }

    /// For a VM with counted time whose vCPUs all wait: lets time pass until the next timer goes off. False
    /// if none runs.
    pub fn skip_to_next_timer(&self) -> bool {
        self.vm.skip_to_next_timer()
    }

    /// Sets how guest code is run, which the environment has said first (`ANYKVM_JIT`,
    /// `ANYKVM_JIT_CACHE`, `ANYKVM_JIT_REPORT`). Before the first vCPU: later it fails with EBUSY. EINVAL for a code cache
    /// that is too small or too large.
    ///
    /// ```
    /// use anykvm::{Translation, TranslationMode};
    /// # let vm = anykvm::Kvm::new().unwrap().create_vm().unwrap();
    /// let how = Translation { mode: TranslationMode::On, cache: 16 << 20, ..Default::default() };
    /// vm.set_translation(how).unwrap();
    /// ```
    pub fn set_translation(&self, how: Translation) -> Result<()> {
        self.vm.set_translation(how)
    }

    /// Creates a device in the kernel; on x86 there is one type, VFIO (section 4.79,
    /// KVM_CREATE_DEVICE).
    pub fn create_device(&self, device: &mut kvm_create_device) -> Result<DeviceFd> {
        // With KVM_CREATE_DEVICE_TEST there is no device to return.
        let made = self.vm.create_device(device)?.ok_or(Errno::EINVAL)?;
        device.fd = made.fd().as_raw_fd() as u32;
        Ok(DeviceFd::from(made))
    }

    /// Switches a capability on (section 4.37, KVM_ENABLE_CAP).
    pub fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()> {
        self.vm.enable_cap(cap)
    }

    /// The size of a vCPU's shared area.
    pub fn run_size(&self) -> usize {
        VCPU_MMAP_SIZE
    }

    /// Whether a capability is there (section 4.4).
    pub fn check_extension(&self, c: Cap) -> bool {
        self.check_extension_int(c) > 0
    }

    /// A capability's value; 0 if it is not there (section 4.4).
    pub fn check_extension_int(&self, c: Cap) -> i32 {
        self.check_extension_raw(c as u64)
    }

    /// A capability's value by number (section 4.4).
    pub fn check_extension_raw(&self, c: u64) -> i32 {
        self.vm.check_extension(c)
    }

    /// From now on writes to the range are collected in a ring instead of being exits (section
    /// 4.116, KVM_REGISTER_COALESCED_MMIO).
    pub fn register_coalesced_mmio(&self, addr: IoEventAddress, size: u32) -> Result<()> {
        self.vm.register_coalesced(&zone(addr, size))
    }

    /// Undoes [`Self::register_coalesced_mmio`] (section 4.116).
    pub fn unregister_coalesced_mmio(&self, addr: IoEventAddress, size: u32) -> Result<()> {
        self.vm.unregister_coalesced(&zone(addr, size))
    }
}

fn zone(addr: IoEventAddress, size: u32) -> kvm_coalesced_mmio_zone {
    let (addr, pio) = match addr {
        IoEventAddress::Pio(port) => (port, 1),
        IoEventAddress::Mmio(gpa) => (gpa, 0),
    };
    let mut zone = kvm_coalesced_mmio_zone {
        addr,
        size,
        ..Default::default()
    };
    zone.__bindgen_anon_1.pio = pio;
    zone
}

fn ioeventfd<T: Into<u64>>(
    fd: &impl AsRawFd,
    addr: &IoEventAddress,
    datamatch: T,
    mut flags: u32,
) -> kvm_ioeventfd {
    if size_of::<T>() > 0 {
        flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    let addr = match *addr {
        IoEventAddress::Pio(port) => {
            flags |= 1 << kvm_ioeventfd_flag_nr_pio;
            port
        }
        IoEventAddress::Mmio(gpa) => gpa,
    };
    kvm_ioeventfd {
        datamatch: datamatch.into(),
        addr,
        len: size_of::<T>() as u32,
        fd: fd.as_raw_fd(),
        flags,
        ..Default::default()
    }
}
