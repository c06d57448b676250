//! Sales from the reservation to the refund, and the mailbox, with a real manager's database and keys.

mod announcing;
mod clock;
mod credit;
mod leases;
mod moving;
mod refunds;
mod restored;
mod schedules;
pub(crate) mod shop;
mod withheld;

use std::sync::Arc;

use protocol::api::{MailboxRequest, MailboxResponse, SalesRequest, SalesResponse, TransactionState};
use protocol::manifest::KeyPolicy;
use protocol::receipt::DeliveryId;
use protocol::ticket::{Admission, Endorsement, Lease, remuneration_commitment};
use protocol::trust::KeyPurpose;
use protocol::{Amount, PeerId, Refusal, RefusalCode, Signed};
use serde_json::json;

use self::shop::{Outbox, PRICE, Shop, Terms, random_key};
use crate::Config;
use crate::context::now_ms;
use crate::transactions::{SALES, chore, put_sale};

fn code<T: std::fmt::Debug>(result: Result<T, Refusal>) -> &'static str {
    result.unwrap_err().code.as_str()
}

/// Until the clock says that a lease of a millisecond is over.
pub(crate) async fn wait_past(end: u64) {
    let later = async {
        while now_ms() <= end {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), later).await.unwrap();
}

#[tokio::test]
async fn step_4_to_6_a_reservation_is_idempotent_and_binds_what_was_bought() {
    let shop = Shop::open(Terms::default()).await;
    let request = SalesRequest::Reserve(shop.order("o-1"));
    let first = shop.sales(request.clone()).await.unwrap();
    assert_eq!(shop.sales(request).await.unwrap(), first);
    let SalesResponse::Reserved { data, expires_at } = first else { panic!() };
    assert!(expires_at > now_ms());
    let opened = data.peek().unwrap();
    assert_eq!((opened.client, opened.merchant), (shop.client.peer_id(), shop.merchant.peer_id()));
    assert_eq!((opened.product, opened.manifest), (shop.product, shop.manifest));
    assert_eq!(opened.remuneration, remuneration_commitment(&shop.order("o-1").salt, &PRICE));

    let mut other = shop.order("o-1");
    other.body = protocol::Digest::from_bytes([9; 32]);
    assert_eq!(code(shop.sales(SalesRequest::Reserve(other)).await), "idempotency-conflict");
    // Another merchant's order of the same name is another order.
    let rival = random_key();
    shop.enrol_merchant(&rival).await;
    assert!(shop.sales_as(&rival, SalesRequest::Reserve(shop.order("o-1"))).await.is_ok());
    // The reserved sale opens nothing: there is no ticket yet.
    assert_eq!(code(shop.ticket(opened.transaction).await), "not-entitled");
    // A shop that came back from a backup asks again, and lets go of the payment of what it is refused.
    let peers = vec![shop.merchant.peer_id()];
    shop.ctx.revocations.revoke(protocol::trust::Revocations { peers, ..Default::default() }).await.unwrap();
    assert!(matches!(
        shop.sales(SalesRequest::Reserve(shop.order("o-1"))).await.unwrap(),
        SalesResponse::Reserved { data: again, .. } if again == data
    ));
    assert_eq!(code(shop.sales(SalesRequest::Reserve(shop.order("o-2"))).await), "revoked");
    shop.close().await;
}

#[tokio::test]
async fn the_same_order_at_once_is_one_sale() {
    let shop = Shop::open(Terms::default()).await;
    let answers = futures::future::join_all((0..20).map(|_| shop.sales(SalesRequest::Reserve(shop.order("o"))))).await;
    let first = answers[0].clone().unwrap();
    assert!(answers.into_iter().all(|answer| answer.unwrap() == first));
    let listed = shop.control(json!({"cmd": "transactions"})).await.unwrap();
    assert_eq!(listed["transactions"].as_array().unwrap().len(), 1);
    shop.close().await;
}

#[tokio::test]
async fn reservations_that_cannot_be_are_refused_by_name() {
    let config = Config { max_reservations: 2, ..Terms::default().config };
    let shop = Shop::open(Terms { config, ..Terms::default() }).await;
    let reserve = |change: &dyn Fn(&mut protocol::api::Reserve)| {
        let mut request = shop.order("o");
        change(&mut request);
        shop.sales(SalesRequest::Reserve(request))
    };
    let unknown = protocol::ProductId::from_bytes([7; 16]);
    assert_eq!(code(reserve(&|r| r.product = unknown).await), "unknown-product");
    assert_eq!(code(reserve(&|r| r.price.minor -= 1).await), "price-below-floor");
    assert_eq!(code(reserve(&|r| r.price.currency = "EUR".parse().unwrap()).await), "price-below-floor");
    assert_eq!(code(reserve(&|r| r.price.minor = Amount::MAX_MINOR + 1).await), "too-large");
    assert_eq!(code(reserve(&|r| r.client = PeerId::from_bytes([0; 32])).await), "malformed");
    assert_eq!(code(reserve(&|r| r.order = "x".repeat(65)).await), "malformed");
    assert_eq!(code(reserve(&|r| r.order = String::new()).await), "malformed");
    let stranger = random_key();
    assert_eq!(code(shop.sales_as(&stranger, SalesRequest::Reserve(shop.order("o"))).await), "not-enrolled");
    for order in ["a", "b"] {
        shop.reserve(order).await;
    }
    assert_eq!(code(shop.sales(SalesRequest::Reserve(shop.order("c"))).await), "limit-reached");
    // One that is taken back is kept like any other, and makes room when its time is over, not before. Nor does it move out
    // until then.
    let b = shop.reserve("b").await.peek().unwrap().transaction;
    let cancelled = SalesRequest::Cancel { transaction: b };
    for _ in 0..2 {
        let answer = shop.sales(cancelled.clone()).await.unwrap();
        assert_eq!(answer, SalesResponse::State(TransactionState::Cancelled));
    }
    assert_eq!(code(shop.sales(SalesRequest::Reserve(shop.order("c"))).await), "limit-reached");
    let (ctx, rested) = (Arc::clone(&shop.ctx), now_ms() + shop.ctx.config.archive_ms + 1);
    tokio::task::spawn_blocking(move || crate::archive::step(&ctx, rested)).await.unwrap().unwrap();
    chore::step(&shop.ctx, shop.sale(b).expires_at).await.unwrap();
    assert_eq!(shop.state(b), TransactionState::Cancelled);
    for order in ["c", "d"] {
        shop.reserve(order).await;
    }
    assert_eq!(code(shop.sales(SalesRequest::Reserve(shop.order("e"))).await), "limit-reached");
    shop.close().await;
}

#[tokio::test]
async fn step_7_only_the_right_endorsement_releases_and_only_once() {
    let shop = Shop::open(Terms::default()).await;
    let data = shop.reserve("o").await;
    let transaction = data.peek().unwrap().transaction;
    let good = shop.endorse(&data, "o");
    let release = |endorsement: &Signed<Endorsement>| {
        shop.sales(SalesRequest::Release { transaction, endorsement: endorsement.clone() })
    };
    let rival = random_key();
    shop.enrol_merchant(&rival).await;
    let forged = Signed::sign(&good.peek().unwrap(), &rival);
    assert_eq!(code(release(&forged).await), "bad-endorsement");
    let as_rival = SalesRequest::Release { transaction, endorsement: forged };
    assert_eq!(code(shop.sales_as(&rival, as_rival).await), "not-your-reservation");
    assert_eq!(code(release(&shop.endorse(&data, "another payment")).await), "bad-endorsement");
    let elsewhere = shop.endorse(&shop.reserve("p").await, "o");
    assert_eq!(code(release(&elsewhere).await), "bad-endorsement");
    assert_eq!(shop.state(transaction), TransactionState::Reserved);

    let first = release(&good).await.unwrap();
    assert_eq!(release(&good).await.unwrap(), first);
    let mut second = good.peek().unwrap();
    second.authorised_at += 1;
    assert_eq!(code(release(&Signed::sign(&second, &shop.merchant)).await), "already-released");
    assert_eq!(code(shop.sales(SalesRequest::Cancel { transaction }).await), "wrong-state");

    // What came out is a ticket that a seeder admits, for this client alone.
    let SalesResponse::Released { ticket: envelope, policy } = first else { panic!() };
    assert_eq!(policy, KeyPolicy::AtRelease);
    let trust = shop.ctx.trust();
    let check = |peer: PeerId| {
        shop.ctx.revocations.with(|revoked| {
            let admission = Admission {
                peer,
                seeder: shop.seeders[0].peer_id(),
                trust: &trust,
                revoked,
                informed: None,
                continuation_ms: 0,
                now: now_ms(),
            };
            envelope.ticket.check(&admission)
        })
    };
    let admitted = check(shop.client.peer_id()).unwrap();
    assert_eq!(admitted.lease.delivery, 1);
    assert_eq!(code(check(rival.peer_id())), "wrong-client");
    let secret = envelope.grant.as_ref().unwrap().open(&shop.client, &admitted.data, &admitted.lease).unwrap();
    assert_eq!(secret.as_bytes(), shop.secret.as_bytes());
    assert!(envelope.grant.unwrap().open(&rival, &admitted.data, &admitted.lease).is_err());
    shop.close().await;
}

#[tokio::test]
async fn step_8_the_mailbox_answers_only_the_client() {
    let shop = Shop::open(Terms::default()).await;
    let (first, envelope) = shop.buy("1").await;
    let (second, _) = shop.buy("2").await;
    assert_eq!(shop.ticket(first).await.unwrap(), envelope);
    let list = |before| shop.mailbox_as(&shop.client, MailboxRequest::List { before });
    let MailboxResponse::List(items) = list(None).await.unwrap() else { panic!() };
    assert_eq!(items.iter().map(|item| item.transaction).collect::<Vec<_>>(), [second, first]);
    let MailboxResponse::List(items) = list(Some(second)).await.unwrap() else { panic!() };
    assert_eq!(items.len(), 1);

    let eve = random_key();
    let MailboxResponse::List(items) = shop.mailbox_as(&eve, MailboxRequest::List { before: None }).await.unwrap()
    else {
        panic!()
    };
    assert!(items.is_empty());
    assert_eq!(
        code(shop.mailbox_as(&eve, MailboxRequest::Ticket { transaction: first, instead_of: None }).await),
        "not-entitled"
    );
    let completion = shop.completion(DeliveryId { transaction: first, delivery: 1 });
    assert_eq!(code(shop.mailbox_as(&eve, MailboxRequest::Complete { completion }).await), "not-entitled");
    let complain = |chunk| MailboxRequest::Complain { transaction: first, seeder: shop.seeders[0].peer_id(), chunk };
    assert_eq!(code(shop.mailbox_as(&eve, complain(1)).await), "not-entitled");
    assert_eq!(code(shop.mailbox_as(&shop.client, complain(10)).await), "bad-want");
    for n in 0..65 {
        let answer = shop.mailbox_as(&shop.client, complain(1)).await;
        assert_eq!(answer.is_ok(), n < 64);
    }
    shop.close().await;
}

#[tokio::test]
async fn reservations_expire_and_say_so() {
    let shop = Shop::open(Terms::default()).await;
    let data = shop.reserve("o").await;
    let transaction = data.peek().unwrap().transaction;
    let expires_at = shop.sale(transaction).expires_at;
    chore::step(&shop.ctx, expires_at - 1).await.unwrap();
    assert_eq!(shop.state(transaction), TransactionState::Reserved);
    chore::step(&shop.ctx, expires_at).await.unwrap();
    assert_eq!(shop.state(transaction), TransactionState::Expired);
    let endorsement = shop.endorse(&data, "o");
    assert_eq!(code(shop.sales(SalesRequest::Release { transaction, endorsement }).await), "reservation-expired");
    assert_eq!(code(shop.sales(SalesRequest::Refund { transaction }).await), "wrong-state");
    let states = shop.sales(SalesRequest::Status { transactions: vec![transaction] }).await.unwrap();
    assert_eq!(states, SalesResponse::States(vec![Some(TransactionState::Expired)]));
    let rival = random_key();
    let states = shop.sales_as(&rival, SalesRequest::Status { transactions: vec![transaction] }).await.unwrap();
    assert_eq!(states, SalesResponse::States(vec![None]));
    shop.close().await;
}

#[tokio::test]
async fn a_release_captures_the_sale_and_a_refund_takes_all_of_it_back() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    // 10 chunks of 64 KiB at 10 minor units a MiB and a tenth more: 6.875, set aside as 7.
    let merchant = shop.merchant.peer_id();
    assert_eq!(shop.balance(&format!("merchant-due:{merchant}")).await, 999);
    assert_eq!(shop.balance("rights-holder:Band").await, -699);
    assert_eq!(shop.balance("network-fee").await, -19);
    assert_eq!(shop.balance("escrow").await, -7);
    assert_eq!(shop.balance(&format!("merchant-earned:{merchant}")).await, -(999 - 699 - 19 - 7));
    let credit = shop.control(json!({"cmd": "credit", "merchant": merchant, "currency": "USD"})).await.unwrap();
    assert_eq!((credit["due"].as_i64(), credit["earned"].as_i64()), (Some(999), Some(274)));

    for _ in 0..2 {
        let answer = shop.sales(SalesRequest::Refund { transaction: id }).await.unwrap();
        assert_eq!(answer, SalesResponse::State(TransactionState::Refunded));
    }
    assert!(shop.is_revoked(id));
    assert_eq!(code(shop.ticket(id).await), "revoked");
    assert_eq!(code(shop.complete(id).await), "revoked");
    // Nothing is left but what is set aside for receipts that may be on their way.
    let ledger = async || shop.control(json!({"cmd": "ledger"})).await.unwrap()["accounts"].take();
    let set_aside = json!([
        {"account": format!("merchant-due:{merchant}"), "minor": 7, "currency": "USD"},
        {"account": "escrow", "minor": -7, "currency": "USD"},
    ]);
    assert_eq!(ledger().await, set_aside);
    chore::step(&shop.ctx, shop.delivery(id, 1).unwrap().due_at).await.unwrap();
    assert_eq!(ledger().await, json!([]));
    let credit = shop.control(json!({"cmd": "credit", "merchant": merchant, "currency": "USD"})).await.unwrap();
    assert_eq!((credit["open"].as_u64(), credit["owed"].as_u64()), (Some(0), Some(0)));
    shop.close().await;
}

#[tokio::test]
async fn a_refund_leaves_what_seeders_earned_with_the_merchant() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let mut outbox = Outbox::of(&shop, 0);
    outbox.send(&shop, vec![shop.receipt(id, 0, 0..8)]).await;
    assert_eq!(shop.state(id), TransactionState::Delivering);
    shop.control(json!({"cmd": "refund", "id": id})).await.unwrap();
    assert_eq!(shop.state(id), TransactionState::Refunded);
    chore::step(&shop.ctx, shop.delivery(id, 1).unwrap().due_at).await.unwrap();
    assert_eq!(shop.state(id), TransactionState::Refunded);
    // Half a MiB at 10 minor units a MiB.
    assert_eq!(shop.balance(&format!("seeder:{}", shop.seeders[0].peer_id())).await, -5);
    assert_eq!(shop.balance(&format!("merchant-due:{}", shop.merchant.peer_id())).await, 5);
    assert_eq!(shop.balance("rights-holder:Band").await, 0);
    assert_eq!(shop.balance("escrow").await, 0);
    // A receipt that comes after the closing is kept, and not paid.
    outbox.send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
    assert_eq!(shop.balance(&format!("seeder:{}", shop.seeders[0].peer_id())).await, -5);
    shop.close().await;
}

#[tokio::test]
async fn a_merchant_cannot_come_to_owe_more_than_its_credit() {
    let config = Config { credit_limit: 15, close_grace_ms: 1, ..Terms::default().config };
    let shop = Shop::open(Terms { config, ..Terms::default() }).await;
    shop.buy("1").await;
    let (second, _) = shop.buy("2").await;
    let data = shop.reserve("3").await;
    let transaction = data.peek().unwrap().transaction;
    let release = SalesRequest::Release { transaction, endorsement: shop.endorse(&data, "3") };
    assert_eq!(code(shop.sales(release.clone()).await), "limit-reached");
    assert_eq!(shop.state(transaction), TransactionState::Reserved);
    shop.sales(SalesRequest::Refund { transaction: second }).await.unwrap();
    // It is still set aside for receipts that are on their way.
    assert_eq!(code(shop.sales(release.clone()).await), "limit-reached");
    chore::step(&shop.ctx, shop.delivery(second, 1).unwrap().due_at).await.unwrap();
    shop.sales(release).await.unwrap();
    shop.close().await;
}

#[tokio::test]
async fn a_merchant_without_credit_sells_from_its_deposit() {
    let config = Config { credit_limit: 1000, ..Terms::default().config };
    let shop = Shop::open(Terms { config, ..Terms::default() }).await;
    let credit = |limit: Option<u64>| {
        let merchant = shop.merchant.peer_id();
        shop.control(json!({"cmd": "credit", "merchant": merchant, "currency": "USD", "limit_minor": limit}))
    };
    let pay = |minor: u64, reference: &str| {
        let party = shop.merchant.peer_id();
        shop.control(json!({
            "cmd": "record-payment", "account": "merchant-due", "party": party, "minor": minor, "currency": "USD",
            "reference": reference,
        }))
    };
    assert_eq!(credit(Some(0)).await.unwrap()["limit"], 0);
    let data = shop.reserve("1").await;
    let transaction = data.peek().unwrap().transaction;
    let release = SalesRequest::Release { transaction, endorsement: shop.endorse(&data, "1") };
    assert_eq!(code(shop.sales(release.clone()).await), "limit-reached");
    // Seven minor units are set aside for a delivery: nothing is owed yet, so all of it is a deposit.
    pay(8, "deposit").await.unwrap();
    assert_eq!(credit(None).await.unwrap()["deposit"], 8);
    shop.sales(release).await.unwrap();
    assert_eq!(credit(None).await.unwrap()["open"], 7);
    let data = shop.reserve("2").await;
    let second =
        SalesRequest::Release { transaction: data.peek().unwrap().transaction, endorsement: shop.endorse(&data, "2") };
    assert_eq!(code(shop.sales(second.clone()).await), "limit-reached");
    // What was paid ahead is a part of what the sale made due, and is not there a second time.
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(transaction, 0, 0..10)]).await;
    let figures = |shown: &serde_json::Value| ["due", "open", "owed", "deposit"].map(|name| shown[name].clone());
    let cost = shop.sale(transaction).release.unwrap().charged.unwrap();
    assert_eq!(figures(&credit(None).await.unwrap()), [json!(999 - 8), json!(0), json!(cost), json!(0)]);
    // What pays what is due is no deposit: deliveries first, then the rest.
    pay(7, "more").await.unwrap();
    assert_eq!(figures(&credit(None).await.unwrap()), [json!(999 - 15), json!(0), json!(0), json!(0)]);
    pay(999 - 15, "all").await.unwrap();
    assert_eq!(figures(&credit(None).await.unwrap()), [json!(0), json!(0), json!(0), json!(0)]);
    assert_eq!(code(shop.sales(second.clone()).await), "limit-reached");
    pay(7, "ahead").await.unwrap();
    shop.sales(second).await.unwrap();
    // While it is under way its ceiling is a part of what is due, and once that is paid nothing is at risk.
    assert_eq!(figures(&credit(None).await.unwrap()), [json!(999 - 7), json!(7), json!(0), json!(0)]);
    pay(999 - 7, "all of the second").await.unwrap();
    assert_eq!(figures(&credit(None).await.unwrap()), [json!(0), json!(7), json!(0), json!(7)]);
    let data = shop.reserve("3").await;
    let third =
        SalesRequest::Release { transaction: data.peek().unwrap().transaction, endorsement: shop.endorse(&data, "3") };
    assert_eq!(code(shop.sales(third).await), "limit-reached");
    shop.close().await;
}

#[tokio::test]
async fn on_completion_the_key_and_the_money_move_together() {
    let shop = Shop::open(Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() }).await;
    let (id, envelope) = shop.buy("o").await;
    assert!(envelope.grant.is_none());
    assert_eq!(shop.balance("escrow").await, 0);
    let mut outbox = Outbox::of(&shop, 0);
    outbox.send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
    // All of it was acknowledged, and still nobody can be made to pay before the client has asked for the key.
    assert_eq!(shop.state(id), TransactionState::Delivering);
    assert!(shop.ticket(id).await.unwrap().grant.is_none());

    let mut wrong = shop.completion(DeliveryId { transaction: id, delivery: 1 }).peek().unwrap();
    wrong.manifest = protocol::Digest::from_bytes([1; 32]);
    let completion = Signed::sign(&wrong, &shop.client);
    assert_eq!(code(shop.mailbox_as(&shop.client, MailboxRequest::Complete { completion }).await), "bad-receipt");

    let MailboxResponse::Completed { grant: Some(grant) } = shop.complete(id).await.unwrap() else { panic!() };
    let lease = envelope.ticket.lease.peek().unwrap();
    let secret = grant.open(&shop.client, &envelope.ticket.data.peek().unwrap(), &lease).unwrap();
    assert_eq!(secret.as_bytes(), shop.secret.as_bytes());
    assert_eq!(shop.complete(id).await.unwrap(), MailboxResponse::Completed { grant: Some(grant) });
    assert_eq!(shop.state(id), TransactionState::Settled);
    assert_eq!(shop.balance("rights-holder:Band").await, -699);
    assert_eq!(shop.balance(&format!("seeder:{}", shop.seeders[0].peer_id())).await, -6);
    shop.close().await;
}

#[tokio::test]
async fn on_completion_without_completion_is_refunded_by_itself() {
    let shop = Shop::open(Terms { policy: KeyPolicy::OnCompletion, lease_ms: 1, ..Terms::default() }).await;
    let (id, envelope) = shop.buy("o").await;
    wait_past(envelope.ticket.lease.peek().unwrap().end).await;
    assert_eq!(shop.ticket(id).await.unwrap().ticket, envelope.ticket, "not prolonged while nothing is paid");
    let due_at = shop.delivery(id, 1).unwrap().due_at;
    chore::step(&shop.ctx, due_at - 1).await.unwrap();
    assert_eq!(shop.state(id), TransactionState::Released);
    chore::step(&shop.ctx, due_at).await.unwrap();
    assert_eq!(shop.state(id), TransactionState::Refunded);
    assert!(shop.is_revoked(id));
    assert_eq!(code(shop.complete(id).await), "revoked");
    assert_eq!(shop.control(json!({"cmd": "ledger"})).await.unwrap()["accounts"], json!([]));
    shop.close().await;
}

#[tokio::test]
async fn a_delivery_that_nobody_finishes_is_closed_in_its_time() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    Outbox::of(&shop, 1).send(&shop, vec![shop.receipt(id, 1, 0..4)]).await;
    let due_at = shop.delivery(id, 1).unwrap().due_at;
    chore::step(&shop.ctx, due_at).await.unwrap();
    assert_eq!(shop.state(id), TransactionState::Settled);
    assert_eq!(shop.balance("escrow").await, 0);
    assert_eq!(shop.balance(&format!("seeder:{}", shop.seeders[1].peer_id())).await, -2);
    // Half a minor unit is carried, and the one that was charged for it is in the pot.
    assert_eq!(shop.balance("seeder-pot").await, -1);
    chore::step(&shop.ctx, due_at + 1).await.unwrap();
    assert_eq!(shop.balance("seeder-pot").await, -1);
    shop.close().await;
}

#[tokio::test]
async fn a_lease_is_renewed_at_half_its_life_and_a_closed_delivery_is_followed_by_an_unpaid_one() {
    let shop = Shop::open(Terms { lease_ms: 1, ..Terms::default() }).await;
    let origin = shop.seeders[2].peer_id();
    shop.ctx.registry.set_origin(origin).await.unwrap();
    let (id, envelope) = shop.buy("o").await;
    let first = envelope.ticket.lease.peek().unwrap();
    wait_past(first.end).await;
    let renewed = shop.ticket(id).await.unwrap();
    let lease = renewed.ticket.lease.peek().unwrap();
    assert!(lease.start > first.start && lease.delivery == 1 && lease.ceiling == first.ceiling);
    assert_eq!(renewed.ticket.endorsement, envelope.ticket.endorsement);
    let delivery = shop.delivery(id, 1).unwrap();
    assert_eq!(delivery.due_at, lease.end + shop.ctx.config.close_grace_ms);
    // The old time for closing is gone.
    chore::step(&shop.ctx, delivery.due_at - 1).await.unwrap();
    assert!(shop.delivery(id, 1).unwrap().closed.is_none());

    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
    assert_eq!(shop.state(id), TransactionState::Settled);
    let again = shop.ticket(id).await.unwrap();
    let lease = again.ticket.lease.peek().unwrap();
    assert_eq!((lease.delivery, lease.rate, lease.ceiling), (2, 0, 0));
    assert_eq!(lease.sources, [origin]);
    assert!(again.grant.is_some(), "what was bought stays bought");
    assert_eq!(shop.state(id), TransactionState::Settled);
    shop.close().await;
}

/// What was signed while this manager's clock was ahead no seeder takes yet; once it was set right, the client gets a lease
/// that begins now, for the same delivery.
#[tokio::test]
async fn a_lease_that_begins_later_is_replaced_when_it_is_asked_for() {
    for policy in [KeyPolicy::AtRelease, KeyPolicy::OnCompletion] {
        let shop = Shop::open(Terms { policy, ..Terms::default() }).await;
        let (id, envelope) = shop.buy("o").await;
        let first = envelope.ticket.lease.peek().unwrap();
        let early = Lease { start: first.start + 20 * 60_000, end: first.end + 20 * 60_000, ..first.clone() };
        let signed = shop.ctx.keys.sign(KeyPurpose::Ticket, &early);
        let end = early.end;
        let ctx = Arc::clone(&shop.ctx);
        tokio::task::spawn_blocking(move || {
            ctx.db.write_blocking(move |txn| {
                let mut sale = SALES.get(txn, &id)?.unwrap();
                let release = sale.release.as_mut().unwrap();
                (release.lease, release.lease_start, release.lease_end) = (signed.clone(), early.start, early.end);
                put_sale(txn, &id, Some(sale.state), &sale)
            })
        })
        .await
        .unwrap()
        .unwrap();
        let lease = shop.ticket(id).await.unwrap().ticket.lease.peek().unwrap();
        assert!(lease.start >= first.start && lease.start <= now_ms(), "{lease:?}");
        assert_eq!((lease.delivery, lease.ceiling), (first.delivery, first.ceiling));
        if policy == KeyPolicy::OnCompletion {
            let length = first.end - first.start;
            assert!(lease.end <= end && lease.end == lease.start + length, "a payment is not held for longer");
        }
        // The next time it is as good as it was.
        assert_eq!(shop.ticket(id).await.unwrap().ticket.lease.peek().unwrap(), lease);
        shop.close().await;
    }
}

#[tokio::test]
async fn payments_outside_are_booked_once_and_never_beyond_what_is_owed() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
    let seeder = shop.seeders[0].peer_id();
    let pay = |account: &str, party: String, minor: u64, reference: &str| {
        shop.control(json!({"cmd": "record-payment", "account": account, "party": party, "minor": minor,
            "currency": "USD", "reference": reference}))
    };
    assert_eq!(pay("seeder", seeder.to_string(), 7, "r1").await, Err("limit-reached".to_owned()));
    pay("seeder", seeder.to_string(), 6, "r1").await.unwrap();
    assert_eq!(shop.balance(&format!("seeder:{seeder}")).await, 0);
    assert_eq!(pay("rights-holder", "Band".to_owned(), 1, "r1").await, Err("idempotency-conflict".to_owned()));
    pay("merchant-due", shop.merchant.peer_id().to_string(), 999, "r2").await.unwrap();
    assert_eq!(shop.balance("bank").await, 993);
    assert_eq!(pay("seeder", "nobody".to_owned(), 1, "r3").await, Err("malformed".to_owned()));
    // Whoever has lost the books, and has the log, knows what is to be booked again; and only what was booked is in it.
    let log = shop.ctx.db.read(|txn| crate::audit::page(&shop.ctx.archive, txn, 0)).unwrap();
    let entries = log["entries"].as_array().unwrap().iter().filter(|entry| entry["what"] == "payment");
    let noted: Vec<_> = entries.map(|entry| (entry["subject"].clone(), entry["detail"].clone())).collect();
    let due = format!("merchant-due:{}", shop.merchant.peer_id());
    let expected = [
        (json!(format!("seeder:{seeder}")), json!("0.06 USD paid out, reference r1")),
        (json!(due), json!("9.99 USD paid in, reference r2")),
    ];
    assert_eq!(noted, expected);
    shop.close().await;
}

#[tokio::test]
async fn a_transaction_is_shown_with_its_money_and_seeders() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
    let shown = shop.control(json!({"cmd": "transaction", "id": id})).await.unwrap();
    assert_eq!(shown["state"], "settled");
    assert_eq!(shown["deliveries"][0]["seeders"][0]["chunks"], 10);
    assert_eq!(shown["postings"].as_array().unwrap().len(), 2);
    let listed = shop.control(json!({"cmd": "transactions", "state": "settled"})).await.unwrap();
    assert_eq!(listed["transactions"].as_array().unwrap().len(), 1);
    let listed = shop.control(json!({"cmd": "transactions", "state": "reserved"})).await.unwrap();
    assert_eq!(listed["transactions"], json!([]));
    let unknown = shop.control(json!({"cmd": "refund", "id": protocol::TransactionId::from_bytes([1; 16])})).await;
    assert_eq!(unknown, Err(RefusalCode::NotEntitled.as_str().to_owned()));
    let revoked = shop.control(json!({"cmd": "revoke-transaction", "id": id})).await.unwrap();
    assert_eq!(revoked["state"], "revoked");
    assert!(shop.is_revoked(id));
    shop.close().await;
}

#[tokio::test]
async fn who_has_no_invitation_is_refused_before_anything_is_signed_or_written() {
    let shop = Shop::open(Terms::default()).await;
    let stranger = random_key();
    let token = protocol::Nonce::from_bytes([7; 16]);
    let failures = shop.ctx.db.stats().failures;
    let request = SalesRequest::Enrol { token, name: "Shop".into(), held: None };
    assert_eq!(code(shop.sales_as(&stranger, request).await), "bad-invitation");
    let asked = crate::enrol::seeder(&shop.ctx, stranger.peer_id(), token, "S".into(), 1, None).await;
    assert_eq!(code(asked), "bad-invitation");
    // A write that fails has those beside it written again.
    assert_eq!(shop.ctx.db.stats().failures, failures);
    shop.close().await;
}
