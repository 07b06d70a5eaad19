//! What the interrupt controllers' state shows, field by field: KVM_GET_LAPIC, KVM_GET_IRQCHIP, KVM_GET_PIT2.

use std::mem::offset_of;

use anykvm::Errno;
use anykvm_abi::ioctl::*;
use anykvm_abi::*;
use anykvm_cpu::memory::mapping::Mapping;

use crate::support::*;
use crate::vcpu::VcpuFixture;

/// Offsets of the local APIC's registers.
mod lapic {
    pub const ID: usize = 0x20;
    pub const PPR: usize = 0xa0;
    pub const LDR: usize = 0xd0;
    pub const SVR: usize = 0xf0;
    pub const ISR: usize = 0x100;
    pub const TMR: usize = 0x180;
    pub const IRR: usize = 0x200;
    pub const LVT_TIMER: usize = 0x320;
    pub const INITIAL_COUNT: usize = 0x380;
    pub const CURRENT_COUNT: usize = 0x390;
    pub const DIVIDE: usize = 0x3e0;
}

const VECTOR: u32 = 0x45;
/// Where its bit is in ISR, TMR and IRR.
const WORD: usize = 0x20;
const BIT: u32 = 1 << 5;

fn register(state: &kvm_lapic_state, at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| state.regs[at + i] as u8))
}

fn with_register(mut state: kvm_lapic_state, at: usize, value: u32) -> kvm_lapic_state {
    for (i, byte) in value.to_le_bytes().iter().enumerate() {
        state.regs[at + i] = *byte as _;
    }
    state
}

fn read(v: &VcpuFixture, at: usize) -> u32 {
    register(&v.get(KVM_GET_LAPIC), at)
}

fn write(v: &VcpuFixture, at: usize, value: u32) -> Result<i32, Errno> {
    v.set(
        KVM_SET_LAPIC,
        &with_register(v.get(KVM_GET_LAPIC), at, value),
    )
}

fn msi(v: &VcpuFixture, data: u32) {
    let msi = kvm_msi {
        address_lo: 0xfee0_0000,
        data,
        ..Default::default()
    };
    assert_eq!(v.f.vm_with(KVM_SIGNAL_MSI, &msi), Ok(1));
}

/// A vCPU with its local APIC on, in real mode in front of this code.
fn vcpu(f: Fixture, code: &[u8]) -> (VcpuFixture, Mapping) {
    let ram = ram(2);
    let region = kvm_userspace_memory_region {
        memory_size: 0x2000,
        userspace_addr: ram.address(),
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_SET_USER_MEMORY_REGION, &region), Ok(0));
    ram.write_bytes(0x1000, code);
    let v = VcpuFixture::of(f);
    let mut sregs: kvm_sregs = v.get(KVM_GET_SREGS);
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    assert_eq!(v.set(KVM_SET_SREGS, &sregs), Ok(0));
    let regs = kvm_regs {
        rip: 0x1000,
        rsp: 0x800,
        rflags: 2,
        ..Default::default()
    };
    assert_eq!(v.set(KVM_SET_REGS, &regs), Ok(0));
    assert_eq!(write(&v, lapic::SVR, 0x1ff), Ok(0));
    (v, ram)
}

fn runs_to_a_port(v: &VcpuFixture) {
    assert_eq!(v.call(KVM_RUN, 0), Ok(0));
    let reason: u32 = v.page().read(offset_of!(kvm_run, exit_reason));
    assert_eq!(reason, KVM_EXIT_IO);
}

#[test]
pub fn requested_and_in_service() {
    // sti; nop; jmp to itself; the handler: out 0x10, al
    let code = [0xfb, 0x90, 0xeb, 0xfe, 0xe6, 0x10];
    for level in [0, 1 << 15 | 1 << 14] {
        let (v, ram) = vcpu(Fixture::with_irqchip(), &code);
        ram.write(VECTOR as usize * 4, 0x1004u32);
        let bits = || {
            let state: kvm_lapic_state = v.get(KVM_GET_LAPIC);
            [lapic::IRR, lapic::ISR, lapic::TMR].map(|at| register(&state, at + WORD))
        };
        let trigger = if level == 0 { 0 } else { BIT };
        assert_eq!(bits(), [0, 0, 0]);
        msi(&v, VECTOR | level);
        assert_eq!(bits(), [BIT, 0, trigger]);
        runs_to_a_port(&v);
        assert_eq!(bits(), [0, BIT, trigger]);
        assert_eq!(read(&v, lapic::PPR), VECTOR & 0xf0);
        // One more while it is served.
        msi(&v, VECTOR | level);
        assert_eq!(bits(), [BIT, BIT, trigger]);
    }
}

#[test]
pub fn the_id_in_both_modes() {
    const X2APIC: u64 = 1 << 10;
    for api in [0, KVM_X2APIC_API_USE_32BIT_IDS] {
        let f = Fixture::with_irqchip();
        if api != 0 {
            let cap = kvm_enable_cap {
                cap: KVM_CAP_X2APIC_API,
                args: [api.into(), 0, 0, 0],
                ..Default::default()
            };
            assert_eq!(f.vm_with(KVM_ENABLE_CAP, &cap), Ok(0));
        }
        let v = VcpuFixture {
            vcpu: f.vcpu(35).unwrap(),
            f,
        };
        let has_x2apic = kvm_cpuid_entry2 {
            function: 1,
            ecx: 1 << 21,
            ..Default::default()
        };
        assert_eq!(v.list(KVM_SET_CPUID2, &[has_x2apic]).0, Ok(0));
        assert_eq!(read(&v, lapic::ID), 35 << 24);
        let mut sregs: kvm_sregs = v.get(KVM_GET_SREGS);
        sregs.apic_base |= X2APIC;
        assert_eq!(v.set(KVM_SET_SREGS, &sregs), Ok(0));
        let shown = if api == 0 { 35 << 24 } else { 35 };
        assert_eq!(read(&v, lapic::ID), shown);
        assert_eq!(read(&v, lapic::LDR), 2 << 16 | 1 << 3);
        // The logical id follows from the id whatever is written.
        assert_eq!(write(&v, lapic::LDR, 0x55), Ok(0));
        assert_eq!(read(&v, lapic::LDR), 2 << 16 | 1 << 3);
        if api != 0 {
            assert_eq!(write(&v, lapic::ID, 36), Err(Errno::EINVAL));
            assert_eq!(write(&v, lapic::ID, 35 << 24), Err(Errno::EINVAL));
        }
        assert_eq!(write(&v, lapic::ID, shown), Ok(0));
        assert_eq!(read(&v, lapic::ID), shown);
    }
}

#[test]
pub fn the_current_count() {
    let (v, _ram) = vcpu(Fixture::with_irqchip(), &[0xf4]);
    assert_eq!(read(&v, lapic::CURRENT_COUNT), 0);
    let start = |lvt: u32| {
        let mut state: kvm_lapic_state = v.get(KVM_GET_LAPIC);
        for (at, value) in [
            (lapic::LVT_TIMER, lvt),
            // Divided by 128.
            (lapic::DIVIDE, 0xa),
            (lapic::INITIAL_COUNT, 0x4000_0000),
            (lapic::CURRENT_COUNT, 0x3000_0000),
        ] {
            state = with_register(state, at, value);
        }
        assert_eq!(v.set(KVM_SET_LAPIC, &state), Ok(0));
    };
    const PERIODIC: u32 = 1 << 17;
    for mode in [0, PERIODIC] {
        start(mode | 1 << 16 | VECTOR);
        let first = read(&v, lapic::CURRENT_COUNT);
        assert!((0x2000_0000..=0x3000_0000).contains(&first), "{first:#x}");
        std::thread::sleep(std::time::Duration::from_millis(2));
        let later = read(&v, lapic::CURRENT_COUNT);
        assert!(later < first && later > 0x1000_0000, "{later:#x}");
        assert_eq!(read(&v, lapic::INITIAL_COUNT), 0x4000_0000);
    }
}

/// KVM_GET_IRQCHIP: the structure behind chip id and padding.
fn chip<T: Plain>(f: &Fixture, id: u32) -> T {
    let mut chip = [0u64; 65];
    chip[0] = id.into();
    let at = f.user.at(&chip);
    assert_eq!(f.vm(KVM_GET_IRQCHIP, at), Ok(0));
    f.user.value(at + 8)
}

fn line(f: &Fixture, irq: u32, level: u32) {
    assert_eq!(f.vm_with(KVM_IRQ_LINE, &[irq, level]), Ok(0));
}

/// KVM_SET_IRQCHIP with the state as it is but for this.
fn set_chip(f: &Fixture, id: u32, change: impl FnOnce(&mut [u8])) {
    let state: [u64; 64] = chip(f, id);
    let mut bytes = [0u8; 520];
    bytes[0] = id as u8;
    bytes[8..].copy_from_slice(state.as_bytes());
    change(&mut bytes[8..]);
    let at = f.user.at(&<[u64; 65]>::from_bytes(&bytes).unwrap());
    assert_eq!(f.vm(KVM_SET_IRQCHIP, at), Ok(0));
}

#[test]
pub fn pic_lines() {
    let f = Fixture::with_irqchip();
    let master = || {
        let state: kvm_pic_state = chip(&f, 0);
        (state.irr, state.last_irr, state.isr)
    };
    for (id, mask) in [(0, 0xf8), (1, 0xde)] {
        assert_eq!(chip::<kvm_pic_state>(&f, id).elcr_mask, mask);
    }
    assert_eq!(master(), (0, 0, 0));
    // An edge stays requested when the line has gone down.
    line(&f, 5, 1);
    assert_eq!(master(), (1 << 5, 1 << 5, 0));
    line(&f, 5, 0);
    assert_eq!(master(), (1 << 5, 0, 0));
    // A level does not.
    set_chip(&f, 0, |state| {
        state[offset_of!(kvm_pic_state, irr)] = 0;
        state[offset_of!(kvm_pic_state, elcr)] = 1 << 6;
    });
    line(&f, 6, 1);
    assert_eq!(master(), (1 << 6, 1 << 6, 0));
    line(&f, 6, 0);
    assert_eq!(master(), (0, 0, 0));
    // The second one's request is the first one's line 2.
    line(&f, 12, 1);
    let slave: kvm_pic_state = chip(&f, 1);
    assert_eq!((slave.irr, slave.last_irr), (1 << 4, 1 << 4));
}

#[test]
pub fn ioapic_pins() {
    const LEVEL: u64 = 1 << 15;
    const REMOTE_IRR: u64 = 1 << 14;
    const MASKED: u64 = 1 << 16;
    let (v, _ram) = vcpu(Fixture::with_irqchip(), &[0xf4]);
    let f = &v.f;
    let table = offset_of!(kvm_ioapic_state, redirtbl);
    let redirect = |pin: usize, entry: u64| {
        set_chip(f, 2, |state| {
            let at = table + pin * 8;
            state[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        });
    };
    let pin = |pin: usize| {
        let words: [u64; 64] = chip(f, 2);
        let bytes = words.as_bytes();
        let at = table + pin * 8;
        let irr = u32::from_bytes(&bytes[offset_of!(kvm_ioapic_state, irr)..][..4]).unwrap();
        let entry = u64::from_bytes(&bytes[at..at + 8]).unwrap();
        (irr >> pin & 1, entry)
    };
    let vector = u64::from(VECTOR);
    // Masked: up and waiting.
    redirect(10, LEVEL | MASKED | vector);
    line(f, 10, 1);
    assert_eq!(pin(10), (1, LEVEL | MASKED | vector));
    line(f, 10, 0);
    assert_eq!(pin(10), (0, LEVEL | MASKED | vector));
    // A level: sent once, and waiting for its EOI also when the line has gone down.
    redirect(10, LEVEL | vector);
    line(f, 10, 1);
    assert_eq!(pin(10), (1, LEVEL | REMOTE_IRR | vector));
    assert_eq!(read(&v, lapic::IRR + WORD), BIT);
    line(f, 10, 0);
    assert_eq!(pin(10), (0, LEVEL | REMOTE_IRR | vector));
    // An edge that has been delivered is none that waits.
    redirect(11, vector + 1);
    line(f, 11, 1);
    assert_eq!(pin(11), (0, vector + 1));
    assert_eq!(read(&v, lapic::IRR + WORD), BIT | BIT << 1);
}

#[test]
pub fn pit_channels() {
    let f = Fixture::with_irqchip();
    assert_eq!(f.vm_get::<kvm_pit_state2>(KVM_GET_PIT2), Err(Errno::ENXIO));
    assert_eq!(
        f.vm_with(KVM_CREATE_PIT2, &kvm_pit_config::default()),
        Ok(0)
    );
    let mut state: kvm_pit_state2 = f.vm_get(KVM_GET_PIT2).unwrap();
    assert_eq!(state.flags, 0);
    for (channel, gate) in state.channels.iter().zip([1, 1, 0]) {
        assert_eq!(
            (channel.count, channel.mode, channel.gate),
            (0x1_0000, 0xff, gate)
        );
    }
    (state.channels[0].mode, state.channels[0].count) = (2, 0);
    (state.channels[1].mode, state.channels[1].count) = (3, 0x1234);
    (
        state.channels[2].latched_count,
        state.channels[2].count_latched,
    ) = (0x77, 3);
    state.channels[2].rw_mode = 3;
    state.flags = KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    assert_eq!(f.vm_with(KVM_SET_PIT2, &state), Ok(0));
    let after: kvm_pit_state2 = f.vm_get(KVM_GET_PIT2).unwrap();
    assert_eq!(after.flags, KVM_PIT_FLAGS_SPEAKER_DATA_ON);
    let [a, b, c] = after.channels;
    // 0 is the largest count.
    assert_eq!((a.mode, a.count), (2, 0x1_0000));
    assert_eq!((b.mode, b.count), (3, 0x1234));
    assert_eq!((c.latched_count, c.count_latched, c.rw_mode), (0x77, 3, 3));
    assert!(b.count_load_time > 0 && c.count_load_time >= b.count_load_time);
}
