//! Tables stay open while a transaction lasts, across the closures that share it. What must not follow from that: a
//! change under a scan, anything left of a closure that failed or panicked, or a backup without what is still open.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::future::Future;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::mpsc::{Sender, channel};
use std::task::{Context, Waker};
use std::time::Duration;

use willcall_store::{Db, Options, StoreError, Table, WriteTransaction};

#[derive(Debug, Clone, PartialEq, bincode::Encode, bincode::Decode)]
struct Count(u64);
protocol::wire!(Count => 16);

const LEFT: Table<u64, Count> = Table::new("left");
const RIGHT: Table<u64, Count> = Table::new("right");
/// The bytes of `LEFT` under another type: whether a table is open is a matter of its name.
const LEFT_AGAIN: Table<(), Count> = Table::new("left");

const LIMIT: Duration = Duration::from_secs(60);

type Answer<R> = Pin<Box<dyn Future<Output = Result<R, StoreError>> + Send>>;

fn open(folder: &tempfile::TempDir) -> Db {
    Db::open(folder.path().join("test.redb"), Options::new(1)).unwrap()
}

fn rows(db: &Db, table: Table<u64, Count>) -> Vec<(u64, u64)> {
    let found = db.read(|txn| table.range(txn, .., usize::MAX)).unwrap();
    found.into_iter().map(|(key, count)| (key, count.0)).collect()
}

/// Puts a write into the queue without waiting for it.
fn queue<R, F>(db: &Db, closure: F) -> Answer<R>
where
    F: FnMut(&WriteTransaction<'_>) -> Result<R, StoreError> + Send + 'static,
    R: Send + 'static,
{
    let db = db.clone();
    let mut answer: Answer<R> = Box::pin(async move { db.write(closure).await });
    assert!(answer.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    answer
}

/// Keeps the writer inside a write until the sender is dropped: what is queued meanwhile runs as one batch.
fn hold_writer(db: &Db) -> (Sender<()>, Answer<()>) {
    let (release, gate) = channel::<()>();
    let (entered, inside) = channel();
    let held = queue(db, move |_| {
        let _ = entered.send(());
        let _ = gate.recv();
        Ok(())
    });
    inside.recv_timeout(LIMIT).unwrap();
    (release, held)
}

fn fill(db: &Db) {
    db.write_blocking(|txn| {
        for n in 0..10 {
            LEFT.put(txn, &n, &Count(n))?;
            RIGHT.put(txn, &n, &Count(n))?;
        }
        Ok::<_, StoreError>(())
    })
    .unwrap();
}

#[test]
fn a_scan_may_read_its_table_and_change_others_and_is_stopped_by_name_when_it_changes_its_own() {
    type Change = fn(&WriteTransaction<'_>, u64) -> Result<(), StoreError>;
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    fill(&db);
    let seen = db.write_blocking(|txn| {
        let mut seen = 0;
        LEFT.scan(txn, .., |key, count| {
            assert_eq!(LEFT.get(txn, &key)?.as_ref(), Some(&count));
            LEFT.scan(txn, key.., |_, _| Ok::<_, StoreError>(ControlFlow::Break(())))?;
            RIGHT.put(txn, &key, &Count(count.0 + 100))?;
            seen += 1;
            Ok::<_, StoreError>(ControlFlow::Continue(()))
        })?;
        // And once the scan is over the table is free again.
        LEFT.put(txn, &0, &Count(7))?;
        Ok::<_, StoreError>(seen)
    });
    assert_eq!(seen, Ok(10));
    assert!(rows(&db, RIGHT).iter().all(|(key, count)| *count == key + 100));

    let changes: [(&str, Change); 6] = [
        ("put", |txn, key| LEFT.put(txn, &key, &Count(1))),
        ("insert_new", |txn, key| LEFT.insert_new(txn, &(key + 100), &Count(1)).map(drop)),
        ("delete", |txn, key| LEFT.delete(txn, &key).map(drop)),
        ("take", |txn, key| LEFT.take(txn, &key).map(drop)),
        ("delete_range", |txn, key| LEFT.delete_range(txn, key.., 3).map(drop)),
        ("under another type", |txn, _| LEFT_AGAIN.put(txn, &(), &Count(1))),
    ];
    let before = rows(&db, LEFT);
    for (name, change) in changes {
        let result = db.write_blocking(move |txn| {
            LEFT.scan(txn, .., |key, _| {
                change(txn, key)?;
                Ok::<_, StoreError>(ControlFlow::Continue(()))
            })
        });
        let expected = StoreError::Misuse("table left cannot be changed by what is scanning it".to_owned());
        assert_eq!(result, Err(expected), "{name}");
        assert_eq!(rows(&db, LEFT), before, "{name}");
    }

    // A closure that hides it has changed nothing by it, and what else it did stands.
    let hidden = db.write_blocking(|txn| {
        LEFT.scan(txn, .., |key, _| {
            assert!(LEFT.delete(txn, &key).is_err());
            Ok::<_, StoreError>(ControlFlow::Continue(()))
        })?;
        RIGHT.put(txn, &0, &Count(0))
    });
    assert_eq!(hidden, Ok(()));
    assert_eq!(rows(&db, LEFT), before);
    assert_eq!(db.failed(), None);
}

#[test]
fn the_closures_of_a_batch_see_what_their_forerunners_wrote_and_all_of_it_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let (release, held) = hold_writer(&db);
    let answers: Vec<_> = (0..200_u64)
        .map(|n| {
            queue(&db, move |txn| {
                let sum = LEFT.last(txn)?.map_or(0, |(_, count)| count.0);
                LEFT.put(txn, &n, &Count(sum + 1))?;
                RIGHT.insert_new(txn, &n, &Count(LEFT.len(txn)?))
            })
        })
        .collect();
    drop(release);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(held).unwrap();
    for answer in answers {
        assert_eq!(runtime.block_on(answer), Ok(true));
    }
    assert_eq!(db.stats().commits, 2, "one for the write that was held, one for all the others");
    let expected: Vec<_> = (0..200).map(|n| (n, n + 1)).collect();
    drop(db);
    let db = open(&folder);
    assert_eq!((rows(&db, LEFT), rows(&db, RIGHT)), (expected.clone(), expected));
}

#[test]
fn a_failure_and_panics_in_every_place_leave_nothing_open_and_nothing_written() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    fill(&db);
    let (release, held) = hold_writer(&db);
    let before = queue(&db, |txn| LEFT.put(txn, &20, &Count(20)));
    // Makes a table that was not there, which goes with it.
    let failing = queue(&db, |txn| {
        const NEW: Table<u64, Count> = Table::new("new");
        NEW.put(txn, &1, &Count(1))?;
        LEFT.put(txn, &21, &Count(21))?;
        Err::<(), _>(StoreError::Misuse("as the test wants it".to_owned()))
    });
    let in_scan = queue(&db, |txn| {
        LEFT.put(txn, &22, &Count(22))?;
        LEFT.scan(txn, .., |_, _| -> Result<ControlFlow<()>, StoreError> { panic!("in a scan") })
    });
    let in_two_scans = queue(&db, |txn| {
        LEFT.scan(txn, .., |_, _| {
            RIGHT.scan(txn, .., |_, _| -> Result<ControlFlow<()>, StoreError> { panic!("in two scans") })?;
            Ok::<_, StoreError>(ControlFlow::Continue(()))
        })
    });
    // Caught by the closure itself, which goes on in the same transaction: its table is not in use any more.
    let caught = queue(&db, |txn| {
        let scan = || LEFT.scan(txn, .., |_, _| -> Result<ControlFlow<()>, StoreError> { panic!("caught") });
        assert!(catch_unwind(AssertUnwindSafe(scan)).is_err());
        LEFT.put(txn, &23, &Count(LEFT.len(txn)?))
    });
    let after = queue(&db, |txn| LEFT.put(txn, &24, &Count(LEFT.len(txn)?)));
    drop(release);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(held).unwrap();
    assert_eq!(runtime.block_on(before), Ok(()));
    assert_eq!(runtime.block_on(failing), Err(StoreError::Misuse("as the test wants it".to_owned())));
    assert_eq!(runtime.block_on(in_scan), Err(StoreError::Panicked("in a scan".to_owned())));
    assert_eq!(runtime.block_on(in_two_scans), Err(StoreError::Panicked("in two scans".to_owned())));
    assert_eq!(runtime.block_on(caught), Ok(()));
    assert_eq!(runtime.block_on(after), Ok(()));
    let mut expected: Vec<_> = (0..10).map(|n| (n, n)).collect();
    expected.extend([(20, 20), (23, 11), (24, 12)]);
    assert_eq!(rows(&db, LEFT), expected);
    assert_eq!(db.failed(), None);

    drop(db);
    let raw = redb::Database::open(folder.path().join("test.redb")).unwrap();
    let names: Vec<_> = {
        use redb::{ReadableDatabase, TableHandle};
        raw.begin_read().unwrap().list_tables().unwrap().map(|table| table.name().to_owned()).collect()
    };
    assert_eq!(names, ["left", "right", "willcall.store"]);
}

#[test]
fn a_backup_made_while_a_write_has_tables_open_is_of_before_it_and_one_made_after_has_all() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    fill(&db);
    let (release, gate) = channel::<()>();
    let (entered, inside) = channel();
    let open_write = queue(&db, move |txn| {
        LEFT.put(txn, &30, &Count(30))?;
        RIGHT.put(txn, &30, &Count(30))?;
        let _ = entered.send(());
        let _ = gate.recv();
        Ok(())
    });
    inside.recv_timeout(LIMIT).unwrap();
    let copies = [folder.path().join("during.backup"), folder.path().join("after.backup")];
    let [during, after] = &copies;
    assert_eq!(db.backup_to(during).unwrap(), 20);
    drop(release);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(open_write).unwrap();
    assert_eq!(db.backup_to(after).unwrap(), 22);
    for (copy, has_it) in [(during, false), (after, true)] {
        let copy = Db::open(copy, Options::new(1)).unwrap();
        for table in [LEFT, RIGHT] {
            assert_eq!(copy.read(|txn| table.contains(txn, &30)).unwrap(), has_it);
        }
    }
}

#[test]
fn a_read_keeps_to_its_snapshot_and_may_scan_a_table_inside_of_a_scan() {
    const LATER: Table<u64, Count> = Table::new("later");
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    fill(&db);
    let pairs = db.read(|txn| {
        assert_eq!((LEFT.len(txn)?, LATER.get(txn, &1)?), (10, None));
        db.write_blocking(|txn| {
            LEFT.put(txn, &10, &Count(10))?;
            LATER.put(txn, &1, &Count(1))
        })?;
        // Neither the table that was open before nor the one that was missing has changed.
        assert_eq!((LEFT.len(txn)?, LATER.get(txn, &1)?), (10, None));
        let mut pairs = 0;
        LEFT.scan(txn, .., |first, _| {
            LEFT.scan(txn, first.., |_, _| {
                pairs += 1;
                Ok::<_, StoreError>(ControlFlow::Continue(()))
            })?;
            Ok::<_, StoreError>(ControlFlow::Continue(()))
        })?;
        Ok::<_, StoreError>(pairs)
    });
    assert_eq!(pairs, Ok(55));
    assert_eq!(db.read(|txn| Ok::<_, StoreError>((LEFT.len(txn)?, LATER.get(txn, &1)?))), Ok((11, Some(Count(1)))));
}
