//! What the manager answers is checked before money moves because of it: a manager, or whoever speaks in its place,
//! must not get a payment endorsed for another client, another product or another price.

use protocol::ticket::{Lease, TicketEnvelope, TransactionData, remuneration_commitment};
use protocol::trust::{KeyPurpose, Trust};
use protocol::{PeerId, Refusal, RefusalCode, Signed};

use super::Order;

pub(super) fn not_ours(what: &str) -> Refusal {
    Refusal::new(RefusalCode::BadManagerSignature, what)
}

/// Checks step 6.
///
/// # Errors
/// Those of [`Trust::open`]; `wrong-network`; `bad-manager-signature` when it names something else than the order.
pub(crate) fn reserved(
    signed: &Signed<TransactionData>,
    order: &Order,
    merchant: PeerId,
    trust: &Trust,
    now: u64,
) -> Result<TransactionData, Refusal> {
    let data = trust.open(signed, KeyPurpose::Ticket, |data| data.formed_at, now)?;
    if data.network != trust.network() {
        return Err(Refusal::new(RefusalCode::WrongNetwork, "transaction data of another network"));
    }
    let checks = [
        (data.merchant == merchant, "the transaction data name another merchant"),
        (data.product == order.product, "the transaction data name another product"),
        (data.client == order.client, "the transaction data name another client"),
        (
            data.remuneration == remuneration_commitment(&order.price_salt, &order.amount),
            "the transaction data bind another price",
        ),
    ];
    match checks.into_iter().find(|(holds, _)| !holds) {
        Some((_, what)) => Err(not_ours(what)),
        None => Ok(data),
    }
}

/// Checks what the manager answers to step 7.
///
/// # Errors
/// Those of [`Trust::open`]; `bad-endorsement` or `bad-manager-signature` when it is not the ticket of this order.
pub(crate) fn released(envelope: &TicketEnvelope, order: &Order, trust: &Trust, now: u64) -> Result<Lease, Refusal> {
    let (Some(data), Some(endorsement)) = (&order.data, &order.endorsement) else {
        return Err(Refusal::new(RefusalCode::WrongState, "the order was not endorsed yet"));
    };
    let ticket = &envelope.ticket;
    if ticket.data != *data {
        return Err(not_ours("the ticket is of another transaction"));
    }
    if ticket.endorsement.as_ref() != Some(endorsement) {
        return Err(Refusal::new(RefusalCode::BadEndorsement, "the ticket does not carry this merchant's endorsement"));
    }
    let lease = trust.open(&ticket.lease, KeyPurpose::Ticket, |lease| lease.issued_at, now)?;
    let checks = [
        (lease.transaction_data == data.digest(), "the lease is for another transaction"),
        (lease.endorsement == endorsement.digest(), "the lease names another endorsement"),
        // A release that is repeated after a crash may find that the client moved the purchase meanwhile.
        (lease.client == order.client || lease.generation > 0, "the lease names another client"),
        (envelope.join.network() == trust.network(), "the ticket leads to another network"),
    ];
    match checks.into_iter().find(|(holds, _)| !holds) {
        Some((_, what)) => Err(not_ours(what)),
        None => Ok(lease),
    }
}
