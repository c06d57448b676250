//! What operators do when trust changes, with the commands that they type: keys, the root key, the audit log, takedowns.

use std::fs;
use std::path::Path;

use protocol::trust::{AuditHead, Heartbeat};
use protocol::{Digest, Keypair, NetworkId, Signed};
use serde_json::Value;

use super::support::{Network, args, bytes, program, run, run_plain, text, until};

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
    // And there it opens by a passphrase only.
    let sealed = away.join("root.sealed");
    let with = |words: &str, command: &[std::ffi::OsString]| {
        let done = program(command).env("WILLCALL_PASSPHRASE", words).output().unwrap();
        (done.status.success(), String::from_utf8(done.stderr).unwrap())
    };
    let seal = args!["manager", "keys", "seal", away.join("root.key"), "-o", &sealed];
    assert!(with("", &seal).1.contains("empty passphrase") && !sealed.exists());
    assert!(with("open sesame", &seal).0);
    assert!(with("open sesame", &seal).1.contains("exists already"));
    fs::remove_file(away.join("root.key")).unwrap();
    let sign = args!["manager", "keys", "sign", &request, "--root-key", &sealed, "-o", &signed];
    let (_, why) = with("open barley", &sign);
    assert!(why.contains("the passphrase does not open") && !signed.exists(), "{why}");
    assert!(with("open sesame", &sign).0);
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
    assert_eq!(changed.get("next_root"), Some(&Value::Null), "none was named: {changed}");
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
    // Whose word the heads are is known with the network alone.
    assert_eq!(report["heads"]["verified"], false);
    let plain = run_plain(args!["manager", "audit", "verify", &log, "--heads", &heads]).stdout;
    assert!(plain.contains("Who signed the heads was NOT verified"), "{plain}");
    let join = text(&network.of("manager", args!["join"]).ok(), "join");
    let with =
        |heads: &Path, join: &str| run(args!["manager", "audit", "verify", &log, "--heads", heads, "--network", join]);
    assert_eq!(with(&heads, &join).ok()["heads"]["verified"], true);
    let stranger = "12D3KooWGzh5WUrgSRD5MunuHBLpT9o1p7a7CBhUYPA1bVQ9zWFh";
    with(&heads, stranger).refused(&["the key set does not hold"]);
    let told = fs::read_to_string(&heads).unwrap();
    let line: Value = told
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .find(|line: &Value| line["heartbeat"].is_string())
        .unwrap();
    let other = network.path("other-heads");
    let edited = |from: &str, to: &str| {
        assert!(told.contains(from));
        fs::write(&other, told.replace(from, to)).unwrap();
        run(args!["manager", "audit", "verify", &log, "--heads", &other])
    };
    // What stands beside the signed word is nobody's word.
    let number = line["number"].as_u64().unwrap();
    let [is, less] = [number, number - 1].map(|number| format!("\"number\":{number},"));
    let refused = edited(&is, &less).refused(&["says number", "the manager signed says"]);
    assert!(!refused.contains("was changed"), "{refused}");
    let [is, other_digest] = [text(&line, "digest"), "0".repeat(64)].map(|digest| format!("\"digest\":\"{digest}\""));
    edited(&is, &other_digest).refused(&["says digest", "the manager signed says"]);
    let heartbeat = text(&line, "heartbeat");
    edited(&heartbeat, &heartbeat.replacen(&text(&line, "digest"), &"0".repeat(64), 1)).refused(&["does not hold"]);
    edited(&heartbeat, "").refused(&["cannot be read"]);
    // A log that was written anew from its first entry on: a chain, and another one than seeders were told.
    let exported = fs::read_to_string(&log).unwrap();
    let forged = network.path("forged-log");
    fs::write(&forged, rewritten(&exported)).unwrap();
    run(args!["manager", "audit", "verify", &forged]).ok();
    run(args!["manager", "audit", "verify", &forged, "--heads", &heads]).refused(&["the log was changed"]);
    // One that was cut at its end before the newest head.
    let cut_off: Vec<&str> = exported.lines().take(usize::try_from(number).unwrap() - 1).collect();
    fs::write(&forged, cut_off.join("\n")).unwrap();
    run(args!["manager", "audit", "verify", &forged, "--heads", &heads]).refused(&["its end was cut off", "--part"]);
    let part = run(args!["manager", "audit", "verify", &forged, "--heads", &heads, "--part"]).ok();
    assert_eq!((&part["heads"]["found"], &part["heads"]["outside"]), (&0.into(), &1.into()), "{part}");
    let cut = network.of("manager", args!["audit", "cut", &log]).ok();
    assert_eq!(cut["removed"].as_u64().unwrap() + 1, report["entries"].as_u64().unwrap());
    // The next export begins with the entry that stayed: the two files put together are the log.
    let (next, both) = (network.path("next-log"), network.path("both-logs"));
    network.of("manager", args!["audit", "export", "-o", &next]).ok();
    let verify = |log: &str, more: &[&str]| {
        fs::write(&both, log).unwrap();
        run([args!["manager", "audit", "verify", &both], more.iter().map(Into::into).collect()].concat())
    };
    let rest = fs::read_to_string(&next).unwrap();
    let alone = verify(&rest, &[]).ok();
    assert_eq!((&alone["first"], &alone["cut_by"].is_u64()), (&report["last"], &true), "{alone}");
    let whole = verify(&(exported.clone() + &rest), &["--heads", heads.to_str().unwrap()]).ok();
    let entries = |report: &Value| report["entries"].as_u64().unwrap();
    assert_eq!(entries(&whole) + 1, entries(&report) + entries(&alone), "{whole}");
    let changed = rest.replacen("\"detail\":\"", "\"detail\":\"x", 1);
    verify(&(exported.clone() + &changed), &[]).refused(&["breaks the chain", "its digest is not"]);
    // Without its first entries it is a part, and not taken for the whole.
    let part: String = exported.lines().skip(2).map(|line| format!("{line}\n")).collect();
    verify(&part, &[]).refused(&["begins with entry 3", "--part"]);
    assert_eq!(verify(&part, &["--part"]).ok()["first"], 3);

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

/// The log with a word changed in its first entry, and every digest made to fit.
fn rewritten(log: &str) -> String {
    let mut lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    lines[0]["detail"] = "something else".into();
    let mut previous = Digest::from_bytes([0; 32]);
    for line in &mut lines {
        let [number, at] = ["number", "at"].map(|name| line[name].as_u64().unwrap().to_le_bytes());
        let [what, subject, detail] = ["what", "subject", "detail"].map(|name| text(line, name));
        let parts =
            [&number, &at, previous.as_bytes().as_slice(), what.as_bytes(), subject.as_bytes(), detail.as_bytes()];
        line["previous"] = previous.to_string().into();
        previous = Digest::of("willcall 2026-11 audit entry", &parts);
        line["digest"] = previous.to_string().into();
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

#[test]
fn all_heads_of_years_are_written() {
    const HEADS: store::Table<(u64, u64), Signed<Heartbeat>> = store::Table::new("audit heads");
    const DAYS: u64 = 2_500;
    let mut network = Network::start(1);
    network.daemons.remove("seeder-1").unwrap().stop();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let db = store::Db::open(network.path("seeder-1/seeder.redb"), store::Options::new(2)).unwrap();
        let key = Keypair::from_seed(&[1; 32]);
        let head = move |day: u64| Heartbeat {
            network: NetworkId::from_bytes([2; 32]),
            at: day,
            epoch: 0,
            key_set_version: 1,
            key_set: Digest::from_bytes([3; 32]),
            restore: 0,
            audit: Some(AuditHead { number: day, digest: Digest::from_bytes([4; 32]) }),
        };
        let put = db
            .write(move |txn| (0..DAYS).try_for_each(|day| HEADS.put(txn, &(0, day), &Signed::sign(&head(day), &key))));
        put.await.unwrap();
    });
    network.run_role("seeder-1");
    let path = network.path("heads");
    let said = network.of("seeder-1", args!["heads", "-o", &path]).ok();
    let heads = said["heads"].as_u64().unwrap();
    assert!(heads >= DAYS, "{said}");
    let written: Vec<Value> =
        fs::read_to_string(&path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers: std::collections::BTreeSet<u64> = written.iter().filter_map(|line| line["number"].as_u64()).collect();
    assert_eq!((written.len() as u64, numbers.range(..DAYS).count() as u64), (heads + 1, DAYS), "and the key set");
    let shown = network.of_plain("seeder-1", args!["heads"]);
    assert!(shown.stdout.contains(&format!("the newest 1000 of {heads}; -o FILE writes all")), "{}", shown.stdout);
}
