//! The manager's statements of account, fetched, checked and kept: what this seeder was paid, line by line, and when
//! receipts may go, because the manager has signed what became of them.

mod replaced;

use std::sync::Arc;

use protocol::api::{MeshRequest, MeshResponse};
use protocol::evidence::StatementFile;
use protocol::statement::{Explanation, Statement};
use protocol::trust::{KeyPurpose, Trust};
use protocol::{Digest, Refusal, RefusalCode, Signed};
use serde_json::{Value, json};
use store::{Db, Step, StoreError};

use crate::clock::now_ms;
use crate::context::Seeder;
use crate::manager::AskError;
use crate::network::TakeError;
use crate::tables::{COVERS, CoveredAt, OLD_KEY_SETS, OUTBOX, STATEMENTS, SUPERSEDED};

/// Statements taken in one go: a seeder that was away for months catches up in a few.
const AT_ONCE: usize = 64;
/// So many times over where somebody waits for the list.
const ROUNDS: usize = 64;
/// Key sets kept for old statements: a rotation of the settlement key a year is the usual.
const MAX_KEY_SETS: usize = 16;

/// Why no statement came.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// The manager did not answer as it should.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// What came is not good.
    #[error(transparent)]
    Take(#[from] TakeError),
}

impl From<StoreError> for FetchError {
    fn from(error: StoreError) -> Self {
        FetchError::Take(error.into())
    }
}

/// Fetches statements until there is no further one; says how many came.
pub(crate) async fn fetch(seeder: &Seeder) -> Result<usize, FetchError> {
    reconcile(seeder).await?;
    replaced::renew(seeder, false).await?;
    let mut again = true;
    for count in 0..AT_ONCE {
        let after = last(&seeder.db)?.map_or(0, |(number, _)| number);
        let Some(signed) = ask(seeder, after).await? else { return Ok(count) };
        match take(seeder, &signed).await {
            Err(TakeError::Refused(refusal)) if again && replaced::is_elsewhere(&seeder.db, &signed)? => {
                tracing::info!(%refusal, "the statements here were signed again by the manager");
                again = false;
                replaced::renew(seeder, true).await?;
                take(seeder, &signed).await?;
            }
            taken => taken?,
        }
    }
    Ok(AT_ONCE)
}

/// The manager's statement after that number.
async fn ask(seeder: &Seeder, after: u64) -> Result<Option<Signed<Statement>>, AskError> {
    match seeder.manager.ask(&MeshRequest::Statement { after }).await? {
        MeshResponse::Statement(statement) => Ok(statement.map(|statement| *statement)),
        _ => Err(AskError::Unexpected("a question for statements")),
    }
}

/// After the manager came back from a backup it has fewer statements than it gave out, and makes others in their place. The
/// rule: under a higher restore number the manager's chain is the one that counts, from the last statement that both
/// have. Those that it no longer knows are put aside, not thrown away: what it once signed is proof of what it owed.
async fn reconcile(seeder: &Seeder) -> Result<(), FetchError> {
    let restore = seeder.network.heartbeat().map_or(0, |heartbeat| heartbeat.restore);
    let Some((newest, signed)) = last(&seeder.db)? else { return Ok(()) };
    if signed.peek().map_err(|error| TakeError::from(Refusal::from(error)))?.restore >= restore {
        return Ok(());
    }
    let mut common = newest;
    let mut held = Some(signed);
    while let Some(ours) = held {
        let after = common.saturating_sub(1);
        let theirs = match ask(seeder, after).await {
            // It has none so high, by its books.
            Err(AskError::Refused(refusal)) if refusal.code == RefusalCode::WrongState => None,
            asked => asked?,
        };
        // One that was only signed again is the same one.
        if theirs.is_some_and(|theirs| replaced::is_same(&theirs, &ours)) {
            break;
        }
        common = after;
        held = seeder.db.read(|txn| STATEMENTS.get(txn, &common))?;
    }
    if common < newest {
        put_aside(&seeder.db, common, restore).await?;
        tracing::warn!(
            from = common + 1,
            through = newest,
            restore,
            "the manager came back from a backup without these statements: they are put aside, new ones take their place"
        );
    }
    Ok(())
}

/// Takes the statements after `common` out of the chain. What only they dealt with waits for a new one.
async fn put_aside(db: &Db, common: u64, restore: u64) -> Result<(), StoreError> {
    db.write(move |txn| {
        for (number, signed) in STATEMENTS.range(txn, common.saturating_add(1).., usize::MAX)? {
            SUPERSEDED.put(txn, &(restore, number), &signed)?;
            STATEMENTS.delete(txn, &number)?;
        }
        let incarnation = OUTBOX.get(txn, &())?.map(|state| state.incarnation);
        let newest = STATEMENTS.get(txn, &common)?.and_then(|signed| signed.peek().ok());
        let covered = newest.into_iter().flat_map(|statement| statement.covered);
        let covered = covered.filter(|covered| Some(covered.incarnation) == incarnation).map(|covered| covered.number);
        COVERS.delete_range(txn, covered.max().map_or(0, |number| number.saturating_add(1)).., usize::MAX)?;
        Ok(())
    })
    .await
}

fn last(db: &Db) -> Result<Option<(u64, Signed<Statement>)>, StoreError> {
    db.read(|txn| STATEMENTS.last(txn))
}

fn wrong(detail: String) -> TakeError {
    Refusal::new(RefusalCode::BadReceipt, detail).into()
}

fn trust(seeder: &Seeder) -> Result<Arc<Trust>, TakeError> {
    let unknown = || Refusal::new(RefusalCode::NotEnrolled, "the network's keys are not known here yet");
    Ok(seeder.network.trust().ok_or_else(unknown)?)
}

/// A statement for this seeder that a good key signed, and whose sums are right.
fn open(seeder: &Seeder, trust: &Trust, signed: &Signed<Statement>) -> Result<Statement, TakeError> {
    let statement = trust.open(signed, KeyPurpose::Settlement, |s| s.issued_at, now_ms())?;
    if statement.seeder != seeder.peer {
        return Err(wrong("the manager sent the statement of another seeder".to_owned()));
    }
    statement.check().map_err(|error| wrong(error.to_string()))?;
    Ok(statement)
}

/// Checks a statement, does its sums again, and keeps it.
async fn take(seeder: &Seeder, signed: &Signed<Statement>) -> Result<(), TakeError> {
    let (trust, signed) = (trust(seeder)?, signed.clone());
    let statement = open(seeder, &trust, &signed)?;
    match last(&seeder.db)? {
        Some((_, before)) => {
            let digest = before.digest();
            let before = before.peek().map_err(Refusal::from)?;
            statement.follows(&before, digest).map_err(|error| wrong(error.to_string()))?;
        }
        None if statement.number != 1 => return Err(wrong("the first statement is missing".to_owned())),
        None => {}
    }
    let (number, key_set) = (statement.number, trust.signed_key_set().clone());
    let version = trust.key_set().version;
    let at = now_ms();
    seeder
        .db
        .write_step(Step::SeederStatement, move |txn| {
            STATEMENTS.put(txn, &statement.number, &signed)?;
            OLD_KEY_SETS.put(txn, &version, &key_set)?;
            let incarnation = OUTBOX.get(txn, &())?.map(|state| state.incarnation);
            let covered = statement.covered.iter().find(|covered| Some(covered.incarnation) == incarnation);
            if let Some(covered) = covered {
                // The first statement that covers a batch is the one whose time counts.
                if COVERS.last(txn)?.is_none_or(|(number, _)| number < covered.number) {
                    COVERS.put(txn, &covered.number, &CoveredAt { at })?;
                }
            }
            Ok::<_, StoreError>(())
        })
        .await?;
    tracing::info!(number, "statement of account received");
    Ok(())
}

/// Statements, newest first, as they are shown; asks the manager for new ones first, and says why if that fails.
pub(crate) async fn list(seeder: &Arc<Seeder>, limit: usize) -> Result<Value, StoreError> {
    let (mut trouble, mut more) = (None, true);
    for _ in 0..ROUNDS {
        match fetch(seeder).await {
            Ok(AT_ONCE) => continue,
            Ok(_) => {}
            Err(error) => trouble = Some(error.to_string()),
        }
        more = false;
        break;
    }
    let total = seeder.db.read(|txn| STATEMENTS.len(txn))?;
    let held = seeder.db.read(|txn| STATEMENTS.range_back(txn, .., limit))?;
    let lines: Vec<Value> = held.iter().filter_map(|(_, signed)| signed.peek().ok()).map(|s| line(&s)).collect();
    let aside = seeder.db.read(|txn| SUPERSEDED.range_back(txn, .., limit))?;
    let aside: Vec<Value> = aside
        .iter()
        .filter_map(|((restore, _), signed)| signed.peek().ok().map(|statement| (restore, statement)))
        .map(|(restore, statement)| json!({"restore": restore, "statement": line(&statement)}))
        .collect();
    Ok(json!({
        "statements": lines, "total": total, "superseded": aside, "not_fetched_because": trouble, "more_wait": more,
    }))
}

fn line(statement: &Statement) -> Value {
    let totals = statement.totals();
    let balances = statement.balances.iter().map(|b| {
        json!({
            "currency": b.currency, "before_minor": b.before, "credited_minor": b.credited,
            "paid_minor": b.paid, "after_minor": b.after,
        })
    });
    json!({
        "number": statement.number, "from": statement.from, "until": statement.until,
        "accepted": totals.accepted, "duplicate": totals.duplicate, "capped": totals.capped,
        "unknown": totals.unknown, "rejected": totals.rejected, "paid_deliveries": statement.earnings.len(),
        "balances": balances.collect::<Vec<_>>(),
    })
}

/// Statements as a file.
pub(crate) struct Written {
    pub(crate) bytes: Vec<u8>,
    pub(crate) statements: usize,
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// The first one that did not go into it.
    pub(crate) next: Option<u64>,
}

/// The statements from `first` on with the key sets that prove them, as a file; with `superseded`, those that were put
/// aside under that restore number. `None` where there are none.
pub(crate) fn file(db: &Db, first: Option<u64>, superseded: Option<u64>) -> Result<Option<Written>, StoreError> {
    let (file, more) = db.read(|txn| {
        let key_sets = OLD_KEY_SETS.range_back(txn, .., MAX_KEY_SETS)?.into_iter().map(|(_, signed)| signed).collect();
        let mut next = first.unwrap_or(0);
        // One at a time: each may be long.
        let statements = std::iter::from_fn(|| {
            let found = match superseded {
                None => STATEMENTS.range(txn, next.., 1).map(|page| page.into_iter().next()),
                Some(restore) => SUPERSEDED
                    .range(txn, (restore, next)..=(restore, u64::MAX), 1)
                    .map(|page| page.into_iter().next().map(|((_, number), signed)| (number, signed))),
            };
            match found {
                Ok(found) => found.map(|(number, signed)| {
                    next = number.saturating_add(1);
                    Ok(signed)
                }),
                Err(error) => Some(Err(error)),
            }
        });
        StatementFile::of::<StoreError>(key_sets, statements)
    })?;
    let number = |signed: Option<&Signed<Statement>>| signed.and_then(|s| s.peek().ok()).map_or(0, |s| s.number);
    let (first, last) = (number(file.statements.first()), number(file.statements.last()));
    let next = more.then_some(last.saturating_add(1));
    let statements = file.statements.len();
    Ok((statements > 0).then(|| Written { bytes: file.to_bytes(), statements, first, last, next }))
}

/// Asks the manager what became of a receipt.
pub(crate) async fn explain(seeder: &Seeder, receipt: Digest) -> Result<Value, AskError> {
    let answer = seeder.manager.ask(&MeshRequest::Explain { receipt }).await?;
    let MeshResponse::Explained(explanation) = answer else {
        return Err(AskError::Unexpected("a question about a receipt"));
    };
    let Explanation { line, repeats, statement, earning, due_at, restored_at } = &*explanation;
    let (code, reason) = match &line.fate {
        protocol::statement::ReceiptFate::Rejected { code, reason } => (Some(code.as_str()), Some(reason)),
        _ => (None, None),
    };
    Ok(json!({
        "receipt": line.receipt, "fate": line.fate.as_str(), "summary": explanation.summary(),
        "transaction": explanation.transaction(), "delivery": line.delivery.map(|id| id.delivery),
        "at": line.at, "chunks": line.chunks, "new_chunks": line.new_chunks, "code": code, "reason": reason,
        "repeats": repeats, "statement": statement, "delivery_due_at": due_at, "manager_restored_at": restored_at,
        "earning": earning.as_ref().map(|e| json!({
            "at": e.at, "bytes": e.bytes, "credited_minor": e.credited, "currency": e.currency, "capped": e.capped,
        })),
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use protocol::evidence::check_statement_files;
    use protocol::receipt::{OutboxPlace, ReceiptBatch, SealedBatch};
    use protocol::statement::Unlisted;
    use protocol::trust::{KeyEntry, KeySet, KeyState};
    use protocol::{Keypair, NetworkId, Nonce};

    use super::*;
    use crate::outbox;
    use crate::tables::{BATCHES, BatchRecord, OutboxState, SCHEMA};

    #[tokio::test]
    async fn receipts_are_kept_until_a_statement_has_dealt_with_them_for_long_enough() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path().join("s.redb"), store::Options::new(SCHEMA)).unwrap();
        let (incarnation, start) = (Nonce::from_bytes([1; 16]), Digest::from_bytes([0; 32]));
        let key = Keypair::from_seed(&[7; 32]);
        let batch = move |number| {
            let network = NetworkId::from_bytes([2; 32]);
            let place = OutboxPlace { network, incarnation, number, previous: start };
            let empty = ReceiptBatch { receipts: Vec::new() };
            let batch = SealedBatch::seal(&empty, &place, &key, key.peer_id(), 1, &mut rand::rng()).unwrap();
            BatchRecord { batch, running: start, made_at: 1 }
        };
        let records: Vec<(u64, BatchRecord)> = (1..=6).map(|number| (number, batch(number))).collect();
        db.write(move |txn| {
            let state = OutboxState { incarnation, next: 7, running: start, marked: 5, restore: 0 };
            OUTBOX.put(txn, &(), &state)?;
            records.iter().try_for_each(|(number, record)| BATCHES.put(txn, number, record))
        })
        .await
        .unwrap();
        let kept = |db: &Db| {
            let all = db.read(|txn| BATCHES.range(txn, .., 10)).unwrap();
            all.into_iter().map(|(number, _)| number).collect::<Vec<_>>()
        };
        // Marked and old, but in no statement.
        outbox::prune(&db, u64::MAX).await.unwrap();
        assert_eq!(kept(&db), [1, 2, 3, 4, 5, 6]);
        db.write(|txn| {
            COVERS.put(txn, &2, &CoveredAt { at: 50 })?;
            COVERS.put(txn, &3, &CoveredAt { at: 100 })?;
            COVERS.put(txn, &6, &CoveredAt { at: 200 })
        })
        .await
        .unwrap();
        outbox::prune(&db, 60).await.unwrap();
        assert_eq!(kept(&db), [3, 4, 5, 6]);
        outbox::prune(&db, 150).await.unwrap();
        assert_eq!(kept(&db), [4, 5, 6]);
        // The newest marked one stays, and so does what is not marked.
        outbox::prune(&db, 300).await.unwrap();
        assert_eq!(kept(&db), [5, 6]);
    }

    /// A network's key set, and as many statements that follow each other.
    fn chain(root: &Keypair, length: u64) -> (Signed<KeySet>, Vec<Signed<Statement>>) {
        let (network, key) = (NetworkId::of_root(&root.peer_id()), Keypair::from_seed(&[8; 32]));
        let entry = |purpose: &KeyPurpose| KeyEntry { purpose: *purpose, key: key.peer_id(), state: KeyState::Active };
        let set = KeySet {
            network,
            version: 1,
            issued_at: 1,
            keys: KeyPurpose::ALL.iter().map(entry).collect(),
            managers: Vec::new(),
            gossip_shards: 1,
            next_root: None,
            handovers: Vec::new(),
        };
        let mut previous = None;
        let statements = (1..=length).map(|number| {
            let statement = Statement {
                network,
                seeder: root.peer_id(),
                number,
                previous,
                from: number,
                until: number + 1,
                issued_at: number + 1,
                restore: 0,
                receipts: Vec::new(),
                unlisted: Unlisted::default(),
                earnings: Vec::new(),
                payments: Vec::new(),
                balances: Vec::new(),
                covered: Vec::new(),
            };
            let signed = Signed::sign(&statement, &key);
            previous = Some(signed.digest());
            signed
        });
        let statements = statements.collect();
        (Signed::sign(&set, root), statements)
    }

    #[test]
    fn a_chain_that_is_longer_than_a_file_is_in_the_files_that_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path().join("s.redb"), store::Options::new(SCHEMA)).unwrap();
        let root = Keypair::from_seed(&[7; 32]);
        let length = 2 * StatementFile::MOST as u64 + 1;
        let (keys, whole) = chain(&root, length);
        let held = whole.clone();
        db.write_blocking(move |txn| {
            OLD_KEY_SETS.put(txn, &1, &keys)?;
            // Two chains were put aside, which are in no file but their own.
            held.iter().zip(1..).try_for_each(|(signed, number)| {
                SUPERSEDED.put(txn, &(5, number), signed)?;
                SUPERSEDED.put(txn, &(6, number), signed)?;
                STATEMENTS.put(txn, &number, signed)
            })
        })
        .unwrap();
        for superseded in [None, Some(5), Some(6)] {
            let (mut files, mut first, mut reached) = (Vec::new(), None, 0);
            loop {
                let written = file(&db, first, superseded).unwrap().unwrap();
                assert!(written.first == reached + 1 && written.bytes.len() <= StatementFile::MAX_BYTES);
                assert_eq!(written.last - reached, written.statements as u64);
                files.push(StatementFile::from_bytes(&written.bytes).unwrap());
                (first, reached) = (written.next, written.last);
                if first.is_none() {
                    break;
                }
            }
            let sizes: Vec<usize> = files.iter().map(|file| file.statements.len()).collect();
            assert_eq!(sizes, [StatementFile::MOST, StatementFile::MOST, 1]);
            assert!(files.iter().flat_map(|file| &file.statements).eq(&whole));
            let (lines, good) = check_statement_files(&files, &root.peer_id());
            assert!(lines.iter().all(|line| line.problem.is_none()));
            assert_eq!(good.len() as u64, length);
            // Each proves itself, too; one that is left out, or in another place, is missed.
            for one in &files {
                let (lines, good) = check_statement_files(std::slice::from_ref(one), &root.peer_id());
                assert!(lines.iter().all(|line| line.problem.is_none()) && good.len() == one.statements.len());
            }
            files.swap(1, 2);
            let (lines, _) = check_statement_files(&files, &root.peer_id());
            let wrong = lines.iter().find(|line| line.problem.is_some()).unwrap();
            assert_eq!(wrong.section, "file 2, statement 1");
            assert!(wrong.problem.as_ref().unwrap().contains("gap"), "{wrong:?}");
        }
        assert!(file(&db, Some(length + 1), None).unwrap().is_none());
    }
}
