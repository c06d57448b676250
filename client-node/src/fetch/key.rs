//! Keys that a manager gives: the content's, in the ticket or against the client's word that everything is here, and the
//! network's own, once on a new machine.

use std::iter;
use std::pin::pin;
use std::time::{Duration, Instant};

use delivery::StallCause;
use protocol::api::{MailboxRequest, MailboxResponse};
use protocol::cipher::ContentSecret;
use protocol::receipt::Completion;
use protocol::ticket::{KeyGrant, TicketEnvelope};
use protocol::{Keypair, Signed};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::run::millis;
use super::ticket::{Checked, RenewError, try_renew};
use super::{FetchError, FetchProgress, Purchase, Waiting};
use crate::home::{Home, now_ms};
use crate::inbox::{TicketError, ask_ticket};
use crate::library::Delivery;
use crate::link::{Link, ManagerError, TrustError};

/// First wait for a manager that does not answer, and the longest.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// A question that seems to have taken longer did not: the process was stopped meanwhile, or the machine slept.
const LONGEST_QUESTION: Duration = Duration::from_secs(60);

/// A manager that is near answers in it: no question is cut shorter, however little patience is left.
const LEAST_QUESTION: Duration = Duration::from_secs(1);

/// Why nobody answers, where that is known before anybody is asked.
pub(super) const NO_ROUTE: &str = "this machine has no route to any manager or seeder that it knows";

/// That a question is not answered yet is told after this time.
pub(super) const TOLD_AFTER: Duration = Duration::from_secs(2);

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
    let mut retry = Retry::new(patience, progress, cancel);
    loop {
        match retry.ask(complete(link, completion), |late| late).await? {
            Ok(grant) => {
                progress.send_modify(|p| p.waiting = None);
                return Ok(grant);
            }
            Err(error) if retry.pause(&error).await? => {}
            Err(error) => return Err(FetchError::Key(error)),
        }
    }
}

/// Makes sure that the network's keys are known: where this machine meets it for the first time, managers and seeders are
/// asked until one answers.
pub(super) async fn meet(
    link: &Link,
    patience: Duration,
    progress: &watch::Sender<FetchProgress>,
    cancel: &CancellationToken,
) -> Result<(), FetchError> {
    let mut retry = Retry::new(patience, progress, cancel);
    loop {
        retry.blame(link.has_no_route());
        let late = |source| TrustError::ManagerNeeded { source, network: link.network() };
        match retry.ask(link.trust(), late).await? {
            Err(TrustError::ManagerNeeded { source, network }) => {
                if !retry.pause(&source).await? {
                    return Err(match retry.cause {
                        StallCause::NetworkUnreachable => FetchError::NoRoute,
                        _ => TrustError::ManagerNeeded { source, network }.into(),
                    });
                }
            }
            other => {
                progress.send_modify(|p| p.waiting = None);
                return Ok(other.map(drop)?);
            }
        }
    }
}

/// How long to wait for a manager without which nothing goes on, where that is shown, and what ends it.
#[derive(Clone, Copy)]
pub(super) struct Patience<'a> {
    pub(super) time: Duration,
    pub(super) progress: &'a watch::Sender<FetchProgress>,
    pub(super) cancel: &'a CancellationToken,
}

/// The purchase's ticket as the manager has it now, in place of one that no seeder takes any more. While the manager is
/// away it is waited for.
///
/// # Errors
/// The outer one when the fetch is stopped meanwhile; the inner one says why there is none.
pub(super) async fn current(
    home: &Home,
    link: &Link,
    purchase: &Purchase,
    Patience { time, progress, cancel }: Patience<'_>,
) -> Result<Result<TicketEnvelope, TicketError>, FetchError> {
    let mut retry = Retry::new(time, progress, cancel);
    loop {
        let question = ask_ticket(link, purchase.transaction, purchase.network, home.peer_id());
        match retry.ask(question, TicketError::from).await? {
            Err(TicketError::Manager(error)) => {
                if !retry.pause(&error).await? {
                    return Ok(Err(error.into()));
                }
            }
            other => {
                progress.send_modify(|p| p.waiting = None);
                return Ok(other);
            }
        }
    }
}

/// The same, asked for once: there may be another way to go on.
pub(super) async fn current_at_once(
    home: &Home,
    link: &Link,
    purchase: &Purchase,
    Patience { time, progress, cancel }: Patience<'_>,
) -> Result<Result<TicketEnvelope, TicketError>, FetchError> {
    let question = ask_ticket(link, purchase.transaction, purchase.network, home.peer_id());
    let asked = Retry::new(time, progress, cancel).ask(question, TicketError::from).await;
    progress.send_modify(|p| p.waiting = None);
    asked
}

/// A lease in place of one that is over. While the manager is away it is waited for: nothing can go on without it.
///
/// # Errors
/// The outer one when the fetch is stopped meanwhile; the inner one says why there is none.
pub(super) async fn renewed(
    home: &Home,
    link: &Link,
    checked: &Checked,
    Patience { time, progress, cancel }: Patience<'_>,
) -> Result<Result<Checked, RenewError>, FetchError> {
    let mut retry = Retry::new(time, progress, cancel);
    loop {
        match retry.ask(try_renew(home, link, checked), |late| RenewError::Ask(late.into())).await? {
            Err(RenewError::Ask(TicketError::Manager(error))) => {
                if !retry.pause(&error).await? {
                    return Ok(Err(RenewError::Ask(error.into())));
                }
            }
            other => {
                progress.send_modify(|p| p.waiting = None);
                return Ok(other);
            }
        }
    }
}

/// Pauses between questions to a manager, longer and longer, until patience is at its end.
struct Retry<'a> {
    left: Duration,
    asked: Instant,
    wait: Duration,
    cause: StallCause,
    /// What it last said.
    refused: Option<String>,
    progress: &'a watch::Sender<FetchProgress>,
    cancel: &'a CancellationToken,
}

impl<'a> Retry<'a> {
    fn new(patience: Duration, progress: &'a watch::Sender<FetchProgress>, cancel: &'a CancellationToken) -> Self {
        Retry {
            left: patience,
            asked: Instant::now(),
            wait: WAIT.0,
            cause: StallCause::ManagerAway,
            refused: None,
            progress,
            cancel,
        }
    }

    /// From now on it is this machine's network, or the manager, that is waited for.
    fn blame(&mut self, no_route: bool) {
        self.cause = if no_route { StallCause::NetworkUnreachable } else { StallCause::ManagerAway };
    }

    /// Asks, for as long as there is patience. Where no answer comes soon, that is told with the time until which it is
    /// waited for; `late` makes the error of none that comes by then.
    async fn ask<T, E>(
        &mut self,
        question: impl Future<Output = Result<T, E>>,
        late: impl FnOnce(ManagerError) -> E,
    ) -> Result<Result<T, E>, FetchError> {
        self.asked = Instant::now();
        let limit = self.left.min(LONGEST_QUESTION).max(LEAST_QUESTION);
        let until = now_ms().saturating_add(millis(limit));
        self.progress.send_if_modified(|p| p.waiting.as_mut().map(|waiting| waiting.next_try = until).is_some());
        if self.cause == StallCause::NetworkUnreachable {
            let waiting = Waiting { cause: self.cause.clone(), detail: NO_ROUTE.to_owned(), next_try: until };
            self.progress.send_modify(|p| p.waiting = p.waiting.take().or(Some(waiting)));
        }
        let too_long = async {
            if limit > TOLD_AFTER {
                tokio::time::sleep(TOLD_AFTER).await;
                let detail = "the manager was asked and has not answered yet".to_owned();
                let waiting = Waiting { cause: StallCause::ManagerAway, detail, next_try: until };
                self.progress.send_modify(|p| p.waiting = p.waiting.take().or(Some(waiting)));
            }
            tokio::time::sleep(limit.saturating_sub(self.asked.elapsed())).await;
        };
        let question = pin!(question);
        tokio::select! {
            answer = question => Ok(answer),
            () = too_long => {
                let silent = format!("no answer within {:.1} s", limit.as_secs_f32());
                let said = self.refused.take().map(|refusal| format!("it said '{refusal}' before"));
                let tried = iter::once(silent).chain(said).collect();
                Ok(Err(late(ManagerError::Away { tried })))
            }
            () = self.cancel.cancelled() => Err(FetchError::Cancelled),
        }
    }

    /// Waits until it may be asked again; false when that is no use, or would be too late.
    async fn pause(&mut self, error: &ManagerError) -> Result<bool, FetchError> {
        if let ManagerError::Refused(refusal) = error {
            self.refused = Some(refusal.to_string());
        }
        let pause = match error {
            ManagerError::Refused(refusal) if refusal.retry_after_ms == 0 => return Ok(false),
            ManagerError::Refused(refusal) => Duration::from_millis(refusal.retry_after_ms).min(WAIT.1).max(WAIT.0),
            ManagerError::Unfitting(_) => return Ok(false),
            ManagerError::Away { .. } => self.wait,
        };
        self.left = self.left.saturating_sub(self.asked.elapsed().min(LONGEST_QUESTION));
        if pause > self.left {
            return Ok(false);
        }
        self.left -= pause;
        tracing::info!(%error, wait_ms = pause.as_millis(), "the manager is needed and does not answer yet");
        let next_try = now_ms().saturating_add(millis(pause));
        let detail = match self.cause {
            StallCause::NetworkUnreachable => NO_ROUTE.to_owned(),
            _ => error.to_string(),
        };
        let waiting = Waiting { cause: self.cause.clone(), detail, next_try };
        self.progress.send_modify(|p| p.waiting = Some(waiting));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = self.cancel.cancelled() => return Err(FetchError::Cancelled),
        }
        self.wait = (self.wait * 2).min(WAIT.1);
        Ok(true)
    }
}
