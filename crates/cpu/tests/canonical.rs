//! Canonical addresses (SDM Vol. 1, 3.3.7.1): which exception a non-canonical one is, for data, the
//! stack, branch targets, returns, MSRs and table bases; with 4- and 5-level paging.

mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::cpuid::{CpuidTable, supported};
use anykvm_cpu::events::vector::{GP, SS};
use anykvm_cpu::state::{cr4, reg};
use harness::Computer;
use harness::tables::*;

const CODE: u64 = 0x1000;
/// The first address that is not canonical with 48 bits; with 57.
const HOLE: u64 = 1 << 47;
const HOLE57: u64 = 1 << 56;
const DONE: u8 = 0x80;

/// A vector, the offset of the saved RIP from [`CODE`], and the error code (0 if there is none).
type Event = (u8, i64, u64);

fn machine(code: &[u8]) -> Computer {
    let mut c = Computer::with_tables64(CODE);
    c.put(CODE, code);
    c.put(CODE + code.len() as u64, &[0xcd, DONE]);
    c
}

/// 5-level paging: the 4-level tables are entry 0 of a PML5 table.
fn la57(c: &mut Computer) {
    let pml5 = 0x3_0000;
    c.put64(pml5, c.cpu.state.cr3 | 7);
    c.cpu.state.cr3 = pml5;
    c.cpu.state.cr4 |= cr4::LA57;
}

fn event(c: &mut Computer) -> Event {
    c.cpu.state_changed();
    let vector = c.run_to_handler() as u8;
    let error = matches!(vector, 8 | 10..=14 | 17);
    let at = c.stack64(u64::from(error)).wrapping_sub(CODE) as i64;
    (vector, at, if error { c.stack64(0) } else { 0 })
}

/// SDM Vol. 3, 6.15, vectors 12 and 13: #SS(0) through RSP and RBP, else #GP(0).
#[test]
fn data() {
    let cases: &[(&str, &[u8], u8)] = &[
        ("mov eax, [rbx]", &[0x8b, 0x03], GP),
        ("mov [rbx], eax", &[0x89, 0x03], GP),
        ("lock add [rbx], eax", &[0xf0, 0x01, 0x03], GP),
        ("cmpxchg16b [rbx]", &[0x48, 0x0f, 0xc7, 0x0b], GP),
        ("movups xmm0, [rbx]", &[0x0f, 0x10, 0x03], GP),
        ("fld m80 [rbx]", &[0xdb, 0x2b], GP),
        ("mov eax, [rbp]", &[0x8b, 0x45, 0x00], SS),
        ("mov [rbp], eax", &[0x89, 0x45, 0x00], SS),
        ("mov eax, [rsp]", &[0x8b, 0x04, 0x24], SS),
        ("movups xmm0, [rbp]", &[0x0f, 0x10, 0x45, 0x00], SS),
        ("mov eax, [r12]", &[0x41, 0x8b, 0x04, 0x24], GP),
        ("mov eax, [r13]", &[0x41, 0x8b, 0x45, 0x00], GP),
        // RBP as an index is not the stack.
        ("mov eax, [rbx + rbp]", &[0x8b, 0x04, 0x2b], GP),
        // Prefixes for segments that 64-bit code does not have mean nothing; FS and GS do.
        ("mov eax, ds:[rbp]", &[0x3e, 0x8b, 0x45, 0x00], SS),
        ("mov eax, ss:[rbx]", &[0x36, 0x8b, 0x03], GP),
        ("mov eax, gs:[rbp]", &[0x65, 0x8b, 0x45, 0x00], GP),
        ("push rax", &[0x50], SS),
        ("pop rax", &[0x58], SS),
        ("push [rbx]", &[0xff, 0x33], GP),
        ("call +0", &[0xe8, 0, 0, 0, 0], SS),
        ("ret", &[0xc3], SS),
        ("leave", &[0xc9], SS),
        ("enter 0, 0", &[0xc8, 0, 0, 0], SS),
        ("pushfq", &[0x9c], SS),
        ("popfq", &[0x9d], SS),
        ("iretq", &[0x48, 0xcf], SS),
        ("retfq", &[0x48, 0xcb], SS),
        ("lodsb", &[0xac], GP),
        ("stosb", &[0xaa], GP),
        ("rep movsb", &[0xf3, 0xa4], GP),
        ("ss: lodsb", &[0x36, 0xac], GP),
        ("xlatb", &[0xd7], GP),
        ("lgdt [rbx]", &[0x0f, 0x01, 0x13], GP),
        ("fxsave [rbx]", &[0x0f, 0xae, 0x03], GP),
    ];
    for (name, code, want) in cases {
        for wide in [false, true] {
            let mut c = machine(code);
            let bad = if wide { HOLE57 } else { HOLE };
            if wide {
                la57(&mut c);
            }
            let s = &mut c.cpu.state;
            for r in [reg::RBX, reg::RSP, reg::RBP, reg::RSI, reg::RDI, 12, 13] {
                s.regs[r] = bad + 0x100;
            }
            if name.contains("rbx + rbp") {
                s.regs[reg::RBX] = 0;
            }
            s.regs[reg::RCX] = 1;
            // Events must find a stack.
            use_ist(&mut c);
            assert_eq!(event(&mut c), (*want, 0, 0), "{name}, LA57 {wide}");
        }
    }
}

/// Every gate switches to IST 1.
fn use_ist(c: &mut Computer) {
    for n in 0..256u64 {
        let access = if n == u64::from(DONE) { 0xee } else { 0x8e };
        c.put64(IDT + n * 16, gate(CODE0, HANDLERS + n * 16, access, 1));
    }
}

/// The width is CR4.LA57's; an access may not straddle the boundary (SDM Vol. 1, 3.3.7.1).
#[test]
fn width_and_straddling() {
    const PF: u8 = 14;
    for (wide, address, want) in [
        (false, HOLE, GP),
        (false, HOLE - 8, PF),
        (false, HOLE - 4, GP),
        (false, HOLE.wrapping_neg(), PF),
        (false, HOLE.wrapping_neg() - 1, GP),
        (true, HOLE, PF),
        (true, HOLE57 - 8, PF),
        (true, HOLE57 - 7, GP),
        (true, HOLE57, GP),
        (true, HOLE57.wrapping_neg(), PF),
        (true, HOLE57.wrapping_neg() - 1, GP),
    ] {
        // mov rax, [rbx]
        let mut c = machine(&[0x48, 0x8b, 0x03]);
        if wide {
            la57(&mut c);
        }
        c.cpu.state.regs[reg::RBX] = address;
        let (vector, ..) = event(&mut c);
        assert_eq!(vector, want, "{address:#x}, LA57 {wide}");
    }
}

/// Near branches check their target before they go (SDM Vol. 2, JMP, CALL, RET): #GP(0) at the
/// branch, the stack pointer as it was.
#[test]
fn branch_targets() {
    let cases: &[(&str, &[u8])] = &[
        ("jmp rax", &[0xff, 0xe0]),
        ("jmp [rbx]", &[0xff, 0x23]),
        ("call rax", &[0xff, 0xd0]),
        ("call [rbx]", &[0xff, 0x13]),
        ("ret", &[0xc3]),
        ("ret 8", &[0xc2, 8, 0]),
        ("jmp far [rbx]", &[0x48, 0xff, 0x2b]),
        ("retfq", &[0x48, 0xcb]),
        ("iretq", &[0x48, 0xcf]),
    ];
    for (name, code) in cases {
        for wide in [false, true] {
            let mut c = machine(code);
            if wide {
                la57(&mut c);
            }
            let bad = if wide { HOLE57 } else { HOLE };
            let stack = 0xa800;
            for at in [0x8000, stack] {
                c.put64(at, bad);
                c.put64(at + 8, CODE0.into());
                c.put64(at + 16, 2);
                c.put64(at + 24, stack);
                c.put64(at + 32, DATA0.into());
            }
            let s = &mut c.cpu.state;
            s.regs[reg::RAX] = bad;
            s.regs[reg::RBX] = 0x8000;
            s.regs[reg::RSP] = stack;
            assert_eq!(event(&mut c), (GP, 0, 0), "{name}, LA57 {wide}");
            // Error code, RIP, CS, RFLAGS, then RSP.
            assert_eq!(c.stack64(4), stack, "{name}");
        }
    }
}

/// Running into the hole: the fetch is #GP(0) (SDM Vol. 3, table 6-2).
#[test]
fn fetches() {
    let mut c = machine(&[0xff, 0xe0]);
    // The last page below the hole: nop at its end.
    for (level, at) in [0x4_0000u64, 0x4_1000, 0x4_2000].into_iter().enumerate() {
        let above = [
            c.cpu.state.cr3 + 255 * 8,
            0x4_0000 + 511 * 8,
            0x4_1000 + 511 * 8,
        ];
        c.put64(above[level], at | 7);
    }
    c.put64(0x4_2000 + 511 * 8, 0x4_3000 | 7);
    c.put(0x4_3fff, &[0x90]);
    c.cpu.state.regs[reg::RAX] = HOLE - 1;
    assert_eq!(event(&mut c), (GP, (HOLE - CODE) as i64, 0));
}

/// The same processor with another vendor's name.
fn vendor(c: &mut Computer, intel: bool) {
    let name = if intel {
        [0x756e_6547, 0x4965_6e69, 0x6c65_746e]
    } else {
        [0x6874_7541, 0x6974_6e65, 0x444d_4163]
    };
    let mut entries = supported();
    for e in &mut entries {
        if matches!(e.function, 0 | 0x8000_0000) {
            [e.ebx, e.edx, e.ecx] = name;
        }
    }
    c.cpu.set_cpuid(CpuidTable::new(entries));
}

/// SYSRET: Intel checks at CPL 0, AMD's fetch faults at CPL 3 (SDM Vol. 2, SYSRET; APM Vol. 3).
#[test]
fn sysret() {
    for intel in [true, false] {
        let mut c = machine(&[0x48, 0x0f, 0x07]);
        vendor(&mut c, intel);
        let s = &mut c.cpu.state;
        s.msr.star = 0x10 << 48;
        s.regs[reg::RCX] = HOLE;
        s.regs[11] = 2;
        let (at, cs) = if intel {
            (0, CODE0)
        } else {
            ((HOLE - CODE) as i64, 0x23)
        };
        assert_eq!(event(&mut c), (GP, at, 0), "Intel {intel}");
        assert_eq!(c.stack64(2), u64::from(cs), "Intel {intel}");
    }
}

/// SYSEXIT: both RDX (RIP) and RCX (RSP) (SDM Vol. 2, SYSEXIT).
#[test]
fn sysexit() {
    for (rcx, rdx, want) in [
        (0x8000, HOLE, (GP, 0, 0)),
        (HOLE, CODE, (GP, 0, 0)),
        (0x8000, CODE + 3, (DONE, 5, 0)),
    ] {
        let mut c = machine(&[0x48, 0x0f, 0x35]);
        vendor(&mut c, true);
        let s = &mut c.cpu.state;
        s.msr.sysenter_cs = 8;
        s.regs[reg::RCX] = rcx;
        s.regs[reg::RDX] = rdx;
        assert_eq!(event(&mut c), want, "{rcx:#x} {rdx:#x}");
    }
}

/// Registers that hold a linear address are checked for the processor's widest addresses (57 bits),
/// whatever CR4.LA57 is: MSRs, segment bases, table bases, addresses to invalidate.
#[test]
fn bases() {
    // mov ecx, n; wrmsr
    let wrmsr = |n: u32| {
        let mut code = vec![0xb9];
        code.extend(n.to_le_bytes());
        code.extend([0x0f, 0x30]);
        code
    };
    let mut cases: Vec<(String, Vec<u8>, i64)> = [
        0xc000_0100u32,
        0xc000_0101,
        0xc000_0102,
        0xc000_0082,
        0xc000_0083,
        0x175,
        0x176,
    ]
    .into_iter()
    .map(|n| (format!("WRMSR {n:#x}"), wrmsr(n), 5))
    .collect();
    for (name, code) in [
        ("wrfsbase rsi", vec![0xf3, 0x48, 0x0f, 0xae, 0xd6]),
        ("wrgsbase rsi", vec![0xf3, 0x48, 0x0f, 0xae, 0xde]),
        ("lgdt [rbx]", vec![0x0f, 0x01, 0x13]),
        ("lidt [rbx]", vec![0x0f, 0x01, 0x1b]),
        (
            "invpcid r9, [rdi], type 0",
            vec![0x66, 0x44, 0x0f, 0x38, 0x82, 0x0f],
        ),
    ] {
        cases.push((name.into(), code, 0));
    }
    for (name, code, at) in &cases {
        for (address, fine) in [(HOLE57, false), (HOLE, true), (HOLE57 - 1, true)] {
            if fine && name.starts_with('l') {
                // It would be used at once.
                continue;
            }
            let mut c = machine(code);
            vendor(&mut c, true);
            c.put(0x8000, &[0xff, 0]);
            c.put64(0x8002, address);
            c.put64(0x8108, address);
            let s = &mut c.cpu.state;
            s.cr4 |= cr4::FSGSBASE | cr4::PCIDE;
            s.regs[reg::RAX] = address & 0xffff_ffff;
            s.regs[reg::RDX] = address >> 32;
            s.regs[reg::RSI] = address;
            s.regs[reg::RBX] = 0x8000;
            s.regs[reg::RDI] = 0x8100;
            s.regs[9] = 0;
            let (vector, rip, error) = event(&mut c);
            let want = if fine { DONE } else { GP };
            assert_eq!((vector, error), (want, 0), "{name} {address:#x}");
            if !fine {
                assert_eq!(rip, *at, "{name}");
            }
        }
    }
}

/// LLDT and LTR of a descriptor with a non-canonical base: #GP(selector).
#[test]
fn descriptor_bases() {
    for (name, code, access) in [
        ("lldt", [0x0f, 0x00, 0xd0], 0x82),
        ("ltr", [0x0f, 0x00, 0xd8], 0x89),
    ] {
        let mut c = machine(&code);
        c.define(FREE, descriptor(0, 0x67, access, 0));
        c.put64(GDT + u64::from(FREE) + 8, HOLE57 >> 32);
        c.cpu.state.regs[reg::RAX] = FREE.into();
        assert_eq!(event(&mut c), (GP, 0, FREE.into()), "{name}");
    }
}

/// RSP0 and IST that are not canonical: #SS(0), here on the way to another event (SDM Vol. 3, 6.14.2);
/// INVLPG of such an address does nothing (Vol. 2, INVLPG).
#[test]
fn inner_stacks_and_invlpg() {
    // ud2 through a gate with IST 2
    let mut c = machine(&[0x0f, 0x0b]);
    c.put64(IDT + 6 * 16, gate(CODE0, HANDLERS + 6 * 16, 0x8e, 2));
    c.put64(TSS + 44, HOLE);
    // EXT: the #UD was being delivered.
    assert_eq!(event(&mut c), (SS, 0, 1));

    let mut c = machine(&[0x0f, 0x01, 0x3b]);
    c.cpu.state.regs[reg::RBX] = HOLE;
    assert_eq!(event(&mut c).0, DONE);
    assert_ne!(c.run(), Exit::Shutdown);
}
