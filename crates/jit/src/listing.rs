//! Guest and host code as text.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};

/// One line an instruction: address, bytes, and what they mean in the syntax of the GNU assembler.
/// `bits`: 16, 32 or 64; `rip`: the address of the first byte.
pub fn listing(code: &[u8], bits: u32, rip: u64) -> String {
    let mut text = String::new();
    let mut formatter = GasFormatter::new();
    formatter
        .options_mut()
        .set_space_after_operand_separator(true);
    let mut decoder = Decoder::with_ip(bits, code, rip, DecoderOptions::NONE);
    while decoder.can_decode() {
        let start = decoder.position();
        let insn = decoder.decode();
        let mut hex = String::new();
        for byte in code.get(start..decoder.position()).unwrap_or_default() {
            let _ = write!(hex, "{byte:02x} ");
        }
        let mut words = String::new();
        formatter.format(&insn, &mut words);
        let _ = writeln!(text, "  {:8x}  {hex:<33} {words}", insn.ip());
    }
    text
}
