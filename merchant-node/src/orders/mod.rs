//! A sale as a record. Its stage says what was done, never what is about to be done: every effect outside of this
//! process is repeatable, so that whoever finds an order after a crash does the next thing again and gets the same.

mod chore;
mod desk;
mod steps;
mod taken_back;
mod verify;

use bincode::{Decode, Encode};
use protocol::api::TransactionState;
use protocol::manifest::KeyPolicy;
use protocol::ticket::{Endorsement, TransactionData};
use protocol::{Amount, Digest, Nonce, PeerId, ProductId, Refusal, RefusalCode, Signed, TransactionId, wire};
use store::{Mark, Step, StoreError, WriteTransaction};

pub(crate) use chore::run as run_chore;
pub(crate) use desk::{Desk, Listed, OrderError, RefundError};

use crate::tables::{BY_TIME, OPEN, ORDERS};

/// Name of an order: 128 random bits, because whoever knows it may read the ticket.
pub type OrderId = Nonce;

/// What has been done in an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Stored. Next: the payment is authorised.
    Received,
    /// The money is held. Next: the manager reserves (steps 4 to 6).
    Authorised,
    /// Reserved and endorsed; the endorsement may have been sent. Next: the manager releases (step 7).
    Reserved,
    /// The ticket is here (step 8). Next: payment is captured, or completion waited for.
    Released,
    /// The payment waits for the client's completion.
    AwaitingCompletion,
    /// The client has completed. Next: payment is captured.
    Completed,
    /// The money is taken; nothing is left to do.
    Done,
    /// The manager is being asked to revoke the sale. Next: the money goes back.
    Refunding,
    /// The sale has failed or was taken back. Next: the money goes back.
    Voiding,
    /// The payment was refused.
    Declined,
    /// The manager refused, or its answer could not be trusted.
    Cancelled,
    /// Not released in time.
    Expired,
    /// The money went back after the release.
    Refunded,
}

impl Stage {
    /// The name in JSON and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Stage::Received => "received",
            Stage::Authorised => "authorised",
            Stage::Reserved => "reserved",
            Stage::Released => "released",
            Stage::AwaitingCompletion => "awaiting-completion",
            Stage::Completed => "completed",
            Stage::Done => "done",
            Stage::Refunding => "refunding",
            Stage::Voiding => "voiding",
            Stage::Declined => "declined",
            Stage::Cancelled => "cancelled",
            Stage::Expired => "expired",
            Stage::Refunded => "refunded",
        }
    }

    /// Nothing will be done any more.
    pub const fn is_final(self) -> bool {
        matches!(self, Stage::Done | Stage::Declined | Stage::Cancelled | Stage::Expired | Stage::Refunded)
    }

    /// It came to nothing: no goods, no money.
    pub const fn is_failed(self) -> bool {
        matches!(self, Stage::Declined | Stage::Cancelled | Stage::Expired)
    }

    /// The durable step by which an order gets here.
    const fn step(self) -> Step {
        match self {
            Stage::Received => Step::MerchantOrder,
            Stage::Authorised => Step::MerchantAuthorised,
            Stage::Reserved => Step::MerchantReserved,
            Stage::Released => Step::MerchantReleased,
            Stage::AwaitingCompletion => Step::MerchantAwaiting,
            Stage::Completed => Step::MerchantCompleted,
            Stage::Done => Step::MerchantDone,
            Stage::Refunding => Step::MerchantRefunding,
            Stage::Voiding => Step::MerchantVoiding,
            Stage::Declined | Stage::Cancelled | Stage::Expired | Stage::Refunded => Step::MerchantEnded,
        }
    }

    /// The next step needs the manager.
    pub(crate) const fn needs_manager(self) -> bool {
        matches!(self, Stage::Authorised | Stage::Reserved | Stage::Refunding)
    }
}

/// Why an order came to nothing, in the words that its buyer gets.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Failure {
    /// HTTP status.
    pub(crate) status: u16,
    /// A refusal code, or `payment-declined`.
    pub(crate) code: String,
    /// One line for people.
    pub(crate) message: String,
}

const REVOKED: &str = "the manager revoked this sale: nothing is delivered for it any more";
const COMPLETED_BEFORE: &str = "the manager refunded this sale as one that was not completed, after it had said that it was \
                                (restored from a backup): the buyer may have the goods";
/// How the message of a failure ends whose payment is the shop's to give back …
const STAYS_TAKEN: &str = ", and the payment stays taken unless the shop refunds it";
/// … and how it ends once the shop did.
const GIVEN_BACK: &str = ", and the shop gave the payment back";

impl Failure {
    pub(crate) fn declined(message: impl Into<String>) -> Self {
        Failure { status: 402, code: "payment-declined".to_owned(), message: message.into() }
    }

    /// The manager said no.
    pub(crate) fn refused(refusal: &Refusal) -> Self {
        Failure {
            status: status_of(refusal.code),
            code: refusal.code.as_str().to_owned(),
            message: format!("the manager refused: {}", refusal.detail),
        }
    }

    /// The manager forgot a sale that it had released.
    pub(crate) fn forgotten() -> Self {
        Failure {
            status: 410,
            code: "forgotten".to_owned(),
            message: "the manager does not know this sale any more (restored from a backup); the payment goes back"
                .to_owned(),
        }
    }

    /// Nothing is delivered for it, and nothing was due for it.
    pub(crate) fn let_go(state: TransactionState) -> Self {
        let state = state.as_str();
        let message = format!("the sale is {state}; the payment was let go");
        Failure { status: 410, code: state.to_owned(), message }
    }

    /// The manager's operator took the sale back.
    pub(crate) fn taken_back(state: TransactionState) -> Self {
        let message = match state {
            TransactionState::Revoked => format!("{REVOKED}{STAYS_TAKEN}"),
            _ => "the manager refunded this sale: nothing is delivered for it any more, and the payment goes back"
                .to_owned(),
        };
        Failure { status: 410, code: state.as_str().to_owned(), message }
    }

    /// The manager gave back a payment that it had said to take.
    pub(crate) fn completed_before() -> Self {
        Failure { status: 410, code: "refunded".to_owned(), message: format!("{COMPLETED_BEFORE}{STAYS_TAKEN}") }
    }

    /// The same once the payment went back: what happened stays true, and that the payment stays taken does not.
    pub(crate) fn given_back(mut self) -> Self {
        if let Some(what) = self.message.strip_suffix(STAYS_TAKEN) {
            self.message = format!("{what}{GIVEN_BACK}");
        }
        self
    }

    /// What the manager answered does not hold.
    pub(crate) fn untrusted(refusal: &Refusal) -> Self {
        Failure {
            status: 502,
            code: refusal.code.as_str().to_owned(),
            message: format!("the manager's answer does not hold: {}", refusal.detail),
        }
    }
}

/// HTTP status for a refusal of the manager. It closed the order, and is the answer to its key for ever: so it is none that
/// means "try again", by which a buyer would repeat that key. Another purchase may be sold.
fn status_of(code: RefusalCode) -> u16 {
    match code {
        RefusalCode::UnknownProduct => 404,
        RefusalCode::Malformed | RefusalCode::WrongClient => 400,
        RefusalCode::TooLarge => 413,
        // A retired key: not for sale until it is published again; a later purchase is another one.
        RefusalCode::PriceBelowFloor
        | RefusalCode::KeyRetired
        | RefusalCode::IdempotencyConflict
        | RefusalCode::AlreadyReleased
        | RefusalCode::WrongState => 409,
        RefusalCode::ReservationExpired | RefusalCode::Expired => 410,
        // Also where it cannot sell for now: the limit is reached, the shop not enrolled, or it is busy.
        _ => 502,
    }
}

/// One sale.
#[derive(Clone, Debug, Encode, Decode)]
pub(crate) struct Order {
    /// Its name.
    pub(crate) id: OrderId,
    /// The idempotency key that it was made under.
    pub(crate) key: String,
    /// Unix milliseconds.
    pub(crate) created_at: u64,
    /// Unix milliseconds.
    pub(crate) updated_at: u64,
    /// What is bought.
    pub(crate) product: ProductId,
    /// Who receives it.
    pub(crate) client: PeerId,
    /// The remuneration.
    pub(crate) amount: Amount,
    /// Name of the payment provider.
    pub(crate) provider: String,
    /// What the provider lets us store of the payment token.
    pub(crate) reference: String,
    /// Under this name the provider holds, takes and gives back the money.
    pub(crate) authorisation: Nonce,
    /// When the money was held, unix milliseconds; 0 before.
    pub(crate) authorised_at: u64,
    /// Salt of the commitment to the price.
    pub(crate) price_salt: Nonce,
    /// Salt of the commitment to the payment.
    pub(crate) payment_salt: Nonce,
    /// What was done.
    pub(crate) stage: Stage,
    /// Where [`Stage::Voiding`] and [`Stage::Refunding`] lead.
    pub(crate) ends_as: Option<Stage>,
    /// Where a refund that the manager refuses leads back to.
    pub(crate) before_refund: Option<Stage>,
    /// When payment is captured; known from the release on.
    pub(crate) policy: Option<KeyPolicy>,
    /// Step 6.
    pub(crate) data: Option<Signed<TransactionData>>,
    /// When the reservation ends, unix milliseconds.
    pub(crate) expires_at: u64,
    /// Step 7: stored before it is sent, so that after a crash the same bytes are sent.
    pub(crate) endorsement: Option<Signed<Endorsement>>,
    /// Why it came to nothing.
    pub(crate) failure: Option<Failure>,
}

wire!(Order => 8 * 1024);

impl Order {
    /// The sale, once the manager formed it.
    pub(crate) fn sale(&self) -> Option<TransactionData> {
        self.data.as_ref().and_then(|data| data.peek().ok())
    }

    /// Its id.
    pub(crate) fn transaction(&self) -> Option<TransactionId> {
        self.sale().map(|sale| sale.transaction)
    }

    /// Commitment to the payment.
    pub(crate) fn payment_commitment(&self) -> Digest {
        protocol::ticket::payment_commitment(&self.payment_salt, &self.authorisation.to_string(), &self.amount)
    }

    /// Digest of what was ordered, for the manager: without anything of the payment token.
    pub(crate) fn body(&self) -> Digest {
        Digest::of(
            "willcall 2026-11 merchant order",
            &[
                self.id.as_bytes(),
                self.product.as_bytes(),
                self.client.as_bytes(),
                &self.amount.minor.to_le_bytes(),
                self.amount.currency.as_str().as_bytes(),
            ],
        )
    }

    /// The order when its money is to go back, to end as `end`.
    pub(crate) fn failing(mut self, end: Stage, failure: Failure) -> Self {
        self.stage = Stage::Voiding;
        self.ends_as = Some(end);
        self.failure = Some(failure);
        self
    }
}

/// Stores an order and keeps the list of open ones in step with it.
pub(crate) fn put_order(txn: &WriteTransaction<'_>, order: &Order) -> Result<(), StoreError> {
    ORDERS.put(txn, &order.id, order)?;
    BY_TIME.put(txn, &(order.created_at, order.id), &Mark)?;
    if order.stage.is_final() {
        OPEN.delete(txn, &order.id)?;
    } else {
        OPEN.put(txn, &order.id, &Mark)?;
    }
    Ok(())
}
