//! A manager whose settlement key was stolen signs its statements again: what they say stays, and each names the one before
//! as that is now signed. The new ones take the place of the old ones here, which prove nothing any more.

use protocol::statement::Statement;
use protocol::trust::{KeyPurpose, Trust};
use protocol::{Digest, Refusal, Signed};
use store::{Db, Step, StoreError};

use super::{FetchError, ask, last, open, put_aside, trust, wrong};
use crate::clock::now_ms;
use crate::context::Seeder;
use crate::network::TakeError;
use crate::tables::{FOUND_GOOD, OLD_KEY_SETS, STATEMENTS, Version};

/// Do these say the same of the same period, whoever signed them?
pub(super) fn is_same(one: &Signed<Statement>, other: &Signed<Statement>) -> bool {
    let content =
        |signed: &Signed<Statement>| signed.peek().map(|s| Statement { previous: None, issued_at: 0, ..s }).ok();
    one == other || content(one).is_some_and(|one| content(other) == Some(one))
}

/// Does it name as the one before it another than the newest here?
pub(super) fn is_elsewhere(db: &Db, signed: &Signed<Statement>) -> Result<bool, TakeError> {
    let newest = last(db)?;
    let previous = signed.peek().map_err(Refusal::from)?.previous;
    Ok(newest.is_some_and(|(_, held)| previous != Some(held.digest())))
}

/// Replaces the statements here from the first one on that does not hold any more; with `all`, those too that the manager
/// signed again although they did. Looked for once under each key set.
pub(super) async fn renew(seeder: &Seeder, all: bool) -> Result<(), FetchError> {
    let trust = trust(seeder)?;
    let version = trust.key_set().version;
    if !all && seeder.db.read(|txn| FOUND_GOOD.get(txn, &()))?.is_some_and(|found| found.0 == version) {
        return Ok(());
    }
    let first = match first_void(&seeder.db, &trust, now_ms())? {
        None if all => last(&seeder.db)?.map(|(number, _)| number),
        first => first,
    };
    let Some(mut number) = first else { return Ok(note(&seeder.db, version).await?) };
    // Back to where the two chains part.
    let mut theirs = fetch(seeder, &trust, number).await?;
    while let Some((statement, _)) = &theirs
        && number > 1
        && digest_of(&seeder.db, number - 1)? != statement.previous
    {
        number -= 1;
        theirs = fetch(seeder, &trust, number).await?;
    }
    let from = number;
    while let Some((_, signed)) = theirs {
        match seeder.db.read(|txn| STATEMENTS.get(txn, &number))? {
            None => break,
            Some(ours) if is_same(&ours, &signed) => put(seeder, &trust, number, signed).await?,
            // It says something else: what was signed before is kept aside, as after a restore.
            Some(_) => {
                let restore = seeder.network.heartbeat().map_or(0, |heartbeat| heartbeat.restore);
                put_aside(&seeder.db, number - 1, restore).await?;
                break;
            }
        }
        number += 1;
        if seeder.db.read(|txn| STATEMENTS.get(txn, &number))?.is_none() {
            break;
        }
        theirs = fetch(seeder, &trust, number).await?;
    }
    tracing::warn!(from, through = number - 1, "statements of account were signed again with another key: replaced");
    if first_void(&seeder.db, &trust, now_ms())?.is_none() {
        note(&seeder.db, version).await?;
    }
    Ok(())
}

/// The first statement here whose key is void, or that does not name the one before it.
fn first_void(db: &Db, trust: &Trust, now: u64) -> Result<Option<u64>, TakeError> {
    let mut before: Option<Digest> = None;
    let (mut found, mut number) = (None, 1);
    // One at a time: each may be long.
    while let Some(signed) = db.read(|txn| STATEMENTS.get(txn, &number))? {
        let statement = signed.peek().map_err(Refusal::from)?;
        let key = trust.still_good(&signed.signer(), KeyPurpose::Settlement, statement.issued_at, now);
        if key.is_err() || statement.previous != before {
            found = Some(number);
            break;
        }
        before = Some(signed.digest());
        number += 1;
    }
    Ok(found)
}

fn digest_of(db: &Db, number: u64) -> Result<Option<Digest>, StoreError> {
    Ok(db.read(|txn| STATEMENTS.get(txn, &number))?.map(|signed| signed.digest()))
}

/// The manager's statement of that number, checked by itself.
async fn fetch(
    seeder: &Seeder,
    trust: &Trust,
    number: u64,
) -> Result<Option<(Statement, Signed<Statement>)>, FetchError> {
    let Some(signed) = ask(seeder, number - 1).await? else { return Ok(None) };
    let statement = open(seeder, trust, &signed)?;
    if statement.number != number {
        return Err(wrong(format!("the manager sent statement {} in place of {number}", statement.number)).into());
    }
    Ok(Some((statement, signed)))
}

async fn put(seeder: &Seeder, trust: &Trust, number: u64, signed: Signed<Statement>) -> Result<(), StoreError> {
    let (version, key_set) = (trust.key_set().version, trust.signed_key_set().clone());
    let putting = move |txn: &store::WriteTransaction<'_>| {
        STATEMENTS.put(txn, &number, &signed)?;
        OLD_KEY_SETS.put(txn, &version, &key_set)
    };
    seeder.db.write_step(Step::SeederStatement, putting).await
}

async fn note(db: &Db, version: u64) -> Result<(), StoreError> {
    db.write(move |txn| FOUND_GOOD.put(txn, &(), &Version(version))).await
}
