//! Paging: translation, rights, error codes, accessed and dirty flags, and what flushes must
//! (and need not) do (SDM Vol. 3, ch. 4).

mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::exit::Direction;
use anykvm_cpu::state::{cr0, cr4, reg, rflags};
use harness::Computer;

const TABLES: u64 = 0x10_0000;
const PTES: u64 = TABLES + 0x3000;

/// `out dx, al`: leaves with the processor's state as it is.
const OUT: u8 = 0xee;

fn out_exit(port: u16) -> Exit {
    Exit::Io {
        direction: Direction::Out,
        size: 1,
        port,
        count: 1,
    }
}

#[test]
fn accessed_flags_are_set_by_a_fetch() {
    let mut c = Computer::long(2 << 20, 0x5000, TABLES);
    c.put(0x5000, &[OUT]);
    c.cpu.state.regs[reg::RDX] = 0x80;
    assert_eq!(c.run(), out_exit(0x80));
    assert_eq!(c.get64(PTES + 5 * 8) & 0x60, 0x20);
    assert_eq!(c.get64(PTES + 6 * 8) & 0x60, 0);
    assert_eq!(c.cpu.state.rip(), 0x5000);
    // Re-entry completes the output.
    c.put(0x5001, &[OUT]);
    assert_eq!(c.run(), out_exit(0x80));
    assert_eq!(c.cpu.state.rip(), 0x5001);
}

#[test]
fn translate_follows_the_tables() {
    let mut c = Computer::long(2 << 20, 0x5000, TABLES);
    c.put64(PTES + 8 * 8, 0x9007);
    assert_eq!(c.cpu.translate_debug(0x8123), Some(0x9123));
    c.put64(PTES + 8 * 8, 0);
    assert_eq!(c.cpu.translate_debug(0x8123), None);
    assert_eq!(c.cpu.translate_debug(0x4000_0000_0000), None);
}

#[test]
fn code_written_behind_our_back_runs_after_an_epoch() {
    let mut c = Computer::long(2 << 20, 0x5000, TABLES);
    c.cpu.state.regs[reg::RDX] = 0x80;
    c.put(0x5000, &[OUT]);
    c.put(0x5100, &[OUT]);
    assert_eq!(c.run(), out_exit(0x80));
    // RIP is moved: what was pending is dropped.
    c.cpu.state.set_rip(0x5100);
    assert_eq!(c.run(), out_exit(0x80));
    // in al, dx
    c.put(0x5000, &[0xec]);
    c.cpu.state.set_rip(0x5000);
    c.cpu.new_epoch();
    assert_eq!(
        c.run(),
        Exit::Io {
            direction: Direction::In,
            size: 1,
            port: 0x80,
            count: 1
        }
    );
}

/// Without paging there is no TLB flush or CR3 load to notice it at, so every entry must.
#[test]
fn code_written_behind_our_back_runs_at_once_without_paging() {
    let mut c = Computer::protected(2 << 20, 0x5000);
    c.cpu.state.regs[reg::RDX] = 0x80;
    // mov al, N; jmp 0x5010; out dx, al
    c.put(0x5000, &[0xb0, 0, 0xeb, 0x0c]);
    c.put(0x5010, &[OUT]);
    for n in [1, 1, 2, 2, 3] {
        c.put(0x5001, &[n]);
        c.cpu.state.set_rip(0x5000);
        assert_eq!(c.run(), out_exit(0x80));
        assert_eq!(c.reg(reg::RAX), n.into());
    }
}

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const NX: u64 = 1 << 63;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Read,
    Write,
    Fetch,
}

/// One access to a page with these flags; `None`: it succeeds, else the page fault's error code.
fn access(pte: u64, kind: Kind, user: bool, set_up: impl Fn(&mut Computer)) -> Option<u64> {
    let mut c = Computer::long(2 << 20, 0x5000, TABLES);
    c.catch_events();
    c.put64(PTES + 8 * 8, 0x8000 | pte);
    c.put(0x8000, &[0xe6, 0x77]);
    let code: &[u8] = match kind {
        Kind::Read => &[0x8b, 0x03, 0xe6, 0x77],
        Kind::Write => &[0x09, 0x03, 0xe6, 0x77],
        Kind::Fetch => &[0xff, 0xe3],
    };
    c.put(0x5000, code);
    let s = &mut c.cpu.state;
    s.regs[reg::RBX] = 0x8000;
    s.rflags |= rflags::IOPL;
    if user {
        s.seg[1].selector = 0x1b;
        s.seg[1].set_dpl(3);
        s.seg[2].selector = 0x23;
        s.seg[2].set_dpl(3);
    }
    // What the supervisor uses must not be in user pages where SMEP or SMAP is on.
    if !user {
        c.put64(PTES + 5 * 8, 0x5003);
    }
    for page in [6, 0x20, 0x21] {
        c.put64(PTES + page * 8, page << 12 | 3);
    }
    set_up(&mut c);
    c.cpu.state_changed();
    match c.run() {
        Exit::Io { port: 0x77, .. } => None,
        Exit::Io { port: 0x99, .. } => {
            assert_eq!(c.cpu.state.cr2, 0x8000);
            let frame = c.frame();
            let expect = if kind == Kind::Fetch { 0x8000 } else { 0x5000 };
            assert_eq!(frame[1], expect);
            Some(frame[0])
        }
        other => panic!("{other:?}\n{}", c.cpu.dump()),
    }
}

// SDM Vol. 3, 4.6 and 4.7.
#[test]
fn rights_and_error_codes() {
    let plain = |_: &mut Computer| {};
    let wp_off = |c: &mut Computer| c.cpu.state.cr0 &= !cr0::WP;
    let smep = |c: &mut Computer| c.cpu.state.cr4 |= cr4::SMEP;
    let smap = |c: &mut Computer| c.cpu.state.cr4 |= cr4::SMAP;
    let smap_ac = |c: &mut Computer| {
        c.cpu.state.cr4 |= cr4::SMAP;
        c.cpu.state.rflags |= rflags::AC;
    };
    type SetUp = fn(&mut Computer);
    let cases: &[(u64, Kind, bool, SetUp, Option<u64>)] = &[
        (0, Kind::Read, false, plain, Some(0)),
        (0, Kind::Write, false, plain, Some(2)),
        (0, Kind::Read, true, plain, Some(4)),
        (0, Kind::Write, true, plain, Some(6)),
        (0, Kind::Fetch, false, plain, Some(16)),
        (0, Kind::Fetch, true, plain, Some(20)),
        (P, Kind::Read, false, plain, None),
        (P, Kind::Write, false, plain, Some(3)),
        (P, Kind::Write, false, wp_off, None),
        (P | W, Kind::Write, false, plain, None),
        (P | W, Kind::Read, true, plain, Some(5)),
        (P | W | U, Kind::Read, true, plain, None),
        (P | W | U, Kind::Write, true, plain, None),
        (P | U, Kind::Write, true, wp_off, Some(7)),
        (P | U | NX, Kind::Fetch, true, plain, Some(21)),
        (P | NX, Kind::Fetch, false, plain, Some(17)),
        (P | U, Kind::Fetch, true, plain, None),
        (P | U, Kind::Fetch, false, plain, None),
        (P | U, Kind::Fetch, false, smep, Some(17)),
        (P | U | W, Kind::Read, false, smap, Some(1)),
        (P | U | W, Kind::Write, false, smap, Some(3)),
        (P | U | W, Kind::Write, false, smap_ac, None),
        (P | U | 1 << 51, Kind::Read, true, plain, Some(13)),
        (P | U | 1 << 51, Kind::Write, false, plain, Some(11)),
    ];
    for (i, (pte, kind, user, set_up, want)) in cases.iter().enumerate() {
        assert_eq!(access(*pte, *kind, *user, set_up), *want, "case {i}");
    }
}

// SDM Vol. 3, 4.8.
#[test]
fn dirty_flag_is_set_by_the_first_write_only() {
    let mut c = Computer::long(2 << 20, 0x5000, TABLES);
    // mov eax, [rbx]; out; mov [rbx], eax; out
    c.put(0x5000, &[0x8b, 0x03, 0xe6, 0x77, 0x89, 0x03, 0xe6, 0x77]);
    c.cpu.state.regs[reg::RBX] = 0x8000;
    assert_eq!(c.run(), out_exit(0x77));
    assert_eq!(c.get64(PTES + 8 * 8) & 0x60, 0x20);
    assert_eq!(c.run(), out_exit(0x77));
    assert_eq!(c.get64(PTES + 8 * 8) & 0x60, 0x60);
}

// SDM Vol. 3, 4.10.4.1: INVLPG of any address in a large page drops all of it.
#[test]
fn invlpg_drops_every_piece_of_a_large_page() {
    let mut c = Computer::long(8 << 20, 0x5000, TABLES);
    c.catch_events();
    // The second 2 MiB: one large page.
    let pde = TABLES + 0x2000 + 8;
    c.put64(pde, 0x20_0000 | 0x83);
    // mov eax, [rbx]; out 0x77, al; mov [rcx], rdx; invlpg [rsi]; mov eax, [rbx]; out 0x78, al
    c.put(
        0x5000,
        &[
            0x8b, 0x03, 0xe6, 0x77, 0x48, 0x89, 0x11, 0x0f, 0x01, 0x3e, 0x8b, 0x03, 0xe6, 0x78,
        ],
    );
    let s = &mut c.cpu.state;
    s.regs[reg::RBX] = 0x20_3000;
    s.regs[reg::RCX] = pde;
    s.regs[reg::RDX] = 0x40_0000 | 0x83;
    s.regs[reg::RSI] = 0x3f_f000;
    c.put64(0x20_3000, 1);
    c.put64(0x40_3000, 2);
    // The paging structures are reachable by the identity map.
    assert_eq!(c.run(), out_exit(0x77));
    assert_eq!(c.reg(reg::RAX), 1);
    assert_eq!(c.run(), out_exit(0x78));
    assert_eq!(c.reg(reg::RAX), 2);
}

/// A store into the block that runs takes effect at the next instruction.
#[test]
fn self_modifying_code_in_the_same_block() {
    let mut c = Computer::long(2 << 20, 0x5000, TABLES);
    // mov byte [rip+1], 0x78 (the port of the OUT that follows); out 0x77, al
    c.put(
        0x5000,
        &[0xc6, 0x05, 0x01, 0x00, 0x00, 0x00, 0x78, 0xe6, 0x77],
    );
    assert_eq!(c.run(), out_exit(0x78));
    assert_eq!(c.cpu.state.rip(), 0x5007);
}

/// Stores to other bytes of a page that holds code leave the code valid, and are seen.
#[test]
fn data_beside_code() {
    let mut c = Computer::long(2 << 20, 0x5000, TABLES);
    // top: inc qword [0x5800]; dec ecx; jnz top; out 0x77, al
    c.put(
        0x5000,
        &[
            0x48, 0xff, 0x04, 0x25, 0x00, 0x58, 0, 0, 0xff, 0xc9, 0x75, 0xf4, 0xe6, 0x77,
        ],
    );
    c.cpu.state.regs[reg::RCX] = 1000;
    assert_eq!(c.run(), out_exit(0x77));
    assert_eq!(c.get64(0x5800), 1000);
    assert!(c.cpu.counters.decoded < 10, "{:?}", c.cpu.counters);
}
