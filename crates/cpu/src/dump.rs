//! A readable account of a processor's state, for reports and the API's dump call.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};

use crate::cpu::Cpu;
use crate::state::{CpuState, Segment};

const GPR: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const SEG: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// Disassembles one instruction.
pub fn disassemble(bytes: &[u8], bits: u32, rip: u64) -> String {
    let mut decoder = Decoder::with_ip(bits, bytes, rip, DecoderOptions::NONE);
    let insn = decoder.decode();
    let mut text = String::new();
    if insn.is_invalid() {
        text.push_str("(bad)");
    } else {
        GasFormatter::new().format(&insn, &mut text);
    }
    text
}

/// The mode's name.
pub fn mode_name(state: &CpuState) -> &'static str {
    if !state.protected() {
        "real"
    } else if state.virtual_8086() {
        "v86"
    } else if state.code64() {
        "64-bit"
    } else if state.long_mode() {
        "compatibility"
    } else if state.seg[1].db() {
        "32-bit protected"
    } else {
        "16-bit protected"
    }
}

fn segment(out: &mut String, name: &str, s: &Segment) {
    let _ = writeln!(
        out,
        "{name:>4} {:04x} base {:016x} limit {:08x} attr {:05x}",
        s.selector, s.base, s.limit, s.attr
    );
}

/// The registers, control registers, segments and events of a state.
pub fn state(s: &CpuState) -> String {
    let mut out = String::new();
    for (i, name) in GPR.iter().enumerate() {
        let end = if i % 4 == 3 { "\n" } else { "  " };
        let _ = write!(out, "{name:>4} {:016x}{end}", s.regs[i as u8]);
    }
    let _ = writeln!(
        out,
        " rip {:016x}  rflags {:08x}  cpl {}  {}",
        s.rip(),
        s.rflags,
        s.cpl(),
        mode_name(s)
    );
    let _ = writeln!(
        out,
        " cr0 {:08x}  cr2 {:016x}  cr3 {:016x}  cr4 {:08x}  efer {:x}  xcr0 {:x}",
        s.cr0, s.cr2, s.cr3, s.cr4, s.msr.efer, s.xcr0
    );
    for (name, seg) in SEG.iter().zip(&s.seg) {
        segment(&mut out, name, seg);
    }
    segment(&mut out, "ldtr", &s.ldtr);
    segment(&mut out, "tr", &s.tr);
    let _ = writeln!(
        out,
        "gdtr {:016x}/{:04x}  idtr {:016x}/{:04x}",
        s.gdtr.base, s.gdtr.limit, s.idtr.base, s.idtr.limit
    );
    let _ = writeln!(out, " dr {:x?} dr6 {:x} dr7 {:x}", s.db, s.dr6, s.dr7);
    let _ = writeln!(out, "{:?}", s.events);
    out
}

impl Cpu {
    /// A readable dump of everything, with the instruction at RIP.
    pub fn dump(&mut self) -> String {
        self.settle();
        let rip = self.state.rip();
        let (bytes, len) = self.instruction_bytes(rip);
        let mut out = state(&self.state);
        let _ = writeln!(
            out,
            "code {:02x?}: {}",
            &bytes[..len],
            disassemble(&bytes[..len], self.mode.bits(), rip)
        );
        let _ = writeln!(out, "{:?}", self.counters);
        out
    }
}
