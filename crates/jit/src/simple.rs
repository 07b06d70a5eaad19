//! Instructions that compute and go on: the guest's own instruction with its operands renamed.

use anykvm_cpu::Insn;
use iced_x86::{IcedError, Instruction, InstructionInfoFactory, Mnemonic, OpKind, RflagsBits};

use crate::asm::slot;
use crate::flags::{Flags, recipe, wants_operand};
use crate::memory::Bytes;
use crate::plan::{Plan, set_memory};
use crate::regs::{GUEST_RCX, POINTER, bit};
use crate::shared::Slot;
use crate::sharing::must_be_aligned;
use crate::translate::{Block, Done, Site};
use crate::vectors::Level;
use crate::{divide, exchange, stack, strings, x87};

pub(crate) const STATUS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// Emits an instruction.
pub(crate) fn emit(
    b: &mut Block,
    insn: &Insn,
    site: Site,
    later: &[Insn],
) -> Result<Done, IcedError> {
    use Mnemonic as M;
    match insn.raw.mnemonic() {
        M::Push => stack::push(b, insn, site),
        M::Pop => stack::pop(b, insn, site),
        M::Leave => stack::leave(b, insn, site),
        M::Cmpxchg8b | M::Cmpxchg16b => exchange::emit(b, insn, site),
        M::Div | M::Idiv => divide::emit(b, insn, site),
        M::Movsb | M::Movsw | M::Movsd | M::Movsq | M::Stosb | M::Stosw | M::Stosd | M::Stosq
            if insn.raw.is_string_instruction() =>
        {
            strings::emit(b, insn, site)
        }
        M::Nop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchnta
        | M::Prefetchw => Ok(Done::Next),
        _ => general(b, insn, site, later),
    }
}

/// How the instructions of a block that begins `start` bytes into its page are renamed that [`general`]
/// translates.
pub(crate) fn plans(
    insns: &[Insn],
    start: i64,
    factory: &mut InstructionInfoFactory,
) -> Vec<Option<Plan>> {
    let mut at = start;
    let plan = |(k, insn): (usize, &Insn)| {
        let next = at + i64::from(insn.len);
        let site = Site { k, at, next };
        at = next;
        level(&insn.raw).and_then(|_| Plan::of(insn, site, factory))
    };
    insns.iter().enumerate().map(plan).collect()
}

/// The vector registers an instruction needs, if it is one that [`general`] may translate.
pub(crate) fn level(raw: &Instruction) -> Option<Level> {
    if is_plain(raw.mnemonic()) {
        Some(Level::None)
    } else {
        Level::of(raw)
    }
}

/// Instructions that only compute, whose implicit operands (if any) are registers that have the
/// same home as in the guest, and that raise no exception but by their memory operand.
fn is_plain(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Lea
            | M::Add
            | M::Adc
            | M::Sub
            | M::Sbb
            | M::And
            | M::Or
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Not
            | M::Neg
            | M::Inc
            | M::Dec
            | M::Imul
            | M::Mul
            | M::Shl
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Tzcnt
            | M::Lzcnt
            | M::Popcnt
            | M::Bswap
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
            | M::Lahf
            | M::Sahf
            | M::Clc
            | M::Stc
            | M::Cmc
            | M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
            | M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
            | M::Lfence
            | M::Mfence
            | M::Sfence
    )
}

/// Whether a shift of a register by a constant leaves flags that a memory access will ask for before
/// the next instruction replaces them.
fn flags_cross_a_check(later: &[Insn]) -> bool {
    for insn in later {
        if insn.raw.op_kinds().any(|k| k == OpKind::Memory)
            || matches!(
                insn.raw.mnemonic(),
                Mnemonic::Push | Mnemonic::Pop | Mnemonic::Call | Mnemonic::Ret | Mnemonic::Leave
            )
        {
            return insn.raw.mnemonic() != Mnemonic::Lea;
        }
        if overwrites_flags(&insn.raw) {
            return false;
        }
    }
    false
}

/// Whether all status flags after the instruction are independent of those before it. Instructions that
/// leave flags undefined may leave them unchanged, so they do not count.
fn overwrites_flags(i: &Instruction) -> bool {
    use Mnemonic as M;
    let defined = matches!(
        i.mnemonic(),
        M::Add | M::Sub | M::And | M::Or | M::Xor | M::Cmp | M::Test | M::Neg
    );
    defined && i.rflags_read() & STATUS == 0
}

fn general(b: &mut Block, insn: &Insn, site: Site, later: &[Insn]) -> Result<Done, IcedError> {
    let raw = &insn.raw;
    let Some(plan) = b.plans.get_mut(site.k).and_then(Option::take) else {
        return Ok(Done::Unsupported);
    };
    let mut out = plan.insn;
    let mut checked = None;
    if let Some((address, usage, size)) = &plan.memory {
        let aligned = must_be_aligned(raw, *size, *usage);
        checked = Some(match plan.bits {
            Some(offset) => {
                let bytes = Bytes::of_access(*size, *usage, aligned);
                b.check_bit_string(address, offset, &bytes, site)?
            }
            None => b.check_aligned(address, *size, *usage, aligned, site)?,
        });
    }
    let reads_flags = raw.rflags_read() & STATUS != 0;
    let changes_flags = raw.rflags_modified() & STATUS != 0;
    let replaces_flags = overwrites_flags(raw);
    if (reads_flags || changes_flags) && !replaces_flags {
        b.flags.restore(&mut b.a)?;
    }
    if !changes_flags {
        let exit = checked.as_ref().map(|c| c.exit);
        b.before_write(plan.written, exit, false)?;
    }
    if let Some(checked) = &checked {
        let whole = plan.spilled.is_some() || plan.legacy_registers_only;
        let operand = b.operand(checked, whole)?;
        set_memory(&mut out, operand);
    } else if let Some(lea) = &plan.lea {
        lea.emit(b)?;
    }
    if plan.count_in_cl || plan.in_ch {
        b.a.mov(POINTER, GUEST_RCX)?;
    }
    for s in plan.spills().filter(|s| s.read) {
        b.a.load(s.scratch, slot(s.slot))?;
    }
    let kept = changes_flags
        && !plan.in_ch
        && plan.memory.is_none()
        && wants_operand(&out)
        && flags_cross_a_check(later);
    if kept {
        let full = out.op0_register().full_register();
        b.a.store(slot(Slot::Operand), full)?;
    }
    if let Some(checked) = &checked {
        b.access(checked);
    }
    b.a.put(&out)?;
    if plan.in_ch && plan.written & bit(GUEST_RCX) != 0 {
        b.a.mov(GUEST_RCX, POINTER)?;
    }
    for s in plan.spills().filter(|s| s.written) {
        b.a.store(slot(s.slot), s.scratch)?;
    }
    x87::note(b, insn, site)?;
    if changes_flags {
        b.flags = Flags::Host(if (replaces_flags || kept) && !plan.in_ch {
            recipe(&out, kept)
        } else {
            None
        });
    }
    if let Some(checked) = checked {
        b.resume_here(checked.exit);
    }
    Ok(Done::Next)
}
