//! The last step of a delivery is one rename: until it, nothing bears the product's name, and after it, everything is
//! there. What lies at that name already is somebody's work and stays; where it is this very delivery's, what came goes
//! into it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use protocol::TransactionId;
use rustix::fs::CWD;
use store::Step;

use crate::home::{At, FileError, make_private_dir, sync_dir};
use crate::merge::{merge, rename_new};

/// Why a finished product was not moved into its place.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Something else is there.
    #[error(
        "{} is there already, and no delivery of this purchase put it there; move it away and fetch again, which goes on \
         with what has come, or choose another folder with -o, which begins anew", path.display()
    )]
    Exists {
        /// The place.
        path: PathBuf,
    },
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Moves `from` to `to`. Where an earlier run of the same delivery put something there, `known` is its device and inode:
/// it is gone into then, and what is kept aside is given.
pub(crate) fn place(from: &Path, to: &Path, known: Option<(u64, u64)>) -> Result<Vec<PathBuf>, PlaceError> {
    Step::ClientPlaced.before();
    let kept = match (rename_new(CWD, from.as_os_str(), CWD, to.as_os_str()), known) {
        (Err(error), Some(known)) if error.kind() == io::ErrorKind::AlreadyExists => merge(from, to, known)?,
        (Err(error), None) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(PlaceError::Exists { path: to.to_owned() });
        }
        (moved, _) => {
            moved.at("move the product to", to)?;
            Vec::new()
        }
    };
    sync_dir(to.parent().unwrap_or(to))?;
    Step::ClientPlaced.after();
    Ok(kept)
}

/// The hidden folder that a fetch works in, beside the place of the goods.
pub(crate) fn work_dir(out: &Path, transaction: TransactionId) -> PathBuf {
    out.join(format!(".willcall-{transaction}"))
}

/// The output folder may be one that others write to: a work folder that somebody else made, or that is a link to
/// elsewhere, is not used.
pub(crate) fn make_work_dir(work: &Path) -> Result<(), FileError> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    make_private_dir(work)?;
    let found = fs::symlink_metadata(work).at("look at", work)?;
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() {
        let source = io::Error::other("it is not this user's own folder; remove it");
        return Err(FileError { doing: "use the work folder", path: work.to_owned(), source });
    }
    if found.mode() & 0o077 != 0 {
        fs::set_permissions(work, fs::Permissions::from_mode(0o700)).at("make private", work)?;
    }
    Ok(())
}

/// Removes a file or folder, if it is there.
pub(crate) fn clear(path: &Path) -> Result<(), FileError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.at("remove", path),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_others_is_overwritten() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::write(&from, "new").unwrap();
        fs::write(&to, "theirs").unwrap();
        assert!(matches!(place(&from, &to, None), Err(PlaceError::Exists { .. })));
        assert_eq!(fs::read_to_string(&to).unwrap(), "theirs");
        let known = fs::metadata(&to).map(|found| (found.dev(), found.ino())).unwrap();
        assert_eq!(place(&from, &to, Some(known)).unwrap(), [dir.path().join("to.kept-1")]);
        assert_eq!(fs::read_to_string(&to).unwrap(), "new");
        fs::create_dir(&from).unwrap();
        fs::create_dir(dir.path().join("empty")).unwrap();
        assert!(place(&from, &dir.path().join("empty"), None).is_err(), "not even an empty folder");
        assert!(place(&from, &dir.path().join("free"), None).unwrap().is_empty());
    }
}
