//! What the operator decides, parsed and checked.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

pub use crate::passage::UNSEEN_PAUSE;
use crate::policy::Settings;
pub use crate::policy::{GuardWish, OnRead, OnTruncate, Policy};
use crate::registry::Limits;

/// Port that server and client agree on where nobody says otherwise.
pub const DEFAULT_PORT: u16 = 7350;

/// Everything that one server needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directories and devices that clients may reach.
    pub exports: Vec<ExportConfig>,
    /// Which RDMA devices to use; clients get the first unless they ask for another.
    pub rdma_devices: Vec<DeviceChoice>,
    /// How often clients must give a sign of life.
    pub heartbeat_interval: Duration,
    /// A session that is silent for this long is over.
    pub time_to_live: Duration,
    /// What one server holds at most.
    pub limits: Limits,
    /// Exports of different file systems may be served, although what holds one up may hold up all.
    pub share_fate: bool,
    /// Kernel memory that memory regions may take, in bytes; absent: a quarter of the host's memory.
    pub region_memory_bytes_max: Option<u64>,
    /// How long a file is left alone after a break for which nobody was seen waiting, unless somebody opens
    /// or changes it before.
    pub unseen_breaker_pause: Duration,
    /// Where it remembers earlier runs, for itself alone. `None`: it remembers nothing, and the clock
    /// alone orders its generations after those of earlier runs.
    pub state_folder: Option<PathBuf>,
}

/// A session that is silent for this part of its time-to-live loses its queue pair.
const GRACE: u32 = 2;
/// Signs of life that a client owes in a time-to-live.
const HEARTBEATS: u32 = 5;

impl Config {
    /// One with the defaults for all but the exports.
    pub fn new(exports: Vec<ExportConfig>) -> Self {
        Self {
            exports,
            rdma_devices: vec![DeviceChoice::Auto],
            heartbeat_interval: Duration::from_secs(10) / HEARTBEATS,
            time_to_live: Duration::from_secs(10),
            limits: Limits::default(),
            share_fate: false,
            region_memory_bytes_max: None,
            unseen_breaker_pause: UNSEEN_PAUSE,
            state_folder: None,
        }
    }

    /// Sessions that are silent for so long are over; clients are told to be heard more often.
    #[must_use]
    pub fn live_for(mut self, time: Duration) -> Self {
        self.time_to_live = time;
        self.heartbeat_interval = time / HEARTBEATS;
        self
    }

    /// A session that is silent for this long loses its queue pair.
    pub(crate) fn silence_grace(&self) -> Duration {
        self.time_to_live / GRACE
    }
}

/// A named directory, or DAX device, and what the operator wants of it: `NAME=DIR[,key=value…]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ExportConfig {
    /// What clients call it.
    pub name: String,
    /// Where it is.
    pub directory: PathBuf,
    /// How its files are held.
    pub policy: Policy,
}

impl ExportConfig {
    /// One with the default policy.
    pub fn new(name: impl Into<String>, directory: impl Into<PathBuf>) -> Self {
        Self { name: name.into(), directory: directory.into(), policy: Policy::default() }
    }

    fn checked(name: &str, directory: PathBuf, settings: &Settings) -> Result<Self, String> {
        if name.is_empty() || name.contains('/') {
            return Err(format!(
                "{name:?} can't be an export's name: it is empty or holds a slash"
            ));
        }
        if directory.as_os_str().is_empty() {
            return Err(format!("export {name} names no directory"));
        }
        let policy = settings.policy().map_err(|why| format!("export {name}: {why}"))?;
        Ok(Self { name: name.to_owned(), directory, policy })
    }
}

impl FromStr for ExportConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) =
            text.split_once('=').ok_or("an export is NAME=DIR, such as logs=/mnt/pmem0/logs")?;
        let mut parts = rest.split(',');
        let directory = PathBuf::from(parts.next().unwrap_or_default());
        let mut settings = Settings::default();
        for part in parts {
            settings.set(part).map_err(|why| format!("export {name}: {why}"))?;
        }
        Self::checked(name, directory, &settings)
    }
}

/// What a configuration file holds (TOML).
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    exports: BTreeMap<String, ExportTable>,
    #[serde(default)]
    share_fate: bool,
}

/// What a configuration file says, checked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FileSettings {
    /// In the order of their names.
    pub exports: Vec<ExportConfig>,
    /// As [`Config::share_fate`].
    pub share_fate: bool,
}

/// `[exports.NAME]`. A struct that is flattened can't refuse unknown keys, so [`Settings`] does.
#[derive(Debug, Deserialize)]
struct ExportTable {
    path: PathBuf,
    #[serde(flatten)]
    settings: toml::Table,
}

/// Reads the text of a configuration file.
pub fn settings_of(text: &str) -> Result<FileSettings, String> {
    let file: ConfigFile = toml::from_str(text).map_err(|error| error.to_string())?;
    let export = |(name, table): (String, ExportTable)| {
        let settings: Settings = table
            .settings
            .try_into()
            .map_err(|error| format!("export {name}: {}", toml::de::Error::message(&error)))?;
        ExportConfig::checked(&name, table.path, &settings)
    };
    let share_fate = file.share_fate;
    let exports = file.exports.into_iter().map(export).collect::<Result<_, _>>()?;
    Ok(FileSettings { exports, share_fate })
}

/// As [`settings_of`], from the file itself.
pub fn read_settings(path: &Path) -> Result<FileSettings, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("can't read {}: {error}", path.display()))?;
    settings_of(&text).map_err(|why| format!("{}: {why}", path.display()))
}

/// Each export has a name and a directory of its own, or it is not clear which policy holds.
pub fn check_exports(exports: &[ExportConfig]) -> Result<(), String> {
    if exports.is_empty() {
        return Err("nothing is exported; name a directory with --export, or in a file that \
                    --config names"
            .to_owned());
    }
    for (at, export) in exports.iter().enumerate() {
        if exports[..at].iter().any(|other| other.name == export.name) {
            return Err(format!("export {} is given twice", export.name));
        }
        let same = |other: &&ExportConfig| canonical(other) == canonical(export);
        if let Some(other) = exports[..at].iter().find(same) {
            return Err(format!(
                "exports {} and {} are the same directory, {}; leave one out",
                other.name,
                export.name,
                export.directory.display()
            ));
        }
    }
    Ok(())
}

/// One that is not there is refused later, with the reason.
fn canonical(export: &ExportConfig) -> PathBuf {
    export.directory.canonicalize().unwrap_or_else(|_| export.directory.clone())
}

/// The state folder where none is named: systemd's (`StateDirectory=`), else root's, else the user's.
/// Each variable is `None` where it is not set.
pub fn default_state_folder(
    variable: impl Fn(&str) -> Option<OsString>,
    is_root: bool,
) -> Result<PathBuf, String> {
    let named = |name| variable(name).filter(|value| !value.is_empty());
    if let Some(folders) = named("STATE_DIRECTORY") {
        // Several are separated by colons (systemd.exec(5)).
        let first = folders.as_bytes().split(|byte| *byte == b':').next().unwrap_or_default();
        return Ok(PathBuf::from(OsStr::from_bytes(first)));
    }
    if is_root {
        return Ok(PathBuf::from("/var/lib/pinfold"));
    }
    let home = || Some(PathBuf::from(named("HOME")?).join(".local/state"));
    let users = named("XDG_STATE_HOME").map(PathBuf::from).or_else(home);
    users.map(|folder| folder.join("pinfold")).ok_or_else(|| {
        "no state folder is known, as HOME is not set; name one with --state-dir".to_owned()
    })
}

/// Which RDMA device to use.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum DeviceChoice {
    /// The first one with an active port; the server starts without, if there is none, and refuses
    /// pins with the reason.
    #[default]
    Auto,
    /// This one or none: the server does not start without it.
    Named(String),
    /// No device: everything goes by the stream path.
    None,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("name a device, or say auto or none".to_owned()),
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            name => Ok(Self::Named(name.to_owned())),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Named(name) => f.write_str(name),
            Self::None => f.write_str("none"),
        }
    }
}

/// Keys travel in plain text until there is TLS, so only this host may listen in.
pub fn check_listen_address(address: SocketAddr, plaintext_on_network: bool) -> Result<(), String> {
    if address.ip().is_loopback() || plaintext_on_network {
        return Ok(());
    }
    Err(format!(
        "{address} can be reached from the network, and this version has no TLS: whoever reads the \
         traffic could write into the files; listen on 127.0.0.1, or accept that with \
         --plaintext-on-network"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_a_name_and_a_directory() {
        let export: ExportConfig = "logs=/mnt/pmem0/a=b".parse().unwrap();
        assert_eq!(export, ExportConfig::new("logs", "/mnt/pmem0/a=b"));
        for bad in ["logs", "=/mnt", "a/b=/mnt", "logs=", "logs=,guard=none"] {
            assert!(bad.parse::<ExportConfig>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn settings_follow_the_directory() {
        let export: ExportConfig = "logs=/mnt/a,guard=none,dax=true".parse().unwrap();
        assert_eq!(export.directory.to_str(), Some("/mnt/a"));
        assert_eq!((export.policy.guard, export.policy.dax), (GuardWish::None, true));
        for (bad, why) in [
            ("logs=/mnt/a,b", "configuration file"),
            ("logs=/mnt/a,", "no key=value"),
            ("logs=/mnt/a,guard=none,on_truncate=deny", "export logs: on_truncate=deny"),
        ] {
            let refused = bad.parse::<ExportConfig>().unwrap_err();
            assert!(refused.contains(why), "{bad}: {refused}");
        }
    }

    #[test]
    fn a_file_says_the_same_as_the_options() {
        let text = "share_fate = true\n[exports.logs]\npath = \"/mnt/a,b\"\non_read = \"outwait\"\n\
                    outwait_max_s = 3\n\n[exports.scratch]\npath = \"/mnt/c\"\nguard = \"none\"\n";
        let FileSettings { exports, share_fate } = settings_of(text).unwrap();
        assert!(share_fate);
        let scratch: ExportConfig = "scratch=/mnt/c,guard=none".parse().unwrap();
        assert_eq!(exports[1], scratch);
        let longest = Duration::from_secs(3);
        assert_eq!(exports[0].policy.on_read, OnRead::Outwait { longest });
        assert_eq!(exports[0].directory.to_str(), Some("/mnt/a,b"));
        for (bad, why) in [
            ("", "exports"),
            ("[exports.a]\nguard = \"none\"", "path"),
            ("[exports.a]\npath = \"/x\"\ngaurd = \"none\"", "gaurd"),
            ("[exports.a]\npath = \"/x\"\nguard = \"strong\"", "strong"),
            ("[export.a]\npath = \"/x\"", "export"),
            ("[exports.a]\npath = \"/x\"\noutwait_max_s = 1", "export a: outwait_max_s"),
            ("[exports.\"a/b\"]\npath = \"/x\"", "holds a slash"),
        ] {
            let refused = settings_of(bad).unwrap_err();
            assert!(refused.contains(why), "{bad}: {refused}");
        }
    }

    #[test]
    fn each_export_has_a_name_and_a_directory_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let same = [ExportConfig::new("a", path), ExportConfig::new("b", path.join("."))];
        assert!(check_exports(&same).unwrap_err().contains("the same directory"));
        let twice = [ExportConfig::new("a", path), ExportConfig::new("a", "/elsewhere")];
        assert!(check_exports(&twice).unwrap_err().contains("twice"));
        assert!(check_exports(&[]).unwrap_err().contains("nothing is exported"));
        check_exports(&[ExportConfig::new("a", path), ExportConfig::new("b", "/")]).unwrap();
    }

    #[test]
    fn the_state_folder_is_systemds_or_roots_or_the_users() {
        let folder = |set: &[(&str, &str)], is_root| {
            let value = |name: &str| set.iter().find(|(known, _)| *known == name);
            default_state_folder(|name| value(name).map(|(_, value)| value.into()), is_root)
        };
        let home = ("HOME", "/home/a");
        for (set, is_root, expected) in [
            (&[("STATE_DIRECTORY", "/var/lib/x:/var/lib/y"), home][..], false, "/var/lib/x"),
            (&[home], true, "/var/lib/pinfold"),
            (&[home], false, "/home/a/.local/state/pinfold"),
            (&[home, ("XDG_STATE_HOME", "/s"), ("STATE_DIRECTORY", "")], false, "/s/pinfold"),
        ] {
            assert_eq!(folder(set, is_root).unwrap(), PathBuf::from(expected), "{set:?}");
        }
        assert!(folder(&[], false).unwrap_err().contains("--state-dir"));
    }

    #[test]
    fn plaintext_stays_on_this_host_unless_asked_for() {
        let open = "192.0.2.1:7350".parse().unwrap();
        assert!(check_listen_address(open, false).is_err());
        assert!(check_listen_address(open, true).is_ok());
        assert!(check_listen_address("127.0.0.1:0".parse().unwrap(), false).is_ok());
        assert!(check_listen_address("[::1]:0".parse().unwrap(), false).is_ok());
    }
}
