//! How the guest and the VMM reach the controllers: ports, the I/O APIC's page, and the state ioctls.

use std::sync::Mutex;

use anykvm_abi::{kvm_ioapic_state, kvm_pic_state, kvm_pit_state2};

use super::IrqChip;
use crate::Error;
use crate::ioapic::{self, Ioapic};
use crate::lapic::Lapic;
use crate::pit::Pit;
use crate::sync::lock;

impl IrqChip {
    /// A port read. False: the port is not one of the PIC's or PIT's.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) -> bool {
        match (pic_decodes(port, data.len()), &self.controllers) {
            (true, Some(controllers)) => {
                data.fill(0);
                if let [byte] = data {
                    *byte = self.with_pic(controllers, |pic| pic.read(port));
                }
                true
            }
            _ => self.pit_pio(port, data.len(), |pit, now| {
                data.fill(0);
                data[0] = pit.read(port, now);
            }),
        }
    }

    /// A port write. False: the port is not one of the PIC's or PIT's.
    pub fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        match (pic_decodes(port, data.len()), &self.controllers) {
            (true, Some(controllers)) => {
                if let [byte] = *data {
                    let ack_dropped = self.bus.find(Lapic::accepts_pic_intr).is_some();
                    self.with_pic(controllers, |pic| pic.write(port, byte, ack_dropped));
                }
                true
            }
            _ => self.pit_pio(port, data.len(), |pit, now| pit.write(port, data[0], now)),
        }
    }

    /// A port access to the PIT, whose ports lie within 40H-43H and 61H-64H.
    fn pit_pio(&self, port: u16, len: usize, act: impl FnOnce(&mut Pit, u64)) -> bool {
        let room = match port {
            0x40..=0x43 => 0x44 - port,
            0x61 => 4,
            _ => return false,
        };
        if len == 0 || len > usize::from(room) {
            return false;
        }
        let now = self.events.now_ns();
        self.with_pit(|pit| {
            let decodes = pit.decodes(port);
            if decodes {
                act(pit, now);
            }
            decodes
        }) == Some(true)
    }

    /// A read of guest-physical space. False: not the I/O APIC's (local APICs have their own).
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let Some(value) = self.ioapic_mmio(gpa, |io, offset| io.read(offset)) else {
            return false;
        };
        data.fill(0);
        let bytes = value.to_le_bytes();
        data.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
        true
    }

    /// A write of guest-physical space; as [`Self::mmio_read`].
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        let mut bytes = [0; 4];
        bytes
            .iter_mut()
            .zip(data)
            .for_each(|(to, byte)| *to = *byte);
        let value = u32::from_le_bytes(bytes);
        let unmasked = self.ioapic_mmio(gpa, |io, offset| io.write(&self.bus, offset, value));
        if let Some(Some(pin)) = unmasked {
            let gsi = self.routing.load().ioapic_gsi(pin);
            self.gsi_unmasked(gsi);
        }
        unmasked.is_some()
    }

    fn ioapic_mmio<R>(&self, gpa: u64, act: impl FnOnce(&mut Ioapic, u64) -> R) -> Option<R> {
        let offset = gpa.checked_sub(ioapic::DEFAULT_BASE)?;
        let controllers = self.controllers.as_ref()?;
        if offset >= ioapic::MMIO_LENGTH {
            return None;
        }
        // KVM_SET_IRQCHIP can move it, but only away: the bus still asks it at its usual place.
        self.with_ioapic(controllers, |io| {
            let moved = io.base_address() != ioapic::DEFAULT_BASE;
            (!moved).then(|| act(io, offset))
        })
    }

    /// KVM_GET_IRQCHIP of PIC `index` (0 master, 1 slave).
    pub fn pic_state(&self, index: usize) -> Result<kvm_pic_state, Error> {
        let controllers = self.controllers.as_ref().ok_or(Error::NoDevice)?;
        let state = self.with_pic(controllers, |pic| pic.state(index));
        state.ok_or(Error::Invalid)
    }

    /// KVM_SET_IRQCHIP of a PIC.
    pub fn set_pic_state(&self, index: usize, state: &kvm_pic_state) -> Result<(), Error> {
        let controllers = self.controllers.as_ref().ok_or(Error::NoDevice)?;
        let set = self.with_pic(controllers, |pic| pic.set_state(index, state));
        set.ok_or(Error::Invalid)
    }

    /// KVM_GET_IRQCHIP of the I/O APIC.
    pub fn ioapic_state(&self) -> Result<kvm_ioapic_state, Error> {
        let controllers = self.controllers.as_ref().ok_or(Error::NoDevice)?;
        Ok(lock(&controllers.ioapic).state())
    }

    /// KVM_SET_IRQCHIP of the I/O APIC.
    pub fn set_ioapic_state(&self, state: &kvm_ioapic_state) -> Result<(), Error> {
        let controllers = self.controllers.as_ref().ok_or(Error::NoDevice)?;
        self.with_ioapic(controllers, |io| io.set_state(&self.bus, state));
        Ok(())
    }

    /// KVM_CREATE_PIT2 (`speaker_dummy`: KVM_PIT_SPEAKER_DUMMY, port 61H is answered too).
    pub fn create_pit(&self, speaker_dummy: bool) -> Result<(), Error> {
        if self.controllers.is_none() {
            return Err(Error::NoDevice);
        }
        let pit = Pit::new(speaker_dummy, self.events.now_ns());
        self.pit.set(Mutex::new(pit)).map_err(|_| Error::Exists)
    }

    /// KVM_GET_PIT2.
    pub fn pit_state(&self) -> Result<kvm_pit_state2, Error> {
        // A tick that is due is in the controllers' state, not in the air.
        self.timer_expired(self.events.now_ns());
        self.with_pit(|pit| pit.state()).ok_or(Error::NoDevice)
    }

    /// KVM_SET_PIT2.
    pub fn set_pit_state(&self, state: &kvm_pit_state2) -> Result<(), Error> {
        let now = self.events.now_ns();
        self.with_pit(|pit| pit.set_state(state, now))
            .ok_or(Error::NoDevice)
    }

    /// KVM_REINJECT_CONTROL.
    pub fn set_pit_reinject(&self, reinject: bool) -> Result<(), Error> {
        self.with_pit(|pit| pit.set_reinject(reinject))
            .ok_or(Error::NoDevice)
    }
}

/// Whether an access of this length at this port is the PIC pair's.
fn pic_decodes(port: u16, len: usize) -> bool {
    match port {
        0x20 | 0xa0 | 0x4d0 => len <= 2,
        0x21 | 0xa1 | 0x4d1 => len == 1,
        _ => false,
    }
}
