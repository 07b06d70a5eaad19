//! PUSH, POP, CALL, RET, IRET, ENTER and LEAVE with the stack in device memory, and PUSH and POP of it.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::cases::{A, Bits, Case, RAX, RBP, RBX, RDI, RFLAGS, RIP, RSP, case, case_from, case_of};
use crate::check::all;
use crate::machine::{BEFORE_M, CODE, GM, M, STACK, TARGET};

/// With RSP in the middle of `M`.
const TOP: u64 = M + 0x800;
const GTOP: u64 = GM + 0x800;

fn on_device(name: &str, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Case {
    case(name, build).with(RSP, TOP)
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn push_and_pop() {
    let a8 = A.to_le_bytes();
    all([
        on_device("push rax", |a| a.push(rax))
            .write(GTOP - 8, &a8)
            .gives(RSP, TOP - 8),
        on_device("push ax", |a| a.push(ax))
            .write(GTOP - 2, &a8[..2])
            .gives(RSP, TOP - 2),
        on_device("push imm", |a| a.push(-1))
            .write(GTOP - 8, &[0xff; 8])
            .gives(RSP, TOP - 8),
        on_device("push rsp", |a| a.push(rsp))
            .write(GTOP - 8, &TOP.to_le_bytes())
            .gives(RSP, TOP - 8),
        on_device("pushfq", |a| a.pushfq())
            .write(GTOP - 8, &2u64.to_le_bytes())
            .gives(RSP, TOP - 8),
        on_device("push fs", |a| a.push(fs))
            .write(GTOP - 8, &words(&[16]))
            .gives(RSP, TOP - 8),
        on_device("pop rax", |a| a.pop(rax))
            .read(GTOP, &words(&[77]))
            .gives(RAX, 77)
            .gives(RSP, TOP + 8),
        on_device("pop rsp", |a| a.pop(rsp))
            .read(GTOP, &words(&[77]))
            .gives(RSP, 77),
        on_device("popfq", |a| a.popfq())
            .read(GTOP, &words(&[0xd5]))
            .gives(RFLAGS, 0xd7)
            .gives(RSP, TOP + 8),
        // From a device to the stack in RAM, and back.
        case("push m", |a| a.push(qword_ptr(rbx)))
            .with(RBX, M)
            .read(GM, &a8)
            .stores(STACK - 8, &a8)
            .gives(RSP, STACK - 8),
        case("pop m", |a| a.pop(qword_ptr(rbx)))
            .with(RBX, M)
            .ram(STACK, &a8)
            .write(GM, &a8)
            .gives(RSP, STACK + 8),
        // The address is computed with RSP behind the pop.
        on_device("pop m at rsp", |a| a.pop(qword_ptr(rsp)))
            .read(GTOP, &a8)
            .write(GTOP + 8, &a8)
            .gives(RSP, TOP + 8),
        on_device("push m onto a device", |a| a.push(qword_ptr(rbx)))
            .with(RBX, M)
            .read(GM, &a8)
            .write(GTOP - 8, &a8)
            .gives(RSP, TOP - 8),
        case("a push across RAM and a device", |a| a.push(rax))
            .with(RSP, M + 4)
            .stores(BEFORE_M + 0xffc, &a8[..4])
            .write(GM, &a8[4..])
            .gives(RSP, M - 4),
    ]);
}

#[test]
fn frames() {
    let next = |length: u64| (CODE + length).to_le_bytes();
    all([
        on_device("call", |a| a.call(TARGET))
            .write(GTOP - 8, &next(5))
            .gives(RSP, TOP - 8)
            .gives(RIP, TARGET),
        on_device("call rax", |a| a.call(rax))
            .with(RAX, TARGET)
            .write(GTOP - 8, &next(2))
            .gives(RSP, TOP - 8)
            .gives(RIP, TARGET),
        case("call m", |a| a.call(qword_ptr(rbx)))
            .with(RBX, M)
            .read(GM, &words(&[TARGET]))
            .stores(STACK - 8, &next(2))
            .gives(RSP, STACK - 8)
            .gives(RIP, TARGET),
        on_device("call m onto a device", |a| a.call(qword_ptr(rbx)))
            .with(RBX, M)
            .read(GM, &words(&[TARGET]))
            .write(GTOP - 8, &next(2))
            .gives(RSP, TOP - 8)
            .gives(RIP, TARGET),
        case("jmp m", |a| a.jmp(qword_ptr(rbx)))
            .with(RBX, M)
            .read(GM, &words(&[TARGET]))
            .gives(RIP, TARGET),
        on_device("ret", |a| a.ret())
            .read(GTOP, &words(&[TARGET]))
            .gives(RSP, TOP + 8)
            .gives(RIP, TARGET),
        on_device("ret 8", |a| a.ret_1(8))
            .read(GTOP, &words(&[TARGET]))
            .gives(RSP, TOP + 16)
            .gives(RIP, TARGET),
        case_from(Bits::Long, "retfq", &[0x48, 0xcb])
            .with(RSP, TOP)
            .read(GTOP, &words(&[TARGET]))
            .read(GTOP + 8, &words(&[8]))
            .gives(RSP, TOP + 16)
            .gives(RIP, TARGET),
        on_device("iretq", |a| a.iretq())
            .read(GTOP, &words(&[TARGET]))
            .read(GTOP + 8, &words(&[8]))
            .read(GTOP + 16, &words(&[0x46]))
            .read(GTOP + 24, &words(&[STACK]))
            .read(GTOP + 32, &words(&[16]))
            .gives(RSP, STACK)
            .gives(RFLAGS, 0x46)
            .gives(RIP, TARGET),
        on_device("enter", |a| a.enter(0x20, 0))
            .write(GTOP - 8, &words(&[0x0707_0707]))
            .gives(RBP, TOP - 8)
            .gives(RSP, TOP - 0x28),
        // The outer frame's pointer is read behind a push: nothing is written twice.
        on_device("enter with levels", |a| a.enter(0, 2))
            .with(RBP, TOP + 0x40)
            .read(GTOP + 0x38, &words(&[0x1234]))
            .write(GTOP - 8, &words(&[TOP + 0x40]))
            .write(GTOP - 16, &words(&[0x1234]))
            .write(GTOP - 24, &words(&[TOP - 8]))
            .gives(RBP, TOP - 8)
            .gives(RSP, TOP - 24),
        case("leave", |a| a.leave())
            .with(RBP, TOP)
            .read(GTOP, &words(&[5]))
            .gives(RBP, 5)
            .gives(RSP, TOP + 8),
    ]);
}

#[test]
fn all_registers() {
    let top = GM + 0x100;
    let c = case_of(Bits::Protected, "pushad", |a| a.pushad()).with(RSP, top);
    let values: Vec<u32> = [0, 2, 3, 1, 6, 7, 4, 5]
        .iter()
        .map(|r| c.start[*r] as u32)
        .collect();
    let pushed = (0..)
        .zip(&values)
        .fold(c, |c, (i, v)| c.write(top - 4 - i * 4, &v.to_le_bytes()));
    let c = case_of(Bits::Protected, "popad", |a| a.popad()).with(RSP, top);
    let popped = (0..8).fold(c, |c, i| c.read(top + i * 4, &(i as u32 + 9).to_le_bytes()));
    let popped = [
        (RDI, 9),
        (4, 10),
        (RBP, 11),
        (RBX, 13),
        (3, 14),
        (2, 15),
        (RAX, 16),
    ]
    .iter()
    .fold(popped, |c, (r, v)| c.gives(*r, *v));
    all([pushed.gives(RSP, top - 32), popped.gives(RSP, top + 32)]);
}
