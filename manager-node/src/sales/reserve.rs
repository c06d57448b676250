//! Steps 4 to 6: a reservation request, once the payment data are in, forms the transaction data. One order id of a
//! merchant is one sale, so that a request repeated after a lost answer cannot sell twice.

use std::sync::Arc;

use protocol::api::{Reserve, SalesResponse, TransactionState};
use protocol::settling::Layout;
use protocol::ticket::{TransactionData, remuneration_commitment};
use protocol::trust::KeyPurpose;
use protocol::{Amount, PeerId, Refusal, RefusalCode, TransactionId, keys};
use rand::RngExt;
use store::{Mark, Step, WriteTransaction};
use tracing::info;

use crate::archive;
use crate::catalogue::{self, Product};
use crate::context::Context;
use crate::transactions::{EXPIRING, ORDER_IDS, SALES, Sale, SaleError, SaleRef, add_reservation, put_sale};
use crate::workers;

/// Longest order id, bytes.
const MAX_ORDER: usize = 64;

/// What a reservation comes to before anything is written.
enum Formed {
    /// The order was there.
    Before(SalesResponse),
    /// It is to be stored.
    New(TransactionId, Arc<Sale>),
}

pub(super) async fn reserve(
    ctx: &Arc<Context>,
    merchant: PeerId,
    request: Reserve,
    now: u64,
) -> Result<SalesResponse, Refusal> {
    // No thread waits for the disk: of those who wait for one flush, the last is woken no later than the first.
    let (id, sale) = match workers::run(ctx, move |ctx| look(ctx, merchant, request, now)).await? {
        Formed::Before(answer) => return Ok(answer),
        Formed::New(id, sale) => (id, sale),
    };
    if let Some(known) = put(ctx, id, &sale).await.map_err(SaleError::into_refusal)? {
        return repeated(&known, &sale.request);
    }
    let Reserve { order, product, client, .. } = &sale.request;
    info!(step = 4, transaction = %id, order, %merchant, "reservation request from merchant");
    info!(step = 5, transaction = %id, %product, %client, "transaction data formed");
    info!(step = 6, transaction = %id, %merchant, "transaction data to merchant");
    Ok(SalesResponse::Reserved { data: sale.data.clone(), expires_at: sale.expires_at })
}

fn look(ctx: &Context, merchant: PeerId, request: Reserve, now: u64) -> Result<Formed, SaleError> {
    if request.order.is_empty() || request.order.len() > MAX_ORDER || !request.order.bytes().all(is_printable) {
        let detail = "an order id has 1 to 64 printable ASCII characters";
        return Err(Refusal::new(RefusalCode::Malformed, detail).into());
    }
    let known = ctx.db.read(|txn| match archive::sale_of_order(txn, &merchant, &request.order)? {
        Some(id) => ctx.archive.sale(txn, &id),
        None => Ok(None),
    })?;
    // Before anything is asked that may have changed since: a shop lets go of the payment of what it is refused.
    if let Some(sale) = known {
        return Ok(Formed::Before(repeated(&sale, &request)?));
    }
    // Before that clock says that the shop's certificate is over, which is the last word on an order.
    ctx.clock_lets_sell()?;
    ctx.enrolled_merchant(&merchant, now)?;
    ctx.may_sell()?;
    ctx.knows_what_it_revoked()?;
    let sale = form(ctx, merchant, request, now)?;
    Ok(Formed::New(sale.id()?, Arc::new(sale)))
}

/// Stores the sale, or gives the one that was made of the same order meanwhile.
async fn put(ctx: &Context, id: TransactionId, sale: &Arc<Sale>) -> Result<Option<Sale>, SaleError> {
    let (sale, limit) = (Arc::clone(sale), ctx.config.max_reservations);
    let putting = move |txn: &WriteTransaction<'_>| {
        let order = (sale.merchant, sale.request.order.as_str());
        if let Some(SaleRef { id }) = ORDER_IDS.get(txn, &order)?
            && let Some(known) = SALES.get(txn, &id)?
        {
            return Ok::<_, SaleError>(Some(known));
        }
        add_reservation(txn, &sale.merchant, limit)?;
        ORDER_IDS.put(txn, &order, &SaleRef { id })?;
        EXPIRING.put(txn, &(sale.expires_at, id), &Mark)?;
        put_sale(txn, &id, None, &sale)?;
        Ok(None)
    };
    ctx.db.write_step(Step::ManagerReserve, putting).await
}

fn is_printable(byte: u8) -> bool {
    (b' '..=b'~').contains(&byte)
}

/// The first answer again, whatever became of the reservation since: that is found out by releasing it.
fn repeated(sale: &Sale, request: &Reserve) -> Result<SalesResponse, Refusal> {
    if sale.request != *request {
        let detail = "this order id was used for another order; use a new one";
        return Err(Refusal::new(RefusalCode::IdempotencyConflict, detail));
    }
    Ok(SalesResponse::Reserved { data: sale.data.clone(), expires_at: sale.expires_at })
}

/// Forms the sale of a request that passes all checks.
fn form(ctx: &Context, merchant: PeerId, request: Reserve, now: u64) -> Result<Sale, SaleError> {
    let unknown = || Refusal::new(RefusalCode::UnknownProduct, "there is no such product for sale");
    let product = ctx.catalogue.product(&request.product)?.ok_or_else(unknown)?;
    ctx.clock_lets_lease(product.lease_ms)?;
    let manifest = product.manifest.peek().map_err(Refusal::from)?;
    if ctx.revocations.with(|revoked| revoked.has_content(&manifest.content)) {
        return Err(unknown().into());
    }
    if let Some(void) = catalogue::void(&ctx.trust(), &product.manifest, manifest.published_at, now) {
        return Err(void.into());
    }
    check_price(&product, request.price)?;
    if !keys::is_usable(&request.client) {
        let detail = "the client's peer ID is no usable Ed25519 key: nothing could be sealed to it";
        return Err(Refusal::new(RefusalCode::Malformed, detail).into());
    }
    let data = TransactionData {
        network: ctx.network(),
        transaction: TransactionId::new(now, rand::rng().random()),
        product: request.product,
        manifest: product.info.manifest,
        client: request.client,
        merchant,
        remuneration: remuneration_commitment(&request.salt, &request.price),
        formed_at: now,
    };
    Ok(Sale {
        merchant,
        client: request.client,
        generation: 0,
        data: ctx.keys.sign(KeyPurpose::Ticket, &data),
        manifest: product.info.manifest,
        title: product.info.title.clone(),
        plain_bytes: product.info.plain_bytes,
        layout: Layout::from(&manifest),
        policy: product.info.policy,
        formed_at: now,
        expires_at: now.saturating_add(ctx.config.reservation_ms),
        state: TransactionState::Reserved,
        changed_at: now,
        release: None,
        request,
    })
}

fn check_price(product: &Product, price: Amount) -> Result<(), Refusal> {
    if price.minor > Amount::MAX_MINOR {
        return Err(Refusal::new(RefusalCode::TooLarge, "an amount of more than 10^12 minor units"));
    }
    let floor = product.info.price;
    if price.currency != floor.currency || price.minor < floor.minor {
        return Err(Refusal::new(RefusalCode::PriceBelowFloor, format!("the product costs {floor}, not {price}")));
    }
    Ok(())
}
