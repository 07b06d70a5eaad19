//! Where things lie in the guest's physical memory.

/// The main RAM slot, at 0.
pub const RAM_SIZE: u64 = 0x4_0000;
/// A slot whose stores are MMIO.
pub const ROM: u64 = 0x6_0000;
pub const ROM_SIZE: u64 = 0x4000;
/// The last page below 4 GiB.
pub const TOP: u64 = 0xffff_f000;
pub const TOP_SIZE: u64 = 0x1000;
/// A slot above 4 GiB, with a log of dirty pages.
pub const HIGH: u64 = 0x1_0000_0000;
pub const HIGH_SIZE: u64 = 0x2000;

/// The code that runs first.
pub const CODE: u64 = 0x1000;
pub const CODE_SIZE: u64 = 0x1000;
/// Descriptor tables and task-state segments; inputs change any 8 bytes of them.
pub const GDT: u64 = 0x2000;
pub const LDT: u64 = 0x2800;
pub const IDT: u64 = 0x3000;
pub const TSS: u64 = 0x4000;
pub const OTHER_TSS: u64 = 0x6200;
pub const SYSTEM_END: u64 = 0x6400;
/// Stacks grow down from here.
pub const STACK0: u64 = 0x8000;
pub const STACK3: u64 = 0x9000;
/// 16 bytes for each vector.
pub const HANDLERS: u64 = 0xa000;
/// Page tables, of every mode; see `setup`.
pub const TABLES: u64 = 0x1_0000;
pub const TABLE_PAGES: u64 = 16;
/// SMBASE at reset, and where system-management code begins.
pub const SMM_ENTRY: u64 = 0x3_8000;

/// Selectors.
pub const CODE0: u16 = 0x08;
pub const DATA0: u16 = 0x10;
pub const CODE3: u16 = 0x1b;
pub const DATA3: u16 = 0x23;
pub const TSS_SELECTOR: u16 = 0x28;
pub const OTHER_CODE: u16 = 0x38;
pub const CODE16: u16 = 0x40;
pub const DATA16: u16 = 0x48;
pub const LDT_SELECTOR: u16 = 0x50;
pub const CALL_GATE: u16 = 0x60;
pub const TASK_GATE: u16 = 0x70;
pub const OTHER_TSS_SELECTOR: u16 = 0x78;
