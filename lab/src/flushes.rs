//! Which bytes the soft NIC flushes to the medium for its peers.

use std::ops::Range;

use crate::trace::{self, Trace};

/// Who answers RDMA FLUSH on memory that is registered on demand (drivers/infiniband/sw/rxe/rxe_odp.c),
/// with address and length; and who writes lines of the processor's caches back
/// (arch/x86/lib/usercopy_64.c), with a length.
const PROBES: &str = "p:pinfold_flush rxe_odp_flush_pmem_iova at=%si:u64 len=%dx:u32\n\
    p:pinfold_written_back arch_wb_cache_pmem len=%si:u64\n";

/// Notes what is flushed, by probes in the kernel, until it is dropped.
#[derive(Debug)]
pub struct Flushes(Trace);

/// What was flushed since the last look.
#[derive(Debug, Default)]
pub struct Flushed {
    /// Ranges of addresses, in order.
    pub ranges: Vec<Range<u64>>,
    /// Bytes of the processor's caches that were written back, by whomever.
    pub written_back: u64,
}

impl Flushes {
    /// From now on.
    pub fn start() -> Self {
        let tracing = trace::tracing();
        // Once for all tests of a guest (Documentation/trace/kprobetrace.rst).
        if !tracing.join("events/kprobes/pinfold_flush").exists() {
            std::fs::write(tracing.join("kprobe_events"), PROBES).unwrap();
        }
        Self(Trace::start("flushes", &["kprobes/pinfold_flush", "kprobes/pinfold_written_back"]))
    }

    /// What has been flushed since the last time.
    pub fn take(&self) -> Flushed {
        let trace = self.0.take();
        let mut flushed = Flushed::default();
        for line in trace.lines() {
            let number = |key| {
                let word = line.split_whitespace().find_map(|word| word.strip_prefix(key));
                word.unwrap_or_else(|| panic!("{line}")).parse::<u64>().unwrap()
            };
            if line.contains(" pinfold_flush: ") {
                flushed.ranges.push(number("at=")..number("at=") + number("len="));
            } else if line.contains(" pinfold_written_back: ") {
                flushed.written_back += number("len=");
            }
        }
        flushed
    }
}

/// Of the rdma-core on which this runs: 44 on Debian 12.
pub fn rdma_core_version() -> u32 {
    let library = std::fs::canonicalize("/usr/lib/x86_64-linux-gnu/libibverbs.so.1").unwrap();
    let name = library.file_name().unwrap().to_string_lossy().into_owned();
    let version = name.strip_prefix("libibverbs.so.1.14.").and_then(|rest| rest.split('.').next());
    version.unwrap_or_else(|| panic!("{name}")).parse().unwrap()
}
