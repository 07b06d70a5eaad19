//! The trace: `ANYKVM_TRACE=FILE[,vcpu=N][,skip=N][,count=N][,events]`.
//!
//! With `events`, a line for each exception, NMI and interrupt that is delivered, at full speed. Else
//! these and one line for each instruction, before it executes: number, RIP, mode, bytes, disassembly, and the
//! registers that changed since the line before. `FILE` may be `-` for standard error. `vcpu` picks
//! the processor by order of creation; `skip` instructions are executed first; after `count` lines
//! the trace ends and execution goes on at full speed.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::dump;
use crate::state::Regs;

static CREATED: AtomicU32 = AtomicU32::new(0);

/// A trace being written.
pub struct Trace {
    out: Box<dyn Write + Send>,
    skip: u64,
    count: u64,
    number: u64,
    last: Regs,
    last_flags: u64,
    events_only: bool,
}

impl Trace {
    /// What the environment asks for this (newly created) processor.
    pub fn from_env() -> Option<Box<Self>> {
        let spec = std::env::var("ANYKVM_TRACE").ok()?;
        let n = CREATED.fetch_add(1, Ordering::Relaxed);
        match Self::parse(&spec, n) {
            Ok(trace) => trace.map(Box::new),
            Err(why) => {
                eprintln!("anykvm: ANYKVM_TRACE={spec}: {why}");
                None
            }
        }
    }

    fn parse(spec: &str, n: u32) -> Result<Option<Self>, String> {
        let mut parts = spec.split(',');
        let file = parts.next().unwrap_or("-");
        let (mut skip, mut count, mut events_only) = (0, u64::MAX, false);
        for part in parts {
            if part == "events" {
                events_only = true;
                continue;
            }
            let (key, value) = part.split_once('=').ok_or("expected key=value")?;
            let value: u64 = value.parse().map_err(|e| format!("{key}: {e}"))?;
            match key {
                "vcpu" if value != u64::from(n) => return Ok(None),
                "vcpu" => {}
                "skip" => skip = value,
                "count" => count = value,
                _ => return Err(format!("unknown key {key}")),
            }
        }
        let out: Box<dyn Write + Send> = if file == "-" {
            Box::new(std::io::stderr())
        } else {
            let name = if n == 0 {
                file.to_owned()
            } else {
                format!("{file}.{n}")
            };
            Box::new(BufWriter::new(
                File::create(&name).map_err(|e| format!("{name}: {e}"))?,
            ))
        };
        Ok(Some(Self {
            out,
            skip,
            count,
            number: 0,
            last: Regs::default(),
            last_flags: 0,
            events_only,
        }))
    }

    /// Whether instructions are traced, which then execute one by one.
    pub(crate) fn wants_instructions(&self) -> bool {
        !self.events_only
    }

    /// Writes the line of an event about to be delivered; false when the trace is at its end.
    pub(crate) fn event(&mut self, cpu: &Cpu, vector: u8) -> bool {
        if self.number < self.skip && !self.events_only {
            return true;
        }
        let s = &cpu.state;
        let e = &s.events.exception;
        let what = if e.pending || e.injected {
            format!(
                "exception {vector} error {:x} payload {:x}",
                e.error_code, e.payload
            )
        } else if s.events.nmi_injected {
            "NMI".to_owned()
        } else {
            format!("interrupt {vector:#x}")
        };
        let rip = s.rip();
        let mode = dump::mode_name(s);
        let n = cpu.counters.instructions;
        writeln!(
            self.out,
            "{n:>10} {rip:016x} {mode:<6} cpl {} -- {what}",
            s.cpl()
        )
        .is_ok()
            && self.out.flush().is_ok()
    }

    /// Writes the line of an instruction about to execute; false when the trace is at its end.
    pub(crate) fn instruction(&mut self, cpu: &Cpu, insn: &Insn) -> bool {
        self.number += 1;
        if self.number <= self.skip {
            return true;
        }
        let s = &cpu.state;
        let mut line = format!(
            "{:>10} {:016x} {:<6}",
            self.number,
            s.rip(),
            dump::mode_name(s)
        );
        for b in insn.encoding() {
            line.push_str(&format!(" {b:02x}"));
        }
        let text = dump::disassemble(insn.encoding(), cpu.mode().bits(), s.rip());
        line = format!("{line:<80} {text:<40}");
        for r in 0..16 {
            if s.regs[r] != self.last[r] {
                line.push_str(&format!(" r{r}={:x}", s.regs[r]));
            }
        }
        if s.rflags != self.last_flags {
            line.push_str(&format!(" fl={:x}", s.rflags));
        }
        self.last = s.regs;
        self.last_flags = s.rflags;
        if writeln!(self.out, "{line}").is_err() {
            return false;
        }
        self.number < self.skip.saturating_add(self.count)
    }
}
