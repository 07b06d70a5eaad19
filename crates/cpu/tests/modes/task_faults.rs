//! What a task switch refuses, and what is a fault of the task it enters (SDM Vol. 3, 8.3 and table
//! 8-1; Vol. 2, JMP, CALL, INT n, IRET).

use anykvm_cpu::events::vector::{GP, NP, SS, TS};
use anykvm_cpu::state::rflags;

use crate::harness::Computer;
use crate::harness::tables::*;
use crate::machine::*;
use crate::tasks::*;

/// Tasks that take #TS, #NP, #SS and #GP, since the new task may have no stack to do it: the first
/// TSS, selector and instruction; the distance of the TSSs.
const JUDGES: u64 = 0x5c00;
const JUDGE_SELECTORS: u16 = 0xd8;
const JUDGE_CODE: u64 = 0x1300;
const JUDGE_BYTES: u64 = 0x80;
const JUDGED: [u8; 4] = [TS, NP, SS, GP];
/// A vector and its error code.
type Refusal = (u8, u32);

/// TSS descriptors that JMP, CALL, gates and IRET refuse, in the old task (SDM Vol. 2, JMP, CALL,
/// INT n, IRET).
#[test]
fn refused_descriptors() {
    let error: u32 = FREE.into();
    // Access byte, limit; fault of JMP, CALL and gates.
    let rows: &[(u8, u32, Option<Refusal>)] = &[
        (0x89, 0x67, None),
        (0x81, 0x2b, None),
        (0x89, 0x66, Some((TS, error))),
        (0x81, 0x2a, Some((TS, error))),
        (0x8b, 0x67, Some((GP, error))),
        (0x83, 0x2b, Some((GP, error))),
        (0x09, 0x67, Some((NP, error))),
        (0x01, 0x2b, Some((NP, error))),
        (0x0b, 0x67, Some((GP, error))),
        (0x82, 0x67, Some((GP, error))),
        (0x92, 0x67, Some((GP, error))),
    ];
    for by in EVERY_WAY {
        for &(byte, limit, want) in rows {
            let mut c = two_tasks(by, true, byte & 8 != 0);
            c.define(FREE, descriptor(NEW as u32, limit, byte, 0));
            let ext = u32::from(by == Exception);
            let want = want.map_or(Halt, |(v, code)| Fault(v, code | ext));
            assert_eq!(end(&mut c), want, "{by:?} {byte:x} {limit:x}");
            if want != Halt {
                assert_eq!(c.cpu.state.tr.selector, TSS_SELECTOR);
                let rip = if by == Exception {
                    0
                } else {
                    c.stack32(1) - CODE as u32
                };
                assert_eq!(rip, 0, "{by:?} {byte:x}");
            }
        }
    }
    // IRET wants a busy TSS in the GDT.
    for (link, byte, limit, want) in [
        (FREE, 0x8bu8, 0x67, Halt),
        (FREE, 0x89, 0x67, Fault(TS, error)),
        (FREE, 0x8b, 0x66, Fault(TS, error)),
        (FREE, 0x0b, 0x67, Fault(NP, error)),
        (FREE, 0x92, 0x67, Fault(TS, error)),
        (FREE | 4, 0x8b, 0x67, Fault(TS, error | 4)),
        (0x100, 0x8b, 0x67, Fault(TS, 0x100)),
        (0, 0x8b, 0x67, Fault(TS, 0)),
    ] {
        let mut c = two_tasks(Jump, true, true);
        c.put(CODE, &[0xcf]);
        c.put(TSS, &link.to_le_bytes());
        c.define(FREE, descriptor(NEW as u32, limit, byte, 0));
        c.cpu.state.rflags |= rflags::NT;
        c.cpu.state_changed();
        assert_eq!(end(&mut c), want, "link {link:x} {byte:x}");
    }
}

/// Task gates: their privilege and presence, and the selector in them; and the privilege of a TSS.
#[test]
fn gates_and_privilege() {
    // CPL, RPL of the selector, access byte of the gate, selector in it, end.
    let g = u32::from(GATE);
    for (cpl, rpl, byte, inside, want) in [
        (0u8, 0u16, 0x85u8, FREE, Halt),
        (3, 3, 0xe5, FREE, Halt),
        (3, 3, 0xc5, FREE, Fault(GP, g)),
        (0, 3, 0xc5, FREE, Fault(GP, g)),
        (3, 0, 0xc5, FREE, Fault(GP, g)),
        (0, 0, 0x05, FREE, Fault(NP, g)),
        (3, 3, 0x45, FREE, Fault(GP, g)),
        (0, 0, 0x85, 0, Fault(GP, 0)),
        (0, 0, 0x85, FREE | 4, Fault(GP, (FREE | 4).into())),
        (0, 0, 0x85, 0x100, Fault(GP, 0x100)),
        // The RPL in the gate, and the TSS's DPL, do not matter.
        (3, 3, 0xe5, FREE | 3, Halt),
    ] {
        for by in [JumpGate, CallGate] {
            let mut c = two_tasks(by, true, true);
            c.define(GATE, gate(inside, 0, byte, 0));
            let mut code = by.code();
            code[5] |= rpl as u8;
            c.put(CODE, &code);
            if cpl == 3 {
                c.user();
            }
            assert_eq!(
                end(&mut c),
                want,
                "{by:?} CPL {cpl} RPL {rpl} {byte:x} {inside:x}"
            );
        }
    }
    // A TSS without a gate.
    let f = u32::from(FREE);
    for (cpl, rpl, byte, want) in [
        (3u8, 3u8, 0xe9u8, Halt),
        (3, 3, 0x89, Fault(GP, f)),
        (0, 3, 0xc9, Fault(GP, f)),
        (0, 0, 0x89, Halt),
    ] {
        for by in [Jump, Call] {
            let mut c = two_tasks(by, true, true);
            c.define(FREE, descriptor(NEW as u32, 0x67, byte, 0));
            let mut code = by.code();
            code[5] |= rpl;
            c.put(CODE, &code);
            if cpl == 3 {
                c.user();
            }
            assert_eq!(end(&mut c), want, "{by:?} CPL {cpl} RPL {rpl} {byte:x}");
        }
    }
}

/// What is wrong with the new task's selectors is a fault of the new task, which has not executed
/// an instruction (SDM Vol. 3, table 8-1). A third task takes it.
#[test]
fn faults_of_the_new_task() {
    let b = u32::from(BAD);
    // Offset of the selector in the TSS, selector, descriptor, fault.
    const ES: u64 = 72;
    const CS: u64 = 76;
    const STACK: u64 = 80;
    const DS: u64 = 84;
    const LDT: u64 = 96;
    let d = |access| descriptor(0, 0xf_ffff, access, 0xc);
    let rows: &[(u64, u16, u64, Option<Refusal>)] = &[
        (LDT, BAD, d(0x82), None),
        (LDT, 0, 0, None),
        (LDT, BAD, d(0x92), Some((TS, b))),
        (LDT, BAD, d(0x89), Some((TS, b))),
        (LDT, BAD, d(0x02), Some((TS, b))),
        (LDT, BAD | 4, d(0x82), Some((TS, b | 4))),
        (LDT, 0x100, 0, Some((TS, 0x100))),
        (CS, BAD, d(0x9a), None),
        (CS, 0, 0, Some((TS, 0))),
        (CS, BAD, d(0x92), Some((TS, b))),
        (CS, BAD, d(0xfa), Some((TS, b))),
        (CS, BAD, d(0x1a), Some((NP, b))),
        (CS, 0x100, 0, Some((TS, 0x100))),
        (STACK, BAD, d(0x92), None),
        (STACK, 0, 0, Some((TS, 0))),
        (STACK, BAD, d(0x90), Some((TS, b))),
        (STACK, BAD, d(0x9a), Some((TS, b))),
        (STACK, BAD, d(0xf2), Some((TS, b))),
        (STACK, BAD | 3, d(0x92), Some((TS, b))),
        (STACK, BAD, d(0x12), Some((SS, b))),
        (STACK, 0x100, 0, Some((TS, 0x100))),
        (DS, 0, 0, None),
        (DS, BAD, d(0x90), None),
        (DS, BAD, d(0x9a), None),
        (DS, BAD, d(0x98), Some((TS, b))),
        (DS, BAD, d(0x82), Some((TS, b))),
        (DS, BAD | 3, d(0x92), Some((TS, b))),
        (DS, BAD, d(0x12), Some((NP, b))),
        (ES, 0x100, 0, Some((TS, 0x100))),
    ];
    for by in [Jump, Call, Interrupt] {
        for &(offset, selector, low, want) in rows {
            let mut c = two_tasks(by, true, true);
            c.define(BAD, low);
            c.put(NEW + offset, &selector.to_le_bytes());
            judge(&mut c);
            let what = format!("{by:?}: {offset} is {selector:x}, {low:x}");
            verdict(&mut c, want, &what);
        }
    }
    // EIP beyond the limit of CS.
    let mut c = two_tasks(Call, true, true);
    c.define(BAD, descriptor(0, 0xfff, 0x9a, 4));
    c.put(NEW + CS, &BAD.to_le_bytes());
    judge(&mut c);
    verdict(&mut c, Some((GP, 0)), "EIP");
}

/// A task for each fault of a task switch.
fn judge(c: &mut Computer) {
    for (i, v) in (0..).zip(JUDGED) {
        let (base, selector) = (JUDGES + i * JUDGE_BYTES, JUDGE_SELECTORS + i as u16 * 8);
        let entry = JUDGE_CODE + i * 16;
        put_tss(c, base, true, entry as u32);
        define_tss(c, selector, base, true);
        c.put(entry, &[0xf4]);
        c.put64(IDT + u64::from(v) * 8, gate(selector, 0, 0x85, 0));
    }
}

fn verdict(c: &mut Computer, want: Option<Refusal>, what: &str) {
    assert_eq!(end(c), Halt, "{what}");
    let rip = c.cpu.state.rip() - 1;
    let Some((v, code)) = want else {
        assert_eq!(rip, u64::from(ENTRY), "{what}");
        return;
    };
    let judge = (rip - JUDGE_CODE) / 16;
    assert_eq!((JUDGED[judge as usize], c.stack32(0)), (v, code), "{what}");
    assert_eq!(
        c.get64(JUDGES + judge * JUDGE_BYTES) as u16,
        FREE,
        "{what}: the faulting task"
    );
    assert_eq!(c.get64(NEW + 32) as u32, ENTRY, "{what}: EIP");
}
