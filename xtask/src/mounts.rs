//! Where the guest may mount: never over what the caller needs to see.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{kernel::Kernel, paths};

/// Folders that a Linux has and that the guest may hide, the best first.
const CANDIDATES: [&str; 4] = ["/run", "/mnt", "/srv", "/media"];

/// The folder that gets the guest's own tmpfs with the lab in it.
pub(crate) fn base(shown: &[PathBuf]) -> Result<&'static str> {
    let exists = |dir: &str| Path::new(dir).is_dir() && !Path::new(dir).is_symlink();
    choose(shown, exists).with_context(|| {
        format!(
            "no place for the guest's own files: each of {} is missing or holds the checkout, the \
             cache, HOME, the build folder or the program; move one of them elsewhere",
            CANDIDATES.join(", ")
        )
    })
}

/// Whether `/run` can be the guest's own too: `ip netns` writes there.
pub(crate) fn extra(shown: &[PathBuf], base: &str) -> &'static str {
    if base != "/run" && is_free("/run", shown) && Path::new("/run").is_dir() { "/run" } else { "" }
}

fn choose(shown: &[PathBuf], exists: impl Fn(&str) -> bool) -> Option<&'static str> {
    CANDIDATES.into_iter().find(|dir| exists(dir) && is_free(dir, shown))
}

fn is_free(dir: &str, shown: &[PathBuf]) -> bool {
    !shown.iter().any(|path| path.starts_with(dir))
}

/// What must stay visible, as given and with symbolic links resolved.
pub(crate) fn shown(kernel: &Kernel, program: &Path) -> Result<Vec<PathBuf>> {
    let mut all = vec![
        paths::root().to_owned(),
        paths::target_dir()?,
        paths::cache_dir()?,
        kernel.tree.clone(),
        env::current_dir().context("the current folder is gone")?,
        std::path::absolute(program)?,
    ];
    all.extend(paths::home());
    all.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    all.extend(env::vars_os().filter(|(name, _)| is_lab_variable(name)).map(|(_, v)| v.into()));
    let resolved: Vec<_> = all.iter().filter_map(|path| path.canonicalize().ok()).collect();
    all.extend(resolved);
    Ok(all)
}

fn is_lab_variable(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b"PINFOLD_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(shown: &[&str]) -> Option<&'static str> {
        let shown: Vec<_> = shown.iter().map(PathBuf::from).collect();
        choose(&shown, |dir| dir != "/srv")
    }

    #[test]
    fn run_is_taken_where_nothing_lies_below() {
        assert_eq!(chosen(&["/home/a/pinfold", "/runtime/x"]), Some("/run"));
    }

    #[test]
    fn a_clone_below_run_moves_the_base() {
        assert_eq!(chosen(&["/run/user/1000/pinfold"]), Some("/mnt"));
    }

    #[test]
    fn what_does_not_exist_is_passed_over() {
        assert_eq!(chosen(&["/run/a", "/mnt"]), Some("/media"));
    }

    #[test]
    fn no_place_is_said() {
        assert_eq!(chosen(&["/run/a", "/mnt/b", "/media/c"]), None);
    }
}
