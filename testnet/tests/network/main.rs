//! The roles together, seen from outside: what each step of a sale leaves behind, what the invariants forbid, and what
//! happens when anybody goes away at a bad moment.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "tests fail by panicking, and print what they counted"
)]

extern crate willcall_testnet as testnet;

mod absence;
mod audits;
mod devices;
mod fair_exchange;
mod invariants;
mod leases;
mod outage;
mod placement;
mod restores;
mod silence;
mod sources;
mod steps;
mod trust;

use std::path::Path;

use client_node::{FetchOutcome, Target};
use protocol::ticket::TicketEnvelope;
use protocol::{PeerId, TransactionId};
use serde_json::Value;
use testnet::{Goods, Network};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Logs of a test that is looked into: `WILLCALL_TEST_LOG=debug`.
fn show_logs() {
    if let Ok(filter) = std::env::var("WILLCALL_TEST_LOG") {
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    }
}

fn by_ticket(ticket: &TicketEnvelope) -> Target {
    Target::Envelope(Box::new(ticket.clone()))
}

fn assert_same(goods: &Goods, path: &Path) {
    assert!(testnet::identical(&goods.path, path).unwrap(), "{} differs", path.display());
}

/// The seeders' lines of the paid delivery of a transaction.
fn paid_lines(transaction: &Value) -> Vec<Value> {
    transaction["deliveries"][0]["seeders"].as_array().unwrap().clone()
}

/// Every chunk that the client says to have got from a seeder is counted for that seeder, once. Of the seeders `killed`
/// during the delivery some chunks may be missing: what they had sent and nobody had acknowledged, a window at most.
async fn assert_counted(
    network: &Network,
    id: TransactionId,
    outcome: &FetchOutcome,
    chunks: u32,
    killed: &[PeerId],
) -> Value {
    let settled = network.until_state(id, "settled").await.unwrap();
    let lines = paid_lines(&settled);
    let counted: u64 = lines.iter().map(|line| line["chunks"].as_u64().unwrap()).sum();
    let twice = outcome.duplicate_bytes.div_ceil(64 * KIB);
    assert!(counted <= u64::from(chunks) + twice, "{counted} of {chunks} chunks are counted: {settled}");
    for source in outcome.sources.iter().filter(|source| source.chunks > 0 && !killed.contains(&source.peer)) {
        let line = lines.iter().find(|line| line["seeder"] == source.peer.to_string());
        let line = line.unwrap_or_else(|| panic!("{} is not counted: {settled}", source.peer));
        // A chunk that came twice is acknowledged to both.
        assert!(line["chunks"].as_u64().unwrap() >= u64::from(source.chunks), "{line} {source:?}");
    }
    if killed.is_empty() {
        assert_eq!(settled["deliveries"][0]["whole"], true, "{settled}");
    }
    network.books().await.unwrap();
    settled
}
