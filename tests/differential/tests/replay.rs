//! The cases that once differed, and that a difference is noticed at all.

use anykvm_differential::case::{Case, Engine, Outcome, Patch, State};
use anykvm_differential::compare::{Between, differences, translation_differences};
use anykvm_differential::features::Features;
use anykvm_differential::generate::{Generator, Wanted};
use anykvm_differential::layout::KNOWN;
use anykvm_differential::minimise::minimal;
use anykvm_differential::run::{Engines, Verdict};
use anykvm_differential::{host, text};
use std::path::Path;

/// The engines, if cases can run on this host.
fn engines() -> Option<Engines> {
    if let Some(what) = host::missing() {
        eprintln!("not compared: this host has no {what}");
        return None;
    }
    Some(Engines::new().unwrap())
}

fn add_rax_rcx() -> Case {
    let mut state = State::new(64);
    (state.gpr[0], state.gpr[1]) = (u64::MAX, 1);
    Case {
        bits: 64,
        code: vec![0x48, 0x01, 0xc8],
        state,
        patches: Vec::new(),
    }
}

#[test]
fn kept_cases_agree() {
    let Some(mut engines) = engines() else {
        return;
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let mut replayed = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let case = text::parse(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let differ = engines.different(&case);
        assert_eq!(differ, None, "{}", path.display());
        replayed += 1;
    }
    assert!(replayed > 10);
}

#[test]
fn the_host_computes() {
    let Some(mut engines) = engines() else { return };
    let case = add_rax_rcx();
    let outcome: Vec<Outcome> = engines.host.run(std::slice::from_ref(&case));
    let s = &outcome[0].state;
    assert_eq!((s.gpr[0], s.gpr[1]), (0, 1));
    assert_eq!(s.rip, case.state.rip + 3);
    // CF, PF, AF and ZF beside IF and the bit that is always set.
    assert_eq!(s.rflags & 0xfd7, 0x257 & 0xfd7 | s.rflags & 0x200);
}

#[test]
fn each_engine_is_what_it_says() {
    let Some(mut engines) = engines() else { return };
    engines.run(&[add_rax_rcx()]);
    assert_eq!(engines.interpreter.interpreted_blocks(), 2);
    // The INT3 where the case ends, which is no instruction for the translator.
    assert!(engines.translated.interpreted_blocks() <= 1);
}

#[test]
fn a_difference_is_noticed() {
    let Some(mut engines) = engines() else { return };
    let case = add_rax_rcx();
    let one = engines.host.run(std::slice::from_ref(&case)).remove(0);
    let differ = |change: fn(&mut Outcome)| {
        let mut other = one.clone();
        change(&mut other);
        let list = differences(&case, &one, &other, KNOWN);
        list.into_iter().map(|d| d.what).collect::<Vec<_>>()
    };
    assert_eq!(differ(|_| {}), Vec::<String>::new());
    assert_eq!(differ(|o| o.state.gpr[15] ^= 1 << 63), ["r15"]);
    assert_eq!(differ(|o| o.state.rflags ^= 1), ["rflags"]);
    assert_eq!(differ(|o| o.state.zmm[31][63] ^= 1), ["zmm31"]);
    assert_eq!(differ(|o| o.state.mxcsr ^= 1), ["mxcsr"]);
    assert_eq!(differ(|o| o.state.rip += 1).len(), 1);
    assert_eq!(differ(|o| o.pages.push((0, vec![0; 4096]))).len(), 1);
}

#[test]
fn a_difference_of_translated_code_is_noticed() {
    let Some(mut engines) = engines() else { return };
    let case = add_rax_rcx();
    let one = engines.translated.run(std::slice::from_ref(&case));
    let other = engines.interpreter.run(std::slice::from_ref(&case));
    let differ = |change: fn(&mut Outcome)| {
        let mut changed = other[0].clone();
        change(&mut changed);
        let list = translation_differences(&case, &one[0], &changed);
        list.into_iter().map(|d| d.what).collect::<Vec<_>>()
    };
    assert_eq!(differ(|_| {}), Vec::<String>::new());
    // AF and the reserved bit 1; host and interpreter may differ in the latter.
    assert_eq!(differ(|o| o.state.rflags ^= 0x10), ["rflags"]);
    assert_eq!(differ(|o| o.state.rflags ^= 2), ["rflags"]);
    // The x87 instruction pointer, which is no part of the host's outcome.
    let area = |o: &mut Outcome| o.rest.as_mut().unwrap()[1] ^= 1;
    assert_eq!(differ(area), ["XSAVE area 8"]);
}

/// A program is one case: it is made small without its branches going astray.
#[test]
fn programs_are_made_small() {
    let Some(mut engines) = engines() else { return };
    let mut case = add_rax_rcx();
    // NOP; JMP over INC and UD2 to RDTSC, which the host's time makes another every time; NOP
    case.code = vec![0x90, 0xeb, 0x04, 0xff, 0xc3, 0x0f, 0x0b, 0x0f, 0x31, 0x90];
    let list = engines.different(&case).unwrap();
    let (small, list) = minimal(&mut engines, &case, list);
    assert_eq!(small.code, [0x0f, 0x31]);
    assert_eq!(list[0].between, Between::HostAndInterpreter);
}

/// A case whose process dies of it does not take the others with it.
#[test]
fn endless_cases_end() {
    let Some(mut engines) = engines() else { return };
    let mut endless = add_rax_rcx();
    // jmp to itself.
    endless.code = vec![0xeb, 0xfe];
    let cases = [add_rax_rcx(), endless, add_rax_rcx()];
    let verdicts = engines.run(&cases);
    assert!(verdicts.iter().all(|v| matches!(v, Verdict::Same)));
}

#[test]
fn text_says_all() {
    let Some(engines) = engines() else { return };
    let features = Features::new(engines.interpreter.cpuid());
    let mut generator = Generator::new(features, engines.components, &Wanted::default(), 7);
    for _ in 0..500 {
        let case = generator.case();
        let again = text::parse(&text::print(&case)).unwrap();
        assert!(again == case, "{}", text::print(&case));
    }
    let mut case = add_rax_rcx();
    case.patches.push(Patch {
        at: 0,
        bytes: vec![1],
    });
    assert!(text::parse(&text::print(&case)).is_err());
}
