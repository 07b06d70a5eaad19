//! What the guest finds at ports and addresses: a serial port, the reset line of a keyboard controller, and
//! the I/O APIC, if it is not KVM's.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::ioapic::{self, IoApic};

pub const COM1: u16 = 0x3f8;
pub const SERIAL_LINE: u32 = 4;
const KEYBOARD_COMMAND: u16 = 0x64;
const RESET: u8 = 0xfe;

/// The interrupt line: an eventfd that KVM listens to.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// What the guest prints, and what has gone wrong.
#[derive(Default)]
struct Said {
    console: Vec<u8>,
    trouble: Option<String>,
}

#[derive(Default)]
pub struct Console {
    said: Mutex<Said>,
    changed: Condvar,
}

impl Console {
    pub fn fail(&self, why: String) {
        self.said.lock().unwrap().trouble.get_or_insert(why);
        self.changed.notify_all();
    }

    /// Waits until these words have been printed so often.
    pub fn wait_for(&self, words: &str, times: usize, until: Instant) -> Result<()> {
        let mut said = self.said.lock().unwrap();
        loop {
            if let Some(trouble) = &said.trouble {
                bail!("{trouble}");
            }
            let text = String::from_utf8_lossy(&said.console);
            if text.matches(words).count() >= times {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the guest did not say '{words}'");
            }
            said = self.changed.wait_timeout(said, left).unwrap().0;
        }
    }
}

struct Output(Arc<Console>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stdout().write_all(bytes)?;
        self.0.said.lock().unwrap().console.extend(bytes);
        self.0.changed.notify_all();
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct SerialFields {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

#[derive(Default, Serialize, Deserialize)]
pub struct DeviceState {
    #[serde(with = "SerialFields")]
    serial: SerialState,
    ioapic: Option<(u8, u32, Vec<u64>)>,
}

pub struct Devices {
    vm: Arc<VmFd>,
    pub console: Arc<Console>,
    serial: Mutex<Serial<Line, NoEvents, Output>>,
    ioapic: Option<Mutex<IoApic>>,
}

impl Devices {
    /// New devices, or those that were saved. `split`: with an I/O APIC.
    pub fn new(vm: Arc<VmFd>, split: bool, state: &DeviceState) -> Result<Self> {
        let line = EventFd::new(libc::EFD_NONBLOCK)?;
        vm.register_irqfd(&line, SERIAL_LINE)?;
        let ioapic = match &state.ioapic {
            Some(state) => Some(IoApic::from_state(state)),
            None => split.then(IoApic::new),
        };
        if let Some(ioapic) = &ioapic {
            ioapic.route(&vm)?;
        }
        let console = Arc::new(Console::default());
        let serial =
            Serial::from_state(&state.serial, Line(line), NoEvents, Output(console.clone()))
                .map_err(|error| anyhow!("the serial port's state: {error:?}"))?;
        Ok(Self {
            vm,
            console,
            serial: Mutex::new(serial),
            ioapic: ioapic.map(Mutex::new),
        })
    }

    pub fn state(&self) -> DeviceState {
        DeviceState {
            serial: self.serial.lock().unwrap().state(),
            ioapic: self
                .ioapic
                .as_ref()
                .map(|chip| chip.lock().unwrap().state()),
        }
    }

    pub fn type_in(&self, keys: &[u8]) -> Result<()> {
        let mut serial = self.serial.lock().unwrap();
        let taken = serial
            .enqueue_raw_bytes(keys)
            .map_err(|error| anyhow!("{error:?}"))?;
        anyhow::ensure!(taken == keys.len(), "the serial port's buffer is full");
        Ok(())
    }

    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, data) {
            (COM1..=0x3ff, [byte]) => {
                *byte = self.serial.lock().unwrap().read((port - COM1) as u8);
            }
            (KEYBOARD_COMMAND, [byte]) => *byte = 0,
            _ => {}
        }
    }

    pub fn port_out(&self, port: u16, data: &[u8]) -> Result<()> {
        match (port, data) {
            (COM1..=0x3ff, &[byte]) => self
                .serial
                .lock()
                .unwrap()
                .write((port - COM1) as u8, byte)
                .map_err(|error| anyhow!("serial port: {error:?}")),
            (KEYBOARD_COMMAND, &[RESET]) => bail!("the guest has reset the machine"),
            _ => Ok(()),
        }
    }

    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((chip, offset)) = self.ioapic_at(address)
            && data.len() == 4
        {
            data.copy_from_slice(&chip.lock().unwrap().read(offset).to_le_bytes());
        }
    }

    pub fn memory_write(&self, address: u64, data: &[u8]) -> Result<()> {
        if let Some((chip, offset)) = self.ioapic_at(address)
            && let &[a, b, c, d] = data
        {
            let mut chip = chip.lock().unwrap();
            if chip.write(offset, u32::from_le_bytes([a, b, c, d])) {
                chip.route(&self.vm)?;
            }
        }
        Ok(())
    }

    fn ioapic_at(&self, address: u64) -> Option<(&Mutex<IoApic>, u64)> {
        let offset = address.checked_sub(ioapic::BASE)?;
        let chip = self.ioapic.as_ref()?;
        (offset < ioapic::SIZE).then_some((chip, offset))
    }
}
