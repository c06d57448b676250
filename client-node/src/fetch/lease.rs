//! A lease is renewed while the transfer that needs it goes on: from half of its life on, again and again until there is
//! a longer one. New streams begin with the newest; those that run go on.

use std::convert::Infallible;
use std::time::Duration;

use delivery::{AckStore, Progress, StallCause};
use protocol::RefusalCode;
use protocol::deliver::Credential;
use protocol::ticket::Lease;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::acks::AckFiles;
use super::run::{Run, millis};
use super::ticket::{self, Checked, NotOpened};
use super::{FetchProgress, LeaseView, Waiting};
use crate::home::now_ms;

/// A try that is under way ends at about this time: a call to the manager has as long.
const TRY_MS: u64 = 10_000;
/// The clock is looked at so often while there is nothing to do: it may be set, and machines sleep.
const LOOK_MS: u64 = 60_000;
/// Tries are a sixteenth of the lease's life apart, within these bounds.
const RETRY_MS: std::ops::RangeInclusive<u64> = 250..=600_000;

/// What is said of a lease that the manager gives as it was.
pub(super) const NO_LONGER: &str = "the manager gives no longer one; what has begun by its end may go on for a while";

/// A transfer that brought nothing for this long since a seeder's window was used up is not waited for any longer …
const STUCK: Duration = Duration::from_secs(5);
/// … and the manager that has nothing better is asked again after this.
const REPLACE_AGAIN: Duration = Duration::from_secs(30);

/// Where the network gave up the key that signed the lease: the first pause between tries, and the longest.
const GONE_RETRY_MS: (u64, u64) = (500, 30_000);

impl Run<'_> {
    /// Keeps `checked` and `credential` at the newest lease, for as long as it is polled.
    /// Cancels `transfer` where no other lease can help; and, if it `may_replace` it, where a further delivery does, which
    /// is then in `checked`.
    pub(super) async fn keep_lease(
        &self,
        checked: &mut Checked,
        credential: &watch::Sender<Credential>,
        transfer: &CancellationToken,
        may_replace: bool,
    ) -> Infallible {
        let mut next = ticket::half_life(&checked.lease);
        let mut problem = None;
        let (mut gone_next, mut gone_wait) = (0, GONE_RETRY_MS.0);
        let mut progress = self.progress.subscribe();
        let mut stuck = Stuck::new();
        loop {
            let (now, lease) = (now_ms(), &checked.lease);
            self.tell_lease(lease, next, problem.clone());
            let gone = key_is_gone(&progress.borrow_and_update()) && now >= gone_next;
            let replaced_at = stuck.look(&progress.borrow().transfer).filter(|_| may_replace);
            if replaced_at.is_none() {
                self.tell_not_opened(None);
                stuck.goes_on(&mut checked.not_opened);
            }
            if replaced_at.is_some_and(|at| at <= Instant::now()) {
                // Chunks that were lost on the line buy their room back; a paid delivery is not given up for them.
                if !self.lost_what_it_acknowledged(checked).await {
                    stuck.asked();
                    continue;
                }
                match ticket::replace(self.home, self.link, checked).await {
                    Ok(further) if further.lease.delivery > lease.delivery => {
                        tracing::info!(transaction = %self.transaction, delivery = further.lease.delivery,
                            "no seeder sends again what was lost: it goes on in a further delivery");
                        *checked = further;
                        transfer.cancel();
                        return std::future::pending().await;
                    }
                    Ok(_) => tracing::info!(transaction = %self.transaction, "the manager opens no further delivery"),
                    Err(error) => {
                        tracing::info!(transaction = %self.transaction, %error, "no further delivery was opened");
                        let why = NotOpened::by(&error);
                        self.tell_not_opened(Some(&why));
                        stuck.not_opened(why, &mut checked.not_opened);
                    }
                }
                stuck.asked();
                continue;
            }
            if now < next && !gone {
                let replace = async {
                    match replaced_at {
                        Some(at) => tokio::time::sleep_until(at).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_millis((next - now).min(LOOK_MS))) => {}
                    () = replace => {}
                    _ = progress.changed() => {}
                }
                continue;
            }
            if gone {
                (gone_next, gone_wait) = (now.saturating_add(gone_wait), (gone_wait * 2).min(GONE_RETRY_MS.1));
                if let Err(error) = self.link.refresh().await {
                    tracing::debug!(%error, "key set not refreshed");
                }
                if self.content_void(checked).is_some() {
                    transfer.cancel();
                    return std::future::pending().await;
                }
            }
            let retry = (lease.end.saturating_sub(lease.start) / 16).clamp(*RETRY_MS.start(), *RETRY_MS.end());
            let Lease { end, delivery, issued_at, .. } = *lease;
            let is_newer = |lease: &Lease| lease.end > end || gone && lease.issued_at > issued_at;
            self.tell_lease(lease, now_ms().saturating_add(TRY_MS), problem.clone());
            let before = problem.clone();
            match ticket::renew(self.home, self.link, checked).await {
                Ok(renewed) if renewed.lease.delivery == delivery && is_newer(&renewed.lease) => {
                    credential.send_replace(renewed.credential());
                    next = ticket::half_life(&renewed.lease).max(now_ms().saturating_add(retry));
                    problem = None;
                    *checked = renewed;
                    stuck.before = None;
                    continue;
                }
                // What was bought on completion has one lease; and a closed delivery has a further one.
                Ok(_) if gone => {}
                Ok(_) => problem = Some(NO_LONGER.to_owned()),
                Err(error) => problem = Some(error),
            }
            // It is tried again and again, which says nothing new.
            if problem != before {
                tracing::info!(transaction = %self.transaction, until = lease.end, problem, "lease not renewed, and asked for again");
            }
            if now >= next {
                next = now_ms().saturating_add(retry);
            }
        }
    }

    /// Is something of what was acknowledged in this delivery not here any more? Seeders do not send it again.
    async fn lost_what_it_acknowledged(&self, checked: &Checked) -> bool {
        let (acks, content) = (AckFiles::of(self.home, self.delivery_id(checked)), self.store.get(&checked.manifest));
        let looked = tokio::task::spawn_blocking(move || {
            let have = content.map(|content| content.have()).unwrap_or_default();
            let mut acks = acks.all().into_iter().filter_map(|ack| ack.peek().ok());
            acks.any(|ack| !have.is_superset(&ack.chunks))
        });
        looked.await.unwrap_or(false)
    }

    /// Seeders wait for what only the manager can give.
    pub(super) fn tell_not_opened(&self, why: Option<&NotOpened>) {
        let next_try = now_ms().saturating_add(millis(REPLACE_AGAIN));
        let waiting = why.map(|why| Waiting { cause: why.stall.clone(), detail: why.why.clone(), next_try });
        self.progress.send_if_modified(|p: &mut FetchProgress| {
            let changed = p.waiting != waiting;
            p.waiting = waiting;
            changed
        });
    }

    fn tell_lease(&self, lease: &Lease, next_try: u64, problem: Option<String>) {
        let view = LeaseView { until: lease.end, next_try, problem };
        self.progress.send_if_modified(|p: &mut FetchProgress| {
            let changed = p.lease.as_ref() != Some(&view);
            p.lease = Some(view);
            changed
        });
    }
}

/// Whether nothing comes any more because the windows are used up: of a client that lost what it had acknowledged,
/// seeders wait for acknowledgements that it cannot give again.
struct Stuck {
    bytes: u64,
    /// Since when that is so.
    since: Option<Instant>,
    not_before: Instant,
    /// What was known of a further delivery before one was asked for in vain here, once it was.
    before: Option<Option<NotOpened>>,
}

impl Stuck {
    fn new() -> Stuck {
        Stuck { bytes: 0, since: None, not_before: Instant::now(), before: None }
    }

    /// When another delivery is to be asked for; `None` while it moves, or stands still for other reasons.
    fn look(&mut self, transfer: &Progress) -> Option<Instant> {
        if transfer.new_bytes != self.bytes {
            (self.bytes, self.since) = (transfer.new_bytes, None);
        }
        // In between it may be told that a seeder is tried again, and says nothing yet.
        if transfer.stalled.as_ref().is_some_and(|stall| stall.cause == StallCause::WindowUsedUp) {
            self.since.get_or_insert_with(Instant::now);
        }
        self.since.map(|since| self.not_before.max(since + STUCK))
    }

    fn asked(&mut self) {
        self.not_before = Instant::now() + REPLACE_AGAIN;
    }

    fn not_opened(&mut self, why: NotOpened, known: &mut Option<NotOpened>) {
        let before = known.replace(why);
        self.before.get_or_insert(before);
    }

    /// It came without a further delivery: whatever happens later, that there was none is not the cause.
    fn goes_on(&mut self, known: &mut Option<NotOpened>) {
        if let Some(before) = self.before.take() {
            *known = before;
        }
    }
}

/// A seeder said that the key that signed the lease, or the manifest, is void; others may not have heard of it yet.
fn key_is_gone(progress: &FetchProgress) -> bool {
    progress.transfer.sources.iter().any(|source| source.refusal == Some(RefusalCode::KeyRetired))
}

#[cfg(test)]
mod tests {
    use delivery::Stall;

    use super::*;

    #[test]
    fn that_there_was_no_further_delivery_is_no_cause_once_it_goes_on_without_one() {
        let why = |why: &str| NotOpened { why: why.to_owned(), cause: "manager-away", stall: StallCause::ManagerAway };
        let said = |known: &Option<NotOpened>| known.as_ref().map(|known| known.why.clone());
        let used_up = |new_bytes| Progress {
            new_bytes,
            stalled: Some(Stall { cause: StallCause::WindowUsedUp, next_try: None }),
            ..Progress::default()
        };
        for first in [None, Some(why("it was complete"))] {
            let (mut stuck, mut known) = (Stuck::new(), first.clone());
            assert!(stuck.look(&Progress::default()).is_none());
            stuck.goes_on(&mut known);
            for _ in 0..2 {
                assert!(stuck.look(&used_up(100)).is_some());
                stuck.not_opened(why("no manager answers"), &mut known);
            }
            assert_eq!(said(&known).as_deref(), Some("no manager answers"));
            assert!(stuck.look(&Progress { new_bytes: 200, ..Progress::default() }).is_none());
            stuck.goes_on(&mut known);
            assert_eq!(said(&known), said(&first));
        }
    }
}
