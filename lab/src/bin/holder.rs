//! Holds a file by a guard, in a process of its own: to be killed, or to run as somebody else.
//!
//! `holder guard|seal FOLDER NAME` prints `held: TIER` or `refused: WHY`, lets the file go when a
//! line comes in, prints how that went, and ends. It also ends when nobody can write to it any more.
#![forbid(unsafe_code)]

use std::path::Path;

use pinfold_leases::{Description, Export, Guard, Mapping, RelativePath, Result, Watcher};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [how, folder, name] = &arguments[..] else { panic!("holder guard|seal FOLDER NAME") };
    let (watcher, _breaks) = Watcher::start().unwrap();
    let (guard, mapping) = match hold(&watcher, how, folder, name) {
        Ok(held) => held,
        Err(error) => {
            println!("refused: {error}");
            return;
        }
    };
    println!("held: {}", guard.tier());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    if !line.is_empty() {
        println!("{:?}", guard.release(mapping.fence().unwrap()).unwrap());
    }
}

fn hold(watcher: &Watcher, how: &str, folder: &str, name: &str) -> Result<(Guard, Mapping)> {
    let export = Export::open(Path::new(folder))?;
    let file: Description = export.locate(&RelativePath::parse(name)?)?.open()?;
    let len = file.size()?;
    match how {
        "guard" => file.arm(watcher)?.map(len),
        "seal" => file.arm_to_seal(watcher)?.map(len),
        other => panic!("guard or seal, not {other}"),
    }
}
