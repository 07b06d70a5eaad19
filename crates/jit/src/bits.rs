//! BT, BTS, BTR and BTC of a bit string in memory. A bit offset in a register is a signed number that may
//! reach far beyond the operand (SDM Vol. 2, BT): the operand that is accessed is as many operands away as the
//! offset divided by the operand's bits, rounded down.
//!
//! The host's own instruction does the same with the host's address of the operand that was named. Only the
//! check is of the one that is accessed.

use iced_x86::{Code, IcedError, Instruction, Mnemonic, OpKind, Register};

use crate::access::Checked;
use crate::asm::{indexed, slot};
use crate::legacy::low_half;
use crate::memory::{Address, Bytes};
use crate::regs::{Home, POINTER, SCRATCH, home};
use crate::shared::Slot;
use crate::translate::{Block, Site};

/// A bit offset that reaches beyond the operand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BitOffset {
    home: Home,
    /// The size of it and of the operand, in bytes.
    size: u32,
}

impl BitOffset {
    /// That of an instruction with an operand in memory, if it has one.
    pub fn of(raw: &Instruction) -> Option<Self> {
        use Mnemonic as M;
        let tests_bits = matches!(raw.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
        let far = tests_bits && raw.op1_kind() == OpKind::Register;
        far.then(|| Self {
            home: home(raw.op1_register().full_register().number()),
            size: raw.op1_register().size() as u32,
        })
    }
}

impl Block {
    /// The check of the operand that an instruction accesses whose own operand is at `address`, to which it is
    /// relative. May release the flags; destroys RCX and R15.
    pub fn check_bit_string(
        &mut self,
        address: &Address,
        offset: BitOffset,
        bytes: &Bytes,
        site: Site,
    ) -> Result<Checked, IcedError> {
        use Code as C;
        self.flags.release_by_scratch(&mut self.a)?;
        let exit = self.leave_from(&[], site);
        let a = &mut self.a;
        match offset.home {
            Home::Host(r) => a.mov(POINTER, r)?,
            Home::Spilled(s) => a.load(POINTER, slot(s))?,
        }
        match offset.size {
            2 => a.emit(C::Movsx_r64_rm16, POINTER, Register::CX)?,
            4 => a.emit(C::Movsxd_r64_rm32, POINTER, Register::ECX)?,
            _ => {}
        }
        let bits = 8 * offset.size;
        a.emit(C::Sar_rm64_imm8, POINTER, bits.trailing_zeros())?;
        address.compute(a, SCRATCH, 0)?;
        a.lea(SCRATCH, indexed(SCRATCH, POINTER, offset.size, 0))?;
        if address.is_narrow() {
            // The sum has 32 bits, which the host's has not.
            a.emit(C::Mov_r32_rm32, low_half(POINTER), low_half(SCRATCH))?;
            a.emit(C::Cmp_r64_rm64, POINTER, SCRATCH)?;
            let wraps = a.jne();
            self.exits.lead(wraps, exit);
        }
        self.a.store(slot(Slot::Target), SCRATCH)?;
        self.check_at(&Address::linear(Slot::Target), bytes, exit)?;
        Ok(Checked::alone(address, exit))
    }
}
