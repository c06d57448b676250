//! Statements and evidence through a real manager: every receipt has a line with its fate, every unit of pay comes out
//! of the lines, and what is exported proves itself with the root key alone.

use protocol::evidence::{Claimant, EvidencePack, Exporter, StatementFile, check_statements};
use protocol::receipt::{DeliveryId, Receipt};
use protocol::statement::{ReceiptFate, ReceiptLine, Statement, Unlisted};
use protocol::trust::KeyPurpose;
use protocol::{ChunkSet, Digest, PeerId, Signed, TransactionId};
use serde_json::json;
use store::WriteTransaction;

use super::{Books, MAX_OPEN, after, explain, make, receipts, step};
use crate::context::now_ms;
use crate::sales::tests::shop::{CHUNK, Outbox, Shop, Terms, random_key};
use crate::sales::tests::wait_past;

fn taken(shop: &Shop, seeder: PeerId, after_number: u64) -> Signed<Statement> {
    after(&shop.ctx, seeder, after_number).unwrap().unwrap()
}

fn open(signed: &Signed<Statement>) -> Statement {
    signed.peek().unwrap()
}

/// Money in one currency: earned with one delivery by seeders 0 and 1, as the receipts test does.
async fn sold(shop: &Shop) -> TransactionId {
    let (id, _) = shop.buy("o").await;
    let (mut a, mut b) = (Outbox::of(shop, 0), Outbox::of(shop, 1));
    let eve = random_key();
    let unknown = DeliveryId { transaction: TransactionId::from_bytes([4; 16]), delivery: 1 };
    let seeder = shop.seeders[0].peer_id();
    let of = |ack| Receipt { ack, completion: None, first_at: 1, last_at: 2 };
    let forged = of(shop.ack(&eve, DeliveryId { transaction: id, delivery: 1 }, seeder, ChunkSet::from_range(0..3)));
    let foreign = of(shop.ack(&shop.client, unknown, seeder, ChunkSet::from_range(0..3)));
    a.send(shop, vec![shop.receipt(id, 0, 0..4), shop.receipt(id, 0, 0..2), forged, foreign]).await;
    b.send(shop, vec![shop.receipt(id, 1, 4..10)]).await;
    id
}

#[tokio::test]
async fn every_receipt_and_every_unit_of_pay_has_a_line() {
    let shop = Shop::open(Terms::default()).await;
    let id = sold(&shop).await;
    let seeder = shop.seeders[0].peer_id();
    assert_eq!(make(&shop.ctx, seeder, now_ms()).unwrap(), 1);
    let signed = taken(&shop, seeder, 0);
    let first = open(&signed);
    first.check().unwrap();
    let fates: Vec<&str> = first.receipts.iter().map(|line| line.fate.as_str()).collect();
    assert_eq!(fates, ["accepted", "duplicate", "rejected", "unknown"]);
    // The list of receipts, newest first, has the same names, but that what was accepted is counted there.
    let listed = shop.control(json!({"cmd": "receipts"})).await.unwrap();
    let listed = listed["receipts"].as_array().unwrap().iter().rev().filter(|line| line["seeder"] == json!(seeder));
    assert_eq!(
        listed.map(|line| line["status"].as_str().unwrap()).collect::<Vec<_>>(),
        ["counted", "duplicate", "rejected", "unknown"]
    );
    let [earning] = &first.earnings[..] else { panic!("{first:?}") };
    assert_eq!((earning.delivery.transaction, earning.bytes), (id, 4 * u64::from(CHUNK)));
    // 4 chunks of 64 KiB at 10 minor units a MiB: two and a half.
    let [usd] = &first.balances[..] else { panic!("{first:?}") };
    assert_eq!((usd.before, usd.credited, usd.paid, usd.after), (0, 2, 0, 2));
    assert_eq!(usd.carried_after, protocol::statement::PARTS_PER_MINOR / 2);
    let [covered] = &first.covered[..] else { panic!("{first:?}") };
    assert_eq!(covered.number, 1);
    // Nothing new: no further statement, and none after a number that was never given.
    assert_eq!(make(&shop.ctx, seeder, now_ms()).unwrap(), 1);
    assert!(after(&shop.ctx, seeder, 1).unwrap().is_none());
    assert!(after(&shop.ctx, seeder, 2).is_err());

    let paid = json!({
        "cmd": "record-payment", "account": "seeder", "party": seeder, "minor": 2, "currency": "USD", "reference": "t",
    });
    shop.control(paid).await.unwrap();
    shop.control(json!({"cmd": "statements-make"})).await.unwrap();
    let second = open(&taken(&shop, seeder, 1));
    second.follows(&first, signed.digest()).unwrap();
    assert_eq!((second.payments[0].minor, second.balances[0].after), (2, 0));
    let payouts = shop.control(json!({"cmd": "payouts"})).await.unwrap();
    let lines = payouts["payouts"].as_array().unwrap();
    let line = lines.iter().find(|line| line["seeder"] == json!(seeder)).unwrap();
    assert_eq!(
        (&line["owed_minor"], &line["stated_minor"], &line["carried_micros"]),
        (&json!(0), &json!(0), &json!(500_000))
    );
    // The other seeder's numbers are its own.
    assert_eq!(open(&taken(&shop, shop.seeders[1].peer_id(), 0)).number, 1);
    let listed = shop.control(json!({"cmd": "statements", "seeder": seeder})).await.unwrap();
    assert_eq!(listed["statements"].as_array().unwrap().len(), 2);
    shop.close().await;
}

#[tokio::test]
async fn whoever_has_no_statement_may_ask_and_leaves_nothing_behind() {
    let shop = Shop::open(Terms::default()).await;
    for stranger in [random_key().peer_id(), shop.seeders[0].peer_id()] {
        assert!(after(&shop.ctx, stranger, 0).unwrap().is_none());
    }
    let noted = || shop.ctx.db.read(|txn| super::renew::FOUND_GOOD.len(txn)).unwrap();
    assert_eq!(noted(), 0);
    // Of who has some it is noted that they hold.
    sold(&shop).await;
    let seeder = shop.seeders[0].peer_id();
    make(&shop.ctx, seeder, now_ms()).unwrap();
    taken(&shop, seeder, 0);
    assert_eq!(noted(), 1);
    shop.close().await;
}

#[tokio::test]
async fn a_list_that_is_longer_than_a_page_says_where_it_goes_on() {
    let shop = Shop::open(Terms::default()).await;
    for n in 0..2 {
        let (id, _) = shop.buy(&format!("{n}")).await;
        for seeder in 0..3 {
            Outbox::of(&shop, seeder).send(&shop, vec![shop.receipt(id, seeder, 0..4)]).await;
        }
        shop.control(json!({"cmd": "statements-make"})).await.unwrap();
    }
    let pages = async |mut request: serde_json::Value, name: &str, field: &str| {
        let mut found = Vec::new();
        loop {
            let answer = shop.running.control(request.clone()).await.unwrap();
            let lines = answer[name].as_array().unwrap();
            found.push(lines.iter().map(|line| line[field].clone()).collect::<Vec<_>>());
            if answer["next"].is_null() {
                return found;
            }
            request["after"] = answer["next"].clone();
        }
    };
    let mut peers: Vec<_> = shop.seeders.iter().map(|seeder| seeder.peer_id()).collect();
    peers.sort();
    let peers: Vec<_> = peers.iter().map(|peer| json!(peer)).collect();
    for (cmd, field) in [("seeders", "peer"), ("statements", "seeder")] {
        let found = pages(json!({"cmd": cmd, "limit": 2}), cmd, field).await;
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1], "{cmd}");
        assert_eq!(found.concat(), peers, "{cmd}");
    }
    let of_one = json!({"cmd": "statements", "seeder": peers[0], "limit": 1});
    assert_eq!(pages(of_one, "statements", "number").await, [[json!(2)], [json!(1)]]);
    assert_eq!(pages(json!({"cmd": "merchants"}), "merchants", "peer").await.len(), 1);
    // The ledger from its newest posting on.
    let whole = shop.control(json!({"cmd": "ledger"})).await.unwrap();
    let numbers = |answer: &serde_json::Value| -> Vec<u64> {
        answer["postings"].as_array().unwrap().iter().map(|line| line["number"].as_u64().unwrap()).collect()
    };
    let (all, mut found, mut before) = (numbers(&whole), Vec::new(), json!(null));
    assert_eq!((&whole["next"], &whole["posting_count"]), (&json!(null), &json!(all.len())));
    loop {
        let page = shop.control(json!({"cmd": "ledger", "limit": 1, "before": before})).await.unwrap();
        found.splice(0..0, numbers(&page));
        before = page["next"].clone();
        if before.is_null() {
            break;
        }
    }
    assert_eq!(found, all);
    shop.close().await;
}

#[tokio::test]
async fn statements_are_proven_offline_and_a_changed_one_is_named() {
    let shop = Shop::open(Terms::default()).await;
    sold(&shop).await;
    shop.control(json!({"cmd": "statements-make"})).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("statements");
    let seeder = shop.seeders[0].peer_id();
    let asked = json!({"cmd": "statement-file", "seeder": seeder, "path": path});
    shop.control(asked.clone()).await.unwrap();
    assert!(shop.control(asked).await.is_err(), "a file that is there is not replaced");
    let bytes = std::fs::read(&path).unwrap();
    let root = shop.ctx.trust().root();
    let file = StatementFile::from_bytes(&bytes).unwrap();
    let (lines, good) = check_statements(&file, &root);
    assert!(lines.iter().all(|line| line.problem.is_none()), "{lines:?}");
    assert_eq!(good.len(), 1);
    let (lines, good) = check_statements(&file, &random_key().peer_id());
    assert!(good.is_empty() && lines.iter().all(|line| line.problem.is_some()), "{lines:?}");
    let mut forged = file.clone();
    let mut statement = open(&forged.statements[0]);
    statement.receipts.clear();
    forged.statements[0] = forged.statements[0].with_body_forged(&statement);
    let (lines, good) = check_statements(&forged, &root);
    assert!(good.is_empty() && lines[1].section == "statement 1" && lines[1].problem.is_some());
    shop.close().await;
}

#[tokio::test]
async fn the_fate_of_a_receipt_is_told_to_its_seeder_alone() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let (a, b) = (shop.seeders[0].peer_id(), shop.seeders[1].peer_id());
    let mut outbox = Outbox::of(&shop, 0);
    let one = shop.receipt(id, 0, 0..4);
    outbox.send(&shop, vec![one.clone()]).await;
    outbox.send(&shop, vec![one.clone()]).await;
    let told = explain(&shop.ctx, a, one.id()).unwrap();
    assert_eq!((told.line.fate.clone(), told.repeats, told.statement), (ReceiptFate::Accepted, 1, None));
    assert!(told.earning.is_none() && told.due_at.is_some(), "{told:?}");
    assert!(explain(&shop.ctx, b, one.id()).is_err());
    assert!(explain(&shop.ctx, a, Digest::from_bytes([1; 32])).is_err());
    outbox.send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
    make(&shop.ctx, a, now_ms()).unwrap();
    let told = explain(&shop.ctx, a, one.id()).unwrap();
    assert_eq!((told.statement, told.earning.as_ref().unwrap().bytes), (Some(1), 10 * u64::from(CHUNK)));
    assert!(told.summary().contains("in statement 1"), "{}", told.summary());
    // The same bytes again are counted without a line.
    assert_eq!(open(&taken(&shop, a, 0)).unlisted, Unlisted { duplicate: 1, rejected: 0 });
    shop.close().await;
}

#[tokio::test]
async fn what_earns_nothing_cannot_fill_the_disk_and_long_periods_make_several_statements() {
    let shop = Shop::open(Terms::default()).await;
    let seeder = shop.seeders[2].peer_id();
    let line = |n: u64, fate| ReceiptLine {
        receipt: Digest::of("test", &[&n.to_le_bytes()]),
        delivery: None,
        at: n,
        chunks: 0,
        new_chunks: 0,
        fate,
    };
    let many = MAX_OPEN + 100;
    shop.ctx
        .db
        .write(move |txn| receipts(txn, &seeder, (0..many).map(|n| line(n, ReceiptFate::Unknown)).collect()))
        .await
        .unwrap();
    let books: Books = shop.ctx.db.read(|txn| super::BOOKS.get(txn, &seeder)).unwrap().unwrap();
    assert_eq!((books.next, books.unlisted.rejected), (MAX_OPEN, 100));
    let last = make(&shop.ctx, seeder, now_ms()).unwrap();
    assert_eq!(last, MAX_OPEN / Statement::MAX_LINES as u64);
    let mut chain: Vec<Signed<Statement>> = (0..last).map(|n| taken(&shop, seeder, n)).collect();
    for pair in chain.windows(2) {
        open(&pair[1]).follows(&open(&pair[0]), pair[0].digest()).unwrap();
    }
    let told: u64 = chain.iter().map(|signed| open(signed).totals().unknown + open(signed).totals().rejected).sum();
    assert_eq!(told, many);
    chain.remove(1);
    let keys = vec![shop.ctx.trust().signed_key_set().clone()];
    let (lines, good) =
        check_statements(&StatementFile { key_sets: keys, statements: chain }, &shop.ctx.trust().root());
    assert_eq!(good.len(), 1, "{lines:?}");
    assert!(lines[2].problem.as_ref().unwrap().contains("gap"));
    shop.close().await;
}

#[tokio::test]
async fn a_chain_that_is_longer_than_a_file_goes_on_in_the_files_that_are_named() {
    let shop = Shop::open(Terms::default()).await;
    let seeder = shop.seeders[0].peer_id();
    let (total, begin) = (StatementFile::MOST as u64 + 3, now_ms());
    let noted = async |n: u64| {
        let line = ReceiptLine {
            receipt: Digest::of("test", &[&n.to_le_bytes()]),
            delivery: None,
            at: begin,
            chunks: 0,
            new_chunks: 0,
            fate: ReceiptFate::Unknown,
        };
        shop.ctx.db.write(move |txn| receipts(txn, &seeder, vec![line.clone()])).await.unwrap();
    };
    noted(1).await;
    assert_eq!(make(&shop.ctx, seeder, begin).unwrap(), 1);
    // What years would make, at once: statements of periods in which nothing came in.
    let mut last = taken(&shop, seeder, 0);
    let quiet: Vec<Signed<Statement>> = (2..total)
        .map(|number| {
            let before = open(&last);
            let (from, until, previous) = (before.until, before.until + 1, Some(last.digest()));
            let next = Statement { number, previous, from, until, issued_at: until, receipts: Vec::new(), ..before };
            last = shop.ctx.keys.sign(KeyPurpose::Settlement, &next);
            last.clone()
        })
        .collect();
    let newest = open(&last);
    let write = move |txn: &WriteTransaction<'_>| {
        quiet.iter().zip(2..).try_for_each(|(signed, n)| super::STATEMENTS.put(txn, &(seeder, n), signed))?;
        let books = super::BOOKS.get(txn, &seeder)?.unwrap();
        let last = quiet.last().map(Signed::digest);
        super::BOOKS.put(txn, &seeder, &Books { number: newest.number, last, until: newest.until, ..books })
    };
    shop.ctx.db.write(write).await.unwrap();
    noted(2).await;
    assert_eq!(make(&shop.ctx, seeder, begin + 2 * total).unwrap(), total);
    let folder = tempfile::tempdir().unwrap();
    let root = shop.ctx.trust().root();
    let exported = async |name: &str| {
        let (mut chain, mut first, mut sizes): (Vec<Signed<Statement>>, _, _) = (Vec::new(), json!(null), Vec::new());
        loop {
            let path = folder.path().join(format!("{name}-{}", sizes.len()));
            let asked = json!({"cmd": "statement-file", "seeder": seeder, "path": path, "first": first});
            let said = shop.control(asked).await.unwrap();
            let bytes = std::fs::read(&path).unwrap();
            assert!(bytes.len() <= StatementFile::MAX_BYTES);
            let file = StatementFile::from_bytes(&bytes).unwrap();
            let (lines, good) = check_statements(&file, &root);
            assert!(lines.iter().all(|line| line.problem.is_none()), "{lines:?}");
            let numbers: Vec<u64> = good.iter().map(|statement| statement.number).collect();
            assert_eq!((json!(numbers[0]), json!(numbers.last())), (said["first"].clone(), said["last"].clone()));
            sizes.push(numbers.len());
            chain.extend(file.statements);
            first = said["next"].clone();
            if first.is_null() {
                return (chain, sizes);
            }
        }
    };
    let (chain, sizes) = exported("store").await;
    assert_eq!(sizes, [StatementFile::MOST, 3]);
    assert_eq!(open(&chain[0]).number, 1);
    for pair in chain.windows(2) {
        open(&pair[1]).follows(&open(&pair[0]), pair[0].digest()).unwrap();
    }
    // A chain of that length is one of years: all of it but the newest lies in segments then, and is the same.
    step(&shop.ctx, begin + 100 * 24 * 60 * 60 * 1000).unwrap();
    assert_eq!(shop.ctx.db.read(|txn| super::STATEMENTS.len(txn)).unwrap(), 1);
    let (again, sizes) = exported("segments").await;
    assert!(again == chain && sizes == [StatementFile::MOST, 3]);
    // After the last there is none, and that is said.
    let path = folder.path().join("none");
    let asked = json!({"cmd": "statement-file", "seeder": seeder, "path": path, "first": total + 1});
    assert_eq!(shop.control(asked).await.unwrap_err(), "wrong-state");
    assert!(!path.exists());
    shop.close().await;
}

#[tokio::test]
async fn evidence_of_a_sale_is_proven_with_the_root_key_alone() {
    let shop = Shop::open(Terms::default()).await;
    let id = sold(&shop).await;
    shop.complete(id).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("evidence");
    let said = shop.control(json!({"cmd": "evidence", "id": id, "path": path})).await.unwrap();
    assert_eq!(said["acknowledgements"], 2);
    let root = shop.ctx.trust().root();
    let pack = EvidencePack::from_bytes(&std::fs::read(&path).unwrap()).unwrap();
    let report = pack.verify(&root);
    assert!(report.ok, "{report:#?}");
    assert_eq!(report.by, Exporter::Manager);
    let facts = &report.facts;
    assert_eq!((facts.client, facts.product), (Some(shop.client.peer_id()), Some(shop.product)));
    assert_eq!(facts.received.acknowledged_bytes, Some(10 * u64::from(CHUNK)));
    assert!(facts.endorsed && facts.released && facts.received.completed_at.is_some());
    assert_eq!(facts.seeders.len(), 2);
    let claims = |by| report.lines.iter().filter(|line| line.claimed_by == by).count();
    assert_eq!((claims(Claimant::ClientSigned), claims(Claimant::MerchantSigned)), (3, 1));
    // Another network's root key proves nothing of it.
    assert!(!pack.verify(&random_key().peer_id()).ok);
    // The opposite is refused now, and so is a time before the sale, of which there is nothing to say.
    let opposite = |id, by: u64| {
        let path = folder.path().join("n");
        json!({"cmd": "evidence", "id": id, "path": path, "non_delivery": true, "by": by})
    };
    let formed_at = facts.formed_at.unwrap();
    assert_eq!(shop.control(opposite(id, now_ms())).await.unwrap_err(), "wrong-state");
    assert_eq!(shop.control(opposite(id, now_ms() + 60_000)).await.unwrap_err(), "not-yet-valid");
    for before in [0, 5, formed_at - 1] {
        assert_eq!(shop.control(opposite(id, before)).await.unwrap_err(), "wrong-state", "{before}");
    }
    // It was true between the sale and the first that came in.
    let (other, envelope) = shop.buy("other").await;
    let formed_at = envelope.ticket.data.peek().unwrap().formed_at;
    wait_past(formed_at).await;
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(other, 0, 0..2)]).await;
    shop.control(opposite(other, formed_at)).await.unwrap();
    let pack = EvidencePack::from_bytes(&std::fs::read(folder.path().join("n")).unwrap()).unwrap();
    assert_eq!(pack.verify(&root).facts.nothing_acknowledged_by, Some(formed_at));
    shop.close().await;
}

#[tokio::test]
async fn the_manager_signs_that_nothing_came_in_and_gives_a_merchant_its_own_evidence_only() {
    use protocol::api::{SalesRequest, SalesResponse};
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("n");
    let asked = json!({"cmd": "evidence", "id": id, "path": path, "non_delivery": true});
    shop.control(asked).await.unwrap();
    let pack = EvidencePack::from_bytes(&std::fs::read(&path).unwrap()).unwrap();
    let report = pack.verify(&shop.ctx.trust().root());
    assert!(report.ok && report.facts.nothing_acknowledged_by.is_some(), "{report:#?}");
    let asked = SalesRequest::Evidence { transaction: id };
    let SalesResponse::Evidence(bytes) = shop.sales(asked.clone()).await.unwrap() else { panic!() };
    assert!(EvidencePack::from_bytes(&bytes).unwrap().verify(&shop.ctx.trust().root()).ok);
    let rival = random_key();
    shop.enrol_merchant(&rival).await;
    assert_eq!(shop.sales_as(&rival, asked).await.unwrap_err().code.as_str(), "not-your-reservation");
    shop.close().await;
}

#[tokio::test]
async fn what_is_counted_after_the_manager_signed_that_nothing_came_in_is_dated_after_it() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("n");
    // A batch came in, and waits to be counted.
    let came_in = now_ms();
    wait_past(came_in).await;
    let asked = json!({"cmd": "evidence", "id": id, "path": path, "non_delivery": true});
    shop.control(asked.clone()).await.unwrap();
    let pack = EvidencePack::from_bytes(&std::fs::read(&path).unwrap()).unwrap();
    let by = pack.verify(&shop.ctx.trust().root()).facts.nothing_acknowledged_by.unwrap();
    shop.ctx.db.write(move |txn| crate::evidence::heard(txn, id, came_in)).await.unwrap();
    let first = shop.ctx.db.read(|txn| crate::evidence::first_at(txn, &id)).unwrap().unwrap();
    assert!(came_in <= by && by < first, "{came_in} {by} {first}");
    assert!(shop.control(asked).await.is_err());
    shop.close().await;
}

#[tokio::test]
async fn what_a_client_signed_is_heard_whether_it_counts_or_not() {
    let shop = Shop::open(Terms::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("n");
    let nothing_came = async |id: TransactionId| {
        let asked = json!({"cmd": "evidence", "id": id, "path": path, "non_delivery": true});
        let said = shop.control(asked).await;
        if said.is_ok() {
            std::fs::remove_file(&path).unwrap();
        }
        said.map(drop)
    };
    let heard = Err("wrong-state".to_owned());
    let mut outbox = Outbox::of(&shop, 0);
    let seeder = shop.seeders[0].peer_id();

    // Not to be counted as it stands: past the end of the content; with a completion that somebody else signed.
    let (outside, _) = shop.buy("outside").await;
    let delivery = DeliveryId { transaction: outside, delivery: 1 };
    let past = protocol::ChunkSet::from_range(8..11);
    let of = |ack| Receipt { ack, completion: None, first_at: 1, last_at: 2 };
    let forged = of(shop.ack(&random_key(), delivery, seeder, past.clone()));
    outbox.send(&shop, vec![forged]).await;
    assert_eq!(nothing_came(outside).await, Ok(()), "a stranger's word is none of the client's");
    outbox.send(&shop, vec![of(shop.ack(&shop.client, delivery, seeder, past))]).await;
    assert_eq!(nothing_came(outside).await, heard);
    let (forged, _) = shop.buy("forged").await;
    let completion = shop.completion(DeliveryId { transaction: forged, delivery: 1 }).peek().unwrap();
    let completion = Some(protocol::Signed::sign(&completion, &random_key()));
    outbox.send(&shop, vec![Receipt { completion, ..shop.receipt(forged, 0, 0..3) }]).await;
    assert_eq!(nothing_came(forged).await, heard);

    // Too late: the delivery is closed. It is not paid, and it was said.
    let (late, _) = shop.buy("late").await;
    let (archived, _) = shop.buy("archived").await;
    let closed_at = now_ms() + 365 * 86_400_000;
    shop.running.run_due(closed_at).await.unwrap();
    assert_eq!(shop.state(late), protocol::api::TransactionState::Settled);
    assert_eq!(nothing_came(late).await, Ok(()));
    let completion = Some(shop.completion(DeliveryId { transaction: late, delivery: 1 }));
    outbox.send(&shop, vec![Receipt { completion, ..shop.receipt(late, 0, 0..8) }]).await;
    assert_eq!(shop.delivery(late, 1).unwrap().closed.unwrap().charged, 0);
    assert_eq!(nothing_came(late).await, heard);
    let report = crate::evidence::pack(&shop.ctx, late, now_ms()).unwrap().verify(&shop.ctx.trust().root());
    assert!(report.ok, "{report:#?}");
    assert_eq!(report.facts.received.acknowledged_bytes, Some(8 * u64::from(CHUNK)));
    assert_eq!(report.lines.iter().filter(|line| line.claimed_by == Claimant::ClientSigned).count(), 2);

    // The same of one that moved out of the store in between, before and after it is back.
    shop.running.run_due(closed_at + shop.ctx.config.archive_ms + 1).await.unwrap();
    assert_eq!(nothing_came(archived).await, Ok(()));
    outbox.send(&shop, vec![shop.receipt(archived, 0, 0..8)]).await;
    let shown = shop.control(json!({"cmd": "transaction", "id": archived})).await.unwrap();
    assert_eq!(shown["archived"], true);
    assert_eq!(nothing_came(archived).await, heard);
    for id in [archived, late] {
        shop.control(json!({"cmd": "refund", "id": id})).await.unwrap();
        assert_eq!(nothing_came(id).await, heard);
    }

    // Of a sale that was taken back: its completion changes nothing, and it was said.
    let (refunded, _) = shop.buy("refunded").await;
    shop.control(json!({"cmd": "refund", "id": refunded})).await.unwrap();
    assert_eq!(nothing_came(refunded).await, Ok(()));
    let completion = shop.completion(DeliveryId { transaction: refunded, delivery: 1 });
    let of = |completion| protocol::api::MailboxRequest::Complete { completion };
    let eve = random_key();
    let hers = protocol::Signed::sign(&completion.peek().unwrap(), &eve);
    assert!(shop.mailbox_as(&eve, of(hers)).await.is_err());
    assert_eq!(nothing_came(refunded).await, Ok(()));
    assert!(shop.mailbox_as(&shop.client, of(completion)).await.is_err());
    assert_eq!(nothing_came(refunded).await, heard);

    // Taken in while this manager's clock was ahead.
    let (ahead, _) = shop.buy("ahead").await;
    let tomorrow = now_ms() + 86_400_000;
    shop.ctx.db.write(move |txn| crate::evidence::heard(txn, ahead, tomorrow)).await.unwrap();
    assert_eq!(nothing_came(ahead).await, heard);
    shop.close().await;
}

/// Old statements are moved out while they are signed again: what was read before is void.
#[tokio::test]
async fn a_statement_that_was_signed_again_while_it_moved_out_stays_as_it_is_now() {
    let shop = Shop::open(Terms::default()).await;
    sold(&shop).await;
    let seeder = shop.seeders[0].peer_id();
    make(&shop.ctx, seeder, now_ms()).unwrap();
    let old = taken(&shop, seeder, 0);
    let again = shop.ctx.keys.sign(KeyPurpose::Settlement, &Statement { issued_at: now_ms() + 1, ..open(&old) });
    let moved = |read: &Signed<Statement>, stored: &Signed<Statement>| {
        let (read, stored) = (read.clone(), stored.clone());
        let record = (crate::archive::Kind::Statement, protocol::codec::encode(&read));
        let rows = move |txn: &WriteTransaction<'_>, places: &[crate::archive::Place]| {
            super::STATEMENTS.put(txn, &(seeder, 1), &stored)?;
            super::make::moved_out(txn, &(seeder, 1), &read, &places[0])
        };
        shop.ctx.archive.move_out(&shop.ctx.db, &[record], rows).unwrap();
        shop.ctx.db.read(|txn| super::STATEMENTS.contains(txn, &(seeder, 1))).unwrap()
    };
    let stored = || shop.ctx.db.read(|txn| super::get(&shop.ctx.archive, txn, seeder, 1)).unwrap().unwrap();
    assert!(moved(&old, &again), "it stays");
    assert_eq!(stored(), again);
    assert!(!moved(&again, &again), "it moved");
    assert_eq!(stored(), again);
    shop.close().await;
}

/// Statements are signed again while the keys change once more: by those that are in force then, and not for ever.
#[tokio::test]
async fn signing_again_ends_when_the_keys_change_meanwhile() {
    use std::sync::{Arc, mpsc};
    use std::time::Duration;
    let shop = Shop::open(Terms::default()).await;
    sold(&shop).await;
    let seeder = shop.seeders[0].peer_id();
    assert_eq!(make(&shop.ctx, seeder, now_ms()).unwrap(), 1);
    // Not as a seeder asks for it, which has it signed again.
    let stored = || shop.ctx.db.read(|txn| super::get(&shop.ctx.archive, txn, seeder, 1)).unwrap().unwrap();
    let first = stored();
    // Two key sets, each of which gives up the settlement key of the one before.
    let next = async || {
        let stolen = json!({"cmd": "keys-prepare", "purpose": "settlement", "stolen": true, "margin_ms": 0});
        let prepared = shop.running.control(stolen).await.unwrap();
        let request: Vec<u8> = serde_json::from_value(prepared["request"].clone()).unwrap();
        let signed = crate::rotate::sign_key_set(&request, &shop.ctx.dir.join("root.key"), None).unwrap();
        let mut trust = protocol::trust::Trust::clone(&shop.ctx.trust());
        trust.update(protocol::codec::decode(&signed).unwrap()).unwrap();
        trust
    };
    *shop.ctx.trust.write().unwrap() = Arc::new(next().await);
    let (ctx, (done, ended)) = (Arc::clone(&shop.ctx), mpsc::channel());
    let later = now_ms() + 1;
    // A thread of its own: one that does not end holds up no runtime.
    std::thread::spawn(move || done.send(super::renew::renew_void(&ctx, seeder, later).is_ok()));
    let begun = async {
        while stored() == first {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), begun).await.unwrap();
    let trust = next().await;
    let keys = crate::keys::ManagerKeys::fitting(&shop.ctx.dir, &trust).unwrap();
    let active = trust.active_key(KeyPurpose::Settlement).unwrap();
    shop.ctx.keys.replace(keys);
    *shop.ctx.trust.write().unwrap() = Arc::new(trust);
    assert_eq!(ended.recv_timeout(Duration::from_secs(20)), Ok(true));
    assert_eq!(stored().signer(), active);
    shop.close().await;
}
