//! A shop's backup, taken while it runs, and the way back from it.

use std::path::{Path, PathBuf};

use node::{ControlError, DirLock, DirLockError};
use serde_json::{Value, json};
use store::Restored;

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
    store::restore(backup, dir, STORE, lock, |_| Ok(())).map(|(restored, ())| restored)
}
