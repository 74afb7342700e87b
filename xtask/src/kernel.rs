//! Debian's generic kernels, fetched through the suite's meta package.

use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::debian::{Apt, Package, Store, package, run, value};
use crate::paths;

/// Where they lie in the cache.
const STORE: &str = "kernels";
const META_PACKAGE: &str = "linux-image-amd64";

/// A kernel that the lab can boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// trixie-backports: ODP on fs-DAX and delegations
    Newest,
    /// Debian 13's kernel, 6.12
    Trixie,
    /// Debian 12's kernel, 6.1
    Bookworm,
}

impl Suite {
    fn in_archive(self) -> &'static str {
        match self {
            Suite::Newest => "trixie-backports",
            Suite::Trixie => "trixie",
            Suite::Bookworm => "bookworm",
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Suite::Newest => "newest",
            Suite::Trixie => "trixie",
            Suite::Bookworm => "bookworm",
        })
    }
}

/// An unpacked kernel: `vmlinuz` and a tree for `modprobe -d`.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// What `uname -r` says in the guest.
    pub(crate) release: String,
    /// The root of the module tree.
    pub(crate) tree: PathBuf,
}

impl Kernel {
    /// The cached kernel of `suite`, fetched if there is none.
    pub(crate) fn get(suite: Suite) -> Result<Kernel> {
        let store = Store::open(STORE)?;
        let tree = store.get(&suite.to_string(), || fetch(&store, suite))?;
        Kernel::at(tree)
    }

    /// The kernel that the suite has now, fetched if it is not the cached one.
    pub(crate) fn update(suite: Suite) -> Result<Kernel> {
        let store = Store::open(STORE)?;
        let _lock = store.lock()?;
        Kernel::at(fetch(&store, suite)?)
    }

    /// The kernel image.
    pub(crate) fn image(&self) -> PathBuf {
        self.tree.join("vmlinuz")
    }

    /// The folder of `modules.dep`.
    pub(crate) fn modules(&self) -> PathBuf {
        self.tree.join("usr/lib/modules").join(&self.release)
    }

    fn at(tree: PathBuf) -> Result<Kernel> {
        let release = only_entry(&tree.join("usr/lib/modules"))
            .with_context(|| format!("no modules in {}: remove it", tree.display()))?;
        Ok(Kernel { release, tree })
    }
}

/// Brings the suite's kernel into the cache; the lock is held.
fn fetch(store: &Store, suite: Suite) -> Result<PathBuf> {
    let tree = store.fetch(&suite.to_string(), suite.in_archive(), kernel_packages, arrange)?;
    eprintln!("fetch: kernel {suite} is in {}", tree.display());
    Ok(tree)
}

/// The packages that hold image and modules: one in older suites, split in newer ones.
fn kernel_packages(apt: &Apt) -> Result<Vec<Package>> {
    let mut found: Vec<Package> = Vec::new();
    let mut wanted = vec![META_PACKAGE.to_owned()];
    while let Some(name) = wanted.pop() {
        if found.iter().any(|package| package.name == name) {
            continue;
        }
        let record = apt.record(&name)?;
        wanted.extend(kernel_dependencies(&record));
        if name != META_PACKAGE {
            found.push(package(&name, &record)?);
        }
    }
    ensure!(!found.is_empty(), "{META_PACKAGE} depends on no kernel");
    Ok(found)
}

/// Puts image and modules where they are looked for, whatever the suite's own layout is.
fn arrange(debs: &Path, tree: &Path) -> Result<()> {
    let usr_merged = debs.join("usr/lib/modules");
    let modules = if usr_merged.is_dir() { usr_merged } else { debs.join("lib/modules") };
    let release = only_entry(&modules)
        .with_context(|| format!("no single kernel release in {}", modules.display()))?;
    fs::create_dir_all(tree.join("usr/lib"))?;
    fs::rename(&modules, tree.join("usr/lib/modules")).context("cannot move the modules")?;
    // kmod looks below lib or usr/lib, as its distribution is merged or not.
    symlink("usr/lib", tree.join("lib"))?;
    // Split kernels keep the image beside their modules.
    let split = tree.join("usr/lib/modules").join(&release).join("vmlinuz");
    let whole = debs.join(format!("boot/vmlinuz-{release}"));
    let image = if split.is_file() { split } else { whole };
    fs::rename(image, tree.join("vmlinuz")).context("the kernel's packages hold no image")?;
    run(Command::new(paths::program("depmod").context("depmod is missing")?)
        .args(["-C", "/dev/null", "-b"])
        .arg(tree)
        .arg(&release))
}

/// Names of packages in `Depends` that are parts of a kernel.
fn kernel_dependencies(record: &str) -> Vec<String> {
    let names = value(record, "Depends").unwrap_or_default().split(',');
    names
        .filter_map(|dependency| dependency.split_whitespace().next())
        .filter(|name| {
            ["linux-image-", "linux-base-", "linux-binary-", "linux-modules-"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        })
        .map(str::to_owned)
        .collect()
}

fn only_entry(dir: &Path) -> Option<String> {
    let mut entries = fs::read_dir(dir).ok()?.flatten();
    let entry = entries.next()?;
    let alone = entries.next().is_none();
    alone.then(|| entry.file_name().into_string().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPLIT: &str = "Package: linux-image-7.2.1-amd64\nVersion: 7.2.1-1\nSize: 1900\n\
        Depends: dracut | initramfs-tools (>= 0.1), linux-base-7.2.1-amd64 (= 7.2.1-1), \
        linux-binary-7.2.1-amd64 (= 7.2.1-1), linux-modules-7.2.1-amd64 (= 7.2.1-1)\n";

    #[test]
    fn a_split_kernel_is_followed_to_its_parts() {
        assert_eq!(
            kernel_dependencies(SPLIT),
            ["linux-base-7.2.1-amd64", "linux-binary-7.2.1-amd64", "linux-modules-7.2.1-amd64"]
        );
    }

    #[test]
    fn a_whole_kernel_has_no_parts() {
        let record =
            "Depends: kmod, linux-base (>= 4.3~), initramfs-tools | linux-initramfs-tool\n";
        assert!(kernel_dependencies(record).is_empty());
    }
}
