//! Private memory: KVM_CREATE_GUEST_MEMFD, KVM_SET_USER_MEMORY_REGION2, KVM_SET_MEMORY_ATTRIBUTES,
//! KVM_EXIT_MEMORY_FAULT, and KVM_HC_MAP_GPA_RANGE by which a guest asks for it.

use std::mem::offset_of;
use std::os::fd::AsRawFd;

use anykvm::{Errno, ObjectKind};
use anykvm_abi::ioctl::*;
use anykvm_abi::*;
use anykvm_cpu::memory::mapping::Mapping;

use crate::support::*;
use crate::vcpu::VcpuFixture;

const PRIVATE: u64 = KVM_MEMORY_ATTRIBUTE_PRIVATE as u64;
const HOST: u64 = 0x7000_0000_0000;

impl Fixture {
    /// A VM whose pages can be private.
    fn protected() -> Self {
        let kvm = Handle::system();
        let user = User::new();
        let vm = kvm.make(KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM.into(), &user);
        Self {
            vm: vm.unwrap(),
            kvm,
            user,
        }
    }
    fn guest_memfd(&self, size: u64, flags: u64) -> Result<Handle, Errno> {
        let request = kvm_create_guest_memfd {
            size,
            flags,
            reserved: [0; 6],
        };
        self.vm
            .make(KVM_CREATE_GUEST_MEMFD, self.user.at(&request), &self.user)
    }
    fn attributes(&self, address: u64, size: u64, attributes: u64) -> Result<i32, Errno> {
        let arg = kvm_memory_attributes {
            address,
            size,
            attributes,
            flags: 0,
        };
        self.vm_with(KVM_SET_MEMORY_ATTRIBUTES, &arg)
    }
    fn region2(&self, region: &kvm_userspace_memory_region2) -> Result<i32, Errno> {
        let at = self.user.room(size_of_val(region));
        anykvm::UserMemory::write(&self.user, at, region.as_bytes()).unwrap();
        self.vm(KVM_SET_USER_MEMORY_REGION2, at)
    }
}

fn region(fd: &Handle, slot: u32, gpa: u64, size: u64) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        slot,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: gpa,
        memory_size: size,
        userspace_addr: HOST + gpa,
        guest_memfd: fd.fd().as_raw_fd() as u32,
        ..Default::default()
    }
}

/// The errno of mmap, by libc, which is where the shim stands.
#[allow(unsafe_code)]
fn mapping_error(file: &Handle) -> Option<i32> {
    let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
    let fd = file.fd().as_raw_fd();
    // SAFETY: a new mapping, of which nothing is used.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, read, shared, fd, 0) };
    (at == libc::MAP_FAILED).then(|| std::io::Error::last_os_error().raw_os_error())?
}

#[test]
pub fn capabilities_are_the_vms() {
    let (default, protected) = (Fixture::new(), Fixture::protected());
    for (cap, without, with) in [
        (KVM_CAP_GUEST_MEMFD, 0, 1),
        (KVM_CAP_MEMORY_ATTRIBUTES, 0, PRIVATE as i32),
        (KVM_CAP_MULTI_ADDRESS_SPACE, 2, 1),
        (KVM_CAP_MEMORY_FAULT_INFO, 1, 1),
        (KVM_CAP_VM_TYPES, 3, 3),
    ] {
        assert_eq!(default.vm(KVM_CHECK_EXTENSION, cap.into()), Ok(without));
        assert_eq!(protected.vm(KVM_CHECK_EXTENSION, cap.into()), Ok(with));
    }
}

#[test]
pub fn files() {
    let f = Fixture::protected();
    for (size, flags) in [(0, 0), (0x1800, 0), (0x1000, 1 << 40), (1 << 63, 0)] {
        assert_eq!(f.guest_memfd(size, flags).unwrap_err(), Errno::EINVAL);
    }
    let file = f.guest_memfd(0x4000, 0).unwrap();
    let stat = rustix::fs::fstat(file.fd()).unwrap();
    assert_eq!(stat.st_size, 0x4000);
    assert!(rustix::fs::ftruncate(file.fd(), 0x5000).is_err());
    if on_device() {
        assert_eq!(mapping_error(&file), Some(libc::ENODEV));
    }
    assert_eq!(file.call(KVM_CREATE_VCPU, 0, &f.user), Err(Errno::ENOTTY));
    let default = Fixture::new();
    assert_eq!(default.guest_memfd(0x1000, 0).unwrap_err(), Errno::EINVAL);
}

#[test]
pub fn slots() {
    let f = Fixture::protected();
    let file = f.guest_memfd(0x4000, 0).unwrap();
    let good = region(&file, 0, 0x10_0000, 0x2000);
    let other = Fixture::protected();
    let foreign = other.guest_memfd(0x4000, 0).unwrap();
    let bad = |change: &dyn Fn(&mut kvm_userspace_memory_region2)| {
        let mut bad = good;
        change(&mut bad);
        f.region2(&bad)
    };
    let invalid = Err(Errno::EINVAL);
    assert_eq!(bad(&|r| r.guest_memfd_offset = 0x3000), invalid);
    assert_eq!(bad(&|r| r.guest_memfd_offset = 0x800), invalid);
    assert_eq!(bad(&|r| r.guest_memfd_offset = u64::MAX - 0xfff), invalid);
    assert_eq!(bad(&|r| r.flags |= KVM_MEM_READONLY), invalid);
    assert_eq!(bad(&|r| r.flags |= KVM_MEM_LOG_DIRTY_PAGES), invalid);
    assert_eq!(bad(&|r| r.slot = 1 << 16), invalid);
    assert_eq!(bad(&|r| r.userspace_addr = 1), invalid);
    assert_eq!(bad(&|r| r.guest_memfd = u32::MAX), Err(Errno::EBADF));
    let exe = std::fs::File::open("/proc/self/exe").unwrap();
    assert_eq!(bad(&|r| r.guest_memfd = exe.as_raw_fd() as u32), invalid);
    let foreign = foreign.fd().as_raw_fd() as u32;
    assert_eq!(bad(&|r| r.guest_memfd = foreign), invalid);

    assert_eq!(f.region2(&good), Ok(0));
    // That part of the file is taken, another is not; the slot can only be deleted.
    assert_eq!(f.region2(&region(&file, 1, 0x20_0000, 0x1000)), invalid);
    let mut second = region(&file, 1, 0x20_0000, 0x2000);
    second.guest_memfd_offset = 0x2000;
    assert_eq!(f.region2(&second), Ok(0));
    assert_eq!(bad(&|r| r.guest_phys_addr = 0x30_0000), invalid);
    assert_eq!(f.region2(&good), invalid);
    assert_eq!(bad(&|r| r.memory_size = 0), Ok(0));
    assert_eq!(f.region2(&good), Ok(0));

    let default = Fixture::new();
    assert_eq!(default.region2(&good), invalid);
}

#[test]
pub fn attributes() {
    let f = Fixture::protected();
    for (address, size, attributes) in [
        (0, 0, PRIVATE),
        (0x800, 0x1000, PRIVATE),
        (0, 0x1800, PRIVATE),
        (u64::MAX - 0xfff, 0x2000, PRIVATE),
        (0, 0x1000, 1),
        (0, 0x1000, u64::MAX),
    ] {
        let result = f.attributes(address, size, attributes);
        assert_eq!(result, Err(Errno::EINVAL), "{address:#x} {size:#x}");
    }
    let flags = kvm_memory_attributes {
        size: 0x1000,
        flags: 1,
        ..Default::default()
    };
    assert_eq!(
        f.vm_with(KVM_SET_MEMORY_ATTRIBUTES, &flags),
        Err(Errno::EINVAL)
    );
    assert_eq!(f.attributes(0, 0x1000, PRIVATE), Ok(0));
    assert_eq!(f.attributes(0, 1 << 40, 0), Ok(0));
    f.all_fault(&[KVM_SET_MEMORY_ATTRIBUTES, KVM_CREATE_GUEST_MEMFD]);
    let default = Fixture::new();
    assert_eq!(default.attributes(0, 0x1000, PRIVATE), Err(Errno::EINVAL));
    assert_eq!(default.attributes(0, 0x1000, 0), Ok(0));
}

/// 16-bit code: write to 0x2000, read it back to a port, ask for a hypercall, halt.
const CODE: &[u8] = &[
    0xc6, 0x06, 0x00, 0x20, 0x5a, // mov byte [0x2000], 0x5a
    0xa0, 0x00, 0x20, // mov al, [0x2000]
    0xe6, 0x10, // out 0x10, al
    0xf4, // hlt
];

/// A guest with code in shared memory, whose page at 0x2000 may be private.
struct Guest {
    v: VcpuFixture,
    ram: Mapping,
    _file: Option<Handle>,
}

impl Guest {
    fn new(with_file: bool) -> Self {
        let f = Fixture::protected();
        let ram = ram(4);
        ram.write_bytes(0, CODE);
        let file = with_file.then(|| f.guest_memfd(0x4000, 0).unwrap());
        let region = kvm_userspace_memory_region2 {
            flags: if with_file { KVM_MEM_GUEST_MEMFD } else { 0 },
            memory_size: 0x4000,
            userspace_addr: ram.address(),
            guest_memfd: file.as_ref().map_or(0, |f| f.fd().as_raw_fd() as u32),
            ..Default::default()
        };
        assert_eq!(f.region2(&region), Ok(0));
        assert_eq!(f.attributes(0x2000, 0x1000, PRIVATE), Ok(0));
        let v = VcpuFixture::of(f);
        let mut sregs: kvm_sregs = v.get(KVM_GET_SREGS);
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        assert_eq!(v.set(KVM_SET_SREGS, &sregs), Ok(0));
        let regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        assert_eq!(v.set(KVM_SET_REGS, &regs), Ok(0));
        Self {
            v,
            ram,
            _file: file,
        }
    }
    fn exit(&self) -> u32 {
        self.v.page().read(offset_of!(kvm_run, exit_reason))
    }
    /// The byte that the guest has read.
    fn output(&self) -> u8 {
        assert_eq!(self.v.call(KVM_RUN, 0), Ok(0));
        assert_eq!(self.exit(), KVM_EXIT_IO);
        self.v.page().read(4096)
    }
}

#[test]
pub fn a_private_page_is_not_the_shared_one() {
    let g = Guest::new(true);
    g.ram.write(0x2000, 0x11u8);
    assert_eq!(g.output(), 0x5a);
    assert_eq!(g.ram.read::<u8>(0x2000), 0x11);
    // Shared again: the guest sees the monitor's.
    assert_eq!(g.v.f.attributes(0, 0x4000, 0), Ok(0));
    let mut regs: kvm_regs = g.v.get(KVM_GET_REGS);
    regs.rip = 5;
    assert_eq!(g.v.set(KVM_SET_REGS, &regs), Ok(0));
    assert_eq!(g.output(), 0x11);
}

#[test]
pub fn a_private_page_without_a_file_is_a_memory_fault() {
    let g = Guest::new(false);
    let exits = offset_of!(kvm_run, __bindgen_anon_1);
    for _ in 0..2 {
        assert_eq!(g.v.call(KVM_RUN, 0), Err(Errno::EFAULT));
        assert_eq!(g.exit(), KVM_EXIT_MEMORY_FAULT);
        let fault: [u64; 3] = [0, 8, 16].map(|at| g.v.page().read(exits + at));
        assert_eq!(fault, [KVM_MEMORY_EXIT_FLAG_PRIVATE.into(), 0x2000, 0x1000]);
    }
    // When it is shared the store is done, and the guest goes on.
    assert_eq!(g.v.f.attributes(0x2000, 0x1000, 0), Ok(0));
    assert_eq!(g.output(), 0x5a);
    assert_eq!(g.ram.read::<u8>(0x2000), 0x5a);
    // A load, too.
    assert_eq!(g.v.f.attributes(0x2000, 0x1000, PRIVATE), Ok(0));
    let mut regs: kvm_regs = g.v.get(KVM_GET_REGS);
    regs.rip = 5;
    assert_eq!(g.v.set(KVM_SET_REGS, &regs), Ok(0));
    assert_eq!(g.v.call(KVM_RUN, 0), Err(Errno::EFAULT));
    assert_eq!(g.v.get::<kvm_regs>(KVM_GET_REGS).rip, 5);
    assert_eq!(g.v.f.attributes(0x2000, 0x1000, 0), Ok(0));
    assert_eq!(g.output(), 0x5a);
}

#[test]
pub fn the_guest_asks_by_a_hypercall() {
    let g = Guest::new(true);
    // vmcall; out 0x10, al
    g.ram.write_bytes(0, &[0x0f, 0x01, 0xc1, 0xe6, 0x10]);
    let ask = |gpa: u64, pages: u64| {
        let regs = kvm_regs {
            rax: KVM_HC_MAP_GPA_RANGE.into(),
            rbx: gpa,
            rcx: pages,
            rdx: 1 << 4,
            rflags: 2,
            ..Default::default()
        };
        assert_eq!(g.v.set(KVM_SET_REGS, &regs), Ok(0));
        assert_eq!(g.v.call(KVM_RUN, 0), Ok(0));
        g.exit()
    };
    let errno = |n: u32| (n as u64).wrapping_neg() & 0xffff_ffff;
    let rax = || g.v.get::<kvm_regs>(KVM_GET_REGS).rax;
    assert_eq!(ask(0x1000, 1), KVM_EXIT_IO);
    assert_eq!(rax(), errno(KVM_ENOSYS));
    let cap = kvm_enable_cap {
        cap: KVM_CAP_EXIT_HYPERCALL,
        args: [1 << KVM_HC_MAP_GPA_RANGE, 0, 0, 0],
        ..Default::default()
    };
    assert_eq!(g.v.f.vm_with(KVM_ENABLE_CAP, &cap), Ok(0));
    for (gpa, pages) in [(0x1001, 1), (0x1000, 0)] {
        assert_eq!(ask(gpa, pages), KVM_EXIT_IO);
        assert_eq!(rax(), errno(KVM_EINVAL));
    }
    assert_eq!(ask(0x1000, 2), KVM_EXIT_HYPERCALL);
    let at = offset_of!(kvm_run, __bindgen_anon_1);
    let [nr, a, b, c]: [u64; 4] = [0, 8, 16, 24].map(|n| g.v.page().read(at + n));
    assert_eq!(
        (nr, a, b, c),
        (KVM_HC_MAP_GPA_RANGE.into(), 0x1000, 2, 1 << 4)
    );
    // `hypercall.ret`
    g.v.page().write(at + 56, 7u64);
    assert_eq!(g.v.call(KVM_RUN, 0), Ok(0));
    assert_eq!((g.exit(), rax()), (KVM_EXIT_IO, 7));
    assert_eq!(g.v.f.vm.kind(), ObjectKind::Vm);
}
