//! Integer instructions where the host cannot be asked: 16-bit code, its wrap-arounds and limits,
//! and string instructions on device memory.

mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::state::{reg, rflags};
use harness::Computer;

const TABLES: u64 = 0x10_0000;
const PTES: u64 = TABLES + 0x3000;
const CODE: u64 = 0x5000;
const HLT: u8 = 0xf4;

/// Real mode at 0:1000h with `code` followed by HLT.
fn real(code: &[u8]) -> Computer {
    let mut c = Computer::real(1 << 20, 0x1000);
    c.put(0x1000, code);
    c.put(0x1000 + code.len() as u64, &[HLT]);
    c
}

/// #GP, #SS and #DE handlers of a real-mode test end in HLT at 3000h + vector * 16.
fn catch(c: &mut Computer) {
    for v in [0u64, 5, 12, 13] {
        c.put(v * 4, &((0x3000 + v * 16) as u32).to_le_bytes());
        c.put(0x3000 + v * 16, &[HLT]);
    }
}

fn caught(c: &mut Computer) -> u64 {
    assert_eq!(c.run(), Exit::Hlt);
    (c.cpu.state.rip() - 1 - 0x3000) / 16
}

fn word(c: &Computer, at: u64) -> u64 {
    c.get64(at) & 0xffff
}

#[test]
fn the_16_bit_stack_wraps() {
    // push ax; pop bx
    let mut c = real(&[0x50, 0x5b]);
    c.cpu.state.regs[reg::RSP] = 0xabcd_0000;
    c.cpu.state.regs[reg::RAX] = 0x1234;
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RSP), 0xabcd_0000);
    assert_eq!(c.reg(reg::RBX), 0x1234);
    assert_eq!(word(&c, 0xfffe), 0x1234);
}

#[test]
fn a_push_across_the_end_of_the_stack_faults() {
    // push ax
    let mut c = real(&[0x50]);
    catch(&mut c);
    c.cpu.state.regs[reg::RSP] = 1;
    // The handler's frame needs a stack that works: #SS there is a shutdown, as on a processor.
    assert_eq!(c.run(), Exit::Shutdown);
    assert_eq!(c.reg(reg::RSP), 1);
}

#[test]
fn near_calls_and_returns_of_16_bits() {
    // call +3; hlt; (pad); target: push bp; mov bp,sp; leave; ret 2
    let mut c = real(&[
        0x6a, 0x55, 0xe8, 0x03, 0x00, 0xf4, 0x90, 0x90, 0x55, 0x89, 0xe5, 0xc9, 0xc2, 0x02, 0x00,
    ]);
    c.cpu.state.regs[reg::RBP] = 0x7777;
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.cpu.state.rip(), 0x1006);
    assert_eq!(c.reg(reg::RSP), 0x7000);
    assert_eq!(c.reg(reg::RBP), 0x7777);
    assert_eq!(word(&c, 0x6ffc), 0x1005);
}

#[test]
fn a_backward_branch_wraps_within_64k() {
    // jmp -0x1003 - 0x10: to 0xfff0
    let mut c = real(&[0xe9, 0xed, 0xef]);
    c.put(0xfff0, &[HLT]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.cpu.state.rip(), 0xfff1);
}

#[test]
fn a_32_bit_branch_beyond_the_limit_faults_first() {
    // mov ecx, 0x12345; call ecx
    let mut c = real(&[0x66, 0xb9, 0x45, 0x23, 0x01, 0x00, 0x66, 0xff, 0xd1]);
    catch(&mut c);
    assert_eq!(caught(&mut c), 13);
    // Only the exception's frame was pushed.
    assert_eq!(c.reg(reg::RSP), 0x7000 - 6);
    assert_eq!(word(&c, 0x7000 - 6), 0x1006);
}

#[test]
fn loops_count_cx() {
    // inc ax; loop -3
    let mut c = real(&[0x40, 0xe2, 0xfd]);
    c.cpu.state.regs[reg::RCX] = 0x5_0003;
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RAX), 3);
    assert_eq!(c.reg(reg::RCX), 0x5_0000);
}

#[test]
fn pusha_and_popa() {
    // pusha; popa
    let mut c = real(&[0x60, 0x61]);
    for n in 0..8 {
        c.cpu.state.regs[n] = 0x1_0000 * u64::from(n) + 0x1100 + u64::from(n);
    }
    c.cpu.state.regs[reg::RSP] = 0x7000;
    let before = c.cpu.state.regs;
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(word(&c, 0x6ffe), 0x1100);
    assert_eq!(word(&c, 0x6ff6), 0x7000);
    assert_eq!(word(&c, 0x6ff0), 0x1107);
    for n in 0..8 {
        assert_eq!(c.reg(n), before[n]);
    }
}

#[test]
fn enter_copies_frame_pointers() {
    // enter 0x10, 3
    let mut c = real(&[0xc8, 0x10, 0x00, 0x03]);
    c.cpu.state.regs[reg::RBP] = 0x6000;
    c.put(0x5ffc, &[0x22, 0x22, 0x11, 0x11]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RBP), 0x6ffe);
    assert_eq!(c.reg(reg::RSP), 0x7000 - 8 - 0x10);
    let frame: Vec<u64> = (1..=4).map(|i| word(&c, 0x7000 - 2 * i)).collect();
    assert_eq!(frame, [0x6000, 0x1111, 0x2222, 0x6ffe]);
}

#[test]
fn string_elements_beyond_64k_fault_with_registers_at_the_element() {
    // rep stosw
    let mut c = real(&[0xf3, 0xab]);
    catch(&mut c);
    c.cpu.state.regs[reg::RAX] = 0x5a5a;
    c.cpu.state.regs[reg::RDI] = 0xfff9;
    c.cpu.state.regs[reg::RCX] = 10;
    assert_eq!(caught(&mut c), 13);
    assert_eq!(c.reg(reg::RDI), 0xffff);
    assert_eq!(c.reg(reg::RCX), 7);
    assert_eq!(c.get64(0xfff9) & 0xffff_ffff_ffff, 0x5a5a_5a5a_5a5a);
    assert_eq!(word(&c, 0x7000 - 6), 0x1000);
}

#[test]
fn byte_strings_wrap_di() {
    // rep movsb
    let mut c = real(&[0xf3, 0xa4]);
    c.put(0x8000, &[1, 2, 3, 4]);
    c.cpu.state.regs[reg::RSI] = 0x8000;
    c.cpu.state.regs[reg::RDI] = 0xfffe;
    c.cpu.state.regs[reg::RCX] = 4;
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RDI), 2);
    assert_eq!(word(&c, 0xfffe), 0x0201);
    assert_eq!(word(&c, 0), 0x0403);
}

#[test]
fn aam_by_zero_and_bound() {
    // aam 0
    let mut c = real(&[0xd4, 0x00]);
    catch(&mut c);
    assert_eq!(caught(&mut c), 0);
    // bound ax, [0x2000]
    let mut c = real(&[0x62, 0x06, 0x00, 0x20]);
    catch(&mut c);
    c.put(0x2000, &[0xff, 0xff, 0x05, 0x00]);
    c.cpu.state.regs[reg::RAX] = 6;
    assert_eq!(caught(&mut c), 5);
    // Below the bounds' upper end, and -1 at the lower one.
    for inside in [5, 0xffff] {
        let mut c = real(&[0x62, 0x06, 0x00, 0x20]);
        c.put(0x2000, &[0xff, 0xff, 0x05, 0x00]);
        c.cpu.state.regs[reg::RAX] = inside;
        assert_eq!(c.run(), Exit::Hlt);
        assert_eq!(c.cpu.state.rip(), 0x1005);
    }
}

/// 64-bit code with linear page 9000h on guest-physical 3000_0000h, where nothing is.
fn with_device(code: &[u8]) -> Computer {
    let mut c = Computer::long(2 << 20, CODE, TABLES);
    c.put64(PTES + 9 * 8, 0x3000_0007);
    c.put(CODE, code);
    c.put(CODE + code.len() as u64, &[HLT]);
    c
}

#[test]
fn rep_movs_to_a_device_stores_element_by_element() {
    // rep movsd
    let mut c = with_device(&[0xf3, 0xa5]);
    c.put(0x8000, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]);
    c.cpu.state.regs[reg::RSI] = 0x8000;
    c.cpu.state.regs[reg::RDI] = 0x9010;
    c.cpu.state.regs[reg::RCX] = 3;
    for n in 0..3u8 {
        assert_eq!(
            c.run(),
            Exit::MmioWrite {
                gpa: 0x3000_0010 + u64::from(n) * 4,
                len: 4,
                data: [n + 1, 0, 0, 0, 0, 0, 0, 0],
            }
        );
        assert_eq!(c.reg(reg::RCX), 2 - u64::from(n));
    }
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RDI), 0x901c);
}

#[test]
fn rep_movs_from_a_device_reads_each_element_once() {
    // rep movsw
    let mut c = with_device(&[0xf3, 0x66, 0xa5]);
    c.cpu.state.regs[reg::RSI] = 0x9000;
    c.cpu.state.regs[reg::RDI] = 0x8000;
    c.cpu.state.regs[reg::RCX] = 3;
    for n in 0..3u8 {
        let gpa = 0x3000_0000 + u64::from(n) * 2;
        assert_eq!(c.run(), Exit::MmioRead { gpa, len: 2 });
        assert_eq!(c.reg(reg::RCX), 3 - u64::from(n));
        assert_eq!(c.cpu.state.rip(), CODE);
        c.cpu.complete_mmio_read(&[n, 0xa0]);
    }
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.get64(0x8000) & 0xffff_ffff_ffff, 0xa002_a001_a000);
}

#[test]
fn repe_cmps_on_a_device_stops_at_the_difference() {
    // repe cmpsb
    let mut c = with_device(&[0xf3, 0xa6]);
    c.put(0x8000, &[7, 8, 9, 9]);
    c.cpu.state.regs[reg::RSI] = 0x8000;
    c.cpu.state.regs[reg::RDI] = 0x9000;
    c.cpu.state.regs[reg::RCX] = 4;
    for (n, v) in [(0, 7u8), (1, 10)] {
        let gpa = 0x3000_0000 + n;
        assert_eq!(c.run(), Exit::MmioRead { gpa, len: 1 });
        c.cpu.complete_mmio_read(&[v]);
    }
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RCX), 2);
    assert_eq!(c.cpu.state.rflags & (rflags::ZF | rflags::CF), rflags::CF);
}

#[test]
fn read_modify_write_of_a_device_is_a_read_and_a_write() {
    // lock add dword [0x9004], 5; cmpxchg [0x9008], ecx
    let mut c = with_device(&[
        0xf0, 0x83, 0x04, 0x25, 0x04, 0x90, 0x00, 0x00, 0x05, 0x0f, 0xb1, 0x0c, 0x25, 0x08, 0x90,
        0, 0,
    ]);
    c.cpu.state.regs[reg::RAX] = 1;
    c.cpu.state.regs[reg::RCX] = 3;
    let mut next = |gpa, found: u8, stored: u8| {
        assert_eq!(c.run(), Exit::MmioRead { gpa, len: 4 });
        c.cpu.complete_mmio_read(&[found, 0, 0, 0]);
        let data = [stored, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(c.run(), Exit::MmioWrite { gpa, len: 4, data });
    };
    next(0x3000_0004, 0x40, 0x45);
    // The comparison fails: the old value is written back.
    next(0x3000_0008, 2, 2);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RAX), 2);
    assert_eq!(c.cpu.state.rflags & rflags::ZF, 0);
}

#[test]
fn popping_into_a_device_and_calling_through_one() {
    // pop qword [0x9000]; call [0x9008]
    let mut c = with_device(&[
        0x8f, 0x04, 0x25, 0, 0x90, 0, 0, 0xff, 0x14, 0x25, 8, 0x90, 0, 0,
    ]);
    c.put64(0x7000, 0x1122);
    c.put(0xa000, &[HLT]);
    let data = 0x1122u64.to_le_bytes();
    let gpa = 0x3000_0000;
    assert_eq!(c.run(), Exit::MmioWrite { gpa, len: 8, data });
    assert_eq!(c.reg(reg::RSP), 0x7008);
    let gpa = gpa + 8;
    assert_eq!(c.run(), Exit::MmioRead { gpa, len: 8 });
    assert_eq!(c.reg(reg::RSP), 0x7008);
    c.cpu.complete_mmio_read(&0xa000u64.to_le_bytes());
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.cpu.state.rip(), 0xa001);
    assert_eq!(c.get64(0x7000), CODE + 14);
}
