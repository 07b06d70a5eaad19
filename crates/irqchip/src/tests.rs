//! A VM of local APICs with a clock that stands still, for the tests of all modules.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::sync::lock;
use crate::{ChipMode, CpuFeatures, IrqChip, Lapic, LapicConfig, VcpuEvents, VmEvents};

/// What a vCPU was told, besides [`VcpuEvents::notify`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Nmi,
    Smi,
    Init,
    Sipi(u8),
    Unhalt,
    IoapicEoi(u8),
}

/// Nanoseconds; starts well above zero.
#[derive(Debug)]
pub(crate) struct Clock(AtomicU64);

impl Clock {
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
    pub fn advance(&self, ns: u64) -> u64 {
        self.0.fetch_add(ns, Ordering::Relaxed) + ns
    }
}

/// The guest TSC runs at 2 GHz from time zero.
pub(crate) const TSC_PER_NS: u64 = 2;

pub(crate) struct TestVcpu {
    clock: Arc<Clock>,
    pub events: Mutex<Vec<Event>>,
    pub notified: AtomicU64,
    pub armed: Mutex<Option<u64>>,
    /// Called once, at the next [`VcpuEvents::notify`].
    pub at_once: Mutex<Option<AtOnce>>,
}

/// What a vCPU does as soon as it is notified.
pub(crate) type AtOnce = Box<dyn FnOnce() + Send>;

impl TestVcpu {
    fn push(&self, event: Event) {
        lock(&self.events).push(event);
    }
}

impl VcpuEvents for TestVcpu {
    fn notify(&self) {
        self.notified.fetch_add(1, Ordering::Relaxed);
        let at_once = lock(&self.at_once).take();
        if let Some(at_once) = at_once {
            at_once();
        }
    }
    fn nmi(&self) {
        self.push(Event::Nmi);
    }
    fn smi(&self) {
        self.push(Event::Smi);
    }
    fn init(&self) {
        self.push(Event::Init);
    }
    fn sipi(&self, vector: u8) {
        self.push(Event::Sipi(vector));
    }
    fn pv_unhalt(&self) {
        self.push(Event::Unhalt);
    }
    fn ioapic_eoi(&self, vector: u8) {
        self.push(Event::IoapicEoi(vector));
    }
    fn timer_armed(&self, deadline: Option<u64>) {
        *lock(&self.armed) = deadline;
    }
    fn now_ns(&self) -> u64 {
        self.clock.now()
    }
    fn tsc_to_ns(&self, guest_tsc: u64) -> u64 {
        guest_tsc / TSC_PER_NS
    }
}

pub(crate) struct TestVmEvents {
    clock: Arc<Clock>,
    pub armed: Mutex<Option<u64>>,
    pub acked: Mutex<Vec<u32>>,
}

impl VmEvents for TestVmEvents {
    fn now_ns(&self) -> u64 {
        self.clock.now()
    }
    fn timer_armed(&self, deadline: Option<u64>) {
        *lock(&self.armed) = deadline;
    }
    fn gsi_acked(&self, gsi: u32) {
        lock(&self.acked).push(gsi);
    }
}

pub(crate) struct TestVm {
    pub clock: Arc<Clock>,
    pub chip: Arc<IrqChip>,
    pub events: Arc<TestVmEvents>,
    pub vcpus: Vec<Arc<TestVcpu>>,
    pub lapics: Vec<Arc<Lapic>>,
}

impl TestVm {
    /// APICs 0..count, the first the bootstrap processor, software-enabled with 255 as the spurious
    /// vector.
    pub fn new(count: u32) -> Self {
        Self::with_mode(ChipMode::Full, &(0..count).collect::<Vec<_>>())
    }

    pub fn with_mode(mode: ChipMode, ids: &[u32]) -> Self {
        let clock = Arc::new(Clock(AtomicU64::new(1_000_000_000)));
        let events = Arc::new(TestVmEvents {
            clock: clock.clone(),
            armed: Mutex::default(),
            acked: Mutex::default(),
        });
        let chip = IrqChip::new(mode, events.clone());
        let mut vm = Self {
            clock,
            chip,
            events,
            vcpus: Vec::new(),
            lapics: Vec::new(),
        };
        for &apic_id in ids {
            let vcpu = Arc::new(TestVcpu {
                clock: vm.clock.clone(),
                events: Mutex::default(),
                notified: AtomicU64::new(0),
                armed: Mutex::default(),
                at_once: Mutex::default(),
            });
            let config = LapicConfig {
                apic_id,
                bsp: apic_id == 0,
            };
            let lapic = vm.chip.create_lapic(config, vcpu.clone());
            lapic.set_features(CpuFeatures {
                x2apic: true,
                tsc_deadline: true,
                maxphyaddr: 46,
                intel_compatible: true,
            });
            lapic.mmio_write(0xf0, &0x1ffu32.to_le_bytes());
            vm.vcpus.push(vcpu);
            vm.lapics.push(lapic);
        }
        vm
    }

    pub fn write(&self, index: usize, offset: u32, value: u32) {
        assert!(self.lapics[index].mmio_write(offset, &value.to_le_bytes()));
    }

    pub fn read(&self, index: usize, offset: u32) -> u32 {
        let mut bytes = [0; 4];
        assert!(self.lapics[index].mmio_read(offset, &mut bytes));
        u32::from_le_bytes(bytes)
    }

    /// Puts all APICs into x2APIC mode.
    pub fn enter_x2apic(&self) {
        for lapic in &self.lapics {
            lapic.set_base(lapic.base() | 0xc00, false).unwrap();
        }
    }

    /// What the vCPU was told since the last call.
    pub fn take_events(&self, index: usize) -> Vec<Event> {
        std::mem::take(&mut lock(&self.vcpus[index].events))
    }

    /// Takes and ends every interrupt the vCPU can take, in order.
    pub fn drain(&self, index: usize) -> Vec<u8> {
        let lapic = &self.lapics[index];
        let mut taken = Vec::new();
        while let Some(vector) = lapic.has_interrupt() {
            lapic.ack(vector);
            lapic.eoi();
            taken.push(vector);
        }
        taken
    }

    pub fn ioapic_write(&self, register: u32, value: u32) {
        assert!(self.chip.mmio_write(0xfec0_0000, &register.to_le_bytes()));
        assert!(self.chip.mmio_write(0xfec0_0010, &value.to_le_bytes()));
    }

    pub fn ioapic_read(&self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        assert!(self.chip.mmio_write(0xfec0_0000, &register.to_le_bytes()));
        assert!(self.chip.mmio_read(0xfec0_0010, &mut bytes));
        u32::from_le_bytes(bytes)
    }

    /// Programs an I/O APIC entry; the low half last, which may unmask it.
    pub fn redirect(&self, pin: u32, entry: u64) {
        self.ioapic_write(0x11 + 2 * pin, (entry >> 32) as u32);
        self.ioapic_write(0x10 + 2 * pin, entry as u32);
    }

    pub fn outb(&self, port: u16, value: u8) {
        assert!(self.chip.pio_write(port, &[value]));
    }
}
