//! Which change of a sale may follow which, as one table: every service, chore and command asks here, so that no two of
//! them can disagree on what a state allows.

use protocol::api::TransactionState;
use protocol::{Refusal, RefusalCode};

/// What can happen to a sale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The merchant endorsed it: there is a ticket.
    Release,
    /// It was not released in its time.
    Expire,
    /// The merchant took the reservation back.
    Cancel,
    /// Chunks were acknowledged.
    Count,
    /// The whole content is with the client.
    Deliver,
    /// The delivery was closed and paid.
    Settle,
    /// Money goes back.
    Refund,
    /// The manager takes it back; money stays where it is.
    Revoke,
}

impl Event {
    fn past(self) -> &'static str {
        match self {
            Event::Release => "released",
            Event::Expire => "expired",
            Event::Cancel => "cancelled; a released one can be refunded",
            Event::Count | Event::Deliver => "delivered",
            Event::Settle => "settled",
            Event::Refund => "refunded; one that is not released can be cancelled",
            Event::Revoke => "revoked",
        }
    }
}

/// The state after `event`; the same one where the event was there before and changes nothing.
///
/// # Errors
/// `wrong-state` for what cannot follow.
pub(crate) fn next(state: TransactionState, event: Event) -> Result<TransactionState, Refusal> {
    use TransactionState as S;
    let next = match (state, event) {
        (S::Reserved, Event::Release) => S::Released,
        (S::Reserved | S::Expired, Event::Expire) => S::Expired,
        (S::Reserved | S::Cancelled, Event::Cancel) => S::Cancelled,
        (S::Released | S::Delivering, Event::Count) => S::Delivering,
        (S::Released | S::Delivering | S::Delivered, Event::Deliver) | (S::Delivered, Event::Count) => S::Delivered,
        (S::Released | S::Delivering | S::Delivered, Event::Settle)
        // A settled purchase can be fetched again: that delivery changes the state no more.
        | (S::Settled, Event::Count | Event::Deliver | Event::Settle) => S::Settled,
        // What seeders delivered before it was taken back is counted and paid after it, and changes the state no more.
        // Revoking leaves the money where it is; whose shop gives it back after that owes it no more.
        (S::Released | S::Delivering | S::Delivered | S::Settled | S::Revoked, Event::Refund)
        | (S::Refunded, Event::Refund | Event::Revoke | Event::Count | Event::Deliver | Event::Settle) => S::Refunded,
        (S::Reserved | S::Released | S::Delivering | S::Delivered | S::Settled, Event::Revoke)
        | (S::Revoked, Event::Revoke | Event::Count | Event::Deliver | Event::Settle) => S::Revoked,
        _ => {
            let detail = format!("the transaction is {} and cannot be {}", state.as_str(), event.past());
            return Err(Refusal::new(RefusalCode::WrongState, detail));
        }
    };
    Ok(next)
}

/// Nothing more is to come by itself: what follows at most is that it is taken back, or fetched again.
pub(crate) fn is_over(state: TransactionState) -> bool {
    use TransactionState as S;
    matches!(state, S::Settled | S::Expired | S::Cancelled | S::Revoked | S::Refunded)
}

/// It was refunded or revoked: nobody holds it any more, and no money is taken for it.
pub(super) fn is_taken_back(state: TransactionState) -> bool {
    matches!(state, TransactionState::Revoked | TransactionState::Refunded)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use TransactionState as S;

    const STATES: [S; 9] = [
        S::Reserved,
        S::Released,
        S::Delivering,
        S::Delivered,
        S::Settled,
        S::Expired,
        S::Cancelled,
        S::Revoked,
        S::Refunded,
    ];

    #[test]
    fn the_whole_table() {
        // One row an event, one column a state in the order above; `-` is wrong-state.
        let table = [
            (Event::Release, "released - - - - - - - -"),
            (Event::Expire, "expired - - - - expired - - -"),
            (Event::Cancel, "cancelled - - - - - cancelled - -"),
            (Event::Count, "- delivering delivering delivered settled - - revoked refunded"),
            (Event::Deliver, "- delivered delivered delivered settled - - revoked refunded"),
            (Event::Settle, "- settled settled settled settled - - revoked refunded"),
            (Event::Refund, "- refunded refunded refunded refunded - - refunded refunded"),
            (Event::Revoke, "revoked revoked revoked revoked revoked - - revoked refunded"),
        ];
        for (event, row) in table {
            for (state, expected) in STATES.into_iter().zip(row.split(' ')) {
                let got = next(state, event);
                match expected {
                    "-" => assert_eq!(got.unwrap_err().code, RefusalCode::WrongState, "{state:?} {event:?}"),
                    name => assert_eq!(got.unwrap().as_str(), name, "{state:?} {event:?}"),
                }
            }
        }
    }
}
