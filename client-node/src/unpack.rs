//! Files out of a pack that a stranger made. Everything goes into a folder that this process made and nobody else may
//! enter, with names that were checked one by one; links come last, so that no file is written through one.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bincode::{Decode, Encode};
use protocol::pack::{Entry, EntryKind, FileList};

use crate::home::{At, FileError, sync_dir};
use crate::plain::{Frames, Listed, Plain, PlainError};

/// Up to so many files are each flushed to disk; beyond it one flush of the whole file system is faster.
const FLUSHED_EACH: usize = 256;

/// Why a product was not unpacked. What was fetched is kept.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The bytes cannot be read.
    #[error(transparent)]
    Plain(#[from] PlainError),
    /// The disk is full.
    #[error("no space left at {}: {needed} bytes are still to be written; free some, then fetch again", path.display())]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// Bytes still to be written.
        needed: u64,
    },
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// Nothing in the product is called so.
    #[error("nothing in the product is called '{wanted}'; it holds {}", listed(there))]
    NoSuchFile {
        /// What was asked for.
        wanted: String,
        /// Names that there are.
        there: Vec<String>,
    },
    /// The caller broke it off.
    #[error("stopped while unpacking; fetch again to go on")]
    Stopped,
}

fn listed(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let more = names.len().saturating_sub(SHOWN);
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("'{}'", name.escape_debug())).collect();
    match more {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// What was kept of a product's files for verification: the list as published, and what each file hashed to.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Inventory {
    pub(crate) list: Vec<u8>,
    /// BLAKE3 of each entry's bytes, in the order of the list; absent for what is no file or was not chosen.
    pub(crate) hashes: Vec<Option<[u8; 32]>>,
}

// A list of 16 MiB and 33 bytes for each of 100,000 entries.
protocol::wire!(Inventory => 20 * 1024 * 1024);

/// A product unpacked into its folder.
#[derive(Debug)]
pub(crate) struct Unpacked {
    /// The file or folder to be moved into its place.
    pub(crate) top: PathBuf,
    pub(crate) inventory: Inventory,
    pub(crate) files: u32,
    pub(crate) bytes: u64,
}

/// Which entries are wanted.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    chosen: Vec<bool>,
}

impl Selection {
    /// The entries that `only` names: a path, a folder with everything in it, or a pattern with `*` and `?`. Everything
    /// when it is empty.
    pub(crate) fn of(list: &FileList, only: &[String]) -> Result<Selection, UnpackError> {
        let mut chosen = vec![only.is_empty(); list.entries.len()];
        for wanted in only {
            let mut found = false;
            for (entry, chosen) in list.entries.iter().zip(&mut chosen) {
                if selects(wanted, &entry.path) {
                    *chosen = true;
                    found = true;
                }
            }
            if !found {
                let there = list.entries.iter().map(|entry| entry.path.clone()).collect();
                return Err(UnpackError::NoSuchFile { wanted: wanted.clone(), there });
            }
        }
        Ok(Selection { chosen })
    }

    fn has(&self, index: usize) -> bool {
        self.chosen.get(index).copied().unwrap_or(false)
    }

    /// Where the wanted files lie among the plain bytes, from the first file's begin.
    pub(crate) fn ranges(&self, list: &FileList) -> Vec<std::ops::Range<u64>> {
        let mut at = 0;
        let mut ranges = Vec::new();
        for (index, entry) in list.entries.iter().enumerate() {
            let EntryKind::File { size, .. } = entry.kind else { continue };
            if self.has(index) && size > 0 {
                ranges.push(at..at + size);
            }
            at += size;
        }
        ranges
    }

    /// Bytes of the wanted files.
    pub(crate) fn bytes(&self, list: &FileList) -> u64 {
        self.ranges(list).iter().map(|range| range.end - range.start).sum()
    }
}

pub(crate) fn selects(wanted: &str, path: &str) -> bool {
    let wanted = wanted.strip_suffix('/').unwrap_or(wanted);
    // A folder stands for what is in it; so does a pattern that matches one.
    path.match_indices('/').map(|(at, _)| at).chain([path.len()]).any(|end| {
        let part = path.get(..end).unwrap_or_default();
        part == wanted || matches(wanted.as_bytes(), part.as_bytes())
    })
}

/// `*` stands for any characters, `?` for one byte of them. Two indices and one way back: no blow-up.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                back = Some((p, t));
                p += 1;
            }
            Some(c) if *c == b'?' || Some(c) == text.get(t) => {
                p += 1;
                t += 1;
            }
            _ => match back {
                Some((star, from)) => {
                    back = Some((star, from + 1));
                    p = star + 1;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|c| *c == b'*')
}

/// Unpacks into `dir`, which is made anew: what an earlier run left there is removed. `progress` is told the bytes
/// written so far, and ends it by answering false.
pub(crate) fn unpack<F: Frames>(
    plain: &mut Plain<F>,
    listed: &Listed,
    selection: &Selection,
    dir: &Path,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<Unpacked, UnpackError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).at("empty", dir)?,
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).create(dir).at("make the folder", dir)?;
    let Listed { list, bytes, head } = listed;
    let top = dir.join(&list.name);
    let root = if list.single_file { dir.to_owned() } else { top.clone() };
    let total = selection.bytes(list);
    let mut writer = Writer { root, written: 0, total, flush: list.file_count() <= FLUSHED_EACH };
    if !list.single_file {
        fs::create_dir(&top).at("make the folder", &top)?;
    }
    plain.seek(*head);
    let mut at = *head;
    let mut hashes = Vec::with_capacity(list.entries.len());
    let mut files = 0;
    let mut folders = vec![dir.to_owned()];
    for (index, entry) in list.entries.iter().enumerate() {
        let mut hash = None;
        match (&entry.kind, selection.has(index)) {
            (EntryKind::Folder, true) => folders.push(writer.folder(entry)?),
            (EntryKind::File { size, executable }, true) => {
                writer.parent(entry)?;
                plain.seek(at);
                hash = Some(writer.file(entry, *size, *executable, plain, progress)?);
                files += 1;
            }
            _ => {}
        }
        if let EntryKind::File { size, .. } = entry.kind {
            at += size;
        }
        hashes.push(hash);
    }
    for (index, entry) in list.entries.iter().enumerate() {
        if let (EntryKind::Link { target }, true) = (&entry.kind, selection.has(index)) {
            writer.parent(entry)?;
            let path = writer.root.join(&entry.path);
            std::os::unix::fs::symlink(target, &path).at("make the link", &path)?;
        }
    }
    if writer.flush {
        if !list.single_file {
            folders.push(top.clone());
        }
        folders.iter().try_for_each(|folder| sync_dir(folder))?;
    } else {
        flush_all(dir)?;
    }
    let inventory = Inventory { list: bytes.clone(), hashes };
    Ok(Unpacked { top, inventory, files, bytes: writer.written })
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

struct Writer {
    root: PathBuf,
    written: u64,
    total: u64,
    flush: bool,
}

impl Writer {
    fn folder(&self, entry: &Entry) -> Result<PathBuf, UnpackError> {
        let path = self.root.join(&entry.path);
        // It is there already when it holds a chosen file that came before; the list says that it is a folder.
        fs::create_dir_all(&path).at("make the folder", &path)?;
        Ok(path)
    }

    /// With only some entries chosen, folders above them may not have been.
    fn parent(&self, entry: &Entry) -> Result<(), UnpackError> {
        if let Some((parent, _)) = entry.path.rsplit_once('/') {
            let path = self.root.join(parent);
            fs::create_dir_all(&path).at("make the folder", &path)?;
        }
        Ok(())
    }

    fn file<F: Frames>(
        &mut self,
        entry: &Entry,
        size: u64,
        executable: bool,
        plain: &mut Plain<F>,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<[u8; 32], UnpackError> {
        let path = self.root.join(&entry.path);
        let mode = if executable { 0o777 } else { 0o666 };
        // What the user's mask takes away stays away.
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
        let mut file = file.at("make", &path).map_err(|error| self.full_or(error))?;
        let mut hasher = blake3::Hasher::new();
        let (mut written, total) = (self.written, self.total);
        plain.copy(size, |part| {
            hasher.update(part);
            file.write_all(part).at("write", &path).map_err(|error| full_or(error, total.saturating_sub(written)))?;
            written += part.len() as u64;
            if progress(written) { Ok(()) } else { Err(UnpackError::Stopped) }
        })?;
        self.written = written;
        if self.flush {
            file.sync_all().at("flush", &path).map_err(|error| self.full_or(error))?;
        }
        Ok(*hasher.finalize().as_bytes())
    }

    fn full_or(&self, error: FileError) -> UnpackError {
        full_or(error, self.total.saturating_sub(self.written))
    }
}

fn full_or(error: FileError, needed: u64) -> UnpackError {
    match error.is_disk_full() {
        true => UnpackError::DiskFull { path: error.path, needed },
        false => UnpackError::File(error),
    }
}
