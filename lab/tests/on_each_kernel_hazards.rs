//! The hazard table, on each kernel: what local processes can do to a guarded file, and what the
//! guard makes of it, as `docs/hazards.json` says and docs/guarantees.md shows.
#![forbid(unsafe_code)]

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use pinfold_lab::hazard::{
    self, Bench, CELL_LINE, Cell, HAZARDS, KERNEL_LINE, MOUNT_HAZARDS, Place,
};
use pinfold_lab::required;
use serde_json::Value;

/// Cells that run at a time.
const WORKERS: usize = 4;

#[test]
fn every_cell_is_what_the_table_says() {
    let bench = Bench::default();
    let places = Place::all();
    let mut jobs = Vec::new();
    for place in &places {
        for tier in hazard::tiers(&bench, place) {
            jobs.extend(HAZARDS.iter().map(|hazard| (place, tier, hazard)));
        }
    }
    let (next, cells) = (AtomicUsize::new(0), Mutex::new(Vec::<Cell>::new()));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some((place, tier, hazard)) =
                    jobs.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let cell = hazard::run(&bench, place, *tier, hazard);
                    cells.lock().unwrap().extend(cell);
                }
            });
        }
    });
    let mut cells = cells.into_inner().unwrap();
    for place in &places {
        for tier in hazard::tiers(&bench, place) {
            let on_mount = |hazard| hazard::run_on_mount(&bench, place, tier, hazard);
            cells.extend(MOUNT_HAZARDS.iter().filter_map(on_mount));
        }
    }
    cells.extend(hazard::run_over_nfs(&bench, &places));
    cells.sort_by_key(|cell| (hazard::order(&cell.hazard), cell.tier.clone(), cell.place.clone()));
    if std::env::var_os("PINFOLD_HAZARDS").is_some() {
        print(&cells);
    } else {
        compare(&cells);
    }
}

/// For `cargo xtask hazards`; past the test harness, which keeps what a test prints.
fn print(cells: &[Cell]) {
    let mut out = std::io::stdout().lock();
    // It has left a line open.
    writeln!(out).unwrap();
    writeln!(out, "{KERNEL_LINE}{}", required("PINFOLD_LAB_KERNEL")).unwrap();
    for cell in cells {
        writeln!(out, "{CELL_LINE}{}", serde_json::to_string(cell).unwrap()).unwrap();
    }
}

/// Each cell with what is written down for this kernel, and the other way round.
fn compare(cells: &[Cell]) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/hazards.json");
    let known: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let suite = required("PINFOLD_LAB_SUITE");
    let row = |name: &str| known["rows"].as_array()?.iter().find(|row| row["hazard"] == name);
    let mut wrong = Vec::new();
    for Cell { hazard, tier, place, outcome, .. } in cells {
        let told = row(hazard).map_or(&Value::Null, |row| &row["outcomes"][tier][&suite][place]);
        if told != outcome.as_str() {
            wrong.push(format!("{hazard}, {tier}, {place}: {outcome}, and the table says {told}"));
        }
    }
    let told = known["rows"].as_array().unwrap().iter();
    let told = told.flat_map(|row| row["outcomes"].as_object().unwrap().values());
    let told: usize =
        told.map(|suites| suites[&suite].as_object().map_or(0, |places| places.len())).sum();
    if told != cells.len() {
        wrong.push(format!("{} cells, and the table has {told}", cells.len()));
    }
    assert!(
        wrong.is_empty(),
        "on {suite}:\n{}\nif that is right, `cargo xtask hazards` writes it down",
        wrong.join("\n")
    );
}
