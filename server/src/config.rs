//! What the operator decides, parsed and checked.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::registry::Limits;

/// Port that server and client agree on where nobody says otherwise.
pub const DEFAULT_PORT: u16 = 7350;

/// Everything that one server needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directories that clients may reach.
    pub exports: Vec<ExportConfig>,
    /// Which RDMA devices to use; clients get the first unless they ask for another.
    pub rdma_devices: Vec<DeviceChoice>,
    /// How often clients must give a sign of life.
    pub heartbeat_interval: Duration,
    /// A session that is silent for this long is over.
    pub time_to_live: Duration,
    /// What one server holds at most.
    pub limits: Limits,
}

impl Config {
    /// One with the defaults for all but the exports.
    pub fn new(exports: Vec<ExportConfig>) -> Self {
        Self {
            exports,
            rdma_devices: vec![DeviceChoice::Auto],
            heartbeat_interval: Duration::from_secs(2),
            time_to_live: Duration::from_secs(10),
            limits: Limits::default(),
        }
    }
}

/// A named directory: `NAME=DIR`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ExportConfig {
    /// What clients call it.
    pub name: String,
    /// Where it is.
    pub directory: PathBuf,
}

impl FromStr for ExportConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, directory) =
            text.split_once('=').ok_or("an export is NAME=DIR, such as logs=/mnt/pmem0/logs")?;
        if name.is_empty() || name.contains('/') {
            return Err(format!(
                "{name:?} can't be an export's name: it is empty or holds a slash"
            ));
        }
        if directory.is_empty() {
            return Err(format!("export {name} names no directory"));
        }
        Ok(Self { name: name.to_owned(), directory: PathBuf::from(directory) })
    }
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
        assert_eq!(
            (export.name.as_str(), export.directory.to_str()),
            ("logs", Some("/mnt/pmem0/a=b"))
        );
        for bad in ["logs", "=/mnt", "a/b=/mnt", "logs="] {
            assert!(bad.parse::<ExportConfig>().is_err(), "{bad:?}");
        }
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
