//! Half-done I/O: what is remembered between an exit and the next entry (KVM API document, section
//! 5, NOTE on KVM_EXIT_IO and KVM_EXIT_MMIO).
//!
//! An access that needs an answer (port in, MMIO read, MSR, hypercall) leaves with RIP at the
//! instruction; on re-entry the instruction runs again from its decoded form, and finds the answers
//! given so far. A port out or MSR write waits for its re-entry in the same way. A store to MMIO has
//! retired when its exit is seen (and OUT to port 0x7E, by a quirk of KVM's); what is left of it
//! (fragments of 8 bytes) follows in further exits. If RIP was moved in between, the rest is dropped.
//!
//! Other registers may be written in between, too. The access that was asked for stays where it was; what
//! else the instruction takes from registers it finds as they are when it completes. An answer is used
//! for the address that was asked for, and for no other: where the instruction now reads elsewhere (a
//! stack pointer or a page table was changed), it asks again.

use std::collections::VecDeque;

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::exec::Step;
use crate::exit::{Direction, Exit, Stop};
use crate::state::reg;

/// Bytes of the port-I/O data area.
pub const DATA_BYTES: usize = 4096;

/// A piece of device memory read or written by an instruction.
#[derive(Clone, Copy, Debug)]
struct Fragment {
    gpa: u64,
    len: u8,
    data: [u8; 8],
    /// Answered by user space, not by a device in the kernel.
    by_user: bool,
}

impl Fragment {
    fn new(gpa: u64, data: &[u8]) -> Self {
        let mut f = Self {
            gpa,
            len: data.len() as u8,
            data: [0; 8],
            by_user: false,
        };
        f.data[..data.len()].copy_from_slice(data);
        f
    }
}

/// An instruction that runs again, and where its operands in memory were when it stopped.
#[derive(Clone, Debug)]
struct Replay {
    insn: Insn,
    rip: u64,
    operand: u64,
    strings: [u64; 2],
}

/// The registers that address the operands of string instructions.
const STRINGS: [u8; 2] = [reg::RSI, reg::RDI];

/// A write whose exit is seen after its instruction has retired.
#[derive(Clone, Copy, Debug)]
enum Write {
    Memory(Fragment),
    /// A port; the data is in [`Io::data`].
    Port {
        port: u16,
        size: u8,
    },
}

/// What user space answered to the exit that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The exit needed nothing (port out), or its data is in `data` (port in).
    Done,
    /// MSR read or write: the value, or `None` for #GP.
    Msr(Option<u64>),
    /// Hypercall result.
    Hypercall(u64),
}

/// The pending-I/O record of a processor.
#[derive(Debug)]
pub struct Io {
    /// Port data, packed: out items, or room for in items.
    pub data: Box<[u8; DATA_BYTES]>,
    replay: Option<Replay>,
    answer: Option<Answer>,
    /// The last exit asked for device memory, not for a port, an MSR or a hypercall.
    asked_memory: bool,
    wanted: Option<Fragment>,
    reads: Vec<Fragment>,
    cursor: usize,
    writes: VecDeque<Write>,
    writes_rip: u64,
}

impl Default for Io {
    fn default() -> Self {
        Self {
            data: Box::new([0; DATA_BYTES]),
            replay: None,
            answer: None,
            asked_memory: false,
            wanted: None,
            reads: Vec::with_capacity(8),
            cursor: 0,
            writes: VecDeque::with_capacity(16),
            writes_rip: 0,
        }
    }
}

impl Io {
    /// Forgets everything (reset of the processor).
    pub fn clear(&mut self) {
        self.replay = None;
        self.forget_answers();
        self.writes.clear();
    }
    fn forget_answers(&mut self) {
        self.answer = None;
        self.wanted = None;
        self.reads.clear();
        self.cursor = 0;
    }
    /// Whether an operation waits for re-entry.
    pub fn pending(&self) -> bool {
        self.replay.is_some() || !self.writes.is_empty()
    }
    #[inline]
    pub(crate) fn has_answers(&self) -> bool {
        !self.reads.is_empty() || self.answer.is_some()
    }
    /// Forgets writes whose exits were not seen.
    pub(crate) fn drop_writes(&mut self) {
        self.writes.clear();
    }
    #[inline]
    pub(crate) fn has_writes(&self) -> bool {
        !self.writes.is_empty()
    }
}

impl Cpu {
    /// Gives the answer to [`Exit::MmioRead`]; call before the next [`Cpu::run`].
    pub fn complete_mmio_read(&mut self, data: &[u8]) {
        if let Some(mut f) = self.io.wanted.take() {
            let n = data.len().min(8);
            f.data[..n].copy_from_slice(&data[..n]);
            f.by_user = true;
            self.io.reads.push(f);
        }
    }
    /// Gives the answer to [`Exit::MsrRead`] or [`Exit::MsrWrite`]: the value, or `None` for #GP.
    pub fn complete_msr(&mut self, value: Option<u64>) {
        self.io.answer = Some(Answer::Msr(value));
    }
    /// Gives the answer to [`Exit::Hypercall`].
    pub fn complete_hypercall(&mut self, result: u64) {
        self.io.answer = Some(Answer::Hypercall(result));
    }

    /// Remembers that `insn`, which is at RIP, runs again on re-entry. What it has written so far it
    /// writes again.
    pub(crate) fn set_replay(&mut self, insn: &Insn) {
        self.io.drop_writes();
        self.io.replay = Some(Replay {
            insn: insn.clone(),
            rip: self.state.rip(),
            operand: self.operand_of(insn),
            strings: STRINGS.map(|r| self.state.regs[r]),
        });
    }
    /// The effective address of the instruction at RIP.
    fn operand_of(&mut self, insn: &Insn) -> u64 {
        let rip = self.state.rip();
        self.state.set_rip(rip.wrapping_add(insn.len.into()));
        let address = self.effective_address(insn);
        self.state.set_rip(rip);
        address
    }
    /// Runs the instruction again whose exit was seen, unless RIP was moved meanwhile.
    pub(crate) fn replay(&mut self) -> Step {
        let Some(mut replay) = self.io.replay.take() else {
            return Ok(());
        };
        self.io.cursor = 0;
        if replay.rip != self.state.rip() {
            self.io.forget_answers();
            return Ok(());
        }
        // Port I/O needs no word from the caller to be complete: its data is in place.
        if self.io.answer.is_none() && !self.io.asked_memory {
            self.io.answer = Some(Answer::Done);
        }
        let insn = &mut replay.insn;
        // POP to memory computes its address behind the change of RSP.
        if insn.raw.mnemonic() != Mnemonic::Pop && self.operand_of(insn) != replay.operand {
            (insn.base, insn.index, insn.disp) = (reg::ZERO, reg::ZERO, replay.operand);
        }
        if !insn.raw.is_string_instruction()
            || replay.strings == STRINGS.map(|r| self.state.regs[r])
        {
            return self.execute_one(insn, replay.rip);
        }
        // The registers as they were, and what the instruction adds to them added to what they are.
        let given = STRINGS.map(|r| std::mem::replace(&mut self.state.regs[r], 0));
        for (r, was) in STRINGS.into_iter().zip(replay.strings) {
            self.state.regs[r] = was;
        }
        let done = self.execute_one(insn, replay.rip);
        for ((r, was), given) in STRINGS.into_iter().zip(replay.strings).zip(given) {
            let moved = self.state.regs[r].wrapping_sub(was);
            self.state.regs[r] = given.wrapping_add(moved);
        }
        done
    }
    /// The replayed (or any) instruction has completed or faulted: its answers are used up.
    #[inline]
    pub(crate) fn end_replay(&mut self) {
        self.io.forget_answers();
    }

    /// Device memory read: the answers given so far, then in-kernel devices, then an exit. From the first
    /// piece that no device in the kernel takes, all are user space's (`vcpu_mmio_read`).
    pub(crate) fn mmio_read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), Stop> {
        let mut at = gpa;
        let mut by_user = false;
        for piece in buf.chunks_mut(8) {
            let n = piece.len();
            let known = self.io.reads.get(self.io.cursor);
            if let Some(f) = known.filter(|f| (f.gpa, usize::from(f.len)) == (at, n)) {
                self.io.cursor += 1;
                by_user = f.by_user;
                piece.copy_from_slice(&f.data[..n]);
            } else if !by_user && self.machine.mmio_read(&self.state, at, piece) {
                self.io.reads.truncate(self.io.cursor);
                self.io.reads.push(Fragment::new(at, piece));
                self.io.cursor += 1;
                // So that what was recorded ends with the instruction.
                self.leave_block();
            } else {
                self.io.reads.truncate(self.io.cursor);
                self.io.wanted = Some(Fragment::new(at, &[0; 8][..n]));
                self.io.asked_memory = true;
                let len = n as u8;
                self.exit = Some(Exit::MmioRead { gpa: at, len });
                return Err(Stop::Exit);
            }
            at += n as u64;
        }
        Ok(())
    }

    /// Device memory write: in-kernel devices at once, others as exits after the instruction. From the
    /// first piece that no device in the kernel takes, all are user space's (`vcpu_mmio_write`).
    pub(crate) fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        let mut at = gpa;
        let mut by_user = false;
        for piece in data.chunks(8) {
            by_user = by_user || !self.machine.mmio_write(&self.state, at, piece);
            if by_user {
                let fragment = Fragment::new(at, piece);
                self.io.writes.push_back(Write::Memory(fragment));
            }
            at += piece.len() as u64;
        }
        // In-kernel devices may have made an interrupt deliverable (EOI, TPR): look at the next
        // instruction boundary.
        self.leave_block();
    }

    /// The instruction that made these writes has retired: RIP to compare with on re-entry.
    pub(crate) fn note_writes_retired(&mut self) {
        self.io.writes_rip = self.state.rip();
    }
    /// The exit of the next write, if any is left and RIP was not moved.
    pub(crate) fn next_write(&mut self) -> Option<Exit> {
        if self.io.writes.is_empty() {
            return None;
        }
        if self.io.writes_rip != self.state.rip() {
            self.io.writes.clear();
            return None;
        }
        Some(match self.io.writes.pop_front()? {
            Write::Memory(f) => Exit::MmioWrite {
                gpa: f.gpa,
                len: f.len,
                data: f.data,
            },
            Write::Port { port, size } => Exit::Io {
                direction: Direction::Out,
                size,
                port,
                count: 1,
            },
        })
    }

    /// A port write with its data in `io.data`, as an exit after the instruction.
    pub(crate) fn port_write_retires(&mut self, port: u16, size: usize) {
        let size = size as u8;
        self.io.writes.push_back(Write::Port { port, size });
        self.leave_block();
    }

    /// For handlers of port output and the like: true if the exit of this very instruction was
    /// seen and it now completes.
    pub(crate) fn take_done(&mut self) -> bool {
        let done = self.io.answer == Some(Answer::Done);
        if done {
            self.io.answer = None;
        }
        done
    }
    /// For RDMSR and WRMSR: user space's answer to this instruction's exit.
    pub(crate) fn take_msr_answer(&mut self) -> Option<Option<u64>> {
        match self.io.answer {
            Some(Answer::Msr(v)) => {
                self.io.answer = None;
                Some(v)
            }
            // Nothing was said: user space ignored the exit.
            Some(Answer::Done) => {
                self.io.answer = None;
                Some(None)
            }
            _ => None,
        }
    }
    /// For VMCALL: user space's answer.
    pub(crate) fn take_hypercall_answer(&mut self) -> Option<u64> {
        match self.io.answer.take() {
            Some(Answer::Hypercall(v)) => Some(v),
            Some(Answer::Done) => Some(0),
            _ => None,
        }
    }
    /// Leaves for port I/O with `count` items of `size` bytes in (or wanted in) `io.data`.
    pub(crate) fn exit_io(
        &mut self,
        direction: Direction,
        size: usize,
        port: u16,
        count: u32,
    ) -> Stop {
        self.io.asked_memory = false;
        self.exit = Some(Exit::Io {
            direction,
            size: size as u8,
            port,
            count,
        });
        Stop::Exit
    }
    /// Leaves with an exit that is completed by running the instruction again.
    pub(crate) fn exit_with(&mut self, exit: Exit) -> Stop {
        self.io.asked_memory = false;
        self.exit = Some(exit);
        Stop::Exit
    }
}
