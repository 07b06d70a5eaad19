//! An I/O APIC (Intel 82093AA) outside KVM: its pins are MSI routes, which KVM_IRQFD raises. Edge-triggered
//! lines only, as those of the ISA bus are.

use anyhow::Result;
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::VmFd;

pub const BASE: u64 = 0xfec0_0000;
pub const SIZE: u64 = 0x20;
pub const PINS: usize = 24;

const SELECT: u64 = 0;
const WINDOW: u64 = 0x10;
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const REDIRECTION: u8 = 0x10;

const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;

pub struct IoApic {
    select: u8,
    id: u32,
    entries: [u64; PINS],
}

impl IoApic {
    pub fn new() -> Self {
        Self {
            select: 0,
            id: 0,
            entries: [MASKED; PINS],
        }
    }

    /// What is saved.
    pub fn state(&self) -> (u8, u32, Vec<u64>) {
        (self.select, self.id, self.entries.to_vec())
    }

    pub fn from_state((select, id, entries): &(u8, u32, Vec<u64>)) -> Self {
        let mut new = Self::new();
        (new.select, new.id) = (*select, *id);
        new.entries.copy_from_slice(entries);
        new
    }

    pub fn read(&self, offset: u64) -> u32 {
        match (offset, self.select) {
            (SELECT, select) => select.into(),
            (WINDOW, ID | ARBITRATION) => self.id,
            (WINDOW, VERSION) => 0x11 | (PINS as u32 - 1) << 16,
            (WINDOW, select) => match self.entry(select) {
                Some((pin, high)) => (self.entries[pin] >> (32 * u32::from(high))) as u32,
                None => 0,
            },
            _ => 0,
        }
    }

    /// Writes a register; `true` if the routes have changed.
    pub fn write(&mut self, offset: u64, value: u32) -> bool {
        match (offset, self.select) {
            (SELECT, _) => self.select = value as u8,
            (WINDOW, ID) => self.id = value & 0x0f00_0000,
            (WINDOW, select) => {
                let Some((pin, high)) = self.entry(select) else {
                    return false;
                };
                let old = self.entries[pin];
                let new = if high {
                    old & 0xffff_ffff | u64::from(value) << 32
                } else {
                    old & !0xffff_ffff | u64::from(value) & !READ_ONLY
                };
                self.entries[pin] = new;
                return new != old;
            }
            _ => {}
        }
        false
    }

    fn entry(&self, select: u8) -> Option<(usize, bool)> {
        let number = usize::from(select.checked_sub(REDIRECTION)?);
        (number < 2 * PINS).then_some((number / 2, number % 2 == 1))
    }

    /// Tells KVM the routes of all pins that are not masked.
    pub fn route(&self, vm: &VmFd) -> Result<()> {
        let entries: Vec<_> = self
            .entries
            .iter()
            .enumerate()
            .filter(|&(_, entry)| entry & MASKED == 0)
            .map(|(pin, &entry)| route(pin as u32, entry))
            .collect();
        Ok(vm.set_gsi_routing(&KvmIrqRouting::from_entries(&entries)?)?)
    }
}

/// A redirection entry as the message that it makes (82093AA, 3.2.4; SDM Vol. 3, Message Signalled Interrupts).
fn route(gsi: u32, entry: u64) -> kvm_irq_routing_entry {
    let (destination, logical) = (entry >> 56, entry >> 11 & 1);
    let (delivery, vector) = (entry >> 8 & 7, entry & 0xff);
    let mut new = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    // Lowest priority: the redirection hint.
    let hint = u64::from(delivery == 1);
    new.u.msi.address_lo = (0xfee0_0000 | destination << 12 | hint << 3 | logical << 2) as u32;
    new.u.msi.data = (delivery << 8 | vector) as u32;
    new
}
