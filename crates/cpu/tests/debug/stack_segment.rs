//! Breakpoints that MOV SS and POP SS hit wait for the next instruction (SDM Vol. 3, 6.8.3); what
//! becomes of them there. And the trap of a task switch.

use anykvm_cpu::state::{reg, rflags};

use crate::harness::Computer;
use crate::harness::tables::*;
use crate::machine::*;

/// `mov ss, [rbx]` with the operand watched, then an instruction.
#[test]
fn watched_mov_ss() {
    struct Case {
        section: &'static str,
        name: &'static str,
        next: &'static [u8],
        want: Vec<Seen>,
    }
    let case = |section, name, next, want: &[Seen]| Case {
        section,
        name,
        next,
        want: want.to_vec(),
    };
    let in_handler = |vector: u64| trap((HANDLERS + vector * 16 - CODE) as i64, 1);
    let cases = [
        case("6.8.3", "nop", &[0x90][..], &[trap(3, 1)]),
        case("6.8.3", "mov eax, [rbx]", &[0x8b, 0x03], &[trap(4, 1)]),
        // A second MOV SS does not make it wait longer.
        case("6.8.3", "mov ss, eax", &[0x8e, 0xd0], &[trap(4, 1)]),
        // It is taken in the handler, before its first instruction.
        case("6.8.3", "int 0x80", &[0xcd, 0x80], &[in_handler(0x80)]),
        case("6.8.3", "int3", &[0xcc], &[in_handler(3)]),
        // INT1 and faults drop it.
        case("Vol. 2, INT1", "int1", &[0xf1], &[software(1, 3)]),
        case("6.8.3", "ud2", &[0x0f, 0x0b], &[fault(6, 2)]),
    ];
    for t in &cases {
        let mut code = vec![0x8e, 0x13];
        code.extend(t.next);
        let mut c = machine(&code);
        c.put64(DATA, 0x10);
        let s = &mut c.cpu.state;
        s.regs[reg::RAX] = 0x10;
        s.db[0] = DATA;
        s.dr7 = dr7(READ_WRITE, 2);
        let got = events(&mut c, t.want.len());
        assert_eq!(got, t.want, "{} (SDM Vol. 3, {})", t.name, t.section);
    }
}

/// SYSCALL behind a MOV SS at CPL 3: the #DB comes at CPL 0, at the kernel's first instruction.
#[test]
fn watched_mov_ss_before_syscall() {
    let mut c = machine(&[0x8e, 0x13, 0x0f, 0x05]);
    user(&mut c);
    c.put64(DATA, DATA3.into());
    c.put(CODE + 0x100, &[HLT]);
    let s = &mut c.cpu.state;
    s.msr.star = 0x08 << 32;
    s.msr.lstar = CODE + 0x100;
    s.db[0] = DATA;
    s.dr7 = dr7(READ_WRITE, 2);
    assert_eq!(next_event(&mut c), Some(trap(0x100, 1)));
    assert_eq!(c.stack64(1), u64::from(CODE0));
}

/// An instruction breakpoint behind MOV SS is suppressed as if RF were set (18.3.1.1).
#[test]
fn instruction_breakpoint_behind_mov_ss() {
    let mut c = machine(&[0x8e, 0xd0, 0x90, 0x90]);
    c.cpu.state.regs[reg::RAX] = 0x10;
    c.cpu.state.db = [CODE + 2, CODE + 3, 0, 0];
    c.cpu.state.dr7 = 0x40a;
    assert_eq!(events(&mut c, 9), [trap(3, 2)]);
}

/// POP SS in 32-bit code: the same. (At CPL 3: the event's frame must not be where it was.)
#[test]
fn watched_pop_ss() {
    let mut c = Computer::with_tables(CODE as u32);
    c.put(CODE, &[0x17, 0x90, HLT]);
    c.user();
    c.put64(STACK3 - 4, DATA3.into());
    let s = &mut c.cpu.state;
    s.regs[reg::RSP] = STACK3 - 4;
    s.db[0] = STACK3 - 4;
    s.dr7 = dr7(READ_WRITE, 4);
    c.cpu.state_changed();
    assert_eq!(c.run_to_handler(), 1);
    assert_eq!(u64::from(c.stack32(0)), CODE + 2);
}

/// A 32-bit TSS at `at` for a task that starts with HLT at [`CODE`] + 0x200, with its T flag as
/// given.
fn task(c: &mut Computer, at: u64, t: bool) {
    c.define(FREE, descriptor(at as u32, 0x67, 0x89, 0));
    let word = |c: &mut Computer, offset: u64, v: u32| c.put(at + offset, &v.to_le_bytes());
    word(c, 32, CODE as u32 + 0x200);
    word(c, 36, 2);
    word(c, 56, 0xd000);
    for (n, selector) in [DATA0, CODE0, DATA0, DATA0, 0, 0].into_iter().enumerate() {
        word(c, 72 + n as u64 * 4, selector.into());
    }
    word(c, 100, u32::from(t) | 104 << 16);
    c.put(CODE + 0x200, &[0x90, HLT]);
}

/// SDM Vol. 3, 18.3.1.5: the T flag of a task traps before its first instruction, whatever
/// switched to it; DR7's local enables are gone (18.2.4).
#[test]
fn task_switches() {
    for t in [false, true] {
        // jmp FREE:0; call FREE:0; int 0x30 through a task gate
        let ways: [(&str, Vec<u8>); 3] = [
            ("JMP", vec![0xea, 0, 0, 0, 0, FREE as u8, 0]),
            ("CALL", vec![0x9a, 0, 0, 0, 0, FREE as u8, 0]),
            ("INT", vec![0xcd, 0x30]),
        ];
        for (name, code) in ways {
            let mut c = Computer::with_tables(CODE as u32);
            c.put(CODE, &code);
            task(&mut c, 0xe000, t);
            c.put64(IDT + 0x30 * 8, gate(FREE, 0, 0x85, 0));
            c.cpu.state.dr7 = 0x4ff;
            c.cpu.state.db = [0xf000; 4];
            c.cpu.state_changed();
            assert_eq!(c.run(), anykvm_cpu::Exit::Hlt);
            assert_eq!(c.cpu.state.dr7 & 0xff, 0xaa, "{name}");
            if t {
                assert_eq!(c.cpu.state.rip(), HANDLERS + 17, "{name}");
                assert_eq!(u64::from(c.stack32(0)), CODE + 0x200, "{name}");
                assert_eq!(c.cpu.state.dr6, DR6_NONE | BT, "{name}");
            } else {
                assert_eq!(c.cpu.state.rip(), CODE + 0x202, "{name}");
            }
        }
    }
}

/// A fault through a task gate: the error code is on the new task's stack when its T flag traps.
#[test]
fn task_gate_with_an_error_code() {
    let mut c = Computer::with_tables(CODE as u32);
    // mov ds, 0x1f8: #GP
    c.put(CODE, &[0x66, 0xb8, 0xf8, 1, 0x8e, 0xd8]);
    task(&mut c, 0xe000, true);
    c.put64(IDT + 13 * 8, gate(FREE, 0, 0x85, 0));
    c.cpu.state_changed();
    assert_eq!(c.run_to_handler(), 1);
    assert_eq!(u64::from(c.stack32(0)), CODE + 0x200);
    assert_eq!(u64::from(c.stack32(2)) & rflags::NT, rflags::NT);
    assert_eq!(c.stack32(3), 0x1f8);
    assert_eq!(c.cpu.state.dr6, DR6_NONE | BT);
}
