//! Whether and how hot guest code is translated: what the environment says, and what a Rust program
//! sets with [`crate::VmFd::set_translation`].
//!
//! - `ANYKVM_JIT`: `off`, `on`, `always`, `count` or `lockstep` ([`TranslationMode`]).
//! - `ANYKVM_JIT_CACHE`: the limit of a VM's translated code, in bytes or with K, M or G behind it.
//! - `ANYKVM_JIT_REPORT`: a file for a list of the hottest blocks, with their code before and after
//!   translation.

use std::ffi::OsStr;
use std::fs::File;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Once};

use anykvm_cpu::translator::Translator;
use anykvm_jit::{Budget, Jit, Options};

/// When guest code is translated to host code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TranslationMode {
    /// Never: the interpreter does everything.
    Off,
    /// When it has been interpreted a few times.
    On,
    /// Before it runs first.
    Always,
    /// As `On`, and the instructions that translated code executes are counted, which costs some
    /// speed: a few percent, more in short loops.
    Count,
    /// As `Always`, and what translated code does is undone and done again by the interpreter. The first
    /// difference ends KVM_RUN with KVM_EXIT_INTERNAL_ERROR, and stderr says where it is. Many times slower;
    /// the VM's processors run one at a time.
    Lockstep,
}

impl TranslationMode {
    /// Names and modes.
    const NAMES: [(&str, Self); 5] = [
        ("off", Self::Off),
        ("on", Self::On),
        ("always", Self::Always),
        ("count", Self::Count),
        ("lockstep", Self::Lockstep),
    ];

    /// Its name in `ANYKVM_JIT`.
    pub fn name(self) -> &'static str {
        Self::NAMES
            .iter()
            .find(|(_, mode)| *mode == self)
            .map_or("", |(name, _)| name)
    }
}

impl FromStr for TranslationMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::NAMES
            .iter()
            .find(|(name, _)| *name == text)
            .map(|(_, mode)| *mode)
            .ok_or_else(|| {
                format!(
                    "'{text}' is none of {}",
                    Self::NAMES.map(|n| n.0).join(", ")
                )
            })
    }
}

/// How a VM's guest code is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Translation {
    /// When code is translated.
    pub mode: TranslationMode,
    /// Most bytes of translated code that the VM's processors keep, all together. When a processor's part of it is full, its translations
    /// are dropped and made anew. From [`Translation::MIN_CACHE`] to [`Translation::MAX_CACHE`].
    pub cache: usize,
    /// Where to write which blocks executed the most instructions, with the guest's code and the
    /// host's: this file for vCPU 0, and with `.1` and so on behind its name for the others. Written
    /// every few seconds and when the vCPU is gone. Counting costs some speed.
    pub report: Option<PathBuf>,
}

impl Default for Translation {
    fn default() -> Self {
        Self {
            mode: TranslationMode::On,
            cache: 64 << 20,
            report: None,
        }
    }
}

impl Translation {
    /// The least limit: 1 MiB.
    pub const MIN_CACHE: usize = 1 << 20;
    /// The greatest: 1 GiB, as far as branches may have to reach.
    pub const MAX_CACHE: usize = 1 << 30;

    /// What the environment asks for.
    pub fn from_env() -> Result<Self, String> {
        let mut translation = Self::default();
        if let Some(value) = variable("ANYKVM_JIT")? {
            translation.mode = value.parse().map_err(|e| format!("ANYKVM_JIT: {e}"))?;
        }
        if let Some(value) = variable("ANYKVM_JIT_CACHE")? {
            translation.cache =
                cache_size(&value).map_err(|e| format!("ANYKVM_JIT_CACHE={value}: {e}"))?;
        }
        translation.report = std::env::var_os("ANYKVM_JIT_REPORT")
            .filter(|path| !path.is_empty())
            .map(PathBuf::from);
        Ok(translation)
    }

    /// The report of vCPU `id`, created.
    fn report(&self, id: u32) -> Option<File> {
        let mut name = self.report.clone()?.into_os_string();
        if id != 0 {
            name.push(format!(".{id}"));
        }
        File::create(&name)
            .inspect_err(|e| say_once(&format!("{}: {e}", name.display())))
            .ok()
    }

    /// The limit that the VM's processors share.
    pub(crate) fn budget(&self) -> Arc<Budget> {
        Budget::new(self.cache)
    }

    /// A translator for vCPU `id`. Where the host does not allow one, that is said once on stderr,
    /// and guest code is interpreted. `by_count`: it can stop at any instruction; there is no lockstep then.
    pub(crate) fn translator(
        &self,
        id: u32,
        budget: &Arc<Budget>,
        by_count: bool,
    ) -> Option<Box<dyn Translator>> {
        let mut options = Options {
            cache: self.cache,
            by_count,
            ..Options::default()
        };
        match self.mode {
            TranslationMode::Off => return None,
            TranslationMode::On => {}
            TranslationMode::Always => options.threshold = 1,
            TranslationMode::Count => options.count = true,
            TranslationMode::Lockstep => (options.threshold, options.lockstep) = (1, !by_count),
        }
        let mut jit = Jit::with_budget(options, budget)
            .inspect_err(|e| say_once(&format!("guest code is interpreted, not translated: {e}")))
            .ok()?;
        if let Some(file) = self.report(id) {
            jit.report_to(file);
        }
        Some(Box::new(jit))
    }
}

/// A limit for translated code: bytes, or with K, M or G behind the number; at least
/// [`Translation::MIN_CACHE`].
pub fn cache_size(text: &str) -> Result<usize, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let size = digits
        .parse::<usize>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or("a size such as 64M or 1G is expected")?;
    if size < Translation::MIN_CACHE {
        return Err("a code cache of less than 1M is too small to work with".to_owned());
    }
    if size > Translation::MAX_CACHE {
        return Err(
            "branches in a code cache of more than 1G would not reach their targets".to_owned(),
        );
    }
    Ok(size)
}

/// An environment variable; set to nothing is as good as not set.
fn variable(name: &str) -> Result<Option<String>, String> {
    std::env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(|value| text(name, &value))
        .transpose()
}

fn text(name: &str, value: &OsStr) -> Result<String, String> {
    value
        .to_str()
        .map(str::to_owned)
        .ok_or_else(|| format!("{name}={} is no text", value.display()))
}

/// Says something on stderr, the first time.
pub(crate) fn say_once(what: &str) {
    static SAID: Once = Once::new();
    SAID.call_once(|| eprintln!("anykvm: {what}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_have_names() {
        for (name, mode) in TranslationMode::NAMES {
            assert_eq!(name.parse(), Ok(mode));
        }
        assert!("no".parse::<TranslationMode>().unwrap_err().contains("off"));
    }

    #[test]
    fn sizes() {
        assert_eq!(cache_size("1M"), Ok(1 << 20));
        assert_eq!(cache_size("2048k"), Ok(2 << 20));
        assert_eq!(cache_size("1048576"), Ok(1 << 20));
        assert!(cache_size("1023K").unwrap_err().contains("too small"));
        assert!(cache_size("64").unwrap_err().contains("too small"));
        assert!(cache_size("2G").is_err());
        for nonsense in ["", "M", "-1M", "1T", "99999999999G"] {
            assert!(
                cache_size(nonsense).unwrap_err().contains("64M"),
                "{nonsense}"
            );
        }
    }
}
