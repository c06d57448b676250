//! The accounts of deliveries on disk. An account and the note that a receipt is to be made of it are written in one
//! step, so that no acknowledgement that was honoured can miss its receipt, whenever the power fails.

use protocol::Digest;
use protocol::serving::ServeAccount;
use store::{Db, Mark, Step, StoreError, Txn};

use crate::tables::{ACCOUNTS, AccountKey, AccountRecord, BATCHES, DUE, Due, EXPIRY, IN_BATCH};

/// Accounts looked at in one step of pruning: a step is part of a write transaction that others wait for.
const PRUNE_STEP: usize = 1000;
/// An account whose receipt is not made yet is looked at again so much later, milliseconds …
const MADE_MS: u64 = 60_000;
/// … and one whose receipt is kept, which is for a month at least.
const KEPT_MS: u64 = 60 * 60 * 1000;

/// How far a delivery is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    noted: u32,
    honoured: u32,
    completed: bool,
}

impl Standing {
    pub(crate) fn of(account: &ServeAccount) -> Self {
        Standing { noted: account.noted, honoured: account.honoured, completed: account.completion.is_some() }
    }

    /// Was anything sent, acknowledged or completed since `before`?
    pub(crate) fn is_past(&self, before: &Standing) -> bool {
        self.noted > before.noted || self.honoured > before.honoured || self.completed && !before.completed
    }
}

/// The account of a delivery, a new one if there is none. Reads the disk.
pub(crate) fn load(db: &Db, key: &AccountKey) -> Result<ServeAccount, StoreError> {
    Ok(db.read(|txn| ACCOUNTS.get(txn, key))?.map(|record| record.account).unwrap_or_default())
}

/// Stores an account. Where it holds an acknowledgement or completion that was not there before, or one that waits for
/// its receipt, the receipt is due at `due_at` (unix milliseconds) at the latest.
pub(crate) async fn save(
    db: Db,
    step: Step,
    key: AccountKey,
    account: ServeAccount,
    manifest: Digest,
    keep_until: u64,
    due_at: u64,
) -> Result<(), StoreError> {
    db.write_step(step, move |txn| {
        let old = ACCOUNTS.get(txn, &key)?;
        let keep_until = old.as_ref().map_or(keep_until, |old| old.keep_until.max(keep_until));
        let known = old.as_ref().map(|old| (&old.account.ack, &old.account.completion));
        let is_new = account.ack.is_some() && known != Some((&account.ack, &account.completion));
        let waiting = DUE.get(txn, &key)?;
        if is_new || waiting.is_some() {
            DUE.put(txn, &key, &Due { at: waiting.map_or(due_at, |due| due.at.min(due_at)) })?;
        }
        if old.as_ref().is_none_or(|old| old.keep_until != keep_until) {
            EXPIRY.put(txn, &(keep_until, key), &Mark)?;
        }
        ACCOUNTS.put(txn, &key, &AccountRecord { account: account.clone(), manifest, keep_until })
    })
    .await
}

/// Removes accounts whose time is over, a bounded number of them. True when there may be more.
pub(crate) async fn prune(db: &Db, now: u64) -> Result<bool, StoreError> {
    db.write(move |txn| {
        let expired = EXPIRY.range(txn, ..(now, [0; 52]), PRUNE_STEP)?;
        for (row @ (_, key), _) in &expired {
            EXPIRY.delete(txn, row)?;
            match ACCOUNTS.get(txn, key)? {
                // Its lease was renewed: another row stands for it.
                Some(record) if record.keep_until >= now => {}
                // Its receipt is not made yet: look again later.
                Some(_) if DUE.contains(txn, key)? => EXPIRY.put(txn, &(now.saturating_add(MADE_MS), *key), &Mark)?,
                Some(_) if is_kept(txn, key)? => EXPIRY.put(txn, &(now.saturating_add(KEPT_MS), *key), &Mark)?,
                Some(_) => {
                    ACCOUNTS.delete(txn, key)?;
                    IN_BATCH.delete(txn, key)?;
                }
                None => {}
            }
        }
        Ok(expired.len() == PRUNE_STEP)
    })
    .await
}

/// Is there a batch with its newest receipt? Should the manager lose what that is sealed to, it is made again from the
/// account.
fn is_kept(txn: &impl Txn, key: &AccountKey) -> Result<bool, StoreError> {
    match IN_BATCH.get(txn, key)? {
        Some(batch) => BATCHES.contains(txn, &batch.0),
        None => Ok(false),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use protocol::receipt::{Ack, DeliveryId, OutboxPlace, ReceiptBatch, SealedBatch};
    use protocol::{ChunkSet, Keypair, NetworkId, Nonce, PeerId, Signed, TransactionId};
    use store::Options;

    use super::*;
    use crate::tables::{BatchRecord, InBatch, SCHEMA, account_key};

    fn account(noted: u32, acked: u32) -> ServeAccount {
        let client = Keypair::from_seed(&[3; 32]);
        let ack = Ack {
            network: NetworkId::from_bytes([0; 32]),
            delivery: delivery(),
            manifest: Digest::from_bytes([1; 32]),
            seeder: PeerId::from_bytes([2; 32]),
            chunks: ChunkSet::from_range(0..acked),
            at: 5,
        };
        ServeAccount { noted, ack: (acked > 0).then(|| Signed::sign(&ack, &client)), ..ServeAccount::default() }
    }

    fn delivery() -> DeliveryId {
        DeliveryId { transaction: TransactionId::new(1, [0; 10]), delivery: 1 }
    }

    #[tokio::test]
    async fn a_receipt_is_due_once_for_each_new_acknowledgement() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path().join("db"), Options::new(SCHEMA)).unwrap();
        let key = account_key(delivery(), &PeerId::from_bytes([9; 32]));
        let manifest = Digest::from_bytes([1; 32]);
        let due = || db.read(|txn| DUE.get(txn, &key)).unwrap().map(|due| due.at);
        let save = |account, due_at| save(db.clone(), Step::SeederAcknowledged, key, account, manifest, 1000, due_at);

        save(account(2, 0), 50).await.unwrap();
        assert_eq!(due(), None, "nothing acknowledged");
        save(account(4, 2), 60).await.unwrap();
        assert_eq!(due(), Some(60));
        save(account(6, 3), 90).await.unwrap();
        assert_eq!(due(), Some(60), "a newer one does not put it off");
        save(account(6, 3), 10).await.unwrap();
        assert_eq!(due(), Some(10), "the end of a stream brings it forward");
        db.write(move |txn| DUE.delete(txn, &key)).await.unwrap();
        save(account(7, 3), 10).await.unwrap();
        assert_eq!(due(), None, "the same acknowledgement makes no second receipt");
        assert_eq!(load(&db, &key).unwrap(), account(7, 3));

        assert!(!prune(&db, 1000).await.unwrap());
        assert_eq!(load(&db, &key).unwrap(), account(7, 3), "its time is not over");
        // A batch with its receipt may have to be made again of it.
        db.write(move |txn| {
            let place = OutboxPlace {
                network: NetworkId::from_bytes([0; 32]),
                incarnation: Nonce::from_bytes([1; 16]),
                number: 4,
                previous: manifest,
            };
            let (none, seeder) = (ReceiptBatch { receipts: Vec::new() }, Keypair::from_seed(&[8; 32]));
            let batch = SealedBatch::seal(&none, &place, &seeder, seeder.peer_id(), 1, &mut rand::rng()).unwrap();
            BATCHES.put(txn, &4, &BatchRecord { batch, running: manifest, made_at: 1 })?;
            IN_BATCH.put(txn, &key, &InBatch(4))
        })
        .await
        .unwrap();
        assert!(!prune(&db, 1001).await.unwrap());
        assert_eq!(load(&db, &key).unwrap(), account(7, 3), "its receipt is kept");
        db.write(|txn| BATCHES.delete(txn, &4)).await.unwrap();
        assert!(!prune(&db, 1002 + KEPT_MS).await.unwrap());
        assert_eq!(load(&db, &key).unwrap(), ServeAccount::default());
        assert_eq!(db.read(|txn| IN_BATCH.get(txn, &key)).unwrap(), None);
    }
}
