//! Mistakes that people make, each answered by one line that says what is wrong, where, and what to do.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use serde_json::{Value, json};

use super::support::{LIMIT, LISTEN, Network, args, program, run, run_plain, text};

/// Puts `line` into a node's settings in place of the one with its key, or at the end.
fn set(dir: &Path, line: &str) {
    let path = dir.join("config.toml");
    let key = line.split('=').next().unwrap().to_owned() + "=";
    let mut lines: Vec<String> = fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect();
    lines.retain(|old| !old.starts_with(&key));
    // Above the tables that may end the file.
    lines.insert(0, line.to_owned());
    fs::write(path, lines.join("\n")).unwrap();
}

#[test]
fn settings_folders_ports_and_keys() {
    let network = Network::start(1);
    // Nothing there, or nothing running.
    for role in ["manager", "merchant", "seeder"] {
        let dir = network.path("nothing");
        run(args![role, "run", "--dir", &dir]).refused(&[
            "nothing/config.toml",
            "does not exist",
            &format!("willcall {role} init"),
        ]);
        run(args![role, "status", "--dir", &dir]).refused(&["no node runs", "nothing", "start it first"]);
        run_plain(args![role, "status", "--dir", &dir]).refused(&["no node runs", "nothing"]);
    }
    // Two over one folder; one set up twice.
    for node in ["manager", "merchant", "seeder-1"] {
        network.of(node, args!["run"]).refused(&["in use by process", node]);
    }
    network.of("manager", args!["init"]).refused(&["already holds a manager"]);
    // Settings.
    let seeder = network.path("seeder-x");
    let mut init = args!["init", "--name", "x", "--capacity", "1GB", "--join", network.invite("seeder")];
    init.extend(LISTEN.map(std::ffi::OsString::from));
    network.of("seeder-x", init.clone()).ok();
    let mut merchant = args!["init", "--name", "x", "--http", "127.0.0.1:0", "--join", network.invite("merchant")];
    merchant.extend(LISTEN.map(std::ffi::OsString::from));
    run([args!["merchant"], merchant, args!["--dir", network.path("merchant-x")]].concat()).ok();
    run(args!["manager", "init", "--dir", network.path("manager-x"), LISTEN[0], LISTEN[1]]).ok();
    for role in ["manager", "merchant", "seeder"] {
        let dir = network.path(&format!("{role}-x"));
        let good = fs::read(dir.join("config.toml")).unwrap();
        let at_line = |line: &str| {
            set(&dir, line);
            "config.toml: line 1".to_owned()
        };
        let place = at_line("hartbeat = 3");
        let said = run(args![role, "run", "--dir", &dir]).refused(&[&place, "unknown", "hartbeat"]);
        assert!(!said.contains('|'), "a drawing of lines does not belong into one line: {said}");
        fs::write(dir.join("config.toml"), &good).unwrap();
        let place = at_line("clock-grace-ms = \"soon\"");
        run(args![role, "run", "--dir", &dir]).refused(&[&place, "clock-grace-ms", "soon", "expected"]);
        fs::write(dir.join("config.toml"), &good).unwrap();
        // At the end of the file, where nothing follows that could close it.
        let cut = String::from_utf8(good.clone()).unwrap().trim_end().to_owned() + "\nlisten = [";
        fs::write(dir.join("config.toml"), &cut).unwrap();
        let place = format!("config.toml: line {}", cut.lines().count());
        run(args![role, "run", "--dir", &dir]).refused(&[&place]);
        fs::write(dir.join("config.toml"), &good).unwrap();
    }
    let unset = network.path("unset");
    run(args!["manager", "init", "--dir", &unset, "--set", "foo=1"]).refused(&["--set", "foo", "unset"]);
    fs::remove_dir_all(&unset).unwrap();
    run(args!["manager", "init", "--dir", &unset, "--set", "copies=2", LISTEN[0], LISTEN[1]]).ok();
    // A missing key of the configuration.
    let text = fs::read_to_string(seeder.join("config.toml")).unwrap();
    let without: Vec<&str> = text.lines().filter(|line| !line.starts_with("join")).collect();
    fs::write(seeder.join("config.toml"), without.join("\n")).unwrap();
    network.of("seeder-x", args!["run"]).refused(&["config.toml", "join"]);
    fs::write(seeder.join("config.toml"), text).unwrap();
    // Ports.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    for role in ["manager", "seeder"] {
        let dir = network.path(&format!("{role}-x"));
        set(&dir, &format!("listen = [\"/ip4/127.0.0.1/tcp/{port}\"]"));
        run(args![role, "run", "--dir", &dir]).refused(&[&format!("tcp/{port}"), "in use", "choose another port"]);
    }
    set(&network.path("merchant-x"), &format!("http = \"127.0.0.1:{port}\""));
    run(args!["merchant", "run", "--dir", network.path("merchant-x")]).refused(&[
        &port.to_string(),
        "in use",
        "choose another",
    ]);
    // Keys.
    use std::os::unix::fs::PermissionsExt;
    let key = seeder.join("key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    network.of("seeder-x", args!["run"]).refused(&["seeder-x/key", "0644", "chmod 600"]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&key, "no key").unwrap();
    network.of("seeder-x", args!["run"]).refused(&["seeder-x/key", "damaged", "backup"]);
    fs::remove_file(&key).unwrap();
    network.of("seeder-x", args!["run"]).refused(&["seeder-x/key", "does not exist", "backup"]);
}

#[test]
fn lines_to_join_by_and_usage() {
    let network = Network::start(0);
    let (seeder, merchant) = (network.invite("seeder"), network.invite("merchant"));
    let client = text(&network.of("manager", args!["join"]).ok(), "join");
    let join = |role: &str, line: &str| {
        let more = if role == "seeder" { args!["--capacity", "1GB"] } else { args![] };
        let init = args![role, "init", "--dir", network.path("joining"), "--name", "x", "--join", line];
        run([init, more].concat())
    };
    let mistyped = {
        let mut line: Vec<char> = seeder.chars().collect();
        line[40] = if line[40] == 'A' { 'B' } else { 'A' };
        line.into_iter().collect::<String>()
    };
    join("seeder", &seeder[..seeder.len() - 7]).refused(&["--join", "cut off", "copy the whole line"]);
    join("seeder", &mistyped).refused(&["--join", "mistyped", "copy the whole line"]);
    join("seeder", "").refused(&["--join", "must begin with 'willcall-join:'"]);
    join("seeder", "willcall:AAAA").refused(&["--join", "must begin with 'willcall-join:'"]);
    join("seeder", &format!("@{}", network.path("absent").display())).refused(&["cannot read", "absent"]);
    join("seeder", &merchant).refused(&["no invitation for a seeder", "operator"]);
    join("seeder", &client).refused(&["no invitation for a seeder", "operator"]);
    join("merchant", &seeder).refused(&["no invitation for a merchant", "operator"]);
    assert!(!network.path("joining").join("key").exists(), "nothing is made of a line that is wrong");
    let none = |more: Vec<std::ffi::OsString>| {
        let init = args!["seeder", "init", "--dir", network.path("none"), "--name", "x", "--join", &seeder];
        run([init, more].concat())
    };
    let says = ["capacity must not be 0: say how much disk space is offered, such as 500GB"];
    none(args!["--capacity", "0"]).refused(&says);
    none(args!["--capacity", "1GB", "--set", "capacity=0"]).refused(&["none/config.toml: ", says[0]]);
    let config = network.path("none/config.toml");
    let text = fs::read_to_string(&config).unwrap().replace("capacity = 1000000000", "capacity = 0");
    fs::write(&config, text).unwrap();
    run(args!["seeder", "run", "--dir", network.path("none")]).refused(&["none/config.toml: ", says[0]]);
    // Line breaks of a mail program are no mistake.
    join("seeder", &format!(" {}\n  {}\n", &seeder[..50], &seeder[50..])).ok();
    // Wrong usage has an exit code of its own, and is an object for tools, too.
    for wrong in [args!["bogus"], args!["buy"], args!["seeder", "init", "--capacity", "lots"]] {
        let said = run_plain(wrong.clone());
        assert_eq!((said.status.code(), said.stdout.as_str()), (Some(2), ""), "{}", said.stderr);
        let said = run(wrong);
        assert_eq!(said.status.code(), Some(2));
        assert_eq!(said.json()["ok"], false);
        assert!(!said.json()["error"]["message"].as_str().unwrap().contains('\n'), "{}", said.stdout);
    }
    assert!(run_plain(args!["--version"]).status.success());
}

/// One HTTP request with a JSON body; the status and the body that came back.
fn post(shop: &str, key: Option<&str>, body: &Value) -> (u16, Value) {
    let address = shop.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let (body, key) = (body.to_string(), key.map(|key| format!("Idempotency-Key: {key}\r\n")).unwrap_or_default());
    write!(
        stream,
        "POST /v1/purchases HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\n{key}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
}

#[test]
fn purchases_and_tickets() {
    let network = Network::start(1);
    let file = network.path("song");
    fs::write(&file, b"la la la").unwrap();
    let product = network.publish(&file, &[]);
    let (shop, id) = (network.shop(), text(&product, "product"));
    let absent = "01a2039f-dcb5-7c00-999f-51e0bc802309";
    let peer = text(&run(args!["id", "--home", network.path("home")]).ok(), "peer");

    // Over HTTP: a status and a name for programs, a line for people.
    let order = |product: &str, client: &str, code: &str| json!({"product": product, "client": client, "payment": {"provider": "prepaid", "token": code}});
    let good = order(&id, &peer, &network.voucher);
    let refused = |key: Option<&str>, body: &Value, status: u16, name: &str| {
        let (code, answer) = post(&shop, key, body);
        assert_eq!((code, answer["error"]["code"].as_str()), (status, Some(name)), "{answer}");
        answer["error"]["message"].as_str().unwrap().to_owned()
    };
    let small = network.of("merchant", args!["vouchers", "issue", "10.00", "--currency", "USD"]).ok();
    let small = small["codes"][0].as_str().unwrap().to_owned();
    refused(None, &good, 400, "missing-idempotency-key");
    assert!(refused(Some("a"), &order(absent, &peer, &small), 404, "unknown-product").contains(absent));
    let why = refused(Some("b"), &order(&id, "12D3KooWabc", &small), 400, "invalid-client");
    assert!(why.contains("12D3KooWabc") && why.contains("it is cut off"), "{why}");
    let rsa = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N";
    assert!(refused(Some("b2"), &order(&id, rsa, &small), 400, "invalid-client").contains("not an Ed25519 peer ID"));
    let (status, first) = post(&shop, Some("c"), &order(&id, &peer, &small));
    assert_eq!((status, first["state"].as_str()), (201, Some("released")), "{first}");
    assert_eq!(
        post(&shop, Some("c"), &order(&id, &peer, &small)),
        (201, first),
        "a repeated key gives the first answer"
    );
    let why = refused(Some("d"), &order(&id, &peer, &small), 402, "payment-declined");
    assert!(why.contains("0.01"), "says what is left: {why}");
    refused(Some("c"), &good, 422, "idempotency-conflict");

    // By the client's commands.
    let buy = |product: &str, shop: &str, code: &str, more: &[&str]| {
        let buy = args!["buy", product, "--merchant", shop, "--voucher", code, "--home", network.path("home")];
        run([buy, more.iter().map(std::ffi::OsString::from).collect()].concat())
    };
    buy(absent, &shop, &network.voucher, &[]).refused(&["unknown-product", absent]);
    buy(&id, &shop, "AAAA-BBBB", &[]).refused(&["payment-declined", "27 letters"]);
    buy(&id, &shop, &small, &["--idempotency-key", "e"]).refused(&["payment-declined"]);
    buy(&id, &shop, &network.voucher, &["--idempotency-key", "c"]).refused(&["idempotency-conflict", "new"]);
    buy(&id, "nonsense", &small, &[]).refused(&["'nonsense'", "https://shop.example/"]);
    buy(&id, "http://127.0.0.1:1", &small, &[]).refused(&["127.0.0.1:1", "not pay twice"]);

    // A ticket that would have no place is not paid for.
    let orders = || network.of("merchant", args!["orders"]).ok()["orders"].as_array().unwrap().len();
    let before = orders();
    let places = [("none/ticket", "there is no folder"), ("manager", "is a folder"), ("song/x", "not a folder")];
    // The last one is a folder in which nobody makes files.
    for (place, why) in places.into_iter().chain([("/proc/ticket", "")]) {
        let place = network.path(place).display().to_string();
        buy(&id, &shop, &network.voucher, &["-o", &place]).refused(&["cannot write", &place, why]);
    }
    assert_eq!(orders(), before);
    // Nor is one paid for twice that was bought, and of which the buyer could not be told.
    let buying = network.buying(&product, "unheard");
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let unheard = program(&buying).stdout(full).output().unwrap();
    assert!(!unheard.status.success(), "{}", String::from_utf8_lossy(&unheard.stderr));
    assert_eq!(orders(), before + 1);
    run(buying).ok();
    assert_eq!(orders(), before + 1);

    let bought = network.buy(&product, "client");
    let fetch = |ticket: &std::ffi::OsStr, home: &str| {
        run(args!["fetch", ticket, "--home", network.path(home), "-o", network.path("out")])
    };
    let line = bought.ticket.as_os_str();
    fetch(line, "stranger").refused(&[
        "is for",
        &peer_of(&network, "client"),
        &peer_of(&network, "stranger"),
        "fetch it there",
    ]);
    fetch("willcall:AAAA".as_ref(), "client").refused(&["not a ticket", "cut off", "copy the whole line"]);
    fetch("willcall:!".as_ref(), "client").refused(&["not a ticket", "copy the whole line"]);
    fetch(network.path("absent.ticket").as_os_str(), "client").refused(&["cannot read the ticket", "absent.ticket"]);
    fetch(absent.as_ref(), "client").refused(&[absent, "neither in the library nor in the mailbox"]);
    let cut = network.path("cut.ticket");
    let whole = fs::read(&bought.ticket).unwrap();
    fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    fetch(cut.as_os_str(), "client").refused(&["cut.ticket", "cut off", "copy it again"]);
    for position in [20, whole.len() / 3, whole.len() / 2, whole.len() - 3] {
        let mut damaged = whole.clone();
        damaged[position] ^= 1;
        fs::write(&cut, damaged).unwrap();
        // Whatever the byte meant: no panic, one line. (It may hit an address, which is not signed.)
        let said =
            run(args!["fetch", &cut, "--home", network.path("client"), "-o", network.path("y"), "--patience", "2s"]);
        assert!(!said.stderr.contains("panicked") && said.stderr.lines().count() <= 1, "{}", said.stderr);
    }
    // No files at all: one of them never ends, the other never begins.
    fetch("/dev/zero".as_ref(), "client").refused(&["/dev/zero", "it is not a file"]);
    let fifo = network.path("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
    fetch(fifo.as_os_str(), "client").refused(&["fifo", "it is not a file"]);
    // Names that no answer and no settings could hold.
    let odd = std::ffi::OsString::from_vec([network.path("odd").into_os_string().into_vec(), vec![0xff]].concat());
    for command in [args!["manager", "init", "--dir", &odd], args!["demo", &odd], args!["id", "--home", &odd]] {
        run(command).refused(&["odd", "not UTF-8"]);
    }
    assert!(!Path::new(&odd).exists());
    run(args!["verify", network.path("nowhere"), "--home", network.path("client")]).refused(&[
        "nowhere",
        "was delivered to this home",
        "give the path",
    ]);
    // Nothing came on standard input; and no home is made of a name that is wrong.
    fetch("-".as_ref(), "client").refused(&["standard input", "not a ticket", "willcall:"]);
    for command in ["status", "limit"] {
        run(args![command, "--home", network.path("typo")]).refused(&["no home", "typo", "willcall id"]);
    }
    assert!(!network.path("typo").exists());
    let limit = args!["limit", "--home", network.path("client"), "--download", "1MB"];
    run(limit).refused(&["nothing is being fetched", "--limit", "config.toml"]);
    let crawl = args!["limit", "--home", network.path("client"), "--download", "15kB"];
    assert!(run_plain(crawl).stderr.contains("give 16kB"));
    let (_, arrived) = bought.fetch(&network.path("out"));
    assert_eq!(fs::read(arrived).unwrap(), b"la la la");
    network.of("manager", args!["transaction", absent]).refused(&["no transaction", absent]);
    network.of("merchant", args!["refund", "nonsense"]).refused(&["nonsense", "order"]);
    network.assert_books();
}

fn peer_of(network: &Network, home: &str) -> String {
    text(&run(args!["id", "--home", network.path(home)]).ok(), "peer")
}
