//! Masked moves of legacy and VEX encoding, which must not touch the memory of elements that are
//! masked off (SDM Vol. 2, VMASKMOV, VPMASKMOV, MASKMOVDQU).

use iced_x86::{Mnemonic, OpKind, Register};

use super::simd_state::vector_class;
use crate::assist::Class;
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::mode::Mode;
use crate::state::reg;

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
        _ => return None,
    })
}

fn number(r: Register) -> u8 {
    r.number() as u8
}

impl Cpu {
    /// 32 bytes of a vector register.
    pub(super) fn ymm(&self, n: u8) -> [u8; 32] {
        let mut v = [0; 32];
        v[..16].copy_from_slice(&self.xmm(n));
        v[16..].copy_from_slice(&self.ymm_hi(n));
        v
    }
    /// Sets all of a vector register, the rest of which is cleared.
    pub(super) fn set_ymm_bytes(&mut self, n: u8, v: &[u8; 32]) {
        let (chunks, _) = v.as_chunks::<16>();
        self.set_ymm(n, &chunks[0], &chunks[1]);
    }
}

/// Which elements a vector mask selects: those whose top bit is set.
pub(super) fn selected<const SIZE: usize>(mask: &[u8], element: usize) -> bool {
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
        let element = cpu.read_element(insn.seg, at, SIZE)?;
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
    let n = crate::decode::operand_segment(raw, cpu.mode());
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
