//! GSI routing: which inputs or messages a global system interrupt is. KVM API document,
//! KVM_SET_GSI_ROUTING.

use std::collections::HashMap;

use anykvm_abi::{
    KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MSI_VALID_DEVID, RoutingTarget, kvm_irq_routing_entry, routing_target,
};

use crate::{Error, ioapic};

/// GSIs are below this (KVM_CAP_IRQ_ROUTING).
pub const MAX_IRQ_ROUTES: u32 = 4096;

/// PIC inputs; the default routing leads as many GSIs there.
pub(crate) const PIC_PINS: usize = 16;

/// Where a GSI leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// PIC input, 8-15 being the slave's.
    Pic(usize),
    Ioapic(usize),
    Msi {
        address: u64,
        data: u32,
    },
}

impl Route {
    /// Whether both may be targets of one GSI: different controllers, or nothing.
    fn goes_with(self, other: Self) -> bool {
        match (self, other) {
            (Self::Pic(a), Self::Pic(b)) => a / 8 != b / 8,
            (Self::Pic(_), Self::Ioapic(_)) | (Self::Ioapic(_), Self::Pic(_)) => true,
            _ => false,
        }
    }
}

/// The table as a whole.
#[derive(Debug, Default)]
pub(crate) struct RoutingTable {
    routes: HashMap<u32, Vec<Route>>,
    pic_gsi: [Option<u32>; PIC_PINS],
    ioapic_gsi: [Option<u32>; ioapic::PINS],
}

impl RoutingTable {
    /// GSIs 0-15 to the input of that number at both PIC and I/O APIC, the rest to the I/O APIC.
    pub fn default_routes() -> Self {
        let mut table = Self::default();
        for pin in 0..ioapic::PINS {
            table.insert(pin as u32, Route::Ioapic(pin));
            if pin < PIC_PINS {
                table.insert(pin as u32, Route::Pic(pin));
            }
        }
        table
    }

    /// From KVM_SET_GSI_ROUTING. `chips`: there are a PIC and an I/O APIC to route to. `ids_32bit`:
    /// MSI addresses have 32-bit destinations, whose low byte is not in the upper half.
    pub fn from_entries(
        entries: &[kvm_irq_routing_entry],
        chips: bool,
        ids_32bit: bool,
    ) -> Result<Self, Error> {
        if entries.len() > MAX_IRQ_ROUTES as usize {
            return Err(Error::Invalid);
        }
        let mut table = Self::default();
        for entry in entries {
            let flags = match entry.type_ {
                KVM_IRQ_ROUTING_MSI => KVM_MSI_VALID_DEVID,
                _ => 0,
            };
            if entry.gsi >= MAX_IRQ_ROUTES || entry.flags & !flags != 0 {
                return Err(Error::Invalid);
            }
            let route = Self::route(entry, chips, ids_32bit).ok_or(Error::Invalid)?;
            let present = table.routes.get(&entry.gsi);
            if present.is_some_and(|routes| !routes.iter().all(|r| r.goes_with(route))) {
                return Err(Error::Invalid);
            }
            table.insert(entry.gsi, route);
        }
        Ok(table)
    }

    fn route(entry: &kvm_irq_routing_entry, chips: bool, ids_32bit: bool) -> Option<Route> {
        match routing_target(entry)? {
            RoutingTarget::Irqchip(to) if chips => {
                let pin = to.pin as usize;
                match to.irqchip {
                    KVM_IRQCHIP_PIC_MASTER if pin < 8 => Some(Route::Pic(pin)),
                    KVM_IRQCHIP_PIC_SLAVE if pin < 8 => Some(Route::Pic(pin + 8)),
                    KVM_IRQCHIP_IOAPIC if pin < ioapic::PINS => Some(Route::Ioapic(pin)),
                    _ => None,
                }
            }
            RoutingTarget::Msi {
                address_lo,
                address_hi,
                data,
                ..
            } if msi_address_valid(address_hi, ids_32bit) => Some(Route::Msi {
                address: u64::from(address_hi) << 32 | u64::from(address_lo),
                data,
            }),
            _ => None,
        }
    }

    fn insert(&mut self, gsi: u32, route: Route) {
        self.routes.entry(gsi).or_default().push(route);
        match route {
            Route::Pic(pin) => self.pic_gsi[pin] = Some(gsi),
            Route::Ioapic(pin) => self.ioapic_gsi[pin] = Some(gsi),
            Route::Msi { .. } => {}
        }
    }

    /// Where a GSI leads.
    pub fn routes(&self, gsi: u32) -> &[Route] {
        self.routes.get(&gsi).map_or(&[], Vec::as_slice)
    }

    /// The GSI of a PIC input.
    pub fn pic_gsi(&self, pin: usize) -> Option<u32> {
        *self.pic_gsi.get(pin)?
    }

    /// The GSI of an I/O APIC input.
    pub fn ioapic_gsi(&self, pin: usize) -> Option<u32> {
        *self.ioapic_gsi.get(pin)?
    }

    /// The MSIs of the GSIs below `count`: the pins of user space's I/O APIC.
    pub fn msis_below(&self, count: u32) -> impl Iterator<Item = (u64, u32)> + '_ {
        let routes = self.routes.iter().filter(move |(gsi, _)| **gsi < count);
        routes
            .flat_map(|(_, routes)| routes)
            .filter_map(|route| match *route {
                Route::Msi { address, data } => Some((address, data)),
                _ => None,
            })
    }
}

/// With 32-bit ids the low byte of the upper half must be zero: the id's own low byte is in the lower.
pub(crate) fn msi_address_valid(address_hi: u32, ids_32bit: bool) -> bool {
    !ids_32bit || address_hi & 0xff == 0
}

#[cfg(test)]
mod tests {
    use anykvm_abi::{
        KVM_IRQ_ROUTING_IRQCHIP, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
        kvm_irq_routing_msi,
    };

    use super::*;

    fn chip(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
        kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            flags: 0,
            pad: 0,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                irqchip: kvm_irq_routing_irqchip { irqchip, pin },
            },
        }
    }

    fn msi(gsi: u32, address_hi: u32) -> kvm_irq_routing_entry {
        kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            flags: 0,
            pad: 0,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                msi: kvm_irq_routing_msi {
                    address_lo: 0xfee0_1000,
                    address_hi,
                    data: 0x31,
                    ..Default::default()
                },
            },
        }
    }

    #[test]
    fn default_routing_is_the_identity() {
        let table = RoutingTable::default_routes();
        assert_eq!(table.routes(0), [Route::Ioapic(0), Route::Pic(0)]);
        assert_eq!(table.routes(12), [Route::Ioapic(12), Route::Pic(12)]);
        assert_eq!(table.routes(16), [Route::Ioapic(16)]);
        assert_eq!(table.routes(24), []);
        assert_eq!(table.ioapic_gsi(23), Some(23));
        assert_eq!(table.pic_gsi(15), Some(15));
    }

    #[test]
    fn tables_are_accepted_or_refused_whole() {
        let bad_flag = kvm_irq_routing_entry {
            flags: 1,
            ..chip(0, KVM_IRQCHIP_IOAPIC, 0)
        };
        let devid = kvm_irq_routing_entry {
            flags: KVM_MSI_VALID_DEVID,
            ..msi(30, 0)
        };
        let unknown_type = kvm_irq_routing_entry {
            type_: 99,
            ..msi(30, 0)
        };
        type Case = (&'static str, Vec<kvm_irq_routing_entry>, bool, bool, bool);
        let cases: Vec<Case> = vec![
            ("empty", vec![], true, false, true),
            (
                "slave pin",
                vec![chip(9, KVM_IRQCHIP_PIC_SLAVE, 7)],
                true,
                false,
                true,
            ),
            (
                "pin 8 of a PIC",
                vec![chip(9, KVM_IRQCHIP_PIC_MASTER, 8)],
                true,
                false,
                false,
            ),
            (
                "pin 24",
                vec![chip(9, KVM_IRQCHIP_IOAPIC, 24)],
                true,
                false,
                false,
            ),
            ("unknown chip", vec![chip(9, 3, 0)], true, false, false),
            (
                "no chips (split)",
                vec![chip(9, KVM_IRQCHIP_IOAPIC, 1)],
                false,
                false,
                false,
            ),
            ("gsi too high", vec![msi(4096, 0)], true, false, false),
            ("last gsi", vec![msi(4095, 0)], true, false, true),
            ("flags", vec![bad_flag], true, false, false),
            ("devid flag", vec![devid], true, false, true),
            ("unknown type", vec![unknown_type], true, false, false),
            (
                "two MSIs on a GSI",
                vec![msi(5, 0), msi(5, 0)],
                true,
                false,
                false,
            ),
            (
                "MSI and pin on a GSI",
                vec![msi(5, 0), chip(5, KVM_IRQCHIP_IOAPIC, 5)],
                true,
                false,
                false,
            ),
            (
                "two pins of one chip",
                vec![
                    chip(5, KVM_IRQCHIP_IOAPIC, 5),
                    chip(5, KVM_IRQCHIP_IOAPIC, 6),
                ],
                true,
                false,
                false,
            ),
            (
                "PIC and I/O APIC",
                vec![
                    chip(0, KVM_IRQCHIP_PIC_MASTER, 0),
                    chip(0, KVM_IRQCHIP_IOAPIC, 2),
                ],
                true,
                false,
                true,
            ),
            (
                "extended destination",
                vec![msi(5, 0x100)],
                true,
                true,
                true,
            ),
            (
                "low byte in the high half",
                vec![msi(5, 0x101)],
                true,
                true,
                false,
            ),
        ];
        for (name, entries, chips, ids_32bit, accepted) in cases {
            let table = RoutingTable::from_entries(&entries, chips, ids_32bit);
            assert_eq!(table.is_ok(), accepted, "{name}");
        }
    }

    #[test]
    fn reverse_map_follows_the_table() {
        let entries = [chip(0, KVM_IRQCHIP_IOAPIC, 2), msi(7, 0), msi(30, 0)];
        let table = RoutingTable::from_entries(&entries, true, false).unwrap();
        assert_eq!(table.ioapic_gsi(2), Some(0));
        assert_eq!(table.ioapic_gsi(0), None);
        assert_eq!(
            table.msis_below(24).collect::<Vec<_>>(),
            [(0xfee0_1000, 0x31)]
        );
    }
}
