//! Numbers that look random, and numbers of the kind arithmetic goes wrong with.

/// A generator (xorshift64*): a seed gives the same numbers on every machine.
#[derive(Clone, Debug)]
pub struct Random(u64);

/// What the elements of an operand look like.
#[derive(Clone, Copy, Debug)]
pub struct Kind(u64);

impl Random {
    /// A generator for one of many streams of a seed.
    pub fn new(seed: u64, stream: u64) -> Self {
        let z = seed
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(stream)
            .wrapping_mul(0xbf58_476d_1ce4_e5b9);
        Self((z ^ z >> 31).wrapping_mul(0x94d0_49bb_1331_11eb) | 1)
    }
    /// 64 bits.
    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.word() >> 8) % n
    }
    /// True once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    /// One of some.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// An integer.
    pub fn integer(&mut self) -> u64 {
        const LOW: [u64; 9] = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff];
        const HIGH: [u64; 7] = [
            0,
            0,
            0x8000_0000,
            0xffff_ffff,
            1 << 63,
            u64::MAX >> 1,
            u64::MAX,
        ];
        match self.below(5) {
            0 => self.pick(&LOW) | self.pick(&HIGH),
            1 => self.below(64),
            2 => {
                let shift = self.below(64);
                self.word() >> shift
            }
            3 => 1 << self.below(64),
            _ => self.word(),
        }
    }

    fn float(&mut self, exponent_bits: u32, fraction_bits: u32) -> u64 {
        let top = (1 << exponent_bits) - 1;
        let bias = top >> 1;
        let exponent = match self.below(8) {
            0 => 0,
            1 => top,
            2 => 1,
            3 => top - 1,
            4 => self.below(top + 1),
            _ => (bias + self.below(2 * u64::from(fraction_bits) + 4))
                .saturating_sub(u64::from(fraction_bits))
                .min(top),
        };
        let ones = (1 << fraction_bits) - 1;
        let fraction = match self.below(8) {
            0 | 1 => 0,
            2 => 1 << (fraction_bits - 1),
            3 => ones,
            4 => 1 << self.below(fraction_bits.into()),
            5 => (self.word() & ones) & !(ones >> 6),
            _ => self.word() & ones,
        };
        (self.word() & 1) << (exponent_bits + fraction_bits) | exponent << fraction_bits | fraction
    }

    /// An 80-bit number.
    pub fn extended(&mut self) -> [u8; 10] {
        let d = self.float(11, 52);
        let exponent = match self.below(6) {
            0 => 0,
            1 => 0x7fff,
            2 => self.below(0x8000),
            3 => self.pick(&[1, 0x7ffe, 0x3ffe, 0x3c00, 0x3fff + 63, 0x3fff + 31]),
            // Of the size of integers.
            _ => 0x3fff - 4 + self.below(72),
        };
        let mut mantissa = (d & ((1 << 52) - 1)) << 11;
        if self.once_in(3) {
            mantissa |= self.word() & 0x7ff;
        }
        // Sometimes an unnormal, or a pseudo-denormal.
        if exponent != 0 && !self.once_in(12) || exponent == 0 && self.once_in(3) {
            mantissa |= 1 << 63;
        }
        let mut v = [0; 10];
        v[..8].copy_from_slice(&mantissa.to_le_bytes());
        let sign = (d >> 63) << 15;
        v[8..].copy_from_slice(&((exponent | sign) as u16).to_le_bytes());
        v
    }

    /// A kind of elements, for [`Random::fill`].
    pub fn kind(&mut self) -> Kind {
        Kind(self.below(12))
    }

    /// Fills memory or a register with elements of one kind.
    pub fn fill(&mut self, Kind(kind): Kind, bytes: &mut [u8]) {
        if kind == 0 {
            for part in bytes.chunks_mut(10) {
                part.copy_from_slice(&self.extended()[..part.len()]);
            }
            return;
        }
        for part in bytes.chunks_mut(8) {
            let v = match kind {
                1..4 => self.float(8, 23) | self.float(8, 23) << 32,
                4..7 => self.float(11, 52),
                7 => (0..4).fold(0, |v, n| v | self.float(5, 10) << (16 * n)),
                8 => (0..4).fold(0, |v, n| v | self.float(8, 7) << (16 * n)),
                9 => self.integer(),
                10 => (0..8).fold(0, |v, n| v | (self.integer() & 0xff) << (8 * n)),
                _ => self.word(),
            };
            part.copy_from_slice(&v.to_le_bytes()[..part.len()]);
        }
    }

    /// Fills bytes with noise, quickly.
    pub fn noise(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            part.copy_from_slice(&self.word().to_le_bytes()[..part.len()]);
        }
    }
}
