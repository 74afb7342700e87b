//! Debian's generic kernels: fetched through the suite's meta package, unpacked once, cached.
//!
//! The version is resolved at run time because mirrors drop old ones. What is in the cache is
//! used without the network until `vm fetch --update` asks for a newer one.

use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use nix::fcntl::{Flock, FlockArg};

use crate::{mirror, paths};

/// Debian signs its archive with these keys; the package debian-archive-keyring brings them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const META_PACKAGE: &str = "linux-image-amd64";

/// A kernel that the lab can boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// trixie-backports: ODP on fs-DAX and delegations
    Newest,
    /// Debian 13's kernel, 6.12
    Trixie,
    /// Debian 12's kernel, 6.1
    Bookworm,
}

impl Suite {
    fn in_archive(self) -> &'static str {
        match self {
            Suite::Newest => "trixie-backports",
            Suite::Trixie => "trixie",
            Suite::Bookworm => "bookworm",
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Suite::Newest => "newest",
            Suite::Trixie => "trixie",
            Suite::Bookworm => "bookworm",
        })
    }
}

/// An unpacked kernel: `vmlinuz` and a tree for `modprobe -d`.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// What `uname -r` says in the guest.
    pub(crate) release: String,
    /// The root of the module tree.
    pub(crate) tree: PathBuf,
}

impl Kernel {
    /// The cached kernel of `suite`, fetched if there is none.
    pub(crate) fn get(suite: Suite) -> Result<Kernel> {
        let store = Store::open()?;
        if let Some(kernel) = store.kernel(suite) {
            return Ok(kernel);
        }
        let _lock = store.lock()?;
        // Another run may have brought it while this one waited for the lock.
        match store.kernel(suite) {
            Some(kernel) => Ok(kernel),
            None => store.fetch(suite),
        }
    }

    /// The kernel that the suite has now, fetched if it is not the cached one.
    pub(crate) fn update(suite: Suite) -> Result<Kernel> {
        let store = Store::open()?;
        let _lock = store.lock()?;
        store.fetch(suite)
    }

    /// The kernel image.
    pub(crate) fn image(&self) -> PathBuf {
        self.tree.join("vmlinuz")
    }

    /// The folder of `modules.dep`.
    pub(crate) fn modules(&self) -> PathBuf {
        self.tree.join("usr/lib/modules").join(&self.release)
    }

    fn at(tree: PathBuf) -> Option<Kernel> {
        let release = only_entry(&tree.join("usr/lib/modules"))?;
        Some(Kernel { release, tree })
    }
}

/// The cache's folder of kernels.
struct Store {
    dir: PathBuf,
}

impl Store {
    fn open() -> Result<Store> {
        let dir = paths::cache_dir()?.join("kernels");
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Store { dir })
    }

    /// A file named after the suite holds the name of its tree.
    fn kernel(&self, suite: Suite) -> Option<Kernel> {
        let tree = fs::read_to_string(self.dir.join(suite.to_string())).ok()?;
        Kernel::at(self.dir.join(tree.trim()))
    }

    fn lock(&self) -> Result<Flock<fs::File>> {
        let path = self.dir.join("lock");
        let file = fs::File::create(&path)
            .with_context(|| format!("cannot write in the cache: {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(lock),
            Err((file, _)) => {
                eprintln!("kernel: waiting for another run that fills {}", self.dir.display());
                Flock::lock(file, FlockArg::LockExclusive)
                    .map_err(|(_, error)| error)
                    .with_context(|| format!("cannot lock {}", path.display()))
            }
        }
    }

    /// Brings the suite's kernel into the cache; the lock is held.
    fn fetch(&self, suite: Suite) -> Result<Kernel> {
        let work = Scratch::new(self.dir.join("incomplete"))?;
        let apt = Apt::new(&work.0.join("apt"), suite)?;
        let packages = apt.kernel_packages()?;
        let name = format!("{}_{}", packages[0].name, packages[0].version);
        let tree = self.dir.join(&name);
        if Kernel::at(tree.clone()).is_none() {
            let unpacked = work.0.join("tree");
            for deb in apt.download(&packages)? {
                run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(work.0.join("debs")))?;
            }
            arrange(&work.0.join("debs"), &unpacked)?;
            fs::rename(&unpacked, &tree)
                .with_context(|| format!("cannot put the kernel at {}", tree.display()))?;
        }
        let pointer = work.0.join("pointer");
        fs::write(&pointer, &name)?;
        fs::rename(&pointer, self.dir.join(suite.to_string()))?;
        let kernel = Kernel::at(tree).context("the unpacked kernel has no modules")?;
        eprintln!("kernel: {suite} is {} in {}", kernel.release, kernel.tree.display());
        Ok(kernel)
    }
}

/// Puts image and modules where they are looked for, whatever the suite's own layout is.
fn arrange(debs: &Path, tree: &Path) -> Result<()> {
    let usr_merged = debs.join("usr/lib/modules");
    let modules = if usr_merged.is_dir() { usr_merged } else { debs.join("lib/modules") };
    let release = only_entry(&modules)
        .with_context(|| format!("no single kernel release in {}", modules.display()))?;
    fs::create_dir_all(tree.join("usr/lib"))?;
    fs::rename(&modules, tree.join("usr/lib/modules")).context("cannot move the modules")?;
    // kmod looks below lib or usr/lib, as its distribution is merged or not.
    symlink("usr/lib", tree.join("lib"))?;
    // Split kernels keep the image beside their modules.
    let split = tree.join("usr/lib/modules").join(&release).join("vmlinuz");
    let whole = debs.join(format!("boot/vmlinuz-{release}"));
    let image = if split.is_file() { split } else { whole };
    fs::rename(image, tree.join("vmlinuz")).context("the kernel's packages hold no image")?;
    run(Command::new(paths::program("depmod").context("depmod is missing")?)
        .args(["-C", "/dev/null", "-b"])
        .arg(tree)
        .arg(&release))
}

/// A package as its suite has it.
#[derive(Debug, PartialEq, Eq)]
struct Package {
    name: String,
    version: String,
    bytes: u64,
}

/// apt with state folders of its own: other suites, and the machine's packages untouched. The
/// machine's apt configuration (a proxy, say) applies.
struct Apt {
    dir: PathBuf,
}

impl Apt {
    fn new(dir: &Path, suite: Suite) -> Result<Apt> {
        ensure!(
            Path::new(KEYRING).is_file(),
            "{KEYRING} is missing: `apt-get install debian-archive-keyring` brings it"
        );
        let mirror = mirror::find()?;
        for part in ["lists/partial", "cache/archives/partial", "debs"] {
            fs::create_dir_all(dir.join(part))?;
        }
        let suite = suite.in_archive();
        let options = format!("arch=amd64 target=Packages signed-by={KEYRING}");
        let source = format!("deb [{options}] {mirror} {suite} main\n");
        fs::write(dir.join("sources.list"), source)?;
        fs::write(dir.join("status"), "")?;
        eprintln!("kernel: reading the package list of {suite} from {mirror}");
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

    /// The packages that hold image and modules: one in older suites, split in newer ones.
    fn kernel_packages(&self) -> Result<Vec<Package>> {
        let mut found: Vec<Package> = Vec::new();
        let mut wanted = vec![META_PACKAGE.to_owned()];
        while let Some(name) = wanted.pop() {
            if found.iter().any(|package| package.name == name) {
                continue;
            }
            let mut show = self.command("apt-cache");
            let record = output(show.args(["show", "--no-all-versions", &name]))?;
            wanted.extend(kernel_dependencies(&record));
            if name != META_PACKAGE {
                found.push(package(&name, &record)?);
            }
        }
        ensure!(!found.is_empty(), "{META_PACKAGE} depends on no kernel");
        Ok(found)
    }

    fn download(&self, packages: &[Package]) -> Result<Vec<PathBuf>> {
        for package in packages {
            let what = format!("kernel: downloading {} {}", package.name, package.version);
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

/// Names of packages in `Depends` that are parts of a kernel.
fn kernel_dependencies(record: &str) -> Vec<String> {
    let names = value(record, "Depends").unwrap_or_default().split(',');
    names
        .filter_map(|dependency| dependency.split_whitespace().next())
        .filter(|name| {
            ["linux-image-", "linux-base-", "linux-binary-", "linux-modules-"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        })
        .map(str::to_owned)
        .collect()
}

fn package(name: &str, record: &str) -> Result<Package> {
    let field = |key| value(record, key).with_context(|| format!("{name} has no {key} in apt"));
    let bytes = field("Size")?.parse().with_context(|| format!("{name} has an odd size"))?;
    Ok(Package { name: name.to_owned(), version: field("Version")?.to_owned(), bytes })
}

fn value<'a>(record: &'a str, key: &str) -> Option<&'a str> {
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
            eprintln!("kernel: {} could not be removed: {error}", self.0.display());
        }
    }
}

fn only_entry(dir: &Path) -> Option<String> {
    let mut entries = fs::read_dir(dir).ok()?.flatten();
    let entry = entries.next()?;
    let alone = entries.next().is_none();
    alone.then(|| entry.file_name().into_string().ok())?
}

fn run(command: &mut Command) -> Result<()> {
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

    const SPLIT: &str = "Package: linux-image-7.2.1-amd64\nVersion: 7.2.1-1\nSize: 1900\n\
        Depends: dracut | initramfs-tools (>= 0.1), linux-base-7.2.1-amd64 (= 7.2.1-1), \
        linux-binary-7.2.1-amd64 (= 7.2.1-1), linux-modules-7.2.1-amd64 (= 7.2.1-1)\n";

    #[test]
    fn a_split_kernel_is_followed_to_its_parts() {
        assert_eq!(
            kernel_dependencies(SPLIT),
            ["linux-base-7.2.1-amd64", "linux-binary-7.2.1-amd64", "linux-modules-7.2.1-amd64"]
        );
    }

    #[test]
    fn a_whole_kernel_has_no_parts() {
        let record =
            "Depends: kmod, linux-base (>= 4.3~), initramfs-tools | linux-initramfs-tool\n";
        assert!(kernel_dependencies(record).is_empty());
    }

    #[test]
    fn a_record_gives_version_and_size() {
        let found = package("linux-image-7.2.1-amd64", SPLIT).unwrap();
        assert_eq!((found.version.as_str(), found.bytes), ("7.2.1-1", 1900));
        assert!(package("x", "Package: x\n").is_err());
    }
}
