//! The one database transaction in which a batch is counted: outbox, counts, money, and what was not counted and why.
//! All of it can run again: its inputs are not changed.

use bincode::{Decode, Encode};
use protocol::receipt::SealedBatch;
use protocol::settling::{Counting, Outcome};
use protocol::statement::Covered;
use protocol::{Digest, Nonce, PeerId, Refusal, RefusalCode, wire};
use store::{StoreError, Table, Txn, WriteTransaction};
use tracing::{info, warn};

use super::check::{Checked, Good, UNKNOWN_DELIVERY};
use super::log::{self, Status};
use crate::evidence;
use crate::sales::withheld::give_back;
use crate::transactions::{
    ACKS, COMPLETIONS, Event, SALES, Sale, SaleError, after_count, end_lease, get_delivery, open_delivery,
};

/// How far each outbox of each seeder was taken.
const OUTBOXES: Table<(PeerId, Nonce), Outbox> = Table::new("receipt-outboxes");

/// Most outboxes kept of one seeder; a seeder makes one in its life, and a new one after it lost its disk. The one that
/// was used longest ago makes room: should it come back, it is told to begin anew, and what it repeats counts once.
const MAX_OUTBOXES: usize = 64;

/// What is safe of an outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct Outbox {
    /// Up to and including this batch.
    pub(super) number: u64,
    /// Running hash after it.
    pub(super) running: Digest,
    /// When, unix milliseconds.
    at: u64,
}

wire!(Outbox => 64);

/// Of an outbox that nothing was taken of: all zeros come before the first batch.
const EMPTY: Outbox = Outbox { number: 0, running: Digest::from_bytes([0; 32]), at: 0 };

/// Where a batch stands towards what was taken.
pub(super) enum Place {
    /// Taken before.
    Seen(Outbox),
    /// The one that is next.
    Next,
}

/// What became of a batch.
pub(super) struct Counted {
    pub(super) outbox: Outbox,
    /// Receipts that said something new.
    pub(super) counted: usize,
    /// A lease is void, or a transaction was taken back: seeders are to hear of it.
    pub(super) revoke: bool,
}

/// Where the batch stands, or why it cannot be taken now. A gap is `wrong-state` and no fault: batches overtake each
/// other in the mesh.
pub(super) fn place(txn: &impl Txn, batch: &SealedBatch) -> Result<Place, SaleError> {
    let outbox = OUTBOXES.get(txn, &(batch.seeder, batch.incarnation))?.unwrap_or(EMPTY);
    if batch.number <= outbox.number {
        return Ok(Place::Seen(outbox));
    }
    let next = outbox.number.saturating_add(1);
    if batch.number != next {
        let detail = format!("batch {} came, {next} is next; send those between first", batch.number);
        return Err(Refusal::new(RefusalCode::WrongState, detail).retry_after(1000).into());
    }
    if batch.previous != outbox.running {
        let detail = format!("batch {next} does not follow from the one before it");
        return Err(Refusal::new(RefusalCode::BadReceipt, detail).into());
    }
    Ok(Place::Next)
}

/// Counts a batch whose receipts were checked.
pub(super) fn all(
    txn: &WriteTransaction<'_>,
    batch: &SealedBatch,
    checked: &[Checked],
    now: u64,
    grace_ms: u64,
) -> Result<Counted, SaleError> {
    // Again: the same batch may have been counted since it was opened.
    if let Place::Seen(outbox) = place(txn, batch)? {
        return Ok(Counted { outbox, counted: 0, revoke: false });
    }
    let (mut counted, mut revoke, mut statuses) = (0, false, Vec::with_capacity(checked.len()));
    for Checked { receipt, found, heard } in checked {
        // What does not count was said all the same.
        if let Some(transaction) = heard {
            evidence::heard(txn, *transaction, now)?;
        }
        let status = match found {
            Ok(good) => one(txn, batch.seeder, receipt, good, now, grace_ms)?,
            Err(refusal) => Status::Rejected(refusal.clone()),
        };
        match &status {
            Status::Counted { revoked, .. } => {
                counted += 1;
                revoke |= revoked;
            }
            Status::Duplicate => {}
            Status::Rejected(refusal) => {
                warn!(seeder = %batch.seeder, receipt = %receipt.id(), code = %refusal.code, detail = refusal.detail,
                    "receipt not counted");
            }
        }
        statuses.push((receipt, found.as_ref().ok().map(|good| &good.ack), status));
    }
    log::note_all(txn, batch.seeder, &statuses, now)?;
    let outbox = Outbox { number: batch.number, running: batch.running(), at: now };
    put_outbox(txn, batch, outbox)?;
    Ok(Counted { outbox, counted, revoke })
}

/// How far the outboxes of a seeder were taken.
pub(super) fn covered(txn: &impl Txn, seeder: &PeerId) -> Result<Vec<Covered>, StoreError> {
    let outboxes = OUTBOXES.prefix(txn, seeder, MAX_OUTBOXES)?;
    Ok(outboxes.into_iter().map(|((_, incarnation), outbox)| Covered { incarnation, number: outbox.number }).collect())
}

fn put_outbox(txn: &WriteTransaction<'_>, batch: &SealedBatch, outbox: Outbox) -> Result<(), StoreError> {
    let key = (batch.seeder, batch.incarnation);
    if !OUTBOXES.contains(txn, &key)? {
        let kept = OUTBOXES.prefix(txn, &batch.seeder, MAX_OUTBOXES)?;
        if kept.len() == MAX_OUTBOXES
            && let Some((oldest, _)) = kept.iter().min_by_key(|(_, outbox)| outbox.at)
        {
            OUTBOXES.delete(txn, oldest)?;
        }
    }
    OUTBOXES.put(txn, &key, &outbox)
}

/// Keeps what the client signed too late as evidence of the delivery, where nothing of this seeder counts.
fn keep_late(
    txn: &WriteTransaction<'_>,
    seeder: PeerId,
    receipt: &protocol::receipt::Receipt,
    good: &Good,
) -> Result<(), StoreError> {
    let id = good.delivery;
    if ACKS.prefix(txn, &(id.transaction, id.delivery), Counting::MAX_SEEDERS)?.len() < Counting::MAX_SEEDERS {
        ACKS.insert_new(txn, &(id.transaction, id.delivery, seeder), &receipt.ack)?;
    }
    if let Some(signed) = &good.completion {
        COMPLETIONS.insert_new(txn, &(id.transaction, id.delivery), signed)?;
    }
    Ok(())
}

/// Was it completed and paid, perhaps, and a restore forgot that? Its receipts come again, and those without the completion
/// first, perhaps: a purchase whose payment is only held would be taken back for them.
fn is_forgotten_perhaps(sale: &Sale, before: Option<u64>) -> Result<bool, SaleError> {
    let Some(before) = before.filter(|_| sale.awaits_completion()) else { return Ok(false) };
    Ok(sale.data.peek().map_err(Refusal::from)?.formed_at < before)
}

/// Counts one receipt. Refusals in here are its outcome, not the batch's.
fn one(
    txn: &WriteTransaction<'_>,
    seeder: PeerId,
    receipt: &protocol::receipt::Receipt,
    good: &Good,
    now: u64,
    grace_ms: u64,
) -> Result<Status, SaleError> {
    let id = good.delivery;
    let bad = |code, why: &str| Ok(Status::Rejected(Refusal::new(code, why)));
    let mut delivery = match (get_delivery(txn, id)?, &good.replication, &good.archived) {
        (Some(delivery), ..) => delivery,
        (None, Some(fresh), _) => {
            open_delivery(txn, id, fresh)?;
            fresh.clone()
        }
        // Closed: it is judged below as if it were here, and nothing of it is stored.
        (None, None, Some(closed)) => closed.clone(),
        (None, None, None) => return bad(RefusalCode::BadReceipt, UNKNOWN_DELIVERY),
    };
    let mut sale = SALES.get(txn, &id.transaction)?;
    // Asked before anything is changed: what a state forbids is this receipt's fault at most.
    if let Some(Err(refusal)) = sale.as_ref().map(|sale| sale.may(Event::Count))
        && delivery.closed.is_none()
    {
        return Ok(Status::Rejected(refusal));
    }

    let mut revoked = false;
    let mut completion = good.completion.as_ref();
    if let Some(sale) = sale.as_mut().filter(|sale| sale.awaits_completion())
        && let Some(withheld) = &good.withheld
    {
        if withheld.give_back {
            // What was delivered is counted and paid below as after any refund.
            revoked = give_back(txn, id.transaction, sale, now, grace_ms)?;
            delivery = get_delivery(txn, id)?.unwrap_or(delivery);
        } else {
            // It is not completed by this word: what was acknowledged counts, and the payment stays held.
            completion = None;
        }
    }

    // A former holder's word takes no payment that is held for another, from the mailbox or in a receipt.
    if sale.as_ref().is_some_and(|sale| sale.awaits_completion() && sale.client != delivery.client) {
        completion = None;
    }

    let claimed_before = delivery.counting.claimed_bytes(&delivery.layout);
    let outcome = delivery.counting.accept(&delivery.layout, seeder, &good.ack.chunks);
    let completed = completion.filter(|_| delivery.closed.is_none() && delivery.counting.complete());
    let new_chunks = match (outcome, completed) {
        (Outcome::Counted { new_chunks }, _) => {
            ACKS.put(txn, &(id.transaction, id.delivery, seeder), &receipt.ack)?;
            new_chunks
        }
        (Outcome::Duplicate, Some(_)) => 0,
        (Outcome::Duplicate, None) => return Ok(Status::Duplicate),
        (Outcome::Rejected { code, why }, None) => {
            if delivery.closed.is_some() && code == RefusalCode::WrongState && sale.is_some() {
                keep_late(txn, seeder, receipt, good)?;
            }
            return bad(code, why);
        }
        (Outcome::Rejected { code, why }, Some(_)) => {
            warn!(delivery = %id, %seeder, %code, why, "acknowledgement not counted, its completion is");
            0
        }
    };
    if let Some(signed) = completed {
        COMPLETIONS.put(txn, &(id.transaction, id.delivery), signed)?;
        if let Some(release) = sale.as_mut().and_then(|sale| sale.release.as_mut()) {
            release.completed_at.get_or_insert(now);
        }
    }
    info!(step = 12, transaction = %id.transaction, delivery = id.delivery, %seeder, new_chunks, "receipt counted");
    after_count(txn, id, &mut delivery, sale.as_mut(), now, grace_ms, good.forgetful_before)?;

    let (claimed, limit) = (delivery.counting.claimed_bytes(&delivery.layout), delivery.claim_limit);
    // Receipts that are on their way when the lease ends may be honest ones, and are waited for. Whoever goes on to claim
    // as much again takes a part of everybody's pay with it: then nobody is waited for any longer.
    let (passed, twice) = (claimed_before <= limit && claimed > limit, claimed > limit.saturating_mul(2));
    if delivery.closed.is_none()
        && (passed || twice)
        && let Some(sale) = sale.as_mut()
        && !is_forgotten_perhaps(sale, good.forgetful_before)?
    {
        warn!(delivery = %id, claimed, limit, "more was acknowledged than the lease allows: the lease is void");
        let late_ms = if twice { 0 } else { grace_ms };
        revoked |= end_lease(txn, id, &mut delivery, sale, (good.generation, passed), now, late_ms)?;
    }
    Ok(Status::Counted { new_chunks, revoked })
}
