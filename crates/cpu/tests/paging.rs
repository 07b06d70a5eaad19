//! Paging: translation, rights, error codes, accessed and dirty flags, and what flushes must
//! (and need not) do (SDM Vol. 3, ch. 4).

mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::exit::Direction;
use anykvm_cpu::state::reg;
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
