//! `docs/protocol.md` is what other implementations and people in a dispute read: its tables must name what the code has.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use protocol::RefusalCode;
use world::samples;

fn page() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/protocol.md");
    std::fs::read_to_string(path).unwrap()
}

fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().map(|g| std::str::from_utf8(g).unwrap()).collect();
    groups.join(",")
}

#[test]
fn every_document_stands_in_the_table_with_its_number_limit_and_vector() {
    let page = page();
    for (number, group) in samples::documents().iter().enumerate() {
        let row = page
            .lines()
            .find(|line| line.starts_with(&format!("| {number} | ")) && line.ends_with(&format!("`{}` |", group.file)));
        let row = row.unwrap_or_else(|| panic!("no row {number} for {}", group.file));
        let max = thousands(group.samples[0].max);
        assert!(row.contains(&format!("| {max} |")), "{}: the limit is {max}: {row}", group.file);
    }
}

#[test]
fn every_vector_file_is_named() {
    let page = page();
    for group in samples::all() {
        assert!(page.contains(&format!("`{}`", group.file)), "{} is not named", group.file);
    }
}

#[test]
fn every_refusal_stands_at_its_place() {
    let page = page();
    for (number, code) in RefusalCode::ALL.iter().enumerate() {
        let row = format!("| {number} | `{code}` |");
        assert!(page.contains(&row), "'{row}' is missing");
    }
}
