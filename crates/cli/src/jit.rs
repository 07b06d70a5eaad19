//! Options about the translation of guest code, which `anykvm boot` gives to its VM and `anykvm run`
//! to the command's, through the environment.

use std::path::PathBuf;
use std::process::Command;

use anykvm::{Translation, TranslationMode, cache_size};

/// The options.
#[derive(clap::Args)]
pub struct JitArgs {
    /// When guest code is translated to host code: off, on (when it is hot), always (before it first
    /// runs), count (as on, and instructions are counted), lockstep (as always, and all that is
    /// executed is compared with the interpreter)
    #[arg(long, value_name = "WHEN")]
    jit: Option<TranslationMode>,

    /// Limit of a VM's translated code: 64M, not less than 1M
    #[arg(long, value_name = "SIZE", value_parser = cache_size)]
    jit_cache: Option<usize>,

    /// List the hottest blocks of guest code in this file, with what they were translated to; FILE.1 and
    /// so on for further processors
    #[arg(long, value_name = "FILE")]
    jit_report: Option<PathBuf>,
}

impl JitArgs {
    /// What the options say, and where they say nothing the environment.
    pub fn translation(&self) -> Result<Translation, String> {
        let mut how = Translation::from_env()?;
        how.mode = self.jit.unwrap_or(how.mode);
        how.cache = self.jit_cache.unwrap_or(how.cache);
        how.report = self.jit_report.clone().or(how.report);
        Ok(how)
    }

    /// Hands the options on to a command.
    pub fn hand_on(&self, command: &mut Command) {
        if let Some(mode) = self.jit {
            command.env("ANYKVM_JIT", mode.name());
        }
        if let Some(size) = self.jit_cache {
            command.env("ANYKVM_JIT_CACHE", size.to_string());
        }
        if let Some(path) = &self.jit_report {
            command.env("ANYKVM_JIT_REPORT", path);
        }
    }
}
