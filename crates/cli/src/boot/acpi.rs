//! The ACPI tables of the built-in machine: hardware-reduced ACPI (ACPI 6.5, section 4.1), so there is
//! no legacy interrupt controller, timer or fixed-feature register to describe. Power-off is the sleep
//! control register, reset is the keyboard controller's reset line, and the devices are in the DSDT.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::layout;

const OEM: [u8; 6] = *b"ANYKVM";
const OEM_TABLE: [u8; 8] = *b"ANYKVMVM";
const OEM_REVISION: u32 = 1;

/// `SLP_TYP` of soft-off, the value in `\_S5`.
const SLEEP_TYPE_SOFT_OFF: u8 = 5;

/// FADT, IA-PC boot architecture flags: no VGA to probe, no CMOS clock. LEGACY_DEVICES and 8042 are
/// left clear: there is no keyboard to look for either.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_CMOS_RTC: u16 = 1 << 5;

/// Whether `value`, written to the sleep control register, asks for soft-off: SLP_EN (bit 5) with the
/// SLP_TYP (bits 4:2) of S5.
pub fn is_soft_off(value: u8) -> bool {
    const SLP_EN: u8 = 1 << 5;
    value & SLP_EN != 0 && (value >> 2) & 7 == SLEEP_TYPE_SOFT_OFF
}

/// All tables, to be put at `address`, the RSDP first.
pub fn tables(address: u64, cpus: u8, virtio_devices: usize) -> Vec<u8> {
    let mut image = vec![0; Rsdp::len()];
    let mut place = |table: &dyn Aml| {
        image.resize(image.len().next_multiple_of(16), 0);
        let at = address + image.len() as u64;
        table.to_aml_bytes(&mut image);
        at
    };

    let dsdt = place(&Bytes(dsdt(virtio_devices).as_slice()));
    let fadt = place(&fadt(dsdt));
    let madt = place(&madt(cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&xsdt);

    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    image[..rsdp.len()].copy_from_slice(&rsdp);
    image
}

/// A table that is already bytes.
struct Bytes<'a>(&'a [u8]);

impl Aml for Bytes<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
    }
}

fn port(address: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        address.into(),
    )
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS_RTC).into();
    fadt.reset_reg = port(layout::I8042_COMMAND);
    fadt.reset_value = layout::I8042_RESET;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM,
        OEM_TABLE,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LOCAL_APIC),
    );
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn dsdt(virtio_devices: usize) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    let mut code = Vec::new();

    let zero: u8 = 0;
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&SLEEP_TYPE_SOFT_OFF, &zero, &zero, &zero]),
    )
    .to_aml_bytes(&mut code);

    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &zero),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &IO::new(
                            layout::SERIAL,
                            layout::SERIAL,
                            1,
                            layout::SERIAL_LENGTH as u8,
                        ),
                        &Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut code);

    for index in 0..virtio_devices {
        let base = layout::VIRTIO_MMIO + index as u64 * layout::VIRTIO_MMIO_SIZE;
        Scope::new(
            Path::new("_SB_"),
            vec![&Device::new(
                Path::new(&format!("VR{index:02}")),
                vec![
                    &Name::new(Path::new("_HID"), &"LNRO0005"),
                    &Name::new(Path::new("_UID"), &(index as u8)),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![
                            &Memory32Fixed::new(true, base as u32, layout::VIRTIO_MMIO_SIZE as u32),
                            &Interrupt::new(
                                true,
                                true,
                                false,
                                false,
                                layout::VIRTIO_FIRST_GSI + index as u32,
                            ),
                        ]),
                    ),
                ],
            )],
        )
        .to_aml_bytes(&mut code);
    }
    dsdt.append_slice(&code);
    dsdt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at guest address `at`, its checksum verified.
    fn table(image: &[u8], at: u64) -> &[u8] {
        let start = (at - layout::ACPI_TABLES) as usize;
        let table = &image[start..start + u32_at(image, start + 4)];
        assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
        table
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp() {
        let image = tables(layout::ACPI_TABLES, 3, 2);
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!(sum(&image[..20]), 0);
        assert_eq!(sum(&image[..36]), 0);
        let xsdt = table(&image, u64_at(&image, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table(&image, u64_at(xsdt, 36));
        assert_eq!(&fadt[..4], b"FACP");
        let madt = table(&image, u64_at(xsdt, 44));
        assert_eq!(&madt[..4], b"APIC");
        let dsdt = table(&image, u64_at(fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert!(dsdt.windows(8).any(|window| window == b"LNRO0005"));
        assert!(dsdt.windows(4).any(|window| window == b"VR01"));
    }

    #[test]
    fn the_fadt_says_hardware_reduced_with_reset_and_sleep_registers() {
        let image = tables(layout::ACPI_TABLES, 1, 0);
        let xsdt = table(&image, u64_at(&image, 24));
        let fadt = table(&image, u64_at(xsdt, 36));
        let flags = u32_at(fadt, 112);
        assert_ne!(flags & (1 << 20), 0, "HW_REDUCED_ACPI");
        assert_ne!(flags & (1 << 10), 0, "RESET_REG_SUP");
        // RESET_REG: system I/O, 8 bits, port 0x64, and the value to write there
        assert_eq!(fadt[116..120], [1, 8, 0, 1]);
        assert_eq!(u64_at(fadt, 120), 0x64);
        assert_eq!(fadt[128], 0xfe);
        assert_eq!(u64_at(fadt, 244 + 4), u64::from(layout::SLEEP_CONTROL));
        assert_eq!(u64_at(fadt, 256 + 4), u64::from(layout::SLEEP_STATUS));
    }

    #[test]
    fn the_madt_lists_every_processor_and_the_ioapic() {
        let image = tables(layout::ACPI_TABLES, 2, 0);
        let xsdt = table(&image, u64_at(&image, 24));
        let madt = table(&image, u64_at(xsdt, 44));
        assert_eq!(madt.len(), 44 + 2 * 8 + 12);
        assert_eq!(madt[44..52], [0, 8, 0, 0, 1, 0, 0, 0]);
        assert_eq!(madt[52..60], [0, 8, 1, 1, 1, 0, 0, 0]);
        assert_eq!(madt[60..62], [1, 12]);
        assert_eq!(u32_at(madt, 64), layout::IOAPIC as usize);
    }

    #[test]
    fn tables_for_the_largest_machine_fit_the_bios_area() {
        let image = tables(layout::ACPI_TABLES, 254, layout::VIRTIO_MAX);
        assert!(layout::ACPI_TABLES + (image.len() as u64) < layout::HIGH_MEMORY);
    }

    #[test]
    fn only_soft_off_ends_the_machine() {
        assert!(is_soft_off(0x20 | 5 << 2));
        assert!(!is_soft_off(5 << 2));
        assert!(!is_soft_off(0x20 | 3 << 2));
    }
}
