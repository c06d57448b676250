//! Step 7: the merchant says, signed, that it is paid, and only now there is a ticket. It is a message of its own: what
//! the reservation gave out opens nothing.

use std::sync::Arc;

use protocol::api::{SalesResponse, TransactionState};
use protocol::manifest::KeyPolicy;
use protocol::receipt::DeliveryId;
use protocol::ticket::{Endorsement, Lease};
use protocol::{PeerAddrs, PeerId, Refusal, RefusalCode, Signed, TransactionId};
use store::{Mark, Step, WriteTransaction};
use tracing::info;

use super::lease::{self, Terms};
use super::own;
use crate::catalogue;
use crate::context::Context;
use crate::ledger::{self, Split};
use crate::transactions::{
    Delivery, Event, MAILBOX, PAID_DELIVERY, Release, SALES, Sale, SaleError, capture, delivery_of, drop_reservation,
    expose, open_delivery, put_sale,
};
use crate::workers;

/// What a release comes to before anything is written.
enum Formed {
    /// It was released before.
    Before(SalesResponse),
    /// It is to be stored.
    New(Box<New>),
}

/// A release that passed all checks.
struct New {
    release: Release,
    delivery: Delivery,
    /// Of the lease, with their addresses.
    sources: Vec<PeerAddrs>,
    /// Most that the merchant may come to owe, minor units.
    credit_limit: u64,
}

pub(super) async fn release(
    ctx: &Arc<Context>,
    merchant: PeerId,
    id: TransactionId,
    endorsement: Signed<Endorsement>,
    now: u64,
) -> Result<SalesResponse, Refusal> {
    // No thread waits for the disk, as at the reservation.
    let new = match workers::run(ctx, move |ctx| look(ctx, merchant, id, endorsement, now)).await? {
        Formed::Before(answer) => return Ok(answer),
        Formed::New(new) => *new,
    };
    let New { release, delivery, sources, credit_limit } = new;
    let release = Arc::new(release);
    let putting = {
        let release = Arc::clone(&release);
        move |txn: &WriteTransaction<'_>| put(txn, merchant, id, &release, &delivery, credit_limit, now)
    };
    let stored = ctx.db.write_step(Step::ManagerRelease, putting).await.map_err(SaleError::into_refusal)?;
    info!(step = 8, transaction = %id, client = %stored.client, "ticket to merchant and into the client's mailbox");
    match &stored.release {
        Some(made) if made.lease == release.lease => {
            let ticket = Box::new(lease::envelope_with(ctx, &stored, made, sources));
            Ok(SalesResponse::Released { ticket, policy: stored.policy })
        }
        // Another call released it first, with other sources.
        _ => workers::run(ctx, move |ctx| released(ctx, &stored)).await,
    }
}

fn look(
    ctx: &Context,
    merchant: PeerId,
    id: TransactionId,
    endorsement: Signed<Endorsement>,
    now: u64,
) -> Result<Formed, SaleError> {
    let sale = own(ctx.db.read(|txn| ctx.archive.sale(txn, &id))?, &merchant)?;
    if let Some(answer) = repeated(ctx, &sale, &endorsement)? {
        return Ok(Formed::Before(answer));
    }
    // Asked first: what becomes known after that is in the revocations that are looked at.
    let known = ctx.knows_what_it_revoked();
    // After a restore the books may not know that it was released and taken back.
    if ctx.revocations.with(|revoked| revoked.has_transaction(&id)) {
        return Err(Refusal::new(RefusalCode::Revoked, "the purchase was revoked").into());
    }
    // Before that clock says that the reservation is over, or the shop's certificate.
    ctx.clock_lets_sell()?;
    let record = ctx.enrolled_merchant(&merchant, now)?;
    ctx.may_sell()?;
    known?;
    check_time(&sale, now)?;
    check_endorsement(&sale, &merchant, &endorsement)?;
    // As it was reserved: a key may have been revoked since, and the product be published anew.
    if let Some(signed) = ctx.catalogue.manifest(&sale.manifest)? {
        let published_at = signed.peek().map_err(Refusal::from)?.published_at;
        if let Some(void) = catalogue::void(&ctx.trust(), &signed, published_at, now) {
            return Err(void.into());
        }
    }
    info!(step = 7, transaction = %id, %merchant, "delivery request from merchant");

    let sources = ctx.registry.sources_for(&sale.manifest, now, Lease::MAX_SOURCES)?;
    let (release, leased) = form(ctx, &sale, endorsement, &sources, now)?;
    let due_at = release.lease_end.saturating_add(ctx.config.close_grace_ms);
    let delivery = delivery_of(&leased, sale.manifest, sale.layout, due_at);
    let credit_limit = record.credit_limit.unwrap_or(ctx.config.credit_limit);
    Ok(Formed::New(Box::new(New { release, delivery, sources, credit_limit })))
}

/// Stores the release, and gives the sale as it is then.
fn put(
    txn: &WriteTransaction<'_>,
    merchant: PeerId,
    id: TransactionId,
    release: &Release,
    delivery: &Delivery,
    credit_limit: u64,
    now: u64,
) -> Result<Sale, SaleError> {
    let mut sale = own(SALES.get(txn, &id)?, &merchant)?;
    if sale.release.as_ref().is_some_and(|earlier| earlier.endorsement == release.endorsement) {
        return Ok(sale);
    }
    // Asked again, because it may have expired, been cancelled or been released since.
    check_open(&sale)?;
    let before = sale.state;
    sale.advance(Event::Release, now)?;
    drop_reservation(txn, id, &sale)?;
    expose(txn, &merchant, &release.split, sale.policy == KeyPolicy::OnCompletion, credit_limit)?;
    sale.release = Some(release.clone());
    if sale.policy == KeyPolicy::AtRelease {
        capture(txn, id, &mut sale, now)?;
    }
    open_delivery(txn, DeliveryId { transaction: id, delivery: PAID_DELIVERY }, delivery)?;
    MAILBOX.put(txn, &(sale.client, id), &Mark)?;
    put_sale(txn, &id, Some(before), &sale)?;
    Ok(sale)
}

/// The first answer, where this endorsement released the sale before.
fn repeated(ctx: &Context, sale: &Sale, endorsement: &Signed<Endorsement>) -> Result<Option<SalesResponse>, SaleError> {
    check_open(sale).or_else(|refusal| match &sale.release {
        Some(release) if release.endorsement == *endorsement => Ok(()),
        _ => Err(refusal),
    })?;
    match sale.state {
        TransactionState::Reserved => Ok(None),
        TransactionState::Revoked | TransactionState::Refunded => {
            let detail = format!("the transaction is {}", sale.state.as_str());
            Err(Refusal::new(RefusalCode::Revoked, detail).into())
        }
        _ => released(ctx, sale).map(Some),
    }
}

fn released(ctx: &Context, sale: &Sale) -> Result<SalesResponse, SaleError> {
    let release = sale
        .release
        .as_ref()
        .ok_or_else(|| Refusal::new(RefusalCode::WrongState, "the transaction is not released"))?;
    Ok(SalesResponse::Released { ticket: Box::new(lease::envelope(ctx, sale, release)?), policy: sale.policy })
}

fn check_open(sale: &Sale) -> Result<(), Refusal> {
    if sale.release.is_some() {
        let detail = "the transaction was released with another endorsement";
        return Err(Refusal::new(RefusalCode::AlreadyReleased, detail));
    }
    match sale.state {
        TransactionState::Reserved => Ok(()),
        TransactionState::Expired => Err(expired()),
        state => {
            let detail = format!("the transaction is {} and cannot be released", state.as_str());
            Err(Refusal::new(RefusalCode::WrongState, detail))
        }
    }
}

fn check_time(sale: &Sale, now: u64) -> Result<(), Refusal> {
    // Both times are of this clock: there is no grace to allow for.
    if now > sale.expires_at {
        return Err(expired().at(now));
    }
    Ok(())
}

fn expired() -> Refusal {
    Refusal::new(RefusalCode::ReservationExpired, "the reservation was not released in its time; void the payment")
}

fn check_endorsement(sale: &Sale, merchant: &PeerId, signed: &Signed<Endorsement>) -> Result<(), Refusal> {
    let endorsement = signed.verify(merchant).map_err(|e| e.refusal(RefusalCode::BadEndorsement))?;
    if endorsement.transaction_data != sale.data.digest() {
        return Err(Refusal::new(RefusalCode::BadEndorsement, "it endorses another transaction"));
    }
    if endorsement.payment != sale.request.payment {
        return Err(Refusal::new(RefusalCode::BadEndorsement, "it names another payment than the reservation"));
    }
    Ok(())
}

/// Everything of the release that takes cryptography or a look at seeders, before the database is written.
fn form(
    ctx: &Context,
    sale: &Sale,
    endorsement: Signed<Endorsement>,
    sources: &[PeerAddrs],
    now: u64,
) -> Result<(Release, Lease), SaleError> {
    let product = lease::product_of(ctx, sale)?;
    ctx.clock_lets_lease(product.lease_ms)?;
    let split = Split::of(&ledger::Terms {
        price: sale.price(),
        shares: &product.shares,
        fee_millionths: ctx.config.fee_millionths,
        rate: product.rate,
        content_bytes: sale.layout.length,
        slack_millionths: ctx.config.ceiling_slack_millionths,
    });
    let terms = Terms {
        endorsement: endorsement.digest(),
        delivery: PAID_DELIVERY,
        rate: split.rate,
        ceiling: split.ceiling,
        sources: sources.iter().map(|source| source.peer).collect(),
        end: None,
    };
    ctx.demand.asked(sale.manifest, now);
    let (signed, leased) = lease::sign(ctx, sale, &product, terms, now);
    let grant = match sale.policy {
        KeyPolicy::AtRelease => Some(lease::grant(&product, sale, &leased)?),
        KeyPolicy::OnCompletion => None,
    };
    let release = Release {
        at: now,
        endorsement,
        lease: signed,
        lease_start: leased.start,
        lease_end: leased.end,
        delivery: leased.delivery,
        grant,
        split,
        captured: false,
        completed_at: None,
        charged: None,
    };
    Ok((release, leased))
}
