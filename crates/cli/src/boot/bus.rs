//! Everything on the guest's ports and in its memory-mapped windows.

use std::sync::Arc;

use super::console::Console;
use super::virtio::mmio::Transport;
use super::{acpi, layout};

/// Why a machine stops.
#[derive(Debug)]
pub enum Stop {
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset itself, which this machine does not survive.
    Reset,
    /// The user left by the escape key.
    Quit,
    /// It cannot go on, for this reason.
    Failed(String),
}

/// What a write asks the machine to do.
#[derive(Debug)]
pub enum Effect {
    None,
    /// The guest says that it has come up.
    /// The guest has written this number to the place for marks.
    Mark(u32),
    Stop(Stop),
}

/// The devices, shared by all processors.
pub struct Bus {
    pub console: Console,
    pub disks: Vec<Arc<Transport>>,
}

/// What a read from a place where nothing is gives.
const NOTHING: u8 = 0xff;

impl Bus {
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        for byte in data {
            *byte = match port {
                layout::I8042_COMMAND | layout::I8042 | layout::SLEEP_STATUS => 0,
                _ => match serial_register(port) {
                    Some(register) => self.console.read(register),
                    None => NOTHING,
                },
            };
        }
    }

    pub fn write_port(&self, port: u16, data: &[u8]) -> Effect {
        for &byte in data {
            match port {
                layout::I8042_COMMAND if byte == layout::I8042_RESET => {
                    return Effect::Stop(Stop::Reset);
                }
                layout::SLEEP_CONTROL if acpi::is_soft_off(byte) => {
                    return Effect::Stop(Stop::PowerOff);
                }
                _ => {
                    if let Some(register) = serial_register(port)
                        && let Err(error) = self.console.write(register, byte)
                    {
                        return Effect::Stop(Stop::Failed(format!("standard output: {error}")));
                    }
                }
            }
        }
        Effect::None
    }

    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        match self.window(address) {
            Some((disk, offset)) => disk.read(offset, data),
            None => data.fill(NOTHING),
        }
    }

    pub fn write_memory(&self, address: u64, data: &[u8]) -> Effect {
        if address == layout::BOOT_MARK {
            let mut number = [0; 4];
            let len = data.len().min(4);
            number[..len].copy_from_slice(&data[..len]);
            return Effect::Mark(u32::from_le_bytes(number));
        }
        if let Some((disk, offset)) = self.window(address) {
            disk.write(offset, data);
        }
        Effect::None
    }

    /// The disk whose window `address` is in, and the offset there.
    fn window(&self, address: u64) -> Option<(&Transport, u64)> {
        let offset = address.checked_sub(layout::VIRTIO_MMIO)?;
        let index = usize::try_from(offset / layout::VIRTIO_MMIO_SIZE).ok()?;
        let disk = self.disks.get(index)?;
        Some((disk, offset % layout::VIRTIO_MMIO_SIZE))
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(layout::SERIAL)?;
    (register < layout::SERIAL_LENGTH).then_some(register as u8)
}

#[cfg(test)]
mod tests {
    use super::super::interrupt::InterruptLine;
    use super::*;

    fn bus() -> Bus {
        Bus {
            console: Console::new(InterruptLine::unconnected().unwrap()),
            disks: Vec::new(),
        }
    }

    #[test]
    fn reset_and_soft_off_stop_the_machine() {
        let bus = bus();
        assert!(matches!(
            bus.write_port(0x64, &[0xfe]),
            Effect::Stop(Stop::Reset)
        ));
        assert!(matches!(
            bus.write_port(0x600, &[0x34]),
            Effect::Stop(Stop::PowerOff)
        ));
        assert!(matches!(bus.write_port(0x64, &[0xaa]), Effect::None));
        assert!(matches!(bus.write_port(0x80, &[1]), Effect::None));
        assert!(matches!(
            bus.write_memory(layout::BOOT_MARK, &[1]),
            Effect::Mark(1)
        ));
    }

    #[test]
    fn nothing_reads_as_ones() {
        let bus = bus();
        let mut data = [0; 4];
        bus.read_port(0x1234, &mut data);
        assert_eq!(data, [0xff; 4]);
        data = [0; 4];
        bus.read_memory(layout::VIRTIO_MMIO, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert!(matches!(bus.write_memory(u64::MAX, &data), Effect::None));
        // The status of the keyboard controller: its buffers are empty.
        bus.read_port(0x64, &mut data[..1]);
        assert_eq!(data[0], 0);
    }

    #[test]
    fn the_uart_keeps_its_scratch_register() {
        let bus = bus();
        assert!(matches!(bus.write_port(0x3ff, &[0x42]), Effect::None));
        let mut data = [0];
        bus.read_port(0x3ff, &mut data);
        assert_eq!(data, [0x42]);
    }
}
