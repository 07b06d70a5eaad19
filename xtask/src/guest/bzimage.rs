//! Takes the ELF kernel out of a bzImage (Linux, Documentation/x86/boot.rst: payload_offset and
//! payload_length), for the tests that start a vmlinux. Debian's cloud kernel is packed with LZ4 in its
//! legacy framing: a magic number, then blocks of at most 8 MiB, each after its packed size.

use anyhow::{Context, Result, bail};

const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;
const BLOCK: usize = 8 << 20;

/// The ELF file inside `image`.
pub fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    if image.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(b"HdrS") {
        bail!("not a bzImage");
    }
    let setup_sectors = match image[SETUP_SECTS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + word(image, PAYLOAD_OFFSET)? as usize;
    let length = word(image, PAYLOAD_LENGTH)? as usize;
    let payload = image
        .get(start..start.saturating_add(length))
        .context("the bzImage is truncated")?;
    if word(payload, 0)? != LZ4_LEGACY_MAGIC {
        bail!("the kernel is packed with something other than LZ4");
    }
    // The last word of the payload is the unpacked size.
    let size = word(payload, payload.len().saturating_sub(4))? as usize;
    let mut elf = Vec::with_capacity(size);
    let mut at = 4;
    while elf.len() < size {
        let packed = word(payload, at)? as usize;
        at += 4;
        let block = payload
            .get(at..at.saturating_add(packed))
            .context("the LZ4 stream is truncated")?;
        at += packed;
        let room = BLOCK.min(size - elf.len());
        elf.extend(lz4_flex::block::decompress(block, room).context("the LZ4 stream is damaged")?);
    }
    if !elf.starts_with(b"\x7fELF") {
        bail!("the payload of the bzImage is no ELF file");
    }
    Ok(elf)
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let bytes = bytes.get(at..at + 4).context("the bzImage is truncated")?;
    Ok(u32::from_le_bytes(bytes.try_into()?))
}
