//! What this client can show of a purchase: the ticket, and what it signed itself. It needs nobody: the manager and the
//! shop may be gone.

use std::fs;
use std::path::Path;

use protocol::codec::{self, Wire};
use protocol::evidence::{EvidencePack, Exporter};
use protocol::receipt::Ack;
use protocol::{Signed, TransactionId};

use crate::home::{FileError, Home, now_ms, read_file};
use crate::library::LibraryError;

/// Why there is no evidence.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// The library.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Never bought or fetched here.
    #[error("this client's library has no purchase {0}; `willcall status` lists what it has")]
    Unknown(TransactionId),
    /// A thread.
    #[error("the evidence was not put together: {0}")]
    Thread(String),
}

/// Puts together what is here of one purchase.
///
/// # Errors
/// [`EvidenceError`].
pub async fn evidence(home: &Home, transaction: TransactionId) -> Result<EvidencePack, EvidenceError> {
    let home = home.clone();
    let work = tokio::task::spawn_blocking(move || gather(&home, transaction));
    work.await.map_err(|error| EvidenceError::Thread(error.to_string()))?
}

fn gather(home: &Home, transaction: TransactionId) -> Result<EvidencePack, EvidenceError> {
    let delivery = home.library().get(&transaction)?.ok_or(EvidenceError::Unknown(transaction))?;
    let ticket = &delivery.envelope.ticket;
    let mut pack = EvidencePack::new(Exporter::Client, now_ms(), ticket.data.clone());
    pack.endorsement.clone_from(&ticket.endorsement);
    pack.leases.push(ticket.lease.clone());
    pack.manifest.clone_from(&delivery.manifest);
    pack.completions.extend(delivery.completion.clone());
    if let Some(trust) = home.networks().trust(&delivery.envelope.join, 0)? {
        pack.key_sets.push(trust.signed_key_set().clone());
    }
    for ack in acks(&home.delivery_dir(&transaction)) {
        pack.add_ack(ack);
    }
    Ok(pack)
}

/// The acknowledgements of every download, as far as they can still be read: what is lost proves nothing less of the rest.
fn acks(dir: &Path) -> Vec<Signed<Ack>> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let folders = entries(dir).filter(|path| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("acks-")) && path.is_dir()
    });
    let mut files: Vec<_> = folders.flat_map(|folder| entries(&folder).collect::<Vec<_>>()).collect();
    files.sort();
    let read = |path| read_file(path, <Signed<Ack>>::MAX).ok().flatten();
    files.iter().filter_map(|path| read(path)).filter_map(|bytes| codec::decode(&bytes).ok()).collect()
}
