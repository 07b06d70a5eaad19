//! What others ask of a vCPU (Linux: the `KVM_REQ_*` bits and `struct kvm_lapic`'s pending events):
//! NMI, SMI, INIT, SIPI, an un-halt, the EOI of a split irqchip. Each is noted here and announced by
//! a bit in the vCPU's requests word; the vCPU's own thread collects it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use anykvm_cpu::requests::{EVENT, OWNER};
use anykvm_irqchip::VcpuEvents;

use crate::event_thread::Deadline;
use crate::kick::Kick;
use crate::time::Time;

/// An INIT arrived (`KVM_APIC_INIT`).
pub(crate) const INIT: u32 = 1 << 0;
/// A SIPI arrived (`KVM_APIC_SIPI`).
pub(crate) const SIPI: u32 = 1 << 1;

/// No EOI waits.
const NO_EOI: u16 = 0x100;

/// A guest's TSC: (host TSC × ratio >> 48) + offset.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestTsc {
    pub offset: u64,
    pub ratio: u64,
}

/// What was asked of one vCPU and not yet collected.
#[derive(Debug)]
pub(crate) struct VcpuRequests {
    pub kick: Arc<Kick>,
    nmis: AtomicU32,
    smi: AtomicBool,
    /// [`INIT`] and [`SIPI`].
    apic_events: AtomicU32,
    sipi_vector: AtomicU8,
    pv_unhalted: AtomicBool,
    ioapic_eoi: AtomicU16,
    /// A TPR access to report: bit 0 set, bit 1 a write, and RIP.
    tpr_access: AtomicU8,
    tpr_access_rip: AtomicU64,
    /// The guest's `struct kvm_steal_time` is to be looked at (KVM_REQ_STEAL_UPDATE).
    steal_update: AtomicBool,
    /// The APIC timer's deadline, watched by the VM's event thread.
    deadline: Arc<Deadline>,
    /// The guest TSC's relation to the host's, as in the processor's state, for other threads.
    tsc_offset: AtomicU64,
    tsc_ratio: AtomicU64,
    time: Arc<Time>,
}

impl VcpuRequests {
    pub fn new(kick: Arc<Kick>, deadline: Arc<Deadline>, time: Arc<Time>) -> Self {
        Self {
            kick,
            nmis: AtomicU32::new(0),
            smi: AtomicBool::new(false),
            apic_events: AtomicU32::new(0),
            sipi_vector: AtomicU8::new(0),
            pv_unhalted: AtomicBool::new(false),
            ioapic_eoi: AtomicU16::new(NO_EOI),
            tpr_access: AtomicU8::new(0),
            tpr_access_rip: AtomicU64::new(0),
            steal_update: AtomicBool::new(false),
            deadline,
            tsc_offset: AtomicU64::new(0),
            tsc_ratio: AtomicU64::new(1 << 48),
            time,
        }
    }

    /// NMIs that arrived since the last call.
    pub fn take_nmis(&self) -> u32 {
        self.nmis.swap(0, Ordering::SeqCst)
    }
    /// Whether an SMI arrived since the last call.
    pub fn take_smi(&self) -> bool {
        self.smi.swap(false, Ordering::SeqCst)
    }
    /// INIT and SIPI that wait.
    pub fn apic_events(&self) -> u32 {
        self.apic_events.load(Ordering::SeqCst)
    }
    /// Takes INIT or SIPI; true if it waited.
    pub fn take_apic_event(&self, event: u32) -> bool {
        self.apic_events.fetch_and(!event, Ordering::SeqCst) & event != 0
    }
    /// Makes INIT or SIPI wait (a restored state).
    pub fn set_apic_event(&self, event: u32, on: bool) {
        if on {
            self.apic_events.fetch_or(event, Ordering::SeqCst);
            self.kick.request(OWNER);
        } else {
            self.apic_events.fetch_and(!event, Ordering::SeqCst);
        }
    }
    /// Vector of the last SIPI.
    pub fn sipi_vector(&self) -> u8 {
        self.sipi_vector.load(Ordering::SeqCst)
    }
    /// Sets the vector of the last SIPI (a restored state).
    pub fn set_sipi_vector(&self, vector: u8) {
        self.sipi_vector.store(vector, Ordering::SeqCst);
    }
    /// Whether KVM_HC_KICK_CPU came.
    pub fn pv_unhalted(&self) -> bool {
        self.pv_unhalted.load(Ordering::SeqCst)
    }
    /// The un-halt is used up.
    pub fn clear_pv_unhalted(&self) {
        self.pv_unhalted.store(false, Ordering::SeqCst);
    }
    /// The vector of an EOI that user space's I/O APIC must hear of.
    pub fn take_ioapic_eoi(&self) -> Option<u8> {
        if self.ioapic_eoi.load(Ordering::Relaxed) == NO_EOI {
            return None;
        }
        u8::try_from(self.ioapic_eoi.swap(NO_EOI, Ordering::SeqCst)).ok()
    }
    /// Notes a TPR access to report (KVM_REQ_REPORT_TPR_ACCESS), on the vCPU's own thread.
    pub fn note_tpr_access(&self, rip: u64, is_write: bool) {
        self.tpr_access_rip.store(rip, Ordering::Relaxed);
        self.tpr_access
            .store(1 | u8::from(is_write) << 1, Ordering::Relaxed);
        self.kick.requests().set(OWNER);
    }
    /// The TPR access to report: RIP, and whether it was a write.
    pub fn take_tpr_access(&self) -> Option<(u64, bool)> {
        match self.tpr_access.swap(0, Ordering::Relaxed) {
            0 => None,
            bits => Some((self.tpr_access_rip.load(Ordering::Relaxed), bits & 2 != 0)),
        }
    }
    /// The guest's `struct kvm_steal_time` is to be looked at before the guest goes on.
    pub fn request_steal_update(&self) {
        self.steal_update.store(true, Ordering::SeqCst);
    }
    /// Whether it is to be looked at.
    pub fn wants_steal_update(&self) -> bool {
        self.steal_update.load(Ordering::SeqCst)
    }
    /// The same, for whoever does it now.
    pub fn take_steal_update(&self) -> bool {
        self.wants_steal_update() && self.steal_update.swap(false, Ordering::SeqCst)
    }
    /// The guest TSC's relation to the host's.
    pub fn tsc(&self) -> GuestTsc {
        GuestTsc {
            offset: self.tsc_offset.load(Ordering::SeqCst),
            ratio: self.tsc_ratio.load(Ordering::SeqCst),
        }
    }
    /// The guest TSC's relation to the host's changed.
    pub fn set_tsc(&self, offset: u64, ratio: u64) {
        self.tsc_offset.store(offset, Ordering::SeqCst);
        self.tsc_ratio.store(ratio, Ordering::SeqCst);
    }
}

impl VcpuEvents for VcpuRequests {
    fn notify(&self) {
        self.kick.request(EVENT);
    }
    fn nmi(&self) {
        self.nmis.fetch_add(1, Ordering::SeqCst);
        self.kick.request(EVENT);
    }
    fn smi(&self) {
        self.smi.store(true, Ordering::SeqCst);
        self.kick.request(EVENT);
    }
    fn init(&self) {
        self.apic_events.store(INIT, Ordering::SeqCst);
        self.kick.request(OWNER);
    }
    fn sipi(&self, vector: u8) {
        self.sipi_vector.store(vector, Ordering::SeqCst);
        self.apic_events.fetch_or(SIPI, Ordering::SeqCst);
        self.kick.request(OWNER);
    }
    fn pv_unhalt(&self) {
        self.pv_unhalted.store(true, Ordering::SeqCst);
        self.kick.request(EVENT);
    }
    fn ioapic_eoi(&self, vector: u8) {
        self.ioapic_eoi.store(vector.into(), Ordering::SeqCst);
        self.kick.requests().set(EVENT);
    }
    fn timer_armed(&self, deadline: Option<u64>) {
        self.deadline.set(deadline);
    }
    fn now_ns(&self) -> u64 {
        self.time.ns()
    }
    fn tsc_to_ns(&self, guest_tsc: u64) -> u64 {
        let ratio = self.tsc_ratio.load(Ordering::SeqCst).max(1);
        let now = tsc_at(
            self.time.tsc(),
            self.tsc_offset.load(Ordering::SeqCst),
            ratio,
        );
        let left = guest_tsc.wrapping_sub(now) as i64;
        if left <= 0 {
            return self.time.ns();
        }
        // Guest cycles to host cycles to nanoseconds.
        let host = ((left as u128) << 48) / u128::from(ratio);
        let ns = host * 1_000_000 / u128::from(self.time.host_tsc().khz.max(1));
        self.time
            .ns()
            .saturating_add(u64::try_from(ns).unwrap_or(u64::MAX / 2))
    }
}

/// The guest's TSC when the host's is `host`.
pub(crate) fn tsc_at(host: u64, offset: u64, ratio: u64) -> u64 {
    (((u128::from(host) * u128::from(ratio)) >> 48) as u64).wrapping_add(offset)
}
