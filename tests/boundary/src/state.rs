//! Everything a VMM can read of a VM and write into another: what migration and snapshots carry.

use crate::machine::{Chip, Machine};
use crate::ram::PAGE;
use anyhow::{Context, Result, ensure};
use anykvm::bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_VCPUEVENT_VALID_PAYLOAD, Msrs, Plain, kvm_clock_data, kvm_debugregs, kvm_fpu, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs2,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use anykvm::{Kvm, VcpuFd, VmFd};
use std::ops::Range;
use std::sync::OnceLock;

/// IA32_TSC_DEADLINE, which needs the APIC timer's mode first.
const TSC_DEADLINE: u32 = 0x6e0;

/// The MSRs with the addresses of [`State::written_by_kvm`].
const WRITTEN: [(u32, usize); 3] = [(0x4b56_4d00, 12), (0x4b56_4d01, 32), (0x4b56_4d03, 64)];

/// One vCPU's state.
pub struct SavedVcpu {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs2,
    fpu: kvm_fpu,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    msrs: Vec<kvm_msr_entry>,
    debugregs: kvm_debugregs,
    events: kvm_vcpu_events,
    lapic: Option<kvm_lapic_state>,
    cpuid: CpuId,
    tsc_khz: u32,
    tsc_offset: u64,
}

/// A VM's state without its memory.
pub struct State {
    vcpus: Vec<SavedVcpu>,
    irqchips: Vec<kvm_irqchip>,
    pit: Option<kvm_pit_state2>,
    clock: kvm_clock_data,
}

/// A VM's state.
pub struct Saved {
    state: State,
    /// The pages that are not all zero.
    memory: Vec<(usize, Box<[u8; PAGE]>)>,
}

fn msr_indices() -> &'static [u32] {
    static LIST: OnceLock<Vec<u32>> = OnceLock::new();
    LIST.get_or_init(|| {
        let list = Kvm::new().and_then(|kvm| kvm.get_msr_index_list());
        list.map(|l| l.as_slice().to_vec()).unwrap_or_default()
    })
}

/// The events without what is left of those that are over. Without the payload capability an exception that
/// is pending is injected, too, and the first does not count.
fn meaning(mut events: kvm_vcpu_events) -> kvm_vcpu_events {
    if events.flags & KVM_VCPUEVENT_VALID_PAYLOAD == 0 {
        events.exception.pending = 0;
    }
    if events.exception.injected | events.exception.pending == 0 {
        events.exception = Default::default();
    }
    if events.exception_has_payload & events.exception.pending == 0 {
        events.exception_has_payload = 0;
        events.exception_payload = 0;
    }
    if events.exception.has_error_code == 0 {
        events.exception.error_code = 0;
    }
    if events.interrupt.injected == 0 {
        events.interrupt.nr = 0;
    }
    events
}

impl SavedVcpu {
    fn read(vcpu: &VcpuFd, lapic: bool) -> Result<Self> {
        // First, as it may start a processor that has received its SIPI.
        let mp_state = vcpu.get_mp_state()?;
        let entries: Vec<_> = msr_indices()
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries).context("MSRs")?;
        let read = vcpu.get_msrs(&mut msrs)?;
        ensure!(
            read == entries.len(),
            "MSR {:#x} is in the index list and cannot be read",
            entries[read].index
        );
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs()?,
            sregs: vcpu.get_sregs2()?,
            fpu: vcpu.get_fpu()?,
            xsave: vcpu.get_xsave()?,
            xcrs: vcpu.get_xcrs()?,
            msrs: msrs.as_slice().to_vec(),
            debugregs: vcpu.get_debug_regs()?,
            events: meaning(vcpu.get_vcpu_events()?),
            lapic: lapic.then(|| vcpu.get_lapic()).transpose()?,
            cpuid: vcpu.get_cpuid2(256)?,
            tsc_khz: vcpu.get_tsc_khz()?,
            tsc_offset: vcpu.vcpu().tsc_offset(),
        })
    }

    fn write(&self, vcpu: &VcpuFd) -> Result<()> {
        vcpu.set_cpuid2(&self.cpuid).context("CPUID2")?;
        vcpu.set_tsc_khz(self.tsc_khz).context("TSC_KHZ")?;
        vcpu.set_regs(&self.regs).context("REGS")?;
        vcpu.set_xcrs(&self.xcrs).context("XCRS")?;
        vcpu.set_xsave(&self.xsave).context("XSAVE")?;
        vcpu.set_sregs2(&self.sregs)
            .with_context(|| format!("SREGS2: {:x?}", self.sregs))?;
        self.write_msrs(vcpu, |index| index != TSC_DEADLINE)?;
        vcpu.vcpu()
            .set_tsc_offset(self.tsc_offset)
            .context("TSC offset")?;
        vcpu.set_mp_state(self.mp_state).context("MP_STATE")?;
        if let Some(lapic) = &self.lapic {
            vcpu.set_lapic(lapic).context("LAPIC")?;
        }
        self.write_msrs(vcpu, |index| index == TSC_DEADLINE)?;
        vcpu.set_debug_regs(&self.debugregs).context("DEBUGREGS")?;
        vcpu.set_vcpu_events(&self.events).context("VCPU_EVENTS")
    }

    fn write_msrs(&self, vcpu: &VcpuFd, wanted: impl Fn(u32) -> bool) -> Result<()> {
        let chosen: Vec<_> = self
            .msrs
            .iter()
            .filter(|e| wanted(e.index))
            .copied()
            .collect();
        let msrs = Msrs::from_entries(&chosen).context("MSRs")?;
        let written = vcpu.set_msrs(&msrs)?;
        ensure!(
            written == chosen.len(),
            "MSR {:#x} was read and its value {:#x} is refused",
            chosen[written].index,
            chosen[written].data
        );
        Ok(())
    }

    /// What is different, by name.
    fn difference(&self, other: &Self) -> Option<String> {
        macro_rules! compare {
            ($($field:ident),*) => {
                $(if self.$field.as_bytes() != other.$field.as_bytes() {
                    return Some(format!(
                        "{}:\n  {:x?}\n  {:x?}",
                        stringify!($field), self.$field, other.$field
                    ));
                })*
            };
        }
        compare!(regs, sregs, events, debugregs, mp_state, xcrs, fpu);
        for (a, b) in self.msrs.iter().zip(&other.msrs) {
            if a.data != b.data {
                return Some(format!("MSR {:#x}: {:#x} {:#x}", a.index, a.data, b.data));
            }
        }
        if let Some(n) = differing(self.xsave.region.as_bytes(), other.xsave.region.as_bytes()) {
            let word = |x: &kvm_xsave| x.region[n / 4];
            let (a, b) = (word(&self.xsave), word(&other.xsave));
            return Some(format!("XSAVE at {n:#x}: {a:x?} {b:x?}"));
        }
        if let (Some(a), Some(b)) = (&self.lapic, &other.lapic)
            && let Some(n) = differing(a.as_bytes(), b.as_bytes())
        {
            let word = |s: &kvm_lapic_state| u32::from_bytes(&s.as_bytes()[n & !3..(n & !3) + 4]);
            return Some(format!("LAPIC at {n:#x}: {:x?} {:x?}", word(a), word(b)));
        }
        if self.cpuid.as_slice() != other.cpuid.as_slice() {
            return Some("CPUID".to_owned());
        }
        if (self.tsc_khz, self.tsc_offset) != (other.tsc_khz, other.tsc_offset) {
            return Some("TSC".to_owned());
        }
        None
    }
}

/// Makes those bytes of a page zero that are in one of these ranges. `at`: where the page begins.
pub fn blank(page: &mut [u8; PAGE], at: usize, ranges: &[Range<usize>]) {
    for range in ranges {
        let start = range.start.clamp(at, at + PAGE) - at;
        let end = range.end.clamp(at, at + PAGE) - at;
        page[start..end].fill(0);
    }
}

fn differing(a: &[u8], b: &[u8]) -> Option<usize> {
    if a == b {
        return None;
    }
    a.iter().zip(b).position(|(a, b)| a != b)
}

impl State {
    /// Reads everything.
    pub fn read(vm: &VmFd, vcpus: &[VcpuFd], chip: Chip) -> Result<Self> {
        let vcpus = vcpus
            .iter()
            .map(|vcpu| SavedVcpu::read(vcpu, chip.has_lapic()))
            .collect::<Result<_>>()?;
        let mut irqchips = Vec::new();
        let mut pit = None;
        if chip.is_full() {
            for id in [
                KVM_IRQCHIP_PIC_MASTER,
                KVM_IRQCHIP_PIC_SLAVE,
                KVM_IRQCHIP_IOAPIC,
            ] {
                let mut one = kvm_irqchip {
                    chip_id: id,
                    ..Plain::zeroed()
                };
                vm.get_irqchip(&mut one)?;
                irqchips.push(one);
            }
            pit = Some(vm.get_pit2()?);
        }
        Ok(Self {
            vcpus,
            irqchips,
            pit,
            clock: vm.get_clock()?,
        })
    }

    /// Writes everything into a new VM, whose memory is there already.
    pub fn write(&self, vm: &VmFd, vcpus: &[VcpuFd]) -> Result<()> {
        let mut clock = self.clock;
        clock.flags = 0;
        vm.set_clock(&clock).context("CLOCK")?;
        for chip in &self.irqchips {
            vm.set_irqchip(chip).context("IRQCHIP")?;
        }
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit).context("PIT2")?;
        }
        for (n, (saved, vcpu)) in self.vcpus.iter().zip(vcpus).enumerate() {
            saved
                .write(vcpu)
                .with_context(|| format!("KVM_SET of vCPU {n}"))?;
        }
        Ok(())
    }

    /// Where KVM writes to memory by the clock, and how many bytes: wall clock, clock and stolen time of each
    /// vCPU. Versions and moments in there are those of the VM, only what they mean must not change.
    pub fn written_by_kvm(&self) -> Vec<Range<usize>> {
        let mut ranges = Vec::new();
        for entry in self.vcpus.iter().flat_map(|v| &v.msrs) {
            let known = WRITTEN.iter().find(|(msr, _)| *msr == entry.index);
            if let Some((_, len)) = known
                && entry.data != 0
            {
                let start = entry.data as usize & !3;
                ranges.push(start..start + len);
            }
        }
        ranges
    }

    /// The first thing that is different, readable.
    pub fn difference(&self, other: &Self) -> Option<String> {
        for (n, (a, b)) in self.vcpus.iter().zip(&other.vcpus).enumerate() {
            if let Some(what) = a.difference(b) {
                return Some(format!("vCPU {n}: {what}"));
            }
        }
        for (a, b) in self.irqchips.iter().zip(&other.irqchips) {
            if let Some(at) = differing(a.as_bytes(), b.as_bytes()) {
                let id = a.chip_id;
                let (a, b) = (a.as_bytes()[at], b.as_bytes()[at]);
                return Some(format!("IRQCHIP {id} at {at:#x}: {a:#x} {b:#x}"));
            }
        }
        if let (Some(a), Some(b)) = (&self.pit, &other.pit)
            && a.as_bytes() != b.as_bytes()
        {
            return Some(format!("PIT:\n  {a:x?}\n  {b:x?}"));
        }
        if self.clock.clock != other.clock.clock {
            return Some(format!("CLOCK: {} {}", self.clock.clock, other.clock.clock));
        }
        None
    }
}

impl Saved {
    /// Reads everything.
    pub fn read(machine: &Machine) -> Result<Self> {
        Ok(Self {
            state: State::read(&machine.vm, &machine.vcpus, machine.setup.chip)?,
            memory: machine.ram.pages(),
        })
    }

    /// Writes everything into a new VM.
    pub fn write(&self, machine: &Machine) -> Result<()> {
        for (at, page) in &self.memory {
            machine.ram.write(*at, &**page);
        }
        self.state.write(&machine.vm, &machine.vcpus)
    }

    /// The first thing that is different, readable.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let of_state = self.state.difference(&other.state);
        of_state.or_else(|| self.memory_difference(other))
    }

    /// A vCPU's CR8.
    pub fn cr8(&self, vcpu: usize) -> u64 {
        self.state.vcpus[vcpu].sregs.cr8
    }

    fn memory_difference(&self, other: &Self) -> Option<String> {
        let written = self.state.written_by_kvm();
        let page = |saved: &Self, at| {
            let n = saved.memory.binary_search_by_key(&at, |(at, _)| *at);
            let mut page = n.map_or([0; PAGE], |n| *saved.memory[n].1);
            blank(&mut page, at, &written);
            page
        };
        for (at, _) in self.memory.iter().chain(&other.memory) {
            let (a, b) = (page(self, *at), page(other, *at));
            if let Some(n) = differing(&a, &b) {
                let n = n & !7;
                let word = |p: &[u8; PAGE]| u64::from_bytes(&p[n..n + 8]).unwrap_or_default();
                return Some(format!(
                    "memory at {:#x}: {:#x} {:#x}",
                    at + n,
                    word(&a),
                    word(&b)
                ));
            }
        }
        None
    }
}
