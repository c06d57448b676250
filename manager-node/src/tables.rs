//! Every table of the catalogue side in one place, because a table's name stands for its key and record types for as
//! long as a file lives: two modules that chose one name would read each other's bytes.

use bincode::{Decode, Encode};
use protocol::certificate::{MerchantCert, SeederCert};
use protocol::manifest::Manifest;
use protocol::replication::ReplicationOrder;
use protocol::trust::{InvitedRole, RevocationEpoch};
use protocol::{Address, Amount, ContentId, Digest, PeerId, ProductId, Signed, TransactionId, wire};
use store::{Mark, Table};

/// Number of this set of tables; counts up when a record's form changes.
pub(crate) const SCHEMA: u32 = 2;

/// Products by id.
pub(crate) const PRODUCTS: Table<ProductId, ProductRecord> = Table::new("products");
/// Which product a signed manifest belongs to.
pub(crate) const PRODUCT_OF_MANIFEST: Table<Digest, ProductRef> = Table::new("product-of-manifest");
/// Signed manifests by their digest; apart from the products, because they are up to 40 KiB long.
pub(crate) const MANIFESTS: Table<Digest, Signed<Manifest>> = Table::new("manifests");
/// Which product a content id belongs to, for takedowns.
pub(crate) const PRODUCT_OF_CONTENT: Table<ContentId, ProductRef> = Table::new("product-of-content");

/// Enrolled merchants.
pub(crate) const MERCHANTS: Table<PeerId, MerchantRecord> = Table::new("merchants");
/// Enrolled seeders and their last report.
pub(crate) const SEEDERS: Table<PeerId, SeederRecord> = Table::new("seeders");
/// Who holds a content, by manifest digest.
pub(crate) const HOLDERS: Table<(Digest, PeerId), Mark> = Table::new("holders");
/// What a seeder holds: [`HOLDERS`] the other way round.
pub(crate) const HELD: Table<(PeerId, Digest), Mark> = Table::new("held");
/// Invitations by the digest of their token.
pub(crate) const INVITATIONS: Table<Digest, InvitationRecord> = Table::new("invitations");

/// Copies that were ordered and not yet reported as held.
pub(crate) const PENDING: Table<(PeerId, Digest), OrderRef> = Table::new("pending-placements");
/// Copies that their seeders want to let go of, and may not yet.
pub(crate) const LEAVING: Table<(PeerId, Digest), LeavingRecord> = Table::new("leaving-copies");
/// Copies that their seeders removed because there were enough others.
pub(crate) const GIVEN_UP: Table<(PeerId, Digest), GivenUpRecord> = Table::new("given-up-copies");
/// What room a seeder had left after it last gave something up.
pub(crate) const ROOM_LEFT: Table<PeerId, RoomLeftRecord> = Table::new("room-left-after-giving-up");
/// Seeders that said that they stop, and did not report since.
pub(crate) const STOPPED: Table<PeerId, Mark> = Table::new("stopped-seeders");
/// Every replication order, also the fulfilled ones: receipts and money are counted under them.
pub(crate) const ORDERS: Table<TransactionId, OrderRecord> = Table::new("replication-orders");

/// How often a copy was ordered at the same seeder lately.
pub(crate) const ORDERED: Table<(PeerId, Digest), OrderedRecord> = Table::new("ordered-copies");

/// Revocation epochs in order.
pub(crate) const EPOCHS: Table<u64, Signed<RevocationEpoch>> = Table::new("revocation-epochs");
/// The manager's own state.
pub(crate) const MANAGER: Table<(), ManagerRecord> = Table::new("manager");

/// A product as it is stored; the manifest lies in [`MANIFESTS`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct ProductRecord {
    pub(crate) title: String,
    pub(crate) price: Amount,
    pub(crate) manifest: Digest,
    pub(crate) content: ContentId,
    pub(crate) policy: protocol::manifest::KeyPolicy,
    pub(crate) plain_bytes: u64,
    pub(crate) content_bytes: u64,
    pub(crate) files: u32,
    pub(crate) secret: [u8; 32],
    pub(crate) shares: Vec<(String, u32)>,
    pub(crate) lease_ms: u64,
    pub(crate) rate: u64,
    pub(crate) staleness_ms: u64,
    pub(crate) published_at: u64,
    pub(crate) withdrawn: bool,
}

/// The id of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct ProductRef {
    pub(crate) id: ProductId,
}

/// An enrolled merchant.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct MerchantRecord {
    /// The right to sell, as it was given.
    pub(crate) cert: Signed<MerchantCert>,
    /// For people.
    pub(crate) name: String,
    /// Most that released and not yet settled deliveries may cost, minor units; `None` for the configured limit.
    pub(crate) credit_limit: Option<u64>,
    /// Unix milliseconds.
    pub(crate) enrolled_at: u64,
}

/// An enrolled seeder and what it last said of itself.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct SeederRecord {
    /// The right to serve, as it was given.
    pub(crate) cert: Signed<SeederCert>,
    /// For people.
    pub(crate) name: String,
    /// Bytes offered, at enrolment and then as last reported.
    pub(crate) capacity: u64,
    /// Where it can be reached, as last reported.
    pub(crate) addrs: Vec<Address>,
    /// Bytes that may still be placed there, as last reported.
    pub(crate) free: u64,
    /// Deliveries under way, as last reported.
    pub(crate) deliveries: u32,
    /// Unix milliseconds; 0 for never.
    pub(crate) last_report: u64,
    /// Unix milliseconds.
    pub(crate) enrolled_at: u64,
}

/// An invitation that was given out.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct InvitationRecord {
    pub(crate) role: InvitedRole,
    pub(crate) expires_at: u64,
    pub(crate) uses_left: u32,
}

/// The id of a replication order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct OrderRef {
    pub(crate) order: TransactionId,
}

/// A replication order, as last signed. It is signed again with a later end, under the same id, while it is pending.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct OrderRecord {
    pub(crate) signed: Signed<ReplicationOrder>,
}

/// Orders for one copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct OrderedRecord {
    /// When the newest one that is paid for was made, unix milliseconds.
    pub(crate) at: u64,
    /// Those that are paid for.
    pub(crate) times: u32,
    /// When the newest one was made that nobody is paid for, unix milliseconds; 0 for none.
    pub(crate) unpaid_at: u64,
}

/// A copy that is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct LeavingRecord {
    /// When the seeder last said so, unix milliseconds.
    pub(crate) asked_at: u64,
}

/// A copy that went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct GivenUpRecord {
    /// Unix milliseconds.
    pub(crate) at: u64,
}

/// Room that was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct RoomLeftRecord {
    /// Bytes that it took beyond the copies that there have to be, and beyond what was ordered there.
    pub(crate) spare: u64,
}

/// What the manager keeps of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct ManagerRecord {
    /// How often the manager was started on this database; see `restore`.
    pub(crate) starts: u64,
    /// The origin seeder.
    pub(crate) origin: Option<PeerId>,
    /// Newest heartbeat.
    pub(crate) heartbeat: Option<Signed<protocol::trust::Heartbeat>>,
    /// Newest restore number that the audit log tells of.
    pub(crate) restore: u64,
    /// Newest restore number after which seeders have told the revocations that the backup lacks.
    pub(crate) recovered: u64,
}

wire! {
    ProductRecord => 8 * 1024,
    ProductRef => 32,
    MerchantRecord => 1024,
    SeederRecord => 8 * 1024,
    InvitationRecord => 64,
    OrderRef => 32,
    OrderedRecord => 24,
    LeavingRecord => 16,
    GivenUpRecord => 16,
    RoomLeftRecord => 16,
    OrderRecord => 1024,
    ManagerRecord => 1024,
}
