//! The local APIC, xAPIC and x2APIC. Specified by the Intel SDM volume 3, chapter "Advanced
//! Programmable Interrupt Controller (APIC)"; where KVM's differs from silicon (no errors are
//! recorded in the ESR, sending takes no time, 32-bit ids), KVM's behaviour is meant.
//!
//! The registers are in [`registers::RegisterPage`], laid out as the guest sees them. Three kinds of
//! threads touch them: the vCPU's own (everything), senders (IRR, TMR, and the registers that decide
//! whether a message is for this APIC), and the event thread (the timer). All registers are atomics
//! and none depends on another changing at the same instant, so nothing here is locked but the timer.

mod access;
mod registers;
mod state;
mod timer;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use anykvm_abi::KVM_X86_QUIRK_LINT0_REENABLED;

use crate::chip::{IrqChip, Shared};
use crate::interrupt::{DeliveryMode, Interrupt};
use crate::{Error, VcpuEvents};
pub use registers::LvtEntry;
use registers::{
    DFR_CLUSTER, DFR_FLAT, LVT, LVT_DELIVERY_MODE, LVT_LEVEL, LVT_MASKED, LVT_MODE_EXTINT,
    LVT_MODE_NMI, LVT_VECTOR, RegisterPage, SVR_ENABLE, SVR_SUPPRESS_EOI_BROADCAST,
    TIMER_MODE_PERIODIC, TIMER_MODE_TSC_DEADLINE, VERSION_DIRECTED_EOI, VERSION_INTEGRATED, offset,
};
use timer::Timer;

/// IA32_APIC_BASE.
const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;
const BASE_ADDRESS: u64 = !0xfff;
const BASE_RESERVED: u64 = 0x2ff;
/// Where the register page is after reset.
const DEFAULT_ADDRESS: u64 = 0xfee0_0000;

/// In `external`: none queued.
const NO_VECTOR: u16 = u16::MAX;

/// What is fixed when a vCPU is created.
#[derive(Clone, Copy, Debug)]
pub struct LapicConfig {
    /// The vCPU's id, which is its x2APIC id; its low byte is the xAPIC id at reset.
    pub apic_id: u32,
    /// Whether this is the bootstrap processor.
    pub bsp: bool,
}

/// What the vCPU's CPUID says that the APIC depends on.
#[derive(Clone, Copy, Debug)]
pub struct CpuFeatures {
    /// CPUID.01H:ECX.x2APIC.
    pub x2apic: bool,
    /// CPUID.01H:ECX.TSC_Deadline.
    pub tsc_deadline: bool,
    /// MAXPHYADDR: address bits above are reserved in IA32_APIC_BASE.
    pub maxphyaddr: u8,
    /// An Intel-compatible vendor string: the performance-counter LVT masks itself on delivery.
    pub intel_compatible: bool,
}

impl Default for CpuFeatures {
    /// A vCPU whose CPUID has not been set.
    fn default() -> Self {
        Self {
            x2apic: false,
            tsc_deadline: false,
            maxphyaddr: 36,
            intel_compatible: false,
        }
    }
}

/// How an APIC reads a logical destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogicalMode {
    /// Eight APICs, a bit each.
    Flat,
    /// Fifteen clusters of four.
    Cluster,
    /// 65536 clusters of 16.
    X2Apic,
}

/// What a local APIC has done, for statistics.
#[derive(Debug, Default)]
pub struct LapicCounters {
    /// Fixed and lowest-priority interrupts accepted.
    pub accepted: AtomicU64,
    /// Interrupts the vCPU took.
    pub delivered: AtomicU64,
    /// IPIs sent.
    pub ipis: AtomicU64,
}

/// One local APIC.
pub struct Lapic {
    apic_id: u32,
    bsp: bool,
    /// IA32_APIC_BASE.
    base: AtomicU64,
    regs: RegisterPage,
    timer: Timer,
    /// The vector of KVM_INTERRUPT with a split irqchip.
    external: AtomicU16,

    x2apic_supported: AtomicBool,
    tsc_deadline_supported: AtomicBool,
    intel_compatible: AtomicBool,
    maxphyaddr: AtomicU32,
    cmci: AtomicBool,

    counters: LapicCounters,
    events: Arc<dyn VcpuEvents>,
    chip: Weak<IrqChip>,
    shared: Arc<Shared>,
}

/// The logical id that an x2APIC id implies.
fn x2apic_ldr(apic_id: u32) -> u32 {
    apic_id >> 4 << 16 | 1 << (apic_id & 0xf)
}

impl Lapic {
    pub(crate) fn new(
        config: LapicConfig,
        events: Arc<dyn VcpuEvents>,
        chip: Weak<IrqChip>,
        shared: Arc<Shared>,
    ) -> Self {
        let features = CpuFeatures::default();
        let lapic = Self {
            apic_id: config.apic_id,
            bsp: config.bsp,
            base: AtomicU64::new(0),
            regs: RegisterPage::new(),
            timer: Timer::new(),
            external: AtomicU16::new(NO_VECTOR),
            x2apic_supported: AtomicBool::new(features.x2apic),
            tsc_deadline_supported: AtomicBool::new(features.tsc_deadline),
            intel_compatible: AtomicBool::new(features.intel_compatible),
            maxphyaddr: AtomicU32::new(u32::from(features.maxphyaddr)),
            cmci: AtomicBool::new(false),
            counters: LapicCounters::default(),
            events,
            chip,
            shared,
        };
        lapic.reset(false);
        lapic
    }

    /// The vCPU's id (= x2APIC id).
    pub fn apic_id(&self) -> u32 {
        self.apic_id
    }

    /// The events it was created with.
    pub fn events(&self) -> &Arc<dyn VcpuEvents> {
        &self.events
    }

    /// What it has done so far.
    pub fn counters(&self) -> &LapicCounters {
        &self.counters
    }

    /// RESET (`init` false) or INIT (`init` true: IA32_APIC_BASE and the id stay).
    pub fn reset(&self, init: bool) {
        if !init {
            let bsp = if self.bsp { BASE_BSP } else { 0 };
            self.store_base(DEFAULT_ADDRESS | BASE_ENABLE | bsp);
            self.set_xapic_id();
            self.external.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.reset_timer();
        self.set_version();
        for (register, _) in &LVT[..self.lvt_entries()] {
            self.regs.set(*register, LVT_MASKED);
        }
        if self.bsp && self.shared.quirk(KVM_X86_QUIRK_LINT0_REENABLED) {
            self.regs.set(offset::LVT_LINT0, LVT_MODE_EXTINT);
        }
        self.regs.set(offset::DFR, DFR_FLAT);
        self.regs.set(offset::SVR, 0xff);
        if !self.x2apic_mode() {
            self.regs.set(offset::LDR, 0);
        }
        for register in [
            offset::TPR,
            offset::ESR,
            offset::ICR,
            offset::ICR_HIGH,
            offset::TIMER_DIVIDE,
            offset::TIMER_INITIAL_COUNT,
            offset::PPR,
        ] {
            self.regs.set(register, 0);
        }
        for i in 0..8 {
            for register in [offset::ISR, offset::TMR, offset::IRR] {
                self.regs.set(register + i * 16, 0);
            }
        }
        self.map_changed();
    }

    /// To be called when the vCPU's CPUID is set.
    pub fn set_features(&self, features: CpuFeatures) {
        let relaxed = Ordering::Relaxed;
        self.x2apic_supported.store(features.x2apic, relaxed);
        self.tsc_deadline_supported
            .store(features.tsc_deadline, relaxed);
        self.intel_compatible
            .store(features.intel_compatible, relaxed);
        self.maxphyaddr
            .store(u32::from(features.maxphyaddr), relaxed);
        self.set_version();
    }

    /// KVM_X86_SETUP_MCE with MCG_CMCI_P: there is a CMCI entry in the LVT.
    pub fn set_cmci(&self, present: bool) {
        if present && !self.cmci.swap(true, Ordering::Relaxed) {
            self.regs.set(offset::LVT_CMCI, LVT_MASKED);
        } else {
            self.cmci.store(present, Ordering::Relaxed);
        }
        self.set_version();
    }

    fn lvt_entries(&self) -> usize {
        LVT.len() - usize::from(!self.cmci.load(Ordering::Relaxed))
    }

    fn has_lvt(&self, entry: LvtEntry) -> bool {
        (entry as usize) < self.lvt_entries()
    }

    /// The LVT timer mode bits that exist.
    fn timer_mode_mask(&self) -> u32 {
        match self.tsc_deadline_supported.load(Ordering::Relaxed) {
            true => TIMER_MODE_PERIODIC | TIMER_MODE_TSC_DEADLINE,
            false => TIMER_MODE_PERIODIC,
        }
    }

    fn set_version(&self) {
        let mut version = VERSION_INTEGRATED | (self.lvt_entries() as u32 - 1) << 16;
        // The I/O APIC in the kernel has no EOI register, so broadcasts cannot be done without; some
        // systems do not look before they turn them off.
        if self.x2apic_supported.load(Ordering::Relaxed) && self.shared.split {
            version |= VERSION_DIRECTED_EOI;
        }
        self.regs.set(offset::VERSION, version);
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base.load(Ordering::Acquire)
    }

    /// Writes IA32_APIC_BASE. The guest (`host_initiated` false) may not go from x2APIC to xAPIC or
    /// from disabled to x2APIC.
    pub fn set_base(&self, value: u64, host_initiated: bool) -> Result<(), Error> {
        let old = self.base();
        if old == value {
            return Ok(());
        }
        let mut reserved = BASE_RESERVED
            | u64::MAX
                .checked_shl(self.maxphyaddr.load(Ordering::Relaxed))
                .unwrap_or(0);
        if !self.x2apic_supported.load(Ordering::Relaxed) {
            reserved |= BASE_X2APIC;
        }
        let mode = |base: u64| (base & BASE_ENABLE != 0, base & BASE_X2APIC != 0);
        let refused = match (mode(old), mode(value)) {
            (_, (false, true)) => true,
            ((true, true), (true, false)) | ((false, false), (true, true)) => !host_initiated,
            _ => false,
        };
        if refused || value & reserved != 0 {
            return Err(Error::GeneralProtection);
        }
        self.store_base(value);
        self.map_changed();
        if self.accepts_pic_intr() {
            self.events.notify();
        }
        Ok(())
    }

    fn store_base(&self, value: u64) {
        let changed = self.base.swap(value, Ordering::AcqRel) ^ value;
        let (enabled, x2apic) = (value & BASE_ENABLE != 0, value & BASE_X2APIC != 0);
        if enabled && x2apic && changed & BASE_X2APIC != 0 {
            self.regs.set(offset::ID, self.apic_id);
            self.regs.set(offset::LDR, x2apic_ldr(self.apic_id));
        } else if enabled && !x2apic && changed & (BASE_ENABLE | BASE_X2APIC) != 0 {
            self.set_xapic_id();
        }
    }

    fn set_xapic_id(&self) {
        self.regs.set(offset::ID, self.apic_id << 24);
    }

    /// Where the register page is in guest-physical space.
    pub fn mmio_base(&self) -> u64 {
        self.base() & BASE_ADDRESS
    }

    /// Globally enabled in x2APIC mode.
    pub fn x2apic_mode(&self) -> bool {
        self.base() & BASE_X2APIC != 0
    }

    /// Globally enabled (IA32_APIC_BASE).
    pub fn present(&self) -> bool {
        self.base() & BASE_ENABLE != 0
    }

    pub(crate) fn software_enabled(&self) -> bool {
        self.regs.get(offset::SVR) & SVR_ENABLE != 0
    }

    /// Both enables: IA32_APIC_BASE and the spurious-vector register.
    pub fn enabled(&self) -> bool {
        self.present() && self.software_enabled()
    }

    fn ids_32bit(&self) -> bool {
        self.chip.upgrade().is_some_and(|chip| chip.bus.ids_32bit())
    }

    fn set_svr(&self, value: u32) {
        let was_enabled = self.software_enabled();
        self.regs.set(offset::SVR, value);
        if was_enabled != (value & SVR_ENABLE != 0) {
            self.map_changed();
        }
    }

    /// Writes a register that decides which messages are for this APIC.
    fn set_map_register(&self, offset: u32, value: u32) {
        if self.regs.get(offset) != value {
            self.regs.set(offset, value);
            self.map_changed();
        }
    }

    fn map_changed(&self) {
        if let Some(chip) = self.chip.upgrade() {
            chip.bus.rebuild_map();
        }
    }

    pub(crate) fn xapic_id(&self) -> u32 {
        self.regs.get(offset::ID) >> 24
    }

    /// How this APIC reads logical destinations, and its logical id; `None` if it answers to none.
    pub(crate) fn logical_id(&self) -> Option<(LogicalMode, u32)> {
        let ldr = self.regs.get(offset::LDR);
        if ldr == 0 || !self.software_enabled() {
            return None;
        }
        Some(if self.x2apic_mode() {
            (LogicalMode::X2Apic, ldr)
        } else if self.regs.get(offset::DFR) == DFR_FLAT {
            (LogicalMode::Flat, ldr >> 24)
        } else {
            (LogicalMode::Cluster, ldr >> 24)
        })
    }

    /// Whether a logical destination that is not the broadcast includes this APIC.
    pub(crate) fn matches_logical(&self, dest: u32) -> bool {
        let ldr = self.regs.get(offset::LDR);
        if self.x2apic_mode() {
            return ldr >> 16 == dest >> 16 && ldr & dest & 0xffff != 0;
        }
        let id = ldr >> 24;
        match self.regs.get(offset::DFR) {
            DFR_FLAT => id & dest != 0,
            DFR_CLUSTER => id >> 4 == dest >> 4 && id & dest & 0xf != 0,
            _ => false,
        }
    }

    fn send_ipi(&self, irq: &Interrupt) {
        self.counters.ipis.fetch_add(1, Ordering::Relaxed);
        if let Some(chip) = self.chip.upgrade() {
            chip.bus.deliver(Some(self), irq, None);
        }
    }

    /// Takes a message addressed to this APIC; false if it is discarded. Any thread.
    pub(crate) fn accept(&self, irq: &Interrupt) -> bool {
        match irq.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if irq.level_triggered && !irq.assert || !self.enabled() {
                    return false;
                }
                if irq.level_triggered {
                    self.regs.set_vector(offset::TMR, irq.vector);
                } else {
                    self.regs.clear_vector(offset::TMR, irq.vector);
                }
                self.regs.set_vector(offset::IRR, irq.vector);
                self.counters.accepted.fetch_add(1, Ordering::Relaxed);
                self.events.notify();
            }
            DeliveryMode::Smi => self.events.smi(),
            DeliveryMode::RemoteRead => self.events.pv_unhalt(),
            DeliveryMode::Nmi => self.events.nmi(),
            // An INIT level de-assert synchronised arbitration ids once; it does nothing now.
            DeliveryMode::Init if irq.level_triggered && !irq.assert => return false,
            DeliveryMode::Init => self.events.init(),
            DeliveryMode::Startup => self.events.sipi(irq.vector),
            // The PIC's interrupts are looked for by whoever accepts them.
            DeliveryMode::ExtInt => return false,
        }
        true
    }

    /// Delivers through a local vector table entry; true if something was delivered.
    pub fn deliver_lvt(&self, entry: LvtEntry) -> bool {
        let (register, _) = LVT[entry as usize];
        let lvt = self.regs.get(register);
        if !self.has_lvt(entry) || !self.present() || lvt & LVT_MASKED != 0 {
            return false;
        }
        let mut irq = Interrupt::from_icr(lvt & (LVT_VECTOR | LVT_DELIVERY_MODE), 0);
        irq.level_triggered = lvt & LVT_LEVEL != 0;
        irq.assert = true;
        let delivered = self.accept(&irq);
        if delivered
            && entry == LvtEntry::PerformanceCounter
            && self.intel_compatible.load(Ordering::Relaxed)
        {
            self.regs.set_bits(register, LVT_MASKED);
        }
        delivered
    }

    /// Whether LINT0 delivers NMIs: the PIT as a watchdog.
    pub(crate) fn lint0_is_nmi(&self) -> bool {
        self.regs.get(offset::LVT_LINT0) & (LVT_MASKED | LVT_DELIVERY_MODE) == LVT_MODE_NMI
    }

    /// Whether an interrupt from the PIC reaches this vCPU (LVT LINT0 in ExtINT mode and unmasked, or
    /// the APIC globally disabled).
    pub fn accepts_pic_intr(&self) -> bool {
        let lint0 = self.regs.get(offset::LVT_LINT0);
        !self.present() || lint0 & (LVT_MASKED | LVT_DELIVERY_MODE) == LVT_MODE_EXTINT
    }

    /// KVM_INTERRUPT with a split irqchip: the external interrupt, once. Err(Exists) if one is queued.
    pub fn queue_external_interrupt(&self, vector: u8) -> Result<(), Error> {
        let (new, relaxed) = (u16::from(vector), Ordering::Relaxed);
        self.external
            .compare_exchange(NO_VECTOR, new, Ordering::SeqCst, relaxed)
            .map_err(|_| Error::Exists)?;
        self.events.notify();
        Ok(())
    }

    /// The external interrupt queued by KVM_INTERRUPT with a split irqchip and not yet taken.
    pub fn external_interrupt(&self) -> Option<u8> {
        u8::try_from(self.external.load(Ordering::SeqCst)).ok()
    }

    pub(crate) fn take_external_interrupt(&self) -> Option<u8> {
        u8::try_from(self.external.swap(NO_VECTOR, Ordering::SeqCst)).ok()
    }

    /// CR8.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr() >> 4)
    }

    /// Writes CR8 (bits 3:0).
    pub fn set_cr8(&self, value: u64) {
        self.set_tpr((value as u8 & 0xf) << 4);
    }

    /// The task-priority register.
    pub fn tpr(&self) -> u8 {
        self.regs.get(offset::TPR) as u8
    }

    /// Writes the task-priority register.
    pub fn set_tpr(&self, value: u8) {
        let lowered = value < self.tpr();
        self.regs.set(offset::TPR, u32::from(value));
        if lowered {
            self.notify_if_deliverable();
        } else {
            self.update_ppr();
        }
    }

    /// The processor priority: the task priority or the class of what is in service.
    fn update_ppr(&self) -> u8 {
        let (tpr, isr) = (self.tpr(), self.highest_isr().unwrap_or(0));
        let ppr = if tpr & 0xf0 >= isr & 0xf0 {
            tpr
        } else {
            isr & 0xf0
        };
        self.regs.set(offset::PPR, u32::from(ppr));
        ppr
    }

    fn notify_if_deliverable(&self) {
        if self.has_interrupt().is_some() {
            self.events.notify();
        }
    }

    /// Highest vector requested.
    pub fn highest_irr(&self) -> Option<u8> {
        self.regs.highest_vector(offset::IRR)
    }

    /// Highest vector in service.
    pub fn highest_isr(&self) -> Option<u8> {
        self.regs.highest_vector(offset::ISR)
    }

    /// Whether a vector has been requested or is in service: its EOI is still to come.
    pub(crate) fn pending_eoi(&self, vector: u8) -> bool {
        self.regs.test_vector(offset::ISR, vector) || self.regs.test_vector(offset::IRR, vector)
    }

    /// The vector this APIC would deliver now: enabled, and above the processor priority.
    pub fn has_interrupt(&self) -> Option<u8> {
        let vector = self.highest_irr().filter(|_| self.present());
        let ppr = self.update_ppr();
        vector.filter(|vector| vector & 0xf0 > ppr & 0xf0)
    }

    /// The vCPU takes the interrupt that [`Self::has_interrupt`] returned: IRR to ISR.
    pub fn ack(&self, vector: u8) {
        self.regs.clear_vector(offset::IRR, vector);
        self.regs.set_vector(offset::ISR, vector);
        self.counters.delivered.fetch_add(1, Ordering::Relaxed);
        self.update_ppr();
    }

    /// End of interrupt for the highest vector in service, which is returned.
    pub fn eoi(&self) -> Option<u8> {
        let vector = self.highest_isr()?;
        self.regs.clear_vector(offset::ISR, vector);
        self.update_ppr();
        if self.shared.io_vectors.contains(vector)
            && let Some(chip) = self.chip.upgrade()
        {
            let level = self.regs.test_vector(offset::TMR, vector);
            chip.lapic_eoi(self, vector, level);
        }
        self.notify_if_deliverable();
        Some(vector)
    }

    /// Whether EOIs go unheard by I/O APICs.
    pub(crate) fn suppresses_eoi_broadcast(&self) -> bool {
        self.regs.get(offset::SVR) & SVR_SUPPRESS_EOI_BROADCAST != 0
    }

    /// Whether the EOI of this vector concerns an I/O APIC, so that a paravirtual EOI may not skip it.
    pub fn eoi_is_observed(&self, vector: u8) -> bool {
        self.shared.io_vectors.contains(vector)
    }
}
