//! A VM with RAM, pages of device memory and a read-only slot beside each other, and one vCPU whose
//! exits are read from its run page.

use anykvm::bindings::{
    KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_MMIO, KVM_MEM_READONLY, Msrs, Plain,
    kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use anykvm::{Errno, Kvm, Translation, TranslationMode, VcpuFd, VmFd};
use anykvm_cpu::memory::mapping::Mapping;

use crate::cases::Bits;

/// RAM is from 0 to here.
pub const RAM: usize = 0x2_0000;
/// The instruction.
pub const CODE: u64 = 0x8000;
/// Where a VMM sends a guest whose operation it drops.
pub const ELSEWHERE: u64 = 0x9000;
/// Where branches lead.
pub const TARGET: u64 = 0xa000;
/// The stack pointer at the start.
pub const STACK: u64 = 0xc800;
/// Data.
pub const DATA: u64 = 0xd000;
pub const GDT: u64 = 0x500;
pub const IDT: u64 = 0x5000;

/// Linear addresses of 64-bit guests: a page of RAM before each of these, and one behind.
/// A page of device memory between two of RAM.
pub const M: u64 = 0x10_0000;
/// RAM behind `M`, then a page of device memory, then one elsewhere in device memory.
pub const N: u64 = 0x10_2000;
/// A read-only slot, then RAM.
pub const R: u64 = 0x10_4000;
/// Guest-physical addresses: of `M`,
pub const GM: u64 = 0xd000_0000;
/// of `N`,
pub const GN: u64 = 0xd000_5000;
/// of the page behind `N`,
pub const GO: u64 = 0xe000_0000;
/// and of `R`.
pub const GR: u64 = 0x30_0000;
/// RAM behind the page before `M`, between `M` and `N`, and behind `R`.
pub const BEFORE_M: u64 = 0x1_0000;
pub const BEHIND_M: u64 = 0x1_1000;
pub const BEHIND_R: u64 = 0x1_2000;

const PML4: u64 = 0x1000;
/// The last-level page table.
const TABLE: u64 = 0x4000;

/// An exit as the run page describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Read {
        gpa: u64,
        len: usize,
    },
    Write {
        gpa: u64,
        data: Vec<u8>,
    },
    In {
        port: u16,
        size: u8,
        count: u32,
    },
    Out {
        port: u16,
        size: u8,
        data: Vec<u8>,
    },
    Halt,
    /// KVM_RUN failed.
    Failed(i32),
    /// Any other reason.
    Other(u32),
}

pub struct Machine {
    pub vm: VmFd,
    pub vcpu: VcpuFd,
    pub ram: Mapping,
    pub rom: Mapping,
    page: Mapping,
    kvm: Kvm,
}

impl Machine {
    /// Memory of zeroes, and a vCPU as it is after its creation.
    pub fn empty(mode: TranslationMode) -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let how = Translation {
            mode,
            cache: Translation::MIN_CACHE,
            ..Translation::default()
        };
        vm.set_translation(how).unwrap();
        let ram = Mapping::anonymous(RAM).unwrap();
        let rom = Mapping::anonymous(0x1000).unwrap();
        for (slot, flags, at, memory) in [(0, 0, 0, &ram), (1, KVM_MEM_READONLY, GR, &rom)] {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: at,
                memory_size: memory.len() as u64,
                userspace_addr: memory.address(),
            };
            // SAFETY: mappings of the test's own, touched through raw pointers only.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        let vcpu = vm.create_vcpu(0).unwrap();
        let page = Mapping::new(vcpu.vcpu().fd(), 0, 12288).unwrap();
        Self {
            vm,
            vcpu,
            ram,
            rom,
            page,
            kvm,
        }
    }

    /// At the beginning of [`CODE`], in this mode.
    pub fn new(mode: TranslationMode, bits: Bits) -> Self {
        let machine = Self::empty(mode);
        let cpuid = machine.kvm.get_supported_cpuid(256).unwrap();
        machine.vcpu.set_cpuid2(&cpuid).unwrap();
        machine.tables();
        let mut sregs = machine.vcpu.get_sregs().unwrap();
        match bits {
            Bits::Real => real(&mut sregs),
            Bits::Protected => protected(&mut sregs),
            Bits::Long => long(&mut sregs),
        }
        machine.vcpu.set_sregs(&sregs).unwrap();
        if bits == Bits::Long {
            let mut xcrs = machine.vcpu.get_xcrs().unwrap();
            xcrs.nr_xcrs = 1;
            xcrs.xcrs[0].value = 7;
            machine.vcpu.set_xcrs(&xcrs).unwrap();
        }
        let mut xsave = machine.vcpu.get_xsave().unwrap();
        // FCW.
        xsave.region[0] = 0x37f;
        // XMM0-15, the upper halves of YMM0-15: all different; XSTATE_BV.
        for i in 0..64 {
            xsave.region[40 + i] = 0x1000_0000 + i as u32;
            if bits == Bits::Long {
                xsave.region[144 + i] = 0x2000_0000 + i as u32;
            }
        }
        xsave.region[128] = if bits == Bits::Long { 7 } else { 3 };
        machine.vcpu.set_xsave(&xsave).unwrap();
        machine
    }

    fn tables(&self) {
        let put = |at: u64, value: u64| self.ram.write(at as usize, value);
        put(PML4, 0x2027);
        put(0x2000, 0x3027);
        put(0x3000, TABLE | 0x27);
        for n in 0..0x20 {
            put(TABLE + n * 8, n << 12 | 0x67);
        }
        let pages = [
            (M - 0x1000, BEFORE_M),
            (M, GM),
            (M + 0x1000, BEHIND_M),
            (N, GN),
            (N + 0x1000, GO),
            (R, GR),
            (R + 0x1000, BEHIND_R),
        ];
        for (linear, gpa) in pages {
            put(TABLE + (linear >> 12) * 8, gpa | 0x67);
        }
        // Code, data, and the same for 32 bits; a TSS.
        put(GDT + 8, 0x00af_9b00_0000_ffff);
        put(GDT + 16, 0x00cf_9300_0000_ffff);
        put(GDT + 24, 0x00cf_9b00_0000_ffff);
    }

    pub fn regs(&self) -> [u64; 18] {
        let regs = self.vcpu.get_regs().unwrap();
        let mut words = [0; 18];
        words.as_bytes_mut().copy_from_slice(regs.as_bytes());
        words
    }

    pub fn set_regs(&self, words: &[u64; 18]) {
        let mut regs = kvm_regs::default();
        regs.as_bytes_mut().copy_from_slice(words.as_bytes());
        self.vcpu.set_regs(&regs).unwrap();
    }

    pub fn xsave(&self) -> Vec<u8> {
        let xsave = self.vcpu.get_xsave().unwrap();
        xsave.region.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    pub fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM];
        self.ram.read_bytes(0, &mut bytes);
        bytes
    }

    /// All there is of the guest, in a new VM.
    pub fn moved(&self, mode: TranslationMode) -> Self {
        let new = Self::empty(mode);
        new.ram.write_bytes(0, &self.memory());
        let mut rom = vec![0; 0x1000];
        self.rom.read_bytes(0, &mut rom);
        new.rom.write_bytes(0, &rom);
        let (from, to) = (&self.vcpu, &new.vcpu);
        to.set_cpuid2(&from.get_cpuid2(256).unwrap()).unwrap();
        to.set_sregs2(&from.get_sregs2().unwrap()).unwrap();
        to.set_regs(&from.get_regs().unwrap()).unwrap();
        to.set_xcrs(&from.get_xcrs().unwrap()).unwrap();
        to.set_xsave(&from.get_xsave().unwrap()).unwrap();
        to.set_debug_regs(&from.get_debug_regs().unwrap()).unwrap();
        for index in self.kvm.get_msr_index_list().unwrap().as_slice() {
            let entry = kvm_msr_entry {
                index: *index,
                ..Default::default()
            };
            let mut msrs = Msrs::from_entries(&[entry]).unwrap();
            if from.get_msrs(&mut msrs).unwrap() == 1 {
                // Some are read-only, or the VM's own.
                let _ = to.set_msrs(&msrs);
            }
        }
        to.set_mp_state(from.get_mp_state().unwrap()).unwrap();
        to.set_vcpu_events(&from.get_vcpu_events().unwrap())
            .unwrap();
        new
    }

    /// KVM_RUN.
    pub fn run(&self) -> Event {
        match self.vcpu.vcpu().run() {
            Ok(()) => self.event(),
            Err(e) => Event::Failed(e.errno()),
        }
    }

    pub fn set_immediate_exit(&self, on: bool) {
        self.page.write(1, u8::from(on));
    }

    /// `struct kvm_run` behind the fixed part.
    fn event(&self) -> Event {
        let p = &self.page;
        match p.read::<u32>(8) {
            KVM_EXIT_MMIO => {
                let (gpa, len) = (p.read(32), p.read::<u32>(48) as usize);
                if p.read::<u8>(52) == 0 {
                    return Event::Read { gpa, len };
                }
                let mut data = vec![0; len];
                p.read_bytes(40, &mut data);
                Event::Write { gpa, data }
            }
            KVM_EXIT_IO => {
                let (size, port, count) = (p.read::<u8>(33), p.read::<u16>(34), p.read::<u32>(36));
                if u32::from(p.read::<u8>(32)) == KVM_EXIT_IO_IN {
                    return Event::In { port, size, count };
                }
                let mut data = vec![0; usize::from(size) * count as usize];
                p.read_bytes(p.read::<u64>(40) as usize, &mut data);
                Event::Out { port, size, data }
            }
            KVM_EXIT_HLT => Event::Halt,
            reason => Event::Other(reason),
        }
    }

    /// Answers the last exit.
    pub fn answer(&self, event: &Event, data: &[u8]) {
        match event {
            Event::Read { .. } => self.page.write_bytes(40, data),
            Event::In { .. } => self
                .page
                .write_bytes(self.page.read::<u64>(40) as usize, data),
            _ => {}
        }
    }

    /// A word of the exit's union.
    pub fn exit_word(&self, n: usize) -> u64 {
        self.page.read(32 + 8 * n)
    }

    /// Whether KVM_RUN ended by a signal or `immediate_exit`.
    pub fn interrupted(event: &Event) -> bool {
        *event == Event::Failed(Errno::EINTR.errno())
    }
}

fn segment(selector: u16, type_: u8, l: u8, db: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        l,
        db,
        g: 1,
        ..Default::default()
    }
}

fn data_segments(sregs: &mut kvm_sregs) -> [&mut kvm_segment; 5] {
    [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.ss,
        &mut sregs.fs,
        &mut sregs.gs,
    ]
}

fn tables(sregs: &mut kvm_sregs) {
    let table = |base, limit| kvm_dtable {
        base,
        limit,
        ..Default::default()
    };
    sregs.gdt = table(GDT, 0x1f);
    sregs.idt = table(IDT, 0xfff);
    // OSFXSR, OSXMMEXCPT.
    sregs.cr4 = 0x600;
}

fn long(sregs: &mut kvm_sregs) {
    tables(sregs);
    sregs.cs = segment(8, 11, 1, 0);
    for s in data_segments(sregs) {
        *s = segment(16, 3, 0, 1);
    }
    sregs.cr0 = 0x8005_0033;
    sregs.cr3 = PML4;
    // PAE, OSXSAVE.
    sregs.cr4 |= 0x4_0020;
    sregs.efer = 0x500;
}

/// 32 bits without paging. FS begins a page before `GM`.
fn protected(sregs: &mut kvm_sregs) {
    tables(sregs);
    sregs.cs = segment(24, 11, 0, 1);
    for s in data_segments(sregs) {
        *s = segment(16, 3, 0, 1);
    }
    sregs.fs.base = GM - 0x1000;
    sregs.cr0 = 0x33;
}

/// DS begins where there is no RAM.
fn real(sregs: &mut kvm_sregs) {
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    sregs.ds.base = 0xa_0000;
    sregs.ds.selector = 0xa000;
    // SS at the end of RAM.
    sregs.ss.base = 0x1_1000;
    sregs.ss.selector = 0x1100;
}
