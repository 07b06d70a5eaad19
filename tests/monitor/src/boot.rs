//! A kernel in the guest's memory, and what its entry is told: Linux, Documentation/arch/x86/boot.rst (64-bit boot
//! protocol); Xen, docs/misc/pvh.pandoc.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result};
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{Elf, KernelLoader, load_cmdline};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::{Entry, acpi};

pub const ZERO_PAGE: u64 = 0x7000;
pub const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x6100;
const COMMAND_LINE: u64 = 0x2_0000;
const LOW_MEMORY_END: u64 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;
const E820_RAM: u32 = 1;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const START_INFO_MAGIC: u32 = 0x336e_c578;

#[derive(clap::Args)]
pub struct Guest {
    /// An ELF kernel
    #[arg(long)]
    kernel: PathBuf,
    #[arg(long)]
    initrd: PathBuf,
    #[arg(long)]
    command_line: String,
    #[arg(long, default_value = "linux")]
    pub entry: Entry,
    #[arg(long, default_value_t = 2)]
    pub cpus: u8,
    /// Memory in MiB
    #[arg(long, default_value_t = 256)]
    pub memory: usize,
}

/// Fills the memory; the address at which the kernel is entered.
pub fn load(memory: &GuestMemoryMmap, guest: &Guest) -> Result<GuestAddress> {
    let mut kernel = File::open(&guest.kernel).context("the kernel")?;
    let loaded = Elf::load(memory, None, &mut kernel, Some(GuestAddress(HIGH_MEMORY)))?;
    let initrd = fs::read(&guest.initrd).context("the initrd")?;
    let end = memory.last_addr().raw_value() + 1;
    let initrd_at = (end - initrd.len() as u64) & !0xfff;
    memory.write_slice(&initrd, GuestAddress(initrd_at))?;
    let mut line = Cmdline::new(2048)?;
    line.insert_str(&guest.command_line)?;
    load_cmdline(memory, GuestAddress(COMMAND_LINE), &line)?;
    acpi::write(memory, guest.cpus)?;
    let ram = [(0, LOW_MEMORY_END), (HIGH_MEMORY, end - HIGH_MEMORY)];
    match guest.entry {
        Entry::Linux => {
            zero_page(memory, &ram, initrd_at, initrd.len(), &guest.command_line)?;
            Ok(loaded.kernel_load)
        }
        Entry::Pvh => {
            start_info(memory, &ram, initrd_at, initrd.len())?;
            match loaded.pvh_boot_cap {
                PvhBootCapability::PvhEntryPresent(entry) => Ok(entry),
                _ => anyhow::bail!("the kernel has no PVH entry"),
            }
        }
    }
}

fn zero_page(
    memory: &GuestMemoryMmap,
    ram: &[(u64, u64)],
    initrd_at: u64,
    initrd_size: usize,
    line: &str,
) -> Result<()> {
    let mut page = boot_params::default();
    page.hdr.boot_flag = BOOT_FLAG;
    page.hdr.header = HEADER_MAGIC;
    page.hdr.type_of_loader = 0xff;
    page.hdr.kernel_alignment = 0x100_0000;
    page.hdr.cmd_line_ptr = u32::try_from(COMMAND_LINE)?;
    page.hdr.cmdline_size = u32::try_from(line.len() + 1)?;
    page.hdr.ramdisk_image = u32::try_from(initrd_at)?;
    page.hdr.ramdisk_size = u32::try_from(initrd_size)?;
    for (entry, &(addr, size)) in page.e820_table.iter_mut().zip(ram) {
        *entry = boot_e820_entry {
            addr,
            size,
            r#type: E820_RAM,
        };
    }
    page.acpi_rsdp_addr = acpi::START;
    page.e820_entries = u8::try_from(ram.len())?;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&page, GuestAddress(ZERO_PAGE)),
        memory,
    )?;
    Ok(())
}

fn start_info(
    memory: &GuestMemoryMmap,
    ram: &[(u64, u64)],
    initrd_at: u64,
    initrd_size: usize,
) -> Result<()> {
    let map: Vec<_> = ram
        .iter()
        .map(|&(addr, size)| hvm_memmap_table_entry {
            addr,
            size,
            type_: E820_RAM,
            reserved: 0,
        })
        .collect();
    let module = hvm_modlist_entry {
        paddr: initrd_at,
        size: initrd_size as u64,
        ..Default::default()
    };
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        nr_modules: 1,
        rsdp_paddr: acpi::START,
        modlist_paddr: MODULES,
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len())?,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    params.set_modules(&[module], GuestAddress(MODULES));
    PvhBootConfigurator::write_bootparams(&params, memory)?;
    Ok(())
}
