//! Prefixes: LOCK, the longest instruction, and repeated and reordered prefixes (SDM Vol. 2, 2.1.1,
//! 2.2.1, 2.3.11 and LOCK).

use anykvm_cpu::state::reg;

use crate::harness::Computer;
use crate::machine::*;

/// Instructions that take LOCK, with a destination in memory (SDM Vol. 2, LOCK): map (0: one-byte,
/// 1: 0F), opcode, ModRM.reg (8: any).
const LOCKABLE: &[(u8, u8, u8)] = &[
    // ADD OR ADC SBB AND SUB XOR, r/m op r; not CMP.
    (0, 0x00, 8),
    (0, 0x01, 8),
    (0, 0x08, 8),
    (0, 0x09, 8),
    (0, 0x10, 8),
    (0, 0x11, 8),
    (0, 0x18, 8),
    (0, 0x19, 8),
    (0, 0x20, 8),
    (0, 0x21, 8),
    (0, 0x28, 8),
    (0, 0x29, 8),
    (0, 0x30, 8),
    (0, 0x31, 8),
    // Group 1 but CMP.
    (0, 0x80, 0),
    (0, 0x80, 1),
    (0, 0x80, 2),
    (0, 0x80, 3),
    (0, 0x80, 4),
    (0, 0x80, 5),
    (0, 0x80, 6),
    (0, 0x81, 0),
    (0, 0x81, 1),
    (0, 0x81, 2),
    (0, 0x81, 3),
    (0, 0x81, 4),
    (0, 0x81, 5),
    (0, 0x81, 6),
    (0, 0x82, 0),
    (0, 0x82, 1),
    (0, 0x82, 2),
    (0, 0x82, 3),
    (0, 0x82, 4),
    (0, 0x82, 5),
    (0, 0x82, 6),
    (0, 0x83, 0),
    (0, 0x83, 1),
    (0, 0x83, 2),
    (0, 0x83, 3),
    (0, 0x83, 4),
    (0, 0x83, 5),
    (0, 0x83, 6),
    // XCHG.
    (0, 0x86, 8),
    (0, 0x87, 8),
    // NOT NEG, INC DEC.
    (0, 0xf6, 2),
    (0, 0xf6, 3),
    (0, 0xf7, 2),
    (0, 0xf7, 3),
    (0, 0xfe, 0),
    (0, 0xfe, 1),
    (0, 0xff, 0),
    (0, 0xff, 1),
    // BTS BTR BTC, CMPXCHG, XADD, CMPXCHG8B.
    (1, 0xab, 8),
    (1, 0xb3, 8),
    (1, 0xbb, 8),
    (1, 0xba, 5),
    (1, 0xba, 6),
    (1, 0xba, 7),
    (1, 0xb0, 8),
    (1, 0xb1, 8),
    (1, 0xc0, 8),
    (1, 0xc1, 8),
    (1, 0xc7, 1),
];

fn lockable(map: u8, opcode: u8, modrm: u8) -> bool {
    let field = modrm >> 3 & 7;
    modrm >> 6 != 3
        && LOCKABLE
            .iter()
            .any(|&(m, o, r)| (m, o) == (map, opcode) && (r == 8 || r == field))
}

/// Bytes that are prefixes or escapes and not opcodes.
fn no_opcode(at: At, byte: u8) -> bool {
    let rex = matches!(at, Long(_)) && byte & 0xf0 == 0x40;
    let prefix = [
        0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3,
    ];
    rex || byte == 0x0f || prefix.contains(&byte)
}

/// LOCK before every opcode of both maps, on memory and on a register: #UD unless the table has it.
/// 0F 38 and 0F 3A have no such instruction; there the opcode stands in ModRM's place.
#[test]
fn lock_is_undefined_but_on_the_listed_instructions() {
    for at in [Real, Prot32(0), Long(0)] {
        let mut c = computer(at, &[]);
        let r = &mut c.cpu.state.regs;
        (r[reg::RBX], r[reg::RDI]) = (0x8000, 0x8000);
        let start = c.cpu.state.clone();
        for map in 0..2 {
            for opcode in (0..=255).filter(|&o| map == 1 || !no_opcode(at, o)) {
                for n in 0..16 {
                    let form = if n < 8 { 0x07 } else { 0xc1 };
                    c.cpu.state = start.clone();
                    one_lock(&mut c, at, map, opcode, form | (n & 7) << 3);
                }
            }
        }
    }
}

fn one_lock(c: &mut Computer, at: At, map: u8, opcode: u8, modrm: u8) {
    // 82 is no instruction of 64-bit code.
    let ok = lockable(map, opcode, modrm) && !(at == Long(0) && (map, opcode) == (0, 0x82));
    let mut code = vec![0xf0];
    if map == 1 {
        code.push(0x0f);
    }
    code.extend([opcode, modrm]);
    code.extend([END; 8]);
    c.put(CODE, &code);
    // XCHG and XADD may load the stack pointer with it.
    c.put64(0x8000, 0xa000);
    c.cpu.state_changed();
    assert_eq!(end(c), if ok { Done } else { UD }, "{at:?} {code:02x?}");
}

/// 15 bytes are an instruction, 16 are #GP(0), whatever the prefixes (SDM Vol. 2, 2.3.11; Vol. 3,
/// 6.15, vector 13).
#[test]
fn longest_instruction() {
    let prefixes = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf2, 0xf3];
    // Bodies that every prefix may precede: mov bx, ax or mov ebx, eax; cbw; test al, imm8.
    let bodies: [&[u8]; 3] = [&[0x89, 0xc3], &[0x98], &[0xa8, 0x80]];
    for at in [
        Real,
        V86(3),
        Prot16(0),
        Prot32(0),
        Prot32(3),
        Compat32(0),
        Long(0),
        Long(3),
    ] {
        for prefix in prefixes {
            for body in bodies {
                for (len, want) in [(15, Done), (16, GP0), (20, GP0)] {
                    let mut code = vec![prefix; len - body.len()];
                    code.extend(body);
                    let want = if at == Real { in_real(want) } else { want };
                    assert_eq!(run(at, &code), want, "{at:?} {code:02x?}");
                }
            }
        }
    }
}

/// LOCK does not change the limit of 15, and does not come before it.
#[test]
fn too_long_before_undefined() {
    let mut code = vec![0xf0; 14];
    code.extend([0x89, 0xc3]);
    assert_eq!(run(Prot32(0), &code), GP0);
    let mut code = vec![0xf0; 13];
    code.extend([0x89, 0xc3]);
    assert_eq!(run(Prot32(0), &code), UD);
}

/// Every order of the same prefixes is the same instruction; the last of a group counts.
#[test]
fn order_of_prefixes() {
    // rep movsw with 32-bit addresses from ES, in 16-bit code: the count and pointers are 32 bits wide.
    let set = [0x26, 0xf3, 0x67];
    let orders: [[usize; 3]; 6] = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    for order in orders {
        for twice in [false, true] {
            let mut code: Vec<u8> = order.iter().map(|&i| set[i]).collect();
            if twice {
                code.extend(code.clone());
            }
            code.push(0xa5);
            let mut c = computer(Prot16(0), &code);
            c.put(0x8000, &[1, 2, 3, 4]);
            let r = &mut c.cpu.state.regs;
            (r[reg::RSI], r[reg::RDI], r[reg::RCX]) = (0x8000, 0x1_8000, 2);
            assert_eq!(end(&mut c), Done, "{code:02x?}");
            assert_eq!(c.get64(0x1_8000), 0x0403_0201, "{code:02x?}");
            assert_eq!(
                (c.reg(reg::RDI), c.reg(reg::RCX)),
                (0x1_8004, 0),
                "{code:02x?}"
            );
        }
    }
    // The last of F2 and F3: REPE SCASB goes on while equal, REPNE until equal.
    for (code, left) in [([0xf2, 0xf3, 0xae], 3), ([0xf3, 0xf2, 0xae], 0)] {
        let mut c = computer(Prot32(0), &code);
        c.put(0x8000, &[1, 1, 1, 1]);
        let r = &mut c.cpu.state.regs;
        (r[reg::RDI], r[reg::RCX]) = (0x8000, 4);
        assert_eq!(end(&mut c), Done);
        assert_eq!(c.reg(reg::RCX), left, "{code:02x?}");
    }
    // REX counts only right before the opcode: mov bx, ax with a lost REX.W.
    let mut c = computer(Long(0), &[0x48, 0x66, 0x89, 0xc3]);
    c.cpu.state.regs[reg::RAX] = u64::MAX;
    c.cpu.state.regs[reg::RBX] = 0;
    assert_eq!(end(&mut c), Done);
    assert_eq!(c.reg(reg::RBX), 0xffff);
    // The last segment override: DS (base 0) after FS.
    for (code, want) in [([0x64, 0x3e, 0x8b, 0x07], 1), ([0x3e, 0x64, 0x8b, 0x07], 2)] {
        let mut c = computer(Prot32(0), &code);
        c.put(0x8000, &[1]);
        c.put(0x9000, &[2]);
        c.cpu.state.regs[reg::RDI] = 0x8000;
        c.cpu.state.seg[4].base = 0x1000;
        c.cpu.state_changed();
        assert_eq!(end(&mut c), Done);
        assert_eq!(c.reg(reg::RAX) & 0xff, want, "{code:02x?}");
    }
}
