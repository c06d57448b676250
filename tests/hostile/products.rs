//! Products at the edges: nothing at all, one byte, the sizes around a chunk's end, thousands of files, names that a
//! shell or a terminal would trip over, links.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use serde_json::Value;

use super::support::{Network, args, bytes, run, same, text};

/// Bytes of a pack in a chunk of 64 KiB, the smallest: its tag takes 16.
const PAYLOAD: usize = 65_536 - 16;

/// Sells `path` and checks what arrives and what the manager counted.
#[track_caller]
fn sell(network: &Network, path: &Path, client: &str, policy: &str) -> Value {
    let product = network.publish(path, &["--policy", policy]);
    let bought = network.buy(&product, client);
    let (answer, arrived) = bought.fetch(&network.path(&format!("{client}-goods")));
    same(path, &arrived);
    let verified = run(args!["verify", &arrived, "--home", &bought.home]).ok();
    assert_eq!(verified["ok"], true, "{verified}");
    let settled = network.settled(&bought.transaction);
    assert_eq!(settled["deliveries"][0]["whole"], true, "{settled}");
    assert_eq!(answer["plain_bytes"], product["plain_bytes"]);
    product
}

#[test]
fn sizes_around_a_chunks_end() {
    let network = Network::start(1);
    let goods = network.path("goods");
    let file = |name: &str, size: usize| {
        fs::create_dir_all(&goods).unwrap();
        let path = goods.join(name);
        fs::write(&path, bytes(size as u64, size)).unwrap();
        path
    };
    let empty = sell(&network, &file("empty", 0), "c0", "at-release");
    assert_eq!((empty["plain_bytes"].as_u64(), empty["chunks"].as_u64()), (Some(0), Some(1)));
    sell(&network, &file("one", 1), "c1", "on-completion");
    // How much the header and list of files take, for a name of this length and a size of three bytes.
    let near = network.publish(&file("size-near", 60_000), &[]);
    let head = near["content_bytes"].as_u64().unwrap() as usize - 16 - 60_000;
    for (client, name, size, chunks) in [
        ("c2", "size-less", PAYLOAD - head - 1, 1),
        ("c3", "size-full", PAYLOAD - head, 1),
        ("c4", "size-more", PAYLOAD - head + 1, 2),
        ("c5", "size-two.", 2 * PAYLOAD - head - 2, 2),
        ("c6", "size-tow.", 2 * PAYLOAD - head + 3, 3),
    ] {
        let product =
            sell(&network, &file(name, size), client, if chunks == 2 { "on-completion" } else { "at-release" });
        assert_eq!(product["chunks"], chunks, "{name} of {size} bytes: {product}");
    }
    network.assert_books();
}

#[test]
fn folders_with_many_files_odd_names_and_links() {
    let network = Network::start(1);

    let many = network.path("many");
    for number in 0..2000_u64 {
        let folder = many.join(format!("{:02}", number % 37));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("file {number}")), bytes(number, (number % 300) as usize)).unwrap();
    }
    let product = sell(&network, &many, "c1", "at-release");
    assert_eq!(product["files"], 2000);

    let odd = network.path("odd  name \u{1f3ab}");
    fs::create_dir_all(odd.join("sub folder/empty")).unwrap();
    let long = "l".repeat(255);
    let names = [
        "two\nlines",
        "tab\there",
        "\u{65e5}\u{672c}\u{8a9e}",
        "-rf *",
        "quote\"'`$(x)",
        "\u{1b}[31mred",
        &long,
        " lead",
        "trail ",
    ];
    for name in names {
        fs::write(odd.join("sub folder").join(name), name).unwrap();
    }
    let tool = odd.join("tool.sh");
    fs::write(&tool, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    symlink("sub folder/two\nlines", odd.join("inside")).unwrap();
    symlink("../tool.sh", odd.join("sub folder/up")).unwrap();
    sell(&network, &odd, "c2", "on-completion");

    let empty = network.path("an empty folder");
    fs::create_dir(&empty).unwrap();
    let product = sell(&network, &empty, "c3", "at-release");
    assert_eq!(product["files"], 0);

    // Refused with their path, and nothing of them gets into the catalogue.
    let before = network.of("manager", args!["products"]).ok()["products"].as_array().unwrap().len();
    let refused = |path: &Path, what: &[&str]| {
        let publish = args!["publish", path, "--title", "Goods", "--price", "1", "--currency", "USD"];
        network.of("manager", publish).refused(what);
    };
    let leaky = network.path("leaky");
    fs::create_dir_all(leaky.join("sub")).unwrap();
    symlink("../../../etc/passwd", leaky.join("sub/secret")).unwrap();
    refused(&leaky, &["leaky/sub/secret", "outside"]);
    fs::remove_file(leaky.join("sub/secret")).unwrap();
    symlink("/etc/passwd", leaky.join("sub/absolute")).unwrap();
    refused(&leaky, &["leaky/sub/absolute", "outside"]);
    fs::remove_file(leaky.join("sub/absolute")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(leaky.join("socket")).unwrap();
    refused(&leaky, &["leaky/socket"]);
    refused(&network.path("absent"), &["absent"]);
    refused(&network.path("manager"), &["own directory"]);
    let after = network.of("manager", args!["products"]).ok()["products"].as_array().unwrap().len();
    assert_eq!(before, after);
    network.assert_books();
}

/// Takes minutes and 5 GiB of disk: only when asked for.
#[test]
fn a_gibibyte_needs_no_more_memory_than_a_little() {
    if std::env::var_os("WILLCALL_BIG_TESTS").is_none() {
        eprintln!("left out: set WILLCALL_BIG_TESTS=1 to sell a product of 1 GiB (needs 5 GiB of disk)");
        return;
    }
    let network = Network::start(1);
    let path = network.path("big.bin");
    let mut file = fs::File::create(&path).unwrap();
    for part in 0..256 {
        std::io::Write::write_all(&mut file, &bytes(part, 4 << 20)).unwrap();
    }
    let product = network.publish(&path, &["--chunk-size", "1MiB", "--rate", "1000"]);
    let bought = network.buy(&product, "client");
    let out = network.path("goods");
    let mut fetch = super::support::Job::start(bought.fetching(&out));
    let peak = fetch.watch_peak_kib();
    let answer = fetch.finish().ok();
    let report: Vec<String> = network
        .daemons
        .iter()
        .map(|(name, daemon)| format!("{name} {} MiB", daemon.memory_kib("VmHWM:") / 1024))
        .collect();
    eprintln!(
        "1 GiB in {} s ({} MiB/s); peaks: client {} MiB, {}",
        answer["seconds"],
        answer["mib_per_s"],
        peak / 1024,
        report.join(", ")
    );
    assert_eq!(text(&answer, "path"), out.join("big.bin").to_string_lossy());
    let equal = std::process::Command::new("cmp").arg(&path).arg(out.join("big.bin")).status().unwrap();
    assert!(equal.success());
    for daemon in network.daemons.values() {
        assert!(daemon.memory_kib("VmHWM:") < 512 * 1024);
    }
    assert!(peak < 512 * 1024);
}
