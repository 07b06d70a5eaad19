//! Loops of one block, whose accesses move by constants: they go on without checks.
//!
//! Where such a loop has been through its block, and all that its windows say is known, it is computed how
//! often it may go through again before an access leaves its window. For so many times it goes through a second
//! copy of the code, which has no checks of these accesses and does not look at requests; then through the
//! first one again. [`MOST`] bounds how long a request waits.
//!
//! Windows change only when checks miss them, or outside translated code. The copy has no such checks of the same
//! windows, and it is not resumed once it has been left.

use iced_x86::{Code, IcedError, Instruction, InstructionInfoFactory, Register};

use anykvm_cpu::Insn;

use crate::asm::{Asm, Hole, indexed, slot};
use crate::branch;
use crate::flags::{Flags, Recipe};
use crate::legacy::Word;
use crate::memory::test_alignment;
use crate::regs::{POINTER, SCRATCH};
use crate::shared::Slot;
use crate::sharing::Moving;
use crate::simple;
use crate::translate::{Block, Manner, Site};
use crate::window;

/// Most times that a loop goes through its copy without looking at requests.
const MOST: i64 = 128;
/// Fewest times for which that is worth while.
const FEWEST: u32 = 4;
/// Most bytes that an access moves.
const STEP: i64 = 512;

/// The branch that closes a loop, and what is known of the loop there.
pub(crate) struct Again {
    taken: Hole,
    flags: Flags,
    recipe: Recipe,
    /// A register, and what is added to it each time.
    counter: (Register, i64),
    hoisted: Vec<Hoisted>,
}

/// The copy while it is emitted.
pub(crate) struct Repeating {
    /// Where it begins, with the flags to be made by this recipe.
    start: usize,
    recipe: Recipe,
    /// The register whose value says whether to go on.
    counter: Register,
}

/// Emits the branch, with a condition's number, that leads back to the block's beginning, if that is this module's
/// matter. The flags are in the host's. What follows the loop is emitted, too.
pub(crate) fn close(b: &mut Block, condition: u8, site: Site) -> Result<bool, IcedError> {
    if let Some(repeating) = b.repeating.take() {
        let out = b.a.jcc(condition ^ 1);
        let flags = b.flags.clone();
        if b.flags.recipe() == Some(&repeating.recipe) {
            b.flags.release(&mut b.a)?;
            b.a.emit(Code::Cmp_r64_rm64, repeating.counter, slot(Slot::LoopEnd))?;
            let on = b.a.jne();
            b.a.fill(on, repeating.start);
        }
        b.flags.restore(&mut b.a)?;
        b.link_to(b.start)?;
        b.a.land(out);
        b.flags = flags;
        b.repeating = Some(repeating);
        branch::go_on(b, site.next)?;
        return Ok(true);
    }
    let unfit = b.by_count || b.x87 || b.interpreted || b.word != Word::Quad;
    if unfit || b.windowed.is_empty() {
        return Ok(false);
    }
    let hoisted = hoistable(b);
    let (Some(recipe), Some(counter), false) = (
        b.flags.recipe().cloned(),
        b.sharing.counter(),
        hoisted.is_empty(),
    ) else {
        return Ok(false);
    };
    b.again = Some(Again {
        taken: b.a.jcc(condition),
        flags: b.flags.clone(),
        recipe,
        counter,
        hoisted,
    });
    branch::go_on(b, site.next)?;
    Ok(true)
}

/// Emits what follows the branch that closes the loop, behind the block.
pub(crate) fn emit(
    b: &mut Block,
    insns: &[Insn],
    manner: &Manner,
    factory: &mut InstructionInfoFactory,
) -> Result<(), IcedError> {
    let Some(again) = b.again.take() else {
        return Ok(());
    };
    b.a.land(again.taken);
    b.flags = again.flags;
    let (counter, by) = again.counter;
    b.flags.release(&mut b.a)?;
    let flags = b.flags.clone();
    let mut fails = Vec::new();
    b.a.emit(Code::Mov_rm64_imm32, slot(Slot::Probe0), MOST - 1)?;
    for hoisted in &again.hoisted {
        let (window, moving) = (hoisted.window, &hoisted.moving);
        moving.address.compute(&mut b.a, SCRATCH, 0)?;
        window::compare(&mut b.a, window)?;
        fails.push(b.a.jcc(3));
        fails.extend(test_alignment(&mut b.a, hoisted.align)?);
        if moving.step != 0 {
            limit(&mut b.a, window, moving.step)?;
        }
    }
    b.a.load(POINTER, slot(Slot::Probe0))?;
    b.a.emit(Code::Cmp_rm64_imm8, POINTER, FEWEST - 1)?;
    fails.push(b.a.jcc(2));
    // Once more than the number there.
    let times = Instruction::with3(Code::Imul_r64_rm64_imm32, POINTER, POINTER, by as i32)?;
    b.a.put(&times)?;
    b.a.lea(POINTER, indexed(counter, POINTER, 1, by))?;
    b.a.store(slot(Slot::LoopEnd), POINTER)?;
    b.repeating = Some(Repeating {
        start: b.a.here(),
        recipe: again.recipe,
        counter,
    });
    if let Some(executions) = manner.executions {
        b.count_execution(executions)?;
    }
    b.plans = simple::plans(insns, b.start, factory);
    b.hoisted = again.hoisted.iter().map(|h| (h.group, h.window)).collect();
    b.emit_all(insns, manner)?;
    b.repeating = None;
    b.flags = flags;
    for fail in fails {
        b.a.land(fail);
    }
    b.flags.restore(&mut b.a)?;
    b.link_to(b.start)
}

/// A group that needs no check in the copy.
#[derive(Clone, Copy, Debug)]
struct Hoisted {
    group: usize,
    window: u32,
    moving: Moving,
    align: i64,
}

/// The groups that need no checks in the copy.
fn hoistable(b: &Block) -> Vec<Hoisted> {
    let windowed = b.windowed.iter();
    let hoistable = windowed.filter_map(|&(group, window, align)| {
        let moving = b.sharing.moving(group)?;
        let fits = moving.step.abs() <= STEP && moving.step % align == 0;
        fits.then_some(Hoisted {
            group,
            window,
            moving,
            align,
        })
    });
    hoistable.collect()
}

/// Makes the number in [`Slot::Probe0`] not greater than how often the access that [`window::compare`] has found in
/// a window may move on.
fn limit(a: &mut Asm, window: u32, step: i64) -> Result<(), IcedError> {
    window::room(a, window, step > 0)?;
    let inverse = (1 << 16) / step.unsigned_abs() as i32;
    let divided = Instruction::with3(Code::Imul_r64_rm64_imm32, POINTER, POINTER, inverse)?;
    a.put(&divided)?;
    a.emit(Code::Shr_rm64_imm8, POINTER, 16u32)?;
    a.emit(Code::Cmp_r64_rm64, POINTER, slot(Slot::Probe0))?;
    let more = a.jcc(3);
    a.store(slot(Slot::Probe0), POINTER)?;
    a.land(more);
    Ok(())
}
