//! What must invalidate cached translations (SDM Vol. 3, 4.10.4.1), PCIDs (4.10.1), INVPCID's types and
//! errors (Vol. 2), and the rules for CR3 and CR4.PCIDE (Vol. 2, MOV to CR; Vol. 3, 2.5).

mod harness;

use anykvm_cpu::state::{cr4, reg};
use harness::Computer;

const CODE: u64 = 0x1000;
const DONE: u64 = 0x80;
const GP: u64 = 13;
/// The identity map's PTEs, and the page that is mapped elsewhere: from OLD to NEW.
const PTES: u64 = 0x2_3000;
const OLD: u64 = 0x3_0000;
const NEW: u64 = 0x3_1000;
const G: u64 = 1 << 8;
const DESCRIPTOR: u64 = 0x3_2000;

fn machine(code: &[u8]) -> Computer {
    let mut c = Computer::with_tables64(CODE);
    c.put(CODE, code);
    c.put64(OLD, 1);
    c.put64(NEW, 2);
    c.cpu.state.regs[reg::RBX] = OLD;
    c
}

/// Reads [`OLD`], maps it to [`NEW`], runs `op`, and reads it again: the second value.
fn behind(op: &[u8], global: bool, pcide: bool, registers: &[(u8, u64)]) -> u64 {
    // mov rax, [rbx]; mov [r8], r9; OP; mov rax, [rbx]; int 0x80
    let mut code = vec![0x48, 0x8b, 0x03, 0x4d, 0x89, 0x08];
    code.extend(op);
    code.extend([0x48, 0x8b, 0x03, 0xcd, DONE as u8]);
    let mut c = machine(&code);
    let flags = 7 | if global { G } else { 0 };
    c.put64(PTES + (OLD >> 12) * 8, OLD | flags);
    let s = &mut c.cpu.state;
    s.cr4 |= cr4::PGE | if pcide { cr4::PCIDE } else { 0 };
    s.regs[8] = PTES + (OLD >> 12) * 8;
    s.regs[9] = NEW | flags;
    for (r, v) in registers {
        s.regs[*r] = *v;
    }
    c.cpu.state_changed();
    assert_eq!(c.run_to_handler(), DONE, "{op:x?}");
    c.reg(reg::RAX)
}

/// Name, code, whether the page is global, CR4.PCIDE, registers.
type Row<'a> = (&'a str, &'a [u8], bool, bool, &'a [(u8, u64)]);

/// Each of these must make the second read see the new translation.
#[test]
fn invalidations() {
    // mov rcx, cr3; mov cr3, rcx
    let cr3: &[u8] = &[0x0f, 0x20, 0xd9, 0x0f, 0x22, 0xd9];
    // mov rcx, cr4; xor rcx, 0x80 (PGE); mov cr4, rcx
    let pge: &[u8] = &[
        0x0f, 0x20, 0xe1, 0x48, 0x81, 0xf1, 0x80, 0, 0, 0, 0x0f, 0x22, 0xe1,
    ];
    let invlpg: &[u8] = &[0x0f, 0x01, 0x3b];
    // invpcid rcx, [rdi]
    let invpcid: &[u8] = &[0x66, 0x0f, 0x38, 0x82, 0x0f];
    // mov cr3, rdx
    let load: &[u8] = &[0x0f, 0x22, 0xda];
    let cr3_value = 0x2_0000;
    let rows: &[Row] = &[
        ("4.10.4.1: INVLPG", invlpg, false, false, &[]),
        ("4.10.4.1: INVLPG, global", invlpg, true, false, &[]),
        ("4.10.4.1: INVLPG, PCID", invlpg, false, true, &[]),
        ("4.10.4.1: MOV to CR3", cr3, false, false, &[]),
        ("4.10.4.1: MOV to CR3, PCIDE", cr3, false, true, &[]),
        (
            "4.10.4.1: another PCID",
            load,
            false,
            true,
            &[(reg::RDX, cr3_value | 5)],
        ),
        ("4.10.4.1: CR4.PGE", pge, true, false, &[]),
        (
            "INVPCID 0",
            invpcid,
            false,
            true,
            &[(reg::RCX, 0), (reg::RDI, DESCRIPTOR)],
        ),
        (
            "INVPCID 1",
            invpcid,
            false,
            true,
            &[(reg::RCX, 1), (reg::RDI, DESCRIPTOR)],
        ),
        (
            "INVPCID 2",
            invpcid,
            false,
            true,
            &[(reg::RCX, 2), (reg::RDI, DESCRIPTOR)],
        ),
        (
            "INVPCID 2, global",
            invpcid,
            true,
            true,
            &[(reg::RCX, 2), (reg::RDI, DESCRIPTOR)],
        ),
        (
            "INVPCID 3",
            invpcid,
            false,
            true,
            &[(reg::RCX, 3), (reg::RDI, DESCRIPTOR)],
        ),
    ];
    for (name, op, global, pcide, registers) in rows {
        // The descriptor: PCID 0, the page's address.
        let mut with = vec![0x48, 0xc7, 0xc0, 0, 0, 0, 0];
        // mov rax, 0; mov [DESCRIPTOR], rax; mov [DESCRIPTOR + 8], rbx
        with.extend([0x48, 0x89, 0x04, 0x25]);
        with.extend((DESCRIPTOR as u32).to_le_bytes());
        with.extend([0x48, 0x89, 0x1c, 0x25]);
        with.extend((DESCRIPTOR as u32 + 8).to_le_bytes());
        with.extend(*op);
        assert_eq!(behind(&with, *global, *pcide, registers), 2, "{name}");
    }
}

/// SDM Vol. 3, 4.10.1: translations of one PCID are not used for another; bit 63 of CR3 keeps those of
/// the PCID that is loaded, and is not stored.
#[test]
fn pcids() {
    // mov rax, [rbx]; mov cr3, rdx; mov rcx, [rbx]; mov cr3, rsi; mov rbp, [rbx]; mov rdi, cr3
    let mut c = machine(&[
        0x48, 0x8b, 0x03, 0x0f, 0x22, 0xda, 0x48, 0x8b, 0x0b, 0x0f, 0x22, 0xde, 0x48, 0x8b, 0x2b,
        0x0f, 0x20, 0xdf, 0xcd, DONE as u8,
    ]);
    // A second set of tables, the same but for the page.
    let second = 0x4_0000;
    for (level, at) in [0x4_0000u64, 0x4_1000, 0x4_2000].into_iter().enumerate() {
        c.put64(at, (second + 0x1000 * (level as u64 + 1)) | 7);
    }
    for page in 0..512u64 {
        c.put64(0x4_3000 + page * 8, page << 12 | 7);
    }
    c.put64(0x4_3000 + (OLD >> 12) * 8, NEW | 7);
    let first = c.cpu.state.cr3 | 1;
    let s = &mut c.cpu.state;
    s.cr4 |= cr4::PCIDE;
    s.cr3 = first;
    s.regs[reg::RDX] = second | 2;
    s.regs[reg::RSI] = first | 1 << 63;
    c.cpu.state_changed();
    assert_eq!(c.run_to_handler(), DONE);
    let values = [reg::RAX, reg::RCX, reg::RBP].map(|r| c.reg(r));
    assert_eq!(values, [1, 2, 1]);
    assert_eq!(c.reg(reg::RDI), first);
}

/// INVPCID's errors (SDM Vol. 2): all #GP(0).
#[test]
fn invpcid_errors() {
    // Type, CR4.PCIDE, the descriptor's halves, whether it is valid.
    let rows = [
        (0, true, 5, OLD, true),
        (0, false, 0, OLD, true),
        (0, false, 5, OLD, false),
        (0, true, 0, 1 << 56, false),
        (0, true, 1 << 12, OLD, false),
        (1, true, 5, 1 << 56, true),
        (1, false, 5, 0, false),
        (1, false, 0, 0, true),
        (1, true, 1 << 63, 0, false),
        (2, false, 5, 1 << 56, true),
        (2, true, 1 << 12, 0, false),
        (3, false, 5, 0, true),
        (4, true, 0, 0, false),
        (1 << 32, true, 0, 0, false),
    ];
    for (kind, pcide, low, high, good) in rows {
        let mut c = machine(&[0x66, 0x0f, 0x38, 0x82, 0x0f, 0xcd, DONE as u8]);
        c.put64(DESCRIPTOR, low);
        c.put64(DESCRIPTOR + 8, high);
        let s = &mut c.cpu.state;
        s.cr4 |= if pcide { cr4::PCIDE } else { 0 };
        s.regs[reg::RCX] = kind;
        s.regs[reg::RDI] = DESCRIPTOR;
        c.cpu.state_changed();
        let want = if good { DONE } else { GP };
        assert_eq!(
            c.run_to_handler(),
            want,
            "{kind:#x} {pcide} {low:#x} {high:#x}"
        );
    }
}

/// MOV to CR3 and CR4 in 64-bit mode (SDM Vol. 2, MOV to CR; Vol. 3, 2.5 and 4.1.1).
#[test]
fn control_registers() {
    let cr3 = 0x2_0000;
    // The register, CR4.PCIDE and CR3 before, the value, whether it may be loaded.
    let rows = [
        (3, false, cr3, cr3 | 0xfff, true),
        (3, false, cr3, cr3 | 1 << 63, false),
        (3, true, cr3, cr3 | 1 << 63 | 7, true),
        (3, true, cr3, cr3 | 1 << 52, false),
        (3, false, cr3, cr3 | 1 << 61, false),
        (4, false, cr3, cr4::PAE | cr4::PCIDE, true),
        (4, false, cr3 | 8, cr4::PAE | cr4::PCIDE, false),
        (4, true, cr3 | 8, cr4::PAE | cr4::PCIDE, true),
        (4, true, cr3 | 8, cr4::PAE, true),
        (4, false, cr3, 0, false),
        (4, false, cr3, cr4::PAE | cr4::LA57, false),
        (4, false, cr3, cr4::PAE | 1 << 15, false),
    ];
    for (n, pcide, before, value, good) in rows {
        // mov crn, rax
        let mut c = machine(&[0x0f, 0x22, 0xc0 | n << 3, 0xcd, DONE as u8]);
        let s = &mut c.cpu.state;
        s.cr3 = before;
        s.cr4 = cr4::PAE | if pcide { cr4::PCIDE } else { 0 };
        s.regs[reg::RAX] = value;
        c.cpu.state_changed();
        let want = if good { DONE } else { GP };
        assert_eq!(
            c.run_to_handler(),
            want,
            "CR{n} {before:#x} {value:#x}, {pcide}"
        );
        if n == 3 {
            let kept = if good { value & !(1 << 63) } else { before };
            assert_eq!(c.cpu.state.cr3, kept);
        }
    }
}
