//! `pinfold doctor`: this host's devices, the server, and whether RDMA between the two works.

use std::io;

use pinfold_client::checkup::{self, Finding, Verdict, draw, with_new_causes};
use pinfold_client::{ConnectOptions, Error, RdmaDevice, Session};
use serde::Serialize;

use crate::args::{Connection, Doctor, TransportArg};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::{terminal, work};

#[derive(Serialize)]
struct Report {
    /// The worst finding.
    result: Verdict,
    server: String,
    findings: Vec<Finding>,
}

/// What is known of the server.
#[derive(Debug)]
struct Facts {
    url: String,
    version: String,
    exports: Vec<String>,
    sessions: usize,
    files: usize,
    /// Whether a queue pair is connected; else why not.
    rdma: Result<(), String>,
    /// RDMA or nothing was asked for.
    rdma_or_nothing: bool,
}

/// Looks, reports, and fails if the server, or RDMA that was asked for, is not there.
pub(crate) async fn run(connection: Connection, args: Doctor) -> Result<(), Failure> {
    let (mut findings, devices) = tokio::task::spawn_blocking(checkup::examine)
        .await
        .map_err(|error| Failure::local("cannot look at the devices", io::Error::other(error)))?;
    // The session opens the one that it uses itself.
    drop(devices);
    let url = connection.server.clone();
    let (of_server, outcome) = match look(connection).await {
        Ok(facts) => (facts.judge(), facts.demand()),
        Err(failure) => (vec![unreachable(&url, &failure)], Err(failure)),
    };
    findings.extend(of_server);
    let report = Report { result: checkup::worst(&findings), server: url, findings };
    match args.json {
        true => terminal::print_json(&report)?,
        false => terminal::print(&draw(&report.findings, terminal::look().colour))?,
    }
    outcome
}

async fn look(connection: Connection) -> Result<Facts, Failure> {
    let url = connection.server.clone();
    let rdma_or_nothing = connection.transport == TransportArg::Rdma
        || matches!(connection.rdma_device, RdmaDevice::Named(_));
    let (session, rdma) = connect(work::options(connection), &url).await?;
    let exports = session.list("", "").await?;
    let seen = session.inspect().await?;
    let facts = Facts {
        version: session.server_version().to_owned(),
        exports: exports.into_iter().map(|export| export.name).collect(),
        // Ours goes at once.
        sessions: seen.sessions.iter().filter(|session| !session.yours).count(),
        files: seen.files.len(),
        url,
        rdma,
        rdma_or_nothing,
    };
    session.close().await;
    Ok(facts)
}

/// A server without RDMA, or a device that is not there, is a finding, and the session goes without.
async fn connect(
    options: ConnectOptions,
    url: &str,
) -> Result<(Session, Result<(), String>), Error> {
    let failed = match Session::connect(options).await {
        Ok(session) => {
            let rdma = match session.no_rdma_because() {
                Some(why) => Err(why.to_owned()),
                None => Ok(()),
            };
            return Ok((session, rdma));
        }
        Err(error) if Exit::of_error(&error) == Exit::Device => with_new_causes(&error),
        Err(error) => return Err(error),
    };
    let without = ConnectOptions::new(url).rdma_device(RdmaDevice::None);
    Ok((Session::connect(without).await?, Err(failed)))
}

fn unreachable(url: &str, failure: &Failure) -> Finding {
    Finding::missing("reachable", url, with_new_causes(failure))
        .remedy("start `pinfoldd` there, or name it with --server http://HOST:PORT")
        .about("server")
}

impl Facts {
    fn judge(&self) -> Vec<Finding> {
        let holds = format!("{} other sessions, {} guarded files", self.sessions, self.files);
        let findings = [
            Finding::ok("reachable", format!("{}, version {}", self.url, self.version)),
            Finding::ok("exports", self.exports.join(", ")),
            Finding::ok("holds", holds),
            self.judge_rdma(),
        ];
        findings.into_iter().map(|finding| finding.about("server")).collect()
    }

    fn judge_rdma(&self) -> Finding {
        let why = match &self.rdma {
            Ok(()) => return Finding::ok("rdma", "connected"),
            Err(why) => why,
        };
        let finding = match self.rdma_or_nothing {
            true => Finding::missing("rdma", "none", why),
            false => Finding::limited("rdma", "none: the stream path", why),
        };
        finding.remedy("`pinfoldd doctor` on the server tells of its devices")
    }

    fn demand(&self) -> Result<(), Failure> {
        match &self.rdma {
            Err(why) if self.rdma_or_nothing => {
                Err(Failure::new(Exit::Device, format!("there is no RDMA to {}: {why}", self.url)))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(rdma: Result<(), String>, rdma_or_nothing: bool) -> Facts {
        Facts {
            url: "http://storage:7350".to_owned(),
            version: "0.1.0".to_owned(),
            exports: vec!["data".to_owned(), "logs".to_owned()],
            sessions: 1,
            files: 2,
            rdma,
            rdma_or_nothing,
        }
    }

    #[test]
    fn what_was_asked_for_decides_between_limited_and_missing() {
        let judged = |facts: &Facts| (facts.judge()[3].result, facts.demand().map_err(|f| f.exit));
        let off = || Err("the server has no RDMA device".to_owned());
        assert_eq!(judged(&facts(Ok(()), true)), (Verdict::Ok, Ok(())));
        assert_eq!(judged(&facts(off(), false)), (Verdict::Limited, Ok(())));
        assert_eq!(judged(&facts(off(), true)), (Verdict::Missing, Err(Exit::Device)));
    }

    #[test]
    fn the_server_is_told_of_in_one_block() {
        let drawn = draw(&facts(Ok(()), false).judge(), false);
        assert_eq!(
            drawn,
            "server\n  ok       reachable  http://storage:7350, version 0.1.0\n  \
             ok       exports    data, logs\n  \
             ok       holds      1 other sessions, 2 guarded files\n  \
             ok       rdma       connected\n"
        );
    }
}
