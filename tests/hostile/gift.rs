//! A purchase for somebody else: buyer and client are different homes that never share a file; a purchase that is taken
//! back ends at the next chunk; one that moves to another device is fetched there and nowhere else.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::support::{Job, Network, args, bytes, run, run_plain, same, text, until};

#[test]
fn a_gift_is_found_fetched_verified_and_opens_nowhere_else() {
    let network = Network::start(2);
    let album = network.path("album");
    fs::create_dir_all(album.join("sub")).unwrap();
    fs::write(album.join("sub/song"), bytes(7, 300_000)).unwrap();
    fs::write(album.join("note"), b"for you").unwrap();
    let product = network.publish(&album, &[]);
    let join = text(&network.of("manager", args!["join"]).ok(), "join");
    let (buyer, friend, stranger) = (network.path("buyer"), network.path("friend"), network.path("stranger"));
    let peer = text(&run(args!["id", "--home", &friend]).ok(), "peer");

    let ticket = network.path("gift.ticket");
    let mut buy = network.buying(&product, "buyer");
    buy.extend(args!["--client", &peer, "-o", &ticket]);
    let bought = run(buy).ok();
    assert_eq!((&bought["client"], &bought["in_library"]), (&peer.clone().into(), &false.into()));
    let transaction = text(&bought, "transaction");

    // The recipient knows the network's line, and nothing of the ticket.
    let inbox = run(args!["inbox", "--join", &join, "--home", &friend]).ok();
    assert_eq!(inbox["items"][0]["transaction"], transaction.as_str(), "{inbox}");
    let nobody = run(args!["inbox", "--join", &join, "--home", &stranger]).ok();
    assert_eq!(nobody["items"].as_array().unwrap().len(), 0);

    // Whoever else holds the ticket, or knows the transaction, gets nothing.
    for home in [&buyer, &stranger] {
        run(args!["fetch", &ticket, "--home", home, "-o", network.path("x")]).refused(&["is for", &peer]);
    }
    let asked = args!["fetch", &transaction, "--join", &join, "--home", &stranger, "-o", network.path("x")];
    run(asked).refused(&[&transaction, "neither in the library nor in the mailbox"]);
    // A home that claims nothing but presents the ticket anyway is refused by the seeder itself.
    let seeder = &network.daemons["seeder-1"].ready;
    let address = format!("{}/p2p/{}", seeder["addresses"][0].as_str().unwrap(), text(seeder, "peer"));
    let shown = run(args!["testnet", "present", &ticket, "--to", address, "--home", &stranger]).ok();
    assert_eq!((&shown["code"], &shown["bytes"]), (&"wrong-client".into(), &0.into()), "{shown}");

    let out = network.path("out");
    let answer = run(args!["fetch", &transaction, "--home", &friend, "-o", &out]).ok();
    let goods = PathBuf::from(text(&answer, "path"));
    same(&album, &goods);
    assert_eq!(run(args!["verify", &goods, "--home", &friend]).ok()["ok"], true);
    network.settled(&transaction);

    // A changed byte, a missing file and one too many are told, and a fetch into the same place mends nothing silently.
    fs::write(goods.join("sub/song"), bytes(8, 300_000)).unwrap();
    fs::remove_file(goods.join("note")).unwrap();
    fs::write(goods.join("extra"), b"").unwrap();
    let verified = run(args!["verify", &goods, "--home", &friend]);
    assert_eq!(verified.status.code(), Some(1));
    let report = verified.json();
    assert_eq!(report["ok"], false);
    let state = |path: &str| {
        let files = report["files"].as_array().unwrap();
        files.iter().find(|f| f["path"] == path).unwrap()["state"].to_string()
    };
    assert!(state("sub/song").contains("damaged") && state("note").contains("missing"), "{report}");
    assert_eq!(report["extra"][0], "extra");
    network.assert_books();
}

#[test]
fn what_is_revoked_stops_at_the_next_chunk() {
    let network = Network::start(2);
    let file = network.path("film");
    fs::write(&file, bytes(9, 6 << 20)).unwrap();
    let product = network.publish(&file, &[]);
    let bought = network.buy(&product, "client");
    let mut fetch = bought.fetching(&network.path("out"));
    fetch.extend(args!["--limit", "512kB", "--progress"]);
    let mut fetch = Job::start(fetch);
    fetch.says("\"percent\":10");
    network.of("manager", args!["revoke", "transaction", &bought.transaction]).ok();
    let ended = fetch.finish();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    let said = ended.json();
    assert!(said["error"]["message"].as_str().unwrap().contains("revoked"), "{said}");
    assert!(!network.path("out/film").exists());
    let refused = |client: &str, cause: &str| {
        let shown = run(args!["status", "--home", network.path(client)]).ok()["deliveries"][0].clone();
        assert_eq!((&shown["state"], &shown["trouble"]["cause"]), (&"refused".into(), &cause.into()), "{shown}");
        assert_eq!(shown["have_bytes"], 0, "{shown}");
    };
    refused("client", "revoked");
    assert_eq!(fs::read_dir(network.path("out")).unwrap().count(), 0);
    // Once more, and by another way: the answer is the same, at once.
    run(bought.fetching(&network.path("out"))).refused(&["revoked"]);
    refused("client", "revoked");
    let acks = network.path("client/deliveries").join(&bought.transaction).join("acks-1");
    assert_ne!(fs::read_dir(acks).unwrap().count(), 0);
    let shown = network.transaction(&bought.transaction);
    assert_eq!(shown["state"], "revoked", "{shown}");
    assert_eq!(shown["deliveries"][0]["whole"], false, "{shown}");

    // What is taken down, the same.
    let (down, late) = (network.buy(&product, "other"), network.buy(&product, "late"));
    let mut fetch = down.fetching(&network.path("down"));
    fetch.extend(args!["--limit", "512kB", "--progress"]);
    let mut fetch = Job::start(fetch);
    fetch.says("\"percent\":10");
    network.of("manager", args!["takedown", text(&product, "product")]).ok();
    let said = fetch.finish().json();
    assert!(said["error"]["message"].as_str().unwrap().contains("taken down"), "{said}");
    refused("other", "revoked");
    assert_eq!(fs::read_dir(network.path("down")).unwrap().count(), 0);
    // Who begins when nobody holds it any more is told the same.
    for seeder in ["seeder-1", "seeder-2"] {
        let purged = || {
            let status = network.of(seeder, args!["status"]).ok();
            status["contents"].as_array().unwrap().is_empty().then_some(())
        };
        until("the content being removed", purged);
    }
    run(late.fetching(&network.path("late-out"))).refused(&["revoked", "taken down"]);
    refused("late", "revoked");
    network.assert_books();
}

#[test]
fn downloads_keep_to_the_limits_in_the_settings_until_a_command_changes_them() {
    let network = Network::start(1);
    let file = network.path("film");
    fs::write(&file, bytes(4, 6 << 20)).unwrap();
    let product = network.publish(&file, &[]);
    let bought = network.buy(&product, "client");
    let settings = "download-limit = 700000\ndownload-limit-per-transfer = 5000000\n";
    fs::write(network.path("client").join("config.toml"), settings).unwrap();
    let begun = Instant::now();
    let mut fetch = bought.fetching(&network.path("out"));
    fetch.push("--progress".into());
    let mut fetch = Job::start(fetch);
    fetch.says("\"percent\":30");
    // 2.7 s by the limit; a little of it may come at once.
    let slowly = begun.elapsed();
    assert!(slowly > Duration::from_millis(2000), "1.9 MB at 0.7 MB a second took {slowly:?}");
    let limit = |more: &[&str]| {
        let mut args = args!["limit", "--home", network.path("client")];
        args.extend(more.iter().map(OsString::from));
        run(args).ok()["fetches"][0].clone()
    };
    let shown = limit(&[]);
    assert_eq!((&shown["process"], &shown["transfer"]), (&700_000.into(), &5_000_000.into()), "{shown}");
    let shown = limit(&["--process", "0"]);
    assert_eq!(shown["process"], 0, "{shown}");
    let answer = fetch.finish().ok();
    same(&file, &PathBuf::from(text(&answer, "path")));
    // The rest went at the transfer's own limit: it would have taken six seconds at the other.
    let rest = begun.elapsed().saturating_sub(slowly);
    assert!(rest < Duration::from_secs(5), "{rest:?}");
}

#[test]
fn a_purchase_follows_its_owner_to_a_new_device() {
    let network = Network::start(1);
    let file = network.path("film");
    fs::write(&file, bytes(3, 300_000)).unwrap();
    let product = network.publish(&file, &[]);
    let join = text(&network.of("manager", args!["join"]).ok(), "join");
    let bought = network.buy(&product, "old");
    let other = network.buy(&product, "other");
    let (old, new) = (network.path("old"), network.path("new"));
    let peer = text(&run(args!["id", "--home", &new]).ok(), "peer");
    let unknown = args!["device", "move", &peer, "--transaction", &other.transaction, "--home", &old, "--join", &join];
    let ended = run(unknown);
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    assert!(text(&ended.json()["items"][0], "problem").contains("this client"), "{}", ended.json());

    let moved = run(args!["device", "move", &peer, "--all", "--home", &old, "--join", &join]).ok();
    assert_eq!((&moved["items"][0]["generation"], moved["items"].as_array().unwrap().len()), (&1.into(), 1), "{moved}");
    let inbox = run(args!["inbox", "--join", &join, "--home", &new]).ok();
    assert_eq!(inbox["items"][0]["transaction"], bought.transaction.as_str(), "{inbox}");
    let answer = run(args!["fetch", &bought.transaction, "--home", &new, "-o", network.path("out")]).ok();
    same(&file, &PathBuf::from(text(&answer, "path")));
    // Fetched in full again, which is a download of its own.
    run(args!["fetch", &bought.transaction, "--home", &new, "-o", network.path("second")]).ok();
    let stands = || run(args!["status", "--home", &old]).ok()["deliveries"][0].clone();
    assert_eq!((&stands()["state"], &stands()["trouble"]["cause"]), (&"refused".into(), &"moved".into()));
    run(bought.fetching(&network.path("x"))).refused(&["revoked", "another client"]);
    assert_eq!((&stands()["state"], &stands()["trouble"]["cause"]), (&"refused".into(), &"moved".into()));
    assert_eq!(fs::read_dir(network.path("x")).unwrap().count(), 0);

    // The key of the other purchase is lost: its shop helps.
    let orders = network.of("merchant", args!["orders"]).ok();
    let order = orders["orders"].as_array().unwrap().iter().find(|o| o["transaction"] == other.transaction.as_str());
    let order = text(order.unwrap(), "order");
    let recovered = network.of("merchant", args!["recover", &order, "--to", &peer]).ok();
    assert_eq!(text(&recovered, "client"), peer);
    run(args!["fetch", &other.transaction, "--join", &join, "--home", &new, "-o", network.path("again")]).ok();
    network.assert_books();

    // By whose word each of them moved is proven to somebody who trusts nobody but the root key.
    let merchant = text(&network.of("merchant", args!["status"]).ok(), "peer");
    let holder = text(&run(args!["id", "--home", &old]).ok(), "peer");
    for (id, by, said) in [(&bought.transaction, &holder, "its holder"), (&other.transaction, &merchant, "by recovery")]
    {
        let file = network.path(said);
        network.of("manager", args!["evidence", id, "-o", &file]).ok();
        let report = run(args!["verify-evidence", &file, "--network", &join]).ok();
        let moved = &report["facts"]["moved"][0];
        assert_eq!((text(moved, "by"), text(moved, "to"), &moved["generation"]), (by.clone(), peer.clone(), &1.into()));
        let shown = run_plain(args!["verify-evidence", &file, "--network", &join]).stdout;
        assert!(shown.contains(said) && shown.contains("Every line holds."), "{shown}");
    }
    // So is what the new device signed of each of its downloads, in everybody's file.
    let sold = orders["orders"].as_array().unwrap().iter().find(|o| o["transaction"] == bought.transaction.as_str());
    let files = ["manager", "merchant", "client"].map(|by| network.path(&format!("{by}.evidence")));
    let [of_manager, of_merchant, of_client] = &files;
    network.of("manager", args!["evidence", &bought.transaction, "-o", of_manager]).ok();
    network.of("merchant", args!["evidence", text(sold.unwrap(), "order"), "-o", of_merchant]).ok();
    run(args!["evidence", &bought.transaction, "-o", of_client, "--home", &new]).ok();
    for file in &files {
        let report = run(args!["verify-evidence", file, "--network", &join]).ok();
        let others = &report["facts"]["others"][&peer];
        assert!(others["completed_at"].is_u64(), "{}: {report}", file.display());
        assert_eq!(others["acknowledged_bytes"], product["content_bytes"], "{}: {report}", file.display());
    }
}

#[test]
fn when_everybody_is_gone_one_line_says_it_and_programs_get_the_whole_list() {
    let mut network = Network::start(4);
    let file = network.path("film");
    fs::write(&file, bytes(3, 300_000)).unwrap();
    let product = network.publish(&file, &[]);
    let join = text(&network.of("manager", args!["join"]).ok(), "join");
    let bought = network.buy(&product, "client");
    run(args!["inbox", "--home", network.path("client"), "--join", &join]).ok();
    for (_, daemon) in std::mem::take(&mut network.daemons) {
        daemon.kill();
    }
    let mut fetch = bought.fetching(&network.path("out"));
    fetch.extend(args!["--patience", "12s"]);
    let ended = run(fetch);
    let said = ended.refused(&["no seeder is left that would serve it", "; and 2 more", "it does not run there"]);
    assert!(said.len() < 300 && !said.contains("/ip4/") && !said.contains("12D3"), "{} bytes: {said}", said.len());
    let error = &ended.json()["error"];
    assert_eq!(error["cause"], "no-seeder-left", "{error}");
    let sources = error["sources"].as_array().unwrap();
    // Each with all that is known of it.
    let told = |source: &serde_json::Value| {
        let why = source["last_reason"].as_str().unwrap_or_default();
        why.contains(source["peer"].as_str().unwrap())
    };
    assert!(sources.len() == 5 && sources.iter().all(told), "{error}");
}
