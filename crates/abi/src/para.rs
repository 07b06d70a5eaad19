//! KVM's interface to guests (`asm/kvm_para.h`, `linux/kvm_para.h`): feature bits of CPUID leaf
//! 0x40000001, MSR numbers, hypercall numbers and their errors.

macro_rules! constants {
    ($($name:ident: $t:ty = $value:expr;)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "`")]
            pub const $name: $t = $value;
        )*
    };
}

// Bits of CPUID 0x40000001.EAX.
constants! {
    KVM_FEATURE_CLOCKSOURCE: u32 = 0;
    KVM_FEATURE_NOP_IO_DELAY: u32 = 1;
    KVM_FEATURE_MMU_OP: u32 = 2;
    KVM_FEATURE_CLOCKSOURCE2: u32 = 3;
    KVM_FEATURE_ASYNC_PF: u32 = 4;
    KVM_FEATURE_STEAL_TIME: u32 = 5;
    KVM_FEATURE_PV_EOI: u32 = 6;
    KVM_FEATURE_PV_UNHALT: u32 = 7;
    KVM_FEATURE_PV_TLB_FLUSH: u32 = 9;
    KVM_FEATURE_ASYNC_PF_VMEXIT: u32 = 10;
    KVM_FEATURE_PV_SEND_IPI: u32 = 11;
    KVM_FEATURE_POLL_CONTROL: u32 = 12;
    KVM_FEATURE_PV_SCHED_YIELD: u32 = 13;
    KVM_FEATURE_ASYNC_PF_INT: u32 = 14;
    KVM_FEATURE_MSI_EXT_DEST_ID: u32 = 15;
    KVM_FEATURE_HC_MAP_GPA_RANGE: u32 = 16;
    KVM_FEATURE_MIGRATION_CONTROL: u32 = 17;
    KVM_FEATURE_CLOCKSOURCE_STABLE_BIT: u32 = 24;
}

constants! {
    MSR_KVM_WALL_CLOCK: u32 = 0x11;
    MSR_KVM_SYSTEM_TIME: u32 = 0x12;
    MSR_KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
    MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    MSR_KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
    MSR_KVM_STEAL_TIME: u32 = 0x4b56_4d03;
    MSR_KVM_PV_EOI_EN: u32 = 0x4b56_4d04;
    MSR_KVM_POLL_CONTROL: u32 = 0x4b56_4d05;
    MSR_KVM_ASYNC_PF_INT: u32 = 0x4b56_4d06;
    MSR_KVM_ASYNC_PF_ACK: u32 = 0x4b56_4d07;
}

constants! {
    KVM_VCPU_PREEMPTED: u8 = 1 << 0;
    KVM_VCPU_FLUSH_TLB: u8 = 1 << 1;
}

constants! {
    KVM_HC_VAPIC_POLL_IRQ: u32 = 1;
    KVM_HC_KICK_CPU: u32 = 5;
    KVM_HC_CLOCK_PAIRING: u32 = 9;
    KVM_HC_SEND_IPI: u32 = 10;
    KVM_HC_SCHED_YIELD: u32 = 11;
    KVM_HC_MAP_GPA_RANGE: u32 = 12;
}

// What a hypercall returns, negated.
constants! {
    KVM_EPERM: u32 = 1;
    KVM_EFAULT: u32 = 14;
    KVM_EINVAL: u32 = 22;
    KVM_EOPNOTSUPP: u32 = 95;
    KVM_ENOSYS: u32 = 1000;
}
