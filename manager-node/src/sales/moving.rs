//! A purchase changes hands: its holder gives it to another peer, or the merchant does for a holder who lost the key. The
//! entitlement moves, a lease of the next generation is signed, the content key is sealed anew, and the generation
//! before becomes void by the next revocation epoch. All of it is durable before anybody is answered.
//!
//! The new peer downloads under a delivery number of its own. What the old one acknowledged is counted and paid as it
//! was; nobody pays for a second download, so the new lease lists the origin alone.

use protocol::api::SalesResponse;
use protocol::entitlement::{MAX_GENERATIONS, MAX_MOVES, Move, Recovery};
use protocol::manifest::KeyPolicy;
use protocol::receipt::DeliveryId;
use protocol::trust::KeyPurpose;
use protocol::{PeerId, Refusal, RefusalCode, Signed, TransactionId};
use store::{Mark, StoreError, WriteTransaction};
use tracing::info;

use super::lease::{self, Terms};
use super::mailbox::{entitled, present};
use super::own;
use crate::audit;
use crate::context::Context;
use crate::transactions::{
    Generation, MAILBOX, MOVES, MOVING, MoveRecord, Release, SALES, Sale, SaleError, VOIDED, Word, delivery_of,
    get_delivery, move_due, open_delivery, put_delivery, put_sale,
};

/// What is asked for, whoever asks.
#[derive(Clone)]
struct Wanted {
    id: TransactionId,
    to: PeerId,
    generation: u32,
    word: Word,
}

/// Moves a purchase by its holder's word. Gives the generation that began.
pub(super) fn by_holder(ctx: &Context, holder: PeerId, word: Signed<Move>, now: u64) -> Result<u32, SaleError> {
    let said = Move::check(&word, &holder, &ctx.network())?;
    let wanted = Wanted { id: said.transaction, to: said.to, generation: said.generation, word: Word::Holder(word) };
    let by_this_word = |done: MoveRecord| done.from == holder && matches!(done.word, Word::Holder(_));
    once(ctx, wanted, by_this_word, |wanted| {
        let (sale, release) = present(ctx, wanted.id, &holder)?;
        if wanted.generation > MAX_GENERATIONS || moves_by_holders(ctx, wanted.id, wanted.generation)? > MAX_MOVES {
            let detail =
                format!("a purchase is moved {MAX_MOVES} times by its holder; further ones are the merchant's");
            return Err(Refusal::new(RefusalCode::LimitReached, detail).into());
        }
        transfer(ctx, &sale, &release, wanted, now)
    })
}

/// How many generations up to this one holders began, or may have: all of which the books do not say that the merchant
/// began it, or that it began with a void lease. A manager that came back from a backup knows no more of some.
fn moves_by_holders(ctx: &Context, id: TransactionId, generation: u32) -> Result<u32, StoreError> {
    let up_to = (id, 0)..=(id, generation);
    ctx.db.read(|txn| {
        let limit = MAX_GENERATIONS as usize;
        let voided = VOIDED.range(txn, up_to.clone(), limit)?.len();
        let moves = MOVES.range(txn, up_to, limit)?;
        let by_merchant = moves.iter().filter(|(_, done)| matches!(done.word, Word::Merchant(_))).count();
        Ok(generation.saturating_sub(u32::try_from(voided.saturating_add(by_merchant)).unwrap_or(0)))
    })
}

/// Makes a move, unless it was made before: then the answer was lost, by now the purchase is somebody else's, and nothing
/// more is said of it. It may also be made by another call while this one looks.
fn once(
    ctx: &Context,
    wanted: Wanted,
    by_this_word: impl Fn(MoveRecord) -> bool,
    make: impl FnOnce(Wanted) -> Result<u32, SaleError>,
) -> Result<u32, SaleError> {
    let (id, generation, to) = (wanted.id, wanted.generation, wanted.to);
    let is_done = || {
        let done = ctx.db.read(|txn| MOVES.get(txn, &(id, generation)))?.filter(|done| done.to == to);
        Ok::<_, StoreError>(done.is_some_and(&by_this_word))
    };
    if is_done()? {
        return Ok(generation);
    }
    match make(wanted) {
        Err(SaleError::Refused(_)) if is_done()? => Ok(generation),
        made => made,
    }
}

/// Gives a purchase of this merchant to another peer by the merchant's word.
pub(super) fn by_merchant(
    ctx: &Context,
    merchant: PeerId,
    word: Signed<Recovery>,
    now: u64,
) -> Result<SalesResponse, SaleError> {
    let said = Recovery::check(&word, &merchant, &ctx.network())?;
    let sale = own(ctx.db.read(|txn| ctx.archive.sale(txn, &said.transaction))?, &merchant)?;
    ctx.enrolled_merchant(&merchant, now)?;
    let wanted = Wanted { id: said.transaction, to: said.to, generation: said.generation, word: Word::Merchant(word) };
    let answer = SalesResponse::Holder { client: wanted.to, generation: wanted.generation };
    let by_this_word = |done: MoveRecord| matches!(done.word, Word::Merchant(_));
    once(ctx, wanted, by_this_word, |wanted| {
        // Where a restore forgot that its lease became void, or that it came back, it is given anew to who has it.
        if sale.client == wanted.to && generation(ctx, &wanted.id, &sale) == sale.generation {
            let detail = format!("the purchase is at {} already, in generation {}", sale.client, sale.generation);
            return Err(Refusal::new(RefusalCode::WrongState, detail).into());
        }
        if wanted.generation > MAX_GENERATIONS {
            let detail = format!("a purchase changes hands {MAX_GENERATIONS} times at most; sell it again");
            return Err(Refusal::new(RefusalCode::LimitReached, detail).into());
        }
        let (sale, release) = present(ctx, wanted.id, &sale.client)?;
        transfer(ctx, &sale, &release, wanted, now)
    })?;
    Ok(answer)
}

/// The generation that a purchase is in: by its record, or, after a restore from a backup that lacks a move, by what was
/// revoked.
pub(super) fn generation(ctx: &Context, id: &TransactionId, sale: &Sale) -> u32 {
    ctx.revocations.with(|revoked| revoked.generation(id)).max(sale.generation)
}

fn check_generation(current: u32, wanted: u32) -> Result<(), Refusal> {
    if current.checked_add(1) == Some(wanted) {
        return Ok(());
    }
    let detail = format!("the purchase is in generation {current}; the next move begins the one after it");
    Err(Refusal::new(RefusalCode::WrongState, detail))
}

fn transfer(ctx: &Context, sale: &Sale, release: &Release, wanted: Wanted, now: u64) -> Result<u32, SaleError> {
    let (id, generation) = (wanted.id, wanted.generation);
    check_generation(self::generation(ctx, &id, sale), generation)?;
    ctx.may_sign(KeyPurpose::Ticket)?;
    ctx.clock_lets_sell()?;
    let before = sale.generation;
    let product = lease::product_of(ctx, sale)?;
    let moved = Sale { client: wanted.to, generation, ..sale.clone() };
    // The payment of an on-completion sale is held for the time of its one lease, whoever completes it.
    let held = sale.policy == KeyPolicy::OnCompletion && !release.captured;
    let terms = Terms {
        endorsement: release.endorsement.digest(),
        delivery: release.delivery.saturating_add(1),
        rate: 0,
        ceiling: 0,
        sources: ctx.registry.origin().into_iter().collect(),
        end: held.then(|| release.held_until(now)),
    };
    let (signed, leased) = lease::sign(ctx, &moved, &product, terms, now);
    let grant = if held { None } else { Some(lease::grant(&product, &moved, &leased)?) };
    let due_at = leased.end.saturating_add(ctx.config.close_grace_ms);
    let delivery = delivery_of(&leased, sale.manifest, sale.layout, due_at);
    let (from, to) = (sale.client, wanted.to);
    let record = MoveRecord { at: now, from, to, lease: release.lease.clone(), word: wanted.word };
    let by = match record.word {
        Word::Holder(_) => "its holder",
        Word::Merchant(_) => "the merchant",
    };
    let late_until = (!held).then(|| now.saturating_add(ctx.config.close_grace_ms));
    ctx.db.write_blocking(move |txn| {
        // The same word at the same time: one of them does it.
        if MOVES.get(txn, &(id, generation))?.is_some_and(|done| (done.from, done.to) == (from, to)) {
            return Ok(());
        }
        // Looked at again: a refund, a renewal or another move may have come in between.
        let (mut sale, mut release) = entitled(SALES.get(txn, &id)?, &from)?;
        if sale.generation != before || release.lease.digest() != record.lease.digest() {
            let detail = "the purchase was renewed or moved at the same moment";
            return Err(Refusal::new(RefusalCode::Overloaded, detail).retry_after(100).into());
        }
        let over = DeliveryId { transaction: id, delivery: release.delivery };
        end_delivery(txn, over, late_until)?;
        open_delivery(txn, DeliveryId { transaction: id, delivery: leased.delivery }, &delivery)?;
        release.lease = signed.clone();
        release.lease_start = leased.start;
        release.lease_end = leased.end;
        release.delivery = leased.delivery;
        release.grant = grant.clone();
        sale.release = Some(release);
        sale.client = to;
        sale.generation = generation;
        MAILBOX.delete(txn, &(from, id))?;
        MAILBOX.put(txn, &(to, id), &Mark)?;
        MOVES.put(txn, &(id, generation), &record)?;
        MOVING.put(txn, &id, &Generation { number: generation })?;
        audit::note(txn, now, "move", id, format!("generation {generation} by {by}: {from} -> {to}"))?;
        Ok::<_, SaleError>(put_sale(txn, &id, Some(sale.state), &sale)?)
    })?;
    info!(transaction = %id, %from, %to, generation, by, "purchase moved");
    Ok(generation)
}

/// The old peer fetches no more: its delivery waits for receipts that are on their way, and is closed then. While the
/// payment is held it stays open as long as the sale may still be refunded.
fn end_delivery(txn: &WriteTransaction<'_>, id: DeliveryId, late_until: Option<u64>) -> Result<(), SaleError> {
    let Some(mut delivery) = get_delivery(txn, id)? else { return Ok(()) };
    if let Some(late_until) = late_until.filter(|_| delivery.closed.is_none()) {
        let soonest = delivery.due_at.min(late_until);
        move_due(txn, id, &mut delivery, soonest)?;
        put_delivery(txn, id, &delivery)?;
    }
    Ok(())
}
