//! Ports and device memory: every kind of access, repeated ones, those split over pages.

use super::Pieces;
use crate::programs::long::{DATA, DEVICE, EDGE};
use anykvm_differential::random::Random;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Accesses that need the monitor.
pub const IO: Pieces = (
    &[
        port,
        port_string,
        port_string,
        load,
        store,
        modify,
        stack,
        string,
        string,
        vector,
        over_the_edge,
        over_the_edge,
        call,
    ],
    4,
);

fn device(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.mov(edx, DEVICE as u32 + random.below(0x100) as u32)
}

fn port(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let port = 0x10 + random.below(8) as i32;
    a.mov(edx, port)?;
    match random.below(8) {
        0 => a.out(port, al),
        1 => a.out(port, ax),
        2 => a.out(port, eax),
        3 => a.in_(al, port),
        4 => a.in_(ax, dx),
        5 => a.in_(eax, dx),
        6 => a.out(dx, eax),
        // A quirk of KVM's.
        _ => a.out(0x7e, al),
    }
}

fn port_string(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.mov(edx, 0x10 + random.below(8) as u32)?;
    a.mov(ecx, random.below(12) as u32)?;
    let at = DATA as u32 + 0x1000 - random.below(20) as u32;
    a.mov(esi, at)?;
    a.mov(edi, at)?;
    let down = random.once_in(4);
    if down {
        a.std()?;
    }
    match random.below(7) {
        0 => a.rep().outsb()?,
        1 => a.rep().outsw()?,
        2 => a.rep().outsd()?,
        3 => a.rep().insb()?,
        4 => a.rep().insw()?,
        5 => a.rep().insd()?,
        _ => a.outsw()?,
    }
    if down { a.cld() } else { Ok(()) }
}

fn load(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    device(a, random)?;
    match random.below(6) {
        0 => a.mov(al, byte_ptr(rdx)),
        1 => a.movzx(eax, word_ptr(rdx)),
        2 => a.mov(eax, dword_ptr(rdx)),
        3 => a.mov(rax, qword_ptr(rdx)),
        4 => a.movsx(rax, byte_ptr(rdx)),
        _ => a.cmp(rbx, qword_ptr(rdx)),
    }
}

fn store(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    device(a, random)?;
    match random.below(5) {
        0 => a.mov(byte_ptr(rdx), al),
        1 => a.mov(word_ptr(rdx), ax),
        2 => a.mov(dword_ptr(rdx), eax),
        3 => a.mov(qword_ptr(rdx), rax),
        _ => a.setc(byte_ptr(rdx)),
    }
}

fn modify(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    device(a, random)?;
    match random.below(8) {
        0 => a.add(qword_ptr(rdx), rax),
        1 => a.lock().cmpxchg(dword_ptr(rdx), ecx),
        2 => a.xadd(qword_ptr(rdx), rbx),
        3 => a.xchg(qword_ptr(rdx), rax),
        4 => a.lock().inc(word_ptr(rdx)),
        5 => a.bts(dword_ptr(rdx), 5),
        6 => a.not(byte_ptr(rdx)),
        _ => a.shl(qword_ptr(rdx), 3),
    }
}

fn stack(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.pushfq()?;
    a.cli()?;
    a.mov(r13, rsp)?;
    a.mov(esp, DEVICE as u32 + 0x800)?;
    match random.below(4) {
        0 => a.push(rax)?,
        1 => a.pop(rbx)?,
        2 => a.push(qword_ptr(DATA as i32))?,
        _ => a.pop(qword_ptr(DATA as i32 + 0x700))?,
    }
    a.mov(rsp, r13)?;
    a.popfq()
}

fn string(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let place = |random: &mut Random| match random.below(3) {
        0 => DEVICE as u32 + random.below(0x100) as u32,
        1 => DATA as u32 + 0x1000 - random.below(16) as u32,
        // Over the end of RAM into the device.
        _ => EDGE as u32 - random.below(16) as u32,
    };
    a.mov(esi, place(random))?;
    a.mov(edi, place(random))?;
    a.mov(ecx, random.below(7) as u32)?;
    match random.below(8) {
        0 => a.rep().movsb(),
        1 => a.rep().movsw(),
        2 => a.rep().movsq(),
        3 => a.rep().stosd(),
        4 => a.rep().lodsw(),
        5 => a.repe().cmpsd(),
        6 => a.repne().scasb(),
        _ => a.movsq(),
    }
}

fn vector(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    device(a, random)?;
    match random.below(9) {
        0 => a.movups(xmm2, xmmword_ptr(rdx)),
        1 => a.movups(xmmword_ptr(rdx), xmm2),
        2 => a.vmovups(ymm3, ymmword_ptr(rdx)),
        3 => a.vmovups(ymmword_ptr(rdx), ymm3),
        4 => a.movsd_2(xmm4, qword_ptr(rdx)),
        5 => a.vpbroadcastd(ymm5, dword_ptr(rdx)),
        6 => a
            .paddd(xmm6, xmm7)
            .and_then(|()| a.movd(dword_ptr(rdx), xmm6)),
        7 => a.fninit().and_then(|()| a.fld(tword_ptr(rdx))),
        _ => a
            .fninit()
            .and_then(|()| a.fld1())
            .and_then(|()| a.fstp(tword_ptr(rdx))),
    }
}

fn over_the_edge(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.mov(edx, EDGE as u32 - 1 - random.below(30) as u32)?;
    match random.below(7) {
        0 => a.vmovups(ymm1, ymmword_ptr(rdx)),
        1 => a.vmovups(ymmword_ptr(rdx), ymm1),
        2 => a.add(qword_ptr(rdx), rax),
        3 => a.mov(rbx, qword_ptr(rdx)),
        4 => a.mov(qword_ptr(rdx), rbx),
        5 => a.movups(xmmword_ptr(rdx), xmm1),
        _ => a.sgdt(ptr(rdx)),
    }
}

fn call(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    let (mut f, mut over) = (a.create_label(), a.create_label());
    a.pushfq()?;
    a.cli()?;
    a.mov(r13, rsp)?;
    a.mov(esp, DEVICE as u32 + 0x900)?;
    a.call(f)?;
    a.jmp(over)?;
    a.set_label(&mut f)?;
    a.inc(rbx)?;
    a.set_label(&mut over)?;
    a.mov(rsp, r13)?;
    a.popfq()
}
