//! A paused machine in a folder: the state as JSON, the memory as a file.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
};

use crate::Kind;
use crate::devices::DeviceState;
use crate::machine::{Machine, Parts, SLOT, clock};
use crate::vcpu::{self, Vcpu, VcpuState};

const PAGE: usize = 4096;

#[derive(Serialize, Deserialize)]
struct State {
    kind: Kind,
    vcpus: Vec<VcpuState>,
    clock: kvm_clock_data,
    /// The controllers that are KVM's.
    chips: Option<(kvm_pit_state2, Vec<kvm_irqchip>)>,
    devices: DeviceState,
}

/// Saves a paused machine; how many pages were written to the file.
pub fn save(machine: &Machine, folder: &Path) -> Result<usize> {
    let vcpus: Result<_> = machine.vcpus.iter().map(Vcpu::save).collect();
    let vcpus = vcpus?;
    let chips = match machine.kind {
        Kind::CloudHypervisor => None,
        Kind::Firecracker => Some(chips(machine)?),
    };
    let state = State {
        kind: machine.kind,
        vcpus,
        clock: match machine.clock {
            Some(clock) => clock,
            None => clock(&machine.vm)?,
        },
        chips,
        devices: machine.devices.state(),
    };
    fs::create_dir_all(folder)?;
    fs::write(folder.join("state"), serde_json::to_vec(&state)?)?;
    save_memory(machine, &folder.join("memory"))
}

fn chips(machine: &Machine) -> Result<(kvm_pit_state2, Vec<kvm_irqchip>)> {
    let pit = machine.vm.get_pit2()?;
    let mut chips = Vec::new();
    for chip_id in [
        KVM_IRQCHIP_PIC_MASTER,
        KVM_IRQCHIP_PIC_SLAVE,
        KVM_IRQCHIP_IOAPIC,
    ] {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        machine.vm.get_irqchip(&mut chip)?;
        chips.push(chip);
    }
    Ok((pit, chips))
}

/// All of the memory, or what was written since it was mapped from the file.
fn save_memory(machine: &Machine, path: &Path) -> Result<usize> {
    let memory = &machine.memory;
    let size = usize::try_from(memory.last_addr().raw_value())? + 1;
    if !machine.mapped {
        let mut file = File::create(path)?;
        memory.write_all_volatile_to(GuestAddress(0), &mut file, size)?;
        return Ok(size / PAGE);
    }
    let mut file = OpenOptions::new().write(true).open(path)?;
    let mut pages = 0;
    for (word, bits) in machine
        .vm
        .get_dirty_log(SLOT, size)?
        .into_iter()
        .enumerate()
    {
        for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
            let at = ((word * 64 + bit) * PAGE) as u64;
            file.seek(SeekFrom::Start(at))?;
            memory.write_all_volatile_to(GuestAddress(at), &mut file, PAGE)?;
            pages += 1;
        }
    }
    Ok(pages)
}

/// Makes the machine anew, paused.
pub fn load(folder: &Path) -> Result<Machine> {
    let state: State = serde_json::from_slice(&fs::read(folder.join("state"))?)?;
    let memory = load_memory(state.kind, &folder.join("memory"))?;
    let cpus = u8::try_from(state.vcpus.len())?;
    let parts = Parts::new(state.kind, memory, cpus, &state.devices)?;
    for (fd, vcpu) in parts.vcpus.iter().zip(&state.vcpus) {
        vcpu::restore(fd, vcpu)?;
    }
    if let Some((pit, chips)) = &state.chips {
        parts.vm.set_pit2(pit)?;
        parts.vm.set_clock(&state.clock)?;
        for chip in chips {
            parts.vm.set_irqchip(chip)?;
        }
    }
    let clock = (state.kind == Kind::CloudHypervisor).then_some(state.clock);
    parts.start(state.kind, state.kind == Kind::Firecracker, clock)
}

fn load_memory(kind: Kind, path: &Path) -> Result<GuestMemoryMmap> {
    let mut file = File::open(path).context("the memory")?;
    let size = usize::try_from(file.metadata()?.len())?;
    match kind {
        Kind::CloudHypervisor => {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)])?;
            memory.read_exact_volatile_from(GuestAddress(0), &mut file, size)?;
            Ok(memory)
        }
        // Pages come when they are touched.
        Kind::Firecracker => {
            let region = MmapRegionBuilder::new(size)
                .with_file_offset(FileOffset::new(file, 0))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
                .build()?;
            match GuestRegionMmap::new(region, GuestAddress(0)) {
                Some(region) => Ok(GuestMemoryMmap::from_regions(vec![region])?),
                None => bail!("the memory is too large"),
            }
        }
    }
}
