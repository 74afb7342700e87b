//! What an operator wants of one export: what holds its files still, and what local processes meet.

use std::time::Duration;

use pinfold_leases::GuardTier;
use serde::Deserialize;

/// How long a reader may have to wait for the kernel where nobody says otherwise.
const OUTWAIT_MAX: Duration = Duration::from_secs(10);

/// How the files of one export are held, and what becomes of those who want them meanwhile.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Policy {
    /// The strongest guard that is asked for.
    pub guard: GuardWish,
    /// What who would cut, move or rewrite a pinned file meets.
    pub on_truncate: OnTruncate,
    /// What who would read a pinned file meets.
    pub on_read: OnRead,
    /// Files that clients create get the DAX flag (`FS_XFLAG_DAX`), which file systems mounted with
    /// `dax=inode` want.
    pub dax: bool,
}

/// The strongest guard to ask the kernel for.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum GuardWish {
    /// A delegation where the kernel has them (Linux 6.19), else a lease.
    #[default]
    Delegation,
    /// A lease: names and attributes of pinned files stay free.
    Lease,
    /// Nothing: whoever cuts a pinned file does so unseen. Every grant says so.
    None,
}

/// What a local process meets that would cut, move or rewrite a pinned file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OnTruncate {
    /// It waits until the pins have been taken back.
    Recall,
    /// It fails at once, and the pins stay: the file is sealed.
    Deny,
}

/// What a local process meets that would read a pinned file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OnRead {
    /// It waits until the pins have been taken back.
    Revoke,
    /// The first one waits until the kernel lets it through, later ones don't, and the pins stay.
    Outwait {
        /// Revoke instead where the kernel would hold it up for longer than this.
        longest: Duration,
    },
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            guard: GuardWish::Delegation,
            on_truncate: OnTruncate::Recall,
            on_read: OnRead::Revoke,
            dax: false,
        }
    }
}

impl Policy {
    /// What to ask the kernel for.
    pub(crate) fn strongest(self) -> GuardTier {
        match self.guard {
            GuardWish::Delegation => GuardTier::Delegation,
            GuardWish::Lease => GuardTier::Lease,
            GuardWish::None => GuardTier::Unguarded,
        }
    }

    /// How long a reader may be left to the kernel, if it is to be.
    pub(crate) fn longest_outwait(self) -> Option<Duration> {
        match self.on_read {
            OnRead::Revoke => None,
            OnRead::Outwait { longest } => Some(longest),
        }
    }
}

/// A policy as it is written down: what is left out has its default.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    guard: Option<GuardWish>,
    on_truncate: Option<TruncateWish>,
    on_read: Option<ReadWish>,
    outwait_max_s: Option<u64>,
    dax: Option<bool>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
enum TruncateWish {
    Recall,
    Deny,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
enum ReadWish {
    Revoke,
    Outwait,
}

impl Settings {
    /// Takes one `key=value` up.
    pub(crate) fn set(&mut self, setting: &str) -> Result<(), String> {
        let (key, value) = setting.split_once('=').ok_or_else(|| {
            format!(
                "{setting:?} is no key=value (a directory with a comma in its name goes into the \
                 configuration file)"
            )
        })?;
        match key {
            "guard" => {
                let one_of = [
                    ("delegation", GuardWish::Delegation),
                    ("lease", GuardWish::Lease),
                    ("none", GuardWish::None),
                ];
                once(&mut self.guard, key, choice(key, value, &one_of)?)
            }
            "on_truncate" => {
                let one_of = [("recall", TruncateWish::Recall), ("deny", TruncateWish::Deny)];
                once(&mut self.on_truncate, key, choice(key, value, &one_of)?)
            }
            "on_read" => {
                let one_of = [("revoke", ReadWish::Revoke), ("outwait", ReadWish::Outwait)];
                once(&mut self.on_read, key, choice(key, value, &one_of)?)
            }
            "outwait_max_s" => {
                let seconds = value.parse();
                let seconds = seconds
                    .map_err(|_| format!("outwait_max_s is whole seconds, not {value:?}"))?;
                once(&mut self.outwait_max_s, key, seconds)
            }
            "dax" => {
                once(&mut self.dax, key, choice(key, value, &[("true", true), ("false", false)])?)
            }
            _ => Err(format!(
                "there is no setting {key:?}; there are guard, on_truncate, on_read, \
                 outwait_max_s and dax"
            )),
        }
    }

    /// The policy, unless the settings contradict each other.
    pub(crate) fn policy(&self) -> Result<Policy, String> {
        let guard = self.guard.unwrap_or_default();
        let deny = self.on_truncate == Some(TruncateWish::Deny);
        let outwait = self.on_read == Some(ReadWish::Outwait);
        let refuse = |why: &str| Err(why.to_owned());
        if deny && guard == GuardWish::None {
            return refuse(
                "on_truncate=deny and guard=none: until a file is sealed it has to be guarded; \
                 leave one of the two out",
            );
        }
        if deny && guard == GuardWish::Lease {
            return refuse(
                "on_truncate=deny and guard=lease: a sealed file has the append-only flag in place \
                 of a guard; leave guard out",
            );
        }
        if deny && self.on_read.is_some() {
            return refuse(
                "on_truncate=deny and on_read: readers of a sealed file pass at once; leave on_read \
                 out",
            );
        }
        if outwait && guard != GuardWish::Delegation {
            return refuse(
                "on_read=outwait wants guard=delegation: once a plain lease has let a reader \
                 through, open(O_RDONLY|O_TRUNC) empties the file unseen, and without a guard \
                 nobody waits at all",
            );
        }
        if guard == GuardWish::None && (self.on_read.is_some() || self.on_truncate.is_some()) {
            return refuse(
                "guard=none and on_read or on_truncate: without a guard the server never learns of \
                 those who want a file; leave them out",
            );
        }
        if self.outwait_max_s.is_some() && !outwait {
            return refuse(
                "outwait_max_s counts with on_read=outwait only; add that, or leave it out",
            );
        }
        if self.outwait_max_s == Some(0) {
            return refuse(
                "outwait_max_s=0 would never leave a reader to the kernel; say on_read=revoke",
            );
        }
        let longest = self.outwait_max_s.map_or(OUTWAIT_MAX, Duration::from_secs);
        Ok(Policy {
            guard,
            on_truncate: if deny { OnTruncate::Deny } else { OnTruncate::Recall },
            on_read: if outwait { OnRead::Outwait { longest } } else { OnRead::Revoke },
            dax: self.dax.unwrap_or(false),
        })
    }
}

fn once<T>(slot: &mut Option<T>, key: &str, value: T) -> Result<(), String> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("{key} is given twice")),
    }
}

fn choice<T: Copy>(key: &str, value: &str, one_of: &[(&str, T)]) -> Result<T, String> {
    let found = one_of.iter().find(|(name, _)| *name == value);
    found.map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<&str> = one_of.iter().map(|(name, _)| *name).collect();
        format!("{key} is one of {}, not {value:?}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(settings: &[&str]) -> Result<Policy, String> {
        let mut found = Settings::default();
        settings.iter().try_for_each(|setting| found.set(setting))?;
        found.policy()
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        assert_eq!(policy(&[]), Ok(Policy::default()));
        let all =
            policy(&["guard=delegation", "on_truncate=recall", "on_read=revoke", "dax=false"]);
        assert_eq!(all, Ok(Policy::default()));
        let outwait = policy(&["on_read=outwait"]).unwrap();
        assert_eq!(outwait.longest_outwait(), Some(OUTWAIT_MAX));
        let outwait = policy(&["outwait_max_s=3", "on_read=outwait"]).unwrap();
        assert_eq!(outwait.longest_outwait(), Some(Duration::from_secs(3)));
        assert_eq!(policy(&["guard=none", "dax=true"]).unwrap().strongest(), GuardTier::Unguarded);
        assert_eq!(policy(&["on_truncate=deny"]).unwrap().on_truncate, OnTruncate::Deny);
    }

    #[test]
    fn contradictions_are_refused_with_the_reason() {
        for (settings, why) in [
            (&["on_truncate=deny", "guard=none"][..], "has to be guarded"),
            (&["on_truncate=deny", "guard=lease"], "in place of a guard"),
            (&["on_truncate=deny", "on_read=outwait"], "readers of a sealed file pass"),
            (&["on_read=outwait", "guard=lease"], "wants guard=delegation"),
            (&["on_read=outwait", "guard=none"], "wants guard=delegation"),
            (&["on_truncate=recall", "guard=none"], "never learns"),
            (&["outwait_max_s=3"], "on_read=outwait only"),
            (&["on_read=outwait", "outwait_max_s=0"], "say on_read=revoke"),
            (&["on_read=outwait", "outwait_max_s=2s"], "whole seconds"),
            (&["guard=lease", "guard=lease"], "twice"),
            (&["guard=strong"], "one of delegation, lease, none"),
            (&["dax=yes"], "one of true, false"),
            (&["gaurd=none"], "no setting \"gaurd\""),
            (&["none"], "no key=value"),
        ] {
            let refused = policy(settings).unwrap_err();
            assert!(refused.contains(why), "{settings:?}: {refused}");
        }
    }
}
