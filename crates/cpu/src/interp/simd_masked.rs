//! Vector loads and stores element by element: masked moves, which must not touch the memory of
//! elements that are masked off, and gathers, which fault between elements and go on from there
//! (SDM Vol. 2, VMASKMOV, VPMASKMOV, MASKMOVDQU, VGATHER).

use iced_x86::{EncodingKind, Mnemonic, OpKind, Register};

use super::simd_state::vector_class;
use crate::assist::Class;
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::mode::Mode;
use crate::state::{reg, seg};

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    let raw = &insn.raw;
    let load = raw.op0_kind() == OpKind::Register;
    Some(match raw.mnemonic() {
        Mnemonic::Maskmovq => maskmovq,
        Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => maskmovdqu,
        Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd if load => masked_load::<4>,
        Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq if load => masked_load::<8>,
        Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd => masked_store::<4>,
        Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq => masked_store::<8>,
        _ if raw.encoding() != EncodingKind::VEX => return None,
        Mnemonic::Vpgatherdd | Mnemonic::Vgatherdps => gather::<4, 4>,
        Mnemonic::Vpgatherqd | Mnemonic::Vgatherqps => gather::<8, 4>,
        Mnemonic::Vpgatherdq | Mnemonic::Vgatherdpd => gather::<4, 8>,
        Mnemonic::Vpgatherqq | Mnemonic::Vgatherqpd => gather::<8, 8>,
        _ => return None,
    })
}

fn number(r: Register) -> u8 {
    r.number() as u8
}

impl Cpu {
    /// 32 bytes of a vector register.
    fn ymm(&self, n: u8) -> [u8; 32] {
        let mut v = [0; 32];
        v[..16].copy_from_slice(&self.xmm(n));
        v[16..].copy_from_slice(&self.ymm_hi(n));
        v
    }
    fn set_ymm_bytes(&mut self, n: u8, v: &[u8; 32]) {
        let (chunks, _) = v.as_chunks::<16>();
        self.set_ymm(n, &chunks[0], &chunks[1]);
    }
}

/// Which elements a vector mask selects: those whose top bit is set.
fn selected<const SIZE: usize>(mask: &[u8], element: usize) -> bool {
    mask.get(element * SIZE + SIZE - 1)
        .is_some_and(|b| b & 0x80 != 0)
}

fn masked_load<const SIZE: usize>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::Avx)?;
    let raw = &insn.raw;
    let len = raw.op0_register().size().min(32);
    let mask = cpu.ymm(number(raw.op1_register()));
    let offset = cpu.effective_address(insn);
    let mut v = [0; 32];
    for i in (0..len / SIZE).filter(|i| selected::<SIZE>(&mask, *i)) {
        let at = offset.wrapping_add((i * SIZE) as u64) & insn.addr_mask;
        let element = cpu.read_operand_at(insn.seg, at, SIZE)?;
        v[i * SIZE..][..SIZE].copy_from_slice(&element[..SIZE]);
    }
    cpu.set_ymm_bytes(number(raw.op0_register()), &v);
    Ok(())
}

fn masked_store<const SIZE: usize>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::Avx)?;
    let raw = &insn.raw;
    let len = raw.op1_register().size().min(32);
    let mask = cpu.ymm(number(raw.op1_register()));
    let v = cpu.ymm(number(raw.op2_register()));
    let offset = cpu.effective_address(insn);
    store_selected::<SIZE>(cpu, insn.seg, offset, insn.addr_mask, &v[..len], &mask)
}

/// Stores the selected elements of `v`, after making sure that none of the stores faults.
fn store_selected<const SIZE: usize>(
    cpu: &mut Cpu,
    segment: u8,
    offset: u64,
    addr_mask: u64,
    v: &[u8],
    mask: &[u8],
) -> Result<(), Stop> {
    let at = |i: usize| offset.wrapping_add((i * SIZE) as u64) & addr_mask;
    let elements = (0..v.len() / SIZE).filter(|i| selected::<SIZE>(mask, *i));
    for i in elements.clone() {
        cpu.probe_write(segment, at(i), SIZE)?;
    }
    for i in elements {
        cpu.write_bytes(segment, at(i), &v[i * SIZE..][..SIZE])?;
    }
    Ok(())
}

/// The implicit operand DS:rDI of MASKMOVQ and MASKMOVDQU: segment code, offset, address mask.
fn implicit_destination(cpu: &Cpu, insn: &Insn) -> (u8, u64, u64) {
    let raw = &insn.raw;
    let mask = match raw.op0_kind() {
        OpKind::MemorySegDI => 0xffff,
        OpKind::MemorySegEDI => 0xffff_ffff,
        _ => u64::MAX,
    };
    let n = crate::decode::segment_number(raw.memory_segment()).unwrap_or(seg::DS);
    let code = crate::decode::segment_code(n, cpu.mode());
    (code, cpu.state.regs[reg::RDI] & mask, mask)
}

fn maskmovdqu(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(vector_class(insn))?;
    let v = cpu.xmm(number(insn.raw.op1_register()));
    let mask = cpu.xmm(number(insn.raw.op2_register()));
    let (segment, offset, addr_mask) = implicit_destination(cpu, insn);
    store_selected::<1>(cpu, segment, offset, addr_mask, &v, &mask)
}

fn maskmovq(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::Mmx)?;
    cpu.check_x87_pending()?;
    let v = cpu.mmx(number(insn.raw.op1_register()));
    let mask = cpu.mmx(number(insn.raw.op2_register()));
    let (segment, offset, addr_mask) = implicit_destination(cpu, insn);
    store_selected::<1>(cpu, segment, offset, addr_mask, &v, &mask)?;
    super::x87::enter_mmx(cpu);
    Ok(())
}

/// Indices of `INDEX` bytes, elements of `SIZE` bytes. An element that is done clears its mask
/// element, so that after a fault the instruction goes on with the rest.
fn gather<const INDEX: usize, const SIZE: usize>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
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
        let at = &index[i * INDEX..][..INDEX];
        let at = at.iter().rev().fold(
            if at[INDEX - 1] & 0x80 != 0 {
                u64::MAX
            } else {
                0
            },
            |n, b| n << 8 | u64::from(*b),
        );
        let offset = base.wrapping_add(at << insn.scale) & insn.addr_mask;
        match cpu.read_operand_at(insn.seg, offset, SIZE) {
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
