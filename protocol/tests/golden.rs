//! The byte form of everything that two nodes exchange or a signature covers, held fast: a node of last year must read
//! what a node of this year writes, so these bytes change only on purpose.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use std::fmt::Write as _;
use std::path::PathBuf;

use data_encoding::HEXLOWER;
use world::samples;

const WHAT_TO_DO: &str = "If the change is intended: it breaks every node and every signature out there, so raise the \
    type's `Wire::VERSION` (or append a variant instead of changing one), then run\n\n    \
    WILLCALL_WRITE_VECTORS=1 cargo test -p willcall-protocol --test golden\n\nand commit protocol/tests/vectors with \
    the change and its reason. If it is not intended, a field, its order or its type was changed by accident.";

fn vector_file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(format!("{name}.hex"))
}

#[test]
fn every_document_and_message_has_the_bytes_it_always_had() {
    let write = std::env::var_os("WILLCALL_WRITE_VECTORS").is_some();
    for group in samples::all() {
        let mut text = String::new();
        for sample in &group.samples {
            writeln!(text, "{} {}", sample.name, HEXLOWER.encode(&sample.bytes)).unwrap();
        }
        let path = vector_file(group.file);
        if write {
            std::fs::write(&path, &text).unwrap();
            continue;
        }
        let golden = std::fs::read_to_string(&path)
            .unwrap_or_else(|e| panic!("{}: {e}\n\nA new document or message? {WHAT_TO_DO}", path.display()));
        for (expected, found) in golden.lines().zip(text.lines()) {
            let name = expected.split(' ').next().unwrap_or_default();
            assert!(expected == found, "{}: '{name}' has other bytes.\n\n{WHAT_TO_DO}\n\nnow: {found}", path.display());
        }
        assert_eq!(golden.lines().count(), text.lines().count(), "{}: {WHAT_TO_DO}", path.display());
    }
}

#[test]
fn golden_bytes_decode_to_the_same_bytes() {
    for group in samples::all() {
        for sample in group.samples {
            assert!(sample.bytes.len() <= sample.max, "{}/{}", group.file, sample.name);
            assert_eq!((sample.again)(&sample.bytes).unwrap(), sample.bytes, "{}/{}", group.file, sample.name);
        }
    }
}

#[test]
fn no_vector_file_is_left_over() {
    let known: Vec<PathBuf> = samples::all().iter().map(|g| vector_file(g.file)).collect();
    for entry in std::fs::read_dir(vector_file("x").parent().unwrap()).unwrap() {
        let path = entry.unwrap().path();
        assert!(known.contains(&path), "{} belongs to no document or message", path.display());
    }
}
