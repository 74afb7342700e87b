//! What the `pinfold` command shares with other programs: the picture of a revocation.
#![forbid(unsafe_code)]

pub mod timeline;
