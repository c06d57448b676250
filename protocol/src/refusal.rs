//! The one list of everything that a Willcall node can say no to, so that a refusal has the same name on the wire, in
//! logs, in metrics and in JSON, and a client can decide by it what to do next.

use std::fmt;
use std::str::FromStr;

use bincode::{Decode, Encode};

macro_rules! refusal_codes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal),+ $(,)?) => {
        /// The name of a refusal. New codes are appended: the position is the wire form.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        pub enum RefusalCode { $($(#[$doc])* $variant),+ }

        impl RefusalCode {
            /// Every code, in wire order.
            pub const ALL: &'static [RefusalCode] = &[$(RefusalCode::$variant),+];

            /// The name that stands in logs, metrics, JSON and documentation.
            pub const fn as_str(self) -> &'static str {
                match self { $(RefusalCode::$variant => $name),+ }
            }
        }
    };
}

refusal_codes! {
    /// Too many deliveries or calls at once; `retry_after_ms` says when to come back.
    Overloaded = "overloaded",
    /// The node is about to stop.
    ShuttingDown = "shutting-down",
    /// A message or document passes its size limit.
    TooLarge = "too-large",
    /// Bytes that are not the document or message expected here.
    Malformed = "malformed",
    /// A version that this node does not read.
    UnsupportedVersion = "unsupported-version",
    /// A document of another network.
    WrongNetwork = "wrong-network",
    /// The ticket names another client than the one whose key the connection proves.
    WrongClient = "wrong-client",
    /// The lease or certificate begins in the future, clock grace allowed for.
    NotYetValid = "not-yet-valid",
    /// The lease, order or certificate is over, clock grace allowed for.
    Expired = "expired",
    /// The merchant's endorsement is absent, forged, or not the one that the lease names.
    BadEndorsement = "bad-endorsement",
    /// Signed by a key that the key set does not hold for this purpose.
    UnknownKey = "unknown-key",
    /// Signed by a key after its retirement, or by a revoked one.
    KeyRetired = "key-retired",
    /// A signature of the manager fails, or what it names is not what came with it.
    BadManagerSignature = "bad-manager-signature",
    /// The transaction, generation, certificate or content was revoked.
    Revoked = "revoked",
    /// The node has not heard from the manager for longer than the lease allows.
    StaleRevocations = "stale-revocations",
    /// This seeder does not hold the content.
    ContentNotHeld = "content-not-held",
    /// The lease's byte allowance at this seeder is used up.
    AllowanceSpent = "allowance-spent",
    /// More was asked for than may be sent without an acknowledgement, now and after a wait.
    WindowExceeded = "window-exceeded",
    /// An acknowledgement is forged, shrinks, or names chunks that were not sent.
    BadAck = "bad-ack",
    /// A want names chunks that do not exist, or too many ranges.
    BadWant = "bad-want",
    /// Nothing was asked for or read for too long.
    Idle = "idle",
    /// A newer stream of the same delivery took over.
    Superseded = "superseded",
    /// There is no such product, or not for you.
    UnknownProduct = "unknown-product",
    /// The price offered is below the product's.
    PriceBelowFloor = "price-below-floor",
    /// The reservation was not released in its time.
    ReservationExpired = "reservation-expired",
    /// The reservation was made by another merchant, or there is none.
    NotYourReservation = "not-your-reservation",
    /// The transaction was released before, with another endorsement.
    AlreadyReleased = "already-released",
    /// The peer is not enrolled for this.
    NotEnrolled = "not-enrolled",
    /// A quota or a credit limit is reached.
    LimitReached = "limit-reached",
    /// The peer has no right to this transaction, or there is none.
    NotEntitled = "not-entitled",
    /// A request id was used before with another content.
    IdempotencyConflict = "idempotency-conflict",
    /// The invitation is unknown, used up or over.
    BadInvitation = "bad-invitation",
    /// A receipt, completion or batch that does not verify, or names nothing that this node knows.
    BadReceipt = "bad-receipt",
    /// The transaction is in a state in which this cannot be done.
    WrongState = "wrong-state",
    /// This node failed at its own work (disk, database); nothing is said about the request.
    Internal = "internal",
}

impl fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for RefusalCode {
    type Err = crate::ids::IdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .iter()
            .copied()
            .find(|code| code.as_str() == text)
            .ok_or_else(|| crate::ids::IdError::new("a refusal code", text, "no such code"))
    }
}

impl serde::Serialize for RefusalCode {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.as_str())
    }
}

/// A named no: what a peer gets instead of what it asked for.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, thiserror::Error, serde::Serialize)]
#[error("{code}: {detail}")]
pub struct Refusal {
    /// The name.
    pub code: RefusalCode,
    /// One line for people, at most [`Refusal::MAX_DETAIL`] bytes; it never tells what the peer may not know.
    pub detail: String,
    /// When it is worth trying again, milliseconds from now; 0 means not without a change.
    pub retry_after_ms: u64,
    /// The refuser's clock, unix milliseconds; 0 where it does not matter.
    pub now: u64,
}

impl Refusal {
    /// Longest detail, bytes.
    pub const MAX_DETAIL: usize = 512;

    /// A refusal that only a change can lift.
    pub fn new(code: RefusalCode, detail: impl Into<String>) -> Self {
        let mut detail: String = detail.into();
        if detail.len() > Self::MAX_DETAIL {
            let cut = (0..=Self::MAX_DETAIL).rev().find(|i| detail.is_char_boundary(*i)).unwrap_or(0);
            detail.truncate(cut);
        }
        Refusal { code, detail, retry_after_ms: 0, now: 0 }
    }

    /// The same, worth another try after `ms` milliseconds.
    #[must_use]
    pub fn retry_after(mut self, ms: u64) -> Self {
        self.retry_after_ms = ms;
        self
    }

    /// The same, carrying the refuser's clock (for refusals about time).
    #[must_use]
    pub fn at(mut self, now: u64) -> Self {
        self.now = now;
        self
    }
}

impl From<crate::codec::CodecError> for Refusal {
    fn from(error: crate::codec::CodecError) -> Self {
        use crate::codec::CodecError;
        let code = match error {
            CodecError::TooLarge { .. } => RefusalCode::TooLarge,
            CodecError::Version { .. } => RefusalCode::UnsupportedVersion,
            CodecError::Malformed(_) | CodecError::Trailing(_) => RefusalCode::Malformed,
        };
        Refusal::new(code, error.to_string())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_parse_back() {
        for code in RefusalCode::ALL {
            assert_eq!(code.as_str().parse::<RefusalCode>().unwrap(), *code);
        }
    }

    #[test]
    fn long_details_are_cut_at_a_character() {
        let refusal = Refusal::new(RefusalCode::Malformed, "é".repeat(400));
        assert!(refusal.detail.len() <= Refusal::MAX_DETAIL);
        assert!(refusal.detail.chars().all(|c| c == 'é'));
    }
}
