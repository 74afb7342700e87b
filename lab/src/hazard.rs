//! The hazard table: what local processes can do to a file, and what a guard makes of it.
//!
//! Each cell is one hazard × guard tier × file system. A file is guarded and mapped, another process
//! does the thing, and what is seen decides the cell; nobody writes an outcome down by hand.

mod cell;
mod list;
mod mount;
mod nfs;
mod place;

pub use cell::{Bench, Outcome, Seen};
pub use list::{HAZARDS, Hazard, Thing};
pub use mount::{MOUNT_HAZARDS, MountHazard};
pub use nfs::{NFS_HAZARDS, Nfs};
pub use place::Place;

use pinfold_leases::GuardTier;
use serde::Serialize;

/// A line that a test prints for `cargo xtask hazards` begins so; one cell in JSON follows.
pub const CELL_LINE: &str = "hazard-cell ";
/// And so the one with the kernel's release.
pub const KERNEL_LINE: &str = "hazard-kernel ";

/// One cell of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// What a process does.
    pub hazard: String,
    /// What held the file.
    pub tier: String,
    /// The file system.
    pub place: String,
    /// `held`, `refused (EPERM)` …
    pub outcome: String,
    /// What a harmless or uncovered one means, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// What files can be held by on this place and kernel.
pub fn tiers(bench: &Bench, place: &Place) -> Vec<GuardTier> {
    use GuardTier::{Delegation, Lease, Sealed, Unguarded};
    let all = [Unguarded, Lease, Delegation, Sealed];
    all.into_iter().filter(|tier| bench.grants(place, *tier)).collect()
}

/// Where a row stands in the table.
pub fn order(name: &str) -> usize {
    let names = HAZARDS.iter().map(|hazard| hazard.name);
    let names = names.chain(MOUNT_HAZARDS.iter().map(|hazard| hazard.name));
    let mut names = names.chain(NFS_HAZARDS.iter().map(|(name, ..)| *name));
    names.position(|known| known == name).unwrap_or(usize::MAX)
}

/// Runs one cell.
pub fn run(bench: &Bench, place: &Place, tier: GuardTier, hazard: &Hazard) -> Option<Cell> {
    if !hazard.applies_to(place) {
        return None;
    }
    let seen = bench.run(place, tier, &hazard.thing);
    Some(cell(place, tier, hazard.name, &seen.outcome(), hazard.note))
}

/// Runs one cell about the whole file system; no other runs there meanwhile.
pub fn run_on_mount(
    bench: &Bench,
    place: &Place,
    tier: GuardTier,
    hazard: &MountHazard,
) -> Option<Cell> {
    if hazard.needs_device && place.device.is_none() {
        return None;
    }
    let outcome = (hazard.run)(bench, place, tier);
    Some(cell(place, tier, hazard.name, &outcome, hazard.note))
}

/// Runs the cells about NFS clients, on file systems that clients come to.
pub fn run_over_nfs(bench: &Bench, places: &[Place]) -> Vec<Cell> {
    let places: Vec<&Place> = places.iter().filter(|place| place.is_dax()).collect();
    let nfs = Nfs::start(&places);
    nfs.is_no_export(places[0]);
    let mut cells = Vec::new();
    for place in places {
        for tier in tiers(bench, place) {
            for (name, thing, note) in NFS_HAZARDS {
                let outcome = nfs.run(bench, place, tier, thing);
                cells.push(cell(place, tier, name, &outcome, note));
            }
        }
    }
    cells
}

fn cell(place: &Place, tier: GuardTier, name: &str, outcome: &Outcome, note: &str) -> Cell {
    let note = match outcome {
        Outcome::Harmless | Outcome::NotCovered | Outcome::Told => note.to_owned(),
        _ => String::new(),
    };
    Cell {
        hazard: name.to_owned(),
        tier: tier.to_string(),
        place: place.name.to_owned(),
        outcome: outcome.to_string(),
        note,
    }
}
