//! The initramfs: a static busybox, the modules that mount the host's root, and the guest's init.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::kernel::Kernel;

/// What the lab always needs: the host's root over virtio 9p, streams, pmem, DAX file systems,
/// soft RDMA. Unpacked here, because unpacking XFS in an emulated guest takes seconds. Anything
/// else is loaded from the host's cache, by the guest's modprobe.
const MODULES: [&str; 14] = [
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "libnvdimm",
    "nd_e820",
    "nd_pmem",
    "dax_pmem",
    "device_dax",
    "ext4",
    "xfs",
    "ib_uverbs",
    "rdma_ucm",
    "rdma_rxe",
];
/// Older kernels ask for these checksums by name, so that modules.dep does not know; newer ones
/// have them built in.
const OLD_CHECKSUMS: [&str; 2] = ["crc32c_generic", "crc32_generic"];
const BOOT_INIT: &str = include_str!("boot-init.sh");
const PROBE_INIT: &str = "#!/bin/busybox sh\n\
    /bin/busybox mount -t devtmpfs dev /dev\n\
    echo 'init: success' >/dev/console\n\
    /bin/busybox poweroff -f\n";
const GUEST_INIT: &str = include_str!("guest-init.sh");

/// Writes the archive: `settings` is a shell file that the scripts read, `command` what the guest
/// runs.
pub(crate) fn write(to: &Path, kernel: &Kernel, settings: &[u8], command: &[u8]) -> Result<()> {
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "root", "lab", "modules"] {
        archive.dir(dir);
    }
    let busybox = fs::read(busybox()?).context("cannot read busybox")?;
    archive.file("bin/busybox", 0o755, &busybox);
    archive.file("init", 0o755, BOOT_INIT.as_bytes());
    archive.file("lab/busybox", 0o755, &busybox);
    archive.file("lab/guest-init.sh", 0o755, GUEST_INIT.as_bytes());
    archive.file("lab/settings.sh", 0o644, settings);
    archive.file("lab/command.sh", 0o755, command);
    let mut order = String::new();
    for module in modules(kernel)? {
        let name = file_stem(&module);
        archive.file(
            &format!("modules/{name}.ko"),
            0o644,
            &module_bytes(&kernel.modules().join(module))?,
        );
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    fs::write(to, archive.finish()).with_context(|| format!("cannot write {}", to.display()))
}

/// Writes an archive whose init only says that it runs.
pub(crate) fn write_probe(to: &Path) -> Result<()> {
    let mut archive = Archive::new();
    archive.dir("bin");
    archive.dir("dev");
    archive.file("bin/busybox", 0o755, &fs::read(busybox()?).context("cannot read busybox")?);
    archive.file("init", 0o755, PROBE_INIT.as_bytes());
    fs::write(to, archive.finish()).with_context(|| format!("cannot write {}", to.display()))
}

/// The static busybox of the host: a dynamic one has no libraries in the initramfs.
pub(crate) fn busybox() -> Result<PathBuf> {
    let candidates = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    candidates
        .into_iter()
        .find(|file| fs::read(file).is_ok_and(|elf| is_static(&elf)))
        .context("no static busybox here")
}

/// A static ELF-64 file names no interpreter.
fn is_static(elf: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let half = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let headers = || {
        let start = u64::from_le_bytes(elf.get(32..40)?.try_into().ok()?);
        let (size, count) = (half(54)?, half(56)?);
        (0..usize::from(count))
            .map(|n| {
                let at = usize::try_from(start).ok()? + n * usize::from(size);
                Some(u32::from_le_bytes(elf.get(at..at + 4)?.try_into().ok()?))
            })
            .collect::<Option<Vec<_>>>()
    };
    elf.starts_with(b"\x7fELF\x02\x01") && headers().is_some_and(|all| !all.contains(&PT_INTERP))
}

/// Module files in loading order, from the guest's own tables: the host's configuration drops
/// what is built into the host's kernel.
fn modules(kernel: &Kernel) -> Result<Vec<String>> {
    let read = |name: &str| {
        let file = kernel.modules().join(name);
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    };
    let (dep, builtin) = (read("modules.dep")?, read("modules.builtin")?);
    let mut order = Vec::new();
    for name in OLD_CHECKSUMS {
        order.extend(closure(&dep, &builtin, &[name]).unwrap_or_default());
    }
    for module in closure(&dep, &builtin, &MODULES)? {
        if !order.contains(&module) {
            order.push(module);
        }
    }
    Ok(order)
}

/// Dependencies first, each once; what is built in is left out.
fn closure(dep: &str, builtin: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    for name in wanted {
        if builtin.lines().any(|path| file_stem(path) == canonical(name)) {
            continue;
        }
        let (path, needs) = dep
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| file_stem(path) == canonical(name))
            .with_context(|| format!("the kernel has no module {name}"))?;
        // modules.dep lists the whole closure, the deepest last.
        for module in needs.split_whitespace().rev().chain([path]) {
            if !order.iter().any(|known| known == module) {
                order.push(module.to_owned());
            }
        }
    }
    Ok(order)
}

/// `kernel/fs/9p/9p.ko.xz` is `9p`, with `_` for `-` as the kernel has it.
fn file_stem(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or(path);
    canonical(name.split_once(".ko").map_or(name, |(stem, _)| stem))
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn module_bytes(path: &Path) -> Result<Vec<u8>> {
    let unpack: &[&str] = match path.extension().map(OsStrExt::as_bytes) {
        Some(b"xz") => &["xz", "-dc"],
        Some(b"zst") => &["zstd", "-dc"],
        _ => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    };
    let output = Command::new(unpack[0]).args(&unpack[1..]).arg(path).output()?;
    ensure!(output.status.success(), "{} could not unpack {}", unpack[0], path.display());
    Ok(output.stdout)
}

/// A cpio archive of the "newc" kind, the kernel's own format.
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn new() -> Archive {
        Archive { bytes: Vec::new(), entries: 0 }
    }

    fn dir(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    fn file(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entry(name, 0o100_000 | mode, data);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    /// Thirteen fields of eight hex digits, the name, the data; name and data end on four bytes.
    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        let (size, name_size) = (data.len(), name.len() + 1);
        let links = 1;
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}\
             {:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}",
            self.entries, 0, 0, 0, 0, 0, 0, 0, 0
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz\n\
        kernel/net/9p/9pnet.ko.xz:\n\
        kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/drivers/virtio/virtio.ko.xz\n\
        kernel/lib/crc32-generic.ko.xz:\n";

    #[test]
    fn dependencies_come_first_and_once() {
        let order = closure(DEP, "", &["9pnet_virtio", "9p"]).unwrap();
        let names: Vec<_> = order.iter().map(|path| file_stem(path)).collect();
        assert_eq!(names, ["virtio", "9pnet", "9pnet_virtio", "netfs", "9p"]);
    }

    #[test]
    fn what_is_built_in_is_not_loaded() {
        let builtin = "kernel/drivers/virtio/virtio_pci.ko\n";
        assert!(closure(DEP, builtin, &["virtio_pci"]).unwrap().is_empty());
    }

    #[test]
    fn dash_and_underscore_are_one() {
        assert_eq!(closure(DEP, "", &["crc32_generic"]).unwrap().len(), 1);
    }

    #[test]
    fn a_missing_module_is_named() {
        let error = closure(DEP, "", &["rdma_rxe"]).unwrap_err();
        assert!(error.to_string().contains("rdma_rxe"));
    }

    #[test]
    fn entries_are_padded_to_four_bytes() {
        let mut archive = Archive::new();
        archive.file("init", 0o755, b"12345");
        let bytes = archive.finish();
        assert!(bytes.starts_with(b"070701000000010000"));
        assert_eq!(&bytes[110..115], b"init\0");
        assert_eq!(&bytes[116..121], b"12345");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn static_is_told_from_dynamic() {
        let mut elf = vec![0_u8; 64 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64] = 1;
        assert!(is_static(&elf));
        elf[64] = 3;
        assert!(!is_static(&elf));
        assert!(!is_static(b"#!/bin/sh"));
    }
}
