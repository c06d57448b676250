//! The content key: in the ticket, or from the manager against the client's word that everything is here.

use std::time::{Duration, Instant};

use delivery::StallCause;
use protocol::api::{MailboxRequest, MailboxResponse};
use protocol::cipher::ContentSecret;
use protocol::receipt::Completion;
use protocol::ticket::KeyGrant;
use protocol::{Keypair, Signed};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{FetchError, FetchProgress, Waiting};
use crate::home::now_ms;
use crate::library::Delivery;
use crate::link::{Link, ManagerError};

/// First wait for a manager that does not answer, and the longest.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// The content secret from what the library holds.
pub(crate) fn open_grant(keypair: &Keypair, delivery: &Delivery) -> Option<ContentSecret> {
    let ticket = &delivery.envelope.ticket;
    let (data, lease) = (ticket.data.peek().ok()?, ticket.lease.peek().ok()?);
    let grants = [delivery.grant.as_ref(), delivery.envelope.grant.as_ref()];
    grants.into_iter().flatten().find_map(|grant| grant.open(keypair, &data, &lease).ok())
}

/// Tells the manager that everything is here, once.
pub(super) async fn complete(link: &Link, completion: &Signed<Completion>) -> Result<Option<KeyGrant>, ManagerError> {
    match link.mailbox(&MailboxRequest::Complete { completion: completion.clone() }).await? {
        MailboxResponse::Completed { grant } => Ok(grant),
        _ => Err(ManagerError::Unfitting("a completion")),
    }
}

/// Tells the manager, again and again until it answers.
pub(super) async fn complete_for_key(
    link: &Link,
    completion: &Signed<Completion>,
    patience: Duration,
    progress: &watch::Sender<FetchProgress>,
    cancel: &CancellationToken,
) -> Result<Option<KeyGrant>, FetchError> {
    let deadline = Instant::now() + patience;
    let mut wait = WAIT.0;
    loop {
        let asked = tokio::select! {
            asked = complete(link, completion) => asked,
            () = cancel.cancelled() => return Err(FetchError::Cancelled),
        };
        let error = match asked {
            Ok(grant) => {
                progress.send_modify(|p| p.waiting = None);
                return Ok(grant);
            }
            Err(error) => error,
        };
        let pause = match &error {
            ManagerError::Refused(refusal) if refusal.retry_after_ms == 0 => return Err(FetchError::Key(error)),
            ManagerError::Refused(refusal) => Duration::from_millis(refusal.retry_after_ms).min(WAIT.1).max(WAIT.0),
            ManagerError::Unfitting(_) => return Err(FetchError::Key(error)),
            ManagerError::Away { .. } => wait,
        };
        if Instant::now() + pause > deadline {
            return Err(FetchError::Key(error));
        }
        tracing::info!(%error, wait_ms = pause.as_millis(), "the key is not here yet");
        let next_try = now_ms().saturating_add(u64::try_from(pause.as_millis()).unwrap_or(u64::MAX));
        let waiting = Waiting { cause: StallCause::ManagerAway, detail: error.to_string(), next_try };
        progress.send_modify(|p| p.waiting = Some(waiting));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = cancel.cancelled() => return Err(FetchError::Cancelled),
        }
        wait = (wait * 2).min(WAIT.1);
    }
}
