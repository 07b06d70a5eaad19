//! Runs a guest: some instructions at a time, with answers to its exits and other threads' and its
//! owner's doings in between, and at the end by a request.

use std::cell::OnceCell;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anykvm_cpu::block::MAX_INSNS;
use anykvm_cpu::exit::Direction;
use anykvm_cpu::io::DATA_BYTES;
use anykvm_cpu::memory::GuestMemory;
use anykvm_cpu::{Cpu, Exit, Requests, requests};

use crate::device::{Devices, OWN};
use crate::input::Input;
use crate::layout::{CODE, CODE_SIZE};
use crate::memory::Slots;
use crate::setup;

/// Calls of `Cpu::run` for one guest.
const ROUNDS: u32 = 48;
/// Rounds when the tape has nothing more to give.
const ROUNDS_WITHOUT_TAPE: u32 = 8;
/// More exits than one request has to wait for: REP INS to device memory stores what one exit for its
/// port has brought, item by item.
const PIECES: usize = 2 * DATA_BYTES;

thread_local! {
    static SLOTS: OnceCell<Slots> = const { OnceCell::new() };
}

struct Guest<'a> {
    cpu: Cpu,
    memory: Arc<GuestMemory>,
    devices: Arc<Devices>,
    slots: &'a Slots,
}

/// Runs one guest to its end.
pub fn run(input: &Input) {
    SLOTS.with(|slots| {
        let slots = slots.get_or_init(Slots::new);
        let memory = slots.guest(&setup::image(input));
        let wanted = Arc::new(Requests::default());
        let devices = Arc::new(Devices::new(input.tape, wanted.clone()));
        let mut cpu = Cpu::new(memory.clone(), devices.clone(), wanted);
        setup::processor(&mut cpu, input);
        let mut guest = Guest {
            cpu,
            memory,
            devices,
            slots,
        };
        let mut alive = true;
        let mut round = 0;
        while alive && round < ROUNDS {
            guest.interfere();
            let exit = guest.run_some();
            alive = guest.answer(exit);
            round += 1;
            if guest.devices.tape().used_up() && round > ROUNDS_WITHOUT_TAPE {
                break;
            }
        }
        if alive && input.asynchronous {
            guest.run_until_kicked();
        }
        guest.run_with_request();
    });
}

impl Guest<'_> {
    fn tape(&self) -> u8 {
        self.devices.tape().next()
    }

    /// What other threads and the owner may do while the processor is outside its run loop.
    fn interfere(&mut self) {
        let choice = self.tape();
        if choice & 0x80 == 0 {
            return;
        }
        match choice & 15 {
            0 | 1 => {
                let bits = u32::from(self.tape());
                self.cpu.requests().set(bits & OWN);
            }
            2 => {
                let map = self.slots.map(self.tape());
                self.memory.replace(0, map, None);
            }
            // Device DMA into code.
            3 => {
                let at = CODE + u64::from(self.tape()) * 16 % CODE_SIZE;
                let data = self.devices.tape().next64().to_le_bytes();
                // The slot may have been taken away.
                let _ = self.memory.write(at, &data);
            }
            4 => self.cpu.state_changed(),
            5 => {
                let bits = self.tape();
                let debug = &mut self.cpu.guest_debug;
                debug.single_step = bits & 1 != 0;
                debug.software_breakpoints = bits & 2 != 0;
                debug.hardware_breakpoints = bits & 4 != 0;
                debug.block_irq = bits & 8 != 0;
                debug.db[0] = CODE + u64::from(bits >> 4);
                debug.dr7 = 0x403;
                self.cpu.state_changed();
            }
            6 => {
                let rip = CODE + u64::from(self.tape());
                self.cpu.state.set_rip(rip);
                self.cpu.state_changed();
            }
            7 => {
                let register = self.tape() & 15;
                let value = self.devices.tape().next64();
                self.cpu.state.regs[register] = value;
            }
            _ => {}
        }
    }

    /// A run that a budget ends, if nothing else does.
    fn run_some(&mut self) -> Exit {
        let budget = 1 + u64::from(self.tape()) * 8;
        let before = self.spent();
        let exit = self.cpu.run(budget);
        let spent = self.spent() - before;
        assert!(
            spent <= budget + MAX_INSNS as u64,
            "{spent} instructions and events with a budget of {budget}"
        );
        exit
    }

    fn spent(&self) -> u64 {
        let counters = &self.cpu.counters;
        counters.instructions + counters.events
    }

    /// Does what an exit asks for; false if the guest cannot go on.
    fn answer(&mut self, exit: Exit) -> bool {
        let mut tape = self.devices.tape();
        match exit {
            Exit::Io {
                direction: Direction::In,
                size,
                count,
                ..
            } => {
                let bytes = usize::from(size) * count as usize;
                tape.fill(&mut self.cpu.io.data[..bytes]);
            }
            Exit::MmioRead { len, .. } => {
                let data = tape.next64().to_le_bytes();
                self.cpu.complete_mmio_read(&data[..usize::from(len)]);
            }
            Exit::MsrRead { .. } | Exit::MsrWrite { .. } => {
                let good = tape.next() & 1 == 0;
                let value = tape.next64();
                self.cpu.complete_msr(good.then_some(value));
            }
            Exit::Hypercall { .. } => {
                let result = tape.next64();
                self.cpu.complete_hypercall(result);
            }
            Exit::Request => {
                self.cpu.requests().take(requests::EXITS);
            }
            Exit::BadMemory => panic!("memory of a slot is not mapped"),
            Exit::Shutdown | Exit::InternalError(_) => return false,
            _ => {}
        }
        true
    }

    /// A request that is there before the run ends it: only what the last exit left half done comes
    /// first, piece by piece.
    fn run_with_request(&mut self) {
        let before = self.spent();
        let mut last = None;
        for _ in 0..PIECES {
            self.cpu.requests().set(requests::KICK);
            let exit = self.cpu.run(u64::MAX);
            let spent = self.spent() - before;
            assert!(spent <= 2, "{spent} instructions in spite of a request");
            if exit == Exit::Request {
                return;
            }
            last = Some(exit);
            self.answer(exit);
        }
        panic!("no end by a request: {last:?}\n{}", self.cpu.dump());
    }

    /// A run that only another thread ends.
    fn run_until_kicked(&mut self) {
        for _ in 0..ROUNDS {
            kick_soon(self.cpu.requests().clone());
            let exit = self.cpu.run(u64::MAX);
            if exit == Exit::Request || !self.answer(exit) {
                return;
            }
        }
    }
}

/// Another thread sets KICK after a moment.
pub fn kick_soon(wanted: Arc<Requests>) {
    static KICKER: OnceLock<Sender<Arc<Requests>>> = OnceLock::new();
    let kicker = KICKER.get_or_init(|| {
        let (sender, receiver) = channel::<Arc<Requests>>();
        std::thread::spawn(move || {
            for wanted in receiver {
                std::thread::sleep(Duration::from_micros(100));
                wanted.set(requests::KICK);
            }
        });
        sender
    });
    kicker.send(wanted).expect("the thread runs");
}
