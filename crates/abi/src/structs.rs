//! Structures that `kvm_bindings` lacks: those of the first KVM API, which Linux has dropped since,
//! and those that exist there only with pointers or flexible arrays in them.
#![allow(non_camel_case_types)]

/// `KVM_SET_MEMORY_REGION`: a slot of RAM that KVM allocates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct kvm_memory_region {
    /// Slot number.
    pub slot: u32,
    /// `KVM_MEM_LOG_DIRTY_PAGES`.
    pub flags: u32,
    /// First guest-physical address.
    pub guest_phys_addr: u64,
    /// Bytes; 0 deletes the slot.
    pub memory_size: u64,
}

/// `KVM_SET_MEMORY_ALIAS`: a guest-physical window onto another region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct kvm_memory_alias {
    /// Alias number, below `KVM_ALIAS_SLOTS` (4).
    pub slot: u32,
    /// None are defined.
    pub flags: u32,
    /// First guest-physical address of the window.
    pub guest_phys_addr: u64,
    /// Bytes; 0 deletes the alias.
    pub memory_size: u64,
    /// Guest-physical address of what the window shows.
    pub target_phys_addr: u64,
}

/// One breakpoint of `kvm_debug_guest`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct kvm_breakpoint {
    /// Nonzero: armed.
    pub enabled: u32,
    /// Padding.
    pub padding: u32,
    /// Linear address.
    pub address: u64,
}

/// `KVM_DEBUG_GUEST`, which was never more than a number after 2.6.28.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct kvm_debug_guest {
    /// Nonzero: debugging is on.
    pub enabled: u32,
    /// Padding.
    pub pad: u32,
    /// Breakpoints.
    pub breakpoints: [kvm_breakpoint; 4],
    /// Nonzero: single-step.
    pub singlestep: u32,
    /// Padding up to the structure's alignment.
    pub pad2: u32,
}

/// One range of [`kvm_user_msr_filter`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct kvm_user_msr_filter_range {
    /// `KVM_MSR_FILTER_READ`, `KVM_MSR_FILTER_WRITE`.
    pub flags: u32,
    /// Number of MSRs, bits of the bitmap.
    pub nmsrs: u32,
    /// First MSR.
    pub base: u32,
    /// Padding that the header leaves to the compiler.
    pub pad: u32,
    /// Address of the bitmap; a bit set allows.
    pub bitmap: u64,
}

/// `kvm_msr_filter` with the pointers as the numbers they are to the other side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct kvm_user_msr_filter {
    /// `KVM_MSR_FILTER_DEFAULT_DENY`.
    pub flags: u32,
    /// Padding that the header leaves to the compiler.
    pub pad: u32,
    /// The ranges; those with `nmsrs` 0 are unused.
    pub ranges: [kvm_user_msr_filter_range; 16],
}

/// `kvm_stats_desc` with its flexible name as KVM lays it out (48 bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct kvm_stats_descriptor {
    /// Type, unit and base (`KVM_STATS_*`).
    pub flags: u32,
    /// Exponent of the base.
    pub exponent: i16,
    /// Number of values.
    pub size: u16,
    /// Where they are in the data block.
    pub offset: u32,
    /// Width of a bucket of linear histograms.
    pub bucket_size: u32,
    /// Name, ended by a 0 byte.
    pub name: [u8; KVM_STATS_NAME_SIZE],
}

/// `name_size` of the statistics header.
pub const KVM_STATS_NAME_SIZE: usize = 48;
/// Alias slots of the first KVM API.
pub const KVM_ALIAS_SLOTS: u32 = 4;
