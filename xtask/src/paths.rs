//! Where things lie: the checkout, its build folder, the logs of the lab and the cache.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The checkout.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ lies in the checkout")
}

/// Cargo's build folder.
pub(crate) fn target_dir() -> Result<PathBuf> {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => std::path::absolute(dir).context("CARGO_TARGET_DIR is no usable path"),
        None => Ok(root().join("target")),
    }
}

/// Console logs and what a boot needs, made where missing.
pub(crate) fn lab_dir() -> Result<PathBuf> {
    made(target_dir()?.join("lab"))
}

/// What outlives `cargo clean`, made where missing.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => home().context("neither XDG_CACHE_HOME nor HOME is set: set one")?.join(".cache"),
    };
    made(std::path::absolute(base)?.join("pinfold"))
}

/// The caller's home, if it has one.
pub(crate) fn home() -> Option<PathBuf> {
    env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from)
}

/// A program in PATH or in the folders of root's PATH, where most of the lab's tools live.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// What git says of the checkout.
pub(crate) fn git(args: &[&str]) -> Result<String> {
    let output = Command::new("git").args(args).current_dir(root()).output();
    let output = output.context("git did not start")?;
    ensure!(output.status.success(), "git {} ended with {}", args.join(" "), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// What results are of: the commit, with a mark where the tree has what no commit has.
pub(crate) fn commit() -> Result<String> {
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    Ok(marked(commit, &git(&["status", "--porcelain", "--untracked-files=no"])?))
}

fn marked(commit: String, changes: &str) -> String {
    if changes.is_empty() { commit } else { format!("{commit}, changed") }
}

fn made(dir: PathBuf) -> Result<PathBuf> {
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_a_changed_tree_are_marked() {
        assert_eq!(marked("abc".to_owned(), ""), "abc");
        assert_eq!(marked("abc".to_owned(), " M README.md"), "abc, changed");
    }
}
