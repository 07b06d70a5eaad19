//! System instructions in translated code: what they change, and what is known around them.

mod support;

use anykvm_cpu::state::{cr4, rflags, seg};
use harness::Computer;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{ALWAYS, DATA, assemble, compare, computer, finish, harness, translate};

/// Runs a program in both ways, after the same preparations; the translated one's computer.
fn same_after(
    prepare: impl Fn(&mut Computer),
    build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Computer {
    let code = assemble(build);
    let [mut one, mut two] = [computer(&code), computer(&code)];
    for c in [&mut one, &mut two] {
        prepare(c);
        c.cpu.state_changed();
    }
    finish(&mut one);
    translate(&mut two, ALWAYS);
    finish(&mut two);
    compare(&one, &two);
    for n in [seg::FS, seg::GS] {
        let [a, b] = [&one, &two].map(|c| c.cpu.state.seg[usize::from(n)].base);
        assert_eq!(a, b);
    }
    let [a, b] = [&one, &two].map(|c| c.cpu.state.msr.kernel_gs_base);
    assert_eq!(a, b);
    two
}

#[test]
fn flags_are_pushed_whole() {
    let prepare = |c: &mut Computer| {
        c.cpu.state.rflags |= rflags::IF | rflags::DF | rflags::ID | 1 << 12;
    };
    let c = same_after(prepare, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 64)?;
        a.set_label(&mut top)?;
        a.add(rax, rbx)?;
        a.pushfq()?;
        a.pop(rdx)?;
        a.adc(rsi, rdx)?;
        a.pushfq()?;
        a.xor(rdi, qword_ptr(rsp))?;
        a.pop(r11)?;
        a.cmp(eax, esi)?;
        a.mov(qword_ptr(DATA), rdx)?;
        a.pushfq()?;
        a.pop(r10)?;
        a.rol(rdi, 5)?;
        a.xor(rdi, r10)?;
        a.ror(rbx, 7)?;
        a.cli()?;
        a.pushfq()?;
        a.pop(r8)?;
        a.add(rdi, r8)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
    assert_eq!(c.cpu.state.rflags & rflags::IF, 0);
    assert_ne!(c.cpu.state.rflags & rflags::DF, 0);
}

#[test]
fn a_push_of_flags_that_faults() {
    // The stack ends at a page that is not there; the handler finds the flags and RSP as they were.
    let code = assemble(|a| {
        a.mov(esp, 0x3_1008)?;
        a.add(eax, ebx)?;
        a.pushfq()?;
        a.stc()?;
        a.pushfq()
    });
    let [mut one, mut two] = [computer(&code), computer(&code)];
    for c in [&mut one, &mut two] {
        c.put64(0x10_3000 + 0x30 * 8, 0);
        c.catch_events();
        c.cpu.state_changed();
    }
    finish(&mut one);
    translate(&mut two, ALWAYS);
    finish(&mut two);
    assert_eq!(one.frame(), two.frame());
    compare(&one, &two);
}

#[test]
fn the_base_of_gs_changes_between_accesses() {
    let prepare = |c: &mut Computer| {
        c.cpu.state.cr4 |= cr4::FSGSBASE;
        c.cpu.state.seg[usize::from(seg::GS)].base = DATA;
        c.cpu.state.seg[usize::from(seg::FS)].base = DATA + 0x100;
        c.cpu.state.msr.kernel_gs_base = DATA + 0x800;
    };
    same_after(prepare, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 40)?;
        a.mov(ebx, DATA as u32 + 0x1000)?;
        a.set_label(&mut top)?;
        a.mov(rax, qword_ptr(8).gs())?;
        a.mov(rdx, qword_ptr(8).fs())?;
        a.cmp(rax, rdx)?;
        a.swapgs()?;
        a.adc(rax, qword_ptr(16).gs())?;
        a.mov(qword_ptr(24).gs(), rax)?;
        a.wrfsbase(rbx)?;
        a.add(rdx, qword_ptr(16).fs())?;
        a.mov(qword_ptr(24).fs(), rdx)?;
        a.add(rbx, 8)?;
        a.swapgs()?;
        a.xor(rsi, qword_ptr(16).gs())?;
        a.mov(qword_ptr(32).gs(), rsi)?;
        a.rdgsbase(rdi)?;
        a.sub(ecx, 1)?;
        a.jne(top)?;
        a.swapgs()
    });
}

#[test]
fn the_time_stamp_counter_is_scaled_and_moved() {
    // Without a rate only the offset is left.
    let prepare = |c: &mut Computer| {
        c.cpu.state.tsc_ratio = 0;
        c.cpu.state.tsc_offset = 0xfedc_ba98_7654_3210;
    };
    let c = same_after(prepare, |a| {
        a.cmp(eax, edx)?;
        a.rdtsc()?;
        a.setc(bl)
    });
    assert_eq!((c.reg(0), c.reg(2)), (0x7654_3210, 0xfedc_ba98));
    let code = assemble(|a| {
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)
    });
    let mut c = computer(&code);
    c.cpu.state.tsc_ratio = 3 << 47;
    c.cpu.state.tsc_offset = 1000;
    translate(&mut c, ALWAYS);
    // SAFETY: every host has RDTSC.
    let host = || unsafe { std::arch::x86_64::_rdtsc() };
    let guest = |host: u64| (((u128::from(host) * 3) >> 1) as u64).wrapping_add(1000);
    let before = guest(host());
    finish(&mut c);
    assert!((before..=guest(host())).contains(&c.reg(0)));
}

#[test]
fn what_the_processor_may_not_do_at_other_levels() {
    // CLI with IOPL 0, SWAPGS, and RDTSC with CR4.TSD are #GP(0) at CPL 3 and 1; CPL 1 and 2 are no
    // supervisor mode of these instructions.
    for level in [1, 2, 3] {
        for build in [
            |a: &mut CodeAssembler| a.cli(),
            |a: &mut CodeAssembler| a.swapgs(),
            |a: &mut CodeAssembler| a.rdtsc(),
        ] {
            let code = assemble(|a| {
                a.add(eax, ebx)?;
                build(a)
            });
            let run = |how: bool| {
                let mut c = computer(&code);
                c.cpu.state.cr4 |= cr4::TSD;
                c.cpu.state.seg[usize::from(seg::SS)].set_dpl(level);
                c.cpu.state.seg[usize::from(seg::CS)].set_dpl(level);
                // Handlers could not be reached from here: the delivery fails and ends the run.
                c.cpu.state_changed();
                if how {
                    translate(&mut c, ALWAYS);
                }
                let exit = c.cpu.run(u64::MAX);
                (format!("{exit:?}"), c.cpu.state.rip(), c.reg(0))
            };
            let interpreted = run(false);
            assert!(interpreted.0.contains("Shutdown"), "{interpreted:?}");
            assert_eq!(interpreted, run(true), "CPL {level}");
        }
    }
}
