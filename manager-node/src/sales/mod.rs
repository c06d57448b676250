//! Answers merchants: steps 4 to 7 of a purchase, and taking one back. The peer that the connection proves is the
//! merchant; what is not its own looks like what does not exist.

mod lease;
pub(crate) mod mailbox;
mod moving;
mod release;
mod reserve;
#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]
pub(crate) mod tests;
pub(crate) mod withheld;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use node::{CallLimits, Protocol, Supervisor, serve_calls};
use protocol::api::{self, SalesRequest, SalesResponse, TransactionState};
use protocol::manifest::Manifest;
use protocol::{PeerId, Refusal, RefusalCode, Signed, TransactionId};
use store::Step;
use tracing::{info, warn};

use crate::StartError;
use crate::archive::Seen;
use crate::context::{Context, now_ms};
use crate::tables::{MERCHANTS, ProductRecord};
use crate::transactions::{
    Event, SALES, Sale, SaleError, announcing, capture, chore, internal, put_sale, take_back, taken_back,
};
use crate::{archive, audit, catalogue, evidence};

pub(crate) use lease::allowance;

const SALES_PROTOCOL: Protocol = Protocol::new(api::SALES_PROTOCOL);

/// A merchant's storefront makes a call for each of its buyers: many at once from one peer are the normal case. Some
/// hold a blocking thread while the database writes, of which the runtime has 512.
const LIMITS: CallLimits = CallLimits { concurrent: 256, per_peer: 64, io_timeout: Duration::from_secs(10) };

/// Most transactions in one status question.
const STATUS_MAX: usize = 256;

/// Starts the sales and mailbox services, and what goes on beside them.
pub(crate) async fn start(ctx: Arc<Context>, supervisor: &Supervisor) -> Result<(), StartError> {
    let service = Arc::clone(&ctx);
    serve_calls(supervisor, &ctx.node, SALES_PROTOCOL, LIMITS, move |peer, request| {
        let ctx = Arc::clone(&service);
        async move {
            Box::pin(answer(&ctx, peer, request)).await.unwrap_or_else(|refusal| {
                info!(merchant = %peer, code = %refusal.code, detail = refusal.detail, "sales request refused");
                SalesResponse::Refused(refusal)
            })
        }
    })
    .await?;
    mailbox::start(&ctx, supervisor).await?;
    announcing::start(Arc::clone(&ctx), supervisor);
    chore::start(ctx, supervisor);
    Ok(())
}

/// Answers one request of a merchant.
pub(crate) async fn answer(
    ctx: &Arc<Context>,
    merchant: PeerId,
    request: SalesRequest,
) -> Result<SalesResponse, Refusal> {
    let now = now_ms();
    match request {
        SalesRequest::Reserve(request) => reserve::reserve(ctx, merchant, request, now).await,
        SalesRequest::Release { transaction, endorsement } => {
            release::release(ctx, merchant, transaction, endorsement, now).await
        }
        SalesRequest::Enrol { token, name, held } => {
            Ok(SalesResponse::Enrolled(crate::enrol::merchant(ctx, merchant, token, name, held).await?))
        }
        SalesRequest::Refund { transaction } => {
            let state = blocking(ctx, move |ctx| refund(ctx, merchant, transaction, now)).await?;
            ctx.announcing.nudge();
            Ok(SalesResponse::State(state))
        }
        SalesRequest::Recover { word } => {
            let moved = blocking(ctx, move |ctx| moving::by_merchant(ctx, merchant, word, now)).await?;
            ctx.announcing.nudge();
            Ok(moved)
        }
        request => blocking(ctx, move |ctx| answer_blocking(ctx, merchant, request, now)).await,
    }
}

fn answer_blocking(
    ctx: &Context,
    merchant: PeerId,
    request: SalesRequest,
    now: u64,
) -> Result<SalesResponse, SaleError> {
    match request {
        SalesRequest::Cancel { transaction } => Ok(SalesResponse::State(cancel(ctx, merchant, transaction, now)?)),
        SalesRequest::Products { after } => {
            ctx.enrolled_merchant(&merchant, now)?;
            let trust = ctx.trust();
            let sellable = |record: &ProductRecord, manifest: &Signed<Manifest>| {
                !ctx.revocations.with(|revoked| revoked.has_content(&record.content))
                    && catalogue::void(&trust, manifest, record.published_at, now).is_none()
            };
            let page = ctx.catalogue.product_page(after, SalesResponse::PRODUCTS_PAGE, sellable)?;
            Ok(SalesResponse::Products(page))
        }
        SalesRequest::Status { transactions } => status(ctx, merchant, &transactions),
        SalesRequest::TakenBack { after } => {
            let sales = ctx.db.read(|txn| taken_back(ctx, txn, merchant, after))?;
            Ok(SalesResponse::TakenBack { restore: ctx.restore, sales })
        }
        SalesRequest::Captured { transactions } => captured(ctx, merchant, &transactions, now),
        SalesRequest::Evidence { transaction } => {
            own(ctx.db.read(|txn| ctx.archive.sale(txn, &transaction))?, &merchant)?;
            Ok(SalesResponse::Evidence(evidence::pack(ctx, transaction, now)?.to_bytes()))
        }
        SalesRequest::Holder { transaction } => {
            let sale = own(ctx.db.read(|txn| ctx.archive.sale(txn, &transaction))?, &merchant)?;
            let generation = moving::generation(ctx, &transaction, &sale);
            Ok(SalesResponse::Holder { client: sale.client, generation })
        }
        // Answered before they get here.
        SalesRequest::Reserve(_)
        | SalesRequest::Release { .. }
        | SalesRequest::Enrol { .. }
        | SalesRequest::Refund { .. }
        | SalesRequest::Recover { .. } => Err(Refusal::new(RefusalCode::Internal, "answered elsewhere").into()),
    }
}

/// Runs database work and cryptography where they may block.
pub(crate) async fn blocking<R: Send + 'static>(
    ctx: &Arc<Context>,
    work: impl FnOnce(&Context) -> Result<R, SaleError> + Send + 'static,
) -> Result<R, Refusal> {
    let ctx = Arc::clone(ctx);
    match tokio::task::spawn_blocking(move || work(&ctx)).await {
        Ok(result) => result.map_err(SaleError::into_refusal),
        Err(panic) => Err(internal(&panic)),
    }
}

fn not_yours() -> Refusal {
    Refusal::new(RefusalCode::NotYourReservation, "there is no such reservation of this merchant")
}

/// The merchant's own sale.
fn own(sale: Option<Sale>, merchant: &PeerId) -> Result<Sale, Refusal> {
    sale.filter(|sale| sale.merchant == *merchant).ok_or_else(not_yours)
}

fn cancel(ctx: &Context, merchant: PeerId, id: TransactionId, now: u64) -> Result<TransactionState, SaleError> {
    own(ctx.db.read(|txn| ctx.archive.sale(txn, &id))?, &merchant)?;
    archive::bring_back(ctx, id)?;
    let state = ctx.db.write_blocking(move |txn| {
        let mut sale = own(SALES.get(txn, &id)?, &merchant)?;
        let before = sale.state;
        sale.advance(Event::Cancel, now)?;
        // It counts as open until its time is over: what is formed is kept, and a merchant that takes back as fast as it
        // reserves is not to form more than one that lets its reservations expire.
        put_sale(txn, &id, Some(before), &sale)?;
        Ok::<_, SaleError>(sale.state)
    })?;
    info!(transaction = %id, "reservation cancelled");
    Ok(state)
}

fn refund(ctx: &Context, merchant: PeerId, id: TransactionId, now: u64) -> Result<TransactionState, SaleError> {
    let found = ctx.db.read(|txn| ctx.archive.sale(txn, &id)).map_err(|error| match error {
        // By its own name: a shop that has many to ask about goes on to the next.
        store::StoreError::Corrupt { .. } => {
            tracing::error!(transaction = %id, %error, "a sale that is to be refunded cannot be read: restore its segment");
            let detail = "the record of this sale is damaged at the manager: its operator has to restore it";
            SaleError::from(Refusal::new(RefusalCode::WrongState, detail))
        }
        error => error.into(),
    })?;
    own(found, &merchant)?;
    archive::bring_back(ctx, id)?;
    let late_ms = ctx.config.close_grace_ms;
    ctx.db.write_step_blocking(Step::ManagerRefund, move |txn| {
        let mut sale = own(SALES.get(txn, &id)?, &merchant)?;
        take_back(txn, id, &mut sale, Event::Refund, now, late_ms)?;
        Ok(sale.state)
    })
}

/// A merchant that took a held payment was told by this manager that the sale was completed. If the books do not know that,
/// they are of a backup from before: of such a sale they take the merchant's word, and the price is due as after a
/// completion. Of any other sale nothing is changed.
fn captured(ctx: &Context, merchant: PeerId, ids: &[TransactionId], now: u64) -> Result<SalesResponse, SaleError> {
    if ids.len() > STATUS_MAX {
        return Err(Refusal::new(RefusalCode::TooLarge, "at most 256 transactions are told of at once").into());
    }
    for id in ids {
        let Some(sale) = ctx.db.read(|txn| SALES.get(txn, id))? else { continue };
        let waited = evidence::restored_at(ctx, &sale, now)?.map(|at| at.saturating_add(ctx.config.close_grace_ms));
        // So long the sale is kept from being refunded for it. A word that comes later was not needed, or is not true.
        if sale.merchant != merchant || !sale.awaits_completion() || waited.is_none_or(|until| now >= until) {
            continue;
        }
        let id = *id;
        ctx.db.write_step_blocking(Step::ManagerComplete, move |txn| {
            let mut sale = own(SALES.get(txn, &id)?, &merchant)?;
            if sale.awaits_completion() {
                capture(txn, id, &mut sale, now)?;
                let what = "by the merchant's word, after a restore: the completion was forgotten";
                audit::note(txn, now, "captured", id, what.to_owned())?;
                put_sale(txn, &id, Some(sale.state), &sale)?;
            }
            Ok::<_, SaleError>(())
        })?;
        warn!(transaction = %id, %merchant, "captured by the merchant's word: its completion was forgotten by a restore");
    }
    status(ctx, merchant, ids)
}

/// For merchants whose certificate is over, too: they must learn what became of their orders.
fn status(ctx: &Context, merchant: PeerId, ids: &[TransactionId]) -> Result<SalesResponse, SaleError> {
    if ids.len() > STATUS_MAX {
        return Err(Refusal::new(RefusalCode::TooLarge, "at most 256 transactions are asked for at once").into());
    }
    let states = ctx.db.read(|txn| {
        // Whoever is no merchant has no sale; and what is archived is read in whole, once.
        if !MERCHANTS.contains(txn, &merchant)? {
            return Ok(vec![None; ids.len()]);
        }
        let mut found: HashMap<TransactionId, Option<TransactionState>> = HashMap::new();
        for id in ids {
            if let Entry::Vacant(place) = found.entry(*id) {
                place.insert(match ctx.archive.seen(txn, id)? {
                    Some(Seen::Whole(sale)) => (sale.merchant == merchant).then_some(sale.state),
                    // Nobody but its parties knows the id. It is not to look as if it was forgotten: then its payment would
                    // be let go.
                    Some(Seen::State(state)) => Some(state),
                    None => None,
                });
            }
        }
        Ok::<_, SaleError>(ids.iter().map(|id| found.get(id).copied().flatten()).collect())
    })?;
    Ok(SalesResponse::States(states))
}
