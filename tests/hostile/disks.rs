//! Full disks, by small file systems of their own (which takes the rights to mount): the error names the place and the
//! bytes needed, what was stored stays good, and with room made the same command goes on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::support::{Job, Network, args, bytes, run, same, until};

/// A file system in memory, gone with this value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// None, and a word about it, where mounting is not permitted.
    fn mount(at: &Path, size: &str) -> Option<SmallDisk> {
        fs::create_dir_all(at).unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(at)
            .stderr(Stdio::null())
            .status();
        if mount.is_ok_and(|status| status.success()) {
            return Some(SmallDisk(at.to_owned()));
        }
        eprintln!("left out: a small disk cannot be mounted here; run as root to test full disks");
        None
    }

    fn resize(&self, size: &str) {
        let status = Command::new("mount").args(["-o", &format!("remount,size={size}")]).arg(&self.0).status().unwrap();
        assert!(status.success());
    }

    /// Takes all the room that is left.
    fn fill(&self) {
        let mut file = fs::File::create(self.0.join("filler")).unwrap();
        let block = vec![1; 4096];
        while std::io::Write::write_all(&mut file, &block).is_ok() {}
    }

    fn make_room(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that still ends may have it open.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_client_with_a_full_disk() {
    let network = Network::start(1);
    let Some(disk) = SmallDisk::mount(&network.path("disk"), "1m") else { return };
    let file = network.path("film");
    fs::write(&file, bytes(1, 3_000_000)).unwrap();
    let product = network.publish(&file, &[]);
    let out = disk.0.join("out");
    let place = out.to_string_lossy().into_owned();

    // No room for what is to come: said before anything comes.
    let bought = network.buy(&product, "client");
    run(bought.fetching(&out)).refused(&[&place, "bytes are needed", "make room"]);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0, "nothing came, nothing stays");
    // Room for the product once is enough.
    disk.resize("4m");
    let (_, arrived) = bought.fetch(&out);
    same(&file, &arrived);

    // The room goes while it comes. What came is kept, and does not come again.
    disk.resize("9m");
    let bought = network.buy(&product, "another");
    let out = disk.0.join("more");
    let mut fetch = bought.fetching(&out);
    fetch.extend(args!["--limit", "1500kB", "--progress"]);
    let mut job = Job::start(fetch);
    job.says("\"percent\":20");
    disk.fill();
    let ended = job.finish();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    let said = ended.json()["error"].clone();
    assert_eq!(said["cause"], "disk-full", "{said}");
    let message = said["message"].as_str().unwrap();
    assert!(message.contains(&*out.to_string_lossy()) && message.contains("bytes"), "{message}");
    assert!(!out.join("film").exists(), "nothing half-written looks whole");
    disk.make_room();
    let (answer, arrived) = bought.fetch(&out);
    assert!(answer["bytes"].as_u64().unwrap() < 2_500_000, "what had come came again: {answer}");
    same(&file, &arrived);

    // A home without room: what cannot be remembered is not done.
    disk.fill();
    run(args!["id", "--home", disk.0.join("home")]).refused(&["disk/home", "No space left"]);
    disk.make_room();
    run(args!["id", "--home", disk.0.join("home")]).ok();
    network.settled(&bought.transaction);
    network.assert_books();
}

#[test]
fn a_part_takes_the_room_of_a_part() {
    let network = Network::start(1);
    let Some(disk) = SmallDisk::mount(&network.path("disk"), "1m") else { return };
    let goods = network.path("goods");
    fs::create_dir_all(&goods).unwrap();
    for (name, size) in [("large", 3_000_000), ("small", 100_000)] {
        fs::write(goods.join(name), bytes(size as u64, size)).unwrap();
    }
    let product = network.publish(&goods, &[]);
    let bought = network.buy(&product, "client");
    let (out, place) = (disk.0.join("out"), disk.0.join("out/goods"));
    let only = |name: &str| bought.fetching(&out).into_iter().chain(args!["--only", name]).collect::<Vec<_>>();

    // Said when it is known how much it is, and before it comes.
    let refused = run(only("large"));
    refused.refused(&[&out.to_string_lossy(), "make room"]);
    assert_eq!(refused.json()["error"]["cause"], "disk-full", "{}", refused.stdout);
    run(only("small")).ok();
    same(&goods.join("small"), &place.join("small"));

    // The whole needs its room and no more, whatever a part left behind.
    disk.resize("7m");
    bought.fetch(&out);
    same(&goods.join("large"), &place.join("large"));
    // With less room than the whole takes, what is missing of it is brought back.
    fs::remove_file(place.join("small")).unwrap();
    disk.resize("4m");
    bought.fetch(&out);
    same(&goods.join("small"), &place.join("small"));
}

#[test]
fn a_client_whose_disk_has_room_but_no_inodes() {
    let network = Network::start(1);
    let Some(disk) = SmallDisk::mount(&network.path("disk"), "20m,nr_inodes=200") else { return };
    let goods = network.path("goods");
    fs::create_dir_all(&goods).unwrap();
    for n in 0..300_u64 {
        fs::write(goods.join(format!("{n}")), bytes(n, 1000)).unwrap();
    }
    let product = network.publish(&goods, &[]);
    let bought = network.buy(&product, "client");
    let out = disk.0.join("out");
    let refused = run(bought.fetching(&out));
    refused.refused(&["no inodes", &out.to_string_lossy()]);
    assert_eq!(refused.json()["error"]["cause"], "disk-full", "{}", refused.stdout);
    disk.resize("20m,nr_inodes=2000");
    let (_, arrived) = bought.fetch(&out);
    same(&goods.join("299"), &arrived.join("299"));
}

#[test]
fn a_seeder_with_a_full_disk_goes_on_with_what_it_has() {
    let mut network = Network::start_with(0, 1);
    let Some(disk) = SmallDisk::mount(&network.path("disk"), "6m") else { return };
    let content = format!("content-dir={}", disk.0.join("content").display());
    // It seldom reports, so that the manager goes on to believe in room that is gone.
    network.add_seeder("seeder-1", &[&content, "min-free=0", "report-ms=3600000"]);
    let (early, late) = (network.path("early"), network.path("late"));
    fs::write(&early, bytes(1, 1_000_000)).unwrap();
    fs::write(&late, bytes(2, 2_000_000)).unwrap();
    let holders = |product: &serde_json::Value| {
        let shown = network.of("manager", args!["product", product["product"].as_str().unwrap()]).ok();
        shown["holders"].as_array().unwrap().len()
    };
    let held = network.publish(&early, &[]);
    until("the copy", || (holders(&held) == 2).then_some(()));
    disk.fill();
    let missed = network.publish(&late, &[]);
    let trouble = until("the seeder's trouble", || {
        let status = network.of("seeder-1", args!["status"]).ok();
        status["trouble"]["storage"].as_str().map(str::to_owned)
    });
    assert!(trouble.contains("disk/content") && trouble.contains("bytes are needed"), "{trouble}");
    assert_eq!(holders(&missed), 1);

    // What it has it serves.
    let bought = network.buy(&held, "client");
    let (answer, arrived) = bought.fetch(&network.path("out"));
    same(&early, &arrived);
    let seeder = network.daemons["seeder-1"].ready["peer"].as_str().unwrap();
    let sources = answer["sources"].as_array().unwrap();
    assert!(sources.iter().any(|s| s["peer"] == seeder && s["chunks"].as_u64() > Some(0)), "{answer}");
    network.settled(&bought.transaction);

    // With room, it makes up for what it missed.
    disk.make_room();
    until("the second copy", || (holders(&missed) == 2).then_some(()));
    let status = network.of("seeder-1", args!["status"]).ok();
    assert_eq!(status["trouble"]["storage"], serde_json::Value::Null, "{status}");
    network.assert_books();
}
