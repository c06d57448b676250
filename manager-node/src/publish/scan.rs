//! Looks at what is to be published before a byte of it is read: everything that cannot be packed is refused by its
//! path now, and what was seen is remembered, so that a file that changes meanwhile is noticed.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use protocol::codec::Wire;
use protocol::pack::{self, Entry, EntryKind, FileList};

/// What a file looked like when it was scanned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    pub(crate) size: u64,
    modified: (i64, i64),
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// What is to be packed, in the order of packing.
#[derive(Clone, Debug)]
pub(crate) struct Scan {
    /// The list that goes into the pack.
    pub(crate) list: FileList,
    /// The list's byte form.
    pub(crate) list_bytes: Vec<u8>,
    /// The regular files, in the order of the list.
    pub(crate) files: Vec<(PathBuf, Stamp)>,
    /// Bytes of all files.
    pub(crate) file_bytes: u64,
}

impl Scan {
    /// Length of the pack before encryption.
    pub(crate) fn plain_len(&self) -> u64 {
        self.file_bytes.saturating_add((pack::HEADER_LEN + self.list_bytes.len()) as u64)
    }
}

/// Why something cannot be published as it lies there.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Neither file nor folder nor link.
    #[error("{} is a {kind}; only files, folders and symbolic links can be published", path.display())]
    Kind {
        /// The path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// A name that not every system can write.
    #[error("{} has a name that is not UTF-8; rename it", path.display())]
    Name {
        /// The path, with replacement characters.
        path: PathBuf,
    },
    /// A link that leads out.
    #[error("{} is a symbolic link that points outside of what is published; remove it or put a copy there", path.display())]
    LinkOut {
        /// The link.
        path: PathBuf,
    },
    /// Too many, too long, colliding names.
    #[error("{}: {source}", path.display())]
    Pack {
        /// What was to be published.
        path: PathBuf,
        /// What is wrong.
        source: pack::PackError,
    },
    /// The manager's own keys would be published.
    #[error("{} contains the manager's own directory {}; publish something else", path.display(), dir.display())]
    OwnKeys {
        /// What was to be published.
        path: PathBuf,
        /// The manager's directory.
        dir: PathBuf,
    },
    /// The list itself is too long.
    #[error("{}: the list of its files takes {bytes} bytes, at most {} are possible; publish it in parts", path.display(), FileList::MAX)]
    ListTooLong {
        /// What was to be published.
        path: PathBuf,
        /// Length of the list, bytes.
        bytes: usize,
    },
}

/// Walks `path`; `own` is the manager's directory. Blocks.
pub(crate) fn scan(path: &Path, own: &Path) -> Result<Scan, ScanError> {
    let io_error = |path: &Path| {
        let path = path.to_owned();
        move |source| ScanError::Io { path, source }
    };
    // What is named on the command line may be a link; what lies below it is taken as it is.
    let root = fs::canonicalize(path).map_err(io_error(path))?;
    if let Ok(dir) = fs::canonicalize(own)
        && (dir.starts_with(&root) || root.starts_with(&dir))
    {
        return Err(ScanError::OwnKeys { path: root, dir });
    }
    let name = root.file_name().ok_or_else(|| ScanError::Kind { path: root.clone(), kind: "root folder" })?;
    let name = name.to_str().ok_or_else(|| ScanError::Name { path: root.clone() })?.to_owned();
    let metadata = fs::symlink_metadata(&root).map_err(io_error(&root))?;
    let mut walk = Walk { root: root.clone(), entries: Vec::new(), files: Vec::new(), file_bytes: 0 };
    let single_file = metadata.is_file();
    if single_file {
        walk.add_file(name.clone(), root.clone(), &metadata);
    } else if metadata.is_dir() {
        walk.folder(&root, "")?;
    } else {
        return Err(ScanError::Kind { path: root, kind: kind_of(&metadata) });
    }
    let Walk { entries, files, file_bytes, .. } = walk;
    let list = FileList { name, single_file, entries };
    list.check().map_err(|source| ScanError::Pack { path: root.clone(), source })?;
    let list_bytes = protocol::codec::encode(&list);
    if list_bytes.len() > FileList::MAX {
        return Err(ScanError::ListTooLong { path: root, bytes: list_bytes.len() });
    }
    Ok(Scan { list, list_bytes, files, file_bytes })
}

struct Walk {
    root: PathBuf,
    entries: Vec<Entry>,
    files: Vec<(PathBuf, Stamp)>,
    file_bytes: u64,
}

impl Walk {
    /// Adds what is in a folder, sorted by the names' bytes, each folder before what is in it. The depth is bounded
    /// by [`pack::MAX_DEPTH`], so that recursion is.
    fn folder(&mut self, folder: &Path, prefix: &str) -> Result<(), ScanError> {
        let io_error = |source| ScanError::Io { path: folder.to_owned(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(folder).map_err(io_error)? {
            let entry = entry.map_err(io_error)?;
            let name = entry.file_name().into_string().map_err(|_| ScanError::Name { path: entry.path() })?;
            names.push(name);
            self.check_count(self.entries.len() + names.len())?;
        }
        names.sort_unstable();
        for name in names {
            let path = folder.join(&name);
            let relative = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
            let metadata =
                fs::symlink_metadata(&path).map_err(|source| ScanError::Io { path: path.clone(), source })?;
            self.check_count(self.entries.len() + 1)?;
            if metadata.is_file() {
                self.add_file(relative, path, &metadata);
            } else if metadata.is_dir() {
                if relative.split('/').count() > pack::MAX_DEPTH {
                    let source = pack::PackError::Path { path: relative, why: "more than 64 folders deep" };
                    return Err(ScanError::Pack { path: self.root.clone(), source });
                }
                self.entries.push(Entry { path: relative.clone(), kind: EntryKind::Folder });
                self.folder(&path, &relative)?;
            } else if metadata.is_symlink() {
                let target = self.link_target(&path, &relative)?;
                self.entries.push(Entry { path: relative, kind: EntryKind::Link { target } });
            } else {
                return Err(ScanError::Kind { path, kind: kind_of(&metadata) });
            }
        }
        Ok(())
    }

    fn check_count(&self, count: usize) -> Result<(), ScanError> {
        if count > pack::MAX_ENTRIES {
            return Err(ScanError::Pack { path: self.root.clone(), source: pack::PackError::TooMany(count) });
        }
        Ok(())
    }

    fn add_file(&mut self, relative: String, path: PathBuf, metadata: &Metadata) {
        let stamp = Stamp::of(metadata);
        let kind = EntryKind::File { size: stamp.size, executable: metadata.mode() & 0o100 != 0 };
        self.file_bytes = self.file_bytes.saturating_add(stamp.size);
        self.entries.push(Entry { path: relative, kind });
        self.files.push((path, stamp));
    }

    /// A link stays when both its text and what it leads to are inside.
    fn link_target(&self, path: &Path, relative: &str) -> Result<String, ScanError> {
        let outside = || ScanError::LinkOut { path: path.to_owned() };
        let target = fs::read_link(path).map_err(|source| ScanError::Io { path: path.to_owned(), source })?;
        let target = target.into_os_string().into_string().map_err(|_| ScanError::Name { path: path.to_owned() })?;
        pack::check_link(relative, &target).map_err(|_| outside())?;
        match fs::canonicalize(path) {
            Ok(real) if real.starts_with(&self.root) => Ok(target),
            Ok(_) => Err(outside()),
            // It leads nowhere, or in circles: then only its text can be judged, and a step up after a step down may
            // pass through another link, which text does not show.
            Err(_) => {
                let mut parts = target.split('/').filter(|part| !part.is_empty() && *part != ".");
                let ups_first = parts.by_ref().skip_while(|part| *part == "..").all(|part| part != "..");
                if ups_first { Ok(target) } else { Err(outside()) }
            }
        }
    }
}

fn kind_of(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    match () {
        () if kind.is_fifo() => "named pipe",
        () if kind.is_socket() => "socket",
        () if kind.is_char_device() || kind.is_block_device() => "device",
        () if kind.is_symlink() => "symbolic link",
        () => "special file",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;
    use std::os::unix::fs::symlink;

    fn temp() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("album");
        fs::create_dir(&root).unwrap();
        (dir, root)
    }

    fn scan_error(root: &Path) -> String {
        scan(root, Path::new("/nowhere")).unwrap_err().to_string()
    }

    #[test]
    fn order_is_the_names_and_odd_names_are_kept() {
        let (_dir, root) = temp();
        fs::create_dir_all(root.join("b/sub")).unwrap();
        for name in ["z", "a", "b/sub/1", "b/x y\n", "日本", "-rf *", "b.txt"] {
            fs::write(root.join(name), name).unwrap();
        }
        symlink("b/sub/1", root.join("link")).unwrap();
        symlink("missing", root.join("b/dangling")).unwrap();
        let scan = scan(&root, Path::new("/nowhere")).unwrap();
        let paths: Vec<&str> = scan.list.entries.iter().map(|e| e.path.as_str()).collect();
        assert_eq!(
            paths,
            ["-rf *", "a", "b", "b/dangling", "b/sub", "b/sub/1", "b/x y\n", "b.txt", "link", "z", "日本"]
        );
        assert_eq!(scan.files.len(), 7);
        assert_eq!(scan.list.name, "album");
        assert!(!scan.list.single_file);
    }

    #[test]
    fn one_file_and_an_empty_folder_are_products() {
        let (_dir, root) = temp();
        let empty = scan(&root, Path::new("/nowhere")).unwrap();
        assert!(empty.list.entries.is_empty() && empty.file_bytes == 0);
        fs::write(root.join("one"), b"x").unwrap();
        let one = scan(&root.join("one"), Path::new("/nowhere")).unwrap();
        assert!(one.list.single_file && one.list.name == "one" && one.file_bytes == 1);
    }

    #[test]
    fn links_that_leave_are_refused_with_their_path() {
        let (dir, root) = temp();
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(dir.path().join("secret"), b"x").unwrap();
        let link = root.join("a/out");
        for target in ["../../secret", "/etc/passwd", "../../missing", "../b/../../missing"] {
            symlink(target, &link).unwrap();
            let error = scan_error(&root);
            assert!(error.contains("a/out") && error.contains("outside"), "{target}: {error}");
            fs::remove_file(&link).unwrap();
        }
        // Inside by its text, outside by way of another link.
        symlink("../..", root.join("a/b/up")).unwrap();
        symlink("a/b/up/..", root.join("sneaky")).unwrap();
        assert!(scan_error(&root).contains("sneaky"));
        fs::remove_file(root.join("sneaky")).unwrap();
        symlink("a/b/up/../missing", root.join("sneaky")).unwrap();
        assert!(scan_error(&root).contains("sneaky"));
    }

    #[test]
    fn what_is_no_file_or_has_no_portable_name_is_refused_with_its_path() {
        let (_dir, root) = temp();
        let socket = root.join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(scan_error(&root).contains("socket is a socket"));
        fs::remove_file(&socket).unwrap();

        let pipe = root.join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        assert!(scan_error(&root).contains("pipe is a named pipe"));
        fs::remove_file(&pipe).unwrap();

        let odd = root.join(std::ffi::OsString::from_vec(vec![b'x', 0xff]));
        fs::write(&odd, b"").unwrap();
        assert!(scan_error(&root).contains("not UTF-8"));
        fs::remove_file(&odd).unwrap();

        fs::write(root.join("Read"), b"").unwrap();
        fs::write(root.join("read"), b"").unwrap();
        let error = scan_error(&root);
        assert!(error.contains("same file on some systems"), "{error}");
    }

    #[test]
    fn the_managers_own_directory_and_missing_paths_are_refused() {
        let (dir, root) = temp();
        fs::create_dir(root.join("manager")).unwrap();
        let error = scan(&root, &root.join("manager")).unwrap_err().to_string();
        assert!(error.contains("own directory"), "{error}");
        assert!(scan_error(&dir.path().join("nothing")).contains("nothing"));
    }
}
