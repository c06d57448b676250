//! The small files beside a store, and the way back: a backup that lacks the keys of the node cannot be started, and one
//! that is put together by hand from several places is put together wrongly on the day that it is needed.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::backup::COPY_CACHE;
use crate::db::{META, open_database, sync_folder_of};
use crate::{BackupError, OpenError, StoreError};

/// Files that go with a backup: name relative to the folder, and contents. Under the empty name: the store's own name.
pub(crate) const BESIDE: TableDefinition<'static, &'static [u8], &'static [u8]> =
    TableDefinition::new("willcall.backup");

/// Largest file that goes with a backup, bytes: keys, key sets and configurations are a few KiB.
const MAX_FILE: u64 = 1024 * 1024;
/// Most files; a manager that rotated its keys daily for years has fewer.
const MAX_FILES: usize = 4096;

/// Files by their name relative to the folder; under the empty name, the store's own name.
pub(crate) type Files = Vec<(String, Vec<u8>)>;

/// Where the roles have their stores: a folder with one of them is a node's, and takes no other node beside it.
const STORES: [&str; 4] = ["manager.redb", "merchant.redb", "seeder.redb", "library/library.redb"];

/// Folders that stay out: what was sold, and what a manager's store moved out of itself. Neither is ever changed.
const LARGE: [&str; 2] = ["content", "segments"];

/// What a restore did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// Records in the store.
    pub records: u64,
    /// Files put into the folder, the store's own last.
    pub files: Vec<PathBuf>,
    /// Files of the backup that were in the folder already and stayed as they were: they may be newer.
    pub kept: Vec<PathBuf>,
}

/// Why nothing was restored. Files that were put into the folder before the failure stay there; the store's own comes
/// last, so that without it the restore can be repeated.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is a store already.
    #[error("{0} is there already; move it away first, then restore again")]
    Exists(PathBuf),
    /// Another node lives in the folder.
    #[error(
        "{} is the folder of another node, whose {store} is in it; nothing was written: restore into a folder of its own",
        folder.display()
    )]
    Foreign {
        /// The folder.
        folder: PathBuf,
        /// That node's store.
        store: &'static str,
    },
    /// The file is no backup of a node.
    #[error("{path} is no backup of a {wanted}: {reason}")]
    NotABackup {
        /// The file.
        path: PathBuf,
        /// The store that was to be restored.
        wanted: String,
        /// What it is instead.
        reason: String,
    },
    /// The file cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The file cannot be read.
    #[error("cannot read the backup: {0}")]
    Store(#[from] StoreError),
    /// The system does not let us.
    #[error("cannot restore {path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// The small files of the folder of the store at `store`.
pub(crate) fn collect(store: &Path) -> Result<Files, BackupError> {
    let folder = store.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let own = store.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut files = vec![(String::new(), own.into_bytes())];
    walk(folder, "", &mut Vec::new(), &mut files)?;
    Ok(files)
}

/// Follows links, as does everything that reads these files: a restore puts what they lead to into the folder. `above` are
/// the folders on the way here, as device and number, into which no link may lead back.
fn walk(folder: &Path, prefix: &str, above: &mut Vec<(u64, u64)>, files: &mut Files) -> Result<(), BackupError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| BackupError::Io { path, source }
    };
    let here = fs::metadata(folder).map_err(failed(folder))?;
    let here = (here.dev(), here.ino());
    if above.contains(&here) {
        let reason = "it is a link to a folder that it is in itself; remove it".to_owned();
        return Err(BackupError::Beside { path: folder.to_owned(), reason });
    }
    above.push(here);
    for entry in fs::read_dir(folder).map_err(failed(folder))? {
        let entry = entry.map_err(failed(folder))?;
        let path = entry.path();
        let no = |reason: &str| BackupError::Beside { path: path.clone(), reason: reason.to_owned() };
        let name = entry.file_name().into_string().map_err(|_| no("its name is not UTF-8"))?;
        let name_in_folder = format!("{prefix}{name}");
        let large = LARGE.contains(&name.as_str());
        let found = match fs::metadata(&path) {
            Ok(found) => found,
            // A link that leads nowhere, of no use: an editor's lock, content whose volume is away.
            Err(_) if large || !belongs(&name) => continue,
            Err(error) => return Err(no(&format!("it cannot be read: {error}"))),
        };
        if found.is_dir() && !large {
            walk(&path, &format!("{name_in_folder}/"), above, files)?;
        } else if found.is_file() && belongs(&name) {
            if found.len() > MAX_FILE {
                return Err(no("it is larger than 1 MiB and none of this node's; move it out of the folder"));
            }
            files.push((name_in_folder, fs::read(&path).map_err(failed(&path))?));
            if files.len() > MAX_FILES {
                return Err(no("there are more than 4096 files in the folder"));
            }
        }
    }
    above.pop();
    Ok(())
}

/// Not other stores, nor what is only of the moment: locks, halves of files, backups and logs.
fn belongs(name: &str) -> bool {
    let passing = ["redb", "partial", "new", "log", "backup"];
    name != "lock"
        && !name.starts_with('.')
        && !passing.iter().any(|end| name.rsplit_once('.').is_some_and(|n| n.1 == *end))
}

/// Puts a backup made by [`Db::backup_folder_to`](crate::Db::backup_folder_to) back into `folder`, which is made if it
/// is not there, with the store under `store` (a file name). Files in the folder that the backup has, too, stay as they
/// are. `lock` has to take the folder for this process, and is called before anything is written into it: what it gave is
/// held meanwhile. `ready` is called when everything is there but the store, without which nothing runs: what has to be
/// known of the restore before anything does. What it gave is returned. Blocks.
///
/// # Errors
/// [`RestoreError`], and those of `lock` and `ready`, without a store in the folder.
pub fn restore<L, R, E: From<RestoreError>>(
    backup: &Path,
    folder: &Path,
    store: &str,
    lock: impl FnOnce(&Path) -> Result<L, E>,
    ready: impl FnOnce(&Path) -> Result<R, E>,
) -> Result<(Restored, R), E> {
    free(folder, store)?;
    let mut original = fs::File::open(backup).map_err(failed(backup))?;
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed(folder))?;
    let _lock = lock(folder)?;
    // A node may have been set up here before the folder was ours.
    free(folder, store)?;
    sweep(folder)?;
    let (mut restored, copy) = put_back(&mut original, backup, folder, store)?;
    let ready = ready(folder)?;
    let target = folder.join(store);
    copy.persist_noclobber(&target).map_err(|error| RestoreError::Io { path: target.clone(), source: error.error })?;
    sync_folder_of(&target).map_err(failed(folder))?;
    restored.files.push(target);
    Ok((restored, ready))
}

/// Removes what a restore that was killed left: it has the keys in it.
fn sweep(folder: &Path) -> Result<(), RestoreError> {
    for entry in fs::read_dir(folder).map_err(failed(folder))? {
        let entry = entry.map_err(failed(folder))?;
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with(PARTIAL.0) && name.ends_with(PARTIAL.1)) {
            fs::remove_file(entry.path()).map_err(failed(&entry.path()))?;
        }
    }
    Ok(())
}

/// How the name of a store begins and ends that is being put back.
const PARTIAL: (&str, &str) = (".restore.", ".partial");

fn failed(path: &Path) -> impl FnOnce(io::Error) -> RestoreError {
    let path = path.to_owned();
    move |source| RestoreError::Io { path, source }
}

/// Is there no store in the folder, of this node or of another?
fn free(folder: &Path, store: &str) -> Result<(), RestoreError> {
    let target = folder.join(store);
    if target.symlink_metadata().is_ok() {
        return Err(RestoreError::Exists(target));
    }
    match STORES.into_iter().find(|other| folder.join(other).symlink_metadata().is_ok()) {
        Some(store) => Err(RestoreError::Foreign { folder: folder.to_owned(), store }),
        None => Ok(()),
    }
}

/// Puts everything back but the store, which is given as it is to be, whole and without a name.
fn put_back(
    original: &mut fs::File,
    backup: &Path,
    folder: &Path,
    store: &str,
) -> Result<(Restored, tempfile::NamedTempFile), RestoreError> {
    let mut copy =
        tempfile::Builder::new().prefix(PARTIAL.0).suffix(PARTIAL.1).tempfile_in(folder).map_err(failed(folder))?;
    io::copy(original, copy.as_file_mut()).map_err(failed(backup))?;

    let backend = FileBackend::new(copy.reopen().map_err(failed(folder))?)
        .map_err(|error| RestoreError::Io { path: backup.to_owned(), source: io::Error::other(error) })?;
    let not_one =
        |reason: String| RestoreError::NotABackup { path: backup.to_owned(), wanted: store.to_owned(), reason };
    let mut database = open_database(backup, COPY_CACHE, backend)?;
    if !database.check_integrity().map_err(|error| not_one(error.to_string()))? {
        return Err(not_one("it is damaged".to_owned()));
    }
    let (files, records) = take_files(&database).map_err(|error| not_one(error.to_string()))?;
    let own = files.iter().find(|(name, _)| name.is_empty()).map(|(_, own)| String::from_utf8_lossy(own).into_owned());
    match own {
        None => return Err(not_one("no node's files are in it".to_owned())),
        Some(own) if own != store => return Err(not_one(format!("it is one of {own}"))),
        Some(_) => {}
    }
    database.close().map_err(|error| not_one(error.to_string()))?;

    let mut restored = Restored { records, files: Vec::new(), kept: Vec::new() };
    for (name, bytes) in files.iter().filter(|(name, _)| !name.is_empty()) {
        let relative = Path::new(name);
        if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(not_one(format!("a file in it leads out of the folder: {name}")));
        }
        let path = folder.join(relative);
        match put(&path, bytes) {
            Ok(()) => restored.files.push(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => restored.kept.push(path),
            Err(source) => return Err(RestoreError::Io { path, source }),
        }
    }
    copy.as_file().sync_all().map_err(failed(&folder.join(store)))?;
    Ok((restored, copy))
}

/// Takes the files out of a backup, which is an ordinary store then.
fn take_files(database: &Database) -> Result<(Files, u64), StoreError> {
    let txn = database.begin_write()?;
    let mut files = Vec::new();
    for entry in txn.open_table(BESIDE)?.iter()? {
        let (name, bytes) = entry?;
        files.push((String::from_utf8_lossy(name.value()).into_owned(), bytes.value().to_vec()));
    }
    txn.delete_table(BESIDE)?;
    txn.commit()?;
    let mut records = 0;
    let txn = database.begin_read()?;
    for table in redb::ReadTransaction::list_tables(&txn)? {
        if redb::TableHandle::name(&table) != redb::TableHandle::name(&META) {
            records += redb::ReadableTableMetadata::len(&txn.open_untyped_table(table)?)?;
        }
    }
    Ok((files, records))
}

/// Writes a new file readable by its owner only.
fn put(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    sync_folder_of(path)
}
