//! How the guest reaches the registers: the xAPIC page and the x2APIC MSRs. SDM volume 3, "Accessing
//! xAPIC Registers" and "x2APIC Register Address Space".

use super::Lapic;
use super::registers::{
    ICR_BUSY, LVT, LVT_MASKED, LvtEntry, SVR_ENABLE, SVR_MASK, SVR_SUPPRESS_EOI_BROADCAST,
    VERSION_DIRECTED_EOI, X2APIC_ICR_RESERVED, offset,
};
use crate::Error;
use crate::interrupt::Interrupt;

use anykvm_abi::KVM_X86_QUIRK_LAPIC_MMIO_HOLE;

/// The first x2APIC MSR.
const X2APIC_MSR: u32 = 0x800;

impl Lapic {
    /// Reads the register page at `offset` (0..4096). False: the page is not the APIC's now
    /// (disabled or x2APIC mode, with KVM_X86_QUIRK_LAPIC_MMIO_HOLE disabled): the access is MMIO.
    pub fn mmio_read(&self, offset: u32, data: &mut [u8]) -> bool {
        if !self.present() || self.x2apic_mode() {
            data.fill(0xff);
            return self.shared.quirk(KVM_X86_QUIRK_LAPIC_MMIO_HOLE);
        }
        data.fill(0);
        let first = (offset & 0xf) as usize;
        let bytes = self.read_register(offset).map(u32::to_le_bytes);
        if let Some(bytes) = bytes
            .ok()
            .as_ref()
            .and_then(|b| b.get(first..first + data.len()))
        {
            data.copy_from_slice(bytes);
        }
        true
    }

    /// Writes the register page; as [`Self::mmio_read`]. Only aligned 32-bit writes do anything.
    pub fn mmio_write(&self, offset: u32, data: &[u8]) -> bool {
        if !self.present() || self.x2apic_mode() {
            return self.shared.quirk(KVM_X86_QUIRK_LAPIC_MMIO_HOLE);
        }
        if let (Ok(bytes), 0) = (<[u8; 4]>::try_from(data), offset & 0xf) {
            // What #GP is in x2APIC mode is ignored here.
            let _ = self.write_register(offset, u32::from_le_bytes(bytes));
        }
        true
    }

    /// RDMSR of 800H..8FFH.
    pub fn msr_read(&self, msr: u32) -> Result<u64, Error> {
        let offset = self.msr_offset(msr)?;
        if offset == offset::ICR {
            let high = self.regs.get(offset::ICR_HIGH);
            return Ok(u64::from(high) << 32 | u64::from(self.regs.get(offset::ICR)));
        }
        self.read_register(offset).map(u64::from)
    }

    /// WRMSR of 800H..8FFH.
    pub fn msr_write(&self, msr: u32, value: u64) -> Result<(), Error> {
        let offset = self.msr_offset(msr)?;
        if offset == offset::ICR {
            return self.write_x2apic_icr(value);
        }
        let value = u32::try_from(value).map_err(|_| Error::GeneralProtection)?;
        self.write_register(offset, value)
    }

    fn msr_offset(&self, msr: u32) -> Result<u32, Error> {
        let index = msr.wrapping_sub(X2APIC_MSR);
        if self.x2apic_mode() && index < 0x100 {
            Ok(index << 4)
        } else {
            Err(Error::GeneralProtection)
        }
    }

    /// Whether there is a readable register at this offset in the current mode.
    fn readable(&self, offset: u32) -> bool {
        match offset {
            offset::APR | offset::DFR | offset::ICR_HIGH => !self.x2apic_mode(),
            offset::LVT_CMCI => self.has_lvt(LvtEntry::Cmci),
            // ISR, TMR and IRR follow each other.
            offset::ISR..=0x270 => true,
            offset::LVT_TIMER..=offset::TIMER_CURRENT_COUNT => true,
            offset::ID
            | offset::VERSION
            | offset::TPR
            | offset::PPR
            | offset::LDR
            | offset::SVR
            | offset::ESR
            | offset::ICR
            | offset::TIMER_DIVIDE => true,
            _ => false,
        }
    }

    fn read_register(&self, offset: u32) -> Result<u32, Error> {
        let register = offset & !0xf;
        if !self.readable(register) {
            return Err(Error::GeneralProtection);
        }
        Ok(match register {
            offset::APR => 0,
            offset::TIMER_CURRENT_COUNT => self.timer_current_count(),
            offset::PPR => {
                self.update_ppr();
                self.regs.get(register)
            }
            _ => self.regs.get(register),
        })
    }

    fn write_register(&self, offset: u32, value: u32) -> Result<(), Error> {
        let x2apic = self.x2apic_mode();
        match offset {
            offset::ID | offset::LDR | offset::DFR | offset::ICR_HIGH if x2apic => {
                return Err(Error::GeneralProtection);
            }
            offset::ID => self.set_map_register(offset, value & 0xff00_0000),
            offset::LDR => self.set_map_register(offset, value & 0xff00_0000),
            offset::DFR => self.set_map_register(offset, value | 0x0fff_ffff),
            offset::ICR_HIGH => self.regs.set(offset, value & 0xff00_0000),
            offset::TPR => self.set_tpr(value as u8),
            offset::EOI => {
                self.eoi();
            }
            offset::SVR => self.write_svr(value),
            offset::ICR => {
                let value = value & !ICR_BUSY;
                let dest = self.regs.get(offset::ICR_HIGH) >> 24;
                self.regs.set(offset::ICR, value);
                self.send_ipi(&Interrupt::from_icr(value, dest));
            }
            offset::TIMER_INITIAL_COUNT => self.set_timer_initial_count(value),
            offset::TIMER_DIVIDE => self.set_timer_divide(value),
            offset::ESR if x2apic && value != 0 => return Err(Error::GeneralProtection),
            // Writing latches the errors seen since; none are ever recorded.
            offset::ESR => {}
            offset::SELF_IPI if x2apic && value <= 0xff => {
                const TO_SELF: u32 = 1 << 18;
                self.send_ipi(&Interrupt::from_icr(TO_SELF | value, 0));
            }
            _ => return self.write_lvt(offset, value),
        }
        Ok(())
    }

    fn write_lvt(&self, offset: u32, value: u32) -> Result<(), Error> {
        let index = LVT.iter().position(|(register, _)| *register == offset);
        let index = index.filter(|index| *index < self.lvt_entries());
        let index = index.ok_or(Error::GeneralProtection)?;
        let mut mask = LVT[index].1;
        if offset == offset::LVT_TIMER {
            mask |= self.timer_mode_mask();
        }
        let mut value = value & mask;
        if !self.software_enabled() {
            value |= LVT_MASKED;
        }
        self.regs.set(offset, value);
        match offset {
            offset::LVT_TIMER => self.timer_lvt_changed(),
            // The PIC may have been waiting for this.
            offset::LVT_LINT0 if self.accepts_pic_intr() => self.events.notify(),
            _ => {}
        }
        Ok(())
    }

    fn write_svr(&self, value: u32) {
        let mut mask = SVR_MASK;
        if self.regs.get(offset::VERSION) & VERSION_DIRECTED_EOI != 0 {
            mask |= SVR_SUPPRESS_EOI_BROADCAST;
        }
        self.set_svr(value & mask);
        if value & SVR_ENABLE == 0 {
            for (register, _) in &LVT[..self.lvt_entries()] {
                self.regs.set_bits(*register, LVT_MASKED);
            }
        }
    }

    fn write_x2apic_icr(&self, value: u64) -> Result<(), Error> {
        if value & X2APIC_ICR_RESERVED != 0 {
            return Err(Error::GeneralProtection);
        }
        let low = value as u32 & !ICR_BUSY;
        let dest = (value >> 32) as u32;
        self.regs.set(offset::ICR, low);
        self.regs.set(offset::ICR_HIGH, dest);
        self.send_ipi(&Interrupt::from_icr(low, dest));
        Ok(())
    }
}
