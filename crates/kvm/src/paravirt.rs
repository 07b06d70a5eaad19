//! KVM's paravirtual interface of one vCPU (`Documentation/virt/kvm/x86/msr.rst`, `hypercalls.rst`,
//! `cpuid.rst`): kvmclock by both MSR pairs, wall clock, steal time, PV EOI (whose flag is never set: an
//! end of interrupt does not leave the processor's loop), asynchronous page faults (which never fire:
//! guest RAM is always there when it is touched) and poll control. The hypercalls are in [`crate::hypercall`].

use std::sync::atomic::Ordering;

use anykvm_abi::{
    KVM_FEATURE_ASYNC_PF_INT, KVM_FEATURE_ASYNC_PF_VMEXIT, MSR_KVM_ASYNC_PF_ACK,
    MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_INT, MSR_KVM_POLL_CONTROL, MSR_KVM_PV_EOI_EN,
    MSR_KVM_STEAL_TIME, MSR_KVM_SYSTEM_TIME, MSR_KVM_SYSTEM_TIME_NEW, MSR_KVM_WALL_CLOCK,
    MSR_KVM_WALL_CLOCK_NEW,
};
use anykvm_cpu::memory::GuestMemory;

use crate::clock::{Clock, ClockPair};
use crate::machine::VcpuMachine;
use crate::msr::{MsrAccess, MsrError};
use crate::paravirt_table::MSRS;
use crate::vcpu_requests::{GuestTsc, tsc_at};

/// Bit 0 of an address MSR: in use.
const ENABLED: u64 = 1;

/// The registers of the paravirtual interface.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paravirt {
    system_time: u64,
    async_pf_en: u64,
    async_pf_int: u64,
    steal_time: u64,
    /// The thread's run delay that the guest has been told of.
    pub(crate) stolen_before: Option<u64>,
    pv_eoi: u64,
    poll_control: u64,
    /// `Clock::generation` when the guest's clock page was last written.
    clock_generation: Option<u32>,
    /// The VMM says that it stopped the guest (KVM_KVMCLOCK_CTRL).
    guest_stopped: bool,
}

impl Default for Paravirt {
    fn default() -> Self {
        Self {
            system_time: 0,
            async_pf_en: 0,
            async_pf_int: 0,
            steal_time: 0,
            stolen_before: None,
            pv_eoi: 0,
            poll_control: 1,
            clock_generation: None,
            guest_stopped: false,
        }
    }
}

/// `PVCLOCK_TSC_STABLE_BIT`.
const TSC_STABLE: u8 = 1;
/// `PVCLOCK_GUEST_STOPPED`.
const GUEST_STOPPED: u8 = 2;
/// `pvclock_vcpu_time_info.flags` is here.
const FLAGS: usize = 29;

/// A frequency as a multiplier and shift that turn its cycles into nanoseconds
/// (`kvm_get_time_scale`): ns = (cycles << shift) × mul >> 32.
pub(crate) fn time_scale(khz: u32) -> (u32, i8) {
    let mut shift = 0i8;
    let mut scaled = 1_000_000_000u64;
    let mut base = u64::from(khz.max(1)) * 1000;
    while base > scaled * 2 || base >> 32 != 0 {
        base >>= 1;
        shift -= 1;
    }
    let mut base = base as u32;
    while base <= scaled as u32 || scaled >> 32 != 0 {
        if scaled >> 32 != 0 || base & 1 << 31 != 0 {
            scaled >>= 1;
        } else {
            base <<= 1;
        }
        shift += 1;
    }
    (((scaled << 32) / u64::from(base)) as u32, shift)
}

/// `struct pvclock_vcpu_time_info`.
fn time_info(version: u32, pair: ClockPair, tsc: GuestTsc, host_khz: u32, flags: u8) -> [u8; 32] {
    // Not what the VMM says the frequency is, which may be a little off: the clock is to run as KVM_GET_CLOCK
    // shows it.
    let khz = (u128::from(host_khz) * u128::from(tsc.ratio)) >> 48;
    let (mul, shift) = time_scale(khz as u32);
    let mut info = [0; 32];
    info[..4].copy_from_slice(&version.to_le_bytes());
    info[8..16].copy_from_slice(&tsc_at(pair.tsc, tsc.offset, tsc.ratio).to_le_bytes());
    info[16..24].copy_from_slice(&pair.ns.to_le_bytes());
    info[24..28].copy_from_slice(&mul.to_le_bytes());
    info[28] = shift as u8;
    info[FLAGS] = flags;
    info
}

impl Paravirt {
    fn register(&mut self, index: u32) -> Option<&mut u64> {
        Some(match index {
            MSR_KVM_SYSTEM_TIME | MSR_KVM_SYSTEM_TIME_NEW => &mut self.system_time,
            MSR_KVM_ASYNC_PF_EN => &mut self.async_pf_en,
            MSR_KVM_ASYNC_PF_INT => &mut self.async_pf_int,
            MSR_KVM_STEAL_TIME => &mut self.steal_time,
            MSR_KVM_PV_EOI_EN => &mut self.pv_eoi,
            MSR_KVM_POLL_CONTROL => &mut self.poll_control,
            _ => return None,
        })
    }

    /// Where the guest's `struct kvm_steal_time` is.
    pub fn steal_time_address(&self) -> Option<u64> {
        (self.steal_time & ENABLED != 0).then_some(self.steal_time & !ENABLED)
    }

    /// Whether the guest lets the host poll in its HLT.
    pub fn may_poll(&self) -> bool {
        self.poll_control & ENABLED != 0
    }

    /// RESET and INIT (`kvm_vcpu_reset`): what leads to the guest's memory is off. Poll control stays.
    fn reset(&mut self) {
        *self = Self {
            poll_control: self.poll_control,
            stolen_before: self.stolen_before,
            ..Self::default()
        };
    }

    /// Whether the guest's clock page must be written anew.
    pub fn is_stale(&self, clock: &Clock) -> bool {
        !clock.host().stable || self.clock_generation != Some(clock.generation())
    }

    /// Writes the guest's clock page when it is due (KVM_REQ_CLOCK_UPDATE): after the guest registered
    /// it, after the clock or TSC was set, and always where the TSC alone cannot tell the time.
    pub fn update_clock(&mut self, tsc: GuestTsc, clock: &Clock, memory: &GuestMemory) {
        if self.system_time & ENABLED == 0 {
            return;
        }
        let stable = clock.host().stable;
        self.clock_generation = Some(clock.generation());
        let pair = clock.pair();
        let mut flags = if stable { TSC_STABLE } else { 0 };
        if std::mem::take(&mut self.guest_stopped) {
            flags |= GUEST_STOPPED;
        }
        let at = self.system_time & !ENABLED;
        // The version is odd while the rest is written, so that the guest reads again. It goes on from what
        // the guest has: one that was stopped while it read, and perhaps moved, must not find the same.
        let mut old = [0; 32];
        let read = memory.read(at, &mut old);
        // The guest clears the flag when it has seen it.
        flags |= old[FLAGS] & GUEST_STOPPED;
        let version = u32::from_le_bytes([old[0], old[1], old[2], old[3]]);
        let odd = version.wrapping_add(1) | 1;
        let info = time_info(odd.wrapping_add(1), pair, tsc, clock.host().khz, flags);
        let written = read
            .and_then(|()| memory.write(at, &odd.to_le_bytes()))
            .and_then(|()| memory.write(at + 4, &info[4..]))
            .and_then(|()| memory.write(at, &info[..4]));
        if written.is_err() {
            // As in Linux an address that is not RAM is the guest's loss.
            self.clock_generation = None;
        }
    }

    /// The TSC's relation to the host's changed: the clock page is to be written anew.
    pub fn tsc_changed(&mut self) {
        self.clock_generation = None;
    }

    /// KVM_KVMCLOCK_CTRL; false if the guest has no kvmclock.
    pub fn set_guest_stopped(&mut self) -> bool {
        if self.system_time & ENABLED == 0 {
            return false;
        }
        self.guest_stopped = true;
        self.clock_generation = None;
        true
    }
}

/// `KVM_ASYNC_PF_*`: reserved bits, the two that must both be set for it to be on, and events as page-fault
/// exits of a nested guest.
const ASYNC_PF_RESERVED: u64 = 0x30;
const ASYNC_PF_VMEXIT: u64 = 1 << 2;
const ASYNC_PF_INT: u64 = 1 << 3;

/// Whether reserved bits are clear and the structure is aligned.
fn well_formed(index: u32, value: u64) -> bool {
    let aligned = |align: u64| value & (align - 1) & !ENABLED == 0;
    match index {
        MSR_KVM_STEAL_TIME => aligned(64),
        MSR_KVM_PV_EOI_EN => aligned(4),
        MSR_KVM_ASYNC_PF_EN => value & ASYNC_PF_RESERVED == 0,
        MSR_KVM_ASYNC_PF_INT => value <= 0xff,
        MSR_KVM_POLL_CONTROL => value <= 1,
        _ => true,
    }
}

impl VcpuMachine {
    /// Whether this vCPU has the MSR: with KVM_CAP_ENFORCE_PV_FEATURE_CPUID only what its CPUID announces.
    fn paravirt_msr(&self, index: u32) -> MsrAccess<()> {
        let feature = MSRS.iter().find(|(i, _)| *i == index).map(|(_, f)| *f);
        match feature {
            Some(feature) if self.guest_may_use(feature) => Ok(()),
            _ => Err(MsrError::Unknown),
        }
    }

    /// RDMSR of KVM's own MSRs.
    pub fn paravirt_read(&self, index: u32) -> MsrAccess<u64> {
        self.paravirt_msr(index)?;
        match index {
            MSR_KVM_ASYNC_PF_ACK => Ok(0),
            MSR_KVM_WALL_CLOCK | MSR_KVM_WALL_CLOCK_NEW => {
                Ok(self.vm().wall_clock.load(Ordering::Relaxed))
            }
            _ => self
                .paravirt()
                .register(index)
                .copied()
                .ok_or(MsrError::Unknown),
        }
    }

    /// WRMSR of KVM's own MSRs.
    pub fn paravirt_write(&self, index: u32, value: u64) -> MsrAccess<()> {
        self.paravirt_msr(index)?;
        if !well_formed(index, value) || !self.paravirt_takes(index, value) {
            return Err(MsrError::Invalid);
        }
        {
            let mut paravirt = self.paravirt();
            if let Some(register) = paravirt.register(index) {
                *register = value;
            }
            if matches!(index, MSR_KVM_SYSTEM_TIME | MSR_KVM_SYSTEM_TIME_NEW) {
                paravirt.clock_generation = None;
            }
        }
        match index {
            MSR_KVM_SYSTEM_TIME | MSR_KVM_SYSTEM_TIME_NEW => {
                self.set_uses_clock(value & ENABLED != 0);
                self.request_clock_update();
            }
            MSR_KVM_WALL_CLOCK | MSR_KVM_WALL_CLOCK_NEW => {
                self.vm().wall_clock.store(value, Ordering::Relaxed);
                if value != 0 {
                    self.write_wall_clock(value);
                }
            }
            MSR_KVM_STEAL_TIME => self.set_uses_steal_time(value & ENABLED != 0),
            _ => {}
        }
        Ok(())
    }

    /// Whether this machine can do what the value asks for (`kvm_pv_enable_async_pf`, `kvm_lapic_set_pv_eoi`). No
    /// page fault is asynchronous, so these MSRs need no local APIC in KVM, without which Linux refuses them: QEMU
    /// offers them to guests all the same, and puts 0 back.
    fn paravirt_takes(&self, index: u32, value: u64) -> bool {
        let in_ram = |at: u64, bytes: &mut [u8]| self.vm().memory().read(at, bytes).is_ok();
        match index {
            MSR_KVM_STEAL_TIME => crate::steal_time::is_measured(),
            MSR_KVM_PV_EOI_EN => value & ENABLED == 0 || in_ram(value & !ENABLED, &mut [0]),
            MSR_KVM_ASYNC_PF_EN => {
                let modes = [
                    (ASYNC_PF_VMEXIT, KVM_FEATURE_ASYNC_PF_VMEXIT),
                    (ASYNC_PF_INT, KVM_FEATURE_ASYNC_PF_INT),
                ];
                let mut allowed = modes
                    .iter()
                    .all(|(bit, feature)| value & bit == 0 || self.guest_may_use(*feature));
                if value & ENABLED != 0 && value & ASYNC_PF_INT != 0 {
                    allowed &= in_ram(value & !0x3f, &mut [0; 8]);
                }
                allowed
            }
            _ => true,
        }
    }

    /// RESET and INIT.
    pub fn reset_paravirt(&self) {
        self.paravirt().reset();
        self.set_uses_clock(false);
        self.set_uses_steal_time(false);
    }

    /// `struct pvclock_wall_clock`: the time of day when kvmclock was 0.
    fn write_wall_clock(&self, at: u64) {
        let memory = self.vm().memory();
        let mut version = [0; 4];
        if memory.read(at, &mut version).is_err() {
            return;
        }
        // Odd while the rest is written, and another than the guest has read.
        let version = u32::from_le_bytes(version).wrapping_add(1) | 1;
        let realtime = self.vm().time.realtime_ns();
        let boot = realtime.wrapping_sub(self.vm().clock().now().ns);
        let mut data = [0; 8];
        data[..4].copy_from_slice(&((boot / 1_000_000_000) as u32).to_le_bytes());
        data[4..].copy_from_slice(&((boot % 1_000_000_000) as u32).to_le_bytes());
        // The address was read, so it is RAM; if the slot is read-only the guest keeps what it has.
        let _ = memory
            .write(at, &version.to_le_bytes())
            .and_then(|()| memory.write(at + 4, &data))
            .and_then(|()| memory.write(at, &version.wrapping_add(1).to_le_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_turns_cycles_into_nanoseconds() {
        for khz in [
            1_000u32, 999_999, 1_000_000, 2_445_404, 3_999_999, 9_000_000,
        ] {
            let (mul, shift) = time_scale(khz);
            let cycles = u64::from(khz) * 1000 * 10;
            let shifted = if shift < 0 {
                u128::from(cycles >> -shift)
            } else {
                u128::from(cycles) << shift
            };
            let ns = (shifted * u128::from(mul)) >> 32;
            let error = (ns as i128 - 10_000_000_000).abs();
            assert!(error < 20_000, "{khz} kHz: {ns}");
        }
    }

    #[test]
    fn reserved_bits() {
        assert!(!well_formed(MSR_KVM_STEAL_TIME, 0x21));
        assert!(!well_formed(MSR_KVM_STEAL_TIME, 0x20));
        assert!(well_formed(MSR_KVM_STEAL_TIME, 0x41));
        assert!(!well_formed(MSR_KVM_PV_EOI_EN, 3));
        assert!(!well_formed(MSR_KVM_POLL_CONTROL, 2));
        assert!(!well_formed(MSR_KVM_ASYNC_PF_EN, 0x11));
    }
}
