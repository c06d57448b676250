//! What is to be paid out, for whoever makes the transfers, and the list of statements, for the operator.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Bound, ControlFlow};
use std::path::PathBuf;

use protocol::evidence::{EvidencePack, StatementFile};
use protocol::statement::{PARTS_PER_MINOR, Statement};
use protocol::{Currency, PeerId, Refusal, RefusalCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use store::{StoreError, Txn};

use super::renew::renew_void;
use super::{BOOKS, STATEMENTS, get, make};
use crate::context::{Context, now_ms};
use crate::ledger::{self, Account};
use crate::transactions::SaleError;
use crate::{evidence, keys};

/// Most lines in one answer to the control socket, whose lines are at most 1 MiB.
const MAX_LINES: usize = 2000;

/// What each seeder is owed: by its newest statement and by the ledger as it is now. A page after the given seeder;
/// fewer lines than asked for mean that was all.
pub(crate) fn payouts(txn: &impl Txn, after: Option<PeerId>, limit: usize) -> Result<Value, SaleError> {
    let mut lines = Vec::new();
    let limit = limit.min(MAX_LINES);
    let start = after.map_or(Bound::Unbounded, Bound::Excluded);
    let mut last = None;
    let currencies = ledger::currencies(txn)?;
    BOOKS.scan::<StoreError>(txn, (start, Bound::Unbounded), |seeder, books| {
        if lines.len() >= limit {
            return Ok(ControlFlow::Break(()));
        }
        last = Some(seeder);
        // What came since the last statement, or before the first one, is owed all the same.
        let stated_in: BTreeMap<Currency, (u64, u128)> =
            books.balances.iter().map(|&(currency, stated, carried)| (currency, (stated, carried))).collect();
        for currency in currencies.iter().chain(stated_in.keys()).copied().collect::<BTreeSet<_>>() {
            let owed = -i128::from(ledger::balance(txn, &Account::Seeder(seeder), currency)?);
            let Some((stated, carried)) = stated_in.get(&currency).copied().or((owed > 0).then_some((0, 0))) else {
                continue;
            };
            lines.push(json!({
                "seeder": seeder, "currency": currency, "stated_minor": stated,
                "owed_minor": u64::try_from(owed).unwrap_or(0), "carried_micros": micros(carried),
                "statement": books.number, "statement_until": books.until,
            }));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    let more = (lines.len() >= limit).then_some(last).flatten();
    Ok(json!({"payouts": lines, "next": more}))
}

/// Parts as whole millionths of a minor unit, for display.
fn micros(parts: u128) -> u64 {
    u64::try_from(parts * 1_000_000 / PARTS_PER_MINOR).unwrap_or(u64::MAX)
}

/// Statements, newest first: of one seeder, or the newest of each.
pub(crate) fn list(
    ctx: &Context,
    txn: &impl Txn,
    seeder: Option<PeerId>,
    after: Option<After>,
    limit: usize,
) -> Result<Value, SaleError> {
    let (mut lines, mut next) = (Vec::new(), None);
    match seeder {
        Some(seeder) => {
            let newest = BOOKS.get(txn, &seeder)?.map_or(0, |books| books.number);
            let last = match after {
                Some(After::Statement(number)) => newest.min(number.saturating_sub(1)),
                _ => newest,
            };
            for number in (1..=last).rev() {
                if lines.len() >= limit {
                    next = Some(After::Statement(number.saturating_add(1)));
                    break;
                }
                let Some(signed) = get(&ctx.archive, txn, seeder, number)? else { break };
                lines.extend(signed.peek().ok().map(|statement| line(&statement)));
            }
        }
        None => {
            let start = match after {
                Some(After::Seeder(seeder)) => Bound::Excluded(seeder),
                _ => Bound::Unbounded,
            };
            let mut last = None;
            BOOKS.scan::<StoreError>(txn, (start, Bound::Unbounded), |seeder, books| {
                if lines.len() >= limit {
                    next = last.map(After::Seeder);
                    return Ok(ControlFlow::Break(()));
                }
                last = Some(seeder);
                let newest = STATEMENTS.get(txn, &(seeder, books.number))?;
                lines.extend(newest.and_then(|signed| signed.peek().ok()).map(|statement| line(&statement)));
                Ok(ControlFlow::Continue(()))
            })?;
        }
    }
    Ok(json!({"statements": lines, "next": next}))
}

/// Where a list of statements goes on: of all seeders after one of them, of one seeder before the statement of a number.
#[derive(Clone, Copy, Deserialize, Serialize)]
#[serde(untagged)]
pub(crate) enum After {
    Statement(u64),
    Seeder(PeerId),
}

fn line(statement: &Statement) -> Value {
    let totals = statement.totals();
    json!({
        "seeder": statement.seeder, "number": statement.number, "from": statement.from, "until": statement.until,
        "accepted": totals.accepted, "duplicate": totals.duplicate, "capped": totals.capped,
        "unknown": totals.unknown, "rejected": totals.rejected, "paid_deliveries": statement.earnings.len(),
        "balances": statement.balances.iter().map(|b| json!({
            "currency": b.currency, "before_minor": b.before, "credited_minor": b.credited, "paid_minor": b.paid,
            "after_minor": b.after, "carried_micros": micros(b.carried_after),
        })).collect::<Vec<_>>(),
    })
}

#[derive(Deserialize)]
pub(crate) struct MakeArgs {
    seeder: Option<PeerId>,
}

/// Makes statements now: of one seeder, or of all about whom there is something new.
pub(crate) fn make_now(ctx: &Context, args: MakeArgs) -> Result<Value, SaleError> {
    let mut seeders = Vec::from_iter(args.seeder);
    let all = seeders.is_empty();
    if all {
        ctx.db.read(|txn| {
            BOOKS.scan::<StoreError>(txn, .., |seeder, _| {
                seeders.push(seeder);
                Ok(ControlFlow::Continue(()))
            })
        })?;
    }
    let (mut made, mut failed) = (Vec::new(), Vec::new());
    for seeder in seeders {
        let before = ctx.db.read(|txn| BOOKS.get(txn, &seeder))?.map_or(0, |books| books.number);
        let number = match make(ctx, seeder, now_ms()) {
            Ok(number) => number,
            // One whose records are damaged keeps nobody else from theirs.
            Err(error) if all && !error.ends_all() => {
                if failed.len() < MAX_LINES {
                    failed.push(json!({"seeder": seeder, "error": error.to_string()}));
                }
                continue;
            }
            Err(error) => return Err(error),
        };
        if number > before && made.len() < MAX_LINES {
            made.push(json!({"seeder": seeder, "first": before + 1, "last": number}));
        }
    }
    Ok(json!({"made": made, "failed": failed}))
}

#[derive(Deserialize)]
pub(crate) struct FileArgs {
    seeder: PeerId,
    first: Option<u64>,
    path: PathBuf,
}

/// Writes statements of one seeder, from the given number on, into a file that can be checked without asking anybody.
pub(crate) fn file(ctx: &Context, args: FileArgs) -> Result<Value, SaleError> {
    let first = args.first.unwrap_or(1).max(1);
    renew_void(ctx, args.seeder, now_ms())?;
    let (file, more) = ctx.db.read(|txn| {
        let found = (first..).map_while(|number| get(&ctx.archive, txn, args.seeder, number).transpose());
        StatementFile::of::<StoreError>(keys::remembered(txn, EvidencePack::MAX_KEY_SETS)?, found)
    })?;
    if file.statements.is_empty() {
        let detail = format!("there is no statement {first} of seeder {}", args.seeder);
        return Err(Refusal::new(RefusalCode::WrongState, detail).into());
    }
    let count = file.statements.len();
    let end = first.saturating_add(count as u64);
    evidence::write_new(&args.path, &file.to_bytes())?;
    let next = more.then_some(end);
    Ok(json!({"path": args.path, "statements": count, "first": first, "last": end.saturating_sub(1), "next": next}))
}
