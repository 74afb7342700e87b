//! A disk whose writes fail when a test says so: a file of memory as a loop device, below a device-mapper
//! device (dmsetup(8)), with an ordinary file system on it.

use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::{FileSystem, shell};

/// Bytes of the disk: XFS takes no less than 300 MB.
const DISK_BYTES: u64 = 320 << 20;
/// What device mapper counts in.
const SECTOR: u64 = 512;
/// The guest has no udevd to make nodes in /dev/mapper.
const DMSETUP: &str = "DM_DISABLE_UDEV=1 dmsetup";
/// Data that a thin pool allocates at a time.
const THIN_BLOCK_SECTORS: u64 = 128;

static DISKS: AtomicU32 = AtomicU32::new(0);

/// A mounted file system on such a disk. Everything is taken down when it is dropped.
#[derive(Debug)]
pub struct FailingDisk {
    name: String,
    loop_device: String,
    /// Device-mapper devices, the uppermost last.
    devices: Vec<String>,
    image: tempfile::NamedTempFile,
    folder: tempfile::TempDir,
}

/// Where a file's bytes lie on its disk, in file order.
#[derive(Clone, Debug)]
pub struct Extents(Vec<Range<u64>>);

impl FailingDisk {
    /// Makes one that works so far.
    pub fn new(file_system: FileSystem) -> Self {
        let mut disk = Self::on_loop_device(DISK_BYTES);
        let name = disk.name.clone();
        let linear = format!("0 {} linear {} 0", DISK_BYTES / SECTOR, disk.loop_device);
        disk.create(&name, &linear);
        disk.make_and_mount(file_system);
        disk
    }

    /// Makes one on a thin pool of the same size, which [`fill`](Self::fill) uses up.
    pub fn thin(file_system: FileSystem) -> Self {
        const METADATA_SECTORS: u64 = (4 << 20) / SECTOR;
        let mut disk = Self::on_loop_device(DISK_BYTES + METADATA_SECTORS * SECTOR);
        let (name, sectors) = (disk.name.clone(), DISK_BYTES / SECTOR);
        let (meta, data) = (format!("{name}-meta"), format!("{name}-data"));
        disk.create(&meta, &format!("0 {METADATA_SECTORS} linear {} 0", disk.loop_device));
        let after = format!("0 {sectors} linear {} {METADATA_SECTORS}", disk.loop_device);
        disk.create(&data, &after);
        let pool = format!("{name}-pool");
        let of = format!("/dev/mapper/{meta} /dev/mapper/{data} {THIN_BLOCK_SECTORS} 0");
        disk.create(&pool, &format!("0 {sectors} thin-pool {of} 1 error_if_no_space"));
        shell(&format!("{DMSETUP} message {pool} 0 'create_thin 0'"));
        shell(&format!("{DMSETUP} message {pool} 0 'create_thin 1'"));
        disk.create(&format!("{name}-ballast"), &format!("0 {sectors} thin /dev/mapper/{pool} 1"));
        disk.create(&name, &format!("0 {sectors} thin /dev/mapper/{pool} 0"));
        disk.make_and_mount(file_system);
        disk
    }

    fn on_loop_device(bytes: u64) -> Self {
        shell("modprobe -a loop dm_mod dm_flakey dm_thin_pool");
        let image = tempfile::NamedTempFile::new_in(FileSystem::Tmpfs.mount_point()).unwrap();
        image.as_file().set_len(bytes).unwrap();
        let output = Command::new("losetup").args(["--find", "--show"]).arg(image.path()).output();
        let output = output.unwrap();
        assert!(output.status.success(), "losetup: {output:?}");
        let loop_device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        let number = DISKS.fetch_add(1, Ordering::Relaxed);
        let name = format!("failing-{}-{number}", std::process::id());
        let folder = tempfile::tempdir().unwrap();
        Self { name, loop_device, devices: Vec::new(), image, folder }
    }

    fn create(&mut self, name: &str, table: &str) {
        shell(&format!("{DMSETUP} create {name} --table '{table}'"));
        self.devices.push(name.to_owned());
    }

    fn make_and_mount(&self, file_system: FileSystem) {
        let (kind, device) = (file_system.kind(), format!("/dev/mapper/{}", self.name));
        let made = match file_system {
            FileSystem::Ext4 => "mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=0,lazy_journal_init=0",
            FileSystem::Xfs => "mkfs.xfs -q -f",
            FileSystem::Tmpfs => unreachable!("it lies on no disk"),
        };
        shell(&format!("{made} {device} && mount -t {kind} {device} {}", self.path("").display()));
    }

    /// A file on it, or its root.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where a file lies. Opens it.
    pub fn extents(&self, path: &Path) -> Extents {
        let output = Command::new("filefrag").args(["-v", "-b512"]).arg(path).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let extents = text.lines().filter_map(|line| {
            // `0:  0..  15:  2048..  2063:  16:`
            let mut words = line.split(':');
            words.next()?.trim().parse::<u64>().ok()?;
            let (start, end) = words.nth(1)?.split_once("..")?;
            let start: u64 = start.trim().parse().ok()?;
            let end: u64 = end.trim().parse().ok()?;
            Some(start * SECTOR..(end + 1) * SECTOR)
        });
        let extents: Vec<_> = extents.collect();
        assert!(!extents.is_empty(), "no extent in {text}");
        Extents(extents)
    }

    /// What the medium has there, whatever a cache says.
    pub fn medium(&self, extents: &Extents, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for extent in &extents.0 {
            let mut piece = vec![0; (extent.end - extent.start) as usize];
            self.image.as_file().read_exact_at(&mut piece, extent.start).unwrap();
            bytes.extend(piece);
        }
        bytes.truncate(len);
        bytes
    }

    /// From now on writes to these bytes fail with EIO; reads and all other writes go on.
    pub fn fail_writes(&self, extents: &Extents) {
        let mut extents: Vec<_> =
            extents.0.iter().map(|extent| extent.start / SECTOR..extent.end / SECTOR).collect();
        extents.sort_by_key(|extent| extent.start);
        let (mut table, mut at) = (String::new(), 0);
        let line = |range: Range<u64>, failing: bool| {
            let (kind, rest) = match failing {
                // Up for no second, down for the others.
                true => ("flakey", " 0 1 1 error_writes"),
                false => ("linear", ""),
            };
            let len = range.end - range.start;
            format!("{} {len} {kind} {} {}{rest}\n", range.start, self.loop_device, range.start)
        };
        for extent in extents {
            if at < extent.start {
                table += &line(at..extent.start, false);
            }
            at = extent.end;
            table += &line(extent, true);
        }
        table += &line(at..DISK_BYTES / SECTOR, false);
        self.load(&table);
    }

    /// From now on everything works again.
    pub fn heal(&self) {
        self.load(&format!("0 {} linear {} 0\n", DISK_BYTES / SECTOR, self.loop_device));
    }

    fn load(&self, table: &str) {
        let name = &self.name;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), table).unwrap();
        shell(&format!(
            "{DMSETUP} load {name} {} && {DMSETUP} suspend --nolockfs {name} && {DMSETUP} resume {name}",
            file.path().display()
        ));
    }

    /// Uses the thin pool up: what has no block there yet gets none (ENOSPC).
    pub fn fill(&self) {
        let ballast = format!("/dev/mapper/{}-ballast", self.name);
        let args = ["if=/dev/zero", &format!("of={ballast}"), "bs=1M", "oflag=direct"];
        let full = Command::new("dd").args(args).output().unwrap();
        assert!(!full.status.success(), "the pool takes all of it");
    }

    /// Has all dirty pages of the file system written back, by somebody who has no file open.
    pub fn write_back(&self) {
        // Fails where write-back does.
        let _ = Command::new("sync").arg("-f").arg(self.path("")).output().unwrap();
    }
}

impl Drop for FailingDisk {
    fn drop(&mut self) {
        let mut lines = vec![format!("umount {}", self.path("").display())];
        lines.extend(self.devices.iter().rev().map(|name| format!("{DMSETUP} remove {name}")));
        lines.push(format!("losetup --detach {}", self.loop_device));
        for line in lines {
            // A failing test leaves files open, and its guest ends.
            let status = Command::new("sh").args(["-ec", &line]).status();
            if !status.is_ok_and(|status| status.success()) {
                eprintln!("{line} failed");
            }
        }
    }
}
