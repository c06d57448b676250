//! Fetching from honest, slow, silent, vanishing and lying seeders: in every case the result is the product or an error
//! that says why, and nobody is acknowledged anything that they did not send.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]

mod fixture;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fixture::seeders::{MemoryNet, TestSeeder, Vice};
use fixture::{CHUNK, LIMIT, Product, World, keypair};
use futures::FutureExt;
use protocol::clock::ClockState;
use protocol::deliver::Credential;
use protocol::receipt::{Ack, DeliveryId};
use protocol::settling::Counting;
use protocol::{ChunkSet, Keypair, PeerAddrs, PeerId, Refusal, RefusalCode, Signed};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use willcall_delivery::{
    AckMemory, AckStore, ContentStore, FetchError, FetchJob, FetchLimits, FetchReport, Phase, Progress, StallCause,
    fetch,
};

struct Setup {
    world: Arc<World>,
    product: Arc<Product>,
    client: Keypair,
    credential: Credential,
    delivery: DeliveryId,
    folder: tempfile::TempDir,
    acks: Arc<AckMemory>,
    progress: watch::Sender<Progress>,
    cancel: CancellationToken,
    limits: FetchLimits,
    seeders: Vec<Arc<TestSeeder>>,
}

impl Setup {
    fn new(chunks: usize, vices: &[Vice]) -> Setup {
        let world = Arc::new(World::new());
        let product = Arc::new(world.product(chunks * CHUNK - 100));
        let client = keypair(50);
        let (credential, delivery) = world.order(client.peer_id(), product.digest);
        let mut limits = FetchLimits {
            patience: Duration::from_secs(20),
            message_timeout: Duration::from_millis(500),
            finish_timeout: Duration::from_secs(5),
            ..FetchLimits::default()
        };
        limits.scheduler.stall_ms = 400;
        limits.scheduler.backoff_ms = 10;
        limits.scheduler.max_backoff_ms = 200;
        let seeders =
            (1u8..).zip(vices).map(|(n, vice)| Arc::new(TestSeeder::new(n, &world, &product, vice.clone()))).collect();
        Setup {
            world,
            product,
            client,
            credential,
            delivery,
            folder: tempfile::tempdir().unwrap(),
            acks: Arc::default(),
            progress: watch::Sender::default(),
            cancel: CancellationToken::new(),
            limits,
            seeders,
        }
    }

    fn store(&self) -> ContentStore {
        ContentStore::open(self.folder.path()).unwrap()
    }

    fn job(&self) -> FetchJob {
        FetchJob {
            connect: Arc::new(MemoryNet::new(self.client.peer_id(), &self.seeders)),
            store: self.store(),
            manifest: self.product.digest,
            only: None,
            credential: watch::channel(self.credential.clone()).1,
            delivery: self.delivery,
            keypair: self.client.clone(),
            sources: self.seeders.iter().map(|seeder| PeerAddrs::from(seeder.peer())).collect(),
            banned: Vec::new(),
            more_sources: None,
            trust: Arc::clone(&self.world.trust),
            revoked: Arc::clone(&self.world.revoked),
            acks: Arc::clone(&self.acks) as Arc<dyn AckStore>,
            progress: self.progress.clone(),
            adopted: Arc::default(),
            limits: self.limits.clone(),
            cancel: self.cancel.clone(),
        }
    }

    async fn fetch(&self) -> Result<FetchReport, FetchError> {
        within(fetch(self.job())).await
    }

    /// The product is there, and each seeder has the acknowledgement of exactly what it is reported to have sent.
    fn assert_fetched(&self, report: &FetchReport) {
        self.product.assert_equals(&self.store().get(&self.product.digest).unwrap());
        let mut acked = ChunkSet::new();
        for seeder in &self.seeders {
            let chunks = seeder.acked(self.delivery);
            assert!(chunks.len() <= seeder.sent(), "acknowledged more than it sent");
            acked = acked.union(&chunks);
        }
        let sources: u32 = report.sources.iter().map(|source| source.chunks).sum();
        assert_eq!(sources, report.chunks);
        // Also what came for the second time when everything was there: it is acknowledged, and so it is told of.
        let bytes: u64 = report.sources.iter().map(|source| source.bytes).sum();
        assert_eq!(bytes, report.bytes + report.duplicate_bytes);
        assert_eq!(self.progress.borrow().phase, Phase::Done);
        let progress = self.progress.borrow();
        assert_eq!((progress.have_chunks, progress.have_bytes), (progress.total_chunks, progress.total_bytes));
    }

    fn all(&self) -> ChunkSet {
        ChunkSet::from_range(0..self.product.manifest.chunks())
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, Box::pin(future)).await.expect("it hangs")
}

#[tokio::test]
async fn three_honest_seeders_share_the_work_and_get_acknowledgement_and_completion() {
    // None is done with all of it before the others are there.
    let slow = || Vice::Slow(Duration::from_millis(20));
    let setup = Setup::new(60, &[slow(), slow(), slow()]);
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    assert_eq!((report.chunks, report.bytes), (60, setup.product.manifest.length));
    let mut acked = ChunkSet::new();
    for seeder in &setup.seeders {
        assert!(seeder.completed(setup.delivery), "the completion is with every seeder");
        assert!(!seeder.acked(setup.delivery).is_empty(), "every seeder had a part");
        acked = acked.union(&seeder.acked(setup.delivery));
    }
    assert_eq!(acked, setup.all());
    let completion = report.completion.unwrap();
    assert_eq!(completion.verify(&setup.client.peer_id()).unwrap().manifest, setup.product.digest);
    // Again: nothing is to be fetched, and the completion is there all the same.
    let again = setup.fetch().await.unwrap();
    assert_eq!((again.chunks, again.completion.is_some()), (0, true));
}

#[tokio::test]
async fn one_chunk_and_an_unlisted_seeder_do_too() {
    for chunks in [1, 2, 9] {
        let mut setup = Setup::new(chunks, &[Vice::None]);
        Arc::get_mut(&mut setup.seeders[0]).unwrap().listed = false;
        let report = setup.fetch().await.unwrap();
        setup.assert_fetched(&report);
        assert_eq!(setup.seeders[0].acked(setup.delivery), setup.all());
    }
}

#[tokio::test]
async fn a_seeder_that_sends_a_bad_chunk_is_banned_and_the_others_make_it_good() {
    let setup = Setup::new(30, &[Vice::Corrupts(2), Vice::Slow(Duration::from_millis(5))]);
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    let banned: Vec<_> = report.banned().map(|source| source.peer).collect();
    assert_eq!(banned, [setup.seeders[0].peer()]);
    assert!(setup.seeders[0].acked(setup.delivery).len() <= 2, "only the good ones are acknowledged");
    assert_eq!(setup.seeders[0].hellos.load(std::sync::atomic::Ordering::Relaxed), 1, "it is not asked again");
}

#[tokio::test]
async fn forged_chaining_values_and_foreign_certificates_get_nobody_anywhere() {
    let setup = Setup::new(10, &[Vice::ForgesSegments, Vice::Impersonates, Vice::None]);
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    let reason = |n: usize| {
        let peer = setup.seeders[n].peer();
        report.sources.iter().find(|source| source.peer == peer).unwrap().last_reason.clone().unwrap()
    };
    assert!(report.banned().all(|source| source.peer == setup.seeders[0].peer()));
    assert!(reason(1).contains("certificate"), "{}", reason(1));
    assert_eq!(setup.seeders[1].hellos.load(std::sync::atomic::Ordering::Relaxed), 0, "it sees no ticket");
}

#[tokio::test]
async fn a_seeder_that_falls_silent_is_left_for_another() {
    let setup = Setup::new(24, &[Vice::FallsSilent(3), Vice::SaysNothing, Vice::None]);
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
}

#[tokio::test]
async fn under_a_limit_a_silent_seeder_costs_no_more_than_it_owes() {
    let mut setup = Setup::new(48, &[Vice::None, Vice::FallsSilent(3)]);
    setup.limits.bytes_per_second = Some(4 << 20);
    setup.limits.scheduler = FetchLimits::default().scheduler;
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    let owed = 4 * CHUNK as u64;
    assert!(report.duplicate_bytes <= owed, "{} bytes came twice", report.duplicate_bytes);
}

#[tokio::test]
async fn a_seeder_that_disappears_midway_is_replaced() {
    let setup = Setup::new(40, &[Vice::Disappears(7), Vice::None]);
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
}

#[tokio::test]
async fn streams_that_break_again_and_again_cost_no_window() {
    // Each stream ends after two chunks, before their acknowledgement is read: the next hello carries it.
    let setup = Setup::new(40, &[Vice::Leaves(2)]);
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    assert_eq!(setup.seeders[0].acked(setup.delivery), setup.all());
    assert!(setup.seeders[0].hellos.load(std::sync::atomic::Ordering::Relaxed) >= 20);
}

#[tokio::test]
async fn a_cancelled_fetch_goes_on_where_it_was_and_so_does_a_killed_one() {
    let setup = Setup::new(50, &[Vice::Slow(Duration::from_millis(20))]);
    let mut progress = setup.progress.subscribe();
    let cancel = setup.cancel.clone();
    let watcher = async move {
        progress.wait_for(|progress| progress.have_chunks >= 5).await.unwrap();
        cancel.cancel();
    };
    let (outcome, ()) = tokio::join!(setup.fetch(), within(watcher));
    let Err(FetchError::Cancelled { have, total: 50 }) = outcome else { panic!("{outcome:?}") };
    assert!(have >= 5);
    let held = setup.store().get(&setup.product.digest).unwrap().have();
    assert!(held.len() >= have, "what is here is noted");
    assert_eq!(setup.seeders[0].acked(setup.delivery), held, "the last word came through");

    // A killed process: the note is lost, the bytes are not.
    std::fs::remove_file(setup.folder.path().join(setup.product.digest.to_string()).join("have")).unwrap();
    let before = setup.seeders[0].sent();
    let setup = Setup { cancel: CancellationToken::new(), ..setup };
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    assert_eq!(report.chunks, 50 - held.len());
    assert_eq!(report.adopted_bytes, u64::from(held.len()) * CHUNK as u64);
    assert_eq!(setup.seeders[0].sent() - before, report.chunks, "nothing came twice");
}

/// Kills its process after so many acknowledgements were saved.
struct Killer {
    acks: Arc<AckMemory>,
    left: std::sync::atomic::AtomicI64,
    kill: CancellationToken,
}

impl AckStore for Killer {
    fn load(&self, seeder: &PeerId) -> Option<Signed<Ack>> {
        self.acks.load(seeder)
    }

    fn save(&self, seeder: &PeerId, ack: &Signed<Ack>) {
        self.acks.save(seeder, ack);
        if self.left.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) == 1 {
            self.kill.cancel();
        }
    }

    fn all(&self) -> Vec<Signed<Ack>> {
        self.acks.all()
    }
}

#[test]
fn nothing_is_acknowledged_to_two_seeders_however_often_the_client_is_killed() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let seeders = runtime();
    let chunks = 800;
    let slow = Vice::Slow(Duration::from_millis(2));
    let setup = Setup::new(chunks, &[slow.clone(), slow.clone(), slow.clone(), slow]);
    let mut kills = 0_usize;
    let report = loop {
        let kill = CancellationToken::new();
        let left = (1 + kills as i64 % 3).into();
        let killer = Killer { acks: Arc::clone(&setup.acks), left, kill: kill.clone() };
        let job = {
            let _entered = seeders.enter();
            // Two of the four are there each time.
            let mut job = setup.job();
            job.sources.rotate_left(kills % 4);
            job.sources.truncate(2);
            FetchJob { acks: Arc::new(killer), ..job }
        };
        // A process of its own: all of it is gone at once, and only what is on disk stays.
        let ended = runtime().block_on(async {
            tokio::select! {
                report = within(fetch(job)) => Some(report.unwrap()),
                () = kill.cancelled() => None,
            }
        });
        match ended {
            Some(report) => break report,
            None => kills += 1,
        }
    };
    assert!(kills >= 10, "killed only {kills} times");
    setup.product.assert_equals(&setup.store().get(&setup.product.digest).unwrap());
    assert!(report.completion.is_some());
    let acked: u32 = setup.acks.all().iter().map(|ack| ack.peek().unwrap().chunks.len()).sum();
    // What two seeders send at once at the end of a run is acknowledged to both.
    assert!(acked <= chunks as u32 + chunks as u32 / 40, "{acked} acknowledged of {chunks}, killed {kills} times");
}

#[tokio::test]
async fn what_was_acknowledged_is_looked_for_before_anything_is_asked_for() {
    // Each has served one half, and the note of all of it was lost.
    let setup = Setup::new(200, &[Vice::None, Vice::None]);
    for (seeder, half) in [(0, 0..100), (1, 100..200)] {
        let served = Some(ChunkSet::from_range(half));
        let sources = vec![PeerAddrs::from(setup.seeders[seeder].peer())];
        within(fetch(FetchJob { only: served, sources, ..setup.job() })).await.unwrap();
    }
    let content = setup.folder.path().join(setup.product.digest.to_string());
    std::fs::remove_file(content.join("have")).unwrap();
    let _ = std::fs::remove_file(content.join("complete"));
    // A file that lost its first part: what lies behind is there all the same.
    let file = std::fs::File::options().write(true).open(content.join("content")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; 50 * CHUNK], 0).unwrap();
    let before: u32 = setup.seeders.iter().map(|seeder| seeder.sent()).sum();
    // Only the second one is there.
    let sources = vec![PeerAddrs::from(setup.seeders[1].peer())];
    let report = within(fetch(FetchJob { sources, ..setup.job() })).await.unwrap();
    assert_eq!((report.chunks, report.adopted_bytes), (50, 150 * CHUNK as u64 - 100));
    assert_eq!(setup.seeders.iter().map(|seeder| seeder.sent()).sum::<u32>() - before, 50);
}

/// Something that was here turns out damaged when all of it is here, and is forgotten.
struct Forgetful {
    acks: AckMemory,
    store: ContentStore,
    progress: watch::Sender<Progress>,
    done: AtomicBool,
}

impl AckStore for Forgetful {
    fn load(&self, seeder: &PeerId) -> Option<Signed<Ack>> {
        self.acks.load(seeder)
    }

    fn save(&self, seeder: &PeerId, ack: &Signed<Ack>) {
        self.acks.save(seeder, ack);
        let digest = ack.peek().unwrap().manifest;
        let whole = self.store.get(&digest).filter(|content| content.has_all());
        if let Some(content) = whole.filter(|_| !self.done.swap(true, Ordering::SeqCst)) {
            // Later than the fetch saw that all of it is here.
            let mut seen = self.progress.subscribe();
            let finishing = seen.wait_for(|progress| progress.phase == Phase::Finishing);
            futures::executor::block_on(finishing).unwrap();
            content.forget(&ChunkSet::from_range(0..1)).unwrap();
        }
    }

    fn all(&self) -> Vec<Signed<Ack>> {
        self.acks.all()
    }
}

#[tokio::test]
async fn what_is_forgotten_at_the_end_is_missing_and_no_failure() {
    let setup = Setup::new(3, &[Vice::None]);
    let store = setup.store();
    let (acks, progress) = (AckMemory::default(), setup.progress.clone());
    let forgetful = Forgetful { acks, store: store.clone(), progress, done: AtomicBool::new(false) };
    let job = FetchJob { store: store.clone(), acks: Arc::new(forgetful), ..setup.job() };
    let report = within(fetch(job)).await.unwrap();
    assert!(report.completion.is_none(), "it signed that all of it is here");
    let content = store.get(&setup.product.digest).unwrap();
    assert!(!content.has(0) && !content.is_complete() && content.have().len() == 2);
    let again = within(fetch(FetchJob { store, ..setup.job() })).await.unwrap();
    assert!(again.completion.is_some() && content.is_complete());
}

#[tokio::test]
async fn only_some_chunks_and_the_rest_later() {
    let setup = Setup::new(20, &[Vice::None]);
    let some: ChunkSet = [0, 3, 4, 19, 400].into_iter().collect();
    let report = within(fetch(FetchJob { only: Some(some), ..setup.job() })).await.unwrap();
    assert_eq!((report.chunks, report.completion), (4, None));
    assert_eq!(setup.progress.borrow().total_chunks, 4);
    assert!(!setup.store().get(&setup.product.digest).unwrap().is_complete());
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    assert_eq!(report.chunks, 16);
}

#[tokio::test]
async fn partial_seeders_complete_each_other() {
    let mut setup = Setup::new(30, &[Vice::None, Vice::None, Vice::None]);
    for (n, range) in [(0, 0..12), (1, 8..24), (2, 20..30)] {
        *setup.seeders[n].held.lock().unwrap() = ChunkSet::from_range(range);
    }
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    setup.seeders.pop();
    let without = Setup { folder: tempfile::tempdir().unwrap(), acks: Arc::default(), ..setup };
    let (credential, delivery) = without.world.order(without.client.peer_id(), without.product.digest);
    let limits = FetchLimits { patience: Duration::from_millis(600), ..without.limits.clone() };
    let without = Setup { credential, delivery, limits, ..without };
    for seeder in &without.seeders {
        seeder.accounts.lock().unwrap().clear();
    }
    let error = without.fetch().await.unwrap_err();
    let FetchError::NoSource { cause, .. } = &error else { panic!("{error}") };
    assert_eq!(*cause, StallCause::NoSeederHolds { chunk: 24, more: 5 });
    assert_eq!(without.store().get(&without.product.digest).unwrap().have(), ChunkSet::from_range(0..24));
}

#[tokio::test]
async fn a_seeder_that_is_still_making_its_own_copy_is_asked_again() {
    let setup = Setup::new(10, &[Vice::None]);
    *setup.seeders[0].held.lock().unwrap() = ChunkSet::from_range(0..5);
    let mut progress = setup.progress.subscribe();
    let waits = |stall: &willcall_delivery::Stall| stall.cause == StallCause::NoSeederHolds { chunk: 5, more: 4 };
    let watcher = async {
        progress.wait_for(|progress| progress.stalled.as_ref().is_some_and(waits)).await.unwrap();
        *setup.seeders[0].held.lock().unwrap() = setup.all();
    };
    let (report, ()) = tokio::join!(setup.fetch(), within(watcher));
    setup.assert_fetched(&report.unwrap());
}

#[tokio::test]
async fn an_overloaded_seeder_is_asked_again_when_it_said() {
    let busy = Refusal::new(RefusalCode::Overloaded, "later").retry_after(50);
    let setup = Setup::new(5, &[Vice::Refuses(3, busy)]);
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    assert_eq!(report.sources[0].last_refusal.as_ref().unwrap().code, RefusalCode::Overloaded);
}

#[tokio::test]
async fn a_ticket_that_several_seeders_refuse_is_given_back_by_the_refusals_name() {
    let over = Refusal::new(RefusalCode::Expired, "it ended").at(77);
    let setup = Setup::new(5, &[Vice::Refuses(9, over.clone()), Vice::Refuses(9, over.clone())]);
    let error = setup.fetch().await.unwrap_err();
    let FetchError::Refused { refusal, by: 2, .. } = error else { panic!("{error}") };
    assert_eq!((refusal.code, refusal.now), (over.code, over.now));
    // 77 is long ago: how far the clocks are apart is told beside. The greetings say that it is the refuser's, not ours, that
    // is off.
    let detail = &refusal.detail;
    assert!(detail.starts_with("it ended; this seeder's clock is") && detail.ends_with("behind yours"), "{refusal}");
    assert_eq!(setup.progress.borrow().clock, ClockState::Good.into());
    // One voice among others is not enough, and two are not while others were not asked.
    for vices in [
        vec![Vice::Refuses(9, over.clone()), Vice::None],
        vec![Vice::Refuses(9, over.clone()), Vice::Refuses(9, over), Vice::Late(Duration::from_millis(300))],
    ] {
        let setup = Setup::new(5, &vices);
        let report = setup.fetch().await.unwrap();
        setup.assert_fetched(&report);
    }
}

#[tokio::test]
async fn a_newer_ticket_opens_those_again_who_refused_before_the_content_had_its_place() {
    let over = Refusal::new(RefusalCode::Expired, "it ended");
    let mut setup = Setup::new(8, &[Vice::Disappears(4), Vice::Refuses(1, over)]);
    setup.limits.scheduler.max_failures = u32::MAX;
    let [serves, refuses] = [0, 1].map(|n| Arc::clone(&setup.seeders[n]));
    serves.gone.store(true, Ordering::Relaxed);
    let (newer, credential) = watch::channel(setup.credential.clone());
    let mut progress = setup.progress.subscribe();
    let given_up = |source: &willcall_delivery::SourceProgress| source.peer == refuses.peer() && source.given_up;
    let renewal = async {
        progress.wait_for(|progress| progress.sources.iter().any(given_up)).await.unwrap();
        serves.gone.store(false, Ordering::Relaxed);
        progress.wait_for(|progress| progress.have_chunks > 0).await.unwrap();
        newer.send(setup.credential.clone()).unwrap();
    };
    let (report, ()) = tokio::join!(within(fetch(FetchJob { credential, ..setup.job() })), within(renewal));
    setup.assert_fetched(&report.unwrap());
    assert!(serves.sent() == 4 && refuses.sent() >= 4, "{} and {}", serves.sent(), refuses.sent());
}

#[tokio::test]
async fn who_refuses_before_it_was_shown_the_ticket_says_nothing_of_it() {
    let own = Refusal::new(RefusalCode::Revoked, "this seeder's certificate was revoked");
    let setup = Setup::new(5, &[Vice::RefusesUnasked(own.clone()), Vice::RefusesUnasked(own)]);
    let error = setup.fetch().await.unwrap_err();
    assert!(matches!(error, FetchError::NoSource { cause: StallCause::NoSeederLeft, .. }), "{error}");
    assert!(error.sources().iter().all(|source| source.last_refusal.is_none()), "{error}");
    assert!(error.to_string().contains("certificate was revoked"), "{error}");
}

#[tokio::test]
async fn seeders_that_are_off_hold_no_places_of_those_that_are_there() {
    let mut setup = Setup::new(8, &[Vice::None]);
    (setup.limits.sessions, setup.limits.open_timeout) = (2, 2 * LIMIT);
    let mut net = MemoryNet::new(setup.client.peer_id(), &setup.seeders);
    net.swallows = true;
    let off = [98, 99].map(|n| PeerAddrs::from(keypair(n).peer_id()));
    let sources = off.into_iter().chain([setup.seeders[0].peer().into()]).collect();
    let report = within(fetch(FetchJob { connect: Arc::new(net), sources, ..setup.job() })).await.unwrap();
    setup.assert_fetched(&report);
}

#[tokio::test]
async fn slow_seeders_that_took_all_places_keep_nobody_from_being_tried() {
    // Nobody is slower than these, and for the stall time they keep their places.
    let mut setup = Setup::new(8, &[Vice::FallsSilent(0), Vice::FallsSilent(0), Vice::None]);
    setup.limits.finish_timeout = Duration::from_secs(1);
    (setup.limits.sessions, setup.limits.places_every) = (2, Duration::from_millis(100));
    setup.limits.scheduler.stall_ms = 2 * LIMIT.as_millis() as u64;
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    assert_eq!(setup.seeders[2].sent(), 8);
}

#[tokio::test]
async fn who_waits_for_a_place_keeps_no_seeder_waiting_for_its_ticket() {
    let mut setup = Setup::new(8, &[Vice::SaysNothing, Vice::Impatient(Duration::from_millis(300))]);
    // The other one is dialled after a second, when the first is found to be slow, which holds the only place twice as long.
    (setup.limits.sessions, setup.limits.message_timeout) = (1, Duration::from_secs(3));
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    let seeder = &setup.seeders[1];
    assert_eq!((seeder.tired.load(Ordering::Relaxed), seeder.hellos.load(Ordering::Relaxed)), (0, 1));
}

#[tokio::test]
async fn nobody_is_asked_who_would_not_be_paid_while_somebody_is_there_who_is() {
    let mut setup = Setup::new(40, &[Vice::None, Vice::None]);
    let [first, second] = [0, 1].map(|n| setup.seeders[n].peer());
    let part = FetchJob { only: Some(ChunkSet::from_range(0..1)), sources: vec![first.into()], ..setup.job() };
    within(fetch(part)).await.unwrap();
    // With these as many hold acknowledgements as are counted in one delivery.
    for n in 1..Counting::MAX_SEEDERS {
        let seeder = Keypair::from_seed(&[[7; 16], [n as u8; 16]].concat().try_into().unwrap()).peer_id();
        let (network, delivery, manifest) = (setup.world.network, setup.delivery, setup.product.digest);
        let ack = Ack { network, delivery, manifest, seeder, chunks: ChunkSet::from_range(39..40), at: 1 };
        setup.acks.save(&seeder, &Signed::sign(&ack, &setup.client));
    }
    let half = FetchJob { only: Some(ChunkSet::from_range(0..20)), ..setup.job() };
    within(fetch(half)).await.unwrap();
    assert_eq!((setup.seeders[0].sent(), setup.seeders[1].sent()), (20, 0));
    // The goods were paid for: without it they come from whoever is left.
    let rest = FetchJob { sources: vec![second.into()], ..setup.job() };
    setup.limits.patience = LIMIT;
    let report = within(fetch(rest)).await.unwrap();
    assert_eq!((report.chunks, setup.seeders[1].sent()), (20, 20));
}

#[tokio::test]
async fn one_who_is_paid_and_waits_for_a_place_keeps_nobody_from_giving_it_up() {
    let mut setup = Setup::new(8, &[Vice::Late(Duration::from_millis(1500)), Vice::None]);
    // The first one is slow to answer, so that the other is dialled, and finds the only place taken.
    (setup.limits.sessions, setup.limits.message_timeout) = (1, LIMIT);
    let others = (1..Counting::MAX_SEEDERS).map(|n| Keypair::from_seed(&[n as u8 + 100; 32]).peer_id());
    for seeder in others.chain([setup.seeders[1].peer()]) {
        let (network, delivery, manifest) = (setup.world.network, setup.delivery, setup.product.digest);
        let ack = Ack { network, delivery, manifest, seeder, chunks: ChunkSet::from_range(7..8), at: 1 };
        setup.acks.save(&seeder, &Signed::sign(&ack, &setup.client));
    }
    let report = setup.fetch().await.unwrap();
    assert_eq!((report.chunks, setup.seeders[0].sent()), (8, 8));
}

#[tokio::test]
async fn without_a_seeder_it_ends_with_the_reason_of_each() {
    let setup = Setup::new(5, &[]);
    let error = setup.fetch().await.unwrap_err();
    assert!(matches!(error, FetchError::NoSource { cause: StallCause::NoSeederKnown, .. }), "{error}");

    let not_here = Refusal::new(RefusalCode::ContentNotHeld, "not here");
    let setup = Setup::new(5, &[Vice::Refuses(9, not_here.clone()), Vice::Refuses(9, not_here)]);
    let error = setup.fetch().await.unwrap_err();
    let cause = StallCause::AllRefused { code: RefusalCode::ContentNotHeld };
    assert!(matches!(&error, FetchError::NoSource { cause: c, .. } if *c == cause), "{error}");
    assert_eq!(error.to_string().matches("content-not-held").count(), 3, "{error}");

    let mut setup = Setup::new(5, &[Vice::Disappears(0)]);
    setup.seeders[0].gone.store(true, std::sync::atomic::Ordering::Relaxed);
    setup.limits.patience = Duration::from_millis(300);
    let error = setup.fetch().await.unwrap_err();
    assert!(matches!(error, FetchError::NoSource { cause: StallCause::NetworkUnreachable, .. }), "{error}");
    let stalled = setup.progress.borrow().stalled.clone().unwrap();
    assert_eq!(stalled.cause, StallCause::NetworkUnreachable);
    let json = serde_json::to_value(&stalled).unwrap();
    assert_eq!(json, serde_json::json!({ "cause": "network-unreachable", "next_try": null }));
}

#[tokio::test]
async fn seeders_that_are_there_and_send_nothing_have_a_name_too() {
    let mut setup = Setup::new(8, &[Vice::FallsSilent(3)]);
    setup.limits.scheduler.stall_ms = 10_000;
    setup.limits.patience = Duration::from_millis(2_500);
    let mut progress = setup.progress.subscribe();
    let told = async {
        let told = progress.wait_for(|progress| progress.stalled.is_some()).await.unwrap();
        serde_json::to_value(&told.stalled).unwrap()
    };
    let (ended, told) = tokio::join!(setup.fetch(), within(told));
    assert_eq!(told["cause"], "silent", "{told}");
    let error = ended.unwrap_err();
    assert!(matches!(error, FetchError::NoSource { cause: StallCause::Silent, .. }), "{error}");
}

#[tokio::test]
async fn whatever_it_waits_for_there_is_a_time_with_the_cause() {
    let busy = Refusal::new(RefusalCode::Overloaded, "later").retry_after(600);
    let away = Vice::Disappears(0);
    for vices in [
        vec![Vice::SaysNothing, Vice::SaysNothing],
        vec![Vice::FallsSilent(0)],
        vec![Vice::Refuses(99, busy.clone()), Vice::SaysNothing],
        vec![away.clone(), away],
    ] {
        let mut setup = Setup::new(8, &vices);
        setup.limits.patience = Duration::from_secs(4);
        for seeder in setup.seeders.iter().filter(|seeder| seeder.vice == Vice::Disappears(0)) {
            seeder.gone.store(true, std::sync::atomic::Ordering::Relaxed);
        }
        let (mut progress, over) = (setup.progress.subscribe(), CancellationToken::new());
        let watching = async {
            let mut told = 0;
            loop {
                tokio::select! {
                    changed = progress.changed() => changed.unwrap(),
                    () = over.cancelled() => return told,
                }
                let now = progress.borrow_and_update().clone();
                if let Some(stall) = now.stalled.filter(|_| now.phase != Phase::Done) {
                    let next = stall.next_try.unwrap_or_else(|| panic!("{vices:?}: no time with {:?}", stall.cause));
                    // What is being tried ends at last with the patience.
                    let soon = fixture::now_ms()..=fixture::now_ms() + 4_100;
                    assert!(soon.contains(&(next + 100)), "{vices:?}: {next} is not in {soon:?}");
                    told += 1;
                }
            }
        };
        let fetching = async {
            setup.fetch().await.unwrap_err();
            over.cancel();
        };
        let (told, ()) = tokio::join!(watching, fetching);
        assert!(told >= 2, "{vices:?}: told {told} times");
    }
}

#[tokio::test]
async fn a_single_seeder_that_refuses_for_time_is_told_as_an_expired_ticket() {
    let over = Refusal::new(RefusalCode::Expired, "it ended");
    let setup = Setup::new(5, &[Vice::Refuses(9, over)]);
    let error = setup.fetch().await.unwrap_err();
    assert!(matches!(error, FetchError::NoSource { cause: StallCause::TicketExpires, .. }), "{error}");
    let json = serde_json::to_value(setup.progress.borrow().stalled.clone().unwrap()).unwrap();
    assert_eq!(json["cause"], "ticket-expires");
}

#[tokio::test]
async fn more_seeders_are_looked_for_when_those_known_do_not_do() {
    let setup = Setup::new(8, &[Vice::None]);
    let peer = setup.seeders[0].peer();
    let rounds = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let counted = Arc::clone(&rounds);
    let more = move || {
        let round = counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        async move { if round < 2 { vec![] } else { vec![PeerAddrs::from(peer)] } }.boxed()
    };
    let limits = FetchLimits { discovery_every: Duration::from_millis(20), ..setup.limits.clone() };
    let stranger = PeerAddrs::from(keypair(99).peer_id());
    let job = FetchJob { sources: vec![stranger], more_sources: Some(Arc::new(more)), limits, ..setup.job() };
    let report = within(fetch(job)).await.unwrap();
    setup.assert_fetched(&report);
    assert!(rounds.load(std::sync::atomic::Ordering::Relaxed) >= 3);
}

#[tokio::test]
async fn time_in_which_the_process_is_stopped_does_not_count_as_waiting() {
    let mut setup = Setup::new(8, &[Vice::None]);
    setup.limits.patience = Duration::from_secs(3);
    let (peer, patience) = (setup.seeders[0].peer(), setup.limits.patience);
    let asked = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let more = move || {
        let first = asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0;
        async move {
            if first {
                // Nothing of the fetch runs meanwhile, as in a process that is stopped or a machine that sleeps.
                std::thread::sleep(patience + Duration::from_millis(100));
                return vec![];
            }
            vec![PeerAddrs::from(peer)]
        }
        .boxed()
    };
    let limits = FetchLimits { discovery_every: Duration::from_millis(20), ..setup.limits.clone() };
    let stranger = PeerAddrs::from(keypair(99).peer_id());
    let job = FetchJob { sources: vec![stranger], more_sources: Some(Arc::new(more)), limits, ..setup.job() };
    let report = within(fetch(job)).await.unwrap();
    setup.assert_fetched(&report);
}

#[tokio::test]
async fn a_full_disk_stops_the_fetch_and_what_is_stored_stays_good() {
    let setup = Setup::new(10, &[Vice::None]);
    let content = setup.product.create(&setup.store());
    for chunk in 0..3 {
        content.write_verified_chunk(chunk, &mut setup.product.chunk(chunk).to_vec()).unwrap();
    }
    content.sync().unwrap();
    let (path, aside) = (content.folder().join("content"), content.folder().join("aside"));
    let job = setup.job();
    std::fs::rename(&path, &aside).unwrap();
    std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    let error = within(fetch(job)).await.unwrap_err();
    let FetchError::DiskFull { path: named, needed, .. } = &error else { panic!("{error}") };
    assert_eq!((&**named, *needed), (content.folder(), (7 * CHUNK - 100) as u64));
    let stalled = setup.progress.borrow().stalled.clone().unwrap();
    assert!(matches!(stalled.cause, StallCause::DiskFull { .. }));
    assert!(setup.seeders[0].acked(setup.delivery).is_empty(), "not written, not acknowledged");
    std::fs::remove_file(&path).unwrap();
    std::fs::rename(&aside, &path).unwrap();
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    assert_eq!(report.chunks, 7);
}

#[tokio::test]
async fn a_rate_limit_is_kept() {
    let mut setup = Setup::new(16, &[Vice::None, Vice::None]);
    setup.limits.bytes_per_second = Some(2 * 1024 * 1024);
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    // 1 MiB at 2 MiB/s, less the burst.
    assert!(report.duration >= Duration::from_millis(250), "{:?}", report.duration);
}

#[tokio::test]
async fn segments_beyond_the_first_are_fetched_as_they_are_needed() {
    let setup = Setup::new(1030, &[Vice::None, Vice::None]);
    let report = setup.fetch().await.unwrap();
    setup.assert_fetched(&report);
    assert_eq!(setup.product.segments.len(), 2);
}
