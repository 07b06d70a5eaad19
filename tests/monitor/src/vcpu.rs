//! A processor's thread: it runs until it is kicked, and reads or writes the processor's state when asked to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, MsrList, Msrs, Xsave, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::devices::Devices;

/// As many as one KVM_GET_MSRS takes.
const MSRS_AT_A_TIME: usize = 256;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: CpuId,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Those that depend on others, the APIC timer's deadline on the TSC, in the last one.
    msrs: Vec<Msrs>,
    events: kvm_vcpu_events,
}

enum Order {
    Run,
    Save(Sender<Result<VcpuState>>),
    ClockPaused(Sender<Result<()>>),
}

/// A processor in its thread.
pub struct Vcpu {
    orders: Sender<Order>,
    stopped: Receiver<()>,
    pause: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// What a processor needs from its machine to be saved.
#[derive(Clone)]
pub struct Layout {
    pub msrs: Arc<MsrList>,
    /// Size of `struct kvm_xsave` as KVM_CAP_XSAVE2 tells it.
    pub xsave_size: usize,
}

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpu {
    pub fn start(mut fd: VcpuFd, layout: Layout, devices: Arc<Devices>) -> Result<Self> {
        register_signal_handler(SIGRTMIN(), nothing)?;
        let (orders, inbox) = mpsc::channel();
        let (stop, stopped) = mpsc::channel();
        let pause = Arc::new(AtomicBool::new(false));
        let pausing = pause.clone();
        let thread = thread::Builder::new().spawn(move || {
            for order in inbox {
                match order {
                    Order::Run => {
                        if let Err(error) = run(&mut fd, &devices, &pausing) {
                            devices.console.fail(format!("{error:#}"));
                        }
                        let _ = stop.send(());
                    }
                    Order::Save(answer) => {
                        let _ = answer.send(save(&fd, &layout));
                    }
                    Order::ClockPaused(answer) => {
                        let _ = answer.send(fd.kvmclock_ctrl().context("KVM_KVMCLOCK_CTRL"));
                    }
                }
            }
        })?;
        Ok(Self {
            orders,
            stopped,
            pause,
            thread,
        })
    }

    pub fn run(&self) -> Result<()> {
        self.pause.store(false, Ordering::SeqCst);
        self.orders
            .send(Order::Run)
            .context("a processor has ended")
    }

    /// Asks it to stop, without waiting.
    pub fn ask_to_stop(&self) {
        self.pause.store(true, Ordering::SeqCst);
    }

    /// Kicks it until it has stopped: a signal may come just before it enters the guest.
    pub fn wait_until_stopped(&self) -> Result<()> {
        loop {
            self.thread
                .kill(SIGRTMIN())
                .map_err(|error| anyhow!("cannot signal a processor: {error}"))?;
            match self.stopped.recv_timeout(Duration::from_millis(10)) {
                Ok(()) => return Ok(()),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub fn save(&self) -> Result<VcpuState> {
        let (answer, state) = mpsc::channel();
        self.orders.send(Order::Save(answer))?;
        state.recv()?
    }

    /// Tells the guest that it was stopped on purpose (KVM_KVMCLOCK_CTRL).
    pub fn clock_paused(&self) -> Result<()> {
        let (answer, result) = mpsc::channel();
        self.orders.send(Order::ClockPaused(answer))?;
        result.recv()?
    }
}

fn run(fd: &mut VcpuFd, devices: &Devices, pause: &AtomicBool) -> Result<()> {
    while !pause.load(Ordering::SeqCst) {
        step(fd, devices)?;
    }
    // An access that the monitor has answered is complete only behind the next KVM_RUN.
    fd.set_kvm_immediate_exit(1);
    while step(fd, devices)? != Stepped::Interrupted {}
    fd.set_kvm_immediate_exit(0);
    Ok(())
}

#[derive(PartialEq, Eq)]
enum Stepped {
    Exited,
    Interrupted,
}

fn step(fd: &mut VcpuFd, devices: &Devices) -> Result<Stepped> {
    match fd.run() {
        Ok(VcpuExit::IoIn(port, data)) => devices.port_in(port, data),
        Ok(VcpuExit::IoOut(port, data)) => devices.port_out(port, data)?,
        Ok(VcpuExit::MmioRead(address, data)) => devices.memory_read(address, data),
        Ok(VcpuExit::MmioWrite(address, data)) => devices.memory_write(address, data)?,
        // Level-triggered lines would be looked at again.
        Ok(VcpuExit::IoapicEoi(_)) => {}
        Ok(VcpuExit::Intr) => return Ok(Stepped::Interrupted),
        Ok(exit) => bail!("exit {exit:?}"),
        Err(error) if error.errno() == libc::EINTR => return Ok(Stepped::Interrupted),
        Err(error) if error.errno() == libc::EAGAIN => {}
        Err(error) => return Err(error).context("KVM_RUN"),
    }
    Ok(Stepped::Exited)
}

/// In Firecracker's order: KVM_GET_MP_STATE may change what the others read, the events are last.
fn save(fd: &VcpuFd, layout: &Layout) -> Result<VcpuState> {
    let mp_state = fd.get_mp_state()?;
    let regs = fd.get_regs()?;
    let sregs = fd.get_sregs()?;
    let mut xsave = Xsave::new((layout.xsave_size - size_of::<kvm_xsave>()).div_ceil(4))?;
    // SAFETY: it is as large as KVM says.
    unsafe { fd.get_xsave2(&mut xsave) }?;
    let xcrs = fd.get_xcrs()?;
    let debug_regs = fd.get_debug_regs()?;
    let lapic = fd.get_lapic()?;
    let tsc_khz = fd.get_tsc_khz()?;
    let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES)?;
    let msrs = get_msrs(fd, layout.msrs.as_slice())?;
    let events = fd.get_vcpu_events()?;
    Ok(VcpuState {
        cpuid,
        tsc_khz,
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debug_regs,
        lapic,
        msrs,
        events,
    })
}

/// All of KVM_GET_MSR_INDEX_LIST, each of which can be read.
fn get_msrs(fd: &VcpuFd, list: &[u32]) -> Result<Vec<Msrs>> {
    let mut chunks = Vec::new();
    let mut deferred = Vec::new();
    for indices in list.chunks(MSRS_AT_A_TIME) {
        let entries: Vec<_> = indices
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries)?;
        let done = fd.get_msrs(&mut msrs)?;
        ensure!(done == entries.len(), "MSR {:#x}", entries[done].index);
        let late = |msr: &&kvm_msr_entry| msr.index == MSR_TSC_DEADLINE;
        deferred.extend(msrs.as_slice().iter().filter(late).copied());
        msrs.retain(|msr| !late(&msr));
        chunks.push(msrs);
    }
    chunks.push(Msrs::from_entries(&deferred)?);
    Ok(chunks)
}

pub fn restore(fd: &VcpuFd, state: &VcpuState) -> Result<()> {
    fd.set_cpuid2(&state.cpuid)?;
    fd.set_tsc_khz(state.tsc_khz)?;
    fd.set_mp_state(state.mp_state)?;
    fd.set_regs(&state.regs)?;
    fd.set_sregs(&state.sregs)?;
    // SAFETY: it is as large as it was when it was read.
    unsafe { fd.set_xsave2(&state.xsave) }?;
    fd.set_xcrs(&state.xcrs)?;
    fd.set_debug_regs(&state.debug_regs)?;
    fd.set_lapic(&state.lapic)?;
    for msrs in &state.msrs {
        let entries = msrs.as_slice();
        let done = fd.set_msrs(msrs)?;
        ensure!(done == entries.len(), "MSR {:#x}", entries[done].index);
    }
    fd.set_vcpu_events(&state.events)?;
    Ok(())
}
