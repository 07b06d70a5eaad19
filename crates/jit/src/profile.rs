//! Which blocks are hot: every execution of a translation is counted, and from time to time a list of the
//! blocks that executed the most instructions is written to a file, with the guest's code and what it
//! was translated to; then which instructions were left to the interpreter, and how often.
//!
//! The file is opened when the processor is made, before a monitor may forbid it, and written anew every
//! few seconds while the guest runs, and when the processor goes: a monitor that is killed leaves a
//! list that is a few seconds old.

use std::collections::HashMap;
use std::fmt::Write;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anykvm_cpu::Insn;
use iced_x86::{Code, CodeSize};

use crate::listing::listing;

/// How often the file is written.
const PERIOD: Duration = Duration::from_secs(2);
/// Blocks in the list.
const LISTED: usize = 40;
/// Blocks kept with their code when the code cache is emptied.
const KEPT: usize = 200;
/// Counters are made this many at a time; they never move.
const CHUNK: usize = 4096;

/// A translation, as far as the list needs it.
struct Seen {
    rip: u64,
    insns: Arc<[Insn]>,
    bytes: Box<[u8]>,
    /// Where its code is, or the code itself once it is gone from there.
    code: Place,
    counter: usize,
}

enum Place {
    At(u64, usize),
    Kept(Vec<u8>),
}

/// Counts executions.
pub struct Profile {
    file: File,
    counters: Vec<Box<[u64]>>,
    used: usize,
    seen: Vec<Seen>,
    /// Instructions that translated code left to the interpreter, and how often.
    left: HashMap<Code, u64>,
    /// Where the guest is.
    rip: u64,
    /// Turns until the clock is looked at again.
    patience: u32,
    written: Instant,
}

impl Profile {
    /// A profile that is written to this file.
    pub fn new(file: File) -> Self {
        Self {
            file,
            counters: Vec::new(),
            used: 0,
            seen: Vec::new(),
            left: HashMap::new(),
            rip: 0,
            patience: 0,
            written: Instant::now(),
        }
    }

    /// A new counter: its number and its address.
    pub(crate) fn counter(&mut self) -> (usize, u64) {
        let number = self.used;
        if number / CHUNK == self.counters.len() {
            self.counters.push(vec![0; CHUNK].into_boxed_slice());
        }
        self.used += 1;
        let address = self.counters[number / CHUNK].as_ptr() as u64 + (number % CHUNK) as u64 * 8;
        (number, address)
    }

    fn count(&self, number: usize) -> u64 {
        let chunk = self.counters.get(number / CHUNK);
        // Translated code writes it.
        chunk.map_or(0, |c| std::hint::black_box(&c[number % CHUNK]).to_owned())
    }

    /// Notes a translation of what runs next, whose code is at `at`.
    pub(crate) fn add(
        &mut self,
        insns: Arc<[Insn]>,
        bytes: Box<[u8]>,
        at: (u64, usize),
        counter: usize,
    ) {
        self.seen.push(Seen {
            rip: self.rip,
            insns,
            bytes,
            code: Place::At(at.0, at.1),
            counter,
        });
    }

    /// Translated code has left this instruction to the interpreter.
    pub(crate) fn left(&mut self, insn: &Insn) {
        *self.left.entry(insn.raw.code()).or_default() += 1;
    }

    /// Instructions executed by a translation, at most: it may have been left early.
    fn weight(&self, seen: &Seen) -> u64 {
        self.count(seen.counter) * seen.insns.len() as u64
    }

    /// The code cache is about to be emptied: `read` gives the code that is there still.
    pub(crate) fn keep(&mut self, read: impl Fn(u64, usize) -> Vec<u8>) {
        let mut seen = std::mem::take(&mut self.seen);
        seen.sort_by_key(|s| std::cmp::Reverse(self.weight(s)));
        seen.truncate(KEPT);
        for s in &mut seen {
            if let Place::At(at, len) = s.code {
                s.code = Place::Kept(read(at, len));
            }
        }
        self.seen = seen;
    }

    /// Called at every turn of the run loop, where what runs next, or is translated, is at `rip`. Whether
    /// it is time to write.
    pub(crate) fn turn(&mut self, rip: u64) -> bool {
        self.rip = rip;
        self.patience = self.patience.wrapping_add(1);
        self.patience.is_multiple_of(256) && self.written.elapsed() > PERIOD
    }

    /// Writes the list.
    pub(crate) fn write(&mut self, read: impl Fn(u64, usize) -> Vec<u8>) {
        self.written = Instant::now();
        let text = self.list(read);
        // A full disk is no reason to stop a guest.
        let _ = self.file.write_all_at(text.as_bytes(), 0);
        let _ = self.file.set_len(text.len() as u64);
    }

    fn list(&self, read: impl Fn(u64, usize) -> Vec<u8>) -> String {
        // A block that was translated more than once is one block.
        let mut blocks: HashMap<(u64, &[u8]), (u64, &Seen)> = HashMap::new();
        let mut total = 0;
        for seen in &self.seen {
            let weight = self.weight(seen);
            total += weight;
            let entry = blocks.entry((seen.rip, &seen.bytes)).or_insert((0, seen));
            *entry = (entry.0 + weight, seen);
        }
        let mut blocks: Vec<(u64, &Seen)> = blocks.into_values().collect();
        blocks.sort_by_key(|b| (std::cmp::Reverse(b.0), b.1.rip));
        let mut text = format!(
            "{total} instructions in translated blocks, {} blocks. The {} that executed most of them:\n",
            blocks.len(),
            blocks.len().min(LISTED),
        );
        for (number, (weight, seen)) in blocks.iter().take(LISTED).enumerate() {
            let length = seen.insns.len().max(1) as u64;
            let share = *weight as f64 * 100.0 / total.max(1) as f64;
            let _ = writeln!(
                text,
                "\n{}. at {:#x}: {} times {length} instructions, {share:.2} %\n guest:",
                number + 1,
                seen.rip,
                weight / length,
            );
            let bits = seen.insns.first().map_or(64, |i| match i.raw.code_size() {
                CodeSize::Code16 => 16,
                CodeSize::Code32 => 32,
                _ => 64,
            });
            text.push_str(&listing(&seen.bytes, bits, seen.rip));
            text.push_str(" host:\n");
            text.push_str(&match &seen.code {
                Place::At(at, len) => listing(&read(*at, *len), 64, 0),
                Place::Kept(code) => listing(code, 64, 0),
            });
        }
        self.list_left(&mut text);
        text
    }

    /// Those that are never translated, and those whose access to memory failed.
    fn list_left(&self, text: &mut String) {
        let mut left: Vec<(Code, u64)> = self.left.iter().map(|(c, n)| (*c, *n)).collect();
        left.sort_by_key(|(code, times)| (std::cmp::Reverse(*times), *code));
        let total: u64 = left.iter().map(|(_, times)| times).sum();
        let _ = writeln!(
            text,
            "\n{total} times an instruction was left to the interpreter:"
        );
        for (code, times) in left {
            let _ = writeln!(text, "{times:>12} {code:?}");
        }
    }
}
