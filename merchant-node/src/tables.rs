//! What a merchant keeps. Everything that must survive a crash is one of these tables in one file, so that an order,
//! its money and its ticket change together or not at all.

use bincode::{Decode, Encode};
use protocol::api::ProductInfo;
use protocol::certificate::MerchantCert;
use protocol::ticket::TicketEnvelope;
use protocol::trust::KeySet;
use protocol::{Digest, NetworkId, ProductId, Signed, wire};
use store::{Mark, Table};

use crate::orders::{Order, OrderId};

/// Number of this set of tables.
pub(crate) const SCHEMA: u32 = 2;

/// The network's keys, as last verified. One row.
pub(crate) const KEY_SET: Table<(), Signed<KeySet>> = Table::new("merchant.key-set");
/// This merchant's certificate. One row.
pub(crate) const CERTIFICATE: Table<(), Signed<MerchantCert>> = Table::new("merchant.certificate");
/// The manager's word that the certificate was revoked, as long as it is the last word. One row.
pub(crate) const REVOKED: Table<(), Revoked> = Table::new("merchant.revoked");
/// The catalogue as last fetched; bounded by [`crate::link::MAX_PRODUCTS`].
pub(crate) const PRODUCTS: Table<ProductId, StoredProduct> = Table::new("merchant.products");
/// Every order; bounded by the configuration's `max-orders`.
pub(crate) const ORDERS: Table<OrderId, Order> = Table::new("merchant.orders");
/// Orders in which something is still to be done; bounded by `max-open-orders`.
pub(crate) const OPEN: Table<OrderId, Mark> = Table::new("merchant.open");
/// Orders by the time they were made.
pub(crate) const BY_TIME: Table<(u64, OrderId), Mark> = Table::new("merchant.by-time");
/// Tickets of released orders.
pub(crate) const TICKETS: Table<OrderId, TicketEnvelope> = Table::new("merchant.tickets");
/// Idempotency keys and the first answer under each; rows go with `keep-ms`.
pub(crate) const KEYS: Table<String, KeyRecord> = Table::new("merchant.idempotency");

/// A product of the catalogue.
#[derive(Clone, Debug, Encode, Decode)]
pub(crate) struct StoredProduct(pub(crate) ProductInfo);

/// This merchant may not sell any more.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Revoked {
    /// In which network: another join line makes it void.
    pub(crate) network: NetworkId,
    /// What the manager said.
    pub(crate) why: String,
}

/// What was asked, and answered, under an idempotency key.
#[derive(Clone, Debug, Encode, Decode)]
pub(crate) struct KeyRecord {
    /// Digest of what was asked.
    pub(crate) request: Digest,
    /// The order that came of it.
    pub(crate) order: OrderId,
    /// The first answer, once there was one.
    pub(crate) answer: Option<Answer>,
}

/// An HTTP answer, kept to the byte.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Answer {
    /// HTTP status.
    pub(crate) status: u16,
    /// JSON.
    pub(crate) body: Vec<u8>,
}

wire! {
    StoredProduct => 4 * 1024,
    // A refusal says 512 bytes at most.
    Revoked => 1024,
    // A ticket as text is 4/3 of its 64 KiB at most, and there is little else in an answer.
    KeyRecord => 96 * 1024,
}
