//! The host: what its kernel offers, and what this process may do.

use std::fs;
use std::path::Path;
use std::time::Duration;

use pinfold_leases::{GuardTier, LeaseBreakTime};
use pinfold_verbs::checkup::Finding;
use pinfold_verbs::with_causes;
use rustix::process::{Resource, geteuid, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use super::bytes;
use super::trial::{Trial, TrialError};
use crate::engine::drain_budget;
use crate::room;

/// Without these nothing can be served.
pub(super) const ESSENTIAL: [&str; 2] = ["guards", "leases_enable"];

/// Where a file can be tried that is nobody's: the first that the kernel knows leases on.
const SCRATCH: [&str; 4] = ["/dev/shm", "/run", "/tmp", "/var/tmp"];
/// rxe has on-demand paging from this release on.
const RXE_ODP: (u32, u32) = (6, 15);
/// A client has a packet in flight and must hear of the break first.
const SHORT_BUDGET: Duration = Duration::from_secs(1);
/// What a local process may have to wait for if the server should hang.
const LONG_WAIT: Duration = Duration::from_secs(120);
const MANY_FILES: u64 = 65_536;
const MANY_SIGNALS: u64 = 1024;
/// Of [`MANY_FILES`] those that are kept free, or are connections.
const OTHER_DESCRIPTORS: u64 = 2816;

/// What there is.
#[derive(Clone, Debug)]
struct Facts {
    release: String,
    guards: Result<GuardTier, String>,
    leases_enable: Option<String>,
    lease_break_time: Result<Option<Duration>, String>,
    uid: u32,
    capabilities: CapabilitySet,
    memlock: Option<u64>,
    open_files: Option<u64>,
    signals: Option<u64>,
    map_areas: u64,
}

/// Looks at the host.
pub(super) fn examine() -> Vec<Finding> {
    Facts::gather().judge()
}

impl Facts {
    fn gather() -> Self {
        let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).ok();
        let time = LeaseBreakTime::open().and_then(|time| time.read());
        Self {
            release: read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".to_owned()),
            guards: guards(),
            leases_enable: read("/proc/sys/fs/leases-enable"),
            lease_break_time: time.map_err(|error| with_causes(&error)),
            uid: geteuid().as_raw(),
            capabilities: capabilities(None)
                .map_or_else(|_| CapabilitySet::empty(), |sets| sets.effective),
            memlock: getrlimit(Resource::Memlock).current,
            // The daemon raises its own limit to this.
            open_files: getrlimit(Resource::Nofile).maximum,
            signals: getrlimit(Resource::Sigpending).current,
            map_areas: room::max_map_count() as u64,
        }
    }

    fn judge(&self) -> Vec<Finding> {
        vec![
            self.judge_kernel(),
            self.judge_guards(),
            self.judge_leases_enable(),
            self.judge_lease_break_time(),
            self.judge_cap_lease(),
            self.judge_cap_linux_immutable(),
            self.judge_cap_sys_admin(),
            self.judge_memlock(),
            self.judge_open_files(),
            self.judge_map_areas(),
            self.judge_signals(),
        ]
    }

    fn judge_kernel(&self) -> Finding {
        match version(&self.release) {
            Some(version) if version < RXE_ODP => Finding::limited(
                "kernel",
                &self.release,
                "its soft NIC (rxe) has no on-demand paging, which fs-DAX needs; that came with 6.15",
            )
            .remedy("Linux 6.15 or later, or a NIC that has it on any kernel (mlx5)"),
            _ => Finding::ok("kernel", &self.release),
        }
    }

    fn judge_guards(&self) -> Finding {
        judge_tier("guards", &self.guards)
    }

    fn judge_leases_enable(&self) -> Finding {
        match self.leases_enable.as_deref() {
            Some("0") => {
                Finding::missing("leases_enable", "0", "the kernel grants no leases at all")
                    .remedy("`sysctl fs.leases-enable=1`")
            }
            Some(other) => Finding::ok("leases_enable", other),
            None => Finding::limited("leases_enable", "unknown", "it can't be read"),
        }
    }

    fn judge_lease_break_time(&self) -> Finding {
        const CHECK: &str = "lease_break_time";
        const REMEDY: &str = "`sysctl fs.lease-break-time=45`, the kernel's default";
        let time = match &self.lease_break_time {
            Ok(time) => *time,
            Err(error) => return Finding::limited(CHECK, "unknown", error),
        };
        let budget = drain_budget(time);
        let found =
            |time: &str| format!("{time}; clients get {:.1} s to drain", budget.as_secs_f32());
        let Some(time) = time else {
            let why = "the kernel waits for ever: should pinfoldd hang, so does every local process \
                       that wants a pinned file";
            return Finding::limited(CHECK, found("0 (never ends)"), why).remedy(REMEDY);
        };
        let found = found(&format!("{} s", time.as_secs()));
        if budget < SHORT_BUDGET {
            let why = "clients have hardly time to finish what is in flight, and lose their \
                       connection instead";
            return Finding::limited(CHECK, found, why).remedy(REMEDY);
        }
        if time > LONG_WAIT {
            let why =
                "should pinfoldd hang, a local process that wants a pinned file waits that long";
            return Finding::limited(CHECK, found, why).remedy(REMEDY);
        }
        Finding::ok(CHECK, found)
    }

    fn has(&self, capability: CapabilitySet) -> bool {
        self.capabilities.contains(capability)
    }

    fn judge_cap_lease(&self) -> Finding {
        if self.has(CapabilitySet::LEASE) {
            return Finding::ok("cap_lease", "held: files of any owner can be guarded");
        }
        let found = format!("not held, uid {}", self.uid);
        let why = format!("only files that belong to uid {} can be guarded", self.uid);
        Finding::limited("cap_lease", found, why)
            .remedy("run as the files' owner, or AmbientCapabilities=CAP_LEASE in the unit")
    }

    fn judge_cap_linux_immutable(&self) -> Finding {
        if self.has(CapabilitySet::LINUX_IMMUTABLE) {
            return Finding::ok("cap_linux_immutable", "held: files can be sealed");
        }
        let why = "files can't be sealed (made append-only while they are pinned)";
        Finding::limited("cap_linux_immutable", "not held", why)
            .remedy("nothing, unless you want seals: AmbientCapabilities=CAP_LINUX_IMMUTABLE")
    }

    fn judge_cap_sys_admin(&self) -> Finding {
        let held = self.has(CapabilitySet::SYS_ADMIN);
        Finding::ok(
            "cap_sys_admin",
            if held { "held, and not needed" } else { "not held, not needed" },
        )
    }

    fn judge_memlock(&self) -> Finding {
        const CHECK: &str = "memlock";
        if self.has(CapabilitySet::IPC_LOCK) {
            return Finding::ok(CHECK, "no limit (CAP_IPC_LOCK)");
        }
        let Some(limit) = self.memlock else { return Finding::ok(CHECK, "no limit") };
        let why = "files on tmpfs, whose pages the device pins, can be pinned by RDMA up to that much \
                   in all; fs-DAX needs none of it";
        Finding::limited(CHECK, bytes(limit), why)
            .remedy("LimitMEMLOCK=infinity in the unit, `ulimit -l unlimited`, or CAP_IPC_LOCK")
    }

    fn judge_open_files(&self) -> Finding {
        let Some(limit) = self.open_files else { return Finding::ok("open_files", "no limit") };
        if limit >= MANY_FILES {
            return Finding::ok("open_files", limit.to_string());
        }
        let why = "every pinned file takes a descriptor, and every client connection one";
        Finding::limited("open_files", limit.to_string(), why)
            .remedy(format!("LimitNOFILE={MANY_FILES} in the unit, or `ulimit -Hn {MANY_FILES}`"))
    }

    /// Against what the descriptors allow, or what the unit asks for if that is less.
    fn judge_map_areas(&self) -> Finding {
        let files = self.open_files.unwrap_or(MANY_FILES).min(MANY_FILES);
        let files = files.saturating_sub(OTHER_DESCRIPTORS);
        let found = self.map_areas.to_string();
        let for_files = self.map_areas.saturating_sub(room::MAP_AREAS_RESERVED as u64);
        if for_files >= files {
            return Finding::ok("map_areas", found);
        }
        let why = format!(
            "each pinned file takes a memory mapping: pins are refused from some {for_files} files on, before \
             the limit of open files is reached"
        );
        let enough = files + 2 * room::MAP_AREAS_RESERVED as u64;
        Finding::limited("map_areas", found, why)
            .remedy(format!("`sysctl vm.max_map_count={enough}`"))
    }

    fn judge_signals(&self) -> Finding {
        let Some(limit) = self.signals else { return Finding::ok("pending_signals", "no limit") };
        if limit >= MANY_SIGNALS {
            return Finding::ok("pending_signals", limit.to_string());
        }
        let why = "each break queues a signal; when none can be queued, pinfoldd looks at every guard \
                   instead, which is as safe, and slower";
        Finding::limited("pending_signals", limit.to_string(), why)
            .remedy(format!("LimitSIGPENDING={MANY_SIGNALS} in the unit, or `ulimit -i`"))
    }
}

/// What a guard of this strength is worth.
pub(super) fn judge_tier(check: &'static str, tier: &Result<GuardTier, String>) -> Finding {
    match tier {
        Ok(GuardTier::Delegation) => Finding::ok(check, "delegation"),
        Ok(tier) => Finding::limited(
            check,
            tier.to_string(),
            "unlink, rename, link and changes of attributes are not held back, only opens and \
             truncate(2)",
        )
        .remedy("Linux 6.19 or later has delegations"),
        Err(why) => Finding::missing(check, "none", why)
            .remedy("`sysctl fs.leases-enable=1`, and a file system whose leases are known"),
    }
}

/// `7.2.12+deb13-amd64` is 7.2.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Asks the kernel with a file, not by its version.
fn guards() -> Result<GuardTier, String> {
    let mut refused = "no directory for a file to try".to_owned();
    let own = std::env::temp_dir();
    for folder in SCRATCH.iter().map(Path::new).chain([own.as_path()]) {
        match Trial::start(folder) {
            Ok(trial) => return trial.guard_only(),
            Err(TrialError { why, .. }) => refused = why,
        }
    }
    Err(refused)
}

#[cfg(test)]
mod tests {
    use pinfold_verbs::checkup::Verdict;

    use super::*;

    fn good() -> Facts {
        Facts {
            release: "7.2.12+deb13-amd64".to_owned(),
            guards: Ok(GuardTier::Delegation),
            leases_enable: Some("1".to_owned()),
            lease_break_time: Ok(Some(Duration::from_secs(45))),
            uid: 1000,
            capabilities: CapabilitySet::LEASE
                | CapabilitySet::LINUX_IMMUTABLE
                | CapabilitySet::IPC_LOCK,
            memlock: Some(8 << 20),
            open_files: Some(1 << 20),
            signals: Some(30_000),
            map_areas: 65_530,
        }
    }

    fn wrong(facts: &Facts) -> Vec<(&'static str, Verdict)> {
        let findings = facts.judge();
        let wrong = findings.iter().filter(|finding| finding.result != Verdict::Ok);
        wrong.map(|finding| (finding.check, finding.result)).collect()
    }

    #[test]
    fn a_good_host_has_nothing_to_say() {
        assert_eq!(wrong(&good()), []);
    }

    #[test]
    fn each_lack_is_found_alone() {
        use Verdict::{Limited, Missing};
        let seconds = |seconds| Ok(Some(Duration::from_secs(seconds)));
        let without = |capability| good().capabilities - capability;
        let lacks = [
            (Facts { release: "6.14.9".to_owned(), ..good() }, "kernel", Limited),
            (Facts { guards: Ok(GuardTier::Lease), ..good() }, "guards", Limited),
            (Facts { guards: Err("no".to_owned()), ..good() }, "guards", Missing),
            (Facts { leases_enable: Some("0".to_owned()), ..good() }, "leases_enable", Missing),
            (Facts { leases_enable: None, ..good() }, "leases_enable", Limited),
            (
                Facts { lease_break_time: Err("not readable".to_owned()), ..good() },
                "lease_break_time",
                Limited,
            ),
            (Facts { lease_break_time: Ok(None), ..good() }, "lease_break_time", Limited),
            (Facts { lease_break_time: seconds(1), ..good() }, "lease_break_time", Limited),
            (Facts { lease_break_time: seconds(600), ..good() }, "lease_break_time", Limited),
            (Facts { capabilities: without(CapabilitySet::LEASE), ..good() }, "cap_lease", Limited),
            (
                Facts { capabilities: without(CapabilitySet::LINUX_IMMUTABLE), ..good() },
                "cap_linux_immutable",
                Limited,
            ),
            (
                Facts { capabilities: without(CapabilitySet::IPC_LOCK), ..good() },
                "memlock",
                Limited,
            ),
            (Facts { open_files: Some(1024), ..good() }, "open_files", Limited),
            (Facts { map_areas: 10_000, ..good() }, "map_areas", Limited),
            (Facts { signals: Some(100), ..good() }, "pending_signals", Limited),
        ];
        for (facts, check, verdict) in lacks {
            assert_eq!(wrong(&facts), [(check, verdict)]);
        }
    }

    #[test]
    fn what_is_just_enough_is_no_lack() {
        let seconds = |seconds| Ok(Some(Duration::from_secs(seconds)));
        let at_the_limit = Facts {
            release: "6.15.0".to_owned(),
            lease_break_time: seconds(120),
            open_files: Some(65_536),
            signals: Some(1024),
            ..good()
        };
        assert_eq!(wrong(&at_the_limit), []);
        assert_eq!(wrong(&Facts { lease_break_time: seconds(3), ..good() }), []);
        let below = Facts {
            lease_break_time: seconds(2),
            open_files: Some(65_535),
            signals: Some(1023),
            ..good()
        };
        let short = ["lease_break_time", "open_files", "pending_signals"];
        assert_eq!(wrong(&below), short.map(|check| (check, Verdict::Limited)));
    }

    #[test]
    fn a_limit_that_does_not_count_is_no_lack() {
        let rich = Facts { memlock: None, open_files: None, signals: None, ..good() };
        let capabilities = CapabilitySet::LEASE | CapabilitySet::LINUX_IMMUTABLE;
        assert_eq!(wrong(&Facts { capabilities, ..rich }), []);
    }

    #[test]
    fn the_budget_is_told_with_the_time_that_it_follows_from() {
        let found = |time: Option<u64>| {
            let lease_break_time = Ok(time.map(Duration::from_secs));
            Facts { lease_break_time, ..good() }.judge_lease_break_time().found
        };
        assert_eq!(found(Some(45)), "45 s; clients get 5.0 s to drain");
        assert_eq!(found(Some(10)), "10 s; clients get 3.3 s to drain");
        assert_eq!(found(Some(1)), "1 s; clients get 0.0 s to drain");
        assert_eq!(found(None), "0 (never ends); clients get 5.0 s to drain");
    }

    #[test]
    fn releases_of_all_kinds_are_read() {
        assert_eq!(version("6.1.0-50-amd64"), Some((6, 1)));
        assert_eq!(version("6.15-rc1"), Some((6, 15)));
        assert_eq!(version("unknown"), None);
    }
}
