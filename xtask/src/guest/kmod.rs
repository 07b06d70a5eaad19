//! Finds kernel modules in an unpacked kernel package and the order to load them in, from the
//! `depends=` line in each module's `.modinfo` section (the package has no `modules.dep`: that file is
//! made on installation).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A kernel module and its file.
pub struct Module {
    pub name: String,
    pub path: PathBuf,
}

/// The modules of one kernel, by name.
pub struct Modules {
    paths: BTreeMap<String, PathBuf>,
}

impl Modules {
    /// Finds all modules below `root`, which is `lib/modules/VERSION/kernel` of a package.
    pub fn find(root: &Path) -> Result<Self> {
        let mut paths = BTreeMap::new();
        let mut folders = vec![root.to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
                let entry = entry?;
                let path = entry.path();
                if entry.file_type()?.is_dir() {
                    folders.push(path);
                } else if let Some(name) = path
                    .file_name()
                    .and_then(|name| name.to_str())
                    .and_then(|name| name.strip_suffix(".ko"))
                {
                    paths.insert(name.replace('-', "_"), path);
                }
            }
        }
        Ok(Self { paths })
    }

    /// The wanted modules and all they depend on, dependencies first.
    pub fn in_load_order(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        for name in wanted {
            self.visit(name, &mut order, 0)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, order: &mut Vec<Module>, depth: usize) -> Result<()> {
        if order.iter().any(|module| module.name == name) {
            return Ok(());
        }
        if depth > 32 {
            bail!("kernel module {name} depends on itself");
        }
        let path = self
            .paths
            .get(name)
            .with_context(|| format!("the kernel package has no module {name}"))?;
        let bytes = fs::read(path).with_context(|| path.display().to_string())?;
        for dependency in dependencies(&bytes) {
            self.visit(&dependency, order, depth + 1)?;
        }
        order.push(Module {
            name: name.to_owned(),
            path: path.clone(),
        });
        Ok(())
    }
}

/// The names in a module's `depends=` line.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[at + KEY.len()..];
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_from_modinfo() {
        assert_eq!(
            dependencies(b"\x7fELF..\0license=GPL\0depends=virtio,virtio-ring\0name=x\0"),
            ["virtio", "virtio_ring"]
        );
        assert!(dependencies(b"\0license=GPL\0depends=\0name=x\0").is_empty());
        assert!(dependencies(b"no such section").is_empty());
    }
}
