//! The vCPU's ioctls by number: copies arguments in and results out; the work is done by the module
//! each belongs to.

use std::mem::offset_of;
use std::sync::Arc;

use anykvm_abi::ioctl::*;
use anykvm_abi::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_cpuid_entry,
    kvm_cpuid_entry2, kvm_debugregs, kvm_device_attr, kvm_enable_cap, kvm_fpu, kvm_guest_debug,
    kvm_interrupt, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_signal_mask,
    kvm_sregs, kvm_sregs2, kvm_tpr_access_ctl, kvm_translation, kvm_vapic_addr, kvm_vcpu_events,
    kvm_x86_mce, kvm_xcrs,
};

use crate::error::{Errno, Result};
use crate::ioctl_table::{ObjectKind, refusal};
use crate::object::{Object, Reply};
use crate::user::UserMemory;
use crate::vcpu::Vcpu;
use crate::{cpuid, msr, xsave};

/// `struct kvm_cpuid2` and `struct kvm_msrs`: a count and a padding word before the entries.
const LIST_HEADER: u64 = 8;

type Done = Result<Reply>;

fn done(result: Result<()>) -> Done {
    result.map(|()| Reply::Value(0))
}

impl Vcpu {
    /// An ioctl on the vCPU.
    pub fn ioctl(self: &Arc<Self>, request: u32, arg: u64, user: &dyn UserMemory) -> Done {
        match request {
            KVM_RUN if arg != 0 => Err(Errno::EINVAL),
            KVM_RUN => done(self.run()),

            KVM_GET_REGS => done(user.put(arg, &self.regs())),
            KVM_SET_REGS => done(self.set_regs(&user.get::<kvm_regs>(arg)?)),
            KVM_GET_SREGS => done(user.put(arg, &self.sregs())),
            KVM_SET_SREGS => done(self.set_sregs(&user.get::<kvm_sregs>(arg)?)),
            KVM_GET_SREGS2 => done(user.put(arg, &self.sregs2())),
            KVM_SET_SREGS2 => done(self.set_sregs2(&user.get::<kvm_sregs2>(arg)?)),
            KVM_GET_FPU => done(user.put(arg, &self.fpu())),
            KVM_SET_FPU => done(self.set_fpu(&user.get::<kvm_fpu>(arg)?)),
            KVM_GET_XSAVE | KVM_GET_XSAVE2 => done(user.put(arg, &self.xsave())),
            KVM_SET_XSAVE => done(self.set_xsave(&user.get::<[u8; xsave::REGION]>(arg)?)),
            KVM_GET_XCRS => done(user.put(arg, &self.xcrs())),
            KVM_SET_XCRS => done(self.set_xcrs(&user.get::<kvm_xcrs>(arg)?)),
            KVM_GET_DEBUGREGS => done(user.put(arg, &self.debugregs())),
            KVM_SET_DEBUGREGS => done(self.set_debugregs(&user.get::<kvm_debugregs>(arg)?)),
            KVM_SET_GUEST_DEBUG => done(self.set_guest_debug(&user.get::<kvm_guest_debug>(arg)?)),
            KVM_TRANSLATE => {
                let asked: kvm_translation = user.get(arg)?;
                done(user.put(arg, &self.translate(asked.linear_address)))
            }

            KVM_GET_VCPU_EVENTS => done(user.put(arg, &self.vcpu_events())),
            KVM_SET_VCPU_EVENTS => done(self.set_vcpu_events(&user.get::<kvm_vcpu_events>(arg)?)),
            KVM_GET_MP_STATE => {
                let mp_state = kvm_mp_state {
                    mp_state: self.mp_state(),
                };
                done(user.put(arg, &mp_state))
            }
            KVM_SET_MP_STATE => done(self.set_mp_state(user.get::<kvm_mp_state>(arg)?.mp_state)),
            KVM_INTERRUPT => done(self.interrupt(user.get::<kvm_interrupt>(arg)?.irq)),
            KVM_NMI => {
                self.nmi();
                Ok(0.into())
            }
            KVM_SMI => {
                self.smi();
                Ok(0.into())
            }
            KVM_GET_NESTED_STATE => done(self.ioctl_get_nested_state(arg, user)),
            KVM_SET_NESTED_STATE => done(self.ioctl_set_nested_state(arg, user)),
            KVM_SET_SIGNAL_MASK => done(self.ioctl_signal_mask(arg, user)),

            KVM_SET_CPUID => done(self.ioctl_set_cpuid(arg, user)),
            KVM_SET_CPUID2 => done(self.ioctl_set_cpuid2(arg, user)),
            KVM_GET_CPUID2 => done(self.ioctl_get_cpuid2(arg, user)),
            KVM_GET_MSRS => self.ioctl_get_msrs(arg, user),
            KVM_SET_MSRS => self.ioctl_set_msrs(arg, user),

            KVM_GET_LAPIC => done(user.put(arg, &self.lapic_state()?)),
            KVM_SET_LAPIC | KVM_SET_VAPIC_ADDR if self.machine().lapic().is_none() => {
                Err(Errno::EINVAL)
            }
            KVM_SET_LAPIC => done(self.set_lapic_state(&user.get::<kvm_lapic_state>(arg)?)),
            KVM_TPR_ACCESS_REPORTING => {
                let control: kvm_tpr_access_ctl = user.get(arg)?;
                self.tpr_access_reporting(&control)?;
                done(user.put(arg, &control))
            }
            KVM_SET_VAPIC_ADDR => {
                done(self.set_vapic_addr(user.get::<kvm_vapic_addr>(arg)?.vapic_addr))
            }
            KVM_X86_SETUP_MCE => done(self.setup_mce(user.get::<u64>(arg)?)),
            KVM_X86_SET_MCE => done(self.set_mce(&user.get::<kvm_x86_mce>(arg)?)),

            KVM_GET_TSC_KHZ => Ok((self.tsc_khz() as i32).into()),
            KVM_SET_TSC_KHZ => done(self.set_tsc_khz(arg as u32)),
            KVM_KVMCLOCK_CTRL => done(self.kvmclock_ctrl()),
            KVM_HAS_DEVICE_ATTR => done(tsc_attribute(&user.get(arg)?)),
            KVM_GET_DEVICE_ATTR => {
                let attr: kvm_device_attr = user.get(arg)?;
                tsc_attribute(&attr)?;
                done(user.put(attr.addr, &self.tsc_offset()))
            }
            KVM_SET_DEVICE_ATTR => {
                let attr: kvm_device_attr = user.get(arg)?;
                tsc_attribute(&attr)?;
                done(self.set_tsc_offset(user.get(attr.addr)?))
            }
            KVM_ENABLE_CAP => done(self.enable_cap(&user.get(arg)?)),
            KVM_GET_STATS_FD => Ok(Reply::Object(Object::Stats(self.stats().clone()))),
            _ => Err(refusal(ObjectKind::Vcpu, request)),
        }
    }

    fn ioctl_signal_mask(&self, arg: u64, user: &dyn UserMemory) -> Result<()> {
        if arg == 0 {
            self.set_signal_mask(None);
            return Ok(());
        }
        let len: u32 = user.get(arg)?;
        if len as usize != size_of::<u64>() {
            return Err(Errno::EINVAL);
        }
        let at = arg.wrapping_add(offset_of!(kvm_signal_mask, sigset) as u64);
        self.set_signal_mask(Some(user.get(at)?));
        Ok(())
    }

    /// KVM_SET_CPUID: entries without index.
    fn ioctl_set_cpuid(&self, arg: u64, user: &dyn UserMemory) -> Result<()> {
        let count: u32 = user.get(arg)?;
        let entries = user.get_array::<kvm_cpuid_entry>(
            arg.wrapping_add(LIST_HEADER),
            count as usize,
            cpuid::MAX_ENTRIES,
        )?;
        let wide = entries.iter().map(|e| kvm_cpuid_entry2 {
            function: e.function,
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            ..Default::default()
        });
        self.set_cpuid2(wide.collect())
    }

    fn ioctl_set_cpuid2(&self, arg: u64, user: &dyn UserMemory) -> Result<()> {
        let count: u32 = user.get(arg)?;
        self.set_cpuid2(user.get_array(
            arg.wrapping_add(LIST_HEADER),
            count as usize,
            cpuid::MAX_ENTRIES,
        )?)
    }

    fn ioctl_get_cpuid2(&self, arg: u64, user: &dyn UserMemory) -> Result<()> {
        let room: u32 = user.get(arg)?;
        let entries = self.cpuid2();
        if (room as usize) < entries.len() {
            return Err(Errno::E2BIG);
        }
        user.put_array(arg.wrapping_add(LIST_HEADER), &entries)?;
        user.put(arg, &(entries.len() as u32))
    }

    fn msr_entries(&self, arg: u64, user: &dyn UserMemory) -> Result<Vec<kvm_msr_entry>> {
        let count: u32 = user.get(arg)?;
        user.get_array(
            arg.wrapping_add(LIST_HEADER),
            count as usize,
            msr::MAX_ENTRIES - 1,
        )
    }

    fn ioctl_get_msrs(&self, arg: u64, user: &dyn UserMemory) -> Done {
        let mut entries = self.msr_entries(arg, user)?;
        let n = self.msrs(&mut entries);
        user.put_array(arg.wrapping_add(LIST_HEADER), &entries)?;
        Ok((n as i32).into())
    }

    fn ioctl_set_msrs(&self, arg: u64, user: &dyn UserMemory) -> Done {
        let entries = self.msr_entries(arg, user)?;
        Ok((self.set_msrs(&entries) as i32).into())
    }

    /// KVM_X86_SETUP_MCE.
    pub fn setup_mce(&self, cap: u64) -> Result<()> {
        let _core = self.lock();
        self.machine().mce().setup(cap)
    }

    /// KVM_X86_SET_MCE.
    pub fn set_mce(&self, mce: &kvm_x86_mce) -> Result<()> {
        self.change_state(|s| self.machine().mce().inject(s, mce))
    }

    /// KVM_ENABLE_CAP on the vCPU.
    pub fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()> {
        match cap.cap {
            _ if cap.flags != 0 => Err(Errno::EINVAL),
            KVM_CAP_ENFORCE_PV_FEATURE_CPUID => {
                self.machine().set_enforce_features(cap.args[0] != 0);
                Ok(())
            }
            _ => Err(Errno::EINVAL),
        }
    }
}

/// The one attribute a vCPU has: its TSC's offset.
fn tsc_attribute(attr: &kvm_device_attr) -> Result<()> {
    if attr.group == KVM_VCPU_TSC_CTRL && attr.attr == u64::from(KVM_VCPU_TSC_OFFSET) {
        Ok(())
    } else {
        Err(Errno::ENXIO)
    }
}
