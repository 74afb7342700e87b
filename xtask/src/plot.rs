//! Draws a bench's results: a line for each row, with the ratio and where its middle half lies, and the
//! goal. Pure.

use std::fmt::Write;

use anyhow::{Context, Result};
use serde_json::Value;

const ROW_HEIGHT: f64 = 18.0;
const HEAD_HEIGHT: f64 = 62.0;
const FOOT_HEIGHT: f64 = 16.0;
/// Where names end and the scale begins and ends.
const LEFT: f64 = 330.0;
const RIGHT: f64 = 900.0;
const WIDTH: f64 = 1130.0;

/// What a row needs to be drawn.
struct Line<'a> {
    name: &'a str,
    peer: &'a str,
    ratio: f64,
    lower: f64,
    upper: f64,
    goal: Option<f64>,
    holds: Option<bool>,
    words: String,
}

/// The ratios as an SVG.
pub(crate) fn svg(results: &Value) -> Result<String> {
    let rows = results["rows"].as_array().context("results without rows")?;
    let lines: Vec<Line<'_>> =
        rows.iter().map(line).collect::<Option<_>>().context("a row lacks something")?;
    let scale = Scale::of(&lines);
    let bottom = HEAD_HEIGHT + ROW_HEIGHT * lines.len() as f64;
    let mut svg = String::new();
    let height = bottom + FOOT_HEIGHT;
    writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">
<rect width="{WIDTH}" height="{height}" fill="#fff"/>
<text x="10" y="20" font-size="15">Pinfold beside its peers: ours to theirs, median and middle half of the rounds</text>
<text x="10" y="38" fill="#555">{}</text>"##,
        escaped(&head(results))
    )?;
    for power in scale.powers() {
        let (x, at) = (scale.x(power), HEAD_HEIGHT - 6.0);
        let (colour, label) = if power == 1.0 { ("#000", "as much") } else { ("#ddd", "") };
        writeln!(svg, r##"<path d="M{x:.1} {HEAD_HEIGHT}V{bottom}" stroke="{colour}"/>"##)?;
        writeln!(
            svg,
            r##"<text x="{x:.1}" y="{at}" text-anchor="middle">{power} {label}</text>"##
        )?;
    }
    for (number, line) in lines.iter().enumerate() {
        draw(&mut svg, &scale, HEAD_HEIGHT + ROW_HEIGHT * (number as f64 + 0.5), line)?;
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

fn draw(svg: &mut String, scale: &Scale, middle: f64, line: &Line<'_>) -> Result<()> {
    let colour = match line.holds {
        Some(true) => "#1a7f37",
        Some(false) => "#c62828",
        None => "#666",
    };
    let (low, high, at) = (scale.x(line.lower), scale.x(line.upper), scale.x(line.ratio));
    let (text, far) = (middle + 4.0, RIGHT + 12.0);
    let (name, peer, words) = (escaped(line.name), escaped(line.peer), escaped(&line.words));
    writeln!(svg, "<g><title>{name}, beside {peer}</title>")?;
    writeln!(
        svg,
        r##"<text x="{:.1}" y="{text:.1}" text-anchor="end">{name}</text>"##,
        LEFT - 12.0
    )?;
    if let Some(goal) = line.goal {
        let (x, top) = (scale.x(goal), middle - 7.0);
        writeln!(svg, r##"<path d="M{x:.1} {top:.1}v14" stroke="#1565c0" stroke-width="2"/>"##)?;
    }
    writeln!(
        svg,
        r##"<path d="M{low:.1} {middle:.1}H{high:.1}" stroke="{colour}" stroke-width="3" opacity="0.5"/>
<circle cx="{at:.1}" cy="{middle:.1}" r="4" fill="{colour}"/>
<text x="{far:.1}" y="{text:.1}" fill="{colour}">{words}</text></g>"##
    )?;
    Ok(())
}

/// What it was measured with.
fn head(results: &Value) -> String {
    let word = |key: &str| results[key].as_str().unwrap_or("unknown").to_owned();
    format!(
        "{} on {}, {}, rdma-core {}, commit {}; blue: the goal",
        word("device"),
        word("kernel"),
        word("processor"),
        word("rdma_core"),
        word("commit")
    )
}

fn line(row: &Value) -> Option<Line<'_>> {
    let ratio = row["ratio"].as_f64()?;
    let verdict = match (row["goal_is"].as_str(), row["goal"].as_f64()) {
        (Some(is), Some(goal)) => format!(" ({is} {goal})"),
        _ => String::new(),
    };
    Some(Line {
        name: row["name"].as_str()?,
        peer: row["peer"].as_str()?,
        ratio,
        lower: row["ratio_lower_quartile"].as_f64()?,
        upper: row["ratio_upper_quartile"].as_f64()?,
        goal: row["goal"].as_f64(),
        holds: row["holds"].as_bool(),
        words: format!("{ratio:.2}{verdict}"),
    })
}

/// Logarithmic: half as much lies as far away as twice as much.
struct Scale {
    least: i32,
    most: i32,
}

impl Scale {
    fn of(lines: &[Line<'_>]) -> Self {
        let powers = || lines.iter().flat_map(|line| [line.lower, line.upper]).filter(|r| *r > 0.0);
        let least = powers().map(|ratio| ratio.log2().floor() as i32).min().unwrap_or(0).min(-1);
        let most = powers().map(|ratio| ratio.log2().ceil() as i32).max().unwrap_or(0).max(1);
        Self { least, most }
    }

    fn x(&self, ratio: f64) -> f64 {
        let part = (ratio.log2() - f64::from(self.least)) / f64::from(self.most - self.least);
        LEFT + (RIGHT - LEFT) * part.clamp(0.0, 1.0)
    }

    fn powers(&self) -> impl Iterator<Item = f64> + use<> {
        (self.least..=self.most).map(|power| f64::from(power).exp2())
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn results() -> Value {
        let row = |name: &str, ratio: f64, holds: Option<bool>| {
            json!({
                "name": name, "peer": "C & more", "ratio": ratio, "ratio_lower_quartile": ratio / 2.0,
                "ratio_upper_quartile": ratio * 2.0, "goal": holds.map(|_| 1.0),
                "goal_is": holds.map(|_| "at most"), "holds": holds,
            })
        };
        json!({
            "device": "rxe0", "kernel": "7", "processor": "p", "rdma_core": "44", "commit": "abc",
            "rows": [row("good", 0.5, Some(true)), row("bad", 4.0, Some(false)), row("shown", 1.0, None)],
        })
    }

    #[test]
    fn each_row_is_drawn_with_its_verdict() {
        let svg = svg(&results()).unwrap();
        assert_eq!(svg.matches("<circle").count(), 3);
        for words in [
            ">good<",
            ">0.50 (at most 1)<",
            ">4.00 (at most 1)<",
            ">1.00<",
            "C &amp; more",
            "commit abc",
        ] {
            assert!(svg.contains(words), "{words} is not in {svg}");
        }
        // The mark of the goal, only where there is one.
        assert_eq!(svg.matches("#1565c0").count(), 2);
    }

    #[test]
    fn the_scale_holds_all_and_as_much_lies_between() {
        let results = results();
        let lines: Vec<_> = results["rows"].as_array().unwrap().iter().filter_map(line).collect();
        let scale = Scale::of(&lines);
        assert_eq!((scale.x(0.25), scale.x(8.0)), (LEFT, RIGHT));
        assert!((scale.x(2.0) - scale.x(1.0) - (scale.x(1.0) - scale.x(0.5))).abs() < 1e-9);
        assert_eq!(scale.powers().collect::<Vec<_>>(), [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]);
    }

    #[test]
    fn what_is_no_result_is_refused() {
        assert!(svg(&json!({})).is_err());
        assert!(svg(&json!({"rows": [{"name": "x"}]})).is_err());
    }
}
