//! Faults met while an event is delivered: double faults, and bad stacks of inner levels (SDM Vol. 3,
//! 6.12.1, 6.15 and table 6-5; Vol. 2, INT n and CALL, INTER-PRIVILEGE-LEVEL).

use anykvm_cpu::events::vector::{DF, NP, PF, SS, TS, UD as UD_VECTOR};
use anykvm_cpu::state::{cr0, reg};

use crate::gates::{INT, put_gate};
use crate::harness::tables::*;
use crate::machine::*;

const ERROR: u32 = FREE as u32;
/// A vector and its error code.
type Refusal = (u8, u32);

/// A second exception while a first is delivered (SDM Vol. 3, table 6-5): the first's code, the
/// second's cause at its gate, the outcome; then the same without a gate for #DF: shutdown.
#[test]
fn double_faults() {
    // mov ds, ax with AX: 100h is #GP, a data segment that is not present #NP; mov ss the same #SS.
    const GP_CODE: &[u8] = &[0x8e, 0xd8];
    let np = ERROR;
    let first: &[(&str, u8, &[u8], u64)] = &[
        ("#DE", 0, &[0xf7, 0xf1], 0),
        ("#BR is benign", 5, &[0xcd, 5], 0),
        ("#UD", 6, &[0x0f, 0x0b], 0),
        ("#NM", 7, &[0xd9, 0xc0], 0),
        ("#NP", 11, GP_CODE, u64::from(np)),
        ("#SS", 12, &[0x8e, 0xd0], u64::from(np)),
        ("#GP", 13, GP_CODE, 0x100),
        ("#PF", 14, &[0x8b, 0x07], 0),
    ];
    for &(name, v, code, ax) in first {
        let contributory = matches!(v, 0 | 11 | 12 | 13);
        // The gate is not present: #NP(gate). Its stack is an unmapped page: #PF.
        for page_fault in [false, true] {
            for triple in [false, true] {
                let mut c = computer(Long(0), code);
                let r = &mut c.cpu.state.regs;
                (r[reg::RAX], r[reg::RCX], r[reg::RDI]) = (ax, 0, 1 << 30);
                c.cpu.state.cr0 |= cr0::TS;
                c.define(FREE, descriptor(0, 0xf_ffff, 0x13, 0xc));
                let own = HANDLERS + u64::from(v) * 16;
                let low = if page_fault {
                    gate(CODE0, own, 0xee, 2)
                } else {
                    gate(CODE0, own, 0x6e, 0)
                };
                put_gate(&mut c, Long(0), v, low, 0);
                c.put64(TSS + 44, 1 << 30);
                if triple {
                    put_gate(&mut c, Long(0), DF, 0, 0);
                }
                c.cpu.state_changed();
                let index = u32::from(v) * 8 + 2 + u32::from(v != 5);
                let to_double = if page_fault {
                    v == 14
                } else {
                    contributory || v == 14
                };
                let want = match (to_double, triple, page_fault) {
                    (true, false, _) => Fault(DF, 0),
                    (true, true, _) => Shutdown,
                    (false, _, true) => Fault(PF, 2),
                    // #NP's own gate is the one that is not present.
                    (false, _, false) => Fault(NP, index),
                };
                assert_eq!(
                    end(&mut c),
                    want,
                    "{name}, page fault {page_fault}, triple {triple}"
                );
            }
        }
    }
}

/// Where the TSS's stack for level 1 is bad: faults and error codes of INT n, an exception and CALL
/// (SDM Vol. 2, INT n and CALL, INTER-PRIVILEGE-LEVEL).
#[test]
fn inner_stacks() {
    const STACK1: u16 = 0xc0;
    // SS1; its access byte, limit, flags; the fault and its error code.
    let s = u32::from(STACK1);
    let rows: &[(u16, u8, u32, u8, Option<Refusal>)] = &[
        (STACK1 | 1, 0xb3, 0xf_ffff, 0xc, None),
        (STACK1 | 1, 0xb2, 0xf_ffff, 0xc, None),
        (0, 0xb3, 0xf_ffff, 0xc, Some((TS, 0))),
        (1, 0xb3, 0xf_ffff, 0xc, Some((TS, 0))),
        (0x101, 0xb3, 0xf_ffff, 0xc, Some((TS, 0x100))),
        (STACK1, 0xb3, 0xf_ffff, 0xc, Some((TS, s))),
        (STACK1 | 3, 0xb3, 0xf_ffff, 0xc, Some((TS, s))),
        (STACK1 | 1, 0x93, 0xf_ffff, 0xc, Some((TS, s))),
        (STACK1 | 1, 0xb1, 0xf_ffff, 0xc, Some((TS, s))),
        (STACK1 | 1, 0xbb, 0xf_ffff, 0xc, Some((TS, s))),
        (STACK1 | 1, 0xa2, 0xf_ffff, 0xc, Some((TS, s))),
        (STACK1 | 1, 0x33, 0xf_ffff, 0xc, Some((SS, s))),
        // No room below ESP1 in the segment.
        (STACK1 | 1, 0xb3, 0xfff, 4, Some((SS, s))),
    ];
    let code1: u16 = 0xc8;
    for &(ss, access, limit, flags, want) in rows {
        // int INT; ud2; call FREE|3:0
        let codes: [(&[u8], u8, u32); 3] = [
            (&[0xcd, INT], INT, 0),
            (&[0x0f, 0x0b], UD_VECTOR, 1),
            (&[0x9a, 0, 0, 0, 0, FREE as u8 | 3, 0], 0x7f, 0),
        ];
        for (code, v, ext) in codes {
            let mut c = computer(Prot32(3), code);
            let to = HANDLERS + u64::from(v) * 16;
            // HLT is not for level 1.
            c.put(to, &[END]);
            put_gate(&mut c, Prot32(3), v, gate(code1, to, 0xee, 0), 0);
            c.define(FREE, gate(code1, to, 0xec, 1));
            c.define(code1, descriptor(0, 0xf_ffff, 0xbb, 0xc));
            c.define(STACK1, descriptor(0, limit, access, flags));
            c.put64(TSS + 12, 0x9000 | u64::from(ss) << 32);
            let got = end(&mut c);
            match want {
                None => {
                    assert_eq!(got, Done, "SS1 {ss:x} {access:x}");
                    // INT3's frame at level 0: it was at level 1, on that stack.
                    assert_eq!(c.stack32(1), u32::from(code1) | 1);
                    assert_eq!(c.stack32(3), 0x9000 - 20);
                    assert_eq!(c.stack32(4), u32::from(ss));
                }
                Some((fault, selector)) => {
                    assert_eq!(
                        got,
                        Fault(fault, selector | ext),
                        "SS1 {ss:x} {access:x} {code:x?}"
                    );
                }
            }
        }
    }
    // The TSS ends before SS1.
    let mut c = computer(Prot32(3), &[0xcd, INT]);
    put_gate(&mut c, Prot32(3), INT, gate(code1, HANDLERS, 0xee, 0), 0);
    c.define(code1, descriptor(0, 0xf_ffff, 0xbb, 0xc));
    c.cpu.state.tr.limit = 0x10;
    assert_eq!(end(&mut c), Fault(TS, TSS_SELECTOR.into()));
    // 64-bit mode: RSP1 is not canonical: #SS(0); beyond the TSS: #TS(TSS).
    for (limit, rsp, want) in [
        (0x67, 1 << 63, Fault(SS, 0)),
        (0x10, 0x9000, Fault(TS, TSS_SELECTOR.into())),
    ] {
        let mut c = computer(Long(3), &[0xcd, INT]);
        put_gate(&mut c, Long(3), INT, gate(code1, HANDLERS, 0xee, 0), 0);
        c.define(code1, descriptor(0, 0xf_ffff, 0xbb, 0xa));
        c.put64(TSS + 12, rsp);
        c.cpu.state.tr.limit = limit;
        assert_eq!(end(&mut c), want);
    }
}
