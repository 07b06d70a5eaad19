//! CPUID tells the truth: every flag that is offered is used, every instruction of an extension that is
//! not offered is #UD, and sizes and addresses are those that the processor keeps to.

mod harness;

use anykvm_cpu::cpuid::{self, Around, CpuidTable, Source, feature, supported};
use anykvm_cpu::decode;
use anykvm_cpu::events::vector;
use anykvm_cpu::state::{XSAVE_BYTES, cr0, cr4, efer, reg, seg};
use anykvm_cpu::{Exit, Stop, msr};
use harness::Computer;
use harness::instructions::instance;
use iced_x86::{Code, CpuidFeature, Encoder, Mnemonic};

const TABLES: u64 = 0x1_0000;
const DATA: u64 = 0x8_0000;

fn long() -> Computer {
    let mut c = Computer::long(1 << 20, 0x1000, TABLES);
    let s = &mut c.cpu.state;
    s.cr4 |= cr4::OSXSAVE | cr4::FSGSBASE | cr4::PKE;
    s.xcr0 = c.cpu.cpuid.xcr0_supported();
    s.regs[reg::RSI] = DATA;
    c.cpu.state_changed();
    c
}

fn protected() -> Computer {
    let mut c = Computer::protected(1 << 20, 0x1000);
    let s = &mut c.cpu.state;
    s.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
    s.xcr0 = c.cpu.cpuid.xcr0_supported();
    s.regs[reg::RSI] = DATA;
    c.cpu.state_changed();
    c
}

/// Runs code that ends in HLT; no exception may happen in it.
fn completes(c: &mut Computer, code: &[u8]) {
    c.put(0x1000, code);
    c.put(0x1000 + code.len() as u64, &[0xf4]);
    assert_eq!(c.run(), Exit::Hlt, "{code:x?}\n{}", c.cpu.dump());
}

/// MOV EAX, imm32.
fn mov_eax(value: u64) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend((value as u32).to_le_bytes());
    code
}

/// How a flag is shown to be true, where that does not follow from its instructions.
enum Proof {
    /// This code completes in 64-bit mode.
    Runs(&'static [u8]),
    /// MOV to CR4 takes these bits in protected mode without paging.
    Cr4(u64),
    /// WRMSR to EFER takes this bit.
    Efer(u64),
    /// RDMSR reads this register.
    Msr(u32),
    /// Something else.
    Test(fn()),
    /// Nothing that software could see depends on it: how fast something is, or that it does not
    /// happen to an interpreter.
    Nothing,
    /// The local APIC and machine check are the machine's: `crates/kvm` proves it.
    Machine,
}

const PROOFS: &[(&str, Proof)] = &[
    ("PCID", Proof::Test(pcid)),
    ("X2APIC", Proof::Machine),
    ("HYPERVISOR", Proof::Machine),
    ("VME", Proof::Cr4(cr4::VME | cr4::PVI)),
    ("DE", Proof::Cr4(cr4::DE)),
    ("PSE", Proof::Test(pages_of_4_mib)),
    ("PAE", Proof::Cr4(cr4::PAE)),
    ("MCE", Proof::Cr4(cr4::MCE)),
    ("APIC", Proof::Machine),
    ("MTRR", Proof::Msr(msr::index::MTRR_CAP)),
    ("PGE", Proof::Cr4(cr4::PGE)),
    ("MCA", Proof::Machine),
    ("PAT", Proof::Msr(msr::index::PAT)),
    ("PSE36", Proof::Test(pages_of_4_mib)),
    ("ARAT", Proof::Nothing),
    ("TSC_ADJUST", Proof::Msr(msr::index::TSC_ADJUST)),
    ("SMEP", Proof::Cr4(cr4::SMEP)),
    ("ERMS", Proof::Nothing),
    ("UMIP", Proof::Cr4(cr4::UMIP)),
    ("LA57", Proof::Cr4(cr4::LA57)),
    ("CLDEMOTE", Proof::Runs(&[0x0f, 0x1c, 0x06])),
    ("FSRM", Proof::Nothing),
    ("SPEC_CTRL", Proof::Msr(msr::index::SPEC_CTRL)),
    (
        "ARCH_CAPABILITIES",
        Proof::Msr(msr::index::ARCH_CAPABILITIES),
    ),
    ("FZRM", Proof::Nothing),
    ("FSRS", Proof::Nothing),
    ("FSRC", Proof::Nothing),
    // MOV ECX, 1; XGETBV
    (
        "XGETBV1",
        Proof::Runs(&[0xb9, 1, 0, 0, 0, 0x0f, 0x01, 0xd0]),
    ),
    ("LAHF_SAHF", Proof::Runs(&[0x9f, 0x9e])),
    ("CMP_LEGACY", Proof::Nothing),
    ("PREFETCHW", Proof::Runs(&[0x0f, 0x0d, 0x0e])),
    ("NX", Proof::Efer(efer::NX)),
    // PAVGB MM0, MM1
    ("MMXEXT", Proof::Runs(&[0x0f, 0xe0, 0xc1])),
    ("PAGE1GB", Proof::Test(pages_of_1_gib)),
    ("INVARIANT_TSC", Proof::Nothing),
    ("WBNOINVD", Proof::Runs(&[0xf3, 0x0f, 0x09])),
    ("AMD_IBRS", Proof::Msr(msr::index::SPEC_CTRL)),
    ("SSB_NO", Proof::Nothing),
    ("BTC_NO", Proof::Nothing),
    ("NO_NESTED_DATA_BP", Proof::Nothing),
    ("LFENCE_SERIALISING", Proof::Msr(msr::index::DE_CFG)),
    ("NULL_SELECTOR_CLEARS_BASE", Proof::Test(null_selector)),
    ("AUTOIBRS", Proof::Efer(efer::AUTOIBRS)),
    ("SRSO_NO", Proof::Nothing),
    ("TSA_SQ_NO", Proof::Nothing),
    ("TSA_L1_NO", Proof::Nothing),
];

#[test]
fn every_offered_flag_without_instructions_is_proved() {
    let table = CpuidTable::new(supported());
    for row in cpuid::offered() {
        assert!(table.has(row.feature), "{} is not in its leaf", row.name);
        if !row.gates.is_empty() {
            continue;
        }
        let Some((_, proof)) = PROOFS.iter().find(|(name, _)| *name == row.name) else {
            panic!("nothing proves {}", row.name);
        };
        println!("{}", row.name);
        match proof {
            Proof::Runs(code) => completes(&mut long(), code),
            Proof::Cr4(bits) => {
                let mut c = protected();
                let mut code = mov_eax(c.cpu.state.cr4 | bits);
                // MOV CR4, EAX
                code.extend([0x0f, 0x22, 0xe0]);
                completes(&mut c, &code);
                assert_eq!(c.cpu.state.cr4 & bits, *bits, "{}", row.name);
            }
            Proof::Efer(bit) => {
                let mut c = protected();
                let mut code = mov_eax(*bit);
                // MOV ECX, 0xc0000080; XOR EDX, EDX; WRMSR
                code.extend([0xb9, 0x80, 0, 0, 0xc0, 0x31, 0xd2, 0x0f, 0x30]);
                completes(&mut c, &code);
                assert_eq!(c.cpu.state.msr.efer, *bit, "{}", row.name);
            }
            Proof::Msr(index) => {
                let mut code = vec![0xb9];
                code.extend(index.to_le_bytes());
                // RDMSR
                code.extend([0x0f, 0x32]);
                completes(&mut long(), &code);
            }
            Proof::Test(test) => test(),
            Proof::Nothing | Proof::Machine => {}
        }
    }
}

#[test]
fn every_proof_is_of_a_flag() {
    for (name, _) in PROOFS {
        assert!(cpuid::FLAGS.iter().any(|row| row.name == *name), "{name}");
    }
}

fn pcid() {
    let mut c = long();
    let mut code = mov_eax(c.cpu.state.cr4 | cr4::PCIDE);
    code.extend([0x0f, 0x22, 0xe0]);
    completes(&mut c, &code);
    assert_ne!(c.cpu.state.cr4 & cr4::PCIDE, 0);
}

// SDM Vol. 3, table 4-4: bits 20-13 of the entry are bits 39-32 of the address.
fn pages_of_4_mib() {
    let mut c = protected();
    c.put(TABLES, &(0x83u32 | 1 << 13).to_le_bytes());
    c.put(TABLES + 4, &0x83u32.to_le_bytes());
    let s = &mut c.cpu.state;
    s.cr3 = TABLES;
    s.cr4 |= cr4::PSE;
    s.cr0 |= cr0::PG;
    s.set_rip(0x40_1000);
    c.cpu.state_changed();
    // MOV EAX, [0x1234]
    c.put(0x1000, &[0xa1, 0x34, 0x12, 0, 0]);
    let high = Exit::MmioRead {
        gpa: 0x1_0000_1234,
        len: 4,
    };
    assert_eq!(c.run(), high, "{}", c.cpu.dump());
}

fn pages_of_1_gib() {
    let mut c = long();
    // The second entry of the page-directory pointer table.
    c.put64(TABLES + 0x1000 + 8, 0x4000_0000 | 0x83);
    // MOV RAX, [0x4abc_def0]
    c.put(0x1000, &[0x48, 0xa1, 0xf0, 0xde, 0xbc, 0x4a, 0, 0, 0, 0]);
    let page = Exit::MmioRead {
        gpa: 0x4abc_def0,
        len: 8,
    };
    assert_eq!(c.run(), page, "{}", c.cpu.dump());
}

fn null_selector() {
    let mut c = long();
    c.cpu.state.seg[usize::from(seg::FS)].base = 0x1234;
    c.cpu.state_changed();
    // XOR EAX, EAX; MOV FS, EAX
    completes(&mut c, &[0x31, 0xc0, 0x8e, 0xe0]);
    assert_eq!(c.cpu.state.seg[usize::from(seg::FS)].base, 0);
}

/// What becomes of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Undefined,
    Executes,
}

/// Decodes and executes the instruction of a code; `None` if it has no encoding in this mode.
fn execute(c: &mut Computer, code: Code, bits: u32) -> Option<Outcome> {
    let insn = instance(code, bits)?;
    let mut encoder = Encoder::new(bits);
    encoder.encode(&insn, 0).ok()?;
    let mut bytes = encoder.take_buffer();
    bytes.resize(15, 0);
    let s = &mut c.cpu.state;
    s.regs[reg::RSI] = DATA;
    s.regs[reg::RSP] = 0x7000;
    s.regs[reg::RCX] = 0;
    s.regs[reg::RAX] = 0;
    s.regs[reg::RDX] = 0;
    s.set_rip(0x1000);
    let Ok(insn) = decode::decode(&bytes, c.cpu.mode()) else {
        return Some(Outcome::Undefined);
    };
    // An encoding that means something else without the extension (NOP, WBINVD).
    if insn.raw.code() != code {
        return None;
    }
    let done = (insn.handler)(&mut c.cpu, &insn);
    let undefined = done == Err(Stop::Fault) && c.cpu.fault().vector == vector::UD;
    Some(if undefined {
        Outcome::Undefined
    } else {
        Outcome::Executes
    })
}

fn execute_anywhere(code: Code) -> Option<Outcome> {
    let in_long = execute(&mut long(), code, 64);
    if in_long == Some(Outcome::Executes) {
        return in_long;
    }
    execute(&mut protected(), code, 32).or(in_long)
}

fn codes() -> impl Iterator<Item = Code> {
    Code::values().filter(|c| c.op_code().is_instruction())
}

/// Instructions of flags that are offered.
fn offered_instructions() -> Vec<CpuidFeature> {
    let rows = cpuid::offered().iter();
    rows.flat_map(|row| row.gates).copied().collect()
}

/// Instructions of flags that are not offered.
fn hidden_instructions() -> Vec<CpuidFeature> {
    let rows = cpuid::FLAGS.iter();
    rows.filter(|row| !cpuid::offered().iter().any(|o| o.name == row.name))
        .flat_map(|row| row.gates)
        .copied()
        .collect()
}

/// Undefined by definition, on AMD processors (SYSEXIT in long mode), or because `instance` gives all
/// operands of a gather the same register.
fn is_refused(code: Code) -> bool {
    let gather = format!("{code:?}").contains("gather");
    let undefined = matches!(code.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1);
    gather || undefined || code == Code::Sysexitq
}

#[test]
fn every_instruction_of_an_offered_flag_executes() {
    let gated = offered_instructions();
    let hidden = hidden_instructions();
    let mut reached = Vec::new();
    let mut missing = Vec::new();
    for code in codes() {
        let features = code.cpuid_features();
        let of_flag = features.iter().any(|f| gated.contains(f));
        let whole = features
            .iter()
            .all(|f| cpuid::has_instructions(*f) && !hidden.contains(f));
        if !of_flag || !whole || is_refused(code) {
            continue;
        }
        match execute_anywhere(code) {
            Some(Outcome::Executes) => reached.extend(features.iter().copied()),
            Some(Outcome::Undefined) => missing.push(code),
            None => {}
        }
    }
    assert!(missing.is_empty(), "#UD: {missing:?}");
    for row in cpuid::offered() {
        for gate in row.gates {
            assert!(reached.contains(gate), "{}: nothing executed", row.name);
        }
    }
}

#[test]
fn every_instruction_of_no_offered_flag_is_undefined() {
    let hidden = hidden_instructions();
    let mut executed = Vec::new();
    let mut tried = 0;
    for code in codes() {
        let features = code.cpuid_features();
        let absent = |f: &CpuidFeature| !cpuid::has_instructions(*f) || hidden.contains(f);
        if !features.iter().any(absent) || as_something_else(code) {
            continue;
        }
        match execute_anywhere(code) {
            Some(Outcome::Executes) => executed.push(code),
            Some(Outcome::Undefined) => tried += 1,
            None => {}
        }
    }
    assert!(executed.is_empty(), "executed: {executed:?}");
    assert!(tried > 500, "only {tried} were tried");
}

/// KVM's hypercalls, and RDSSP, which without shadow stacks is a NOP.
fn as_something_else(code: Code) -> bool {
    matches!(
        code,
        Code::Vmcall | Code::Vmmcall | Code::Rdsspd_r32 | Code::Rdsspq_r64
    )
}

#[test]
fn flags_that_are_not_offered_are_not_shown() {
    let table = CpuidTable::new(supported());
    for row in cpuid::FLAGS {
        let offered = cpuid::offered().iter().any(|o| o.name == row.name);
        assert_eq!(table.has(row.feature), offered, "{}", row.name);
    }
    // And no bit of a leaf of flags is without a row.
    for (leaf, index) in [(1, 0), (6, 0), (7, 0), (7, 1), (0xd, 1), (0x8000_0001, 0)] {
        let e = table.find(leaf, index).unwrap();
        let whole = |register| {
            let rows = cpuid::offered().iter().map(|row| row.feature);
            rows.filter(|f| (f.0, f.1, f.2) == (leaf, index, register))
                .fold(0, |bits, f| bits | 1u32 << f.3)
        };
        assert_eq!(e.ecx, whole(cpuid::Register::Ecx), "{leaf:#x}");
        let mut edx = whole(cpuid::Register::Edx);
        if leaf == 0x8000_0001 && table.is_amd() {
            let basic = table.find(1, 0).unwrap().edx;
            edx |= basic & cpuid::REPEATED_EDX;
        }
        assert_eq!(e.edx, edx, "{leaf:#x}");
    }
}

#[test]
fn maximum_leaves_are_the_last() {
    let all = supported();
    for class in [0, 0x8000_0000] {
        let in_class = all.iter().filter(|e| e.function & 0x8000_0000 == class);
        let last = in_class.map(|e| e.function).max().unwrap();
        let told = all.iter().find(|e| e.function == class).unwrap().eax;
        assert!(last <= told, "{last:#x} {told:#x}");
    }
}

// SDM Vol. 1, 13.4 and 13.5.
#[test]
fn xsave_writes_what_leaf_d_says() {
    let table = CpuidTable::new(supported());
    let whole = table.xcr0_supported();
    assert!(anykvm_cpu::crregs::xcr0_valid(whole, whole));
    let mut c = long();
    let size = c.cpu.cpuid.cpuid(&c.cpu.state, Around::default(), 0xd, 0)[1] as usize;
    assert_eq!(size, table.find(0xd, 0).unwrap().ecx as usize);
    // Nothing is in its initial state.
    let s = &mut c.cpu.state;
    // PKRU would keep the processor from its memory.
    s.cr4 &= !cr4::PKE;
    s.xsave.0.fill(0x5a);
    s.xsave.set_u32(24, 0x1f80);
    s.xsave.0[512..576].fill(0);
    s.regs[reg::RAX] = u64::MAX;
    s.regs[reg::RDX] = u64::MAX;
    c.put(DATA, &[0xa5; XSAVE_BYTES + 64]);
    c.put(DATA + 512, &[0; 64]);
    // XSAVE [RSI]
    completes(&mut c, &[0x0f, 0xae, 0x26]);
    let byte = |at: usize| c.get64(DATA + at as u64) as u8;
    assert_eq!(byte(size - 1), 0x5a);
    assert_eq!(byte(size), 0xa5);
    for bit in (2..63).filter(|bit| whole >> bit & 1 != 0) {
        let e = table.find(0xd, bit).unwrap();
        let (len, offset) = (e.eax as usize, e.ebx as usize);
        assert_eq!(
            (byte(offset), byte(offset + len - 1)),
            (0x5a, 0x5a),
            "{bit}"
        );
        assert!(offset + len <= size, "{bit}");
    }
    assert_eq!(c.get64(DATA + 512), whole);
}

// SDM Vol. 3, 4.1.4 and table 4-15: bits above MAXPHYADDR are reserved, which the error code tells.
#[test]
fn physical_addresses_are_as_wide_as_leaf_80000008_says() {
    let width = CpuidTable::new(supported()).phys_bits();
    for (bit, good) in [(width - 1, true), (width, false)] {
        if bit > 51 {
            continue;
        }
        let mut c = long();
        c.catch_events();
        c.put64(TABLES + 0x3000 + 0x80 * 8, 1 << bit | 3);
        c.put64(TABLES + 0x3000 + 0x81 * 8, 1 << bit | 3);
        // MOV EAX, [RSI]
        c.put(0x1000, &[0x8b, 0x06]);
        let exit = c.run();
        if good {
            let gpa = 1 << bit;
            assert_eq!(exit, Exit::MmioRead { gpa, len: 4 }, "{}", c.cpu.dump());
        } else {
            // Present and reserved.
            assert_eq!(c.frame()[0], 0b1001, "{}", c.cpu.dump());
        }
    }
}

#[test]
fn linear_addresses_are_as_wide_as_leaf_80000008_says() {
    let table = CpuidTable::new(supported());
    let e = table.find(0x8000_0008, 0).unwrap();
    let five_levels = table.has(feature::LA57);
    assert_eq!(e.eax >> 8 & 0xff, if five_levels { 57 } else { 48 });
}

#[test]
fn flags_are_where_no_other_is() {
    for (n, row) in cpuid::FLAGS.iter().enumerate() {
        for other in &cpuid::FLAGS[n + 1..] {
            assert_ne!(row.feature, other.feature, "{} {}", row.name, other.name);
            assert_ne!(row.name, other.name);
        }
        assert!(row.source != Source::State || row.gates.is_empty());
    }
}
