//! Files and folders by `pinfold put` and `get`, over RDMA.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use pinfold_lab::{Lab, Pattern, on_each_file_system, read_by_another_process};
use serde_json::Value;

const ODD: usize = (2 << 20) + 123;
const SPARSE: usize = 4 << 20;
const NAMES: [&str; 4] = ["a", "in/b", "in/sparse", "in/none"];

/// What is told of all files, and of each.
async fn told(lab: &Lab, arguments: &[&str]) -> (Value, Vec<Value>) {
    let arguments = [arguments, &["--json"]].concat();
    let done = lab.pinfold(&arguments).await;
    assert_eq!(done.code, 0, "{}{}", done.stdout, done.stderr);
    let lines = done.stdout.lines().map(|line| serde_json::from_str(line).unwrap());
    let mut events: Vec<Value> = lines.collect();
    let total = events.pop().unwrap();
    assert_eq!(total["event"], "total", "{total}");
    (total, events)
}

fn make_tree(top: &Path) {
    fs::create_dir_all(top.join("in")).unwrap();
    fs::create_dir(top.join("empty")).unwrap();
    fs::write(top.join("a"), Pattern(1).bytes(0, ODD)).unwrap();
    fs::write(top.join("in/b"), Pattern(2).bytes(0, 777)).unwrap();
    fs::write(top.join("in/none"), b"").unwrap();
    let sparse = fs::File::create(top.join("in/sparse")).unwrap();
    sparse.set_len(SPARSE as u64).unwrap();
    sparse.write_all_at(&Pattern(3).bytes(0, 5000), (2 << 20) + 77).unwrap();
}

on_each_file_system! {
    async fn a_folder_goes_by_rdma_is_gone_on_with_and_comes_back(lab in Lab) {
        let local = tempfile::tempdir().unwrap();
        let (from, to) = (local.path().join("from"), local.path().join("to"));
        make_tree(&from);
        let (from_arg, to_arg) = (from.to_str().unwrap(), to.to_str().unwrap());
        let is_there = || {
            for name in NAMES {
                let there = read_by_another_process(&lab.path("tree").join(name));
                assert!(there == fs::read(from.join(name)).unwrap(), "{name}");
            }
        };

        let (total, files) = told(&lab, &["put", "-r", from_arg, "lab/tree", "--verify"]).await;
        assert_eq!((&total["files"], &total["folders"]), (&4.into(), &2.into()), "{total}");
        assert_eq!(total["stream_bytes"], 0, "{total}");
        let carried = total["rdma_bytes"].as_u64().unwrap();
        let dense = (ODD + 777) as u64;
        assert!((dense + 5000..dense + (1 << 20)).contains(&carried), "no holes: {total}");
        for file in &files {
            assert_eq!((&file["durable"], &file["verified"]), (&true.into(), &true.into()), "{file}");
        }
        is_there();
        assert!(lab.path("tree/empty").is_dir());

        // A local process of the storage host changes a byte of a file, and one in a hole.
        for (name, at) in [("a", (1 << 20) + 5), ("in/sparse", 100)] {
            let file = fs::File::options().write(true).open(lab.path("tree").join(name)).unwrap();
            file.write_all_at(&[!Pattern(1).bytes(at, 1)[0]], at).unwrap();
        }
        let (total, _) = told(&lab, &["put", "-r", from_arg, "lab/tree", "--resume"]).await;
        assert_eq!(total["bytes"], 2 << 20, "one piece of each: {total}");
        let all = (ODD + 777 + SPARSE) as u64;
        assert_eq!(total["kept_bytes"], all - (2 << 20), "{total}");
        is_there();

        let (total, _) = told(&lab, &["get", "-r", "lab/tree", to_arg, "--verify"]).await;
        assert_eq!((&total["rdma_bytes"], &total["stream_bytes"]), (&all.into(), &0.into()));
        for name in NAMES {
            assert!(fs::read(to.join(name)).unwrap() == fs::read(from.join(name)).unwrap(), "{name}");
        }
        assert!(to.join("empty").is_dir());
        lab.nothing_is_held().await;
    }
}
