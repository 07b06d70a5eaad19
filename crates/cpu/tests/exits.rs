//! Whatever the guest does, the run loop comes back: with a request that is honoured, or an exit that
//! is completed once.

mod harness;

use anykvm_cpu::exit::Direction;
use anykvm_cpu::state::{cr0, reg, rflags};
use anykvm_cpu::{Exit, requests};
use harness::Computer;
use harness::tables::{CODE3, HANDLERS, IDT, STACK3, gate};

// SDM Vol. 3, 6.15, vector 17: #AC is benign, so an #AC in its own delivery is delivered again.
#[test]
fn an_alignment_check_that_delivers_itself_ends() {
    let mut c = Computer::with_tables(0x1000);
    // MOV EAX, [1]
    c.put(0x1000, &[0xa1, 1, 0, 0, 0]);
    c.put64(IDT + 17 * 8, gate(CODE3, HANDLERS, 0xee, 0));
    c.user();
    c.cpu.state.cr0 |= cr0::AM;
    c.cpu.state.rflags |= rflags::AC;
    c.cpu.state.regs[reg::RSP] = STACK3 - 1;
    c.cpu.state_changed();
    assert_eq!(c.cpu.run(100), Exit::Budget);
    assert_eq!(c.reg(reg::RSP), STACK3 - 1);
    c.cpu.requests().set(requests::KICK);
    assert_eq!(c.cpu.run(u64::MAX), Exit::Request);
}

// KVM API, section 5: port output is complete when KVM_RUN is called again.
#[test]
fn outs_from_device_memory_is_completed() {
    let mut c = Computer::protected(1 << 20, 0x1000);
    // OUTSD; HLT
    c.put(0x1000, &[0x6f, 0xf4]);
    c.cpu.state.regs[reg::RSI] = 0x20_0000;
    c.cpu.state.regs[reg::RDX] = 0x99;
    let read = Exit::MmioRead {
        gpa: 0x20_0000,
        len: 4,
    };
    assert_eq!(c.run(), read);
    c.cpu.complete_mmio_read(&[1, 2, 3, 4]);
    let out = Exit::Io {
        direction: Direction::Out,
        size: 4,
        port: 0x99,
        count: 1,
    };
    assert_eq!(c.run(), out);
    assert_eq!(c.cpu.io.data[..4], [1, 2, 3, 4]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RSI), 0x20_0004);
}

#[test]
fn a_string_that_goes_down_from_the_last_address_moves_on() {
    let mut c = Computer::long(1 << 20, 0x1000, 0x10_000);
    // The last page is mapped like the first.
    for (table, next) in [
        (0x1_0000, 0x1_1007),
        (0x1_1000, 0x1_2007),
        (0x1_2000, 0x1_3007),
    ] {
        c.put64(table + 511 * 8, next);
    }
    c.put64(0x1_3000 + 511 * 8, 0x8_0007);
    // REP STOSB; HLT
    c.put(0x1000, &[0xf3, 0xaa, 0xf4]);
    let s = &mut c.cpu.state;
    s.regs[reg::RAX] = 0x5a;
    s.regs[reg::RDI] = u64::MAX;
    s.regs[reg::RCX] = 3;
    s.rflags |= rflags::DF;
    c.cpu.state_changed();
    assert_eq!(c.cpu.run(1000), Exit::Hlt);
    assert_eq!(c.reg(reg::RDI), u64::MAX - 3);
    assert_eq!(c.get64(0x8_0ff8), 0x5a5a_5a00_0000_0000);
}
