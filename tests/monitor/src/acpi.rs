//! The processors, the I/O APIC and the serial port, as ACPI has them told to a machine with reduced hardware.

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, Path, ResourceTemplate, Scope};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use anyhow::Result;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::devices::{COM1, SERIAL_LINE};
use crate::ioapic;

/// Where the tables are, the RSDP first.
pub const START: u64 = 0xe_0000;
const LOCAL_APIC: u32 = 0xfee0_0000;
const OEM: [u8; 6] = *b"ANYKVM";
const TABLE: [u8; 8] = *b"MONITOR ";

pub fn write(memory: &GuestMemoryMmap, cpus: u8) -> Result<()> {
    let mut image = vec![0; Rsdp::len()];
    let mut place = |table: &dyn Aml| {
        image.resize(image.len().next_multiple_of(16), 0);
        let at = START + image.len() as u64;
        table.to_aml_bytes(&mut image);
        at
    };
    let dsdt = place(&Raw(dsdt()));
    let fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Headless);
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(place(&fadt.finalize()));
    xsdt.add_entry(place(&madt(cpus)));
    let xsdt = place(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    image[..rsdp.len()].copy_from_slice(&rsdp);
    Ok(memory.write_slice(&image, GuestAddress(START))?)
}

/// A table that is bytes already.
struct Raw(Sdt);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, ioapic::BASE as u32, 0));
    madt
}

fn dsdt() -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, 1);
    let mut code = Vec::new();
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &0_u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &IO::new(COM1, COM1, 1, 8),
                        &Interrupt::new(true, true, false, false, SERIAL_LINE),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut code);
    dsdt.append_slice(&code);
    dsdt
}
