//! The guest-physical address map and the port map of the built-in machine, in one place.
//!
//! RAM starts at 0 and leaves out the last gigabyte below 4 GiB, which holds the devices; what does not
//! fit below goes on above 4 GiB. The first megabyte follows the PC: boot structures low, the ACPI
//! tables in the BIOS area, where a kernel that is not told the address looks for them.

/// Where the hole for devices begins and ends.
pub const HOLE_START: u64 = 0xc000_0000;
pub const HOLE_END: u64 = 1 << 32;

/// Boot structures (Linux boot protocol, PVH).
pub const BOOT_GDT: u64 = 0x500;
pub const BOOT_STACK: u64 = 0x6ff0;
pub const ZERO_PAGE: u64 = 0x7000;
pub const PVH_START_INFO: u64 = 0x8000;
pub const PVH_MODULES: u64 = 0x8100;
pub const PVH_MEMORY_MAP: u64 = 0x8200;
/// A PML4, a page-directory-pointer table and four page directories: 4 GiB mapped one to one.
pub const BOOT_PML4: u64 = 0x9000;
pub const BOOT_PDPT: u64 = 0xa000;
pub const BOOT_PAGE_DIRECTORIES: u64 = 0xb000;
pub const COMMAND_LINE: u64 = 0x2_0000;
pub const COMMAND_LINE_MAX: usize = 0x1_0000;

/// End of the memory that a real-mode kernel or BIOS would call conventional.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Where a processor out of reset, and a kernel that reboots by way of the BIOS, begins.
pub const RESET_VECTOR: u64 = 0xf_fff0;
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Virtio-mmio windows, one page each, and their first GSI.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
pub const VIRTIO_FIRST_GSI: u32 = 5;
/// GSIs 5 to 23 of the one IOAPIC.
pub const VIRTIO_MAX: usize = 19;

/// A guest that writes here says that it has come up: the time is kept for `--stats`.
pub const BOOT_MARK: u64 = 0xd010_0000;

pub const IOAPIC: u32 = 0xfec0_0000;
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Pages that KVM wants to itself (KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_TSS_ADDR).
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
pub const TSS: usize = 0xfffb_d000;

/// COM1.
pub const SERIAL: u16 = 0x3f8;
pub const SERIAL_LENGTH: u16 = 8;
pub const SERIAL_GSI: u32 = 4;
/// The keyboard controller, of which only the reset line exists.
pub const I8042: u16 = 0x60;
pub const I8042_COMMAND: u16 = 0x64;
pub const I8042_RESET: u8 = 0xfe;
/// ACPI's sleep control and status registers (hardware-reduced ACPI).
pub const SLEEP_CONTROL: u16 = 0x600;
pub const SLEEP_STATUS: u16 = 0x601;
