//! Bandwidth beside `ib_write_bw` of the package perftest: on a file on fs-DAX, with on-demand paging.
//! It polls, as it takes no events with WRITE, and starts anew for each round.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::place::{Storage, text};

/// Where it listens by itself.
const PORT: u16 = 18515;

/// A process that is not up by then will not be.
const PATIENCE: Duration = Duration::from_secs(60);

/// Messages of a round; it takes no fewer than five.
const ITERATIONS: usize = 100;

/// Its unit, in bytes.
const MIB: f64 = 1_048_576.0;

/// A server of its own; killed when it is dropped.
struct Server(Child);

/// MB/s of messages that long, with so many in flight.
pub(crate) fn write_bandwidth(storage: &Storage, bytes: usize, depth: usize) -> Result<f64> {
    let file = storage.path("perftest");
    let mmap = format!("--mmap={}", text(&file)?);
    let mut server = command(storage, bytes, depth);
    server.args(["--odp", &mmap]).stdout(Stdio::null());
    let mut server = Server(server.spawn().context("ib_write_bw does not start")?);
    server.await_listening()?;
    let client = command(storage, bytes, depth).arg("127.0.0.1").output()?;
    let printed = String::from_utf8_lossy(&client.stdout);
    ensure!(client.status.success(), "ib_write_bw ended with {}: {printed}", client.status);
    let ended = server.0.wait()?;
    ensure!(ended.success(), "the server's ib_write_bw ended with {ended}");
    parse_average(&printed).with_context(|| format!("no bandwidth in {printed}"))
}

/// One end of it, with what both ends must be told.
fn command(storage: &Storage, bytes: usize, depth: usize) -> Command {
    let mut command = Command::new("ib_write_bw");
    command.args(["-d", &storage.places.device, "-x", &storage.places.gid_index.to_string()]);
    command.args(["-m", "4096", "-Q", "1", "-F", "-t", &depth.to_string()]);
    command.args(["-s", &bytes.to_string(), "-n", &ITERATIONS.to_string()]);
    command
}

impl Server {
    /// It says that it waits before it listens, so the kernel is asked.
    fn await_listening(&mut self) -> Result<()> {
        let started = Instant::now();
        while !is_listening(&sockets()?, PORT) {
            if let Some(ended) = self.0.try_wait()? {
                bail!("ib_write_bw ended with {ended}");
            }
            ensure!(started.elapsed() < PATIENCE, "ib_write_bw does not listen on port {PORT}");
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

/// The row of numbers: size, iterations, peak, average, messages. Peak and average are in MiB/s.
fn parse_average(printed: &str) -> Option<f64> {
    let rows = printed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut numbers =
        rows.filter(|row| row.len() == 5 && row.iter().all(|word| word.parse::<f64>().is_ok()));
    Some(numbers.next()?[3].parse::<f64>().ok()? * MIB / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_is_found_in_what_it_prints() {
        let printed = " local address: LID 0000 QPN 0x0011 PSN 0xef72de\n-----\n \
            #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n \
            65536      200              49.87              50.00  \t\t   0.000740\n-----\n";
        assert_eq!(parse_average(printed), Some(52.4288));
        assert_eq!(parse_average(" local address: LID 0000 QPN 1\n"), None);
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
