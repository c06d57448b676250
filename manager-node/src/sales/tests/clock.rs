//! What is closed or given back by time stays so: it is not done by a clock that jumps, or was ahead at the start.

use protocol::api::{MeshRequest, SeederReport};
use protocol::certificate::SeederCert;
use protocol::clock::ClockState;

use super::shop::{Outbox, Shop, Terms};
use super::*;
use crate::tables::{SEEDERS, SeederRecord};
use crate::transactions::SaleError;
use crate::transactions::watch::{Held, Moment, Watch};

const SECOND: u64 = 1000;
const HOUR: u64 = 3600 * SECOND;
const DAY: u64 = 24 * HOUR;

/// One round of the chore, `wall` and `running` milliseconds after the start by either clock.
async fn round(shop: &Shop, watch: &mut Watch, wall: u64, running: u64) -> Option<Held> {
    let at = Moment { wall: shop.ctx.started_at + wall, running };
    chore::round(&shop.ctx, watch, at).await.unwrap()
}

#[tokio::test]
async fn a_clock_that_jumps_while_the_manager_runs_closes_nothing_and_gives_nothing_back() {
    let shop = Shop::open(Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() }).await;
    let (id, _) = shop.buy("1").await;
    let (other, _) = shop.buy("2").await;
    let reserved = shop.reserve("3").await.peek().unwrap().transaction;
    let due_at = shop.delivery(id, 1).unwrap().due_at;
    let mut watch = Watch::new(&shop.ctx.config, shop.ctx.started_at);
    assert_eq!(round(&shop, &mut watch, 5 * SECOND, 5 * SECOND).await, Some(Held::Started));
    for after in [10, 15, 20] {
        let held = round(&shop, &mut watch, 30 * DAY + after * SECOND, after * SECOND).await;
        assert!(matches!(held, Some(Held::Jumped(_))), "{held:?}");
    }
    assert_eq!((shop.state(id), shop.state(reserved)), (TransactionState::Released, TransactionState::Reserved));
    let delivery = shop.delivery(id, 1).unwrap();
    assert!(delivery.closed.is_none() && delivery.due_at == due_at);
    // Set right: everything is as it was, and goes on.
    assert_eq!(round(&shop, &mut watch, 25 * SECOND, 25 * SECOND).await, Some(Held::Started));
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
    let endorsement = shop.endorse(&shop.sale(reserved).data, "3");
    shop.sales(SalesRequest::Release { transaction: reserved, endorsement }).await.unwrap();
    shop.complete(id).await.unwrap();
    assert_eq!(shop.state(id), TransactionState::Settled);
    assert!(shop.balance_of_seeders().await > 0);

    // A clock that stays there is believed, and what is due by it is given back.
    assert_eq!(round(&shop, &mut watch, 2 * HOUR, 2 * HOUR).await, None);
    let trouble = async || shop.running.control(json!({"cmd": "status"})).await.unwrap()["trouble"].to_string();
    assert_eq!(trouble().await, "null");
    assert!(matches!(round(&shop, &mut watch, 40 * DAY, 3 * HOUR).await, Some(Held::Jumped(_))));
    assert!(trouble().await.contains("nothing is closed"), "{}", trouble().await);
    assert_eq!(shop.state(other), TransactionState::Released);
    assert_eq!(round(&shop, &mut watch, 40 * DAY + HOUR, 4 * HOUR).await, None);
    assert_eq!(shop.state(other), TransactionState::Refunded);
    shop.close().await;
}

#[tokio::test]
async fn nothing_is_closed_by_a_clock_that_seeders_say_is_ahead() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("1").await;
    let mut watch = Watch::new(&shop.ctx.config, shop.ctx.started_at);
    // It was set ahead while the manager was away: nothing else tells of it.
    let now = shop.ctx.started_at + 10 * DAY;
    for seeder in &shop.seeders {
        shop.ctx.registry.clocks.note(seeder.peer_id(), now - 10 * DAY, now);
    }
    let held = round(&shop, &mut watch, 10 * DAY, 10 * DAY).await;
    assert_eq!(held, Some(Held::Ahead(10 * DAY)));
    assert!(shop.delivery(id, 1).unwrap().closed.is_none());
    for seeder in &shop.seeders {
        shop.ctx.registry.clocks.note(seeder.peer_id(), now, now);
    }
    assert_eq!(round(&shop, &mut watch, 10 * DAY, 10 * DAY).await, None);
    assert!(shop.delivery(id, 1).unwrap().closed.is_some());
    shop.close().await;
}

/// No seeder would take the ticket, and by that clock the reservation is over already.
#[tokio::test]
async fn nothing_is_sold_by_a_clock_that_seeders_say_is_ahead() {
    let shop = Shop::open(Terms::default()).await;
    let reserved = shop.reserve("1").await.peek().unwrap().transaction;
    let endorsement = shop.endorse(&shop.sale(reserved).data, "1");
    let release = || SalesRequest::Release { transaction: reserved, endorsement: endorsement.clone() };
    let mut watch = Watch::new(&shop.ctx.config, shop.ctx.started_at);
    let tell = |by: u64, now: u64| {
        for seeder in &shop.seeders {
            shop.ctx.registry.clocks.note(seeder.peer_id(), now - by, now);
        }
    };
    tell(10 * DAY, shop.ctx.started_at + 10 * DAY);
    assert_eq!(round(&shop, &mut watch, 10 * DAY, 10 * DAY).await, Some(Held::Ahead(10 * DAY)));
    for request in [release(), SalesRequest::Reserve(shop.order("2"))] {
        let refused = shop.sales(request).await.unwrap_err();
        assert!(
            refused.code == RefusalCode::Overloaded && refused.detail.contains("the manager's clock is 10 days ahead"),
            "{refused}"
        );
        assert!(refused.retry_after_ms > 0);
    }
    let trouble = shop.running.control(json!({"cmd": "status"})).await.unwrap()["trouble"].to_string();
    assert!(trouble.contains("set the clock"), "{trouble}");

    tell(0, shop.ctx.started_at + SECOND);
    round(&shop, &mut watch, SECOND, SECOND).await;
    shop.sales(release()).await.unwrap();
    assert_eq!(shop.running.control(json!({"cmd": "status"})).await.unwrap()["trouble"], json!(null));
    shop.close().await;
}

/// A lease that begins in ten days would take the place of one that seeders take, and its delivery be closed so late.
#[tokio::test]
async fn a_clock_that_seeders_say_is_ahead_renews_and_moves_nothing_and_calls_no_shop_expired() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("1").await;
    let (lease, due_at) = (shop.sale(id).release.unwrap().lease, shop.delivery(id, 1).unwrap().due_at);
    let mut watch = Watch::new(&shop.ctx.config, shop.ctx.started_at);
    let tell = |by: u64, now: u64| {
        for seeder in &shop.seeders {
            shop.ctx.registry.clocks.note(seeder.peer_id(), now - by, now);
        }
    };
    // By its clock the lease, which seeders take for six days more, is over.
    tell(10 * DAY, shop.ctx.started_at + 10 * DAY);
    round(&shop, &mut watch, 10 * DAY, 10 * DAY).await;
    let client = shop.client.peer_id();
    let ask = |instead_of: Option<u32>, now: u64| crate::sales::mailbox::ticket(&shop.ctx, client, id, instead_of, now);
    let given = ask(None, now_ms() + 10 * DAY).unwrap();
    let MailboxResponse::Ticket(given) = given else { panic!("{given:?}") };
    assert_eq!(given.ticket.lease.digest(), lease.digest());
    let overloaded = |error: SaleError| {
        matches!(error, SaleError::Refused(refusal) if refusal.code == RefusalCode::Overloaded
            && refusal.detail.contains("the manager's clock is 10 days ahead"))
    };
    assert!(overloaded(ask(Some(1), now_ms() + 10 * DAY).unwrap_err()), "a further delivery");
    assert!(overloaded(ask(None, now_ms() + 20 * DAY).unwrap_err()), "it is over by the seeders' clocks, too");
    assert_eq!(shop.delivery(id, 1).unwrap().due_at, due_at);

    // Shops' certificates are of a year.
    tell(400 * DAY, shop.ctx.started_at + 400 * DAY);
    round(&shop, &mut watch, 400 * DAY, 400 * DAY).await;
    assert_eq!(shop.sales(SalesRequest::Reserve(shop.order("2"))).await.unwrap_err().code, RefusalCode::Overloaded);
    shop.close().await;
}

/// What is released then is over by the clock of everybody else.
#[tokio::test]
async fn nothing_is_sold_by_a_clock_that_is_behind_by_more_than_a_lease() {
    let shop = Shop::open(Terms::default()).await;
    let reserved = shop.reserve("1").await.peek().unwrap().transaction;
    let endorsement = shop.endorse(&shop.sale(reserved).data, "1");
    let requests = || {
        let endorsement = endorsement.clone();
        [SalesRequest::Release { transaction: reserved, endorsement }, SalesRequest::Reserve(shop.order("2"))]
    };
    let mut watch = Watch::new(&shop.ctx.config, shop.ctx.started_at);
    let mut tell = async |by: u64| {
        for seeder in &shop.seeders {
            shop.ctx.registry.clocks.note(seeder.peer_id(), shop.ctx.started_at + by, shop.ctx.started_at);
        }
        round(&shop, &mut watch, 0, 0).await;
    };
    tell(8 * DAY).await;
    for request in requests() {
        let refused = shop.sales(request).await.unwrap_err();
        assert!(
            refused.code == RefusalCode::Overloaded && refused.detail.contains("the manager's clock is 8 days behind"),
            "{refused}"
        );
    }
    // Of what is released an hour late others take seven days less one hour.
    tell(HOUR).await;
    for request in requests() {
        shop.sales(request).await.unwrap();
    }
    shop.close().await;
}

/// What comes in once the clock is set right would be dated before the time of which it was signed that nothing had.
#[tokio::test]
async fn no_non_delivery_is_signed_by_a_clock_that_is_known_to_be_ahead() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("1").await;
    let dir = tempfile::tempdir().unwrap();
    let asked = async |n: u32| {
        let path = dir.path().join(format!("evidence-{n}"));
        shop.control(json!({"cmd": "evidence", "id": id, "path": path, "non_delivery": true})).await
    };
    let tell = |by: u64| {
        for seeder in &shop.seeders {
            shop.ctx.registry.clocks.note(seeder.peer_id(), now_ms() - by, now_ms());
        }
    };
    tell(DAY);
    assert_eq!(asked(1).await.unwrap_err(), "wrong-state");
    tell(0);
    asked(2).await.unwrap();

    let mut watch = Watch::new(&shop.ctx.config, shop.ctx.started_at);
    assert!(matches!(round(&shop, &mut watch, 10 * DAY, 10 * SECOND).await, Some(Held::Jumped(_))));
    assert_eq!(asked(3).await.unwrap_err(), "wrong-state");
    // That it has just started is nothing against its clock.
    assert_eq!(round(&shop, &mut watch, 11 * SECOND, 11 * SECOND).await, Some(Held::Started));
    asked(4).await.unwrap();
    shop.close().await;
}

/// By such a clock the certificates of all seeders are over, or have not begun: what they say of it counts all the same.
#[tokio::test]
async fn a_clock_that_is_off_by_more_than_certificates_last_is_known_to_be() {
    let shop = Shop::open(Terms::default()).await;
    let ctx = &shop.ctx;
    for seeder in &shop.seeders {
        let peer = seeder.peer_id();
        let record = ctx.registry.seeder(&peer).unwrap().unwrap();
        let cert = SeederCert { until: now_ms() - 10 * DAY, ..record.cert.peek().unwrap() };
        let record = SeederRecord { cert: ctx.keys.sign(KeyPurpose::Enrolment, &cert), ..record };
        ctx.db.write(move |txn| SEEDERS.put(txn, &peer, &record)).await.unwrap();
        let report = SeederReport { now: now_ms() - 20 * DAY, first: true, ..SeederReport::default() };
        let refused = shop.running.mesh(peer, MeshRequest::Report(report)).await.unwrap_err();
        assert_eq!(refused.code, RefusalCode::Expired);
    }
    let state = ctx.registry.clocks.state(now_ms(), ctx.config.clock_grace_ms);
    assert!(matches!(state, ClockState::Ahead(by) if by.abs_diff(20 * DAY) < HOUR), "{state}");
    shop.close().await;
}

#[tokio::test]
async fn a_clock_that_was_ahead_at_the_start_leaves_no_time_in_the_far_future() {
    for restored in [false, true] {
        let config = Config { close_grace_ms: 60 * SECOND, ..Terms::default().config };
        let shop = Shop::open(Terms { lease_ms: 1, config, ..Terms::default() }).await;
        let (id, _) = shop.buy("1").await;
        Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..4)]).await;
        wait_past(shop.delivery(id, 1).unwrap().due_at - shop.ctx.config.close_grace_ms).await;
        let shop = Box::pin(async move { if restored { shop.restored().await } else { shop.crash().await } }).await;
        let due_at = shop.delivery(id, 1).unwrap().due_at;

        let mut watch = Watch::new(&shop.ctx.config, shop.ctx.started_at + 365 * DAY);
        assert_eq!(round(&shop, &mut watch, 365 * DAY + 1, 1).await, Some(Held::Started));
        assert_eq!(shop.delivery(id, 1).unwrap().due_at, due_at, "restored: {restored}");
        // NTP has put it right.
        let late = 61 * SECOND;
        assert_eq!(round(&shop, &mut watch, late, late).await, None);
        let closed = shop.delivery(id, 1).unwrap().closed.expect("it is due");
        assert_eq!(closed.at, shop.ctx.started_at + late);
        assert!(shop.balance_of_seeders().await > 0, "restored: {restored}");
        shop.close().await;
    }
}

#[tokio::test]
async fn however_often_a_heartbeat_is_asked_for_its_time_is_the_clocks() {
    let shop = Shop::open(Terms::default()).await;
    let beat = || crate::news::sign_heartbeat(&shop.ctx).unwrap().peek().unwrap();
    for _ in 0..500 {
        let at = beat().at;
        assert!(at <= now_ms(), "{at}");
    }
    // What is new is said at once.
    let before = beat();
    shop.buy("o").await;
    let after = beat();
    assert!(after.at > before.at && after.audit != before.audit);
    shop.close().await;
}
