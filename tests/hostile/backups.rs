//! Backups that are taken while everything runs, and the day on which they are needed: the folder is gone, and what was
//! sold before the backup has to end as if nothing had happened.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::support::{Bought, Finished, Network, Settings, args, bytes, run, same, text, until};

fn network() -> Network {
    let settings = Settings {
        // What the origin had sent died with its outbox; it is waited for no longer than this.
        manager: &["sales-ms=100", "heartbeat-ms=1000", "close-grace-ms=4000"],
        merchant: &["orders-ms=100", "status-ms=200", "retry-min-ms=50", "retry-max-ms=500"],
        // A manager that comes back may be out of the mesh for a while: asked soon, not after six minutes.
        seeder: &["retry-ms=100", "receipt-batch-ms=50", "receipt-direct-ms=200", "heartbeat-silence-ms=3000"],
    };
    Network::start_set(1, 1, settings)
}

/// Chunks that the manager counted for a seeder in the first delivery of a transaction.
fn counted(shown: &Value, seeder: &str) -> u64 {
    let seeders = shown["deliveries"][0]["seeders"].as_array().unwrap();
    seeders.iter().find(|s| s["seeder"] == seeder).map_or(0, |s| s["chunks"].as_u64().unwrap())
}

/// What the manager signs of a purchase.
fn evidence(network: &Network, of: &Bought, to: &str, more: &[&str]) -> Finished {
    let mut asked = args!["evidence", &of.transaction, "-o", network.path(to)];
    asked.extend(more.iter().map(Into::into));
    network.of("manager", asked)
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(since.as_millis()).unwrap()
}

#[test]
fn a_manager_restored_from_yesterdays_backup_gets_every_receipt_again_and_counts_it_once() {
    let mut network = network();
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(7, 150_000)).unwrap();
    let product = network.publish(&goods, &[]);
    let seeder = network.seeders_in("seeder-1").remove(0);

    // Settled before the backup; sold before it and delivered after it; delivered only after the restore.
    let [before, between, after, returned] =
        ["before", "between", "after", "returned"].map(|client| network.buy(&product, client));
    before.fetch(&network.path("out-before"));
    let settled = network.settled(&before.transaction);
    let file = network.path("yesterday");
    let backup = network.of("manager", args!["backup", "-o", &file]).ok();
    assert!(backup["records"].as_u64().unwrap() > 10, "{backup}");
    // Given back since: the shop knows it, and the backup does not.
    let orders = network.of("merchant", args!["orders"]).ok();
    let mut orders = orders["orders"].as_array().unwrap().iter();
    let order = text(orders.find(|order| order["transaction"] == returned.transaction.as_str()).unwrap(), "order");
    network.of("merchant", args!["refund", &order]).ok();
    assert_eq!(network.transaction(&returned.transaction)["state"], "refunded");
    between.fetch(&network.path("out-between"));
    let counted_once = network.settled(&between.transaction);
    evidence(&network, &between, "true.evidence", &[]).ok();
    // And a sale of which the backup knows nothing.
    let lost = network.buy(&product, "lost");
    lost.fetch(&network.path("out-lost"));
    network.settled(&lost.transaction);
    let delivered = now_ms();

    // The disk dies.
    network.daemons.remove("manager").unwrap().kill();
    network.of("manager", args!["restore", &file]).refused(&["manager.redb is there already", "move it away"]);
    fs::remove_dir_all(network.path("manager")).unwrap();
    let restored = network.of("manager", args!["restore", &file]).ok();
    assert!(restored["restore"].as_u64().unwrap() > 1_700_000_000, "{restored}");
    network.run_role("manager");

    let again = network.settled(&between.transaction);
    // The origin's outbox died with the disk; everybody else's receipts are there again, and once.
    assert_eq!(counted(&again, &seeder), counted(&counted_once, &seeder), "{again}");
    let closings = again["postings"].as_array().unwrap().iter();
    let closings = closings.filter(|p| p["key"].as_str().unwrap().starts_with("close:")).count();
    assert_eq!(closings, 1, "{again}");
    assert_eq!(network.transaction(&before.transaction)["postings"], settled["postings"], "once is enough");
    // Nobody pays for it again.
    until("the refund that was forgotten", || {
        (network.transaction(&returned.transaction)["state"] == "refunded").then_some(())
    });

    // It may have forgotten what came in, and signs nothing else.
    let nothing = |of, to: &str, by: u64| evidence(&network, of, to, &["--non-delivery", "--by", &by.to_string()]);
    for of in [&between, &after] {
        nothing(of, "lie", delivered).refused(&["came back from a backup at", "it can speak of times from"]);
    }
    let root = text(&network.of("manager", args!["status"]).ok(), "root");
    let judge = |file: &str| run(args!["verify-evidence", network.path(file), "--network", &root]).ok();
    let told = |file: &str| judge(file)["facts"].clone();
    nothing(&after, "nothing.evidence", now_ms()).ok();
    let facts = told("nothing.evidence");
    assert!(facts["nothing_acknowledged_since"].as_u64().is_some_and(|since| since > delivered), "{facts}");
    assert!(judge("nothing.evidence").to_string().contains("of what came in before that nothing is said"));
    // Its record says the same of what came in again.
    assert_eq!(told("true.evidence")["manager_restored_at"], Value::Null);
    evidence(&network, &between, "again.evidence", &[]).ok();
    assert_eq!(told("again.evidence")["manager_restored_at"], facts["nothing_acknowledged_since"]);
    // A receipt of the sale that it forgot.
    let explained = until("what became of the receipts of a forgotten sale", || {
        let listed = network.of("seeder-1", args!["receipts"]).ok();
        let ids = listed["receipts"].as_array().unwrap().iter().map(|line| text(line, "id")).collect::<Vec<_>>();
        let told = ids.iter().map(|id| network.of("seeder-1", args!["receipts", "explain", id]));
        let told: Vec<Value> = told.filter(|told| told.status.success()).map(Finished::ok).collect();
        told.into_iter().find(|told| told["fate"] == "unknown" && told["transaction"] == lost.transaction.as_str())
    });
    assert!(text(&explained, "summary").contains("came back from a backup"), "{explained}");

    // Its log is the one that the seeder was told of, but for what came after the backup.
    let (log, heads) = (network.path("log"), network.path("heads"));
    until("heads from before and after", || {
        let told = network.of("seeder-1", args!["heads"]).ok()["heads"].as_array().unwrap().clone();
        let restores: BTreeSet<u64> = told.iter().map(|head| head["restore"].as_u64().unwrap()).collect();
        (restores.len() == 2).then_some(())
    });
    network.of("seeder-1", args!["heads", "-o", &heads]).ok();
    network.of("manager", args!["audit", "export", "-o", &log]).ok();
    let report = run(args!["manager", "audit", "verify", &log, "--heads", &heads, "--network", &root]).ok();
    let seen = &report["heads"];
    assert_eq!((&seen["lost"], &seen["outside"], &seen["verified"]), (&1.into(), &0.into(), &true.into()), "{report}");
    assert!(seen["found"].as_u64().is_some_and(|found| found > 0), "{report}");
    assert_eq!(report["restores"].as_array().unwrap().len(), 1, "{report}");

    let (_, arrived) = after.fetch(&network.path("out-after"));
    same(&goods, &arrived);
    network.settled(&after.transaction);
    // And it goes on selling.
    let later = network.buy(&product, "later");
    let (_, arrived) = later.fetch(&network.path("out-later"));
    same(&goods, &arrived);
    network.settled(&later.transaction);
    network.assert_books();
}

#[test]
fn a_shop_restored_from_a_backup_goes_on_with_its_orders() {
    let mut network = network();
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(7, 150_000)).unwrap();
    let product = network.publish(&goods, &["--policy", "on-completion"]);
    let bought = network.buy(&product, "client");
    let order = text(&network.transaction(&bought.transaction), "order");
    let file = network.path("shop-backup");
    network.of("merchant", args!["backup", "-o", &file]).ok();

    // The delivery completes while the shop is gone for good.
    network.daemons.remove("merchant").unwrap().kill();
    fs::remove_dir_all(network.path("merchant")).unwrap();
    let (_, arrived) = bought.fetch(&network.path("out"));
    same(&goods, &arrived);
    let wrong = args!["manager", "restore", &file, "--dir", network.path("wrong"), "--json"];
    super::support::Job::start_plain(wrong).finish().refused(&["no backup of a manager.redb", "merchant.redb"]);
    network.of("merchant", args!["restore", &file]).ok();
    network.run_role("merchant");
    until("the payment", || (network.of("merchant", args!["order", &order]).ok()["stage"] == "done").then_some(()));
    let vouchers = network.of("merchant", args!["vouchers", "list"]).ok();
    assert_eq!((&vouchers["vouchers"][0]["spent"], &vouchers["vouchers"][0]["held"]), (&999.into(), &0.into()));
    // The address is the same, so buyers find it.
    let listed = run(args!["products", "--merchant", network.shop()]).ok();
    assert_eq!(listed["products"].as_array().unwrap().len(), 1);
    network.settled(&bought.transaction);
    network.assert_books();
}

#[test]
fn orders_that_a_restored_manager_forgot_get_their_money_back_at_the_shop() {
    let mut network = network();
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(7, 150_000)).unwrap();
    let at_release = network.publish(&goods, &[]);
    let on_completion = network.publish(&goods, &["--policy", "on-completion"]);
    let file = network.path("yesterday");
    network.of("manager", args!["backup", "-o", &file]).ok();
    let fetched = network.buy(&at_release, "fetched");
    fetched.fetch(&network.path("out"));
    let held = network.buy(&on_completion, "held");
    let orders = network.of("merchant", args!["orders"]).ok();
    let order_of = |bought: &Bought| {
        let mut orders = orders["orders"].as_array().unwrap().iter();
        text(orders.find(|order| order["transaction"] == bought.transaction.as_str()).unwrap(), "order")
    };
    let (fetched_order, held_order) = (order_of(&fetched), order_of(&held));
    let order = |network: &Network, id: &str| network.of("merchant", args!["order", id]).ok();
    until("the capture", || (order(&network, &fetched_order)["stage"] == "done").then_some(()));

    network.daemons.remove("manager").unwrap().kill();
    fs::remove_dir_all(network.path("manager")).unwrap();
    network.of("manager", args!["restore", &file]).ok();
    network.run_role("manager");

    // What was only held goes back by itself; what was taken, when the merchant says so.
    until("the payment that was held", || (order(&network, &held_order)["stage"] == "refunded").then_some(()));
    for _ in 0..2 {
        let refunded = network.of("merchant", args!["refund", &fetched_order]).ok();
        assert_eq!(refunded["stage"], "refunded", "{refunded}");
    }
    for id in [&fetched_order, &held_order] {
        let shown = order(&network, id);
        assert_eq!(shown["error"]["code"], "forgotten", "{shown}");
        assert!(text(&shown["error"], "message").contains("restored from a backup"), "{shown}");
    }
    let vouchers = network.of("merchant", args!["vouchers", "list"]).ok();
    let voucher = &vouchers["vouchers"][0];
    assert_eq!((&voucher["spent"], &voucher["held"]), (&0.into(), &0.into()), "{voucher}");
    // Of the time before the backup the books have copies at most, whose receipts come again.
    let books = || network.of("manager", args!["ledger"]).ok()["trial_balance"].as_array().map(Vec::len);
    until("something in the books", || books().filter(|lines| *lines > 0));
    network.assert_books();
}

#[test]
fn a_restore_that_is_refused_writes_nothing_and_one_that_is_made_prints_the_number_in_force() {
    let mut network = Network::start(1);
    let (manager, shop) = (network.path("manager-backup"), network.path("shop-backup"));
    network.of("manager", args!["backup", "-o", &manager]).ok();
    network.of("merchant", args!["backup", "-o", &shop]).ok();
    let into = |role: &str, file: &Path, node: &str| {
        let dir = network.path(node);
        let before = names(&dir);
        let refused = run(args![role, "restore", file, "--dir", &dir]);
        assert_eq!(names(&dir), before, "`{role} restore` left something in the folder of {node}");
        refused
    };
    // Other nodes' folders.
    for (role, file) in [("manager", &manager), ("merchant", &shop)] {
        into(role, file, "seeder-1").refused(&["seeder-1", "another node", "seeder.redb", "a folder of its own"]);
    }
    into("manager", &manager, "merchant").refused(&["merchant", "another node", "merchant.redb"]);
    into("merchant", &shop, "manager").refused(&["manager", "another node", "manager.redb"]);
    // One that was set up and never ran.
    network
        .of("seeder-new", args!["init", "--name", "x", "--capacity", "1GB", "--join", network.invite("seeder")])
        .ok();
    for (role, file) in [("manager", &manager), ("merchant", &shop)] {
        let said = into(role, file, "seeder-new").refused(&["seeder-new/config.toml", "nothing was written"]);
        assert!(said.contains(&format!("no configuration of a {role}")), "{said}");
        assert!(!network.path("seeder-new").join("lock").exists());
    }
    // Its own, where it runs and its database was moved away from under it.
    for (role, file) in [("manager", &manager), ("merchant", &shop)] {
        let database = network.path(role).join(format!("{role}.redb"));
        let away = network.path(&format!("{role}-away"));
        fs::rename(&database, &away).unwrap();
        into(role, file, role).refused(&["in use by process", role]);
        fs::rename(&away, &database).unwrap();
    }
    let number = || network.of("manager", args!["status"]).ok()["restore"].as_u64().unwrap();
    network.of("manager", args!["restored"]).refused(&["in use by process", "manager"]);
    run(args!["manager", "restored", "--dir", network.path("seeder-1")]).refused(&["seeder-1", "holds no manager"]);
    assert_eq!(number(), 0);

    // The manager ran again since the backup, and keeps its folder.
    network.crash("manager");
    network.daemons.remove("manager").unwrap().kill();
    fs::rename(network.path("manager").join("manager.redb"), network.path("old.redb")).unwrap();
    let restored = network.of("manager", args!["restore", &manager]).ok();
    network.run_role("manager");
    let in_force = network.of("manager", args!["status"]).ok();
    assert_eq!(in_force["restore"], restored["restore"], "{restored}");
    network.daemons.remove("manager").unwrap().kill();
    let marked = network.of("manager", args!["restored"]).ok();
    network.run_role("manager");
    assert_eq!(network.of("manager", args!["status"]).ok()["restore"], marked["restore"]);

    // One whose database is gone does not begin with an empty one.
    for role in ["manager", "merchant"] {
        network.daemons.remove(role).unwrap().kill();
        let database = network.path(role).join(format!("{role}.redb"));
        fs::rename(&database, network.path("old.redb")).unwrap();
        network.of(role, args!["run"]).refused(&[&format!("{role}.redb is missing"), "restore BACKUP"]);
        assert!(!database.exists());
        fs::write(&database, "").unwrap();
        network.of(role, args!["run"]).refused(&[&format!("{role}.redb is missing or empty"), "restore BACKUP"]);
        fs::rename(network.path("old.redb"), &database).unwrap();
        network.run_role(role);
    }
}

/// What of a manager or a merchant is in a folder. A seeder that runs there writes files of its own meanwhile.
fn names(dir: &Path) -> BTreeSet<&'static str> {
    let theirs = ["manager.redb", "merchant.redb", "root.key", "next-root.key", "keys", "key-set", "restores"];
    theirs.into_iter().filter(|name| dir.join(name).symlink_metadata().is_ok()).collect()
}

#[test]
fn keys_that_were_changed_after_the_backup_are_replaced_by_one_rotation_signed_where_the_root_key_is() {
    let mut network = network();
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(7, 150_000)).unwrap();
    let product = network.publish(&goods, &[]);
    let seeder = network.seeders_in("seeder-1").remove(0);
    let root = network.path("root-key-elsewhere");
    fs::rename(network.path("manager").join("root.key"), &root).unwrap();
    let sold = network.buy(&product, "sold");
    let file = network.path("yesterday");
    network.of("manager", args!["backup", "-o", &file]).ok();
    for purpose in ["receipt-sealing", "ticket"] {
        network.of("manager", args!["keys", "rotate", purpose, "--root-key", &root]).ok();
    }
    let followed = |network: &Network, version: u64| {
        until("the seeder having the key set, and no other of its number", || {
            let status = network.of("seeder-1", args!["status"]).ok();
            (status["key_set_version"] == version && status["fork"].is_null()).then_some(())
        });
    };
    followed(&network, 3);
    sold.fetch(&network.path("out-sold"));
    let before = network.settled(&sold.transaction);

    network.daemons.remove("manager").unwrap().kill();
    fs::remove_dir_all(network.path("manager")).unwrap();
    network.of("manager", args!["restore", &file]).ok();
    network.run_role("manager");
    let told = until("the manager being shown the key set", || {
        let status = network.of("manager", args!["status"]).ok();
        (status["key_set_version"] == 3).then_some(status)
    });
    assert_eq!(told["keys_missing"], serde_json::json!(["ticket", "receipt-sealing"]), "{told}");
    assert!(text(&told, "trouble").contains("willcall manager keys rotate ticket"), "{told}");

    let (request, signed) = (network.path("request"), network.path("signed"));
    let rotated = network.of("manager", args!["keys", "rotate", "ticket", "--request", &request]).ok();
    assert_eq!((&rotated["version"], &rotated["lost"][0]), (&4.into(), &"receipt-sealing".into()), "{rotated}");
    run(args!["manager", "keys", "sign", &request, "--root-key", &root, "-o", &signed]).ok();
    network.of("manager", args!["keys", "install", &signed]).ok();
    followed(&network, 4);
    assert_eq!(network.of("manager", args!["status"]).ok()["trouble"], Value::Null);
    // The seeder's receipts are sealed anew; the origin's died with the folder.
    let again = network.settled(&sold.transaction);
    assert_eq!(counted(&again, &seeder), counted(&before, &seeder), "{again}");
    let later = network.buy(&product, "later");
    let (_, arrived) = later.fetch(&network.path("out-later"));
    same(&goods, &arrived);
    network.settled(&later.transaction);
    network.assert_books();
}
