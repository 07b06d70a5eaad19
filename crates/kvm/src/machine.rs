//! The rest of the computer as one vCPU sees it: implements [`Machine`], what the processor runs
//! against. Accesses go to the vCPU's local APIC, the VM's interrupt controllers, its ioeventfds and
//! coalesced zones, in this order; what none of them takes is the VMM's and becomes an exit.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use anykvm_abi::{
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_X86_QUIRK_FIX_HYPERCALL_INSN, KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT,
    KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS, KVM_X86_QUIRK_OUT_7E_INC_RIP,
};
use anykvm_cpu::cpuid::feature;
use anykvm_cpu::machine::{Hypercall, MsrResult, Quirk};
use anykvm_cpu::memory::PAGE;
use anykvm_cpu::msr::index::PLATFORM_INFO;
use anykvm_cpu::requests::OWNER;
use anykvm_cpu::{CountedTime, CpuState, Machine};
use anykvm_irqchip::{ChipMode, CpuFeatures, Lapic};
use arc_swap::ArcSwap;

use crate::counted::Limit;
use crate::cpuid::GuestCpuid;
use crate::mce::MachineCheck;
use crate::msr::{self, Access, MsrAccess, MsrError};
use crate::paravirt::Paravirt;
use crate::run_page::RunPage;
use crate::steal_time::RunDelay;
use crate::vcpu_requests::VcpuRequests;
use crate::vm::Vm;

/// IA32_APIC_BASE (SDM Vol. 3, 12.4.4).
const APIC_BASE_BSP: u64 = 1 << 8;
const APIC_BASE_X2APIC: u64 = 1 << 10;
pub(crate) const APIC_BASE_ENABLE: u64 = 1 << 11;
const APIC_BASE_DEFAULT: u64 = 0xfee0_0000;

/// Offset of the task-priority register in the APIC's page.
const APIC_TASKPRI: u32 = 0x80;

/// One vCPU's surroundings. Shared with the processor, which calls it on the vCPU's thread.
pub(crate) struct VcpuMachine {
    vm: Arc<Vm>,
    requests: Arc<VcpuRequests>,
    run: RunPage,
    lapic: Option<Arc<Lapic>>,
    /// CR8 and IA32_APIC_BASE where there is no local APIC in the kernel.
    cr8: AtomicU64,
    apic_base: AtomicU64,
    cpuid: ArcSwap<GuestCpuid>,
    paravirt: Mutex<Paravirt>,
    mce: Mutex<MachineCheck>,
    tsc_khz: AtomicU32,
    /// KVM_CAP_ENFORCE_PV_FEATURE_CPUID.
    enforce_features: AtomicBool,
    /// KVM_TPR_ACCESS_REPORTING.
    report_tpr: AtomicBool,
    /// The guest has registered a kvmclock page.
    uses_clock: AtomicBool,
    /// The guest has registered a page for stolen time.
    uses_steal_time: AtomicBool,
    run_delay: OnceLock<Arc<RunDelay>>,
    /// Of a run by count.
    limit: Limit,
}

impl std::fmt::Debug for VcpuMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuMachine").finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl VcpuMachine {
    pub fn new(
        vm: Arc<Vm>,
        requests: Arc<VcpuRequests>,
        run: RunPage,
        lapic: Option<Arc<Lapic>>,
        boot: bool,
    ) -> Self {
        let bsp = if boot { APIC_BASE_BSP } else { 0 };
        Self {
            vm,
            requests,
            run,
            lapic,
            cr8: AtomicU64::new(0),
            apic_base: AtomicU64::new(APIC_BASE_DEFAULT | APIC_BASE_ENABLE | bsp),
            cpuid: ArcSwap::from_pointee(GuestCpuid::default()),
            paravirt: Mutex::default(),
            mce: Mutex::default(),
            tsc_khz: AtomicU32::new(0),
            enforce_features: AtomicBool::new(false),
            report_tpr: AtomicBool::new(false),
            uses_clock: AtomicBool::new(false),
            uses_steal_time: AtomicBool::new(false),
            run_delay: OnceLock::new(),
            limit: Limit::default(),
        }
    }

    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }
    pub fn requests(&self) -> &VcpuRequests {
        &self.requests
    }
    pub fn limit(&self) -> &Limit {
        &self.limit
    }
    pub fn run(&self) -> &RunPage {
        &self.run
    }
    pub fn lapic(&self) -> Option<&Arc<Lapic>> {
        self.lapic.as_ref()
    }
    pub fn cpuid(&self) -> arc_swap::Guard<Arc<GuestCpuid>> {
        self.cpuid.load()
    }
    pub fn paravirt(&self) -> MutexGuard<'_, Paravirt> {
        lock(&self.paravirt)
    }
    pub fn mce(&self) -> MutexGuard<'_, MachineCheck> {
        lock(&self.mce)
    }
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz.load(Ordering::Relaxed)
    }
    pub fn store_tsc_khz(&self, khz: u32) {
        self.tsc_khz.store(khz, Ordering::Relaxed);
    }
    pub fn set_enforce_features(&self, on: bool) {
        self.enforce_features.store(on, Ordering::Relaxed);
    }
    pub fn set_report_tpr(&self, on: bool) {
        self.report_tpr.store(on, Ordering::Relaxed);
    }

    /// A new CPUID: the local APIC's features depend on it.
    pub fn set_cpuid(&self, cpuid: GuestCpuid) {
        if let Some(lapic) = &self.lapic {
            lapic.set_features(CpuFeatures {
                x2apic: cpuid.table().has(feature::X2APIC),
                tsc_deadline: cpuid.table().has(feature::TSC_DEADLINE),
                maxphyaddr: cpuid.table().phys_bits(),
                intel_compatible: !cpuid.table().is_amd(),
            });
        }
        self.cpuid.store(Arc::new(cpuid));
    }

    /// Whether the guest may use a paravirtual feature (`guest_pv_has`).
    pub fn guest_may_use(&self, feature: u32) -> bool {
        !self.enforce_features.load(Ordering::Relaxed) || self.cpuid().has_kvm_feature(feature)
    }

    /// KVM_REQ_CLOCK_UPDATE: before the guest goes on.
    pub fn request_clock_update(&self) {
        self.vm.clock_pages.request();
        self.requests.kick.requests().set(OWNER);
    }

    /// Whether the guest's kvmclock page shows a time that is never so for long: the TSC alone cannot tell
    /// the time.
    pub fn clock_is_stale(&self) -> bool {
        self.uses_clock.load(Ordering::Relaxed) && !self.vm.clock().host().stable
    }
    /// Where stolen time can be measured: by this.
    pub fn set_run_delay(&self, delay: Arc<RunDelay>) {
        let _ = self.run_delay.set(delay);
    }
    /// Stolen time, if the guest wants to know and it is measured.
    pub fn run_delay(&self) -> Option<&RunDelay> {
        if !self.uses_steal_time() {
            return None;
        }
        self.run_delay.get().map(|delay| &**delay)
    }
    /// The guest has, or no longer has, a page for stolen time.
    pub fn set_uses_steal_time(&self, on: bool) {
        self.uses_steal_time.store(on, Ordering::Relaxed);
        if on {
            self.requests.request_steal_update();
            self.requests.kick.requests().set(OWNER);
        }
    }
    /// Whether it has one.
    pub fn uses_steal_time(&self) -> bool {
        self.uses_steal_time.load(Ordering::Relaxed)
    }

    /// The guest has, or no longer has, a kvmclock page.
    pub fn set_uses_clock(&self, on: bool) {
        self.uses_clock.store(on, Ordering::Relaxed);
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        match &self.lapic {
            Some(lapic) => lapic.base(),
            None => self.apic_base.load(Ordering::Relaxed),
        }
    }

    /// Whether IA32_APIC_BASE may become this (`kvm_set_apic_base`).
    pub fn check_apic_base(&self, value: u64, access: Access) -> MsrAccess<()> {
        let cpuid = self.cpuid();
        let x2apic = !cpuid.is_set() || cpuid.table().has(feature::X2APIC);
        let mut reserved = cpuid.reserved_gpa_bits() | 0x2ff;
        if !x2apic {
            reserved |= APIC_BASE_X2APIC;
        }
        let mode = |v: u64| (v & APIC_BASE_ENABLE != 0, v & APIC_BASE_X2APIC != 0);
        let bad_transition = access == Access::Guest
            && matches!(
                (mode(self.apic_base()), mode(value)),
                ((false, false), (true, true)) | ((true, true), (true, false))
            );
        if value & reserved != 0 || mode(value) == (false, true) || bad_transition {
            return Err(MsrError::Invalid);
        }
        Ok(())
    }

    /// Writes IA32_APIC_BASE.
    pub fn set_apic_base(&self, value: u64, access: Access) -> MsrAccess<()> {
        self.check_apic_base(value, access)?;
        match &self.lapic {
            Some(lapic) => lapic
                .set_base(value, access == Access::Host)
                .map_err(|_| MsrError::Invalid)?,
            None => self.apic_base.store(value, Ordering::Relaxed),
        }
        Ok(())
    }

    /// Sets CR8 without an exit; the upper bits are dropped.
    pub fn store_cr8(&self, value: u64) {
        match &self.lapic {
            Some(lapic) => lapic.set_cr8(value & 15),
            None => self.cr8.store(value & 15, Ordering::Relaxed),
        }
    }

    /// Whether the VM has the PIC pair, so that user space injects nothing.
    pub fn pic_in_kernel(&self) -> bool {
        self.vm
            .irqchip()
            .is_some_and(|chip| chip.mode() == ChipMode::Full)
    }

    /// Whether an interrupt from user space would reach this vCPU now, RFLAGS.IF and the shadow
    /// apart (`kvm_cpu_accept_dm_intr`).
    pub fn accepts_user_interrupt(&self) -> bool {
        match &self.lapic {
            None => true,
            Some(lapic) => lapic.accepts_pic_intr() && lapic.external_interrupt().is_none(),
        }
    }

    /// What a guest's refused MSR access becomes (KVM_CAP_X86_USER_SPACE_MSR).
    fn refuse<T>(&self, reason: u32) -> MsrResult<T> {
        if self.vm.enabled().user_space_msr() & reason != 0 {
            MsrResult::UserSpace(reason)
        } else {
            MsrResult::Fault
        }
    }

    fn msr_result<T>(&self, result: MsrAccess<T>) -> MsrResult<T> {
        match result {
            Ok(value) => MsrResult::Done(value),
            Err(MsrError::Unknown) => self.refuse(KVM_MSR_EXIT_REASON_UNKNOWN),
            Err(MsrError::Invalid) => self.refuse(KVM_MSR_EXIT_REASON_INVAL),
        }
    }

    /// The APIC timer's interrupt, if it is due. Only within KVM_RUN: what is due stays so meanwhile.
    pub fn deliver_timer(&self) {
        if let Some(lapic) = &self.lapic {
            lapic.deliver_timer();
        }
    }

    /// Offset in the local APIC's page, if the address is there.
    fn apic_offset(&self, gpa: u64) -> Option<(&Lapic, u32)> {
        let lapic = self.lapic.as_deref()?;
        let offset = gpa.wrapping_sub(lapic.mmio_base());
        (offset < PAGE).then_some((lapic, offset as u32))
    }

    fn note_tpr_access(&self, s: &CpuState, offset: u32, is_write: bool) {
        if offset == APIC_TASKPRI && self.report_tpr.load(Ordering::Relaxed) {
            self.requests.note_tpr_access(s.rip(), is_write);
        }
    }
}

impl Machine for VcpuMachine {
    fn pio_read(&self, port: u16, data: &mut [u8]) -> bool {
        self.vm
            .irqchip()
            .is_some_and(|chip| chip.pio_read(port, data))
    }
    fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        self.vm
            .irqchip()
            .is_some_and(|chip| chip.pio_write(port, data))
            || self.vm.pio_written(port, data)
    }
    fn mmio_read(&self, s: &CpuState, gpa: u64, data: &mut [u8]) -> bool {
        if let Some((lapic, offset)) = self.apic_offset(gpa)
            && lapic.mmio_read(offset, data)
        {
            self.note_tpr_access(s, offset, false);
            return true;
        }
        self.vm
            .irqchip()
            .is_some_and(|chip| chip.mmio_read(gpa, data))
    }
    fn mmio_write(&self, s: &CpuState, gpa: u64, data: &[u8]) -> bool {
        if let Some((lapic, offset)) = self.apic_offset(gpa)
            && lapic.mmio_write(offset, data)
        {
            self.note_tpr_access(s, offset, true);
            return true;
        }
        self.vm
            .irqchip()
            .is_some_and(|chip| chip.mmio_write(gpa, data))
            || self.vm.mmio_written(gpa, data)
    }

    fn interrupt_pending(&self) -> bool {
        match (&self.lapic, self.vm.irqchip()) {
            (Some(lapic), Some(chip)) => chip.has_interrupt(lapic),
            _ => false,
        }
    }
    fn acknowledge_interrupt(&self) -> Option<u8> {
        match (&self.lapic, self.vm.irqchip()) {
            (Some(lapic), Some(chip)) => chip.ack_interrupt(lapic),
            _ => None,
        }
    }
    fn wants_interrupt_window(&self) -> bool {
        self.run.request_interrupt_window() != 0
            && !self.pic_in_kernel()
            && self.accepts_user_interrupt()
    }
    fn read_cr8(&self) -> u64 {
        match &self.lapic {
            Some(lapic) => lapic.cr8(),
            None => self.cr8.load(Ordering::Relaxed),
        }
    }
    fn write_cr8(&self, value: u64) -> bool {
        let lowered = self.lapic.is_none() && value < self.cr8.load(Ordering::Relaxed);
        self.store_cr8(value);
        lowered
    }

    fn read_msr(&self, state: &CpuState, index: u32) -> MsrResult<u64> {
        self.msr_result(msr::read(self, state, index, Access::Guest))
    }
    fn write_msr(&self, state: &mut CpuState, index: u32, value: u64) -> MsrResult<()> {
        if let Some(done) = self
            .vm
            .write_xen_hypercall_page(index, value, state.long_mode())
        {
            return self.msr_result(if done { Ok(()) } else { Err(MsrError::Invalid) });
        }
        self.msr_result(msr::write(self, state, index, value, Access::Guest))
    }
    fn msr_refused(&self, _: u32, _: bool) -> MsrResult<()> {
        self.msr_result(Err(MsrError::Invalid))
    }
    fn msr_filter(&self, index: u32, write: bool) -> MsrResult<()> {
        if !self.vm.msr_allowed(index, write) {
            self.refuse(KVM_MSR_EXIT_REASON_FILTER)
        } else if index == PLATFORM_INFO && !write && !self.vm.enabled().msr_platform_info() {
            self.refuse(KVM_MSR_EXIT_REASON_INVAL)
        } else {
            MsrResult::Done(())
        }
    }

    fn has_quirk(&self, quirk: Quirk) -> bool {
        self.vm.enabled().has_quirk(match quirk {
            Quirk::MwaitNeverFaults => KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS,
            Quirk::MwaitOfCpuid => KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT,
            Quirk::Out7eRetires => KVM_X86_QUIRK_OUT_7E_INC_RIP,
            Quirk::FixHypercall => KVM_X86_QUIRK_FIX_HYPERCALL_INSN,
        })
    }

    fn hypercall(&self, state: &mut CpuState, nr: u64, args: [u64; 5]) -> Hypercall {
        self.do_hypercall(state, nr, args)
    }

    fn take_ioapic_eoi(&self) -> Option<u8> {
        self.requests.take_ioapic_eoi()
    }

    fn count_time(&self, done: u64) -> Option<CountedTime> {
        self.count(done)
    }

    fn collect_events(&self, state: &mut CpuState) {
        self.deliver_timer();
        collect_events(&self.requests, state);
    }
}

/// Takes NMIs and SMIs that arrived into the event state (`process_nmi`, `process_smi`): while an NMI
/// is being handled one more is remembered, else two.
pub(crate) fn collect_events(requests: &VcpuRequests, state: &mut CpuState) {
    let arrived = requests.take_nmis();
    let e = &mut state.events;
    if arrived != 0 {
        let limit = if e.nmi_masked || e.nmi_injected { 1 } else { 2 };
        let waiting = u32::from(e.nmi_pending).saturating_add(arrived).min(limit);
        e.nmi_pending = waiting as u8;
    }
    if requests.take_smi() {
        e.smi_pending = true;
    }
}
