//! What a file is to a client: its name, its identity, and what `stat` says about it.

use std::fmt;

use pinfold_proto::v1;

use crate::grant::Malformed;
use crate::{Generation, GuardTier, Quiesced};

/// Names one inode for good, where a path may come to name another one.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct FileIdentity {
    /// Device number of the file system, as the server sees it.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Birth time in nanoseconds since 1970, 0 where the file system keeps none. Inode numbers are
    /// used again, so it takes both.
    pub birth_time_ns: u64,
}

/// What [`create`](crate::Session::create) does about a file that is already there.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum IfExists {
    /// Refuse, and leave it alone.
    #[default]
    Fail,
    /// Give it the new size. Refused while it is pinned.
    Resize,
}

/// What [`create`](crate::Session::create) did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Created {
    /// The file's identity: pass it to [`PinRequest::expect_identity`](crate::PinRequest) to be
    /// sure to pin this very file.
    pub identity: FileIdentity,
    /// False where the file was there and was resized.
    pub created: bool,
}

impl Created {
    pub(crate) fn parse(answer: v1::CreateResponse) -> Result<Self, Malformed> {
        let identity = answer.identity.ok_or(Malformed("a file without identity"))?;
        Ok(Self { identity: identity.into(), created: answer.created })
    }
}

/// What [`stat`](crate::Session::stat) knows about a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FileStat {
    /// The inode behind the path.
    pub identity: FileIdentity,
    /// Size in bytes.
    pub size: u64,
    /// Bytes of storage that the file holds.
    pub allocated: u64,
    /// Whether loads and stores reach the medium directly.
    pub dax: bool,
    /// The live generation, if the file is guarded now.
    pub generation: Option<Generation>,
    /// How many pins are on it now, of all sessions.
    pub pins: u32,
    /// What holds it still, if it is guarded now.
    pub guard: Option<GuardTier>,
    /// Size of the pages that a mapping of it consists of, as far as the server knows.
    pub page_size_bytes: u32,
}

/// What [`list`](crate::Session::list) finds in a folder.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// Its name in the folder.
    pub name: String,
    /// What it is.
    pub kind: EntryKind,
    /// Size in bytes; 0 for all but files.
    pub size: u64,
    /// Bytes of storage that it holds; 0 for all but files.
    pub allocated: u64,
    /// How many pins are on it now, of all sessions.
    pub pins: u32,
    /// Set while it is an export that is quiesced.
    pub quiesced: Option<Quiesced>,
}

/// What an [`Entry`] is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum EntryKind {
    /// An export.
    Export,
    /// A folder.
    Folder,
    /// A file, which can be pinned.
    File,
    /// Something that can't be pinned: a device, a socket, a symbolic link …
    Other,
}

/// An export and a path in it, for messages.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct FileName {
    pub(crate) export: String,
    pub(crate) path: String,
}

impl FileName {
    pub(crate) fn new(export: &str, path: &str) -> Self {
        Self { export: export.to_owned(), path: path.to_owned() }
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.export, self.path)
    }
}

impl From<v1::Entry> for Entry {
    fn from(wire: v1::Entry) -> Self {
        let kind = match wire.kind() {
            v1::EntryKind::Unspecified => EntryKind::Other,
            v1::EntryKind::File => EntryKind::File,
            v1::EntryKind::Folder => EntryKind::Folder,
            v1::EntryKind::Export => EntryKind::Export,
        };
        let v1::Entry { name, size, allocated, pins, quiesced, .. } = wire;
        Self { name, kind, size, allocated, pins, quiesced: quiesced.map(Into::into) }
    }
}

impl From<v1::FileIdentity> for FileIdentity {
    fn from(wire: v1::FileIdentity) -> Self {
        Self { device: wire.device, inode: wire.inode, birth_time_ns: wire.birth_time_ns }
    }
}

impl From<FileIdentity> for v1::FileIdentity {
    fn from(identity: FileIdentity) -> Self {
        Self {
            device: identity.device,
            inode: identity.inode,
            birth_time_ns: identity.birth_time_ns,
        }
    }
}

impl From<IfExists> for v1::IfExists {
    fn from(choice: IfExists) -> Self {
        match choice {
            IfExists::Fail => Self::Fail,
            IfExists::Resize => Self::Resize,
        }
    }
}
