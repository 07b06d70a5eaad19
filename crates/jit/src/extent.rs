//! What is translated together: the decoded block that has become hot, and what follows it in the page when
//! its conditional branches are not taken.
//!
//! Those branches then are exits at the side of the translation, and everything known of flags and
//! memory stays known behind them. A branch backwards most often closes a loop, so it ends the
//! translation; so does code that needs more of the vector registers than what leads to it, which would
//! have them loaded in vain.

use anykvm_cpu::{Cpu, Insn};
use iced_x86::OpKind;

use crate::legacy::Word;
use crate::simple;
use crate::vectors::Level;

/// Most instructions; the last block may add some.
const INSNS: usize = 48;
/// Most conditional branches that are not the last instruction.
const BRANCHES: usize = 6;

/// The vector registers that instructions need.
pub(crate) fn level(insns: &[Insn]) -> Level {
    insns
        .iter()
        .filter_map(|i| simple::level(&i.raw))
        .max()
        .unwrap_or_default()
}

/// Whether a translation can go on behind a branch that is not taken.
fn goes_on(last: &Insn) -> bool {
    let raw = &last.raw;
    let near = matches!(raw.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32);
    raw.is_jcc_short_or_near() && near && Word::of(last).sign_extend(last.imm) > 0
}

/// Appends to a block what is translated together with it.
pub(crate) fn extend(cpu: &mut Cpu, host: u64, insns: &mut Vec<Insn>, bytes: &mut Vec<u8>) {
    for _ in 0..BRANCHES {
        let next = host + bytes.len() as u64;
        let in_page = host & !0xfff == next & !0xfff;
        if insns.len() >= INSNS || !in_page || !insns.last().is_some_and(goes_on) {
            return;
        }
        let Some((more, their_bytes)) = cpu.code_behind(next) else {
            return;
        };
        if level(&more) > level(insns) {
            return;
        }
        insns.extend(more);
        bytes.extend_from_slice(&their_bytes);
    }
}
