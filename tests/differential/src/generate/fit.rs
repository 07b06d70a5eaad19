//! Operands that fit: registers and memory such that an instruction's addresses mostly fall into the
//! data, its branches on INT3, its operands among the numbers that are hard.

use super::{Draft, Generator};
use crate::case::{CODE, CODE_PAGES, DATA, PAGE, WRITABLE_PAGES, selector};
use crate::random::Random;
use iced_x86::{ConstantOffsets, FlowControl, Instruction, Mnemonic as M, OpKind, Register};

/// What a far pointer or a segment register is loaded with.
const SELECTORS: [u16; 12] = [
    0,
    3,
    selector::CODE32,
    selector::CODE32,
    selector::DATA,
    selector::DATA,
    selector::CODE64,
    selector::CODE64,
    0x10,
    0x18,
    0x2c,
    0x28,
];

/// An address for `size` bytes with which little faults.
fn calm_address(r: &mut Random, size: u64) -> u64 {
    if r.once_in(25) {
        return address(r, size);
    }
    let alignment = size.next_power_of_two().clamp(1, 64);
    let at = DATA + 0x400 + r.below(2 * PAGE as u64 - 0x800);
    if r.once_in(4) && size <= 8 {
        at
    } else {
        at & !(alignment - 1)
    }
}

/// An address for `size` bytes: mostly well inside, sometimes at an edge, read-only or not mapped.
fn address(r: &mut Random, size: u64) -> u64 {
    let page = PAGE as u64;
    let written = DATA + WRITABLE_PAGES as u64 * page;
    let across = |r: &mut Random, at: u64| at + 2 - r.below(size + 4);
    let alignment = size.next_power_of_two().clamp(1, 64);
    let aligned = |at: u64| at & !(alignment - 1);
    match r.below(24) {
        0 => across(r, written + page),
        1 => across(r, DATA),
        2 => across(r, written),
        3 => across(r, DATA + page),
        4 => aligned(written + r.below(page - 0x100)),
        5 if r.once_in(4) => r.integer(),
        5..9 => DATA + 0x400 + r.below(2 * page - 0x800),
        9..12 => (DATA + 0x400 + r.below(2 * page - 0x800)) & !7,
        _ => aligned(DATA + 0x400 + r.below(2 * page - 0x800)),
    }
}

impl Generator {
    /// Makes the operands; false if a register that decides an address is not free.
    pub(super) fn operands(
        &mut self,
        draft: &mut Draft,
        insn: &Instruction,
        offsets: &ConstantOffsets,
        bytes: &mut [u8],
    ) -> bool {
        self.registers(draft, insn);
        let mut fits = true;
        if insn.is_string_instruction() {
            fits &= self.string(draft, insn);
        }
        if insn.op_kinds().any(|k| k == OpKind::Memory) && insn.mnemonic() != M::Lea {
            fits &= self.memory(draft, insn, offsets, bytes);
        }
        if insn
            .op_kinds()
            .any(|k| matches!(k, OpKind::MemorySegRDI | OpKind::MemorySegEDI))
        {
            let at = self.address(draft, 16);
            fits &= self.set(draft, Register::RDI, at);
        }
        if insn.is_stack_instruction() {
            self.stack(draft, insn);
        }
        self.branch(draft, insn, offsets, bytes);
        if matches!(insn.mnemonic(), M::Div | M::Idiv) {
            self.division(draft);
        }
        fits
    }

    fn address(&mut self, draft: &Draft, size: u64) -> u64 {
        if draft.program {
            calm_address(&mut self.random, size)
        } else {
            address(&mut self.random, size)
        }
    }

    /// A register's value at the beginning, or where it is loaded; false if it has been written since.
    fn set(&mut self, draft: &mut Draft, register: Register, value: u64) -> bool {
        let full = register.full_register();
        if !full.is_gpr() {
            return true;
        }
        if draft.fixed.contains(&full) {
            draft.blocked = Some(full);
            return false;
        }
        draft.fixed.push(full);
        // An address size below 64 bits does not see the rest.
        let rest = if register.size() == 4 && draft.case.bits == 64 {
            self.random.word() << 32
        } else {
            0
        };
        let value = value | rest;
        match draft.loads.iter().position(|(r, _)| *r == full) {
            Some(n) => {
                let (_, at) = draft.loads.swap_remove(n);
                let size = draft.case.bits as usize / 8;
                draft.case.code[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
            }
            None => draft.state().gpr[full.number()] = value,
        }
        true
    }

    /// Values of vector and mask registers that are operands, and of general ones with a meaning.
    fn registers(&mut self, draft: &mut Draft, insn: &Instruction) {
        let first = draft.at == 0;
        for n in 0..insn.op_count() {
            if insn.op_kind(n) != OpKind::Register {
                continue;
            }
            let register = insn.op_register(n);
            if register.is_vector_register() && first {
                let size = if self.avx512 { 64 } else { 32 };
                let kind = draft.kind;
                let zmm = &mut draft.case.state.zmm[register.number() & 31];
                self.random.fill(kind, &mut zmm[..size]);
            }
            if register.is_segment_register() && n == 0 && !draft.program {
                let selector = self.random.pick(&SELECTORS);
                if insn.op1_kind() == OpKind::Register {
                    let high = self.random.word() << 16;
                    let v = high | u64::from(selector);
                    let v = if draft.case.bits == 32 {
                        v & 0xffff_ffff
                    } else {
                        v
                    };
                    draft.state().gpr[insn.op1_register().full_register().number()] = v;
                }
            }
        }
        if draft.program {
            // General registers have meanings already.
            return;
        }
        if matches!(insn.mnemonic(), M::Verr | M::Verw | M::Lar)
            && insn.op0_kind() == OpKind::Register
        {
            let operand = insn.op_count() - 1;
            if insn.op_kind(operand) == OpKind::Register {
                let selector = self.random.pick(&SELECTORS);
                let r = insn.op_register(operand).full_register();
                draft.state().gpr[r.number()] = selector.into();
            }
        }
        if matches!(insn.mnemonic(), M::Wrfsbase | M::Wrgsbase) && !self.random.once_in(4) {
            let v = self.random.below(1 << 47);
            draft.state().gpr[insn.op0_register().full_register().number()] = v;
        }
        if is_xsave(insn.mnemonic()) {
            // Behind AVX, offsets are each processor's own.
            let mask = self.random.below(8);
            draft.state().gpr[0] = mask;
            draft.state().gpr[2] = 0;
            draft.fixed.extend([Register::RAX, Register::RDX]);
        }
    }

    /// The base of the segment a memory operand goes through.
    fn base(draft: &Draft, insn: &Instruction) -> u64 {
        if draft.case.bits == 32 {
            return 0;
        }
        match insn.memory_segment() {
            Register::FS => draft.case.state.fs_base,
            Register::GS => draft.case.state.gs_base,
            _ => 0,
        }
    }

    /// Makes the explicit memory operand's address and contents.
    fn memory(
        &mut self,
        draft: &mut Draft,
        insn: &Instruction,
        offsets: &ConstantOffsets,
        bytes: &mut [u8],
    ) -> bool {
        let size = size_of_operand(insn);
        let mut target = self.address(draft, size);
        let locked = insn.has_lock_prefix() || insn.mnemonic() == M::Xchg;
        if locked && !self.random.once_in(64) {
            // Split locks are slow, and some hosts punish them.
            target &= !(size.min(16) - 1);
        }
        if is_xsave(insn.mnemonic()) && !self.random.once_in(8) {
            target &= !63;
        }
        if is_bit_test(insn) && insn.op1_kind() == OpKind::Register {
            let far = self.random.below(1 << 14);
            let far = if self.random.once_in(2) {
                far.wrapping_neg()
            } else {
                far
            };
            let r = insn.op1_register().full_register();
            let far = if draft.case.bits == 32 {
                far & 0xffff_ffff
            } else {
                far
            };
            if !draft.program {
                draft.state().gpr[r.number()] = far;
                draft.fixed.push(r);
            } else if !self.set(draft, r, far) {
                return false;
            }
        }
        let linear = target;
        target = target.wrapping_sub(Self::base(draft, insn));
        let fits = self.reach(draft, insn, offsets, bytes, target);
        self.contents(draft, insn, linear, size as usize);
        fits
    }

    /// Makes base, index or displacement lead to an offset.
    fn reach(
        &mut self,
        draft: &mut Draft,
        insn: &Instruction,
        offsets: &ConstantOffsets,
        bytes: &mut [u8],
        target: u64,
    ) -> bool {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let scale = u64::from(insn.memory_index_scale());
        let mut rest = target.wrapping_sub(insn.memory_displacement64());
        if index.is_vector_register() {
            if draft.program && draft.fixed.contains(&index.full_register()) {
                return false;
            }
            self.indices(draft, insn);
        } else if index == Register::AL {
            if draft.program && draft.fixed.contains(&Register::RAX) {
                draft.blocked = Some(Register::RAX);
                return false;
            }
            rest = rest.wrapping_sub(draft.case.state.gpr[0] & 0xff);
            draft.fixed.push(Register::RAX);
        } else if index != Register::None && index != base {
            let v = self.random.below(0x40);
            if base != Register::None && !self.set(draft, index, v) {
                return false;
            }
            if base == Register::None {
                // As near as the scale allows.
                return self.set(draft, index, truncated(rest / scale, index));
            }
            rest = rest.wrapping_sub(v * scale);
        }
        if matches!(base, Register::None | Register::RIP | Register::EIP) {
            let at = offsets.displacement_offset();
            let value = match base {
                Register::None => target,
                _ => target.wrapping_sub(insn.next_ip()),
            };
            match offsets.displacement_size() {
                2 => bytes[at..at + 2].copy_from_slice(&value.to_le_bytes()[..2]),
                4 => bytes[at..at + 4].copy_from_slice(&value.to_le_bytes()[..4]),
                8 => bytes[at..at + 8].copy_from_slice(&value.to_le_bytes()),
                _ => {}
            }
            return true;
        }
        if index == base && index != Register::None {
            rest /= 1 + scale;
        }
        self.set(draft, base, truncated(rest, base))
    }

    /// Elements of a VSIB index: near each other, some far away.
    fn indices(&mut self, draft: &mut Draft, insn: &Instruction) {
        let wide = insn
            .code()
            .op_code()
            .op_kinds()
            .iter()
            .any(|k| format!("{k:?}").contains("vsib64"));
        let size = if wide { 8 } else { 4 };
        let n = insn.memory_index().number() & 31;
        let register = &mut draft.case.state.zmm[n];
        for part in register.chunks_mut(size) {
            let v = match self.random.below(40) {
                0 => self.random.word(),
                1 => 0x400,
                _ => self.random.below(0x80),
            };
            let v = if self.random.once_in(4) {
                v.wrapping_neg()
            } else {
                v
            };
            part.copy_from_slice(&v.to_le_bytes()[..size]);
        }
        if !self.avx512 {
            register[32..].fill(0);
        }
    }

    /// What the memory operand holds.
    fn contents(&mut self, draft: &mut Draft, insn: &Instruction, at: u64, size: usize) {
        let mut operand = vec![0; size.min(64)];
        let kind = draft.kind;
        self.random.fill(kind, &mut operand);
        match insn.mnemonic() {
            M::Ldmxcsr | M::Vldmxcsr if !self.random.once_in(6) => operand[2..].fill(0),
            M::Fldcw if !self.random.once_in(3) => operand[0] |= 0x3f,
            M::Fxrstor | M::Fxrstor64 | M::Xrstor | M::Xrstor64 => {
                draft.put(at, &self.saved_state(insn));
                return;
            }
            M::Cmpxchg | M::Cmpxchg16b | M::Cmpxchg8b if self.random.once_in(2) => {
                let [rax, _, rdx, ..] = draft.case.state.gpr;
                let (low, high) = (rax.to_le_bytes(), rdx.to_le_bytes());
                let half = if insn.mnemonic() == M::Cmpxchg8b {
                    4
                } else {
                    8
                };
                operand.clear();
                operand.extend(&low[..half]);
                operand.extend(&high[..half]);
            }
            M::Call | M::Jmp => {
                let target = self.landing(draft);
                operand.clear();
                operand.extend(&target.to_le_bytes()[..pointer(draft)]);
                if insn.is_call_far_indirect() || insn.is_jmp_far_indirect() {
                    operand.truncate(size.saturating_sub(2));
                    operand.extend(self.random.pick(&SELECTORS).to_le_bytes());
                }
            }
            M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
                let selector = self.random.pick(&SELECTORS).to_le_bytes();
                operand[size - 2..].copy_from_slice(&selector);
            }
            M::Mov | M::Lar | M::Verr | M::Verw if size == 2 => {
                operand.copy_from_slice(&self.random.pick(&SELECTORS).to_le_bytes());
            }
            M::Rcl | M::Rcr | M::Bound => {}
            _ => {}
        }
        if insn.memory_index().is_vector_register() {
            return;
        }
        draft.put(at, &operand);
    }

    /// An image for FXRSTOR or XRSTOR, mostly a valid one.
    fn saved_state(&mut self, insn: &Instruction) -> Vec<u8> {
        let r = &mut self.random;
        let mut image = vec![0; 832];
        let kind = r.kind();
        r.fill(kind, &mut image);
        for n in 0..8 {
            image[32 + n * 16..][..10].copy_from_slice(&r.extended());
        }
        if !r.once_in(6) {
            image[26..28].fill(0);
        }
        if !r.once_in(4) {
            image[0] |= 0x3f;
        }
        image[512..576].fill(0);
        image[512] = r.below(8) as u8;
        if r.once_in(8) {
            let at = 512 + r.below(64) as usize;
            image[at] = 1 << r.below(8);
        }
        if matches!(insn.mnemonic(), M::Xrstor | M::Xrstor64) && r.once_in(4) {
            // The compacted form.
            image[520] = image[512] | r.below(8) as u8;
            image[527] = 0x80;
        }
        image
    }

    /// Pointers and counts of a string instruction.
    fn string(&mut self, draft: &mut Draft, insn: &Instruction) -> bool {
        let (mut si, mut di, mut cx) = (Register::RSI, Register::RDI, Register::RCX);
        let narrow = insn
            .op_kinds()
            .any(|k| matches!(k, OpKind::MemorySegESI | OpKind::MemoryESEDI));
        if narrow || draft.case.bits == 32 {
            (si, di, cx) = (Register::ESI, Register::EDI, Register::ECX);
        }
        let from = self.address(draft, 8);
        let away = self.address(draft, 8);
        let r = &mut self.random;
        let near = from.wrapping_add(r.below(24)).wrapping_sub(12);
        let to = if r.once_in(3) { near } else { away };
        let most = r.pick(&[1, 2, 9, 40, 300, 3000]);
        let count = r.below(most);
        let fill = r.word() as u8;
        let length = r.pick(&[8, 64, 600]);
        if r.once_in(2) {
            // Comparisons that go on for a while.
            draft.put(to, &vec![fill; length]);
            draft.put(from, &vec![fill; length]);
            draft.state().gpr[0] = u64::from(fill) * 0x0101_0101_0101_0101;
            if draft.case.bits == 32 {
                draft.state().gpr[0] &= 0xffff_ffff;
            }
        }
        let base = Self::base(draft, insn);
        self.set(draft, si, truncated(from.wrapping_sub(base), si))
            & self.set(draft, di, truncated(to, di))
            & self.set(draft, cx, count)
    }

    fn stack(&mut self, draft: &mut Draft, insn: &Instruction) {
        if draft.fixed.contains(&Register::RSP) {
            return;
        }
        let mut sp = self.address(draft, 8);
        if draft.case.bits == 32 {
            sp &= 0xffff_ffff;
        }
        self.set(draft, Register::RSP, sp);
        let target = self.landing(draft).to_le_bytes();
        let pointer = pointer(draft);
        match insn.mnemonic() {
            M::Ret => draft.put(sp, &target[..pointer]),
            M::Retf | M::Iret | M::Iretd | M::Iretq => self.far_frame(draft, insn, sp, target),
            M::Pop if insn.op0_register().is_segment_register() => {
                let selector = self.random.pick(&SELECTORS).to_le_bytes();
                draft.put(sp, &selector);
            }
            M::Leave | M::Enter => {
                let bp = self.address(draft, 8);
                let bp = if draft.case.bits == 32 {
                    bp & 0xffff_ffff
                } else {
                    bp
                };
                self.set(draft, Register::RBP, bp);
            }
            _ => {}
        }
    }

    /// What RETF and IRET pop: RIP, CS and, for IRET, RFLAGS, RSP and SS.
    fn far_frame(&mut self, draft: &mut Draft, insn: &Instruction, sp: u64, target: [u8; 8]) {
        let size = match insn.op_code().operand_size() {
            0 => pointer(draft),
            bits => bits as usize / 8,
        };
        let r = &mut self.random;
        let cs = r.pick(&SELECTORS);
        let mut words = vec![u64::from_le_bytes(target), cs.into()];
        if insn.mnemonic() != M::Retf {
            // Not NT and not TF: the rest of the flags user mode may set.
            words.push(r.word() & 0x26_0cd5 | 0x202);
            words.push(DATA + 0x800);
            words.push(r.pick(&SELECTORS).into());
        }
        let frame: Vec<u8> = words
            .iter()
            .flat_map(|w| w.to_le_bytes()[..size].to_vec())
            .collect();
        draft.put(sp, &frame);
    }

    fn branch(
        &mut self,
        draft: &mut Draft,
        insn: &Instruction,
        offsets: &ConstantOffsets,
        bytes: &mut [u8],
    ) {
        let at = offsets.immediate_offset();
        match insn.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
                if insn.op_count() > 0 =>
            {
                if self.random.once_in(16) {
                    return;
                }
                let target = self.landing(draft);
                let relative = target.wrapping_sub(insn.next_ip()).to_le_bytes();
                match offsets.immediate_size() {
                    // Forward, over the rest of the code or into it.
                    1 => bytes[at] = self.random.below(0x80) as u8,
                    n => bytes[at..at + n].copy_from_slice(&relative[..n]),
                }
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 if insn.op_count() > 0 => {
                let target = self.landing(draft).to_le_bytes();
                let n = offsets.immediate_size();
                bytes[at..at + n].copy_from_slice(&target[..n]);
                let at = offsets.immediate_offset2();
                bytes[at..at + 2].copy_from_slice(&self.random.pick(&SELECTORS).to_le_bytes());
            }
            OpKind::Register
                if matches!(
                    insn.flow_control(),
                    FlowControl::IndirectBranch | FlowControl::IndirectCall
                ) =>
            {
                let target = self.landing(draft);
                self.set(draft, insn.op0_register(), target);
            }
            _ => {}
        }
    }

    /// Somewhere in the code pages but not in the code; rarely anywhere.
    fn landing(&mut self, draft: &Draft) -> u64 {
        if self.random.once_in(30) {
            return self.random.integer();
        }
        loop {
            let at = CODE + self.random.below((CODE_PAGES * PAGE) as u64);
            let code = draft.case.state.rip;
            if !(code..code + crate::case::MAX_CODE as u64).contains(&at) {
                return at;
            }
        }
    }

    /// Dividends whose quotients fit.
    fn division(&mut self, draft: &mut Draft) {
        if self.random.once_in(2) || draft.at != 0 {
            return;
        }
        let small = self.random.below(1 << 14);
        let s = &mut draft.case.state;
        s.gpr[2] = self.random.pick(&[0, u64::MAX, s.gpr[2]]);
        s.gpr[0] = self.random.pick(&[small, small.wrapping_neg(), s.gpr[0]]);
        if draft.case.bits == 32 {
            draft.case.state.gpr[0] &= 0xffff_ffff;
            draft.case.state.gpr[2] &= 0xffff_ffff;
        }
    }
}

fn pointer(draft: &Draft) -> usize {
    draft.case.bits as usize / 8
}

fn truncated(v: u64, register: Register) -> u64 {
    match register.size() {
        4 => v & 0xffff_ffff,
        2 => v & 0xffff,
        _ => v,
    }
}

fn is_xsave(m: M) -> bool {
    matches!(
        m,
        M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xrstor
            | M::Xrstor64
    )
}

fn is_bit_test(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
}

/// Bytes of the memory operand.
fn size_of_operand(insn: &Instruction) -> u64 {
    let size = insn.memory_size().size() as u64;
    match insn.mnemonic() {
        m if is_xsave(m) => 832,
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => 512,
        _ => size.max(1),
    }
}
