//! COM1 on standard input and output: a 16550A from vm-superio, a thread that feeds it what is typed.

use std::io::{self, IsTerminal, Read, Stdout};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use vm_superio::Serial;
use vm_superio::serial::{Error, SerialEvents};

use super::interrupt::InterruptLine;

/// Ctrl-A, then: x ends the machine, d dumps its processors, Ctrl-A sends one Ctrl-A, anything else is
/// sent with it.
const ESCAPE: u8 = 0x01;

/// What the user asks of the machine by an escape sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    Quit,
    Dump,
}

/// The guest's COM1.
pub struct Console {
    uart: Mutex<Serial<InterruptLine, Arc<Room>, Stdout>>,
    room: Arc<Room>,
}

/// Told when the guest has read all input that the UART held.
#[derive(Default)]
struct Room {
    changed: Condvar,
    empty: Mutex<bool>,
}

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        *lock(&self.empty) = true;
        self.changed.notify_all();
    }
}

impl Console {
    pub fn new(line: InterruptLine) -> Self {
        let room = Arc::new(Room::default());
        Self {
            uart: Mutex::new(Serial::with_events(line, Arc::clone(&room), io::stdout())),
            room,
        }
    }

    /// The guest reads a register.
    pub fn read(&self, offset: u8) -> u8 {
        lock(&self.uart).read(offset)
    }

    /// The guest writes a register; an error is that of standard output.
    pub fn write(&self, offset: u8, value: u8) -> io::Result<()> {
        match lock(&self.uart).write(offset, value) {
            Ok(()) | Err(Error::FullFifo) => Ok(()),
            Err(Error::Trigger(error) | Error::IOError(error)) => Err(error),
        }
    }

    /// Feeds standard input to the guest until it ends. Calls `on_escape` when the user asks for something
    /// of the machine itself, which only a terminal can.
    pub fn feed(&self, on_escape: impl Fn(Escape)) {
        let terminal = io::stdin().is_terminal();
        let mut escape = EscapeKey::default();
        let mut buffer = [0; 256];
        loop {
            match io::stdin().read(&mut buffer) {
                Ok(0) => return,
                Ok(count) if terminal => {
                    for &key in &buffer[..count] {
                        match escape.press(key) {
                            Ok(keys) => self.enter(&keys),
                            Err(request) => on_escape(request),
                        }
                    }
                }
                Ok(count) => self.enter(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Puts bytes into the UART as fast as the guest takes them.
    fn enter(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            *lock(&self.room.empty) = false;
            // Full, or in loopback while the guest's driver looks what UART this is: try again later.
            let taken = lock(&self.uart).enqueue_raw_bytes(bytes).unwrap_or(0);
            bytes = &bytes[taken..];
            if !bytes.is_empty() {
                let empty = lock(&self.room.empty);
                if !*empty {
                    let _ = self
                        .room
                        .changed
                        .wait_timeout(empty, Duration::from_millis(20));
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|error| error.into_inner())
}

/// Finds the escape sequence in what is typed.
#[derive(Default)]
struct EscapeKey {
    pending: bool,
}

impl EscapeKey {
    /// What goes to the guest for a key, or what the user asks for with it.
    fn press(&mut self, key: u8) -> Result<Vec<u8>, Escape> {
        match (std::mem::take(&mut self.pending), key) {
            (false, ESCAPE) => {
                self.pending = true;
                Ok(Vec::new())
            }
            (true, b'x' | b'X') => Err(Escape::Quit),
            (true, b'd' | b'D') => Err(Escape::Dump),
            (true, ESCAPE) | (false, _) => Ok(vec![key]),
            (true, _) => Ok(vec![ESCAPE, key]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_key_asks_and_can_be_sent() {
        let mut escape = EscapeKey::default();
        let mut typed = |keys: &[u8]| -> Vec<Result<Vec<u8>, Escape>> {
            keys.iter().map(|key| escape.press(*key)).collect()
        };
        assert_eq!(typed(b"l\r"), [Ok(b"l".to_vec()), Ok(b"\r".to_vec())]);
        assert_eq!(typed(b"\x01"), [Ok(Vec::new())]);
        assert_eq!(typed(b"\x01"), [Ok(vec![ESCAPE])]);
        assert_eq!(typed(b"\x01q"), [Ok(Vec::new()), Ok(b"\x01q".to_vec())]);
        assert_eq!(typed(b"\x01d"), [Ok(Vec::new()), Err(Escape::Dump)]);
        assert_eq!(typed(b"\x01x"), [Ok(Vec::new()), Err(Escape::Quit)]);
        assert_eq!(typed(b"x"), [Ok(b"x".to_vec())]);
    }

    #[test]
    fn typed_bytes_reach_the_guest_in_order_however_many() {
        let console = Arc::new(Console::new(InterruptLine::unconnected().unwrap()));
        let feeder = {
            let console = Arc::clone(&console);
            std::thread::spawn(move || console.enter(&[b'x'; 500]))
        };
        let mut read = 0;
        while read < 500 {
            // Line status: data ready
            if console.read(5) & 1 != 0 {
                assert_eq!(console.read(0), b'x');
                read += 1;
            } else {
                std::thread::yield_now();
            }
        }
        feeder.join().unwrap();
    }
}
