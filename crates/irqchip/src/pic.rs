//! The pair of 8259A interrupt controllers of a PC, slave on the master's input 2. Specified by the
//! Intel 8259A data sheet and, for the edge/level control registers (ports 4D0H and 4D1H), the 82371
//! (PIIX) data sheet. Always cascaded, always 8086 mode; single mode and the level bit of ICW1 do not
//! exist on a PC.

#[cfg(test)]
mod tests;

use anykvm_abi::kvm_pic_state;

/// The master's input that the slave drives.
const CASCADE: u8 = 2;

/// ICW1 (write to the even port with this bit set): starts the initialisation sequence.
const ICW1: u8 = 1 << 4;
/// ICW1: ICW4 follows.
const ICW1_IC4: u8 = 1 << 0;
/// OCW3 (even port, ICW1 clear).
const OCW3: u8 = 1 << 3;
const OCW3_READ_REGISTER: u8 = 1 << 1;
const OCW3_READ_ISR: u8 = 1 << 0;
const OCW3_POLL: u8 = 1 << 2;
const OCW3_SET_SPECIAL_MASK: u8 = 1 << 6;
const OCW3_SPECIAL_MASK: u8 = 1 << 5;
const ICW4_AUTO_EOI: u8 = 1 << 1;
const ICW4_SPECIAL_FULLY_NESTED: u8 = 1 << 4;

/// What an 8259 expects at its odd port: OCW1, or the next word of the initialisation sequence
/// (`kvm_pic_state.init_state`).
const INIT_DONE: u8 = 0;
const INIT_ICW2: u8 = 1;
const INIT_ICW3: u8 = 2;
const INIT_ICW4: u8 = 3;

/// Which inputs can be level-triggered: not the timer, keyboard, cascade, RTC or FPU.
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];

/// What an access to the pair caused that others have to hear of, once the pair is unlocked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PicEffects {
    /// Inputs whose interrupt was acknowledged.
    pub acked: u16,
    /// Inputs unmasked.
    pub unmasked: u16,
    /// The pair's INTR output went high.
    pub raised: bool,
}

/// Master and slave.
pub(crate) struct PicPair {
    state: [kvm_pic_state; 2],
    /// For each input the sources that hold it high, one bit each.
    line_sources: [u64; 16],
    output: bool,
    effects: PicEffects,
}

impl PicPair {
    pub fn new() -> Self {
        let chip = |index: usize| kvm_pic_state {
            elcr_mask: ELCR_MASK[index],
            ..Default::default()
        };
        Self {
            state: [chip(0), chip(1)],
            line_sources: [0; 16],
            output: false,
            effects: PicEffects::default(),
        }
    }

    /// The INTR pin.
    pub fn output(&self) -> bool {
        self.output
    }

    /// What happened since the last call.
    pub fn take_effects(&mut self) -> PicEffects {
        std::mem::take(&mut self.effects)
    }

    /// Drives input `pin` (0..16) from one source. 1: new request, 0: it was pending already,
    /// -1: masked.
    pub fn set_irq(&mut self, pin: usize, source: u32, level: bool) -> i32 {
        let Some(sources) = self.line_sources.get_mut(pin) else {
            return -1;
        };
        let bit = 1u64 << (source & 63);
        if level {
            *sources |= bit;
        } else {
            *sources &= !bit;
        }
        let level = *sources != 0;
        let result = self.set_input(pin >> 3, pin as u8 & 7, level);
        self.update_output();
        result
    }

    fn set_input(&mut self, chip: usize, irq: u8, level: bool) -> i32 {
        let s = &mut self.state[chip];
        let mask = 1u8 << irq;
        let mut result = 1;
        if s.elcr & mask != 0 {
            if level {
                result = i32::from(s.irr & mask == 0);
                s.irr |= mask;
                s.last_irr |= mask;
            } else {
                s.irr &= !mask;
                s.last_irr &= !mask;
            }
        } else if level {
            if s.last_irr & mask == 0 {
                result = i32::from(s.irr & mask == 0);
                s.irr |= mask;
            }
            s.last_irr |= mask;
        } else {
            s.last_irr &= !mask;
        }
        if s.imr & mask != 0 { -1 } else { result }
    }

    /// Rank (0 highest) of the highest-priority input in `mask`; `None` if it is empty.
    fn priority(s: &kvm_pic_state, mask: u8) -> Option<u8> {
        (0..8).find(|rank| mask & 1 << ((rank + (s.priority_add & 7)) % 8) != 0)
    }

    /// The input this chip wants served: the highest request above everything in service.
    fn request(&self, chip: usize) -> Option<u8> {
        let s = &self.state[chip];
        let rank = Self::priority(s, s.irr & !s.imr)?;
        let mut in_service = s.isr;
        if s.special_mask != 0 {
            in_service &= !s.imr;
        }
        // In special fully nested mode the slave may interrupt its own service.
        if chip == 0 && s.special_fully_nested_mode != 0 {
            in_service &= !(1 << CASCADE);
        }
        match Self::priority(s, in_service) {
            Some(current) if rank >= current => None,
            _ => Some((rank + (s.priority_add & 7)) % 8),
        }
    }

    fn update_output(&mut self) {
        if self.request(1).is_some() {
            // The slave's INT is an edge to the master for each evaluation.
            self.set_input(0, CASCADE, true);
            self.set_input(0, CASCADE, false);
        }
        let level = self.request(0).is_some();
        self.effects.raised |= level && !self.output;
        self.output = level;
    }

    /// The INTA cycles: takes the highest request into service and gives its vector; the spurious
    /// vector (input 7) if the request has gone.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.request(0) {
            Some(CASCADE) => {
                self.take_into_service(0, CASCADE);
                let irq = self.request(1);
                if let Some(irq) = irq {
                    self.take_into_service(1, irq);
                }
                self.state[1].irq_base.wrapping_add(irq.unwrap_or(7))
            }
            Some(irq) => {
                self.take_into_service(0, irq);
                self.state[0].irq_base.wrapping_add(irq)
            }
            None => self.state[0].irq_base.wrapping_add(7),
        };
        self.update_output();
        vector
    }

    fn take_into_service(&mut self, chip: usize, irq: u8) {
        let s = &mut self.state[chip];
        s.isr |= 1 << irq;
        if s.elcr & (1 << irq) == 0 {
            s.irr &= !(1 << irq);
        }
        if s.auto_eoi != 0 {
            if s.rotate_on_auto_eoi != 0 {
                s.priority_add = (irq + 1) & 7;
            }
            self.end_of_interrupt(chip, irq);
        }
    }

    fn end_of_interrupt(&mut self, chip: usize, irq: u8) {
        self.state[chip].isr &= !(1 << irq);
        self.effects.acked |= 1 << (chip as u8 * 8 + irq);
    }

    /// A byte written to 20H, 21H, A0H, A1H, 4D0H or 4D1H. `ack_dropped`: some vCPU listens to the
    /// PIC, so edges that ICW1 throws away count as acknowledged.
    pub fn write(&mut self, port: u16, value: u8, ack_dropped: bool) {
        match port {
            0x4d0 | 0x4d1 => {
                let s = &mut self.state[usize::from(port & 1)];
                s.elcr = value & s.elcr_mask;
            }
            _ => {
                let chip = usize::from(port >> 7 & 1);
                if port & 1 != 0 {
                    self.write_odd(chip, value);
                } else if value & ICW1 != 0 {
                    self.write_icw1(chip, value, ack_dropped);
                } else if value & OCW3 != 0 {
                    self.write_ocw3(chip, value);
                } else {
                    self.write_ocw2(chip, value);
                }
            }
        }
    }

    fn write_icw1(&mut self, chip: usize, value: u8, ack_dropped: bool) {
        let s = &mut self.state[chip];
        let dropped = s.irr & !s.elcr;
        s.init4 = u8::from(value & ICW1_IC4 != 0);
        s.last_irr = 0;
        s.irr &= s.elcr;
        s.imr = 0;
        s.priority_add = 0;
        s.special_mask = 0;
        s.read_reg_select = 0;
        if s.init4 == 0 {
            s.special_fully_nested_mode = 0;
            s.auto_eoi = 0;
        }
        s.init_state = INIT_ICW2;
        if ack_dropped {
            (0..8)
                .filter(|irq| dropped & (1 << irq) != 0)
                .for_each(|irq| self.end_of_interrupt(chip, irq));
        }
    }

    fn write_ocw3(&mut self, chip: usize, value: u8) {
        let s = &mut self.state[chip];
        if value & OCW3_POLL != 0 {
            s.poll = 1;
        }
        if value & OCW3_READ_REGISTER != 0 {
            s.read_reg_select = value & OCW3_READ_ISR;
        }
        if value & OCW3_SET_SPECIAL_MASK != 0 {
            s.special_mask = u8::from(value & OCW3_SPECIAL_MASK != 0);
            self.update_output();
        }
    }

    /// OCW2: bits 7:5 are rotate, specific, EOI; bits 2:0 the level a specific command is about.
    fn write_ocw2(&mut self, chip: usize, value: u8) {
        let s = &mut self.state[chip];
        let (rotate, specific, eoi) = (value & 0x80 != 0, value & 0x40 != 0, value & 0x20 != 0);
        let level = value & 7;
        match (specific, eoi) {
            (false, false) => s.rotate_on_auto_eoi = u8::from(rotate),
            (true, false) if rotate => {
                s.priority_add = (level + 1) & 7;
                self.update_output();
            }
            (true, false) => {}
            (_, true) => {
                let irq = if specific {
                    Some(level)
                } else {
                    Self::priority(s, s.isr).map(|rank| (rank + (s.priority_add & 7)) % 8)
                };
                if let Some(irq) = irq {
                    if rotate {
                        s.priority_add = (irq + 1) & 7;
                    }
                    self.end_of_interrupt(chip, irq);
                    self.update_output();
                }
            }
        }
    }

    fn write_odd(&mut self, chip: usize, value: u8) {
        let s = &mut self.state[chip];
        match s.init_state {
            INIT_ICW2 => {
                s.irq_base = value & 0xf8;
                s.init_state = INIT_ICW3;
            }
            INIT_ICW3 => {
                s.init_state = if s.init4 != 0 { INIT_ICW4 } else { INIT_DONE };
            }
            INIT_ICW4 => {
                s.special_fully_nested_mode = u8::from(value & ICW4_SPECIAL_FULLY_NESTED != 0);
                s.auto_eoi = u8::from(value & ICW4_AUTO_EOI != 0);
                s.init_state = INIT_DONE;
            }
            _ => {
                self.effects.unmasked |= u16::from(s.imr & !value) << (chip * 8);
                s.imr = value;
                self.update_output();
            }
        }
    }

    /// A byte read from 20H, 21H, A0H, A1H, 4D0H or 4D1H.
    pub fn read(&mut self, port: u16) -> u8 {
        if port & 0x400 != 0 {
            return self.state[usize::from(port & 1)].elcr;
        }
        let chip = usize::from(port >> 7 & 1);
        if self.state[chip].poll != 0 {
            self.state[chip].poll = 0;
            return self.poll(chip);
        }
        let s = &self.state[chip];
        match (port & 1, s.read_reg_select) {
            (0, 0) => s.irr,
            (0, _) => s.isr,
            _ => s.imr,
        }
    }

    /// The read after a poll command acknowledges and ends the interrupt in one.
    fn poll(&mut self, chip: usize) -> u8 {
        let Some(irq) = self.request(chip) else {
            self.update_output();
            return 0x07;
        };
        if chip == 1 {
            self.state[0].isr &= !(1 << CASCADE);
            self.state[0].irr &= !(1 << CASCADE);
        }
        self.state[chip].irr &= !(1 << irq);
        self.end_of_interrupt(chip, irq);
        if chip == 1 || irq != CASCADE {
            self.update_output();
        }
        irq
    }

    /// KVM_GET_IRQCHIP.
    pub fn state(&self, chip: usize) -> Option<kvm_pic_state> {
        self.state.get(chip).copied()
    }

    /// KVM_SET_IRQCHIP.
    pub fn set_state(&mut self, chip: usize, state: &kvm_pic_state) -> Option<()> {
        *self.state.get_mut(chip)? = *state;
        self.update_output();
        Some(())
    }
}
