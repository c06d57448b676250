//! Seeders are judged by what they send, and only the manager can judge: a client's complaint is a hint, since anybody can
//! accuse a seeder. So the manager buys from the seeder itself, under a key that nobody has seen before, and looks. One that
//! sends something else than the content, or goes on reporting a content that it does not serve, is taken out of leases and
//! placement until it passes again; one that was complained of falsely never hears of it. Now and then it looks without a hint.

mod doubts;
mod errand;
mod visit;

use std::collections::{BTreeMap, HashSet};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bincode::{Decode, Encode};
use node::{CounterBy, NodeHandle, Supervisor};
use protocol::{Digest, PeerId, wire};
use rand::RngExt;
use store::{StoreError, Table, Txn};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::audit;
use crate::context::{Context, now_ms};
use crate::registry::is_here;
use crate::tables::{HELD, SEEDERS};
use doubts::Doubts;
use visit::Verdict;

/// Audits that wait; hints beyond that are passed over, since the clients' complaints are kept anyway.
const MAX_WAITING: usize = 1024;
/// Seeders looked at when one is drawn by lot.
const DRAWN_FROM: usize = 256;
/// Contents of one seeder that one is drawn from.
const CONTENTS: usize = 1024;
/// A seeder that failed is looked at again without a hint after so long, milliseconds.
const AGAIN_MS: u64 = 60 * 60 * 1000;

/// Seeders that sent something else than the content or did not serve what they report, and have not passed since.
pub(crate) const FAILED: Table<PeerId, Failure> = Table::new("failed-audits");

/// How a seeder failed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Failure {
    /// Unix milliseconds.
    pub(crate) at: u64,
    /// Digest of the signed manifest of the content.
    pub(crate) manifest: Digest,
    /// In whose place something else came, or that was not there.
    pub(crate) chunk: u32,
}

wire!(Failure => 64);

/// Every seeder that failed.
pub(crate) fn failed(txn: &impl Txn) -> Result<HashSet<PeerId>, StoreError> {
    let mut found = HashSet::new();
    FAILED.scan::<StoreError>(txn, .., |peer, _| {
        found.insert(peer);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
pub(crate) async fn fail(ctx: &Context, peer: PeerId, manifest: Digest, now: u64) {
    ctx.db.write(move |txn| FAILED.put(txn, &peer, &Failure { at: now, manifest, chunk: 0 })).await.unwrap();
}

/// Whether this one did.
pub(crate) fn has_failed(txn: &impl Txn, peer: &PeerId) -> Result<bool, StoreError> {
    FAILED.contains(txn, peer)
}

/// How it did.
pub(crate) fn failure(txn: &impl Txn, peer: &PeerId) -> Result<Option<Failure>, StoreError> {
    FAILED.get(txn, peer)
}

/// A seeder to be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Due {
    peer: PeerId,
    manifest: Digest,
    /// Where a chunk was complained of.
    chunk: Option<u32>,
}

/// Whom to look at, and the counts.
pub(crate) struct Audits {
    waiting: Mutex<Waiting>,
    doubts: Doubts,
    wake: Notify,
    results: CounterBy<1>,
}

#[derive(Default)]
struct Waiting {
    hints: BTreeMap<(PeerId, Digest), Option<u32>>,
    /// When each seeder was last looked at: no more of them than the pause between two looks at one allows.
    looked: BTreeMap<PeerId, Instant>,
}

impl Audits {
    pub(crate) fn new(node: &NodeHandle) -> Self {
        let results = node.metrics().counter_by("audit_fetches", "Audit fetches, by what they found", ["result"]);
        Audits { waiting: Mutex::default(), doubts: Doubts::default(), wake: Notify::new(), results }
    }

    /// A hint that a seeder may send something else. Many hints of one content are one audit.
    pub(crate) fn suspect(&self, peer: PeerId, manifest: Digest, chunk: Option<u32>) {
        let mut waiting = self.lock();
        if waiting.hints.len() < MAX_WAITING || waiting.hints.contains_key(&(peer, manifest)) {
            waiting.hints.insert((peer, manifest), chunk);
            self.wake.notify_one();
        }
    }

    /// The next hint whose seeder was not looked at within `pause`, or when there will be one.
    fn next(&self, pause: Duration, now: Instant) -> Result<Due, Option<Instant>> {
        let mut waiting = self.lock();
        waiting.looked.retain(|_, at| now.duration_since(*at) < pause);
        let looked = &waiting.looked;
        let ready = waiting.hints.iter().find(|((peer, _), _)| !looked.contains_key(peer));
        let due = ready.map(|((peer, manifest), chunk)| Due { peer: *peer, manifest: *manifest, chunk: *chunk });
        match due {
            Some(due) => {
                waiting.hints.remove(&(due.peer, due.manifest));
                waiting.looked.insert(due.peer, now);
                Ok(due)
            }
            None => Err(waiting.looked.values().min().filter(|_| !waiting.hints.is_empty()).map(|at| *at + pause)),
        }
    }

    // A thread that panicked while it held this lock was between plain map operations.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A seeder reported content that it did not hold before. If it failed with this one, it says that it mended it.
pub(crate) fn mended(ctx: &Context, peer: PeerId, held: &[Digest]) -> Result<(), StoreError> {
    if let Some(failure) = ctx.db.read(|txn| failure(txn, &peer))?
        && held.contains(&failure.manifest)
    {
        ctx.audits.suspect(peer, failure.manifest, Some(failure.chunk));
    }
    Ok(())
}

/// A seeder reported what it holds. If it said lately that it does not hold one of these, it is asked for that again.
pub(crate) fn reported(ctx: &Context, peer: PeerId, held: &[Digest]) -> Result<(), StoreError> {
    let doubts = &ctx.audits.doubts;
    let Some(manifest) = doubts.of(&peer) else { return Ok(()) };
    if !ctx.registry.holds(&peer, &manifest)? {
        doubts.settled(&peer, &manifest);
    } else if held.contains(&manifest)
        && let Some(chunk) = doubts.reported(&peer, &manifest)
    {
        ctx.audits.suspect(peer, manifest, Some(chunk));
    }
    Ok(())
}

/// Whether there is anything to do for [`reported`], which reads the tables.
pub(crate) fn is_in_doubt(ctx: &Context, peer: &PeerId) -> bool {
    ctx.audits.doubts.of(peer).is_some()
}

/// Starts the chore: one audit at a time.
pub(crate) fn start(ctx: Arc<Context>, supervisor: &Supervisor) {
    let token = supervisor.token();
    supervisor.spawn_critical("audit fetches", async move {
        let every = Duration::from_millis(ctx.config.audit_ms);
        let pause = Duration::from_millis(ctx.config.audit_pause_ms);
        let mut by_lot = next_lot(every);
        loop {
            let (due, wait) = match ctx.audits.next(pause, Instant::now()) {
                Ok(due) => (Some(due), by_lot),
                Err(hint) if by_lot <= Instant::now() => {
                    by_lot = next_lot(every);
                    (draw(&ctx).await?, hint.unwrap_or(by_lot))
                }
                Err(hint) => (None, hint.unwrap_or(by_lot).min(by_lot)),
            };
            if let Some(due) = due {
                tokio::select! {
                    () = token.cancelled() => return Ok::<_, StoreError>(()),
                    looked = Box::pin(look(&ctx, due)) => looked?,
                }
                continue;
            }
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                () = ctx.audits.wake.notified() => {}
                () = tokio::time::sleep_until(wait) => {}
            }
        }
    });
}

/// When the next one is drawn: about every `every`, at no time that a seeder could foresee. Never for 0.
fn next_lot(every: Duration) -> Instant {
    const NEVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);
    Instant::now() + if every.is_zero() { NEVER } else { every.mul_f64(rand::rng().random_range(0.5..1.5)) }
}

/// A seeder that failed long enough ago to be looked at again, or any other, and a content of it.
async fn draw(ctx: &Arc<Context>) -> Result<Option<Due>, StoreError> {
    let (ctx, start) = (Arc::clone(ctx), PeerId::from_bytes(rand::rng().random()));
    let drawn = tokio::task::spawn_blocking(move || {
        let (origin, now) = (ctx.registry.origin(), now_ms());
        ctx.db.read(|txn| {
            let again =
                FAILED.range(txn, .., DRAWN_FROM)?.into_iter().find(|(_, f)| now.saturating_sub(f.at) > AGAIN_MS);
            if let Some((peer, Failure { manifest, chunk, .. })) = again {
                return Ok(Some(Due { peer, manifest, chunk: Some(chunk) }));
            }
            let mut page = SEEDERS.range(txn, start.., DRAWN_FROM)?;
            page.extend(SEEDERS.range(txn, ..start, DRAWN_FROM - page.len())?);
            let mut first = None;
            for (peer, record) in &page {
                if Some(*peer) != origin && is_here(txn, peer, record, now, ctx.config.seeder_away_ms)? {
                    first = Some(peer);
                    break;
                }
            }
            let Some(peer) = first else { return Ok(None) };
            let held = HELD.prefix(txn, peer, CONTENTS)?;
            if held.is_empty() {
                return Ok(None);
            }
            let which = rand::rng().random_range(0..held.len());
            Ok::<_, StoreError>(held.get(which).map(|((peer, manifest), _)| Due {
                peer: *peer,
                manifest: *manifest,
                chunk: None,
            }))
        })
    });
    drawn.await.map_err(|e| StoreError::Panicked(e.to_string()))?
}

/// One audit, and what follows from it.
async fn look(ctx: &Arc<Context>, due: Due) -> Result<(), StoreError> {
    let Due { peer, manifest, chunk } = due;
    let asking = Arc::clone(ctx);
    let made = tokio::task::spawn_blocking(move || errand::make(&asking, peer, manifest, now_ms()));
    let errand = match made.await.map_err(|e| StoreError::Panicked(e.to_string()))? {
        Ok(Some(errand)) => errand,
        Ok(None) => return no_word(ctx, peer, "it may not serve the content any more").await,
        Err(error) => {
            tracing::warn!(%peer, %error, "no audit");
            return Ok(());
        }
    };
    let verdict = Box::pin(visit::visit(ctx, &errand, peer, chunk)).await;
    ctx.audits.results.inc([verdict.name()]);
    match verdict {
        Verdict::Passed { chunks } => {
            let at = now_ms();
            ctx.audits.doubts.settled(&peer, &manifest);
            let back = ctx.db.write(move |txn| {
                // Of a seeder that failed with another content this says nothing.
                if FAILED.get(txn, &peer)?.is_none_or(|failure| failure.manifest != manifest) {
                    return Ok::<_, StoreError>(false);
                }
                audit::note(
                    txn,
                    at,
                    "audit-passed",
                    peer,
                    format!("{chunks} chunks of {manifest}: back in leases and placement"),
                )?;
                FAILED.delete(txn, &peer)
            });
            let back = back.await?;
            tracing::info!(%peer, chunks, back, "audit passed");
            if back {
                ctx.placements.wake();
            }
        }
        Verdict::Failed { chunk } => {
            failed_with(ctx, peer, manifest, chunk, "sends something else than the content").await?
        }
        Verdict::NotHeld { chunk } => {
            let holds = ctx.registry.holds(&peer, &manifest)?;
            if holds && ctx.audits.doubts.answered(peer, manifest, chunk) {
                failed_with(ctx, peer, manifest, chunk, "goes on reporting the content, and does not serve it").await?;
            } else {
                no_word(ctx, peer, "it says that it does not hold the content").await?;
            }
        }
        Verdict::NoWord(why) => no_word(ctx, peer, &why).await?,
    }
    Ok(())
}

/// Takes a seeder out of leases and placement.
async fn failed_with(
    ctx: &Context,
    peer: PeerId,
    manifest: Digest,
    chunk: u32,
    what: &'static str,
) -> Result<(), StoreError> {
    tracing::error!(%peer, content = %manifest, chunk, what, "audit failed: out of leases and placement until it passes again");
    let at = now_ms();
    ctx.db
        .write(move |txn| {
            let told = format!("it {what}, chunk {chunk} of {manifest}: out of leases and placement");
            audit::note(txn, at, "audit-failed", peer, told)?;
            FAILED.put(txn, &peer, &Failure { at, manifest, chunk })
        })
        .await?;
    // Its copies do not count any more.
    ctx.placements.wake();
    Ok(())
}

/// An audit that says nothing of the seeder.
async fn no_word(ctx: &Context, peer: PeerId, why: &str) -> Result<(), StoreError> {
    tracing::info!(%peer, why, "audit without a result");
    let at = now_ms();
    // Not to be drawn again at once.
    let put = move |txn: &store::WriteTransaction<'_>| match FAILED.get(txn, &peer)? {
        Some(failure) => FAILED.put(txn, &peer, &Failure { at, ..failure }),
        None => Ok::<_, StoreError>(()),
    };
    ctx.db.write(put).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_hints_are_one_audit_and_one_seeder_is_left_alone_for_a_while() {
        let metrics = node::Metrics::new();
        let results = metrics.counter_by("x", "x", ["result"]);
        let audits = Audits { waiting: Mutex::default(), doubts: Doubts::default(), wake: Notify::new(), results };
        let (peer, other) = (PeerId::from_bytes([1; 32]), PeerId::from_bytes([2; 32]));
        let content = |n| Digest::from_bytes([n; 32]);
        let (pause, now) = (Duration::from_secs(60), Instant::now());
        assert_eq!(audits.next(pause, now), Err(None));
        (0..100).for_each(|chunk| audits.suspect(peer, content(1), Some(chunk)));
        audits.suspect(peer, content(2), None);
        audits.suspect(other, content(1), Some(7));
        assert_eq!(audits.next(pause, now), Ok(Due { peer, manifest: content(1), chunk: Some(99) }));
        assert_eq!(audits.next(pause, now), Ok(Due { peer: other, manifest: content(1), chunk: Some(7) }));
        assert_eq!(audits.next(pause, now), Err(Some(now + pause)), "its other content waits");
        let later = now + pause;
        assert_eq!(audits.next(pause, later), Ok(Due { peer, manifest: content(2), chunk: None }));
        assert_eq!(audits.next(pause, later), Err(None));
        for n in 0..u64::try_from(MAX_WAITING).unwrap_or(0) + 10 {
            audits.suspect(peer, Digest::of("test", &[&n.to_le_bytes()]), None);
        }
        assert_eq!(audits.lock().hints.len(), MAX_WAITING);
    }
}
