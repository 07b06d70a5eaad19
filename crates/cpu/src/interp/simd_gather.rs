//! Gathers and scatters: one access for each element, which fault between elements and go on from
//! there (SDM Vol. 2, VGATHER, VPGATHER, VSCATTER, VPSCATTER; exception classes 12 and E12).

use iced_x86::{EncodingKind, Mnemonic as M, Register};

use super::simd_evex::elements;
use super::simd_masked::selected;
use crate::assist::Class;
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::mode::Mode;

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    let m = insn.raw.mnemonic();
    match insn.raw.encoding() {
        EncodingKind::VEX => vex(m),
        EncodingKind::EVEX => evex(m),
        _ => None,
    }
}

fn vex(m: M) -> Option<Handler> {
    Some(match m {
        M::Vpgatherdd | M::Vgatherdps => gather_vex::<4, 4>,
        M::Vpgatherqd | M::Vgatherqps => gather_vex::<8, 4>,
        M::Vpgatherdq | M::Vgatherdpd => gather_vex::<4, 8>,
        M::Vpgatherqq | M::Vgatherqpd => gather_vex::<8, 8>,
        _ => return None,
    })
}

fn evex(m: M) -> Option<Handler> {
    Some(match m {
        M::Vpgatherdd | M::Vgatherdps => gather::<4, 4>,
        M::Vpgatherqd | M::Vgatherqps => gather::<8, 4>,
        M::Vpgatherdq | M::Vgatherdpd => gather::<4, 8>,
        M::Vpgatherqq | M::Vgatherqpd => gather::<8, 8>,
        M::Vpscatterdd | M::Vscatterdps => scatter::<4, 4>,
        M::Vpscatterqd | M::Vscatterqps => scatter::<8, 4>,
        M::Vpscatterdq | M::Vscatterdpd => scatter::<4, 8>,
        M::Vpscatterqq | M::Vscatterqpd => scatter::<8, 8>,
        _ => return None,
    })
}

fn number(r: Register) -> u8 {
    r.number() as u8
}

/// Where element `i` is: the index is sign-extended and scaled.
fn element_offset<const INDEX: usize>(insn: &Insn, base: u64, index: &[u8], i: usize) -> u64 {
    let at = index.get(i * INDEX..(i + 1) * INDEX).unwrap_or_default();
    let sign = at.last().is_some_and(|b| b & 0x80 != 0);
    let start = if sign { u64::MAX } else { 0 };
    let index = at.iter().rev().fold(start, |n, b| n << 8 | u64::from(*b));
    base.wrapping_add(index << insn.scale) & insn.addr_mask
}

/// The operands of an EVEX-encoded gather or scatter.
struct Operands {
    /// The vector register loaded or stored.
    data: u8,
    mask_register: u8,
    /// Its value; the bits of elements that are done are cleared when a fault comes between.
    mask: u64,
    /// The elements to do.
    selected: u64,
    index: [[u8; 16]; 4],
    elements: usize,
    /// In bytes; the data may have half of it.
    vector_length: usize,
}

impl Operands {
    fn of<const INDEX: usize, const SIZE: usize>(cpu: &Cpu, insn: &Insn, data: Register) -> Self {
        let raw = &insn.raw;
        let index = raw.memory_index();
        let elements = (index.size() / INDEX).min(data.size() / SIZE);
        let mask_register = number(raw.op_mask());
        let mask = cpu.opmask(mask_register);
        Self {
            data: number(data),
            mask_register,
            mask,
            selected: mask & ((1 << elements) - 1),
            index: cpu.quarters(number(index), 4),
            elements,
            vector_length: index.size().max(data.size()),
        }
    }
}

/// Indices of `INDEX` bytes, elements of `SIZE` bytes. An element that is done clears its bit of the
/// mask, so that after a fault the instruction goes on with the rest. A fault of the first leaves no
/// trace.
fn gather<const INDEX: usize, const SIZE: usize>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::Evex)?;
    let ops = Operands::of::<INDEX, SIZE>(cpu, insn, insn.raw.op0_register());
    if ops.data == number(insn.raw.memory_index()) {
        return Err(cpu.ud());
    }
    let mut v = cpu.quarters(ops.data, 4);
    let bytes = v.as_flattened_mut();
    bytes[ops.vector_length..].fill(0);
    let base = cpu.effective_address(insn);
    let mut left = ops.mask;
    for i in elements(ops.selected) {
        let offset = element_offset::<INDEX>(insn, base, ops.index.as_flattened(), i);
        match cpu.read_element(insn.seg, offset, SIZE) {
            Ok(element) => bytes[i * SIZE..][..SIZE].copy_from_slice(&element[..SIZE]),
            Err(stop) => {
                // A device read is replayed from the start, with the data of those before it.
                if stop == Stop::Fault && left != ops.mask {
                    cpu.set_quarters(ops.data, &v);
                    cpu.set_opmask(ops.mask_register, left);
                }
                return Err(stop);
            }
        }
        left &= !(1 << i);
    }
    bytes[ops.elements * SIZE..].fill(0);
    cpu.set_quarters(ops.data, &v);
    cpu.set_opmask(ops.mask_register, 0);
    Ok(())
}

/// As [`gather`], in the other direction; where elements overlap the last one stays.
fn scatter<const INDEX: usize, const SIZE: usize>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::Evex)?;
    let ops = Operands::of::<INDEX, SIZE>(cpu, insn, insn.raw.op1_register());
    let v = cpu.quarters(ops.data, 4);
    let base = cpu.effective_address(insn);
    let mut left = ops.mask;
    for i in elements(ops.selected) {
        let offset = element_offset::<INDEX>(insn, base, ops.index.as_flattened(), i);
        let element = &v.as_flattened()[i * SIZE..][..SIZE];
        if let Err(stop) = cpu.write_unaligned(insn.seg, offset, element) {
            cpu.set_opmask(ops.mask_register, left);
            return Err(stop);
        }
        left &= !(1 << i);
    }
    cpu.set_opmask(ops.mask_register, 0);
    Ok(())
}

/// The VEX form: the mask is a vector register, the top bit of each element counts.
fn gather_vex<const INDEX: usize, const SIZE: usize>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    cpu.check_class(Class::Avx)?;
    let raw = &insn.raw;
    let (to, mask_register) = (number(raw.op0_register()), number(raw.op2_register()));
    let index_register = number(raw.memory_index());
    // No two of the three registers may be the same.
    if to == mask_register || to == index_register || mask_register == index_register {
        return Err(cpu.ud());
    }
    let index_len = raw.memory_index().size().min(32);
    let to_len = raw.op0_register().size().min(32);
    let elements = (index_len / INDEX).min(to_len / SIZE);
    let index = cpu.ymm(index_register);
    let mut v = cpu.ymm(to);
    let mut mask = cpu.ymm(mask_register);
    // Elements the instruction does not have are cleared in both registers.
    v[elements * SIZE..].fill(0);
    for i in 0..32 / SIZE {
        let on = i < elements && selected::<SIZE>(&mask, i);
        mask[i * SIZE..][..SIZE].fill(if on { 0xff } else { 0 });
    }
    let base = cpu.effective_address(insn);
    for i in 0..elements {
        if !selected::<SIZE>(&mask, i) {
            continue;
        }
        let offset = element_offset::<INDEX>(insn, base, &index, i);
        match cpu.read_element(insn.seg, offset, SIZE) {
            Ok(element) => v[i * SIZE..][..SIZE].copy_from_slice(&element[..SIZE]),
            Err(stop) => {
                // A device read is replayed from the start, with the data of those before it.
                if stop == Stop::Fault {
                    cpu.set_ymm_bytes(to, &v);
                    cpu.set_ymm_bytes(mask_register, &mask);
                }
                return Err(stop);
            }
        }
        mask[i * SIZE..][..SIZE].fill(0);
    }
    cpu.set_ymm_bytes(to, &v);
    cpu.set_ymm_bytes(mask_register, &[0; 32]);
    Ok(())
}
