//! The handle: opens the file, sends writes to the writer thread, reads from snapshots, and closes the file when the
//! last clone goes, so that a role can be stopped and started again in one process.

use std::fs::{self, File, OpenOptions};
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, JoinHandle, Thread};

use redb::backends::FileBackend;
use redb::{Database, DatabaseError, ReadableDatabase, StorageBackend, TableDefinition, TableHandle};
use tokio::sync::{mpsc, watch};

use crate::disk::Watched;
use crate::writer::{self, Job, Shared, Write, panic_text};
use crate::{OpenError, ReadTransaction, Step, StoreError, WriteTransaction};

/// The store's own table: what the file is.
pub(crate) const META: TableDefinition<'static, &'static [u8], &'static [u8]> = TableDefinition::new("willcall.store");
const SCHEMA: &[u8] = b"schema";

/// How to open a store.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Memory for cached pages, bytes; half of it may hold pages not yet written.
    pub cache_bytes: usize,
    /// Number of the set of tables and record types; a file with another number is refused.
    pub schema: u32,
}

impl Options {
    /// 32 MiB of cache (redb's own default is 1 GiB, too much for a seeder on a small machine).
    pub const fn new(schema: u32) -> Self {
        Options { cache_bytes: 32 * 1024 * 1024, schema }
    }
}

/// Counts since the store was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Writes that became durable.
    pub writes: u64,
    /// Writes whose own closure failed or panicked.
    pub failures: u64,
    /// Transactions committed, one disk flush each; lower than `writes` under load.
    pub commits: u64,
    /// Transactions rolled back because a closure in them failed.
    pub reruns: u64,
    /// Writes waiting for the writer thread now, at most 1,024.
    pub waiting: usize,
}

/// A store: a clonable handle to one file, its writer thread and its snapshots. When the last clone is dropped, writes
/// already queued are finished and the file is closed; that drop blocks until then, and needs no async runtime.
#[derive(Debug, Clone)]
pub struct Db {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    shared: Arc<Shared>,
    // The three below are `None` only while `drop` takes them apart.
    queue: Option<mpsc::Sender<Box<dyn Job>>>,
    writer: Option<JoinHandle<()>>,
    database: Option<Arc<Database>>,
    /// Goes last, and so tells those who wait that the file is closed.
    closed: watch::Sender<()>,
}

impl Db {
    /// Opens the store at `path`, or creates it readable by its owner only (mode 0600). The folder must exist. After
    /// a crash this walks the whole file, which takes seconds per GiB.
    ///
    /// # Errors
    /// [`OpenError`]; the file is left as it was.
    pub fn open(path: impl AsRef<Path>, options: Options) -> Result<Db, OpenError> {
        let path = path.as_ref();
        let failed = |source| OpenError::Io { path: path.to_owned(), source };
        let file = open_file(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(OpenError::NotAStore { path: path.to_owned(), reason: "not a regular file".to_owned() });
        }
        sync_folder_of(path).map_err(failed)?;
        let backend = FileBackend::new(file).map_err(|error| open_error(path, error))?;
        Db::start(path, options, backend)
    }

    pub(crate) fn start(path: &Path, options: Options, backend: impl StorageBackend) -> Result<Db, OpenError> {
        let shared = Arc::new(Shared::default());
        let backend = Watched::new(backend, path, Arc::clone(&shared.health));
        // redb trusts a cleanly closed file and may panic over one that was altered since.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let database = open_database(path, options.cache_bytes, backend)?;
            check_schema(path, &database, options.schema)?;
            Ok(database)
        }));
        let damaged = |reason: String| OpenError::Damaged { path: path.to_owned(), reason };
        let database = Arc::new(opened.unwrap_or_else(|panic| Err(damaged(panic_text(panic.as_ref()))))?);

        let (queue, requests) = mpsc::channel(writer::QUEUE);
        let name = format!("store {}", path.file_stem().unwrap_or_default().to_string_lossy());
        let (writer_database, writer_shared) = (Arc::clone(&database), Arc::clone(&shared));
        let writer = thread::Builder::new()
            .name(name.replace('\0', ""))
            .spawn(move || writer::run(writer_database, requests, writer_shared))
            .map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
        let inner = Inner {
            path: path.to_owned(),
            shared,
            queue: Some(queue),
            writer: Some(writer),
            database: Some(database),
            closed: watch::Sender::new(()),
        };
        Ok(Db { inner: Arc::new(inner) })
    }

    /// Runs `closure` in a write transaction that it shares with other callers, and returns when its changes are on
    /// disk: all of them, or, when it returns an error or panics, none.
    ///
    /// The closure must be re-runnable: when a neighbour in the transaction fails, everything is rolled back and run
    /// again without it, so only its last run counts. It must change nothing but the transaction, nor move anything
    /// out of its captures that a second run needs. An error is answered, like a success, only once all that the
    /// closure saw is durable. It blocks every other writer while it runs: compute first, then write.
    ///
    /// Waits while 1,024 writes are queued. Dropping the future before it is queued writes nothing; after that the
    /// write happens all the same and its answer is lost.
    ///
    /// # Errors
    /// The closure's own, or a [`StoreError`]: `DiskFull` and `Failed` leave open whether this write is on disk, and
    /// hold for every later call.
    pub async fn write<R, E, F>(&self, closure: F) -> Result<R, E>
    where
        F: FnMut(&WriteTransaction<'_>) -> Result<R, E> + Send + 'static,
        R: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        self.check()?;
        let stopped = || self.failure_or("the writer thread ended");
        let (Some(queue), Some(writer)) = (&self.inner.queue, &self.inner.writer) else { return Err(stopped().into()) };
        if writer.thread().id() == thread::current().id() {
            return Err(StoreError::Misuse("a write inside a write would wait for itself".to_owned()).into());
        }
        let (job, answer) = Write::new(closure);
        if queue.send(job).await.is_err() {
            return Err(stopped().into());
        }
        answer.await.unwrap_or_else(|_| Err(self.failure_or("the write was given up after a database panic").into()))
    }

    /// [`write`](Self::write) for threads that may block.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_blocking<R, E, F>(&self, closure: F) -> Result<R, E>
    where
        F: FnMut(&WriteTransaction<'_>) -> Result<R, E> + Send + 'static,
        R: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        block_on(self.write(closure))
    }

    /// [`write`](Self::write) for a change that is a durable step of a sale.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn write_step<R, E, F>(&self, step: Step, mut closure: F) -> Result<R, E>
    where
        F: FnMut(&WriteTransaction<'_>) -> Result<R, E> + Send + 'static,
        R: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        let made = move |txn: &WriteTransaction<'_>| -> Result<R, E> {
            let result = closure(txn)?;
            step.before();
            Ok(result)
        };
        let result: R = self.write(made).await?;
        step.after();
        Ok(result)
    }

    /// [`write_step`](Self::write_step) for threads that may block.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_step_blocking<R, E, F>(&self, step: Step, closure: F) -> Result<R, E>
    where
        F: FnMut(&WriteTransaction<'_>) -> Result<R, E> + Send + 'static,
        R: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        block_on(self.write_step(step, closure))
    }

    /// Runs `closure` on a snapshot of everything durable now. For short look-ups: pages that a snapshot needs are not
    /// reused, so a long one makes the file grow. Scans, and calls from async code that cannot afford a disk read,
    /// belong on a blocking thread.
    ///
    /// # Errors
    /// The closure's own, or a [`StoreError`]; a panic in the closure is [`StoreError::Panicked`].
    pub fn read<R, E>(&self, closure: impl FnOnce(&ReadTransaction) -> Result<R, E>) -> Result<R, E>
    where
        E: From<StoreError>,
    {
        self.check()?;
        let txn = self.snapshot()?;
        // redb may panic over pages that were damaged on disk.
        catch_unwind(AssertUnwindSafe(|| closure(&txn)))
            .unwrap_or_else(|panic| Err(StoreError::Panicked(panic_text(panic.as_ref())).into()))
    }

    /// How often something was written to these tables since the store was opened. What was made from them in a
    /// [`read`](Self::read) that began after this was asked is still true for as long as the number stays the same.
    pub fn changes(&self, tables: &[&'static str]) -> u64 {
        self.inner.shared.changes.of(tables)
    }

    /// Why the store stopped working, if it did: after the first disk error every call is refused until the store is
    /// opened again.
    pub fn failed(&self) -> Option<String> {
        self.inner.shared.health.failure().map(StoreError::to_string)
    }

    /// Counts since the store was opened.
    pub fn stats(&self) -> Stats {
        let shared = &self.inner.shared;
        Stats {
            writes: shared.writes.load(Relaxed),
            failures: shared.failures.load(Relaxed),
            commits: shared.commits.load(Relaxed),
            reruns: shared.reruns.load(Relaxed),
            waiting: self.inner.queue.as_ref().map_or(0, |queue| queue.max_capacity() - queue.capacity()),
        }
    }

    /// Waits until the last clone was dropped and the file is closed; what waits holds none. Work on a blocking thread
    /// goes on for a moment after those who wanted it have ended, and its clone with it.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut open = self.inner.closed.subscribe();
        // Nothing is ever sent: it fails when the sender is gone.
        async move { while open.changed().await.is_ok() {} }
    }

    /// The store's file.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    fn snapshot(&self) -> Result<Arc<ReadTransaction>, StoreError> {
        let database = self.inner.database.as_ref().ok_or_else(|| self.failure_or("the store is closed"))?;
        let shared = &self.inner.shared;
        shared.newest.get(database).map_err(|error| shared.health.fail(error.into()))
    }

    fn check(&self) -> Result<(), StoreError> {
        self.inner.shared.health.failure().map_or(Ok(()), |error| Err(error.clone()))
    }

    fn failure_or(&self, reason: &str) -> StoreError {
        let known = self.inner.shared.health.failure().cloned();
        known.unwrap_or_else(|| StoreError::Failed { reason: reason.to_owned() })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Closing the queue is what tells the writer to finish and end.
        self.queue = None;
        if let Some(writer) = self.writer.take() {
            if writer.thread().id() == thread::current().id() {
                // A write closure held the last handle: the writer cannot wait for itself, and closes the file as it ends.
                return;
            }
            if writer.join().is_err() {
                tracing::error!(path = %self.path.display(), "store writer thread panicked");
            }
        }
        self.shared.newest.forget();
        let Some(database) = self.database.take().and_then(Arc::into_inner) else { return };
        // Over damaged pages redb may panic, and a panic in a drop can end the process.
        let closed = catch_unwind(AssertUnwindSafe(|| database.close().map_err(|error| error.to_string())));
        if let Err(error) = closed.unwrap_or_else(|panic| Err(panic_text(panic.as_ref()))) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "store not closed cleanly, it is repaired when opened next");
        }
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// Is there nothing of a store at `path`: no file, or one that never got a first byte?
pub fn is_absent(path: &Path) -> bool {
    match path.metadata() {
        Ok(found) => found.is_file() && found.len() == 0,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// A new file survives a power cut only when its folder's entry is on disk as well.
pub(crate) fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::File::open(folder)?.sync_all()
}

pub(crate) fn open_database(
    path: &Path,
    cache_bytes: usize,
    backend: impl StorageBackend,
) -> Result<Database, OpenError> {
    let shown = path.to_owned();
    Database::builder()
        .set_cache_size(cache_bytes)
        .set_repair_callback(move |session| {
            tracing::warn!(path = %shown.display(), done = session.progress(), "repairing store after a crash");
        })
        .create_with_backend(backend)
        .map_err(|error| open_error(path, error))
}

pub(crate) fn open_error(path: &Path, error: DatabaseError) -> OpenError {
    let path = path.to_owned();
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => OpenError::InUse { path },
        DatabaseError::Storage(redb::StorageError::Io(source)) if source.kind() == io::ErrorKind::InvalidData => {
            OpenError::NotAStore { path, reason: source.to_string() }
        }
        DatabaseError::Storage(redb::StorageError::Io(source)) => OpenError::Io { path, source },
        other => OpenError::Damaged { path, reason: other.to_string() },
    }
}

/// Writes the schema number into a new file, compares it in an old one.
fn check_schema(path: &Path, database: &Database, wanted: u32) -> Result<(), OpenError> {
    let damaged = |error: StoreError| OpenError::Damaged { path: path.to_owned(), reason: error.to_string() };
    let (is_new, found) = read_schema(database).map_err(damaged)?;
    match found {
        Some(found) if found == wanted => Ok(()),
        Some(found) => Err(OpenError::Schema { path: path.to_owned(), found, wanted }),
        None if is_new => write_schema(database, wanted)
            .map_err(|error| OpenError::Io { path: path.to_owned(), source: io::Error::other(error) }),
        None => {
            Err(OpenError::NotAStore { path: path.to_owned(), reason: "a redb database of another program".to_owned() })
        }
    }
}

fn read_schema(database: &Database) -> Result<(bool, Option<u32>), StoreError> {
    let txn = database.begin_read()?;
    let is_new = txn.list_tables()?.next().is_none() && txn.list_multimap_tables()?.next().is_none();
    let has_meta = txn.list_tables()?.any(|table| table.name() == META.name());
    let found = if has_meta { txn.open_table(META)?.get_owned(SCHEMA)? } else { None };
    Ok((is_new, found.and_then(|value| value.value().try_into().ok()).map(u32::from_be_bytes)))
}

fn write_schema(database: &Database, schema: u32) -> Result<(), StoreError> {
    let txn = database.begin_write()?;
    txn.open_table(META)?.insert(SCHEMA, schema.to_be_bytes().as_slice())?;
    Ok(txn.commit()?)
}

/// Waits for a future on this thread. Tokio's own blocking calls panic inside a runtime, where a mistake of a caller
/// should cost time but not the task.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    // Without tokio's budget: a task that used it up is woken only once it has yielded, which it does not do here.
    let mut future = pin!(tokio::task::unconstrained(future));
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}
