//! The address of a port: its GID, and which one of the table to use.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A global identifier: the 128-bit address of a port (IBTA 4.1.1), which on RoCE is an IP address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Gid([u8; 16]);

impl Gid {
    /// A GID from its bytes in network order.
    #[must_use]
    pub const fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes in network order.
    #[must_use]
    pub const fn octets(self) -> [u8; 16] {
        self.0
    }

    /// The IP address that the GID stands for: IPv4 when it is an IPv4-mapped one.
    #[must_use]
    pub fn ip(self) -> IpAddr {
        let v6 = Ipv6Addr::from(self.0);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    }

    /// All bytes zero: an unused entry of the table.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.0 == [0; 16]
    }

    fn is_ipv4(self) -> bool {
        self.ip().is_ipv4()
    }

    fn is_link_local(self) -> bool {
        match self.ip() {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        }
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gid({self})")
    }
}

impl From<Ipv6Addr> for Gid {
    fn from(address: Ipv6Addr) -> Self {
        Self(address.octets())
    }
}

impl From<Ipv4Addr> for Gid {
    fn from(address: Ipv4Addr) -> Self {
        Self(address.to_ipv6_mapped().octets())
    }
}

/// What packets an entry of the GID table is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum GidKind {
    /// An InfiniBand port.
    InfiniBand,
    /// RoCE version 1: Ethernet frames, not routed.
    RoceV1,
    /// RoCE version 2: UDP packets, routed.
    RoceV2,
    /// A kind that this crate doesn't know, with the kernel's number.
    Other(u32),
}

/// The entry of a port's GID table that connections use.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Address {
    /// Index in the GID table.
    pub index: u8,
    /// The GID.
    pub gid: Gid,
    /// What packets it is for.
    pub kind: GidKind,
}

/// The entry to use: RoCE v2 over IPv4 first, then other RoCE v2, then anything else that is not
/// link-local, else the lowest index. Within a class the lowest index wins.
///
/// An InfiniBand port has the link-local prefix unless a subnet manager gave it another, so there
/// the last rule applies: index 0 is the port's own.
pub(crate) fn choose(table: &[Address]) -> Option<Address> {
    let class = |entry: &Address| {
        let v2 = entry.kind == GidKind::RoceV2;
        match (v2, entry.gid.is_ipv4(), entry.gid.is_link_local()) {
            (true, true, _) => 0,
            (true, false, false) => 1,
            (false, _, false) => 2,
            _ => 3,
        }
    };
    table
        .iter()
        .filter(|entry| !entry.gid.is_zero())
        .min_by_key(|entry| (class(entry), entry.index))
        .copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u8, kind: GidKind, ip: &str) -> Address {
        let gid = match ip.parse().unwrap() {
            IpAddr::V4(v4) => Gid::from(v4),
            IpAddr::V6(v6) => Gid::from(v6),
        };
        Address { index, gid, kind }
    }

    #[test]
    fn displays_as_the_ip_address() {
        assert_eq!(Gid::from(Ipv4Addr::new(192, 0, 2, 7)).to_string(), "192.0.2.7");
        assert_eq!(entry(0, GidKind::RoceV2, "2001:db8::1").gid.to_string(), "2001:db8::1");
    }

    #[test]
    fn prefers_roce_v2_over_ipv4() {
        let table = [
            entry(0, GidKind::RoceV1, "fe80::1"),
            entry(1, GidKind::RoceV2, "fe80::1"),
            entry(2, GidKind::RoceV1, "192.0.2.7"),
            entry(3, GidKind::RoceV2, "192.0.2.7"),
            entry(4, GidKind::RoceV2, "2001:db8::1"),
        ];
        assert_eq!(choose(&table).unwrap().index, 3);
        assert_eq!(choose(&table[..3]).unwrap().index, 2, "not link-local goes first");
        assert_eq!(choose(&table[..2]).unwrap().index, 0, "link-local only: the first");
    }

    #[test]
    fn takes_a_routed_ipv6_before_roce_v1() {
        let table =
            [entry(2, GidKind::RoceV1, "192.0.2.7"), entry(4, GidKind::RoceV2, "2001:db8::1")];
        assert_eq!(choose(&table).unwrap().index, 4);
    }

    #[test]
    fn infiniband_falls_to_index_zero() {
        let table = [
            entry(0, GidKind::InfiniBand, "fe80::2:c903:0:1"),
            entry(1, GidKind::InfiniBand, "fe80::2:c903:0:2"),
        ];
        assert_eq!(choose(&table).unwrap().index, 0);
    }

    #[test]
    fn unused_entries_do_not_count() {
        assert_eq!(choose(&[]), None);
        let unused = Address { index: 0, gid: Gid::default(), kind: GidKind::RoceV2 };
        assert_eq!(choose(&[unused]), None);
    }
}
