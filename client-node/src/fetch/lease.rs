//! A lease is renewed while the transfer that needs it goes on: from half of its life on, again and again until there is
//! a longer one. New streams begin with the newest; those that run go on.

use std::convert::Infallible;
use std::time::Duration;

use protocol::deliver::Credential;
use tokio::sync::watch;

use super::run::Run;
use super::ticket::{self, Checked};
use super::{FetchProgress, LeaseView};
use crate::home::now_ms;

/// The clock is looked at so often while there is nothing to do: it may be set, and machines sleep.
const LOOK_MS: u64 = 60_000;
/// Tries are a sixteenth of the lease's life apart, within these bounds.
const RETRY_MS: std::ops::RangeInclusive<u64> = 250..=600_000;

impl Run<'_> {
    /// Keeps `checked` and `credential` at the newest lease, for as long as it is polled.
    pub(super) async fn keep_lease(&self, checked: &mut Checked, credential: &watch::Sender<Credential>) -> Infallible {
        let mut next = ticket::half_life(&checked.lease);
        let mut problem = None;
        loop {
            let (now, lease) = (now_ms(), &checked.lease);
            let view = LeaseView { until: lease.end, next_try: next, problem: problem.clone() };
            self.progress.send_if_modified(|p: &mut FetchProgress| {
                let changed = p.lease.as_ref() != Some(&view);
                p.lease = Some(view);
                changed
            });
            if now < next {
                tokio::time::sleep(Duration::from_millis((next - now).min(LOOK_MS))).await;
                continue;
            }
            let retry = (lease.end.saturating_sub(lease.start) / 16).clamp(*RETRY_MS.start(), *RETRY_MS.end());
            let (end, delivery) = (lease.end, lease.delivery);
            match ticket::renew(self.home, self.link, checked).await {
                Ok(renewed) if renewed.lease.delivery == delivery && renewed.lease.end > end => {
                    credential.send_replace(renewed.credential());
                    next = ticket::half_life(&renewed.lease).max(now_ms().saturating_add(retry));
                    problem = None;
                    *checked = renewed;
                    continue;
                }
                // What was bought on completion has one lease; and a closed delivery has a further one.
                Ok(_) => problem = Some("the manager gives no longer one".to_owned()),
                Err(error) => problem = Some(error),
            }
            tracing::info!(transaction = %self.transaction, problem, "lease not renewed yet");
            next = now_ms().saturating_add(retry);
        }
    }
}
