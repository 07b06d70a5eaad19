//! Each row of the table of ioctls is exercised by some body: one that works succeeds in one and is refused in
//! one, where there is anything to refuse; one that does not gives its errno.

use std::collections::{HashMap, HashSet};

use anykvm::{Errno, IOCTLS, IoctlState, ObjectKind};
use anykvm_abi::ioctl::*;

use crate::support::take_issued;
use crate::*;

/// Every body.
const BODIES: &[fn()] = &[
    capabilities::check_extension_on_both_descriptors,
    capabilities::enable_cap_refuses,
    capabilities::each_is_what_the_table_says,
    capabilities::enabled_is_in_force,
    capabilities::msr_filter,
    capabilities::xen_hvm_config,
    capabilities::controllers_and_ids_after_the_first_vcpu,
    clock::set_and_get,
    clock::realtime_adds_what_has_passed,
    clock::flags_tell_what_is_filled_in,
    clock::tsc_frequency,
    controllers::requested_and_in_service,
    controllers::the_id_in_both_modes,
    controllers::the_current_count,
    controllers::pic_lines,
    controllers::ioapic_pins,
    controllers::pit_channels,
    devices::vfio_once,
    devices::vfio_takes_vfio_files_only,
    devices::stats_are_live,
    dirty_log::get_takes_what_was_written,
    dirty_log::get_refuses,
    dirty_log::logging_survives_a_move_and_begins_anew_when_switched_on,
    dirty_log::manual_protection_clears_only_on_request,
    dirty_log::clear_refuses,
    dirty_log::initially_set,
    dirty_log::clearing_what_is_clean,
    dirty_log::manual_protection_flags,
    dirty_ring::sizes,
    dirty_ring::only_before_the_first_vcpu,
    dirty_ring::there_are_no_bitmaps_then,
    dirty_ring::the_ring_is_shared_and_not_executable,
    every::what_the_table_refuses_is_refused,
    every::what_is_in_no_row_is_unknown,
    every::another_process_gets_eio,
    guest_memfd::capabilities_are_the_vms,
    guest_memfd::files,
    guest_memfd::slots,
    guest_memfd::attributes,
    guest_memfd::a_private_page_is_not_the_shared_one,
    guest_memfd::a_private_page_without_a_file_is_a_memory_fault,
    guest_memfd::the_guest_asks_by_a_hypercall,
    interrupts::controllers_once_and_before_vcpus,
    interrupts::without_controllers,
    interrupts::lines_reach_the_pic,
    interrupts::chip_state_round_trip,
    interrupts::routing_is_replaced_or_not,
    interrupts::msi,
    interrupts::irqfd_injects_until_deassigned,
    interrupts::irqfd_survives_the_callers_close,
    interrupts::irqfd_refuses,
    interrupts::resample_lowers_and_signals_on_acknowledgement,
    interrupts::pit,
    interrupts::the_pit_ticks_without_a_vcpu,
    interrupts::the_first_form_of_the_pit,
    io::assign_and_deassign,
    io::collisions,
    io::refused,
    io::coalesced_zones,
    memory::create_move_delete,
    memory::many_slots,
    memory::refused_and_unchanged,
    memory::address_spaces_are_separate,
    memory::readonly_and_the_longer_structure,
    memory::own_memory_is_the_vm_file,
    memory::aliases_show_other_slots,
    memory::writes_through_an_alias_dirty_the_slot,
    memory::tss_identity_map_and_mmu_pages,
    paravirt::hypercalls_have_the_width_of_the_code,
    paravirt::clock_pairing,
    paravirt::map_gpa_range,
    paravirt::send_ipi_by_bitmap,
    paravirt::kicks_and_yields_are_never_refused,
    paravirt::what_cpuid_does_not_announce_is_not_there_when_enforced,
    paravirt::no_unhalt_without_exits_of_hlt,
    paravirt::msrs_take_what_is_well_formed_and_possible,
    paravirt::the_wall_clock_is_the_machines,
    paravirt::the_guest_is_told_that_it_was_stopped,
    paravirt::init_switches_off_what_points_to_memory,
    preempted::a_flush_is_left_to_a_processor_that_was_interrupted,
    preempted::a_processor_that_sleeps_in_hlt_is_not_marked,
    steal_time::the_guests_structure_is_added_to,
    system::api_version_and_mmap_size_take_no_argument,
    system::create_vm_knows_two_types,
    system::unknown_ioctls,
    system::vcpu_ids_are_unique_and_bounded,
    system::supported_cpuid_fits_or_is_e2big,
    system::supported_cpuid_names_kvm,
    system::msr_lists,
    system::feature_msrs,
    system::mce_and_device_attributes,
    system::max_vcpu_id_is_set_once_and_holds,
    system::boot_cpu_id_before_the_first_vcpu,
    system::a_vcpu_keeps_its_vm_alive_and_nothing_else_does,
    system::vms_with_everything_in_them_are_freed,
    system::bad_pointers,
    system::the_tracing_of_old_is_gone,
    system::emulated_cpuid_wants_clear_padding,
    vcpu::pointers_to_nowhere_fault,
    vcpu::unknown_ioctls_are_einval,
    vcpu::signal_mask,
    vcpu::tsc_frequency_and_offset,
    vcpu::capabilities_of_a_vcpu,
    vcpu::local_apic_and_vapic_need_an_irqchip,
    vcpu::tpr_access_reporting,
    vcpu::machine_check,
    vcpu::statistics_are_live,
    vcpu::guest_debug,
    vcpu::nested_state_says_that_there_is_none,
    vcpu_cpuid_msrs::cpuid_round_trip,
    vcpu_cpuid_msrs::bad_cpuid_changes_nothing,
    vcpu_cpuid_msrs::after_the_first_run_only_the_same_cpuid_is_taken,
    vcpu_cpuid_msrs::msrs_stop_at_the_first_bad_one,
    vcpu_cpuid_msrs::the_clock_msrs_of_kvm,
    vcpu_cpuid_msrs::the_tsc_goes_on_from_what_is_set,
    vcpu_cpuid_msrs::the_first_form_of_cpuid,
    vcpu_cpuid_msrs::lists_that_end_nowhere,
    vcpu_events::reset_state_and_flags,
    vcpu_events::round_trip_of_everything,
    vcpu_events::shadow_bits_are_distinct_and_need_their_flag,
    vcpu_events::refused_states_change_nothing,
    vcpu_events::without_the_payload_capability_pending_is_not_taken,
    vcpu_events::nmis_are_counted_to_two,
    vcpu_events::interrupts_from_user_space,
    vcpu_events::mp_state,
    vcpu_registers::reset_values,
    vcpu_registers::general_registers,
    vcpu_registers::system_registers,
    vcpu_registers::every_bit_of_efer_is_restored,
    vcpu_registers::inconsistent_system_registers_change_nothing,
    vcpu_registers::sregs2_carry_page_directory_pointers,
    vcpu_registers::debug_registers,
    vcpu_registers::floating_point,
    vcpu_registers::extended_control_registers,
    vcpu_registers::translation_without_paging_is_the_identity,
    vcpu_reset::registers,
    vcpu_reset::system_registers,
    vcpu_reset::floating_point,
    vcpu_reset::the_others,
    vcpu_reset::model_specific_registers,
    vcpu_reset::local_apic,
    vcpu_run::argument_must_be_zero,
    vcpu_run::immediate_exit_enters_nothing,
    vcpu_run::cr8_goes_in_and_out_without_an_irqchip,
    vcpu_run::unknown_synchronised_registers_are_refused,
    vcpu_run::application_processors_begin_uninitialised,
];

/// Ioctls whose argument cannot be wrong.
const ANY_ARGUMENT: &[(ObjectKind, u32)] = &[
    (ObjectKind::System, KVM_CHECK_EXTENSION),
    (ObjectKind::Vm, KVM_CHECK_EXTENSION),
    (ObjectKind::Vm, KVM_GET_NR_MMU_PAGES),
    (ObjectKind::Vm, KVM_GET_TSC_KHZ),
    (ObjectKind::Vm, KVM_GET_STATS_FD),
    (ObjectKind::Vcpu, KVM_GET_TSC_KHZ),
    (ObjectKind::Vcpu, KVM_GET_STATS_FD),
    (ObjectKind::Vcpu, KVM_NMI),
    (ObjectKind::Vcpu, KVM_SMI),
];

/// Ioctls whose success needs a VFIO file, and so a device given to a guest.
const NEEDS_VFIO: &[(ObjectKind, u32)] = &[(ObjectKind::Device, KVM_SET_DEVICE_ATTR)];

#[test]
fn every_row_has_a_body() {
    take_issued();
    BODIES.iter().for_each(|body| body());
    let mut ends: HashMap<_, HashSet<Result<(), Errno>>> = HashMap::new();
    for (kind, request, end) in take_issued() {
        ends.entry((kind, request)).or_default().insert(end);
    }
    let mut missing = Vec::new();
    for row in IOCTLS {
        let ends = ends.remove(&(row.on, row.request)).unwrap_or_default();
        let mut lacks = |what: &str, is: bool| {
            if !is {
                missing.push(format!("{} {}: {what}", row.on, row.name()));
            }
        };
        match row.state {
            IoctlState::Works => {
                let vfio = NEEDS_VFIO.contains(&(row.on, row.request));
                lacks("a success", vfio || ends.contains(&Ok(())));
                let any = ANY_ARGUMENT.contains(&(row.on, row.request));
                lacks("a refusal", any || ends.iter().any(Result::is_err));
            }
            IoctlState::Refused(errno, _) => lacks("its refusal", ends.contains(&Err(errno))),
        }
    }
    assert!(missing.is_empty(), "no body has:\n{}", missing.join("\n"));
}
