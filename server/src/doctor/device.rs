//! A DAX device: what an export of it would be.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use pinfold_leases::{Error, Export, NoDaxDevice};
use pinfold_verbs::checkup::Finding;
use pinfold_verbs::with_causes;

use super::bytes;
use super::directory::{HUGE_PAGE, judge_registration};
use super::trial::{Guarded, Trial};
use crate::fabric::Fabric;

/// Others may write the device's node.
const OTHERS_WRITE: u32 = 0o002;

/// What there is.
#[derive(Debug)]
struct Facts {
    open_to_others: bool,
    tried: Result<Tried, String>,
}

#[derive(Debug)]
struct Tried {
    size: u64,
    page_size: u64,
    durable: bool,
    /// Who serves it.
    locked: Option<String>,
    guarded: Result<Guarded, String>,
}

/// Whether it is to be looked at as a device.
pub(super) fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| {
        let kind = found.file_type();
        kind.is_char_device() || kind.is_block_device()
    })
}

/// Looks at a device, with the RDMA devices that there are. It is mapped and registered, and no byte
/// of it is read or written.
pub(super) fn examine(path: &Path, fabrics: &[Fabric]) -> Vec<Finding> {
    let mode = fs::metadata(path).map_or(0, |found| found.mode());
    let facts = Facts {
        open_to_others: is_open_to_others(mode),
        tried: Tried::by(path, fabrics).map_err(|error| with_causes(&error)),
    };
    let subject = path.display().to_string();
    facts.judge().into_iter().map(|finding| finding.about(&subject)).collect()
}

fn is_open_to_others(mode: u32) -> bool {
    mode & OTHERS_WRITE != 0
}

impl Tried {
    fn by(path: &Path, fabrics: &[Fabric]) -> Result<Self, Error> {
        let export = Export::open(path)?;
        let replaced = || Error::Device { path: path.to_owned(), why: NoDaxDevice::OtherKind };
        let device = export.device().ok_or_else(replaced)?.clone();
        let locked = export.lock().err().map(|error| with_causes(&error));
        let trial = Trial::on_device(device)?;
        Ok(Self {
            size: trial.file.size()?,
            page_size: trial.file.layout()?.page_size,
            durable: trial.kind.can_be_durable(),
            locked,
            guarded: trial.guard(fabrics),
        })
    }

    fn judge(&self) -> Vec<Finding> {
        let mut findings = vec![Finding::ok("device", format!("device-dax, {}", bytes(self.size)))];
        findings.extend(self.locked.as_ref().map(|why| Finding::limited("lock", "held", why)));
        match &self.guarded {
            Err(why) => findings.push(Finding::missing("guard", "none", why)),
            Ok(guarded) => {
                findings.push(Finding::ok("guard", guarded.tier.to_string()));
                let kind = pinfold_leases::MappingKind::DeviceDax;
                let registrations = guarded.registrations.iter();
                findings.extend(registrations.map(|(nic, how)| judge_registration(kind, nic, how)));
            }
        }
        findings.push(self.judge_pages());
        findings.push(if self.durable {
            Finding::ok("commit", "the CPU's caches are written back")
        } else {
            Finding::limited(
                "commit",
                "refused",
                "how this CPU's caches are written back is not known here: nothing is durable",
            )
        });
        findings
    }

    fn judge_pages(&self) -> Finding {
        if self.page_size >= HUGE_PAGE {
            return Finding::ok("page_size", bytes(self.page_size));
        }
        let why = "the NIC translates more pages, and pinning takes longer";
        Finding::limited("page_size", bytes(self.page_size), why)
            .remedy("`ndctl create-namespace -m devdax -a 2M`, which empties it")
    }
}

impl Facts {
    fn judge(&self) -> Vec<Finding> {
        let mut findings = match &self.tried {
            Err(why) => vec![Finding::missing("device", "can't be served", why)],
            Ok(tried) => tried.judge(),
        };
        findings.push(match self.open_to_others {
            false => Finding::ok("access", "owner and group only"),
            true => Finding::limited(
                "access",
                "every user may write to it",
                "local processes write to a device past Pinfold, and nothing tells of it",
            )
            .remedy("`chmod o-w` on the device"),
        });
        findings
    }
}

#[cfg(test)]
mod tests {
    use pinfold_leases::GuardTier;
    use pinfold_verbs::RegistrationMode;
    use pinfold_verbs::checkup::Verdict;

    use super::*;

    fn tried() -> Tried {
        let pinned = ("rxe0".to_owned(), Ok(RegistrationMode::Pinned));
        let guarded =
            Guarded { tier: GuardTier::NotNeeded, map_sync: true, registrations: vec![pinned] };
        let (size, page_size) = (62 << 20, HUGE_PAGE);
        Tried { size, page_size, durable: true, locked: None, guarded: Ok(guarded) }
    }

    fn wrong(open_to_others: bool, tried: Result<Tried, String>) -> Vec<(&'static str, Verdict)> {
        let findings = Facts { open_to_others, tried }.judge();
        let wrong = findings.iter().filter(|finding| finding.result != Verdict::Ok);
        wrong.map(|finding| (finding.check, finding.result)).collect()
    }

    #[test]
    fn each_lack_is_found_alone() {
        use Verdict::{Limited, Missing};
        assert_eq!(wrong(false, Ok(tried())), []);
        assert_eq!(wrong(true, Ok(tried())), [("access", Limited)]);
        assert_eq!(wrong(false, Err("kmem".to_owned())), [("device", Missing)]);
        let why = Some("process 1".to_owned());
        assert_eq!(wrong(false, Ok(Tried { locked: why, ..tried() })), [("lock", Limited)]);
        let small = Tried { page_size: 4096, ..tried() };
        assert_eq!(wrong(false, Ok(small)), [("page_size", Limited)]);
        assert_eq!(wrong(false, Ok(Tried { durable: false, ..tried() })), [("commit", Limited)]);
        let refused = ("rxe0".to_owned(), Err("no on-demand paging".to_owned()));
        let registrations = vec![tried().guarded.unwrap().registrations.remove(0), refused];
        let unregistered = Guarded { registrations, ..tried().guarded.unwrap() };
        let unregistered = Tried { guarded: Ok(unregistered), ..tried() };
        assert_eq!(wrong(false, Ok(unregistered)), [("registration", Limited)]);
        let unmapped = Tried { guarded: Err("no memory".to_owned()), ..tried() };
        assert_eq!(wrong(false, Ok(unmapped)), [("guard", Missing)]);
    }

    #[test]
    fn only_the_others_right_to_write_opens_a_device_to_them() {
        assert!(is_open_to_others(0o666) && is_open_to_others(0o002));
        assert!(!is_open_to_others(0o664) && !is_open_to_others(0o005));
    }
}
