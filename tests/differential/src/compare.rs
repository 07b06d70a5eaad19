//! What differs between two outcomes.

use crate::case::{Case, DATA, End, Outcome, PAGE};
use crate::layout::AVX512;
use crate::text;
use anykvm_cpu::state::{XSAVE_BYTES, rflags};
use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic, RflagsBits};
use std::fmt::Write;

/// The flags that are compared.
const FLAGS: u64 = rflags::STATUS
    | rflags::TF
    | rflags::IF
    | rflags::DF
    | rflags::IOPL
    | rflags::NT
    | rflags::RF
    | rflags::AC
    | rflags::ID;
/// From here on addresses are the kernel's: Linux sets the P bit in the error code that a user program
/// sees of a page fault there, whatever the page tables say.
const KERNEL: u64 = 0x7fff_ffff_f000;

/// Who differs from whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Between {
    /// The interpreter from the host's processor.
    HostAndInterpreter,
    /// Translated code from the interpreter.
    InterpreterAndTranslated,
}

/// One thing that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Who differs.
    pub between: Between,
    /// What: a register, "memory 20000010", "end".
    pub what: String,
    /// What it should be: on the host, or interpreted.
    pub wanted: String,
    /// What it is: interpreted, or translated.
    pub found: String,
    /// Only flags that the instruction leaves undefined.
    pub undefined: bool,
    /// Which bits differ, if it is a number or a word of memory.
    pub bits: u64,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (wanted, found) = match self.between {
            Between::HostAndInterpreter => ("host", "interpreted"),
            Between::InterpreterAndTranslated => ("interpreted", "translated"),
        };
        let Self { what, .. } = self;
        write!(
            f,
            "{what}: {wanted} {}, {found} {}",
            self.wanted, self.found
        )
    }
}

impl Difference {
    /// Whether this bit is all that differs.
    pub fn is_bit(&self, n: u32) -> bool {
        self.bits == 1 << n
    }
}

/// Removes from an outcome what no program can rely on, so that outcomes can be compared.
fn normalised(case: &Case, outcome: &Outcome, components: u64) -> Outcome {
    let mut o = outcome.clone();
    if let End::Exception {
        error: Some(error),
        cr2: Some(cr2),
        ..
    } = &mut o.end
        && *cr2 >= KERNEL
    {
        *error |= 1;
    }
    let s = &mut o.state;
    s.rflags &= FLAGS;
    if s.selectors[1] != crate::case::selector::CODE64 {
        // The upper halves are undefined behind 32-bit code (SDM Vol. 1, 3.4.1.1).
        s.gpr[..8].iter_mut().for_each(|v| *v &= 0xffff_ffff);
        s.rip &= 0xffff_ffff;
        if case.bits == 32 {
            s.gpr[8..].fill(0);
        }
    }
    if components & AVX512 != AVX512 {
        s.k = [0; 8];
        s.zmm[16..].fill([0; 64]);
        s.zmm.iter_mut().for_each(|z| z[32..].fill(0));
    }
    // The way to a handler in user mode clears null selectors of the data segment registers (SDM Vol.
    // 2, IRET, RETURN-TO-OUTER-PRIVILEGE-LEVEL).
    for n in [0, 3, 4, 5] {
        if s.selectors[n] < 4 {
            s.selectors[n] = 0;
        }
    }
    s.st.iter_mut().for_each(|st| st[10..].fill(0));
    s.reserved = 0;
    o
}

/// Everything in which the interpreter differs from the host, in the components that both have.
pub fn differences(
    case: &Case,
    host: &Outcome,
    interpreted: &Outcome,
    components: u64,
) -> Vec<Difference> {
    if host.end == End::SystemCall || host.end == End::Endless && interpreted.end == End::Endless {
        return Vec::new();
    }
    let h = normalised(case, host, components);
    let i = normalised(case, interpreted, components);
    let mut list = between(Between::HostAndInterpreter, &h, &i);
    let loose = undefined_flags(case);
    for d in &mut list {
        d.undefined = d.what == "rflags" && (h.state.rflags ^ i.state.rflags) & !loose == 0;
    }
    list
}

/// Everything in which translated code differs from the interpreter. Where processors have a choice, both
/// make the same, but for the flags that BMI1 and BMI2 leave undefined, since only the translator runs these
/// instructions themselves, and for OF of RCL and RCR, of which a host leaves now this and now that.
pub fn translation_differences(
    case: &Case,
    interpreted: &Outcome,
    translated: &Outcome,
) -> Vec<Difference> {
    // Where an endless case was stopped is chance.
    if interpreted.end == End::Endless && translated.end == End::Endless {
        return Vec::new();
    }
    let differ = interpreted.state.rflags ^ translated.state.rflags;
    if differ != 0 && differ & !undefined_flags_of(case, has_loose_flags) == 0 {
        let mut same = translated.clone();
        same.state.rflags = interpreted.state.rflags;
        return between(Between::InterpreterAndTranslated, interpreted, &same);
    }
    between(Between::InterpreterAndTranslated, interpreted, translated)
}

fn has_loose_flags(insn: &Instruction) -> bool {
    let of = |f: &CpuidFeature| matches!(f, CpuidFeature::BMI1 | CpuidFeature::BMI2);
    insn.cpuid_features().iter().any(of) || is_rotation_through_carry(insn)
}

fn is_rotation_through_carry(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr)
}

fn between(who: Between, wanted: &Outcome, found: &Outcome) -> Vec<Difference> {
    if wanted.same(found) {
        return Vec::new();
    }
    let mut list = Vec::new();
    let mut add = |what: &str, bits: u64, wanted: String, found: String| {
        list.push(Difference {
            between: who,
            what: what.to_owned(),
            wanted,
            found,
            undefined: false,
            bits,
        });
    };
    if end(wanted) != end(found) {
        add("end", 0, end(wanted), end(found));
    }
    let (numbers, others) = (text::numbers(&wanted.state), text::numbers(&found.state));
    for ((name, a), (_, b)) in numbers.iter().zip(others) {
        if *a != b {
            add(name, a ^ b, format!("{a:x}"), format!("{b:x}"));
        }
    }
    let (bytes, others) = (text::bytes(&wanted.state), text::bytes(&found.state));
    for ((name, a), (_, b)) in bytes.iter().zip(others) {
        if *a != b {
            let (a, b) = differing_words(a, b);
            add(name, 0, a, b);
        }
    }
    memory(wanted, found, &mut add);
    if let (Some(a), Some(b)) = (&wanted.rest, &found.rest) {
        for (at, (x, y)) in a.iter().zip(b).enumerate().filter(|(_, (x, y))| x != y) {
            let name = match at.checked_sub(XSAVE_BYTES / 8) {
                None => format!("XSAVE area {:x}", at * 8),
                Some(n) => format!("system state {n}"),
            };
            add(&name, x ^ y, format!("{x:x}"), format!("{y:x}"));
        }
    }
    list
}

fn end(o: &Outcome) -> String {
    match &o.end {
        End::Landed => format!("landed at {:x}", o.state.rip),
        End::Exception { vector, error, cr2 } => {
            let mut s = format!("vector {vector} at {:x}", o.state.rip);
            if let Some(e) = error {
                let _ = write!(s, ", error {e:x}");
            }
            if let Some(a) = cr2 {
                let _ = write!(s, ", CR2 {a:x}");
            }
            s
        }
        other => format!("{other:?}"),
    }
}

/// The 64-bit words that differ, with their numbers.
fn differing_words(a: &[u8], b: &[u8]) -> (String, String) {
    let mut texts = (String::new(), String::new());
    for (n, (x, y)) in a.chunks(8).zip(b.chunks(8)).enumerate() {
        if x != y {
            for (text, bytes) in [(&mut texts.0, x), (&mut texts.1, y)] {
                let hex: String = bytes.iter().rev().map(|b| format!("{b:02x}")).collect();
                let _ = write!(text, "[{n}]={hex} ");
            }
        }
    }
    texts
}

fn memory(h: &Outcome, g: &Outcome, add: &mut impl FnMut(&str, u64, String, String)) {
    let initial = |o: &Outcome, n: usize| o.pages.iter().find(|p| p.0 == n).map(|p| p.1.clone());
    let mut numbers: Vec<usize> = h.pages.iter().chain(&g.pages).map(|p| p.0).collect();
    numbers.sort_unstable();
    numbers.dedup();
    for n in numbers {
        match (initial(h, n), initial(g, n)) {
            (Some(a), Some(b)) => {
                let at = |i: usize| DATA + (n * PAGE + i * 8) as u64;
                let words = a.chunks(8).zip(b.chunks(8)).enumerate();
                for (i, (x, y)) in words.filter(|(_, (x, y))| x != y).take(8) {
                    let word = |b: &[u8]| b.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
                    let (x, y) = (word(x), word(y));
                    let what = format!("memory {:x}", at(i));
                    add(&what, x ^ y, format!("{x:016x}"), format!("{y:016x}"));
                }
            }
            (a, b) => {
                let says = |p: Option<Vec<u8>>| p.map_or("as before", |_| "changed").to_owned();
                let what = format!("memory page {:x}", DATA + (n * PAGE) as u64);
                add(&what, 0, says(a), says(b));
            }
        }
    }
}

/// The flags that some instruction of the case leaves undefined.
fn undefined_flags(case: &Case) -> u64 {
    undefined_flags_of(case, |_| true)
}

/// The same of some instructions.
fn undefined_flags_of(case: &Case, wanted: fn(&Instruction) -> bool) -> u64 {
    let mut decoder = Decoder::with_ip(case.bits, &case.code, case.state.rip, DecoderOptions::NONE);
    let mut bits = 0;
    while decoder.can_decode() {
        let insn = decoder.decode();
        if wanted(&insn) {
            bits |= insn.rflags_undefined();
            // iced-x86 takes it for unchanged if the count is a multiple of the width with CF.
            bits |= u32::from(is_rotation_through_carry(&insn)) * RflagsBits::OF;
        }
    }
    [
        (RflagsBits::OF, rflags::OF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
    ]
    .into_iter()
    .filter(|(b, _)| bits & b != 0)
    .map(|(_, f)| f)
    .sum()
}
