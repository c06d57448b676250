//! From verified ciphertext back to the bytes of a pack, a frame at a time: whatever the product's size, one frame is in
//! memory, and no byte leaves here that did not authenticate at its place.

use std::sync::Arc;

use delivery::{Content, ReadError};
use protocol::cipher::{CipherError, ContentSecret, FrameCipher, TAG_LEN};
use protocol::codec::{self, Wire};
use protocol::manifest::Manifest;
use protocol::pack::{self, FileList, HEADER_LEN, PackError};

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

/// Reads the plain bytes of a pack.
pub(crate) struct Plain<F> {
    frames: F,
    cipher: FrameCipher,
    /// The ciphertext of the frame that was read last, kept apart so that it can be checked when it fails to open.
    sealed: Vec<u8>,
    open: Vec<u8>,
    loaded: Option<u32>,
    length: u64,
}

/// Plain bytes in each frame but the last.
pub(crate) fn payload(manifest: &Manifest) -> u64 {
    u64::from(manifest.chunk_size).saturating_sub(TAG_LEN as u64).max(1)
}

/// Plain bytes of all frames together.
pub(crate) fn plain_length(manifest: &Manifest) -> u64 {
    manifest.length.saturating_sub(u64::from(manifest.chunks()) * TAG_LEN as u64)
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
        Ok(Plain { frames, cipher, sealed: Vec::new(), open: Vec::new(), loaded: None, length: plain_length(manifest) })
    }

    /// The plain bytes of a frame.
    pub(crate) fn frame(&mut self, frame: u32) -> Result<&[u8], PlainError> {
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
        Ok(&self.open)
    }

    /// The first bytes, up to `end`.
    fn begin(&mut self, end: u64) -> Result<Vec<u8>, PlainError> {
        let mut bytes = Vec::with_capacity(usize::try_from(end).unwrap_or(0).min(<FileList as Wire>::MAX));
        for frame in 0.. {
            let left = usize::try_from(end - bytes.len() as u64).unwrap_or(usize::MAX);
            if left == 0 {
                break;
            }
            let plain = self.frame(frame)?;
            bytes.extend_from_slice(plain.get(..left).unwrap_or(plain));
        }
        Ok(bytes)
    }

    /// How many plain bytes the header and the list take.
    pub(crate) fn head_length(&mut self) -> Result<u64, PlainError> {
        if self.length < HEADER_LEN as u64 {
            return Err(malformed("it is shorter than a header"));
        }
        head_length(&self.begin(HEADER_LEN as u64)?, self.length)
    }

    /// The list of files, with every check that unpacking relies on.
    pub(crate) fn list(&mut self) -> Result<Listed, PlainError> {
        let head = self.head_length()?;
        listed(&self.begin(head)?, self.length)
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

/// The list of files from the header and the list as they lie at the begin of a pack of so many bytes.
pub(crate) fn listed(head: &[u8], length: u64) -> Result<Listed, PlainError> {
    if head_length(head, length)? != head.len() as u64 {
        return Err(malformed("it has another length than its header says"));
    }
    let bytes = head.get(HEADER_LEN..).unwrap_or_default();
    let list: FileList = codec::decode(bytes).map_err(|e| malformed(e.to_string()))?;
    list.check()?;
    if list.total_size().and_then(|files| files.checked_add(head.len() as u64)) != Some(length) {
        return Err(malformed("the sizes of its files do not make up its length"));
    }
    Ok(Listed { list, bytes: bytes.to_owned(), head: head.len() as u64 })
}

fn head_length(head: &[u8], length: u64) -> Result<u64, PlainError> {
    let header = head.first_chunk::<HEADER_LEN>().ok_or_else(|| malformed("it is shorter than a header"))?;
    let head = HEADER_LEN as u64 + pack::read_header(header)?;
    if head > length {
        return Err(malformed("its list is longer than the product"));
    }
    Ok(head)
}
