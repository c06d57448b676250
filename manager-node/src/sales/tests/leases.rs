//! How long the paid delivery of a purchase goes on, and how many further ones there are: whoever asks again and again is
//! bounded, and whoever needs long, or fetches again, goes on.

use protocol::TransactionId;

use super::shop::{Outbox, Shop, Terms};
use super::*;
use crate::sales::{blocking, mailbox};
use crate::transactions::PAID_DELIVERY;

const DAY: u64 = 86_400_000;

/// What its client gets who asks for its ticket at `now`.
async fn ticket_at(shop: &Shop, id: TransactionId, now: u64) -> Result<Lease, Refusal> {
    let client = shop.client.peer_id();
    lease_of(blocking(&shop.ctx, move |ctx| mailbox::ticket(ctx, client, id, None, now)).await?)
}

fn lease_of(answer: MailboxResponse) -> Result<Lease, Refusal> {
    match answer {
        MailboxResponse::Ticket(envelope) => Ok(envelope.ticket.lease.peek().unwrap()),
        other => panic!("{other:?}"),
    }
}

async fn instead_of(shop: &Shop, transaction: TransactionId, delivery: u32) -> Result<Lease, Refusal> {
    let request = MailboxRequest::Ticket { transaction, instead_of: Some(delivery) };
    lease_of(shop.mailbox_as(&shop.client, request).await?)
}

/// Its disk broke half-way: what was acknowledged does not come again in the same delivery.
#[tokio::test]
async fn whoever_lost_a_download_half_way_gets_a_further_delivery_and_the_first_is_paid_as_ever() {
    let shop = Shop::open(Terms::default()).await;
    let origin = shop.seeders[2].peer_id();
    shop.ctx.registry.set_origin(origin).await.unwrap();
    let (id, envelope) = shop.buy("o").await;
    let first = envelope.ticket.lease.peek().unwrap();
    let mut outbox = Outbox::of(&shop, 0);
    outbox.send(&shop, vec![shop.receipt(id, 0, 0..9)]).await;
    // Of a delivery that is not the newest it says nothing.
    assert_eq!(instead_of(&shop, id, 7).await.unwrap(), first);
    let further = instead_of(&shop, id, PAID_DELIVERY).await.unwrap();
    assert_eq!((further.delivery, further.generation), (2, first.generation));
    assert_eq!((further.rate, further.ceiling, further.sources.clone()), (0, 0, vec![origin]));
    // Asked again, since the answer was lost on its way: the same.
    assert_eq!(instead_of(&shop, id, PAID_DELIVERY).await.unwrap(), further);
    assert_eq!(ticket_at(&shop, id, further.start).await.unwrap(), further);
    // The first one is still open for what its seeders have, and no longer than it was.
    let due = shop.delivery(id, PAID_DELIVERY).unwrap().due_at;
    assert_eq!(due, first.end + shop.ctx.config.close_grace_ms);
    outbox.send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
    assert!(shop.delivery(id, PAID_DELIVERY).unwrap().closed.is_some());
    assert!(shop.balance_of_seeders().await > 0);
    assert_eq!((shop.balance("escrow").await, shop.state(id)), (0, TransactionState::Settled));
    // How many there may be is bounded as ever.
    let mut number = further.delivery;
    let refusal = loop {
        match instead_of(&shop, id, number).await {
            Ok(lease) => number = lease.delivery,
            Err(refusal) => break refusal,
        }
    };
    assert_eq!((refusal.code, u64::from(number)), (RefusalCode::LimitReached, mailbox::DELIVERIES));
    shop.close().await;
}

/// Its payment is held for the time of the one lease.
#[tokio::test]
async fn a_payment_that_is_held_is_not_held_longer_for_who_lost_a_download() {
    let shop = Shop::open(Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() }).await;
    let (id, envelope) = shop.buy("o").await;
    let first = envelope.ticket.lease.peek().unwrap();
    assert_eq!(instead_of(&shop, id, PAID_DELIVERY).await.unwrap(), first);
    shop.close().await;
}

/// All but one chunk is acknowledged, nothing is ever completed, and the ticket is asked for at each half of its life.
#[tokio::test]
async fn a_paid_delivery_lasts_several_leases_and_is_not_kept_open_for_ever() {
    let shop = Shop::open(Terms::default()).await;
    let origin = shop.seeders[2].peer_id();
    shop.ctx.registry.set_origin(origin).await.unwrap();
    let (id, envelope) = shop.buy("o").await;
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..9)]).await;
    let first = envelope.ticket.lease.peek().unwrap();
    let (released, grace) = (shop.sale(id).release.unwrap().at, shop.ctx.config.close_grace_ms);
    let latest = released + (28 + 7) * DAY + grace;
    let (mut now, mut paid, mut closed) = (first.start, 0, None);
    for _ in 0..40 {
        now += 7 * DAY / 2;
        chore::step(&shop.ctx, now).await.unwrap();
        let delivery = shop.delivery(id, PAID_DELIVERY).unwrap();
        if delivery.closed.is_some() {
            closed.get_or_insert(now);
        } else {
            assert!(delivery.due_at <= latest, "{} days", (delivery.due_at - released) / DAY);
        }
        let lease = ticket_at(&shop, id, now).await.unwrap();
        // There is always one that is good from now on.
        assert!(lease.start <= now && lease.end > now + 3 * DAY, "{lease:?}");
        if lease.delivery == PAID_DELIVERY {
            assert_eq!((lease.rate, lease.ceiling), (first.rate, first.ceiling));
            paid += 1;
        } else {
            // It goes on without pay.
            assert_eq!((lease.delivery, lease.rate, lease.sources), (2, 0, vec![origin]));
        }
    }
    // Who needs four weeks for it has the paid seeders for as long.
    assert_eq!(paid, 7, "renewals");
    let closed = closed.expect("never closed");
    assert!(closed <= latest + 7 * DAY / 2, "closed after {} days", (closed - released) / DAY);
    assert!(shop.balance_of_seeders().await > 0);
    assert_eq!(shop.balance("escrow").await, 0);
    assert_eq!(shop.state(id), TransactionState::Settled);
    shop.close().await;
}

#[tokio::test]
async fn a_purchase_has_so_many_deliveries_and_one_more_a_day() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
    let postings = shop.control(json!({"cmd": "transaction", "id": id})).await.unwrap()["postings"].clone();
    let mut refused = None;
    // Nothing is downloaded: asking and completing is all.
    for _ in 0..1000 {
        match shop.ticket(id).await {
            Ok(envelope) => {
                let number = envelope.ticket.lease.peek().unwrap().delivery;
                let completion = shop.completion(DeliveryId { transaction: id, delivery: number });
                shop.mailbox_as(&shop.client, MailboxRequest::Complete { completion }).await.unwrap();
            }
            Err(refusal) => {
                refused = Some(refusal);
                break;
            }
        }
    }
    let refusal = refused.expect("there is a bound");
    assert_eq!(refusal.code, RefusalCode::LimitReached, "{refusal:?}");
    assert!(refusal.retry_after_ms > 0 && refusal.retry_after_ms <= DAY, "{refusal:?}");
    let last = u32::try_from(mailbox::DELIVERIES).unwrap();
    assert!(shop.delivery(id, last).is_some() && shop.delivery(id, last + 1).is_none());

    // Whoever fetches it once more on another day does.
    let released = shop.sale(id).release.unwrap().at;
    assert_eq!(code(ticket_at(&shop, id, released + DAY - 1).await), "limit-reached");
    assert_eq!(ticket_at(&shop, id, released + DAY).await.unwrap().delivery, last + 1);
    // And as many as there are days.
    shop.mailbox_as(
        &shop.client,
        MailboxRequest::Complete { completion: shop.completion(DeliveryId { transaction: id, delivery: last + 1 }) },
    )
    .await
    .unwrap();
    assert_eq!(code(ticket_at(&shop, id, released + DAY).await), "limit-reached");
    assert_eq!(ticket_at(&shop, id, released + 2 * DAY).await.unwrap().delivery, last + 2);

    // Taking it back is one step that closes them all; what nobody fetched is not in the books.
    shop.control(json!({"cmd": "refund", "id": id})).await.unwrap();
    for number in 1..=last + 2 {
        assert!(shop.delivery(id, number).unwrap().closed.is_some(), "{number}");
    }
    let shown = shop.control(json!({"cmd": "transaction", "id": id})).await.unwrap();
    assert_eq!(shown["postings"].as_array().unwrap().len(), postings.as_array().unwrap().len() + 1);
    shop.close().await;
}
