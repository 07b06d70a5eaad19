//! Single accesses to guest RAM.
//!
//! Guest RAM is shared with other processors, device threads and, through the VMM's mapping, the
//! whole process, so it is never touched through references: each access is one host instruction
//! of the operand's size (unaligned allowed, as x86 does), written in assembly. Each such
//! instruction is listed in the `anykvm_extable` section, so that a fault on it (the VMM unmapped
//! the memory) can be resumed behind it ([`super::fault`]).

use super::elements;
use crate::width::Width;
use std::arch::asm;

/// Wraps one assembly instruction with an exception-table entry: (address, length to skip). `R`
/// (SHF_GNU_RETAIN) keeps the linker from dropping the section, which nothing refers to by name.
macro_rules! guarded {
    ($insn:literal) => {
        concat!(
            "2: ",
            $insn,
            "\n3:\n",
            ".pushsection anykvm_extable,\"aR\",@progbits\n",
            ".balign 4\n",
            ".long 2b - .\n",
            ".long 3b - 2b\n",
            ".popsection\n"
        )
    };
}
pub(super) use guarded;

/// Sizes that one host instruction accesses.
pub trait Ram: Width {
    /// Loads from a host address.
    ///
    /// # Safety
    /// `at` must come from a memory slot of a map this processor holds.
    unsafe fn load(at: u64) -> Self;
    /// Stores to a host address.
    ///
    /// # Safety
    /// As `load`.
    unsafe fn store(self, at: u64);
    /// LOCK CMPXCHG: returns the value found and whether the exchange took place.
    ///
    /// # Safety
    /// As `load`.
    unsafe fn compare_exchange(at: u64, expected: Self, new: Self) -> (Self, bool);
}

macro_rules! ram {
    ($t:ty, $load:literal, $store:literal, $cas:literal, $class:ident, $acc:tt) => {
        impl Ram for $t {
            #[inline(always)]
            unsafe fn load(at: u64) -> Self {
                let mut v: $t = 0;
                // SAFETY: reads one operand at an address the caller vouches for; a fault is
                // resumed behind the instruction, leaving v as it was.
                unsafe { asm!(guarded!($load), v = inout($class) v, p = in(reg) at, options(nostack, preserves_flags)) };
                v
            }
            #[inline(always)]
            unsafe fn store(self, at: u64) {
                // SAFETY: writes one operand at an address the caller vouches for.
                unsafe { asm!(guarded!($store), v = in($class) self, p = in(reg) at, options(nostack, preserves_flags)) };
            }
            #[inline(always)]
            unsafe fn compare_exchange(at: u64, expected: Self, new: Self) -> (Self, bool) {
                let mut found = expected;
                let swapped: u8;
                // SAFETY: one locked operand at an address the caller vouches for; ZF is set before,
                // so that a resumed fault counts as done and does not loop.
                unsafe {
                    asm!("cmp {z:e}, {z:e}", guarded!($cas), "sete {s}",
                        z = in(reg) 0u32, s = lateout(reg_byte) swapped, v = in($class) new, p = in(reg) at,
                        inout($acc) found, options(nostack))
                };
                (found, swapped != 0)
            }
        }
    };
}

ram!(
    u16,
    "mov {v:x}, [{p}]",
    "mov [{p}], {v:x}",
    "lock cmpxchg [{p}], {v:x}",
    reg,
    "ax"
);
ram!(
    u32,
    "mov {v:e}, [{p}]",
    "mov [{p}], {v:e}",
    "lock cmpxchg [{p}], {v:e}",
    reg,
    "eax"
);
ram!(
    u64,
    "mov {v}, [{p}]",
    "mov [{p}], {v}",
    "lock cmpxchg [{p}], {v}",
    reg,
    "rax"
);
ram!(
    u8,
    "mov {v}, [{p}]",
    "mov [{p}], {v}",
    "lock cmpxchg [{p}], {v}",
    reg_byte,
    "al"
);

/// LOCK CMPXCHG16B at a 16-byte aligned host address: the value found, and whether it exchanged.
///
/// # Safety
/// As [`Ram::load`].
pub unsafe fn compare_exchange_16(at: u64, expected: u128, new: u128) -> (u128, bool) {
    let (mut lo, mut hi) = (expected as u64, (expected >> 64) as u64);
    let swapped: u8;
    // SAFETY: RBX, which the compiler may keep to itself, is saved around its use (and so no operand
    // is left to the compiler to place there); one locked 16-byte operand at an address the caller
    // vouches for.
    unsafe {
        asm!("xchg rbx, rsi", "cmp esi, esi", guarded!("lock cmpxchg16b [rdi]"), "sete r8b", "mov rbx, rsi",
            inout("rsi") new as u64 => _, out("r8b") swapped, in("rdi") at,
            in("rcx") (new >> 64) as u64, inout("rax") lo, inout("rdx") hi, options(nostack))
    };
    (u128::from(hi) << 64 | u128::from(lo), swapped != 0)
}

/// Copies out of guest RAM: 8 bytes at a time, then the rest byte by byte.
pub(crate) fn copy_from_guest(buf: &mut [u8], host: u64) {
    let mut at = host;
    let (words, rest) = buf.as_chunks_mut::<8>();
    let to = words.as_mut_ptr().expose_provenance() as u64;
    elements::copy::<u64>(to, host, words.len() as u64, false);
    at += words.len() as u64 * 8;
    for b in rest {
        // SAFETY: as above.
        *b = unsafe { u8::load(at) };
        at += 1;
    }
}

/// Copies into guest RAM, like [`copy_from_guest`].
pub(crate) fn copy_to_guest(host: u64, data: &[u8]) {
    let mut at = host;
    let (words, rest) = data.as_chunks::<8>();
    for w in words {
        // SAFETY: callers pass host addresses inside a slot they hold.
        unsafe { u64::from_le_bytes(*w).store(at) };
        at += 8;
    }
    for b in rest {
        // SAFETY: as above.
        unsafe { b.store(at) };
        at += 1;
    }
}

/// Replaces a byte of guest RAM in one step; what was there.
pub(crate) fn exchange(host: u64, value: u8) -> u8 {
    let mut found = 0;
    loop {
        // SAFETY: callers pass host addresses inside a slot they hold.
        let (now, done) = unsafe { u8::compare_exchange(host, found, value) };
        if done {
            return found;
        }
        found = now;
    }
}

/// A page of guest RAM found by a page walk: a host address that is good until the processor lets
/// go of its map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPage(pub(crate) u64);

impl HostPage {
    /// The host page's number, for keys.
    pub fn number(self) -> u64 {
        self.0 >> 12
    }
    /// Copies bytes out of the page, from `offset`, at most to its end; returns how many.
    pub fn read(self, offset: usize, buf: &mut [u8]) -> usize {
        let n = buf.len().min(4096 - offset.min(4096));
        copy_from_guest(&mut buf[..n], self.0 + offset as u64);
        n
    }
    /// Whether the bytes at `offset` are these.
    pub fn matches(self, offset: usize, bytes: &[u8]) -> bool {
        if offset + bytes.len() > 4096 {
            return false;
        }
        let start = self.0 + offset as u64;
        // SAFETY: the callers' offsets lie in the bytes, and these in a page of a map the processor
        // holds.
        let same = |at: usize, word: &[u8; 8]| unsafe {
            u64::load(start + at as u64) == u64::from_le_bytes(*word)
        };
        let (words, rest) = bytes.as_chunks::<8>();
        if !words.iter().enumerate().all(|(n, word)| same(n * 8, word)) {
            return false;
        }
        // The rest by a word that overlaps the one before it, if there is one.
        match bytes.last_chunk::<8>() {
            Some(word) => same(bytes.len() - 8, word),
            None => rest.iter().enumerate().all(|(n, byte)| {
                // SAFETY: as above.
                unsafe { u8::load(start + n as u64) == *byte }
            }),
        }
    }
}
