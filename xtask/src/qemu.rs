//! QEMU: its command line from small pure builders, and the child that never outlives us.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Memory of the guest beside the pmem, in MiB: what a PC has below the hole at 4 GiB.
const MEMORY_MIB: u32 = 3072;
/// Where the memory above the hole begins, in MiB: all of it is pmem.
const PMEM_START_MIB: u32 = 4096;
/// Between two devices, so that one section of memory never holds parts of both.
const PMEM_GAP_MIB: u32 = 128;
/// The third device, without a file system (devdax).
const DEVDAX_MIB: u32 = 64;

/// How the guest's instructions are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accel {
    /// By the processor.
    Kvm,
    /// By QEMU's translation: everywhere, some ten times slower.
    Tcg,
}

impl Accel {
    /// For people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Accel::Kvm => "KVM",
            Accel::Tcg => "software emulation",
        }
    }

    fn args(self) -> [&'static str; 4] {
        match self {
            Accel::Kvm => ["-accel", "kvm", "-cpu", "host"],
            // Kernel 6.12 panics under TCG on the `max` model.
            Accel::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "EPYC"],
        }
    }
}

/// What the far end of a channel is in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    /// The kernel's console, ttyS0.
    Serial,
    /// A named virtio port.
    Named(&'static str),
    /// A terminal, hvc0.
    Terminal,
}

/// Storage of a guest in files of the host's: it outlives the guest, however that ends.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    /// Both pmem devices, and what lies between them.
    pub(crate) pmem: PathBuf,
    /// A disk; what the guest has not flushed is lost with the guest's memory.
    pub(crate) disk: PathBuf,
    /// Whether an earlier guest has made its file systems: they are mounted as they were left.
    pub(crate) used: bool,
}

impl Kept {
    /// For the guest's init.
    pub(crate) fn word(&self) -> &'static str {
        if self.used { "used" } else { "new" }
    }

    /// The guest's memory in two nodes, the first of which is anonymous, and the second, all of it
    /// above the hole, is the file; and the disk, whose cache is the host's.
    fn args(&self, pmem_mib: u32) -> Result<Vec<String>> {
        let pmem = argument(&self.pmem)?;
        let above = memory_mib(pmem_mib) - MEMORY_MIB;
        Ok([
            "-object".to_owned(),
            format!("memory-backend-ram,id=ram,size={MEMORY_MIB}M"),
            "-object".to_owned(),
            format!("memory-backend-file,id=pmem,size={above}M,share=on,mem-path={pmem}"),
            "-numa".to_owned(),
            "node,nodeid=0,cpus=0-1,memdev=ram".to_owned(),
            "-numa".to_owned(),
            "node,nodeid=1,memdev=pmem".to_owned(),
            "-drive".to_owned(),
            format!("if=none,id=disk,format=raw,cache=writeback,file={}", argument(&self.disk)?),
            "-device".to_owned(),
            "virtio-blk-pci,drive=disk".to_owned(),
        ]
        .to_vec())
    }
}

/// A path among QEMU's options, where a comma is doubled.
fn argument(path: &Path) -> Result<String> {
    let text = path.to_str().map(|text| text.replace(',', ",,"));
    text.with_context(|| format!("{} is not UTF-8", path.display()))
}

/// A machine to start.
pub(crate) struct Machine<'a> {
    /// How to run it.
    pub(crate) accel: Accel,
    /// The kernel image.
    pub(crate) kernel: &'a Path,
    /// The initramfs.
    pub(crate) initrd: &'a Path,
    /// MiB of each of the two pmem devices for file systems; 0 for no pmem at all.
    pub(crate) pmem_mib: u32,
    /// What of its storage outlives it; without, nothing does.
    pub(crate) kept: Option<&'a Kept>,
    /// Streams to the guest.
    pub(crate) channels: Vec<(Port, OwnedFd)>,
}

impl Machine<'_> {
    fn args(&self) -> Result<Vec<String>> {
        let path = |path: &Path| {
            let text = path.to_str().map(str::to_owned);
            text.with_context(|| format!("{} is not UTF-8", path.display()))
        };
        let memory = format!("{}M", memory_mib(self.pmem_mib));
        let mut args: Vec<String> = Vec::new();
        args.extend(self.accel.args().map(str::to_owned));
        args.extend(
            [
                "-machine",
                "pc",
                "-smp",
                "2",
                "-m",
                &memory,
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-device",
                "virtio-serial-pci",
            ]
            .map(str::to_owned),
        );
        args.extend(["-kernel".to_owned(), path(self.kernel)?]);
        args.extend(["-initrd".to_owned(), path(self.initrd)?]);
        args.extend(["-append".to_owned(), append(self.pmem_mib)]);
        args.extend(root_args());
        if let Some(kept) = self.kept {
            args.extend(kept.args(self.pmem_mib)?);
        }
        for (index, (port, fd)) in self.channels.iter().enumerate() {
            args.extend(channel_args(index, *port, fd.as_raw_fd()));
        }
        Ok(args)
    }

    /// Starts it. setpriv ends it with us, even if we are killed.
    pub(crate) fn start(self) -> Result<Running> {
        let args = self.args()?;
        for (_, fd) in &self.channels {
            fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).context("fcntl(F_SETFD)")?;
        }
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(args)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            // A ctrl-C is for us: we end the machine in order.
            .process_group(0)
            .spawn()
            .context("qemu-system-x86_64 did not start")?;
        Ok(Running { child })
    }
}

/// A started machine; dropping it kills it.
pub(crate) struct Running {
    child: Child,
}

impl Running {
    /// What QEMU says, mostly about features that it can't emulate.
    pub(crate) fn take_stderr(&mut self) -> Result<ChildStderr> {
        self.child.stderr.take().context("QEMU's stderr is already taken")
    }

    /// Waits until it has powered off, or kills it at the deadline.
    pub(crate) fn ended_within(mut self, limit: Duration) -> Result<bool> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if self.child.try_wait()?.is_some() {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(false)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has already ended, which is what they are for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn memory_mib(pmem_mib: u32) -> u32 {
    if pmem_mib == 0 {
        return MEMORY_MIB;
    }
    MEMORY_MIB + 2 * (pmem_mib + PMEM_GAP_MIB) + DEVDAX_MIB
}

/// The kernel's command line. `memmap=size!start` makes pmem of plain memory.
///
/// Under TCG a second processor now and then meets a breakpoint that the kernel, patching its own
/// code, has already taken out, and dies of it. Most patching is over when the guest's init
/// brings that processor up, and with a clock declared reliable none is done for the clock later.
/// The limits of the watchdogs are wide: two busy host processors look like a lockup from inside.
fn append(pmem_mib: u32) -> String {
    let mut line =
        "console=ttyS0,115200 panic=-1 oops=panic maxcpus=1 tsc=reliable mitigations=off \
                    watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=120 \
                    workqueue.watchdog_thresh=120"
            .to_owned();
    if pmem_mib > 0 {
        let second = PMEM_START_MIB + pmem_mib + PMEM_GAP_MIB;
        let third = second + pmem_mib + PMEM_GAP_MIB;
        line += &format!(" memmap={pmem_mib}M!{PMEM_START_MIB}M memmap={pmem_mib}M!{second}M");
        line += &format!(" memmap={DEVDAX_MIB}M!{third}M");
    }
    line
}

/// The host's root, read-only: what the caller sees is in the guest, nothing is copied.
fn root_args() -> [String; 2] {
    let share = "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap";
    ["-virtfs".to_owned(), share.to_owned()]
}

fn channel_args(index: usize, port: Port, fd: i32) -> Vec<String> {
    let chardev = format!("socket,id=channel{index},fd={fd}");
    let device = match port {
        Port::Serial => ["-serial".to_owned(), format!("chardev:channel{index}")],
        Port::Named(name) => {
            ["-device".to_owned(), format!("virtserialport,chardev=channel{index},name={name}")]
        }
        Port::Terminal => ["-device".to_owned(), format!("virtconsole,chardev=channel{index}")],
    };
    ["-chardev".to_owned(), chardev].into_iter().chain(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pmem_lies_above_the_hole_and_apart() {
        let line = append(384);
        assert!(line.ends_with(" memmap=384M!4096M memmap=384M!4608M memmap=64M!5120M"), "{line}");
        assert!(!append(0).contains("memmap"));
    }

    #[test]
    fn memory_covers_the_devices_and_the_gaps() {
        assert_eq!(memory_mib(384), 3072 + 384 + 128 + 384 + 128 + 64);
        assert_eq!(memory_mib(0), 3072);
    }

    #[test]
    fn each_channel_has_its_own_chardev() {
        let args = channel_args(2, Port::Named("pinfold.control"), 9);
        assert_eq!(args[1], "socket,id=channel2,fd=9");
        assert_eq!(args[3], "virtserialport,chardev=channel2,name=pinfold.control");
        assert_eq!(channel_args(0, Port::Serial, 7)[2..], ["-serial", "chardev:channel0"]);
    }

    #[test]
    fn the_root_is_shared_read_only() {
        assert!(root_args()[1].contains("readonly=on"));
    }
}
