//! Section 5 of the KVM API document, the NOTE on KVM_EXIT_IO and KVM_EXIT_MMIO, to the letter: a guest
//! does every kind of port and device-memory access, and for each the sequence of exits, their data,
//! the moment of completion and the state after re-entering with `immediate_exit` or a kick are compared
//! with what the table says. Each is then saved and goes on in a new VM; has registers written, and RIP
//! moved, between an exit and the re-entry. All of it interpreted, and translated before it runs first.

mod cases;
mod check;

mod machine;
mod memory;
mod modes;
mod ports;
mod registers;
mod ring;
mod stack;
mod strings;
mod system;
mod vectors;
