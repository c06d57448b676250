//! Goods that cannot be guessed or compressed, and whether two of them are the same.

use std::fs;
use std::path::{Path, PathBuf};

/// So many bytes, different for each `seed`, the same each time.
pub(crate) fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut out = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

/// Panics unless names, kinds, contents, executable bits and where links lead are the same.
#[track_caller]
pub(crate) fn same(sold: &Path, arrived: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let kind = |path: &Path| fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (a, b) = (kind(sold), kind(arrived));
    assert_eq!(a.file_type(), b.file_type(), "{}", arrived.display());
    if a.is_symlink() {
        assert_eq!(fs::read_link(sold).unwrap(), fs::read_link(arrived).unwrap());
    } else if a.is_file() {
        assert_eq!(a.permissions().mode() & 0o100, b.permissions().mode() & 0o100, "{}", arrived.display());
        assert!(fs::read(sold).unwrap() == fs::read(arrived).unwrap(), "{} differs", arrived.display());
    } else {
        let names = |path: &Path| {
            let mut names: Vec<PathBuf> =
                fs::read_dir(path).unwrap().map(|entry| PathBuf::from(entry.unwrap().file_name())).collect();
            names.sort();
            names
        };
        assert_eq!(names(sold), names(arrived), "in {}", arrived.display());
        for name in names(sold) {
            same(&sold.join(&name), &arrived.join(&name));
        }
    }
}
