//! What each party can prove, walked through from outside: every file that is made is carried to a machine that has
//! never seen the network and judged there with the root key alone; every byte that is changed is found and named.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use protocol::evidence::EvidencePack;
use serde_json::Value;

use super::support::{Bought, Finished, Network, args, bytes, run, run_plain, same, text, until};

/// An arbiter: a file and a root key in an empty folder.
struct Arbiter {
    root: String,
    folder: PathBuf,
}

impl Arbiter {
    fn new(network: &Network) -> Arbiter {
        let folder = network.path("arbiter");
        fs::create_dir_all(&folder).unwrap();
        Arbiter { root: text(&network.of("manager", args!["status"]).ok(), "root"), folder }
    }

    fn judge(&self, command: &str, bytes: &[u8]) -> Finished {
        let file = self.folder.join("file");
        fs::write(&file, bytes).unwrap();
        run(args![command, &file, "--network", &self.root])
    }

    /// Holds as it is; with a byte changed anywhere, it does not, and the section is named. Gives the report and the
    /// sections that were named.
    fn accept(&self, command: &str, path: &Path) -> (Value, BTreeSet<String>) {
        let whole = fs::read(path).unwrap();
        let report = self.judge(command, &whole).ok();
        assert_eq!(report["ok"], true, "{report}");
        let mut named = BTreeSet::new();
        // The first 16 bytes say what kind of file it is.
        for at in (16..whole.len()).step_by(whole.len().div_ceil(24)) {
            let mut changed = whole.clone();
            changed[at] ^= 0x10;
            let refused = self.judge(command, &changed).json();
            assert_eq!(refused["ok"], false, "byte {at} of {}: {refused}", whole.len());
            let message = text(&refused["error"], "message");
            assert!(message.contains("section "), "byte {at}: {message}");
            named.extend(
                message.split_once(" (").and_then(|(_, rest)| rest.split([',', ')']).next()).map(str::to_owned),
            );
        }
        let cut = self.judge(command, &whole[..whole.len() - 1]).json();
        assert!(text(&cut["error"], "message").contains("cut off"), "{cut}");
        // Somebody else's root key proves nothing of it.
        let stranger = "12D3KooWGzh5WUrgSRD5MunuHBLpT9o1p7a7CBhUYPA1bVQ9zWFh";
        let file = self.folder.join("file");
        fs::write(&file, &whole).unwrap();
        let foreign = run(args![command, &file, "--network", stranger]);
        assert!(!foreign.status.success(), "{}", foreign.stdout);
        (report, named)
    }
}

fn claims(report: &Value, claimant: &str) -> Vec<String> {
    let lines = report["lines"].as_array().unwrap().iter();
    lines.filter(|line| line["claimed_by"] == claimant).map(|line| text(line, "claim")).collect()
}

#[test]
fn what_was_delivered_is_proven_by_every_party_with_the_root_key_alone() {
    let network = Network::start(1);
    let arbiter = Arbiter::new(&network);
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(7, 150_000)).unwrap();
    let product = network.publish(&goods, &[]);

    // Before anything was fetched: the opposite is proven.
    let bought = network.buy(&product, "client");
    let id = &bought.transaction;
    let nothing = network.path("nothing.evidence");
    network.of("manager", args!["evidence", id, "-o", &nothing, "--non-delivery"]).ok();
    let (report, _) = arbiter.accept("verify-evidence", &nothing);
    let facts = &report["facts"];
    assert!(facts["nothing_acknowledged_by"].as_u64().is_some_and(|by| by > 0), "{facts}");
    assert_eq!((&facts["acknowledged_bytes"], &facts["completed_at"]), (&Value::Null, &Value::Null), "{facts}");

    // And the buyer, to whom nothing came, has evidence of the purchase.
    let early = network.path("early.evidence");
    run(args!["evidence", id, "-o", &early, "--home", &bought.home]).ok();
    let (report, _) = arbiter.accept("verify-evidence", &early);
    assert_eq!(report["facts"]["released"], true, "{report}");

    let (answer, arrived) = bought.fetch(&network.path("out"));
    same(&goods, &arrived);
    let settled = network.settled(id);
    let client = text(&run(args!["id", "--home", &bought.home]).ok(), "peer");
    // Now it would be a lie.
    network
        .of("manager", args!["evidence", id, "-o", network.path("lie"), "--non-delivery"])
        .refused(&["the first acknowledgement"]);

    // And there is no saying of a time before the sale, or after now.
    for (by, why) in [("5", "the sale was formed at"), ("99999999999999", "still to come")] {
        let asked = args!["evidence", id, "-o", network.path("lie"), "--non-delivery", "--by", by];
        network.of("manager", asked).refused(&[why]);
    }

    let order = text(&settled, "order");
    let [of_manager, of_merchant, of_client] =
        ["manager", "merchant", "client"].map(|by| network.path(&format!("{by}.evidence")));
    network.of("manager", args!["evidence", id, "-o", &of_manager]).ok();
    network.of("merchant", args!["evidence", &order, "-o", &of_merchant]).ok();
    run(args!["evidence", id, "-o", &of_client, "--home", &bought.home]).ok();
    for path in [&of_manager, &of_merchant, &of_client] {
        let (report, named) = arbiter.accept("verify-evidence", path);
        let facts = &report["facts"];
        assert_eq!(
            (&facts["transaction"], &facts["client"]),
            (&id.as_str().into(), &client.as_str().into()),
            "{facts}"
        );
        assert_eq!(facts["product"], product["product"], "{facts}");
        assert_eq!(facts["acknowledged_bytes"], product["content_bytes"], "{}: {facts}", path.display());
        assert!(facts["completed_at"].as_u64().is_some(), "{facts}");
        let of_seeders: u64 = facts["seeders"].as_array().unwrap().iter().map(|s| s["chunks"].as_u64().unwrap()).sum();
        assert!(of_seeders >= product["chunks"].as_u64().unwrap(), "{facts}");
        // Each says who claims what, and the merchant's word is nobody else's.
        for claimant in ["root_signed", "manager_signed", "merchant_signed", "client_signed"] {
            assert!(!claims(&report, claimant).is_empty(), "{}: nothing is {claimant}", path.display());
        }
        assert!(named.len() >= 3, "{named:?}");
    }
    let shop = arbiter.judge("verify-evidence", &fs::read(&of_merchant).unwrap()).ok();
    assert!(!claims(&shop, "merchant_asserts").is_empty(), "{shop}");
    let said = run_plain(args!["verify-evidence", &of_client, "--network", &arbiter.root]);
    assert!(said.stdout.contains("Every line holds.") && said.stdout.contains(&client), "{}", said.stdout);

    // Whoever leaves out what it signed proves nothing by that, and what the manager said of it stands.
    let mut cut = EvidencePack::from_bytes(&fs::read(&of_manager).unwrap()).unwrap();
    (cut.acks, cut.completions, cut.leases) = (Vec::new(), Vec::new(), Vec::new());
    let file = network.path("cut.evidence");
    fs::write(&file, cut.to_bytes()).unwrap();
    let said = run_plain(args!["verify-evidence", &file, "--network", &arbiter.root]).stdout;
    for wrong in ["never", "false", "0 of "] {
        assert!(!said.contains(wrong), "{wrong}: {said}");
    }
    let (_, proven) = said.split_once("Proven of").unwrap();
    assert_eq!(proven.matches("not in this file").count(), 4, "{said}");
    assert!(proven.contains("manager's record    as of ") && proven.contains("\n    completed "), "{said}");
    let facts = &arbiter.judge("verify-evidence", &cut.to_bytes()).ok()["facts"];
    assert!(facts["record"]["completed_at"].is_u64() && facts["completed_at"].is_null(), "{facts}");
    assert!(facts["released"].is_null() && facts["acknowledged_bytes"].is_null(), "{facts}");

    // What the seeder was paid for, and why: from its own list over the manager's word to the arbiter.
    let seeder = network.seeders_in("seeder-1").remove(0);
    let part = answer["sources"].as_array().unwrap().iter().find(|s| s["peer"] == seeder.as_str());
    let part = part.map_or(0, |part| part["chunks"].as_u64().unwrap());
    let receipts = until("the receipts' mark", || {
        let listed = network.of("seeder-1", args!["receipts"]).ok();
        let lines = listed["receipts"].as_array().unwrap().clone();
        (part == 0 || lines.iter().any(|line| line["state"] == "marked")).then_some(lines)
    });
    network.of("manager", args!["statements", "make"]).ok();
    for line in &receipts {
        let told = network.of("seeder-1", args!["receipts", "explain", text(line, "id")]).ok();
        assert_eq!((&told["fate"], &told["transaction"]), (&"accepted".into(), &id.as_str().into()), "{told}");
        assert!(text(&told, "summary").contains("in statement 1"), "{told}");
        let said = network.of_plain("seeder-1", args!["receipts", "explain", text(line, "id")]);
        assert!(said.stdout.starts_with("accepted: "), "{}", said.stdout);
    }
    if !receipts.is_empty() {
        let listed = network.of("seeder-1", args!["statements"]).ok();
        assert_eq!(listed["statements"][0]["accepted"].as_u64(), Some(receipts.len() as u64), "{listed}");
        let file = network.path("seeder.statements");
        network.of("seeder-1", args!["statements", "-o", &file]).ok();
        let (report, _) = arbiter.accept("verify-statement", &file);
        let statement = &report["statements"][0];
        assert_eq!(statement["seeder"], seeder.as_str(), "{statement}");
        let paid: u64 = statement["earnings"].as_array().unwrap().iter().map(|e| e["bytes"].as_u64().unwrap()).sum();
        let lines = settled["deliveries"][0]["seeders"].as_array().unwrap();
        let line = lines.iter().find(|line| line["seeder"] == seeder.as_str()).unwrap();
        assert_eq!(Some(paid), line["paid_bytes"].as_u64(), "{statement}");
        // The manager exports the same, and what is to be paid out agrees with it.
        let exported = network.path("manager.statements");
        network.of("manager", args!["statements", "export", &seeder, "-o", &exported]).ok();
        let (again, _) = arbiter.accept("verify-statement", &exported);
        assert_eq!(again["statements"], report["statements"]);
    }
    let payouts = network.of("manager", args!["payouts"]).ok();
    let csv = network.of_plain("manager", args!["payouts", "--csv"]).stdout;
    let mut rows = csv.lines();
    let columns: Vec<&str> = rows.next().unwrap().split(',').collect();
    for line in payouts["payouts"].as_array().unwrap() {
        let row: Vec<&str> = rows.next().unwrap().split(',').collect();
        assert_eq!(row.len(), columns.len());
        for (column, cell) in columns.iter().zip(row) {
            let value = &line[*column];
            let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            assert!(cell == shown || (value.is_null() && cell == "-"), "{column}: {cell} for {value}");
        }
    }
    assert_eq!(rows.next(), None);
    network.assert_books();
}

#[test]
fn a_revoked_ticket_key_leaves_evidence_of_what_other_keys_vouch_for() {
    let network = Network::start(1);
    let arbiter = Arbiter::new(&network);
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(7, 150_000)).unwrap();
    let product = network.publish(&goods, &[]);
    let bought = network.buy(&product, "client");
    bought.fetch(&network.path("out"));
    let id = &bought.transaction;
    let order = text(&network.settled(id), "order");

    for (number, purpose) in ["ticket", "settlement", "catalogue"].iter().enumerate() {
        network.of("manager", args!["keys", "rotate", purpose, "--stolen"]).ok();
        for (node, of) in [("manager", id), ("merchant", &order)] {
            let file = network.path(&format!("{node}-{number}.evidence"));
            network.of(node, args!["evidence", of, "-o", &file]).ok();
            let report = arbiter.judge("verify-evidence", &fs::read(&file).unwrap()).ok();
            let facts = &report["facts"];
            assert_eq!(facts["acknowledged_bytes"], product["content_bytes"], "{node} after {purpose}: {report}");
            assert!(facts["completed_at"].is_u64() && facts["released"] == true, "{node} after {purpose}: {report}");
            let vouched = report["lines"].as_array().unwrap().iter();
            let vouched: BTreeSet<&str> = vouched
                .filter(|line| line["vouched_by"].is_string())
                .map(|line| line["section"].as_str().unwrap())
                .collect();
            let expected = match *purpose {
                "catalogue" => BTreeSet::from(["transaction data", "lease 1", "manifest"]),
                _ => BTreeSet::from(["transaction data", "lease 1"]),
            };
            assert_eq!(vouched, expected, "{node} after {purpose}: {report}");
            let said = run_plain(args!["verify-evidence", &file, "--network", &arbiter.root]).stdout;
            assert!(said.contains("was revoked since; the delivery record vouches for it"), "{said}");
        }
    }
    network.assert_books();
}

#[test]
fn a_clients_own_evidence_is_proven_again_by_a_newer_lease_after_the_ticket_key_was_stolen() {
    let mut network = Network::start(1);
    let arbiter = Arbiter::new(&network);
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(7, 150_000)).unwrap();
    let product = network.publish(&goods, &[]);
    let buy = |network: &Network, out: &str| {
        let bought = network.buy(&product, "client");
        bought.fetch(&network.path(out));
        network.settled(&bought.transaction);
        fs::remove_file(&bought.ticket).unwrap();
        bought
    };
    let bought = [buy(&network, "one"), buy(&network, "two")];
    network.of("manager", args!["keys", "rotate", "ticket", "--stolen"]).ok();
    // By another purchase this client hears of the new keys; the old tickets stay as they are.
    let later = buy(&network, "later");

    let made = |of: &Bought, name: &str| {
        let file = network.path(name);
        let said = run(args!["evidence", &of.transaction, "-o", &file, "--home", &of.home]).ok();
        (said["not_renewed"].clone(), arbiter.judge("verify-evidence", &fs::read(&file).unwrap()))
    };
    for (of, name) in [(&later, "later.evidence"), (&bought[0], "one.evidence")] {
        let (not_renewed, report) = made(of, name);
        let report = report.ok();
        assert_eq!((not_renewed, &report["ok"]), (Value::Null, &Value::Bool(true)), "{name}: {report}");
        let facts = &report["facts"];
        assert_eq!(facts["acknowledged_bytes"], product["content_bytes"], "{name}: {report}");
        assert!(facts["completed_at"].is_u64() && facts["released"] == true, "{name}: {report}");
    }
    network.assert_books();

    // Without the manager there is none: the file is written, and says so.
    let order = text(&network.settled(&bought[1].transaction), "order");
    drop(network.daemons.remove("manager"));
    let file = network.path("two.evidence");
    let ask = args!["evidence", &bought[1].transaction, "-o", &file, "--home", &bought[1].home];
    let said = run_plain(ask);
    assert!(said.status.success() && said.stdout.contains("NOT RENEWED"), "{} {}", said.stdout, said.stderr);
    let judged = arbiter.judge("verify-evidence", &fs::read(&file).unwrap());
    assert!(!judged.status.success() && judged.json()["facts"]["released"].is_null(), "{}", judged.stdout);
    // Nor is there anything that vouches for the shop's.
    let file = network.path("shop.evidence");
    let said = network.of("merchant", args!["evidence", &order, "-o", &file]).ok();
    assert!(said["proves_nothing"] == true && said["manager_missing_because"].is_string(), "{said}");
    assert!(!arbiter.judge("verify-evidence", &fs::read(&file).unwrap()).status.success());
    let file = network.path("shop-again.evidence");
    let said = run_plain(args!["merchant", "evidence", &order, "-o", &file, "--dir", network.path("merchant")]);
    assert!(said.status.success() && said.stdout.contains("PROVES NOTHING"), "{} {}", said.stdout, said.stderr);
}
