//! Where each byte of a pack belongs among the files that come out of it. One place knows it, for files that are written
//! chunk by chunk as they come in any order, for those that are unpacked from first to last, and for reading a chunk back
//! out of them. Everything is below one folder that this process made and nobody else may enter, under names that were
//! checked one by one; links come last, so that no file is written through one.

use std::collections::{BTreeSet, VecDeque};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bincode::{Decode, Encode};
use protocol::ChunkSet;
use protocol::pack::{self, Entry, EntryKind};
use store::Step;

use crate::home::{At, FileError, sync_dir};
use crate::place::clear;
use crate::plain::Listed;
use crate::unpack::Selection;

/// Up to so many files and folders are each flushed to disk; beyond it one flush of the whole file system is faster.
const FLUSHED_EACH: usize = 256;
/// Files that are kept open for the next chunk. Chunks come roughly in order, from several seeders.
const OPEN: usize = 64;

/// What was kept of a product's files for verification: the list as published, and what the files' parts hashed to where
/// a chunk alone does not tell which of several files in it was changed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Inventory {
    pub(crate) list: Vec<u8>,
    /// BLAKE3 of each file's bytes in a chunk, for every chunk with bytes of several files, in order; absent for files that
    /// were not chosen.
    pub(crate) parts: Vec<Option<[u8; 32]>>,
}

// A list of 16 MiB; each of 100,000 entries shares at most two chunks with others.
protocol::wire!(Inventory => 24 * 1024 * 1024);

/// A product unpacked into its folder.
#[derive(Debug)]
pub(crate) struct Unpacked {
    /// The file or folder to be moved into its place.
    pub(crate) top: PathBuf,
    pub(crate) inventory: Inventory,
    pub(crate) files: u32,
    pub(crate) bytes: u64,
}

/// Why files are not complete.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IncompleteError {
    /// A file is gone or cut off; the chunk in which it begins.
    #[error("a file of chunk {0} is gone or cut off")]
    Lost(u32),
    #[error(transparent)]
    File(#[from] FileError),
}

/// The files of one pack in a folder.
pub(crate) struct Layout {
    dir: PathBuf,
    /// What the list's paths are relative to.
    root: PathBuf,
    listed: Listed,
    head: Vec<u8>,
    selection: Selection,
    /// Plain bytes in each chunk but the last.
    payload: u64,
    /// Files with bytes, in order.
    files: Vec<Span>,
    open: Mutex<VecDeque<(usize, Arc<File>)>>,
    /// One writer at a time: the system lets only one into a file, and those who wait there spin.
    writing: Mutex<()>,
    unflushed: Mutex<Unflushed>,
}

/// A file's bytes among those of the pack.
#[derive(Debug)]
struct Span {
    entry: usize,
    start: u64,
    size: u64,
}

/// Written since the last flush.
#[derive(Debug, Default)]
struct Unflushed {
    files: BTreeSet<usize>,
    folders: BTreeSet<PathBuf>,
}

/// A file's bytes in a chunk.
struct Part {
    /// Index into the files.
    file: usize,
    /// Where they begin in the file.
    within: u64,
    /// Where they are in the chunk.
    range: Range<usize>,
}

impl std::fmt::Debug for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layout").field("dir", &self.dir).field("files", &self.files.len()).finish_non_exhaustive()
    }
}

impl Layout {
    /// The files of a checked list below `dir`. Nothing is made yet.
    pub(crate) fn new(dir: PathBuf, listed: Listed, selection: Selection, payload: u64) -> Layout {
        let top = dir.join(&listed.list.name);
        let root = if listed.list.single_file { dir.clone() } else { top };
        let mut head = pack::header(listed.bytes.len() as u64).to_vec();
        head.extend_from_slice(&listed.bytes);
        let mut start = listed.head;
        let mut files = Vec::new();
        for (entry, listed) in listed.list.entries.iter().enumerate() {
            if let EntryKind::File { size, .. } = listed.kind
                && size > 0
            {
                files.push(Span { entry, start, size });
                start += size;
            }
        }
        let (open, writing, unflushed) = (Mutex::default(), Mutex::default(), Mutex::default());
        Layout { dir, root, listed, head, selection, payload: payload.max(1), files, open, writing, unflushed }
    }

    /// Makes the folder anew, the folders in it, and with `room` room for the larger files: a full disk shows now.
    pub(crate) fn make(&self, room: bool) -> Result<(), FileError> {
        clear(&self.dir)?;
        DirBuilder::new().mode(0o700).create(&self.dir).at("make the folder", &self.dir)?;
        self.folder(&self.root)?;
        for (index, entry) in self.chosen() {
            if entry.kind == EntryKind::Folder {
                self.folder(&self.root.join(&entry.path))?;
            }
            if let EntryKind::File { size, .. } = entry.kind
                && size >= self.payload
                && room
                && let Ok(span) = self.files.binary_search_by_key(&index, |span| span.entry)
            {
                let file = self.file_for_writing(span)?;
                delivery::reserve(&file, size).at("reserve space for", &self.root.join(&entry.path))?;
            }
        }
        Ok(())
    }

    /// Name of the file or folder that it becomes.
    pub(crate) fn name(&self) -> &str {
        &self.listed.list.name
    }

    /// Bytes of the chosen files.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().filter(|span| self.selection.has(span.entry)).map(|span| span.size).sum()
    }

    /// The list's bytes as they lie in the pack, header first.
    pub(crate) fn head(&self) -> &[u8] {
        &self.head
    }

    /// The chunks with bytes of chosen files.
    pub(crate) fn chunks(&self) -> ChunkSet {
        let chunk = |at: u64| u32::try_from(at / self.payload).unwrap_or(u32::MAX);
        let mut chunks = ChunkSet::new();
        for span in self.files.iter().filter(|span| self.selection.has(span.entry)) {
            chunks.insert_range(chunk(span.start)..chunk(span.start + span.size - 1).saturating_add(1));
        }
        chunks
    }

    /// Writes a chunk's plain bytes to where they belong; those of files that were not chosen are dropped. Returns how many
    /// were written.
    pub(crate) fn write(&self, chunk: u32, plain: &[u8]) -> Result<u64, FileError> {
        let head = self.head_of(chunk, plain.len());
        if plain.get(..head.len()) != Some(head) {
            let source = io::Error::new(io::ErrorKind::InvalidData, "the list of files beside them is not theirs");
            return Err(FileError { doing: "write files in", path: self.dir.clone(), source });
        }
        let mut written = 0;
        for part in self.parts(chunk, plain.len()).filter(|part| self.is_chosen(part)) {
            let file = self.file_for_writing(part.file)?;
            let bytes = plain.get(part.range).unwrap_or_default();
            written += bytes.len() as u64;
            {
                let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
                file.write_all_at(bytes, part.within).at("write", &self.path(part.file))?;
            }
            // After the write: what is flushed between the two is not noted as held before the next flush.
            self.unflushed().files.insert(part.file);
        }
        Ok(written)
    }

    /// Reads a chunk's plain bytes back, filling `plain`. Of the kind `UnexpectedEof` when a file is gone or cut off.
    pub(crate) fn read(&self, chunk: u32, plain: &mut [u8]) -> Result<(), FileError> {
        self.read_or(None, chunk, plain)
    }

    /// The same, where files that are gone or cut off are looked for in `other`, which has the same list.
    pub(crate) fn read_or(&self, other: Option<&Layout>, chunk: u32, plain: &mut [u8]) -> Result<(), FileError> {
        let head = self.head_of(chunk, plain.len());
        if let Some(place) = plain.get_mut(..head.len()) {
            place.copy_from_slice(head);
        }
        for part in self.parts(chunk, plain.len()) {
            let Some(place) = plain.get_mut(part.range.clone()) else { continue };
            match (self.read_part(&part, place), other) {
                (Err(error), Some(other)) if is_gone(&error) => other.read_part(&part, place),
                (read, _) => read,
            }
            .map_err(|error| if is_gone(&error) { io::ErrorKind::UnexpectedEof.into() } else { error })
            .at("read", &self.path(part.file))?;
        }
        Ok(())
    }

    fn read_part(&self, part: &Part, place: &mut [u8]) -> io::Result<()> {
        match self.kept_open(part.file) {
            Some(file) => file.read_exact_at(place, part.within),
            None => open_plain(&self.path(part.file)).and_then(|file| file.read_exact_at(place, part.within)),
        }
    }

    /// Makes durable what was written.
    pub(crate) fn sync(&self) -> Result<(), FileError> {
        let Unflushed { files, folders } = std::mem::take(&mut *self.unflushed());
        let flushed = if files.len() + folders.len() > FLUSHED_EACH {
            flush_all(&self.dir)
        } else {
            let each = files.iter().try_for_each(|file| {
                let path = self.path(*file);
                match self.kept_open(*file) {
                    Some(file) => file.sync_data(),
                    None => File::open(&path).and_then(|file| file.sync_data()),
                }
                // What is gone is found when the files are looked at in the end.
                .or_else(|error| if is_gone(&error) { Ok(()) } else { Err(error) })
                .at("flush", &path)
            });
            each.and_then(|()| folders.iter().try_for_each(|folder| sync_dir(folder)))
        };
        if flushed.is_err() {
            let mut unflushed = self.unflushed();
            unflushed.files.extend(files);
            unflushed.folders.extend(folders);
        }
        flushed
    }

    /// Makes what has no bytes, once all chunks were written: empty files, folders, links; then flushes everything.
    pub(crate) fn finish(&self) -> Result<Unpacked, IncompleteError> {
        // A file that was taken away from under an open handle is gone.
        self.opened().clear();
        self.folder(&self.root)?;
        let mut files = 0;
        for (_, entry) in self.chosen() {
            let path = self.root.join(&entry.path);
            match entry.kind {
                EntryKind::Folder => self.folder(&path)?,
                EntryKind::File { size: 0, executable } => {
                    self.parent(&path)?;
                    let file = creating(executable).truncate(true).open(&path).at("make", &path)?;
                    file.sync_all().at("flush", &path)?;
                    files += 1;
                }
                EntryKind::File { .. } => files += 1,
                EntryKind::Link { .. } => {}
            }
        }
        for (index, span) in self.files.iter().enumerate() {
            if self.selection.has(span.entry) {
                self.check_length(index, span)?;
            }
        }
        let inventory = Inventory { list: self.listed.bytes.clone(), parts: self.hashes()? };
        for (_, entry) in self.chosen() {
            if let EntryKind::Link { target } = &entry.kind {
                self.link(&self.root.join(&entry.path), target)?;
            }
        }
        Step::ClientUnpacked.before();
        self.sync()?;
        Step::ClientUnpacked.after();
        Ok(Unpacked { top: self.dir.join(&self.listed.list.name), inventory, files, bytes: self.bytes() })
    }

    fn chosen(&self) -> impl Iterator<Item = (usize, &Entry)> {
        self.listed.list.entries.iter().enumerate().filter(|(index, _)| self.selection.has(*index))
    }

    fn is_chosen(&self, part: &Part) -> bool {
        self.files.get(part.file).is_some_and(|span| self.selection.has(span.entry))
    }

    /// The list's bytes in a chunk of so many plain bytes.
    fn head_of(&self, chunk: u32, length: usize) -> &[u8] {
        let start = usize::try_from(u64::from(chunk) * self.payload).unwrap_or(usize::MAX);
        let end = start.saturating_add(length).min(self.head.len());
        self.head.get(start..end).unwrap_or_default()
    }

    /// The files' bytes in a chunk of so many plain bytes, in order.
    fn parts(&self, chunk: u32, length: usize) -> impl Iterator<Item = Part> {
        let start = u64::from(chunk) * self.payload;
        let end = start + length as u64;
        let first = self.files.partition_point(|span| span.start + span.size <= start);
        let spans = self.files.iter().enumerate().skip(first).take_while(move |(_, span)| span.start < end);
        spans.map(move |(file, span)| {
            let (from, to) = (span.start.max(start), (span.start + span.size).min(end));
            let within_chunk = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
            Part { file, within: from - span.start, range: within_chunk(from)..within_chunk(to) }
        })
    }

    /// The hashes of the inventory, read back from the files.
    fn hashes(&self) -> Result<Vec<Option<[u8; 32]>>, IncompleteError> {
        let mut hashes = Vec::new();
        let mut bytes = Vec::new();
        for chunk in self.shared_chunks() {
            for part in self.parts(chunk, usize::try_from(self.payload).unwrap_or(usize::MAX)) {
                if !self.is_chosen(&part) {
                    hashes.push(None);
                    continue;
                }
                let path = self.path(part.file);
                bytes.resize(part.range.len(), 0);
                match File::open(&path).and_then(|file| file.read_exact_at(&mut bytes, part.within)) {
                    Err(error) if is_gone(&error) => return Err(IncompleteError::Lost(chunk)),
                    read => read.at("read", &path)?,
                }
                hashes.push(Some(*blake3::hash(&bytes).as_bytes()));
            }
        }
        Ok(hashes)
    }

    /// Chunks with bytes of several files, in order.
    fn shared_chunks(&self) -> Vec<u32> {
        let chunk = |at: u64| u32::try_from(at / self.payload).unwrap_or(u32::MAX);
        // A file that begins in the chunk in which the one before it ends.
        let begun = self.files.iter().skip(1).filter(|span| chunk(span.start) == chunk(span.start - 1));
        let mut chunks: Vec<u32> = begun.map(|span| chunk(span.start)).collect();
        chunks.dedup();
        chunks
    }

    fn check_length(&self, index: usize, span: &Span) -> Result<(), IncompleteError> {
        let path = self.path(index);
        let lost = IncompleteError::Lost(u32::try_from(span.start / self.payload).unwrap_or(u32::MAX));
        match fs::symlink_metadata(&path) {
            Ok(found) if !found.is_file() || found.len() < span.size => Err(lost),
            Ok(found) if found.len() > span.size => {
                let file = OpenOptions::new().write(true).open(&path);
                Ok(file.and_then(|file| file.set_len(span.size)).at("cut to its length", &path)?)
            }
            Ok(_) => Ok(()),
            Err(error) if is_gone(&error) => Err(lost),
            Err(error) => Ok(Err(error).at("look at", &path)?),
        }
    }

    fn link(&self, path: &Path, target: &str) -> Result<(), FileError> {
        self.parent(path)?;
        clear(path)?;
        std::os::unix::fs::symlink(target, path).at("make the link", path)?;
        self.unflushed().folders.extend(path.parent().map(Path::to_owned));
        Ok(())
    }

    fn folder(&self, path: &Path) -> Result<(), FileError> {
        // It is there already when it holds a chosen file that came before; the list says that it is a folder.
        fs::create_dir_all(path).at("make the folder", path)?;
        let mut unflushed = self.unflushed();
        unflushed.folders.insert(path.to_owned());
        unflushed.folders.extend(path.parent().map(Path::to_owned));
        Ok(())
    }

    /// With only some entries chosen, folders above them may not have been.
    fn parent(&self, path: &Path) -> Result<(), FileError> {
        path.parent().map_or(Ok(()), |parent| self.folder(parent))
    }

    fn path(&self, file: usize) -> PathBuf {
        let entry = self.files.get(file).and_then(|span| self.listed.list.entries.get(span.entry));
        entry.map_or_else(|| self.root.clone(), |entry| self.root.join(&entry.path))
    }

    fn kept_open(&self, file: usize) -> Option<Arc<File>> {
        self.opened().iter().find(|(kept, _)| *kept == file).map(|(_, open)| Arc::clone(open))
    }

    fn file_for_writing(&self, file: usize) -> Result<Arc<File>, FileError> {
        if let Some(open) = self.kept_open(file) {
            return Ok(open);
        }
        let path = self.path(file);
        let executable = self.files.get(file).and_then(|span| self.listed.list.entries.get(span.entry));
        let executable = executable.is_some_and(|entry| matches!(entry.kind, EntryKind::File { executable: true, .. }));
        let opened = match OpenOptions::new().read(true).write(true).custom_flags(no_follow()).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.parent(&path)?;
                let made = creating(executable).truncate(false).open(&path);
                self.unflushed().folders.extend(path.parent().map(Path::to_owned));
                made
            }
            other => other,
        };
        let opened = Arc::new(opened.at("make", &path)?);
        let mut open = self.opened();
        open.push_back((file, Arc::clone(&opened)));
        if open.len() > OPEN {
            open.pop_front();
        }
        Ok(opened)
    }

    // A thread that panicked while it held one of these locks was between two plain assignments.
    fn opened(&self) -> std::sync::MutexGuard<'_, VecDeque<(usize, Arc<File>)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unflushed(&self) -> std::sync::MutexGuard<'_, Unflushed> {
        self.unflushed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For a file that is to be made: what the user's mask takes away of its mode stays away.
fn creating(executable: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    let mode = if executable { 0o777 } else { 0o666 };
    options.read(true).write(true).create(true).mode(mode).custom_flags(no_follow());
    options
}

/// For reading what may lie where others write, too: not through a link, and a pipe is not waited for.
fn open_plain(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    OpenOptions::new().read(true).custom_flags(i32::try_from(flags.bits()).unwrap_or(0)).open(path)
}

fn no_follow() -> i32 {
    i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::UnexpectedEof)
}

/// Everything written to the file system that holds `dir`.
fn flush_all(dir: &Path) -> Result<(), FileError> {
    let folder = File::open(dir).at("open the folder", dir)?;
    #[cfg(target_os = "linux")]
    rustix::fs::syncfs(&folder).at("flush the disk under", dir)?;
    #[cfg(not(target_os = "linux"))]
    folder.sync_all().at("flush the folder", dir)?;
    Ok(())
}
