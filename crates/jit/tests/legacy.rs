//! 32-bit programs, in compatibility mode and in protected mode: interpreted and translated, they must end
//! in the same state.

mod support;

use anykvm_cpu::state::{Segment, cr0, cr4, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::harness::Computer;
use support::{
    ALWAYS, CODE, DATA, assemble_bits, computer, enter_compatibility, finish, same_on, translate,
};

/// A page directory of 4 MiB pages.
const DIRECTORY: u64 = 0x10_0000;
const FS_BASE: u64 = DATA + 0x800;

fn whole_segment(base: u64) -> Segment {
    Segment {
        base,
        limit: u32::MAX,
        attr: 0xc093,
        ..Segment::default()
    }
}

fn with_segments(mut c: Computer) -> Computer {
    let s = &mut c.cpu.state;
    s.seg[usize::from(seg::FS)] = whole_segment(FS_BASE);
    s.seg[usize::from(seg::GS)] = whole_segment(0xffff_f000);
    enter_compatibility(c)
}

/// Compatibility mode.
fn compatibility(code: &[u8]) -> Computer {
    with_segments(computer(code))
}

/// Protected mode with 32-bit paging: the first 4 MiB are mapped at 0 and at the end.
fn protected(code: &[u8]) -> Computer {
    let mut c = computer(code);
    c.put64(DIRECTORY, 0x83);
    c.put(DIRECTORY + 0x3ff * 4, &[0x83, 0, 0, 0]);
    let s = &mut c.cpu.state;
    s.msr.efer = 0;
    s.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP;
    s.cr4 = cr4::PSE | cr4::OSFXSR | cr4::OSXSAVE;
    s.cr3 = DIRECTORY;
    with_segments(c)
}

fn same(build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) {
    let code = assemble_bits(32, CODE, build);
    same_on(ALWAYS, || compatibility(&code));
    same_on(ALWAYS, || protected(&code));
}

#[test]
fn arithmetic_in_a_loop() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 1000)?;
        a.set_label(&mut top)?;
        a.add(eax, ebx)?;
        a.inc(ebp)?;
        a.dec(dx)?;
        a.xor(edx, eax)?;
        a.shl(edx, 3)?;
        a.lea(esi, eax + ecx * 4 - 5)?;
        a.lea(edi, ptr(0xfedc_ba98_u32) + ecx * 8)?;
        a.imul_2(edi, esi)?;
        a.adc(ebp, edi)?;
        a.xchg(edx, eax)?;
        a.mov(dl, ah)?;
        a.rcr(ebx, 3)?;
        a.dec(ecx)?;
        a.jne(top)
    });
}

#[test]
fn loads_and_stores() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ebx, DATA as u32)?;
        a.mov(ecx, 200)?;
        a.set_label(&mut top)?;
        a.mov(eax, dword_ptr(ebx + ecx * 8 + 8))?;
        a.add(eax, edi)?;
        a.mov(dword_ptr(ebx + 8), eax)?;
        a.mov(eax, dword_ptr(DATA as u32 + 16))?;
        a.mov(dword_ptr(DATA as u32 + 20), eax)?;
        a.shl(edx, 3)?;
        a.add(dword_ptr(ebx + 24), 3)?;
        a.movzx(edi, byte_ptr(ebx + 40))?;
        a.cmp(ecx, dword_ptr(ebx + 48))?;
        a.mov(esi, dword_ptr(ebx + 56))?;
        a.setb(dl)?;
        a.inc(word_ptr(ebx + 64))?;
        a.lock().xadd(dword_ptr(ebx + 72), esi)?;
        a.mov(byte_ptr(ebx + ecx), ah)?;
        a.xchg(dword_ptr(ebx + 80), edx)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn addresses_have_32_bits() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 100)?;
        a.set_label(&mut top)?;
        a.mov(ebx, 0x8000_0000_u32)?;
        a.mov(eax, dword_ptr(ebx + ebx + DATA as u32))?;
        a.mov(ebx, 0xffff_fff0_u32)?;
        a.add(dword_ptr(ebx + DATA as i32 + 0x40), eax)?;
        a.lea(esi, ebx + ecx * 8 + DATA as i32)?;
        a.adc(dword_ptr(esi), 1)?;
        a.mov(edx, 0xffff_ffff_u32)?;
        a.xor(eax, dword_ptr(edx * 4 + DATA as i32 + 0x104))?;
        a.mov(dword_ptr(edx + (DATA as i32 + 0x201)), eax)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn fs_and_gs() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 100)?;
        a.set_label(&mut top)?;
        a.mov(eax, dword_ptr(0x10).fs())?;
        a.add(dword_ptr(ecx * 4 + 8).fs(), eax)?;
        // Below the base.
        a.mov(ebx, 0xffff_ff00_u32)?;
        a.sub(dword_ptr(ebx).fs(), ecx)?;
        a.mov(edx, dword_ptr(ebx + ecx + 8).fs())?;
        // Its base is -0x1000.
        a.mov(esi, DATA as u32 + 0x1000)?;
        a.xor(dword_ptr(esi + ecx * 4).gs(), edx)?;
        a.adc(edx, dword_ptr(esi + 0x20).gs())?;
        a.push(dword_ptr(esi + 4).gs())?;
        a.pop(edi)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn calls_and_returns() {
    same(|a| {
        let mut top = a.create_label();
        let mut f = a.create_label();
        let mut g = a.create_label();
        let mut begin = a.create_label();
        a.jmp(begin)?;
        // At CODE + 2.
        a.set_label(&mut f)?;
        a.push(ebp)?;
        a.mov(ebp, esp)?;
        a.push(dword_ptr(ebp + 4))?;
        a.push(dword_ptr(esp))?;
        a.add(ecx, edi)?;
        a.push(esp)?;
        a.pop(edx)?;
        a.test(cl, 1)?;
        a.leave()?;
        a.ret()?;
        a.set_label(&mut g)?;
        a.inc(dword_ptr(esp + 4))?;
        a.ret_1(4)?;
        a.set_label(&mut begin)?;
        a.mov(edi, 500)?;
        a.set_label(&mut top)?;
        a.call(f)?;
        a.mov(eax, CODE as u32 + 2)?;
        a.call(eax)?;
        a.push(0x7fff_0000)?;
        a.push(-3)?;
        a.mov(dword_ptr(DATA as u32), eax)?;
        a.call(dword_ptr(DATA as u32))?;
        a.push(eax)?;
        a.call(g)?;
        a.pop(ebx)?;
        a.pop(ecx)?;
        a.sub(edi, 1)?;
        a.jne(top)
    });
}

/// A branch over the end of the address space.
#[test]
fn the_instruction_pointer_wraps() {
    // At the last page's beginning: jmp over the end, to CODE + 0x40; there: call back, then out.
    let last = 0xffff_f000_u32;
    let there = CODE as u32 + 0x40;
    let code = |base: u32, f: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>| {
        let mut a = CodeAssembler::new(32).unwrap();
        f(&mut a).unwrap();
        a.assemble(base.into()).unwrap()
    };
    // Encoded by hand: the assembler knows no wrap.
    let jump = |from: u32, to: u32, opcode: u8| {
        let mut bytes = vec![opcode];
        bytes.extend(to.wrapping_sub(from.wrapping_add(5)).to_le_bytes());
        bytes
    };
    let build = || {
        let mut c = protected(&code(CODE as u32, &|a| {
            a.mov(ecx, 50)?;
            a.nop()
        }));
        // The last page is the one at 0x3f_f000 of the RAM, which has not so much: its own table instead.
        c.put(DIRECTORY + 0x3ff * 4, &[0x03, 0x10, 0x11, 0]);
        c.put(0x11_1000 + 0x3ff * 4, &[0x03, 0x20, 0x11, 0]);
        let mut at_end = code(last, &|a| {
            a.add(eax, 3)?;
            a.nop()
        });
        let jump_at = last + at_end.len() as u32;
        at_end.extend(jump(jump_at, there, 0xe9));
        c.put(0x11_2000, &at_end);
        let returning = code(last + 0x100, &|a| {
            a.add(edx, eax)?;
            a.ret()
        });
        c.put(0x11_2100, &returning);
        let start = CODE as u32 + 6;
        c.put(start.into(), &jump(start, last, 0xe9));
        c.put(there.into(), &jump(there, last + 0x100, 0xe8));
        let rest = code(there + 5, &|a| {
            a.dec(ecx)?;
            a.db(&[0x75, 0xbe])?;
            a.out(0x99, al)
        });
        c.put(u64::from(there) + 5, &rest);
        c
    };
    same_on(ALWAYS, build);
}

/// A store through FS that its limit, its rights or its absence forbids is the interpreter's #GP.
#[test]
fn segments_that_must_be_checked() {
    let program = assemble_bits(32, CODE, |a| {
        a.mov(ebx, 0x1000)?;
        a.nop()?;
        a.mov(dword_ptr(ebx).fs(), ebx)
    });
    let bad = [
        Segment {
            limit: 0x1002,
            attr: 0x4093,
            ..whole_segment(DATA)
        },
        Segment {
            attr: 0xc091,
            ..whole_segment(DATA)
        },
        Segment {
            attr: 0xc097,
            ..whole_segment(DATA)
        },
        Segment {
            attr: Segment::UNUSABLE,
            ..Segment::default()
        },
    ];
    for segment in bad {
        let mut c = compatibility(&program);
        c.catch_events();
        c.cpu.state.seg[usize::from(seg::FS)] = segment;
        c.cpu.state_changed();
        translate(&mut c, ALWAYS);
        finish(&mut c);
        assert!(c.cpu.state.code64(), "{segment:?}: no exception");
        assert_eq!(c.frame()[0], 0, "the error code");
        assert_eq!(c.frame()[1], CODE + 6, "RIP");
    }
}

/// Accesses that could share a check, at the beginning and the end of the address space and over both.
#[test]
fn shared_checks_wrap_around() {
    let program = |at: u32| {
        assemble_bits(32, CODE, |a| {
            let mut top = a.create_label();
            a.mov(ecx, 40)?;
            a.set_label(&mut top)?;
            a.mov(ebx, at)?;
            a.mov(eax, dword_ptr(ebx))?;
            a.add(dword_ptr(ebx - 8), eax)?;
            a.adc(eax, dword_ptr(ebx + 8))?;
            a.lea(esi, ebx - 0x10)?;
            a.xor(dword_ptr(esi), eax)?;
            a.inc(esi)?;
            a.sub(dword_ptr(esi + 0x20), ecx)?;
            a.add(ebx, 0x18)?;
            a.mov(edx, ebx)?;
            a.rol(dword_ptr(edx), 3)?;
            a.mov(edi, esp)?;
            a.mov(esp, ebx)?;
            a.push(eax)?;
            a.push(dword_ptr(edx + 4))?;
            a.pop(ebp)?;
            a.pop(dx)?;
            a.sub(esp, 4)?;
            a.push(-5)?;
            a.mov(esp, edi)?;
            a.sub(ecx, 1)?;
            a.jne(top)
        })
    };
    let end = 0_u32.wrapping_sub(0x40);
    for from in [0, end, 0xffff_ffe0, DATA as u32 + 0xfe0] {
        for by in (0..0x40).step_by(3) {
            let code = program(from.wrapping_add(by));
            same_on(ALWAYS, || {
                let mut c = protected(&code);
                // Both ends of 4 GiB are the same 4 KiB behind the code.
                c.put(DIRECTORY, &[0x03, 0x10, 0x11, 0]);
                c.put(DIRECTORY + 0x3ff * 4, &[0x03, 0x10, 0x11, 0]);
                for page in 0..0x200_u32 {
                    let entry = page << 12 | 3;
                    c.put(0x11_1000 + u64::from(page) * 4, &entry.to_le_bytes());
                }
                c.put(0x11_1000, &0x11_3003_u32.to_le_bytes());
                c.put(0x11_1000 + 0x3ff * 4, &0x11_4003_u32.to_le_bytes());
                c
            });
        }
    }
}

/// Most accesses of such a loop are not checked by themselves: it is shorter than the same without sharing.
#[test]
fn accesses_share_a_check() {
    use anykvm_cpu::decode::decode;
    use anykvm_jit::translate::{Manner, translate};
    let code = assemble_bits(32, CODE, |a| {
        a.mov(eax, dword_ptr(ebx))?;
        a.add(eax, dword_ptr(ebx + 4))?;
        a.mov(dword_ptr(ebx + 8), eax)?;
        a.push(eax)?;
        a.push(edx)?;
        a.pop(esi)?;
        a.pop(edi)
    });
    let mode = compatibility(&code).cpu.mode();
    let (mut insns, mut at) = (Vec::new(), 0);
    while at < code.len() {
        let insn = decode(&code[at..], mode).unwrap();
        at += usize::from(insn.len);
        insns.push(insn);
    }
    let size = |apart: bool| {
        let manner = Manner {
            first_exit: 0,
            count: false,
            same_each_time: false,
            by_count: false,
            executions: None,
            apart,
            supervisor: true,
            windows: Default::default(),
            user: false,
            recipe: None,
        };
        translate(&insns, CODE % 4096, manner).unwrap().bytes.len()
    };
    assert!(size(false) * 3 < size(true) * 2, "nothing is shared");
}
