//! Windows: what the checks of a loop found last.
//!
//! A check of the TLB's level 1 takes ten instructions, and in a loop most often finds the page it
//! found the time before. So each check of a loop has a *window* of its own, a range of linear
//! addresses whose bytes may be accessed and the addend that leads to them, and asks only whether its
//! bytes begin in there; that is half as long. What is not in the window is looked up in level 1.
//! Only for a page that follows the window's, or that is missed twice in a row, the window is moved, by a function
//! ([`probes`]): a chain of loads that depend on each other, at random, would wait for it each time.
//!
//! There are fewer windows than checks of loops, so several checks may use one, and what one of them put
//! there serves the others. All accesses at RSP, in loops or not, use the same ones: the stack stays in a page
//! for long. Therefore windows are of *kinds*: for reads or for writes, and for accesses up
//! to a size, which is what the limit leaves room for. Of one translation no two checks have the same
//! window.
//!
//! A window is a copy of a TLB entry, so it must not outlive what the entry rests on: all are emptied
//! when translated code is entered after the TLB dropped something, or for another address space or
//! other rights ([`Windows::empty_if_changed`]). User and supervisor code have windows of their own.

use anykvm_cpu::translator::{TLB_ADDEND, TLB_INDEX_MASK, TLB_INDEX_SHIFT, TLB_READ, TLB_WRITE};
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};
use std::mem::offset_of;

use crate::asm::{Asm, Hole, at, shared, slot};
use crate::memory::{Bytes, Use};
use crate::refill;
use crate::regs::{POINTER, SCRATCH};
use crate::shared::{Shared, Slot};

/// Sizes of accesses, and for how many windows there are of each: for reads, and again for writes.
const SIZES: [(usize, u8); 5] = [(8, 128), (16, 48), (32, 16), (64, 16), (512, 46)];
/// Windows for reads of the code of one privilege.
const READS: usize = 256;
/// How many of the last kind, for reads and again for writes, are the stack's: one for each of these sizes.
const STACK_SIZES: [usize; 2] = [64, 512];
/// Windows of the code of one privilege.
const WINDOWS: usize = 2 * READS;

const _: () = {
    let (mut sum, mut n) = (0, 0);
    while n < SIZES.len() {
        sum += SIZES[n].1 as usize;
        n += 1;
    }
    assert!(sum + STACK_SIZES.len() == READS);
};

/// Which windows are taken next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Next([[u8; SIZES.len()]; 2]);

/// The windows that a translation takes.
#[derive(Clone, Debug)]
pub struct Taken {
    next: Next,
    taken: [[u8; SIZES.len()]; 2],
    user: bool,
}

impl Taken {
    /// None yet.
    pub fn new(next: Next, user: bool) -> Self {
        Self {
            next,
            taken: Default::default(),
            user,
        }
    }

    /// A window for an access, and the size it is for; `None` if the translation has all of that kind.
    pub fn take(&mut self, bytes: &Bytes) -> Option<(u32, usize)> {
        let write = usize::from(bytes.usage != Use::Read);
        let kind = SIZES.iter().position(|(size, _)| bytes.count <= *size)?;
        let (size, all) = SIZES[kind];
        let taken = &mut self.taken[write][kind];
        if *taken == all {
            return None;
        }
        *taken += 1;
        let next = &mut self.next.0[write][kind];
        let number = *next;
        *next = (number + 1) % all;
        let before: usize = SIZES[..kind].iter().map(|(_, n)| usize::from(*n)).sum();
        let first = usize::from(self.user) * WINDOWS + write * READS + before;
        Some(((first + usize::from(number)) as u32, size))
    }

    /// Which are taken next, by another translation.
    pub fn next(&self) -> Next {
        self.next
    }
}

/// The window, and the size it is for, that all stack accesses of up to a size use.
pub fn of_stack(bytes: &Bytes, user: bool) -> Option<(u32, usize)> {
    let kind = STACK_SIZES.iter().position(|size| bytes.count <= *size)?;
    let behind =
        usize::from(user) * WINDOWS + usize::from(bytes.usage != Use::Read) * READS + READS;
    let number = behind - STACK_SIZES.len() + kind;
    Some((number as u32, STACK_SIZES[kind]))
}

/// Windows that share a byte of [`Windows::touched`].
const TOGETHER: usize = WINDOWS / 64;

/// A range of linear addresses.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub struct Window {
    /// Its page.
    start: u64,
    /// How many bytes may be the first of those the check is for; 0 if it is empty.
    limit: u64,
    /// Host address minus linear address.
    addend: u64,
    /// The page it moves to when it is missed there: the one behind it, then the one that was missed last. For
    /// the stack's, in the low half, how soon it moves.
    next: u64,
}

/// The windows of a processor.
#[derive(Debug)]
#[repr(C)]
pub struct Windows {
    /// Supervisor code's, then user code's.
    all: [Window; 2 * WINDOWS],
    /// For each privilege a byte for each [`TOGETHER`] of its windows, not 0 if some may not be empty.
    touched: [[u8; WINDOWS / TOGETHER]; 2],
    /// What they rest on: see [`Windows::empty_if_changed`].
    rest_on: [(u64, u64, u64); 2],
}

impl Windows {
    /// Empties the windows of code of a privilege, unless what they rest on is the same still: the TLB's
    /// count of dropped entries, the address space, and the rights ([`anykvm_cpu::Cpu::tlb_state`]). True
    /// if it did.
    pub fn empty_if_changed(&mut self, user: bool, now: (u64, u64, u64)) -> bool {
        let n = usize::from(user);
        let changed = self.rest_on[n] != now;
        if changed {
            self.rest_on[n] = now;
            let of_privilege = n * WINDOWS..(n + 1) * WINDOWS;
            let together = self.all[of_privilege].chunks_exact_mut(TOGETHER);
            for (touched, windows) in self.touched[n].iter_mut().zip(together) {
                if std::mem::take(touched) != 0 {
                    windows.fill(Window::default());
                }
            }
        }
        changed
    }
}

/// Offset of a window in [`Shared`].
fn window(number: u32, field: usize) -> i64 {
    let first = offset_of!(Shared, windows) + offset_of!(Windows, all);
    (first + number as usize * size_of::<Window>() + field) as i64
}

/// Where a window's addend is.
pub fn addend(number: u32) -> i64 {
    window(number, offset_of!(Window, addend))
}

/// Emits what asks whether the linear address in R15 is in a window; leaves its distance from the window's
/// start, which is a page's, there. The branch that is taken if not is JAE.
pub fn compare(a: &mut Asm, number: u32) -> Result<(), IcedError> {
    let start = shared(window(number, offset_of!(Window, start)));
    let limit = shared(window(number, offset_of!(Window, limit)));
    a.emit(Code::Sub_r64_rm64, SCRATCH, start)?;
    a.emit(Code::Cmp_r64_rm64, SCRATCH, limit)
}

/// Emits what asks, where the bytes whose last is at the linear address in RCX are not in a window, whether
/// that is to be moved: if they are in the page that follows the window's, or was missed last. Returns the branch that
/// is taken if so.
pub fn should_move(a: &mut Asm, number: u32) -> Result<Hole, IcedError> {
    let next = shared(window(number, offset_of!(Window, next)));
    a.emit(Code::And_rm64_imm32, POINTER, -4096i32)?;
    a.emit(Code::Cmp_r64_rm64, POINTER, next)?;
    let moves = a.jcc(4);
    a.store(next, POINTER)?;
    Ok(moves)
}

/// Emits what puts into RCX by how many bytes what [`compare`] has found in a window may move before it
/// leaves it. `up`: to higher addresses.
pub fn room(a: &mut Asm, number: u32, up: bool) -> Result<(), IcedError> {
    if !up {
        return a.mov(POINTER, SCRATCH);
    }
    a.load(POINTER, shared(window(number, offset_of!(Window, limit))))?;
    a.emit(Code::Sub_r64_rm64, POINTER, SCRATCH)?;
    a.lea(POINTER, at(POINTER, -1))
}

/// What a probe is asked: bytes less one, size of the window's kind less one, window.
const FIELD: u32 = 9;
const FIELD_MASK: u32 = (1 << FIELD) - 1;

/// Emits what goes before the call of a probe, once the linear address is in R15. `size` is that of the
/// window's kind.
pub fn prepare_probe(a: &mut Asm, number: u32, size: usize, bytes: &Bytes) {
    let what = number << (2 * FIELD) | (size as u32 - 1) << FIELD | (bytes.count as u32 - 1);
    a.load_number(POINTER, what);
}

/// A field of the window whose offset among all is in RAX.
fn of_window(field: usize) -> MemoryOperand {
    in_shared(window(0, field))
}

/// A place in [`Shared`], RAX bytes behind this offset.
fn in_shared(offset: i64) -> MemoryOperand {
    MemoryOperand::new(
        Register::None,
        Register::RAX,
        1,
        offset,
        4,
        false,
        Register::GS,
    )
}

/// When a function that is called for a window moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moves {
    /// Always.
    Always,
    /// One time in eight, because it may be about to go to and fro between two pages.
    Sometimes,
}

/// Generates the functions that look up what is not in a window, for reads and for writes; returns their
/// positions.
///
/// In: R15 the linear address of the first byte; ECX as [`prepare_probe`] makes it. Out: ZF if the bytes are
/// in one page that the TLB has; then RCX is the addend. They change nothing else.
///
/// `refills`: what [`refill::refills`] has generated.
pub fn probes(a: &mut Asm, refills: [usize; 2], moves: Moves) -> Result<[usize; 2], IcedError> {
    Ok([
        probe(a, TLB_READ, refills[0], moves)?,
        probe(a, TLB_WRITE, refills[1], moves)?,
    ])
}

fn probe(a: &mut Asm, tag: i64, refill: usize, moves: Moves) -> Result<usize, IcedError> {
    use Code as C;
    use Register as R;
    let here = a.here();
    let saved = [
        (Slot::Probe0, R::RAX),
        (Slot::Probe1, R::RDX),
        (Slot::Probe3, SCRATCH),
    ];
    for (place, r) in saved {
        a.store(slot(place), r)?;
    }
    a.store(slot(Slot::Probe2), R::RCX)?;
    let size = size_of::<Window>().trailing_zeros();
    a.emit(C::Mov_r32_rm32, R::EAX, R::ECX)?;
    a.emit(C::Shr_rm32_imm8, R::EAX, 2 * FIELD)?;
    a.emit(C::Shl_rm32_imm8, R::EAX, size)?;
    // The tag of the last byte, and the entry of the first.
    a.emit(C::And_rm32_imm32, R::ECX, FIELD_MASK)?;
    a.emit(C::Add_r64_rm64, R::RCX, SCRATCH)?;
    a.emit(C::And_rm64_imm32, R::RCX, -4096i32)?;
    a.mov(R::RDX, R::RCX)?;
    a.emit(C::Or_r64_rm64, R::RCX, slot(Slot::Asn))?;
    a.emit(C::Shr_rm64_imm8, SCRATCH, TLB_INDEX_SHIFT)?;
    a.emit(C::And_rm32_imm32, R::R15D, TLB_INDEX_MASK)?;
    a.emit(C::Add_r64_rm64, SCRATCH, slot(Slot::Level1))?;
    a.emit(C::Cmp_r64_rm64, R::RCX, at(SCRATCH, tag))?;
    let hit = a.jcc(4);
    refill::call(a, refill);
    let missed = a.jne();
    a.land(hit);
    a.load(R::RCX, at(SCRATCH, TLB_ADDEND))?;
    let mut stays = None;
    if moves == Moves::Sometimes {
        // A borrow once in eight times, and from the 0 of an empty window.
        let count = of_window(offset_of!(Window, next));
        a.put(&Instruction::with2(C::Sub_rm32_imm32, count, 1u32 << 29)?)?;
        stays = Some(a.jcc(3));
    }
    a.store(of_window(offset_of!(Window, start)), R::RDX)?;
    a.store(of_window(offset_of!(Window, addend)), R::RCX)?;
    if moves == Moves::Always {
        a.lea(R::RDX, at(R::RDX, 4096))?;
        a.store(of_window(offset_of!(Window, next)), R::RDX)?;
    }
    a.load(R::RDX, slot(Slot::Probe2))?;
    a.emit(C::Shr_rm32_imm8, R::EDX, FIELD)?;
    a.emit(C::And_rm32_imm32, R::EDX, FIELD_MASK)?;
    // 4095 - n, plus one.
    a.emit(C::Xor_rm32_imm32, R::EDX, 0xfffu32)?;
    a.lea(R::RDX, at(R::RDX, 1))?;
    a.store(of_window(offset_of!(Window, limit)), R::RDX)?;
    let together = (TOGETHER * size_of::<Window>()).trailing_zeros();
    a.emit(C::Shr_rm32_imm8, R::EAX, together)?;
    let touched = (offset_of!(Shared, windows) + offset_of!(Windows, touched)) as i64;
    let touched = in_shared(touched);
    a.put(&Instruction::with2(C::Mov_rm8_imm8, touched, 1)?)?;
    if let Some(stays) = stays {
        a.land(stays);
    }
    // ZF, for the caller.
    a.emit(C::Cmp_r64_rm64, R::RAX, R::RAX)?;
    a.land(missed);
    for (place, r) in saved {
        a.load(r, slot(place))?;
    }
    a.put(&Instruction::with(C::Retnq))?;
    Ok(here)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever windows are taken, one is used only by accesses of one kind, and by one check of a translation.
    #[test]
    fn a_window_is_of_one_kind() {
        let mut kinds = std::collections::HashMap::new();
        let mut next = [Next::default(); 2];
        for _ in 0..50 {
            for user in [false, true] {
                let mut taken = Taken::new(next[usize::from(user)], user);
                let mut numbers = std::collections::HashSet::new();
                for count in (1..=512).chain(1..=512) {
                    for usage in [Use::Read, Use::Write, Use::Atomic] {
                        let bytes = Bytes {
                            from: 0,
                            count,
                            usage,
                            align: 1,
                        };
                        if let Some((number, size)) = of_stack(&bytes, user) {
                            let kind = (user, usage != Use::Read, size, true);
                            assert_eq!(*kinds.entry(number).or_insert(kind), kind);
                        }
                        let Some((number, size)) = taken.take(&bytes) else {
                            continue;
                        };
                        assert!(numbers.insert(number), "{number} twice");
                        assert!(count <= size && (number as usize) < 2 * WINDOWS);
                        let kind = (user, usage != Use::Read, size, false);
                        assert_eq!(*kinds.entry(number).or_insert(kind), kind);
                    }
                }
                next[usize::from(user)] = taken.next();
            }
        }
    }
}
