//! A shop's backup, taken while it runs, and the way back from it.

use std::io::Write;
use std::path::{Path, PathBuf};

use node::{ControlError, DirLock, DirLockError};
use serde_json::{Value, json};
use store::Restored;

use crate::clock::now_ms;
use crate::config::{Config, ConfigError};
use crate::running::STORE;
use crate::shop::Shop;

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreBackupError {
    /// What is in the folder already is the configuration of something else.
    #[error(
        "{source}: that is no configuration of a merchant; nothing was written: restore into a folder of its own, or move \
         that file away"
    )]
    Config {
        /// What is wrong with it.
        source: ConfigError,
    },
    /// The folder is in use.
    #[error(transparent)]
    Lock(#[from] DirLockError),
    /// The backup, or what is in the folder.
    #[error(transparent)]
    Backup(#[from] store::RestoreError),
}

/// Writes the backup.
pub(crate) async fn write(shop: &Shop, path: PathBuf, replace: bool) -> Result<Value, ControlError> {
    let (db, to) = (shop.db.clone(), path.clone());
    let copied = tokio::task::spawn_blocking(move || db.backup_folder_to(to, replace)).await;
    let copied = copied.map_err(|error| ControlError::new("internal", error.to_string()))?;
    let records = copied.map_err(|error| {
        let code = if error.is_about_target() { "wrong-state" } else { "internal" };
        ControlError::new(code, error.to_string())
    })?;
    tracing::info!(path = %path.display(), records, "backup written");
    Ok(json!({ "path": path, "records": records }))
}

/// Makes the merchant of `backup` anew in `dir`, or gives the folder that has its key its database again. Blocks.
///
/// # Errors
/// [`RestoreBackupError`].
pub fn restore_backup(backup: &Path, dir: &Path) -> Result<Restored, RestoreBackupError> {
    let lock = |dir: &Path| match Config::load(dir) {
        Ok(_) | Err(ConfigError::Missing { .. }) => Ok(DirLock::acquire(dir)?),
        Err(source) => Err(RestoreBackupError::Config { source }),
    };
    store::restore(backup, dir, STORE, lock, note_restored).map(|(restored, ())| restored)
}

/// Has the time of the last restore, unix milliseconds.
const RESTORED: &str = "restored";

fn note_restored(dir: &Path) -> Result<(), RestoreBackupError> {
    let path = dir.join(RESTORED);
    let write = || {
        let mut file = std::fs::File::create(&path)?;
        writeln!(file, "{}", now_ms())?;
        file.sync_all()
    };
    write().map_err(|source| store::RestoreError::Io { path: path.clone(), source }.into())
}

/// When this shop came back from a backup, if it ever did, unix milliseconds: of an order from before that it does not know what
/// became of it.
pub(crate) fn restored_at(dir: &Path) -> std::io::Result<Option<u64>> {
    match std::fs::read_to_string(dir.join(RESTORED)) {
        // Where it is not to be read, no order is taken for one from after it.
        Ok(text) => Ok(Some(text.trim().parse().unwrap_or(u64::MAX))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
