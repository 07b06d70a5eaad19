//! Plain data: the structures of `kvm.h` as bytes.
//!
//! KVM's structures are made to be copied across a privilege boundary: integers, arrays and unions of
//! them, padding spelled out as fields. [`Plain`] says so to the compiler, once, and gives everybody
//! else safe copies in both directions.

use kvm_bindings::*;

use crate::structs::*;

/// A type that any bytes are a value of, and all of whose bytes are always initialised.
///
/// # Safety
/// The type must be `repr(C)` (or a primitive or array of such), have no padding bytes that are not
/// fields, no references, no pointers that are dereferenced, no invalid bit patterns. Unions must be
/// as large as their largest member and be made by [`Plain::zeroed`] or [`Plain::from_bytes`].
pub unsafe trait Plain: Copy + 'static {
    /// All bytes 0.
    fn zeroed() -> Self {
        // SAFETY: by the trait's contract any bytes are a value.
        unsafe { std::mem::zeroed() }
    }

    /// The value these bytes are; `None` if there are fewer or more than its size.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: as many bytes as the type has, any of which are a value; the read is unaligned.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }

    /// Its bytes.
    fn as_bytes(&self) -> &[u8] {
        // SAFETY: by the trait's contract every byte is initialised; the lifetime is self's.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
    }

    /// Its bytes, to be filled.
    fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as `as_bytes`, and any bytes written are a value.
        unsafe { std::slice::from_raw_parts_mut((&raw mut *self).cast(), size_of::<Self>()) }
    }
}

// SAFETY: an array has its elements' bytes and no others.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

macro_rules! plain {
    ($($t:ty),* $(,)?) => {
        $(
            // SAFETY: integers, or a uapi structure of integers, arrays and unions of them whose
            // padding is spelled out (checked against the sum of the fields by the tests below).
            unsafe impl Plain for $t {}
        )*
    };
}

plain!(u8, u16, u32, u64, usize, i8, i16, i32, i64);
plain!(
    // system and VM
    kvm_clear_dirty_log,
    kvm_clock_data,
    kvm_coalesced_mmio,
    kvm_coalesced_mmio_zone,
    kvm_create_device,
    kvm_create_guest_memfd,
    kvm_device_attr,
    kvm_dirty_log,
    kvm_enable_cap,
    kvm_enc_region,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_irqfd,
    kvm_memory_alias,
    kvm_memory_attributes,
    kvm_memory_region,
    kvm_msi,
    kvm_pit_config,
    kvm_pit_state,
    kvm_pit_state2,
    kvm_reinject_control,
    kvm_stats_header,
    kvm_stats_descriptor,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
    kvm_user_msr_filter,
    kvm_user_msr_filter_range,
    kvm_xen_hvm_config,
    kvm_ioapic_state,
    kvm_pic_state,
    // vCPU
    kvm_cpuid_entry,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_debug_guest,
    kvm_fpu,
    kvm_guest_debug,
    kvm_interrupt,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_msr_entry,
    kvm_one_reg,
    kvm_regs,
    kvm_segment,
    kvm_dtable,
    kvm_sregs,
    kvm_sregs2,
    kvm_tpr_access_ctl,
    kvm_translation,
    kvm_vapic_addr,
    kvm_vcpu_events,
    kvm_x86_mce,
    kvm_xcr,
    kvm_xcrs,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_back() {
        let mut regs = kvm_regs {
            rax: 0x1122_3344_5566_7788,
            rflags: 2,
            ..Default::default()
        };
        assert_eq!(kvm_regs::from_bytes(regs.as_bytes()), Some(regs));
        assert_eq!(regs.as_bytes()[0], 0x88);
        assert_eq!(kvm_regs::from_bytes(&regs.as_bytes()[1..]), None);
        regs.as_bytes_mut()[1] = 0;
        assert_eq!(regs.rax, 0x1122_3344_5566_0088);
        assert_eq!(
            <[u32; 2]>::from_bytes(&[1, 0, 0, 0, 2, 0, 0, 0]),
            Some([1, 2])
        );
    }

    /// `kvm.h` spells padding out: each size is the sum of the fields' sizes.
    #[test]
    fn no_hidden_padding() {
        assert_eq!(size_of::<kvm_pic_state>(), 16);
        assert_eq!(size_of::<kvm_ioapic_state>(), 8 + 4 * 4 + 24 * 8);
        assert_eq!(size_of::<kvm_irqchip>(), 8 + 512);
        assert_eq!(size_of::<kvm_irq_routing_entry>(), 16 + 32);
        assert_eq!(size_of::<kvm_pit_channel_state>(), 4 + 2 + 10 + 8);
        assert_eq!(size_of::<kvm_pit_state2>(), 3 * 24 + 4 + 9 * 4);
        assert_eq!(size_of::<kvm_segment>(), 8 + 4 + 2 + 10);
        assert_eq!(size_of::<kvm_dtable>(), 8 + 2 + 6);
        assert_eq!(size_of::<kvm_sregs>(), 8 * 24 + 2 * 16 + 7 * 8 + 32);
        assert_eq!(size_of::<kvm_sregs2>(), 8 * 24 + 2 * 16 + 7 * 8 + 8 + 32);
        assert_eq!(size_of::<kvm_fpu>(), 128 + 8 + 16 + 256 + 8);
        assert_eq!(
            size_of::<kvm_vcpu_events>(),
            8 + 4 + 4 + 4 + 4 + 4 + 1 + 26 + 1 + 8
        );
        assert_eq!(size_of::<kvm_debugregs>(), 16 * 8);
        assert_eq!(size_of::<kvm_xcrs>(), 8 + 16 * 16 + 16 * 8);
        assert_eq!(size_of::<kvm_cpuid_entry2>(), 10 * 4);
        assert_eq!(size_of::<kvm_cpuid_entry>(), 6 * 4);
        assert_eq!(size_of::<kvm_ioeventfd>(), 8 + 8 + 4 + 4 + 4 + 36);
        assert_eq!(size_of::<kvm_irqfd>(), 4 * 4 + 16);
        assert_eq!(size_of::<kvm_msi>(), 8 + 4 * 3 + 12);
        assert_eq!(size_of::<kvm_xen_hvm_config>(), 8 + 16 + 2 + 30);
        assert_eq!(size_of::<kvm_clock_data>(), 8 + 4 + 4 + 8 + 8 + 16);
        assert_eq!(size_of::<kvm_enable_cap>(), 8 + 32 + 64);
        assert_eq!(size_of::<kvm_dirty_log>(), 16);
        assert_eq!(size_of::<kvm_clear_dirty_log>(), 24);
        assert_eq!(size_of::<kvm_coalesced_mmio_zone>(), 16);
        assert_eq!(size_of::<kvm_coalesced_mmio>(), 24);
        assert_eq!(size_of::<kvm_irq_level>(), 8);
        assert_eq!(size_of::<kvm_guest_debug>(), 8 + 64);
        assert_eq!(size_of::<kvm_x86_mce>(), 4 * 8 + 8 + 24);
        assert_eq!(size_of::<kvm_translation>(), 16 + 8);
        assert_eq!(size_of::<kvm_device_attr>(), 8 + 16);
        assert_eq!(
            size_of::<kvm_user_msr_filter>(),
            size_of::<kvm_msr_filter>()
        );
    }
}
