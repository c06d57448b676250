//! Files that commands write: named in full, because the node that writes one may run in another folder, and refused
//! before anything is done for them where it is plain that they cannot be written.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A file that is to be written: there is a folder for it, and no folder in its place.
pub(crate) fn place(path: &Path) -> Result<PathBuf> {
    let shown = path.display();
    let full = std::path::absolute(path).with_context(|| format!("cannot write {shown}"))?;
    if full.is_dir() {
        bail!("cannot write {shown}: it is a folder; name a file in it");
    }
    let folder = full.parent().unwrap_or(Path::new("/"));
    match folder.metadata() {
        Ok(found) if !found.is_dir() => bail!("cannot write {shown}: {} is not a folder", folder.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("cannot write {shown}: there is no folder {}; make it, or name another file", folder.display())
        }
        // Whoever writes it may see more than this process, and says what it finds.
        Ok(_) | Err(_) => Ok(full),
    }
}

/// The same for a file that is not to be replaced.
pub(crate) fn new_place(path: &Path) -> Result<PathBuf> {
    let full = place(path)?;
    match full.symlink_metadata() {
        Ok(_) => Err(there(path)),
        Err(_) => Ok(full),
    }
}

/// The same, having seen that a file can be made there: for what cannot be taken back once it is done.
pub(crate) fn try_place(path: &Path) -> Result<()> {
    // It has no name that stays.
    NewFile::begin(path).map(drop)
}

fn there(path: &Path) -> anyhow::Error {
    anyhow::anyhow!("cannot write {}: it exists already; name another file, or move that one away", path.display())
}

/// Writes a file that is whole or not there, and replaces none.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut new = NewFile::begin(path)?;
    new.write(bytes)?;
    new.end()
}

/// A file that gets its name once it is whole.
pub(crate) struct NewFile {
    path: PathBuf,
    file: tempfile::NamedTempFile,
}

impl NewFile {
    /// Makes it, without its name.
    pub(crate) fn begin(path: &Path) -> Result<Self> {
        let full = new_place(path)?;
        let folder = full.parent().unwrap_or(Path::new("/"));
        // The system's word alone: the name that the file has until it is whole says nothing to anybody.
        let file = tempfile::NamedTempFile::new_in(folder).map_err(|error| io::Error::from(error.kind()));
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(NewFile { path: path.to_owned(), file })
    }

    /// Adds to it.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).with_context(|| self.failed())
    }

    fn failed(&self) -> String {
        format!("cannot write {}", self.path.display())
    }

    /// Gives it its name.
    pub(crate) fn end(self) -> Result<()> {
        let failed = self.failed();
        self.file.as_file().sync_all().with_context(|| failed.clone())?;
        match self.file.persist_noclobber(&self.path) {
            Ok(_) => Ok(()),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Err(there(&self.path)),
            Err(error) => Err(error.error).context(failed),
        }
    }
}
