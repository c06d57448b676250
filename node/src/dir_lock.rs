//! Two processes over one data directory would corrupt each other's files without any of them noticing; this lock
//! makes the second one refuse to start and say who holds the directory.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// Holds a data directory for this process until it is dropped (or the process ends, however it ends).
#[derive(Debug)]
pub struct DirLock {
    _file: File,
    dir: PathBuf,
}

/// Why a data directory could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum DirLockError {
    /// Another process holds it.
    #[error("data directory {} is in use by process {pid}; stop that process or choose another directory", dir.display())]
    Held {
        /// The directory.
        dir: PathBuf,
        /// The process, or `unknown` when the lock file does not say.
        pid: String,
    },
    /// The lock file cannot be created or locked.
    #[error("cannot lock data directory {}: {source}", dir.display())]
    Io {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl DirLock {
    /// Takes `dir`, which must exist. Blocks for no longer than a few file operations.
    ///
    /// # Errors
    /// [`DirLockError::Held`] when another process has it.
    pub fn acquire(dir: &Path) -> Result<Self, DirLockError> {
        let io = |source| DirLockError::Io { dir: dir.to_owned(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join("lock"))
            .map_err(io)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                // The holder writes at most ten digits; a longer file is not ours to print.
                let read = (&mut file).take(20).read_to_string(&mut text);
                let pid = text.trim();
                let known = read.is_ok() && !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit());
                let pid = if known { pid.to_owned() } else { "unknown".to_owned() };
                return Err(DirLockError::Held { dir: dir.to_owned(), pid });
            }
            Err(errno) => return Err(io(errno.into())),
        }
        file.set_len(0).map_err(io)?;
        file.seek(SeekFrom::Start(0)).map_err(io)?;
        writeln!(file, "{}", std::process::id()).map_err(io)?;
        Ok(Self { _file: file, dir: dir.to_owned() })
    }

    /// Does some process hold `dir`? Changes nothing in it; where that cannot be told, nobody does. Whoever takes it in
    /// the same instant finds it held: see [`DirLock::acquire_looked_at`].
    pub fn is_held(dir: &Path) -> bool {
        let Ok(file) = std::fs::File::open(dir.join("lock")) else { return false };
        matches!(flock(&file, FlockOperation::NonBlockingLockShared), Err(rustix::io::Errno::WOULDBLOCK))
    }

    /// [`DirLock::acquire`] for a directory that others look at with [`DirLock::is_held`]: such a look is waited for.
    ///
    /// # Errors
    /// As [`DirLock::acquire`].
    pub fn acquire_looked_at(dir: &Path) -> Result<Self, DirLockError> {
        const LOOKS: u32 = 4;
        for _ in 1..LOOKS {
            match Self::acquire(dir) {
                Err(DirLockError::Held { .. }) => std::thread::sleep(std::time::Duration::from_millis(5)),
                other => return other,
            }
        }
        Self::acquire(dir)
    }

    /// The directory that is held.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_second_taker_learns_directory_and_process() {
        let dir = tempfile::tempdir().unwrap();
        let first = DirLock::acquire(dir.path()).unwrap();
        let error = DirLock::acquire(dir.path()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&dir.path().display().to_string()), "{text}");
        assert!(text.contains(&std::process::id().to_string()), "{text}");
        assert!(DirLock::is_held(dir.path()));
        drop(first);
        assert!(!DirLock::is_held(dir.path()) && !DirLock::is_held(&dir.path().join("none")));
        DirLock::acquire_looked_at(dir.path()).unwrap();
    }
}
