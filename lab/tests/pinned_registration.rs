//! Memory that the device pins is fenced by deregistering: tmpfs, on the newest kernel.
#![forbid(unsafe_code)]

use pinfold_client::GuardTier;
use pinfold_lab::{FileSystem, Lab, truncate_under_pinned_registration};

#[test]
fn a_truncate_on_tmpfs_is_fenced_by_deregistering() {
    Lab::run(FileSystem::Tmpfs, |lab| {
        truncate_under_pinned_registration(lab, GuardTier::Delegation)
    });
}
