//! System calls without libc: usable in signal handlers, in vfork children and before the dynamic
//! loader has finished, and never touching errno.

use std::arch::asm;
use std::ffi::{CStr, CString, c_int, c_void};

/// A signal set as the kernel has it: bit n-1 stands for signal n.
pub type KernelSigset = u64;

/// Issues a system call; a negative value is an error number.
///
/// # Safety
/// As for the system call itself.
unsafe fn syscall6(nr: i64, a: [usize; 6]) -> isize {
    let value: isize;
    // SAFETY: the kernel's calling convention; the caller answers for the call.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr as isize => value,
            in("rdi") a[0], in("rsi") a[1], in("rdx") a[2],
            in("r10") a[3], in("r8") a[4], in("r9") a[5],
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    value
}

/// Splits the kernel's answer into value and error number.
fn result(value: isize) -> Result<usize, c_int> {
    match value {
        -4095..=-1 => Err(-value as c_int),
        value => Ok(value as usize),
    }
}

/// getpid(2).
pub fn getpid() -> c_int {
    // SAFETY: no arguments, cannot fail.
    unsafe { syscall6(libc::SYS_getpid, [0; 6]) as c_int }
}

/// Sets the calling thread's signal mask; returns the one before.
pub fn set_signal_mask(mask: KernelSigset) -> KernelSigset {
    change_signal_mask(libc::SIG_SETMASK, mask)
}

/// rt_sigprocmask(2).
pub fn change_signal_mask(how: c_int, mask: KernelSigset) -> KernelSigset {
    let mut old: KernelSigset = 0;
    // SAFETY: both pointers are to live 8-byte sets, the size the kernel wants.
    unsafe {
        let (new, old) = (&raw const mask as usize, &raw mut old as usize);
        syscall6(libc::SYS_rt_sigprocmask, [how as usize, new, old, 8, 0, 0]);
    }
    old
}

/// A signal's disposition as the kernel has it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct KernelAction {
    pub handler: usize,
    pub flags: u64,
    pub restorer: usize,
    pub mask: KernelSigset,
}

/// rt_sigaction(2): what a signal does now.
pub fn action(signal: c_int) -> Option<KernelAction> {
    let mut now = KernelAction {
        handler: 0,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    let a = [signal as usize, 0, &raw mut now as usize, 8, 0, 0];
    // SAFETY: writes a live structure of the kernel's layout.
    let value = unsafe { syscall6(libc::SYS_rt_sigaction, a) };
    result(value).ok().map(|_| now)
}

/// rt_sigaction(2): what a signal does from now on.
///
/// # Safety
/// The handler and the restorer must be functions for that.
pub unsafe fn set_action(signal: c_int, action: &KernelAction) {
    let a = [
        signal as usize,
        std::ptr::from_ref(action) as usize,
        0,
        8,
        0,
        0,
    ];
    // SAFETY: reads a live structure of the kernel's layout; by the caller's promise.
    unsafe { syscall6(libc::SYS_rt_sigaction, a) };
}

/// Queues a signal to the calling thread with this siginfo.
pub fn queue_to_self(signal: c_int, info: &libc::siginfo_t) {
    // SAFETY: the pointer is to a live siginfo_t; a thread may queue any siginfo to itself.
    unsafe {
        let thread = syscall6(libc::SYS_gettid, [0; 6]) as usize;
        let info = std::ptr::from_ref(info) as usize;
        let a = [getpid() as usize, thread, signal as usize, info, 0, 0];
        syscall6(libc::SYS_rt_tgsigqueueinfo, a);
    }
}

/// Zeroed private memory of its own; None if there is none.
pub fn allocate(len: usize) -> Option<*mut c_void> {
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let value = unsafe { syscall6(libc::SYS_mmap, [0, len, protection, flags, usize::MAX, 0]) };
    result(value).ok().map(|p| p as *mut c_void)
}

/// Gives memory from [`allocate`] back.
///
/// # Safety
/// Nothing may refer to it any more.
pub unsafe fn release(address: *mut c_void, len: usize) {
    // SAFETY: by the caller's promise.
    unsafe { syscall6(libc::SYS_munmap, [address as usize, len, 0, 0, 0, 0]) };
}

/// Asks for the page to read as zero in a forked child.
pub fn wipe_on_fork(address: *mut c_void, len: usize) -> bool {
    let a = [
        address as usize,
        len,
        libc::MADV_WIPEONFORK as usize,
        0,
        0,
        0,
    ];
    // SAFETY: changes what a child sees of a mapping of our own.
    unsafe { syscall6(libc::SYS_madvise, a) == 0 }
}

/// Maps a file over existing pages of the caller's.
///
/// # Safety
/// The range must be a mapping that its owner wants replaced.
pub unsafe fn map_over(
    address: usize,
    len: usize,
    protection: c_int,
    fd: c_int,
    offset: u64,
) -> Result<(), c_int> {
    let flags = (libc::MAP_SHARED | libc::MAP_FIXED) as usize;
    let a = [
        address,
        len,
        protection as usize,
        flags,
        fd as usize,
        offset as usize,
    ];
    // SAFETY: by the caller's promise.
    result(unsafe { syscall6(libc::SYS_mmap, a) }).map(drop)
}

/// Which file a descriptor is open on: device and inode numbers.
pub fn inode(fd: c_int) -> Option<(u64, u64)> {
    inode_at(fd, c"")
}

/// Which file a path names: device and inode numbers. An empty path is `dir` itself.
pub fn inode_at(dir: c_int, path: &CStr) -> Option<(u64, u64)> {
    // SAFETY: all-zero bytes are a valid struct stat.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    let (path, to) = (path.as_ptr() as usize, &raw mut stat as usize);
    let a = [dir as usize, path, to, libc::AT_EMPTY_PATH as usize, 0, 0];
    // SAFETY: the pointers are to a C string and a live struct stat.
    result(unsafe { syscall6(libc::SYS_newfstatat, a) }).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// What a descriptor is open on, as `/proc/self/fd` names it, at most `buf.len()` bytes of it.
pub fn name(fd: c_int, buf: &mut [u8]) -> Option<&[u8]> {
    let link = CString::new(format!("/proc/self/fd/{fd}")).ok()?;
    let (path, to) = (link.as_ptr() as usize, buf.as_mut_ptr() as usize);
    // SAFETY: the pointers are to a C string and a live buffer of that length.
    let len = unsafe { syscall6(libc::SYS_readlink, [path, to, buf.len(), 0, 0, 0]) };
    buf.get(..result(len).ok()?)
}

/// A new descriptor for the same open file, the lowest free one.
pub fn duplicate(fd: c_int, close_on_exec: bool) -> Result<c_int, c_int> {
    let command = if close_on_exec {
        libc::F_DUPFD_CLOEXEC
    } else {
        libc::F_DUPFD
    };
    let a = [fd as usize, command as usize, 0, 0, 0, 0];
    // SAFETY: no pointers.
    result(unsafe { syscall6(libc::SYS_fcntl, a) }).map(|fd| fd as c_int)
}

/// close(2) of a descriptor that the table of files does not hold.
pub fn close(fd: c_int) {
    // SAFETY: no pointers.
    unsafe { syscall6(libc::SYS_close, [fd as usize, 0, 0, 0, 0, 0]) };
}
