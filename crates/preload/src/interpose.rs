//! The C library's functions as the program calls them. Each does the least it can: whatever does
//! not concern `/dev/kvm` or a descriptor of ours goes on to the next definition after one look.
//!
//! Functions that are variadic in C are defined with fixed arguments; see [`crate::next`].

use std::ffi::{c_char, c_int, c_long, c_uint, c_ulong, c_void};

use libc::{AT_FDCWD, pthread_t, sigaction as SigAction, sigset_t, stat as Stat, statx as Statx};

use crate::signals::{self, actions, cancel, masks};
use crate::{device, files, ioctl as kvm, next};

/// A C function's answer: the value, or -1 and errno.
fn answer(result: Result<c_int, c_int>) -> c_int {
    result.unwrap_or_else(|e| {
        set_errno(e);
        -1
    })
}

fn set_errno(error: c_int) {
    // SAFETY: errno's address is valid in every thread.
    unsafe { *libc::__errno_location() = error };
}

fn errno() -> c_int {
    // SAFETY: errno's address is valid in every thread.
    unsafe { *libc::__errno_location() }
}

/// Stores what stat says of the device.
///
/// # Safety
/// `buf` must be null or writable.
unsafe fn stat_device(buf: *mut Stat) -> c_int {
    // SAFETY: by the caller's promise.
    match unsafe { buf.as_mut() } {
        Some(buf) => *buf = device::stat(),
        None => return answer(Err(libc::EFAULT)),
    }
    0
}

/// Defines functions that the dynamic loader finds before the C library's.
macro_rules! interpose {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $ret:ty $body:block)*) => {$(
        #[doc = concat!("`", stringify!($name), "` as the program calls it.")]
        ///
        /// # Safety
        /// As the C function.
        // A handler that it calls may cancel the thread, which unwinds.
        // A test of this crate must not replace the functions of its own process.
        #[cfg_attr(not(test), unsafe(no_mangle))]
        pub unsafe extern "C-unwind" fn $name($($argument: $type),*) -> $ret {
            // SAFETY: what the body does with the arguments is what the C function would do.
            unsafe { $body }
        }
    )*};
}

interpose! {
    fn open(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return answer(device::open(flags)) }
        next::open(path, flags, mode)
    }
    fn open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return answer(device::open(flags)) }
        next::open64(path, flags, mode)
    }
    fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
        if device::is_kvm(dir, path) { return answer(device::open(flags)) }
        next::openat(dir, path, flags, mode)
    }
    fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
        if device::is_kvm(dir, path) { return answer(device::open(flags)) }
        next::openat64(dir, path, flags, mode)
    }
    fn __open_2(path: *const c_char, flags: c_int) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return answer(device::open(flags)) }
        next::__open_2(path, flags)
    }
    fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return answer(device::open(flags)) }
        next::__open64_2(path, flags)
    }
    fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
        if device::is_kvm(dir, path) { return answer(device::open(flags)) }
        next::__openat_2(dir, path, flags)
    }
    fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
        if device::is_kvm(dir, path) { return answer(device::open(flags)) }
        next::__openat64_2(dir, path, flags)
    }
}

interpose! {
    fn stat(path: *const c_char, buf: *mut Stat) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return stat_device(buf) }
        next::stat(path, buf)
    }
    fn stat64(path: *const c_char, buf: *mut Stat) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return stat_device(buf) }
        next::stat64(path, buf)
    }
    fn lstat(path: *const c_char, buf: *mut Stat) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return stat_device(buf) }
        next::lstat(path, buf)
    }
    fn lstat64(path: *const c_char, buf: *mut Stat) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return stat_device(buf) }
        next::lstat64(path, buf)
    }
    fn fstat(fd: c_int, buf: *mut Stat) -> c_int {
        if device::is_system(fd) { return stat_device(buf) }
        next::fstat(fd, buf)
    }
    fn fstat64(fd: c_int, buf: *mut Stat) -> c_int {
        if device::is_system(fd) { return stat_device(buf) }
        next::fstat64(fd, buf)
    }
    fn fstatat(dir: c_int, path: *const c_char, buf: *mut Stat, flags: c_int) -> c_int {
        if device::is_kvm(dir, path) || device::is_open_kvm(dir, path, flags) {
            return stat_device(buf)
        }
        next::fstatat(dir, path, buf, flags)
    }
    fn fstatat64(dir: c_int, path: *const c_char, buf: *mut Stat, flags: c_int) -> c_int {
        if device::is_kvm(dir, path) || device::is_open_kvm(dir, path, flags) {
            return stat_device(buf)
        }
        next::fstatat64(dir, path, buf, flags)
    }
    fn __xstat(version: c_int, path: *const c_char, buf: *mut Stat) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return stat_device(buf) }
        next::__xstat(version, path, buf)
    }
    fn __xstat64(version: c_int, path: *const c_char, buf: *mut Stat) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return stat_device(buf) }
        next::__xstat64(version, path, buf)
    }
    fn __lxstat(version: c_int, path: *const c_char, buf: *mut Stat) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return stat_device(buf) }
        next::__lxstat(version, path, buf)
    }
    fn __lxstat64(version: c_int, path: *const c_char, buf: *mut Stat) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return stat_device(buf) }
        next::__lxstat64(version, path, buf)
    }
    fn __fxstat(version: c_int, fd: c_int, buf: *mut Stat) -> c_int {
        if device::is_system(fd) { return stat_device(buf) }
        next::__fxstat(version, fd, buf)
    }
    fn __fxstat64(version: c_int, fd: c_int, buf: *mut Stat) -> c_int {
        if device::is_system(fd) { return stat_device(buf) }
        next::__fxstat64(version, fd, buf)
    }
    fn __fxstatat(version: c_int, dir: c_int, path: *const c_char, buf: *mut Stat, flags: c_int) -> c_int {
        if device::is_kvm(dir, path) || device::is_open_kvm(dir, path, flags) {
            return stat_device(buf)
        }
        next::__fxstatat(version, dir, path, buf, flags)
    }
    fn __fxstatat64(version: c_int, dir: c_int, path: *const c_char, buf: *mut Stat, flags: c_int) -> c_int {
        if device::is_kvm(dir, path) || device::is_open_kvm(dir, path, flags) {
            return stat_device(buf)
        }
        next::__fxstatat64(version, dir, path, buf, flags)
    }
    fn statx(dir: c_int, path: *const c_char, flags: c_int, mask: c_uint, buf: *mut Statx) -> c_int {
        if device::is_kvm(dir, path) || device::is_open_kvm(dir, path, flags) {
            let Some(buf) = buf.as_mut() else { return answer(Err(libc::EFAULT)) };
            *buf = device::statx();
            return 0;
        }
        next::statx(dir, path, flags, mask, buf)
    }
    fn access(path: *const c_char, mode: c_int) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return answer(device::access(mode)) }
        next::access(path, mode)
    }
    fn euidaccess(path: *const c_char, mode: c_int) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return answer(device::access(mode)) }
        next::euidaccess(path, mode)
    }
    fn eaccess(path: *const c_char, mode: c_int) -> c_int {
        if device::is_kvm(AT_FDCWD, path) { return answer(device::access(mode)) }
        next::euidaccess(path, mode)
    }
    fn faccessat(dir: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int {
        if device::is_kvm(dir, path) { return answer(device::access(mode)) }
        next::faccessat(dir, path, mode, flags)
    }
}

/// `close_range` of everything but what only changes flags.
const CLOSE_RANGE_CLOEXEC: c_int = 4;

interpose! {
    fn close(fd: c_int) -> c_int {
        // Before the number can be given to another file.
        let file = files::remove(fd);
        let value = next::close(fd);
        if file.is_some() {
            let error = errno();
            signals::uninterrupted(|| drop(file));
            set_errno(error);
        }
        value
    }
    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
        if files::any() && flags & CLOSE_RANGE_CLOEXEC == 0 && first <= last {
            signals::uninterrupted(|| files::remove_range(first as usize..=last as usize));
        }
        next::close_range(first, last, flags)
    }
    fn closefrom(first: c_int) -> () {
        if files::any() {
            let all = first.max(0) as usize..=c_int::MAX as usize;
            signals::uninterrupted(|| files::remove_range(all));
        }
        next::closefrom(first)
    }
    fn dup(fd: c_int) -> c_int {
        duplicated(fd, next::dup(fd))
    }
    fn dup2(old: c_int, new: c_int) -> c_int {
        replaced(old, new, next::dup2(old, new))
    }
    fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
        replaced(old, new, next::dup3(old, new, flags))
    }
    fn fcntl(fd: c_int, command: c_int, argument: c_ulong) -> c_int {
        let value = next::fcntl(fd, command, argument);
        if is_dup(command) { duplicated(fd, value) } else { value }
    }
    fn fcntl64(fd: c_int, command: c_int, argument: c_ulong) -> c_int {
        let value = next::fcntl64(fd, command, argument);
        if is_dup(command) { duplicated(fd, value) } else { value }
    }
}

fn is_dup(command: c_int) -> bool {
    matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC)
}

/// `new` has become a duplicate of `old`, unless it is -1.
fn duplicated(old: c_int, new: c_int) -> c_int {
    if new >= 0
        && let Some(file) = files::get(old)
    {
        files::install(new, file);
    }
    new
}

/// The same for a descriptor that may have been open before.
fn replaced(old: c_int, new: c_int, value: c_int) -> c_int {
    if value >= 0 && old != new && files::any() {
        signals::uninterrupted(|| match files::get(old) {
            Some(file) => files::install(new, file),
            None => drop(files::remove(new)),
        });
    }
    value
}

interpose! {
    fn ioctl(fd: c_int, request: c_ulong, argument: c_ulong) -> c_int {
        if !kvm::is_kvm(request) {
            let value = next::ioctl(fd, request, argument);
            // The memfd's ENOTTY is not always what KVM says of a number it does not know.
            if value != -1 || errno() != libc::ENOTTY || files::get(fd).is_none() {
                return value;
            }
        }
        match kvm::kvm_ioctl(fd, request as u32, argument) {
            Some(result) => answer(result),
            None => next::ioctl(fd, request, argument),
        }
    }
    fn mmap(address: *mut c_void, len: usize, protection: c_int, flags: c_int, fd: c_int, offset: c_long) -> *mut c_void {
        if let Some(errno) = refused(len, protection, flags, fd, offset) {
            return answer(Err(errno)) as usize as *mut c_void;
        }
        let mapped = next::mmap(address, len, protection, flags, fd, offset);
        complete_mapping(mapped, len, protection, flags, fd, offset);
        mapped
    }
    fn mmap64(address: *mut c_void, len: usize, protection: c_int, flags: c_int, fd: c_int, offset: c_long) -> *mut c_void {
        if let Some(errno) = refused(len, protection, flags, fd, offset) {
            return answer(Err(errno)) as usize as *mut c_void;
        }
        let mapped = next::mmap64(address, len, protection, flags, fd, offset);
        complete_mapping(mapped, len, protection, flags, fd, offset);
        mapped
    }
}

/// The errno with which KVM would refuse this mapping of a descriptor of its own.
fn refused(
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: c_long,
) -> Option<c_int> {
    if fd < 0 || !files::any() || flags & libc::MAP_ANONYMOUS != 0 {
        return None;
    }
    kvm::refuses_mapping(len, protection, flags, fd, offset)
}

/// Completes a mapping, if it is one of a vCPU.
///
/// # Safety
/// `mapped` must be what mmap returned for the other arguments.
unsafe fn complete_mapping(
    mapped: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: c_long,
) {
    if fd >= 0 && files::any() && flags & libc::MAP_ANONYMOUS == 0 && mapped != libc::MAP_FAILED {
        // SAFETY: a mapping of `fd` that was just made for the program.
        unsafe { kvm::complete_mapping(mapped as usize, len, protection, fd, offset) };
    }
}

interpose! {
    fn sigaction(signal: c_int, new: *const SigAction, old: *mut SigAction) -> c_int {
        actions::sigaction(signal, new, old)
    }
    fn __sigaction(signal: c_int, new: *const SigAction, old: *mut SigAction) -> c_int {
        actions::sigaction(signal, new, old)
    }
    fn signal(signal: c_int, handler: usize) -> usize {
        set_handler(signal, handler, libc::SA_RESTART)
    }
    fn bsd_signal(signal: c_int, handler: usize) -> usize {
        set_handler(signal, handler, libc::SA_RESTART)
    }
    fn ssignal(signal: c_int, handler: usize) -> usize {
        set_handler(signal, handler, libc::SA_RESTART)
    }
    fn sysv_signal(signal: c_int, handler: usize) -> usize {
        set_handler(signal, handler, libc::SA_RESETHAND | libc::SA_NODEFER)
    }
    fn __sysv_signal(signal: c_int, handler: usize) -> usize {
        set_handler(signal, handler, libc::SA_RESETHAND | libc::SA_NODEFER)
    }
    fn pthread_cancel(thread: pthread_t) -> c_int {
        if files::any() {
            cancel::catch();
        }
        next::pthread_cancel(thread)
    }
    fn pthread_sigmask(how: c_int, new: *const sigset_t, old: *mut sigset_t) -> c_int {
        masks::change(next::pthread_sigmask, how, new, old)
    }
    fn sigprocmask(how: c_int, new: *const sigset_t, old: *mut sigset_t) -> c_int {
        masks::change(next::sigprocmask, how, new, old)
    }
}

/// signal(3) and its relatives, by sigaction. The C library's own would not come by here.
///
/// # Safety
/// `handler` must be a signal handler, SIG_DFL or SIG_IGN.
unsafe fn set_handler(signal: c_int, handler: usize, flags: c_int) -> usize {
    // SAFETY: all-zero bytes are a valid sigaction.
    let (mut new, mut old): (SigAction, SigAction) = unsafe { std::mem::zeroed() };
    new.sa_sigaction = handler;
    new.sa_flags = flags;
    if handler == libc::SIG_ERR {
        return answer(Err(libc::EINVAL)) as usize;
    }
    // SAFETY: live structures, and the program's handler.
    match unsafe { actions::sigaction(signal, &new, &mut old) } {
        0 => old.sa_sigaction,
        _ => libc::SIG_ERR,
    }
}
