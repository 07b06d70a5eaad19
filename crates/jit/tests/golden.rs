//! What typical sequences of guest instructions are translated to, in full: `tests/golden/NAME.txt` has the
//! guest's code and the host's. Addresses do not appear: code is listed before it is put into the code cache,
//! branches out of it not yet filled in.
//!
//! Whoever changes the generated code makes the files anew with `cargo xtask golden` and reads the
//! difference.

mod support;

use std::fmt::Write;
use std::path::PathBuf;

use anykvm_cpu::decode::decode;
use anykvm_jit::exits::Wish;
use anykvm_jit::listing::listing;
use anykvm_jit::translate::{Manner, translate};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{CODE, computer};

type Build = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Names and sequences.
const SEQUENCES: &[(&str, Build)] = &[
    ("loop", |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.add(rax, rbx)?;
        a.dec(rdx)?;
        a.jne(top)
    }),
    ("loop-with-a-store", |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.mov(qword_ptr(rbx), rax)?;
        a.add(rbx, 8)?;
        a.cmp(rbx, rdx)?;
        a.jne(top)
    }),
    ("load", |a| a.mov(rax, qword_ptr(rbx + 8))),
    ("store", |a| a.mov(dword_ptr(rsi + rdi * 4), eax)),
    ("load-twice", |a| {
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(rdx, qword_ptr(rbx + 8))
    }),
    ("read-modify-write", |a| a.add(qword_ptr(rbx), rax)),
    ("push-pop", |a| {
        a.push(rbx)?;
        a.push(r12)?;
        a.pop(rsi)
    }),
    ("call", |a| {
        let f = a.create_label();
        let mut f = f;
        a.set_label(&mut f)?;
        a.call(f)
    }),
    ("return", |a| a.ret()),
    ("jump-indirect", |a| a.jmp(qword_ptr(rbx))),
    ("compare-branch", |a| {
        let mut out = a.create_label();
        a.cmp(eax, 100)?;
        a.ja(out)?;
        a.mov(ecx, 1)?;
        a.set_label(&mut out)?;
        a.nop()
    }),
    ("flags-across-a-load", |a| {
        a.cmp(rax, rdx)?;
        a.mov(rsi, qword_ptr(rdi))?;
        a.setb(bl)
    }),
    ("carry", |a| {
        a.add(rax, rbx)?;
        a.adc(rdx, rsi)
    }),
    ("shift-by-cl", |a| a.shl(rax, cl)),
    ("spilled-registers", |a| {
        a.mov(r10, r15)?;
        a.xor(r11, rcx)
    }),
    ("byte-registers", |a| {
        a.mov(ah, cl)?;
        a.add(ch, 3)
    }),
    ("multiply-divide", |a| {
        a.mul(rbx)?;
        a.div(rcx)
    }),
    ("sse", |a| {
        a.movups(xmm0, xmmword_ptr(rsi))?;
        a.addps(xmm0, xmm1)?;
        a.movups(xmmword_ptr(rdi), xmm0)
    }),
    ("avx", |a| {
        a.vmovdqu(ymm0, ymmword_ptr(rsi))?;
        a.vpaddd(ymm0, ymm0, ymm1)
    }),
    ("rep-movs", |a| a.rep().movsb()),
    ("thread-local", |a| a.mov(rax, qword_ptr(0x28).fs())),
    ("rip-relative", |a| a.mov(eax, dword_ptr(CODE + 0x100))),
    ("system-call", |a| a.syscall()),
    ("enable-interrupts", |a| {
        a.sti()?;
        a.mov(rax, qword_ptr(rbx))
    }),
    ("system-return", |a| a.sysretq()),
    ("interpreted", |a| a.cpuid()),
];

fn golden(name: &str) -> PathBuf {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    PathBuf::from(folder).join(format!("{name}.txt"))
}

/// What the file of a sequence should say.
fn text(build: Build) -> String {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    let code = a.assemble(CODE).unwrap();
    let mode = computer(&[]).cpu.mode();
    let mut insns = Vec::new();
    let mut at = 0;
    while at < code.len() {
        let insn = decode(&code[at..], mode).unwrap();
        at += usize::from(insn.len);
        insns.push(insn);
    }
    let manner = Manner {
        first_exit: 0,
        count: false,
        same_each_time: false,
        by_count: false,
        executions: None,
        apart: false,
        supervisor: mode.cpl0(),
        windows: Default::default(),
        user: mode.user(),
        recipe: None,
    };
    let t = translate(&insns, CODE % 4096, manner).unwrap();
    let mut text = format!("guest:\n{}host:\n", listing(&code, 64, CODE));
    text.push_str(&listing(&t.bytes, 64, 0));
    text.push_str("exits:\n");
    for exit in &t.exits {
        let offset = exit.offset;
        let _ = match exit.wish {
            Wish::Interpret { insn, resume, .. } => {
                let resume = resume.map_or("nowhere".to_owned(), |at| format!("{at:x}"));
                writeln!(text, "  interpret instruction {insn}, go on at {resume}")
            }
            Wish::Link { hole, .. } => {
                writeln!(text, "  link the branch at {hole:x} to offset {offset:x}")
            }
            other => writeln!(text, "  {other:?}"),
        };
    }
    text
}

#[test]
fn translations_are_what_the_files_say() {
    let folder = golden("x").parent().unwrap().to_owned();
    let write = std::env::var_os("ANYKVM_WRITE_GOLDEN").is_some();
    if write {
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).unwrap();
    }
    let mut different = Vec::new();
    for (name, build) in SEQUENCES {
        let text = text(*build);
        let path = golden(name);
        if write {
            std::fs::write(&path, &text).unwrap();
        } else if std::fs::read_to_string(&path).unwrap_or_default() != text {
            println!("--- {name} is now\n{text}");
            different.push((*name).to_owned());
        }
    }
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        if !SEQUENCES.iter().any(|s| s.0 == name) {
            different.push(path.display().to_string());
        }
    }
    assert!(
        different.is_empty(),
        "the generated code of {different:?} is not what tests/golden says. If that was meant:\n\n    \
         cargo xtask golden\n\nand look at the difference."
    );
}
