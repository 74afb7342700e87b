//! Debian packages that building and the lab need, and how to get them.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{initramfs, mirror, paths};

/// How to see that a package's part is there, from whichever package.
enum Sign {
    Program(&'static str),
    /// A file whose name begins so, in one of the folders; `*` stands for one folder's name.
    File(&'static [&'static str], &'static str),
    StaticBusybox,
    /// Where kernels come from; only hosts without Debian sources need help.
    Mirror,
}

/// A package, what for, and its sign.
struct Need {
    package: &'static str,
    purpose: &'static str,
    sign: Sign,
}

const LIB: [&str; 2] = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64"];

const BUILD: [Need; 4] = [
    need("gcc", "linker, and compiler of the verbs binding", Sign::Program("cc")),
    need("cmake", "build of the verbs binding", Sign::Program("cmake")),
    need("pkg-config", "build of the verbs binding", Sign::Program("pkg-config")),
    need(
        "libclang-dev",
        "bindgen of the verbs binding",
        // Not libclang-cpp.so, which is another library.
        Sign::File(&["/usr/lib/llvm-*/lib", LIB[0], LIB[1]], "libclang.so"),
    ),
];

const LAB: [Need; 17] = [
    need("qemu-system-x86", "the guest", Sign::Program("qemu-system-x86_64")),
    need("busybox-static", "the guest's first user space", Sign::StaticBusybox),
    need("kmod", "the guest's modules", Sign::Program("modprobe")),
    need("kmod", "the guest's modules", Sign::Program("depmod")),
    need("xz-utils", "the guest's modules", Sign::Program("xz")),
    need("dpkg", "unpacking of kernels", Sign::Program("dpkg-deb")),
    need("apt", "download of kernels", Sign::Program("apt-get")),
    need("e2fsprogs", "ext4 with DAX", Sign::Program("mkfs.ext4")),
    need("xfsprogs", "XFS with DAX", Sign::Program("mkfs.xfs")),
    need("btrfs-progs", "btrfs without DAX", Sign::Program("mkfs.btrfs")),
    need("iproute2", "the soft NIC", Sign::Program("rdma")),
    need("dmsetup", "a disk that fails", Sign::Program("dmsetup")),
    need("libibverbs1", "RDMA", Sign::File(&LIB, "libibverbs.so.1")),
    need(
        "ibverbs-providers",
        "the soft NIC",
        Sign::File(&["/usr/lib/x86_64-linux-gnu/libibverbs", "/usr/lib64/libibverbs"], "librxe"),
    ),
    need("util-linux", "ends a guest with its starter", Sign::Program("setpriv")),
    need(
        "debian-archive-keyring",
        "signatures of kernels",
        Sign::File(&["/usr/share/keyrings"], "debian-archive-keyring.gpg"),
    ),
    need("debootstrap", "its default mirror", Sign::Mirror),
];

/// What bench/peers is compiled against, and what else stands beside us.
const BENCH: [Need; 5] = [
    need("gcc", "the bench's peers", Sign::Program("cc")),
    need(
        "libibverbs-dev",
        "the bench's peers",
        Sign::File(&["/usr/include/infiniband"], "verbs.h"),
    ),
    need("librpma-dev", "a peer of the bench", Sign::File(&["/usr/include"], "librpma.h")),
    need("perftest", "ib_write_bw and its like", Sign::Program("ib_write_bw")),
    need("valgrind", "counts instructions", Sign::Program("valgrind")),
];

const fn need(package: &'static str, purpose: &'static str, sign: Sign) -> Need {
    Need { package, purpose, sign }
}

impl Need {
    fn is_met(&self) -> bool {
        match &self.sign {
            Sign::Program(name) => paths::program(name).is_some(),
            Sign::File(dirs, prefix) => dirs.iter().any(|dir| holds(dir, prefix)),
            Sign::StaticBusybox => initramfs::busybox().is_ok(),
            Sign::Mirror => mirror::find().is_ok(),
        }
    }
}

/// `cargo xtask setup`: installs what is missing, where we may.
pub(crate) fn run(yes: bool) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "the lab's kernels are for x86_64 machines only");
    install(missing(BUILD.iter().chain(&LAB).chain(&BENCH)), yes)
}

/// The same without the lab.
pub(crate) fn run_for_build(yes: bool) -> Result<()> {
    install(missing(BUILD.iter()), yes)
}

fn install(missing: Vec<&Need>, yes: bool) -> Result<()> {
    if missing.is_empty() {
        println!("setup: nothing is missing");
        return Ok(());
    }
    for need in &missing {
        println!("setup: missing {} ({})", need.package, need.purpose);
    }
    let Some(prefix) = administrator() else {
        bail!("run this, then again what you did:\n  {}", install_line("", &missing));
    };
    let line = install_line(prefix, &missing);
    if !yes && !agreed(&line)? {
        bail!("not installed; the command is\n  {line}");
    }
    let status = Command::new("sh").arg("-c").arg(&line).status().context("sh did not start")?;
    ensure!(status.success(), "`{line}` ended with {status}");
    Ok(())
}

/// Fails with all that the lab misses here, and the one command that brings it.
pub(crate) fn require_lab() -> Result<()> {
    require("lab", missing(LAB.iter()))
}

/// The same for what is measured there.
pub(crate) fn require_bench() -> Result<()> {
    require("bench", missing(BENCH.iter()))
}

fn require(what: &str, missing: Vec<&Need>) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> =
        missing.iter().map(|need| format!("{} ({})", need.package, need.purpose)).collect();
    let prefix = administrator().unwrap_or_default();
    bail!("the {what} misses {}; run\n  {}", names.join(", "), install_line(prefix, &missing))
}

fn missing<'a>(needs: impl Iterator<Item = &'a Need>) -> Vec<&'a Need> {
    needs.filter(|need| !need.is_met()).collect()
}

/// What to put before a command that only root may run; None where we can't.
fn administrator() -> Option<&'static str> {
    if nix::unistd::geteuid().is_root() {
        return Some("");
    }
    paths::program("sudo").map(|_| "sudo ")
}

fn install_line(prefix: &str, missing: &[&Need]) -> String {
    let mut packages: Vec<_> = missing.iter().map(|need| need.package).collect();
    packages.sort_unstable();
    packages.dedup();
    // env, because sudo drops what is set before it.
    let get = format!("{prefix}env DEBIAN_FRONTEND=noninteractive apt-get -q");
    let packages = packages.join(" ");
    format!("{get} update && {get} install -y --no-install-recommends {packages}")
}

/// Asks on a terminal; a script or CI has no one to ask and goes ahead.
fn agreed(line: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Ok(true);
    }
    print!("setup: run `{line}`? [Y/n] ");
    std::io::stdout().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "" | "y" | "Y" | "yes"))
}

/// Whether a folder, given with at most one `*`, has a file whose name begins with `prefix`.
fn holds(dir: &str, prefix: &str) -> bool {
    expand(dir)
        .iter()
        .flat_map(fs::read_dir)
        .flatten()
        .flatten()
        .any(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix)))
}

fn expand(dir: &str) -> Vec<PathBuf> {
    let Some((before, after)) = dir.split_once('*') else { return vec![PathBuf::from(dir)] };
    let Some((parent, start)) = before.rsplit_once('/') else { return Vec::new() };
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(start)))
        .map(|entry| entry.path().join(after.trim_start_matches('/')))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_command_installs_each_package_once() {
        let needs = [&LAB[3], &LAB[2], &LAB[0]];
        let line = install_line("sudo ", &needs);
        assert!(line.ends_with("--no-install-recommends kmod qemu-system-x86"), "{line}");
        assert_eq!(line.matches("sudo ").count(), 2);
    }

    #[test]
    fn a_star_stands_for_one_folder() {
        assert!(holds("/proc/sel*/", "stat"));
        assert!(!holds("/proc/sel*/", "no-such-file"));
        assert!(!holds("/no-such-*/x", ""));
    }
}
