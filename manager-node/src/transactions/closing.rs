//! How a delivery ends: when it counts as delivered, who is paid, and what is undone when a sale is taken back. It is
//! called from receipts, mailbox, refunds and the chore, always within their database transaction.

use protocol::TransactionId;
use protocol::api::TransactionState;
use protocol::entitlement::MAX_GENERATIONS;
use protocol::manifest::KeyPolicy;
use protocol::receipt::DeliveryId;
use protocol::settling::Counting;
use protocol::ticket::Payer;
use store::{Mark, StoreError, WriteTransaction};
use tracing::info;

use super::exposure::{booked, shared, unexpose};
use super::state::is_taken_back;
use super::{
    ACKS, Closed, DUE, Delivery, Event, Generation, MOVES, MOVING, PAID_DELIVERY, REVOKING, SALES, Sale, SaleError,
    VOIDED, Voided, drop_reservation, get_delivery, internal, put_delivery, put_sale, taken_back,
};
use crate::audit;
use crate::context::Context;
use crate::ledger::{Bill, Source, pay_seeders, post};

/// Takes sale and delivery on after something was counted, and stores both: delivering, delivered once everything was
/// acknowledged or the client signed the completion, captured then where the policy says so, and closed once whole.
/// A completed delivery of which receipts are missing stays open for `grace_ms`, and so does, after a restore, what is whole
/// by what was downloaded since: of a sale from before, seeders have receipts that were forgotten, and send them again.
/// `forgetful_before` is the time of that restore, where it is not longer ago.
pub(crate) fn after_count(
    txn: &WriteTransaction<'_>,
    id: DeliveryId,
    delivery: &mut Delivery,
    sale: Option<&mut Sale>,
    now: u64,
    grace_ms: u64,
    forgetful_before: Option<u64>,
) -> Result<(), SaleError> {
    let whole = delivery.counting.is_whole(&delivery.layout);
    let completed = delivery.counting.is_completed();
    let Some(sale) = sale else {
        if whole {
            close(txn, id, delivery, None, now)?;
        }
        return Ok(put_delivery(txn, id, delivery)?);
    };
    // All that is changed of a sale below.
    let changing = |sale: &Sale| {
        let release = sale.release.as_ref().map(|release| (release.captured, release.charged));
        (sale.state, sale.changed_at, release)
    };
    let (before, as_stored) = (sale.state, changing(sale));
    if delivery.counting.acked().next().is_some() {
        sale.advance(Event::Count, now)?;
    }
    if completed && !is_taken_back(sale.state) {
        capture(txn, id.transaction, sale, now)?;
    }
    // Without its completion the client of an on-completion sale has no key, and nothing is paid for.
    let counts = completed || sale.policy == KeyPolicy::AtRelease;
    if (whole || completed) && counts {
        sale.advance(Event::Deliver, now)?;
    }
    if sale.state != before && sale.state == TransactionState::Delivered {
        info!(step = 12, transaction = %id.transaction, whole, completed, "delivered");
    }
    let waited_for = match forgetful_before {
        Some(before) if whole && counts && is_of_after(txn, id, sale, before)? => Some(before.saturating_add(grace_ms)),
        _ => None,
    };
    if let Some(until) = waited_for {
        move_due(txn, id, delivery, delivery.due_at.min(until))?;
    } else if whole && counts {
        close(txn, id, delivery, Some(sale), now)?;
    } else if completed {
        let soonest = delivery.due_at.min(now.saturating_add(grace_ms));
        move_due(txn, id, delivery, soonest)?;
    }
    put_delivery(txn, id, delivery)?;
    // Most receipts change the delivery alone. What a completion changed in the sale was changed by the caller.
    if completed || changing(sale) != as_stored {
        put_sale(txn, &id.transaction, Some(before), sale)?;
    }
    Ok(())
}

/// Was a sale from before `restored` downloaded since, as far as its acknowledgements say?
fn is_of_after(txn: &WriteTransaction<'_>, id: DeliveryId, sale: &Sale, restored: u64) -> Result<bool, SaleError> {
    if sale.formed_at >= restored {
        return Ok(false);
    }
    let acks = ACKS.prefix(txn, &(id.transaction, id.delivery), Counting::MAX_SEEDERS)?;
    Ok(acks.iter().any(|(_, ack)| ack.peek().is_ok_and(|ack| ack.at >= restored)))
}

/// Ends a delivery of which more was acknowledged than its lease allows. Seeders hear that the lease is void, as after a
/// move; what they delivered until then is paid, within the ceiling, once it was waited `late_ms` for their receipts. The
/// purchase stays its buyer's, who may download it again where nobody is paid for it: one who lost half a download, or
/// kept two copies of a home, looks in the books like one who shares a key. `revoked_generation` is the one that the purchase is
/// in by the revocation epochs, whatever the books say; `first` says that it was not past its lease before. True when seeders
/// are to hear something.
pub(crate) fn end_lease(
    txn: &WriteTransaction<'_>,
    id: DeliveryId,
    delivery: &mut Delivery,
    sale: &mut Sale,
    (revoked_generation, first): (u32, bool),
    now: u64,
    late_ms: u64,
) -> Result<bool, SaleError> {
    if is_taken_back(sale.state) {
        // Seeders heard that already; only the waiting for late receipts ends.
        close(txn, id, delivery, Some(sale), now)?;
        put_delivery(txn, id, delivery)?;
        put_sale(txn, &id.transaction, Some(sale.state), sale)?;
        return Ok(false);
    }
    let release = sale.release.as_ref();
    // Where a restore forgot that the purchase moved, its lease is void already, and the next generation is another's.
    let newest = release.is_some_and(|release| release.delivery == id.delivery);
    // Whoever has had it from the beginning has another delivery beside this one, perhaps: seeders take the lease of each.
    let beside = first && delivery.client == sale.client && MOVES.prefix(txn, &id.transaction, 1)?.is_empty();
    let current = sale.generation >= revoked_generation
        && (newest || beside)
        && release.is_some_and(|release| !sale.lease_ended(release));
    let held = release.is_some_and(|release| !release.captured);
    let next = sale.generation.saturating_add(1);
    // A payment that is only held is given back. And nobody loses a download so many times.
    if current && (held && newest || next > MAX_GENERATIONS) {
        take_back(txn, id.transaction, sale, Event::Revoke, now, late_ms)?;
        return Ok(true);
    }
    // What a former holder signs takes nothing from the new one; the delivery is closed with the purchase.
    if held {
        return Ok(false);
    }
    let before = sale.state;
    let late_until = delivery.due_at.min(now.saturating_add(late_ms));
    if delivery.rate > 0 && late_until > now {
        move_due(txn, id, delivery, late_until)?;
    } else {
        close(txn, id, delivery, Some(sale), now)?;
    }
    put_delivery(txn, id, delivery)?;
    if current {
        sale.generation = next;
        // The key is sealed to a generation: it is sealed anew with the next lease.
        if let Some(release) = sale.release.as_mut() {
            release.grant = None;
        }
        MOVING.put(txn, &id.transaction, &Generation { number: next })?;
        VOIDED.put(txn, &(id.transaction, next), &Voided { at: now })?;
        audit::note(txn, now, "lease", id, format!("void, generation {next}: more was acknowledged than it allows"))?;
    }
    put_sale(txn, &id.transaction, Some(before), sale)?;
    Ok(current)
}

/// Changes when an open delivery is closed at the latest; the caller stores the delivery.
pub(crate) fn move_due(
    txn: &WriteTransaction<'_>,
    id: DeliveryId,
    delivery: &mut Delivery,
    due_at: u64,
) -> Result<(), StoreError> {
    if delivery.closed.is_none() && delivery.due_at != due_at {
        DUE.delete(txn, &(delivery.due_at, id.transaction, id.delivery))?;
        DUE.put(txn, &(due_at, id.transaction, id.delivery), &Mark)?;
        delivery.due_at = due_at;
    }
    Ok(())
}

/// Takes a released sale into the books, once.
pub(crate) fn capture(
    txn: &WriteTransaction<'_>,
    id: TransactionId,
    sale: &mut Sale,
    now: u64,
) -> Result<(), SaleError> {
    let merchant = sale.merchant;
    if let Some(release) = sale.release.as_mut().filter(|release| !release.captured) {
        if post(txn, &release.split.capture(id, merchant, now)?)? {
            shared(txn, &merchant, &release.split, false)?;
        }
        release.captured = true;
        if release.charged.is_none() {
            booked(txn, &merchant, &release.split, sale.policy == KeyPolicy::OnCompletion)?;
        }
        info!(transaction = %id, amount = %release.split.price, "payment captured");
    }
    Ok(())
}

/// Closes a delivery and pays its seeders; the caller stores sale and delivery.
fn close(
    txn: &WriteTransaction<'_>,
    id: DeliveryId,
    delivery: &mut Delivery,
    mut sale: Option<&mut Sale>,
    now: u64,
) -> Result<(), SaleError> {
    if delivery.closed.is_some() {
        return Ok(());
    }
    let payouts = delivery.counting.close(&delivery.layout, delivery.rate, delivery.ceiling);
    let source = match (delivery.payer, sale.as_deref()) {
        (Payer::Merchant, Some(sale)) => source_of(sale, id.delivery),
        (Payer::Network, _) | (Payer::Merchant, None) => Source::Network,
    };
    let bill = Bill {
        key: format!("close:{id}"),
        at: now,
        transaction: id.transaction,
        delivery: id.delivery,
        currency: delivery.currency,
        source,
        payouts: &payouts,
    };
    // Of one that nobody fetched there is nothing to post, but for what was set aside.
    let charged = match (&bill.source, bill.payouts.lines.is_empty()) {
        (Source::Merchant(_) | Source::Network, true) => 0,
        _ => pay_seeders(txn, &bill)?.unwrap_or(0),
    };
    DUE.delete(txn, &(delivery.due_at, id.transaction, id.delivery))?;
    delivery.closed = Some(Closed { at: now, charged, capped: payouts.capped, lines: payouts.lines });
    if let Some(sale) = sale.as_mut() {
        let merchant = sale.merchant;
        let refunded = sale.state == TransactionState::Refunded;
        if let Some(release) = sale.release.as_mut().filter(|_| id.delivery == PAID_DELIVERY) {
            release.charged = Some(charged);
            unexpose(txn, &merchant, &release.split, release.captured, charged)?;
            if refunded && release.captured {
                post(txn, &release.split.refund_rest(id.transaction, merchant, charged, now)?)?;
            }
        }
        sale.advance(Event::Settle, now)?;
    }
    info!(delivery = %id, charged, currency = %delivery.currency, "delivery closed");
    Ok(())
}

fn source_of(sale: &Sale, delivery: u32) -> Source {
    match &sale.release {
        Some(release) if release.captured && delivery == PAID_DELIVERY => {
            Source::Escrow { minor: release.split.escrow, merchant: sale.merchant }
        }
        // Taken back before it was captured: what was delivered until then is the merchant's cost.
        _ => Source::Merchant(sale.merchant),
    }
}

/// Of what began before the first of these times those are waited for until the second who know more than a manager that
/// came back from a backup. Unix milliseconds.
pub(super) fn waited_for(ctx: &Context, now: u64) -> Option<(u64, u64)> {
    ctx.came_back(now).map(|at| (at, at.saturating_add(ctx.config.close_grace_ms)))
}

/// Closes a delivery whose time is over. A sale that was to be paid on completion, and was not completed, is refunded.
pub(super) fn close_due(txn: &WriteTransaction<'_>, id: DeliveryId, now: u64) -> Result<(), SaleError> {
    let Some(mut delivery) = get_delivery(txn, id)? else { return Ok(()) };
    let sale = SALES.get(txn, &id.transaction)?;
    let Some(mut sale) = sale else {
        close(txn, id, &mut delivery, None, now)?;
        return Ok(put_delivery(txn, id, &delivery)?);
    };
    if sale.awaits_completion() {
        info!(transaction = %id.transaction, "not completed in its time: refunded");
        return take_back(txn, id.transaction, &mut sale, Event::Refund, now, 0);
    }
    let before = sale.state;
    close(txn, id, &mut delivery, Some(&mut sale), now)?;
    put_delivery(txn, id, &delivery)?;
    Ok(put_sale(txn, &id.transaction, Some(before), &sale)?)
}

/// Refunds or revokes a sale and stores it: a refund reverses it in the books, and the transaction is noted for the next
/// revocation epoch. What was set aside for the paid delivery stays so while that waits for receipts of what was
/// delivered until now: not past its due time, and `late_ms` at most. Every other delivery ends with what was counted.
pub(crate) fn take_back(
    txn: &WriteTransaction<'_>,
    id: TransactionId,
    sale: &mut Sale,
    event: Event,
    now: u64,
    late_ms: u64,
) -> Result<(), SaleError> {
    let before = sale.state;
    // Asked first: closing below passes through `settled`, from which not everything can follow.
    let after = super::state::next(before, event)?;
    // A sale that was revoked before anything was paid for it stays so: nothing is to go back.
    let unpaid = !sale.release.as_ref().is_some_and(|release| release.captured);
    if after == before || before == TransactionState::Revoked && unpaid {
        return Ok(());
    }
    let (last, set_aside) = sale.release.as_ref().map_or((0, 0), |release| (release.delivery, release.split.escrow));
    let mut waits = false;
    for number in PAID_DELIVERY..=last {
        let delivery_id = DeliveryId { transaction: id, delivery: number };
        let Some(mut delivery) = get_delivery(txn, delivery_id)?.filter(|delivery| delivery.closed.is_none()) else {
            continue;
        };
        let late_until = delivery.due_at.min(now.saturating_add(late_ms));
        if number == PAID_DELIVERY && set_aside > 0 && late_until > now {
            waits = true;
            move_due(txn, delivery_id, &mut delivery, late_until)?;
        } else {
            close(txn, delivery_id, &mut delivery, Some(sale), now)?;
        }
        put_delivery(txn, delivery_id, &delivery)?;
    }
    if let Some(release) = sale.release.as_ref().filter(|r| r.captured && event == Event::Refund) {
        let kept = match waits {
            true => set_aside,
            false => release.charged.ok_or_else(|| internal(&"a closed delivery has no cost"))?,
        };
        if post(txn, &release.split.refund(id, sale.merchant, kept, now)?)? {
            shared(txn, &sale.merchant, &release.split, true)?;
        }
    }
    drop_reservation(txn, id, sale)?;
    sale.state = after;
    sale.changed_at = now;
    put_sale(txn, &id, Some(before), sale)?;
    if sale.release.is_some() {
        REVOKING.put(txn, &id, &Mark)?;
        taken_back::note(txn, id, sale)?;
    }
    info!(transaction = %id, from = before.as_str(), to = after.as_str(), waits, "sale taken back");
    Ok(())
}
