//! Machine-check architecture (KVM API: KVM_X86_SETUP_MCE, KVM_X86_SET_MCE,
//! KVM_X86_GET_MCE_CAP_SUPPORTED; SDM Vol. 3, chapter 16): the banks of one vCPU, and machine checks
//! that the VMM injects.

use anykvm_abi::kvm_x86_mce;
use anykvm_cpu::CpuState;
use anykvm_cpu::events::vector;
use anykvm_cpu::state::cr4;

use crate::error::{Errno, Result};
use crate::msr::{Access, MsrAccess, MsrError};

pub(crate) const MCG_CAP: u32 = 0x179;
pub(crate) const MCG_STATUS: u32 = 0x17a;
pub(crate) const MCG_CTL: u32 = 0x17b;
pub(crate) const MC0_CTL: u32 = 0x400;
/// KVM_CAP_MCE: the most banks there can be.
pub(crate) const MAX_BANKS: usize = 32;
/// IA32_MC31_MISC.
pub(crate) const LAST: u32 = MC0_CTL + 4 * MAX_BANKS as u32 - 1;

const MCG_CTL_P: u64 = 1 << 8;
const MCG_SER_P: u64 = 1 << 24;
/// KVM_X86_GET_MCE_CAP_SUPPORTED: the bits of IA32_MCG_CAP a vCPU may be given (IA32_MCG_CTL exists, software
/// error recovery). How many banks is told by KVM_CAP_MCE.
pub(crate) const CAP_SUPPORTED: u64 = MCG_CTL_P | MCG_SER_P;
/// Bits of KVM_X86_SETUP_MCE that are numbers: banks, and extended state registers.
const CAP_NUMBERS: u64 = 0xff | 0xff_0000;

const MCG_STATUS_MCIP: u64 = 1 << 2;
const STATUS_VAL: u64 = 1 << 63;
const STATUS_OVER: u64 = 1 << 62;
const STATUS_UC: u64 = 1 << 61;
const STATUS_PCC: u64 = 1 << 57;
const STATUS_S: u64 = 1 << 56;
const STATUS_AR: u64 = 1 << 55;

/// IA32_MCi_CTL, STATUS, ADDR and MISC, in the order of their numbers.
type Bank = [u64; 4];

/// The machine-check registers of one vCPU.
#[derive(Clone, Debug)]
pub(crate) struct MachineCheck {
    cap: u64,
    status: u64,
    ctl: u64,
    banks: [Bank; MAX_BANKS],
}

impl Default for MachineCheck {
    fn default() -> Self {
        Self {
            cap: MAX_BANKS as u64,
            status: 0,
            ctl: 0,
            banks: [[0; 4]; MAX_BANKS],
        }
    }
}

/// Whether an MSR is one of the machine-check architecture's.
pub(crate) fn is_mce(index: u32) -> bool {
    matches!(index, MCG_CAP | MCG_STATUS | MCG_CTL) || (MC0_CTL..=LAST).contains(&index)
}

impl MachineCheck {
    fn banks(&self) -> usize {
        (self.cap as usize & 0xff).min(MAX_BANKS)
    }

    /// KVM_X86_SETUP_MCE.
    pub fn setup(&mut self, cap: u64) -> Result<()> {
        let banks = cap & 0xff;
        if banks == 0 || banks > MAX_BANKS as u64 || cap & !(CAP_SUPPORTED | CAP_NUMBERS) != 0 {
            return Err(Errno::EINVAL);
        }
        self.cap = cap;
        if cap & MCG_CTL_P != 0 {
            self.ctl = u64::MAX;
        }
        for bank in &mut self.banks[..banks as usize] {
            bank[0] = u64::MAX;
        }
        Ok(())
    }

    fn bank(&self, index: u32) -> MsrAccess<(usize, usize)> {
        let n = (index.wrapping_sub(MC0_CTL)) as usize;
        if n / 4 < self.banks() {
            Ok((n / 4, n % 4))
        } else {
            Err(MsrError::Unknown)
        }
    }

    /// RDMSR.
    pub fn read(&self, index: u32, access: Access) -> MsrAccess<u64> {
        match index {
            MCG_CAP => Ok(self.cap),
            MCG_STATUS => Ok(self.status),
            MCG_CTL if self.cap & MCG_CTL_P != 0 || access == Access::Host => Ok(self.ctl),
            MCG_CTL => Err(MsrError::Invalid),
            _ => {
                let (bank, register) = self.bank(index)?;
                Ok(self.banks[bank][register])
            }
        }
    }

    /// WRMSR. SDM Vol. 3, 16.3.2: a guest enables all or nothing in a CTL register (bit 10 of bank
    /// 4's is left to it, as old AMD kernels clear it) and only clears STATUS.
    pub fn write(&mut self, index: u32, value: u64, access: Access) -> MsrAccess<()> {
        let guest = access == Access::Guest;
        match index {
            MCG_CAP if guest => return Err(MsrError::Invalid),
            MCG_CAP => self.cap = value,
            MCG_STATUS => self.status = value,
            MCG_CTL if self.cap & MCG_CTL_P == 0 && (value != 0 || guest) => {
                return Err(MsrError::Invalid);
            }
            MCG_CTL if value != 0 && value != u64::MAX => return Err(MsrError::Invalid),
            MCG_CTL => self.ctl = value,
            _ => {
                let (bank, register) = self.bank(index)?;
                let all_or_nothing = value == 0 || value | 1 << 10 | 1 == u64::MAX;
                if register == 0 && !all_or_nothing || register == 1 && guest && value != 0 {
                    return Err(MsrError::Invalid);
                }
                self.banks[bank][register] = value;
            }
        }
        Ok(())
    }

    /// KVM_X86_SET_MCE (`kvm_vcpu_ioctl_x86_set_mce`): logs the error in its bank and, if it is
    /// uncorrected, raises #MC, or shuts down where #MC cannot be taken.
    pub fn inject(&mut self, s: &mut CpuState, mce: &kvm_x86_mce) -> Result<()> {
        let n = usize::from(mce.bank);
        if n >= self.banks() || mce.status & STATUS_VAL == 0 {
            return Err(Errno::EINVAL);
        }
        let uncorrected = mce.status & STATUS_UC != 0;
        // SDM Vol. 3, 16.6.3: "uncorrected, no action required" is logged, and told by CMCI at most, which is
        // not there.
        let signalled = STATUS_PCC | STATUS_S | STATUS_AR;
        if uncorrected && mce.mcg_status == 0 && mce.status & signalled == 0 {
            self.banks[n][1..].copy_from_slice(&[mce.status, mce.addr, mce.misc]);
            self.status = 0;
            return Ok(());
        }
        let masked = self.cap & MCG_CTL_P != 0 && self.ctl != u64::MAX;
        if uncorrected && (masked || self.banks[n][0] != u64::MAX) {
            return Ok(());
        }
        let bank = &mut self.banks[n];
        let overflow = if bank[1] & STATUS_VAL != 0 {
            STATUS_OVER
        } else {
            0
        };
        let log = |bank: &mut Bank| {
            bank[1] = mce.status | overflow;
            bank[2] = mce.addr;
            bank[3] = mce.misc;
        };
        if uncorrected {
            if self.status & MCG_STATUS_MCIP != 0 || s.cr4 & cr4::MCE == 0 {
                s.events.triple_fault = true;
                return Ok(());
            }
            log(bank);
            self.status = mce.mcg_status;
            let e = &mut s.events.exception;
            *e = Default::default();
            e.pending = true;
            e.vector = vector::MC;
        } else if bank[1] & STATUS_VAL == 0 || bank[1] & STATUS_UC == 0 {
            log(bank);
        } else {
            bank[1] |= STATUS_OVER;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setup_checks_and_initialises() {
        let mut m = MachineCheck::default();
        for bad in [0, 33, 10 | 1 << 40] {
            assert_eq!(m.setup(bad), Err(Errno::EINVAL));
        }
        m.setup(10 | CAP_SUPPORTED).unwrap();
        assert_eq!(m.read(MCG_CTL, Access::Guest), Ok(u64::MAX));
        assert_eq!(m.read(MC0_CTL + 36, Access::Guest), Ok(u64::MAX));
        assert_eq!(m.read(MC0_CTL + 40, Access::Guest), Err(MsrError::Unknown));
    }

    #[test]
    fn guests_only_clear_status() {
        let mut m = MachineCheck::default();
        m.setup(10 | CAP_SUPPORTED).unwrap();
        assert!(m.write(MC0_CTL + 1, 5, Access::Guest).is_err());
        m.write(MC0_CTL + 1, 5, Access::Host).unwrap();
        m.write(MC0_CTL + 1, 0, Access::Guest).unwrap();
        assert!(m.write(MC0_CTL, 7, Access::Guest).is_err());
    }

    #[test]
    fn uncorrected_errors_raise_mc_or_shut_down() {
        let mut m = MachineCheck::default();
        m.setup(10 | CAP_SUPPORTED).unwrap();
        let mut s = CpuState::new();
        let mut mce = kvm_x86_mce {
            status: STATUS_VAL | STATUS_UC | STATUS_PCC,
            addr: 0x1000,
            mcg_status: MCG_STATUS_MCIP,
            bank: 2,
            ..Default::default()
        };
        s.cr4 = cr4::MCE;
        m.inject(&mut s, &mce).unwrap();
        assert!(s.events.exception.pending && s.events.exception.vector == vector::MC);
        assert_eq!(m.read(MC0_CTL + 10, Access::Guest), Ok(0x1000));
        m.inject(&mut s, &mce).unwrap();
        assert!(
            s.events.triple_fault,
            "a second one while the first is handled"
        );
        mce.bank = 10;
        assert_eq!(m.inject(&mut s, &mce), Err(Errno::EINVAL));
    }
}
