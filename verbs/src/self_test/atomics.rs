//! Whether atomics may be used: a device that misplaces writes may misplace them too, or not.

use std::sync::Arc;

use super::rig::{Pair, Rig, Target, Transfer};
use super::rules::Direction;
use super::{Check, NoAtomicWrite, Outcome, SelfTestError, must_be_refused, rules};
use crate::lane::Atomic;
use crate::queue_pair::Mtu;
use crate::region::{Access, MemoryRegion, RegistrationMode};

/// What a region on which atomics work is made with.
const CHANGEABLE: Access = Access { remote_atomic: true, ..Access::REMOTE_READ_WRITE };

/// In the middle of a page, where rxe misplaces writes.
const OFFSET: usize = rules::PAGE + 8 * 77;

/// Whether atomics change exactly their eight bytes and tell what was there; false where the device has
/// none in this mode. Where they may be used they must be refused to a key without the right, and after
/// the fence.
pub(super) fn atomics(rig: &Rig, mtu: Mtu, checks: &mut Vec<Check>) -> Result<bool, SelfTestError> {
    let capabilities = rig.domain.device().capabilities();
    let on_demand = rig.mode == RegistrationMode::OnDemand;
    if !capabilities.atomics || (on_demand && !capabilities.odp.rc_atomic) {
        return Ok(false);
    }
    let connect = || rig.connect_allowing(CHANGEABLE, mtu, &rig.domain);
    let target = rig.target()?;
    let region = rig.register(&target, 0..target.len(), CHANGEABLE)?;
    if let Err(what) = are_exact(rig, &mut connect()?, &target, &region)? {
        tracing::warn!(device = rig.device_name().to_string(), mode = %rig.mode, what, "no atomics");
        return Ok(false);
    }
    let plain = rig.register(&target, 0..target.len(), Access::REMOTE_READ_WRITE)?;
    let add = Atomic::FetchAdd(1);
    refused(rig, connect()?, &plain, add, "an atomic with a key that does not allow it")?;
    if on_demand {
        target.protect(false).map_err(|error| rig.failed(error))?;
        refused(rig, connect()?, &region, add, "an atomic after the fence")?;
        target.protect(true).map_err(|error| rig.failed(error))?;
    }
    let outcome = Outcome::Holds;
    checks.push(Check { name: "atomics change exactly their eight bytes", outcome });
    Ok(true)
}

/// Whether ATOMIC WRITE writes exactly its eight bytes, or why it may not be used. To the keys it is a write.
pub(super) fn atomic_write(
    rig: &Rig,
    mtu: Mtu,
    checks: &mut Vec<Check>,
) -> Result<Result<(), NoAtomicWrite>, SelfTestError> {
    let connect = || rig.connect(mtu, &rig.domain);
    if let Some(what) = connect()?.no_atomic_write_because() {
        return Ok(Err(NoAtomicWrite::Lacks(what)));
    }
    let target = rig.target()?;
    let region = rig.register(&target, 0..target.len(), Access::REMOTE_READ_WRITE)?;
    if !writes_exactly(rig, &mut connect()?, &target, &region)? {
        tracing::warn!(device = rig.device_name().to_string(), mode = %rig.mode, "no ATOMIC WRITE");
        return Ok(Err(NoAtomicWrite::Wrong));
    }
    let write = Atomic::Write(1);
    let plain = rig.register(&target, 0..target.len(), Access::REMOTE_READ)?;
    refused(rig, connect()?, &plain, write, "an ATOMIC WRITE with a key for reading")?;
    if rig.mode == RegistrationMode::OnDemand {
        target.protect(false).map_err(|error| rig.failed(error))?;
        refused(rig, connect()?, &region, write, "an ATOMIC WRITE after the fence")?;
        target.protect(true).map_err(|error| rig.failed(error))?;
    }
    let outcome = Outcome::Holds;
    checks.push(Check { name: "ATOMIC WRITE writes exactly its eight bytes", outcome });
    Ok(Ok(()))
}

fn writes_exactly(
    rig: &Rig,
    pair: &mut Pair,
    target: &Target,
    region: &MemoryRegion<Arc<Target>>,
) -> Result<bool, SelfTestError> {
    target.fill();
    let mut image = target.snapshot();
    let becomes = !word(&image);
    let (status, _) = pair.atomic(rig, region, OFFSET, Atomic::Write(becomes))?;
    let (address, key) = (region.remote_address(), region.remote_key());
    let behind = Transfer { direction: Direction::Read, address, key, len: 1 };
    if !status.is_success() || !pair.run(rig, behind)?.is_success() {
        return Ok(false);
    }
    image[OFFSET..OFFSET + 8].copy_from_slice(&becomes.to_ne_bytes());
    Ok(target.snapshot() == image)
}

/// Or says what is not.
fn are_exact(
    rig: &Rig,
    pair: &mut Pair,
    target: &Target,
    region: &MemoryRegion<Arc<Target>>,
) -> Result<Result<(), &'static str>, SelfTestError> {
    target.fill();
    let mut image = target.snapshot();
    let mut there = word(&image);
    let added = there.wrapping_add(7);
    let steps = [
        (Atomic::FetchAdd(7), added),
        (Atomic::CompareSwap { expected: there, new: 1 }, added),
        (Atomic::CompareSwap { expected: added, new: 99 }, 99),
    ];
    for (atomic, becomes) in steps {
        let (status, found) = pair.atomic(rig, region, OFFSET, atomic)?;
        if !status.is_success() {
            return Ok(Err("one was refused"));
        }
        image[OFFSET..OFFSET + 8].copy_from_slice(&becomes.to_ne_bytes());
        if found != there || target.snapshot() != image {
            return Ok(Err("one went wrong"));
        }
        there = becomes;
    }
    Ok(Ok(()))
}

fn word(image: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&image[OFFSET..OFFSET + 8]);
    u64::from_ne_bytes(bytes)
}

fn refused(
    rig: &Rig,
    mut pair: Pair,
    region: &MemoryRegion<Arc<Target>>,
    atomic: Atomic,
    what: &str,
) -> Result<(), SelfTestError> {
    let (status, _) = pair.atomic(rig, region, OFFSET, atomic)?;
    must_be_refused(rig, status, what)
}
