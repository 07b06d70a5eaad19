//! Runs of elements in guest RAM, as repeated string instructions work on them. Every run lies
//! inside one page of each operand, which the caller's TLB hit vouches for; like all accesses to
//! guest RAM each element is one host access, and a fault on it is resumed behind it.

use std::arch::asm;

use super::access::{Ram, guarded};

/// Below this many bytes a loop beats the host's own string instructions.
const SHORT: u64 = 128;

/// The address of element `i` of a run that goes up or down from `at`.
#[inline(always)]
fn element<T: Ram>(at: u64, i: u64, down: bool) -> u64 {
    let distance = i * T::BYTES as u64;
    if down { at - distance } else { at + distance }
}

/// Loads the element at a host address.
#[inline(always)]
fn load<T: Ram>(at: u64) -> T {
    // SAFETY: callers pass host addresses inside a slot they hold.
    unsafe { T::load(at) }
}

/// Stores an element at a host address.
#[inline(always)]
fn store<T: Ram>(at: u64, v: T) {
    // SAFETY: callers pass host addresses inside a slot they hold.
    unsafe { v.store(at) }
}

/// Copies `count` elements one after the other, up or down from the given addresses. Overlapping
/// runs come out as the guest's instruction defines it, element by element.
pub(crate) fn copy<T: Ram>(to: u64, from: u64, count: u64, down: bool) {
    if down || count * T::BYTES as u64 <= SHORT {
        for i in 0..count {
            store(
                element::<T>(to, i, down),
                load::<T>(element::<T>(from, i, down)),
            );
        }
        return;
    }
    macro_rules! host {
        ($insn:literal) => {
            // SAFETY: DF is clear in Rust code; callers pass runs inside a slot they hold.
            unsafe {
                asm!(guarded!($insn), inout("rcx") count => _, inout("rsi") from => _,
                    inout("rdi") to => _, options(nostack, preserves_flags))
            }
        };
    }
    match T::BYTES {
        1 => host!("rep movsb"),
        2 => host!("rep movsw"),
        4 => host!("rep movsd"),
        _ => host!("rep movsq"),
    }
}

/// Stores `count` times the same element, upwards.
pub(crate) fn fill<T: Ram>(to: u64, value: T, count: u64) {
    if count * T::BYTES as u64 <= SHORT {
        for i in 0..count {
            store(element::<T>(to, i, false), value);
        }
        return;
    }
    macro_rules! host {
        ($insn:literal) => {
            // SAFETY: DF is clear in Rust code; callers pass runs inside a slot they hold.
            unsafe {
                asm!(guarded!($insn), inout("rcx") count => _, in("rax") value.to_u64(),
                    inout("rdi") to => _, options(nostack, preserves_flags))
            }
        };
    }
    match T::BYTES {
        1 => host!("rep stosb"),
        2 => host!("rep stosw"),
        4 => host!("rep stosd"),
        _ => host!("rep stosq"),
    }
}

/// Reads elements until one satisfies `stop` or `count` (at least 1) are read: how many were read,
/// and the last.
#[inline(always)]
pub(crate) fn scan<T: Ram>(at: u64, count: u64, down: bool, stop: impl Fn(T) -> bool) -> (u64, T) {
    let mut i = 0;
    loop {
        let v = load(element::<T>(at, i, down));
        i += 1;
        if i >= count || stop(v) {
            return (i, v);
        }
    }
}

/// As [`scan`], over two runs at once.
#[inline(always)]
pub(crate) fn scan_two<T: Ram>(
    (a, b): (u64, u64),
    count: u64,
    down: bool,
    stop: impl Fn(T, T) -> bool,
) -> (u64, T, T) {
    let mut i = 0;
    loop {
        let (x, y) = (
            load(element::<T>(a, i, down)),
            load(element::<T>(b, i, down)),
        );
        i += 1;
        if i >= count || stop(x, y) {
            return (i, x, y);
        }
    }
}
