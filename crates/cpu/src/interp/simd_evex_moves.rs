//! The commonest EVEX-encoded instructions without a write mask, done without a stub: moves, the
//! operations of [`super::simd_moves`], VPTERNLOG, broadcasts of general registers. Comparisons into
//! an opmask register are in [`super::simd_compare`].

use iced_x86::{EncodingKind, Instruction, Mnemonic as M, OpKind, Register};

use super::simd_moves::{Forms, Operation, operation};
use super::simd_registers::Quarters;
use crate::assist::Class;
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::memory::access::Ram;

/// The handler, if the instruction is of this family. Vector and opmask register numbers go where
/// register codes of general registers are.
pub fn select(insn: &mut Insn) -> Option<Handler> {
    let raw = insn.raw;
    if raw.encoding() != EncodingKind::EVEX || raw.is_broadcast() {
        return None;
    }
    let handler = match raw.op_mask() {
        Register::None => moves(&raw)
            .or_else(|| binary(&raw))
            .or_else(|| ternary(&raw))
            .or_else(|| broadcast(&raw)),
        _ => None,
    };
    let handler = match handler {
        Some(handler) => handler,
        None => super::simd_compare::select(insn)?,
    };
    for (i, code) in (0..raw.op_count()).zip([&mut insn.op0, &mut insn.op1, &mut insn.op2]) {
        let r = raw.op_register(i);
        if raw.op_kind(i) == OpKind::Register && !r.is_gpr() {
            *code = r.number() as u8;
        }
    }
    Some(handler)
}

fn is_vector(raw: &Instruction, i: u32) -> bool {
    raw.op_kind(i) == OpKind::Register && raw.op_register(i).is_vector_register()
}

fn is_memory(raw: &Instruction, i: u32) -> bool {
    raw.op_kind(i) == OpKind::Memory
}

/// Quarters of the widest vector register operand.
pub(super) fn quarters_of(raw: &Instruction) -> usize {
    let sizes = (0..raw.op_count())
        .filter(|i| is_vector(raw, *i))
        .map(|i| raw.op_register(i).size() / 16);
    sizes.max().unwrap_or(1)
}

/// Instantiates a handler for a number of quarters.
macro_rules! by_length {
    ($quarters:expr, $f:ident $(, $extra:tt)*) => {
        match $quarters {
            1 => $f::<1 $(, $extra)*>,
            2 => $f::<2 $(, $extra)*>,
            _ => $f::<4 $(, $extra)*>,
        }
    };
}

/// Reads a memory operand of `N` quarters.
#[inline(always)]
pub(super) fn read<const N: usize>(cpu: &mut Cpu, insn: &Insn) -> Result<Quarters, Stop> {
    let offset = cpu.effective_address(insn);
    let mut v = [[0; 16]; 4];
    match N {
        1 => v[0] = cpu.read_16(insn.seg, offset)?,
        2 => [v[0], v[1]] = cpu.read_32(insn.seg, offset)?,
        _ => v = cpu.read_64(insn.seg, offset)?,
    }
    Ok(v)
}

#[inline(always)]
fn check(cpu: &mut Cpu) -> Result<(), Stop> {
    cpu.check_class(Class::Evex)
}

#[inline(always)]
fn check_aligned<const N: usize, const ALIGNED: bool>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    if ALIGNED {
        cpu.check_operand_alignment(insn, N as u64 * 16)?;
    }
    Ok(())
}

/// Moves of whole registers.
fn moves(raw: &Instruction) -> Option<Handler> {
    let aligned = match raw.mnemonic() {
        M::Vmovaps | M::Vmovapd | M::Vmovdqa32 | M::Vmovdqa64 => true,
        M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa => true,
        M::Vmovups | M::Vmovupd | M::Vmovdqu8 | M::Vmovdqu16 => false,
        M::Vmovdqu32 | M::Vmovdqu64 => false,
        _ => return None,
    };
    let n = quarters_of(raw);
    Some(match (is_memory(raw, 0), is_memory(raw, 1), aligned) {
        (false, false, _) => by_length!(n, copy),
        (false, true, true) => by_length!(n, load, true),
        (false, true, false) => by_length!(n, load, false),
        (true, _, true) => by_length!(n, store, true),
        (true, _, false) => by_length!(n, store, false),
    })
}

// VMOVUPS v, v and the like.
fn copy<const N: usize>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    let v = cpu.quarters(insn.op1, N);
    cpu.set_quarters(insn.op0, &v);
    Ok(())
}

// VMOVUPS v, m and the like.
fn load<const N: usize, const ALIGNED: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    check_aligned::<N, ALIGNED>(cpu, insn)?;
    let v = read::<N>(cpu, insn)?;
    cpu.set_quarters(insn.op0, &v);
    Ok(())
}

// VMOVUPS m, v and the like; non-temporal stores are stores.
fn store<const N: usize, const ALIGNED: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    check_aligned::<N, ALIGNED>(cpu, insn)?;
    let v = cpu.quarters(insn.op1, N);
    let offset = cpu.effective_address(insn);
    match N {
        1 => cpu.write_16(insn.seg, offset, v[0]),
        2 => cpu.write_32(insn.seg, offset, [v[0], v[1]]),
        _ => cpu.write_64(insn.seg, offset, v),
    }
}

/// The last operand in a register or in memory.
#[inline(always)]
fn last<const N: usize, const MEMORY: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<Quarters, Stop> {
    if MEMORY {
        read::<N>(cpu, insn)
    } else {
        Ok(cpu.quarters(insn.op2, N))
    }
}

/// Three-operand forms.
struct Form {
    quarters: usize,
    memory: bool,
}

impl Forms for Form {
    fn handler<O: Operation>(&self) -> Option<Handler> {
        Some(match (self.quarters, self.memory) {
            (1, false) => apply::<O, 1, false>,
            (2, false) => apply::<O, 2, false>,
            (_, false) => apply::<O, 4, false>,
            (1, true) => apply::<O, 1, true>,
            (2, true) => apply::<O, 2, true>,
            (_, true) => apply::<O, 4, true>,
        })
    }
}

fn binary(raw: &Instruction) -> Option<Handler> {
    if raw.op_count() != 3 || !is_vector(raw, 0) || !is_vector(raw, 1) {
        return None;
    }
    let form = Form {
        quarters: quarters_of(raw),
        memory: is_memory(raw, 2),
    };
    operation(raw.mnemonic(), &form)
}

// VPXORQ v, v, v/m and the like.
fn apply<O: Operation, const N: usize, const MEMORY: bool>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    check(cpu)?;
    let b = last::<N, MEMORY>(cpu, insn)?;
    let mut v = cpu.quarters(insn.op1, N);
    for (to, b) in v.iter_mut().zip(b).take(N) {
        *to = O::apply(*to, b);
    }
    cpu.set_quarters(insn.op0, &v);
    Ok(())
}

fn ternary(raw: &Instruction) -> Option<Handler> {
    if !matches!(raw.mnemonic(), M::Vpternlogd | M::Vpternlogq) {
        return None;
    }
    let n = quarters_of(raw);
    Some(if is_memory(raw, 2) {
        by_length!(n, vpternlog, true)
    } else {
        by_length!(n, vpternlog, false)
    })
}

/// A bit of VPTERNLOG's truth table in all bits.
#[inline(always)]
fn table_bit(table: u8, bit: u32) -> u128 {
    if table >> bit & 1 != 0 { u128::MAX } else { 0 }
}

#[inline(always)]
fn choose(by: u128, zero: u128, one: u128) -> u128 {
    zero ^ (by & (zero ^ one))
}

// Each bit of the three operands selects one of the immediate's, the first operand's being bit 2 of
// its number.
fn vpternlog<const N: usize, const MEMORY: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    let c = last::<N, MEMORY>(cpu, insn)?;
    let b = cpu.quarters(insn.op1, N);
    let mut v = cpu.quarters(insn.op0, N);
    let table: [u128; 8] = std::array::from_fn(|i| table_bit(insn.imm as u8, i as u32));
    for i in 0..N {
        let (a, b) = (u128::from_le_bytes(v[i]), u128::from_le_bytes(b[i]));
        let c = u128::from_le_bytes(c[i]);
        let low = choose(
            b,
            choose(c, table[0], table[1]),
            choose(c, table[2], table[3]),
        );
        let high = choose(
            b,
            choose(c, table[4], table[5]),
            choose(c, table[6], table[7]),
        );
        v[i] = choose(a, low, high).to_le_bytes();
    }
    cpu.set_quarters(insn.op0, &v);
    Ok(())
}

/// VPBROADCAST from a general register.
fn broadcast(raw: &Instruction) -> Option<Handler> {
    if raw.op_count() != 2 || raw.op_kind(1) != OpKind::Register || !raw.op1_register().is_gpr() {
        return None;
    }
    let n = quarters_of(raw);
    Some(match raw.mnemonic() {
        M::Vpbroadcastb => by_length!(n, from_gpr, u8),
        M::Vpbroadcastw => by_length!(n, from_gpr, u16),
        M::Vpbroadcastd => by_length!(n, from_gpr, u32),
        M::Vpbroadcastq => by_length!(n, from_gpr, u64),
        _ => return None,
    })
}

fn from_gpr<const N: usize, T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    let value = T::from_u64(cpu.state.regs[insn.op1]).to_u64();
    // Times 0x0101…, the element is in every place of the word.
    let ones = u64::MAX / T::from_u64(u64::MAX).to_u64();
    let word = u128::from(value.wrapping_mul(ones));
    let mut v = [[0; 16]; 4];
    for to in v.iter_mut().take(N) {
        *to = (word << 64 | word).to_le_bytes();
    }
    cpu.set_quarters(insn.op0, &v);
    Ok(())
}
