//! Which accesses of a block share a check.
//!
//! Accesses form a *group* when their addresses differ by constants: same base, index and segment,
//! registers changed in between by nothing but additions of constants and copies. If all of a group's
//! bytes are in one page with the rights that the most demanding access needs, one check in front of
//! the first access is good for all. It says nothing about faults: where it fails, the code goes on in
//! another translation that checks each access by itself.
//!
//! In 32-bit code everything is modulo 2^32. Where a group is checked, its lowest byte is computed from the
//! address of the first access without wrapping around; if that is not below 2^32 or not above 0, it is not in
//! the page of the others, and the check fails.

use anykvm_cpu::Insn;
use anykvm_cpu::decode::SEG_CHECKED;
use anykvm_cpu::state::{reg, seg};
use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use crate::legacy::Word;
use crate::memory::{Address, Use};
use crate::plan::Plan;
use crate::regs::{Home, home};
use crate::simple;
use crate::translate::Site;
use crate::vectors::may_need_alignment;

/// Most bytes from the first to the last of a group. The longer, the more often a group crosses a page.
const SPAN: i64 = 512;
/// Most groups of several accesses in a block: each needs a place for its addend.
pub const GROUPS: usize = 16;

/// Accesses that share a check.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    key: Key,
    /// The first byte and the one behind the last, relative to what `key` names.
    pub low: i64,
    pub high: i64,
    /// The strongest need.
    pub usage: Use,
    /// The lowest byte is to be a multiple of this.
    pub align: i64,
    /// Which byte is the multiple, while the group grows.
    aligned_at: i64,
    /// Indices of the first and the last instruction.
    pub first: usize,
    pub last: usize,
    /// Its number among the groups of several accesses.
    pub number: usize,
}

impl Group {
    /// Whether there is more than one access.
    pub fn is_shared(&self) -> bool {
        self.first != self.last
    }
    /// Bytes to be checked.
    pub fn span(&self) -> usize {
        (self.high - self.low) as usize
    }

    /// Takes an access in, if it fits.
    fn join(&mut self, k: usize, access: &Access, offset: i64) -> bool {
        let low = self.low.min(offset);
        let high = self.high.max(offset + access.size);
        let needed = access.alignment();
        let fits = (offset - self.aligned_at) % needed.min(self.align) == 0;
        if high - low > SPAN || !fits {
            return false;
        }
        if needed > self.align {
            (self.align, self.aligned_at) = (needed, offset);
        }
        (self.low, self.high, self.last) = (low, high, k);
        if access.usage != Use::Read {
            self.usage = Use::Write;
        }
        true
    }

    /// Lets it begin at the multiple that some access has to be at.
    fn align(&mut self) {
        self.low -= (self.low - self.aligned_at).rem_euclid(self.align);
    }
}

/// An access: which group, and where relative to the group's beginning.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    pub group: usize,
    pub offset: i64,
    displacement: i64,
    size: i64,
}

impl Member {
    /// Whether it is this access of its instruction.
    pub fn is(&self, address: &Address, size: usize) -> bool {
        self.displacement == address.displacement() && self.size == size as i64
    }
}

/// The groups of a block.
#[derive(Debug, Default)]
pub(crate) struct Sharing {
    groups: Vec<Group>,
    /// For each instruction its access.
    members: Vec<Option<Member>>,
    /// The registers behind the last instruction.
    end: Registers,
}

/// How a group's lowest byte moves if the block is executed again and again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moving {
    /// Where it is when the block begins.
    pub address: Address,
    /// How far it is from there the next time.
    pub step: i64,
}

/// The memory operand of an instruction.
struct Access {
    base: u8,
    index: u8,
    scale: u8,
    segment: u8,
    displacement: i64,
    size: i64,
    usage: Use,
    aligned: bool,
}

impl Access {
    /// That of an entry of the stack.
    fn stack(word: Word, base: u8, displacement: i64, usage: Use) -> Self {
        Self {
            base,
            index: reg::ZERO,
            scale: 0,
            segment: seg::SS,
            displacement,
            size: word.bytes(),
            usage,
            aligned: false,
        }
    }

    fn operand(insn: &Insn, site: Site, size: usize, usage: Use, aligned: bool) -> Option<Self> {
        let next = if insn.base == reg::RIP { site.next } else { 0 };
        let (mask, displacement) = match Word::of(insn) {
            Word::Quad => (u64::MAX, insn.disp as i64 + next),
            Word::Double => (0xffff_ffff, i64::from(insn.disp as i32)),
        };
        // In 32-bit code FS and GS have tags of their own, which windows know nothing of.
        let own_tag = Word::of(insn) == Word::Double && matches!(insn.seg, seg::FS | seg::GS);
        let usual = insn.seg & SEG_CHECKED == 0 && insn.addr_mask == mask && !own_tag;
        usual.then_some(Self {
            base: insn.base,
            index: insn.index,
            scale: insn.scale,
            segment: insn.seg,
            displacement,
            size: size as i64,
            usage,
            aligned,
        })
    }

    /// What the translator of this instruction will check, if it checks one access.
    fn of(insn: &Insn, site: Site, plan: Option<&Plan>) -> Option<Self> {
        use Code as C;
        let raw = &insn.raw;
        let word = Word::of(insn);
        let memory = raw.op0_kind() == OpKind::Memory;
        let pushed = || Some(Self::stack(word, reg::RSP, -word.bytes(), Use::Write));
        match raw.code() {
            C::Push_r64 | C::Pushq_imm8 | C::Pushq_imm32 | C::Call_rel32_64 => pushed(),
            C::Push_r32 | C::Pushd_imm8 | C::Pushd_imm32 | C::Call_rel32_32 => pushed(),
            C::Call_rm64 | C::Call_rm32 if !memory => pushed(),
            C::Pop_r64 | C::Retnq | C::Retnq_imm16 | C::Pop_r32 | C::Retnd | C::Retnd_imm16 => {
                Some(Self::stack(word, reg::RSP, 0, Use::Read))
            }
            C::Leaveq | C::Leaved => Some(Self::stack(word, reg::RBP, 0, Use::Read)),
            C::Jmp_rm64 | C::Div_rm64 | C::Idiv_rm64 if memory => {
                Self::operand(insn, site, 8, Use::Read, false)
            }
            C::Jmp_rm32 | C::Div_rm32 | C::Idiv_rm32 if memory => {
                Self::operand(insn, site, 4, Use::Read, false)
            }
            _ => {
                let plan = plan.filter(|p| p.bits.is_none())?;
                let (_, usage, size) = plan.memory?;
                let aligned = must_be_aligned(raw, size, usage);
                Self::operand(insn, site, size, usage, aligned)
            }
        }
    }

    fn alignment(&self) -> i64 {
        if self.aligned { self.size } else { 1 }
    }
}

/// Whether an access is left to the interpreter unless its address is a multiple of its size.
pub(crate) fn must_be_aligned(raw: &Instruction, size: usize, usage: Use) -> bool {
    // A locked access that crosses a cache line is slow on the host or forbidden there.
    usage == Use::Atomic || size >= 16 && may_need_alignment(raw)
}

/// What a register held at some time in the block, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Symbol(u32);

const NOTHING: Symbol = Symbol(0);
const PAGE: Symbol = Symbol(1);

/// What an address is made of besides a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    base: Symbol,
    index: Symbol,
    scale: u8,
    /// What FS or GS held at some time; [`NOTHING`] for the other segments.
    segment: Symbol,
}

/// Each register as a symbol plus a constant.
#[derive(Debug)]
struct Registers {
    values: [(Symbol, i64); 16],
    /// What the bases of FS and GS are.
    segments: [Symbol; 2],
    next: u32,
}

impl Default for Registers {
    fn default() -> Self {
        Self::new()
    }
}

impl Registers {
    fn new() -> Self {
        Self {
            values: std::array::from_fn(|n| (Symbol(n as u32 + 2), 0)),
            segments: [Symbol(18), Symbol(19)],
            next: 20,
        }
    }

    /// The register that a symbol says is what it was at first, and how much has been added to it since.
    fn step(&self, symbol: Symbol) -> Option<(u8, i64)> {
        match symbol {
            NOTHING => Some((reg::ZERO, 0)),
            PAGE => Some((reg::RIP, 0)),
            Symbol(n) => {
                let n = n.checked_sub(2).filter(|n| *n < 16)?;
                let (now, step) = self.values[n as usize];
                (now == symbol).then_some((n as u8, step))
            }
        }
    }

    fn forget(&mut self, n: usize) {
        self.values[n & 15] = (Symbol(self.next), 0);
        self.next += 1;
    }

    fn value(&self, code: u8) -> (Symbol, i64) {
        match code {
            reg::ZERO => (NOTHING, 0),
            reg::RIP => (PAGE, 0),
            n => self.values[usize::from(n) & 15],
        }
    }

    /// An access's key, and its offset from it.
    fn locate(&self, access: &Access) -> Option<(Key, i64)> {
        let (base, b) = self.value(access.base);
        let (index, i) = self.value(access.index);
        let offset = b
            .wrapping_add(i << access.scale)
            .wrapping_add(access.displacement);
        // Sums with the bounds of a group must fit into a displacement.
        let moderate = |n: i64| n.unsigned_abs() < 1 << 30;
        let key = Key {
            base,
            index,
            scale: if index == NOTHING { 0 } else { access.scale },
            segment: match access.segment & 7 {
                seg::FS => self.segments[0],
                seg::GS => self.segments[1],
                _ => NOTHING,
            },
        };
        (moderate(offset) && moderate(access.displacement) && moderate(b) && moderate(i))
            .then_some((key, offset))
    }

    fn add(&mut self, n: usize, by: i64) {
        let v = &mut self.values[n & 15].1;
        *v = v.wrapping_add(by);
    }

    /// A register becomes what operand 1 is.
    fn copy(&mut self, n: usize, raw: &Instruction) {
        let from = raw.op1_register().full_register().number();
        self.values[n] = self.values[from & 15];
    }

    /// What an instruction does to the registers.
    fn follow(
        &mut self,
        insn: &Insn,
        site: Site,
        plan: Option<&Plan>,
        factory: &mut InstructionInfoFactory,
    ) {
        use Code as C;
        let raw = &insn.raw;
        let rsp = usize::from(reg::RSP);
        let word = Word::of(insn);
        let double = word == Word::Double;
        let register = raw.op0_kind() == OpKind::Register;
        let n = raw.op0_register().full_register().number() & 15;
        let copies = register && raw.op1_kind() == OpKind::Register;
        match raw.code() {
            C::Mov_r64_rm64 | C::Mov_rm64_r64 if copies => self.copy(n, raw),
            C::Mov_r32_rm32 | C::Mov_rm32_r32 if double && copies => self.copy(n, raw),
            C::Lea_r64_m if insn.index == reg::ZERO && insn.addr_mask == u64::MAX => {
                let (symbol, offset) = self.value(insn.base);
                let next = if insn.base == reg::RIP { site.next } else { 0 };
                self.values[n] = (symbol, offset.wrapping_add(insn.disp as i64 + next));
            }
            C::Lea_r32_m if double && insn.index == reg::ZERO && insn.addr_mask == 0xffff_ffff => {
                let (symbol, offset) = self.value(insn.base);
                let by = i64::from(insn.disp as i32);
                self.values[n] = (symbol, offset.wrapping_add(by));
            }
            C::Add_rm64_imm8 | C::Add_rm64_imm32 | C::Add_RAX_imm32 if register => {
                self.add(n, insn.imm as i64);
            }
            C::Sub_rm64_imm8 | C::Sub_rm64_imm32 | C::Sub_RAX_imm32 if register => {
                self.add(n, (insn.imm as i64).wrapping_neg());
            }
            C::Add_rm32_imm8 | C::Add_rm32_imm32 | C::Add_EAX_imm32 if double && register => {
                self.add(n, i64::from(insn.imm as i32));
            }
            C::Sub_rm32_imm8 | C::Sub_rm32_imm32 | C::Sub_EAX_imm32 if double && register => {
                self.add(n, -i64::from(insn.imm as i32));
            }
            C::Inc_rm64 if register => self.add(n, 1),
            C::Dec_rm64 if register => self.add(n, -1),
            C::Inc_rm32 | C::Inc_r32 if double && register => self.add(n, 1),
            C::Dec_rm32 | C::Dec_r32 if double && register => self.add(n, -1),
            C::Push_r64 | C::Pushq_imm8 | C::Pushq_imm32 | C::Push_rm64 => self.add(rsp, -8),
            C::Push_r32 | C::Pushd_imm8 | C::Pushd_imm32 | C::Push_rm32 => self.add(rsp, -4),
            C::Pop_r64 | C::Pop_r32 => {
                self.add(rsp, word.bytes());
                self.forget(n);
            }
            C::Leaveq | C::Leaved => {
                let (symbol, offset) = self.values[usize::from(reg::RBP)];
                self.values[rsp] = (symbol, offset.wrapping_add(word.bytes()));
                self.forget(reg::RBP.into());
            }
            _ if plan.is_some() => {
                let changed = plan.map_or(0, |p| p.changed);
                let registers = (0..16).filter(|n| changed & 1 << n != 0);
                registers.for_each(|n| self.forget(n));
            }
            _ if raw.is_jcc_short_or_near() => {}
            _ if simple::level(raw).is_none() && !is_known(raw) => {
                // The interpreter's: whatever it does.
                (0..16).for_each(|n| self.forget(n));
                self.segments = [Symbol(self.next), Symbol(self.next + 1)];
                self.next += 2;
            }
            _ => {
                for used in factory.info(raw).used_registers() {
                    let reads = matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
                    if used.register().is_gpr() && !reads {
                        self.forget(used.register().full_register().number());
                    }
                }
            }
        }
    }
}

/// Whether an instruction without a level is translated, too.
fn is_known(raw: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        raw.mnemonic(),
        M::Div | M::Idiv | M::Cmpxchg8b | M::Cmpxchg16b | M::Nop | M::Endbr64
    )
}

impl Sharing {
    /// Nothing is shared.
    pub fn none() -> Self {
        Self::default()
    }

    /// Finds the groups of a block that begins `start` bytes into its page. `plans` are those of its
    /// instructions that have one.
    pub fn of(
        insns: &[Insn],
        plans: &[Option<Plan>],
        start: i64,
        factory: &mut InstructionInfoFactory,
    ) -> Self {
        let mut registers = Registers::new();
        let mut groups: Vec<Group> = Vec::new();
        let mut members = Vec::with_capacity(insns.len());
        let mut at = start;
        for (k, insn) in insns.iter().enumerate() {
            let next = at + i64::from(insn.len);
            let site = Site { k, at, next };
            let plan = plans.get(k).and_then(Option::as_ref);
            let member = Access::of(insn, site, plan)
                .and_then(|access| Some((registers.locate(&access)?, access)))
                .map(|((key, offset), access)| Member {
                    group: assign(&mut groups, k, key, offset, &access),
                    offset,
                    displacement: access.displacement,
                    size: access.size,
                });
            members.push(member);
            registers.follow(insn, site, plan, factory);
            at = next;
        }
        let mut number = 0;
        for group in &mut groups {
            group.align();
            group.number = number;
            number += usize::from(group.is_shared());
        }
        let mut sharing = Self {
            groups,
            members,
            end: registers,
        };
        sharing.dissolve();
        for m in sharing.members.iter_mut().flatten() {
            m.offset -= sharing.groups[m.group].low;
        }
        sharing
    }

    /// Takes apart the groups for which there is no place.
    fn dissolve(&mut self) {
        let groups = &self.groups;
        for member in &mut self.members {
            if member
                .is_some_and(|m| groups[m.group].is_shared() && groups[m.group].number >= GROUPS)
            {
                *member = None;
            }
        }
    }

    /// The access of an instruction, and its group.
    pub fn find(&self, k: usize) -> Option<(Member, &Group)> {
        let member = (*self.members.get(k)?)?;
        Some((member, self.groups.get(member.group)?))
    }

    /// How a group moves, if it does so by a constant.
    pub fn moving(&self, group: usize) -> Option<Moving> {
        let group = self.groups.get(group)?;
        let key = group.key;
        if key.segment != NOTHING {
            return None;
        }
        let (base, by) = self.end.step(key.base)?;
        let (index, index_by) = self.end.step(key.index)?;
        let step = index_by.checked_mul(1 << key.scale)?.checked_add(by)?;
        Some(Moving {
            address: Address::sum(base, index, key.scale, group.low),
            step,
        })
    }

    /// A host register in which the block leaves another number than it finds, by a constant.
    pub fn counter(&self) -> Option<(Register, i64)> {
        let steps = (0..16).filter_map(|n| self.end.step(Symbol(n + 2)));
        let mut moderate = steps.filter(|(_, step)| *step != 0 && step.unsigned_abs() <= 4096);
        moderate.find_map(|(n, step)| match home(n.into()) {
            Home::Host(r) => Some((r, step)),
            Home::Spilled(_) => None,
        })
    }

    /// Whether some group's check comes before an instruction and is relied on behind it.
    pub fn spans(&self, k: usize) -> bool {
        self.groups.iter().any(|g| g.first <= k && g.last > k)
    }
}

/// The group an access belongs to; a new one if it fits none.
fn assign(groups: &mut Vec<Group>, k: usize, key: Key, offset: i64, access: &Access) -> usize {
    let newest = groups.iter_mut().enumerate().rev();
    for (n, group) in newest.filter(|(_, g)| g.key == key) {
        if group.join(k, access, offset) {
            return n;
        }
    }
    groups.push(Group {
        key,
        low: offset,
        high: offset + access.size,
        usage: access.usage,
        align: access.alignment(),
        aligned_at: offset,
        first: k,
        last: k,
        number: 0,
    });
    groups.len() - 1
}
