//! The torture rig: clients stream marked blocks into pinned files on a nearly full file system,
//! while local processes cut, replace and rewrite these files, and clients and server are killed and
//! stopped. Whatever the order of things, no byte may be where it does not belong, and none may be
//! missing that was acknowledged.
//!
//! [`block`] is what bytes look like, [`life`] what a file must hold, [`schedule`] what happens when:
//! those are pure. [`client`] runs in processes of its own, [`local`] does what local processes do,
//! [`crowd`] starts, feeds, kills and stops processes, [`leaks`] looks at what is left, `stuck` tells
//! where everybody hangs, [`outcome`] sums up, and [`rig`] puts it together.
//!
//! `cargo xtask vm torture` runs it.

pub mod block;
pub mod client;
pub mod crowd;
pub mod leaks;
pub mod life;
pub mod local;
pub mod outcome;
pub mod rig;
pub mod schedule;
mod stuck;
pub mod words;
