//! Accesses that share a check, windows, and flags that are known when a block is entered: where a page
//! ends, is missing or read-only, is a device's or changes, translated code does what the interpreter does.

mod support;

use anykvm_cpu::state::reg;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::harness::Computer;
use support::{ALWAYS, DATA, assemble, computer, entry, same_exits as same_with, translate};

/// Loads and stores of several sizes off RBX, which goes up through both pages of data.
fn walk(a: &mut CodeAssembler, from: u64, rounds: u32) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(rbx, from)?;
    a.mov(r12d, rounds)?;
    a.xor(r13d, r13d)?;
    a.set_label(&mut top)?;
    a.mov(rax, qword_ptr(rbx))?;
    a.adc(rdx, qword_ptr(rbx + 24))?;
    a.mov(dword_ptr(rbx + 8), eax)?;
    a.movups(xmm1, xmmword_ptr(rbx + 5))?;
    a.lea(rsi, rbx + 16)?;
    a.add(r13w, word_ptr(rsi - 3))?;
    a.movups(xmmword_ptr(rsi + 7), xmm1)?;
    a.add(rbx, 12)?;
    a.inc(byte_ptr(rbx - 12 + 40))?;
    a.mov(r10, qword_ptr(rsi + 1))?;
    a.sub(r12d, 1)?;
    a.jne(top)
}

#[test]
fn a_group_goes_over_the_end_of_a_page() {
    same_with(|_| {}, |a| walk(a, DATA + 1, 600));
}

#[test]
fn the_second_page_is_missing() {
    same_with(
        |c| c.put64(entry(DATA + 0x1000), 0),
        |a| walk(a, DATA + 0x800, 600),
    );
}

#[test]
fn the_first_page_is_missing() {
    same_with(|c| c.put64(entry(DATA), 0), |a| walk(a, DATA + 0xff0, 10));
}

#[test]
fn the_second_page_is_read_only() {
    same_with(
        |c| c.put64(entry(DATA + 0x1000), (DATA + 0x1000) | 5),
        |a| walk(a, DATA + 0x801, 600),
    );
}

#[test]
fn the_second_page_is_a_devices() {
    // Stores only: what a device answers to a load is not this test's.
    same_with(
        |c| c.put64(entry(DATA + 0x1000), 0xf000_0000 | 7),
        |a| {
            let mut top = a.create_label();
            a.mov(rbx, DATA + 0xf80)?;
            a.mov(r12d, 20)?;
            a.set_label(&mut top)?;
            a.mov(qword_ptr(rbx), r12)?;
            a.mov(qword_ptr(rbx + 8), rdx)?;
            a.mov(qword_ptr(rbx + 16), rbx)?;
            a.add(rbx, 8)?;
            a.sub(r12d, 1)?;
            a.jne(top)
        },
    );
}

#[test]
fn a_page_is_mapped_elsewhere_while_a_loop_has_its_window() {
    same_with(
        |_| {},
        |a| {
            let mut outer = a.create_label();
            let mut inner = a.create_label();
            a.mov(rbx, DATA)?;
            a.mov(r14, entry(DATA))?;
            a.mov(r12d, 12)?;
            a.set_label(&mut outer)?;
            a.mov(ecx, 5)?;
            a.set_label(&mut inner)?;
            a.add(rax, qword_ptr(rbx + 8))?;
            a.add(qword_ptr(rbx + 16), rax)?;
            a.xor(rdx, qword_ptr(rbx + rcx * 8))?;
            a.sub(ecx, 1)?;
            a.jne(inner)?;
            a.xor(qword_ptr(r14), 0x1000)?;
            a.invlpg(byte_ptr(rbx))?;
            a.sub(r12d, 1)?;
            a.jne(outer)
        },
    );
}

#[test]
fn another_address_space_while_a_loop_has_its_window() {
    // A second set of tables, whose only difference is the page of data.
    let prepare = |c: &mut Computer| {
        for at in [0x11_0000, 0x11_1000, 0x11_2000] {
            c.put64(at, (at + 0x1000) | 7);
        }
        for page in 0..512 {
            c.put64(0x11_3000 + page * 8, page << 12 | 7);
        }
        c.put64(0x11_3000 + (DATA >> 12) * 8, (DATA + 0x1000) | 7);
    };
    same_with(prepare, |a| {
        let mut outer = a.create_label();
        let mut inner = a.create_label();
        a.mov(rbx, DATA)?;
        a.mov(rsi, 0x10_0000u64)?;
        a.mov(rdi, 0x11_0000u64)?;
        a.mov(r12d, 12)?;
        a.set_label(&mut outer)?;
        a.mov(ecx, 5)?;
        a.set_label(&mut inner)?;
        a.add(rax, qword_ptr(rbx + 8))?;
        a.add(qword_ptr(rbx + 16), rax)?;
        a.sub(ecx, 1)?;
        a.jne(inner)?;
        a.xchg(rsi, rdi)?;
        a.mov(cr3, rsi)?;
        a.sub(r12d, 1)?;
        a.jne(outer)
    });
}

#[test]
fn a_page_loses_the_right_to_be_written_while_a_loop_has_its_window() {
    same_with(
        |_| {},
        |a| {
            let mut outer = a.create_label();
            let mut inner = a.create_label();
            a.mov(rbx, DATA)?;
            a.mov(r12d, 3)?;
            a.set_label(&mut outer)?;
            a.mov(ecx, 4)?;
            a.set_label(&mut inner)?;
            a.mov(rax, qword_ptr(rbx + 8))?;
            a.add(qword_ptr(rbx + 16), rax)?;
            a.sub(ecx, 1)?;
            a.jne(inner)?;
            a.mov(qword_ptr(entry(DATA)), DATA as i32 | 5)?;
            a.invlpg(byte_ptr(rbx))?;
            a.sub(r12d, 1)?;
            a.jne(outer)
        },
    );
}

#[test]
fn stores_into_the_running_code_share_a_check() {
    // Both immediates are replaced in each round, the second one's store comes right before it runs.
    same_with(
        |_| {},
        |a| {
            let mut top = a.create_label();
            let mut patched = a.create_label();
            a.lea(rbx, ptr(patched))?;
            a.mov(ecx, 60)?;
            a.set_label(&mut top)?;
            a.mov(byte_ptr(rbx + 2), cl)?;
            a.mov(byte_ptr(rbx + 5), cl)?;
            a.mov(al, byte_ptr(rbx + 8))?;
            a.set_label(&mut patched)?;
            a.add(edx, 1)?;
            a.add(esi, 1)?;
            a.nop()?;
            a.sub(ecx, 1)?;
            a.jne(top)
        },
    );
}

#[test]
fn data_beside_code_that_is_called_later() {
    // The page becomes code while the loop that writes it has a window for it.
    same_with(
        |_| {},
        |a| {
            let mut outer = a.create_label();
            let mut inner = a.create_label();
            a.mov(rbx, DATA + 0x1000)?;
            a.mov(r12d, 10)?;
            a.set_label(&mut outer)?;
            a.mov(ecx, 6)?;
            a.set_label(&mut inner)?;
            // add edx, imm8; ret
            a.mov(dword_ptr(rbx), 0xc300_c283u32)?;
            a.mov(byte_ptr(rbx + 2), cl)?;
            a.add(qword_ptr(rbx + 64), rcx)?;
            a.sub(ecx, 1)?;
            a.jne(inner)?;
            a.call(rbx)?;
            a.sub(r12d, 1)?;
            a.jne(outer)
        },
    );
}

#[test]
fn the_stack_goes_over_the_end_of_a_page() {
    for top in [0x9000u64, 0x9008, 0x8ff8, 0x9004, 0x9018] {
        same_with(
            |c| c.cpu.state.regs[reg::RSP] = top,
            |a| {
                let mut f = a.create_label();
                let mut again = a.create_label();
                let mut end = a.create_label();
                a.mov(r12d, 20)?;
                a.set_label(&mut again)?;
                a.push(r12)?;
                a.push(rax)?;
                a.call(f)?;
                a.pop(rdx)?;
                a.pop(r12)?;
                a.sub(r12d, 1)?;
                a.jne(again)?;
                a.jmp(end)?;
                a.set_label(&mut f)?;
                a.push(rbp)?;
                a.mov(rbp, rsp)?;
                a.sub(rsp, 40)?;
                a.mov(qword_ptr(rbp - 8), r12)?;
                a.mov(qword_ptr(rsp + 8), rdx)?;
                a.add(rax, qword_ptr(rbp - 8))?;
                a.add(rax, qword_ptr(rbp + 8))?;
                a.leave()?;
                a.ret()?;
                a.set_label(&mut end)
            },
        );
    }
}

#[test]
fn the_stack_wraps_around() {
    for top in [0x10u64, 8, 0, 4, 0xffff_ffff_ffff_fff0] {
        same_with(
            |c| c.cpu.state.regs[reg::RSP] = top,
            |a| {
                a.push(rax)?;
                a.push(rbx)?;
                a.push(rcx)?;
                a.pop(rdx)?;
                a.pop(rdx)?;
                a.add(rax, qword_ptr(rsp + 16))?;
                a.pop(rsi)
            },
        );
    }
}

#[test]
fn addresses_that_are_not_canonical() {
    for address in [
        0x8000_0000_0000_0000u64,
        0x7fff_ffff_fff0,
        0x7fff_ffff_fff8,
        0xffff_7fff_ffff_fff8,
        0,
        u64::MAX,
    ] {
        same_with(
            |_| {},
            |a| {
                let mut top = a.create_label();
                a.mov(rbx, address)?;
                a.mov(ecx, 3)?;
                a.set_label(&mut top)?;
                a.add(rdx, qword_ptr(rbx + 8))?;
                a.add(rdx, qword_ptr(rbx))?;
                a.sub(ecx, 1)?;
                a.jne(top)
            },
        );
    }
}

#[test]
fn aligned_accesses_of_a_group() {
    for from in [DATA, DATA + 4, DATA + 8] {
        same_with(
            |_| {},
            |a| {
                let mut top = a.create_label();
                a.mov(rbx, from)?;
                a.mov(r12d, 300)?;
                a.set_label(&mut top)?;
                a.mov(eax, dword_ptr(rbx + 12))?;
                a.movaps(xmm0, xmmword_ptr(rbx + 24))?;
                a.movaps(xmm1, xmmword_ptr(rbx + 40))?;
                a.paddq(xmm0, xmm1)?;
                a.movaps(xmmword_ptr(rbx + 8), xmm0)?;
                a.movups(xmmword_ptr(rbx + 3), xmm1)?;
                a.add(rbx, 16)?;
                a.sub(r12d, 1)?;
                a.jne(top)
            },
        );
    }
}

#[test]
fn flags_known_at_the_entry_are_exact_at_a_fault() {
    // Each way of setting the flags that a loop is entered with, up to the missing page.
    type Build = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let ways: [Build; 9] = [
        |a| a.sub(r12d, 3),
        |a| a.add(r12w, 0x7ff3),
        |a| a.cmp(rbx, r12),
        |a| a.test(r12b, 0x55),
        |a| a.xor(r12, rbx),
        |a| a.neg(r12),
        |a| a.shl(r12, 3),
        |a| a.dec(r12b),
        |a| a.cmp(r10, r12),
    ];
    for set in ways {
        same_with(
            |c| c.put64(entry(DATA + 0x1000), 0),
            |a| {
                let mut top = a.create_label();
                let mut middle = a.create_label();
                a.mov(rbx, DATA + 0x301)?;
                a.set_label(&mut top)?;
                a.mov(rax, qword_ptr(rbx))?;
                a.mov(rdx, qword_ptr(rbx + 24))?;
                a.setb(cl)?;
                a.adc(rsi, rax)?;
                a.lea(rbx, rbx + 32)?;
                set(a)?;
                a.js(middle)?;
                a.mov(qword_ptr(rbx), rdx)?;
                a.seto(ch)?;
                a.jmp(top)?;
                a.set_label(&mut middle)?;
                a.mov(qword_ptr(rbx + 8), rsi)?;
                a.mov(r11, qword_ptr(rbx + 16))?;
                a.setp(dl)?;
                a.jmp(top)
            },
        );
    }
}

#[test]
fn many_groups_in_a_block() {
    // More than there are places for addends.
    same_with(
        |_| {},
        |a| {
            let mut top = a.create_label();
            a.mov(ebx, DATA as u32)?;
            a.mov(r12d, 40)?;
            a.set_label(&mut top)?;
            for i in 0..24 {
                a.lea(rsi, rbx + r12 * 8 + i * 16)?;
                a.mov(rax, qword_ptr(rsi))?;
                a.add(qword_ptr(rsi + 8), rax)?;
            }
            a.sub(r12d, 1)?;
            a.jne(top)
        },
    );
}

/// 4 MiB above the data, in the same entries of the TLB's level 1: the second page of data, then the first.
const RIVAL: u64 = DATA + (4 << 20);

fn map_rival(c: &mut Computer, rights: u64) {
    c.put64(0x10_2000 + 2 * 8, 0x11_4000 | 7);
    let table = 0x11_4000 + (RIVAL >> 12 & 511) * 8;
    c.put64(table, (DATA + 0x1000) | rights);
    c.put64(table + 8, DATA | rights);
}

/// Accesses that take an entry of level 1 from each other, in a loop and in what it calls.
fn rivals(a: &mut CodeAssembler, rounds: u32) -> Result<(), IcedError> {
    let mut top = a.create_label();
    let mut f = a.create_label();
    let mut end = a.create_label();
    a.mov(rbx, DATA)?;
    a.mov(rsi, RIVAL)?;
    a.mov(r12d, rounds)?;
    a.set_label(&mut top)?;
    a.add(rax, qword_ptr(rbx + 8))?;
    a.add(rax, qword_ptr(rbx + 16))?;
    a.add(rdx, qword_ptr(rsi + r12 * 8))?;
    a.call(f)?;
    a.sub(r12d, 1)?;
    a.jne(top)?;
    a.jmp(end)?;
    a.set_label(&mut f)?;
    a.mov(qword_ptr(rsi + 24), rax)?;
    a.add(qword_ptr(rbx + r12 * 8), rdx)?;
    a.mov(r10, qword_ptr(rsi + 0xffc))?;
    a.ret()?;
    a.set_label(&mut end)
}

#[test]
fn entries_that_made_room_are_found_again() {
    let code = assemble(|a| rivals(a, 300));
    let mut c = computer(&code);
    map_rival(&mut c, 7);
    c.cpu.state_changed();
    translate(&mut c, ALWAYS);
    support::finish(&mut c);
    let left = c.cpu.translator_stats().unwrap().left;
    // One access a round goes over the end of a page.
    assert!((300..400).contains(&left), "{left}");
    same_with(|c| map_rival(c, 7), |a| rivals(a, 300));
}

#[test]
fn an_entry_that_made_room_has_lost_the_right_to_be_written() {
    same_with(|c| map_rival(c, 5), |a| rivals(a, 300));
    same_with(
        |c| map_rival(c, 7),
        |a| {
            rivals(a, 9)?;
            a.mov(
                qword_ptr(0x11_4000 + (RIVAL >> 12 & 511) * 8),
                DATA as i32 | 5,
            )?;
            a.invlpg(byte_ptr(rsi))?;
            rivals(a, 9)
        },
    );
}

#[test]
fn an_entry_that_made_room_is_another_pages() {
    same_with(
        |c| map_rival(c, 7),
        |a| {
            let mut again = a.create_label();
            a.mov(r14d, 4)?;
            a.set_label(&mut again)?;
            rivals(a, 9)?;
            a.xor(qword_ptr(0x11_4000 + (RIVAL >> 12 & 511) * 8), 0x1000)?;
            a.invlpg(byte_ptr(rsi))?;
            a.sub(r14d, 1)?;
            a.jne(again)
        },
    );
}

#[test]
fn an_entry_that_made_room_holds_code_now() {
    // Each round writes a function through one address while the other's entry takes its place, calls it, and
    // writes it anew.
    same_with(
        |c| map_rival(c, 7),
        |a| {
            let mut top = a.create_label();
            a.mov(rbx, DATA)?;
            a.mov(rsi, RIVAL)?;
            a.mov(r12d, 30)?;
            a.set_label(&mut top)?;
            a.mov(dword_ptr(rsi + 64), 0xc300_c283u32)?;
            a.mov(byte_ptr(rsi + 66), r12b)?;
            a.add(qword_ptr(rbx + 8), rdx)?;
            a.lea(rax, rbx + 0x1040)?;
            a.call(rax)?;
            a.add(rdx, qword_ptr(rbx + 16))?;
            a.sub(r12d, 1)?;
            a.jne(top)
        },
    );
}

#[test]
fn entries_that_made_room_belong_to_an_address_space() {
    // Another set of tables, in which the rival's pages change places.
    let prepare = |c: &mut Computer| {
        map_rival(c, 7);
        for at in [0x11_0000, 0x11_1000] {
            c.put64(at, (at + 0x1000) | 7);
        }
        c.put64(0x11_2000, 0x10_3000 | 7);
        c.put64(0x11_2000 + 2 * 8, 0x11_5000 | 7);
        let table = 0x11_5000 + (RIVAL >> 12 & 511) * 8;
        c.put64(table, DATA | 7);
        c.put64(table + 8, (DATA + 0x1000) | 7);
    };
    same_with(prepare, |a| {
        let mut again = a.create_label();
        a.mov(r13, 0x10_0000u64)?;
        a.mov(r14, 0x11_0000u64)?;
        a.mov(r15d, 6)?;
        a.set_label(&mut again)?;
        rivals(a, 9)?;
        a.xchg(r13, r14)?;
        a.mov(cr3, r13)?;
        a.sub(r15d, 1)?;
        a.jne(again)
    });
}

/// Loops that read the byte at RBX, more than there are windows for that; among them a loop of another kind. All of it
/// some times for one value of RBX, then, when nothing is translated any more, for another.
fn more_loops_than_windows(
    a: &mut CodeAssembler,
    rbx_values: [u64; 2],
    last: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(rbx, rbx_values[0])?;
    a.mov(r12, rbx_values[1])?;
    a.mov(r13d, 5)?;
    a.set_label(&mut again)?;
    for n in 0..280 {
        let mut top = a.create_label();
        a.mov(ecx, 2)?;
        // So that the loop's first turn, too, is the loop's own translation.
        a.jmp(top)?;
        a.set_label(&mut top)?;
        if n == 270 {
            last(a)?;
        } else {
            a.mov(al, byte_ptr(rbx))?;
        }
        a.sub(ecx, 1)?;
        a.jne(top)?;
    }
    a.cmp(r13d, 2)?;
    a.cmove(rbx, r12)?;
    a.sub(r13d, 1)?;
    a.jne(again)
}

#[test]
fn a_window_that_was_filled_by_a_read_does_not_let_writes_through() {
    same_with(
        |c| c.put64(entry(DATA + 0x1000), (DATA + 0x1000) | 5),
        |a| {
            more_loops_than_windows(a, [DATA + 0x800, DATA + 0x1800], |a| {
                a.mov(byte_ptr(rbx), cl)
            })
        },
    );
}

#[test]
fn a_window_that_was_filled_by_a_byte_does_not_let_more_over_the_end_of_the_page() {
    same_with(
        |c| c.put64(entry(DATA + 0x1000), 0),
        |a| {
            more_loops_than_windows(a, [DATA + 0x7ff, DATA + 0xfff], |a| {
                a.mov(rax, qword_ptr(rbx - 3))
            })
        },
    );
}

#[test]
fn a_loop_of_more_checks_than_there_are_windows_of_a_kind() {
    same_with(
        |_| {},
        |a| {
            let mut top = a.create_label();
            a.mov(rbx, DATA)?;
            a.mov(rsi, DATA + 0x1000)?;
            a.mov(ecx, 40)?;
            a.set_label(&mut top)?;
            for n in 0..12 {
                a.movups(xmm0, xmmword_ptr(rbx + n * 160))?;
                a.movups(xmmword_ptr(rsi + n * 160 + 3), xmm0)?;
                a.add(rax, qword_ptr(rsi + n * 160))?;
                a.lea(rbx, rbx + rcx * 1)?;
                a.lea(rsi, rsi + rcx * 1)?;
            }
            a.mov(rbx, DATA)?;
            a.mov(rsi, DATA + 0x1000)?;
            a.sub(ecx, 1)?;
            a.jne(top)
        },
    );
}
