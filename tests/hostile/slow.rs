//! A buyer with a slow line: several seeders do not bring more than one over it, and each of them would have to wait for the
//! client longer than a seeder does.

use std::fs;

use super::support::{Network, Settings, args, bytes, run, same};

#[test]
fn a_slow_line_is_not_shared_out_until_nothing_comes() {
    // With all seven at once a chunk would take 24 seconds at each.
    let seeder = ["write-ms=5000"];
    let network = Network::start_set(6, 6, Settings { seeder: &seeder, ..Settings::default() });
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(1, 3_000_000)).unwrap();
    let product = network.publish(&goods, &["--chunk-size", "1MiB"]);
    let bought = network.buy(&product, "client");
    let mut fetching = bought.fetching(&network.path("out"));
    fetching.extend(args!["--limit", "300kB"]);
    let answer = run(fetching).ok();
    same(&goods, &network.path("out/goods.bin"));
    assert_eq!((&answer["bytes"], &answer["duplicate_bytes"]), (&product["content_bytes"], &0.into()), "{answer}");
    // Nobody took this client for one that does not read.
    for source in answer["sources"].as_array().unwrap() {
        assert!(source["last_reason"].is_null(), "{answer}");
    }
}
