//! KVM_RUN (KVM API, sections 4.10 and 5): completes what the last exit left open, then runs the guest
//! until something needs the VMM.
//!
//! The order is Linux's (`kvm_arch_vcpu_ioctl_run`): registers that the VMM changed through the run
//! page, CR8, the pending I/O; only then `immediate_exit` and kicks; then the guest. On every way out
//! the run page gets the interrupt flags, CR8, the APIC base and the registers asked for.

use anykvm_abi::{
    KVM_EXIT_DEBUG, KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT,
    KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO,
    KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN, KVM_EXIT_TPR_ACCESS, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_MEMORY_EXIT_FLAG_PRIVATE,
    KVM_RUN_X86_SMM, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS,
    KVM_X86_DISABLE_EXITS_HLT, kvm_regs, kvm_sregs, kvm_vcpu_events,
};
use anykvm_cpu::events::MpState;
use anykvm_cpu::exit::{Direction, InternalError};
use anykvm_cpu::memory::PAGE;
use anykvm_cpu::memory::dirty::DirtyRing;
use anykvm_cpu::requests::{EVENT, KICK, OWNER, PAUSE};
use anykvm_cpu::state::rflags;
use anykvm_cpu::{Exit, Machine};

use crate::error::{Errno, Result};
use crate::run_page::{PIO_BYTES, PIO_DATA, sync};
use crate::vcpu::{Core, Vcpu};
use crate::vcpu_stats::VcpuStat;
use crate::{registers, vcpu_stats};

/// What the VMM's answer to the last exit is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completion {
    /// Nothing to hand over.
    None,
    /// Port input: this many bytes of the data page.
    PortIn(usize),
    /// MMIO read: this many bytes of `mmio.data`.
    MmioRead(usize),
    /// RDMSR: `msr.error` and `msr.data`.
    MsrRead,
    /// WRMSR: `msr.error`.
    MsrWrite,
    /// `hypercall.ret`.
    Hypercall,
    /// A store to a private page that there was not.
    PrivateStore { gpa: u64, len: u8, data: [u8; 8] },
}

/// KVM_SYNC_X86_VALID_FIELDS.
pub(crate) const SYNC_FIELDS: u64 =
    (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS) as u64;

/// KVM_RUN goes on in the guest, or returns this exit reason.
enum Next {
    Guest,
    User(u32),
}

impl Vcpu {
    /// KVM_RUN.
    pub fn run(&self) -> Result<()> {
        let mut core = self.lock();
        let page = self.machine().run();
        page.set_flags(0);
        let immediate = page.immediate_exit() != 0;
        let result = self.enter(&mut core, immediate);
        match result {
            Ok(reason) => page.set_exit_reason(reason),
            // What user space was told last stays readable while it has I/O completed (Linux, too,
            // writes the reason only when a signal ends the loop).
            Err(Errno::EINTR) if immediate => self.count(VcpuStat::SignalExits),
            Err(Errno::EINTR) => {
                page.set_exit_reason(KVM_EXIT_INTR);
                self.count(VcpuStat::SignalExits);
            }
            Err(_) => {}
        }
        self.machine().pause_stolen_time();
        if result == Err(Errno::EINTR)
            && !core.cpu.io.pending()
            && core.completion == Completion::None
        {
            self.mark_preempted();
        }
        self.save_to_page(&mut core);
        result.map(|_| ())
    }

    /// `immediate`: `kvm_run.immediate_exit` at entry.
    fn enter(&self, core: &mut Core, immediate: bool) -> Result<u32> {
        let page = self.machine().run();
        if core.cpu.state.events.mp_state == MpState::Uninitialized {
            return self.wait_for_init(core);
        }
        if (page.kvm_valid_regs() | page.kvm_dirty_regs()) & !SYNC_FIELDS != 0 {
            return Err(Errno::EINVAL);
        }
        if page.kvm_dirty_regs() != 0 {
            self.load_from_page(core)?;
        }
        if self.machine().lapic().is_none() {
            let cr8 = page.cr8();
            if cr8 > 15 {
                return Err(Errno::EINVAL);
            }
            self.machine().store_cr8(cr8);
        }
        self.hand_over(core)?;
        if self.vm().time.is_counted() {
            self.vm().events.look();
        }
        if immediate || self.kick().requests().pending() & KICK != 0 {
            if !core.cpu.io.pending() {
                self.kick().requests().take(KICK);
                core.cpu.new_epoch();
                return Err(Errno::EINTR);
            }
            // The processor completes the instruction, then sees the request.
            self.kick().requests().set(KICK);
        }
        if page.request_interrupt_window() != 0 {
            self.kick().requests().set(EVENT);
        }
        core.has_run = true;
        self.machine().look_at_stolen_time();
        loop {
            self.accept_apic_events(core);
            if core.cpu.state.events.mp_state != MpState::Runnable {
                self.block(core)?;
                continue;
            }
            if self.dirty_ring().is_some_and(DirtyRing::soft_full) {
                if !core.cpu.io.pending() {
                    return Ok(KVM_EXIT_DIRTY_RING_FULL);
                }
                // The processor completes the instruction, then sees the request.
                self.kick().requests().set(OWNER);
            }
            self.before_entry(core);
            let exit = if self.vm().time.is_counted() {
                core.cpu.run_counted(self.machine().limit().turns())
            } else {
                core.cpu.run(u64::MAX)
            };
            if let Next::User(reason) = self.handle_exit(core, exit)? {
                return Ok(reason);
            }
        }
    }

    /// Gives the processor what the VMM answered.
    fn hand_over(&self, core: &mut Core) -> Result<()> {
        let page = self.machine().run();
        let cpu = &mut core.cpu;
        match std::mem::replace(&mut core.completion, Completion::None) {
            Completion::None => {}
            Completion::PortIn(n) => page.read_pio(&mut cpu.io.data[..n.min(PIO_BYTES)]),
            Completion::MmioRead(n) => {
                cpu.complete_mmio_read(&page.mmio_data().to_le_bytes()[..n.min(8)]);
            }
            Completion::MsrRead | Completion::MsrWrite => {
                let value = page.msr_data();
                cpu.complete_msr((page.msr_error() == 0).then_some(value));
            }
            Completion::Hypercall => cpu.complete_hypercall(page.hypercall_ret()),
            Completion::PrivateStore { gpa, len, data } => {
                let data_bytes = &data[..usize::from(len).min(8)];
                if self.vm().memory().write(gpa, data_bytes).is_err() {
                    core.completion = Completion::PrivateStore { gpa, len, data };
                    return Err(self.report_private_page(gpa));
                }
            }
        }
        Ok(())
    }

    /// The guest does not go on for now, and is between two instructions.
    fn mark_preempted(&self) {
        if self.machine().mark_preempted() {
            self.count(VcpuStat::PreemptionReported);
        }
    }

    /// What is looked at each time the guest is entered.
    fn before_entry(&self, core: &mut Core) {
        let machine = self.machine();
        self.vm().write_clock_pages();
        if machine.clock_is_stale() {
            machine.write_clock_page();
        }
        if machine.record_stolen_time() {
            self.count(VcpuStat::TlbFlushes);
        }
        if core.vapic_addr != 0 {
            self.sync_vapic(core);
        }
    }

    fn handle_exit(&self, core: &mut Core, exit: Exit) -> Result<Next> {
        let page = self.machine().run();
        let state = &core.cpu.state;
        let reason = match exit {
            Exit::Io {
                direction,
                size,
                port,
                count,
            } => {
                let n = (usize::from(size) * count as usize).min(PIO_BYTES);
                page.set_io_size(size);
                page.set_io_port(port);
                page.set_io_count(count);
                page.set_io_data_offset(PIO_DATA as u64);
                match direction {
                    Direction::In => {
                        page.set_io_direction(KVM_EXIT_IO_IN as u8);
                        core.completion = Completion::PortIn(n);
                    }
                    Direction::Out => {
                        page.set_io_direction(KVM_EXIT_IO_OUT as u8);
                        page.write_pio(&core.cpu.io.data[..n]);
                    }
                }
                self.count(VcpuStat::IoExits);
                KVM_EXIT_IO
            }
            // A private page that there is not: the instruction begins anew, or, of a store, which has retired, the
            // data is kept, when the monitor has seen to it.
            Exit::MmioRead { gpa, .. } if self.vm().is_private(gpa) => {
                core.cpu.io.clear();
                return Err(self.report_private_page(gpa));
            }
            Exit::MmioWrite { gpa, len, data } if self.vm().is_private(gpa) => {
                core.completion = Completion::PrivateStore { gpa, len, data };
                return Err(self.report_private_page(gpa));
            }
            Exit::MmioRead { gpa, len } => {
                page.set_mmio_phys_addr(gpa);
                page.set_mmio_len(len.into());
                page.set_mmio_is_write(0);
                core.completion = Completion::MmioRead(len.into());
                self.count(VcpuStat::MmioExits);
                KVM_EXIT_MMIO
            }
            Exit::MmioWrite { gpa, len, data } => {
                page.set_mmio_phys_addr(gpa);
                page.set_mmio_len(len.into());
                page.set_mmio_is_write(1);
                page.set_mmio_data(u64::from_le_bytes(data));
                self.count(VcpuStat::MmioExits);
                KVM_EXIT_MMIO
            }
            Exit::Hlt => {
                self.count(VcpuStat::HaltExits);
                let stays = self.vm().enabled().disabled_exits() & KVM_X86_DISABLE_EXITS_HLT != 0;
                if stays || self.machine().lapic().is_some() {
                    core.cpu.state.events.mp_state = MpState::Halted;
                    return Ok(Next::Guest);
                }
                KVM_EXIT_HLT
            }
            Exit::Request => return self.serve_requests(core),
            Exit::Shutdown => KVM_EXIT_SHUTDOWN,
            Exit::Debug { vector, dr6, dr7 } => {
                page.set_debug_exception(vector.into());
                page.set_debug_pc(linear_rip(state));
                page.set_debug_dr6(dr6);
                page.set_debug_dr7(dr7);
                KVM_EXIT_DEBUG
            }
            Exit::MsrRead { index, reason } => {
                page.set_msr_error(0);
                page.set_msr_reason(reason);
                page.set_msr_index(index);
                page.set_msr_data(0);
                core.completion = Completion::MsrRead;
                KVM_EXIT_X86_RDMSR
            }
            Exit::MsrWrite {
                index,
                value,
                reason,
            } => {
                page.set_msr_error(0);
                page.set_msr_reason(reason);
                page.set_msr_index(index);
                page.set_msr_data(value);
                core.completion = Completion::MsrWrite;
                KVM_EXIT_X86_WRMSR
            }
            Exit::Hypercall { nr, args } => {
                page.set_hypercall_nr(nr);
                for (i, arg) in args.iter().enumerate() {
                    page.set_hypercall_arg(i, *arg);
                }
                page.set_hypercall_arg(5, 0);
                page.set_hypercall_ret(0);
                page.set_hypercall_flags(u64::from(state.code64()));
                core.completion = Completion::Hypercall;
                KVM_EXIT_HYPERCALL
            }
            Exit::SetTpr => KVM_EXIT_SET_TPR,
            Exit::IoapicEoi { vector } => {
                page.set_eoi_vector(vector);
                KVM_EXIT_IOAPIC_EOI
            }
            Exit::IrqWindowOpen => {
                self.count(VcpuStat::IrqWindowExits);
                KVM_EXIT_IRQ_WINDOW_OPEN
            }
            Exit::InternalError(error) => self.report_internal_error(core, error),
            Exit::BadMemory => return Err(Errno::EFAULT),
            // A run by count ends as a signal would end it.
            Exit::Budget if self.vm().time.is_counted() => return Err(Errno::EINTR),
            Exit::Budget => return Ok(Next::Guest),
        };
        Ok(Next::User(reason))
    }

    /// KVM_EXIT_MEMORY_FAULT, with which KVM_RUN fails.
    fn report_private_page(&self, gpa: u64) -> Errno {
        let page = self.machine().run();
        page.set_memory_fault_flags(KVM_MEMORY_EXIT_FLAG_PRIVATE.into());
        page.set_memory_fault_gpa(gpa & !(PAGE - 1));
        page.set_memory_fault_size(PAGE);
        page.set_exit_reason(KVM_EXIT_MEMORY_FAULT);
        Errno::EFAULT
    }

    fn report_tpr_access(&self, rip: u64, is_write: bool) -> u32 {
        let page = self.machine().run();
        page.set_tpr_access_rip(rip);
        page.set_tpr_access_is_write(is_write.into());
        KVM_EXIT_TPR_ACCESS
    }

    /// The processor could not go on: the exit, and for whoever reads the VMM's output one line with
    /// the reason, then the whole state.
    fn report_internal_error(&self, core: &mut Core, error: InternalError) -> u32 {
        let page = self.machine().run();
        self.count(VcpuStat::InternalErrors);
        let state = &core.cpu.state;
        match error {
            InternalError::Emulation { rip, bytes, len } => {
                let bytes = &bytes[..usize::from(len).min(15)];
                page.set_internal_suberror(KVM_INTERNAL_ERROR_EMULATION);
                // `flags` and the two words of the instruction.
                page.set_internal_ndata(3);
                page.set_emulation_failure_flags(
                    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES.into(),
                );
                page.set_emulation_failure_insn(bytes);
                let text = anykvm_cpu::dump::disassemble(bytes, core.cpu.mode().bits(), rip);
                eprintln!(
                    "anykvm: vcpu {}: instruction not implemented at rip {rip:#x} ({}): {bytes:02x?}: {text}",
                    self.id(),
                    anykvm_cpu::dump::mode_name(state),
                );
            }
            InternalError::Lockstep { rip } => {
                page.set_internal_suberror(KVM_INTERNAL_ERROR_EMULATION);
                page.set_internal_ndata(0);
                eprintln!(
                    "anykvm: vcpu {}: what was translated at rip {rip:#x} is wrong",
                    self.id()
                );
            }
            InternalError::DeliveryEvent { vector } => {
                page.set_internal_suberror(KVM_INTERNAL_ERROR_DELIVERY_EV);
                page.set_internal_ndata(1);
                page.set_internal_data(0, vector.into());
                eprintln!(
                    "anykvm: vcpu {}: vector {vector} could not be delivered at rip {:#x} ({})",
                    self.id(),
                    state.rip(),
                    anykvm_cpu::dump::mode_name(state),
                );
            }
        }
        eprintln!("{}", core.cpu.dump());
        KVM_EXIT_INTERNAL_ERROR
    }

    /// Request bits that the processor leaves to its owner.
    fn serve_requests(&self, core: &mut Core) -> Result<Next> {
        let taken = self.kick().requests().take(KICK | OWNER | PAUSE);
        if taken & OWNER != 0 {
            self.accept_apic_events(core);
            if let Some((rip, is_write)) = self.requests().take_tpr_access() {
                if taken & KICK != 0 {
                    self.kick().requests().set(KICK);
                }
                // KVM reports where the instruction starts; the access was noted with RIP behind it.
                let start = rip.wrapping_sub(core.cpu.last_instruction_len().into());
                return Ok(Next::User(self.report_tpr_access(start, is_write)));
            }
        }
        if taken & KICK != 0 {
            core.cpu.new_epoch();
            return Err(Errno::EINTR);
        }
        Ok(Next::Guest)
    }

    /// `kvm_run.kvm_dirty_regs`: registers that the VMM changed in the run page.
    fn load_from_page(&self, core: &mut Core) -> Result<()> {
        let page = self.machine().run();
        let mut dirty = page.kvm_dirty_regs();
        let mut take = |bit: u32| {
            let set = dirty & u64::from(bit) != 0;
            dirty &= !u64::from(bit);
            page.set_kvm_dirty_regs(dirty);
            set
        };
        if take(KVM_SYNC_X86_REGS) {
            let regs: kvm_regs = page.sync_read(sync::REGS);
            registers::set_regs(&mut core.cpu.state, &regs);
        }
        if take(KVM_SYNC_X86_SREGS) {
            let sregs: kvm_sregs = page.sync_read(sync::SREGS);
            self.set_sregs_locked(core, &sregs)?;
        }
        if take(KVM_SYNC_X86_EVENTS) {
            let new: kvm_vcpu_events = page.sync_read(sync::EVENTS);
            self.set_events_locked(core, &new)?;
        }
        core.cpu.state_changed();
        Ok(())
    }

    /// What the run page says after every KVM_RUN (`post_kvm_run_save`, `store_regs`).
    fn save_to_page(&self, core: &mut Core) {
        let page = self.machine().run();
        let machine = self.machine();
        let interrupts_on = core.cpu.state.rflags & rflags::IF != 0;
        page.set_if_flag(interrupts_on.into());
        page.set_cr8(machine.read_cr8());
        page.set_apic_base(machine.apic_base());
        let ready = machine.pic_in_kernel() || self.ready_for_interrupt(core, interrupts_on);
        page.set_ready_for_interrupt_injection(ready.into());
        if core.cpu.state.events.smm {
            page.set_flags(KVM_RUN_X86_SMM as u16);
        }
        let valid = page.kvm_valid_regs();
        let wants = |bit: u32| valid & u64::from(bit) != 0;
        if wants(KVM_SYNC_X86_REGS) {
            page.sync_write(sync::REGS, &registers::regs(&core.cpu.state));
        }
        if wants(KVM_SYNC_X86_SREGS) {
            let sregs = registers::sregs(&core.cpu.state, self.apic_view());
            page.sync_write(sync::SREGS, &sregs);
        }
        if wants(KVM_SYNC_X86_EVENTS) {
            page.sync_write(sync::EVENTS, &self.events_locked(core));
        }
        self.count(VcpuStat::Exits);
        vcpu_stats::publish(self.stats(), &core.cpu);
    }

    /// `kvm_vcpu_ready_for_interrupt_injection`.
    fn ready_for_interrupt(&self, core: &Core, interrupts_on: bool) -> bool {
        let e = &core.cpu.state.events;
        interrupts_on
            && e.shadow == 0
            && !e.interrupt.injected
            && !e.exception.injected
            && !e.exception.pending
            && !e.nmi_injected
            && self.machine().accepts_user_interrupt()
    }
}

/// CS base plus RIP (`kvm_get_linear_rip`).
pub(crate) fn linear_rip(s: &anykvm_cpu::CpuState) -> u64 {
    if s.code64() {
        return s.rip();
    }
    let base = s.seg[usize::from(anykvm_cpu::state::seg::CS)].base;
    base.wrapping_add(s.rip()) & 0xffff_ffff
}
