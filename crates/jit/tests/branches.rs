//! Where translated code goes: calls and returns of every kind, targets in other pages, and mappings
//! that change under them.

mod support;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anykvm_cpu::state::cr4;
use anykvm_cpu::{Exit, requests};
use harness::Computer;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{
    ALWAYS, CODE, assemble, compare, compatibility, computer, finish, harness, same, translate,
};

/// A page behind the data, and the one behind it.
const FAR: u64 = 0x3_0000;
const FARTHER: u64 = 0x3_1000;
/// Address of a page's entry in the tables of [`computer`].
fn entry(linear: u64) -> u64 {
    0x10_3000 + (linear >> 12) * 8
}

/// `add rax, n; ret`.
fn adds(n: u8) -> [u8; 5] {
    [0x48, 0x83, 0xc0, n, 0xc3]
}

/// Runs a program in both ways, after the same preparations.
fn same_after(
    prepare: impl Fn(&mut Computer),
    build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) {
    let code = assemble(build);
    let mut one = computer(&code);
    prepare(&mut one);
    finish(&mut one);
    let mut two = computer(&code);
    prepare(&mut two);
    translate(&mut two, ALWAYS);
    finish(&mut two);
    compare(&one, &two);
}

#[test]
fn deep_recursion() {
    same(|a| {
        let mut f = a.create_label();
        let mut deep = a.create_label();
        let mut start = a.create_label();
        let mut top = a.create_label();
        a.jmp(start)?;
        a.set_label(&mut f)?;
        a.add(rax, rdi)?;
        a.sub(edi, 1)?;
        a.je(deep)?;
        a.call(f)?;
        a.rol(rax, 3)?;
        a.set_label(&mut deep)?;
        a.add(edi, 1)?;
        a.ret()?;
        a.set_label(&mut start)?;
        a.mov(rbp, rsp)?;
        a.mov(esp, 0x1_0000)?;
        a.mov(ecx, 5)?;
        a.set_label(&mut top)?;
        a.mov(edi, 700)?;
        a.call(f)?;
        a.sub(ecx, 1)?;
        a.jne(top)?;
        a.mov(rsp, rbp)
    });
}

#[test]
fn returns_that_belong_to_no_call() {
    same(|a| {
        let mut top = a.create_label();
        let mut outer = a.create_label();
        let mut inner = a.create_label();
        let mut back = a.create_label();
        let mut pushed = a.create_label();
        let mut end = a.create_label();
        a.mov(ecx, 60)?;
        a.jmp(top)?;
        a.set_label(&mut outer)?;
        a.call(inner)?;
        a.add(rax, 1)?;
        a.ret_1(8)?;
        a.set_label(&mut inner)?;
        // Every third time to the outermost caller, as longjmp does.
        a.sub(edx, 1)?;
        a.jne(back)?;
        a.mov(edx, 3)?;
        a.mov(rsp, rbp)?;
        a.sub(rsp, 16)?;
        a.set_label(&mut back)?;
        a.ret()?;
        a.set_label(&mut top)?;
        a.mov(rbp, rsp)?;
        a.push(rax)?;
        a.call(outer)?;
        a.mov(rsp, rbp)?;
        // And one to a pushed address.
        a.lea(rbx, ptr(pushed))?;
        a.push(rbx)?;
        a.ret()?;
        a.add(rax, 0x77)?;
        a.set_label(&mut pushed)?;
        a.sub(ecx, 1)?;
        a.jne(top)?;
        a.set_label(&mut end)
    });
}

#[test]
fn a_call_targets_page_is_mapped_elsewhere() {
    for global in [0, 1 << 8] {
        let prepare = |c: &mut Computer| {
            c.cpu.state.cr4 |= cr4::PGE;
            c.cpu.state_changed();
            c.put(FAR, &adds(3));
            c.put(FARTHER, &adds(5));
            for page in [CODE, FAR] {
                let old = c.get64(entry(page));
                c.put64(entry(page), old | global);
            }
        };
        same_after(prepare, |a| {
            let mut top = a.create_label();
            a.mov(ecx, 40)?;
            a.mov(ebx, FAR as u32)?;
            a.set_label(&mut top)?;
            a.call(FAR)?;
            a.call(rbx)?;
            a.xor(dword_ptr(entry(FAR)), 0x1000)?;
            a.invlpg(ptr(rbx))?;
            a.call(FAR)?;
            a.call(rbx)?;
            a.shl(rax, 1)?;
            a.sub(ecx, 1)?;
            a.jne(top)
        });
    }
}

#[test]
fn an_address_space_with_another_call_target() {
    // A second set of tables, in which FAR is another page; the rest is global or not.
    const SECOND: u64 = 0x11_0000;
    for global in [0, 1 << 8] {
        let prepare = |c: &mut Computer| {
            c.cpu.state.cr4 |= cr4::PGE;
            c.put(FAR, &adds(3));
            c.put(FARTHER, &adds(5));
            for level in 0..3 {
                c.put64(SECOND + level * 0x1000, (SECOND + (level + 1) * 0x1000) | 7);
            }
            for page in 0..512 {
                let at = page << 12;
                let shared = at | 7 | if at == FAR { 0 } else { global };
                c.put64(entry(at), shared);
                let there = if at == FAR { FARTHER | 7 } else { shared };
                c.put64(SECOND + 0x3000 + page * 8, there);
            }
            c.cpu.state_changed();
        };
        same_after(prepare, |a| {
            let mut top = a.create_label();
            a.mov(ecx, 40)?;
            a.mov(ebx, FAR as u32)?;
            a.mov(esi, SECOND as u32)?;
            a.mov(edi, 0x10_0000)?;
            a.set_label(&mut top)?;
            a.mov(cr3, rsi)?;
            a.call(FAR)?;
            a.call(rbx)?;
            a.xchg(rsi, rdi)?;
            a.shl(rax, 1)?;
            a.sub(ecx, 1)?;
            a.jne(top)
        });
    }
}

#[test]
fn a_callee_and_a_return_site_that_change() {
    let prepare = |c: &mut Computer| c.put(FAR, &adds(3));
    same_after(prepare, |a| {
        let mut top = a.create_label();
        let mut site = a.create_label();
        a.mov(ecx, 40)?;
        a.mov(ebx, FAR as u32)?;
        a.lea(rsi, ptr(site))?;
        a.set_label(&mut top)?;
        a.mov(byte_ptr(rbx + 3), cl)?;
        a.call(rbx)?;
        a.set_label(&mut site)?;
        a.add(rdx, 1)?;
        a.mov(byte_ptr(rsi + 3), cl)?;
        a.call(FAR)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn a_callee_that_changes_the_place_it_returns_to() {
    // mov [rsi + 3], cl; ret
    let prepare = |c: &mut Computer| c.put(FAR, &[0x88, 0x4e, 0x03, 0xc3]);
    same_after(prepare, |a| {
        let mut top = a.create_label();
        let mut site = a.create_label();
        a.mov(ecx, 40)?;
        a.lea(rsi, ptr(site))?;
        a.set_label(&mut top)?;
        a.call(FAR)?;
        a.set_label(&mut site)?;
        a.add(rdx, 1)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn flags_survive_every_way_to_go() {
    // cmp eax, ecx; inc edi; jmp/ret with SETcc and RCL behind.
    let prepare = |c: &mut Computer| {
        // rcl r8, 1; setb dl; ret
        c.put(FAR, &[0x49, 0xd1, 0xd0, 0x0f, 0x92, 0xc2, 0xc3]);
    };
    same_after(prepare, |a| {
        let mut top = a.create_label();
        let mut behind = a.create_label();
        a.mov(ecx, 90)?;
        a.mov(ebx, FAR as u32)?;
        a.lea(r12, ptr(behind))?;
        a.set_label(&mut top)?;
        a.imul_3(eax, ecx, 0x1234_5677)?;
        a.add(rsp, 8)?;
        a.call(FAR)?;
        a.rcl(r9, 1)?;
        a.sub(rsp, 8)?;
        a.shl(eax, cl)?;
        a.call(rbx)?;
        a.rcr(r9, 1)?;
        a.cmp(eax, ecx)?;
        a.inc(edi)?;
        a.jmp(r12)?;
        a.nop()?;
        a.set_label(&mut behind)?;
        a.adc(r10, 0)?;
        a.adc(r13, r9)?;
        a.dec(ecx)?;
        a.jne(top)
    });
}

#[test]
fn a_request_stops_a_loop_through_two_pages() {
    let code = assemble(|a| a.jmp(FAR));
    let mut c = computer(&code);
    // jmp CODE
    let back = (CODE as i64 - FAR as i64 - 5) as i32;
    c.put(FAR, &[&[0xe9][..], &back.to_le_bytes()].concat());
    translate(&mut c, ALWAYS);
    for _ in 0..20 {
        let word = Arc::clone(c.cpu.requests());
        let kicker = thread::spawn(move || {
            thread::sleep(Duration::from_millis(2));
            word.set(requests::KICK);
        });
        assert_eq!(c.cpu.run(u64::MAX), Exit::Request);
        kicker.join().unwrap();
        assert_eq!(c.cpu.requests().take(requests::KICK), requests::KICK);
        assert!([CODE, FAR].contains(&c.cpu.state.rip()));
    }
}

#[test]
fn branches_out_of_the_middle() {
    // In the page, to another page, with flags and memory used on both sides of each.
    let code = assemble(|a| {
        let mut top = a.create_label();
        let mut near = a.create_label();
        let mut back = a.create_label();
        a.mov(ecx, 300)?;
        a.mov(ebx, support::DATA as u32)?;
        a.set_label(&mut top)?;
        a.imul_3(eax, ecx, 0x1234_5677)?;
        a.test(eax, 0x100)?;
        a.je(near)?;
        a.add(rdx, qword_ptr(rbx + rcx * 8))?;
        a.jc(FAR)?;
        a.mov(qword_ptr(rbx + rcx * 8 + 8), rdx)?;
        a.adc(rsi, rax)?;
        a.shl(rsi, cl)?;
        a.js(FAR)?;
        a.push(rsi)?;
        a.sbb(r8, rsi)?;
        a.pop(r9)?;
        a.jp(near)?;
        a.inc(r11)?;
        a.set_label(&mut near)?;
        a.rcl(r10, 1)?;
        a.set_label(&mut back)?;
        a.dec(ecx)?;
        a.jne(top)
    });
    // FAR: rcl r12, 1; jmp back, whose DEC ends the code but for a JNE and the OUT.
    let dec = CODE + code.len() as u64 - 2 - jne_len(&code) - 2;
    let displacement = (dec as i64 - FAR as i64 - 8) as i32;
    let far = [
        &[0x49, 0xd1, 0xd4, 0xe9][..],
        &displacement.to_le_bytes()[..],
    ]
    .concat();
    let mut one = computer(&code);
    one.put(FAR, &far);
    finish(&mut one);
    let mut two = computer(&code);
    two.put(FAR, &far);
    translate(&mut two, ALWAYS);
    finish(&mut two);
    compare(&one, &two);
}

/// Length of the JNE in front of `out imm8, al`.
fn jne_len(code: &[u8]) -> u64 {
    if code[code.len() - 4] == 0x75 { 2 } else { 6 }
}

#[test]
fn flags_behind_registers_that_are_popped() {
    // What set the flags is overwritten before they are asked for; some pops leave the block.
    same(|a| {
        let mut top = a.create_label();
        let mut f = a.create_label();
        let mut g = a.create_label();
        let mut start = a.create_label();
        a.jmp(start)?;
        a.set_label(&mut f)?;
        a.push(rbp)?;
        a.push(r12)?;
        a.mov(r12d, ecx)?;
        a.and(r12d, 3)?;
        a.pop(r12)?;
        a.pop(rbp)?;
        a.ret()?;
        a.set_label(&mut g)?;
        a.push(r12)?;
        a.lea(r12, ptr(rcx + 1))?;
        a.sub(rsp, 24)?;
        a.cmp(r12, rbx)?;
        a.mov(r12, qword_ptr(rsp + 24))?;
        a.lea(rsp, ptr(rsp + 24))?;
        a.pop(r12)?;
        a.ret_1(0)?;
        a.set_label(&mut start)?;
        a.mov(ecx, 200)?;
        a.mov(ebx, 77)?;
        a.set_label(&mut top)?;
        a.call(f)?;
        a.setne(dl)?;
        a.rcl(rdi, 1)?;
        a.call(g)?;
        a.rcl(rsi, 1)?;
        a.add(rsp, -24)?;
        a.add(rsp, 24)?;
        a.push(rcx)?;
        a.pop(r9)?;
        a.rcl(r8, 1)?;
        // Out of the TLB: every other page of the identity map.
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.dec(ecx)?;
        a.jne(top)
    });
}

#[test]
fn a_page_at_two_linear_addresses() {
    // ALIAS is mapped to FAR's page, whose code calls, jumps and falls into the next page: another one
    // behind each. In the middle of the loop it moves.
    const ALIAS: u64 = 0x3_8000;
    let far = {
        let mut a = CodeAssembler::new(64).unwrap();
        let mut over = a.create_label();
        a.test(cl, 1).unwrap();
        a.jne(over).unwrap();
        a.call(FARTHER + 0x10).unwrap();
        a.jmp(FARTHER + 0x20).unwrap();
        a.set_label(&mut over).unwrap();
        a.call(FARTHER + 0x20).unwrap();
        a.rol(rax, 1).unwrap();
        a.test(cl, 2).unwrap();
        a.jne(FARTHER + 0x10).unwrap();
        a.ret().unwrap();
        a.assemble(FAR).unwrap()
    };
    let prepare = |c: &mut Computer| {
        c.put(FAR, &far);
        // Eight bytes that end a page and go on in the next one.
        c.put(
            FAR + 0xff8,
            &[0x48, 0x83, 0xc0, 0x11, 0x48, 0x83, 0xc0, 0x01],
        );
        c.put(FARTHER, &adds(9));
        for (at, n) in [(FARTHER, 3), (ALIAS + 0x1000, 5)] {
            c.put(at + 0x10, &adds(n));
            c.put(at + 0x20, &adds(n + 1));
        }
        c.put(ALIAS + 0x1000, &adds(13));
        c.put64(entry(ALIAS), FAR | 7);
    };
    same_after(prepare, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 64)?;
        a.mov(ebx, FAR as u32)?;
        a.mov(r12d, ALIAS as u32)?;
        a.set_label(&mut top)?;
        a.call(rbx)?;
        a.call(r12)?;
        a.call(FAR)?;
        a.call(ALIAS)?;
        a.call(FAR + 0xff8)?;
        a.call(ALIAS + 0xff8)?;
        a.test(cl, 7)?;
        a.cmove(rbx, r12)?;
        a.shl(rax, 1)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn a_call_between_pages_whose_stack_faults() {
    // The interpreter does the push: the stack's page is read-only for the first time, or not there.
    for bit in [1, 2] {
        let code = assemble(|a| {
            let mut top = a.create_label();
            a.mov(ecx, 9)?;
            a.set_label(&mut top)?;
            a.call(FAR)?;
            a.cmp(ecx, 3)?;
            a.jne(top)?;
            a.mov(esp, 0x1_1000)?;
            a.jmp(top)
        });
        let mut ends = [false, true].map(|translated| {
            let mut c = computer(&code);
            c.catch_events();
            c.put(FAR, &[0xff, 0xc9, 0xc3]); // dec ecx; ret
            c.put64(entry(0x1_0000), (0x1_0000 | 7) & !bit);
            if translated {
                translate(&mut c, ALWAYS);
            }
            finish(&mut c);
            c
        });
        let [one, two] = &mut ends;
        assert_eq!(one.frame(), two.frame());
        compare(one, two);
    }
}

/// A program in which a branch by the counter is taken and not taken, in the page and out of it.
fn by_count(bits: u32) -> Vec<u8> {
    support::assemble_bits(bits, CODE, |a| {
        let mut top = a.create_label();
        let mut zero = a.create_label();
        let mut inner = a.create_label();
        a.mov(edi, 60)?;
        a.set_label(&mut top)?;
        a.mov(ecx, edi)?;
        a.and(ecx, 3)?;
        a.cmp(eax, edx)?;
        match bits {
            64 => a.jrcxz(zero)?,
            _ => a.jecxz(zero)?,
        }
        a.adc(eax, 3)?;
        a.cmp(ecx, 2)?;
        a.set_label(&mut inner)?;
        a.adc(edx, ecx)?;
        a.rol(edx, 5)?;
        a.cmp(edx, ecx)?;
        a.loop_(inner)?;
        a.adc(eax, edx)?;
        a.set_label(&mut zero)?;
        a.adc(ebx, eax)?;
        a.add(ch, 3)?;
        a.adc(bl, ch)?;
        a.test(ch, 2)?;
        a.setne(ch)?;
        a.xor(ch, ah)?;
        a.movzx(esi, ch)?;
        a.shl(ch, 2)?;
        a.adc(ebx, esi)?;
        a.mov(dh, ch)?;
        a.and(ch, 15)?;
        a.add(ebx, ecx)?;
        a.sub(edi, 1)?;
        a.jne(top)
    })
}

#[test]
fn branches_by_the_counter_and_its_second_byte() {
    let code = by_count(64);
    support::same_on(ALWAYS, || computer(&code));
    let mut c = computer(&code);
    translate(&mut c, ALWAYS);
    finish(&mut c);
    let left = c.cpu.translator_stats().unwrap().left;
    assert!(left < 5, "{left} left to the interpreter");
    let code = by_count(32);
    support::same_on(ALWAYS, || compatibility(&code));
}

#[test]
fn all_of_the_counter_is_looked_at() {
    // JRCXZ and LOOP with 64 bits, JECXZ with the lower half; the target in another page.
    same(|a| {
        let mut far = a.create_label();
        let mut back = a.create_label();
        let mut top = a.create_label();
        let mut next = a.create_label();
        let mut last = a.create_label();
        let mut begin = a.create_label();
        a.jmp(begin)?;
        for _ in 0..0xfa0 {
            a.nop()?;
        }
        a.set_label(&mut begin)?;
        a.mov(edi, 40)?;
        a.set_label(&mut top)?;
        a.mov(rcx, 1_u64 << 40)?;
        a.jrcxz(far)?;
        a.add(eax, 1)?;
        a.loop_(next)?;
        a.ud2()?;
        a.set_label(&mut next)?;
        a.add(rdx, rcx)?;
        a.inc(rcx)?;
        // JECXZ.
        a.db(&[0x67])?;
        a.jrcxz(far)?;
        a.ud2()?;
        for _ in 0..0x50 {
            a.nop()?;
        }
        a.set_label(&mut far)?;
        a.xor(ecx, ecx)?;
        a.jrcxz(back)?;
        a.ud2()?;
        a.set_label(&mut back)?;
        a.adc(rdx, rdi)?;
        a.sub(edi, 1)?;
        a.je(last)?;
        a.jmp(top)?;
        a.set_label(&mut last)?;
        a.nop()
    });
}

#[test]
fn the_counter_counts_once_between_pages() {
    same(|a| {
        let mut top = a.create_label();
        let mut begin = a.create_label();
        let mut zero = a.create_label();
        a.jmp(begin)?;
        for _ in 0..0xff0 - 5 {
            a.nop()?;
        }
        a.set_label(&mut begin)?;
        a.mov(ecx, 50)?;
        a.set_label(&mut top)?;
        a.add(rax, rcx)?;
        for _ in 0..0x10 {
            a.nop()?;
        }
        // In the next page.
        a.adc(rdx, rax)?;
        a.loop_(top)?;
        a.jrcxz(zero)?;
        a.ud2()?;
        a.set_label(&mut zero)?;
        a.nop()
    });
}
