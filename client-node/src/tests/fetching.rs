//! Whole fetches over real sockets, and everything that may go wrong with one.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use delivery::StallCause;
use protocol::manifest::KeyPolicy;
use protocol::receipt::DeliveryId;
use protocol::ticket::TicketEnvelope;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::network::{Net, Vice};
use super::world::{Files, PAYLOAD, Sale, World, keypair, listing, noise};
use crate::fetch::{FetchError, FetchOptions, FetchOutcome, FetchPhase, FetchProgress, Target, fetch};
use crate::home::{Home, now_ms};
use crate::inbox::inbox;
use crate::library::DeliveryState;
use crate::link::{LinkOptions, TrustError};
use crate::place::PlaceError;
use crate::running::{AskError, DownloadLimits, LimitChange, limit, progress_of};
use crate::status::status;
use crate::unpack::UnpackError;
use crate::verify::{FileState, VerifyTarget, verify};

/// Longer than any step takes on a busy machine.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

pub(super) struct Client {
    pub(super) home: Home,
    dir: tempfile::TempDir,
}

impl Client {
    pub(super) fn new() -> Client {
        let dir = tempfile::tempdir().unwrap();
        Client { home: Home::open(&dir.path().join("home"), None).unwrap(), dir }
    }

    pub(super) fn out(&self) -> std::path::PathBuf {
        self.dir.path().join("out")
    }

    pub(super) async fn fetch(&self, ticket: &TicketEnvelope) -> Result<FetchOutcome, FetchError> {
        self.fetch_with(Target::Envelope(Box::new(ticket.clone())), options()).await
    }

    pub(super) async fn fetch_with(&self, target: Target, options: FetchOptions) -> Result<FetchOutcome, FetchError> {
        let progress = watch::Sender::new(FetchProgress::default());
        let out = self.out();
        let run = fetch(&self.home, target, &out, options, progress, CancellationToken::new());
        tokio::time::timeout(LIMIT, run).await.expect("it hangs")
    }

    /// What is in the output folder, without what is in the product.
    pub(super) fn names(&self) -> Vec<String> {
        let names = listing(&self.out());
        names.into_iter().filter(|name| !name.contains('/')).collect()
    }
}

pub(super) fn options() -> FetchOptions {
    let mut options = FetchOptions::default();
    options.limits.patience = Duration::from_secs(5);
    options.limits.scheduler.backoff_ms = 20;
    options.limits.scheduler.max_failures = 3;
    options.limits.finish_timeout = Duration::from_secs(2);
    options.manager_patience = Duration::from_secs(20);
    options
}

pub(super) fn album() -> Files {
    Files::folder("An album")
        .file("01.flac", noise(20 * PAYLOAD + 9, 1))
        .dir("art")
        .file("art/cover.png", noise(2 * PAYLOAD, 2))
        .program("art/run", noise(5, 3))
        .link("cover", "art/cover.png")
        .file("last", noise(3 * PAYLOAD, 4))
}

pub(super) async fn net(policy: KeyPolicy, vices: &[Vice]) -> Net {
    let world = World::new();
    let product = world.publish(&album(), policy);
    Net::start(world, product, vices).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_becomes_files_and_nothing_else_is_left() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None, Vice::Corrupts, Vice::None]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    net.manager.tickets.lock().unwrap().push(ticket.clone());
    let outcome = client.fetch(&ticket).await.unwrap();
    album().assert_in(&outcome.path);
    assert_eq!(client.names(), ["An album"]);
    assert_eq!(outcome.bytes, net.product.manifest.length);
    assert_eq!((outcome.files, outcome.state), (4, DeliveryState::Done));
    let sources: u64 = outcome.sources.iter().filter(|source| !source.banned).map(|source| source.bytes).sum();
    assert_eq!(sources, outcome.bytes + outcome.duplicate_bytes);
    assert!(outcome.reported);
    // The one that sent something else was complained of, by the chunk.
    let bad: Vec<_> = outcome.sources.iter().filter_map(|source| Some((source.peer, source.bad_chunk?))).collect();
    assert!(bad.iter().all(|(peer, _)| *peer == net.seeders[1].peer()), "{bad:?}");
    assert_eq!(*net.manager.complaints.lock().unwrap(), bad);
    let completions = net.manager.completions.lock().unwrap().clone();
    completions[0].verify(&client.home.peer_id()).unwrap();
    let delivery = DeliveryId { transaction: net.sale.transaction, delivery: 1 };
    let told = net
        .seeders
        .iter()
        .filter(|s| s.accounts.lock().unwrap().get(&delivery).is_some_and(|account| account.completion.is_some()));
    assert!(told.count() >= 1, "the seeders have the completion, too");

    // Once more: it is there already. Damaged: it is fetched again, and replaced.
    let sent = net.sent();
    assert!(client.fetch(&ticket).await.unwrap().already_here);
    assert_eq!(net.sent(), sent);
    std::fs::write(outcome.path.join("01.flac"), "damaged").unwrap();
    let report = verify(&client.home, VerifyTarget::Path(outcome.path.clone()), |_, _| {}).await.unwrap();
    assert_eq!(report.count(|state| matches!(state, FileState::Damaged(_))), 1);
    let again = client.fetch(&ticket).await.unwrap();
    assert!(!again.already_here);
    album().assert_in(&again.path);
    assert_eq!(client.names(), ["An album"]);
    assert!(verify(&client.home, VerifyTarget::Path(again.path), |_, _| {}).await.unwrap().is_good());
    let all = status(&client.home).await.unwrap();
    assert_eq!((all.len(), all[0].state, all[0].reported), (1, DeliveryState::Done, true));
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_off_second_fetch_leaves_the_first_delivery_as_it_was() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    let first = client.fetch(&ticket).await.unwrap();
    let before = status(&client.home).await.unwrap().remove(0);

    *net.seeders[0].vice.lock().unwrap() = Vice::Stops(net.sent() + 3);
    let (cancel, progress) = (CancellationToken::new(), watch::Sender::new(FetchProgress::default()));
    let mut seen = progress.subscribe();
    let elsewhere = client.dir.path().join("elsewhere");
    let target = Target::Envelope(Box::new(ticket.clone()));
    let run = fetch(&client.home, target, &elsewhere, options(), progress, cancel.clone());
    let stop = async {
        seen.wait_for(|p| p.transfer.have_chunks > 0).await.unwrap();
        let during = status(&client.home).await.unwrap().remove(0);
        cancel.cancel();
        during
    };
    let (ended, during) = tokio::time::timeout(LIMIT, async { tokio::join!(run, stop) }).await.expect("it hangs");
    assert!(matches!(ended.unwrap_err(), FetchError::Cancelled));
    for now in [during, status(&client.home).await.unwrap().remove(0)] {
        let of = |d: &crate::DeliveryStatus| (d.state, d.path.clone(), d.have_bytes, d.total_bytes);
        assert_eq!(of(&now), of(&before));
    }
    let report = verify(&client.home, VerifyTarget::Path(first.path.clone()), |_, _| {}).await.unwrap();
    assert!(report.is_good());
    assert!(client.fetch(&ticket).await.unwrap().already_here);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_goods_wait_for_no_seeder_that_is_gone_and_it_is_told_later() {
    let net = net(KeyPolicy::AtRelease, &[Vice::Mute]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    let mut patient = options();
    patient.limits.finish_timeout = 2 * LIMIT;
    let (progress, mut seen) = watch::channel(FetchProgress::default());
    let (out, target) = (client.out(), Target::Envelope(Box::new(ticket.clone())));
    let run = fetch(&client.home, target, &out, patient, progress, CancellationToken::new());
    let placed = async { seen.wait_for(|progress| progress.phase == FetchPhase::Done).await.map(drop) };
    let first = async {
        tokio::select! {
            ended = run => panic!("the seeder heard nothing yet: {ended:?}"),
            placed = placed => placed.unwrap(),
        }
    };
    // Dropped where it stands, as by a kill.
    tokio::time::timeout(LIMIT, first).await.expect("the goods waited");
    album().assert_in(&out.join("An album"));
    assert_eq!(client.names(), ["An album"]);
    assert_eq!(status(&client.home).await.unwrap()[0].state, DeliveryState::Done);
    let owed = client.home.library().debts(8).unwrap();
    assert_eq!(owed.iter().map(|(_, debt)| debt.seeders.len()).sum::<usize>(), 1);

    *net.seeders[0].vice.lock().unwrap() = Vice::None;
    assert!(client.fetch(&ticket).await.unwrap().already_here);
    let delivery = DeliveryId { transaction: net.sale.transaction, delivery: 1 };
    let account = net.seeders[0].accounts.lock().unwrap().get(&delivery).cloned().unwrap();
    let chunks = account.ack.unwrap().peek().unwrap().chunks.len();
    assert_eq!((chunks, account.completion.is_some()), (net.product.manifest.chunks(), true));
    assert!(client.home.library().debts(8).unwrap().is_empty());
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_fetch_says_how_far_it_is_and_is_told_how_fast_it_may_go() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let (transaction, target) = (net.sale.transaction, net.ticket(client.home.peer_id()));
    let change = LimitChange { transfer: Some(0), process: Some(5_000_000) };
    let error = limit(&client.home, transaction, change).await.unwrap_err();
    assert!(matches!(error, AskError::NotRunning(_)), "{error}");
    assert_eq!(progress_of(&client.home, transaction).await.unwrap(), None);

    // At this rate it would take hours.
    let mut slow = options();
    slow.limits.bytes_per_second = Some(1000);
    let (progress, mut seen) = watch::channel(FetchProgress::default());
    let out = client.out();
    let target = Target::Envelope(Box::new(target));
    let run = fetch(&client.home, target, &out, slow, progress, CancellationToken::new());
    let asking = async {
        seen.wait_for(|progress| progress.transfer.active > 0).await.unwrap();
        let told = progress_of(&client.home, transaction).await.unwrap().unwrap();
        assert_eq!(
            (told["phase"].as_str(), told["transfer"]["active"].as_u64()),
            (Some("fetching"), Some(1)),
            "{told}"
        );
        // A second one comes in its way, and leaves no trace.
        let second = client.fetch_with(Target::Transaction(transaction), options()).await.unwrap_err();
        assert!(matches!(second, FetchError::Running { .. }), "{second}");
        assert_eq!(status(&client.home).await.unwrap()[0].trouble, None);
        let none = LimitChange::default();
        let before = limit(&client.home, transaction, none).await.unwrap();
        assert_eq!(before, DownloadLimits { process: 0, transfer: 1000 });
        let now = limit(&client.home, transaction, change).await.unwrap();
        assert_eq!(now, DownloadLimits { process: 5_000_000, transfer: 0 });
    };
    let (outcome, ()) = tokio::time::timeout(LIMIT, async { tokio::join!(run, asking) }).await.expect("it hangs");
    album().assert_in(&outcome.unwrap().path);
    assert_eq!(progress_of(&client.home, transaction).await.unwrap(), None);
    net.stop().await;
}

#[tokio::test]
async fn a_fetch_that_is_stopped_holds_up_nobody_who_asks() {
    let client = Client::new();
    let transaction = Sale::new(Vec::new(), Vec::new()).transaction;
    let (supervisor, dir) = (node::Supervisor::new(), client.home.delivery_dir(&transaction));
    std::fs::create_dir_all(&dir).unwrap();
    // Connected to, and asked, as a process is that gets no time.
    let stopped = node::ControlServer::start(&supervisor, &dir, |_, _| std::future::pending()).await.unwrap();
    let asked = async {
        assert!(matches!(progress_of(&client.home, transaction).await, Err(AskError::Silent(_))));
        assert!(matches!(limit(&client.home, transaction, LimitChange::default()).await, Err(AskError::Silent(_))));
    };
    tokio::time::timeout(LIMIT, asked).await.expect("it hangs");
    drop(stopped);
    supervisor.shutdown(LIMIT).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_off_fetch_goes_on_where_it_was_without_a_manager() {
    let net = net(KeyPolicy::AtRelease, &[Vice::Stops(10)]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    let error = client.fetch(&ticket).await.unwrap_err();
    assert_eq!(error.cause(), "overloaded", "{error}");
    let all = status(&client.home).await.unwrap();
    assert_eq!(
        (all[0].state, all[0].trouble.as_ref().unwrap().cause.as_str()),
        (DeliveryState::Fetching, "overloaded")
    );
    assert!(all[0].have_bytes > 0 && all[0].have_bytes < all[0].total_bytes);
    assert_eq!(client.names(), [format!(".willcall-{}", net.sale.transaction)]);

    // The network is known by now: the manager is not needed any more.
    net.manager.away.store(true, Ordering::SeqCst);
    *net.seeders[0].vice.lock().unwrap() = Vice::None;
    let outcome = client.fetch_with(Target::Transaction(net.sale.transaction), options()).await.unwrap();
    assert!(outcome.resumed_from > 0, "{outcome:?}");
    assert_eq!(outcome.bytes + outcome.resumed_from, net.product.manifest.length);
    album().assert_in(&outcome.path);
    assert!(!outcome.reported);
    assert_eq!(client.names(), ["An album"]);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_were_moved_away_or_changed_while_nothing_ran_are_found_and_fetched_again() {
    let mut net = net(KeyPolicy::AtRelease, &[Vice::Stops(20)]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    client.fetch(&ticket).await.unwrap_err();
    let had = status(&client.home).await.unwrap()[0].have_bytes;
    let work = client.out().join(format!(".willcall-{}", net.sale.transaction));
    let content = work.join(net.product.digest.to_string());
    // Decrypted where it belongs, and nowhere else.
    assert!(!content.join("content").exists(), "no ciphertext");
    let file = content.join("files/An album/01.flac");
    let begun = std::fs::read(&file).unwrap();
    assert!(begun[..PAYLOAD] == album().contents[0][..PAYLOAD]);
    std::fs::rename(&file, client.dir.path().join("mine now")).unwrap();
    *net.seeders[0].vice.lock().unwrap() = Vice::None;
    let outcome = client.fetch(&ticket).await.unwrap();
    album().assert_in(&outcome.path);
    assert!(outcome.bytes > net.product.manifest.length - had, "what was lost came again");
    assert_eq!(outcome.bytes + outcome.resumed_from, net.product.manifest.length, "what was lost was not resumed");
    assert!(verify(&client.home, VerifyTarget::Path(outcome.path), |_, _| {}).await.unwrap().is_good());

    // The same between the end of the transfer and the move into its place.
    let client = Client::new();
    net.sale.transaction = protocol::TransactionId::new(now_ms(), [8; 10]);
    let ticket = net.ticket(client.home.peer_id());
    let in_the_way = client.out().join("An album");
    // What is there at the beginning ends a fetch at once: it comes while the goods do.
    let (progress, mut seen) = watch::channel(FetchProgress::default());
    let mut slow = options();
    slow.limits.bytes_per_second = Some(1 << 20);
    let (out, target) = (client.out(), Target::Envelope(Box::new(ticket.clone())));
    let run = fetch(&client.home, target, &out, slow, progress, CancellationToken::new());
    let meanwhile = async {
        seen.wait_for(|progress| progress.transfer.have_chunks > 3).await.unwrap();
        std::fs::create_dir_all(&in_the_way).unwrap();
    };
    let (ended, ()) = tokio::time::timeout(LIMIT, async { tokio::join!(run, meanwhile) }).await.expect("it hangs");
    let error = ended.unwrap_err();
    assert!(matches!(&error, FetchError::Place(PlaceError::Exists { .. })), "{error}");
    let work = client.out().join(format!(".willcall-{}", net.sale.transaction));
    let last = work.join(net.product.digest.to_string()).join("files/An album/last");
    std::fs::write(&last, noise(3 * PAYLOAD, 99)).unwrap();
    std::fs::remove_dir(&in_the_way).unwrap();
    let sent = net.sent();
    let outcome = client.fetch(&ticket).await.unwrap();
    album().assert_in(&outcome.path);
    assert!((3..=5).contains(&(net.sent() - sent)), "its chunks and no others");
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_sent_a_bad_chunk_is_dropped_for_good_and_complained_of() {
    let mut net = net(KeyPolicy::AtRelease, &[Vice::Corrupts, Vice::None]).await;
    let client = Client::new();
    let both = net.sale.sources.clone();
    net.sale.sources.truncate(1);
    let ticket = net.ticket(client.home.peer_id());
    let mut hasty = options();
    hasty.limits.patience = Duration::from_secs(1);
    let target = Target::Envelope(Box::new(ticket));
    client.fetch_with(target, hasty).await.unwrap_err();
    let liar = net.seeders[0].peer();
    assert_eq!(*net.manager.complaints.lock().unwrap(), [(liar, 0)]);
    // It would be honest now; but nobody asks it any more.
    *net.seeders[0].vice.lock().unwrap() = Vice::None;
    net.sale.sources = both;
    let sent = net.seeders[0].sent.load(Ordering::SeqCst);
    let outcome = client.fetch(&net.ticket(client.home.peer_id())).await.unwrap();
    album().assert_in(&outcome.path);
    assert_eq!(net.seeders[0].sent.load(Ordering::SeqCst), sent);
    assert!(outcome.sources.iter().find(|source| source.peer == liar).unwrap().banned, "{outcome:?}");
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_another_day_it_goes_on_with_a_renewed_lease() {
    let mut net = net(KeyPolicy::AtRelease, &[Vice::Stops(10)]).await;
    let client = Client::new();
    let fresh = net.ticket(client.home.peer_id());
    net.sale.lifetime = 2500;
    let short = net.ticket(client.home.peer_id());
    let strict = || {
        let mut options = options();
        options.link.clock_grace_ms = 0;
        options.limits.patience = Duration::from_millis(500);
        options
    };
    client.fetch_with(Target::Envelope(Box::new(short.clone())), strict()).await.unwrap_err();
    let over = short.ticket.lease.peek().unwrap().end;
    tokio::time::sleep(Duration::from_millis((over + 1).saturating_sub(now_ms()))).await;
    *net.seeders[0].vice.lock().unwrap() = Vice::None;
    let error = client.fetch_with(Target::Transaction(net.sale.transaction), strict()).await.unwrap_err();
    assert_eq!(error.cause(), "ticket-expires", "{error}");
    net.manager.tickets.lock().unwrap().push(fresh);
    let outcome = client.fetch_with(Target::Transaction(net.sale.transaction), strict()).await.unwrap();
    album().assert_in(&outcome.path);
    assert!(outcome.resumed_from > 0);
    assert_eq!(outcome.bytes + outcome.resumed_from, net.product.manifest.length);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_cut_off_on_disk_comes_again() {
    for policy in [KeyPolicy::AtRelease, KeyPolicy::OnCompletion] {
        let net = net(policy, &[Vice::Stops(12)]).await;
        let client = Client::new();
        let ticket = net.ticket(client.home.peer_id());
        net.manager.tickets.lock().unwrap().push(ticket.clone());
        let mut hasty = options();
        hasty.limits.patience = Duration::from_millis(500);
        client.fetch_with(Target::Envelope(Box::new(ticket.clone())), hasty).await.unwrap_err();
        let work = client.out().join(format!(".willcall-{}", net.sale.transaction));
        let content = work.join(net.product.digest.to_string());
        let file = match policy {
            KeyPolicy::AtRelease => content.join("files/An album/01.flac"),
            KeyPolicy::OnCompletion => content.join("content"),
        };
        let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
        file.set_len(3 * PAYLOAD as u64 + 5).unwrap();
        *net.seeders[0].vice.lock().unwrap() = Vice::None;
        let outcome = client.fetch(&ticket).await.unwrap();
        album().assert_in(&outcome.path);
        assert!(verify(&client.home, VerifyTarget::Path(outcome.path), |_, _| {}).await.unwrap().is_good());
        net.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_product_that_cannot_be_unpacked_is_refused_before_all_of_it_came() {
    let world = World::new();
    let product = world.publish(&Files::folder("p").file("../evil", noise(20 * PAYLOAD, 1)), KeyPolicy::AtRelease);
    let net = Net::start(world, product, &[Vice::None]).await;
    let client = Client::new();
    let error = client.fetch(&net.ticket(client.home.peer_id())).await.unwrap_err();
    assert!(matches!(&error, FetchError::Unpack(UnpackError::Plain(_))) && error.cause() == "bad-product", "{error}");
    assert!(!client.out().join("evil").exists());
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_key_of_an_on_completion_product_comes_for_the_completion() {
    let net = net(KeyPolicy::OnCompletion, &[Vice::None]).await;
    // One call more than what a single question is repeated by itself.
    net.manager.busy.store(5, Ordering::SeqCst);
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    assert!(ticket.grant.is_none());
    net.manager.tickets.lock().unwrap().push(ticket.clone());
    let only = FetchOptions { only: vec!["last".to_owned()], ..options() };
    let error = client.fetch_with(Target::Envelope(Box::new(ticket.clone())), only).await.unwrap_err();
    assert!(matches!(error, FetchError::OnlyWithoutKey), "{error}");
    let kept = client.home.library().get(&net.sale.transaction).unwrap().unwrap();
    assert!(kept.trouble.is_none(), "that is of the command: {:?}", kept.trouble);
    let shown = &status(&client.home).await.unwrap()[0];
    assert!(kept.state == DeliveryState::Received && shown.trouble.is_none(), "{shown:?}");
    let (progress, mut seen) = watch::channel(FetchProgress::default());
    let (out, target) = (client.out(), Target::Envelope(Box::new(ticket.clone())));
    let run = fetch(&client.home, target, &out, options(), progress, CancellationToken::new());
    let told = async {
        let told = seen.wait_for(|progress| progress.waiting.is_some()).await.unwrap();
        serde_json::to_value(&told.waiting).unwrap()
    };
    let (outcome, told) = tokio::time::timeout(LIMIT, async { tokio::join!(run, told) }).await.expect("it hangs");
    assert!(told["cause"] == "manager-away" && told["next_try"].as_u64().unwrap() > 0, "{told}");
    let outcome = outcome.unwrap();
    album().assert_in(&outcome.path);
    assert_eq!(net.manager.completions.lock().unwrap().len(), 1);
    assert!(verify(&client.home, VerifyTarget::Path(outcome.path), |_, _| {}).await.unwrap().is_good());
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_manager_an_on_completion_product_waits_and_keeps_what_it_has() {
    let net = net(KeyPolicy::OnCompletion, &[Vice::None]).await;
    let client = Client::new();
    // The manager knows nothing of the sale: refused for good, and told so.
    let ticket = net.ticket(client.home.peer_id());
    let error = client.fetch(&ticket).await.unwrap_err();
    assert!(matches!(&error, FetchError::Key(_)) && error.cause() == "not-entitled", "{error}");
    let all = status(&client.home).await.unwrap();
    assert_eq!(all[0].state, DeliveryState::Fetched);
    // Now it does: nothing is downloaded twice.
    let sent = net.sent();
    net.manager.tickets.lock().unwrap().push(ticket.clone());
    let outcome = client.fetch(&ticket).await.unwrap();
    album().assert_in(&outcome.path);
    assert_eq!((net.sent(), outcome.bytes), (sent, 0));
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn some_files_only_take_some_chunks_only() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None, Vice::None]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    let only = |name: &str| FetchOptions { only: vec![name.to_owned()], ..options() };
    let target = || Target::Envelope(Box::new(ticket.clone()));
    let error = client.fetch_with(target(), only("nope")).await.unwrap_err();
    assert!(matches!(error, FetchError::Unpack(UnpackError::NoSuchFile { .. })), "{error}");
    let outcome = client.fetch_with(target(), only("art")).await.unwrap();
    assert_eq!(listing(&outcome.path), ["art", "art/cover.png", "art/run"]);
    assert_eq!(std::fs::read(outcome.path.join("art/cover.png")).unwrap(), album().contents[1]);
    assert!(outcome.bytes < net.product.manifest.length / 4, "{outcome:?}");
    let report = verify(&client.home, VerifyTarget::Path(outcome.path.clone()), |_, _| {}).await.unwrap();
    assert!(report.is_good(), "{report:?}");
    assert!(client.fetch_with(target(), only("art")).await.unwrap().already_here);
    // The rest later: the part gives way to the whole.
    let outcome = client.fetch(&ticket).await.unwrap();
    album().assert_in(&outcome.path);
    assert_eq!(client.names(), ["An album"]);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_in_the_way_stays_and_nothing_is_downloaded_twice() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    let in_the_way = client.out().join("An album");
    std::fs::create_dir_all(&in_the_way).unwrap();
    std::fs::write(in_the_way.join("mine"), "mine").unwrap();
    let mut slow = options();
    slow.limits.bytes_per_second = Some(1 << 19);
    let error = client.fetch_with(Target::Envelope(Box::new(ticket.clone())), slow).await.unwrap_err();
    assert!(matches!(&error, FetchError::Place(PlaceError::Exists { .. })), "{error}");
    assert_eq!(listing(&in_the_way), ["mine"]);
    assert_eq!(status(&client.home).await.unwrap()[0].trouble.as_ref().unwrap().cause, "place-taken");
    // Found as soon as the product's name was known, with the goods still to come.
    let (sent, all) = (net.sent(), net.product.manifest.chunks());
    assert!(sent < all, "{sent} of {all} chunks came for nothing");
    std::fs::rename(&in_the_way, client.out().join("elsewhere")).unwrap();
    let outcome = client.fetch(&ticket).await.unwrap();
    album().assert_in(&outcome.path);
    assert_eq!(outcome.bytes + outcome.resumed_from, net.product.manifest.length);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_work_folder_of_somebody_elses_making_is_not_used() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    std::fs::create_dir_all(client.out()).unwrap();
    let trap = tempfile::tempdir().unwrap();
    let work = client.out().join(format!(".willcall-{}", net.sale.transaction));
    std::os::unix::fs::symlink(trap.path(), &work).unwrap();
    let error = client.fetch(&ticket).await.unwrap_err();
    assert!(error.to_string().contains(".willcall-"), "{error}");
    assert!(listing(trap.path()).is_empty());
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_are_renewed_and_mailboxes_read() {
    let mut net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let fresh = net.ticket(client.home.peer_id());
    (net.sale.age, net.sale.lifetime) = (10_000_000, 1_000);
    let over = net.ticket(client.home.peer_id());
    // Nobody renews it: seeders refuse, and the error says both.
    let error = client.fetch(&over).await.unwrap_err();
    assert!(matches!(&error, FetchError::LeaseOver { .. }) && error.cause() == "ticket-expires", "{error}");
    assert!(error.to_string().contains("not-entitled"), "{error}");
    net.manager.tickets.lock().unwrap().push(fresh);
    let link = LinkOptions::default();
    let joined = inbox(&client.home, Some(&over.join), &link).await.unwrap();
    assert_eq!((joined.items.len(), joined.items[0].new), (1, false));
    let outcome = client.fetch(&over).await.unwrap();
    album().assert_in(&outcome.path);

    let other = Client::new();
    assert!(inbox(&other.home, Some(&over.join), &link).await.unwrap().items.is_empty());
    net.manager.tickets.lock().unwrap().clear();
    (net.sale.age, net.sale.lifetime) = (0, 1_000_000);
    net.sale.transaction = protocol::TransactionId::new(now_ms(), [8; 10]);
    net.manager.tickets.lock().unwrap().push(net.ticket(other.home.peer_id()));
    // Joined once, remembered since.
    let found = inbox(&other.home, None, &link).await.unwrap();
    assert!(found.items[0].new && found.items[0].problem.is_none());
    let outcome = other.fetch_with(Target::Transaction(found.items[0].transaction), options()).await.unwrap();
    album().assert_in(&outcome.path);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_run_left_of_an_acknowledgement_goes_with_the_next_one() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let acks = client.home.delivery_dir(&net.sale.transaction).join("acks-1");
    std::fs::create_dir_all(&acks).unwrap();
    let mut killed = std::process::Command::new("true").spawn().unwrap();
    killed.wait().unwrap();
    let half = acks.join(format!("{}.{}-0123abcd.new", net.seeders[0].peer(), killed.id()));
    std::fs::write(&half, "half").unwrap();
    client.fetch(&net.ticket(client.home.peer_id())).await.unwrap();
    assert_eq!(listing(&acks), [net.seeders[0].peer().to_string()]);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_is_over_waits_for_a_manager_that_is_away() {
    let mut net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let fresh = net.ticket(client.home.peer_id());
    (net.sale.age, net.sale.lifetime) = (10_000_000, 1_000);
    let over = net.ticket(client.home.peer_id());
    client.fetch(&over).await.unwrap_err();
    net.manager.tickets.lock().unwrap().push(fresh);
    net.manager.away.store(true, Ordering::SeqCst);
    let progress = watch::Sender::new(FetchProgress::default());
    let mut seen = progress.subscribe();
    let (out, target) = (client.out(), Target::Envelope(Box::new(over)));
    let run = fetch(&client.home, target, &out, options(), progress, CancellationToken::new());
    let comes_back = async {
        let told = seen.wait_for(|progress| progress.waiting.is_some()).await.unwrap().waiting.clone().unwrap();
        assert!(told.cause == StallCause::ManagerAway && told.next_try > 0, "{told:?}");
        net.manager.away.store(false, Ordering::SeqCst);
    };
    let both = async { tokio::join!(run, comes_back) };
    let (outcome, ()) = tokio::time::timeout(LIMIT, both).await.expect("it hangs");
    album().assert_in(&outcome.unwrap().path);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tickets_that_are_none_end_in_one_clear_line() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let stranger = net.ticket(keypair(77).peer_id());
    let error = client.fetch(&stranger).await.unwrap_err().to_string();
    assert!(error.contains(&client.home.peer_id().to_string()), "{error}");
    assert!(error.contains(&keypair(77).peer_id().to_string()), "{error}");

    let good = net.ticket(client.home.peer_id());
    let mut unendorsed = good.clone();
    unendorsed.ticket.endorsement = None;
    let mut forged = good.clone();
    let lease = forged.ticket.lease.peek().unwrap();
    forged.ticket.lease = protocol::Signed::sign(&lease, &keypair(66));
    let mut other_network = good.clone();
    other_network.join.root = keypair(65).peer_id();
    for bad in [unendorsed, forged, other_network] {
        let error = client.fetch(&bad).await.unwrap_err();
        assert!(matches!(error, FetchError::BadTicket(_)), "{error}");
    }
    // None of them got in the way of the good one, which comes as a file.
    let file = client.dir.path().join("a.ticket");
    for bytes in [good.to_file_bytes(), format!("\n{good}\n").into_bytes()] {
        std::fs::write(&file, bytes).unwrap();
        client.fetch_with(Target::File(file.clone()), options()).await.unwrap();
    }
    std::fs::write(&file, "not a ticket").unwrap();
    let error = client.fetch_with(Target::File(file), options()).await.unwrap_err();
    assert!(matches!(error, FetchError::TicketFile { .. }), "{error}");
    let missing = Target::File(Path::new("/nonexistent").to_owned());
    assert!(matches!(client.fetch_with(missing, options()).await, Err(FetchError::ReadTicket { .. })));
    let unknown = Target::Transaction(protocol::TransactionId::new(1, [0; 10]));
    assert!(matches!(client.fetch_with(unknown, options()).await, Err(FetchError::Unknown(..))));
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_never_met_needs_its_manager_or_a_seeder_once() {
    let mut net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    net.sale.managers[0].addrs = vec![protocol::Address::new("/ip4/127.0.0.1/tcp/1").unwrap()];
    let impatient = FetchOptions { manager_patience: Duration::ZERO, ..options() };
    let ticket = Target::Envelope(Box::new(net.ticket(client.home.peer_id())));
    let error = client.fetch_with(ticket, impatient).await.unwrap_err();
    assert!(matches!(error, FetchError::Trust(TrustError::ManagerNeeded { .. })), "{error}");
    assert_eq!(status(&client.home).await.unwrap()[0].trouble.as_ref().unwrap().cause, "manager-needed");
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manager_that_is_needed_and_away_is_waited_for() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    net.manager.away.store(true, Ordering::SeqCst);
    let progress = watch::Sender::new(FetchProgress::default());
    let mut seen = progress.subscribe();
    let (out, ticket) = (client.out(), Target::Envelope(Box::new(net.ticket(client.home.peer_id()))));
    let run = fetch(&client.home, ticket, &out, options(), progress, CancellationToken::new());
    let comes_back = async {
        let told = seen.wait_for(|progress| progress.waiting.is_some()).await.unwrap().waiting.clone().unwrap();
        assert_eq!(serde_json::to_value(&told).unwrap()["cause"], "manager-away", "{told:?}");
        net.manager.away.store(false, Ordering::SeqCst);
    };
    let both = async { tokio::join!(run, comes_back) };
    let (outcome, ()) = tokio::time::timeout(LIMIT, both).await.expect("it hangs");
    album().assert_in(&outcome.unwrap().path);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_fetch_stops_and_two_at_once_are_one_too_many() {
    let net = net(KeyPolicy::AtRelease, &[Vice::Stops(3)]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    let cancel = CancellationToken::new();
    let progress = watch::Sender::new(FetchProgress::default());
    let mut seen = progress.subscribe();
    let mut options = options();
    options.limits.patience = LIMIT;
    let (home, out, token) = (client.home.clone(), client.out(), cancel.clone());
    let target = Target::Envelope(Box::new(ticket.clone()));
    let first = tokio::spawn(async move { fetch(&home, target, &out, options, progress, token).await });
    tokio::time::timeout(LIMIT, seen.wait_for(|p| p.transfer.have_chunks > 0)).await.unwrap().unwrap();
    let error = client.fetch(&ticket).await.unwrap_err();
    assert!(matches!(error, FetchError::Running { .. }), "{error}");
    cancel.cancel();
    let error = tokio::time::timeout(LIMIT, first).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, FetchError::Cancelled), "{error}");
    *net.seeders[0].vice.lock().unwrap() = Vice::None;
    let outcome = client.fetch(&ticket).await.unwrap();
    assert!(outcome.resumed_from > 0);
    album().assert_in(&outcome.path);
    net.stop().await;
}
