//! What disks do to seeders.

use std::io;
use std::os::unix::fs::FileExt;

/// Turns one bit of each `every` bytes of a stored content over, in place and behind its seeder's back; says how many.
/// A seeder checks each chunk when it reads it, so it finds that by itself. One that sends something else than the content
/// is a machine whose memory fails: [`seeder::Running::turn_bits`].
///
/// # Errors
/// The system's.
pub fn corrupt(content: &delivery::Content, every: u64) -> io::Result<u64> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(content.folder().join("content"))?;
    let (length, every, mut turned, mut at) = (file.metadata()?.len(), every.max(1), 0, 0);
    while at < length {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&byte.map(|byte| byte ^ 1), at)?;
        (turned, at) = (turned + 1, at + every);
    }
    Ok(turned)
}
