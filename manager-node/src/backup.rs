//! A manager's backup, taken while it runs, and the way back from it. Sold content is not in it: it is large, it never
//! changes, and the seeders have it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use node::{ControlError, DirLock, DirLockError};
use serde::Deserialize;
use serde_json::{Value, json};
use store::Restored;

use crate::config::{Config, ConfigError};
use crate::context::Context;
use crate::restore::{self, RestoreError};
use crate::start::STORE;

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreBackupError {
    /// What is in the folder already is the configuration of something else.
    #[error(
        "{source}: that is no configuration of a manager; nothing was written: restore into a folder of its own, or move \
         that file away"
    )]
    Config {
        /// What is wrong with it.
        source: ConfigError,
    },
    /// The folder is in use.
    #[error(transparent)]
    Lock(#[from] DirLockError),
    /// The backup.
    #[error(transparent)]
    Backup(#[from] store::RestoreError),
    /// The restore number.
    #[error(transparent)]
    Number(#[from] RestoreError),
}

#[derive(Deserialize)]
struct Request {
    /// Absolute.
    path: PathBuf,
    /// A file that is there may be replaced.
    #[serde(default)]
    replace: bool,
}

/// Answers `backup`.
pub(crate) async fn control(ctx: &Arc<Context>, request: Value) -> Result<Value, ControlError> {
    let Request { path, replace } = crate::control::parse(request)?;
    let (db, to) = (ctx.db.clone(), path.clone());
    let copied = tokio::task::spawn_blocking(move || db.backup_folder_to(to, replace)).await;
    let copied = copied.map_err(|error| ControlError::new("internal", error.to_string()))?;
    let records = copied.map_err(|error| {
        let code = if error.is_about_target() { "wrong-state" } else { "internal" };
        ControlError::new(code, error.to_string())
    })?;
    tracing::info!(path = %path.display(), records, "backup written");
    Ok(json!({ "path": path, "records": records }))
}

/// Makes the manager of `backup` anew in `dir`, or gives the folder that has its keys its database again. Seeders will
/// send every receipt that the backup may lack: the second value is the new restore number. Blocks.
///
/// # Errors
/// [`RestoreBackupError`].
pub fn restore_backup(backup: &Path, dir: &Path) -> Result<(Restored, u64), RestoreBackupError> {
    let lock = |dir: &Path| match Config::load(dir) {
        Ok(_) | Err(ConfigError::Missing { .. }) => Ok(DirLock::acquire(dir)?),
        Err(source) => Err(RestoreBackupError::Config { source }),
    };
    // A manager that runs without the number takes itself for the one from before, and seeders take it for a fork.
    store::restore(backup, dir, STORE, lock, |dir| Ok(restore::raise(dir, 0)?))
}
