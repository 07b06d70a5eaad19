//! Virtio devices on memory-mapped windows (virtio 1.2, sections 4.2 and 5.2).

pub mod block;
pub mod mmio;
