//! How money is taken, seen from an order: hold it, take it, let it go, give it back. Every call names the
//! authorisation that the order chose, and repeating a call changes nothing, because after a crash it is repeated.

mod code;
mod prepaid;

use std::future::Future;
use std::pin::Pin;

use protocol::{Amount, Nonce};

pub use code::{CodeError, VoucherCode};
pub use prepaid::{IssueError, Prepaid, VoucherInfo};

/// The order's name for one payment: 16 random bytes.
pub type AuthorisationId = Nonce;

/// What a provider's calls return: boxed, so that a provider may call another machine.
pub type PaymentFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, PaymentError>> + Send + 'a>>;

/// Why a payment step did not happen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PaymentError {
    /// Refused for good; the text is shown to the buyer.
    #[error("{0}")]
    Declined(String),
    /// To be let go, but the money was taken already: refund it.
    #[error("the payment was captured already")]
    Captured,
    /// Not possible in the state that the payment is in.
    #[error("{0}")]
    WrongState(String),
    /// Not now; worth another try.
    #[error("payment provider unavailable: {0}")]
    Unavailable(String),
}

/// A way to pay.
pub trait PaymentProvider: Send + Sync {
    /// Its name in purchase requests, e.g. `prepaid`.
    fn name(&self) -> &'static str;

    /// What may be stored of a buyer's token: enough to authorise with later, after a crash, and, where the token is
    /// worth money by itself, not the token. At most 4 KiB.
    ///
    /// # Errors
    /// [`PaymentError::Declined`] when it cannot be a token.
    fn reference(&self, token: &str) -> Result<String, PaymentError>;

    /// Looks whether `authorise` would succeed now, without holding anything: turns most failures away before an
    /// order is stored.
    fn check<'a>(&'a self, reference: &'a str, amount: Amount) -> PaymentFuture<'a, ()>;

    /// Holds the money. Repeating it for the same authorisation holds it once.
    fn authorise<'a>(
        &'a self,
        id: AuthorisationId,
        reference: &'a str,
        amount: Amount,
        now: u64,
    ) -> PaymentFuture<'a, ()>;

    /// Takes what is held; nothing when it was taken before.
    fn capture(&self, id: AuthorisationId, now: u64) -> PaymentFuture<'_, ()>;

    /// Lets go what is held; an authorisation that never happened cannot happen any more afterwards.
    /// [`PaymentError::Captured`] when it was taken.
    fn void(&self, id: AuthorisationId, now: u64) -> PaymentFuture<'_, ()>;

    /// Gives back what was taken.
    fn refund(&self, id: AuthorisationId, now: u64) -> PaymentFuture<'_, ()>;
}
