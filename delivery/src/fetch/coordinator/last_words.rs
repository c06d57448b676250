//! How a fetch ends: what is stored is made durable first, then the seeders get what is owed to them, for a bounded time.

use std::sync::Arc;
use std::time::Duration;

use protocol::Signed;
use protocol::receipt::Completion;

use super::super::session::Ending;
use super::super::{FetchError, FetchReport, StallCause};
use super::{Coordinator, joined};
use crate::clock::now_ms;
use crate::content_store::{FinishError, SyncError, WriteError};

impl Coordinator {
    /// Everything asked for is here.
    pub(super) async fn complete(&mut self) -> Result<FetchReport, FetchError> {
        let Some(content) = self.content.clone() else {
            return Err(FetchError::NoSource {
                cause: StallCause::NoSeederLeft,
                waited: Duration::ZERO,
                sources: self.book.reports(),
            });
        };
        let whole = content.has_all();
        let stored = Arc::clone(&content);
        let finished = tokio::task::spawn_blocking(move || match whole {
            true => stored.finish(),
            false => stored.sync().map_err(Into::into),
        });
        if let Err(error) = joined(finished.await)? {
            self.wind_up(None).await;
            return Err(match error {
                FinishError::Sync(SyncError::Removed) => FetchError::Removed,
                FinishError::Sync(SyncError::File(error)) => self.disk_failed(WriteError::Io(error)),
                other => FetchError::Finish(other),
            });
        }
        let completion = whole.then(|| {
            let terms = &self.shared.terms;
            let (network, delivery, manifest) = (terms.network, terms.delivery, terms.manifest);
            Signed::sign(&Completion { network, delivery, manifest, at: now_ms() }, &self.job.keypair)
        });
        self.wind_up(completion.clone()).await;
        Ok(FetchReport {
            bytes: self.new_bytes,
            chunks: self.new_chunks,
            duplicate_bytes: self.duplicate_bytes,
            duration: self.started.elapsed(),
            sources: self.book.reports(),
            completion,
        })
    }

    /// Lets every session say its last word, for a bounded time.
    pub(super) async fn wind_up(&mut self, completion: Option<Signed<Completion>>) {
        self.ending.send_replace(Ending::Finish(completion));
        let limit = self.job.limits.finish_timeout;
        let last_words = async {
            loop {
                tokio::select! {
                    Some(report) = self.reports.recv() => self.on_report(report),
                    ended = self.sessions.join_next() => match ended {
                        Some(Ok((id, reason))) => {
                            while let Ok(report) = self.reports.try_recv() {
                                self.on_report(report);
                            }
                            self.handles.remove(&id.peer);
                            self.book.ended(&id.peer, &reason);
                        }
                        Some(Err(error)) => tracing::error!(%error, "a session failed"),
                        None => return,
                    },
                }
            }
        };
        if tokio::time::timeout(limit, last_words).await.is_err() {
            tracing::debug!(left = self.sessions.len(), "seeders that did not take the last word in time");
            self.sessions.shutdown().await;
        }
        self.handles.clear();
    }
}
