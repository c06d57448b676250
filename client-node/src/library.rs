//! What was bought and where it went. The database can be open in one process at a time, and a fetch runs for hours
//! beside other commands: so it is opened for an access and stays open for a moment, since opening and closing it costs
//! more than what is done with it, and a command makes several accesses at its start. Others wait, within bounds, for
//! whoever has it.

use std::ffi::OsString;
use std::ops::ControlFlow;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bincode::{Decode, Encode};
use node::{DirLock, DirLockError};
use protocol::manifest::Manifest;
use protocol::receipt::{Completion, DeliveryId};
use protocol::ticket::{KeyGrant, Ticket, TicketEnvelope};
use protocol::{Digest, PeerAddrs, Signed, TransactionId};
use store::{Db, OpenError, Options, Step, StoreError, Table, WriteTransaction};

use crate::home::{FileError, make_private_dir};

const SCHEMA: u32 = 1;
/// Every access takes milliseconds; whoever holds the database for longer than this is stuck.
const WAIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(15);
/// It is let go of when nobody asked for so long …
const LINGER: Duration = Duration::from_millis(50);
/// … and, so that other commands get their turn, at the latest after so long.
const MOST_OPEN: Duration = Duration::from_millis(400);
/// Most records that one listing shows: far above what one person buys, and at some KiB each it fits in memory.
pub(crate) const MAX_LISTED: usize = 10_000;

const DELIVERIES: Table<TransactionId, Delivery> = Table::new("deliveries");
const ATTEMPTS: Table<Digest, Attempt> = Table::new("attempts");
/// By transaction and number of the delivery.
const DEBTS: Table<(TransactionId, u32), Debt> = Table::new("debts");

/// How far a delivery is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeliveryState {
    /// The ticket is here.
    Received,
    /// Chunks are being fetched, or were when the last run ended.
    Fetching,
    /// All chunks are here; the key or the unpacking is missing.
    Fetched,
    /// The files are in their place; also while they are fetched once more.
    Done,
    /// It can be fetched no more, for the reason that stands beside, and what was fetched was removed. Appended: its
    /// position is what is stored.
    Refused,
}

impl DeliveryState {
    /// The name in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            DeliveryState::Received => "received",
            DeliveryState::Fetching => "fetching",
            DeliveryState::Fetched => "fetched",
            DeliveryState::Done => "done",
            DeliveryState::Refused => "refused",
        }
    }
}

/// Why the last run of a delivery did not get further.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, serde::Serialize)]
pub struct Trouble {
    /// Machine-readable cause.
    pub cause: String,
    /// One line for people.
    pub detail: String,
    /// When, unix milliseconds.
    pub at: u64,
}

/// One purchase in the library.
#[derive(Clone, Debug, Encode, Decode)]
pub(crate) struct Delivery {
    /// The newest ticket.
    pub(crate) envelope: TicketEnvelope,
    /// It was checked against the network's keys; only a checked ticket takes its place.
    pub(crate) checked: bool,
    /// The key, where it came after the ticket.
    pub(crate) grant: Option<KeyGrant>,
    pub(crate) state: DeliveryState,
    pub(crate) manifest: Option<Signed<Manifest>>,
    /// Folder into which it is or was fetched, as the system's bytes.
    out: Option<Vec<u8>>,
    /// The files' place, canonical, as the system's bytes.
    place: Option<Vec<u8>>,
    /// Device and inode of what was, or is about to be, put there: nothing else is ever taken for it. At most two.
    pub(crate) inodes: Vec<(u64, u64)>,
    /// What was chosen of it; empty for everything.
    pub(crate) only: Vec<String>,
    /// The client's signed word that all of it came.
    pub(crate) completion: Option<Signed<Completion>>,
    /// The manager has it.
    pub(crate) reported: bool,
    /// Unix milliseconds; 0 for not yet.
    pub(crate) received_at: u64,
    pub(crate) started_at: u64,
    pub(crate) finished_at: u64,
    /// Ciphertext bytes here, and in all where that is known.
    pub(crate) have_bytes: u64,
    pub(crate) total_bytes: u64,
    pub(crate) files: u32,
    pub(crate) plain_bytes: u64,
    pub(crate) trouble: Option<Trouble>,
}

/// What became of a ticket that was put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    /// There was none of this sale.
    New,
    /// There was one, which may be the better one.
    Known,
    /// Nothing: under its number is another sale, whose ticket was checked.
    Other,
}

/// A purchase that was sent and not yet answered for good.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Attempt {
    /// What makes a repetition the same purchase.
    pub(crate) key: String,
    /// When it was first sent, unix milliseconds.
    pub(crate) at: u64,
}

/// What seeders are owed that served a delivery and were away when it ended: the acknowledgement, their pay hangs on it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Debt {
    /// What it was fetched by.
    pub(crate) ticket: Ticket,
    pub(crate) completion: Option<Signed<Completion>>,
    /// At most [`Debt::MOST`].
    pub(crate) seeders: Vec<PeerAddrs>,
}

impl Debt {
    /// Seeders remembered of one delivery: as many as a lease lists, and as many again that were found.
    pub(crate) const MOST: usize = 64;
}

// A ticket of 4 KiB, and a KiB for each seeder.
protocol::wire!(Debt => 80 * 1024);

// An envelope of 64 KiB, a manifest of 40 KiB, two paths of 4 KiB, selections, and small change.
protocol::wire! {
    Delivery => 192 * 1024,
    Attempt => 256,
}

impl Delivery {
    pub(crate) fn new(envelope: TicketEnvelope, now: u64) -> Self {
        Delivery {
            envelope,
            checked: false,
            grant: None,
            state: DeliveryState::Received,
            manifest: None,
            out: None,
            place: None,
            inodes: Vec::new(),
            only: Vec::new(),
            completion: None,
            reported: false,
            received_at: now,
            started_at: 0,
            finished_at: 0,
            have_bytes: 0,
            total_bytes: 0,
            files: 0,
            plain_bytes: 0,
            trouble: None,
        }
    }

    pub(crate) fn out(&self) -> Option<PathBuf> {
        self.out.clone().map(path_of)
    }

    pub(crate) fn set_out(&mut self, path: &Path) {
        self.out = Some(path.as_os_str().as_bytes().to_vec());
    }

    /// Notes how far it is. One whose files are in their place stays done while it is fetched once more: that ends with
    /// another place, or with nothing.
    pub(crate) fn set_underway(&mut self, state: DeliveryState) {
        if self.state != DeliveryState::Done {
            self.state = state;
        }
    }

    /// Notes that it ended for good, and that nothing of it is here but files in their place.
    pub(crate) fn refuse(&mut self, trouble: Trouble) {
        self.trouble = Some(trouble);
        if self.state != DeliveryState::Done {
            self.state = DeliveryState::Refused;
            self.have_bytes = 0;
        }
    }

    /// Did the run that began last put everything in its place? For one that is [`DeliveryState::Done`].
    pub(crate) fn last_run_ended(&self) -> bool {
        self.started_at <= self.finished_at
    }

    pub(crate) fn place(&self) -> Option<PathBuf> {
        self.place.clone().map(path_of)
    }

    pub(crate) fn set_place(&mut self, path: &Path) {
        self.place = Some(path.as_os_str().as_bytes().to_vec());
    }
}

fn path_of(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes))
}

/// Why the library could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// Another process did not let go of it.
    #[error("the library {} is in use by process {pid} and stays so; wait for that command or stop it", path.display())]
    Busy {
        /// Its folder.
        path: PathBuf,
        /// The process.
        pid: String,
    },
    /// The database cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The folder cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The lock cannot be taken.
    #[error(transparent)]
    Lock(DirLockError),
}

/// The database while it is open in this process. Declared in the order in which they are let go of.
#[derive(Debug)]
struct Open {
    db: Db,
    _lock: DirLock,
    since: Instant,
    used: Instant,
}

/// One home's database, open or not.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    open: Mutex<Option<Open>>,
}

impl Shelf {
    // A thread that panicked while it held this lock left the database as its last transaction did.
    fn open(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets go of the database in time; ends with that, or with the home.
fn close_in_time(shelf: &Weak<Shelf>, since: Instant) {
    loop {
        std::thread::sleep(LINGER);
        let Some(shelf) = shelf.upgrade() else { return };
        let mut slot = shelf.open();
        match &*slot {
            Some(open) if open.since == since => {
                let long = open.since.elapsed() >= MOST_OPEN;
                if long || open.used.elapsed() >= LINGER {
                    *slot = None;
                    if long {
                        // Whoever polls for it gets it now, and not the one who has had it all the time.
                        std::thread::sleep(2 * POLL);
                    }
                    return;
                }
            }
            // Closed after an error, and maybe opened anew, with a closer of its own.
            _ => return,
        }
    }
}

/// The library of one home. All methods block.
#[derive(Clone, Debug)]
pub(crate) struct Library {
    dir: PathBuf,
    wait: Duration,
    shelf: Arc<Shelf>,
}

impl Library {
    pub(crate) fn new(dir: PathBuf, shelf: Arc<Shelf>) -> Self {
        Library { dir, wait: WAIT, shelf }
    }

    /// The same, with another limit to how long it waits for others.
    #[cfg(test)]
    pub(crate) fn waiting(self, wait: Duration) -> Self {
        Library { wait, ..self }
    }

    fn with<R>(&self, work: impl FnOnce(&Db) -> Result<R, StoreError>) -> Result<R, LibraryError> {
        let mut slot = self.shelf.open();
        let mut open = match slot.take() {
            Some(open) => open,
            None => self.open()?,
        };
        let result = work(&open.db);
        // After an error it is opened anew, which repairs what can be repaired.
        if result.is_ok() {
            open.used = Instant::now();
            *slot = Some(open);
        }
        Ok(result?)
    }

    fn open(&self) -> Result<Open, LibraryError> {
        make_private_dir(&self.dir)?;
        let deadline = Instant::now() + self.wait;
        let lock = loop {
            match DirLock::acquire(&self.dir) {
                Ok(lock) => break lock,
                Err(DirLockError::Held { pid, .. }) if Instant::now() >= deadline => {
                    return Err(LibraryError::Busy { path: self.dir.clone(), pid });
                }
                Err(DirLockError::Held { .. }) => std::thread::sleep(POLL),
                Err(error) => return Err(LibraryError::Lock(error)),
            }
        };
        let path = self.dir.join("library.redb");
        let db = Db::open(&path, Options { cache_bytes: 4 * 1024 * 1024, schema: SCHEMA })?;
        let since = Instant::now();
        let shelf = Arc::downgrade(&self.shelf);
        let closer = std::thread::Builder::new().name("library".to_owned());
        closer.spawn(move || close_in_time(&shelf, since)).map_err(|source| FileError {
            doing: "start a thread for",
            path,
            source,
        })?;
        Ok(Open { db, _lock: lock, since, used: since })
    }

    pub(crate) fn get(&self, transaction: &TransactionId) -> Result<Option<Delivery>, LibraryError> {
        self.with(|db| db.read(|txn| DELIVERIES.get(txn, transaction)))
    }

    /// All, newest first.
    pub(crate) fn list(&self) -> Result<Vec<(TransactionId, Delivery)>, LibraryError> {
        self.with(|db| db.read(|txn| DELIVERIES.range_back(txn, .., MAX_LISTED)))
    }

    /// Changes one record, if there is one.
    pub(crate) fn update(
        &self,
        transaction: TransactionId,
        change: impl Fn(&mut Delivery) + Send + 'static,
    ) -> Result<(), LibraryError> {
        self.with(move |db| db.write_blocking(move |txn| changed(txn, transaction, &change)))
    }

    /// [`update`](Self::update) for a durable step of a sale.
    pub(crate) fn update_step(
        &self,
        step: Step,
        transaction: TransactionId,
        change: impl Fn(&mut Delivery) + Send + 'static,
    ) -> Result<(), LibraryError> {
        self.with(move |db| db.write_step_blocking(step, move |txn| changed(txn, transaction, &change)))
    }

    /// Puts a ticket in. One that was `checked` against its network's keys is replaced only by another such one of the same
    /// sale that is not older: anybody can write a ticket, and any network's manager can give a sale any number.
    pub(crate) fn put_ticket(
        &self,
        transaction: TransactionId,
        envelope: &TicketEnvelope,
        checked: bool,
        now: u64,
    ) -> Result<Put, LibraryError> {
        let envelope = envelope.clone();
        self.with(move |db| {
            db.write_step_blocking(Step::ClientTicket, move |txn| {
                let found = DELIVERIES.get(txn, &transaction)?;
                let mut delivery = match found {
                    Some(known) if is_same_sale(&known.envelope, &envelope) => known,
                    Some(known) if known.checked => return Ok(Put::Other),
                    // One that was never good leaves nothing to its successor.
                    _ => {
                        let new = Delivery { checked, ..Delivery::new(envelope.clone(), now) };
                        DELIVERIES.put(txn, &transaction, &new)?;
                        return Ok(Put::New);
                    }
                };
                let newer = checked && issued(&envelope) >= issued(&delivery.envelope);
                if !delivery.checked || newer {
                    let moved = generation(&envelope) != generation(&delivery.envelope);
                    let before = delivery.envelope.grant.take().filter(|_| !moved);
                    delivery.envelope = envelope.clone();
                    delivery.envelope.grant = delivery.envelope.grant.take().or(before);
                    delivery.checked = checked;
                    if moved {
                        // It went to another device and came back: what was sealed and signed for the time before is over.
                        delivery.grant = None;
                        delivery.completion = None;
                        delivery.reported = false;
                        delivery.trouble = None;
                        if delivery.state == DeliveryState::Refused {
                            delivery.state = DeliveryState::Received;
                        }
                    }
                }
                DELIVERIES.put(txn, &transaction, &delivery)?;
                Ok(Put::Known)
            })
        })
    }

    /// Notes what seeders are owed of one delivery, in place of what was noted of it before; nothing, where nobody is.
    pub(crate) fn set_debt(&self, delivery: DeliveryId, debt: Option<Debt>) -> Result<(), LibraryError> {
        let key = (delivery.transaction, delivery.delivery);
        self.with(move |db| {
            if debt.is_none() && db.read(|txn| DEBTS.get(txn, &key))?.is_none() {
                return Ok(());
            }
            db.write_blocking(move |txn| match &debt {
                Some(debt) => DEBTS.put(txn, &key, debt),
                None => DEBTS.delete(txn, &key).map(drop),
            })
        })
    }

    /// What seeders are owed of one delivery.
    pub(crate) fn debt(&self, delivery: DeliveryId) -> Result<Option<Debt>, LibraryError> {
        let key = (delivery.transaction, delivery.delivery);
        self.with(|db| db.read(|txn| DEBTS.get(txn, &key)))
    }

    /// Deliveries of which something is owed that is `wanted`.
    pub(crate) fn owed(&self, wanted: impl Fn(&Debt) -> bool) -> Result<Vec<DeliveryId>, LibraryError> {
        let mut found = Vec::new();
        self.with(|db| {
            db.read(|txn| {
                DEBTS.scan(txn, .., |(transaction, delivery), debt| {
                    if wanted(&debt) {
                        found.push(DeliveryId { transaction, delivery });
                    }
                    Ok::<_, StoreError>(if found.len() < MAX_LISTED {
                        ControlFlow::Continue(())
                    } else {
                        ControlFlow::Break(())
                    })
                })
            })
        })?;
        Ok(found)
    }

    /// What seeders are owed, the newest purchases first, at most `limit` deliveries.
    #[cfg(test)]
    pub(crate) fn debts(&self, limit: usize) -> Result<Vec<(DeliveryId, Debt)>, LibraryError> {
        let found = self.with(|db| db.read(|txn| DEBTS.range_back(txn, .., limit)))?;
        let named = |((transaction, delivery), debt)| (DeliveryId { transaction, delivery }, debt);
        Ok(found.into_iter().map(named).collect())
    }

    /// The idempotency key of a purchase: the one of an unanswered attempt at the same, or `fresh`, noted before it is
    /// used.
    pub(crate) fn begin_attempt(&self, purchase: Digest, fresh: String, now: u64) -> Result<String, LibraryError> {
        /// A merchant that has not answered by then never will.
        const OLD_MS: u64 = 90 * 24 * 3600 * 1000;
        self.with(move |db| {
            db.write_step_blocking(Step::ClientAttempt, move |txn| {
                let is_old = |attempt: &Attempt| now.saturating_sub(attempt.at) > OLD_MS;
                if let Some(attempt) = ATTEMPTS.get(txn, &purchase)?.filter(|attempt| !is_old(attempt)) {
                    return Ok(attempt.key);
                }
                for (old, attempt) in ATTEMPTS.range(txn, .., MAX_LISTED)? {
                    if is_old(&attempt) {
                        ATTEMPTS.delete(txn, &old)?;
                    }
                }
                ATTEMPTS.put(txn, &purchase, &Attempt { key: fresh.clone(), at: now })?;
                Ok(fresh.clone())
            })
        })
    }

    /// The next attempt at the same is another purchase.
    pub(crate) fn end_attempt(&self, purchase: Digest) -> Result<(), LibraryError> {
        self.with(move |db| {
            db.write_step_blocking(Step::ClientBought, move |txn| {
                ATTEMPTS.delete(txn, &purchase)?;
                Ok(())
            })
        })
    }
}

/// Are both tickets of one sale? Its data are formed once, and stay when a purchase moves or gets another lease.
pub(crate) fn is_same_sale(one: &TicketEnvelope, other: &TicketEnvelope) -> bool {
    match (one.ticket.data.peek(), other.ticket.data.peek()) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

/// The generation of a ticket's lease; 0 for what is no ticket.
pub(crate) fn generation(envelope: &TicketEnvelope) -> u32 {
    envelope.ticket.lease.peek().map_or(0, |lease| lease.generation)
}

fn changed(
    txn: &WriteTransaction<'_>,
    transaction: TransactionId,
    change: &impl Fn(&mut Delivery),
) -> Result<(), StoreError> {
    if let Some(mut delivery) = DELIVERIES.get(txn, &transaction)? {
        change(&mut delivery);
        DELIVERIES.put(txn, &transaction, &delivery)?;
    }
    Ok(())
}

/// When a ticket's lease was signed; 0 for what is no ticket.
pub(crate) fn issued(envelope: &TicketEnvelope) -> u64 {
    envelope.ticket.lease.peek().map_or(0, |lease| lease.issued_at)
}
