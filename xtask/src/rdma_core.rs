//! A newer rdma-core for the guest than the host may have: Debian 12's 44 knows no RDMA FLUSH (it came
//! with 45), Debian 13's 56 does. Its libraries, and the C library that they want, lie over the host's
//! for the programs that `newer-rdma-core` starts (guest-init.sh).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::debian::{Apt, Package, Store, package};

/// Debian 13.
const SUITE: &str = "trixie";
/// Where it lies in the cache.
const STORE: &str = "rdma-core";
/// The first names the tree. Newer libraries of C run what was built with older ones.
const PACKAGES: [&str; 5] =
    ["libibverbs1", "ibverbs-providers", "libnl-3-200", "libnl-route-3-200", "libc6"];
/// Where the packages have their libraries, and the host its own.
pub(crate) const HOST_LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";

/// The cached libraries, fetched if there are none.
pub(crate) fn get() -> Result<PathBuf> {
    let store = Store::open(STORE)?;
    store.get(SUITE, || fetch(&store))
}

/// Those that the suite has now, fetched if they are not the cached ones.
pub(crate) fn update() -> Result<PathBuf> {
    let store = Store::open(STORE)?;
    let _lock = store.lock()?;
    fetch(&store)
}

fn fetch(store: &Store) -> Result<PathBuf> {
    let tree = store.fetch(SUITE, SUITE, packages, arrange)?;
    eprintln!("fetch: rdma-core of {SUITE} is in {}", tree.display());
    Ok(tree)
}

fn packages(apt: &Apt) -> Result<Vec<Package>> {
    PACKAGES.iter().map(|name| package(name, &apt.record(name)?)).collect()
}

/// The tree is the libraries' folder.
fn arrange(debs: &Path, tree: &Path) -> Result<()> {
    fs::rename(debs.join(HOST_LIBRARIES.trim_start_matches('/')), tree)
        .with_context(|| format!("the packages of {SUITE} have nothing in {HOST_LIBRARIES}"))?;
    for library in ["libibverbs.so.1", "libc.so.6"] {
        ensure!(tree.join(library).is_file(), "the packages of {SUITE} have no {library}");
    }
    Ok(())
}
