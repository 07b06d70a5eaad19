//! Whether the host's `/dev/kvm` really runs a guest.
//!
//! A device node proves little: in a cloud VM without nested virtualisation it may open and fail
//! later, or run nothing beyond the first instruction. So a VM is created and executes `hlt` in real
//! mode and in 64-bit mode (KVM API, sections 4.1 to 4.14; SDM volume 3, 10.8.5 for the way into
//! IA-32e mode). That happens in a child process, which is killed when it takes too long: a guest
//! that never exits must not hang the caller.
#![allow(unsafe_code)] // ioctl and mmap of the host's KVM, which no safe wrapper here covers.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anykvm_abi::{
    KVM_EXIT_HLT, KVMIO, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};

/// How long the child may take. Creating a VM and two exits take a few milliseconds.
const TIME_LIMIT: Duration = Duration::from_secs(3);

const KVM_API_VERSION: i32 = 12;
const MEMORY_SIZE: usize = 64 << 10;
/// Where the KVM API wants Intel's three pages for real mode without hardware support.
const TSS_ADDRESS: usize = 0xfffb_d000;

const CODE: u64 = 0x8000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;

const HLT: u8 = 0xf4;

const CR0_PE: u64 = 1 << 0;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;

/// Opens the host's device.
pub fn open() -> Result<File, String> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|e| reason(&e))
}

/// Runs [`run_guests_or_die`] in a child process, under a time limit.
pub fn probe() -> Result<(), String> {
    open()?;
    let child = std::env::current_exe().and_then(|exe| {
        Command::new(exe)
            .args(["run", "--probe-host"])
            .env_remove("LD_PRELOAD")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
    });
    let mut child = child.map_err(|e| format!("cannot start the probe: {}", reason(&e)))?;
    let started = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(_)) => break,
            Ok(None) if started.elapsed() < TIME_LIMIT => {
                std::thread::sleep(Duration::from_millis(2));
            }
            _ => {
                // The child kills itself too (SIGALRM); this only spares the command, which will
                // take our place, an unexpected child of its own.
                let _ = child.kill();
                std::thread::sleep(Duration::from_millis(50));
                let _ = child.try_wait();
                return Err("a test guest did not stop in time".into());
            }
        }
    }
    let mut said = String::new();
    if let Some(mut out) = child.stdout.take() {
        let _ = out.read_to_string(&mut said);
    }
    match said.trim() {
        "" => Err("the probe died".into()),
        said => Err(said.into()),
    }
}

/// The child's side: [`run_guests`], ended by SIGALRM if nobody else ends it.
pub fn run_guests_or_die() -> Result<(), String> {
    // SAFETY: a plain system call; SIGALRM's default action ends this process.
    unsafe { libc::alarm(TIME_LIMIT.as_secs() as u32 + 1) };
    run_guests()
}

/// Executes one `hlt` in real mode and one in 64-bit mode.
fn run_guests() -> Result<(), String> {
    let kvm = open()?;
    match ioctl(&kvm, io(0x00), 0).map_err(|e| reason(&e))? {
        KVM_API_VERSION => {}
        other => return Err(format!("API version {other}")),
    }
    for long_mode in [false, true] {
        let mode = if long_mode { "64-bit" } else { "real-mode" };
        match hlt(&kvm, long_mode) {
            Ok(KVM_EXIT_HLT) => {}
            Ok(exit) => return Err(format!("a {mode} guest ends with exit reason {exit}")),
            Err(e) => return Err(format!("a {mode} guest does not run: {}", reason(&e))),
        }
    }
    Ok(())
}

/// Builds a VM with one `hlt` in its memory, runs it and returns the exit reason.
fn hlt(kvm: &File, long_mode: bool) -> io::Result<u32> {
    let vm = new_fd(ioctl(kvm, io(0x01), 0)?);
    // AMD processors need none, and KVM takes it from everybody.
    ioctl(&vm, io(0x47), TSS_ADDRESS)?;

    let memory = Mapping::new(MEMORY_SIZE, None)?;
    memory.store(CODE, u64::from(HLT));
    memory.store(PML4, PDPT | PAGE_PRESENT_WRITABLE);
    memory.store(PDPT, PAGE_DIRECTORY | PAGE_PRESENT_WRITABLE);
    memory.store(PAGE_DIRECTORY, PAGE_LARGE | PAGE_PRESENT_WRITABLE);
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY_SIZE as u64,
        userspace_addr: memory.address as u64,
        ..Default::default()
    };
    ioctl(
        &vm,
        iow::<kvm_userspace_memory_region>(0x46),
        pointer(&region),
    )?;

    let size = ioctl(kvm, io(0x04), 0)?;
    let vcpu = new_fd(ioctl(&vm, io(0x41), 0)?);
    let run = Mapping::new(size as usize, Some(&vcpu))?;

    let mut sregs = kvm_sregs::default();
    ioctl(&vcpu, ior::<kvm_sregs>(0x83), &raw mut sregs as usize)?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    if long_mode {
        let flat = kvm_segment {
            limit: 0xffff_ffff,
            present: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment {
            selector: 16,
            type_: 3,
            db: 1,
            ..flat
        };
        sregs.cs = kvm_segment {
            selector: 8,
            type_: 11,
            l: 1,
            ..flat
        };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.cr3 = PML4;
        sregs.cr4 |= CR4_PAE;
        sregs.cr0 |= CR0_PE | CR0_PG;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
    ioctl(&vcpu, iow::<kvm_sregs>(0x84), pointer(&sregs))?;
    let regs = kvm_regs {
        rip: CODE,
        rflags: 2,
        ..Default::default()
    };
    ioctl(&vcpu, iow::<kvm_regs>(0x82), pointer(&regs))?;
    ioctl(&vcpu, io(0x80), 0)?;
    Ok(run.exit_reason())
}

const fn io(nr: u32) -> u64 {
    ((KVMIO << 8) | nr) as u64
}

const fn iow<T>(nr: u32) -> u64 {
    1 << 30 | (size_of::<T>() as u64) << 16 | io(nr)
}

const fn ior<T>(nr: u32) -> u64 {
    2 << 30 | (size_of::<T>() as u64) << 16 | io(nr)
}

fn pointer<T>(value: &T) -> usize {
    std::ptr::from_ref(value) as usize
}

fn ioctl(fd: &impl AsRawFd, request: u64, arg: usize) -> io::Result<i32> {
    // SAFETY: every `arg` in this file is a number, or points to a live value of the type that the
    // request's size names (mutable for the one request that writes).
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, arg) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

fn new_fd(fd: i32) -> OwnedFd {
    // SAFETY: KVM_CREATE_VM and KVM_CREATE_VCPU return a new descriptor that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn reason(e: &io::Error) -> String {
    let text = e.to_string();
    match text.split_once(" (os error") {
        Some((what, _)) => what.to_lowercase(),
        None => text,
    }
}

/// A shared mapping: guest memory, or a vCPU's kvm_run.
struct Mapping {
    address: *mut libc::c_void,
    size: usize,
}

impl Mapping {
    fn new(size: usize, fd: Option<&OwnedFd>) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | if fd.is_none() { libc::MAP_ANONYMOUS } else { 0 };
        let fd = fd.map_or(-1, |fd| fd.as_raw_fd());
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, fd, 0) };
        match address {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            address => Ok(Self { address, size }),
        }
    }

    fn store(&self, offset: u64, value: u64) {
        let offset = offset as usize;
        assert!(offset + 8 <= self.size);
        // SAFETY: inside the mapping (checked above), which lives as long as `self`.
        unsafe {
            self.address
                .byte_add(offset)
                .cast::<u64>()
                .write_volatile(value)
        }
    }

    /// `kvm_run.exit_reason`.
    fn exit_reason(&self) -> u32 {
        assert!(self.size >= 12);
        // SAFETY: inside the mapping (checked above), which lives as long as `self`.
        unsafe { self.address.byte_add(8).cast::<u32>().read_volatile() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping is ours and nothing refers to it any more.
        unsafe { libc::munmap(self.address, self.size) };
    }
}
