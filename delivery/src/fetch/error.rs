//! Why a fetch ended without everything: each variant asks something else of the user or the role.

use std::path::PathBuf;
use std::time::Duration;

use protocol::Refusal;

use super::{SourceReport, StallCause};
use crate::content_store::{CreateError, FileError, FinishError};

/// Why a fetch ended. What was fetched stays in every case.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Several seeders refuse the ticket or order itself. Renew it where it is over; the refusal says what is wrong.
    #[error("{by} seeders refuse it: {refusal}")]
    Refused {
        /// What the last of them said.
        refusal: Refusal,
        /// How many say the same.
        by: usize,
        /// Every seeder that was tried, with its last reason.
        sources: Vec<SourceReport>,
    },
    /// The manifest that the ticket names is not one of this network's catalogue, or was taken down.
    #[error("the content's manifest does not hold: {0}")]
    Manifest(Refusal),
    /// Nothing came for longer than the patience, or nobody is left to ask.
    #[error("{cause}{}", listed(sources))]
    NoSource {
        /// Why, in one name.
        cause: StallCause,
        /// Time without a new chunk.
        waited: Duration,
        /// Every seeder that was tried, with its last reason.
        sources: Vec<SourceReport>,
    },
    /// There is no place for the content.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The disk became full. Free some, then go on.
    #[error("no space left at {}: {needed} bytes are still to come; free some, then fetch again", path.display())]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// Bytes still to come.
        needed: u64,
    },
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The content was removed from the store meanwhile.
    #[error("the content was removed while it was being fetched")]
    Removed,
    /// Everything is here, and it does not fit together.
    #[error(transparent)]
    Finish(FinishError),
    /// [`super::FetchJob::cancel`].
    #[error("stopped with {have} of {total} chunks")]
    Cancelled {
        /// Chunks that are here.
        have: u32,
        /// Chunks asked for; 0 when not even that was known.
        total: u32,
    },
}

impl FetchError {
    /// Every seeder that was tried, where the end was for their sake.
    pub fn sources(&self) -> &[SourceReport] {
        match self {
            FetchError::Refused { sources, .. } | FetchError::NoSource { sources, .. } => sources,
            _ => &[],
        }
    }
}

/// A line for each seeder, the first few: an error text of 256 lines helps nobody, and the list has them all.
fn listed(sources: &[SourceReport]) -> String {
    const SHOWN: usize = 8;
    let mut text = String::new();
    for source in sources.iter().take(SHOWN) {
        let reason = source.last_reason.as_deref().unwrap_or("nothing came");
        text.push_str(&format!("; {}: {reason}", source.peer.short()));
    }
    if sources.len() > SHOWN {
        text.push_str(&format!("; and {} more", sources.len() - SHOWN));
    }
    text
}
