//! What became of each receipt, so that "why was this not paid" has an answer: the newest ones of all, and those that
//! did not count in full, with the reason, apart for each seeder.

use bincode::{Decode, Encode};
use protocol::receipt::{Ack, DeliveryId, Receipt};
use protocol::statement::{ReceiptFate, ReceiptLine};
use protocol::{Digest, PeerId, Refusal, RefusalCode, TransactionId, wire};
use serde_json::{Value, json};
use store::{StoreError, Table, Txn, WriteTransaction};

use super::check;
use crate::statements;

/// Newest receipts, in the order in which they were counted.
const NOTES: Table<u64, Note> = Table::new("receipt-notes");
/// Receipts that were not counted.
const REJECTED: Table<(PeerId, u64), Rejected> = Table::new("receipts-rejected");

/// Most notes kept: an hour of a busy network, and about 15 MB.
const MAX_NOTES: u64 = 100_000;
/// Most rejected receipts kept of one seeder, about 1 MB: the oldest make room.
const MAX_REJECTED: u64 = 256;

/// What became of a receipt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// It said something new.
    Counted {
        /// So many chunks more.
        new_chunks: u32,
        /// More was acknowledged by now than the lease allows, and it was made void for it.
        revoked: bool,
    },
    /// It said nothing new.
    Duplicate,
    /// It does not count.
    Rejected(Refusal),
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
struct Note {
    at: u64,
    seeder: PeerId,
    receipt: Digest,
    transaction: Option<TransactionId>,
    delivery: u32,
    chunks: u32,
    new_chunks: u32,
    rejected: Option<(RefusalCode, String)>,
}

/// A receipt that did not count, whole, for a dispute.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
struct Rejected {
    note: Note,
    receipt: Receipt,
}

wire! {
    Note => 1024,
    Rejected => 7 * 1024,
}

/// Notes what became of the receipts of a batch. The acknowledgement of one is given where it was decoded before.
pub(super) fn note_all(
    txn: &WriteTransaction<'_>,
    seeder: PeerId,
    statuses: &[(&Receipt, Option<&Ack>, Status)],
    at: u64,
) -> Result<(), StoreError> {
    let mut lines = Vec::with_capacity(statuses.len());
    let mut newest = NOTES.last(txn)?.map_or(0, |(number, _)| number);
    for (receipt, ack, status) in statuses {
        let (note, delivery) = match ack {
            Some(ack) => note_of(seeder, receipt, Some(ack), status, at),
            // What does not decode has no transaction to name.
            None => note_of(seeder, receipt, receipt.ack.peek().ok().as_ref(), status, at),
        };
        lines.push(line_of(&note, delivery, status));
        if note.rejected.is_some() {
            keep_rejected(txn, seeder, receipt, &note)?;
        }
        newest = newest.saturating_add(1);
        NOTES.put(txn, &newest, &note)?;
    }
    statements::receipts(txn, &seeder, lines)?;
    if let Some(old) = newest.checked_sub(MAX_NOTES) {
        NOTES.delete_range(txn, ..=old, statuses.len())?;
    }
    Ok(())
}

fn note_of(
    seeder: PeerId,
    receipt: &Receipt,
    ack: Option<&Ack>,
    status: &Status,
    at: u64,
) -> (Note, Option<DeliveryId>) {
    let note = Note {
        at,
        seeder,
        receipt: receipt.id(),
        transaction: ack.map(|ack| ack.delivery.transaction),
        delivery: ack.map_or(0, |ack| ack.delivery.delivery),
        chunks: ack.map_or(0, |ack| ack.chunks.len()),
        new_chunks: match status {
            Status::Counted { new_chunks, .. } => *new_chunks,
            Status::Duplicate | Status::Rejected(_) => 0,
        },
        rejected: match status {
            Status::Rejected(refusal) => Some((refusal.code, refusal.detail.clone())),
            Status::Counted { .. } | Status::Duplicate => None,
        },
    };
    (note, ack.map(|ack| ack.delivery))
}

fn keep_rejected(txn: &WriteTransaction<'_>, seeder: PeerId, receipt: &Receipt, note: &Note) -> Result<(), StoreError> {
    let (first, last) = ((seeder, 0), (seeder, u64::MAX));
    let newest = REJECTED.range_back(txn, first..=last, 1)?.pop();
    let number = newest.map_or(0, |((_, number), _)| number).saturating_add(1);
    REJECTED.put(txn, &(seeder, number), &Rejected { note: note.clone(), receipt: receipt.clone() })?;
    if let Some(old) = number.checked_sub(MAX_REJECTED) {
        REJECTED.delete(txn, &(seeder, old))?;
    }
    Ok(())
}

/// The same for the seeder's statement.
fn line_of(note: &Note, delivery: Option<DeliveryId>, status: &Status) -> ReceiptLine {
    let fate = match status {
        Status::Counted { .. } => ReceiptFate::Accepted,
        Status::Duplicate => ReceiptFate::Duplicate,
        Status::Rejected(refusal) => fate_of_rejected(refusal.code, &refusal.detail),
    };
    ReceiptLine { receipt: note.receipt, delivery, at: note.at, chunks: note.chunks, new_chunks: note.new_chunks, fate }
}

fn fate_of_rejected(code: RefusalCode, reason: &str) -> ReceiptFate {
    match check::is_unknown(code, reason) {
        true => ReceiptFate::Unknown,
        false => ReceiptFate::Rejected { code, reason: reason.to_owned() },
    }
}

/// By the name that the seeder's statement has for it.
fn fate_of(note: &Note) -> ReceiptFate {
    match &note.rejected {
        Some((code, reason)) => fate_of_rejected(*code, reason),
        None if note.new_chunks > 0 => ReceiptFate::Accepted,
        None => ReceiptFate::Duplicate,
    }
}

/// The newest notes, newest first: of all seeders, or what of one seeder was not counted.
pub(crate) fn to_json(txn: &impl Txn, seeder: Option<PeerId>, limit: usize) -> Result<Value, StoreError> {
    let notes: Vec<Note> = match seeder {
        None => NOTES.range_back(txn, .., limit)?.into_iter().map(|(_, note)| note).collect(),
        Some(seeder) => {
            let rejected = REJECTED.range_back(txn, (seeder, 0)..=(seeder, u64::MAX), limit)?;
            rejected.into_iter().map(|(_, rejected)| rejected.note).collect()
        }
    };
    let lines: Vec<Value> = notes
        .iter()
        .map(|note| {
            let status = match fate_of(note) {
                // So it is called wherever counting is spoken of.
                ReceiptFate::Accepted => "counted",
                fate => fate.as_str(),
            };
            json!({
                "at": note.at, "seeder": note.seeder, "receipt": note.receipt, "transaction": note.transaction,
                "delivery": note.delivery, "chunks": note.chunks, "new_chunks": note.new_chunks, "status": status,
                "code": note.rejected.as_ref().map(|(code, _)| code.as_str()),
                "reason": note.rejected.as_ref().map(|(_, reason)| reason),
            })
        })
        .collect();
    Ok(json!({"receipts": lines}))
}
