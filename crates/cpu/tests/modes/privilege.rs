//! Which system instruction may run where. The columns are the "Exceptions" sections at each
//! instruction's page in SDM Vol. 2 (protected, real-address, virtual-8086, compatibility and
//! 64-bit mode) and the privileged instructions of SDM Vol. 3, 6.9.

use anykvm_cpu::state::{cr4, reg};

use crate::harness::Computer;
use crate::machine::*;

/// The columns: real, virtual-8086 with IOPL 0, protected CPL 0 and 3, compatibility CPL 0 and 3,
/// 64-bit CPL 0 and 3. `-`: it completes, `U`: #UD, `G`: #GP(0).
const COLUMNS: [At; 8] = [
    Real,
    V86(0),
    Prot32(0),
    Prot32(3),
    Compat32(0),
    Compat32(3),
    Long(0),
    Long(3),
];

/// Instruction, its bytes, its ends in [`COLUMNS`].
type Row = (&'static str, &'static [u8], &'static str);

/// `[mem]` is [BX] with 16-bit addresses, else [EDI]: zeros. Registers are 0 unless [`set_up`]
/// says otherwise.
const TABLE: &[Row] = &[
    // Flags and interrupts: IOPL 0 (SDM Vol. 2, tables 3-7 and 4-19).
    ("CLI", &[0xfa], "-G-G-G-G"),
    ("STI", &[0xfb], "-G-G-G-G"),
    // In virtual-8086 mode INT n is #GP(0) with IOPL 0 (SDM Vol. 3, 20.2.7).
    ("PUSHF", &[0x9c], "-G------"),
    ("POPF", &[0x9c, 0x9d], "-G------"),
    // Ports: IOPL 0 and no bitmap (SDM Vol. 1, 19.5).
    ("IN AL, DX", &[0xec], "-G-G-G-G"),
    ("OUT DX, AL", &[0xee], "-G-G-G-G"),
    // Caches.
    ("INVD", &[0x0f, 0x08], "-G-G-G-G"),
    ("WBINVD", &[0x0f, 0x09], "-G-G-G-G"),
    ("WBNOINVD", &[0xf3, 0x0f, 0x09], "-G-G-G-G"),
    ("CLFLUSH [mem]", &[0x0f, 0xae, 0x3f], "--------"),
    ("CLFLUSHOPT [mem]", &[0x66, 0x0f, 0xae, 0x3f], "--------"),
    ("CLWB [mem]", &[0x66, 0x0f, 0xae, 0x37], "--------"),
    ("CLDEMOTE [mem]", &[0x0f, 0x1c, 0x07], "--------"),
    ("PREFETCHW [mem]", &[0x0f, 0x0d, 0x0f], "--------"),
    ("MFENCE", &[0x0f, 0xae, 0xf0], "--------"),
    ("SFENCE", &[0x0f, 0xae, 0xf8], "--------"),
    ("LFENCE", &[0x0f, 0xae, 0xe8], "--------"),
    ("SERIALIZE", &[0x0f, 0x01, 0xe8], "--------"),
    ("MOVDIRI [mem], EAX", &[0x0f, 0x38, 0xf9, 0x07], "--------"),
    // Descriptor tables.
    ("SGDT [mem]", &[0x0f, 0x01, 0x07], "--------"),
    ("SIDT [mem]", &[0x0f, 0x01, 0x0f], "--------"),
    ("LGDT [mem]", &[0x0f, 0x01, 0x17], "-G-G-G-G"),
    ("LIDT [mem]", &[0x0f, 0x01, 0x1f], "-G-G-G-G"),
    ("SLDT AX", &[0x0f, 0x00, 0xc0], "UU------"),
    ("STR AX", &[0x0f, 0x00, 0xc8], "UU------"),
    ("LLDT AX", &[0x0f, 0x00, 0xd0], "UU-G-G-G"),
    ("LTR AX", &[0x0f, 0x00, 0xd8], "UUGGGGGG"),
    ("VERR AX", &[0x0f, 0x00, 0xe0], "UU------"),
    ("VERW AX", &[0x0f, 0x00, 0xe8], "UU------"),
    ("LAR EAX, AX", &[0x0f, 0x02, 0xc0], "UU------"),
    ("LSL EAX, AX", &[0x0f, 0x03, 0xc0], "UU------"),
    ("ARPL or MOVSXD", &[0x63, 0xc0], "UU------"),
    // Control registers.
    ("SMSW AX", &[0x0f, 0x01, 0xe0], "--------"),
    ("LMSW AX", &[0x0f, 0x01, 0xf0], "-G-G-G-G"),
    ("CLTS", &[0x0f, 0x06], "-G-G-G-G"),
    ("MOV EAX, CR0", &[0x0f, 0x20, 0xc0], "-G-G-G-G"),
    ("MOV EAX, CR1", &[0x0f, 0x20, 0xc8], "UUUUUUUU"),
    ("MOV EAX, CR2", &[0x0f, 0x20, 0xd0], "-G-G-G-G"),
    ("MOV EAX, CR3", &[0x0f, 0x20, 0xd8], "-G-G-G-G"),
    ("MOV EAX, CR4", &[0x0f, 0x20, 0xe0], "-G-G-G-G"),
    ("MOV EAX, CR5", &[0x0f, 0x20, 0xe8], "UUUUUUUU"),
    ("MOV EAX, CR6", &[0x0f, 0x20, 0xf0], "UUUUUUUU"),
    ("MOV EAX, CR7", &[0x0f, 0x20, 0xf8], "UUUUUUUU"),
    ("MOV CR2, EAX", &[0x0f, 0x22, 0xd0], "-G-G-G-G"),
    ("MOV CR1, EAX", &[0x0f, 0x22, 0xc8], "UUUUUUUU"),
    // ModRM.mod does not matter: still a register.
    ("MOV EAX, CR0 (mod 0)", &[0x0f, 0x20, 0x00], "-G-G-G-G"),
    ("MOV EAX, CR0 (mod 1)", &[0x0f, 0x20, 0x40], "-G-G-G-G"),
    ("MOV EAX, DR0", &[0x0f, 0x21, 0xc0], "-G-G-G-G"),
    ("MOV DR0, EAX", &[0x0f, 0x23, 0xc0], "-G-G-G-G"),
    ("INVLPG [mem]", &[0x0f, 0x01, 0x3f], "-G-G-G-G"),
    ("INVLPG EDI", &[0x0f, 0x01, 0xff], "UUUUUUUU"),
    (
        "INVPCID EAX, [mem]",
        &[0x66, 0x0f, 0x38, 0x82, 0x07],
        "-G-G-G-G",
    ),
    ("XGETBV", &[0x0f, 0x01, 0xd0], "--------"),
    ("XSETBV", &[0x0f, 0x01, 0xd1], "-G-G-G-G"),
    ("CLAC", &[0x0f, 0x01, 0xca], "-U-U-U-U"),
    ("STAC", &[0x0f, 0x01, 0xcb], "-U-U-U-U"),
    // MSRs and counters.
    ("RDMSR", &[0x0f, 0x32], "-G-G-G-G"),
    ("WRMSR", &[0x0f, 0x30], "-G-G-G-G"),
    ("RDTSC", &[0x0f, 0x31], "--------"),
    ("RDTSCP", &[0x0f, 0x01, 0xf9], "--------"),
    ("RDPMC", &[0x0f, 0x33], "GGGGGGGG"),
    ("RDPID EAX", &[0xf3, 0x0f, 0xc7, 0xf8], "--------"),
    ("CPUID", &[0x0f, 0xa2], "--------"),
    // Segment bases are for 64-bit code.
    ("SWAPGS", &[0x0f, 0x01, 0xf8], "UUUUUU-G"),
    ("RDFSBASE EAX", &[0xf3, 0x0f, 0xae, 0xc0], "UUUUUU--"),
    ("RDGSBASE EAX", &[0xf3, 0x0f, 0xae, 0xc8], "UUUUUU--"),
    ("WRFSBASE EAX", &[0xf3, 0x0f, 0xae, 0xd0], "UUUUUU--"),
    ("WRGSBASE EAX", &[0xf3, 0x0f, 0xae, 0xd8], "UUUUUU--"),
    // As KVM treats them: hypercalls whatever the mode; MONITOR and MWAIT do nothing.
    ("VMCALL", &[0x0f, 0x01, 0xc1], "--------"),
    ("VMMCALL", &[0x0f, 0x01, 0xd9], "--------"),
    ("MONITOR", &[0x0f, 0x01, 0xc8], "-U-U-U-U"),
    ("MWAIT", &[0x0f, 0x01, 0xc9], "-U-U-U-U"),
    ("RSM", &[0x0f, 0xaa], "UUUUUUUU"),
    ("HLT", &[0xf4], "HGHGHGHG"),
    // SYSENTER and SYSEXIT with a null IA32_SYSENTER_CS on an Intel processor.
    ("SYSENTER", &[0x0f, 0x34], "GGGGGGGG"),
    ("SYSEXIT", &[0x0f, 0x35], "GGGGGGGG"),
];

/// The same instructions without the CR4 bit they need.
const WITHOUT_CR4: &[Row] = &[
    ("XGETBV", &[0x0f, 0x01, 0xd0], "UUUUUUUU"),
    ("XSETBV", &[0x0f, 0x01, 0xd1], "UUUUUUUU"),
    ("RDFSBASE EAX", &[0xf3, 0x0f, 0xae, 0xc0], "UUUUUUUU"),
    ("WRGSBASE EAX", &[0xf3, 0x0f, 0xae, 0xd8], "UUUUUUUU"),
];

/// With CR4.UMIP (SDM Vol. 3, 2.5) and CR4.TSD.
const RESTRICTED: &[Row] = &[
    ("SGDT [mem]", &[0x0f, 0x01, 0x07], "-G-G-G-G"),
    ("SIDT [mem]", &[0x0f, 0x01, 0x0f], "-G-G-G-G"),
    ("SLDT AX", &[0x0f, 0x00, 0xc0], "UU-G-G-G"),
    ("STR AX", &[0x0f, 0x00, 0xc8], "UU-G-G-G"),
    ("SMSW AX", &[0x0f, 0x01, 0xe0], "-G-G-G-G"),
    ("RDTSC", &[0x0f, 0x31], "-G-G-G-G"),
    ("RDTSCP", &[0x0f, 0x01, 0xf9], "-G-G-G-G"),
    ("RDPID EAX", &[0xf3, 0x0f, 0xc7, 0xf8], "--------"),
];

fn set_up(c: &mut Computer, name: &str) {
    vendor(c, false);
    let r = &mut c.cpu.state.regs;
    r[reg::RBX] = 0x8000;
    r[reg::RDI] = 0x8000;
    r[reg::RDX] = 0;
    // A table that keeps the tests' own in force.
    match name {
        "LGDT [mem]" => table(c, c.cpu.state.gdtr.base, c.cpu.state.gdtr.limit),
        "LIDT [mem]" => table(c, c.cpu.state.idtr.base, c.cpu.state.idtr.limit),
        "LMSW AX" => c.cpu.state.regs[reg::RAX] = c.cpu.state.cr0 & 15,
        // A port of the machine's own.
        "IN AL, DX" | "OUT DX, AL" => c.cpu.state.regs[reg::RDX] = 0x550,
        // XCR0 as it is.
        "XSETBV" => c.cpu.state.regs[reg::RAX] = 1,
        // IA32_PAT, which takes the value 0.
        "RDMSR" | "WRMSR" => c.cpu.state.regs[reg::RCX] = 0x277,
        _ => {}
    }
}

fn table(c: &mut Computer, base: u64, limit: u16) {
    c.put(0x8000, &limit.to_le_bytes());
    c.put(0x8002, &base.to_le_bytes());
}

fn want(column: u8, at: At) -> End {
    let end = match column {
        b'U' => UD,
        b'G' => GP0,
        b'H' => Halt,
        _ => Done,
    };
    if at == Real { in_real(end) } else { end }
}

fn check(rows: &[Row], cr4_bits: u64) {
    let mut wrong = Vec::new();
    for (name, bytes, columns) in rows {
        for (at, column) in COLUMNS.into_iter().zip(columns.bytes()) {
            let mut c = computer(at, bytes);
            set_up(&mut c, name);
            set_cr4(&mut c, cr4_bits);
            let got = end(&mut c);
            if got != want(column, at) {
                wrong.push(format!(
                    "{name} in {at:?}: {got:?}, not {column}",
                    column = column as char
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_system_instruction_in_every_mode() {
    check(TABLE, CR4_ALL);
}

#[test]
fn without_the_enabling_bits() {
    check(WITHOUT_CR4, 0);
}

#[test]
fn with_umip_and_tsd() {
    check(RESTRICTED, cr4::UMIP | cr4::TSD);
}
