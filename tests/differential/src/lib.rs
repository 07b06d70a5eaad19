//! The differential proof: random instructions run by the host's processor and by this project's,
//! and every result compared.
//!
//! A [`case::Case`] is code, registers and memory; a [`case::Outcome`] is what it leaves of them and
//! how it ends: at an INT3 outside its code, or with an exception whose vector, error code, CR2 and
//! RIP count as results, too. An [`case::Engine`] makes one of the other: [`host::Host`] in a child
//! process, [`interpreter::Interpreter`] at CPL 3 behind page tables that map the same memory at the
//! same addresses. [`generate::Generator`] makes cases of every encoding iced-x86 knows that user
//! mode may run, [`compare`] finds what differs, [`tolerated`] lists the differences that are none,
//! [`minimise`] makes the others small, and [`text`] writes them down for `tests/differential/cases`.

pub mod case;
pub mod compare;
pub mod features;
pub mod generate;
pub mod host;
pub mod interpreter;
pub mod layout;
pub mod minimise;
pub mod random;
pub mod run;
pub mod text;
pub mod tolerated;
