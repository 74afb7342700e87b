//! The command `pinfold`, from the shell to the bytes in the file.
#![forbid(unsafe_code)]

use std::path::Path;

use nix::sys::signal::Signal;
use pinfold_lab::{
    EXPORT, Finished, Lab, Pattern, Truncation, device_name, eventually, on_each_file_system,
    read_by_another_process,
};
use serde_json::Value;

const INTERRUPTED: i32 = 130;
const REVOKED: i32 = 7;

fn json(command: &Finished) -> Value {
    assert_eq!(command.code, 0, "{}", command.stderr);
    serde_json::from_str(&command.stdout).unwrap()
}

fn local_file(seed: u64, len: usize) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), Pattern(seed).bytes(0, len)).unwrap();
    file
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// How many packets the NIC has taken.
fn packets() -> u64 {
    let counters = format!("/sys/class/infiniband/{}/ports/1/hw_counters", device_name());
    std::fs::read_to_string(Path::new(&counters).join("rcvd_pkts")).unwrap().trim().parse().unwrap()
}

/// Puts a pattern of this length there, and looks at what came of it.
async fn put(lab: &Lab, seed: u64, len: usize) -> Value {
    let local = local_file(seed, len);
    let report = json(&lab.pinfold(&["put", text(local.path()), "lab/name", "--json"]).await);
    assert_eq!((&report["file"], &report["durable"]), (&"lab/name".into(), &true.into()));
    assert_eq!((&report["bytes"], &report["rdma_bytes"]), (&len.into(), &len.into()), "{report}");
    assert_eq!(report["stream_bytes"], 0);
    // It disturbs nobody, and nobody is left to be disturbed.
    let stat = json(&lab.pinfold(&["stat", "lab/name", "--json"]).await);
    assert_eq!((&stat["size"], &stat["pins"]), (&len.into(), &0.into()), "{stat}");
    assert_eq!((&stat["generation"], &stat["dax"]), (&Value::Null, &true.into()), "{stat}");
    let content = read_by_another_process(&lab.path("name"));
    assert_eq!(content.len(), len, "exactly the bytes that were given");
    Pattern(seed).check(0, &content, "put");
    report
}

on_each_file_system! {
    async fn put_leaves_exactly_the_bytes_that_it_was_given(lab in Lab) {
        const ODD: usize = (3 << 20) + 123;
        assert_eq!(put(&lab, 1, 0).await["created"], true, "an empty file");
        assert_eq!(put(&lab, 2, ODD).await["created"], false, "over a smaller file");
        assert_eq!(put(&lab, 3, 1000).await["created"], false, "over a larger file");
        assert_eq!(put(&lab, 4, 0).await["created"], false, "an empty one over another");
        lab.nothing_is_held().await;
    }

    async fn a_held_pin_is_told_of_a_truncate_and_draws_what_happened(lab in Lab) {
        lab.make_file("name", 1 << 20);
        let mut holding = lab.start_pinfold(&["pin", "lab/name", "--hold"]);
        holding.wait_for_line("holding the pin");
        let stat = json(&lab.pinfold(&["stat", "lab/name", "--json"]).await);
        assert_eq!(stat["pins"], 1);
        assert!(stat["generation"].is_string(), "{stat}");
        Truncation::start(lab.path("name"), 0).done().await;
        let ended = holding.finish().await;
        println!("{}{}", ended.stdout, ended.stderr);
        assert_eq!(ended.code, REVOKED);
        let why = "a local process wants to change the file";
        assert!(ended.stderr.contains(&format!("the pin on lab/name was taken back: {why}")));
        // In this order, each at the start of a line.
        let rows = ["notice: ", "break ", "notice ", "drained ", "fenced ", "released "];
        let lines = ended.stdout.lines();
        let found: Vec<&str> =
            lines.filter_map(|line| rows.into_iter().find(|row| line.starts_with(row))).collect();
        assert_eq!(found, rows, "{}", ended.stdout);
        assert!(ended.stdout.contains("let go in time for a local process that waits for it"));

        lab.make_file("name", 1 << 20);
        let mut holding = lab.start_pinfold(&["pin", "lab/name", "--hold", "--json"]);
        let granted: Value = serde_json::from_str(&holding.wait_for_line("{")).unwrap();
        Truncation::start(lab.path("name"), 0).done().await;
        let ended = holding.finish().await;
        assert_eq!(ended.code, REVOKED);
        let told: Vec<Value> =
            ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let [draining, revoked] = &told[..] else { panic!("{told:?}") };
        assert_eq!(granted["event"], "granted");
        assert_eq!(granted["guard"], "delegation");
        assert_eq!(draining["event"], "draining");
        assert_eq!(draining["reason"], "local_writer");
        assert_eq!(revoked["event"], "revoked");
        assert_eq!(revoked["generation"], granted["generation"]);
        assert_eq!(revoked["timings"]["break_pending_at_release"], true, "{revoked}");
        lab.nothing_is_held().await;
    }

    async fn ctrl_c_gives_a_held_pin_back(lab in Lab) {
        lab.make_file("name", 1 << 20);
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            let mut holding = lab.start_pinfold(&["pin", "lab/name", "--hold"]);
            holding.wait_for_line("holding the pin");
            holding.signal(signal);
            let ended = holding.finish().await;
            assert_eq!(ended.code, INTERRUPTED, "{}", ended.stderr);
            assert_eq!(ended.stderr, "pinfold: interrupted; the pin is given back\n");
            lab.nothing_is_held().await;
        }
        assert_eq!(read_by_another_process(&lab.path("name")).len(), 1 << 20);
    }

    async fn a_put_that_loses_its_pin_says_what_is_known(lab in Lab) {
        const LEN: usize = 16 << 20;
        let session = lab.session().await;
        let local = local_file(6, LEN);
        let arguments =
            ["put", text(local.path()), "lab/name", "--json", "--chunk", "16K", "--window", "1"];
        let putting = lab.start_pinfold(&arguments);
        eventually("the file is pinned", async || {
            session.stat(EXPORT, "name").await.is_ok_and(|stat| stat.pins > 0)
        })
        .await;
        // Nobody else uses the NIC.
        let before = packets();
        eventually("the first bytes are on their way", async || packets() > before + 20).await;
        Truncation::start(lab.path("name"), 4096).done().await;
        let ended = putting.finish().await;
        println!("{}", ended.stderr);
        assert_eq!(ended.code, REVOKED, "{}", ended.stderr);
        assert_eq!(ended.stdout, "", "nothing is reported as done");
        let source = text(local.path());
        for word in [
            format!("cannot put {source} into lab/name: of {LEN} bytes"),
            "none is known to be committed".to_owned(),
            "a local process wants to change the file".to_owned(),
            "hint: put it again".to_owned(),
        ] {
            assert!(ended.stderr.contains(&word), "{word:?} is not in {}", ended.stderr);
        }
        let written = ended.stderr.split(", ").find_map(|part| part.strip_suffix(" were written"));
        let written: u64 = written.unwrap().parse().unwrap();
        assert!(0 < written && written < LEN as u64, "in the middle: {written} bytes");
        assert_eq!(read_by_another_process(&lab.path("name")).len(), 4096, "the truncate's length");
        let again = lab.pinfold(&["put", source, "lab/name", "--json"]).await;
        assert_eq!(json(&again)["rdma_bytes"], LEN);
        Pattern(6).check(0, &read_by_another_process(&lab.path("name")), "put again");
        lab.nothing_is_held().await;
    }
}
