//! Half-done I/O: what is remembered between an exit and the next entry (KVM API document, section
//! 5, NOTE on KVM_EXIT_IO and KVM_EXIT_MMIO).
//!
//! An access that needs an answer (port in, MMIO read, MSR, hypercall) leaves with RIP at the
//! instruction; on re-entry the instruction runs again from its decoded form, and finds the answers
//! given so far. A port out or MSR write waits for its re-entry in the same way. A store to MMIO has
//! retired when its exit is seen (and OUT to port 0x7E, by a quirk of KVM's); what is left of it
//! (fragments of 8 bytes) follows in further exits. If RIP was moved in between, the rest is dropped.

use std::collections::VecDeque;

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::exit::{Direction, Exit, Stop};

/// Bytes of the port-I/O data area.
pub const DATA_BYTES: usize = 4096;

/// A piece of device memory read or written by an instruction.
#[derive(Clone, Copy, Debug)]
struct Fragment {
    gpa: u64,
    len: u8,
    data: [u8; 8],
}

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
    /// The instruction to run again, and RIP when the exit was seen.
    replay: Option<(Insn, u64)>,
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

    /// Remembers that `insn` runs again on re-entry.
    pub(crate) fn set_replay(&mut self, insn: &Insn) {
        self.io.replay = Some((insn.clone(), self.state.rip()));
    }
    /// Takes the instruction to run again, unless RIP was moved meanwhile.
    pub(crate) fn take_replay(&mut self) -> Option<Insn> {
        let (insn, rip) = self.io.replay.take()?;
        self.io.cursor = 0;
        if rip == self.state.rip() {
            // Port I/O needs no word from the caller to be complete: its data is in place.
            if self.io.answer.is_none() && !self.io.asked_memory {
                self.io.answer = Some(Answer::Done);
            }
            return Some(insn);
        }
        self.io.forget_answers();
        None
    }
    /// The replayed (or any) instruction has completed or faulted: its answers are used up.
    #[inline]
    pub(crate) fn end_replay(&mut self) {
        self.io.forget_answers();
    }

    /// Device memory read: in-kernel devices, then the answers given so far, then an exit.
    pub(crate) fn mmio_read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), Stop> {
        let mut at = gpa;
        for piece in buf.chunks_mut(8) {
            if let Some(f) = self.io.reads.get(self.io.cursor) {
                self.io.cursor += 1;
                piece.copy_from_slice(&f.data[..piece.len()]);
            } else if self.machine.mmio_read(&self.state, at, piece) {
                let mut data = [0; 8];
                data[..piece.len()].copy_from_slice(piece);
                self.io.reads.push(Fragment {
                    gpa: at,
                    len: piece.len() as u8,
                    data,
                });
                self.io.cursor += 1;
                // So that what was recorded ends with the instruction.
                self.leave_block();
            } else {
                let len = piece.len() as u8;
                self.io.wanted = Some(Fragment {
                    gpa: at,
                    len,
                    data: [0; 8],
                });
                self.io.asked_memory = true;
                self.exit = Some(Exit::MmioRead { gpa: at, len });
                return Err(Stop::Exit);
            }
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Device memory write: in-kernel devices at once, others as exits after the instruction.
    pub(crate) fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        let mut at = gpa;
        for piece in data.chunks(8) {
            if !self.machine.mmio_write(&self.state, at, piece) {
                let mut f = Fragment {
                    gpa: at,
                    len: piece.len() as u8,
                    data: [0; 8],
                };
                f.data[..piece.len()].copy_from_slice(piece);
                self.io.writes.push_back(Write::Memory(f));
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
