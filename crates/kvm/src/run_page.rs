//! `struct kvm_run` (KVM API, section 5): the pages a vCPU shares with whoever maps its fd.
//!
//! Page 0 is the structure, page 1 holds the data of port I/O, page 2 is where the VM's coalesced ring
//! is laid over. The pages live in the memfd that is the vCPU's fd, so every mapping of the fd and
//! this one are the same memory. The VMM writes it at any time; fields are accessed one by one, by
//! offset, and each is read once.

use std::mem::offset_of;
use std::os::fd::AsFd;

use anykvm_abi::{
    Plain, kvm_run, kvm_run__bindgen_ty_1__bindgen_ty_2 as fail_entry,
    kvm_run__bindgen_ty_1__bindgen_ty_4 as io, kvm_run__bindgen_ty_1__bindgen_ty_5 as debug,
    kvm_run__bindgen_ty_1__bindgen_ty_6 as mmio, kvm_run__bindgen_ty_1__bindgen_ty_8 as hypercall,
    kvm_run__bindgen_ty_1__bindgen_ty_9 as tpr_access,
    kvm_run__bindgen_ty_1__bindgen_ty_13 as internal,
    kvm_run__bindgen_ty_1__bindgen_ty_14 as emulation_failure,
    kvm_run__bindgen_ty_1__bindgen_ty_21 as eoi, kvm_run__bindgen_ty_1__bindgen_ty_23 as msr,
    kvm_run__bindgen_ty_1__bindgen_ty_27 as memory_fault, kvm_sync_regs,
};
use anykvm_cpu::memory::mapping::Mapping;

/// What KVM_GET_VCPU_MMAP_SIZE returns.
pub const MMAP_SIZE: usize = 3 * 4096;
/// Where the data of a port I/O exit is (`kvm_run.io.data_offset`).
pub(crate) const PIO_DATA: usize = 4096;
/// Bytes of port I/O data that fit.
pub(crate) const PIO_BYTES: usize = 4096;

/// Where the union of exit records begins.
const EXIT: usize = offset_of!(kvm_run, __bindgen_anon_1);
/// Where the synchronised registers begin.
const SYNC: usize = offset_of!(kvm_run, s);

/// The two pages of a vCPU, mapped for this side.
#[derive(Debug)]
pub(crate) struct RunPage(Mapping);

macro_rules! fields {
    ($($(#[$doc:meta])* $get:ident / $set:ident: $t:ty = $at:expr;)*) => {
        $(
            $(#[$doc])*
            #[allow(dead_code, reason = "most fields have one direction")]
            pub fn $get(&self) -> $t {
                self.0.read($at)
            }
            $(#[$doc])*
            #[allow(dead_code, reason = "most fields have one direction")]
            pub fn $set(&self, value: $t) {
                self.0.write($at, value);
            }
        )*
    };
}

impl RunPage {
    /// Maps the pages of a vCPU's memfd.
    pub fn new(fd: impl AsFd) -> std::io::Result<Self> {
        Ok(Self(Mapping::new(fd.as_fd(), 0, PIO_DATA + PIO_BYTES)?))
    }

    fields! {
        request_interrupt_window / set_request_interrupt_window: u8 = offset_of!(kvm_run, request_interrupt_window);
        immediate_exit / set_immediate_exit: u8 = offset_of!(kvm_run, immediate_exit);
        exit_reason / set_exit_reason: u32 = offset_of!(kvm_run, exit_reason);
        ready_for_interrupt_injection / set_ready_for_interrupt_injection: u8 =
            offset_of!(kvm_run, ready_for_interrupt_injection);
        if_flag / set_if_flag: u8 = offset_of!(kvm_run, if_flag);
        flags / set_flags: u16 = offset_of!(kvm_run, flags);
        cr8 / set_cr8: u64 = offset_of!(kvm_run, cr8);
        apic_base / set_apic_base: u64 = offset_of!(kvm_run, apic_base);
        kvm_valid_regs / set_kvm_valid_regs: u64 = offset_of!(kvm_run, kvm_valid_regs);
        kvm_dirty_regs / set_kvm_dirty_regs: u64 = offset_of!(kvm_run, kvm_dirty_regs);
        fail_entry_reason / set_fail_entry_reason: u64 = EXIT + offset_of!(fail_entry, hardware_entry_failure_reason);
        fail_entry_cpu / set_fail_entry_cpu: u32 = EXIT + offset_of!(fail_entry, cpu);
        io_direction / set_io_direction: u8 = EXIT + offset_of!(io, direction);
        io_size / set_io_size: u8 = EXIT + offset_of!(io, size);
        io_port / set_io_port: u16 = EXIT + offset_of!(io, port);
        io_count / set_io_count: u32 = EXIT + offset_of!(io, count);
        io_data_offset / set_io_data_offset: u64 = EXIT + offset_of!(io, data_offset);
        debug_exception / set_debug_exception: u32 = EXIT + offset_of!(debug, arch.exception);
        debug_pc / set_debug_pc: u64 = EXIT + offset_of!(debug, arch.pc);
        debug_dr6 / set_debug_dr6: u64 = EXIT + offset_of!(debug, arch.dr6);
        debug_dr7 / set_debug_dr7: u64 = EXIT + offset_of!(debug, arch.dr7);
        mmio_phys_addr / set_mmio_phys_addr: u64 = EXIT + offset_of!(mmio, phys_addr);
        /// The eight data bytes as one little-endian integer.
        mmio_data / set_mmio_data: u64 = EXIT + offset_of!(mmio, data);
        mmio_len / set_mmio_len: u32 = EXIT + offset_of!(mmio, len);
        mmio_is_write / set_mmio_is_write: u8 = EXIT + offset_of!(mmio, is_write);
        hypercall_nr / set_hypercall_nr: u64 = EXIT + offset_of!(hypercall, nr);
        hypercall_ret / set_hypercall_ret: u64 = EXIT + offset_of!(hypercall, ret);
        hypercall_flags / set_hypercall_flags: u64 = EXIT + offset_of!(hypercall, __bindgen_anon_1);
        tpr_access_rip / set_tpr_access_rip: u64 = EXIT + offset_of!(tpr_access, rip);
        tpr_access_is_write / set_tpr_access_is_write: u32 = EXIT + offset_of!(tpr_access, is_write);
        internal_suberror / set_internal_suberror: u32 = EXIT + offset_of!(internal, suberror);
        internal_ndata / set_internal_ndata: u32 = EXIT + offset_of!(internal, ndata);
        emulation_failure_flags / set_emulation_failure_flags: u64 = EXIT + offset_of!(emulation_failure, flags);
        eoi_vector / set_eoi_vector: u8 = EXIT + offset_of!(eoi, vector);
        memory_fault_flags / set_memory_fault_flags: u64 = EXIT + offset_of!(memory_fault, flags);
        memory_fault_gpa / set_memory_fault_gpa: u64 = EXIT + offset_of!(memory_fault, gpa);
        memory_fault_size / set_memory_fault_size: u64 = EXIT + offset_of!(memory_fault, size);
        msr_error / set_msr_error: u8 = EXIT + offset_of!(msr, error);
        msr_reason / set_msr_reason: u32 = EXIT + offset_of!(msr, reason);
        msr_index / set_msr_index: u32 = EXIT + offset_of!(msr, index);
        msr_data / set_msr_data: u64 = EXIT + offset_of!(msr, data);
    }

    /// One argument of a hypercall exit (there are six).
    pub fn hypercall_arg(&self, i: usize) -> u64 {
        self.0
            .read(EXIT + offset_of!(hypercall, args) + 8 * (i % 6))
    }
    /// Sets one argument of a hypercall exit.
    pub fn set_hypercall_arg(&self, i: usize, value: u64) {
        self.0
            .write(EXIT + offset_of!(hypercall, args) + 8 * (i % 6), value);
    }
    /// Sets one data word of an internal-error exit (there are sixteen).
    pub fn set_internal_data(&self, i: usize, value: u64) {
        self.0
            .write(EXIT + offset_of!(internal, data) + 8 * (i % 16), value);
    }
    /// The instruction of an emulation failure.
    pub fn set_emulation_failure_insn(&self, bytes: &[u8]) {
        const AT: usize = EXIT + offset_of!(emulation_failure, __bindgen_anon_1);
        let mut field = [0u8; 16];
        let n = bytes.len().min(15);
        field[0] = n as u8;
        field[1..=n].copy_from_slice(&bytes[..n]);
        self.0.write_bytes(AT, &field);
    }

    /// Copies port I/O data in (from the start of the data page).
    pub fn write_pio(&self, data: &[u8]) {
        self.0
            .write_bytes(PIO_DATA, &data[..data.len().min(PIO_BYTES)]);
    }
    /// Copies port I/O data out.
    pub fn read_pio(&self, data: &mut [u8]) {
        let n = data.len().min(PIO_BYTES);
        self.0.read_bytes(PIO_DATA, &mut data[..n]);
    }

    /// Reads one structure of `kvm_run.s.regs`.
    pub fn sync_read<T: Plain>(&self, offset: usize) -> T {
        let mut value = T::zeroed();
        self.0.read_bytes(SYNC + offset, value.as_bytes_mut());
        value
    }
    /// Writes one structure of `kvm_run.s.regs`.
    pub fn sync_write<T: Plain>(&self, offset: usize, value: &T) {
        self.0.write_bytes(SYNC + offset, value.as_bytes());
    }
}

/// Offsets for [`RunPage::sync_read`].
pub(crate) mod sync {
    use super::*;
    pub const REGS: usize = offset_of!(kvm_sync_regs, regs);
    pub const SREGS: usize = offset_of!(kvm_sync_regs, sregs);
    pub const EVENTS: usize = offset_of!(kvm_sync_regs, events);
}
