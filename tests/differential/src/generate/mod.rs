//! Random cases.

mod encoding;
pub mod excluded;
mod fit;
mod program;
mod state;

use crate::case::{CODE, CODE_PAGES, Case, PAGE, Patch, State};
use crate::features::Features;
use crate::host::{MAX_PATCH_BYTES, PATCH_HEAD};
use crate::random::{Kind, Random};
use encoding::Template;
use iced_x86::{
    Code, ConstantOffsets, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, OpAccess,
    Register,
};
use std::collections::BTreeMap;

/// What to make.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// 64 or 32; 0 for both.
    pub bits: u32,
    /// Only encodings whose code, mnemonic or extension contains this, one instruction a case.
    pub only: Option<String>,
}

/// Makes cases.
pub struct Generator {
    features: Features,
    random: Random,
    sets: Vec<Set>,
    only: bool,
    /// AVX-512's registers are part of cases.
    avx512: bool,
    info: InstructionInfoFactory,
    /// Instructions that were made and left out, by reason.
    pub excluded: BTreeMap<&'static str, u64>,
}

/// Encodings of one mode.
struct Set {
    bits: u32,
    /// Of extensions that both processors have, by mnemonic.
    present: Vec<Vec<Template>>,
    /// Of extensions that neither has: #UD, or what else the bytes mean then.
    absent: Vec<Template>,
}

/// A case in the making.
struct Draft {
    case: Case,
    /// Where the instruction that is being made begins.
    at: usize,
    /// Registers that instructions so far have written, or that have their final values.
    fixed: Vec<Register>,
    kind: Kind,
    /// It is a long one, with branches.
    program: bool,
    /// Registers that a program's instructions may not write.
    reserved: Vec<Register>,
    /// The register that would have to have another value for the last instruction to fit.
    blocked: Option<Register>,
    /// MOVs whose immediate decides a register's value: the register, and where the immediate is.
    loads: Vec<(Register, usize)>,
}

impl Generator {
    /// A generator for a seed. Instructions are of extensions that both processors have, or neither.
    pub fn new(features: Features, components: u64, wanted: &Wanted, seed: u64) -> Self {
        let chosen = |code: Code| match &wanted.only {
            None => true,
            Some(word) => is_named(code, &word.to_ascii_lowercase()),
        };
        let mut sets = Vec::new();
        for bits in [64, 32] {
            if wanted.bits != 0 && wanted.bits != bits {
                continue;
            }
            let mut present: BTreeMap<String, Vec<Template>> = BTreeMap::new();
            let mut absent = Vec::new();
            for code in Code::values().filter(|c| chosen(*c)) {
                let Some(t) = Template::of(code, bits) else {
                    continue;
                };
                if features.present(t.features()) {
                    let name = format!("{:?}", code.mnemonic());
                    present.entry(name).or_default().push(t);
                } else if features.comparable(t.features()) {
                    absent.push(t);
                }
            }
            sets.push(Set {
                bits,
                present: present.into_values().collect(),
                absent,
            });
        }
        sets.retain(|s| !s.present.is_empty() || !s.absent.is_empty());
        Self {
            features,
            random: Random::new(seed, 0),
            sets,
            only: wanted.only.is_some(),
            avx512: components & crate::layout::AVX512 == crate::layout::AVX512,
            info: InstructionInfoFactory::new(),
            excluded: BTreeMap::new(),
        }
    }

    /// Whether there is anything to make.
    pub fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    /// The codes that cases should contain sooner or later.
    pub fn codes(&self) -> impl Iterator<Item = (u32, Code)> {
        let of = |s: &Set| -> Vec<(u32, Code)> {
            let all = s.present.iter().flatten();
            all.map(|t| (s.bits, t.code)).collect()
        };
        self.sets
            .iter()
            .flat_map(of)
            .collect::<Vec<_>>()
            .into_iter()
    }

    /// A case.
    pub fn case(&mut self) -> Case {
        let set = self.random.below(self.sets.len() as u64) as usize;
        if !self.only && self.random.once_in(3) {
            return self.program(set);
        }
        let r = &mut self.random;
        let count = if self.only || !r.once_in(5) {
            1
        } else {
            2 + r.below(7)
        };
        loop {
            let mut draft = self.draft(set);
            draft.case.state.rip = self.place();
            for _ in 0..count {
                self.add(&mut draft, set, count);
            }
            let room = (CODE + (CODE_PAGES * PAGE) as u64 - draft.case.state.rip) as usize;
            draft.case.code.truncate(room);
            if !draft.case.code.is_empty() {
                return draft.case;
            }
        }
    }

    /// A case without code.
    fn draft(&mut self, set: usize) -> Draft {
        let bits = self.sets[set].bits;
        Draft {
            case: Case {
                bits,
                code: Vec::new(),
                state: state::random(&mut self.random, bits, self.avx512),
                patches: Vec::new(),
            },
            at: 0,
            fixed: Vec::new(),
            kind: self.random.kind(),
            program: false,
            reserved: Vec::new(),
            blocked: None,
            loads: Vec::new(),
        }
    }

    /// Where code begins: anywhere, across the pages' boundary, or near the end of what is mapped.
    fn place(&mut self) -> u64 {
        let r = &mut self.random;
        match r.below(16) {
            0 => CODE + PAGE as u64 - r.below(16),
            1 => CODE + (CODE_PAGES * PAGE) as u64 - 1 - r.below(16),
            _ => CODE + 0x200 + r.below(0xc00),
        }
    }

    /// Adds an instruction whose operands fit.
    fn add(&mut self, draft: &mut Draft, set: usize, count: u64) {
        const ATTEMPTS: u32 = 12;
        for attempt in 1..=ATTEMPTS {
            let mut bytes = self.bytes(set, draft.program);
            let insn = draft.decode(&bytes).0;
            if insn.is_invalid() {
                let rare = if draft.program { 1000 } else { 8 };
                if !self.random.once_in(rare) && (draft.program || attempt < ATTEMPTS) {
                    continue;
                }
                if !self.may_be_undefined(&bytes) {
                    continue;
                }
                draft.case.code.extend(&bytes[..15]);
                return;
            }
            if let Some(reason) = excluded::reason(&insn) {
                *self.excluded.entry(reason).or_insert(0) += 1;
                continue;
            }
            if !self.features.comparable(insn.cpuid_features()) {
                continue;
            }
            if count > 1 && excluded::alone(&insn, &bytes) {
                continue;
            }
            if draft.program && !self.fits_program(draft, &insn) {
                continue;
            }
            if !self.fit(draft, &mut bytes) && (draft.program || attempt < ATTEMPTS) {
                continue;
            }
            draft.case.code.extend(&bytes[..insn.len()]);
            self.note_written(draft, &insn);
            return;
        }
    }

    /// Makes the operands. In a program, registers that stand in the way are loaded first.
    fn fit(&mut self, draft: &mut Draft, bytes: &mut [u8]) -> bool {
        const LOADS: u32 = 3;
        for _ in 0..LOADS {
            let (insn, offsets) = draft.decode(bytes);
            draft.blocked = None;
            if self.operands(draft, &insn, &offsets, bytes) {
                return true;
            }
            let Some(register) = draft.blocked.filter(|_| draft.program) else {
                return false;
            };
            if register == Register::RSP || draft.reserved.contains(&register) {
                return false;
            }
            let size = draft.case.bits as usize / 8;
            let at = draft.load(register.number(), 0, size);
            draft.fixed.retain(|r| *r != register);
            draft.loads.push((register, at));
        }
        false
    }

    fn bytes(&mut self, set: usize, program: bool) -> Vec<u8> {
        let r = &mut self.random;
        let set = &self.sets[set];
        let usual = |often| if program { 4000 } else { often };
        if !self.only && r.once_in(usual(25)) {
            let mut bytes = vec![0; 24];
            r.noise(&mut bytes);
            if r.once_in(2) {
                bytes[0] = r.pick(&[0x0f, 0x66, 0xf3, 0xf2, 0x48, 0xc4, 0xc5, 0x62]);
            }
            return bytes;
        }
        let absent = set.present.is_empty() || !set.absent.is_empty() && r.once_in(usual(40));
        let template = if absent {
            &set.absent[r.below(set.absent.len() as u64) as usize]
        } else {
            let group = &set.present[r.below(set.present.len() as u64) as usize];
            &group[r.below(group.len() as u64) as usize]
        };
        template.bytes(r, set.bits)
    }

    /// Whether bytes that iced cannot decode may be compared. What it does not decode and the host
    /// has is not the guest's.
    fn may_be_undefined(&self, bytes: &[u8]) -> bool {
        let opcode = bytes.iter().position(|b| {
            !matches!(
                b,
                0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x26 | 0x2e | 0x36 | 0x3e | 0x40
                    ..=0x4f | 0x64 | 0x65
            )
        });
        match opcode.map(|at| &bytes[at..]) {
            // EVEX: the host's AVX-512.
            Some([0x62, ..]) => self.avx512,
            // Opmask instructions, too, with operands that iced refuses.
            Some(
                [0xc5, _, 0x41..=0x4b | 0x90..=0x99, ..]
                | [0xc4, _, _, 0x41..=0x4b | 0x90..=0x99, ..],
            ) => self.avx512,
            Some([0xc4, _, _, 0x30..=0x33, ..]) => self.avx512,
            // AMD's 0F 01 group has members that iced does not know without options.
            Some([0x0f, 0x01, ..]) => false,
            _ => true,
        }
    }

    fn note_written(&mut self, draft: &mut Draft, insn: &Instruction) {
        for used in self.info.info(insn).used_registers() {
            let write = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
            if write {
                draft.fixed.push(used.register().full_register());
            }
        }
    }
}

/// Whether a code, its mnemonic or one of its extensions has this name; a name that ends with a star
/// stands for all that begin so.
fn is_named(code: Code, name: &str) -> bool {
    let features = code.cpuid_features();
    let all = format!("{code:?} {:?} {features:?}", code.mnemonic()).to_ascii_lowercase();
    let mut words = all.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    match name.strip_suffix('*') {
        Some(start) => words.any(|w| w.starts_with(start)),
        None => words.any(|w| w == name),
    }
}

impl Draft {
    /// The instruction these bytes would be at the end of the code, which is where it is made.
    fn decode(&mut self, bytes: &[u8]) -> (Instruction, ConstantOffsets) {
        self.at = self.case.code.len();
        let ip = self.case.state.rip + self.at as u64;
        let mut decoder = Decoder::with_ip(self.case.bits, bytes, ip, DecoderOptions::NONE);
        let insn = decoder.decode();
        (insn, decoder.get_constant_offsets(&insn))
    }

    /// Bytes of memory at the beginning, as far as they are writable.
    fn put(&mut self, at: u64, bytes: &[u8]) {
        use crate::case::{DATA, WRITABLE_PAGES};
        let end = DATA + (WRITABLE_PAGES * PAGE) as u64;
        if at < DATA || at >= end {
            return;
        }
        let bytes = &bytes[..bytes.len().min((end - at) as usize)];
        let size = |len: usize| PATCH_HEAD + len;
        let used: usize = self.case.patches.iter().map(|p| size(p.bytes.len())).sum();
        if used + size(bytes.len()) > MAX_PATCH_BYTES {
            return;
        }
        let bytes = bytes.to_vec();
        self.case.patches.push(Patch { at, bytes });
    }

    fn state(&mut self) -> &mut State {
        &mut self.case.state
    }
}
