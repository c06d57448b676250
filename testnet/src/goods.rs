//! Goods to sell, and the comparison of what arrived with them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// A folder with two files of noise, one of them in a subfolder.
#[derive(Clone, Debug)]
pub struct Goods {
    /// Where it is.
    pub path: PathBuf,
    /// Bytes of all files.
    pub bytes: u64,
}

impl Goods {
    /// Writes `bytes` of noise, different for each `seed`, into a new folder `dir/name`.
    ///
    /// # Errors
    /// The system's.
    pub fn write(dir: &Path, name: &str, bytes: u64, seed: u64) -> io::Result<Goods> {
        let path = dir.join(name);
        std::fs::create_dir_all(path.join("bonus"))?;
        let first = bytes / 4;
        noise(&path.join("bonus").join("Zugabe ü.bin"), first, seed)?;
        noise(&path.join("main.bin"), bytes - first, seed ^ u64::MAX)?;
        Ok(Goods { path, bytes })
    }
}

/// Bytes that no compression and no mix-up of places can get right by chance.
fn noise(path: &Path, bytes: u64, seed: u64) -> io::Result<()> {
    let stream = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    let mut file = io::BufWriter::new(std::fs::File::create(path)?);
    io::copy(&mut io::Read::take(stream, bytes), &mut file)?;
    io::Write::flush(&mut file)
}

/// Whether two files, or two folders with everything in them, are the same.
///
/// # Errors
/// The system's.
pub fn identical(a: &Path, b: &Path) -> io::Result<bool> {
    Ok(digests(a)? == digests(b)?)
}

fn digests(root: &Path) -> io::Result<BTreeMap<PathBuf, Option<blake3::Hash>>> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        let name = path.strip_prefix(root).map(Path::to_owned).unwrap_or_default();
        if path.is_dir() {
            for entry in std::fs::read_dir(&path)? {
                waiting.push(entry?.path());
            }
            found.insert(name, None);
        } else {
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(std::fs::File::open(&path)?)?;
            found.insert(name, Some(hasher.finalize()));
        }
    }
    Ok(found)
}
