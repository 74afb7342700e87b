//! Packages of Debian's suites: resolved and fetched by apt, which checks their signatures, unpacked
//! once, cached.
//!
//! Versions are resolved at run time because mirrors drop old ones. What is in the cache is used
//! without the network until `vm fetch --update` asks for newer ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};

use crate::{mirror, paths};

/// Debian signs its archive with these keys; the package debian-archive-keyring brings them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A folder of the cache, with a tree for each set of packages that was fetched.
pub(crate) struct Store {
    dir: PathBuf,
}

impl Store {
    pub(crate) fn open(name: &str) -> Result<Store> {
        let dir = paths::cache_dir()?.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Store { dir })
    }

    /// The tree that was fetched last under that name: a file of the name holds the tree's.
    pub(crate) fn tree(&self, name: &str) -> Option<PathBuf> {
        let tree = fs::read_to_string(self.dir.join(name)).ok()?;
        let tree = self.dir.join(tree.trim());
        tree.is_dir().then_some(tree)
    }

    /// The cached tree of that name; else it is fetched.
    pub(crate) fn get(
        &self,
        name: &str,
        fetch: impl FnOnce() -> Result<PathBuf>,
    ) -> Result<PathBuf> {
        if let Some(tree) = self.tree(name) {
            return Ok(tree);
        }
        let _lock = self.lock()?;
        // Another run may have brought it while this one waited for the lock.
        self.tree(name).map_or_else(fetch, Ok)
    }

    pub(crate) fn lock(&self) -> Result<Flock<fs::File>> {
        let path = self.dir.join("lock");
        let file = fs::File::create(&path)
            .with_context(|| format!("cannot write in the cache: {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(lock),
            Err((file, _)) => {
                eprintln!("fetch: waiting for another run that fills {}", self.dir.display());
                Flock::lock(file, FlockArg::LockExclusive)
                    .map_err(|(_, error)| error)
                    .with_context(|| format!("cannot lock {}", path.display()))
            }
        }
    }

    /// Brings packages of a suite into the cache, under that name; the lock is held. `choose` says
    /// which, the first of them names the tree, and `arrange` makes the tree from what they hold.
    pub(crate) fn fetch(
        &self,
        name: &str,
        suite: &str,
        choose: impl FnOnce(&Apt) -> Result<Vec<Package>>,
        arrange: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let work = Scratch::new(self.dir.join("incomplete"))?;
        let apt = Apt::new(&work.0.join("apt"), suite)?;
        let packages = choose(&apt)?;
        let first = packages.first().context("no package to fetch")?;
        let tree_name = format!("{}_{}", first.name, first.version);
        let tree = self.dir.join(&tree_name);
        if !tree.is_dir() {
            let unpacked = work.0.join("tree");
            for deb in apt.download(&packages)? {
                run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(work.0.join("debs")))?;
            }
            arrange(&work.0.join("debs"), &unpacked)?;
            fs::rename(&unpacked, &tree)
                .with_context(|| format!("cannot put the packages at {}", tree.display()))?;
        }
        let pointer = work.0.join("pointer");
        fs::write(&pointer, &tree_name)?;
        fs::rename(&pointer, self.dir.join(name))?;
        Ok(tree)
    }
}

/// A package as its suite has it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) bytes: u64,
}

/// apt with state folders of its own: other suites, and the machine's packages untouched. The
/// machine's apt configuration (a proxy, say) applies.
pub(crate) struct Apt {
    dir: PathBuf,
}

impl Apt {
    fn new(dir: &Path, suite: &str) -> Result<Apt> {
        ensure!(
            Path::new(KEYRING).is_file(),
            "{KEYRING} is missing: `apt-get install debian-archive-keyring` brings it"
        );
        let mirror = mirror::find()?;
        for part in ["lists/partial", "cache/archives/partial", "debs"] {
            fs::create_dir_all(dir.join(part))?;
        }
        let options = format!("arch=amd64 target=Packages signed-by={KEYRING}");
        let source = format!("deb [{options}] {mirror} {suite} main\n");
        fs::write(dir.join("sources.list"), source)?;
        fs::write(dir.join("status"), "")?;
        eprintln!("fetch: reading the package list of {suite} from {mirror}");
        let apt = Apt { dir: dir.to_owned() };
        run(apt.command("apt-get").arg("update")).with_context(|| {
            format!("{suite} could not be read; PINFOLD_DEBIAN_MIRROR names another mirror")
        })?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let dir = self.dir.display();
        command.current_dir(self.dir.join("debs")).args(["-q", "-q"]);
        for option in [
            format!("Dir::Etc::SourceList={dir}/sources.list"),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State={dir}"),
            format!("Dir::State::Lists={dir}/lists"),
            format!("Dir::State::Status={dir}/status"),
            format!("Dir::Cache={dir}/cache"),
            "APT::Architecture=amd64".to_owned(),
            // apt's own user can't enter a cache that lies in a private home.
            "APT::Sandbox::User=root".to_owned(),
            "APT::Update::Error-Mode=any".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }

    /// A package's record in the suite.
    pub(crate) fn record(&self, name: &str) -> Result<String> {
        output(self.command("apt-cache").args(["show", "--no-all-versions", name]))
    }

    fn download(&self, packages: &[Package]) -> Result<Vec<PathBuf>> {
        for package in packages {
            let what = format!("fetch: downloading {} {}", package.name, package.version);
            let child = self
                .command("apt-get")
                .arg("download")
                .arg(format!("{}={}", package.name, package.version))
                .stdout(Stdio::null())
                .spawn()?;
            watch_download(child, &self.dir.join("debs"), package.bytes, &what)?;
        }
        let debs = fs::read_dir(self.dir.join("debs"))?.map(|entry| Ok(entry?.path()));
        debs.collect()
    }
}

/// A package from its record.
pub(crate) fn package(name: &str, record: &str) -> Result<Package> {
    let field = |key| value(record, key).with_context(|| format!("{name} has no {key} in apt"));
    let bytes = field("Size")?.parse().with_context(|| format!("{name} has an odd size"))?;
    Ok(Package { name: name.to_owned(), version: field("Version")?.to_owned(), bytes })
}

/// A field of a record.
pub(crate) fn value<'a>(record: &'a str, key: &str) -> Option<&'a str> {
    record.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "))
}

/// Says how far a download is, every tenth of it or every second on a terminal.
fn watch_download(mut child: Child, dir: &Path, bytes: u64, what: &str) -> Result<()> {
    let total = bytes.div_ceil(1_000_000);
    eprintln!("{what}: {total} MB");
    let before = size_of(dir);
    let mut shown = 0;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        thread::sleep(Duration::from_millis(200));
        let tenths = (size_of(dir).saturating_sub(before) * 10).checked_div(bytes).unwrap_or(10);
        if tenths > shown {
            shown = tenths;
            eprintln!("{what}: {} of {total} MB", total * tenths / 10);
        }
    };
    ensure!(status.success(), "{what}: apt-get ended with {status}");
    Ok(())
}

/// Bytes in a folder's files, the half-downloaded one included.
fn size_of(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}

/// A folder that is gone, whatever happens in it. What an ended run left there goes first.
struct Scratch(PathBuf);

impl Scratch {
    fn new(dir: PathBuf) -> Result<Scratch> {
        if dir.exists() {
            fs::remove_dir_all(&dir)
                .with_context(|| format!("cannot clear {}: remove it", dir.display()))?;
        }
        fs::create_dir_all(&dir)?;
        Ok(Scratch(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("fetch: {} could not be removed: {error}", self.0.display());
        }
    }
}

pub(crate) fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("{program} did not start"))?;
    ensure!(status.success(), "{program} ended with {status}");
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("{program} did not start"))?;
    if !output.status.success() {
        bail!("{program} ended with {}", output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{program} printed no UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_gives_version_and_size() {
        let record = "Package: linux-image-7.2.1-amd64\nVersion: 7.2.1-1\nSize: 1900\n";
        let found = package("linux-image-7.2.1-amd64", record).unwrap();
        assert_eq!((found.version.as_str(), found.bytes), ("7.2.1-1", 1900));
        assert!(package("x", "Package: x\n").is_err());
    }
}
