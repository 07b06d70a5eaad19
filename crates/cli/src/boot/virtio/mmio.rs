//! The memory-mapped transport (virtio 1.2, section 4.2), its modern version, with one queue.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::super::interrupt::InterruptLine;
use super::block::Block;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"akvm");
const QUEUE_SIZE: u16 = 256;
const NO_SHARED_MEMORY: u32 = u32::MAX;

/// A block device behind its window.
pub struct Transport {
    block: Block,
    memory: Arc<GuestMemoryMmap<()>>,
    line: InterruptLine,
    /// Signalled when the guest writes QueueNotify.
    bell: EventFd,
    interrupt_status: AtomicU32,
    state: Mutex<State>,
}

struct State {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queue: Queue,
}

impl Transport {
    pub fn new(
        block: Block,
        memory: Arc<GuestMemoryMmap<()>>,
        line: InterruptLine,
        bell: EventFd,
    ) -> Self {
        Self {
            block,
            memory,
            line,
            bell,
            interrupt_status: AtomicU32::new(0),
            state: Mutex::new(State {
                status: 0,
                device_features_select: 0,
                driver_features_select: 0,
                driver_features: 0,
                queue_select: 0,
                queue: Queue::new(QUEUE_SIZE).expect("the queue size is a power of two"),
            }),
        }
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | self.block.features()
    }

    /// The device's own thread: serves the queue whenever the guest has rung its bell.
    pub fn serve_bell(&self) {
        while self.bell.read().is_ok() {
            self.serve();
        }
    }

    fn serve(&self) {
        let mut state = self.lock();
        if state.status & VIRTIO_CONFIG_S_DRIVER_OK == 0 || !state.queue.ready() {
            return;
        }
        // A queue that the guest has broken is left to it: the driver's time-out will tell.
        if let Ok(true) = self.block.serve(&self.memory, &mut state.queue) {
            self.interrupt_status
                .fetch_or(VIRTIO_MMIO_INT_VRING, Ordering::SeqCst);
            let _ = self.line.raise();
        }
    }

    /// The guest reads `data.len()` bytes at `offset` in the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= u64::from(VIRTIO_MMIO_CONFIG) {
            let config = self.block.config();
            let at = (offset - u64::from(VIRTIO_MMIO_CONFIG)) as usize;
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = config.get(at.saturating_add(index)).copied().unwrap_or(0);
            }
        } else if data.len() == 4 {
            data.copy_from_slice(&self.read_register(offset as u32).to_le_bytes());
        }
    }

    /// The guest writes at `offset`. Everything but 32-bit writes to registers is ignored.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), Ok(bytes)) = (u32::try_from(offset), data.try_into()) {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        let state = self.lock();
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => VIRTIO_ID_BLOCK,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match state.device_features_select {
                0 => self.features() as u32,
                1 => (self.features() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX if state.queue_select == 0 => u32::from(QUEUE_SIZE),
            VIRTIO_MMIO_QUEUE_READY if state.queue_select == 0 => u32::from(state.queue.ready()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt_status.load(Ordering::SeqCst),
            VIRTIO_MMIO_STATUS => state.status,
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => NO_SHARED_MEMORY,
            _ => 0,
        }
    }

    fn write_register(&self, register: u32, value: u32) {
        let mut state = self.lock();
        let selected = state.queue_select == 0;
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => state.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => state.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => match state.driver_features_select {
                0 => {
                    state.driver_features = state.driver_features & !0xffff_ffff | u64::from(value);
                }
                1 => {
                    state.driver_features =
                        state.driver_features & 0xffff_ffff | u64::from(value) << 32;
                }
                _ => {}
            },
            VIRTIO_MMIO_QUEUE_SEL => state.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM if selected => {
                // A size that is no power of two or too large is refused and the old one stays.
                let _ = u16::try_from(value).map(|size| state.queue.set_size(size));
            }
            VIRTIO_MMIO_QUEUE_READY if selected => state.queue.set_ready(value & 1 != 0),
            VIRTIO_MMIO_QUEUE_DESC_LOW if selected => {
                state.queue.set_desc_table_address(Some(value), None);
            }
            VIRTIO_MMIO_QUEUE_DESC_HIGH if selected => {
                state.queue.set_desc_table_address(None, Some(value));
            }
            VIRTIO_MMIO_QUEUE_AVAIL_LOW if selected => {
                state.queue.set_avail_ring_address(Some(value), None);
            }
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH if selected => {
                state.queue.set_avail_ring_address(None, Some(value));
            }
            VIRTIO_MMIO_QUEUE_USED_LOW if selected => {
                state.queue.set_used_ring_address(Some(value), None);
            }
            VIRTIO_MMIO_QUEUE_USED_HIGH if selected => {
                state.queue.set_used_ring_address(None, Some(value));
            }
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.interrupt_status.fetch_and(!value, Ordering::SeqCst);
            }
            VIRTIO_MMIO_STATUS if value == 0 => {
                state.queue.reset();
                state.status = 0;
                state.driver_features = 0;
                self.interrupt_status.store(0, Ordering::SeqCst);
            }
            VIRTIO_MMIO_STATUS => {
                state.status = value;
                if value & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
                    let event_idx = state.driver_features >> VIRTIO_RING_F_EVENT_IDX & 1 != 0;
                    state.queue.set_event_idx(event_idx);
                }
            }
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|error| error.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::memory::{MemorySize, allocate};

    fn transport(name: &str) -> Transport {
        let path = std::env::temp_dir().join(format!("anykvm-mmio-{}-{name}", std::process::id()));
        std::fs::write(&path, [0; 1024]).unwrap();
        let block = Block::open(&path, 0).unwrap();
        std::fs::remove_file(&path).unwrap();
        Transport::new(
            block,
            Arc::new(allocate(MemorySize(8 << 20)).unwrap()),
            InterruptLine::unconnected().unwrap(),
            EventFd::new(0).unwrap(),
        )
    }

    fn read(transport: &Transport, register: u32) -> u32 {
        let mut data = [0; 4];
        transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(transport: &Transport, register: u32, value: u32) {
        transport.write(register.into(), &value.to_le_bytes());
    }

    #[test]
    fn the_window_introduces_a_modern_block_device() {
        let transport = transport("intro");
        assert_eq!(read(&transport, VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
        assert_eq!(read(&transport, VIRTIO_MMIO_VERSION), 2);
        assert_eq!(read(&transport, VIRTIO_MMIO_DEVICE_ID), 2);
        write(&transport, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        assert_eq!(read(&transport, VIRTIO_MMIO_DEVICE_FEATURES), 1);
        let mut capacity = [0; 8];
        transport.read(VIRTIO_MMIO_CONFIG.into(), &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 2);
        // Past the configuration space, and an odd register access
        transport.read(0x200, &mut capacity);
        assert_eq!(capacity, [0; 8]);
        let mut byte = [1];
        transport.read(0, &mut byte);
        assert_eq!(byte, [0]);
    }

    #[test]
    fn only_queue_zero_exists_and_reset_forgets_it() {
        let transport = transport("queue");
        write(&transport, VIRTIO_MMIO_QUEUE_SEL, 1);
        assert_eq!(read(&transport, VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        write(&transport, VIRTIO_MMIO_QUEUE_READY, 1);
        write(&transport, VIRTIO_MMIO_QUEUE_SEL, 0);
        assert_eq!(read(&transport, VIRTIO_MMIO_QUEUE_READY), 0);
        assert_eq!(read(&transport, VIRTIO_MMIO_QUEUE_NUM_MAX), 256);
        write(&transport, VIRTIO_MMIO_QUEUE_NUM, 64);
        write(&transport, VIRTIO_MMIO_QUEUE_READY, 1);
        write(&transport, VIRTIO_MMIO_STATUS, 15);
        assert_eq!(read(&transport, VIRTIO_MMIO_QUEUE_READY), 1);
        assert_eq!(read(&transport, VIRTIO_MMIO_STATUS), 15);
        write(&transport, VIRTIO_MMIO_STATUS, 0);
        assert_eq!(read(&transport, VIRTIO_MMIO_QUEUE_READY), 0);
        assert_eq!(read(&transport, VIRTIO_MMIO_STATUS), 0);
    }

    #[test]
    fn a_bell_before_the_driver_is_ready_does_nothing() {
        let transport = transport("bell");
        transport.serve();
        assert_eq!(read(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), 0);
        assert_eq!(transport.line.edges(), 0);
    }
}
