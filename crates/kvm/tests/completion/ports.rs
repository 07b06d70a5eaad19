//! IN, OUT, INS, OUTS (KVM API, section 5, KVM_EXIT_IO).

use iced_x86::code_asm::*;

use crate::cases::{A, Case, PORT, RAX, RCX, RDI, RDX, RFLAGS, RSI, case};
use crate::check::all;
use crate::machine::{DATA, Event, GM, M};

const DF: u64 = 1 << 10;

#[test]
fn single_items() {
    let immediate = |mut c: Case| {
        for step in &mut c.script {
            match &mut step.event {
                Event::In { port, .. } | Event::Out { port, .. } => *port = 0x42,
                _ => {}
            }
        }
        c
    };
    let byte = A & !0xff | 0x99;
    let word = A & !0xffff | 0x9988;
    all([
        case("in al, dx", |a| a.in_(al, dx))
            .input(1, &[0x99])
            .gives(RAX, byte),
        case("in ax, dx", |a| a.in_(ax, dx))
            .input(2, &[0x88, 0x99])
            .gives(RAX, word),
        case("in eax, dx", |a| a.in_(eax, dx))
            .input(4, &[1, 2, 3, 0x84])
            .gives(RAX, 0x8403_0201),
        immediate(
            case("in al, 42h", |a| a.in_(al, 0x42))
                .input(1, &[0x99])
                .gives(RAX, byte),
        ),
        immediate(
            case("in ax, 42h", |a| a.in_(ax, 0x42))
                .input(2, &[0x88, 0x99])
                .gives(RAX, word),
        ),
        immediate(
            case("in eax, 42h", |a| a.in_(eax, 0x42))
                .input(4, &[1, 2, 3, 4])
                .gives(RAX, 0x0403_0201),
        ),
        case("out dx, al", |a| a.out(dx, al)).output(1, &[0x88]),
        case("out dx, ax", |a| a.out(dx, ax)).output(2, &[0x88, 0x77]),
        case("out dx, eax", |a| a.out(dx, eax)).output(4, &[0x88, 0x77, 0x66, 0x55]),
        immediate(case("out 42h, al", |a| a.out(0x42, al)).output(1, &[0x88])),
        immediate(case("out 42h, ax", |a| a.out(0x42, ax)).output(2, &[0x88, 0x77])),
        immediate(case("out 42h, eax", |a| a.out(0x42, eax)).output(4, &[0x88, 0x77, 0x66, 0x55])),
        // DX is 16 bits of RDX.
        case("in with more in rdx", |a| a.in_(al, dx))
            .with(RDX, 0x1234_0000 | u64::from(PORT))
            .input(1, &[0x99])
            .gives(RAX, byte),
    ]);
}

fn ins(c: Case, size: u8, at: u64, data: &[u8]) -> Case {
    c.with(RDI, at)
        .input(size, data)
        .stores(at, data)
        .gives(RDI, at + data.len() as u64)
}

#[test]
fn input_strings() {
    let eight = [1, 2, 3, 4, 5, 6, 7, 8];
    let nine = [1, 2, 3, 4, 5, 6, 7, 8, 9];
    let page: Vec<u8> = (0..0x1000u32).map(|i| (i * 7 + 1) as u8).collect();
    all([
        ins(case("insb", |a| a.insb()), 1, DATA, &[5]),
        ins(case("insw", |a| a.insw()), 2, DATA + 1, &[5, 6]),
        ins(case("insd", |a| a.insd()), 4, DATA, &[5, 6, 7, 8]),
        ins(case("rep insb", |a| a.rep().insb()), 1, DATA, &nine)
            .with(RCX, 9)
            .gives(RCX, 0),
        ins(case("rep insw", |a| a.rep().insw()), 2, DATA, &eight)
            .with(RCX, 4)
            .gives(RCX, 0),
        ins(case("rep insd", |a| a.rep().insd()), 4, DATA, &eight)
            .with(RCX, 2)
            .gives(RCX, 0),
        ins(
            case("rep insb of a page", |a| a.rep().insb()),
            1,
            DATA,
            &page,
        )
        .with(RCX, 0x1000)
        .gives(RCX, 0),
        case("rep ins of nothing", |a| a.rep().insb())
            .with(RCX, 0)
            .with(RDI, DATA),
        // What fits the page, then the rest.
        case("rep insb into two pages", |a| a.rep().insb())
            .with(RCX, 5)
            .with(RDI, DATA + 0xffd)
            .input(1, &[1, 2, 3])
            .input(1, &[4, 5])
            .stores(DATA + 0xffd, &[1, 2, 3, 4, 5])
            .gives(RCX, 0)
            .gives(RDI, DATA + 0x1002),
        // The second item has a byte in each page.
        case("rep insw across pages", |a| a.rep().insw())
            .with(RCX, 3)
            .with(RDI, DATA + 0xffd)
            .input(2, &[1, 2])
            .input(2, &[3, 4])
            .input(2, &[5, 6])
            .stores(DATA + 0xffd, &[1, 2, 3, 4, 5, 6])
            .gives(RCX, 0)
            .gives(RDI, DATA + 0x1003),
        case("rep insw down", |a| a.rep().insw())
            .with(RFLAGS, 2 | DF)
            .with(RCX, 3)
            .with(RDI, DATA + 8)
            .input(2, &[1, 2, 3, 4, 5, 6])
            .stores(DATA + 4, &[5, 6, 3, 4, 1, 2])
            .gives(RCX, 0)
            .gives(RDI, DATA + 2),
        // A device's items into another's memory.
        case("insd into device memory", |a| a.insd())
            .with(RDI, M + 8)
            .input(4, &[1, 2, 3, 4])
            .write(GM + 8, &[1, 2, 3, 4])
            .gives(RDI, M + 12),
    ]);
}

#[test]
fn output_strings() {
    let outs = |c: Case, size: u8, data: &[u8]| {
        data.chunks(usize::from(size))
            .fold(c.with(RSI, DATA).ram(DATA, data), |c, item| {
                c.output(size, item)
            })
            .gives(RSI, DATA + data.len() as u64)
    };
    all([
        outs(case("outsb", |a| a.outsb()), 1, &[9]),
        outs(case("outsw", |a| a.outsw()), 2, &[9, 8]),
        outs(case("outsd", |a| a.outsd()), 4, &[9, 8, 7, 6]),
        outs(case("rep outsb", |a| a.rep().outsb()), 1, &[9, 8, 7])
            .with(RCX, 3)
            .gives(RCX, 0),
        outs(case("rep outsw", |a| a.rep().outsw()), 2, &[9, 8, 7, 6])
            .with(RCX, 2)
            .gives(RCX, 0),
        outs(
            case("rep outsd", |a| a.rep().outsd()),
            4,
            &[9, 8, 7, 6, 5, 4, 3, 2],
        )
        .with(RCX, 2)
        .gives(RCX, 0),
        case("rep outs of nothing", |a| a.rep().outsb())
            .with(RCX, 0)
            .with(RSI, DATA),
        case("outsw from two pages", |a| a.outsw())
            .with(RSI, DATA + 0xfff)
            .ram(DATA + 0xfff, &[1, 2])
            .output(2, &[1, 2])
            .gives(RSI, DATA + 0x1001),
        // An item is read from one device, then written to another.
        case("outsd from device memory", |a| a.outsd())
            .with(RSI, M + 4)
            .read(GM + 4, &[1, 2, 3, 4])
            .output(4, &[1, 2, 3, 4])
            .gives(RSI, M + 8),
        case("rep outsb from device memory", |a| a.rep().outsb())
            .with(RSI, M + 4)
            .with(RCX, 2)
            .read(GM + 4, &[1])
            .output(1, &[1])
            .read(GM + 5, &[2])
            .output(1, &[2])
            .gives(RSI, M + 6)
            .gives(RCX, 0),
        case("rep outsb down", |a| a.rep().outsb())
            .with(RFLAGS, 2 | DF)
            .with(RSI, DATA + 1)
            .with(RCX, 2)
            .ram(DATA, &[1, 2])
            .output(1, &[2])
            .output(1, &[1])
            .gives(RSI, DATA - 1)
            .gives(RCX, 0),
    ]);
}
