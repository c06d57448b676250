//! Files out of ciphertext that is all here: of products whose key came last, or of which only some files were asked for.

use std::collections::HashSet;
use std::path::PathBuf;

use delivery::Lacks;
use protocol::pack::FileList;

use crate::home::FileError;
use crate::layout::{IncompleteError, Layout, Unpacked};
use crate::plain::{Frames, Plain, PlainError};

/// Why a product was not unpacked. What was fetched is kept.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The bytes cannot be read.
    #[error(transparent)]
    Plain(#[from] PlainError),
    /// The disk is full.
    #[error("no {lacks} left at {}: {needed} bytes are still to be written; free some, then fetch again", path.display())]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// Bytes still to be written.
        needed: u64,
        /// Of what there is none left.
        lacks: Lacks,
    },
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// Nothing in the product is called so.
    #[error("nothing in the product is called '{wanted}'; it holds {}", listed(there))]
    NoSuchFile {
        /// What was asked for.
        wanted: String,
        /// Names that there are.
        there: Vec<String>,
    },
    /// The caller broke it off.
    #[error("stopped while unpacking; fetch again to go on")]
    Stopped,
}

fn listed(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let more = names.len().saturating_sub(SHOWN);
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("'{}'", name.escape_debug())).collect();
    match more {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Which entries are wanted.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    /// One for each entry; all when there are none.
    chosen: Option<Vec<bool>>,
}

impl Selection {
    /// Every entry.
    pub(crate) fn all() -> Selection {
        Selection { chosen: None }
    }

    /// The entries that `only` names: a path, a folder with everything in it, or a pattern with `*` and `?`. Everything
    /// when it is empty.
    pub(crate) fn of(list: &FileList, only: &[String]) -> Result<Selection, UnpackError> {
        if only.is_empty() {
            return Ok(Selection::all());
        }
        let mut chosen = vec![false; list.entries.len()];
        for wanted in only {
            let mut found = false;
            for (entry, chosen) in list.entries.iter().zip(&mut chosen) {
                if selects(wanted, &entry.path) {
                    *chosen = true;
                    found = true;
                }
            }
            if !found {
                let there = list.entries.iter().map(|entry| entry.path.clone()).collect();
                return Err(UnpackError::NoSuchFile { wanted: wanted.clone(), there });
            }
        }
        Ok(Selection { chosen: Some(chosen) })
    }

    /// The entries of these paths.
    pub(crate) fn where_is(list: &FileList, chosen: impl Fn(&str) -> bool) -> Selection {
        Selection { chosen: Some(list.entries.iter().map(|entry| chosen(&entry.path)).collect()) }
    }

    /// Is this entry of the list wanted?
    pub(crate) fn has(&self, index: usize) -> bool {
        self.chosen.as_ref().is_none_or(|chosen| chosen.get(index).copied().unwrap_or(false))
    }
}

/// Is this path, or a folder that it lies in, one of these?
pub(crate) fn is_below(path: &str, paths: &HashSet<String>) -> bool {
    path.match_indices('/')
        .map(|(at, _)| at)
        .chain([path.len()])
        .any(|end| path.get(..end).is_some_and(|part| paths.contains(part)))
}

pub(crate) fn selects(wanted: &str, path: &str) -> bool {
    let wanted = wanted.strip_suffix('/').unwrap_or(wanted);
    // A folder stands for what is in it; so does a pattern that matches one.
    path.match_indices('/').map(|(at, _)| at).chain([path.len()]).any(|end| {
        let part = path.get(..end).unwrap_or_default();
        part == wanted || matches(wanted.as_bytes(), part.as_bytes())
    })
}

/// `*` stands for any characters, `?` for one byte of them. Two indices and one way back: no blow-up.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                back = Some((p, t));
                p += 1;
            }
            Some(c) if *c == b'?' || Some(c) == text.get(t) => {
                p += 1;
                t += 1;
            }
            _ => match back {
                Some((star, from)) => {
                    back = Some((star, from + 1));
                    p = star + 1;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|c| *c == b'*')
}

/// Unpacks into `dir`, which is made anew: what an earlier run left there is removed. `progress` is told the bytes
/// written so far, and ends it by answering false.
pub(crate) fn unpack<F: Frames>(
    plain: &mut Plain<F>,
    layout: &Layout,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<Unpacked, UnpackError> {
    let mut written = 0;
    let full_or = |error: FileError, written| match error.is_disk_full() {
        true => {
            let (lacks, needed) = (Lacks::at(&error.path), layout.bytes().saturating_sub(written));
            UnpackError::DiskFull { path: error.path, needed, lacks }
        }
        false => UnpackError::File(error),
    };
    layout.make(true).map_err(|error| full_or(error, 0))?;
    for chunk in layout.chunks().iter() {
        written += layout.write(chunk, plain.frame(chunk)?).map_err(|error| full_or(error, written))?;
        if !progress(written) {
            return Err(UnpackError::Stopped);
        }
    }
    layout.finish().map_err(|error| match error {
        IncompleteError::Lost(chunk) => PlainError::Damaged(chunk).into(),
        IncompleteError::File(error) => full_or(error, written),
    })
}
