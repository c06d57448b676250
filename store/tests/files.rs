//! The file around the tables: who may open it, what is refused, and copies taken while it is in use.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use willcall_store::{BackupError, Db, OpenError, Options, RestoreError, Restored, StoreError, Table, restore};

#[derive(Debug, Clone, PartialEq, bincode::Encode, bincode::Decode)]
struct Count(u64);
protocol::wire!(Count => 16);

const LEFT: Table<u64, Count> = Table::new("left");
const RIGHT: Table<u64, Count> = Table::new("right");

/// A restore where nothing runs that would have to be kept out.
fn put_back(backup: &Path, folder: &Path, store: &str) -> Result<Restored, RestoreError> {
    restore(backup, folder, store, |_| Ok(()), |_| Ok(())).map(|(restored, ())| restored)
}

fn put_pair(db: &Db, n: u64) {
    db.write_blocking(move |txn| {
        LEFT.put(txn, &n, &Count(n))?;
        RIGHT.put(txn, &n, &Count(n))
    })
    .unwrap();
}

#[test]
fn one_opener_at_a_time_and_again_right_after() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.redb");
    let db = Db::open(&path, Options::new(1)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let error = Db::open(&path, Options::new(1)).unwrap_err();
    assert!(matches!(error, OpenError::InUse { .. }), "{error:?}");
    assert_eq!(error.to_string(), format!("{} is in use by another process", path.display()));
    put_pair(&db, 1);
    let clone = db.clone();
    drop(db);
    put_pair(&clone, 2);
    drop(clone);
    let db = Db::open(&path, Options::new(1)).unwrap();
    assert_eq!(db.read(|txn| LEFT.len(txn)).unwrap(), 2);
}

#[tokio::test]
async fn who_waits_for_the_end_is_told_when_the_file_is_free() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.redb");
    let db = Db::open(&path, Options::new(1)).unwrap();
    let mut closed = Box::pin(db.closed());
    let (reads, mut reading) = tokio::sync::oneshot::channel();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    // A read on a blocking thread outlives whoever asked for it.
    let reader = db.clone();
    let blocking = tokio::task::spawn_blocking(move || {
        reader.read(|_| {
            reads.send(()).unwrap();
            wait.recv().unwrap();
            Ok::<_, StoreError>(())
        })
    });
    (&mut reading).await.unwrap();
    drop(db);
    assert!(futures::poll!(&mut closed).is_pending());
    assert!(matches!(Db::open(&path, Options::new(1)), Err(OpenError::InUse { .. })));
    go.send(()).unwrap();
    closed.await;
    Db::open(&path, Options::new(1)).unwrap();
    blocking.await.unwrap().unwrap();
}

#[test]
fn what_is_not_this_store_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let open = |name: &str| Db::open(path(name), Options::new(2));

    drop(Db::open(path("newer"), Options::new(3)).unwrap());
    let error = open("newer").unwrap_err();
    assert!(matches!(error, OpenError::Schema { found: 3, wanted: 2, .. }), "{error:?}");
    assert!(error.to_string().contains("has schema 3, this program reads schema 2"), "{error}");
    drop(Db::open(path("newer"), Options::new(3)).unwrap());

    for (name, bytes) in [("text", b"Dear diary".to_vec()), ("large", vec![b'x'; 100_000])] {
        fs::write(path(name), &bytes).unwrap();
        let error = open(name).unwrap_err();
        assert!(matches!(error, OpenError::NotAStore { .. }), "{name}: {error:?}");
        assert_eq!(fs::read(path(name)).unwrap(), bytes);
    }

    const FOREIGN: redb::TableDefinition<'_, u64, u64> = redb::TableDefinition::new("foreign");
    let foreign = redb::Database::create(path("foreign")).unwrap();
    let txn = foreign.begin_write().unwrap();
    txn.open_table(FOREIGN).unwrap().insert(1, 1).unwrap();
    txn.commit().unwrap();
    drop(foreign);
    assert!(matches!(open("foreign").unwrap_err(), OpenError::NotAStore { .. }));

    fs::create_dir(path("folder")).unwrap();
    assert!(matches!(open("folder").unwrap_err(), OpenError::Io { .. }));
    let error = open("no/such/folder").unwrap_err();
    assert!(error.to_string().contains("no/such/folder"), "{error}");
}

#[test]
fn a_cut_off_or_overwritten_store_is_an_error_and_not_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let good = folder.path().join("good");
    let db = Db::open(&good, Options::new(1)).unwrap();
    for n in 0..200 {
        put_pair(&db, n);
    }
    drop(db);
    let bytes = fs::read(&good).unwrap();
    let bad = folder.path().join("bad");
    for cut in [1, 64, 512, 4096, bytes.len() / 2] {
        fs::write(&bad, &bytes[..cut]).unwrap();
        assert!(Db::open(&bad, Options::new(1)).is_err(), "cut to {cut} bytes");
    }
    for start in (0..bytes.len()).step_by(bytes.len() / 16) {
        let mut altered = bytes.clone();
        let end = altered.len().min(start + 64);
        altered[start..end].fill(0xa5);
        fs::write(&bad, &altered).unwrap();
        // Either it is noticed, or the bytes were unused: nothing may unwind into the caller.
        if let Ok(db) = Db::open(&bad, Options::new(1)) {
            let _ = db.read(|txn| LEFT.range(txn, .., 1000));
            let _ = db.write_blocking(|txn| RIGHT.put(txn, &1, &Count(1)));
        }
    }
}

#[test]
fn a_backup_taken_while_writing_is_one_moment_and_opens_as_a_store() {
    let folder = tempfile::tempdir().unwrap();
    let db = Db::open(folder.path().join("live.redb"), Options::new(1)).unwrap();
    for n in 0..50 {
        put_pair(&db, n);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (db, stop) = (db.clone(), Arc::clone(&stop));
        move || {
            let mut n = 50;
            while !stop.load(Ordering::Relaxed) {
                put_pair(&db, n);
                n += 1;
            }
            n
        }
    });
    let target = folder.path().join("backup.redb");
    let mut before = 0;
    for _ in 0..3 {
        let records = db.backup_to(&target).unwrap();
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o600);
        let copy = Db::open(&target, Options::new(1)).unwrap();
        let (left, right) = copy
            .read(|txn| Ok::<_, StoreError>((LEFT.range(txn, .., usize::MAX)?, RIGHT.range(txn, .., usize::MAX)?)))
            .unwrap();
        assert_eq!(left, right, "both tables as of one commit");
        assert_eq!(left, (0..left.len() as u64).map(|n| (n, Count(n))).collect::<Vec<_>>());
        assert_eq!(records, 2 * left.len() as u64);
        assert!(left.len() >= 50 && left.len() >= before, "a later backup has no less");
        before = left.len();
        put_pair(&copy, 1_000_000);
    }
    stop.store(true, Ordering::Relaxed);
    let written = writer.join().unwrap();
    assert_eq!(db.read(|txn| LEFT.len(txn)).unwrap(), written);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "no partial copy is left");
}

#[test]
fn a_backup_that_cannot_be_whole_is_refused_and_spoils_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("live.redb");
    let db = Db::open(&live, Options::new(1)).unwrap();
    put_pair(&db, 1);
    let link = folder.path().join("link.redb");
    std::os::unix::fs::symlink(&live, &link).unwrap();
    for itself in [&live, &link] {
        assert!(matches!(db.backup_to(itself), Err(BackupError::Itself(_))));
    }
    assert!(matches!(db.backup_to(folder.path().join("no/folder")), Err(BackupError::Io { .. })));

    const FOREIGN: redb::TableDefinition<'_, u64, u64> = redb::TableDefinition::new("foreign");
    drop(db);
    let raw = redb::Database::open(&live).unwrap();
    let txn = raw.begin_write().unwrap();
    txn.open_table(FOREIGN).unwrap().insert(1, 1).unwrap();
    txn.commit().unwrap();
    drop(raw);
    let db = Db::open(&live, Options::new(1)).unwrap();
    let target = folder.path().join("backup.redb");
    fs::write(&target, "older backup").unwrap();
    let error = db.backup_to(&target).unwrap_err();
    assert!(matches!(&error, BackupError::ForeignTable(name) if name == "foreign"), "{error:?}");
    assert_eq!(fs::read_to_string(&target).unwrap(), "older backup");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "no partial copy is left");
    assert_eq!(db.failed(), None);
}

#[test]
fn a_folder_comes_back_from_one_file_and_what_is_there_stays() {
    let folder = tempfile::tempdir().unwrap();
    let (home, backup) = (folder.path().join("node"), folder.path().join("node.backup"));
    fs::create_dir_all(home.join("keys")).unwrap();
    fs::create_dir_all(home.join("content")).unwrap();
    fs::write(home.join("key"), "secret").unwrap();
    fs::write(home.join("keys/a.key"), "a").unwrap();
    fs::write(home.join("content/chunks"), vec![0; 2 << 20]).unwrap();
    fs::write(home.join("lock"), "1").unwrap();
    let db = Db::open(home.join("node.redb"), Options::new(3)).unwrap();
    put_pair(&db, 1);
    assert_eq!(db.backup_folder_to(&backup, true).unwrap(), 2);
    put_pair(&db, 2);
    drop(db);

    assert!(matches!(put_back(&backup, &home, "node.redb"), Err(RestoreError::Exists(_))));
    let new = folder.path().join("new");
    let wrong = put_back(&backup, &new, "other.redb").unwrap_err().to_string();
    assert!(wrong.contains("it is one of node.redb"), "{wrong}");
    // Another node's folder is left alone, and so is one that cannot be locked.
    let foreign = folder.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    let held = |_: &Path| Err::<(), _>(RestoreError::Exists("held".into()));
    let refused = restore(&backup, &foreign, "node.redb", held, |_| Ok(()));
    assert!(matches!(refused, Err(RestoreError::Exists(held)) if held == Path::new("held")));
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 0);
    fs::write(foreign.join("seeder.redb"), "").unwrap();
    let refused = put_back(&backup, &foreign, "node.redb").unwrap_err();
    assert!(matches!(refused, RestoreError::Foreign { store: "seeder.redb", .. }), "{refused}");
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1);
    // What is to be known before anything runs is told while there is no store yet, and without it there is none.
    let half = folder.path().join("half");
    let told = |folder: &Path| {
        assert!(folder.join("keys/a.key").exists() && !folder.join("node.redb").exists());
        Err::<(), _>(RestoreError::Exists("told".into()))
    };
    let refused = restore(&backup, &half, "node.redb", |_| Ok(()), told);
    assert!(matches!(refused, Err(RestoreError::Exists(held)) if held == Path::new("told")));
    assert!(!half.join("node.redb").exists());
    assert_eq!(put_back(&backup, &half, "node.redb").unwrap().records, 2);
    // Nor anything of one that was killed, which has the keys in it.
    fs::create_dir_all(&new).unwrap();
    fs::write(new.join(".restore.x.partial"), "keys").unwrap();
    fs::write(new.join("key"), "newer").unwrap();
    let restored = put_back(&backup, &new, "node.redb").unwrap();
    assert_eq!((restored.records, &restored.files[..]), (2, &[new.join("keys/a.key"), new.join("node.redb")][..]));
    assert_eq!(restored.kept, [new.join("key")]);
    assert!(!new.join(".restore.x.partial").exists());
    assert_eq!(fs::read_to_string(new.join("key")).unwrap(), "newer");
    assert_eq!(fs::metadata(new.join("keys/a.key")).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!new.join("content").exists() && !new.join("lock").exists());
    let db = Db::open(new.join("node.redb"), Options::new(3)).unwrap();
    assert_eq!(db.read(|txn| LEFT.range(txn, .., 10)).unwrap(), [(1, Count(1))]);
    // It is an ordinary store again, and can be backed up in its turn.
    assert_eq!(db.backup_folder_to(folder.path().join("second.backup"), false).unwrap(), 2);

    // Keys on another volume are in it as if they were here; what is missing there is not left out without a word.
    let (far, linked) = (folder.path().join("far"), folder.path().join("linked"));
    fs::create_dir_all(far.join("content")).unwrap();
    fs::create_dir(&linked).unwrap();
    fs::rename(new.join("keys"), far.join("keys")).unwrap();
    fs::write(far.join("key"), "far").unwrap();
    symlink(far.join("keys"), linked.join("keys")).unwrap();
    symlink(far.join("key"), linked.join("key")).unwrap();
    // Neither what is large is wanted, nor what an editor left.
    symlink("/nowhere", linked.join("content")).unwrap();
    symlink("/nowhere", linked.join(".#config.toml")).unwrap();
    let db = Db::open(linked.join("node.redb"), Options::new(3)).unwrap();
    let third = folder.path().join("third.backup");
    db.backup_folder_to(&third, false).unwrap();
    let back = folder.path().join("back");
    put_back(&third, &back, "node.redb").unwrap();
    let text = |name: &str| fs::read_to_string(back.join(name)).unwrap();
    assert_eq!((text("keys/a.key"), text("key")), ("a".into(), "far".into()));
    symlink(&linked, far.join("keys/loop")).unwrap();
    let error = db.backup_folder_to(&third, true).unwrap_err();
    assert!(matches!(&error, BackupError::Beside { reason, .. } if reason.contains("a link to a folder")), "{error}");
    fs::remove_file(far.join("keys/loop")).unwrap();
    fs::remove_file(far.join("key")).unwrap();
    let error = db.backup_folder_to(&third, true).unwrap_err();
    assert!(matches!(&error, BackupError::Beside { path, .. } if *path == linked.join("key")), "{error}");

    fs::write(&backup, "no backup").unwrap();
    assert!(put_back(&backup, &folder.path().join("third"), "node.redb").is_err());
}
