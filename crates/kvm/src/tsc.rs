//! The guest's time-stamp counter (KVM API: KVM_SET_TSC_KHZ, the KVM_VCPU_TSC_CTRL attributes,
//! IA32_TIME_STAMP_COUNTER; `Documentation/virt/kvm/devices/vcpu.rst`, section 4): its rate, its
//! offset, and keeping the vCPUs of a VM on one count.
//!
//! Guest TSC = (host TSC × ratio >> 48) + offset.

use std::sync::Mutex;

use anykvm_cpu::CpuState;

use crate::machine::VcpuMachine;
use crate::msr::Access;
use crate::time::Time;
use crate::vcpu_requests::tsc_at;

/// The ratio at which guest and host run alike.
const UNITY: u64 = 1 << 48;
/// A frequency this near to the host's (parts per million) is taken as the host's: VMMs measure.
const TOLERANCE_PPM: u64 = 250;

/// Frequencies are below this (`kvm_caps.max_guest_tsc_khz`): KVM_GET_TSC_KHZ returns them as an `int`.
pub(crate) const MAX_KHZ: u32 = i32::MAX as u32;

/// The ratio for a guest frequency.
pub(crate) fn ratio(khz: u32, host_khz: u32) -> u64 {
    let host = u64::from(host_khz.max(1));
    let slack = host * TOLERANCE_PPM / 1_000_000;
    if u64::from(khz).abs_diff(host) <= slack {
        UNITY
    } else {
        ((u128::from(khz) << 48) / u128::from(host)) as u64
    }
}

/// The last TSC that was written in a VM (`kvm_synchronize_tsc`): a write near what another vCPU
/// would show by now means the same count, whatever time passed between the two writes.
#[derive(Debug, Default)]
pub(crate) struct TscSync(Mutex<Last>);

#[derive(Debug, Default)]
struct Last {
    ns: u64,
    value: u64,
    khz: u32,
    offset: u64,
    user_set: bool,
}

impl TscSync {
    /// The offset for a TSC written now; 0 means "as the others".
    fn offset(&self, time: &Time, value: u64, by_user: bool, khz: u32, ratio: u64) -> u64 {
        let now = time.ns();
        let scaled = tsc_at(time.tsc(), 0, ratio);
        let mut last = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let near = if value == 0 {
            true
        } else {
            let passed = u128::from(now.wrapping_sub(last.ns)) * u128::from(khz) / 1_000_000;
            let expected = last.value.wrapping_add(passed as u64);
            let second = u64::from(khz) * 1000;
            last.user_set && expected.abs_diff(value) < second
        };
        last.user_set |= by_user;
        let offset = if near && last.khz == khz {
            last.offset
        } else {
            value.wrapping_sub(scaled)
        };
        *last = Last {
            ns: now,
            value,
            khz,
            offset,
            user_set: last.user_set,
        };
        offset
    }
}

impl VcpuMachine {
    /// Sets rate and offset, and tells everything computed from them.
    fn set_tsc(&self, s: &mut CpuState, offset: u64, ratio: u64) {
        s.tsc_offset = offset;
        s.tsc_ratio = ratio;
        self.requests().set_tsc(offset, ratio);
        if let Some(lapic) = self.lapic() {
            lapic.tsc_changed();
        }
        self.paravirt().tsc_changed();
        self.request_clock_update();
    }

    /// KVM_SET_TSC_KHZ on a vCPU; 0 is the host's frequency.
    pub fn set_tsc_khz(&self, s: &mut CpuState, khz: u32) {
        let host = self.vm().clock().host().khz;
        let khz = if khz == 0 { host } else { khz };
        self.store_tsc_khz(khz);
        self.set_tsc(s, s.tsc_offset, ratio(khz, host));
    }

    /// A new vCPU starts on the others' count, the first at 0.
    pub fn start_tsc(&self, s: &mut CpuState) {
        self.set_tsc_khz(s, self.vm().clock().default_tsc_khz());
        let offset =
            self.vm()
                .tsc_sync
                .offset(&self.vm().time, 0, false, self.tsc_khz(), s.tsc_ratio);
        self.set_tsc(s, offset, s.tsc_ratio);
    }

    /// Writes IA32_TIME_STAMP_COUNTER. The guest's own write moves this vCPU only, and
    /// IA32_TSC_ADJUST with it (SDM Vol. 3, 18.17.3).
    pub fn write_tsc(&self, s: &mut CpuState, value: u64, access: Access) {
        let offset = match access {
            Access::Host => {
                self.vm()
                    .tsc_sync
                    .offset(&self.vm().time, value, true, self.tsc_khz(), s.tsc_ratio)
            }
            Access::Guest => {
                let offset = value.wrapping_sub(tsc_at(self.vm().time.tsc(), 0, s.tsc_ratio));
                let moved = offset.wrapping_sub(s.tsc_offset);
                s.msr.tsc_adjust = s.msr.tsc_adjust.wrapping_add(moved);
                offset
            }
        };
        self.set_tsc(s, offset, s.tsc_ratio);
    }

    /// Writes IA32_TSC_ADJUST: the guest moves its TSC by the change; the VMM restores a number.
    pub fn write_tsc_adjust(&self, s: &mut CpuState, value: u64, access: Access) {
        let moved = value.wrapping_sub(s.msr.tsc_adjust);
        s.msr.tsc_adjust = value;
        if access == Access::Guest && moved != 0 {
            self.set_tsc(s, s.tsc_offset.wrapping_add(moved), s.tsc_ratio);
        }
    }

    /// KVM_VCPU_TSC_OFFSET.
    pub fn set_tsc_offset(&self, s: &mut CpuState, offset: u64) {
        self.set_tsc(s, offset, s.tsc_ratio);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_frequencies_are_the_hosts() {
        assert_eq!(ratio(2_400_000, 2_400_000), UNITY);
        assert_eq!(ratio(2_400_500, 2_400_000), UNITY);
        assert_eq!(ratio(1_200_000, 2_400_000), UNITY / 2);
        assert_eq!(ratio(4_800_000, 2_400_000), UNITY * 2);
    }

    #[test]
    fn vcpus_start_on_one_count() {
        let sync = TscSync::default();
        let time = &*Time::of_host();
        let first = sync.offset(time, 0, false, 2_000_000, UNITY);
        assert_eq!(sync.offset(time, 0, false, 2_000_000, UNITY), first);
        let set = sync.offset(time, 1 << 50, true, 2_000_000, UNITY);
        assert_ne!(set, first);
        assert_eq!(
            sync.offset(time, (1 << 50) + 5000, true, 2_000_000, UNITY),
            set
        );
        assert_ne!(sync.offset(time, 1 << 40, true, 2_000_000, UNITY), set);
    }
}
