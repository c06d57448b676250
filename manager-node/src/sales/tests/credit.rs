//! What a merchant may come to owe: whatever it sells, pays and is paid, what the network owes seeders for its deliveries is
//! there in money, but for its limit and what it really paid ahead.

use proptest::prelude::*;
use protocol::{Currency, TransactionId};
use serde_json::Value;

use super::shop::{CHUNKS, Outbox, Shop, Terms};
use super::*;
use crate::ledger::Split;
use crate::transactions::SaleError;

#[derive(Clone, Copy, Debug)]
enum Step {
    Buy,
    /// So many chunks of a sale are acknowledged, and all of it is completed where the client says so.
    Deliver {
        sale: u8,
        chunks: u8,
        completes: bool,
    },
    Refund(u8),
    Revoke(u8),
    /// Everything that is ever due is due.
    Time,
    /// The merchant pays in: so many percent of what is due …
    Pay(u8),
    /// … or that and so much more.
    PayAhead(u8),
    /// Merchant and rights holders are paid what they earned: only while nothing is due.
    PayOut,
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => Just(Step::Buy),
        6 => (any::<u8>(), 1u8..=10, any::<bool>())
            .prop_map(|(sale, chunks, completes)| Step::Deliver { sale, chunks, completes }),
        2 => any::<u8>().prop_map(Step::Refund),
        1 => any::<u8>().prop_map(Step::Revoke),
        1 => Just(Step::Time),
        4 => prop::sample::select(vec![1u8, 50, 99, 100, 100, 100]).prop_map(Step::Pay),
        1 => (1u8..30).prop_map(Step::PayAhead),
        3 => Just(Step::PayOut),
        1 => Just(Step::Crash),
    ]
}

struct Run {
    shop: Shop,
    limit: i64,
    sales: Vec<TransactionId>,
    outbox: Outbox,
    payments: u32,
    /// Minor units that came in and went out.
    cash: i64,
    refused: u32,
}

impl Run {
    async fn new(policy: KeyPolicy, limit: u16) -> Run {
        let config = Config { fee_millionths: 0, credit_limit: limit.into(), ..Terms::default().config };
        let shop = Shop::open(Terms { policy, config, ..Terms::default() }).await;
        let outbox = Outbox::of(&shop, 0);
        let limit = limit.into();
        Run { shop, limit, sales: Vec::new(), outbox, payments: 0, cash: 0, refused: 0 }
    }

    fn sale(&self, n: u8) -> Option<TransactionId> {
        self.sales.get(usize::from(n) % self.sales.len().max(1)).copied()
    }

    async fn credit(&self) -> Value {
        let merchant = self.shop.merchant.peer_id();
        self.shop.control(json!({"cmd": "credit", "merchant": merchant, "currency": "USD"})).await.unwrap()
    }

    /// Books a payment, if it is one.
    async fn book(&mut self, account: &str, party: &str, minor: i64) {
        if minor > 0 {
            self.payments += 1;
            let reference = format!("payment {}", self.payments);
            let request = json!({
                "cmd": "record-payment", "account": account, "party": party, "minor": minor, "currency": "USD",
                "reference": reference,
            });
            self.shop.control(request).await.unwrap();
            self.cash += if account == "merchant-due" { minor } else { -minor };
        }
    }

    async fn step(mut self, step: Step) -> Run {
        let merchant = self.shop.merchant.peer_id().to_string();
        let due = self.credit().await["due"].as_i64().unwrap();
        match step {
            Step::Buy => self.buy().await,
            Step::Deliver { sale, chunks, completes } => {
                let Some(id) = self.sale(sale) else { return self };
                let mut receipt = self.shop.receipt(id, 0, 0..u32::from(chunks).min(CHUNKS));
                if completes {
                    receipt.completion = Some(self.shop.completion(DeliveryId { transaction: id, delivery: 1 }));
                }
                self.outbox.send(&self.shop, vec![receipt]).await;
            }
            Step::Refund(n) => {
                let Some(transaction) = self.sale(n) else { return self };
                // One that was revoked before it was paid for stays so.
                let _ = self.shop.sales(SalesRequest::Refund { transaction }).await;
            }
            Step::Revoke(n) => {
                let Some(id) = self.sale(n) else { return self };
                self.shop.control(json!({"cmd": "revoke-transaction", "id": id})).await.unwrap();
            }
            Step::Time => chore::step(&self.shop.ctx, now_ms() + 365 * 86_400_000).await.unwrap(),
            Step::Pay(percent) => self.book("merchant-due", &merchant, due * i64::from(percent) / 100).await,
            Step::PayAhead(minor) => {
                self.book("merchant-due", &merchant, due.max(0) + i64::from(minor)).await;
            }
            Step::PayOut if due <= 0 => {
                let earned = self.credit().await["earned"].as_i64().unwrap();
                self.book("merchant-earned", &merchant, earned).await;
                let rights = -self.shop.balance("rights-holder:Band").await;
                self.book("rights-holder", "Band", rights).await;
            }
            Step::PayOut => {}
            Step::Crash => self.shop = self.shop.crash().await,
        }
        self
    }

    async fn buy(&mut self) {
        let order = format!("order {}", self.sales.len() + self.refused as usize);
        let before = self.credit().await;
        let data = self.shop.reserve(&order).await;
        let transaction = data.peek().unwrap().transaction;
        let release = SalesRequest::Release { transaction, endorsement: self.shop.endorse(&data, &order) };
        let of = |field: &str| before[field].as_i64().unwrap();
        match self.shop.sales(release).await {
            Ok(_) => {
                self.sales.push(transaction);
                // Nothing is paid ahead that the ledger does not know of, and what is under way of what is due.
                assert!(of("deposit") <= (of("open") + of("owed") - of("due")).max(0), "{before}");
                assert!(of("open") + 7 + of("owed") <= self.limit + of("deposit"), "{before}");
            }
            Err(refusal) => {
                assert_eq!(refusal.code, RefusalCode::LimitReached);
                let used_up = of("open") + 7 + of("owed") > self.limit + of("deposit");
                // Or it would be when some of those under way and this one are completed: each takes its price of 999 less
                // its own 7 of what was paid ahead.
                let (mut others, mut promised) = (0, 0);
                for id in &self.sales {
                    let release = self.shop.sale(*id).release.unwrap();
                    if !release.captured && release.charged.is_none() {
                        (others, promised) = (others + 7, promised + 992);
                    }
                }
                assert_eq!(of("promised"), promised, "{before}");
                let back = (-of("earned")).max(0) + self.shop.balance("rights-holder:Band").await.max(0);
                let stands = (-of("due") - back).max(0) - promised - 992;
                assert!(used_up || others > 0 && others + 7 > self.limit + stands.max(0), "{before}");
                self.refused += 1;
            }
        }
    }

    /// What deliveries cost and may cost yet is there, but for the limit.
    async fn check(&self) {
        let (mut cost, mut open) = (0, 0);
        for id in &self.sales {
            let release = self.shop.sale(*id).release.unwrap();
            match release.charged {
                Some(charged) => cost += i64::try_from(charged).unwrap(),
                None => open += i64::try_from(release.split.escrow).unwrap(),
            }
        }
        let credit = self.credit().await;
        assert_eq!(credit["open"], open, "{credit}");
        // What was paid out of a sale that was refunded later, those who have it owe.
        let earned = credit["earned"].as_i64().unwrap();
        let back = (-earned).max(0) + self.shop.balance("rights-holder:Band").await.max(0);
        let there = self.cash + back + self.limit;
        assert!(cost + open <= there, "{cost} + {open} > {there}: cash {} {credit}", self.cash);
        assert!(credit["owed"] == 0 || credit["deposit"] == 0, "{credit}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_merchant_never_costs_more_than_its_limit_and_what_it_paid_ahead(
        policy in prop::sample::select(vec![KeyPolicy::AtRelease, KeyPolicy::OnCompletion]),
        limit in prop::sample::select(vec![0u16, 7, 20]),
        steps in prop::collection::vec(step(), 10..60),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let mut run = Run::new(policy, limit).await;
            for &step in &steps {
                run = Box::pin(run.step(step)).await;
                run.check().await;
            }
            run.shop.close().await;
        });
    }
}

/// What a rights holder was paid of a sale that was refunded is with the rights holder until the next sale.
#[tokio::test]
async fn what_rights_holders_were_paid_of_a_refunded_sale_pays_for_no_delivery() {
    let complete = |sale| Step::Deliver { sale, chunks: 1, completes: true };
    let mut run = Run::new(KeyPolicy::OnCompletion, 7).await;
    let steps = [Step::Buy, complete(0), Step::Pay(100), Step::PayOut, Step::Refund(0)];
    for step in steps.into_iter().chain([Step::Buy, Step::Buy, complete(1), Step::Buy]) {
        run = Box::pin(run.step(step)).await;
        run.check().await;
    }
    // The refunded sale's delivery and one more: the cost of the first is all that is left of what was paid.
    assert_eq!((run.sales.len(), run.refused), (2, 2));
    assert_eq!(run.shop.balance("rights-holder:Band").await, 0);
    run.shop.close().await;
}

/// The price of a sale that is completed takes what was paid ahead, and is paid out in the end: then nothing of it stands for
/// other deliveries.
#[tokio::test]
async fn what_was_paid_ahead_stands_for_no_delivery_that_a_price_can_take_it_from() {
    let complete = |sale| Step::Deliver { sale, chunks: 1, completes: true };
    let mut run = Run::new(KeyPolicy::OnCompletion, 7).await;
    // Half of the price was paid when the sale was refunded.
    let steps = [Step::Buy, complete(0), Step::Pay(50), Step::Refund(0)].into_iter();
    for step in steps.chain([Step::Buy; 7]).chain([complete(1), Step::Pay(100), Step::PayOut]) {
        run = Box::pin(run.step(step)).await;
        run.check().await;
    }
    // One of two is completed, and the limit is for the other.
    assert_eq!((run.sales.len(), run.refused), (2, 6));
    // Whole prices that were paid ahead are enough for as many sales at once.
    run = Box::pin(run.step(Step::Time)).await;
    run.book("merchant-due", &run.shop.merchant.peer_id().to_string(), 3 * 999).await;
    for _ in 0..4 {
        run = Box::pin(run.step(Step::Buy)).await;
        run.check().await;
    }
    assert!(run.sales.len() >= 5, "{} of {}", run.sales.len(), run.refused);
    run.shop.close().await;
}

/// Where delivery is half of the price, two prices have to be there for two sales: one is paid out, and its delivery is paid
/// for from it, but not the other's.
#[tokio::test]
async fn a_price_takes_no_less_of_what_was_paid_ahead_where_delivery_is_much_of_it() {
    let split = |price| {
        let price = Amount { minor: price, currency: Currency::USD };
        Split { price, rights: Vec::new(), fee: 0, escrow: 7, merchant: 7, rate: 1, ceiling: 7_000_000 }
    };
    let shop = Shop::open(Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() }).await;
    let merchant = shop.merchant.peer_id();
    let pay = |reference: &'static str| {
        shop.control(json!({
            "cmd": "record-payment", "account": "merchant-due", "party": merchant, "minor": 14, "currency": "USD",
            "reference": reference,
        }))
    };
    let expose = |price| {
        shop.ctx.db.write_blocking(move |txn| crate::transactions::expose(txn, &merchant, &split(price), true, 0))
    };
    pay("one").await.unwrap();
    expose(14).unwrap();
    assert!(matches!(expose(14), Err(SaleError::Refused(refusal)) if refusal.code == RefusalCode::LimitReached));
    pay("two").await.unwrap();
    expose(14).unwrap();
    shop.close().await;
}

#[tokio::test]
async fn paying_what_is_due_is_no_deposit_and_a_limit_of_nothing_holds() {
    let shop = Shop::open(Terms::default()).await;
    let merchant = shop.merchant.peer_id();
    let credit = |limit: Option<u64>| {
        shop.control(json!({"cmd": "credit", "merchant": merchant, "currency": "USD", "limit_minor": limit}))
    };
    let pay = |account: &'static str, minor: i64| {
        let reference = format!("{account} {minor}");
        shop.control(json!({
            "cmd": "record-payment", "account": account, "party": merchant, "minor": minor, "currency": "USD",
            "reference": reference,
        }))
    };
    let (mut outbox, mut sold) = (Outbox::of(&shop, 0), Vec::new());
    for n in 0..5 {
        let (id, _) = shop.buy(&n.to_string()).await;
        sold.push(id);
        outbox.send(&shop, vec![shop.receipt(id, 0, 0..CHUNKS)]).await;
    }
    let shown = credit(Some(0)).await.unwrap();
    let of = |shown: &Value, field: &str| shown[field].as_i64().unwrap();
    assert!(of(&shown, "due") == 5 * 999 && of(&shown, "owed") > 0, "{shown}");
    let next = async |order: &str| {
        let data = shop.reserve(order).await;
        let transaction = data.peek().unwrap().transaction;
        shop.sales(SalesRequest::Release { transaction, endorsement: shop.endorse(&data, order) }).await
    };
    assert_eq!(code(next("a").await), "limit-reached");
    pay("merchant-due", of(&shown, "due")).await.unwrap();
    pay("merchant-earned", of(&shown, "earned")).await.unwrap();
    let shown = credit(None).await.unwrap();
    assert_eq!(["due", "earned", "open", "owed", "deposit"].map(|field| of(&shown, field)), [0; 5], "{shown}");
    assert_eq!(code(next("b").await), "limit-reached");
    // A refund makes what was paid for it a payment ahead, less what the merchant was paid of it and owes since.
    shop.sales(SalesRequest::Refund { transaction: sold[0] }).await.unwrap();
    let shown = credit(None).await.unwrap();
    assert!(of(&shown, "earned") < 0, "{shown}");
    assert_eq!(of(&shown, "deposit"), -of(&shown, "due") + of(&shown, "earned"), "{shown}");
    shop.close().await;
}
