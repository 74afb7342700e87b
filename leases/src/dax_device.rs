//! Device-dax: persistent memory without a file system, as one character device (drivers/dax in the
//! kernel). There is nothing to truncate, so nothing guards it. What else differs from a file: it
//! has no read(2), write(2) and fsync(2), and its size never changes.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::description::{Description, FileIdentity};
use crate::error::{Error, NoDaxDevice, Result};
use crate::export::{Attributes, Root, denied_or_failed};
use crate::mapping::HUGE_PAGE;

/// Where the kernel tells of character devices, by number.
const CHARACTER_DEVICES: &str = "/sys/dev/char";
/// Mappings are aligned to that.
const LARGEST_ALIGN: u64 = HUGE_PAGE as u64;

/// What a DAX device is (Documentation/ABI/testing/sysfs-bus-dax).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct DaxDevice {
    /// Bytes.
    pub(crate) size: u64,
    /// Mappings start and end on a multiple of this, and it is the size of their pages.
    pub(crate) align: u64,
    /// See [`identity`].
    pub(crate) identity: FileIdentity,
}

/// Opens the DAX device behind an `O_PATH` descriptor. Nothing else is opened: a driver's open may
/// do anything.
pub(crate) fn open(root: &Arc<Root>, path: &Path) -> Result<Description> {
    let found = &root.fd;
    let refuse = |why| Error::Device { path: path.to_owned(), why };
    let attributes = Attributes::of(found.as_fd(), path)?;
    if attributes.kind == FileType::BlockDevice {
        return Err(refuse(NoDaxDevice::Block));
    }
    let number = attributes.device_number;
    let number = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    let device = examine(&Path::new(CHARACTER_DEVICES).join(number)).map_err(refuse)?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let fd = rustix::fs::open(crate::seal::link_of(found.as_fd()), flags, Mode::empty());
    let fd = fd.map_err(|e| match e {
        Errno::NXIO | Errno::NODEV => refuse(NoDaxDevice::Stale),
        Errno::ACCESS => Error::Denied {
            path: path.to_owned(),
            call: "open",
            capability: "read and write permission on the device",
            source: e.into(),
        },
        e => denied_or_failed(e.into(), "open", path),
    })?;
    Description::of_device(fd, path.to_owned(), device, Arc::clone(root))
}

/// Reads what sysfs says. A device that no driver has must not even be mapped: Linux 7.2 dies of it
/// (a null pointer in `__check_vma`).
fn examine(sysfs: &Path) -> Result<DaxDevice, NoDaxDevice> {
    let name_of = |link: &str| {
        let target = fs::read_link(sysfs.join(link)).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    };
    if name_of("subsystem").as_deref() != Some("dax") {
        return Err(NoDaxDevice::OtherKind);
    }
    match name_of("driver").as_deref() {
        Some("device_dax") => {}
        Some("kmem") => return Err(NoDaxDevice::SystemRam),
        _ => return Err(NoDaxDevice::NoDriver),
    }
    let number = |attribute: &str| {
        let text = fs::read_to_string(sysfs.join(attribute));
        text.ok().and_then(|text| text.trim().parse::<u64>().ok())
    };
    let size = number("size").filter(|size| *size > 0).ok_or(NoDaxDevice::Empty)?;
    // Before Linux 5.10 there is no such attribute, and 2 MiB is what ndctl makes.
    let align = number("align").unwrap_or(LARGEST_ALIGN);
    if align > LARGEST_ALIGN {
        return Err(NoDaxDevice::Alignment { align });
    }
    Ok(DaxDevice { size, align, identity: identity(sysfs, size)? })
}

/// Names a device for good: by where the kernel has it, by its size, and by the UUID of the namespace
/// (`nd_dax`) or region (CXL) that it is made of, where there is one. Its node is made anew whenever the
/// device is, and its number is given to whoever comes next, so neither says anything.
fn identity(sysfs: &Path, size: u64) -> Result<FileIdentity, NoDaxDevice> {
    let place = fs::canonicalize(sysfs).map_err(|_| NoDaxDevice::NoDriver)?;
    // A namespace is right above its device; between a region and its device is one more.
    let mut above = place.ancestors().skip(1).take(2);
    let uuid = above.find_map(|above| fs::read_to_string(above.join("uuid")).ok());
    let uuid = uuid.unwrap_or_default();
    let parts = [place.as_os_str().as_bytes(), b"\0", uuid.trim().as_bytes(), b"\0"];
    let inode = fnv(parts.into_iter().chain([&size.to_le_bytes()[..]]).flatten());
    Ok(FileIdentity { device: 0, inode, birth_time_ns: 0 })
}

/// FNV-1a, which is the same in each process and release: clients keep what comes of it.
fn fnv<'a>(bytes: impl Iterator<Item = &'a u8>) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_a_dax_device_with_its_own_driver_is_taken() {
        let known = |subsystem: &str, driver: Option<&str>, size: &str, align: &str| {
            let folder = tempfile::tempdir().unwrap();
            symlink(format!("../../bus/{subsystem}"), folder.path().join("subsystem")).unwrap();
            if let Some(driver) = driver {
                symlink(format!("../drivers/{driver}"), folder.path().join("driver")).unwrap();
            }
            fs::write(folder.path().join("size"), size).unwrap();
            fs::write(folder.path().join("align"), align).unwrap();
            examine(folder.path())
        };
        let ours = Some("device_dax");
        let size_and_align =
            known("dax", ours, "65011712\n", "2097152\n").map(|d| (d.size, d.align));
        assert_eq!(size_and_align, Ok((65_011_712, 2 << 20)));
        assert_eq!(known("mem", ours, "1\n", "1\n"), Err(NoDaxDevice::OtherKind));
        assert_eq!(known("dax", None, "4096\n", "4096\n"), Err(NoDaxDevice::NoDriver));
        assert_eq!(known("dax", Some("kmem"), "1\n", "1\n"), Err(NoDaxDevice::SystemRam));
        assert_eq!(known("dax", ours, "0\n", "4096\n"), Err(NoDaxDevice::Empty));
        let huge = Err(NoDaxDevice::Alignment { align: 1 << 30 });
        assert_eq!(known("dax", ours, "1073741824\n", "1073741824\n"), huge);
    }

    #[test]
    fn a_device_made_anew_is_the_same_and_another_one_in_its_place_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (namespace, device) =
            (folder.path().join("region2/dax2.0"), folder.path().join("region2/dax2.0/dax2.0"));
        fs::create_dir_all(&device).unwrap();
        let by_number = |number: &str| {
            let link = folder.path().join(number);
            symlink(&device, &link).unwrap();
            link
        };
        let (first, second) = (by_number("252:1"), by_number("252:7"));
        let of = |link: &Path, size| identity(link, size).unwrap();
        let without = of(&first, 4096);
        fs::write(namespace.join("uuid"), "5a0e\n").unwrap();
        let before = of(&first, 4096);
        assert_eq!(before, of(&second, 4096), "its number says nothing");
        assert_ne!(before, without);
        assert_ne!(before, of(&first, 8192), "there is more of it");
        fs::write(namespace.join("uuid"), "77aa\n").unwrap();
        assert_ne!(before, of(&first, 4096), "the namespace was made anew");
        assert_ne!(without, identity(&namespace, 4096).unwrap(), "it lies elsewhere");
        assert_eq!(identity(&folder.path().join("252:9"), 4096), Err(NoDaxDevice::NoDriver));
    }

    #[test]
    fn the_digest_is_the_known_one() {
        assert_eq!(fnv(b"foobar".iter()), 0x8594_4171_f739_67e8);
    }
}
