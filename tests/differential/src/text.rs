//! Cases as text, to be kept and replayed. A line a register or piece of memory that is not as
//! [`State::new`] and [`crate::case::pattern`] have it; `#` begins a comment.
//!
//! ```text
//! # add rax,rcx
//! bits 64
//! code 10000000: 4801c8
//! rax = 7fffffffffffffff
//! rflags = 202
//! zmm3 = 000102…            bytes, lowest first, trailing zeros left out
//! memory 20000010: 0011…
//! ```

use crate::case::{Case, Patch, State};
use anyhow::{Context, Result, bail};
use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};
use std::fmt::Write;

/// Names of the general registers, by number.
pub const GPRS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
/// Names of the segment registers, by number.
pub const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

fn trimmed(bytes: &[u8]) -> String {
    let len = bytes.iter().rposition(|b| *b != 0).map_or(1, |n| n + 1);
    hex(&bytes[..len])
}

fn unhex(text: &str) -> Result<Vec<u8>> {
    let text = text.replace(' ', "");
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        bail!("'{text}' are no bytes");
    }
    (0..text.len() / 2)
        .map(|n| Ok(u8::from_str_radix(&text[2 * n..2 * n + 2], 16)?))
        .collect()
}

/// The instructions of a case, as they stand one behind another.
pub fn disassembly(case: &Case) -> Vec<String> {
    let mut decoder = Decoder::with_ip(case.bits, &case.code, case.state.rip, DecoderOptions::NONE);
    let mut formatter = GasFormatter::new();
    let mut lines = Vec::new();
    while decoder.can_decode() {
        let insn = decoder.decode();
        let mut text = String::new();
        formatter.format(&insn, &mut text);
        let at = (insn.ip() - case.state.rip) as usize;
        let bytes = hex(&case.code[at..at + insn.len()]);
        lines.push(format!(
            "{:08x} {bytes:<22} {text}  ({:?})",
            insn.ip(),
            insn.code()
        ));
    }
    lines
}

/// Named values of the registers that are numbers.
pub fn numbers(s: &State) -> Vec<(String, u64)> {
    let mut list: Vec<(String, u64)> = GPRS
        .iter()
        .zip(s.gpr)
        .map(|(name, v)| ((*name).to_owned(), v))
        .collect();
    list.push(("rflags".to_owned(), s.rflags));
    list.push(("fs_base".to_owned(), s.fs_base));
    list.push(("gs_base".to_owned(), s.gs_base));
    let selectors = SEGMENTS.iter().zip(s.selectors);
    list.extend(selectors.map(|(n, v)| ((*n).to_owned(), v.into())));
    list.push(("fcw".to_owned(), s.fcw.into()));
    list.push(("fsw".to_owned(), s.fsw.into()));
    list.push(("ftw".to_owned(), s.ftw.into()));
    list.push(("mxcsr".to_owned(), s.mxcsr.into()));
    list.extend((0..).zip(s.k).map(|(n, v)| (format!("k{n}"), v)));
    list
}

/// Named values of the registers that are bytes.
pub fn bytes(s: &State) -> Vec<(String, &[u8])> {
    let st = (0..).zip(&s.st).map(|(n, v)| (format!("st{n}"), &v[..10]));
    let zmm = (0..)
        .zip(&s.zmm)
        .map(|(n, v)| (format!("zmm{n}"), v.as_slice()));
    st.chain(zmm).collect()
}

/// The text of a case.
pub fn print(case: &Case) -> String {
    let mut out = String::new();
    for line in disassembly(case) {
        let _ = writeln!(out, "# {line}");
    }
    let _ = writeln!(out, "bits {}", case.bits);
    let _ = writeln!(out, "code {:08x}: {}", case.state.rip, hex(&case.code));
    let initial = State::new(case.bits);
    for ((name, value), (_, usual)) in numbers(&case.state).into_iter().zip(numbers(&initial)) {
        if value != usual {
            let _ = writeln!(out, "{name} = {value:x}");
        }
    }
    for ((name, value), (_, usual)) in bytes(&case.state).into_iter().zip(bytes(&initial)) {
        if value != usual {
            let _ = writeln!(out, "{name} = {}", trimmed(value));
        }
    }
    for p in &case.patches {
        let _ = writeln!(out, "memory {:08x}: {}", p.at, hex(&p.bytes));
    }
    out
}

/// A case from its text.
pub fn parse(text: &str) -> Result<Case> {
    let mut case = Case {
        bits: 64,
        code: Vec::new(),
        state: State::new(64),
        patches: Vec::new(),
    };
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if !line.is_empty() {
            parse_line(&mut case, line).with_context(|| format!("in '{line}'"))?;
        }
    }
    check(&case)?;
    Ok(case)
}

/// A case that lies outside its windows would be one about the engines, not the processor.
fn check(case: &Case) -> Result<()> {
    use crate::case::{CODE, CODE_PAGES, DATA, MAX_CODE, PAGE, WRITABLE_PAGES};
    let code = case.code_range();
    if case.code.len() > MAX_CODE
        || code.start < CODE
        || code.end > CODE + (CODE_PAGES * PAGE) as u64
    {
        bail!("the code is outside its pages");
    }
    let end = DATA + (WRITABLE_PAGES * PAGE) as u64;
    for p in &case.patches {
        if p.at < DATA || p.at > end || p.bytes.len() as u64 > end - p.at {
            bail!("memory at {:x} is outside the writable pages", p.at);
        }
    }
    Ok(())
}

fn parse_line(case: &mut Case, line: &str) -> Result<()> {
    if let Some(bits) = line.strip_prefix("bits ") {
        case.bits = bits.trim().parse()?;
        if !matches!(case.bits, 32 | 64) {
            bail!("64 or 32 bits");
        }
        case.state = State::new(case.bits);
    } else if let Some(code) = line.strip_prefix("code ") {
        let (at, bytes) = code.split_once(':').context("no ':'")?;
        case.state.rip = u64::from_str_radix(at.trim(), 16)?;
        case.code = unhex(bytes.trim())?;
    } else if let Some(memory) = line.strip_prefix("memory ") {
        let (at, bytes) = memory.split_once(':').context("no ':'")?;
        case.patches.push(Patch {
            at: u64::from_str_radix(at.trim(), 16)?,
            bytes: unhex(bytes.trim())?,
        });
    } else {
        let (name, value) = line.split_once('=').context("no '='")?;
        set(&mut case.state, name.trim(), value.trim())?;
    }
    Ok(())
}

fn set(s: &mut State, name: &str, value: &str) -> Result<()> {
    let index = |prefix: &str| {
        name.strip_prefix(prefix)
            .and_then(|n| n.parse::<usize>().ok())
    };
    for (prefix, registers) in [
        ("st", s.st.as_flattened_mut()),
        ("zmm", s.zmm.as_flattened_mut()),
    ] {
        let size = if prefix == "st" { 16 } else { 64 };
        if let Some(n) = index(prefix) {
            let register = registers
                .chunks_mut(size)
                .nth(n)
                .context("no such register")?;
            let bytes = unhex(value)?;
            let room = register.get_mut(..bytes.len()).context("too many bytes")?;
            room.copy_from_slice(&bytes);
            return Ok(());
        }
    }
    let v = u64::from_str_radix(value, 16)?;
    if let Some(n) = GPRS.iter().position(|r| *r == name) {
        s.gpr[n] = v;
    } else if let Some(n) = SEGMENTS.iter().position(|r| *r == name) {
        s.selectors[n] = v as u16;
    } else if let Some(n) = index("k") {
        *s.k.get_mut(n).context("no such register")? = v;
    } else {
        match name {
            "rflags" => s.rflags = v,
            "fs_base" => s.fs_base = v,
            "gs_base" => s.gs_base = v,
            "fcw" => s.fcw = v as u16,
            "fsw" => s.fsw = v as u16,
            "ftw" => s.ftw = v as u16,
            "mxcsr" => s.mxcsr = v as u32,
            _ => bail!("no register '{name}'"),
        }
    }
    Ok(())
}
