//! Store errors in words that an operator can act on: redb's own say neither which file nor what to do next.

use std::io;
use std::path::PathBuf;

use crate::disk::Trouble;

/// Why something could not be read from or written to an open store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No space (or no quota) left. Like every disk error it lasts until the store is opened again.
    #[error("no space left for {path}: {}, then restart", to_free(*.needed))]
    DiskFull {
        /// The store's file.
        path: PathBuf,
        /// Bytes that found no place, where that is known: no less has to be freed.
        needed: Option<u64>,
    },
    /// The disk failed earlier, or just now. Whether a write that was under way became durable is not known.
    #[error("store failed: {reason}: restart after fixing the disk")]
    Failed {
        /// What was tried on which file, and the system's error.
        reason: String,
    },
    /// A stored key or value is not what its table holds.
    #[error("damaged record in table {table}: {reason}: restore a backup")]
    Corrupt {
        /// Table name.
        table: &'static str,
        /// What did not decode.
        reason: String,
    },
    /// A key or value is over its bound, or cannot be encoded; nothing was written.
    #[error("{what} for table {table} refused: {bytes} bytes, at most {max} are stored")]
    TooLarge {
        /// Table name.
        table: &'static str,
        /// "key" or "value".
        what: &'static str,
        /// Encoded length, bytes; 0 when it could not be encoded at all.
        bytes: usize,
        /// Bound, bytes.
        max: usize,
    },
    /// The transaction was used in a way that redb refuses: a table opened twice at once, or as another type.
    #[error("wrong use of the store: {0}")]
    Misuse(String),
    /// The closure given to `read` or `write` panicked; nothing of it was written.
    #[error("store closure panicked: {0}")]
    Panicked(String),
}

impl From<redb::StorageError> for StoreError {
    fn from(error: redb::StorageError) -> Self {
        match error {
            redb::StorageError::Io(error) => StoreError::from_io(&error),
            redb::StorageError::ValueTooLarge(bytes) => {
                StoreError::Misuse(format!("a value of {bytes} bytes is more than redb stores"))
            }
            redb::StorageError::PreviousIo => StoreError::Failed { reason: "an earlier disk error".to_owned() },
            other => StoreError::Failed { reason: other.to_string() },
        }
    }
}

impl StoreError {
    /// The errors that reach redb come from `disk`, which puts the path inside.
    fn from_io(error: &io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Trouble>()) {
            Some(trouble) => trouble.to_error(),
            None => StoreError::Failed { reason: error.to_string() },
        }
    }
}

impl From<redb::TableError> for StoreError {
    fn from(error: redb::TableError) -> Self {
        match error {
            redb::TableError::Storage(error) => error.into(),
            other => StoreError::Misuse(other.to_string()),
        }
    }
}

impl From<redb::TransactionError> for StoreError {
    fn from(error: redb::TransactionError) -> Self {
        match error {
            redb::TransactionError::Storage(error) => error.into(),
            other => StoreError::Misuse(other.to_string()),
        }
    }
}

impl From<redb::CommitError> for StoreError {
    fn from(error: redb::CommitError) -> Self {
        match error {
            redb::CommitError::Storage(error) => error.into(),
            other => StoreError::Misuse(other.to_string()),
        }
    }
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process, or another `Db` in this one, holds the file.
    #[error("{path} is in use by another process")]
    InUse {
        /// The store's file.
        path: PathBuf,
    },
    /// The file was written under another schema number.
    #[error("{path} has schema {found}, this program reads schema {wanted}: use the program version that wrote it")]
    Schema {
        /// The store's file.
        path: PathBuf,
        /// Number in the file.
        found: u32,
        /// Number asked for.
        wanted: u32,
    },
    /// Something else lies at that path; it was not touched.
    #[error("{path} is not a Willcall store: {reason}")]
    NotAStore {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        reason: String,
    },
    /// It was a store once, and its content no longer fits together.
    #[error("{path} is damaged: {reason}: restore a backup")]
    Damaged {
        /// The store's file.
        path: PathBuf,
        /// What redb found.
        reason: String,
    },
    /// The system refused.
    #[error("cannot open {path}: {source}")]
    Io {
        /// The store's file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

fn to_free(needed: Option<u64>) -> String {
    needed.map_or_else(|| "free some".to_owned(), |bytes| format!("free {bytes} bytes or more"))
}
