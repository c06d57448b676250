//! Are two files or folders the same, byte by byte? Names, kinds, contents, the executable bit and where links point count; times
//! and owners do not.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Compares what was sold with what arrived; the error names the first difference.
pub(super) fn identical(sold: &Path, arrived: &Path) -> Result<()> {
    let (a, b) = (stat(sold)?, stat(arrived)?);
    if a.file_type() != b.file_type() {
        bail!("{} and {} are of different kinds", sold.display(), arrived.display());
    }
    if a.is_symlink() {
        if fs::read_link(sold)? != fs::read_link(arrived)? {
            bail!("{} points elsewhere than {}", arrived.display(), sold.display());
        }
        return Ok(());
    }
    if a.is_file() {
        if a.permissions().mode() & 0o100 != b.permissions().mode() & 0o100 {
            bail!("{} differs in its executable bit", arrived.display());
        }
        return same_bytes(sold, arrived);
    }
    let (names_a, names_b) = (names(sold)?, names(arrived)?);
    if names_a != names_b {
        bail!("{} and {} hold different names", sold.display(), arrived.display());
    }
    names_a.iter().try_for_each(|name| identical(&sold.join(name), &arrived.join(name)))
}

fn stat(path: &Path) -> Result<fs::Metadata> {
    fs::symlink_metadata(path).with_context(|| format!("cannot read {}", path.display()))
}

fn names(dir: &Path) -> Result<Vec<std::ffi::OsString>> {
    let mut names = fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .map(|entry| entry.map(|e| e.file_name()))
        .collect::<Result<Vec<_>, _>>()?;
    names.sort();
    Ok(names)
}

fn same_bytes(sold: &Path, arrived: &Path) -> Result<()> {
    const BLOCK: u64 = 256 * 1024;
    let open = |path: &Path| File::open(path).with_context(|| format!("cannot read {}", path.display()));
    let (mut a, mut b) = (open(sold)?, open(arrived)?);
    let (mut block_a, mut block_b) = (Vec::new(), Vec::new());
    let mut offset = 0;
    loop {
        block_a.clear();
        block_b.clear();
        Read::by_ref(&mut a).take(BLOCK).read_to_end(&mut block_a)?;
        Read::by_ref(&mut b).take(BLOCK).read_to_end(&mut block_b)?;
        if block_a != block_b {
            let same = block_a.iter().zip(&block_b).take_while(|(x, y)| x == y).count();
            bail!("{} differs from {} at byte {}", arrived.display(), sold.display(), offset + same);
        }
        if block_a.is_empty() {
            return Ok(());
        }
        offset += block_a.len();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn differences_are_found_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for root in [&a, &b] {
            fs::create_dir_all(root.join("sub")).unwrap();
            fs::write(root.join("sub/file"), b"same").unwrap();
        }
        identical(&a, &b).unwrap();
        fs::write(b.join("sub/file"), b"samE").unwrap();
        assert!(identical(&a, &b).unwrap_err().to_string().contains("at byte 3"));
        fs::write(b.join("sub/file"), b"same!").unwrap();
        assert!(identical(&a, &b).is_err());
        fs::write(b.join("sub/file"), b"same").unwrap();
        fs::create_dir(b.join("empty")).unwrap();
        assert!(identical(&a, &b).unwrap_err().to_string().contains("different names"));
    }
}
