//! The self-test: a device is tested before it is trusted.
//!
//! `rules` is pure (observations in, rules out); `rig` holds the two connected ends and moves the
//! bytes; this file says what is tested, and in what order.

mod atomics;
mod cost;
mod flush;
mod rig;
mod rules;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::completion::CompletionStatus;
use crate::device::{Device, DeviceName};
use crate::error::Error;
use crate::extended::Lack;
use crate::pd::ProtectionDomain;
use crate::queue_pair::Mtu;
use crate::region::{Access, MemoryRegion, RegistrationMode};
pub use cost::{Price, RegionCost, region_cost};
pub use flush::flush_test;
use rig::{Pair, Rig, Target, Transfer};
use rules::{Direction, Placement, Rule};

/// The rules without which a device puts data in the wrong place, or refuses a region.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Quirks {
    /// Each message must start at a remote address that is a multiple of this. 1: anywhere.
    pub start_alignment_bytes: u32,
    /// The largest region that can be registered, in bytes.
    pub max_region_bytes: u64,
    /// The path MTU must be exactly this, in bytes. None: any.
    pub path_mtu_bytes: Option<u32>,
    /// Whether atomics may be used, which need not keep the other rules: the device has them, and they
    /// work.
    pub atomics: bool,
    /// Whether [`Atomic::Write`](crate::Atomic::Write) may be used, or why not. It need not keep the other
    /// rules either.
    pub atomic_write: Result<(), NoAtomicWrite>,
}

/// Why 8 bytes can't be written as one step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoAtomicWrite {
    /// It can't be asked for.
    Lacks(Lack),
    /// It was tried, and hit other bytes, or the wrong ones, or failed.
    Wrong,
}

impl fmt::Display for NoAtomicWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lacks(what) => what.fmt(f),
            Self::Wrong => f.write_str("it was tested, and does not write what it should"),
        }
    }
}

impl Quirks {
    /// No rule at all.
    pub const NONE: Self = Self {
        start_alignment_bytes: 1,
        max_region_bytes: u64::MAX,
        path_mtu_bytes: None,
        atomics: true,
        atomic_write: Ok(()),
    };

    /// No rule on where messages start or on the path MTU.
    #[must_use]
    pub fn allow_any_message(&self) -> bool {
        self.start_alignment_bytes <= 1 && self.path_mtu_bytes.is_none()
    }
}

impl Default for Quirks {
    fn default() -> Self {
        Self::NONE
    }
}

impl fmt::Display for Quirks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rules = Vec::new();
        if self.start_alignment_bytes > 1 {
            let bytes = self.start_alignment_bytes;
            rules.push(format!("messages start on a multiple of {bytes} bytes"));
        }
        if let Some(bytes) = self.path_mtu_bytes {
            rules.push(format!("path MTU exactly {bytes} bytes"));
        }
        if self.max_region_bytes < u64::MAX {
            rules.push(format!("regions of at most {} bytes", self.max_region_bytes));
        }
        if !self.atomics {
            rules.push("no atomics".to_owned());
        }
        if self.atomic_write.is_err() {
            rules.push("no ATOMIC WRITE".to_owned());
        }
        if rules.is_empty() {
            return f.write_str("none");
        }
        f.write_str(&rules.join("; "))
    }
}

/// What the self-test found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SelfTestReport {
    /// The device.
    pub device: DeviceName,
    /// How the memory was registered.
    pub mode: RegistrationMode,
    /// The rules to keep.
    pub quirks: Quirks,
    /// What was checked. All of it holds: what doesn't is a [`SelfTestError`].
    pub checks: Vec<Check>,
    /// How long it took.
    pub elapsed: Duration,
}

/// One thing that was checked.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Check {
    /// What should hold.
    pub name: &'static str,
    /// Whether it does.
    pub outcome: Outcome,
}

/// How a check came out.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// It holds.
    Holds,
    /// It holds as long as a rule is kept, which is in the [`Quirks`].
    HoldsUnderRule(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Holds => f.write_str("holds"),
            Self::HoldsUnderRule(rule) => write!(f, "holds if {rule}"),
        }
    }
}

/// Why a device can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelfTestError {
    /// Asked for on-demand registration, the device has no on-demand paging.
    #[error("RDMA device {device} has no on-demand paging for RDMA writes and reads; {remedy}")]
    NoOnDemandPaging {
        /// The device.
        device: DeviceName,
        /// What to do about it.
        remedy: &'static str,
    },

    /// There is no RDMA FLUSH to be had.
    #[error("RDMA device {device} can't be used for RDMA FLUSH: {why}")]
    NoFlush {
        /// The device.
        device: DeviceName,
        /// What is missing.
        why: Lack,
    },

    /// Data ends up in the wrong place, and no known rule prevents it.
    #[error(
        "RDMA device {device} ({mode}) misplaces data, and no known rule prevents it: {details}{remedy}"
    )]
    Misplaced {
        /// The device.
        device: DeviceName,
        /// How the memory was registered.
        mode: RegistrationMode,
        /// The first few transfers that went wrong.
        details: String,
        /// What to do about it, if anything.
        remedy: &'static str,
    },

    /// A key gives access that it shouldn't.
    #[error("RDMA device {device} ({mode}) does not protect memory: {what}; do not use it")]
    NotProtected {
        /// The device.
        device: DeviceName,
        /// How the memory was registered.
        mode: RegistrationMode,
        /// What it let through.
        what: String,
    },

    /// A transfer that keeps all rules failed.
    #[error("RDMA device {device} ({mode}) fails a legal transfer: {what}")]
    Refused {
        /// The device.
        device: DeviceName,
        /// How the memory was registered.
        mode: RegistrationMode,
        /// Which transfer, and its status.
        what: String,
    },

    /// No region of a useful size can be registered.
    #[error("RDMA device {device} registers no region of {smallest} bytes or more on demand")]
    RegionsTooSmall {
        /// The device.
        device: DeviceName,
        /// The smallest size tried.
        smallest: u64,
    },

    /// A transfer never ended.
    #[error("RDMA device {device} did not end a transfer within {} s; is its network interface up?", .waited.as_secs())]
    Stalled {
        /// The device.
        device: DeviceName,
        /// How long it was waited for.
        waited: Duration,
    },

    /// A verb failed.
    #[error("the self-test of RDMA device {device} could not be carried out")]
    Verbs {
        /// The device.
        device: DeviceName,
        /// The failed call.
        #[source]
        source: Error,
    },
}

/// Tests a device against itself: two of its queue pairs are connected to each other, and what
/// arrives in memory is looked at by the processor, never by an RDMA READ (a device that misplaces
/// both ways would confirm itself).
///
/// It checks, for memory registered in that mode, that
/// * writes and reads hit exactly their bytes, at aligned and odd offsets, across pages, in several
///   lengths and path MTUs; what holds only under a rule becomes a quirk;
/// * the bounds hold to the byte, at both ends, and a region for reading can't be written;
/// * a key is worth nothing on a queue pair of another protection domain;
/// * atomics change exactly their bytes, where the key allows them; else they become a quirk; and so does
///   ATOMIC WRITE;
/// * a key dies with its deregistration and, on demand, with `mprotect(PROT_NONE)`;
/// * and how large a region may be (on demand; a pinned one would cost its memory, so there the
///   device's own figure is taken).
///
/// It blocks, for a fraction of a second as a rule: in async code call it on a thread that may.
///
/// # Errors
///
/// [`SelfTestError`]: the device must not be used in that mode.
pub fn self_test(device: &Device, mode: RegistrationMode) -> Result<SelfTestReport, SelfTestError> {
    let started = Instant::now();
    if mode == RegistrationMode::OnDemand && !device.capabilities().odp.is_usable() {
        return Err(SelfTestError::NoOnDemandPaging {
            device: device.device_name(),
            remedy: "rxe has it from Linux 6.15 on, mlx5 devices from ConnectX-4 on; without it \
                     only memory that can be pinned (tmpfs, device-dax) can be served",
        });
    }
    let rig = Rig::new(device, mode)?;
    let mut checks = Vec::new();

    let rule = placement(&rig, &mut checks)?;
    let mtu = rule.path_mtu.unwrap_or(rig.active_mtu);
    bounds(&rig, mtu, &mut checks)?;
    rights(&rig, mtu, &mut checks)?;
    deregistration(&rig, mtu, &mut checks)?;
    if mode == RegistrationMode::OnDemand {
        fence(&rig, mtu, &mut checks)?;
    }
    let max_region_bytes = region_size(&rig, &mut checks)?;
    let atomics = atomics::atomics(&rig, mtu, &mut checks)?;
    let atomic_write = atomics::atomic_write(&rig, mtu, &mut checks)?;

    let quirks = Quirks {
        start_alignment_bytes: rule.start_alignment_bytes,
        max_region_bytes,
        path_mtu_bytes: rule.path_mtu.map(Mtu::bytes),
        atomics,
        atomic_write,
    };
    let report = SelfTestReport {
        device: device.device_name(),
        mode,
        quirks,
        checks,
        elapsed: started.elapsed(),
    };
    tracing::debug!(
        device = device.name(), %mode, quirks = %report.quirks, elapsed = ?report.elapsed,
        "self-test passed"
    );
    Ok(report)
}

/// Writes and reads hit exactly their bytes; or under which rule they do.
fn placement(rig: &Rig, checks: &mut Vec<Check>) -> Result<Rule, SelfTestError> {
    let mut mtus = vec![rig.active_mtu];
    if rig.active_mtu > Mtu::Mtu1024 {
        mtus.push(Mtu::Mtu1024);
    }
    let target = rig.target()?;
    let region = rig.register(&target, 0..target.len(), Access::REMOTE_READ_WRITE)?;
    let mut seen = Vec::new();
    for mtu in mtus {
        let mut pair = rig.connect(mtu, &rig.domain)?;
        for direction in [Direction::Write, Direction::Read] {
            for offset in rules::OFFSETS {
                for len in rules::LENGTHS {
                    let outcome = pair.place(rig, &region, direction, offset, len)?;
                    seen.push(Placement { direction, mtu, offset, len, outcome });
                    if outcome.is_failure() {
                        pair = rig.connect(mtu, &rig.domain)?;
                    }
                }
            }
        }
    }
    let Some(rule) = rules::weakest(&seen) else {
        return Err(SelfTestError::Misplaced {
            device: rig.device_name(),
            mode: rig.mode,
            details: rules::describe(&seen),
            remedy: if rig.active_mtu < Mtu::Mtu4096 {
                "; raise the MTU of its network interface to at least 4200, for a path MTU of \
                 4096, and try again"
            } else {
                ""
            },
        });
    };
    let outcome = match rule.to_text() {
        None => Outcome::Holds,
        Some(text) => Outcome::HoldsUnderRule(text),
    };
    checks.push(Check { name: "writes and reads hit exactly their bytes", outcome });
    Ok(rule)
}

/// A region that starts and ends within a page lets nobody touch a byte outside.
fn bounds(rig: &Rig, mtu: Mtu, checks: &mut Vec<Check>) -> Result<(), SelfTestError> {
    let page = rules::PAGE;
    let len = page + 333;
    let target = rig.target()?;
    let region = rig.register(&target, page..page + len, Access::REMOTE_READ_WRITE)?;
    let (start, key) = (region.remote_address(), region.remote_key());

    let mut pair = rig.connect(mtu, &rig.domain)?;
    pair.must_pass(rig, Transfer { direction: Direction::Write, address: start, key, len })?;
    let cases = [
        (Direction::Write, start, len + 1, "a write of one byte past the end"),
        (Direction::Write, start - 1, 2, "a write of one byte before the start"),
        (Direction::Read, start, len + 1, "a read of one byte past the end"),
    ];
    for (direction, address, len, what) in cases {
        target.fill();
        let mut pair = rig.connect(mtu, &rig.domain)?;
        pair.must_fail(rig, Transfer { direction, address, key, len }, what)?;
        must_be_untouched(rig, &target, what)?;
    }
    checks.push(Check { name: "bounds hold to the byte", outcome: Outcome::Holds });
    Ok(())
}

/// A key gives no more rights than it was made with, and none elsewhere.
fn rights(rig: &Rig, mtu: Mtu, checks: &mut Vec<Check>) -> Result<(), SelfTestError> {
    let target = rig.target()?;
    target.fill();

    let what = "a write with a key for reading";
    let region = rig.register(&target, 0..target.len(), Access::REMOTE_READ)?;
    let mut pair = rig.connect(mtu, &rig.domain)?;
    pair.must_fail(rig, page_of(&region, Direction::Write), what)?;
    must_be_untouched(rig, &target, what)?;
    checks.push(Check { name: "a key for reading can't write", outcome: Outcome::Holds });

    let what = "a write through a queue pair of another protection domain";
    let region = rig.register(&target, 0..target.len(), Access::REMOTE_READ_WRITE)?;
    let other = ProtectionDomain::new(&rig.device).map_err(|error| rig.failed(error))?;
    let mut pair = rig.connect(mtu, &other)?;
    pair.must_fail(rig, page_of(&region, Direction::Write), what)?;
    must_be_untouched(rig, &target, what)?;
    checks.push(Check { name: "a key is worth nothing elsewhere", outcome: Outcome::Holds });
    Ok(())
}

/// A key dies with its deregistration.
fn deregistration(rig: &Rig, mtu: Mtu, checks: &mut Vec<Check>) -> Result<(), SelfTestError> {
    let what = "a write after the deregistration";
    let target = rig.target()?;
    let region = rig.register(&target, 0..target.len(), Access::REMOTE_READ_WRITE)?;
    let write = page_of(&region, Direction::Write);
    let mut pair = rig.connect(mtu, &rig.domain)?;
    pair.must_pass(rig, write)?;
    region.deregister().map_err(|failed| rig.failed(failed.into()))?;
    target.fill();
    pair.must_fail(rig, write, what)?;
    must_be_untouched(rig, &target, what)?;
    checks.push(Check { name: "a key dies with its deregistration", outcome: Outcome::Holds });
    Ok(())
}

/// A key dies with its fence.
fn fence(rig: &Rig, mtu: Mtu, checks: &mut Vec<Check>) -> Result<(), SelfTestError> {
    let target = rig.target()?;
    let region = rig.register(&target, 0..target.len(), Access::REMOTE_READ_WRITE)?;
    let cases = [
        (page_of(&region, Direction::Write), "a write after the fence"),
        (page_of(&region, Direction::Read), "a read after the fence"),
    ];
    let mut pairs = Vec::new();
    for (transfer, what) in cases {
        let mut pair = rig.connect(mtu, &rig.domain)?;
        pair.must_pass(rig, transfer)?;
        pairs.push((pair, transfer, what));
    }
    target.fill();
    target.protect(false).map_err(|error| rig.failed(error))?;
    for (mut pair, transfer, what) in pairs {
        pair.must_fail(rig, transfer, what)?;
    }
    // Only now, with the key dead, is the memory made readable again, to be compared.
    region.deregister().map_err(|failed| rig.failed(failed.into()))?;
    target.protect(true).map_err(|error| rig.failed(error))?;
    must_be_untouched(rig, &target, "a write after the fence")?;
    checks.push(Check { name: "a key dies with its fence", outcome: Outcome::Holds });
    Ok(())
}

/// The largest region, in bytes.
fn region_size(rig: &Rig, checks: &mut Vec<Check>) -> Result<u64, SelfTestError> {
    let name = "regions of 2 GiB can be registered";
    let claimed = rig.device.capabilities().max_mr_size;
    if rig.mode == RegistrationMode::Pinned {
        return Ok(claimed);
    }
    const GIB: u64 = 1 << 30;
    let sizes = [2 * GIB, 2 * GIB - rules::PAGE as u64, GIB, GIB / 4, GIB / 64];
    for (nth, size) in sizes.into_iter().enumerate() {
        if !rig.can_register(size)? {
            continue;
        }
        if nth == 0 {
            checks.push(Check { name, outcome: Outcome::Holds });
            return Ok(claimed);
        }
        let rule = format!("regions have at most {size} bytes");
        checks.push(Check { name, outcome: Outcome::HoldsUnderRule(rule) });
        return Ok(size.min(claimed));
    }
    Err(SelfTestError::RegionsTooSmall { device: rig.device_name(), smallest: GIB / 64 })
}

fn must_be_untouched(rig: &Rig, target: &Arc<Target>, what: &str) -> Result<(), SelfTestError> {
    if target.is_filled() {
        return Ok(());
    }
    let what = format!("{what} was reported as refused, but changed memory");
    Err(SelfTestError::NotProtected { device: rig.device_name(), mode: rig.mode, what })
}

/// A message of the first page of a region.
fn page_of(region: &MemoryRegion<Arc<Target>>, direction: Direction) -> Transfer {
    let (address, key) = (region.remote_address(), region.remote_key());
    Transfer { direction, address, key, len: rules::PAGE }
}

impl Pair {
    fn must_pass(&mut self, rig: &Rig, transfer: Transfer) -> Result<(), SelfTestError> {
        let status = self.run(rig, transfer)?;
        if status.is_success() {
            return Ok(());
        }
        let what = format!("{} of {} bytes: {status}", transfer.direction, transfer.len);
        Err(SelfTestError::Refused { device: rig.device_name(), mode: rig.mode, what })
    }

    fn must_fail(
        &mut self,
        rig: &Rig,
        transfer: Transfer,
        what: &str,
    ) -> Result<(), SelfTestError> {
        must_be_refused(rig, self.run(rig, transfer)?, what)
    }
}

/// What succeeded although it must not is the end of all trust in the device.
fn must_be_refused(rig: &Rig, status: CompletionStatus, what: &str) -> Result<(), SelfTestError> {
    if !status.is_success() {
        return Ok(());
    }
    let what = format!("{what} succeeded");
    Err(SelfTestError::NotProtected { device: rig.device_name(), mode: rig.mode, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quirks_say_what_to_do() {
        assert_eq!(Quirks::NONE.to_string(), "none");
        assert!(Quirks::default().allow_any_message());
        let rxe = Quirks {
            start_alignment_bytes: 4096,
            max_region_bytes: (2 << 30) - 4096,
            path_mtu_bytes: Some(4096),
            atomics: false,
            atomic_write: Err(NoAtomicWrite::Wrong),
        };
        assert!(!rxe.allow_any_message());
        assert_eq!(
            rxe.to_string(),
            "messages start on a multiple of 4096 bytes; path MTU exactly 4096 bytes; regions of \
             at most 2147479552 bytes; no atomics; no ATOMIC WRITE"
        );
    }
}
