//! The terminal on standard input: raw while the guest runs, as it was on every way out, be that the
//! guest's end, an error, a panic or a signal.

use std::io::{self, IsTerminal};
use std::sync::Mutex;

use rustix::termios::{self, InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;

/// The mode to go back to, while the terminal is raw.
static ORIGINAL: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal is raw as long as this lives.
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes the terminal raw, where standard input is one.
    pub fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let original = termios::tcgetattr(io::stdin())?;
        *lock() = Some(original.clone());
        make_raw(&original)?;
        restore_on_panic();
        restore_on_signals()?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
        lock().take();
    }
}

/// Every key goes to the guest as it is typed. Output stays processed: the guest's own line ends are
/// not hurt by it, and our messages need it.
fn make_raw(original: &Termios) -> io::Result<()> {
    let mut raw = original.clone();
    raw.input_modes -= InputModes::BRKINT
        | InputModes::ICRNL
        | InputModes::IGNCR
        | InputModes::INLCR
        | InputModes::INPCK
        | InputModes::ISTRIP
        | InputModes::IXON;
    raw.local_modes -= LocalModes::ECHO
        | LocalModes::ECHONL
        | LocalModes::ICANON
        | LocalModes::IEXTEN
        | LocalModes::ISIG;
    raw.special_codes[SpecialCodeIndex::VMIN] = 1;
    raw.special_codes[SpecialCodeIndex::VTIME] = 0;
    termios::tcsetattr(io::stdin(), OptionalActions::Flush, &raw)?;
    Ok(())
}

fn restore() {
    if let Some(original) = lock().as_ref() {
        // The terminal may be gone (hang-up): nothing is left to restore then.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Flush, original);
    }
}

fn lock() -> std::sync::MutexGuard<'static, Option<Termios>> {
    ORIGINAL.lock().unwrap_or_else(|error| error.into_inner())
}

fn restore_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        report(info);
    }));
}

/// A thread that gives the terminal back before a signal does what it does by default, and takes it
/// again when the process goes on after a stop.
fn restore_on_signals() -> io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGCONT])?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in &mut signals {
                if signal == SIGCONT {
                    if let Some(original) = lock().as_ref() {
                        let _ = make_raw(original);
                    }
                } else {
                    restore();
                    let _ = signal_hook::low_level::emulate_default_handler(signal);
                }
            }
        })?;
    Ok(())
}
