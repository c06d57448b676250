//! What a seeder must not forget, table by table. Nothing here can be had again from elsewhere, except the documents of
//! the network, which are kept so that a restart needs nobody.

use bincode::{Decode, Encode};
use protocol::certificate::SeederCert;
use protocol::receipt::{DeliveryId, SealedBatch};
use protocol::replication::Placement;
use protocol::serving::ServeAccount;
use protocol::statement::Statement;
use protocol::trust::{Heartbeat, KeySet, RevocationEpoch};
use protocol::{Address, ContentId, Digest, Nonce, PeerId, Signed, TransactionId, wire};
use store::{Mark, Table};

/// Number of this set of tables.
pub(crate) const SCHEMA: u32 = 2;

/// The key set in force.
pub(crate) const KEY_SET: Table<(), Signed<KeySet>> = Table::new("key set");
/// This seeder's certificate.
pub(crate) const CERTIFICATE: Table<(), Signed<SeederCert>> = Table::new("certificate");
/// The newest heartbeat heard.
pub(crate) const HEARTBEAT: Table<(), Signed<Heartbeat>> = Table::new("heartbeat");
/// The last heartbeat of each day, by restore number and day: what the manager's audit log was then.
pub(crate) const HEADS: Table<(u64, u64), Signed<Heartbeat>> = Table::new("audit heads");
/// Two documents of the network that cannot both be.
pub(crate) const FORK: Table<(), ForkNote> = Table::new("fork");
/// Contents that this seeder's operator wants to have nothing to do with, beside those in the configuration.
pub(crate) const DENIED: Table<ContentId, Mark> = Table::new("denied contents");
/// Revocation epochs by number, without gaps.
pub(crate) const EPOCHS: Table<u64, Signed<RevocationEpoch>> = Table::new("epochs");

/// What is known of each delivery.
pub(crate) const ACCOUNTS: Table<AccountKey, AccountRecord> = Table::new("accounts");
/// When accounts may go: by time.
pub(crate) const EXPIRY: Table<(u64, AccountKey), Mark> = Table::new("account expiry");
/// Deliveries with an acknowledgement or completion that is in no batch yet.
pub(crate) const DUE: Table<AccountKey, Due> = Table::new("receipts due");

/// The newest batch with a receipt of an account: while it is kept, so is the account, of which it can be made again.
pub(crate) const IN_BATCH: Table<AccountKey, InBatch> = Table::new("accounts in batches");

/// Where the outbox stands.
pub(crate) const OUTBOX: Table<(), OutboxState> = Table::new("outbox");
/// Batches by number.
pub(crate) const BATCHES: Table<u64, BatchRecord> = Table::new("batches");
/// What is in the batches, for people: by batch and place in it.
pub(crate) const LINES: Table<(u64, u16), ReceiptLine> = Table::new("receipt lines");

/// The manager's statements of account by number, without gaps.
pub(crate) const STATEMENTS: Table<u64, Signed<Statement>> = Table::new("statements");
/// Statements that the manager lost by a restore, by the restore number under which others took their place.
pub(crate) const SUPERSEDED: Table<(u64, u64), Signed<Statement>> = Table::new("superseded statements");
/// When a statement first dealt with all batches of this outbox up to a number.
pub(crate) const COVERS: Table<u64, CoveredAt> = Table::new("batches covered");
/// Version of the key set under which all statements were last found to hold.
pub(crate) const FOUND_GOOD: Table<(), Version> = Table::new("statements found good");
/// Key sets by version, under which statements were signed.
pub(crate) const OLD_KEY_SETS: Table<u64, Signed<KeySet>> = Table::new("old key sets");

/// Copies ordered and not yet made, by the digest of the signed manifest.
pub(crate) const PLACEMENTS: Table<Digest, Placement> = Table::new("placements");

/// Seeders that were met, and where: the way into the DHT while no manager answers.
pub(crate) const ACQUAINTANCES: Table<PeerId, Acquaintance> = Table::new("acquaintances");

/// One delivery to one client: 16 bytes transaction, 4 bytes delivery (big endian), 32 bytes client.
pub(crate) type AccountKey = [u8; 52];

pub(crate) fn account_key(delivery: DeliveryId, client: &PeerId) -> AccountKey {
    let mut key = [0; 52];
    let parts =
        delivery.transaction.as_bytes().iter().chain(&delivery.delivery.to_be_bytes()).copied().collect::<Vec<_>>();
    for (to, from) in key.iter_mut().zip(parts.iter().chain(client.as_bytes())) {
        *to = *from;
    }
    key
}

/// An account and what pruning needs to know of it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct AccountRecord {
    pub(crate) account: ServeAccount,
    pub(crate) manifest: Digest,
    /// Unix milliseconds.
    pub(crate) keep_until: u64,
}

/// A seeder that showed its certificate.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Acquaintance {
    pub(crate) certificate: Signed<SeederCert>,
    pub(crate) addrs: Vec<Address>,
    /// Unix milliseconds.
    pub(crate) met_at: u64,
}

/// What the operator is to look at.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct ForkNote {
    pub(crate) text: String,
}

/// A receipt that is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Due {
    /// Not before, unix milliseconds.
    pub(crate) at: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct OutboxState {
    pub(crate) incarnation: Nonce,
    /// Number of the next batch; 1 at first.
    pub(crate) next: u64,
    /// Running hash of all before it.
    pub(crate) running: Digest,
    /// Up to this number the manager has confirmed.
    pub(crate) marked: u64,
    /// Restore number of the newest mark or heartbeat.
    pub(crate) restore: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct BatchRecord {
    pub(crate) batch: Signed<SealedBatch>,
    /// Running hash after it.
    pub(crate) running: Digest,
    /// Unix milliseconds.
    pub(crate) made_at: u64,
}

/// A statement came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct CoveredAt {
    /// Unix milliseconds.
    pub(crate) at: u64,
}

/// Number of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct InBatch(pub(crate) u64);

/// A version of the key set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Version(pub(crate) u64);

/// One receipt, for people.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct ReceiptLine {
    pub(crate) id: Digest,
    pub(crate) transaction: TransactionId,
    pub(crate) delivery: u32,
    pub(crate) chunks: u32,
    pub(crate) completed: bool,
    /// Unix milliseconds.
    pub(crate) at: u64,
}

wire! {
    AccountRecord => 7 * 1024,
    Acquaintance => 4 * 1024,
    ForkNote => 512,
    Due => 16,
    CoveredAt => 16,
    Version => 16,
    InBatch => 16,
    OutboxState => 128,
    BatchRecord => 64 * 1024,
    ReceiptLine => 128,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_of_one_transaction_lie_together() {
        let (transaction, client) = (TransactionId::from_bytes([7; 16]), PeerId::from_bytes([9; 32]));
        let key = account_key(DeliveryId { transaction, delivery: 0x0102_0304 }, &client);
        assert_eq!(key.first_chunk::<16>(), Some(&[7; 16]));
        assert_eq!(key.get(16..20), Some(&[1, 2, 3, 4][..]));
        assert_eq!(key.last_chunk::<32>(), Some(&[9; 32]));
    }
}
