//! Sizes, as people write them.

use std::str::FromStr;

/// A size to have, or to add.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NewSize {
    Absolute(u64),
    /// Written with a plus: on top of what there is.
    More(u64),
}

impl NewSize {
    /// `None`: no file is that large.
    pub(crate) fn on_top_of(self, size: u64) -> Option<u64> {
        match self {
            Self::Absolute(size) => Some(size),
            Self::More(more) => size.checked_add(more),
        }
    }
}

impl FromStr for NewSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix('+') {
            Some(more) => parse_size(more).map(Self::More),
            None => parse_size(text).map(Self::Absolute),
        }
    }
}

/// Bytes, or K, M or G of 1024 each.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let unsuffixed = text.strip_suffix(['K', 'k', 'M', 'm', 'G', 'g']).unwrap_or(text);
    let unit: u64 = match text[unsuffixed.len()..].to_ascii_uppercase().as_str() {
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => 1,
    };
    let no_size = || format!("{text:?} is no size; write a number, with K, M or G if you like");
    // The parser of the standard library takes a plus.
    if !unsuffixed.starts_with(|first: char| first.is_ascii_digit()) {
        return Err(no_size());
    }
    let number: u64 = unsuffixed.parse().map_err(|_| no_size())?;
    number.checked_mul(unit).ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(parse_size("0"), Ok(0));
        assert_eq!(parse_size("17"), Ok(17));
        assert_eq!(parse_size("4K"), Ok(4096));
        assert_eq!(parse_size("2m"), Ok(2 << 20));
        assert_eq!(parse_size("3G"), Ok(3 << 30));
        assert_eq!(parse_size("18446744073709551615"), Ok(u64::MAX));
        for wrong in ["", "K", "-1", "+1", "1.5M", "1T", "1KK", "ü", "99999999999G", "1 M"] {
            assert!(parse_size(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_plus_adds() {
        let on_top = |text: &str, size| text.parse::<NewSize>().map(|new| new.on_top_of(size));
        assert_eq!(on_top("4K", 1000), Ok(Some(4096)));
        assert_eq!(on_top("+4K", 1000), Ok(Some(5096)));
        assert_eq!(on_top("+0", 7), Ok(Some(7)));
        assert_eq!(on_top("+1", u64::MAX), Ok(None));
        for wrong in ["", "+", "++1", "+-1", "-1", "+1T"] {
            assert!(on_top(wrong, 0).is_err(), "{wrong:?}");
        }
    }
}
