//! The tables of `docs/processor.md`, made from those of the code.

use std::fmt::Write;

use anykvm_cpu::cpuid::{FLAGS, Feature, Register, Source, WITHOUT_FLAG};
use anykvm_cpu::msr::{FEATURES, Writes, rows};
use iced_x86::CpuidFeature;

use crate::msr::OWN;
use crate::pages::{self, Part, paragraph};

const PARTS: &[Part] = &[
    ("flags", flags),
    ("without-flag", without_flag),
    ("absent", absent),
    ("msrs", msrs),
    ("feature-msrs", feature_msrs),
];

fn place(f: Feature) -> String {
    let Feature(leaf, index, register, bit) = f;
    let register = match register {
        Register::Eax => "EAX",
        Register::Ebx => "EBX",
        Register::Ecx => "ECX",
        Register::Edx => "EDX",
    };
    let index = if matches!(leaf, 7 | 0xd) {
        format!(".{index}")
    } else {
        String::new()
    };
    format!("{leaf:X}h{index} {register}[{bit}]")
}

fn source(s: Source) -> &'static str {
    match s {
        Source::Always => "always",
        Source::Host => "host",
        Source::HostYmm => "host, YMM",
        Source::HostZmm => "host, ZMM",
        Source::Intel => "Intel",
        Source::Amd => "AMD",
        Source::Owner => "owner",
        Source::State => "state",
    }
}

fn flags() -> String {
    let mut text = String::from("| flag | where | offered | meaning |\n|---|---|---|---|\n");
    for row in FLAGS {
        let (at, when) = (place(row.feature), source(row.source));
        let _ = writeln!(text, "| {} | {at} | {when} | {} |", row.name, row.about);
    }
    text
}

fn without_flag() -> String {
    paragraph(WITHOUT_FLAG.iter().map(|f| format!("{f:?}")))
}

fn absent() -> String {
    let known = |f: &CpuidFeature| {
        WITHOUT_FLAG.contains(f) || FLAGS.iter().any(|row| row.gates.contains(f))
    };
    let absent = CpuidFeature::values().filter(|f| !known(f));
    paragraph(absent.map(|f| format!("{f:?}")))
}

fn writes(w: Writes) -> String {
    match w {
        Writes::Anything => "anything".into(),
        Writes::Bits(0) => "0".into(),
        Writes::Bits(bits) => format!("bits {bits:#x}"),
        Writes::Canonical => "canonical addresses".into(),
        Writes::HostOnly => "nothing by a guest".into(),
        Writes::Lock => "bit 0, once".into(),
        Writes::HostElseDropped => "dropped for a guest".into(),
        Writes::PatTypes | Writes::MtrrTypes => "memory types".into(),
        Writes::MtrrDefType => "type and enable bits".into(),
        Writes::MtrrRange => "base, type; mask".into(),
        Writes::Dropped => "dropped".into(),
        Writes::Nothing => "nothing".into(),
        Writes::Rules => "by rules of its own".into(),
    }
}

fn numbers(first: u32, last: u32) -> String {
    if first == last {
        format!("{first:X}h")
    } else {
        format!("{first:X}h-{last:X}h")
    }
}

fn names(needs: &[Feature]) -> String {
    let name = |f: &Feature| {
        FLAGS
            .iter()
            .find(|row| row.feature == *f)
            .map(|row| row.name)
    };
    let names: Vec<_> = needs.iter().filter_map(name).collect();
    names.join(" or ")
}

fn msrs() -> String {
    let mut lines: Vec<(u32, String)> = Vec::new();
    let yes = |saved| if saved { "yes" } else { "" };
    for row in rows() {
        let reset = row.reset.map_or(String::new(), |v| format!("{v:#x}"));
        let line = format!(
            "| {} | {} | {} | {reset} | {} | {} |",
            numbers(row.first, row.last),
            row.name,
            writes(row.writes),
            names(row.needs),
            yes(row.saved),
        );
        lines.push((row.first, line));
    }
    for own in OWN {
        let line = format!(
            "| {} | {} | by rules of its own | | | {} |",
            numbers(own.first, own.last),
            own.name,
            yes(own.saved),
        );
        lines.push((own.first, line));
    }
    lines.sort();
    let mut text = String::from(
        "| number | name | may be written | after RESET | needs | saved |\n|---|---|---|---|---|---|\n",
    );
    for (_, line) in lines {
        text += &line;
        text.push('\n');
    }
    text
}

fn feature_msrs() -> String {
    let name = |index| {
        rows()
            .into_iter()
            .find(|row| row.first == index)
            .map_or("", |r| r.name)
    };
    let mut text = String::from("| number | name | value |\n|---|---|---|\n");
    for (index, value) in FEATURES {
        let _ = writeln!(text, "| {index:X}h | {} | {value:#x} |", name(*index));
    }
    text
}

#[test]
fn the_page_about_the_processor_is_up_to_date() {
    pages::check("processor.md", PARTS);
}
