//! There is room for the stub of every operation a guest can make: all opcodes that stubs serve, with
//! every immediate, operands in registers and in memory, with every rounding control. (A file, and so
//! a process, of its own: the stubs stay.)

mod host;

use std::collections::HashSet;

use anykvm_cpu::assist::{self, Plan};
use host::Random;
use host::instances::{encode, instance, served};
use iced_x86::{Code, Instruction, OpKind};

/// What stays the same for all registers, masks and broadcasts.
fn form(insn: &Instruction) -> Option<Vec<u8>> {
    let (plan, _) = Plan::of(insn)?;
    encode(&plan.insn, 64)
}

#[test]
fn every_operation_has_its_stub() {
    let mut r = Random(0x2468_ace0_1357_9bdf);
    let (mut forms, mut bound) = (HashSet::new(), 0);
    for code in Code::values().filter(|c| served(*c)) {
        for _ in 0..48 {
            let Some(mut insn) = instance(code, 64, &mut r) else {
                break;
            };
            let immediate = insn.op_kinds().any(|k| k == OpKind::Immediate8);
            if immediate {
                insn.set_immediate8(0);
            }
            if !form(&insn).is_some_and(|f| forms.insert(f)) {
                continue;
            }
            let last = if immediate { u8::MAX } else { 0 };
            for value in 0..=last {
                if immediate {
                    insn.set_immediate8(value);
                }
                assert!(assist::bind(&insn).is_some(), "{bound} stubs, then {insn}");
                bound += 1;
            }
        }
    }
    println!("{} forms, {bound} stubs", forms.len());
    assert!(bound > 50_000);
}
