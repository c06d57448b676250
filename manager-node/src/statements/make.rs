//! Makes statements: when a period is over or a statement is full, and when the operator asks.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use node::Supervisor;
use protocol::statement::{BalanceLine, Statement, Unlisted};
use protocol::trust::KeyPurpose;
use protocol::{Currency, PeerId, Refusal, RefusalCode, Signed, codec};
use store::{Step, StoreError, Txn, WriteTransaction};
use tracing::{error, info};

use super::renew::renew_void;
use super::{BOOKS, Books, EARNINGS, Entry, FATES, JOURNAL, OLD_STATEMENTS, STATEMENTS, note};
use crate::archive::{Kind, Place};
use crate::context::{Context, now_ms};
use crate::receipts;
use crate::transactions::{SaleError, internal};

/// Between two looks at whose period is over, at most: an hour is fine enough for a period of days.
const LOOK_EVERY: Duration = Duration::from_secs(3600);
/// Lines of old statements removed in one database transaction.
const PRUNE_STEP: usize = 256;
/// Statements moved out with one flush: with the longest about 2 MiB.
const MOVE_STEP: usize = 8;
/// Lines are kept for so long after their time, milliseconds: seeders keep receipts for 30 days after a statement, and
/// a period is at most as long. Statements themselves move into segments then.
const KEEP_MS: u64 = 90 * 24 * 60 * 60 * 1000;

/// Starts the chore.
pub(crate) fn start(ctx: Arc<Context>, supervisor: &Supervisor) {
    let token = supervisor.token();
    supervisor.spawn_critical("statements chore", async move {
        let every = Duration::from_millis(ctx.config.statement_ms).min(LOOK_EVERY);
        loop {
            tokio::select! {
                () = token.cancelled() => return Ok::<_, StoreError>(()),
                () = tokio::time::sleep(every) => {}
            }
            let work = Arc::clone(&ctx);
            match tokio::task::spawn_blocking(move || step(&work, now_ms())).await {
                Ok(Err(SaleError::Store(error @ (StoreError::DiskFull { .. } | StoreError::Failed { .. })))) => {
                    return Err(error);
                }
                Ok(Err(error)) => error!(%error, "statements could not be made"),
                Ok(Ok(())) => {}
                Err(panic) => drop(internal(&panic)),
            }
        }
    });
}

/// Everything that is due at `now`.
pub(crate) fn step(ctx: &Context, now: u64) -> Result<(), SaleError> {
    let (mut due, mut old) = (Vec::new(), Vec::new());
    let horizon = now.saturating_sub(KEEP_MS);
    ctx.db.read(|txn| {
        BOOKS.scan::<StoreError>(txn, .., |seeder, books| {
            let full = books.next.saturating_sub(books.covered) >= Statement::MAX_LINES as u64;
            let over = now.saturating_sub(books.until) >= ctx.config.statement_ms;
            if full || (over && has_news(&books)) {
                due.push(seeder);
            }
            if books.kept_from < books.covered {
                old.push(seeder);
            }
            Ok(ControlFlow::Continue(()))
        })
    })?;
    for seeder in due {
        of_one(seeder, make(ctx, seeder, now).map(drop))?;
    }
    for seeder in old {
        of_one(seeder, put_away(ctx, seeder, horizon))?;
    }
    Ok(())
}

/// What cannot be done for one seeder, because a record of it is damaged, is told and keeps nobody else from theirs.
pub(super) fn of_one(seeder: PeerId, done: Result<(), SaleError>) -> Result<(), SaleError> {
    match done {
        Err(error) if !error.ends_all() => {
            error!(%seeder, %error, "the statements of this seeder could not be seen to");
            Ok(())
        }
        done => done,
    }
}

/// Removes lines and moves statements of a seeder that are older than `horizon`.
fn put_away(ctx: &Context, seeder: PeerId, horizon: u64) -> Result<(), SaleError> {
    while ctx.db.write_blocking(move |txn| prune(txn, seeder, horizon))? {}
    while move_old(ctx, seeder, horizon)? {}
    Ok(())
}

fn has_news(books: &Books) -> bool {
    books.next > books.covered || books.unlisted != Unlisted::default()
}

/// Makes statements of everything about a seeder that is in none; gives the number of the newest. Seeders about whom
/// there is nothing new get none.
pub(crate) fn make(ctx: &Context, seeder: PeerId, now: u64) -> Result<u64, SaleError> {
    renew_void(ctx, seeder, now)?;
    loop {
        // What a void key signs no seeder takes. The lines wait for one that is good.
        if ctx.may_sign(KeyPurpose::Settlement).is_err() {
            return Ok(ctx.db.read(|txn| BOOKS.get(txn, &seeder))?.map_or(0, |books| books.number));
        }
        let Some((statement, books, early)) = ctx.db.read(|txn| next(ctx, txn, seeder, now))? else {
            return Ok(ctx.db.read(|txn| BOOKS.get(txn, &seeder))?.map_or(0, |books| books.number));
        };
        // An arithmetic fault must not be signed.
        statement.check().map_err(|error| internal(&error))?;
        let signed = ctx.keys.sign(KeyPurpose::Settlement, &statement);
        let (number, totals) = (statement.number, statement.totals());
        let putting = move |txn: &WriteTransaction<'_>| put(txn, seeder, number, &books, &early, &signed);
        let made = ctx.db.write_step_blocking(Step::ManagerStatement, putting)?;
        if made {
            info!(%seeder, number, accepted = totals.accepted, rejected = totals.rejected, "statement made");
        }
    }
}

/// A statement, where the books stand after it, and payments that are left for a later one.
type Next = (Statement, Books, Vec<Entry>);

/// What comes next, from one snapshot.
fn next(ctx: &Context, txn: &impl Txn, seeder: PeerId, now: u64) -> Result<Option<Next>, SaleError> {
    let Some(books) = BOOKS.get(txn, &seeder)?.filter(has_news) else { return Ok(None) };
    let lines = JOURNAL.range(txn, (seeder, books.covered)..(seeder, books.next), Statement::MAX_LINES)?;
    let mut after = Books {
        covered: books.covered.saturating_add(lines.len() as u64),
        number: books.number.saturating_add(1),
        unlisted: Default::default(),
        ..books.clone()
    };
    let whole = after.covered == books.next;
    let first = lines.first().map_or(now, |(_, entry)| entry.at());
    let from = if books.number == 0 { first.min(now) } else { books.until };
    // A clock that was set back makes an empty period, not one that ends before it begins.
    after.until = now.max(from);
    let mut statement = Statement {
        network: ctx.network(),
        seeder,
        number: after.number,
        previous: books.last,
        from,
        until: after.until,
        issued_at: now,
        restore: ctx.restore,
        receipts: Vec::new(),
        unlisted: books.unlisted,
        earnings: Vec::new(),
        payments: Vec::new(),
        balances: Vec::new(),
        covered: if whole { receipts::covered(txn, &seeder)? } else { Vec::new() },
    };
    let mut balances: BTreeMap<Currency, BalanceLine> =
        books.balances.iter().map(|&(currency, owed, carried)| (currency, balance(currency, owed, carried))).collect();
    let mut payments = Vec::new();
    for (_, entry) in lines {
        match entry {
            Entry::Receipt(line) => statement.receipts.push(line),
            Entry::Earning(line) => {
                let b = balances.entry(line.currency).or_insert_with(|| balance(line.currency, 0, 0));
                b.earned = b.earned.saturating_add(line.parts);
                b.credited = b.credited.saturating_add(line.credited);
                statement.earnings.push(line);
            }
            Entry::Payment(line) => payments.push(line),
        }
    }
    // One that was booked again after a restore may be of what comes to be earned again: no balance goes below zero.
    let mut early = Vec::new();
    for line in payments {
        match balances.get_mut(&line.currency) {
            Some(b) if b.paid.saturating_add(line.minor) <= b.before.saturating_add(b.credited) => {
                b.paid = b.paid.saturating_add(line.minor);
                statement.payments.push(line);
            }
            _ => early.push(Entry::Payment(line)),
        }
    }
    let is_silent = statement.receipts.is_empty()
        && statement.earnings.is_empty()
        && statement.payments.is_empty()
        && statement.unlisted == Unlisted::default();
    if is_silent {
        return Ok(None);
    }
    for b in balances.values_mut() {
        b.after = b.before.saturating_add(b.credited).saturating_sub(b.paid);
        let credited = u128::from(b.credited).saturating_mul(protocol::statement::PARTS_PER_MINOR);
        b.carried_after = b.carried_before.saturating_add(b.earned).saturating_sub(credited);
    }
    after.balances = balances.values().map(|b| (b.currency, b.after, b.carried_after)).collect();
    statement.balances = balances.into_values().collect();
    Ok(Some((statement, after, early)))
}

fn balance(currency: Currency, before: u64, carried_before: u128) -> BalanceLine {
    BalanceLine {
        currency,
        before,
        carried_before,
        earned: 0,
        credited: 0,
        paid: 0,
        after: before,
        carried_after: carried_before,
    }
}

/// False when another call made this number meanwhile.
fn put(
    txn: &WriteTransaction<'_>,
    seeder: PeerId,
    number: u64,
    after: &Books,
    early: &[Entry],
    signed: &Signed<Statement>,
) -> Result<bool, StoreError> {
    let Some(mut books) = BOOKS.get(txn, &seeder)? else { return Ok(false) };
    // Also where the one before was signed again meanwhile: this one would name it as it was.
    let names = signed.peek().map(|statement| statement.previous);
    if books.number.saturating_add(1) != number || names != Ok(books.last) {
        return Ok(false);
    }
    // Receipts without a line that came since the snapshot stay for the next one.
    let told = signed.peek().map(|statement| statement.unlisted).unwrap_or_default();
    books.unlisted.duplicate = books.unlisted.duplicate.saturating_sub(told.duplicate);
    books.unlisted.rejected = books.unlisted.rejected.saturating_sub(told.rejected);
    books.covered = after.covered;
    books.number = number;
    books.until = after.until;
    books.balances.clone_from(&after.balances);
    books.last = Some(signed.digest());
    BOOKS.put(txn, &seeder, &books)?;
    STATEMENTS.put(txn, &(seeder, number), signed)?;
    for entry in early {
        let books = BOOKS.get(txn, &seeder)?.unwrap_or_default();
        note(txn, &seeder, books, entry)?;
    }
    Ok(true)
}

/// Removes lines that were told of long ago. True when there may be more.
fn prune(txn: &WriteTransaction<'_>, seeder: PeerId, before: u64) -> Result<bool, StoreError> {
    let Some(mut books) = BOOKS.get(txn, &seeder)? else { return Ok(false) };
    let page = JOURNAL.range(txn, (seeder, books.kept_from)..(seeder, books.covered), PRUNE_STEP)?;
    let old: Vec<_> = page.into_iter().take_while(|(_, entry)| entry.at() < before).collect();
    for (key, entry) in &old {
        JOURNAL.delete(txn, key)?;
        match entry {
            Entry::Receipt(line) => {
                let fate = (seeder, line.receipt);
                if FATES.get(txn, &fate)?.is_some_and(|fate| fate.sequence == key.1) {
                    FATES.delete(txn, &fate)?;
                }
            }
            Entry::Earning(line) => {
                EARNINGS.delete(txn, &(seeder, line.delivery.transaction, line.delivery.delivery))?;
            }
            Entry::Payment(_) => {}
        }
        books.kept_from = key.1.saturating_add(1);
    }
    if !old.is_empty() {
        BOOKS.put(txn, &seeder, &books)?;
    }
    Ok(old.len() == PRUNE_STEP)
}

/// Moves old statements out of the store, but never the newest. True when there may be more.
fn move_old(ctx: &Context, seeder: PeerId, before: u64) -> Result<bool, StoreError> {
    let old = ctx.db.read(|txn| {
        let newest = BOOKS.get(txn, &seeder)?.map_or(0, |books| books.number);
        STATEMENTS.range(txn, (seeder, 0)..(seeder, newest), MOVE_STEP)
    })?;
    let is_old = |signed: &Signed<Statement>| signed.peek().is_ok_and(|statement| statement.until < before);
    let old: Vec<_> = old.into_iter().take_while(|(_, signed)| is_old(signed)).collect();
    if old.is_empty() {
        return Ok(false);
    }
    let records: Vec<_> = old.iter().map(|(_, signed)| (Kind::Statement, codec::encode(signed))).collect();
    let full = old.len() == MOVE_STEP;
    ctx.archive.move_out(&ctx.db, &records, move |txn, places| {
        old.iter().zip(places).try_for_each(|((key, signed), place)| moved_out(txn, key, signed, place))
    })?;
    Ok(full)
}

/// Puts the place of a statement that was moved out there. One that was signed again meanwhile stays, and moves out as it
/// is now: what was moved is void.
pub(super) fn moved_out(
    txn: &WriteTransaction<'_>,
    key: &(PeerId, u64),
    signed: &Signed<Statement>,
    place: &Place,
) -> Result<(), StoreError> {
    if STATEMENTS.get(txn, key)?.as_ref() != Some(signed) {
        return Ok(());
    }
    OLD_STATEMENTS.put(txn, key, place)?;
    STATEMENTS.delete(txn, key).map(drop)
}

/// The statement of a seeder after the given number.
pub(crate) fn after(ctx: &Context, seeder: PeerId, number: u64) -> Result<Option<Signed<Statement>>, SaleError> {
    renew_void(ctx, seeder, now_ms())?;
    let newest = ctx.db.read(|txn| BOOKS.get(txn, &seeder))?.map_or(0, |books| books.number);
    if number > newest {
        let detail = format!("the newest statement here is {newest}; the manager came back from an older backup");
        return Err(Refusal::new(RefusalCode::WrongState, detail).into());
    }
    Ok(ctx.db.read(|txn| super::get(&ctx.archive, txn, seeder, number.saturating_add(1)))?)
}
