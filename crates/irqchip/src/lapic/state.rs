//! KVM_GET_LAPIC and KVM_SET_LAPIC: the register page as KVM lays it out.

use anykvm_abi::kvm_lapic_state;

use super::registers::offset;
use super::timer::TimeLeft;
use super::{Lapic, x2apic_ldr};
use crate::Error;

/// Beside the current-count register, where the page has no register, is what that does not tell: flags,
/// and nanoseconds until the timer goes off. KVM writes 0 there, and takes a current count of 0 for an
/// interrupt that is still to come; so does who writes only the initial count. The nanoseconds are the
/// count's with what is left over it: without that each restoring would bring the interrupt nearer.
const FLAGS: u32 = offset::TIMER_CURRENT_COUNT + 4;
const LEFT_LOW: u32 = offset::TIMER_CURRENT_COUNT + 8;
const LEFT_HIGH: u32 = offset::TIMER_CURRENT_COUNT + 12;
/// The timer has run out and does not run.
const STOPPED: u32 = 1;
/// Its period is the least there is, not the initial count's.
const BOUNDED: u32 = 2;
/// It is periodic, and an interrupt is still to come of a period that has ended.
const DUE: u32 = 4;

impl Lapic {
    /// KVM_GET_LAPIC.
    pub fn state(&self) -> kvm_lapic_state {
        // A timer that is due stays so: reading delivers nothing.
        let left = self.timer_left();
        let mut state = kvm_lapic_state { regs: [0; 1024] };
        for register in (0..0x400).step_by(16) {
            put(&mut state, register, self.regs.get(register));
        }
        put(&mut state, offset::TIMER_CURRENT_COUNT, left.count);
        let flag = |on, bit| if on { bit } else { 0 };
        let flags = flag(left.stopped, STOPPED) | flag(left.bounded, BOUNDED) | flag(left.due, DUE);
        put(&mut state, FLAGS, flags);
        put(&mut state, LEFT_LOW, left.ns as u32);
        put(&mut state, LEFT_HIGH, (left.ns >> 32) as u32);
        if self.x2apic_mode() && !self.ids_32bit() {
            put(&mut state, offset::ID, self.apic_id() << 24);
        }
        state
    }

    /// KVM_SET_LAPIC. With 32-bit ids (KVM_CAP_X2APIC_API) another id than the vCPU's is refused.
    pub fn set_state(&self, state: &kvm_lapic_state) -> Result<(), Error> {
        let x2apic = self.x2apic_mode();
        if x2apic && self.ids_32bit() && get(state, offset::ID) != self.apic_id() {
            return Err(Error::Invalid);
        }
        for register in (0..0x400).step_by(16) {
            self.regs.set(register, get(state, register));
        }
        if x2apic {
            self.regs.set(offset::ID, self.apic_id());
            self.regs.set(offset::LDR, x2apic_ldr(self.apic_id()));
        }
        self.set_version();
        self.update_ppr();
        self.restore_timer(TimeLeft {
            count: get(state, offset::TIMER_CURRENT_COUNT),
            ns: u64::from(get(state, LEFT_LOW)) | u64::from(get(state, LEFT_HIGH)) << 32,
            stopped: get(state, FLAGS) & STOPPED != 0,
            bounded: get(state, FLAGS) & BOUNDED != 0,
            due: get(state, FLAGS) & DUE != 0,
        });
        self.regs.set(offset::TIMER_CURRENT_COUNT, 0);
        self.map_changed();
        if let Some(chip) = self.chip.upgrade() {
            chip.lapic_restored(self);
        }
        self.events.notify();
        Ok(())
    }
}

fn get(state: &kvm_lapic_state, at: u32) -> u32 {
    let at = at as usize;
    u32::from_le_bytes(std::array::from_fn(|i| state.regs[at + i] as u8))
}

fn put(state: &mut kvm_lapic_state, at: u32, value: u32) {
    let at = at as usize;
    for (byte, value) in state.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
        *byte = value as _;
    }
}
