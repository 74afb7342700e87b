//! Reads what the guest says: the kernel's console for signs of death, the output for its end.

use std::collections::VecDeque;

/// Lines that are shown when a VM died.
const TAIL_LINES: usize = 40;

/// What a console line says about the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The guest's init could not set up what was asked for.
    InitFailed(String),
    /// The kernel is broken or stuck.
    KernelDied(String),
}

/// Signs of a kernel that can't be trusted any more, and what to call them.
const SIGNS: [(&str, &str); 8] = [
    ("Kernel panic - not syncing", "kernel panic"),
    ("BUG: soft lockup", "soft lockup"),
    ("BUG: workqueue lockup", "workqueue lockup"),
    ("detected stalls on CPU", "RCU stall"),
    ("self-detected stall on CPU", "RCU stall"),
    ("Oops:", "kernel oops"),
    ("general protection fault", "kernel oops"),
    ("BUG: ", "kernel bug"),
];

/// Judges one line.
pub(crate) fn verdict(line: &str) -> Option<Verdict> {
    if let Some((_, why)) = line.split_once("init: failure: ") {
        return Some(Verdict::InitFailed(why.to_owned()));
    }
    let (_, name) = SIGNS.iter().find(|(sign, _)| line.contains(sign))?;
    let text = line.trim_start_matches(|c: char| {
        c == '[' || c == ' ' || c == '.' || c == ']' || c.is_ascii_digit()
    });
    Some(Verdict::KernelDied(format!("{name} ({text})")))
}

/// The last lines of a console.
#[derive(Default)]
pub(crate) struct Tail(VecDeque<String>);

impl Tail {
    /// Takes the next line.
    pub(crate) fn push(&mut self, line: String) {
        if self.0.len() == TAIL_LINES {
            self.0.pop_front();
        }
        self.0.push_back(line);
    }

    /// The lines that are left, oldest first.
    pub(crate) fn lines(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// Passes a stream on up to its end mark, which may be cut anywhere by reads.
pub(crate) struct UntilMark {
    mark: Vec<u8>,
    held: Vec<u8>,
}

impl UntilMark {
    /// A stream that ends with `mark`.
    pub(crate) fn new(mark: &str) -> UntilMark {
        UntilMark { mark: mark.as_bytes().to_vec(), held: Vec::new() }
    }

    /// Takes what was read; gives what can be passed on, and whether the mark was seen.
    pub(crate) fn take(&mut self, read: &[u8]) -> (Vec<u8>, bool) {
        self.held.extend_from_slice(read);
        let mark = &self.mark;
        if let Some(at) = self.held.windows(mark.len()).position(|window| window == mark) {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let longest = mark.len().min(self.held.len() + 1);
        let kept = (0..longest).rev().find(|&n| self.held.ends_with(&mark[..n])).unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn died(line: &str) -> String {
        match verdict(line) {
            Some(Verdict::KernelDied(why)) => why,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn a_dying_kernel_is_named() {
        let panic = "[   12.345678] Kernel panic - not syncing: sysrq triggered crash";
        assert_eq!(died(panic), "kernel panic (Kernel panic - not syncing: sysrq triggered crash)");
        assert!(died("[   1.0] watchdog: BUG: soft lockup - CPU#0").starts_with("soft lockup"));
        assert!(died("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:").starts_with("RCU"));
        assert!(died("BUG: unable to handle page fault").starts_with("kernel bug"));
        assert!(died("Oops: 0000 [#1] PREEMPT SMP").starts_with("kernel oops"));
    }

    #[test]
    fn init_says_what_failed() {
        let line = "init: failure: no pmem device /dev/pmem1";
        let why = "no pmem device /dev/pmem1".to_owned();
        assert_eq!(verdict(line), Some(Verdict::InitFailed(why)));
    }

    #[test]
    fn ordinary_lines_say_nothing() {
        assert_eq!(verdict("[    0.1] pci 0000:00:01.0: BAR 4"), None);
        assert_eq!(verdict("init: success"), None);
        assert_eq!(verdict("[    0.2] Speculative Store Bypass: Vulnerable"), None);
    }

    #[test]
    fn the_tail_keeps_the_last_lines() {
        let mut tail = Tail::default();
        (0..100).for_each(|n| tail.push(n.to_string()));
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert_eq!(tail.lines().last(), Some("99"));
    }

    #[test]
    fn the_mark_is_found_however_it_is_cut() {
        let whole = b"out\x1e put\n\x1emark\x1e";
        for cut in 0..whole.len() {
            let mut stream = UntilMark::new("\x1emark\x1e");
            let (mut got, first) = stream.take(&whole[..cut]);
            let (more, second) = stream.take(&whole[cut..]);
            got.extend(more);
            assert!(!first && second, "cut at {cut}");
            assert_eq!(got, b"out\x1e put\n", "cut at {cut}");
        }
    }

    #[test]
    fn output_is_not_held_back() {
        let mut stream = UntilMark::new("\x1emark\x1e");
        assert_eq!(stream.take(b"prompt> "), (b"prompt> ".to_vec(), false));
    }
}
