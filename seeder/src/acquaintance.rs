//! Seeders make themselves known to each other: whoever takes part in the DHT and is met by chance shows its certificate,
//! and from then on each asks the other, keeps its records and leads to it. Only the manager could vouch otherwise, and
//! the DHT is for the days when it is away; so acquaintances are remembered over a restart, too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{StreamExt, stream};
use node::Protocol;
use protocol::api::{MESH_PROTOCOL, MeshRequest, MeshResponse};
use protocol::certificate::SeederCert;
use protocol::{Address, PeerAddrs, PeerId, Refusal, RefusalCode, Signed};
use rand::seq::SliceRandom;
use store::StoreError;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::clock::{BackOff, now_ms};
use crate::context::Seeder;
use crate::network::TakeError;
use crate::tables::{ACQUAINTANCES, Acquaintance};

const MESH: Protocol = Protocol::new(MESH_PROTOCOL);
/// Acquaintances kept on disk, about 1 KiB each; past it the one met longest ago makes room. A few that are up lead to all.
const REMEMBERED: usize = 256;
/// As many peers as a content is announced to: up to here a new acquaintance is one of them, whatever its key.
const NEAR: usize = 20;
/// Introductions under way at once.
const AT_ONCE: usize = 8;
/// They are connected, so whoever wants to answers at once.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Introductions before those who came meanwhile are looked at: anybody may come, and say nothing.
const A_ROUND: usize = 32;
/// That somebody was met again is written down no more often than this, milliseconds.
const NOTE_EVERY_MS: u64 = 60 * 60 * 1000;

/// Who was met since the start, or is remembered: as many as the DHT's table takes, 32 bytes each.
#[derive(Debug, Default)]
pub(crate) struct Acquaintances {
    known: Mutex<BTreeSet<PeerId>>,
    wants_announcing: AtomicBool,
    moved: Notify,
}

impl Acquaintances {
    pub(crate) fn count(&self) -> usize {
        self.known().len()
    }

    /// Some of them, others at each `turn`, by turns all: those who follow `me` first, so that not all ask the same ones.
    pub(crate) fn in_turn(&self, me: &PeerId, turn: usize, count: usize) -> Vec<PeerId> {
        let known = self.known();
        let (before, after): (Vec<PeerId>, Vec<PeerId>) =
            known.iter().filter(|peer| *peer != me).partition(|p| *p < me);
        let ring = [after, before].concat();
        let from = turn.wrapping_mul(count).checked_rem(ring.len()).unwrap_or(0);
        ring.iter().cycle().skip(from).take(count.min(ring.len())).copied().collect()
    }

    /// Was somebody met since this was last asked who is to hear what is here? In a small network everybody is.
    pub(crate) fn take_new(&self) -> bool {
        self.wants_announcing.swap(false, Ordering::Relaxed)
    }

    /// Others reach this seeder elsewhere from now on. Those who know it already would go on leading to where it was.
    pub(crate) fn has_moved(&self) {
        self.moved.notify_one();
    }

    fn is_known(&self, peer: &PeerId) -> bool {
        self.known().contains(peer)
    }

    // Between plain insertions and removals nothing can be half done.
    fn known(&self) -> MutexGuard<'_, BTreeSet<PeerId>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whoever answered and is in no table all the same is introduced to again after this.
const NOT_PLACED: Duration = Duration::from_secs(600);

/// The table drops an address at which a dial failed, and takes none back by itself: who was away for some minutes, or whom this
/// seeder could not reach while its own line was down, has none left there but the last one. So what is remembered is told to it
/// so often.
const RECALLED_EVERY: Duration = Duration::from_secs(600);

/// Whoever has not answered for so long after this seeder moved is not told of it any more.
const TOLD_FOR: Duration = Duration::from_secs(600);

/// Who is told that this seeder moved: always the same few. What they hear takes the place of what they knew, so whoever heard
/// where it is just after the start, when it knows little more than its local addresses, has to hear all that follows.
#[derive(Debug, Default)]
struct Moving {
    confidants: BTreeSet<PeerId>,
    /// Those who have not answered since it moved last.
    to_tell: BTreeSet<PeerId>,
    until: Option<Instant>,
}

impl Moving {
    /// It moved: those who were told before hear it, and others in the place of those who are not known any more.
    fn moved(&mut self, known: &Acquaintances, me: &PeerId, now: Instant) {
        self.confidants.retain(|peer| known.is_known(peer));
        let near = known.in_turn(me, 0, NEAR).into_iter().filter(|peer| !self.confidants.contains(peer));
        let room = NEAR.saturating_sub(self.confidants.len());
        let more: Vec<PeerId> = near.take(room).collect();
        self.confidants.extend(more);
        self.to_tell = self.confidants.clone();
        self.until = now.checked_add(TOLD_FOR);
    }

    /// Who is still to be told.
    fn still_to_tell(&mut self, now: Instant) -> &BTreeSet<PeerId> {
        if self.until.is_some_and(|until| until <= now) {
            self.to_tell.clear();
        }
        &self.to_tell
    }

    fn answered(&mut self, peer: &PeerId) {
        self.to_tell.remove(peer);
    }
}

/// Introduces this seeder to those it meets until it stops, and to those who know it again when it moved.
pub(crate) async fn get_acquainted(seeder: Arc<Seeder>) -> Result<(), StoreError> {
    let token = seeder.supervisor.token();
    let mut newcomers = seeder.node.dht_newcomers();
    let mut changes = seeder.network.changes();
    let mut waiting: BTreeMap<PeerId, (BackOff, Instant)> = BTreeMap::new();
    let mut revoked = None;
    if recall(&seeder).await?
        && let Err(error) = seeder.node.bootstrap().await
    {
        tracing::debug!(%error, "no acquaintance answers yet");
    }
    let mut recalled = Instant::now();
    // It may have moved since it ran last.
    let (mut moved, mut moving) = (true, Moving::default());
    loop {
        if recalled.elapsed() >= RECALLED_EVERY {
            recall(&seeder).await?;
            recalled = Instant::now();
        }
        if std::mem::take(&mut moved) {
            let now = Instant::now();
            moving.moved(&seeder.acquaintances, &seeder.peer, now);
            let to_tell = moving.still_to_tell(now);
            waiting.retain(|peer, _| !to_tell.contains(peer));
        }
        changes.mark_unchanged();
        let epoch = seeder.network.revoked().number();
        if revoked.replace(epoch) != Some(epoch) {
            forget_revoked(&seeder).await?;
        }
        let mut here = newcomers.borrow_and_update().clone();
        here.extend(moving.still_to_tell(Instant::now()));
        // Those who left are met anew; so there are never more entries than newcomers.
        waiting.retain(|peer, _| here.contains(peer));
        let mut more = false;
        // Without a certificate of its own it has nothing to show.
        let certificate = seeder.network.certificate(now_ms()).ok();
        let shows = certificate.is_some();
        if let Some(certificate) = certificate {
            let now = Instant::now();
            let due;
            (due, more) = this_round(here, |peer| waiting.get(peer).map(|(_, at)| *at), now);
            let mut answers =
                stream::iter(due).map(|peer| introduce(&seeder, peer, certificate.clone())).buffer_unordered(AT_ONCE);
            while let Some((peer, outcome)) = answers.next().await {
                match outcome {
                    // One that the table has leaves the newcomers. Whoever stays had no address that is of use, or found no room.
                    Ok(()) => {
                        moving.answered(&peer);
                        let later = (BackOff::new(seeder.config.retry_ms), Instant::now() + NOT_PLACED);
                        waiting.insert(peer, later);
                    }
                    Err(TakeError::Store(error)) => return Err(error),
                    Err(error) => {
                        tracing::debug!(%peer, %error, "not acquainted yet");
                        let fresh = || (BackOff::new(seeder.config.retry_ms), Instant::now());
                        let (back_off, at) = waiting.entry(peer).or_insert_with(fresh);
                        *at = Instant::now() + back_off.pause();
                    }
                }
            }
        }
        let next = next_round(shows, more, waiting.values().map(|(_, at)| *at));
        let retry = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            changed = newcomers.changed() => if changed.is_err() { return Ok(()) },
            // The sender of changes lives as long as the seeder.
            _ = changes.changed() => {}
            () = retry => {}
            () = seeder.acquaintances.moved.notified() => moved = true,
            () = tokio::time::sleep_until(recalled + RECALLED_EVERY) => {}
        }
    }
}

/// Who is introduced to now, and whether more are due: those first that were never tried, then those that have been due for
/// longest, and no one's key gives it a better place.
fn this_round(
    here: BTreeSet<PeerId>,
    due_at: impl Fn(&PeerId) -> Option<Instant>,
    now: Instant,
) -> (Vec<PeerId>, bool) {
    let mut due: Vec<PeerId> = here.into_iter().filter(|peer| due_at(peer).is_none_or(|at| at <= now)).collect();
    due.shuffle(&mut rand::rng());
    due.sort_by_key(|peer| due_at(peer));
    let more = due.len() > A_ROUND;
    due.truncate(A_ROUND);
    (due, more)
}

/// When the next round is. What is due without anything to show stays due, and waits for that: its coming is a change.
fn next_round(shows: bool, more: bool, due: impl Iterator<Item = Instant>) -> Option<Instant> {
    if !shows {
        return None;
    }
    if more { Some(Instant::now()) } else { due.min() }
}

async fn introduce(seeder: &Seeder, peer: PeerId, certificate: Signed<SeederCert>) -> (PeerId, Result<(), TakeError>) {
    if seeder.manager.is_manager(&peer) {
        // The join line vouches for it.
        let at = seeder.node.known_addresses(peer).await.unwrap_or_else(|_| PeerAddrs::from(peer));
        let _ = seeder.node.add_dht_peer(at).await;
        return (peer, Ok(()));
    }
    let request = MeshRequest::Introduce { certificate, addrs: seeder.addresses() };
    let answer = seeder.node.call(&PeerAddrs::from(peer), MESH, &request, CALL_TIMEOUT).await;
    let outcome = match answer {
        Ok(MeshResponse::Introduced { certificate, addrs }) => take(seeder, peer, certificate, addrs).await,
        Ok(MeshResponse::Refused(refusal)) => Err(refusal.into()),
        Ok(_) => Err(Refusal::new(RefusalCode::Malformed, "another answer than to an introduction").into()),
        Err(error) => Err(Refusal::new(RefusalCode::Overloaded, error.to_string()).into()),
    };
    (peer, outcome)
}

/// Answers somebody who introduces itself.
pub(crate) async fn meet(
    seeder: &Seeder,
    peer: PeerId,
    certificate: Signed<SeederCert>,
    addrs: Vec<Address>,
) -> Result<MeshResponse, Refusal> {
    let own = seeder.network.certificate(now_ms())?;
    take(seeder, peer, certificate, addrs).await.map_err(|error| match error {
        TakeError::Refused(refusal) => refusal,
        TakeError::Fork(text) => Refusal::new(RefusalCode::KeyRetired, text),
        TakeError::Store(error) => {
            tracing::error!(%error, "cannot note an acquaintance");
            Refusal::new(RefusalCode::Internal, "this seeder's database failed")
        }
    })?;
    Ok(MeshResponse::Introduced { certificate: own, addrs: seeder.addresses() })
}

/// Takes a peer into the DHT that shows a good certificate.
async fn take(
    seeder: &Seeder,
    peer: PeerId,
    certificate: Signed<SeederCert>,
    mut addrs: Vec<Address>,
) -> Result<(), TakeError> {
    let now = now_ms();
    judge(seeder, peer, &certificate, now)?;
    // What a node listens on without knowing its own address leads nowhere from elsewhere.
    addrs.retain(|address| !["/ip4/0.0.0.0/", "/ip6/::/"].iter().any(|any| address.as_str().starts_with(any)));
    // Of too many the first ones: they are told in the order in which they are of use.
    let at = PeerAddrs::new(peer, addrs);
    if let Err(error) = seeder.node.add_dht_peer(at.clone()).await {
        tracing::debug!(%peer, %error, "acquaintance not taken into the DHT");
    }
    let (is_new, count) = {
        let mut known = seeder.acquaintances.known();
        (known.insert(peer), known.len())
    };
    if is_new && count <= NEAR {
        seeder.acquaintances.wants_announcing.store(true, Ordering::Relaxed);
        seeder.wake.announce.notify_one();
    }
    let met = Acquaintance { certificate, addrs: at.addrs, met_at: now };
    let before = seeder.db.read(|txn| ACQUAINTANCES.get(txn, &peer))?;
    let same = |before: &Acquaintance| {
        let fresh = now.saturating_sub(before.met_at) < NOTE_EVERY_MS;
        fresh && before.certificate == met.certificate && before.addrs == met.addrs
    };
    if before.as_ref().is_some_and(same) {
        return Ok(());
    }
    seeder
        .db
        .write(move |txn| {
            if before.is_none() {
                let all = ACQUAINTANCES.range(txn, .., REMEMBERED.saturating_add(1))?;
                let oldest = all.iter().min_by_key(|(_, known)| known.met_at);
                if let Some((oldest, _)) = oldest.filter(|_| all.len() >= REMEMBERED) {
                    ACQUAINTANCES.delete(txn, oldest)?;
                }
            }
            ACQUAINTANCES.put(txn, &peer, &met)
        })
        .await?;
    Ok(())
}

fn judge(seeder: &Seeder, peer: PeerId, certificate: &Signed<SeederCert>, now: u64) -> Result<(), Refusal> {
    let unknown = || Refusal::new(RefusalCode::NotEnrolled, "the network's keys are not known here yet");
    let trust = seeder.network.trust().ok_or_else(unknown)?;
    SeederCert::check(certificate, &peer, &trust, &seeder.network.revoked(), now).map(drop)
}

/// Takes those of earlier runs into the DHT, with all addresses that are remembered: the manager may be away. True where there
/// are any.
async fn recall(seeder: &Seeder) -> Result<bool, StoreError> {
    let remembered = seeder.db.read(|txn| ACQUAINTANCES.range(txn, .., REMEMBERED))?;
    let mut any = false;
    for (peer, known) in remembered {
        // One whose certificate is over or revoked shows a new one when it is met.
        if judge(seeder, peer, &known.certificate, now_ms()).is_err() {
            continue;
        }
        // It may have moved since it was met: what was heard of it by others is newer.
        any |= seeder.node.recall_dht_peer(PeerAddrs::new(peer, known.addrs)).await.is_ok();
        seeder.acquaintances.known().insert(peer);
    }
    Ok(any)
}

async fn forget_revoked(seeder: &Seeder) -> Result<(), StoreError> {
    let revoked: Vec<PeerId> = seeder.network.revoked().peers().copied().collect();
    for peer in &revoked {
        seeder.acquaintances.known().remove(peer);
        seeder.node.remove_dht_peer(*peer).await;
    }
    let known = seeder.db.read(|txn| {
        let mut known = Vec::new();
        for peer in revoked {
            if ACQUAINTANCES.contains(txn, &peer)? {
                known.push(peer);
            }
        }
        Ok::<_, StoreError>(known)
    })?;
    if known.is_empty() {
        return Ok(());
    }
    seeder
        .db
        .write(move |txn| {
            for peer in &known {
                ACQUAINTANCES.delete(txn, peer)?;
            }
            Ok::<_, StoreError>(())
        })
        .await
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn peer(n: u16) -> PeerId {
        let mut bytes = [0; 32];
        bytes.iter_mut().zip(n.to_be_bytes()).for_each(|(to, from)| *to = from);
        PeerId::from_bytes(bytes)
    }

    #[test]
    fn whoever_was_told_at_the_start_hears_of_all_later_moves_for_ten_minutes_each() {
        let (known, me, start) = (Acquaintances::default(), peer(500), Instant::now());
        known.known().extend((0..40).map(|n| peer(2 * n)));
        let mut moving = Moving::default();
        moving.moved(&known, &me, start);
        let first = moving.still_to_tell(start).clone();
        assert_eq!(first.len(), NEAR);
        first.iter().for_each(|peer| moving.answered(peer));
        assert!(moving.still_to_tell(start).is_empty());

        // Others came that are nearer, and one is gone.
        let gone = *first.first().unwrap();
        known.known().extend((0..40).map(|n| peer(501 + n)));
        known.known().remove(&gone);
        let later = start + TOLD_FOR.mul_f32(0.9);
        moving.moved(&known, &me, later);
        let again = moving.still_to_tell(later).clone();
        assert_eq!((again.len(), again.intersection(&first).count()), (NEAR, NEAR - 1));
        assert!(again.contains(&peer(501)) && !again.contains(&gone));

        moving.answered(&peer(501));
        let almost = later + TOLD_FOR.mul_f32(0.9);
        assert_eq!(moving.still_to_tell(almost).len(), NEAR - 1, "ten minutes from the move");
        assert!(moving.still_to_tell(later + TOLD_FOR).is_empty());
    }

    #[test]
    fn without_a_certificate_there_is_no_round() {
        let (now, later) = (Instant::now(), Instant::now() + NOT_PLACED);
        assert_eq!(next_round(true, false, [later, now].into_iter()), Some(now));
        assert_eq!(next_round(true, false, [].into_iter()), None);
        assert!(next_round(true, true, [later].into_iter()).is_some_and(|at| at < later));
        for more in [false, true] {
            assert_eq!(next_round(false, more, [now].into_iter()), None, "it would come round again at once");
        }
    }

    #[test]
    fn whoever_was_never_tried_comes_before_those_who_say_nothing() {
        let now = Instant::now();
        let (silent, new): (BTreeSet<PeerId>, PeerId) = ((0..512).map(peer).collect(), peer(600));
        let here: BTreeSet<PeerId> = silent.iter().copied().chain([new]).collect();
        let due_at = |peer: &PeerId| silent.contains(peer).then_some(now);
        let (due, more) = this_round(here.clone(), due_at, now);
        assert_eq!((due.len(), due.first(), more), (A_ROUND, Some(&new), true));
        let (due, more) = this_round(here, |peer| due_at(peer).map(|at| at + Duration::from_secs(1)), now);
        assert_eq!((due, more), (vec![new], false));
    }
}
