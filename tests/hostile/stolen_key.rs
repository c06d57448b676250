//! The day on which the ticket key is stolen: what it signed is void at once, and nobody who paid is shut out by that.

use std::fs;

use serde_json::json;

use super::support::{Bought, Job, Network, Settings, args, bytes, run, same, until};

/// Some seconds at [`RATE`].
const SIZE: usize = 4 << 20;
const RATE: &str = "600kB";

fn network() -> Network {
    let settings = Settings {
        manager: &["sales-ms=100", "heartbeat-ms=1000", "close-grace-ms=2000"],
        merchant: &["orders-ms=100", "status-ms=200", "retry-min-ms=50", "retry-max-ms=500"],
        seeder: &["retry-ms=100", "receipt-batch-ms=50", "receipt-direct-ms=200"],
    };
    Network::start_set(2, 2, settings)
}

fn under_way(bought: &Bought, network: &Network) -> Job {
    let mut fetch = bought.fetching(&network.path(&format!("out-{}", bought.transaction)));
    fetch.extend(args!["--limit", RATE, "--progress"]);
    let mut job = Job::start(fetch);
    job.says("\"percent\":20");
    job
}

fn stolen(network: &Network) {
    network.of("manager", args!["keys", "rotate", "ticket", "--stolen"]).ok();
    // Whoever is to be asked has heard of it.
    let newest = network.of("manager", args!["keys", "list"]).ok()["version"].clone();
    for seeder in ["seeder-1", "seeder-2"] {
        until("the key set at a seeder", || {
            (network.of(seeder, args!["status"]).ok()["key_set_version"] == newest).then_some(())
        });
    }
}

/// Times that these seeders ended or refused a delivery because its lease's key was given up.
fn refused(network: &Network) -> u64 {
    let of = |seeder: &str| network.of(seeder, args!["status"]).ok()["refusals"]["key-retired"].as_u64().unwrap_or(0);
    of("seeder-1") + of("seeder-2")
}

fn nobody_is_shut_out(policy: &str) {
    let mut network = network();
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(5, SIZE)).unwrap();
    let product = network.publish(&goods, &["--policy", policy]);
    let [by_file, by_id, half, running, offline] =
        ["by-file", "by-id", "half", "running", "offline"].map(|client| network.buy(&product, client));
    let out = |bought: &Bought| network.path(&format!("out-{}", bought.transaction));
    under_way(&half, &network).kill();
    let streams = under_way(&running, &network);
    stolen(&network);
    // What runs is ended by name within seconds, and goes on with the next lease.
    until("the end of the streams", || (refused(&network) > 0).then_some(()));
    let answer = streams.finish().ok();
    same(&goods, &out(&running).join("goods.bin"));
    assert_eq!(answer["resumed_from"], json!(0), "what came was not lost on the way: {answer}");

    let (_, arrived) = by_file.fetch(&out(&by_file));
    same(&goods, &arrived);
    run(args!["fetch", &by_id.transaction, "--home", &by_id.home, "-o", out(&by_id)]).ok();
    same(&goods, &out(&by_id).join("goods.bin"));
    let (answer, arrived) = half.fetch(&out(&half));
    same(&goods, &arrived);
    assert!(answer["resumed_from"].as_u64() > Some(0), "what had come came again: {answer}");

    // With the manager away nobody can give another lease: it is waited for, and says so.
    drop(network.daemons.remove("manager").unwrap());
    let mut waiting = offline.fetching(&network.path("out-offline"));
    waiting.push("--progress".into());
    let mut waiting = Job::start(waiting);
    waiting.says("\"cause\":\"manager-away\"");
    network.run_role("manager");
    waiting.says("\"stalled\":null");
    let path = waiting.finish().ok()["path"].as_str().unwrap().to_owned();
    same(&goods, path.as_ref());

    for bought in [&by_file, &by_id, &half, &running, &offline] {
        let shown = network.settled(&bought.transaction);
        assert_eq!(shown["deliveries"].as_array().unwrap().len(), 1, "it goes on as the same delivery: {shown}");
        assert_eq!(shown["release"]["captured"], true, "{shown}");
    }
    network.assert_books();
}

#[test]
fn a_stolen_ticket_key_shuts_no_buyer_out() {
    nobody_is_shut_out("at-release");
}

#[test]
fn a_stolen_ticket_key_shuts_no_buyer_out_whose_key_comes_on_completion() {
    nobody_is_shut_out("on-completion");
}
