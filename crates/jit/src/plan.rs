//! How an instruction is renamed: which host registers stand for the guest's, and what has to be loaded
//! before it and stored behind it.

use anykvm_cpu::Insn;
use iced_x86::{
    Code, IcedError, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};

use crate::asm::{at, slot};
use crate::bits::BitOffset;
use crate::memory::{Address, Use};
use crate::regs::{Home, POINTER, SCRATCH, bit, home, is_high_byte, sized};
use crate::shared::Slot;
use crate::translate::{Block, Site};

/// A guest register that is in memory, and the scratch register that stands for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spill {
    pub slot: Slot,
    pub scratch: Register,
    /// The instruction needs its value.
    pub read: bool,
    pub written: bool,
}

/// See the module's description.
pub(crate) struct Plan {
    /// The instruction with its registers renamed; its memory operand is set later.
    pub insn: Instruction,
    /// The memory operand: address, use, bytes.
    pub memory: Option<(Address, Use, usize)>,
    /// The memory operand is the beginning of a bit string.
    pub bits: Option<BitOffset>,
    /// What LEA's address needs.
    pub lea: Option<Lea>,
    /// A register in memory among the operands.
    pub spilled: Option<Spill>,
    /// Another one.
    second: Option<Spill>,
    /// Host registers it writes.
    pub written: u16,
    /// Guest registers it writes, a bit for each.
    pub changed: u16,
    /// It shifts by CL.
    pub count_in_cl: bool,
    /// CH is among the operands: the guest's RCX is in the host's meanwhile.
    pub in_ch: bool,
    /// AH to BH are among the operands: no REX prefix is possible.
    pub legacy_registers_only: bool,
}

/// The address of LEA, when a part of it is in memory.
pub(crate) struct Lea {
    parts: [Option<(Register, Slot)>; 2],
}

impl Lea {
    pub fn emit(&self, b: &mut Block) -> Result<(), IcedError> {
        for (to, from) in self.parts.into_iter().flatten() {
            b.a.load(to, slot(from))?;
        }
        Ok(())
    }
}

impl Plan {
    pub fn spills(&self) -> impl Iterator<Item = Spill> {
        self.spilled.into_iter().chain(self.second)
    }

    pub fn of(insn: &Insn, site: Site, factory: &mut InstructionInfoFactory) -> Option<Self> {
        let raw = &insn.raw;
        let info = factory.info(raw);
        let mut plan = Self {
            insn: *raw,
            memory: None,
            bits: None,
            lea: None,
            spilled: None,
            second: None,
            written: 0,
            changed: 0,
            count_in_cl: false,
            in_ch: false,
            legacy_registers_only: false,
        };
        if raw.mnemonic() == Mnemonic::Lea {
            plan.rename_lea(insn, site)?;
        } else if raw.op_kinds().any(|k| k == OpKind::Memory) {
            plan.memory = Some(Self::access(insn, site, info.used_memory())?);
            plan.bits = BitOffset::of(raw);
        }
        for i in 0..raw.op_count() {
            let access = info.op_access(i);
            match raw.op_kind(i) {
                OpKind::Register => plan.rename(i, raw.op_register(i), access)?,
                OpKind::Memory
                | OpKind::Immediate8
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64 => {}
                _ => return None,
            }
        }
        for used in info.used_registers() {
            let r = used.register();
            if !r.is_gpr() {
                let known = r.is_segment_register() || r.is_ip() || is_renamed_nowhere(r);
                if !known {
                    return None;
                }
                continue;
            }
            let writes = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
            if writes {
                let n = r.full_register().number();
                plan.changed |= 1 << n;
                if let Home::Host(h) = home(n) {
                    plan.written |= bit(h);
                }
            }
            if !plan.explains(raw, r, writes) {
                return None;
            }
        }
        if plan.legacy_registers_only && !plan.needs_no_rex() || plan.in_ch && plan.count_in_cl {
            return None;
        }
        plan.insn.set_code(general_accumulator(&plan.insn)?);
        Some(plan)
    }

    /// Implicit operands must have the same home as in the guest.
    fn explains(&self, raw: &Instruction, r: Register, writes: bool) -> bool {
        let n = r.full_register().number();
        let explicit = (0..raw.op_count()).any(|i| {
            raw.op_kind(i) == OpKind::Register
                && raw.op_register(i).full_register() == r.full_register()
        });
        let addressing = raw.memory_base().full_register() == r.full_register()
            || raw.memory_index().full_register() == r.full_register();
        explicit || addressing && !writes || home(n) == Home::Host(r.full_register())
    }

    fn access(
        insn: &Insn,
        site: Site,
        used: &[iced_x86::UsedMemory],
    ) -> Option<(Address, Use, usize)> {
        let [used] = used else { return None };
        let raw = &insn.raw;
        let address = Address::of(insn, site.next)?;
        if !address.is_plain() {
            return None;
        }
        // The bit offset is added before the segment's base, which is not what the host does if the sum of
        // the two wraps around.
        let wraps = address.is_narrow() && address.has_segment() && BitOffset::of(raw).is_some();
        let size = used.memory_size().size();
        if wraps || !(1..=64).contains(&size) {
            return None;
        }
        let atomic = insn.lock() || raw.mnemonic() == Mnemonic::Xchg;
        let usage = match used.access() {
            _ if atomic => Use::Atomic,
            OpAccess::Read => Use::Read,
            // A conditional load is carried out whatever the condition.
            OpAccess::CondRead => Use::Read,
            OpAccess::Write | OpAccess::ReadWrite => Use::Write,
            // CMPXCHG writes in any case, masked stores only some bytes.
            OpAccess::ReadCondWrite | OpAccess::CondWrite => Use::Write,
            _ => return None,
        };
        Some((address, usage, size))
    }

    fn rename(&mut self, i: u32, r: Register, access: OpAccess) -> Option<()> {
        if is_renamed_nowhere(r) {
            return Some(());
        }
        if !r.is_gpr() {
            return None;
        }
        if is_high_byte(r) {
            self.legacy_registers_only = true;
            if r == Register::CH {
                // Its register has no second byte that could be named; RCX has.
                self.in_ch = true;
                return self.memory.is_none().then_some(());
            }
            return Some(());
        }
        if r == Register::CL && i > 0 && is_shift(self.insn.mnemonic()) {
            if self.second.is_some() || self.memory.is_some() {
                return None;
            }
            self.count_in_cl = true;
            return Some(());
        }
        let writes = !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None);
        // A write of 32 bits replaces all 64.
        let replaced = access == OpAccess::Write && r.size() >= 4 && replaces(&self.insn);
        let renamed = match home(r.full_register().number()) {
            Home::Host(h) => sized(h, r),
            Home::Spilled(slot) => sized(self.spill(slot, !replaced, writes)?, r),
        };
        if i == 0 {
            self.insn.set_op0_register(renamed);
        } else {
            self.insn.set_op_register(i, renamed);
        }
        Some(())
    }

    fn spill(&mut self, slot: Slot, read: bool, written: bool) -> Option<Register> {
        for s in [&mut self.spilled, &mut self.second].into_iter().flatten() {
            if s.slot == slot {
                s.read |= read;
                s.written |= written;
                return Some(s.scratch);
            }
        }
        // A part of LEA's address may be in the register that gets the result.
        if self.spilled.is_none() && !(read && self.lea_uses(SCRATCH)) {
            self.spilled = Some(Spill {
                slot,
                scratch: SCRATCH,
                read,
                written,
            });
            return Some(SCRATCH);
        }
        if self.second.is_some() || self.memory.is_some() || self.count_in_cl || self.lea.is_some()
        {
            return None;
        }
        self.second = Some(Spill {
            slot,
            scratch: POINTER,
            read,
            written,
        });
        Some(POINTER)
    }

    fn lea_uses(&self, r: Register) -> bool {
        self.lea
            .as_ref()
            .is_some_and(|l| l.parts.iter().flatten().any(|(p, _)| *p == r))
    }

    /// LEA computes from renamed registers; its segment does not matter.
    fn rename_lea(&mut self, insn: &Insn, site: Site) -> Option<()> {
        let raw = &insn.raw;
        let mut parts = [None; 2];
        self.insn.set_segment_prefix(Register::None);
        if raw.is_ip_rel_memory_operand() {
            if raw.memory_base() != Register::RIP {
                return None;
            }
            let d = insn.disp as i64 + site.next;
            i32::try_from(d).ok()?;
            parts[0] = Some((POINTER, Slot::Page));
            set_memory(&mut self.insn, at(POINTER, d));
            self.lea = Some(Lea { parts });
            return Some(());
        }
        let mut free = [POINTER, SCRATCH].into_iter().zip(&mut parts);
        let mut rename = |r: Register| -> Option<Register> {
            if r == Register::None {
                return Some(r);
            }
            match home(r.full_register().number()) {
                Home::Host(h) => Some(sized(h, r)),
                Home::Spilled(s) => {
                    let (f, part) = free.next()?;
                    *part = Some((f, s));
                    Some(sized(f, r))
                }
            }
        };
        if raw.memory_base().is_gpr16() || raw.memory_index().is_gpr16() {
            return None;
        }
        let base = rename(raw.memory_base())?;
        let index = rename(raw.memory_index())?;
        self.insn.set_memory_base(base);
        self.insn.set_memory_index(index);
        fix_displacement(&mut self.insn);
        self.lea = Some(Lea { parts });
        Some(())
    }

    fn needs_no_rex(&self) -> bool {
        let legacy = |r: Register| {
            !matches!(
                r,
                Register::SPL | Register::BPL | Register::SIL | Register::DIL
            ) && r.full_register().number() < 8
                && r.size() != 8
        };
        (0..self.insn.op_count())
            .all(|i| self.insn.op_kind(i) != OpKind::Register || legacy(self.insn.op_register(i)))
            && self.lea.is_none()
    }
}

/// Registers that are the host's of the same name.
fn is_renamed_nowhere(r: Register) -> bool {
    r.is_vector_register() || r.is_k() || r.is_mm() || r.is_st()
}

fn is_shift(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Shl | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

/// Whether the instruction writes its first operand whatever that was.
fn replaces(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Lea
    )
}

/// A base register may need a displacement where the guest's did not; the encoder finds the size.
fn fix_displacement(i: &mut Instruction) {
    if i.memory_base() != Register::None && i.memory_displ_size() == 0 {
        i.set_memory_displ_size(1);
    }
}

/// Gives the instruction a memory operand.
pub(crate) fn set_memory(i: &mut Instruction, m: iced_x86::MemoryOperand) {
    i.set_segment_prefix(Register::None);
    i.set_memory_base(m.base);
    i.set_memory_index(m.index);
    i.set_memory_index_scale(m.scale);
    i.set_memory_displacement64(m.displacement as u64);
    i.set_memory_displ_size(if m.base == Register::None { 4 } else { 1 });
}

/// The form with a ModRM byte where the short one implies an accumulator or an absolute address.
/// `None` if this form is not known.
fn general_accumulator(i: &Instruction) -> Option<Code> {
    use Code as C;
    Some(match i.code() {
        // The host's operand is at [RCX + …], which these cannot name.
        C::Mov_AL_moffs8 => C::Mov_r8_rm8,
        C::Mov_AX_moffs16 => C::Mov_r16_rm16,
        C::Mov_EAX_moffs32 => C::Mov_r32_rm32,
        C::Mov_RAX_moffs64 => C::Mov_r64_rm64,
        C::Mov_moffs8_AL => C::Mov_rm8_r8,
        C::Mov_moffs16_AX => C::Mov_rm16_r16,
        C::Mov_moffs32_EAX => C::Mov_rm32_r32,
        C::Mov_moffs64_RAX => C::Mov_rm64_r64,
        c => crate::legacy::general(c)?,
    })
}
