//! What both ends compare to find out whether they run on one host.

use std::fs;

/// The current boot of this host's kernel, as it goes into `Welcome.host_boot_id`; absent where
/// /proc does not show it.
pub fn boot_id() -> Option<Vec<u8>> {
    let id = fs::read("/proc/sys/kernel/random/boot_id").ok()?;
    let id = id.trim_ascii().to_vec();
    (!id.is_empty()).then_some(id)
}
