//! What the design forbids, tried from outside. (The window of unacknowledged chunks, invariant 6, is tried in the
//! seeder's own tests, where a client can lie; receipts, invariant 8, in `absence`.)

use std::path::Path;

use serde_json::json;
use testnet::adversary::{Outcome, Tampering, present};
use testnet::{Client, Network, Plan, Terms, until};

use crate::{KIB, by_ticket, paid_lines, show_logs};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_design_forbids_does_not_happen() {
    show_logs();
    let network = Network::start(Plan::new(2)).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 900 * KIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();

    // 1, 2 and 11: no byte without every check, on every seeder, and each no has its name.
    let stranger = network.client("stranger").await.unwrap();
    let origin = network.manager.running().unwrap().origin().peer_addrs();
    for at in [network.seeders[0].at().unwrap(), network.seeders[1].at().unwrap(), origin] {
        for (who, tampering, name) in [
            (&stranger, Tampering::None, "wrong-client"),
            (&client, Tampering::NoEndorsement, "bad-endorsement"),
            (&client, Tampering::ForgedLease, "bad-manager-signature"),
        ] {
            let refused = present(who.home().keypair(), &ticket, tampering, &at).await.unwrap();
            assert!(matches!(&refused, Outcome::Refused(no) if no.code.as_str() == name), "{name}: {refused:?}");
        }
    }

    // A revoked one: refused where it is new, and cut off where it runs.
    let mut fetch = client.fetch(by_ticket(&ticket), Client::slow_options(150 * KIB));
    fetch.chunks(2).await.unwrap();
    network.revoke("transaction", id).await.unwrap();
    let at = network.seeders[0].at().unwrap();
    let shut = || async {
        let answer = present(client.home().keypair(), &ticket, Tampering::None, &at).await.ok()?;
        matches!(&answer, Outcome::Refused(no) if no.code.as_str() == "revoked").then_some(())
    };
    until("the revocation reaching the seeder", shut).await.unwrap();
    let error = fetch.done().await.unwrap_err();
    assert_eq!(error.cause(), "revoked", "{error}");

    // 4: ciphertext only, at the seeders and at the origin.
    let plain = std::fs::read(goods.path.join("main.bin")).unwrap();
    let needle = &plain[4096..4128];
    for folder in ["seeder-0", "seeder-1", "manager/origin"] {
        assert!(!contains(&network.dir().join(folder), needle), "plaintext in {folder}");
    }

    // 7 and 9: paid at most the ceiling, and the books are even.
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
    client.fetch_all(by_ticket(&ticket)).await.unwrap();
    let settled = network.until_state(id, "settled").await.unwrap();
    let paid: u64 = paid_lines(&settled).iter().map(|line| line["micros"].as_u64().unwrap()).sum();
    let ceiling = settled["deliveries"][0]["ceiling_micros"].as_u64().unwrap();
    assert!(paid > 0 && paid <= ceiling, "{paid} of {ceiling}: {settled}");
    assert_eq!(ceiling, ticket.ticket.lease.peek().unwrap().ceiling);
    let books = network.books().await.unwrap();
    assert!(books.debits > 0);

    // A repeated purchase under one key is one purchase.
    let seen = network.manager.control(json!({"cmd": "transactions"})).await.unwrap();
    assert_eq!(seen["transactions"].as_array().unwrap().len(), 2, "{seen}");
    network.stop().await.unwrap();
}

fn contains(folder: &Path, needle: &[u8]) -> bool {
    std::fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => contains(&path, needle),
            // The control socket is no file to read.
            false => std::fs::read(&path).is_ok_and(|bytes| bytes.windows(needle.len()).any(|w| w == needle)),
        }
    })
}
