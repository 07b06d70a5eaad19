//! Where state components lie in the standard format of the XSAVE area (SDM Vol. 1, 13.4.3): behind the
//! header each processor model has them where CPUID leaf 0xD says. Here that is where the *host* has them,
//! as in KVM. Monitors depend on it: QEMU takes the places from the CPUID instruction, not from
//! KVM_GET_SUPPORTED_CPUID, and shows those to the guest.

use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use crate::state::XsaveArea;

/// One state component behind the header.
#[derive(Clone, Copy, Debug)]
pub struct Component {
    /// Its bit in XCR0.
    pub bit: u32,
    /// Bytes from the start of the area.
    pub offset: usize,
    /// Bytes from the start of [`XsaveArea`], which holds the registers.
    pub register: usize,
    /// Bytes.
    pub size: usize,
    /// Whether the host has it; if not, its place is Intel's, which is [`XsaveArea`]'s too.
    pub of_host: bool,
}

/// The components that there are: bit, place in [`XsaveArea`], size (SDM Vol. 1, 13.5).
const COMPONENTS: [(u32, usize, usize); 5] = [
    (2, XsaveArea::YMM_HI, 256),
    (5, XsaveArea::OPMASK, 64),
    (6, XsaveArea::ZMM_HI, 512),
    (7, XsaveArea::HI16_ZMM, 1024),
    (9, XsaveArea::PKRU, 8),
];

/// All components, in the order of their bits.
pub fn components() -> &'static [Component; COMPONENTS.len()] {
    static LIST: OnceLock<[Component; COMPONENTS.len()]> = OnceLock::new();
    LIST.get_or_init(|| {
        COMPONENTS.map(|(bit, register, size)| {
            let host = on_host(bit).filter(|(host_size, _)| *host_size == size);
            Component {
                bit,
                offset: host.map_or(register, |(_, offset)| offset),
                register,
                size,
                of_host: host.is_some(),
            }
        })
    })
}

/// Size and place of a component on the host.
fn on_host(bit: u32) -> Option<(usize, usize)> {
    if __cpuid_count(0, 0).eax < 0xd {
        return None;
    }
    let leaf = __cpuid_count(0xd, bit);
    (leaf.eax != 0).then_some((leaf.eax as usize, leaf.ebx as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_do_not_overlap() {
        let mut places: Vec<_> = components().iter().map(|c| (c.offset, c.size)).collect();
        places.sort_unstable();
        assert!(places[0].0 >= 576);
        for pair in places.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{places:?}");
        }
    }
}
