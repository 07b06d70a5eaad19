//! Makes a differing case small: instructions, registers and memory that are not needed go.

use crate::case::{Case, State};
use crate::compare::Difference;
use crate::run::Pair;
use iced_x86::{Decoder, DecoderOptions};

/// The smallest case found that still differs, and how.
pub fn minimal(pair: &mut Pair, case: &Case, list: Vec<Difference>) -> (Case, Vec<Difference>) {
    let mut best = (case.clone(), list);
    loop {
        let before = best.0.clone();
        drop_instructions(pair, &mut best);
        plain_registers(pair, &mut best);
        drop_memory(pair, &mut best);
        if best.0 == before {
            return best;
        }
    }
}

/// Takes a change if the case still differs.
fn attempt(
    pair: &mut Pair,
    best: &mut (Case, Vec<Difference>),
    change: impl FnOnce(&mut Case),
) -> bool {
    let mut case = best.0.clone();
    change(&mut case);
    if case == best.0 || case.code.is_empty() {
        return false;
    }
    match pair.different(&case) {
        Some(list) => {
            *best = (case, list);
            true
        }
        None => false,
    }
}

fn drop_instructions(pair: &mut Pair, best: &mut (Case, Vec<Difference>)) {
    let mut n = 0;
    loop {
        let case = &best.0;
        let mut decoder =
            Decoder::with_ip(case.bits, &case.code, case.state.rip, DecoderOptions::NONE);
        let start = case.state.rip;
        let Some(range) = decoder
            .iter()
            .map(|i| (i.ip() - start) as usize..(i.next_ip() - start) as usize)
            .nth(n)
        else {
            return;
        };
        // In place, so that no address changes; or out of the way.
        let dropped = attempt(pair, best, |c| {
            c.code.drain(range.clone());
        }) || attempt(pair, best, |c| {
            if c.code[range.clone()].iter().all(|b| *b == 0x90) {
                return;
            }
            c.code[range].fill(0x90);
        });
        if !dropped {
            n += 1;
        }
    }
}

fn plain_registers(pair: &mut Pair, best: &mut (Case, Vec<Difference>)) {
    let plain = State::new(best.0.bits);
    attempt(pair, best, |c| {
        c.state = State {
            rip: c.state.rip,
            ..plain
        };
    });
    attempt(pair, best, |c| c.state.zmm = plain.zmm);
    attempt(pair, best, |c| c.state.k = plain.k);
    attempt(pair, best, |c| {
        (c.state.st, c.state.fcw) = (plain.st, plain.fcw);
        (c.state.fsw, c.state.ftw) = (plain.fsw, plain.ftw);
    });
    for n in 0..16 {
        attempt(pair, best, |c| c.state.gpr[n] = plain.gpr[n]);
    }
    for n in 0..32 {
        attempt(pair, best, |c| c.state.zmm[n] = plain.zmm[n]);
        for at in (0..64).step_by(8) {
            attempt(pair, best, |c| c.state.zmm[n][at..at + 8].fill(0));
        }
    }
    for n in 0..8 {
        attempt(pair, best, |c| c.state.k[n] = plain.k[n]);
        attempt(pair, best, |c| c.state.st[n] = plain.st[n]);
    }
    for n in 0..6 {
        attempt(pair, best, |c| c.state.selectors[n] = plain.selectors[n]);
    }
    attempt(pair, best, |c| c.state.fs_base = plain.fs_base);
    attempt(pair, best, |c| c.state.gs_base = plain.gs_base);
    attempt(pair, best, |c| c.state.fcw = plain.fcw);
    attempt(pair, best, |c| c.state.fsw = plain.fsw);
    attempt(pair, best, |c| c.state.ftw = plain.ftw);
    attempt(pair, best, |c| c.state.mxcsr = plain.mxcsr);
    for bit in 0..22 {
        let same = (best.0.state.rflags ^ plain.rflags) >> bit & 1 == 0;
        if !same {
            attempt(pair, best, |c| c.state.rflags ^= 1 << bit);
        }
        attempt(pair, best, |c| {
            let usual = u32::from((plain.mxcsr >> bit & 1) != 0) << bit;
            c.state.mxcsr = c.state.mxcsr & !(1 << bit) | usual;
        });
    }
}

fn drop_memory(pair: &mut Pair, best: &mut (Case, Vec<Difference>)) {
    let mut n = 0;
    while n < best.0.patches.len() {
        let dropped = attempt(pair, best, |c| {
            c.patches.remove(n);
        });
        if !dropped {
            attempt(pair, best, |c| {
                let p = &mut c.patches[n];
                let len = p.bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
                p.bytes.truncate(len);
            });
            n += 1;
        }
    }
}
