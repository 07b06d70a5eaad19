//! Real mode and the way out of it: interrupts, far transfers, segment loads (SDM Vol. 3, ch. 21
//! and 10.9).

mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::state::{Table, cr0, reg, rflags, seg};
use harness::Computer;

fn put16(c: &mut Computer, at: u64, v: u16) {
    c.put(at, &v.to_le_bytes());
}

fn get16(c: &Computer, at: u64) -> u16 {
    c.get64(at) as u16
}

fn vector(c: &mut Computer, n: u64, cs: u16, ip: u16) {
    put16(c, n * 4, ip);
    put16(c, n * 4 + 2, cs);
}

/// SDM Vol. 2, INT n: REAL-ADDRESS-MODE.
#[test]
fn int_and_iret() {
    let mut c = Computer::real(1 << 20, 0x1000);
    vector(&mut c, 0x21, 0x200, 0x10);
    // sti; int 0x21; hlt
    c.put(0x1000, &[0xfb, 0xcd, 0x21, 0xf4]);
    // mov bx, 0x1234; iret
    c.put(0x2010, &[0xbb, 0x34, 0x12, 0xcf]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RBX), 0x1234);
    assert_eq!(c.cpu.state.rip(), 0x1004);
    assert_eq!(c.reg(reg::RSP), 0x7000);
    assert_ne!(c.cpu.state.rflags & rflags::IF, 0);
    assert_eq!(get16(&c, 0x7000 - 6), 0x1003);
    assert_ne!(u64::from(get16(&c, 0x7000 - 2)) & rflags::IF, 0);
}

/// The handler runs with IF and TF clear.
#[test]
fn int_clears_if() {
    let mut c = Computer::real(1 << 20, 0x1000);
    vector(&mut c, 3, 0x200, 0);
    c.put(0x1000, &[0xfb, 0xcc]);
    c.put(0x2000, &[0xf4]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.cpu.state.rflags & rflags::IF, 0);
    assert_eq!(c.cpu.state.seg[usize::from(seg::CS)].selector, 0x200);
}

/// Exceptions push no error code, and faults point at the instruction.
#[test]
fn divide_error_points_at_the_instruction() {
    let mut c = Computer::real(1 << 20, 0x1000);
    vector(&mut c, 0, 0, 0x2000);
    // xor cx, cx; div cx
    c.put(0x1000, &[0x31, 0xc9, 0xf7, 0xf1]);
    c.put(0x2000, &[0xf4]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RSP), 0x6ffa);
    assert_eq!(get16(&c, 0x6ffa), 0x1002);
}

/// No room in the IDT even for #DF: shutdown.
#[test]
fn triple_fault() {
    let mut c = Computer::real(1 << 20, 0x1000);
    c.cpu.state.idtr = Table::default();
    c.put(0x1000, &[0xcd, 0x21]);
    assert_eq!(c.run(), Exit::Shutdown);
}

#[test]
fn far_call_and_return() {
    let mut c = Computer::real(1 << 20, 0x1000);
    // call 0x300:0x4; hlt
    c.put(0x1000, &[0x9a, 4, 0, 0, 3, 0xf4]);
    // retf 2
    c.put(0x3004, &[0xca, 2, 0]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.cpu.state.rip(), 0x1006);
    assert_eq!(c.reg(reg::RSP), 0x7002);
}

/// "Unreal" mode: a load in real mode keeps the limit.
#[test]
fn segment_loads_keep_limits() {
    let mut c = Computer::real(2 << 20, 0x1000);
    c.cpu.state.seg[usize::from(seg::DS)].limit = u32::MAX;
    c.cpu.state_changed();
    // mov ax, 0x10; mov ds, ax; mov ebx, 0x100000; a32 mov byte [ebx], 0x5a; hlt
    c.put(
        0x1000,
        &[
            0xb8, 0x10, 0, 0x8e, 0xd8, 0x66, 0xbb, 0, 0, 0x10, 0, 0x67, 0xc6, 3, 0x5a, 0xf4,
        ],
    );
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(get16(&c, 0x10_0100) as u8, 0x5a);
}

/// LGDT, CR0.PE, a far jump to 32-bit code, data segments, and back again with "unreal" limits.
#[test]
fn into_protected_mode_and_back() {
    let mut c = Computer::real(2 << 20, 0x1000);
    // Null, code32, data32, code16.
    for (i, d) in [
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x0000_9b00_0000_ffffu64,
    ]
    .into_iter()
    .enumerate()
    {
        c.put64(0x800 + i as u64 * 8, d & !(1 << 40));
    }
    put16(&mut c, 0x900, 31);
    c.put(0x902, &0x800u32.to_le_bytes());
    // lgdt [0x900]; mov eax, cr0; or al, 1; mov cr0, eax; jmp 8:0x1100
    c.put(
        0x1000,
        &[
            0x0f, 0x01, 0x16, 0, 9, 0x0f, 0x20, 0xc0, 0x0c, 1, 0x0f, 0x22, 0xc0, 0xea, 0, 0x11, 8,
            0,
        ],
    );
    // mov eax, 0x10; mov ds, eax; mov ss, eax; mov dword [0x100000], 0x12345678; jmp 0x18:0x1200
    c.put(
        0x1100,
        &[
            0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xd0, 0xc7, 5, 0, 0, 0x10, 0, 0x78, 0x56, 0x34,
            0x12, 0xea, 0, 0x12, 0, 0, 0x18, 0,
        ],
    );
    // mov eax, cr0; and al, 0xfe; mov cr0, eax; jmp 0:0x1300
    c.put(
        0x1200,
        &[
            0x0f, 0x20, 0xc0, 0x24, 0xfe, 0x0f, 0x22, 0xc0, 0xea, 0, 0x13, 0, 0,
        ],
    );
    c.put(0x1300, &[0xf4]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.get64(0x10_0000) as u32, 0x1234_5678);
    let s = &c.cpu.state;
    assert_eq!(s.cr0 & cr0::PE, 0);
    assert_eq!(s.seg[usize::from(seg::CS)].selector, 0);
    assert_eq!(s.seg[usize::from(seg::CS)].limit, 0xffff);
    assert_eq!(s.seg[usize::from(seg::DS)].limit, u32::MAX);
    // The accessed flags were set in the table.
    assert_ne!(c.get64(0x808) >> 40 & 1, 0);
    assert_ne!(c.get64(0x810) >> 40 & 1, 0);
}

/// POPF in real mode changes IF and IOPL; PUSHF shows them.
#[test]
fn pushf_popf() {
    let mut c = Computer::real(1 << 20, 0x1000);
    // push 0x3202; popf; pushf; pop ax; hlt
    c.put(0x1000, &[0x68, 0x02, 0x32, 0x9d, 0x9c, 0x58, 0xf4]);
    assert_eq!(c.run(), Exit::Hlt);
    assert_eq!(c.reg(reg::RAX) as u16, 0x3202);
}
