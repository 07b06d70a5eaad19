//! Alignment checking: SDM Vol. 3, 6.15, vector 17, and table 6-7; #GP of operands that must be
//! aligned in any case: Vol. 2, 2.4. Vector operands are checked as AMD's processors do.

mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::state::{cr0, cr4, reg, rflags};
use harness::Computer;
use harness::tables::HANDLERS;

const CODE: u64 = 0x1000;
const DATA: u64 = 0x8000;
const DONE: u64 = 0x80;
const GP: u64 = 13;
const PF: u64 = 14;
const AC: u64 = 17;

/// What an instruction wants of its operand's address.
#[derive(Clone, Copy, Debug)]
enum Wants {
    /// #AC unless aligned to this.
    Ac(u64),
    /// #GP(0) unless aligned to this, #AC or not.
    Gp(u64),
    /// #AC unless aligned to the first, else #GP(0) unless aligned to the second.
    AcThenGp(u64, u64),
}
use Wants::{Ac, AcThenGp, Gp};
const NEVER: Wants = Ac(1);

impl Wants {
    fn vector(self, address: u64) -> u64 {
        match self {
            Ac(n) if !address.is_multiple_of(n) => AC,
            AcThenGp(n, _) if !address.is_multiple_of(n) => AC,
            Gp(n) | AcThenGp(_, n) if !address.is_multiple_of(n) => GP,
            _ => DONE,
        }
    }
}

/// CPL 3 with CR0.AM and RFLAGS.AC; the code's end is INT 0x80.
fn machine(code: &[u8]) -> Computer {
    let mut c = Computer::with_tables64(CODE);
    c.put(CODE, code);
    c.put(CODE + code.len() as u64, &[0xcd, 0x80]);
    c.user();
    let s = &mut c.cpu.state;
    s.cr0 |= cr0::AM;
    s.cr4 |= cr4::OSXSAVE | cr4::FSGSBASE;
    s.xcr0 = c.cpu.cpuid.xcr0_supported();
    s.rflags |= rflags::AC | rflags::IOPL;
    c
}

/// The vector of the event that ends the code, with RBX, RSI, RDI at an address, and RSP at
/// another.
fn run(c: &mut Computer, at: u64, rsp: u64) -> u64 {
    let code = c.cpu.state.clone();
    let s = &mut c.cpu.state;
    for r in [reg::RBX, reg::RSI, reg::RDI] {
        s.regs[r] = at;
    }
    s.regs[reg::RAX] = 0;
    s.regs[reg::RCX] = 1;
    s.regs[reg::RDX] = 0x510;
    s.regs[reg::RSP] = rsp;
    s.set_rip(CODE);
    c.cpu.state_changed();
    assert_eq!(c.run(), Exit::Hlt, "{}", c.cpu.dump());
    let vector = (c.cpu.state.rip() - HANDLERS) / 16;
    if vector == AC {
        assert_eq!(c.stack64(0), 0, "the error code");
    }
    c.cpu.state = code;
    vector
}

fn avx(code: &'static [u8]) -> Option<&'static [u8]> {
    std::is_x86_feature_detected!("avx2").then_some(code)
}

#[test]
fn operands() {
    let cases: &[(&str, Option<&[u8]>, Wants)] = &[
        ("byte: cmp [rbx], al", Some(&[0x38, 0x03]), NEVER),
        ("word: mov ax, [rbx]", Some(&[0x66, 0x8b, 0x03]), Ac(2)),
        ("dword: mov eax, [rbx]", Some(&[0x8b, 0x03]), Ac(4)),
        ("dword: add [rbx], eax", Some(&[0x01, 0x03]), Ac(4)),
        ("qword: mov rax, [rbx]", Some(&[0x48, 0x8b, 0x03]), Ac(8)),
        ("qword: mov [rbx], rax", Some(&[0x48, 0x89, 0x03]), Ac(8)),
        ("qword: xchg [rbx], rax", Some(&[0x48, 0x87, 0x03]), Ac(8)),
        (
            "lock xadd [rbx], eax",
            Some(&[0xf0, 0x0f, 0xc1, 0x03]),
            Ac(4),
        ),
        ("qword: cmpxchg8b", Some(&[0x0f, 0xc7, 0x0b]), Ac(8)),
        (
            "16 bytes: cmpxchg16b",
            Some(&[0x48, 0x0f, 0xc7, 0x0b]),
            Gp(16),
        ),
        ("movbe eax, [rbx]", Some(&[0x0f, 0x38, 0xf0, 0x03]), Ac(4)),
        ("selector: mov es, [rbx]", Some(&[0x8e, 0x03]), Ac(2)),
        ("selector: mov [rbx], ds", Some(&[0x8c, 0x1b]), Ac(2)),
        ("selector: lar eax, [rbx]", Some(&[0x0f, 0x02, 0x03]), Ac(2)),
        ("selector: verr [rbx]", Some(&[0x0f, 0x00, 0x23]), Ac(2)),
        // The base is aligned, not the limit before it.
        (
            "bit string: bt [rbx], ax",
            Some(&[0x66, 0x0f, 0xa3, 0x03]),
            Ac(2),
        ),
        (
            "bit string: bts [rbx], rax",
            Some(&[0x48, 0x0f, 0xab, 0x03]),
            Ac(8),
        ),
        ("movsq", Some(&[0x48, 0xa5]), Ac(8)),
        ("rep movsd", Some(&[0xf3, 0xa5]), Ac(4)),
        ("rep stosw", Some(&[0xf3, 0x66, 0xab]), Ac(2)),
        ("scasd", Some(&[0xaf]), Ac(4)),
        ("insd", Some(&[0x6d]), Ac(4)),
        ("outsw", Some(&[0x66, 0x6f]), Ac(2)),
        ("prefetcht0 [rbx]", Some(&[0x0f, 0x18, 0x0b]), NEVER),
        ("clflush [rbx]", Some(&[0x0f, 0xae, 0x3b]), NEVER),
        // x87: SDM table 6-7 (single, double, extended real; state).
        ("fld m32", Some(&[0xd9, 0x03]), Ac(4)),
        ("fld m64", Some(&[0xdd, 0x03]), Ac(8)),
        ("fld m80", Some(&[0xdb, 0x2b]), Ac(8)),
        ("fbld m80", Some(&[0xdf, 0x23]), Ac(8)),
        ("fild m16", Some(&[0xdf, 0x03]), Ac(2)),
        ("fnstcw", Some(&[0xd9, 0x3b]), Ac(2)),
        ("fnstenv, 32-bit", Some(&[0xd9, 0x33]), Ac(4)),
        ("fnstenv, 16-bit", Some(&[0x66, 0xd9, 0x33]), Ac(2)),
        ("fnsave, 32-bit", Some(&[0xdd, 0x33]), Ac(4)),
        ("fxsave", Some(&[0x0f, 0xae, 0x03]), AcThenGp(4, 16)),
        ("fxrstor", Some(&[0x0f, 0xae, 0x0b]), AcThenGp(4, 16)),
        ("xsave", Some(&[0x0f, 0xae, 0x23]), Gp(64)),
        ("stmxcsr", Some(&[0x0f, 0xae, 0x1b]), Ac(4)),
        // SSE (Vol. 2, 2.4.1-2.4.5).
        ("movd xmm0, [rbx]", Some(&[0x66, 0x0f, 0x6e, 0x03]), Ac(4)),
        ("movq xmm0, [rbx]", Some(&[0xf3, 0x0f, 0x7e, 0x03]), Ac(8)),
        ("addsd xmm0, [rbx]", Some(&[0xf2, 0x0f, 0x58, 0x03]), Ac(8)),
        (
            "cvtdq2pd xmm0, [rbx]",
            Some(&[0xf3, 0x0f, 0xe6, 0x03]),
            Ac(8),
        ),
        ("movaps xmm0, [rbx]", Some(&[0x0f, 0x28, 0x03]), Gp(16)),
        ("addps xmm0, [rbx]", Some(&[0x0f, 0x58, 0x03]), Gp(16)),
        ("movntps [rbx], xmm0", Some(&[0x0f, 0x2b, 0x03]), Gp(16)),
        ("movups xmm0, [rbx]", Some(&[0x0f, 0x10, 0x03]), Ac(16)),
        ("movups [rbx], xmm0", Some(&[0x0f, 0x11, 0x03]), Ac(16)),
        (
            "vmovups ymm0, [rbx]",
            avx(&[0xc5, 0xfc, 0x10, 0x03]),
            Ac(16),
        ),
        (
            "vmovups [rbx], ymm0",
            avx(&[0xc5, 0xfc, 0x11, 0x03]),
            Ac(16),
        ),
        (
            "vmovaps ymm0, [rbx]",
            avx(&[0xc5, 0xfc, 0x28, 0x03]),
            Gp(32),
        ),
        (
            "vaddps xmm0, xmm1, [rbx]",
            avx(&[0xc5, 0xf0, 0x58, 0x03]),
            Ac(16),
        ),
        (
            "vpcmpeqd ymm1, ymm1, ymm1; vmaskmovps ymm0, ymm1, [rbx]",
            avx(&[0xc5, 0xf5, 0x76, 0xc9, 0xc4, 0xe2, 0x75, 0x2c, 0x03]),
            NEVER,
        ),
        (
            "vpcmpeqd ymm1, ymm1, ymm1; vmaskmovps [rbx], ymm1, ymm0",
            avx(&[0xc5, 0xf5, 0x76, 0xc9, 0xc4, 0xe2, 0x75, 0x2e, 0x03]),
            NEVER,
        ),
    ];
    for (name, code, wants) in cases {
        let Some(code) = code else { continue };
        let mut c = machine(code);
        for at in (DATA..DATA + 17).chain([DATA + 32, DATA + 63, DATA + 64]) {
            let got = run(&mut c, at, 0xc000);
            assert_eq!(got, wants.vector(at), "{name} at {at:#x}");
        }
    }
}

/// Pushes and pops of CPL 3 are checked; the frame that an event pushes on the inner stack and the
/// tables it reads are not (SDM Vol. 3, 6.15, vector 17).
#[test]
fn stack() {
    let cases: &[(&str, &[u8], u64)] = &[
        ("push rax", &[0x50], 8),
        ("push ax", &[0x66, 0x50], 2),
        ("pop rax", &[0x58], 8),
        ("call +0", &[0xe8, 0, 0, 0, 0], 8),
        ("enter 0, 0", &[0xc8, 0, 0, 0], 8),
        ("pushfq", &[0x9c], 8),
        ("leave (RBP = RSP)", &[0x48, 0x89, 0xe5, 0xc9], 8),
    ];
    for (name, code, alignment) in cases {
        let mut c = machine(code);
        for rsp in 0xc000..0xc009 {
            let want = if rsp % alignment == 0 { DONE } else { AC };
            assert_eq!(run(&mut c, DATA, rsp), want, "{name} at {rsp:#x}");
        }
    }
}

/// Where checking is off: CPL 0, CR0.AM clear, RFLAGS.AC clear.
#[test]
fn conditions() {
    for (cpl0, am, ac, want) in [
        (false, true, true, AC),
        (true, true, true, DONE),
        (false, false, true, DONE),
        (false, true, false, DONE),
    ] {
        let mut c = machine(&[0x8b, 0x03]);
        let s = &mut c.cpu.state;
        if cpl0 {
            for segment in &mut s.seg[..6] {
                segment.set_dpl(0);
            }
            (s.seg[1].selector, s.seg[2].selector) = (8, 0x10);
        }
        if !am {
            s.cr0 &= !cr0::AM;
        }
        if !ac {
            s.rflags &= !rflags::AC;
        }
        let got = run(&mut c, DATA + 1, 0xc000);
        assert_eq!(got, want, "CPL 0 {cpl0}, AM {am}, AC {ac}");
    }
}

/// Before page faults, behind non-canonical addresses; and a misaligned INS reads no port.
#[test]
fn priorities() {
    let mut c = machine(&[0x8b, 0x03]);
    let missing = 4 << 20;
    assert_eq!(run(&mut c, missing + 1, 0xc000), AC);
    assert_eq!(run(&mut c, missing, 0xc000), PF);
    assert_eq!(run(&mut c, (1 << 47) + 1, 0xc000), GP);
    // addps at an address that is not there: #GP for alignment comes first.
    let mut c = machine(&[0x0f, 0x58, 0x03]);
    assert_eq!(run(&mut c, missing + 8, 0xc000), GP);
    // An exit to user space for the port would be no HLT.
    let mut c = machine(&[0x66, 0xba, 0x77, 0, 0x6d]);
    assert_eq!(run(&mut c, DATA + 2, 0xc000), AC);
}

/// SGDT with CR4.UMIP clear: the limit may lie before an aligned base (SDM Vol. 3, 3.5.1).
#[test]
fn sgdt() {
    let mut c = machine(&[0x0f, 0x01, 0x03]);
    for at in DATA..DATA + 9 {
        let want = if at % 4 == 2 { DONE } else { AC };
        assert_eq!(run(&mut c, at, 0xc000), want, "{at:#x}");
    }
}
