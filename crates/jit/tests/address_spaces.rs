//! Code under changing address spaces: what was found under one must not be run under another.

mod support;

use anykvm_cpu::Exit;
use anykvm_cpu::state::cr4;
use harness::Computer;
use iced_x86::code_asm::*;
use support::{ALWAYS, CODE, assemble, computer, finish, harness, translate};

/// Two pages that are mapped as the tests like, and where other frames are.
const HERE: u64 = 0x3_0000;
const ELSEWHERE: u64 = 0x3_4000;
const FRAME: u64 = 0x3_8000;
const OTHER_FRAME: u64 = 0x3_9000;
/// The tables of [`computer`], and a second set.
const TABLES: u64 = 0x10_0000;
const SECOND: u64 = 0x11_0000;

/// `add eax, n; ret`.
fn adds(n: u8) -> [u8; 4] {
    [0x83, 0xc0, n, 0xc3]
}

fn map(c: &mut Computer, tables: u64, linear: u64, entry: u64) {
    c.put64(tables + 0x3000 + (linear >> 12) * 8, entry);
}

/// Tables that map everything at its address with these flags, and [`HERE`] to a frame of its own.
fn tables(c: &mut Computer, at: u64, flags: u64, frame: u64) {
    for level in 0..3 {
        c.put64(at + level * 0x1000, (at + (level + 1) * 0x1000) | 7);
    }
    for page in 0..512 {
        map(c, at, page << 12, page << 12 | flags);
    }
    map(c, at, HERE, frame | 7);
}

/// Stores a byte without telling anybody.
fn device_stores(c: &Computer, gpa: u64, value: u8) {
    let map = c.memory.map(0);
    let slot = map.find(gpa).unwrap();
    let host = (slot.host() + (gpa - slot.gpa)) as *mut u8;
    // SAFETY: inside the slot's mapping, which `map` keeps; no processor runs.
    unsafe { host.write_volatile(value) };
}

/// Runs a program on computers that were prepared alike, interpreted and translated.
fn both(prepare: impl Fn(&mut Computer), code: &[u8], check: impl Fn(&mut Computer, &'static str)) {
    for how in ["interpreted", "translated"] {
        let mut c = computer(code);
        prepare(&mut c);
        c.cpu.state_changed();
        if how == "translated" {
            translate(&mut c, ALWAYS);
        }
        check(&mut c, how);
    }
}

#[test]
fn numbers_of_address_spaces_begin_anew() {
    // Code of one address space is called under the first number that a load of CR3 gives out; when they
    // are used up and it is given out again, other code is at the same address.
    const NUMBERS: i32 = 4092;
    let prepare = |c: &mut Computer| {
        c.cpu.state.cr4 |= cr4::PGE;
        c.put(FRAME, &adds(1));
        c.put(OTHER_FRAME, &adds(2));
        tables(c, TABLES, 7 | 1 << 8, FRAME);
        tables(c, SECOND, 7 | 1 << 8, OTHER_FRAME);
    };
    for between in NUMBERS - 3..NUMBERS + 3 {
        let code = assemble(|a| {
            let mut top = a.create_label();
            a.mov(ebx, HERE as u32)?;
            a.mov(esi, TABLES as u32)?;
            a.mov(edi, SECOND as u32)?;
            a.xor(eax, eax)?;
            a.mov(cr3, rsi)?;
            a.call(rbx)?;
            a.mov(ecx, between)?;
            a.set_label(&mut top)?;
            a.mov(cr3, rsi)?;
            a.sub(ecx, 1)?;
            a.jne(top)?;
            a.mov(cr3, rdi)?;
            a.call(rbx)
        });
        both(prepare, &code, |c, how| {
            finish(c);
            assert_eq!(c.reg(0) as i32, 1 + 2, "{how}, {between}");
        });
    }
}

#[test]
fn global_code_stays_and_local_code_does_not() {
    // Everything but HERE is global. A load of CR3 changes what is at HERE; INVLPG drops a global page,
    // whose entry has changed meanwhile.
    let prepare = |c: &mut Computer| {
        c.cpu.state.cr4 |= cr4::PGE;
        c.put(FRAME, &adds(1));
        c.put(OTHER_FRAME, &adds(2));
        c.put(ELSEWHERE, &adds(4));
        c.put(ELSEWHERE + 0x1000, &adds(8));
        tables(c, TABLES, 7 | 1 << 8, FRAME);
        tables(c, SECOND, 7 | 1 << 8, OTHER_FRAME);
    };
    let entry = |tables: u64| tables + 0x3000 + (ELSEWHERE >> 12) * 8;
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.mov(ebx, HERE as u32)?;
        a.mov(ebp, ELSEWHERE as u32)?;
        a.mov(esi, TABLES as u32)?;
        a.mov(edi, SECOND as u32)?;
        a.xor(eax, eax)?;
        a.mov(ecx, 20)?;
        a.set_label(&mut top)?;
        a.call(rbp)?;
        a.mov(cr3, rsi)?;
        a.call(rbx)?;
        a.call(rbp)?;
        a.mov(cr3, rdi)?;
        a.call(rbx)?;
        a.xor(dword_ptr(entry(TABLES)), 0x1000)?;
        a.xor(dword_ptr(entry(SECOND)), 0x1000)?;
        a.invlpg(ptr(rbp))?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
    both(prepare, &code, |c, how| {
        finish(c);
        assert_eq!(c.reg(0), 20 * (1 + 2) + 10 * (2 * 4 + 2 * 8), "{how}");
    });
}

#[test]
fn a_devices_store_is_seen_through_a_new_mapping() {
    // Two functions of a frame run at HERE; a device changes the second. ELSEWHERE was never mapped to the
    // frame before: no flush is needed, and both are as they are now.
    let prepare = |c: &mut Computer| {
        c.put(FRAME, &adds(1));
        c.put(FRAME + 0x80, &adds(2));
        tables(c, TABLES, 7, FRAME);
        map(c, TABLES, ELSEWHERE, 0);
    };
    let entry = TABLES + 0x3000 + (ELSEWHERE >> 12) * 8;
    let code = assemble(|a| {
        let mut top = a.create_label();
        let mut once_more = a.create_label();
        a.mov(ebx, HERE as u32)?;
        a.xor(eax, eax)?;
        a.set_label(&mut once_more)?;
        a.mov(ecx, 20)?;
        a.set_label(&mut top)?;
        a.call(rbx)?;
        a.lea(rdx, ptr(rbx + 0x80))?;
        a.call(rdx)?;
        a.sub(ecx, 1)?;
        a.jne(top)?;
        a.cmp(ebx, HERE as u32)?;
        let mut end = a.create_label();
        a.jne(end)?;
        a.out(0x98, al)?;
        a.mov(dword_ptr(entry), FRAME as u32 | 7)?;
        a.mov(ebx, ELSEWHERE as u32)?;
        a.jmp(once_more)?;
        a.set_label(&mut end)
    });
    both(prepare, &code, |c, how| {
        let exit = c.cpu.run(u64::MAX);
        assert!(matches!(exit, Exit::Io { port: 0x98, .. }), "{exit:?}");
        device_stores(c, FRAME + 0x82, 0x20);
        finish(c);
        assert_eq!(c.reg(0), 20 * (1 + 2 + 1 + 0x20), "{how}");
        assert!(c.cpu.state.rip() > CODE);
    });
}
