//! The few file operations whose order and errors matter after a crash or on a full disk.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// A file operation that failed: which, on what, why.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}: {source}", path.display())]
pub struct FileError {
    /// The file or folder.
    pub path: PathBuf,
    /// What was tried.
    pub doing: &'static str,
    /// Why it failed.
    pub source: io::Error,
}

impl FileError {
    /// The disk or the user's quota on it is full.
    pub fn is_disk_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }

    /// A sector that cannot be read, or a file that was cut off.
    pub fn is_damage(&self) -> bool {
        let unreadable = self.source.raw_os_error() == Some(Errno::IO.raw_os_error());
        unreadable || self.source.kind() == io::ErrorKind::UnexpectedEof
    }
}

/// Says what was done to which file when it fails.
pub(super) trait At<T> {
    fn at(self, path: &Path, doing: &'static str) -> Result<T, FileError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, path: &Path, doing: &'static str) -> Result<T, FileError> {
        self.map_err(|source| FileError { path: path.to_owned(), doing, source: source.into() })
    }
}

/// Bytes free for this user on the file system that holds `path`.
///
/// # Errors
/// [`FileError`] when the system does not say.
pub fn free_space(path: &Path) -> Result<u64, FileError> {
    let stat = rustix::fs::statvfs(path).at(path, "ask for the free space at")?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Files and folders that may still be made on the file system that holds `path`; `u64::MAX` where it has no such limit.
///
/// # Errors
/// [`FileError`] when the system does not say.
pub fn free_inodes(path: &Path) -> Result<u64, FileError> {
    let stat = rustix::fs::statvfs(path).at(path, "ask for the free inodes at")?;
    // Some file systems make inodes as needed and say 0 of 0.
    Ok(if stat.f_files == 0 { u64::MAX } else { stat.f_favail })
}

/// What a full disk has none left of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lacks {
    /// Place for bytes.
    Space,
    /// Entries for files and folders, of which a file system may have run out with bytes to spare.
    Inodes,
}

impl Lacks {
    /// Of the file system that holds `path`, which need not be there itself; space where the system does not say.
    pub fn at(path: &Path) -> Lacks {
        let free = |of: &Path| Some((free_space(of).ok()?, free_inodes(of).ok()?));
        let free = path.ancestors().find_map(free);
        free.map_or(Lacks::Space, |(bytes, inodes)| Lacks::of(bytes, inodes))
    }

    fn of(bytes: u64, inodes: u64) -> Lacks {
        if inodes == 0 && bytes > 0 { Lacks::Inodes } else { Lacks::Space }
    }
}

impl fmt::Display for Lacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Lacks::Space => "space",
            Lacks::Inodes => "inodes (each file and folder takes one)",
        })
    }
}

/// Makes a file of `length` bytes with its space reserved where the file system can do that, so that a full disk shows
/// now and not in the middle of a transfer.
pub(super) fn preallocate(path: &Path, length: u64) -> Result<File, FileError> {
    const DOING: &str = "reserve space for";
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).at(path, DOING)?;
    reserve(&file, length).at(path, DOING)?;
    Ok(file)
}

/// Gives a file its length, and reserves the space for it where that costs little. On a file system in memory it would
/// be paid page by page at once, while the network waits; there the disk may turn out full later.
///
/// # Errors
/// What the system says, above all that the disk is full.
pub fn reserve(file: &File, length: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        const TMPFS_MAGIC: u32 = 0x0102_1994;
        let in_memory = rustix::fs::fstatfs(file).is_ok_and(|found| u32::try_from(found.f_type) == Ok(TMPFS_MAGIC));
        if in_memory {
            return file.set_len(length);
        }
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, length) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(length),
        other => Ok(other?),
    }
}

/// Writes a new file and makes it durable.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    const DOING: &str = "write";
    let mut file = OpenOptions::new().write(true).create_new(true).open(path).at(path, DOING)?;
    file.write_all(bytes).at(path, DOING)?;
    file.sync_all().at(path, DOING)
}

/// Gives the file `from`, which is durable, the further name `to`; a copy where the file system knows no second names.
pub(super) fn link_or_copy(from: &Path, to: &Path) -> Result<(), FileError> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    const DOING: &str = "copy";
    fs::copy(from, to).at(from, DOING)?;
    File::open(to).and_then(|file| file.sync_all()).at(to, "sync")
}

/// Replaces a file in one step: after a crash it holds the old bytes or the new ones. The old ones stay in [`spare`]'s
/// file where the file system can exchange two names, and the next replacement is written over them: one of the same
/// length needs no room then, so it succeeds on a disk that has become full.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    const DOING: &str = "replace";
    let beside = spare(path);
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(&beside)?;
        file.write_all(bytes)?;
        file.set_len(bytes.len() as u64)?;
        file.sync_all()?;
        exchange(&beside, path)
    };
    match write().at(path, DOING) {
        // What it had changed places with before may lie on a bad sector.
        Err(error) if error.is_damage() => {
            remove(&beside)?;
            write().at(path, DOING)?;
        }
        written => written?,
    }
    sync_folder(path.parent().unwrap_or(path))
}

/// Where the bytes that replace a file are written first.
pub(super) fn spare(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Gives `new` the name `old`, and the file that had it the other name, if both are possible.
fn exchange(new: &Path, old: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE) {
            // There is nothing to exchange it for, or the file system cannot.
            Err(Errno::NOENT | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
            other => return Ok(other?),
        }
    }
    fs::rename(new, old)
}

/// Bytes of the files in a folder, by their lengths.
pub(super) fn bytes_in(folder: &Path) -> Result<u64, FileError> {
    const DOING: &str = "look at";
    let mut bytes = 0_u64;
    for entry in fs::read_dir(folder).at(folder, DOING)? {
        let found = entry.and_then(|entry| entry.metadata()).at(folder, DOING)?;
        bytes = bytes.saturating_add(if found.is_file() { found.len() } else { 0 });
    }
    Ok(bytes)
}

/// Removes a file if it is there.
pub(super) fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).at(path, "remove"),
        _ => Ok(()),
    }
}

/// Makes the names in a folder durable.
pub(super) fn sync_folder(path: &Path) -> Result<(), FileError> {
    File::open(path).and_then(|folder| folder.sync_all()).at(path, "sync the folder")
}

/// A whole file of at most `max` bytes; `None` when it is absent.
pub(super) fn read_small(path: &Path, max: usize) -> Result<Option<Vec<u8>>, FileError> {
    const DOING: &str = "read";
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.at(path, DOING)?,
    };
    let mut bytes = Vec::new();
    // One more than allowed, so that the caller's length check sees a file that is too long.
    io::Read::read_to_end(&mut io::Read::take(file, max as u64 + 1), &mut bytes).at(path, DOING)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_inodes_lacks_those_and_no_bytes() {
        for (bytes, inodes, lacks) in [(0, 9, Lacks::Space), (9, 0, Lacks::Inodes), (0, 0, Lacks::Space)] {
            assert_eq!(Lacks::of(bytes, inodes), lacks);
        }
        assert_eq!(Lacks::at(Path::new("/never/there")), Lacks::at(Path::new("/")));
    }
}
