//! A client that has the key keeps a product as the files that it becomes: each chunk is decrypted while it is warm in
//! the cache and written once, to where it belongs. No ciphertext lies on the disk. A chunk is read back by encrypting the
//! files' bytes again, which gives the very same bytes, since a frame's nonce is its number; so everything that the
//! content store does for a resumed fetch works as it does on ciphertext.
//!
//! ```text
//! <content's folder>/
//!     early/<chunk>   ciphertext of chunks that came before the list of files was whole
//!     head            the list of files as it lies in the pack; there once `files` was made
//!     files/<name>    the product
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use delivery::{Bodies, Body, Ciphertext, ContentError, Damaged};
use protocol::cipher::{ContentSecret, FrameCipher, TAG_LEN};
use protocol::codec::Wire;
use protocol::manifest::Manifest;
use protocol::pack::{FileList, HEADER_LEN};
use store::Step;

use crate::home::{At, FileError, make_private_dir, read_file, replace_file, sync_dir};
use crate::layout::{IncompleteError, Layout, Unpacked};
use crate::place::clear;
use crate::plain::{Frames, Listed, Plain, PlainError, listed, payload, plain_length};
use crate::unpack::{Selection, UnpackError};

const EARLY: &str = "early";
const HEAD: &str = "head";
const FILES: &str = "files";

/// Bytes of ciphertext that lie in both places at most, while they move from one to the other.
const MOVED: usize = 64 * 1024 * 1024;

/// The bodies of a store for which the content key is known.
#[derive(Debug)]
pub(crate) struct InPlaceBodies {
    secret: ContentSecret,
    /// Are new contents to be kept so? Those there already stay as they were begun.
    begin: bool,
    ciphertext: Ciphertext,
}

impl InPlaceBodies {
    pub(crate) fn new(secret: ContentSecret, begin: bool) -> Self {
        // What is not begun so is a part, of which nobody knows the size before the list of files is here.
        InPlaceBodies { secret, begin, ciphertext: Ciphertext::sparse() }
    }

    /// A key that is not this product's is complained of when everything is here, with the product's name.
    fn fits(&self, manifest: &Manifest) -> bool {
        self.secret.commitment() == manifest.key_commitment
    }
}

impl Bodies for InPlaceBodies {
    fn make(&self, folder: &Path, manifest: &Manifest) -> Result<(), delivery::FileError> {
        match self.begin && self.fits(manifest) {
            true => fs::create_dir(folder.join(EARLY)).at("make the folder", folder).map_err(outward),
            false => self.ciphertext.make(folder, manifest),
        }
    }

    fn needs(&self, manifest: &Manifest) -> u64 {
        match self.begin && self.fits(manifest) {
            true => manifest.length,
            false => self.ciphertext.needs(manifest),
        }
    }

    fn open(&self, folder: &Path, manifest: &Manifest) -> Result<Arc<dyn Body>, ContentError> {
        if Ciphertext::is_in(folder) || !self.fits(manifest) {
            return self.ciphertext.open(folder, manifest);
        }
        Ok(Arc::new(InPlace::open(folder, manifest, &self.secret)?))
    }
}

/// One product, decrypted where it belongs.
pub(crate) struct InPlace {
    folder: PathBuf,
    manifest: Manifest,
    secret: ContentSecret,
    cipher: FrameCipher,
    state: RwLock<State>,
    trouble: Mutex<Option<PlainError>>,
}

#[derive(Default)]
struct State {
    /// Chunks that lie in a file of their own, and nowhere else for certain.
    early: BTreeSet<u32>,
    /// Those that lie in both places, and may not be durable yet where they belong.
    moved: BTreeSet<u32>,
    layout: Option<Arc<Layout>>,
}

impl std::fmt::Debug for InPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InPlace").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl InPlace {
    fn open(folder: &Path, manifest: &Manifest, secret: &ContentSecret) -> Result<InPlace, ContentError> {
        let damaged = |file: PathBuf, what: &str| Damaged { file, what: what.to_owned() };
        let cipher = FrameCipher::new(secret, manifest.content, manifest.chunks());
        let cipher = cipher.ok_or_else(|| damaged(folder.to_owned(), "its key cannot be used"))?;
        let mut this = InPlace {
            folder: folder.to_owned(),
            manifest: manifest.clone(),
            secret: secret.clone(),
            cipher,
            state: RwLock::default(),
            trouble: Mutex::default(),
        };
        let head = folder.join(HEAD);
        let most = <FileList as Wire>::MAX + HEADER_LEN;
        let layout = match read_file(&head, most).map_err(outward)? {
            None => None,
            Some(bytes) => {
                let listed = listed(&bytes, plain_length(manifest));
                Some(this.layout(listed.map_err(|error| damaged(head, &error.to_string()))?))
            }
        };
        let mut state = State { layout: layout.map(Arc::new), ..State::default() };
        this.take_early(&mut state).map_err(outward)?;
        this.state = RwLock::new(state);
        Ok(this)
    }

    /// Looks for chunks that came early in an earlier run. They were verified then; what does not authenticate any more is
    /// no use.
    fn take_early(&self, state: &mut State) -> Result<(), FileError> {
        let folder = self.folder.join(EARLY);
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.at("list the folder", &folder)?,
        };
        for entry in entries {
            let path = entry.at("list the folder", &folder)?.path();
            let chunk = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            let mut sealed = read_file(&path, self.manifest.chunk_size as usize)?.unwrap_or_default();
            match chunk.map(|chunk| (chunk, self.cipher.open(chunk, &mut sealed))) {
                Some((chunk, Ok(_))) => drop(state.early.insert(chunk)),
                _ => clear(&path)?,
            }
        }
        self.move_early(state)
    }

    /// Puts what was put aside to where it belongs, where that is known. It lies in both places until it is durable there: not
    /// all of it at once, for which there may be no room.
    fn move_early(&self, state: &mut State) -> Result<(), FileError> {
        let Some(layout) = state.layout.clone() else { return Ok(()) };
        let mut bytes = 0;
        while let Some(chunk) = state.early.first().copied() {
            let mut sealed = self.read_early(chunk)?;
            self.write_open(&layout, chunk, &mut sealed)?;
            state.early.remove(&chunk);
            state.moved.insert(chunk);
            bytes += sealed.len();
            if bytes >= MOVED {
                layout.sync()?;
                self.drop_moved(state)?;
                bytes = 0;
            }
        }
        Ok(())
    }

    fn layout(&self, listed: Listed) -> Layout {
        Layout::new(self.folder.join(FILES), listed, Selection::all(), payload(&self.manifest))
    }

    fn early(&self, chunk: u32) -> PathBuf {
        self.folder.join(EARLY).join(chunk.to_string())
    }

    /// The files, once all chunks are here: what has no bytes is made, and everything is durable.
    pub(crate) fn finish(&self) -> Result<Unpacked, UnpackError> {
        let layout = self.state.read().unwrap_or_else(PoisonError::into_inner).layout.clone();
        // Chunk 0 was not there, then.
        let layout = layout.ok_or(PlainError::NotHere(0))?;
        layout.finish().map_err(|error| match error {
            IncompleteError::Lost(chunk) => PlainError::Damaged(chunk).into(),
            IncompleteError::File(error) => error.into(),
        })
    }

    /// The folder that the files are made in.
    pub(crate) fn files(&self) -> PathBuf {
        self.folder.join(FILES)
    }

    /// Name of the file or folder that it becomes, once the list of files is here.
    pub(crate) fn name(&self) -> Option<String> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.layout.as_ref().map(|layout| layout.name().to_owned())
    }

    /// Why a write failed, if that was for what is in the product.
    pub(crate) fn trouble(&self) -> Option<PlainError> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The product itself is wrong: no other seeder, and no other disk, could help.
    fn unusable(&self, error: PlainError) -> FileError {
        let source = io::Error::new(io::ErrorKind::InvalidData, error.to_string());
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        FileError { doing: "decrypt into", path: self.folder.clone(), source }
    }

    fn write_open(&self, layout: &Layout, chunk: u32, sealed: &mut [u8]) -> Result<(), FileError> {
        match self.cipher.open(chunk, sealed) {
            Ok(plain) => layout.write(chunk, plain).map(drop),
            Err(error) => Err(self.unusable(error.into())),
        }
    }

    /// Puts a chunk aside, and makes the files as soon as their list is whole.
    fn write_early(&self, state: &mut State, chunk: u32, sealed: &[u8]) -> Result<(), FileError> {
        make_private_dir(&self.folder.join(EARLY))?;
        replace_file(&self.early(chunk), sealed, false)?;
        state.early.insert(chunk);
        if !state.early.contains(&0) {
            return Ok(());
        }
        let mut plain = match Plain::new(Early(self), &self.manifest, &self.secret) {
            Ok(plain) => plain,
            Err(error) => return Err(self.unusable(error)),
        };
        let layout = match plain.list() {
            Ok(listed) => self.layout(listed),
            Err(PlainError::NotHere(_)) => return Ok(()),
            Err(error) => return Err(self.unusable(error)),
        };
        // What was put aside lies in its place, too, before it is dropped: where there is no room for all of both, no room is
        // reserved, and it moves a little at a time.
        let room = delivery::free_space(&self.folder).is_ok_and(|free| free >= layout.bytes());
        layout.make(room)?;
        layout.sync()?;
        Step::ClientLaidOut.before();
        replace_file(&self.folder.join(HEAD), layout.head(), true)?;
        Step::ClientLaidOut.after();
        let layout = state.layout.insert(Arc::new(layout)).clone();
        self.move_early(state)?;
        layout.sync()?;
        self.drop_moved(state)
    }

    fn read_early(&self, chunk: u32) -> Result<Vec<u8>, FileError> {
        let path = self.early(chunk);
        let bytes = read_file(&path, self.manifest.chunk_len(chunk) as usize)?;
        bytes.ok_or(io::ErrorKind::UnexpectedEof).at("read", &path)
    }

    fn sync_early(&self) -> Result<(), FileError> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        for chunk in &state.early {
            let path = self.early(*chunk);
            fs::File::open(&path).and_then(|file| file.sync_all()).at("flush", &path)?;
        }
        sync_dir(&self.folder.join(EARLY))
    }

    /// Drops what was put aside and moved, once it is durable where it belongs.
    fn drop_moved(&self, state: &mut State) -> Result<(), FileError> {
        while let Some(chunk) = state.moved.first().copied() {
            clear(&self.early(chunk))?;
            state.moved.remove(&chunk);
        }
        Ok(())
    }
}

impl Body for InPlace {
    fn read(&self, chunk: u32, buffer: &mut Vec<u8>) -> Result<(), delivery::FileError> {
        let (layout, early) = {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            (state.layout.clone(), state.early.contains(&chunk))
        };
        let Some(layout) = layout.filter(|_| !early) else {
            *buffer = self.read_early(chunk).map_err(outward)?;
            return Ok(());
        };
        buffer.truncate(buffer.len().saturating_sub(TAG_LEN));
        layout.read(chunk, buffer).map_err(outward)?;
        self.cipher.seal(chunk, buffer).map_err(io::Error::other).at("encrypt", &self.folder).map_err(outward)
    }

    fn write(&self, chunk: u32, bytes: &mut [u8]) -> Result<(), delivery::FileError> {
        let layout = self.state.read().unwrap_or_else(PoisonError::into_inner).layout.clone();
        if let Some(layout) = layout {
            return self.write_open(&layout, chunk, bytes).map_err(outward);
        }
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        // Another chunk may have brought the end of the list meanwhile.
        match state.layout.clone() {
            Some(layout) => self.write_open(&layout, chunk, bytes),
            None => self.write_early(&mut state, chunk, bytes),
        }
        .map_err(outward)
    }

    fn sync(&self) -> Result<(), delivery::FileError> {
        let layout = self.state.read().unwrap_or_else(PoisonError::into_inner).layout.clone();
        let Some(layout) = layout else { return self.sync_early().map_err(outward) };
        let moved = {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            // What a full disk left where it was.
            self.move_early(&mut state).map_err(outward)?;
            std::mem::take(&mut state.moved)
        };
        // Others go on to write meanwhile.
        layout.sync().map_err(outward)?;
        moved.into_iter().try_for_each(|chunk| clear(&self.early(chunk))).map_err(outward)
    }
}

/// Chunks that were put aside: verified before, or authenticated when they were found.
struct Early<'a>(&'a InPlace);

impl Frames for Early<'_> {
    fn read(&mut self, frame: u32, buffer: &mut Vec<u8>) -> Result<(), PlainError> {
        match self.0.read_early(frame) {
            Ok(bytes) => *buffer = bytes,
            Err(error) if error.source.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(PlainError::NotHere(frame));
            }
            Err(error) => return Err(PlainError::Disk(outward(error))),
        }
        Ok(())
    }

    fn is_intact(&self, _: u32, _: &[u8]) -> bool {
        true
    }
}

/// The same error as the content store's.
fn outward(FileError { doing, path, source }: FileError) -> delivery::FileError {
    delivery::FileError { path, doing, source }
}
