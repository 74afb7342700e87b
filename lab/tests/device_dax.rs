//! A DAX device as an export: all that works on a file, without a guard, because nobody can cut it.
#![forbid(unsafe_code)]

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use pinfold_client::{
    Code, CompletionStatus, ConnectOptions, Durability, EntryKind, GuardTier, IfExists, KeepPolicy,
    KeptPin, KeptSession, Pin, PinRequest, RdmaDevice, Reason, Session, Transport,
};
use pinfold_lab::{
    Answer, DEADLINE, Daemon, DevDax, EXPORT, Finished, Pattern, device_name, doctor, eventually,
    finding, in_time, remote_slice, shell,
};
use serde_json::Value;

const MIB: usize = 1 << 20;
const HUGE: u64 = 2 << 20;
/// Pins of what is gone: each would leave the device's size in addresses behind.
const REFUSED: u64 = 8;

/// Addresses that a process has, mapped or reserved (`VmSize`, proc_pid_status(5)).
fn virtual_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

struct Bench {
    // Ended before another test gets the device.
    daemon: Daemon,
    device: DevDax,
}

impl Bench {
    fn start() -> Self {
        let device = DevDax::alone();
        let daemon = Daemon::start(&[(EXPORT, device.path())]);
        Self { device, daemon }
    }

    fn options(&self) -> ConnectOptions {
        ConnectOptions::new(&self.daemon.url).rdma_device(RdmaDevice::Named(device_name()))
    }

    async fn session(&self) -> Session {
        Session::connect(self.options()).await.unwrap()
    }

    fn request(&self) -> PinRequest {
        PinRequest::read_write(EXPORT, self.device.name())
    }

    /// As the command names it.
    fn file(&self) -> String {
        format!("{EXPORT}/{}", self.device.name())
    }

    async fn pinfold(&self, arguments: &[&str]) -> Finished {
        self.daemon.pinfold(&device_name(), arguments).await
    }

    async fn json(&self, arguments: &[&str]) -> Value {
        let finished = self.pinfold(&[arguments, &["--json"]].concat()).await;
        assert_eq!(finished.code, 0, "{}", finished.stderr);
        serde_json::from_str(&finished.stdout).unwrap()
    }
}

async fn write(session: &Session, pin: &Pin, seed: u64, offset: u64, len: usize) -> (u64, u64) {
    let mut buffer = session.buffer(len).await.unwrap();
    Pattern(seed).fill(offset, buffer.as_mut_slice());
    let (_, report) = pin.write(offset, buffer, len).await.unwrap();
    (report.rdma_bytes, report.stream_bytes)
}

async fn check(session: &Session, pin: &Pin, seed: u64, offset: u64, len: usize, what: &str) {
    let buffer = session.buffer(len).await.unwrap();
    let (buffer, _) = pin.read(offset, len, buffer).await.unwrap();
    Pattern(seed).check(offset, &buffer.as_slice()[..len], what);
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn one_sided_writes_land_and_the_keys_die_with_their_pins() {
    in_time(DEADLINE, async {
        const AT: u64 = 4 * HUGE + 3 * 4096;
        const LEN: usize = 2 * MIB + 333;
        let mut bench = Bench::start();
        let session = bench.session().await;
        let listed = session.list(EXPORT, "").await.unwrap();
        let [entry] = &listed[..] else { panic!("{listed:?}") };
        assert_eq!((&*entry.name, entry.kind), (bench.device.name(), EntryKind::File));
        assert_eq!(entry.size, bench.device.size());

        let pin = session.pin(bench.request().transport(Transport::Rdma)).await.unwrap();
        let grant = pin.grant();
        assert_eq!((grant.guard, grant.valid_end), (GuardTier::NotNeeded, bench.device.size()));
        assert!(grant.dax && grant.map_sync && grant.page_size_bytes == HUGE as u32, "{grant:?}");
        assert_eq!(grant.durability, [Durability::Commit]);
        assert_eq!(session.inspect().await.unwrap().files[0].guard, GuardTier::NotNeeded);

        assert_eq!(write(&session, &pin, 1, AT, LEN).await, (LEN as u64, 0));
        let last = bench.device.size() - 4096;
        assert_eq!(write(&session, &pin, 2, last, 4096).await, (4096, 0));
        check(&session, &pin, 1, AT, LEN, "by RDMA").await;
        pin.commit().await.unwrap();
        pin.commit_range(AT + 1..AT + 2).await.unwrap();

        let keeper = session.pin(bench.request().range(0..HUGE)).await.unwrap();
        let key = pin.grant().segments[0];
        pin.unpin().await.unwrap();
        let mut buffer = session.buffer(64).await.unwrap();
        buffer.as_mut_slice().fill(0xee);
        let (_, status) = session.raw_write(remote_slice(&key, AT, 64), buffer).await.unwrap();
        assert_eq!(status, CompletionStatus::RemoteAccess, "after its unpin");
        keeper.unpin().await.unwrap();

        let _kept = session.pin(bench.request()).await.unwrap();
        assert!(bench.daemon.terminate().success());
        assert_eq!(bench.daemon.audit_record(bench.device.path())["guard"], "not needed");
        Pattern(1).check(AT, &bench.device.bytes(AT, LEN), "when the server is gone");
        Pattern(2).check(last, &bench.device.bytes(last, 4096), "the last page");
    });
}

#[test]
fn the_stream_path_copies_without_read_and_write() {
    in_time(DEADLINE, async {
        let mut bench = Bench::start();
        let session = bench.session().await;
        let pin = session.pin(bench.request().transport(Transport::Stream)).await.unwrap();
        let grant = pin.grant();
        assert_eq!((grant.guard, grant.segments.len()), (GuardTier::NotNeeded, 0));
        let last = bench.device.size() - 1;
        // Odd starts and ends, over the end of a huge page, more than one piece, the last byte.
        for (seed, offset, len) in [(3, 7, 1), (4, HUGE - 70_001, 3 * MIB + 11), (5, last, 1)] {
            assert_eq!(write(&session, &pin, seed, offset, len).await, (0, len as u64));
            check(&session, &pin, seed, offset, len, "by gRPC").await;
            pin.commit_range(offset..offset + len as u64).await.unwrap();
        }
        let beside = session.pin(bench.request().transport(Transport::Rdma)).await.unwrap();
        check(&session, &beside, 4, HUGE, MIB, "by RDMA").await;
        assert!(bench.daemon.terminate().success());
        Pattern(4).check(
            HUGE - 70_001,
            &bench.device.bytes(HUGE - 70_001, 3 * MIB + 11),
            "after it",
        );
        Pattern(5).check(last, &bench.device.bytes(last, 1), "the last byte");
    });
}

#[test]
fn the_command_puts_gets_and_shows_it_and_its_size_stays() {
    in_time(DEADLINE, async {
        const LEN: usize = 3 * MIB + 321;
        let bench = Bench::start();
        let file = bench.file();
        let folder = tempfile::tempdir().unwrap();
        let (local, back) = (folder.path().join("local"), folder.path().join("back"));
        std::fs::write(&local, Pattern(6).bytes(0, LEN)).unwrap();
        let put = bench.json(&["put", text(&local), &file]).await;
        assert_eq!((&put["created"], &put["durable"]), (&false.into(), &true.into()), "{put}");
        assert_eq!(put["rdma_bytes"], LEN, "{put}");
        let stat = bench.json(&["stat", &file]).await;
        assert_eq!((&stat["size"], &stat["dax"]), (&bench.device.size().into(), &true.into()));
        bench.json(&["get", &file, text(&back)]).await;
        let got = std::fs::read(&back).unwrap();
        assert_eq!(got.len() as u64, bench.device.size());
        Pattern(6).check(0, &got[..LEN], "what came back");
        std::fs::remove_file(&back).unwrap();

        let shown = bench.pinfold(&["ls", "-l", EXPORT]).await;
        assert!(shown.stdout.contains(bench.device.name()), "{}", shown.stdout);
        let session = bench.session().await;
        let pin = session.pin(bench.request()).await.unwrap();
        let shown = bench.pinfold(&["ps"]).await;
        for words in ["not needed", text(bench.device.path())] {
            assert!(shown.stdout.contains(words), "{words:?} is not in {}", shown.stdout);
        }
        let large = std::fs::File::create(&local).unwrap();
        large.set_len(bench.device.size() + 1).unwrap();
        let put = ["put", text(&local), &file];
        let refused = bench.pinfold(&put).await;
        let says = [text(&local), &file, &bench.device.size().to_string()];
        let (code, reason) = (Code::FailedPrecondition, Reason::FixedSize);
        Answer { code, reason, exit: 5, says: &says }.check_finished(&refused, &put);
        pin.unpin().await.unwrap();
        its_size_is_what_it_is(&bench, &session).await;
    });
}

/// Whoever asks for another one, by the library or by the command.
async fn its_size_is_what_it_is(bench: &Bench, session: &Session) {
    let (name, file) = (bench.device.name(), bench.file());
    let says = [text(bench.device.path()), "is a device", "pin it and write"];
    let fixed =
        Answer { code: Code::FailedPrecondition, reason: Reason::FixedSize, exit: 5, says: &says };
    let half = bench.device.size() / 2;
    for if_exists in [IfExists::Fail, IfExists::Resize] {
        fixed.check(session.create(EXPORT, name, half, if_exists).await.unwrap_err());
        fixed.check(session.create(EXPORT, "other", half, if_exists).await.unwrap_err());
    }
    fixed.check(session.grow(EXPORT, name, 2 * half + HUGE).await.unwrap_err());
    fixed.check(session.shrink(EXPORT, name, half).await.unwrap_err());
    fixed.check(session.remove(EXPORT, name, true).await.unwrap_err());
    for arguments in [
        &["grow", &*file, "1G"][..],
        &["shrink", &file, "1M"],
        &["rm", &file],
        &["rm", &file, "--revoke"],
    ] {
        fixed.check_finished(&bench.pinfold(arguments).await, arguments);
    }
    let beneath = session.pin(PinRequest::read(EXPORT, format!("{name}/file"))).await.unwrap_err();
    let (code, reason) = (Code::NotFound, Reason::FileNotFound);
    Answer { code, reason, exit: 4, says: &says[..1] }.check(beneath);
    let past = session.pin(bench.request().range(0..2 * half + 1)).await.unwrap_err();
    let (code, reason) = (Code::OutOfRange, Reason::RangePastEnd);
    Answer { code, reason, exit: 5, says: &says[..1][..0] }.check(past);
    let pin = session.pin(bench.request()).await.unwrap();
    assert_eq!(pin.grant().valid_end, 2 * half, "as before");
}

#[test]
fn what_can_not_be_an_export_is_refused_at_the_start() {
    in_time(DEADLINE, async {
        let device = DevDax::alone();
        let path = device.path();
        let none = ["--rdma-device", "none"];
        let refused = |path: &Path, code: i32, words: &[&str]| {
            let refused = Daemon::refused(&[(EXPORT, path)], &none);
            assert_eq!(refused.code, code, "{}", refused.stderr);
            let says = [&[text(path)], words].concat();
            says.iter()
                .for_each(|w| assert!(refused.stderr.contains(w), "{w:?}: {}", refused.stderr));
        };
        refused(
            Path::new("/dev/pmem0"),
            1,
            &["block device", "mount", "create-namespace -m devdax"],
        );
        refused(Path::new("/dev/null"), 1, &["no DAX device", "daxctl list"]);
        let guarded = format!("{EXPORT}={},guard=none", path.display());
        let policy = Daemon::refused(&[], &[&none[..], &["--export", &guarded]].concat());
        assert_eq!(policy.code, 2, "{}", policy.stderr);
        assert!(policy.stderr.contains("leave them out"), "{}", policy.stderr);

        let first = Daemon::start_with(&[(EXPORT, path)], &none);
        refused(path, 6, &[&format!("process {}", first.pid())]);
        let report = doctor(&[], &["--json", text(path)]);
        assert_eq!(report.code, 0, "{}{}", report.stdout, report.stderr);
        let report: Value = serde_json::from_str(&report.stdout).unwrap();
        let on_demand = format!("{}: on demand", device_name());
        for (check, result, found) in [
            ("device", "ok", "62 MiB"),
            ("lock", "limited", "held"),
            ("guard", "ok", "not needed"),
            ("registration", "ok", &*on_demand),
            ("page_size", "ok", "2 MiB"),
            ("commit", "ok", "written back"),
            ("access", "ok", "owner"),
        ] {
            let finding = finding(&report, text(path), check);
            assert_eq!(finding["result"], result, "{finding}");
            assert!(finding["found"].as_str().unwrap().contains(found), "{finding}");
        }
        drop(first);

        let nobody = ["setpriv", "--reuid=65534", "--clear-groups", "--bounding-set=-all", "--"];
        let report = doctor(&nobody, &["--json", text(path)]);
        assert_eq!(report.code, 5, "{}{}", report.stdout, report.stderr);
        let report: Value = serde_json::from_str(&report.stdout).unwrap();
        let why = finding(&report, text(path), "device")["why"].as_str().unwrap().to_owned();
        assert!(why.contains("read and write permission on the device"), "{why}");
    });
}

/// An administrator at work; killed with the test, and not waited for: it may be stuck in the kernel.
struct Unbinding(Child);

impl Drop for Unbinding {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
    }
}

impl Unbinding {
    fn start(device: &DevDax) -> Self {
        Self(Command::new("sh").args(["-ec", &device.unbind_line()]).spawn().unwrap())
    }

    fn is_done(&mut self) -> bool {
        let ended = self.0.try_wait().unwrap();
        ended.inspect(|status| assert!(status.success(), "{status}")).is_some()
    }
}

/// The pin is had again, by its client's library, and finds what was written before.
async fn comes_back(kept: &KeptSession, pin: &KeptPin) {
    pin.resume().await.unwrap().expect("an interruption");
    let buffer = kept.buffer(MIB).await.unwrap();
    let (buffer, _) = pin.read(0, MIB, buffer).await.unwrap();
    Pattern(8).check(0, &buffer.as_slice()[..MIB], "as it was before");
}

/// An administrator takes a quiesced device from its driver, gives it back, and has it made anew, which
/// gives it another node.
#[test]
fn a_quiesced_device_is_resumed_as_the_same_one_and_not_without_a_driver() {
    in_time(DEADLINE, async {
        let bench = Bench::start();
        let policy = KeepPolicy::new().longest_delay(Duration::from_millis(200));
        let kept = KeptSession::connect(bench.options(), policy).await.unwrap();
        let pin = kept.pin(bench.request().transport(Transport::Rdma)).await.unwrap();
        let mut buffer = kept.buffer(MIB).await.unwrap();
        Pattern(8).fill(0, buffer.as_mut_slice());
        pin.write(0, buffer, MIB).await.unwrap();
        pin.commit().await.unwrap();
        let operator = bench.session().await;
        let node = || std::fs::metadata(bench.device.path()).unwrap().ino();
        let first_node = node();

        assert_eq!(operator.quiesce(EXPORT).await.unwrap().revoked_pins, 1);
        let mut unbinding = Unbinding::start(&bench.device);
        eventually("the kernel has let go of it", async || unbinding.is_done()).await;
        let (code, reason) = (Code::FailedPrecondition, Reason::UnsupportedFile);
        let says = [text(bench.device.path()), "no driver has it", "daxctl reconfigure-device"];
        let driverless = Answer { code, reason, exit: 5, says: &says };
        driverless.check(operator.resume(EXPORT).await.unwrap_err());
        let resume = ["resume", EXPORT];
        driverless.check_finished(&bench.pinfold(&resume).await, &resume);
        // Its node stays, and works: nobody had it open.
        shell(&bench.device.bind_line());
        assert!(operator.resume(EXPORT).await.unwrap());
        comes_back(&kept, &pin).await;

        assert_eq!(operator.quiesce(EXPORT).await.unwrap().revoked_pins, 1);
        bench.device.renew();
        assert_ne!(node(), first_node, "or this test shows nothing");
        assert!(operator.resume(EXPORT).await.unwrap());
        comes_back(&kept, &pin).await;
        let mut buffer = kept.buffer(MIB).await.unwrap();
        Pattern(9).fill(0, buffer.as_mut_slice());
        let (_, report) = pin.write(0, buffer, MIB).await.unwrap();
        assert_eq!(report.rdma_bytes, MIB as u64);
        pin.commit().await.unwrap();
        pin.unpin().await.unwrap();
        Pattern(9).check(0, &bench.device.bytes(0, MIB), "on the device made anew");
    });
}

#[test]
fn taking_the_device_from_its_driver_kills_the_keys_and_hurts_nobody() {
    in_time(DEADLINE, async {
        let mut bench = Bench::start();
        let session = bench.session().await;
        let pin = session.pin(bench.request().transport(Transport::Rdma)).await.unwrap();
        let stream = session.pin(bench.request().transport(Transport::Stream)).await.unwrap();
        write(&session, &pin, 7, 0, MIB).await;
        pin.commit().await.unwrap();
        let mut unbinding = Unbinding::start(&bench.device);
        eventually("the kernel has let go of it", async || unbinding.is_done()).await;

        let mut buffer = session.buffer(4096).await.unwrap();
        let failed = stream.read(0, 64, buffer).await.unwrap_err();
        assert_eq!(failed.error.reason(), Some(Reason::MediumLost), "{}", failed.error);
        let lost = Answer {
            code: Code::DataLoss,
            reason: Reason::MediumLost,
            exit: 14,
            says: &["can't be reached", "taken from its driver"],
        };
        lost.check(failed.error);
        lost.check(stream.commit().await.unwrap_err());
        buffer = session.buffer(4096).await.unwrap();
        buffer.as_mut_slice().fill(0xee);
        let key = pin.grant().segments[0];
        let (_, status) = session.raw_write(remote_slice(&key, 0, 4096), buffer).await.unwrap();
        println!("one-sided: {status:?}");
        assert!(!status.is_success());
        pin.unpin().await.unwrap();
        stream.unpin().await.unwrap();

        let before = virtual_bytes(bench.daemon.pid());
        for _ in 0..REFUSED {
            lost.check(session.pin(bench.request()).await.expect_err("there is nothing to map"));
        }
        let more = virtual_bytes(bench.daemon.pid()).saturating_sub(before);
        assert!(
            more < REFUSED * bench.device.size() / 2,
            "{more} bytes of addresses are left behind"
        );
        assert_eq!(bench.daemon.ended(), None, "the server lives");
        drop(session);
        assert!(bench.daemon.terminate().success());
        let exports = [(EXPORT, bench.device.path())];
        let refused = Daemon::refused(&exports, &["--rdma-device", "none"]);
        assert!(refused.stderr.contains("no driver has it"), "{}", refused.stderr);
        bench.device.renew();
        Pattern(7).check(0, &bench.device.bytes(0, MIB), "on the device made anew");
    });
}
