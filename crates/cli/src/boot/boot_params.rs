//! What the kernel is told at its entry: the zero page of the Linux boot protocol, or PVH's start
//! info (Xen, include/public/arch-x86/hvm/start_info.h), both with the command line, the memory map
//! and the address of the ACPI tables.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::BootError;
use super::kernel::{Entry, Initrd, Kernel};
use super::{layout, memory};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const DEFAULT_ALIGNMENT: u32 = 0x100_0000;
const PVH_MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const PVH_VERSION: u32 = 1;

/// Writes the command line and the structure that the kernel's entry expects.
pub fn write(
    guest: &GuestMemoryMmap<()>,
    memory_size: u64,
    kernel: &Kernel,
    initrd: Option<Initrd>,
    command_line: &str,
) -> Result<(), BootError> {
    write_command_line(guest, command_line)?;
    let map = memory_map(memory_size);
    let failed = |error: linux_loader::configurator::Error| BootError::Memory(error.to_string());
    match kernel.entry {
        Entry::Linux64(_) => {
            let page = zero_page(kernel, initrd, command_line, &map);
            LinuxBootConfigurator::write_bootparams(
                &BootParams::new(&page, GuestAddress(layout::ZERO_PAGE)),
                guest,
            )
            .map_err(failed)
        }
        Entry::Pvh(_) => {
            let (info, modules, map) = start_info(initrd, &map);
            let mut params = BootParams::new(&info, GuestAddress(layout::PVH_START_INFO));
            params.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
            params.set_modules(&modules, GuestAddress(layout::PVH_MODULES));
            PvhBootConfigurator::write_bootparams(&params, guest).map_err(failed)
        }
    }
}

fn write_command_line(guest: &GuestMemoryMmap<()>, line: &str) -> Result<(), BootError> {
    if line.len() >= layout::COMMAND_LINE_MAX {
        return Err(BootError::CommandLine("it is too long".to_owned()));
    }
    if line.contains('\0') {
        return Err(BootError::CommandLine("it contains a NUL".to_owned()));
    }
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    guest
        .write_slice(&bytes, GuestAddress(layout::COMMAND_LINE))
        .map_err(|error| BootError::CommandLine(error.to_string()))
}

/// The guest-physical map: start, size, type.
fn memory_map(memory_size: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_MEMORY_END, E820_RAM),
        (
            layout::ACPI_TABLES,
            layout::HIGH_MEMORY - layout::ACPI_TABLES,
            E820_RESERVED,
        ),
    ];
    for (start, size) in memory::ranges(memory_size) {
        let start = start.0.max(layout::HIGH_MEMORY);
        let end = if start < layout::HOLE_END {
            size as u64
        } else {
            start + size as u64
        };
        map.push((start, end - start, E820_RAM));
    }
    map
}

fn zero_page(
    kernel: &Kernel,
    initrd: Option<Initrd>,
    command_line: &str,
    map: &[(u64, u64, u32)],
) -> boot_params {
    let mut page = boot_params::default();
    match kernel.header {
        Some(header) => page.hdr = header,
        None => {
            page.hdr.boot_flag = BOOT_FLAG;
            page.hdr.header = HEADER_MAGIC;
            page.hdr.kernel_alignment = DEFAULT_ALIGNMENT;
        }
    }
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    page.hdr.cmdline_size = command_line.len() as u32 + 1;
    if let Some(initrd) = initrd {
        page.hdr.ramdisk_image = initrd.start as u32;
        page.hdr.ramdisk_size = initrd.size as u32;
    }
    page.acpi_rsdp_addr = layout::ACPI_TABLES;
    for (entry, &(addr, size, r#type)) in page.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr, size, r#type };
    }
    page.e820_entries = map.len() as u8;
    page
}

fn start_info(
    initrd: Option<Initrd>,
    map: &[(u64, u64, u32)],
) -> (
    hvm_start_info,
    Vec<hvm_modlist_entry>,
    Vec<hvm_memmap_table_entry>,
) {
    let modules: Vec<_> = initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.size,
            ..Default::default()
        })
        .collect();
    let map: Vec<_> = map
        .iter()
        .map(|&(addr, size, type_)| hvm_memmap_table_entry {
            addr,
            size,
            type_,
            reserved: 0,
        })
        .collect();
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        version: PVH_VERSION,
        nr_modules: modules.len() as u32,
        modlist_paddr: layout::PVH_MODULES,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::ACPI_TABLES,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    (info, modules, map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_leaves_out_the_bios_area_and_the_hole() {
        assert_eq!(
            memory_map(4 << 30),
            [
                (0, 0x9fc00, E820_RAM),
                (0xe0000, 0x20000, E820_RESERVED),
                (0x10_0000, (3 << 30) - 0x10_0000, E820_RAM),
                (4 << 30, 1 << 30, E820_RAM),
            ]
        );
        assert_eq!(
            memory_map(64 << 20).last(),
            Some(&(0x10_0000, 63 << 20, E820_RAM))
        );
    }

    fn guest() -> GuestMemoryMmap<()> {
        memory::allocate(memory::MemorySize(8 << 20)).unwrap()
    }

    fn kernel(entry: Entry) -> Kernel {
        Kernel::for_tests(entry)
    }

    #[test]
    fn the_zero_page_has_the_fields_of_the_boot_protocol() {
        let guest = guest();
        let initrd = Initrd {
            start: 0x40_0000,
            size: 0x1234,
        };
        write(
            &guest,
            8 << 20,
            &kernel(Entry::Linux64(0x10_0200)),
            Some(initrd),
            "console=ttyS0",
        )
        .unwrap();
        let word = |at| -> u32 {
            guest
                .read_obj(GuestAddress(layout::ZERO_PAGE + at))
                .unwrap()
        };
        assert_eq!(word(0x202), HEADER_MAGIC);
        assert_eq!(word(0x210) as u8, 0xff);
        assert_eq!(word(0x218), 0x40_0000);
        assert_eq!(word(0x21c), 0x1234);
        assert_eq!(word(0x228), layout::COMMAND_LINE as u32);
        assert_eq!(word(0x70), layout::ACPI_TABLES as u32);
        assert_eq!(word(0x1e8) as u8, 3);
        assert_eq!(word(0x2d0 + 8), 0x9fc00);
        let mut line = [0; 14];
        guest
            .read_slice(&mut line, GuestAddress(layout::COMMAND_LINE))
            .unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
    }

    #[test]
    fn the_start_info_points_to_the_map_and_the_initrd() {
        let guest = guest();
        let initrd = Initrd {
            start: 0x40_0000,
            size: 0x1234,
        };
        write(
            &guest,
            8 << 20,
            &kernel(Entry::Pvh(0x100_0000)),
            Some(initrd),
            "x",
        )
        .unwrap();
        let info: hvm_start_info = guest
            .read_obj(GuestAddress(layout::PVH_START_INFO))
            .unwrap();
        assert_eq!(info.magic, PVH_MAGIC);
        assert_eq!((info.nr_modules, info.memmap_entries), (1, 3));
        let module: hvm_modlist_entry = guest.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0x40_0000, 0x1234));
        let ram: hvm_memmap_table_entry = guest
            .read_obj(GuestAddress(info.memmap_paddr + 48))
            .unwrap();
        assert_eq!((ram.addr, ram.type_), (0x10_0000, E820_RAM));
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_refused() {
        let guest = guest();
        let kernel = kernel(Entry::Linux64(0));
        let long = "x".repeat(layout::COMMAND_LINE_MAX);
        assert!(write(&guest, 8 << 20, &kernel, None, &long).is_err());
        assert!(write(&guest, 8 << 20, &kernel, None, "a\0b").is_err());
    }
}
