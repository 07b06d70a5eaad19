//! A machine: memory, interrupt controllers, processors in their threads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CLOCK_TSC_STABLE, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY,
    kvm_clock_data, kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::devices::{DeviceState, Devices};
use crate::ioapic;
use crate::vcpu::{Layout, Vcpu};
use crate::{Kind, boot, cpu};

const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;
pub const SLOT: u32 = 0;

pub struct Machine {
    pub kind: Kind,
    pub vm: Arc<VmFd>,
    pub memory: GuestMemoryMmap,
    pub devices: Arc<Devices>,
    pub vcpus: Vec<Vcpu>,
    /// The clock, while it stands.
    pub clock: Option<kvm_clock_data>,
    /// The memory is that of a folder's file but for pages that KVM says were written.
    pub mapped: bool,
}

/// What is there before processors run.
pub struct Parts {
    pub kvm: Kvm,
    pub vm: Arc<VmFd>,
    pub memory: GuestMemoryMmap,
    pub devices: Arc<Devices>,
    pub vcpus: Vec<VcpuFd>,
}

impl Parts {
    pub fn new(kind: Kind, memory: GuestMemoryMmap, cpus: u8, state: &DeviceState) -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        for cap in [
            Cap::Irqchip,
            Cap::Ioeventfd,
            Cap::Irqfd,
            Cap::ImmediateExit,
            Cap::UserMemory,
            Cap::SetTssAddr,
            Cap::Pit2,
            Cap::PitState2,
            Cap::AdjustClock,
            Cap::Debugregs,
            Cap::MpState,
            Cap::VcpuEvents,
            Cap::Xcrs,
            Cap::Xsave,
            Cap::Xsave2,
            Cap::ExtCpuid,
            Cap::SignalMsi,
            Cap::TscDeadlineTimer,
            Cap::SplitIrqchip,
            Cap::GetTscKhz,
        ] {
            ensure!(kvm.check_extension(cap), "{cap:?} is not supported");
        }
        let vm = Arc::new(kvm.create_vm()?);
        if kind == Kind::CloudHypervisor {
            vm.set_identity_map_address(IDENTITY_MAP)?;
        }
        vm.set_tss_address(TSS)?;
        let region = memory.iter().next().context("memory")?;
        let region = kvm_userspace_memory_region {
            slot: SLOT,
            flags: match kind {
                Kind::Firecracker => KVM_MEM_LOG_DIRTY_PAGES,
                Kind::CloudHypervisor => 0,
            },
            guest_phys_addr: 0,
            memory_size: region.len(),
            userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        };
        // SAFETY: the memory is mapped until the process ends.
        unsafe { vm.set_user_memory_region(region) }?;
        match kind {
            Kind::Firecracker => {
                vm.create_irq_chip()?;
                vm.create_pit2(kvm_pit_config {
                    flags: KVM_PIT_SPEAKER_DUMMY,
                    ..Default::default()
                })?;
            }
            Kind::CloudHypervisor => {
                let mut cap = kvm_enable_cap {
                    cap: KVM_CAP_SPLIT_IRQCHIP,
                    ..Default::default()
                };
                cap.args[0] = ioapic::PINS as u64;
                vm.enable_cap(&cap)?;
            }
        }
        let vcpus: Result<Vec<_>, _> = (0..cpus).map(|id| vm.create_vcpu(id.into())).collect();
        let vcpus = vcpus?;
        let split = kind == Kind::CloudHypervisor;
        let devices = Arc::new(Devices::new(vm.clone(), split, state)?);
        Ok(Self {
            kvm,
            vm,
            memory,
            devices,
            vcpus,
        })
    }

    /// Starts the processors' threads, which wait.
    pub fn start(self, kind: Kind, mapped: bool, clock: Option<kvm_clock_data>) -> Result<Machine> {
        let layout = Layout {
            msrs: Arc::new(self.kvm.get_msr_index_list()?),
            xsave_size: usize::try_from(self.vm.check_extension_int(Cap::Xsave2))?,
        };
        let vcpus: Result<_> = self
            .vcpus
            .into_iter()
            .map(|fd| Vcpu::start(fd, layout.clone(), self.devices.clone()))
            .collect();
        Ok(Machine {
            kind,
            vm: self.vm,
            memory: self.memory,
            devices: self.devices,
            vcpus: vcpus?,
            clock,
            mapped,
        })
    }
}

impl Machine {
    pub fn boot(kind: Kind, guest: &boot::Guest) -> Result<Self> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), guest.memory << 20)])?;
        let address = boot::load(&memory, guest)?;
        let parts = Parts::new(kind, memory, guest.cpus, &DeviceState::default())?;
        for (id, vcpu) in (0..guest.cpus).zip(&parts.vcpus) {
            vcpu.set_cpuid2(&cpu::cpuid(&parts.kvm, id, guest.cpus)?)?;
            cpu::set_msrs(vcpu)?;
            if id == 0 {
                cpu::set_entry(vcpu, &parts.memory, guest.entry, address)?;
            }
            cpu::set_fpu(vcpu)?;
            cpu::set_lint(vcpu)?;
        }
        parts.start(kind, false, None)
    }

    /// Lets the guest go on. Where the clock stands while it is paused, it goes on from there.
    pub fn resume(&mut self) -> Result<()> {
        if let Some(clock) = self.clock.take() {
            self.vm.set_clock(&clock)?;
        }
        self.vcpus.iter().try_for_each(Vcpu::run)
    }

    pub fn pause(&mut self) -> Result<()> {
        self.vcpus.iter().for_each(Vcpu::ask_to_stop);
        self.vcpus.iter().try_for_each(Vcpu::wait_until_stopped)?;
        self.vcpus.iter().try_for_each(Vcpu::clock_paused)?;
        if self.kind == Kind::CloudHypervisor {
            self.clock = Some(clock(&self.vm)?);
        }
        Ok(())
    }

    pub fn wait_for(&self, words: &str, times: usize, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        self.devices.console.wait_for(words, times, until)
    }
}

/// The guest's clock, as KVM_SET_CLOCK takes it.
pub fn clock(vm: &VmFd) -> Result<kvm_clock_data> {
    let mut clock = vm.get_clock()?;
    clock.flags &= !KVM_CLOCK_TSC_STABLE;
    Ok(clock)
}
