//! A directory: what an export of it would be.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pinfold_leases::{GuardTier, Layout, MappingKind};
use pinfold_verbs::RegistrationMode;
use pinfold_verbs::checkup::Finding;

use super::bytes;
use super::host::judge_tier;
use super::trial::{Guarded, Trial, TrialError};
use crate::fabric::Fabric;

pub(super) const HUGE_PAGE: u64 = 2 << 20;
/// Others may go through a directory (`x`).
const OTHERS_ENTER: u32 = 0o001;

/// What there is, as far as it got.
#[derive(Debug)]
struct Facts {
    /// As mount(8) calls it.
    file_system: Option<String>,
    /// Free bytes, and all.
    space: Option<(u64, u64)>,
    /// Whether others than owner and group get to the directory; absent if it is none.
    open_to_others: Option<bool>,
    trial: Result<Tried, TrialError>,
}

#[derive(Debug)]
struct Tried {
    kind: MappingKind,
    layout: Result<Layout, String>,
    guarded: Result<Guarded, String>,
    seal: Result<(), String>,
}

/// Looks at a directory, with the devices that there are.
pub(super) fn examine(directory: &Path, fabrics: &[Fabric]) -> Vec<Finding> {
    let findings = Facts::gather(directory, fabrics).judge();
    let subject = directory.display().to_string();
    findings.into_iter().map(|finding| finding.about(&subject)).collect()
}

impl Facts {
    fn gather(directory: &Path, fabrics: &[Fabric]) -> Self {
        let whole = fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let space = rustix::fs::statvfs(&whole).ok();
        Self {
            file_system: kind_of_mount(&mounts, &whole),
            space: space.map(|s| (s.f_bavail * s.f_frsize, s.f_blocks * s.f_frsize)),
            open_to_others: whole.is_dir().then(|| open_to_others(&whole)),
            trial: Trial::start(&whole).map(|trial| Tried::by(&trial, fabrics)),
        }
    }

    fn judge(&self) -> Vec<Finding> {
        let name = self.file_system.as_deref().unwrap_or("unknown");
        let mut findings = Vec::new();
        match &self.trial {
            Err(error) => findings.push(error.judge(name)),
            Ok(tried) => {
                findings.push(Finding::ok("file_system", name));
                findings.extend(tried.judge());
            }
        }
        findings.extend(self.space.map(judge_space));
        findings.extend(self.open_to_others.map(judge_access));
        findings
    }
}

impl TrialError {
    fn judge(&self, file_system: &str) -> Finding {
        let (found, remedy) = match self.check {
            "directory" => ("can't be used", "name a directory that this user may search"),
            "temporary_file" if self.no_such_files => {
                ("can't be made", "export a directory of a file system that keeps files")
            }
            "temporary_file" => (
                "can't be made",
                "run it as the user that serves, who needs write permission and room for 4 MiB",
            ),
            "file_system" => (file_system, "export a directory on ext4, XFS, btrfs, f2fs or tmpfs"),
            _ => ("none", "free some memory and threads, and try again"),
        };
        Finding::missing(self.check, found, &self.why).remedy(remedy)
    }
}

impl Tried {
    fn by(trial: &Trial, fabrics: &[Fabric]) -> Self {
        Self {
            kind: trial.kind,
            layout: trial.layout(),
            guarded: trial.guard(fabrics),
            seal: trial.seal(),
        }
    }

    fn judge(&self) -> Vec<Finding> {
        let mut findings = vec![self.judge_dax()];
        match &self.guarded {
            Ok(guarded) => findings.extend(self.judge_guarded(guarded)),
            Err(why) => findings.push(judge_tier("guard", &Err(why.clone()))),
        }
        findings.push(self.judge_pages());
        findings.push(self.judge_seal());
        findings
    }

    fn judge_dax(&self) -> Finding {
        match self.kind {
            MappingKind::FsDax | MappingKind::DeviceDax => Finding::ok("dax", "in effect"),
            MappingKind::SharedMemory => Finding::limited(
                "dax",
                "no: memory",
                "what is written is gone with the next boot; a commit says so",
            ),
            MappingKind::PageCache => Finding::limited(
                "dax",
                "no: page cache",
                "remote writes land in the page cache, and a commit waits for the disk",
            )
            .remedy("a pmem namespace in fsdax mode, ext4 or XFS mounted with `-o dax=always`"),
        }
    }

    fn judge_guarded(&self, guarded: &Guarded) -> Vec<Finding> {
        let tier: Result<GuardTier, String> = Ok(guarded.tier);
        let mut findings = vec![judge_tier("guard", &tier), self.judge_map_sync(guarded.map_sync)];
        let registrations = guarded.registrations.iter();
        findings
            .extend(registrations.map(|(device, how)| judge_registration(self.kind, device, how)));
        if guarded.registrations.is_empty() {
            let why = "there is no RDMA device: pins go by the stream path";
            findings.push(Finding::limited("registration", "none", why));
        }
        findings
    }

    fn judge_map_sync(&self, taken: bool) -> Finding {
        match (taken, self.kind) {
            (true, _) => Finding::ok("map_sync", "taken"),
            (false, MappingKind::SharedMemory) => {
                Finding::limited("map_sync", "refused", "memory has nothing to be durable on")
            }
            (false, _) => Finding::limited(
                "map_sync",
                "refused",
                "a commit must flush the file's metadata too (fsync), and is slower",
            ),
        }
    }

    fn judge_pages(&self) -> Finding {
        const CHECK: &str = "page_size";
        const SMALL: &str = "the NIC translates more pages, and pinning a large file takes longer";
        let small = || bytes(rustix::param::page_size() as u64);
        let layout = match (&self.layout, self.kind) {
            (_, MappingKind::SharedMemory | MappingKind::PageCache) => {
                return Finding::limited(
                    CHECK,
                    small(),
                    format!("{} has small pages; {SMALL}", self.kind),
                );
            }
            (Err(why), _) => return Finding::limited(CHECK, "unknown", why),
            (Ok(layout), _) => layout,
        };
        if layout.page_size >= HUGE_PAGE {
            return Finding::ok(CHECK, bytes(layout.page_size));
        }
        let why = format!(
            "of {} only {} lie in whole pieces of 2 MiB, in {} extents; {SMALL}",
            bytes(layout.whole_pieces),
            bytes(layout.huge_bytes),
            layout.extents,
        );
        Finding::limited(CHECK, bytes(layout.page_size), why).remedy(
            "a partition that starts on a multiple of 2 MiB, free space that is not in pieces, and \
             `mkfs.ext4 -E stride=512,stripe_width=512` or `mkfs.xfs -d su=2m,sw=1`",
        )
    }

    fn judge_seal(&self) -> Finding {
        match &self.seal {
            Ok(()) => Finding::ok("seal", "possible"),
            Err(why) => Finding::limited("seal", "not possible", why),
        }
    }
}

/// What a NIC makes of a mapping.
pub(super) fn judge_registration(
    kind: MappingKind,
    device: &str,
    how: &Result<RegistrationMode, String>,
) -> Finding {
    match how {
        Ok(mode) => Finding::ok("registration", format!("{device}: {mode}")),
        Err(why) => {
            let found = format!("{device}: none");
            let why = format!("{why}; pins of {kind} go by the stream path");
            Finding::limited("registration", found, why)
        }
    }
}

fn judge_space((free, all): (u64, u64)) -> Finding {
    let found = format!("{} of {} free", bytes(free), bytes(all));
    // A twentieth: then extents come in pieces, and new files may find no room.
    if free >= all / 20 {
        return Finding::ok("space", found);
    }
    Finding::limited("space", found, "new files may find no room, or be in many pieces")
        .remedy("free some space")
}

fn judge_access(open_to_others: bool) -> Finding {
    if !open_to_others {
        return Finding::ok("access", "owner and group only");
    }
    let why = "whoever may open a file revokes its pins by doing so, for reading too";
    Finding::limited("access", "every user gets here", why)
        .remedy("`chmod o-x` on the directory, unless its readers are wanted")
}

/// Whether every directory on the way lets others through.
fn open_to_others(directory: &Path) -> bool {
    directory
        .ancestors()
        .all(|folder| fs::metadata(folder).is_ok_and(|found| found.mode() & OTHERS_ENTER != 0))
}

/// The type of the file system that a path is on: of the last mount on the longest mount point
/// above it (proc_pid_mountinfo(5)).
fn kind_of_mount(mounts: &str, path: &Path) -> Option<String> {
    let mut best: Option<(usize, &str)> = None;
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let (Some(point), Some(kind)) = (before.split(' ').nth(4), after.split(' ').next()) else {
            continue;
        };
        let point = unescaped(point);
        let longest = best.is_none_or(|(length, _)| point.len() >= length);
        if path.starts_with(&point) && longest {
            best = Some((point.len(), kind));
        }
    }
    best.map(|(_, kind)| kind.to_owned())
}

/// Blanks in mount points are written in octal.
fn unescaped(point: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(point.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

#[cfg(test)]
mod tests {
    use pinfold_verbs::checkup::Verdict;

    use super::*;

    fn layout(page_size: u64) -> Layout {
        let huge_bytes = if page_size == HUGE_PAGE { 4 << 20 } else { 0 };
        Layout { extents: 1, huge_bytes, whole_pieces: 4 << 20, page_size }
    }

    fn guarded() -> Guarded {
        let on_demand = ("rxe0".to_owned(), Ok(RegistrationMode::OnDemand));
        Guarded { tier: GuardTier::Delegation, map_sync: true, registrations: vec![on_demand] }
    }

    fn tried() -> Tried {
        Tried {
            kind: MappingKind::FsDax,
            layout: Ok(layout(HUGE_PAGE)),
            guarded: Ok(guarded()),
            seal: Ok(()),
        }
    }

    fn facts(tried: Tried) -> Facts {
        Facts {
            file_system: Some("ext4".to_owned()),
            space: Some((50, 100)),
            open_to_others: Some(false),
            trial: Ok(tried),
        }
    }

    fn wrong(facts: &Facts) -> Vec<(&'static str, Verdict)> {
        let findings = facts.judge();
        let wrong = findings.iter().filter(|finding| finding.result != Verdict::Ok);
        wrong.map(|finding| (finding.check, finding.result)).collect()
    }

    #[test]
    fn a_good_directory_has_nothing_to_say() {
        assert_eq!(wrong(&facts(tried())), []);
        assert_eq!(wrong(&Facts { space: Some((5, 100)), ..facts(tried()) }), [], "a twentieth");
    }

    #[test]
    fn one_closed_folder_on_the_way_keeps_others_out() {
        use std::os::unix::fs::PermissionsExt;
        // Its parent may be anywhere, so only what is beneath it counts here.
        let outer = tempfile::tempdir().unwrap();
        let inner = outer.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let chmod = |folder: &Path, mode| {
            fs::set_permissions(folder, fs::Permissions::from_mode(mode)).unwrap();
        };
        chmod(outer.path(), 0o751);
        chmod(&inner, 0o701);
        assert_eq!(open_to_others(&inner), open_to_others(&std::env::temp_dir()));
        chmod(outer.path(), 0o776);
        assert!(!open_to_others(&inner), "who may list it may not go through it");
    }

    #[test]
    fn each_lack_is_found_alone() {
        use Verdict::{Limited, Missing};
        let but = |changed: Guarded| facts(Tried { guarded: Ok(changed), ..tried() });
        let no_odp = Err("no on-demand paging".to_owned());
        let lacks = [
            (facts(Tried { layout: Ok(layout(4096)), ..tried() }), "page_size", Limited),
            (
                facts(Tried { layout: Err("no extents".to_owned()), ..tried() }),
                "page_size",
                Limited,
            ),
            (facts(Tried { guarded: Err("busy".to_owned()), ..tried() }), "guard", Missing),
            (facts(Tried { seal: Err("no flag".to_owned()), ..tried() }), "seal", Limited),
            (but(Guarded { tier: GuardTier::Lease, ..guarded() }), "guard", Limited),
            (but(Guarded { map_sync: false, ..guarded() }), "map_sync", Limited),
            (but(Guarded { registrations: vec![], ..guarded() }), "registration", Limited),
            (
                but(Guarded { registrations: vec![("rxe0".to_owned(), no_odp)], ..guarded() }),
                "registration",
                Limited,
            ),
            (Facts { space: Some((4, 100)), ..facts(tried()) }, "space", Limited),
            (Facts { open_to_others: Some(true), ..facts(tried()) }, "access", Limited),
        ];
        for (facts, check, verdict) in lacks {
            assert_eq!(wrong(&facts), [(check, verdict)]);
        }
    }

    #[test]
    fn what_can_not_be_tried_is_missing_under_its_own_name() {
        for (check, helps) in [
            ("directory", "may search"),
            ("temporary_file", "write permission"),
            ("file_system", "ext4, XFS"),
            ("guard", "memory and threads"),
        ] {
            let error = TrialError { check, why: "no".to_owned(), no_such_files: false };
            let facts = Facts { trial: Err(error), ..facts(tried()) };
            assert_eq!(wrong(&facts), [(check, Verdict::Missing)]);
            let remedy = facts.judge()[0].remedy.clone().unwrap();
            assert!(remedy.contains(helps), "{check}: {remedy}");
        }
    }

    #[test]
    fn memory_and_page_cache_say_what_they_lack() {
        let checks = |kind| {
            let guarded = Ok(Guarded { map_sync: false, ..guarded() });
            wrong(&facts(Tried { kind, guarded, layout: Err("no extents".to_owned()), ..tried() }))
        };
        let lacks = ["dax", "map_sync", "page_size"].map(|check| (check, Verdict::Limited));
        assert_eq!(checks(MappingKind::SharedMemory), lacks);
        assert_eq!(checks(MappingKind::PageCache), lacks);
        let why = |kind| Tried { kind, ..tried() }.judge_map_sync(false).why.unwrap();
        assert!(why(MappingKind::SharedMemory).contains("nothing to be durable on"));
        assert!(why(MappingKind::PageCache).contains("fsync"));
    }

    #[test]
    fn the_last_mount_on_the_longest_point_counts() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/sda rw\n\
             2 1 0:9 / /mnt rw shared:1 - tmpfs none rw\n\
             3 2 0:10 / /mnt rw - xfs /dev/pmem0 rw,dax=always\n\
             4 1 0:11 / /mnt/a\\040b rw - btrfs /dev/sdb rw\n";
        let kind = |path: &str| kind_of_mount(mounts, Path::new(path));
        assert_eq!(kind("/home").as_deref(), Some("ext4"));
        assert_eq!(kind("/mnt/a").as_deref(), Some("xfs"));
        assert_eq!(kind("/mnt/a b/c").as_deref(), Some("btrfs"));
        assert_eq!(kind("/mntx").as_deref(), Some("ext4"));
        assert_eq!(kind_of_mount("", Path::new("/")), None);
    }
}
