//! What operators do when trust changes, with the commands that they type: keys, the root key, the audit log, takedowns.

use std::fs;

use super::support::{Network, args, bytes, run, text, until};

#[test]
fn operators_change_keys_check_the_log_and_take_content_down() {
    let network = Network::start(1);
    let file = network.path("film");
    fs::write(&file, bytes(3, 200_000)).unwrap();
    let product = network.publish(&file, &[]);
    let bought = network.buy(&product, "client");

    // The root key is on another machine: a request and its answer are carried there and back.
    let (request, signed, away) = (network.path("request"), network.path("signed"), network.path("away"));
    fs::create_dir(&away).unwrap();
    for name in ["root.key", "next-root.key", "next-root.handover"] {
        fs::rename(network.path("manager").join(name), away.join(name)).unwrap();
    }
    network.of("manager", args!["keys", "rotate", "ticket"]).refused(&["there is no root key"]);
    let rotated = network.of("manager", args!["keys", "rotate", "ticket", "--request", &request]).ok();
    run(args!["manager", "keys", "sign", &request, "--root-key", away.join("root.key"), "-o", &signed]).ok();
    network.of("manager", args!["keys", "install", &signed]).ok();
    let listed = network.of("manager", args!["keys", "list"]).ok();
    let state = |key: &str| {
        let keys = listed["keys"].as_array().unwrap();
        keys.iter().find(|entry| entry["key"] == key).unwrap()["state"].as_str().unwrap().to_owned()
    };
    assert_eq!(
        (state(&text(&rotated, "key")), state(&text(&rotated, "replaced"))),
        ("active".into(), "retiring".into())
    );
    // The root key is lost: the next one takes its place, by the word that it signed at the start.
    let change =
        args!["keys", "change-root", away.join("next-root.handover"), "--root-key", away.join("next-root.key")];
    let changed = network.of("manager", change).ok();
    assert_eq!(changed["replaced"], listed["root"]);
    let (_, goods) = bought.fetch(&network.path("out"));
    assert!(goods.exists());
    network.settled(&bought.transaction);

    // The log is the one that the seeder was told of, and can be cut off once it is exported.
    let (log, heads) = (network.path("log"), network.path("heads"));
    until("a head at the seeder", || {
        let heads = network.of("seeder-1", args!["heads"]).ok();
        (!heads["heads"].as_array().unwrap().is_empty()).then_some(())
    });
    network.of("seeder-1", args!["heads", "-o", &heads]).ok();
    network.of("manager", args!["audit", "export", "-o", &log]).ok();
    let report = run(args!["manager", "audit", "verify", &log, "--heads", &heads]).ok();
    assert_eq!((&report["heads"]["found"], &report["heads"]["outside"]), (&1.into(), &0.into()), "{report}");
    let told = fs::read_to_string(&heads).unwrap();
    let digest = text(&serde_json::from_str(told.lines().next().unwrap()).unwrap(), "digest");
    let other = network.path("other-heads");
    fs::write(&other, told.replace(&digest, &"0".repeat(64))).unwrap();
    run(args!["manager", "audit", "verify", &log, "--heads", &other]).refused(&["the log was changed"]);
    let cut = network.of("manager", args!["audit", "cut", &log]).ok();
    assert_eq!(cut["removed"].as_u64().unwrap() + 1, report["entries"].as_u64().unwrap());

    // What its operator denies leaves one seeder; what is taken down leaves all.
    let contents = |node: &str| network.of(node, args!["status"]).ok()["contents"].as_array().unwrap().clone();
    let content = text(&contents("seeder-1")[0], "content");
    network.of("seeder-1", args!["deny", "--add", &content]).ok();
    until("the denied content going", || contents("seeder-1").is_empty().then_some(()));
    assert_eq!(network.of("seeder-1", args!["deny"]).ok()["added"][0], content.as_str());
    network.of("manager", args!["takedown", text(&product, "product")]).ok();
    let refused = network.buying(&product, "late");
    assert_eq!(run(refused).status.code(), Some(1));
    network.assert_books();
}
