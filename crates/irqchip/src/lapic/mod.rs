//! The local APIC. SDM volume 3, chapter "Advanced Programmable Interrupt Controller (APIC)".

use std::sync::Arc;

use anykvm_abi::kvm_lapic_state;

use crate::Error;

/// What a local APIC asks of its vCPU. See the crate's documentation for what these may do.
pub trait VcpuEvents: Send + Sync {
    /// Something the vCPU has to look at is pending: KVM_REQ_EVENT, and wake it.
    fn notify(&self);
    /// Queue an NMI, and wake.
    fn nmi(&self);
    /// Queue an SMI, and wake.
    fn smi(&self);
    /// An INIT arrived: it replaces whatever INIT or SIPI was pending; and wake.
    fn init(&self);
    /// A SIPI arrived; and wake. It counts only if the vCPU waits for it when it looks.
    fn sipi(&self, vector: u8);
    /// The paravirtual kick of a halted vCPU (KVM_HC_KICK_CPU's delivery mode); and wake.
    fn pv_unhalt(&self);
    /// Split irqchip: an EOI for a vector that user space's I/O APIC routes here
    /// (KVM_REQ_IOAPIC_EOI_EXIT). Always on the vCPU's own thread.
    fn ioapic_eoi(&self, vector: u8);
    /// The APIC timer's deadline is now this one.
    fn timer_armed(&self, deadline: Option<u64>);
    /// The current time.
    fn now_ns(&self) -> u64;
    /// The time at which this vCPU's TSC reaches `guest_tsc` (now or earlier if it has).
    fn tsc_to_ns(&self, guest_tsc: u64) -> u64;
}

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

/// The local vector table, in the order of its registers (CMCI, at 2F0H, last).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
#[allow(missing_docs)]
pub enum LvtEntry {
    Timer,
    Thermal,
    PerformanceCounter,
    Lint0,
    Lint1,
    Error,
    Cmci,
}

/// One local APIC.
pub struct Lapic {}

impl Lapic {
    /// The vCPU's id (= x2APIC id).
    pub fn apic_id(&self) -> u32 {
        todo!()
    }

    /// RESET (`init` false) or INIT (`init` true: IA32_APIC_BASE and the id stay).
    pub fn reset(&self, init: bool) {
        let _ = init;
        todo!()
    }

    /// To be called when the vCPU's CPUID is set.
    pub fn set_features(&self, features: CpuFeatures) {
        let _ = features;
        todo!()
    }

    /// KVM_X86_SETUP_MCE with MCG_CMCI_P: there is a CMCI entry in the LVT.
    pub fn set_cmci(&self, present: bool) {
        let _ = present;
        todo!()
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        todo!()
    }

    /// Writes IA32_APIC_BASE. The guest (`host_initiated` false) may not go from x2APIC to xAPIC or
    /// from disabled to x2APIC.
    pub fn set_base(&self, value: u64, host_initiated: bool) -> Result<(), Error> {
        let _ = (value, host_initiated);
        todo!()
    }

    /// Where the register page is in guest-physical space.
    pub fn mmio_base(&self) -> u64 {
        todo!()
    }

    /// Globally enabled in x2APIC mode.
    pub fn x2apic_mode(&self) -> bool {
        todo!()
    }

    /// Reads the register page at `offset` (0..4096). False: the page is not the APIC's now
    /// (disabled or x2APIC mode, with KVM_X86_QUIRK_LAPIC_MMIO_HOLE disabled): the access is MMIO.
    pub fn mmio_read(&self, offset: u32, data: &mut [u8]) -> bool {
        let _ = (offset, data);
        todo!()
    }

    /// Writes the register page; as [`Self::mmio_read`].
    pub fn mmio_write(&self, offset: u32, data: &[u8]) -> bool {
        let _ = (offset, data);
        todo!()
    }

    /// RDMSR of 800H..8FFH.
    pub fn msr_read(&self, msr: u32) -> Result<u64, Error> {
        let _ = msr;
        todo!()
    }

    /// WRMSR of 800H..8FFH.
    pub fn msr_write(&self, msr: u32, value: u64) -> Result<(), Error> {
        let _ = (msr, value);
        todo!()
    }

    /// IA32_TSC_DEADLINE: 0 unless the timer is in that mode and armed.
    pub fn tsc_deadline(&self) -> u64 {
        todo!()
    }

    /// Writes IA32_TSC_DEADLINE; ignored unless the timer is in that mode.
    pub fn set_tsc_deadline(&self, value: u64) {
        let _ = value;
        todo!()
    }

    /// The guest TSC's offset or rate changed: an armed TSC deadline gets a new time.
    pub fn tsc_changed(&self) {
        todo!()
    }

    /// CR8.
    pub fn cr8(&self) -> u64 {
        todo!()
    }

    /// Writes CR8 (bits 3:0).
    pub fn set_cr8(&self, value: u64) {
        let _ = value;
        todo!()
    }

    /// The task-priority register.
    pub fn tpr(&self) -> u8 {
        todo!()
    }

    /// Writes the task-priority register.
    pub fn set_tpr(&self, value: u8) {
        let _ = value;
        todo!()
    }

    /// The vector this APIC would deliver now: enabled, and above the processor priority.
    pub fn has_interrupt(&self) -> Option<u8> {
        todo!()
    }

    /// The vCPU takes the interrupt that [`Self::has_interrupt`] returned: IRR to ISR.
    pub fn ack(&self, vector: u8) {
        let _ = vector;
        todo!()
    }

    /// End of interrupt for the highest vector in service, which is returned.
    pub fn eoi(&self) -> Option<u8> {
        todo!()
    }

    /// Highest vector requested.
    pub fn highest_irr(&self) -> Option<u8> {
        todo!()
    }

    /// Highest vector in service.
    pub fn highest_isr(&self) -> Option<u8> {
        todo!()
    }

    /// Whether an interrupt from the PIC reaches this vCPU (LVT LINT0 in ExtINT mode and unmasked, or
    /// the APIC globally disabled).
    pub fn accepts_pic_intr(&self) -> bool {
        todo!()
    }

    /// Both enables: IA32_APIC_BASE and the spurious-vector register.
    pub fn enabled(&self) -> bool {
        todo!()
    }

    /// Delivers through a local vector table entry; true if something was delivered.
    pub fn deliver_lvt(&self, entry: LvtEntry) -> bool {
        let _ = entry;
        todo!()
    }

    /// KVM_INTERRUPT with a split irqchip: the external interrupt, once. Err(Exists) if one is queued.
    pub fn queue_external_interrupt(&self, vector: u8) -> Result<(), Error> {
        let _ = vector;
        todo!()
    }

    /// The external interrupt queued by KVM_INTERRUPT with a split irqchip and not yet taken.
    pub fn external_interrupt(&self) -> Option<u8> {
        todo!()
    }

    /// The timer's deadline, lock-free.
    pub fn next_deadline(&self) -> Option<u64> {
        todo!()
    }

    /// Delivers the timer interrupt if the deadline has passed at `now`, and rearms a periodic timer.
    pub fn timer_expired(&self, now: u64) {
        let _ = now;
        todo!()
    }

    /// KVM_GET_LAPIC.
    pub fn state(&self) -> kvm_lapic_state {
        todo!()
    }

    /// KVM_SET_LAPIC.
    pub fn set_state(&self, state: &kvm_lapic_state) -> Result<(), Error> {
        let _ = state;
        todo!()
    }

    /// The events it was created with.
    pub fn events(&self) -> &Arc<dyn VcpuEvents> {
        todo!()
    }
}
