//! Loads, stores and read-modify-writes of device memory, aligned and not, within a page and across.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::cases::{A, Case, RAX, RBX, RCX, RDX, RFLAGS, case};
use crate::check::all;
use crate::machine::{BEFORE_M, BEHIND_M, BEHIND_R, GM, GN, GO, GR, M, N, R};

const V: [u8; 8] = [0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88];
const WORD: u64 = u64::from_le_bytes(V);
const CF: u64 = 1;
const PF: u64 = 4;
const AF: u64 = 0x10;
const ZF: u64 = 0x40;
const SF: u64 = 0x80;
const OF: u64 = 0x800;

/// With RBX at `M + 0x10`.
fn at_m(name: &str, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Case {
    case(name, build).with(RBX, M + 0x10)
}

/// RFLAGS at the end.
fn flags(c: Case, set: u64) -> Case {
    c.gives(RFLAGS, 2 | set)
}

#[test]
fn loads() {
    let g = GM + 0x10;
    all([
        at_m("mov al, m", |a| a.mov(al, byte_ptr(rbx)))
            .read(g, &V[..1])
            .gives(RAX, A & !0xff | 0x81),
        at_m("mov ah, m", |a| a.mov(ah, byte_ptr(rbx)))
            .read(g, &V[..1])
            .gives(RAX, A & !0xff00 | 0x8100),
        at_m("mov ax, m", |a| a.mov(ax, word_ptr(rbx)))
            .read(g, &V[..2])
            .gives(RAX, A & !0xffff | 0x8281),
        at_m("mov eax, m", |a| a.mov(eax, dword_ptr(rbx)))
            .read(g, &V[..4])
            .gives(RAX, 0x8483_8281),
        at_m("mov rax, m", |a| a.mov(rax, qword_ptr(rbx)))
            .read(g, &V)
            .gives(RAX, WORD),
        // The destination is the address.
        at_m("mov rbx, m", |a| a.mov(rbx, qword_ptr(rbx)))
            .read(g, &V)
            .gives(RBX, WORD),
        at_m("mov rax, m with an index", |a| {
            a.mov(rax, qword_ptr(rbx + rcx * 4 + 8))
        })
        .with(RCX, 2)
        .read(g + 16, &V)
        .gives(RAX, WORD),
        case("mov al, moffs", |a| a.mov(al, byte_ptr(M)))
            .read(GM, &V[..1])
            .gives(RAX, A & !0xff | 0x81),
        at_m("movzx eax, m8", |a| a.movzx(eax, byte_ptr(rbx)))
            .read(g, &V[..1])
            .gives(RAX, 0x81),
        at_m("movzx eax, m16", |a| a.movzx(eax, word_ptr(rbx)))
            .read(g, &V[..2])
            .gives(RAX, 0x8281),
        at_m("movsx rax, m8", |a| a.movsx(rax, byte_ptr(rbx)))
            .read(g, &V[..1])
            .gives(RAX, !0x7e),
        at_m("movsxd rax, m32", |a| a.movsxd(rax, dword_ptr(rbx)))
            .read(g, &V[..4])
            .gives(RAX, 0xffff_ffff_8483_8281),
        at_m("movbe eax, m", |a| a.movbe(eax, dword_ptr(rbx)))
            .read(g, &V[..4])
            .gives(RAX, 0x8182_8384),
        case("xlatb", |a| a.xlatb())
            .with(RBX, M)
            .read(GM + 0x88, &[7])
            .gives(RAX, A & !0xff | 7),
        at_m("cmov that is not taken", |a| a.cmovc(rax, qword_ptr(rbx))).read(g, &V),
        flags(
            at_m("cmp m, imm", |a| a.cmp(byte_ptr(rbx), 0x81)).read(g, &V[..1]),
            ZF | PF,
        ),
        flags(
            at_m("test m, reg", |a| a.test(byte_ptr(rbx), al)).read(g, &[0x77]),
            ZF | PF,
        ),
        flags(
            at_m("bt m, imm", |a| a.bt(dword_ptr(rbx), 7)).read(g, &V[..4]),
            CF,
        ),
        flags(
            at_m("add eax, m", |a| a.add(eax, dword_ptr(rbx))).read(g, &[1, 0, 0, 0]),
            0,
        )
        .gives(RAX, 0x5566_7789),
        at_m("imul", |a| a.imul_3(eax, dword_ptr(rbx), 2))
            .read(g, &[1, 0, 0, 0])
            .gives(RAX, 2),
        at_m("lea, prefetch, clflush: no access", |a| {
            a.lea(rax, qword_ptr(rbx))?;
            a.prefetcht0(byte_ptr(rbx))
        })
        .gives(RAX, M + 0x10),
    ]);
}

#[test]
fn stores() {
    let g = GM + 0x10;
    let a8 = A.to_le_bytes();
    all([
        at_m("mov m, al", |a| a.mov(byte_ptr(rbx), al)).write(g, &a8[..1]),
        at_m("mov m, ax", |a| a.mov(word_ptr(rbx), ax)).write(g, &a8[..2]),
        at_m("mov m, eax", |a| a.mov(dword_ptr(rbx), eax)).write(g, &a8[..4]),
        at_m("mov m, rax", |a| a.mov(qword_ptr(rbx), rax)).write(g, &a8),
        at_m("mov m, imm8", |a| a.mov(byte_ptr(rbx), 0x42)).write(g, &[0x42]),
        at_m("mov m, imm32", |a| a.mov(qword_ptr(rbx), -2)).write(g, &(-2i64).to_le_bytes()),
        at_m("movnti", |a| a.movnti(qword_ptr(rbx), rax)).write(g, &a8),
        at_m("movbe m, ax", |a| a.movbe(word_ptr(rbx), ax)).write(g, &[0x77, 0x88]),
        case("mov moffs, eax", |a| a.mov(dword_ptr(M), eax)).write(GM, &a8[..4]),
        at_m("setc m", |a| a.setc(byte_ptr(rbx))).write(g, &[0]),
        at_m("mov m, ds", |a| a.mov(word_ptr(rbx), ds)).write(g, &[16, 0]),
        // A read-only slot is read as RAM.
        case("mov rax, rom", |a| a.mov(rax, qword_ptr(rbx)))
            .with(RBX, R)
            .rom(&V)
            .gives(RAX, WORD),
        case("mov rom, rax", |a| a.mov(qword_ptr(rbx), rax))
            .with(RBX, R)
            .rom(&V)
            .write(GR, &a8),
        flags(
            case("add rom, eax", |a| a.add(dword_ptr(rbx), eax))
                .with(RBX, R)
                .rom(&V),
            PF | SF,
        )
        .write(GR, &0xd9e9_fa09u32.to_le_bytes()),
    ]);
}

#[test]
fn read_modify_writes() {
    let g = GM + 0x10;
    let rmw = |name: &str,
               build: fn(&mut CodeAssembler) -> Result<(), IcedError>,
               old: &[u8],
               new: &[u8],
               f: u64| { flags(at_m(name, build).read(g, old).write(g, new), f) };
    all([
        rmw(
            "add m8, al",
            |a| a.add(byte_ptr(rbx), al),
            &[1],
            &[0x89],
            SF,
        ),
        rmw(
            "or m16, ax",
            |a| a.or(word_ptr(rbx), ax),
            &[1, 0],
            &[0x89, 0x77],
            0,
        ),
        rmw(
            "adc m32, imm",
            |a| a.adc(dword_ptr(rbx), 1),
            &[0xff; 4],
            &[0; 4],
            CF | PF | AF | ZF,
        ),
        rmw(
            "sbb m64, imm",
            |a| a.sbb(qword_ptr(rbx), 1),
            &[0; 8],
            &[0xff; 8],
            CF | PF | AF | SF,
        ),
        rmw(
            "and m64, rax",
            |a| a.and(qword_ptr(rbx), rax),
            &[0xff; 8],
            &A.to_le_bytes(),
            PF,
        ),
        rmw(
            "sub m8, imm",
            |a| a.sub(byte_ptr(rbx), 1),
            &[0x80],
            &[0x7f],
            AF | OF,
        ),
        rmw(
            "xor m8, imm",
            |a| a.xor(byte_ptr(rbx), 0xf),
            &[0xff],
            &[0xf0],
            PF | SF,
        ),
        rmw(
            "inc m16",
            |a| a.inc(word_ptr(rbx)),
            &[0xff, 0x7f],
            &[0, 0x80],
            PF | AF | SF | OF,
        ),
        rmw(
            "dec m32",
            |a| a.dec(dword_ptr(rbx)),
            &[1, 0, 0, 0],
            &[0; 4],
            PF | ZF,
        ),
        rmw(
            "neg m8",
            |a| a.neg(byte_ptr(rbx)),
            &[1],
            &[0xff],
            CF | PF | AF | SF,
        ),
        rmw("not m64", |a| a.not(qword_ptr(rbx)), &[0; 8], &[0xff; 8], 0),
        rmw(
            "rol m8, 1",
            |a| a.rol(byte_ptr(rbx), 1),
            &[0x41],
            &[0x82],
            OF,
        ),
        rmw(
            "lock add m32, eax",
            |a| a.lock().add(dword_ptr(rbx), eax),
            &[0; 4],
            &[0x88, 0x77, 0x66, 0x55],
            PF,
        ),
        rmw(
            "lock inc m64",
            |a| a.lock().inc(qword_ptr(rbx)),
            &[0; 8],
            &[1, 0, 0, 0, 0, 0, 0, 0],
            0,
        ),
        rmw(
            "bts m32, imm",
            |a| a.bts(dword_ptr(rbx), 8),
            &[0; 4],
            &[0, 1, 0, 0],
            0,
        ),
        rmw(
            "lock btr m32, imm",
            |a| a.lock().btr(dword_ptr(rbx), 0),
            &[1, 0, 0, 0],
            &[0; 4],
            CF,
        ),
        // A bit offset in a register reaches beyond the operand.
        at_m("bts m32, eax", |a| a.bts(dword_ptr(rbx), eax))
            .with(RAX, 67)
            .read(g + 8, &[0; 4])
            .write(g + 8, &[8, 0, 0, 0]),
        at_m("xchg m8, al", |a| a.xchg(byte_ptr(rbx), al))
            .read(g, &[9])
            .write(g, &[0x88])
            .gives(RAX, A & !0xff | 9),
        at_m("xchg m64, rax", |a| a.xchg(qword_ptr(rbx), rax))
            .read(g, &V)
            .write(g, &A.to_le_bytes())
            .gives(RAX, WORD),
        flags(
            at_m("lock xadd m32, eax", |a| a.lock().xadd(dword_ptr(rbx), eax)),
            0,
        )
        .read(g, &[1, 0, 0, 0])
        .write(g, &[0x89, 0x77, 0x66, 0x55])
        .gives(RAX, 1),
    ]);
}

#[test]
fn compare_and_exchange() {
    let g = GM + 0x10;
    let old16: [u8; 16] = std::array::from_fn(|i| i as u8 + 1);
    let low = u64::from_le_bytes(old16[..8].try_into().unwrap());
    let high = u64::from_le_bytes(old16[8..].try_into().unwrap());
    let new16: Vec<u8> = [5u64, 6].iter().flat_map(|w| w.to_le_bytes()).collect();
    all([
        flags(
            at_m("cmpxchg that stores", |a| {
                a.lock().cmpxchg(dword_ptr(rbx), ecx)
            }),
            ZF | PF,
        )
        .with(RAX, 0x8483_8281)
        .with(RCX, 0x0102_0304)
        .read(g, &V[..4])
        .write(g, &[4, 3, 2, 1]),
        // The old value is written back.
        flags(
            at_m("cmpxchg that does not", |a| a.cmpxchg(dword_ptr(rbx), ecx)),
            0,
        )
        .with(RAX, 3)
        .read(g, &[1, 0, 0, 0])
        .write(g, &[1, 0, 0, 0])
        .gives(RAX, 1),
        flags(
            case("cmpxchg8b that stores", |a| {
                a.lock().cmpxchg8b(qword_ptr(rcx + M))
            }),
            ZF,
        )
        .with(RAX, WORD & 0xffff_ffff)
        .with(RDX, WORD >> 32)
        .with(RBX, 7)
        .with(RCX, 8)
        .read(GM + 8, &V)
        .write(GM + 8, &[7, 0, 0, 0, 8, 0, 0, 0]),
        case("cmpxchg8b that does not", |a| {
            a.cmpxchg8b(qword_ptr(rcx + M))
        })
        .with(RAX, 1)
        .with(RDX, 2)
        .with(RCX, 8)
        .read(GM + 8, &V)
        .write(GM + 8, &V)
        .gives(RAX, WORD & 0xffff_ffff)
        .gives(RDX, WORD >> 32),
        flags(
            case("cmpxchg16b that stores", |a| {
                a.lock().cmpxchg16b(xmmword_ptr(rsi + M))
            }),
            ZF,
        )
        .with(4, 0x20)
        .with(RAX, low)
        .with(RDX, high)
        .with(RBX, 5)
        .with(RCX, 6)
        .read(GM + 0x20, &old16[..8])
        .read(GM + 0x28, &old16[8..])
        .write(GM + 0x20, &new16[..8])
        .write(GM + 0x28, &new16[8..]),
        case("cmpxchg16b that does not", |a| {
            a.cmpxchg16b(xmmword_ptr(rsi + M))
        })
        .with(4, 0x20)
        .with(RAX, 1)
        .with(RDX, 2)
        .read(GM + 0x20, &old16[..8])
        .read(GM + 0x28, &old16[8..])
        .write(GM + 0x20, &old16[..8])
        .write(GM + 0x28, &old16[8..])
        .gives(RAX, low)
        .gives(RDX, high),
    ]);
}

/// A misaligned access within a page is one exit; one that crosses is split at the page, and only the pieces in
/// device memory are exits.
#[test]
fn misaligned_and_crossing() {
    let a8 = A.to_le_bytes();
    let load = |name: &str, at| {
        case(name, |a| a.mov(rax, qword_ptr(rbx)))
            .with(RBX, at)
            .gives(RAX, WORD)
    };
    let store = |name: &str, at| case(name, |a| a.mov(qword_ptr(rbx), rax)).with(RBX, at);
    all([
        load("a load at 3", M + 3).read(GM + 3, &V),
        store("a store at 3", M + 3).write(GM + 3, &a8),
        load("a load of RAM, then a device", M - 3)
            .ram(BEFORE_M + 0xffd, &V[..3])
            .read(GM, &V[3..]),
        store("a store to RAM, then a device", M - 3)
            .stores(BEFORE_M + 0xffd, &a8[..3])
            .write(GM, &a8[3..]),
        load("a load of a device, then RAM", M + 0xffb)
            .ram(BEHIND_M, &V[5..])
            .read(GM + 0xffb, &V[..5]),
        store("a store to a device, then RAM", M + 0xffb)
            .stores(BEHIND_M, &a8[5..])
            .write(GM + 0xffb, &a8[..5]),
        load("a load of two devices", N + 0xffe)
            .read(GN + 0xffe, &V[..2])
            .read(GO, &V[2..]),
        store("a store to two devices", N + 0xffe)
            .write(GN + 0xffe, &a8[..2])
            .write(GO, &a8[2..]),
        flags(
            case("add to two devices", |a| a.add(dword_ptr(rbx), 1)),
            PF | AF,
        )
        .with(RBX, N + 0xffe)
        .read(GN + 0xffe, &[0xff, 0])
        .read(GO, &[0, 0])
        .write(GN + 0xffe, &[0, 1])
        .write(GO, &[0, 0]),
        case("xchg with RAM and a device", |a| {
            a.xchg(dword_ptr(rbx), eax)
        })
        .with(RBX, M - 2)
        .ram(BEFORE_M + 0xffe, &V[..2])
        .read(GM, &V[2..4])
        .stores(BEFORE_M + 0xffe, &a8[..2])
        .write(GM, &a8[2..4])
        .gives(RAX, 0x8483_8281),
        case("a store to a read-only slot, then RAM", |a| {
            a.mov(dword_ptr(rbx), eax)
        })
        .with(RBX, R + 0xffe)
        .write(GR + 0xffe, &a8[..2])
        .stores(BEHIND_R, &a8[2..4]),
        load("a load of a device, then a read-only slot", R - 4)
            .read(GO + 0xffc, &V[..4])
            .rom(&V[4..]),
        case("mov ax of two devices", |a| a.mov(ax, word_ptr(rbx)))
            .with(RBX, N + 0xfff)
            .read(GN + 0xfff, &[1])
            .read(GO, &[2])
            .gives(RAX, A & !0xffff | 0x0201),
    ]);
}
