//! The last step of a delivery is one rename: until it, nothing bears the product's name, and after it, everything is
//! there. What lies at that name already is somebody's work and stays, unless it is this very delivery's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use store::Step;

use crate::home::{At, FileError, sync_dir};

/// Why a finished product was not moved into its place.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Something else is there.
    #[error(
        "{} is there already and is not this delivery; move it away or choose another folder, then fetch again: \
         nothing is downloaded twice", path.display()
    )]
    Exists {
        /// The place.
        path: PathBuf,
    },
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Moves `from` to `to`. With `replace`, what an earlier run of the same delivery put there is set aside into `aside`
/// first, and removed.
pub(crate) fn place(from: &Path, to: &Path, replace: bool, aside: &Path) -> Result<(), PlaceError> {
    Step::ClientPlaced.before();
    let moved = match move_new(from, to) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && replace => {
            clear(aside)?;
            fs::rename(to, aside).at("set aside", to)?;
            let moved = move_new(from, to);
            if moved.is_err() {
                // Better the old goods than none; should this fail, they are found beside, in the work folder.
                let _ = fs::rename(aside, to);
            }
            moved
        }
        other => other,
    };
    match moved {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(PlaceError::Exists { path: to.to_owned() }),
        other => {
            other.at("move the product to", to)?;
            sync_dir(to.parent().unwrap_or(to))?;
            Step::ClientPlaced.after();
            Ok(())
        }
    }
}

/// A rename that overwrites nothing, where the file system can do that; else with a look before it.
fn move_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => match fs::symlink_metadata(to) {
            Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::rename(from, to),
            Err(error) => Err(error),
        },
        other => other.map_err(|errno| match errno {
            Errno::EXIST | Errno::NOTEMPTY => io::ErrorKind::AlreadyExists.into(),
            errno => errno.into(),
        }),
    }
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
        let dir = tempfile::tempdir().unwrap();
        let (from, to, aside) = (dir.path().join("from"), dir.path().join("to"), dir.path().join("aside"));
        fs::write(&from, "new").unwrap();
        fs::write(&to, "theirs").unwrap();
        assert!(matches!(place(&from, &to, false, &aside), Err(PlaceError::Exists { .. })));
        assert_eq!(fs::read_to_string(&to).unwrap(), "theirs");
        place(&from, &to, true, &aside).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "new");
        fs::create_dir(&from).unwrap();
        fs::create_dir(dir.path().join("empty")).unwrap();
        assert!(place(&from, &dir.path().join("empty"), false, &aside).is_err(), "not even an empty folder");
        place(&from, &dir.path().join("free"), false, &aside).unwrap();
    }
}
