//! Protection keys for user pages (SDM Vol. 3, 4.6.2): RDPKRU, WRPKRU, and what a new PKRU does to
//! the TLB. The rights themselves are checked with all others, in [`crate::mmu`].

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::exit::Stop;
use crate::state::{XsaveArea, cr4, reg};

/// A bit for each key for which `new` denies something that `old` allowed.
fn restricted(old: u32, new: u32) -> u16 {
    let set = new & !old;
    (0..16)
        .filter(|key| set >> (key * 2) & 3 != 0)
        .fold(0, |keys, key| keys | 1 << key)
}

impl Cpu {
    /// PKRU was `old`: fast TLB entries that the register's present value denies go. Those it newly
    /// allows are made when they are missed.
    pub(crate) fn pkru_changed(&mut self, old: u32) {
        let keys = restricted(old, self.state.xsave.pkru());
        if keys != 0 {
            self.tlb.drop_keys(keys);
        }
    }

    /// #UD without CR4.PKE, #GP(0) with a register that must be zero and is not.
    fn check_pkru_access(&mut self, zero: u64) -> Result<(), Stop> {
        if self.state.cr4 & cr4::PKE == 0 {
            return Err(self.ud());
        }
        if zero as u32 != 0 {
            return Err(self.gp0());
        }
        Ok(())
    }
}

/// RDPKRU.
pub(crate) fn rdpkru(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    cpu.check_pkru_access(cpu.state.regs[reg::RCX])?;
    cpu.state.regs[reg::RAX] = cpu.state.xsave.pkru().into();
    cpu.state.regs[reg::RDX] = 0;
    Ok(())
}

/// WRPKRU.
pub(crate) fn wrpkru(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    cpu.check_pkru_access(cpu.state.regs[reg::RCX] | cpu.state.regs[reg::RDX])?;
    let old = cpu.state.xsave.pkru();
    let new = cpu.state.regs[reg::RAX] as u32;
    cpu.state.xsave.set_u32(XsaveArea::PKRU, new);
    cpu.pkru_changed(old);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::restricted;

    #[test]
    fn keys_that_lose_a_right() {
        assert_eq!(restricted(0, 0), 0);
        assert_eq!(restricted(0, 0x5555_5554), 0xfffe);
        assert_eq!(restricted(0x5555_5554, 0), 0);
        assert_eq!(restricted(0b01_00, 0b10_00), 2);
        assert_eq!(restricted(0b11_00, 0b01_00), 0);
        assert_eq!(restricted(0, 2 << 30), 0x8000);
    }
}
