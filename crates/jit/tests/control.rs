//! CLD, STD, RDTSC, RDTSCP, SERIALIZE and MOV from control registers: interpreted and translated they must do
//! the same.

mod support;

use std::sync::Arc;

use anykvm_cpu::cpuid::{CpuidEntry, CpuidTable};
use anykvm_cpu::state::{cr4, reg, rflags, seg};
use anykvm_cpu::{Cpu, Requests};
use harness::{Computer, Ports};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{
    ALWAYS, CODE, DATA, assemble, assemble_bits, compare, compatibility, computer, finish, harness,
    mostly_translated, same_exception, translate,
};

/// Runs a program in both ways; the translated one.
fn same(left: u64, build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Computer {
    let code = assemble(build);
    mostly_translated(left, || computer(&code))
}

/// CPL 3, with I/O allowed.
fn user(code: &[u8]) -> Computer {
    let mut c = computer(code);
    for n in [seg::SS, seg::CS] {
        c.cpu.state.seg[usize::from(n)].set_dpl(3);
    }
    c.cpu.state.rflags |= 3 << 12;
    c.cpu.state_changed();
    c
}

/// Moves a little up and down, with flags that are known before and behind.
fn directions(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(ebp, 60)?;
    a.set_label(&mut top)?;
    a.mov(esi, DATA as u32 + 0x100)?;
    a.mov(edi, DATA as u32 + 0x108)?;
    a.cmp(eax, ebx)?;
    a.std()?;
    a.adc(ebx, ebp)?;
    a.mov(ecx, 9)?;
    a.rep().movsb()?;
    a.stosd()?;
    a.add(eax, esi)?;
    a.cld()?;
    a.adc(eax, edi)?;
    a.mov(ecx, 5)?;
    a.rep().stosd()?;
    a.movsw()?;
    a.add(ebx, esi)?;
    a.sub(ebp, 1)?;
    a.jne(top)
}

#[test]
fn strings_in_both_directions() {
    let code = assemble(directions);
    // STD leaves the strings behind it to the interpreter.
    for computer in [computer, user] {
        let c = mostly_translated(60 * (9 + 2) + 8, || computer(&code));
        assert_eq!(c.cpu.state.rflags & rflags::DF, 0);
    }
    let code = assemble_bits(32, CODE, directions);
    mostly_translated(60 * (9 + 2) + 8, || compatibility(&code));
}

#[test]
fn the_direction_is_pushed_and_stays() {
    let c = same(20, |a| {
        a.add(eax, ebx)?;
        a.std()?;
        a.pushfq()?;
        a.pop(rdx)?;
        a.std()
    });
    assert_ne!(c.cpu.state.rflags & rflags::DF, 0);
    assert_ne!(c.reg(reg::RDX) & rflags::DF, 0);
}

#[test]
fn control_registers_are_read() {
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 100)?;
        a.set_label(&mut top)?;
        a.add(rax, rdx)?;
        a.mov(rax, cr3)?;
        a.adc(rdi, rax)?;
        a.cmp(rbx, rdi)?;
        a.mov(r10, cr4)?;
        a.mov(rbx, cr2)?;
        a.adc(rbx, r10)?;
        a.shl(rbx, 3)?;
        a.mov(r15, cr0)?;
        a.mov(rsi, qword_ptr(DATA))?;
        a.adc(rbx, r15)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
    mostly_translated(8, || {
        let mut c = computer(&code);
        c.cpu.state.cr2 = 0xffff_8123_4567_89ab;
        c
    });
    // CR8 is the interpreter's.
    same(10, |a| {
        a.mov(rax, cr8)?;
        a.add(rax, rbx)?;
        a.mov(rdx, cr8)
    });
}

/// The vector of the exception a program of user code ends with, and the state that was saved; both ways must
/// agree.
fn exception(
    prepare: impl Fn(&mut Computer),
    build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> [u64; 6] {
    let code = assemble(|a| {
        a.add(eax, ebx)?;
        build(a)
    });
    same_exception(|| {
        let mut c = user(&code);
        prepare(&mut c);
        c.cpu.state_changed();
        c
    })
}

#[test]
fn what_other_levels_may_not_do() {
    const AT: u64 = CODE + 2;
    let forbid = |c: &mut Computer| c.cpu.state.cr4 |= cr4::TSD;
    for build in [
        |a: &mut CodeAssembler| a.rdtsc(),
        |a: &mut CodeAssembler| a.rdtscp(),
    ] {
        assert_eq!(exception(forbid, build)[..2], [0, AT]);
    }
    assert_eq!(exception(|_| {}, |a| a.mov(rax, cr3))[..2], [0, AT]);
    // #UD has no error code.
    let without = |c: &mut Computer| c.cpu.cpuid = without_rdtscp();
    assert_eq!(exception(without, |a| a.rdtscp())[0], AT);
}

/// CLAC where AC is clear and where it is set, and without SMAP.
#[test]
fn access_to_user_pages() {
    let smap = |c: &mut Computer| {
        c.cpu.cpuid = CpuidTable::new(vec![CpuidEntry {
            function: 7,
            ebx: 1 << 20,
            ..CpuidEntry::default()
        }]);
        c.cpu.state.cr4 |= cr4::SMAP;
        // The data are a user's, all else a supervisor's.
        for page in (0..512).filter(|page| page >> 1 != DATA >> 13) {
            c.put64(0x10_3000 + page * 8, page << 12 | 3);
        }
    };
    let run = |faults: bool, build: fn(&mut CodeAssembler) -> Result<(), IcedError>| {
        let code = assemble(build);
        let [mut one, mut two] = [computer(&code), computer(&code)];
        for c in [&mut one, &mut two] {
            c.catch_events();
            smap(c);
            c.cpu.state_changed();
        }
        finish(&mut one);
        translate(&mut two, ALWAYS);
        finish(&mut two);
        assert_eq!(two.reg(reg::RSP) >> 8 == 0x67, faults);
        if faults {
            assert_eq!(one.frame(), two.frame());
        }
        compare(&one, &two);
        two
    };
    let c = run(false, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 50)?;
        a.set_label(&mut top)?;
        a.add(eax, ebx)?;
        a.clac()?;
        a.adc(ebx, ecx)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
    let left = c.cpu.translator_stats().unwrap().left;
    assert!(left < 5, "{left} left to the interpreter");
    run(false, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 50)?;
        a.set_label(&mut top)?;
        a.stac()?;
        a.mov(eax, dword_ptr(DATA))?;
        a.add(dword_ptr(DATA + 8), eax)?;
        a.clac()?;
        a.clac()?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
    // What was allowed between the two is not any more behind them.
    run(true, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 50)?;
        a.set_label(&mut top)?;
        a.stac()?;
        a.mov(eax, dword_ptr(DATA))?;
        a.clac()?;
        a.sub(ecx, 1)?;
        a.jne(top)?;
        a.mov(eax, dword_ptr(DATA))
    });
    assert_eq!(exception(|_| {}, |a| a.clac())[0], CODE + 2, "#UD at CPL 3");
}

fn without_rdtscp() -> CpuidTable {
    CpuidTable::new(Vec::new())
}

fn with_rdtscp(c: &mut Computer) {
    c.cpu.cpuid = CpuidTable::new(vec![CpuidEntry {
        function: 0x8000_0001,
        edx: 1 << 27,
        ..CpuidEntry::default()
    }]);
}

#[test]
fn the_counter_with_the_processor_s_number() {
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.mov(edi, 50)?;
        a.set_label(&mut top)?;
        a.cmp(rdi, rsi)?;
        a.rdtscp()?;
        a.adc(rsi, rax)?;
        a.mov(r15, rcx)?;
        a.adc(rdx, r15)?;
        a.rdtsc()?;
        a.adc(rbx, rdx)?;
        a.rol(rsi, 3)?;
        a.sub(edi, 1)?;
        a.jne(top)
    });
    for computer in [computer, user] {
        let c = mostly_translated(8, || {
            let mut c = computer(&code);
            with_rdtscp(&mut c);
            // Without a rate only the offset is left.
            c.cpu.state.tsc_ratio = 0;
            c.cpu.state.tsc_offset = 0xfedc_ba98_7654_3210;
            c.cpu.state.msr.tsc_aux = 0x1_8765_4321;
            c
        });
        assert_eq!(c.reg(15), 0x8765_4321);
        assert_eq!((c.reg(0), c.reg(2)), (0x7654_3210, 0xfedc_ba98));
    }
}

#[test]
fn rdtscp_that_goes_away() {
    // The translation stays; what CPUID says does not.
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.rdtscp()?;
        a.out(0x99, al)?;
        a.jmp(top)
    });
    let mut c = computer(&code);
    c.catch_events();
    with_rdtscp(&mut c);
    translate(&mut c, ALWAYS);
    finish(&mut c);
    assert_eq!(c.reg(reg::RSP), 0x7000);
    c.cpu.cpuid = without_rdtscp();
    finish(&mut c);
    assert_eq!(c.reg(reg::RSP) >> 8, 0x67, "no exception");
    assert_eq!(c.frame()[0], CODE, "RIP of #UD");
}

#[test]
fn addresses_with_every_register_in_memory() {
    same(8, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 60)?;
        a.set_label(&mut top)?;
        a.lea(r10, r11 + r15 * 4 + 5)?;
        a.lea(r15d, r10d + r11d + 3)?;
        a.lea(r11d, r11 + r15 * 2)?;
        a.lea(r15, r10 + r11)?;
        a.lea(r10d, r10 * 8 + 77)?;
        a.lea(r15w, r11 + rax)?;
        a.movzx(r11d, r15w)?;
        a.movsx(r10, r11w)?;
        a.movsxd(r15, r10d)?;
        a.mov(r10b, r15b)?;
        a.mov(r11w, r10w)?;
        a.movzx(r15w, r10b)?;
        a.mov(r10, qword_ptr(DATA))?;
        a.xadd(r10, r11)?;
        a.mov(r11, r11)?;
        a.add(rax, r10)?;
        a.rol(rax, 5)?;
        a.mov(qword_ptr(DATA), rax)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

/// One processor writes code that another executes: behind SERIALIZE the other sees what was written before the
/// number it has read.
#[test]
fn serialize_fetches_code_anew() {
    const TURNS: u32 = 200;
    const FUNCTION: u64 = 0x3_0000;
    let writes = assemble(|a| {
        let mut top = a.create_label();
        let mut wait = a.create_label();
        a.mov(ecx, 1)?;
        a.set_label(&mut top)?;
        // The number that the function returns, and then that it does.
        a.mov(dword_ptr(FUNCTION + 1), ecx)?;
        a.mov(dword_ptr(DATA), ecx)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(DATA + 0x40), ecx)?;
        a.jne(wait)?;
        a.add(ecx, 1)?;
        a.cmp(ecx, TURNS)?;
        a.jbe(top)
    });
    let executes = assemble(|a| {
        let mut top = a.create_label();
        a.xor(ebx, ebx)?;
        a.mov(ecx, 1)?;
        a.set_label(&mut top)?;
        a.cmp(dword_ptr(DATA), ecx)?;
        a.jne(top)?;
        a.serialize()?;
        a.call(FUNCTION)?;
        // How often it was not that number.
        a.cmp(eax, ecx)?;
        a.setne(dl)?;
        a.movzx(edx, dl)?;
        a.add(ebx, edx)?;
        a.mov(dword_ptr(DATA + 0x40), ecx)?;
        a.add(ecx, 1)?;
        a.cmp(ecx, TURNS)?;
        a.jbe(top)
    });
    let mut first = computer(&executes);
    let at = CODE + 0x800;
    first.put(at, &writes);
    first.put(FUNCTION, &[0xb8, 0, 0, 0, 0, 0xc3]);
    first.put64(DATA, 0);
    first.put64(DATA + 0x40, 0);
    let ports = Arc::new(Ports::default());
    let memory = first.memory.clone();
    let cpu = Cpu::new(memory.clone(), ports.clone(), Arc::new(Requests::default()));
    let mut second = Computer { cpu, memory, ports };
    second.cpu.state = first.cpu.state.clone();
    second.cpu.state.set_rip(at);
    for c in [&mut first, &mut second] {
        c.cpu.state_changed();
        translate(c, ALWAYS);
    }
    std::thread::scope(|s| {
        s.spawn(|| finish(&mut second));
        finish(&mut first);
    });
    assert_eq!(first.reg(reg::RCX), u64::from(TURNS) + 1);
    assert_eq!(first.reg(reg::RBX), 0, "old code was executed");
}

#[test]
fn selectors_are_stored() {
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 40)?;
        a.mov(esi, DATA as u32)?;
        a.set_label(&mut top)?;
        a.add(eax, ecx)?;
        a.mov(word_ptr(rsi + rcx * 2), fs)?;
        a.adc(edx, eax)?;
        a.mov(ax, gs)?;
        a.mov(r11, qword_ptr(rsi))?;
        a.mov(ebx, es)?;
        a.mov(rdi, ss)?;
        a.rol(rdx, 7)?;
        a.add(rdx, rdi)?;
        a.add(rdx, rbx)?;
        a.mov(r10d, esi)?;
        a.mov(word_ptr(r10 + 0x200), ds)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
    for computer in [computer, user] {
        mostly_translated(10, || {
            let mut c = computer(&code);
            for (n, s) in c.cpu.state.seg[..6].iter_mut().enumerate() {
                if n != usize::from(seg::CS) && n != usize::from(seg::SS) {
                    s.selector = 0x8123 + 8 * n as u16;
                }
            }
            c
        });
    }
}
