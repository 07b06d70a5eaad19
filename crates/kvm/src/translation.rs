//! Whether hot guest code is translated: the environment's `ANYKVM_JIT`.

use std::sync::Once;

use anykvm_cpu::translator::Translator;
use anykvm_jit::{Jit, Options};

/// The translator that `ANYKVM_JIT` asks for; nothing means `on`.
///
/// - `on`: blocks that have been interpreted a few times are translated.
/// - `off`: none, the interpreter does everything.
/// - `always`: every block is translated before it runs first.
/// - `count`: as `on`, and the instructions that translated code executes are counted, which costs
///   some speed.
///
/// What is wrong with it, or with the host, is said once on stderr.
pub fn from_env() -> Option<Box<dyn Translator>> {
    let wish = std::env::var_os("ANYKVM_JIT").unwrap_or_default();
    let mut options = Options::default();
    match wish.to_str() {
        Some("" | "on") => {}
        Some("off") => return None,
        Some("always") => options.threshold = 1,
        Some("count") => options.count = true,
        _ => {
            say_once(&format!(
                "ANYKVM_JIT={} is none of off, on, always and count: guest code is interpreted",
                wish.display()
            ));
            return None;
        }
    }
    Jit::new(options)
        .map(|jit| Box::new(jit) as Box<dyn Translator>)
        .inspect_err(|e| say_once(&format!("guest code is interpreted, not translated: {e}")))
        .ok()
}

fn say_once(what: &str) {
    static SAID: Once = Once::new();
    SAID.call_once(|| eprintln!("anykvm: {what}"));
}
