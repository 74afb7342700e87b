//! The queue pairs of the whole machine, as the kernel counts them.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

/// Number and state (`RTS`, `ERR` …) of each reliable connection, at both ends (rdma-resource(8)).
/// The process that it names for each is one thread of the owner's, so all are given.
pub fn queue_pairs() -> BTreeMap<u64, String> {
    let output = Command::new("rdma").args(["-j", "resource", "show", "qp"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let connections = listed.as_array().unwrap().iter().filter(|pair| pair["type"] == "RC");
    connections
        .map(|pair| (pair["lqpn"].as_u64().unwrap(), pair["state"].as_str().unwrap().to_owned()))
        .collect()
}
