//! Draws what happened when, to scale, for a terminal: one row per step, each a bar from the end of
//! the step before to its own. Pure: steps in, text out.
//!
//! ```
//! use std::time::Duration;
//! use pinfold_cli::timeline::{Look, Step, draw};
//!
//! let steps = [
//!     Step::at("break", Duration::ZERO),
//!     Step::at("notice", Duration::from_micros(210)),
//!     Step::at("drained", Duration::from_micros(4_800)),
//!     Step::at("fenced", Duration::from_micros(9_100)),
//!     Step::at("released", Duration::from_micros(9_400)),
//! ];
//! print!("{}", draw(&steps, Look { width: 80, colour: false }));
//! ```

use std::fmt::Write as _;
use std::time::Duration;

use pinfold_client::RevocationTimings;

/// The narrowest and the widest picture, in columns.
pub const WIDTHS: std::ops::RangeInclusive<usize> = 60..=200;

/// Columns of a time, such as `+1.23 ms`.
const TIME_COLUMNS: usize = 9;

/// Columns between two tick labels, at least.
const TICK_GAP: usize = 4;

/// Something that happened, or should have.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Step {
    name: String,
    when: When,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum When {
    At(Duration),
    Never(&'static str),
}

/// How to draw.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Look {
    /// Columns to fill; taken to the next one in [`WIDTHS`].
    pub width: usize,
    /// Whether to use ANSI colours.
    pub colour: bool,
}

impl Step {
    /// It was over this long after the beginning.
    pub fn at(name: impl Into<String>, when: Duration) -> Self {
        Self { name: name.into(), when: When::At(when) }
    }

    /// It never came, for this reason.
    pub fn never(name: impl Into<String>, why: &'static str) -> Self {
        Self { name: name.into(), when: When::Never(why) }
    }
}

/// The steps of a revocation, from the kernel's break signal on.
pub fn revocation(timings: &RevocationTimings) -> Vec<Step> {
    let drained = match timings.drained {
        Some(when) => Step::at("drained", when),
        None => Step::never("drained", "never: the drain budget ran out"),
    };
    vec![
        Step::at("break", Duration::ZERO),
        Step::at("notice", timings.noticed),
        drained,
        Step::at("fenced", timings.fenced),
        Step::at("released", timings.released),
    ]
}

/// Draws the steps, each line ended by a newline and without trailing blanks.
///
/// They come in the order of time. A step that took less than a column is a lone mark, in its place
/// and with its figures.
pub fn draw(steps: &[Step], look: Look) -> String {
    let width = look.width.clamp(*WIDTHS.start(), *WIDTHS.end());
    let label_columns = steps.iter().map(|step| step.name.chars().count()).max().unwrap_or(0);
    let figure_columns = 2 * (1 + TIME_COLUMNS);
    let columns = width.saturating_sub(label_columns + 2 + figure_columns).max(20);
    let scale = Scale { columns, total: total(steps) };

    let mut picture = String::new();
    let indent = label_columns + 2;
    let [labels, line] = axis(&scale);
    push_line(&mut picture, &format!("{:indent$}{}", "", look.dim(&labels)));
    let line = format!("{line} {:>TIME_COLUMNS$} {:>TIME_COLUMNS$}", "at", "took");
    push_line(&mut picture, &format!("{:indent$}{}", "", look.dim(&line)));
    let mut before = Duration::ZERO;
    for (index, step) in steps.iter().enumerate() {
        let (bar, figures) = match step.when {
            When::At(when) => {
                let row = (scale.bar(before, when, look.paint(index)), figures(before, when));
                before = when;
                row
            }
            When::Never(why) => (look.warn(&scale.note(before, why)), String::new()),
        };
        push_line(&mut picture, &format!("{:<label_columns$}  {bar}{figures}", step.name));
    }
    picture
}

/// A length of time in three digits: `84 µs`, `5.31 ms`, `12.0 s`.
pub fn figure(time: Duration) -> String {
    let micros = time.as_micros() as f64;
    match micros {
        0.0 => "0".to_owned(),
        // The limits are where rounding would show a fourth digit.
        _ if micros < 999.5 => format!("{micros:.0} µs"),
        _ if micros < 999_500.0 => format!("{} ms", three_digits(micros / 1e3)),
        _ => format!("{} s", three_digits(micros / 1e6)),
    }
}

/// Where a time is in the picture.
struct Scale {
    columns: usize,
    total: Duration,
}

impl Scale {
    fn column(&self, time: Duration) -> usize {
        let share = time.as_secs_f64() / self.total.as_secs_f64();
        (share * (self.columns - 1) as f64).round() as usize
    }

    fn bar(&self, from: Duration, to: Duration, paint: Paint) -> String {
        let end = self.column(to);
        let start = self.column(from).min(end);
        let drawn = match end - start {
            0 => "●".to_owned(),
            length => format!("┝{}●", "━".repeat(length - 1)),
        };
        format!("{:start$}{}{:after$}", "", paint.on(&drawn), "", after = self.columns - 1 - end)
    }

    /// A note where the bar would be; moved to the left as far as it needs to fit.
    fn note(&self, from: Duration, why: &str) -> String {
        let room = self.columns.saturating_sub(why.chars().count());
        format!("{:start$}{why}", "", start = self.column(from).min(room))
    }
}

fn total(steps: &[Step]) -> Duration {
    let times = steps.iter().filter_map(|step| match step.when {
        When::At(when) => Some(when),
        When::Never(_) => None,
    });
    // Never zero, so that it can be divided by.
    times.max().unwrap_or_default().max(Duration::from_micros(1))
}

fn figures(before: Duration, when: Duration) -> String {
    let taken = when.saturating_sub(before);
    let taken = if taken.is_zero() { String::new() } else { format!("+{}", figure(taken)) };
    format!(" {:>TIME_COLUMNS$} {taken:>TIME_COLUMNS$}", figure(when))
}

/// The line of tick labels and the line of ticks.
fn axis(scale: &Scale) -> [String; 2] {
    let (unit, unit_micros) = match scale.total.as_micros() {
        0..1_000 => ("µs", 1.0),
        1_000..1_000_000 => ("ms", 1e3),
        _ => ("s", 1e6),
    };
    let total = scale.total.as_micros() as f64 / unit_micros;
    let interval = tick_interval(total, scale.columns);
    let count = (total / interval + 1e-9).floor() as usize;
    let mut labels = String::new();
    let mut line: Vec<char> = vec!['─'; scale.columns];
    for tick in 0..=count {
        let value = tick as f64 * interval;
        let column = scale.column(Duration::from_secs_f64(value * unit_micros / 1e6));
        line[column] = match column {
            0 => '├',
            _ if column + 1 == scale.columns => '┤',
            _ => '┼',
        };
        let label = tick_label(value, interval);
        let label = if tick == count { format!("{label} {unit}") } else { label };
        let blanks = column.saturating_sub(labels.chars().count());
        let _ = write!(labels, "{:blanks$}{label}", "");
    }
    [labels, line.into_iter().collect()]
}

/// The smallest of 1, 2, 5, 10, 20 … of which the labels stand apart.
fn tick_interval(total: f64, columns: usize) -> f64 {
    let mut power = 10_f64.powf((total / columns as f64).log10().floor());
    loop {
        for interval in [power, 2.0 * power, 5.0 * power] {
            let apart = interval / total * (columns - 1) as f64;
            let label = tick_label(total, interval).len();
            if apart >= (label + TICK_GAP) as f64 {
                return interval;
            }
        }
        power *= 10.0;
    }
}

fn tick_label(value: f64, interval: f64) -> String {
    let decimals = (-interval.log10().floor()).max(0.0) as usize;
    if value == 0.0 { "0".to_owned() } else { format!("{value:.decimals$}") }
}

fn three_digits(value: f64) -> String {
    let decimals = match value {
        _ if value < 9.995 => 2,
        _ if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

fn push_line(picture: &mut String, line: &str) {
    picture.push_str(line.trim_end());
    picture.push('\n');
}

/// The colours of the bars, in the order of the steps and round again.
const COLOURS: [&str; 5] = ["1", "36", "33", "31", "32"];

#[derive(Clone, Copy)]
struct Paint(Option<&'static str>);

impl Paint {
    fn on(self, text: &str) -> String {
        match self.0 {
            Some(code) => format!("\u{1b}[{code}m{text}\u{1b}[0m"),
            None => text.to_owned(),
        }
    }
}

impl Look {
    fn paint(self, index: usize) -> Paint {
        Paint(self.colour.then(|| COLOURS[index % COLOURS.len()]))
    }

    fn dim(self, text: &str) -> String {
        Paint(self.colour.then_some("2")).on(text)
    }

    fn warn(self, text: &str) -> String {
        Paint(self.colour.then_some("1;33")).on(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(steps: &[(&str, u64)]) -> Vec<Step> {
        steps.iter().map(|(name, micros)| Step::at(*name, Duration::from_micros(*micros))).collect()
    }

    fn check(steps: &[Step], width: usize, expected: &str) {
        let drawn = draw(steps, Look { width, colour: false });
        assert_eq!(drawn, expected.trim_start_matches('\n'), "drawn:\n{drawn}");
        assert!(drawn.lines().all(|line| line.chars().count() <= width));
    }

    fn timings(drained: Option<u64>) -> RevocationTimings {
        RevocationTimings {
            noticed: Duration::from_micros(210),
            drained: drained.map(Duration::from_micros),
            fenced: Duration::from_micros(9_100),
            released: Duration::from_micros(9_400),
            break_pending_at_release: true,
        }
    }

    #[test]
    fn a_revocation_to_scale() {
        check(
            &revocation(&timings(Some(4_800))),
            80,
            "
          0    1    2     3    4    5    6    7     8    9 ms
          ├────┼────┼─────┼────┼────┼────┼────┼─────┼────┼──        at      took
break     ●                                                          0
notice    ┝●                                                    210 µs   +210 µs
drained    ┝━━━━━━━━━━━━━━━━━━━━━━━●                           4.80 ms  +4.59 ms
fenced                             ┝━━━━━━━━━━━━━━━━━━━━━●     9.10 ms  +4.30 ms
released                                                 ┝━●   9.40 ms   +300 µs
",
        );
    }

    #[test]
    fn a_drain_that_never_ended_is_told() {
        check(
            &revocation(&timings(None)),
            100,
            "
          0      1       2      3      4       5      6      7       8      9 ms
          ├──────┼───────┼──────┼──────┼───────┼──────┼──────┼───────┼──────┼───        at      took
break     ●                                                                              0
notice    ┝━●                                                                       210 µs   +210 µs
drained     never: the drain budget ran out
fenced      ┝━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━●     9.10 ms  +8.89 ms
released                                                                     ┝━●   9.40 ms   +300 µs
",
        );
    }

    #[test]
    fn steps_in_one_column_stay_readable() {
        let steps = micros(&[
            ("break", 0),
            ("notice", 84),
            ("drained", 53_100),
            ("fenced", 57_400),
            ("released", 57_700),
            ("deregistered", 90_000),
            ("unmapped", 90_300),
        ]);
        check(
            &steps,
            60,
            "
              0             50 ms
              ├─────────────┼───────────        at      took
break         ●                                  0
notice        ●                              84 µs    +84 µs
drained       ┝━━━━━━━━━━━━━━●             53.1 ms  +53.0 ms
fenced                       ┝●            57.4 ms  +4.30 ms
released                      ●            57.7 ms   +300 µs
deregistered                  ┝━━━━━━━━●   90.0 ms  +32.3 ms
unmapped                               ●   90.3 ms   +300 µs
",
        );
    }

    #[test]
    fn a_revocation_that_took_no_time_is_drawn() {
        let steps = micros(&[("break", 0), ("notice", 0), ("released", 0)]);
        check(
            &steps,
            60,
            "
          0              0.5           1.0 µs
          ├──────────────┼─────────────┤        at      took
break     ●                                      0
notice    ●                                      0
released  ●                                      0
",
        );
    }

    #[test]
    fn every_width_is_kept_and_narrow_ones_are_as_the_narrowest() {
        let steps = revocation(&timings(Some(4_800)));
        for width in WIDTHS {
            let drawn = draw(&steps, Look { width, colour: false });
            let widest = drawn.lines().map(|line| line.chars().count()).max();
            assert!(widest.is_some_and(|widest| width - 4 <= widest && widest <= width), "{width}");
        }
        let drawn = |width| draw(&steps, Look { width, colour: false });
        assert_eq!(drawn(0), drawn(60));
        assert_eq!(drawn(999), drawn(200));
    }

    #[test]
    fn colour_changes_nothing_but_colour() {
        let steps = revocation(&timings(None));
        let coloured = draw(&steps, Look { width: 80, colour: true });
        assert!(coloured.contains("\u{1b}[31m┝"), "the fence is red");
        let mut plain = String::new();
        for (index, part) in coloured.split('\u{1b}').enumerate() {
            let text = if index == 0 { part } else { part.split_once('m').unwrap().1 };
            plain.push_str(text);
        }
        assert_eq!(plain, draw(&steps, Look { width: 80, colour: false }));
    }

    #[test]
    fn figures_have_three_digits() {
        for (micros, expected) in [
            (0, "0"),
            (7, "7 µs"),
            (999, "999 µs"),
            (1_000, "1.00 ms"),
            (9_994, "9.99 ms"),
            (9_996, "10.0 ms"),
            (53_100, "53.1 ms"),
            (999_499, "999 ms"),
            (999_500, "1.00 s"),
            (5_057_400, "5.06 s"),
            (123_000_000, "123 s"),
        ] {
            assert_eq!(figure(Duration::from_micros(micros)), expected);
        }
    }
}
