//! A content's bytes need not lie as they are sent: a client that has the key keeps them decrypted, in the files that they
//! become. So the store leaves the bytes to a body, and keeps to itself what is the same for all: what verifies, what is
//! held, and that data are durable before they are noted.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use protocol::manifest::Manifest;

use super::disk::{self, At, FileError};
use super::error::{ContentError, Damaged};
use super::freshness::Stamp;

pub(super) const CONTENT: &str = "content";

/// Data files that stay open although nobody uses them right now, over all contents: below the usual limit of 1,024
/// open files with room for connections. The one opened first is closed first.
const OPEN_FILES: usize = 128;

/// Decides how the contents of a store keep their bytes.
pub trait Bodies: fmt::Debug + Send + Sync {
    /// Makes the place for a new content's bytes in its folder.
    ///
    /// # Errors
    /// [`FileError`] when the disk fails or is full.
    fn make(&self, folder: &Path, manifest: &Manifest) -> Result<(), FileError>;

    /// Bytes that there must be room for before a place is made.
    fn needs(&self, manifest: &Manifest) -> u64 {
        manifest.length
    }

    /// Opens what was made there, by this process or an earlier one.
    ///
    /// # Errors
    /// [`ContentError::Damaged`] when it is not what was made.
    fn open(&self, folder: &Path, manifest: &Manifest) -> Result<Arc<dyn Body>, ContentError>;
}

/// The bytes of one content. All methods block, and are called from many threads at once.
pub trait Body: Any + fmt::Debug + Send + Sync {
    /// Reads a chunk as it is sent. `buffer` has its length and is filled.
    ///
    /// # Errors
    /// [`FileError`]: of the kind `UnexpectedEof` when the chunk is not there, or not whole.
    fn read(&self, chunk: u32, buffer: &mut Vec<u8>) -> Result<(), FileError>;

    /// Reads a part of a chunk as it is sent, from its byte `from` on. `buffer` has the part's length and is filled. False
    /// where the bytes do not lie as they are sent, so that only whole chunks can be read.
    ///
    /// # Errors
    /// As for [`Body::read`].
    fn read_part(&self, _chunk: u32, _from: u32, _buffer: &mut Vec<u8>) -> Result<bool, FileError> {
        Ok(false)
    }

    /// What changes whenever the bytes are written to, by anybody. `None` where there is no telling: then every chunk is
    /// verified every time that it is read.
    ///
    /// # Errors
    /// [`FileError`] when the disk fails.
    fn stamp(&self) -> Result<Option<Stamp>, FileError> {
        Ok(None)
    }

    /// Bytes for which there is no room on the disk yet.
    ///
    /// # Errors
    /// [`FileError`] when the disk fails.
    fn unreserved(&self) -> Result<u64, FileError> {
        Ok(0)
    }

    /// Puts a chunk that was verified into its place. What is in `bytes` afterwards is not to be used.
    ///
    /// # Errors
    /// [`FileError`] when the disk fails or is full.
    fn write(&self, chunk: u32, bytes: &mut [u8]) -> Result<(), FileError>;

    /// Makes durable whatever was written before the call.
    ///
    /// # Errors
    /// [`FileError`] when the disk fails.
    fn sync(&self) -> Result<(), FileError>;

    /// Looks whether what is read and written still lies where it was made: a file that was deleted or replaced stays open,
    /// and reads well, until the process ends. Another one in its place is used from now on. False when nothing is there.
    ///
    /// # Errors
    /// [`FileError`] when the disk fails.
    fn look_again(&self) -> Result<bool, FileError> {
        Ok(true)
    }
}

/// The usual way: one file of ciphertext for each content, reserved in full when it is made.
#[derive(Debug, Default)]
pub struct Ciphertext {
    files: Arc<OpenFiles>,
    sparse: bool,
}

impl Bodies for Ciphertext {
    fn make(&self, folder: &Path, manifest: &Manifest) -> Result<(), FileError> {
        let path = folder.join(CONTENT);
        match self.sparse {
            true => {
                let made = File::create_new(&path).and_then(|file| file.set_len(manifest.length));
                made.at(&path, "make")
            }
            false => disk::preallocate(&path, manifest.length).map(drop),
        }
    }

    fn needs(&self, manifest: &Manifest) -> u64 {
        if self.sparse { 0 } else { manifest.length }
    }

    fn open(&self, folder: &Path, manifest: &Manifest) -> Result<Arc<dyn Body>, ContentError> {
        let path = folder.join(CONTENT);
        let length = match fs::metadata(&path) {
            Ok(found) => found.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error).at(&path, "look at")?,
        };
        if length != manifest.length {
            let what = format!("it has {length} bytes, the manifest says {}", manifest.length);
            return Err(Damaged { file: path, what }.into());
        }
        let (files, chunk_size) = (Arc::clone(&self.files), manifest.chunk_size);
        Ok(Arc::new(CiphertextFile { path, chunk_size, files, file: Mutex::default() }))
    }
}

impl Ciphertext {
    /// Reserves nothing: for those who want a part, and see themselves that there is room for it.
    pub fn sparse() -> Self {
        Ciphertext { sparse: true, ..Ciphertext::default() }
    }

    /// Is there a file of this kind in the content's folder?
    pub fn is_in(folder: &Path) -> bool {
        folder.join(CONTENT).exists()
    }
}

#[derive(Debug)]
struct CiphertextFile {
    path: PathBuf,
    chunk_size: u32,
    files: Arc<OpenFiles>,
    file: Mutex<Weak<File>>,
}

impl CiphertextFile {
    fn file(&self) -> Result<Arc<File>, FileError> {
        let mut weak = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = weak.upgrade() {
            return Ok(file);
        }
        let file = OpenOptions::new().read(true).write(true).open(&self.path).at(&self.path, "open")?;
        let file = Arc::new(file);
        *weak = Arc::downgrade(&file);
        self.files.keep(Arc::clone(&file));
        Ok(file)
    }

    fn offset(&self, chunk: u32) -> u64 {
        u64::from(chunk) * u64::from(self.chunk_size)
    }
}

impl Body for CiphertextFile {
    fn read(&self, chunk: u32, buffer: &mut Vec<u8>) -> Result<(), FileError> {
        self.file()?.read_exact_at(buffer, self.offset(chunk)).at(&self.path, "read")
    }

    fn read_part(&self, chunk: u32, from: u32, buffer: &mut Vec<u8>) -> Result<bool, FileError> {
        let at = self.offset(chunk).saturating_add(u64::from(from));
        self.file()?.read_exact_at(buffer, at).at(&self.path, "read")?;
        Ok(true)
    }

    fn unreserved(&self) -> Result<u64, FileError> {
        use std::os::unix::fs::MetadataExt;
        let found = self.file()?.metadata().at(&self.path, "look at")?;
        Ok(found.len().saturating_sub(found.blocks().saturating_mul(512)))
    }

    fn stamp(&self) -> Result<Option<Stamp>, FileError> {
        self.file()?.metadata().map(|found| Some(Stamp::of(&found))).at(&self.path, "look at")
    }

    fn write(&self, chunk: u32, bytes: &mut [u8]) -> Result<(), FileError> {
        self.file()?.write_all_at(bytes, self.offset(chunk)).at(&self.path, "write")
    }

    fn sync(&self) -> Result<(), FileError> {
        self.file()?.sync_data().at(&self.path, "sync")
    }

    fn look_again(&self) -> Result<bool, FileError> {
        let there = match fs::metadata(&self.path) {
            Ok(there) => there,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error).at(&self.path, "look at"),
        };
        let mut weak = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = weak.upgrade() {
            let open = file.metadata().at(&self.path, "look at")?;
            if (open.dev(), open.ino()) != (there.dev(), there.ino()) {
                *weak = Weak::new();
            }
        }
        Ok(true)
    }
}

/// Keeps recently opened data files open.
#[derive(Debug, Default)]
struct OpenFiles {
    recent: Mutex<VecDeque<Arc<File>>>,
}

impl OpenFiles {
    fn keep(&self, file: Arc<File>) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.push_back(file);
        if recent.len() > OPEN_FILES {
            recent.pop_front();
        }
    }
}
