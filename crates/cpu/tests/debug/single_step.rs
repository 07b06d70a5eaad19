//! TF, on instructions and (IA32_DEBUGCTL.BTF) on branches; branch recording.

use anykvm_cpu::state::{reg, rflags};

use crate::harness::tables::HANDLERS;
use crate::machine::*;

const BTF: u64 = 2;
const LBR: u64 = 1;

struct Case {
    section: &'static str,
    name: &'static str,
    code: &'static [u8],
    want: Vec<Seen>,
}

fn case(section: &'static str, name: &'static str, code: &'static [u8], want: &[Seen]) -> Case {
    Case {
        section,
        name,
        code,
        want: want.to_vec(),
    }
}

/// What TF, set before the first instruction, traps. The events stop at the code's HLT.
#[test]
fn trap_flag() {
    let cases = [
        case(
            "18.3.1.4",
            "nop; nop",
            &[0x90, 0x90],
            &[trap(1, BS), trap(2, BS)],
        ),
        case("18.3.1.4", "jmp +1", &[0xeb, 0x01, HLT], &[trap(3, BS)]),
        // POPF that clears TF is still trapped; what follows is not.
        case(
            "18.3.1.4",
            "push 2; popfq; nop",
            &[0x6a, 0x02, 0x9d, 0x90],
            &[trap(2, BS), trap(3, BS)],
        ),
        // A fault instead of a trap.
        case("18.3.1.4", "ud2", &[0x0f, 0x0b], &[fault(6, 0)]),
        // The handlers of software interrupts run without TF; the trap comes behind the instruction
        // that follows their IRET.
        case(
            "6.12.1.3",
            "int 0x80; nop",
            &[0xcd, 0x80, 0x90],
            &[software(0x80, 2), trap(3, BS)],
        ),
        case(
            "6.12.1.3",
            "int3; nop",
            &[0xcc, 0x90],
            &[software(3, 1), trap(2, BS)],
        ),
        case(
            "Vol. 2, INT1",
            "int1; nop",
            &[0xf1, 0x90],
            &[software(1, 1), trap(2, BS)],
        ),
        // Each iteration of a repeated instruction; RF is saved but for the last.
        case(
            "18.3.1.4",
            "rep movsb, 3 times",
            &[0xf3, 0xa4],
            &[resuming(0, BS), resuming(0, BS), trap(2, BS)],
        ),
        case(
            "18.3.1.4",
            "rep outsb, 3 times",
            &[0xf3, 0x6e],
            &[resuming(0, BS), resuming(0, BS), trap(2, BS)],
        ),
        // repe cmpsb: equal, then different.
        case(
            "18.3.1.4",
            "repe cmpsb",
            &[0xf3, 0xa6],
            &[resuming(0, BS), trap(2, BS)],
        ),
        // MOV SS: its own trap does not happen (6.8.3).
        case(
            "6.8.3",
            "mov ss, eax; nop; nop",
            &[0x8e, 0xd0, 0x90, 0x90],
            &[trap(3, BS), trap(4, BS)],
        ),
        // STI's shadow does not hold debug traps back.
        case(
            "6.8.3",
            "sti; nop",
            &[0xfb, 0x90],
            &[trap(1, BS), trap(2, BS)],
        ),
    ];
    for t in &cases {
        let mut c = machine(t.code);
        let s = &mut c.cpu.state;
        s.rflags |= rflags::TF;
        s.regs[reg::RCX] = 3;
        s.regs[reg::RDX] = 0x510;
        s.regs[reg::RAX] = 0x10;
        s.regs[reg::RDI] = DATA + 0x100;
        c.put(DATA, &[1, 2, 3]);
        c.put(DATA + 0x100, &[1, 9, 9]);
        let got = events(&mut c, t.want.len() + 1);
        assert_eq!(got, t.want, "{} (SDM Vol. 3, {})", t.name, t.section);
    }
}

/// REP with RCX = 0 is one instruction without an iteration.
#[test]
fn empty_repetition() {
    let mut c = machine(&[0xf3, 0xa4]);
    c.cpu.state.rflags |= rflags::TF;
    c.cpu.state.regs[reg::RCX] = 0;
    assert_eq!(next_event(&mut c), Some(trap(2, BS)));
}

/// POPF, IRET and SYSRET that set TF: the first two trap behind the next instruction (18.3.1.4), the
/// last behind itself; SYSCALL is trapped if IA32_FMASK leaves TF set.
#[test]
fn where_tf_begins_and_ends() {
    // push 0x102; popfq; nop
    let mut c = machine(&[0x68, 2, 1, 0, 0, 0x9d, 0x90, 0x90]);
    assert_eq!(next_event(&mut c), Some(trap(7, BS)));

    // push ss; push rsp; push 0x102; push cs; push CODE + 21; iretq; nop
    let code = [
        0x6a, 0x10, 0x68, 0, 0xa0, 0, 0, 0x68, 2, 1, 0, 0, 0x6a, 0x08, 0x68, 0x15, 0x10, 0, 0,
        0x48, 0xcf, 0x90,
    ];
    let mut c = machine(&code);
    assert_eq!(next_event(&mut c), Some(trap(22, BS)));

    // sysretq to a nop at CODE + 0x100
    let mut c = machine(&[0x48, 0x0f, 0x07]);
    let s = &mut c.cpu.state;
    s.msr.star = 0x10 << 48;
    s.regs[reg::RCX] = CODE + 0x100;
    s.regs[11] = 0x102;
    assert_eq!(next_event(&mut c), Some(trap(0x100, BS)));

    for (mask, want) in [(0, trap(0x100, BS)), (rflags::TF, software(3, 0x101))] {
        // syscall to an int3 at CODE + 0x100
        let mut c = machine(&[0x0f, 0x05]);
        c.put(CODE + 0x100, &[0xcc]);
        let s = &mut c.cpu.state;
        s.msr.star = 0x08 << 32;
        s.msr.lstar = CODE + 0x100;
        s.msr.sfmask = mask;
        s.rflags |= rflags::TF;
        assert_eq!(next_event(&mut c), Some(want), "FMASK {mask:#x}");
    }
}

/// INTO (32-bit code) that does nothing is an instruction like others.
#[test]
fn into_without_overflow() {
    use crate::harness::Computer;
    for overflow in [false, true] {
        let mut c = Computer::with_tables(CODE as u32);
        c.put(CODE, &[0xce, HLT]);
        c.cpu.state.rflags |= rflags::TF | if overflow { rflags::OF } else { 0 };
        c.cpu.state_changed();
        let want = if overflow { 4 } else { 1 };
        assert_eq!(c.run_to_handler(), want);
        assert_eq!(u64::from(c.stack32(0)), CODE + 1);
    }
}

/// SDM Vol. 3, 18.4.3: with BTF only branches that are taken trap, and the #DB clears BTF.
#[test]
fn branch_trap_flag() {
    let cases = [
        case("18.4.3", "nop; nop", &[0x90, 0x90], &[]),
        case(
            "18.4.3",
            "nop; jmp +1",
            &[0x90, 0xeb, 0x01, HLT],
            &[trap(4, BS)],
        ),
        case("18.4.3", "jmp +0", &[0xeb, 0x00], &[trap(2, BS)]),
        // RCX is 3: jrcxz is not taken, loop is.
        case("18.4.3", "jrcxz +1; nop", &[0xe3, 0x01, 0x90], &[]),
        case("18.4.3", "loop +1", &[0xe2, 0x01, HLT], &[trap(3, BS)]),
        case(
            "18.4.3",
            "call +1",
            &[0xe8, 1, 0, 0, 0, HLT],
            &[trap(6, BS)],
        ),
        case("18.4.3", "rep movsb", &[0xf3, 0xa4], &[]),
        case("18.4.3", "jmp rax", &[0xff, 0xe0], &[trap(0x100, BS)]),
    ];
    for t in &cases {
        let mut c = machine(t.code);
        c.put(CODE + 0x100, &[HLT]);
        let s = &mut c.cpu.state;
        s.rflags |= rflags::TF;
        s.msr.debugctl = BTF;
        s.regs[reg::RCX] = 3;
        s.regs[reg::RAX] = CODE + 0x100;
        let got: Vec<Seen> = next_event(&mut c).into_iter().collect();
        assert_eq!(got, t.want, "{} (SDM Vol. 3, {})", t.name, t.section);
        let left = if t.want.is_empty() { BTF } else { 0 };
        assert_eq!(c.cpu.state.msr.debugctl, left, "{}", t.name);
    }
}

/// IA32_DEBUGCTL.LBR: the last branch, and the last one before an event (SDM Vol. 3, 18.12; APM
/// Vol. 2, 13.1.1). A #DB clears LBR, so that its handler finds them.
#[test]
fn last_branch_record() {
    // jmp +1; hlt; nop; ud2
    let mut c = machine(&[0xeb, 0x01, HLT, 0x90, 0x0f, 0x0b]);
    c.cpu.state.msr.debugctl = LBR;
    assert_eq!(next_event(&mut c), Some(fault(6, 4)));
    let m = c.cpu.state.msr;
    assert_eq!((m.last_int_from, m.last_int_to), (CODE, CODE + 3));
    let handler = HANDLERS + 6 * 16;
    assert_eq!((m.last_branch_from, m.last_branch_to), (CODE + 4, handler));

    let mut c = machine(&[0xeb, 0x01, HLT, 0x90]);
    c.cpu.state.msr.debugctl = LBR | BTF;
    c.cpu.state.rflags |= rflags::TF;
    assert_eq!(next_event(&mut c), Some(trap(3, BS)));
    let m = c.cpu.state.msr;
    assert_eq!((m.last_branch_from, m.last_branch_to), (CODE, CODE + 3));
    assert_eq!(m.debugctl, 0);
}
