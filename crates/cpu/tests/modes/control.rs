//! Control registers, EFER and XCR0: which values are refused, what a write leaves alone, and the way
//! into and out of long mode (SDM Vol. 3, 2.2.1, 2.5, 2.6, 4.1, 10.8.5; Vol. 1, 13.3; Vol. 2, MOV to
//! control registers, LMSW, XSETBV).

use anykvm_cpu::Exit;
use anykvm_cpu::cpuid::CpuidTable;
use anykvm_cpu::state::{cr0, cr4, efer, reg};

use crate::harness::Computer;
use crate::machine::*;

/// MOV CRn, (R)AX.
fn mov_to_cr(at: At, n: u8, value: u64) -> Computer {
    let code = match (n, at) {
        (8, _) => vec![0x44, 0x0f, 0x22, 0xc0],
        _ => vec![0x0f, 0x22, 0xc0 | n << 3],
    };
    let mut c = computer(at, &code);
    c.cpu.state.regs[reg::RAX] = value;
    c
}

/// CR4 bits that exist on this processor: all but VMXE, SMXE, 15, KL, CET, PKS, UINTR and above.
const CR4_EXISTS: u64 = 0x1fff | 7 << 16 | 7 << 20;

/// The first instruction puts this into CR4. (With SMEP the second could not be fetched.)
fn accepted(c: &mut Computer, value: u64) {
    c.cpu.run(1);
    assert_eq!(
        (c.cpu.state.rip(), c.cpu.state.cr4),
        (CODE + 3, value),
        "CR4 {value:x}"
    );
}

/// Every single bit of CR4, on top of the present value, in each mode.
#[test]
fn bits_of_cr4() {
    for at in [Real, Prot32(0), Compat32(0), Long(0)] {
        let long = matches!(at, Long(_) | Compat32(_));
        for bit in 0..if at == Long(0) { 64 } else { 32 } {
            let mut c = mov_to_cr(at, 4, 0);
            let value = c.cpu.state.cr4 ^ 1 << bit;
            c.cpu.state.regs[reg::RAX] = value;
            // PCIDE needs long mode, where LA57 and PAE cannot change.
            let refused = CR4_EXISTS & 1 << bit == 0
                || long && [cr4::LA57, cr4::PAE].contains(&(1 << bit))
                || !long && 1 << bit == cr4::PCIDE;
            if refused {
                let want = if at == Real { in_real(GP0) } else { GP0 };
                assert_eq!(end(&mut c), want, "bit {bit} in {at:?}");
            } else {
                accepted(&mut c, value);
            }
        }
    }
}

/// A CR4 bit whose feature CPUID does not show is reserved.
#[test]
fn bits_of_cr4_and_cpuid() {
    // Leaf, bit of EBX, ECX or EDX, the CR4 bit.
    for (leaf, register, bit, control) in [
        (1, 'd', 1, cr4::VME),
        (1, 'd', 2, cr4::DE),
        (1, 'd', 3, cr4::PSE),
        (1, 'd', 13, cr4::PGE),
        (1, 'c', 17, cr4::PCIDE),
        (1, 'c', 26, cr4::OSXSAVE),
        (7, 'b', 0, cr4::FSGSBASE),
        (7, 'b', 7, cr4::SMEP),
        (7, 'b', 20, cr4::SMAP),
        (7, 'c', 2, cr4::UMIP),
        (7, 'c', 3, cr4::PKE),
    ] {
        for shown in [true, false] {
            let mut c = mov_to_cr(Long(0), 4, 0);
            c.cpu.state.regs[reg::RAX] = c.cpu.state.cr4 | control;
            let mut entries = c.cpu.cpuid.entries().to_vec();
            for e in entries.iter_mut().filter(|e| e.function == leaf && !shown) {
                let word = match register {
                    'b' => &mut e.ebx,
                    'c' => &mut e.ecx,
                    _ => &mut e.edx,
                };
                *word &= !(1 << bit);
            }
            c.cpu.cpuid = CpuidTable::new(entries);
            c.cpu.state_changed();
            if shown {
                let value = c.reg(reg::RAX);
                accepted(&mut c, value);
            } else {
                assert_eq!(end(&mut c), GP0, "CR4 {control:x}");
            }
        }
    }
}

/// CR0: combinations that are refused, bits that do not exist, ET (SDM Vol. 3, 2.5).
#[test]
fn values_of_cr0() {
    use cr0::{AM, CD, EM, ET, MP, NE, NW, PE, PG, TS, WP};
    // Mode, value written, what CR0 becomes; `None` is #GP(0).
    for (at, value, want) in [
        (Real, 0, Some(ET)),
        (
            Real,
            MP | EM | TS | NE | WP | AM,
            Some(MP | EM | TS | ET | NE | WP | AM),
        ),
        // Bits 6-15, 17, 19-28 are ignored.
        (Real, 0x1ffa_ffc0, Some(ET)),
        (Real, CD | NW, Some(CD | NW | ET)),
        (Real, CD, Some(CD | ET)),
        (Real, NW, None),
        (Real, PG, None),
        (Prot32(0), PE | NW, None),
        (Prot32(0), PE | CD | NW, Some(PE | CD | NW | ET)),
        (Prot32(0), PG, None),
        (Long(0), PE | PG, Some(PE | PG | ET)),
        (Long(0), PE, None),
        (Long(0), PG, None),
        (Long(0), PE | PG | NW, None),
        (Long(0), PE | PG | 1 << 32, None),
        (Long(0), PE | PG | 1 << 63, None),
        (Compat32(0), PE | PG | WP, Some(PE | PG | WP | ET)),
    ] {
        let mut c = mov_to_cr(at, 0, value);
        let refused = if at == Real { in_real(GP0) } else { GP0 };
        let got = end(&mut c);
        assert_eq!(
            got,
            if want.is_some() { Done } else { refused },
            "{at:?} {value:x}"
        );
        if let Some(want) = want {
            assert_eq!(c.cpu.state.cr0, want, "{at:?} {value:x}");
        }
    }
    // With CR4.PCIDE paging cannot be turned off, from compatibility mode either.
    let mut c = mov_to_cr(Compat32(0), 0, PE);
    set_cr4(&mut c, cr4::PCIDE);
    assert_eq!(end(&mut c), GP0);
}

/// LMSW changes PE (to 1 only), MP, EM and TS; SMSW gives as much of CR0 as its operand holds.
#[test]
fn machine_status_word() {
    for (before, value, after) in [
        (cr0::PE, 0u64, cr0::PE),
        (cr0::PE, 0xffff_fffe, cr0::PE | cr0::MP | cr0::EM | cr0::TS),
        (cr0::PE | cr0::TS | cr0::MP, 1, cr0::PE),
        (
            cr0::PE | cr0::NE | cr0::WP,
            3,
            cr0::PE | cr0::NE | cr0::WP | cr0::MP,
        ),
    ] {
        let mut c = computer(Prot32(0), &[0x0f, 0x01, 0xf0]);
        c.cpu.state.cr0 = before | cr0::ET;
        c.cpu.state.regs[reg::RAX] = value;
        c.cpu.state_changed();
        assert_eq!(end(&mut c), Done);
        assert_eq!(c.cpu.state.cr0, after | cr0::ET, "{before:x} {value:x}");
    }
    // Into protected mode.
    let mut c = computer(Real, &[0x0f, 0x01, 0xf0]);
    c.cpu.state.regs[reg::RAX] = 1;
    c.put(CODE + 3, &[0xf4]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_ne!(c.cpu.state.cr0 & cr0::PE, 0);
    // SMSW AX, EAX, RAX; to memory always 16 bits.
    for (code, want) in [
        (&[0x66u8, 0x0f, 0x01, 0xe0][..], 0xffff_ffff_ffff_0031u64),
        (&[0x0f, 0x01, 0xe0], 0x8001_0031),
        (&[0x48, 0x0f, 0x01, 0xe0], 0x8001_0031),
    ] {
        let mut c = computer(Long(0), code);
        c.cpu.state.regs[reg::RAX] = u64::MAX;
        assert_eq!(end(&mut c), Done);
        assert_eq!(c.reg(reg::RAX), want, "{code:x?}");
    }
    let mut c = computer(Long(0), &[0x48, 0x0f, 0x01, 0x27]);
    c.cpu.state.regs[reg::RDI] = 0x8000;
    c.put64(0x8000, u64::MAX);
    assert_eq!(end(&mut c), Done);
    assert_eq!(c.get64(0x8000), 0xffff_ffff_ffff_0031);
}

/// CR3 in long mode: nothing at and above MAXPHYADDR; with PCIDE bit 63 is a request and not kept.
/// PAE paging: the four entries must have no reserved bits (SDM Vol. 3, 4.4.1).
#[test]
fn values_of_cr3() {
    let width = computer(Long(0), &[]).cpu.phys_bits;
    for (pcide, value, ok) in [
        (false, 0x2_0000, true),
        (false, 0x2_0fff, true),
        (false, 0x2_0000 | 1 << width, false),
        (false, 0x2_0000 | 1 << 62, false),
        (false, 0x2_0000 | 1 << 63, false),
        (true, 0x2_0123, true),
        (true, 0x2_0123 | 1 << 63, true),
        (true, 0x2_0123 | 1 << 62, false),
    ] {
        let mut c = mov_to_cr(Long(0), 3, value);
        set_cr4(&mut c, if pcide { cr4::PCIDE } else { 0 });
        assert_eq!(end(&mut c), if ok { Done } else { GP0 }, "{value:x}");
        if ok {
            assert_eq!(c.cpu.state.cr3, value & !(1 << 63));
        }
    }
    for (entry, ok) in [
        (0x3_0001u64, true),
        (0x3_0000, true),
        (0x3_0018 | 1, true),
        (0x3_0e01, true),
        (0x3_0003, false),
        (0x3_0005, false),
        (0x3_0021, false),
        (0x3_0101, false),
        (0x3_0001 | 1 << 63, false),
        // Not present: not looked at.
        (1 << 63, true),
    ] {
        for third in [false, true] {
            let mut c = mov_to_cr(Prot32(0), 3, 0x2_8000);
            // An identity map of the first 2 MiB in one page.
            c.put64(0x2_8000, 0x2_9001);
            c.put64(0x2_9000, 0x83);
            c.put64(0x2_8000 + if third { 24 } else { 8 }, entry);
            let s = &mut c.cpu.state;
            s.pdptr = [0x2_9001, 0, 0, 0];
            s.cr4 |= cr4::PAE;
            s.cr0 |= cr0::PG;
            c.cpu.state_changed();
            assert_eq!(end(&mut c), if ok { Done } else { GP0 }, "{entry:x}");
        }
    }
}

/// CR8 is four bits.
#[test]
fn values_of_cr8() {
    for (value, want) in [
        (0, Done),
        (15, Done),
        (16, GP0),
        (1 << 32, GP0),
        (u64::MAX, GP0),
    ] {
        assert_eq!(end(&mut mov_to_cr(Long(0), 8, value)), want, "{value:x}");
    }
}

/// WRMSR to EFER: bits that do not exist, LME while paging is on, LMA, which is the processor's (SDM
/// Vol. 3, 2.2.1; Vol. 4).
#[test]
fn values_of_efer() {
    use efer::{LMA, LME, NX, SCE};
    for (at, value, want) in [
        (Prot32(0), 0, Some(0)),
        (Prot32(0), SCE | LME | NX, Some(SCE | LME | NX)),
        (Prot32(0), LMA, Some(0)),
        (Prot32(0), 2, None),
        (Prot32(0), 1 << 12, None),
        (Prot32(0), 1 << 63, None),
        (Long(0), LME | LMA, Some(LME | LMA)),
        (Long(0), LME | LMA | SCE, Some(LME | LMA | SCE)),
        (Long(0), LME, Some(LME | LMA)),
        (Long(0), LMA, None),
        (Long(0), 0, None),
    ] {
        let mut c = computer(at, &[0x0f, 0x30]);
        let r = &mut c.cpu.state.regs;
        r[reg::RCX] = 0xc000_0080;
        (r[reg::RAX], r[reg::RDX]) = (value & 0xffff_ffff, value >> 32);
        assert_eq!(
            end(&mut c),
            if want.is_some() { Done } else { GP0 },
            "{at:?} {value:x}"
        );
        if let Some(want) = want {
            assert_eq!(c.cpu.state.msr.efer, want, "{at:?} {value:x}");
        }
    }
}

/// XCR0 (SDM Vol. 1, 13.3): x87 always, AVX with SSE, nothing that CPUID's leaf 0Dh does not show;
/// registers other than 0 do not exist.
#[test]
fn values_of_xcr0() {
    for (index, value, ok) in [
        (0u64, 1u64, true),
        (0, 3, true),
        (0, 7, true),
        (0, 0, false),
        (0, 2, false),
        (0, 4, false),
        (0, 5, false),
        (0, 6, false),
        // MPX.
        (0, 0x1f, false),
        // Opmask without the rest of AVX-512; AMX tiles.
        (0, 0x27, false),
        (0, 7 | 3 << 17, false),
        (0, 7 | 1 << 62, false),
        (0, 7 | 1 << 63, false),
        (1, 1, false),
        (2, 3, false),
    ] {
        let mut c = computer(Long(0), &[0x0f, 0x01, 0xd1]);
        set_cr4(&mut c, cr4::OSXSAVE);
        let r = &mut c.cpu.state.regs;
        r[reg::RCX] = index;
        (r[reg::RAX], r[reg::RDX]) = (value & 0xffff_ffff, value >> 32);
        assert_eq!(
            end(&mut c),
            if ok { Done } else { GP0 },
            "{index} {value:x}"
        );
        if ok {
            assert_eq!(c.cpu.state.xcr0, value);
        }
    }
    let mut c = computer(Long(0), &[0x0f, 0x01, 0xd0]);
    set_cr4(&mut c, cr4::OSXSAVE);
    c.cpu.state.regs[reg::RCX] = 2;
    assert_eq!(end(&mut c), GP0);
}

/// Turning long mode on: MOV CR0 with PG under EFER.LME wants CR4.PAE and a CS without L (SDM Vol. 3,
/// 10.8.5).
#[test]
fn into_long_mode() {
    for (pae, l, ok) in [
        (true, false, true),
        (false, false, false),
        (true, true, false),
    ] {
        let mut c = mov_to_cr(Prot32(0), 0, cr0::PE | cr0::PG);
        // Four-level tables as `Computer::long` has them, and its IDT to end in.
        let long = Computer::long(2 << 20, CODE, 0x2_0000);
        for at in (0x2_0000..0x2_4000).step_by(8) {
            c.put64(at, long.get64(at));
        }
        let s = &mut c.cpu.state;
        s.cr3 = 0x2_0000;
        s.msr.efer = efer::LME;
        s.cr4 = if pae { cr4::PAE } else { 0 };
        if l {
            s.seg[1].attr |= 1 << 13;
        }
        // Behind the write, in compatibility mode: HLT.
        c.put(CODE + 3, &[0xf4]);
        c.cpu.state_changed();
        assert_eq!(
            end(&mut c),
            if ok { Halt } else { GP0 },
            "PAE {pae}, CS.L {l}"
        );
        let lma = c.cpu.state.msr.efer & efer::LMA != 0;
        assert_eq!(lma, ok);
    }
}

/// Out of it from compatibility mode: LMA goes with PG, LME stays; PAE may then go too.
#[test]
fn out_of_long_mode() {
    // mov cr0, eax; mov cr4, ebx; hlt
    let mut c = computer(Compat32(0), &[0x0f, 0x22, 0xc0, 0x0f, 0x22, 0xe3, 0xf4]);
    c.cpu.state.regs[reg::RAX] = cr0::PE;
    c.cpu.state.regs[reg::RBX] = 0;
    assert_eq!(c.run(), Exit::Hlt);
    let s = &c.cpu.state;
    assert_eq!(s.rip(), CODE + 7);
    assert_eq!(s.msr.efer & (efer::LMA | efer::LME), efer::LME);
    assert_eq!(s.cr4, 0);
}
