//! `/dev/kvm`: recognising it, opening it, and what stat says of it. The device seems to exist, as
//! a character device 10:232 that everybody may open, whether or not the host has it.

use std::ffi::{CStr, c_char, c_int};
use std::os::fd::AsRawFd;
use std::panic::catch_unwind;
use std::sync::OnceLock;

use anykvm::{Object, System};

use crate::files::{self, File, FileRef};
use crate::{signals, sys};

/// Device number of `/dev/kvm` (`MISC_MAJOR`, `KVM_MINOR`).
pub const MAJOR: u32 = 10;
/// See [`MAJOR`].
pub const MINOR: u32 = 232;
/// A character device that everybody may read and write.
pub const MODE: u32 = libc::S_IFCHR | 0o666;

/// Whether the shim does anything: `ANYKVM_BACKEND=kvm` leaves the host's device alone.
fn enabled() -> bool {
    static ENABLED: OnceLock<bool> = OnceLock::new();
    *ENABLED.get_or_init(|| std::env::var_os("ANYKVM_BACKEND").is_none_or(|v| v != "kvm"))
}

/// Whether a path, relative to the directory `dir` if it does not begin with a slash, is the device.
///
/// # Safety
/// The path must be a C string or null.
pub unsafe fn is_kvm(dir: c_int, path: *const c_char) -> bool {
    if path.is_null() {
        return false;
    }
    // SAFETY: by the caller's promise. Nearly every path differs in its first few bytes.
    let (absolute, rest) = unsafe {
        match *path.cast::<u8>() {
            b'/' => (true, skip(path.cast(), b"dev")),
            b'k' | b'.' => (false, Some(path.cast())),
            _ => return false,
        }
    };
    // SAFETY: still inside the string.
    let found = rest.is_some_and(|rest| unsafe { skip(rest, b"kvm").is_some_and(|end| *end == 0) });
    found && enabled() && (absolute || is_dev(dir))
}

/// Skips slashes, `.` components and the component `name`; None if another component is there.
///
/// # Safety
/// `at` must be a C string.
unsafe fn skip(mut at: *const u8, name: &[u8]) -> Option<*const u8> {
    // SAFETY: never reads past the first zero byte.
    unsafe {
        loop {
            match (*at, at.add(1)) {
                (b'/', next) => at = next,
                (b'.', next) if *next == b'/' => at = next,
                _ => break,
            }
        }
        for &byte in name {
            if *at != byte {
                return None;
            }
            at = at.add(1);
        }
        matches!(*at, 0 | b'/').then_some(at)
    }
}

fn is_dev(dir: c_int) -> bool {
    let here = if dir == libc::AT_FDCWD { c"." } else { c"" };
    let inode = sys::inode_at(dir, here);
    inode.is_some() && inode == sys::inode_at(libc::AT_FDCWD, c"/dev")
}

/// open(2) of the device: a descriptor, or an error number.
pub fn open(flags: c_int) -> Result<c_int, c_int> {
    if flags & libc::O_DIRECTORY != 0 {
        return Err(libc::ENOTDIR);
    }
    if flags & (libc::O_CREAT | libc::O_EXCL) == libc::O_CREAT | libc::O_EXCL {
        return Err(libc::EEXIST);
    }
    signals::begin();
    signals::uninterrupted(|| {
        let system = catch_unwind(System::new).map_err(|_| libc::EIO)?;
        let object = Object::System(system.map_err(|e| e.errno())?);
        open_object(object, flags & libc::O_CLOEXEC != 0)
    })
}

/// The file behind a descriptor that another process under the shim has opened: it came through
/// exec or over a socket. `/dev/kvm` is as good here as there; what was made from it is not.
pub fn inherited(fd: c_int) -> Option<Result<FileRef, c_int>> {
    let mut buf = [0; 32];
    let name = sys::name(fd, &mut buf)?.strip_prefix(b"/memfd:kvm")?;
    match name {
        [] | [b' ', ..] => {
            signals::begin();
            let system = catch_unwind(System::new).map_err(|_| libc::EIO);
            Some(system.and_then(|system| {
                let file = File::create(Object::System(system.map_err(|e| e.errno())?));
                files::install(fd, file.clone());
                Ok(file)
            }))
        }
        [b'-', ..] => Some(Err(libc::EIO)),
        _ => None,
    }
}

/// Gives an object to the program: a new descriptor for it.
pub fn open_object(object: Object, close_on_exec: bool) -> Result<c_int, c_int> {
    let fd = sys::duplicate(object.fd().as_raw_fd(), close_on_exec)?;
    files::install(fd, File::create(object));
    Ok(fd)
}

/// What stat says of the device.
pub fn stat() -> libc::stat {
    // SAFETY: all-zero bytes are a valid struct stat.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    stat.st_ino = MINOR.into();
    stat.st_nlink = 1;
    stat.st_mode = MODE;
    stat.st_rdev = libc::makedev(MAJOR, MINOR);
    stat.st_blksize = 4096;
    stat
}

/// What statx says of the device.
pub fn statx() -> libc::statx {
    // SAFETY: all-zero bytes are a valid struct statx.
    let mut statx: libc::statx = unsafe { std::mem::zeroed() };
    statx.stx_mask = libc::STATX_BASIC_STATS;
    statx.stx_ino = MINOR.into();
    statx.stx_nlink = 1;
    statx.stx_mode = MODE as u16;
    statx.stx_rdev_major = MAJOR;
    statx.stx_rdev_minor = MINOR;
    statx.stx_blksize = 4096;
    statx
}

/// access(2) of the device.
pub fn access(mode: c_int) -> Result<c_int, c_int> {
    match mode & libc::X_OK {
        0 => Ok(0),
        _ => Err(libc::EACCES),
    }
}

/// Whether `fd`, with the path `path`, names an open `/dev/kvm` itself (`AT_EMPTY_PATH`).
///
/// # Safety
/// The path must be a C string or null.
pub unsafe fn is_open_kvm(fd: c_int, path: *const c_char, flags: c_int) -> bool {
    flags & libc::AT_EMPTY_PATH != 0
        // SAFETY: by the caller's promise.
        && (path.is_null() || unsafe { CStr::from_ptr(path) }.is_empty())
        && is_system(fd)
}

/// Whether `fd` is an open `/dev/kvm`.
pub fn is_system(fd: c_int) -> bool {
    files::get(fd).is_some_and(|file| matches!(file.object(), Object::System(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(path: &CStr) -> bool {
        // SAFETY: a C string.
        unsafe { is_kvm(libc::AT_FDCWD, path.as_ptr()) }
    }

    #[test]
    fn paths() {
        assert!(is(c"/dev/kvm"));
        assert!(is(c"//dev/./kvm"));
        for path in [
            c"/dev/kvm/",
            c"/dev/kvm0",
            c"/dev",
            c"/",
            c"",
            c".",
            c"/dev/k",
            c"kvm",
            c"/devkvm",
        ] {
            assert!(!is(path), "{path:?}");
        }
        // SAFETY: null is allowed.
        assert!(!unsafe { is_kvm(libc::AT_FDCWD, std::ptr::null()) });
    }

    #[test]
    fn relative_paths_count_from_dev_only() {
        let dev = std::fs::File::open("/dev").unwrap();
        // SAFETY: C strings.
        unsafe {
            assert!(is_kvm(dev.as_raw_fd(), c"kvm".as_ptr()));
            assert!(is_kvm(dev.as_raw_fd(), c"./kvm".as_ptr()));
            assert!(!is_kvm(dev.as_raw_fd(), c"null".as_ptr()));
        }
    }
}
