//! `pinfoldd doctor` on Debian 12's kernel: leases only, and a soft NIC without on-demand paging. It
//! can be served, by the stream path, and the doctor says what would help.
#![forbid(unsafe_code)]

use pinfold_lab::{device_name, doctor, finding, on_each_file_system};
use serde_json::Value;

on_each_file_system! {
    async fn it_says_what_is_lost_and_what_would_help(lab in Lab) {
        let folder = lab.folder().to_str().unwrap();
        let finished = doctor(&[], &["--json", folder]);
        assert_eq!(finished.code, 0, "{}{}", finished.stdout, finished.stderr);
        let report: Value = serde_json::from_str(&finished.stdout).unwrap();
        let device = device_name();
        for (subject, check, result, words) in [
            ("host", "kernel", "limited", ["6.1.", "6.15", "mlx5"].as_slice()),
            ("host", "guards", "limited", &["lease", "6.19", "unlink"]),
            (&device, "odp", "limited", &["none", "6.15", "mlx5"]),
            (&device, "self_test_on_demand", "missing", &["no on-demand paging"]),
            (&device, "self_test_pinned", "ok", &["passed"]),
            (&device, "flush", "limited", &["none"]),
            (folder, "dax", "ok", &["in effect"]),
            (folder, "guard", "limited", &["lease", "6.19"]),
            (folder, "map_sync", "ok", &["taken"]),
            (folder, "registration", "limited", &["no on-demand paging", "fs-DAX", "stream path"]),
        ] {
            let finding = finding(&report, subject, check);
            assert_eq!(finding["result"], result, "{finding}");
            for word in words {
                assert!(finding.to_string().contains(word), "{word:?}: {finding}");
            }
        }
    }
}
