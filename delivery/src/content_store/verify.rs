//! Disks lose bits silently. Reading everything again is the only way to know, and what is found damaged is forgotten,
//! so that it is fetched again instead of being served or opened.

use std::io;
use std::ops::ControlFlow;

use protocol::ChunkSet;

use super::content::Content;
use super::disk::FileError;

/// How far a verification is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyProgress {
    /// Chunks read.
    pub checked: u32,
    /// Chunks to be read in all.
    pub total: u32,
    /// Chunks found damaged so far.
    pub damaged: u32,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Chunks read.
    pub checked: u32,
    /// Chunks that do not verify; they are no longer held.
    pub damaged: ChunkSet,
    /// False when the caller broke it off.
    pub whole: bool,
}

impl Content {
    /// Reads every chunk that is here and checks it; damaged ones, those that cannot be read, and those whose chaining
    /// values are gone are not held any more. `progress` is told after each chunk and may break it off.
    ///
    /// # Errors
    /// [`FileError`] when the file as a whole cannot be read, or the result cannot be noted.
    pub fn verify_all(
        &self,
        progress: &mut dyn FnMut(VerifyProgress) -> ControlFlow<()>,
    ) -> Result<VerifyReport, FileError> {
        self.verify(&self.have(), progress)
    }

    /// As [`Content::verify_all`], of these chunks only.
    ///
    /// # Errors
    /// As [`Content::verify_all`].
    pub fn verify(
        &self,
        chunks: &ChunkSet,
        progress: &mut dyn FnMut(VerifyProgress) -> ControlFlow<()>,
    ) -> Result<VerifyReport, FileError> {
        let held = self.have().intersection(chunks);
        let total = held.len();
        let mut report = VerifyReport { whole: true, ..VerifyReport::default() };
        let mut buffer = Vec::new();
        for chunk in held.iter() {
            if !self.is_good(chunk, &mut buffer)? {
                tracing::debug!(content = %self.digest(), chunk, "chunk does not verify");
                report.damaged.insert(chunk);
            }
            report.checked += 1;
            let so_far = VerifyProgress { checked: report.checked, total, damaged: report.damaged.len() };
            if progress(so_far).is_break() {
                report.whole = false;
                break;
            }
        }
        // It may take hours: what was found damaged by a delivery, too, is whole again perhaps.
        let mut still = ChunkSet::new();
        for chunk in report.damaged.intersection(&self.have()).iter() {
            if !self.is_good(chunk, &mut buffer)? {
                still.insert(chunk);
            }
        }
        if !still.is_empty() {
            self.forget(&still)?;
        }
        Ok(report)
    }

    /// Looks whether chunks that are not noted are on disk all the same, as they are after a crash of the process between
    /// the write and the note, and takes those that verify. Returns them. Every candidate is read, however many are
    /// absent: whoever acknowledged one that is there would fetch it, and acknowledge it, twice.
    ///
    /// # Errors
    /// [`FileError`] when the file as a whole cannot be read.
    pub fn adopt(&self, candidates: &ChunkSet) -> Result<ChunkSet, FileError> {
        self.adopt_while(candidates, &|| true)
    }

    /// The same, for as long as `go_on` says so: it is asked before each chunk.
    ///
    /// # Errors
    /// As [`Content::adopt`].
    pub fn adopt_while(&self, candidates: &ChunkSet, go_on: &dyn Fn() -> bool) -> Result<ChunkSet, FileError> {
        let mut adopted = ChunkSet::new();
        let mut buffer = Vec::new();
        let ours = ChunkSet::from_range(0..self.manifest().chunks());
        for chunk in candidates.intersection(&ours).difference(&self.have()).iter() {
            if !go_on() {
                break;
            }
            if self.is_good(chunk, &mut buffer)? {
                self.take(chunk);
                adopted.insert(chunk);
            }
        }
        Ok(adopted)
    }

    fn is_good(&self, chunk: u32, buffer: &mut Vec<u8>) -> Result<bool, FileError> {
        match self.read_unchecked(chunk, buffer) {
            Ok(()) => {}
            Err(error) if is_bad_sector(&error) => return Ok(false),
            Err(error) => return Err(error),
        }
        let value = self.chaining_value(chunk)?;
        Ok(value.is_some_and(|value| self.manifest().verifies(chunk, &value, buffer)))
    }
}

/// One place of the disk that cannot be read, or a file cut off: a damaged chunk. A file that is gone is not.
fn is_bad_sector(error: &FileError) -> bool {
    let errno = rustix::io::Errno::from_io_error(&error.source);
    errno == Some(rustix::io::Errno::IO) || error.source.kind() == io::ErrorKind::UnexpectedEof
}
