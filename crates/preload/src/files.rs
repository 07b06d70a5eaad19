//! Open files: which descriptor stands for which KVM object.
//!
//! A [`File`] is what the kernel calls an open file description: it is shared by the descriptors
//! that dup made, and the last one to be closed drops the object. Looking one up takes no lock, and
//! works as the kernel's own lookup does (`fs/file.c`, `__fget_files_rcu`): `File`s are never freed,
//! only reused; a lookup takes a reference if there is one left to share and then checks that the
//! descriptor still names the same file. Signal handlers and threads may call in at any point.
//!
//! A descriptor the shim has not seen being made (a raw dup, a descriptor passed over a socket) is
//! recognised by the inode of the memfd that every object has.

use std::cell::UnsafeCell;
use std::ffi::c_int;
use std::ops::{Deref, RangeInclusive};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use anykvm::Object;

use crate::{process, sys};

/// `refs` of a file that is being made or unmade; 0 is a free one.
const RESERVED: u32 = u32::MAX;

/// One open file description.
pub struct File {
    /// Descriptors and lookups in progress.
    refs: AtomicU32,
    /// Device and inode of the object's memfd.
    inode: (AtomicU64, AtomicU64),
    /// The process that made it ([`process::generation`]).
    generation: AtomicU64,
    object: UnsafeCell<Option<Object>>,
    /// The next in the list of all files; never changes once set.
    next: AtomicPtr<File>,
}

// SAFETY: `object` is written only while `refs` is RESERVED, by the one who reserved it, and read
// only through a reference counted in `refs`; Object itself is Send and Sync.
unsafe impl Sync for File {}

/// All files ever made, in use or free.
static FILES: AtomicPtr<File> = AtomicPtr::new(std::ptr::null_mut());

impl File {
    /// Makes an open file for an object.
    pub fn create(object: Object) -> FileRef {
        let (device, inode) = sys::inode(object.fd().as_raw_fd()).unwrap_or_default();
        let file = Self::reserve();
        file.inode.0.store(device, Ordering::Relaxed);
        file.inode.1.store(inode, Ordering::Relaxed);
        file.generation
            .store(process::generation(), Ordering::Relaxed);
        // SAFETY: reserved, so nobody else looks.
        unsafe { *file.object.get() = Some(object) };
        file.refs.store(1, Ordering::Release);
        FileRef(file)
    }

    /// A free file, or a new one.
    fn reserve() -> &'static Self {
        for file in all() {
            let free = (0, RESERVED, Ordering::Acquire, Ordering::Relaxed);
            if file
                .refs
                .compare_exchange(free.0, free.1, free.2, free.3)
                .is_ok()
            {
                return file;
            }
        }
        let file: &'static mut Self = Box::leak(Box::new(Self {
            refs: AtomicU32::new(RESERVED),
            inode: Default::default(),
            generation: AtomicU64::new(0),
            object: UnsafeCell::new(None),
            next: AtomicPtr::new(FILES.load(Ordering::Acquire)),
        }));
        let mut next = *file.next.get_mut();
        loop {
            file.next.store(next, Ordering::Relaxed);
            let pushed = FILES.compare_exchange(next, file, Ordering::AcqRel, Ordering::Acquire);
            match pushed {
                Ok(_) => return file,
                Err(newer) => next = newer,
            }
        }
    }

    /// Takes a reference unless the last one is gone.
    fn try_get(&'static self) -> Option<FileRef> {
        let mut refs = self.refs.load(Ordering::Relaxed);
        while refs != 0 && refs != RESERVED {
            let more = (refs + 1, Ordering::Acquire, Ordering::Relaxed);
            match self
                .refs
                .compare_exchange_weak(refs, more.0, more.1, more.2)
            {
                Ok(_) => return Some(FileRef(self)),
                Err(now) => refs = now,
            }
        }
        None
    }

    /// Whether the object belongs to this process (and not to the one it was forked from).
    pub fn is_ours(&self) -> bool {
        self.generation.load(Ordering::Relaxed) == process::generation()
    }

    fn has_inode(&self, (device, inode): (u64, u64)) -> bool {
        self.inode.0.load(Ordering::Relaxed) == device
            && self.inode.1.load(Ordering::Relaxed) == inode
    }

    /// The last reference is gone and the file reserved: drops the object and frees the file.
    fn free(&self) {
        // SAFETY: reserved, so nobody else looks.
        let object = unsafe { (*self.object.get()).take() };
        if self.is_ours() {
            // Nobody could report a panic from close(2).
            let _ = catch_unwind(AssertUnwindSafe(|| drop(object)));
        } else {
            // Its threads, and what they may have locked, are in the parent.
            std::mem::forget(object);
        }
        self.inode.1.store(0, Ordering::Relaxed);
        self.refs.store(0, Ordering::Release);
    }
}

/// A counted reference to a file.
pub struct FileRef(&'static File);

impl FileRef {
    /// The object behind the file.
    pub fn object(&self) -> &Object {
        // SAFETY: written before the reference could be had, and not again while it lives.
        let object = unsafe { &*self.0.object.get() };
        match object {
            Some(object) => object,
            None => unreachable!("a file with references has an object"),
        }
    }

    /// Gives up the reference without counting it down: a table entry now holds it.
    fn into_pointer(self) -> *mut File {
        let file = std::ptr::from_ref(self.0).cast_mut();
        std::mem::forget(self);
        file
    }

    /// The reference that a table entry held.
    fn from_pointer(file: *mut File) -> Option<Self> {
        // SAFETY: table entries come from `into_pointer`, and files are never freed.
        unsafe { file.as_ref() }.map(Self)
    }
}

impl Clone for FileRef {
    fn clone(&self) -> Self {
        self.0.refs.fetch_add(1, Ordering::Relaxed);
        Self(self.0)
    }
}

impl Deref for FileRef {
    type Target = File;
    fn deref(&self) -> &File {
        self.0
    }
}

impl Drop for FileRef {
    fn drop(&mut self) {
        let mut refs = self.0.refs.load(Ordering::Relaxed);
        loop {
            let less = if refs == 1 { RESERVED } else { refs - 1 };
            let swapped =
                self.0
                    .refs
                    .compare_exchange_weak(refs, less, Ordering::AcqRel, Ordering::Relaxed);
            match swapped {
                Ok(_) if less == RESERVED => return self.0.free(),
                Ok(_) => return,
                Err(now) => refs = now,
            }
        }
    }
}

fn all() -> impl Iterator<Item = &'static File> {
    let mut next = FILES.load(Ordering::Acquire);
    std::iter::from_fn(move || {
        // SAFETY: the list holds leaked files only.
        let file = unsafe { next.as_ref() }?;
        next = file.next.load(Ordering::Relaxed);
        Some(file)
    })
}

/// Whether the process has ever had a file of ours.
pub fn any() -> bool {
    !FILES.load(Ordering::Relaxed).is_null()
}

/// Descriptors a leaf of the table covers.
const LEAF: usize = 1024;
/// Leaves: enough for 4 million descriptors, four times the kernel's default `fs.nr_open`.
const LEAVES: usize = 4096;

type Leaf = [AtomicPtr<File>; LEAF];

static TABLE: [AtomicPtr<Leaf>; LEAVES] = [const { AtomicPtr::new(std::ptr::null_mut()) }; LEAVES];

/// The table's entry for a descriptor, if its leaf exists.
fn entry(fd: c_int) -> Option<&'static AtomicPtr<File>> {
    let fd = usize::try_from(fd).ok()?;
    let leaf = TABLE.get(fd / LEAF)?.load(Ordering::Acquire);
    // SAFETY: leaves are never unmapped once in the table.
    unsafe { leaf.as_ref() }.map(|leaf| &leaf[fd % LEAF])
}

/// The same, making the leaf. None: the descriptor is past the table, or there is no memory.
fn make_entry(fd: c_int) -> Option<&'static AtomicPtr<File>> {
    if let Some(entry) = entry(fd) {
        return Some(entry);
    }
    let slot = TABLE.get(usize::try_from(fd).ok()? / LEAF)?;
    let leaf = sys::allocate(size_of::<Leaf>())?;
    let empty = std::ptr::null_mut();
    let (leaf, orders) = (leaf.cast(), (Ordering::AcqRel, Ordering::Acquire));
    if slot
        .compare_exchange(empty, leaf, orders.0, orders.1)
        .is_err()
    {
        // SAFETY: another thread was first; nobody has seen this one.
        unsafe { sys::release(leaf.cast(), size_of::<Leaf>()) };
    }
    entry(fd)
}

/// The file a descriptor names, as far as the table knows.
pub fn get(fd: c_int) -> Option<FileRef> {
    let entry = entry(fd)?;
    loop {
        let file = entry.load(Ordering::Acquire);
        // SAFETY: table entries are null or leaked files.
        let reference = unsafe { file.as_ref() }?.try_get();
        if entry.load(Ordering::Acquire) == file && reference.is_some() {
            return reference;
        }
    }
}

/// The file a descriptor names, found by its inode if the table does not know it. The table knows
/// it from then on.
pub fn find(fd: c_int) -> Option<FileRef> {
    if let Some(file) = get(fd) {
        return Some(file);
    }
    if !any() {
        return None;
    }
    let inode = sys::inode(fd).filter(|&(_, inode)| inode != 0)?;
    let file = all()
        .filter(|file| file.has_inode(inode))
        .filter_map(File::try_get)
        .find(|file| file.has_inode(inode))?;
    install(fd, file.clone());
    Some(file)
}

/// Makes a descriptor stand for a file (or, past the table, be found by inode each time).
pub fn install(fd: c_int, file: FileRef) {
    if process::is_vfork_child() {
        return; // The descriptor is the child's alone.
    }
    if let Some(entry) = make_entry(fd) {
        drop(FileRef::from_pointer(
            entry.swap(file.into_pointer(), Ordering::AcqRel),
        ));
    }
}

/// Forgets what a descriptor stood for: it is about to be closed or replaced.
pub fn remove(fd: c_int) -> Option<FileRef> {
    let entry = entry(fd)?;
    if entry.load(Ordering::Relaxed).is_null() || process::is_vfork_child() {
        return None;
    }
    FileRef::from_pointer(entry.swap(std::ptr::null_mut(), Ordering::AcqRel))
}

/// Forgets all descriptors in a range.
pub fn remove_range(range: RangeInclusive<usize>) {
    for (i, slot) in TABLE.iter().enumerate() {
        let leaf = i * LEAF..=i * LEAF + (LEAF - 1);
        let overlap = *range.start().max(leaf.start())..=*range.end().min(leaf.end());
        if overlap.is_empty() || slot.load(Ordering::Relaxed).is_null() {
            continue;
        }
        for fd in overlap {
            drop(remove(fd as c_int));
        }
    }
}
