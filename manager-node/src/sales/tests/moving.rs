//! A purchase that changes hands: who may, what the old and the new peer have then, and that money stays where it was.

use protocol::api::{MailboxRequest, MailboxResponse, SalesRequest, SalesResponse, TransactionState};
use protocol::entitlement::{MAX_GENERATIONS, MAX_MOVES, Move, Recovery};
use protocol::evidence::EvidencePack;
use protocol::manifest::KeyPolicy;
use protocol::receipt::{Completion, DeliveryId, Receipt};
use protocol::ticket::TicketEnvelope;
use protocol::trust::{Moved, Revocations as Added};
use protocol::{ChunkSet, Keypair, PeerId, Refusal, RefusalCode, Signed, TransactionId};
use serde_json::json;

use super::code;
use super::shop::{Outbox, Shop, Terms, random_key};
use crate::context::now_ms;
use crate::transactions::{COMPLETIONS, MOVES, MOVING, chore};

impl Shop {
    fn word(&self, transaction: TransactionId, by: &Keypair, to: PeerId, generation: u32) -> Signed<Move> {
        Signed::sign(&Move { network: self.ctx.network(), transaction, to, generation, at: now_ms() }, by)
    }

    pub(crate) async fn move_on(
        &self,
        id: TransactionId,
        by: &Keypair,
        to: PeerId,
        generation: u32,
    ) -> Result<u32, Refusal> {
        let word = self.word(id, by, to, generation);
        match self.mailbox_as(by, MailboxRequest::Move { word }).await? {
            MailboxResponse::Moved { generation } => Ok(generation),
            other => panic!("{other:?}"),
        }
    }

    async fn recover(&self, id: TransactionId, to: PeerId, generation: u32) -> Result<SalesResponse, Refusal> {
        let network = self.ctx.network();
        let word = Recovery { network, transaction: id, to, generation, at: now_ms() };
        self.sales(SalesRequest::Recover { word: Signed::sign(&word, &self.merchant) }).await
    }

    /// What the manager's own file proves of it.
    fn evidence(&self, id: TransactionId) -> protocol::evidence::Report {
        let pack = crate::evidence::pack(&self.ctx, id, now_ms()).unwrap();
        EvidencePack::from_bytes(&pack.to_bytes()).unwrap().verify(&self.ctx.trust().root())
    }

    async fn ticket_as(&self, key: &Keypair, transaction: TransactionId) -> Result<TicketEnvelope, Refusal> {
        match self.mailbox_as(key, MailboxRequest::Ticket { transaction, instead_of: None }).await? {
            MailboxResponse::Ticket(ticket) => Ok(*ticket),
            other => panic!("{other:?}"),
        }
    }

    async fn listed(&self, key: &Keypair) -> Vec<(TransactionId, u32)> {
        match self.mailbox_as(key, MailboxRequest::List { before: None }).await.unwrap() {
            MailboxResponse::List(items) => items.into_iter().map(|item| (item.transaction, item.generation)).collect(),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_purchase_goes_to_another_device_and_back() {
    let shop = Shop::open(Terms::default()).await;
    let (id, first) = shop.buy("o").await;
    let phone = random_key();
    assert_eq!(shop.move_on(id, &shop.client, phone.peer_id(), 1).await, Ok(1));

    // The old device has nothing any more, the new one a ticket and the key.
    assert_eq!(code(shop.ticket(id).await), "not-entitled");
    assert_eq!((shop.listed(&shop.client).await, shop.listed(&phone).await), (vec![], vec![(id, 1)]));
    let second = shop.ticket_as(&phone, id).await.unwrap();
    let (data, lease) = (second.ticket.data.peek().unwrap(), second.ticket.lease.peek().unwrap());
    assert_eq!((data.client, lease.client, lease.generation), (shop.client.peer_id(), phone.peer_id(), 1));
    let opened = second.grant.as_ref().unwrap().open(&phone, &data, &lease).unwrap();
    assert_eq!(opened.as_bytes(), shop.secret.as_bytes());
    assert!(second.grant.as_ref().unwrap().open(&shop.client, &data, &lease).is_err());
    assert_eq!(shop.admitted(&shop.client, &first), Err(RefusalCode::Revoked));
    assert_eq!(shop.admitted(&phone, &second), Ok(()));
    assert!(!shop.is_revoked(id), "the purchase itself goes on");

    // Back again, and the one in between is void.
    assert_eq!(shop.move_on(id, &phone, shop.client.peer_id(), 2).await, Ok(2));
    let third = shop.ticket(id).await.unwrap();
    assert_eq!(shop.admitted(&phone, &second), Err(RefusalCode::Revoked));
    assert_eq!(shop.admitted(&shop.client, &first), Err(RefusalCode::Revoked));
    assert_eq!(shop.admitted(&shop.client, &third), Ok(()));
    assert_eq!(shop.state(id), TransactionState::Released);
    // All of it is in the audit log, and nothing waits to be announced.
    let log = shop.ctx.db.read(|txn| crate::audit::page(&shop.ctx.archive, txn, 0)).unwrap().to_string();
    assert!(log.contains("generation 1 by its holder") && log.contains("generation 2 by its holder"), "{log}");
    assert!(shop.ctx.db.read(|txn| MOVING.is_empty(txn)).unwrap());
    shop.close().await;
}

#[tokio::test]
async fn a_move_is_answered_the_same_again_and_counts_once() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let (phone, other) = (random_key(), random_key());
    let epoch = shop.ctx.revocations.number();
    let answers = futures::future::join_all((0..8).map(|_| shop.move_on(id, &shop.client, phone.peer_id(), 1))).await;
    assert!(answers.into_iter().all(|answer| answer == Ok(1)));
    // The answer was lost, and the purchase is somebody else's by now.
    assert_eq!(shop.move_on(id, &shop.client, phone.peer_id(), 1).await, Ok(1));
    assert_eq!(shop.ctx.revocations.number(), epoch + 1);
    // To another peer it is another move, and not this client's any more.
    assert_eq!(code(shop.move_on(id, &shop.client, other.peer_id(), 1).await), "not-entitled");
    assert_eq!(shop.listed(&phone).await, [(id, 1)]);
    shop.close().await;
}

#[tokio::test]
async fn only_the_holder_moves_a_purchase_and_only_from_the_generation_it_is_in() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let (phone, thief) = (random_key(), random_key());
    assert_eq!(code(shop.move_on(id, &thief, thief.peer_id(), 1).await), "malformed");
    assert_eq!(code(shop.move_on(id, &thief, phone.peer_id(), 1).await), "not-entitled");
    // The holder's own word in the hands of another peer.
    let word = shop.word(id, &shop.client, phone.peer_id(), 1);
    assert_eq!(code(shop.mailbox_as(&thief, MailboxRequest::Move { word }).await), "not-entitled");
    assert_eq!(code(shop.move_on(id, &shop.client, phone.peer_id(), 2).await), "wrong-state");
    assert_eq!(code(shop.move_on(id, &shop.client, PeerId::from_bytes([0; 32]), 1).await), "malformed");
    let reserved = shop.reserve("p").await.peek().unwrap().transaction;
    assert_eq!(code(shop.move_on(reserved, &shop.client, phone.peer_id(), 1).await), "not-entitled");
    shop.control(json!({"cmd": "refund", "id": id})).await.unwrap();
    assert_eq!(code(shop.move_on(id, &shop.client, phone.peer_id(), 1).await), "revoked");
    shop.close().await;
}

#[tokio::test]
async fn a_purchase_that_is_passed_round_ends_with_its_merchant() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let keys: Vec<Keypair> = (0..2).map(|_| random_key()).collect();
    let mut holder = &shop.client;
    for generation in 1..=MAX_MOVES {
        let next = &keys[generation as usize % 2];
        shop.move_on(id, holder, next.peer_id(), generation).await.unwrap();
        holder = next;
    }
    let refused = shop.move_on(id, holder, shop.client.peer_id(), MAX_MOVES + 1).await;
    assert_eq!(code(refused), "limit-reached");
    shop.recover(id, shop.client.peer_id(), MAX_MOVES + 1).await.unwrap();
    assert!(shop.ticket(id).await.is_ok());
    shop.close().await;
}

#[tokio::test]
async fn a_move_right_after_a_void_lease_is_in_the_evidence_as_what_was_signed() {
    let shop = Shop::open(Terms { chunks: 1024, rate: 4_000_000, ..Terms::default() }).await;
    let (id, _) = shop.buy("o").await;
    for n in 0..3 {
        let of = DeliveryId { transaction: id, delivery: 1 };
        let ack = shop.ack(&shop.client, of, shop.seeders[n].peer_id(), ChunkSet::from_range(0..620));
        let receipt = Receipt { ack, completion: None, first_at: 1, last_at: 2 };
        Outbox::of(&shop, n).send(&shop, vec![receipt]).await;
    }
    // Generation 1 began by nobody's word, and nobody asked for a lease of it.
    let (phone, tablet) = (random_key(), random_key());
    shop.move_on(id, &shop.client, phone.peer_id(), 2).await.unwrap();
    shop.move_on(id, &phone, tablet.peer_id(), 3).await.unwrap();
    let report = shop.evidence(id);
    assert!(report.ok, "{report:#?}");
    assert_eq!(report.facts.moved.iter().map(|moved| moved.generation).collect::<Vec<_>>(), [3], "{report:#?}");
    let line = report.lines.iter().find(|line| line.section == "move 1").unwrap();
    assert!(line.claim.contains(&phone.peer_id().to_string()) && line.claim.contains("is not proven"), "{line:?}");
    shop.close().await;
}

#[tokio::test]
async fn a_void_lease_and_the_merchants_word_take_none_of_the_holders_moves() {
    let shop = Shop::open(Terms { chunks: 1024, rate: 4_000_000, ..Terms::default() }).await;
    let (id, _) = shop.buy("o").await;
    let mut outboxes: Vec<Outbox> = (0..3).map(|n| Outbox::of(&shop, n)).collect();
    let void = 3;
    for generation in 0..void {
        let lease = shop.ticket(id).await.unwrap().ticket.lease.peek().unwrap();
        assert_eq!(lease.generation, generation);
        for (n, outbox) in outboxes.iter_mut().enumerate() {
            let of = DeliveryId { transaction: id, delivery: lease.delivery };
            let ack = shop.ack(&shop.client, of, shop.seeders[n].peer_id(), ChunkSet::from_range(0..620));
            outbox.send(&shop, vec![Receipt { ack, completion: None, first_at: 1, last_at: 2 }]).await;
        }
    }
    let keys: Vec<Keypair> = (0..2).map(|_| random_key()).collect();
    let (mut holder, mut generation) = (&keys[0], void + 1);
    shop.recover(id, holder.peer_id(), generation).await.unwrap();
    for n in 1..=MAX_MOVES {
        let next = &keys[n as usize % 2];
        generation += 1;
        assert_eq!(shop.move_on(id, holder, next.peer_id(), generation).await, Ok(generation), "move {n}");
        holder = next;
    }
    assert_eq!(code(shop.move_on(id, holder, shop.client.peer_id(), generation + 1).await), "limit-reached");
    // The merchant's word gives no move back.
    shop.recover(id, shop.client.peer_id(), generation + 1).await.unwrap();
    assert_eq!(code(shop.move_on(id, &shop.client, holder.peer_id(), generation + 2).await), "limit-reached");
    // All of it is proven by the evidence, though of the oldest generations it has no room for the leases.
    let report = shop.evidence(id);
    assert!(report.ok, "{report:#?}");
    assert_eq!(report.facts.moved.len(), MAX_MOVES as usize + 2, "{report:#?}");
    shop.close().await;
}

#[tokio::test]
async fn a_generation_of_which_a_restored_manager_knows_nothing_counts_as_the_holders() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let keys: Vec<Keypair> = (0..2).map(|_| random_key()).collect();
    shop.recover(id, keys[1].peer_id(), 1).await.unwrap();
    shop.ctx.db.write_blocking(move |txn| MOVES.delete(txn, &(id, 1))).unwrap();
    for generation in 2..=MAX_MOVES {
        let (from, to) = (&keys[(generation as usize + 1) % 2], &keys[generation as usize % 2]);
        assert_eq!(shop.move_on(id, from, to.peer_id(), generation).await, Ok(generation));
    }
    let holder = &keys[MAX_MOVES as usize % 2];
    assert_eq!(code(shop.move_on(id, holder, shop.client.peer_id(), MAX_MOVES + 1).await), "limit-reached");
    // Who had it in that generation is proven by its lease.
    let report = shop.evidence(id);
    assert!(report.ok, "{report:#?}");
    assert_eq!(report.facts.moved.len(), MAX_MOVES as usize - 1, "{report:#?}");
    shop.close().await;
}

#[tokio::test]
async fn no_word_takes_a_purchase_past_its_last_generation() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let keys: Vec<Keypair> = (0..2).map(|_| random_key()).collect();
    for generation in 1..=MAX_GENERATIONS {
        shop.recover(id, keys[generation as usize % 2].peer_id(), generation).await.unwrap();
    }
    let (holder, other) = (&keys[MAX_GENERATIONS as usize % 2], &keys[(MAX_GENERATIONS as usize + 1) % 2]);
    assert_eq!(code(shop.move_on(id, holder, other.peer_id(), MAX_GENERATIONS + 1).await), "limit-reached");
    assert_eq!(code(shop.recover(id, other.peer_id(), MAX_GENERATIONS + 1).await), "limit-reached");
    assert!(shop.ticket_as(holder, id).await.is_ok());
    let report = shop.evidence(id);
    assert!(report.ok && report.facts.moved.len() == MAX_GENERATIONS as usize, "{report:#?}");
    shop.close().await;
}

#[tokio::test]
async fn what_was_delivered_before_a_move_is_paid_and_what_comes_after_costs_nobody() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let mut outbox = Outbox::of(&shop, 0);
    outbox.send(&shop, vec![shop.receipt(id, 0, 0..3)]).await;
    let phone = random_key();
    shop.move_on(id, &shop.client, phone.peer_id(), 1).await.unwrap();
    // A receipt that was on its way counts.
    outbox.send(&shop, vec![shop.receipt(id, 0, 0..4)]).await;
    let later = now_ms() + shop.ctx.config.close_grace_ms + 1000;
    chore::step(&shop.ctx, later).await.unwrap();
    let closed = shop.delivery(id, 1).unwrap().closed.unwrap();
    let paid: u64 = closed.lines.iter().map(|line| line.bytes).sum();
    assert_eq!(paid, 4 * u64::from(super::shop::CHUNK));

    let lease = shop.ticket_as(&phone, id).await.unwrap().ticket.lease.peek().unwrap();
    assert_eq!((lease.delivery, lease.rate, lease.ceiling), (2, 0, 0));
    assert!(shop.delivery(id, 2).unwrap().closed.is_none());
    // The new client completes its own delivery, and the purchase is settled as any other.
    let delivery = DeliveryId { transaction: id, delivery: 2 };
    let completion = Completion { network: shop.ctx.network(), delivery, manifest: shop.manifest, at: now_ms() };
    let done = MailboxRequest::Complete { completion: Signed::sign(&completion, &phone) };
    shop.mailbox_as(&phone, done).await.unwrap();
    assert_eq!(shop.balance("escrow").await, 0);
    // Whose acknowledgements counted can be proven by the lease of the time.
    let pack = crate::evidence::pack(&shop.ctx, id, now_ms()).unwrap();
    let clients: Vec<(u32, PeerId)> =
        pack.leases.iter().map(|lease| lease.peek().unwrap()).map(|lease| (lease.delivery, lease.client)).collect();
    assert_eq!(clients, [(2, phone.peer_id()), (1, shop.client.peer_id())]);
    // And that it was given away, by the word of who had it.
    let report = pack.verify(&shop.ctx.trust().root());
    let [moved] = &report.facts.moved[..] else { panic!("{report:#?}") };
    assert!(report.ok && !moved.recovered, "{report:#?}");
    assert_eq!((moved.by, moved.to, moved.generation), (shop.client.peer_id(), phone.peer_id(), 1));
    shop.close().await;
}

#[tokio::test]
async fn what_the_new_holder_signed_of_an_earlier_download_is_proven_by_every_file() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let phone = random_key();
    shop.move_on(id, &shop.client, phone.peer_id(), 1).await.unwrap();
    let mut outbox = Outbox::of(&shop, 0);
    let completed = |delivery: DeliveryId, by: &Keypair| {
        let completion = Completion { network: shop.ctx.network(), delivery, manifest: shop.manifest, at: now_ms() };
        MailboxRequest::Complete { completion: Signed::sign(&completion, by) }
    };
    for number in 2..=4 {
        // Asked for again after it was complete, it is another download, and the lease of the one before is nowhere.
        let lease = shop.ticket_as(&phone, id).await.unwrap().ticket.lease.peek().unwrap();
        assert_eq!((lease.delivery, lease.client), (number, phone.peer_id()));
        let delivery = DeliveryId { transaction: id, delivery: number };
        let ack = shop.ack(&phone, delivery, shop.seeders[0].peer_id(), ChunkSet::from_range(0..10));
        outbox.send(&shop, vec![Receipt { ack, completion: None, first_at: 1, last_at: 2 }]).await;
        shop.mailbox_as(&phone, completed(delivery, &phone)).await.unwrap();
    }
    shop.ticket_as(&phone, id).await.unwrap();
    let report = shop.evidence(id);
    assert!(report.ok && report.lines.iter().all(|line| !line.unproven), "{report:#?}");
    let theirs = &report.facts.others[&phone.peer_id()];
    assert_eq!(theirs.acknowledged_bytes, report.facts.content_bytes, "{report:#?}");
    assert!(theirs.completed_at.is_some(), "{report:#?}");
    assert_eq!(report.facts.received, protocol::evidence::Received::default());
    // The buyer's own download is not its to complete.
    let of_the_buyer = completed(DeliveryId { transaction: id, delivery: 1 }, &phone);
    assert_eq!(code(shop.mailbox_as(&phone, of_the_buyer).await), "bad-receipt");
    shop.close().await;
}

#[tokio::test]
async fn a_held_payment_is_not_taken_for_another_holders_download() {
    let shop = Shop::open(Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() }).await;
    let (id, _) = shop.buy("o").await;
    let phone = random_key();
    shop.move_on(id, &shop.client, phone.peer_id(), 1).await.unwrap();
    let delivery = DeliveryId { transaction: id, delivery: 1 };
    let completion = Completion { network: shop.ctx.network(), delivery, manifest: shop.manifest, at: now_ms() };
    let done = MailboxRequest::Complete { completion: Signed::sign(&completion, &phone) };
    assert_eq!(code(shop.mailbox_as(&phone, done).await), "bad-receipt");
    assert!(shop.ticket_as(&phone, id).await.unwrap().grant.is_none(), "the key is not out");
    let report = shop.evidence(id);
    assert!(report.ok, "{report:#?}");
    shop.close().await;
}

#[tokio::test]
async fn of_many_completions_the_paid_one_and_the_newest_are_in_the_file_and_the_others_are_counted() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let most = u32::try_from(EvidencePack::MAX_LEASES).unwrap() + 3;
    let stored =
        (1..=most).map(|number| ((id, number), shop.completion(DeliveryId { transaction: id, delivery: number })));
    let stored: Vec<_> = stored.collect();
    shop.ctx
        .db
        .write_blocking(move |txn| stored.iter().try_for_each(|(key, signed)| COMPLETIONS.put(txn, key, signed)))
        .unwrap();
    let pack = crate::evidence::pack(&shop.ctx, id, now_ms()).unwrap();
    let numbers: Vec<u32> = pack.completions.iter().map(|c| c.peek().unwrap().delivery.delivery).collect();
    assert_eq!(numbers, [1].into_iter().chain((5..=most).rev()).collect::<Vec<_>>());
    assert_eq!(pack.about.left_out, 3);
    assert!(shop.evidence(id).ok);
    shop.close().await;
}

#[tokio::test]
async fn a_sale_that_is_paid_on_completion_moves_with_the_payment_held() {
    let shop = Shop::open(Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() }).await;
    let (id, first) = shop.buy("o").await;
    let (never, other) = (shop.buy("p").await.0, random_key());
    let phone = random_key();
    shop.move_on(id, &shop.client, phone.peer_id(), 1).await.unwrap();
    shop.move_on(never, &shop.client, other.peer_id(), 1).await.unwrap();
    let ticket = shop.ticket_as(&phone, id).await.unwrap();
    let (before, now) = (first.ticket.lease.peek().unwrap(), ticket.ticket.lease.peek().unwrap());
    // The time in which it is completed or refunded does not begin anew.
    assert_eq!((ticket.grant.is_none(), now.end), (true, before.end));
    assert_eq!(code(shop.complete(id).await), "not-entitled");
    let delivery = DeliveryId { transaction: id, delivery: 2 };
    let completion = Completion { network: shop.ctx.network(), delivery, manifest: shop.manifest, at: now_ms() };
    let done = MailboxRequest::Complete { completion: Signed::sign(&completion, &phone) };
    let MailboxResponse::Completed { grant: Some(grant) } = shop.mailbox_as(&phone, done).await.unwrap() else {
        panic!("no key")
    };
    grant.open(&phone, &ticket.ticket.data.peek().unwrap(), &now).unwrap();
    // The other one is completed by nobody: refunded by itself, for the new holder as for the old.
    chore::step(&shop.ctx, now.end + shop.ctx.config.close_grace_ms + 1000).await.unwrap();
    assert_eq!(shop.state(never), TransactionState::Refunded);
    assert_eq!(code(shop.ticket_as(&other, never).await), "revoked");
    assert_eq!(shop.balance("escrow").await, 0);
    shop.close().await;
}

/// More than the lease of the first delivery allows, acknowledged by the client that the purchase was sold to.
async fn overclaim(shop: &Shop, id: TransactionId) {
    for n in 0..3 {
        let of = DeliveryId { transaction: id, delivery: 1 };
        let ack = shop.ack(&shop.client, of, shop.seeders[n].peer_id(), ChunkSet::from_range(0..620));
        let receipt = Receipt { ack, completion: None, first_at: 1, last_at: 2 };
        Outbox::of(shop, n).send(shop, vec![receipt]).await;
    }
}

#[tokio::test]
async fn a_former_holders_completion_in_a_receipt_takes_no_held_payment() {
    let shop = Shop::open(Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() }).await;
    let (id, _) = shop.buy("o").await;
    let phone = random_key();
    shop.move_on(id, &shop.client, phone.peer_id(), 1).await.unwrap();
    let first = DeliveryId { transaction: id, delivery: 1 };
    let mut outbox = Outbox::of(&shop, 0);
    let receipt = Receipt { completion: Some(shop.completion(first)), ..shop.receipt(id, 0, 0..4) };
    outbox.send(&shop, vec![receipt]).await;
    assert!(!shop.sale(id).release.unwrap().captured, "it is the phone's to say that it is complete");
    let delivery = shop.delivery(id, 1).unwrap();
    assert!(!delivery.counting.is_completed() && delivery.counting.claimed_bytes(&delivery.layout) > 0);

    // The phone's own does, as ever.
    shop.ticket_as(&phone, id).await.unwrap();
    let completion = Completion {
        network: shop.ctx.network(),
        delivery: DeliveryId { delivery: 2, ..first },
        manifest: shop.manifest,
        at: now_ms(),
    };
    let ack = shop.ack(&phone, completion.delivery, shop.seeders[0].peer_id(), ChunkSet::from_range(0..4));
    let completion = Some(Signed::sign(&completion, &phone));
    outbox.send(&shop, vec![Receipt { ack, completion, first_at: 1, last_at: 2 }]).await;
    assert!(shop.sale(id).release.unwrap().captured);
    shop.close().await;
}

#[tokio::test]
async fn what_a_former_holder_signs_takes_a_held_purchase_from_nobody() {
    let policy = KeyPolicy::OnCompletion;
    let shop = Shop::open(Terms { policy, chunks: 1024, rate: 4_000_000, ..Terms::default() }).await;
    let (id, _) = shop.buy("o").await;
    let phone = random_key();
    shop.move_on(id, &shop.client, phone.peer_id(), 1).await.unwrap();
    overclaim(&shop, id).await;
    assert!(!shop.is_revoked(id));
    let ticket = shop.ticket_as(&phone, id).await.unwrap();
    assert_eq!(shop.admitted(&phone, &ticket), Ok(()));
    let delivery = DeliveryId { transaction: id, delivery: 2 };
    let completion = Completion { network: shop.ctx.network(), delivery, manifest: shop.manifest, at: now_ms() };
    let done = MailboxRequest::Complete { completion: Signed::sign(&completion, &phone) };
    assert!(matches!(shop.mailbox_as(&phone, done).await, Ok(MailboxResponse::Completed { grant: Some(_) })));
    // What was delivered to either is paid within the ceiling, once.
    chore::step(&shop.ctx, shop.delivery(id, 1).unwrap().due_at).await.unwrap();
    assert_eq!(shop.balance("escrow").await, 0);
    assert_eq!(shop.state(id), TransactionState::Settled);
    shop.close().await;
}

#[tokio::test]
async fn a_holder_from_before_a_move_that_a_restore_forgot_gets_no_generation_of_its_own() {
    let shop = Shop::open(Terms { chunks: 1024, rate: 4_000_000, ..Terms::default() }).await;
    let (id, _) = shop.buy("o").await;
    // The move is in the epochs, which came back from seeders, and not in the books.
    let shop = Box::pin(shop.restored()).await;
    let moved = vec![Moved { transaction: id, generation: 1 }];
    shop.ctx.revocations.revoke(Added { moved, ..Added::default() }).await.unwrap();
    assert_eq!(code(shop.ticket(id).await), "revoked");
    overclaim(&shop, id).await;
    assert_eq!(code(shop.ticket(id).await), "revoked");
    assert_eq!(shop.sale(id).generation, 0);
    // The shop's word gives it to whom it belongs.
    let phone = random_key();
    shop.recover(id, phone.peer_id(), 2).await.unwrap();
    let ticket = shop.ticket_as(&phone, id).await.unwrap();
    assert_eq!(shop.admitted(&phone, &ticket), Ok(()));
    shop.close().await;
}

/// It was completed and paid after the backup, and more was acknowledged than the lease allows: all of that comes again.
#[tokio::test]
async fn what_comes_again_after_a_restore_takes_a_held_purchase_from_nobody() {
    let policy = KeyPolicy::OnCompletion;
    let shop = Shop::open(Terms { policy, chunks: 1024, rate: 4_000_000, ..Terms::default() }).await;
    let (id, _) = shop.buy("o").await;
    let shop = Box::pin(shop.restored()).await;
    overclaim(&shop, id).await;
    assert!(!shop.is_revoked(id));
    assert!(matches!(shop.complete(id).await, Ok(MailboxResponse::Completed { grant: Some(_) })));
    shop.close().await;
}

/// Its lease became void, or it went away and came back, and the books know nothing of it.
#[tokio::test]
async fn who_still_has_a_purchase_is_given_anew_what_a_restore_forgot() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let shop = Box::pin(shop.restored()).await;
    let moved = vec![Moved { transaction: id, generation: 1 }];
    shop.ctx.revocations.revoke(Added { moved, ..Added::default() }).await.unwrap();
    assert_eq!(code(shop.ticket(id).await), "revoked");
    shop.recover(id, shop.client.peer_id(), 2).await.unwrap();
    let ticket = shop.ticket(id).await.unwrap();
    assert_eq!(shop.admitted(&shop.client, &ticket), Ok(()));
    assert_eq!(shop.sale(id).generation, 2);
    let report = crate::evidence::pack(&shop.ctx, id, now_ms()).unwrap().verify(&shop.ctx.trust().root());
    assert!(report.ok, "{report:#?}");
    assert_eq!(code(shop.recover(id, shop.client.peer_id(), 3).await), "wrong-state");
    shop.close().await;
}

#[tokio::test]
async fn a_lease_that_a_further_delivery_stands_beside_becomes_void_as_ever() {
    let shop = Shop::open(Terms { chunks: 1024, rate: 4_000_000, ..Terms::default() }).await;
    let (id, first) = shop.buy("o").await;
    let further = MailboxRequest::Ticket { transaction: id, instead_of: Some(1) };
    let MailboxResponse::Ticket(second) = shop.mailbox_as(&shop.client, further).await.unwrap() else { panic!() };
    assert_eq!(shop.admitted(&shop.client, &second), Ok(()));
    overclaim(&shop, id).await;
    assert_eq!(shop.sale(id).generation, 1);
    for void in [&first, &*second] {
        assert_eq!(shop.admitted(&shop.client, void), Err(RefusalCode::Revoked));
    }
    let ticket = shop.ticket(id).await.unwrap();
    assert_eq!(shop.admitted(&shop.client, &ticket), Ok(()));
    shop.close().await;
}

#[tokio::test]
async fn a_merchant_recovers_its_own_purchases_only() {
    let shop = Shop::open(Terms::default()).await;
    let (id, first) = shop.buy("o").await;
    let phone = random_key();
    let rival = random_key();
    shop.enrol_merchant(&rival).await;
    let holder = SalesRequest::Holder { transaction: id };
    assert_eq!(code(shop.sales_as(&rival, holder.clone()).await), "not-your-reservation");
    let at = |client, generation| SalesResponse::Holder { client, generation };
    assert_eq!(shop.sales(holder.clone()).await.unwrap(), at(shop.client.peer_id(), 0));

    let network = shop.ctx.network();
    let word = Recovery { network, transaction: id, to: phone.peer_id(), generation: 1, at: now_ms() };
    let by = |key: &Keypair| SalesRequest::Recover { word: Signed::sign(&word, key) };
    assert_eq!(code(shop.sales_as(&rival, by(&rival)).await), "not-your-reservation");
    assert_eq!(code(shop.sales_as(&rival, by(&shop.merchant)).await), "not-entitled");
    assert_eq!(code(shop.sales(by(&rival)).await), "not-entitled");
    for _ in 0..2 {
        assert_eq!(shop.sales(by(&shop.merchant)).await.unwrap(), at(phone.peer_id(), 1));
    }
    assert_eq!(shop.sales(holder).await.unwrap(), at(phone.peer_id(), 1));
    assert_eq!(shop.admitted(&shop.client, &first), Err(RefusalCode::Revoked));
    let ticket = shop.ticket_as(&phone, id).await.unwrap();
    assert_eq!(shop.admitted(&phone, &ticket), Ok(()));
    assert_eq!(code(shop.recover(id, phone.peer_id(), 2).await), "wrong-state");
    let log = shop.ctx.db.read(|txn| crate::audit::page(&shop.ctx.archive, txn, 0)).unwrap().to_string();
    assert!(log.contains("generation 1 by the merchant"), "{log}");
    let report = crate::evidence::pack(&shop.ctx, id, now_ms()).unwrap().verify(&shop.ctx.trust().root());
    let [moved] = &report.facts.moved[..] else { panic!("{report:#?}") };
    assert!(report.ok && moved.recovered, "{report:#?}");
    assert_eq!((moved.by, moved.to), (shop.merchant.peer_id(), phone.peer_id()));
    // A merchant whose certificate is void gives nothing away.
    shop.running.control(json!({"cmd": "revoke", "kind": "merchant", "id": shop.merchant.peer_id()})).await.unwrap();
    assert_eq!(code(shop.recover(id, shop.client.peer_id(), 2).await), "revoked");
    shop.close().await;
}
