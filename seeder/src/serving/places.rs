//! The bounds of the delivery service: places in all and for each peer, memory for chunks, and one stream at a time for
//! each delivery, whose newest stream takes over from the one before.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use delivery::Rate;
use node::{Hall, Waiting};
use protocol::{PeerId, Refusal, RefusalCode};
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;

use super::reading::PART;
use super::{overloaded, shutting_down};
use crate::config::Config;
use crate::context::Upload;
use crate::tables::AccountKey;

/// Unit in which memory is counted, bytes: the smallest chunk.
const MEMORY_UNIT: u64 = 64 * 1024;
/// As many streams for each place may be about to show a ticket.
const WAITING: usize = 4;
/// So many streams that gave their seat to a newer one say their last word at once, each of at most some 700 KiB that nobody else
/// counts; a client that takes over again and again and reads nothing would leave them behind without end. Further ones end
/// without it: their client has a newer stream.
const TAKEN_OVER: usize = 32;
/// What so many clients have shown is checked at once, or waits for that.
const CHECKS: usize = 1024;
/// Bytes a second that each stream is to get of an upload limit: with less, no chunk comes before a client gives it up.
const LEAST_RATE: u64 = 16 * 1024;
const LINE_TAKEN: &str = "the upload limit of this seeder is shared by as many deliveries as it can feed";
const ALL_TAKEN: &str = "all places of this seeder are taken";
const PEERS_TAKEN: &str = "this peer has as many deliveries at once as one may have";
/// An older stream stores its account within this time or the newer one is told to come back.
const TAKE_OVER: Duration = Duration::from_secs(10);

/// Who is served now.
pub(crate) struct Deliveries {
    max: u32,
    per_peer: u32,
    /// Clients turned away since the last report.
    turned_away: AtomicU32,
    places: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    ahead: Arc<Semaphore>,
    peers: Arc<Mutex<HashMap<PeerId, u32>>>,
    turns: Arc<Mutex<HashMap<AccountKey, Arc<Turns>>>>,
    /// Streams that have shown nothing yet, and how many there may be.
    hall: Hall,
    most_waiting: usize,
    checks: Semaphore,
    taken_over: Semaphore,
    /// The limit that all of them share, and how many have something to send.
    upload: Rate,
    sending: Arc<AtomicU32>,
}

/// A place for one stream, given back when dropped.
pub(crate) struct Place {
    peer: PeerId,
    peers: Arc<Mutex<HashMap<PeerId, u32>>>,
    _place: OwnedSemaphorePermit,
}

/// What a stream that is served takes of the bounds, given back when dropped.
pub(crate) struct Seat {
    place: Place,
    memory: OwnedSemaphorePermit,
}

struct Turns {
    // Held by the stream that the delivery's account belongs to.
    owner: Arc<tokio::sync::Mutex<()>>,
    // Cancelled when a newer stream of the delivery came.
    newest: Mutex<CancellationToken>,
    // What the older stream left to the newer one.
    seat: Mutex<Option<Seat>>,
}

/// The right to a delivery's account, for as long as no newer stream asks for it.
pub(crate) struct Turn {
    /// Cancelled when a newer stream of the same delivery asks: store the account, then drop this.
    pub(crate) superseded: CancellationToken,
    key: AccountKey,
    all: Arc<Mutex<HashMap<AccountKey, Arc<Turns>>>>,
    guard: Option<OwnedMutexGuard<()>>,
    turns: Option<Arc<Turns>>,
}

impl Deliveries {
    pub(crate) fn new(config: &Config, upload: &Upload) -> Self {
        let pool = |bytes: u64| {
            let units = usize::try_from(bytes / MEMORY_UNIT).unwrap_or(Semaphore::MAX_PERMITS);
            Arc::new(Semaphore::new(units.min(Semaphore::MAX_PERMITS)))
        };
        Deliveries {
            max: config.max_deliveries,
            per_peer: config.max_deliveries_per_peer,
            turned_away: AtomicU32::new(0),
            places: Arc::new(Semaphore::new(config.max_deliveries as usize)),
            memory: pool(config.serve_memory),
            ahead: pool(config.read_ahead_memory),
            peers: Arc::default(),
            turns: Arc::default(),
            checks: Semaphore::new(CHECKS),
            taken_over: Semaphore::new(TAKEN_OVER),
            upload: upload.process.rate().clone(),
            sending: Arc::clone(&upload.sending),
            hall: Hall::default(),
            most_waiting: (config.max_deliveries as usize).saturating_mul(WAITING).max(1),
        }
    }

    /// Is it of use that a further stream of `peer` shows its ticket, as it looks now?
    ///
    /// # Errors
    /// As of [`Deliveries::place`].
    pub(crate) fn check(&self, peer: PeerId) -> Result<(), Refusal> {
        // Perhaps it goes on with a delivery of which the older stream is dead, and takes over that one's place.
        if lock(&self.peers).contains_key(&peer) {
            return Ok(());
        }
        if self.places.available_permits() == 0 {
            return Err(self.full(ALL_TAKEN));
        }
        self.feeds_another()
    }

    /// For what a client has shown to be checked.
    ///
    /// # Errors
    /// `overloaded` when very many wait for that.
    pub(crate) fn turn_to_check(&self) -> Result<SemaphorePermit<'_>, Refusal> {
        self.checks.try_acquire().map_err(|_| overloaded("more tickets are shown at once than this seeder can check"))
    }

    /// For the last word of a stream without a seat. `None` where too many say theirs.
    pub(crate) fn last_word(&self) -> Option<SemaphorePermit<'_>> {
        self.taken_over.try_acquire().ok()
    }

    /// For a stream of `peer` that is to show a ticket.
    pub(crate) fn wait(&self, peer: PeerId) -> Waiting {
        if self.hall.len() >= self.most_waiting {
            self.hall.make_room();
        }
        self.hall.wait(peer)
    }

    /// Streams being served, and how many there may be.
    pub(crate) fn load(&self) -> (u32, u32) {
        let free = u32::try_from(self.places.available_permits()).unwrap_or(u32::MAX);
        (self.max.saturating_sub(free), self.max)
    }

    /// Clients turned away for want of a place or of memory since this was asked last: one for each try.
    pub(crate) fn turned_away(&self) -> u32 {
        self.turned_away.swap(0, Ordering::Relaxed)
    }

    /// The report that was to tell it did not arrive: it is told with the next.
    pub(crate) fn untold(&self, turned_away: u32) {
        let add = |now: u32| Some(now.saturating_add(turned_away));
        let _ = self.turned_away.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// This seeder has no more to give. What one peer may have at most is no sign of that.
    fn full(&self, what: &str) -> Refusal {
        self.turned_away.fetch_add(1, Ordering::Relaxed);
        overloaded(what)
    }

    /// All deliveries go forward alike: beyond what the line feeds none of them would get a chunk in time. Those that were
    /// asked for nothing take no part of it.
    fn feeds_another(&self) -> Result<(), Refusal> {
        let limit = self.upload.get();
        if limit > 0 && u64::from(self.sending.load(Ordering::Relaxed)) >= (limit / LEAST_RATE).max(1) {
            return Err(self.full(LINE_TAKEN));
        }
        Ok(())
    }

    /// A place for a stream of `peer`.
    ///
    /// # Errors
    /// `overloaded` when all are taken, or all of this peer, or the upload limit feeds no more.
    pub(crate) fn place(&self, peer: PeerId) -> Result<Place, Refusal> {
        self.feeds_another()?;
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place = place.map_err(|_| self.full(ALL_TAKEN))?;
        let mut peers = lock(&self.peers);
        let count = peers.entry(peer).or_default();
        if *count >= self.per_peer {
            return Err(overloaded(PEERS_TAKEN));
        }
        *count += 1;
        Ok(Place { peer, peers: Arc::clone(&self.peers), _place: place })
    }

    /// A place for a stream of `peer`, and so many bytes of memory. It sits where an older stream of its delivery sat, if
    /// there was one.
    ///
    /// # Errors
    /// As of [`Deliveries::place`] and [`Deliveries::memory`].
    pub(crate) fn seat(&self, peer: PeerId, bytes: u32, older: Option<Seat>) -> Result<Seat, Refusal> {
        let Some(Seat { place, memory }) = older else {
            return Ok(Seat { place: self.place(peer)?, memory: self.memory(bytes)? });
        };
        // Over another transport it may need more, where there is more.
        let own = Arc::clone(&self.memory).try_acquire_many_owned(units(bytes));
        Ok(Seat { place, memory: own.unwrap_or(memory) })
    }

    /// Memory for what one stream holds, see [`held_for`].
    ///
    /// # Errors
    /// `overloaded` when too much is in use.
    pub(crate) fn memory(&self, bytes: u32) -> Result<OwnedSemaphorePermit, Refusal> {
        let permit = Arc::clone(&self.memory).try_acquire_many_owned(units(bytes));
        permit.map_err(|_| self.full("the memory for deliveries is in use"))
    }

    /// Memory for a chunk that is read ahead of its time, where there is some left.
    pub(crate) fn ahead(&self, chunk_size: u32) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.ahead).try_acquire_many_owned(units(chunk_size)).ok()
    }

    /// Takes over a delivery from its older stream, if there is one, once that has stored its account.
    ///
    /// # Errors
    /// `superseded` when a newer stream came meanwhile; `overloaded` when the older one does not let go;
    /// `shutting-down`.
    pub(crate) async fn take_over(&self, key: AccountKey, stop: &CancellationToken) -> Result<Turn, Refusal> {
        let superseded = CancellationToken::new();
        let turns = {
            let mut all = lock(&self.turns);
            let turns = Arc::clone(all.entry(key).or_insert_with(|| {
                let newest = Mutex::new(CancellationToken::new());
                Arc::new(Turns { owner: Arc::default(), newest, seat: Mutex::default() })
            }));
            let older = std::mem::replace(&mut *lock(&turns.newest), superseded.clone());
            older.cancel();
            turns
        };
        let owner = Arc::clone(&turns.owner);
        // Dropped on every way out, it leaves nothing in the table.
        let mut turn = Turn { superseded, key, all: Arc::clone(&self.turns), guard: None, turns: Some(turns) };
        tokio::select! {
            biased;
            () = stop.cancelled() => Err(shutting_down()),
            () = turn.superseded.cancelled() => Err(superseded_by_newer()),
            guard = tokio::time::timeout(TAKE_OVER, owner.lock_owned()) => match guard {
                Ok(guard) => {
                    turn.guard = Some(guard);
                    Ok(turn)
                }
                Err(_) => Err(overloaded("an older stream of this delivery has not ended yet")),
            },
        }
    }
}

/// Bytes that are counted for a stream: a chunk, or, over QUIC, a part of one and all that may be on its way, if that is more.
pub(super) fn held_for(chunk_size: u32, transport: node::Transport) -> u32 {
    match transport {
        node::Transport::Quic => chunk_size.max(chunk_size.min(PART).saturating_add(node::QUIC_STREAM_BYTES)),
        node::Transport::Tcp | node::Transport::Other => chunk_size,
    }
}

fn units(bytes: u32) -> u32 {
    u32::try_from(u64::from(bytes).div_ceil(MEMORY_UNIT)).unwrap_or(u32::MAX)
}

/// Chunks that are read while one is being sent: 2 MiB, and never less than two chunks, so that disk and network work
/// at the same time.
pub(super) fn read_ahead(chunk_size: u32) -> usize {
    ((2 * 1024 * 1024) / chunk_size.max(1)).clamp(2, 8) as usize
}

pub(super) fn superseded_by_newer() -> Refusal {
    Refusal::new(RefusalCode::Superseded, "a newer stream of this delivery took over")
}

impl Turn {
    /// What the older stream left.
    pub(crate) fn older_seat(&self) -> Option<Seat> {
        lock(&self.turns.as_ref()?.seat).take()
    }

    /// The end of it. Its seat stays with the stream for its last words, unless a newer one came: that sits there from now on.
    pub(crate) fn end(self, seat: Seat) -> Option<Seat> {
        match &self.turns {
            Some(turns) if self.superseded.is_cancelled() => {
                *lock(&turns.seat) = Some(seat);
                None
            }
            _ => Some(seat),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut peers = lock(&self.peers);
        if let Some(count) = peers.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                peers.remove(&self.peer);
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut all = lock(&self.all);
        self.guard = None;
        let Some(turns) = self.turns.take() else { return };
        // The table's and this one: nobody else is served or waits.
        if Arc::strong_count(&turns) == 2 {
            all.remove(&self.key);
        }
    }
}

// A thread that panicked while it held one of these locks was between plain map operations.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::context::Sending;

    fn deliveries(edit: impl FnOnce(&mut Config)) -> Deliveries {
        let mut config = Config::default();
        edit(&mut config);
        Deliveries::new(&config, &Upload::new(0, 0))
    }

    #[test]
    fn places_are_bounded_in_all_and_for_each_peer_and_come_back() {
        let deliveries = deliveries(|config| (config.max_deliveries, config.max_deliveries_per_peer) = (3, 2));
        let (a, b) = (PeerId::from_bytes([1; 32]), PeerId::from_bytes([2; 32]));
        let held = [deliveries.place(a).unwrap(), deliveries.place(a).unwrap()];
        assert_eq!(deliveries.place(a).err().unwrap().code, RefusalCode::Overloaded);
        let third = deliveries.place(b).unwrap();
        assert_eq!(deliveries.load(), (3, 3));
        assert!(deliveries.place(b).err().unwrap().retry_after_ms > 0);
        assert_eq!((deliveries.turned_away(), deliveries.turned_away()), (1, 0), "a peer's own bound is no load");
        deliveries.untold(2);
        assert_eq!(deliveries.turned_away(), 2, "what the manager did not hear is told again");
        drop((held, third));
        assert_eq!(deliveries.load(), (0, 3));
        assert!(lock(&deliveries.peers).is_empty());
        deliveries.place(a).unwrap();
    }

    #[test]
    fn streams_that_were_taken_over_are_bounded() {
        let deliveries = deliveries(|_| {});
        let held: Vec<_> = std::iter::from_fn(|| deliveries.last_word()).take(1000).collect();
        assert_eq!(held.len(), TAKEN_OVER);
        drop(held);
        assert!(deliveries.last_word().is_some());
    }

    #[test]
    fn no_more_are_served_at_once_than_the_upload_limit_feeds() {
        let upload = Upload::new(100 * 1024, 0);
        let deliveries = Deliveries::new(&Config::default(), &upload);
        let peer = |n: u8| PeerId::from_bytes([n; 32]);
        // Streams that nothing was asked of.
        let _idle: Vec<Place> = (0..20).map(|n| deliveries.place(peer(n)).unwrap()).collect();
        let mut sending: Vec<Sending> = (0..6).map(|_| Sending::begin(&upload.sending)).collect();
        for refused in [deliveries.place(peer(20)).err().unwrap(), deliveries.check(peer(20)).unwrap_err()] {
            assert!(refused.code == RefusalCode::Overloaded && refused.retry_after_ms > 0, "{refused}");
        }
        assert_eq!(deliveries.turned_away(), 2);
        // It is changed while the seeder runs.
        upload.process.rate().set(0);
        deliveries.place(peer(20)).unwrap();
        upload.process.rate().set(1);
        sending.truncate(1);
        assert!(deliveries.place(peer(20)).is_err());
        sending.pop();
        deliveries.place(peer(20)).unwrap();
    }

    #[test]
    fn those_who_have_been_silent_for_longest_give_way() {
        let deliveries = deliveries(|config| config.max_deliveries = 2);
        let peer = |n: u8| PeerId::from_bytes([n; 32]);
        let mut waiting: Vec<Waiting> = (0..10).map(|n| deliveries.wait(peer(n))).collect();
        let out = |waiting: &[Waiting]| waiting.iter().filter(|one| one.is_crowded_out()).count();
        let (oldest, others) = waiting.split_at(2);
        assert_eq!((out(oldest), out(others)), (2, 0));
        assert!(deliveries.check(PeerId::from_bytes([1; 32])).is_ok(), "they hold no place");
        // Whoever has shown a ticket waits no more, and makes room.
        waiting.truncate(5);
        waiting.extend((10..15).map(|n| deliveries.wait(peer(n))));
        assert_eq!(out(&waiting), 2);
        drop(waiting);
        assert!(deliveries.hall.is_empty());
    }

    #[tokio::test]
    async fn the_newest_stream_gets_the_delivery_and_those_between_are_told() {
        let deliveries = Arc::new(deliveries(|_| {}));
        let (key, stop) = ([1; 52], CancellationToken::new());
        let first = deliveries.take_over(key, &stop).await.unwrap();
        let mut second = Box::pin(deliveries.take_over(key, &stop));
        assert!(futures::poll!(&mut second).is_pending());
        first.superseded.cancelled().await;
        let mut third = Box::pin(deliveries.take_over(key, &stop));
        assert!(futures::poll!(&mut third).is_pending());
        assert_eq!(second.await.err().unwrap().code, RefusalCode::Superseded);
        drop(first);
        let third = third.await.unwrap();
        assert!(!third.superseded.is_cancelled());
        drop(third);
        assert!(lock(&deliveries.turns).is_empty());
    }

    #[tokio::test]
    async fn a_newer_stream_has_the_seat_of_the_older_one_also_where_all_are_taken() {
        let chunk = 64 * 1024;
        let deliveries = deliveries(|config| (config.max_deliveries, config.serve_memory) = (1, u64::from(chunk)));
        let (key, stop, a, b) =
            ([1; 52], CancellationToken::new(), PeerId::from_bytes([1; 32]), PeerId::from_bytes([2; 32]));
        let older = deliveries.take_over(key, &stop).await.unwrap();
        let seat = deliveries.seat(a, chunk, older.older_seat()).unwrap();
        assert!(deliveries.check(a).is_ok() && deliveries.check(b).is_err());
        let mut newer = Box::pin(deliveries.take_over(key, &stop));
        assert!(futures::poll!(&mut newer).is_pending());
        assert!(older.end(seat).is_none(), "its last words need none");
        let newer = newer.await.unwrap();
        assert!(deliveries.place(b).is_err(), "nobody comes in between");
        let seat = deliveries.seat(a, chunk, newer.older_seat()).unwrap();
        assert_eq!((deliveries.load(), deliveries.turned_away()), ((1, 1), 2));
        // Another delivery of this peer has none to take over.
        assert!(deliveries.check(a).is_ok() && deliveries.seat(a, chunk, None).is_err());
        let seat = newer.end(seat);
        assert!(seat.is_some() && deliveries.seat(b, chunk, None).is_err());
        drop(seat);
        deliveries.seat(b, chunk, None).unwrap();
        assert!(lock(&deliveries.turns).is_empty());

        // What nobody takes over after all is free again.
        let older = deliveries.take_over(key, &stop).await.unwrap();
        let seat = deliveries.seat(a, chunk, older.older_seat()).unwrap();
        let mut newer = Box::pin(deliveries.take_over(key, &stop));
        assert!(futures::poll!(&mut newer).is_pending());
        older.end(seat);
        drop(newer);
        assert_eq!(deliveries.load(), (0, 1));
    }

    #[test]
    fn memory_is_one_chunk_for_each_stream_and_what_is_shared_beyond_that() {
        let mib = 1024 * 1024;
        let deliveries = deliveries(|config| (config.serve_memory, config.read_ahead_memory) = (2 * mib, 3 * mib));
        let chunk = u32::try_from(mib).unwrap();
        let ahead = [deliveries.ahead(chunk), deliveries.ahead(chunk), deliveries.ahead(chunk)];
        assert!(ahead.iter().all(Option::is_some) && deliveries.ahead(chunk).is_none());
        // What others read ahead never keeps one from being admitted.
        let held = [deliveries.memory(chunk).unwrap(), deliveries.memory(chunk).unwrap()];
        let refusal = deliveries.memory(chunk).err().unwrap();
        assert_eq!((refusal.code, refusal.retry_after_ms > 0), (RefusalCode::Overloaded, true));
        drop((ahead, held));
        assert!(deliveries.ahead(chunk).is_some() && deliveries.memory(chunk).is_ok());
    }

    #[test]
    fn over_quic_what_is_on_its_way_counts_as_well() {
        use node::Transport::{Quic, Tcp};
        let (kib, mib) = (1024, 1024 * 1024);
        assert_eq!([held_for(64 * kib, Tcp), held_for(4 * mib, Tcp)], [64 * kib, 4 * mib]);
        let window = node::QUIC_STREAM_BYTES;
        assert_eq!([held_for(64 * kib, Quic), held_for(mib, Quic)], [64 * kib + window, mib.max(128 * kib + window)]);
        assert_eq!(held_for(4 * mib, Quic), 4 * mib, "it is read whole to be verified");
    }

    #[test]
    fn read_ahead_is_two_chunks_at_least() {
        assert_eq!(read_ahead(64 * 1024), 8);
        assert_eq!(read_ahead(1024 * 1024), 2);
        assert_eq!(read_ahead(4 * 1024 * 1024), 2);
    }
}
