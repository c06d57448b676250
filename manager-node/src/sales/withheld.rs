//! For what purchases no key is given out although the books know of nothing that was taken back: content that was taken
//! down, and what was revoked before the manager came back from an older backup. Money is asked for it no more either: a
//! payment that is still held goes back, and one that was taken before a takedown has its key all the same.

use std::sync::Arc;

use protocol::{ContentId, PeerId, Refusal, RefusalCode, TransactionId};
use store::{Step, WriteTransaction};
use tracing::{info, warn};

use super::mailbox::entitled;
use crate::context::{Context, now_ms};
use crate::evidence;
use crate::transactions::{Event, SALES, Sale, SaleError, open_sales, take_back};

/// Why the key of a purchase is not given out.
#[derive(Clone, Debug)]
pub(crate) struct Withheld {
    /// What its client is told.
    pub(crate) refusal: Refusal,
    /// Is the payment that is held for it to be given back now?
    pub(crate) give_back: bool,
}

/// Pause before a client asks again while a manager that came back from a backup may still hear what it forgot.
const ASK_AGAIN_MS: u64 = 10_000;

/// Why no key is given out for a sale, if none is.
pub(crate) fn withheld(
    ctx: &Context,
    id: &TransactionId,
    sale: &Sale,
    now: u64,
) -> Result<Option<Withheld>, SaleError> {
    // After a restore the merchant or a seeder may still say that it was completed: that long nothing is given back.
    let restored_at = evidence::restored_at(ctx, sale, now)?;
    let waiting = restored_at.is_some_and(|at| now < at.saturating_add(ctx.config.close_grace_ms));
    let held = sale.awaits_completion();
    // It may have been given back: no word of a completion takes the payment before that is known. Asked before the
    // revocations are looked at, which are there when it is.
    if held && let Err(refusal) = ctx.knows_what_it_revoked() {
        return Ok(Some(Withheld { refusal, give_back: false }));
    }
    let (revoked, moved_on) =
        ctx.revocations.with(|revoked| (revoked.has_transaction(id), revoked.has_moved_on(id, sale.generation)));
    let refused = |detail: &str| Refusal::new(RefusalCode::Revoked, detail);
    if revoked {
        let refusal = refused("the purchase was revoked");
        return Ok(Some(Withheld { refusal, give_back: held && !waiting }));
    }
    if moved_on {
        let detail = "the manager came back from a backup and does not know any more who has this purchase: move it \
                      again, or ask the shop to recover it";
        return Ok(Some(Withheld { refusal: refused(detail), give_back: false }));
    }
    // What was captured before the takedown is paid for, and nobody pays for nothing.
    if !held || !is_taken_down(ctx, sale)? {
        return Ok(None);
    }
    if waiting {
        let detail = "this content was taken down; whether it was paid for before is asked, for the manager came back \
                      from a backup";
        let refusal = Refusal::new(RefusalCode::Overloaded, detail).retry_after(ASK_AGAIN_MS);
        return Ok(Some(Withheld { refusal, give_back: false }));
    }
    Ok(Some(Withheld { refusal: refused(TAKEN_DOWN_UNPAID), give_back: true }))
}

const TAKEN_DOWN_UNPAID: &str =
    "this content was taken down before its key was given out: nothing is paid for it, and the purchase is refunded";

/// Was the content of a sale taken down?
pub(super) fn is_taken_down(ctx: &Context, sale: &Sale) -> Result<bool, SaleError> {
    let Some(manifest) = ctx.catalogue.manifest(&sale.manifest)? else { return Ok(false) };
    let content = manifest.peek().map_err(Refusal::from)?.content;
    Ok(ctx.revocations.with(|revoked| revoked.has_content(&content)))
}

/// Refuses what is withheld, and gives a payment back that is held for it.
pub(super) fn check(ctx: &Context, id: TransactionId, client: PeerId, sale: &Sale, now: u64) -> Result<(), SaleError> {
    ctx.knows_what_it_revoked()?;
    let Some(Withheld { refusal, give_back: due }) = withheld(ctx, &id, sale, now)? else { return Ok(()) };
    if due {
        let late_ms = ctx.config.close_grace_ms;
        let given = ctx.db.write_step_blocking(Step::ManagerRefund, move |txn| {
            let (mut sale, _) = entitled(SALES.get(txn, &id)?, &client)?;
            give_back(txn, id, &mut sale, now, late_ms)
        })?;
        // Completed at the same moment: then it is paid for.
        if !given && refusal.detail == TAKEN_DOWN_UNPAID {
            return Ok(());
        }
    }
    Err(refusal.into())
}

/// Refunds a sale whose payment is held; false when it is not any more.
pub(crate) fn give_back(
    txn: &WriteTransaction<'_>,
    id: TransactionId,
    sale: &mut Sale,
    now: u64,
    late_ms: u64,
) -> Result<bool, SaleError> {
    if !sale.awaits_completion() {
        return Ok(false);
    }
    info!(transaction = %id, "its key is not given out any more: the payment that was held is given back");
    take_back(txn, id, sale, Event::Refund, now, late_ms)?;
    Ok(true)
}

/// After a takedown: gives back what is held for the content. What a crash leaves of it is given back when its client
/// asks, or its time is over.
pub(crate) async fn taken_down(ctx: &Arc<Context>, content: ContentId) -> Result<usize, SaleError> {
    let work = Arc::clone(ctx);
    let done = tokio::task::spawn_blocking(move || all_of(&work, content, now_ms())).await;
    let given = done.map_err(|panic| crate::transactions::internal(&panic))??;
    if given > 0 {
        ctx.announcing.nudge();
    }
    Ok(given)
}

fn all_of(ctx: &Context, content: ContentId, now: u64) -> Result<usize, SaleError> {
    let late_ms = ctx.config.close_grace_ms;
    let (mut given, mut after) = (0, None);
    loop {
        let page = ctx.db.read(|txn| open_sales(txn, after))?;
        let Some(last) = page.last() else { return Ok(given) };
        after = Some(*last);
        for (_, id, _) in page {
            let sale = ctx.db.read(|txn| SALES.get(txn, &id))?;
            let Some(sale) = sale.filter(Sale::awaits_completion) else { continue };
            let manifest = ctx.catalogue.manifest(&sale.manifest)?;
            let of_it = manifest.and_then(|signed| signed.peek().ok()).is_some_and(|m| m.content == content);
            if !of_it || !withheld(ctx, &id, &sale, now)?.is_some_and(|withheld| withheld.give_back) {
                continue;
            }
            let back = ctx.db.write_step_blocking(Step::ManagerRefund, move |txn| {
                let Some(mut sale) = SALES.get(txn, &id)? else { return Ok(false) };
                give_back(txn, id, &mut sale, now, late_ms)
            });
            match back {
                Ok(back) => given += usize::from(back),
                // One that cannot be given back now stops no other.
                Err(SaleError::Store(error)) => return Err(error.into()),
                Err(error) => warn!(transaction = %id, %error, "a held payment is not given back yet"),
            }
        }
    }
}
