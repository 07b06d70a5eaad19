//! Differences as text.

use std::fmt::Write;

use anykvm_cpu::lockstep::Unlike;
use anykvm_cpu::state::{XsaveArea, rflags};
use anykvm_cpu::{CpuState, Insn, dump};
use iced_x86::{CpuidFeature, RflagsBits};

/// Registers by number.
pub const NAMES: [&str; 17] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15", "rip",
];

/// The status flags that the interpreter and the host's processor may leave different: those that
/// instructions of BMI leave undefined, which the interpreter computes itself. What other instructions leave
/// undefined it takes from the host.
#[derive(Clone, Copy, Debug, Default)]
pub struct Undefined(pub u64);

impl Undefined {
    /// This instruction has been executed.
    pub fn see(&mut self, insn: &Insn) {
        self.0 &= !rflags_of(insn.raw.rflags_modified());
        let features = insn.raw.cpuid_features();
        if features
            .iter()
            .any(|f| matches!(f, CpuidFeature::BMI1 | CpuidFeature::BMI2))
        {
            self.0 |= rflags_of(insn.raw.rflags_undefined());
        }
    }
}

/// From iced's numbering of flags to the processor's.
fn rflags_of(bits: u32) -> u64 {
    const FLAGS: [(u32, u64); 6] = [
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::OF, rflags::OF),
    ];
    let is_set = |(bit, flag): &(u32, u64)| if bits & bit != 0 { *flag } else { 0 };
    FLAGS.iter().map(is_set).sum()
}

/// Whether only status flags differ.
pub fn is_of_flags(one: &CpuState, two: &CpuState) -> bool {
    let differ = one.rflags ^ two.rflags;
    differ != 0 && differ & !rflags::STATUS == 0 && {
        let mut same = one.clone();
        same.rflags = two.rflags;
        same == *two
    }
}

/// What the interpreter could not do.
pub fn unlike(done: u64, why: Unlike) -> String {
    let why = match why {
        Unlike::NoCode => "there is no code that could be translated",
        Unlike::NotTranslated => "there is an instruction that is not translated",
        Unlike::Stopped => {
            "the next one faults, or accesses something that translated code cannot access"
        }
    };
    format!("  translated code went on where, after {done} instructions, {why}\n")
}

/// What a part of the XSAVE area is.
fn part(at: usize) -> String {
    let xmm = at.wrapping_sub(XsaveArea::XMM);
    let ymm = at.wrapping_sub(XsaveArea::YMM_HI);
    let zmm = at.wrapping_sub(XsaveArea::ZMM_HI);
    match at {
        32..160 => format!("st{}/mm{}", (at - 32) / 16, (at - 32) / 16),
        _ if xmm < 256 => format!("xmm{}", xmm / 16),
        _ if ymm < 256 => format!("ymm{}, upper half", ymm / 16),
        _ if zmm < 512 => format!("zmm{}, upper half", zmm / 32),
        XsaveArea::HI16_ZMM..XsaveArea::PKRU => {
            format!("zmm{}", 16 + (at - XsaveArea::HI16_ZMM) / 64)
        }
        XsaveArea::OPMASK..XsaveArea::ZMM_HI => format!("k{}", (at - XsaveArea::OPMASK) / 8),
        _ => "x87 or SSE control".to_owned(),
    }
}

/// A line for each register that differs.
pub fn of_states(interpreted: &CpuState, translated: &CpuState) -> String {
    let mut text = String::new();
    let mut line = |name: &str, a: u64, b: u64| {
        if a != b {
            let _ = writeln!(text, "  {name}: interpreted {a:#x}, translated {b:#x}");
        }
    };
    for (n, name) in (0..).zip(NAMES) {
        line(name, interpreted.regs[n], translated.regs[n]);
    }
    line("rflags", interpreted.rflags, translated.rflags);
    for (at, (a, b)) in words(interpreted).zip(words(translated)).enumerate() {
        if a != b {
            line(
                &format!("{}, at {:#x} of the XSAVE area", part(at * 8), at * 8),
                a,
                b,
            );
        }
    }
    // Whatever else: the lines of the dump that are not the same.
    let (one, two) = (dump::state(interpreted), dump::state(translated));
    for (a, b) in one.lines().zip(two.lines()).skip(5) {
        if a != b {
            let _ = writeln!(text, "  interpreted {a}\n  translated  {b}");
        }
    }
    if text.is_empty() {
        text.push_str("  a register that is in no list: see the states below\n");
    }
    text
}

fn words(state: &CpuState) -> impl Iterator<Item = u64> + '_ {
    let (words, _) = state.xsave.0.as_chunks::<8>();
    words.iter().map(|w| u64::from_le_bytes(*w))
}
