//! A quick encoder for the instructions that translations are mostly made of: one operand in a ModRM byte's
//! r/m field, at most one register beside it, and perhaps an immediate (SDM Vol. 2, chapter 2). The rest is
//! iced-x86's, which can encode everything and takes ten times as long.

use iced_x86::{Code, Instruction, MemoryOperand, OpKind, Register};

use crate::forms::{Form, Place, form};

/// An operand of a host instruction that [`crate::asm::Asm::emit`] takes.
#[derive(Clone, Copy, Debug)]
pub enum Operand {
    /// A general register.
    Register(Register),
    /// In memory.
    Memory(MemoryOperand),
    /// A constant, cut to the size the form has.
    Immediate(i64),
}

impl From<Register> for Operand {
    fn from(r: Register) -> Self {
        Self::Register(r)
    }
}

impl From<MemoryOperand> for Operand {
    fn from(m: MemoryOperand) -> Self {
        Self::Memory(m)
    }
}

impl From<i64> for Operand {
    fn from(n: i64) -> Self {
        Self::Immediate(n)
    }
}

impl From<i32> for Operand {
    fn from(n: i32) -> Self {
        Self::Immediate(n.into())
    }
}

impl From<u32> for Operand {
    fn from(n: u32) -> Self {
        Self::Immediate(n.into())
    }
}

/// Up to eight bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Piece {
    bits: u64,
    len: usize,
}

impl Piece {
    fn push(&mut self, byte: u8) {
        self.push_all(byte.into(), 1);
    }

    /// Appends the lowest `len` bytes, of which the others are zero.
    fn push_all(&mut self, bytes: u64, len: usize) {
        self.bits |= bytes << ((8 * self.len) & 63);
        self.len += len;
    }

    /// Copying all eight bytes first is quicker than copying a number that varies.
    fn append_to(self, code: &mut Vec<u8>) {
        let end = code.len() + self.len;
        code.extend_from_slice(&self.bits.to_le_bytes());
        code.truncate(end);
    }
}

/// An encoded instruction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Encoded {
    /// Prefixes, opcode, ModRM and SIB.
    head: Piece,
    /// Displacement and immediate.
    tail: Piece,
}

impl Encoded {
    /// Appends it.
    pub fn append_to(self, code: &mut Vec<u8>) {
        self.head.append_to(code);
        if self.tail.len != 0 {
            self.tail.append_to(code);
        }
    }
}

/// A register's number, and what its name says of the REX prefix.
#[derive(Clone, Copy)]
struct Numbered(u8);

impl Numbered {
    const NUMBER: u8 = 15;
    /// SPL, BPL, SIL, DIL.
    const NEEDS_REX: u8 = 1 << 4;
    /// AH, CH, DH, BH.
    const FORBIDS_REX: u8 = 1 << 5;

    fn low(self) -> u8 {
        self.0 & 7
    }
    /// The upper bit of the number.
    fn high(self) -> u8 {
        (self.0 & Self::NUMBER) >> 3
    }
}

fn numbered(r: Register) -> Option<Numbered> {
    let n = (r as u8).wrapping_sub(Register::AL as u8);
    Some(Numbered(match n {
        0..4 => n,
        4..8 => n | Numbered::FORBIDS_REX,
        8..12 => (n - 4) | Numbered::NEEDS_REX,
        12..20 => n - 4,
        // 16, 32, 64 bits.
        20..68 => (n - 20) & Numbered::NUMBER,
        _ => return None,
    }))
}

/// The operand that ModRM's r/m field names.
enum Rm<'a> {
    Register(Numbered),
    Memory(&'a MemoryOperand),
}

/// The operands of an instruction as a [`Form`] wants them.
struct Operands<'a> {
    register: Numbered,
    rm: Rm<'a>,
    immediate: i64,
    lock: bool,
}

impl Form {
    /// The instruction with these operands; `None` if that needs more than is known here.
    fn encode(&self, o: &Operands) -> Option<Encoded> {
        let mut e = Encoded::default();
        if o.lock {
            e.head.push(0xf0);
        }
        let upper = match &o.rm {
            Rm::Register(r) => r.high(),
            Rm::Memory(m) => {
                match m.segment_prefix {
                    Register::None => {}
                    Register::GS => e.head.push(0x65),
                    _ => return None,
                }
                extended(m.base) | extended(m.index) << 1
            }
        };
        if self.narrow {
            e.head.push(0x66);
        }
        let rex = u8::from(self.wide) << 3 | o.register.high() << 2 | upper;
        let mut names = o.register.0;
        if let Rm::Register(r) = &o.rm {
            names |= r.0;
        }
        if rex != 0 || names & Numbered::NEEDS_REX != 0 {
            if names & Numbered::FORBIDS_REX != 0 {
                return None;
            }
            e.head.push(0x40 | rex);
        }
        if self.escape {
            e.head.push(0x0f);
        }
        let field = o.register.low() << 3;
        match (self.place, &o.rm) {
            (Place::Accumulator, _) => e.head.push(self.opcode),
            (Place::Opcode, Rm::Register(r)) => e.head.push(self.opcode | r.low()),
            (_, Rm::Register(r)) => {
                e.head.push(self.opcode);
                e.head.push(0xc0 | field | r.low());
            }
            (_, Rm::Memory(m)) => {
                e.head.push(self.opcode);
                memory(&mut e, field, m)?;
            }
        }
        match self.immediate {
            0 => {}
            1 => e.tail.push(o.immediate as u8),
            2 => e.tail.push_all((o.immediate as u16).into(), 2),
            _ => e.tail.push_all((o.immediate as u32).into(), 4),
        }
        Some(e)
    }

    /// The register field of a form that has no register there.
    fn no_register(&self) -> Numbered {
        Numbered(self.extension)
    }
}

/// The upper bit of a register's number.
fn extended(r: Register) -> u8 {
    u8::from(r >= Register::R8 && r <= Register::R15)
}

/// ModRM, SIB and displacement of a memory operand with 64-bit registers.
fn memory(e: &mut Encoded, field: u8, m: &MemoryOperand) -> Option<()> {
    const NO_BASE: u8 = 5;
    const SIB: u8 = 4;
    let low = |r: Register| (r as u8).wrapping_sub(Register::RAX as u8) & 7;
    let known = |r: Register| r == Register::None || r.is_gpr64();
    if !known(m.base) || !known(m.index) || m.index == Register::RSP || m.is_broadcast {
        return None;
    }
    let displacement = i32::try_from(m.displacement).ok()?;
    let scale = match m.scale {
        1 => 0,
        2 => 1,
        4 => 2,
        8 => 3,
        _ => return None,
    };
    let index = match m.index {
        Register::None => SIB << 3,
        r => scale << 6 | low(r) << 3,
    };
    if m.base == Register::None {
        e.head.push(field | SIB);
        e.head.push(index | NO_BASE);
        e.tail.push_all((displacement as u32).into(), 4);
        return Some(());
    }
    let base = low(m.base);
    let short = i8::try_from(displacement);
    // Without a displacement the number of RBP and R13 means something else.
    let size = match short {
        Ok(0) if base != NO_BASE => 0,
        Ok(_) => 1 << 6,
        Err(_) => 2 << 6,
    };
    if m.index == Register::None && base != SIB {
        e.head.push(size | field | base);
    } else {
        e.head.push(size | field | SIB);
        e.head.push(index | base);
    }
    match (size, short) {
        (0, _) => {}
        (_, Ok(d)) => e.tail.push(d as u8),
        (_, Err(_)) => e.tail.push_all((displacement as u32).into(), 4),
    }
    Some(())
}

/// An instruction of a form with these operands, if it is one of those known here.
pub fn operands(code: Code, operands: &[Operand; 2]) -> Option<Encoded> {
    let form = form(code)?;
    let rm = |o| match o {
        &Operand::Register(r) => Some(Rm::Register(numbered(r)?)),
        Operand::Memory(m) => Some(Rm::Memory(m)),
        Operand::Immediate(_) => None,
    };
    let (register, rm, immediate) = match (form.place, operands) {
        (Place::RmReg, [to, Operand::Register(r)]) => (numbered(*r)?, rm(to)?, 0),
        (Place::RegRm, [Operand::Register(r), from]) => (numbered(*r)?, rm(from)?, 0),
        (Place::Rm | Place::Opcode | Place::Accumulator, [to, Operand::Immediate(n)]) => {
            (form.no_register(), rm(to)?, *n)
        }
        _ => return None,
    };
    form.encode(&Operands {
        register,
        rm,
        immediate,
        lock: false,
    })
}

/// An instruction, if it is of a form known here.
pub fn instruction(i: &Instruction) -> Option<Encoded> {
    let form = form(i.code())?;
    if i.has_rep_prefix() || i.has_repne_prefix() {
        return None;
    }
    let memory = MemoryOperand::new(
        i.memory_base(),
        i.memory_index(),
        i.memory_index_scale(),
        i.memory_displacement64() as i64,
        i.memory_displ_size(),
        i.is_broadcast(),
        i.segment_prefix(),
    );
    let rm = |kind: OpKind, r: Register| match kind {
        OpKind::Register => Some(Rm::Register(numbered(r)?)),
        OpKind::Memory => Some(Rm::Memory(&memory)),
        _ => None,
    };
    let (register, rm) = match form.place {
        Place::RmReg => (
            numbered(i.op1_register())?,
            rm(i.op0_kind(), i.op0_register())?,
        ),
        Place::RegRm => (
            numbered(i.op0_register())?,
            rm(i.op1_kind(), i.op1_register())?,
        ),
        Place::Rm | Place::Opcode | Place::Accumulator => {
            (form.no_register(), rm(i.op0_kind(), i.op0_register())?)
        }
    };
    form.encode(&Operands {
        register,
        rm,
        immediate: match form.immediate {
            0 => 0,
            _ => immediate(i)?,
        },
        lock: i.has_lock_prefix(),
    })
}

fn immediate(i: &Instruction) -> Option<i64> {
    Some(match i.op1_kind() {
        OpKind::Immediate8 => i64::from(i.immediate8()),
        OpKind::Immediate16 => i64::from(i.immediate16()),
        OpKind::Immediate32 => i64::from(i.immediate32()),
        OpKind::Immediate8to16 => i64::from(i.immediate8to16()),
        OpKind::Immediate8to32 => i64::from(i.immediate8to32()),
        OpKind::Immediate8to64 => i.immediate8to64(),
        OpKind::Immediate32to64 => i.immediate32to64(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Encoder};

    const NUMBERS: [i64; 12] = [
        0,
        1,
        -1,
        8,
        127,
        -128,
        128,
        -129,
        0x1234,
        0x7fff_ffff,
        -0x8000_0000,
        0x6543_2100,
    ];

    fn bytes(e: Encoded) -> Vec<u8> {
        let mut code = Vec::new();
        e.append_to(&mut code);
        code
    }

    fn random(seed: &mut u64) -> u64 {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        *seed
    }

    /// Any instruction of a form, by decoding its opcode with operands of any kind behind it.
    fn any(seed: &mut u64, form: &Form) -> Option<Instruction> {
        let mut bytes = vec![];
        if random(seed).is_multiple_of(4) {
            bytes.push(0x65);
        }
        if form.narrow {
            bytes.push(0x66);
        }
        let rex = random(seed) as u8 & 7;
        if form.wide || !random(seed).is_multiple_of(3) {
            bytes.push(0x40 | u8::from(form.wide) << 3 | rex);
        }
        if form.escape {
            bytes.push(0x0f);
        }
        match form.place {
            Place::Accumulator => bytes.push(form.opcode),
            Place::Opcode => bytes.push(form.opcode | random(seed) as u8 & 7),
            _ => {
                let register = match form.place {
                    Place::Rm => form.extension,
                    _ => random(seed) as u8 & 7,
                };
                bytes.push(form.opcode);
                bytes.push(random(seed) as u8 & 0xc7 | register << 3);
            }
        }
        bytes.extend(random(seed).to_le_bytes());
        let mut i = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
        if i.is_ip_rel_memory_operand() {
            return None;
        }
        let memory = i.op_kinds().any(|k| k == OpKind::Memory);
        if !memory {
            i.set_segment_prefix(Register::None);
        }
        if i.memory_index() == Register::None {
            i.set_memory_index_scale(1);
        }
        if memory {
            let d = NUMBERS[random(seed) as usize % NUMBERS.len()];
            i.set_memory_displacement64(d as u64);
            // iced leaves out a displacement only if told so.
            let none = d == 0 && i.memory_base() != Register::None;
            i.set_memory_displ_size(u32::from(!none));
            if i.memory_base() == Register::None {
                i.set_memory_displ_size(8);
            }
        }
        (!i.is_invalid()).then_some(i)
    }

    /// What is encoded here is what iced encodes, but that one may leave out a displacement of 0.
    #[test]
    fn the_same_as_iced() {
        let mut seed = 1;
        let decode = |bytes: &[u8]| {
            let mut i = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
            assert_eq!(i.len(), bytes.len());
            if i.op_kinds().any(|k| k == OpKind::Memory) && i.memory_displacement64() == 0 {
                i.set_memory_displ_size(1);
            }
            i
        };
        for code in Code::values() {
            let Some(form) = form(code) else { continue };
            let mut seen = 0;
            for _ in 0..3000 {
                let Some(i) = any(&mut seed, form).filter(|i| i.code() == code) else {
                    continue;
                };
                let Some(quick) = instruction(&i) else {
                    continue;
                };
                let mut encoder = Encoder::new(64);
                let len = encoder.encode(&i, 0).unwrap();
                let slow = encoder.take_buffer();
                let quick = bytes(quick);
                let (a, b) = (decode(&quick), decode(&slow));
                assert!(
                    a.eq_all_bits(&b) && quick.len() <= len,
                    "{code:?}: {quick:x?} {slow:x?}"
                );
                seen += 1;
            }
            assert!(seen > 50, "{code:?}: {seen}");
        }
    }

    #[test]
    fn operands_by_themselves() {
        let at = MemoryOperand::with_base_displ(Register::R13, 0);
        let got = operands(
            Code::Mov_r64_rm64,
            &[Operand::Register(Register::RCX), Operand::Memory(at)],
        )
        .unwrap();
        assert_eq!(bytes(got), [0x49, 0x8b, 0x4d, 0]);
        let got = operands(
            Code::And_rm64_imm32,
            &[Operand::Register(Register::RCX), Operand::Immediate(-4096)],
        )
        .unwrap();
        assert_eq!(bytes(got), [0x48, 0x81, 0xe1, 0, 0xf0, 0xff, 0xff]);
        let no = [
            Operand::Register(Register::AH),
            Operand::Register(Register::R8L),
        ];
        assert!(operands(Code::Mov_r8_rm8, &no).is_none());
    }
}
