//! What survives a power cut (`pinfold_lab::crash`): `cargo xtask vm crash` runs it in the lab.
//!
//! `crash work PLACE FOLDER SEED [LAST-FILE]` goes on until its guest is gone. `crash check PLACE FOLDER SAID`
//! looks, in the next guest, whether all is there that was acknowledged; SAID is a file with what
//! the first has said.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use pinfold_lab::crash::{check, place::Place, work};

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let place = |name: &str| name.parse::<Place>().map_err(anyhow::Error::msg);
    match words[..] {
        ["work", at, folder, seed, ref last @ ..] if last.len() <= 1 => {
            let seed = seed.parse().context("a seed")?;
            let last = last.first().map(|file| file.parse().context("a file's number"));
            match work::work(place(at)?, folder, seed, last.transpose()?).await? {}
        }
        ["check", at, folder, said] => {
            let said = std::fs::read_to_string(said).with_context(|| said.to_owned())?;
            check::check(place(at)?, folder, &said)?.print();
            Ok(())
        }
        _ => bail!("crash work PLACE FOLDER SEED [LAST-FILE], or crash check PLACE FOLDER SAID"),
    }
}
