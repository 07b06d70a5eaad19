//! KVM's hypercalls (`Documentation/virt/kvm/x86/hypercalls.rst`), by VMCALL and VMMCALL alike. The number is
//! in RAX, arguments in RBX, RCX, RDX and RSI, of which code that is not 64-bit has the lower halves; the
//! result is in RAX.

use anykvm_abi::{
    KVM_EFAULT, KVM_EINVAL, KVM_ENOSYS, KVM_EOPNOTSUPP, KVM_EPERM, KVM_FEATURE_PV_SCHED_YIELD,
    KVM_FEATURE_PV_SEND_IPI, KVM_FEATURE_PV_UNHALT, KVM_HC_CLOCK_PAIRING, KVM_HC_KICK_CPU,
    KVM_HC_MAP_GPA_RANGE, KVM_HC_SCHED_YIELD, KVM_HC_SEND_IPI, KVM_HC_VAPIC_POLL_IRQ,
};
use anykvm_cpu::machine::Hypercall;
use anykvm_cpu::memory::PAGE;
use anykvm_cpu::{CpuState, Exit};
use anykvm_irqchip::Error as ChipError;

use crate::machine::VcpuMachine;
use crate::vcpu_requests::tsc_at;

/// 0 or more, or a `KVM_E*`.
type Answer = Result<u32, u32>;

/// What there is to do for a hypercall.
enum Outcome {
    Answer(Answer),
    /// The monitor performs it.
    Exit(Exit),
}

impl From<Answer> for Outcome {
    fn from(answer: Answer) -> Self {
        Self::Answer(answer)
    }
}

/// KVM_HC_MAP_GPA_RANGE: a range of pages, and what they shall be.
fn map_gpa_range(gpa: u64, pages: u64, attributes: u64) -> Outcome {
    let first = gpa / PAGE;
    let good = gpa.is_multiple_of(PAGE) && first.checked_add(pages).is_some_and(|end| end > first);
    if !good {
        return Err(KVM_EINVAL).into();
    }
    Outcome::Exit(Exit::Hypercall {
        nr: KVM_HC_MAP_GPA_RANGE.into(),
        args: [gpa, pages, attributes, 0, 0],
    })
}

impl VcpuMachine {
    /// VMCALL and VMMCALL (`kvm_emulate_hypercall`).
    pub fn do_hypercall(&self, s: &CpuState, nr: u64, args: [u64; 5]) -> Hypercall {
        let wide = s.code64();
        let width = |value| {
            if wide { value } else { u64::from(value as u32) }
        };
        let outcome = if s.cpl() != 0 {
            Err(KVM_EPERM).into()
        } else {
            match u32::try_from(width(nr)) {
                Ok(nr) => self.perform_hypercall(s, nr, args.map(width)),
                Err(_) => Err(KVM_ENOSYS).into(),
            }
        };
        match outcome {
            Outcome::Exit(exit) => Hypercall::Exit(exit),
            Outcome::Answer(Ok(value)) => Hypercall::Done(value.into()),
            Outcome::Answer(Err(error)) => Hypercall::Done(width(u64::from(error).wrapping_neg())),
        }
    }

    fn perform_hypercall(&self, s: &CpuState, nr: u32, [a0, a1, a2, a3, _]: [u64; 5]) -> Outcome {
        match nr {
            KVM_HC_VAPIC_POLL_IRQ => Ok(0).into(),
            KVM_HC_KICK_CPU if self.guest_may_use(KVM_FEATURE_PV_UNHALT) => {
                if let Some(chip) = self.vm().irqchip() {
                    chip.pv_kick(a1 as u32);
                }
                Ok(0).into()
            }
            KVM_HC_CLOCK_PAIRING => self.clock_pairing(s, a0, a1).into(),
            KVM_HC_SEND_IPI if self.guest_may_use(KVM_FEATURE_PV_SEND_IPI) => {
                let bitmap = [a0, a1];
                self.send_ipi(bitmap, a2 as u32, a3, s.code64()).into()
            }
            KVM_HC_MAP_GPA_RANGE if self.vm().enabled().exits_on(KVM_HC_MAP_GPA_RANGE) => {
                map_gpa_range(a0, a1, a2)
            }
            KVM_HC_SCHED_YIELD if self.guest_may_use(KVM_FEATURE_PV_SCHED_YIELD) => {
                std::thread::yield_now();
                Ok(0).into()
            }
            _ => Err(KVM_ENOSYS).into(),
        }
    }

    /// KVM_HC_SEND_IPI: to the APIC ids that are bits of the bitmap, from `first` on; how many took it
    /// (`kvm_pv_send_ipi`).
    fn send_ipi(&self, bitmap: [u64; 2], first: u32, icr: u64, wide: bool) -> Answer {
        let chip = self.vm().irqchip().ok_or(KVM_EOPNOTSUPP)?;
        match chip.pv_send_ipi(bitmap, first, icr, wide) {
            Ok(n) => Ok(n.unsigned_abs()),
            Err(ChipError::Invalid) => Err(KVM_EINVAL),
            Err(_) => Err(KVM_EOPNOTSUPP),
        }
    }

    /// KVM_HC_CLOCK_PAIRING: `struct kvm_clock_pairing`, the host's time of day and the guest's TSC at one
    /// moment.
    fn clock_pairing(&self, s: &CpuState, at: u64, kind: u64) -> Answer {
        /// KVM_CLOCK_PAIRING_WALLCLOCK.
        const WALLCLOCK: u64 = 0;
        if kind != WALLCLOCK || !self.vm().clock().host().stable {
            return Err(KVM_EOPNOTSUPP);
        }
        let (now, tsc) = self.vm().time.realtime_and_tsc();
        let tsc = tsc_at(tsc, s.tsc_offset, s.tsc_ratio);
        // Seconds, nanoseconds, TSC; flags and padding are 0.
        let mut data = [0; 64];
        data[..8].copy_from_slice(&(now / 1_000_000_000).to_le_bytes());
        data[8..16].copy_from_slice(&(now % 1_000_000_000).to_le_bytes());
        data[16..24].copy_from_slice(&tsc.to_le_bytes());
        let written = self.vm().memory().write(at, &data);
        written.map(|()| 0).map_err(|_| KVM_EFAULT)
    }
}
