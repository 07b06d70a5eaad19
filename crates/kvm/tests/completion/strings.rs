//! MOVS, STOS, LODS, SCAS, CMPS between RAM and devices.

use crate::cases::{A, RAX, RCX, RDI, RFLAGS, RSI, case};
use crate::check::all;
use crate::machine::{BEHIND_M, DATA, GM, GN, GO, M, N};

const DF: u64 = 1 << 10;
const ZF_PF: u64 = 0x44;

#[test]
fn movs() {
    let v = [1, 2, 3, 4, 5, 6, 7, 8];
    all([
        case("movsb from a device", |a| a.movsb())
            .with(RSI, M)
            .with(RDI, DATA)
            .read(GM, &[9])
            .stores(DATA, &[9])
            .gives(RSI, M + 1)
            .gives(RDI, DATA + 1),
        case("movsw to a device", |a| a.movsw())
            .with(RSI, DATA)
            .with(RDI, M)
            .ram(DATA, &[1, 2])
            .write(GM, &[1, 2])
            .gives(RSI, DATA + 2)
            .gives(RDI, M + 2),
        case("movsd from device to device", |a| a.movsd())
            .with(RSI, M + 4)
            .with(RDI, N + 8)
            .read(GM + 4, &v[..4])
            .write(GN + 8, &v[..4])
            .gives(RSI, M + 8)
            .gives(RDI, N + 12),
        case("movsq from two devices to two", |a| a.movsq())
            .with(RSI, N + 0xffc)
            .with(RDI, N + 0xffa)
            .read(GN + 0xffc, &v[..4])
            .read(GO, &v[4..])
            .write(GN + 0xffa, &v[..6])
            .write(GO, &v[6..])
            .gives(RSI, N + 0x1004)
            .gives(RDI, N + 0x1002),
        case("rep movsb from a device", |a| a.rep().movsb())
            .with(RSI, M)
            .with(RDI, DATA)
            .with(RCX, 3)
            .read(GM, &[7])
            .read(GM + 1, &[8])
            .read(GM + 2, &[9])
            .stores(DATA, &[7, 8, 9])
            .gives(RSI, M + 3)
            .gives(RDI, DATA + 3)
            .gives(RCX, 0),
        case("rep movsd to a device", |a| a.rep().movsd())
            .with(RSI, DATA)
            .with(RDI, M)
            .with(RCX, 2)
            .ram(DATA, &v)
            .write(GM, &v[..4])
            .write(GM + 4, &v[4..])
            .gives(RSI, DATA + 8)
            .gives(RDI, M + 8)
            .gives(RCX, 0),
        case("rep movsw from device to device, down", |a| a.rep().movsw())
            .with(RFLAGS, 2 | DF)
            .with(RSI, M + 2)
            .with(RDI, N + 2)
            .with(RCX, 2)
            .read(GM + 2, &[3, 4])
            .write(GN + 2, &[3, 4])
            .read(GM, &[1, 2])
            .write(GN, &[1, 2])
            .gives(RSI, M - 2)
            .gives(RDI, N - 2)
            .gives(RCX, 0),
        // Out of the device into RAM on the way.
        case("rep movsb out of a device", |a| a.rep().movsb())
            .with(RSI, M + 0xffe)
            .with(RDI, DATA)
            .with(RCX, 5)
            .ram(BEHIND_M, &[3, 4, 5])
            .read(GM + 0xffe, &[1])
            .read(GM + 0xfff, &[2])
            .stores(DATA, &[1, 2, 3, 4, 5])
            .gives(RSI, M + 0x1003)
            .gives(RDI, DATA + 5)
            .gives(RCX, 0),
        case("rep movs of nothing", |a| a.rep().movsb())
            .with(RSI, M)
            .with(RDI, N)
            .with(RCX, 0),
    ]);
}

#[test]
fn the_others() {
    let a8 = A.to_le_bytes();
    all([
        case("stosb", |a| a.stosb())
            .with(RDI, M)
            .write(GM, &a8[..1])
            .gives(RDI, M + 1),
        case("stosq", |a| a.stosq())
            .with(RDI, M)
            .write(GM, &a8)
            .gives(RDI, M + 8),
        case("rep stosw", |a| a.rep().stosw())
            .with(RDI, M)
            .with(RCX, 2)
            .write(GM, &a8[..2])
            .write(GM + 2, &a8[..2])
            .gives(RDI, M + 4)
            .gives(RCX, 0),
        case("rep stosb from RAM into a device", |a| a.rep().stosb())
            .with(RDI, N - 2)
            .with(RCX, 3)
            .stores(BEHIND_M + 0xffe, &[0x88, 0x88])
            .write(GN, &[0x88])
            .gives(RDI, N + 1)
            .gives(RCX, 0),
        case("lodsb", |a| a.lodsb())
            .with(RSI, M)
            .read(GM, &[5])
            .gives(RAX, A & !0xff | 5)
            .gives(RSI, M + 1),
        case("rep lodsd", |a| a.rep().lodsd())
            .with(RSI, M)
            .with(RCX, 2)
            .read(GM, &[5; 4])
            .read(GM + 4, &[6; 4])
            .gives(RAX, 0x0606_0606)
            .gives(RSI, M + 8)
            .gives(RCX, 0),
        case("scasb", |a| a.scasb())
            .with(RDI, M)
            .read(GM, &[0x88])
            .gives(RFLAGS, 2 | ZF_PF)
            .gives(RDI, M + 1),
        case("repne scasb", |a| a.repne().scasb())
            .with(RDI, M)
            .with(RCX, 9)
            .read(GM, &[0x08])
            .read(GM + 1, &[0x88])
            .gives(RFLAGS, 2 | ZF_PF)
            .gives(RDI, M + 2)
            .gives(RCX, 7),
        case("cmpsw of RAM and a device", |a| a.cmpsw())
            .with(RSI, DATA)
            .with(RDI, M)
            .ram(DATA, &[1, 2])
            .read(GM, &[1, 2])
            .gives(RFLAGS, 2 | ZF_PF)
            .gives(RSI, DATA + 2)
            .gives(RDI, M + 2),
        case("repe cmpsb of two devices", |a| a.repe().cmpsb())
            .with(RSI, M)
            .with(RDI, N)
            .with(RCX, 2)
            .read(GM, &[1])
            .read(GN, &[1])
            .read(GM + 1, &[2])
            .read(GN + 1, &[2])
            .gives(RFLAGS, 2 | ZF_PF)
            .gives(RSI, M + 2)
            .gives(RDI, N + 2)
            .gives(RCX, 0),
    ]);
}
