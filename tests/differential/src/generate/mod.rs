//! Random cases.

mod encoding;
pub mod excluded;
mod fit;
mod state;

use crate::case::{CODE, CODE_PAGES, Case, PAGE, Patch, State};
use crate::features::Features;
use crate::random::{Kind, Random};
use encoding::Template;
use iced_x86::{
    Code, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, OpAccess, Register,
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
        let r = &mut self.random;
        let count = if self.only || !r.once_in(5) {
            1
        } else {
            2 + r.below(7)
        };
        loop {
            let bits = self.sets[set].bits;
            let mut draft = Draft {
                case: Case {
                    bits,
                    code: Vec::new(),
                    state: state::random(&mut self.random, bits, self.avx512),
                    patches: Vec::new(),
                },
                at: 0,
                fixed: Vec::new(),
                kind: self.random.kind(),
            };
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
            let mut bytes = self.bytes(set);
            let bits = draft.case.bits;
            draft.at = draft.case.code.len();
            let ip = draft.case.state.rip + draft.at as u64;
            let mut decoder = Decoder::with_ip(bits, &bytes, ip, DecoderOptions::NONE);
            let insn = decoder.decode();
            if insn.is_invalid() {
                if !self.random.once_in(8) && attempt < ATTEMPTS {
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
            let offsets = decoder.get_constant_offsets(&insn);
            if !self.operands(draft, &insn, &offsets, &mut bytes) && attempt < ATTEMPTS {
                continue;
            }
            draft.case.code.extend(&bytes[..insn.len()]);
            self.note_written(draft, &insn);
            return;
        }
    }

    fn bytes(&mut self, set: usize) -> Vec<u8> {
        let r = &mut self.random;
        let set = &self.sets[set];
        if !self.only && r.once_in(25) {
            let mut bytes = vec![0; 24];
            r.noise(&mut bytes);
            if r.once_in(2) {
                bytes[0] = r.pick(&[0x0f, 0x66, 0xf3, 0xf2, 0x48, 0xc4, 0xc5, 0x62]);
            }
            return bytes;
        }
        let absent = set.present.is_empty() || !set.absent.is_empty() && r.once_in(40);
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
    /// Bytes of memory at the beginning, as far as they are writable.
    fn put(&mut self, at: u64, bytes: &[u8]) {
        use crate::case::{DATA, WRITABLE_PAGES};
        let end = DATA + (WRITABLE_PAGES * PAGE) as u64;
        if at < DATA || at >= end {
            return;
        }
        let room = (end - at) as usize;
        self.case.patches.push(Patch {
            at,
            bytes: bytes[..bytes.len().min(room)].to_vec(),
        });
    }

    fn state(&mut self) -> &mut State {
        &mut self.case.state
    }
}
