//! What may be reached through a segment register: limits, types, null selectors (SDM Vol. 3, 3.4.5,
//! 5.3 and 5.4), and the wrap of 16-bit addresses (SDM Vol. 1, 3.6; Vol. 3, 21.1.1).

use anykvm_cpu::events::vector::{GP, SS};
use anykvm_cpu::state::reg;

use crate::harness::Computer;
use crate::harness::tables::*;
use crate::machine::*;

/// Data, accessed, DPL 3: read/write expand-up and expand-down.
const UP: u8 = 0xf3;
const DOWN: u8 = 0xf7;
/// Descriptor flags.
const G: u8 = 8;
const B: u8 = 4;

/// Type byte, limit field, flags; offset, bytes accessed, whether it is inside.
type Limit = (u8, u32, u8, u32, usize, bool);

const LIMITS: &[Limit] = &[
    // Expand-up: the last byte is at the limit.
    (UP, 0xfff, 0, 0, 1, true),
    (UP, 0xfff, 0, 0xfff, 1, true),
    (UP, 0xfff, 0, 0x1000, 1, false),
    (UP, 0xfff, 0, 0xffe, 2, true),
    (UP, 0xfff, 0, 0xfff, 2, false),
    (UP, 0xfff, 0, 0xffc, 4, true),
    (UP, 0xfff, 0, 0xffd, 4, false),
    (UP, 0xfff, 0, 0xffff_fffc, 4, false),
    (UP, 0, 0, 0, 1, true),
    (UP, 0, 0, 0, 2, false),
    // B does not matter to an expand-up segment.
    (UP, 0x1_ffff, 0, 0x1_fffc, 4, true),
    (UP, 0x1_ffff, B, 0x1_fffd, 4, false),
    // In pages: the limit's low 12 bits are ones.
    (UP, 0, G, 0xffc, 4, true),
    (UP, 0, G, 0xffd, 4, false),
    (UP, 1, G, 0x1fff, 1, true),
    (UP, 1, G, 0x2000, 1, false),
    (UP, 0xf_ffff, G, 0xffff_fffc, 4, true),
    // Expand-down: from the limit + 1 to FFFFh or FFFFFFFFh.
    (DOWN, 0xfff, B, 0xfff, 1, false),
    (DOWN, 0xfff, B, 0xfff, 2, false),
    (DOWN, 0xfff, B, 0x1000, 4, true),
    (DOWN, 0xfff, B, 0xffff_fffc, 4, true),
    (DOWN, 0xfff, B, 0, 1, false),
    (DOWN, 0xfff, 0, 0x1000, 4, true),
    (DOWN, 0xfff, 0, 0xffff, 1, true),
    (DOWN, 0xfff, 0, 0xfffe, 2, true),
    (DOWN, 0xfff, 0, 0xffff, 2, false),
    (DOWN, 0xfff, 0, 0xfffd, 4, false),
    (DOWN, 0xfff, 0, 0x1_0000, 1, false),
    (DOWN, 0, G, 0xfff, 1, false),
    (DOWN, 0, G, 0x1000, 1, true),
    // Nothing is left above these limits.
    (DOWN, 0xffff, 0, 0xffff, 1, false),
    (DOWN, 0xffff, 0, 0x1_0000, 1, false),
    (DOWN, 0xf_ffff, G | B, 0xffff_ffff, 1, false),
    (DOWN, 0xf_ffff, G | B, 0, 1, false),
];

/// MOV of this many bytes between [disp32] and (R)AX, with a segment prefix.
fn mov(prefix: u8, write: bool, bytes: usize, offset: u32) -> Vec<u8> {
    let opcode = match (write, bytes) {
        (false, 1) => 0xa0,
        (false, _) => 0xa1,
        (true, 1) => 0xa2,
        (true, _) => 0xa3,
    };
    let mut code = vec![prefix];
    if bytes == 2 {
        code.push(0x66);
    }
    code.push(opcode);
    code.extend(offset.to_le_bytes());
    code
}

/// MOV Sreg, AX before `code`.
fn load(register: u8, code: &[u8]) -> Vec<u8> {
    let mut all = vec![0x8e, 0xc0 | register << 3];
    all.extend(code);
    all
}

#[test]
fn limits_of_data_and_stack_segments() {
    for &(kind, limit, flags, offset, bytes, inside) in LIMITS {
        // FS: #GP, SS: #SS; reads and writes. At CPL 3, so that the handler has a stack of its own.
        for (register, prefix, v) in [(4, 0x64, GP), (2, 0x36, SS)] {
            for write in [false, true] {
                let mut c = computer(
                    Prot32(3),
                    &load(register, &mov(prefix, write, bytes, offset)),
                );
                // The base puts every offset inside RAM.
                let base = 0x2_0000u32.wrapping_sub(offset);
                c.define(FREE, descriptor(base, limit, kind, flags));
                c.cpu.state.regs[reg::RAX] = u64::from(FREE | 3);
                let want = if inside { Done } else { Fault(v, 0) };
                assert_eq!(
                    end(&mut c),
                    want,
                    "type {kind:x} limit {limit:x} flags {flags:x}: {bytes} at {offset:x}, SS {}",
                    register == 2
                );
            }
        }
    }
}

/// The operand's whole size counts: the last offset at which it fits a limit of FFFh, and the next.
#[test]
fn limits_of_larger_operands() {
    // Instruction with FS:[EDI], size of what it accesses.
    let rows: &[(&str, &[u8], u32)] = &[
        ("CMPXCHG8B", &[0x64, 0x0f, 0xc7, 0x0f], 8),
        ("BOUND", &[0x64, 0x62, 0x07], 8),
        ("LES", &[0x64, 0xc4, 0x07], 6),
        ("LFS, 16-bit", &[0x66, 0x64, 0x0f, 0xb4, 0x07], 4),
        ("SGDT", &[0x64, 0x0f, 0x01, 0x07], 6),
        ("FLD m80", &[0x64, 0xdb, 0x2f], 10),
        ("FNSTCW", &[0x64, 0xd9, 0x3f], 2),
        ("FNSTENV", &[0x64, 0xd9, 0x37], 28),
        ("FNSTENV, 16-bit", &[0x66, 0x64, 0xd9, 0x37], 14),
        ("FNSAVE", &[0x64, 0xdd, 0x37], 108),
        ("MOVUPS", &[0x64, 0x0f, 0x10, 0x07], 16),
        ("MOVQ MMX", &[0x64, 0x0f, 0x6f, 0x07], 8),
        ("PUSH m32", &[0x64, 0xff, 0x37], 4),
        ("POP m32", &[0x64, 0x8f, 0x07], 4),
        ("BT m, imm8", &[0x64, 0x0f, 0xba, 0x27, 31], 4),
        ("SLDT", &[0x64, 0x0f, 0x00, 0x07], 2),
        ("LAR", &[0x64, 0x0f, 0x02, 0x07], 2),
    ];
    for &(name, bytes, size) in rows {
        for (offset, want) in [(0x1000 - size, Done), (0x1001 - size, GP0)] {
            let mut c = computer(Prot32(0), &load(4, bytes));
            set_cr4(&mut c, CR4_ALL);
            c.define(FREE, descriptor(0x2_0000, 0xfff, 0x93, 4));
            let r = &mut c.cpu.state.regs;
            (r[reg::RAX], r[reg::RDI]) = (FREE.into(), offset.into());
            if name == "BOUND" {
                // EAX lies between these.
                c.put(
                    0x2_0000 + u64::from(offset),
                    &[0, 0, 0, 0, 0xff, 0xff, 0, 0],
                );
            }
            assert_eq!(end(&mut c), want, "{name} at {offset:x}");
        }
    }
}

/// Reads and writes by type (SDM Vol. 3, 3.4.5.1 and 5.4), through FS.
#[test]
fn types_of_data_segments() {
    // Access byte; reading, writing.
    let rows = [
        (0xf1, true, false),
        (0xf3, true, true),
        (0xf5, true, false),
        (0xf7, true, true),
        (0xfb, true, false),
        (0xff, true, false),
    ];
    for (access, reads, writes) in rows {
        for (write, ok) in [(false, reads), (true, writes)] {
            let mut c = computer(Prot32(0), &load(4, &mov(0x64, write, 4, 0x2_0000)));
            // Expand-down: everything above the limit.
            c.define(
                FREE,
                descriptor(
                    0,
                    if access & 4 == 0 || access & 8 != 0 {
                        0xf_ffff
                    } else {
                        0
                    },
                    access,
                    0xc,
                ),
            );
            c.cpu.state.regs[reg::RAX] = FREE.into();
            assert_eq!(
                end(&mut c),
                if ok { Done } else { GP0 },
                "{access:x} write {write}"
            );
        }
    }
}

/// Through CS: reading needs a readable code segment, writing is never allowed (SDM Vol. 3, 5.4).
#[test]
fn accesses_through_cs() {
    for (access, write, want) in [
        (0x9b, false, Done),
        (0x9b, true, GP0),
        (0x99, false, GP0),
        (0x99, true, GP0),
        (0x9f, false, Done),
        (0x9d, false, GP0),
    ] {
        // jmp FREE:0x1100
        let mut c = computer(Prot32(0), &[0xea, 0, 0x11, 0, 0, FREE as u8, 0]);
        let mut code = mov(0x2e, write, 4, 0x2_0000);
        code.push(END);
        c.put(0x1100, &code);
        c.define(FREE, descriptor(0, 0xf_ffff, access, 0xc));
        assert_eq!(end(&mut c), want, "{access:x} write {write}");
    }
}

/// A null selector may be loaded into DS, ES, FS and GS, and its use is #GP(0) (SDM Vol. 3, 3.4.2);
/// 64-bit code does not look at DS and ES.
#[test]
fn null_selectors() {
    for selector in 0..4u64 {
        for (register, prefix) in [(0u8, 0x26u8), (3, 0x3e), (4, 0x64), (5, 0x65)] {
            for at in [Prot32(0), Prot32(3), Compat32(3)] {
                for write in [false, true] {
                    let mut c = computer(at, &load(register, &mov(prefix, write, 4, 0x2_0000)));
                    c.cpu.state.regs[reg::RAX] = selector;
                    assert_eq!(end(&mut c), GP0, "{at:?} {register} {selector}");
                }
            }
            // mov sreg, ax; mov eax, prefix:[rdi]
            let mut c = computer(Long(3), &load(register, &[prefix, 0x8b, 0x07]));
            let r = &mut c.cpu.state.regs;
            (r[reg::RAX], r[reg::RDI]) = (selector, 0x2_0000);
            assert_eq!(end(&mut c), Done);
        }
    }
}

/// SDM Vol. 3, 5.3: fetches and branches are checked against the limit of CS.
#[test]
fn limit_of_the_code_segment() {
    // Code at 0x1100 in a segment with limit 0x1103; what it is, how it ends, where.
    let rows: &[(&[u8], End, u64)] = &[
        // The fifth byte is outside.
        (&[0x90, 0x90, 0x90, 0x90, END], GP0, 0x1104),
        (&[0x90, 0x90, 0x90, END], Done, 0x1104),
        (&[0x90, 0x90, 0xb0, 1, END], GP0, 0x1104),
        (&[0x90, 0x90, 0x90, 0xb0, 1], GP0, 0x1103),
        // Branches fault before they are taken; those not taken do not.
        (&[0xeb, 2], GP0, 0x1100),
        (&[0xeb, 1, 0x90, END], Done, 0x1104),
        (&[0x74, 2, END], Done, 0x1103),
        (&[0x75, 2, END], GP0, 0x1100),
        (&[0xff, 0xe7], GP0, 0x1100),
        (&[0xff, 0xd7], GP0, 0x1100),
    ];
    for (code, want, rip) in rows {
        let mut c = computer(Prot32(0), &[0xea, 0, 0x11, 0, 0, FREE as u8, 0]);
        c.put(0x1100, code);
        c.define(FREE, descriptor(0, 0x1103, 0x9b, 4));
        c.cpu.state.regs[reg::RDI] = 0x2000;
        assert_eq!(end(&mut c), *want, "{code:x?}");
        let word = u64::from(*want != Done);
        assert_eq!(u64::from(c.stack32(word)), *rip, "{code:x?}");
    }
}

/// Real mode: 16-bit offsets wrap, operands do not go beyond FFFFh (SDM Vol. 3, 21.1.1; table 21-6
/// for the vectors).
#[test]
fn real_mode_offsets() {
    let set = |c: &mut Computer| {
        let r = &mut c.cpu.state.regs;
        (r[reg::RBX], r[reg::RSI], r[reg::RBP]) = (0xfff0, 0x20, 0xfff0);
        c.put(0x10, &[0x5a, 0xa5]);
    };
    let rows: &[(&str, &[u8], End)] = &[
        ("mov ax, [bx+si] wraps to 10h", &[0x8b, 0x00], Done),
        ("mov ax, [bx+20h] wraps to 10h", &[0x8b, 0x47, 0x20], Done),
        ("mov ax, [ffffh]", &[0xa1, 0xff, 0xff], Event(GP)),
        ("mov al, [ffffh]", &[0xa0, 0xff, 0xff], Done),
        ("mov eax, [fffdh]", &[0x66, 0xa1, 0xfd, 0xff], Event(GP)),
        (
            "mov ax, [bp+0fh] through SS",
            &[0x8b, 0x46, 0x0f],
            Event(SS),
        ),
        ("mov ax, ds:[bp+0fh]", &[0x3e, 0x8b, 0x46, 0x0f], Event(GP)),
        ("mov ax, ss:[bx+0fh]", &[0x36, 0x8b, 0x47, 0x0f], Event(SS)),
        ("a32 mov al, [10000h]", &[0x67, 0xa0, 0, 0, 1, 0], Event(GP)),
        (
            "a32 mov al, [ebx+20h] does not wrap",
            &[0x67, 0x8a, 0x43, 0x20],
            Event(GP),
        ),
        (
            "o32 near jump beyond FFFFh",
            &[0x66, 0xe9, 0, 0, 1, 0],
            Event(GP),
        ),
        (
            "o32 far jump beyond FFFFh",
            &[0x66, 0xea, 0, 0, 1, 0, 0, 0],
            Event(GP),
        ),
    ];
    for (name, code, want) in rows {
        let mut c = computer(Real, code);
        set(&mut c);
        assert_eq!(end(&mut c), *want, "{name}");
    }
    // IP at the end of the segment: INT3 at FFFFh runs, what would be behind a NOP does not.
    for (last, want) in [(END, Done), (0x90, Event(GP))] {
        let mut c = computer(Real, &[0xe9, 0xfc, 0xef]);
        c.put(0xffff, &[last, END]);
        assert_eq!(end(&mut c), want);
    }
    // The same in virtual-8086 mode, with an error code.
    for (code, want) in [
        (&[0xa1u8, 0xff, 0xff][..], GP0),
        (&[0x8b, 0x46, 0x0f], Fault(SS, 0)),
        (&[0x67, 0xa0, 0, 0, 1, 0], GP0),
        (&[0x8b, 0x00], Done),
    ] {
        let mut c = computer(V86(3), code);
        set(&mut c);
        assert_eq!(end(&mut c), want, "{code:x?}");
    }
}

/// "Unreal" mode, from real mode and back in one piece of code: the limit of DS outlives CR0.PE, a
/// load of DS in real mode keeps it, and one without it is 64 KiB (SDM Vol. 3, 10.9.2).
#[test]
fn unreal_mode() {
    for (limit, want) in [(0xf_ffff, Done), (0xf, Event(GP))] {
        // lgdt [0x900]; mov eax, cr0; inc ax; mov cr0, eax; mov bx, 8; mov ds, bx; dec ax;
        // mov cr0, eax; xor bx, bx; mov ds, bx; a32 mov cl, [0x100000]
        let mut c = computer(
            Real,
            &[
                0x0f, 0x01, 0x16, 0, 9, 0x0f, 0x20, 0xc0, 0x40, 0x0f, 0x22, 0xc0, 0xbb, 8, 0, 0x8e,
                0xdb, 0x48, 0x0f, 0x22, 0xc0, 0x31, 0xdb, 0x8e, 0xdb, 0x67, 0x8a, 0x0d, 0, 0, 0x10,
                0,
            ],
        );
        c.put(0x900, &[15, 0, 0, 8, 0, 0]);
        c.put64(0x808, descriptor(0, limit, 0x92, 8));
        c.put(0x10_0000, &[0x77]);
        assert_eq!(end(&mut c), want);
        if want == Done {
            assert_eq!(c.reg(reg::RCX) & 0xff, 0x77);
        }
    }
}

/// Operand and address size prefixes in 16- and 32-bit protected mode: what MOV stores where.
#[test]
fn mixed_sizes() {
    // Mode, prefixes, address bits, operand bytes.
    for (at, prefixes, bits, bytes) in [
        (Prot16(0), &[][..], 16, 2),
        (Prot16(0), &[0x66], 16, 4),
        (Prot16(0), &[0x67], 32, 2),
        (Prot16(0), &[0x66, 0x67], 32, 4),
        (Prot32(0), &[], 32, 4),
        (Prot32(0), &[0x66], 32, 2),
        (Prot32(0), &[0x67], 16, 4),
        (Prot32(0), &[0x66, 0x67], 16, 2),
        (Compat16(0), &[0x66, 0x67], 32, 4),
        (Compat32(3), &[0x66], 32, 2),
    ] {
        // mov [bx] or [ebx], eax
        let mut code = prefixes.to_vec();
        code.extend([0x89, if bits == 16 { 0x07 } else { 0x03 }]);
        let mut c = computer(at, &code);
        let r = &mut c.cpu.state.regs;
        (r[reg::RAX], r[reg::RBX]) = (0x4433_2211, 0x1_8000);
        assert_eq!(end(&mut c), Done);
        let stored = if bytes == 2 { 0x2211 } else { 0x4433_2211 };
        let place = if bits == 16 { 0x8000 } else { 0x1_8000 };
        assert_eq!(c.get64(place), stored, "{at:?} {prefixes:x?}");
        assert_eq!(c.get64(place ^ 0x1_0000), 0, "{at:?} {prefixes:x?}");
    }
}
