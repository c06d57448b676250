//! Who is let in: every reason for a no, over a real connection, and not one byte of content before a yes.

use protocol::deliver::{ClientMessage, Credential, SeederMessage};
use protocol::ticket::Ticket;
use protocol::trust::Revocations;
use protocol::{Digest, Keypair, NetworkId, RefusalCode, Signed, codec};

use crate::client::{Client, digest_of};
use crate::world::{CHUNK, DAY, Terms, World, eventually, now, stop};

/// The same document with a signature that does not fit.
fn forged<T>(signed: &Signed<T>) -> Signed<T>
where
    T: protocol::signed::Document,
    Signed<T>: codec::Wire,
{
    let mut bytes = codec::encode(signed);
    *bytes.last_mut().unwrap() ^= 1;
    codec::decode(&bytes).unwrap()
}

#[tokio::test]
async fn each_refusal_has_its_name_and_costs_no_content() {
    use RefusalCode as C;
    let world = World::new(false).await;
    let goods = world.publish(1, 3);
    let other_goods = world.publish(2, 1);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let at = seeder.peer_addrs();
    let revoked = world.terms(&goods, client.peer(), at.peer);
    let transactions = vec![revoked.transaction];
    let banned = Client::new(11).await;
    world.office.revoke(Revocations { transactions, peers: vec![banned.peer()], ..Revocations::default() });
    // Passes every check, before all others are tried.
    let good = world.ticket(&goods, client.peer(), at.peer);
    drop(client.begin(&at, &good).await);
    world.manager.nudge(&at).await;

    type Edit<'a> = Box<dyn Fn(&mut Terms) + 'a>;
    type Spoil = fn(&mut Ticket);
    let nothing: Spoil = |_| {};
    let stranger = Keypair::from_seed(&[77; 32]);
    let cases: Vec<(C, &str, Edit<'_>, Spoil)> = vec![
        (C::WrongNetwork, "network", Box::new(|t| t.network = NetworkId::from_bytes([9; 32])), nothing),
        (C::WrongClient, "client", Box::new(|t| t.client = stranger.peer_id()), nothing),
        (C::NotYetValid, "future", Box::new(|t| (t.start, t.end) = (now() + DAY, now() + 2 * DAY)), nothing),
        (C::Expired, "past", Box::new(|t| (t.start, t.end) = (now() - 2 * DAY, now() - DAY)), nothing),
        (C::BadEndorsement, "no endorsement", Box::new(|_| {}), |t| t.endorsement = None),
        (C::BadEndorsement, "endorsed by another", Box::new(|t| t.endorsed_by = stranger.clone()), nothing),
        (C::BadEndorsement, "forged endorsement", Box::new(|_| {}), |t| {
            t.endorsement = t.endorsement.as_ref().map(forged);
        }),
        (C::UnknownKey, "unknown key", Box::new(|t| t.signed_by = stranger.clone()), nothing),
        (C::BadManagerSignature, "forged lease", Box::new(|_| {}), |t| t.lease = forged(&t.lease)),
        (C::BadEndorsement, "data changed", Box::new(|_| {}), |t| t.data = forged(&t.data)),
        (C::ContentNotHeld, "other content", Box::new(|t| t.manifest = other_goods.digest()), nothing),
        (C::ContentNotHeld, "no content", Box::new(|t| t.manifest = Digest::from_bytes([5; 32])), nothing),
    ];
    for (code, what, edit, spoil) in cases {
        let mut terms = world.terms(&goods, client.peer(), at.peer);
        edit(&mut terms);
        let mut ticket = world.make(terms);
        spoil(&mut ticket);
        let refusal = client.show(&at, &ticket).await.refusal().await;
        assert_eq!(refusal.code, code, "{what}: {refusal}");
        if matches!(code, C::NotYetValid | C::Expired) {
            assert!(refusal.now > 0, "{what}: a refusal for time carries the refuser's clock");
        }
    }

    // The transaction and the client that were revoked meanwhile: known as soon as the nudge was followed.
    let ticket = world.make(revoked);
    let refusal = eventually("the revocation", || async {
        match client.show(&at, &ticket).await.hear().await.unwrap() {
            SeederMessage::Refusal(refusal) => Some(refusal),
            SeederMessage::Welcome { .. } => None,
            other => panic!("{other:?}"),
        }
    })
    .await;
    assert_eq!(refusal.code, C::Revoked);
    let ticket = world.ticket(&goods, banned.peer(), at.peer);
    assert_eq!(banned.show(&at, &ticket).await.refusal().await.code, C::Revoked);

    let status = seeder.status().unwrap();
    assert_eq!(status["refusals"]["bad-endorsement"], 4, "{status}");
    assert_eq!(status["chunks_sent"], 0);
    stop(seeder).await;
}

#[tokio::test]
async fn what_is_no_hello_is_refused_by_name() {
    use RefusalCode as C;
    let world = World::new(false).await;
    let goods = world.publish(1, 1);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |config| config.hello_ms = 300).await;
    let at = seeder.peer_addrs();
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let hello =
        codec::encode(&ClientMessage::Hello { credential: Credential::Ticket(Box::new(ticket)), last_ack: None });
    let mut future = hello.clone();
    future[0] = 9;
    let cut = hello[..hello.len() / 2].to_vec();
    let want = codec::encode(&ClientMessage::Meta { segment: None });
    for (code, bytes) in
        [(C::UnsupportedVersion, future), (C::Malformed, cut), (C::Malformed, want), (C::TooLarge, vec![1; 20_000])]
    {
        let mut talk = client.open(&at).await;
        let _ = node::write_frame(&mut talk.stream, &bytes).await;
        assert_eq!(talk.refusal().await.code, code);
    }
    assert_eq!(client.open(&at).await.refusal().await.code, C::Idle, "no word at all");
    stop(seeder).await;
}

#[tokio::test]
async fn those_for_whom_there_is_no_place_are_told_when_to_come_back() {
    let world = World::new(false).await;
    let goods = world.publish(1, 1);
    let (first, second) = (Client::new(10).await, Client::new(11).await);
    let seeder = world.seeder("a", &[&goods], |config| config.max_deliveries = 1).await;
    let at = seeder.peer_addrs();
    let (talk, _) = first.begin(&at, &world.ticket(&goods, first.peer(), at.peer)).await;
    let refusal = second.open(&at).await.refusal().await;
    assert_eq!(refusal.code, RefusalCode::Overloaded);
    assert!(refusal.retry_after_ms > 0);
    drop(talk);
    // The place comes back with the end of the stream.
    let ticket = world.ticket(&goods, second.peer(), at.peer);
    eventually("a place", || async {
        let mut talk = second.open(&at).await;
        assert!(matches!(talk.hear().await, Some(SeederMessage::Greeting { .. })));
        talk.hello(&ticket).await;
        match talk.hear().await {
            Some(SeederMessage::Welcome { .. }) => Some(()),
            Some(SeederMessage::Refusal(refusal)) => {
                assert_eq!(refusal.code, RefusalCode::Overloaded);
                None
            }
            other => panic!("{other:?}"),
        }
    })
    .await;
    stop(seeder).await;
}

#[tokio::test]
async fn a_ticket_that_asks_for_fresh_news_is_refused_by_a_seeder_that_has_none() {
    let world = World::new(false).await;
    let goods = world.publish(1, 1);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |config| config.clock_grace_ms = 0).await;
    let at = seeder.peer_addrs();
    let mut terms = world.terms(&goods, client.peer(), at.peer);
    terms.staleness = 1;
    let refusal = client.show(&at, &world.make(terms)).await.refusal().await;
    assert_eq!(refusal.code, RefusalCode::StaleRevocations, "{refusal}");
    assert!(refusal.retry_after_ms > 0);
    stop(seeder).await;
}

#[tokio::test]
async fn a_delivery_ends_that_runs_when_no_news_come_for_longer_than_its_product_allows() {
    let world = World::new(false).await;
    let goods = world.publish(1, 4);
    let client = Client::new(10).await;
    let config = |config: &mut seeder::Config| (config.clock_grace_ms, config.idle_ms) = (0, 2500);
    let seeder = world.seeder("a", &[&goods], config).await;
    let at = seeder.peer_addrs();
    let mut terms = world.terms(&goods, client.peer(), at.peer);
    terms.staleness = 2000;
    let ticket = world.make(terms);
    // Admitted right after a heartbeat, which a nudge brings.
    let mut talk = eventually("an admission", || async {
        world.manager.nudge(&at).await;
        let mut talk = client.show(&at, &ticket).await;
        match talk.hear().await {
            Some(SeederMessage::Welcome { .. }) => Some(talk),
            Some(SeederMessage::Refusal(refusal)) => {
                assert_eq!(refusal.code, RefusalCode::StaleRevocations, "{refusal}");
                None
            }
            other => panic!("{other:?}"),
        }
    })
    .await;
    world.office.says.lock().unwrap().refuses = true;
    // The next event of the stream is that its client is silent for longer than that.
    talk.want(0..1).await;
    let ended = loop {
        match talk.chunk().await {
            Ok((chunk, _)) => assert_eq!(chunk, 0),
            Err(other) => break other,
        }
    };
    let SeederMessage::Refusal(refusal) = ended else { panic!("{ended:?}") };
    assert_eq!(refusal.code, RefusalCode::StaleRevocations, "{refusal}");
    stop(seeder).await;
}

#[tokio::test]
async fn a_sign_of_life_is_no_news_of_revocations_that_did_not_come() {
    let world = World::new(false).await;
    let goods = world.publish(1, 1);
    let client = Client::new(10).await;
    world.set_up("a", &[&goods], |_| {});
    world.office.revoke(Revocations::default());
    world.office.says.lock().unwrap().keeps_epochs = true;
    let seeder = world.start("a").await;
    let at = seeder.peer_addrs();
    let status = || seeder.status().unwrap();
    eventually("a heartbeat", || async { status()["heartbeat_age_ms"].as_u64() }).await;
    let mut terms = world.terms(&goods, client.peer(), at.peer);
    terms.staleness = DAY;
    let ticket = world.make(terms);
    let refusal = client.show(&at, &ticket).await.refusal().await;
    assert_eq!(refusal.code, RefusalCode::StaleRevocations, "{refusal}");

    world.office.says.lock().unwrap().keeps_epochs = false;
    world.manager.nudge(&at).await;
    eventually("the epoch", || async { (status()["revocation_epoch"] == 1).then_some(()) }).await;
    client.begin(&at, &ticket).await;
    stop(seeder).await;
}

#[tokio::test]
async fn an_allowance_is_the_end_of_it() {
    let world = World::new(false).await;
    let goods = world.publish(1, 4);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let at = seeder.peer_addrs();
    let mut terms = world.terms(&goods, client.peer(), at.peer);
    terms.allowance = CHUNK as u64;
    let ticket = world.make(terms);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    talk.want(0..4).await;
    let mut got = protocol::ChunkSet::new();
    loop {
        match talk.chunk().await {
            Ok((index, bytes)) => {
                assert_eq!(digest_of(&bytes), digest_of(goods.chunk(index)));
                got.insert(index);
                let ack = client.ack(world.office.network, &ticket, at.peer, got.clone());
                talk.say(ClientMessage::Ack(ack)).await;
            }
            Err(SeederMessage::Refusal(refusal)) => {
                assert_eq!(refusal.code, RefusalCode::AllowanceSpent);
                break;
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!(got.len() <= 2, "one chunk more than the allowance at most, for its last part: {got}");
    let again = client.show(&at, &ticket).await.refusal().await;
    assert_eq!(again.code, RefusalCode::AllowanceSpent);
    stop(seeder).await;
}

#[tokio::test]
async fn a_delivery_under_way_goes_on_past_its_lease_and_a_new_one_does_not() {
    let world = World::new(false).await;
    let goods = world.publish(1, 4);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |config| config.clock_grace_ms = 0).await;
    let at = seeder.peer_addrs();
    let mut terms = world.terms(&goods, client.peer(), at.peer);
    let transaction = terms.transaction;
    let first = {
        terms.end = now() + DAY;
        world.make(terms)
    };
    let (mut talk, _) = client.begin(&at, &first).await;
    talk.want(0..1).await;
    talk.chunk().await.unwrap();
    let ack = client.ack(world.office.network, &first, at.peer, protocol::ChunkSet::from_range(0..1));
    talk.say(ClientMessage::Finish { ack: Some(ack), completion: None }).await;
    assert_eq!(talk.hear().await, Some(SeederMessage::Window { window: 4, outstanding: 0 }));
    assert_eq!(talk.hear().await, Some(SeederMessage::Finished));

    let past = |transaction| {
        let mut terms = world.terms(&goods, client.peer(), at.peer);
        (terms.start, terms.end) = (now() - 8 * DAY, now() - DAY);
        if let Some(transaction) = transaction {
            terms.transaction = transaction;
        }
        world.make(terms)
    };
    let (_, welcome) = client.begin(&at, &past(Some(transaction))).await;
    assert_eq!(welcome.outstanding, 0);
    assert!(welcome.ack.is_some());
    let refusal = client.show(&at, &past(None)).await.refusal().await;
    assert_eq!(refusal.code, RefusalCode::Expired);
    stop(seeder).await;
}
