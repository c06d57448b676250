//! A key of the network is stolen, and its operator replaces it with the commands that there are: what was for sale is for
//! sale again without its files, and nobody goes on paying for what nobody can fetch.

use std::fs;

use serde_json::Value;

use super::support::{Job, Network, args, bytes, run, same, text, until};

fn state(network: &Network, product: &str) -> String {
    let listed = network.of("manager", args!["products"]).ok();
    let products = listed["products"].as_array().unwrap();
    text(products.iter().find(|p| p["product"] == product).unwrap(), "state")
}

#[test]
fn a_stolen_catalogue_key_stops_sales_until_the_products_are_signed_again() {
    let network = Network::start(1);
    let file = network.path("film");
    fs::write(&file, bytes(3, 200_000)).unwrap();
    let product = network.publish(&file, &[]);
    let id = text(&product, "product");
    let gone = text(&network.publish(&file, &[]), "product");
    network.of("manager", args!["takedown", &gone]).ok();
    assert_eq!((state(&network, &id), state(&network, &gone)), ("on-sale".into(), "taken-down".into()));
    // Bought, and not fetched yet; and a client that has met the network.
    let bought = network.buy(&product, "early");
    let regular = network.buy(&product, "regular");
    regular.fetch(&network.path("regular-goods-before"));
    network.settled(&regular.transaction);
    fs::remove_file(&file).unwrap();

    let rotated = network.of("manager", args!["keys", "rotate", "catalogue", "--stolen"]).ok();
    let void = &rotated["void"];
    assert_eq!((void["product_count"].as_u64(), void["purchase_count"].as_u64()), (Some(1), Some(1)), "{rotated}");
    assert_eq!(void["products"][0]["product"], id.as_str());
    assert_eq!(void["purchases"][0]["transaction"], bought.transaction.as_str());
    let said = network.of_plain("manager", args!["keys", "void"]).stdout;
    for part in ["republish --all", "merchant refund", &bought.transaction] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(state(&network, &id), "void");
    run(network.buying(&product, "late")).refused(&["void"]);
    // The buyer is told what to do, and gets the money back.
    until("the seeders knowing the new keys", || {
        let version = |node: &str| network.of(node, args!["status"]).ok()["key_set_version"].as_u64();
        (version("seeder-1") == Some(2)).then_some(())
    });
    let failed = run(bought.fetching(&network.path("out")));
    failed.refused(&["ask the merchant for a refund"]);
    assert_eq!(failed.json()["error"]["cause"], "content-void", "{}", failed.stdout);
    let order = text(&void["purchases"][0], "order");
    network.of("merchant", args!["refund", &order]).ok();
    until("the refund", || (network.transaction(&bought.transaction)["state"] == "refunded").then_some(()));

    // The files are not needed: the ciphertext is at the origin.
    let again = network.of("manager", args!["republish", "--all"]).ok();
    let [done] = &again["republished"].as_array().unwrap()[..] else { panic!("{again}") };
    assert_eq!((&done["product"], &done["replaced"]), (&Value::from(id.as_str()), &product["manifest"]), "{again}");
    assert_eq!(state(&network, &id), "on-sale");
    let nothing = network.of("manager", args!["republish", &id]).ok();
    assert_eq!(nothing["republished"][0]["replaced"], Value::Null, "{nothing}");
    network.of("manager", args!["republish", &gone]).refused(&["not on sale"]);
    until("the copies under the new name", || {
        let shown = network.of("manager", args!["product", &id]).ok();
        (shown["holders"].as_array().unwrap().len() == 2).then_some(())
    });
    fs::write(&file, bytes(3, 200_000)).unwrap();
    // A buyer who never was here, and one who knows the network by its old keys.
    for client in ["late", "early", "regular"] {
        let bought = until("the shop selling it again", || {
            let mut buy = network.buying(&product, client);
            let ticket = network.path(&format!("{client}-again.ticket"));
            buy.extend(args!["-o", &ticket]);
            let bought = run(buy);
            (bought.status.code() == Some(0)).then(|| {
                let transaction = text(&bought.ok(), "transaction");
                super::support::Bought { transaction, ticket, home: network.path(client) }
            })
        });
        let (_, goods) = bought.fetch(&network.path(&format!("{client}-goods")));
        same(&file, &goods);
        network.settled(&bought.transaction);
    }
    // What was delivered under the old name is fetched no more, and no further delivery is opened for trying.
    let failed = run(regular.fetching(&network.path("regular-goods-again")));
    assert_eq!(failed.json()["error"]["cause"], "content-void", "{} {}", failed.stdout, failed.stderr);
    let opened = network.transaction(&regular.transaction)["deliveries"].as_array().unwrap().len();
    assert_eq!(opened, 1, "{}", network.transaction(&regular.transaction));
    network.assert_books();
}

#[test]
fn a_running_download_ends_by_name_when_the_key_under_its_product_is_stolen() {
    let network = Network::start(2);
    let file = network.path("film");
    fs::write(&file, bytes(4, 4 << 20)).unwrap();
    let product = network.publish(&file, &[]);
    let [bought, idle] = ["runs", "came-by"].map(|client| network.buy(&product, client));
    // One that has met the network, has a part of it, and hears of nothing.
    let slow = |bought: &super::support::Bought, out: &str| {
        let mut fetch = bought.fetching(&network.path(out));
        fetch.extend(args!["--limit", "400kB", "--progress"]);
        let mut job = Job::start(fetch);
        job.says("\"percent\":20");
        job
    };
    slow(&idle, "half").kill();
    let running = slow(&bought, "out");
    network.of("manager", args!["keys", "rotate", "catalogue", "--stolen"]).ok();

    let ended = running.finish();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("ask the merchant for a refund"), "{}", ended.stderr);
    assert_eq!(ended.json()["error"]["cause"], "content-void", "{}", ended.stdout);
    assert!(!network.path("out").join("film").exists());
    // Who goes on with what it has is told the same, whatever keys it knows.
    let failed = run(idle.fetching(&network.path("half")));
    failed.refused(&["ask the merchant for a refund"]);
    assert_eq!(failed.json()["error"]["cause"], "content-void", "{}", failed.stdout);
    let refused = |node: &str| network.of(node, args!["status"]).ok()["refusals"]["key-retired"].as_u64();
    assert!(["seeder-1", "seeder-2"].iter().any(|seeder| refused(seeder) > Some(0)), "by the client alone");

    // Under its new name it is sold and fetched as before.
    network.of("manager", args!["republish", "--all"]).ok();
    let again = until("the shop selling it again", || {
        let ticket = network.path("again.ticket");
        let mut buy = network.buying(&product, "again");
        buy.extend(args!["-o", &ticket]);
        let bought = run(buy);
        let bought = (bought.status.code() == Some(0)).then(|| bought.ok())?;
        let transaction = text(&bought, "transaction");
        Some(super::support::Bought { transaction, ticket, home: network.path("again") })
    });
    let (_, goods) = again.fetch(&network.path("again-goods"));
    same(&file, &goods);
    network.assert_books();
}
