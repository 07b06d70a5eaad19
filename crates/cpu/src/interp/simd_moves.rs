//! The commonest vector instructions, done without a stub: moves of whole registers and of their
//! low parts, and the bitwise, comparing and adding integer operations that string functions are
//! made of. They can raise no exception but those of their memory operand.

use iced_x86::{EncodingKind, Mnemonic, OpKind};

use crate::assist::Class;
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::memory::access::Ram;

/// The handler, if the instruction is of this family. Vector register numbers go where register
/// codes of general registers are.
pub fn select(insn: &mut Insn) -> Option<Handler> {
    let raw = insn.raw;
    let vex = match raw.encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return None,
    };
    let vector = |i: u32| {
        i < raw.op_count()
            && raw.op_kind(i) == OpKind::Register
            && raw.op_register(i).is_vector_register()
    };
    let memory = |i: u32| i < raw.op_count() && raw.op_kind(i) == OpKind::Memory;
    let wide = (0..raw.op_count().min(3)).any(|i| vector(i) && raw.op_register(i).is_ymm());
    let shape = match raw.op_count() {
        2 if vector(0) && vector(1) => Shape::Copy,
        2 if vector(0) && memory(1) => Shape::Load,
        2 if memory(0) && vector(1) => Shape::Store,
        2 if vector(0) => Shape::FromGpr,
        2 if vector(1) => Shape::ToGpr,
        3 if vector(0) && vector(1) && vector(2) => Shape::Copy,
        3 if vector(0) && vector(1) && memory(2) => Shape::Load,
        _ => return None,
    };
    let handler = move_mask(raw.mnemonic(), shape, vex, wide)
        .or_else(|| whole(raw.mnemonic(), shape, vex, wide))
        .or_else(|| part(raw.mnemonic(), shape, vex))
        .or_else(|| operation(raw.mnemonic(), &Form { shape, vex, wide }))?;
    for (i, code) in [&mut insn.op0, &mut insn.op1, &mut insn.op2]
        .into_iter()
        .enumerate()
    {
        if vector(i as u32) {
            *code = raw.op_register(i as u32).number() as u8;
        }
    }
    // A legacy operation's first source is its destination.
    if raw.op_count() == 2 && is_binary(raw.mnemonic()) {
        insn.op2 = insn.op1;
        insn.op1 = insn.op0;
    }
    Some(handler)
}

/// Where the operands are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Copy,
    Load,
    Store,
    FromGpr,
    ToGpr,
}

/// Instantiates a handler for (VEX, 32 bytes); legacy forms have 16.
macro_rules! form {
    ($vex:expr, $wide:expr, $f:ident $(, $extra:tt)*) => {
        match ($vex, $wide) {
            (false, _) => $f::<false, false $(, $extra)*>,
            (true, false) => $f::<true, false $(, $extra)*>,
            (true, true) => $f::<true, true $(, $extra)*>,
        }
    };
}

/// Moves of whole registers.
fn whole(m: Mnemonic, shape: Shape, vex: bool, wide: bool) -> Option<Handler> {
    use Mnemonic as M;
    let aligned = match m {
        M::Movaps | M::Movapd | M::Movdqa | M::Vmovaps | M::Vmovapd | M::Vmovdqa => true,
        M::Movntps | M::Movntpd | M::Movntdq | M::Movntdqa => true,
        M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa => true,
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu => false,
        M::Vmovups | M::Vmovupd | M::Vmovdqu | M::Vlddqu => false,
        _ => return None,
    };
    Some(match (shape, aligned) {
        (Shape::Copy, _) => form!(vex, wide, copy),
        (Shape::Load, true) => form!(vex, wide, load, true),
        (Shape::Load, false) => form!(vex, wide, load, false),
        (Shape::Store, true) => form!(vex, wide, store, true),
        (Shape::Store, false) => form!(vex, wide, store, false),
        _ => return None,
    })
}

#[inline(always)]
fn check<const VEX: bool>(cpu: &mut Cpu) -> Result<(), Stop> {
    cpu.check_class(if VEX { Class::Avx } else { Class::Sse })
}

/// A register or memory operand of 16 or 32 bytes; in the former case the second half is zero.
type Halves = ([u8; 16], [u8; 16]);

#[inline(always)]
fn get<const WIDE: bool>(cpu: &Cpu, n: u8) -> Halves {
    (cpu.xmm(n), if WIDE { cpu.ymm_hi(n) } else { [0; 16] })
}

#[inline(always)]
fn set<const VEX: bool>(cpu: &mut Cpu, n: u8, v: &Halves) {
    if VEX {
        cpu.set_ymm(n, &v.0, &v.1)
    } else {
        cpu.set_xmm(n, &v.0)
    }
}

#[inline(always)]
fn read<const WIDE: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<Halves, Stop> {
    let offset = cpu.effective_address(insn);
    if WIDE {
        let [lo, hi] = cpu.read_32(insn.seg, offset)?;
        Ok((lo, hi))
    } else {
        Ok((cpu.read_16(insn.seg, offset)?, [0; 16]))
    }
}

#[inline(always)]
fn check_aligned<const WIDE: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_operand_alignment(insn, if WIDE { 32 } else { 16 })
}

// MOVAPS xmm, xmm and the like.
fn copy<const VEX: bool, const WIDE: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check::<VEX>(cpu)?;
    let v = get::<WIDE>(cpu, insn.op1);
    set::<VEX>(cpu, insn.op0, &v);
    Ok(())
}

// MOVUPS xmm, m128 and the like.
fn load<const VEX: bool, const WIDE: bool, const ALIGNED: bool>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    check::<VEX>(cpu)?;
    if ALIGNED {
        check_aligned::<WIDE>(cpu, insn)?;
    }
    let v = read::<WIDE>(cpu, insn)?;
    set::<VEX>(cpu, insn.op0, &v);
    Ok(())
}

// MOVUPS m128, xmm and the like; non-temporal stores are stores.
fn store<const VEX: bool, const WIDE: bool, const ALIGNED: bool>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    check::<VEX>(cpu)?;
    if ALIGNED {
        check_aligned::<WIDE>(cpu, insn)?;
    }
    let (lo, hi) = get::<WIDE>(cpu, insn.op1);
    let offset = cpu.effective_address(insn);
    if WIDE {
        cpu.write_32(insn.seg, offset, [lo, hi])
    } else {
        cpu.write_16(insn.seg, offset, lo)
    }
}

/// Moves of the low 4 or 8 bytes.
fn part(m: Mnemonic, shape: Shape, vex: bool) -> Option<Handler> {
    use Mnemonic as M;
    // Two-register forms of MOVSS and MOVSD merge; they are left to a stub.
    macro_rules! form {
        ($f:ident, $t:ty) => {
            if vex { $f::<true, $t> } else { $f::<false, $t> }
        };
    }
    Some(match (m, shape) {
        (M::Movd | M::Vmovd, Shape::FromGpr) => form!(from_gpr, u32),
        (M::Movd | M::Vmovd, Shape::ToGpr) => form!(to_gpr, u32),
        (M::Movd | M::Vmovd | M::Movss | M::Vmovss, Shape::Load) => form!(load_low, u32),
        (M::Movd | M::Vmovd | M::Movss | M::Vmovss, Shape::Store) => form!(store_low, u32),
        (M::Movq | M::Vmovq, Shape::FromGpr) => form!(from_gpr, u64),
        (M::Movq | M::Vmovq, Shape::ToGpr) => form!(to_gpr, u64),
        (M::Movq | M::Vmovq | M::Movsd | M::Vmovsd, Shape::Load) => form!(load_low, u64),
        (M::Movq | M::Vmovq | M::Movsd | M::Vmovsd, Shape::Store) => form!(store_low, u64),
        (M::Movq | M::Vmovq, Shape::Copy) if vex => copy_low::<true>,
        (M::Movq | M::Vmovq, Shape::Copy) => copy_low::<false>,
        (M::Movlps | M::Movlpd | M::Vmovlps | M::Vmovlpd, Shape::Store) => form!(store_low, u64),
        (M::Movlps | M::Movlpd, Shape::Load) => load_half::<0>,
        (M::Movhps | M::Movhpd, Shape::Load) => load_half::<8>,
        _ => return None,
    })
}

#[inline(always)]
fn low<T: Ram>(v: &[u8; 16]) -> T {
    let (words, _) = v.as_chunks::<8>();
    T::from_u64(u64::from_le_bytes(words[0]))
}

#[inline(always)]
fn extend(v: u64) -> Halves {
    (u128::from(v).to_le_bytes(), [0; 16])
}

fn from_gpr<const VEX: bool, T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check::<VEX>(cpu)?;
    let v = T::get(&cpu.state.regs, insn.op1).to_u64();
    set::<VEX>(cpu, insn.op0, &extend(v));
    Ok(())
}

fn to_gpr<const VEX: bool, T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check::<VEX>(cpu)?;
    low::<T>(&cpu.xmm(insn.op1)).set(&mut cpu.state.regs, insn.op0);
    Ok(())
}

fn load_low<const VEX: bool, T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check::<VEX>(cpu)?;
    let v = cpu.read::<T>(insn)?.to_u64();
    set::<VEX>(cpu, insn.op0, &extend(v));
    Ok(())
}

fn store_low<const VEX: bool, T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check::<VEX>(cpu)?;
    cpu.write(insn, low::<T>(&cpu.xmm(insn.op1)))
}

// MOVQ xmm, xmm clears the upper half of the destination.
fn copy_low<const VEX: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check::<VEX>(cpu)?;
    let v = low::<u64>(&cpu.xmm(insn.op1));
    set::<VEX>(cpu, insn.op0, &extend(v));
    Ok(())
}

// MOVLPS, MOVHPS xmm, m64 keep the other half.
fn load_half<const AT: usize>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check::<false>(cpu)?;
    let half = cpu.read::<u64>(insn)?;
    let mut v = cpu.xmm(insn.op0);
    v[AT..AT + 8].copy_from_slice(&half.to_le_bytes());
    cpu.set_xmm(insn.op0, &v);
    Ok(())
}

/// The sign bits of all bytes.
fn move_mask(m: Mnemonic, shape: Shape, vex: bool, wide: bool) -> Option<Handler> {
    if !matches!(m, Mnemonic::Pmovmskb | Mnemonic::Vpmovmskb) || shape != Shape::ToGpr {
        return None;
    }
    Some(form!(vex, wide, pmovmskb))
}

fn pmovmskb<const VEX: bool, const WIDE: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check::<VEX>(cpu)?;
    let (lo, hi) = get::<WIDE>(cpu, insn.op1);
    cpu.state.regs[insn.op0] = u64::from(sign_bits(&lo)) | u64::from(sign_bits(&hi)) << 16;
    Ok(())
}

#[inline(always)]
fn sign_bits(v: &[u8; 16]) -> u16 {
    // In each 8 bytes, the multiplication gathers the sign bits in the top byte.
    let (words, _) = v.as_chunks::<8>();
    let gather = |w: &[u8; 8]| {
        let signs = u64::from_le_bytes(*w) >> 7 & 0x0101_0101_0101_0101;
        signs.wrapping_mul(0x0102_0408_1020_4080) >> 56
    };
    (gather(&words[0]) | gather(&words[1]) << 8) as u16
}

/// An operation on each element of two 16-byte operands.
pub(super) trait Operation {
    /// The result.
    fn apply(a: [u8; 16], b: [u8; 16]) -> [u8; 16];
}

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident: $t:ty, $n:literal, |$a:ident, $b:ident| $body:expr;)*) => {$(
        pub(super) struct $name;
        impl Operation for $name {
            #[inline(always)]
            fn apply(a: [u8; 16], b: [u8; 16]) -> [u8; 16] {
                let mut out = [0; 16];
                let (x, _) = a.as_chunks::<$n>();
                let (y, _) = b.as_chunks::<$n>();
                let (to, _) = out.as_chunks_mut::<$n>();
                for ((to, x), y) in to.iter_mut().zip(x).zip(y) {
                    let ($a, $b) = (<$t>::from_le_bytes(*x), <$t>::from_le_bytes(*y));
                    *to = <$t>::to_le_bytes($body);
                }
                out
            }
        }
    )*};
}

operations! {
    And: u64, 8, |a, b| a & b;
    AndNot: u64, 8, |a, b| !a & b;
    Or: u64, 8, |a, b| a | b;
    Xor: u64, 8, |a, b| a ^ b;
    EqualB: u8, 1, |a, b| if a == b { u8::MAX } else { 0 };
    EqualW: u16, 2, |a, b| if a == b { u16::MAX } else { 0 };
    EqualD: u32, 4, |a, b| if a == b { u32::MAX } else { 0 };
    AddB: u8, 1, |a, b| a.wrapping_add(b);
    AddW: u16, 2, |a, b| a.wrapping_add(b);
    AddD: u32, 4, |a, b| a.wrapping_add(b);
    AddQ: u64, 8, |a, b| a.wrapping_add(b);
    SubB: u8, 1, |a, b| a.wrapping_sub(b);
    SubW: u16, 2, |a, b| a.wrapping_sub(b);
    SubD: u32, 4, |a, b| a.wrapping_sub(b);
    SubQ: u64, 8, |a, b| a.wrapping_sub(b);
    MinUB: u8, 1, |a, b| a.min(b);
    MaxUB: u8, 1, |a, b| a.max(b);
    MinUD: u32, 4, |a, b| a.min(b);
}

/// A family of handlers for every operation.
pub(super) trait Forms {
    /// The handler of an operation; `None` if the operands have another form.
    fn handler<O: Operation>(&self) -> Option<Handler>;
}

/// Legacy and VEX encoding.
struct Form {
    shape: Shape,
    vex: bool,
    wide: bool,
}

impl Forms for Form {
    fn handler<O: Operation>(&self) -> Option<Handler> {
        Some(match (self.shape, self.vex, self.wide) {
            (Shape::Copy, false, _) => registers::<O, false, false>,
            (Shape::Copy, true, false) => registers::<O, true, false>,
            (Shape::Copy, true, true) => registers::<O, true, true>,
            (Shape::Load, false, _) => with_memory::<O, false, false>,
            (Shape::Load, true, false) => with_memory::<O, true, false>,
            (Shape::Load, true, true) => with_memory::<O, true, true>,
            _ => return None,
        })
    }
}

fn is_binary(m: Mnemonic) -> bool {
    let form = Form {
        shape: Shape::Copy,
        vex: false,
        wide: false,
    };
    operation(m, &form).is_some()
}

/// The handler of a mnemonic that is one of these operations, of whatever encoding.
pub(super) fn operation(m: Mnemonic, forms: &impl Forms) -> Option<Handler> {
    use Mnemonic as M;
    match m {
        M::Pand | M::Andps | M::Andpd | M::Vpand | M::Vandps | M::Vandpd => forms.handler::<And>(),
        M::Vpandd | M::Vpandq => forms.handler::<And>(),
        M::Pandn | M::Andnps | M::Andnpd | M::Vpandn | M::Vandnps | M::Vandnpd => {
            forms.handler::<AndNot>()
        }
        M::Vpandnd | M::Vpandnq => forms.handler::<AndNot>(),
        M::Por | M::Orps | M::Orpd | M::Vpor | M::Vorps | M::Vorpd => forms.handler::<Or>(),
        M::Vpord | M::Vporq => forms.handler::<Or>(),
        M::Pxor | M::Xorps | M::Xorpd | M::Vpxor | M::Vxorps | M::Vxorpd => forms.handler::<Xor>(),
        M::Vpxord | M::Vpxorq => forms.handler::<Xor>(),
        M::Pcmpeqb | M::Vpcmpeqb => forms.handler::<EqualB>(),
        M::Pcmpeqw | M::Vpcmpeqw => forms.handler::<EqualW>(),
        M::Pcmpeqd | M::Vpcmpeqd => forms.handler::<EqualD>(),
        M::Paddb | M::Vpaddb => forms.handler::<AddB>(),
        M::Paddw | M::Vpaddw => forms.handler::<AddW>(),
        M::Paddd | M::Vpaddd => forms.handler::<AddD>(),
        M::Paddq | M::Vpaddq => forms.handler::<AddQ>(),
        M::Psubb | M::Vpsubb => forms.handler::<SubB>(),
        M::Psubw | M::Vpsubw => forms.handler::<SubW>(),
        M::Psubd | M::Vpsubd => forms.handler::<SubD>(),
        M::Psubq | M::Vpsubq => forms.handler::<SubQ>(),
        M::Pminub | M::Vpminub => forms.handler::<MinUB>(),
        M::Pmaxub | M::Vpmaxub => forms.handler::<MaxUB>(),
        M::Pminud | M::Vpminud => forms.handler::<MinUD>(),
        _ => None,
    }
}

#[inline(always)]
fn apply<O: Operation, const VEX: bool, const WIDE: bool>(cpu: &mut Cpu, insn: &Insn, b: &Halves) {
    let a = get::<WIDE>(cpu, insn.op1);
    let hi = if WIDE { O::apply(a.1, b.1) } else { [0; 16] };
    set::<VEX>(cpu, insn.op0, &(O::apply(a.0, b.0), hi));
}

fn registers<O: Operation, const VEX: bool, const WIDE: bool>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    check::<VEX>(cpu)?;
    let b = get::<WIDE>(cpu, insn.op2);
    apply::<O, VEX, WIDE>(cpu, insn, &b);
    Ok(())
}

fn with_memory<O: Operation, const VEX: bool, const WIDE: bool>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    check::<VEX>(cpu)?;
    if !VEX {
        check_aligned::<WIDE>(cpu, insn)?;
    }
    let b = read::<WIDE>(cpu, insn)?;
    apply::<O, VEX, WIDE>(cpu, insn, &b);
    Ok(())
}
