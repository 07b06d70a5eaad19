//! The functions that the shim stands in front of, as the next object in the loader's search order
//! defines them (dlsym(3), `RTLD_NEXT`): libc, or another preloaded library.
//!
//! Each is looked up when it is first needed, which may be before this library's own constructor.
//! Functions that are variadic in C are called with fixed arguments here: in the System V AMD64 ABI
//! (3.2.3, 3.5.7) that is the same call as long as no argument is a floating-point number.

use std::ffi::{CStr, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

/// Looks a symbol up; the process cannot go on without it.
fn resolve(name: &CStr) -> *mut c_void {
    // SAFETY: valid strings; no other requirement.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    if !found.is_null() {
        return found;
    }
    // Symbols for old programs only (__xstat) have no default version, which dlsym insists on.
    // SAFETY: as above.
    let found = unsafe { libc::dlvsym(libc::RTLD_NEXT, name.as_ptr(), c"GLIBC_2.2.5".as_ptr()) };
    if found.is_null() {
        eprintln!("anykvm: the C library has no {}", name.to_string_lossy());
        std::process::abort();
    }
    found
}

macro_rules! next {
    ($($name:ident($($argument:ident: $type:ty),*) -> $ret:ty;)*) => {$(
        /// The next definition of the function of this name.
        ///
        /// # Safety
        /// As the C function.
        pub unsafe fn $name($($argument: $type),*) -> $ret {
            static NEXT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
            const NAME: &CStr = match CStr::from_bytes_with_nul(
                concat!(stringify!($name), "\0").as_bytes(),
            ) {
                Ok(name) => name,
                Err(_) => c"",
            };
            let mut next = NEXT.load(Ordering::Relaxed);
            if next.is_null() {
                next = resolve(NAME);
                NEXT.store(next, Ordering::Relaxed);
            }
            // SAFETY: the symbol's type is this one (C headers); the caller answers for the call.
            unsafe {
                let next: unsafe extern "C" fn($($type),*) -> $ret = std::mem::transmute(next);
                next($($argument),*)
            }
        }
    )*};
}

next! {
    open(path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    openat(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    openat64(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    __open_2(path: *const c_char, flags: c_int) -> c_int;
    __open64_2(path: *const c_char, flags: c_int) -> c_int;
    __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
    __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int;

    stat(path: *const c_char, buf: *mut libc::stat) -> c_int;
    stat64(path: *const c_char, buf: *mut libc::stat) -> c_int;
    lstat(path: *const c_char, buf: *mut libc::stat) -> c_int;
    lstat64(path: *const c_char, buf: *mut libc::stat) -> c_int;
    fstat(fd: c_int, buf: *mut libc::stat) -> c_int;
    fstat64(fd: c_int, buf: *mut libc::stat) -> c_int;
    fstatat(dir: c_int, path: *const c_char, buf: *mut libc::stat, flags: c_int) -> c_int;
    fstatat64(dir: c_int, path: *const c_char, buf: *mut libc::stat, flags: c_int) -> c_int;
    __xstat(version: c_int, path: *const c_char, buf: *mut libc::stat) -> c_int;
    __xstat64(version: c_int, path: *const c_char, buf: *mut libc::stat) -> c_int;
    __lxstat(version: c_int, path: *const c_char, buf: *mut libc::stat) -> c_int;
    __lxstat64(version: c_int, path: *const c_char, buf: *mut libc::stat) -> c_int;
    __fxstat(version: c_int, fd: c_int, buf: *mut libc::stat) -> c_int;
    __fxstat64(version: c_int, fd: c_int, buf: *mut libc::stat) -> c_int;
    __fxstatat(version: c_int, dir: c_int, path: *const c_char, buf: *mut libc::stat, flags: c_int) -> c_int;
    __fxstatat64(version: c_int, dir: c_int, path: *const c_char, buf: *mut libc::stat, flags: c_int) -> c_int;
    statx(dir: c_int, path: *const c_char, flags: c_int, mask: c_uint, buf: *mut libc::statx) -> c_int;
    access(path: *const c_char, mode: c_int) -> c_int;
    euidaccess(path: *const c_char, mode: c_int) -> c_int;
    faccessat(dir: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int;

    close(fd: c_int) -> c_int;
    close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int;
    closefrom(first: c_int) -> ();
    dup(fd: c_int) -> c_int;
    dup2(old: c_int, new: c_int) -> c_int;
    dup3(old: c_int, new: c_int, flags: c_int) -> c_int;
    fcntl(fd: c_int, command: c_int, argument: c_ulong) -> c_int;
    fcntl64(fd: c_int, command: c_int, argument: c_ulong) -> c_int;

    ioctl(fd: c_int, request: c_ulong, argument: c_ulong) -> c_int;
    mmap(address: *mut c_void, len: usize, protection: c_int, flags: c_int, fd: c_int, offset: c_long) -> *mut c_void;
    mmap64(address: *mut c_void, len: usize, protection: c_int, flags: c_int, fd: c_int, offset: c_long) -> *mut c_void;

    pthread_cancel(thread: libc::pthread_t) -> c_int;
    pthread_setcancelstate(state: c_int, old: *mut c_int) -> c_int;
    sigaction(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int;
    pthread_sigmask(how: c_int, new: *const libc::sigset_t, old: *mut libc::sigset_t) -> c_int;
    sigprocmask(how: c_int, new: *const libc::sigset_t, old: *mut libc::sigset_t) -> c_int;
}
