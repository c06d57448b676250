//! What happens to sales by time alone: reservations expire, and deliveries are closed.

use std::mem::Discriminant;
use std::ops::Bound;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use node::Supervisor;
use protocol::TransactionId;
use protocol::receipt::DeliveryId;
use store::{Step, StoreError, WriteTransaction};
use tracing::{error, info};

use super::closing::{close_due, waited_for};
use super::watch::{Held, Moment, Watch};
use super::{DUE, EXPIRING, Event, SALES, SaleError, announcing, drop_reservation, internal, put_sale};
use crate::context::{Context, now_ms};
use crate::placement::made_at;

/// Sales looked at in one database transaction, which other writers wait for.
const STEP: usize = 128;

/// Starts the chore; a store that fails ends it, and with it the manager.
pub(crate) fn start(ctx: Arc<Context>, supervisor: &Supervisor) {
    let token = supervisor.token();
    supervisor.spawn_critical("sales chore", async move {
        let every = Duration::from_millis(ctx.config.sales_ms);
        let mut watch = Watch::new(&ctx.config, ctx.started_at);
        let mut told = None;
        loop {
            let round = async {
                let held = round(&ctx, &mut watch, Moment { wall: now_ms(), running: ctx.running_ms() }).await?;
                tell(&mut told, held);
                tokio::time::sleep(every).await;
                Ok::<_, StoreError>(())
            };
            tokio::select! {
                done = round => done?,
                () = token.cancelled() => return Ok::<_, StoreError>(()),
            }
        }
    });
}

/// Says what is waited for when that changes, not at every round.
fn tell(told: &mut Option<Discriminant<Held>>, held: Option<Held>) {
    let kind = held.as_ref().map(std::mem::discriminant);
    if *told == kind {
        return;
    }
    *told = kind;
    match held {
        Some(Held::Started) => {
            info!("deliveries are closed later: receipts may be under way since this manager is back")
        }
        Some(held) => error!("nothing is closed, given back or expired for now: {held}"),
        None => info!("what is due is closed by the clock"),
    }
}

/// Everything that is due, as far as the clock may be gone by; gives why not, otherwise.
pub(crate) async fn round(ctx: &Arc<Context>, watch: &mut Watch, at: Moment) -> Result<Option<Held>, StoreError> {
    let clock = ctx.registry.clocks.state(at.wall, ctx.config.clock_grace_ms);
    let held = watch.look(at, clock).err();
    *ctx.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
    *ctx.clock.lock().unwrap_or_else(PoisonError::into_inner) = clock;
    let work = Arc::clone(ctx);
    let done = tokio::task::spawn_blocking(move || {
        // No receipt is waited for before a reservation expires.
        if matches!(held, None | Some(Held::Started)) {
            expire(&work, at.wall)?;
        }
        match held {
            Some(_) => Ok(()),
            None => close_all_due(&work, at.wall),
        }
    });
    match done.await {
        Ok(result) => result?,
        Err(panic) => drop(internal(&panic)),
    }
    // Also what a manager that stopped in between left.
    ctx.announcing.nudge();
    Ok(held)
}

/// The same at a time by a clock that nobody set since the start, and what comes of it.
pub(crate) async fn step(ctx: &Arc<Context>, now: u64) -> Result<(), StoreError> {
    let running = now.saturating_sub(ctx.started_at);
    round(ctx, &mut Watch::new(&ctx.config, ctx.started_at), Moment { wall: now, running }).await?;
    announcing::all(ctx).await
}

fn expire(ctx: &Context, now: u64) -> Result<(), StoreError> {
    let end = (now, TransactionId::from_bytes([0xff; 16]));
    // Looked for first: a write that changes nothing would go to the disk at every round, and make others wait.
    while !ctx.db.read(|txn| EXPIRING.range(txn, ..=end, 1))?.is_empty() {
        let (over, expired) = ctx.db.write_step_blocking(Step::ManagerExpire, move |txn| expire_some(txn, now))?;
        for id in &expired {
            info!(transaction = %id, code = "reservation-expired", "reservation expired");
        }
        if over < STEP {
            break;
        }
    }
    Ok(())
}

/// Gives of how many the time is over, and which of them were not cancelled before.
fn expire_some(txn: &WriteTransaction<'_>, now: u64) -> Result<(usize, Vec<TransactionId>), StoreError> {
    let last = TransactionId::from_bytes([0xff; 16]);
    let mut expired = Vec::new();
    let rows = EXPIRING.range(txn, ..=(now, last), STEP)?;
    let over = rows.len();
    for (key, _) in rows {
        let Some(mut sale) = SALES.get(txn, &key.1)? else {
            EXPIRING.delete(txn, &key)?;
            continue;
        };
        drop_reservation(txn, key.1, &sale)?;
        let before = sale.state;
        if sale.advance(Event::Expire, now).is_ok() {
            put_sale(txn, &key.1, Some(before), &sale)?;
            expired.push(key.1);
        }
    }
    Ok((over, expired))
}

/// One delivery a transaction: one that cannot be closed is logged and stops no other.
fn close_all_due(ctx: &Context, now: u64) -> Result<(), StoreError> {
    let end = (now, TransactionId::from_bytes([0xff; 16]), u32::MAX);
    let waited = waited_for(ctx, now);
    let mut start = Bound::Unbounded;
    loop {
        let page = ctx.db.read(|txn| DUE.range(txn, (start, Bound::Included(end)), STEP))?;
        for &((_, transaction, delivery), _) in &page {
            // What began before a restore may be forgotten in part, and is sent and told again. Nothing is written of it
            // until then: a time that a wrong clock gave would stay.
            if waited.is_some_and(|(restored, until)| made_at(&transaction) < restored && now < until) {
                continue;
            }
            let id = DeliveryId { transaction, delivery };
            match ctx.db.write_step_blocking(Step::ManagerClose, move |txn| close_due(txn, id, now)) {
                Ok(()) => {}
                Err(SaleError::Store(error @ (StoreError::DiskFull { .. } | StoreError::Failed { .. }))) => {
                    return Err(error);
                }
                Err(error) => error!(delivery = %id, %error, "delivery cannot be closed"),
            }
        }
        match page.last() {
            Some((key, _)) if page.len() == STEP => start = Bound::Excluded(*key),
            _ => return Ok(()),
        }
    }
}
