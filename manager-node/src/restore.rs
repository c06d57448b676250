//! Notices that the database is older than the directory around it, which is what coming back from a backup looks like.
//! The number that counts it tells seeders to send again what was marked as received. A restore of the whole directory
//! cannot be seen from within; [`mark_restored`] is for that.

use std::path::{Path, PathBuf};
use std::{fs, io};

use bincode::{Decode, Encode};
use node::{DirLock, DirLockError};
use protocol::wire;
use store::{Db, StoreError, Table};

use crate::audit;
use crate::start::STORE;
use crate::tables::MANAGER;

/// Why the restore number is not known.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The file.
    #[error("cannot use {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// It holds something else.
    #[error(
        "{} is damaged; write 'restores N' and 'starts 0' into it, with N higher than any restore number that seeders \
         have seen",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A manager runs over the folder.
    #[error(transparent)]
    Lock(#[from] DirLockError),
    /// It is to be above what no restore number is.
    #[error("{above} is no restore number: seeders name theirs (seeder status, fork)")]
    NoNumber {
        /// What was given.
        above: u64,
    },
    /// There is none to be marked.
    #[error("{} holds no manager: there is no {STORE} in it", dir.display())]
    NoManager {
        /// The folder.
        dir: PathBuf,
    },
}

/// No time in seconds is later, and no restore number above it.
const HIGHEST: u64 = 100_000_000_000;

/// When the manager first ran again after its newest restore.
const RESTORED: Table<(), Restored> = Table::new("restored");

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct Restored {
    /// Which restore.
    number: u64,
    /// Unix milliseconds.
    at: u64,
}

wire!(Restored => 32);

/// The newest restore from a backup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Restore {
    /// Its number; 0 where there was none.
    pub(crate) number: u64,
    /// When the manager ran again, unix milliseconds: what it took in between the backup and then it may have forgotten.
    pub(crate) at: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    restores: u64,
    starts: u64,
}

fn path(dir: &Path) -> PathBuf {
    dir.join("restores")
}

/// Counts this start, in the database and beside it, and returns the newest restore. Blocks.
pub(crate) fn count_start(dir: &Path, db: &Db) -> Result<Restore, RestoreError> {
    let mut counts = read(dir)?;
    let starts = db.write_blocking(|txn| {
        let mut record = MANAGER.get(txn, &())?.unwrap_or_default();
        record.starts += 1;
        MANAGER.put(txn, &(), &record)?;
        Ok::<_, StoreError>(record.starts)
    })?;
    // The database is counted first: a crash in between leaves it ahead, never behind.
    if starts <= counts.starts {
        counts.restores = next(counts.restores);
        tracing::warn!(restores = counts.restores, "the database is from a backup: seeders will send receipts again");
    }
    counts.starts = starts;
    write(dir, counts)?;
    note(db, counts.restores)?;
    let known = db.read(|txn| RESTORED.get(txn, &()))?.filter(|restored| restored.number == counts.restores);
    let at = known.map_or_else(|| end_of_second(counts.restores), |restored| restored.at);
    Ok(Restore { number: counts.restores, at: (counts.restores > 0).then_some(at) })
}

/// A restore number is the second in which the restore was made.
fn end_of_second(number: u64) -> u64 {
    number.saturating_add(1).saturating_mul(1000)
}

/// Puts a restore into the audit log, once: it explains why the log has fewer entries than seeders were told of. The time
/// is that of the first run after it: until then the manager from before may have run elsewhere and taken more in.
fn note(db: &Db, restore: u64) -> Result<(), StoreError> {
    let now = crate::context::now_ms();
    db.write_blocking(move |txn| {
        let mut record = MANAGER.get(txn, &())?.unwrap_or_default();
        if record.restore < restore {
            record.restore = restore;
            RESTORED.put(txn, &(), &Restored { number: restore, at: now })?;
            audit::note(txn, now, audit::RESTORE, restore, "the manager came back from a backup")?;
            MANAGER.put(txn, &(), &record)?;
        } else if RESTORED.get(txn, &())?.is_some_and(|known| known.number == restore && known.at > now) {
            // The clock was ahead then, and what is waited for from that time on would be waited for as long.
            RESTORED.put(txn, &(), &Restored { number: restore, at: now })?;
        }
        Ok(())
    })
}

/// To be called, while the manager is stopped, after its whole directory was restored from a backup: seeders will send
/// again what the backup may lack. Returns the new restore number: the time in seconds, so that it is new also when one
/// backup is restored twice. It is in force from the next start on. It is higher than `above`: an earlier restore may have
/// been made by a clock that was ahead, and seeders take no lower number than one that they have seen.
///
/// # Errors
/// [`RestoreError`]; of them [`RestoreError::Lock`] where the manager runs.
pub fn mark_restored(dir: &Path, above: u64) -> Result<u64, RestoreError> {
    if !dir.join(STORE).exists() {
        return Err(RestoreError::NoManager { dir: dir.to_owned() });
    }
    if above > HIGHEST {
        return Err(RestoreError::NoNumber { above });
    }
    let _lock = DirLock::acquire(dir)?;
    raise(dir, above)
}

/// The same for whoever holds the directory.
pub(crate) fn raise(dir: &Path, above: u64) -> Result<u64, RestoreError> {
    let restores = next(read(dir)?.restores.max(above));
    // Starts are counted anew: that the database has fewer than were counted here is what this number tells already, and
    // the next start is not to raise it once more.
    write(dir, Counts { restores, starts: 0 })?;
    Ok(restores)
}

/// Restore numbers are times in seconds: new also when one backup is restored twice.
fn next(before: u64) -> u64 {
    (before + 1).max(crate::context::now_ms() / 1000)
}

fn read(dir: &Path) -> Result<Counts, RestoreError> {
    let path = path(dir);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Counts::default()),
        Err(source) => return Err(RestoreError::Io { path, source }),
    };
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        line.trim().parse::<u64>().ok()
    };
    match (number("restores"), number("starts")) {
        (Some(restores), Some(starts)) => Ok(Counts { restores, starts }),
        _ => Err(RestoreError::Damaged { path }),
    }
}

fn write(dir: &Path, counts: Counts) -> Result<(), RestoreError> {
    let path = path(dir);
    let text = format!("restores {}\nstarts {}\n", counts.restores, counts.starts);
    crate::init::write_file(&path, text.as_bytes()).map_err(|source| RestoreError::Io { path, source })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn an_older_database_counts_as_a_restore() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.redb");
        let whole = || count_start(dir.path(), &Db::open(&file, store::Options::new(1)).unwrap()).unwrap();
        let start = || whole().number;
        assert_eq!((start(), whole()), (0, Restore::default()));
        let backup = fs::read(&file).unwrap();
        assert_eq!(start(), 0);
        fs::write(&file, backup).unwrap();
        let before = crate::context::now_ms();
        let (restore, again) = (whole(), start());
        let first = restore.number;
        // The time at which it ran again, and the same at every later start.
        assert!(restore.at.is_some_and(|at| at >= before), "{restore:?}");
        assert_eq!(whole(), restore);
        assert!(first > 1_700_000_000 && again == first, "{first} {again}");
        let marked = raise(dir.path(), 0).unwrap();
        assert!(marked > first);
        assert_eq!(start(), marked);

        // Its clock was ahead when it came back: what is waited for from then on is not waited for until that time.
        let ahead = Restored { number: marked, at: crate::context::now_ms() + 365 * 86_400_000 };
        let db = Db::open(&file, store::Options::new(1)).unwrap();
        db.write_blocking(move |txn| RESTORED.put(txn, &(), &ahead)).unwrap();
        drop(db);
        let restore = whole();
        assert!(restore.number == marked && restore.at.is_some_and(|at| at <= crate::context::now_ms()), "{restore:?}");

        // A backup from before the newest starts, put back by the command that marks it: one restore, one number.
        let backup = fs::read(&file).unwrap();
        assert_eq!((start(), start()), (marked, marked));
        fs::write(&file, &backup).unwrap();
        let marked = raise(dir.path(), 0).unwrap();
        assert_eq!((start(), start()), (marked, marked));
        // And by hand, after that: seen again.
        fs::write(&file, &backup).unwrap();
        let seen = start();
        assert!(seen > marked);
        assert_eq!(start(), seen);

        assert!(matches!(mark_restored(dir.path(), 0), Err(RestoreError::NoManager { .. })));
        fs::write(dir.path().join(STORE), "").unwrap();
        let lock = DirLock::acquire(dir.path()).unwrap();
        assert!(matches!(mark_restored(dir.path(), 0), Err(RestoreError::Lock(DirLockError::Held { .. }))));
        assert_eq!(start(), seen, "nothing was raised");
        drop(lock);
        assert!(mark_restored(dir.path(), 0).unwrap() > seen);
        // Seeders have seen a number of a clock that was ahead.
        let ahead = seen + 400 * 86_400;
        assert_eq!((mark_restored(dir.path(), ahead).unwrap(), start()), (ahead + 1, ahead + 1));
        assert!(matches!(mark_restored(dir.path(), u64::MAX), Err(RestoreError::NoNumber { above: u64::MAX })));

        fs::write(path(dir.path()), "nonsense").unwrap();
        assert!(matches!(mark_restored(dir.path(), 0), Err(RestoreError::Damaged { .. })));
    }
}
