//! What the contract tests stand on: a user address space, and calls through [`Object::ioctl`].

use std::cell::RefCell;

use anykvm::{Efault, Errno, Object, Reply, System, UserMemory};
use anykvm_abi::Plain;
use anykvm_abi::ioctl::*;
use anykvm_cpu::memory::mapping::Mapping;

/// Where [`User`]'s memory begins; below is nothing.
const BASE: u64 = 0x10_0000;
const LEN: usize = 1 << 20;

/// An address that leads nowhere.
pub const NOWHERE: u64 = 0x1000;

/// The caller's memory: made-up addresses, given out one after the other.
pub struct User {
    bytes: RefCell<Vec<u8>>,
    next: RefCell<usize>,
}

impl User {
    pub fn new() -> Self {
        Self {
            bytes: RefCell::new(vec![0xcc; LEN]),
            next: RefCell::new(0),
        }
    }
    /// Room for this many bytes; its address.
    pub fn room(&self, len: usize) -> u64 {
        let mut next = self.next.borrow_mut();
        let at = *next;
        *next = (at + len + 15) & !15;
        assert!(*next <= LEN);
        BASE + at as u64
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
    fn range(address: u64, len: usize) -> Result<std::ops::Range<usize>, Efault> {
        let start = address.checked_sub(BASE).ok_or(Efault)? as usize;
        let end = start
            .checked_add(len)
            .filter(|end| *end <= LEN)
            .ok_or(Efault)?;
        Ok(start..end)
    }
}

impl UserMemory for User {
    fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), Efault> {
        buf.copy_from_slice(&self.bytes.borrow()[Self::range(address, buf.len())?]);
        Ok(())
    }
    fn write(&self, address: u64, buf: &[u8]) -> Result<(), Efault> {
        self.bytes.borrow_mut()[Self::range(address, buf.len())?].copy_from_slice(buf);
        Ok(())
    }
}

/// `/dev/kvm`, a VM made from it, and a caller.
pub struct Fixture {
    pub kvm: Object,
    pub vm: Object,
    pub user: User,
}

impl Fixture {
    pub fn new() -> Self {
        let kvm = Object::System(System::new().unwrap());
        let user = User::new();
        let vm = object(kvm.ioctl(KVM_CREATE_VM, 0, &user));
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
        number(self.kvm.ioctl(request, arg, &self.user))
    }
    /// A VM ioctl.
    pub fn vm(&self, request: u32, arg: u64) -> Result<i32, Errno> {
        number(self.vm.ioctl(request, arg, &self.user))
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
    pub fn vcpu(&self, id: u64) -> Result<Object, Errno> {
        match self.vm.ioctl(KVM_CREATE_VCPU, id, &self.user)? {
            Reply::Object(vcpu) => Ok(vcpu),
            Reply::Value(n) => panic!("KVM_CREATE_VCPU returned {n}"),
        }
    }
    pub fn inner(&self) -> &anykvm::Vm {
        match &self.vm {
            Object::Vm(vm) => vm,
            other => panic!("not a VM: {other:?}"),
        }
    }
    /// Every ioctl of these fails with EFAULT for a pointer to nowhere.
    pub fn all_fault(&self, requests: &[u32]) {
        for request in requests {
            for pointer in [0, NOWHERE, u64::MAX, BASE + LEN as u64 - 1] {
                let result = self.vm(*request, pointer);
                let name = anykvm_abi::ioctl::name(*request).unwrap_or("?");
                assert_eq!(result, Err(Errno::EFAULT), "{name} at {pointer:#x}");
            }
        }
    }
}

pub fn number(reply: Result<Reply, Errno>) -> Result<i32, Errno> {
    match reply? {
        Reply::Value(n) => Ok(n),
        Reply::Object(object) => panic!("an object instead of a number: {object:?}"),
    }
}

pub fn object(reply: Result<Reply, Errno>) -> Object {
    match reply {
        Ok(Reply::Object(object)) => object,
        other => panic!("no object: {other:?}"),
    }
}

/// Memory for a slot.
pub fn ram(pages: usize) -> Mapping {
    Mapping::anonymous(pages * 4096).unwrap()
}
