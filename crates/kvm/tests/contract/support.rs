//! What the contract tests stand on: memory to pass arguments in, handles of the KVM API, and a record of the
//! ioctls that were issued.
//!
//! The handles are objects of this crate, or, when `ANYKVM_TEST_HOST_KVM` is 1, descriptors of `/dev/kvm`:
//! the host's, or under `anykvm run` the one that the shim makes.

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use anykvm::{Efault, Errno, Object, ObjectKind, Reply, System, UserMemory};
use anykvm_abi::ioctl::*;
use anykvm_abi::{KVM_CREATE_DEVICE_TEST, Plain, kvm_create_device};
use anykvm_cpu::memory::mapping::Mapping;

const LEN: usize = 1 << 20;
const PAGE: usize = 4096;

/// An address that leads nowhere.
pub const NOWHERE: u64 = 0x1000;

/// Whether the tests are about `/dev/kvm`, not about this crate's objects.
pub fn on_device() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| std::env::var_os("ANYKVM_TEST_HOST_KVM").is_some_and(|v| v == "1"))
}

/// Ends a test that looks behind the API.
macro_rules! software_only {
    () => {
        if $crate::support::on_device() {
            return;
        }
    };
}
pub(crate) use software_only;

/// The caller's memory, given out piece by piece; behind it is a page that faults.
pub struct User {
    memory: Mapping,
    next: RefCell<usize>,
}

impl User {
    #[allow(unsafe_code)]
    pub fn new() -> Self {
        let memory = Mapping::anonymous(LEN + PAGE).unwrap();
        memory.write_bytes(0, &vec![0xcc; LEN]);
        let last = (memory.address() as usize + LEN) as *mut std::ffi::c_void;
        // SAFETY: the last page of the mapping, which nothing below touches.
        unsafe { rustix::mm::mprotect(last, PAGE, rustix::mm::MprotectFlags::empty()) }.unwrap();
        Self {
            memory,
            next: RefCell::new(0),
        }
    }
    /// The first address that faults.
    pub fn end(&self) -> u64 {
        self.memory.address() + LEN as u64
    }
    /// Room for this many bytes; its address.
    pub fn room(&self, len: usize) -> u64 {
        let mut next = self.next.borrow_mut();
        let at = *next;
        *next = (at + len + 15) & !15;
        assert!(*next <= LEN);
        self.memory.address() + at as u64
    }
    /// The address of a copy of the value.
    pub fn at<T: Plain>(&self, value: &T) -> u64 {
        let at = self.room(size_of::<T>());
        self.write(at, value.as_bytes()).unwrap();
        at
    }
    /// The address of a copy of header and elements (a flexible array).
    pub fn array<H: Plain, T: Plain>(&self, header: &H, elements: &[T]) -> u64 {
        let at = self.room(size_of::<H>() + size_of_val(elements));
        self.write(at, header.as_bytes()).unwrap();
        for (i, e) in elements.iter().enumerate() {
            let offset = size_of::<H>() + i * size_of::<T>();
            self.write(at + offset as u64, e.as_bytes()).unwrap();
        }
        at
    }
    pub fn value<T: Plain>(&self, at: u64) -> T {
        let mut value = T::zeroed();
        self.read(at, value.as_bytes_mut()).unwrap();
        value
    }
    fn offset(&self, address: u64, len: usize) -> Result<usize, Efault> {
        let start = address.checked_sub(self.memory.address()).ok_or(Efault)? as usize;
        let end = start.checked_add(len).ok_or(Efault)?;
        if end <= LEN { Ok(start) } else { Err(Efault) }
    }
}

impl UserMemory for User {
    fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), Efault> {
        self.memory
            .read_bytes(self.offset(address, buf.len())?, buf);
        Ok(())
    }
    fn write(&self, address: u64, buf: &[u8]) -> Result<(), Efault> {
        self.memory
            .write_bytes(self.offset(address, buf.len())?, buf);
        Ok(())
    }
}

/// One ioctl that was issued, and how it ended.
pub type Issued = (ObjectKind, u32, Result<(), Errno>);

thread_local! {
    static ISSUED: RefCell<Vec<Issued>> = const { RefCell::new(Vec::new()) };
}

/// What this thread has issued since it asked last.
pub fn take_issued() -> Vec<Issued> {
    ISSUED.take()
}

/// What a descriptor of the KVM API leads to.
#[derive(Debug)]
pub enum Handle {
    Object(Object),
    Device(OwnedFd, ObjectKind),
}

/// What a successful ioctl returns.
#[derive(Debug)]
pub enum Answer {
    Value(i32),
    Handle(Handle),
}

impl Handle {
    /// `/dev/kvm`.
    pub fn system() -> Self {
        if !on_device() {
            return Self::Object(Object::System(System::new().unwrap()));
        }
        let mut how = std::fs::OpenOptions::new();
        let file = how.read(true).write(true).open("/dev/kvm").unwrap();
        Self::Device(file.into(), ObjectKind::System)
    }
    pub fn kind(&self) -> ObjectKind {
        match self {
            Self::Object(object) => object.kind(),
            Self::Device(_, kind) => *kind,
        }
    }
    pub fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Object(object) => object.fd(),
            Self::Device(fd, _) => fd.as_fd(),
        }
    }
    /// An ioctl.
    pub fn issue(&self, request: u32, arg: u64, user: &User) -> Result<Answer, Errno> {
        let result = match self {
            Self::Object(object) => object.ioctl(request, arg, user).map(|reply| match reply {
                Reply::Value(n) => Answer::Value(n),
                Reply::Object(object) => Answer::Handle(Self::Object(object)),
            }),
            Self::Device(fd, _) => raw_ioctl(fd.as_fd(), request, arg).map(|n| {
                let (n, made) = if request == KVM_CREATE_DEVICE {
                    let device: kvm_create_device = user.value(arg);
                    let test = device.flags & KVM_CREATE_DEVICE_TEST != 0;
                    match test {
                        true => (n, None),
                        false => (device.fd as i32, Some(ObjectKind::Device)),
                    }
                } else {
                    (n, made_by(request))
                };
                match made {
                    Some(kind) => Answer::Handle(Self::Device(owned(n), kind)),
                    None => Answer::Value(n),
                }
            }),
        };
        let end = result.as_ref().map(drop).map_err(|e| *e);
        ISSUED.with_borrow_mut(|all| all.push((self.kind(), request, end)));
        result
    }
    /// One that returns a number.
    pub fn call(&self, request: u32, arg: u64, user: &User) -> Result<i32, Errno> {
        match self.issue(request, arg, user)? {
            Answer::Value(n) => Ok(n),
            Answer::Handle(handle) => panic!("a handle instead of a number: {handle:?}"),
        }
    }
    /// One that makes something.
    pub fn make(&self, request: u32, arg: u64, user: &User) -> Result<Handle, Errno> {
        match self.issue(request, arg, user)? {
            Answer::Handle(handle) => Ok(handle),
            Answer::Value(n) => panic!("{n} instead of a handle"),
        }
    }
}

fn made_by(request: u32) -> Option<ObjectKind> {
    match request {
        KVM_CREATE_VM => Some(ObjectKind::Vm),
        KVM_CREATE_VCPU => Some(ObjectKind::Vcpu),
        KVM_GET_STATS_FD => Some(ObjectKind::Stats),
        KVM_CREATE_GUEST_MEMFD => Some(ObjectKind::GuestMemfd),
        _ => None,
    }
}

#[allow(unsafe_code)]
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the descriptor was just made for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The system call, with the errno it fails with.
#[allow(unsafe_code)]
pub fn raw_ioctl(fd: BorrowedFd<'_>, request: u32, arg: u64) -> Result<i32, Errno> {
    // SAFETY: the argument is a number or leads into a [`User`]'s memory, or nowhere.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request.into(), arg) } {
        -1 => Err(std::io::Error::last_os_error().into()),
        n => Ok(n),
    }
}

/// `/dev/kvm`, a VM made from it, and a caller.
pub struct Fixture {
    pub kvm: Handle,
    pub vm: Handle,
    pub user: User,
}

impl Fixture {
    pub fn new() -> Self {
        let kvm = Handle::system();
        let user = User::new();
        let vm = kvm.make(KVM_CREATE_VM, 0, &user).unwrap();
        Self { kvm, vm, user }
    }
    /// With all interrupt controllers.
    pub fn with_irqchip() -> Self {
        let f = Self::new();
        assert_eq!(f.vm(KVM_CREATE_IRQCHIP, 0), Ok(0));
        f
    }
    /// A system ioctl.
    pub fn system(&self, request: u32, arg: u64) -> Result<i32, Errno> {
        self.kvm.call(request, arg, &self.user)
    }
    /// A VM ioctl.
    pub fn vm(&self, request: u32, arg: u64) -> Result<i32, Errno> {
        self.vm.call(request, arg, &self.user)
    }
    /// A VM ioctl with this argument behind the pointer.
    pub fn vm_with<T: Plain>(&self, request: u32, arg: &T) -> Result<i32, Errno> {
        let at = self.user.at(arg);
        self.vm(request, at)
    }
    /// A VM ioctl that fills a structure.
    pub fn vm_get<T: Plain>(&self, request: u32) -> Result<T, Errno> {
        let at = self.user.room(size_of::<T>());
        self.vm(request, at)?;
        Ok(self.user.value(at))
    }
    pub fn vcpu(&self, id: u64) -> Result<Handle, Errno> {
        self.vm.make(KVM_CREATE_VCPU, id, &self.user)
    }
    /// The VM itself, for tests that are [`software_only`].
    pub fn inner(&self) -> &anykvm::Vm {
        match &self.vm {
            Handle::Object(Object::Vm(vm)) => vm,
            other => panic!("not a VM of this crate: {other:?}"),
        }
    }
    /// Every ioctl of these fails with EFAULT for a pointer to nowhere.
    pub fn all_fault(&self, requests: &[u32]) {
        for request in requests {
            for pointer in [0, NOWHERE, u64::MAX, self.user.end() - 1] {
                let result = self.vm(*request, pointer);
                let name = anykvm_abi::ioctl::name(*request).unwrap_or("?");
                assert_eq!(result, Err(Errno::EFAULT), "{name} at {pointer:#x}");
            }
        }
    }
}

/// Memory for a slot.
pub fn ram(pages: usize) -> Mapping {
    Mapping::anonymous(pages * 4096).unwrap()
}
