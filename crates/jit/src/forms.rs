//! The forms of instructions that [`crate::encode`] knows (SDM Vol. 2, chapters 3 to 5).

use std::sync::LazyLock;

use iced_x86::Code;

/// Where the operands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Operand 0 is r/m, operand 1 the register.
    RmReg,
    /// Operand 0 is the register, operand 1 r/m.
    RegRm,
    /// Operand 0 is r/m; the register field is part of the opcode.
    Rm,
    /// Operand 0 is a register in the opcode's lowest bits.
    Opcode,
    /// Operand 0 is the accumulator, which is not encoded.
    Accumulator,
}

/// How a form of an instruction is encoded.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    pub place: Place,
    /// Operand size prefix: 66H.
    pub narrow: bool,
    /// REX.W.
    pub wide: bool,
    /// The opcode follows 0FH.
    pub escape: bool,
    pub opcode: u8,
    /// The register field, where it is no operand.
    pub extension: u8,
    /// Bytes of the immediate, which is the last operand.
    pub immediate: u8,
}

/// The form of an instruction, if it is known.
pub fn form(code: Code) -> Option<&'static Form> {
    FORMS.get(code as usize)?.as_ref()
}

/// Operand sizes, in the order in which [`FORMS`] lists codes.
const SIZES: [u8; 4] = [8, 16, 32, 64];

/// Encodings by [`Code`].
static FORMS: LazyLock<Vec<Option<Form>>> = LazyLock::new(forms);

fn forms() -> Vec<Option<Form>> {
    let mut list = Forms(Vec::new());
    list.arithmetic();
    list.moves();
    list.shifts_and_bits();
    list.conditional();
    list.0
}

struct Forms(Vec<Option<Form>>);

impl Forms {
    fn add(&mut self, code: Code, form: Form) {
        let at = code as usize;
        if self.0.len() <= at {
            self.0.resize(at + 1, None);
        }
        self.0[at] = Some(form);
    }

    /// Codes of an instruction for operands of 8 to 64 bits, of which the first has an opcode of its own.
    fn sizes(&mut self, codes: [Code; 4], first: u8, others: u8, form: Form) {
        for (code, size) in codes.into_iter().zip(SIZES) {
            let opcode = if size == 8 { first } else { others };
            self.add(
                code,
                Form {
                    opcode,
                    ..sized(form, size)
                },
            );
        }
    }

    /// The same with an immediate as large as the operand, but at most 32 bits.
    fn sizes_immediate(&mut self, codes: [Code; 4], first: u8, others: u8, form: Form) {
        for (code, size) in codes.into_iter().zip(SIZES) {
            let form = Form {
                opcode: if size == 8 { first } else { others },
                immediate: (size / 8).min(4),
                ..sized(form, size)
            };
            self.add(code, form);
        }
    }

    #[rustfmt::skip]
    fn arithmetic(&mut self) {
        use Code::*;
        let rows = [
            ([Add_rm8_r8, Add_rm16_r16, Add_rm32_r32, Add_rm64_r64], [Add_r8_rm8, Add_r16_rm16, Add_r32_rm32, Add_r64_rm64],
             [Add_rm8_imm8, Add_rm16_imm16, Add_rm32_imm32, Add_rm64_imm32], [Add_rm16_imm8, Add_rm32_imm8, Add_rm64_imm8],
             [Add_AL_imm8, Add_AX_imm16, Add_EAX_imm32, Add_RAX_imm32]),
            ([Or_rm8_r8, Or_rm16_r16, Or_rm32_r32, Or_rm64_r64], [Or_r8_rm8, Or_r16_rm16, Or_r32_rm32, Or_r64_rm64],
             [Or_rm8_imm8, Or_rm16_imm16, Or_rm32_imm32, Or_rm64_imm32], [Or_rm16_imm8, Or_rm32_imm8, Or_rm64_imm8],
             [Or_AL_imm8, Or_AX_imm16, Or_EAX_imm32, Or_RAX_imm32]),
            ([Adc_rm8_r8, Adc_rm16_r16, Adc_rm32_r32, Adc_rm64_r64], [Adc_r8_rm8, Adc_r16_rm16, Adc_r32_rm32, Adc_r64_rm64],
             [Adc_rm8_imm8, Adc_rm16_imm16, Adc_rm32_imm32, Adc_rm64_imm32], [Adc_rm16_imm8, Adc_rm32_imm8, Adc_rm64_imm8],
             [Adc_AL_imm8, Adc_AX_imm16, Adc_EAX_imm32, Adc_RAX_imm32]),
            ([Sbb_rm8_r8, Sbb_rm16_r16, Sbb_rm32_r32, Sbb_rm64_r64], [Sbb_r8_rm8, Sbb_r16_rm16, Sbb_r32_rm32, Sbb_r64_rm64],
             [Sbb_rm8_imm8, Sbb_rm16_imm16, Sbb_rm32_imm32, Sbb_rm64_imm32], [Sbb_rm16_imm8, Sbb_rm32_imm8, Sbb_rm64_imm8],
             [Sbb_AL_imm8, Sbb_AX_imm16, Sbb_EAX_imm32, Sbb_RAX_imm32]),
            ([And_rm8_r8, And_rm16_r16, And_rm32_r32, And_rm64_r64], [And_r8_rm8, And_r16_rm16, And_r32_rm32, And_r64_rm64],
             [And_rm8_imm8, And_rm16_imm16, And_rm32_imm32, And_rm64_imm32], [And_rm16_imm8, And_rm32_imm8, And_rm64_imm8],
             [And_AL_imm8, And_AX_imm16, And_EAX_imm32, And_RAX_imm32]),
            ([Sub_rm8_r8, Sub_rm16_r16, Sub_rm32_r32, Sub_rm64_r64], [Sub_r8_rm8, Sub_r16_rm16, Sub_r32_rm32, Sub_r64_rm64],
             [Sub_rm8_imm8, Sub_rm16_imm16, Sub_rm32_imm32, Sub_rm64_imm32], [Sub_rm16_imm8, Sub_rm32_imm8, Sub_rm64_imm8],
             [Sub_AL_imm8, Sub_AX_imm16, Sub_EAX_imm32, Sub_RAX_imm32]),
            ([Xor_rm8_r8, Xor_rm16_r16, Xor_rm32_r32, Xor_rm64_r64], [Xor_r8_rm8, Xor_r16_rm16, Xor_r32_rm32, Xor_r64_rm64],
             [Xor_rm8_imm8, Xor_rm16_imm16, Xor_rm32_imm32, Xor_rm64_imm32], [Xor_rm16_imm8, Xor_rm32_imm8, Xor_rm64_imm8],
             [Xor_AL_imm8, Xor_AX_imm16, Xor_EAX_imm32, Xor_RAX_imm32]),
            ([Cmp_rm8_r8, Cmp_rm16_r16, Cmp_rm32_r32, Cmp_rm64_r64], [Cmp_r8_rm8, Cmp_r16_rm16, Cmp_r32_rm32, Cmp_r64_rm64],
             [Cmp_rm8_imm8, Cmp_rm16_imm16, Cmp_rm32_imm32, Cmp_rm64_imm32], [Cmp_rm16_imm8, Cmp_rm32_imm8, Cmp_rm64_imm8],
             [Cmp_AL_imm8, Cmp_AX_imm16, Cmp_EAX_imm32, Cmp_RAX_imm32]),
        ];
        for (n, (to_rm, from_rm, immediate, short, accumulator)) in (0..).zip(rows) {
            self.sizes(to_rm, n << 3, n << 3 | 1, RM_REG);
            self.sizes(from_rm, n << 3 | 2, n << 3 | 3, REG_RM);
            self.sizes_immediate(immediate, 0x80, 0x81, Form { extension: n, ..RM });
            self.sizes_immediate(accumulator, n << 3 | 4, n << 3 | 5, ACCUMULATOR);
            for (code, size) in short.into_iter().zip([16, 32, 64]) {
                let form = Form {
                    opcode: 0x83,
                    extension: n,
                    immediate: 1,
                    ..sized(RM, size)
                };
                self.add(code, form);
            }
        }
        let unary = [
            ([Inc_rm8, Inc_rm16, Inc_rm32, Inc_rm64], 0xfe, 0),
            ([Dec_rm8, Dec_rm16, Dec_rm32, Dec_rm64], 0xfe, 1),
            ([Not_rm8, Not_rm16, Not_rm32, Not_rm64], 0xf6, 2),
            ([Neg_rm8, Neg_rm16, Neg_rm32, Neg_rm64], 0xf6, 3),
            ([Mul_rm8, Mul_rm16, Mul_rm32, Mul_rm64], 0xf6, 4),
            ([Imul_rm8, Imul_rm16, Imul_rm32, Imul_rm64], 0xf6, 5),
        ];
        for (codes, opcode, extension) in unary {
            self.sizes(codes, opcode, opcode + 1, Form { extension, ..RM });
        }
        self.sizes([Test_rm8_r8, Test_rm16_r16, Test_rm32_r32, Test_rm64_r64], 0x84, 0x85, RM_REG);
        self.sizes_immediate([Test_rm8_imm8, Test_rm16_imm16, Test_rm32_imm32, Test_rm64_imm32], 0xf6, 0xf7, RM);
        self.sizes_immediate([Test_AL_imm8, Test_AX_imm16, Test_EAX_imm32, Test_RAX_imm32], 0xa8, 0xa9, ACCUMULATOR);
        self.escaped(
            [Imul_r16_rm16, Imul_r32_rm32, Imul_r64_rm64],
            0xaf,
            REG_RM,
        );
    }

    /// Codes for operands of 16 to 64 bits whose opcode follows 0FH.
    fn escaped(&mut self, codes: [Code; 3], opcode: u8, form: Form) {
        for (code, size) in codes.into_iter().zip([16, 32, 64]) {
            let form = Form {
                escape: true,
                opcode,
                ..sized(form, size)
            };
            self.add(code, form);
        }
    }

    #[rustfmt::skip]
    fn moves(&mut self) {
        use Code::*;
        self.sizes([Mov_rm8_r8, Mov_rm16_r16, Mov_rm32_r32, Mov_rm64_r64], 0x88, 0x89, RM_REG);
        self.sizes([Mov_r8_rm8, Mov_r16_rm16, Mov_r32_rm32, Mov_r64_rm64], 0x8a, 0x8b, REG_RM);
        self.sizes([Xchg_rm8_r8, Xchg_rm16_r16, Xchg_rm32_r32, Xchg_rm64_r64], 0x86, 0x87, RM_REG);
        self.sizes_immediate([Mov_rm8_imm8, Mov_rm16_imm16, Mov_rm32_imm32, Mov_rm64_imm32], 0xc6, 0xc7, RM);
        self.add(Mov_r8_imm8, Form { opcode: 0xb0, immediate: 1, ..OPCODE });
        self.add(Mov_r32_imm32, Form { opcode: 0xb8, immediate: 4, ..OPCODE });
        self.escaped([Movzx_r16_rm8, Movzx_r32_rm8, Movzx_r64_rm8], 0xb6, REG_RM);
        self.escaped([Movzx_r16_rm16, Movzx_r32_rm16, Movzx_r64_rm16], 0xb7, REG_RM);
        self.escaped([Movsx_r16_rm8, Movsx_r32_rm8, Movsx_r64_rm8], 0xbe, REG_RM);
        self.escaped([Movsx_r16_rm16, Movsx_r32_rm16, Movsx_r64_rm16], 0xbf, REG_RM);
        self.add(Movsxd_r64_rm32, Form { opcode: 0x63, ..sized(REG_RM, 64) });
        self.add(Lea_r32_m, Form { opcode: 0x8d, ..sized(REG_RM, 32) });
        self.add(Lea_r64_m, Form { opcode: 0x8d, ..sized(REG_RM, 64) });
        self.add(Jmp_rm64, Form { opcode: 0xff, extension: 4, ..sized(RM, 32) });
    }

    #[rustfmt::skip]
    fn shifts_and_bits(&mut self) {
        use Code::*;
        let rows = [
            ([Rol_rm8_imm8, Rol_rm16_imm8, Rol_rm32_imm8, Rol_rm64_imm8], [Rol_rm8_1, Rol_rm16_1, Rol_rm32_1, Rol_rm64_1], [Rol_rm8_CL, Rol_rm16_CL, Rol_rm32_CL, Rol_rm64_CL], 0),
            ([Ror_rm8_imm8, Ror_rm16_imm8, Ror_rm32_imm8, Ror_rm64_imm8], [Ror_rm8_1, Ror_rm16_1, Ror_rm32_1, Ror_rm64_1], [Ror_rm8_CL, Ror_rm16_CL, Ror_rm32_CL, Ror_rm64_CL], 1),
            ([Shl_rm8_imm8, Shl_rm16_imm8, Shl_rm32_imm8, Shl_rm64_imm8], [Shl_rm8_1, Shl_rm16_1, Shl_rm32_1, Shl_rm64_1], [Shl_rm8_CL, Shl_rm16_CL, Shl_rm32_CL, Shl_rm64_CL], 4),
            ([Shr_rm8_imm8, Shr_rm16_imm8, Shr_rm32_imm8, Shr_rm64_imm8], [Shr_rm8_1, Shr_rm16_1, Shr_rm32_1, Shr_rm64_1], [Shr_rm8_CL, Shr_rm16_CL, Shr_rm32_CL, Shr_rm64_CL], 5),
            ([Sar_rm8_imm8, Sar_rm16_imm8, Sar_rm32_imm8, Sar_rm64_imm8], [Sar_rm8_1, Sar_rm16_1, Sar_rm32_1, Sar_rm64_1], [Sar_rm8_CL, Sar_rm16_CL, Sar_rm32_CL, Sar_rm64_CL], 7),
        ];
        for (immediate, one, count, extension) in rows {
            self.sizes(immediate, 0xc0, 0xc1, Form { extension, immediate: 1, ..RM });
            self.sizes(one, 0xd0, 0xd1, Form { extension, ..RM });
            self.sizes(count, 0xd2, 0xd3, Form { extension, ..RM });
        }
        let bits = [
            ([Bt_rm16_imm8, Bt_rm32_imm8, Bt_rm64_imm8], [Bt_rm16_r16, Bt_rm32_r32, Bt_rm64_r64], 4),
            ([Bts_rm16_imm8, Bts_rm32_imm8, Bts_rm64_imm8], [Bts_rm16_r16, Bts_rm32_r32, Bts_rm64_r64], 5),
            ([Btr_rm16_imm8, Btr_rm32_imm8, Btr_rm64_imm8], [Btr_rm16_r16, Btr_rm32_r32, Btr_rm64_r64], 6),
            ([Btc_rm16_imm8, Btc_rm32_imm8, Btc_rm64_imm8], [Btc_rm16_r16, Btc_rm32_r32, Btc_rm64_r64], 7),
        ];
        for (immediate, register, extension) in bits {
            self.escaped(immediate, 0xba, Form { extension, immediate: 1, ..RM });
            self.escaped(register, 0x83 | extension << 3, RM_REG);
        }
    }

    #[rustfmt::skip]
    fn conditional(&mut self) {
        use Code::*;
        let set = [Seto_rm8, Setno_rm8, Setb_rm8, Setae_rm8, Sete_rm8, Setne_rm8, Setbe_rm8, Seta_rm8,
                   Sets_rm8, Setns_rm8, Setp_rm8, Setnp_rm8, Setl_rm8, Setge_rm8, Setle_rm8, Setg_rm8];
        let moves = [
            [Cmovo_r16_rm16, Cmovo_r32_rm32, Cmovo_r64_rm64], [Cmovno_r16_rm16, Cmovno_r32_rm32, Cmovno_r64_rm64],
            [Cmovb_r16_rm16, Cmovb_r32_rm32, Cmovb_r64_rm64], [Cmovae_r16_rm16, Cmovae_r32_rm32, Cmovae_r64_rm64],
            [Cmove_r16_rm16, Cmove_r32_rm32, Cmove_r64_rm64], [Cmovne_r16_rm16, Cmovne_r32_rm32, Cmovne_r64_rm64],
            [Cmovbe_r16_rm16, Cmovbe_r32_rm32, Cmovbe_r64_rm64], [Cmova_r16_rm16, Cmova_r32_rm32, Cmova_r64_rm64],
            [Cmovs_r16_rm16, Cmovs_r32_rm32, Cmovs_r64_rm64], [Cmovns_r16_rm16, Cmovns_r32_rm32, Cmovns_r64_rm64],
            [Cmovp_r16_rm16, Cmovp_r32_rm32, Cmovp_r64_rm64], [Cmovnp_r16_rm16, Cmovnp_r32_rm32, Cmovnp_r64_rm64],
            [Cmovl_r16_rm16, Cmovl_r32_rm32, Cmovl_r64_rm64], [Cmovge_r16_rm16, Cmovge_r32_rm32, Cmovge_r64_rm64],
            [Cmovle_r16_rm16, Cmovle_r32_rm32, Cmovle_r64_rm64], [Cmovg_r16_rm16, Cmovg_r32_rm32, Cmovg_r64_rm64],
        ];
        for (n, code) in (0..).zip(set) {
            self.add(code, Form { escape: true, opcode: 0x90 | n, ..sized(RM, 8) });
        }
        for (n, codes) in (0..).zip(moves) {
            self.escaped(codes, 0x40 | n, REG_RM);
        }
    }
}

const RM: Form = Form {
    place: Place::Rm,
    narrow: false,
    wide: false,
    escape: false,
    opcode: 0,
    extension: 0,
    immediate: 0,
};
const RM_REG: Form = Form {
    place: Place::RmReg,
    ..RM
};
const REG_RM: Form = Form {
    place: Place::RegRm,
    ..RM
};
const OPCODE: Form = Form {
    place: Place::Opcode,
    ..RM
};
const ACCUMULATOR: Form = Form {
    place: Place::Accumulator,
    ..RM
};

fn sized(form: Form, size: u8) -> Form {
    Form {
        narrow: size == 16,
        wide: size == 64,
        ..form
    }
}
