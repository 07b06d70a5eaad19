//! Puts a kernel and its initrd into guest memory: a bzImage by the 64-bit Linux boot protocol
//! (Linux, Documentation/x86/boot.rst), an ELF vmlinux by PVH where it has that entry, else by the
//! 64-bit protocol too. What is wrong with a file is said before anything is loaded.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::error::BootError;
use super::layout;

/// Where and how the first processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Long mode, RSI = zero page.
    Linux64(u64),
    /// 32-bit protected mode, EBX = start info.
    Pvh(u64),
}

/// A kernel in guest memory.
pub struct Kernel {
    pub entry: Entry,
    /// The header that a bzImage brings along.
    pub header: Option<setup_header>,
    /// The last byte that an initrd may occupy.
    initrd_max: u64,
    /// First byte after all that the kernel uses before it looks at its memory map.
    end: u64,
}

#[cfg(test)]
impl Kernel {
    /// A kernel of which only the entry matters.
    pub fn for_tests(entry: Entry) -> Self {
        Self {
            entry,
            header: None,
            initrd_max: u64::MAX,
            end: layout::HIGH_MEMORY,
        }
    }
}

/// An initrd in guest memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Initrd {
    pub start: u64,
    pub size: u64,
}

/// bzImage: the kernel can be entered in long mode at offset 0x200.
const XLF_KERNEL_64: u16 = 1 << 0;
const ENTRY_64: u64 = 0x200;
const HEADER_START: usize = 0x1f1;
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
const BZIMAGE_MAGIC_AT: usize = 0x202;
/// First protocol version with a 64-bit entry and `init_size`.
const PROTOCOL_2_12: u16 = 0x20c;
const ELF_MAGIC: &[u8] = b"\x7fELF";
const ELF_CLASS_64: u8 = 2;
const EM_X86_64: u64 = 62;
const PT_LOAD: u64 = 1;

/// Loads the kernel in `path`.
pub fn load(memory: &GuestMemoryMmap<()>, path: &Path) -> Result<Kernel, BootError> {
    let bad = |reason: String| BootError::Kernel {
        path: path.to_owned(),
        reason,
    };
    let image = read_file(path).map_err(bad)?;
    if image.is_empty() {
        return Err(bad("the file is empty".to_owned()));
    }
    if image.starts_with(ELF_MAGIC) {
        load_elf(memory, &image).map_err(bad)
    } else if slice(&image, BZIMAGE_MAGIC_AT, 4) == Some(BZIMAGE_MAGIC) {
        load_bzimage(memory, &image).map_err(bad)
    } else if image.len() < BZIMAGE_MAGIC_AT + 4 {
        Err(bad(format!(
            "the file is truncated or no kernel: it has only {} bytes",
            image.len()
        )))
    } else {
        Err(bad("neither a bzImage nor an ELF file".to_owned()))
    }
}

/// Loads the initrd in `path` as high as the kernel can reach it.
pub fn load_initrd(
    memory: &GuestMemoryMmap<()>,
    path: &Path,
    kernel: &Kernel,
) -> Result<Initrd, BootError> {
    let bad = |reason: String| BootError::Initrd {
        path: path.to_owned(),
        reason,
    };
    let image = read_file(path).map_err(bad)?;
    if image.is_empty() {
        return Err(bad("the file is empty".to_owned()));
    }
    let size = image.len() as u64;
    let top = low_memory(memory).min(kernel.initrd_max.saturating_add(1));
    let start = top
        .checked_sub(size)
        .map(|start| start & !0xfff)
        .filter(|start| *start >= kernel.end)
        .ok_or_else(|| {
            bad(format!(
                "it does not fit: its {} KiB and the kernel's {} KiB need more than the {} MiB of memory \
                 they can lie in (--mem)",
                size.div_ceil(1024),
                kernel.end.div_ceil(1024),
                top >> 20
            ))
        })?;
    memory
        .write_slice(&image, GuestAddress(start))
        .map_err(|error| bad(error.to_string()))?;
    Ok(Initrd { start, size })
}

fn load_bzimage(memory: &GuestMemoryMmap<()>, image: &[u8]) -> Result<Kernel, String> {
    let truncated = || "the file is truncated in its header".to_owned();
    let half = |at| number(image, at, 2).ok_or_else(truncated);
    let word = |at| number(image, at, 4).ok_or_else(truncated);
    // Offsets as in the boot protocol's table of header fields.
    let setup_sectors = match image[HEADER_START] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let setup = (setup_sectors + 1) * 512;
    // `syssize` counts paragraphs, so up to 15 bytes of it need not be in the file.
    let whole = setup + word(0x1f4)? * 16;
    if (image.len() as u64) + 15 < whole {
        return Err(format!(
            "the file is truncated: it has {} bytes of {whole}",
            image.len()
        ));
    }
    let version = half(0x206)? as u16;
    if version < PROTOCOL_2_12 || half(0x236)? as u16 & XLF_KERNEL_64 == 0 {
        return Err("not a 64-bit kernel".to_owned());
    }
    let preferred = number(image, 0x258, 8).ok_or_else(truncated)?;
    let init_size = word(0x260)?;
    let needed = preferred
        .max(layout::HIGH_MEMORY)
        .saturating_add(init_size.max(image.len() as u64));
    enough_memory(memory, needed)?;

    let loaded = BzImage::load(
        memory,
        None,
        &mut Cursor::new(image),
        Some(GuestAddress(layout::HIGH_MEMORY)),
    )
    .map_err(|error| error.to_string())?;
    Ok(Kernel {
        entry: Entry::Linux64(loaded.kernel_load.0 + ENTRY_64),
        header: loaded.setup_header,
        initrd_max: loaded
            .setup_header
            .map_or(u64::MAX, |header| u64::from(header.initrd_addr_max)),
        end: needed,
    })
}

fn load_elf(memory: &GuestMemoryMmap<()>, image: &[u8]) -> Result<Kernel, String> {
    let truncated = || {
        format!(
            "the file is truncated: it ends after {} bytes, inside what its headers describe",
            image.len()
        )
    };
    let get = |at: u64, size| {
        usize::try_from(at)
            .ok()
            .and_then(|at| number(image, at, size))
            .ok_or_else(truncated)
    };
    if get(4, 1)? as u8 != ELF_CLASS_64 || get(18, 2)? != EM_X86_64 {
        return Err("not a 64-bit x86 ELF file".to_owned());
    }
    let (headers, header_size, count) = (get(32, 8)?, get(54, 2)?, get(56, 2)?);
    let mut needed = 0;
    for index in 0..count {
        let header = headers.saturating_add(index * header_size);
        let offset = get(header.saturating_add(8), 8)?;
        let file_size = get(header.saturating_add(32), 8)?;
        if offset.saturating_add(file_size) > image.len() as u64 {
            return Err(truncated());
        }
        if get(header, 4)? == PT_LOAD {
            let physical = get(header.saturating_add(24), 8)?;
            let memory_size = get(header.saturating_add(40), 8)?;
            if physical < layout::HIGH_MEMORY {
                return Err(format!(
                    "not a kernel: it wants to lie at {physical:#x}, below 1 MiB"
                ));
            }
            needed = needed.max(physical.saturating_add(memory_size.max(file_size)));
        }
    }
    if needed == 0 {
        return Err("not a kernel: nothing in it is to be loaded".to_owned());
    }
    enough_memory(memory, needed)?;

    let loaded = Elf::load(memory, None, &mut Cursor::new(image), None)
        .map_err(|error| error.to_string())?;
    let entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Entry::Pvh(entry.0),
        _ => Entry::Linux64(loaded.kernel_load.0),
    };
    Ok(Kernel {
        entry,
        header: None,
        initrd_max: u64::from(u32::MAX),
        end: needed,
    })
}

fn enough_memory(memory: &GuestMemoryMmap<()>, needed: u64) -> Result<(), String> {
    let have = low_memory(memory);
    if needed > have {
        return Err(format!(
            "it needs at least {} MiB of memory, and --mem gives {} MiB below the device hole",
            needed.div_ceil(1 << 20),
            have >> 20
        ));
    }
    Ok(())
}

/// RAM from 0 up to the device hole.
fn low_memory(memory: &GuestMemoryMmap<()>) -> u64 {
    memory
        .find_region(GuestAddress(0))
        .map_or(0, GuestMemoryRegion::len)
}

/// The whole of an ordinary file.
fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let metadata = fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("not an ordinary file".to_owned());
    }
    fs::read(path).map_err(|error| error.to_string())
}

fn slice(bytes: &[u8], at: usize, length: usize) -> Option<&[u8]> {
    bytes.get(at..at.checked_add(length)?)
}

/// A little-endian number of up to eight bytes.
fn number(bytes: &[u8], at: usize, size: usize) -> Option<u64> {
    let mut wide = [0; 8];
    wide.get_mut(..size)?
        .copy_from_slice(slice(bytes, at, size)?);
    Some(u64::from_le_bytes(wide))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::boot::memory::{MemorySize, allocate};

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str, bytes: &[u8]) -> Self {
            let path = std::env::temp_dir().join(format!("anykvm-{}-{name}", std::process::id()));
            fs::write(&path, bytes).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            fs::remove_file(&self.0).unwrap();
        }
    }

    fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// A bzImage with one setup sector and one sector of code, wanting 2 MiB from 16 MiB on.
    fn bzimage() -> Vec<u8> {
        let mut image = vec![0; 1024 + 512];
        image[HEADER_START] = 1;
        put(&mut image, 0x1f4, &32u32.to_le_bytes());
        put(&mut image, 0x1fe, &0xaa55u16.to_le_bytes());
        put(&mut image, 0x202, BZIMAGE_MAGIC);
        put(&mut image, 0x206, &0x20fu16.to_le_bytes());
        image[0x211] = 1;
        put(&mut image, 0x214, &0x10_0000u32.to_le_bytes());
        put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(&mut image, 0x236, &XLF_KERNEL_64.to_le_bytes());
        put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
        put(&mut image, 0x260, &0x20_0000u32.to_le_bytes());
        image[1024..].fill(0x90);
        image
    }

    /// An ELF file with one segment of eight bytes at 2 MiB and no PVH note.
    fn elf() -> Vec<u8> {
        let mut image = vec![0; 64 + 56 + 8];
        put(&mut image, 0, b"\x7fELF\x02\x01\x01");
        put(&mut image, 18, &62u16.to_le_bytes());
        put(&mut image, 24, &0x20_0000u64.to_le_bytes());
        put(&mut image, 32, &64u64.to_le_bytes());
        put(&mut image, 54, &56u16.to_le_bytes());
        put(&mut image, 56, &1u16.to_le_bytes());
        put(&mut image, 64, &1u32.to_le_bytes());
        put(&mut image, 64 + 8, &120u64.to_le_bytes());
        put(&mut image, 64 + 24, &0x20_0000u64.to_le_bytes());
        put(&mut image, 64 + 32, &8u64.to_le_bytes());
        put(&mut image, 64 + 40, &0x1000u64.to_le_bytes());
        image
    }

    fn load_bytes(name: &str, bytes: &[u8], mib: u64) -> Result<Kernel, String> {
        let file = Scratch::new(name, bytes);
        let memory = allocate(MemorySize(mib << 20)).unwrap();
        let result = load(&memory, &file.0).map_err(|error| error.to_string());
        assert_eq!(fs::read(&file.0).unwrap(), bytes, "the file is as it was");
        if let Err(message) = &result {
            assert!(message.contains(file.0.to_str().unwrap()), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
        result
    }

    #[test]
    fn a_bzimage_is_entered_in_long_mode() {
        let kernel = load_bytes("bzimage", &bzimage(), 64).unwrap();
        assert_eq!(kernel.entry, Entry::Linux64(0x10_0200));
        assert_eq!(kernel.end, 0x120_0000);
    }

    #[test]
    fn an_elf_without_pvh_is_entered_in_long_mode() {
        let kernel = load_bytes("elf", &elf(), 64).unwrap();
        assert_eq!(kernel.entry, Entry::Linux64(0x20_0000));
    }

    #[test]
    fn bad_kernels_are_refused_by_name() {
        let mut old = bzimage();
        put(&mut old, 0x206, &0x0204u16.to_le_bytes());
        let mut elf32 = elf();
        elf32[4] = 1;
        for (name, image, reason) in [
            ("empty", Vec::new(), "empty"),
            ("short", vec![0x7f], "truncated"),
            ("text", vec![b'x'; 4096], "neither"),
            ("cut", bzimage()[..1200].to_vec(), "truncated"),
            ("cut-header", bzimage()[..0x210].to_vec(), "truncated"),
            ("old", old, "64-bit"),
            ("elf-cut", elf()[..124].to_vec(), "truncated"),
            ("elf-cut-header", elf()[..80].to_vec(), "truncated"),
            ("elf-32", elf32, "64-bit"),
        ] {
            let message = load_bytes(name, &image, 64).err().expect(name);
            assert!(message.contains(reason), "{name}: {message}");
        }
    }

    #[test]
    fn too_little_memory_says_how_much_is_needed() {
        let message = load_bytes("big", &bzimage(), 8).err().unwrap();
        assert!(message.contains("at least 18 MiB"), "{message}");
    }

    #[test]
    fn a_missing_kernel_and_a_folder_are_refused() {
        let memory = allocate(MemorySize(8 << 20)).unwrap();
        for path in ["/nonexistent/vmlinuz", "/"] {
            let message = load(&memory, Path::new(path)).err().unwrap().to_string();
            assert!(message.contains(path), "{message}");
        }
    }

    #[test]
    fn the_initrd_lies_at_the_top_and_above_the_kernel() {
        let memory = allocate(MemorySize(32 << 20)).unwrap();
        let file = Scratch::new("kernel", &bzimage());
        let kernel = load(&memory, &file.0).unwrap();
        let initrd_file = Scratch::new("initrd", &[7; 5000]);
        let initrd = load_initrd(&memory, &initrd_file.0, &kernel).unwrap();
        assert_eq!(initrd.start, (32 << 20) - 0x2000);
        assert_eq!(initrd.size, 5000);
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(initrd.start)).unwrap(),
            7
        );

        let large = Scratch::new("large", &vec![0; 15 << 20]);
        let message = load_initrd(&memory, &large.0, &kernel)
            .err()
            .unwrap()
            .to_string();
        assert!(message.contains("does not fit"), "{message}");
    }
}
