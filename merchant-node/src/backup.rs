//! A shop's backup, taken while it runs, and the way back from it.

use std::path::{Path, PathBuf};

use node::ControlError;
use serde_json::{Value, json};
use store::{BackupError, RestoreError, Restored};

use crate::running::STORE;
use crate::shop::Shop;

/// Writes the backup.
pub(crate) async fn write(shop: &Shop, path: PathBuf, replace: bool) -> Result<Value, ControlError> {
    let (db, to) = (shop.db.clone(), path.clone());
    let failed = |text: String| ControlError::new("internal", text);
    let copied = tokio::task::spawn_blocking(move || match replace {
        true => db.backup_folder_to(to),
        false => db.backup_folder_new(to),
    });
    let records = copied.await.map_err(|e| failed(e.to_string()))?.map_err(|error| match error {
        BackupError::Exists(_) => ControlError::new("wrong-state", error.to_string()),
        error => failed(error.to_string()),
    })?;
    tracing::info!(path = %path.display(), records, "backup written");
    Ok(json!({ "path": path, "records": records }))
}

/// Makes the merchant of `backup` anew in `dir`, or gives the folder that has its key its database again. Blocks.
///
/// # Errors
/// [`RestoreError`].
pub fn restore_backup(backup: &Path, dir: &Path) -> Result<Restored, RestoreError> {
    store::restore(backup, dir, STORE)
}
