//! EVEX-encoded instructions with operands in memory at the ends of a page, against the host: which
//! elements are accessed, what faults, and what a fault leaves behind; with any MXCSR, so that
//! floating-point exceptions fault too. Gathers and scatters with elements outside the page.

mod harness;
mod host;

use anykvm_cpu::decode;
use anykvm_cpu::state::{XsaveArea, cr4};
use harness::Computer;
use host::instances::{OPMASKS, VECTORS_512, encode, instance, random_state, served};
use host::{Random, Runner};
use iced_x86::{Code, EncodingKind, Instruction, OpKind};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};

const PAGE: usize = 4096;
const DATA: u64 = 0x8_0000;
const CODE: u64 = 0x1000;
const TABLES: u64 = 0x1_0000;

/// A page of the host's memory between two that are not there.
struct HostPage(*mut u8);

impl HostPage {
    fn new() -> Self {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, whose first and last page nobody uses.
        unsafe {
            let all =
                mmap_anonymous(std::ptr::null_mut(), 3 * PAGE, prot, MapFlags::PRIVATE).unwrap();
            for page in [0, 2] {
                mprotect(
                    all.cast::<u8>().add(page * PAGE).cast(),
                    PAGE,
                    MprotectFlags::empty(),
                )
                .unwrap();
            }
            Self(all.cast::<u8>().add(PAGE))
        }
    }
    fn set(&mut self, bytes: &[u8; PAGE]) {
        // SAFETY: the page is this object's.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0, PAGE) }
    }
    fn get(&self) -> [u8; PAGE] {
        // SAFETY: as above.
        unsafe { self.0.cast::<[u8; PAGE]>().read() }
    }
}

struct Comparison {
    computer: Computer,
    runner: Runner,
    page: HostPage,
    random: Random,
    faults: usize,
    completed: usize,
}

impl Comparison {
    fn new() -> Self {
        let mut computer = Computer::long(1 << 20, CODE, TABLES);
        for page in [DATA / 4096 - 1, DATA / 4096 + 1] {
            computer.put64(TABLES + 0x3000 + page * 8, 0);
        }
        computer.cpu.state.cr4 |= cr4::OSXSAVE;
        computer.cpu.state.xcr0 = 0xe7;
        computer.cpu.state_changed();
        Self {
            computer,
            runner: Runner::new(),
            page: HostPage::new(),
            random: Random(0x0123_4567_89ab_cdef),
            faults: 0,
            completed: 0,
        }
    }

    /// Offset of the operand from the page's start: inside, or across one of its ends.
    fn place(&mut self, insn: &Instruction) -> i64 {
        let r = &mut self.random;
        if insn.is_vsib() {
            return 1800 + r.below(300) as i64;
        }
        let size = insn.memory_size().size().max(1) as u64;
        let element = insn.memory_size().element_size().max(1) as u64;
        // Mostly between elements, and some at any byte.
        let step = if r.below(8) == 0 { 1 } else { element };
        let across = (r.below(size / step + 1) * step) as i64;
        match r.below(4) {
            0 => 64 * r.below(32) as i64,
            1 => -across,
            _ => PAGE as i64 - across,
        }
    }

    /// Index registers: mostly inside the page.
    fn set_index(&mut self, insn: &Instruction, xsave: &mut [u8]) {
        let wide = format!("{:?}", insn.code().op_code().op_kinds()).contains("vsib64");
        let bytes = if wide { 8 } else { 4 };
        let scale = i64::from(insn.memory_index_scale());
        let n = insn.memory_index().number();
        for i in 0..64 / bytes {
            let r = &mut self.random;
            let reach = if r.below(24) == 0 { 2600 } else { 1000 };
            let v = (r.below(2 * reach) as i64 - reach as i64) / scale;
            let at = i * bytes;
            let place = match (n, at) {
                (16.., _) => XsaveArea::HI16_ZMM + (n - 16) * 64 + at,
                (_, 0..16) => XsaveArea::XMM + n * 16 + at,
                (_, 16..32) => XsaveArea::YMM_HI + n * 16 + at - 16,
                _ => XsaveArea::ZMM_HI + n * 32 + at - 32,
            };
            xsave[place..place + bytes].copy_from_slice(&v.to_le_bytes()[..bytes]);
        }
    }

    /// Compares one instance; false if it has no operand in memory.
    fn check(&mut self, code: Code) -> Result<bool, String> {
        let Some(insn) = instance(code, 64, &mut self.random) else {
            return Ok(false);
        };
        if !insn.op_kinds().any(|k| k == OpKind::Memory) {
            return Ok(false);
        }
        let Some(bytes) = encode(&insn, 64) else {
            return Ok(false);
        };
        let (mut before, _) = random_state(code, true, &mut self.random);
        if self.random.below(2) == 0 {
            before.xsave[24] |= 0x80;
            before.xsave[25] |= 0x1f;
        }
        let mut image = [0; PAGE];
        for word in image.chunks_exact_mut(8) {
            word.copy_from_slice(&self.random.number().to_le_bytes());
        }
        if insn.is_vsib() {
            self.set_index(&insn, &mut before.xsave);
        }
        let offset = self.place(&insn) - 64;

        let mut expected = before.clone();
        self.page.set(&image);
        expected.gprs[6] = (self.page.0 as u64).wrapping_add_signed(offset);
        let signal = self.runner.run(&bytes, &mut expected);

        let c = &mut self.computer;
        let s = &mut c.cpu.state;
        for n in (0..16).filter(|n| *n != 4) {
            s.regs[n] = before.gprs[usize::from(n)];
        }
        s.regs[6] = DATA.wrapping_add_signed(offset);
        s.set_rip(CODE + bytes.len() as u64);
        s.rflags = before.flags;
        s.events = Default::default();
        s.xsave.0[..XsaveArea::PKRU].copy_from_slice(&before.xsave[..XsaveArea::PKRU]);
        c.memory.write(DATA, &image).unwrap();
        let text = format!("{code:?} {bytes:02x?}: {insn}, at {:#x}", offset + 64);
        let decoded = match decode::decode(&bytes, c.cpu.mode()) {
            Err(decode::DecodeError::Invalid) if signal == libc::SIGILL => return Ok(true),
            decoded => decoded.map_err(|e| format!("{text}: {e:?}"))?,
        };
        let result = (decoded.handler)(&mut c.cpu, &decoded);
        let (here, host) = (result.is_err(), signal != 0);
        if here != host {
            let mask = &before.xsave[OPMASKS];
            return Err(format!(
                "{text}: {result:?}; on the host signal {signal}; masks {mask:x?}"
            ));
        }
        if here {
            self.faults += 1;
        } else {
            self.completed += 1;
        }
        // After an unmasked overflow or underflow the host's PE is that of a result with unlimited
        // exponent, which the masked run does not tell.
        let unmasked = !u16::from_le_bytes([before.xsave[24], before.xsave[25]]) >> 7;
        if signal == libc::SIGFPE && unmasked & 0b01_1000 != 0 {
            let pe = 1 << 5;
            expected.xsave[24] &= !pe;
            c.cpu.state.xsave.0[24] &= !pe;
        }
        self.compare(&text, &before.xsave, &expected)?;
        Ok(true)
    }

    fn compare(&self, text: &str, before: &[u8], expected: &host::Registers) -> Result<(), String> {
        let s = &self.computer.cpu.state;
        for (range, name) in [
            (24..28, "MXCSR"),
            (160..416, "XMM"),
            (576..832, "YMM"),
            (OPMASKS, "opmasks"),
            (VECTORS_512, "ZMM"),
        ] {
            let (want, have) = (&expected.xsave[range.clone()], &s.xsave.0[range.clone()]);
            if let Some(at) = want.iter().zip(have).position(|(a, b)| a != b) {
                let old = &before[range][at & !7..][..8.min(want.len())];
                let (want, have) = (&want[at & !7..], &have[at & !7..]);
                return Err(format!(
                    "{text}: {name} at {at}:\n before {old:02x?} mxcsr {:02x?} {:02x?}\n host {:02x?}\n here {:02x?}",
                    &before[24..28],
                    &before[OPMASKS],
                    &want[..8.min(want.len())],
                    &have[..8.min(have.len())]
                ));
            }
        }
        let mut memory = [0; PAGE];
        self.computer.memory.read(DATA, &mut memory).unwrap();
        let host = self.page.get();
        match memory.iter().zip(&host).position(|(a, b)| a != b) {
            Some(at) => Err(format!(
                "{text}: memory at {at:#x}: host {:02x?} here {:02x?}",
                &host[at & !7..][..8],
                &memory[at & !7..][..8]
            )),
            None => Ok(()),
        }
    }
}

#[test]
fn masks_decide_what_is_accessed() {
    if !std::is_x86_feature_detected!("avx512bw") {
        eprintln!("not compared: the reference needs a host with AVX-512");
        return;
    }
    let mut all = Comparison::new();
    let mut failures = Vec::new();
    let evex = |c: &Code| c.op_code().encoding() == EncodingKind::EVEX && served(*c);
    let mut codes = 0;
    for code in Code::values().filter(evex) {
        let mut compared = false;
        for _ in 0..100 {
            match all.check(code) {
                Ok(done) => compared |= done,
                Err(e) => {
                    failures.push(e);
                    break;
                }
            }
        }
        codes += usize::from(compared);
    }
    println!(
        "{codes} codes, {} completed, {} faults",
        all.completed, all.faults
    );
    assert!(
        failures.is_empty(),
        "{} failures:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert!(codes > 900 && all.completed > 10_000 && all.faults > 10_000);
}
