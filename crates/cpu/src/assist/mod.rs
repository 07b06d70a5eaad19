//! Native assist: an instruction that only computes runs on the host's own processor.
//!
//! For such an instruction a *stub* is generated once: a function that loads the registers the
//! instruction uses from a [`Frame`], executes it with its memory operand redirected into the frame,
//! and stores what it wrote. The interpreter fills the frame from the guest's registers and memory,
//! calls the stub, looks at the exceptions it raised, and only then commits the results
//! ([`crate::interp::simd::native`]). Results are the host's own, bit for bit; what the host lacks
//! the guest gets #UD for.
//!
//! Stubs are shared by all processors of the process. Registers are renamed in them ([`plan`]), so
//! their number is that of distinct operations (opcode, immediate, operand in memory or not), not of
//! register combinations: no guest can use up the room there is for them.

mod arena;
mod emit;
mod features;
pub mod frame;
pub mod masking;
mod names;
pub mod plan;
pub mod stack;

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use iced_x86::Instruction;

use arena::Arena;
pub use frame::Frame;
use frame::{GPRS, OPMASKS, VECTORS};
pub use masking::Masking;
pub use plan::{Binding, Class, HIGH_BYTE, MemoryUse, Opmask, Plan, Underflow, Vector};
pub use stack::StackUse;

/// More than there are distinct operations.
const MAX_STUBS: usize = 1 << 19;
const CHUNK: usize = 256;

/// A generated stub and what its caller must know.
#[derive(Debug)]
pub struct Stub {
    entry: *const u8,
    short: Option<(*const u8, StackUse)>,
    /// Availability rules.
    pub class: Class,
    vectors: [Vector; VECTORS],
    vector_count: u8,
    gpr_writes: [bool; GPRS],
    gpr_count: u8,
    /// Opmask slots.
    pub opmasks: [Opmask; OPMASKS],
    /// Which elements of the memory operand are accessed.
    pub masking: Masking,
    /// The memory operand.
    pub memory: MemoryUse,
    /// Its size in bytes.
    pub size: u8,
    /// Its address must be a multiple of its size.
    pub aligned: bool,
    /// It needs the guest's status flags.
    pub reads_flags: bool,
    /// Status flags it may change.
    pub flags: u64,
    /// It obeys MXCSR.
    pub mxcsr: bool,
    /// Whether it may raise underflow.
    pub underflows: Underflow,
    /// It uses x87 or MMX registers.
    pub x87: bool,
}

// SAFETY: `entry` is code that nobody writes to, in a mapping that lives as long as the process.
unsafe impl Send for Stub {}
// SAFETY: as above.
unsafe impl Sync for Stub {}

impl Stub {
    fn new(plan: &Plan, entry: *const u8, short: Option<*const u8>) -> Self {
        let mut vectors = [Vector {
            host: 0,
            read: false,
            write: false,
            bytes: 16,
        }; VECTORS];
        for (to, from) in vectors.iter_mut().zip(&plan.vectors) {
            *to = *from;
        }
        let mut gpr_writes = [false; GPRS];
        for (to, from) in gpr_writes.iter_mut().zip(&plan.gprs) {
            *to = from.write;
        }
        Self {
            entry,
            short: short.zip(plan.stack),
            class: plan.class,
            vectors,
            vector_count: plan.vectors.len() as u8,
            gpr_writes,
            gpr_count: plan.gprs.len() as u8,
            opmasks: plan.opmasks,
            masking: plan.masking,
            memory: plan.memory,
            size: plan.size,
            aligned: plan.aligned,
            reads_flags: plan.flags_in != 0,
            flags: plan.flags_out,
            mxcsr: plan.mxcsr,
            underflows: plan.underflows,
            x87: plan.x87,
        }
    }

    /// Vector slots in use.
    #[inline(always)]
    pub fn vectors(&self) -> &[Vector] {
        self.vectors
            .get(..usize::from(self.vector_count))
            .unwrap_or_default()
    }

    /// For each general register slot in use, whether it is written.
    #[inline(always)]
    pub fn gprs(&self) -> &[bool] {
        self.gpr_writes
            .get(..usize::from(self.gpr_count))
            .unwrap_or_default()
    }

    /// What it does to the x87 stack, if there is a short way ([`Stub::call_short`]).
    #[inline(always)]
    pub fn stack(&self) -> Option<&StackUse> {
        self.short.as_ref().map(|(_, stack)| stack)
    }

    /// Runs the short form, which takes x87 registers from `Frame::st` and leaves them there.
    #[inline(always)]
    pub fn call_short(&self, frame: &mut Frame) {
        if let Some((entry, _)) = self.short {
            // SAFETY: as in `call`; `emit::short` generated it, and FCW masks every exception.
            unsafe {
                let entry: unsafe extern "sysv64" fn(*mut Frame) = std::mem::transmute(entry);
                entry(frame);
            }
        }
    }

    /// Runs the stub.
    #[inline(always)]
    pub fn call(&self, frame: &mut Frame) {
        // SAFETY: `entry` is a function of this type that `emit::stub` generated. It touches nothing
        // but the frame, its own stack and registers the ABI lets it clobber, and it faults on
        // nothing: memory operands lie in the frame, exceptions are masked or dropped, and an MXCSR
        // and FXSAVE image without reserved bits is what `native` puts into the frame.
        unsafe {
            let entry: unsafe extern "sysv64" fn(*mut Frame) = std::mem::transmute(self.entry);
            entry(frame);
        }
    }
}

/// The stubs of the process.
struct Registry {
    arena: Option<Arena>,
    by_key: Mutex<HashMap<Vec<u8>, u32>>,
    chunks: [OnceLock<Box<[OnceLock<Stub>]>>; MAX_STUBS / CHUNK],
}

static REGISTRY: OnceLock<Registry> = OnceLock::new();

fn registry() -> &'static Registry {
    REGISTRY.get_or_init(|| {
        let arena = Arena::new()
            .inspect_err(|e| {
                eprintln!(
                    "anykvm: no executable memory ({e}): SIMD and x87 instructions will not work"
                );
            })
            .ok();
        Registry {
            arena,
            by_key: Mutex::new(HashMap::new()),
            chunks: [const { OnceLock::new() }; MAX_STUBS / CHUNK],
        }
    })
}

/// Maps the memory for stubs, so that processor threads need no executable mappings later. Call it
/// when a VM is created; it may be called any number of times. False if the system refuses.
pub fn prepare() -> bool {
    registry().arena.is_some()
}

impl Registry {
    fn get(&self, n: u32) -> Option<&Stub> {
        let n = n as usize;
        self.chunks.get(n / CHUNK)?.get()?.get(n % CHUNK)?.get()
    }

    /// The stub for a plan, generated if it is not there yet.
    fn number(&self, plan: &Plan) -> Option<u32> {
        let key = emit::key(plan).ok()?;
        let mut known = self.by_key.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(n) = known.get(&key) {
            return Some(*n);
        }
        let n = known.len();
        let chunk = self.chunks.get(n / CHUNK)?;
        let chunk = chunk.get_or_init(|| (0..CHUNK).map(|_| OnceLock::new()).collect());
        let arena = self.arena.as_ref()?;
        let entry = arena.add(&emit::stub(plan).ok()?)?;
        let short = match &plan.stack {
            Some(stack) => Some(arena.add(&emit::short(plan, stack).ok()?)?),
            None => None,
        };
        chunk
            .get(n % CHUNK)?
            .set(Stub::new(plan, entry, short))
            .ok()?;
        known.insert(key, n as u32);
        Some(n as u32)
    }
}

// What `bind` packs: the stub's number in bits 0-19; the broadcast's size (log2) and whether the
// destination starts blank in bits 20-22; vector registers from bit 24, general registers from bit
// 44, 5 bits each. EVEX-encoded instructions use two general registers at most, and the opmask
// registers take the place of the others, 3 bits each.
const NUMBER: u64 = (1 << 20) - 1;
const BROADCAST: u32 = 20;
const BLANK: u32 = 22;
const VECTOR_BITS: u32 = 24;
const GPR_BITS: u32 = 44;
const OPMASK_BITS: u32 = 54;

/// Finds or makes the stub of an instruction. The result, for [`lookup`], packs its number and the
/// [`Binding`]; `None` if the instruction is none that can run in a stub.
pub fn bind(raw: &Instruction) -> Option<u64> {
    let (plan, binding) = Plan::of(raw)?;
    let mut packed = u64::from(registry().number(&plan)?);
    for (i, v) in (0..).zip(&binding.vectors) {
        packed |= u64::from(*v & 31) << (VECTOR_BITS + 5 * i);
    }
    for (i, g) in (0..).zip(&binding.gprs) {
        packed |= u64::from(*g & 31) << (GPR_BITS + 5 * i);
    }
    if plan.class == Class::Evex {
        if plan.gprs.len() > 2 {
            return None;
        }
        packed |= u64::from(binding.blank) << BLANK;
        packed |= u64::from(binding.broadcast.max(1).ilog2()) << BROADCAST;
        for (i, k) in (0..).zip(&binding.opmasks) {
            packed |= u64::from(*k & 7) << (OPMASK_BITS + 3 * i);
        }
    }
    Some(packed)
}

/// Whether an instruction is one that can run in a stub.
pub fn serves(raw: &Instruction) -> bool {
    Plan::of(raw).is_some()
}

/// The stub and binding that [`bind`] packed, of an instruction that is not EVEX-encoded.
#[inline(always)]
pub fn lookup(packed: u64) -> Option<(&'static Stub, Binding)> {
    let stub = REGISTRY.get()?.get((packed & NUMBER) as u32)?;
    let mut b = Binding::default();
    for (i, v) in (0..).zip(&mut b.vectors) {
        *v = (packed >> (VECTOR_BITS + 5 * i)) as u8 & 31;
    }
    for (i, g) in (0..).zip(&mut b.gprs) {
        *g = (packed >> (GPR_BITS + 5 * i)) as u8 & 31;
    }
    Some((stub, b))
}

/// As [`lookup`], of an EVEX-encoded instruction.
#[inline(always)]
pub fn lookup_evex(packed: u64) -> Option<(&'static Stub, Binding)> {
    let (stub, mut b) = lookup(packed)?;
    b.blank = packed >> BLANK & 1 != 0;
    // There is no broadcast of single bytes.
    b.broadcast = 1 << (packed >> BROADCAST & 3) & !1;
    for (slot, k) in (0..).zip(&mut b.opmasks) {
        *k = opmask(packed, slot);
    }
    Some((stub, b))
}

/// The guest's register in an opmask slot of an EVEX-encoded instruction.
#[inline(always)]
pub fn opmask(packed: u64, slot: u32) -> u8 {
    (packed >> (OPMASK_BITS + 3 * slot)) as u8 & 7
}
