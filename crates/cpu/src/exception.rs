//! From an event to its handler: exception classes, double and triple faults, payloads (SDM Vol. 3,
//! ch. 6). What happens at the gate is in [`crate::interrupt`].

use crate::cpu::Cpu;
use crate::debug::{DEBUGCTL_BTF, DEBUGCTL_LBR, DR6_BD, DR6_BREAKPOINTS, DR6_FIXED, DR7_GD};
use crate::decode::Insn;
use crate::events::vector;
use crate::exit::{Fault, Stop};
use crate::state::rflags;

/// Where an event comes from: it decides privilege checks, the EXT bit of error codes and the
/// RFLAGS.RF that is saved (the interruption types of SDM Vol. 3, table 25-17).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// An external interrupt.
    Interrupt,
    /// A non-maskable interrupt.
    Nmi,
    /// An exception the processor detected.
    Exception,
    /// INT n.
    SoftwareInterrupt,
    /// INT1.
    PrivilegedSoftwareException,
    /// INT3 and INTO.
    SoftwareException,
}

/// An event to deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Where it comes from.
    pub kind: EventKind,
    /// Vector.
    pub vector: u8,
    /// Error code, for exceptions that push one.
    pub error_code: Option<u32>,
    /// #PF: the value for CR2. #DB: the DR6 bits, active high. `None` when the register holds it
    /// already.
    pub payload: Option<u64>,
}

impl Event {
    /// An external interrupt.
    pub fn interrupt(vector: u8) -> Self {
        Self {
            kind: EventKind::Interrupt,
            vector,
            error_code: None,
            payload: None,
        }
    }
    /// An NMI.
    pub fn nmi() -> Self {
        Self {
            kind: EventKind::Nmi,
            vector: vector::NMI,
            error_code: None,
            payload: None,
        }
    }
    /// A software interrupt.
    pub fn software(vector: u8) -> Self {
        Self {
            kind: EventKind::SoftwareInterrupt,
            vector,
            error_code: None,
            payload: None,
        }
    }
    /// An exception.
    pub fn exception(vector: u8, error_code: Option<u32>, payload: Option<u64>) -> Self {
        let kind = match vector {
            vector::BP | vector::OF => EventKind::SoftwareException,
            _ => EventKind::Exception,
        };
        Self {
            kind,
            vector,
            error_code,
            payload,
        }
    }
    /// Not caused by INT n, INT3 or INTO: faults met while it is delivered have EXT set (SDM
    /// Vol. 3, 6.13).
    fn external(&self) -> bool {
        !self.software_checked()
    }
    /// The gate's DPL is compared with the CPL (SDM Vol. 3, 6.12.1.2).
    pub(crate) fn software_checked(&self) -> bool {
        matches!(
            self.kind,
            EventKind::SoftwareInterrupt | EventKind::SoftwareException
        )
    }
    fn class(&self) -> Class {
        if self.kind != EventKind::Exception {
            return Class::Benign;
        }
        match self.vector {
            vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
            vector::PF => Class::PageFault,
            vector::DF => Class::DoubleFault,
            _ => Class::Benign,
        }
    }
    /// Fault-class exceptions are saved with RF set, so that an instruction breakpoint does not
    /// fire again when the instruction is restarted; a #DB for an instruction breakpoint is not, one
    /// for an access to a debug register is (SDM Vol. 3, 18.3.1.1).
    pub(crate) fn saves_rf(&self) -> bool {
        self.kind == EventKind::Exception
            && match self.vector {
                vector::DB => self.payload.is_some_and(|bits| bits & DR6_BD != 0),
                vector::BP | vector::OF | vector::DF | vector::MC => false,
                _ => true,
            }
    }
}

/// Exception classes (SDM Vol. 3, table 6-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

/// What a second exception during the delivery of a first leads to (SDM Vol. 3, table 6-5 and the
/// triple fault of vector 8): the exception to deliver next, `None` for shutdown.
fn combine(first: &Event, second: Event) -> Option<Event> {
    let double = Event::exception(vector::DF, Some(0), None);
    match (first.class(), second.class()) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault) => None,
        (Class::Contributory, Class::Contributory) => Some(double),
        (Class::PageFault, Class::Contributory | Class::PageFault) => Some(double),
        _ => Some(second),
    }
}

/// More exceptions than can follow each other in one delivery if none comes twice: benign,
/// contributory or page fault, double fault.
const DELIVERY_TURNS: u32 = 8;

impl Cpu {
    /// Delivers an event: after `Ok` the handler's first instruction is next, or
    /// `events.triple_fault` is set. RIP must point where the handler is to return: at the
    /// instruction for faults, behind it for traps and interrupts.
    ///
    /// `Err` means that delivery met something other than a fault (memory that is no RAM); the
    /// state is then as before.
    ///
    /// A guest can make an exception that is raised again by its own delivery: #AC with a misaligned
    /// stack in a handler of CPL 3. A processor then does nothing else for ever; here the exception
    /// becomes pending after some turns, so that requests are seen.
    pub fn deliver(&mut self, event: Event) -> Result<(), Stop> {
        let mut event = event;
        for _ in 0..DELIVERY_TURNS {
            if let Some(payload) = event.payload {
                self.apply_payload(event.vector, payload);
            }
            if event.vector == vector::DB && event.kind == EventKind::Exception {
                self.enter_debug_handler();
            }
            let from = self.state.rip();
            self.delivering = true;
            let done = self.deliver_once(&event);
            self.delivering = false;
            match done {
                Ok(()) => {
                    self.record_event(from);
                    if event.kind == EventKind::Nmi {
                        self.state.events.nmi_masked = true;
                    }
                    return Ok(());
                }
                Err(Stop::Fault) => {
                    let second = self.fault;
                    // CR2 holds the address of the last page fault, even if it becomes a double or
                    // triple fault (SDM Vol. 3, 6.15, vector 8).
                    if second.vector == vector::PF {
                        self.apply_payload(vector::PF, second.payload);
                    }
                    let payload =
                        matches!(second.vector, vector::PF | vector::DB).then_some(second.payload);
                    let second = Event::exception(second.vector, second.error_code, payload);
                    match combine(&event, second) {
                        Some(next) => event = next,
                        None => {
                            self.state.events.triple_fault = true;
                            return Ok(());
                        }
                    }
                }
                Err(stop) => return Err(stop),
            }
        }
        self.queue_fault(Fault {
            vector: event.vector,
            error_code: event.error_code,
            payload: event.payload.unwrap_or(0),
            trap: false,
        });
        Ok(())
    }

    /// Takes one event through the IDT. Faults are left in `Cpu::fault` with EXT set as the event
    /// demands, and the state is as before.
    pub(crate) fn deliver_once(&mut self, event: &Event) -> Result<(), Stop> {
        let r = self.enter_handler(event);
        if r == Err(Stop::Fault) && event.external() {
            let fault = &mut self.fault;
            if matches!(
                fault.vector,
                vector::TS | vector::NP | vector::SS | vector::GP
            ) {
                fault.error_code = fault.error_code.map(|e| e | 1);
            }
        }
        r
    }

    /// Delivers the pending or injected exception. On `Err` it stays injected.
    pub(crate) fn inject_exception(&mut self) -> Result<(), Stop> {
        let e = &mut self.state.events.exception;
        e.pending = false;
        e.injected = true;
        let error_code = e.has_error_code.then_some(e.error_code);
        let payload = std::mem::take(&mut e.has_payload).then_some(e.payload);
        let event = Event::exception(e.vector, error_code, payload);
        self.deliver(event)?;
        self.state.events.exception.injected = false;
        Ok(())
    }

    /// Delivers the injected NMI. On `Err` it stays injected.
    pub(crate) fn inject_nmi(&mut self) -> Result<(), Stop> {
        self.deliver(Event::nmi())?;
        self.state.events.nmi_injected = false;
        Ok(())
    }

    /// Delivers the injected interrupt. On `Err` it stays injected.
    pub(crate) fn inject_interrupt(&mut self) -> Result<(), Stop> {
        let i = self.state.events.interrupt;
        let event = if i.soft {
            Event::software(i.vector)
        } else {
            Event::interrupt(i.vector)
        };
        self.deliver(event)?;
        self.state.events.interrupt.injected = false;
        Ok(())
    }

    /// Moves an exception's payload into its register.
    pub fn apply_payload(&mut self, vector: u8, payload: u64) {
        let s = &mut self.state;
        match vector {
            vector::PF => s.cr2 = payload,
            vector::DB => {
                // B0-B3 are rewritten, other bits only accumulate. The active-low bits are given
                // active high in the payload; bit 12 exists only there.
                s.dr6 = s.dr6 & !DR6_BREAKPOINTS | DR6_FIXED | payload;
                s.dr6 ^= payload & DR6_FIXED;
                s.dr6 &= !(1 << 12);
            }
            _ => {}
        }
    }

    /// What every debug exception does on its way to the handler: DR7.GD, so that the handler reaches
    /// the debug registers, and IA32_DEBUGCTL's LBR and BTF are cleared (SDM Vol. 3, 18.2.4, 18.4.3
    /// and 18.4.4).
    fn enter_debug_handler(&mut self) {
        self.state.dr7 &= !DR7_GD;
        self.state.msr.debugctl &= !(DEBUGCTL_LBR | DEBUGCTL_BTF);
    }

    /// The RFLAGS image that an event saves.
    pub(crate) fn saved_flags(&self, event: &Event) -> u64 {
        let rf = if event.saves_rf() { rflags::RF } else { 0 };
        self.state.rflags | rf
    }
}

/// INT n.
pub(crate) fn int_n(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let n = insn.imm as u8;
    if cpu.state.virtual_8086() && cpu.redirect_v86_interrupt(n)? {
        return Ok(());
    }
    cpu.deliver_once(&Event::software(n))
}

/// INT3. A debugger that has armed software breakpoints sees it first (the run loop turns the
/// exception into its exit).
pub(crate) fn int3(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    if cpu.guest_debug.software_breakpoints {
        return Err(cpu.raise_vector(vector::BP));
    }
    cpu.deliver_once(&Event::exception(vector::BP, None, None))
}

/// INT1 (ICEBP): #DB without a DR6 bit, no DPL check. Traps that wait behind a MOV SS are lost, as on
/// processors.
pub(crate) fn int1(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    cpu.deliver_once(&Event {
        kind: EventKind::PrivilegedSoftwareException,
        vector: vector::DB,
        error_code: None,
        payload: None,
    })?;
    cpu.enter_debug_handler();
    cpu.debug_hits = 0;
    Ok(())
}

/// INTO.
pub(crate) fn into(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    if cpu.state.rflags & rflags::OF == 0 {
        return Ok(());
    }
    cpu.deliver_once(&Event::exception(vector::OF, None, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(vector: u8) -> Event {
        Event::exception(vector, None, None)
    }

    // SDM Vol. 3, table 6-5.
    #[test]
    fn double_fault_table() {
        use vector::{AC, DE, DF, GP, NM, NP, PF, SS, TS, UD};
        let cases = [
            (UD, GP, Some(GP)),
            (AC, PF, Some(PF)),
            (NM, UD, Some(UD)),
            (DE, UD, Some(UD)),
            (DE, GP, Some(DF)),
            (TS, NP, Some(DF)),
            (GP, SS, Some(DF)),
            (GP, PF, Some(PF)),
            (PF, UD, Some(UD)),
            (PF, GP, Some(DF)),
            (PF, PF, Some(DF)),
            (DF, GP, None),
            (DF, PF, None),
        ];
        for (first, second, want) in cases {
            let got = combine(&fault(first), fault(second)).map(|e| e.vector);
            assert_eq!(got, want, "{first} then {second}");
        }
        assert_eq!(
            combine(&Event::interrupt(13), fault(GP)).map(|e| e.vector),
            Some(GP)
        );
        assert_eq!(
            combine(&Event::nmi(), fault(PF)).map(|e| e.vector),
            Some(PF)
        );
    }
}
