//! Bandwidth and latency beside the programs of the package perftest: on a file on fs-DAX, with on-demand
//! paging. They start anew for each round.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::job::Job;
use crate::place::{Storage, text};

/// What they write to and read from, in the export's folder.
pub(crate) const FILE: &str = "perftest";

/// Where they listen by themselves.
const PORT: u16 = 18515;

/// A process that is not up by then will not be.
const PATIENCE: Duration = Duration::from_secs(60);

/// Messages of a round; they take no fewer than five.
const ITERATIONS: usize = 100;

/// Their unit, in bytes.
const MIB: f64 = 1_048_576.0;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Program {
    /// It polls: it takes no events with WRITE.
    WriteBandwidth,
    ReadBandwidth,
    ReadLatency,
}

/// One end of a program, which waits for the other; killed when it is dropped.
struct Server(Child);

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::WriteBandwidth => "ib_write_bw",
            Self::ReadBandwidth => "ib_read_bw",
            Self::ReadLatency => "ib_read_lat",
        }
    }

    /// What stands in the row.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::WriteBandwidth => "ib_write_bw --odp --mmap, polls without end",
            Self::ReadBandwidth => "ib_read_bw --odp --mmap --events, asleep as we are",
            Self::ReadLatency => "ib_read_lat --odp --mmap --events, asleep as we are",
        }
    }

    /// The job's figure.
    pub(crate) fn measure(self, storage: &Storage, job: Job) -> Result<f64> {
        let (name, mmap) = (self.name(), format!("--mmap={}", text(&storage.path(FILE))?));
        let mut server = self.command(storage, job);
        server.args(["--odp", &mmap]).stdout(Stdio::null());
        let server = server.spawn().with_context(|| format!("{name} does not start"))?;
        let mut server = Server(server);
        server.await_listening(name)?;
        let client = self.command(storage, job).arg("127.0.0.1").output()?;
        let printed = String::from_utf8_lossy(&client.stdout);
        ensure!(client.status.success(), "{name} ended with {}: {printed}", client.status);
        let ended = server.0.wait()?;
        ensure!(ended.success(), "the server's {name} ended with {ended}");
        self.parse(&printed).with_context(|| format!("no average in what {name} said: {printed}"))
    }

    /// One end of it, with what both ends must be told.
    fn command(self, storage: &Storage, job: Job) -> Command {
        let mut command = Command::new(self.name());
        command.args(["-d", &storage.places.device, "-x", &storage.places.gid_index.to_string()]);
        command.args(["-m", "4096", "-F", "-s", &job.bytes.to_string()]);
        command.args(["-n", &ITERATIONS.to_string()]);
        let depth = job.depth.to_string();
        match self {
            Self::WriteBandwidth => command.args(["-t", &depth, "-Q", "1"]),
            Self::ReadBandwidth => {
                command.args(["-t", &depth, "-o", &depth, "-Q", "1", "--events"])
            }
            Self::ReadLatency => command.args(["-o", &depth, "--events"]),
        };
        command
    }

    fn parse(self, printed: &str) -> Option<f64> {
        match self {
            // Size, iterations, peak, average, messages. Peak and average are in MiB/s.
            Self::WriteBandwidth | Self::ReadBandwidth => Some(number(printed, 5, 3)? * MIB / 1e6),
            // Size, iterations; least, most, typical, average, deviation, two percentiles, in µs.
            Self::ReadLatency => number(printed, 9, 5),
        }
    }
}

impl Server {
    /// It says that it waits before it listens, so the kernel is asked.
    fn await_listening(&mut self, name: &str) -> Result<()> {
        let started = Instant::now();
        while !is_listening(&sockets()?, PORT) {
            if let Some(ended) = self.0.try_wait()? {
                bail!("{name} ended with {ended}");
            }
            ensure!(started.elapsed() < PATIENCE, "{name} does not listen on port {PORT}");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails if it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn sockets() -> Result<String> {
    let mut text = String::new();
    for path in ["/proc/net/tcp", "/proc/net/tcp6"] {
        // A kernel without IPv6 has no second one.
        let Ok(mut file) = std::fs::File::open(path) else { continue };
        file.read_to_string(&mut text)?;
    }
    Ok(text)
}

/// proc_net_tcp(5): a local address ends with its port in hexadecimal, and state 0A is LISTEN.
fn is_listening(sockets: &str, port: u16) -> bool {
    let port = format!(":{port:04X}");
    sockets.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (local, state) = (words.next(), words.nth(1));
        local.is_some_and(|local| local.ends_with(&port)) && state == Some("0A")
    })
}

/// One of the row of so many numbers.
fn number(printed: &str, of: usize, index: usize) -> Option<f64> {
    let rows = printed.lines().map(|line| line.split_whitespace().map(str::parse::<f64>));
    let mut rows = rows.filter_map(|row| row.collect::<Result<Vec<_>, _>>().ok());
    rows.find(|row| row.len() == of)?.get(index).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_is_found_in_what_it_prints() {
        let printed = " local address: LID 0000 QPN 0x0011 PSN 0xef72de\n-----\n \
            #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n \
            65536      200              49.87              50.00  \t\t   0.000740\n-----\n";
        assert_eq!(Program::WriteBandwidth.parse(printed), Some(52.4288));
        assert_eq!(Program::ReadBandwidth.parse(" local address: LID 0000 QPN 1\n"), None);
        let printed = " #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    \
            t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec] \n \
            8       100          125.20         4848.52      560.05   \t       783.62      \t810.68 \t\t4848.52 \
            \t\t4848.52\n-----\n";
        assert_eq!(Program::ReadLatency.parse(printed), Some(783.62));
        assert_eq!(Program::ReadBandwidth.parse(printed), None);
    }

    #[test]
    fn a_listening_socket_is_told_from_others() {
        let socket = |local: &str, remote: &str, state: &str| {
            format!("   0: {local} {remote} {state} 00000000:00000000 00:00000000 0\n")
        };
        let head = "  sl  local_address rem_address   st tx_queue\n".to_owned();
        let listening = head.clone() + &socket("00000000:4853", "00000000:0000", "0A");
        assert!(is_listening(&listening, PORT));
        assert!(!is_listening(&listening, PORT + 1));
        let connected = head.clone() + &socket("0100007F:4853", "0100007F:9C40", "01");
        assert!(!is_listening(&connected, PORT));
        let elsewhere = head + &socket("0100007F:9C40", "0100007F:4853", "0A");
        assert!(!is_listening(&elsewhere, PORT));
    }
}
