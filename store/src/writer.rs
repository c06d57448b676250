//! The writer thread: takes all writes that wait, runs them in one transaction, flushes the disk once and only then
//! answers. A flush costs milliseconds whatever it flushes, so many callers sharing it is what makes durable writes
//! affordable.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use redb::Database;
use tokio::sync::{mpsc, oneshot};

use crate::disk::Health;
use crate::transaction::{Changes, Newest};
use crate::{StoreError, WriteTransaction};

/// Most writes in one transaction. Past some hundred the flush no longer dominates, while the last caller's wait and
/// the transaction's memory go on growing.
const BATCH: usize = 256;

/// Most writes that wait for the writer: four batches, so that it never runs dry, and at some milliseconds a batch
/// nobody waits long. Callers wait when it is full.
pub(crate) const QUEUE: usize = 4 * BATCH;

/// A writer that has something to do lets others have the processor until so many times in a row nobody brought more …
const YIELDS: u32 = 3;
/// … and no longer than this, a fraction of what a flush takes.
const YIELDING: Duration = Duration::from_millis(1);

/// Failures in one batch that each make all the rest run again. From the next one on, what precedes a failure is
/// committed by itself, so no closure runs more than `RERUNS + 2` times however many of its neighbours fail.
const RERUNS: usize = 4;

/// What the handles and the writer thread share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) health: Arc<Health>,
    pub(crate) writes: AtomicU64,
    pub(crate) failures: AtomicU64,
    pub(crate) commits: AtomicU64,
    pub(crate) reruns: AtomicU64,
    pub(crate) newest: Newest,
    pub(crate) changes: Changes,
}

/// One caller's write, without its types.
pub(crate) trait Job: Send {
    /// Runs the closure; `true` when it succeeded.
    fn run(&mut self, txn: &WriteTransaction<'_>) -> bool;

    /// Answers the caller: with the closure's result, or with `fate` when the transaction did not become durable.
    fn answer(self: Box<Self>, fate: Result<(), StoreError>);
}

/// A closure with the way back to its caller.
pub(crate) struct Write<F, R, E> {
    closure: F,
    result: Option<Result<R, E>>,
    reply: oneshot::Sender<Result<R, E>>,
}

impl<F, R, E> Write<F, R, E> {
    pub(crate) fn new(closure: F) -> (Box<Self>, oneshot::Receiver<Result<R, E>>) {
        let (reply, answer) = oneshot::channel();
        (Box::new(Write { closure, result: None, reply }), answer)
    }
}

impl<F, R, E> Job for Write<F, R, E>
where
    F: FnMut(&WriteTransaction<'_>) -> Result<R, E> + Send,
    R: Send,
    E: From<StoreError> + Send,
{
    fn run(&mut self, txn: &WriteTransaction<'_>) -> bool {
        // A closure that panicked is not run again, and its transaction is aborted: nothing half-changed is seen.
        let result = catch_unwind(AssertUnwindSafe(|| (self.closure)(txn)))
            .unwrap_or_else(|panic| Err(StoreError::Panicked(panic_text(panic.as_ref())).into()));
        let succeeded = result.is_ok();
        self.result = Some(result);
        succeeded
    }

    fn answer(self: Box<Self>, fate: Result<(), StoreError>) {
        let result = match (fate, self.result) {
            (Err(error), _) => Err(error.into()),
            (Ok(()), Some(result)) => result,
            (Ok(()), None) => Err(StoreError::Failed { reason: "a write was not run".to_owned() }.into()),
        };
        // A caller that stopped waiting needs no answer.
        let _ = self.reply.send(result);
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned()
}

type Jobs = Vec<Box<dyn Job>>;

/// The writer thread's whole life: it ends when the last handle is gone and the queue is empty.
pub(crate) fn run(database: Arc<Database>, mut queue: mpsc::Receiver<Box<dyn Job>>, shared: Arc<Shared>) {
    let mut batch = Jobs::with_capacity(BATCH);
    while queue.blocking_recv_many(&mut batch, BATCH) > 0 {
        gather(&mut queue, &mut batch);
        let mut jobs = std::mem::replace(&mut batch, Jobs::with_capacity(BATCH));
        // Closures are caught on their own; this is for a panic inside redb, after which nothing in memory is trusted.
        let caught = catch_unwind(AssertUnwindSafe(|| commit(&database, &mut jobs, &shared)));
        let outcome = caught.unwrap_or_else(|panic| {
            Err(StoreError::Failed { reason: format!("database panicked: {}", panic_text(panic.as_ref())) })
        });
        if let Err(error) = outcome {
            let error = shared.health.fail(error);
            for job in jobs {
                job.answer(Err(error.clone()));
            }
        }
    }
}

/// Where several write at a time, more are about to: a batch that waits a moment for them is one flush and one change of
/// each page for all. Who writes alone waits for nobody.
fn gather(queue: &mut mpsc::Receiver<Box<dyn Job>>, batch: &mut Jobs) {
    if batch.len() < 2 {
        return;
    }
    let begun = Instant::now();
    let mut in_vain = 0;
    while in_vain < YIELDS && batch.len() < BATCH && begun.elapsed() < YIELDING {
        std::thread::yield_now();
        in_vain += 1;
        while batch.len() < BATCH
            && let Ok(job) = queue.try_recv()
        {
            batch.push(job);
            in_vain = 0;
        }
    }
}

/// Runs `jobs` in as few transactions as their failures allow. On an error, `jobs` holds those not answered yet.
fn commit(database: &Database, jobs: &mut Jobs, shared: &Shared) -> Result<(), StoreError> {
    if let Some(error) = shared.health.failure() {
        return Err(error.clone());
    }
    // A failed closure may have failed because of what its neighbours wrote ("already released"), so it is answered
    // only when that is durable. Until then it waits here.
    let mut failed = Jobs::new();
    let mut reruns = 0;
    let mut size = jobs.len();
    let result = loop {
        if jobs.is_empty() {
            break Ok(());
        }
        // A snapshot that nobody reads from any more would keep pages that this commit could free.
        shared.newest.forget();
        let attempted = attempt(database, jobs, size);
        // Before anybody is answered: whoever was reads what it wrote.
        shared.newest.forget();
        match attempted {
            Ok(Attempt::Committed(tables)) => {
                // After the older snapshot was forgotten: who reads the count reads from a newer one.
                shared.changes.note(&tables);
                shared.health.recovered();
                shared.commits.fetch_add(1, Relaxed);
                shared.writes.fetch_add(u64::try_from(size).unwrap_or(u64::MAX), Relaxed);
                shared.failures.fetch_add(u64::try_from(failed.len()).unwrap_or(u64::MAX), Relaxed);
                for job in jobs.drain(..size).chain(failed.drain(..)) {
                    job.answer(Ok(()));
                }
                size = jobs.len();
            }
            Ok(Attempt::FailedAt(place)) => {
                failed.push(jobs.remove(place));
                reruns += 1;
                shared.reruns.fetch_add(1, Relaxed);
                size = if reruns <= RERUNS { size - 1 } else { place };
                if size == 0 {
                    size = jobs.len();
                }
            }
            Ok(Attempt::Spoiled(error)) => {
                // Rolled back, and whose doing it was is not known: all of it is refused, the store goes on.
                for job in jobs.drain(..size) {
                    job.answer(Err(error.clone()));
                }
                size = jobs.len();
            }
            Err(error) => break Err(error),
        }
    };
    match result {
        Ok(()) => {
            shared.failures.fetch_add(u64::try_from(failed.len()).unwrap_or(u64::MAX), Relaxed);
            for job in failed {
                job.answer(Ok(()));
            }
            Ok(())
        }
        Err(error) => {
            jobs.append(&mut failed);
            Err(error)
        }
    }
}

enum Attempt {
    /// With the tables that were written to.
    Committed(Vec<&'static str>),
    /// The job at this place failed and everything was rolled back.
    FailedAt(usize),
    /// The transaction could not be committed for a reason other than the disk, and was rolled back.
    Spoiled(StoreError),
}

/// Runs the first `size` jobs in one transaction. It commits with redb's default `Durability::Immediate`: the data is
/// on disk when `commit` returns.
fn attempt(database: &Database, jobs: &mut Jobs, size: usize) -> Result<Attempt, StoreError> {
    let raw = database.begin_write()?;
    let txn = WriteTransaction::over(&raw);
    let failed = jobs.iter_mut().take(size).position(|job| !job.run(&txn));
    let settled = if failed.is_none() { txn.settle().and_then(|()| txn.changed()) } else { Ok(Vec::new()) };
    // Closes the tables, which writes down where their pages are; redb refuses to commit while one is open.
    drop(txn);
    if let Some(place) = failed {
        raw.abort()?;
        return Ok(Attempt::FailedAt(place));
    }
    let changed = match settled {
        Ok(changed) => changed,
        Err(error) => {
            raw.abort()?;
            return match error {
                StoreError::DiskFull { .. } | StoreError::Failed { .. } => Err(error),
                _ => Ok(Attempt::Spoiled(error)),
            };
        }
    };
    match raw.commit() {
        Ok(()) => Ok(Attempt::Committed(changed)),
        Err(redb::CommitError::TransactionPoisoned) => {
            Ok(Attempt::Spoiled(StoreError::Misuse("a closure hid a failure of the database".to_owned())))
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn job() -> Box<dyn Job> {
        Write::<_, (), StoreError>::new(|_: &WriteTransaction<'_>| Ok(())).0
    }

    #[test]
    fn who_writes_alone_waits_for_nobody_and_a_batch_takes_what_comes_up_to_its_bound() {
        let (sender, mut queue) = mpsc::channel(QUEUE);
        (0..300).for_each(|_| sender.try_send(job()).ok().unwrap());
        let mut alone = vec![job()];
        gather(&mut queue, &mut alone);
        assert_eq!((alone.len(), queue.len()), (1, 300));
        let mut several = vec![job(), job()];
        gather(&mut queue, &mut several);
        assert_eq!((several.len(), queue.len()), (BATCH, 300 + 2 - BATCH));
        let mut rest = vec![job(), job()];
        gather(&mut queue, &mut rest);
        assert_eq!((rest.len(), queue.len()), (2 + 300 + 2 - BATCH, 0));
    }
}
