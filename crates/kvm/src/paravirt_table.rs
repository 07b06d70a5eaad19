//! KVM's paravirtual interface, one table each: the feature bits of CPUID leaf 40000001H, the MSRs and the
//! hypercalls with the feature that announces each (`Documentation/virt/kvm/x86/cpuid.rst`, `msr.rst`,
//! `hypercalls.rst`).

use anykvm_abi::*;

/// Who decides whether a feature is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offer {
    /// KVM_GET_SUPPORTED_CPUID shows it.
    Kvm,
    /// The same, where the host counts the run delay of threads.
    Host,
    /// Not shown; a monitor that does its part may give it to the guest.
    Monitor,
    /// It is not there.
    Absent,
}

/// One bit of leaf 40000001H, EAX.
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "name and account are for docs/api.md")
)]
pub(crate) struct Feature {
    pub bit: u32,
    pub name: &'static str,
    pub offer: Offer,
    pub about: &'static str,
}

macro_rules! feature {
    ($bit:ident, $offer:ident, $about:literal) => {
        Feature {
            bit: $bit,
            name: stringify!($bit),
            offer: Offer::$offer,
            about: $about,
        }
    };
}

#[rustfmt::skip]
pub(crate) const FEATURES: &[Feature] = &[
    feature!(KVM_FEATURE_CLOCKSOURCE, Kvm, "kvmclock by the first pair of MSRs"),
    feature!(KVM_FEATURE_NOP_IO_DELAY, Kvm, "a port access needs no delay behind it"),
    feature!(KVM_FEATURE_MMU_OP, Absent, "dropped from KVM"),
    feature!(KVM_FEATURE_CLOCKSOURCE2, Kvm, "kvmclock by the second pair of MSRs"),
    feature!(KVM_FEATURE_ASYNC_PF, Kvm, "MSR_KVM_ASYNC_PF_EN; nothing ever happens by it"),
    feature!(KVM_FEATURE_STEAL_TIME, Host, "time that the vCPU's thread waited for a processor"),
    feature!(KVM_FEATURE_PV_EOI, Kvm, "the flag is never set: an end of interrupt leaves nothing"),
    feature!(KVM_FEATURE_PV_UNHALT, Kvm, "KVM_HC_KICK_CPU; needs a local APIC in KVM"),
    feature!(KVM_FEATURE_PV_TLB_FLUSH, Host, "a vCPU whose thread was interrupted flushes its TLB later"),
    feature!(KVM_FEATURE_ASYNC_PF_VMEXIT, Absent, "no nested virtualisation"),
    feature!(KVM_FEATURE_PV_SEND_IPI, Kvm, "KVM_HC_SEND_IPI; needs a local APIC in KVM"),
    feature!(KVM_FEATURE_POLL_CONTROL, Kvm, "the guest may switch off polling in HLT"),
    feature!(KVM_FEATURE_PV_SCHED_YIELD, Kvm, "KVM_HC_SCHED_YIELD"),
    feature!(KVM_FEATURE_ASYNC_PF_INT, Kvm, "asynchronous page faults by interrupt; none is ever sent"),
    feature!(KVM_FEATURE_MSI_EXT_DEST_ID, Monitor, "15-bit APIC ids in MSIs"),
    feature!(KVM_FEATURE_HC_MAP_GPA_RANGE, Monitor, "KVM_HC_MAP_GPA_RANGE, with KVM_CAP_EXIT_HYPERCALL"),
    feature!(KVM_FEATURE_MIGRATION_CONTROL, Absent, "for encrypted memory"),
    feature!(KVM_FEATURE_CLOCKSOURCE_STABLE_BIT, Kvm, "PVCLOCK_TSC_STABLE_BIT means something"),
];

/// Leaf 40000001H, EAX, as KVM_GET_SUPPORTED_CPUID shows it.
pub(crate) fn offered() -> u32 {
    let kvm = FEATURES.iter().filter(|f| match f.offer {
        Offer::Kvm => true,
        Offer::Host => crate::steal_time::is_measured(),
        Offer::Monitor | Offer::Absent => false,
    });
    kvm.fold(0, |bits, f| bits | 1 << f.bit)
}

/// The MSRs, with the feature that announces each.
pub(crate) const MSRS: &[(u32, u32)] = &[
    (MSR_KVM_WALL_CLOCK, KVM_FEATURE_CLOCKSOURCE),
    (MSR_KVM_SYSTEM_TIME, KVM_FEATURE_CLOCKSOURCE),
    (MSR_KVM_WALL_CLOCK_NEW, KVM_FEATURE_CLOCKSOURCE2),
    (MSR_KVM_SYSTEM_TIME_NEW, KVM_FEATURE_CLOCKSOURCE2),
    (MSR_KVM_ASYNC_PF_EN, KVM_FEATURE_ASYNC_PF),
    (MSR_KVM_ASYNC_PF_INT, KVM_FEATURE_ASYNC_PF_INT),
    (MSR_KVM_ASYNC_PF_ACK, KVM_FEATURE_ASYNC_PF_INT),
    (MSR_KVM_STEAL_TIME, KVM_FEATURE_STEAL_TIME),
    (MSR_KVM_PV_EOI_EN, KVM_FEATURE_PV_EOI),
    (MSR_KVM_POLL_CONTROL, KVM_FEATURE_POLL_CONTROL),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_feature_once_and_each_msr_of_a_feature() {
        for (i, f) in FEATURES.iter().enumerate() {
            assert!(
                FEATURES[i + 1..].iter().all(|g| g.bit != f.bit),
                "{}",
                f.name
            );
        }
        for (msr, bit) in MSRS {
            assert!(FEATURES.iter().any(|f| f.bit == *bit), "{msr:#x}");
        }
    }
}
