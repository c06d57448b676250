//! Every background task of a node has an owner, a name and an end, and this is the owner: without it a task that
//! dies is noticed by nobody and a task that hangs makes shutdown hang with no hint of who is to blame.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Display;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

/// Owner of a node's background tasks. Clones share the same tasks and the same stop signal.
#[derive(Clone, Debug)]
pub struct Supervisor {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    token: CancellationToken,
    tasks: Mutex<Tasks>,
    count: watch::Sender<usize>,
    failure: watch::Sender<Option<String>>,
}

#[derive(Debug, Default)]
struct Tasks {
    next: u64,
    running: HashMap<u64, (Cow<'static, str>, Option<AbortHandle>)>,
}

/// Why a shutdown was not clean.
#[derive(Debug, thiserror::Error)]
pub enum ShutdownError {
    /// These tasks were still running at the deadline; they have been aborted.
    #[error("these tasks did not stop within {deadline:?} and were aborted: {}", tasks.join(", "))]
    StillRunning {
        /// Names of the tasks, sorted.
        tasks: Vec<String>,
        /// The time they had.
        deadline: Duration,
    },
}

/// A database that is still read after all tasks have ended is waited for no longer than this.
const LETS_GO: Duration = Duration::from_secs(5);

impl Default for Supervisor {
    fn default() -> Self {
        Self::new()
    }
}

impl Supervisor {
    /// A supervisor with no tasks.
    pub fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                token: CancellationToken::new(),
                tasks: Mutex::new(Tasks::default()),
                count: watch::Sender::new(0),
                failure: watch::Sender::new(None),
            }),
        }
    }

    /// Starts a task that may end whenever it likes. A panic in it is logged and ends only that task.
    pub fn spawn<F>(&self, name: impl Into<Cow<'static, str>>, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.launch(name.into(), |name| async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                tracing::error!(task = %name, "task panicked");
            }
        });
    }

    /// Starts a task that must run until the stop signal. If it ends earlier, fails or panics, the whole node stops
    /// and [`Supervisor::failed`] says why.
    pub fn spawn_critical<F, E>(&self, name: impl Into<Cow<'static, str>>, task: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Display,
    {
        let inner = Arc::clone(&self.inner);
        self.launch(name.into(), |name| async move {
            let ended = AssertUnwindSafe(task).catch_unwind().await;
            let reason = match ended {
                Ok(Ok(())) if inner.token.is_cancelled() => return,
                Ok(Ok(())) => format!("task {name} ended although the node was to go on"),
                Ok(Err(error)) => format!("task {name} failed: {error}"),
                Err(_) => format!("task {name} panicked"),
            };
            inner.fail(reason);
        });
    }

    fn launch<F>(&self, name: Cow<'static, str>, make: impl FnOnce(Cow<'static, str>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let id = {
            let mut tasks = self.inner.tasks();
            tasks.next += 1;
            let id = tasks.next;
            tasks.running.insert(id, (name.clone(), None));
            id
        };
        self.inner.count.send_modify(|n| *n += 1);
        let ended = Ended { inner: Arc::clone(&self.inner), id };
        let task = make(name);
        let abort = tokio::spawn(async move {
            let _ended = ended;
            task.await;
        })
        .abort_handle();
        if let Some(entry) = self.inner.tasks().running.get_mut(&id) {
            entry.1 = Some(abort);
        }
    }

    /// The stop signal: every task waits for it beside its own work.
    pub fn token(&self) -> CancellationToken {
        self.inner.token.clone()
    }

    /// Asks all tasks to stop. Returns at once.
    pub fn stop(&self) {
        self.inner.token.cancel();
    }

    /// Stops the node because of `reason`. The first reason is kept.
    pub fn fail(&self, reason: impl Into<String>) {
        self.inner.fail(reason.into());
    }

    /// Waits until a critical task has brought the node down and gives the reason; waits for ever in a healthy node.
    pub async fn failed(&self) -> String {
        let mut failure = self.inner.failure.subscribe();
        loop {
            if let Some(reason) = failure.borrow_and_update().clone() {
                return reason;
            }
            if failure.changed().await.is_err() {
                return futures::future::pending().await;
            }
        }
    }

    /// The reason for which the node came down, if it did.
    pub fn failure(&self) -> Option<String> {
        self.inner.failure.borrow().clone()
    }

    /// Number of running tasks of this name.
    pub fn running(&self, name: &str) -> usize {
        self.inner.tasks().running.values().filter(|(n, _)| n == name).count()
    }

    /// Names of all running tasks, sorted.
    pub fn tasks(&self) -> Vec<String> {
        let mut names: Vec<String> = self.inner.tasks().running.values().map(|(n, _)| n.to_string()).collect();
        names.sort();
        names
    }

    /// Waits until all tasks that still run bear this name: the network outlasts those who use it.
    pub(crate) async fn only(&self, name: &str) {
        let mut count = self.inner.count.subscribe();
        // Fails only when the supervisor is gone, and with it every task.
        let _ = count.wait_for(|_| self.inner.tasks().running.values().all(|(n, _)| n == name)).await;
    }

    /// Asks all tasks to stop and waits for them, at most `deadline`. Tasks that are still running then are named in
    /// the error and aborted.
    ///
    /// # Errors
    /// [`ShutdownError::StillRunning`] names the tasks that did not stop.
    pub async fn shutdown(&self, deadline: Duration) -> Result<(), ShutdownError> {
        if deadline.is_zero() {
            // Where nobody is given time, nobody is told either: what a task says on its way out takes some.
            self.abort();
        }
        self.stop();
        let mut count = self.inner.count.subscribe();
        let all_ended = count.wait_for(|n| *n == 0);
        if tokio::time::timeout(deadline, all_ended).await.is_ok() {
            return Ok(());
        }
        let tasks = self.tasks();
        self.abort();
        if tasks.is_empty() {
            return Ok(());
        }
        Err(ShutdownError::StillRunning { tasks, deadline })
    }

    /// Like [`shutdown`](Self::shutdown); then drops `node`, whose database `closed` waits for, and waits for that as
    /// well, five seconds at most: its folder is free when this returns, but for long work on a blocking thread, which
    /// outlives the task that wanted it and ends with the process.
    ///
    /// # Errors
    /// As of [`shutdown`](Self::shutdown). Without a deadline the database is not waited for.
    pub async fn shutdown_and_close<T: Send + 'static>(
        &self,
        node: T,
        closed: impl Future<Output = ()>,
        deadline: Duration,
    ) -> Result<(), ShutdownError> {
        let ended = self.shutdown(deadline).await;
        // The last handle closes the file, which waits for the disk.
        let dropped = tokio::task::spawn_blocking(move || drop(node));
        let closing = async {
            if let Err(error) = dropped.await {
                tracing::warn!(%error, "closing the database failed");
            }
            closed.await;
        };
        if tokio::time::timeout(LETS_GO.min(deadline), closing).await.is_err() && !deadline.is_zero() {
            tracing::warn!("the database is still in use by work that was begun: it is closed when that ends");
        }
        ended
    }

    fn abort(&self) {
        let aborts: Vec<_> = self.inner.tasks().running.values().filter_map(|(_, abort)| abort.clone()).collect();
        for abort in aborts {
            abort.abort();
        }
    }
}

impl Inner {
    // A poisoned lock means that a thread panicked between two plain map operations: the map itself is sound.
    fn tasks(&self) -> MutexGuard<'_, Tasks> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, reason: String) {
        tracing::error!(%reason, "node is stopping");
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                *failure = Some(reason);
            }
            first
        });
        self.token.cancel();
    }
}

/// Removes the task from the list however it ended: by itself, by a panic or by being aborted.
struct Ended {
    inner: Arc<Inner>,
    id: u64,
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.inner.tasks().running.remove(&self.id);
        self.inner.count.send_modify(|n| *n = n.saturating_sub(1));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_hanging_task_is_named_and_aborted() {
        let supervisor = Supervisor::new();
        supervisor.spawn("hangs", futures::future::pending());
        let token = supervisor.token();
        supervisor.spawn("obeys", async move { token.cancelled().await });
        assert_eq!(supervisor.running("hangs"), 1);
        let ended = supervisor.shutdown(Duration::from_millis(50)).await;
        assert!(matches!(&ended, Err(ShutdownError::StillRunning { tasks, .. }) if tasks == &["hangs"]), "{ended:?}");
        let mut count = supervisor.inner.count.subscribe();
        tokio::time::timeout(Duration::from_secs(5), count.wait_for(|n| *n == 0)).await.unwrap().unwrap();
        assert_eq!(supervisor.running("hangs"), 0);
    }

    #[tokio::test]
    async fn a_critical_task_that_ends_stops_the_node() {
        for (task, expected) in [
            (async { Ok(()) }.boxed(), "task chore ended although the node was to go on"),
            (async { Err("disk full") }.boxed(), "task chore failed: disk full"),
            (async { panic!("on purpose") }.boxed(), "task chore panicked"),
        ] {
            let supervisor = Supervisor::new();
            supervisor.spawn_critical("chore", task);
            let reason = tokio::time::timeout(Duration::from_secs(5), supervisor.failed()).await.unwrap();
            assert_eq!(reason, expected);
            assert!(supervisor.token().is_cancelled());
            supervisor.shutdown(Duration::from_secs(5)).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_panic_in_an_ordinary_task_ends_only_that_task() {
        let supervisor = Supervisor::new();
        supervisor.spawn("careless", async { panic!("on purpose") });
        let mut count = supervisor.inner.count.subscribe();
        tokio::time::timeout(Duration::from_secs(5), count.wait_for(|n| *n == 0)).await.unwrap().unwrap();
        assert!(!supervisor.token().is_cancelled());
        assert_eq!(supervisor.failure(), None);
    }
}
