//! Wrong orders on purpose, to see whether the tests notice. Compiled in by the feature `mutants`
//! alone, and chosen at run time by `PINFOLD_MUTANT`; never to be shipped.
//!
//! Each also pauses after a release that somebody waited for, as if the scheduler had taken the
//! thread's processor away: the right order bears that at any length, which `slow` shows.
//!
//! Three concern what survives a power cut, and leave the order as it is.

use std::sync::OnceLock;
use std::time::Duration;

/// The variable that names the mutant.
const VARIABLE: &str = "PINFOLD_MUTANT";
/// How long the thread is "away" after a release.
const PAUSE: Duration = Duration::from_millis(250);

/// Which mistake is made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Mutant {
    /// None: the right order, with the pause.
    Slow,
    /// The file is let go with no fence; regions are deregistered afterwards.
    NoFence,
    /// The file is let go, and the fence falls after that.
    ReleaseBeforeFence,
    /// The memory is unmapped while regions are still registered on it.
    UnmapBeforeDeregister,
    /// Nothing is made durable: files are made of holes, neither they nor their names are flushed,
    /// mappings lack `MAP_SYNC`, and commits flush nothing.
    NoSync,
    /// Files that are made, resized or removed are not flushed, nor their names.
    NamesWithoutSync,
    /// Only commits flush nothing.
    CommitWithoutFlush,
}

/// What is chosen; none without the variable.
pub(crate) fn chosen() -> Option<Mutant> {
    static CHOSEN: OnceLock<Option<Mutant>> = OnceLock::new();
    *CHOSEN.get_or_init(|| std::env::var(VARIABLE).ok().map(|name| parse(&name)))
}

fn parse(name: &str) -> Mutant {
    match name {
        "slow" => Mutant::Slow,
        "no-fence" => Mutant::NoFence,
        "release-before-fence" => Mutant::ReleaseBeforeFence,
        "unmap-before-deregister" => Mutant::UnmapBeforeDeregister,
        "no-sync" => Mutant::NoSync,
        "names-without-sync" => Mutant::NamesWithoutSync,
        "commit-without-flush" => Mutant::CommitWithoutFlush,
        other => panic!("{VARIABLE}={other} is no mutant"),
    }
}

/// Whether nothing is to be made durable.
pub(crate) fn syncs_nothing() -> bool {
    chosen() == Some(Mutant::NoSync)
}

/// Whether what is made or removed is not to be flushed.
pub(crate) fn syncs_no_names() -> bool {
    matches!(chosen(), Some(Mutant::NoSync | Mutant::NamesWithoutSync))
}

/// Whether a commit is to flush nothing.
pub(crate) fn commits_nothing() -> bool {
    matches!(chosen(), Some(Mutant::NoSync | Mutant::CommitWithoutFlush))
}

/// To be shown by every program that has this compiled in, at its start.
pub fn warning() -> String {
    let doing = match chosen() {
        Some(mutant) => format!("and {VARIABLE} chooses {mutant:?}: files ARE NOT PROTECTED"),
        None => format!("and {VARIABLE} chooses none"),
    };
    format!("BUILT WITH THE FEATURE `mutants`, which breaks guards on purpose, {doing}")
}

/// After a release that somebody waited for.
pub(crate) fn pause() {
    if chosen().is_some() {
        std::thread::sleep(PAUSE);
    }
}

/// After the release, when the pause there is over, more or less.
pub(crate) fn late(work: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        std::thread::sleep(PAUSE);
        work();
    });
}
