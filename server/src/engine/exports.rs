//! The exports, and an operator's verbs: revoke a file's pins, quiesce an export, resume it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use pinfold_leases::{
    Description, Error as FileError, Export, ExportLock, FileIdentity, Leftovers, RelativePath,
};
use pinfold_proto::v1;
use tokio::sync::Mutex as AsyncMutex;

use super::obstacles::TRY_AGAIN;
use super::{Engine, FILES_PER_TURN, PATIENCE, locked};
use crate::config::{Config, ExportConfig};
use crate::error::{Error, Result};
use crate::fence::Order;
use crate::file_system::{self, FileSystem};
use crate::held::HeldFile;
use crate::ids::SessionId;
use crate::policy::Policy;
use crate::registry::{Reason, Standing};
use crate::wire;

/// A directory or device that clients reach, unless it is quiesced.
#[derive(Debug)]
pub(super) struct Served {
    name: String,
    directory: PathBuf,
    pub(super) policy: Policy,
    /// A DAX device.
    is_device: bool,
    pub(super) file_system: Arc<FileSystem>,
    state: Mutex<State>,
    /// One at a time: a second one would meet the lock of the first.
    resuming: Arc<AsyncMutex<()>>,
}

#[derive(Debug)]
struct State {
    serving: Serving,
    /// Of the directory, which a file system that is not mounted does not have.
    identity: FileIdentity,
    /// Keeps other servers off until nothing of ours is open any more.
    lock: Option<ExportLock>,
    /// Of openings that are over, and of the one that is.
    leftovers: Vec<Leftovers>,
}

impl State {
    fn has(&self, file: &Description) -> bool {
        self.leftovers.iter().any(|left| left.include(file))
    }
}

#[derive(Debug)]
enum Serving {
    Open(Arc<Export>),
    Quiesced(Quiet),
}

#[derive(Clone, Debug)]
struct Quiet {
    since: Instant,
    by: String,
}

/// Exports that are opened, before any thread is started for them.
#[derive(Debug)]
pub(super) struct Opened(Vec<(ExportConfig, Export)>);

/// What exports share if they freeze and die together.
#[derive(Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Fate {
    /// `st_dev`. Subvolumes of one btrfs have each their own.
    FileSystem(u64),
    /// A DAX device is one by itself.
    Device(PathBuf),
}

impl Opened {
    /// Opens all, if they may be served by one process.
    pub(super) fn all(config: &Config) -> Result<Self> {
        let opened = config.exports.iter().map(|config| {
            let export = Export::open(&config.directory)?;
            Ok((config.clone(), export))
        });
        let opened = Self(opened.collect::<Result<_>>()?);
        if !config.share_fate {
            opened.demand_one_fate()?;
        }
        Ok(opened)
    }

    fn demand_one_fate(&self) -> Result<()> {
        let mut first: Option<(&str, Fate)> = None;
        for (config, export) in &self.0 {
            let fate = Fate::of(export)?;
            match &first {
                None => first = Some((&config.name, fate)),
                Some((_, known)) if *known == fate => {}
                Some((one, _)) => {
                    let (one, other) = ((*one).to_owned(), config.name.clone());
                    return Err(Error::SharedFate { one, other });
                }
            }
        }
        Ok(())
    }

    /// How many threads they want.
    pub(super) fn threads(&self) -> Result<usize> {
        let fates = self.0.iter().map(|(_, export)| Fate::of(export));
        Ok(fates.collect::<Result<BTreeSet<_>>>()?.len() * file_system::THREADS)
    }

    /// Starts the threads of each file system.
    pub(super) fn start(self, fences: &Sender<Order>) -> Result<BTreeMap<String, Served>> {
        let mut names: BTreeMap<Fate, Vec<String>> = BTreeMap::new();
        for (config, export) in &self.0 {
            names.entry(Fate::of(export)?).or_default().push(config.name.clone());
        }
        let start = |(fate, names): (Fate, Vec<String>)| {
            Ok((fate, Arc::new(FileSystem::start(names.join(", "), fences)?)))
        };
        let started: BTreeMap<_, _> = names.into_iter().map(start).collect::<Result<_>>()?;
        let serve = |(config, export): (ExportConfig, Export)| {
            let file_system = Arc::clone(&started[&Fate::of(&export)?]);
            Ok((config.name.clone(), Served::new(&config, export, file_system)?))
        };
        self.0.into_iter().map(serve).collect()
    }
}

impl Fate {
    fn of(export: &Export) -> Result<Self> {
        Ok(match export.device() {
            Some(device) => Self::Device(device.path().to_owned()),
            None => Self::FileSystem(export.identity()?.device),
        })
    }
}

/// What quiescing an export did.
#[derive(Debug)]
pub(crate) struct Quieted {
    /// How many pins it took.
    pub(crate) revoked_pins: usize,
    /// Exports on the same file system that are served on.
    pub(crate) beside: Vec<String>,
}

impl Served {
    /// Locks a directory or device.
    fn new(config: &ExportConfig, export: Export, file_system: Arc<FileSystem>) -> Result<Self> {
        if export.device().is_some() && config.policy != Policy::default() {
            let (name, path) = (config.name.clone(), config.directory.clone());
            return Err(Error::DevicePolicy { name, path });
        }
        let is_device = export.device().is_some();
        let state = State {
            identity: export.identity()?,
            lock: Some(export.lock()?),
            leftovers: vec![export.leftovers()],
            serving: Serving::Open(Arc::new(export)),
        };
        Ok(Self {
            name: config.name.clone(),
            directory: config.directory.clone(),
            policy: config.policy,
            is_device,
            file_system,
            state: Mutex::new(state),
            resuming: Arc::default(),
        })
    }

    /// The directory. Whoever has it, or a file of it, keeps the export from getting quiet.
    pub(super) fn export(&self) -> Result<Arc<Export>> {
        match &locked(&self.state).serving {
            Serving::Open(export) => Ok(Arc::clone(export)),
            Serving::Quiesced(quiet) => Err(self.refusal(quiet)),
        }
    }

    fn refusal(&self, quiet: &Quiet) -> Error {
        let Quiet { since, by } = quiet.clone();
        Error::Quiesced { name: self.name.clone(), since: since.elapsed(), by }
    }

    /// Another server may have it from here on.
    pub(super) fn unlock(&self) {
        let lock = locked(&self.state).lock.take();
        drop(lock);
    }

    /// From here on nothing new begins on it. One that is quiesced already stays as it is.
    fn quiesce(&self, by: &str) {
        let mut state = locked(&self.state);
        if let Serving::Open(_) = state.serving {
            let quiet = Quiet { since: Instant::now(), by: by.to_owned() };
            state.serving = Serving::Quiesced(quiet);
        }
    }

    /// Whether nothing of it is open any more; then its lock goes too.
    fn is_let_go(&self) -> Result<bool> {
        let mut state = locked(&self.state);
        if let Serving::Open(_) = state.serving {
            return Err(Error::ResumedMeanwhile { name: self.name.clone() });
        }
        state.leftovers.retain(|left| !left.are_gone());
        if state.leftovers.is_empty() {
            state.lock = None;
        }
        Ok(state.lock.is_none())
    }

    /// Whether this file is to be closed, because it was opened by this export, which is quiesced.
    pub(super) fn is_to_close(&self, file: &Description) -> bool {
        let state = locked(&self.state);
        matches!(state.serving, Serving::Quiesced(_)) && state.has(file)
    }

    /// Whether this file was opened by this export.
    fn has(&self, file: &Description) -> bool {
        locked(&self.state).has(file)
    }

    /// Opens the directory again; false: it was not quiesced. Blocks.
    fn resume(&self) -> Result<bool> {
        if self.quiet().is_none() {
            return Ok(false);
        }
        let export = Export::open(&self.directory)?;
        let found = export.identity()?;
        let mut state = locked(&self.state);
        // The device's number may be another one after it was mounted again.
        let same = |one: FileIdentity| (one.inode, one.birth_time_ns);
        if same(found) != same(state.identity) {
            let (name, path) = (self.name.clone(), self.directory.clone());
            return Err(Error::OtherDirectory { name, path });
        }
        if state.lock.is_none() {
            state.lock = Some(export.lock()?);
        }
        state.identity = found;
        state.leftovers.push(export.leftovers());
        state.serving = Serving::Open(Arc::new(export));
        Ok(true)
    }

    fn quiet(&self) -> Option<Quiet> {
        match &locked(&self.state).serving {
            Serving::Open(_) => None,
            Serving::Quiesced(quiet) => Some(quiet.clone()),
        }
    }

    /// For the operator.
    fn quiesced(&self) -> Option<v1::Quiesced> {
        let Quiet { since, by } = self.quiet()?;
        let complete = locked(&self.state).lock.is_none();
        Some(wire::quiesced(since.elapsed(), by, complete))
    }

    fn device(&self) -> u64 {
        locked(&self.state).identity.device
    }
}

impl Engine {
    pub(super) fn export(&self, name: &str) -> Result<Arc<Export>> {
        self.served(name)?.export()
    }

    /// What an export lies on.
    pub(super) fn file_system(&self, name: &str) -> Result<&Arc<FileSystem>> {
        Ok(&self.served(name)?.file_system)
    }

    /// What the operator wants of an export.
    pub(super) fn policy(&self, name: &str) -> Result<Policy> {
        Ok(self.served(name)?.policy)
    }

    fn served(&self, name: &str) -> Result<&Served> {
        self.exports.get(name).ok_or_else(|| Error::ExportNotFound {
            name: name.to_owned(),
            known: self.exports.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
        })
    }

    /// The exports as entries of the top, ordered.
    pub(crate) fn export_entries(&self) -> Vec<v1::Entry> {
        let entry = |served: &Served| wire::export_entry(served.name.clone(), served.quiesced());
        self.exports.values().map(entry).collect()
    }

    /// The exports for the operator, ordered.
    pub(super) fn export_infos(&self) -> Vec<v1::ExportInfo> {
        let info = |served: &Served| v1::ExportInfo {
            name: served.name.clone(),
            quiesced: served.quiesced(),
        };
        self.exports.values().map(info).collect()
    }

    /// Takes all pins of a file back, with notice; also those that were made by this path when it named
    /// another file. Returns how many, when all is let go.
    pub(crate) async fn revoke(&self, export: String, path: RelativePath) -> Result<usize> {
        let (orphans, orphaned_pins) = self.revoke_orphans(&export, &path).await?;
        match self.revoke_named(&export, &path).await {
            Ok(pins) => Ok(orphaned_pins + pins),
            Err(Error::File(FileError::NotFound { .. })) if orphans > 0 => Ok(orphaned_pins),
            Err(error) => Err(error),
        }
    }

    async fn revoke_named(&self, export: &str, path: &RelativePath) -> Result<usize> {
        let located = self.locate(export.to_owned(), path.clone()).await?;
        let _turn = self.take_turn(&located).await?;
        self.demand_still_named(export, path, &located).await?;
        self.take_back(&located, Reason::Operator).await
    }

    /// Takes all pins of an export back, with notice, and lets go of all that is open of it. Once begun
    /// it runs to its end.
    pub(crate) async fn quiesce(&self, id: SessionId, name: String) -> Result<Quieted> {
        self.served(&name)?;
        let sessions = self.registry().sessions_view();
        let asker = sessions.into_iter().find(|session| session.id == id);
        let by = asker.map(|session| session.client_name).unwrap_or_default();
        let engine = self.arc();
        let to_the_end = tokio::spawn(async move { engine.quiesce_to_the_end(&name, &by).await });
        to_the_end.await.map_err(|_| Error::Task)?
    }

    async fn quiesce_to_the_end(&self, name: &str, by: &str) -> Result<Quieted> {
        let served = self.served(name)?;
        served.quiesce(by);
        tracing::info!(export = name, by, "quiescing");
        let patience = self.break_budget() + PATIENCE;
        let give_up = Instant::now() + patience;
        let mut revoked_pins = 0;
        loop {
            // First: what was resumed meanwhile is nobody's to take back.
            let is_let_go = served.is_let_go()?;
            let files = self.files_reached_by(served);
            for some in files.chunks(FILES_PER_TURN) {
                for file in some {
                    revoked_pins += self.begin_to_take_back(file, Reason::Quiesce);
                }
                tokio::task::yield_now().await;
            }
            if files.is_empty() && is_let_go {
                break;
            }
            if Instant::now() >= give_up {
                let held = files.iter().map(|file| file.path().to_owned());
                let open = held.chain(self.left_open_of(served)).collect();
                return Err(Error::StillOpen { name: name.to_owned(), open, waited: patience });
            }
            // What is looked at here must not be what keeps it open.
            drop(files);
            tokio::time::sleep(TRY_AGAIN).await;
        }
        tracing::info!(export = name, by, revoked_pins, "quiesced");
        Ok(Quieted { revoked_pins, beside: self.beside(served) })
    }

    fn files_reached_by(&self, served: &Served) -> Vec<Arc<HeldFile>> {
        let reached = |file: &&Arc<HeldFile>| {
            file.is_reached_by(&served.name) || served.has(file.description())
        };
        locked(&self.files).values().filter(reached).cloned().collect()
    }

    /// Files that were let go, and are open all the same: a call is inside the kernel with one.
    fn left_open_of(&self, served: &Served) -> Vec<PathBuf> {
        let known: Vec<_> = locked(&self.inodes)
            .values()
            .filter_map(|inode| inode.description.as_ref()?.upgrade())
            .filter(|file| served.has(file))
            .collect();
        let paths = known.iter().map(|file| file.path().to_owned()).collect();
        for file in known {
            let identity = file.identity();
            drop(file);
            // It may have been closed by others meanwhile, to whom we were in the way.
            self.prune(identity);
        }
        paths
    }

    /// Whether this file was opened by an export that is quiesced, and so must not be used on by another
    /// export in which that one lies, or which lies in it.
    pub(super) fn is_to_close(&self, file: &Description) -> bool {
        self.exports.values().any(|served| served.is_to_close(file))
    }

    /// Begins to take a file back, unless that has begun. Returns how many pins clients lose by it.
    pub(super) fn begin_to_take_back(&self, file: &HeldFile, reason: Reason) -> usize {
        let budget = self.break_budget();
        let (pins, actions) = {
            let mut registry = self.registry();
            let pins = match registry.standing(file.description().identity()) {
                Some((guard, Standing::Held { granted, .. })) if guard == file.id() => granted,
                _ => 0,
            };
            (pins, registry.take_back_for(file.id(), reason, Instant::now(), budget))
        };
        // Only once it is going: one that nobody takes back serves the stream path.
        if self.registry().is_going(file.id()) {
            file.gate().close();
        }
        self.perform(actions);
        pins
    }

    fn beside(&self, quiet: &Served) -> Vec<String> {
        // All devices lie in the folder of devices, and none keeps another's file system busy.
        if quiet.is_device {
            return Vec::new();
        }
        let others =
            self.exports.values().filter(|other| other.name != quiet.name && !other.is_device);
        let same =
            others.filter(|other| other.quiet().is_none() && other.device() == quiet.device());
        same.map(|other| other.name.clone()).collect()
    }

    /// Serves a quiesced export again; false: it was not quiesced.
    pub(crate) async fn resume(&self, name: String) -> Result<bool> {
        let turn = Arc::clone(&self.served(&name)?.resuming).lock_owned().await;
        self.call(&name.clone(), move |engine| {
            let _turn = turn;
            let resumed = engine.served(&name)?.resume()?;
            if resumed {
                tracing::info!(export = name, "resumed");
            }
            Ok(resumed)
        })
        .await
    }
}
