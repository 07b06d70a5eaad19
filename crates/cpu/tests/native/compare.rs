//! The comparison: makes instructions with operands that fit the host's memory, runs them on both
//! processors and reports what differs.

use crate::harness::Computer;
use anykvm_cpu::decode::{self, DecodeError, Insn};
use anykvm_cpu::events::vector;
use anykvm_cpu::state::{rflags, seg};
use anykvm_cpu::{Mode, Stop};
use std::ops::RangeInclusive;

use super::{
    CODE, DATA, DATA_BYTES, End, Host, LANDING_COUNT, LANDING_STEP, LANDINGS, Registers, host,
};
use iced_x86::{
    Code, CodeSize, ConstantOffsets, Decoder, DecoderOptions, EncodingKind, FlowControl, Formatter,
    Instruction, InstructionInfoFactory, Mnemonic, OpCodeTableKind, OpKind, Register,
};

const TABLES: u64 = 0x10_0000;
const PTES: u64 = TABLES + 0x3000;
/// The flags that are compared.
const FLAGS: u64 = rflags::STATUS | rflags::DF;

/// Numbers that look random (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 8) % n
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
    /// A value of the kind arithmetic goes wrong with.
    fn value(&mut self) -> u64 {
        let edge = self.pick(&[0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff])
            | self.pick(&[
                0,
                0,
                0x8000_0000,
                0xffff_ffff,
                1 << 63,
                u64::MAX >> 1,
                u64::MAX,
            ]);
        match self.below(4) {
            0 => edge,
            1 => self.below(64),
            2 => {
                let shift = self.below(64);
                self.next() >> shift
            }
            _ => self.next(),
        }
    }
}

/// Opcodes: one list for each of the maps 0, 0F and 0F38.
pub type Opcodes = [&'static [RangeInclusive<u8>]];

/// A random encoding: prefixes, REX, an opcode, and bytes enough for the rest.
fn encoding(random: &mut Random, opcodes: &Opcodes, bits: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    while random.below(3) == 0 && bytes.len() < 3 {
        bytes.push(random.pick(&[0x66, 0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x3e]));
    }
    if bits == 64 && random.below(2) == 0 {
        bytes.push(0x40 | random.below(16) as u8);
    }
    let maps: Vec<usize> = (0..opcodes.len())
        .filter(|m| !opcodes[*m].is_empty())
        .collect();
    let map = random.pick(&maps);
    let ranges = opcodes[map];
    let range = &ranges[random.below(ranges.len() as u64) as usize];
    let opcode = range.start() + random.below(u64::from(range.end() - range.start()) + 1) as u8;
    match map {
        0 => bytes.push(opcode),
        1 => bytes.extend([0x0f, opcode]),
        _ => bytes.extend([0x0f, 0x38, opcode]),
    }
    for _ in 0..12 {
        bytes.push(random.next() as u8);
    }
    bytes
}

/// Registers and data that make the instruction's memory operands fall into [`DATA`], its branches
/// on landings; `None` if that cannot be (two uses of one register, a target out of reach).
struct Setup<'a> {
    random: &'a mut Random,
    host: &'a mut Host,
    computer: &'a mut Computer,
    regs: Registers,
    used: Vec<Register>,
}

impl Setup<'_> {
    fn set(&mut self, r: Register, v: u64) -> Option<()> {
        let full = r.full_register();
        if self.used.contains(&full) {
            return None;
        }
        self.used.push(full);
        // An address size below 64 bits does not see the rest of the register.
        let garbage = if r.size() == 4 {
            self.random.next() << 32
        } else {
            0
        };
        self.regs.gpr[full.number()] = v | garbage;
        Some(())
    }

    /// An address for `size` bytes: mostly well inside, sometimes at the edges or beyond.
    fn address(&mut self, size: u64) -> u64 {
        let end = DATA + DATA_BYTES as u64;
        match self.random.below(16) {
            0 => end - self.random.below(size + 3),
            1 => DATA - 3 + self.random.below(6),
            2 => DATA + 0x1000 * (1 + self.random.below(3)) - self.random.below(size.max(1) + 1),
            3..6 => DATA + 0x1000 + self.random.below(0x200) * 8,
            6..8 => DATA + 0x1000 + self.random.below(0x80) * 64,
            _ => DATA + 0x400 + self.random.below(DATA_BYTES as u64 - 0x800),
        }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        if at >= DATA && at + bytes.len() as u64 <= DATA + DATA_BYTES as u64 {
            self.host.set_data(at, bytes);
            self.computer.put(at, bytes);
        }
    }

    fn landing(&mut self) -> u64 {
        LANDINGS + self.random.below(LANDING_COUNT) * LANDING_STEP
    }

    /// Makes the explicit memory operand's address; returns it.
    fn operand(
        &mut self,
        raw: &Instruction,
        offsets: &ConstantOffsets,
        bytes: &mut [u8],
    ) -> Option<u64> {
        let size = (raw.memory_size().size() as u64).max(1);
        let mut target = self.address(size);
        // No split locks: some hosts punish them.
        if raw.has_lock_prefix() || raw.mnemonic() == Mnemonic::Xchg {
            target &= !(size.min(8) - 1);
        }
        let (base, index) = (raw.memory_base(), raw.memory_index());
        if base == Register::RIP || base == Register::EIP || base == Register::None {
            if index != Register::None && index != Register::AL {
                return None;
            }
            let at = offsets.displacement_offset();
            let value = if base == Register::None {
                target
            } else {
                target.wrapping_sub(CODE + raw.len() as u64)
            };
            match offsets.displacement_size() {
                4 => bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes()),
                8 => bytes[at..at + 8].copy_from_slice(&value.to_le_bytes()),
                _ => return None,
            }
            return Some(target);
        }
        let mut rest = target.wrapping_sub(raw.memory_displacement64());
        if index == Register::AL {
            rest = rest.wrapping_sub(self.regs.gpr[0] & 0xff);
        } else if index != Register::None {
            let v = self.random.below(0x40);
            self.set(index, v)?;
            rest = rest.wrapping_sub(v * u64::from(raw.memory_index_scale()));
        }
        let rest = if base.size() == 4 {
            rest & 0xffff_ffff
        } else {
            rest
        };
        self.set(base, rest)?;
        Some(target)
    }

    fn prepare(
        &mut self,
        raw: &Instruction,
        offsets: &ConstantOffsets,
        bytes: &mut [u8],
    ) -> Option<()> {
        let pointer = if raw.code_size() == CodeSize::Code64 {
            8
        } else {
            4
        };
        let string = raw.is_string_instruction();
        if string {
            let wide = (0..raw.op_count())
                .all(|i| !matches!(raw.op_kind(i), OpKind::MemorySegESI | OpKind::MemoryESEDI));
            let (si, di, cx) = if wide {
                (Register::RSI, Register::RDI, Register::RCX)
            } else {
                (Register::ESI, Register::EDI, Register::ECX)
            };
            let (from, to) = (self.address(8), self.address(8));
            // Overlapping runs too.
            let near = from.wrapping_add(self.random.below(24)).wrapping_sub(12);
            let to = if self.random.below(3) == 0 { near } else { to };
            self.set(si, from)?;
            self.set(di, to)?;
            let most = self.random.pick(&[1, 2, 9, 40, 300, 3000]);
            let count = self.random.below(most);
            self.set(cx, count)?;
            // Comparisons that go on for a while.
            if self.random.below(2) == 0 && (DATA..DATA + 0x3000).contains(&to) {
                let fill = self.random.next() as u8;
                let length = self.random.pick(&[8, 64, 600]);
                self.put(to, &vec![fill; length]);
                self.put(from, &vec![fill; length]);
                self.regs.gpr[0] = u64::from(fill) * 0x0101_0101_0101_0101;
            }
        }
        if (0..raw.op_count()).any(|i| raw.op_kind(i) == OpKind::Memory)
            && raw.mnemonic() != Mnemonic::Lea
        {
            if matches!(
                raw.mnemonic(),
                Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
            ) && raw.op1_kind() == OpKind::Register
            {
                let far = self.random.below(1 << 15);
                let far = if self.random.below(2) == 0 {
                    far
                } else {
                    far.wrapping_neg()
                };
                let r = raw.op1_register();
                self.used.push(r.full_register());
                self.regs.gpr[r.number()] = far;
            }
            let at = self.operand(raw, offsets, bytes)?;
            if raw.is_jmp_near_indirect() || raw.is_call_near_indirect() {
                let target = self.landing();
                self.put(at, &target.to_le_bytes()[..pointer]);
            }
            // Exchanges that find what they compare with.
            if self.random.below(2) == 0 && at >= DATA && at + 16 <= DATA + DATA_BYTES as u64 {
                let pair = [self.regs.gpr[0], self.regs.gpr[2]];
                match raw.mnemonic() {
                    Mnemonic::Cmpxchg | Mnemonic::Cmpxchg16b => {
                        self.put(at, &pair[0].to_le_bytes());
                        self.put(at + 8, &pair[1].to_le_bytes());
                    }
                    Mnemonic::Cmpxchg8b => {
                        self.put(at, &(pair[0] as u32).to_le_bytes());
                        self.put(at + 4, &(pair[1] as u32).to_le_bytes());
                    }
                    _ => {}
                }
            }
        }
        if raw.is_stack_instruction() && !self.used.contains(&Register::RSP) {
            let sp = self.address(8);
            self.set(Register::RSP, sp)?;
            if raw.flow_control() == FlowControl::Return {
                let target = self.landing();
                self.put(sp, &target.to_le_bytes()[..pointer]);
            }
        }
        if matches!(raw.mnemonic(), Mnemonic::Enter | Mnemonic::Leave) {
            let bp = self.address(8);
            self.set(Register::RBP, bp)?;
        }
        match raw.op0_kind() {
            OpKind::NearBranch32 | OpKind::NearBranch64 => {
                let target = self.landing();
                let relative = target.wrapping_sub(CODE + raw.len() as u64);
                let at = offsets.immediate_offset();
                match offsets.immediate_size() {
                    1 => bytes[at] = i8::try_from(relative as i64).ok()? as u8,
                    _ => bytes[at..at + 4].copy_from_slice(&(relative as u32).to_le_bytes()),
                }
            }
            OpKind::Register if raw.is_jmp_near_indirect() || raw.is_call_near_indirect() => {
                let target = self.landing();
                self.set(raw.op0_register(), target)?;
            }
            _ => {}
        }
        let divides = matches!(raw.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
        let free = [Register::RAX, Register::RDX]
            .iter()
            .all(|r| !self.used.contains(r));
        if divides && free && self.random.below(2) == 0 {
            // Quotients that fit.
            self.regs.gpr[2] = self.random.pick(&[0, u64::MAX, self.regs.gpr[2]]);
            let small = self.random.below(1 << 14);
            self.regs.gpr[0] = self
                .random
                .pick(&[small, small.wrapping_neg(), self.regs.gpr[0]]);
        }
        Some(())
    }
}

/// Runs the decoded instruction on the software processor as often as it asks for.
fn run_guest(c: &mut Computer, insn: &Insn, before: &Registers) -> (Registers, End) {
    for (n, v) in (0..).zip(before.gpr) {
        c.cpu.state.regs[n] = v;
    }
    c.cpu.state.rflags = before.flags;
    let next = CODE + u64::from(insn.len);
    let mut end = End::At(0);
    for _ in 0..10_000 {
        c.cpu.state.set_rip(next);
        match (insn.handler)(&mut c.cpu, insn) {
            Ok(()) => end = End::At(c.cpu.state.rip()),
            Err(Stop::Fault) => {
                end = End::Signal(match c.cpu.fault().vector {
                    vector::DE => libc::SIGFPE,
                    vector::UD => libc::SIGILL,
                    vector::GP | vector::PF | vector::BR => libc::SIGSEGV,
                    vector::SS => libc::SIGBUS,
                    v => panic!("vector {v}"),
                });
            }
            Err(stop) => panic!("{stop:?} from {}", insn.raw),
        }
        if end != End::At(CODE) {
            break;
        }
    }
    let mut after = Registers {
        flags: c.cpu.state.rflags,
        ..Registers::default()
    };
    for (n, v) in (0..).zip(&mut after.gpr) {
        *v = c.cpu.state.regs[n];
    }
    (after, end)
}

fn computer(bits: u32) -> Computer {
    let mut c = Computer::long(2 << 20, CODE, TABLES);
    for page in 0..512 {
        if !(DATA..DATA + DATA_BYTES as u64).contains(&(page << 12)) {
            c.put64(PTES + page * 8, 0);
        }
    }
    if bits == 32 {
        // Compatibility mode: the same paging, so the same faults.
        c.cpu.state.seg[usize::from(seg::CS)].attr = 0xc09b;
        c.cpu.state_changed();
    }
    c
}

/// What 32-bit code sees of the registers.
fn visible(mut r: Registers, bits: u32) -> Registers {
    if bits == 32 {
        for v in &mut r.gpr {
            *v &= 0xffff_ffff;
        }
        r.gpr[8..].fill(0);
    }
    r
}

fn report(
    what: &str,
    insn: &Insn,
    before: &Registers,
    host: (Registers, End),
    guest: (Registers, End),
) -> String {
    let mut text = String::new();
    iced_x86::GasFormatter::new().format(&insn.raw, &mut text);
    let mut out = format!("{what}: {text}  ({:02x?})\n", insn.encoding());
    for n in 0..16 {
        let (b, h, g) = (before.gpr[n], host.0.gpr[n], guest.0.gpr[n]);
        out += &if h == g {
            format!(" r{n} {b:x} -> {h:x};")
        } else {
            format!("\n  r{n} {b:x} -> host {h:x} guest {g:x}\n ")
        };
    }
    out += &format!(
        "\n  flags {:x}  host {:x}  guest {:x} differ {:x}\n  host {:x?}  guest {:x?}\n",
        before.flags & FLAGS,
        host.0.flags & FLAGS,
        guest.0.flags & FLAGS,
        (host.0.flags ^ guest.0.flags) & FLAGS,
        host.1,
        guest.1,
    );
    out
}

fn undefined_flags(raw: &Instruction) -> u64 {
    let bits = raw.rflags_undefined();
    let map = [
        (iced_x86::RflagsBits::OF, rflags::OF),
        (iced_x86::RflagsBits::SF, rflags::SF),
        (iced_x86::RflagsBits::ZF, rflags::ZF),
        (iced_x86::RflagsBits::AF, rflags::AF),
        (iced_x86::RflagsBits::CF, rflags::CF),
        (iced_x86::RflagsBits::PF, rflags::PF),
    ];
    map.iter()
        .filter(|(b, _)| bits & b != 0)
        .map(|(_, f)| f)
        .sum()
}

/// Instructions of these opcodes that belong to other families, or that the host cannot be asked.
fn excluded(raw: &Instruction, has_66: bool, has_rep: bool) -> bool {
    let branch = raw.flow_control() != FlowControl::Next;
    let looping = matches!(
        raw.mnemonic(),
        Mnemonic::Loope | Mnemonic::Loopne | Mnemonic::Loop
    );
    // AMD's processors honour the operand-size prefix on near branches, and take REP on LOOPNE for
    // more than nothing; Intel's do not, and neither does this one.
    branch && has_66
        || looping && has_rep
        // XCHG of R8 behind a REP prefix is decoded as PAUSE.
        || raw.mnemonic() == Mnemonic::Pause
        // AMD reads 32 bits for the 16-bit form of MOVSXD, Intel 16.
        || raw.code() == Code::Movsxd_r16_rm16
        || raw.is_call_far_indirect()
        || raw.is_jmp_far_indirect()
        || matches!(raw.mnemonic(), Mnemonic::Xabort | Mnemonic::Xbegin | Mnemonic::Jmpe)
        // Others in the group of CMPXCHG8B.
        || raw.op_code().table() == OpCodeTableKind::T0F
            && raw.op_code().op_code() == 0xc7
            && !matches!(raw.mnemonic(), Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b)
        // EVEX behind BOUND's opcode; interrupt flag and HLT between CLC and STD.
        || raw.encoding() != EncodingKind::Legacy
        || matches!(raw.mnemonic(), Mnemonic::Cli | Mnemonic::Sti)
        // Control, debug and segment registers.
        || (0..raw.op_count()).any(|i| {
            let r = raw.op_register(i);
            raw.op_kind(i) == OpKind::Register && !r.is_gpr()
        })
}

/// Compares random instructions of these opcodes, with the host and here.
pub fn check(name: &str, bits: u32, opcodes: &Opcodes, rounds: u64) {
    let setting = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let seed = setting("ANYKVM_SEED").unwrap_or(1);
    let rounds = rounds * setting("ANYKVM_ROUNDS").unwrap_or(1);
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ seed << 32 ^ name.len() as u64);
    let mut host = host();
    host.set_bits(bits);
    let mut c = computer(bits);
    let mode: Mode = c.cpu.mode();
    let initial: Vec<u8> = (0..DATA_BYTES).map(|_| random.next() as u8).collect();
    host.set_data(DATA, &initial);
    c.put(DATA, &initial);
    let mut done = 0u64;
    let mut seen = std::collections::BTreeMap::new();
    let mut undefined = std::collections::BTreeMap::new();
    let mut failures = Vec::new();
    let mut info = InstructionInfoFactory::new();
    let mut memory = vec![0; DATA_BYTES];
    for _ in 0..rounds {
        let mut bytes = encoding(&mut random, opcodes, bits);
        let mut decoder = Decoder::with_ip(bits, &bytes, 0, DecoderOptions::NONE);
        let raw = decoder.decode();
        let has_66 = bytes[..4].contains(&0x66);
        let mut offsets = ConstantOffsets::default();
        if !raw.is_invalid() {
            let has_rep = bytes[..4].iter().any(|b| matches!(b, 0xf2 | 0xf3));
            if excluded(&raw, has_66, has_rep) {
                continue;
            }
            offsets = decoder.get_constant_offsets(&raw);
        }
        let mut regs = Registers {
            flags: random.next() & FLAGS | rflags::FIXED,
            ..Registers::default()
        };
        if random.below(4) != 0 {
            regs.flags &= !rflags::DF;
        }
        for r in &mut regs.gpr {
            *r = random.value();
        }
        regs.gpr[4] = DATA + 0x2000;
        let mut setup = Setup {
            random: &mut random,
            host: &mut host,
            computer: &mut c,
            regs,
            used: Vec::new(),
        };
        if !raw.is_invalid() && setup.prepare(&raw, &offsets, &mut bytes).is_none() {
            continue;
        }
        let mut regs = visible(setup.regs, bits);
        bytes.truncate(if raw.is_invalid() { 15 } else { raw.len() });
        let insn = match decode::decode(&bytes, mode) {
            Ok(insn) => insn,
            Err(DecodeError::Invalid) => {
                // 8F with a reserved extension is AMD's XOP space, 62 is EVEX's.
                if bytes[..6].iter().any(|b| matches!(b, 0x8f | 0x62)) {
                    continue;
                }
                host.put(&bytes);
                let (_, end) = host.run(&regs);
                if end != End::Signal(libc::SIGILL) {
                    failures.push(format!(
                        "{bytes:02x?} is invalid here; on the host: {end:x?}\n"
                    ));
                }
                continue;
            }
            // Neighbours in the opcode map that are no integer instructions.
            Err(_) => continue,
        };
        host.put(&bytes);
        // The same instruction with other values in the registers that are not addresses.
        let fixed: Vec<Register> = {
            let i = info.info(&insn.raw);
            let memory = i.used_memory().iter().flat_map(|m| [m.base(), m.index()]);
            let implicit = [
                Register::RSP,
                Register::RBP,
                Register::RCX,
                Register::RSI,
                Register::RDI,
            ];
            memory.chain(implicit).map(|r| r.full_register()).collect()
        };
        for again in 0..4 {
            if again > 0 {
                if insn.raw.flow_control() != FlowControl::Next
                    || insn.op1 != 255 && !fixed.is_empty() && insn.raw.mnemonic() == Mnemonic::Bt
                {
                    break;
                }
                for (n, r) in regs.gpr.iter_mut().enumerate() {
                    let fixed = fixed.iter().any(|f| f.is_gpr() && f.number() == n);
                    let other = insn.raw.op1_kind() == OpKind::Register
                        && insn.raw.op1_register().full_register().number() == n;
                    let free = !fixed && !other;
                    if free && random.below(2) == 0 {
                        *r = random.value();
                    }
                }
                regs.flags =
                    regs.flags & rflags::DF | random.next() & rflags::STATUS | rflags::FIXED;
            }
            regs = visible(regs, bits);
            let expected = host.run(&regs);
            let got = run_guest(&mut c, &insn, &regs);
            let (expected, got) = (
                (visible(expected.0, bits), expected.1),
                (visible(got.0, bits), got.1),
            );
            done += 1;
            *seen
                .entry(format!("{:?}", insn.raw.mnemonic()))
                .or_insert(0u64) += 1;
            c.memory.read(DATA, &mut memory).unwrap();
            let loose = undefined_flags(&insn.raw);
            let differ = (expected.0.flags ^ got.0.flags) & FLAGS;
            let same_memory = memory == host.data();
            // A POPA that faults half way may have loaded some registers; this one never has.
            let partial = matches!(insn.raw.mnemonic(), Mnemonic::Popa | Mnemonic::Popad)
                && matches!(expected.1, End::Signal(_));
            if expected.0.gpr != got.0.gpr && !partial
                || expected.1 != got.1
                || differ & !loose != 0
                || !same_memory
            {
                let what = if same_memory {
                    "differs"
                } else {
                    "differs in memory"
                };
                failures.push(report(what, &insn, &regs, expected, got));
                host.set_data(DATA, &memory);
            } else if differ != 0 {
                undefined
                    .entry(format!("{:?} {differ:x}", insn.raw.mnemonic()))
                    .or_insert_with(|| {
                        report("undefined flags differ", &insn, &regs, expected, got)
                    });
            }
        }
        if failures.len() >= 5 {
            break;
        }
    }
    println!(
        "{name}: {done} comparisons, {} mnemonics: {seen:?}",
        seen.len()
    );
    for text in undefined.values() {
        println!("{text}");
    }
    assert!(failures.is_empty(), "{}", failures.concat());
    assert!(
        undefined.is_empty(),
        "undefined flags differ: {:?}",
        undefined.keys()
    );
}
