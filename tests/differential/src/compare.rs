//! What differs between two outcomes.

use crate::case::{Case, DATA, End, Outcome, PAGE};
use crate::layout::AVX512;
use crate::text;
use anykvm_cpu::state::rflags;
use iced_x86::{Decoder, DecoderOptions, RflagsBits};
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

/// One thing that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What: a register, "memory 20000010", "end".
    pub what: String,
    /// On the host.
    pub host: String,
    /// Here.
    pub guest: String,
    /// Only flags that the instruction leaves undefined.
    pub undefined: bool,
    /// Which bits differ, if it is a number or a word of memory.
    pub bits: u64,
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
    if case.bits == 32 && s.selectors[1] != crate::case::selector::CODE64 {
        // The upper halves are undefined behind 32-bit code (SDM Vol. 1, 3.4.1.1).
        s.gpr.iter_mut().for_each(|v| *v &= 0xffff_ffff);
        s.gpr[8..].fill(0);
        s.rip &= 0xffff_ffff;
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

/// Everything that differs, with the components that both processors have.
pub fn differences(
    case: &Case,
    host: &Outcome,
    guest: &Outcome,
    components: u64,
) -> Vec<Difference> {
    if host.end == End::SystemCall || host.end == End::Endless && guest.end == End::Endless {
        return Vec::new();
    }
    let (h, g) = (
        normalised(case, host, components),
        normalised(case, guest, components),
    );
    if h == g {
        return Vec::new();
    }
    let mut list = Vec::new();
    let mut add = |what: &str, bits: u64, host: String, guest: String| {
        list.push(Difference {
            what: what.to_owned(),
            host,
            guest,
            undefined: false,
            bits,
        });
    };
    if end(&h) != end(&g) {
        add("end", 0, end(&h), end(&g));
    }
    for ((name, a), (_, b)) in text::numbers(&h.state).iter().zip(text::numbers(&g.state)) {
        if *a != b {
            add(name, a ^ b, format!("{a:x}"), format!("{b:x}"));
        }
    }
    for ((name, a), (_, b)) in text::bytes(&h.state).iter().zip(text::bytes(&g.state)) {
        if *a != b {
            let (a, b) = differing_words(a, b);
            add(name, 0, a, b);
        }
    }
    memory(&h, &g, &mut add);
    let loose = undefined_flags(case);
    for d in &mut list {
        d.undefined = d.what == "rflags" && (h.state.rflags ^ g.state.rflags) & !loose == 0;
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
    let mut decoder = Decoder::with_ip(case.bits, &case.code, case.state.rip, DecoderOptions::NONE);
    let mut bits = 0;
    while decoder.can_decode() {
        bits |= decoder.decode().rflags_undefined();
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
