//! FXSAVE, FXRSTOR and the XSAVE family: against the host, and the checks of their operands.

mod harness;
mod host;

use anykvm_cpu::state::{XsaveArea, cr0, cr4, reg};
use anykvm_cpu::{Stop, cpuid, decode};
use harness::Computer;
use host::{Random, Registers, Runner};

const DATA: u64 = 0x8_0000;
const CODE: u64 = 0x1000;
const AREA: usize = 3072;
const OPMASK: usize = XsaveArea::OPMASK;
const ZMM_HI: usize = XsaveArea::ZMM_HI;
const HI16: usize = XsaveArea::HI16_ZMM;
const PKRU: usize = XsaveArea::PKRU;

#[repr(align(64))]
struct Aligned([u8; AREA]);

fn computer() -> Computer {
    let mut c = Computer::long(1 << 20, CODE, 0x10_000);
    c.cpu.state.cr4 |= cr4::OSXSAVE;
    c.cpu.state.xcr0 = host::components();
    c.cpu.state_changed();
    c.cpu.state.regs[reg::RSI] = DATA;
    c
}

fn execute(c: &mut Computer, bytes: &[u8]) -> Result<(), Stop> {
    let insn = decode::decode(bytes, c.cpu.mode()).unwrap();
    (insn.handler)(&mut c.cpu, &insn)
}

/// State of random numbers, some components in their initial configuration.
fn random_area(r: &mut Random) -> [u8; AREA] {
    let mut a = [0; AREA];
    let x87 = r.below(3) != 0;
    for st in (0..8).filter(|_| x87) {
        a[32 + st * 16..][..10].copy_from_slice(&r.extended());
    }
    a[0..2].copy_from_slice(&if x87 { 0x27f_u16 } else { 0x37f }.to_le_bytes());
    if x87 {
        a[2..4].copy_from_slice(&(r.next() as u16 & 0x7f00).to_le_bytes());
        a[4] = r.next() as u8;
    }
    a[24..28].copy_from_slice(&(0x1f80 | r.next() as u32 & 0xe07f).to_le_bytes());
    for range in [160..416, 576..832, OPMASK..ZMM_HI, ZMM_HI..HI16, HI16..PKRU] {
        if r.below(3) != 0 {
            for at in range.step_by(8) {
                a[at..at + 8].copy_from_slice(&r.next().to_le_bytes());
            }
        }
    }
    a
}

/// Fields that the host and this processor may fill differently: pointers, MXCSR_MASK.
fn comparable(a: &[u8]) -> Vec<u8> {
    let mut a = a.to_vec();
    a[6..24].fill(0);
    a[28..32].fill(0);
    a
}

fn compare(bytes: &[u8], name: &str, image: impl Fn(&mut Random) -> [u8; AREA]) {
    if !std::is_x86_feature_detected!("xsavec") {
        eprintln!("not compared: the reference needs a host with XSAVEC");
        return;
    }
    let mut c = computer();
    let mut runner = Runner::new();
    let mut r = Random(0x1357_9bdf_0246_8ace);
    for _ in 0..200 {
        let before = random_area(&mut r);
        let memory = image(&mut r);
        let mask = r.next() & host::components();

        let mut expected = Registers::new();
        expected.xsave[..AREA].copy_from_slice(&before);
        expected.gprs[0] = mask;
        let mut host_memory = Aligned(memory);
        expected.gprs[6] = host_memory.0.as_mut_ptr() as u64;
        assert_eq!(runner.run(bytes, &mut expected), 0);
        let want = host_memory.0;

        c.cpu.state.xsave.0[..PKRU].copy_from_slice(&before[..PKRU]);
        c.cpu.state.regs[reg::RAX] = mask;
        c.cpu.state.regs[reg::RDX] = 0;
        c.memory.write(DATA, &memory).unwrap();
        execute(&mut c, bytes).unwrap();
        let mut guest_memory = [0; AREA];
        c.memory.read(DATA, &mut guest_memory).unwrap();
        let (want, have) = (comparable(&want), comparable(&guest_memory));
        let at = want.iter().zip(&have).position(|(a, b)| a != b);
        assert_eq!(
            at, None,
            "{name}, mask {mask}: memory: host {want:x?}\nhere {have:x?}"
        );
        let (mut want, mut have) = (
            comparable(&expected.xsave[..PKRU]),
            comparable(&c.cpu.state.xsave.0[..PKRU]),
        );
        want[416..576].fill(0);
        have[416..576].fill(0);
        let at = want.iter().zip(&have).position(|(a, b)| a != b);
        assert_eq!(
            at, None,
            "{name}, mask {mask}: registers: host {want:x?}\nhere {have:x?}"
        );
    }
}

fn noise(r: &mut Random) -> [u8; AREA] {
    std::array::from_fn(|_| r.next() as u8)
}

fn standard(r: &mut Random) -> [u8; AREA] {
    let mut a = [0; AREA];
    host::rearrange(&random_area(r), &mut a, true);
    a[512] = (r.next() & host::components()) as u8;
    a
}

fn compacted(r: &mut Random) -> [u8; AREA] {
    let mut a = random_area(r);
    for byte in &mut a[576..] {
        *byte = r.next() as u8;
    }
    let present = (r.next() & host::components()) as u8;
    a[512] = present & r.next() as u8;
    a[520] = present;
    a[527] = 0x80;
    a
}

#[test]
fn fxsave_and_fxrstor_agree_with_the_host() {
    compare(&[0x48, 0x0f, 0xae, 0x06], "fxsave64 [rsi]", noise);
    compare(&[0x48, 0x0f, 0xae, 0x0e], "fxrstor64 [rsi]", standard);
}

#[test]
fn xsave_and_xrstor_agree_with_the_host() {
    const XRSTOR64: [u8; 4] = [0x48, 0x0f, 0xae, 0x2e];
    let xsave64 = [0x48, 0x0f, 0xae, 0x26];
    let xsaveopt64 = [0x48, 0x0f, 0xae, 0x36];
    let xsavec64 = [0x48, 0x0f, 0xc7, 0x26];
    compare(&xsave64, "xsave64 [rsi]", noise);
    compare(&xsaveopt64, "xsaveopt64 [rsi]", noise);
    compare(&xsavec64, "xsavec64 [rsi]", noise);
    compare(&XRSTOR64, "xrstor64 [rsi], standard", standard);
    compare(&XRSTOR64, "xrstor64 [rsi], compacted", compacted);
}

#[test]
fn xrstor_checks_the_header_and_mxcsr() {
    const XRSTOR: [u8; 4] = [0x48, 0x0f, 0xae, 0x2e];
    let mut c = computer();
    c.cpu.state.regs[reg::RAX] = 7;
    let mut good = [0; AREA];
    good[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    good[512] = 7;
    c.put(DATA, &good);
    execute(&mut c, &XRSTOR).unwrap();
    let faults = |c: &mut Computer, at: usize, v: u8| {
        let mut bad = good;
        bad[at] = v;
        c.put(DATA, &bad);
        let before = c.cpu.state.xsave;
        assert_eq!(execute(c, &XRSTOR), Err(Stop::Fault), "byte {at} = {v:#x}");
        assert_eq!(c.cpu.state.xsave, before);
    };
    // A component that is not enabled, reserved header bytes, MXCSR's reserved bits, a compacted
    // area whose XCOMP_BV lacks what XSTATE_BV has.
    faults(&mut c, 513, 0x01);
    faults(&mut c, 520, 1);
    faults(&mut c, 530, 1);
    faults(&mut c, 26, 1);
    faults(&mut c, 527, 0x80);
    c.put(DATA, &good);
    c.cpu.state.regs[reg::RSI] = DATA + 32;
    assert_eq!(execute(&mut c, &XRSTOR), Err(Stop::Fault));
}

#[test]
fn saving_needs_the_enabling_bits() {
    const XSAVE: [u8; 3] = [0x0f, 0xae, 0x26];
    const FXSAVE: [u8; 3] = [0x0f, 0xae, 0x06];
    let mut c = computer();
    execute(&mut c, &XSAVE).unwrap();
    c.cpu.state.cr4 &= !cr4::OSXSAVE;
    assert_eq!(execute(&mut c, &XSAVE), Err(Stop::Fault));
    execute(&mut c, &FXSAVE).unwrap();
    c.cpu.state.cr0 |= cr0::TS;
    assert_eq!(execute(&mut c, &FXSAVE), Err(Stop::Fault));
}

#[test]
fn fxsave_stores_pointers_of_x87_code() {
    let mut c = computer();
    c.cpu.state.set_rip(0x4003);
    // fadd dword [rsi+8], at 0x4000.
    execute(&mut c, &[0xd8, 0x46, 0x08]).unwrap();
    execute(&mut c, &[0x48, 0x0f, 0xae, 0x06]).unwrap();
    assert_eq!(c.get64(DATA + 8), 0x4000);
    assert_eq!(c.get64(DATA + 16), DATA + 8);
    assert_eq!(c.get64(DATA) >> 48, 0x046);
    // The state after reset has MXCSR 0x1f80, and FXSAVE reports which of its bits there are.
    assert_eq!(c.get64(DATA + 24), 0xffff_0000_1f80);
    assert_eq!(c.cpu.state.xsave.u32(XsaveArea::MXCSR), 0x1f80);
}

#[test]
fn outside_64_bit_mode_registers_that_are_not_there_stay() {
    // xsave [esi] and xrstor [esi] of everything.
    const XSAVE: [u8; 3] = [0x0f, 0xae, 0x26];
    const XRSTOR: [u8; 3] = [0x0f, 0xae, 0x2e];
    let mut c = Computer::protected(1 << 20, CODE as u32);
    c.cpu.state.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
    c.cpu.state.xcr0 = 0xe7;
    c.cpu.state_changed();
    c.cpu.state.regs[reg::RSI] = DATA;
    c.cpu.state.regs[reg::RAX] = 0xe7;
    c.put(DATA, &[0x11; AREA]);
    c.put(DATA + 512, &[0; 64]);
    c.cpu.state.xsave.0[160..416].fill(0x22);
    c.cpu.state.xsave.0[576..PKRU].fill(0x22);
    execute(&mut c, &XSAVE).unwrap();
    let mut area = [0; AREA];
    c.memory.read(DATA, &mut area).unwrap();
    // XMM, YMM, opmasks, ZMM0-15, ZMM16-31: what is stored, what is not.
    let parts = |[opmask, zmm, hi16]: [usize; 3]| {
        [
            (160..288, 288..416),
            (576..704, 704..832),
            (opmask..opmask + 64, 0..0),
            (zmm..zmm + 256, zmm + 256..zmm + 512),
            (0..0, hi16..hi16 + 1024),
        ]
    };
    let places: Vec<_> = cpuid::components().iter().map(|c| c.offset).collect();
    for (stored, kept) in parts([places[1], places[2], places[3]]) {
        assert!(
            area[stored.clone()].iter().all(|b| *b == 0x22),
            "{stored:?}"
        );
        assert!(area[kept.clone()].iter().all(|b| *b == 0x11), "{kept:?}");
    }
    c.put(DATA, &[0x33; 24]);
    c.put(DATA + 24, &[0x80, 0x1f, 0, 0]);
    c.put(DATA + 160, &[0x33; 352]);
    c.put(DATA + 576, &[0x33; AREA - 576]);
    execute(&mut c, &XRSTOR).unwrap();
    let x = &c.cpu.state.xsave.0;
    for (loaded, kept) in parts([OPMASK, ZMM_HI, HI16]) {
        assert!(x[loaded.clone()].iter().all(|b| *b == 0x33), "{loaded:?}");
        assert!(x[kept.clone()].iter().all(|b| *b == 0x22), "{kept:?}");
    }
}

#[test]
fn avx_512_state_is_enabled_as_a_whole() {
    use anykvm_cpu::crregs::xcr0_valid;
    for (value, valid) in [
        (0xe7, true),
        (0x07, true),
        (0x27, false),
        (0x67, false),
        (0xa7, false),
        (0xe3, false),
        (0xe6, false),
    ] {
        assert_eq!(xcr0_valid(value, 0xe7), valid, "{value:#x}");
    }
    assert!(!xcr0_valid(0xe7, 7));
}
