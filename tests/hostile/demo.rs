//! `willcall demo` is the first thing that anybody runs, and what tools check: its one JSON object has to keep every
//! promise, its failures have to say where, and nothing may be left running.

use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::support::{Job, args, bytes, inside, processes_naming, run, until};

#[track_caller]
fn assert_promises(demo: &Value) {
    assert_eq!(demo["ok"], true, "{demo}");
    let steps = demo["steps"].as_array().unwrap();
    for (index, step) in steps.iter().enumerate() {
        assert_eq!(step["n"], index + 1);
        assert_eq!(step["ok"], true, "{step}");
        assert!(!step["evidence"].as_str().unwrap().is_empty() && !step["name"].as_str().unwrap().is_empty(), "{step}");
    }
    assert_eq!(steps.len(), 12);
    assert_eq!(demo["transaction"]["state"], "settled");
    let (delivery, product) = (&demo["delivery"], &demo["product"]);
    assert_eq!(delivery["identical"], true);
    assert_eq!(delivery["bytes"], product["plain_bytes"]);
    assert_eq!(product["root"].as_str().unwrap().len(), 64);
    let sum = |rows: &Value, field: &str| -> u64 {
        rows.as_array().unwrap().iter().map(|row| row[field].as_u64().unwrap()).sum()
    };
    assert!(sum(&delivery["sources"], "bytes") >= product["content_bytes"].as_u64().unwrap());
    assert!(product["content_bytes"].as_u64() > product["plain_bytes"].as_u64());
    let refusals = demo["refusals"].as_array().unwrap();
    for (case, code) in [
        ("other-peer", "wrong-client"),
        ("no-endorsement", "bad-endorsement"),
        ("forged-ticket", "bad-manager-signature"),
        ("expired", "expired"),
    ] {
        assert!(refusals.iter().any(|r| r["case"] == case && r["code"] == code), "{case}: {refusals:?}");
    }
    let receipts = demo["receipts"].as_array().unwrap();
    assert!(!receipts.is_empty() && receipts.iter().all(|r| r["status"] == "counted"), "{receipts:?}");
    assert!(sum(&demo["receipts"], "chunks") >= product["chunks"].as_u64().unwrap());
    let ledger = &demo["ledger"];
    assert_eq!(ledger["balanced"], true);
    assert_eq!(ledger["debits"], ledger["credits"]);
    assert_eq!(sum(&ledger["entries"], "debit"), ledger["debits"].as_u64().unwrap());
    assert_eq!(sum(&ledger["entries"], "credit"), ledger["credits"].as_u64().unwrap());
    assert!(ledger["debits"].as_u64().unwrap() > 0);
}

/// A demo with everything under `dir`, so that its processes can be found by the folder's name.
fn demo(dir: &Path, more: Vec<std::ffi::OsString>) -> Job {
    let mut demo = args!["demo", "--keep", dir.join("kept"), "--seeders", "2"];
    demo.extend(more);
    Job::start(demo)
}

#[test]
fn sells_a_file_and_a_folder_with_odd_names() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("odd name \u{e9}\n.bin");
    fs::write(&file, bytes(1, 200_001)).unwrap();
    let done = demo(dir.path(), args![&file]).finish();
    assert!(done.stderr.is_empty(), "{}", done.stderr);
    let result = done.ok();
    assert_promises(&result);
    assert_eq!(result["delivery"]["bytes"], 200_001);
    assert!(processes_naming(dir.path()).is_empty(), "processes are left");
    fs::remove_dir_all(dir.path().join("kept")).unwrap();

    let folder = dir.path().join("-- an album \"quoted\" 'too' $HOME; \u{65e5}\u{672c}");
    fs::create_dir_all(folder.join("empty")).unwrap();
    fs::write(folder.join("line\nbreak"), b"x").unwrap();
    fs::write(folder.join("-rf"), b"").unwrap();
    let result = demo(dir.path(), args![&folder]).finish().ok();
    assert_promises(&result);
    assert_eq!(result["product"]["files"], 2);
    assert!(processes_naming(dir.path()).is_empty(), "processes are left");
}

#[test]
fn failures_say_where_and_ctrl_c_stops_all_of_it() {
    let dir = tempfile::tempdir().unwrap();
    run(args!["demo", dir.path().join("absent")]).refused(&["absent", "cannot read"]);
    fs::write(dir.path().join("taken"), b"").unwrap();
    run(args!["demo", "--keep", dir.path()]).refused(&["is not empty"]);

    // A product that cannot be published: the step is named, and what had been started is gone.
    let folder = dir.path().join("goods");
    fs::create_dir(&folder).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", folder.join("out")).unwrap();
    demo(dir.path(), args![&folder]).finish().refused(&["while publishing", "goods/out"]);
    assert!(processes_naming(dir.path()).is_empty(), "processes are left");
    fs::remove_dir_all(dir.path().join("kept")).unwrap();

    let running = demo(dir.path(), args![]);
    // Under way: its first nodes have their own folders and run.
    until("nodes of the demo", || (!processes_naming(&dir.path().join("kept/merchant")).is_empty()).then_some(()));
    let pid = Pid::from_raw(i32::try_from(running.pid()).unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    running.finish().refused(&["demo: stopped by"]);
    assert!(processes_naming(dir.path()).is_empty(), "processes are left");
}

#[test]
fn a_scenario_that_is_stopped_leaves_nothing_and_a_wrong_name_is_a_wrong_command() {
    let wrong = run(args!["testnet", "scenario", "earthquake"]);
    assert_eq!(wrong.status.code(), Some(2), "not 1, which is a scenario that ended badly");
    assert!(
        wrong.json()["error"]["message"].as_str().unwrap().contains("possible values: churn, "),
        "{}",
        wrong.stdout
    );
    assert_eq!(run(args!["testnet", "scenario"]).status.code(), Some(2));
    let list = run(args!["testnet", "scenario", "--list"]).ok();
    assert!(
        list["scenarios"].as_array().unwrap().iter().all(|one| !one["what"].as_str().unwrap().is_empty()),
        "{list}"
    );

    let dir = tempfile::tempdir().unwrap();
    let temporary = format!("TMPDIR={}", dir.path().display());
    let running = inside(vec!["env".into(), temporary.into()], || Job::start(args!["testnet", "scenario", "churn"]));
    let files = || fs::read_dir(dir.path()).unwrap().count();
    until("the network's folder", || (files() > 0).then_some(()));
    let pid = Pid::from_raw(i32::try_from(running.pid()).unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    running.finish().refused(&["scenario churn was stopped before its end"]);
    assert_eq!(files(), 0, "files are left");
}

/// However early it is told to stop: as soon as it hears signals it takes away what it made, and before that it has made
/// nothing.
#[test]
fn a_demo_and_a_testnet_that_are_stopped_at_once_leave_nothing_behind() {
    for command in [args!["demo"], args!["testnet", "up"]] {
        for signal in [Signal::TERM, Signal::INT] {
            let dir = tempfile::tempdir().unwrap();
            let temporary = format!("TMPDIR={}", dir.path().display());
            let files = || fs::read_dir(dir.path()).unwrap().count();
            let job = inside(vec!["env".into(), temporary.into()], || Job::start(command.clone()));
            // The very first thing that is there.
            until("a folder", || (files() > 0).then_some(()));
            let pid = Pid::from_raw(i32::try_from(job.pid()).unwrap()).unwrap();
            kill_process(pid, signal).unwrap();
            job.finish();
            assert_eq!(files(), 0, "{command:?} {signal:?}: files are left");
        }
    }
}

/// One node of it that dies is told in a line, and the rest goes on until it is stopped.
#[test]
fn a_testnet_says_when_a_node_dies() {
    let dir = tempfile::tempdir().unwrap();
    let kept = dir.path().join("net");
    let mut job = Job::start_plain(args!["testnet", "up", "--seeders", "2", "--keep", &kept]);
    // Both have their copies: nothing that comes before it is ready needs them any more.
    until("the copies", || {
        let manager = kept.join("manager");
        // It may not be there yet.
        let seen = Job::start(args!["manager", "seeders", "--dir", &manager]).finish();
        let seeders = serde_json::from_str::<Value>(&seen.stdout).ok()?;
        let whole = seeders["seeders"].as_array()?.iter().filter(|seeder| seeder["held"] == 1).count();
        (whole == 3).then_some(())
    });
    let seeder = processes_naming(&kept.join("seeder-1"));
    let [process] = seeder.as_slice() else { panic!("{seeder:?}") };
    let pid: i32 = process.file_name().unwrap().to_string_lossy().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    job.says("seeder-1 has ended (signal: 9");
    assert!(!processes_naming(&kept.join("seeder-2")).is_empty());
    kill_process(Pid::from_raw(i32::try_from(job.pid()).unwrap()).unwrap(), Signal::TERM).unwrap();
    let ended = job.finish();
    assert!(ended.stdout.contains("Stopping every process") && !ended.status.success(), "{}", ended.stderr);
    assert!(processes_naming(&kept).is_empty());
}

#[test]
fn a_scenarios_size_is_refused_like_any_other_bad_value() {
    for (size, why) in [("0", "from 1MiB to 16GiB"), ("17GiB", "from 1MiB to 16GiB"), ("much", "is no size")] {
        let ended = Job::start_plain(args!["testnet", "scenario", "mixed-links", "--size", size]).finish();
        assert_eq!(ended.status.code(), Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains(why), "{}", ended.stderr);
    }
}

#[test]
fn a_demo_works_where_the_temporary_folder_has_too_long_a_path_for_a_socket() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("x".repeat(120)).join("y".repeat(120));
    fs::create_dir_all(&long).unwrap();
    let temporary = format!("TMPDIR={}", long.display());
    let album = dir.path().join("song");
    fs::write(&album, bytes(1, 100)).unwrap();
    let job = inside(vec!["env".into(), temporary.into()], || Job::start(args!["demo", &album, "--seeders", "1"]));
    assert_promises(&job.finish().ok());
    assert_eq!(fs::read_dir(&long).unwrap().count(), 0, "files are left");
}
