//! Tables of cases for 32-bit, PAE, 4- and 5-level paging: entries' formats, reserved bits, PDPTEs,
//! MAXPHYADDR, accessed and dirty flags, CR2 (SDM Vol. 3, ch. 4; sections in the rows).

mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::cpuid::{CpuidTable, supported};
use anykvm_cpu::state::{cr0, cr4, efer, reg};
use harness::Computer;
use harness::paging::{FRAME, KERNEL, Kind, LINEAR, NX, P, PD, PDPT, PS, PT, Paged, TABLES, U, W};
use harness::tables::*;

const CODE: u64 = 0x1000;
const A: u64 = 0x20;
const D: u64 = 0x40;
const ALL: u64 = P | W | U;
/// 32-bit paging: page directory, the identity map of the first 4 MiB, the table under test.
const DIRECTORY: u64 = 0x2_0000;
const IDENTITY: u64 = 0x2_1000;
const TABLE: u64 = 0x2_2000;
/// PAE: the PDPTEs and the page directory of the first 1 GiB.
const PDPTES: u64 = 0x2_3000;
const PAE_DIRECTORY: u64 = 0x2_4000;
/// What 32-bit code accesses: the second 4 MiB (32-bit paging) or 2 MiB pages from there (PAE).
const AT: u32 = 0x40_0000;

/// What a read leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// RAM with this in it.
    Ram(u32),
    /// No RAM at this address.
    Device(u64),
    /// #PF with this error code.
    Fault(u32),
    /// #GP(0).
    Gp,
}
use Outcome::{Device, Fault, Gp, Ram};

fn word(c: &mut Computer, gpa: u64, v: u64) {
    c.put(gpa, &(v as u32).to_le_bytes());
}

/// 32-bit code at CPL 0 (or 3) with 4 MiB of RAM, not paging yet.
fn machine(code: &[u8], user: bool) -> Computer {
    let mut c = Computer::with_tables(CODE as u32);
    c.put(CODE, code);
    c.put(CODE + code.len() as u64, &[0xcd, 0x80]);
    c.put(FRAME, &7u32.to_le_bytes());
    if user {
        c.user();
    }
    c.cpu.state.regs[reg::RBX] = AT.into();
    c
}

fn phys_bits(c: &mut Computer, bits: u32) {
    let mut entries = supported();
    for e in entries.iter_mut().filter(|e| e.function == 0x8000_0008) {
        e.eax = e.eax & !0xff | bits;
    }
    c.cpu.set_cpuid(CpuidTable::new(entries));
}

fn outcome(c: &mut Computer) -> Outcome {
    c.cpu.state_changed();
    match c.run() {
        Exit::MmioRead { gpa, .. } => Device(gpa),
        Exit::Hlt => match (c.cpu.state.rip() - HANDLERS) / 16 {
            0x80 => Ram(c.reg(reg::RAX) as u32),
            13 => {
                assert_eq!(c.stack32(0), 0);
                Gp
            }
            14 => Fault(c.stack32(0)),
            v => panic!("vector {v}\n{}", c.cpu.dump()),
        },
        other => panic!("{other:?}\n{}", c.cpu.dump()),
    }
}

/// SDM Vol. 3, 4.3: 32-bit paging, 4 MiB pages, PSE-36.
#[test]
fn paging_32() {
    const FAR: u64 = 0x80_0000;
    struct Case {
        section: &'static str,
        pse: bool,
        phys: u32,
        pde: u64,
        pte: u64,
        store: bool,
        user: bool,
        want: Outcome,
    }
    let case = |section, pde, pte, store, user, want| Case {
        section,
        pse: true,
        phys: 40,
        pde,
        pte,
        store,
        user,
        want,
    };
    let large = |phys, pde, want| Case {
        phys,
        ..case("4.3 table 4-4", pde | PS | ALL, 0, false, false, want)
    };
    let cases = [
        case("4.3", TABLE | ALL, FRAME | ALL, false, true, Ram(7)),
        case("4.7", 0, 0, false, false, Fault(0)),
        case("4.7", 0, 0, true, true, Fault(6)),
        case("4.7", TABLE | ALL, 0xffff_fffe, false, true, Fault(4)),
        case("4.6", TABLE | ALL, FRAME | P, true, false, Fault(3)),
        case("4.6", TABLE | P, FRAME | ALL, true, false, Fault(3)),
        case("4.6", TABLE | P | W, FRAME | ALL, false, true, Fault(5)),
        case("4.6", TABLE | ALL, FRAME | P | W, true, true, Fault(7)),
        // A PTE has no reserved bits; bit 7 is PAT.
        case(
            "4.3 table 4-6",
            TABLE | ALL,
            FRAME | ALL | 0xf98,
            false,
            true,
            Ram(7),
        ),
        // Without CR4.PSE bit 7 of a PDE is ignored.
        Case {
            pse: false,
            ..case(
                "4.3 table 4-5",
                TABLE | ALL | PS,
                FRAME | ALL,
                false,
                true,
                Ram(7),
            )
        },
        // Bits 13-20 are address bits 32-39, as many as there are; bit 21 is reserved; 12 is PAT.
        large(40, FAR, Device(FAR)),
        large(40, FAR | 1 << 12, Device(FAR)),
        large(40, FAR | 1 << 13, Device(FAR | 1 << 32)),
        large(40, FAR | 1 << 20, Device(FAR | 1 << 39)),
        large(46, FAR | 1 << 20, Device(FAR | 1 << 39)),
        large(40, FAR | 1 << 21, Fault(9)),
        large(36, FAR | 1 << 16, Device(FAR | 1 << 35)),
        large(36, FAR | 1 << 17, Fault(9)),
        large(32, FAR | 1 << 13, Fault(9)),
    ];
    for (i, t) in cases.iter().enumerate() {
        let code: &[u8] = if t.store {
            &[0x89, 0x03]
        } else {
            &[0x8b, 0x03]
        };
        let mut c = machine(code, t.user);
        phys_bits(&mut c, t.phys);
        word(&mut c, DIRECTORY, IDENTITY | ALL);
        for page in 0..1024 {
            word(&mut c, IDENTITY + page * 4, page << 12 | ALL);
        }
        word(&mut c, DIRECTORY + 4, t.pde);
        word(&mut c, TABLE, t.pte);
        let s = &mut c.cpu.state;
        s.cr3 = DIRECTORY;
        s.cr4 = if t.pse { cr4::PSE } else { 0 };
        s.cr0 |= cr0::PG | cr0::WP;
        assert_eq!(
            outcome(&mut c),
            t.want,
            "case {i} (SDM Vol. 3, {})",
            t.section
        );
        if matches!(t.want, Fault(_)) {
            assert_eq!(c.cpu.state.cr2, AT.into());
        }
    }
}

/// The PAE tables: identity for the first 2 MiB as one page, `pde` for [`AT`]. Paging is not on.
fn pae(c: &mut Computer, pde: u64, nx: bool) {
    c.put64(PDPTES, PAE_DIRECTORY | P);
    c.put64(PAE_DIRECTORY, ALL | PS);
    c.put64(PAE_DIRECTORY + 16, pde);
    let s = &mut c.cpu.state;
    s.cr4 = cr4::PAE;
    s.msr.efer = if nx { efer::NX } else { 0 };
}

/// SDM Vol. 3, 4.4.2: PAE entries.
#[test]
fn pae_entries() {
    let large = |bits: u64| 0x60_0000 | ALL | PS | bits;
    let table = TABLE | ALL;
    let cases: &[(&str, u64, u64, bool, Outcome)] = &[
        ("4.4.2 table 4-9", large(0), 0, true, Device(0x60_0000)),
        (
            "4.4.2 table 4-9",
            large(1 << 12),
            0,
            true,
            Device(0x60_0000),
        ),
        ("4.4.2 table 4-9", large(1 << 13), 0, true, Fault(9)),
        ("4.4.2 table 4-9", large(1 << 20), 0, true, Fault(9)),
        (
            "4.4.2 table 4-9",
            large(1 << 38),
            0,
            true,
            Device(0x60_0000 | 1 << 38),
        ),
        ("4.4.2 table 4-9", large(1 << 40), 0, true, Fault(9)),
        ("4.4.2 table 4-9", large(1 << 52), 0, true, Fault(9)),
        ("4.4.2 table 4-9", large(1 << 62), 0, true, Fault(9)),
        ("4.4.2 table 4-9", large(NX), 0, true, Device(0x60_0000)),
        ("4.4.2 table 4-9", large(NX), 0, false, Fault(9)),
        ("4.4.2 table 4-10", table, FRAME | ALL, true, Ram(7)),
        (
            "4.4.2 table 4-10",
            table | 1 << 52,
            FRAME | ALL,
            true,
            Fault(9),
        ),
        (
            "4.4.2 table 4-10",
            table | 1 << 40,
            FRAME | ALL,
            true,
            Fault(9),
        ),
        (
            "4.4.2 table 4-11",
            table,
            FRAME | ALL | 1 << 62,
            true,
            Fault(9),
        ),
        ("4.4.2 table 4-11", table, FRAME | ALL | 0xf98, true, Ram(7)),
        ("4.4.2 table 4-11", table, FRAME | ALL | NX, false, Fault(9)),
        ("4.7", table, 0, true, Fault(0)),
    ];
    for (i, &(section, pde, pte, nx, want)) in cases.iter().enumerate() {
        let mut c = machine(&[0x8b, 0x03], false);
        phys_bits(&mut c, 40);
        pae(&mut c, pde, nx);
        c.put64(TABLE, pte);
        let s = &mut c.cpu.state;
        s.cr3 = PDPTES;
        s.pdptr[0] = PAE_DIRECTORY | P;
        s.cr0 |= cr0::PG;
        assert_eq!(outcome(&mut c), want, "case {i} (SDM Vol. 3, {section})");
    }
}

/// SDM Vol. 3, 4.4.1: MOV to CR3 loads the PDPTEs and checks them; they count until the next load.
#[test]
fn pdptes() {
    // mov cr3, eax; mov eax, [ebx]
    let code = [0x0f, 0x22, 0xd8, 0x8b, 0x03];
    // Bits of PDPTE 3, which nothing uses.
    let cases = [
        (0, Ram(7)),
        (P, Ram(7)),
        (P | 1 << 3 | 1 << 4, Ram(7)),
        (P | 7 << 9, Ram(7)),
        (P | 1 << 39, Ram(7)),
        (P | 1 << 1, Gp),
        (P | 1 << 2, Gp),
        (P | 1 << 5, Gp),
        (P | 1 << 6, Gp),
        (P | 1 << 7, Gp),
        (P | 1 << 8, Gp),
        (P | 1 << 40, Gp),
        (P | 1 << 52, Gp),
        (P | NX, Gp),
        (1 << 1 | 1 << 40 | NX, Ram(7)),
    ];
    for (i, (bits, want)) in cases.into_iter().enumerate() {
        let mut c = machine(&code, false);
        phys_bits(&mut c, 40);
        pae(&mut c, TABLE | ALL, true);
        c.put64(TABLE, FRAME | ALL);
        c.put64(PDPTES + 24, bits);
        let s = &mut c.cpu.state;
        s.regs[reg::RAX] = PDPTES;
        s.cr3 = 0x1_f000;
        s.pdptr[0] = PAE_DIRECTORY | P;
        s.cr0 |= cr0::PG;
        assert_eq!(outcome(&mut c), want, "case {i} (SDM Vol. 3, 4.4.1)");
        let cr3 = if want == Gp { 0x1_f000 } else { PDPTES };
        assert_eq!(c.cpu.state.cr3, cr3, "case {i}");
    }
    // Gone from memory, still in the register.
    let mut c = machine(&[0x8b, 0x03], false);
    pae(&mut c, TABLE | ALL, true);
    c.put64(TABLE, FRAME | ALL);
    c.put64(PDPTES, 0);
    let s = &mut c.cpu.state;
    s.cr3 = PDPTES;
    s.pdptr[0] = PAE_DIRECTORY | P;
    s.cr0 |= cr0::PG;
    assert_eq!(outcome(&mut c), Ram(7));
}

/// Physical-address bits above MAXPHYADDR are reserved at every level of 4-level paging, those
/// below are not (SDM Vol. 3, 4.1.4).
#[test]
fn maxphyaddr() {
    for bits in [36, 40, 48, 52] {
        let mut m = Paged::new();
        phys_bits(&mut m.c, bits);
        for (level, at) in [TABLES + 8, PDPT, PD, PT].into_iter().enumerate() {
            for (bit, fault) in [(bits - 1, false), (bits, true), (51, bits < 52)] {
                if bit > 51 {
                    continue;
                }
                m.map([ALL, ALL, ALL, FRAME | ALL]);
                let entry = m.c.get64(at) | 1 << bit;
                m.c.put64(at, entry);
                m.set(KERNEL);
                m.c.cpu.state.regs[reg::RBX] = LINEAR;
                m.c.cpu.state.set_rip(0x5000);
                m.c.cpu.io.clear();
                let exit = m.c.run();
                let name = format!("level {level}, bit {bit} of {bits}: {exit:?}");
                if fault {
                    assert!(matches!(exit, Exit::Io { port: 0x99, .. }), "{name}");
                    assert_eq!(m.c.frame()[0], 9, "{name}");
                } else if level == 3 {
                    let gpa = FRAME | 1 << bit;
                    assert_eq!(exit, Exit::MmioRead { gpa, len: 4 }, "{name}");
                } else if !matches!(exit, Exit::MmioRead { .. }) {
                    // A table where there is no RAM reads as ones: a page, or reserved bits.
                    assert_eq!(m.c.frame()[0], 9, "{name}");
                }
            }
        }
    }
}

/// SDM Vol. 3, 4.8: a walk sets A in every entry it uses, a write D in the one that maps the page.
#[test]
fn accessed_and_dirty() {
    let flags = |m: &Paged, at: u64| m.c.get64(at) & (A | D);
    let tables = [TABLES + 8, PDPT, PD, PT];
    for (kind, leaf) in [(Kind::Read, A), (Kind::Fetch, A), (Kind::Write, A | D)] {
        let mut m = Paged::new();
        assert_eq!(m.try_one([ALL, ALL, ALL, FRAME | ALL], kind, KERNEL), None);
        let got = tables.map(|at| flags(&m, at));
        assert_eq!(got, [A, A, A, leaf], "{kind:?}");
        // A denied access sets no D.
        let mut m = Paged::new();
        m.try_one([ALL, ALL, ALL, FRAME | P], Kind::Write, KERNEL);
        assert_eq!(flags(&m, PT) & D, 0, "{kind:?}");
    }
    // A 2 MiB page.
    let mut m = Paged::new();
    m.map([ALL, ALL, ALL, 0]);
    m.c.put64(PD, ALL | PS);
    m.set(KERNEL);
    assert_eq!(m.access(Kind::Write, LINEAR + FRAME), None);
    assert_eq!(
        [TABLES + 8, PDPT, PD].map(|at| flags(&m, at)),
        [A, A, A | D]
    );
}

/// 5-level paging: the PML5 table and its entry's format (SDM Vol. 3, 4.5, tables 4-13 and 4-14).
#[test]
fn five_levels() {
    const PML5: u64 = 0x12_0000;
    for (entry, want) in [
        (TABLES | ALL, None),
        (TABLES | P | U, Some(3)),
        (TABLES | ALL | PS, Some(11)),
        (TABLES | ALL | 1 << 51, Some(11)),
        (TABLES | ALL | 0x7ff << 52, None),
        (0, Some(2)),
    ] {
        let mut m = Paged::new();
        m.map([ALL, ALL, ALL, FRAME | ALL]);
        m.set(KERNEL);
        // Entry 0 for the code, entry 1 for the page under test.
        m.c.put64(PML5, TABLES | ALL);
        m.c.put64(PML5 + 8, entry);
        m.c.cpu.state.cr3 = PML5;
        m.c.cpu.state.cr4 |= cr4::LA57;
        m.c.cpu.state_changed();
        let got = m.access(Kind::Write, LINEAR | 1 << 48);
        assert_eq!(got, want, "{entry:#x}");
    }
}

/// CR2 is the address of the byte that faulted: the second page's first for an access that crosses
/// into it (SDM Vol. 3, 4.7); an error code of a read-modify-write says write.
#[test]
fn cr2() {
    for (code, at, cr2, error) in [
        // mov eax, [rbx]; mov [rbx], eax; add [rbx], eax; cmp [rbx], eax; movups xmm0, [rbx]
        (&[0x8b, 0x03][..], 0xffe, 0x1000, 0),
        (&[0x89, 0x03], 0xfff, 0x1000, 2),
        (&[0x01, 0x03], 0xffd, 0x1000, 2),
        (&[0x01, 0x03], 0x1234, 0x1234, 2),
        (&[0x39, 0x03], 0x1234, 0x1234, 0),
        (&[0x0f, 0x10, 0x03], 0xff8, 0x1000, 0),
        (&[0x0f, 0x11, 0x03], 0xff8, 0x1000, 2),
    ] {
        let mut m = Paged::new();
        m.c.put(0x5000, code);
        m.map([ALL, ALL, ALL, FRAME | ALL]);
        m.set(KERNEL);
        m.c.cpu.state.cr4 |= cr4::OSFXSR;
        let before = m.c.get64(FRAME + 0xff8);
        m.c.cpu.state.regs[reg::RAX] = u64::MAX;
        m.c.cpu.state.regs[reg::RBX] = LINEAR + at;
        m.c.cpu.state.set_rip(0x5000);
        m.c.cpu.state_changed();
        assert!(matches!(m.c.run(), Exit::Io { port: 0x99, .. }));
        assert_eq!(m.c.cpu.state.cr2, LINEAR + cr2, "{code:x?}");
        assert_eq!(m.c.frame()[0], error, "{code:x?}");
        // Nothing was written to the page that is there.
        assert_eq!(m.c.get64(FRAME + 0xff8), before, "{code:x?}");
    }
}
