//! SYSCALL, SYSRET and STI in translated code: between privilege levels and back without leaving it, and
//! everything that is not usual about them.

mod support;

use anykvm_cpu::events::SHADOW_STI;
use anykvm_cpu::requests::EVENT;
use anykvm_cpu::state::{efer, rflags, seg};
use anykvm_cpu::{CpuState, Exit};
use anykvm_jit::Options;
use harness::Computer;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{ALWAYS, CODE, DATA, assemble, computer, finish, harness, translate};

type Built = Result<(), IcedError>;

/// Where user code begins, and the handler of system calls.
const USER: u64 = CODE + 0x400;
const HANDLER: u64 = CODE + 0x800;
/// Turns of loops.
const TURNS: u32 = 200;
/// What a handler ORs into R11 and XORs into RCX in the last turn.
const LAST_FLAGS: u64 = DATA + 0x100;
const LAST_RIP: u64 = DATA + 0x108;
/// Number of the system call that ends the program.
const OVER: i32 = 1000;

fn code_at(address: u64, build: impl Fn(&mut CodeAssembler) -> Built) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    a.assemble(address).unwrap()
}

/// CPL 0 code that goes to user code, which makes system calls in a loop.
fn calls() -> Computer {
    let kernel = code_at(CODE, |a| {
        a.mov(ecx, USER as u32)?;
        a.mov(r11d, 0x202)?;
        a.sysretq()
    });
    let user = code_at(USER, |a| {
        let mut top = a.create_label();
        a.mov(r12d, TURNS)?;
        a.set_label(&mut top)?;
        a.add(rbx, rsi)?;
        a.adc(rdi, rbx)?;
        a.mov(eax, r12d)?;
        a.cmp(rdi, rbx)?;
        a.syscall()?;
        // What came back.
        a.setb(r8b)?;
        a.seto(r9b)?;
        a.add(r8, rcx)?;
        a.rol(r8, 7)?;
        a.xor(r9, r11)?;
        a.ror(r9, 3)?;
        a.mov(qword_ptr(DATA), r8)?;
        a.movq(xmm3, r9)?;
        a.paddq(xmm4, xmm3)?;
        a.dec(r12d)?;
        a.jne(top)?;
        a.mov(eax, OVER)?;
        a.syscall()
    });
    let handler = code_at(HANDLER, |a| {
        let (mut go, mut back) = (a.create_label(), a.create_label());
        a.pushfq()?;
        a.pop(r14)?;
        a.xor(r13, r14)?;
        a.rol(r13, 11)?;
        a.cmp(eax, OVER)?;
        a.jne(go)?;
        a.out(0x99, al)?;
        a.set_label(&mut go)?;
        a.swapgs()?;
        a.mov(qword_ptr(8).gs(), r11)?;
        a.add(qword_ptr(16).gs(), rcx)?;
        a.swapgs()?;
        a.cmp(eax, 1)?;
        a.jne(back)?;
        a.or(r11, qword_ptr(LAST_FLAGS))?;
        a.xor(rcx, qword_ptr(LAST_RIP))?;
        a.set_label(&mut back)?;
        a.sysretq()
    });
    let mut c = computer(&kernel);
    c.put(USER, &user);
    c.put(HANDLER, &handler);
    c.put64(LAST_FLAGS, 0);
    c.put64(LAST_RIP, 0);
    let s = &mut c.cpu.state;
    // CS 8 and SS 16; for user code CS 0x1b and SS 0x13.
    s.msr.star = 0x000b_0008 << 32;
    s.msr.lstar = HANDLER;
    s.msr.sfmask = 0x4_7700;
    s.msr.kernel_gs_base = DATA + 0x800;
    c.cpu.state_changed();
    c
}

fn left(c: &Computer) -> u64 {
    c.cpu.translator_stats().unwrap().left
}

fn same_state(one: &CpuState, two: &CpuState, what: &str) {
    for n in 0..17 {
        assert_eq!(one.regs[n], two.regs[n], "{what}: register {n}");
    }
    for n in [seg::CS, seg::SS, seg::FS, seg::GS] {
        let [a, b] = [one, two].map(|s| s.seg[usize::from(n)]);
        assert_eq!(a, b, "{what}: segment {n}");
    }
    assert_eq!(one.rflags, two.rflags, "{what}");
    assert_eq!(one.events, two.events, "{what}");
    assert!(one == two, "{what}");
}

/// Both ways to the end; the translated one's computer.
fn same(prepare: impl Fn(&mut Computer), make: impl Fn() -> Computer, what: &str) -> Computer {
    let [mut one, mut two] = [make(), make()];
    for c in [&mut one, &mut two] {
        prepare(c);
        c.cpu.state_changed();
    }
    finish(&mut one);
    translate(&mut two, ALWAYS);
    finish(&mut two);
    same_state(&one.cpu.state, &two.cpu.state, what);
    support::compare(&one, &two);
    two
}

#[test]
fn system_calls_stay_in_translated_code() {
    for mask in [0x4_7700, 0, u64::MAX, 0x8d5, 0x200] {
        for star in [0x000b_0008, 0x0023_0010, 0xffff_ffff, 0x0008_fff8] {
            let c = same(
                |c| {
                    c.cpu.state.msr.sfmask = mask;
                    c.cpu.state.msr.star = star << 32;
                },
                calls,
                &format!("{mask:x} {star:x}"),
            );
            // Those whose target was not known yet, and the end.
            let left = left(&c);
            assert!(left < 60, "{left} with {mask:x} {star:x}");
        }
    }
}

#[test]
fn flags_that_sysret_loads() {
    let bits = [
        rflags::DF,
        rflags::ID,
        rflags::IOPL,
        rflags::NT,
        rflags::RF,
        rflags::VM,
        rflags::AC,
        rflags::VIF,
        rflags::VIP,
        rflags::CF,
        rflags::OF,
        1 << 3,
        1 << 40,
        rflags::IF,
    ];
    for bit in bits {
        same(|c| c.put64(LAST_FLAGS, bit), calls, &format!("{bit:x}"));
    }
}

/// The event that a program ends with is the same, and so is what it leaves on the stack.
fn same_event(
    prepare: impl Fn(&mut Computer),
    make: impl Fn() -> Computer,
    what: &str,
) -> Computer {
    let catch = |c: &mut Computer| {
        c.catch_events();
        prepare(c);
    };
    let [mut one, mut two] = [make(), make()];
    for c in [&mut one, &mut two] {
        catch(c);
        c.cpu.state_changed();
    }
    finish(&mut one);
    translate(&mut two, ALWAYS);
    finish(&mut two);
    assert_eq!(one.frame(), two.frame(), "{what}");
    same_state(&one.cpu.state, &two.cpu.state, what);
    two
}

#[test]
fn what_sysret_traps_on() {
    // TF: the trap is in front of the first instruction of user code.
    let c = same_event(|c| c.put64(LAST_FLAGS, rflags::TF), calls, "TF");
    assert_eq!(c.frame()[1], 0x1b);
    // A target that is not canonical, and one without a page.
    same_event(|c| c.put64(LAST_RIP, 1 << 47), calls, "not canonical");
    same_event(|c| c.put64(LAST_RIP, 1 << 30), calls, "no page");
    // Memory that is the kernel's.
    same_event(
        |c| {
            let entry = 0x10_3000 + 9 * 8;
            c.put64(entry, c.get64(entry) & !4);
            c.put64(LAST_RIP, USER ^ 0x9000);
        },
        calls,
        "the kernel's",
    );
}

#[test]
fn without_syscall() {
    let off = |c: &mut Computer| c.cpu.state.msr.efer &= !efer::SCE;
    let c = same_event(off, calls, "SYSRET");
    assert_eq!(c.frame()[1], 8);
}

/// A system call's handler, or user code, is another one after a while.
#[test]
fn targets_that_change() {
    let run = |how: bool| {
        let mut c = calls();
        if how {
            translate(&mut c, ALWAYS);
        }
        finish(&mut c);
        // XOR RBX, RBX in the handler, at once; and then in user code, too.
        for place in [HANDLER, USER + 6] {
            c.put(place, &[0x48, 0x31, 0xdb]);
            c.cpu.new_epoch();
            c.cpu.state.set_rip(CODE);
            c.cpu.state_changed();
            finish(&mut c);
        }
        c
    };
    let (one, two) = (run(false), run(true));
    same_state(&one.cpu.state, &two.cpu.state, "changed");
    assert_ne!(one.cpu.state, {
        let mut c = calls();
        finish(&mut c);
        c.cpu.state
    });
}

/// Code with `sti` and what follows it; then more. An interrupt, vector 0x40, waits from the start or not at all.
fn enabled(build: impl Fn(&mut CodeAssembler) -> Built) -> Computer {
    let code = assemble(|a| {
        a.mov(ebx, DATA as u32)?;
        a.add(eax, edx)?;
        a.stc()?;
        a.sti()?;
        build(a)?;
        a.setc(r8b)?;
        a.inc(esi)?;
        a.cli()?;
        a.inc(esi)?;
        a.nop()
    });
    computer(&code)
}

type Build = fn(&mut CodeAssembler) -> Built;

/// Instructions behind an STI.
const BEHIND: &[Build] = &[
    |a| a.nop(),
    |a| a.adc(rsi, rdi),
    |a| a.mov(qword_ptr(rbx), rsi),
    |a| a.mov(rsi, qword_ptr(rbx + 4092)),
    |a| a.push(rsi),
    |a| a.pushfq(),
    |a| a.sti(),
    |a| a.cli(),
    |a| a.swapgs(),
    |a| a.cpuid(),
    |a| {
        let mut next = a.create_label();
        a.jmp(next)?;
        a.inc(edi)?;
        a.set_label(&mut next)?;
        a.zero_bytes()
    },
    |a| {
        let mut next = a.create_label();
        a.jc(next)?;
        a.inc(edi)?;
        a.set_label(&mut next)?;
        a.zero_bytes()
    },
    |a| {
        let mut next = a.create_label();
        a.call(next)?;
        a.set_label(&mut next)?;
        a.pop(r9)
    },
    |a| {
        let mut next = a.create_label();
        a.lea(r9, ptr(next))?;
        a.push(r9)?;
        a.sti()?;
        a.ret()?;
        a.set_label(&mut next)?;
        a.inc(r9d)
    },
    |a| {
        a.mov(edi, DATA as u32)?;
        a.mov(ecx, 9)?;
        a.cli()?;
        a.sti()?;
        a.rep().stosb()
    },
    |a| {
        a.addps(xmm1, xmm2)?;
        a.cli()?;
        a.sti()?;
        a.addps(xmm1, xmmword_ptr(rbx))
    },
];

#[test]
fn an_interrupt_comes_behind_the_shadow() {
    for (n, build) in BEHIND.iter().enumerate() {
        for waits in [true, false] {
            for interruptible in [true, false] {
                let prepare = |c: &mut Computer| {
                    *c.ports.interrupt.lock().unwrap() = waits.then_some(0x40);
                    if interruptible && !waits {
                        c.cpu.state.rflags |= rflags::IF;
                    }
                };
                let what = format!("{n}, {waits}, {interruptible}");
                let c = same_event(prepare, || enabled(build), &what);
                assert!(
                    !waits || c.ports.interrupt.lock().unwrap().is_none() || n == 7,
                    "{what}"
                );
            }
        }
    }
}

/// An instruction in the shadow that faults, or leaves for the monitor, does so with the shadow in the state;
/// behind it there is none.
#[test]
fn exits_in_the_shadow() {
    let faults: [Build; 3] = [
        |a| a.ud2(),
        |a| a.mov(rsi, qword_ptr(0x40_0000)),
        |a| a.mov(qword_ptr(0x3f_ffff), rsi),
    ];
    for build in faults {
        let c = same_event(|_| {}, || enabled(build), "fault");
        assert_eq!(c.cpu.state.events.shadow, 0);
    }
    let run = |how: bool, interruptible: bool, ring: bool| {
        let mut c = enabled(|a| {
            a.out(0x98, al)?;
            a.inc(edi)
        });
        c.catch_events();
        if interruptible {
            c.cpu.state.rflags |= rflags::IF;
        }
        c.cpu.state_changed();
        if how {
            translate(&mut c, ALWAYS);
        }
        let exit = c.cpu.run(u64::MAX);
        assert!(matches!(exit, Exit::Io { port: 0x98, .. }), "{exit:?}");
        let shadow = c.cpu.state.events.shadow;
        assert_eq!(shadow, if interruptible { 0 } else { SHADOW_STI });
        if ring {
            *c.ports.interrupt.lock().unwrap() = Some(0x41);
            c.cpu.requests().set(EVENT);
        }
        finish(&mut c);
        assert_eq!(c.cpu.state.events.shadow, 0);
        c
    };
    for (interruptible, ring) in [(false, false), (false, true), (true, false), (true, true)] {
        let [one, two] = [false, true].map(|how| run(how, interruptible, ring));
        same_state(&one.cpu.state, &two.cpu.state, "exit");
        assert_eq!(one.frame(), two.frame());
    }
}

/// What arrives while interrupts are off waits for STI, and for SYSRET that sets IF.
#[test]
fn what_arrives_while_interrupts_are_off() {
    let make = |open: Build| {
        let code = code_at(CODE, |a| {
            a.mov(ecx, USER as u32)?;
            a.mov(r11d, 0x202)?;
            a.cli()?;
            a.out(0x98, al)?;
            a.inc(esi)?;
            open(a)?;
            a.inc(edi)?;
            a.inc(edi)?;
            a.inc(edi)?;
            a.out(0x99, al)
        });
        let mut c = computer(&code);
        c.put(
            USER,
            &code_at(USER, |a| {
                a.inc(edi)?;
                a.syscall()
            }),
        );
        c.put(HANDLER, &[0xe6, 0x99]);
        c.cpu.state.msr.star = 0x000b_0008 << 32;
        c.cpu.state.msr.lstar = HANDLER;
        c.catch_events();
        c
    };
    let opens: [Build; 2] = [|a| a.sti(), |a| a.sysretq()];
    for open in opens {
        let run = |how: bool| {
            let mut c = make(open);
            if how {
                translate(&mut c, ALWAYS);
            }
            // Once without, so that everything is known, then with an interrupt.
            for vector in [None, Some(0x42)] {
                c.cpu.state.regs[7] = 0;
                c.cpu.state.set_rip(CODE);
                for n in [seg::CS, seg::SS] {
                    c.cpu.state.seg[usize::from(n)].set_dpl(0);
                }
                c.cpu.state_changed();
                let exit = c.cpu.run(u64::MAX);
                assert!(matches!(exit, Exit::Io { port: 0x98, .. }), "{exit:?}");
                *c.ports.interrupt.lock().unwrap() = vector;
                c.cpu.requests().set(EVENT);
                finish(&mut c);
            }
            c
        };
        let [one, two] = [false, true].map(run);
        assert_eq!(one.frame(), two.frame());
        same_state(&one.cpu.state, &two.cpu.state, "arrived");
    }
}

/// Stopped behind any number of instructions, the state is the interpreter's, its shadow included.
#[test]
fn stopped_anywhere() {
    const BY_COUNT: Options = Options {
        by_count: true,
        ..ALWAYS
    };
    let programs: [&dyn Fn() -> Computer; 3] = [&calls, &|| enabled(|a| a.adc(rsi, rdi)), &|| {
        let mut c = enabled(|a| a.mov(qword_ptr(rbx), rsi));
        *c.ports.interrupt.lock().unwrap() = Some(0x40);
        c.catch_events();
        c
    }];
    for (n, make) in programs.into_iter().enumerate() {
        let mut interpreted = make();
        for turns in 1..=[150, 9, 6][n] {
            assert_eq!(interpreted.cpu.run_counted(1), Exit::Budget);
            let mut translated = make();
            translate(&mut translated, BY_COUNT);
            assert_eq!(translated.cpu.run_counted(turns), Exit::Budget);
            let what = format!("{n}, {turns}");
            same_state(&interpreted.cpu.state, &translated.cpu.state, &what);
        }
    }
}
