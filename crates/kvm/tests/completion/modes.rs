//! Segments, 32- and 16-bit code, and no paging.

use iced_x86::code_asm::*;

use crate::cases::{A, Bits, RAX, RBX, RCX, RDI, RIP, RSI, RSP, case_from, case_of};
use crate::check::all;
use crate::machine::{CODE, DATA, GM, TARGET};

const V: [u8; 4] = [0x81, 0x82, 0x83, 0x84];

#[test]
fn protected_mode_without_paging() {
    let a4 = (A as u32).to_le_bytes();
    let c = |name: &str, build: fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>| {
        case_of(Bits::Protected, name, build)
    };
    all([
        c("mov eax, m", |a| a.mov(eax, dword_ptr(ebx)))
            .with(RBX, GM)
            .read(GM, &V)
            .gives(RAX, 0x8483_8281),
        c("mov m, eax", |a| a.mov(dword_ptr(ebx), eax))
            .with(RBX, GM)
            .write(GM, &a4),
        // FS begins a page before.
        c("mov fs:m, eax", |a| a.mov(dword_ptr(0x1010).fs(), eax)).write(GM + 0x10, &a4),
        c("add fs:m, 1", |a| a.add(dword_ptr(0x1010).fs(), 1))
            .read(GM + 0x10, &[0; 4])
            .write(GM + 0x10, &[1, 0, 0, 0]),
        // The end of RAM.
        c("mov m, eax at the end of RAM", |a| {
            a.mov(dword_ptr(ebx), eax)
        })
        .with(RBX, 0x1_fffe)
        .stores(0x1_fffe, &a4[..2])
        .write(0x2_0000, &a4[2..]),
        c("mov eax, m at the end of RAM", |a| {
            a.mov(eax, dword_ptr(ebx))
        })
        .with(RBX, 0x1_fffe)
        .ram(0x1_fffe, &V[..2])
        .read(0x2_0000, &V[2..])
        .gives(RAX, 0x8483_8281),
        // Addresses wrap at 4 GiB.
        c("mov eax, m around 4 GiB", |a| a.mov(ax, word_ptr(ebx)))
            .with(RBX, 0xffff_ffff)
            .read(0xffff_ffff, &[5])
            .gives(RAX, 0x5566_0005),
        c("rep insb", |a| a.rep().insb())
            .with(RDI, DATA)
            .with(RCX, 3)
            .input(1, &[1, 2, 3])
            .stores(DATA, &[1, 2, 3])
            .gives(RDI, DATA + 3)
            .gives(RCX, 0),
        c("call", |a| a.call(TARGET))
            .with(RSP, GM + 0x100)
            .write(GM + 0xfc, &(CODE as u32 + 5).to_le_bytes())
            .gives(RSP, GM + 0xfc)
            .gives(RIP, TARGET),
        // A far pointer: the offset, then the selector; then the descriptor, which is in RAM.
        case_from(Bits::Protected, "les ecx, m", &[0xc4, 0x0b])
            .with(RBX, GM)
            .read(GM, &V)
            .read(GM + 4, &[16, 0])
            .gives(RCX, 0x8483_8281),
        case_from(Bits::Protected, "jmp far m", &[0xff, 0x2b])
            .with(RBX, GM)
            .read(GM, &(TARGET as u32).to_le_bytes())
            .read(GM + 4, &[24, 0])
            .gives(RIP, TARGET),
        // CS and the offset are pushed.
        case_from(Bits::Protected, "call far m onto a device", &[0xff, 0x1b])
            .with(RBX, GM)
            .with(RSP, GM + 0x100)
            .read(GM, &(TARGET as u32).to_le_bytes())
            .read(GM + 4, &[24, 0])
            .write(GM + 0xfc, &[24, 0, 0, 0])
            .write(GM + 0xf8, &(CODE as u32 + 2).to_le_bytes())
            .gives(RSP, GM + 0xf8)
            .gives(RIP, TARGET),
        case_from(Bits::Protected, "iretd", &[0xcf])
            .with(RSP, GM)
            .read(GM, &(TARGET as u32).to_le_bytes())
            .read(GM + 4, &[24, 0, 0, 0])
            .read(GM + 8, &[0x46, 0, 0, 0])
            .gives(RSP, GM + 12)
            .gives(17, 0x46)
            .gives(RIP, TARGET),
        c("bound", |a| a.bound(eax, dword_ptr(ebx)))
            .with(RBX, GM)
            .with(RAX, 5)
            .read(GM, &[1, 0, 0, 0])
            .read(GM + 4, &[9, 0, 0, 0]),
    ]);
}

/// DS begins at A0000h, where there is no RAM; SS near its end.
#[test]
fn real_mode() {
    const VGA: u64 = 0xa_0000;
    let a4 = (A as u32).to_le_bytes();
    let c = |name: &str, build: fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>| {
        case_of(Bits::Real, name, build)
    };
    all([
        c("mov al, [bx]", |a| a.mov(al, byte_ptr(bx)))
            .with(RBX, 5)
            .read(VGA + 5, &[9])
            .gives(RAX, 0x5566_7709),
        c("mov [bx], ax", |a| a.mov(word_ptr(bx), ax))
            .with(RBX, 5)
            .write(VGA + 5, &a4[..2]),
        c("mov [bx], eax", |a| a.mov(dword_ptr(bx), eax))
            .with(RBX, 5)
            .write(VGA + 5, &a4),
        c("or [bx], al", |a| a.or(byte_ptr(bx), al))
            .with(RBX, 5)
            .read(VGA + 5, &[1])
            .write(VGA + 5, &[0x89])
            .gives(17, 0x82),
        c("movsb with es in RAM", |a| a.movsb())
            .with(RSI, 3)
            .with(RDI, DATA)
            .read(VGA + 3, &[7])
            .stores(DATA, &[7])
            .gives(RSI, 4)
            .gives(RDI, DATA + 1),
        c("rep lodsb", |a| a.rep().lodsb())
            .with(RSI, 0xffff)
            .with(RCX, 2)
            .read(VGA + 0xffff, &[7])
            .read(VGA, &[8])
            .gives(RAX, 0x5566_7708)
            .gives(RSI, 1)
            .gives(RCX, 0),
        // The stack's last word is in RAM, the one above is not.
        c("push ax at the end of RAM", |a| a.push(ax))
            .with(RSP, 0xf001)
            .stores(0x1_ffff, &a4[..1])
            .write(0x2_0000, &a4[1..2])
            .gives(RSP, 0xefff),
        c("pop ax", |a| a.pop(ax))
            .with(RSP, 0xf000)
            .read(0x2_0000, &[1, 2])
            .gives(RAX, 0x5566_0201)
            .gives(RSP, 0xf002),
        c("lds cx, [bx]", |a| a.lds(cx, dword_ptr(bx)))
            .with(RBX, 8)
            .read(VGA + 8, &[1, 2])
            .read(VGA + 10, &[0, 0xa0])
            .gives(RCX, 0x0201),
        case_from(Bits::Real, "call far [bx] onto a device", &[0xff, 0x1f])
            .with(RBX, 8)
            .with(RSP, 0xf100)
            .read(VGA + 8, &(TARGET as u16).to_le_bytes())
            .read(VGA + 10, &[0, 0])
            .write(0x2_00fe, &[0, 0])
            .write(0x2_00fc, &(CODE as u16 + 2).to_le_bytes())
            .gives(RSP, 0xf0fc)
            .gives(RIP, TARGET),
        c("in al, dx", |a| a.in_(al, dx))
            .input(1, &[9])
            .gives(RAX, 0x5566_7709),
        c("rep outsb from a device", |a| a.rep().outsb())
            .with(RCX, 1)
            .with(RSI, 4)
            .read(VGA + 4, &[9])
            .output(1, &[9])
            .gives(RSI, 5)
            .gives(RCX, 0),
        // INT n: the vector from RAM, the frame to a device.
        c("int through a device's stack", |a| a.int(0x21))
            .with(RSP, 0xf100)
            .write(0x2_00fe, &[2, 0])
            .write(0x2_00fc, &[0, 0])
            .write(0x2_00fa, &(CODE as u16 + 2).to_le_bytes())
            .gives(RSP, 0xf0fa)
            .gives(RIP, TARGET),
    ]
    .map(|c| {
        if c.name.starts_with("int") {
            c.ram(0x21 * 4, &[0, 0xa0, 0, 0])
        } else {
            c
        }
    }));
}
