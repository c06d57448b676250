//! Power cuts: each role is killed in the middle of a delivery and started again. The client has to complete, nothing
//! that was paid for may be lost, and no chunk may be counted twice.

use std::fs;

use serde_json::{Value, json};

use super::support::{Bought, Job, Network, args, bytes, run, same, until};

/// Big enough to be under way for some seconds at [`RATE`].
const SIZE: usize = 5 << 20;
const RATE: &str = "1MB";

/// A fetch that has begun and has some seconds to go.
fn under_way(bought: &Bought, network: &Network) -> Job {
    let mut fetch = bought.fetching(&network.path("goods"));
    fetch.extend(args!["--limit", RATE, "--progress"]);
    let mut job = Job::start(fetch);
    job.says("(20%)");
    job
}

/// All there is to hold after the delivery, whatever happened in between. `crashed` are the seeders that were killed, by
/// peer ID: each may lose what it had sent and the client had not acknowledged yet, one window, and no more.
#[track_caller]
fn assert_whole(network: &Network, bought: &Bought, product: &Value, answer: &Value, crashed: &[String]) {
    same(&network.path("album"), &network.path("goods/album"));
    let shown = until("the receipts of all who were not killed", || {
        let shown = network.transaction(&bought.transaction);
        let counted = |peer: &Value| -> u64 {
            let seeders = shown["deliveries"][0]["seeders"].as_array().unwrap();
            seeders.iter().find(|s| s["seeder"] == *peer).map_or(0, |s| s["chunks"].as_u64().unwrap())
        };
        let all = answer["sources"].as_array().unwrap().iter().all(|source| {
            crashed.iter().any(|peer| source["peer"] == peer.as_str())
                || counted(&source["peer"]) >= source["chunks"].as_u64().unwrap()
        });
        (all && shown["deliveries"][0]["completed"] == true).then_some(shown)
    });
    let state = shown["state"].as_str().unwrap();
    assert!(state == "settled" || state == "delivered", "{shown}");
    let deliveries = shown["deliveries"].as_array().unwrap();
    assert_eq!(deliveries.len(), 1, "{shown}");
    let delivery = &deliveries[0];
    assert_eq!((&delivery["completion"], &delivery["capped"]), (&json!(true), &json!(false)), "{delivery}");
    let sum = |field: &str| -> u64 {
        delivery["seeders"].as_array().unwrap().iter().map(|s| s[field].as_u64().unwrap()).sum()
    };
    // No chunk is paid twice: what is paid is at most the content, and all of it where everybody's receipts are in.
    let content = product["content_bytes"].as_u64().unwrap();
    assert!(sum("paid_bytes") <= content, "{delivery}");
    assert_eq!(delivery["whole"] == true, sum("paid_bytes") == content, "{delivery}");
    assert!(crashed.len() > 2 || sum("paid_bytes") >= answer["bytes"].as_u64().unwrap() / 3, "{delivery}");
    // The price is captured once, at both ends.
    assert_eq!(shown["release"]["captured"], true);
    let postings = shown["postings"].as_array().unwrap();
    let captures = postings.iter().filter(|p| p["key"].as_str().unwrap().starts_with("capture:"));
    assert_eq!(captures.count(), 1, "{shown}");
    network.assert_books();
    let order = shown["order"].as_str().unwrap();
    until("the merchant's own record", || {
        (network.of("merchant", args!["order", order]).ok()["stage"] == "done").then_some(())
    });
}

fn album(network: &Network) -> std::path::PathBuf {
    let album = network.path("album");
    fs::create_dir_all(&album).unwrap();
    fs::write(album.join("one"), bytes(1, SIZE / 2)).unwrap();
    fs::write(album.join("two"), bytes(2, SIZE / 2)).unwrap();
    album
}

/// One sale for each victim, in one network.
fn every_role(policy: &str) {
    let mut network = Network::start(2);
    let product = network.publish(&album(&network), &["--policy", policy]);
    for victims in [&["manager"] as &[&str], &["merchant"], &["seeder-1"], &["seeder-2", "seeder-1"], &["client"]] {
        let bought = network.buy(&product, &format!("client-of-{}", victims.join("-")));
        let fetch = under_way(&bought, &network);
        let answer = if victims == ["client"] {
            fetch.kill();
            let mut again = bought.fetching(&network.path("goods"));
            again.push("--progress".into());
            let answer = run(again).ok();
            assert!(answer["bytes"].as_u64() < product["content_bytes"].as_u64(), "what had come came again: {answer}");
            answer
        } else {
            for victim in victims {
                network.crash(victim);
            }
            fetch.finish().ok()
        };
        let crashed: Vec<String> = victims.iter().flat_map(|victim| network.seeders_in(victim)).collect();
        assert_whole(&network, &bought, &product, &answer, &crashed);
        fs::remove_dir_all(network.path("goods")).unwrap();
    }
}

#[test]
fn every_role_is_killed_once_with_the_key_at_release() {
    every_role("at-release");
}

#[test]
fn every_role_is_killed_once_with_the_key_on_completion() {
    every_role("on-completion");
}

#[test]
fn the_whole_network_is_killed_and_the_manager_is_away_at_the_end() {
    let mut network = Network::start(1);
    let product = network.publish(&album(&network), &[]);
    let bought = network.buy(&product, "client");
    let fetch = under_way(&bought, &network);
    // With the key in the ticket, a delivery needs nobody but a seeder: here even the origin is gone.
    network.daemons.remove("manager").unwrap().kill();
    network.daemons.remove("merchant").unwrap().kill();
    let answer = fetch.finish().ok();
    assert_eq!(answer["reported"], false, "{answer}");
    network.daemons.remove("seeder-1").unwrap().kill();
    // The receipt outlives all of them.
    for node in ["manager", "merchant", "seeder-1"] {
        network.run_role(node);
    }
    let crashed = network.seeders_in("manager");
    assert_whole(&network, &bought, &product, &answer, &crashed);
}
