//! Guest RAM: one mapping below the device hole and one above 4 GiB, registered with the VM.

use std::str::FromStr;

use anykvm::VmFd;
use anykvm_abi::kvm_userspace_memory_region;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::error::BootError;
use super::layout;

/// An amount of memory on the command line: a number of MiB, or a number with K, M or G.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize(pub u64);

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, shift) = match text.as_bytes().last() {
            Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
            Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
            Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
            _ => (text, 20),
        };
        digits
            .parse::<u64>()
            .ok()
            .and_then(|count| count.checked_mul(1 << shift))
            .map(Self)
            .ok_or_else(|| "a size such as 512M or 2G is expected".to_owned())
    }
}

/// The parts of guest-physical space that are RAM.
pub fn ranges(size: u64) -> Vec<(GuestAddress, usize)> {
    let low = size.min(layout::HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(layout::HOLE_END), (size - low) as usize));
    }
    ranges
}

/// Reserves the memory; the host gives pages as they are touched.
pub fn allocate(size: MemorySize) -> Result<GuestMemoryMmap<()>, BootError> {
    const PAGE: u64 = 4096;
    if size.0 < 2 * layout::HIGH_MEMORY {
        return Err(BootError::Memory(format!(
            "{} KiB is too little for any kernel",
            size.0 >> 10
        )));
    }
    if !size.0.is_multiple_of(PAGE) {
        return Err(BootError::Memory("not a multiple of 4 KiB".to_owned()));
    }
    GuestMemoryMmap::from_ranges(&ranges(size.0)).map_err(|error| {
        BootError::Memory(format!(
            "cannot reserve {} MiB on this host: {error}",
            size.0 >> 20
        ))
    })
}

/// Makes the memory the VM's, one slot for each range.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap<()>) -> Result<(), BootError> {
    for (slot, region) in memory.iter().enumerate() {
        let host = memory
            .get_host_address(region.start_addr())
            .expect("a region has a host address");
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        set_memory_region(vm, slot).map_err(BootError::host("cannot register guest memory"))?;
    }
    Ok(())
}

#[allow(unsafe_code)]
fn set_memory_region(vm: &VmFd, region: kvm_userspace_memory_region) -> Result<(), anykvm::Error> {
    // SAFETY: the region is a mapping of `GuestMemoryMmap`, which is held by `Machine` until every
    // vCPU has stopped and the VM is gone, and is only ever touched through volatile accesses.
    unsafe { vm.set_user_memory_region(region) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_mebibytes_unless_they_say_otherwise() {
        assert_eq!("512".parse(), Ok(MemorySize(512 << 20)));
        assert_eq!("64M".parse(), Ok(MemorySize(64 << 20)));
        assert_eq!("2G".parse(), Ok(MemorySize(2 << 30)));
        assert_eq!("4096k".parse(), Ok(MemorySize(4 << 20)));
        for wrong in [
            "",
            "M",
            "-1",
            "1T",
            "99999999999999999999",
            "99999999999999G",
        ] {
            assert!(wrong.parse::<MemorySize>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn memory_leaves_out_the_hole() {
        assert_eq!(ranges(1 << 30), [(GuestAddress(0), 1 << 30)]);
        assert_eq!(
            ranges(4 << 30),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 30)]
        );
    }

    #[test]
    fn silly_sizes_are_refused() {
        assert!(allocate(MemorySize(1 << 20)).is_err());
        assert!(allocate(MemorySize((64 << 20) + 1)).is_err());
        assert!(allocate(MemorySize(1 << 60)).is_err());
    }
}
