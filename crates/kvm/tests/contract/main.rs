//! Contract tests of the KVM API: what each ioctl returns, which errno each bad input gives, and that
//! a refused call changes nothing. Driven through [`anykvm::Object::ioctl`], as a VMM's calls are.

mod capabilities;
mod clock;
mod controllers;
mod coverage;
mod devices;
mod dirty_log;
mod dirty_ring;
mod every;
mod guest_memfd;
mod interrupts;
mod io;
mod memory;
mod paravirt;
mod preempted;
mod steal_time;
mod support;
mod system;
mod vcpu;
mod vcpu_cpuid_msrs;
mod vcpu_events;
mod vcpu_registers;
mod vcpu_reset;
mod vcpu_run;
