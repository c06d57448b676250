//! Seeders that sent something else than the goods have nothing more to do with that purchase, in later runs neither.

use std::path::PathBuf;

use delivery::SourceReport;
use protocol::{PeerId, TransactionId};

use crate::home::{FileError, Home, make_private_dir, read_file, replace_file};

/// A purchase meets few seeders, and fewer liars.
const MOST: usize = 128;
/// A peer ID and its line's end have less.
const LINE: usize = 64;

fn list(home: &Home, transaction: &TransactionId) -> PathBuf {
    home.delivery_dir(transaction).join("banned")
}

/// Those of earlier runs. Blocks.
pub(super) fn load(home: &Home, transaction: &TransactionId) -> Result<Vec<PeerId>, FileError> {
    let bytes = read_file(&list(home, transaction), MOST * LINE)?.unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.lines().filter_map(|line| line.parse().ok()).take(MOST).collect())
}

/// Adds those of this run. Blocks.
pub(super) fn note(home: &Home, transaction: &TransactionId, sources: &[SourceReport]) -> Result<(), FileError> {
    let mut banned = load(home, transaction)?;
    let before = banned.len();
    for source in sources.iter().filter(|source| source.banned) {
        if !banned.contains(&source.peer) && banned.len() < MOST {
            banned.push(source.peer);
        }
    }
    if banned.len() == before {
        return Ok(());
    }
    make_private_dir(&home.delivery_dir(transaction))?;
    let lines: String = banned.iter().map(|peer| format!("{peer}\n")).collect();
    replace_file(&list(home, transaction), lines.as_bytes(), false)
}
