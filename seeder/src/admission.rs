//! Whether to serve: the one list of checks between a stranger's credential and the first byte of content. It is decided
//! alone and offline, from what is cached, cheapest checks first.

use std::sync::Arc;

use delivery::Content;
use protocol::deliver::{Credential, Grant};
use protocol::receipt::DeliveryId;
use protocol::replication::ReplicationOrder;
use protocol::serving::ServeAccount;
use protocol::ticket::{self, Admission};
use protocol::trust::{KeyPurpose, Trust};
use protocol::{PeerId, Refusal, RefusalCode, TransactionId};

use crate::accounts;
use crate::context::Seeder;
use crate::tables::account_key;

/// The transaction that a credential claims to be for, unchecked: for logs.
pub(crate) fn claimed(credential: &Credential) -> Option<TransactionId> {
    match credential {
        Credential::Ticket(ticket) => ticket.data.peek().ok().map(|data| data.transaction),
        Credential::Order(order) => order.peek().ok().map(|order| order.order),
    }
}

/// Who signed a lease or order, and when, and how old this seeder's news may be for it: its key may be given up while the
/// delivery runs, and this seeder may be cut off from those who would say so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Warrant {
    signer: PeerId,
    /// Unix milliseconds.
    issued_at: u64,
    /// As in the lease.
    staleness: u64,
}

impl Warrant {
    /// Does the network still stand by the key, as far as is known here, and is enough known?
    ///
    /// # Errors
    /// `key-retired`, `unknown-key`, `stale-revocations`.
    pub(crate) fn still_good(&self, trust: &Trust, informed: Option<u64>, now: u64) -> Result<(), Refusal> {
        trust.still_good(&self.signer, KeyPurpose::Ticket, self.issued_at, now)?;
        ticket::check_staleness(self.staleness, informed, trust, now)
    }
}

/// Checks what `peer`, as the connection proved it, shows. Reads the disk: call it on a blocking thread.
///
/// # Errors
/// The first refusal, in the order of [`protocol::ticket::Ticket::check`], then `revoked` (of the client or content),
/// `price-below-floor`, `content-not-held`.
pub(crate) fn admit(
    seeder: &Seeder,
    peer: PeerId,
    credential: &Credential,
    now: u64,
) -> Result<(Grant, Warrant, Arc<Content>), Refusal> {
    let unknown = || Refusal::new(RefusalCode::NotEnrolled, "this seeder does not know its network's keys yet");
    let trust = seeder.network.trust().ok_or_else(unknown)?;
    let revoked = seeder.network.revoked();
    let admission = Admission {
        peer,
        seeder: seeder.peer,
        trust: &trust,
        revoked: &revoked,
        informed: seeder.network.informed(),
        continuation_ms: continuation(seeder, peer, credential, now)?,
        now,
    };
    let (grant, warrant) = match credential {
        Credential::Ticket(ticket) => {
            let admitted = ticket.check(&admission)?;
            let (data, lease) = (admitted.data, admitted.lease);
            let grant = Grant {
                delivery: DeliveryId { transaction: data.transaction, delivery: lease.delivery },
                generation: lease.generation,
                manifest: data.manifest,
                client: lease.client,
                allowance: lease.allowance,
                listed: admitted.listed,
                rate: lease.rate,
                until: lease.end,
            };
            let (signer, staleness) = (ticket.lease.signer(), lease.staleness);
            (grant, Warrant { signer, issued_at: lease.issued_at, staleness })
        }
        Credential::Order(signed) => {
            let order = ReplicationOrder::check(signed, &admission)?;
            let grant = Grant {
                delivery: DeliveryId { transaction: order.order, delivery: ReplicationOrder::DELIVERY },
                generation: 0,
                manifest: order.manifest,
                client: order.seeder,
                allowance: order.allowance,
                // An enrolled seeder that the network pays for: nothing is gained by a small window.
                listed: true,
                rate: order.rate,
                until: order.until,
            };
            (grant, Warrant { signer: signed.signer(), issued_at: order.issued_at, staleness: 0 })
        }
    };
    if revoked.has_peer(&peer) {
        return Err(Refusal::new(RefusalCode::Revoked, "this client was revoked"));
    }
    if grant.rate < seeder.config.min_rate {
        let detail = format!("this seeder serves for {} millionths per MiB or more", seeder.config.min_rate);
        return Err(Refusal::new(RefusalCode::PriceBelowFloor, detail));
    }
    if grant.rate == 0 && !grant.listed {
        // A further download that nobody pays for is the listed origin's to serve.
        let detail = "nobody pays for this delivery; the seeders that its lease lists serve it";
        return Err(Refusal::new(RefusalCode::PriceBelowFloor, detail));
    }
    let content = seeder.contents.get(&grant.manifest).filter(|content| !content.have().is_empty());
    let not_held = || Refusal::new(RefusalCode::ContentNotHeld, "this seeder does not hold the content");
    let content = content.ok_or_else(not_held)?;
    let id = content.manifest().content;
    if revoked.has_content(&id) {
        return Err(Refusal::new(RefusalCode::Revoked, "this content was taken down"));
    }
    if seeder.denied.contains(&id) {
        return Err(not_held());
    }
    seeder.served.note(grant.manifest, now);
    Ok((grant, warrant, content))
}

/// For how long past its lease a ticket is good here: a delivery that the client has acknowledged part of goes on.
fn continuation(seeder: &Seeder, peer: PeerId, credential: &Credential, now: u64) -> Result<u64, Refusal> {
    let Credential::Ticket(ticket) = credential else { return Ok(0) };
    let (data, lease) = (ticket.data.peek()?, ticket.lease.peek()?);
    if now <= lease.end {
        return Ok(0);
    }
    let delivery = DeliveryId { transaction: data.transaction, delivery: lease.delivery };
    let account = account(seeder, delivery, &peer)?;
    Ok(if account.ack.is_some() { seeder.config.continuation_ms } else { 0 })
}

fn account(seeder: &Seeder, delivery: DeliveryId, client: &PeerId) -> Result<ServeAccount, Refusal> {
    accounts::load(&seeder.db, &account_key(delivery, client)).map_err(|error| {
        tracing::error!(%error, "cannot look up a delivery");
        Refusal::new(RefusalCode::Internal, "this seeder's database failed")
    })
}

/// A seeder that leaves takes no new delivery. One that it began goes on over another stream: the client may have verified
/// what it has not acknowledged yet, which this seeder is paid by; but not for
/// as long as the client likes to come for nothing. Reads the disk.
///
/// # Errors
/// `shutting-down`.
pub(crate) fn check_leaving(seeder: &Seeder, grant: &Grant) -> Result<(), Refusal> {
    let Some(refusal) = seeder.drain.refusal() else { return Ok(()) };
    let key = account_key(grant.delivery, &grant.client);
    if seeder.drain.is_in_vain(&key) || account(seeder, grant.delivery, &grant.client)?.noted == 0 {
        return Err(refusal);
    }
    Ok(())
}

/// `allowance-spent` when nothing more may be sent.
pub(crate) fn check_allowance(grant: &Grant, noted: u32, chunk_size: u32) -> Result<(), Refusal> {
    if u64::from(noted) * u64::from(chunk_size) > grant.allowance {
        let detail = "this delivery's allowance at this seeder is used up";
        return Err(Refusal::new(RefusalCode::AllowanceSpent, detail));
    }
    Ok(())
}
