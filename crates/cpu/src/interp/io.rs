//! IN, OUT, INS, OUTS (SDM Vol. 1, ch. 19) and PAUSE.
//!
//! String forms exit with many items at once, as KVM does: INS asks for as many as fit the page of
//! its destination, OUTS sends one item an exit. Both restart at any iteration.

use iced_x86::{Code, Mnemonic};

use crate::cpu::Cpu;
use crate::decode::{Handler, Insn, segment_code};
use crate::exit::{Direction, Stop};
use crate::io::DATA_BYTES;
use crate::machine::Quirk;
use crate::memory::PAGE;
use crate::memory::access::Ram;
use crate::mode::Mode;
use crate::state::{reg, rflags, seg};

/// Handlers of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    Some(match insn.raw.code() {
        Code::In_AL_DX => input_dx::<u8>,
        Code::In_AX_DX => input_dx::<u16>,
        Code::In_EAX_DX => input_dx::<u32>,
        Code::In_AL_imm8 => input_immediate::<u8>,
        Code::In_AX_imm8 => input_immediate::<u16>,
        Code::In_EAX_imm8 => input_immediate::<u32>,
        Code::Out_DX_AL => output_dx::<u8>,
        Code::Out_DX_AX => output_dx::<u16>,
        Code::Out_DX_EAX => output_dx::<u32>,
        Code::Out_imm8_AL => output_immediate::<u8>,
        Code::Out_imm8_AX => output_immediate::<u16>,
        Code::Out_imm8_EAX => output_immediate::<u32>,
        Code::Insb_m8_DX => input_string::<u8>,
        Code::Insw_m16_DX => input_string::<u16>,
        Code::Insd_m32_DX => input_string::<u32>,
        Code::Outsb_DX_m8 => output_string::<u8>,
        Code::Outsw_DX_m16 => output_string::<u16>,
        Code::Outsd_DX_m32 => output_string::<u32>,
        _ if insn.raw.mnemonic() == Mnemonic::Pause => pause,
        _ => return None,
    })
}

/// PAUSEs after which a spinning processor gives its core to another thread.
const PAUSES_BEFORE_YIELD: u32 = 64;

fn pause(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.pauses = cpu.pauses.wrapping_add(1);
    if cpu.pauses.is_multiple_of(PAUSES_BEFORE_YIELD) {
        std::thread::yield_now();
    }
    Ok(())
}

impl Cpu {
    /// IOPL and I/O permission bitmap (SDM Vol. 1, 19.5).
    fn check_io_permission(&mut self, port: u16, size: usize) -> Result<(), Stop> {
        let s = &self.state;
        if !s.protected() || !s.virtual_8086() && s.cpl() <= s.iopl() {
            return Ok(());
        }
        let tr = s.tr;
        // A 32- or 64-bit TSS (type 9 or 11).
        if tr.unusable() || tr.kind() & 0b1101 != 0b1001 || tr.limit < 103 {
            return Err(self.gp0());
        }
        let map: u16 = self.read_system(tr.base.wrapping_add(102))?;
        let at = u64::from(map) + u64::from(port / 8);
        if at + 1 > u64::from(tr.limit) {
            return Err(self.gp0());
        }
        let bits: u16 = self.read_system(tr.base.wrapping_add(at))?;
        let mask = ((1u32 << size) - 1) << (port % 8);
        if u32::from(bits) & mask != 0 {
            return Err(self.gp0());
        }
        Ok(())
    }

    /// Reads items from a port into `io.data`; false if user space must.
    fn port_in(&mut self, port: u16, size: usize, count: usize) -> bool {
        if self.take_done() {
            return true;
        }
        let machine = self.machine.clone();
        self.io.data[..size * count]
            .chunks_exact_mut(size)
            .all(|item| machine.pio_read(port, item))
    }
}

fn port_dx(cpu: &Cpu) -> u16 {
    cpu.state.regs[reg::RDX] as u16
}

fn input_dx<T: Ram>(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let port = port_dx(cpu);
    input::<T>(cpu, port)
}

fn input_immediate<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    input::<T>(cpu, (insn.imm & 0xff) as u16)
}

fn input<T: Ram>(cpu: &mut Cpu, port: u16) -> Result<(), Stop> {
    cpu.check_io_permission(port, T::BYTES)?;
    if !cpu.port_in(port, T::BYTES, 1) {
        return Err(cpu.exit_io(Direction::In, T::BYTES, port, 1));
    }
    let mut buf = [0; 8];
    buf[..T::BYTES].copy_from_slice(&cpu.io.data[..T::BYTES]);
    // RAX's code is 0 at every size.
    T::from_u64(u64::from_le_bytes(buf)).set(&mut cpu.state.regs, reg::RAX);
    cpu.note_io(port, T::BYTES);
    Ok(())
}

fn output_dx<T: Ram>(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let port = port_dx(cpu);
    output::<T>(cpu, port)
}

fn output_immediate<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    output::<T>(cpu, (insn.imm & 0xff) as u16)
}

fn output<T: Ram>(cpu: &mut Cpu, port: u16) -> Result<(), Stop> {
    cpu.check_io_permission(port, T::BYTES)?;
    let value = cpu.state.regs[reg::RAX].to_le_bytes();
    if !cpu.take_done() && !cpu.machine.pio_write(port, &value[..T::BYTES]) {
        cpu.io.data[..T::BYTES].copy_from_slice(&value[..T::BYTES]);
        if port != RETIRING_PORT || !cpu.machine.has_quirk(Quirk::Out7eRetires) {
            return Err(cpu.exit_io(Direction::Out, T::BYTES, port, 1));
        }
        cpu.port_write_retires(port, T::BYTES);
    }
    cpu.note_io(port, T::BYTES);
    Ok(())
}

/// The port of [`Quirk::Out7eRetires`].
const RETIRING_PORT: u16 = 0x7e;

/// Mask of the address size of a string instruction.
fn address_mask(insn: &Insn) -> u64 {
    use iced_x86::OpKind;
    let mut bits = u64::MAX;
    for i in 0..insn.raw.op_count() {
        bits = match insn.raw.op_kind(i) {
            OpKind::MemorySegSI | OpKind::MemoryESDI => 0xffff,
            OpKind::MemorySegESI | OpKind::MemoryESEDI => 0xffff_ffff,
            _ => continue,
        };
    }
    bits
}

fn advance(cpu: &mut Cpu, register: u8, mask: u64, by: u64) {
    let r = &mut cpu.state.regs[register];
    let step = if cpu.state.rflags & rflags::DF != 0 {
        by.wrapping_neg()
    } else {
        by
    };
    let new = r.wrapping_add(step) & mask;
    *r = if mask == 0xffff {
        *r & !mask | new
    } else {
        new
    };
}

fn input_string<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let mask = address_mask(insn);
    let size = T::BYTES as u64;
    let rep = insn.rep();
    let left = if rep {
        cpu.state.regs[reg::RCX] & mask
    } else {
        1
    };
    if left == 0 {
        return Ok(());
    }
    let port = port_dx(cpu);
    cpu.check_io_permission(port, T::BYTES)?;
    let code = segment_code(seg::ES, cpu.mode);
    let rdi = cpu.state.regs[reg::RDI] & mask;
    // As many items as stay within the page; the first is checked before the device is read.
    let down = cpu.state.rflags & rflags::DF != 0;
    let room = if down {
        rdi % PAGE + size
    } else {
        PAGE - rdi % PAGE
    };
    let count = if cpu.stepping {
        1
    } else {
        left.min(room / size)
            .min((DATA_BYTES / T::BYTES) as u64)
            .max(1)
    };
    let first = if down {
        rdi.wrapping_sub((count - 1) * size) & mask
    } else {
        rdi
    };
    let linear = cpu.linear(code, first, T::BYTES, true)?;
    cpu.check_alignment(linear, T::BYTES, cpu.data_access(true))?;
    cpu.probe_write(code, first, (count * size) as usize)?;
    if !cpu.port_in(port, T::BYTES, count as usize) {
        return Err(cpu.exit_io(Direction::In, T::BYTES, port, count as u32));
    }
    for i in 0..count as usize {
        let mut buf = [0; 8];
        buf[..T::BYTES].copy_from_slice(&cpu.io.data[i * T::BYTES..(i + 1) * T::BYTES]);
        let at = cpu.state.regs[reg::RDI] & mask;
        cpu.write_at(code, at, T::from_u64(u64::from_le_bytes(buf)))?;
        advance(cpu, reg::RDI, mask, size);
    }
    cpu.note_io(port, T::BYTES);
    finish(cpu, insn, mask, left, count);
    Ok(())
}

fn output_string<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let mask = address_mask(insn);
    let rep = insn.rep();
    let left = if rep {
        cpu.state.regs[reg::RCX] & mask
    } else {
        1
    };
    if left == 0 {
        return Ok(());
    }
    let port = port_dx(cpu);
    cpu.check_io_permission(port, T::BYTES)?;
    let at = cpu.state.regs[reg::RSI] & mask;
    let source = string_segment(insn, cpu.mode);
    let value: T = cpu.read_at(source, at)?;
    let bytes = value.to_u64().to_le_bytes();
    if !cpu.take_done() && !cpu.machine.pio_write(port, &bytes[..T::BYTES]) {
        cpu.io.data[..T::BYTES].copy_from_slice(&bytes[..T::BYTES]);
        return Err(cpu.exit_io(Direction::Out, T::BYTES, port, 1));
    }
    advance(cpu, reg::RSI, mask, T::BYTES as u64);
    cpu.note_io(port, T::BYTES);
    finish(cpu, insn, mask, left, 1);
    Ok(())
}

/// Segment code of a string instruction's source.
fn string_segment(insn: &Insn, mode: Mode) -> u8 {
    use iced_x86::Register;
    let n = match insn.raw.memory_segment() {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    };
    segment_code(n, mode)
}

/// Counts RCX down; goes round again if anything is left.
fn finish(cpu: &mut Cpu, insn: &Insn, mask: u64, left: u64, done: u64) {
    if !insn.rep() {
        return;
    }
    let rest = left - done;
    let r = &mut cpu.state.regs[reg::RCX];
    *r = if mask == 0xffff {
        *r & !mask | rest
    } else {
        rest
    };
    if rest > 0 {
        cpu.repeat(insn);
    }
}
