//! The guest's initramfs with more in it: programs of Debian packages with the libraries they load,
//! programs of `tests/guest/programs`, drivers, files. The kernel unpacks archives that follow one another
//! into one tree, so what is added is an archive of its own behind the first.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

use super::cpio::{Archive, Node};
use super::{Guest, add_file, apt, write_whole};
use crate::workspace;

/// Where Debian has libraries, below the root of a tree of unpacked packages.
const LIBRARIES: &[&str] = &["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
/// The program interpreter of the x86-64 ABI; in Debian a link to the library of that name.
const INTERPRETER: &str = "lib64/ld-linux-x86-64.so.2";

/// An initramfs in the making.
pub struct Overlay<'a> {
    guest: &'a Guest,
    archive: Archive,
    /// What is in the archive already.
    present: BTreeSet<String>,
}

impl<'a> Overlay<'a> {
    pub fn new(guest: &'a Guest) -> Self {
        Self {
            guest,
            archive: Archive::default(),
            present: BTreeSet::new(),
        }
    }

    /// Adds programs, named by their paths in Debian packages, to the guest's `bin`, with the libraries they
    /// load. `tree` is the name of the packages' folder in the cache.
    pub fn programs(&mut self, tree: &str, packages: &[&str], programs: &[&str]) -> Result<()> {
        // Tests run side by side, and may want the same packages.
        static UNPACKING: Mutex<()> = Mutex::new(());
        let tree = self.guest.folder.join(tree);
        {
            let _one = UNPACKING.lock().unwrap();
            if !tree.exists() {
                apt::unpack_with_dependencies(packages, &tree)?;
            }
        }
        for program in programs {
            let path = tree.join(program);
            let name = path.file_name().context("a program has a name")?;
            self.add(&format!("bin/{}", name.to_string_lossy()), 0o755, &path)?;
            self.libraries(&tree, &path)?;
        }
        Ok(())
    }

    /// The libraries that `object` loads, and those that they load.
    fn libraries(&mut self, tree: &Path, object: &Path) -> Result<()> {
        for name in needed(object)? {
            let entry = format!("{}/{name}", LIBRARIES[0]);
            if self.present.contains(&entry) {
                continue;
            }
            let path = LIBRARIES
                .iter()
                .map(|folder| tree.join(folder).join(&name))
                .find(|path| path.exists())
                .with_context(|| format!("{} needs {name}", object.display()))?;
            self.directory(LIBRARIES[0]);
            self.add(&entry, 0o755, &path)?;
            self.libraries(tree, &path)?;
        }
        if self.present.insert(INTERPRETER.to_owned()) {
            let name = INTERPRETER.trim_start_matches("lib64/");
            self.directory("lib64");
            let target = format!("/{}/{name}", LIBRARIES[0]);
            self.archive.add(INTERPRETER, &Node::Symlink(&target));
        }
        Ok(())
    }

    /// Adds `tests/guest/programs/NAME.c`, compiled for 64 or 32 bits, as `bin/NAME`.
    pub fn compiled(&mut self, name: &str, bits: u32) -> Result<()> {
        // Tests run side by side, and may want the same program.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let output = self
            .guest
            .folder
            .join(format!("{name}.{}.{number}", std::process::id()));
        compile(name, bits, &output)?;
        self.add(&format!("bin/{name}"), 0o755, &output)?;
        fs::remove_file(&output).with_context(|| output.display().to_string())
    }

    /// Adds one file of the host.
    pub fn add(&mut self, name: &str, mode: u32, path: &Path) -> Result<()> {
        self.present.insert(name.to_owned());
        add_file(&mut self.archive, name, mode, path)
    }

    /// Adds a file with this text.
    pub fn text(&mut self, name: &str, text: &str) {
        let data = text.as_bytes();
        self.archive.add(name, &Node::File { mode: 0o644, data });
    }

    fn directory(&mut self, name: &str) {
        if self.present.insert(name.to_owned()) {
            self.archive.add(name, &Node::Directory);
        }
    }

    /// Writes the guest's archive and this one behind it.
    pub fn write(self, path: &Path) -> Result<PathBuf> {
        let base = &self.guest.initramfs;
        let mut image = fs::read(base).with_context(|| base.display().to_string())?;
        image.extend(self.archive.finish());
        write_whole(path, &image)?;
        Ok(path.to_path_buf())
    }
}

/// Compiles `tests/guest/programs/SOURCE.c` for 64 or 32 bits, without a C library.
pub fn compile(source: &str, bits: u32, output: &Path) -> Result<()> {
    let input = workspace().join(format!("tests/guest/programs/{source}.c"));
    let status = Command::new("cc")
        .args(["-O2", "-Wall", "-Werror", &format!("-m{bits}")])
        .args(["-static", "-no-pie", "-fno-pie", "-nostdlib"])
        .args(["-ffreestanding", "-fno-stack-protector"])
        // Linux's headers are the same for 32 bits, for which they are seldom installed.
        .args(["-idirafter", "/usr/include/x86_64-linux-gnu"])
        .arg(&input)
        .arg("-o")
        .arg(output)
        .status()
        .context("cannot start cc")?;
    if !status.success() {
        bail!("cannot compile {}", input.display());
    }
    Ok(())
}

/// The `NEEDED` entries of an ELF file's dynamic section.
fn needed(object: &Path) -> Result<Vec<String>> {
    let output = Command::new("objdump")
        .arg("-p")
        .arg(object)
        .output()
        .context("cannot start objdump")?;
    if !output.status.success() {
        bail!("objdump cannot read {}", object.display());
    }
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.trim().strip_prefix("NEEDED"))
        .map(|name| name.trim().to_owned())
        .collect())
}
