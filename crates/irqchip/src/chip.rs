//! The VM's interrupt controllers together: GSIs, MSIs, IPIs and acknowledgements between them.

use std::sync::Arc;

use anykvm_abi::{kvm_ioapic_state, kvm_irq_routing_entry, kvm_pic_state, kvm_pit_state2};

use crate::{Error, Lapic, LapicConfig, VcpuEvents};

/// What the VM's interrupt controllers ask of the VM. See the crate's documentation for what these
/// may do.
pub trait VmEvents: Send + Sync {
    /// The current time.
    fn now_ns(&self) -> u64;
    /// The chip's own deadline (PIT, delayed EOI injection) is now this one.
    fn timer_armed(&self, deadline: Option<u64>);
    /// A GSI with an ack notifier was acknowledged (EOI at PIC or I/O APIC): resample irqfds lower
    /// the line and signal. Nothing is locked; may call [`IrqChip::set_irq`].
    fn gsi_acked(&self, gsi: u32);
}

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

/// The VM's interrupt controllers.
pub struct IrqChip {}

impl IrqChip {
    /// Creates the controllers with KVM's default routing (full) or an empty table (split).
    pub fn new(mode: ChipMode, events: Arc<dyn VmEvents>) -> Arc<Self> {
        let _ = (mode, events);
        todo!()
    }

    /// Which controllers there are.
    pub fn mode(&self) -> ChipMode {
        todo!()
    }

    /// KVM_CAP_X2APIC_API: KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK.
    pub fn set_x2apic_api(&self, flags: u64) -> Result<(), Error> {
        let _ = flags;
        todo!()
    }

    /// KVM_CAP_DISABLE_QUIRKS, the bits that concern APICs.
    pub fn disable_quirks(&self, quirks: u64) {
        let _ = quirks;
        todo!()
    }

    /// A vCPU's local APIC, reset, and from now on a destination.
    pub fn create_lapic(
        self: &Arc<Self>,
        config: LapicConfig,
        events: Arc<dyn VcpuEvents>,
    ) -> Arc<Lapic> {
        let _ = (config, events);
        todo!()
    }

    /// The local APIC of a vCPU.
    pub fn lapic(&self, apic_id: u32) -> Option<Arc<Lapic>> {
        let _ = apic_id;
        todo!()
    }

    /// Whether a vCPU has an interrupt to take now: ExtINT from the PIC (or queued by
    /// KVM_INTERRUPT with a split chip), or its local APIC's.
    pub fn has_interrupt(&self, lapic: &Lapic) -> bool {
        let _ = lapic;
        todo!()
    }

    /// The vCPU takes the interrupt (kvm_cpu_get_interrupt): the vector, in service from here on.
    pub fn ack_interrupt(&self, lapic: &Lapic) -> Option<u8> {
        let _ = lapic;
        todo!()
    }

    /// KVM_IRQ_LINE(_STATUS), irqfds: the level of a GSI as one source drives it (levels of all
    /// sources are ORed). Returns the number of vCPUs that got it, 0 if it was coalesced, negative if
    /// it was ignored (masked, no route). `line_status` is true for KVM_IRQ_LINE_STATUS.
    pub fn set_irq(&self, gsi: u32, source: u32, level: bool, line_status: bool) -> i32 {
        let _ = (gsi, source, level, line_status);
        todo!()
    }

    /// KVM_SIGNAL_MSI: the number of vCPUs that got it, 0 if blocked, negative if none matched.
    pub fn send_msi(&self, address: u64, data: u32) -> Result<i32, Error> {
        let _ = (address, data);
        todo!()
    }

    /// KVM_HC_SEND_IPI: vCPUs that got it. `wide`: the bitmaps are 64 bits each (the hypercall was
    /// made in long mode). Err: bits of the ICR that the hypercall does not take.
    pub fn pv_send_ipi(
        &self,
        bitmap: [u64; 2],
        min: u32,
        icr: u64,
        wide: bool,
    ) -> Result<i32, Error> {
        let _ = (bitmap, min, icr, wide);
        todo!()
    }

    /// KVM_HC_KICK_CPU: un-halts the vCPU with this APIC id.
    pub fn pv_kick(&self, apic_id: u32) {
        let _ = apic_id;
        todo!()
    }

    /// KVM_SET_GSI_ROUTING: replaces the table; all or nothing.
    pub fn set_routing(&self, entries: &[kvm_irq_routing_entry]) -> Result<(), Error> {
        let _ = entries;
        todo!()
    }

    /// From now on acknowledgements of this GSI are reported (counted: one more call, one more
    /// [`Self::remove_ack_notifier`]).
    pub fn add_ack_notifier(&self, gsi: u32) {
        let _ = gsi;
        todo!()
    }

    /// Undoes one [`Self::add_ack_notifier`].
    pub fn remove_ack_notifier(&self, gsi: u32) {
        let _ = gsi;
        todo!()
    }

    /// A port read. False: the port is not one of the PIC's or PIT's.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) -> bool {
        let _ = (port, data);
        todo!()
    }

    /// A port write. False: the port is not one of the PIC's or PIT's.
    pub fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        let _ = (port, data);
        todo!()
    }

    /// A read of guest-physical space. False: not the I/O APIC's (local APICs have their own).
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let _ = (gpa, data);
        todo!()
    }

    /// A write of guest-physical space; as [`Self::mmio_read`].
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        let _ = (gpa, data);
        todo!()
    }

    /// KVM_GET_IRQCHIP of PIC `index` (0 master, 1 slave).
    pub fn pic_state(&self, index: usize) -> Result<kvm_pic_state, Error> {
        let _ = index;
        todo!()
    }

    /// KVM_SET_IRQCHIP of a PIC.
    pub fn set_pic_state(&self, index: usize, state: &kvm_pic_state) -> Result<(), Error> {
        let _ = (index, state);
        todo!()
    }

    /// KVM_GET_IRQCHIP of the I/O APIC.
    pub fn ioapic_state(&self) -> Result<kvm_ioapic_state, Error> {
        todo!()
    }

    /// KVM_SET_IRQCHIP of the I/O APIC.
    pub fn set_ioapic_state(&self, state: &kvm_ioapic_state) -> Result<(), Error> {
        let _ = state;
        todo!()
    }

    /// KVM_CREATE_PIT2 (`speaker_dummy`: KVM_PIT_SPEAKER_DUMMY, ports 61H-64H are answered too).
    pub fn create_pit(&self, speaker_dummy: bool) -> Result<(), Error> {
        let _ = speaker_dummy;
        todo!()
    }

    /// KVM_GET_PIT2.
    pub fn pit_state(&self) -> Result<kvm_pit_state2, Error> {
        todo!()
    }

    /// KVM_SET_PIT2.
    pub fn set_pit_state(&self, state: &kvm_pit_state2) -> Result<(), Error> {
        let _ = state;
        todo!()
    }

    /// KVM_REINJECT_CONTROL.
    pub fn set_pit_reinject(&self, reinject: bool) -> Result<(), Error> {
        let _ = reinject;
        todo!()
    }

    /// The earliest deadline of the chip's own timers, lock-free.
    pub fn next_deadline(&self) -> Option<u64> {
        todo!()
    }

    /// Runs the chip's own timers that are due at `now`.
    pub fn timer_expired(&self, now: u64) {
        let _ = now;
        todo!()
    }
}
