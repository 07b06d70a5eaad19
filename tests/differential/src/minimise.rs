//! Makes a differing case small: instructions, registers and memory that are not needed go.

use crate::case::{Case, State};
use crate::compare::{Between, Difference};
use crate::run::Engines;
use iced_x86::{Decoder, DecoderOptions, Instruction};
use std::ops::Range;

/// The smallest case found that still differs, and how.
pub fn minimal(
    engines: &mut Engines,
    case: &Case,
    list: Vec<Difference>,
) -> (Case, Vec<Difference>) {
    let mut best = (case.clone(), list);
    loop {
        let before = best.0.clone();
        drop_instructions(engines, &mut best);
        plain_registers(engines, &mut best);
        drop_memory(engines, &mut best);
        if best.0 == before {
            return best;
        }
    }
}

/// Takes a change if the case still differs.
fn attempt(
    engines: &mut Engines,
    best: &mut (Case, Vec<Difference>),
    change: impl FnOnce(&mut Case),
) -> bool {
    let mut case = best.0.clone();
    change(&mut case);
    if case == best.0 || case.code.is_empty() {
        return false;
    }
    match engines.different(&case) {
        // A smaller case of something else is not wanted.
        Some(list) if between(&list) == between(&best.1) => {
            *best = (case, list);
            true
        }
        _ => false,
    }
}

fn between(list: &[Difference]) -> Option<Between> {
    list.first().map(|d| d.between)
}

fn drop_instructions(engines: &mut Engines, best: &mut (Case, Vec<Difference>)) {
    let mut n = 0;
    while let Some(range) = ranges(&best.0).get(n).cloned() {
        // Out of the way; or so that the others stay where they are, if that matters.
        let dropped = attempt(engines, best, |c| drain(c, range.clone()))
            || range.start == 0
                && attempt(engines, best, |c| {
                    c.state.rip += range.len() as u64;
                    c.code.drain(range.clone());
                })
            || attempt(engines, best, |c| {
                if c.code[range.clone()].iter().all(|b| *b == NOP) {
                    return;
                }
                c.code[range].fill(NOP);
            });
        if !dropped {
            n += 1;
        }
    }
}

const NOP: u8 = 0x90;

/// Where the instructions are in the code.
fn ranges(case: &Case) -> Vec<Range<usize>> {
    let start = case.state.rip;
    let mut decoder = Decoder::with_ip(case.bits, &case.code, start, DecoderOptions::NONE);
    let range = |i: Instruction| (i.ip() - start) as usize..(i.next_ip() - start) as usize;
    decoder.iter().map(range).collect()
}

/// Takes an instruction out; relative branches and addresses lead where they led.
fn drain(case: &mut Case, gone: Range<usize>) {
    let start = case.state.rip;
    let mut decoder = Decoder::with_ip(case.bits, &case.code, start, DecoderOptions::NONE);
    let mut displacements = Vec::new();
    while decoder.can_decode() {
        let i = decoder.decode();
        let offsets = decoder.get_constant_offsets(&i);
        let (target, at, size) = if i.is_ip_rel_memory_operand() {
            let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
            (i.ip_rel_memory_address(), at, size)
        } else if i.near_branch_target() != 0 {
            let (at, size) = (offsets.immediate_offset(), offsets.immediate_size());
            (i.near_branch_target(), at, size)
        } else {
            continue;
        };
        let inside = start..start + case.code.len() as u64;
        let end = start + gone.end as u64;
        if inside.contains(&target) && (i.ip() < end) != (target < end) && i.ip() != end {
            let by = gone.len() as i64;
            let change = if target >= end { -by } else { by };
            displacements.push(((i.ip() - start) as usize + at, size, change));
        }
    }
    for (at, size, change) in displacements {
        let Some(bytes) = case.code.get_mut(at..at + size) else {
            continue;
        };
        let mut word = [0; 8];
        word[..size].copy_from_slice(bytes);
        let moved = i64::from_le_bytes(word).wrapping_add(change);
        bytes.copy_from_slice(&moved.to_le_bytes()[..size]);
    }
    case.code.drain(gone);
}

fn plain_registers(engines: &mut Engines, best: &mut (Case, Vec<Difference>)) {
    let plain = State::new(best.0.bits);
    attempt(engines, best, |c| {
        c.state = State {
            rip: c.state.rip,
            ..plain
        };
    });
    attempt(engines, best, |c| c.state.zmm = plain.zmm);
    attempt(engines, best, |c| c.state.k = plain.k);
    attempt(engines, best, |c| {
        (c.state.st, c.state.fcw) = (plain.st, plain.fcw);
        (c.state.fsw, c.state.ftw) = (plain.fsw, plain.ftw);
    });
    for n in 0..16 {
        attempt(engines, best, |c| c.state.gpr[n] = plain.gpr[n]);
    }
    for n in 0..32 {
        attempt(engines, best, |c| c.state.zmm[n] = plain.zmm[n]);
        for at in (0..64).step_by(8) {
            attempt(engines, best, |c| c.state.zmm[n][at..at + 8].fill(0));
        }
    }
    for n in 0..8 {
        attempt(engines, best, |c| c.state.k[n] = plain.k[n]);
        attempt(engines, best, |c| c.state.st[n] = plain.st[n]);
    }
    for n in 0..6 {
        attempt(engines, best, |c| c.state.selectors[n] = plain.selectors[n]);
    }
    attempt(engines, best, |c| c.state.fs_base = plain.fs_base);
    attempt(engines, best, |c| c.state.gs_base = plain.gs_base);
    attempt(engines, best, |c| c.state.fcw = plain.fcw);
    attempt(engines, best, |c| c.state.fsw = plain.fsw);
    attempt(engines, best, |c| c.state.ftw = plain.ftw);
    attempt(engines, best, |c| c.state.mxcsr = plain.mxcsr);
    for bit in 0..22 {
        let same = (best.0.state.rflags ^ plain.rflags) >> bit & 1 == 0;
        if !same {
            attempt(engines, best, |c| c.state.rflags ^= 1 << bit);
        }
        attempt(engines, best, |c| {
            let usual = u32::from((plain.mxcsr >> bit & 1) != 0) << bit;
            c.state.mxcsr = c.state.mxcsr & !(1 << bit) | usual;
        });
    }
}

fn drop_memory(engines: &mut Engines, best: &mut (Case, Vec<Difference>)) {
    let mut n = 0;
    while n < best.0.patches.len() {
        let dropped = attempt(engines, best, |c| {
            c.patches.remove(n);
        });
        if !dropped {
            attempt(engines, best, |c| {
                let p = &mut c.patches[n];
                let len = p.bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
                p.bytes.truncate(len);
            });
            n += 1;
        }
    }
}
