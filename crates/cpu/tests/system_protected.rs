//! 32-bit protected mode: gates, privilege changes, segment loads and their error codes, call gates,
//! tasks, virtual-8086 mode (SDM Vol. 3, ch. 5-8 and 20).

mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::events::vector::{DF, GP, NP, SS, TS, UD};
use anykvm_cpu::state::{cr0, cr4, reg, rflags, seg};
use harness::Computer;
use harness::tables::*;

const CODE: u32 = 0x1000;

fn run_bytes(bytes: &[u8]) -> Computer {
    let mut c = Computer::with_tables(CODE);
    c.put(CODE.into(), bytes);
    c
}

/// SDM Vol. 3, 6.12.1: an interrupt from CPL 3 switches stacks; IRET goes back.
#[test]
fn interrupt_from_user_mode_and_back() {
    let mut c = run_bytes(&[0xcd, 0x80, 0x90, 0xcd, 0x81]);
    c.user();
    c.cpu.state.rflags |= rflags::IF;
    assert_eq!(c.run_to_handler(), 0x80);
    assert_eq!(c.cpu.state.cpl(), 0);
    assert_eq!(c.reg(reg::RSP), STACK0 - 20);
    assert_eq!(c.stack32(0), CODE + 2);
    assert_eq!(c.stack32(1), CODE3.into());
    assert_eq!(c.stack32(2), 0x202);
    assert_eq!(c.stack32(3), STACK3 as u32);
    assert_eq!(c.stack32(4), DATA3.into());
    assert_eq!(c.cpu.state.rflags & rflags::IF, 0);
    // iretd behind the handler's hlt.
    c.put(HANDLERS + 0x801, &[0xcf]);
    // INT 0x81's gate has DPL 0: #GP with the IDT's error code, RIP at the INT.
    assert_eq!(c.run_to_handler(), u64::from(GP));
    assert_eq!(c.stack32(0), 0x81 * 8 + 2);
    assert_eq!(c.stack32(1), CODE + 3);
    assert_eq!(c.stack32(2), CODE3.into());
    // A fault is saved with RF set.
    assert_eq!(u64::from(c.stack32(3)), 0x202 | rflags::RF);
}

/// IRET to CPL 3 makes privileged data segments null.
#[test]
fn outer_return_drops_segments() {
    // push DATA3; push esp3; push flags; push CODE3; push CODE+0x100; iretd
    let mut c = run_bytes(&[
        0x6a,
        DATA3 as u8,
        0x68,
        0,
        0xc0,
        0,
        0,
        0x9c,
        0x6a,
        CODE3 as u8,
        0x68,
        0,
        0x11,
        0,
        0,
        0xcf,
    ]);
    // mov al, [0]
    c.put(0x1100, &[0xa0, 0, 0, 0, 0]);
    assert_eq!(c.run_to_handler(), u64::from(GP));
    assert_eq!(c.stack32(0), 0);
    assert_eq!(c.stack32(1), 0x1100);
    assert_eq!(c.cpu.state.seg[usize::from(seg::DS)].selector, 0);
    assert_eq!(c.cpu.state.seg[usize::from(seg::SS)].selector, DATA0);
}

/// A descriptor, the selector to load, the register it goes to, the fault.
type SegmentLoad = (u64, u16, u8, Option<(u8, u32)>);

/// MOV Sreg (SDM Vol. 2, MOV): descriptor, register to load (3: DS, 2: SS), fault.
#[test]
fn segment_load_faults() {
    let cases: &[SegmentLoad] = &[
        // Readable code and data may go to DS, execute-only code and system segments may not.
        (descriptor(0, 1, 0x9a, 4), FREE, 3, None),
        (descriptor(0, 1, 0x98, 4), FREE, 3, Some((GP, 0x40))),
        (descriptor(0, 1, 0x82, 4), FREE, 3, Some((GP, 0x40))),
        (descriptor(0, 1, 0x12, 4), FREE, 3, Some((NP, 0x40))),
        // RPL 3 against DPL 0.
        (descriptor(0, 1, 0x92, 4), FREE | 3, 3, Some((GP, 0x40))),
        (descriptor(0, 1, 0xf2, 4), FREE | 3, 3, None),
        // Conforming code: privilege does not matter.
        (descriptor(0, 1, 0x9e, 4), FREE | 3, 3, None),
        // Beyond the limit; in an LDT that is not there.
        (0, 0x100, 3, Some((GP, 0x100))),
        (0, 0x44, 3, Some((GP, 0x44))),
        (0, 0, 3, None),
        // SS: writable, DPL = RPL = CPL, present, not null.
        (descriptor(0, 1, 0x92, 4), FREE, 2, None),
        (descriptor(0, 1, 0x90, 4), FREE, 2, Some((GP, 0x40))),
        (descriptor(0, 1, 0x92, 4), FREE | 1, 2, Some((GP, 0x40))),
        (descriptor(0, 1, 0xb2, 4), FREE, 2, Some((GP, 0x40))),
        (descriptor(0, 1, 0x12, 4), FREE, 2, Some((SS, 0x40))),
        (0, 0, 2, Some((GP, 0))),
    ];
    for (i, &(d, selector, n, want)) in cases.iter().enumerate() {
        // mov ax, selector; mov sreg, ax; hlt
        let [lo, hi] = selector.to_le_bytes();
        let mut c = run_bytes(&[0x66, 0xb8, lo, hi, 0x8e, 0xc0 | n << 3, 0xf4]);
        c.define(FREE, d);
        assert_eq!(c.run(), Exit::Hlt);
        let rip = c.cpu.state.rip();
        let got = (rip >= HANDLERS).then(|| (((rip - HANDLERS) / 16) as u8, c.stack32(0)));
        assert_eq!(got, want, "case {i}");
        if want.is_none() && selector != 0 {
            assert_ne!(c.get64(GDT + 0x40) >> 40 & 1, 0, "case {i}: accessed");
        }
    }
}

/// SDM Vol. 3, 6.15, vector 8: contributory exceptions become #DF, then shutdown.
#[test]
fn double_and_triple_fault() {
    // mov ds, 0x48 (not there) with the #GP gate absent
    let code = [0x66, 0xb8, 0xf8, 1, 0x8e, 0xd8];
    let mut c = run_bytes(&code);
    c.put64(IDT + 13 * 8, 0);
    assert_eq!(c.run_to_handler(), u64::from(DF));
    assert_eq!(c.stack32(0), 0);
    assert_eq!(c.stack32(1), CODE + 4);
    let mut c = run_bytes(&code);
    c.put64(IDT + 13 * 8, 0);
    c.put64(IDT + 8 * 8, 0);
    assert_eq!(c.run(), Exit::Shutdown);
}

/// A fault while an exception is delivered has EXT set; the stack of an inner level is checked with
/// #TS.
#[test]
fn bad_inner_stack() {
    let mut c = run_bytes(&[0x0f, 0x0b]);
    c.user();
    c.put64(TSS + 4, STACK0 | u64::from(CODE0) << 32);
    // #TS needs the same stack: its task gate would be needed; so it becomes a double fault and
    // then a shutdown.
    assert_eq!(c.run(), Exit::Shutdown);
    let mut c = run_bytes(&[0x0f, 0x0b]);
    c.put64(IDT + u64::from(UD) * 8, gate(CODE0, 0, 0x0e, 0));
    assert_eq!(c.run_to_handler(), u64::from(NP));
    assert_eq!(c.stack32(0), u32::from(UD) * 8 + 3);
}

/// A 32-bit call gate to CPL 0 with two parameters, and RETF 8 back (SDM Vol. 3, 5.8.5).
#[test]
fn call_gate_with_parameters() {
    // push 0x11; push 0x22; call 0x43:0; hlt (a #GP at CPL 3)
    let mut c = run_bytes(&[0x6a, 0x11, 0x6a, 0x22, 0x9a, 0, 0, 0, 0, 0x43, 0, 0xf4]);
    c.user();
    c.define(FREE, gate(CODE0, 0x1100, 0xec, 2));
    // hlt; retf 8
    c.put(0x1100, &[0xf4, 0xca, 8, 0]);
    assert_eq!(c.run(), Exit::Hlt);
    let words: Vec<u32> = (0..6).map(|n| c.stack32(n)).collect();
    let esp = STACK3 as u32 - 8;
    assert_eq!(
        words,
        [CODE + 11, CODE3.into(), 0x22, 0x11, esp, DATA3.into()]
    );
    assert_eq!(c.cpu.state.cpl(), 0);
    assert_eq!(c.run_to_handler(), u64::from(GP));
    assert_eq!(c.stack32(1), CODE + 11);
    assert_eq!(c.stack32(4), STACK3 as u32);
}

/// Gate privilege and type (SDM Vol. 2, CALL).
#[test]
fn far_call_faults() {
    let cases: &[(u64, u16, u8, u32)] = &[
        // Gate DPL below RPL; code segment more privileged called directly; not present; null.
        (gate(CODE0, 0, 0xac, 0), FREE | 3, GP, 0x40),
        (descriptor(0, 0xf_ffff, 0x9a, 0xc), FREE | 3, GP, 0x40),
        (descriptor(0, 0xf_ffff, 0x7a, 0xc), FREE | 3, NP, 0x40),
        (gate(CODE0, 0, 0x6c, 0), FREE | 3, NP, 0x40),
        (gate(0, 0, 0xec, 0), FREE | 3, GP, 0),
        (descriptor(0, 0xf_ffff, 0xf2, 0xc), FREE | 3, GP, 0x40),
        (0, 0, GP, 0),
    ];
    for (i, &(d, selector, want, code)) in cases.iter().enumerate() {
        let [lo, hi] = selector.to_le_bytes();
        let mut c = run_bytes(&[0x9a, 0, 0, 0, 0, lo, hi]);
        c.user();
        c.define(FREE, d);
        assert_eq!(c.run_to_handler(), want.into(), "case {i}");
        assert_eq!(c.stack32(0), code, "case {i}");
        assert_eq!(c.stack32(1), CODE, "case {i}");
    }
}

fn second_task(c: &mut Computer, base: u64, eip: u32) {
    let mut words = [0u32; 26];
    words[8] = eip;
    words[9] = 2;
    words[14] = 0xd000;
    words[18..24].fill(DATA0.into());
    words[19] = CODE0.into();
    for (i, w) in words.iter().enumerate() {
        c.put(base + i as u64 * 4, &w.to_le_bytes());
    }
    c.define(FREE, descriptor(base as u32, 0x67, 0x89, 0));
}

/// CALL to a TSS nests: NT, back link, busy flags; IRET returns (SDM Vol. 3, 8.3, table 8-2).
#[test]
fn task_call_and_return() {
    // call 0x40:0; hlt
    let mut c = run_bytes(&[0x9a, 0, 0, 0, 0, 0x40, 0, 0xf4]);
    second_task(&mut c, 0x5800, 0x1100);
    // hlt; iretd
    c.put(0x1100, &[0xf4, 0xcf]);
    c.cpu.state.regs[reg::RBX] = 0x77;
    assert_eq!(c.run(), Exit::Hlt);
    let s = &c.cpu.state;
    assert_eq!(
        (s.tr.selector, s.rip(), s.regs[reg::RBX]),
        (FREE, 0x1101, 0)
    );
    assert_ne!(s.rflags & rflags::NT, 0);
    assert_ne!(s.cr0 & cr0::TS, 0);
    assert_eq!(s.regs[reg::RSP], 0xd000);
    assert_eq!(c.get64(0x5800) as u16, TSS_SELECTOR);
    assert_eq!(c.get64(GDT + 0x40) >> 40 & 0xff, 0x8b);
    assert_eq!(c.get64(GDT + 0x28) >> 40 & 0xff, 0x8b);
    assert_eq!(c.run(), Exit::Hlt);
    let s = &c.cpu.state;
    assert_eq!(
        (s.tr.selector, s.rip()),
        (TSS_SELECTOR, u64::from(CODE) + 8)
    );
    assert_eq!(s.regs[reg::RBX], 0x77);
    assert_eq!(s.rflags & rflags::NT, 0);
    assert_eq!(c.get64(GDT + 0x40) >> 40 & 0xff, 0x89);
}

/// A task gate as fault handler gets the error code on its own stack.
#[test]
fn fault_through_a_task_gate() {
    let mut c = run_bytes(&[0x66, 0xb8, 0xf8, 1, 0x8e, 0xd8]);
    second_task(&mut c, 0x5800, 0x1100);
    c.put(0x1100, &[0xf4]);
    c.put64(IDT + 13 * 8, gate(FREE, 0, 0x85, 0));
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.cpu.state.rip(), 0x1101);
    assert_eq!(c.reg(reg::RSP), 0xcffc);
    assert_eq!(c.stack32(0), 0x1f8);
    // The outgoing task points at the faulting instruction.
    assert_eq!(c.get64(TSS + 32) as u32, CODE + 4);
    // JMP to a busy task is #GP.
    let mut c = run_bytes(&[0xea, 0, 0, 0, 0, TSS_SELECTOR as u8, 0]);
    assert_eq!(c.run_to_handler(), u64::from(GP));
    assert_eq!(c.stack32(0), TSS_SELECTOR.into());
}

/// A fault of the incoming task's selectors is taken in that task.
#[test]
fn bad_selector_of_a_new_task() {
    let mut c = run_bytes(&[0x9a, 0, 0, 0, 0, 0x40, 0, 0xf4]);
    second_task(&mut c, 0x5800, 0x1100);
    // DS names a system segment.
    c.put(0x5800 + 84, &[TSS_SELECTOR as u8, 0]);
    assert_eq!(c.run_to_handler(), u64::from(TS));
    assert_eq!(c.stack32(0), TSS_SELECTOR.into());
    assert_eq!(c.stack32(1), 0x1100);
    assert_eq!(c.cpu.state.tr.selector, FREE);
}

fn enter_v86(c: &mut Computer, flags: u64) {
    let frame: [u32; 9] = [
        0x100,
        0x100,
        (rflags::VM | rflags::FIXED | flags) as u32,
        0x800,
        0x200,
        0x300,
        0x400,
        0x500,
        0x600,
    ];
    for (i, w) in frame.iter().enumerate() {
        c.put(0xa000 + i as u64 * 4, &w.to_le_bytes());
    }
}

/// IRETD to virtual-8086 mode and an exception out of it (SDM Vol. 3, 20.2.5, 20.2.6, 20.3.1).
#[test]
fn virtual_8086() {
    let mut c = run_bytes(&[0xcf]);
    enter_v86(&mut c, 0);
    // mov ax, ds; mov es, ax; int 0x21
    c.put(0x1100, &[0x8c, 0xd8, 0x8e, 0xc0, 0xcd, 0x21]);
    // IOPL 0: INT n is #GP(0) to the monitor.
    assert_eq!(c.run_to_handler(), u64::from(GP));
    let words: Vec<u32> = (0..10).map(|n| c.stack32(n)).collect();
    assert_eq!(words[..3], [0, 0x104, 0x100]);
    assert_ne!(u64::from(words[3]) & rflags::VM, 0);
    assert_eq!(words[4..], [0x800, 0x200, 0x400, 0x400, 0x500, 0x600]);
    let s = &c.cpu.state;
    assert_eq!(s.rflags & rflags::VM, 0);
    assert_eq!(s.seg[usize::from(seg::DS)].selector, 0);
    assert_eq!(s.regs[reg::RAX] as u16, 0x400);
}

/// IOPL 3: INT n goes through the IDT; with VME and a clear redirection bit to the 8086 handler.
#[test]
fn virtual_8086_interrupts() {
    let mut c = run_bytes(&[0xcf]);
    enter_v86(&mut c, rflags::IOPL);
    c.put(0x1100, &[0xcd, 0x80]);
    assert_eq!(c.run_to_handler(), 0x80);
    assert_eq!(c.stack32(0), 0x102);

    let mut c = run_bytes(&[0xcf]);
    enter_v86(&mut c, rflags::VIF);
    c.cpu.state.cr4 |= cr4::VME;
    c.cpu.state.tr.limit = 0xff;
    c.cpu.state_changed();
    // I/O map at 0x88, redirection map (all clear) before it.
    c.put(TSS + 102, &[0x88, 0]);
    c.put(0x21 * 4, &[0, 0, 0x70, 1]);
    c.put(0x1100, &[0xcd, 0x21, 0xfa, 0xf4]);
    // iret: pops IF into VIF
    c.put(0x1700, &[0x8c, 0xc8, 0xcf]);
    // HLT in virtual-8086 mode is #GP(0).
    assert_eq!(c.run_to_handler(), u64::from(GP));
    assert_eq!(c.stack32(1), 0x103);
    assert_eq!(c.reg(reg::RAX) as u16, 0x170);
    // CLI cleared VIF, which IRET had set again.
    assert_eq!(u64::from(c.stack32(3)) & (rflags::VIF | rflags::IF), 0);
    assert_eq!(c.get64(0x2000 + 0x800 - 2) as u16 & 0x3200, 0x3200);
}

/// Protected-mode virtual interrupts: CLI and STI at CPL 3 act on VIF (SDM Vol. 3, 20.4).
#[test]
fn protected_mode_virtual_interrupts() {
    for (flags, want, vif) in [(0, UD, true), (rflags::VIP, GP, false)] {
        // sti; ud2
        let mut c = run_bytes(&[0xfb, 0x0f, 0x0b]);
        c.user();
        c.cpu.state.cr4 |= cr4::PVI;
        c.cpu.state.rflags |= flags;
        c.cpu.state_changed();
        assert_eq!(c.run_to_handler(), want.into());
        let at = if want == GP { 3 } else { 2 };
        assert_eq!(u64::from(c.stack32(at)) & rflags::VIF != 0, vif);
        assert_eq!(u64::from(c.stack32(at)) & rflags::IF, 0);
    }
    // Without PVI both are #GP(0) when CPL is above IOPL.
    let mut c = run_bytes(&[0xfa]);
    c.user();
    assert_eq!(c.run_to_handler(), u64::from(GP));
}

/// POPF at CPL 3 leaves IF and IOPL alone; at IOPL 3 it changes IF.
#[test]
fn popf_privilege() {
    for (iopl, changed) in [(0, false), (rflags::IOPL, true)] {
        // push 0x202; popfd; ud2
        let mut c = run_bytes(&[0x68, 2, 2, 0, 0, 0x9d, 0x0f, 0x0b]);
        c.user();
        c.cpu.state.rflags |= iopl;
        c.cpu.state_changed();
        assert_eq!(c.run_to_handler(), u64::from(UD));
        let flags = u64::from(c.stack32(2));
        assert_eq!(flags & rflags::IF != 0, changed);
        assert_eq!(flags & rflags::IOPL, iopl);
    }
}

/// MOV CR: reserved bits and inconsistent values are #GP(0) (SDM Vol. 2, MOV - control registers).
#[test]
fn control_register_faults() {
    let cases: &[(u8, u32)] = &[
        (0, cr0::PG as u32),
        (0, (cr0::PE | cr0::NW) as u32),
        (4, 1 << 15),
        (4, cr4::PCIDE as u32),
    ];
    for (i, &(n, value)) in cases.iter().enumerate() {
        let mut code = vec![0xb8];
        code.extend(value.to_le_bytes());
        code.extend([0x0f, 0x22, 0xc0 | n << 3, 0xf4]);
        let mut c = run_bytes(&code);
        assert_eq!(c.run_to_handler(), u64::from(GP), "case {i}");
        assert_eq!(c.stack32(0), 0);
    }
    // MOV CR1 and CR5 are #UD.
    let mut c = run_bytes(&[0x0f, 0x22, 0xe8]);
    assert_eq!(c.run_to_handler(), u64::from(UD));
}

/// LAR, LSL, VERR, VERW, ARPL report by ZF.
#[test]
fn inspection() {
    // mov cx, FREE; lar eax, ecx; lsl edx, ecx; verr cx; sete bl; verw cx; sete bh; hlt
    let code = [
        0x66, 0xb9, 0x40, 0, 0x0f, 0x02, 0xc1, 0x0f, 0x03, 0xd1, 0x0f, 0, 0xe1, 0x0f, 0x94, 0xc3,
        0x0f, 0, 0xe9, 0x0f, 0x94, 0xc7, 0xf4,
    ];
    let mut c = run_bytes(&code);
    c.define(FREE, descriptor(0, 0x1f, 0x9a, 0xc));
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RAX), 0x00c0_9a00);
    assert_eq!(c.reg(reg::RDX), 0x1_ffff);
    assert_eq!(c.reg(reg::RBX) as u16, 1);
    // mov ax, 0x40; mov cx, 3; arpl ax, cx; hlt
    let mut c = run_bytes(&[0x66, 0xb8, 0x40, 0, 0x66, 0xb9, 3, 0, 0x63, 0xc8, 0xf4]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RAX) as u16, 0x43);
    assert_ne!(c.cpu.state.rflags & rflags::ZF, 0);
}

/// Debug registers: GD, DR4 as DR6 without CR4.DE, #UD with it.
#[test]
fn debug_registers() {
    // mov dr7, eax (GD); mov ebx, dr6 → #DB
    let mut c = run_bytes(&[0xb8, 0, 0x24, 0, 0, 0x0f, 0x23, 0xf8, 0x0f, 0x21, 0xf3]);
    assert_eq!(c.run_to_handler(), 1);
    assert_eq!(c.stack32(0), CODE + 8);
    assert_eq!(c.cpu.state.dr6, 0xffff_2ff0);
    assert_eq!(c.cpu.state.dr7, 0x400);
    let mut c = run_bytes(&[0x0f, 0x21, 0xe3, 0xf4]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RBX), 0xffff_0ff0);
    let mut c = run_bytes(&[0x0f, 0x21, 0xe3]);
    c.cpu.state.cr4 |= cr4::DE;
    c.cpu.state_changed();
    assert_eq!(c.run_to_handler(), u64::from(UD));
}
