//! Every durable step of a sale, and on both sides of it a process that dies there and is started again. Afterwards each
//! sale has ended as it should: goods are what was sold, money and chunks are counted once, and the books balance.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use store::Step;

use super::support::{
    Daemon, Job, Network, Settings, args, bytes, crash_file, program, run, same, text, until, until_within,
};

/// A process that does not come to a step within this time never will.
const PATIENCE: Duration = Duration::from_secs(60);
/// Three chunks of 64 KiB.
const SIZE: usize = 150_000;
const PRICE: i64 = 999;
const SIDES: [&str; 2] = ["before", "after"];

/// Which test kills at which steps; together they are all of them.
const OF_MANAGER: [Step; 12] = [
    Step::ManagerReserve,
    Step::ManagerRelease,
    Step::ManagerCount,
    Step::ManagerRenew,
    Step::ManagerComplete,
    Step::ManagerGrant,
    Step::ManagerRefund,
    Step::ManagerRevocation,
    Step::ManagerAnnounced,
    Step::ManagerStatement,
    Step::ManagerPayment,
    Step::ManagerClose,
];
const OF_EXPIRY: [Step; 4] = [Step::ManagerExpire, Step::MerchantVoiding, Step::MerchantVoid, Step::MerchantEnded];
const OF_MERCHANT: [Step; 12] = [
    Step::MerchantOrder,
    Step::MerchantHold,
    Step::MerchantAuthorised,
    Step::MerchantReserved,
    Step::MerchantReleased,
    Step::MerchantCapture,
    Step::MerchantDone,
    Step::MerchantAnswer,
    Step::MerchantAwaiting,
    Step::MerchantCompleted,
    Step::MerchantRefunding,
    Step::MerchantRefund,
];
const OF_SEEDER: [Step; 7] = [
    Step::SeederNoted,
    Step::SeederAcknowledged,
    Step::SeederClosed,
    Step::SeederBatch,
    Step::SeederMark,
    Step::SeederStatement,
    Step::SeederRestored,
];
const OF_CLIENT: [Step; 15] = [
    Step::ClientAttempt,
    Step::ClientTicket,
    Step::ClientBought,
    Step::ContentMade,
    Step::ClientLaidOut,
    Step::ContentNoted,
    Step::ContentWhole,
    Step::ClientFetched,
    Step::ClientKey,
    Step::ClientUnpacked,
    Step::ClientPlacing,
    Step::ClientKeptAside,
    Step::ClientMerged,
    Step::ClientPlaced,
    Step::ClientDone,
];

/// How a sale is to stand in the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Settled,
    Refunded,
    Expired,
}

/// A purchase under way, by paths and words alone, so that a thread of its own can drive it while nodes come and go.
#[derive(Clone)]
struct Buyer {
    buying: Vec<OsString>,
    fetching: Vec<OsString>,
    out: PathBuf,
}

impl Buyer {
    /// Buys, again and again under one idempotency key, until the shop has sold.
    fn buy(&self) -> String {
        until("a purchase", || {
            let bought = run(self.buying.clone());
            bought.status.success().then(|| text(&bought.json(), "transaction"))
        })
    }

    /// Fetches until the goods are there.
    fn fetch(&self) -> Value {
        until("a delivery", || {
            let fetched = run(self.fetching.clone());
            fetched.status.success().then(|| fetched.json())
        })
    }
}

struct Matrix {
    network: Network,
    goods: PathBuf,
    /// Products by policy.
    at_release: Value,
    on_completion: Value,
    buyers: usize,
    sales: Vec<(String, End)>,
    /// Bytes of the content of sales of another product, by transaction.
    others: BTreeMap<String, u64>,
    killed: Vec<String>,
}

impl Matrix {
    fn start() -> Matrix {
        let settings = Settings {
            manager: &["sales-ms=100", "close-grace-ms=3000", "heartbeat-ms=1000"],
            merchant: &["orders-ms=100", "status-ms=200", "retry-min-ms=50", "retry-max-ms=500", "call-ms=2000"],
            seeder: &[
                "retry-ms=100",
                "receipt-batch-ms=50",
                "receipt-direct-ms=200",
                "call-ms=2000",
                "heartbeat-silence-ms=2000",
            ],
        };
        let network = Network::start_set(1, 1, settings);
        let goods = network.path("goods.bin");
        fs::write(&goods, bytes(7, SIZE)).unwrap();
        let at_release = network.publish(&goods, &[]);
        let on_completion = network.publish(&goods, &["--policy", "on-completion"]);
        Matrix {
            network,
            goods,
            at_release,
            on_completion,
            buyers: 0,
            sales: Vec::new(),
            others: BTreeMap::new(),
            killed: Vec::new(),
        }
    }

    fn buyer(&mut self, product: &Value) -> Buyer {
        let client = format!("client-{}", self.buyers + 1);
        self.buyer_of(product, &client)
    }

    /// A further purchase for a client's home.
    fn buyer_of(&mut self, product: &Value, client: &str) -> Buyer {
        self.buyers += 1;
        let (ticket, out) =
            (self.network.path(&format!("{}.ticket", self.buyers)), self.network.path(&format!("out-{}", self.buyers)));
        let mut buying = self.network.buying(product, client);
        buying.extend(args!["-o", &ticket]);
        let fetching = args!["fetch", &ticket, "--home", self.network.path(client), "-o", &out];
        Buyer { buying, fetching, out }
    }

    /// Does `work` while `node` dies at both sides of each step, in this order, and is started again each time. `work`
    /// can ask whether that is over.
    fn through<R: Send>(&mut self, node: &str, steps: &[Step], work: impl FnOnce(&AtomicBool) -> R + Send) -> R {
        let file = crash_file(&self.network.path(node));
        let mut points = steps.iter().flat_map(|step| SIDES.map(|side| format!("{} {side}", step.name())));
        let tell = |point: &Option<String>| point.as_ref().map(|point| fs::write(&file, point).unwrap());
        let over = AtomicBool::new(steps.is_empty());
        let mut next = points.next();
        tell(&next);
        let running = self.network.daemons.contains_key(node);
        let mut ready = (!running).then(|| self.network.relaunch(node));
        thread::scope(|scope| {
            let work = scope.spawn(|| work(&over));
            while let Some(point) = next {
                let began = Instant::now();
                let dead = || (!self.network.daemons.get_mut(node).unwrap().is_running()).then_some(());
                until_within(&format!("the end of {node} {point}"), PATIENCE, dead);
                assert!(!file.exists(), "{node} died, but not {point}");
                println!("{node} {point} {:.1} s", began.elapsed().as_secs_f64());
                self.killed.push(point);
                next = points.next();
                tell(&next);
                ready = Some(self.network.relaunch(node));
            }
            if let Some(ready) = ready {
                ready.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{node} is not ready"));
            }
            over.store(true, Ordering::Release);
            work.join().unwrap()
        })
    }

    /// A whole sale, with `node` dying on the way.
    fn sale(&mut self, product: &Value, node: &str, steps: &[Step]) -> (Buyer, String) {
        let buyer = self.buyer(product);
        let driven = buyer.clone();
        let id = self.through(node, steps, move |_| {
            let id = driven.buy();
            driven.fetch();
            id
        });
        same(&self.goods, &buyer.out.join("goods.bin"));
        self.sales.push((id.clone(), End::Settled));
        (buyer, id)
    }

    /// A command of a node, until it succeeds.
    fn repeat(&self, node: &str, args: Vec<OsString>) -> impl FnOnce(&AtomicBool) -> Value + Send + use<> {
        let mut command = args!(node.split('-').next().unwrap());
        command.extend(args);
        command.extend(args!["--dir", self.network.path(node)]);
        move |_| {
            until(&format!("{command:?}"), || {
                let done = run(command.clone());
                done.status.success().then(|| done.json())
            })
        }
    }

    fn order(&self, transaction: &str) -> String {
        text(&self.network.transaction(transaction), "order")
    }

    /// Everything that has to hold in the end.
    fn finish(self, steps: &[Step]) {
        let (network, usual) = (&self.network, self.at_release["content_bytes"].as_u64().unwrap());
        let (mut taken, mut open) = (0, Vec::new());
        for (id, end) in &self.sales {
            let (state, stage) = match end {
                End::Settled => ("settled", "done"),
                End::Refunded => ("refunded", "refunded"),
                End::Expired => ("expired", "expired"),
            };
            let shown = until(&format!("{id} being {state}"), || {
                Some(network.transaction(id)).filter(|shown| shown["state"] == state)
            });
            let postings = shown["postings"].as_array().unwrap();
            let keys: BTreeSet<&str> = postings.iter().map(|posting| posting["key"].as_str().unwrap()).collect();
            assert_eq!(keys.len(), postings.len(), "a posting twice: {shown}");
            let captures = keys.iter().filter(|key| key.starts_with("capture:")).count();
            assert!(captures <= 1 && (*end != End::Settled || captures == 1), "{shown}");
            let content = self.others.get(id).copied().unwrap_or(usual);
            for delivery in shown["deliveries"].as_array().unwrap() {
                let paid: u64 =
                    delivery["seeders"].as_array().unwrap().iter().map(|s| s["paid_bytes"].as_u64().unwrap()).sum();
                assert!(paid <= content && (delivery["whole"] == true) == (paid == content), "{delivery}");
            }
            taken += i64::from(*end == End::Settled) * PRICE;
            open.push((text(&shown, "order"), stage));
        }
        for (order, stage) in open {
            until(&format!("order {order} being {stage}"), || {
                (network.of("merchant", args!["order", &order]).ok()["stage"] == stage).then_some(())
            });
        }
        // At the shop: what was spent is what was sold, and nothing is held.
        let vouchers = network.of("merchant", args!["vouchers", "list"]).ok();
        let sum = |name: &str| -> i64 {
            vouchers["vouchers"].as_array().unwrap().iter().map(|v| v[name].as_i64().unwrap()).sum()
        };
        assert_eq!((sum("spent"), sum("held"), sum("available")), (taken, 0, 100_000 - taken), "{vouchers}");
        network.assert_books();

        let wanted: Vec<String> =
            steps.iter().flat_map(|step| SIDES.map(|side| format!("{} {side}", step.name()))).collect();
        let killed: BTreeSet<&String> = self.killed.iter().collect();
        assert_eq!(killed, wanted.iter().collect());
        println!("{} crashes in {} sales: {}", self.killed.len(), self.sales.len(), self.killed.join(", "));
    }
}

#[test]
fn the_steps_killed_at_are_all_there_are() {
    let all: Vec<Step> = [&OF_MANAGER[..], &OF_EXPIRY, &OF_MERCHANT, &OF_SEEDER, &OF_CLIENT].concat();
    let names = |steps: &[Step]| steps.iter().map(|step| step.name()).collect::<BTreeSet<_>>();
    assert_eq!(names(&all), names(Step::ALL));
    assert_eq!(all.len(), Step::ALL.len());
}

#[test]
fn the_manager_dies_at_every_step() {
    use Step::*;
    let mut matrix = Matrix::start();
    let (at_release, on_completion) = (matrix.at_release.clone(), matrix.on_completion.clone());
    let manager = "manager";
    matrix.sale(&at_release, manager, &[ManagerReserve, ManagerRelease, ManagerCount]);
    // Two, because a client waits longer after each failure.
    matrix.sale(&on_completion, manager, &[ManagerComplete]);
    matrix.sale(&on_completion, manager, &[ManagerGrant]);

    // A sale that is settled in peace is downloaded again, which takes a new lease.
    let (buyer, id) = matrix.sale(&at_release, manager, &[]);
    matrix.network.settled(&id);
    let (fetching, out) = (buyer.fetching.clone(), buyer.out.clone());
    matrix.through(manager, &[ManagerRenew], |over| {
        // While the manager is away the old lease does; so each time into another folder.
        for number in 1.. {
            let mut again = fetching.clone();
            *again.last_mut().unwrap() = out.join(number.to_string()).into();
            run(again);
            if over.load(Ordering::Acquire) {
                return;
            }
        }
    });

    // Taken back after all of it was settled.
    let (_, id) = matrix.sale(&at_release, manager, &[]);
    matrix.sales.last_mut().unwrap().1 = End::Refunded;
    let refund = matrix.repeat("merchant", args!["refund", matrix.order(&id)]);
    matrix.through(manager, &[ManagerRefund, ManagerRevocation, ManagerAnnounced], refund);

    let statements = matrix.repeat(manager, args!["statements", "make"]);
    matrix.through(manager, &[ManagerStatement], statements);
    let merchant = text(&matrix.network.transaction(&id), "merchant");
    let mut payment = args!["manager", "payment", "merchant-due", merchant, "0.01", "--currency", "USD"];
    payment.extend(args!["--reference", "one"]);
    payment.extend(args!["--dir", matrix.network.path(manager)]);
    matrix.through(manager, &[ManagerPayment], |_| {
        until("a payment in the books", || {
            let paid = run(payment.clone());
            (paid.status.success() || paid.stderr.contains("in the books already")).then_some(())
        });
    });

    // Nobody fetches it: the payment goes back by itself.
    let brief = matrix.network.publish(&matrix.goods, &["--policy", "on-completion", "--lease", "500ms"]);
    let buyer = matrix.buyer(&brief);
    let id = matrix.through(manager, &[ManagerClose], |_| buyer.buy());
    matrix.sales.push((id, End::Refunded));
    matrix.finish(&OF_MANAGER);
}

#[test]
fn both_die_over_a_reservation_that_expires() {
    let mut matrix = Matrix::start();
    let product = matrix.at_release.clone();
    matrix.sale(&product, "merchant", &[]);
    matrix.network.set("manager", "reservation-ms", 300);
    matrix.network.crash("manager");
    // The merchant is gone as soon as the reservation is there.
    let file = crash_file(&matrix.network.path("merchant"));
    fs::write(&file, format!("{} after", Step::MerchantReserved.name())).unwrap();
    let buying = Job::start(matrix.buyer(&product).buying);
    let dead = || (!matrix.network.daemons.get_mut("merchant").unwrap().is_running()).then_some(());
    until("the end of the merchant", dead);
    buying.kill();
    matrix.through("manager", &[Step::ManagerExpire], |_| ());
    let listed = matrix.network.of("manager", args!["transactions"]).ok();
    let id = text(&listed["transactions"][0], "id");
    matrix.sales.push((id, End::Expired));
    matrix.network.daemons.remove("merchant");
    matrix.through("merchant", &[Step::MerchantVoiding, Step::MerchantVoid, Step::MerchantEnded], |_| ());
    matrix.finish(&OF_EXPIRY);
}

#[test]
fn the_merchant_dies_at_every_step() {
    use Step::*;
    let mut matrix = Matrix::start();
    let (at_release, on_completion) = (matrix.at_release.clone(), matrix.on_completion.clone());
    let buying = [
        MerchantOrder,
        MerchantHold,
        MerchantAuthorised,
        MerchantReserved,
        MerchantReleased,
        MerchantCapture,
        MerchantDone,
        MerchantAnswer,
    ];
    matrix.sale(&at_release, "merchant", &buying);
    matrix.sale(&on_completion, "merchant", &[MerchantAwaiting, MerchantCompleted]);
    let (_, id) = matrix.sale(&at_release, "merchant", &[]);
    matrix.sales.last_mut().unwrap().1 = End::Refunded;
    let refund = matrix.repeat("merchant", args!["refund", matrix.order(&id)]);
    matrix.through("merchant", &[MerchantRefunding, MerchantRefund], refund);
    matrix.finish(&OF_MERCHANT);
}

#[test]
fn a_seeder_dies_at_every_step() {
    use Step::*;
    let mut matrix = Matrix::start();
    let product = matrix.at_release.clone();
    // A stream's end is not come to again by itself: each is another delivery's.
    let buyers: Vec<Buyer> = (0..6).map(|_| matrix.buyer(&product)).collect();
    let ended = matrix.through("seeder-1", &[SeederClosed], |over| {
        let sale = |buyer: &Buyer| (buyer.buy(), buyer.fetch()).0;
        let mut sold = Vec::new();
        for buyer in &buyers {
            sold.push((sale(buyer), End::Settled));
            if over.load(Ordering::Acquire) {
                break;
            }
        }
        sold
    });
    matrix.sales.extend(ended);
    // This client knows the network from now on, so that it needs nobody but the seeder for its second purchase.
    matrix.sale(&product, "seeder-1", &[]);
    let known = format!("client-{}", matrix.buyers);
    let buyer = matrix.buyer_of(&product, &known);
    let id = buyer.buy();
    let origin = matrix.network.daemons.remove("manager").unwrap();
    origin.kill();
    matrix.through("seeder-1", &[SeederNoted, SeederAcknowledged, SeederBatch], |_| buyer.fetch());
    same(&matrix.goods, &buyer.out.join("goods.bin"));
    matrix.sales.push((id, End::Settled));

    let (dir, log) = (matrix.network.path("manager"), matrix.network.path("manager.log"));
    let start = |_: &AtomicBool| Daemon::start("manager", &dir, &log);
    let manager = matrix.through("seeder-1", &[SeederMark], start);
    matrix.network.daemons.insert("manager".to_owned(), manager);
    // Made while the seeder is to die over it already: it asks for statements by itself, too.
    let make = matrix.repeat("manager", args!["statements", "make"]);
    let statements = matrix.repeat("seeder-1", args!["statements"]);
    matrix.through("seeder-1", &[SeederStatement], |over| {
        make(over);
        statements(over)
    });

    matrix.network.daemons.remove("manager").unwrap().kill();
    matrix.network.of("manager", args!["restored"]).ok();
    let manager = matrix.through("seeder-1", &[SeederRestored], start);
    matrix.network.daemons.insert("manager".to_owned(), manager);
    matrix.finish(&OF_SEEDER);
}

#[test]
fn a_client_dies_at_every_step() {
    let mut matrix = Matrix::start();
    let (at_release, on_completion) = (matrix.at_release.clone(), matrix.on_completion.clone());
    // These come only where goods are put to others that are there.
    let into = [Step::ClientKeptAside, Step::ClientMerged];
    let first = OF_CLIENT.iter().filter(|step| !into.contains(step));
    let (held_back, rest): (Vec<Step>, Vec<Step>) = first.partition(|step| **step == Step::ClientKey);
    matrix.client_dies(&at_release, &rest);
    matrix.client_dies(&on_completion, &held_back);
    matrix.mending_dies(&into);
    matrix.finish(&OF_CLIENT);
}

impl Matrix {
    /// Buys and fetches, dying at one point after the other. Which comes first depends on how fast chunks come, so a
    /// command that gets through has passed the rest already, and the next sale tries them again.
    fn client_dies(&mut self, product: &Value, steps: &[Step]) {
        let mut points: Vec<String> =
            steps.iter().flat_map(|step| SIDES.map(|side| format!("{} {side}", step.name()))).collect();
        // Until the buyer was told, the same command is for the same purchase; from then on it would be another one.
        let bought = format!("{} after", Step::ClientBought.name());
        let mut sales = 0;
        while !points.is_empty() {
            sales += 1;
            assert!(sales <= 2 * steps.len(), "never came to {points:?}");
            let buyer = self.buyer(product);
            self.command_dies(&buyer.buying, &mut points, &bought, || {
                // Where it died with the ticket in its place, the next try puts it there anew.
                let _ = fs::remove_file(&buyer.fetching[1]);
            });
            let home = self.network.path(&format!("client-{}", self.buyers));
            let status = run(args!["status", "--home", home]).ok();
            assert_eq!(status["deliveries"].as_array().unwrap().len(), 1, "bought more than once: {status}");
            let id = text(&status["deliveries"][0], "transaction");
            let mut fetching = buyer.fetching.clone();
            fetching[1] = id.clone().into();
            self.command_dies(&fetching, &mut points, "", || {});
            same(&self.goods, &buyer.out.join("goods.bin"));
            self.sales.push((id, End::Settled));
        }
    }

    /// Fetches into the folder of an earlier delivery, dying at one point after the other: a part that grows to the whole,
    /// and a whole that is mended. The buyer's own files outlast all of it.
    fn mending_dies(&mut self, steps: &[Step]) {
        let goods = self.network.path("folder");
        fs::create_dir_all(goods.join("sub")).unwrap();
        let names = ["a", "b", "sub/c", "sub/d"];
        for (seed, name) in (20..).zip(names) {
            fs::write(goods.join(name), bytes(seed, SIZE)).unwrap();
        }
        let product = self.network.publish(&goods, &[]);
        let buyer = self.buyer(&product);
        let id = buyer.buy();
        let place = buyer.out.join("folder");
        let mut part = buyer.fetching.clone();
        part.extend(args!["--only", "b"]);
        run(part).ok();
        fs::write(place.join("mine"), "mine").unwrap();
        for whole in [false, true] {
            if whole {
                fs::remove_file(place.join("sub/c")).unwrap();
            }
            fs::create_dir_all(place.join("sub")).unwrap();
            fs::write(place.join("sub/save"), "mine").unwrap();
            fs::write(place.join("b"), "my own").unwrap();
            let points = steps.iter().flat_map(|step| SIDES.map(|side| format!("{} {side}", step.name())));
            for point in points {
                self.command_dies(&buyer.fetching, &mut vec![point.clone()], &point, || {});
                assert!(place.join("mine").exists() && place.join("sub/save").exists(), "{point}");
                for name in names {
                    // Whole, or not there, or the buyer's still.
                    let (sold, now) = (fs::read(goods.join(name)).unwrap(), fs::read(place.join(name)));
                    assert!(now.is_err() || now.is_ok_and(|now| now == sold || now == b"my own"), "{name} {point}");
                }
            }
            let last = run(buyer.fetching.clone()).ok();
            assert_eq!(last["bytes"], 0, "the work folder and the goods had all of it: {last}");
            for name in names {
                same(&goods.join(name), &place.join(name));
            }
            let kept = place.join(if whole { "b.kept-2" } else { "b.kept-1" });
            assert_eq!(fs::read_to_string(kept).unwrap(), "my own");
        }
        self.others.insert(id.clone(), product["content_bytes"].as_u64().unwrap());
        self.sales.push((id, End::Settled));
    }

    /// Repeats a command until it gets through; each time but the last it dies at another point, and no more after it
    /// died at `last`. `again` is done before each try but the first.
    fn command_dies(&mut self, command: &[OsString], points: &mut Vec<String>, last: &str, again: impl Fn()) {
        let file = self.network.path("client.crash");
        for point in points.clone() {
            fs::write(&file, &point).unwrap();
            let done = program(command).env(store::CRASH_FILE, &file).arg("--json").output().unwrap();
            if done.status.success() {
                fs::remove_file(&file).unwrap();
                return;
            }
            assert_eq!(done.status.signal(), Some(9), "{point}: {}", String::from_utf8_lossy(&done.stderr));
            points.retain(|left| *left != point);
            let was_last = point == last;
            self.killed.push(point);
            if was_last {
                return;
            }
            again();
        }
        let done = program(command).arg("--json").output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
}
