//! Processors that are less than the host: QEMU's models, and Debian's 32-bit kernel.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::console::{Console, require_sound};
use super::{Bench, Needs, Test, qemu};
use crate::guest::Guest32;

const LIMIT: Duration = Duration::from_secs(20 * 60);

/// QEMU's models for the 64-bit kernel: the least, a named one, and all that there is.
const MODELS: &[&str] = &["qemu64", "Skylake-Server", "max"];
/// Kernel with PAE; models for it: one without long mode, and one that has more than it wants.
const MODELS_32: &[&str] = &["qemu32", "host"];

pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for &model in MODELS_32 {
        tests.push(test(&format!("linux32-{model}"), move |bench, test| {
            let guest = Guest32::prepare("linux-image-686-pae")?;
            check(bench, test, model, &guest.kernel, &guest.initramfs)
        }));
    }
    for &model in MODELS {
        tests.push(test(&format!("model-{model}"), move |bench, test| {
            let guest = bench.guest();
            check(bench, test, model, &guest.kernel, &guest.initramfs)
        }));
    }
    tests
}

fn test(name: &str, body: impl Fn(&Bench, &Test) -> Result<()> + Send + Sync + 'static) -> Test {
    Test {
        name: name.to_owned(),
        cpus: 1,
        limit: LIMIT,
        needs: Needs::Qemu,
        body: Box::new(body),
    }
}

fn check(bench: &Bench, test: &Test, model: &str, kernel: &Path, initramfs: &Path) -> Result<()> {
    let mut command = qemu::machine_of_model(bench, "q35", model);
    command
        .args(["-accel", "kvm", "-m", "512", "-nic", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-monitor", "none"])
        .args(["-append", "console=ttyS0 anykvm.task=check"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs);
    let outcome = qemu::run(bench, test, &mut command)?;
    require_sound(&Console(&outcome.output), test.cpus)
}
