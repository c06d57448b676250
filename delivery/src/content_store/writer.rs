//! A publisher knows the content's name only when the last byte is written. Until then the content grows in a folder
//! that nobody takes for one; it gets its name in a single rename.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use protocol::Signed;
use protocol::manifest::{self, Manifest, SEGMENT_CHUNKS, Segment};

use super::body::CONTENT;
use super::content::{COMPLETE, Content, MANIFEST};
use super::disk::{self, At};
use super::error::{self, CreateError, FinishError, WriteError};
use super::{ContentStore, Unfinished, segments};

/// A content that is being published. All methods block. Dropped before [`ContentWriter::finish`], it leaves nothing.
#[derive(Debug)]
pub struct ContentWriter {
    store: ContentStore,
    unfinished: Unfinished,
    file: File,
    written: u64,
    expected: u64,
}

impl ContentStore {
    /// The bytes of a whole content under a further name: another signed manifest of the same ciphertext. Nothing is
    /// copied where the file system can give a file a second name. Blocks.
    ///
    /// # Errors
    /// [`FinishError`], above all where `held` is not whole or the manifest is of other bytes; nothing is left then.
    pub fn name_again(
        &self,
        held: &Content,
        signed: &Signed<Manifest>,
        manifest: &Manifest,
    ) -> Result<Arc<Content>, FinishError> {
        error::check_pair(signed, manifest)?;
        let same = |m: &Manifest| (m.root, m.length, m.chunk_size, m.segments.clone());
        if same(manifest) != same(held.manifest()) {
            return Err(FinishError::Manifest("it is of other bytes"));
        }
        if !held.is_complete() || held.is_removed() {
            return Err(FinishError::Manifest("not all of its bytes are here"));
        }
        let unfinished = self.unfinished(0)?;
        let folder = &unfinished.path;
        for name in [CONTENT, segments::SEGMENTS] {
            disk::link_or_copy(&held.folder().join(name), &folder.join(name))?;
        }
        disk::write_new(&folder.join(MANIFEST), &protocol::codec::encode(signed))?;
        disk::write_new(&folder.join(COMPLETE), b"")?;
        Ok(self.adopt(unfinished, signed.digest())?)
    }
}

impl ContentWriter {
    pub(super) fn start(store: ContentStore, unfinished: Unfinished, expected: u64) -> Result<Self, CreateError> {
        let path = unfinished.path.join(CONTENT);
        let file = match expected {
            // Zero bytes cannot be reserved.
            0 => File::create_new(&path).at(&path, "make")?,
            _ => disk::preallocate(&path, expected)?,
        };
        Ok(ContentWriter { store, unfinished, file, written: 0, expected })
    }

    /// Bytes written.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Adds the ciphertext's next chunk.
    ///
    /// # Errors
    /// [`WriteError::DiskFull`], [`WriteError::Io`].
    pub fn append_chunk(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let path = self.unfinished.path.join(CONTENT);
        if let Err(error) = self.file.write_all(bytes).at(&path, "write") {
            if error.is_disk_full() {
                let needed = self.expected.saturating_sub(self.written).max(bytes.len() as u64);
                return Err(WriteError::DiskFull { path: self.store.root().to_owned(), needed });
            }
            return Err(WriteError::Io(error));
        }
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Gives the content its name. `values` are the chaining values of all chunks in order. When the same content is
    /// there already, it is that one.
    ///
    /// # Errors
    /// [`FinishError`]; nothing is left behind then.
    pub fn finish(
        self,
        values: Vec<[u8; 32]>,
        signed: &Signed<Manifest>,
        manifest: &Manifest,
    ) -> Result<Arc<Content>, FinishError> {
        error::check_pair(signed, manifest)?;
        if self.written != manifest.length {
            return Err(FinishError::Length { written: self.written, expected: manifest.length });
        }
        if manifest::content_root(&values, manifest.length, manifest.chunk_size) != Some(manifest.root) {
            return Err(FinishError::Manifest("the chaining values do not make up its content root"));
        }
        let digests = values.chunks(SEGMENT_CHUNKS as usize).map(|part| Segment { values: part.to_vec() }.digest());
        if !digests.eq(manifest.segments.iter().copied()) {
            return Err(FinishError::Manifest("the chaining values are not those of its segments"));
        }
        let ContentWriter { store, unfinished, file, .. } = self;
        let folder = &unfinished.path;
        // What was reserved too much goes back.
        let path = folder.join(CONTENT);
        file.set_len(manifest.length).and_then(|()| file.sync_all()).at(&path, "sync")?;
        segments::write_file(folder, &values)?;
        disk::write_new(&folder.join(MANIFEST), &protocol::codec::encode(signed))?;
        disk::write_new(&folder.join(COMPLETE), b"")?;
        Ok(store.adopt(unfinished, signed.digest())?)
    }
}
