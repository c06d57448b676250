//! A product whose folder is in its place already: what a run brought goes in file by file, and whatever else lies there
//! stays, whoever made it. What stands where a file belongs and is another one is not overwritten but kept aside, under a
//! name that is told. Each file gets its name by one rename, so that none is ever half there; what a crash leaves undone,
//! the next fetch does.
//!
//! Others may write to the folder, so it is entered by open folders and never through a link.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, openat, readlinkat, renameat, renameat_with, statat};
use rustix::io::Errno;
use store::Step;

use crate::home::At;
use crate::place::PlaceError;

/// Longest name that file systems take.
const MAX_NAME: usize = 255;
/// Names tried for one thing that is kept aside; whoever has more of them has other worries.
const ASIDES: u32 = 10_000;
/// Somebody may put something there again meanwhile; not for ever.
const TRIES: u32 = 8;

/// Puts what is at `from` to where this delivery put things before, `to`, which was seen to be `known` (device and
/// inode). Gives what was kept aside.
pub(crate) fn merge(from: &Path, to: &Path, known: (u64, u64)) -> Result<Vec<PathBuf>, PlaceError> {
    let exists = || PlaceError::Exists { path: to.to_owned() };
    let (Some(parent), Some(name)) = (to.parent(), to.file_name()) else { return Err(exists()) };
    let folder = open_folder(CWD, parent.as_os_str(), OFlags::empty()).at("open the folder", parent)?;
    let found = statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW).at("look at", to)?;
    #[allow(clippy::unnecessary_cast, reason = "their widths differ between systems")]
    if (found.st_dev as u64, found.st_ino as u64) != known {
        return Err(exists());
    }
    let mut merge = Merge { kept: Vec::new() };
    merge.put(from, folder.as_fd(), name, to)?;
    rustix::fs::fsync(&folder).at("sync the folder", parent)?;
    Ok(merge.kept)
}

struct Merge {
    kept: Vec<PathBuf>,
}

impl Merge {
    /// Moves `from` into an open folder; `to` is the name there, for people.
    fn put(&mut self, from: &Path, folder: BorrowedFd<'_>, name: &OsStr, to: &Path) -> Result<(), PlaceError> {
        for _ in 0..TRIES {
            Step::ClientMerged.before();
            match rename_new(CWD, from.as_os_str(), folder, name) {
                Ok(()) => {
                    Step::ClientMerged.after();
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Ok(Err(error).at("move the product to", to)?),
            }
            let kind = fs::symlink_metadata(from).at("look at", from)?.file_type();
            if kind.is_dir() {
                match open_folder(folder, name, OFlags::NOFOLLOW) {
                    Ok(open) => return self.put_all(from, &open, to),
                    // Something else, or gone since.
                    Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => {}
                    Err(errno) => return Ok(Err(errno).at("open the folder", to)?),
                }
            } else if kind.is_symlink() {
                let target = fs::read_link(from).at("read the link", from)?;
                if readlinkat(folder, name, Vec::new()).is_ok_and(|there| there.as_bytes() == bytes_of(&target)) {
                    return Ok(());
                }
            } else if is_same(from, folder, name).at("compare", to)? {
                return Ok(());
            }
            self.keep_aside(folder, name, to)?;
        }
        Err(PlaceError::Exists { path: to.to_owned() })
    }

    /// What is in a folder, into one that is there.
    fn put_all(&mut self, from: &Path, open: &OwnedFd, to: &Path) -> Result<(), PlaceError> {
        for entry in fs::read_dir(from).at("list the folder", from)? {
            let name = entry.at("list the folder", from)?.file_name();
            self.put(&from.join(&name), open.as_fd(), &name, &to.join(&name))?;
        }
        Ok(rustix::fs::fsync(open).at("sync the folder", to)?)
    }

    /// Gives what stands in the way another name beside.
    fn keep_aside(&mut self, folder: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<(), PlaceError> {
        for number in 1..=ASIDES {
            let aside = aside_name(name, number);
            Step::ClientKeptAside.before();
            match rename_new(folder, name, folder, &aside) {
                Ok(()) => {
                    Step::ClientKeptAside.after();
                    let kept = path.with_file_name(aside);
                    tracing::warn!(path = %path.display(), kept = %kept.display(), "not what was sold, kept aside");
                    self.kept.push(kept);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                // Whoever owned it took it away.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Ok(Err(error).at("keep aside", path)?),
            }
        }
        Err(PlaceError::Exists { path: path.to_owned() })
    }
}

/// `name.kept-1`, as much of it as a name may have.
fn aside_name(name: &OsStr, number: u32) -> OsString {
    let suffix = format!(".kept-{number}");
    let name = name.to_string_lossy();
    let mut end = name.len().min(MAX_NAME - suffix.len());
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{suffix}", name.get(..end).unwrap_or_default()).into()
}

/// Is the file there the one that came? Where only the right to run it is missing, it gets that.
fn is_same(from: &Path, folder: BorrowedFd<'_>, name: &OsStr) -> io::Result<bool> {
    // A pipe is not waited for.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut there = match openat(folder, name, flags, Mode::empty()) {
        Ok(open) => File::from(open),
        // A link, a socket, gone, or not for this user to read: another thing, at any rate.
        Err(_) => return Ok(false),
    };
    let mut came = File::open(from)?;
    let (is, wanted) = (there.metadata()?, came.metadata()?);
    if !is.is_file() || is.len() != wanted.len() {
        return Ok(false);
    }
    let (mut one, mut other) = (vec![0; 1 << 18], vec![0; 1 << 18]);
    let mut left = wanted.len();
    while left > 0 {
        let take = usize::try_from(left).unwrap_or(usize::MAX).min(one.len());
        let (Some(one), Some(other)) = (one.get_mut(..take), other.get_mut(..take)) else { break };
        came.read_exact(one)?;
        // One that cannot be read is another one, and so is one that is cut off meanwhile.
        if there.read_exact(other).is_err() || one != other {
            return Ok(false);
        }
        left -= take as u64;
    }
    let mode = is.permissions().mode();
    if wanted.permissions().mode() & 0o100 != 0 && mode & 0o100 == 0 {
        there.set_permissions(fs::Permissions::from_mode(mode & 0o7777 | (mode & 0o444) >> 2))?;
    }
    Ok(true)
}

fn open_folder(folder: impl AsFd, name: &OsStr, more: OFlags) -> Result<OwnedFd, Errno> {
    openat(folder, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | more, Mode::empty())
}

fn bytes_of(path: &Path) -> &[u8] {
    std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str())
}

/// A rename that overwrites nothing, where the file system can do that; else with a look before it.
pub(crate) fn rename_new(from: impl AsFd, old: &OsStr, to: impl AsFd, new: &OsStr) -> io::Result<()> {
    match renameat_with(&from, old, &to, new, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => match statat(&to, new, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
            Err(Errno::NOENT) => Ok(renameat(from, old, to, new)?),
            Err(errno) => Err(errno.into()),
        },
        other => other.map_err(|errno| match errno {
            Errno::EXIST | Errno::NOTEMPTY => io::ErrorKind::AlreadyExists.into(),
            errno => errno.into(),
        }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn write(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn inode(path: &Path) -> (u64, u64) {
        let found = fs::symlink_metadata(path).unwrap();
        (found.dev(), found.ino())
    }

    fn read(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn what_is_there_stays_and_what_is_in_the_way_is_kept_aside() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to, outside) = (dir.path().join("work/goods"), dir.path().join("goods"), dir.path().join("outside"));
        for name in ["same", "changed", "new", "folder/deep/x", "linked/y", "file-here/z", "run"] {
            write(&from.join(name), name);
        }
        symlink("same", from.join("link")).unwrap();
        symlink("same", from.join("other-link")).unwrap();
        fs::set_permissions(from.join("run"), fs::Permissions::from_mode(0o755)).unwrap();
        write(&to.join("same"), "same");
        write(&to.join("changed"), "my own");
        write(&to.join("changed.kept-1"), "kept before");
        write(&to.join("mine/save"), "mine");
        write(&to.join("folder/mine"), "mine");
        write(&to.join("file-here"), "a file");
        write(&to.join("run"), "run");
        fs::set_permissions(to.join("run"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("same", to.join("link")).unwrap();
        symlink("elsewhere", to.join("other-link")).unwrap();
        fs::create_dir(&outside).unwrap();
        symlink(&outside, to.join("linked")).unwrap();
        let same = inode(&to.join("same"));

        assert!(matches!(merge(&from, &to, (0, 0)), Err(PlaceError::Exists { .. })));
        let mut kept = merge(&from, &to, inode(&to)).unwrap();
        kept.sort();
        let names = ["changed.kept-2", "file-here.kept-1", "linked.kept-1", "other-link.kept-1"];
        assert_eq!(kept, names.map(|name| to.join(name)));
        for name in ["same", "changed", "new", "folder/deep/x", "linked/y", "file-here/z", "run"] {
            assert_eq!(read(&to.join(name)), name);
        }
        assert_eq!(fs::read_link(to.join("other-link")).unwrap(), Path::new("same"));
        assert_eq!(inode(&to.join("same")), same, "not touched");
        assert_eq!(fs::metadata(to.join("run")).unwrap().permissions().mode() & 0o777, 0o750);
        assert_eq!(read(&to.join("changed.kept-2")), "my own");
        assert_eq!(read(&to.join("changed.kept-1")), "kept before");
        assert_eq!(read(&to.join("file-here.kept-1")), "a file");
        assert_eq!((read(&to.join("mine/save")), read(&to.join("folder/mine"))), ("mine".into(), "mine".into()));
        assert_eq!(fs::read_link(to.join("linked.kept-1")).unwrap(), outside);
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "nothing was written through the link");
    }

    #[test]
    fn a_single_file_takes_its_place_and_the_other_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("work/x"), dir.path().join("x"));
        write(&from, "sold");
        write(&to, "mine");
        assert_eq!(merge(&from, &to, inode(&to)).unwrap(), [dir.path().join("x.kept-1")]);
        assert_eq!((read(&to), read(&dir.path().join("x.kept-1"))), ("sold".into(), "mine".into()));
        write(&from, "sold");
        assert!(merge(&from, &to, inode(&to)).unwrap().is_empty());
    }

    #[test]
    fn long_names_are_kept_aside_too() {
        let name = "\u{e9}".repeat(127);
        let aside = aside_name(name.as_ref(), 12);
        assert!(aside.len() <= MAX_NAME && aside.to_str().unwrap().ends_with("\u{e9}.kept-12"));
    }
}
