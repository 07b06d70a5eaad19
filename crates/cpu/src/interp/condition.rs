//! The sixteen conditions of Jcc, SETcc and CMOVcc (SDM Vol. 1, appendix B).

use crate::state::rflags::{CF, OF, PF, SF, ZF};

/// Whether condition `CC` (0 O, 1 NO, 2 B, … 15 G, as instructions encode it) holds.
#[inline(always)]
pub(super) fn holds<const CC: u8>(flags: u64) -> bool {
    // SF is bit 7, OF bit 11.
    let less = (flags ^ flags >> 4) & SF != 0;
    let met = match CC >> 1 {
        0 => flags & OF != 0,
        1 => flags & CF != 0,
        2 => flags & ZF != 0,
        3 => flags & (CF | ZF) != 0,
        4 => flags & SF != 0,
        5 => flags & PF != 0,
        6 => less,
        _ => less || flags & ZF != 0,
    };
    met != (CC & 1 != 0)
}

/// Picks the instance of a generic handler for an instruction's condition:
/// `by_condition!(raw, CC => f::<CC>)`.
macro_rules! by_condition {
    ($raw:expr, $cc:ident => $handler:expr) => {
        by_condition!(@ $raw, $cc => $handler;
            o 0, no 1, b 2, ae 3, e 4, ne 5, be 6, a 7, s 8, ns 9, p 10, np 11, l 12, ge 13, le 14, g 15)
    };
    (@ $raw:expr, $cc:ident => $handler:expr; $($name:ident $n:literal),*) => {
        match $raw.condition_code() {
            $(iced_x86::ConditionCode::$name => {
                const $cc: u8 = $n;
                Some($handler as $crate::decode::Handler)
            })*
            iced_x86::ConditionCode::None => None,
        }
    };
}

pub(super) use by_condition;
