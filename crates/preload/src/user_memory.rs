//! Copies between KVM's objects and the memory of the program that issues the ioctls. A pointer
//! that leads nowhere must give EFAULT, as from the kernel: the copy routine is allowed to fault,
//! and the SIGSEGV and SIGBUS handler ([`fix_up`]) resumes it at its failure exit.
//! (process_vm_readv would do without, but VMMs' seccomp filters forbid it.)

use std::arch::naked_asm;

use anykvm::{Efault, UserMemory};

/// The memory of this process.
pub struct ThisProcess;

impl UserMemory for ThisProcess {
    fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), Efault> {
        // SAFETY: the destination is a live buffer of that length; a fault on the source is fixed up.
        unsafe { copy(buf.as_mut_ptr() as u64, address, buf.len()) }
    }

    fn write(&self, address: u64, buf: &[u8]) -> Result<(), Efault> {
        // SAFETY: the source is a live buffer of that length. The destination is whatever the
        // program passed to an ioctl that writes there, which is its affair, as with the kernel.
        unsafe { copy(address, buf.as_ptr() as u64, buf.len()) }
    }
}

/// Copies; a fault anywhere in it is Efault.
unsafe fn copy(to: u64, from: u64, len: usize) -> Result<(), Efault> {
    // SAFETY: by the caller's promise.
    match unsafe { copy_or_fault(to, from, len) } {
        0 => Ok(()),
        _ => Err(Efault),
    }
}

/// Copies `len` bytes upwards, eight at a time and then one at a time; 1 after a fault. Uses no
/// stack, so that it can be left from any instruction.
#[unsafe(naked)]
unsafe extern "C" fn copy_or_fault(to: u64, from: u64, len: usize) -> u64 {
    naked_asm!(
        "mov rcx, rdx",
        "shr rcx, 3",
        "jz 3f",
        "2:",
        "mov rax, [rsi]",
        "mov [rdi], rax",
        "add rsi, 8",
        "add rdi, 8",
        "dec rcx",
        "jnz 2b",
        "3:",
        "and edx, 7",
        "jz 5f",
        "4:",
        "mov al, [rsi]",
        "mov [rdi], al",
        "inc rsi",
        "inc rdi",
        "dec edx",
        "jnz 4b",
        "5:",
        "xor eax, eax",
        "ret",
        ".globl anykvm_copy_failed",
        ".hidden anykvm_copy_failed",
        "anykvm_copy_failed:",
        "mov eax, 1",
        "ret",
    )
}

unsafe extern "C" {
    /// The failure exit of [`copy_or_fault`]; every instruction before it may fault.
    #[link_name = "anykvm_copy_failed"]
    safe static COPY_FAILED: u8;
}

/// Where to resume after a fault at `rip`, if that is in the copy routine. Async-signal-safe.
pub fn fix_up(rip: u64) -> Option<u64> {
    let start = copy_or_fault as *const () as u64;
    let failed = &raw const COPY_FAILED as u64;
    (start..failed).contains(&rip).then_some(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_every_length() {
        let from: Vec<u8> = (0..64).collect();
        for len in 0..=from.len() {
            let mut to = vec![0xff; from.len()];
            ThisProcess
                .read(from.as_ptr() as u64, &mut to[..len])
                .unwrap();
            assert_eq!(to[..len], from[..len]);
            assert!(to[len..].iter().all(|&b| b == 0xff));
        }
    }

    #[test]
    fn every_instruction_of_the_copy_is_covered() {
        let start = copy_or_fault as *const () as u64;
        let failed = fix_up(start).unwrap();
        assert!(failed > start && failed - start < 128);
        assert_eq!(fix_up(failed - 1), Some(failed));
        assert_eq!(fix_up(failed), None);
        assert_eq!(fix_up(start - 1), None);
    }
}
