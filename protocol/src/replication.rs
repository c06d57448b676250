//! How content gets to a seeder: the manager's order, which another seeder checks as it checks a ticket and serves
//! with the same machines. It is a document of its own, so that no client ticket can make a copy and no order can buy.

use bincode::{Decode, Encode};

use crate::amount::Currency;
use crate::document;
use crate::ids::{Digest, NetworkId, PeerAddrs, PeerId, TransactionId};
use crate::refusal::{Refusal, RefusalCode};
use crate::signed::Signed;
use crate::ticket::{Admission, Lease};
use crate::trust::KeyPurpose;
use crate::wire;

/// One copy of one content at one seeder, paid by the network.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ReplicationOrder {
    /// The network.
    pub network: NetworkId,
    /// Receipts and money of this copy are counted under it, as delivery [`ReplicationOrder::DELIVERY`].
    pub order: TransactionId,
    /// Digest of the signed manifest.
    pub manifest: Digest,
    /// The seeder that is to hold the copy, and the only one that may fetch by it.
    pub seeder: PeerId,
    /// When it was signed, unix milliseconds.
    pub issued_at: u64,
    /// Void from then on, unix milliseconds.
    pub until: u64,
    /// Most bytes that any one seeder sends for it.
    pub allowance: u64,
    /// What the sending seeders earn: millionths of the minor unit per MiB.
    pub rate: u64,
    /// Currency of rate and ceiling.
    pub currency: Currency,
    /// Most that is paid for it together: millionths of the minor unit.
    pub ceiling: u64,
}

document!(ReplicationOrder => ReplicationOrder, 512);

impl ReplicationOrder {
    /// The delivery number under which a replication is counted.
    pub const DELIVERY: u32 = 0;

    /// The checks of [`crate::ticket::Ticket::check`], as far as they fit an order.
    ///
    /// # Errors
    /// wrong-network, wrong-client, not-yet-valid, expired, unknown-key, key-retired, bad-manager-signature, revoked; in this order.
    pub fn check(signed: &Signed<ReplicationOrder>, admission: &Admission<'_>) -> Result<ReplicationOrder, Refusal> {
        let Admission { trust, now, .. } = *admission;
        let order = signed.peek()?;
        if order.network != trust.network() {
            return Err(Refusal::new(RefusalCode::WrongNetwork, "an order of another network"));
        }
        if order.seeder != admission.peer {
            return Err(Refusal::new(RefusalCode::WrongClient, "the order names another seeder than this peer"));
        }
        trust.check_time("order", order.issued_at, order.until, now)?;
        trust.open(signed, KeyPurpose::Ticket, |o| o.issued_at, now)?;
        if admission.revoked.has_transaction(&order.order) || admission.revoked.has_peer(&order.seeder) {
            return Err(Refusal::new(RefusalCode::Revoked, "this order or its seeder was revoked"));
        }
        Ok(order)
    }
}

/// An order and where to fetch from.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Placement {
    /// The order.
    pub order: Signed<ReplicationOrder>,
    /// Seeders that hold the content, at most [`Lease::MAX_SOURCES`].
    pub sources: Vec<PeerAddrs>,
}

wire!(Placement => 64 * 1024);
const _: () = assert!(Lease::MAX_SOURCES * 1024 < 64 * 1024);
