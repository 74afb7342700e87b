//! Whether KVM really runs a guest here. That /dev/kvm exists proves nothing: in some sandboxes
//! it opens and then hangs, so a short boot decides, once per boot of this machine.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::initramfs;
use crate::kernel::Kernel;
use crate::paths;
use crate::qemu::{Accel, Machine, Port};

/// Several times what a hardware boot to the initramfs needs.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// The way to run guests.
pub(crate) fn accel(kernel: &Kernel) -> Result<Accel> {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !has_virtualisation(&processor) || !is_open_to_us() {
        return Ok(Accel::Tcg);
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("no boot id")?;
    let verdict = paths::cache_dir()?.join("kvm");
    if let Some(known) = recorded(&fs::read_to_string(&verdict).unwrap_or_default(), boot.trim()) {
        return Ok(known);
    }
    let runs = probe(kernel)?;
    let found = if runs { Accel::Kvm } else { Accel::Tcg };
    eprintln!("lab: a test boot says that KVM {} here", if runs { "works" } else { "is unusable" });
    fs::write(&verdict, format!("{} {runs}\n", boot.trim()))
        .with_context(|| format!("cannot write {}", verdict.display()))?;
    Ok(found)
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")
}

/// Not remembered: somebody may join the group kvm.
fn is_open_to_us() -> bool {
    fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

fn recorded(verdict: &str, boot: &str) -> Option<Accel> {
    match verdict.trim().split_once(' ')? {
        (of, "true") if of == boot => Some(Accel::Kvm),
        (of, "false") if of == boot => Some(Accel::Tcg),
        _ => None,
    }
}

/// Boots to the initramfs, whose init answers on the console and powers off.
fn probe(kernel: &Kernel) -> Result<bool> {
    let initrd = paths::lab_dir()?.join(format!("kvm-probe-{}.cpio", std::process::id()));
    initramfs::write_probe(&initrd)?;
    let (console, far) = UnixStream::pair()?;
    console.set_read_timeout(Some(PROBE_LIMIT))?;
    let image = kernel.image();
    let channels = vec![(Port::Serial, far.into())];
    let machine = Machine {
        accel: Accel::Kvm,
        kernel: &image,
        initrd: &initrd,
        pmem_mib: 0,
        kept: None,
        channels,
    };
    let running = machine.start()?;
    let mut lines = BufReader::new(console).lines().map_while(Result::ok);
    let answered = lines.any(|line| line.contains("init: success"));
    drop(running);
    fs::remove_file(&initrd)?;
    Ok(answered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_says_whether_a_probe_is_worth_it() {
        assert!(has_virtualisation("model\t: x\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("flags\t\t: fpu svm\n"));
        assert!(!has_virtualisation("flags\t\t: fpu vmxnet\n"));
    }

    #[test]
    fn a_verdict_holds_for_one_boot() {
        assert_eq!(recorded("id-1 true\n", "id-1"), Some(Accel::Kvm));
        assert_eq!(recorded("id-1 false\n", "id-1"), Some(Accel::Tcg));
        assert_eq!(recorded("id-1 true\n", "id-2"), None);
        assert_eq!(recorded("", "id-1"), None);
    }
}
