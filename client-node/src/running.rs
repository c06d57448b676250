//! A fetch that runs can be asked by other commands how far it is and why it is not moving, and told to leave others
//! more of the line. It answers on a socket in the delivery's own folder, for as long as it runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use delivery::Pace;
use node::{ControlCallError, ControlError, ControlServer, ControlStartError, Supervisor, control_call};
use protocol::TransactionId;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::fetch::FetchProgress;
use crate::home::Home;

/// A fetch answers at once, from what it has in memory.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Between two looks whether a socket is let go of.
const AGAIN: Duration = Duration::from_millis(15);

/// Limits of a fetch, bytes per second; 0 for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct DownloadLimits {
    /// Of all transfers of its process together.
    pub process: u64,
    /// Of this transfer.
    pub transfer: u64,
}

/// A change of [`DownloadLimits`]; what is absent stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitChange {
    /// Of all transfers of its process together.
    pub process: Option<u64>,
    /// Of one transfer.
    pub transfer: Option<u64>,
}

/// Why a running fetch did not answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// It does not run.
    #[error("{0} is not being fetched at the moment; limits for the next time are --limit and the home's config.toml")]
    NotRunning(TransactionId),
    /// It does not answer.
    #[error(
        "{0} is being fetched by a process that does not answer; it may be stopped (Ctrl-Z, fg lets it go on), or its disk \
         hangs"
    )]
    Silent(TransactionId),
    /// It runs and could not be asked.
    #[error(transparent)]
    Control(ControlCallError),
    /// Its answer is not one.
    #[error("the running fetch answered something else; it may be of another version")]
    Malformed,
}

/// The limits that a fetch keeps to.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) process: Arc<Pace>,
    pub(crate) transfer: Arc<Pace>,
}

impl Limits {
    fn now(&self) -> DownloadLimits {
        DownloadLimits { process: self.process.rate().get(), transfer: self.transfer.rate().get() }
    }
}

/// Answers until the supervisor stops. For whoever holds the lock of the purchase.
pub(crate) async fn answer(
    supervisor: &Supervisor,
    home: &Home,
    transaction: TransactionId,
    seen: watch::Receiver<FetchProgress>,
    limits: Limits,
) -> Result<(), ControlStartError> {
    let began = Instant::now();
    loop {
        match start(supervisor, home, transaction, seen.clone(), limits.clone()).await {
            // Only a fetch of this process that was dropped a moment ago can answer there still.
            Err(ControlStartError::InUse { .. }) if began.elapsed() < ANSWER_WITHIN => tokio::time::sleep(AGAIN).await,
            other => return other.map(drop),
        }
    }
}

async fn start(
    supervisor: &Supervisor,
    home: &Home,
    transaction: TransactionId,
    seen: watch::Receiver<FetchProgress>,
    limits: Limits,
) -> Result<ControlServer, ControlStartError> {
    let dir = home.delivery_dir(&transaction);
    ControlServer::start(supervisor, &dir, move |request, _| {
        let (progress, limits) = (seen.borrow().clone(), limits.clone());
        async move {
            match request.get("cmd").and_then(Value::as_str) {
                Some("progress") => {
                    serde_json::to_value(&progress).map_err(|error| ControlError::new("internal", error.to_string()))
                }
                Some("limit") => {
                    let asked = |name: &str| request.get(name).and_then(Value::as_u64);
                    if let Some(rate) = asked("process") {
                        limits.process.rate().set(rate);
                    }
                    if let Some(rate) = asked("transfer") {
                        limits.transfer.rate().set(rate);
                    }
                    Ok(json!(limits.now()))
                }
                _ => Err(ControlError::new("unknown-command", "a fetch knows progress and limit")),
            }
        }
    })
    .await
}

/// Where a fetch stands that runs now, in this process or another, as [`FetchProgress`] in JSON; `None` when it does not
/// run.
///
/// # Errors
/// [`AskError`].
pub async fn progress_of(home: &Home, transaction: TransactionId) -> Result<Option<Value>, AskError> {
    match ask(home, transaction, &json!({ "cmd": "progress" })).await {
        Ok(progress) => Ok(Some(progress)),
        Err(AskError::NotRunning(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Changes the limits of a fetch that runs now, in this process or another, and gives those in force.
///
/// # Errors
/// [`AskError::NotRunning`] among others.
pub async fn limit(home: &Home, transaction: TransactionId, change: LimitChange) -> Result<DownloadLimits, AskError> {
    let request = json!({ "cmd": "limit", "process": change.process, "transfer": change.transfer });
    let answer = ask(home, transaction, &request).await?;
    let rate = |name: &str| answer.get(name).and_then(Value::as_u64).ok_or(AskError::Malformed);
    Ok(DownloadLimits { process: rate("process")?, transfer: rate("transfer")? })
}

async fn ask(home: &Home, transaction: TransactionId, request: &Value) -> Result<Value, AskError> {
    let dir = home.delivery_dir(&transaction);
    // A process that is stopped is connected to all the same, by the system.
    match tokio::time::timeout(ANSWER_WITHIN, control_call(&dir, request, |_| {})).await {
        Ok(Ok(answer)) => Ok(answer),
        // One that just ended is one that does not run.
        Ok(Err(ControlCallError::NotRunning { .. } | ControlCallError::NoAnswer)) => {
            Err(AskError::NotRunning(transaction))
        }
        Ok(Err(error)) => Err(AskError::Control(error)),
        Err(_) => Err(AskError::Silent(transaction)),
    }
}
