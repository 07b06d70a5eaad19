//! A virtual processor: what KVM_CREATE_VCPU makes. Holds the processor under the vCPU's lock
//! (Linux: `vcpu->mutex`), which KVM_RUN keeps for as long as the guest runs; every other ioctl waits
//! for it. What other threads may do without it is in [`VcpuRequests`].

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use anykvm_cpu::memory::dirty::{DirtyRing, Running};
use anykvm_cpu::requests::{EVENT, KICK};
use anykvm_cpu::{Cpu, CpuState};
use anykvm_irqchip::{Lapic, LapicConfig};

use crate::error::Result;
use crate::event_thread::Expire;
use crate::kick::Kick;
use crate::machine::VcpuMachine;
use crate::object::memfd;
use crate::run::Completion;
use crate::run_page::{MMAP_SIZE, RunPage};
use crate::stats::StatsFile;
use crate::steal_time::{self, Look, RunDelay};
use crate::vcpu_requests::VcpuRequests;
use crate::vcpu_stats::{VCPU_STATISTICS, VcpuStat};
use crate::vm::Vm;

/// The x87 control word after FNINIT.
const FNINIT_FCW: u16 = 0x37f;

/// A virtual processor.
#[derive(Debug)]
pub struct Vcpu {
    vm: Arc<Vm>,
    id: u32,
    boot: bool,
    fd: OwnedFd,
    kick: Arc<Kick>,
    dirty_ring: Option<Arc<DirtyRing>>,
    requests: Arc<VcpuRequests>,
    machine: Arc<VcpuMachine>,
    stats: Arc<StatsFile>,
    /// KVM_SET_SIGNAL_MASK. Not under the vCPU's lock: the shim reads it before KVM_RUN.
    signal_mask: Mutex<Option<u64>>,
    core: Mutex<Core>,
}

/// What the vCPU's lock protects.
#[derive(Debug)]
pub(crate) struct Core {
    pub cpu: Cpu,
    /// What the last exit left to do on re-entry.
    pub completion: Completion,
    /// KVM_RUN has entered the guest: CPUID is fixed.
    pub has_run: bool,
    /// Nanoseconds to poll for an event before sleeping in HLT.
    pub halt_poll_ns: u64,
    /// Guest-physical address of the TPR shadow (KVM_SET_VAPIC_ADDR), 0 for none.
    pub vapic_addr: u64,
}

/// A vCPU locked by this thread (Linux: between `vcpu_load` and `vcpu_put`).
pub(crate) struct Loaded<'a> {
    _running: Option<Running>,
    core: MutexGuard<'a, Core>,
}

impl Deref for Loaded<'_> {
    type Target = Core;
    fn deref(&self) -> &Core {
        &self.core
    }
}

impl DerefMut for Loaded<'_> {
    fn deref_mut(&mut self) -> &mut Core {
        &mut self.core
    }
}

/// Lets a vCPU's KVM_RUN end with EINTR, from any thread or signal handler.
#[derive(Clone, Debug)]
pub struct KickHandle(Arc<Kick>);

impl KickHandle {
    /// The vCPU's current KVM_RUN, or its next, returns EINTR. Async-signal-safe: sets a bit, and
    /// wakes a sleeping vCPU by its futex.
    pub fn kick(&self) {
        self.0.request(KICK);
    }
    /// Takes a kick back that no KVM_RUN has seen.
    pub fn clear(&self) {
        self.0.requests().take(KICK);
    }
}

/// The APIC timer, for the VM's event thread. Weak: the local APIC leads to the deadline itself.
struct TimerExpiry(Weak<Lapic>);

impl Expire for TimerExpiry {
    fn expired(&self, now_ns: u64) {
        if let Some(lapic) = self.0.upgrade() {
            lapic.timer_expired(now_ns);
        }
    }
}

impl Vcpu {
    /// KVM_CREATE_VCPU, once the VM has found the id good. `boot`: the bootstrap processor.
    pub(crate) fn new(vm: Arc<Vm>, id: u32, boot: bool) -> Result<Arc<Self>> {
        let fd = memfd(&format!("kvm-vcpu:{id}"), MMAP_SIZE as u64)?;
        let run = RunPage::new(&fd)?;
        let kick = Arc::new(Kick::default());
        let dirty_ring = vm.dirty_ring(&fd, kick.requests())?;
        let deadline = vm.events.unconnected_deadline();
        let requests = Arc::new(VcpuRequests::new(
            kick.clone(),
            deadline.clone(),
            vm.time.clone(),
        ));
        let lapic = vm.irqchip().map(|chip| {
            chip.create_lapic(
                LapicConfig {
                    apic_id: id,
                    bsp: boot,
                },
                requests.clone(),
            )
        });
        if let Some(lapic) = &lapic {
            vm.events
                .connect(&deadline, Arc::new(TimerExpiry(Arc::downgrade(lapic))));
        }
        let in_kernel_apic = lapic.is_some();
        let machine = Arc::new(VcpuMachine::new(
            vm.clone(),
            requests.clone(),
            run,
            lapic,
            boot,
        ));
        if steal_time::is_measured() && !vm.time.is_counted() {
            let deadline = vm.events.unconnected_deadline();
            let delay = Arc::new(RunDelay::new(requests.clone(), deadline.clone()));
            vm.events
                .connect(&deadline, Arc::new(Look(Arc::downgrade(&delay))));
            machine.set_run_delay(delay);
        }
        let mut cpu = Cpu::new(
            vm.memory().clone(),
            machine.clone(),
            kick.requests().clone(),
        );
        cpu.state.host_tsc = vm.time.counted_tsc();
        machine.start_tsc(&mut cpu.state);
        // KVM makes a vCPU with its x87 unit as after FNINIT, not as after RESET (`fpstate_init_user`).
        cpu.state.xsave.set_u16(0, FNINIT_FCW);
        vm.lock_translation()
            .equip(&mut cpu, id, vm.time.is_counted());
        if in_kernel_apic && !boot {
            cpu.state.events.mp_state = anykvm_cpu::events::MpState::Uninitialized;
        }
        let stats = StatsFile::new(
            &format!("kvm-{}/vcpu-{id}", std::process::id()),
            VCPU_STATISTICS,
        )?;
        Ok(Arc::new(Self {
            vm,
            id,
            boot,
            fd,
            kick,
            dirty_ring,
            requests,
            machine,
            stats,
            signal_mask: Mutex::new(None),
            core: Mutex::new(Core {
                cpu,
                completion: Completion::None,
                has_run: false,
                halt_poll_ns: 0,
                vapic_addr: 0,
            }),
        }))
    }

    /// The VM it belongs to.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Its id, which is its APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether it is the bootstrap processor.
    pub fn is_boot(&self) -> bool {
        self.boot
    }

    /// Its memfd: `struct kvm_run`, port I/O data, room for the VM's coalesced ring, and from
    /// KVM_DIRTY_LOG_PAGE_OFFSET on the dirty ring if there is one.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Wakes and interrupts it.
    pub fn kick(&self) -> &Kick {
        &self.kick
    }

    /// A handle that ends KVM_RUN with EINTR.
    pub fn kick_handle(&self) -> KickHandle {
        KickHandle(self.kick.clone())
    }

    /// The signal mask to be in force during KVM_RUN (KVM_SET_SIGNAL_MASK): bit n-1 for signal n.
    pub fn signal_mask(&self) -> Option<u64> {
        *self.signal_mask.lock().unwrap_or_else(|e| e.into_inner())
    }
    pub(crate) fn set_signal_mask(&self, mask: Option<u64>) {
        *self.signal_mask.lock().unwrap_or_else(|e| e.into_inner()) = mask;
    }

    /// Its statistics.
    pub fn stats(&self) -> &Arc<StatsFile> {
        &self.stats
    }

    /// Counts something that only KVM_RUN does, so that a plain store will do.
    pub(crate) fn count(&self, stat: VcpuStat) {
        let n = self.stats.get(stat as usize);
        self.stats.set(stat as usize, n + 1);
    }

    pub(crate) fn machine(&self) -> &Arc<VcpuMachine> {
        &self.machine
    }
    pub(crate) fn requests(&self) -> &VcpuRequests {
        &self.requests
    }
    /// Takes the vCPU's lock. Until it is given back, what this thread writes to guest memory is written
    /// by this vCPU.
    pub(crate) fn lock(&self) -> Loaded<'_> {
        let mut core = self.core.lock().unwrap_or_else(|e| e.into_inner());
        core.cpu.state.host_tsc = self.vm.time.counted_tsc();
        Loaded {
            _running: self.dirty_ring.clone().map(Running::new),
            core,
        }
    }

    /// Its dirty ring, if the VM has such.
    pub(crate) fn dirty_ring(&self) -> Option<&DirtyRing> {
        self.dirty_ring.as_deref()
    }

    /// A readable account of the registers and events, with the instruction at RIP.
    pub fn dump(&self) -> String {
        let mut core = self.lock();
        format!("vcpu {}\n{}", self.id, core.cpu.dump())
    }

    /// Reads state under the lock. As every vCPU ioctl but KVM_RUN it begins a new epoch in which
    /// translated code is compared with memory once more: the caller may be about to patch it.
    pub(crate) fn read<R>(&self, f: impl FnOnce(&mut Core) -> R) -> R {
        let mut core = self.lock();
        crate::machine::collect_events(&self.requests, &mut core.cpu.state);
        core.cpu.new_epoch();
        f(&mut core)
    }

    /// Changes state under the lock; what is derived from it is computed anew if it succeeded.
    pub(crate) fn change<R>(&self, f: impl FnOnce(&mut Core) -> Result<R>) -> Result<R> {
        let mut core = self.lock();
        crate::machine::collect_events(&self.requests, &mut core.cpu.state);
        let result = f(&mut core);
        if result.is_ok() {
            core.cpu.state_changed();
            self.kick.requests().set(EVENT);
        } else {
            core.cpu.new_epoch();
        }
        result
    }

    /// As [`Self::change`], for what only concerns the state.
    pub(crate) fn change_state<R>(&self, f: impl FnOnce(&mut CpuState) -> Result<R>) -> Result<R> {
        self.change(|core| f(&mut core.cpu.state))
    }
}
