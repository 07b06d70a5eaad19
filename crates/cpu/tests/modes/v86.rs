//! Virtual-8086 mode and protected-mode virtual interrupts: what depends on IOPL, CR4.VME and CR4.PVI,
//! INT n by the six methods, and the I/O permission bitmap (SDM Vol. 3, 20.2-20.4; Vol. 1, 19.5.2).

use anykvm_cpu::events::vector::GP;
use anykvm_cpu::state::{cr4, reg, rflags, seg};

use crate::harness::Computer;
use crate::harness::tables::*;
use crate::machine::*;

use rflags::{IF, IOPL, NT, TF, VIF, VIP};

/// A code that is run with some flags set, and what becomes of IF and VIF, or #GP(0).
type Row = (&'static str, &'static [u8], u64, Result<u64, ()>);

/// IOPL 3: the instructions act on IF, VME or not (SDM Vol. 3, 20.2.7). `pushfd; pop eax` shows VIF.
const IOPL3: &[Row] = &[
    ("CLI", &[0xfa], IF, Ok(0)),
    ("CLI keeps VIF", &[0xfa], IF | VIF, Ok(VIF)),
    ("STI", &[0xfb], 0, Ok(IF)),
    ("STI with VIP", &[0xfb], VIP, Ok(IF | VIP)),
    ("POPF clears IF", &[0x6a, 0, 0x9d], IF, Ok(0)),
    ("POPF sets IF", &[0x68, 0, 2, 0x9d], 0, Ok(IF)),
    (
        "POPFD sets IF",
        &[0x66, 0x68, 0, 2, 0, 0, 0x66, 0x9d],
        0,
        Ok(IF),
    ),
    // Not VIF, VIP, IOPL or VM.
    (
        "POPFD of ones but TF",
        &[0x66, 0x68, 0xff, 0xfe, 0xfa, 0xff, 0x66, 0x9d],
        0,
        Ok(IF),
    ),
];

/// IOPL below 3 without VME: all #GP(0).
const TRAPPED: &[Row] = &[
    ("CLI", &[0xfa], 0, Err(())),
    ("STI", &[0xfb], 0, Err(())),
    ("PUSHF", &[0x9c], 0, Err(())),
    ("PUSHFD", &[0x66, 0x9c], 0, Err(())),
    ("POPF", &[0x9d], 0, Err(())),
    ("POPFD", &[0x66, 0x9d], 0, Err(())),
    ("IRET", &[0xcf], 0, Err(())),
    ("IRETD", &[0x66, 0xcf], 0, Err(())),
    ("INT n", &[0xcd, 0x80], 0, Err(())),
];

/// IOPL below 3 with VME: VIF in IF's place, 32-bit forms #GP(0) (SDM Vol. 3, 20.3; table 20-1).
const VIRTUAL: &[Row] = &[
    ("CLI", &[0xfa], VIF, Ok(0)),
    ("CLI keeps IF", &[0xfa], IF | VIF, Ok(IF)),
    ("CLI with VIP", &[0xfa], VIF | VIP, Ok(VIP)),
    ("STI", &[0xfb], 0, Ok(VIF)),
    ("STI with VIP", &[0xfb], VIP, Err(())),
    ("PUSHFD", &[0x66, 0x9c], 0, Err(())),
    ("POPFD", &[0x66, 0x9d], 0, Err(())),
    ("IRETD", &[0x66, 0xcf], 0, Err(())),
    ("POPF sets VIF", &[0x68, 0, 2, 0x9d], 0, Ok(VIF)),
    ("POPF clears VIF", &[0x6a, 0, 0x9d], VIF, Ok(0)),
    ("POPF keeps IF", &[0x6a, 0, 0x9d], IF, Ok(IF)),
    ("POPF sets VIF with VIP", &[0x68, 0, 2, 0x9d], VIP, Err(())),
    (
        "POPF clears VIF with VIP",
        &[0x6a, 0, 0x9d],
        VIP | VIF,
        Ok(VIP),
    ),
    ("POPF with TF", &[0x68, 0, 1, 0x9d], 0, Err(())),
    ("POPF keeps IOPL", &[0x68, 0, 0x30, 0x9d], 0, Ok(0)),
    // PUSHF shows VIF as IF and IOPL 3; POPF takes them back.
    ("PUSHF, POPF", &[0x9c, 0x9d], VIF, Ok(VIF)),
];

fn check(rows: &[Row], iopl: u8, cr4_bits: u64) {
    for &(name, code, flags, want) in rows {
        let mut c = computer(V86(iopl), code);
        c.cpu.state.rflags |= flags;
        set_cr4(&mut c, cr4_bits);
        // INT n is method 4 unless the bitmap says otherwise: there is none.
        let got = end(&mut c);
        let what = format!("{name} with IOPL {iopl}, flags {flags:x}");
        assert_eq!(got, if want.is_ok() { Done } else { GP0 }, "{what}");
        if let Ok(want) = want {
            let saved = u64::from(c.stack32(2));
            assert_eq!(saved & (IF | VIF | VIP), want, "{what}");
            assert_eq!(
                saved & (IOPL | rflags::VM),
                u64::from(iopl) << 12 | rflags::VM,
                "{what}"
            );
        }
    }
}

#[test]
fn flag_instructions() {
    check(IOPL3, 3, 0);
    check(IOPL3, 3, cr4::VME);
    for iopl in 0..3 {
        check(TRAPPED, iopl, 0);
        check(VIRTUAL, iopl, cr4::VME);
    }
}

/// The image PUSHF pushes with VME and IOPL below 3.
#[test]
fn pushed_flags() {
    for (flags, image) in [(0, 0x3002), (VIF, 0x3202), (IF, 0x3002), (NT | VIF, 0x7202)] {
        let mut c = computer(V86(0), &[0x9c]);
        c.cpu.state.rflags |= flags;
        set_cr4(&mut c, cr4::VME);
        assert_eq!(end(&mut c), Done);
        assert_eq!(c.get64(0x8ffe) & 0xffff, image, "{flags:x}");
    }
}

/// IRET with VME: VIF from the frame, #GP(0) with TF, and with IF while VIP is set (SDM Vol. 2, IRET).
#[test]
fn iret() {
    for (iopl, vme, image, flags, want) in [
        (3u8, false, IF, 0, Ok(IF)),
        (3, true, IF, 0, Ok(IF)),
        (3, true, 0, IF, Ok(0)),
        (0, true, IF, 0, Ok(VIF)),
        (0, true, 0, VIF | IF, Ok(IF)),
        (0, true, IF, VIP, Err(())),
        (0, true, 0, VIP, Ok(VIP)),
        (0, true, TF, 0, Err(())),
        (0, true, IOPL, 0, Ok(0)),
    ] {
        let mut c = computer(V86(iopl), &[0xcf]);
        for (i, v) in [0x1100, 0, image as u16].into_iter().enumerate() {
            c.put(0x9000 + i as u64 * 2, &v.to_le_bytes());
        }
        c.put(0x1100, &[END]);
        c.cpu.state.rflags |= flags;
        set_cr4(&mut c, if vme { cr4::VME } else { 0 });
        let got = end(&mut c);
        assert_eq!(
            got,
            if want.is_ok() { Done } else { GP0 },
            "{iopl} {image:x} {flags:x}"
        );
        if let Ok(want) = want {
            let saved = u64::from(c.stack32(2));
            assert_eq!(saved & (IF | VIF | VIP), want, "{iopl} {image:x} {flags:x}");
            assert_eq!(saved >> 12 & 3, iopl.into());
            assert_eq!(c.stack32(3), 0x9006);
        }
    }
}

/// A TSS with a redirection bitmap that has one bit set: vector 81h goes to the monitor.
fn redirection(c: &mut Computer) {
    c.cpu.state.tr.limit = 0x2fff;
    c.put(TSS + 102, &0x88u16.to_le_bytes());
    c.put(TSS + 0x68, &[0; 32]);
    c.put(TSS + 0x68 + 0x80 / 8, &[2]);
}

/// INT n by VME, IOPL and the bitmap: methods 1 to 6 (SDM Vol. 3, table 20-2).
#[test]
fn methods_of_int_n() {
    // VME, IOPL, vector; whether the 8086 handler runs, or where else it goes.
    for (vme, iopl, v, want) in [
        (false, 3u8, 0x80u8, Some(Event(0x80))),
        (false, 0, 0x80, Some(GP0)),
        (true, 3, 0x81, Some(Event(0x81))),
        (true, 0, 0x81, Some(GP0)),
        (true, 3, 0x80, None),
        (true, 0, 0x80, None),
    ] {
        let mut c = computer(V86(iopl), &[0xcd, v]);
        redirection(&mut c);
        c.put64(IDT + 0x81 * 8, gate(CODE0, HANDLERS + 0x810, 0xee, 0));
        // The 8086 handler: INT3 at 0:1200h.
        c.put(u64::from(v) * 4, &0x1200u32.to_le_bytes());
        c.put(0x1200, &[END]);
        c.cpu.state.rflags |= IF | VIF | NT;
        set_cr4(&mut c, if vme { cr4::VME } else { 0 });
        let got = end(&mut c);
        let what = format!("VME {vme} IOPL {iopl} vector {v:x}");
        if let Some(want) = want {
            assert_eq!(got, want, "{what}");
            continue;
        }
        assert_eq!((got, c.stack32(0)), (Done, 0x1201), "{what}");
        let flags = u64::from(c.stack32(2));
        // Method 5 clears IF, method 6 VIF; NT stays.
        let cleared = if iopl == 3 { IF } else { VIF };
        assert_eq!(
            flags & (IF | VIF | NT),
            (IF | VIF | NT) & !cleared,
            "{what}"
        );
        let frame = c.get64(0x8ffa);
        assert_eq!(frame & 0xffff_ffff, CODE + 2, "{what}");
        let image = if iopl == 3 { 0x7202 } else { 0x3202 | NT };
        assert_eq!(frame >> 32 & 0xffff, image, "{what}");
    }
    // INT3, INTO and INT1 always take the IDT (SDM Vol. 3, 20.3.3).
    for (code, v) in [(&[0xccu8][..], 3), (&[0xce], 4), (&[0xf1], 1)] {
        let mut c = computer(V86(0), code);
        redirection(&mut c);
        c.put64(IDT + 4 * 8, gate(CODE0, HANDLERS + 0x40, 0xee, 0));
        c.cpu.state.rflags |= rflags::OF;
        set_cr4(&mut c, cr4::VME);
        assert_eq!(end(&mut c), if v == 3 { Done } else { Event(v) });
    }
}

/// Out of virtual-8086 mode: the frame, null data segments, CPL 0; only nonconforming code of level 0
/// may handle it (SDM Vol. 3, 20.3.1).
#[test]
fn exceptions() {
    for (access, want) in [
        (0x9bu8, UD),
        (0x9f, Fault(GP, FREE as u32 | 1)),
        (0xbb, Fault(GP, FREE as u32 | 1)),
        (0xfb, Fault(GP, FREE as u32 | 1)),
    ] {
        for size in [4u64, 2] {
            let mut c = computer(V86(0), &[0x0f, 0x0b]);
            for n in 0..6 {
                if n != seg::CS {
                    c.cpu.state.seg[usize::from(n)].selector = 0x700 + u16::from(n);
                }
            }
            c.define(FREE, descriptor(0, 0xf_ffff, access, 0xc));
            let kind = if size == 4 { 0x8e } else { 0x86 };
            // 16-bit gates reach 64 KiB.
            c.put(0x60, &[0xf4]);
            let to = if size == 4 { HANDLERS + 0x60 } else { 0x60 };
            c.put64(IDT + 6 * 8, gate(FREE, to, kind, 0));
            let got = end(&mut c);
            if want != UD {
                assert_eq!(got, want, "{access:x}");
                continue;
            }
            assert_eq!(c.cpu.state.rip(), to + 1);
            let mask = if size == 4 { u64::MAX >> 32 } else { 0xffff };
            let word = |n: u64| c.get64(c.reg(reg::RSP) + n * size) & mask;
            assert_eq!([word(0), word(1)], [CODE, 0]);
            assert_eq!(
                [3, 4, 5, 6, 7, 8].map(word),
                [0x9000, 0x702, 0x700, 0x703, 0x704, 0x705]
            );
            assert_eq!(c.reg(reg::RSP), STACK0 - 9 * size);
            assert!([0, 3, 4, 5].iter().all(|&n| c.cpu.state.seg[n].unusable()));
        }
    }
}

/// PVI: CLI and STI at CPL 3 with IOPL below 3 act on VIF; POPF, PUSHF and IRET do not know it (SDM
/// Vol. 3, 20.4).
#[test]
fn protected_mode_virtual_interrupts() {
    for at in [Prot32(3), Compat32(3), Long(3)] {
        for (code, flags, want) in [
            (0xfau8, VIF, Ok(0)),
            (0xfa, VIF | IF, Ok(IF)),
            (0xfb, 0, Ok(VIF)),
            (0xfb, VIP, Err(())),
            (0xfa, VIP | VIF, Ok(VIP)),
        ] {
            for pvi in [true, false] {
                let mut c = computer(at, &[code]);
                c.cpu.state.rflags |= flags;
                set_cr4(&mut c, if pvi { cr4::PVI } else { 0 });
                let ok = pvi && want.is_ok();
                assert_eq!(
                    end(&mut c),
                    if ok { Done } else { GP0 },
                    "{at:?} {code:x} {flags:x} {pvi}"
                );
                if let (true, Ok(want)) = (ok, want) {
                    let saved = if at == Prot32(3) {
                        c.stack32(2).into()
                    } else {
                        c.stack64(2)
                    };
                    assert_eq!(saved & (IF | VIF | VIP), want, "{at:?} {code:x} {flags:x}");
                }
            }
        }
    }
    // Levels 1 and 2 are no users of it.
    let mut c = computer(Prot32(0), &[0xfa]);
    for s in &mut c.cpu.state.seg[..6] {
        s.set_dpl(1);
        s.selector |= 1;
    }
    set_cr4(&mut c, cr4::PVI);
    assert_eq!(end(&mut c), GP0);
}

/// The I/O permission bitmap: every width at a clear stretch, at one set bit, and at the TSS's limit.
#[test]
fn io_permission_bitmap() {
    // The bitmap starts at 68h and covers ports 0-5FFh (and its last byte).
    const MAP: u64 = 0x68;
    let limit = MAP as u32 + 0x600 / 8;
    // Port, bytes, TSS limit, whether it is allowed; port 0x523 is forbidden.
    let rows: &[(u16, usize, u32, bool)] = &[
        (0x520, 1, limit, true),
        (0x520, 2, limit, true),
        (0x520, 4, limit, false),
        (0x522, 1, limit, true),
        (0x522, 2, limit, false),
        (0x523, 1, limit, false),
        (0x523, 2, limit, false),
        (0x524, 4, limit, true),
        // Across bytes of the bitmap.
        (0x51f, 4, limit, true),
        (0x51f, 2, limit, true),
        (0x521, 4, limit, false),
        (0x526, 4, limit, true),
        // Two bytes are read, whatever the width: both must be inside.
        (0x5f8, 1, limit, true),
        (0x5f8, 1, limit - 1, false),
        (0x5fc, 4, limit, true),
        (0x600, 1, limit, false),
        (0x520, 1, 0x66, false),
    ];
    let modes = [V86(0), V86(3), Prot16(3), Prot32(3), Compat32(3), Long(3)];
    for at in modes {
        for &(port, bytes, limit, ok) in rows {
            for out in [false, true] {
                let wide = matches!(at, V86(_) | Prot16(_));
                let mut code = vec![];
                if bytes == if wide { 4 } else { 2 } {
                    code.push(0x66);
                }
                code.push(0xec | u8::from(out) << 1 | u8::from(bytes != 1));
                let mut c = computer(at, &code);
                c.put(TSS + 102, &(MAP as u16).to_le_bytes());
                c.put(TSS + MAP + 0x523 / 8, &[1 << 3]);
                // The map's last byte is all ones (SDM Vol. 1, 19.5.2).
                c.put(TSS + MAP + 0x600 / 8, &[0xff]);
                c.cpu.state.tr.limit = limit;
                c.cpu.state.regs[reg::RDX] = port.into();
                let what =
                    format!("{at:?} port {port:x}, {bytes} bytes, limit {limit:x}, out {out}");
                assert_eq!(end(&mut c), if ok { Done } else { GP0 }, "{what}");
            }
        }
    }
    // IOPL 3 in protected mode needs no bitmap; a 16-bit TSS has none.
    for (iopl, kind, want) in [(3u64, 0x8b, Done), (0, 0x83, GP0), (3, 0x83, Done)] {
        let mut c = computer(Prot32(3), &[0xec]);
        c.put(TSS + 102, &0x68u16.to_le_bytes());
        c.cpu.state.regs[reg::RDX] = 0x520;
        c.cpu.state.rflags |= iopl << 12;
        // INT3's stack comes from the TSS too: a 16-bit one has SP0 and SS0 at 2 and 4.
        if kind == 0x83 {
            c.put(TSS + 2, &(STACK0 as u16).to_le_bytes());
            c.put(TSS + 4, &DATA0.to_le_bytes());
        }
        c.cpu.state.tr.attr = kind;
        c.cpu.state.tr.limit = 0x2fff;
        c.cpu.state_changed();
        assert_eq!(end(&mut c), want, "{iopl} {kind:x}");
    }
}
