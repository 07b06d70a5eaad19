//! The processor object: state, what it runs against, and its caches.

use std::sync::Arc;

use crate::block::BlockCache;
use crate::counted::Counted;
use crate::events::{SHADOW_MOV_SS, vector};
use crate::exit::{Exit, Fault, Stop};
use crate::io::Io;
use crate::machine::Machine;
use crate::memory::{GuestMemory, MemoryMap, Participant};
use crate::mmu::tlb::Tlb;
use crate::mode::Mode;
use crate::requests::Requests;
use crate::state::{CpuState, rflags, seg};
use crate::trace::Trace;

/// Counters of one processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Instructions completed (a REP string instruction counts once for each time it is entered).
    pub instructions: u64,
    /// Blocks entered.
    pub blocks: u64,
    /// Blocks decoded.
    pub decoded: u64,
    /// Blocks found stale and decoded again.
    pub redecoded: u64,
    /// Events delivered through the IDT.
    pub events: u64,
    /// Instructions executed by native assist.
    pub assisted: u64,
}

/// What KVM_SET_GUEST_DEBUG asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestDebug {
    /// Exit after each instruction.
    pub single_step: bool,
    /// INT3 exits instead of being delivered.
    pub software_breakpoints: bool,
    /// `db` and `dr7` are armed instead of the guest's.
    pub hardware_breakpoints: bool,
    /// No interrupts while single-stepping.
    pub block_irq: bool,
    /// The debugger's DR0-DR3.
    pub db: [u64; 4],
    /// The debugger's DR7.
    pub dr7: u64,
}

/// One processor.
pub struct Cpu {
    /// The architectural state. After changing it from outside call [`Cpu::state_changed`].
    pub state: CpuState,
    /// Port-I/O data and half-done operations.
    pub io: Io,
    /// Counters.
    pub counters: Counters,
    /// Guest debugging.
    pub guest_debug: GuestDebug,
    /// CPUID as the owner gave it.
    pub cpuid: crate::cpuid::CpuidTable,
    /// Physical-address bits (CPUID leaf 0x80000008): above them page-table bits are reserved.
    pub phys_bits: u8,
    /// The instruction trace, when one is wanted (`ANYKVM_TRACE`).
    pub trace: Option<Box<Trace>>,
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) map: Arc<MemoryMap>,
    pub(crate) participant: Arc<Participant>,
    pub(crate) requests: Arc<Requests>,
    pub(crate) tlb: Tlb,
    pub(crate) blocks: BlockCache,
    pub(crate) mode: Mode,
    /// Supervisor code has been found on a page that is not global.
    pub(crate) local_code: bool,
    pub(crate) stack_code: u8,
    pub(crate) stack_mask: u64,
    pub(crate) fault: Fault,
    pub(crate) exit: Option<Exit>,
    /// Stop at the next instruction boundary and look at requests, events and mode.
    pub(crate) leave: bool,
    /// Events must be looked at before the next block.
    pub(crate) check_events: bool,
    /// An interrupt may wait for RFLAGS.IF; nobody has looked since the last event or request.
    pub(crate) may_wait_for_if: bool,
    /// What the owner's calls have left to do before the next instruction.
    pub(crate) stale: Stale,
    /// An event, not an instruction, is on its way through the IDT.
    pub(crate) delivering: bool,
    /// The interrupt shadow before the current instruction.
    pub(crate) prior_shadow: u8,
    /// DR6 bits of traps that were noted (data and I/O breakpoints, a task's T flag) and are to
    /// become a #DB behind the current instruction or delivery.
    pub(crate) debug_hits: u64,
    /// The current instruction is executed alone (TF, debugging): REP does one iteration.
    pub(crate) stepping: bool,
    /// PAUSE instructions executed.
    pub(crate) pauses: u32,
    /// Length of the last instruction that ended a block early.
    pub(crate) last_len: u8,
    /// What runs hot code, if not the interpreter.
    pub(crate) translator: Option<Box<dyn crate::translator::Translator>>,
    /// Translated code is checked against the interpreter.
    pub(crate) lockstep: Option<Box<crate::lockstep::Lockstep>>,
    /// What is left of a run by count.
    pub(crate) counted: Counted,
    /// Where native assist exchanges operands with the host's registers.
    pub(crate) assist: crate::assist::Frame,
}

/// What no longer holds, of what was derived from state and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stale {
    /// All of it does.
    Nothing,
    /// Code found by its address.
    Code,
    /// All translations, too.
    Everything,
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Cpu {
    /// A processor in its reset state.
    pub fn new(
        memory: Arc<GuestMemory>,
        machine: Arc<dyn Machine>,
        requests: Arc<Requests>,
    ) -> Self {
        let participant = memory.join(requests.clone());
        let cpuid = crate::cpuid::CpuidTable::default();
        let mut cpu = Self {
            state: CpuState::new(),
            io: Io::default(),
            counters: Counters::default(),
            guest_debug: GuestDebug::default(),
            phys_bits: cpuid.phys_bits(),
            cpuid,
            trace: Trace::from_env(),
            machine,
            map: memory.map(0),
            memory,
            participant,
            requests,
            tlb: Tlb::default(),
            blocks: BlockCache::default(),
            mode: Mode::default(),
            local_code: false,
            stack_code: 0,
            stack_mask: 0,
            fault: Fault {
                vector: 0,
                error_code: None,
                payload: 0,
                trap: false,
            },
            exit: None,
            leave: false,
            check_events: true,
            may_wait_for_if: true,
            stale: Stale::Nothing,
            delivering: false,
            prior_shadow: 0,
            debug_hits: 0,
            stepping: false,
            pauses: 0,
            last_len: 0,
            translator: None,
            lockstep: None,
            counted: Counted::default(),
            assist: crate::assist::Frame::default(),
        };
        cpu.update_mode();
        cpu
    }

    /// The machine it runs against.
    pub fn machine(&self) -> &Arc<dyn Machine> {
        &self.machine
    }
    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }
    /// The requests word.
    pub fn requests(&self) -> &Arc<Requests> {
        &self.requests
    }
    /// The length of the instruction behind which [`Cpu::run`] returned for a request that this very
    /// instruction raised.
    pub fn last_instruction_len(&self) -> u8 {
        self.last_len
    }
    /// The execution mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The owner changed `state`: everything derived from it is looked at again.
    pub fn state_changed(&mut self) {
        self.update_mode();
        // Traps wait across an entry only behind MOV SS.
        if self.state.events.shadow & SHADOW_MOV_SS == 0 {
            self.debug_hits = 0;
        }
        self.check_events = true;
        self.stale = Stale::Everything;
    }

    /// Code may have been changed by the owner without a trace (a debugger's breakpoint, a loaded
    /// snapshot): every block is compared with memory once more before it runs.
    pub fn new_epoch(&mut self) {
        self.stale = self.stale.max(Stale::Code);
    }

    /// Does what [`Cpu::state_changed`] and [`Cpu::new_epoch`] have put off: once for all the calls of an
    /// owner that reads or writes one piece of state after the other.
    pub(crate) fn settle(&mut self) {
        match std::mem::replace(&mut self.stale, Stale::Nothing) {
            Stale::Nothing => {}
            Stale::Code => {
                self.blocks.forget_jumps();
                self.tlb.flush_exec();
            }
            Stale::Everything => self.reload_address_space(),
        }
    }

    /// For guest memory that is accessed outside of [`Cpu::run`], but not by the TLB: uses the memory map of
    /// now, which nobody replaces meanwhile.
    pub fn with_memory<R>(&mut self, access: impl FnOnce(&mut Self) -> R) -> R {
        let memory = self.memory.clone();
        let _access = memory.access();
        self.map = memory.map(usize::from(self.state.events.smm));
        access(self)
    }

    /// CR0, CR3, CR4, EFER, SMM or protection keys changed in a way that the TLB must not survive.
    pub(crate) fn reload_address_space(&mut self) {
        let space = usize::from(self.state.events.smm);
        self.map = self.memory.map(space);
        self.flush_tlb();
    }

    /// Recomputes what is derived from segments, control registers, EFER and RFLAGS.VM/AC. Every
    /// change of those calls it; the current block ends.
    pub fn update_mode(&mut self) {
        self.mode = Mode::of(&self.state);
        self.choose_set();
        self.stack_code = crate::decode::segment_code(seg::SS, self.mode);
        self.stack_mask = match self.mode.stack_bits() {
            64 => u64::MAX,
            32 => 0xffff_ffff,
            _ => 0xffff,
        };
        self.choose_code_space();
        self.leave = true;
    }

    /// The current block ends behind this instruction.
    #[inline]
    pub(crate) fn leave_block(&mut self) {
        self.leave = true;
    }
    /// Interruptibility may have changed: events are looked at behind this instruction.
    #[inline]
    pub(crate) fn recheck_events(&mut self) {
        self.check_events = true;
        self.leave = true;
    }
    /// Leaves the run loop behind this instruction, which has completed.
    pub(crate) fn exit_behind(&mut self, exit: Exit) {
        self.exit = Some(exit);
        self.recheck_events();
    }
    /// Sets the interrupt shadow for the next instruction. A shadow that was in force already is
    /// not extended (SDM Vol. 3, 6.8.3).
    pub(crate) fn set_interrupt_shadow(&mut self, bit: u8) {
        if self.prior_shadow & bit == 0 {
            self.state.events.shadow |= bit;
        }
        self.recheck_events();
    }
    /// For a REP instruction that is not finished: RIP goes back to it, and the block ends, so that
    /// requests and events are seen between iterations. They are saved with RF set (SDM Vol. 3,
    /// 18.3.1.1).
    pub(crate) fn repeat(&mut self, insn: &crate::decode::Insn) {
        let rip = self.state.rip().wrapping_sub(insn.len.into());
        self.state.set_rip(if self.mode.code64() {
            rip
        } else {
            rip & 0xffff_ffff
        });
        self.state.rflags |= rflags::RF;
        self.leave = true;
    }

    /// The fault behind the last [`Stop::Fault`].
    pub fn fault(&self) -> Fault {
        self.fault
    }
    /// Raises a fault.
    #[cold]
    pub fn raise(&mut self, fault: Fault) -> Stop {
        self.fault = fault;
        Stop::Fault
    }
    /// Raises an exception without an error code.
    #[cold]
    pub fn raise_vector(&mut self, v: u8) -> Stop {
        self.raise(Fault {
            vector: v,
            error_code: None,
            payload: 0,
            trap: false,
        })
    }
    /// Raises an exception with an error code.
    #[cold]
    pub fn raise_error(&mut self, v: u8, code: u32) -> Stop {
        self.raise(Fault {
            vector: v,
            error_code: Some(code),
            payload: 0,
            trap: false,
        })
    }
    /// #GP(0).
    #[cold]
    pub fn gp0(&mut self) -> Stop {
        self.raise_error(vector::GP, 0)
    }
    /// #UD.
    #[cold]
    pub fn ud(&mut self) -> Stop {
        self.raise_vector(vector::UD)
    }

    /// The time-stamp counter.
    pub fn tsc(&self) -> u64 {
        self.state.tsc()
    }
}

/// The host's time-stamp counter, read when everything before it in the program has been done. RDTSC alone may
/// be executed before an older load: a guest that compares its TSC with one that another processor has just
/// stored would see time run backwards, and more often than on hardware, as one of its instructions is many
/// of the host's.
pub fn host_tsc() -> u64 {
    // SAFETY: LFENCE and RDTSC are available in user mode on every host this crate supports.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}
