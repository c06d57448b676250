//! Between redb and the file: names the file and the operation in every IO error, and remembers the first one. redb
//! itself only says "previous I/O error" afterwards, which tells an operator nothing.

use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use redb::{BackendError, StorageBackend};

use crate::StoreError;

/// One failed operation on the store's file.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{operation} {path}: {text}")]
pub(crate) struct Trouble {
    path: PathBuf,
    operation: &'static str,
    kind: io::ErrorKind,
    text: String,
    /// Bytes that were to come onto the disk.
    bytes: Option<u64>,
}

impl Trouble {
    pub(crate) fn to_error(&self) -> StoreError {
        match self.kind {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                StoreError::DiskFull { path: self.path.clone(), needed: self.bytes }
            }
            _ => StoreError::Failed { reason: self.to_string() },
        }
    }
}

/// Whether the store still works; once it does not, it stays so until it is opened again.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// Latest write error. Not final by itself: redb may spill its write buffer early, fail at that and go on.
    noted: Mutex<Option<Trouble>>,
    failed: OnceLock<StoreError>,
}

impl Health {
    /// What every further call is answered with.
    pub(crate) fn failure(&self) -> Option<&StoreError> {
        self.failed.get()
    }

    /// Records that redb gave up with `error`, and answers with the cause rather than with redb's echo of it.
    pub(crate) fn fail(&self, error: StoreError) -> StoreError {
        let noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner).take();
        let cause = noted.map_or(error, |trouble| trouble.to_error());
        let failure = self.failed.get_or_init(|| {
            tracing::error!(error = %cause, "store stopped");
            cause
        });
        failure.clone()
    }

    /// Forgets a write error that redb got over: the transaction is on disk.
    pub(crate) fn recovered(&self) {
        *self.noted.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn note(&self, trouble: Trouble, is_final: bool) {
        let error = trouble.to_error();
        self.noted.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(trouble);
        if is_final {
            self.fail(error);
        }
    }
}

/// A storage backend that reports to [`Health`].
#[derive(Debug)]
pub(crate) struct Watched<B> {
    inner: B,
    path: PathBuf,
    health: Arc<Health>,
}

impl<B: StorageBackend> Watched<B> {
    pub(crate) fn new(inner: B, path: &Path, health: Arc<Health>) -> Self {
        Watched { inner, path: path.to_owned(), health }
    }

    fn watch<T>(&self, operation: &'static str, is_final: bool, result: io::Result<T>) -> io::Result<T> {
        self.watch_bytes(operation, is_final, None, result)
    }

    fn watch_bytes<T>(
        &self,
        operation: &'static str,
        is_final: bool,
        bytes: Option<u64>,
        result: io::Result<T>,
    ) -> io::Result<T> {
        result.map_err(|error| {
            let kind = error.kind();
            let trouble = Trouble { path: self.path.clone(), operation, kind, text: error.to_string(), bytes };
            self.health.note(trouble.clone(), is_final);
            io::Error::new(kind, trouble)
        })
    }
}

impl<B: StorageBackend> StorageBackend for Watched<B> {
    fn len(&self) -> io::Result<u64> {
        self.watch("measure", true, self.inner.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.watch("read", true, self.inner.read(offset, out))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let grows = self.inner.len().ok().map(|now| len.saturating_sub(now));
        self.watch_bytes("resize", true, grows, self.inner.set_len(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.watch("flush", true, self.inner.sync_data())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.watch_bytes("write", false, u64::try_from(data.len()).ok(), self.inner.write(offset, data))
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.query_lock_range(start, end)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use std::sync::atomic::{AtomicI32, Ordering};
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::{Duration, Instant};

    use redb::backends::InMemoryBackend;

    use super::*;
    use crate::{Db, Mark, Options, Table};

    const MARKS: Table<u64, Mark> = Table::new("marks");

    type Closure = Box<dyn FnMut(&crate::WriteTransaction<'_>) -> Result<bool, StoreError> + Send>;

    /// A disk that answers each write, flush and read with the error set in it, 0 for none.
    #[derive(Debug)]
    struct Faulty {
        inner: InMemoryBackend,
        error: Arc<AtomicI32>,
    }

    impl Faulty {
        fn check(&self) -> io::Result<()> {
            match self.error.load(Ordering::Relaxed) {
                0 => Ok(()),
                code => Err(io::Error::from_raw_os_error(code)),
            }
        }
    }

    impl StorageBackend for Faulty {
        fn len(&self) -> io::Result<u64> {
            self.inner.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.check()?;
            self.inner.read(offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.inner.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            self.check()?;
            self.inner.sync_data()
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.check()?;
            self.inner.write(offset, data)
        }
    }

    fn open_faulty() -> (Db, Arc<AtomicI32>) {
        let error = Arc::new(AtomicI32::new(0));
        let backend = Faulty { inner: InMemoryBackend::new(), error: Arc::clone(&error) };
        let db = Db::start(Path::new("/data/test.redb"), Options::new(1), backend).unwrap();
        db.write_blocking(|txn| MARKS.put(txn, &1, &Mark)).unwrap();
        (db, error)
    }

    #[test]
    fn a_full_disk_is_named_and_holds_until_the_store_is_opened_again() {
        const ENOSPC: i32 = 28;
        let (db, error) = open_faulty();
        assert_eq!(db.failed(), None);
        error.store(ENOSPC, Ordering::Relaxed);
        let full = db.write_blocking(|txn| MARKS.put(txn, &2, &Mark)).unwrap_err();
        assert!(matches!(&full, StoreError::DiskFull { needed: Some(1..), .. }), "{full:?}");
        error.store(0, Ordering::Relaxed);
        assert_eq!(db.write_blocking(|txn| MARKS.put(txn, &3, &Mark)), Err(full.clone()));
        assert_eq!(db.read(|txn| MARKS.get(txn, &1)), Err(full));
        let text = db.failed().unwrap();
        assert!(text.starts_with("no space left for /data/test.redb: free "), "{text}");
        assert!(text.ends_with(" bytes or more, then restart"), "{text}");
        assert_eq!(db.stats().writes, 1);
    }

    #[test]
    fn another_disk_error_names_the_file_and_what_was_tried() {
        const EIO: i32 = 5;
        let (db, error) = open_faulty();
        error.store(EIO, Ordering::Relaxed);
        let failed = db.write_blocking(|txn| MARKS.put(txn, &2, &Mark)).unwrap_err();
        let text = failed.to_string();
        assert!(text.starts_with("store failed: write /data/test.redb: "), "{text}");
        assert!(text.ends_with(": restart after fixing the disk"), "{text}");
        assert_eq!(db.failed(), Some(text));
    }

    #[test]
    fn a_failure_caused_by_a_neighbour_is_not_answered_before_the_neighbour_is_durable() {
        const EIO: i32 = 5;
        let until_waiting = |db: &Db, count| {
            let deadline = Instant::now() + Duration::from_secs(60);
            while db.stats().waiting < count {
                assert!(Instant::now() < deadline, "writes should have queued up");
                thread::yield_now();
            }
        };
        let (db, error) = open_faulty();
        let (release, gate) = channel::<()>();
        let (entered, inside) = channel();
        let spawn = |mut write: Closure| {
            let db = db.clone();
            thread::spawn(move || db.write_blocking(move |txn| write(txn)))
        };
        let holder = spawn(Box::new(move |_| {
            entered.send(()).unwrap();
            Ok(gate.recv().is_ok())
        }));
        inside.recv().unwrap();
        // The first of these breaks the disk under the commit that both depend on.
        let claim = spawn(Box::new(move |txn| {
            error.store(EIO, Ordering::Relaxed);
            MARKS.insert_new(txn, &9, &Mark)
        }));
        until_waiting(&db, 1);
        let loser = spawn(Box::new(|txn| match MARKS.insert_new(txn, &9, &Mark)? {
            true => Ok(true),
            false => Err(StoreError::Misuse("already there".to_owned())),
        }));
        until_waiting(&db, 2);
        release.send(()).unwrap();
        assert_eq!(holder.join().unwrap(), Ok(true));
        for answer in [claim.join().unwrap(), loser.join().unwrap()] {
            assert!(matches!(answer, Err(StoreError::Failed { .. })), "{answer:?}");
        }
        assert_eq!(db.stats().reruns, 1, "the two met in one transaction");
    }
}
