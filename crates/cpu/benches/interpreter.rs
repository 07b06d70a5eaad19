//! MIPS of the interpreter on loops of one kind each: `cargo bench -p anykvm-cpu`.

#[path = "../tests/harness/mod.rs"]
mod harness;

use anykvm_cpu::state::cr4;
use harness::Computer;
use iced_x86::code_asm::*;
use rustix::time::{ClockId, clock_gettime};

const TABLES: u64 = 0x10_0000;
const CODE: u64 = 0x5000;

/// Seconds of processor time this thread has used (other load on the machine does not count).
fn now() -> f64 {
    let t = clock_gettime(ClockId::ThreadCPUTime);
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}

fn measure(name: &str, build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    let bytes = a.assemble(CODE).unwrap();
    let mut c = Computer::long(2 << 20, CODE, TABLES);
    c.cpu.state.cr4 |= cr4::OSXSAVE;
    c.cpu.state.xcr0 = 0xe7;
    c.cpu.state_changed();
    c.put(CODE, &bytes);
    c.cpu.run(1_000_000);
    let before = c.cpu.counters.instructions;
    let start = now();
    c.cpu.run(100_000_000);
    let spent = now() - start;
    let done = (c.cpu.counters.instructions - before) as f64;
    println!(
        "{name:<20} {:8.1} MIPS  {:6.2} ns",
        done / spent / 1e6,
        spent * 1e9 / done
    );
}

fn main() {
    measure("register arithmetic", |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.add(rax, rbx)?;
        a.xor(rcx, rax)?;
        a.shl(rdx, 3)?;
        a.lea(rsi, rax + rcx * 4 + 5)?;
        a.sub(edi, 1)?;
        a.mov(r8, rdi)?;
        a.imul_2(r9, r8)?;
        a.dec(r10)?;
        a.jmp(top)
    });
    measure("loads and stores", |a| {
        let mut top = a.create_label();
        a.mov(rbx, 0x8000u64)?;
        a.set_label(&mut top)?;
        a.mov(rax, qword_ptr(rbx + 8))?;
        a.add(rax, 1)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.add(dword_ptr(rbx + 24), 3)?;
        a.movzx(ecx, byte_ptr(rbx + 40))?;
        a.cmp(rcx, qword_ptr(rbx + 48))?;
        a.jmp(top)
    });
    measure("calls", |a| {
        let mut top = a.create_label();
        let mut f = a.create_label();
        a.set_label(&mut top)?;
        a.call(f)?;
        a.jmp(top)?;
        a.set_label(&mut f)?;
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.test(eax, eax)?;
        a.pop(rbp)?;
        a.ret()
    });
    measure("short branches", |a| {
        let mut top = a.create_label();
        let mut skip = a.create_label();
        a.set_label(&mut top)?;
        a.add(eax, 1)?;
        a.test(eax, 4)?;
        a.je(skip)?;
        a.inc(rbx)?;
        a.set_label(&mut skip)?;
        a.jmp(top)
    });
    measure("sse", |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.pxor(xmm0, xmm1)?;
        a.paddq(xmm2, xmm0)?;
        a.mulsd(xmm3, xmm4)?;
        a.jmp(top)
    });
    if !std::is_x86_feature_detected!("avx512bw") {
        return;
    }
    // The loop of a strlen: load, minimum, test into a mask, mask to a general register.
    measure("avx-512 strings", |a| {
        let mut top = a.create_label();
        a.mov(rbx, 0x8000u64)?;
        a.set_label(&mut top)?;
        a.vmovdqu64(ymm16, ymmword_ptr(rbx))?;
        a.evex().vpminub(ymm17, ymm16, ymmword_ptr(rbx + 32))?;
        a.vpternlogd(ymm17, ymm16, ymm16, 0xde)?;
        a.vptestnmb(k0, ymm17, ymm17)?;
        a.vpcmpb(k1, ymm16, ymmword_ptr(rbx + 64), 4)?;
        a.kortestd(k0, k1)?;
        a.kmovd(eax, k0)?;
        a.vmovdqu64(ymmword_ptr(rbx + 128), ymm16)?;
        a.jmp(top)
    });
    measure("avx-512 stubs", |a| {
        let mut top = a.create_label();
        a.mov(rbx, 0x8000u64)?;
        a.set_label(&mut top)?;
        a.vaddps(zmm0, zmm1, zmm2)?;
        a.evex().vpminub(ymm17.k1().z(), ymm16, ymmword_ptr(rbx))?;
        a.vpermb(zmm3, zmm4, zmm5)?;
        a.vfmadd231pd(zmm6.k1(), zmm7, qword_bcst(rbx))?;
        a.jmp(top)
    });
}
