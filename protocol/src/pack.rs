//! How many files become one run of bytes: a header, the list of files, then their contents in the order of the list.
//! The list comes first so that a client can place every later byte, or fetch only some files; and it is inside the
//! encryption, so that a seeder does not see it.

use std::collections::HashMap;

use bincode::{Decode, Encode};
use unicode_normalization::UnicodeNormalization;

use crate::wire;

/// First bytes of every pack; the last one is the version.
pub const MAGIC: [u8; 8] = *b"WCPACK\0\x01";
/// Header: magic, then the length of the encoded list as u64 little endian.
pub const HEADER_LEN: usize = 16;
/// Most files, folders and links in one product.
pub const MAX_ENTRIES: usize = 100_000;
/// Longest path, bytes of UTF-8.
pub const MAX_PATH: usize = 1024;
/// Longest name of one file or folder, bytes of UTF-8: what common file systems hold.
pub const MAX_NAME: usize = 255;
/// Deepest folder.
pub const MAX_DEPTH: usize = 64;

/// What one entry is.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum EntryKind {
    /// A file of so many bytes.
    File {
        /// Bytes.
        size: u64,
        /// May it be executed?
        executable: bool,
    },
    /// A folder.
    Folder,
    /// A symbolic link, its target relative to the link's own folder and inside the product.
    Link {
        /// Where it points.
        target: String,
    },
}

/// One file, folder or link.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Entry {
    /// Relative to the product's root, parts separated by `/`.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
}

/// The list at the head of a pack.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct FileList {
    /// Name of the file or folder that was published; it is made again at the client.
    pub name: String,
    /// True when the product is one file called `name` and `entries` holds just that.
    pub single_file: bool,
    /// Folders before what is in them.
    pub entries: Vec<Entry>,
}

wire!(FileList => 16 * 1024 * 1024);

/// What is wrong with a list of files.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// A path that could leave the target folder, or that some file system cannot hold.
    #[error("'{path}': {why}")]
    Path {
        /// The path, escaped.
        path: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Too many entries.
    #[error("{0} files and folders, at most {MAX_ENTRIES} are possible")]
    TooMany(usize),
    /// Two names that some file systems take for one.
    #[error("'{0}' and '{1}' are the same file on some systems")]
    Merged(String, String),
    /// Not a pack.
    #[error("not a pack: {0}")]
    Malformed(String),
}

fn path_error(path: &str, why: &'static str) -> PackError {
    PackError::Path { path: path.escape_debug().take(200).collect(), why }
}

/// One part of a path: a name that means itself everywhere.
fn check_name(path: &str, name: &str) -> Result<(), PackError> {
    match name {
        "" => Err(path_error(path, "an empty name")),
        "." | ".." => Err(path_error(path, "'.' and '..' are not names")),
        _ if name.len() > MAX_NAME => Err(path_error(path, "a name longer than 255 bytes")),
        _ if name.contains(['/', '\0']) => Err(path_error(path, "a name with a slash or a zero byte")),
        _ => Ok(()),
    }
}

impl FileList {
    /// Checks everything that unpacking relies on: no path leaves the folder, none is absolute, no link points out,
    /// nothing lies below a file or link, no two names merge.
    ///
    /// # Errors
    /// [`PackError`], naming the path.
    pub fn check(&self) -> Result<(), PackError> {
        if self.entries.len() > MAX_ENTRIES {
            return Err(PackError::TooMany(self.entries.len()));
        }
        check_name(&self.name, &self.name)?;
        if self.single_file
            && !matches!(self.entries.as_slice(), [Entry { path, kind: EntryKind::File { .. } }] if *path == self.name)
        {
            return Err(PackError::Malformed("a single file that is not the one entry".to_owned()));
        }
        let mut seen: HashMap<String, &Entry> = HashMap::with_capacity(self.entries.len());
        for entry in &self.entries {
            check_path(&entry.path)?;
            if let EntryKind::Link { target } = &entry.kind {
                check_link(&entry.path, target)?;
            }
            if let Some((parent, _)) = entry.path.rsplit_once('/') {
                match seen.get(&folded(parent)) {
                    Some(Entry { path, kind: EntryKind::Folder }) if path == parent => {}
                    _ => return Err(path_error(&entry.path, "its folder is not in the list before it")),
                }
            }
            if let Some(other) = seen.insert(folded(&entry.path), entry) {
                return Err(PackError::Merged(other.path.clone(), entry.path.clone()));
            }
        }
        let is_link =
            |path: &str| matches!(seen.get(&folded(path)), Some(e) if matches!(e.kind, EntryKind::Link { .. }));
        self.entries.iter().try_for_each(|entry| check_detours(entry, is_link))
    }

    /// Bytes of all files together; `None` when they do not fit in 64 bits.
    pub fn total_size(&self) -> Option<u64> {
        self.entries.iter().try_fold(0u64, |sum, entry| match entry.kind {
            EntryKind::File { size, .. } => sum.checked_add(size),
            _ => Some(sum),
        })
    }

    /// Number of files.
    pub fn file_count(&self) -> usize {
        self.entries.iter().filter(|e| matches!(e.kind, EntryKind::File { .. })).count()
    }
}

/// Upper and lower case, and composed and decomposed letters, are one on some file systems.
fn folded(path: &str) -> String {
    path.nfc().flat_map(char::to_lowercase).nfc().collect()
}

fn check_path(path: &str) -> Result<(), PackError> {
    if path.len() > MAX_PATH {
        return Err(path_error(path, "a path longer than 1024 bytes"));
    }
    let mut depth = 0;
    for name in path.split('/') {
        check_name(path, name)?;
        depth += 1;
    }
    if depth > MAX_DEPTH {
        return Err(path_error(path, "more than 64 folders deep"));
    }
    Ok(())
}

/// A link's target, followed from the link's folder by its text alone, must stay inside of the product.
pub fn check_link(path: &str, target: &str) -> Result<(), PackError> {
    let outside = || path_error(path, "a symbolic link that points outside of the product");
    if target.is_empty() || target.len() > MAX_PATH || target.contains('\0') {
        return Err(path_error(path, "a symbolic link with an empty or too long target"));
    }
    if target.starts_with('/') {
        return Err(outside());
    }
    let mut depth = path.split('/').count() - 1;
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => depth = depth.checked_sub(1).ok_or_else(outside)?,
            _ => depth += 1,
        }
    }
    Ok(())
}

/// By its text alone a link to `a/b/../../x` stays inside; where `a/b` is itself a link to somewhere higher up, the
/// system follows it out. A link may lead through another one, but not up again behind it.
fn check_detours(entry: &Entry, is_link: impl Fn(&str) -> bool) -> Result<(), PackError> {
    let EntryKind::Link { target } = &entry.kind else { return Ok(()) };
    let mut at: Vec<&str> = entry.path.split('/').collect();
    at.pop();
    let mut behind_link = false;
    for part in target.split('/').filter(|part| !matches!(*part, "" | ".")) {
        if part != ".." {
            at.push(part);
            behind_link |= is_link(&at.join("/"));
        } else if behind_link {
            return Err(path_error(&entry.path, "a symbolic link that goes up again behind another one"));
        } else {
            at.pop();
        }
    }
    Ok(())
}

/// The header of a pack whose encoded list is `list_len` bytes long.
pub fn header(list_len: u64) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    let (magic, len) = header.split_at_mut(8);
    magic.copy_from_slice(&MAGIC);
    len.copy_from_slice(&list_len.to_le_bytes());
    header
}

/// Reads a header: the length of the encoded list.
///
/// # Errors
/// [`PackError::Malformed`] when it is none, or announces a list past the limit.
pub fn read_header(header: &[u8; HEADER_LEN]) -> Result<u64, PackError> {
    let (magic, len) = header.split_at(8);
    if magic != MAGIC {
        return Err(PackError::Malformed("it does not begin like one of this version".to_owned()));
    }
    let len = u64::from_le_bytes(len.try_into().unwrap_or_default());
    if len as u128 > <FileList as crate::codec::Wire>::MAX as u128 {
        return Err(PackError::Malformed(format!("a list of {len} bytes")));
    }
    Ok(len)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn list(entries: &[(&str, EntryKind)]) -> FileList {
        FileList {
            name: "album".into(),
            single_file: false,
            entries: entries.iter().map(|(path, kind)| Entry { path: (*path).into(), kind: kind.clone() }).collect(),
        }
    }
    fn file() -> EntryKind {
        EntryKind::File { size: 1, executable: false }
    }
    fn link(target: &str) -> EntryKind {
        EntryKind::Link { target: target.into() }
    }

    #[test]
    fn ordinary_names_pass_however_odd() {
        list(&[
            ("a b\nc", file()),
            ("日本", EntryKind::Folder),
            ("日本/…", file()),
            ("日本/up", link("../a b\nc")),
            ("-rf *", file()),
            ("a\\b", file()),
        ])
        .check()
        .unwrap();
        list(&[]).check().unwrap();
    }

    #[test]
    fn whatever_could_leave_the_folder_or_collide_is_refused() {
        let bad: Vec<Vec<(&str, EntryKind)>> = vec![
            vec![("../x", file())],
            vec![("/etc/passwd", file())],
            vec![("a//b", file())],
            vec![("a/./b", file())],
            vec![("x/y", file())],
            vec![("x", file()), ("x/y", file())],
            vec![("x", link("y")), ("x/y", file())],
            vec![("x", link("../y"))],
            vec![("x", link("/y"))],
            vec![("d", EntryKind::Folder), ("d/x", link("../../y"))],
            vec![
                ("d", EntryKind::Folder),
                ("d/e", EntryKind::Folder),
                ("d/e/l", link("../..")),
                ("m", link("d/e/l/../../x")),
            ],
            vec![("É", link("x")), ("m", link("e\u{301}/../x"))],
            vec![("Read", file()), ("read", file())],
            vec![("é", file()), ("e\u{301}", file())],
            vec![("x", file()), ("x", file())],
            vec![("nul\0", file())],
            vec![("", file())],
        ];
        for entries in bad {
            assert!(list(&entries).check().is_err(), "{entries:?}");
        }
        let long = "x/".repeat(70) + "y";
        assert!(check_path(&long).is_err());
        assert!(check_path(&"x".repeat(256)).is_err());
    }

    #[test]
    fn header_round_trip_and_limits() {
        assert_eq!(read_header(&header(77)).unwrap(), 77);
        assert!(read_header(&header(u64::MAX)).is_err());
        assert!(read_header(&[0; HEADER_LEN]).is_err());
    }
}
