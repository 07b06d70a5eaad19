//! Differences that are none: where processors differ among themselves, or where the host's kernel
//! stands between the processor and the program. Each is as narrow as can be told, has its reason,
//! and is counted.

use crate::case::{CODE, CODE_PAGES, Case, End, Outcome, PAGE};
use crate::compare::Difference;
use crate::generate::excluded;
use anykvm_cpu::events::vector as v;
use anykvm_cpu::state::rflags;
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic as M, OpKind,
    Register,
};

/// A difference that is tolerated.
pub struct Tolerated {
    /// Its name in the summary.
    pub name: &'static str,
    /// Why.
    pub reason: &'static str,
    applies: fn(&Seen) -> bool,
}

/// What a rule may look at.
struct Seen<'a> {
    /// The instruction that the difference is about, as far as can be told.
    insn: Instruction,
    /// Its bytes.
    bytes: &'a [u8],
    case: &'a Case,
    host: &'a Outcome,
    guest: &'a Outcome,
    differences: &'a [Difference],
}

impl Seen<'_> {
    /// The case's instructions, one behind the other.
    fn instructions(&self) -> impl Iterator<Item = Instruction> {
        instructions(self.case)
    }

    fn vectors(&self) -> (Option<u8>, Option<u8>) {
        let vector = |end: &End| match end {
            End::Exception { vector, .. } => Some(*vector),
            _ => None,
        };
        (vector(&self.host.end), vector(&self.guest.end))
    }

    fn host_vector(&self) -> Option<u8> {
        self.vectors().0
    }

    /// Where the opcode begins.
    fn prefixes(&self) -> usize {
        let rex = self.case.bits == 64;
        let prefix = |b: &u8| match b {
            0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => true,
            0x40..=0x4f => rex,
            _ => false,
        };
        self.bytes.iter().take_while(|b| prefix(b)).count()
    }

    fn opcode(&self) -> &[u8] {
        &self.bytes[self.prefixes()..]
    }

    fn has_prefix(&self, prefix: u8) -> bool {
        self.bytes[..self.prefixes()].contains(&prefix)
    }

    fn has_rex_w(&self) -> bool {
        let rex = |b: &u8| b & 0xf0 == 0x40;
        let at = self.bytes.iter().position(rex);
        at.is_some_and(|n| self.bytes[n] & 8 != 0)
    }

    /// Everything that differs has one of these names.
    fn only(&self, names: &[&str]) -> bool {
        let known = |d: &Difference| names.iter().any(|n| d.what.starts_with(n));
        self.differences.iter().all(known)
    }

    fn is(&self, mnemonics: &[M]) -> bool {
        mnemonics.contains(&self.insn.mnemonic())
    }

    fn is_xsave(&self) -> bool {
        const ALL: &[M] = &[
            M::Xsave,
            M::Xsave64,
            M::Xsavec,
            M::Xsavec64,
            M::Xsaveopt,
            M::Xsaveopt64,
            M::Xrstor,
            M::Xrstor64,
        ];
        self.is(ALL)
    }

    /// The instruction has an operand of many bytes, or several.
    fn accesses_much(&self) -> bool {
        const ALL: &[M] = &[
            M::Fxsave,
            M::Fxsave64,
            M::Fxrstor,
            M::Fxrstor64,
            M::Fnsave,
            M::Fnstenv,
            M::Fldenv,
            M::Frstor,
            M::Iret,
            M::Iretd,
            M::Iretq,
            M::Retf,
            M::Call,
            M::Jmp,
            M::Enter,
            M::Pusha,
            M::Pushad,
            M::Popa,
            M::Popad,
            M::Bound,
            M::Lds,
            M::Les,
            M::Lfs,
            M::Lgs,
            M::Lss,
            M::Fbstp,
            M::Cmpsb,
            M::Cmpsw,
            M::Cmpsd,
            M::Cmpsq,
        ];
        self.is_xsave() || self.is(ALL)
    }

    /// Of the memory operand, with the registers as they are here at the end.
    fn effective_address(&self) -> Option<u64> {
        let memory = self.insn.op_kinds().position(|k| k == OpKind::Memory)?;
        self.insn
            .virtual_address(memory as u32, 0, |register, _, _| {
                let full = register.full_register();
                match register {
                    Register::FS | Register::GS => Some(0),
                    _ if full.is_gpr() => Some(self.guest.state.gpr[full.number()]),
                    _ => None,
                }
            })
    }

    fn alignment_checked(&self) -> bool {
        (self.case.state.rflags | self.host.state.rflags) & rflags::AC != 0
    }
}

/// The rules.
pub const TOLERATED: &[Tolerated] = &[
    Tolerated {
        name: "left out, but reached within another instruction",
        reason: "a branch leads into an instruction, where the bytes are one that is not compared",
        applies: |s| {
            let is_there = s.instructions().any(|i| i.ip() == s.insn.ip());
            !is_there && excluded::reason(&s.insn).is_some()
        },
    },
    Tolerated {
        name: "66 on near branches",
        reason: "in 64-bit code AMD's processors take it as an operand size of 16 bits, Intel's \
                 and this one ignore it (SDM Vol. 2, JMP)",
        applies: |s| {
            // By its bytes: where it is cut off by the end of memory, it may be whole for AMD.
            let near = match s.opcode() {
                [
                    0x70..=0x7f | 0xc2 | 0xc3 | 0xe0..=0xe3 | 0xe8 | 0xe9 | 0xeb,
                    ..,
                ] => true,
                [0x0f, 0x80..=0x8f, ..] => true,
                [0xff, modrm, ..] => matches!(modrm >> 3 & 7, 2 | 4),
                _ => false,
            };
            s.case.bits == 64 && s.has_prefix(0x66) && near
        },
    },
    Tolerated {
        name: "far pointers with REX.W",
        reason: "AMD's processors have no far pointers with 64-bit offsets, Intel's and this one \
                 do (SDM Vol. 2, JMP, LDS)",
        applies: |s| {
            let loads = s.is(&[M::Lfs, M::Lgs, M::Lss]);
            let branches = s.insn.is_jmp_far_indirect() || s.insn.is_call_far_indirect();
            (loads || branches) && s.has_rex_w()
        },
    },
    Tolerated {
        name: "0F 0D with a register",
        reason: "#UD on AMD's processors, a NOP on Intel's and here (SDM Vol. 2, opcode map)",
        applies: |s| s.is(&[M::Reservednop]) && s.host_vector() == Some(v::UD),
    },
    Tolerated {
        name: "MXCSR.MM",
        reason: "AMD's bit for misaligned SSE operands is not offered, so MXCSR_MASK is without it",
        applies: |s| {
            (s.is_xsave() || s.is(&[M::Fxsave, M::Fxsave64]))
                && s.differences
                    .iter()
                    .all(|d| d.is_bit(49) && d.what.starts_with("memory "))
        },
    },
    Tolerated {
        name: "loads of MXCSR.MM",
        reason: "AMD's bit for misaligned SSE operands is not offered, so setting it is #GP",
        applies: |s| {
            let loads = [
                M::Ldmxcsr,
                M::Vldmxcsr,
                M::Fxrstor,
                M::Fxrstor64,
                M::Xrstor,
                M::Xrstor64,
            ];
            // On the host the code behind it goes on.
            s.is(&loads) && s.vectors().1 == Some(v::GP) && s.host.state.mxcsr >> 17 & 1 != 0
        },
    },
    Tolerated {
        name: "SHA with misaligned operands",
        reason: "#GP by SDM Vol. 2, table 2-21; AMD's processors take any address",
        applies: |s| {
            s.insn.cpuid_features().contains(&CpuidFeature::SHA)
                && s.vectors().1 == Some(v::GP)
                && matches!(s.host_vector(), None | Some(v::AC | v::DB))
        },
    },
    Tolerated {
        name: "INT1 in a virtual machine",
        reason: "hypervisors report it with RIP at the instruction; it is behind (SDM Vol. 3, \
                 6.4.4)",
        applies: |s| s.is(&[M::Int1]) && s.only(&["end"]),
    },
    Tolerated {
        name: "#GP or #PF of misaligned operands",
        reason: "an operand that must be aligned, is not, and is not mapped either: the order of \
                 the two faults is the implementation's",
        applies: |s| {
            matches!(s.vectors(), (Some(v::PF | v::SS), Some(v::GP)))
                && (s.insn.memory_size().size() >= 16 || s.accesses_much())
        },
    },
    Tolerated {
        name: "canonical with its segment's base only",
        reason: "an address is checked with the base added (SDM Vol. 1, 3.3.7.1); AMD's processors may \
                 find fault with the effective address alone",
        applies: |s| {
            s.vectors() == (Some(v::GP), Some(v::PF))
                && s.case.bits == 64
                && matches!(s.insn.memory_segment(), Register::FS | Register::GS)
                && s.effective_address()
                    .is_some_and(|a| (a as i64) << 16 >> 16 != a as i64)
        },
    },
    Tolerated {
        name: "#AC or another fault",
        reason: "an operand that is misaligned and faults for another reason, too: the order is the \
                 implementation's",
        applies: |s| {
            let faults = |v| matches!(v, Some(v::PF | v::GP | v::SS | v::AC));
            let (host, guest) = s.vectors();
            s.alignment_checked()
                && faults(host)
                && faults(guest)
                && (host == Some(v::AC) || guest == Some(v::AC))
        },
    },
    Tolerated {
        name: "#AC of more than 8 bytes",
        reason: "whether operands of 16 bytes and more raise #AC is the implementation's (SDM Vol. \
                 3, 6.15)",
        applies: |s| {
            let size = s.insn.memory_size().size();
            s.alignment_checked()
                && s.host_vector() == Some(v::AC)
                && (size == 0 || size > 8 || s.is(&[M::Maskmovq]))
        },
    },
    Tolerated {
        name: "CR2 of several accesses",
        reason: "which of an operand's pages, or of several operands, faults first is the \
                 implementation's",
        applies: |s| {
            s.vectors() == (Some(v::PF), Some(v::PF)) && s.accesses_much() && s.only(&["end"])
        },
    },
    Tolerated {
        name: "the whole XSAVE area",
        reason: "AMD's processors access the legacy region and the header whatever is asked for",
        applies: |s| s.is_xsave() && s.host_vector() == Some(v::PF),
    },
    Tolerated {
        name: "the last bytes of FXSAVE's area",
        reason: "AMD's processors write, and so fault on, the bytes from 416 on, which are reserved",
        applies: |s| s.is(&[M::Fxsave, M::Fxsave64]) && s.vectors() == (Some(v::PF), None),
    },
    Tolerated {
        name: "single steps within gathers",
        reason: "AMD's processors trap between the elements of a gather",
        applies: |s| s.insn.is_vsib() && matches!(s.vectors(), (Some(v::DB), Some(_))),
    },
    Tolerated {
        name: "#AC or #XM",
        reason: "of a misaligned store of a conversion that faults: the order is the implementation's",
        applies: |s| s.alignment_checked() && s.vectors() == (Some(v::AC), Some(v::XM)),
    },
    Tolerated {
        name: "masked stores of nothing",
        reason: "whether an address that a mask of zeros leaves untouched can fault is the \
                 implementation's (SDM Vol. 2, MASKMOVDQU)",
        applies: |s| {
            s.is(&[M::Maskmovq, M::Maskmovdqu, M::Vmaskmovdqu])
                && matches!(s.host_vector(), Some(v::PF | v::GP | v::SS))
        },
    },
    Tolerated {
        name: "string I/O of nothing",
        reason: "whether REP INS and REP OUTS of no elements check the right to the port is the \
                 implementation's",
        applies: |s| {
            let io = [M::Insb, M::Insw, M::Insd, M::Outsb, M::Outsw, M::Outsd];
            let repeated = s.has_prefix(0xf2) || s.has_prefix(0xf3);
            s.is(&io) && repeated && s.host_vector() == Some(v::GP)
        },
    },
    Tolerated {
        name: "masks of gathers that fault",
        reason: "whether the mask's elements are all ones or zeros before the first access is the \
                 implementation's",
        applies: |s| {
            let (host, guest) = s.vectors();
            s.insn.is_vsib() && host == guest && host.is_some() && s.only(&["zmm"])
        },
    },
    Tolerated {
        name: "REP on LOOPE and LOOPNE",
        reason: "AMD's processors let F3 and F2 say what ends the loop, Intel's and this one ignore \
                 them",
        applies: |s| s.is(&[M::Loope, M::Loopne]) && (s.has_prefix(0xf2) || s.has_prefix(0xf3)),
    },
    Tolerated {
        name: "VEX.W that selects no operand size",
        reason: "whether it is looked at outside 64-bit mode; AMD's processors never look at that of \
                 VPERMQ and VPERMPD, which is 1 by the SDM",
        applies: |s| {
            let (host, guest) = s.vectors();
            let ud = |v| v == Some(v::UD);
            let vperm = matches!(s.opcode(), [_, m, w, 0 | 1, ..] if m & 31 == 3 && w & 0x80 == 0);
            (s.case.bits == 32 || vperm)
                && s.opcode().first() == Some(&0xc4)
                && (ud(host) || ud(guest))
                && s.differences.iter().any(|d| d.what == "end")
        },
    },
    Tolerated {
        name: "OF of long rotations through CF",
        reason: "undefined for counts above 1 (SDM Vol. 2, RCL); where the count is a multiple of the \
                 width with CF, iced-x86 takes it for unchanged, and AMD's processors leave now this and \
                 now that",
        applies: |s| {
            s.is(&[M::Rcl, M::Rcr])
                && s.only(&["rflags"])
                && s.differences.iter().all(|d| d.is_bit(11))
        },
    },
    Tolerated {
        name: "RSP behind PUSH in an EVEX-encoded instruction",
        reason: "AMD's processors (Zen 4) read RSP as it was before the PUSH, POP or CALL in front of an \
                 instruction whose EVEX.X is set beside a general register, where it means nothing",
        applies: |s| {
            s.instructions().any(|i| {
                let at = (i.ip() - s.case.state.rip) as usize;
                let evex = s.case.code[at..].iter().position(|b| *b == 0x62);
                let x = evex.and_then(|n| s.case.code.get(at + n + 1));
                let rsp = |r: Register| r.full_register() == Register::RSP;
                i.encoding() == EncodingKind::EVEX
                    && x.is_some_and(|p0| p0 & 0x40 == 0)
                    && (0..i.op_count()).any(|n| rsp(i.op_register(n)))
            })
        },
    },
    Tolerated {
        name: "RF that is saved",
        reason: "by SDM Vol. 3, 18.3.1.1, INT3 saves an RF that IRET loaded, and a trap within a \
                 repeated string instruction sets it; AMD's processors save 0",
        applies: |s| {
            let iret = s.is(&[M::Iret, M::Iretd, M::Iretq]);
            let repeated = s.insn.is_string_instruction() && s.host_vector() == Some(v::DB);
            (iret || repeated) && s.only(&["rflags"]) && s.differences.iter().all(|d| d.is_bit(16))
        },
    },
    Tolerated {
        name: "DPPS and DPPD that fault",
        reason: "which flags are set depends on the order of their steps",
        applies: |s| {
            s.is(&[M::Dpps, M::Dppd, M::Vdpps, M::Vdppd])
                && s.vectors() == (Some(v::XM), Some(v::XM))
                && s.only(&["mxcsr"])
        },
    },
    Tolerated {
        name: "MXCSR.PE beside unmasked OE or UE",
        reason: "it is about a result with an unbounded exponent, which is only known where the \
                 exception is taken; the interpreter runs with exceptions masked and sets it",
        applies: |s| {
            const RANGE: u32 = 0b1_1000;
            let unmasked = s.host.state.mxcsr & !(s.host.state.mxcsr >> 7) & RANGE;
            s.vectors() == (Some(v::XM), Some(v::XM))
                && unmasked != 0
                && s.only(&["mxcsr"])
                && s.differences.iter().all(|d| d.is_bit(5))
        },
    },
    Tolerated {
        name: "LOCK on VERR and VERW",
        reason: "#UD, but AMD's processors read the operand before they look at the prefix",
        applies: |s| {
            s.has_prefix(0xf0)
                && matches!(s.opcode(), [0x0f, 0, ..])
                && s.vectors().1 == Some(v::UD)
        },
    },
    Tolerated {
        name: "MOVSXD to 16 bits",
        reason: "AMD's processors read 32 bits of memory, Intel's and this one 16",
        applies: |s| s.insn.code() == Code::Movsxd_r16_rm16,
    },
    Tolerated {
        name: "bits of EVEX and opmask encodings",
        reason: "EVEX.b without a memory operand or a use for it, EVEX.z without a mask, EVEX.V' outside \
                 64-bit mode, and numbers of opmask registers above 7, are #UD by SDM Vol. 2, \
                 2.7.11; AMD's processors ignore them",
        applies: |s| {
            let opmask = |op: u8| matches!(op, 0x30..=0x33 | 0x41..=0x4b | 0x90..=0x99);
            let ignored = match s.opcode() {
                [0x62, _, _, p2, _, modrm, ..] => {
                    p2 & 0x10 != 0 && *modrm >= 0xc0
                        || p2 & 0x87 == 0x80
                        || s.case.bits == 32 && p2 & 8 == 0
                }
                [0xc5, _, op, ..] | [0xc4, _, _, op, ..] => opmask(*op),
                _ => false,
            };
            ignored && s.insn.is_invalid() && s.vectors().1 == Some(v::UD)
        },
    },
    Tolerated {
        name: "#AC of masked operands",
        reason: "whether an operand whose elements are masked is checked for its alignment is the \
                 implementation's",
        applies: |s| s.alignment_checked() && s.insn.has_op_mask() && s.vectors().1 == Some(v::AC),
    },
    Tolerated {
        name: "underflow of VCVTPS2PH",
        reason: "an exact tiny result with underflow unmasked is not found: flush-to-zero, which \
                 shows it with others, is ignored by this instruction",
        applies: |s| {
            let um = s.case.state.mxcsr >> 11 & 1 == 0;
            let host = s.vectors().0;
            s.is(&[M::Vcvtps2ph]) && um && host == Some(v::XM) && s.host.state.mxcsr >> 4 & 1 != 0
        },
    },
    Tolerated {
        name: "x87 pointers",
        reason: "AMD's processors store CS and DS selectors behind 64-bit code, too, and note FNOP, \
                 FFREE and the like as well (SDM Vol. 1, 8.1.8)",
        applies: |s| {
            s.is(&[M::Fnsave, M::Fnstenv]) && s.only(&["memory "]) && s.differences.len() <= 3
        },
    },
    Tolerated {
        name: "order of CMPS's faults",
        reason: "which of the two operands is read first is the implementation's",
        applies: |s| {
            let faults = |v| matches!(v, Some(v::PF | v::GP | v::SS | v::AC));
            let (host, guest) = s.vectors();
            s.is(&[M::Cmpsb, M::Cmpsw, M::Cmpsd, M::Cmpsq]) && faults(host) && faults(guest)
        },
    },
    Tolerated {
        name: "PUSHA and POPA that fault",
        reason: "the registers before the one that faults may have been stored or loaded",
        applies: |s| {
            let (host, guest) = s.vectors();
            let faults = host == guest && host.is_some();
            let pops = s.is(&[M::Popa, M::Popad]) && s.only(&["r"]);
            let pushes = s.is(&[M::Pusha, M::Pushad]) && s.only(&["memory "]);
            faults && (pops || pushes)
        },
    },
    Tolerated {
        name: "far calls at the top of 4 GiB",
        reason: "a far call to 64-bit code that pushes to the last page of 4 GiB, where nothing is mapped, is \
                 #PF; seen to be repeated for ever on an AMD host",
        applies: |s| {
            let top =
                matches!(&s.guest.end, End::Exception { cr2: Some(a), .. } if a >> 12 == 0xf_ffff);
            s.host.end == End::Endless && s.insn.is_call_far() && top
        },
    },
    Tolerated {
        name: "past the last byte of 4 GiB",
        reason: "whether an access that wraps around a segment of 4 GiB faults is the \
                 implementation's (SDM Vol. 3, 5.3)",
        applies: |s| {
            let (host, guest) = s.vectors();
            let top = matches!(&s.guest.end, End::Exception { cr2: Some(a), .. }
                if *a >= 0xffff_ffc0 || *a < 0x1000);
            s.case.bits == 32 && matches!(host, Some(v::GP | v::SS)) && guest == Some(v::PF) && top
        },
    },
    Tolerated {
        name: "#UD before the last byte is fetched",
        reason: "whether bytes behind an undefined opcode are fetched before it is #UD is the \
                 implementation's",
        applies: |s| {
            let end = CODE + (CODE_PAGES * PAGE) as u64;
            let fetch =
                |o: &Outcome| matches!(o.end, End::Exception { cr2: Some(a), .. } if a == end);
            let ud = |v| v == Some(v::UD);
            let (host, guest) = s.vectors();
            fetch(s.host) && ud(guest) || ud(host) && fetch(s.guest)
        },
    },
    Tolerated {
        name: "far returns to inner or bad segments",
        reason: "RETF and IRET read the frame's outer part before, or behind, the checks of its \
                 inner part: the order of their faults is the implementation's",
        applies: |s| {
            let (host, guest) = s.vectors();
            s.is(&[M::Retf, M::Iret, M::Iretd, M::Iretq])
                && matches!(host, Some(v::PF | v::GP | v::NP | v::SS))
                && matches!(guest, Some(v::GP | v::NP | v::SS))
                && s.only(&["end"])
        },
    },
    Tolerated {
        name: "MMX state behind #XM",
        reason: "whether a conversion to or from MMX registers that faults has made the x87 state \
                 that of MMX is the implementation's",
        applies: |s| {
            s.vectors() == (Some(v::XM), Some(v::XM))
                && (0..s.insn.op_count()).any(|n| s.insn.op_register(n).is_mm())
                && s.only(&["ftw", "fsw", "st"])
        },
    },
];

fn instructions(case: &Case) -> impl Iterator<Item = Instruction> {
    Decoder::with_ip(case.bits, &case.code, case.state.rip, DecoderOptions::NONE).into_iter()
}

/// The rule that explains a difference, if one does.
pub fn explanation(
    case: &Case,
    host: &Outcome,
    guest: &Outcome,
    differences: &[Difference],
) -> Option<&'static Tolerated> {
    let insns: Vec<Instruction> = instructions(case).collect();
    // A fault is the instruction's at RIP, which may begin in the middle of another; any could have
    // stored what differs in memory.
    let at = |rip: u64| {
        let from = usize::try_from(rip.checked_sub(case.state.rip)?).ok()?;
        let bytes = case.code.get(from..).filter(|b| !b.is_empty())?;
        Some(Decoder::with_ip(case.bits, bytes, rip, DecoderOptions::NONE).decode())
    };
    let mut faulted: Vec<Instruction> = [host.state.rip, guest.state.rip]
        .into_iter()
        .filter_map(at)
        .collect();
    let stored = differences.iter().all(|d| d.what.starts_with("memory "));
    if stored
        || !faulted
            .iter()
            .any(|f| insns.iter().any(|i| i.ip() == f.ip()))
    {
        faulted.extend(insns);
    }
    faulted.iter().find_map(|insn| {
        let from = (insn.ip() - case.state.rip) as usize;
        let seen = Seen {
            insn: *insn,
            bytes: &case.code[from..from + insn.len()],
            case,
            host,
            guest,
            differences,
        };
        TOLERATED.iter().find(|t| (t.applies)(&seen))
    })
}
