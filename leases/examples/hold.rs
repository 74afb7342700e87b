//! Holds a file on any Linux, no RDMA needed, and prints who wants it.
//!
//! ```text
//! cargo run -p pinfold-leases --example hold -- /tmp/some-file
//! ```
//!
//! Then, in another terminal: `cat /tmp/some-file`, or `: > /tmp/some-file`. They wait until this
//! program has fenced its mapping and let the guard go, which it does as soon as it is told. If
//! somebody has the file open, it waits until they have closed it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pinfold_leases::{
    Armed, Cancel, Description, Error, Export, GuardTier, LeaseBreakTime, RelativePath, Watcher,
    waiting_breakers,
};

fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("usage: hold FILE")?;
    let path = Path::new(&path);
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().and_then(|name| name.to_str()).context("FILE has no name")?;

    let (watcher, breaks) = Watcher::start()?;
    let file = Export::open(folder)?.locate(&RelativePath::parse(name)?)?.open()?;
    loop {
        let armed = arm(&file, &watcher)?;
        let (guard, mapping) = armed.map(file.size()?.max(1))?;
        mapping.populate(0..file.size()?.max(1), || true)?;
        let limit = match LeaseBreakTime::open()?.read()? {
            Some(limit) => format!("{} s", limit.as_secs()),
            None => "ever".to_owned(),
        };
        println!(
            "holding {} ({} bytes) by a {}, MAP_SYNC {}; a breaker waits for {limit} at most",
            path.display(),
            file.size()?,
            guard.tier(),
            if mapping.map_sync() { "on" } else { "off" },
        );
        let news = loop {
            let news = breaks.recv().context("the watcher is gone")?;
            // A writer that came after a reader may have been reported for the guard before.
            if news.guard == guard.id() {
                break news;
            }
        };
        println!("somebody wants the file, as a {:?}:", news.kind);
        for breaker in waiting_breakers(file.identity()) {
            println!("  {breaker}");
        }
        let fenced = mapping.fence()?;
        println!("fenced after {:?}", news.at.elapsed());
        let released = guard.release(fenced)?;
        println!("released after {:?} ({released:?})", news.at.elapsed());
        drop(mapping);
        println!("press Enter to hold it again, Ctrl-C to end");
        if std::io::stdin().read_line(&mut String::new())? == 0 {
            return Ok(());
        }
    }
}

/// Who is in the way is named, and then waited for.
fn arm(file: &Description, watcher: &Watcher) -> Result<Armed> {
    match file.arm(watcher) {
        Err(busy @ Error::Busy { .. }) => println!("{busy}"),
        armed => return Ok(armed?),
    }
    let until = Instant::now() + Duration::from_secs(3600);
    let cancel = Cancel::new()?;
    Ok(file.arm_when_free(watcher, GuardTier::Delegation, until, &cancel)?)
}
