//! Tables of cases for access rights and page-fault error codes: SDM Vol. 3, 4.6 and 4.7, and an
//! enumeration of every combination against the rules of 4.6.1 written down a second time.

mod harness;

use harness::paging::{Entries, FRAME, KERNEL, Kind, NX, P, PS, Paged, Setting, U, USER, W};

const ALL: u64 = P | W | U;

/// A PTE of the page under test.
fn pte(flags: u64) -> Entries {
    [ALL, ALL, ALL, FRAME | flags]
}

struct Case {
    section: &'static str,
    entries: Entries,
    kind: Kind,
    setting: Setting,
    /// `None`: the access succeeds; else the page fault's error code.
    want: Option<u64>,
}

const fn case(
    section: &'static str,
    entries: Entries,
    kind: Kind,
    setting: Setting,
    want: Option<u64>,
) -> Case {
    Case {
        section,
        entries,
        kind,
        setting,
        want,
    }
}

fn run(cases: &[Case]) {
    let mut machine = Paged::new();
    for (i, c) in cases.iter().enumerate() {
        let got = machine.try_one(c.entries, c.kind, c.setting);
        assert_eq!(got, c.want, "case {i} (SDM Vol. 3, {})", c.section);
    }
}

const NO_NX: Setting = Setting {
    nxe: false,
    ..KERNEL
};
const USER_NO_NX: Setting = Setting { nxe: false, ..USER };
const SMEP: Setting = Setting {
    smep: true,
    ..KERNEL
};
const SMEP_NO_NX: Setting = Setting { nxe: false, ..SMEP };

/// Entries that are not present, at each level: P, W/R, U/S and I/D of the error code.
#[test]
fn not_present() {
    use Kind::{Fetch, Read, Write};
    let mut cases = Vec::new();
    for level in 0..4 {
        let mut entries = pte(ALL);
        // Whatever else an entry holds is ignored (4.5, table 4-19: "ignored" with P = 0).
        entries[level] = 0x7fff_ffff_ffff_fffe & !0xf_ffff_ffff_f000;
        for (kind, setting, want) in [
            (Read, KERNEL, 0),
            (Write, KERNEL, 2),
            (Read, USER, 4),
            (Write, USER, 6),
            (Fetch, KERNEL, 16),
            (Fetch, USER, 20),
            // I/D needs EFER.NXE or CR4.SMEP.
            (Fetch, NO_NX, 0),
            (Fetch, USER_NO_NX, 4),
            (Fetch, SMEP_NO_NX, 16),
        ] {
            cases.push(case("4.7", entries, kind, setting, Some(want)));
        }
    }
    run(&cases);
}

/// Reserved bits, level by level (4.5, tables 4-15 to 4-20): RSVD and P together.
#[test]
fn reserved_bits() {
    let with = |level: usize, bits: u64| {
        let mut e = pte(ALL);
        e[level] |= bits;
        e
    };
    // A large page instead of the table: PDPTE for 1 GiB, PDE for 2 MiB; 0 would be the address.
    let huge = |bits: u64| [ALL, ALL | PS | bits, ALL, FRAME | ALL];
    let large = |bits: u64| [ALL, ALL, ALL | PS | bits, FRAME | ALL];
    let fault = |section, entries, want| case(section, entries, Kind::Read, USER, want);
    let mut cases = vec![
        // Above MAXPHYADDR (bit 51 here; the machine has fewer).
        fault("4.5 table 4-15", with(0, 1 << 51), Some(13)),
        fault("4.5 table 4-17", with(1, 1 << 51), Some(13)),
        fault("4.5 table 4-19", with(2, 1 << 51), Some(13)),
        fault("4.5 table 4-20", with(3, 1 << 51), Some(13)),
        // Bits 52-58 are ignored, and so are 59-62 of all but a leaf with CR4.PKE.
        fault("4.5 table 4-15", with(0, 0x7ff << 52), None),
        fault("4.5 table 4-17", with(1, 0x7ff << 52), None),
        fault("4.5 table 4-19", with(2, 0x7ff << 52), None),
        fault("4.5 table 4-20", with(3, 0x7ff << 52), None),
        // PS in a PML4E.
        fault("4.5 table 4-15", with(0, PS), Some(13)),
        // Bit 7 of a PTE is PAT, bit 8 G.
        fault("4.5 table 4-20", with(3, 1 << 7 | 1 << 8), None),
        // XD without EFER.NXE is reserved, at every level.
        case(
            "4.5 table 4-20",
            with(3, NX),
            Kind::Read,
            USER_NO_NX,
            Some(13),
        ),
        case(
            "4.5 table 4-15",
            with(0, NX),
            Kind::Read,
            USER_NO_NX,
            Some(13),
        ),
        case("4.5 table 4-20", with(3, NX), Kind::Read, USER, None),
        // Reserved wins over rights (U/S, W/R): a user write to a read-only supervisor page.
        case(
            "4.7",
            [ALL, ALL, ALL, FRAME | P | 1 << 51],
            Kind::Write,
            USER,
            Some(15),
        ),
        case("4.7", with(3, 1 << 51), Kind::Fetch, USER, Some(29)),
        // Large pages: the address's low bits are reserved, bit 12 (PAT) is not.
        fault("4.5 table 4-18", large(0), Some(13)),
        fault("4.5 table 4-16", huge(0), Some(13)),
    ];
    // `map` adds the address of the next table, which is what makes those two misaligned.
    assert_eq!(harness::paging::PT & 0x1f_e000, 0x11_2000);
    cases.push(case("4.7", large(0), Kind::Write, KERNEL, Some(11)));
    run(&cases);
}

/// Aligned large pages, with and without their PAT bit and reserved low address bits.
#[test]
fn large_pages() {
    let pat = 1 << 12;
    let cases: &[(&str, bool, u64, Option<u64>)] = &[
        ("4.5 table 4-18", false, 0, None),
        ("4.5 table 4-18", false, pat, None),
        ("4.5 table 4-18", false, 1 << 13, Some(13)),
        ("4.5 table 4-18", false, 1 << 20, Some(13)),
        ("4.5 table 4-18", false, 1 << 51, Some(13)),
        ("4.5 table 4-16", true, 0, None),
        ("4.5 table 4-16", true, pat, None),
        ("4.5 table 4-16", true, 1 << 13, Some(13)),
        ("4.5 table 4-16", true, 1 << 29, Some(13)),
        ("4.5 table 4-16", true, 1 << 51, Some(13)),
    ];
    let mut m = Paged::new();
    for (i, &(section, huge, bits, want)) in cases.iter().enumerate() {
        m.map(pte(ALL));
        let at = if huge {
            harness::paging::PDPT
        } else {
            harness::paging::PD
        };
        m.c.put64(at, ALL | PS | bits);
        m.set(USER);
        let linear = harness::paging::LINEAR + FRAME;
        let got = m.access(Kind::Read, linear);
        assert_eq!(got, want, "case {i} (SDM Vol. 3, {section})");
    }
}

/// Rights by level: U/S, R/W and XD of every level count together (4.6.1).
#[test]
fn rights_of_each_level() {
    let mut cases = Vec::new();
    for level in 0..4 {
        let mut without = |bit: u64, kind, setting, want| {
            let mut e = pte(ALL);
            e[level] ^= bit;
            cases.push(case("4.6.1", e, kind, setting, want));
        };
        without(U, Kind::Read, USER, Some(5));
        without(U, Kind::Write, USER, Some(7));
        without(U, Kind::Fetch, USER, Some(21));
        without(U, Kind::Read, KERNEL, None);
        without(W, Kind::Write, USER, Some(7));
        without(W, Kind::Write, KERNEL, Some(3));
        without(W, Kind::Read, USER, None);
        without(NX, Kind::Fetch, USER, Some(21));
        without(NX, Kind::Fetch, KERNEL, Some(17));
        without(NX, Kind::Read, USER, None);
        without(U, Kind::Fetch, SMEP, None);
    }
    run(&cases);
}

/// SDM Vol. 3, 4.6.1, 4.6.2 and 4.7, from the text: whether the access is allowed, else the error
/// code. The translation exists.
fn rules(user_page: bool, writable: bool, xd: bool, kind: Kind, s: Setting) -> Option<u64> {
    let key_denies = s.pke && user_page && kind != Kind::Fetch && {
        let (ad, wd) = (s.pkru & 1 != 0, s.pkru & 2 != 0);
        ad || wd && kind == Kind::Write && (s.wp || s.user)
    };
    let smap_stops = s.smap && !s.ac;
    let allowed = !key_denies
        && match (s.user, kind) {
            (false, Kind::Read) => !user_page || !smap_stops,
            (false, Kind::Write) => (writable || !s.wp) && (!user_page || !smap_stops),
            (false, Kind::Fetch) => !(s.nxe && xd || user_page && s.smep),
            (true, Kind::Read) => user_page,
            (true, Kind::Write) => user_page && writable,
            (true, Kind::Fetch) => user_page && !(s.nxe && xd),
        };
    if allowed {
        return None;
    }
    let mut code = 1;
    code |= u64::from(kind == Kind::Write) << 1;
    code |= u64::from(s.user) << 2;
    code |= u64::from(kind == Kind::Fetch && (s.nxe || s.smep)) << 4;
    code |= u64::from(key_denies) << 5;
    Some(code)
}

/// Every combination of leaf and upper-level rights with CPL, WP, SMEP, SMAP, AC, NXE and PKRU.
#[test]
fn every_combination_follows_the_rules() {
    let mut m = Paged::new();
    let mut n = 0;
    for rights in 0..8u64 {
        let leaf = P | rights << 1 & (W | U) | if rights & 4 != 0 { NX } else { 0 };
        for upper in [ALL, ALL & !W, ALL & !U, ALL | NX] {
            let user_page = leaf & upper & U != 0;
            let writable = leaf & upper & W != 0;
            let xd = (leaf | upper) & NX != 0;
            // Key 5.
            m.map([ALL, ALL, upper, FRAME | leaf | 5 << 59]);
            for bits in 0..64u32 {
                let bit = |n: u32| bits >> n & 1 != 0;
                for (pke, rights) in [(false, 3), (true, 0), (true, 1), (true, 2), (true, 3)] {
                    let s = Setting {
                        user: bit(0),
                        wp: bit(1),
                        smep: bit(2),
                        smap: bit(3),
                        ac: bit(4),
                        nxe: bit(5),
                        pke,
                        pkru: rights,
                    };
                    // XD is reserved then; AC alone means nothing; keys have no say in the rest.
                    if xd && !s.nxe || s.ac && !s.smap || pke && rights != 0 && s.smep {
                        continue;
                    }
                    m.set(Setting {
                        pkru: rights << 10,
                        ..s
                    });
                    for kind in [Kind::Read, Kind::Write, Kind::Fetch] {
                        let got = m.access(kind, harness::paging::LINEAR);
                        let want = rules(user_page, writable, xd, kind, s);
                        assert_eq!(got, want, "{leaf:#x} {upper:#x} {kind:?} {s:?}");
                        // The handler has changed the privilege level.
                        m.set(Setting {
                            pkru: rights << 10,
                            ..s
                        });
                        n += 1;
                    }
                }
            }
        }
    }
    assert!(n > 10_000, "{n}");
}

/// Accesses the processor makes to its tables are supervisor accesses at any CPL, and SMAP holds for
/// them whatever RFLAGS.AC is (4.6): LAR through a GDT in a user page.
#[test]
fn implicit_accesses() {
    let kernel_ac = Setting { ac: true, ..KERNEL };
    for (setting, want) in [
        (KERNEL, Some(1)),
        (kernel_ac, Some(1)),
        (USER, Some(1)),
        (Setting { ac: true, ..USER }, Some(1)),
    ] {
        for smap in [false, true] {
            let mut m = Paged::new();
            // lar eax, [rip]: a selector of the table in the page under test; out 0x77, al
            m.c.put(0x5000, &[0x66, 0xb9, 0x08, 0, 0x0f, 0x02, 0xc1, 0xe6, 0x77]);
            m.map([ALL, ALL, ALL, FRAME | ALL]);
            m.c.put64(FRAME + 8, 0x00af_9b00_0000_ffff);
            m.set(Setting { smap, ..setting });
            // The gates' code segment must be found, so the handler's GDT is the old one.
            let gdt = m.c.cpu.state.gdtr;
            m.c.cpu.state.gdtr.base = harness::paging::LINEAR;
            m.c.cpu.state.set_rip(0x5000);
            m.c.cpu.state_changed();
            let exit = loop {
                match m.c.cpu.run(1) {
                    anykvm_cpu::Exit::Budget => {
                        let e = m.c.cpu.state.events.exception;
                        if e.pending {
                            break Some(u64::from(e.error_code));
                        }
                    }
                    anykvm_cpu::Exit::Io { port: 0x77, .. } => break None,
                    other => panic!("{other:?}"),
                }
            };
            m.c.cpu.state.gdtr = gdt;
            assert_eq!(exit, if smap { want } else { None }, "{setting:?}");
        }
    }
}
