//! KVM_GET/SET_VCPU_EVENTS and KVM_GET/SET_MP_STATE (KVM API, sections 4.31, 4.32, 4.38, 4.39):
//! conversions between the processor's event state and the API's structures, and the checks. The
//! processor keeps its events in KVM's terms, so these are copies; a refused state changes nothing.

use anykvm_abi::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    kvm_vcpu_events,
};
use anykvm_cpu::events::{MpState, SHADOW_MOV_SS, SHADOW_STI, vector};
use anykvm_cpu::{Cpu, CpuState};

use crate::error::{Errno, Result};

/// The capabilities of the VM that the structure depends on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct EventCapabilities {
    /// KVM_CAP_EXCEPTION_PAYLOAD is enabled.
    pub payload: bool,
    /// KVM_CAP_X86_TRIPLE_FAULT_EVENT is enabled.
    pub triple_fault: bool,
}

/// KVM_GET_VCPU_EVENTS.
pub(crate) fn get(s: &mut CpuState, caps: EventCapabilities) -> kvm_vcpu_events {
    if !caps.payload {
        deliver_payload(s);
    }
    let e = &s.events;
    let mut out = kvm_vcpu_events::default();
    // #BP and #OF come from instructions and the structure has no instruction length: they are not
    // reported, and RIP is still at the instruction, which raises them again.
    let soft = matches!(e.exception.vector, vector::BP | vector::OF);
    if !soft {
        out.exception.injected = e.exception.injected.into();
        out.exception.pending = e.exception.pending.into();
        if !caps.payload {
            out.exception.injected |= out.exception.pending;
        }
    }
    out.exception.nr = e.exception.vector;
    out.exception.has_error_code = e.exception.has_error_code.into();
    out.exception.error_code = e.exception.error_code;
    out.exception_has_payload = e.exception.has_payload.into();
    out.exception_payload = e.exception.payload;

    out.interrupt.injected = (e.interrupt.injected && !e.interrupt.soft).into();
    out.interrupt.nr = e.interrupt.vector;
    out.interrupt.shadow = e.shadow;

    out.nmi.injected = e.nmi_injected.into();
    out.nmi.pending = e.nmi_pending;
    out.nmi.masked = e.nmi_masked.into();

    out.smi.smm = e.smm.into();
    out.smi.pending = e.smi_pending.into();
    out.smi.smm_inside_nmi = e.smm_inside_nmi.into();
    out.smi.latched_init = e.latched_init.into();

    out.flags =
        KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
    if caps.payload {
        out.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    if caps.triple_fault {
        out.triple_fault.pending = e.triple_fault.into();
        out.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    }
    out
}

/// Debug traps that wait for the instruction behind MOV SS: a pending #DB beside that shadow. No
/// other is; one that is pending is delivered before the next instruction. KVM leaves them in a field of the
/// processor's that no call reaches, and so loses them; so must who has not enabled payloads.
pub(crate) fn get_waiting_traps(cpu: &Cpu, caps: EventCapabilities, out: &mut kvm_vcpu_events) {
    let e = &cpu.state.events;
    let bits = cpu.waiting_traps();
    let raised = e.exception.pending || e.exception.injected;
    if !caps.payload || bits == 0 || raised || e.shadow & SHADOW_MOV_SS == 0 {
        return;
    }
    out.exception.pending = 1;
    out.exception.nr = vector::DB;
    out.exception.has_error_code = 0;
    out.exception.error_code = 0;
    out.exception_has_payload = 1;
    out.exception_payload = bits;
}

/// The other way round, once the events are set.
pub(crate) fn set_waiting_traps(cpu: &mut Cpu) {
    let events = &mut cpu.state.events;
    let e = &mut events.exception;
    let waits =
        e.pending && e.vector == vector::DB && e.has_payload && events.shadow & SHADOW_MOV_SS != 0;
    let bits = if waits { e.payload } else { 0 };
    if waits {
        e.pending = false;
        e.has_payload = false;
    }
    cpu.set_waiting_traps(bits);
}

/// Moves the payload of a pending exception into its register (SDM Vol. 3, 6.15 and 18.2.3), for a
/// user space that does not know of payloads.
pub(crate) fn deliver_payload(s: &mut CpuState) {
    let e = &mut s.events.exception;
    if !(e.pending && e.has_payload) {
        return;
    }
    match e.vector {
        vector::PF => s.cr2 = e.payload,
        vector::DB => {
            // B0-B3 are replaced, the others accumulate; RTM and bus-lock bits are active low.
            const ACTIVE_LOW: u64 = 0xffff_0ff0;
            s.dr6 &= !0xf;
            s.dr6 |= ACTIVE_LOW | e.payload;
            s.dr6 ^= e.payload & ACTIVE_LOW;
            s.dr6 &= !(1 << 12);
        }
        _ => {}
    }
    e.has_payload = false;
    e.payload = 0;
}

const VALID_FLAGS: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING
    | KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | KVM_VCPUEVENT_VALID_SHADOW
    | KVM_VCPUEVENT_VALID_SMM
    | KVM_VCPUEVENT_VALID_PAYLOAD
    | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;

/// KVM_SET_VCPU_EVENTS. The caller looks at requests for NMIs first and, where there is a local APIC,
/// takes the SIPI vector and the latched INIT.
pub(crate) fn set(s: &mut CpuState, new: &kvm_vcpu_events, caps: EventCapabilities) -> Result<()> {
    let has = |flag: u32| new.flags & flag != 0;
    if new.flags & !VALID_FLAGS != 0
        || has(KVM_VCPUEVENT_VALID_PAYLOAD) && !caps.payload
        || has(KVM_VCPUEVENT_VALID_TRIPLE_FAULT) && !caps.triple_fault
    {
        return Err(Errno::EINVAL);
    }
    let payload = has(KVM_VCPUEVENT_VALID_PAYLOAD);
    let pending = payload && new.exception.pending != 0;
    let injected = new.exception.injected != 0 && !pending;
    if (injected || pending) && (new.exception.nr > 31 || new.exception.nr == vector::NMI) {
        return Err(Errno::EINVAL);
    }
    let smm = has(KVM_VCPUEVENT_VALID_SMM);
    if smm
        && (new.smi.smm != 0 || new.smi.pending != 0)
        && s.events.mp_state == MpState::InitReceived
    {
        return Err(Errno::EINVAL);
    }

    let e = &mut s.events;
    e.exception.injected = injected;
    e.exception.pending = pending;
    e.exception.vector = new.exception.nr;
    e.exception.has_error_code = new.exception.has_error_code != 0;
    e.exception.error_code = new.exception.error_code;
    e.exception.has_payload = pending && new.exception_has_payload != 0;
    e.exception.payload = new.exception_payload;

    e.interrupt.injected = new.interrupt.injected != 0;
    e.interrupt.vector = new.interrupt.nr;
    e.interrupt.soft = new.interrupt.soft != 0;
    if has(KVM_VCPUEVENT_VALID_SHADOW) {
        e.shadow = new.interrupt.shadow & (SHADOW_MOV_SS | SHADOW_STI);
    }

    e.nmi_injected = new.nmi.injected != 0;
    if has(KVM_VCPUEVENT_VALID_NMI_PENDING) {
        // Two may have come before SMM was entered, which masks them.
        e.nmi_pending = new.nmi.pending.min(2);
    }
    e.nmi_masked = new.nmi.masked != 0;

    if smm {
        e.smm = new.smi.smm != 0;
        e.smi_pending = new.smi.pending != 0;
        e.smm_inside_nmi = new.smi.smm != 0 && new.smi.smm_inside_nmi != 0;
        e.latched_init = new.smi.smm != 0 && new.smi.latched_init != 0;
    }
    if has(KVM_VCPUEVENT_VALID_TRIPLE_FAULT) {
        e.triple_fault = new.triple_fault.pending != 0;
    }
    Ok(())
}

/// `KVM_MP_STATE_*` as the processor's own enumeration.
pub(crate) fn mp_state(value: u32) -> Option<MpState> {
    [
        MpState::Runnable,
        MpState::Uninitialized,
        MpState::InitReceived,
        MpState::Halted,
        MpState::SipiReceived,
    ]
    .into_iter()
    .find(|state| *state as u32 == value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: EventCapabilities = EventCapabilities {
        payload: true,
        triple_fault: true,
    };

    #[test]
    fn round_trip() {
        let mut s = CpuState::new();
        let mut want = kvm_vcpu_events::default();
        want.exception.pending = 1;
        want.exception.nr = vector::PF;
        want.exception.has_error_code = 1;
        want.exception.error_code = 2;
        want.exception_has_payload = 1;
        want.exception_payload = 0xdead_b000;
        want.interrupt.shadow = SHADOW_STI;
        want.nmi.masked = 1;
        want.triple_fault.pending = 1;
        want.flags = KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SHADOW
            | KVM_VCPUEVENT_VALID_SMM
            | KVM_VCPUEVENT_VALID_PAYLOAD
            | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        set(&mut s, &want, ALL).unwrap();
        assert_eq!(get(&mut s, ALL), want);
    }

    /// Two NMIs, then an SMI, whose mode masks them.
    #[test]
    fn two_nmis_wait_behind_smm() {
        let mut s = CpuState::new();
        s.events.nmi_pending = 2;
        s.events.nmi_masked = true;
        s.events.smm = true;
        let e = get(&mut s, ALL);
        let mut t = CpuState::new();
        set(&mut t, &e, ALL).unwrap();
        assert_eq!(get(&mut t, ALL), e);
    }

    #[test]
    fn both_shadows_are_kept_apart() {
        let mut s = CpuState::new();
        for shadow in [0, SHADOW_MOV_SS, SHADOW_STI, SHADOW_MOV_SS | SHADOW_STI] {
            let mut e = get(&mut s, ALL);
            e.interrupt.shadow = shadow;
            set(&mut s, &e, ALL).unwrap();
            assert_eq!(get(&mut s, ALL).interrupt.shadow, shadow);
        }
        let mut e = get(&mut s, ALL);
        e.interrupt.shadow = 0;
        e.flags = 0;
        set(&mut s, &e, ALL).unwrap();
        assert_eq!(
            get(&mut s, ALL).interrupt.shadow,
            3,
            "not valid: not transferred"
        );
    }

    #[test]
    fn without_the_payload_capability_pending_is_injected_and_cr2_is_set() {
        let none = EventCapabilities::default();
        let mut s = CpuState::new();
        s.events.exception.pending = true;
        s.events.exception.vector = vector::PF;
        s.events.exception.has_payload = true;
        s.events.exception.payload = 0x5000;
        let e = get(&mut s, none);
        assert_eq!((e.exception.injected, e.exception_has_payload), (1, 0));
        assert_eq!(s.cr2, 0x5000);
    }

    #[test]
    fn refusals_change_nothing() {
        let mut s = CpuState::new();
        let before = s.events;
        let mut base = kvm_vcpu_events::default();
        base.nmi.masked = 1;
        let mut cases = vec![];
        let mut e = base;
        e.flags = 1 << 31;
        cases.push((e, ALL));
        let mut e = base;
        e.flags = KVM_VCPUEVENT_VALID_PAYLOAD;
        cases.push((e, EventCapabilities::default()));
        let mut e = base;
        e.flags = KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        cases.push((e, EventCapabilities::default()));
        for nr in [2, 32, 255] {
            let mut e = base;
            e.exception.injected = 1;
            e.exception.nr = nr;
            cases.push((e, ALL));
        }
        for (e, caps) in cases {
            assert!(set(&mut s, &e, caps).is_err(), "{e:?}");
            assert_eq!(s.events, before);
        }
        let mut e = base;
        e.exception.nr = 255;
        set(&mut s, &e, ALL).unwrap();
    }
}
