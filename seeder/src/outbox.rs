//! Receipts on their way to the manager. Those that are due go into a numbered batch that is sealed, signed and stored
//! before it is sent anywhere; it is sent until the manager's mark says that it has it, and kept long after.
//!
//! This module holds what is durable; `post` sends.

use std::ops::{Bound, ControlFlow};

use protocol::api::GossipedBatch;
use protocol::codec;
use protocol::receipt::{Ack, Completion, Mark, OutboxPlace, Receipt, ReceiptBatch, SealedBatch};
use protocol::trust::KeyPurpose;
use protocol::{Digest, Nonce, Refusal, RefusalCode, Signed};
use store::{Db, Step, StoreError, Txn, WriteTransaction};

use crate::clock::{is_due, now_ms};
use crate::context::Seeder;
use crate::tables::{
    ACCOUNTS, AccountKey, BATCHES, BatchRecord, COVERS, DUE, IN_BATCH, InBatch, LINES, OUTBOX, OutboxState, ReceiptLine,
};

/// Batches removed in one step of pruning.
const PRUNE_STEP: usize = 256;

/// Why no batch was made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BatchError {
    /// Not now.
    #[error("{0}")]
    Waits(String),
    /// The disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Makes sure that there is an outbox.
pub(crate) async fn open(db: &Db) -> Result<OutboxState, StoreError> {
    let state = OutboxState {
        incarnation: Nonce::from_bytes(rand::random()),
        next: 1,
        running: Digest::from_bytes([0; 32]),
        marked: 0,
        restore: 0,
    };
    db.write(move |txn| {
        if let Some(state) = OUTBOX.get(txn, &())? {
            return Ok(state);
        }
        OUTBOX.put(txn, &(), &state)?;
        Ok(state.clone())
    })
    .await
}

/// A receipt that is to be put into a batch, and what it was made of.
struct Chosen {
    key: AccountKey,
    receipt: Receipt,
    chunks: u32,
}

/// What a batch has of a delivery.
type Done = (AccountKey, Signed<Ack>, Option<Signed<Completion>>);

/// Puts receipts that are due into one batch. `None` when none is; at most [`ReceiptBatch::MAX_RECEIPTS`] go at a time.
/// Only one caller at a time.
pub(crate) async fn make_batch(seeder: &Seeder, now: u64) -> Result<Option<u64>, BatchError> {
    let (db, interval_ms) = (seeder.db.clone(), seeder.config.receipt_interval_ms);
    let chosen = tokio::task::spawn_blocking(move || choose(&db, now, interval_ms)).await;
    let (state, chosen) = chosen.map_err(|error| BatchError::Waits(error.to_string()))??;
    if chosen.is_empty() {
        return Ok(None);
    }
    if state.next.saturating_sub(state.marked) > seeder.config.max_waiting_batches {
        let text =
            format!("{} batches of receipts wait for the manager; no more are made", state.next - state.marked - 1);
        return Err(BatchError::Waits(text));
    }
    let (record, lines) = seal(seeder, &state, &chosen, now)?;
    let number = state.next;
    let done: Vec<Done> = chosen.iter().map(|c| (c.key, c.receipt.ack.clone(), c.receipt.completion.clone())).collect();
    let count = lines.len() as u64;
    let stored =
        seeder.db.write_step(Step::SeederBatch, move |txn| store_batch(txn, &state, &record, &lines, &done)).await?;
    if !stored {
        // They are due in the new outbox.
        return Ok(None);
    }
    seeder.counts.batches.inc();
    seeder.counts.receipts.inc_by(count);
    for line in &chosen {
        if let Ok(ack) = line.receipt.ack.peek() {
            tracing::info!(step = 12, transaction = %ack.delivery.transaction, batch = number, "receipt queued");
        }
    }
    Ok(Some(number))
}

/// Stores a batch that was sealed as the next one of an outbox. False, and nothing is stored, where that was begun anew
/// meanwhile: no batch of one outbox may follow those of another.
fn store_batch(
    txn: &WriteTransaction<'_>,
    sealed_as: &OutboxState,
    record: &BatchRecord,
    lines: &[ReceiptLine],
    done: &[Done],
) -> Result<bool, StoreError> {
    let number = sealed_as.next;
    let Some(mut state) = OUTBOX.get(txn, &())? else { return Ok(false) };
    if (state.incarnation, state.next) != (sealed_as.incarnation, number) {
        return Ok(false);
    }
    BATCHES.put(txn, &number, record)?;
    for (index, line) in (0u16..).zip(lines) {
        LINES.put(txn, &(number, index), line)?;
    }
    state.next = number + 1;
    state.running = record.running;
    OUTBOX.put(txn, &(), &state)?;
    for (key, ack, completion) in done {
        IN_BATCH.put(txn, key, &InBatch(number))?;
        // One that came meanwhile stays due.
        let now = ACCOUNTS.get(txn, key)?.map(|record| record.account);
        if now.is_none_or(|account| account.ack.as_ref() == Some(ack) && account.completion == *completion) {
            DUE.delete(txn, key)?;
        }
    }
    Ok(true)
}

fn choose(db: &Db, now: u64, interval_ms: u64) -> Result<(OutboxState, Vec<Chosen>), StoreError> {
    db.read(|txn| {
        let missing = || StoreError::Failed { reason: "the outbox is not open".to_owned() };
        let state = OUTBOX.get(txn, &())?.ok_or_else(missing)?;
        let (mut chosen, mut bytes) = (Vec::new(), 64);
        // All of them, as far as needed: those that are not due yet are no more than the deliveries that run, and must not
        // keep one from being seen that comes after them by its name.
        DUE.scan::<StoreError>(txn, .., |key, due| {
            if !is_due(due.at, now, interval_ms) {
                return Ok(ControlFlow::Continue(()));
            }
            let Some(account) = ACCOUNTS.get(txn, &key)?.map(|record| record.account) else {
                return Ok(ControlFlow::Continue(()));
            };
            let Some(ack) = account.ack else { return Ok(ControlFlow::Continue(())) };
            let chunks = ack.peek().map_or(0, |ack| ack.chunks.len());
            let (first_at, last_at) = (account.first_at, account.last_at);
            let receipt = Receipt { ack, completion: account.completion, first_at, last_at };
            let length = codec::encode(&receipt).len();
            if bytes + length > ReceiptBatch::MAX_BYTES {
                return Ok(ControlFlow::Break(()));
            }
            bytes += length;
            chosen.push(Chosen { key, receipt, chunks });
            let full = chosen.len() >= ReceiptBatch::MAX_RECEIPTS;
            Ok(if full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        Ok((state, chosen))
    })
}

fn seal(
    seeder: &Seeder,
    state: &OutboxState,
    chosen: &[Chosen],
    now: u64,
) -> Result<(BatchRecord, Vec<ReceiptLine>), BatchError> {
    let waits = |text: &str| BatchError::Waits(text.to_owned());
    let trust = seeder.network.trust().ok_or_else(|| waits("the network's keys are not known yet"))?;
    let to = trust
        .active_key(KeyPurpose::ReceiptSealing)
        .ok_or_else(|| waits("the network's key set names no key that receipts are sealed to"))?;
    let place = OutboxPlace {
        network: seeder.network.id,
        incarnation: state.incarnation,
        number: state.next,
        previous: state.running,
    };
    let receipts = chosen.iter().map(|chosen| chosen.receipt.clone()).collect();
    let batch = SealedBatch::seal(&ReceiptBatch { receipts }, &place, &seeder.keypair, to, now, &mut rand::rng())
        .map_err(|error| BatchError::Waits(format!("receipts cannot be sealed to {to}: {error}")))?;
    let running = batch.peek().map_err(|error| BatchError::Waits(error.to_string()))?.running();
    let line = |chosen: &Chosen| {
        let ack = chosen.receipt.ack.peek().ok()?;
        Some(ReceiptLine {
            id: chosen.receipt.id(),
            transaction: ack.delivery.transaction,
            delivery: ack.delivery.delivery,
            chunks: chosen.chunks,
            completed: chosen.receipt.completion.is_some(),
            at: chosen.receipt.last_at,
        })
    };
    Ok((BatchRecord { batch, running, made_at: now }, chosen.iter().filter_map(line).collect()))
}

/// The oldest batch that the manager has not marked, after `after`.
pub(crate) fn next_unmarked(db: &Db, after: u64) -> Result<Option<(u64, BatchRecord)>, StoreError> {
    db.read(|txn| {
        let marked = OUTBOX.get(txn, &())?.map_or(0, |state| state.marked);
        let from = Bound::Excluded(marked.max(after));
        Ok(BATCHES.range(txn, (from, Bound::Unbounded), 1)?.pop())
    })
}

/// Where the outbox stands.
pub(crate) fn state(db: &Db) -> Result<Option<OutboxState>, StoreError> {
    db.read(|txn| OUTBOX.get(txn, &()))
}

/// What goes out by gossip.
pub(crate) fn gossiped(seeder: &Seeder, batch: Signed<SealedBatch>) -> Result<Vec<u8>, Refusal> {
    let certificate = seeder.network.certificate(now_ms())?;
    Ok(codec::encode(&GossipedBatch { certificate, batch }))
}

/// What became of a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Marked {
    /// It is this outbox's, and up to this number everything is safe.
    UpTo {
        /// Of the batch.
        number: u64,
        /// That was not known yet.
        new: bool,
    },
    /// It is another seeder's, or of an outbox before this one.
    NotOurs,
    /// It is from before a restore of the manager, which may have lost since what this says is safe.
    Outdated,
}

/// Takes the manager's mark, whoever brought it.
///
/// # Errors
/// The refusal of a mark that is not good; `bad-receipt` for one that names other batches than this outbox's.
pub(crate) async fn take_mark(seeder: &Seeder, signed: &Signed<Mark>) -> Result<Marked, crate::network::TakeError> {
    let now = now_ms();
    let unknown = || Refusal::new(RefusalCode::NotEnrolled, "the network's keys are not known here yet");
    let trust = seeder.network.trust().ok_or_else(unknown)?;
    let mark = trust.open(signed, KeyPurpose::Settlement, |m| m.at, now)?;
    if mark.network != seeder.network.id {
        return Err(Refusal::new(RefusalCode::WrongNetwork, "a mark of another network").into());
    }
    if mark.seeder != seeder.peer {
        return Ok(Marked::NotOurs);
    }
    // Anybody may say an old one again, as often as it likes: a write is for those that say something new.
    let weighed = match seeder.db.read(|txn| weigh(txn, &mark))? {
        Weighed::New(_) => {
            let taken = mark.clone();
            let write = move |txn: &WriteTransaction<'_>| {
                let weighed = weigh(txn, &taken)?;
                if let Weighed::New(state) = &weighed {
                    OUTBOX.put(txn, &(), state)?;
                }
                Ok::<_, StoreError>(weighed)
            };
            seeder.db.write_step(Step::SeederMark, write).await?
        }
        nothing_new => nothing_new,
    };
    match weighed {
        Weighed::Known(marked) => Ok(marked),
        Weighed::New(state) => {
            log_marked(seeder, state.marked);
            Ok(Marked::UpTo { number: state.marked, new: true })
        }
        Weighed::Wrong => {
            let detail = format!("the manager's mark names batch {} otherwise than it is here", mark.number);
            seeder.notes.receipts.set(detail.clone());
            tracing::error!("{detail}");
            Err(Refusal::new(RefusalCode::BadReceipt, detail).into())
        }
    }
}

/// What a mark of this seeder says.
#[derive(Clone)]
enum Weighed {
    /// Nothing new.
    Known(Marked),
    /// This is how the outbox stands by it.
    New(OutboxState),
    /// It names another batch than this outbox's.
    Wrong,
}

fn weigh(txn: &impl Txn, mark: &Mark) -> Result<Weighed, StoreError> {
    let Some(mut state) = OUTBOX.get(txn, &())?.filter(|state| state.incarnation == mark.incarnation) else {
        return Ok(Weighed::Known(Marked::NotOurs));
    };
    if mark.restore < state.restore {
        return Ok(Weighed::Known(Marked::Outdated));
    }
    if mark.number <= state.marked && mark.restore <= state.restore {
        return Ok(Weighed::Known(Marked::UpTo { number: state.marked, new: false }));
    }
    let running = match mark.number {
        0 => Some(Digest::from_bytes([0; 32])),
        number => BATCHES.get(txn, &number)?.map(|record| record.running),
    };
    // Absent: marked long ago and pruned, or never made.
    if running != Some(mark.running) {
        return Ok(Weighed::Wrong);
    }
    // After a restore the manager may have less than it had: what it lost is sent again.
    state.marked = mark.number;
    state.restore = state.restore.max(mark.restore);
    Ok(Weighed::New(state))
}

fn log_marked(seeder: &Seeder, number: u64) {
    let lines = seeder.db.read(|txn| LINES.prefix(txn, &number, ReceiptBatch::MAX_RECEIPTS)).unwrap_or_default();
    for (_, line) in lines {
        tracing::info!(step = 12, transaction = %line.transaction, batch = number, "receipt acknowledged by manager");
    }
}

/// The manager came back from a backup: everything that is kept is sent again.
pub(crate) async fn restored(seeder: &Seeder, restore: u64) -> Result<bool, StoreError> {
    seeder
        .db
        .write_step(Step::SeederRestored, move |txn| {
            let Some(mut state) = OUTBOX.get(txn, &())? else { return Ok(false) };
            if restore <= state.restore {
                return Ok(false);
            }
            state.restore = restore;
            let again = state.marked > 0;
            state.marked = 0;
            OUTBOX.put(txn, &(), &state)?;
            Ok(again)
        })
        .await
}

/// Counts every batch that is kept as not marked. False when that changes nothing.
pub(crate) async fn rewind(db: &Db) -> Result<bool, StoreError> {
    db.write(|txn| {
        let Some(mut state) = OUTBOX.get(txn, &())? else { return Ok(false) };
        let changes = state.marked > 0;
        state.marked = 0;
        OUTBOX.put(txn, &(), &state)?;
        Ok(changes)
    })
    .await
}

/// Begins a new outbox when the manager cannot follow the old one (this database, or the manager's, was set back), or
/// lost the key that it is sealed to: all that was ever acknowledged and is still kept becomes due again, under a new
/// incarnation. An account is kept for as long as a batch with its receipt, so that nothing is lost by it; what the
/// manager has already, it counts once.
pub(crate) async fn start_over(db: &Db) -> Result<(), StoreError> {
    let incarnation = Nonce::from_bytes(rand::random());
    db.write(move |txn| {
        let restore = OUTBOX.get(txn, &())?.map_or(0, |state| state.restore);
        let state = OutboxState { incarnation, next: 1, running: Digest::from_bytes([0; 32]), marked: 0, restore };
        OUTBOX.put(txn, &(), &state)?;
        BATCHES.delete_range(txn, .., usize::MAX)?;
        LINES.delete_range(txn, .., usize::MAX)?;
        COVERS.delete_range(txn, .., usize::MAX)?;
        IN_BATCH.delete_range(txn, .., usize::MAX)?;
        let mut keys = Vec::new();
        ACCOUNTS.scan(txn, .., |key, record| {
            if record.account.ack.is_some() {
                keys.push(key);
            }
            Ok::<_, StoreError>(ControlFlow::Continue(()))
        })?;
        for key in keys {
            DUE.put(txn, &key, &crate::tables::Due { at: 0 })?;
        }
        Ok(())
    })
    .await
}

/// Removes marked batches that a statement dealt with before the given time. True when there may be more.
pub(crate) async fn prune(db: &Db, covered_before: u64) -> Result<bool, StoreError> {
    db.write(move |txn| {
        let marked = OUTBOX.get(txn, &())?.map_or(0, |state| state.marked);
        // The newest marked one stays: its running hash is what a repeated mark is checked against.
        let mut covered = None;
        for (number, record) in COVERS.range(txn, .., PRUNE_STEP)? {
            if record.at < covered_before {
                // What is covered by a later one is covered by this one, too.
                if let Some(earlier) = covered.replace(number) {
                    COVERS.delete(txn, &earlier)?;
                }
            }
        }
        let Some(covered) = covered else { return Ok(false) };
        let old: Vec<u64> = BATCHES
            .range(txn, ..marked.min(covered.saturating_add(1)), PRUNE_STEP)?
            .into_iter()
            .map(|(number, _)| number)
            .collect();
        for number in &old {
            BATCHES.delete(txn, number)?;
            LINES.delete_range(txn, (*number, 0)..=(*number, u16::MAX), usize::MAX)?;
        }
        Ok(old.len() == PRUNE_STEP)
    })
    .await
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use protocol::{Keypair, NetworkId};
    use store::Options;

    use super::*;
    use crate::tables::{Due, SCHEMA};

    fn sealed(state: &OutboxState) -> BatchRecord {
        let place = OutboxPlace {
            network: NetworkId::from_bytes([0; 32]),
            incarnation: state.incarnation,
            number: state.next,
            previous: state.running,
        };
        let (none, seeder) = (ReceiptBatch { receipts: Vec::new() }, Keypair::from_seed(&[8; 32]));
        let batch = SealedBatch::seal(&none, &place, &seeder, seeder.peer_id(), 1, &mut rand::rng()).unwrap();
        let running = batch.peek().unwrap().running();
        BatchRecord { batch, running, made_at: 1 }
    }

    fn ack() -> Signed<Ack> {
        let client = Keypair::from_seed(&[3; 32]);
        let transaction = protocol::TransactionId::new(1, [0; 10]);
        let ack = Ack {
            network: NetworkId::from_bytes([0; 32]),
            delivery: protocol::receipt::DeliveryId { transaction, delivery: 1 },
            manifest: Digest::from_bytes([1; 32]),
            seeder: client.peer_id(),
            chunks: protocol::ChunkSet::from_range(0..1),
            at: 5,
        };
        Signed::sign(&ack, &client)
    }

    #[tokio::test]
    async fn a_receipt_that_is_due_is_seen_behind_however_many_that_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path().join("db"), Options::new(SCHEMA)).unwrap();
        open(&db).await.unwrap();
        let (now, interval_ms, newest) = (1_000_000, 60_000, [255; 52]);
        db.write(move |txn| {
            for n in 0..6000_u64 {
                let mut key = [0; 52];
                key.iter_mut().zip(n.to_be_bytes()).for_each(|(to, from)| *to = from);
                DUE.put(txn, &key, &Due { at: now + 1 })?;
            }
            DUE.put(txn, &newest, &Due { at: now })
        })
        .await
        .unwrap();
        let account = protocol::serving::ServeAccount { ack: Some(ack()), ..Default::default() };
        let manifest = Digest::from_bytes([1; 32]);
        crate::accounts::save(db.clone(), Step::SeederClosed, newest, account, manifest, 0, now).await.unwrap();
        let (_, chosen) = choose(&db, now, interval_ms).unwrap();
        assert_eq!(chosen.iter().map(|chosen| chosen.key).collect::<Vec<_>>(), [newest]);
    }

    #[tokio::test]
    async fn a_batch_that_was_sealed_for_an_outbox_before_this_one_is_not_put_into_it() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path().join("db"), Options::new(SCHEMA)).unwrap();
        let key = [7; 52];
        let done: Vec<Done> = vec![(key, ack(), None)];
        let store = |state: &OutboxState| {
            let (state, record, done) = (state.clone(), sealed(state), done.clone());
            db.write(move |txn| {
                DUE.put(txn, &key, &Due { at: 0 })?;
                store_batch(txn, &state, &record, &[], &done)
            })
        };
        let first = open(&db).await.unwrap();
        assert!(store(&first).await.unwrap());
        let second = state(&db).unwrap().unwrap();
        assert_eq!(second.next, 2);
        // While the next one was being sealed.
        start_over(&db).await.unwrap();
        let anew = state(&db).unwrap().unwrap();
        for old in [first, second] {
            assert!(!store(&old).await.unwrap());
            assert_eq!(state(&db).unwrap().unwrap(), anew);
            assert!(next_unmarked(&db, 0).unwrap().is_none());
            assert!(db.read(|txn| DUE.get(txn, &key)).unwrap().is_some(), "it is due still");
        }
        assert!(store(&anew).await.unwrap());
        assert_eq!(next_unmarked(&db, 0).unwrap().map(|(number, _)| number), Some(1));
        assert!(db.read(|txn| DUE.get(txn, &key)).unwrap().is_none());
    }
}
