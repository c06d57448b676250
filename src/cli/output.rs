//! How commands answer: one JSON object with `--json`, text for people otherwise; results on standard output, all else
//! on standard error. A closed pipe (`willcall … | head`) is no error. Names of goods, files and peers are other people's:
//! what a terminal would obey is not among what is printed.

use std::io::{self, Write};

use anyhow::Result;
use serde_json::Value;

/// What a command has to say: the same facts twice.
pub(crate) struct Answer {
    json: Value,
    text: String,
}

impl Answer {
    /// `json` for tools, `text` for people (without a line break at the end).
    pub(crate) fn new(json: Value, text: impl Into<String>) -> Self {
        Answer { json, text: text.into() }
    }

    /// Writes it to standard output.
    pub(crate) fn print(&self, json: bool) -> Result<()> {
        let text = if json { self.json.to_string() } else { harmless(&self.text) };
        line(&text)
    }
}

/// One line (or block) to standard output.
pub(crate) fn line(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// One line to standard error. Nothing can be done where even that fails.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", harmless(text));
}

/// Text without control characters other than line breaks and tabs.
pub(crate) fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c }).collect()
}

/// `1536` -> `1.5 KiB`.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// A table without lines, columns two blanks apart.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// A string field of a JSON object, or a dash.
pub(crate) fn field(value: &Value, name: &str) -> String {
    match value.get(name) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => "-".to_owned(),
        Some(other) => other.to_string(),
    }
}

/// The rows of an array field.
pub(crate) fn rows<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value.get(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Unix milliseconds as a date and time in UTC.
pub(crate) fn time(ms: u64) -> String {
    i64::try_from(ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(|| "-".to_owned(), |t| t.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
}

/// A time as [`time`] and what nodes say have it, or unix milliseconds.
pub(crate) fn parse_moment(text: &str) -> Result<u64, String> {
    if let Ok(ms) = text.parse() {
        return Ok(ms);
    }
    let whole = text.strip_suffix(" UTC").map_or_else(|| text.to_owned(), |time| format!("{time}Z"));
    let moment = whole.parse::<jiff::Timestamp>().ok().and_then(|at| u64::try_from(at.as_millisecond()).ok());
    moment.ok_or_else(|| format!("'{text}' is no time; examples: '2026-11-25 07:21:08 UTC', 1795591268000"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_a_terminal_nothing() {
        let name = "\u{1b}]52;c;cm0=\u{7}\u{9b}31m\rlast\nline\tend";
        assert_eq!(harmless(name), "\u{fffd}]52;c;cm0=\u{fffd}\u{fffd}31m\u{fffd}last\nline\tend");
    }

    #[test]
    fn a_time_is_taken_as_it_is_shown() {
        const AT: u64 = 1_795_591_268_738;
        assert_eq!(parse_moment(&protocol::utc::Utc(AT).to_string()), Ok(AT));
        assert_eq!(parse_moment(&time(AT)), Ok(AT - 738));
        assert_eq!(parse_moment(&AT.to_string()), Ok(AT));
        assert_eq!(parse_moment("2026-11-25T07:21:08.738Z"), Ok(AT));
        for bad in ["", "UTC", "2026-11-25", "2026-11-25 07:21:08", "-1", "1969-12-31 23:59:59 UTC"] {
            assert!(parse_moment(bad).is_err(), "{bad}");
        }
    }
}
