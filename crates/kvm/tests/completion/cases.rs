//! The table's rows: an instruction, what it starts from, the exits it makes and how it ends.

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;

use crate::machine::{CODE, Event, STACK};

/// Indices into `struct kvm_regs`.
pub const RAX: usize = 0;
pub const RBX: usize = 1;
pub const RCX: usize = 2;
pub const RDX: usize = 3;
pub const RSI: usize = 4;
pub const RDI: usize = 5;
pub const RSP: usize = 6;
pub const RBP: usize = 7;
pub const R15: usize = 15;
pub const RIP: usize = 16;
pub const RFLAGS: usize = 17;

/// What most rows find in RAX.
pub const A: u64 = 0x1122_3344_5566_7788;
/// And in DX, which is their port.
pub const PORT: u16 = 0x5aa5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    Real,
    Protected,
    Long,
}

/// An exit, and what it is answered with.
#[derive(Clone, Debug)]
pub struct Step {
    pub event: Event,
    pub answer: Vec<u8>,
}

#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub bits: Bits,
    pub code: Vec<u8>,
    /// Registers at the start.
    pub start: [u64; 18],
    /// RAM at the start.
    pub ram: Vec<(u64, Vec<u8>)>,
    /// The read-only slot at the start.
    pub rom: Vec<u8>,
    pub script: Vec<Step>,
    /// Registers that differ at the end. RIP is behind the instruction unless it is here.
    pub regs: Vec<(usize, u64)>,
    /// RAM that differs at the end.
    pub memory: Vec<(u64, Vec<u8>)>,
    /// Bytes of the XSAVE area that differ at the end.
    pub xsave: Vec<(usize, Vec<u8>)>,
}

/// 64-bit code.
pub fn case(name: &str, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Case {
    case_of(Bits::Long, name, build)
}

pub fn case_of(
    bits: Bits,
    name: &str,
    build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Case {
    let width = match bits {
        Bits::Real => 16,
        Bits::Protected => 32,
        Bits::Long => 64,
    };
    let mut a = CodeAssembler::new(width).unwrap();
    build(&mut a).unwrap();
    case_from(bits, name, &a.assemble(CODE).unwrap())
}

pub fn case_from(bits: Bits, name: &str, code: &[u8]) -> Case {
    let mut start = std::array::from_fn(|i| 0x0101_0101 * i as u64);
    start[RAX] = A;
    start[RDX] = PORT.into();
    start[RSP] = STACK;
    start[RIP] = CODE;
    start[RFLAGS] = 2;
    if bits == Bits::Protected {
        start[RAX] &= 0xffff_ffff;
    }
    if bits == Bits::Real {
        start = start.map(|r| r & 0xffff);
        start[RAX] = A & 0xffff_ffff;
    }
    Case {
        name: format!("{name}, {bits:?}"),
        bits,
        code: code.to_vec(),
        start,
        ram: Vec::new(),
        rom: Vec::new(),
        script: Vec::new(),
        regs: Vec::new(),
        memory: Vec::new(),
        xsave: Vec::new(),
    }
}

impl Case {
    pub fn with(mut self, register: usize, value: u64) -> Self {
        self.start[register] = value;
        self
    }
    pub fn ram(mut self, at: u64, bytes: &[u8]) -> Self {
        self.ram.push((at, bytes.to_vec()));
        self
    }
    pub fn rom(mut self, bytes: &[u8]) -> Self {
        self.rom = bytes.to_vec();
        self
    }
    fn step(mut self, event: Event, answer: &[u8]) -> Self {
        let answer = answer.to_vec();
        self.script.push(Step { event, answer });
        self
    }
    pub fn read(self, gpa: u64, answer: &[u8]) -> Self {
        self.step(
            Event::Read {
                gpa,
                len: answer.len(),
            },
            answer,
        )
    }
    pub fn write(self, gpa: u64, data: &[u8]) -> Self {
        self.step(
            Event::Write {
                gpa,
                data: data.to_vec(),
            },
            &[],
        )
    }
    /// The port is that of DX.
    pub fn input(self, size: u8, answer: &[u8]) -> Self {
        let count = answer.len() as u32 / u32::from(size);
        self.step(
            Event::In {
                port: PORT,
                size,
                count,
            },
            answer,
        )
    }
    pub fn output(self, size: u8, data: &[u8]) -> Self {
        self.step(
            Event::Out {
                port: PORT,
                size,
                data: data.to_vec(),
            },
            &[],
        )
    }
    pub fn gives(mut self, register: usize, value: u64) -> Self {
        self.regs.push((register, value));
        self
    }
    pub fn stores(mut self, at: u64, bytes: &[u8]) -> Self {
        self.memory.push((at, bytes.to_vec()));
        self
    }
    pub fn vector(mut self, at: usize, bytes: &[u8]) -> Self {
        self.xsave.push((at, bytes.to_vec()));
        self
    }
    /// Whether one exit leaves RIP where it is and registers at an iteration in the middle.
    pub fn repeats(&self) -> bool {
        self.code.iter().any(|b| matches!(b, 0xf2 | 0xf3)) && self.name.contains("rep")
    }
    /// RIP behind the instruction.
    pub fn next(&self) -> u64 {
        CODE + self.code.len() as u64
    }
    /// Registers at the end, in front of the HLT.
    pub fn end(&self) -> [u64; 18] {
        let mut regs = self.start;
        regs[RIP] = self.next();
        for (register, value) in &self.regs {
            regs[*register] = *value;
        }
        regs
    }
}
