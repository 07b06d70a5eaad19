//! Cases of many instructions: blocks with forward branches, bounded loops, calls and returns. Instructions
//! are those of single cases; what would end nearly every long case soon is rare.

use super::{Draft, Generator};
use crate::case::{CODE, Case, DATA, MAX_CODE, PAGE, State, selector};
use crate::random::Random;
use anykvm_cpu::state::rflags;
use iced_x86::{FlowControl, Instruction, Mnemonic as M, Register};

/// Most instructions of a program, without those that make it one.
const MOST: u64 = 30;
/// No more code than this before the functions, and before the end.
const MAIN: usize = MAX_CODE - 320;
const END: usize = MAX_CODE - 80;
/// A branch with a displacement of 8 bits gets its target before this many bytes.
const NEAR: usize = 60;

/// Where an address in the code is missing.
#[derive(Clone, Copy)]
pub(super) struct Hole {
    at: usize,
    form: Form,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Relative8,
    Relative32,
    Absolute32,
}

/// A forward branch without a target.
struct Forward {
    hole: Hole,
    /// Instructions until its target.
    left: u64,
}

/// A loop without an end.
struct Loop {
    top: usize,
    counter: usize,
    left: u64,
}

#[derive(Default)]
struct Shape {
    forward: Vec<Forward>,
    loops: Vec<Loop>,
    /// Calls: each gets a function.
    calls: Vec<Hole>,
    /// Counters of all loops: functions may be called in them.
    counters: Vec<Register>,
}

impl Generator {
    /// A case of many instructions.
    pub(super) fn program(&mut self, set: usize) -> Case {
        let mut draft = self.draft(set);
        draft.program = true;
        let calm = self.calm(draft.case.state);
        draft.case.state = calm;
        draft.case.state.rip = match self.random.below(4) {
            // Branches and blocks across the pages' boundary.
            0 => CODE + PAGE as u64 - self.random.below(256),
            _ => CODE + 0x200 + self.random.below(0x800),
        };
        draft.fixed.push(Register::RSP);
        let mut shape = Shape::default();
        for _ in 0..1 + self.random.below(MOST) {
            if draft.case.code.len() > MAIN {
                break;
            }
            self.structure(&mut draft, &mut shape);
            self.add(&mut draft, set, MOST);
            shape.step(&mut draft, &mut self.random);
        }
        shape.close(&mut draft, &mut self.random);
        self.functions(&mut draft, &mut shape, set);
        draft.case
    }

    /// Registers with which little faults.
    fn calm(&mut self, mut s: State) -> State {
        let r = &mut self.random;
        s.gpr[4] = DATA + 0x800 + r.below(128) * 8;
        if !r.once_in(8) {
            s.mxcsr |= 0x1f80;
            s.mxcsr &= !0x3f;
            s.fcw |= 0x3f;
            s.fsw &= !0x80bf;
        }
        if s.selectors[1] == selector::CODE32 {
            s.selectors = s.selectors.map(|x| if x == 0 { selector::DATA } else { x });
        }
        if !r.once_in(32) {
            s.rflags &= !(rflags::TF | rflags::AC);
        }
        s
    }

    /// Whether an instruction belongs into a program at all.
    pub(super) fn fits_program(&mut self, draft: &Draft, insn: &Instruction) -> bool {
        const RARE: &[M] = &[
            M::Div,
            M::Idiv,
            M::Leave,
            M::Enter,
            M::Popf,
            M::Popfd,
            M::Popfq,
            M::Bound,
            M::Into,
            M::Lds,
            M::Les,
            M::Ldmxcsr,
            M::Vldmxcsr,
            M::Fldcw,
            M::Fldenv,
            M::Frstor,
            M::Fxrstor,
            M::Fxrstor64,
            M::Xrstor,
            M::Xrstor64,
        ];
        // Addresses of 16 bits do not reach the data.
        let narrow = (insn.memory_base().size() == 2 || insn.memory_index().size() == 2)
            || insn.memory_displ_size() == 2;
        let rare = !self.features.certain(insn.cpuid_features())
            || insn.op0_register().is_segment_register()
            || insn.is_privileged()
            || narrow
            || RARE.contains(&insn.mnemonic());
        if insn.flow_control() != FlowControl::Next && insn.flow_control() != FlowControl::Exception
            || insn.flow_control() == FlowControl::Exception && !self.random.once_in(100)
            || rare && !self.random.once_in(40)
        {
            return false;
        }
        let stack = insn.is_stack_instruction();
        let careless = self.random.once_in(30);
        let keeps = |full: Register| {
            let stack_pointer = full == Register::RSP && !stack && !careless;
            !stack_pointer && !draft.reserved.contains(&full)
        };
        let info = self.info.info(insn);
        info.used_registers().iter().all(|used| {
            use iced_x86::OpAccess::{CondRead, None, Read};
            matches!(used.access(), Read | CondRead | None)
                || keeps(used.register().full_register())
        })
    }

    /// Perhaps the beginning of a branch, a loop or a call.
    fn structure(&mut self, draft: &mut Draft, shape: &mut Shape) {
        let r = &mut self.random;
        match r.below(12) {
            0 | 1 if shape.forward.len() < 3 => self.forward(draft, shape),
            2 if shape.forward.is_empty() && shape.loops.len() < 2 => self.begin_loop(draft, shape),
            3 if shape.calls.len() < 3 => self.call(draft, shape),
            _ => {}
        }
    }

    fn forward(&mut self, draft: &mut Draft, shape: &mut Shape) {
        let r = &mut self.random;
        let mut left = r.below(4);
        let condition = r.below(16) as u8;
        let code = &mut draft.case.code;
        let form = match r.below(12) {
            0..4 => {
                code.push(0x70 | condition);
                Form::Relative8
            }
            4..9 => {
                code.extend([0x0f, 0x80 | condition]);
                Form::Relative32
            }
            9 => {
                // JRCXZ, JECXZ
                code.push(0xe3);
                Form::Relative8
            }
            10 => {
                code.push(0xe9);
                left = left.min(1);
                Form::Relative32
            }
            _ => return self.computed(draft, shape),
        };
        let hole = draft.hole(form);
        shape.forward.push(Forward { hole, left });
    }

    /// A jump by a register, a memory operand (pushed) or a return.
    fn computed(&mut self, draft: &mut Draft, shape: &mut Shape) {
        let r = self.scratch(draft);
        let (high, low) = (r >> 3 != 0, (r & 7) as u8);
        let hole = address_of(draft, r);
        let rex = if high { &[0x41][..] } else { &[] };
        let code = &mut draft.case.code;
        code.extend(rex);
        match self.random.below(3) {
            0 => code.extend([0xff, 0xe0 | low]),
            1 => code.extend([0x50 | low, 0xc3]),
            _ => {
                // PUSH; then JMP through the word above the new top of the stack, which stays.
                code.extend([0x50 | low, 0xff, 0x24, 0x24]);
            }
        }
        let left = self.random.below(2);
        shape.forward.push(Forward { hole, left });
    }

    /// A general register that is nobody's: not the stack's, not a counter.
    fn scratch(&mut self, draft: &mut Draft) -> usize {
        loop {
            let n = self.random.below(u64::from(draft.case.bits) / 4) as usize;
            let register = Register::RAX + n as u32;
            if register != Register::RSP && !draft.reserved.contains(&register) {
                draft.fixed.push(register);
                return n;
            }
        }
    }

    fn begin_loop(&mut self, draft: &mut Draft, shape: &mut Shape) {
        let counter = if self.random.once_in(2) && !draft.reserved.contains(&Register::RCX) {
            1
        } else {
            self.scratch(draft)
        };
        let times = match self.random.below(8) {
            0 => self.random.below(60) as u32,
            _ => self.random.below(5) as u32,
        };
        draft.load(counter, 1 + u64::from(times), 4);
        let register = Register::RAX + counter as u32;
        draft.fixed.push(register);
        draft.reserved.push(register);
        shape.counters.push(register);
        shape.loops.push(Loop {
            top: draft.case.code.len(),
            counter,
            left: 1 + self.random.below(6),
        });
    }

    fn call(&mut self, draft: &mut Draft, shape: &mut Shape) {
        if self.random.once_in(3) {
            let r = self.scratch(draft);
            let hole = address_of(draft, r);
            if r >> 3 != 0 {
                draft.case.code.push(0x41);
            }
            draft.case.code.extend([0xff, 0xd0 | (r & 7) as u8]);
            shape.calls.push(hole);
        } else {
            draft.case.code.push(0xe8);
            shape.calls.push(draft.hole(Form::Relative32));
        }
    }

    /// The called functions behind the end of the program; each may be called in a loop.
    fn functions(&mut self, draft: &mut Draft, shape: &mut Shape, set: usize) {
        if shape.calls.is_empty() {
            return;
        }
        draft.reserved.append(&mut shape.counters);
        // JMP over them.
        draft.case.code.push(0xe9);
        let over = draft.hole(Form::Relative32);
        for hole in std::mem::take(&mut shape.calls) {
            draft.lead_here(hole);
            // Addresses of the function's operands are set in it.
            draft.fixed.extend((0..16).map(|n| Register::RAX + n));
            for _ in 0..self.random.below(4) {
                if draft.case.code.len() < END {
                    if self.random.once_in(4) && shape.forward.is_empty() {
                        self.forward(draft, shape);
                    }
                    self.add(draft, set, MOST);
                    shape.step(draft, &mut self.random);
                }
            }
            shape.close(draft, &mut self.random);
            match self.random.below(6) {
                0 => draft
                    .case
                    .code
                    .extend([0xc2, 8 * self.random.below(3) as u8, 0]),
                _ => draft.case.code.push(0xc3),
            }
        }
        draft.lead_here(over);
    }
}

impl Draft {
    /// Room for an address.
    fn hole(&mut self, form: Form) -> Hole {
        let at = self.case.code.len();
        let size = if form == Form::Relative8 { 1 } else { 4 };
        self.case.code.extend(&[0; 4][..size]);
        Hole { at, form }
    }

    /// The address is that of the next instruction.
    fn lead_here(&mut self, hole: Hole) {
        let here = self.case.code.len();
        let distance = |size| (here - hole.at - size) as u32;
        let value = match hole.form {
            Form::Relative8 => distance(1),
            Form::Relative32 => distance(4),
            Form::Absolute32 => self.case.state.rip as u32 + here as u32,
        };
        let size = if hole.form == Form::Relative8 { 1 } else { 4 };
        self.case.code[hole.at..][..size].copy_from_slice(&value.to_le_bytes()[..size]);
    }

    /// Emits MOV of an immediate of 4 or 8 bytes to a general register; the result is where the immediate is.
    pub(super) fn load(&mut self, n: usize, value: u64, size: usize) -> usize {
        let rex = u8::from(size == 8) << 3 | (n >> 3) as u8;
        if rex != 0 {
            self.case.code.push(0x40 | rex);
        }
        self.case.code.push(0xb8 | (n & 7) as u8);
        let at = self.case.code.len();
        self.case.code.extend(&value.to_le_bytes()[..size]);
        at
    }
}

impl Shape {
    /// Another instruction is there: ends what ends here.
    fn step(&mut self, draft: &mut Draft, random: &mut Random) {
        let here = draft.case.code.len();
        self.forward.retain_mut(|f| {
            let end = f.left == 0 || f.hole.form == Form::Relative8 && here > f.hole.at + NEAR;
            f.left = f.left.saturating_sub(1);
            if end {
                draft.lead_here(f.hole);
            }
            !end
        });
        if let Some(inner) = self.loops.last_mut() {
            inner.left -= 1;
            if inner.left == 0 {
                self.end_loop(draft, random);
            }
        }
    }

    /// Ends the innermost loop: DEC and JNZ, SUB and JNZ, or LOOP. Branches out of it go on behind it.
    fn end_loop(&mut self, draft: &mut Draft, random: &mut Random) {
        let Some(inner) = self.loops.pop() else {
            return;
        };
        let register = Register::RAX + inner.counter as u32;
        draft.reserved.retain(|r| *r != register);
        let (high, low) = (inner.counter >> 3 != 0, (inner.counter & 7) as u8);
        let code = &mut draft.case.code;
        let far = code.len() - inner.top > 100;
        if inner.counter == 1 && !far && random.once_in(2) {
            let displacement = (inner.top as i64 - code.len() as i64 - 2) as u8;
            code.extend([0xe2, displacement]);
        } else {
            if high {
                code.push(0x41);
            }
            match random.below(2) {
                0 => code.extend([0xff, 0xc8 | low]),
                _ => code.extend([0x83, 0xe8 | low, 1]),
            }
            code.extend([0x0f, 0x85]);
            let displacement = (inner.top as i64 - code.len() as i64 - 4) as i32;
            code.extend(displacement.to_le_bytes());
        }
        // An enclosing loop counts what is inside as one.
        if let Some(outer) = self.loops.last_mut() {
            outer.left = outer.left.max(2);
        }
    }

    /// Ends everything.
    fn close(&mut self, draft: &mut Draft, random: &mut Random) {
        while !self.loops.is_empty() {
            self.end_loop(draft, random);
        }
        for f in self.forward.drain(..) {
            draft.lead_here(f.hole);
        }
    }
}

/// Emits what loads a register with an address in the code: LEA in 64-bit code, MOV in 32-bit code. The
/// result is where the address is missing.
fn address_of(draft: &mut Draft, n: usize) -> Hole {
    if draft.case.bits == 64 {
        let rex = 0x48 | (n >> 3 << 2) as u8;
        let modrm = ((n & 7) << 3 | 5) as u8;
        draft.case.code.extend([rex, 0x8d, modrm]);
        draft.hole(Form::Relative32)
    } else {
        draft.case.code.push(0xb8 | n as u8);
        draft.hole(Form::Absolute32)
    }
}
