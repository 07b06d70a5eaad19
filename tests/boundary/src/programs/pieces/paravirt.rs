//! What KVM writes to memory for its guest: the clock of the vCPU, the wall clock, stolen time. Read as a guest
//! reads them, and folded into memory, so that what they mean must be the same in every VM.

use super::{Pieces, set_up};
use crate::monitor::READING;
use crate::programs::long::DATA;
use anykvm_differential::random::Random;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// `pvclock_vcpu_time_info` (Linux, Documentation/virt/kvm/x86/msr.rst).
const CLOCK: u32 = DATA as u32 + 0x1_f000;
/// `pvclock_wall_clock`.
const WALL: u32 = CLOCK + 0x100;
/// `kvm_steal_time`.
const STEAL: u32 = CLOCK + 0x200;

/// Reads of the clocks, and registering them anew.
pub const PARAVIRT: Pieces = (&[clock, clock, clock, wall, steal, again], 3);

fn register(a: &mut CodeAssembler, msr: u32, value: u32) -> Result<(), IcedError> {
    a.mov(ecx, msr)?;
    a.mov(eax, value)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// Everything registered.
pub fn set_up_paravirt(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    set_up(a, random)?;
    register(a, 0x4b56_4d00, WALL)?;
    register(a, 0x4b56_4d01, CLOCK | 1)?;
    register(a, 0x4b56_4d03, STEAL | 1)
}

fn fold(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.rol(qword_ptr(DATA as i32 + 0x10), 7)?;
    a.add(qword_ptr(DATA as i32 + 0x10), rax)
}

/// As Linux reads it (`__pvclock_read_cycles`).
fn clock(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    let (mut again, mut right, mut scaled) = (a.create_label(), a.create_label(), a.create_label());
    a.pushfq()?;
    a.cli()?;
    a.mov(r13, READING)?;
    a.mov(ebx, CLOCK)?;
    a.set_label(&mut again)?;
    a.mov(edi, dword_ptr(rbx))?;
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.sub(rax, qword_ptr(rbx + 8))?;
    a.movsx(ecx, byte_ptr(rbx + 28))?;
    a.test(ecx, ecx)?;
    a.js(right)?;
    a.shl(rax, cl)?;
    a.jmp(scaled)?;
    a.set_label(&mut right)?;
    a.neg(ecx)?;
    a.shr(rax, cl)?;
    a.set_label(&mut scaled)?;
    a.mov(edx, dword_ptr(rbx + 24))?;
    a.mul(rdx)?;
    a.shrd(rax, rdx, 32)?;
    a.add(rax, qword_ptr(rbx + 16))?;
    a.cmp(edi, dword_ptr(rbx))?;
    a.jne(again)?;
    a.test(edi, 1)?;
    a.jne(again)?;
    a.xor(edi, edi)?;
    a.xor(edx, edx)?;
    a.xor(ecx, ecx)?;
    a.xor(r13d, r13d)?;
    a.popfq()?;
    fold(a)
}

fn wall(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    a.mov(rax, qword_ptr(WALL + 4))?;
    fold(a)
}

fn steal(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    a.mov(rax, qword_ptr(STEAL))?;
    fold(a)?;
    a.movzx(eax, byte_ptr(STEAL + 16))?;
    fold(a)
}

fn again(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    match random.below(3) {
        0 => register(a, 0x4b56_4d00, WALL),
        1 => register(a, 0x4b56_4d01, CLOCK | 1),
        _ => {
            register(a, 0x4b56_4d03, 0)?;
            register(a, 0x4b56_4d03, STEAL | 1)
        }
    }
}
