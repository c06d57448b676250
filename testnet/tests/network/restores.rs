//! A manager that comes back from an old backup: what it had said since then is not lost where others have it.

use std::path::Path;
use std::time::Duration;

use protocol::manifest::KeyPolicy;
use serde_json::{Value, json};
use testnet::adversary::{Outcome, Tampering, present};
use testnet::{Client, Network, Plan, Terms, until};

use crate::trust::change_keys;
use crate::{KIB, by_ticket, show_logs};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy(&entry.path(), &target),
            kind if kind.is_file() => drop(std::fs::copy(entry.path(), target).unwrap()),
            // The control socket.
            _ => {}
        }
    }
}

async fn statements(network: &Network) -> Value {
    network.seeders[0].control(json!({"cmd": "statements"})).await.unwrap()
}

fn numbers(listed: &Value) -> Vec<u64> {
    listed["statements"].as_array().unwrap().iter().map(|line| line["number"].as_u64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revocations_and_statements_of_after_the_backup_are_reconciled() {
    show_logs();
    let mut network = Network::start(Plan::new(1).copies(2)).await.unwrap();
    let (_, product) = network.publish_noise("goods", 200 * KIB, &Terms::default()).await.unwrap();
    let (client, new) = (network.client("client").await.unwrap(), network.client("new").await.unwrap());
    let deliver = async |network: &Network, buyer: &str| {
        let buyer = network.client(buyer).await.unwrap();
        let (id, ticket) = network.ticket(&buyer, product.product).await.unwrap();
        // So slowly that the seeder has a part in it beside the origin.
        buyer.fetch(by_ticket(&ticket), Client::slow_options(200 * KIB)).done().await.unwrap();
        network.until_state(id, "settled").await.unwrap();
        network.manager.control(json!({"cmd": "statements-make"})).await.unwrap();
        id
    };
    deliver(&network, "first").await;
    let (moved, old_ticket) = network.ticket(&client, product.product).await.unwrap();
    let (kept, kept_ticket) = network.ticket(&client, product.product).await.unwrap();
    assert_eq!(numbers(&statements(&network).await), [1]);

    let (dir, backup) = (network.dir().join("manager"), network.dir().join("backup"));
    network.manager.stop().await.unwrap();
    copy(&dir, &backup);
    network.manager.start().await.unwrap();

    // What the backup does not know: a delivery with its statement, a revocation, and a move.
    let lost = deliver(&network, "second").await;
    deliver(&network, "third").await;
    assert_eq!(numbers(&statements(&network).await), [3, 2, 1]);
    network.revoke("transaction", kept).await.unwrap();
    let choice = client_node::MoveChoice::Some([moved].into());
    let link = client_node::LinkOptions::default();
    client_node::move_purchases(client.home(), new.peer(), &choice, None, &link).await.unwrap();
    let heard = || async {
        let status = network.seeders[0].control(json!({"cmd": "status"})).await.ok()?;
        (status["revocation_epoch"].as_u64()? >= 2).then_some(())
    };
    until("the seeder hearing the revocations", heard).await.unwrap();

    network.manager.stop().await.unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::rename(&backup, &dir).unwrap();
    let restore = manager_node::mark_restored(&dir, 0).unwrap();
    network.manager.start().await.unwrap();
    assert!(network.transaction(lost).await.is_err(), "the backup does not have it");

    // The manager learns from the seeder what it had revoked, and says it again: a newcomer hears it.
    let recovered = || async {
        let log = network.manager.control(json!({"cmd": "audit"})).await.ok()?.to_string();
        (log.contains(&format!("transaction {kept}"))
            && log.contains(&format!("transaction {moved} before generation 1")))
        .then_some(())
    };
    until("the revocations coming back", recovered).await.unwrap();
    let newcomer = network.add_seeder().await.unwrap();
    network.until_copies(product.product, 3).await.unwrap();
    for ticket in [&kept_ticket, &old_ticket] {
        let at = network.seeders[newcomer].at().unwrap();
        let refused = || async {
            let shown = present(client.home().keypair(), ticket, Tampering::None, &at).await.ok()?;
            matches!(&shown, Outcome::Refused(no) if no.code.as_str() == "revoked").then_some(())
        };
        until("the newcomer refusing it", refused).await.unwrap();
    }
    // The move is made again by the same command, and the books are right again.
    let again = client_node::move_purchases(client.home(), new.peer(), &choice, None, &link).await.unwrap();
    assert_eq!(again.items[0].generation, Some(2), "{:?}", again.items);
    let mut options = Client::options();
    options.join = Some(old_ticket.join.clone());
    new.fetch(client_node::Target::Transaction(moved), options).done().await.unwrap();

    // The statement that the manager lost is put aside for the one that takes its place.
    let replaced = || async {
        network.manager.control(json!({"cmd": "statements-make"})).await.ok()?;
        let listed = statements(&network).await;
        let aside = listed["superseded"].as_array()?.iter().filter(|line| line["restore"] == restore);
        let aside: Vec<u64> = aside.filter_map(|line| line["statement"]["number"].as_u64()).collect();
        (aside.contains(&2) && aside.contains(&3) && numbers(&listed).contains(&2)).then_some(())
    };
    until("the new statement", replaced).await.unwrap();
    let trouble = statements(&network).await["not_fetched_because"].clone();
    assert!(trouble.is_null(), "{trouble}");
    // It goes into a file of its own, which proves what the manager once owed.
    let path = network.dir().join("superseded");
    let asked = json!({"cmd": "statement-file", "path": path, "superseded": restore});
    let written = network.seeders[0].control(asked).await.unwrap();
    assert_eq!((&written["first"], &written["next"]), (&json!(2), &Value::Null), "{written}");
    let file = protocol::evidence::StatementFile::from_bytes(&std::fs::read(&path).unwrap()).unwrap();
    let (lines, good) = protocol::evidence::check_statements(&file, &old_ticket.join.root);
    assert!(lines.iter().all(|line| line.problem.is_none()), "{lines:?}");
    assert_eq!(good[0].number, 2);
    let log = network.manager.control(json!({"cmd": "audit"})).await.unwrap();
    let log: Vec<&Value> = log["entries"].as_array().unwrap().iter().filter(|line| line["what"] == "restore").collect();
    assert_eq!(log.len(), 1);
    assert_eq!(log[0]["subject"], restore.to_string());
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_were_changed_after_the_backup_are_learned_of_and_replaced_without_a_fork() {
    show_logs();
    let mut network = Network::start(Plan::new(1).copies(2)).await.unwrap();
    let (_, product) = network.publish_noise("goods", 200 * KIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (sold, ticket) = network.ticket(&client, product.product).await.unwrap();
    let (gone, _) = network.ticket(&client, product.product).await.unwrap();
    let (dir, backup) = (network.dir().join("manager"), network.dir().join("backup"));
    network.manager.stop().await.unwrap();
    copy(&dir, &backup);
    network.manager.start().await.unwrap();

    let knows = async |network: &Network, version: u64| {
        let there = || async {
            let status = network.seeders[0].control(json!({"cmd": "status"})).await.ok()?;
            (status["key_set_version"] == version && status["fork"].is_null()).then_some(())
        };
        until(&format!("the seeder having key set {version}"), there).await.unwrap();
    };
    for purpose in ["ticket", "receipt-sealing", "revocation"] {
        change_keys(&network, json!({"purpose": purpose})).await;
    }
    knows(&network, 4).await;
    // Revoked under a key that the backup does not have, in an epoch that every seeder has.
    network.revoke("transaction", gone).await.unwrap();
    let heard = || async {
        let status = network.seeders[0].control(json!({"cmd": "status"})).await.ok()?;
        (status["revocation_epoch"].as_u64()? >= 1).then_some(())
    };
    until("the seeder hearing the revocation", heard).await.unwrap();
    // What is delivered now is acknowledged in batches that the backup's keys do not open. The origin's would be gone with
    // the folder.
    network.manager.crash_origin().await.unwrap();
    client.fetch_all(by_ticket(&ticket)).await.unwrap();
    network.until_state(sold, "settled").await.unwrap();

    network.manager.crash().await;
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::rename(&backup, &dir).unwrap();
    manager_node::mark_restored(&dir, 0).unwrap();
    network.manager.start().await.unwrap();
    let told = || async {
        let status = network.manager.control(json!({"cmd": "status"})).await.ok()?;
        (status["key_set_version"] == 4).then_some(status)
    };
    let status = until("the manager being shown the key set", told).await.unwrap();
    assert_eq!(status["keys_missing"], json!(["ticket", "revocation", "receipt-sealing"]), "{status}");
    assert!(status["trouble"].as_str().unwrap().contains("willcall manager keys rotate"), "{status}");
    let error = network.buy(&client, product.product).await.unwrap_err().to_string();
    assert!(error.contains("key-retired") && error.contains("does not have"), "{error}");

    // One rotation, signed wherever the root key is, replaces all of them.
    let prepared = change_keys(&network, json!({"purpose": "receipt-sealing"})).await;
    assert_eq!((&prepared["version"], &prepared["lost"]), (&json!(5), &json!(["ticket", "revocation"])));
    knows(&network, 5).await;
    // What was revoked meanwhile is learned of, and said again.
    let recovered = || async {
        let log = network.manager.control(json!({"cmd": "audit"})).await.ok()?.to_string();
        log.contains(&format!("transaction {gone}")).then_some(())
    };
    until("the revocation coming back", recovered).await.unwrap();
    // The receipts of before are sealed again, and the delivery is paid.
    network.until_state(sold, "settled").await.unwrap();
    let later = network.client("later").await.unwrap();
    let (id, ticket) = network.ticket(&later, product.product).await.unwrap();
    later.fetch_all(by_ticket(&ticket)).await.unwrap();
    network.until_state(id, "settled").await.unwrap();
    network.manager.stop().await.unwrap();
    network.manager.start().await.unwrap();
    let status = network.manager.control(json!({"cmd": "status"})).await.unwrap();
    assert_eq!((&status["key_set_version"], &status["trouble"]), (&json!(5), &Value::Null), "{status}");
    network.stop().await.unwrap();
}

/// Its invitation is not in the backup, and it was used up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seeder_that_was_enrolled_after_the_backup_is_taken_back_by_its_certificate() {
    show_logs();
    let mut network = Network::start(Plan::new(1).copies(2)).await.unwrap();
    let (_, product) = network.publish_noise("goods", 200 * KIB, &Terms::default()).await.unwrap();
    let (dir, backup) = (network.dir().join("manager"), network.dir().join("backup"));
    network.manager.stop().await.unwrap();
    copy(&dir, &backup);
    network.manager.start().await.unwrap();
    let late = network.add_seeder().await.unwrap();
    let peer = network.seeders[late].at().unwrap().peer;
    let here = async || network.is_here(peer).await.ok()?.then_some(());
    until("the seeder being enrolled", here).await.unwrap();
    network.manager.stop().await.unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::rename(&backup, &dir).unwrap();
    manager_node::mark_restored(&dir, 0).unwrap();
    network.manager.start().await.unwrap();
    let here = async || network.is_here(peer).await.ok()?.then_some(());
    until("the seeder being known again", here).await.unwrap();
    // What it delivers counts.
    network.until_copies(product.product, 2).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
    client.fetch_all(by_ticket(&ticket)).await.unwrap();
    network.until_state(id, "settled").await.unwrap();
    network.stop().await.unwrap();
}

/// The restored manager gives the next download a number that this client has used up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_had_fetched_again_after_the_backup_fetches_once_more() {
    show_logs();
    let mut network = Network::start(Plan::new(0)).await.unwrap();
    let terms = Terms { price: "12.99".to_owned(), ..Terms::default() };
    let (_, product) = network.publish_noise("goods", 40 * 1024 * KIB, &terms).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
    client.fetch_all(by_ticket(&ticket)).await.unwrap();
    network.until_state(id, "settled").await.unwrap();
    let (dir, backup) = (network.dir().join("manager"), network.dir().join("backup"));
    network.manager.stop().await.unwrap();
    copy(&dir, &backup);
    network.manager.start().await.unwrap();
    std::fs::remove_dir_all(client.out()).unwrap();
    client.fetch_all(by_ticket(&ticket)).await.unwrap();
    network.manager.stop().await.unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::rename(&backup, &dir).unwrap();
    manager_node::mark_restored(&dir, 0).unwrap();
    network.manager.start().await.unwrap();
    std::fs::remove_dir_all(client.out()).unwrap();
    let outcome = client.fetch_all(by_ticket(&ticket)).await.unwrap();
    assert!(outcome.reported, "{outcome:?}");
    network.stop().await.unwrap();
}

/// What was taken down since is sold to nobody, and whoever has the money back gets no key, although the backup knows
/// nothing of either and no seeder can be asked at first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_sold_after_a_restore_before_a_seeder_was_asked() {
    show_logs();
    let plan = Plan::new(1).copies(2).manager(|config| config.close_grace_ms = 3000);
    let mut network = Network::start(plan).await.unwrap();
    let (_, banned) = network.publish_noise("banned", 100 * KIB, &Terms::default()).await.unwrap();
    let terms = Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() };
    let (_, fair) = network.publish_noise("fair", 200 * KIB, &terms).await.unwrap();
    let (client, other) = (network.client("client").await.unwrap(), network.client("other").await.unwrap());
    let (given_back, ticket) = network.ticket(&client, fair.product).await.unwrap();
    let (kept, kept_ticket) = network.ticket(&other, fair.product).await.unwrap();
    let (dir, backup) = (network.dir().join("manager"), network.dir().join("backup"));
    network.manager.stop().await.unwrap();
    copy(&dir, &backup);
    network.manager.start().await.unwrap();

    let refund = json!({"cmd": "refund", "id": given_back});
    network.manager.control(refund).await.unwrap();
    network.revoke("content", banned.product).await.unwrap();
    let heard = || async {
        let status = network.seeders[0].control(json!({"cmd": "status"})).await.ok()?;
        (status["revocation_epoch"].as_u64()? >= 2).then_some(())
    };
    until("the seeder hearing of both", heard).await.unwrap();
    network.seeders[0].stop().await.unwrap();
    network.manager.stop().await.unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::rename(&backup, &dir).unwrap();
    manager_node::mark_restored(&dir, 0).unwrap();
    network.manager.start().await.unwrap();

    // The order waits, with its payment held.
    let order = client_node::BuyRequest {
        merchant_url: network.merchants[0].url().unwrap(),
        product: banned.product,
        provider: "prepaid".to_owned(),
        token: network.voucher(10_000).await.unwrap(),
        client: None,
        idempotency_key: None,
        place: None,
        wait: Duration::from_millis(100),
    };
    let ordered = client_node::buy(other.home(), order).await.unwrap();
    assert_eq!((ordered.state.as_str(), ordered.transaction), ("pending", None), "{ordered:?}");
    let at_shop = async || {
        let asked = json!({"cmd": "order", "order": ordered.order});
        network.merchants[0].control(asked).await.unwrap()
    };
    let refused = || async { at_shop().await.to_string().contains("came back from a backup").then_some(()) };
    until("the shop being told why", refused).await.unwrap();
    let status = network.merchants[0].control(json!({"cmd": "status"})).await.unwrap();
    assert_eq!(status["orders"]["waiting"], 1, "{status}");
    assert!(status["orders"]["waits"].as_str().unwrap().contains("came back from a backup"), "{status}");
    let trouble = network.manager.control(json!({"cmd": "status"})).await.unwrap()["trouble"].to_string();
    assert!(trouble.contains("came back from a backup") && trouble.contains("revoke seeder"), "{trouble}");
    // The origin has all of the ciphertext; the key is what is not given out.
    let options = client_node::FetchOptions { manager_patience: Duration::from_secs(7), ..Client::options() };
    let error = other.fetch(by_ticket(&kept_ticket), options.clone()).done().await.unwrap_err();
    assert!(error.to_string().contains("came back from a backup"), "{error}");
    // The shop may have told of this one.
    let error = client.fetch(by_ticket(&ticket), options).done().await.unwrap_err().to_string();
    assert!(["came back from a backup", "revoked"].iter().any(|why| error.contains(why)), "{error}");
    // Nor when it was started once more.
    network.manager.stop().await.unwrap();
    network.manager.start().await.unwrap();
    let trouble = network.manager.control(json!({"cmd": "status"})).await.unwrap()["trouble"].to_string();
    assert!(trouble.contains("came back from a backup"), "{trouble}");

    network.seeders[0].start().await.unwrap();
    let serving = || async {
        let status = network.manager.control(json!({"cmd": "status"})).await.ok()?;
        status["trouble"].is_null().then_some(())
    };
    until("the manager serving again", serving).await.unwrap();
    let given_up = || async {
        let order = network.merchants[0].control(json!({"cmd": "order", "order": ordered.order})).await.ok()?;
        (order["stage"] == "cancelled").then_some(order)
    };
    let order = until("the order being given up", given_up).await.unwrap();
    assert!(order.to_string().contains("unknown-product"), "{order}");
    let error = client.fetch_all(by_ticket(&ticket)).await.unwrap_err();
    assert_eq!(error.cause(), "revoked", "{error}");
    other.fetch_all(by_ticket(&kept_ticket)).await.unwrap();
    network.until_state(kept, "settled").await.unwrap();
    assert_eq!(network.transaction(given_back).await.unwrap()["release"]["captured"], false);
    network.stop().await.unwrap();
}
