//! How a fetch ends: what is stored is made durable first, which the caller hears of; then the seeders get what is owed
//! to them, for a bounded time. A seeder that broke off after it had served is connected to once more for it: the acknowledgement is its pay.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use protocol::receipt::Completion;
use protocol::{PeerAddrs, PeerId, Signed};
use tokio::time::Instant;

use super::super::progress::Phase;
use super::super::session::Ending;
use super::super::{FetchError, FetchReport, StallCause};
use super::{Coordinator, joined};
use crate::clock::{now_ms, running_ms};
use crate::content_store::{FinishError, SyncError, WriteError};

/// So often a seeder that is owed an acknowledgement is connected to at the end …
const TRIES: u32 = 3;
/// … first at once, then after this time, then after twice that: a restart takes about as long.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// When a seeder that is owed an acknowledgement is connected to next.
struct Try {
    made: u32,
    next: Instant,
}

impl Coordinator {
    /// Everything asked for is here: makes it durable.
    pub(super) async fn complete(&mut self) -> Result<FetchReport, FetchError> {
        let Some(content) = self.content.clone() else {
            return Err(FetchError::NoSource {
                cause: StallCause::NoSeederLeft,
                waited: Duration::ZERO,
                sources: self.book.reports(),
            });
        };
        self.all_remembered().await;
        let stored = Arc::clone(&content);
        let finished = tokio::task::spawn_blocking(move || {
            let finished = if stored.has_all() { stored.finish() } else { Err(FinishError::Missing(0)) };
            match finished {
                // Only a part was asked for, or some of what was here before turned out damaged and was forgotten.
                Err(FinishError::Missing(_)) => stored.sync().map(|()| false).map_err(FinishError::from),
                finished => finished.map(|()| true),
            }
        });
        let whole = match joined(finished.await)? {
            Ok(whole) => whole,
            Err(error) => {
                self.wind_up(None).await;
                return Err(match error {
                    FinishError::Sync(SyncError::Removed) => FetchError::Removed,
                    FinishError::Sync(SyncError::File(error)) => self.disk_failed(WriteError::Io(error)),
                    other => FetchError::Finish(other),
                });
            }
        };
        let completion = whole.then(|| {
            let terms = &self.shared.terms;
            let (network, delivery, manifest) = (terms.network, terms.delivery, terms.manifest);
            Signed::sign(&Completion { network, delivery, manifest, at: now_ms() }, &self.job.keypair)
        });
        let duration = self.started.elapsed();
        self.find_owed().await;
        Ok(FetchReport {
            bytes: self.new_bytes,
            chunks: self.new_chunks,
            duplicate_bytes: self.duplicate_bytes,
            adopted_bytes: self.adopted_bytes,
            duration,
            sources: self.book.reports(),
            completion,
            owed: self.still_owed(),
        })
    }

    /// Gives every seeder that served its last acknowledgement, those to which there is no stream any more included.
    pub(in super::super) async fn settle(&mut self, report: FetchReport) -> FetchReport {
        let first = Instant::now();
        let tries = self.book.owed().into_iter().map(|peer| (peer, Try { made: 0, next: first })).collect();
        self.last_words(report.completion.clone(), tries).await;
        let owed = self.still_owed();
        for seeder in &owed {
            tracing::info!(seeder = %seeder.peer, "the seeder did not confirm the last acknowledgement");
        }
        self.tell(Phase::Done, true);
        // A chunk that was asked for twice may come for the second time when everything is here.
        FetchReport { duplicate_bytes: self.duplicate_bytes, sources: self.book.reports(), owed, ..report }
    }

    /// Waits until every stream has on paper what it acknowledged, for a bounded time.
    async fn all_remembered(&mut self) {
        let limit = self.job.limits.finish_timeout;
        let all = async {
            // The answers to what was asked before do not speak of the chunks that came since.
            self.answered().await;
            while !self.remember() {
                // A stream that has as many commands as it can hold is about to answer some.
                self.hear().await;
            }
            self.answered().await;
        };
        if tokio::time::timeout(limit, all).await.is_err() {
            tracing::debug!("seeders that could not be acknowledged in time");
        }
        self.remembering = None;
    }

    async fn answered(&mut self) {
        while self.remembering.as_ref().is_some_and(|(streams, _)| !streams.is_empty()) {
            self.hear().await;
        }
    }

    /// Takes in what comes next from the sessions.
    async fn hear(&mut self) {
        tokio::select! {
            Some(report) = self.reports.recv() => self.on_report(report),
            Some(ended) = self.sessions.join_next() => {
                self.on_waiting_reports();
                self.on_ended(ended);
            }
        }
    }

    /// Lets every session say its last word, for a bounded time.
    pub(super) async fn wind_up(&mut self, completion: Option<Signed<Completion>>) {
        self.last_words(completion, BTreeMap::new()).await;
    }

    /// Also those are owed something that an earlier run was killed before it could tell them.
    async fn find_owed(&mut self) {
        let (acks, peers) = (Arc::clone(&self.job.acks), self.book.unsettled());
        let remembered = tokio::task::spawn_blocking(move || {
            peers.into_iter().filter(|peer| acks.load(peer).is_some()).collect::<Vec<_>>()
        });
        for peer in remembered.await.unwrap_or_default() {
            self.book.owe(&peer);
        }
    }

    fn still_owed(&self) -> Vec<PeerAddrs> {
        self.book.owed().iter().map(|peer| self.book.target(peer)).collect()
    }

    async fn last_words(&mut self, completion: Option<Signed<Completion>>, mut tries: BTreeMap<PeerId, Try>) {
        self.ending.send_replace(Ending::Finish(completion));
        let limit = self.job.limits.finish_timeout;
        let last_words = async {
            loop {
                let next = self.reach_out(&mut tries);
                if next.is_none() && self.sessions.is_empty() {
                    return;
                }
                tokio::select! {
                    Some(report) = self.reports.recv() => self.on_report(report),
                    Some(ended) = self.sessions.join_next() => match ended {
                        Ok((id, reason)) => {
                            while let Ok(report) = self.reports.try_recv() {
                                self.on_report(report);
                            }
                            self.handles.remove(&id.peer);
                            self.book.ended(&id.peer, &reason);
                            if tries.contains_key(&id.peer) && reason.takes_no_more() {
                                self.book.forgive(&id.peer);
                            }
                        }
                        Err(error) => tracing::error!(%error, "a session failed"),
                    },
                    () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
                }
            }
        };
        if tokio::time::timeout(limit, last_words).await.is_err() {
            tracing::debug!(left = self.sessions.len(), "seeders that did not take the last word in time");
            self.sessions.shutdown().await;
        }
        self.on_waiting_reports();
        self.handles.clear();
    }

    /// Connects to seeders that are owed an acknowledgement and have no stream; says when the next is due.
    fn reach_out(&mut self, tries: &mut BTreeMap<PeerId, Try>) -> Option<Instant> {
        let owed = self.book.owed();
        tries.retain(|peer, _| owed.contains(peer));
        let now = Instant::now();
        let mut next = None;
        for (peer, attempt) in tries {
            if attempt.made >= TRIES || self.handles.contains_key(peer) {
                continue;
            }
            if attempt.next <= now {
                attempt.next = now + FIRST_PAUSE.saturating_mul(1 << attempt.made.min(TRIES));
                attempt.made += 1;
                self.open_session(*peer, true, running_ms());
            } else {
                next = Some(next.map_or(attempt.next, |sooner: Instant| sooner.min(attempt.next)));
            }
        }
        next
    }
}
