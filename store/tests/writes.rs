//! What callers of `write` rely on: durable when answered, all or nothing, one flush for many, and a failing or
//! panicking neighbour that costs nobody else anything.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio::time::timeout;
use willcall_store::{Db, OpenError, Options, StoreError, Table};

#[derive(Debug, Clone, PartialEq, bincode::Encode, bincode::Decode)]
struct Entry {
    text: String,
}
protocol::wire!(Entry => 64);

fn entry(text: &str) -> Entry {
    Entry { text: text.to_owned() }
}

const ENTRIES: Table<u64, Entry> = Table::new("entries");
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, PartialEq, thiserror::Error)]
enum TestError {
    #[error("already there")]
    Already,
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn open(folder: &tempfile::TempDir) -> Db {
    Db::open(folder.path().join("test.redb"), Options::new(1)).unwrap()
}

/// Keeps the writer thread busy inside a write until the sender is used or dropped, so that what follows queues up.
async fn hold_writer(db: &Db) -> (Sender<()>, JoinHandle<Result<(), StoreError>>) {
    let (release, gate) = channel::<()>();
    let (entered, inside) = tokio::sync::oneshot::channel();
    let mut entered = Some(entered);
    let db = db.clone();
    let held = tokio::spawn(async move {
        db.write(move |_| {
            if let Some(entered) = entered.take() {
                entered.send(()).unwrap();
            }
            let _ = gate.recv();
            Ok(())
        })
        .await
    });
    timeout(LIMIT, inside).await.unwrap().unwrap();
    (release, held)
}

async fn until_waiting(db: &Db, count: usize) {
    let reached = async {
        while db.stats().waiting < count {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, reached).await.expect("writes should have queued up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_writers_share_flushes_and_wait_at_the_bound() {
    const WRITERS: u64 = 1500;
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let (release, held) = hold_writer(&db).await;
    let writes: Vec<_> = (0..WRITERS)
        .map(|n| {
            let db = db.clone();
            tokio::spawn(async move { db.write(move |txn| ENTRIES.put(txn, &n, &entry("x"))).await })
        })
        .collect();
    until_waiting(&db, 1024).await;
    assert_eq!(db.stats().waiting, 1024, "the queue has its bound and the rest wait outside");
    drop(release);
    held.await.unwrap().unwrap();
    for write in writes {
        timeout(LIMIT, write).await.unwrap().unwrap().unwrap();
    }
    let stats = db.stats();
    assert_eq!((stats.writes, stats.failures, stats.waiting), (WRITERS + 1, 0, 0));
    assert!(stats.commits < stats.writes / 10, "{stats:?}");
    drop(db);
    assert_eq!(open(&folder).read(|txn| ENTRIES.len(txn)).unwrap(), WRITERS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_and_a_panicking_write_leave_no_trace_and_harm_no_neighbour() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let (release, held) = hold_writer(&db).await;
    let put = |n: u64| {
        let db = db.clone();
        tokio::spawn(async move { db.write(move |txn| ENTRIES.put(txn, &n, &entry("kept"))).await })
    };
    let first = put(1);
    let failing = tokio::spawn({
        let db = db.clone();
        async move {
            db.write(move |txn| -> Result<(), TestError> {
                ENTRIES.put(txn, &2, &entry("lost"))?;
                Err(TestError::Already)
            })
            .await
        }
    });
    let panicking = tokio::spawn({
        let db = db.clone();
        async move {
            db.write(move |txn| -> Result<(), StoreError> {
                ENTRIES.put(txn, &3, &entry("lost"))?;
                panic!("as the test wants it")
            })
            .await
        }
    });
    until_waiting(&db, 3).await;
    let last = put(4);
    until_waiting(&db, 4).await;
    release.send(()).unwrap();
    drop(release);
    held.await.unwrap().unwrap();
    first.await.unwrap().unwrap();
    assert_eq!(failing.await.unwrap(), Err(TestError::Already));
    assert_eq!(panicking.await.unwrap(), Err(StoreError::Panicked("as the test wants it".to_owned())));
    last.await.unwrap().unwrap();
    let stats = db.stats();
    assert_eq!((stats.writes, stats.failures, stats.reruns, stats.commits), (3, 2, 2, 2));

    let keys = |db: &Db| -> Vec<u64> {
        let found = db.read(|txn| ENTRIES.range(txn, .., 10)).unwrap();
        found.into_iter().map(|(key, _)| key).collect()
    };
    assert_eq!(keys(&db), [1, 4]);
    drop(db);
    assert_eq!(keys(&open(&folder)), [1, 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_full_of_failures_runs_each_closure_a_bounded_number_of_times() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let (release, held) = hold_writer(&db).await;
    let runs: Arc<Vec<AtomicUsize>> = Arc::new((0..200).map(|_| AtomicUsize::new(0)).collect());
    let mut writes = Vec::new();
    for n in 0..200_u64 {
        let (task_db, runs) = (db.clone(), Arc::clone(&runs));
        writes.push(tokio::spawn(async move {
            task_db
                .write(move |txn| {
                    runs[n as usize].fetch_add(1, Ordering::Relaxed);
                    ENTRIES.put(txn, &n, &entry("x"))?;
                    if n % 2 == 1 { Err(TestError::Already) } else { Ok(n) }
                })
                .await
        }));
        until_waiting(&db, writes.len()).await;
    }
    drop(release);
    held.await.unwrap().unwrap();
    for (n, write) in (0_u64..).zip(writes) {
        let expected = if n % 2 == 1 { Err(TestError::Already) } else { Ok(n) };
        assert_eq!(write.await.unwrap(), expected);
    }
    let most = runs.iter().map(|count| count.load(Ordering::Relaxed)).max();
    assert!(most <= Some(6), "a closure ran {most:?} times");
    assert_eq!(db.read(|txn| ENTRIES.len(txn)).unwrap(), 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_in_one_batch_that_want_the_same_key_one_gets_it() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let (release, held) = hold_writer(&db).await;
    let claims: Vec<_> = ["first", "second"]
        .into_iter()
        .map(|name| {
            let db = db.clone();
            tokio::spawn(async move {
                db.write(move |txn| match ENTRIES.insert_new(txn, &7, &entry(name))? {
                    true => Ok(name),
                    false => Err(TestError::Already),
                })
                .await
            })
        })
        .collect();
    until_waiting(&db, 2).await;
    drop(release);
    held.await.unwrap().unwrap();
    let mut results = Vec::new();
    for claim in claims {
        results.push(claim.await.unwrap());
    }
    let winner = results.iter().find_map(|result| result.as_ref().ok()).expect("one wins");
    assert!(results.contains(&Err(TestError::Already)));
    assert_eq!(db.read(|txn| ENTRIES.get(txn, &7)).unwrap(), Some(entry(winner)));
}

#[test]
fn dropping_the_last_handle_finishes_what_is_queued_and_frees_the_file_without_a_runtime() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..5 {
        let db = open(&folder);
        for n in 0..100 {
            let mut write = Box::pin(db.write(move |txn| ENTRIES.put(txn, &(round * 100 + n), &entry("queued"))));
            // Polled once: the write is queued, and nobody waits for its answer.
            assert!(write.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        drop(db);
        assert_eq!(open(&folder).read(|txn| ENTRIES.len(txn)).unwrap(), (round + 1) * 100);
    }
}

#[test]
fn a_closure_that_holds_the_last_handle_ends_the_writer_without_waiting_for_itself() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let (done, ended) = channel();
    let inner = db.clone();
    let mut write = Box::pin(async move {
        db.write(move |txn| {
            let seen = inner.read(|txn| ENTRIES.len(txn))?;
            ENTRIES.put(txn, &seen, &entry("x"))?;
            done.send(()).unwrap();
            Ok::<_, StoreError>(())
        })
        .await
    });
    assert!(write.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    drop(write);
    ended.recv_timeout(LIMIT).unwrap();
    let deadline = Instant::now() + LIMIT;
    let again = loop {
        match Db::open(folder.path().join("test.redb"), Options::new(1)) {
            Err(OpenError::InUse { .. }) if Instant::now() < deadline => std::thread::yield_now(),
            other => break other.unwrap(),
        }
    };
    assert_eq!(again.read(|txn| ENTRIES.len(txn)).unwrap(), 1);
}

#[tokio::test]
async fn blocking_writes_work_in_and_outside_a_runtime_but_not_inside_a_write() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    db.write_blocking(|txn| ENTRIES.put(txn, &1, &entry("on a runtime thread"))).unwrap();
    let outside = db.clone();
    std::thread::spawn(move || outside.write_blocking(|txn| ENTRIES.put(txn, &2, &entry("on a plain thread"))))
        .join()
        .unwrap()
        .unwrap();
    let inner = db.clone();
    let nested = db.write(move |_| inner.write_blocking(|txn| ENTRIES.put(txn, &3, &entry("lost")))).await;
    assert!(matches!(nested, Err(StoreError::Misuse(_))), "{nested:?}");
    assert_eq!(db.read(|txn| ENTRIES.len(txn)).unwrap(), 2);
}

#[tokio::test]
async fn an_answered_write_survives_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    for n in 0..20 {
        db.write(move |txn| ENTRIES.put(txn, &n, &entry("kept"))).await.unwrap();
        // The bytes that a process killed now would leave behind.
        let left = folder.path().join("crashed.redb");
        std::fs::copy(db.path(), &left).unwrap();
        let after = Db::open(&left, Options::new(1)).unwrap();
        assert_eq!(after.read(|txn| ENTRIES.len(txn)).unwrap(), n + 1);
    }
}

#[tokio::test]
async fn a_panic_in_a_read_is_an_error_and_the_store_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let result = db.read(|_| -> Result<(), StoreError> { panic!("in a read") });
    assert_eq!(result, Err(StoreError::Panicked("in a read".to_owned())));
    db.write(|txn| ENTRIES.put(txn, &1, &entry("x"))).await.unwrap();
    assert_eq!(db.failed(), None);
}

#[test]
fn whoever_was_answered_reads_what_it_wrote_while_others_read_and_write() {
    let folder = tempfile::tempdir().unwrap();
    let db = Db::open(folder.path().join("test.redb"), Options::new(1)).unwrap();
    std::thread::scope(|scope| {
        for writer in 0..4_u64 {
            let db = &db;
            scope.spawn(move || {
                for n in 0..100_u64 {
                    let wanted = entry(&format!("{writer} {n}"));
                    let written = wanted.clone();
                    db.write_blocking(move |txn| ENTRIES.put(txn, &writer, &written)).unwrap();
                    assert_eq!(db.read(|txn| ENTRIES.get(txn, &writer)), Ok::<_, StoreError>(Some(wanted)));
                }
            });
            scope.spawn(move || {
                let mut newest = 0;
                while newest < 99 {
                    let found = db.read(|txn| ENTRIES.get(txn, &writer)).unwrap();
                    let n = found.and_then(|entry| entry.text.rsplit(' ').next()?.parse().ok()).unwrap_or(0);
                    assert!(n >= newest, "{n} after {newest}");
                    newest = n;
                }
            });
        }
    });
}

#[test]
fn a_task_that_blocks_on_many_writes_in_a_row_costs_time_and_does_not_hang() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let (done, finished) = channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        // More than a task may do between two turns.
        let writes =
            async { (0..300).all(|n| db.write_blocking(move |txn| ENTRIES.put(txn, &n, &entry("x"))).is_ok()) };
        done.send(runtime.block_on(writes)).unwrap();
    });
    assert_eq!(finished.recv_timeout(LIMIT), Ok(true));
}

const OTHERS: Table<u64, Entry> = Table::new("others");

#[tokio::test]
async fn changes_are_counted_by_table_and_only_what_was_written_and_committed() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let changes = |table: &'static str| db.changes(&[table]);
    assert_eq!(db.changes(&[ENTRIES.name(), OTHERS.name()]), 0);
    db.write(|txn| {
        OTHERS.get(txn, &1)?;
        ENTRIES.put(txn, &1, &entry("one"))
    })
    .await
    .unwrap();
    let after = changes(ENTRIES.name());
    assert!(after > 0);
    assert_eq!(changes(OTHERS.name()), 0, "it was read only");
    let failed = db.write(|txn| {
        OTHERS.put(txn, &1, &entry("one"))?;
        Err::<(), _>(TestError::Already)
    });
    assert_eq!(failed.await, Err(TestError::Already));
    assert_eq!((changes(ENTRIES.name()), changes(OTHERS.name())), (after, 0), "nothing of it is there");
    // Also what goes its own way into the table.
    db.write(|txn| ENTRIES.delete(txn, &1).map(drop)).await.unwrap();
    assert_eq!(db.changes(&[ENTRIES.name(), OTHERS.name()]), after + 1);
}
