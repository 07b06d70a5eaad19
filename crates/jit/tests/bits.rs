//! Bit strings in memory, and exchanges of 8 and 16 bytes: interpreted and translated they must do the same.

mod support;

use std::sync::Arc;

use anykvm_cpu::memory::GuestMemory;
use anykvm_cpu::state::reg;
use anykvm_cpu::{Cpu, Exit, Requests};
use harness::{Computer, Ports};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{
    ALWAYS, CODE, DATA, assemble, assemble_bits, compare, compatibility, computer, entry, finish,
    harness, mostly_translated, same_exception, translate,
};

/// Runs a program in both ways. Only first accesses to pages and what leaves the program may have been left to
/// the interpreter.
fn same(build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) {
    let code = assemble(build);
    mostly_translated(12, || computer(&code));
}

#[test]
fn offsets_of_64_bits() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ebx, DATA as u32 + 0x1000)?;
        a.mov(esi, 300)?;
        a.set_label(&mut top)?;
        // From -0x8000 to 0x7fff.
        a.movsx(rax, dx)?;
        a.bt(qword_ptr(rbx), rax)?;
        a.adc(rdi, rdi)?;
        a.bts(qword_ptr(rbx), rax)?;
        a.adc(rdi, 5)?;
        a.add(rdx, rdi)?;
        a.movsx(r10, dx)?;
        a.lock().btr(qword_ptr(rbx), r10)?;
        a.rcl(rdi, 1)?;
        a.movsx(r15, dl)?;
        a.btc(qword_ptr(rbx + r15 * 8 + 0x18), r15)?;
        a.rol(rdx, 7)?;
        a.lock().btc(qword_ptr(rbx), r15)?;
        a.rcr(rdx, 3)?;
        a.sub(esi, 1)?;
        a.jne(top)
    });
}

#[test]
fn offsets_of_32_and_16_bits() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(r11d, DATA as u32 + 0x1000)?;
        a.mov(ecx, 300)?;
        a.set_label(&mut top)?;
        // Only the lower half is the offset; it is signed.
        a.movsx(rax, dx)?;
        a.bt(dword_ptr(r11), eax)?;
        a.adc(rdi, rdi)?;
        a.mov(r8, rdx)?;
        a.shl(r8, 32)?;
        a.mov(r9d, eax)?;
        a.or(r8, r9)?;
        a.lock().bts(dword_ptr(r11 + 4), r8d)?;
        a.adc(rdi, 5)?;
        a.btr(word_ptr(r11), dx)?;
        a.rcl(rdi, 1)?;
        a.lock().btc(word_ptr(r11 + 2), dx)?;
        a.adc(rdx, rdi)?;
        a.mov(r10, rdx)?;
        a.btc(word_ptr(r11 + 6), r10w)?;
        a.rol(rdx, 11)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn flags_other_than_carry_stay() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ebx, DATA as u32)?;
        a.mov(ecx, 200)?;
        a.set_label(&mut top)?;
        a.cmp(eax, edx)?;
        a.bt(qword_ptr(rbx), rcx)?;
        a.setz(sil)?;
        a.pushfq()?;
        a.pop(r8)?;
        // PF, AF, SF and OF are undefined.
        a.and(r8d, 0x41)?;
        a.add(rdi, r8)?;
        a.rol(rdi, 3)?;
        a.sub(eax, 0x1234567)?;
        a.lock().bts(qword_ptr(rbx), rcx)?;
        a.adc(edx, 7)?;
        a.bts(dword_ptr(rbx + 8), 37)?;
        a.adc(edx, 1)?;
        a.lock().btr(qword_ptr(rbx + 16), 9)?;
        a.adc(edx, 1)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn through_gs_and_relative_to_rip() {
    let prepare = |code: &[u8]| {
        let mut c = computer(code);
        c.cpu.state.seg[usize::from(anykvm_cpu::state::seg::GS)].base = DATA;
        c.cpu.state_changed();
        c
    };
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 200)?;
        a.set_label(&mut top)?;
        a.lock().bts(qword_ptr(0x100).gs(), rcx)?;
        a.adc(rax, rdx)?;
        a.btc(qword_ptr(rcx * 8 + 8).gs(), rcx)?;
        a.adc(rax, rdx)?;
        a.btr(dword_ptr(DATA + 0x800), ecx)?;
        a.adc(rax, rdx)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
    mostly_translated(12, || prepare(&code));
}

#[test]
fn addresses_of_32_bits_wrap_around() {
    // 67H; the operand is at the end of 4 GiB, the one that is accessed at DATA.
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.mov(ebx, 0xffff_fff0_u32)?;
        a.mov(esi, DATA as u32)?;
        a.mov(ecx, 50)?;
        a.set_label(&mut top)?;
        a.lea(rax, rcx + (DATA as i32 * 8 + 0x80))?;
        a.bts(dword_ptr(ebx), eax)?;
        a.adc(edx, 1)?;
        a.lock().btc(dword_ptr(esi), ecx)?;
        a.adc(edx, 1)?;
        a.btr(qword_ptr(esi + 8), rcx)?;
        a.adc(edx, 1)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
    mostly_translated(62, || computer(&code));
}

#[test]
fn legacy_code() {
    let code = assemble_bits(32, CODE, |a| {
        let mut top = a.create_label();
        a.mov(ebx, DATA as u32 + 0x1000)?;
        a.mov(ecx, 200)?;
        a.set_label(&mut top)?;
        a.movsx(eax, dx)?;
        a.lock().bts(dword_ptr(ebx), eax)?;
        a.adc(edi, edx)?;
        a.btc(word_ptr(ebx + 2), dx)?;
        a.adc(edx, edi)?;
        a.btr(dword_ptr(ebx + 0x20), 21)?;
        a.mov(eax, ecx)?;
        a.push(ecx)?;
        a.mov(ecx, edi)?;
        a.lock().cmpxchg8b(qword_ptr(ebx + 0x40))?;
        a.cmpxchg8b(qword_ptr(ebx + 0x4b))?;
        a.setz(bl)?;
        a.mov(bl, 0)?;
        a.pop(ecx)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
    mostly_translated(12, || compatibility(&code));
}

#[test]
fn exchanges_of_16_bytes() {
    same(|a| {
        let mut top = a.create_label();
        let mut equal = a.create_label();
        a.mov(esi, DATA as u32)?;
        a.mov(r15d, DATA as u32 + 0x40)?;
        a.mov(edi, 300)?;
        a.set_label(&mut top)?;
        // Unlike most often, and then alike.
        a.cmp(rdx, rdi)?;
        a.lock().cmpxchg16b(xmmword_ptr(rsi))?;
        a.pushfq()?;
        a.pop(r8)?;
        a.add(r9, r8)?;
        a.mov(rcx, r9)?;
        a.rol(rbx, 5)?;
        a.je(equal)?;
        a.add(eax, edi)?;
        a.lock().cmpxchg16b(xmmword_ptr(rsi))?;
        a.cmpxchg16b(xmmword_ptr(r15))?;
        a.seto(bl)?;
        a.set_label(&mut equal)?;
        a.test(edi, 3)?;
        a.cmpxchg8b(qword_ptr(rsi + 0x23))?;
        a.adc(rbx, 1)?;
        a.lock().cmpxchg8b(qword_ptr(r15 + 0x28))?;
        a.rcl(rcx, 2)?;
        a.sub(edi, 1)?;
        a.jne(top)
    });
}

#[test]
fn addressed_by_registers_the_exchange_uses() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(edi, 100)?;
        a.set_label(&mut top)?;
        a.mov(ecx, DATA as u32)?;
        a.mov(rbx, rdi)?;
        a.lock().cmpxchg16b(xmmword_ptr(rcx + 0x20))?;
        a.shl(ebx, 4)?;
        a.lock().cmpxchg16b(xmmword_ptr(rcx + rbx))?;
        a.mov(r10d, ecx)?;
        a.mov(r11d, ebx)?;
        a.lock().cmpxchg16b(xmmword_ptr(r10 + r11))?;
        a.sub(edi, 1)?;
        a.jne(top)
    });
}

/// A program whose last instruction faults, RCX given: the handler finds the state as it was in front of it.
fn faults(offset: i64, build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> [u64; 6] {
    // 0x30000 is not there, 0x31000 is read-only.
    let code = assemble(|a| {
        a.mov(rbx, qword_ptr(DATA))?;
        a.mov(esi, DATA as u32)?;
        a.mov(edi, 0x2_f000)?;
        a.mov(rcx, offset)?;
        a.cmp(eax, 77)?;
        build(a)
    });
    same_exception(|| {
        let mut c = computer(&code);
        c.put64(entry(0x3_0000), 0);
        c.put64(entry(0x3_1000), 0x3_1005);
        c
    })
}

#[test]
fn faults_come_before_any_effect() {
    const NOT_PRESENT: u64 = 2;
    const READ_ONLY: u64 = 3;
    // Error codes.
    let absent = faults(0x1004 * 8, |a| a.bts(qword_ptr(rdi), rcx));
    assert_eq!(absent[0], NOT_PRESENT);
    let read = faults(0x1004 * 8, |a| a.bt(dword_ptr(rdi), ecx));
    assert_eq!(read[0], 0);
    let kept = faults(0x2008 * 8, |a| a.lock().btc(qword_ptr(rdi), rcx));
    assert_eq!(kept[0], READ_ONLY);
    // Over the end of a page, into the one that is not there.
    let over = faults(-8 * 8, |a| a.btr(qword_ptr(rdi + 0x1004), rcx));
    assert_eq!(over[0], NOT_PRESENT);
    // Unlike what is there, it would still be written.
    let unlike = faults(0, |a| a.lock().cmpxchg16b(xmmword_ptr(rdi + 0x2000)));
    assert_eq!(unlike[0], READ_ONLY);
    let unlike = faults(0, |a| a.cmpxchg8b(qword_ptr(rdi + 0x2000)));
    assert_eq!(unlike[0], READ_ONLY);
    // 16 bytes that are not aligned: #GP(0), also without LOCK.
    for offset in [1, 4, 8, 15] {
        let f = faults(0, |a| a.cmpxchg16b(xmmword_ptr(rsi + offset)));
        assert_eq!(f[0], 0);
        let f = faults(0, |a| a.lock().cmpxchg16b(xmmword_ptr(rsi + offset)));
        assert_eq!(f[0], 0);
    }
}

#[test]
fn over_the_end_of_a_page() {
    mostly_translated(300, || {
        computer(&assemble(|a| {
            let mut top = a.create_label();
            a.mov(esi, DATA as u32 + 0xffd)?;
            a.mov(ecx, 60)?;
            a.set_label(&mut top)?;
            a.bts(qword_ptr(rsi), rcx)?;
            a.adc(eax, edx)?;
            a.btc(dword_ptr(rsi), ecx)?;
            a.adc(eax, edx)?;
            a.lock().btc(word_ptr(rsi + 2), cx)?;
            a.adc(eax, edx)?;
            a.cmpxchg8b(qword_ptr(rsi))?;
            a.sub(ecx, 1)?;
            a.jne(top)
        }))
    });
}

/// A device's register that keeps what is written to it.
fn with_device(c: &mut Computer) -> Vec<(bool, u64, u8)> {
    let (mut register, mut seen) = (0x00ff_00ff_1234_5678_u64, Vec::new());
    loop {
        match c.cpu.run(u64::MAX) {
            Exit::MmioRead { gpa, len } => {
                seen.push((false, gpa, len));
                let shift = 8 * (gpa & 7);
                c.cpu
                    .complete_mmio_read(&(register >> shift).to_le_bytes()[..len.into()]);
            }
            Exit::MmioWrite { gpa, len, data } => {
                seen.push((true, gpa, len));
                let shift = 8 * (gpa & 7);
                let mask = (u64::MAX >> (64 - 8 * u32::from(len))) << shift;
                register = register & !mask | u64::from_le_bytes(data) << shift & mask;
            }
            Exit::Io { port: 0x99, .. } => return seen,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_device_s_registers() {
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.mov(esi, 0x3_1000)?;
        a.mov(edi, 6)?;
        a.set_label(&mut top)?;
        a.mov(ecx, edi)?;
        a.bt(dword_ptr(rsi), ecx)?;
        a.adc(ebx, ebx)?;
        a.bts(qword_ptr(rsi), rcx)?;
        a.adc(ebx, ebx)?;
        a.lock().btc(dword_ptr(rsi - 8), ecx)?;
        a.adc(ebx, ebx)?;
        a.lock().cmpxchg8b(qword_ptr(rsi))?;
        a.adc(ebx, ebx)?;
        a.sub(edi, 1)?;
        a.jne(top)
    });
    let [mut one, mut two] = [computer(&code), computer(&code)];
    for c in [&mut one, &mut two] {
        // Behind the RAM.
        c.put64(0x10_3000 + 0x31 * 8, 0x4000_0000 | 7);
    }
    let interpreted = with_device(&mut one);
    translate(&mut two, ALWAYS);
    assert_eq!(with_device(&mut two), interpreted);
    // A load, a load and a store twice.
    assert_eq!(interpreted.len(), 6 * 5);
    compare(&one, &two);
}

/// Two processors count in one place.
#[test]
fn locked_ones_of_two_processors() {
    const TURNS: u32 = 20_000;
    // RSI: which bit is this one's. The bits of both are in one word; with each bit set a counter of 16 bytes
    // goes up.
    let code = assemble(|a| {
        let mut top = a.create_label();
        let mut again = a.create_label();
        a.mov(edi, DATA as u32)?;
        a.mov(ebp, TURNS)?;
        a.set_label(&mut top)?;
        a.lock().btc(qword_ptr(rdi), rsi)?;
        a.adc(r12, 0)?;
        a.mov(rax, qword_ptr(rdi + 16))?;
        a.mov(rdx, qword_ptr(rdi + 24))?;
        a.set_label(&mut again)?;
        a.mov(rbx, rax)?;
        a.mov(rcx, rdx)?;
        a.add(rbx, 1)?;
        a.adc(rcx, 2)?;
        a.lock().cmpxchg16b(xmmword_ptr(rdi + 16))?;
        a.jne(again)?;
        a.mov(eax, dword_ptr(rdi + 32))?;
        a.mov(edx, dword_ptr(rdi + 36))?;
        let mut third = a.create_label();
        a.set_label(&mut third)?;
        a.lea(ebx, eax + 1)?;
        a.lea(ecx, edx - 1)?;
        a.lock().cmpxchg8b(qword_ptr(rdi + 32))?;
        a.jne(third)?;
        a.sub(ebp, 1)?;
        a.jne(top)
    });
    let mut first = computer(&code);
    for at in 0..5 {
        first.put64(DATA + at * 8, 0);
    }
    let ports = Arc::new(Ports::default());
    let memory: Arc<GuestMemory> = first.memory.clone();
    let second = Cpu::new(memory.clone(), ports.clone(), Arc::new(Requests::default()));
    let mut second = Computer {
        cpu: second,
        memory,
        ports,
    };
    second.cpu.state = first.cpu.state.clone();
    for (c, bit) in [(&mut first, 3), (&mut second, 44)] {
        c.cpu.state.regs[reg::RSI] = bit;
        c.cpu.state.regs[12u8] = 0;
        c.cpu.state_changed();
        translate(c, ALWAYS);
    }
    std::thread::scope(|s| {
        s.spawn(|| finish(&mut first));
        finish(&mut second);
    });
    let turns = u64::from(TURNS);
    assert_eq!(first.get64(DATA), 0, "each bit was changed evenly often");
    for c in [&first, &second] {
        assert_eq!(c.cpu.state.regs[12u8], turns / 2);
    }
    assert_eq!(first.get64(DATA + 16), 2 * turns);
    assert_eq!(first.get64(DATA + 24), 4 * turns);
    let low = u64::from(2 * TURNS);
    let high = u64::from((2 * TURNS).wrapping_neg());
    assert_eq!(first.get64(DATA + 32), high << 32 | low);
}
