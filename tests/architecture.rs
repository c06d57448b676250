//! Holds ARCHITECTURE.md to its word: which crate may depend on which, who may import libp2p, what stays out of
//! `protocol`, and that every file says why it exists.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const CRATES: [&str; 9] =
    ["protocol", "store", "node", "delivery", "manager-node", "merchant-node", "seeder", "client-node", "testnet"];
const ROLES: [&str; 4] = ["manager-node", "merchant-node", "seeder", "client-node"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Names in one dependency table of a crate's manifest.
fn dependencies(krate: &str, table: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join(krate).join("Cargo.toml")).unwrap();
    let manifest: toml::Table = text.parse().unwrap();
    manifest.get(table).and_then(|t| t.as_table()).map(|t| t.keys().cloned().collect()).unwrap_or_default()
}

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                sources(&path, out);
            }
        } else if name.ends_with(".rs") {
            out.push(path);
        }
    }
}

#[test]
fn crates_depend_only_downwards() {
    for krate in CRATES {
        let found: BTreeSet<String> =
            dependencies(krate, "dependencies").into_iter().filter(|d| CRATES.contains(&d.as_str())).collect();
        let allowed: &[&str] = match krate {
            "protocol" => &[],
            "store" | "node" => &["protocol"],
            "delivery" => &["protocol", "node", "store"],
            role if ROLES.contains(&role) => &["protocol", "store", "node", "delivery"],
            _ => &CRATES,
        };
        for dependency in &found {
            assert!(allowed.contains(&dependency.as_str()), "{krate} must not depend on {dependency}");
        }
    }
}

#[test]
fn only_node_imports_libp2p() {
    for krate in CRATES {
        let all: BTreeSet<String> =
            dependencies(krate, "dependencies").union(&dependencies(krate, "dev-dependencies")).cloned().collect();
        let libp2p = all.iter().any(|d| d.starts_with("libp2p"));
        assert_eq!(libp2p, krate == "node", "{krate}");
    }
}

#[test]
fn protocol_does_no_io() {
    const IO: [&str; 12] = [
        "tokio",
        "tokio-util",
        "libp2p",
        "redb",
        "axum",
        "reqwest",
        "rustix",
        "rand",
        "futures",
        "store",
        "node",
        "tracing",
    ];
    let found = dependencies("protocol", "dependencies");
    for name in IO {
        assert!(!found.contains(name), "protocol must not depend on {name}");
    }
    let mut files = Vec::new();
    sources(&root().join("protocol/src"), &mut files);
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for forbidden in ["std::fs", "std::net", "std::thread", "SystemTime", "Instant::now", "rand::rng"] {
            let shipped = text.split("#[cfg(test)]").next().unwrap();
            assert!(!shipped.contains(forbidden), "{} uses {forbidden}", file.display());
        }
    }
}

#[test]
fn clap_and_anyhow_stay_in_the_binary() {
    for krate in CRATES {
        for name in ["clap", "anyhow"] {
            assert!(!dependencies(krate, "dependencies").contains(name), "{krate} must not depend on {name}");
        }
    }
}

#[test]
fn every_file_says_why_it_exists() {
    let mut files = Vec::new();
    sources(root(), &mut files);
    assert!(files.len() > 50, "the sources were not found");
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("//!") || text.starts_with("#!["), "{} must open with //!", file.display());
    }
}
