//! The host's own ALU as the guest's: each primitive executes the instruction it is named after and
//! returns the result with the flags it left, so that flags the SDM calls undefined come out as
//! this host leaves them.
//!
//! Flags travel through LAHF/SAHF and SETO (OF is set by adding 7Fh to it in a byte), which cost a
//! cycle each; PUSHF and POPF would cost tens. Flags are in RFLAGS positions: the result of a
//! primitive holds CF, PF, AF, ZF, SF, OF and the fixed bit 1, and nothing else.

use std::arch::asm;

use crate::memory::access::Ram;
use crate::state::rflags;
use crate::width::Width;

/// From RAX after `lahf; seto al` to RFLAGS bits. LAHF reads bits 3 and 5 as 0 and bit 1 as 1, as
/// they are in RFLAGS.
#[inline(always)]
fn flags_out(rax: u64) -> u64 {
    rax >> 8 & 0xff | u64::from(rax as u8) << 11
}

/// From RFLAGS to RAX before `add al, 0x7f; sahf`.
#[inline(always)]
fn flags_in(flags: u64) -> u64 {
    (flags & 0xff) << 8 | flags >> 11 & 1
}

/// Result and flags.
pub type Outcome<T> = (T, u64);

/// Operations of every operand size.
pub trait Alu: Ram {
    /// ADD.
    fn add(a: Self, b: Self) -> Outcome<Self>;
    /// SUB, CMP, and (from 0) NEG.
    fn sub(a: Self, b: Self) -> Outcome<Self>;
    /// AND and TEST.
    fn and(a: Self, b: Self) -> Outcome<Self>;
    /// OR.
    fn or(a: Self, b: Self) -> Outcome<Self>;
    /// XOR.
    fn xor(a: Self, b: Self) -> Outcome<Self>;
    /// ADC.
    fn adc(a: Self, b: Self, flags: u64) -> Outcome<Self>;
    /// SBB.
    fn sbb(a: Self, b: Self, flags: u64) -> Outcome<Self>;
    /// SHL; as with all shifts and rotates, a masked count of 0 returns `flags` unchanged.
    fn shl(a: Self, count: u8, flags: u64) -> Outcome<Self>;
    /// SHR.
    fn shr(a: Self, count: u8, flags: u64) -> Outcome<Self>;
    /// SAR.
    fn sar(a: Self, count: u8, flags: u64) -> Outcome<Self>;
    /// ROL.
    fn rol(a: Self, count: u8, flags: u64) -> Outcome<Self>;
    /// ROR.
    fn ror(a: Self, count: u8, flags: u64) -> Outcome<Self>;
    /// RCL.
    fn rcl(a: Self, count: u8, flags: u64) -> Outcome<Self>;
    /// RCR.
    fn rcr(a: Self, count: u8, flags: u64) -> Outcome<Self>;
    /// MUL: low half, high half.
    fn mul(a: Self, b: Self, flags: u64) -> ((Self, Self), u64);
    /// IMUL with one operand: low half, high half.
    fn imul(a: Self, b: Self, flags: u64) -> ((Self, Self), u64);
    /// DIV: quotient, remainder; `None` where the processor raises #DE.
    fn div(low: Self, high: Self, divisor: Self, flags: u64) -> Option<((Self, Self), u64)>;
    /// IDIV: quotient, remainder; `None` where the processor raises #DE.
    fn idiv(low: Self, high: Self, divisor: Self, flags: u64) -> Option<((Self, Self), u64)>;
}

/// Operations that have no byte form.
pub trait WordAlu: Alu {
    /// IMUL with two or three operands.
    fn imul_truncated(a: Self, b: Self, flags: u64) -> Outcome<Self>;
    /// SHLD: `a` shifted left, filled from `b`.
    fn shld(a: Self, b: Self, count: u8, flags: u64) -> Outcome<Self>;
    /// SHRD: `a` shifted right, filled from `b`.
    fn shrd(a: Self, b: Self, count: u8, flags: u64) -> Outcome<Self>;
    /// BSF into a register that holds `dest`: all 64 bits of it afterwards.
    fn bsf(dest: u64, v: Self, flags: u64) -> Outcome<u64>;
    /// BSR, like `bsf`.
    fn bsr(dest: u64, v: Self, flags: u64) -> Outcome<u64>;
    /// TZCNT (a host without BMI1 runs BSF, as it would for any program).
    fn tzcnt(dest: u64, v: Self, flags: u64) -> Outcome<u64>;
    /// LZCNT (a host without it runs BSR).
    fn lzcnt(dest: u64, v: Self, flags: u64) -> Outcome<u64>;
}

/// `insn a, b` that reads no flags.
macro_rules! binary {
    ($name:ident, $insn:literal, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(a: Self, b: Self) -> Outcome<Self> {
            let mut r = a;
            let ax: u64;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(concat!($insn, " {r", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    r = inout($class) r, b = in($class) b, out("rax") ax,
                    options(pure, nomem, nostack))
            };
            (r, flags_out(ax))
        }
    };
}

/// `insn a, b` that reads CF.
macro_rules! carrying {
    ($name:ident, $insn:literal, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(a: Self, b: Self, flags: u64) -> Outcome<Self> {
            let mut r = a;
            let ax: u64;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!("bt eax, 0", concat!($insn, " {r", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    r = inout($class) r, b = in($class) b, inout("rax") flags => ax,
                    options(pure, nomem, nostack))
            };
            (r, flags_out(ax))
        }
    };
}

/// `insn a, cl`, with all flags going in.
macro_rules! shift {
    ($name:ident, $insn:literal, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(a: Self, count: u8, flags: u64) -> Outcome<Self> {
            let mut r = a;
            let ax: u64;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($insn, " {r", $m, "}, cl"), "lahf", "seto al",
                    r = inout($class) r, in("cl") count, inout("rax") flags_in(flags) => ax,
                    options(pure, nomem, nostack))
            };
            (r, flags_out(ax))
        }
    };
}

/// `insn a, b, cl`, with all flags going in.
macro_rules! double_shift {
    ($name:ident, $insn:literal, $m:literal) => {
        #[inline(always)]
        fn $name(a: Self, b: Self, count: u8, flags: u64) -> Outcome<Self> {
            let mut r = a;
            let ax: u64;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($insn, " {r", $m, "}, {b", $m, "}, cl"),
                    "lahf", "seto al",
                    r = inout(reg) r, b = in(reg) b, in("cl") count,
                    inout("rax") flags_in(flags) => ax,
                    options(pure, nomem, nostack))
            };
            (r, flags_out(ax))
        }
    };
}

/// `insn dest, v`, with all flags and the whole destination register going in.
macro_rules! scan {
    ($name:ident, $insn:literal, $m:literal) => {
        #[inline(always)]
        fn $name(dest: u64, v: Self, flags: u64) -> Outcome<u64> {
            let mut r = dest;
            let ax: u64;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($insn, " {r", $m, "}, {v", $m, "}"),
                    "lahf", "seto al",
                    r = inout(reg) r, v = in(reg) v, inout("rax") flags_in(flags) => ax,
                    options(pure, nomem, nostack))
            };
            (r, flags_out(ax))
        }
    };
}

/// A one-operand form on (R|E)AX and (R|E)DX, with all flags going in.
macro_rules! accumulator {
    ($insn:literal, $m:literal, $low:expr, $high:expr, $operand:expr, $flags:expr) => {{
        let (mut a, mut d) = ($low.to_u64(), $high.to_u64());
        let ax: u64;
        // SAFETY: arithmetic on registers only; a division does not raise #DE, for its operands were
        // looked at before.
        unsafe {
            asm!("add al, 0x7f", "sahf", "mov rax, {a}", concat!($insn, " {b", $m, "}"),
                "mov {a}, rax", "lahf", "seto al",
                a = inout(reg) a, b = in(reg) $operand, inout("rdx") d,
                inout("rax") flags_in($flags) => ax, options(pure, nomem, nostack))
        };
        ((Self::from_u64(a), Self::from_u64(d)), flags_out(ax))
    }};
}

/// A one-operand form of 8 bits, on AX alone, with all flags going in.
macro_rules! accumulator8 {
    ($insn:literal, $m:literal, $low:expr, $high:expr, $operand:expr, $flags:expr) => {{
        let mut a = $low.to_u64() | $high.to_u64() << 8;
        let ax: u64;
        // SAFETY: arithmetic on registers only; a division does not raise #DE, for its operands were
        // looked at before.
        unsafe {
            asm!("add al, 0x7f", "sahf", "mov rax, {a}", concat!($insn, " {b}"),
                "mov {a}, rax", "lahf", "seto al",
                a = inout(reg) a, b = in(reg_byte) $operand,
                inout("rax") flags_in($flags) => ax, options(pure, nomem, nostack))
        };
        ((a as u8, (a >> 8) as u8), flags_out(ax))
    }};
}

/// Whether a signed division overflows or divides by zero.
#[inline(always)]
fn idiv_faults<T: Alu>(low: T, high: T, divisor: T) -> bool {
    let d = divisor.to_i64();
    if d == 0 {
        return true;
    }
    let min = i64::MIN >> (64 - T::BITS);
    if high == T::from_u64((low.to_i64() >> 63) as u64) {
        return d == -1 && low.to_i64() == min;
    }
    let n = i128::from(high.to_i64()) << T::BITS | i128::from(low.to_u64());
    n.checked_div(d.into())
        .is_none_or(|q| q < min.into() || q > i128::from(!min))
}

macro_rules! every_size {
    ($t:ty, $class:ident, $m:literal, $accumulator:ident) => {
        impl Alu for $t {
            binary!(add, "add", $class, $m);
            binary!(sub, "sub", $class, $m);
            binary!(and, "and", $class, $m);
            binary!(or, "or", $class, $m);
            binary!(xor, "xor", $class, $m);
            carrying!(adc, "adc", $class, $m);
            carrying!(sbb, "sbb", $class, $m);
            shift!(shl, "shl", $class, $m);
            shift!(shr, "shr", $class, $m);
            shift!(sar, "sar", $class, $m);
            shift!(rol, "rol", $class, $m);
            shift!(ror, "ror", $class, $m);
            shift!(rcl, "rcl", $class, $m);
            shift!(rcr, "rcr", $class, $m);

            #[inline(always)]
            fn mul(a: Self, b: Self, flags: u64) -> ((Self, Self), u64) {
                $accumulator!("mul", $m, a, Self::default(), b, flags)
            }
            #[inline(always)]
            fn imul(a: Self, b: Self, flags: u64) -> ((Self, Self), u64) {
                $accumulator!("imul", $m, a, Self::default(), b, flags)
            }
            #[inline(always)]
            fn div(low: Self, high: Self, by: Self, flags: u64) -> Option<((Self, Self), u64)> {
                (high < by).then(|| $accumulator!("div", $m, low, high, by, flags))
            }
            #[inline(always)]
            fn idiv(low: Self, high: Self, by: Self, flags: u64) -> Option<((Self, Self), u64)> {
                (!idiv_faults(low, high, by))
                    .then(|| $accumulator!("idiv", $m, low, high, by, flags))
            }
        }
    };
}

macro_rules! word_sizes {
    ($t:ty, $m:literal) => {
        impl WordAlu for $t {
            double_shift!(shld, "shld", $m);
            double_shift!(shrd, "shrd", $m);
            scan!(bsf, "bsf", $m);
            scan!(bsr, "bsr", $m);
            scan!(tzcnt, "tzcnt", $m);
            scan!(lzcnt, "lzcnt", $m);

            #[inline(always)]
            fn imul_truncated(a: Self, b: Self, flags: u64) -> Outcome<Self> {
                let mut r = a;
                let ax: u64;
                // SAFETY: arithmetic on registers only.
                unsafe {
                    asm!("add al, 0x7f", "sahf", concat!("imul {r", $m, "}, {b", $m, "}"),
                        "lahf", "seto al",
                        r = inout(reg) r, b = in(reg) b, inout("rax") flags_in(flags) => ax,
                        options(pure, nomem, nostack))
                };
                (r, flags_out(ax))
            }
        }
    };
}

every_size!(u8, reg_byte, "", accumulator8);
every_size!(u16, reg, ":x", accumulator);
every_size!(u32, reg, ":e", accumulator);
every_size!(u64, reg, ":r", accumulator);
word_sizes!(u16, ":x");
word_sizes!(u32, ":e");
word_sizes!(u64, ":r");

/// The flags an instruction that changes only `mask` leaves.
#[inline(always)]
pub fn merge(old: u64, new: u64, mask: u64) -> u64 {
    old & !mask | new & mask
}

/// All six status flags replaced by those of a primitive, which come with no others.
#[inline(always)]
pub fn status(old: u64, new: u64) -> u64 {
    old & !rflags::STATUS | new
}

/// The bit-reversed CRC-32C polynomial.
const CRC32C: u32 = 0x82f6_3b78;

/// CRC-32C of one byte more, for each value of the low byte.
static CRC32C_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut v = i as u32;
        let mut bit = 0;
        while bit < 8 {
            v = if v & 1 != 0 { v >> 1 ^ CRC32C } else { v >> 1 };
            bit += 1;
        }
        table[i] = v;
        i += 1;
    }
    table
};

/// CRC32: `crc` extended by the low `bytes` bytes of `data`.
pub fn crc32(mut crc: u32, data: u64, bytes: usize) -> u32 {
    for b in data.to_le_bytes().iter().take(bytes) {
        crc = crc >> 8 ^ CRC32C_TABLE[usize::from(crc as u8 ^ b)];
    }
    crc
}
