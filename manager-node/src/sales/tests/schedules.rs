//! Random schedules over the manager's whole book: purchases, receipts honest and hostile, completions, refunds,
//! revocations, payments, time and crashes, in any order and again. After every step the books have to hold.
#![allow(clippy::print_stdout, clippy::large_futures, reason = "prints what it counted; the thread of a test has room")]

use std::collections::BTreeMap;
use std::sync::Mutex;

use proptest::prelude::*;
use protocol::api::{SalesRequest, TransactionState};
use protocol::manifest::KeyPolicy;
use protocol::receipt::{DeliveryId, Receipt, SealedBatch};
use protocol::settling::PARTS_PER_MICRO;
use protocol::{ChunkSet, Digest, PeerId, Signed, TransactionId};
use serde_json::{Value, json};

use super::shop::{Outbox, Shop, Terms, random_key};
use crate::context::now_ms;
use crate::transactions::{PAID_DELIVERY, chore};

const PARTS_PER_MINOR: u128 = PARTS_PER_MICRO * 1_000_000;
const SEEDERS: usize = 3;

/// What is wrong with a receipt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    Nothing,
    /// A stranger signed it.
    Signer,
    /// It was given to another seeder.
    Seeder,
    /// It is about another content.
    Manifest,
    /// … another delivery than was leased.
    Delivery,
    /// … a transaction that never was.
    Transaction,
    /// It names chunks past the end.
    Chunks,
    /// A stranger signed the completion.
    Completion,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Order `n` is bought, or bought again.
    Buy(u8),
    /// A seeder hands in what the client signed to it, in parts of 256 of the content.
    Receipt {
        sale: u8,
        seeder: u8,
        from: u8,
        to: u8,
        completes: bool,
        lie: Lie,
    },
    /// An earlier batch comes again.
    Again(u8),
    /// The client completes, at the manager itself.
    Complete(u8),
    Refund(u8),
    /// The operator revokes it.
    Revoke(u8),
    /// Everything that is ever due is due.
    Time,
    /// A seeder is paid out so much.
    Pay(u8, u16),
    /// The manager dies and is started again.
    Crash,
}

fn lie() -> impl Strategy<Value = Lie> {
    use Lie::*;
    prop_oneof![
        6 => Just(Nothing),
        4 => prop::sample::select(vec![Signer, Seeder, Manifest, Delivery, Transaction, Chunks, Completion]),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let receipt = (0u8..5, 0u8..3, any::<u8>(), any::<u8>(), any::<bool>(), lie()).prop_map(
        |(sale, seeder, a, b, completes, lie)| Step::Receipt {
            sale,
            seeder,
            from: a.min(b),
            to: a.max(b),
            completes,
            lie,
        },
    );
    prop_oneof![
        6 => (0u8..5).prop_map(Step::Buy),
        12 => receipt,
        3 => any::<u8>().prop_map(Step::Again),
        2 => (0u8..5).prop_map(Step::Complete),
        2 => (0u8..5).prop_map(Step::Refund),
        1 => (0u8..5).prop_map(Step::Revoke),
        1 => Just(Step::Time),
        2 => (0u8..3, 1u16..2000).prop_map(|(seeder, minor)| Step::Pay(seeder, minor)),
        1 => Just(Step::Crash),
    ]
}

fn terms() -> impl Strategy<Value = (KeyPolicy, u64, u32)> {
    (
        prop::sample::select(vec![KeyPolicy::AtRelease, KeyPolicy::OnCompletion]),
        prop::sample::select(vec![1000u64, 10_000_000, 1_000_000_000]),
        // 640 KiB, and 64 MiB, of which so much can be claimed too often that the sale is revoked.
        prop::sample::select(vec![10u32, 1024]),
    )
}

/// What was done over all schedules.
#[derive(Default)]
struct Tally {
    schedules: u32,
    steps: u32,
    receipts: u32,
    hostile: u32,
    crashes: u32,
    postings: usize,
}

static TALLY: Mutex<Tally> =
    Mutex::new(Tally { schedules: 0, steps: 0, receipts: 0, hostile: 0, crashes: 0, postings: 0 });

/// A schedule under way.
struct Run {
    shop: Shop,
    chunks: u32,
    sales: BTreeMap<u8, TransactionId>,
    outboxes: Vec<Outbox>,
    sent: Vec<(PeerId, Signed<SealedBatch>)>,
    /// Steps that were done and must change nothing when they are done again.
    done: Vec<Step>,
    /// Paid out to each seeder, minor units.
    paid: [i64; SEEDERS],
    payments: u32,
}

impl Run {
    async fn new((policy, rate, chunks): (KeyPolicy, u64, u32)) -> Run {
        let shop = Shop::open(Terms { policy, rate, chunks, ..Terms::default() }).await;
        let outboxes = (0..SEEDERS).map(|n| Outbox::of(&shop, n)).collect();
        let (sales, sent, done) = Default::default();
        Run { shop, chunks, sales, outboxes, sent, done, paid: [0; SEEDERS], payments: 0 }
    }

    async fn step(mut self, step: Step) -> Run {
        let sale = |n: &u8| self.sales.get(n).copied();
        let done = match step {
            Step::Buy(n) => self.buy(n).await,
            Step::Receipt { .. } => self.receipt(step).await,
            Step::Again(n) => {
                let batch = self.sent.get(usize::from(n) % self.sent.len().max(1)).cloned();
                if let Some((peer, batch)) = batch {
                    crate::receipts::accept_batch(&self.shop.ctx, peer, batch).await.unwrap();
                }
                false
            }
            Step::Complete(n) => match sale(&n) {
                Some(id) => self.shop.complete(id).await.is_ok(),
                None => false,
            },
            Step::Refund(n) => match sale(&n) {
                Some(transaction) => self.shop.sales(SalesRequest::Refund { transaction }).await.is_ok(),
                None => false,
            },
            Step::Revoke(n) => match sale(&n) {
                Some(id) => self.shop.control(json!({"cmd": "revoke-transaction", "id": id})).await.is_ok(),
                None => false,
            },
            Step::Time => {
                chore::step(&self.shop.ctx, now_ms() + 365 * 86_400_000).await.unwrap();
                false
            }
            Step::Pay(n, minor) => {
                self.pay(usize::from(n), minor).await;
                false
            }
            Step::Crash => {
                self.shop = self.shop.crash().await;
                false
            }
        };
        if done {
            self.done.push(step);
        }
        self
    }

    async fn buy(&mut self, n: u8) -> bool {
        let order = format!("order {n}");
        let data = self.shop.reserve(&order).await;
        let transaction = data.peek().unwrap().transaction;
        assert_eq!(*self.sales.entry(n).or_insert(transaction), transaction, "one order, one sale");
        let endorsement = self.shop.endorse(&data, &order);
        self.shop.sales(SalesRequest::Release { transaction, endorsement }).await.is_ok()
    }

    async fn receipt(&mut self, step: Step) -> bool {
        let Step::Receipt { sale, seeder, from, to, completes, lie } = step else { return false };
        let unknown = TransactionId::from_bytes([9; 16]);
        let transaction = self.sales.get(&sale).copied().unwrap_or(unknown);
        let part = |n: u32| n * self.chunks / 256;
        let (mut chunks, by) = (part(from.into())..part(u32::from(to) + 1), usize::from(seeder));
        if chunks.is_empty() {
            chunks = 0..1;
        }
        let mut receipt = self.shop.receipt(transaction, by, chunks);
        let mut delivery = DeliveryId { transaction, delivery: PAID_DELIVERY };
        let mut ack = receipt.ack.peek().unwrap();
        let mut signer = self.shop.client.clone();
        match lie {
            Lie::Nothing | Lie::Completion => {}
            Lie::Signer => signer = random_key(),
            Lie::Seeder => ack.seeder = self.shop.seeders[(by + 1) % SEEDERS].peer_id(),
            Lie::Manifest => ack.manifest = Digest::from_bytes([3; 32]),
            Lie::Delivery => delivery.delivery = 7,
            Lie::Transaction => delivery.transaction = unknown,
            Lie::Chunks => ack.chunks = ChunkSet::from_range(0..self.chunks + 1),
        }
        ack.delivery = delivery;
        receipt.ack = Signed::sign(&ack, &signer);
        if completes || lie == Lie::Completion {
            let completion = self.shop.completion(delivery);
            let forged = Signed::sign(&completion.peek().unwrap(), &random_key());
            receipt.completion = Some(if lie == Lie::Completion { forged } else { completion });
        }
        self.hand_in(by, receipt).await;
        let mut tally = TALLY.lock().unwrap();
        tally.receipts += 1;
        tally.hostile += u32::from(lie != Lie::Nothing);
        false
    }

    async fn hand_in(&mut self, by: usize, receipt: Receipt) {
        let outbox = &mut self.outboxes[by];
        let (peer, batch) = (outbox.key.peer_id(), outbox.batch(vec![receipt]));
        crate::receipts::accept_batch(&self.shop.ctx, peer, batch.clone()).await.unwrap();
        self.sent.push((peer, batch));
    }

    async fn pay(&mut self, n: usize, minor: u16) {
        self.payments += 1;
        let request = json!({
            "cmd": "record-payment", "account": "seeder", "party": self.shop.seeders[n].peer_id(), "minor": minor,
            "currency": "USD", "reference": format!("payment {}", self.payments),
        });
        if self.shop.control(request.clone()).await.is_ok() {
            self.paid[n] += i64::from(minor);
        }
        // The same reference again is refused, whether the first went through or not.
        let again = self.shop.control(request).await.unwrap_err();
        assert!(["idempotency-conflict", "limit-reached"].contains(&again.as_str()), "{again}");
    }

    async fn ledger(&self) -> Value {
        self.shop.control(json!({"cmd": "ledger", "limit": 1000})).await.unwrap()
    }

    async fn check(&self) {
        let ledger = self.ledger().await;
        let minor = |value: &Value| value["minor"].as_i64().unwrap();
        for trial in ledger["trial_balance"].as_array().unwrap() {
            assert_eq!(trial["balanced"], true, "{ledger}");
        }
        for posting in ledger["postings"].as_array().unwrap() {
            assert_eq!(posting["entries"].as_array().unwrap().iter().map(minor).sum::<i64>(), 0, "{posting}");
        }
        let accounts: BTreeMap<&str, i64> =
            ledger["accounts"].as_array().unwrap().iter().map(|a| (a["account"].as_str().unwrap(), minor(a))).collect();
        assert_eq!(accounts.values().sum::<i64>(), 0, "{ledger}");
        let owed = |account: &str| -accounts.get(account).copied().unwrap_or(0);

        let (mut charged, mut set_aside, mut held, mut earned) = (0, 0, 0, [0u128; SEEDERS]);
        let (mut due, mut merchants, mut bound) = (0, 0, 0);
        for id in self.sales.values() {
            let (sale, delivery) = (self.shop.sale(*id), self.shop.delivery(*id, PAID_DELIVERY));
            let Some((release, delivery)) = sale.release.zip(delivery) else { continue };
            // What was set aside for a delivery is there until it is closed, and gone afterwards.
            let open = release.captured && delivery.closed.is_none();
            let escrow = i64::try_from(release.split.escrow).unwrap();
            held += if open { escrow } else { 0 };
            bound += if delivery.closed.is_none() { escrow } else { 0 };
            // What the merchant owes and has: all of a sale until it is refunded; then what is set aside, or was spent.
            let spent = delivery.closed.as_ref().map_or(0, |closed| i64::try_from(closed.charged).unwrap());
            match (sale.state, release.captured) {
                (TransactionState::Refunded, true) if open => due += escrow,
                (TransactionState::Refunded, true) | (_, false) => due += spent,
                (_, true) => {
                    due += i64::try_from(release.split.price.minor).unwrap();
                    merchants += i64::try_from(release.split.merchant).unwrap() + if open { 0 } else { escrow - spent };
                }
            }
            let Some(closed) = delivery.closed else { continue };
            let parts: u128 = closed.lines.iter().map(|line| line.parts).sum();
            assert!(parts <= u128::from(delivery.ceiling) * PARTS_PER_MICRO, "over the ceiling: {closed:?}");
            let bytes: u64 = closed.lines.iter().map(|line| line.bytes).sum();
            assert!(bytes <= delivery.layout.length, "bytes paid twice: {closed:?}");
            assert!(closed.charged <= release.split.escrow);
            charged += i64::try_from(closed.charged).unwrap();
            set_aside += escrow;
            for line in &closed.lines {
                let of = self.shop.seeders.iter().position(|key| key.peer_id() == line.seeder).unwrap();
                earned[of] += line.parts;
            }
        }
        assert_eq!(owed("escrow"), held, "{ledger}");
        let merchant = self.shop.merchant.peer_id();
        assert_eq!(owed(&format!("merchant-due:{merchant}")), -due, "{ledger}");
        assert_eq!(owed(&format!("merchant-earned:{merchant}")), merchants, "{ledger}");
        let asked = json!({"cmd": "credit", "merchant": merchant, "currency": "USD"});
        let credit = self.shop.control(asked).await.unwrap();
        assert_eq!((&credit["open"], &credit["owed"]), (&json!(bound), &json!(charged)), "{ledger}");
        // Each seeder has what it earned, to the minor unit, and all of them no more than was set aside for them.
        let credited: Vec<i64> =
            (0..SEEDERS).map(|n| owed(&format!("seeder:{}", self.shop.seeders[n].peer_id())) + self.paid[n]).collect();
        let whole = earned.map(|parts| i64::try_from(parts / PARTS_PER_MINOR).unwrap());
        assert_eq!(credited, whole, "{ledger}");
        assert_eq!(credited.iter().sum::<i64>() + owed("seeder-pot"), charged, "{ledger}");
        assert!(charged <= set_aside, "{ledger}");
    }

    /// A year later nothing waits any more, and nothing is set aside.
    async fn end(mut self) -> Run {
        self = self.step(Step::Time).await;
        self.check().await;
        let ledger = self.ledger().await;
        assert!(ledger["accounts"].as_array().unwrap().iter().all(|a| a["account"] != "escrow"), "{ledger}");
        self
    }

    /// Everything again, as after a crash that lost every answer: nothing moves.
    async fn replay(mut self) -> Run {
        self = self.step(Step::Crash).await;
        let before = self.ledger().await;
        for (peer, batch) in self.sent.clone() {
            crate::receipts::accept_batch(&self.shop.ctx, peer, batch).await.unwrap();
        }
        for step in self.done.clone() {
            self = self.step(step).await;
        }
        assert_eq!(self.ledger().await, before);
        self
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_book_holds_after_every_step_of_any_schedule(terms in terms(), steps in prop::collection::vec(step(), 10..50)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let mut run = Run::new(terms).await;
            for &step in &steps {
                run = Box::pin(run.step(step)).await;
                run.check().await;
            }
            run = Box::pin(run.replay()).await;
            run.check().await;
            run = Box::pin(run.end()).await;
            let postings = run.ledger().await["postings"].as_array().unwrap().len();
            run.shop.close().await;
            let mut tally = TALLY.lock().unwrap();
            tally.schedules += 1;
            tally.steps += u32::try_from(steps.len()).unwrap();
            tally.crashes += 1 + u32::try_from(steps.iter().filter(|s| matches!(s, Step::Crash)).count()).unwrap();
            tally.postings += postings;
            println!(
                "{} schedules, {} steps, {} receipts ({} hostile), {} crashes, {} postings",
                tally.schedules, tally.steps, tally.receipts, tally.hostile, tally.crashes, tally.postings
            );
        });
    }
}
