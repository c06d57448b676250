//! A network of real processes in a temporary folder, set up by the commands that a user types, and gone with the test
//! that made it, however that ends.

mod files;
mod netns;
mod process;
mod upnp;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

pub(crate) use files::{bytes, same};
pub(crate) use netns::{Carried, Lab, Machine, Nat, SlowCable};
pub(crate) use process::{Daemon, Finished, Job, crash_file, inside, processes_naming, program};
pub(crate) use upnp::PortService;

/// For everything that happens by itself: far more than it takes, on a machine with other work.
pub(crate) const LIMIT: Duration = Duration::from_secs(180);

/// Arguments from anything that is text or a path.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { vec![$(std::ffi::OsString::from($arg)),*] };
}
pub(crate) use args;

/// Loopback only, ports chosen by the system.
pub(crate) const LISTEN: [&str; 4] = ["--listen", "/ip4/127.0.0.1/tcp/0", "--listen", "/ip4/127.0.0.1/udp/0/quic-v1"];

/// A manager, a merchant and seeders that run.
pub(crate) struct Network {
    /// Stops when this is dropped; first, so that nobody writes into the folder while it is removed.
    pub(crate) daemons: BTreeMap<String, Daemon>,
    pub(crate) seeders: usize,
    /// A code that pays for many purchases.
    pub(crate) voucher: String,
    dir: TempDir,
}

/// Settings of each role beyond the defaults, `key=value`.
#[derive(Clone, Copy, Default)]
pub(crate) struct Settings<'a> {
    pub(crate) manager: &'a [&'a str],
    pub(crate) merchant: &'a [&'a str],
    pub(crate) seeder: &'a [&'a str],
}

/// A purchase with its ticket.
pub(crate) struct Bought {
    pub(crate) transaction: String,
    pub(crate) ticket: PathBuf,
    pub(crate) home: PathBuf,
}

impl Network {
    /// A folder for nodes that a test sets up itself.
    pub(crate) fn empty() -> Network {
        // `WILLCALL_TEST_KEEP=1` keeps the folders, with all logs, for whoever looks into a failure.
        let keep = std::env::var_os("WILLCALL_TEST_KEEP").is_some();
        let dir = tempfile::Builder::new().prefix("willcall-test-").disable_cleanup(keep).tempdir().unwrap();
        Network { daemons: BTreeMap::new(), seeders: 0, voucher: String::new(), dir }
    }

    /// Sets up and starts everything.
    pub(crate) fn start(seeders: usize) -> Network {
        Network::start_with(seeders, seeders)
    }

    /// The same, where more or fewer copies are wanted than there are seeders yet.
    pub(crate) fn start_with(seeders: usize, copies: usize) -> Network {
        Network::start_set(seeders, copies, Settings::default())
    }

    /// The same, with settings.
    pub(crate) fn start_set(seeders: usize, copies: usize, settings: Settings<'_>) -> Network {
        let set = |settings: &[&str]| -> Vec<OsString> {
            settings.iter().flat_map(|setting| args!["--set", *setting]).collect()
        };
        let mut network = Network { seeders, ..Network::empty() };
        let mut init = args!["init", "--set", format!("copies={copies}")];
        init.extend(set(settings.manager));
        init.extend(LISTEN.map(OsString::from));
        network.of("manager", init).ok();
        network.run_role("manager");
        let mut init = args!["init", "--name", "Shop", "--http", "127.0.0.1:0", "--join", network.invite("merchant")];
        init.extend(set(settings.merchant));
        init.extend(LISTEN.map(OsString::from));
        network.of("merchant", init).ok();
        network.run_role("merchant");
        for number in 1..=seeders {
            network.add_seeder(&format!("seeder-{number}"), settings.seeder);
        }
        network.issue_voucher();
        network
    }

    /// Has the merchant issue the voucher that all purchases are paid with.
    pub(crate) fn issue_voucher(&mut self) {
        let issued = self.of("merchant", args!["vouchers", "issue", "1000.00", "--currency", "USD"]).ok();
        self.voucher = issued["codes"][0].as_str().unwrap().to_owned();
    }

    /// Makes and starts one more seeder.
    pub(crate) fn add_seeder(&mut self, name: &str, settings: &[&str]) {
        let mut init = args!["init", "--name", name, "--capacity", "64GiB", "--join", self.invite("seeder")];
        for setting in ["report-ms=1000"].iter().chain(settings) {
            init.extend(args!["--set", *setting]);
        }
        init.extend(LISTEN.map(OsString::from));
        self.of(name, init).ok();
        self.run_role(name);
    }

    /// A path in the network's folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A line to join by.
    pub(crate) fn invite(&self, role: &str) -> String {
        text(&self.of("manager", args!["invite", role]).ok(), "join")
    }

    /// A node's command: `manager …`, `merchant …`, or `seeder …` for the seeder of that name.
    pub(crate) fn of(&self, node: &str, args: Vec<OsString>) -> Finished {
        run(self.command_of(node, args))
    }

    /// The same as a person gives it.
    pub(crate) fn of_plain(&self, node: &str, args: Vec<OsString>) -> Finished {
        run_plain(self.command_of(node, args))
    }

    fn command_of(&self, node: &str, mut args: Vec<OsString>) -> Vec<OsString> {
        let role = if node.starts_with("seeder") { "seeder" } else { node };
        args.insert(0, role.into());
        args.extend(args!["--dir", self.path(node)]);
        args
    }

    /// Starts a node that was set up, and waits until it is ready.
    pub(crate) fn run_role(&mut self, node: &str) {
        let role = if node.starts_with("seeder") { "seeder" } else { node };
        let daemon = Daemon::start(role, &self.path(node), &self.path(&format!("{node}.log")));
        self.daemons.insert(node.to_owned(), daemon);
    }

    /// Starts a node again without waiting until it is ready, because it may be meant to die before; says so through the
    /// channel. Where it answers stays as it was.
    pub(crate) fn relaunch(&mut self, node: &str) -> Receiver<String> {
        let role = if node.starts_with("seeder") { "seeder" } else { node };
        let (mut daemon, said) = Daemon::launch(role, &self.path(node), &self.path(&format!("{node}.log")));
        if let Some(before) = self.daemons.remove(node) {
            daemon.ready.clone_from(&before.ready);
        }
        self.daemons.insert(node.to_owned(), daemon);
        said
    }

    /// Changes a setting; it counts from the node's next start on.
    pub(crate) fn set(&self, node: &str, key: &str, value: u64) {
        let path = self.path(node).join("config.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with(&format!("{key} =")));
        let text: String =
            std::iter::once(format!("{key} = {value}\n")).chain(lines.map(|l| format!("{l}\n"))).collect();
        std::fs::write(path, text).unwrap();
    }

    /// As if its power was cut; then it is started again.
    pub(crate) fn crash(&mut self, node: &str) {
        self.daemons.remove(node).expect("it runs").kill();
        self.run_role(node);
    }

    /// Peer IDs of the seeders in a node's process: the manager's is the origin, a client's or merchant's none.
    pub(crate) fn seeders_in(&self, node: &str) -> Vec<String> {
        let seeders = self.of("manager", args!["seeders"]).ok();
        let name = if node == "manager" { "origin" } else { node };
        let seeders = seeders["seeders"].as_array().unwrap().iter().filter(|s| s["name"] == name);
        seeders.map(|s| text(s, "peer")).collect()
    }

    /// Publishes, and waits until every seeder holds it.
    pub(crate) fn publish(&self, path: &Path, more: &[&str]) -> Value {
        let mut publish = args!["publish", path, "--title", "Goods", "--price", "9.99", "--currency", "USD"];
        publish.extend(args!["--share", "Author=60"]);
        for (flag, value) in [("--rate", "1000000"), ("--chunk-size", "64KiB")] {
            if !more.contains(&flag) {
                publish.extend(args![flag, value]);
            }
        }
        publish.extend(more.iter().map(OsString::from));
        let product = self.of("manager", publish).ok();
        let id = text(&product, "product");
        until("the copies at the seeders", || {
            let shown = self.of("manager", args!["product", &id]).ok();
            (shown["holders"].as_array().unwrap().len() > self.seeders).then_some(())
        });
        product
    }

    /// The shop's address.
    pub(crate) fn shop(&self) -> String {
        text(&self.daemons["merchant"].ready, "http")
    }

    /// The command that buys `product` for the home `client`.
    pub(crate) fn buying(&self, product: &Value, client: &str) -> Vec<OsString> {
        let mut buy = args!["buy", text(product, "product"), "--merchant", self.shop()];
        buy.extend(args!["--voucher", &self.voucher, "--home", self.path(client)]);
        buy
    }

    /// Buys for the home `client`.
    pub(crate) fn buy(&self, product: &Value, client: &str) -> Bought {
        let ticket = self.path(&format!("{client}.ticket"));
        let mut buy = self.buying(product, client);
        buy.extend(args!["-o", &ticket]);
        let transaction = text(&run(buy).ok(), "transaction");
        Bought { transaction, ticket, home: self.path(client) }
    }

    /// The transaction as the manager sees it.
    pub(crate) fn transaction(&self, id: &str) -> Value {
        self.of("manager", args!["transaction", id]).ok()
    }

    /// Waits until the transaction is settled: all money has moved.
    pub(crate) fn settled(&self, id: &str) -> Value {
        until("the settlement", || Some(self.transaction(id)).filter(|t| t["state"] == "settled"))
    }

    /// Every posting sums to zero, and so do the books.
    pub(crate) fn assert_books(&self) {
        let books = self.of("manager", args!["ledger"]).ok();
        for posting in books["postings"].as_array().unwrap() {
            let entries = posting["entries"].as_array().unwrap();
            assert_eq!(entries.iter().map(|e| e["minor"].as_i64().unwrap()).sum::<i64>(), 0, "{posting}");
        }
        let trial = books["trial_balance"].as_array().unwrap();
        assert!(!trial.is_empty() && trial.iter().all(|t| t["balanced"] == true), "{books}");
    }
}

impl Bought {
    /// The command that fetches it into `out`.
    pub(crate) fn fetching(&self, out: &Path) -> Vec<OsString> {
        args!["fetch", &self.ticket, "--home", &self.home, "-o", out]
    }

    /// Fetches it into `out`; gives the answer and where the goods are.
    pub(crate) fn fetch(&self, out: &Path) -> (Value, PathBuf) {
        let answer = run(self.fetching(out)).ok();
        let path = PathBuf::from(text(&answer, "path"));
        (answer, path)
    }
}

/// Runs a command to its end, with `--json`.
pub(crate) fn run(args: Vec<OsString>) -> Finished {
    Job::start(args).finish()
}

/// Runs a command to its end as a person would.
pub(crate) fn run_plain(args: Vec<OsString>) -> Finished {
    Job::start_plain(args).finish()
}

/// A text field.
pub(crate) fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_else(|| panic!("no text '{name}' in {value}")).to_owned()
}

/// Looks again and again until something is so.
pub(crate) fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    until_within(what, LIMIT, look)
}

/// The same with a limit of its own.
pub(crate) fn until_within<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < limit, "{what} did not happen in {} s", limit.as_secs());
        // The pace of looking, not a guess at how long it takes.
        std::thread::sleep(Duration::from_millis(50));
    }
}
