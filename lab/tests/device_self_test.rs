//! What the self-test finds on the soft NIC: the rule without which its on-demand paging puts data
//! in the wrong place, and none for pinned registration.
#![forbid(unsafe_code)]

use pinfold_lab::device_name;
use pinfold_verbs::{Device, RegistrationMode, self_test};

#[test]
fn on_demand_paging_of_the_soft_nic_needs_whole_pages() {
    let report =
        self_test(&Device::open(&device_name()).unwrap(), RegistrationMode::OnDemand).unwrap();
    println!("{report:?}");
    assert_eq!(report.quirks.start_alignment_bytes, 4096);
    assert_eq!(report.quirks.path_mtu_bytes, Some(4096));
    assert!(report.quirks.max_region_bytes < 2 << 30, "{}", report.quirks.max_region_bytes);
}

#[test]
fn pinned_registration_of_the_soft_nic_needs_no_rule() {
    let report =
        self_test(&Device::open(&device_name()).unwrap(), RegistrationMode::Pinned).unwrap();
    println!("{report:?}");
    assert_eq!((report.quirks.start_alignment_bytes, report.quirks.path_mtu_bytes), (1, None));
}
