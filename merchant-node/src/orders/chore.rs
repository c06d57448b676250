//! Orders go on without their buyers: this loop takes up what a crash, an outage or a slow delivery left unfinished,
//! asks the manager which deliveries are complete, and forgets what came to nothing long ago.

use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use protocol::TransactionId;
use protocol::api::{SalesRequest, SalesResponse, TransactionState};
use store::{Mark, StoreError, Table};
use tokio::time::Instant;

use super::steps::is_over;
use super::{Failure, Order, OrderId, Stage, taken_back};
use crate::clock::now_ms;
use crate::link::Fate;
use crate::shop::Shop;
use crate::tables::{BY_TIME, KEYS, OPEN, ORDERS, TICKETS};

/// Orders driven by this loop at once: leaves the manager's places per peer to new purchases.
const AT_ONCE: usize = 4;
/// Orders read at a time, and transactions in one question (the protocol's bound).
const PAGE: usize = 256;
/// How often old orders are looked for.
const PRUNE_EVERY: Duration = Duration::from_secs(600);
/// Old orders looked at in one write.
const PRUNE_STEP: usize = 1_000;

/// Up to here (time and order) old orders were looked at. One row.
const PRUNED: Table<(), Pruned> = Table::new("merchant.pruned");

#[derive(Clone, Debug, bincode::Encode, bincode::Decode)]
struct Pruned {
    at: u64,
    order: OrderId,
}
protocol::wire!(Pruned => 64);

/// Runs until the node stops.
pub(crate) async fn run(shop: Arc<Shop>) -> Result<(), StoreError> {
    let token = shop.supervisor.token();
    let mut reachable = shop.link.reachable();
    let mut asked: Option<Instant> = None;
    let mut asked_back: Option<Instant> = None;
    let mut pruned: Option<Instant> = None;
    loop {
        let pass = async {
            let awaiting = drive_open(&shop).await?;
            let status_due = asked.is_none_or(|at| at.elapsed() >= Duration::from_millis(shop.config.status_ms));
            if status_due && !awaiting.is_empty() {
                asked = Some(Instant::now());
                ask_status(&shop, awaiting).await?;
            }
            if asked_back.is_none_or(|at| at.elapsed() >= Duration::from_millis(shop.config.status_ms))
                && shop.link.certificate().is_some()
            {
                asked_back = Some(Instant::now());
                taken_back::ask(&shop).await?;
            }
            if pruned.is_none_or(|at| at.elapsed() >= PRUNE_EVERY) {
                pruned = Some(Instant::now());
                prune(&shop).await?;
            }
            Ok::<_, StoreError>(())
        };
        tokio::select! {
            result = Box::pin(pass) => result?,
            () = token.cancelled() => return Ok(()),
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(shop.config.orders_ms)) => {}
            () = shop.desk.nudge.notified() => (asked, asked_back) = (None, None),
            changed = reachable.changed() => {
                if changed.is_ok() && *reachable.borrow_and_update() == Some(true) {
                    shop.desk.all_due();
                    asked_back = None;
                }
            }
            () = token.cancelled() => return Ok(()),
        }
    }
}

/// Drives the open orders that are due; gives those that wait for their completion.
async fn drive_open(shop: &Arc<Shop>) -> Result<Vec<(OrderId, TransactionId)>, StoreError> {
    let mut awaiting = Vec::new();
    let mut from = Bound::Unbounded;
    loop {
        let page: Vec<(OrderId, Mark)> = shop.db.read(|txn| OPEN.range(txn, (from, Bound::Unbounded), PAGE))?;
        let Some((last, _)) = page.last() else { return Ok(awaiting) };
        from = Bound::Excluded(*last);
        let mut due = Vec::new();
        for (id, _) in page {
            let Some(order) = shop.order(&id)? else { continue };
            match (order.stage, order.transaction()) {
                (Stage::AwaitingCompletion, Some(transaction)) => awaiting.push((id, transaction)),
                _ if shop.desk.is_due(&id) => due.push((id, order.stage.needs_manager())),
                _ => {}
            }
        }
        futures::stream::iter(due)
            .for_each_concurrent(AT_ONCE, |(id, needs_manager)| async move {
                // With the manager away each would wait for its own time limit.
                let away = *shop.link.reachable().borrow() == Some(false);
                if needs_manager && away {
                    if shop.desk.why(&id).is_none() {
                        shop.desk.note(id, "the manager cannot be reached".to_owned());
                    }
                    return;
                }
                let mut driven = shop.drive(id);
                // An error means that the task is gone, which is an end, too.
                let _ = driven.wait_for(|done| *done).await;
            })
            .await;
    }
}

/// Payments that wait are taken or let go by what became of the delivery.
async fn ask_status(shop: &Arc<Shop>, awaiting: Vec<(OrderId, TransactionId)>) -> Result<(), StoreError> {
    for page in awaiting.chunks(PAGE) {
        let transactions = page.iter().map(|(_, transaction)| *transaction).collect();
        let states = match shop.link.sales(SalesRequest::Status { transactions }).await {
            Ok(SalesResponse::States(states)) if states.len() == page.len() => states,
            Ok(_) => {
                tracing::warn!("the manager's answer on transactions does not fit the question");
                return Ok(());
            }
            Err(error) => {
                tracing::debug!(%error, "transactions not asked about");
                return Ok(());
            }
        };
        let mut unknown = Vec::new();
        for ((id, transaction), state) in page.iter().zip(states) {
            let Some(order) = shop.order(id)? else { continue };
            match state {
                Some(state) => judge(shop, order, *transaction, state).await?,
                None => unknown.push(order),
            }
        }
        if !unknown.is_empty() {
            let_go_forgotten(shop, unknown).await?;
        }
    }
    Ok(())
}

/// A manager that came back from a backup knows nothing of what it released since: the key of such a sale can never be
/// given, and its payment waits for nothing.
async fn let_go_forgotten(shop: &Arc<Shop>, orders: Vec<Order>) -> Result<(), StoreError> {
    let (orders, sales): (Vec<_>, Vec<_>) =
        orders.into_iter().filter_map(|order| order.sale().map(|sale| (order, sale))).unzip();
    let fates = match shop.link.fates(&sales).await {
        Ok(fates) => fates,
        Err(error) => {
            tracing::debug!(%error, "sales that the manager does not know are not asked about again");
            return Ok(());
        }
    };
    for ((order, sale), fate) in orders.into_iter().zip(sales).zip(fates) {
        let transaction = sale.transaction;
        match fate {
            Fate::Forgotten => {
                tracing::warn!(%transaction, order = %order.id, "the manager forgot the sale: the payment is let go");
                shop.completed(order, Err((Stage::Refunded, Failure::forgotten()))).await?;
            }
            Fate::Unclear(why) => {
                tracing::warn!(%transaction, order = %order.id, why, "the manager does not know this transaction");
                shop.desk.note(order.id, why.to_owned());
            }
            Fate::Known(state) => judge(shop, order, transaction, state).await?,
        }
    }
    Ok(())
}

async fn judge(
    shop: &Arc<Shop>,
    order: Order,
    transaction: TransactionId,
    state: TransactionState,
) -> Result<(), StoreError> {
    if matches!(state, TransactionState::Delivered | TransactionState::Settled) {
        tracing::info!(%transaction, order = %order.id, "delivered: the payment is captured");
        return shop.completed(order, Ok(())).await;
    }
    // A revoked one may have been completed before: the list of sales taken back says whether its payment is due.
    if state == TransactionState::Revoked {
        shop.desk.was_revoked(order.id);
    } else if is_over(state) {
        tracing::info!(%transaction, order = %order.id, state = state.as_str(), "not delivered: the payment is let go");
        let end = match state {
            TransactionState::Expired => Stage::Expired,
            TransactionState::Refunded => Stage::Refunded,
            _ => Stage::Cancelled,
        };
        return shop.completed(order, Err((end, Failure::let_go(state)))).await;
    }
    Ok(())
}

/// Forgets failed orders, and frees idempotency keys, after `keep-ms`.
async fn prune(shop: &Arc<Shop>) -> Result<(), StoreError> {
    let before = now_ms().saturating_sub(shop.config.keep_ms);
    loop {
        let more = shop
            .db
            .write(move |txn| {
                let from = PRUNED.get(txn, &())?.map_or(Bound::Unbounded, |p| Bound::Excluded((p.at, p.order)));
                let end = Bound::Excluded((before, OrderId::from_bytes([0; 16])));
                let rows = BY_TIME.range(txn, (from, end), PRUNE_STEP)?;
                let Some(((at, order), _)) = rows.last() else { return Ok(false) };
                PRUNED.put(txn, &(), &Pruned { at: *at, order: *order })?;
                for (key, _) in &rows {
                    let Some(order) = ORDERS.get(txn, &key.1)? else { continue };
                    KEYS.delete(txn, &order.key)?;
                    if order.stage.is_failed() {
                        ORDERS.delete(txn, &order.id)?;
                        TICKETS.delete(txn, &order.id)?;
                        BY_TIME.delete(txn, key)?;
                    }
                }
                Ok::<_, StoreError>(rows.len() == PRUNE_STEP)
            })
            .await?;
        if !more {
            return Ok(());
        }
    }
}
