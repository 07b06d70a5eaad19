//! libanykvm.so: gives the software KVM to unmodified programs.
//!
//! A virtual machine monitor opens `/dev/kvm`, and everything after that is ioctl, mmap and close on
//! descriptors. So that is where this library stands: preloaded into the program (ld.so(8),
//! `LD_PRELOAD`; `anykvm run` sets it), it defines a few dozen functions of the C library that the
//! dynamic loader then finds first ([`interpose`]), and hands everything that is not about KVM to
//! the next definition ([`next`]).
//!
//! The constraint throughout: the program must not be able to tell. It has its own signal handlers,
//! forks, seccomp filters, descriptor tables and expectations of what a kernel does, and this
//! library lives in its address space, on its threads and stacks, uninvited.
//!
//! - **Descriptors are real.** Each object of KVM's (system, VM, vCPU, device, statistics) has a memfd; the program
//!   gets a duplicate, so poll, dup, fork, close-on-exec and `/proc/self/fd` behave without help.
//!   A lock-free table says which descriptor is which object, the memfd's inode says it for
//!   descriptors that were made behind our back, and closing the last one frees the object ([`files`]).
//! - **The vCPU's memfd is its `kvm_run`**, so mmap needs no help either, but for one page: the
//!   coalesced-MMIO ring belongs to the VM and is laid over page 2 ([`ioctl`]).
//! - **Bad pointers are EFAULT.** Copies from and to the program may fault; the SIGSEGV handler knows
//!   the routine ([`user_memory`]). Guest RAM that the program has unmapped is handled in the same way by
//!   the processor's crate.
//! - **Handlers run after KVM_RUN**, never inside the run loop: every handler stands behind one of
//!   ours from the first open of `/dev/kvm` on ([`signals`]).
//! - **A VM belongs to one process.** In forked children its ioctls are EIO, and a vfork child
//!   cannot close what is its parent's ([`process`]).
//! - **System calls are rationed.** VMMs put seccomp filters on vCPU threads, so KVM_RUN and its
//!   return by a signal need little more than futex and rt_sigreturn, and memory comes from a heap
//!   of the library's own that grows by mmap alone ([`heap`]).
//! - **A panic stops here.** It becomes EIO for the ioctl it happened in.
//!
//! The life of one KVM_RUN through this library: `ioctl` sees the type byte 0xae and announces to
//! our signal handler that this thread is in our code ([`signals::defer`]); [`files::find`] takes a
//! reference to the vCPU's file; the vCPU runs until it has something to say. If a signal came, the
//! handler kept it and kicked the vCPU; the reference is dropped first, then [`signals::deliver`]
//! calls the program's handler, and only then does `ioctl` return -1 with EINTR, just as the
//! kernel would have it.
//!
//! Not seen, because they are not calls of C library functions: system calls that the program makes itself
//! (a raw `rt_sigaction` gets a handler that runs inside the loop), and statically linked programs.

mod device;
mod files;
mod heap;
pub mod interpose;
mod ioctl;
mod next;
mod process;
mod signals;
mod sys;
mod user_memory;

/// All of this library's memory.
#[global_allocator]
static HEAP: heap::Heap = heap::Heap;
