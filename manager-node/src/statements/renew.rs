//! Statements whose key was revoked, or is over, prove nothing, and no seeder takes them. So they are signed again with the
//! present key: the same numbers and lines, each naming the one before as that is now signed. A seeder that has the old ones
//! puts the new ones in their place.

use std::ops::ControlFlow;
use std::time::Duration;

use bincode::{Decode, Encode};
use protocol::statement::Statement;
use protocol::trust::{KeyPurpose, KeyState, Trust};
use protocol::{Digest, PeerId, Signed, wire};
use store::{Step, StoreError, Table, Txn, WriteTransaction};
use tracing::warn;

use super::make::of_one;
use super::{BOOKS, OLD_STATEMENTS, STATEMENTS, get};
use crate::context::Context;
use crate::transactions::SaleError;

/// Under which keys each seeder's statements were last found to hold, all of them.
pub(super) const FOUND_GOOD: Table<PeerId, FoundGood> = Table::new("statements-found-good");

/// Statements signed again in one database transaction: with the longest some 3 MiB.
const STEP: u64 = 8;
/// Times that statements are signed again without a pause, and in all; keys do not change more often meanwhile.
const ROUNDS: u32 = 4;
const MOST_ROUNDS: u32 = 1000;
const PAUSE: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct FoundGood {
    /// Version of the key set.
    version: u64,
    /// Until one of its keys is over, or what could not be read is looked at again, unix milliseconds.
    until: u64,
}

wire!(FoundGood => 32);

/// What could not be read is looked at again after so long, milliseconds: each look reads all of a seeder's statements.
const LOOK_AGAIN_MS: u64 = 60 * 60 * 1000;

/// A statement as it lies there.
enum Found {
    Here(Box<(Signed<Statement>, Statement)>),
    /// Its record is damaged. Nobody can sign it again, and those behind it are none the worse for it.
    Damaged,
}

/// Signs a seeder's statements again from the first one on that does not hold. Cheap where all of them did when it was
/// last asked and the keys are the same since.
pub(super) fn renew_void(ctx: &Context, seeder: PeerId, now: u64) -> Result<(), SaleError> {
    let version = ctx.trust().key_set().version;
    let (known, books) =
        ctx.db.read(|txn| Ok::<_, StoreError>((FOUND_GOOD.get(txn, &seeder)?, BOOKS.get(txn, &seeder)?)))?;
    // Anybody may ask, and of who has no statement nothing is noted.
    if books.is_none_or(|books| books.number == 0) {
        return Ok(());
    }
    if known.is_some_and(|known| known.version == version && now < known.until) {
        return Ok(());
    }
    // What is made meanwhile may name one that is replaced, and the keys may change again: looked at again, by the keys in
    // force then, until nothing is left.
    let mut renewed = 0u64;
    let mut rounds = 0;
    let (trust, damaged) = loop {
        // The key is not here, as after a restore: what the one from before signs is void, too.
        if ctx.may_sign(KeyPurpose::Settlement).is_err() {
            return Ok(());
        }
        let trust = ctx.trust();
        let (first, damaged) = first_void(ctx, &trust, seeder, now)?;
        let Some(first) = first else { break (trust, damaged) };
        match rounds {
            ..ROUNDS => {}
            // The keys are being changed in this moment.
            ROUNDS..MOST_ROUNDS => std::thread::sleep(PAUSE),
            _ => {
                warn!(%seeder, first, "statements are void, also when signed again: looked at again when they are asked for");
                return Ok(());
            }
        }
        renewed = renewed.saturating_add(sign_again(ctx, seeder, first, now)?);
        rounds += 1;
    };
    if renewed > 0 {
        warn!(%seeder, statements = renewed, "statements whose key is void were signed again");
    }
    let dead = trust.key_set().keys.iter().filter_map(|entry| match entry.state {
        KeyState::Retiring { dead_after, .. } if entry.purpose == KeyPurpose::Settlement && dead_after > now => {
            Some(dead_after)
        }
        _ => None,
    });
    let mut until = dead.min().unwrap_or(u64::MAX);
    if damaged > 0 {
        warn!(%seeder, damaged, "statements cannot be read, and are not signed again: restore the segments from a backup");
        until = until.min(now.saturating_add(LOOK_AGAIN_MS));
    }
    let good = FoundGood { version: trust.key_set().version, until };
    Ok(ctx.db.write_blocking(move |txn| FOUND_GOOD.put(txn, &seeder, &good))?)
}

/// The same for every seeder.
pub(crate) fn renew_all(ctx: &Context, now: u64) -> Result<(), SaleError> {
    let mut seeders = Vec::new();
    ctx.db.read(|txn| {
        BOOKS.scan::<StoreError>(txn, .., |seeder, books| {
            if books.number > 0 {
                seeders.push(seeder);
            }
            Ok(ControlFlow::Continue(()))
        })
    })?;
    seeders.into_iter().try_for_each(|seeder| of_one(seeder, renew_void(ctx, seeder, now)))
}

fn find(ctx: &Context, txn: &impl Txn, seeder: PeerId, number: u64) -> Result<Option<Found>, StoreError> {
    match get(&ctx.archive, txn, seeder, number) {
        Ok(None) => Ok(None),
        Ok(Some(signed)) => Ok(Some(match signed.peek() {
            Ok(statement) => Found::Here(Box::new((signed, statement))),
            Err(_) => Found::Damaged,
        })),
        Err(StoreError::Corrupt { .. }) => Ok(Some(Found::Damaged)),
        Err(error) => Err(error),
    }
}

/// The first statement that is void, or does not name the one before it as that is signed; and how many are damaged up to
/// there.
fn first_void(ctx: &Context, trust: &Trust, seeder: PeerId, now: u64) -> Result<(Option<u64>, u64), SaleError> {
    ctx.db.read(|txn| {
        let newest = BOOKS.get(txn, &seeder)?.map_or(0, |books| books.number);
        let mut damaged = 0u64;
        // As which the next one is to name it; unknown behind a damaged one.
        let mut before: Option<Option<Digest>> = Some(None);
        for number in 1..=newest {
            match find(ctx, txn, seeder, number)? {
                None => break,
                Some(Found::Damaged) => {
                    damaged = damaged.saturating_add(1);
                    before = None;
                }
                Some(Found::Here(found)) => {
                    let (signed, statement) = *found;
                    let key = trust.still_good(&signed.signer(), KeyPurpose::Settlement, statement.issued_at, now);
                    if key.is_err() || before.is_some_and(|before| statement.previous != before) {
                        return Ok((Some(number), damaged));
                    }
                    before = Some(Some(signed.digest()));
                }
            }
        }
        Ok((None, damaged))
    })
}

/// Signs the statements from `first` on again, as many as there are and can be read; gives how many.
fn sign_again(ctx: &Context, seeder: PeerId, first: u64, now: u64) -> Result<u64, SaleError> {
    let (mut next, mut renewed) = (first, 0u64);
    // As above: what stands behind a damaged one goes on to name it as it always did.
    let mut previous = match first.checked_sub(1).filter(|before| *before > 0) {
        Some(before) => match ctx.db.read(|txn| find(ctx, txn, seeder, before))? {
            Some(Found::Here(found)) => Some(Some(found.0.digest())),
            Some(Found::Damaged) => None,
            None => Some(None),
        },
        None => Some(None),
    };
    loop {
        let old = ctx.db.read(|txn| {
            let page = (next..next.saturating_add(STEP)).map_while(|n| find(ctx, txn, seeder, n).transpose());
            page.collect::<Result<Vec<_>, StoreError>>()
        })?;
        if old.is_empty() {
            return Ok(renewed);
        }
        next = next.saturating_add(old.len() as u64);
        let mut made = Vec::with_capacity(old.len());
        for found in old {
            let Found::Here(found) = found else {
                previous = None;
                continue;
            };
            let previously = previous.unwrap_or(found.1.previous);
            let statement = Statement { previous: previously, issued_at: now, ..found.1 };
            let again = ctx.keys.sign(KeyPurpose::Settlement, &statement);
            previous = Some(Some(again.digest()));
            made.push((statement.number, again));
        }
        renewed = renewed.saturating_add(made.len() as u64);
        ctx.db.write_step_blocking(Step::ManagerStatement, move |txn| put(txn, seeder, &made))?;
    }
}

fn put(txn: &WriteTransaction<'_>, seeder: PeerId, made: &[(u64, Signed<Statement>)]) -> Result<(), StoreError> {
    for (number, signed) in made {
        STATEMENTS.put(txn, &(seeder, *number), signed)?;
        // One that had moved out moves out again, as it is now.
        OLD_STATEMENTS.delete(txn, &(seeder, *number))?;
        if let Some(mut books) = BOOKS.get(txn, &seeder)?.filter(|books| books.number == *number) {
            books.last = Some(signed.digest());
            BOOKS.put(txn, &seeder, &books)?;
        }
    }
    Ok(())
}
