//! What can go wrong with content on disk, one type an operation: callers treat a full disk, a damaged file and a bad
//! chunk in entirely different ways.

use std::path::PathBuf;

use protocol::manifest::Manifest;
use protocol::{Refusal, Signed};

use super::disk::FileError;

/// A metadata file that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} is damaged: {what}", file.display())]
pub struct Damaged {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub what: String,
}

/// Why a content cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// Its metadata are not what was written.
    #[error(transparent)]
    Damaged(#[from] Damaged),
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
}

impl ContentError {
    /// What cannot be read is damaged as what was read and is wrong: it costs the content that it is of, and no other.
    pub(super) fn or_damaged(self) -> ContentError {
        match self {
            ContentError::File(error) if error.is_damage() => {
                let what = format!("cannot {} it: {}", error.doing, error.source);
                Damaged { file: error.path, what }.into()
            }
            other => other,
        }
    }
}

/// Less space than needed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} bytes are needed at {} and {free} are free: make room there or choose another place", path.display())]
pub struct NoSpace {
    /// Where.
    pub path: PathBuf,
    /// Bytes needed.
    pub needed: u64,
    /// Bytes free.
    pub free: u64,
}

/// Why there is no place for a content.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The disk is too full. Nothing was written.
    #[error(transparent)]
    NoSpace(#[from] NoSpace),
    /// It is there, and damaged.
    #[error(transparent)]
    Damaged(#[from] Damaged),
    /// The manifest contradicts itself, or is not the signed one.
    #[error("{0}")]
    Manifest(Refusal),
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
}

impl From<ContentError> for CreateError {
    fn from(error: ContentError) -> Self {
        match error {
            ContentError::Damaged(damaged) => CreateError::Damaged(damaged),
            ContentError::File(error) => CreateError::File(error),
        }
    }
}

/// Why a chunk was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is not here.
    #[error("chunk {0} is not held")]
    NotHeld(u32),
    /// The content was removed.
    #[error("the content was removed")]
    Removed,
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Why a chunk that was to be verified was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadVerifiedError {
    /// It is not here.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// What lies on disk is not the chunk.
    #[error("chunk {0} is damaged on disk")]
    Damaged(u32),
    /// It cannot be verified yet.
    #[error(transparent)]
    Mending(#[from] Mending),
}

/// Somebody makes damaged chaining values good by the data just now, which takes as long as reading all chunks of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("damaged chaining values are being made good")]
pub struct Mending;

/// Why a segment of chaining values was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadSegmentError {
    /// Not now.
    #[error(transparent)]
    Mending(#[from] Mending),
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Why a chunk was not stored.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The bytes are not this chunk.
    #[error("these bytes are not chunk {0}")]
    Mismatch(u32),
    /// The segment with its chaining value is not here yet.
    #[error("the chaining value of chunk {0} is not known yet")]
    NoChainingValue(u32),
    /// The disk is full. What is stored stays good.
    #[error("no space left at {}: {needed} bytes are still to come; free some, then go on", path.display())]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// Bytes still to be written for this content.
        needed: u64,
    },
    /// The content was removed.
    #[error("the content was removed")]
    Removed,
    /// The disk failed.
    #[error(transparent)]
    Io(#[from] FileError),
}

/// Why a segment of chaining values was not stored.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// It is not the one that was published.
    #[error("{0}")]
    Refused(Refusal),
    /// The content was removed.
    #[error("the content was removed")]
    Removed,
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Why data could not be made durable.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// The content was removed.
    #[error("the content was removed")]
    Removed,
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Why a content is not complete.
#[derive(Debug, thiserror::Error)]
pub enum FinishError {
    /// Chunks are missing.
    #[error("{0} chunks are missing")]
    Missing(u32),
    /// All parts fit their lists, and the lists do not make up the content root: the manifest is wrong.
    #[error("the manifest contradicts itself: {0}")]
    Manifest(&'static str),
    /// What was written is not what the manifest describes.
    #[error("{written} bytes were written, the manifest says {expected}")]
    Length {
        /// Bytes written.
        written: u64,
        /// Bytes in the manifest.
        expected: u64,
    },
    /// It could not be put in its place.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// It could not be made durable.
    #[error(transparent)]
    Sync(#[from] SyncError),
}

impl From<FileError> for FinishError {
    fn from(error: FileError) -> Self {
        FinishError::Sync(SyncError::File(error))
    }
}

/// Checks the numbers that offsets are made of, and that `manifest` is what was signed.
pub(super) fn check_pair(signed: &Signed<Manifest>, manifest: &Manifest) -> Result<(), CreateError> {
    manifest.check(manifest.network).map_err(CreateError::Manifest)?;
    let inside = signed.peek().map_err(|error| CreateError::Manifest(error.into()))?;
    if inside != *manifest {
        let code = protocol::RefusalCode::Malformed;
        return Err(CreateError::Manifest(Refusal::new(code, "the manifest is not the one that was signed")));
    }
    Ok(())
}
