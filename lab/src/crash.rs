//! What survives a power cut: a program that makes, fills, grows and removes files through `pinfoldd`
//! until its guest is gone in the middle of it, and one that looks, in the next guest, whether all is
//! there that was acknowledged.
//!
//! [`words`] is what the first says on its way, [`expected`] what must be there after that (both are
//! pure), [`work`] is the first, [`check`] the second, [`place`] where they do it.
//!
//! `cargo xtask vm crash` starts the guests and cuts their power.

pub mod check;
pub mod expected;
pub mod place;
pub mod words;
pub mod work;
