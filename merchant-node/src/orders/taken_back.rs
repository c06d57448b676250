//! Sales that the manager took back on its own: its operator refunded or revoked one. The shop asks what is new since it
//! last asked, and gives back what the buyer paid.

use std::ops::Bound;
use std::sync::Arc;

use bincode::{Decode, Encode};
use protocol::api::{SalesRequest, SalesResponse, TakenBack, TransactionState};
use protocol::manifest::KeyPolicy;
use protocol::wire;
use store::{StoreError, Table};

use super::{Failure, Listed, Order, OrderId, Stage};
use crate::link::AskError;
use crate::shop::Shop;
use crate::tables::ORDERS;

/// Up to where the manager was asked. One row.
const ASKED: Table<(), Asked> = Table::new("merchant.taken-back");
/// Orders looked at in one read, and at most as many told of in one call.
const PAGE: usize = 256;
/// Pages in one pass of the chore; the next pass goes on.
const PAGES: usize = 16;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
struct Asked {
    /// The manager's count of restores.
    restore: u64,
    /// The last number seen.
    number: u64,
}

wire!(Asked => 32);

/// Asks for what is new, and does what it calls for. What was done is noted afterwards: to do it again changes nothing.
pub(super) async fn ask(shop: &Arc<Shop>) -> Result<(), StoreError> {
    for _ in 0..PAGES {
        let before = shop.db.read(|txn| ASKED.get(txn, &()))?.unwrap_or_default();
        let (restore, sales) = match shop.link.sales(SalesRequest::TakenBack { after: before.number }).await {
            Ok(SalesResponse::TakenBack { restore, sales }) => (restore, sales),
            Ok(_) => {
                tracing::warn!("the manager's answer on sales taken back does not fit the question");
                return Ok(());
            }
            Err(error) => {
                tracing::debug!(%error, "sales taken back not asked for");
                return Ok(());
            }
        };
        if restore != before.restore && !(tell_captured(shop, restore).await? && tell_refunded(shop, restore).await?) {
            return Ok(());
        }
        let mut asked = Asked { restore, ..before };
        let anew = restore != before.restore && before.number > 0;
        let mut waits = false;
        if anew {
            // A manager that came back from a backup counts from where that was.
            asked.number = 0;
        } else {
            for sale in &sales {
                if sale.number <= asked.number {
                    tracing::warn!("the manager's list of sales taken back does not count up");
                    return Ok(());
                }
                if !take_back(shop, sale).await? {
                    waits = true;
                    break;
                }
                asked.number = sale.number;
            }
        }
        if asked != before {
            shop.db.write(move |txn| ASKED.put(txn, &(), &asked)).await?;
        }
        let at_end = !anew && sales.len() < SalesResponse::TAKEN_BACK_PAGE;
        if waits || at_end && !look_again(shop, asked).await? {
            return Ok(());
        }
    }
    Ok(())
}

/// At the end of the list. An order whose sale was revoked may wait all the same: an earlier version passed over its row, say.
/// For each such order all of the list is asked for once more. True when it is.
async fn look_again(shop: &Arc<Shop>, asked: Asked) -> Result<bool, StoreError> {
    let mut again = false;
    for (id, listed) in shop.desk.revoked() {
        let stage = shop.order(&id)?.map(|order| order.stage);
        if !matches!(stage, Some(Stage::Reserved | Stage::AwaitingCompletion)) {
            shop.desk.listed(&id, None);
        } else if listed == Listed::FromWhereItWas && asked.number > 0 {
            shop.desk.listed(&id, Some(Listed::FromTheStart));
            again = true;
        } else if stage == Some(Stage::AwaitingCompletion) {
            let why = "the manager revoked the sale and does not say any more whether its payment is due";
            shop.desk.note(id, format!("{why}: ask its operator; `willcall merchant refund {id}` gives it back"));
        }
    }
    if again {
        let asked = Asked { number: 0, ..asked };
        shop.db.write(move |txn| ASKED.put(txn, &(), &asked)).await?;
    }
    Ok(again)
}

/// A manager that came back from a backup may have forgotten which sales were completed, and would give their payments back
/// after a while. It is told which of them this shop took, as often as it was restored. False when it could not be told.
async fn tell_captured(shop: &Arc<Shop>, restore: u64) -> Result<bool, StoreError> {
    let mut from = Bound::Unbounded;
    loop {
        let page = shop.db.read(|txn| ORDERS.range(txn, (from, Bound::Unbounded), PAGE))?;
        let Some((last, _)) = page.last() else { return Ok(true) };
        from = Bound::Excluded(*last);
        let taken = |order: &Order| {
            order.policy == Some(KeyPolicy::OnCompletion) && matches!(order.stage, Stage::Completed | Stage::Done)
        };
        let sales = page.iter().filter(|(_, order)| taken(order)).filter_map(|(_, order)| order.sale());
        // A restore's number is its time in seconds: what was sold since is not in question.
        let transactions: Vec<_> =
            sales.filter(|sale| sale.formed_at / 1000 <= restore).map(|sale| sale.transaction).collect();
        if transactions.is_empty() {
            continue;
        }
        match shop.link.sales(SalesRequest::Captured { transactions }).await {
            Ok(SalesResponse::States(_)) => {}
            Ok(_) => {
                tracing::warn!("the manager's answer on payments that were taken does not fit what it was told");
                return Ok(false);
            }
            Err(error) => {
                tracing::debug!(%error, "the manager is not told yet which payments were taken");
                return Ok(false);
            }
        }
    }
}

/// It may have forgotten refunds, too, and have the price of these sales due again: it is asked for them once more, which
/// changes nothing of one that it knows. False when it could not be asked.
async fn tell_refunded(shop: &Arc<Shop>, restore: u64) -> Result<bool, StoreError> {
    let mut from = Bound::Unbounded;
    loop {
        let page = shop.db.read(|txn| ORDERS.range(txn, (from, Bound::Unbounded), PAGE))?;
        let Some((last, _)) = page.last() else { return Ok(true) };
        from = Bound::Excluded(*last);
        // Also where the payment provider keeps the money from going back: the manager took the sale back before that.
        let over = |order: &Order| match order.stage {
            Stage::Voiding => order.ends_as == Some(Stage::Refunded),
            stage => stage == Stage::Refunded,
        };
        let refunded = page.iter().filter(|(_, order)| over(order));
        let sales = refunded.filter_map(|(_, order)| order.sale()).filter(|sale| sale.formed_at / 1000 <= restore);
        let transactions: Vec<_> = sales.map(|sale| sale.transaction).collect();
        if transactions.is_empty() {
            continue;
        }
        let states = match shop.link.sales(SalesRequest::Status { transactions: transactions.clone() }).await {
            Ok(SalesResponse::States(states)) => states,
            Ok(_) | Err(_) => {
                tracing::debug!("the manager is not asked yet what it knows of refunds");
                return Ok(false);
            }
        };
        // One that is only revoked may have been paid for, by its books.
        for (transaction, state) in transactions.into_iter().zip(states) {
            if state.is_none_or(|state| state == TransactionState::Refunded) {
                continue;
            }
            match shop.link.sales(SalesRequest::Refund { transaction }).await {
                Ok(_) => tracing::warn!(%transaction, "refunded once more: the manager came back from a backup"),
                // It never released it, by its books: then nothing is due.
                Err(AskError::Refused(refusal)) => tracing::info!(%transaction, %refusal, "not refunded once more"),
                Err(error) => {
                    tracing::debug!(%error, "the manager is not told yet what was refunded");
                    return Ok(false);
                }
            }
        }
    }
}

/// The order whose sale was taken back: what its buyer paid goes back where the manager's books gave it back, too. False
/// where the order is not yet as far as its sale: a shop that came back from a backup asks for this one again.
async fn take_back(shop: &Arc<Shop>, sale: &TakenBack) -> Result<bool, StoreError> {
    let Ok(id) = sale.order.parse::<OrderId>() else {
        tracing::warn!(order = sale.order.escape_debug().to_string(), "a sale taken back is of no order of this shop");
        return Ok(true);
    };
    // Again where the order moved meanwhile; it has few stages.
    loop {
        let known = shop.order(&id)?;
        if known.as_ref().is_some_and(|order| matches!(order.stage, Stage::Received | Stage::Authorised)) {
            return Ok(false);
        }
        let known = known.filter(|order| order.transaction() == Some(sale.transaction));
        let Some(mut order) = known else {
            tracing::warn!(order = %id, transaction = %sale.transaction, "the sale of an unknown order was taken back");
            return Ok(true);
        };
        let before = order.stage;
        match (before, sale.state) {
            // Taken because the manager said that it was completed: it has forgotten that, and the buyer has the goods.
            (Stage::Completed | Stage::Done, TransactionState::Refunded)
                if order.policy == Some(KeyPolicy::OnCompletion) && !sale.captured =>
            {
                if order.failure.is_some() {
                    return Ok(true);
                }
                order.failure = Some(Failure::completed_before());
            }
            // Reserved: it was released, and the answer to that did not come.
            (
                Stage::Reserved | Stage::Released | Stage::AwaitingCompletion | Stage::Completed | Stage::Done,
                TransactionState::Refunded,
            ) => {
                order = order.failing(Stage::Refunded, Failure::taken_back(sale.state));
            }
            // The manager gives no money back that it has in its books: whoever has the goods is not to have it, too.
            (Stage::Reserved | Stage::Released | Stage::AwaitingCompletion, TransactionState::Revoked)
                if sale.captured =>
            {
                order.stage = Stage::Completed;
                order.failure = Some(Failure::taken_back(sale.state));
            }
            (Stage::Reserved | Stage::Released | Stage::AwaitingCompletion, TransactionState::Revoked) => {
                order = order.failing(Stage::Cancelled, Failure::let_go(sale.state));
            }
            // Its money stays where it is, in the manager's books, too: whether the buyer gets it is the merchant's to say.
            (Stage::Completed | Stage::Done, TransactionState::Revoked) if order.failure.is_none() => {
                order.failure = Some(Failure::taken_back(sale.state));
            }
            _ => return Ok(true),
        }
        if shop.save(before, order, None).await? {
            let state = sale.state.as_str();
            tracing::warn!(order = %id, transaction = %sale.transaction, state, "the manager took the sale back");
            shop.drive(id);
            return Ok(true);
        }
    }
}
