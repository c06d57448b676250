//! Transactions that moved out through a real manager: everything that could be asked of them before can be asked
//! after, and a process that dies in the middle of the move loses and doubles nothing.

use std::process::Command;

use protocol::api::{MailboxRequest, MailboxResponse, SalesRequest, SalesResponse, TransactionState};
use protocol::codec;
use protocol::receipt::DeliveryId;
use serde_json::json;
use store::StoreError;

use super::*;
use crate::Config;
use crate::sales::tests::shop::{CHUNK, CHUNKS, Outbox, Shop, Terms};
use crate::transactions::{ACKS, DELIVERIES};

/// When everything that ended until now has rested.
fn rested(ctx: &Context) -> u64 {
    now_ms() + ctx.config.archive_ms + 1
}

async fn move_out(shop: &Shop) {
    let (ctx, now) = (std::sync::Arc::clone(&shop.ctx), rested(&shop.ctx));
    tokio::task::spawn_blocking(move || chore::step(&ctx, now)).await.unwrap().unwrap();
}

/// A purchase that was delivered by one seeder and settled.
async fn settled(shop: &Shop, outbox: &mut Outbox, order: &str) -> TransactionId {
    let (id, _) = shop.buy(order).await;
    outbox.send(shop, vec![shop.receipt(id, 0, 0..CHUNKS)]).await;
    assert_eq!(shop.state(id), TransactionState::Settled);
    id
}

fn rows(ctx: &Context, id: TransactionId) -> usize {
    ctx.db
        .read(|txn| {
            let deliveries = DELIVERIES.prefix(txn, &id, 9)?.len() + ACKS.prefix(txn, &id, 9)?.len();
            let postings = crate::ledger::numbered_postings_of(txn, &id)?.len();
            Ok::<_, StoreError>(usize::from(SALES.contains(txn, &id)?) + deliveries + postings)
        })
        .unwrap()
}

#[tokio::test]
async fn whatever_is_asked_of_a_transaction_that_moved_out_is_answered_as_before() {
    let shop = Shop::open(Terms::default()).await;
    let mut outbox = Outbox::of(&shop, 0);
    let id = settled(&shop, &mut outbox, "o").await;
    let (open, _) = shop.buy("still open").await;
    let asked = async || {
        let mut transaction = shop.control(json!({"cmd": "transaction", "id": id})).await.unwrap();
        let archived = transaction["archived"].take().as_bool().unwrap();
        let pack = crate::evidence::pack(&shop.ctx, id, 1).unwrap();
        let listed = shop.control(json!({"cmd": "transactions"})).await.unwrap();
        let states = SalesRequest::Status { transactions: vec![id, open] };
        let states = shop.sales(states).await.unwrap();
        let mail = shop.mailbox_as(&shop.client, MailboxRequest::List { before: None }).await.unwrap();
        (archived, (transaction, pack.acks, pack.leases, listed, states, mail))
    };
    let (before, balance) = (asked().await, shop.balance("escrow").await);
    assert!(!before.0 && rows(&shop.ctx, id) >= 4);

    move_out(&shop).await;
    assert_eq!((rows(&shop.ctx, id), rows(&shop.ctx, open) > 0), (0, true));
    let after = asked().await;
    assert!(after.0);
    assert_eq!(after.1, before.1);
    assert_eq!(shop.balance("escrow").await, balance);
    let report = shop.control(json!({"cmd": "archive", "verify": true})).await.unwrap();
    assert_eq!((&report["transactions"], &report["verified"]), (&json!(1), &json!(1)));

    // The order is taken for good.
    let data = shop.reserve("o").await;
    assert_eq!(data.peek().unwrap().transaction, id);
    let other =
        protocol::api::Reserve { price: protocol::Amount { minor: 1000, ..shop.order("o").price }, ..shop.order("o") };
    assert_eq!(shop.sales(SalesRequest::Reserve(other)).await.unwrap_err().code.as_str(), "idempotency-conflict");

    // Receipts that come late are judged as they would have been.
    outbox.send(&shop, vec![shop.receipt(id, 0, 0..2)]).await;
    Outbox::of(&shop, 1).send(&shop, vec![shop.receipt(id, 1, 0..CHUNKS)]).await;
    let listed = shop.control(json!({"cmd": "receipts"})).await.unwrap();
    assert_eq!(listed["receipts"][1]["status"], "duplicate");
    assert_eq!(listed["receipts"][0]["code"], "wrong-state");
    assert_eq!(rows(&shop.ctx, id), 0, "and change nothing");
    shop.close().await;
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_named_in_the_list_and_hides_no_other() {
    let shop = Shop::open(Terms::default()).await;
    let mut outbox = Outbox::of(&shop, 0);
    let damaged = settled(&shop, &mut outbox, "o").await;
    move_out(&shop).await;
    let sound = settled(&shop, &mut outbox, "p").await;
    move_out(&shop).await;
    let place = shop.ctx.db.read(|txn| ARCHIVED.get(txn, &damaged)).unwrap().unwrap().place;
    shop.ctx.archive.segments.spoil(place);
    let listed = shop.control(json!({"cmd": "transactions"})).await.unwrap();
    let lines = listed["transactions"].as_array().unwrap();
    let line = |id: TransactionId| lines.iter().find(|line| line["id"] == json!(id)).unwrap();
    assert_eq!(line(sound)["order"], "p");
    assert_eq!(line(damaged)["state"], "settled");
    assert!(line(damaged)["error"].as_str().unwrap().contains("damaged record"), "{listed}");
    // Its merchant learns where it stands, and is not told that there is none: it would give the payment back.
    let status = SalesRequest::Status { transactions: vec![damaged; 256] };
    let settled = SalesResponse::States(vec![Some(TransactionState::Settled); 256]);
    assert_eq!(shop.sales(status.clone()).await.unwrap(), settled);
    let mail = shop.mailbox_as(&shop.client, MailboxRequest::List { before: None }).await.unwrap();
    let MailboxResponse::List(mail) = mail else { panic!("{mail:?}") };
    assert_eq!(mail.iter().map(|item| item.transaction).collect::<Vec<_>>(), [sound]);
    // Nothing is read for who is no merchant: each record may be of megabytes, and anybody may know its id.
    let stranger = crate::sales::tests::shop::random_key();
    assert_eq!(shop.sales_as(&stranger, status).await.unwrap(), SalesResponse::States(vec![None; 256]));
    // And once for a merchant, however often it asks.
    let twice = SalesRequest::Status { transactions: vec![sound, sound] };
    assert_eq!(shop.sales(twice).await.unwrap(), SalesResponse::States(vec![Some(TransactionState::Settled); 2]));
    shop.close().await;
}

/// After a restore seeders send again what they have, of such a sale, too.
#[tokio::test]
async fn a_damaged_record_does_not_keep_a_seeders_other_receipts_from_counting() {
    let shop = Shop::open(Terms::default()).await;
    let mut outbox = Outbox::of(&shop, 0);
    let damaged = settled(&shop, &mut outbox, "a").await;
    move_out(&shop).await;
    shop.ctx.archive.spoil(shop.ctx.db.read(|txn| ARCHIVED.get(txn, &damaged)).unwrap().unwrap().place);
    let (open, _) = shop.buy("b").await;
    outbox.send(&shop, vec![shop.receipt(damaged, 0, 0..CHUNKS), shop.receipt(open, 0, 0..CHUNKS)]).await;
    let paid = shop.delivery(open, 1).unwrap().closed.unwrap();
    assert!(!paid.lines.is_empty());
    let seeder = shop.seeders[0].peer_id();
    let told = shop.control(json!({"cmd": "receipts", "seeder": seeder})).await.unwrap();
    assert!(told.to_string().contains("is damaged"), "{told}");
    shop.close().await;
}

#[tokio::test]
async fn a_damaged_record_does_not_keep_a_shop_from_what_else_was_taken_back() {
    let shop = Shop::open(Terms::default()).await;
    let mut outbox = Outbox::of(&shop, 0);
    let mut sold = Vec::new();
    for (order, cmd) in [("a", "revoke-transaction"), ("b", "refund"), ("c", "refund")] {
        let id = settled(&shop, &mut outbox, order).await;
        shop.control(json!({"cmd": cmd, "id": id})).await.unwrap();
        sold.push(id);
    }
    move_out(&shop).await;
    for id in &sold[..2] {
        shop.ctx.archive.spoil(shop.ctx.db.read(|txn| ARCHIVED.get(txn, id)).unwrap().unwrap().place);
    }
    let told = shop.sales(SalesRequest::TakenBack { after: 0 }).await.unwrap();
    let SalesResponse::TakenBack { sales, .. } = told else { panic!("{told:?}") };
    let told: Vec<_> = sales.iter().map(|sale| (sale.number, sale.transaction, sale.captured)).collect();
    assert_eq!(told, [(2, sold[1], true), (3, sold[2], true)]);
    shop.close().await;
}

#[tokio::test]
async fn a_purchase_that_moved_out_is_fetched_again_and_refunded_like_any_other() {
    let shop = Shop::open(Terms::default()).await;
    let mut outbox = Outbox::of(&shop, 0);
    let id = settled(&shop, &mut outbox, "o").await;
    let (newest, before) = (settled(&shop, &mut outbox, "p").await, shop.balance("seeder-pot").await);
    move_out(&shop).await;

    let lease = shop.ticket(id).await.unwrap().ticket.lease.peek().unwrap();
    assert_eq!(lease.delivery, 2);
    assert!(rows(&shop.ctx, id) > 0);
    // Under way again: it stays.
    move_out(&shop).await;
    assert!(rows(&shop.ctx, id) > 0);
    let acked = protocol::ChunkSet::from_range(0..CHUNKS);
    let again = DeliveryId { transaction: id, delivery: 2 };
    let ack = shop.ack(&shop.client, again, shop.seeders[0].peer_id(), acked);
    outbox.send(&shop, vec![protocol::receipt::Receipt { ack, completion: None, first_at: 1, last_at: 2 }]).await;
    let bytes: u64 = shop.delivery(id, 2).unwrap().closed.unwrap().lines.iter().map(|line| line.bytes).sum();
    assert_eq!(bytes, u64::from(CHUNKS) * u64::from(CHUNK));
    assert_eq!(shop.balance("seeder-pot").await, before, "nobody pays for it");
    shop.running.run_due(lease.end + 2 * shop.ctx.config.close_grace_ms + shop.ctx.config.archive_ms).await.unwrap();
    assert_eq!(rows(&shop.ctx, id), 0);

    // All postings are elsewhere; the numbers go on all the same, and the books balance.
    assert_eq!(rows(&shop.ctx, newest), 0);
    let refund = SalesRequest::Refund { transaction: id };
    assert_eq!(shop.sales(refund.clone()).await.unwrap(), SalesResponse::State(TransactionState::Refunded));
    assert_eq!(shop.sales(refund).await.unwrap(), SalesResponse::State(TransactionState::Refunded));
    assert!(shop.is_revoked(id));
    shop.balance("escrow").await;
    let shown = shop.control(json!({"cmd": "transaction", "id": id})).await.unwrap();
    let mut numbers: Vec<u64> =
        shown["postings"].as_array().unwrap().iter().map(|p| p["number"].as_u64().unwrap()).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), shown["postings"].as_array().unwrap().len());
    assert!(matches!(
        shop.mailbox_as(&shop.client, MailboxRequest::Ticket { transaction: id, instead_of: None }).await,
        Err(refusal) if refusal.code.as_str() == "revoked"
    ));
    assert!(matches!(
        shop.mailbox_as(&shop.client, MailboxRequest::List { before: None }).await,
        Ok(MailboxResponse::List(items)) if items.len() == 2
    ));
    shop.close().await;
}

#[tokio::test]
async fn the_audit_log_is_one_chain_wherever_its_entries_lie() {
    let shop = Shop::open(Terms::default()).await;
    shop.ctx
        .db
        .write(|txn| {
            for n in 0..2500_u64 {
                crate::audit::note(txn, n, "test", n, "entry")?;
            }
            Ok::<_, StoreError>(())
        })
        .await
        .unwrap();
    let whole = async || {
        let (mut lines, mut after) = (Vec::new(), 0);
        loop {
            let page = shop.control(json!({"cmd": "audit", "after": after})).await.unwrap();
            let entries = page["entries"].as_array().unwrap();
            let Some(last) = entries.last() else { return lines.join("\n") };
            after = last["number"].as_u64().unwrap();
            lines.extend(entries.iter().map(serde_json::Value::to_string));
        }
    };
    let before = whole().await;
    move_out(&shop).await;
    let report = shop.control(json!({"cmd": "archive", "verify": true})).await.unwrap();
    assert_eq!(report["verified"], 1, "one page moved, and one and a half stayed");
    assert_eq!(whole().await, before);
    let exported = crate::verify_audit(before.as_bytes(), &[], false).unwrap();
    assert!(exported.entries >= 2500);
    // What is exported can be cut off, also where it had moved out; what comes later follows from its last entry.
    let cut = json!({"cmd": "audit-cut", "through": exported.last, "digest": exported.head});
    assert_eq!(shop.control(cut).await.unwrap()["removed"], exported.last - 1);
    let rest = whole().await;
    let archive_and_rest: Vec<&str> = before.lines().chain(rest.lines().skip(1)).collect();
    let chained = crate::verify_audit(archive_and_rest.join("\n").as_bytes(), &[], false).unwrap();
    assert_eq!(chained.entries, exported.entries + 1, "the entry about the cut");
    shop.close().await;
}

#[tokio::test]
async fn a_cut_through_what_moved_out_leaves_what_was_not_exported_and_no_more() {
    let shop = Shop::open(Terms::default()).await;
    shop.ctx
        .db
        .write(|txn| (0..4000).try_for_each(|n| crate::audit::note(txn, n, "revoke", n, "for the test")))
        .await
        .unwrap();
    let mut log: Vec<serde_json::Value> = Vec::new();
    let whole = async || {
        let (mut lines, mut after) = (Vec::new(), 0);
        loop {
            let page = shop.control(json!({"cmd": "audit", "after": after})).await.unwrap();
            let entries = page["entries"].as_array().unwrap().clone();
            let Some(last) = entries.last() else { return lines };
            after = last["number"].as_u64().unwrap();
            lines.extend(entries);
        }
    };
    let text = |lines: &[serde_json::Value]| lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    log.extend(whole().await);
    move_out(&shop).await;
    move_out(&shop).await;
    // Exported some time ago: the last entry of the export lies in the middle of a page.
    for (through, gone) in [(1500, 1499), (1700, 200)] {
        let cut = json!({"cmd": "audit-cut", "through": through, "digest": log[through - 1]["digest"]});
        for removed in [gone, 0] {
            assert_eq!(shop.control(cut.clone()).await.unwrap()["removed"], removed);
        }
        let rest = whole().await;
        assert_eq!(rest[0], log[through - 1]);
        let report = crate::verify_audit(text(&rest).as_bytes(), &[], false).unwrap();
        assert_eq!(report.first, through as u64);
        assert!(report.cut_by.is_some(), "{report:?}");
    }
    let too_early = json!({"cmd": "audit-cut", "through": 1200, "digest": log[1199]["digest"]});
    assert_eq!(shop.control(too_early).await.unwrap_err(), "wrong-state");
    shop.close().await;
}

#[tokio::test]
async fn several_that_move_out_at_once_make_one_chain() {
    let shop = Shop::open(Terms::default()).await;
    let moving = (0..8_u32).map(|n| {
        let ctx = std::sync::Arc::clone(&shop.ctx);
        tokio::task::spawn_blocking(move || {
            for round in 0..5_u32 {
                let record = (Kind::Statement, [n.to_le_bytes(), round.to_le_bytes()].concat());
                ctx.archive.move_out(&ctx.db, &[record], |_, places| {
                    assert_eq!(places.len(), 1);
                    Ok(())
                })?;
            }
            Ok::<_, StoreError>(())
        })
    });
    for done in futures::future::join_all(moving).await {
        done.unwrap().unwrap();
    }
    let report = shop.control(json!({"cmd": "archive", "verify": true})).await.unwrap();
    assert_eq!((&report["verified"], &report["segments"]), (&json!(40), &json!(1)));
    shop.close().await;
}

const DYING: &str = "WILLCALL_TEST_DIES_WHILE_ARCHIVING";

/// The process that the next test kills: the record is on disk, the rows are being taken out, and it dies.
#[tokio::test]
async fn dies_between_the_flush_and_the_commit() {
    let Ok(dir) = std::env::var(DYING) else { return };
    let running = crate::start(dir.as_ref(), Config::load(dir.as_ref()).unwrap()).await.unwrap();
    let ctx = std::sync::Arc::clone(running.context());
    tokio::task::spawn_blocking(move || {
        let (id, sale) = ctx.db.read(|txn| SALES.first(txn)).unwrap().unwrap();
        assert_eq!(sale.state, TransactionState::Settled);
        let whole = ctx.db.read(|txn| Whole::gather(txn, &id)).unwrap().unwrap();
        let records = [(Kind::Transaction, codec::encode(&whole))];
        let dying = ctx.archive.move_out(&ctx.db, &records, move |txn, _| {
            whole.remove(txn, &id)?;
            std::process::abort()
        });
        panic!("still alive: {dying:?}");
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_manager_killed_between_segment_and_store_has_the_transaction_once() {
    let shop = Shop::open(Terms::default()).await;
    let id = settled(&shop, &mut Outbox::of(&shop, 0), "o").await;
    let archive_ms = shop.ctx.config.archive_ms;
    let folder = shop.stop().await;
    let dir = folder.path().join("manager");
    let died = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "archive::tests::dies_between_the_flush_and_the_commit"])
        .env(DYING, &dir)
        .output()
        .unwrap();
    assert!(!died.status.success() && died.status.code().is_none(), "{died:?}");
    let left = std::fs::metadata(dir.join("segments/00000001.seg")).unwrap().len();
    assert!(left > 1000, "the record is there: {left} bytes");

    let running = crate::start(&dir, Config::load(&dir).unwrap()).await.unwrap();
    let ctx = std::sync::Arc::clone(running.context());
    assert!(rows(&ctx, id) >= 4, "and does not count: the rows are there, too");
    let report = |verify| running.control(json!({"cmd": "archive", "verify": verify}));
    assert_eq!(report(true).await.unwrap()["transactions"], 0);
    running.run_due(now_ms() + archive_ms + 1).await.unwrap();
    assert_eq!(rows(&ctx, id), 0);
    let shown = report(true).await.unwrap();
    assert_eq!((&shown["transactions"], &shown["verified"], &shown["segments"]), (&json!(1), &json!(1), &json!(2)));
    let transaction = running.control(json!({"cmd": "transaction", "id": id})).await.unwrap();
    assert_eq!((&transaction["archived"], &transaction["state"]), (&json!(true), &json!("settled")));

    // A folder that lacks the segment is not started on, and says what to do.
    drop(ctx);
    running.stop(std::time::Duration::from_secs(10)).await.unwrap();
    std::fs::remove_file(dir.join("segments/00000002.seg")).unwrap();
    let Err(error) = crate::start(&dir, Config::load(&dir).unwrap()).await else { panic!("started") };
    assert!(error.to_string().contains("00000002.seg is missing: restore it from the backup"), "{error}");
}
