//! Purchases per second at the manager, reserved and released, each durable before it is answered, 64 in flight; beside
//! them, in the same run and with the same tasks in flight, the signatures and verifications that a purchase cannot do
//! without: the manager signs the transaction data and the lease and verifies the endorsement.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::large_futures
)]

extern crate willcall_manager_node as manager_node;

mod market;

use std::time::Instant;

use futures::stream::{self, StreamExt};
use market::{Market, median, random_key};
use protocol::api::Reserve;
use protocol::ticket::{Endorsement, Lease, TransactionData};
use protocol::{Keypair, Signed};

const IN_FLIGHT: usize = 64;
const PURCHASES: usize = 2048;
const ROUNDS: usize = 5;

/// Seconds that `PURCHASES` of this work take, `IN_FLIGHT` at a time.
async fn timed<I: Send, F: Future<Output = T>, T>(items: Vec<I>, work: impl Fn(I) -> F) -> (f64, Vec<T>) {
    let start = Instant::now();
    let done = stream::iter(items).map(work).buffer_unordered(IN_FLIGHT).collect().await;
    (start.elapsed().as_secs_f64(), done)
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(run());
}

async fn run() {
    let market = Market::open(8).await;
    // Documents of the lengths that a purchase signs.
    let (_, ticket) = market.buy("first").await;
    let signer = random_key();
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        // Each purchase is for another client, as on a launch day.
        let orders: Vec<Reserve> =
            (0..PURCHASES).map(|n| market.order(&format!("{round}-{n}"), random_key().peer_id())).collect();
        let (reserving, reserved) = timed(orders, |order| async {
            let payment = order.payment;
            (market.reserve(order).await, payment)
        })
        .await;
        // The merchant's work, not the manager's.
        let endorsed: Vec<_> = reserved.iter().map(|(data, payment)| market.endorse(data, *payment)).collect();
        let (releasing, released) = timed(endorsed, |(id, signed)| market.release(id, signed)).await;
        assert_eq!(released.len(), PURCHASES);

        let data = ticket.ticket.data.peek().unwrap();
        let lease = ticket.ticket.lease.peek().unwrap();
        let endorsement = ticket.ticket.endorsement.clone().unwrap();
        let (alone, _) = timed((0..PURCHASES).collect(), |_| {
            let (data, lease, endorsement, signer) = (data.clone(), lease.clone(), endorsement.clone(), signer.clone());
            let merchant = market.merchant.peer_id();
            async move {
                let work = move || signatures(&data, &lease, &endorsement, &signer, &merchant);
                tokio::task::spawn_blocking(work).await.unwrap();
            }
        })
        .await;

        let start = Instant::now();
        for _ in 0..PURCHASES {
            signatures(&data, &lease, &endorsement, &signer, &market.merchant.peer_id());
        }
        let one_thread = start.elapsed().as_secs_f64();

        let rate = |seconds: f64| PURCHASES as f64 / seconds;
        let took = reserving + releasing;
        println!(
            "round {round}: {:.0} purchases/s (reserve {:.0}/s, release {:.0}/s); their signatures alone {:.0}/s on one \
             thread, {:.0}/s in as many tasks",
            rate(took),
            rate(reserving),
            rate(releasing),
            rate(one_thread),
            rate(alone),
        );
        ratios.push((one_thread / took, alone / took));
    }
    let of = |pick: fn(&(f64, f64)) -> f64| median(ratios.iter().map(pick).collect());
    println!(
        "purchases against their signatures and verifications alone, median ratio: {:.2} of one thread's, {:.2} of those \
         of as many tasks on all cores",
        of(|r| r.0),
        of(|r| r.1),
    );
    market.close().await;
}

fn signatures(
    data: &TransactionData,
    lease: &Lease,
    endorsement: &Signed<Endorsement>,
    signer: &Keypair,
    merchant: &protocol::PeerId,
) {
    std::hint::black_box(Signed::sign(data, signer));
    std::hint::black_box(Signed::sign(lease, signer));
    endorsement.verify(merchant).unwrap();
}
