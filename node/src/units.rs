//! Sizes and times as people write them, in flags and in configuration files.

use std::fmt;

use serde::de::{Deserializer, Error, Visitor};

/// `64KiB`, `1.5MB`, `20GB`, or plain bytes.
///
/// # Errors
/// One line for people, with examples.
pub fn parse_size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 9] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
    ];
    parse_unit(text, &UNITS).ok_or_else(|| format!("'{text}' is no size; examples: 64KiB, 500GB, 1TiB"))
}

/// As [`parse_size`], or `none` for 0.
///
/// # Errors
/// As [`parse_size`].
pub fn parse_rate(text: &str) -> Result<u64, String> {
    if text == "none" { Ok(0) } else { parse_size(text) }
}

/// `7d`, `12h`, `5m`, `90s`, `250ms`: milliseconds.
///
/// # Errors
/// One line for people, with examples.
pub fn parse_time(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
    if text.ends_with(|c: char| c.is_ascii_digit()) {
        return Err(format!("'{text}' has no unit; examples: 7d, 12h, 90s, 250ms"));
    }
    parse_unit(text, &UNITS).ok_or_else(|| format!("'{text}' is no time; examples: 7d, 12h, 90s, 250ms"))
}

/// A decimal number of units; a part of the smallest one is left out.
fn times(number: &str, factor: u64) -> Option<u64> {
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || part.len() > 9 || number.ends_with('.') || !digits(part) {
        return None;
    }
    let of = 10u128.pow(u32::try_from(part.len()).ok()?);
    let more = format!("0{part}").parse::<u128>().ok()?.checked_mul(u128::from(factor))?.checked_div(of)?;
    whole.parse::<u64>().ok()?.checked_mul(factor)?.checked_add(u64::try_from(more).ok()?)
}

fn parse_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    for (unit, factor) in units {
        if let Some(number) = text.strip_suffix(unit)
            && let Some(number) = times(number.trim(), *factor)
        {
            return Some(number);
        }
    }
    text.parse().ok()
}

/// For `#[serde(deserialize_with = "…")]`: a number of bytes, or a text as [`parse_rate`] takes it.
///
/// # Errors
/// The format's, with [`parse_size`]'s line.
pub fn size<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    from.deserialize_any(Size)
}

struct Size;

impl Visitor<'_> for Size {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of bytes, or a size such as \"500GB\"")
    }

    fn visit_u64<E: Error>(self, bytes: u64) -> Result<u64, E> {
        Ok(bytes)
    }

    fn visit_i64<E: Error>(self, bytes: i64) -> Result<u64, E> {
        u64::try_from(bytes).map_err(|_| E::custom(format!("'{bytes}' is no size: it is below 0")))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<u64, E> {
        parse_rate(text).map_err(E::custom)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_need_their_units_right() {
        assert_eq!(parse_size("64KiB").unwrap(), 65_536);
        assert_eq!(parse_size("20GB").unwrap(), 20_000_000_000);
        assert_eq!(parse_size("17").unwrap(), 17);
        assert!(parse_size("x").is_err() && parse_size("99999999TiB").is_err() && parse_size("1.5").is_err());
        assert_eq!(parse_size("1.5MB").unwrap(), 1_500_000);
        assert_eq!(parse_size("0.25KiB").unwrap(), 256);
        for bad in [".5GB", "1.GB", "1.-5GB", "1.2.3GB", "-1GB", "1.0000000001GB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_time("7d").unwrap(), 604_800_000);
        assert_eq!(parse_time("250ms").unwrap(), 250);
        assert!(parse_time("5").is_err() && parse_time("5w").is_err());
    }
}
