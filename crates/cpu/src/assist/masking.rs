//! Which elements of its memory operand an EVEX-encoded instruction accesses: under a write mask only
//! those whose results are wanted, and only they can fault (SDM Vol. 2, 2.7.7 and 2.8).

use iced_x86::{Instruction, Mnemonic as M, OpKind};

/// The elements of a memory operand, and how the write mask selects them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Masking {
    /// The opmask slot that is the write mask.
    pub slot: Option<u8>,
    /// Bytes of an element; 0 if the operand is accessed as a whole.
    pub element: u8,
    /// Elements in memory.
    pub count: u8,
    /// Bits of the write mask that matter. Where there are more than elements, the elements are
    /// repeated in the destination.
    pub lanes: u8,
    /// The elements selected lie side by side from the start (compress and expand).
    pub packed: bool,
    /// Elements that are not selected do not fault. If false, the whole operand is accessed.
    pub suppresses: bool,
}

fn low_bits(n: u8) -> u64 {
    u64::MAX.checked_shr(64 - u32::from(n)).unwrap_or(0)
}

impl Masking {
    /// Of an instruction without broadcast.
    pub fn of(insn: &Instruction, slot: Option<u8>) -> Self {
        let size = insn.memory_size();
        let packed = packs(insn.mnemonic());
        let masked = slot.is_some() || packed;
        if !masked || size.size() == 0 || !insn.op_kinds().any(|k| k == OpKind::Memory) {
            return Self {
                slot,
                ..Self::default()
            };
        }
        // Where there is a broadcast form, its element is what a mask bit stands for, whatever the
        // instruction does inside it.
        let mut broadcast = *insn;
        broadcast.set_is_broadcast(true);
        let element = match broadcast.memory_size().size() {
            0 => size.element_size(),
            n => n,
        };
        let count = size.size() / element;
        let lanes = if repeats(insn.mnemonic()) {
            insn.op0_register().size() / element
        } else {
            count
        };
        Self {
            slot,
            element: element as u8,
            count: count as u8,
            lanes: lanes as u8,
            packed,
            suppresses: suppresses(insn),
        }
    }

    /// A bit for each element in memory that the write mask selects.
    #[inline]
    pub fn selected(&self, mask: u64) -> u64 {
        let mask = mask & low_bits(self.lanes);
        if self.packed {
            return low_bits(mask.count_ones() as u8);
        }
        let mut selected = mask;
        let mut lane = self.count;
        while lane < self.lanes {
            selected |= mask >> lane;
            lane += self.count;
        }
        selected & self.all()
    }

    /// All elements.
    #[inline]
    pub fn all(&self) -> u64 {
        low_bits(self.count)
    }
}

fn packs(m: M) -> bool {
    matches!(
        m,
        M::Vcompressps
            | M::Vcompresspd
            | M::Vpcompressb
            | M::Vpcompressw
            | M::Vpcompressd
            | M::Vpcompressq
            | M::Vexpandps
            | M::Vexpandpd
            | M::Vpexpandb
            | M::Vpexpandw
            | M::Vpexpandd
            | M::Vpexpandq
    )
}

/// Loads that put one group of elements into all parts of the destination.
fn repeats(m: M) -> bool {
    matches!(
        m,
        M::Vbroadcastss
            | M::Vbroadcastsd
            | M::Vbroadcastf32x2
            | M::Vbroadcastf32x4
            | M::Vbroadcastf32x8
            | M::Vbroadcastf64x2
            | M::Vbroadcastf64x4
            | M::Vbroadcasti32x2
            | M::Vbroadcasti32x4
            | M::Vbroadcasti32x8
            | M::Vbroadcasti64x2
            | M::Vbroadcasti64x4
            | M::Vpbroadcastb
            | M::Vpbroadcastw
            | M::Vpbroadcastd
            | M::Vpbroadcastq
    )
}

/// Whether the instruction's exception class has fault suppression (SDM Vol. 2, 2.8: not those whose
/// name ends with NF). Those without it mix elements: which of the operand's are needed does not
/// follow from the mask.
fn suppresses(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        M::Valignd | M::Valignq | M::Vcvtne2ps2bf16 | M::Vdbpsadbw => false,
        M::Vgf2p8affineinvqb | M::Vgf2p8affineqb => false,
        M::Vextractf32x4 | M::Vextractf32x8 | M::Vextractf64x2 | M::Vextractf64x4 => false,
        M::Vextracti32x4 | M::Vextracti32x8 | M::Vextracti64x2 | M::Vextracti64x4 => false,
        M::Vinsertf32x4 | M::Vinsertf32x8 | M::Vinsertf64x2 | M::Vinsertf64x4 => false,
        M::Vinserti32x4 | M::Vinserti32x8 | M::Vinserti64x2 | M::Vinserti64x4 => false,
        M::Vmovddup | M::Vmovshdup | M::Vmovsldup => false,
        M::Vpackssdw | M::Vpacksswb | M::Vpackusdw | M::Vpackuswb | M::Vpalignr => false,
        M::Vpconflictd | M::Vpconflictq | M::Vpmultishiftqb => false,
        M::Vpermb | M::Vpermw | M::Vpermd | M::Vpermq | M::Vpermps | M::Vpermpd => false,
        M::Vpermi2b | M::Vpermi2w | M::Vpermi2d | M::Vpermi2q | M::Vpermi2ps => false,
        M::Vpermt2b | M::Vpermt2w | M::Vpermt2d | M::Vpermt2q | M::Vpermt2ps => false,
        M::Vpermi2pd | M::Vpermt2pd | M::Vpermilps | M::Vpermilpd => false,
        M::Vpmaddubsw | M::Vpmaddwd => false,
        M::Vpshufb | M::Vpshufd | M::Vpshufhw | M::Vpshuflw => false,
        M::Vshuff32x4 | M::Vshuff64x2 | M::Vshufi32x4 | M::Vshufi64x2 => false,
        M::Vshufps | M::Vshufpd | M::Vunpcklps | M::Vunpcklpd | M::Vunpckhps => false,
        M::Vunpckhpd | M::Vpunpcklbw | M::Vpunpcklwd | M::Vpunpckldq => false,
        M::Vpunpcklqdq | M::Vpunpckhbw | M::Vpunpckhwd | M::Vpunpckhdq => false,
        M::Vpunpckhqdq => false,
        // Shifts by the count in the operand's low 8 bytes.
        M::Vpsllw | M::Vpslld | M::Vpsllq | M::Vpsrlw | M::Vpsrld | M::Vpsrlq => {
            insn.op2_kind() != OpKind::Memory
        }
        M::Vpsraw | M::Vpsrad | M::Vpsraq => insn.op2_kind() != OpKind::Memory,
        _ => true,
    }
}
