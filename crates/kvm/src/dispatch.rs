//! The VM's ioctls by number: copies arguments in and results out; the work is done by the module
//! each belongs to.

use std::sync::Arc;

use anykvm_abi::ioctl::*;
use anykvm_abi::{
    KVM_PIT_SPEAKER_DUMMY, Plain, kvm_create_device, kvm_pit_config, kvm_reinject_control,
    kvm_userspace_memory_region, kvm_userspace_memory_region2,
};

use crate::error::{Errno, Result};
use crate::ioctl_table::{ObjectKind, refusal};
use crate::irq::{Controllers, empty_irqchip};
use crate::object::{Object, Reply};
use crate::user::UserMemory;
use crate::vm::Vm;

impl Vm {
    /// An ioctl on the VM.
    pub fn ioctl(self: &Arc<Self>, request: u32, arg: u64, user: &dyn UserMemory) -> Result<Reply> {
        match request {
            KVM_CREATE_VCPU => Ok(Reply::Object(Object::Vcpu(self.create_vcpu(arg)?))),
            KVM_CREATE_DEVICE => self.ioctl_create_device(arg, user),
            KVM_CREATE_GUEST_MEMFD => {
                let file = self.create_guest_memfd(&user.get(arg)?)?;
                Ok(Reply::Object(Object::GuestMemfd(file)))
            }
            KVM_GET_STATS_FD => Ok(Reply::Object(Object::Stats(self.stats.clone()))),
            _ => self.ioctl_value(request, arg, user).map(Reply::Value),
        }
    }

    /// Those that return a number.
    fn ioctl_value(self: &Arc<Self>, request: u32, arg: u64, user: &dyn UserMemory) -> Result<i32> {
        match request {
            KVM_CHECK_EXTENSION => return Ok(self.check_extension(arg)),
            KVM_ENABLE_CAP => self.enable_cap(&user.get(arg)?)?,
            // memory
            KVM_SET_USER_MEMORY_REGION => self.ioctl_set_region(&user.get(arg)?)?,
            KVM_SET_USER_MEMORY_REGION2 => self.ioctl_set_region2(&user.get(arg)?)?,
            KVM_SET_MEMORY_ATTRIBUTES => self.set_memory_attributes(&user.get(arg)?)?,
            KVM_SET_MEMORY_REGION => self.set_memory_region(&user.get(arg)?)?,
            KVM_SET_MEMORY_ALIAS => self.set_memory_alias(&user.get(arg)?)?,
            KVM_GET_DIRTY_LOG => self.get_dirty_log(&user.get(arg)?, user)?,
            KVM_CLEAR_DIRTY_LOG => self.clear_dirty_log(&user.get(arg)?, user)?,
            KVM_SET_TSS_ADDR => self.set_tss_addr(arg)?,
            KVM_SET_IDENTITY_MAP_ADDR => {
                self.may_set_identity_map_addr()?;
                // The processor needs no such memory.
                let _address: u64 = user.get(arg)?;
            }
            KVM_SET_NR_MMU_PAGES => self.set_mmu_pages(arg)?,
            KVM_GET_NR_MMU_PAGES => return Ok(self.mmu_pages()),
            KVM_REGISTER_COALESCED_MMIO => self.register_coalesced(&user.get(arg)?)?,
            KVM_UNREGISTER_COALESCED_MMIO => self.unregister_coalesced(&user.get(arg)?)?,
            KVM_RESET_DIRTY_RINGS => return self.reset_dirty_rings(),
            // interrupts
            KVM_CREATE_IRQCHIP => self.create_controllers(Controllers::Full)?,
            KVM_IRQ_LINE => {
                let [irq, level] = user.get(arg)?;
                self.irq_line(irq, level != 0, false)?;
            }
            KVM_IRQ_LINE_STATUS => {
                let [irq, level]: [u32; 2] = user.get(arg)?;
                let status = self.irq_line(irq, level != 0, true)?;
                user.put(arg, &[status as u32, level])?;
            }
            KVM_GET_IRQCHIP => {
                let [chip_id, _pad]: [u32; 2] = user.get(arg)?;
                let mut state = empty_irqchip(chip_id);
                self.get_irqchip(&mut state)?;
                user.put(arg, &state)?;
            }
            KVM_SET_IRQCHIP => self.set_irqchip(&user.get(arg)?)?,
            KVM_SET_GSI_ROUTING => self.ioctl_set_gsi_routing(arg, user)?,
            KVM_SIGNAL_MSI => return self.signal_msi(&user.get(arg)?),
            KVM_IRQFD => self.irqfd(&user.get(arg)?)?,
            KVM_IOEVENTFD => self.ioeventfd(&user.get(arg)?)?,
            KVM_CREATE_PIT => self.create_pit(&kvm_pit_config {
                flags: KVM_PIT_SPEAKER_DUMMY,
                ..Plain::zeroed()
            })?,
            KVM_CREATE_PIT2 => self.create_pit(&user.get(arg)?)?,
            KVM_GET_PIT => user.put(arg, &self.get_pit()?)?,
            KVM_SET_PIT => self.set_pit(&user.get(arg)?)?,
            KVM_GET_PIT2 => user.put(arg, &self.get_pit2()?)?,
            KVM_SET_PIT2 => self.set_pit2(&user.get(arg)?)?,
            KVM_REINJECT_CONTROL => {
                let control: kvm_reinject_control = user.get(arg)?;
                self.set_reinject(control.pit_reinject != 0)?;
            }
            // vCPUs and time
            KVM_SET_BOOT_CPU_ID => self.set_boot_vcpu(arg)?,
            KVM_GET_CLOCK => user.put(arg, &self.clock.get())?,
            KVM_SET_CLOCK => self.set_clock(&user.get(arg)?)?,
            KVM_GET_TSC_KHZ => return Ok(self.clock.default_tsc_khz() as i32),
            KVM_SET_TSC_KHZ => self.set_default_tsc_khz(arg)?,
            KVM_X86_SET_MSR_FILTER => self.set_msr_filter(&user.get(arg)?, user)?,
            KVM_XEN_HVM_CONFIG => self.xen_hvm_config(&user.get(arg)?, user)?,
            _ => return Err(refusal(ObjectKind::Vm, request)),
        }
        Ok(0)
    }

    #[allow(unsafe_code)]
    fn ioctl_set_region(&self, region: &kvm_userspace_memory_region) -> Result<()> {
        // SAFETY: a program that issues the ioctl hands the memory to the guest, as it would to the
        // kernel; it is outside of what Rust references here reach.
        unsafe { self.set_user_memory_region(region) }
    }

    #[allow(unsafe_code)]
    fn ioctl_set_region2(&self, region: &kvm_userspace_memory_region2) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.set_user_memory_region2(region) }
    }

    fn ioctl_set_gsi_routing(&self, arg: u64, user: &dyn UserMemory) -> Result<()> {
        let [count, flags]: [u32; 2] = user.get(arg)?;

        if self.irqchip().is_none() || flags != 0 || count > anykvm_irqchip::MAX_IRQ_ROUTES {
            return Err(Errno::EINVAL);
        }
        let count = count as usize;
        let entries = user.get_array(arg.wrapping_add(8), count, count)?;
        self.set_gsi_routing(&entries)
    }

    /// KVM_CREATE_DEVICE: whoever gives the device a descriptor puts its number into the structure.
    fn ioctl_create_device(self: &Arc<Self>, arg: u64, user: &dyn UserMemory) -> Result<Reply> {
        let request: kvm_create_device = user.get(arg)?;
        Ok(match self.create_device(&request)? {
            None => Reply::Value(0),
            Some(device) => Reply::Object(Object::Device(device)),
        })
    }
}
