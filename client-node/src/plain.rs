//! From verified ciphertext back to the bytes of a pack, a frame at a time: whatever the product's size, one frame is in
//! memory, and no byte leaves here that did not authenticate at its place.

use std::sync::Arc;
use std::time::Duration;

use delivery::{Content, ReadError};
use protocol::cipher::{CipherError, ContentSecret, FrameCipher, TAG_LEN};
use protocol::codec::{self, Wire};
use protocol::manifest::Manifest;
use protocol::pack::{self, FileList, HEADER_LEN, PackError};
use tokio_util::sync::CancellationToken;

/// Why a product's bytes cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PlainError {
    /// The key is not that of the manifest.
    #[error("the key that came for it is not this product's; ask the merchant for another ticket")]
    WrongKey,
    /// A chunk does not authenticate although it is the one in the manifest: it was published so.
    #[error("{0} although it is the one in the manifest: the product was published wrongly; tell the merchant")]
    Cipher(#[from] CipherError),
    /// A chunk on disk is not the one that was verified when it came.
    #[error("chunk {0} was damaged on disk since it came; fetch again to replace it")]
    Damaged(u32),
    /// A chunk that is needed is not here.
    #[error("chunk {0} is not here; fetch again")]
    NotHere(u32),
    /// What is inside is no list of files, or not one that may be unpacked.
    #[error("the product's list of files is not usable: {0}; tell the merchant")]
    Pack(#[from] PackError),
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] delivery::FileError),
}

fn malformed(why: impl Into<String>) -> PlainError {
    PlainError::Pack(PackError::Malformed(why.into()))
}

/// Where encrypted frames come from.
pub(crate) trait Frames: Send {
    /// Reads one into `buffer`, replacing what is in it.
    fn read(&mut self, frame: u32, buffer: &mut Vec<u8>) -> Result<(), PlainError>;

    /// Is what was just read still what the manifest says? Asked when a frame does not authenticate.
    fn is_intact(&self, frame: u32, buffer: &[u8]) -> bool;
}

/// Frames out of a content on disk.
pub(crate) struct Stored(pub(crate) Arc<Content>);

impl Frames for Stored {
    fn read(&mut self, frame: u32, buffer: &mut Vec<u8>) -> Result<(), PlainError> {
        self.0.read_chunk(frame, buffer).map_err(|error| match error {
            ReadError::File(error) => PlainError::Disk(error),
            ReadError::NotHeld(_) | ReadError::Removed => PlainError::NotHere(frame),
        })
    }

    fn is_intact(&self, frame: u32, buffer: &[u8]) -> bool {
        let value = self.0.chaining_value(frame).ok().flatten();
        value.is_some_and(|value| self.0.manifest().verifies(frame, &value, buffer))
    }
}

/// Frames out of a content that is still being fetched: each is waited for.
pub(crate) struct Arriving {
    pub(crate) stored: Stored,
    /// Ends the waiting.
    pub(crate) stop: CancellationToken,
}

impl Frames for Arriving {
    fn read(&mut self, frame: u32, buffer: &mut Vec<u8>) -> Result<(), PlainError> {
        /// How soon the end is noticed while nothing arrives.
        const LOOK_UP: Duration = Duration::from_millis(100);
        while !self.stored.0.wait_for(frame, LOOK_UP) {
            if self.stop.is_cancelled() || self.stored.0.is_removed() {
                return Err(PlainError::NotHere(frame));
            }
        }
        self.stored.read(frame, buffer)
    }

    fn is_intact(&self, frame: u32, buffer: &[u8]) -> bool {
        self.stored.is_intact(frame, buffer)
    }
}

/// Reads the plain bytes of a pack.
pub(crate) struct Plain<F> {
    frames: F,
    cipher: FrameCipher,
    /// The ciphertext of the frame that was read last, kept apart so that it can be checked when it fails to open.
    sealed: Vec<u8>,
    open: Vec<u8>,
    loaded: Option<u32>,
    payload: u64,
    position: u64,
    length: u64,
}

/// Plain bytes in each frame but the last.
pub(crate) fn payload(manifest: &Manifest) -> u64 {
    u64::from(manifest.chunk_size).saturating_sub(TAG_LEN as u64).max(1)
}

impl<F: Frames> Plain<F> {
    pub(crate) fn new(frames: F, manifest: &Manifest, secret: &ContentSecret) -> Result<Self, PlainError> {
        if secret.commitment() != manifest.key_commitment {
            return Err(PlainError::WrongKey);
        }
        let chunks = manifest.chunks();
        // An empty last frame would never be read, and so the mark of the end never be checked.
        let last = chunks.checked_sub(1).map_or(0, |last| manifest.chunk_len(last) as usize);
        if last <= TAG_LEN {
            return Err(malformed("its last frame is empty"));
        }
        let cipher = FrameCipher::new(secret, manifest.content, chunks).ok_or(PlainError::WrongKey)?;
        Ok(Plain {
            frames,
            cipher,
            sealed: Vec::new(),
            open: Vec::new(),
            loaded: None,
            payload: payload(manifest),
            position: 0,
            length: manifest.length - u64::from(chunks) * TAG_LEN as u64,
        })
    }

    /// Goes on from there.
    pub(crate) fn seek(&mut self, position: u64) {
        self.position = position;
    }

    /// The bytes from the position to the end of its frame; none at the end.
    fn available(&mut self) -> Result<&[u8], PlainError> {
        if self.position >= self.length {
            return Ok(&[]);
        }
        let frame = u32::try_from(self.position / self.payload).unwrap_or(u32::MAX);
        let within = usize::try_from(self.position % self.payload).unwrap_or(usize::MAX);
        if self.loaded != Some(frame) {
            self.loaded = None;
            self.frames.read(frame, &mut self.sealed)?;
            match self.cipher.open_into(frame, &self.sealed, &mut self.open) {
                Ok(()) => {}
                Err(_) if !self.frames.is_intact(frame, &self.sealed) => return Err(PlainError::Damaged(frame)),
                Err(error) => return Err(error.into()),
            }
            self.loaded = Some(frame);
        }
        Ok(self.open.get(within..).unwrap_or_default())
    }

    /// Hands the next `count` bytes to `sink`, in pieces.
    pub(crate) fn copy<E: From<PlainError>>(
        &mut self,
        count: u64,
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut left = count;
        while left > 0 {
            let available = self.available()?;
            let take = available.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let part = available.get(..take).unwrap_or_default();
            if part.is_empty() {
                return Err(malformed("it ends before its last file").into());
            }
            sink(part)?;
            self.position += take as u64;
            left -= take as u64;
        }
        Ok(())
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>, PlainError> {
        let mut out = Vec::with_capacity(usize::try_from(count).unwrap_or(0).min(<FileList as Wire>::MAX));
        self.copy(count, |part| {
            out.extend_from_slice(part);
            Ok::<_, PlainError>(())
        })?;
        Ok(out)
    }

    /// How many plain bytes the header and the list take.
    pub(crate) fn head_length(&mut self) -> Result<u64, PlainError> {
        self.seek(0);
        if self.length < HEADER_LEN as u64 {
            return Err(malformed("it is shorter than a header"));
        }
        let header: [u8; HEADER_LEN] = self.bytes(HEADER_LEN as u64)?.try_into().unwrap_or_default();
        let head = HEADER_LEN as u64 + pack::read_header(&header)?;
        if head > self.length {
            return Err(malformed("its list is longer than the product"));
        }
        Ok(head)
    }

    /// The list of files, with every check that unpacking relies on; the position is then at the first file.
    pub(crate) fn list(&mut self) -> Result<Listed, PlainError> {
        let head = self.head_length()?;
        let bytes = self.bytes(head - HEADER_LEN as u64)?;
        let list: FileList = codec::decode(&bytes).map_err(|e| malformed(e.to_string()))?;
        list.check()?;
        let files = list.total_size();
        if files.and_then(|files| files.checked_add(head)) != Some(self.length) {
            return Err(malformed("the sizes of its files do not make up its length"));
        }
        Ok(Listed { list, bytes, head })
    }
}

/// A checked list of files.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub(crate) list: FileList,
    /// Its bytes as they were published.
    pub(crate) bytes: Vec<u8>,
    /// Where the first file begins among the plain bytes.
    pub(crate) head: u64,
}
