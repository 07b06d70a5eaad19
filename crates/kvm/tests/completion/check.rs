//! What is checked for each row.

use anykvm::TranslationMode;

use crate::cases::{Case, R15, RBP, RCX, RFLAGS, RIP};
use crate::machine::{CODE, ELSEWHERE, Event, Machine, TARGET};

const HLT: u8 = 0xf4;

pub fn start(case: &Case, mode: TranslationMode) -> Machine {
    let m = Machine::new(mode, case.bits);
    m.ram.write_bytes(CODE as usize, &case.code);
    for at in [case.next(), ELSEWHERE, TARGET] {
        m.ram.write(at as usize, HLT);
    }
    for (at, bytes) in &case.ram {
        m.ram.write_bytes(*at as usize, bytes);
    }
    m.rom.write_bytes(0, &case.rom);
    m.set_regs(&case.start);
    m
}

/// Runs to the exit before step `to`, checks and answers those from `from` on.
pub fn play(m: &Machine, case: &Case, from: usize, to: usize) {
    for (i, step) in case.script.iter().enumerate().take(to).skip(from) {
        let event = m.run();
        assert_eq!(event, step.event, "{}: exit {i}", case.name);
        m.answer(&event, &step.answer);
    }
}

/// The rest of the script, and the end. `expected`: the registers there, but for RIP behind the HLT.
fn finish(m: &Machine, case: &Case, from: usize, expected: &[u64; 18]) {
    let name = &case.name;
    play(m, case, from, case.script.len());
    assert_eq!(m.run(), Event::Halt, "{name}: the end");
    let mut expected = *expected;
    expected[RIP] += 1;
    same_registers(name, "the end", &m.regs(), &expected);
    same_memory(m, case, &case.memory);
    if !case.xsave.is_empty() {
        let mut wanted = start(case, TranslationMode::Off).xsave();
        for (at, bytes) in &case.xsave {
            wanted[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        let differ = wanted.iter().zip(m.xsave()).position(|(a, b)| *a != b);
        assert_eq!(differ, None, "{name}: the XSAVE area");
    }
}

fn same_registers(name: &str, when: &str, got: &[u64; 18], expected: &[u64; 18]) {
    let differ: Vec<_> = (0..18)
        .filter(|i| got[*i] != expected[*i])
        .map(|i| format!("{i}: {:#x}, not {:#x}", got[i], expected[i]))
        .collect();
    assert!(differ.is_empty(), "{name}: registers at {when}: {differ:?}");
}

/// Whether RAM is as at the start but for these bytes.
fn same_memory(m: &Machine, case: &Case, changes: &[(u64, Vec<u8>)]) {
    let mut wanted = start(case, TranslationMode::Off).memory();
    for (at, bytes) in changes {
        wanted[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
    }
    let got = m.memory();
    if let Some(at) = (0..got.len()).find(|i| got[*i] != wanted[*i]) {
        panic!(
            "{}: RAM at {at:#x}: {:#x}, not {:#x}",
            case.name, got[at], wanted[at]
        );
    }
}

/// A store has retired when its exit is seen; anything else has done nothing (of this iteration).
fn check_moment(m: &Machine, case: &Case, k: usize) {
    let regs = m.regs();
    let when = format!("exit {k}");
    if matches!(case.script[k].event, Event::Write { .. }) {
        let mut end = case.end();
        if case.repeats() {
            let mask = if case.bits == crate::cases::Bits::Long {
                u64::MAX
            } else {
                0xffff_ffff
            };
            if regs[RCX] & mask != end[RCX] & mask {
                end = regs;
                end[RIP] = CODE;
            }
        }
        same_registers(&case.name, &when, &regs, &end);
    } else {
        assert_eq!(regs[RIP], CODE, "{}: RIP at {when}", case.name);
        if !case.repeats() {
            same_registers(&case.name, &when, &regs, &case.start);
        }
    }
}

/// Re-enters behind exit `k` with a signal pending (or `immediate_exit`) until EINTR. Further exits may come first.
/// Returns the number of exits seen.
fn complete(m: &Machine, case: &Case, k: usize, immediate: bool) -> usize {
    m.set_immediate_exit(immediate);
    if !immediate {
        m.vcpu.kick_handle().kick();
    }
    let mut seen = k + 1;
    loop {
        let event = m.run();
        if Machine::interrupted(&event) {
            break;
        }
        let step = case.script.get(seen);
        assert_eq!(
            Some(&event),
            step.map(|s| &s.event),
            "{}: exit {seen} at completion",
            case.name
        );
        m.answer(&event, &case.script[seen].answer);
        seen += 1;
        assert!(seen <= case.script.len());
    }
    m.set_immediate_exit(false);
    seen
}

/// The whole table of checks for one row.
pub fn check(case: &Case) {
    for mode in [TranslationMode::Off, TranslationMode::Always] {
        let m = start(case, mode);
        finish(&m, case, 0, &case.end());
        for k in 0..case.script.len() {
            let m = start(case, mode);
            play(&m, case, 0, k);
            assert_eq!(m.run(), case.script[k].event, "{}: exit {k}", case.name);
            check_moment(&m, case, k);
            completed_and_saved(case, mode, k);
            registers_written(case, mode, k);
            moved_elsewhere(case, mode, k);
        }
    }
}

/// Only the exits and the end, for rows of several instructions.
pub fn plain(case: &Case) {
    for mode in [TranslationMode::Off, TranslationMode::Always] {
        finish(&start(case, mode), case, 0, &case.end());
    }
}

/// The operation is complete at EINTR: what is saved there goes on in a new VM.
fn completed_and_saved(case: &Case, mode: TranslationMode, k: usize) {
    let m = start(case, mode);
    play(&m, case, 0, k + 1);
    let seen = complete(&m, case, k, k.is_multiple_of(2));
    let regs = m.regs();
    if seen == case.script.len() && !(case.repeats() && regs[RIP] == CODE) {
        same_registers(
            &case.name,
            &format!("EINTR behind exit {k}"),
            &regs,
            &case.end(),
        );
        same_memory(&m, case, &case.memory);
    } else {
        assert!(case.repeats(), "{}: EINTR with something left", case.name);
        assert_eq!(regs[RIP], CODE, "{}: RIP between iterations", case.name);
    }
    let again = m.moved(mode);
    drop(m);
    finish(&again, case, seen, &case.end());
}

/// A register that the instruction has nothing to do with, written between exit and re-entry, stays, and the
/// operation is not disturbed.
fn registers_written(case: &Case, mode: TranslationMode, k: usize) {
    let r = if case.bits == crate::cases::Bits::Long {
        R15
    } else {
        RBP
    };
    if case.regs.iter().any(|(n, _)| *n == r) {
        return;
    }
    let m = start(case, mode);
    play(&m, case, 0, k + 1);
    let mut regs = m.regs();
    regs[r] = 0x7777;
    m.set_regs(&regs);
    let mut end = case.end();
    end[r] = 0x7777;
    finish(&m, case, k + 1, &end);
}

/// RIP moved between exit and re-entry: the rest of the operation is dropped.
fn moved_elsewhere(case: &Case, mode: TranslationMode, k: usize) {
    let m = start(case, mode);
    play(&m, case, 0, k + 1);
    let memory = m.memory();
    let mut regs = m.regs();
    regs[RIP] = ELSEWHERE;
    m.set_regs(&regs);
    let name = &case.name;
    assert_eq!(
        m.run(),
        Event::Halt,
        "{name}: sent elsewhere behind exit {k}"
    );
    regs[RIP] += 1;
    // RF, which a repeated instruction leaves set, ends with the next one.
    regs[RFLAGS] &= !(1 << 16);
    same_registers(
        name,
        &format!("elsewhere behind exit {k}"),
        &m.regs(),
        &regs,
    );
    assert!(
        memory == m.memory(),
        "{name}: RAM elsewhere behind exit {k}"
    );
}

/// Checks all rows, and says all that is wrong.
pub fn all(cases: impl IntoIterator<Item = Case>) {
    let mut wrong = Vec::new();
    let mut count = 0;
    for case in cases {
        count += 1;
        if let Err(e) = std::panic::catch_unwind(|| check(&case)) {
            let text = e.downcast_ref::<String>().cloned();
            wrong.push(
                text.unwrap_or_else(|| format!("{}: {:?}", case.name, e.downcast_ref::<&str>())),
            );
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {count} rows:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}
