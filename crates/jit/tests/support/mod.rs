//! Programs that are run by the interpreter and by translated code.

#![allow(dead_code)] // Each test file uses its part of it.

#[path = "../../../cpu/tests/harness/mod.rs"]
pub mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::state::{cr4, reg, seg};
use anykvm_jit::{Jit, Options};
use harness::Computer;
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;

/// Where programs begin.
pub const CODE: u64 = 0x5000;
/// Memory for them: 0x2000 bytes.
pub const DATA: u64 = 0x8000;
/// Room for a large program.
pub const LARGE: u64 = 0x2_0000;
const TABLES: u64 = 0x10_0000;

/// Everything is translated before it runs.
pub const ALWAYS: Options = Options {
    cache: 4 << 20,
    threshold: 1,
    count: false,
    lockstep: false,
    by_count: false,
};

/// A computer with a program, some data, and registers that differ.
pub fn computer(code: &[u8]) -> Computer {
    let mut c = Computer::long(2 << 20, CODE, TABLES);
    // Whatever the environment says of other tests.
    c.cpu.set_translator(None);
    c.put(CODE, code);
    for i in 0..0x2000 / 8 {
        c.put64(DATA + i * 8, i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    for r in 0..16u8 {
        if r != 4 {
            c.cpu.state.regs[r] = 0x0123_4567_89ab_cdef_u64.rotate_left(u32::from(r) * 7);
        }
    }
    c.cpu.state.cr4 |= cr4::OSXSAVE;
    c.cpu.state.xcr0 = 7;
    c.cpu.state_changed();
    c
}

/// The same for a program in compatibility mode.
pub fn compatibility(code: &[u8]) -> Computer {
    enter_compatibility(computer(code))
}

/// From here on the computer's code is 32-bit code, and the upper halves of its registers are clear.
pub fn enter_compatibility(mut c: Computer) -> Computer {
    c.cpu.state.seg[usize::from(seg::CS)].attr = 0xc09b;
    for n in 0..16 {
        c.cpu.state.regs[n] &= 0xffff_ffff;
    }
    c.cpu.state_changed();
    c
}

/// Gives the computer's processor a translator.
pub fn translate(c: &mut Computer, options: Options) {
    c.cpu
        .set_translator(Some(Box::new(Jit::new(options).unwrap())));
}

/// The bytes of a program, which ends by `out 0x99, al`.
pub fn assemble(build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    assemble_at(CODE, build)
}

/// The same for a program that begins somewhere else.
pub fn assemble_at(
    at: u64,
    build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    assemble_bits(64, at, build)
}

/// The same for code of another size.
pub fn assemble_bits(
    bits: u32,
    at: u64,
    build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    build(&mut a).unwrap();
    a.out(0x99, iced_x86::code_asm::al).unwrap();
    a.assemble(at).unwrap()
}

/// Runs a program to its end.
pub fn finish(c: &mut Computer) {
    let exit = c.cpu.run(u64::MAX);
    assert!(matches!(exit, Exit::Io { port: 0x99, .. }), "{exit:?}");
}

/// Runs a program in both ways: the state and memory must be the same in the end.
pub fn same(build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) {
    same_with(ALWAYS, build);
}

/// The same with other options.
pub fn same_with(options: Options, build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) {
    let code = assemble(build);
    same_on(options, || computer(&code));
}

/// Runs a computer's program in both ways.
pub fn same_on(options: Options, computer: impl Fn() -> Computer) {
    let mut one = computer();
    finish(&mut one);
    let mut two = computer();
    translate(&mut two, options);
    finish(&mut two);
    assert!(one.cpu.counters.blocks > 0);
    if options.threshold == 1 && options.cache == ALWAYS.cache {
        assert_eq!(two.cpu.counters.blocks, 0, "blocks were interpreted");
    }
    compare(&one, &two);
}

/// Runs a computer's program in both ways, and returns the translated one: no more instructions than `left` may
/// have been left to the interpreter.
pub fn mostly_translated(left: u64, computer: impl Fn() -> Computer) -> Computer {
    let [mut one, mut two] = [computer(), computer()];
    finish(&mut one);
    translate(&mut two, ALWAYS);
    finish(&mut two);
    compare(&one, &two);
    let stats = two.cpu.translator_stats().unwrap();
    assert!(stats.left <= left, "{} left to the interpreter", stats.left);
    two
}

/// Runs a computer's program, which ends with an exception, in both ways: what the handler finds on its stack must
/// be the same, and is returned.
pub fn same_exception(computer: impl Fn() -> Computer) -> [u64; 6] {
    let run = |options: Option<Options>| {
        let mut c = computer();
        c.catch_events();
        if let Some(options) = options {
            translate(&mut c, options);
        }
        finish(&mut c);
        c
    };
    let (one, two) = (run(None), run(Some(ALWAYS)));
    // The handler's stack ends at 0x6800.
    assert_eq!(one.reg(reg::RSP) >> 8, 0x67, "no exception");
    assert_eq!(one.frame(), two.frame());
    compare(&one, &two);
    two.frame()
}

/// The page-table entry of a linear page, in the tables [`computer`] makes.
pub fn entry(linear: u64) -> u64 {
    TABLES + 0x3000 + (linear >> 12) * 8
}

/// Runs a program in both ways to its end or its first exception, all exits on the way included.
/// Everything must be the same, the exception's frame too.
pub fn same_exits(
    prepare: impl Fn(&mut Computer),
    build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) {
    let code = assemble(build);
    let run = |translated: bool| {
        let mut c = computer(&code);
        c.catch_events();
        prepare(&mut c);
        c.cpu.state_changed();
        if translated {
            translate(&mut c, ALWAYS);
        }
        let mut exits = Vec::new();
        for _ in 0..10_000 {
            let exit = c.cpu.run(u64::MAX);
            let done = matches!(exit, Exit::Io { port: 0x99, .. });
            exits.push(format!("{exit:?}"));
            if done {
                return (c, exits);
            }
        }
        panic!("it does not end: {:?}", &exits[..10]);
    };
    let (one, exits) = run(false);
    let (two, others) = run(true);
    assert_eq!(exits, others);
    assert_eq!(one.frame(), two.frame());
    assert_eq!(one.cpu.state.cr2, two.cpu.state.cr2);
    compare(&one, &two);
}

/// Registers, flags, vector registers, stack and data are the same.
pub fn compare(one: &Computer, two: &Computer) {
    let (s, t) = (&one.cpu.state, &two.cpu.state);
    for r in 0..17 {
        assert_eq!(s.regs[r], t.regs[r], "register {r}");
    }
    assert_eq!(s.rflags, t.rflags);
    for (i, (a, b)) in s.xsave.0.iter().zip(&t.xsave.0).enumerate() {
        assert_eq!(a, b, "XSAVE area, byte {i}");
    }
    for at in (CODE..DATA + 0x2000).step_by(8) {
        assert_eq!(one.get64(at), two.get64(at), "memory at {at:#x}");
    }
}
