//! The computer around the processor: its devices answer from the input's tape.

use std::sync::{Arc, Mutex, MutexGuard};

use anykvm_cpu::exit::Exit;
use anykvm_cpu::machine::{Hypercall, MsrResult};
use anykvm_cpu::{CpuState, Machine, Requests, requests};

/// The input's last bytes, taken one after another; zeroes when they are used up.
#[derive(Debug, Default)]
pub struct Tape {
    bytes: Vec<u8>,
    at: usize,
}

impl Tape {
    pub fn next(&mut self) -> u8 {
        let byte = self.bytes.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        byte
    }
    pub fn next64(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.next()))
    }
    pub fn fill(&mut self, data: &mut [u8]) {
        data.fill_with(|| self.next());
    }
    pub fn used_up(&self) -> bool {
        self.at >= self.bytes.len()
    }
}

/// Every port, device address and MSR that the processor asks for.
pub struct Devices {
    tape: Mutex<Tape>,
    requests: Arc<Requests>,
}

impl Devices {
    pub fn new(tape: &[u8], requests: Arc<Requests>) -> Self {
        let bytes = tape.to_vec();
        Self {
            tape: Mutex::new(Tape { bytes, at: 0 }),
            requests,
        }
    }

    pub fn tape(&self) -> MutexGuard<'_, Tape> {
        self.tape.lock().expect("one thread")
    }

    /// Whether a device here answers; sometimes a request comes at the same time.
    fn answers(&self, tape: &mut Tape) -> bool {
        let choice = tape.next();
        if choice & 0xf0 == 0xf0 {
            self.requests.set(1 << (choice & 7));
        }
        choice & 1 != 0
    }
}

impl Machine for Devices {
    fn pio_read(&self, _: u16, data: &mut [u8]) -> bool {
        let mut tape = self.tape();
        let mine = self.answers(&mut tape);
        if mine {
            tape.fill(data);
        }
        mine
    }
    fn pio_write(&self, _: u16, _: &[u8]) -> bool {
        let mut tape = self.tape();
        self.answers(&mut tape)
    }
    fn mmio_read(&self, _: &CpuState, _: u64, data: &mut [u8]) -> bool {
        let mut tape = self.tape();
        let mine = self.answers(&mut tape);
        if mine {
            tape.fill(data);
        }
        mine
    }
    fn mmio_write(&self, _: &CpuState, _: u64, _: &[u8]) -> bool {
        let mut tape = self.tape();
        self.answers(&mut tape)
    }
    fn interrupt_pending(&self) -> bool {
        self.tape().next() & 7 == 1
    }
    fn acknowledge_interrupt(&self) -> Option<u8> {
        let vector = self.tape().next();
        (vector != 0).then_some(vector)
    }
    fn wants_interrupt_window(&self) -> bool {
        self.tape().next() & 31 == 1
    }
    fn read_cr8(&self) -> u64 {
        u64::from(self.tape().next() & 15)
    }
    fn write_cr8(&self, _: u64) -> bool {
        self.tape().next() & 1 != 0
    }
    fn read_msr(&self, _: &CpuState, _: u32) -> MsrResult<u64> {
        let mut tape = self.tape();
        match tape.next() & 3 {
            0 => MsrResult::Fault,
            1 => MsrResult::UserSpace(1),
            _ => MsrResult::Done(tape.next64()),
        }
    }
    fn write_msr(&self, _: &mut CpuState, _: u32, _: u64) -> MsrResult<()> {
        match self.tape().next() & 3 {
            0 => MsrResult::Fault,
            1 => MsrResult::UserSpace(1),
            _ => MsrResult::Done(()),
        }
    }
    fn msr_refused(&self, _: u32, _: bool) -> MsrResult<()> {
        match self.tape().next() & 1 {
            0 => MsrResult::Fault,
            _ => MsrResult::UserSpace(0),
        }
    }
    fn msr_filter(&self, _: u32, _: bool) -> MsrResult<()> {
        match self.tape().next() {
            0xff => MsrResult::Fault,
            0xfe => MsrResult::UserSpace(2),
            _ => MsrResult::Done(()),
        }
    }
    fn hypercall(&self, _: &mut CpuState, nr: u64, args: [u64; 5]) -> Hypercall {
        let mut tape = self.tape();
        match tape.next() & 1 {
            0 => Hypercall::Done(tape.next64()),
            _ => Hypercall::Exit(Exit::Hypercall { nr, args }),
        }
    }
    fn take_ioapic_eoi(&self) -> Option<u8> {
        let mut tape = self.tape();
        (tape.next() == 0xff).then(|| tape.next())
    }
    fn collect_events(&self, state: &mut CpuState) {
        let choice = self.tape().next();
        let events = &mut state.events;
        events.nmi_pending = (events.nmi_pending + (choice & 1)).min(2);
        events.smi_pending |= choice & 2 != 0;
    }
}

/// Request bits that the processor handles by itself.
pub const OWN: u32 =
    requests::TLB_FLUSH | requests::MEMSLOTS | requests::EVENT | requests::CODE_PAGE;
