//! Everything that a client keeps between commands lies in one private folder, so that the goods stay usable after the
//! shop is gone: the key that tickets name, the networks it knows, and what was bought.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use node::KeyFileError;
use protocol::{Digest, Keypair, PeerId, TransactionId};

use crate::library::{Library, Shelf};
use crate::networks::Networks;

/// A client's private folder and the key in it. Clones are the same home.
#[derive(Clone, Debug)]
pub struct Home {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    keypair: Keypair,
    shelf: Arc<Shelf>,
}

/// Why a home could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// The system names no place for a user's data.
    #[error("this system names no folder for your data; give one with --home DIR")]
    NoDefault,
    /// The folder cannot be made or read.
    #[error("cannot {doing} the client's folder {}: {source}; choose another with --home DIR", path.display())]
    Folder {
        /// What was tried.
        doing: &'static str,
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The key in it cannot be used.
    #[error(transparent)]
    Key(#[from] KeyFileError),
}

/// A file operation in a home or work folder that failed: what on which path, and why.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}: {source}", path.display())]
pub struct FileError {
    /// What was tried.
    pub doing: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

impl FileError {
    /// The disk, or the user's quota on it, is full.
    pub fn is_disk_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// Adds to an error of the system what was tried on which path.
pub(crate) trait At<T> {
    fn at(self, doing: &'static str, path: &Path) -> Result<T, FileError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, doing: &'static str, path: &Path) -> Result<T, FileError> {
        self.map_err(|source| FileError { doing, path: path.to_owned(), source: source.into() })
    }
}

impl Home {
    /// Where a home lies unless the user says otherwise: the user's data folder of the platform.
    ///
    /// # Errors
    /// [`HomeError::NoDefault`].
    pub fn default_dir() -> Result<PathBuf, HomeError> {
        let dirs = directories::ProjectDirs::from("", "", "willcall").ok_or(HomeError::NoDefault)?;
        Ok(dirs.data_dir().join("client"))
    }

    /// Opens the home at `dir`; at first use it is made, with a new key. Blocks (with a passphrase, for a fraction of
    /// a second).
    ///
    /// # Errors
    /// [`HomeError`].
    pub fn open(dir: &Path, passphrase: Option<&str>) -> Result<Home, HomeError> {
        let failed = |doing| move |source| HomeError::Folder { doing, path: dir.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed("make"))?;
        // The folder of a relative path must stay the same wherever the process goes.
        let dir = fs::canonicalize(dir).map_err(failed("find"))?;
        let mode = fs::metadata(&dir).map_err(failed("look at"))?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).map_err(failed("make private"))?;
        }
        let keypair = node::load_or_create_key(&dir.join("key"), passphrase)?;
        Ok(Home { inner: Arc::new(Inner { dir, keypair, shelf: Arc::default() }) })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// This client's key.
    pub fn keypair(&self) -> &Keypair {
        &self.inner.keypair
    }

    /// What a buyer designates to have goods sent here.
    pub fn peer_id(&self) -> PeerId {
        self.inner.keypair.peer_id()
    }

    pub(crate) fn library(&self) -> Library {
        Library::new(self.dir().join("library"), Arc::clone(&self.inner.shelf))
    }

    pub(crate) fn networks(&self) -> Networks {
        Networks::new(self.dir().join("networks"))
    }

    /// What verification needs of a content: its chaining values and list of files.
    pub(crate) fn content_dir(&self, manifest: &Digest) -> PathBuf {
        self.dir().join("contents").join(manifest.to_string())
    }

    /// The lock and acknowledgements of one transaction's deliveries.
    pub(crate) fn delivery_dir(&self, transaction: &TransactionId) -> PathBuf {
        self.dir().join("deliveries").join(transaction.to_string())
    }
}

/// Makes a folder that only the owner enters, and those above it.
pub(crate) fn make_private_dir(path: &Path) -> Result<(), FileError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).at("make the folder", path)
}

/// Replaces a file in one step. With `durable` it also survives a power cut.
pub(crate) fn replace_file(path: &Path, bytes: &[u8], durable: bool) -> Result<(), FileError> {
    let mut beside = path.file_name().unwrap_or_default().to_owned();
    // Two processes may write the same file at once: the last rename wins, with whole contents either way.
    beside.push(format!(".{}-{:08x}.new", std::process::id(), rand::random::<u32>()));
    let beside = path.with_file_name(beside);
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(bytes)?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&beside, path)
    })();
    if written.is_err() {
        // It may not exist; what matters is the error below.
        let _ = fs::remove_file(&beside);
    }
    written.at("write", path)?;
    if durable && let Some(parent) = path.parent() {
        sync_dir(parent)?;
    }
    Ok(())
}

/// Removes what processes that were killed while they replaced a file in `dir`, or in a folder there, left half written. What
/// a living one writes stays, and what is not removed is a few hundred bytes that are only in the way.
pub(crate) fn sweep(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let inside = if is_dir { fs::read_dir(entry.path()).ok() } else { None };
        for entry in std::iter::once(entry).chain(inside.into_iter().flatten().flatten()) {
            let name = entry.file_name();
            if let Some(writer) = name.to_str().and_then(half_written_by)
                && is_gone(writer)
                && let Err(error) = fs::remove_file(entry.path())
            {
                tracing::debug!(%error, path = %entry.path().display(), "half written file not removed");
            }
        }
    }
}

/// The process that writes the file of this name beside another one: see [`replace_file`].
fn half_written_by(name: &str) -> Option<rustix::process::Pid> {
    let (pid, random) = name.strip_suffix(".new")?.rsplit_once('.')?.1.split_once('-')?;
    let random = random.len() == 8 && random.bytes().all(|byte| byte.is_ascii_hexdigit());
    rustix::process::Pid::from_raw(pid.parse().ok().filter(|_| random)?)
}

fn is_gone(process: rustix::process::Pid) -> bool {
    // One that belongs to somebody else is there.
    rustix::process::test_kill_process(process) == Err(rustix::io::Errno::SRCH)
}

/// Reads a file of at most `max` bytes; `None` when there is none.
pub(crate) fn read_file(path: &Path, max: usize) -> Result<Option<Vec<u8>>, FileError> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.at("read", path)?,
    };
    let mut bytes = Vec::new();
    // One byte more than allowed, so that the decoder sees that it is too long.
    io::Read::read_to_end(&mut io::Read::take(file, max as u64 + 1), &mut bytes).at("read", path)?;
    Ok(Some(bytes))
}

/// Makes the names in a folder durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), FileError> {
    fs::File::open(path).and_then(|dir| dir.sync_all()).at("sync the folder", path)
}

/// A path in an answer, which is text: what is not UTF-8 in it is replaced.
pub(crate) fn as_text<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// The same for several.
pub(crate) fn all_as_text<S: serde::Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}

/// Runs blocking work off the async threads. A panic in it goes on here.
pub(crate) async fn blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that is shutting down cancels blocking work, and it drops this future, too.
            Err(_) => std::future::pending().await,
        },
    }
}

/// This machine's clock, unix milliseconds.
pub(crate) fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_private_and_keeps_its_key() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a").join("home");
        let home = Home::open(&dir, None).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(dir.join("key")).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Home::open(&dir, None).unwrap().peer_id(), home.peer_id());
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        Home::open(&dir, None).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn an_exposed_key_is_refused_with_the_remedy() {
        let root = tempfile::tempdir().unwrap();
        Home::open(root.path(), None).unwrap();
        fs::set_permissions(root.path().join("key"), fs::Permissions::from_mode(0o644)).unwrap();
        let error = Home::open(root.path(), None).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn files_are_replaced_whole_and_read_with_a_limit() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x");
        assert_eq!(read_file(&path, 10).unwrap(), None);
        replace_file(&path, b"one", true).unwrap();
        replace_file(&path, b"twelve bytes", false).unwrap();
        assert_eq!(read_file(&path, 5).unwrap().unwrap().len(), 6);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_killed_processes_left_half_written_is_swept_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let acks = root.path().join("acks-1");
        fs::create_dir(&acks).unwrap();
        // One that has ended, and was waited for: no such process is there.
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        let (gone, living) = (ended.id(), std::process::id());
        let left =
            [acks.join(format!("peer.{gone}-0123abcd.new")), root.path().join(format!("banned.{gone}-00000000.new"))];
        let kept = [
            acks.join(format!("peer.{living}-0123abcd.new")),
            acks.join("peer"),
            acks.join(format!("peer.{gone}-0123.new")),
            root.path().join("x.new"),
        ];
        for path in left.iter().chain(&kept) {
            fs::write(path, "half").unwrap();
        }
        sweep(root.path());
        assert!(left.iter().all(|path| !path.exists()) && kept.iter().all(|path| path.exists()));
        sweep(&root.path().join("none"));
    }
}
