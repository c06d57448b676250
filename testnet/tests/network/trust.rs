//! Trust that changes while a network runs: keys are replaced, things are revoked and taken down, and seeders that were
//! away, or cut off, end up knowing it.

use client_node::LinkOptions;
use protocol::ticket::TicketEnvelope;
use serde_json::{Value, json};
use testnet::adversary::{Outcome, Tampering, present};
use testnet::{Client, Network, Plan, Terms, until};

use crate::{KIB, assert_same, by_ticket, show_logs};

/// Replaces a key, with the root key beside the manager.
pub(crate) async fn change_keys(network: &Network, mut request: Value) -> Value {
    request["cmd"] = json!("keys-prepare");
    request["margin_ms"] = json!(60_000);
    let prepared = network.manager.control(request).await.unwrap();
    let asked: Vec<u8> = serde_json::from_value(prepared["request"].clone()).unwrap();
    let root = network.dir().join("manager").join("root.key");
    let signed = manager_node::sign_key_set(&asked, &root, None).unwrap();
    network.manager.control(json!({"cmd": "keys-install", "signed": signed})).await.unwrap();
    prepared
}

/// What a seeder says to this client's ticket: a refusal's name, or `served`, also where earlier questions used up the
/// window: they drew chunks and acknowledged none.
async fn shown(network: &Network, number: usize, client: &Client, ticket: &TicketEnvelope) -> String {
    let at = network.seeders[number].at().unwrap();
    match present(client.home().keypair(), ticket, Tampering::None, &at).await.unwrap() {
        Outcome::Refused(refusal) => refusal.code.as_str().to_owned(),
        _ => "served".to_owned(),
    }
}

async fn until_shown(network: &Network, number: usize, client: &Client, ticket: &TicketEnvelope, what: &str) {
    let there = || async { (shown(network, number, client, ticket).await == what).then_some(()) };
    until(&format!("seeder {number} answering {what}"), there).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seeder_that_was_off_catches_up_with_keys_and_revocations() {
    show_logs();
    let mut network = Network::start(Plan::new(1).copies(2)).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 300 * KIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (_, retired) = network.ticket(&client, product.product).await.unwrap();
    network.seeders[0].stop().await.unwrap();

    // While it is off: every key that it needs is another one, and there are more epochs than go into one answer.
    let mut revoked = Vec::new();
    for _ in 0..6 {
        let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
        network.revoke("transaction", id).await.unwrap();
        revoked.push(ticket);
    }
    for purpose in ["ticket", "revocation", "receipt-sealing", "enrolment"] {
        change_keys(&network, json!({"purpose": purpose})).await;
    }
    let (last, ticket) = network.ticket(&client, product.product).await.unwrap();
    network.revoke("transaction", last).await.unwrap();
    revoked.push(ticket);
    let (id, fresh) = network.ticket(&client, product.product).await.unwrap();
    assert_ne!(fresh.ticket.lease.signer(), retired.ticket.lease.signer());

    network.seeders[0].start().await.unwrap();
    until_shown(&network, 0, &client, revoked.last().unwrap(), "revoked").await;
    for ticket in &revoked {
        assert_eq!(shown(&network, 0, &client, ticket).await, "revoked");
    }
    let status = network.seeders[0].control(json!({"cmd": "status"})).await.unwrap();
    assert_eq!((&status["key_set_version"], &status["fork"]), (&json!(5), &Value::Null), "{status}");
    // A ticket that the retired key signed before stays good, and one of the new key is.
    assert_eq!(shown(&network, 0, &client, &retired).await, "served");
    let outcome = client.fetch_all(by_ticket(&fresh)).await.unwrap();
    assert_same(&goods, &outcome.path);
    network.until_state(id, "settled").await.unwrap();

    // The old key was stolen after all: what it signed is void, and the mailbox has a good ticket in its place.
    change_keys(&network, json!({"revoke": retired.ticket.lease.signer()})).await;
    until_shown(&network, 0, &client, &retired, "key-retired").await;
    assert_eq!(shown(&network, 0, &client, &fresh).await, "served");
    // The epochs of a stolen key are said again by the next one: a newcomer follows them.
    let epochs = network.manager.control(json!({"cmd": "keys-list"})).await.unwrap();
    let of = |state: &str| {
        let keys = epochs["keys"].as_array().unwrap().iter();
        keys.filter(|key| key["purpose"] == "revocation" && key["state"] == state).map(|k| k["key"].clone()).next()
    };
    change_keys(&network, json!({"revoke": of("active").unwrap()})).await;
    let newcomer = network.add_seeder().await.unwrap();
    network.until_copies(product.product, 3).await.unwrap();
    // The last of them: the key of the others is void, too.
    until_shown(&network, newcomer, &client, revoked.last().unwrap(), "revoked").await;
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newcomer_follows_revocations_whose_key_was_retired_and_revoked_only_later() {
    show_logs();
    let mut network = Network::start(Plan::new(1).copies(2)).await.unwrap();
    let (_, product) = network.publish_noise("goods", 100 * KIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    let mut revoked = Vec::new();
    let mut revoke = async |network: &Network| {
        let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
        network.revoke("transaction", id).await.unwrap();
        revoked.push(ticket);
    };
    revoke(&network).await;
    let retired = change_keys(&network, json!({"purpose": "revocation"})).await["replaced"].clone();
    // The newest epoch is of the new key.
    revoke(&network).await;
    change_keys(&network, json!({"revoke": retired})).await;
    let newcomer = network.add_seeder().await.unwrap();
    network.until_copies(product.product, 3).await.unwrap();
    for ticket in &revoked {
        until_shown(&network, newcomer, &client, ticket, "revoked").await;
    }
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_product_that_wants_fresh_revocations_is_not_served_by_who_has_heard_nothing() {
    show_logs();
    let plan =
        Plan::new(1).manager(|config| config.heartbeat_ms = 600_000).seeder(|_, config| config.clock_grace_ms = 500);
    let mut network = Network::start(plan).await.unwrap();
    let strict = Terms { staleness_ms: 1, ..Terms::default() };
    let (_, fresh) = network.publish_noise("fresh", 100 * KIB, &strict).await.unwrap();
    let (_, lax) = network.publish_noise("lax", 100 * KIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (_, strict) = network.ticket(&client, fresh.product).await.unwrap();
    let (_, lax) = network.ticket(&client, lax.product).await.unwrap();
    network.manager.crash().await;
    // Nothing new is heard any more: the clock alone makes it stale.
    until_shown(&network, 0, &client, &strict, "stale-revocations").await;
    // More often than the window has chunks.
    for _ in 0..4 {
        assert_eq!(shown(&network, 0, &client, &lax).await, "served");
    }
    network.manager.start().await.unwrap();
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takedown_purges_and_a_revoked_certificate_ends_at_once() {
    show_logs();
    let network = Network::start(Plan::new(2)).await.unwrap();
    let (_, product) = network.publish_noise("goods", 300 * KIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();

    // A seeder whose certificate is void serves nobody, and is in no new lease.
    let gone = network.seeders[1].peer();
    network.revoke("seeder", gone).await.unwrap();
    let refused = || async {
        let status = network.seeders[1].control(json!({"cmd": "status"})).await.ok()?;
        (status["serving"] == false && status["not_serving_because"].as_str()?.contains("revoked")).then_some(())
    };
    until("the revoked seeder knowing it", refused).await.unwrap();
    let (_, later) = network.ticket(&client, product.product).await.unwrap();
    assert!(!later.ticket.lease.peek().unwrap().sources.contains(&gone));

    // A merchant whose certificate is void sells nothing; what it sold before is served.
    network.revoke("merchant", network.merchants[0].running().unwrap().peer_id()).await.unwrap();
    let error = network.buy(&client, product.product).await.unwrap_err().to_string();
    assert!(error.contains("revoked"), "{error}");
    assert_eq!(shown(&network, 0, &client, &ticket).await, "served");

    network.revoke("content", product.product).await.unwrap();
    let purged = || async { (!network.seeders[0].holds(1).await).then_some(()) };
    until("the purge", purged).await.unwrap();
    let link = client_node::inbox(client.home(), Some(&ticket.join), &LinkOptions::default()).await.unwrap();
    assert!(link.items.iter().any(|item| item.transaction == id));
    let answer = shown(&network, 0, &client, &ticket).await;
    assert!(["content-not-held", "revoked"].contains(&answer.as_str()), "{answer}");
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_root_key_is_replaced_and_everybody_follows_also_with_a_join_line_of_the_first_day() {
    show_logs();
    let mut network = Network::start(Plan::new(1).copies(2)).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 200 * KIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (_, before) = network.ticket(&client, product.product).await.unwrap();
    network.seeders[0].stop().await.unwrap();

    let file = |name: &str| network.dir().join("manager").join(name);
    let install = async |asked: &Value, root: &str| {
        let asked: Vec<u8> = serde_json::from_value(asked["request"].clone()).unwrap();
        let signed = manager_node::sign_key_set(&asked, &file(root), None).map_err(|error| error.to_string())?;
        let request = json!({"cmd": "keys-install", "signed": signed});
        network.manager.control(request).await.map_err(|error| error.to_string())
    };
    // Somebody with the root key cannot hand the network to another key than the one that was named at the start.
    let thief = network.client("thief").await.unwrap().home().keypair().peer_id();
    let stolen = manager_node::sign_handover(&file("root.key"), None, thief, None).unwrap();
    let asked =
        network.manager.control(json!({"cmd": "keys-prepare", "handover": stolen, "margin_ms": 0})).await.unwrap();
    assert!(install(&asked, "root.key").await.unwrap_err().contains("is to sign it"));
    assert!(install(&asked, "../thief/home/key").await.unwrap_err().contains("than the one that was named"));

    let handover = std::fs::read(file("next-root.handover")).unwrap();
    let request = json!({"cmd": "keys-prepare", "handover": handover, "margin_ms": 0});
    let asked = network.manager.control(request).await.unwrap();
    assert!(install(&asked, "root.key").await.unwrap_err().contains("is to sign it"));
    install(&asked, "next-root.key").await.unwrap();
    // From now on the old root key signs nothing.
    let asked = network.manager.control(json!({"cmd": "keys-prepare", "purpose": "ticket", "margin_ms": 60_000})).await;
    let asked = asked.unwrap();
    assert!(install(&asked, "root.key").await.is_err());
    install(&asked, "next-root.key").await.unwrap();
    network.manager.stop().await.unwrap();
    network.manager.start().await.unwrap();

    network.seeders[0].start().await.unwrap();
    let (id, fresh) = network.ticket(&client, product.product).await.unwrap();
    assert_eq!(fresh.join.network(), before.join.network());
    until_shown(&network, 0, &client, &fresh, "served").await;
    assert_eq!(shown(&network, 0, &client, &before).await, "served");
    let newcomer = network.add_seeder().await.unwrap();
    network.until_copies(product.product, 3).await.unwrap();
    assert_eq!(shown(&network, newcomer, &client, &fresh).await, "served");
    let friend = network.client("friend").await.unwrap();
    let (_, gift) = network.ticket(&friend, product.product).await.unwrap();
    for (client, ticket) in [(&client, &fresh), (&friend, &gift)] {
        assert_same(&goods, &client.fetch_all(by_ticket(ticket)).await.unwrap().path);
    }
    network.until_state(id, "settled").await.unwrap();
    // Evidence goes back to the first root key, through the handover.
    let path = network.dir().join("evidence");
    network.manager.control(json!({"cmd": "evidence", "id": id, "path": path})).await.unwrap();
    let pack = protocol::evidence::EvidencePack::from_bytes(&std::fs::read(&path).unwrap()).unwrap();
    let report = pack.verify(&before.join.root);
    assert!(report.ok, "{report:?}");
    network.stop().await.unwrap();
}

/// When the certificates of the seeders and the merchant end, by their own word: another certificate ends later.
async fn ends(network: &Network) -> Vec<u64> {
    let mut ends = Vec::new();
    let merchant = network.merchants[0].control(json!({"cmd": "status"})).await.unwrap();
    for seeder in network.seeders.iter().filter(|seeder| seeder.running().is_ok()) {
        let status = seeder.control(json!({"cmd": "status"})).await.unwrap();
        ends.push(status["certificate_until"].as_u64().unwrap());
    }
    ends.push(merchant["certificate_until"].as_u64().unwrap());
    ends
}

async fn until_enrolled_anew(network: &Network, before: &[u64]) {
    let anew = || async { ends(network).await.iter().zip(before).all(|(now, before)| now > before).then_some(()) };
    until("everybody having another certificate", anew).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_that_a_key_change_makes_void_are_replaced_and_goods_go_on_coming() {
    show_logs();
    let mut network = Network::start(Plan::new(2).copies(2)).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 300 * KIB, &Terms::default()).await.unwrap();
    // It remembers the keys of today.
    let client = network.client("client").await.unwrap();
    let (_, first) = network.ticket(&client, product.product).await.unwrap();
    std::fs::remove_dir_all(client.fetch_all(by_ticket(&first)).await.unwrap().path).unwrap();
    network.seeders[0].stop().await.unwrap();

    let before = ends(&network).await;
    change_keys(&network, json!({"purpose": "enrolment", "stolen": true})).await;
    until_enrolled_anew(&network, &before).await;
    // One that has only the new keys, and one that has only the old ones.
    let newcomer = network.client("newcomer").await.unwrap();
    for buyer in [&newcomer, &client] {
        let (id, fresh) = network.ticket(buyer, product.product).await.unwrap();
        assert_same(&goods, &buyer.fetch_all(by_ticket(&fresh)).await.unwrap().path);
        network.until_state(id, "settled").await.unwrap();
    }
    // Who was off has another one as soon as it is back.
    network.seeders[0].start().await.unwrap();
    let (_, ticket) = network.ticket(&client, product.product).await.unwrap();
    until_shown(&network, 0, &client, &ticket, "served").await;

    // The same where the old key's word is to end before the certificates do.
    let before = ends(&network).await;
    change_keys(&network, json!({"purpose": "enrolment", "good_for_ms": 60_000})).await;
    until_enrolled_anew(&network, &before).await;
    // And where a lost disk took the new certificate along.
    network.seeders[1].stop().await.unwrap();
    std::fs::remove_file(network.dir().join("seeder-1").join("seeder.redb")).unwrap();
    network.seeders[1].start().await.unwrap();
    until_shown(&network, 1, &client, &ticket, "served").await;
    network.stop().await.unwrap();
}
