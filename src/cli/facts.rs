//! What a node answers, for people: the JSON of a control command laid out as names and values, with tables for lists and
//! with sizes, times and money as they are read. One place for it, so that a new field looks right without code of its own.

use std::time::Duration;

use indicatif::HumanDuration;
use protocol::Amount;
use serde_json::{Map, Value};

use super::output::{self, rows, table};

/// Unix milliseconds before this (the year 2001) are taken for a duration or a count.
const FIRST_TIME_MS: u64 = 1_000_000_000_000;

/// A whole answer: single facts first, then a part for each group, with lists as tables.
pub(crate) fn page(answer: &Value) -> String {
    let mut out = Vec::new();
    match answer {
        Value::Object(map) => part("", map, &mut out),
        other => out.push(fact("", other)),
    }
    out.join("\n")
}

/// The rows of an array field as a table of these columns; a list within a row as its length.
pub(crate) fn listed(answer: &Value, name: &str, columns: &[&str]) -> String {
    let cell = |row: &Value, column: &str| match row.get(column) {
        Some(Value::Array(list)) => list.len().to_string(),
        other => fact(column, other.unwrap_or(&Value::Null)),
    };
    let row = |row: &Value| columns.iter().map(|column| cell(row, column)).collect();
    table(columns, rows(answer, name).iter().map(row).collect())
}

/// An amount, `9.99 USD`.
pub(crate) fn money(amount: Option<&Value>) -> String {
    amount
        .and_then(|value| serde_json::from_value::<Amount>(value.clone()).ok())
        .map_or_else(|| "-".to_owned(), |amount| amount.to_string())
}

fn part(title: &str, map: &Map<String, Value>, out: &mut Vec<String>) {
    let (facts, groups): (Vec<_>, Vec<_>) = map.iter().partition(|(_, value)| is_fact(value));
    let named =
        |(name, value): &(&String, &Value)| (label_among(name, |other| map.contains_key(other)), fact(name, value));
    let facts: Vec<(String, String)> = facts.iter().map(named).collect();
    let width = facts.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    out.extend(facts.iter().map(|(name, value)| format!("{name:width$}  {value}").trim_end().to_owned()));
    for (name, group) in groups {
        let title = if title.is_empty() { label(name) } else { format!("{title}, {}", label(name)) };
        match group {
            Value::Object(map) if map.is_empty() => {}
            Value::Object(map) => {
                out.push(format!("\n{title}"));
                part(&title, map, out);
            }
            Value::Array(list) => list_of(&title, list, out),
            _ => {}
        }
    }
}

/// A table where each row is flat; else a part for each.
fn list_of(title: &str, list: &[Value], out: &mut Vec<String>) {
    let maps: Vec<&Map<String, Value>> = list.iter().filter_map(Value::as_object).collect();
    if maps.iter().any(|map| !map.values().all(is_fact)) {
        for (index, map) in maps.into_iter().enumerate() {
            let title = format!("{title} {}", index + 1);
            out.push(format!("\n{title}"));
            part(&title, map, out);
        }
        return;
    }
    let mut names: Vec<&String> = Vec::new();
    for name in maps.iter().flat_map(|map| map.keys()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let there = |other: &str| names.iter().any(|name| *name == other);
    let header: Vec<String> = names.iter().map(|name| label_among(name, there)).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let row = |map: &&Map<String, Value>| {
        names.iter().map(|name| fact(name, map.get(*name).unwrap_or(&Value::Null))).collect::<Vec<_>>()
    };
    out.push(format!("\n{title}"));
    out.push(table(&header, maps.iter().map(row).collect()));
}

/// Whether it fits on a line: anything but a group and a list of groups.
fn is_fact(value: &Value) -> bool {
    match value {
        Value::Object(map) => is_amount(map),
        Value::Array(list) => !list.iter().any(Value::is_object),
        _ => true,
    }
}

fn is_amount(map: &Map<String, Value>) -> bool {
    map.len() == 2 && map.contains_key("minor") && map.contains_key("currency")
}

fn label(name: &str) -> String {
    name.strip_suffix("_ms").or_else(|| name.strip_suffix("_bytes")).unwrap_or(name).replace('_', " ")
}

/// The label of one among others: where a second one would be called the same, its unit tells them apart.
fn label_among(name: &str, there: impl Fn(&str) -> bool) -> String {
    let whole = || name.replace('_', " ");
    let bare = name.strip_suffix("_ms").or_else(|| name.strip_suffix("_bytes"));
    if bare.is_some_and(there) { whole() } else { label(name) }
}

/// One value, in the form that its name asks for.
fn fact(name: &str, value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Number(number) => number.as_u64().map_or_else(|| number.to_string(), |number| counted(name, number)),
        Value::Array(list) if list.is_empty() => "-".to_owned(),
        Value::Array(list) if list.iter().any(Value::is_object) => list.len().to_string(),
        Value::Array(list) => list.iter().map(|value| fact(name, value)).collect::<Vec<_>>().join(" "),
        Value::Object(map) if is_amount(map) => money(Some(value)),
        Value::Object(map) => map.len().to_string(),
    }
}

fn counted(name: &str, number: u64) -> String {
    let last = name.rsplit('_').next().unwrap_or(name);
    match last {
        "at" | "until" | "after" | "from" | "start" | "end" | "contact" | "try" if number >= FIRST_TIME_MS => {
            output::time(number)
        }
        "ms" if number < 1000 => format!("{number} ms"),
        "ms" => HumanDuration(Duration::from_millis(number)).to_string(),
        "bytes" | "free" | "capacity" | "size" => output::bytes(number),
        _ => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_answer_is_laid_out_for_people() {
        let answer = json!({
            "name": "first", "used_bytes": 59_983, "uptime_ms": 190_000, "enrolled": true, "fork": null,
            "formed_at": 1_795_591_268_738_u64, "price": {"minor": 999, "currency": "USD"},
            "addresses": ["/a", "/b"], "refusals": {},
            "quota": {"max_inodes": 0},
            "contents": [{"bytes": 2048, "complete": true}, {"bytes": 1, "note": "cut"}],
            "deliveries": [{"number": 1, "seeders": [{"seeder": "x", "chunks": 3}]}],
        });
        let expected = "\
addresses  /a /b
enrolled   yes
fork       -
formed at  2026-11-25 07:21:08 UTC
name       first
price      9.99 USD
uptime     3 minutes
used       58.58 KiB

contents
 bytes     complete  note
 2.00 KiB  yes       -
 1 B       -         cut

deliveries 1
number  1

deliveries 1, seeders
 chunks  seeder
 3       x

quota
max inodes  0";
        assert_eq!(page(&answer), expected);
    }

    #[test]
    fn two_of_one_name_are_told_apart() {
        let answer = json!({ "content": "abc", "content_bytes": 2048, "files": [{ "size": 1, "size_bytes": 2 }] });
        let said = page(&answer);
        assert!(said.contains("content        abc\ncontent bytes  2.00 KiB"), "{said}");
        assert!(said.contains("size bytes"), "{said}");
    }

    #[test]
    fn small_numbers_are_no_times() {
        assert_eq!(fact("deliveries_from", &json!(7)), "7");
        assert_eq!(fact("pause_ms", &json!(250)), "250 ms");
        assert_eq!(fact("dead_after", &json!(7)), "7");
    }

    #[test]
    fn the_times_of_a_key_are_read_as_all_others() {
        for name in ["not_issued_after", "dead_after", "dead_at"] {
            assert_eq!(fact(name, &json!(1_795_591_268_738_u64)), "2026-11-25 07:21:08 UTC", "{name}");
        }
    }
}
