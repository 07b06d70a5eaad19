//! What the controllers ask of their surroundings. The crate's documentation says what
//! implementations may do.

/// What a local APIC asks of its vCPU.
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
    /// (KVM_REQ_IOAPIC_EOI_EXIT). On the thread that made the EOI, which is the vCPU's own.
    fn ioapic_eoi(&self, vector: u8);
    /// The APIC timer's deadline is now this one.
    fn timer_armed(&self, deadline: Option<u64>);
    /// The current time.
    fn now_ns(&self) -> u64;
    /// The time at which this vCPU's TSC reaches `guest_tsc`, rounded up (now or earlier if it has):
    /// a guest that is interrupted finds its deadline passed.
    fn tsc_to_ns(&self, guest_tsc: u64) -> u64;
}

/// What the VM's interrupt controllers ask of the VM.
pub trait VmEvents: Send + Sync {
    /// The current time.
    fn now_ns(&self) -> u64;
    /// The chip's own deadline (PIT, delayed EOI injection) is now this one.
    fn timer_armed(&self, deadline: Option<u64>);
    /// A GSI with an ack notifier was acknowledged (EOI at PIC or I/O APIC): resample irqfds lower
    /// the line and signal. Nothing is locked; may call [`IrqChip::set_irq`](crate::IrqChip::set_irq).
    fn gsi_acked(&self, gsi: u32);
}
