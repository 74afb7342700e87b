//! Device-dax: persistent memory without a file system, as one character device (drivers/dax in the
//! kernel). There is nothing to truncate, so nothing guards it. What else differs from a file: it
//! has no read(2), write(2) and fsync(2), and its size never changes.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::description::Description;
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
    Ok(DaxDevice { size, align })
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
        let device = DaxDevice { size: 65_011_712, align: 2 << 20 };
        assert_eq!(known("dax", ours, "65011712\n", "2097152\n"), Ok(device));
        assert_eq!(known("mem", ours, "1\n", "1\n"), Err(NoDaxDevice::OtherKind));
        assert_eq!(known("dax", None, "4096\n", "4096\n"), Err(NoDaxDevice::NoDriver));
        assert_eq!(known("dax", Some("kmem"), "1\n", "1\n"), Err(NoDaxDevice::SystemRam));
        assert_eq!(known("dax", ours, "0\n", "4096\n"), Err(NoDaxDevice::Empty));
        let huge = Err(NoDaxDevice::Alignment { align: 1 << 30 });
        assert_eq!(known("dax", ours, "1073741824\n", "1073741824\n"), huge);
    }
}
