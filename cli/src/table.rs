//! Tables of text, and text that is safe to print.

use std::fmt::Write as _;

/// Columns between two columns of a table.
const GAP: &str = "  ";

/// Where the text of a column stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Rows under a heading.
#[derive(Debug)]
pub(crate) struct Table<const N: usize> {
    headings: [(&'static str, Align); N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(crate) fn new(headings: [(&'static str, Align); N]) -> Self {
        Self { headings, rows: Vec::new() }
    }

    pub(crate) fn push(&mut self, row: [String; N]) {
        self.rows.push(row);
    }

    /// Each line ended by a newline and without trailing blanks.
    pub(crate) fn draw(&self, colour: bool) -> String {
        let widths: [usize; N] = std::array::from_fn(|column| {
            let cells = self.rows.iter().map(|row| row[column].chars().count());
            cells.chain([self.headings[column].0.len()]).max().unwrap_or(0)
        });
        let headings = self.headings.map(|(heading, _)| heading.to_owned());
        let heading = self.line(&headings, &widths);
        let mut drawn = match colour {
            true => format!("\u{1b}[1m{heading}\u{1b}[0m\n"),
            false => format!("{heading}\n"),
        };
        for row in &self.rows {
            drawn += &self.line(row, &widths);
            drawn.push('\n');
        }
        drawn
    }

    fn line(&self, cells: &[String; N], widths: &[usize; N]) -> String {
        let mut line = String::new();
        for (column, cell) in cells.iter().enumerate() {
            let width = widths[column];
            let gap = if column == 0 { "" } else { GAP };
            let _ = match self.headings[column].1 {
                Align::Left => write!(line, "{gap}{cell:<width$}"),
                Align::Right => write!(line, "{gap}{cell:>width$}"),
            };
        }
        line.truncate(line.trim_end().len());
        line
    }
}

/// The same text without what a terminal would obey: names are chosen by others.
pub(crate) fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_control() {
            true => safe.extend(character.escape_default()),
            false => safe.push(character),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table =
            Table::new([("SIZE", Align::Right), ("PIN", Align::Left), ("NAME", Align::Left)]);
        table.push(["7".into(), "1".into(), "ä".into()]);
        table.push(["123456".into(), "-".into(), String::new()]);
        assert_eq!(table.draw(false), "  SIZE  PIN  NAME\n     7  1    ä\n123456  -\n");
        assert!(table.draw(true).starts_with("\u{1b}[1m  SIZE  PIN  NAME\u{1b}[0m\n"));
    }

    #[test]
    fn a_table_without_rows_is_its_heading() {
        assert_eq!(Table::new([("A", Align::Left), ("B", Align::Right)]).draw(false), "A  B\n");
    }

    #[test]
    fn names_cannot_talk_to_the_terminal() {
        assert_eq!(printable("log ü.txt"), "log ü.txt");
        assert_eq!(printable("a\u{1b}[31m\nb\u{9b}"), "a\\u{1b}[31m\\nb\\u{9b}");
    }
}
