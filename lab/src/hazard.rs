//! The hazard table: what local processes can do to a file, and what a guard makes of it.
//!
//! Each cell is one hazard × guard tier × file system. A file is guarded and mapped, another process
//! does the thing, and what is seen decides the cell; nobody writes an outcome down by hand.

mod cell;
mod list;
mod mount;
mod place;

pub use cell::{Bench, Outcome, Seen};
pub use list::{HAZARDS, Hazard, Thing};
pub use mount::{MOUNT_HAZARDS, MountHazard};
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

/// The tiers that this kernel offers here; the strongest is what it really grants.
pub fn tiers(bench: &Bench, place: &Place) -> Vec<GuardTier> {
    match bench.strongest(place) {
        GuardTier::Delegation => vec![GuardTier::Lease, GuardTier::Delegation],
        tier => vec![tier],
    }
}

/// Where a row stands in the table.
pub fn order(name: &str) -> usize {
    let names = HAZARDS.iter().map(|hazard| hazard.name);
    let mut names = names.chain(MOUNT_HAZARDS.iter().map(|hazard| hazard.name));
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

fn cell(place: &Place, tier: GuardTier, name: &str, outcome: &Outcome, note: &str) -> Cell {
    let note = match outcome {
        Outcome::Harmless | Outcome::NotCovered => note.to_owned(),
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
