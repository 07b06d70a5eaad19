//! Guest memory operands: the check against the TLB, and the operand of the host instruction.
//!
//! [`check`] leaves the TLB entry's addend (host address minus linear address) in RCX; [`operand`]
//! then adds the linear address again, without touching the flags.

use anykvm_cpu::Insn;
use anykvm_cpu::decode::SEG_CHECKED;
use anykvm_cpu::state::{reg, seg};
use anykvm_cpu::translator::{TLB_ADDEND, TLB_INDEX_MASK, TLB_INDEX_SHIFT, TLB_READ, TLB_WRITE};
use iced_x86::{Code, IcedError, MemoryOperand, Register};

use crate::asm::{Asm, Constant, Hole, at, indexed, slot};
use crate::legacy::{Word, low_half};
use crate::regs::{GUEST_RSP, Home, POINTER, SCRATCH, home};
use crate::shared::Slot;

/// The address of a guest operand.
#[derive(Clone, Copy, Debug)]
pub struct Address {
    base: Part,
    index: Part,
    scale: u32,
    displacement: i64,
    /// The effective address has 32 bits.
    narrow: bool,
    segment: Option<Slot>,
    /// 32-bit code: the linear address has 32 bits, and FS and GS must hold whole segments.
    legacy: bool,
}

/// A register of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    None,
    Host(Register),
    Memory(Slot),
}

fn part(code: u8) -> Part {
    match code {
        reg::ZERO => Part::None,
        n => match home(n.into()) {
            Home::Host(r) => Part::Host(r),
            Home::Spilled(s) => Part::Memory(s),
        },
    }
}

impl Address {
    /// The address of an instruction's memory operand; `None` if it is of a kind that is left to
    /// the interpreter. `next` is the offset behind the instruction in its page.
    pub fn of(insn: &Insn, next: i64) -> Option<Self> {
        let legacy = Word::of(insn) == Word::Double;
        let segment = match insn.seg & !SEG_CHECKED {
            seg::FS => Some(Slot::FsBase),
            seg::GS => Some(Slot::GsBase),
            _ if insn.seg & SEG_CHECKED != 0 => return None,
            _ => None,
        };
        let narrow = match insn.addr_mask {
            u64::MAX => false,
            0xffff_ffff => true,
            _ => return None,
        };
        let mut displacement = insn.disp as i64;
        let base = if insn.base == reg::RIP {
            if narrow {
                return None;
            }
            displacement += next;
            Part::Memory(Slot::Page)
        } else {
            part(insn.base)
        };
        if narrow {
            displacement = i64::from(displacement as i32);
        }
        let fits = narrow || i32::try_from(displacement).is_ok_and(|d| d < i32::MAX - 64);
        if !fits {
            return None;
        }
        Some(Self {
            base,
            index: part(insn.index),
            scale: 1 << insn.scale,
            displacement,
            narrow,
            segment,
            legacy,
        })
    }

    /// `[register + displacement]`, for stack operations. The register is a host's.
    pub fn stack(register: Register, displacement: i64, word: Word) -> Self {
        let legacy = word == Word::Double;
        Self {
            base: Part::Host(register),
            index: Part::None,
            scale: 1,
            displacement,
            narrow: legacy,
            segment: None,
            legacy,
        }
    }

    /// `base + (index << scale) + displacement` of a 64-bit guest's registers.
    pub fn sum(base: u8, index: u8, scale: u8, displacement: i64) -> Self {
        let base = match base {
            reg::RIP => Part::Memory(Slot::Page),
            n => part(n),
        };
        Self {
            base,
            index: part(index),
            scale: 1 << scale,
            displacement,
            narrow: false,
            segment: None,
            legacy: false,
        }
    }

    /// A linear address that is in memory.
    pub fn linear(place: Slot) -> Self {
        Self {
            base: Part::Memory(place),
            index: Part::None,
            scale: 1,
            displacement: 0,
            narrow: false,
            segment: None,
            legacy: false,
        }
    }

    /// The effective address has 32 bits.
    pub fn is_narrow(&self) -> bool {
        self.narrow
    }

    /// FS or GS.
    pub fn has_segment(&self) -> bool {
        self.segment.is_some()
    }

    /// The offset in the segment, as an address.
    pub fn offset(&self) -> Self {
        Self {
            segment: None,
            ..*self
        }
    }

    /// The low bits of the TLB tag it needs.
    fn asn(&self) -> Slot {
        match self.segment {
            Some(Slot::FsBase) if self.legacy => Slot::WholeFsAsn,
            Some(Slot::GsBase) if self.legacy => Slot::WholeGsAsn,
            _ => Slot::Asn,
        }
    }

    /// Whether it is a constant distance from RSP.
    pub fn is_at_stack(&self) -> bool {
        self.base == Part::Host(GUEST_RSP) && self.index == Part::None && self.segment.is_none()
    }

    /// The constant part.
    pub fn displacement(&self) -> i64 {
        self.displacement
    }

    /// Puts the linear address plus `plus` into a register. Destroys flags only with a segment or two
    /// parts in memory.
    pub fn compute(&self, a: &mut Asm, to: Register, plus: i64) -> Result<(), IcedError> {
        let d = self.displacement + if self.narrow { 0 } else { plus };
        let lea = |a: &mut Asm, to: Register, m: MemoryOperand| {
            let (code, to) = if self.narrow {
                (Code::Lea_r32_m, low_half(to))
            } else {
                (Code::Lea_r64_m, to)
            };
            a.emit(code, to, m)
        };
        let s = self.scale;
        match (self.base, self.index) {
            (Part::None, Part::None) => {
                a.emit(Code::Mov_rm64_imm32, to, d as i32)?;
                if self.narrow {
                    lea(a, to, at(to, 0))?;
                }
            }
            (Part::Host(b), Part::None) => lea(a, to, at(b, d))?,
            (Part::Memory(b), Part::None) => {
                a.load(to, slot(b))?;
                if d != 0 || self.narrow {
                    lea(a, to, at(to, d))?;
                }
            }
            (Part::None, Part::Host(i)) => lea(a, to, indexed(Register::None, i, s, d))?,
            (Part::None, Part::Memory(i)) => {
                a.load(to, slot(i))?;
                lea(a, to, indexed(Register::None, to, s, d))?;
            }
            (Part::Host(b), Part::Host(i)) => lea(a, to, indexed(b, i, s, d))?,
            (Part::Host(b), Part::Memory(i)) => {
                a.load(to, slot(i))?;
                lea(a, to, indexed(b, to, s, d))?;
            }
            (Part::Memory(b), Part::Host(i)) => {
                a.load(to, slot(b))?;
                lea(a, to, indexed(to, i, s, d))?;
            }
            (Part::Memory(b), Part::Memory(i)) => {
                a.load(to, slot(i))?;
                a.lea(to, indexed(Register::None, to, s, d))?;
                a.emit(Code::Add_r64_rm64, to, slot(b))?;
                if self.narrow {
                    lea(a, to, at(to, 0))?;
                }
            }
        }
        if let Some(base) = self.segment {
            let (code, to) = if self.legacy {
                (Code::Add_r32_rm32, low_half(to))
            } else {
                (Code::Add_r64_rm64, to)
            };
            a.emit(code, to, slot(base))?;
        }
        if self.narrow && plus != 0 {
            a.lea(to, at(to, plus))?;
        }
        Ok(())
    }
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Loads.
    Read,
    /// Stores, perhaps after loading.
    Write,
    /// Loads and stores in one atomic operation.
    Atomic,
}

/// Bytes to be checked.
#[derive(Clone, Copy, Debug)]
pub struct Bytes {
    /// The first one's distance from the address.
    pub from: i64,
    /// How many.
    pub count: usize,
    /// What is done with them.
    pub usage: Use,
    /// The first one's address is a multiple of this power of two.
    pub align: i64,
}

impl Bytes {
    /// Those of one access. `aligned`: its address is a multiple of its size.
    pub fn of_access(size: usize, usage: Use, aligned: bool) -> Self {
        Self {
            from: 0,
            count: size,
            usage,
            align: if aligned { size as i64 } else { 1 },
        }
    }
}

/// Emits a test whether R15 is a multiple of `align`; returns the branch that is taken if not.
pub fn test_alignment(a: &mut Asm, align: i64) -> Result<Option<Hole>, IcedError> {
    if align <= 1 {
        return Ok(None);
    }
    let mask = align as u32 - 1;
    a.emit(Code::Test_rm8_imm8, Register::R15L, mask)?;
    Ok(Some(a.jne()))
}

/// What a check by [`check`] may lead to besides a hit.
#[derive(Clone, Copy, Debug)]
pub struct Misses {
    /// The branch taken if the address is not a multiple of what it has to be.
    pub unaligned: Option<Hole>,
    /// The branch taken if the entry, to which R15 points, has not the tag in RCX.
    pub miss: Hole,
    /// Where to go on, R15 the same, when it has.
    pub back: usize,
}

/// Emits the TLB check of bytes of one page. Destroys the flags, RCX and R15; leaves the addend in RCX.
pub fn check(a: &mut Asm, address: &Address, bytes: &Bytes) -> Result<Misses, IcedError> {
    address.compute(a, SCRATCH, bytes.from)?;
    let unaligned = test_alignment(a, bytes.align)?;
    static ENTRY: Constant = Constant::new(|a| {
        a.emit(Code::Shr_rm64_imm8, SCRATCH, TLB_INDEX_SHIFT)?;
        a.emit(Code::And_rm32_imm32, Register::R15D, TLB_INDEX_MASK)?;
        a.emit(Code::Add_r64_rm64, SCRATCH, slot(Slot::Level1))
    });
    a.constant(&ENTRY)?;
    address.compute(a, POINTER, bytes.from + bytes.count as i64 - 1)?;
    a.emit(Code::And_rm64_imm32, POINTER, -4096i32)?;
    a.emit(Code::Or_r64_rm64, POINTER, slot(address.asn()))?;
    let tag = match bytes.usage {
        Use::Read => TLB_READ,
        Use::Write | Use::Atomic => TLB_WRITE,
    };
    a.emit(Code::Cmp_r64_rm64, POINTER, at(SCRATCH, tag))?;
    let miss = a.jne();
    let back = a.here();
    a.load(POINTER, at(SCRATCH, TLB_ADDEND))?;
    Ok(Misses {
        unaligned,
        miss,
        back,
    })
}

/// Emits what makes the host address from the addend in RCX, and returns the operand to use.
/// Leaves the flags alone. `whole`: the operand uses no register but RCX, so that R15 is free, and
/// needs no REX prefix.
pub fn operand(a: &mut Asm, address: &Address, whole: bool) -> Result<MemoryOperand, IcedError> {
    if let (Part::Host(b), Part::None, false, None) =
        (address.base, address.index, address.narrow, address.segment)
    {
        if whole {
            a.lea(POINTER, indexed(POINTER, b, 1, address.displacement))?;
            return Ok(at(POINTER, 0));
        }
        return Ok(indexed(POINTER, b, 1, address.displacement));
    }
    if let (Part::None, Part::Host(i), false, None, false) = (
        address.base,
        address.index,
        address.narrow,
        address.segment,
        whole,
    ) {
        return Ok(indexed(POINTER, i, address.scale, address.displacement));
    }
    // Pieces that would need an addition are moved into the pointer one by one.
    let mut rest = *address;
    if let Some(base) = rest.segment.take() {
        if rest.legacy {
            return legacy_operand(a, &rest, base);
        }
        a.load(SCRATCH, slot(base))?;
        a.lea(POINTER, indexed(POINTER, SCRATCH, 1, 0))?;
    }
    if let (Part::Memory(_), Part::Memory(i), false) = (rest.base, rest.index, rest.narrow) {
        a.load(SCRATCH, slot(i))?;
        a.lea(POINTER, indexed(POINTER, SCRATCH, rest.scale, 0))?;
        rest.index = Part::None;
    }
    rest.compute(a, SCRATCH, 0)?;
    if whole {
        a.lea(POINTER, indexed(POINTER, SCRATCH, 1, 0))?;
        Ok(at(POINTER, 0))
    } else {
        Ok(indexed(POINTER, SCRATCH, 1, 0))
    }
}

/// The operand of 32-bit code at `address` in the segment whose base is in `base`: the sum has 32 bits.
fn legacy_operand(a: &mut Asm, address: &Address, base: Slot) -> Result<MemoryOperand, IcedError> {
    address.compute(a, SCRATCH, 0)?;
    a.store(slot(Slot::Target), POINTER)?;
    a.load(POINTER, slot(base))?;
    a.emit(
        Code::Lea_r32_m,
        Register::R15D,
        indexed(SCRATCH, POINTER, 1, 0),
    )?;
    a.load(POINTER, slot(Slot::Target))?;
    a.lea(POINTER, indexed(POINTER, SCRATCH, 1, 0))?;
    Ok(at(POINTER, 0))
}

impl Address {
    /// Whether [`operand`] can do without touching the flags.
    pub fn is_plain(&self) -> bool {
        !(self.narrow
            && matches!(self.base, Part::Memory(_))
            && matches!(self.index, Part::Memory(_)))
    }
}
