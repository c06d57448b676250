//! Accounts as those see them who pay and are paid: what is owed is listed, statements go on after a stolen key, and files
//! that were written are neither cut short nor overwritten.

use std::fs;

use serde_json::Value;

use super::support::{Network, args, bytes, run, run_plain, text, until};

fn owed(network: &Network) -> Vec<(String, u64)> {
    let payouts = network.of("manager", args!["payouts"]).ok();
    let lines = payouts["payouts"].as_array().unwrap().iter();
    lines.map(|line| (text(line, "seeder"), line["owed_minor"].as_u64().unwrap())).collect()
}

/// Sells and delivers, until the seeder has earned more than before.
fn earn(network: &Network, product: &Value, seeder: &str, name: &str) {
    let now = |network: &Network| owed(network).iter().find(|(peer, _)| peer == seeder).map_or(0, |(_, minor)| *minor);
    let before = now(network);
    for round in 0..10 {
        let bought = network.buy(product, &format!("{name}-{round}"));
        bought.fetch(&network.path(&format!("{name}-{round}-goods")));
        network.settled(&bought.transaction);
        if now(network) > before {
            return;
        }
    }
    panic!("the seeder earned nothing by ten deliveries: {:?}", owed(network));
}

#[test]
fn statements_go_on_after_the_settlement_key_was_stolen_and_prove_themselves_again() {
    let mut network = Network::start(1);
    let file = network.path("film");
    fs::write(&file, bytes(3, 2_000_000)).unwrap();
    let product = network.publish(&file, &["--rate", "20000000"]);
    let seeder = network.seeders_in("seeder-1").remove(0);

    // Owed, and listed, before there is any statement.
    earn(&network, &product, &seeder, "first");
    let listed = network.of_plain("manager", args!["payouts", "--csv"]).stdout;
    assert!(listed.lines().any(|line| line.starts_with(&format!("{seeder},USD,0,"))), "{listed}");
    network.of("manager", args!["statements", "make"]).ok();
    assert_eq!(network.of("seeder-1", args!["statements"]).ok()["total"], 1);
    earn(&network, &product, &seeder, "second");

    // Statement 2 is made while the seeder is off, and its key is stolen before it comes back.
    drop(network.daemons.remove("seeder-1"));
    network.of("manager", args!["statements", "make"]).ok();
    network.of("manager", args!["keys", "rotate", "settlement", "--stolen"]).ok();
    network.run_role("seeder-1");
    let fetched = until("the statements under the new key", || {
        let answer = network.of("seeder-1", args!["statements"]).ok();
        (answer["total"] == 2 && answer["not_fetched_because"].is_null()).then_some(answer)
    });
    assert_eq!(fetched["superseded"].as_array().unwrap().len(), 0, "{fetched}");
    let join = text(&network.of("manager", args!["join"]).ok(), "join");
    let verified = |path: &std::path::Path, count: usize| {
        let report = run(args!["verify-statement", path, "--network", &join]).ok();
        assert_eq!(report["statements"].as_array().unwrap().len(), count, "{report}");
    };
    let (own, managers) = (network.path("own"), network.path("managers"));
    network.of("seeder-1", args!["statements", "-o", &own]).ok();
    network.of("manager", args!["statements", "export", &seeder, "-o", &managers]).ok();
    verified(&own, 2);
    verified(&managers, 2);
    // And the chain goes on.
    earn(&network, &product, &seeder, "third");
    network.of("manager", args!["statements", "make", "--seeder", &seeder]).ok();
    let answer = network.of("seeder-1", args!["statements"]).ok();
    assert_eq!((&answer["total"], &answer["not_fetched_because"]), (&Value::from(3), &Value::Null), "{answer}");

    // A file that is there is refused by name; from one number on is another file.
    network.of("seeder-1", args!["statements", "-o", &own]).refused(&["cannot write", "own", "exists"]);
    network.of("manager", args!["statements", "export", &seeder, "-o", &managers]).refused(&["cannot write", "exists"]);
    let later = network.path("later");
    let written = network.of("seeder-1", args!["statements", "-o", &later, "--first", "2"]).ok();
    assert_eq!((&written["first"], &written["last"], &written["next"]), (&2.into(), &3.into(), &Value::Null));
    verified(&later, 2);
    // A chain that takes several files: that one goes on where the other ends is checked where both are given.
    let third = network.path("third");
    network.of("seeder-1", args!["statements", "-o", &third, "--first", "3"]).ok();
    let said = run(args!["verify-statement", &own, &third, "--network", &join]).ok();
    assert_eq!((&said["ok"], said["statements"].as_array().unwrap().len()), (&Value::Bool(true), 3), "{said}");
    let said = run_plain(args!["verify-statement", &third, "--network", &join]);
    assert!(said.status.success() && said.stdout.contains("before number 3 are not in it"), "{}", said.stdout);
    for wrong in [args!["verify-statement", &third, &own], args!["verify-statement", &own, &later]] {
        let said = run_plain([wrong, args!["--network", &join]].concat());
        assert!(!said.status.success() && said.stdout.contains("the numbers have a gap"), "{}", said.stdout);
        assert!(said.stdout.contains("NOT every line holds"), "{}", said.stdout);
    }
    network
        .of("seeder-1", args!["statements", "-o", network.path("none"), "--superseded", "7"])
        .refused(&["put aside"]);
    network.assert_books();
}

#[test]
fn money_keys_and_backups_are_refused_where_they_are_not_what_was_meant() {
    let network = Network::start(1);
    // A payment of a merchant that is none.
    let seeder = until("the seeder's enrolment", || network.seeders_in("seeder-1").pop());
    let merchant = until("the merchant's enrolment", || {
        let merchants = network.of("manager", args!["merchants"]).ok();
        merchants["merchants"].as_array().unwrap().first().map(|line| text(line, "peer"))
    });
    let pay = |party: &str, peer: &str, reference: &str| {
        let pay = args!["payment", party, peer, "5.00", "--currency", "USD", "--reference", reference];
        network.of("manager", pay)
    };
    pay("merchant-due", &seeder, "r1").refused(&[&seeder, "no merchant"]);
    pay("merchant-due", &merchant, "r1").ok();
    network.assert_books();
    // Lists that are longer than an answer are whole, and where one is not, it says so.
    for count in ["1000", "7"] {
        network.of("merchant", args!["vouchers", "issue", "1.00", "--currency", "USD", "--count", count]).ok();
    }
    let listed = network.of("merchant", args!["vouchers", "list"]).ok();
    let mut ids: Vec<String> = listed["vouchers"].as_array().unwrap().iter().map(|line| text(line, "id")).collect();
    ids.dedup();
    assert_eq!(ids.len(), 1008, "with the one that the shop had");
    pay("merchant-due", &merchant, "r2").ok();
    let books = network.of("manager", args!["ledger", "--limit", "1"]).ok();
    assert_eq!((books["postings"].as_array().unwrap().len(), &books["posting_count"]), (1, &2.into()));
    let told = network.of_plain("manager", args!["ledger", "--limit", "1"]).stdout;
    assert!(told.contains("1 of 2 postings; older ones: --before 2"), "{told}");
    let oldest = network.of("manager", args!["ledger", "--before", books["next"].to_string()]).ok();
    assert_eq!((&oldest["postings"][0]["number"], &oldest["next"]), (&1.into(), &Value::Null));

    // Whoever has the root key sees what is signed, and files that are mixed up are named.
    let (request, signed) = (network.path("request"), network.path("signed"));
    let asked = network.of("manager", args!["keys", "rotate", "ticket", "--request", &request]).ok();
    network.of("manager", args!["keys", "install", &request]).refused(&["nobody signed yet"]);
    let root = network.path("manager").join("root.key");
    let sign = |file: &std::path::Path| args!["manager", "keys", "sign", file, "--root-key", &root, "-o", &signed];
    run(sign(&network.path("manager").join("config.toml"))).refused(&["config.toml", "not a request"]);
    let said = run_plain(sign(&request));
    assert!(said.status.success(), "{}", said.stderr);
    let (key, replaced) = (text(&asked, "key"), text(&asked, "replaced"));
    let network_id = text(&network.of("manager", args!["status"]).ok(), "network");
    for part in [
        &format!("network {network_id}"),
        "key set 2 follows 1",
        &format!("new ticket key {key}"),
        &format!("ticket key {replaced} is replaced: it signs nothing after 20"),
        &format!("willcall manager keys install {} --dir", signed.display()),
    ] {
        assert!(said.stdout.contains(part), "'{part}' is missing in: {}", said.stdout);
    }
    run(sign(&signed)).refused(&["signed already"]);
    network
        .of("manager", args!["keys", "install", network.path("manager").join("config.toml")])
        .refused(&["config.toml", "not what"]);
    network.of("manager", args!["keys", "install", &signed]).ok();

    // An earlier backup is not written over, unless that is what is asked for.
    for role in ["manager", "merchant"] {
        let backup = network.path(&format!("{role}-backup"));
        network.of(role, args!["backup", "-o", &backup]).ok();
        let before = fs::read(&backup).unwrap();
        network.of(role, args!["backup", "-o", &backup]).refused(&["-backup", "there already", "--replace"]);
        assert!(fs::read(&backup).unwrap() == before);
        network.of(role, args!["backup", "-o", &backup, "--replace"]).ok();
    }
    // Where nothing can be written, the same line from every command: what, where, and what to do.
    let (no_folder, taken) = (network.path("none").join("file"), network.path("request"));
    let transaction = "01890a5d-ac96-774b-bcce-b302099a8057";
    let written: [(&str, &[&str]); 8] = [
        ("manager", &["backup"]),
        ("merchant", &["backup"]),
        ("manager", &["evidence", transaction]),
        ("manager", &["audit", "export"]),
        ("manager", &["statements", "export", &seeder]),
        ("seeder-1", &["statements"]),
        ("seeder-1", &["heads"]),
        ("merchant", &["evidence", "order"]),
    ];
    for (role, command) in written {
        let to = |place: &std::path::Path| {
            let command = command.iter().map(std::ffi::OsString::from).collect::<Vec<_>>();
            network.of(role, [command, args!["-o", place]].concat())
        };
        let said = to(&no_folder).refused(&["cannot write", "none/file", "there is no folder", "make it"]);
        assert!(!said.contains("internal") && !said.contains("os error") && !said.contains(".partial"), "{said}");
        to(&network.path("manager")).refused(&["cannot write", "manager", "it is a folder", "name a file in it"]);
        to(&taken.join("x")).refused(&["cannot write", "request/x", "is not a folder"]);
        if command != ["backup"] {
            to(&taken).refused(&["cannot write", "request", "it exists already", "name another file"]);
        }
    }
    // The network's id is no key.
    for command in ["verify-evidence", "verify-statement"] {
        let said =
            run(args![command, &taken, "--network", &network_id]).refused(&["--network", "willcall manager join"]);
        assert!(said.contains("root") && said.contains("network's id"), "{said}");
    }
    run(args!["verify-evidence", &taken, "--network", "soon"]).refused(&[
        "--network",
        "must begin with 'willcall-join:'",
        "willcall manager join",
    ]);
}
