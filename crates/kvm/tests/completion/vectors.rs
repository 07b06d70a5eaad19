//! SSE, AVX and x87 operands in device memory: pieces of eight bytes, upwards.

use anykvm::TranslationMode;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::cases::{Bits, Case, RBX, RIP, case, case_from};
use crate::check::all;
use crate::machine::{BEFORE_M, Event, GM, GN, GO, M, Machine, N};

/// Where the XSAVE area has XMM0, and the upper half of YMM0.
const XMM0: usize = 160;
const YMM0H: usize = 576;

fn xmm(n: u8) -> Vec<u8> {
    (0..4)
        .flat_map(|i| (0x1000_0000 + u32::from(n) * 4 + i).to_le_bytes())
        .collect()
}
fn high(n: u8) -> Vec<u8> {
    (0..4)
        .flat_map(|i| (0x2000_0000 + u32::from(n) * 4 + i).to_le_bytes())
        .collect()
}

fn at_m(name: &str, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Case {
    case(name, build).with(RBX, M + 0x40)
}

const G: u64 = GM + 0x40;

fn bytes<const N: usize>() -> [u8; N] {
    std::array::from_fn(|i| 0x40 + i as u8)
}

fn writes(c: Case, at: u64, data: &[u8]) -> Case {
    (0..)
        .zip(data.chunks(8))
        .fold(c, |c, (i, piece)| c.write(at + i * 8, piece))
}
fn reads(c: Case, at: u64, data: &[u8]) -> Case {
    (0..)
        .zip(data.chunks(8))
        .fold(c, |c, (i, piece)| c.read(at + i * 8, piece))
}

#[test]
fn stores() {
    let both = [xmm(0), high(0)].concat();
    all([
        writes(
            at_m("movups m, xmm0", |a| a.movups(xmmword_ptr(rbx), xmm0)),
            G,
            &xmm(0),
        ),
        writes(
            at_m("movaps m, xmm1", |a| a.movaps(xmmword_ptr(rbx), xmm1)),
            G,
            &xmm(1),
        ),
        writes(
            at_m("movdqa m, xmm1", |a| a.movdqa(xmmword_ptr(rbx), xmm1)),
            G,
            &xmm(1),
        ),
        writes(
            at_m("movntdq m, xmm0", |a| a.movntdq(xmmword_ptr(rbx), xmm0)),
            G,
            &xmm(0),
        ),
        writes(
            at_m("movq m, xmm0", |a| a.movq(qword_ptr(rbx), xmm0)),
            G,
            &xmm(0)[..8],
        ),
        writes(
            at_m("movss m, xmm0", |a| a.movss(dword_ptr(rbx), xmm0)),
            G,
            &xmm(0)[..4],
        ),
        writes(
            at_m("movhps m, xmm0", |a| a.movhps(qword_ptr(rbx), xmm0)),
            G,
            &xmm(0)[8..],
        ),
        writes(
            at_m("pextrb m", |a| a.pextrb(byte_ptr(rbx), xmm0, 4)),
            G,
            &xmm(0)[4..5],
        ),
        writes(
            at_m("vmovdqu m, xmm0", |a| a.vmovdqu(xmmword_ptr(rbx), xmm0)),
            G,
            &xmm(0),
        ),
        writes(
            at_m("vmovdqu m, ymm0", |a| a.vmovdqu(ymmword_ptr(rbx), ymm0)),
            G,
            &both,
        ),
        writes(
            at_m("vmovaps m, ymm0", |a| a.vmovaps(ymmword_ptr(rbx), ymm0)),
            G,
            &both,
        ),
        writes(
            at_m("vextractf128 m", |a| {
                a.vextractf128(xmmword_ptr(rbx), ymm0, 1)
            }),
            G,
            &high(0),
        ),
        writes(
            at_m("stmxcsr", |a| a.stmxcsr(dword_ptr(rbx))),
            G,
            &0x1f80u32.to_le_bytes(),
        ),
        writes(
            at_m("fnstcw", |a| a.fnstcw(word_ptr(rbx))),
            G,
            &0x37fu16.to_le_bytes(),
        ),
        // Each page's part in its own pieces.
        case("movups into two devices", |a| {
            a.movups(xmmword_ptr(rbx), xmm0)
        })
        .with(RBX, N + 0xff5)
        .write(GN + 0xff5, &xmm(0)[..8])
        .write(GN + 0xffd, &xmm(0)[8..11])
        .write(GO, &xmm(0)[11..]),
        writes(
            case("vmovups into RAM and a device", |a| {
                a.vmovups(ymmword_ptr(rbx), ymm0)
            })
            .with(RBX, M - 20)
            .stores(BEFORE_M + 0xfec, &both[..20]),
            GM,
            &both[20..],
        ),
    ]);
}

#[test]
fn loads() {
    let v32 = bytes::<32>();
    let v16 = bytes::<16>();
    all([
        reads(
            at_m("movups xmm0, m", |a| a.movups(xmm0, xmmword_ptr(rbx))),
            G,
            &v16,
        )
        .vector(XMM0, &v16),
        reads(
            at_m("movdqa xmm0, m", |a| a.movdqa(xmm0, xmmword_ptr(rbx))),
            G,
            &v16,
        )
        .vector(XMM0, &v16),
        reads(
            at_m("movntdqa xmm0, m", |a| a.movntdqa(xmm0, xmmword_ptr(rbx))),
            G,
            &v16,
        )
        .vector(XMM0, &v16),
        reads(
            at_m("movlps xmm0, m", |a| a.movlps(xmm0, qword_ptr(rbx))),
            G,
            &v16[..8],
        )
        .vector(XMM0, &v16[..8]),
        reads(
            at_m("movd xmm0, m", |a| a.movd(xmm0, dword_ptr(rbx))),
            G,
            &v16[..4],
        )
        .vector(XMM0, &v16[..4])
        .vector(XMM0 + 4, &[0; 12]),
        reads(
            at_m("vmovdqu ymm0, m", |a| a.vmovdqu(ymm0, ymmword_ptr(rbx))),
            G,
            &v32,
        )
        .vector(XMM0, &v32[..16])
        .vector(YMM0H, &v32[16..]),
        reads(
            at_m("vbroadcastss ymm0, m", |a| {
                a.vbroadcastss(ymm0, dword_ptr(rbx))
            }),
            G,
            &[7; 4],
        )
        .vector(XMM0, &[7; 16])
        .vector(YMM0H, &[7; 16]),
        // Done natively, the operand staged.
        reads(
            at_m("pxor xmm0, m", |a| a.pxor(xmm0, xmmword_ptr(rbx))),
            G,
            &xmm(0),
        )
        .vector(XMM0, &[0; 16]),
        reads(
            at_m("vpxor ymm0, ymm0, m", |a| {
                a.vpxor(ymm0, ymm0, ymmword_ptr(rbx))
            }),
            G,
            &[xmm(0), high(0)].concat(),
        )
        .vector(XMM0, &[0; 16])
        .vector(YMM0H, &[0; 16]),
        reads(
            at_m("ldmxcsr", |a| a.ldmxcsr(dword_ptr(rbx))),
            G,
            &0x1fa0u32.to_le_bytes(),
        )
        .vector(24, &[0xa0]),
        reads(
            at_m("fldcw", |a| a.fldcw(word_ptr(rbx))),
            G,
            &0x27fu16.to_le_bytes(),
        )
        .vector(0, &[0x7f, 2]),
        case("movups of two devices", |a| {
            a.movups(xmm0, xmmword_ptr(rbx))
        })
        .with(RBX, N + 0xff5)
        .read(GN + 0xff5, &v16[..8])
        .read(GN + 0xffd, &v16[8..11])
        .read(GO, &v16[11..])
        .vector(XMM0, &v16),
        case("vmovdqu of RAM and a device", |a| {
            a.vmovdqu(xmm0, xmmword_ptr(rbx))
        })
        .with(RBX, M - 4)
        .ram(BEFORE_M + 0xffc, &v16[..4])
        .read(GM, &v16[4..12])
        .read(GM + 8, &v16[12..])
        .vector(XMM0, &v16)
        .vector(YMM0H, &[0; 16]),
    ]);
}

#[test]
fn masked() {
    // The signs of XMM2's dwords: only those that are set are accessed.
    let c = at_m("vmaskmovps m, of nothing", |a| {
        a.vmaskmovps(xmmword_ptr(rbx), xmm2, xmm0)
    });
    // VPGATHERDD XMM0, [RBX + XMM1], XMM2
    let gather = case_from(
        Bits::Long,
        "vpgatherdd of nothing",
        &[0xc4, 0xe2, 0x69, 0x90, 4, 0x0b],
    );
    let gather = gather
        .with(RBX, M)
        .vector(XMM0 + 32, &[0; 16])
        .vector(YMM0H + 32, &[0; 16])
        .vector(YMM0H, &[0; 16]);
    all([c, gather]);
}

#[test]
fn gathered_and_scattered_elements() {
    // Indices of 0 and a mask of ones, then VPGATHERDD XMM0, [RBX + XMM1], XMM2 and a store of what it has.
    let mut c = case_from(
        Bits::Long,
        "vpgatherdd",
        &[0xc5, 0xf1, 0xef, 0xc9, 0xc5, 0xe9, 0x76, 0xd2],
    )
    .with(RBX, M);
    c.code
        .extend([0xc4, 0xe2, 0x69, 0x90, 4, 0x0b, 0xc5, 0xfa, 0x7f, 3]);
    let c = (1..5).fold(c, |c, i| c.read(GM, &[i; 4]));
    crate::check::plain(
        &c.write(GM, &[1, 1, 1, 1, 2, 2, 2, 2])
            .write(GM + 8, &[3, 3, 3, 3, 4, 4, 4, 4]),
    );
}

#[test]
fn numbers() {
    // 1.0 in ST0 after FLD1 in front of it: in pieces of at most eight bytes.
    let one80 = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f];
    let store = |name: &str, build: fn(&mut CodeAssembler) -> Result<(), IcedError>| {
        let mut c = at_m(name, build);
        // With `fld1` first, which is no access.
        c.code.splice(0..0, [0xd9, 0xe8]);
        c
    };
    let cases = [
        writes(
            store("fstp m32", |a| a.fstp(dword_ptr(rbx))),
            G,
            &1f32.to_le_bytes(),
        ),
        writes(
            store("fstp m64", |a| a.fstp(qword_ptr(rbx))),
            G,
            &1f64.to_le_bytes(),
        ),
        writes(store("fstp m80", |a| a.fstp(tbyte_ptr(rbx))), G, &one80),
        writes(store("fistp m16", |a| a.fistp(word_ptr(rbx))), G, &[1, 0]),
    ];
    for c in &cases {
        crate::check::plain(c);
    }
    // Loaded and stored again, so that the value is seen.
    all([
        reads(
            at_m("fldz; faddp", |a| a.fld(dword_ptr(rbx))),
            G,
            &1f32.to_le_bytes(),
        ),
        reads(
            at_m("fld m64", |a| a.fld(qword_ptr(rbx))),
            G,
            &1f64.to_le_bytes(),
        ),
        reads(at_m("fld m80", |a| a.fld(tbyte_ptr(rbx))), G, &one80),
    ]);
}

/// Whole areas: in pieces of eight bytes, as every operand. FXSAVE64 and FXRSTOR64 leave the last 96 bytes alone.
#[test]
fn areas() {
    let area = Machine::new(TranslationMode::Off, Bits::Long).xsave();
    let mut image = area[..512].to_vec();
    image[XMM0..XMM0 + 16].copy_from_slice(&bytes::<16>());
    let at = |c: Case| c.with(RBX, M);
    all([
        writes(
            at(case("fxsave64", |a| a.fxsave64(xmmword_ptr(rbx)))),
            GM,
            &area[..416],
        ),
        reads(
            at(case("fxrstor64", |a| a.fxrstor64(xmmword_ptr(rbx)))),
            GM,
            &image[..416],
        )
        .vector(XMM0, &bytes::<16>()),
    ]);
}

/// XSAVE64 to a device and XRSTOR64 from one, of x87, SSE and AVX: the image is that of memory.
#[test]
fn extended_areas() {
    let xsave = case("xsave64", |a| a.xsave64(xmmword_ptr(rbx)))
        .with(RBX, M)
        .with(0, 7)
        .with(2, 0);
    let xrstor = case("xrstor64", |a| a.xrstor64(xmmword_ptr(rbx)))
        .with(RBX, M)
        .with(0, 7)
        .with(2, 0);
    for mode in [TranslationMode::Off, TranslationMode::Always] {
        let m = crate::check::start(&xsave, mode);
        let wanted = m.xsave();
        // XSAVE reads and writes XSTATE_BV and leaves what it does not save.
        let mut image = vec![0u8; 832];
        let mut writes = 0;
        loop {
            match m.run() {
                Event::Read { gpa, len } => {
                    assert_eq!(gpa, GM + 512);
                    m.answer(&Event::Read { gpa, len }, &vec![0; len]);
                }
                Event::Write { gpa, data } => {
                    let at = (gpa - GM) as usize;
                    image[at..at + data.len()].copy_from_slice(&data);
                    assert_eq!(m.regs()[RIP], xsave.next(), "retired at its first exit");
                    writes += 1;
                }
                Event::Halt => break,
                other => panic!("{other:?}"),
            }
        }
        assert!(writes > 80, "{writes}");
        assert_eq!(image[..416], wanted[..416]);
        // XSTATE_BV: x87 is in its initial configuration.
        assert_eq!(image[512..520], 6u64.to_le_bytes());
        assert_eq!(image[576..], wanted[576..832]);
        // Back from the device, with other values in one register of each part.
        image[XMM0] ^= 0xff;
        image[YMM0H] ^= 0xff;
        let m = crate::check::start(&xrstor, mode);
        loop {
            match m.run() {
                Event::Read { gpa, len } => {
                    assert_eq!(m.regs()[RIP], crate::machine::CODE, "not yet");
                    let at = (gpa - GM) as usize;
                    m.answer(&Event::Read { gpa, len }, &image[at..at + len]);
                }
                Event::Halt => break,
                other => panic!("{other:?}"),
            }
        }
        let got = m.xsave();
        assert_eq!(got[XMM0], wanted[XMM0] ^ 0xff);
        assert_eq!(got[YMM0H], wanted[YMM0H] ^ 0xff);
        assert_eq!(got[XMM0 + 1..416], wanted[XMM0 + 1..416]);
    }
}
