//! The lab's DAX device, of which there is one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use memmap2::MmapOptions;

use crate::{required, shell};

static ALONE: Mutex<()> = Mutex::new(());

/// The device, for one test at a time.
#[derive(Debug)]
pub struct DevDax {
    path: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl DevDax {
    /// Waits for the tests that have it.
    pub fn alone() -> Self {
        // A test that failed left bytes behind, which no other test minds.
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let device = Self { path: PathBuf::from(required("PINFOLD_LAB_DEVDAX")), _alone: alone };
        if !device.attribute("driver").exists() {
            // … or it took the device from its driver.
            device.renew();
        }
        device
    }

    fn attribute(&self, name: &str) -> PathBuf {
        Path::new("/sys/bus/dax/devices").join(self.name()).join(name)
    }

    /// Its node.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the one file of its export is called: `dax2.0`.
    pub fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap()
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        std::fs::read_to_string(self.attribute("size")).unwrap().trim().parse().unwrap()
    }

    /// What it holds, read through a mapping of this process, in another way than the server reads.
    pub fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let device = File::options().read(true).write(true).open(&self.path).unwrap();
        let size = usize::try_from(self.size()).unwrap();
        let mapping = MmapOptions::new().len(size).map_raw(&device).unwrap();
        let mut bytes = vec![0; len];
        let memory = File::open("/proc/self/mem").unwrap();
        memory.read_exact_at(&mut bytes, mapping.as_ptr() as u64 + offset).unwrap();
        bytes
    }

    /// The line of a shell that takes it from its driver, as `daxctl disable-device` does. It ends
    /// when the kernel has let go.
    pub fn unbind_line(&self) -> String {
        format!("echo {} >/sys/bus/dax/drivers/device_dax/unbind", self.name())
    }

    /// The line of a shell that gives it back, as `daxctl reconfigure-device -m devdax` does.
    pub fn bind_line(&self) -> String {
        format!("echo {} >/sys/bus/dax/drivers/device_dax/bind", self.name())
    }

    /// Makes the device of its namespace anew, once nobody has it open any more.
    pub fn renew(&self) {
        let driver = "/sys/bus/nd/drivers/dax_pmem";
        shell(&format!("echo {0} >{driver}/unbind; echo {0} >{driver}/bind", self.name()));
    }
}
