//! Copies that the manager orders: a bounded queue on disk, from which contents are fetched from other seeders with the
//! order as the right. The disk's limits are checked before anything is fetched, and a full disk costs nothing that is
//! stored.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use delivery::{AckMemory, Content, CreateError, FetchError, FetchJob, FetchLimits, MoreSources, Progress, fetch};
use protocol::api::{MeshRequest, MeshResponse, provider_key};
use protocol::deliver::Credential;
use protocol::manifest::Manifest;
use protocol::receipt::DeliveryId;
use protocol::replication::{Placement, ReplicationOrder};
use protocol::ticket::{Admission, Lease};
use protocol::trust::{KeyPurpose, Trust};
use protocol::{ContentId, Digest, Refusal, RefusalCode, Signed};
use store::StoreError;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;

use crate::clock::now_ms;
use crate::context::Seeder;
use crate::manager::AskError;
use crate::network::TakeError;
use crate::tables::PLACEMENTS;

/// Orders kept and not yet fulfilled; the manager repeats those that find no room here.
const MAX_QUEUED: u64 = 256;
/// Orders are looked at this often although nothing happened.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// To find seeders in the DHT.
const FIND: Duration = Duration::from_secs(10);

/// What became of an order that came.
enum Queued {
    New,
    Again,
    Full,
}

/// Checks an order and puts it into the queue, in place of an older one for the same content.
pub(crate) async fn queue(seeder: &Seeder, placement: Placement) -> Result<(), TakeError> {
    let order = check(seeder, &placement.order)?;
    if placement.sources.len() > Lease::MAX_SOURCES {
        return Err(Refusal::new(RefusalCode::TooLarge, "more than 32 sources").into());
    }
    if seeder.contents.get(&order.manifest).is_some_and(|content| content.is_complete()) {
        return Ok(());
    }
    let queued = seeder
        .db
        .write(move |txn| {
            let known = PLACEMENTS.get(txn, &order.manifest)?;
            if known.is_none() && PLACEMENTS.len(txn)? >= MAX_QUEUED {
                return Ok(Queued::Full);
            }
            let again = known.is_some_and(|known| known.order == placement.order);
            PLACEMENTS.put(txn, &order.manifest, &placement)?;
            Ok::<_, StoreError>(if again { Queued::Again } else { Queued::New })
        })
        .await?;
    match queued {
        Queued::Full => return Err(Refusal::new(RefusalCode::LimitReached, "the queue of orders is full").into()),
        Queued::New => seeder.wake.replicate.notify_one(),
        Queued::Again => seeder.wake.replicate_again(),
    }
    Ok(())
}

fn check(seeder: &Seeder, order: &Signed<ReplicationOrder>) -> Result<ReplicationOrder, Refusal> {
    let unknown = || Refusal::new(RefusalCode::NotEnrolled, "the network's keys are not known here yet");
    let trust = seeder.network.trust().ok_or_else(unknown)?;
    let revoked = seeder.network.revoked();
    let admission = Admission {
        peer: seeder.peer,
        seeder: seeder.peer,
        trust: &trust,
        revoked: &revoked,
        informed: None,
        continuation_ms: 0,
        now: now_ms(),
    };
    ReplicationOrder::check(order, &admission)
}

/// Works through the queue until the node stops.
pub(crate) async fn work(seeder: Arc<Seeder>) -> Result<(), StoreError> {
    let token = seeder.supervisor.token();
    let places = Arc::new(Semaphore::new(seeder.config.replications as usize));
    let busy: Arc<Mutex<BTreeSet<Digest>>> = Arc::default();
    let (mut turns, freed) = (Turns::default(), Arc::new(Notify::new()));
    let mut next_look = Instant::now() + LOOK_EVERY;
    loop {
        let queued = seeder.db.read(|txn| PLACEMENTS.range(txn, .., usize::try_from(MAX_QUEUED).unwrap_or(256)))?;
        for (manifest, placement) in turns.due(queued) {
            if lock(&busy).contains(&manifest) {
                continue;
            }
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else { break };
            lock(&busy).insert(manifest);
            turns.tried(manifest);
            let (shared, busy, freed) = (Arc::clone(&seeder), Arc::clone(&busy), Arc::clone(&freed));
            seeder.supervisor.spawn("replication", async move {
                Box::pin(fulfil(&shared, manifest, placement)).await;
                drop(place);
                lock(&busy).remove(&manifest);
                // An order that failed is looked at again in its time, others at once.
                freed.notify_one();
            });
        }
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            () = freed.notified() => continue,
            () = seeder.wake.replicate.notified() => {}
            () = tokio::time::sleep_until(next_look) => {}
        }
        turns.next_round();
        next_look = Instant::now() + LOOK_EVERY;
    }
}

/// Which order is tried next: each once in a round, those first that were not tried for longest. Without it a few that cannot
/// be fulfilled now, for want of room or of a source, would take all places in each round, and the others would wait for them.
#[derive(Default)]
struct Turns {
    round: u64,
    tries: u64,
    /// The round of the last try, and which try it was.
    last: HashMap<Digest, (u64, u64)>,
}

impl Turns {
    fn due(&mut self, mut queued: Vec<(Digest, Placement)>) -> Vec<(Digest, Placement)> {
        let there: BTreeSet<Digest> = queued.iter().map(|(manifest, _)| *manifest).collect();
        self.last.retain(|manifest, _| there.contains(manifest));
        queued.retain(|(manifest, _)| self.last.get(manifest).is_none_or(|(round, _)| *round < self.round));
        queued.sort_by_key(|(manifest, _)| self.last.get(manifest).map(|(_, attempt)| *attempt));
        queued
    }

    fn tried(&mut self, manifest: Digest) {
        self.tries += 1;
        self.last.insert(manifest, (self.round, self.tries));
    }

    fn next_round(&mut self) {
        self.round += 1;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why an order is not fulfilled.
#[derive(Debug, thiserror::Error)]
enum Unfulfilled {
    /// It never will be: it is dropped.
    #[error("{0}")]
    Void(Refusal),
    /// It is dropped, and the manager is told to order nothing of this here.
    #[error("{}", denied())]
    Denied(ContentId),
    /// Not now.
    #[error("{0}")]
    Later(String),
}

/// Fulfils an order, which is out of the queue then, or says why not.
async fn fulfil(seeder: &Arc<Seeder>, manifest: Digest, placement: Placement) {
    let result = Box::pin(replicate(seeder, &placement)).await;
    let mut to_tell = result.is_ok();
    match &result {
        Ok(()) => seeder.notes.storage.clear(),
        Err(Unfulfilled::Void(refusal)) => tracing::info!(content = %manifest, %refusal, "order dropped"),
        Err(Unfulfilled::Denied(id)) => {
            tracing::info!(content = %manifest, refusal = %denied(), "order dropped");
            to_tell = seeder.unwanted.add(manifest, *id);
        }
        Err(Unfulfilled::Later(reason)) => {
            let trouble = format!("content {manifest}: {reason}");
            if seeder.notes.storage.get().as_deref() == Some(&trouble) {
                tracing::debug!(content = %manifest, reason, "copy not made yet");
            } else {
                tracing::warn!(content = %manifest, reason, "copy not made yet");
            }
            seeder.notes.storage.set(trouble);
            return;
        }
    }
    // A newer order for the same content may have taken its place.
    let order = placement.order;
    let removed = seeder.db.write(move |txn| {
        if PLACEMENTS.get(txn, &manifest)?.is_some_and(|queued| queued.order == order) {
            PLACEMENTS.delete(txn, &manifest)?;
        }
        Ok::<_, StoreError>(())
    });
    if let Err(error) = removed.await {
        seeder.supervisor.fail(format!("cannot note a copy: {error}"));
    }
    if result.is_ok() {
        seeder.wake.announce.notify_one();
    }
    if to_tell {
        seeder.wake.sync.notify_one();
    }
}

async fn replicate(seeder: &Arc<Seeder>, placement: &Placement) -> Result<(), Unfulfilled> {
    let order = check(seeder, &placement.order).map_err(Unfulfilled::Void)?;
    let trust = seeder.network.trust().ok_or_else(|| Unfulfilled::Later("no keys".to_owned()))?;
    let content = place(seeder, &trust, order.manifest).await?;
    if content.is_complete() {
        return Ok(());
    }
    tracing::info!(content = %order.manifest, order = %order.order, bytes = content.manifest().length, "making a copy");
    let (progress, _watching) = watch::channel(Progress::default());
    let patience = Duration::from_millis(seeder.config.replication_patience_ms);
    let job = FetchJob {
        connect: Arc::new(seeder.node.clone()),
        store: seeder.contents.clone(),
        manifest: order.manifest,
        only: None,
        credential: watch::channel(Credential::Order(Box::new(placement.order.clone()))).1,
        delivery: DeliveryId { transaction: order.order, delivery: ReplicationOrder::DELIVERY },
        keypair: seeder.keypair.clone(),
        sources: placement.sources.iter().filter(|source| source.peer != seeder.peer).cloned().collect(),
        banned: Vec::new(),
        more_sources: Some(finder(seeder, order.manifest)),
        trust,
        revoked: seeder.network.revoked(),
        acks: Arc::new(AckMemory::default()),
        progress,
        adopted: Arc::default(),
        limits: FetchLimits { patience, ..FetchLimits::default() },
        cancel: seeder.supervisor.token(),
    };
    match fetch(job).await {
        Ok(report) => {
            seeder.counts.replicated.inc_by(report.bytes);
            if report.completion.is_none() {
                return Err(Unfulfilled::Later("a part of it was found damaged while the rest came".to_owned()));
            }
            tracing::info!(content = %order.manifest, bytes = report.bytes, "copy made");
            Ok(())
        }
        Err(FetchError::Manifest(refusal) | FetchError::Refused { refusal, .. }) => Err(Unfulfilled::Void(refusal)),
        Err(FetchError::Removed) => {
            allowed(seeder, content.manifest())?;
            Err(Unfulfilled::Void(Refusal::new(RefusalCode::Revoked, "the content was taken down meanwhile")))
        }
        Err(error) => Err(Unfulfilled::Later(error.to_string())),
    }
}

/// The place for a content: there already, or made after its manifest and the room for it were checked.
async fn place(seeder: &Arc<Seeder>, trust: &Arc<Trust>, digest: Digest) -> Result<Arc<Content>, Unfulfilled> {
    if let Some(content) = seeder.contents.get(&digest) {
        return allowed(seeder, content.manifest()).map(|()| content);
    }
    let signed = match seeder.manager.ask(&MeshRequest::Manifest { digest }).await {
        Ok(MeshResponse::Manifest(signed)) => signed,
        Ok(_) => return Err(Unfulfilled::Later(AskError::Unexpected("a question for a manifest").to_string())),
        // Of this one it says so whenever it is asked.
        Err(AskError::Refused(refusal)) if refusal.code == RefusalCode::ContentNotHeld => {
            return Err(Unfulfilled::Void(refusal));
        }
        Err(error) => return Err(Unfulfilled::Later(error.to_string())),
    };
    let manifest = trust.open(&signed, KeyPurpose::Catalogue, |m| m.published_at, now_ms());
    let manifest = manifest.map_err(Unfulfilled::Void)?;
    manifest.check(seeder.network.id).map_err(Unfulfilled::Void)?;
    if signed.digest() != digest {
        let refusal = Refusal::new(RefusalCode::Malformed, "the manager sent another manifest than the order names");
        return Err(Unfulfilled::Void(refusal));
    }
    allowed(seeder, &manifest)?;
    let shared = Arc::clone(seeder);
    let made = tokio::task::spawn_blocking(move || {
        let alone = shared.placing.lock().unwrap_or_else(PoisonError::into_inner);
        // What lies there damaged is counted, and makes room for itself.
        let damaged = shared.contents.damaged_bytes(&digest);
        let (needed, free) = (manifest.length, shared.room().free.saturating_add(damaged));
        if needed > free {
            if !shared.drain.is_leaving() {
                shared.wake.make_room(needed.saturating_sub(damaged));
            }
            let path = shared.contents.root().display();
            return Err(format!(
                "{needed} bytes are needed at {path} and {free} may be used: raise capacity or free some"
            ));
        }
        match shared.contents.create(&signed, &manifest) {
            Err(CreateError::Damaged(damaged)) => {
                tracing::warn!(content = %digest, %damaged, "making a damaged content good");
                // Its room is taken, and to read all of it takes hours: other copies get their places meanwhile.
                drop(alone);
                restore(&shared, &signed, &manifest).map_err(|error| error.to_string())
            }
            made => made.map_err(|error| error.to_string()),
        }
    });
    made.await.map_err(|error| Unfulfilled::Later(error.to_string()))?.map_err(Unfulfilled::Later)
}

/// Checks the data of a damaged content and keeps what is good of them. Blocks.
fn restore(seeder: &Seeder, signed: &Signed<Manifest>, manifest: &Manifest) -> Result<Arc<Content>, CreateError> {
    let token = seeder.supervisor.token();
    let content = seeder.contents.restore(signed, manifest, &|| !token.is_cancelled())?;
    if content.has_all()
        && let Err(error) = content.finish()
    {
        tracing::warn!(content = %content.digest(), %error, "a content that was made good is not complete");
    }
    let (have, bytes) = (content.have_bytes(), manifest.length);
    tracing::info!(content = %content.digest(), have, bytes, "a damaged content was made good");
    Ok(content)
}

/// What became of a damaged content.
#[derive(Debug)]
pub(crate) enum MadeGood {
    /// It can be used again, with what was good of its data.
    Kept(Arc<Content>),
    /// It may not be held, or nobody knows it any more: its folder was removed.
    Removed(String),
    /// It lies there as it was.
    NotYet(String),
}

/// Makes a content usable again whose metadata are damaged, with the manifest from the manager. What was not good of its
/// data comes by an order.
pub(crate) async fn make_good(seeder: &Arc<Seeder>, digest: Digest) -> MadeGood {
    let Some(trust) = seeder.network.trust() else {
        return MadeGood::NotYet("the network's keys are not known here yet".to_owned());
    };
    let refusal = match Box::pin(place(seeder, &trust, digest)).await {
        Ok(content) => return MadeGood::Kept(content),
        Err(Unfulfilled::Later(reason)) => return MadeGood::NotYet(reason),
        Err(Unfulfilled::Void(refusal)) => refusal,
        Err(Unfulfilled::Denied(_)) => denied(),
    };
    if !matches!(refusal.code, RefusalCode::Revoked | RefusalCode::ContentNotHeld) {
        return MadeGood::NotYet(refusal.to_string());
    }
    let shared = Arc::clone(seeder);
    match tokio::task::spawn_blocking(move || shared.contents.remove(&digest)).await {
        Ok(Ok(_)) => MadeGood::Removed(refusal.to_string()),
        Ok(Err(error)) => MadeGood::NotYet(error.to_string()),
        Err(error) => MadeGood::NotYet(error.to_string()),
    }
}

fn allowed(seeder: &Seeder, manifest: &Manifest) -> Result<(), Unfulfilled> {
    if seeder.network.revoked().has_content(&manifest.content) {
        return Err(Unfulfilled::Void(Refusal::new(RefusalCode::Revoked, "this content was taken down")));
    }
    if seeder.denied.contains(&manifest.content) {
        return Err(Unfulfilled::Denied(manifest.content));
    }
    Ok(())
}

/// As clients are told it.
fn denied() -> Refusal {
    Refusal::new(RefusalCode::ContentNotHeld, "this content is on this seeder's own deny list")
}

/// Looks into the DHT for seeders that hold it.
fn finder(seeder: &Arc<Seeder>, manifest: Digest) -> MoreSources {
    let node = seeder.node.clone();
    let key = *provider_key(&seeder.network.id, &manifest).as_bytes();
    Arc::new(move || {
        let node = node.clone();
        Box::pin(async move { node.find_providers(key, Lease::MAX_SOURCES, FIND).await.unwrap_or_default() })
    })
}
