//! Whether a fetch is over, and in which way.

use std::time::Duration;

use super::super::FetchError;
use super::super::incoming::millis;
use super::super::progress::StallCause;
use super::Coordinator;

/// What several seeders say of the credential is believed when all others were asked, too, or so long after, milliseconds:
/// who has not answered by then may be away.
const OTHERS_MS: u64 = 3_000;

impl Coordinator {
    /// Over? In which way?
    pub(super) fn verdict(&mut self, now: u64) -> Option<Result<(), FetchError>> {
        if let Some(error) = self.fatal.take() {
            return Some(Err(error));
        }
        if self.content.is_some() && self.scheduler.is_complete() {
            return Some(Ok(()));
        }
        if let Some(refused) = self.refused(now) {
            return Some(Err(refused));
        }
        let nobody = self.handles.is_empty() && self.creating.is_none() && self.searched && self.book.all_closed();
        let waited = now.saturating_sub(self.last_sign(now));
        if nobody || waited >= millis(self.job.limits.patience) {
            let cause = self.cause().unwrap_or(StallCause::Silent);
            let sources = self.book.reports();
            return Some(Err(FetchError::NoSource { cause, waited: Duration::from_millis(waited), sources }));
        }
        None
    }

    /// Nobody serves, and several say that it is for the credential.
    fn refused(&mut self, now: u64) -> Option<FetchError> {
        let served = self.handles.values().any(|handle| handle.welcome.is_some());
        let refused = if served { None } else { self.book.credential_refused() };
        let Some((refusal, by)) = refused else {
            self.refused_since = None;
            return None;
        };
        let since = *self.refused_since.get_or_insert(now);
        if !self.book.all_ended() && now.saturating_sub(since) < OTHERS_MS {
            return None;
        }
        let refusal = self.told_of_clocks(refusal);
        Some(FetchError::Refused { refusal, by, sources: self.book.reports() })
    }
}
