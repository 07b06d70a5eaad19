//! Why a machine could not be started: one line each, naming the file where there is one.

use std::fmt::Display;
use std::path::PathBuf;

/// A reason not to start. All of them are the caller's to mend and end with exit code 2, except those
/// that [`BootError::is_internal`] tells apart.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("kernel {path}: {reason}", path = .path.display())]
    Kernel { path: PathBuf, reason: String },
    #[error("initrd {path}: {reason}", path = .path.display())]
    Initrd { path: PathBuf, reason: String },
    #[error("disk {path}: {reason}", path = .path.display())]
    Disk { path: PathBuf, reason: String },
    #[error("--mem: {0}")]
    Memory(String),
    #[error("--cpus: {0}")]
    Cpus(String),
    #[error("--append: {0}")]
    CommandLine(String),
    #[error("{0}")]
    Translation(String),
    #[error("{what}: {error}")]
    Host { what: &'static str, error: String },
}

impl BootError {
    /// Not the caller's fault.
    pub fn is_internal(&self) -> bool {
        matches!(self, Self::Host { .. })
    }

    /// For `map_err` on a call to the host or to KVM.
    pub fn host<E: Display>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Host {
            what,
            error: error.to_string(),
        }
    }
}
