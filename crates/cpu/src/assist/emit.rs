//! Machine code of a stub.
//!
//! ```text
//! endbr64
//! fnstcw [host_fcw]; stmxcsr [host_mxcsr]; fxrstor64 [x87]   x87 and MMX only
//! stmxcsr [host_mxcsr]; ldmxcsr [mxcsr]                      SIMD floating point only
//! movups / vmovups + vinsertf128 + vinsertf32x4              the vector registers read
//! kmovq                                                      the opmask registers read
//! mov                                                        the general registers used
//! mov eax, [flags]; add al, 127; sahf                        if it reads flags, or leaves some undefined
//! THE INSTRUCTION                                            memory operand at [rdi]
//! mov                                                        the general registers written
//! seto al; lahf; mov [flags], eax                            if it changes flags
//! movups / vmovups, kmovq                                    the vector and opmask registers written
//! stmxcsr [mxcsr]; ldmxcsr [host_mxcsr]
//! fxsave64 [x87]; fninit; fldcw [host_fcw]; ldmxcsr …
//! vzeroupper; ret
//! ```
//!
//! Only registers that the System V ABI lets a function clobber are used. x87 code runs with the
//! guest's own exception masks: an unmasked exception becomes pending in the status word that
//! FXSAVE stores, and FNINIT drops it before any waiting instruction of the host could see it.

use iced_x86::{Code, Encoder, IcedError, Instruction, MemoryOperand, Register};

use super::frame::offset;
use super::plan::{Class, FRAME, Plan, Vector};
use super::stack::StackUse;

struct Emitter {
    encoder: Encoder,
}

fn at(offset: i64) -> MemoryOperand {
    MemoryOperand::with_base_displ(FRAME, offset)
}

impl Emitter {
    fn put(&mut self, insn: &Instruction) -> Result<(), IcedError> {
        self.encoder.encode(insn, 0).map(|_| ())
    }
    fn plain(&mut self, code: Code) -> Result<(), IcedError> {
        self.put(&Instruction::with(code))
    }
    fn memory(&mut self, code: Code, offset: i64) -> Result<(), IcedError> {
        self.put(&Instruction::with1(code, at(offset))?)
    }
    fn load(&mut self, code: Code, register: Register, offset: i64) -> Result<(), IcedError> {
        self.put(&Instruction::with2(code, register, at(offset))?)
    }
    fn store(&mut self, code: Code, offset: i64, register: Register) -> Result<(), IcedError> {
        self.put(&Instruction::with2(code, at(offset), register)?)
    }

    /// The status flags: SAHF sets all but OF, which 1 + 127 sets.
    fn load_flags(&mut self) -> Result<(), IcedError> {
        self.load(Code::Mov_r32_rm32, Register::EAX, offset::FLAGS)?;
        self.put(&Instruction::with2(
            Code::Add_AL_imm8,
            Register::AL,
            127_i32,
        )?)?;
        self.plain(Code::Sahf)
    }

    fn store_flags(&mut self) -> Result<(), IcedError> {
        self.put(&Instruction::with1(Code::Seto_rm8, Register::AL)?)?;
        self.plain(Code::Lahf)?;
        self.store(Code::Mov_rm32_r32, offset::FLAGS, Register::EAX)
    }

    /// FNCLEX, which is slow, if the status word in AX has an exception flag.
    fn clear_exceptions(&mut self) -> Result<(), IcedError> {
        self.put(&Instruction::with2(
            Code::Test_AL_imm8,
            Register::AL,
            0x7f_i32,
        )?)?;
        // Over FNCLEX, which has two bytes like this branch.
        self.put(&Instruction::with_branch(Code::Je_rel8_64, 4)?)?;
        self.plain(Code::Fnclex)
    }

    /// In pieces of 16 bytes, as they were stored: a load of the whole would wait for the stores.
    fn load_vector(&mut self, class: Class, v: &Vector, lo: i64) -> Result<(), IcedError> {
        let n = u32::from(v.host);
        if !matches!(class, Class::Avx | Class::Evex) {
            return self.load(Code::Movups_xmm_xmmm128, Register::XMM0 + n, lo);
        }
        self.load(Code::VEX_Vmovups_xmm_xmmm128, Register::XMM0 + n, lo)?;
        if v.bytes > 16 {
            let ymm = Register::YMM0 + n;
            let code = Code::VEX_Vinsertf128_ymm_ymm_xmmm128_imm8;
            self.put(&Instruction::with4(code, ymm, ymm, at(lo + 16), 1)?)?;
        }
        if v.bytes > 32 {
            let zmm = Register::ZMM0 + n;
            let code = Code::EVEX_Vinsertf32x4_zmm_k1z_zmm_xmmm128_imm8;
            for quarter in [2, 3] {
                let piece = at(lo + i64::from(quarter) * 16);
                self.put(&Instruction::with4(code, zmm, zmm, piece, quarter)?)?;
            }
        }
        Ok(())
    }

    fn store_vector(&mut self, class: Class, v: &Vector, lo: i64) -> Result<(), IcedError> {
        let n = u32::from(v.host);
        let vex = matches!(class, Class::Avx | Class::Evex);
        match v.bytes {
            64 => self.store(Code::EVEX_Vmovups_zmmm512_k1z_zmm, lo, Register::ZMM0 + n),
            32 if vex => self.store(Code::VEX_Vmovups_ymmm256_ymm, lo, Register::YMM0 + n),
            _ if vex => self.store(Code::VEX_Vmovups_xmmm128_xmm, lo, Register::XMM0 + n),
            _ => self.store(Code::Movups_xmmm128_xmm, lo, Register::XMM0 + n),
        }
    }

    fn enter(&mut self, plan: &Plan) -> Result<(), IcedError> {
        if plan.x87 {
            self.memory(Code::Fnstcw_m2byte, offset::HOST_FCW)?;
        }
        if plan.x87 || plan.mxcsr {
            self.memory(Code::Stmxcsr_m32, offset::HOST_MXCSR)?;
        }
        if plan.x87 {
            self.memory(Code::Fxrstor64_m512byte, offset::X87)?;
        }
        if plan.mxcsr {
            self.memory(Code::Ldmxcsr_m32, offset::MXCSR)?;
        }
        for (slot, v) in plan.vectors.iter().enumerate().filter(|(_, v)| v.read) {
            self.load_vector(plan.class, v, offset::vector(slot))?;
        }
        for (slot, _) in plan.opmasks.iter().enumerate().filter(|(_, k)| k.read) {
            let register = Register::K1 + slot as u32;
            self.load(Code::VEX_Kmovq_kr_km64, register, offset::opmask(slot))?;
        }
        for (slot, g) in plan.gprs.iter().enumerate() {
            self.load(Code::Mov_r64_rm64, g.host, offset::gpr(slot))?;
        }
        if plan.flags_in != 0 {
            self.load_flags()?;
        }
        Ok(())
    }

    fn leave(&mut self, plan: &Plan) -> Result<(), IcedError> {
        for (slot, g) in plan.gprs.iter().enumerate().filter(|(_, g)| g.write) {
            self.store(Code::Mov_rm64_r64, offset::gpr(slot), g.host)?;
        }
        if plan.flags_out != 0 {
            self.store_flags()?;
        }
        for (slot, v) in plan.vectors.iter().enumerate().filter(|(_, v)| v.write) {
            self.store_vector(plan.class, v, offset::vector(slot))?;
        }
        for (slot, _) in plan.opmasks.iter().enumerate().filter(|(_, k)| k.write) {
            let register = Register::K1 + slot as u32;
            self.store(Code::VEX_Kmovq_m64_kr, offset::opmask(slot), register)?;
        }
        if plan.mxcsr {
            self.memory(Code::Stmxcsr_m32, offset::MXCSR)?;
        }
        if plan.x87 {
            self.memory(Code::Fxsave64_m512byte, offset::X87)?;
            self.plain(Code::Fninit)?;
            self.memory(Code::Fldcw_m2byte, offset::HOST_FCW)?;
        }
        if plan.x87 || plan.mxcsr {
            self.memory(Code::Ldmxcsr_m32, offset::HOST_MXCSR)?;
        }
        if matches!(plan.class, Class::Avx | Class::Evex) {
            self.plain(Code::VEX_Vzeroupper)?;
        }
        self.plain(Code::Retnq)
    }
}

/// The stub's code.
pub fn stub(plan: &Plan) -> Result<Vec<u8>, IcedError> {
    let mut e = Emitter {
        encoder: Encoder::try_new(64)?,
    };
    e.plain(Code::Endbr64)?;
    e.enter(plan)?;
    e.put(&plan.insn)?;
    e.leave(plan)?;
    Ok(e.encoder.take_buffer())
}

/// The short form of an x87 stub: the registers used go onto the host's stack, which is empty
/// between functions, and back from it.
///
/// ```text
/// fnstcw [host_fcw]; fnstsw ax; fnclex if a flag is set
/// fldcw [fcw]; fld tbyte [st+n] … fld tbyte [st]
/// THE INSTRUCTION
/// seto al; lahf; mov [flags], eax                            if it changes flags
/// fnstsw ax; mov [fsw], eax; fstp tbyte [st] … fstp tbyte [st+n]
/// fnclex if a flag is set; fldcw [host_fcw]; ret
/// ```
pub fn short(plan: &Plan, stack: &StackUse) -> Result<Vec<u8>, IcedError> {
    let mut e = Emitter {
        encoder: Encoder::try_new(64)?,
    };
    e.plain(Code::Endbr64)?;
    e.memory(Code::Fnstcw_m2byte, offset::HOST_FCW)?;
    e.put(&Instruction::with1(Code::Fnstsw_AX, Register::AX)?)?;
    e.clear_exceptions()?;
    e.memory(Code::Fldcw_m2byte, offset::FCW)?;
    for slot in (0..stack.loads).rev() {
        e.memory(Code::Fld_m80fp, offset::st(slot))?;
    }
    e.put(&plan.insn)?;
    if plan.flags_out != 0 {
        e.store_flags()?;
    }
    e.put(&Instruction::with1(Code::Fnstsw_AX, Register::AX)?)?;
    e.store(Code::Mov_rm32_r32, offset::FSW, Register::EAX)?;
    for slot in 0..stack.stores() {
        e.memory(Code::Fstp_m80fp, offset::st(slot))?;
    }
    e.clear_exceptions()?;
    e.memory(Code::Fldcw_m2byte, offset::HOST_FCW)?;
    e.plain(Code::Retnq)?;
    Ok(e.encoder.take_buffer())
}

/// The renamed instruction's encoding, by which stubs are shared.
pub fn key(plan: &Plan) -> Result<Vec<u8>, IcedError> {
    let mut e = Emitter {
        encoder: Encoder::try_new(64)?,
    };
    e.put(&plan.insn)?;
    Ok(e.encoder.take_buffer())
}
