//! Names of things, each its own type.

use std::fmt;

/// A session's name and its secret: 16 random bytes. Not printed, since it is all that a client
/// needs to act as the session.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct SessionId([u8; 16]);

impl SessionId {
    /// From random bytes, or from what a client sent.
    pub(crate) fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// As it goes over the wire.
    pub(crate) fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The first two bytes: enough to tell sessions apart in a log, too few to be used.
impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}{:02x}…", self.0[0], self.0[1])
    }
}

/// A pin; never used again within a run of the server.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PinId(pub u64);

impl fmt::Display for PinId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One guarding of one file: (incarnation of the server, one server-wide counter). Never used
/// again, across restarts too: later ones are greater, the incarnation counting first.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Generation {
    /// Of one run of the server; above that of every run before it.
    pub incarnation: u64,
    /// Counts guardings.
    pub counter: u64,
}

/// One life of one file, which ends when somebody else changes its bytes: (incarnation of the server,
/// one server-wide counter). See `lives`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) struct Life {
    /// Of the run of the server in which it began.
    pub(crate) incarnation: u64,
    /// Counts lives of that run.
    pub(crate) counter: u64,
}

impl Life {
    /// Whether this is not known to be the life that a client knew.
    pub(crate) fn is_another_than(self, known: Self) -> bool {
        self != known
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}.{}", self.incarnation, self.counter)
    }
}
