//! Accepted receipts per second on one core, durable before they are marked, beside the strict Ed25519 verifications
//! that they cannot do without, in the same run on the same core: one for each receipt's acknowledgement and one for
//! each batch. Four seeders share each delivery, so that one receipt in four also closes and pays one.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    clippy::large_futures
)]

extern crate willcall_manager_node as manager_node;

mod market;

use std::time::Instant;

use futures::stream::{self, StreamExt};
use market::{Market, median};
use protocol::receipt::{ReceiptBatch, SealedBatch};
use protocol::{Signed, TransactionId};

/// They send at the same time.
const SEEDERS: usize = 16;
/// So many of them share a delivery.
const SHARE: u32 = 4;
/// Receipts in a batch.
const BATCH: usize = ReceiptBatch::MAX_RECEIPTS;
/// Deliveries in a round …
const DELIVERIES: usize = 1024;
/// … and those of a group of seeders; a multiple of the batch.
const SHARED: usize = DELIVERIES * SHARE as usize / SEEDERS;
const ROUNDS: usize = 5;

fn main() {
    // Everything on one core: the manager's threads, too, are started after this and inherit it.
    let mut one = rustix::thread::CpuSet::new();
    one.set(0);
    rustix::thread::sched_setaffinity(None, &one).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(run());
}

async fn run() {
    let market = Market::open(SEEDERS).await;
    let mut outboxes: Vec<_> = (0..SEEDERS).map(|n| market.outbox(n)).collect();
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let orders = stream::iter(0..DELIVERIES).map(|n| {
            let market = &market;
            async move { market.buy(&format!("{round}-{n}")).await.0 }
        });
        let sales: Vec<TransactionId> = orders.buffer_unordered(64).collect().await;
        // Made by clients and seeders: not in the time.
        let mut batches: Vec<(usize, Vec<Signed<SealedBatch>>)> = Vec::new();
        for (n, outbox) in outboxes.iter_mut().enumerate() {
            let group = n / SHARE as usize;
            let sales = &sales[group * SHARED..(group + 1) * SHARED];
            let of = |part: &[TransactionId]| part.iter().map(|id| market.receipt(*id, n, SHARE)).collect();
            batches.push((n, sales.chunks(BATCH).map(|part| outbox.batch(of(part))).collect()));
        }
        let receipts = DELIVERIES * SHARE as usize;

        let start = Instant::now();
        let sending = batches.into_iter().map(|(n, batches)| {
            let market = &market;
            async move {
                // A seeder's batches are numbered and come one after the other; seeders come side by side.
                for batch in batches {
                    market.send(market.seeders[n].peer_id(), batch).await;
                }
            }
        });
        futures::future::join_all(sending).await;
        let took = start.elapsed().as_secs_f64();

        let sample = market.receipt(sales[0], 0, SHARE);
        let client = market.client.peer_id();
        let verifications = receipts + receipts / BATCH;
        let start = Instant::now();
        for _ in 0..verifications {
            std::hint::black_box(&sample).ack.verify(&client).unwrap();
        }
        let alone = start.elapsed().as_secs_f64();
        let ratio = alone / took;
        println!(
            "round {round}: {:.0} receipts/s accepted; their verifications alone {:.0}/s; ratio {ratio:.2}",
            receipts as f64 / took,
            receipts as f64 / alone,
        );
        ratios.push(ratio);
    }
    println!("accepted receipts against their strict verifications alone: median ratio {:.2}", median(ratios));
    market.close().await;
}
