//! KVM_GET/SET_MSRS (KVM API, sections 4.18 and 4.19), the MSR lists, and where each MSR is kept: the
//! processor's own registers in its state ([`anykvm_cpu::msr`]), the local APIC's, the clock's, the
//! machine-check banks' and KVM's own (`Documentation/virt/kvm/x86/msr.rst`) here.

use anykvm_abi::{
    MSR_KVM_ASYNC_PF_ACK, MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_INT, MSR_KVM_POLL_CONTROL,
    MSR_KVM_PV_EOI_EN, MSR_KVM_STEAL_TIME, MSR_KVM_SYSTEM_TIME, MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_WALL_CLOCK, MSR_KVM_WALL_CLOCK_NEW,
};
use anykvm_cpu::CpuState;
use anykvm_cpu::msr::index;
pub(crate) use anykvm_cpu::msr::{Access, FEATURES};

use crate::machine::VcpuMachine;
use crate::mce;

/// 256 or more in one call are E2BIG.
pub(crate) const MAX_ENTRIES: usize = 256;

/// Why an MSR access is refused; what a guest gets for either is #GP, unless user space asked to see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MsrError {
    /// There is no such MSR.
    Unknown,
    /// There is, but not for this access or value.
    Invalid,
}

pub(crate) type MsrAccess<T> = std::result::Result<T, MsrError>;

const X2APIC: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;

/// MSRs of this crate.
pub(crate) struct Own {
    /// The name, of the first if there are several; for `docs/processor.md`.
    #[cfg_attr(not(test), expect(dead_code))]
    pub name: &'static str,
    pub first: u32,
    pub last: u32,
    /// It carries state from one machine to another: it is in KVM_GET_MSR_INDEX_LIST.
    pub saved: bool,
}

const fn own(name: &'static str, index: u32, saved: bool) -> Own {
    several(name, index, index, saved)
}

const fn several(name: &'static str, first: u32, last: u32, saved: bool) -> Own {
    Own {
        name,
        first,
        last,
        saved,
    }
}

/// Every MSR of this crate.
pub(crate) const OWN: &[Own] = &[
    own("IA32_APIC_BASE", index::APIC_BASE, true),
    own("IA32_MCG_CAP", mce::MCG_CAP, false),
    own("IA32_MCG_STATUS", mce::MCG_STATUS, true),
    own("IA32_MCG_CTL", mce::MCG_CTL, true),
    several("IA32_MC0_CTL", mce::MC0_CTL, mce::LAST, false),
    own("IA32_TSC_DEADLINE", index::TSC_DEADLINE, true),
    several("IA32_X2APIC", *X2APIC.start(), *X2APIC.end(), false),
    own("MSR_KVM_WALL_CLOCK", MSR_KVM_WALL_CLOCK, true),
    own("MSR_KVM_SYSTEM_TIME", MSR_KVM_SYSTEM_TIME, true),
    own("MSR_KVM_WALL_CLOCK_NEW", MSR_KVM_WALL_CLOCK_NEW, true),
    own("MSR_KVM_SYSTEM_TIME_NEW", MSR_KVM_SYSTEM_TIME_NEW, true),
    own("MSR_KVM_ASYNC_PF_EN", MSR_KVM_ASYNC_PF_EN, true),
    own("MSR_KVM_STEAL_TIME", MSR_KVM_STEAL_TIME, true),
    own("MSR_KVM_PV_EOI_EN", MSR_KVM_PV_EOI_EN, true),
    own("MSR_KVM_POLL_CONTROL", MSR_KVM_POLL_CONTROL, true),
    own("MSR_KVM_ASYNC_PF_INT", MSR_KVM_ASYNC_PF_INT, true),
    own("MSR_KVM_ASYNC_PF_ACK", MSR_KVM_ASYNC_PF_ACK, true),
];

/// KVM_GET_MSR_INDEX_LIST: all that KVM_GET_MSRS and KVM_SET_MSRS carry from one machine to another.
pub(crate) fn index_list() -> Vec<u32> {
    let mut list = anykvm_cpu::msr::saved();
    let own = OWN.iter().filter(|own| own.saved);
    list.extend(own.flat_map(|own| own.first..=own.last));
    list
}

/// Whether user space may read an MSR as 0, and write 0, that this vCPU has not: it is in the list
/// (`kvm_do_msr_access`).
fn is_carried(index: u32, access: Access) -> bool {
    let own = |own: &Own| own.saved && (own.first..=own.last).contains(&index);
    access == Access::Host && OWN.iter().any(own)
}

/// Reads an MSR.
pub(crate) fn read(m: &VcpuMachine, s: &CpuState, index: u32, access: Access) -> MsrAccess<u64> {
    if let Some(value) = anykvm_cpu::msr::read(s, m.cpuid().table(), index, access) {
        return value.map_err(|_| MsrError::Invalid);
    }
    match index {
        index::TSC_DEADLINE => Ok(m.lapic().map_or(0, |l| l.tsc_deadline())),
        index::APIC_BASE => Ok(m.apic_base()),
        _ if X2APIC.contains(&index) => {
            let lapic = m.lapic().ok_or(MsrError::Invalid)?;
            lapic.msr_read(index).map_err(|_| MsrError::Invalid)
        }
        _ if mce::is_mce(index) => m.mce().read(index, access),
        _ => match m.paravirt_read(index) {
            Err(MsrError::Unknown) if is_carried(index, access) => Ok(0),
            result => result,
        },
    }
}

/// Writes an MSR.
pub(crate) fn write(
    m: &VcpuMachine,
    s: &mut CpuState,
    index: u32,
    value: u64,
    access: Access,
) -> MsrAccess<()> {
    if let Some(done) = anykvm_cpu::msr::write(s, m.cpuid().table(), index, value, access) {
        return done.map_err(|_| MsrError::Invalid);
    }
    match index {
        index::TSC => m.write_tsc(s, value, access),
        index::TSC_ADJUST => m.write_tsc_adjust(s, value, access),
        index::TSC_DEADLINE => {
            if let Some(lapic) = m.lapic() {
                lapic.set_tsc_deadline(value);
            }
        }
        index::APIC_BASE => m.set_apic_base(value, access)?,
        _ if X2APIC.contains(&index) => {
            let lapic = m.lapic().ok_or(MsrError::Invalid)?;
            return lapic.msr_write(index, value).map_err(|_| MsrError::Invalid);
        }
        _ if mce::is_mce(index) => m.mce().write(index, value, access)?,
        _ => match m.paravirt_write(index, value) {
            Err(MsrError::Unknown) if value == 0 && is_carried(index, access) => {}
            result => return result,
        },
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_list_has_no_duplicates() {
        let mut list = index_list();
        let n = list.len();
        list.sort_unstable();
        list.dedup();
        assert_eq!(list.len(), n);
    }
}
