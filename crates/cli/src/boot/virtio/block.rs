//! The virtio block device (virtio 1.2, section 5.2) on an ordinary file or a block device: reads,
//! writes, flushes, and its serial number. One queue.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::super::error::BootError;

const SECTOR: u64 = 512;
/// Data moves in pieces of at most this size, however long the guest says a buffer is.
const PIECE: usize = 64 << 10;
/// Type, reserved, sector (struct virtio_blk_req).
const HEADER: u32 = 16;

/// A disk image.
pub struct Block {
    file: File,
    size: u64,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

impl Block {
    /// Opens the image for reading and writing and keeps other machines from it.
    pub fn open(path: &Path, index: usize) -> Result<Self, BootError> {
        let bad = |reason: String| BootError::Disk {
            path: path.to_owned(),
            reason,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|error| bad(format!("cannot be opened for writing: {error}")))?;
        file.try_lock()
            .map_err(|error| bad(format!("in use by another machine ({error})")))?;
        let size = file
            .seek(SeekFrom::End(0))
            .map_err(|error| bad(error.to_string()))?;
        if size == 0 {
            return Err(bad("the file is empty".to_owned()));
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(bad(format!(
                "its size, {size} bytes, is not a multiple of {SECTOR}"
            )));
        }
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (byte, letter) in serial.iter_mut().zip(format!("anykvm{index}").bytes()) {
            *byte = letter;
        }
        Ok(Self { file, size, serial })
    }

    /// Feature bits beyond those of the transport.
    pub fn features(&self) -> u64 {
        1 << VIRTIO_BLK_F_FLUSH
    }

    /// The configuration space: the capacity in sectors is all the features offered ask for.
    pub fn config(&self) -> [u8; 8] {
        (self.size / SECTOR).to_le_bytes()
    }

    /// Serves everything in the queue; whether the guest wants an interrupt for it.
    pub fn serve(
        &self,
        memory: &GuestMemoryMmap<()>,
        queue: &mut Queue,
    ) -> Result<bool, virtio_queue::Error> {
        let mut served = false;
        loop {
            queue.disable_notification(memory)?;
            while let Some(chain) = queue.pop_descriptor_chain(memory) {
                let head = chain.head_index();
                let descriptors: Vec<_> = chain.collect();
                let written = self.request(memory, &descriptors);
                queue.add_used(memory, head, written)?;
                served = true;
            }
            // Something may have come between the last look and this.
            if !queue.enable_notification(memory)? {
                break;
            }
        }
        Ok(served && queue.needs_notification(memory)?)
    }

    /// One request: the bytes written into the guest's buffers, the status byte included.
    fn request(&self, memory: &GuestMemoryMmap<()>, descriptors: &[Descriptor]) -> u32 {
        // Without a place for the status there is no way to answer.
        let Some((status, rest)) = descriptors.split_last() else {
            return 0;
        };
        if !status.is_write_only() || status.len() == 0 {
            return 0;
        }
        let (code, written) = match rest.split_first() {
            Some((header, data)) if !header.is_write_only() && header.len() >= HEADER => {
                self.transfer(memory, header.addr(), data)
            }
            _ => (VIRTIO_BLK_S_IOERR, 0),
        };
        match memory.write_obj(code as u8, status.addr()) {
            Ok(()) => written.saturating_add(1),
            Err(_) => 0,
        }
    }

    /// Carries out a request: its status and how much was written for the guest to read.
    fn transfer(
        &self,
        memory: &GuestMemoryMmap<()>,
        header: GuestAddress,
        data: &[Descriptor],
    ) -> (u32, u32) {
        let sector_at = header.unchecked_add(8);
        let (Ok(kind), Ok(sector)) = (
            memory.read_obj::<u32>(header),
            memory.read_obj::<u64>(sector_at),
        ) else {
            return (VIRTIO_BLK_S_IOERR, 0);
        };
        match kind {
            VIRTIO_BLK_T_IN => self.read(memory, sector, data),
            VIRTIO_BLK_T_OUT => (self.write(memory, sector, data), 0),
            VIRTIO_BLK_T_FLUSH => match self.file.sync_data() {
                Ok(()) => (VIRTIO_BLK_S_OK, 0),
                Err(_) => (VIRTIO_BLK_S_IOERR, 0),
            },
            VIRTIO_BLK_T_GET_ID => match data {
                [buffer, ..]
                    if buffer.is_write_only()
                        && buffer.len() >= VIRTIO_BLK_ID_BYTES
                        && memory.write_slice(&self.serial, buffer.addr()).is_ok() =>
                {
                    (VIRTIO_BLK_S_OK, VIRTIO_BLK_ID_BYTES)
                }
                _ => (VIRTIO_BLK_S_IOERR, 0),
            },
            _ => (VIRTIO_BLK_S_UNSUPP, 0),
        }
    }

    /// The place in the file of a request's data, if all of it is on the disk and in whole sectors.
    fn place(&self, sector: u64, data: &[Descriptor]) -> Option<u64> {
        let length: u64 = data.iter().map(|buffer| u64::from(buffer.len())).sum();
        let start = sector.checked_mul(SECTOR)?;
        (length.is_multiple_of(SECTOR) && start.checked_add(length)? <= self.size).then_some(start)
    }

    fn read(&self, memory: &GuestMemoryMmap<()>, sector: u64, data: &[Descriptor]) -> (u32, u32) {
        let Some(mut place) = self.place(sector, data) else {
            return (VIRTIO_BLK_S_IOERR, 0);
        };
        let mut written = 0_u32;
        for buffer in data {
            if !buffer.is_write_only() {
                return (VIRTIO_BLK_S_IOERR, written);
            }
            for (at, length) in pieces(buffer) {
                let mut piece = vec![0; length];
                if self.file.read_exact_at(&mut piece, place).is_err()
                    || memory.write_slice(&piece, at).is_err()
                {
                    return (VIRTIO_BLK_S_IOERR, written);
                }
                place += length as u64;
                written = written.saturating_add(length as u32);
            }
        }
        (VIRTIO_BLK_S_OK, written)
    }

    fn write(&self, memory: &GuestMemoryMmap<()>, sector: u64, data: &[Descriptor]) -> u32 {
        let Some(mut place) = self.place(sector, data) else {
            return VIRTIO_BLK_S_IOERR;
        };
        for buffer in data {
            if buffer.is_write_only() {
                return VIRTIO_BLK_S_IOERR;
            }
            for (at, length) in pieces(buffer) {
                let mut piece = vec![0; length];
                if memory.read_slice(&mut piece, at).is_err()
                    || self.file.write_all_at(&piece, place).is_err()
                {
                    return VIRTIO_BLK_S_IOERR;
                }
                place += length as u64;
            }
        }
        VIRTIO_BLK_S_OK
    }
}

/// A buffer as pieces of bounded size.
fn pieces(buffer: &Descriptor) -> impl Iterator<Item = (GuestAddress, usize)> {
    let (start, length) = (buffer.addr(), buffer.len() as usize);
    (0..length).step_by(PIECE).map(move |offset| {
        (
            GuestAddress(start.0.wrapping_add(offset as u64)),
            PIECE.min(length - offset),
        )
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::mock::MockSplitQueue;

    use super::*;
    use crate::boot::memory::{MemorySize, allocate};

    struct Image(PathBuf);

    impl Image {
        fn new(name: &str, bytes: &[u8]) -> Self {
            let path =
                std::env::temp_dir().join(format!("anykvm-disk-{}-{name}", std::process::id()));
            fs::write(&path, bytes).unwrap();
            Self(path)
        }
    }

    impl Drop for Image {
        fn drop(&mut self) {
            fs::remove_file(&self.0).unwrap();
        }
    }

    const HEADER_AT: u64 = 0x10_0000;
    const DATA_AT: u64 = 0x11_0000;
    const STATUS_AT: u64 = 0x12_0000;

    /// Sends one request of header, data and status; returns the status and the length used.
    fn send(block: &Block, kind: u32, sector: u64, data: &mut [u8]) -> (u8, u32) {
        let memory = allocate(MemorySize(8 << 20)).unwrap();
        memory.write_obj(kind, GuestAddress(HEADER_AT)).unwrap();
        memory
            .write_obj(sector, GuestAddress(HEADER_AT + 8))
            .unwrap();
        memory.write_slice(data, GuestAddress(DATA_AT)).unwrap();
        memory.write_obj(0xff_u8, GuestAddress(STATUS_AT)).unwrap();

        let mock = MockSplitQueue::create(&memory, GuestAddress(0x1000), 16);
        let to_guest = if kind == VIRTIO_BLK_T_OUT {
            0
        } else {
            VRING_DESC_F_WRITE
        };
        let mut chain = vec![(HEADER_AT, HEADER, 0)];
        if !data.is_empty() {
            chain.push((DATA_AT, data.len() as u32, to_guest));
        }
        chain.push((STATUS_AT, 1, VRING_DESC_F_WRITE));
        let last = chain.len() - 1;
        for (index, &(addr, len, flags)) in chain.iter().enumerate() {
            let flags = flags | if index < last { VRING_DESC_F_NEXT } else { 0 };
            let descriptor = Descriptor::new(addr, len, flags as u16, index as u16 + 1);
            mock.desc_table()
                .store(index as u16, RawDescriptor::from(descriptor))
                .unwrap();
        }
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);

        let mut queue: Queue = mock.create_queue().unwrap();
        assert!(block.serve(&memory, &mut queue).unwrap());
        memory.read_slice(data, GuestAddress(DATA_AT)).unwrap();
        assert_eq!(mock.used().idx().load(), 1);
        (
            memory.read_obj(GuestAddress(STATUS_AT)).unwrap(),
            mock.used().ring().ref_at(0).unwrap().load().len(),
        )
    }

    #[test]
    fn what_is_written_is_read_again_and_is_in_the_file() {
        let image = Image::new("rw", &[0; 4096]);
        let block = Block::open(&image.0, 0).unwrap();
        assert_eq!(block.config(), 8_u64.to_le_bytes());
        let mut data = [0x5a; 1024];
        assert_eq!(send(&block, VIRTIO_BLK_T_OUT, 2, &mut data), (0, 1));
        let mut back = [0; 1024];
        assert_eq!(send(&block, VIRTIO_BLK_T_IN, 2, &mut back), (0, 1025));
        assert_eq!(back, data);
        assert_eq!(send(&block, VIRTIO_BLK_T_FLUSH, 0, &mut []), (0, 1));
        let file = fs::read(&image.0).unwrap();
        assert_eq!(file.len(), 4096);
        assert_eq!(file[1024..2048], data);
        assert!(file[..1024].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn requests_past_the_end_fail_and_do_not_grow_the_file() {
        let image = Image::new("end", &[0; 1024]);
        let block = Block::open(&image.0, 0).unwrap();
        for sector in [1, 2, u64::MAX / 512, u64::MAX] {
            let (status, _) = send(&block, VIRTIO_BLK_T_OUT, sector, &mut [1; 1024]);
            assert_eq!(u32::from(status), VIRTIO_BLK_S_IOERR, "sector {sector}");
            let (status, _) = send(&block, VIRTIO_BLK_T_IN, sector, &mut [1; 1024]);
            assert_eq!(u32::from(status), VIRTIO_BLK_S_IOERR, "sector {sector}");
        }
        // Half a sector
        let (status, _) = send(&block, VIRTIO_BLK_T_OUT, 0, &mut [1; 100]);
        assert_eq!(u32::from(status), VIRTIO_BLK_S_IOERR);
        assert_eq!(fs::read(&image.0).unwrap(), [0; 1024]);
    }

    #[test]
    fn the_serial_number_and_unknown_requests() {
        let image = Image::new("id", &[0; 1024]);
        let block = Block::open(&image.0, 3).unwrap();
        let mut id = [0; 20];
        assert_eq!(send(&block, VIRTIO_BLK_T_GET_ID, 0, &mut id), (0, 21));
        assert_eq!(&id[..8], b"anykvm3\0");
        let (status, _) = send(&block, 77, 0, &mut [0; 512]);
        assert_eq!(u32::from(status), VIRTIO_BLK_S_UNSUPP);
    }

    #[test]
    fn bad_images_are_refused_by_name_and_left_alone() {
        for (name, size, reason) in [("none", 0, "empty"), ("odd", 1000, "multiple")] {
            let image = Image::new(name, &vec![3; size]);
            let message = Block::open(&image.0, 0).err().unwrap().to_string();
            assert!(
                message.contains(reason) && message.contains(name),
                "{message}"
            );
            assert_eq!(fs::read(&image.0).unwrap(), vec![3; size]);
        }
        let message = Block::open(Path::new("/nonexistent/disk"), 0)
            .err()
            .unwrap()
            .to_string();
        assert!(message.contains("/nonexistent/disk"), "{message}");
        assert!(Block::open(Path::new("/"), 0).is_err());
    }

    #[test]
    fn two_machines_cannot_have_one_disk() {
        let image = Image::new("lock", &[0; 512]);
        let first = Block::open(&image.0, 0).unwrap();
        let message = Block::open(&image.0, 0).err().unwrap().to_string();
        assert!(message.contains("in use"), "{message}");
        drop(first);
        Block::open(&image.0, 0).unwrap();
    }
}
