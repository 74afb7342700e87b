//! How a demo speaks: who does what, one line each.

use std::io::Write;

use pinfold_cli::timeline::Look;

/// Where a demo writes.
#[derive(Debug)]
pub struct Screen {
    /// How to draw on it.
    pub look: Look,
}

impl Screen {
    /// `--colour` and `--width N`: whether the output ends at a terminal is known outside the VM.
    pub fn from_args() -> Self {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let width = args.iter().skip_while(|arg| *arg != "--width").nth(1);
        let width = width.and_then(|width| width.parse().ok()).unwrap_or(80);
        let colour = args.iter().any(|arg| arg == "--colour");
        Self { look: Look { width: width.min(100), colour } }
    }

    /// A new part begins.
    pub fn title(&self, text: &str) {
        println!("\n{}", self.in_style("1", text));
    }

    /// Somebody does something.
    pub fn step(&self, who: &str, what: &str) {
        println!("  {who:<7} {what}");
        self.flush();
    }

    /// … with a bad end.
    pub fn bad(&self, who: &str, what: &str) {
        println!("  {who:<7} {}", self.in_style("31", what));
        self.flush();
    }

    /// … with a good end.
    pub fn good(&self, who: &str, what: &str) {
        println!("  {who:<7} {}", self.in_style("32", what));
        self.flush();
    }

    /// What it comes to.
    pub fn note(&self, text: &str) {
        println!("  => {}", self.in_style("1", text));
        self.flush();
    }

    fn in_style(&self, style: &str, text: &str) -> String {
        if self.look.colour { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn flush(&self) {
        // A reader that is gone ends the demo with the next print.
        let _ = std::io::stdout().flush();
    }
}

/// Runs of equal bytes: `4096 x 'R', 12288 x 'L'`.
pub fn summary(content: &[u8]) -> String {
    let runs: Vec<String> = content
        .chunk_by(|a, b| a == b)
        .map(|run| match run[0] {
            0 => format!("{} x 0", run.len()),
            byte => format!("{} x '{}'", run.len(), char::from(byte)),
        })
        .collect();
    runs.join(", ")
}
