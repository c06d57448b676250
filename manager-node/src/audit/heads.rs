//! What seeders were told of the log, as they hand it on: heartbeats, each with the newest entry at its time. Only what the
//! manager signed counts; what stands beside it for the eye has to say the same.

use protocol::codec::{self, Wire};
use protocol::evidence::KeySets;
use protocol::trust::{AuditHead, Heartbeat, KeyPurpose, KeySet};
use protocol::{Digest, PeerId, Signed};
use serde::Deserialize;

/// What is known of a head's signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The network's key signed it.
    Proven,
    /// Its key was revoked since: whoever stole it may have made it.
    Revoked,
    /// The network's key sets were not looked at.
    Unchecked,
}

/// The newest entry as a seeder was told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenHead {
    /// The entry's number.
    pub number: u64,
    /// Its digest.
    pub digest: Digest,
    /// When the manager said so, unix milliseconds.
    pub at: u64,
    /// The restore number that it said so under.
    pub restore: u64,
    /// Whose word it is.
    pub standing: Standing,
}

/// Why heads prove nothing.
#[derive(Debug, thiserror::Error)]
#[error("line {line} of {file}: {reason}")]
pub struct HeadsError {
    /// The file.
    pub file: String,
    /// 1 for the first.
    pub line: usize,
    /// Why.
    pub reason: String,
}

/// A line of `willcall seeder heads -o FILE`: a head …
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
struct Told {
    number: u64,
    digest: Digest,
    at: u64,
    restore: u64,
    heartbeat: String,
}

/// … or the key set that the heads' signatures are verified by.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
struct ToldKeys {
    key_set: String,
    version: u64,
}

fn document<T: Wire>(hex: &str, what: &str) -> Result<T, String> {
    let bytes = data_encoding::HEXLOWER.decode(hex.as_bytes());
    let bytes = bytes.map_err(|error| format!("the {what} is no hexadecimal text: {error}"))?;
    codec::decode(&bytes).map_err(|error| format!("the {what} cannot be read: {error}"))
}

/// Reads files of heads, each with its name. With the network's root key their signatures are verified, by the key sets in
/// the files.
///
/// # Errors
/// [`HeadsError`] for the first line that is not what a seeder writes, or whose signature does not hold.
pub fn read_heads(files: &[(String, String)], root: Option<PeerId>) -> Result<Vec<SeenHead>, HeadsError> {
    let lines = || {
        let lines = |(file, text): &'_ (String, String)| {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            lines.map(|(at, line)| (file.clone(), at + 1, line.to_owned())).collect::<Vec<_>>()
        };
        files.iter().flat_map(lines)
    };
    let mut keys = root.map(KeySets::new);
    for (file, line, text) in lines() {
        let Ok(told) = serde_json::from_str::<ToldKeys>(&text) else { continue };
        let wrong = |reason: String| HeadsError { file: file.clone(), line, reason };
        let signed: Signed<KeySet> = document(&told.key_set, "key set").map_err(wrong)?;
        let version = match &mut keys {
            Some(keys) => keys.add(signed).map_err(|error| wrong(format!("the key set does not hold: {error}")))?,
            None => signed.peek().map_err(|error| wrong(error.to_string()))?.version,
        };
        if version != told.version {
            return Err(wrong(format!("it says version {}, and the key set in it is version {version}", told.version)));
        }
    }
    let mut heads = Vec::new();
    for (file, line, text) in lines().filter(|(_, _, text)| serde_json::from_str::<ToldKeys>(text).is_err()) {
        heads.push(head(&text, keys.as_ref()).map_err(|reason| HeadsError { file, line, reason })?);
    }
    Ok(heads)
}

fn head(line: &str, keys: Option<&KeySets>) -> Result<SeenHead, String> {
    let told: Told = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let signed: Signed<Heartbeat> = document(&told.heartbeat, "heartbeat")?;
    let unsound = |error: &dyn std::fmt::Display| format!("the heartbeat does not hold: {error}");
    // The signature alone first: a damaged one is no revoked one.
    let heartbeat = signed.verify(&signed.signer()).map_err(|error| unsound(&error))?;
    let standing = match keys {
        None => Standing::Unchecked,
        Some(keys) if keys.is_revoked(&signed, KeyPurpose::Revocation) => Standing::Revoked,
        Some(keys) => {
            keys.open(&signed, KeyPurpose::Revocation, |heartbeat| heartbeat.at).map_err(|error| unsound(&error))?;
            Standing::Proven
        }
    };
    let AuditHead { number, digest } = heartbeat.audit.ok_or("the heartbeat names no entry of a log")?;
    let beside = [
        ("number", told.number.to_string(), number.to_string()),
        ("digest", told.digest.to_string(), digest.to_string()),
        ("at", told.at.to_string(), heartbeat.at.to_string()),
        ("restore", told.restore.to_string(), heartbeat.restore.to_string()),
    ];
    if let Some((name, told, signed)) = beside.iter().find(|(_, told, signed)| told != signed) {
        return Err(format!("it says {name} {told}, and the heartbeat that the manager signed says {signed}"));
    }
    Ok(SeenHead { number, digest, at: heartbeat.at, restore: heartbeat.restore, standing })
}
