//! The I/O APIC: an 82093AA (version 11H, 24 inputs) as KVM models it, with the EOI broadcast of the
//! local APICs as its only way to be told of an EOI. Specified by the Intel 82093AA data sheet.

#[cfg(test)]
mod tests;

use anykvm_abi::{
    KVM_IOAPIC_NUM_PINS, ioapic_redirtbl, kvm_ioapic_state, kvm_ioapic_state__bindgen_ty_1,
};

use crate::apic_bus::ApicBus;
use crate::interrupt::{DeliveryMode, Interrupt, Shorthand};
use crate::lapic::Lapic;

/// Where its registers are; nothing on a PC moves it.
pub(crate) const DEFAULT_BASE: u64 = 0xfec0_0000;
/// Bytes of address space it decodes.
pub(crate) const MMIO_LENGTH: u64 = 0x100;
/// Inputs.
pub(crate) const PINS: usize = KVM_IOAPIC_NUM_PINS as usize;

const VERSION: u32 = 0x11;
/// IOREGSEL and IOWIN, by offset.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
/// Indirect registers.
const REG_ID: u32 = 0;
const REG_VERSION: u32 = 1;
const REG_ARBITRATION_ID: u32 = 2;
const REG_REDIRECTION: u32 = 0x10;

/// The real-time clock's input. Its interrupt is an edge, yet user space is told "coalesced" until it
/// has been EOIed, because some guests count its ticks.
const RTC_PIN: usize = 8;

/// After so many back-to-back deliveries of a level that stays up the next one is put off, so that a
/// guest whose handler does not quiet the device still gets on.
const SUCCESSIVE_EOI_LIMIT: u32 = 10_000;
const EOI_INJECT_DELAY_NS: u64 = 10_000_000;

/// An entry of the redirection table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Redirection(pub u64);

impl Redirection {
    const DELIVERY_STATUS: u64 = 1 << 12;
    const REMOTE_IRR: u64 = 1 << 14;
    const LEVEL: u64 = 1 << 15;
    const MASKED: u64 = 1 << 16;

    pub fn vector(self) -> u8 {
        self.0 as u8
    }
    pub fn remote_irr(self) -> bool {
        self.0 & Self::REMOTE_IRR != 0
    }
    pub fn level_triggered(self) -> bool {
        self.0 & Self::LEVEL != 0
    }
    pub fn masked(self) -> bool {
        self.0 & Self::MASKED != 0
    }
    pub fn dest(self) -> u32 {
        (self.0 >> 56) as u32
    }
    pub fn logical(self) -> bool {
        self.0 & 1 << 11 != 0
    }
    fn set_remote_irr(&mut self, value: bool) {
        self.0 = self.0 & !Self::REMOTE_IRR | if value { Self::REMOTE_IRR } else { 0 };
    }
    fn message(self) -> Interrupt {
        Interrupt {
            vector: self.vector(),
            mode: DeliveryMode::from_bits((self.0 >> 8) as u32),
            shorthand: Shorthand::None,
            dest: self.dest(),
            logical: self.logical(),
            level_triggered: self.level_triggered(),
            assert: true,
            redirection_hint: false,
        }
    }
}

/// The local APICs (and vectors) that have yet to EOI the last RTC interrupt.
#[derive(Default)]
struct RtcStatus {
    pending: Vec<(u32, u8)>,
}

/// One I/O APIC.
pub(crate) struct Ioapic {
    base_address: u64,
    ioregsel: u32,
    id: u32,
    /// Inputs that are up (or, for edges, were when last seen).
    irr: u32,
    /// Edges in `irr` that have been delivered: up, but nothing to deliver again.
    irr_delivered: u32,
    redirtbl: [Redirection; PINS],
    line_sources: [u64; PINS],
    successive_eois: [u32; PINS],
    rtc: RtcStatus,
    /// When a delivery that was put off is due.
    inject_at: Option<u64>,
}

impl Ioapic {
    pub fn new() -> Self {
        Self {
            base_address: DEFAULT_BASE,
            ioregsel: 0,
            id: 0,
            irr: 0,
            irr_delivered: 0,
            redirtbl: [Redirection(Redirection::MASKED); PINS],
            line_sources: [0; PINS],
            successive_eois: [0; PINS],
            rtc: RtcStatus::default(),
            inject_at: None,
        }
    }

    pub fn base_address(&self) -> u64 {
        self.base_address
    }

    /// When [`Self::timer_expired`] has something to do.
    pub fn deadline(&self) -> Option<u64> {
        self.inject_at
    }

    /// The vectors whose EOI concerns this I/O APIC, as a bitmap.
    pub fn handled_vectors(&self) -> [u64; 4] {
        let mut set = [0u64; 4];
        let entries = self.redirtbl.iter().map(|e| e.vector());
        for vector in entries.chain(self.rtc.pending.iter().map(|p| p.1)) {
            set[usize::from(vector >> 6)] |= 1 << (vector & 63);
        }
        set
    }

    /// Drives an input from one source. Delivered count, 0 coalesced, negative masked or nobody.
    pub fn set_irq(
        &mut self,
        bus: &ApicBus,
        pin: usize,
        source: u32,
        level: bool,
        line_status: bool,
    ) -> i32 {
        let Some(sources) = self.line_sources.get_mut(pin) else {
            return -1;
        };
        let bit = 1u64 << (source & 63);
        if level {
            *sources |= bit;
        } else {
            *sources &= !bit;
        }
        let level = *sources != 0;
        self.set_input(bus, pin, level, line_status)
    }

    fn set_input(&mut self, bus: &ApicBus, pin: usize, level: bool, line_status: bool) -> i32 {
        let mask = 1u32 << pin;
        if !level {
            self.irr &= !mask;
            return 1;
        }
        if pin == RTC_PIN && line_status && !self.rtc.pending.is_empty() {
            return 0;
        }
        let was_up = self.irr & mask != 0;
        self.irr |= mask;
        if !self.redirtbl[pin].level_triggered() {
            self.irr_delivered &= !mask;
            if was_up {
                return 0;
            }
        }
        self.service(bus, pin, line_status)
    }

    fn service(&mut self, bus: &ApicBus, pin: usize, line_status: bool) -> i32 {
        let entry = self.redirtbl[pin];
        if entry.masked() || entry.level_triggered() && entry.remote_irr() {
            return -1;
        }
        if !entry.level_triggered() {
            self.irr_delivered |= 1 << pin;
        }
        let result = if pin == RTC_PIN && line_status {
            let mut accepted = Vec::new();
            let result = bus.deliver(None, &entry.message(), Some(&mut accepted));
            self.rtc.pending = accepted
                .into_iter()
                .map(|id| (id, entry.vector()))
                .collect();
            result
        } else {
            bus.deliver(None, &entry.message(), None)
        };
        if result != 0 && entry.level_triggered() {
            self.redirtbl[pin].set_remote_irr(true);
        }
        result
    }

    /// A read of IOREGSEL or IOWIN (offset within the page); other offsets read as zero.
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            IOREGSEL => self.ioregsel,
            IOWIN => self.read_indirect(),
            _ => 0,
        }
    }

    fn read_indirect(&self) -> u32 {
        match self.ioregsel {
            REG_VERSION => (PINS as u32 - 1) << 16 | VERSION,
            REG_ID | REG_ARBITRATION_ID => (self.id & 0xf) << 24,
            select => {
                let index = select.wrapping_sub(REG_REDIRECTION) >> 1;
                let entry = self.redirtbl.get(index as usize).map_or(u64::MAX, |e| e.0);
                if select & 1 != 0 {
                    (entry >> 32) as u32
                } else {
                    entry as u32
                }
            }
        }
    }

    /// A write of IOREGSEL or IOWIN. Returns the pin whose mask bit it cleared, if it did.
    pub fn write(&mut self, bus: &ApicBus, offset: u64, value: u32) -> Option<usize> {
        match offset {
            IOREGSEL => {
                self.ioregsel = value & 0xff;
                None
            }
            IOWIN => self.write_indirect(bus, value),
            _ => None,
        }
    }

    fn write_indirect(&mut self, bus: &ApicBus, value: u32) -> Option<usize> {
        match self.ioregsel {
            REG_VERSION | REG_ARBITRATION_ID => None,
            REG_ID => {
                self.id = value >> 24 & 0xf;
                None
            }
            select => {
                let pin = select.wrapping_sub(REG_REDIRECTION) as usize >> 1;
                let entry = self.redirtbl.get_mut(pin)?;
                let old = *entry;
                let read_only = Redirection::REMOTE_IRR | Redirection::DELIVERY_STATUS;
                let written = if select & 1 != 0 {
                    old.0 & 0xffff_ffff | u64::from(value) << 32
                } else {
                    old.0 & !0xffff_ffff | u64::from(value)
                };
                entry.0 = written & !read_only | old.0 & read_only;
                // The 82093AA clears Remote IRR when an entry becomes edge-triggered; systems without
                // an EOI register use that as an explicit EOI.
                if !entry.level_triggered() {
                    entry.set_remote_irr(false);
                }
                let unmasked = old.masked() && !entry.masked();
                if entry.level_triggered() && self.irr & 1 << pin != 0 {
                    self.service(bus, pin, false);
                }
                unmasked.then_some(pin)
            }
        }
    }

    /// The pins whose acknowledgement an EOI for `vector` at `lapic` is. `level`: the vector's bit in
    /// the trigger-mode register, in which case the EOI is broadcast; the EOI of an edge concerns only
    /// entries that could have sent it.
    pub fn pins_acked_by(&mut self, bus: &ApicBus, lapic: &Lapic, vector: u8, level: bool) -> u32 {
        let this = (lapic.apic_id(), vector);
        self.rtc.pending.retain(|pending| *pending != this);
        let mut pins = 0;
        for (pin, entry) in self.redirtbl.iter().enumerate() {
            if entry.vector() == vector && (level || bus.matches(lapic, None, &entry.message())) {
                pins |= 1 << pin;
            }
        }
        pins
    }

    /// The EOI proper, once the ack notifiers have run: Remote IRR falls, and what is still (or again)
    /// up is delivered again.
    pub fn eoi(&mut self, bus: &ApicBus, pin: usize, now: u64) {
        let entry = &mut self.redirtbl[pin];
        entry.set_remote_irr(false);
        if entry.masked() || self.irr & 1 << pin == 0 || !entry.level_triggered() {
            self.successive_eois[pin] = 0;
            return;
        }
        self.successive_eois[pin] += 1;
        if self.successive_eois[pin] == SUCCESSIVE_EOI_LIMIT {
            self.successive_eois[pin] = 0;
            self.inject_at
                .get_or_insert(now.saturating_add(EOI_INJECT_DELAY_NS));
        } else {
            self.service(bus, pin, false);
        }
    }

    /// Delivers what was put off, if it is due.
    pub fn timer_expired(&mut self, bus: &ApicBus, now: u64) {
        if self.inject_at.is_none_or(|at| at > now) {
            return;
        }
        self.inject_at = None;
        for pin in 0..PINS {
            let entry = self.redirtbl[pin];
            if entry.level_triggered() && self.irr & 1 << pin != 0 && !entry.remote_irr() {
                self.service(bus, pin, false);
            }
        }
    }

    /// KVM_GET_IRQCHIP. Inputs that are up and whose edge has been delivered are left out, as KVM does: after
    /// KVM_SET_IRQCHIP one that is said to be up once more is a new edge. They cannot be in the padding:
    /// QEMU does not write it, and hands back whatever its stack holds.
    pub fn state(&self) -> kvm_ioapic_state {
        kvm_ioapic_state {
            base_address: self.base_address,
            ioregsel: self.ioregsel,
            id: self.id,
            irr: self.irr & !self.irr_delivered,
            pad: 0,
            redirtbl: self
                .redirtbl
                .map(|entry| kvm_ioapic_state__bindgen_ty_1 { bits: entry.0 }),
        }
    }

    /// KVM_SET_IRQCHIP: everything in the state's IRR is delivered anew.
    pub fn set_state(&mut self, bus: &ApicBus, state: &kvm_ioapic_state) {
        self.base_address = state.base_address;
        self.ioregsel = state.ioregsel & 0xff;
        self.id = state.id;
        self.redirtbl = ioapic_redirtbl(state).map(Redirection);
        self.irr = 0;
        self.irr_delivered = 0;
        self.rtc.pending.clear();
        for pin in (0..PINS).filter(|pin| state.irr & 1 << pin != 0) {
            self.set_input(bus, pin, true, true);
        }
        self.rtc.pending.clear();
        bus.for_each(|lapic| self.restore_rtc(bus, lapic));
    }

    /// Finds out from a restored local APIC whether it has yet to EOI the RTC.
    pub fn restore_rtc(&mut self, bus: &ApicBus, lapic: &Lapic) {
        let entry = self.redirtbl[RTC_PIN];
        if !bus.matches(lapic, None, &entry.message()) {
            return;
        }
        let id = lapic.apic_id();
        self.rtc.pending.retain(|pending| pending.0 != id);
        if lapic.pending_eoi(entry.vector()) {
            self.rtc.pending.push((id, entry.vector()));
        }
    }
}
