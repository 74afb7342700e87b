//! Sessions against the real server on this machine's own file system, without RDMA: many pins, calls
//! that are given up, links that are slow.

mod given_up;
mod host;
mod liveness;
mod many_pins;
mod slow_links;
