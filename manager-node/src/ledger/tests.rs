//! Random schedules of sales, closings, refunds and repeats over the real tables, with the sums checked after each step.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use protocol::settling::{PARTS_PER_MICRO, Payout, Payouts};
use protocol::{Amount, Currency, PeerId, TransactionId};
use store::{Db, WriteTransaction};

use super::payout::{CARRIED, PARTS_PER_MINOR};
use super::*;

const USD: Currency = Currency::USD;

fn peer(n: u8) -> PeerId {
    PeerId::from_bytes([n; 32])
}

fn transaction(n: u8) -> TransactionId {
    TransactionId::from_bytes([n; 16])
}

fn in_one_write<R: Send + 'static>(work: impl Fn(&WriteTransaction<'_>) -> R + Send + 'static) -> R {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(dir.path().join("ledger.redb"), store::Options::new(1)).unwrap();
    db.write_blocking(move |txn| Ok::<_, StoreError>(work(txn))).unwrap()
}

fn split_of(price: u64, rate: u64, content_bytes: u64) -> Split {
    Split::of(&Terms {
        price: Amount { minor: price, currency: USD },
        shares: &[("Band".to_owned(), 300_000), ("Label".to_owned(), 250_001)],
        fee_millionths: 20_000,
        rate,
        content_bytes,
        slack_millionths: 100_000,
    })
}

fn payouts(lines: &[(u8, u128)]) -> Payouts {
    let lines: Vec<Payout> = lines.iter().map(|&(n, parts)| Payout { seeder: peer(n), bytes: 0, parts }).collect();
    Payouts { parts: lines.iter().map(|l| l.parts).sum(), lines, capped: false }
}

#[test]
fn a_price_is_split_to_the_last_cent() {
    let split = split_of(999, 1000, 1 << 30);
    assert_eq!(split.rights, [("Band".to_owned(), 299), ("Label".to_owned(), 249)]);
    assert_eq!(split.fee, 19);
    // 1,024 MiB at 1,000 millionths are 1.024 cents; a tenth more is 1.1264, set aside as 2.
    assert_eq!((split.rate, split.ceiling, split.escrow), (1000, 1_126_400, 2));
    assert_eq!(split.merchant, 999 - 299 - 249 - 19 - 2);
}

#[test]
fn a_price_that_leaves_no_room_lowers_the_rate_and_not_the_shares() {
    let split = split_of(10, 1_000_000, 1 << 30);
    assert_eq!(split.rights[0].1 + split.rights[1].1 + split.fee, 5);
    assert_eq!((split.escrow, split.merchant, split.ceiling), (5, 0, 5_000_000));
    assert!(split.rate < 1_000_000 && split.rate > 4_000, "{}", split.rate);
    let free = split_of(0, 1000, 1 << 20);
    assert_eq!((free.rate, free.ceiling, free.escrow, free.merchant), (0, 0, 0, 0));
}

proptest! {
    #[test]
    fn splits_always_add_up(price in 0..=Amount::MAX_MINOR, rate: u64, bytes in 0u64..1 << 42, slack: u32, a: u32, b: u32, fee: u32) {
        let shares = [("a".to_owned(), a), ("b".to_owned(), b)];
        let price = Amount { minor: price, currency: USD };
        let split = Split::of(&Terms { price, shares: &shares, fee_millionths: fee, rate, content_bytes: bytes, slack_millionths: slack });
        let rights: u64 = split.rights.iter().map(|(_, minor)| minor).sum();
        prop_assert_eq!(rights + split.fee + split.escrow + split.merchant, price.minor);
        prop_assert!(u128::from(split.ceiling) <= u128::from(split.escrow) * 1_000_000);
        prop_assert!(split.rate <= rate);
        // The whole content at the rate stays below the ceiling.
        prop_assert!(u128::from(split.rate) * u128::from(bytes) <= u128::from(split.ceiling) * PARTS_PER_MICRO);
    }
}

#[test]
fn what_does_not_add_up_is_refused_and_a_key_is_used_once() {
    in_one_write(|txn| {
        let mut posting = Posting::new("k".to_owned(), 1, None, "");
        posting.debit(Account::Bank, 5, USD).unwrap();
        assert!(matches!(post(txn, &posting), Err(LedgerError::Unbalanced { sum: 5, .. })));
        posting.credit(Account::NetworkFee, 5, "EUR".parse().unwrap()).unwrap();
        assert!(matches!(post(txn, &posting), Err(LedgerError::Unbalanced { .. })), "currencies are not mixed");
        posting.entries.pop();
        posting.credit(Account::NetworkFee, 5, USD).unwrap();
        assert!(post(txn, &posting).unwrap());
        assert!(!post(txn, &posting).unwrap());
        assert_eq!(balance(txn, &Account::Bank, USD).unwrap(), 5);
        let huge = Posting::new("h".to_owned(), 1, None, "").debit(Account::Bank, u64::MAX, USD);
        assert!(matches!(huge, Err(LedgerError::OutOfRange { .. })));
        assert_eq!(to_json(txn, None, 10).unwrap()["trial_balance"][0]["balanced"], true);
    });
}

#[test]
fn fractions_are_carried_until_they_make_a_unit() {
    in_one_write(|txn| {
        // A tenth of a cent for each of ten deliveries: one cent is charged once, and paid out once.
        for n in 0..10 {
            let payouts = payouts(&[(7, PARTS_PER_MINOR / 10)]);
            let source = Source::Escrow { minor: 2, merchant: peer(1) };
            let bill = Bill {
                key: format!("{n}"),
                at: 1,
                transaction: transaction(n),
                delivery: 1,
                currency: USD,
                source,
                payouts: &payouts,
            };
            let mut escrow = Posting::new(format!("e{n}"), 1, None, "");
            escrow.debit(Account::Bank, 2, USD).unwrap();
            escrow.credit(Account::Escrow(transaction(n)), 2, USD).unwrap();
            post(txn, &escrow).unwrap();
            assert_eq!(pay_seeders(txn, &bill).unwrap(), Some(u64::from(n == 0)));
            assert_eq!(pay_seeders(txn, &bill).unwrap(), None);
        }
        assert_eq!(balance(txn, &Account::Seeder(peer(7)), USD).unwrap(), -1);
        assert_eq!(balance(txn, &Account::SeederPot, USD).unwrap(), 0);
        assert_eq!(balance(txn, &Account::MerchantEarned(peer(1)), USD).unwrap(), -19);
    });
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Sale n at this price is captured.
    Capture(u8, u64),
    /// Its delivery is closed; how much of the ceiling was earned, in thousandths, shared among so many seeders.
    Close(u8, u16, u8),
    /// It is refunded (closed first, with nothing more earned).
    Refund(u8),
    /// It is refunded while its delivery is counted; what the closing leaves goes back then.
    RefundOpen(u8),
    /// The network pays for a copy.
    Replicate(u8, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u8..6, 0u64..3000).prop_map(|(n, price)| Step::Capture(n, price)),
        (0u8..6, 0u16..=1000, 1u8..4).prop_map(|(n, part, seeders)| Step::Close(n, part, seeders)),
        (0u8..6).prop_map(Step::Refund),
        (0u8..6).prop_map(Step::RefundOpen),
        (6u8..9, 0u64..3_000_000).prop_map(|(n, micros)| Step::Replicate(n, micros)),
    ]
}

/// What the schedule itself remembers, apart from the ledger.
#[derive(Default)]
struct Expected {
    sales: BTreeMap<u8, Split>,
    closed: BTreeMap<u8, u64>,
    /// Those of which money went back.
    refunded: BTreeSet<u8>,
    charged: u64,
}

fn close(txn: &WriteTransaction<'_>, expected: &mut Expected, n: u8, part: u16, seeders: u8) {
    let Some(split) = expected.sales.get(&n) else { return };
    let earned = u128::from(split.ceiling) * PARTS_PER_MICRO * u128::from(part) / 1000;
    let each = earned / u128::from(seeders);
    let payouts = payouts(&(0..seeders).map(|s| (100 + s, each)).collect::<Vec<_>>());
    let source = Source::Escrow { minor: split.escrow, merchant: peer(1) };
    let key = format!("close:{}#1", transaction(n));
    let bill = Bill { key, at: 1, transaction: transaction(n), delivery: 1, currency: USD, source, payouts: &payouts };
    match (pay_seeders(txn, &bill).unwrap(), expected.closed.contains_key(&n)) {
        (Some(charge), false) => {
            assert!(charge <= split.escrow);
            expected.closed.insert(n, charge);
            expected.charged += charge;
            if expected.refunded.contains(&n) {
                assert!(post(txn, &split.refund_rest(transaction(n), peer(1), charge, 1).unwrap()).unwrap());
            }
        }
        (None, true) => {}
        other => panic!("{other:?}"),
    }
}

fn run(txn: &WriteTransaction<'_>, expected: &mut Expected, step: Step) {
    match step {
        Step::Capture(n, price) => {
            let split = split_of(price, 500_000, 3 << 20);
            let posting = split.capture(transaction(n), peer(1), 1).unwrap();
            if post(txn, &posting).unwrap() {
                expected.sales.insert(n, split);
            }
        }
        Step::Close(n, part, seeders) => close(txn, expected, n, part, seeders),
        Step::Refund(n) => {
            close(txn, expected, n, 0, 1);
            let (Some(split), Some(&charged)) = (expected.sales.get(&n), expected.closed.get(&n)) else { return };
            post(txn, &split.refund(transaction(n), peer(1), charged, 1).unwrap()).unwrap();
            expected.refunded.insert(n);
        }
        Step::RefundOpen(n) => {
            let Some(split) = expected.sales.get(&n) else { return };
            let kept = expected.closed.get(&n).copied().unwrap_or(split.escrow);
            post(txn, &split.refund(transaction(n), peer(1), kept, 1).unwrap()).unwrap();
            expected.refunded.insert(n);
        }
        Step::Replicate(n, micros) => {
            let payouts = payouts(&[(101, u128::from(micros) * PARTS_PER_MICRO)]);
            let key = format!("close:{}#0", transaction(n));
            let bill = Bill {
                key,
                at: 1,
                transaction: transaction(n),
                delivery: 1,
                currency: USD,
                source: Source::Network,
                payouts: &payouts,
            };
            expected.charged += pay_seeders(txn, &bill).unwrap().unwrap_or(0);
        }
    }
}

fn check(txn: &WriteTransaction<'_>, expected: &Expected) {
    for (currency, trial) in trial_balance(txn).unwrap() {
        assert_eq!(trial.debit, trial.credit, "{currency}");
    }
    let minor = |account: Account| balance(txn, &account, USD).unwrap();
    // The pot holds all fractions and nothing else.
    let pot = u128::try_from(-minor(Account::SeederPot)).unwrap();
    let carried: u128 = CARRIED.range(txn, .., 1000).unwrap().iter().map(|(_, c)| c.0).sum();
    assert_eq!(pot * PARTS_PER_MINOR, carried);
    assert!(CARRIED.range(txn, .., 1000).unwrap().iter().all(|(_, c)| c.0 < PARTS_PER_MINOR));
    // All seeders together never have more than was charged for deliveries.
    let seeders: i64 = (100..104).map(|s| -minor(Account::Seeder(peer(s)))).sum();
    assert!(seeders >= 0);
    assert_eq!(u64::try_from(seeders).unwrap() + u64::try_from(pot).unwrap(), expected.charged);
    for (n, split) in &expected.sales {
        let held = if expected.closed.contains_key(n) { 0 } else { split.escrow };
        assert_eq!(-minor(Account::Escrow(transaction(*n))), i64::try_from(held).unwrap());
    }
    // A refund leaves the merchant with what is set aside or was spent, whenever its delivery was closed.
    let (mut due, mut earned) = (0, 0);
    for (n, split) in &expected.sales {
        let closed = expected.closed.get(n);
        if expected.refunded.contains(n) {
            due += closed.copied().unwrap_or(split.escrow);
        } else {
            due += split.price.minor;
            earned += split.merchant + closed.map_or(0, |charged| split.escrow - charged);
        }
    }
    assert_eq!(minor(Account::MerchantDue(peer(1))), i64::try_from(due).unwrap());
    assert_eq!(-minor(Account::MerchantEarned(peer(1))), i64::try_from(earned).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn books_balance_after_every_step_of_any_schedule(steps in prop::collection::vec(step(), 1..40)) {
        in_one_write(move |txn| {
            let mut expected = Expected::default();
            for &step in &steps {
                run(txn, &mut expected, step);
                check(txn, &expected);
            }
            // Everything again, as after a crash that lost the answers: nothing moves.
            let before = to_json(txn, None, 10_000).unwrap();
            let charged = expected.charged;
            for &step in &steps {
                if !matches!(step, Step::Refund(_) | Step::RefundOpen(_) | Step::Close(..)) || expected.sales.is_empty() {
                    run(txn, &mut expected, step);
                }
            }
            assert_eq!(expected.charged, charged);
            assert_eq!(to_json(txn, None, 10_000).unwrap(), before);
        });
    }
}
