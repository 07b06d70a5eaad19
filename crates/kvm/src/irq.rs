//! Interrupts from outside the vCPUs (KVM API, sections 4.24 to 4.26, 4.52, 4.70, 4.71): the VM's
//! interrupt controllers, KVM_IRQ_LINE, MSIs, GSI routing and the PIT. The devices themselves are
//! crate `anykvm_irqchip`.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use anykvm_abi::{
    IrqchipState, KVM_PIT_SPEAKER_DUMMY, Plain, irqchip_state, kvm_irq_routing_entry, kvm_irqchip,
    kvm_msi, kvm_pit_config, kvm_pit_state, kvm_pit_state2,
};
use anykvm_irqchip::{
    ChipMode, IrqChip, MAX_IRQ_ROUTES, RESAMPLE_IRQ_SOURCE_ID, USERSPACE_IRQ_SOURCE_ID, VmEvents,
};

use crate::error::{Errno, Result};
use crate::event_thread::{Deadline, Expire};
use crate::eventfd::EventFd;
use crate::irqfd::Irqfds;
use crate::stats::VmStat;
use crate::time::Time;
use crate::vm::Vm;

pub(crate) use anykvm_irqchip::ChipMode as Controllers;

/// What a VM has of interrupts.
#[derive(Default)]
pub(crate) struct Irq {
    chip: OnceLock<Arc<IrqChip>>,
    pub irqfds: Mutex<Irqfds>,
    pub resamplers: Arc<Resamplers>,
}

impl fmt::Debug for Irq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Irq")
            .field("mode", &self.chip().map(|c| c.mode()))
            .finish_non_exhaustive()
    }
}

impl Irq {
    /// The interrupt controllers, if there are any in the kernel.
    pub fn chip(&self) -> Option<&Arc<IrqChip>> {
        self.chip.get()
    }
}

/// The eventfds to signal when a level-triggered GSI is acknowledged.
#[derive(Debug, Default)]
pub(crate) struct Resamplers(Mutex<HashMap<u32, Vec<Arc<EventFd>>>>);

impl Resamplers {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Vec<Arc<EventFd>>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
    pub fn add(&self, gsi: u32, eventfd: Arc<EventFd>) {
        self.lock().entry(gsi).or_default().push(eventfd);
    }
    pub fn remove(&self, gsi: u32, eventfd: &Arc<EventFd>) {
        let mut all = self.lock();
        if let Some(list) = all.get_mut(&gsi) {
            list.retain(|e| !Arc::ptr_eq(e, eventfd));
            if list.is_empty() {
                all.remove(&gsi);
            }
        }
    }
}

/// What the controllers ask of the VM.
struct ChipEvents {
    chip: OnceLock<Weak<IrqChip>>,
    deadline: Arc<Deadline>,
    resamplers: Arc<Resamplers>,
    time: Arc<Time>,
}

impl VmEvents for ChipEvents {
    fn now_ns(&self) -> u64 {
        self.time.ns()
    }

    fn timer_armed(&self, deadline: Option<u64>) {
        self.deadline.set(deadline);
    }

    /// The line falls, and whoever drives it is asked whether it still does.
    fn gsi_acked(&self, gsi: u32) {
        let Some(chip) = self.chip.get().and_then(Weak::upgrade) else {
            return;
        };
        let eventfds = self
            .resamplers
            .lock()
            .get(&gsi)
            .cloned()
            .unwrap_or_default();
        if !eventfds.is_empty() {
            chip.set_irq(gsi, RESAMPLE_IRQ_SOURCE_ID, false, false);
            eventfds.iter().for_each(|e| e.signal());
        }
    }
}

/// The controllers' own timers on the event thread.
struct ChipTimer(Weak<IrqChip>);

impl Expire for ChipTimer {
    fn expired(&self, now_ns: u64) {
        if let Some(chip) = self.0.upgrade() {
            chip.timer_expired(now_ns);
        }
    }
}

impl Vm {
    /// The interrupt controllers, if there are any in the kernel.
    pub fn irqchip(&self) -> Option<&Arc<IrqChip>> {
        self.irq.chip()
    }

    /// KVM_CREATE_IRQCHIP and KVM_CAP_SPLIT_IRQCHIP: once, and before the first vCPU.
    pub(crate) fn create_controllers(&self, mode: ChipMode) -> Result<()> {
        let vcpus = self.lock_vcpus();
        if self.irq.chip().is_some() {
            return Err(Errno::EEXIST);
        }
        if vcpus.any_created() {
            return Err(Errno::EINVAL);
        }
        let deadline = self.events.unconnected_deadline();
        let events = Arc::new(ChipEvents {
            chip: OnceLock::new(),
            deadline: deadline.clone(),
            resamplers: self.irq.resamplers.clone(),
            time: self.time.clone(),
        });
        let chip = IrqChip::new(mode, events.clone());
        self.events
            .connect(&deadline, Arc::new(ChipTimer(Arc::downgrade(&chip))));
        let _ = events.chip.set(Arc::downgrade(&chip));
        let _ = self.irq.chip.set(chip);
        self.apply_x2apic_api()
    }

    /// ENXIO without controllers in the kernel.
    fn any_chip(&self) -> Result<&Arc<IrqChip>> {
        self.irq.chip().ok_or(Errno::ENXIO)
    }

    /// The controllers with PIC and I/O APIC, or this error.
    pub(crate) fn full_chip(&self, otherwise: Errno) -> Result<&Arc<IrqChip>> {
        self.irq
            .chip()
            .filter(|c| c.mode() == ChipMode::Full)
            .ok_or(otherwise)
    }

    /// KVM_IRQ_LINE and KVM_IRQ_LINE_STATUS: the level of a GSI; how it was received.
    pub(crate) fn irq_line(&self, gsi: u32, level: bool, status: bool) -> Result<i32> {
        let chip = self.any_chip()?;
        self.count(VmStat::IrqLines);
        Ok(chip.set_irq(gsi, USERSPACE_IRQ_SOURCE_ID, level, status))
    }

    /// KVM_GET_IRQCHIP: fills in the state of the chip that `chip_id` names.
    pub(crate) fn get_irqchip(&self, state: &mut kvm_irqchip) -> Result<()> {
        let chip = self.full_chip(Errno::ENXIO)?;
        match irqchip_state(state).ok_or(Errno::EINVAL)? {
            IrqchipState::PicMaster(_) => state.chip.pic = chip.pic_state(0)?,
            IrqchipState::PicSlave(_) => state.chip.pic = chip.pic_state(1)?,
            IrqchipState::Ioapic(_) => state.chip.ioapic = chip.ioapic_state()?,
        }
        Ok(())
    }

    /// KVM_SET_IRQCHIP.
    pub(crate) fn set_irqchip(&self, state: &kvm_irqchip) -> Result<()> {
        let chip = self.full_chip(Errno::ENXIO)?;
        match irqchip_state(state).ok_or(Errno::EINVAL)? {
            IrqchipState::PicMaster(pic) => chip.set_pic_state(0, &pic)?,
            IrqchipState::PicSlave(pic) => chip.set_pic_state(1, &pic)?,
            IrqchipState::Ioapic(ioapic) => chip.set_ioapic_state(&ioapic)?,
        }
        Ok(())
    }

    /// KVM_SET_GSI_ROUTING: all or nothing.
    pub(crate) fn set_gsi_routing(&self, entries: &[kvm_irq_routing_entry]) -> Result<()> {
        let chip = self.irq.chip().ok_or(Errno::EINVAL)?;
        if entries.len() > MAX_IRQ_ROUTES as usize {
            return Err(Errno::EINVAL);
        }
        Ok(chip.set_routing(entries)?)
    }

    /// KVM_SIGNAL_MSI: how many vCPUs got it, 0 if it was blocked.
    pub(crate) fn signal_msi(&self, msi: &kvm_msi) -> Result<i32> {
        let chip = self.irq.chip().ok_or(Errno::EINVAL)?;
        if msi.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let address = u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo);
        self.count(VmStat::Msis);
        match chip.send_msi(address, msi.data)? {
            // As Linux, which hands "no destination" (-1) through as an errno.
            ..0 => Err(Errno::EPERM),
            delivered => Ok(delivered),
        }
    }

    /// KVM_CREATE_PIT2 (and KVM_CREATE_PIT, with the speaker's port).
    pub(crate) fn create_pit(&self, config: &kvm_pit_config) -> Result<()> {
        let chip = self.full_chip(Errno::ENOENT)?;
        Ok(chip.create_pit(config.flags & KVM_PIT_SPEAKER_DUMMY != 0)?)
    }

    /// KVM_GET_PIT2.
    pub(crate) fn get_pit2(&self) -> Result<kvm_pit_state2> {
        Ok(self.any_chip()?.pit_state()?)
    }

    /// KVM_SET_PIT2.
    pub(crate) fn set_pit2(&self, state: &kvm_pit_state2) -> Result<()> {
        Ok(self.any_chip()?.set_pit_state(state)?)
    }

    /// KVM_GET_PIT.
    pub(crate) fn get_pit(&self) -> Result<kvm_pit_state> {
        Ok(kvm_pit_state {
            channels: self.get_pit2()?.channels,
        })
    }

    /// KVM_SET_PIT: the channels only.
    pub(crate) fn set_pit(&self, state: &kvm_pit_state) -> Result<()> {
        let mut whole = self.get_pit2()?;
        whole.channels = state.channels;
        self.set_pit2(&whole)
    }

    /// KVM_REINJECT_CONTROL.
    pub(crate) fn set_reinject(&self, reinject: bool) -> Result<()> {
        Ok(self.any_chip()?.set_pit_reinject(reinject)?)
    }
}

/// A `kvm_irqchip` to be filled by KVM_GET_IRQCHIP, every byte defined.
pub(crate) fn empty_irqchip(chip_id: u32) -> kvm_irqchip {
    kvm_irqchip {
        chip_id,
        ..Plain::zeroed()
    }
}
