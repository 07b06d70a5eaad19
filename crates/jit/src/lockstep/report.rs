//! Where translated code differs: which instruction, what it was translated to, and what led there.
//!
//! The stretch is gone through once more, first in pieces that end wherever translated code looks whether it
//! is wanted. In the piece that differs each run of instructions without a branch is translated by itself,
//! from one instruction to all of them: the first that is wrong is the last one of the shortest that differs.
//! What is right then is wrong only together with what surrounds it.

use std::fmt::Write;
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;

use anykvm_cpu::{Cpu, CpuState, Insn, dump};

use super::difference::NAMES;
use super::{Kept, Lockstep, Start, interpret};
use crate::Jit;
use crate::listing::listing;
use crate::vectors::Level;

/// Pieces of a stretch that are looked at.
const PIECES: usize = 5000;
/// Lines of the trace on stderr.
const SHOWN: usize = 24;

/// An instruction that the interpreter has executed.
struct Line {
    insn: Insn,
    rip: u64,
    /// State behind it, without what is large.
    regs: anykvm_cpu::state::Regs,
    rflags: u64,
}

/// A wrong instruction, what differs behind it, and its translation by itself.
struct Culprit {
    rip: u64,
    insn: Insn,
    what: String,
    host: String,
}

/// Finds out and tells. The state is that before the stretch, and is again afterwards. Returns the address of
/// the wrong instruction, or else where the stretch begins.
pub(super) fn write(
    lockstep: &mut Lockstep,
    jit: &mut Jit,
    cpu: &mut Cpu,
    start: Start,
    kept: &Kept,
    what: &str,
) -> u64 {
    let before = cpu.state.clone();
    let bits = cpu.mode().bits();
    // What may be needed of the translation, before anything else is translated.
    let code = translation(jit, start.entry, bits, before.rip());
    let mut trace = Vec::new();
    let run = lockstep.run(jit, cpu, start, super::LIMIT);
    let count = run.map_or(0, |run| run.done);
    again(lockstep, jit, cpu, kept);
    record(cpu, count, &mut trace);
    let interpreted = cpu.state.clone();
    again(lockstep, jit, cpu, kept);
    let found = search(lockstep, jit, cpu, start);
    cpu.put_state(before.clone());
    lockstep.copies.undo(cpu);
    let mut text = String::from("translated code differs from the interpreter\n");
    match &found {
        Some(c) => {
            let _ = write!(
                text,
                "the instruction at {:#x}: {}\n{}what it was translated to, by itself:\n{}",
                c.rip,
                dump::disassemble(c.insn.encoding(), bits, c.rip),
                c.what,
                c.host,
            );
        }
        None => text.push_str(
            "no instruction by itself: it is wrong together with what surrounds it, or beyond this stretch\n",
        ),
    }
    let _ = write!(
        text,
        "behind the whole stretch of {count} instructions:\n{what}"
    );
    let mut whole = text.clone();
    let _ = write!(whole, "\n{code}\nstate before:\n{}", dump::state(&before));
    let _ = write!(
        whole,
        "\nstate when interpreted:\n{}",
        dump::state(&interpreted)
    );
    whole.push_str("\ninterpreted, with what each instruction changed:\n");
    let lines = lines(&before, &trace, bits);
    lines.iter().for_each(|line| whole.push_str(line));
    text.push_str("the last instructions that were interpreted:\n");
    lines[lines.len().saturating_sub(SHOWN)..]
        .iter()
        .for_each(|line| text.push_str(line));
    let rip = found.map_or(before.rip(), |c| c.rip);
    match save(rip, &whole) {
        Some(path) => eprintln!("anykvm: {text}anykvm: all of it is in {}", path.display()),
        None => eprint!("anykvm: {whole}"),
    }
    rip
}

/// The state and memory before the stretch again.
fn again(lockstep: &Lockstep, jit: &mut Jit, cpu: &mut Cpu, kept: &Kept) {
    cpu.put_state(lockstep.copies.state().clone());
    lockstep.copies.undo(cpu);
    kept.put_back(jit);
}

/// Interprets and notes.
fn record(cpu: &mut Cpu, count: u64, trace: &mut Vec<Line>) {
    let goal = cpu.state.clone();
    // How far is noted in any case; why not further is told elsewhere.
    let _ = interpret(cpu, &goal, count, &mut |step| {
        trace.push(Line {
            insn: step.insn.clone(),
            rip: step.rip,
            regs: step.state.regs,
            rflags: step.state.rflags,
        });
    });
}

/// Looks for the instruction, from the beginning of a stretch that differs.
fn search(lockstep: &mut Lockstep, jit: &mut Jit, cpu: &mut Cpu, start: Start) -> Option<Culprit> {
    let mut start = start;
    for _ in 0..PIECES {
        let run = lockstep.run(jit, cpu, start, 1)?;
        if run.difference.is_some() {
            cpu.put_state(lockstep.copies.state().clone());
            lockstep.copies.undo(cpu);
            let mut trace = Vec::new();
            record(cpu, run.done, &mut trace);
            cpu.put_state(lockstep.copies.state().clone());
            lockstep.copies.undo(cpu);
            return in_piece(lockstep, jit, cpu, &trace);
        }
        jit.pending = None;
        start = Start {
            entry: jit.find(cpu).ok()??,
            level: Level::None,
            counted: 0,
        };
        jit.shared.page = cpu.state.rip() & !0xfff;
    }
    None
}

/// Looks for it in a piece.
fn in_piece(
    lockstep: &mut Lockstep,
    jit: &mut Jit,
    cpu: &mut Cpu,
    trace: &[Line],
) -> Option<Culprit> {
    let mut rest = trace;
    while let Some(first) = rest.first() {
        let follows = |pair: &&[Line]| {
            let next = pair[0].rip.wrapping_add(pair[0].insn.len.into());
            pair[1].rip == next && next & !0xfff == first.rip & !0xfff
        };
        let run = rest.windows(2).take_while(follows).count() + 1;
        for count in 1..=run {
            let insns: Vec<Insn> = rest[..count].iter().map(|line| line.insn.clone()).collect();
            let last = &rest[count - 1];
            let start = jit.by_itself(cpu, &insns)?;
            let piece = lockstep.run(jit, cpu, start, super::LIMIT)?;
            cpu.put_state(lockstep.copies.state().clone());
            lockstep.copies.undo(cpu);
            if let Some(what) = piece.difference {
                return Some(Culprit {
                    rip: last.rip,
                    insn: last.insn.clone(),
                    what,
                    host: jit.alone(cpu, &last.insn, last.rip),
                });
            }
        }
        record(cpu, run as u64, &mut Vec::new());
        rest = &rest[run..];
    }
    None
}

impl Jit {
    /// Translates these instructions, which are at RIP, whatever else there is for the place.
    fn by_itself(&mut self, cpu: &mut Cpu, insns: &[Insn]) -> Option<Start> {
        let place = (cpu.code_here()?.host, cpu.mode().bits_packed());
        let bytes: Vec<u8> = insns.iter().flat_map(|i| i.encoding().to_vec()).collect();
        let n = self.make(place, insns.into(), bytes.into(), cpu.mode(), None)?;
        self.shared.page = cpu.state.rip() & !0xfff;
        Some(Start {
            entry: self.table.get(n)?.checked,
            level: Level::None,
            counted: 0,
        })
    }

    /// What an instruction is translated to.
    fn alone(&mut self, cpu: &mut Cpu, insn: &Insn, rip: u64) -> String {
        let rip = std::mem::replace(&mut cpu.state.regs[16], rip);
        let start = self.by_itself(cpu, std::slice::from_ref(insn));
        cpu.state.set_rip(rip);
        let code = start.and_then(|s| self.table.containing(s.entry));
        code.map_or(String::new(), |t| {
            listing(&self.cache.read(t.base, t.len), 64, 0)
        })
    }
}

/// The translation that is entered there, guest's and host's code.
fn translation(jit: &Jit, entry: u64, bits: u32, rip: u64) -> String {
    let Some(t) = jit.table.containing(entry) else {
        return String::new();
    };
    let rip = rip & !0xfff | t.host & 0xfff;
    let host = jit.cache.read(t.base, t.len);
    format!(
        "the translation that was entered, guest:\n{}host, entered at {:x}:\n{}",
        listing(&t.bytes, bits, rip),
        entry - t.base,
        listing(&host, 64, 0)
    )
}

fn lines(before: &CpuState, trace: &[Line], bits: u32) -> Vec<String> {
    let (mut regs, mut rflags) = (before.regs, before.rflags);
    let line = |(number, l): (usize, &Line)| {
        let text = dump::disassemble(l.insn.encoding(), bits, l.rip);
        let mut line = format!("{number:>6} {:016x} {text:<44}", l.rip);
        for (n, name) in (0..16).zip(NAMES) {
            if l.regs[n] != regs[n] {
                let _ = write!(line, " {name}={:x}", l.regs[n]);
            }
        }
        if l.rflags != rflags {
            let _ = write!(line, " rflags={:x}", l.rflags);
        }
        (regs, rflags) = (l.regs, l.rflags);
        line + "\n"
    };
    trace.iter().enumerate().map(line).collect()
}

/// The file that is written for an instruction.
pub(super) fn path(rip: u64) -> PathBuf {
    let name = format!("anykvm-lockstep-{}-{rip:x}.txt", std::process::id());
    std::env::temp_dir().join(name)
}

/// Writes it to a new file, if that is allowed here.
fn save(rip: u64, text: &str) -> Option<PathBuf> {
    let path = path(rip);
    let mut file = File::create_new(&path).ok()?;
    file.write_all(text.as_bytes()).ok()?;
    Some(path)
}
