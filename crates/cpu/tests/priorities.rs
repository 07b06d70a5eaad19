//! Which of several faults of one instruction is taken (SDM Vol. 3, 6.9, table 6-2: fetching, decoding,
//! executing), and that the instruction leaves no trace.

mod harness;

use anykvm_cpu::events::vector::{DE, GP, NM, PF, SS, UD};
use anykvm_cpu::state::{XsaveArea, cr0, cr4, reg, rflags};
use harness::Computer;
use harness::tables::*;

const CODE: u64 = 0x1000;
const DATA: u64 = 0x8000;
/// Nothing is mapped here; not canonical; mapped.
const MISSING: u64 = 4 << 20;
const HOLE: u64 = 1 << 47;
const DONE: u8 = 0x80;
const MF: u8 = 16;

#[derive(Clone, Copy)]
struct Case {
    section: &'static str,
    name: &'static str,
    code: &'static [u8],
    /// RBX, RSP.
    rbx: u64,
    rsp: u64,
    set_up: fn(&mut Computer),
    want: u8,
}

const fn case(
    section: &'static str,
    name: &'static str,
    code: &'static [u8],
    rbx: u64,
    set_up: fn(&mut Computer),
    want: u8,
) -> Case {
    Case {
        section,
        name,
        code,
        rbx,
        rsp: 0xa000,
        set_up,
        want,
    }
}

fn nothing(_: &mut Computer) {}
fn task_switched(c: &mut Computer) {
    c.cpu.state.cr0 |= cr0::TS;
}
fn emulated(c: &mut Computer) {
    c.cpu.state.cr0 |= cr0::EM;
}
fn no_sse(c: &mut Computer) {
    c.cpu.state.cr4 &= !cr4::OSFXSR;
}
fn no_sse_and_task_switched(c: &mut Computer) {
    no_sse(c);
    task_switched(c);
}
fn user(c: &mut Computer) {
    c.user();
}
/// An unmasked invalid operation is pending.
fn x87_pending(c: &mut Computer) {
    c.cpu.state.xsave.set_u16(0, 0x37e);
    c.cpu.state.xsave.set_u16(2, 0x8081);
}
fn x87_pending_and_task_switched(c: &mut Computer) {
    x87_pending(c);
    task_switched(c);
}

const CASES: &[Case] = &[
    // Decoding comes before executing.
    case(
        "#UD, #PF",
        "lock mov [rbx], eax",
        &[0xf0, 0x89, 0x03],
        MISSING,
        nothing,
        UD,
    ),
    case(
        "#UD, #GP",
        "ud1 eax, [rbx]",
        &[0x0f, 0xb9, 0x03],
        HOLE,
        nothing,
        UD,
    ),
    case(
        "#UD, #GP",
        "mov dr4 at CPL 3, CR4.DE",
        &[0x0f, 0x21, 0xe0],
        0,
        user_de,
        UD,
    ),
    case(
        "#NM, #PF",
        "fld [rbx]",
        &[0xd9, 0x03],
        MISSING,
        task_switched,
        NM,
    ),
    case("#NM, #GP", "fld [rbx]", &[0xd9, 0x03], HOLE, emulated, NM),
    case(
        "#NM, #PF",
        "addps xmm0, [rbx]",
        &[0x0f, 0x58, 0x03],
        MISSING,
        task_switched,
        NM,
    ),
    // Table 2-21: #UD of SSE before #NM.
    case(
        "#UD, #NM",
        "addps",
        &[0x0f, 0x58, 0x03],
        MISSING,
        no_sse_and_task_switched,
        UD,
    ),
    case(
        "#UD, #NM",
        "addps",
        &[0x0f, 0x58, 0x03],
        MISSING,
        emulated,
        UD,
    ),
    case(
        "#NM, #MF",
        "fld [rbx]",
        &[0xd9, 0x03],
        DATA,
        x87_pending_and_task_switched,
        NM,
    ),
    case(
        "#MF, #PF",
        "fld [rbx]",
        &[0xd9, 0x03],
        MISSING,
        x87_pending,
        MF,
    ),
    case(
        "#GP (alignment), #PF",
        "addps",
        &[0x0f, 0x58, 0x03],
        MISSING + 8,
        nothing,
        GP,
    ),
    case(
        "#GP (alignment), #PF",
        "fxsave",
        &[0x0f, 0xae, 0x03],
        MISSING + 8,
        nothing,
        GP,
    ),
    // Privilege comes before the operand.
    case(
        "#GP, #PF",
        "lgdt [rbx] at CPL 3",
        &[0x0f, 0x01, 0x13],
        MISSING,
        user,
        GP,
    ),
    case(
        "#GP, #PF",
        "lldt [rbx] at CPL 3",
        &[0x0f, 0x00, 0x13],
        MISSING,
        user,
        GP,
    ),
    case(
        "#GP, #PF",
        "invlpg [rbx] at CPL 3",
        &[0x0f, 0x01, 0x3b],
        MISSING,
        user,
        GP,
    ),
    case(
        "#GP, #PF",
        "lmsw [rbx] at CPL 3",
        &[0x0f, 0x01, 0x33],
        MISSING,
        user,
        GP,
    ),
    case("#GP, #PF", "outsb at CPL 3", &[0x6e], 0, user, GP),
    // The operand comes before what is done with it.
    case(
        "#PF, #DE",
        "div dword [rbx]",
        &[0xf7, 0x33],
        MISSING,
        nothing,
        PF,
    ),
    case("#DE", "div dword [rbx]", &[0xf7, 0x33], DATA, nothing, DE),
    case(
        "#PF, #GP",
        "mov ds, [rbx]",
        &[0x8e, 0x1b],
        MISSING,
        nothing,
        PF,
    ),
    case(
        "#GP, #GP",
        "mov ds, [rbx]",
        &[0x8e, 0x1b],
        HOLE,
        nothing,
        GP,
    ),
    case(
        "#PF, #GP",
        "lgdt [rbx]",
        &[0x0f, 0x01, 0x13],
        MISSING,
        nothing,
        PF,
    ),
    case("#PF, #GP", "jmp [rbx]", &[0xff, 0x23], MISSING, nothing, PF),
    case(
        "#PF, #GP",
        "xrstor [rbx]",
        &[0x0f, 0xae, 0x2b],
        MISSING,
        xsave_on,
        PF,
    ),
    case(
        "#UD, #PF",
        "xrstor [rbx]",
        &[0x0f, 0xae, 0x2b],
        MISSING,
        nothing,
        UD,
    ),
    // A source in memory comes before the push.
    Case {
        rsp: HOLE + 0x100,
        ..case("#PF, #SS", "push [rbx]", &[0xff, 0x33], MISSING, ist, PF)
    },
    Case {
        rsp: HOLE + 0x100,
        ..case("#SS", "push [rbx]", &[0xff, 0x33], DATA, ist, SS)
    },
    Case {
        rsp: MISSING + 64,
        ..case("#GP, #PF", "push [rbx]", &[0xff, 0x33], HOLE, ist, GP)
    },
    // The pop's read comes before its write.
    Case {
        rsp: HOLE + 0x100,
        ..case("#SS, #PF", "pop [rbx]", &[0x8f, 0x03], MISSING, ist, SS)
    },
    // Source before destination.
    case("#GP, #PF", "movsb", &[0xa4], HOLE, nothing, GP),
    case("#PF, #GP", "movsb", &[0xa4], MISSING, to_hole, PF),
];

fn user_de(c: &mut Computer) {
    c.user();
    c.cpu.state.cr4 |= cr4::DE;
}
fn xsave_on(c: &mut Computer) {
    c.cpu.state.cr4 |= cr4::OSXSAVE;
    c.cpu.state.xcr0 = 3;
}
fn to_hole(c: &mut Computer) {
    c.cpu.state.regs[reg::RDI] = HOLE;
}
/// Every gate switches to IST 1: the stack in use is not good for events.
fn ist(c: &mut Computer) {
    for n in 0..256u64 {
        c.put64(IDT + n * 16, gate(CODE0, HANDLERS + n * 16, 0x8e, 1));
    }
}

#[test]
fn of_one_instruction() {
    for t in CASES {
        let mut c = Computer::with_tables64(CODE);
        c.put(CODE, t.code);
        c.put(CODE + t.code.len() as u64, &[0xcd, DONE]);
        (t.set_up)(&mut c);
        let rsp = if c.cpu.state.cpl() == 3 {
            STACK3
        } else {
            t.rsp
        };
        let s = &mut c.cpu.state;
        s.regs[reg::RBX] = t.rbx;
        s.regs[reg::RSI] = t.rbx;
        if s.regs[reg::RDI] == 0 {
            s.regs[reg::RDI] = MISSING;
        }
        s.regs[reg::RSP] = rsp;
        c.cpu.state_changed();
        let before = c.cpu.state.clone();
        let name = format!("{} ({}, SDM Vol. 3, table 6-2)", t.name, t.section);
        assert_eq!(c.run_to_handler(), u64::from(t.want), "{name}");
        // A fault: RIP and registers as before, RF saved.
        let error = u64::from(matches!(t.want, 8 | 10..=14 | 17));
        assert_eq!(c.stack64(error), CODE, "{name}");
        assert_ne!(c.stack64(error + 2) & rflags::RF, 0, "{name}");
        assert_eq!(c.stack64(error + 3), rsp, "{name}");
        for r in (0..16).filter(|r| *r != reg::RSP) {
            assert_eq!(c.reg(r), before.regs[r], "{name}: register {r}");
        }
        let xmm0 = XsaveArea::XMM;
        let x = &c.cpu.state.xsave;
        assert_eq!(x.u64(xmm0), before.xsave.u64(xmm0), "{name}");
    }
}

/// SDM Vol. 3, table 6-2: faults of fetching come before those of decoding: an instruction whose
/// bytes run into a page that is not there is #PF there, even if what can be seen of it is no
/// instruction yet; one that is complete is not.
#[test]
fn fetching_and_decoding() {
    let last = 0x1f_ffff;
    for (bytes, want, cr2) in [
        // add eax, imm32, three bytes short
        (&[0x05, 1][..], PF, last + 1),
        // 0F and nothing more
        (&[0x0f], PF, last + 1),
        // prefixes
        (&[0x66, 0xf0], PF, last + 1),
        // ud2, complete
        (&[0x0f, 0x0b], UD, 0),
        // lock nop: no instruction, complete
        (&[0xf0, 0x90], UD, 0),
    ] {
        let mut c = Computer::with_tables64(CODE);
        let at = last + 1 - bytes.len() as u64;
        c.put(at, bytes);
        c.cpu.state.set_rip(at);
        c.cpu.state_changed();
        assert_eq!(c.run_to_handler(), u64::from(want), "{bytes:x?}");
        assert_eq!(c.cpu.state.cr2, cr2, "{bytes:x?}");
        let error = u64::from(want == PF);
        assert_eq!(c.stack64(error), at, "{bytes:x?}");
        if want == PF {
            // A fetch, as EFER.NXE makes it visible.
            assert_eq!(c.stack64(0), 0x10);
        }
    }
    // 15 bytes of prefixes: #GP, before the #UD of what would follow, and behind a page fault.
    let mut c = Computer::with_tables64(CODE);
    c.put(CODE, &[0x66; 16]);
    c.cpu.state_changed();
    assert_eq!(c.run_to_handler(), u64::from(GP));
    let mut c = Computer::with_tables64(last + 1 - 8);
    c.put(last + 1 - 8, &[0x66; 8]);
    c.cpu.state_changed();
    assert_eq!(c.run_to_handler(), u64::from(PF));
}
