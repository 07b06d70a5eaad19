//! Long mode: 64-bit gates and IST, IRETQ, SYSCALL and its relatives, MSRs, control registers,
//! CPUID, SMM (SDM Vol. 3, 6.14, 5.8.7, 5.8.8).

mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::events::vector::{DF, GP, SS, UD};
use anykvm_cpu::memory::MemoryMap;
use anykvm_cpu::msr::index as msr;
use anykvm_cpu::state::{Segment, cr0, cr4, efer, reg, rflags, seg};
use harness::Computer;
use harness::tables::*;

const CODE: u64 = 0x1000;

fn run_bytes(bytes: &[u8]) -> Computer {
    let mut c = Computer::with_tables64(CODE);
    c.put(CODE, bytes);
    c
}

/// SDM Vol. 3, 6.14.2: SS:RSP is always pushed, the stack is aligned, SS becomes null on a change of
/// level; IRETQ returns.
#[test]
fn interrupt_from_user_mode_and_back() {
    let mut c = run_bytes(&[0xcd, 0x80, 0xf4]);
    c.user();
    c.put64(TSS + 4, STACK0 + 8);
    assert_eq!(c.run_to_handler(), 0x80);
    assert_eq!(c.reg(reg::RSP), STACK0 - 40);
    let words: Vec<u64> = (0..5).map(|n| c.stack64(n)).collect();
    assert_eq!(words, [CODE + 2, CODE3.into(), 2, STACK3, DATA3.into()]);
    assert_eq!(c.cpu.state.seg[usize::from(seg::SS)].selector, 0);
    assert_eq!(c.cpu.state.cpl(), 0);
    // iretq behind the handler's hlt; the hlt at CPL 3 is #GP.
    c.put(HANDLERS + 0x801, &[0x48, 0xcf]);
    assert_eq!(c.run_to_handler(), u64::from(GP));
    assert_eq!(c.stack64(0), 0);
    assert_eq!(c.stack64(1), CODE + 2);
    assert_eq!(c.stack64(2), CODE3.into());
    assert_eq!(c.stack64(4), STACK3);
    assert_eq!(c.stack64(5), DATA3.into());
}

/// A fault at CPL 0 stays on the stack, aligned to 16 bytes; IRETQ with the same level restores it.
#[test]
fn fault_at_level_0() {
    let mut c = run_bytes(&[0x0f, 0x0b, 0xf4]);
    c.cpu.state.regs[reg::RSP] = 0xa00b;
    assert_eq!(c.run_to_handler(), u64::from(UD));
    assert_eq!(c.reg(reg::RSP), 0xa000 - 40);
    assert_eq!(c.stack64(3), 0xa00b);
    // add qword [rsp], 2; iretq
    c.put(HANDLERS + 0x61, &[0x48, 0x83, 0x04, 0x24, 2, 0x48, 0xcf]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.cpu.state.rip(), CODE + 3);
    assert_eq!(c.reg(reg::RSP), 0xa00b);
}

/// FS and GS with null selectors keep their bases through IRETQ, to the same and to an outer level.
#[test]
fn bases_survive_iretq() {
    for (cs, ss) in [(CODE0, 0), (CODE3, DATA3)] {
        let mut c = run_bytes(&[0x48, 0xcf]);
        for (n, v) in [CODE + 0x100, cs.into(), 2, 0x9000, ss.into()]
            .into_iter()
            .enumerate()
        {
            c.put64(0xa000 + n as u64 * 8, v);
        }
        for n in [seg::FS, seg::GS] {
            let s = &mut c.cpu.state.seg[usize::from(n)];
            *s = Segment {
                base: 0x1234,
                attr: Segment::UNUSABLE,
                ..Segment::default()
            };
        }
        c.put(CODE + 0x100, &[0xf4]);
        assert_eq!(c.run(), Exit::Hlt);
        assert_eq!(c.cpu.state.seg[usize::from(seg::GS)].base, 0x1234);
        assert_eq!(c.cpu.state.seg[usize::from(seg::FS)].base, 0x1234);
    }
}

/// The interrupt stack table, and a non-canonical stack pointer: #SS, so #DF (on IST 1).
#[test]
fn interrupt_stack_table() {
    let mut c = run_bytes(&[0x0f, 0x0b]);
    c.user();
    c.put64(TSS + 4, 1 << 63);
    // #UD is benign: #SS comes next, on the same bad stack: then #DF on its own.
    assert_eq!(c.run_to_handler(), u64::from(DF));
    assert_eq!(c.reg(reg::RSP), 0x9000 - 48);
    assert_eq!(c.stack64(1), CODE);
    let mut c = run_bytes(&[0x0f, 0x0b]);
    c.put64(IDT + 6 * 16, gate(CODE0, HANDLERS, 0x8e, 2));
    c.put64(TSS + 44, 1 << 63);
    assert_eq!(c.run_to_handler(), u64::from(SS));
    assert_eq!(c.stack64(0), 1);
}

/// IRETQ to itself with a null SS at CPL 0, and the checks of the frame.
#[test]
fn iretq_frames() {
    let cases: &[([u64; 5], Option<u64>)] = &[
        ([CODE + 0x100, CODE0 as u64, 2, 0x9000, 0], None),
        ([CODE + 0x100, CODE0 as u64, 2, 0x9000, DATA0 as u64], None),
        (
            [CODE + 0x100, CODE0 as u64, 2, 0x9000, CODE0 as u64],
            Some(CODE0 as u64),
        ),
        ([CODE + 0x100, CODE3 as u64, 2, 0x9000, 0], Some(0)),
        (
            [CODE + 0x100, CODE3 as u64, 2, 0x9000, DATA0 as u64],
            Some(DATA0 as u64),
        ),
        ([1 << 47, CODE0 as u64, 2, 0x9000, 0], Some(0)),
        ([CODE, 0, 2, 0x9000, 0], Some(0)),
        ([CODE, DATA0 as u64, 2, 0x9000, 0], Some(DATA0 as u64)),
        // NT set is #GP(0).
        (
            [CODE + 0x100, CODE0 as u64, 2 | rflags::NT, 0x9000, 0],
            None,
        ),
    ];
    for (i, (frame, want)) in cases.iter().enumerate() {
        let mut c = run_bytes(&[0x48, 0xcf]);
        c.put(CODE + 0x100, &[0xf4]);
        for (n, v) in frame.iter().enumerate() {
            c.put64(0xa000 + n as u64 * 8, *v);
        }
        assert_eq!(c.run(), Exit::Hlt, "case {i}");
        match want {
            None => {
                assert_eq!(
                    c.cpu.state.rip(),
                    CODE + 0x101,
                    "case {i}: {}",
                    c.cpu.dump()
                );
                assert_eq!(c.reg(reg::RSP), 0x9000);
            }
            Some(code) => {
                assert_eq!(c.cpu.state.rip(), HANDLERS + 13 * 16 + 1, "case {i}");
                assert_eq!(c.stack64(0), *code, "case {i}");
                assert_eq!(c.stack64(1), CODE, "case {i}");
            }
        }
    }
}

/// SDM Vol. 2, SYSCALL and SYSRET.
#[test]
fn syscall_and_sysret() {
    // syscall; hlt
    let mut c = run_bytes(&[0x0f, 0x05, 0xf4]);
    c.user();
    let m = &mut c.cpu.state.msr;
    m.star = 0x10_0008 << 32;
    m.lstar = 0x1100;
    m.sfmask = rflags::IF | rflags::DF;
    c.cpu.state.rflags |= rflags::IF | rflags::CF;
    // hlt; sysretq
    c.put(0x1100, &[0xf4, 0x48, 0x0f, 0x07]);
    assert_eq!(c.run(), Exit::Hlt);
    let s = &c.cpu.state;
    assert_eq!((s.rip(), s.cpl()), (0x1101, 0));
    assert_eq!((s.regs[reg::RCX], s.regs[11]), (CODE + 2, 0x203));
    assert_eq!(s.rflags, 3);
    assert_eq!(s.seg[usize::from(seg::CS)].selector, 8);
    assert_eq!(s.seg[usize::from(seg::SS)].selector, 16);
    assert_eq!(c.run_to_handler(), u64::from(GP));
    assert_eq!(c.stack64(1), CODE + 2);
    assert_eq!(c.stack64(2), 0x23);
    assert_eq!(c.stack64(5), 0x1b);
    assert_eq!(c.stack64(3) & !rflags::RF, 0x203);
    // Without EFER.SCE: #UD.
    let mut c = run_bytes(&[0x0f, 0x05]);
    c.cpu.state.msr.efer &= !efer::SCE;
    assert_eq!(c.run_to_handler(), u64::from(UD));
}

/// SWAPGS, WRMSR to FS and GS bases, RDGSBASE.
#[test]
fn segment_bases() {
    // mov ecx, FS_BASE; mov eax, 0x1234; xor edx, edx; wrmsr; swapgs; rdgsbase rbx; rdfsbase rsi; hlt
    let mut c = run_bytes(&[
        0xb9, 0, 1, 0, 0xc0, 0xb8, 0x34, 0x12, 0, 0, 0x31, 0xd2, 0x0f, 0x30, 0x0f, 0x01, 0xf8,
        0xf3, 0x48, 0x0f, 0xae, 0xcb, 0xf3, 0x48, 0x0f, 0xae, 0xc6, 0xf4,
    ]);
    c.cpu.state.cr4 |= cr4::FSGSBASE;
    c.cpu.state.msr.kernel_gs_base = 0xffff_8000_0000_0000;
    c.cpu.state_changed();
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RBX), 0xffff_8000_0000_0000);
    assert_eq!(c.reg(reg::RSI), 0x1234);
    assert_eq!(c.cpu.state.msr.kernel_gs_base, 0);
}

/// RDMSR and WRMSR of what does not exist or does not fit: #GP(0); EFER.LME under paging too.
#[test]
fn msr_faults() {
    for (index, value, write) in [
        (0x1234_5678u32, 0u64, false),
        (0x1234_5678, 0, true),
        (msr::LSTAR, 1 << 63, true),
        (msr::EFER, 0, true),
        (msr::EFER, 1 << 40, true),
        (msr::MTRR_CAP, 0, true),
    ] {
        let mut c = run_bytes(&[0x0f, if write { 0x30 } else { 0x32 }]);
        let r = &mut c.cpu.state.regs;
        r[reg::RCX] = index.into();
        r[reg::RAX] = value & 0xffff_ffff;
        r[reg::RDX] = value >> 32;
        assert_eq!(c.run_to_handler(), u64::from(GP), "{index:#x}");
        assert_eq!(c.stack64(0), 0);
    }
}

/// Clearing PG or PAE in 64-bit mode, a CR3 beyond MAXPHYADDR, PCIDE with a non-zero PCID: #GP(0).
#[test]
fn control_registers() {
    let cases: &[(u8, u64, bool)] = &[
        (0, cr0::PE | cr0::ET, false),
        (0, cr0::PE | cr0::PG | cr0::NW, false),
        (3, 1 << 60, false),
        (3, 0x2_0018, true),
        (4, cr4::OSFXSR, false),
        (4, cr4::PAE | 1 << 31, false),
        (4, cr4::PAE | cr4::LA57, false),
        (4, cr4::PAE | cr4::PCIDE, true),
    ];
    for (i, &(n, value, good)) in cases.iter().enumerate() {
        let mut c = run_bytes(&[0x0f, 0x22, 0xc0 | n << 3, 0xf4]);
        c.cpu.state.regs[reg::RAX] = value;
        assert_eq!(c.run(), Exit::Hlt, "case {i}");
        assert_eq!(c.cpu.state.rip() == CODE + 4, good, "case {i}");
    }
    // PCIDE once CR3's low bits are not zero.
    let mut c = run_bytes(&[0x0f, 0x22, 0xe0]);
    c.cpu.state.cr3 |= 1;
    c.cpu.state.regs[reg::RAX] = cr4::PAE | cr4::PCIDE;
    assert_eq!(c.run_to_handler(), u64::from(GP));
}

/// A far return to compatibility mode, and leaving long mode from there.
#[test]
fn compatibility_mode_and_out() {
    // push FREE; push 0x1100; retfq
    let mut c = run_bytes(&[0x6a, FREE as u8, 0x68, 0, 0x11, 0, 0, 0x48, 0xcb]);
    c.define(FREE, descriptor(0, 0xf_ffff, 0x9b, 0xc));
    // mov eax, cr0; and eax, ~PG; mov cr0, eax; hlt
    c.put(
        0x1100,
        &[
            0x0f, 0x20, 0xc0, 0x25, 0xff, 0xff, 0xff, 0x7f, 0x0f, 0x22, 0xc0, 0xf4,
        ],
    );
    assert_eq!(c.run(), Exit::Hlt);
    let s = &c.cpu.state;
    assert_eq!(s.rip(), 0x110c);
    assert_eq!(s.msr.efer & (efer::LMA | efer::LME), efer::LME);
}

/// A 64-bit call gate: 16-byte descriptor, RSP0, no parameters (SDM Vol. 3, 5.8.3.1).
#[test]
fn call_gate() {
    // call far [rax]
    let mut c = run_bytes(&[0x48, 0xff, 0x18]);
    c.user();
    c.define(FREE, gate(CODE0, 0x1100, 0xec, 0));
    c.define(FREE + 8, 0);
    c.put64(0x1800, 0);
    c.put64(0x1808, (FREE | 3).into());
    c.cpu.state.regs[reg::RAX] = 0x1800;
    c.put(0x1100, &[0xf4, 0x48, 0xcb]);
    assert_eq!(c.run(), Exit::Hlt, "{}", c.cpu.dump());
    let words: Vec<u64> = (0..4).map(|n| c.stack64(n)).collect();
    assert_eq!(words, [CODE + 3, CODE3.into(), STACK3, DATA3.into()]);
    assert_eq!(c.reg(reg::RSP), STACK0 - 32);
    assert_eq!(c.cpu.state.seg[usize::from(seg::SS)].selector, 0);
}

/// LTR takes a 16-byte descriptor and marks it busy; a busy one is #GP.
#[test]
fn task_register() {
    // mov eax, FREE; ltr ax; str ecx; ltr ax
    let mut c = run_bytes(&[
        0xb8, 0x40, 0, 0, 0, 0x0f, 0, 0xd8, 0x0f, 0, 0xc9, 0x0f, 0, 0xd8,
    ]);
    c.define(FREE, descriptor(0x1234_5678, 0x67, 0x89, 0));
    c.define(FREE + 8, 0xffff_8000);
    // The handler's stack must still be found.
    assert_eq!(c.run_to_handler(), u64::from(GP));
    assert_eq!(c.stack64(0), FREE.into());
    assert_eq!(c.reg(reg::RCX), FREE.into());
    assert_eq!(c.cpu.state.tr.base, 0xffff_8000_1234_5678);
    assert_eq!(c.get64(GDT + 0x40) >> 40 & 0xff, 0x8b);
}

/// STI; STI; a shadow is over one instruction behind the first; HLT at CPL 3 is #GP.
#[test]
fn interrupt_shadow() {
    let mut c = run_bytes(&[0xfb, 0xf4]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.cpu.state.events.shadow, 0);
    assert_ne!(c.cpu.state.rflags & rflags::IF, 0);
}

/// TF traps behind the instruction with DR6.BS; the handler runs with TF clear.
#[test]
fn single_step() {
    // push 0x102; popfq; nop; nop
    let mut c = run_bytes(&[0x68, 2, 1, 0, 0, 0x9d, 0x90, 0x90]);
    assert_eq!(c.run_to_handler(), 1);
    assert_eq!(c.stack64(0), CODE + 7);
    assert_eq!(c.cpu.state.dr6, 0xffff_4ff0);
    assert_ne!(c.stack64(2) & rflags::TF, 0);
    assert_eq!(c.cpu.state.rflags & rflags::TF, 0);
}

/// An SMI saves the state and RSM restores it.
#[test]
fn system_management_mode() {
    let mut c = run_bytes(&[0x90, 0xf4]);
    let map = c.memory.map(0);
    let same = MemoryMap::new(map.slots().cloned().collect()).unwrap();
    c.memory.replace(1, same, None);
    c.cpu.state.regs[reg::RBX] = 0x1122_3344_5566_7788;
    c.cpu.state.msr.smbase = 0x3_0000;
    c.cpu.state.events.smi_pending = true;
    // mov ebx, 1; hlt; rsm
    c.put(0x3_8000, &[0x66, 0xbb, 1, 0, 0, 0, 0xf4, 0x0f, 0xaa]);
    c.cpu.state_changed();
    assert_eq!(c.run(), Exit::Hlt);
    let s = &c.cpu.state;
    assert!(s.events.smm && s.events.nmi_masked);
    assert_eq!((s.cr0 & (cr0::PE | cr0::PG), s.cr4, s.msr.efer), (0, 0, 0));
    assert_eq!(c.get64(0x3_fee0 + 0x98), CODE);
    assert_eq!(c.run(), Exit::Hlt);
    let s = &c.cpu.state;
    assert!(!s.events.smm && !s.events.nmi_masked);
    assert_eq!(s.rip(), CODE + 2);
    assert_eq!(s.regs[reg::RBX], 0x1122_3344_5566_7788);
    assert!(s.code64());
}

/// CPUID's leaves, and UMIP and TSD at CPL 3.
#[test]
fn user_mode_restrictions() {
    for (bytes, bit) in [
        (&[0x0f, 0x01, 0x00][..], cr4::UMIP),
        (&[0x0f, 0x00, 0xc8][..], cr4::UMIP),
        (&[0x0f, 0x31][..], cr4::TSD),
    ] {
        let mut code = bytes.to_vec();
        code.extend([0x0f, 0x0b]);
        for (set, want) in [(false, UD), (true, GP)] {
            let mut c = run_bytes(&code);
            c.user();
            c.cpu.state.regs[reg::RAX] = 0x1800;
            if set {
                c.cpu.state.cr4 |= bit;
                c.cpu.state_changed();
            }
            assert_eq!(c.run_to_handler(), want.into(), "{bytes:x?}");
        }
    }
}
