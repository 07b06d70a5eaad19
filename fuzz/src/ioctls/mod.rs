//! Random ioctls: one input is a VM and a sequence of calls on its descriptors, from the table of ioctls or made
//! up, with arguments that are near good ones, and pointers that lead to the ends of pages and nowhere.
//!
//! Each call must come back, with a result or an errno; a refused one must leave everything that can be read as it
//! was. The calls go to this project's objects, or to `/dev/kvm` (under `anykvm run`, the shim's) when
//! `ANYKVM_TEST_HOST_KVM` is 1.

mod argument;
mod door;
mod memory;
mod state;

use anykvm::ObjectKind;
use anykvm::bindings::ioctl::*;

use argument::Argument;
use door::{Door, Handle};
use memory::Arena;
use state::State;

/// Calls in one input at most.
const CALLS: usize = 96;

/// The input, byte by byte; zeroes follow its end.
struct Tape<'a>(&'a [u8]);

impl Tape<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }
    fn number(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }
    /// Less than `n`.
    fn below(&mut self, n: usize) -> usize {
        usize::from(u16::from_le_bytes([self.byte(), self.byte()])) % n.max(1)
    }
    fn is_over(&self) -> bool {
        self.0.is_empty()
    }
}

/// Runs one input; panics when something is not as it should be.
pub fn run(data: &[u8]) {
    let mut tape = Tape(data);
    let arena = Arena::new();
    let mut world = World::new(&mut tape, &arena);
    for _ in 0..CALLS {
        if tape.is_over() {
            break;
        }
        world.call(&mut tape);
    }
}

/// The descriptors there are.
struct World<'a> {
    arena: &'a Arena,
    handles: Vec<Handle>,
}

/// Calls whose refusal may change something: KVM_RUN first finishes what the last exit left to do.
const MAY_CHANGE: &[u32] = &[KVM_RUN];

impl<'a> World<'a> {
    /// `/dev/kvm`, a VM with or without controllers and memory, and up to two vCPUs.
    fn new(tape: &mut Tape, arena: &'a Arena) -> Self {
        let system = Door::open();
        let how = tape.byte();
        let kind = u64::from(how >> 6 & 1);
        let vm = system.made(KVM_CREATE_VM, kind, arena).expect("a VM");
        let mut world = Self {
            arena,
            handles: vec![system, vm],
        };
        let vm = &world.handles[1];
        match how & 3 {
            0 => {}
            1 => {
                let split = arena.put(&argument::split_irqchip());
                vm.number(KVM_ENABLE_CAP, split, arena).expect("split");
            }
            _ => {
                vm.number(KVM_CREATE_IRQCHIP, 0, arena).expect("irqchip");
            }
        }
        if how & 4 != 0 {
            let region = arena.put(&argument::ram(arena, how & 96 == 32));
            vm.number(KVM_SET_USER_MEMORY_REGION, region, arena)
                .expect("RAM");
        }
        for id in 0..u64::from(how >> 3 & 3).min(2) {
            let vcpu = world.handles[1].made(KVM_CREATE_VCPU, id, arena);
            world.handles.push(vcpu.expect("a vCPU"));
        }
        world
    }

    /// A descriptor; mostly one that there is something to do with.
    fn choose(&self, tape: &mut Tape) -> usize {
        let any = tape.byte() < 16;
        let which = tape.below(self.handles.len());
        match self.handles[which].kind() {
            ObjectKind::Vm | ObjectKind::Vcpu => which,
            _ if any => which,
            _ => 1 + tape.below(self.handles.len() - 1).min(2),
        }
    }

    /// One call, and what must hold after it.
    fn call(&mut self, tape: &mut Tape) {
        let which = self.choose(tape);
        let kind = self.handles[which].kind();
        let request = argument::request(tape, kind);
        let argument = Argument::new(tape, request, &self.handles[which], self.arena);
        let before = State::read(&self.handles, self.arena);
        if request == KVM_RUN {
            self.handles[which].prepare_run(tape);
        }
        let result = self.handles[which].issue(request, argument.0, self.arena);
        match result {
            Ok(made) => self.handles.extend(made),
            Err(_) if MAY_CHANGE.contains(&request) && kind == ObjectKind::Vcpu => {}
            Err(errno) => {
                let after = State::read(&self.handles, self.arena);
                if let Some(what) = before.difference(&after) {
                    let name = name(request).unwrap_or("?");
                    panic!(
                        "{kind} {name} ({request:#x}) with {:#x} was refused with {errno} and changed {what}",
                        argument.0
                    );
                }
            }
        }
        // Not more than a few: each VM has threads of its own.
        self.handles.truncate(12);
    }
}
