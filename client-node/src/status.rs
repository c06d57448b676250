//! What a client has, and why what it does not have yet is not moving.

use protocol::{NetworkId, TransactionId};

use crate::home::{Home, blocking};
use crate::library::{Delivery, DeliveryState, LibraryError, Trouble};
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
    /// Ciphertext bytes here at the end of the last run.
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
    Ok(all.into_iter().map(|(transaction, delivery)| describe(transaction, &delivery)).collect())
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
        trouble: delivery.trouble.clone(),
    }
}
