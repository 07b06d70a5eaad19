//! Safe reading of the unions in `kvm.h` that carry interrupt-controller state. Every member of
//! these unions is plain integers, so every bit pattern is a value of every member; which member is
//! meant is told by a tag beside the union, and an enum here carries both.

use kvm_bindings::{
    KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI,
    KVM_IRQ_ROUTING_XEN_EVTCHN, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_ioapic_state, kvm_irq_routing_entry, kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi, kvm_irq_routing_xen_evtchn, kvm_irqchip, kvm_pic_state,
};

/// `kvm_irqchip` by its `chip_id`.
#[derive(Clone, Copy)]
pub enum IrqchipState {
    /// `KVM_IRQCHIP_PIC_MASTER`.
    PicMaster(kvm_pic_state),
    /// `KVM_IRQCHIP_PIC_SLAVE`.
    PicSlave(kvm_pic_state),
    /// `KVM_IRQCHIP_IOAPIC`.
    Ioapic(kvm_ioapic_state),
}

/// The member of `kvm_irqchip` its `chip_id` names; `None` for an unknown chip.
pub fn irqchip_state(chip: &kvm_irqchip) -> Option<IrqchipState> {
    // SAFETY: the union's members are arrays and structs of integers only.
    let (pic, ioapic) = unsafe { (chip.chip.pic, chip.chip.ioapic) };
    match chip.chip_id {
        KVM_IRQCHIP_PIC_MASTER => Some(IrqchipState::PicMaster(pic)),
        KVM_IRQCHIP_PIC_SLAVE => Some(IrqchipState::PicSlave(pic)),
        KVM_IRQCHIP_IOAPIC => Some(IrqchipState::Ioapic(ioapic)),
        _ => None,
    }
}

/// The redirection table of a `kvm_ioapic_state` as the 64-bit entries the hardware has.
pub fn ioapic_redirtbl(state: &kvm_ioapic_state) -> [u64; 24] {
    // SAFETY: the union's members are a u64 and a bit field over the same eight bytes.
    state.redirtbl.map(|entry| unsafe { entry.bits })
}

/// Where a `kvm_irq_routing_entry` leads, by its `type`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RoutingTarget {
    /// `KVM_IRQ_ROUTING_IRQCHIP`.
    Irqchip(kvm_irq_routing_irqchip),
    /// `KVM_IRQ_ROUTING_MSI`.
    Msi {
        /// Message address, low half.
        address_lo: u32,
        /// Message address, high half.
        address_hi: u32,
        /// Message data.
        data: u32,
        /// `devid`, meaningful with `KVM_MSI_VALID_DEVID`.
        devid: u32,
    },
    /// `KVM_IRQ_ROUTING_HV_SINT`.
    HvSint(kvm_irq_routing_hv_sint),
    /// `KVM_IRQ_ROUTING_XEN_EVTCHN`.
    XenEvtchn(kvm_irq_routing_xen_evtchn),
}

/// The member of `kvm_irq_routing_entry` its `type` names; `None` for a type x86 does not have.
pub fn routing_target(entry: &kvm_irq_routing_entry) -> Option<RoutingTarget> {
    // SAFETY: the union's members are structs of integers only, no larger than `pad`.
    let (irqchip, msi, hv_sint, xen): (
        kvm_irq_routing_irqchip,
        kvm_irq_routing_msi,
        kvm_irq_routing_hv_sint,
        kvm_irq_routing_xen_evtchn,
    ) = unsafe {
        (
            entry.u.irqchip,
            entry.u.msi,
            entry.u.hv_sint,
            entry.u.xen_evtchn,
        )
    };
    match entry.type_ {
        KVM_IRQ_ROUTING_IRQCHIP => Some(RoutingTarget::Irqchip(irqchip)),
        KVM_IRQ_ROUTING_MSI => Some(RoutingTarget::Msi {
            address_lo: msi.address_lo,
            address_hi: msi.address_hi,
            data: msi.data,
            // SAFETY: both members are one u32.
            devid: unsafe { msi.__bindgen_anon_1.devid },
        }),
        KVM_IRQ_ROUTING_HV_SINT => Some(RoutingTarget::HvSint(hv_sint)),
        KVM_IRQ_ROUTING_XEN_EVTCHN => Some(RoutingTarget::XenEvtchn(xen)),
        _ => None,
    }
}
