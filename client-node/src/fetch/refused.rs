//! The end of a purchase that can never be fetched again: what was fetched of it is of no use to anybody and may be many
//! GiB, so it goes. What this client signed, and was given to sign, lies elsewhere and stays: it is evidence.

use std::path::PathBuf;

use node::DirLock;
use protocol::{RefusalCode, TransactionId};

use super::FetchError;
use crate::home::{Home, blocking};
use crate::library::{LibraryError, Trouble};
use crate::link::ManagerError;
use crate::place::{clear, work_dir};

impl FetchError {
    /// Does it end this purchase for good? Only the network's signed word or the manager's own does; what a seeder says,
    /// or nobody answers, may pass.
    pub fn is_final(&self) -> bool {
        match self {
            FetchError::Revoked(_) | FetchError::Moved(_) => true,
            // A key that is not known may come; one that was given up does not come back.
            FetchError::ContentVoid(refusal) => refusal.code == RefusalCode::KeyRetired,
            FetchError::Key(ManagerError::Refused(refusal)) => refusal.code == RefusalCode::Revoked,
            _ => false,
        }
    }
}

/// Removes what earlier runs fetched and did not put in its place, here and where the last one was to put it. For whoever
/// holds the lock of the purchase. What cannot be removed is only in the way.
pub(super) async fn discard(home: &Home, transaction: TransactionId, out: Option<PathBuf>) {
    let library = home.library();
    let discarded = blocking(move || {
        let before = library.get(&transaction)?.and_then(|delivery| delivery.out());
        for out in out.into_iter().chain(before) {
            clear(&work_dir(&out, transaction))?;
        }
        Ok::<_, FetchError>(())
    });
    if let Err(error) = discarded.await {
        tracing::warn!(%transaction, %error, "what was fetched of a purchase that is no more is still there");
    }
}

/// Notes that a purchase ended for good, outside of a fetch of it. One that runs finds it out itself, and clears up then.
pub(crate) async fn refuse(home: &Home, transaction: TransactionId, trouble: Trouble) -> Result<(), LibraryError> {
    let (folder, library) = (home.delivery_dir(&transaction), home.library());
    // Without the folder nothing was ever fetched; while another process has it, it is that one's.
    let lock = blocking(move || DirLock::acquire_looked_at(&folder)).await.ok();
    if lock.is_some() {
        discard(home, transaction, None).await;
    }
    blocking(move || library.update(transaction, move |delivery| delivery.refuse(trouble.clone()))).await
}
