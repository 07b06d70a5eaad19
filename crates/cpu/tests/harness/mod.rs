//! A machine for the processor's tests: RAM at 0, no devices, ports that record what is written.
//!
//! With `ANYKVM_JIT=always` in the environment, code is translated before it runs, so that every test
//! of the processor is one of translated code, too.

#![allow(dead_code)] // Each test file uses its part of it.

pub mod instructions;
pub mod paging;
pub mod tables;

use std::sync::{Arc, Mutex};

use anykvm_cpu::machine::{Hypercall, MsrResult, Quirk};
use anykvm_cpu::memory::mapping::Mapping;
use anykvm_cpu::memory::{GuestMemory, MemoryMap, Slot};
use anykvm_cpu::state::{Segment, Table, cr0, cr4, efer, reg};
use anykvm_cpu::{Cpu, CpuState, Exit, Machine, Requests};
use anykvm_jit::{Jit, Options};

/// Ports 0x500-0x5ff are the machine's own; everything else exits.
#[derive(Default)]
pub struct Ports {
    pub written: Mutex<Vec<(u16, Vec<u8>)>>,
    /// The vector of the interrupt that waits.
    pub interrupt: Mutex<Option<u8>>,
    /// Quirks that are off.
    pub no_quirks: Mutex<Vec<Quirk>>,
}

impl Machine for Ports {
    fn pio_read(&self, port: u16, data: &mut [u8]) -> bool {
        data.fill(port as u8);
        (0x500..0x600).contains(&port)
    }
    fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        let mine = (0x500..0x600).contains(&port);
        if mine {
            self.written.lock().unwrap().push((port, data.to_vec()));
        }
        mine
    }
    fn mmio_read(&self, _: &CpuState, _: u64, _: &mut [u8]) -> bool {
        false
    }
    fn mmio_write(&self, _: &CpuState, _: u64, _: &[u8]) -> bool {
        false
    }
    fn interrupt_pending(&self) -> bool {
        self.interrupt.lock().unwrap().is_some()
    }
    fn acknowledge_interrupt(&self) -> Option<u8> {
        self.interrupt.lock().unwrap().take()
    }
    fn wants_interrupt_window(&self) -> bool {
        false
    }
    fn read_cr8(&self) -> u64 {
        0
    }
    fn write_cr8(&self, _: u64) -> bool {
        false
    }
    fn read_msr(&self, _: &CpuState, _: u32) -> MsrResult<u64> {
        MsrResult::Fault
    }
    fn write_msr(&self, _: &mut CpuState, _: u32, _: u64) -> MsrResult<()> {
        MsrResult::Fault
    }
    fn msr_filter(&self, _: u32, _: bool) -> MsrResult<()> {
        MsrResult::Done(())
    }
    fn has_quirk(&self, quirk: Quirk) -> bool {
        !self.no_quirks.lock().unwrap().contains(&quirk)
    }
    fn hypercall(&self, _: &mut CpuState, _: u64, _: [u64; 5]) -> Hypercall {
        Hypercall::Done(u64::MAX)
    }
    fn take_ioapic_eoi(&self) -> Option<u8> {
        None
    }
    fn collect_events(&self, _: &mut CpuState) {}
}

/// A processor with RAM from 0.
pub struct Computer {
    pub cpu: Cpu,
    pub memory: Arc<GuestMemory>,
    pub ports: Arc<Ports>,
}

impl Computer {
    /// `size` bytes of RAM, the processor in its reset state.
    pub fn new(size: usize) -> Self {
        let memory = Arc::new(GuestMemory::new());
        let ram = Arc::new(Mapping::anonymous(size).unwrap());
        let slot = Slot::owned(0, 0, size as u64, ram, 0, false, None).unwrap();
        memory.replace(0, MemoryMap::new(vec![Arc::new(slot)]).unwrap(), None);
        let ports = Arc::new(Ports::default());
        let mut cpu = Cpu::new(memory.clone(), ports.clone(), Arc::new(Requests::default()));
        if translated() {
            let jit = Jit::new(Options {
                cache: 1 << 20,
                threshold: 1,
                ..Options::default()
            });
            cpu.set_translator(Some(Box::new(jit.unwrap())));
        }
        Self { cpu, memory, ports }
    }

    /// Real mode at 0000:`ip`, stack below 0x7000.
    pub fn real(size: usize, ip: u16) -> Self {
        let mut c = Self::new(size);
        let s = &mut c.cpu.state;
        for seg in &mut s.seg[..6] {
            *seg = Segment {
                limit: 0xffff,
                attr: 0x93,
                ..Segment::default()
            };
        }
        s.seg[1].attr = 0x9b;
        s.regs[reg::RSP] = 0x7000;
        s.set_rip(ip.into());
        c.cpu.state_changed();
        c
    }

    /// Flat 32-bit protected mode without paging.
    pub fn protected(size: usize, eip: u32) -> Self {
        let mut c = Self::new(size);
        let s = &mut c.cpu.state;
        flat(s, 0xc09b);
        s.cr0 = cr0::PE | cr0::ET | cr0::NE;
        s.regs[reg::RSP] = 0x7000;
        s.set_rip(eip.into());
        c.cpu.state_changed();
        c
    }

    /// 64-bit mode: `tables` is the address of four pages for an identity map of the first 2 MiB in
    /// 4 KiB pages.
    pub fn long(size: usize, rip: u64, tables: u64) -> Self {
        let mut c = Self::new(size);
        for (level, gpa) in [tables, tables + 0x1000, tables + 0x2000]
            .into_iter()
            .enumerate()
        {
            c.put64(gpa, (tables + 0x1000 * (level as u64 + 1)) | 7);
        }
        for page in 0..512 {
            c.put64(tables + 0x3000 + page * 8, page << 12 | 7);
        }
        let s = &mut c.cpu.state;
        flat(s, 0xa09b);
        s.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP;
        s.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        s.msr.efer = efer::LME | efer::LMA | efer::NX | efer::SCE;
        s.cr3 = tables;
        s.regs[reg::RSP] = 0x7000;
        s.set_rip(rip);
        c.cpu.state_changed();
        c
    }

    /// A 64-bit IDT at 0x20000 whose every gate leads to code at 0x6000 that leaves by `out 0x99, al`,
    /// with the stack at 0x6800 (IST 1) and everything the event pushed on it.
    pub fn catch_events(&mut self) {
        let tss = 0x2_1800;
        self.put64(tss + 36, 0x6800);
        for v in 0..256 {
            self.put64(0x2_0000 + v * 16, 0x6000 | 8 << 16 | 1 << 32 | 0x8e00 << 32);
            self.put64(0x2_0008 + v * 16, 0);
        }
        self.put64(0x2_1008, 0x00af_9b00_0000_ffff);
        self.put64(0x2_1010, 0x00cf_9300_0000_ffff);
        self.put(0x6000, &[0xe6, 0x99]);
        let s = &mut self.cpu.state;
        s.idtr = Table {
            base: 0x2_0000,
            limit: 0xfff,
            ..Table::default()
        };
        s.gdtr = Table {
            base: 0x2_1000,
            limit: 0xff,
            ..Table::default()
        };
        s.tr = Segment {
            base: tss,
            limit: 103,
            attr: 0x8b,
            ..Segment::default()
        };
        self.cpu.state_changed();
    }
    /// What the last event pushed, from the top: error code (if any), RIP, CS, RFLAGS, RSP, SS.
    pub fn frame(&self) -> [u64; 6] {
        let rsp = self.cpu.state.regs[reg::RSP];
        std::array::from_fn(|i| self.get64(rsp + i as u64 * 8))
    }

    /// Writes guest memory behind the processor's back, as a device would.
    pub fn put(&mut self, gpa: u64, bytes: &[u8]) {
        self.memory.write(gpa, bytes).unwrap();
    }
    pub fn put64(&mut self, gpa: u64, v: u64) {
        self.put(gpa, &v.to_le_bytes());
    }
    pub fn get64(&self, gpa: u64) -> u64 {
        let mut b = [0; 8];
        self.memory.read(gpa, &mut b).unwrap();
        u64::from_le_bytes(b)
    }
    /// Runs until an exit; if nothing is translated, at most a million instructions.
    pub fn run(&mut self) -> Exit {
        // A budget is the interpreter's matter: whoever sets one gets no translated code.
        self.cpu
            .run(if translated() { u64::MAX } else { 1_000_000 })
    }
    pub fn reg(&self, code: u8) -> u64 {
        self.cpu.state.regs[code]
    }
}

/// Whether the environment asks for translated code.
fn translated() -> bool {
    std::env::var_os("ANYKVM_JIT").is_some_and(|v| v == "always")
}

fn flat(s: &mut CpuState, code: u32) {
    for seg in &mut s.seg[..6] {
        *seg = Segment {
            limit: u32::MAX,
            attr: 0xc093,
            selector: 0x10,
            ..Segment::default()
        };
    }
    s.seg[1].attr = code;
    s.seg[1].selector = 8;
    s.gdtr = Table::default();
    s.idtr = Table::default();
}
