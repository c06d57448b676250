//! What lies in a delivery's folder is the buyer's: a second fetch brings what is missing or damaged, from the goods that
//! are there as far as they go, and takes nothing away.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::support::{Bought, Job, Network, args, bytes, program, run, same, text};

/// Bytes of a chunk as it is sent.
const CHUNK: u64 = 65_536;

/// A folder of four files, the larger ones of several chunks.
fn folder(network: &Network) -> PathBuf {
    let goods = network.path("goods");
    fs::create_dir_all(goods.join("sub")).unwrap();
    for (name, size) in [("big.bin", 900_000), ("b.bin", 200_000), ("sub/c.bin", 150_000), ("run", 10)] {
        fs::write(goods.join(name), bytes(size as u64, size)).unwrap();
    }
    fs::set_permissions(goods.join("run"), fs::Permissions::from_mode(0o755)).unwrap();
    goods
}

#[track_caller]
fn fetch(bought: &Bought, out: &Path, only: &[&str]) -> Value {
    let mut fetching = bought.fetching(out);
    for name in only {
        fetching.extend(args!["--only", *name]);
    }
    run(fetching).ok()
}

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or_else(|| panic!("no number '{name}' in {value}"))
}

fn delivery(bought: &Bought) -> Value {
    run(args!["status", "--home", &bought.home]).ok()["deliveries"][0].clone()
}

/// How `verify` finds each file.
fn verified(bought: &Bought, place: &Path) -> (bool, Vec<(String, String)>) {
    let report = run(args!["verify", place, "--home", &bought.home]).json();
    let files = report["files"].as_array().unwrap().iter();
    (report["ok"] == true, files.map(|file| (text(file, "path"), text(file, "state"))).collect())
}

fn is_same(sold: &Path, arrived: &Path, name: &str) {
    same(&sold.join(name), &arrived.join(name));
}

#[test]
fn parts_of_a_product_add_up() {
    let network = Network::start(1);
    let goods = folder(&network);
    let product = network.publish(&goods, &[]);
    let bought = network.buy(&product, "client");
    let (out, place) = (network.path("out"), network.path("out/goods"));
    fetch(&bought, &out, &["big.bin"]);
    let inode = fs::metadata(place.join("big.bin")).unwrap().ino();
    fs::write(place.join("notes.txt"), "mine").unwrap();

    let second = fetch(&bought, &out, &["b.bin"]);
    assert_eq!(number(&second, "files"), 2, "{second}");
    assert_eq!(fs::metadata(place.join("big.bin")).unwrap().ino(), inode, "it was not touched");
    for name in ["big.bin", "b.bin"] {
        is_same(&goods, &place, name);
    }
    let state = |name: &str, state: &str| (name.to_owned(), state.to_owned());
    let (good, files) = verified(&bought, &place);
    assert!(good && files.contains(&state("big.bin", "ok")) && files.contains(&state("b.bin", "ok")), "{files:?}");
    assert!(files.contains(&state("sub/c.bin", "not-fetched")), "{files:?}");
    let shown = delivery(&bought);
    assert_eq!((&shown["only"], &shown["files"]), (&json!(["big.bin", "b.bin"]), &json!(2)), "{shown}");
    assert!(number(&shown, "have_bytes") < number(&shown, "total_bytes"), "{shown}");
    // Damage to a part of an earlier run shows.
    fs::write(place.join("big.bin"), "x").unwrap();
    assert!(!verified(&bought, &place).0);
    fs::remove_file(place.join("big.bin")).unwrap();
    fetch(&bought, &out, &["big.bin"]);
    assert!(verified(&bought, &place).0);

    // The whole later: what is there is not sent again.
    let whole = fetch(&bought, &out, &[]);
    let total = number(&product, "content_bytes");
    assert_eq!(number(&whole, "bytes") + number(&whole, "resumed_from"), total, "{whole}");
    assert!(number(&whole, "bytes") <= 150_000 + 3 * CHUNK, "{whole}");
    let shown = delivery(&bought);
    assert_eq!((&shown["only"], &shown["files"], &shown["have_bytes"]), (&json!([]), &json!(4), &json!(total)));
    assert_eq!(fs::read_to_string(place.join("notes.txt")).unwrap(), "mine");
    fs::remove_file(place.join("notes.txt")).unwrap();
    same(&goods, &place);
    let settled = network.settled(&bought.transaction);
    assert_eq!(settled["deliveries"][0]["whole"], true, "{settled}");
    network.assert_books();
}

#[test]
fn a_damaged_delivery_is_mended_and_nothing_of_the_buyers_is_lost() {
    let network = Network::start(1);
    let goods = folder(&network);
    let bought = network.buy(&network.publish(&goods, &[]), "client");
    let (out, place, outside) = (network.path("out"), network.path("out/goods"), network.path("outside"));
    let first = fetch(&bought, &out, &[]);
    let total = number(&first, "bytes");
    network.settled(&bought.transaction);
    let inode = fs::metadata(place.join("big.bin")).unwrap().ino();

    // One file gone, and asked for alone.
    fs::remove_file(place.join("b.bin")).unwrap();
    let mended = fetch(&bought, &out, &["b.bin"]);
    assert!(number(&mended, "bytes") <= 200_000 + 2 * CHUNK, "{mended}");
    same(&goods, &place);
    assert_eq!((&delivery(&bought)["only"], verified(&bought, &place).0), (&json!([]), true));

    // One gone, one changed, a save, and a folder that leads elsewhere.
    fs::write(place.join("notes.txt"), "hi").unwrap();
    fs::write(place.join("sub/save"), "level 3").unwrap();
    fs::remove_file(place.join("b.bin")).unwrap();
    let mut changed = fs::read(place.join("sub/c.bin")).unwrap();
    changed[100_000] ^= 1;
    fs::write(place.join("sub/c.bin"), &changed).unwrap();
    fs::set_permissions(place.join("run"), fs::Permissions::from_mode(0o644)).unwrap();
    let mended = fetch(&bought, &out, &[]);
    assert_eq!(mended["kept_aside"], json!([place.join("sub/c.bin.kept-1")]), "{mended}");
    assert!(number(&mended, "bytes") <= 200_000 + 3 * CHUNK, "{mended}");
    assert_eq!(number(&mended, "bytes") + number(&mended, "resumed_from"), total, "{mended}");
    assert!(fs::read(place.join("sub/c.bin.kept-1")).unwrap() == changed);
    assert_eq!(fs::read_to_string(place.join("notes.txt")).unwrap(), "hi");
    assert_eq!(fs::read_to_string(place.join("sub/save")).unwrap(), "level 3");
    assert_eq!(fs::metadata(place.join("big.bin")).unwrap().ino(), inode, "it was not touched");
    for name in ["notes.txt", "sub/save", "sub/c.bin.kept-1"] {
        fs::remove_file(place.join(name)).unwrap();
    }
    same(&goods, &place);

    // Nothing is written through a link, and what it leads to is good for reading.
    fs::rename(place.join("sub"), &outside).unwrap();
    fs::write(outside.join("mine"), "mine").unwrap();
    symlink(&outside, place.join("sub")).unwrap();
    let mended = fetch(&bought, &out, &[]);
    assert_eq!((&mended["kept_aside"], &mended["bytes"]), (&json!([place.join("sub.kept-1")]), &json!(0)), "{mended}");
    assert_eq!(fs::read_link(place.join("sub.kept-1")).unwrap(), outside);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 2);
    fs::remove_file(place.join("sub.kept-1")).unwrap();
    same(&goods, &place);
    // People are told, too.
    fs::write(place.join("b.bin"), "mine").unwrap();
    let told = super::support::run_plain(bought.fetching(&out)).stdout;
    assert!(told.contains("kept aside") && told.contains("b.bin.kept-1"), "{told}");
    // Nothing is left beside.
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    network.assert_books();
}

#[test]
fn a_single_file_that_was_changed_is_mended_and_kept_aside() {
    let network = Network::start(1);
    let goods = network.path("one.bin");
    fs::write(&goods, bytes(5, 900_000)).unwrap();
    let bought = network.buy(&network.publish(&goods, &[]), "client");
    let (out, place) = (network.path("out"), network.path("out/one.bin"));
    fetch(&bought, &out, &[]);
    let mut changed = bytes(5, 900_000);
    changed[500_000] ^= 1;
    fs::write(&place, &changed).unwrap();
    let mended = fetch(&bought, &out, &[]);
    assert_eq!(mended["kept_aside"], json!([network.path("out/one.bin.kept-1")]), "{mended}");
    assert_eq!(number(&mended, "bytes"), CHUNK, "{mended}");
    same(&goods, &place);
    assert!(fs::read(network.path("out/one.bin.kept-1")).unwrap() == changed);
    assert!(verified(&bought, &place).0);
    assert_eq!(fetch(&bought, &out, &[])["already_here"], true);
}

#[test]
fn a_fetch_that_was_killed_is_named_with_what_it_left() {
    let network = Network::start(1);
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(6, 4_000_000)).unwrap();
    let product = network.publish(&goods, &[]);
    let out = network.path("out");
    // Too short for anything to be noted; the next run notes what it finds before it goes on.
    let bought = network.buy(&product, "hurried");
    for percent in ["20", "40"] {
        let mut hurried = bought.fetching(&network.path("hurried-out"));
        hurried.extend(args!["--limit", "500kB", "--progress"]);
        let mut job = Job::start(hurried);
        job.says(&format!("\"percent\":{percent}"));
        job.kill();
    }
    assert!(number(&delivery(&bought), "have_bytes") > 400_000, "{}", delivery(&bought));

    let bought = network.buy(&product, "client");
    let mut fetching = bought.fetching(&out);
    // Long enough for what came to be noted.
    fetching.extend(args!["--limit", "500kB", "--progress"]);
    let mut job = Job::start(fetching);
    job.says("\"percent\":80");
    let shown = delivery(&bought);
    assert_eq!((&shown["state"], &shown["trouble"]), (&json!("fetching"), &Value::Null), "it runs: {shown}");
    job.kill();
    let shown = delivery(&bought);
    assert_eq!((&shown["state"], &shown["trouble"]["cause"]), (&json!("fetching"), &json!("interrupted")), "{shown}");
    assert!(number(&shown["trouble"], "at") > 0 && number(&shown, "have_bytes") > 0, "{shown}");
    assert_eq!(shown["total_bytes"], product["content_bytes"], "{shown}");
    let told = super::support::run_plain(args!["status", "--home", &bought.home]).stdout;
    assert!(told.contains("(interrupted)"), "{told}");

    fetch(&bought, &out, &[]);
    let shown = delivery(&bought);
    assert_eq!((&shown["state"], &shown["trouble"]), (&json!("done"), &Value::Null), "{shown}");
}

#[test]
fn what_a_killed_merge_left_is_no_hindrance_to_the_next_fetch() {
    let network = Network::start(1);
    let goods = network.path("goods");
    fs::create_dir_all(goods.join("a")).unwrap();
    fs::create_dir_all(goods.join("b")).unwrap();
    let names = ["a/1", "a/2", "a/3", "b/1", "b/2", "b/3"];
    for (seed, name) in (1..).zip(names) {
        fs::write(goods.join(name), bytes(seed, 300_000)).unwrap();
    }
    let product = network.publish(&goods, &[]);
    let bought = network.buy(&product, "client");
    let (out, place, point) = (network.path("out"), network.path("out/goods"), network.path("crash"));
    fetch(&bought, &out, &[]);
    // More than half of it goes, so that the next run asks for everything.
    fs::remove_dir_all(place.join("b")).unwrap();
    fs::remove_file(place.join("a/2")).unwrap();
    fs::remove_file(place.join("a/3")).unwrap();
    fs::write(&point, "client.merged after").unwrap();
    let killed = program(&bought.fetching(&out)).env(store::CRASH_FILE, &point).output().unwrap();
    assert_eq!(killed.status.signal(), Some(9), "{}", String::from_utf8_lossy(&killed.stderr));
    let left = names.iter().filter(|name| place.join(name).exists()).count();
    assert!((2..names.len()).contains(&left), "{left} are there");
    fetch(&bought, &out, &[]);
    for name in names {
        is_same(&goods, &place, name);
    }
    assert!(verified(&bought, &place).0);
}

#[test]
fn what_breaks_again_and_again_is_mended_again_and_again() {
    let network = Network::start(1);
    let goods = network.path("goods");
    fs::create_dir_all(&goods).unwrap();
    // Each time more than half of what a seeder lets out unacknowledged.
    fs::write(goods.join("a.bin"), bytes(1, 14_000_000)).unwrap();
    fs::write(goods.join("b.bin"), bytes(2, 12_000_000)).unwrap();
    let product = network.publish(&goods, &[]);
    let bought = network.buy(&product, "client");
    let (out, place) = (network.path("out"), network.path("out/goods"));
    fetch(&bought, &out, &[]);
    for round in 1..=4 {
        fs::remove_file(place.join("b.bin")).unwrap();
        if round == 3 {
            // The key of this lease is given up: another takes its place.
            network.of("manager", args!["keys", "rotate", "ticket", "--stolen"]).ok();
        }
        let mut fetching = bought.fetching(&out);
        fetching.extend(args!["--patience", "8s"]);
        let mended = run(fetching).ok();
        assert_eq!((&mended["reported"], &mended["state"]), (&json!(true), &json!("done")), "round {round}: {mended}");
        assert!(number(&mended, "bytes") >= 12_000_000, "round {round}: {mended}");
        is_same(&goods, &place, "b.bin");
    }
}

#[test]
fn killed_with_the_goods_in_their_place_nothing_is_left_to_do() {
    let network = Network::start(1);
    let goods = folder(&network);
    let product = network.publish(&goods, &[]);
    let bought = network.buy(&product, "client");
    let (out, place, point) = (network.path("out"), network.path("out/goods"), network.path("crash"));
    let work = || fs::read_dir(&out).unwrap().filter(|entry| entry.as_ref().unwrap().file_name() != "goods").count();
    let killed = |at: &str| {
        fs::write(&point, at).unwrap();
        let killed = program(&bought.fetching(&out)).env(store::CRASH_FILE, &point).output().unwrap();
        assert_eq!(killed.status.signal(), Some(9), "{at}: {}", String::from_utf8_lossy(&killed.stderr));
        assert_eq!(work(), 1, "{at}");
    };
    // Noted as done: there is nothing to tell of but the folder.
    killed("client.done after");
    let shown = delivery(&bought);
    assert_eq!((&shown["state"], &shown["trouble"]), (&json!("done"), &Value::Null), "{shown}");
    assert_eq!(fetch(&bought, &out, &[])["already_here"], true);
    assert_eq!(work(), 0);
    // Mended, and not noted.
    fs::remove_file(place.join("b.bin")).unwrap();
    killed("client.placed after");
    assert_eq!(delivery(&bought)["trouble"]["cause"], "interrupted");
    assert_eq!(fetch(&bought, &out, &[])["already_here"], true);
    assert_eq!(work(), 0);
    let shown = delivery(&bought);
    assert_eq!((&shown["state"], &shown["trouble"]), (&json!("done"), &Value::Null), "{shown}");
    assert!(verified(&bought, &place).0);
}

#[test]
fn names_that_a_terminal_obeys_and_folders_that_are_no_text() {
    let network = Network::start(1);
    let goods = network.path("goods\u{1b}]52;c;cm0=\u{7}");
    fs::write(&goods, bytes(5, 1000)).unwrap();
    let product = network.publish(&goods, &[]);
    let bought = network.buy(&product, "client");
    let odd = network.path("").join(std::ffi::OsStr::from_bytes(b"odd-\xff"));
    fs::create_dir(&odd).unwrap();
    let fetching = args!["fetch", &bought.ticket, "--home", &bought.home];
    let fetch = |more: Vec<OsString>| program(&[fetching.clone(), more].concat()).current_dir(&odd).output().unwrap();
    // Where the folder, or the home, is no text, what is said of it is.
    let first = fetch(args!["--json"]);
    let answer: Value = serde_json::from_slice(&first.stdout).unwrap();
    assert!(first.status.success() && text(&answer, "path").contains("odd-\u{fffd}"), "{answer}");
    same(&goods, &odd.join(goods.file_name().unwrap()));
    let again = fetch(Vec::new());
    let said = String::from_utf8(again.stdout).unwrap();
    assert!(again.status.success() && said.contains("is here already"), "{said}");
    assert!(said.contains("goods\u{fffd}]52;c;cm0=\u{fffd}") && !said.contains('\u{1b}'), "{said}");
    let asking = args!["id", "--json"];
    let id = program(&asking).env("WILLCALL_HOME", &odd).output().unwrap();
    assert!(id.status.success(), "{}", String::from_utf8_lossy(&id.stderr));
}
