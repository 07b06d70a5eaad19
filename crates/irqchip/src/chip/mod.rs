//! The VM's interrupt controllers together, and what crosses from one to another: GSIs, MSIs, IPIs,
//! EOIs and acknowledgements.
//!
//! Locks: the PIC pair, the I/O APIC and the PIT each have one, held for one access and never two at
//! a time. Acknowledgements are collected while a controller is locked and handed on once it is not,
//! because what is told of them may drive a line again.

mod access;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use anykvm_abi::{
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_irq_routing_entry,
};
use arc_swap::ArcSwap;

use crate::apic_bus::ApicBus;
use crate::events::{VcpuEvents, VmEvents};
use crate::interrupt::{DeliveryMode, Interrupt, Shorthand};
use crate::ioapic::{self, Ioapic};
use crate::lapic::{Lapic, LapicConfig, LvtEntry};
use crate::pic::{PicEffects, PicPair};
use crate::pit::Pit;
use crate::routing::{Route, RoutingTable, msi_address_valid};
use crate::sync::lock;
use crate::{Error, PIT_IRQ_SOURCE_ID};

/// The PIT's GSI.
const PIT_GSI: u32 = 0;
/// In the deadline's atomic: none.
const NEVER: u64 = u64::MAX;

/// Which controllers are in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChipMode {
    /// KVM_CREATE_IRQCHIP: everything.
    Full,
    /// KVM_CAP_SPLIT_IRQCHIP: the local APICs; this many GSIs are reserved for user space's I/O APIC.
    Split {
        /// I/O APIC pins in user space (args[0] of the capability).
        ioapic_pins: u32,
    },
}

/// A set of vectors.
#[derive(Default)]
pub(crate) struct VectorSet([AtomicU64; 4]);

impl VectorSet {
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)].load(Ordering::Relaxed) & 1 << (vector & 63) != 0
    }

    fn replace(&self, set: [u64; 4]) {
        for (word, value) in self.0.iter().zip(set) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

/// What every local APIC needs to see of the VM without asking for the chip.
pub(crate) struct Shared {
    /// The vectors whose EOI an I/O APIC (here or in user space) wants to hear of.
    pub io_vectors: VectorSet,
    /// The I/O APIC is in user space.
    pub split: bool,
    /// KVM_X86_QUIRK_*, those disabled.
    disabled_quirks: AtomicU64,
}

impl Shared {
    pub fn quirk(&self, quirk: u32) -> bool {
        self.disabled_quirks.load(Ordering::Relaxed) & u64::from(quirk) == 0
    }
}

/// What the chip has done, for statistics.
#[derive(Debug, Default)]
pub struct ChipCounters {
    /// Changes of a GSI's level.
    pub irqs: AtomicU64,
    /// Message-signalled interrupts, routed or direct.
    pub msis: AtomicU64,
    /// Ticks of the PIT that were injected.
    pub pit_ticks: AtomicU64,
}

/// PIC pair and I/O APIC, which a split irqchip does not have.
struct Controllers {
    pic: Mutex<PicPair>,
    /// The PIC's INTR output, for those who only look.
    pic_output: AtomicBool,
    ioapic: Mutex<Ioapic>,
}

/// The VM's interrupt controllers.
pub struct IrqChip {
    mode: ChipMode,
    events: Arc<dyn VmEvents>,
    pub(crate) bus: ApicBus,
    controllers: Option<Controllers>,
    pit: OnceLock<Mutex<Pit>>,
    routing: ArcSwap<RoutingTable>,
    /// GSIs whose acknowledgement is reported, with how often that was asked for.
    ack_notifiers: ArcSwap<HashMap<u32, usize>>,
    deadline: AtomicU64,
    shared: Arc<Shared>,
    counters: ChipCounters,
}

impl IrqChip {
    /// Creates the controllers with KVM's default routing (full) or an empty table (split).
    pub fn new(mode: ChipMode, events: Arc<dyn VmEvents>) -> Arc<Self> {
        let full = mode == ChipMode::Full;
        let chip = Self {
            mode,
            events,
            bus: ApicBus::new(),
            controllers: full.then(|| Controllers {
                pic: Mutex::new(PicPair::new()),
                pic_output: AtomicBool::new(false),
                ioapic: Mutex::new(Ioapic::new()),
            }),
            pit: OnceLock::new(),
            routing: ArcSwap::from_pointee(if full {
                RoutingTable::default_routes()
            } else {
                RoutingTable::default()
            }),
            ack_notifiers: ArcSwap::default(),
            deadline: AtomicU64::new(NEVER),
            shared: Arc::new(Shared {
                io_vectors: VectorSet::default(),
                split: !full,
                disabled_quirks: AtomicU64::new(0),
            }),
            counters: ChipCounters::default(),
        };
        Arc::new(chip)
    }

    /// Which controllers there are.
    pub fn mode(&self) -> ChipMode {
        self.mode
    }

    /// What it has done so far.
    pub fn counters(&self) -> &ChipCounters {
        &self.counters
    }

    /// KVM_CAP_X2APIC_API: KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK.
    pub fn set_x2apic_api(&self, flags: u64) -> Result<(), Error> {
        let ids_32bit = u64::from(KVM_X2APIC_API_USE_32BIT_IDS);
        let no_quirk = u64::from(KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
        if flags & !(ids_32bit | no_quirk) != 0 {
            return Err(Error::Invalid);
        }
        if flags & ids_32bit != 0 {
            self.bus.use_32bit_ids();
        }
        if flags & no_quirk != 0 {
            self.bus.disable_broadcast_quirk();
        }
        Ok(())
    }

    /// KVM_CAP_DISABLE_QUIRKS, the bits that concern APICs.
    pub fn disable_quirks(&self, quirks: u64) {
        self.shared
            .disabled_quirks
            .fetch_or(quirks, Ordering::Relaxed);
    }

    /// A vCPU's local APIC, reset, and from now on a destination.
    pub fn create_lapic(
        self: &Arc<Self>,
        config: LapicConfig,
        events: Arc<dyn VcpuEvents>,
    ) -> Arc<Lapic> {
        let chip = Arc::downgrade(self);
        let lapic = Arc::new(Lapic::new(config, events, chip, self.shared.clone()));
        self.bus.add(lapic.clone());
        lapic
    }

    /// The local APIC of a vCPU.
    pub fn lapic(&self, apic_id: u32) -> Option<Arc<Lapic>> {
        self.bus.find(|lapic| lapic.apic_id() == apic_id)
    }

    /// The VM is going away: lets go of the local APICs and with them of their [`VcpuEvents`], should
    /// those refer to what owns this chip.
    pub fn disconnect(&self) {
        self.bus.clear();
    }

    /// Whether a vCPU has an interrupt to take now: ExtINT from the PIC (or queued by
    /// KVM_INTERRUPT with a split chip), or its local APIC's.
    pub fn has_interrupt(&self, lapic: &Lapic) -> bool {
        self.has_external_interrupt(lapic) || lapic.has_interrupt().is_some()
    }

    fn has_external_interrupt(&self, lapic: &Lapic) -> bool {
        lapic.accepts_pic_intr()
            && match &self.controllers {
                Some(controllers) => controllers.pic_output.load(Ordering::SeqCst),
                None => lapic.external_interrupt().is_some(),
            }
    }

    /// The vCPU takes the interrupt (kvm_cpu_get_interrupt): the vector, in service from here on.
    pub fn ack_interrupt(&self, lapic: &Lapic) -> Option<u8> {
        if self.has_external_interrupt(lapic) {
            return match &self.controllers {
                Some(controllers) => Some(self.with_pic(controllers, PicPair::acknowledge)),
                None => lapic.take_external_interrupt(),
            };
        }
        let vector = lapic.has_interrupt()?;
        lapic.ack(vector);
        Some(vector)
    }

    /// KVM_IRQ_LINE(_STATUS), irqfds: the level of a GSI as one source drives it (levels of all
    /// sources are ORed). Returns the number of vCPUs that got it, 0 if it was coalesced, negative if
    /// it was ignored (masked, no route). `line_status` is true for KVM_IRQ_LINE_STATUS.
    pub fn set_irq(&self, gsi: u32, source: u32, level: bool, line_status: bool) -> i32 {
        self.set_levels(gsi, source, &[level], line_status)
    }

    /// Raises a GSI's level and lowers it again. Each controller gets both at once: were there a moment between
    /// them, the guest could take and acknowledge the interrupt in it, and the next edge, which another
    /// thread makes for that, would be lost in a level that is high still.
    pub fn pulse(&self, gsi: u32, source: u32) {
        self.set_levels(gsi, source, &[true, false], false);
    }

    /// One level after the other; the result is that of the last.
    fn set_levels(&self, gsi: u32, source: u32, levels: &[bool], line_status: bool) -> i32 {
        let changes = levels.len() as u64;
        self.counters.irqs.fetch_add(changes, Ordering::Relaxed);
        let routing = self.routing.load();
        let mut total = -1;
        for route in routing.routes(gsi) {
            let result = match (*route, &self.controllers) {
                (Route::Msi { address, data }, _) if levels.contains(&true) => {
                    self.deliver_msi(address, data)
                }
                (Route::Pic(pin), Some(controllers)) => self.with_pic(controllers, |pic| {
                    let set = |_, level: &bool| pic.set_irq(pin, source, *level);
                    levels.iter().fold(-1, set)
                }),
                (Route::Ioapic(pin), Some(controllers)) => self.with_ioapic(controllers, |io| {
                    let set =
                        |_, level: &bool| io.set_irq(&self.bus, pin, source, *level, line_status);
                    levels.iter().fold(-1, set)
                }),
                _ => -1,
            };
            if result >= 0 {
                total = total.max(0) + result;
            }
        }
        total
    }

    /// KVM_SIGNAL_MSI: the number of vCPUs that got it, 0 if blocked, negative if none matched.
    pub fn send_msi(&self, address: u64, data: u32) -> Result<i32, Error> {
        if !msi_address_valid((address >> 32) as u32, self.bus.ids_32bit()) {
            return Err(Error::Invalid);
        }
        Ok(self.deliver_msi(address, data))
    }

    fn deliver_msi(&self, address: u64, data: u32) -> i32 {
        self.counters.msis.fetch_add(1, Ordering::Relaxed);
        let irq = Interrupt::from_msi(address, data, self.bus.ids_32bit());
        self.bus.deliver(None, &irq, None)
    }

    /// KVM_HC_SEND_IPI: vCPUs that got it. `wide`: the bitmaps are 64 bits each (the hypercall was
    /// made in long mode). Err(Invalid): bits of the ICR that the hypercall does not take;
    /// Err(NoDevice): APIC ids are not unique, so a bitmap of them says nothing.
    pub fn pv_send_ipi(
        &self,
        bitmap: [u64; 2],
        min: u32,
        icr: u64,
        wide: bool,
    ) -> Result<i32, Error> {
        const DEST_MODE_AND_SHORTHAND: u64 = 1 << 11 | 3 << 18;
        if icr & DEST_MODE_AND_SHORTHAND != 0 {
            return Err(Error::Invalid);
        }
        let irq = Interrupt::from_icr(icr as u32, 0);
        let bits = if wide { 64 } else { 32 };
        let mut total = 0;
        for (first, bitmap) in [(min, bitmap[0]), (min.wrapping_add(bits), bitmap[1])] {
            let bitmap = bitmap & u64::MAX >> (64 - bits);
            let taken = self.bus.deliver_to_bitmap(first, bitmap, &irq);
            total += taken.ok_or(Error::NoDevice)?;
        }
        Ok(total)
    }

    /// KVM_HC_KICK_CPU: un-halts the vCPU with this APIC id.
    pub fn pv_kick(&self, apic_id: u32) {
        let irq = Interrupt {
            vector: 0,
            mode: DeliveryMode::RemoteRead,
            shorthand: Shorthand::None,
            dest: apic_id,
            logical: false,
            level_triggered: false,
            assert: true,
            redirection_hint: false,
        };
        self.bus.deliver(None, &irq, None);
    }

    /// KVM_SET_GSI_ROUTING: replaces the table; all or nothing.
    pub fn set_routing(&self, entries: &[kvm_irq_routing_entry]) -> Result<(), Error> {
        let chips = self.controllers.is_some();
        let table = RoutingTable::from_entries(entries, chips, self.bus.ids_32bit())?;
        if let ChipMode::Split { ioapic_pins } = self.mode {
            let mut vectors = [0u64; 4];
            for (address, data) in table.msis_below(ioapic_pins) {
                let irq = Interrupt::from_msi(address, data, self.bus.ids_32bit());
                if irq.level_triggered {
                    vectors[usize::from(irq.vector >> 6)] |= 1 << (irq.vector & 63);
                }
            }
            self.shared.io_vectors.replace(vectors);
        }
        self.routing.store(Arc::new(table));
        Ok(())
    }

    /// From now on acknowledgements of this GSI are reported (counted: one more call, one more
    /// [`Self::remove_ack_notifier`]).
    pub fn add_ack_notifier(&self, gsi: u32) {
        self.ack_notifiers.rcu(|notifiers| {
            let mut notifiers = HashMap::clone(notifiers);
            *notifiers.entry(gsi).or_default() += 1;
            notifiers
        });
    }

    /// Undoes one [`Self::add_ack_notifier`].
    pub fn remove_ack_notifier(&self, gsi: u32) {
        self.ack_notifiers.rcu(|notifiers| {
            let mut notifiers = HashMap::clone(notifiers);
            if let Some(count) = notifiers.get_mut(&gsi) {
                *count -= 1;
            }
            notifiers.retain(|_, count| *count != 0);
            notifiers
        });
    }

    /// A GSI was acknowledged. Nothing may be locked.
    fn gsi_acked(&self, gsi: u32) {
        if gsi == PIT_GSI && self.with_pit(Pit::irq_acked) == Some(true) {
            self.inject_pit_tick();
        }
        if self.ack_notifiers.load().contains_key(&gsi) {
            self.events.gsi_acked(gsi);
        }
    }

    /// A GSI's input was unmasked.
    fn gsi_unmasked(&self, gsi: Option<u32>) {
        if gsi == Some(PIT_GSI) {
            self.with_pit(Pit::reset_reinject);
        }
    }

    /// Does something to the PIC pair and hands on what came of it.
    fn with_pic<R>(&self, controllers: &Controllers, act: impl FnOnce(&mut PicPair) -> R) -> R {
        let (result, effects) = {
            let mut pic = lock(&controllers.pic);
            let result = act(&mut pic);
            controllers.pic_output.store(pic.output(), Ordering::SeqCst);
            (result, pic.take_effects())
        };
        if effects != PicEffects::default() {
            self.handle_pic_effects(effects);
        }
        result
    }

    fn handle_pic_effects(&self, effects: PicEffects) {
        if effects.raised
            && let Some(lapic) = self.bus.find(Lapic::accepts_pic_intr)
        {
            lapic.events().notify();
        }
        let routing = self.routing.load_full();
        for pin in 0..16 {
            if effects.unmasked & 1 << pin != 0 {
                self.gsi_unmasked(routing.pic_gsi(pin));
            }
            if effects.acked & 1 << pin != 0
                && let Some(gsi) = routing.pic_gsi(pin)
            {
                self.gsi_acked(gsi);
            }
        }
    }

    /// Does something to the I/O APIC, and keeps what others know of it current.
    fn with_ioapic<R>(&self, controllers: &Controllers, act: impl FnOnce(&mut Ioapic) -> R) -> R {
        let (result, deadline_changed) = {
            let mut ioapic = lock(&controllers.ioapic);
            let deadline = ioapic.deadline();
            let result = act(&mut ioapic);
            self.shared.io_vectors.replace(ioapic.handled_vectors());
            (result, deadline != ioapic.deadline())
        };
        if deadline_changed {
            self.update_deadline();
        }
        result
    }

    /// A local APIC made an EOI for one of [`Shared::io_vectors`].
    pub(crate) fn lapic_eoi(&self, lapic: &Lapic, vector: u8, level: bool) {
        let Some(controllers) = &self.controllers else {
            self.split_eoi(lapic, vector, level);
            return;
        };
        let pins = self.with_ioapic(controllers, |io| {
            io.pins_acked_by(&self.bus, lapic, vector, level)
        });
        let routing = self.routing.load_full();
        for pin in (0..ioapic::PINS).filter(|pin| pins & 1 << pin != 0) {
            // Remote IRR is still set: what a notifier raises waits for the EOI below.
            if let Some(gsi) = routing.ioapic_gsi(pin) {
                self.gsi_acked(gsi);
            }
            if level && !lapic.suppresses_eoi_broadcast() {
                let now = self.events.now_ns();
                self.with_ioapic(controllers, |io| io.eoi(&self.bus, pin, now));
            }
        }
    }

    /// User space's I/O APIC hears of the EOI if one of its pins sends the vector here, or did.
    fn split_eoi(&self, lapic: &Lapic, vector: u8, level: bool) {
        let ChipMode::Split { ioapic_pins } = self.mode else {
            return;
        };
        let routed_here = || {
            let routing = self.routing.load();
            routing.msis_below(ioapic_pins).any(|(address, data)| {
                let irq = Interrupt::from_msi(address, data, self.bus.ids_32bit());
                irq.vector == vector && irq.level_triggered && self.bus.matches(lapic, None, &irq)
            })
        };
        if level || routed_here() {
            lapic.events().ioapic_eoi(vector);
        }
    }

    /// KVM_SET_LAPIC: the RTC's interrupt may be one the restored APIC has yet to EOI.
    pub(crate) fn lapic_restored(&self, lapic: &Lapic) {
        if let Some(controllers) = &self.controllers {
            self.with_ioapic(controllers, |io| io.restore_rtc(&self.bus, lapic));
        }
    }

    /// Does something to the PIT, if there is one, and tells of a new deadline.
    fn with_pit<R>(&self, act: impl FnOnce(&mut Pit) -> R) -> Option<R> {
        let (result, deadline_changed) = {
            let mut pit = lock(self.pit.get()?);
            let deadline = pit.deadline();
            let result = act(&mut pit);
            (result, deadline != pit.deadline())
        };
        if deadline_changed {
            self.update_deadline();
        }
        Some(result)
    }

    /// The earliest deadline of the chip's own timers, lock-free.
    pub fn next_deadline(&self) -> Option<u64> {
        match self.deadline.load(Ordering::SeqCst) {
            NEVER => None,
            deadline => Some(deadline),
        }
    }

    /// Takes the timers' deadlines over into the atomic and tells of it until that is what they are.
    fn update_deadline(&self) {
        loop {
            let deadline = self.earliest_timer().unwrap_or(NEVER);
            self.deadline.store(deadline, Ordering::SeqCst);
            self.events
                .timer_armed((deadline != NEVER).then_some(deadline));
            let settled = self.earliest_timer().unwrap_or(NEVER);
            if settled == deadline && self.deadline.load(Ordering::SeqCst) == deadline {
                return;
            }
        }
    }

    fn earliest_timer(&self) -> Option<u64> {
        let pit = self.pit.get().and_then(|pit| lock(pit).deadline());
        let ioapic = self.controllers.as_ref();
        let ioapic = ioapic.and_then(|c| lock(&c.ioapic).deadline());
        [pit, ioapic].into_iter().flatten().min()
    }

    /// Runs the chip's own timers that are due at `now`.
    pub fn timer_expired(&self, now: u64) {
        if self.next_deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        if self.with_pit(|pit| pit.timer_expired(now)) == Some(true) {
            self.inject_pit_tick();
        }
        if let Some(controllers) = &self.controllers {
            self.with_ioapic(controllers, |io| io.timer_expired(&self.bus, now));
        }
    }

    fn inject_pit_tick(&self) {
        self.counters.pit_ticks.fetch_add(1, Ordering::Relaxed);
        self.pulse(PIT_GSI, PIT_IRQ_SOURCE_ID);
        // LINT0 in NMI mode makes the PIT a watchdog ("virtual wire" to every vCPU).
        if self.bus.find(Lapic::lint0_is_nmi).is_some() {
            self.bus.for_each(|lapic| {
                lapic.deliver_lvt(LvtEntry::Lint0);
            });
        }
    }
}

impl Drop for IrqChip {
    fn drop(&mut self) {
        self.bus.clear();
    }
}
