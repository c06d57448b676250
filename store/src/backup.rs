//! A consistent copy of a running store: a copied file that is being written to is no backup, and stopping a manager
//! every night is no plan. What lies beside a store and belongs to it, keys above all, can go into the same file.

use std::io;
use std::path::{Path, PathBuf};

use redb::backends::FileBackend;
use redb::{
    Database, MultimapTableHandle, ReadTransaction, ReadableTable, ReadableTableMetadata, TableDefinition, TableHandle,
};

use crate::beside::{self, BESIDE, Files};
use crate::db::{META, open_database, sync_folder_of};
use crate::{Db, OpenError, StoreError};

/// Cache of the copy while it is written, bytes. The copy is written once in key order, so more would not help.
pub(crate) const COPY_CACHE: usize = 8 * 1024 * 1024;

/// Why there is no backup; a file already at the target is untouched.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The target is the store itself.
    #[error("{0} is the store itself: name another file")]
    Itself(PathBuf),
    /// The target is there already.
    #[error("{0} is there already, and may be the backup that is needed: name another file, or give --replace")]
    Exists(PathBuf),
    /// The copy could not be written.
    #[error("cannot write the backup {path}: {source}")]
    Io {
        /// The target.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The store could not be read.
    #[error("cannot back up: {0}")]
    Store(#[from] StoreError),
    /// The copy could not be set up.
    #[error("cannot back up: {0}")]
    Open(#[from] OpenError),
    /// A table that is not one of this crate's is in the store; leaving it out would be a backup only in name.
    #[error("table {0} is not a byte table and cannot be copied")]
    ForeignTable(String),
    /// A file beside the store cannot go with it.
    #[error("cannot back up {path}: {reason}")]
    Beside {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The copy does not read back as it was written.
    #[error("the copy for {path} does not read back: {reason}")]
    Unsound {
        /// The target.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl BackupError {
    /// Is it for whoever asked, who may name another target?
    pub fn is_about_target(&self) -> bool {
        matches!(self, BackupError::Exists(_) | BackupError::Itself(_) | BackupError::Io { .. })
    }
}

impl Db {
    /// Copies the store, as it is at this moment, into a new file at `path` (mode 0600), replacing one that is there,
    /// and returns the number of records. Writes go on meanwhile; the store's file may grow until it is done.
    /// Blocks for as long as reading, writing and checking all records takes: call it on a blocking thread.
    ///
    /// The copy has a temporary name (`.NAME.….partial` beside the target) until it is complete, checked and flushed;
    /// it is removed on failure, and only a killed process leaves one behind, which may be deleted.
    ///
    /// # Errors
    /// [`BackupError`].
    pub fn backup_to(&self, path: impl AsRef<Path>) -> Result<u64, BackupError> {
        self.copy_to(path.as_ref(), Vec::new(), true)
    }

    /// As [`backup_to`](Self::backup_to), and with the small files of the store's folder (keys, configuration) in the
    /// same file, for [`restore`](crate::restore). Other stores, lock files and the folders `content` and
    /// `segments` stay out. A file that is there already is kept unless it is to be replaced.
    ///
    /// # Errors
    /// [`BackupError`].
    pub fn backup_folder_to(&self, path: impl AsRef<Path>, replace: bool) -> Result<u64, BackupError> {
        let path = path.as_ref();
        // Before the pass over the database; and again when the copy gets its name.
        if !replace && path.symlink_metadata().is_ok() {
            return Err(BackupError::Exists(path.to_owned()));
        }
        let files = beside::collect(self.path())?;
        self.copy_to(path, files, replace)
    }

    fn copy_to(&self, path: &Path, files: Files, replace: bool) -> Result<u64, BackupError> {
        let failed = |source| BackupError::Io { path: path.to_owned(), source };
        let name = path.file_name().ok_or_else(|| failed(io::Error::other("not a file name")))?;
        if let (Ok(target), Ok(own)) = (path.canonicalize(), self.path().canonicalize())
            && target == own
        {
            return Err(BackupError::Itself(path.to_owned()));
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let prefix = format!(".{}.", name.to_string_lossy());
        let partial = tempfile::Builder::new().prefix(&prefix).suffix(".partial").tempfile_in(folder);
        // The system's word alone: the temporary name says nothing to whoever asked.
        let partial = partial.map_err(|error| failed(io::Error::from(error.kind())))?;

        let backend =
            FileBackend::new(partial.reopen().map_err(failed)?).map_err(|error| failed(io::Error::other(error)))?;
        let mut copy = open_database(partial.path(), COPY_CACHE, backend)?;
        let records = self.read(|txn| copy_tables(txn.raw(), &copy, path, &files))?;
        let unsound = |reason| BackupError::Unsound { path: path.to_owned(), reason };
        match copy.check_integrity() {
            Ok(true) => {}
            Ok(false) => return Err(unsound("it needed repair".to_owned())),
            Err(error) => return Err(unsound(error.to_string())),
        }
        copy.close().map_err(|error| unsound(error.to_string()))?;
        partial.as_file().sync_all().map_err(failed)?;
        match replace {
            true => partial.persist(path).map(drop),
            false => partial.persist_noclobber(path).map(drop),
        }
        .map_err(|error| match error.error.kind() {
            io::ErrorKind::AlreadyExists => BackupError::Exists(path.to_owned()),
            _ => failed(error.error),
        })?;
        sync_folder_of(path).map_err(failed)?;
        Ok(records)
    }
}

/// Copies all tables in one transaction and counts their records.
fn copy_tables(
    from: &ReadTransaction,
    to: &Database,
    path: &Path,
    files: &[(String, Vec<u8>)],
) -> Result<u64, BackupError> {
    fn written<T, E>(path: &Path, result: Result<T, E>) -> Result<T, BackupError>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        result.map_err(|error| BackupError::Io { path: path.to_owned(), source: io::Error::other(error) })
    }

    if let Some(table) = from.list_multimap_tables().map_err(StoreError::from)?.next() {
        return Err(BackupError::ForeignTable(table.name().to_owned()));
    }
    let txn = written(path, to.begin_write())?;
    let mut records = 0;
    for handle in from.list_tables().map_err(StoreError::from)? {
        let definition: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new(handle.name());
        let source = match from.open_table(definition) {
            Err(redb::TableError::TableTypeMismatch { table, .. }) => return Err(BackupError::ForeignTable(table)),
            other => other.map_err(StoreError::from)?,
        };
        let mut target = written(path, txn.open_table(definition))?;
        for entry in source.iter().map_err(StoreError::from)? {
            let (key, value) = entry.map_err(StoreError::from)?;
            written(path, target.insert(key.value(), value.value()))?;
        }
        if definition.name() != META.name() {
            records += source.len().map_err(StoreError::from)?;
        }
    }
    if !files.is_empty() {
        let mut table = written(path, txn.open_table(BESIDE))?;
        for (name, bytes) in files {
            written(path, table.insert(name.as_bytes(), bytes.as_slice()))?;
        }
    }
    written(path, txn.commit())?;
    Ok(records)
}
