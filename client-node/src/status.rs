//! What a client has, and why what it does not have yet is not moving.

use node::DirLock;
use protocol::{NetworkId, TransactionId};

use crate::home::{Home, blocking};
use crate::library::{Delivery, DeliveryState, LibraryError, Trouble};
use crate::place::work_dir;
use crate::shop::printable;

/// One purchase in the library.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct DeliveryStatus {
    /// The transaction.
    pub transaction: TransactionId,
    /// The network.
    pub network: Option<NetworkId>,
    /// What was bought.
    pub title: String,
    /// How far it is.
    pub state: DeliveryState,
    /// Where the files are, once they are.
    pub path: Option<String>,
    /// Into which folder it was fetched last.
    pub out: Option<String>,
    /// What was chosen of it; empty for everything.
    pub only: Vec<String>,
    /// Ciphertext bytes here at the end of the last run, as far as they were noted.
    pub have_bytes: u64,
    /// Ciphertext bytes in all; 0 while that is unknown.
    pub total_bytes: u64,
    /// Files unpacked.
    pub files: u32,
    /// Bytes of these files.
    pub plain_bytes: u64,
    /// The lease ends then, unix milliseconds; it is renewed by itself.
    pub lease_until: u64,
    /// The manager has the completion.
    pub reported: bool,
    /// When the ticket came, unix milliseconds.
    pub received_at: u64,
    /// When the files were in their place, unix milliseconds; 0 for not yet.
    pub finished_at: u64,
    /// Why the last run did not get further.
    pub trouble: Option<Trouble>,
}

/// All purchases, newest first.
///
/// # Errors
/// [`LibraryError`].
pub async fn status(home: &Home) -> Result<Vec<DeliveryStatus>, LibraryError> {
    let library = home.library();
    let all = blocking(move || library.list()).await?;
    let home = home.clone();
    let described =
        move || all.iter().map(|(id, delivery)| look(&home, *id, describe(*id, delivery), delivery)).collect();
    Ok(blocking(described).await)
}

/// What the library cannot say of a run that was killed: it had no time to.
fn look(home: &Home, transaction: TransactionId, mut status: DeliveryStatus, delivery: &Delivery) -> DeliveryStatus {
    let Some(work) = delivery.out().map(|out| work_dir(&out, transaction)) else { return status };
    let manifest = delivery.envelope.ticket.data.peek().ok().map(|data| data.manifest);
    let underway = match delivery.state {
        DeliveryState::Received | DeliveryState::Refused => false,
        DeliveryState::Fetching | DeliveryState::Fetched => true,
        // Fetched once more, into the same folder or another.
        DeliveryState::Done => !delivery.last_run_ended() && work.exists(),
    };
    if !underway || DirLock::is_held(&home.delivery_dir(&transaction)) {
        return status;
    }
    if delivery.state != DeliveryState::Done
        && let Some(noted) = manifest.and_then(|manifest| delivery::noted(&work, &manifest))
    {
        (status.have_bytes, status.total_bytes) = noted;
    }
    if status.trouble.is_none() {
        let changed =
            manifest.and_then(|manifest| std::fs::metadata(work.join(manifest.to_string())).ok()?.modified().ok());
        let changed = changed.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok()).unwrap_or_default();
        let at = u64::try_from(changed.as_millis()).unwrap_or(u64::MAX).max(delivery.started_at);
        let detail =
            "its process ended before it could say why; what was noted is kept, fetch again to go on".to_owned();
        status.trouble = Some(Trouble { cause: "interrupted".to_owned(), detail, at });
    }
    status
}

fn describe(transaction: TransactionId, delivery: &Delivery) -> DeliveryStatus {
    let text = |path: std::path::PathBuf| path.to_string_lossy().into_owned();
    DeliveryStatus {
        transaction,
        network: delivery.envelope.ticket.data.peek().ok().map(|data| data.network),
        title: printable(&delivery.envelope.title, 200),
        state: delivery.state,
        path: delivery.place().map(text),
        out: delivery.out().map(text),
        only: delivery.only.clone(),
        have_bytes: delivery.have_bytes,
        total_bytes: delivery.total_bytes,
        files: delivery.files,
        plain_bytes: delivery.plain_bytes,
        lease_until: delivery.envelope.ticket.lease.peek().map_or(0, |lease| lease.end),
        reported: delivery.reported,
        received_at: delivery.received_at,
        finished_at: delivery.finished_at,
        // Was noted where a second command came in the way of a fetch: whether that one runs is seen.
        trouble: delivery.trouble.clone().filter(|trouble| trouble.cause != "running"),
    }
}
