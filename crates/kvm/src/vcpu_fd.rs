//! The public handle of a vCPU, with the methods of the kvm-ioctls crate's `VcpuFd`. Section numbers
//! are the KVM API document's.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use anykvm_abi::{
    CpuId, KVM_EXIT_DEBUG, KVM_EXIT_EXCEPTION, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT,
    KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN,
    KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_NMI, KVM_EXIT_SET_TPR,
    KVM_EXIT_SHUTDOWN, KVM_EXIT_TPR_ACCESS, KVM_EXIT_UNKNOWN, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, Msrs, Plain,
    kvm_debug_exit_arch, kvm_debugregs, kvm_enable_cap, kvm_fpu, kvm_guest_debug, kvm_lapic_state,
    kvm_mp_state, kvm_regs, kvm_sregs, kvm_sregs2, kvm_sync_regs, kvm_translation, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};

use crate::dirty_ring::Collector;
use crate::error::{Errno, Result};
use crate::run_page::{PIO_BYTES, RunPage, sync};
use crate::stats::StatsFile;
use crate::vcpu::{KickHandle, Vcpu};
use crate::vcpu_exit::{HypercallExit, MsrExitReason, ReadMsrExit, VcpuExit, WriteMsrExit};
use crate::xsave;

/// A group of registers that the run page can carry (section 5, `kvm_valid_regs`).
#[repr(u32)]
#[derive(Clone, Copy, Debug)]
pub enum SyncReg {
    /// General registers.
    Register = KVM_SYNC_X86_REGS,
    /// System registers.
    SystemRegister = KVM_SYNC_X86_SREGS,
    /// Events.
    VcpuEvents = KVM_SYNC_X86_EVENTS,
}

/// What the caller's answer to the last exit is to be handed to, before the next run.
#[derive(Clone, Copy, Debug)]
enum Answer {
    None,
    Port(usize),
    Mmio(usize),
    Msr,
    Hypercall,
}

/// A virtual processor.
pub struct VcpuFd {
    vcpu: Arc<Vcpu>,
    answer: Answer,
    /// The data of port I/O and MMIO exits, lent to the caller.
    data: Box<[u8; PIO_BYTES]>,
    /// The value of MSR and hypercall exits, lent to the caller.
    word: u64,
    error: u8,
    /// Synchronised registers that the caller has asked to change.
    sync: Option<Box<kvm_sync_regs>>,
    /// The caller's side of the dirty ring.
    pub(crate) collector: Option<Collector>,
}

impl From<Arc<Vcpu>> for VcpuFd {
    fn from(vcpu: Arc<Vcpu>) -> Self {
        Self {
            vcpu,
            answer: Answer::None,
            data: Box::new([0; PIO_BYTES]),
            word: 0,
            error: 0,
            sync: None,
            collector: None,
        }
    }
}

impl std::fmt::Debug for VcpuFd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuFd")
            .field("id", &self.vcpu.id())
            .finish_non_exhaustive()
    }
}

impl AsFd for VcpuFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.vcpu.fd()
    }
}

impl AsRawFd for VcpuFd {
    fn as_raw_fd(&self) -> RawFd {
        self.vcpu.fd().as_raw_fd()
    }
}

impl VcpuFd {
    fn page(&self) -> &RunPage {
        self.vcpu.machine().run()
    }

    /// The object behind it, which other threads may use too.
    pub fn vcpu(&self) -> &Arc<Vcpu> {
        &self.vcpu
    }

    /// A handle by which any thread or signal handler ends [`Self::run`] with EINTR.
    pub fn kick_handle(&self) -> KickHandle {
        self.vcpu.kick_handle()
    }

    /// The registers, events and the instruction at RIP, readable.
    pub fn dump(&self) -> String {
        self.vcpu.dump()
    }

    /// Exits by reason, instructions and the like.
    pub fn stats(&self) -> &Arc<StatsFile> {
        self.vcpu.stats()
    }

    /// KVM_GET_REGS (4.11): the general registers.
    pub fn get_regs(&self) -> Result<kvm_regs> {
        Ok(self.vcpu.regs())
    }
    /// KVM_SET_REGS (4.12).
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.vcpu.set_regs(regs)
    }
    /// KVM_GET_SREGS (4.13): segments, control registers, APIC base.
    pub fn get_sregs(&self) -> Result<kvm_sregs> {
        Ok(self.vcpu.sregs())
    }
    /// KVM_SET_SREGS (4.14). EINVAL, and nothing changed, for a state the processor cannot be in.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()> {
        self.vcpu.set_sregs(sregs)
    }
    /// KVM_GET_SREGS2 (4.131): with the page-directory pointers.
    pub fn get_sregs2(&self) -> Result<kvm_sregs2> {
        Ok(self.vcpu.sregs2())
    }
    /// KVM_SET_SREGS2 (4.132).
    pub fn set_sregs2(&self, sregs: &kvm_sregs2) -> Result<()> {
        self.vcpu.set_sregs2(sregs)
    }
    /// KVM_GET_FPU (4.22): x87 and SSE.
    pub fn get_fpu(&self) -> Result<kvm_fpu> {
        Ok(self.vcpu.fpu())
    }
    /// KVM_SET_FPU (4.23).
    pub fn set_fpu(&self, fpu: &kvm_fpu) -> Result<()> {
        self.vcpu.set_fpu(fpu)
    }
    /// KVM_GET_XSAVE (4.42): the XSAVE area. No component of this processor lies outside it, so it is
    /// all that KVM_GET_XSAVE2 returns too.
    pub fn get_xsave(&self) -> Result<kvm_xsave> {
        let area = self.vcpu.xsave();
        let mut out = kvm_xsave::default();
        for (word, bytes) in out.region.iter_mut().zip(area.chunks_exact(4)) {
            *word = u32::from_bytes(bytes).unwrap_or_default();
        }
        Ok(out)
    }
    /// KVM_SET_XSAVE (4.43).
    pub fn set_xsave(&self, from: &kvm_xsave) -> Result<()> {
        let mut area = [0; xsave::REGION];
        for (bytes, word) in area.chunks_exact_mut(4).zip(&from.region) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        self.vcpu.set_xsave(&area)
    }
    /// KVM_GET_XCRS (4.44).
    pub fn get_xcrs(&self) -> Result<kvm_xcrs> {
        Ok(self.vcpu.xcrs())
    }
    /// KVM_SET_XCRS (4.45).
    pub fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<()> {
        self.vcpu.set_xcrs(xcrs)
    }
    /// KVM_GET_DEBUGREGS (4.33).
    pub fn get_debug_regs(&self) -> Result<kvm_debugregs> {
        Ok(self.vcpu.debugregs())
    }
    /// KVM_SET_DEBUGREGS (4.34).
    pub fn set_debug_regs(&self, debug_regs: &kvm_debugregs) -> Result<()> {
        self.vcpu.set_debugregs(debug_regs)
    }
    /// KVM_GET_VCPU_EVENTS (4.31): pending and injected exceptions, interrupts, NMIs, the shadow.
    pub fn get_vcpu_events(&self) -> Result<kvm_vcpu_events> {
        Ok(self.vcpu.vcpu_events())
    }
    /// KVM_SET_VCPU_EVENTS (4.32).
    pub fn set_vcpu_events(&self, vcpu_events: &kvm_vcpu_events) -> Result<()> {
        self.vcpu.set_vcpu_events(vcpu_events)
    }
    /// KVM_GET_MP_STATE (4.38).
    pub fn get_mp_state(&self) -> Result<kvm_mp_state> {
        Ok(kvm_mp_state {
            mp_state: self.vcpu.mp_state(),
        })
    }
    /// KVM_SET_MP_STATE (4.39).
    pub fn set_mp_state(&self, mp_state: kvm_mp_state) -> Result<()> {
        self.vcpu.set_mp_state(mp_state.mp_state)
    }
    /// KVM_SET_CPUID2 (4.63).
    pub fn set_cpuid2(&self, cpuid: &CpuId) -> Result<()> {
        self.vcpu.set_cpuid2(cpuid.as_slice().to_vec())
    }
    /// KVM_GET_CPUID2: E2BIG if there are more than `num_entries`.
    pub fn get_cpuid2(&self, num_entries: usize) -> Result<CpuId> {
        let entries = self.vcpu.cpuid2();
        if entries.len() > num_entries {
            return Err(Errno::E2BIG);
        }
        CpuId::from_entries(&entries).map_err(|_| Errno::ENOMEM)
    }
    /// KVM_GET_MSRS (4.18): fills in values up to the first MSR there is not; how many.
    pub fn get_msrs(&self, msrs: &mut Msrs) -> Result<usize> {
        Ok(self.vcpu.msrs(msrs.as_mut_slice()))
    }
    /// KVM_SET_MSRS (4.19): writes up to the first that is refused; how many.
    pub fn set_msrs(&self, msrs: &Msrs) -> Result<usize> {
        Ok(self.vcpu.set_msrs(msrs.as_slice()))
    }
    /// KVM_GET_LAPIC (4.57). EINVAL without an in-kernel local APIC.
    pub fn get_lapic(&self) -> Result<kvm_lapic_state> {
        self.vcpu.lapic_state()
    }
    /// KVM_SET_LAPIC (4.58).
    pub fn set_lapic(&self, klapic: &kvm_lapic_state) -> Result<()> {
        self.vcpu.set_lapic_state(klapic)
    }
    /// KVM_SET_GUEST_DEBUG (4.87): single-stepping and breakpoints.
    pub fn set_guest_debug(&self, debug_struct: &kvm_guest_debug) -> Result<()> {
        self.vcpu.set_guest_debug(debug_struct)
    }
    /// KVM_TRANSLATE (4.15): a linear address through the current paging mode.
    pub fn translate_gva(&self, gva: u64) -> Result<kvm_translation> {
        Ok(self.vcpu.translate(gva))
    }
    /// KVM_INTERRUPT (4.16): injects an external interrupt.
    pub fn interrupt(&self, vector: u32) -> Result<()> {
        self.vcpu.interrupt(vector)
    }
    /// KVM_NMI (4.64).
    pub fn nmi(&self) -> Result<()> {
        self.vcpu.nmi();
        Ok(())
    }
    /// KVM_SMI (4.96).
    pub fn smi(&self) -> Result<()> {
        self.vcpu.smi();
        Ok(())
    }
    /// KVM_KVMCLOCK_CTRL (4.67): tells the guest that it was stopped. EINVAL if it has no kvmclock.
    pub fn kvmclock_ctrl(&self) -> Result<()> {
        self.vcpu.kvmclock_ctrl()
    }
    /// KVM_GET_TSC_KHZ (4.56).
    pub fn get_tsc_khz(&self) -> Result<u32> {
        Ok(self.vcpu.tsc_khz())
    }
    /// KVM_SET_TSC_KHZ (4.55).
    pub fn set_tsc_khz(&self, freq: u32) -> Result<()> {
        self.vcpu.set_tsc_khz(freq)
    }
    /// KVM_ENABLE_CAP (4.37) on the vCPU.
    pub fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()> {
        self.vcpu.enable_cap(cap)
    }

    /// `kvm_run.immediate_exit`: if not 0 the next run completes pending I/O and returns EINTR.
    pub fn set_kvm_immediate_exit(&mut self, val: u8) {
        self.page().set_immediate_exit(val);
    }
    /// `kvm_run.request_interrupt_window`.
    pub fn set_kvm_request_interrupt_window(&mut self, val: u8) {
        self.page().set_request_interrupt_window(val);
    }
    /// `kvm_run.ready_for_interrupt_injection`.
    pub fn ready_for_interrupt_injection(&self) -> bool {
        self.page().ready_for_interrupt_injection() != 0
    }
    /// `kvm_run.if_flag`: the guest's RFLAGS.IF when the last run returned.
    pub fn if_flag(&self) -> bool {
        self.page().if_flag() != 0
    }
    /// `kvm_run.cr8`.
    pub fn kvm_cr8(&self) -> u64 {
        self.page().cr8()
    }
    /// Sets `kvm_run.cr8`, which the next run loads if there is no in-kernel local APIC.
    pub fn set_kvm_cr8(&mut self, cr8: u64) {
        self.page().set_cr8(cr8);
    }

    /// From now on every run leaves these registers in [`Self::sync_regs`].
    pub fn set_sync_valid_reg(&mut self, reg: SyncReg) {
        let bits = self.page().kvm_valid_regs() | reg as u64;
        self.page().set_kvm_valid_regs(bits);
    }
    /// Undoes [`Self::set_sync_valid_reg`].
    pub fn clear_sync_valid_reg(&mut self, reg: SyncReg) {
        let bits = self.page().kvm_valid_regs() & !(reg as u64);
        self.page().set_kvm_valid_regs(bits);
    }
    /// The next run loads these registers from [`Self::sync_regs_mut`].
    pub fn set_sync_dirty_reg(&mut self, reg: SyncReg) {
        let bits = self.page().kvm_dirty_regs() | reg as u64;
        self.page().set_kvm_dirty_regs(bits);
    }
    /// Undoes [`Self::set_sync_dirty_reg`].
    pub fn clear_sync_dirty_reg(&mut self, reg: SyncReg) {
        let bits = self.page().kvm_dirty_regs() & !(reg as u64);
        self.page().set_kvm_dirty_regs(bits);
    }
    /// The synchronised registers.
    pub fn sync_regs(&self) -> kvm_sync_regs {
        match &self.sync {
            Some(changed) => **changed,
            None => kvm_sync_regs {
                regs: self.page().sync_read(sync::REGS),
                sregs: self.page().sync_read(sync::SREGS),
                events: self.page().sync_read(sync::EVENTS),
            },
        }
    }
    /// The synchronised registers, to be changed before the next run.
    pub fn sync_regs_mut(&mut self) -> &mut kvm_sync_regs {
        let now = self.sync_regs();
        self.sync.get_or_insert_with(|| Box::new(now))
    }

    /// KVM_RUN (4.10): runs the guest until something needs the caller. Data lent in the last exit is
    /// handed to the guest first. EINTR after a kick or with `immediate_exit`; EAGAIN for an application
    /// processor that has just received INIT.
    pub fn run(&mut self) -> Result<VcpuExit<'_>> {
        self.hand_over();
        self.vcpu.run()?;
        Ok(self.exit())
    }

    /// [`Self::run`] by count, in a VM whose time is counted ([`crate::Kvm::create_vm_with_counted_time`]; EINVAL else): at most
    /// `turns` turns (an instruction, an iteration of a REP instruction, a fault made pending, the delivery
    /// of an event), and not past `until_ns` on the VM's clock. When they are over it ends with EINTR, as
    /// by a signal: with nothing half done, and a state that can be read out and put into another vCPU.
    /// What the last exit left half done is completed first, even with 0 turns. EAGAIN for a vCPU that
    /// waits: it is the caller's to let other vCPUs run, or time pass ([`crate::VmFd::skip_to_next_timer`]).
    pub fn run_counted(&mut self, turns: u64, until_ns: u64) -> Result<VcpuExit<'_>> {
        self.hand_over();
        self.vcpu.run_counted(turns, until_ns)?;
        Ok(self.exit())
    }

    fn hand_over(&mut self) {
        let page = self.vcpu.machine().run();
        match std::mem::replace(&mut self.answer, Answer::None) {
            Answer::None => {}
            Answer::Port(n) => page.write_pio(&self.data[..n]),
            Answer::Mmio(n) => {
                let mut word = [0; 8];
                word[..n].copy_from_slice(&self.data[..n]);
                page.set_mmio_data(u64::from_le_bytes(word));
            }
            Answer::Msr => {
                page.set_msr_error(self.error);
                page.set_msr_data(self.word);
            }
            Answer::Hypercall => page.set_hypercall_ret(self.word),
        }
        if let Some(changed) = self.sync.take() {
            page.sync_write(sync::REGS, &changed.regs);
            page.sync_write(sync::SREGS, &changed.sregs);
            page.sync_write(sync::EVENTS, &changed.events);
        }
    }

    /// The exit that the run page describes.
    fn exit(&mut self) -> VcpuExit<'_> {
        let page = self.vcpu.machine().run();
        match page.exit_reason() {
            KVM_EXIT_UNKNOWN => VcpuExit::Unknown,
            KVM_EXIT_EXCEPTION => VcpuExit::Exception,
            KVM_EXIT_IO => {
                let port = page.io_port();
                let n = (usize::from(page.io_size()) * page.io_count() as usize).min(PIO_BYTES);
                let data = &mut self.data[..n];
                page.read_pio(data);
                if u32::from(page.io_direction()) == KVM_EXIT_IO_IN {
                    self.answer = Answer::Port(n);
                    VcpuExit::IoIn(port, data)
                } else {
                    VcpuExit::IoOut(port, data)
                }
            }
            KVM_EXIT_MMIO => {
                let address = page.mmio_phys_addr();
                let n = (page.mmio_len() as usize).min(8);
                let data = &mut self.data[..n];
                data.copy_from_slice(&page.mmio_data().to_le_bytes()[..n]);
                if page.mmio_is_write() != 0 {
                    VcpuExit::MmioWrite(address, data)
                } else {
                    self.answer = Answer::Mmio(n);
                    VcpuExit::MmioRead(address, data)
                }
            }
            KVM_EXIT_HYPERCALL => {
                self.answer = Answer::Hypercall;
                self.word = page.hypercall_ret();
                VcpuExit::Hypercall(HypercallExit {
                    nr: page.hypercall_nr(),
                    args: std::array::from_fn(|i| page.hypercall_arg(i)),
                    ret: &mut self.word,
                    longmode: page.hypercall_flags() as u32,
                })
            }
            KVM_EXIT_X86_RDMSR => {
                self.answer = Answer::Msr;
                (self.error, self.word) = (page.msr_error(), page.msr_data());
                VcpuExit::X86Rdmsr(ReadMsrExit {
                    error: &mut self.error,
                    reason: MsrExitReason::from_bits_truncate(page.msr_reason()),
                    index: page.msr_index(),
                    data: &mut self.word,
                })
            }
            KVM_EXIT_X86_WRMSR => {
                self.answer = Answer::Msr;
                (self.error, self.word) = (page.msr_error(), page.msr_data());
                VcpuExit::X86Wrmsr(WriteMsrExit {
                    error: &mut self.error,
                    reason: MsrExitReason::from_bits_truncate(page.msr_reason()),
                    index: page.msr_index(),
                    data: self.word,
                })
            }
            KVM_EXIT_DEBUG => VcpuExit::Debug(kvm_debug_exit_arch {
                exception: page.debug_exception(),
                pad: 0,
                pc: page.debug_pc(),
                dr6: page.debug_dr6(),
                dr7: page.debug_dr7(),
            }),
            KVM_EXIT_HLT => VcpuExit::Hlt,
            KVM_EXIT_IRQ_WINDOW_OPEN => VcpuExit::IrqWindowOpen,
            KVM_EXIT_SHUTDOWN => VcpuExit::Shutdown,
            KVM_EXIT_FAIL_ENTRY => {
                VcpuExit::FailEntry(page.fail_entry_reason(), page.fail_entry_cpu())
            }
            KVM_EXIT_INTR => VcpuExit::Intr,
            KVM_EXIT_SET_TPR => VcpuExit::SetTpr,
            KVM_EXIT_TPR_ACCESS => VcpuExit::TprAccess,
            KVM_EXIT_NMI => VcpuExit::Nmi,
            KVM_EXIT_INTERNAL_ERROR => VcpuExit::InternalError,
            KVM_EXIT_IOAPIC_EOI => VcpuExit::IoapicEoi(page.eoi_vector()),
            reason => VcpuExit::Unsupported(reason),
        }
    }
}
