//! How a manager's store grows with what was ever sold: fills one with settled transactions through the manager's own
//! services (every signature is made and verified; nothing is written behind its back), and at each of the given sizes
//! measures the files, a purchase, a restart and the memory. One JSON object a size, on standard output.
//!
//!     cargo run --release -p willcall-manager-node --example growth -- 1000 100000 1000000
//!     … growth -- --keep-all 1000 100000       # nothing moves into segments, for comparison
//!     … growth -- --seeders 10 50 200          # what a seeder costs the manager, by the number of seeders
//!
//! `WILLCALL_GROWTH_DIR` names the folder to fill (default: a temporary one). A transaction counts as over at once: the
//! chores are run as if a hundred days had passed, so that what is left in the store is what stays for good.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::large_futures,
    reason = "a measurement that fails is to stop"
)]

extern crate willcall_manager_node as manager_node;

#[path = "../benches/market/mod.rs"]
mod market;

use std::path::Path;
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt};
use manager_node::Config;
use market::{Market, Outbox, median, now_ms};
use protocol::TransactionId;
use protocol::receipt::ReceiptBatch;
use serde_json::{Value, json};

const SEEDERS: usize = 8;
/// Transactions between two runs of the chores: a few thousand, as between two looks of a busy manager.
const ROUND: usize = 4096;
const IN_FLIGHT: usize = 64;
/// Purchases that are timed at each size.
const TIMED: usize = 1024;
const DAY: u64 = 86_400_000;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(run());
}

struct Fill {
    market: Market,
    outboxes: Vec<Outbox>,
    /// Transactions so far.
    done: usize,
    /// What the chores take for now.
    clock: u64,
    moves: bool,
}

impl Fill {
    /// Sells, delivers and settles until there are `size` transactions.
    async fn to(&mut self, size: usize) {
        while self.done < size {
            let round = ROUND.min(size - self.done);
            let orders = stream::iter(self.done..self.done + round).map(|n| {
                let market = &self.market;
                async move { market.buy(&format!("order-{n:09}")).await.0 }
            });
            let sales: Vec<TransactionId> = orders.buffer_unordered(IN_FLIGHT).collect().await;
            let mut sending = Vec::new();
            for (n, (outbox, part)) in self.outboxes.iter_mut().zip(sales.chunks(round.div_ceil(SEEDERS))).enumerate() {
                let whole = |id: &TransactionId| self.market.receipt_of_all(*id, n);
                let batches: Vec<_> = part
                    .chunks(ReceiptBatch::MAX_RECEIPTS)
                    .map(|ids| outbox.batch(ids.iter().map(whole).collect()))
                    .collect();
                let (market, seeder) = (&self.market, outbox.key.peer_id());
                sending.push(async move {
                    for batch in batches {
                        market.send(seeder, batch).await;
                    }
                });
            }
            futures::future::join_all(sending).await;
            self.done += round;
            if self.moves {
                self.clock += 100 * DAY;
                self.market.running.run_due(self.clock).await.unwrap();
            }
            for n in 0..SEEDERS {
                self.market.report(n).await;
            }
        }
    }

    /// Measures at this size; gives the market back from a restart.
    async fn measure(mut self) -> (Fill, Value) {
        let (start, before) = (Instant::now(), self.done);
        let timed = stream::iter(0..TIMED).map(|n| {
            let market = &self.market;
            async move {
                let start = Instant::now();
                market.buy(&format!("timed-{before}-{n}")).await;
                start.elapsed().as_secs_f64() * 1000.0
            }
        });
        let latencies: Vec<f64> = timed.buffer_unordered(IN_FLIGHT).collect().await;
        let rate = TIMED as f64 / start.elapsed().as_secs_f64();
        let listed = self.market.running.control(json!({"cmd": "transactions", "limit": 1, "state": "settled"}));
        let id = listed.await.unwrap()["transactions"][0]["id"].clone();
        let start = Instant::now();
        let path = self.market.dir.path().join(format!("evidence-{before}"));
        self.market.running.control(json!({"cmd": "evidence", "id": id, "path": path})).await.unwrap();
        let evidence_ms = start.elapsed().as_secs_f64() * 1000.0;

        let Market { running, merchant, client, seeders, product, manifest, network, sealed_to, dir } = self.market;
        let manager = dir.path().join("manager");
        running.stop(Duration::from_secs(60)).await.unwrap();
        let start = Instant::now();
        let running = manager_node::start(&manager, Config::load(&manager).unwrap()).await.unwrap();
        let restart_ms = start.elapsed().as_secs_f64() * 1000.0;
        let archive = running.control(json!({"cmd": "archive"})).await.unwrap();
        let value = json!({
            "transactions": self.done, "moved_out": archive["transactions"],
            "store_bytes": std::fs::metadata(manager.join("manager.redb")).unwrap().len(),
            "segment_bytes": folder_bytes(&manager.join("segments")),
            "purchases_per_s": rate, "purchase_ms_median": median(latencies), "evidence_ms": evidence_ms,
            "restart_ms": restart_ms, "rss_mib": rss_mib(), "archive": self.moves,
        });
        self.market = Market { running, merchant, client, seeders, product, manifest, network, sealed_to, dir };
        for n in 0..SEEDERS {
            self.market.report(n).await;
        }
        (self, value)
    }
}

fn folder_bytes(folder: &Path) -> u64 {
    std::fs::read_dir(folder).map_or(0, |entries| entries.map(|entry| entry.unwrap().metadata().unwrap().len()).sum())
}

/// Memory of this process now, the generator's own few MiB included.
fn rss_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// What a seeder's report costs and what a purchase costs, when so many seeders hold the product.
async fn with_seeders(count: usize) -> Value {
    let market = Market::open(count).await;
    let rounds = 2000_usize.div_ceil(count);
    let start = Instant::now();
    for _ in 0..rounds {
        let reports = stream::iter(0..count).map(|n| market.report(n));
        reports.buffer_unordered(IN_FLIGHT).collect::<Vec<()>>().await;
    }
    let report_ms = start.elapsed().as_secs_f64() * 1000.0 / (rounds * count) as f64;
    let start = Instant::now();
    let buying = stream::iter(0..TIMED).map(|n| {
        let market = &market;
        async move { market.buy(&format!("order-{n}")).await.1 }
    });
    let tickets: Vec<_> = buying.buffer_unordered(IN_FLIGHT).collect().await;
    let purchases_per_s = TIMED as f64 / start.elapsed().as_secs_f64();
    let sources = tickets[0].ticket.lease.peek().unwrap().sources.len();
    market.close().await;
    json!({"seeders": count, "report_ms": report_ms, "purchases_per_s": purchases_per_s, "sources": sources})
}

async fn run() {
    let mut sizes: Vec<usize> = Vec::new();
    let (mut moves, mut seeders) = (true, false);
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--keep-all" => moves = false,
            "--seeders" => seeders = true,
            size => sizes.push(size.parse().expect("sizes are numbers")),
        }
    }
    if seeders {
        for count in sizes {
            println!("{}", with_seeders(count).await);
        }
        return;
    }
    let dir = match std::env::var_os("WILLCALL_GROWTH_DIR") {
        Some(dir) => tempfile::tempdir_in(dir).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    let market = Market::open_in(dir, SEEDERS).await;
    let outboxes = (0..SEEDERS).map(|n| market.outbox(n)).collect();
    let mut fill = Fill { market, outboxes, done: 0, clock: now_ms(), moves };
    for size in sizes {
        let start = Instant::now();
        fill.to(size).await;
        eprintln!("{size} transactions after {:.0} s more", start.elapsed().as_secs_f64());
        let (next, value) = fill.measure().await;
        println!("{value}");
        fill = next;
    }
    fill.market.close().await;
}
