//! What is tried on a file system: on a file of the doctor's own that has no name any more, so that
//! nobody can want it, and nothing is left behind however the doctor ends.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pinfold_leases::{
    Create, Description, Error, Export, Guard, GuardTier, Layout, Mapping, MappingKind,
    RelativePath, Watcher,
};
use pinfold_verbs::{ProtectionDomain, RegistrationMode, with_causes};

use crate::fabric::{Fabric, Manner, register};
use crate::registry::PinAccess;
use crate::revocation_cost::Budget;

/// Two huge pages.
const LEN: u64 = 4 << 20;

/// A file to try things on.
pub(super) struct Trial {
    pub(super) file: Description,
    watcher: Watcher,
    /// How much of it is tried.
    len: u64,
    /// What a mapping of it consists of.
    pub(super) kind: MappingKind,
}

/// Why there is none.
#[derive(Debug)]
pub(super) struct TrialError {
    /// The finding that it belongs to.
    pub(super) check: &'static str,
    pub(super) why: String,
    /// The file system makes no files, as procfs does: no permission would help.
    pub(super) no_such_files: bool,
}

/// What became of a guarded mapping.
#[derive(Clone, Debug)]
pub(super) struct Guarded {
    pub(super) tier: GuardTier,
    pub(super) map_sync: bool,
    /// For each device how the mapping was registered, or why it was not.
    pub(super) registrations: Vec<(String, Result<RegistrationMode, String>)>,
}

impl Trial {
    pub(super) fn start(folder: &Path) -> Result<Self, TrialError> {
        let failed = |check| {
            move |error: Error| TrialError {
                check,
                why: with_causes(&error),
                no_such_files: matches!(error, Error::NotFound { .. }),
            }
        };
        let export = Export::open(folder).map_err(failed("directory"))?;
        let name = RelativePath::parse(&new_name()).map_err(failed("directory"))?;
        let create = Create { size: LEN, mode: 0o600, dax: false };
        let file = export.create(&name, &create).map_err(|error| match error {
            Error::UnknownFileSystem { .. } => failed("file_system")(error),
            error => failed("temporary_file")(error),
        })?;
        export.remove(&name).map_err(failed("temporary_file"))?;
        let kind = file.kind().map_err(failed("file_system"))?;
        let (watcher, _breaks) = Watcher::start().map_err(failed("guard"))?;
        Ok(Self { file, watcher, len: LEN, kind })
    }

    /// On a device itself: mapping and registering it changes nothing.
    pub(super) fn on_device(file: Description) -> Result<Self, Error> {
        let (watcher, _breaks) = Watcher::start()?;
        let (len, kind) = (LEN.min(file.size()?), file.kind()?);
        Ok(Self { file, watcher, len, kind })
    }

    pub(super) fn layout(&self) -> Result<Layout, String> {
        self.file.layout().map_err(|error| with_causes(&error))
    }

    /// The strongest guard that the kernel gives.
    pub(super) fn guard_only(&self) -> Result<GuardTier, String> {
        self.file.arm(&self.watcher).map(|armed| armed.tier()).map_err(|error| with_causes(&error))
    }

    /// Guards, maps, registers with each device, and takes it all down again.
    pub(super) fn guard(&self, fabrics: &[Fabric]) -> Result<Guarded, String> {
        let (guard, mapping) = self
            .file
            .arm(&self.watcher)
            .and_then(|armed| armed.map(self.len))
            .map_err(|error| with_causes(&error))?;
        let (tier, map_sync) = (guard.tier(), mapping.map_sync());
        let registrations = fabrics
            .iter()
            .map(|fabric| {
                let mode = try_registration(fabric, self.kind, &mapping, self.len);
                (fabric.device().name().to_owned(), mode)
            })
            .collect();
        take_down(guard, &mapping)?;
        Ok(Guarded { tier, map_sync, registrations })
    }

    /// Whether files here can be sealed.
    pub(super) fn seal(&self) -> Result<(), String> {
        let (guard, mapping) = self
            .file
            .arm_to_seal(&self.watcher)
            .and_then(|armed| armed.map(LEN))
            .map_err(|error| with_causes(&error))?;
        take_down(guard, &mapping)
    }
}

fn take_down(guard: Guard, mapping: &Mapping) -> Result<(), String> {
    let fenced = mapping.fence().map_err(|error| with_causes(&error))?;
    guard.release(fenced).map_err(|error| error.to_string())?;
    Ok(())
}

fn try_registration(
    fabric: &Fabric,
    kind: MappingKind,
    mapping: &Mapping,
    len: u64,
) -> Result<RegistrationMode, String> {
    let (mode, quirks) = fabric.mode_for(kind)?;
    let domain = ProtectionDomain::new(fabric.device()).map_err(|error| with_causes(&error))?;
    let manner = Manner { mode, quirks, access: PinAccess::ReadWrite, flush: false };
    let regions = [0..len; 1];
    let charges = Budget::new(u64::MAX)
        .charge(&Arc::default(), None, fabric.cost_of(mode), &regions)
        .map_err(|error| with_causes(&error))?;
    let regions = regions.into_iter().zip(charges).collect();
    let segments = register(&domain, mapping, regions, &manner, || true)
        .map_err(|error| with_causes(&error))?;
    for segment in segments {
        segment.deregister().map_err(|(_, why)| why)?;
    }
    Ok(mode)
}

/// Nobody else's, should another doctor be at work.
fn new_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!(".pinfoldd-doctor-{}-{number}", std::process::id())
}
