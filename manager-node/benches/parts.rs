//! Parts of the manager's work, each through the manager's own services and durable: publishing beside the primitives
//! that it cannot do without, a batch of receipts, a posting in the ledger, a purchase.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::large_futures
)]

extern crate willcall_manager_node as manager_node;

mod market;

use std::cell::Cell;
use std::hint::black_box;
use std::io::Write;
use std::time::{Duration, Instant};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use manager_node::{PublishProgress, PublishRequest};
use market::Market;
use protocol::receipt::ReceiptBatch;
use serde_json::json;
use tokio::runtime::Runtime;
use tokio::sync::watch;

const MIB: usize = 1 << 20;
const GOODS: usize = 64 * MIB;

fn start(seeders: usize) -> (Runtime, Market) {
    let runtime = Runtime::new().unwrap();
    let market = runtime.block_on(Market::open(seeders));
    (runtime, market)
}

/// Packing, encrypting, hashing and storing a file, and beside it one thread's BLAKE3 and AES-256-GCM over the same
/// bytes and a copy of the file with `fsync`: the sum of the three is what a publication is held against.
fn publish(c: &mut Criterion) {
    let (runtime, market) = start(0);
    let mut group = c.benchmark_group("publish 64 MiB");
    group.throughput(Throughput::Bytes(GOODS as u64)).sample_size(10).sampling_mode(SamplingMode::Flat);
    let path = market.dir.path().join("large.bin");
    let mut bytes = vec![0; GOODS];
    rand::Rng::fill_bytes(&mut rand::rng(), &mut bytes);
    std::fs::write(&path, &bytes).unwrap();
    group.bench_function("publish", |b| {
        b.iter(|| {
            let request = PublishRequest::new(&path, "Large", "9.99");
            let done = market.running.publish(request, watch::Sender::new(PublishProgress::default()));
            runtime.block_on(done).unwrap()
        });
    });
    group.bench_function("BLAKE3 alone", |b| b.iter(|| blake3::hash(black_box(&bytes))));
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[3; 32]).unwrap());
    let mut frame = bytes[..MIB].to_vec();
    group.bench_function("AES-256-GCM alone", |b| {
        b.iter(|| {
            for _ in 0..GOODS / MIB {
                let nonce = Nonce::assume_unique_for_key([0; 12]);
                let _tag = black_box(key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut frame).unwrap());
            }
        });
    });
    let copy = market.dir.path().join("copy.bin");
    group.bench_function("copy with fsync alone", |b| {
        b.iter(|| {
            let bytes = std::fs::read(&path).unwrap();
            let mut file = std::fs::File::create(&copy).unwrap();
            file.write_all(&bytes).unwrap();
            file.sync_all().unwrap();
        });
    });
    group.finish();
    runtime.block_on(market.close());
}

/// A full batch of receipts of deliveries under way: verified, counted, on disk, marked. One batch at a time pays for
/// the whole disk flush alone; `benches/receipts.rs` is about many.
fn receipts(c: &mut Criterion) {
    let (runtime, market) = start(2);
    let mut outbox = market.outbox(0);
    let mut group = c.benchmark_group("receipts ingestion");
    group.throughput(Throughput::Elements(ReceiptBatch::MAX_RECEIPTS as u64)).sample_size(20);
    let order = Cell::new(0);
    group.bench_function("a batch of 64, durable", |b| {
        b.iter_custom(|rounds| {
            let mut took = Duration::ZERO;
            for _ in 0..rounds {
                let receipts = (0..ReceiptBatch::MAX_RECEIPTS).map(|_| {
                    order.set(order.get() + 1);
                    let (id, _) = runtime.block_on(market.buy(&format!("r{}", order.get())));
                    market.receipt(id, 0, 2)
                });
                let batch = outbox.batch(receipts.collect());
                let start = Instant::now();
                runtime.block_on(market.send(market.seeders[0].peer_id(), batch));
                took += start.elapsed();
            }
            took
        });
    });
    group.finish();
    runtime.block_on(market.close());
}

/// A posting of its own, as `willcall manager record-payment` makes it: two entries, balances, and the disk flush.
fn ledger(c: &mut Criterion) {
    let (runtime, market) = start(0);
    let merchant = market.merchant.peer_id();
    let number = Cell::new(0);
    let mut group = c.benchmark_group("ledger");
    group.sample_size(50);
    group.bench_function("a payment posted, durable", |b| {
        b.iter(|| {
            number.set(number.get() + 1);
            let request = json!({
                "cmd": "record-payment", "account": "merchant-due", "party": merchant, "minor": 1,
                "currency": "USD", "reference": format!("p{}", number.get()),
            });
            runtime.block_on(market.running.control(request)).unwrap()
        });
    });
    group.bench_function("the trial balance and a page of postings", |b| {
        b.iter(|| runtime.block_on(market.running.control(json!({"cmd": "ledger", "limit": 100}))).unwrap());
    });
    group.finish();
    runtime.block_on(market.close());
}

/// One purchase alone, from reservation to ticket: two disk flushes. `benches/purchases.rs` is about 64 at once.
fn purchase(c: &mut Criterion) {
    let (runtime, market) = start(8);
    let number = Cell::new(0);
    let mut group = c.benchmark_group("sales");
    group.sample_size(50);
    group.bench_function("one purchase, durable", |b| {
        b.iter(|| {
            number.set(number.get() + 1);
            runtime.block_on(market.buy(&format!("o{}", number.get())))
        });
    });
    group.finish();
    runtime.block_on(market.close());
}

criterion_group!(benches, publish, receipts, ledger, purchase);
criterion_main!(benches);
