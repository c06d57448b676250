//! Who takes part: enrolled merchants and seeders, what each seeder last said of itself, and who holds what. Certificates
//! are what nodes show each other; this is what the manager itself goes by.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use protocol::api::SeederReport;
use protocol::clock::ClockState;
use protocol::{Digest, PeerAddrs, PeerId};
use store::{Db, Mark, StoreError, Txn, WriteTransaction};
use tokio::sync::watch;

use crate::clocks::{self, Clocks, Right};
use crate::handover;
use crate::sources::{self, Holders};
use crate::tables::{
    GIVEN_UP, HELD, HOLDERS, LEAVING, MANAGER, MANIFESTS, MERCHANTS, MerchantRecord, PENDING, SEEDERS, STOPPED,
    SeederRecord,
};

/// What a report changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ReportOutcome {
    /// The seeder has room that it did not have, or is back: content may be placed there.
    pub(crate) gained_room: bool,
    /// It holds content that it did not hold before.
    pub(crate) gained_content: bool,
    /// It lost content: copies may be missing.
    pub(crate) lost_content: bool,
    /// It will not have what was ordered there: the order was taken back.
    pub(crate) turned_down: bool,
}

/// Front of the tables of participants.
pub(crate) struct Registry {
    db: Db,
    away_ms: u64,
    origin: RwLock<Option<PeerId>>,
    /// Counts up whenever a seeder reports content that it did not hold before.
    arrivals: watch::Sender<u64>,
    /// Enrolled seeders that were put into the DHT's routing table since the start: 32 bytes each.
    introduced: Mutex<HashSet<PeerId>>,
    /// What each seeder said of this moment in its last report since the start.
    said: Mutex<HashMap<PeerId, Said>>,
    /// Of a report that goes on in further parts: what was held by the one before, and is not named yet.
    unsaid: Mutex<HashMap<PeerId, HashSet<Digest>>>,
    /// When anybody was last heard before the start, unix milliseconds.
    listened_until: u64,
    holders: Holders,
    /// What the clocks of seeders show.
    pub(crate) clocks: Clocks,
    clock_grace_ms: u64,
}

impl Registry {
    /// `away_ms`: a seeder silent for longer is no source, nor is one whose clock is off by more than `clock_grace_ms`.
    pub(crate) fn load(db: Db, away_ms: u64, clock_grace_ms: u64) -> Result<Self, StoreError> {
        let (origin, listened_until) = db.read(|txn| {
            let mut last = 0;
            SEEDERS.scan::<StoreError>(txn, .., |_, record| {
                last = last.max(record.last_report);
                Ok(ControlFlow::Continue(()))
            })?;
            Ok::<_, StoreError>((MANAGER.get(txn, &())?.and_then(|record| record.origin), last))
        })?;
        Ok(Registry {
            db,
            away_ms,
            origin: RwLock::new(origin),
            arrivals: watch::Sender::new(0),
            introduced: Mutex::default(),
            said: Mutex::default(),
            unsaid: Mutex::default(),
            listened_until,
            holders: Holders::default(),
            clocks: Clocks::default(),
            clock_grace_ms,
        })
    }

    /// A merchant's record, whether or not its certificate still holds.
    pub(crate) fn merchant(&self, peer: &PeerId) -> Result<Option<MerchantRecord>, StoreError> {
        self.db.read(|txn| MERCHANTS.get(txn, peer))
    }

    /// A seeder's record, whether or not its certificate still holds.
    pub(crate) fn seeder(&self, peer: &PeerId) -> Result<Option<SeederRecord>, StoreError> {
        self.db.read(|txn| SEEDERS.get(txn, peer))
    }

    /// Where a seeder says that it can be reached; empty for one that never reported.
    pub(crate) fn addresses(&self, peer: &PeerId) -> Result<PeerAddrs, StoreError> {
        Ok(PeerAddrs::new(*peer, self.seeder(peer)?.map(|record| record.addrs).unwrap_or_default()))
    }

    /// How many contents `peer` holds.
    pub(crate) fn held_count(&self, peer: &PeerId) -> Result<u64, StoreError> {
        let (first, last) = (Digest::from_bytes([0; 32]), Digest::from_bytes([0xff; 32]));
        let mut held = 0;
        self.db.read(|txn| {
            HELD.scan::<StoreError>(txn, (*peer, first)..=(*peer, last), |_, _| {
                held += 1;
                Ok(ControlFlow::Continue(()))
            })
        })?;
        Ok(held)
    }

    /// Whether `peer` holds the content.
    pub(crate) fn holds(&self, peer: &PeerId, manifest: &Digest) -> Result<bool, StoreError> {
        self.db.read(|txn| HOLDERS.contains(txn, &(*manifest, *peer)))
    }

    /// At most `limit` merchants in order of peer ID, after the given one.
    pub(crate) fn merchants(
        &self,
        after: Option<PeerId>,
        limit: usize,
    ) -> Result<Vec<(PeerId, MerchantRecord)>, StoreError> {
        self.db.read(|txn| MERCHANTS.range(txn, after_bound(after), limit))
    }

    /// At most `limit` seeders in order of peer ID, after the given one.
    pub(crate) fn seeders(
        &self,
        after: Option<PeerId>,
        limit: usize,
    ) -> Result<Vec<(PeerId, SeederRecord)>, StoreError> {
        self.db.read(|txn| SEEDERS.range(txn, after_bound(after), limit))
    }

    /// Numbers of merchants and seeders.
    pub(crate) fn counts(&self) -> Result<(u64, u64), StoreError> {
        self.db.read(|txn| Ok((MERCHANTS.len(txn)?, SEEDERS.len(txn)?)))
    }

    /// The manager's own seeder, which holds everything.
    pub(crate) fn origin(&self) -> Option<PeerId> {
        *self.origin.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `peer` the origin.
    pub(crate) async fn set_origin(&self, peer: PeerId) -> Result<(), StoreError> {
        self.db
            .write(move |txn| {
                let mut record = MANAGER.get(txn, &())?.unwrap_or_default();
                record.origin = Some(peer);
                MANAGER.put(txn, &(), &record)
            })
            .await?;
        *self.origin.write().unwrap_or_else(PoisonError::into_inner) = Some(peer);
        Ok(())
    }

    /// True once for each seeder since the start. Only enrolled ones are asked for.
    pub(crate) fn introduce(&self, peer: PeerId) -> bool {
        self.introduced.lock().unwrap_or_else(PoisonError::into_inner).insert(peer)
    }

    /// Is told when a seeder reports content that it did not hold before.
    pub(crate) fn arrivals(&self) -> watch::Receiver<u64> {
        self.arrivals.subscribe()
    }

    /// Stores what a seeder says of itself. `None` when it is not enrolled.
    pub(crate) async fn report(
        &self,
        peer: PeerId,
        report: SeederReport,
        now: u64,
    ) -> Result<Option<ReportOutcome>, StoreError> {
        let away_ms = self.away_ms;
        let SeederReport { deliveries, max_deliveries, turned_away, first, spare, now: clock, .. } = report;
        let (leaving, moving) = (report.leaving, if first { report.moving.clone() } else { Vec::new() });
        let unwanted = if first { report.unwanted.clone() } else { Vec::new() };
        let unsaid = self.lock_unsaid().remove(&peer).unwrap_or_default();
        let stored = self.db.write(move |txn| store_report(txn, peer, &report, unsaid.clone(), now, away_ms)).await?;
        let outcome = stored.map(|(outcome, unsaid)| {
            if !unsaid.is_empty() {
                self.lock_unsaid().insert(peer, unsaid);
            }
            outcome
        });
        if outcome.is_some_and(|outcome| outcome.gained_content) {
            self.arrivals.send_modify(|n| *n += 1);
        }
        // The parts that follow the first say nothing of those who were turned away.
        if outcome.is_some() && first {
            // The origin, which runs on this machine, knows nothing about clocks that this manager does not.
            let offset = (clock != 0 && self.origin() != Some(peer)).then(|| clocks::offset(clock, now));
            let said = Said { deliveries, max_deliveries, turned_away, spare, offset, leaving, moving, unwanted };
            self.lock_said().insert(peer, said);
        }
        Ok(outcome)
    }

    /// Notes that a seeder stops in order: it is away at once, and from now on gone.
    pub(crate) async fn stops(&self, peer: PeerId, now: u64) -> Result<(), StoreError> {
        self.db
            .write(move |txn| {
                let Some(mut record) = SEEDERS.get(txn, &peer)? else { return Ok(()) };
                if record.last_report != 0 {
                    record.last_report = now;
                }
                SEEDERS.put(txn, &peer, &record)?;
                STOPPED.put(txn, &peer, &Mark)
            })
            .await
    }

    /// At most `limit` seeders to name as sources of a content, in the order in which they are to be tried; the origin last,
    /// but always among them. How they are chosen is in `sources`.
    pub(crate) fn sources_for(&self, manifest: &Digest, now: u64, limit: usize) -> Result<Vec<PeerAddrs>, StoreError> {
        let origin = self.origin();
        let holders = self.holders.of(&self.db, manifest)?;
        let right = self.right_time(now);
        let mut found = Vec::with_capacity(holders.len());
        {
            let said = self.lock_said();
            for holder in holders.iter() {
                let said = said.get(&holder.peer);
                let offset = said.and_then(|said| said.offset);
                // By such a clock no lease of now is good; and who leaves turns everybody away.
                let turns_away = offset.is_some_and(|offset| right.of_seeder(offset).is_off())
                    || said.is_some_and(|said| said.leaving);
                if Some(holder.peer) != origin && holder.serves(now, self.away_ms) && !turns_away {
                    found.push((said.is_some_and(Said::is_full), holder));
                }
            }
        }
        let mut sources = sources::spread(found, limit.saturating_sub(usize::from(origin.is_some())));
        if let Some(origin) = origin.filter(|_| limit > 0) {
            let mut addrs = self.addresses(&origin)?;
            addrs.addrs.truncate(sources::SOURCE_ADDRS);
            sources.push(addrs);
        }
        Ok(sources)
    }

    /// A seeder's clock by its last report since the start: one that is off refuses what is good.
    pub(crate) fn clock_of(&self, peer: &PeerId, now: u64) -> ClockState {
        self.clock_by(peer, self.right_time(now))
    }

    /// The same for who asks about many: see [`Registry::right_time`].
    pub(crate) fn clock_by(&self, peer: &PeerId, right: Right) -> ClockState {
        let offset = self.lock_said().get(peer).and_then(|said| said.offset);
        offset.map_or(ClockState::Unknown, |offset| right.of_seeder(offset))
    }

    /// By what time clocks of seeders are judged now.
    pub(crate) fn right_time(&self, now: u64) -> Right {
        self.clocks.right(now, self.clock_grace_ms)
    }

    /// Bytes that a seeder takes beyond the copies that there have to be, by its last report since the start.
    pub(crate) fn spare(&self, peer: &PeerId) -> u64 {
        self.lock_said().get(peer).map_or(0, |said| said.spare)
    }

    /// Whether a seeder leaves the network, by its last report since the start.
    pub(crate) fn leaves(&self, peer: &PeerId) -> bool {
        self.lock_said().get(peer).is_some_and(|said| said.leaving)
    }

    /// What a seeder wants to be rid of for want of room, by its last report since the start.
    pub(crate) fn moving(&self, peer: &PeerId) -> Vec<Digest> {
        self.lock_said().get(peer).map(|said| said.moving.clone()).unwrap_or_default()
    }

    /// What a seeder will not have, by its last report since the start.
    pub(crate) fn unwanted(&self, peer: &PeerId) -> Vec<Digest> {
        self.lock_said().get(peer).map(|said| said.unwanted.clone()).unwrap_or_default()
    }

    /// When anybody was last heard before the start, unix milliseconds: for as long as the manager was away, nobody was.
    pub(crate) fn listened_until(&self) -> u64 {
        self.listened_until
    }

    fn lock_unsaid(&self) -> MutexGuard<'_, HashMap<PeerId, HashSet<Digest>>> {
        self.unsaid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_said(&self) -> MutexGuard<'_, HashMap<PeerId, Said>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a seeder said of itself.
#[derive(Clone, Debug)]
struct Said {
    deliveries: u32,
    max_deliveries: u32,
    turned_away: u32,
    spare: u64,
    /// Its clock less this one, milliseconds, where it told it.
    offset: Option<i64>,
    leaving: bool,
    /// At most [`SeederReport::MAX_MOVING`].
    moving: Vec<Digest>,
    /// At most [`SeederReport::MAX_UNWANTED`].
    unwanted: Vec<Digest>,
}

impl Said {
    /// A client that is sent there would most likely be turned away.
    fn is_full(&self) -> bool {
        self.turned_away > 0 || self.max_deliveries > 0 && self.deliveries >= self.max_deliveries
    }
}

/// Whether a seeder that last reported then was heard of within the last `ms` milliseconds.
pub(crate) fn is_heard(last_report: u64, now: u64, ms: u64) -> bool {
    last_report != 0 && now.saturating_sub(last_report) <= ms
}

/// Whether a seeder is taken to be there: it was heard of lately, and did not say that it stops.
pub(crate) fn is_here(
    txn: &impl Txn,
    peer: &PeerId,
    record: &SeederRecord,
    now: u64,
    away_ms: u64,
) -> Result<bool, StoreError> {
    Ok(is_heard(record.last_report, now, away_ms) && !STOPPED.contains(txn, peer)?)
}

/// All that said that they stop, for who looks at all seeders.
pub(crate) fn stopped(txn: &impl Txn) -> Result<HashSet<PeerId>, StoreError> {
    let mut found = HashSet::new();
    STOPPED.scan::<StoreError>(txn, .., |peer, _| {
        found.insert(peer);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}

/// Forgets what a seeder holds and was to hold, within the caller's transaction: nobody is sent there any more.
pub(crate) fn forget_holdings(txn: &WriteTransaction<'_>, peer: &PeerId) -> Result<(), StoreError> {
    for ((_, digest), _) in HELD.prefix(txn, peer, usize::MAX)? {
        HOLDERS.delete(txn, &(digest, *peer))?;
        HELD.delete(txn, &(*peer, digest))?;
        LEAVING.delete(txn, &(*peer, digest))?;
    }
    for (key, _) in PENDING.prefix(txn, peer, usize::MAX)? {
        PENDING.delete(txn, &key)?;
    }
    handover::forget_all_given_up(txn, peer)
}

fn after_bound(after: Option<PeerId>) -> (std::ops::Bound<PeerId>, std::ops::Bound<PeerId>) {
    use std::ops::Bound::{Excluded, Unbounded};
    (after.map_or(Unbounded, Excluded), Unbounded)
}

/// What is held and not in this part stays so until the last part came, which is one that is not full: a copy must not seem
/// to be gone because a message is under way, or lost. `unsaid` are those of the parts before, and what is given back.
fn store_report(
    txn: &WriteTransaction<'_>,
    peer: PeerId,
    report: &SeederReport,
    mut unsaid: HashSet<Digest>,
    now: u64,
    away_ms: u64,
) -> Result<Option<(ReportOutcome, HashSet<Digest>)>, StoreError> {
    let Some(mut record) = SEEDERS.get(txn, &peer)? else { return Ok(None) };
    let mut outcome = ReportOutcome {
        gained_room: report.free > record.free || !is_here(txn, &peer, &record, now, away_ms)?,
        ..ReportOutcome::default()
    };
    STOPPED.delete(txn, &peer)?;
    record.addrs.clone_from(&report.addrs);
    record.capacity = report.capacity;
    record.free = report.free;
    record.deliveries = report.deliveries;
    record.last_report = now;
    SEEDERS.put(txn, &peer, &record)?;

    if report.first {
        handover::as_reported(txn, peer, report, now)?;
        for digest in &report.unwanted {
            outcome.turned_down |= PENDING.delete(txn, &(peer, *digest))?;
        }
        unsaid = HELD.prefix(txn, &peer, usize::MAX)?.into_iter().map(|((_, digest), _)| digest).collect();
    }
    for digest in &report.held {
        PENDING.delete(txn, &(peer, *digest))?;
        // Only what is in the catalogue is noted: a seeder cannot fill the tables with inventions.
        if unsaid.remove(digest) || !MANIFESTS.contains(txn, digest)? {
            continue;
        }
        if HELD.insert_new(txn, &(peer, *digest), &Mark)? {
            HOLDERS.put(txn, &(*digest, peer), &Mark)?;
            GIVEN_UP.delete(txn, &(peer, *digest))?;
            outcome.gained_content = true;
        }
    }
    if report.first {
        handover::room_reported(txn, peer, report.spare)?;
    }
    if report.held.len() < SeederReport::MAX_HELD {
        for digest in unsaid.drain() {
            HELD.delete(txn, &(peer, digest))?;
            HOLDERS.delete(txn, &(digest, peer))?;
            outcome.lost_content = true;
        }
    }
    Ok(Some((outcome, unsaid)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use protocol::certificate::SeederCert;
    use protocol::manifest::{KeyPolicy, Manifest};
    use protocol::{ContentId, Keypair, NetworkId, Signed};

    fn manifest(n: u8) -> Signed<Manifest> {
        let manifest = Manifest {
            network: NetworkId::from_bytes([0; 32]),
            content: ContentId::from_bytes([n; 16]),
            root: Digest::from_bytes([0; 32]),
            length: 1,
            chunk_size: 65_536,
            segments: vec![Digest::from_bytes([0; 32])],
            key_commitment: Digest::from_bytes([0; 32]),
            policy: KeyPolicy::AtRelease,
            published_at: 0,
        };
        Signed::sign(&manifest, &Keypair::from_seed(&[9; 32]))
    }

    fn seeder(n: u8) -> (PeerId, SeederRecord) {
        let peer = PeerId::from_bytes([n; 32]);
        let cert = SeederCert {
            network: NetworkId::from_bytes([0; 32]),
            seeder: peer,
            name: "s".into(),
            capacity: 10,
            from: 0,
            until: u64::MAX,
        };
        let record = SeederRecord {
            cert: Signed::sign(&cert, &Keypair::from_seed(&[9; 32])),
            name: "s".into(),
            capacity: 10,
            addrs: Vec::new(),
            free: 0,
            deliveries: 0,
            last_report: 0,
            enrolled_at: 0,
        };
        (peer, record)
    }

    fn report(n: u8, held: &[Digest], first: bool) -> SeederReport {
        let addrs = vec![protocol::Address::new(&format!("/ip4/10.0.{}.{n}/tcp/1", n % 2)).unwrap()];
        SeederReport { addrs, held: held.to_vec(), first, free: 10, ..SeederReport::default() }
    }

    #[tokio::test]
    async fn holders_follow_reports_and_sources_are_fresh_and_spread() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path().join("m.redb"), store::Options::new(1)).unwrap();
        let registry = Registry::load(db.clone(), 100, 600_000).unwrap();
        let (known, unknown) = (manifest(1).digest(), Digest::from_bytes([7; 32]));
        db.write(move |txn| {
            MANIFESTS.put(txn, &known, &manifest(1))?;
            for n in 1..=6 {
                let (peer, record) = seeder(n);
                SEEDERS.put(txn, &peer, &record)?;
            }
            Ok::<_, StoreError>(())
        })
        .await
        .unwrap();
        let peer = |n: u8| PeerId::from_bytes([n; 32]);
        assert_eq!(registry.report(peer(99), report(1, &[], true), 1).await.unwrap(), None);

        let outcome = registry.report(peer(1), report(1, &[known, unknown], true), 1000).await.unwrap().unwrap();
        assert!(outcome.gained_content && outcome.gained_room && !outcome.lost_content);
        let again = registry.report(peer(1), report(1, &[known], true), 1001).await.unwrap().unwrap();
        assert_eq!(again, ReportOutcome::default());
        assert_eq!(registry.held_count(&peer(1)).unwrap(), 1);
        assert!(registry.db.read(|txn| HELD.contains(txn, &(peer(1), known))).unwrap());
        // A later part adds to the first and takes nothing away.
        registry.report(peer(1), report(1, &[], false), 1002).await.unwrap();
        assert!(registry.holds(&peer(1), &known).unwrap());
        for (n, at) in [(2, 1010), (3, 1020), (4, 1030), (5, 900)] {
            registry.report(peer(n), report(n, &[known], true), at).await.unwrap();
        }
        registry.set_origin(peer(6)).await.unwrap();

        let sources: Vec<PeerId> =
            registry.sources_for(&known, 1050, 32).unwrap().into_iter().map(|source| source.peer).collect();
        // 4 and 3 are the freshest of two networks; 5 has not been heard of for too long; the origin comes last.
        assert_eq!(sources, [peer(4), peer(3), peer(2), peer(1), peer(6)]);
        // One that has no room for another client comes after those who have, however fresh it is.
        let busy = SeederReport { deliveries: 8, max_deliveries: 8, ..report(4, &[known], true) };
        registry.report(peer(4), busy, 1035).await.unwrap();
        let with_room: Vec<PeerId> =
            registry.sources_for(&known, 1050, 32).unwrap().into_iter().map(|source| source.peer).collect();
        assert_eq!(with_room, [peer(3), peer(2), peer(1), peer(4), peer(6)]);
        registry.report(peer(4), report(4, &[known], true), 1036).await.unwrap();
        let two = registry.sources_for(&known, 1050, 2).unwrap();
        assert_eq!(two.iter().map(|s| s.peer).collect::<Vec<_>>(), [peer(4), peer(6)]);

        // What it offers is what it said last, not what it said when it enrolled: the share of copies goes by that.
        let grown = SeederReport { capacity: 77, ..report(3, &[known], true) };
        registry.report(peer(3), grown, 1055).await.unwrap();
        assert_eq!(registry.seeder(&peer(3)).unwrap().unwrap().capacity, 77);

        // One that stops in order is no source until it reports again, and gone only from then on.
        let here = |at: u64| {
            let record = registry.seeder(&peer(3)).unwrap().unwrap();
            let here = registry.db.read(|txn| is_here(txn, &peer(3), &record, at, 100)).unwrap();
            (here, is_heard(record.last_report, at, 100))
        };
        let named = |at| registry.sources_for(&known, at, 32).unwrap().into_iter().any(|source| source.peer == peer(3));
        registry.stops(peer(99), 1056).await.unwrap();
        registry.stops(peer(3), 1057).await.unwrap();
        assert_eq!((here(1157), here(1158), named(1058)), ((false, true), (false, false), false));
        let back = registry.report(peer(3), report(3, &[known], true), 1059).await.unwrap().unwrap();
        assert!(back.gained_room && here(1059).0 && named(1059));

        let lost = registry.report(peer(4), report(4, &[], true), 1060).await.unwrap().unwrap();
        assert!(lost.lost_content);
        assert!(!registry.holds(&peer(4), &known).unwrap());
    }
}
