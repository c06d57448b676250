//! What merchants ask of the manager, and its answers.

use bincode::{Decode, Encode};

use super::TransactionState;
use crate::amount::Amount;
use crate::certificate::MerchantCert;
use crate::entitlement::Recovery;
use crate::ids::{Digest, Nonce, PeerId, ProductId, TransactionId};
use crate::manifest::KeyPolicy;
use crate::refusal::Refusal;
use crate::signed::Signed;
use crate::ticket::{Endorsement, TicketEnvelope, TransactionData};
use crate::wire;

/// A product as merchants offer it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ProductInfo {
    /// The product.
    pub id: ProductId,
    /// For people, at most 200 bytes.
    pub title: String,
    /// Lowest price.
    pub price: Amount,
    /// Digest of the signed manifest.
    pub manifest: Digest,
    /// When key and money move.
    pub policy: KeyPolicy,
    /// Bytes of all files.
    pub plain_bytes: u64,
    /// Bytes of ciphertext.
    pub content_bytes: u64,
    /// Number of files.
    pub files: u32,
}

/// Asked by merchants.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum SalesRequest {
    /// Uses an invitation.
    Enrol {
        /// From the join line.
        token: Nonce,
        /// For people, at most 64 bytes.
        name: String,
        /// Its certificate: a manager that came back from a backup from before takes it back by that.
        held: Option<Signed<MerchantCert>>,
    },
    /// A page of products, after the given one.
    Products {
        /// Last of the page before.
        after: Option<ProductId>,
    },
    /// Step 4. Repeating it with the same order id and body digest gives the first answer.
    Reserve(Reserve),
    /// Step 7. Repeating it with the same endorsement gives the first answer.
    Release {
        /// Which.
        transaction: TransactionId,
        /// The merchant's word that it is paid.
        endorsement: Signed<Endorsement>,
    },
    /// Takes back a reservation. It counts for as long as if it had been left to expire.
    Cancel {
        /// Which.
        transaction: TransactionId,
    },
    /// Gives the money back: revokes the transaction. Only before anything else was paid out of it.
    Refund {
        /// Which.
        transaction: TransactionId,
    },
    /// Where transactions of this merchant stand; at most 256 are asked for.
    Status {
        /// Which.
        transactions: Vec<TransactionId>,
    },
    /// Everything signed of one transaction of this merchant, as an evidence file.
    Evidence {
        /// Which.
        transaction: TransactionId,
    },
    /// Which peer has a purchase of this merchant now, and in which generation.
    Holder {
        /// Which.
        transaction: TransactionId,
    },
    /// Gives a purchase of this merchant to another peer, because its holder lost the key. Repeating it gives the first
    /// answer.
    Recover {
        /// The signed word.
        word: Signed<Recovery>,
    },
    /// Released sales of this merchant that were taken back, after the given number: also by the manager's operator, of
    /// which the merchant does not know otherwise.
    TakenBack {
        /// Last of the page before; 0 for the first.
        after: u64,
    },
    /// Sales on completion of this merchant of which it took the payment; at most 256. For a manager that came back from a
    /// backup and may have forgotten that they were completed: it gives back no payment that was taken. Answered with
    /// [`SalesResponse::States`].
    Captured {
        /// Which.
        transactions: Vec<TransactionId>,
    },
}

/// A reservation request: the payment data are in (as a commitment), the client is designated.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Reserve {
    /// The merchant's own name of the order, at most 64 bytes.
    pub order: String,
    /// Digest of what was ordered.
    pub body: Digest,
    /// What is bought.
    pub product: ProductId,
    /// Who receives it.
    pub client: PeerId,
    /// What was paid for it.
    pub price: Amount,
    /// Salt of the commitment to the price in the transaction data.
    pub salt: Nonce,
    /// [`crate::ticket::payment_commitment`] to the authorised payment.
    pub payment: Digest,
}

/// Answers to merchants.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum SalesResponse {
    /// To [`SalesRequest::Enrol`].
    Enrolled(Signed<MerchantCert>),
    /// To [`SalesRequest::Products`]; fewer than [`SalesResponse::PRODUCTS_PAGE`] means that was all.
    Products(Vec<ProductInfo>),
    /// Step 6; opens nothing by itself.
    Reserved {
        /// The sale.
        data: Signed<TransactionData>,
        /// Void if not released by then, unix milliseconds.
        expires_at: u64,
    },
    /// The ticket.
    Released {
        /// For the client.
        ticket: Box<TicketEnvelope>,
        /// When the payment is to be captured.
        policy: KeyPolicy,
    },
    /// To [`SalesRequest::Cancel`] and [`SalesRequest::Refund`]: the state it is in now.
    State(TransactionState),
    /// To [`SalesRequest::Status`] and [`SalesRequest::Captured`], in the order asked; absent for those that are not this merchant's.
    States(Vec<Option<TransactionState>>),
    /// No.
    Refused(Refusal),
    /// To [`SalesRequest::Evidence`]: [`crate::evidence::EvidencePack::to_bytes`].
    Evidence(Vec<u8>),
    /// To [`SalesRequest::Holder`] and [`SalesRequest::Recover`].
    Holder {
        /// Who has it.
        client: PeerId,
        /// Counts up with each change of hands.
        generation: u32,
    },
    /// To [`SalesRequest::TakenBack`]; fewer than [`SalesResponse::TAKEN_BACK_PAGE`] means that was all.
    TakenBack {
        /// The count of restores: under another one the numbers begin anew.
        restore: u64,
        /// In the order of their numbers.
        sales: Vec<TakenBack>,
    },
}

/// A released sale that was taken back.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TakenBack {
    /// Counts up from 1 with each sale of the merchant that is taken back.
    pub number: u64,
    /// Which.
    pub transaction: TransactionId,
    /// The merchant's own name of the order.
    pub order: String,
    /// `refunded`, or `revoked`: then the money stays where it is.
    pub state: TransactionState,
    /// In the manager's books the payment was taken; else it was held at most.
    pub captured: bool,
}

impl SalesResponse {
    /// Products in a full page.
    pub const PRODUCTS_PAGE: usize = 100;
    /// Sales taken back in a full page.
    pub const TAKEN_BACK_PAGE: usize = 256;
}

wire! {
    SalesRequest => 16 * 1024,
    SalesResponse => 768 * 1024,
}
