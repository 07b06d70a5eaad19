//! Protection keys (SDM Vol. 3, 4.6.2; Vol. 2, RDPKRU and WRPKRU; Vol. 1, 13.5.7): the instructions,
//! the register in the XSAVE area, and cached translations that must follow it. Error codes are in
//! `paging_rights.rs`.

mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::cpuid::{self, Around, feature};
use anykvm_cpu::events::vector::{GP, UD};
use anykvm_cpu::state::{XsaveArea, cr0, cr4, reg};
use harness::Computer;
use harness::paging::TABLES;

const PTES: u64 = TABLES + 0x3000;
const CODE: u64 = 0x5000;
/// Pages from here on have a key.
const KEYED: u64 = 0x10;

/// 64-bit code at CPL 0 with CR4.PKE, events caught, `count` user pages from [`KEYED`] with a key.
fn machine(code: &[u8], key: u64, count: u64) -> Computer {
    let mut c = Computer::long(2 << 20, CODE, TABLES);
    c.catch_events();
    for page in KEYED..KEYED + count {
        c.put64(PTES + page * 8, page << 12 | 7 | key << 59);
    }
    c.put(CODE, code);
    c.cpu.state.cr4 |= cr4::PKE | cr4::OSXSAVE;
    c.cpu.state.xcr0 = 1 << 9 | 3;
    c.cpu.state_changed();
    c
}

fn at_port(c: &mut Computer, port: u16) {
    match c.run() {
        Exit::Io { port: p, .. } if p == port => {}
        other => panic!("{other:?}\n{}", c.cpu.dump()),
    }
}

const WRPKRU: [u8; 3] = [0x0f, 0x01, 0xef];
const RDPKRU: [u8; 3] = [0x0f, 0x01, 0xee];

/// SDM Vol. 2, RDPKRU and WRPKRU: operands and exceptions.
#[test]
fn instructions() {
    struct Case {
        section: &'static str,
        write: bool,
        pke: bool,
        rcx: u64,
        rdx: u64,
        want: Option<u8>,
    }
    let case = |section, write, pke, rcx, rdx, want| Case {
        section,
        write,
        pke,
        rcx,
        rdx,
        want,
    };
    const HIGH: u64 = 0xffff_ffff_0000_0000;
    let cases = [
        case("Vol. 2, RDPKRU", false, true, 0, 5, None),
        case("Vol. 2, RDPKRU", false, true, HIGH, 0, None),
        case("Vol. 2, RDPKRU", false, true, 1, 0, Some(GP)),
        case("Vol. 2, RDPKRU", false, false, 0, 0, Some(UD)),
        case("Vol. 2, RDPKRU", false, false, 1, 0, Some(UD)),
        case("Vol. 2, WRPKRU", true, true, 0, 0, None),
        case("Vol. 2, WRPKRU", true, true, HIGH, HIGH, None),
        case("Vol. 2, WRPKRU", true, true, 1, 0, Some(GP)),
        case("Vol. 2, WRPKRU", true, true, 0, 1, Some(GP)),
        case("Vol. 2, WRPKRU", true, false, 0, 0, Some(UD)),
    ];
    for (i, t) in cases.iter().enumerate() {
        let mut code = if t.write { WRPKRU } else { RDPKRU }.to_vec();
        code.extend([0xe6, 0x77]);
        let mut c = machine(&code, 0, 0);
        if !t.pke {
            c.cpu.state.cr4 &= !cr4::PKE;
        }
        let s = &mut c.cpu.state;
        s.xsave.set_u32(XsaveArea::PKRU, 0x1234);
        s.regs[reg::RAX] = HIGH | 0x8765_4320;
        s.regs[reg::RCX] = t.rcx;
        s.regs[reg::RDX] = t.rdx;
        c.cpu.state_changed();
        let name = format!("case {i} ({})", t.section);
        let Some(vector) = t.want else {
            at_port(&mut c, 0x77);
            let value = if t.write { 0x8765_4320 } else { 0x1234 };
            assert_eq!(c.cpu.state.xsave.pkru(), value, "{name}");
            if !t.write {
                assert_eq!((c.reg(reg::RAX), c.reg(reg::RDX)), (0x1234, 0), "{name}");
            }
            continue;
        };
        // Which vector: its gate alone leads to a port of its own.
        c.put(0x6010, &[0xe6, 0x98]);
        c.put64(
            0x2_0000 + u64::from(vector) * 16,
            0x6010 | 8 << 16 | 1 << 32 | 0x8e00 << 32,
        );
        at_port(&mut c, 0x98);
        assert_eq!(c.cpu.state.xsave.pkru(), 0x1234, "{name}");
    }
}

/// A translation that was used and cached is denied by the next access behind WRPKRU, and allowed
/// again; one page, then more pages than the processor remembers keys of, then key 0.
#[test]
fn cached_translations_follow_wrpkru() {
    for (key, pages) in [(3, 1), (3, 400), (0, 1)] {
        let deny = 1u32 << (key * 2);
        // mov esi, KEYED << 12; mov edi, pages; top: mov eax, [rsi]; mov [rsi], eax;
        // add esi, 0x1000; dec edi; jnz top; xor ecx, ecx; xor edx, edx; mov eax, deny; wrpkru;
        // out 0x77, al; mov eax, [rbx] (faults)
        let mut code = vec![0xbe];
        code.extend(((KEYED as u32) << 12).to_le_bytes());
        code.push(0xbf);
        code.extend((pages as u32).to_le_bytes());
        code.extend([0x8b, 0x06, 0x89, 0x06, 0x81, 0xc6, 0, 0x10, 0, 0]);
        code.extend([0xff, 0xcf, 0x75, 0xf2, 0x31, 0xc9, 0x31, 0xd2, 0xb8]);
        code.extend(deny.to_le_bytes());
        code.extend(WRPKRU);
        code.extend([0xe6, 0x77, 0x8b, 0x03, 0xe6, 0x78]);
        let mut c = machine(&code, key, pages);
        // Key 0 is the code's and the stack's own: only what is accessed as data matters, and the
        // event's frame and tables are in supervisor pages.
        for page in [6, 0x20, 0x21] {
            c.put64(PTES + page * 8, page << 12 | 3);
        }
        let last = (KEYED + pages - 1) << 12;
        c.cpu.state.regs[reg::RBX] = last;
        c.cpu.state_changed();
        at_port(&mut c, 0x77);
        at_port(&mut c, 0x99);
        assert_eq!(c.frame()[0], 0x21, "key {key}, {pages} pages");
        assert_eq!(c.cpu.state.cr2, last);
        // Allowed again: xor eax, eax; wrpkru; mov eax, [rbx]; out 0x79, al
        c.put(
            CODE + 0x100,
            &[
                0x31, 0xc0, 0x31, 0xc9, 0x31, 0xd2, 0x0f, 0x01, 0xef, 0x8b, 0x03, 0xe6, 0x79,
            ],
        );
        c.cpu.state.set_rip(CODE + 0x100);
        at_port(&mut c, 0x79);
    }
}

/// WD: reads go on, writes fault; for supervisor code only with CR0.WP (4.6.2).
#[test]
fn write_disable() {
    for wp in [true, false] {
        // mov [rbx], eax; mov eax, 2 << 6; wrpkru; mov eax, [rbx]; out 0x77, al; mov [rbx], eax;
        // out 0x78, al
        let mut code = vec![0x89, 0x03, 0xb8, 0x80, 0, 0, 0];
        code.extend(WRPKRU);
        code.extend([0x8b, 0x03, 0xe6, 0x77, 0x89, 0x03, 0xe6, 0x78]);
        let mut c = machine(&code, 3, 1);
        if !wp {
            c.cpu.state.cr0 &= !cr0::WP;
        }
        c.cpu.state.regs[reg::RBX] = KEYED << 12;
        c.cpu.state.regs[reg::RCX] = 0;
        c.cpu.state.regs[reg::RDX] = 0;
        c.cpu.state_changed();
        at_port(&mut c, 0x77);
        if wp {
            at_port(&mut c, 0x99);
            assert_eq!(c.frame()[0], 0x23);
        } else {
            at_port(&mut c, 0x78);
        }
    }
}

/// XRSTOR loads PKRU (component 9), and the TLB follows; XSAVE writes it (SDM Vol. 1, 13.5.7).
#[test]
fn xsave_carries_pkru() {
    let area = 0x4_0000;
    // mov ecx, [rbx]; xsave [rdi]; xrstor [rsi]; out 0x77, al; mov ecx, [rbx]
    let mut c = machine(
        &[
            0x8b, 0x0b, 0x0f, 0xae, 0x27, 0x0f, 0xae, 0x2e, 0xe6, 0x77, 0x8b, 0x0b,
        ],
        3,
        1,
    );
    let place = place() as u64;
    let s = &mut c.cpu.state;
    s.xsave.set_u32(XsaveArea::PKRU, 0xc000_0000);
    s.regs[reg::RAX] = 1 << 9;
    s.regs[reg::RDX] = 0;
    s.regs[reg::RBX] = KEYED << 12;
    s.regs[reg::RDI] = area;
    s.regs[reg::RSI] = area + 0x1000;
    c.put64(area + 0x1000 + 512, 1 << 9);
    // The upper half is reserved and not loaded.
    c.put64(area + 0x1000 + place, 0xffff_ffff_0000_0040);
    c.cpu.state_changed();
    at_port(&mut c, 0x77);
    assert_eq!(c.cpu.state.xsave.u64(XsaveArea::PKRU), 0x40);
    assert_eq!(c.get64(area + 512), 1 << 9);
    assert_eq!(c.get64(area + place), 0xc000_0000);
    at_port(&mut c, 0x99);
    assert_eq!(c.frame()[0], 0x21);
}

/// Where PKRU lies in the standard format.
fn place() -> u32 {
    let pkru = cpuid::components().iter().find(|c| c.bit == 9).unwrap();
    pkru.offset as u32
}

/// CPUID: PKU on any host, OSPKE as CR4.PKE, leaf 0xD's sizes (SDM Vol. 2, CPUID).
#[test]
fn cpuid_tells() {
    let mut c = machine(&[], 0, 0);
    assert!(c.cpu.cpuid.has(feature::PKU));
    let leaf = |c: &Computer, function, index| {
        c.cpu
            .cpuid
            .cpuid(&c.cpu.state, Around::default(), function, index)
    };
    assert_eq!(leaf(&c, 7, 0)[2] >> 3 & 3, 3);
    c.cpu.state.cr4 &= !cr4::PKE;
    assert_eq!(leaf(&c, 7, 0)[2] >> 3 & 3, 1);
    assert_eq!(leaf(&c, 0xd, 0)[0] >> 9 & 1, 1);
    assert_eq!(leaf(&c, 0xd, 9), [8, place(), 0, 0]);
    c.cpu.state.xcr0 = 1 << 9 | 3;
    assert_eq!(leaf(&c, 0xd, 0)[1], place() + 8);
}
