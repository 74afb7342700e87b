//! Which Debian mirror the kernels come from: the caller's word, else the machine's own sources,
//! else debootstrap's default. No address is written in this repository.

use std::env;
use std::fs;
use std::path::Path;

use anyhow::{Result, bail};

/// Names that the distribution part of a Debian source can have.
const DEBIAN_SUITES: [&str; 9] = [
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "sid",
    "stable",
    "testing",
    "unstable",
    "oldstable",
];

/// The mirror's address, as apt takes it.
pub(crate) fn find() -> Result<String> {
    if let Some(uri) = env::var("PINFOLD_DEBIAN_MIRROR").ok().filter(|uri| !uri.is_empty()) {
        return Ok(uri);
    }
    if let Some(uri) = from_apt(Path::new("/etc/apt")) {
        return Ok(uri);
    }
    let debootstrap = fs::read_to_string("/usr/sbin/debootstrap").unwrap_or_default();
    if let Some(uri) = debootstrap_default(&debootstrap) {
        return Ok(uri);
    }
    bail!(
        "no Debian mirror known: this machine's apt sources name none.\n\
         Set PINFOLD_DEBIAN_MIRROR to the address of a Debian mirror (what follows `deb` in a \
         Debian machine's /etc/apt/sources.list), and run it again"
    )
}

fn from_apt(etc: &Path) -> Option<String> {
    let mut files = vec![etc.join("sources.list")];
    if let Ok(parts) = fs::read_dir(etc.join("sources.list.d")) {
        files.extend(parts.flatten().map(|entry| entry.path()));
    }
    files.sort();
    files.iter().find_map(|file| {
        let text = fs::read_to_string(file).ok()?;
        match file.extension()?.to_str()? {
            "list" => from_one_line_style(&text),
            "sources" => from_deb822(&text),
            _ => None,
        }
    })
}

/// `deb [options] uri suite component…` lines.
fn from_one_line_style(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        is_debian(uri, &[suite], &words.collect::<Vec<_>>()).then(|| uri.to_owned())
    })
}

/// `Field: value` paragraphs.
fn from_deb822(text: &str) -> Option<String> {
    let paragraphs = text.split("\n\n");
    paragraphs.filter(|paragraph| !disabled(paragraph)).find_map(|paragraph| {
        let types = field(paragraph, "Types");
        let uri = *field(paragraph, "URIs").first()?;
        (types.contains(&"deb")
            && is_debian(uri, &field(paragraph, "Suites"), &field(paragraph, "Components")))
        .then(|| uri.to_owned())
    })
}

fn disabled(paragraph: &str) -> bool {
    field(paragraph, "Enabled").first().is_some_and(|word| word.eq_ignore_ascii_case("no"))
}

/// The words of a field, continuation lines included.
fn field<'a>(paragraph: &'a str, name: &str) -> Vec<&'a str> {
    let mut words = Vec::new();
    let mut inside = false;
    for line in paragraph.lines().filter(|line| !line.starts_with('#')) {
        let value = match line.split_once(':') {
            _ if line.starts_with([' ', '\t']) => inside.then_some(line),
            Some((key, value)) => {
                inside = key.eq_ignore_ascii_case(name);
                inside.then_some(value)
            }
            None => None,
        };
        words.extend(value.into_iter().flat_map(str::split_whitespace));
    }
    words
}

/// Other vendors name Debian's suites too, but not `main` below a path with `debian` in it.
fn is_debian(uri: &str, suites: &[&str], components: &[&str]) -> bool {
    let path = uri.split_once("://").map_or(uri, |(_, rest)| rest);
    let path = path.split_once('/').map_or("", |(_, path)| path);
    path.contains("debian")
        && !path.contains("debian-security")
        && components.contains(&"main")
        && suites.iter().any(|suite| DEBIAN_SUITES.contains(suite))
}

fn debootstrap_default(script: &str) -> Option<String> {
    let line = script.lines().find_map(|line| line.trim().strip_prefix("DEF_MIRROR="))?;
    let uri = line.trim_matches(['"', '\'']);
    uri.contains("://").then(|| uri.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_style_skips_comments_options_and_other_vendors() {
        let text = "# deb http://old.example/debian bookworm main\n\
                    deb https://vendor.example/apt bookworm main\n\
                    deb http://security.example/debian-security bookworm-security main\n\
                    deb-src http://m.example/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian/ bookworm main\n";
        assert_eq!(from_one_line_style(text).as_deref(), Some("http://m.example/debian/"));
    }

    #[test]
    fn deb822_takes_the_archive_and_not_its_neighbours() {
        let text = "Types: deb\nURIs: http://m.example/debian-security\nSuites: trixie\n\
                    Components: main\n\n# note\nTypes: deb deb-src\nURIs: http://m.example/debian\n\
                    Suites: trixie-updates\n trixie\nComponents: main contrib\n\
                    Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n";
        assert_eq!(from_deb822(text).as_deref(), Some("http://m.example/debian"));
    }

    #[test]
    fn deb822_honours_enabled_no() {
        let text = "Enabled: no\nTypes: deb\nURIs: http://m.example/debian\nSuites: trixie\n\
                    Components: main\n";
        assert_eq!(from_deb822(text), None);
    }

    #[test]
    fn a_mirror_list_on_disk_is_a_mirror() {
        let uri = "mirror+file:///etc/apt/mirrors/debian.list";
        assert!(is_debian(uri, &["bookworm"], &["main"]));
    }

    #[test]
    fn ubuntu_sources_name_no_debian_mirror() {
        let text = "deb http://m.example/ubuntu noble main universe\n";
        assert_eq!(from_one_line_style(text), None);
    }

    #[test]
    fn debootstrap_names_its_default() {
        let script = "set -e\nDEF_MIRROR=\"http://m.example/debian\"\nDEF_HTTPS=\"x\"\n";
        assert_eq!(debootstrap_default(script).as_deref(), Some("http://m.example/debian"));
        assert_eq!(debootstrap_default("echo"), None);
    }
}
