//! RDMA FLUSH is tested before it is trusted, too. That bytes reach the medium no test of a running
//! host can see; what can be seen is that it is answered where it is allowed, and nowhere else.

use std::sync::Arc;

use super::rig::{Pair, Rig, Target, Transfer};
use super::rules::Direction;
use super::{SelfTestError, must_be_refused, page_of};
use crate::device::Device;
use crate::extended::Lack;
use crate::region::{Access, RegistrationMode};

/// What a region that may be flushed is made with.
const FLUSHABLE: Access = Access { remote_flush: true, ..Access::REMOTE_READ_WRITE };

/// Tests a device against itself, with memory that is registered on demand: a flush behind a write
/// succeeds; one past the end, with a key that doesn't allow it, or after `mprotect(PROT_NONE)` is
/// refused.
///
/// It blocks, for a fraction of a second as a rule: in async code call it on a thread that may.
///
/// # Errors
///
/// [`SelfTestError::NoFlush`] where something lacks; others: FLUSH must not be used on this device.
pub fn flush_test(device: &Device) -> Result<(), SelfTestError> {
    let lacks = |why| SelfTestError::NoFlush { device: device.device_name(), why };
    if let Some(why) = Lack::of_flush(device.capabilities()) {
        return Err(lacks(why));
    }
    let rig = Rig::new(device, RegistrationMode::OnDemand)?;
    let connect = || rig.connect_allowing(FLUSHABLE, rig.active_mtu, &rig.domain);
    let mut pair = connect()?;
    if let Some(why) = pair.no_flush_because() {
        return Err(lacks(why));
    }
    let target = rig.target()?;
    let region = rig.register(&target, 0..target.len(), FLUSHABLE)?;
    let page = page_of(&region, Direction::Write);
    pair.must_pass(&rig, page)?;
    let status = pair.flush(&rig, page)?;
    if !status.is_success() {
        let what = format!("a flush of {} bytes: {status}", page.len);
        return Err(SelfTestError::Refused { device: device.device_name(), mode: rig.mode, what });
    }

    let beyond = Transfer { len: target.len() + 1, ..page };
    refused(&rig, connect()?, beyond, "a flush of one byte past the end")?;
    let plain = rig.register(&target, 0..target.len(), Access::REMOTE_READ_WRITE)?;
    let what = "a flush with a key that does not allow it";
    refused(&rig, connect()?, page_of(&plain, Direction::Write), what)?;
    fence(&rig, &target, connect()?, page)
}

/// The key dies for a flush with the fence.
fn fence(rig: &Rig, target: &Arc<Target>, pair: Pair, page: Transfer) -> Result<(), SelfTestError> {
    target.protect(false).map_err(|error| rig.failed(error))?;
    refused(rig, pair, page, "a flush after the fence")
}

fn refused(rig: &Rig, mut pair: Pair, range: Transfer, what: &str) -> Result<(), SelfTestError> {
    must_be_refused(rig, pair.flush(rig, range)?, what)
}
