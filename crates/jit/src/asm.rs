//! Emitting host instructions, and the few branches that are patched by hand.

use std::sync::OnceLock;

use iced_x86::{Code, Encoder, IcedError, Instruction, MemoryOperand, OpKind, Register};

use crate::encode::{self, Operand};
use crate::regs::POINTER;
use crate::shared::Slot;

/// Host code under construction. Positions are byte offsets from its beginning.
pub struct Asm {
    /// The place in [`crate::shared::Shared`] whose value RCX holds, if known.
    pub pointer: Option<i64>,
    /// Code has been emitted that keeps flags for which there was no recipe.
    pub keeps_flags: bool,
    encoder: Encoder,
    bytes: Vec<u8>,
}

/// See [`Asm::constant`].
pub struct Constant {
    emit: fn(&mut Asm) -> Result<(), IcedError>,
    /// The code, and whether it leaves RCX alone.
    made: OnceLock<(Vec<u8>, bool)>,
}

impl Constant {
    /// What the function emits, which has no branches.
    pub const fn new(emit: fn(&mut Asm) -> Result<(), IcedError>) -> Self {
        Self {
            emit,
            made: OnceLock::new(),
        }
    }
}

/// A 32-bit branch displacement to be filled in: the position of its four bytes.
#[derive(Clone, Copy, Debug)]
pub struct Hole(pub usize);

/// A place in [`crate::shared::Shared`], which translated code reaches through GS.
pub fn slot(slot: Slot) -> MemoryOperand {
    shared(slot as i64)
}

/// The same by its offset.
pub fn shared(offset: i64) -> MemoryOperand {
    MemoryOperand::new(
        Register::None,
        Register::None,
        1,
        offset,
        8,
        false,
        Register::GS,
    )
}

/// `[base + displacement]`.
pub fn at(base: Register, displacement: i64) -> MemoryOperand {
    MemoryOperand::with_base_displ(base, displacement)
}

/// `[base + index * scale + displacement]`.
pub fn indexed(base: Register, index: Register, scale: u32, displacement: i64) -> MemoryOperand {
    MemoryOperand::with_base_index_scale_displ_size(base, index, scale, displacement, 1)
}

impl Asm {
    /// Nothing yet, with room for so many bytes.
    pub fn with_room(bytes: usize) -> Self {
        Self {
            pointer: None,
            keeps_flags: false,
            encoder: Encoder::new(64),
            bytes: Vec::with_capacity(bytes),
        }
    }
    /// Where the next instruction will be.
    pub fn here(&self) -> usize {
        self.bytes.len()
    }
    /// What was emitted.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
    /// Appends an instruction that has no branch target and no RIP-relative operand.
    pub fn put(&mut self, insn: &Instruction) -> Result<(), IcedError> {
        if mentions_pointer(insn) {
            self.pointer = None;
        }
        if let Some(encoded) = encode::instruction(insn) {
            encoded.append_to(&mut self.bytes);
            return Ok(());
        }
        let done = self.encoder.encode(insn, 0);
        let mut encoded = self.encoder.take_buffer();
        if done.is_ok() {
            self.bytes.extend_from_slice(&encoded);
        }
        encoded.clear();
        self.encoder.set_buffer(encoded);
        done.map(|_| ())
    }
    /// Appends an instruction with two operands of a form that [`encode`] knows.
    pub fn emit(
        &mut self,
        code: Code,
        to: impl Into<Operand>,
        from: impl Into<Operand>,
    ) -> Result<(), IcedError> {
        let operands = [to.into(), from.into()];
        let Some(encoded) = encode::operands(code, &operands) else {
            return self.emit_rare(code, operands);
        };
        if operands.iter().any(is_pointer) {
            self.pointer = None;
        }
        encoded.append_to(&mut self.bytes);
        Ok(())
    }
    #[cold]
    fn emit_rare(&mut self, code: Code, operands: [Operand; 2]) -> Result<(), IcedError> {
        use Operand as O;
        let insn = match operands {
            [O::Register(to), O::Register(from)] => Instruction::with2(code, to, from),
            [O::Register(to), O::Memory(from)] => Instruction::with2(code, to, from),
            [O::Register(to), O::Immediate(n)] => Instruction::with2(code, to, n),
            [O::Memory(to), O::Register(from)] => Instruction::with2(code, to, from),
            [O::Memory(to), O::Immediate(n)] => Instruction::with2(code, to, n as i32),
            [to, from] => unreachable!("{code:?} {to:?} {from:?}"),
        };
        self.put(&insn?)
    }
    /// Appends code that is the same wherever it stands, and is encoded only once.
    pub fn constant(&mut self, code: &Constant) -> Result<(), IcedError> {
        let made = match code.made.get() {
            Some(made) => made,
            None => {
                let mut a = Self::with_room(64);
                a.pointer = Some(0);
                (code.emit)(&mut a)?;
                let keeps_pointer = a.pointer.is_some();
                code.made.get_or_init(|| (a.into_bytes(), keeps_pointer))
            }
        };
        self.bytes.extend_from_slice(&made.0);
        if !made.1 {
            self.pointer = None;
        }
        Ok(())
    }
    fn branch(&mut self, opcode: &[u8]) -> Hole {
        self.bytes.extend_from_slice(opcode);
        let hole = Hole(self.here());
        self.bytes.extend_from_slice(&[0; 4]);
        hole
    }
    /// JMP, to be filled in.
    pub fn jmp(&mut self) -> Hole {
        self.branch(&[0xe9])
    }
    /// CALL, to be filled in.
    pub fn call(&mut self) -> Hole {
        self.branch(&[0xe8])
    }
    /// Jcc with the condition's number (SDM Vol. 2, appendix B, table B-10), to be filled in.
    pub fn jcc(&mut self, condition: u8) -> Hole {
        self.branch(&[0x0f, 0x80 | condition & 15])
    }
    /// JNE, to be filled in.
    pub fn jne(&mut self) -> Hole {
        self.jcc(5)
    }
    /// LEA of an address relative to RIP into RCX, to be filled in like a branch.
    pub fn address(&mut self) -> Hole {
        self.pointer = None;
        self.branch(&[0x48, 0x8d, 0x0d])
    }
    /// Puts a number into the lower half of a register, whose upper half becomes 0.
    pub fn load_number(&mut self, to: Register, number: u32) {
        debug_assert!(to.is_gpr64() && to < Register::R8);
        self.bytes.push(0xb8 | to.number() as u8);
        self.bytes.extend_from_slice(&number.to_le_bytes());
    }
    /// JRCXZ to a position at most 126 bytes behind this one.
    pub fn jrcxz_back(&mut self, to: usize) {
        let distance = to as i64 - (self.here() as i64 + 2);
        self.bytes.extend_from_slice(&[0xe3, distance as i8 as u8]);
    }
    /// JRCXZ forward, to be filled in: the position of its byte.
    pub fn jrcxz(&mut self) -> usize {
        self.bytes.extend_from_slice(&[0xe3, 0]);
        self.here() - 1
    }
    /// The jump at `hole` (from [`Asm::jrcxz`]) comes here.
    pub fn land_short(&mut self, hole: usize) {
        self.pointer = None;
        self.bytes[hole] = (self.here() - hole - 1) as u8;
    }
    /// The branch at `hole` goes to `to`.
    pub fn fill(&mut self, hole: Hole, to: usize) {
        let distance = (to as i64 - hole.0 as i64 - 4) as i32;
        self.bytes[hole.0..hole.0 + 4].copy_from_slice(&distance.to_le_bytes());
    }
    /// The branch at `hole` comes here.
    pub fn land(&mut self, hole: Hole) {
        self.pointer = None;
        self.fill(hole, self.here());
    }
    /// MOV between 64-bit registers.
    pub fn mov(&mut self, to: Register, from: Register) -> Result<(), IcedError> {
        self.emit(Code::Mov_r64_rm64, to, from)
    }
    /// Loads 64 bits.
    pub fn load(&mut self, to: Register, from: MemoryOperand) -> Result<(), IcedError> {
        self.emit(Code::Mov_r64_rm64, to, from)
    }
    /// Stores 64 bits.
    pub fn store(&mut self, to: MemoryOperand, from: Register) -> Result<(), IcedError> {
        self.emit(Code::Mov_rm64_r64, to, from)
    }
    /// LEA, 64 bits.
    pub fn lea(&mut self, to: Register, from: MemoryOperand) -> Result<(), IcedError> {
        self.emit(Code::Lea_r64_m, to, from)
    }
    /// Stores a 32-bit immediate in 32 bits.
    pub fn store_u32(&mut self, to: MemoryOperand, value: u32) -> Result<(), IcedError> {
        self.emit(Code::Mov_rm32_imm32, to, i64::from(value))
    }
}

fn is_pointer(operand: &Operand) -> bool {
    matches!(operand, Operand::Register(r) if r.full_register() == POINTER)
}

/// Whether RCX may be written: it is an operand.
fn mentions_pointer(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| {
        insn.op_kind(i) == OpKind::Register && insn.op_register(i).full_register() == POINTER
    })
}
