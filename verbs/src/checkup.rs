//! What this host's RDMA devices can do, and why not: the part of `pinfoldd doctor` and
//! `pinfold doctor` that both sides need.
//!
//! Looking ([`examine`]) and judging ([`HostFacts::judge`], [`DeviceFacts::judge`]) are apart, so
//! that each judgement can be tried with facts that no machine at hand has.

use std::fmt;
use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::device::{Capabilities, Device, OdpCapabilities, PortState, devices};
use crate::region::RegistrationMode;
use crate::self_test::{Quirks, RegionCost, SelfTestError, flush_test, region_cost, self_test};

/// A network interface needs this for packets of 4096 bytes and their headers.
const INTERFACE_MTU: u32 = 4200;
const PATH_MTU: u32 = 4096;

/// How a check came out; the later, the worse.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// It works, and something is lost.
    Limited,
    /// It is not there.
    Missing,
}

impl Verdict {
    /// Its name, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }

    /// For a terminal: green, yellow, red.
    fn colour(self) -> &'static str {
        match self {
            Self::Ok => "\u{1b}[32m",
            Self::Limited => "\u{1b}[33m",
            Self::Missing => "\u{1b}[31m",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One check: what was found, and if it is not as it should be, why, and what to do.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Finding {
    /// What was looked at: `host`, `server`, a device's name, a directory.
    pub subject: String,
    /// Which check; stable, for scripts.
    pub check: &'static str,
    /// How it came out.
    pub result: Verdict,
    /// What is there.
    pub found: String,
    /// What is lost by it; absent if it is as it should be.
    pub why: Option<String>,
    /// What would help, if anything does.
    pub remedy: Option<String>,
}

impl Finding {
    /// As it should be.
    pub fn ok(check: &'static str, found: impl Into<String>) -> Self {
        let (subject, found) = ("host".to_owned(), found.into());
        Self { subject, check, result: Verdict::Ok, found, why: None, remedy: None }
    }

    /// It works, and something is lost.
    pub fn limited(check: &'static str, found: impl Into<String>, why: impl Into<String>) -> Self {
        Self { result: Verdict::Limited, why: Some(why.into()), ..Self::ok(check, found) }
    }

    /// It is not there.
    pub fn missing(check: &'static str, found: impl Into<String>, why: impl Into<String>) -> Self {
        Self { result: Verdict::Missing, why: Some(why.into()), ..Self::ok(check, found) }
    }

    /// The same with what to do about it.
    #[must_use]
    pub fn remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }

    /// The same about something else than the host.
    #[must_use]
    pub fn about(self, subject: impl Into<String>) -> Self {
        Self { subject: subject.into(), ..self }
    }
}

/// The worst of them.
pub fn worst<'a>(findings: impl IntoIterator<Item = &'a Finding>) -> Verdict {
    findings.into_iter().map(|finding| finding.result).max().unwrap_or(Verdict::Ok)
}

/// For people: a block of lines for each subject.
#[must_use]
pub fn draw(findings: &[Finding], colour: bool) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let mut drawn = String::new();
    let mut subject = None;
    for finding in findings {
        if subject != Some(&finding.subject) {
            let gap = if subject.is_some() { "\n" } else { "" };
            drawn += &format!("{gap}{}\n", printable(&finding.subject));
            subject = Some(&finding.subject);
        }
        drawn += &finding.lines(width, colour);
    }
    drawn
}

impl Finding {
    fn lines(&self, width: usize, colour: bool) -> String {
        let (on, off) = if colour { (self.result.colour(), "\u{1b}[0m") } else { ("", "") };
        let (result, check, found) = (self.result, self.check, printable(&self.found));
        let mut lines = format!("  {on}{result:<7}{off}  {check:<width$}  {found}\n");
        let indent = width + 13;
        for (word, text) in [("why", &self.why), ("do", &self.remedy)] {
            if let Some(text) = text {
                lines += &format!("{:indent$}{word}: {}\n", "", printable(text));
            }
        }
        lines
    }
}

/// Names of files and devices are chosen by others, and must not talk to the terminal.
fn printable(text: &str) -> String {
    let safe = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    text.chars().map(safe).collect()
}

/// What is known of RDMA on this host as a whole.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostFacts {
    /// The devices that libibverbs lists, or why it lists none.
    pub listed: Result<Vec<String>, String>,
    /// The devices that the kernel has (`/sys/class/infiniband`).
    pub in_kernel: Vec<String>,
    /// Those of `/dev/infiniband/uverbs*` that this process may not open for reading and writing.
    pub closed_nodes: Vec<String>,
}

impl HostFacts {
    fn gather() -> Self {
        let listed = devices().map_err(|error| with_new_causes(&error));
        let listed = listed.map(|names| names.iter().map(ToString::to_string).collect());
        let closed =
            |path: &String| fs::OpenOptions::new().read(true).write(true).open(path).is_err();
        let nodes = names_in(Path::new("/dev/infiniband"));
        let closed_nodes = nodes
            .into_iter()
            .filter(|name| name.starts_with("uverbs"))
            .map(|name| format!("/dev/infiniband/{name}"))
            .filter(closed)
            .collect();
        Self { listed, in_kernel: names_in(Path::new("/sys/class/infiniband")), closed_nodes }
    }

    /// Whether there are devices, and if not, what to do.
    #[must_use]
    pub fn judge(&self) -> Finding {
        const CHECK: &str = "rdma_devices";
        const STREAM: &str = "every byte goes by the stream path, through the server's processor";
        let listed = match &self.listed {
            Ok(listed) => listed,
            Err(error) => return Finding::missing(CHECK, "no list", error.clone()),
        };
        if !listed.is_empty() {
            return Finding::ok(CHECK, listed.join(", "));
        }
        if self.in_kernel.is_empty() {
            return Finding::missing(CHECK, "none", STREAM).remedy(
                "load the NIC's driver; or a soft device: `modprobe rdma_rxe && rdma link add rxe0 \
                 type rxe netdev INTERFACE`, with an MTU of 4200 or more on INTERFACE",
            );
        }
        let found = format!("the kernel has {}, libibverbs lists none", self.in_kernel.join(", "));
        if !self.closed_nodes.is_empty() {
            let nodes = self.closed_nodes.join(", ");
            return Finding::missing(CHECK, found, format!("{nodes} can't be opened; so {STREAM}"))
                .remedy("give this user read and write permission on /dev/infiniband/uverbs*");
        }
        Finding::missing(CHECK, found, STREAM)
            .remedy("install libibverbs1 and ibverbs-providers, and load ib_uverbs")
    }
}

/// What is known of a device.
#[derive(Clone, Debug)]
pub struct DeviceFacts {
    /// Its name.
    pub name: String,
    /// The state of its port.
    pub port: PortState,
    /// The path MTU in bytes.
    pub path_mtu: u32,
    /// The network interface under it, and its MTU.
    pub interface: Option<(String, u32)>,
    /// What it says of itself.
    pub capabilities: Capabilities,
    /// Its self-test with memory that is not pinned.
    pub on_demand: Result<Quirks, String>,
    /// Its self-test with pinned memory.
    pub pinned: Result<Quirks, String>,
    /// Its self-test with RDMA FLUSH.
    pub flush: Result<(), String>,
    /// What its regions cost: on demand where it can, else pinned.
    pub cost: Result<RegionCost, String>,
}

impl DeviceFacts {
    fn gather(device: &Device) -> Self {
        let port = device.port();
        let (on_demand, pinned) =
            (tested(device, RegistrationMode::OnDemand), tested(device, RegistrationMode::Pinned));
        let cost = match (&on_demand, &pinned) {
            (Ok(quirks), _) => measured(device, RegistrationMode::OnDemand, quirks),
            (Err(_), Ok(quirks)) => measured(device, RegistrationMode::Pinned, quirks),
            (Err(why), Err(_)) => Err(why.clone()),
        };
        Self {
            name: device.name().to_owned(),
            port: port.state,
            path_mtu: port.active_mtu_bytes,
            interface: interface_of(device.name()),
            capabilities: device.capabilities().clone(),
            on_demand,
            pinned,
            flush: when_active(device, flush_test),
            cost,
        }
    }

    /// What it is good for.
    #[must_use]
    pub fn judge(&self) -> Vec<Finding> {
        let findings = [
            self.judge_port(),
            self.judge_path_mtu(),
            self.judge_odp(),
            judge_test("self_test_on_demand", &self.on_demand),
            judge_test("self_test_pinned", &self.pinned),
            self.judge_flush(),
            self.judge_cost(),
        ];
        findings.into_iter().map(|finding| finding.about(&self.name)).collect()
    }

    fn judge_port(&self) -> Finding {
        if self.port == PortState::Active {
            return Finding::ok("port", "active");
        }
        let remedy = match &self.interface {
            Some((interface, _)) => format!("`ip link set {interface} up`, and check the cable"),
            None => "check the cable and, on InfiniBand, the subnet manager".to_owned(),
        };
        Finding::missing("port", self.port.to_string(), "no packet goes through").remedy(remedy)
    }

    fn judge_path_mtu(&self) -> Finding {
        let mut found = self.path_mtu.to_string();
        if let Some((interface, mtu)) = &self.interface {
            found += &format!(" ({interface} has {mtu})");
        }
        if self.path_mtu >= PATH_MTU {
            return Finding::ok("path_mtu", found);
        }
        let why = "rxe places on-demand data rightly only with a path MTU of 4096, and other \
                   devices are slower with less";
        let interface = self.interface.as_ref().map_or("INTERFACE", |(name, _)| name);
        Finding::limited("path_mtu", found, why).remedy(format!(
            "`ip link set {interface} mtu {INTERFACE_MTU}` or more, on both hosts and what is between"
        ))
    }

    fn judge_odp(&self) -> Finding {
        let odp = &self.capabilities.odp;
        if odp.is_usable() {
            return Finding::ok("odp", transports(odp));
        }
        Finding::limited("odp", "none", "files on fs-DAX and in the page cache can't be registered")
            .remedy(
                "rxe has on-demand paging from Linux 6.15 on, mlx5 from ConnectX-4 on; without it \
                 export tmpfs, or go by the stream path",
            )
    }

    fn judge_cost(&self) -> Finding {
        match &self.cost {
            Ok(cost) => Finding::ok("region_cost", cost.to_string()),
            Err(why) => {
                let lost = "a conservative figure limits how much of a file can be pinned";
                Finding::limited("region_cost", "not measured", format!("{why}; {lost}"))
            }
        }
    }

    fn judge_flush(&self) -> Finding {
        match &self.flush {
            Ok(()) => Finding::ok("flush", "to persistent memory, tested"),
            Err(why) => {
                let lost = "each commit is a call to the server, and as durable";
                Finding::limited("flush", "not usable", format!("{why}; {lost}"))
            }
        }
    }
}

fn measured(
    device: &Device,
    mode: RegistrationMode,
    quirks: &Quirks,
) -> Result<RegionCost, String> {
    region_cost(device, mode, quirks.max_region_bytes).map_err(|error| with_new_causes(&error))
}

fn transports(odp: &OdpCapabilities) -> String {
    let names = [
        (odp.rc_write, "write"),
        (odp.rc_read, "read"),
        (odp.rc_atomic, "atomic"),
        (odp.rc_flush, "flush"),
        (odp.rc_atomic_write, "atomic write"),
    ];
    let has: Vec<_> = names.into_iter().filter_map(|(has, name)| has.then_some(name)).collect();
    has.join(", ")
}

fn judge_test(check: &'static str, tested: &Result<Quirks, String>) -> Finding {
    match tested {
        Ok(quirks) if quirks.allow_any_message() => {
            Finding::ok(check, format!("passed; quirks: {quirks}"))
        }
        Ok(quirks) => {
            let why = "the device misplaces data that breaks these rules; the client library keeps \
                       them, and sends what does not fit by the stream path";
            Finding::limited(check, format!("passed; quirks: {quirks}"), why)
        }
        Err(why) => Finding::missing(check, "not usable", why.clone()),
    }
}

/// A device that was looked at and can be used further.
#[derive(Debug)]
pub struct Examined {
    /// The open device.
    pub device: Device,
    /// Its self-test with memory that is not pinned.
    pub on_demand: Result<Quirks, String>,
    /// Its self-test with pinned memory.
    pub pinned: Result<Quirks, String>,
    /// Its self-test with RDMA FLUSH.
    pub flush: Result<(), String>,
}

/// Looks at every RDMA device of this host, and tests each in a loop with itself, which takes a
/// second or two. Blocks.
#[must_use]
pub fn examine() -> (Vec<Finding>, Vec<Examined>) {
    let host = HostFacts::gather();
    let mut findings = vec![host.judge()];
    let mut examined = Vec::new();
    for name in host.listed.unwrap_or_default() {
        match Device::open(&name) {
            Ok(device) => {
                let facts = DeviceFacts::gather(&device);
                findings.extend(facts.judge());
                let DeviceFacts { on_demand, pinned, flush, .. } = facts;
                examined.push(Examined { device, on_demand, pinned, flush });
            }
            Err(error) => findings.push(
                Finding::missing("open", "can't be opened", with_new_causes(&error))
                    .remedy("give this user read and write permission on /dev/infiniband/uverbs*")
                    .about(name),
            ),
        }
    }
    (findings, examined)
}

fn tested(device: &Device, mode: RegistrationMode) -> Result<Quirks, String> {
    when_active(device, |device| self_test(device, mode).map(|report| report.quirks))
}

fn when_active<T>(
    device: &Device,
    test: impl FnOnce(&Device) -> Result<T, SelfTestError>,
) -> Result<T, String> {
    let state = device.port().state;
    if state != PortState::Active {
        // Each transfer would be waited for in vain.
        return Err(format!("not tested: the port is {state}"));
    }
    test(device).map_err(|error| with_new_causes(&error))
}

/// The network interface under a RoCE device, as far as /sys tells.
fn interface_of(device: &str) -> Option<(String, u32)> {
    let gids = Path::new("/sys/class/infiniband").join(device).join("ports/1/gid_attrs/ndevs");
    let name = names_in(&gids).into_iter().find_map(|index| {
        let name = fs::read_to_string(gids.join(index)).ok()?;
        Some(name.trim().to_owned()).filter(|name| !name.is_empty())
    })?;
    let mtu = fs::read_to_string(Path::new("/sys/class/net").join(&name).join("mtu")).ok()?;
    Some((name, mtu.trim().parse().ok()?))
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

/// As [`with_causes`](crate::with_causes), without what has been said already: for errors of
/// libraries, some of which repeat their cause's words.
pub fn with_new_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text += &format!(": {words}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::self_test::Price;

    fn host(listed: &[&str], in_kernel: &[&str], closed: &[&str]) -> Finding {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        HostFacts {
            listed: Ok(owned(listed)),
            in_kernel: owned(in_kernel),
            closed_nodes: owned(closed),
        }
        .judge()
    }

    fn remedy(finding: &Finding) -> &str {
        finding.remedy.as_deref().unwrap_or("")
    }

    #[test]
    fn each_way_to_have_no_device_has_its_own_remedy() {
        assert_eq!(host(&["rxe0"], &["rxe0"], &[]).result, Verdict::Ok);
        let none = host(&[], &[], &[]);
        assert_eq!(none.result, Verdict::Missing);
        assert!(remedy(&none).contains("rdma link add"), "{none:?}");
        let no_provider = host(&[], &["mlx5_0"], &[]);
        assert!(remedy(&no_provider).contains("ibverbs-providers"), "{no_provider:?}");
        let no_rights = host(&[], &["mlx5_0"], &["/dev/infiniband/uverbs0"]);
        assert!(remedy(&no_rights).contains("permission"), "{no_rights:?}");
        let unread = HostFacts {
            listed: Err("odd".to_owned()),
            in_kernel: Vec::new(),
            closed_nodes: Vec::new(),
        }
        .judge();
        assert_eq!((unread.result, unread.why.as_deref()), (Verdict::Missing, Some("odd")));
    }

    fn good() -> DeviceFacts {
        let odp = OdpCapabilities {
            supported: true,
            rc_write: true,
            rc_read: true,
            ..OdpCapabilities::default()
        };
        DeviceFacts {
            name: "mlx5_0".to_owned(),
            port: PortState::Active,
            path_mtu: 4096,
            interface: Some(("eth0".to_owned(), 9000)),
            capabilities: Capabilities { odp, ..Capabilities::default() },
            on_demand: Ok(Quirks::NONE),
            pinned: Ok(Quirks::NONE),
            flush: Ok(()),
            cost: Ok(RegionCost {
                register: Price::default(),
                fence: Price::default(),
                deregister: Price::default(),
                memory_bytes_per_gib: 6 << 20,
            }),
        }
    }

    /// What is not as it should be.
    fn wrong(facts: &DeviceFacts) -> Vec<(&'static str, Verdict)> {
        let findings = facts.judge();
        assert!(findings.iter().all(|finding| finding.subject == facts.name));
        let wrong = findings.iter().filter(|finding| finding.result != Verdict::Ok);
        wrong.map(|finding| (finding.check, finding.result)).collect()
    }

    #[test]
    fn a_good_device_has_nothing_to_say() {
        assert_eq!(wrong(&good()), []);
    }

    #[test]
    fn each_fault_of_a_device_is_found_alone() {
        let down = DeviceFacts { port: PortState::Down, ..good() };
        assert_eq!(wrong(&down), [("port", Verdict::Missing)]);
        let small = DeviceFacts { path_mtu: 1024, ..good() };
        assert_eq!(wrong(&small), [("path_mtu", Verdict::Limited)]);
        let remedy = small.judge()[1].remedy.clone().unwrap();
        assert!(remedy.contains("ip link set eth0 mtu 4200"), "{remedy}");
        let quirks = Quirks { start_alignment_bytes: 4096, ..Quirks::NONE };
        let quirky = DeviceFacts { on_demand: Ok(quirks), ..good() };
        assert_eq!(wrong(&quirky), [("self_test_on_demand", Verdict::Limited)]);
        let failed = DeviceFacts { pinned: Err("misplaces data".to_owned()), ..good() };
        assert_eq!(wrong(&failed), [("self_test_pinned", Verdict::Missing)]);
        let plain = DeviceFacts { flush: Err("its library is old".to_owned()), ..good() };
        assert!(plain.judge()[5].why.as_ref().unwrap().contains("old; each commit"));
        assert_eq!(wrong(&plain), [("flush", Verdict::Limited)]);
        let unmeasured = DeviceFacts { cost: Err("no memory".to_owned()), ..good() };
        assert_eq!(wrong(&unmeasured), [("region_cost", Verdict::Limited)]);
    }

    #[test]
    fn without_on_demand_paging_the_remedies_are_named() {
        let mut facts = good();
        facts.capabilities.odp.rc_write = false;
        assert_eq!(wrong(&facts), [("odp", Verdict::Limited)]);
        let remedy = facts.judge()[2].remedy.clone().unwrap();
        assert!(remedy.contains("6.15") && remedy.contains("mlx5"), "{remedy}");
    }

    #[test]
    fn findings_are_drawn_by_subject() {
        let findings = [
            Finding::ok("kernel", "7.2"),
            Finding::limited("a", "b", "c").remedy("d\u{1b}"),
            Finding::missing("port", "down", "x").about("rxe0"),
        ];
        assert_eq!(
            draw(&findings, false),
            "host\n  ok       kernel  7.2\n  limited  a       b\n                   why: c\n\
             \u{20}                  do: d\\u{1b}\n\nrxe0\n  missing  port    down\n                   \
             why: x\n"
        );
        assert!(draw(&findings, true).contains("\u{1b}[33mlimited\u{1b}[0m"));
        assert_eq!(worst(&findings), Verdict::Missing);
        assert_eq!(worst(&[]), Verdict::Ok);
    }
}
