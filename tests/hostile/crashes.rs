//! Power cuts: each role is killed in the middle of a delivery and started again. The client has to complete, nothing
//! that was paid for may be lost, and no chunk may be counted twice.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::support::{Bought, Job, Network, Settings, args, bytes, run, same, until};

/// Big enough to be under way for some seconds at [`RATE`].
const SIZE: usize = 5 << 20;
const RATE: &str = "1MB";

/// A fetch that has begun and has some seconds to go.
fn under_way(bought: &Bought, network: &Network) -> Job {
    let mut fetch = bought.fetching(&network.path("goods"));
    fetch.extend(args!["--limit", RATE, "--progress"]);
    let mut job = Job::start(fetch);
    job.says("\"percent\":20");
    job
}

/// All there is to hold after the delivery, whatever happened in between: the sale is settled, every chunk is paid, and
/// none twice.
#[track_caller]
fn assert_whole(network: &Network, bought: &Bought, product: &Value, answer: &Value) {
    same(&network.path("album"), &network.path("goods/album"));
    let shown = network.settled(&bought.transaction);
    let deliveries = shown["deliveries"].as_array().unwrap();
    assert_eq!(deliveries.len(), 1, "{shown}");
    let delivery = &deliveries[0];
    assert!(all_counted(&shown, answer), "{answer} {shown}");
    assert_eq!((&delivery["completion"], &delivery["capped"]), (&json!(true), &json!(false)), "{delivery}");
    let paid: u64 = lines(&shown).iter().map(|seeder| seeder["paid_bytes"].as_u64().unwrap()).sum();
    assert_eq!((&delivery["whole"], paid), (&json!(true), product["content_bytes"].as_u64().unwrap()), "{delivery}");
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

/// The seeders' lines of the delivery.
fn lines(shown: &Value) -> Vec<Value> {
    shown["deliveries"][0]["seeders"].as_array().cloned().unwrap_or_default()
}

/// Is every chunk counted that the client says to have from a seeder?
fn all_counted(shown: &Value, answer: &Value) -> bool {
    let lines = lines(shown);
    answer["sources"].as_array().unwrap().iter().all(|source| {
        let line = lines.iter().find(|line| line["seeder"] == source["peer"]);
        line.map_or(0, |line| line["chunks"].as_u64().unwrap()) >= source["chunks"].as_u64().unwrap()
    })
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
        assert_whole(&network, &bought, &product, &answer);
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
    // The origin was away when the client had its last word. Fetched again, nothing is downloaded, and it is told.
    let again = run(bought.fetching(&network.path("goods"))).ok();
    assert_eq!(again["already_here"], true, "{again}");
    assert_whole(&network, &bought, &product, &answer);
}

/// What the client noted of its acknowledgements, as it lies on the disk.
fn noted_acks(bought: &Bought) -> Vec<Vec<u8>> {
    let list = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten().collect::<Vec<_>>();
    let delivery = list(&bought.home.join("deliveries").join(&bought.transaction));
    let acks = delivery.iter().filter(|entry| entry.file_name().to_string_lossy().starts_with("acks-"));
    let entries = acks.flat_map(|acks| list(&acks.path()));
    let files = entries.filter(|entry| !entry.file_name().to_string_lossy().ends_with(".new"));
    // A file that is replaced meanwhile shows the next time.
    files.filter_map(|file| fs::read(file.path()).ok()).collect()
}

/// A client that is killed over and over, before it has noted what it stored, finds what it acknowledged on its disk, and
/// gets none of it from somebody else.
#[test]
fn a_client_that_is_killed_over_and_over_acknowledges_nothing_twice() {
    let network = Network::start(3);
    let film = network.path("film");
    fs::write(&film, bytes(4, 40 << 20)).unwrap();
    let product = network.publish(&film, &[]);
    let bought = network.buy(&product, "client");
    let out = network.path("goods");
    let mut kills = 0;
    loop {
        let mut fetch = bought.fetching(&out);
        fetch.extend(args!["--limit", "4MB"]);
        let mut job = Job::start(fetch);
        let mut before = noted_acks(&bought);
        for _ in 0..=kills % 3 {
            let acknowledged = || {
                let now = noted_acks(&bought);
                (now != before || job.is_over()).then_some(now)
            };
            before = until("an acknowledgement", acknowledged);
        }
        if job.is_over() {
            break;
        }
        job.kill();
        kills += 1;
    }
    assert!(kills >= 8, "killed only {kills} times");
    let (answer, arrived) = bought.fetch(&out);
    same(&film, &arrived);
    let shown = network.settled(&bought.transaction);
    assert_eq!(shown["generation"], 0, "the lease was made void: {shown}");
    let acknowledged: u64 = lines(&shown).iter().map(|seeder| seeder["chunks"].as_u64().unwrap()).sum();
    let chunks = product["content_bytes"].as_u64().unwrap().div_ceil(64 << 10);
    assert_eq!(answer["already_here"], true, "{answer}");
    // What two seeders send at once at the end is acknowledged to both.
    assert!((chunks..=chunks + chunks / 40).contains(&acknowledged), "{acknowledged} of {chunks}: {shown}");
}

/// Whoever loses a download half-way looks in the books like somebody who shares a key: more is acknowledged than the
/// lease allows. The money has its bound; the purchase stays the buyer's.
#[test]
fn a_buyer_who_loses_downloads_keeps_the_purchase() {
    // The delivery whose lease ends waits so long for receipts that are on their way.
    let settings = Settings { manager: &["sales-ms=100", "close-grace-ms=3000"], ..Settings::default() };
    let mut network = Network::start_set(4, 4, settings);
    // A few times nine tenths of it, mostly of others each time, are more than the content, a quarter and 16 MiB.
    let film = network.path("film");
    fs::write(&film, bytes(3, 48 << 20)).unwrap();
    let product = network.publish(&film, &[]);
    let bought = network.buy(&product, "client");
    let out = network.path("goods");
    // Which parts come from whom is not foreseen: what a seeder gave again counts once.
    let passed = || network.transaction(&bought.transaction)["generation"].as_u64() > Some(0);
    for _ in 0..12 {
        let mut fetch = bought.fetching(&out);
        fetch.extend(args!["--limit", "24MB", "--progress"]);
        let mut job = Job::start(fetch);
        // Where its delivery was revoked under way, a further one may bring the rest between two lines.
        job.says_one_of(&["\"percent\":9", "\"percent\":100"]);
        job.kill();
        fs::remove_dir_all(&out).unwrap();
        if passed() {
            break;
        }
    }
    let (_, arrived) = bought.fetch(&out);
    same(&film, &arrived);
    network.settled(&bought.transaction);
    let shown = until("the pay of the seeders", || {
        Some(network.transaction(&bought.transaction)).filter(|shown| shown["deliveries"][0]["cost"].is_u64())
    });
    assert!(shown["deliveries"][0]["cost"].as_u64() > Some(0), "{shown}");
    assert!(shown["generation"].as_u64() > Some(0), "the bound was never passed: {shown}");

    // The same where the manager was away when a download was complete, and learns of it after the next has begun.
    let bought = network.buy(&product, "another");
    let out = network.path("more");
    network.daemons.remove("manager").unwrap().kill();
    let answer = run(bought.fetching(&out)).ok();
    assert_eq!(answer["reported"], false, "{answer}");
    network.run_role("manager");
    for _ in 0..3 {
        fs::remove_dir_all(&out).unwrap();
        let (_, arrived) = bought.fetch(&out);
        same(&film, &arrived);
    }
    assert_eq!(network.settled(&bought.transaction)["state"], "settled");
    network.assert_books();
}
