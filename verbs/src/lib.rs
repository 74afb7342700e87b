//! The few RDMA objects that Pinfold uses, made safe.
//!
//! ```text
//! Device ─► ProtectionDomain ─┬─► MemoryRegion<M>   a key to memory M, which it keeps mapped
//!                             ├─► QueuePair<Init> ─► QueuePair<Connected>   the target side
//!                             ├─► Buffer            exclusive local memory for transfers
//!                             └─► UnconnectedLane ─► Lane<T>   the side that writes and reads
//! ```
//!
//! * **Lifetimes are counted, not borrowed.** Each object keeps what it stands on alive, so nothing
//!   can be destroyed under another object, in whatever order the program drops them.
//! * **A key never outlives its memory.** [`MemoryRegion`] owns a share of what it maps and lets go
//!   of it only after `ibv_dereg_mr` has succeeded; when that fails, the memory is kept.
//! * **A transfer owns its buffer.** From the post to the completion the buffer is inside the
//!   [`Lane`]; it can't be freed, read or changed under the device.
//! * **States are types.** What isn't connected has no method to post with.
//! * **A device is tested before it is trusted**: [`self_test`] finds the rules ([`Quirks`]) without
//!   which a device puts data in the wrong place, and refuses one that no rule saves.
//!
//! libibverbs is loaded at run time. Where it is missing, [`devices`] is empty and nothing else
//! changes, so one binary serves hosts with and without RDMA.
//!
//! # Example
//!
//! Both ends in one process; between two hosts the [`Endpoint`]s travel over some other channel.
//!
//! ```no_run
//! use pinfold_verbs::{
//!     Access, Buffer, Device, Lane, Mtu, Piece, ProtectionDomain, QueuePairBuilder, RemoteSlice,
//!     UnconnectedLane,
//! };
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open_first()?;
//!
//! // The target: memory with a key, and a queue pair that answers.
//! let target = ProtectionDomain::new(&device)?;
//! let memory = memmap2::MmapRaw::from(memmap2::MmapMut::map_anon(8192)?);
//! let region = target.register_pinned(memory, 0..8192, Access::REMOTE_READ_WRITE)?;
//! let responder = QueuePairBuilder::new(&target).build()?;
//!
//! // The initiator: a lane and a buffer.
//! let initiator = ProtectionDomain::new(&device)?;
//! let lane = UnconnectedLane::new(&initiator, 16)?;
//! let mtu = Mtu::largest_within(device.port().active_mtu_bytes).expect("a port has an MTU");
//! let (to_lane, to_responder) = (lane.endpoint(), responder.endpoint());
//! let _responder = responder.connect(&to_lane, mtu)?;
//! let lane: Lane<&str> = lane.connect(&to_responder, mtu)?;
//!
//! let mut buffer = Buffer::new(&initiator, 4096)?;
//! buffer.as_mut_slice().fill(7);
//! let piece = Piece {
//!     local: 0..4096,
//!     remote: RemoteSlice { address: region.remote_address(), key: region.remote_key(), len: 4096 },
//! };
//! lane.post_write(buffer, &[piece], "greeting")?;
//! let done = lane.next_completion().await?;
//! assert!(done.status.is_success(), "{}", done.status);
//!
//! region.deregister()?; // when it returns, the key is dead
//! # Ok(())
//! # }
//! ```

pub mod checkup;

mod buffer;
mod buffer_pool;
mod completion;
mod device;
mod error;
mod extended;
mod flush;
mod gid;
#[cfg(feature = "leases")]
mod held;
mod lane;
mod memory;
mod pd;
mod queue_pair;
mod region;
mod self_test;
mod sys;

pub use buffer::Buffer;
pub use buffer_pool::BufferPool;
pub use completion::{CompletionQueue, CompletionStatus, WorkCompletion};
pub use device::{
    Capabilities, Device, DeviceName, LinkLayer, OdpCapabilities, Port, PortState, devices,
};
pub use error::{Error, with_causes};
pub use extended::Lack;
pub use gid::{Address, Gid, GidKind};
pub use lane::{
    ATOMIC_BYTES, Atomic, Completed, Lane, LaneConnectFailed, PROBE_BYTES, Piece, PostError,
    RemoteSlice, UnconnectedLane,
};
pub use memory::{Memory, PinnableMemory};
pub use pd::ProtectionDomain;
pub use queue_pair::{
    ConnectFailed, Connected, Endpoint, Init, Mtu, QueuePair, QueuePairBuilder, QueuePairNumber,
    QueuePairState,
};
pub use region::{
    Access, DeregisterFailed, MemoryRegion, RegisterError, RegistrationMode, RemoteKey,
};
pub use self_test::{
    Check, NoAtomicWrite, Outcome, Price, Quirks, RegionCost, SelfTestError, SelfTestReport,
    flush_test, region_cost, self_test,
};
