//! Replaces one key of the network: the one act, besides making the network, that needs the root key. What the next key
//! set is to be is decided here, for a manager that is stopped and for one that runs; `key_change` puts it in force there.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use protocol::root::{RootHandover, commitment, root_after};
use protocol::trust::{KeyEntry, KeyPurpose, KeySet, KeyState, Trust};
use protocol::{NetworkId, PeerId, Refusal, Signed, codec};

use crate::context::now_ms;
use crate::key_change::good_for;
use crate::keys::{KeysError, keys_dir, keys_here, load_key_set, load_own_key_set, purpose_name, store_own_key_set};

/// What became of the old key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldKey {
    /// What it signed stays good for so many milliseconds: at least the longest lease for tickets, a certificate's time
    /// for enrolment, and for the catalogue as long as what was published is to be delivered.
    Retire {
        /// Milliseconds from now.
        good_for_ms: u64,
    },
    /// It was stolen: everything that it signed is void.
    Revoke,
}

/// What was changed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct RotateReport {
    /// Version of the new key set.
    pub version: u64,
    /// The new key; absent where a key was revoked that had been replaced before.
    pub key: Option<PeerId>,
    /// The one that it replaces.
    pub replaced: Option<PeerId>,
    /// Other purposes whose key is not here, and was replaced with it: the manager came back from a backup from before it.
    pub lost: Vec<&'static str>,
    /// Keys under which this manager signed before it heard of others, and which the network has not seen: named now.
    pub own: Vec<PeerId>,
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    /// The manager runs.
    #[error(transparent)]
    Lock(#[from] node::DirLockError),
    /// The key set.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// A key file.
    #[error(transparent)]
    File(#[from] node::KeyFileError),
    /// Another root key than the network's.
    #[error("{} holds {found}, but the network's root key is {expected}; name the right file", path.display())]
    WrongRoot {
        /// The file given.
        path: PathBuf,
        /// The key in it.
        found: PeerId,
        /// The network's.
        expected: PeerId,
    },
    /// Not in the set.
    #[error("the key set holds no key {key}; `willcall manager keys list` shows them")]
    NoSuchKey {
        /// Which.
        key: PeerId,
    },
    /// Not a key set to be signed.
    #[error("this is no key set that can be signed: {reason}")]
    Request {
        /// Why.
        reason: String,
    },
    /// The set is full.
    #[error("the key set holds {} keys, no more are possible", KeySet::MAX_KEYS)]
    Full,
    /// The system refused.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

/// Makes a new key for `purpose` and signs a key set with it. The manager of `dir` must not run. Blocks.
///
/// # Errors
/// [`RotateError`]; the key set in force stays as it is then.
pub fn rotate(
    dir: &Path,
    root_key: &Path,
    passphrase: Option<&str>,
    purpose: KeyPurpose,
    old: OldKey,
) -> Result<RotateReport, RotateError> {
    let _lock = node::DirLock::acquire(dir)?;
    let trust = load_key_set(dir, 0)?;
    let root = node::load_key(root_key, passphrase)?;
    if root.peer_id() != trust.signed_key_set().signer() {
        let (found, expected) = (root.peer_id(), trust.signed_key_set().signer());
        return Err(RotateError::WrongRoot { path: root_key.to_owned(), found, expected });
    }
    let (set, report) = next_set(dir, &trust, Change::Rotate { purpose, old }, now_ms(), 0)?;
    let stored = store_own_key_set(dir, &Signed::sign(&set, &root));
    stored.map_err(|(path, source)| RotateError::Io { path, source })?;
    Ok(report)
}

/// What is to be changed in a key set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A new key takes the place of the active one of a purpose.
    Rotate {
        /// Which purpose.
        purpose: KeyPurpose,
        /// What becomes of the active one.
        old: OldKey,
    },
    /// A key is void; where it is the active one, a new one takes its place.
    Revoke {
        /// Which.
        key: PeerId,
    },
    /// The root key that is to follow is named.
    NameRoot {
        /// Which.
        root: PeerId,
    },
    /// The root key hands over: the new one signs this key set, and those after it.
    Root {
        /// The old one's word.
        handover: Signed<RootHandover>,
        /// Which is to follow that one.
        then: Option<PeerId>,
    },
}

/// The key set after a change, not signed yet. The new private key is written first: a key set without it would keep the
/// manager from starting. The old key may go on signing for `margin_ms`, until the new set is signed and in force.
///
/// Active keys that are not in the folder are replaced as well, by whatever change: the manager came back from a backup from
/// before them, and they can sign nothing any more.
pub(crate) fn next_set(
    dir: &Path,
    trust: &Trust,
    change: Change,
    now: u64,
    margin_ms: u64,
) -> Result<(KeySet, RotateReport), RotateError> {
    let stolen = match change {
        Change::Rotate { purpose, old: OldKey::Revoke } => Some(purpose),
        _ => None,
    };
    let (mut set, mut report) = changed(dir, trust, change, now, margin_ms)?;
    let here = keys_here(dir)?;
    report.own = keep_own(dir, trust, &mut set, &here, stolen, now.saturating_add(margin_ms));
    for purpose in KeyPurpose::ALL {
        let is_lost = |e: &KeyEntry| e.purpose == purpose && e.state == KeyState::Active && !here.contains(&e.key);
        if !set.keys.iter().any(is_lost) {
            continue;
        }
        if set.keys.len() >= KeySet::MAX_KEYS {
            return Err(RotateError::Full);
        }
        replace(dir, &mut set, purpose, OldKey::Retire { good_for_ms: good_for(purpose) }, now, margin_ms)?;
        report.lost.push(purpose_name(purpose));
    }
    Ok((set, report))
}

/// A manager that came back from a backup may have used a number again before it heard of the set that has it, and signed
/// under that. The keys of its own set sign nothing any more; what they did sign holds for as long as under any other, but
/// for a purpose whose key was `stolen`: whoever has the one has the other. Gives those that are named by it.
fn keep_own(
    dir: &Path,
    trust: &Trust,
    set: &mut KeySet,
    here: &HashSet<PeerId>,
    stolen: Option<KeyPurpose>,
    not_issued_after: u64,
) -> Vec<PeerId> {
    let mut named = Vec::new();
    let Ok(own) = load_own_key_set(dir, 0) else { return named };
    let (own, known) = (own.key_set(), trust.key_set());
    if own.version < known.version || own == known {
        return named;
    }
    for entry in own.keys.iter().filter(|entry| entry.state == KeyState::Active && here.contains(&entry.key)) {
        // Of those that are lost each is replaced by one more.
        let room = set.keys.len() + KeyPurpose::ALL.len() < KeySet::MAX_KEYS;
        if room && !set.keys.iter().any(|other| other.key == entry.key) {
            let dead_after = not_issued_after.saturating_add(good_for(entry.purpose));
            let state = match stolen == Some(entry.purpose) {
                true => KeyState::Revoked,
                false => KeyState::Retiring { not_issued_after, dead_after },
            };
            set.keys.push(KeyEntry { state, ..*entry });
            named.push(entry.key);
        }
    }
    named
}

fn changed(
    dir: &Path,
    trust: &Trust,
    change: Change,
    now: u64,
    margin_ms: u64,
) -> Result<(KeySet, RotateReport), RotateError> {
    let mut set = trust.key_set().clone();
    // What is dead says nothing any more; but a purchase names the key of its transaction data for as long as it is kept, and
    // by the heartbeats that seeders keep the audit log is verified years later.
    set.keys.retain(|entry| {
        let dead = matches!(entry.state, KeyState::Retiring { dead_after, .. } if dead_after < now);
        !dead || matches!(entry.purpose, KeyPurpose::Ticket | KeyPurpose::Revocation)
    });
    if set.keys.len() >= KeySet::MAX_KEYS {
        return Err(RotateError::Full);
    }
    set.version += 1;
    set.issued_at = now;
    let (purpose, old) = match change {
        Change::Rotate { purpose, old } => (purpose, old),
        Change::NameRoot { root } => {
            set.next_root = Some(commitment(&root));
            let report = RotateReport {
                version: set.version,
                key: Some(root),
                replaced: None,
                lost: Vec::new(),
                own: Vec::new(),
            };
            return Ok((set, report));
        }
        Change::Root { handover, then } => {
            set.handovers.push(handover);
            set.next_root = then.as_ref().map(commitment);
            let bad = |refusal: Refusal| RotateError::Request { reason: refusal.to_string() };
            let root = root_after(&trust.root(), &set.handovers).map_err(bad)?;
            let replaced = Some(trust.signed_key_set().signer());
            let report =
                RotateReport { version: set.version, key: Some(root), replaced, lost: Vec::new(), own: Vec::new() };
            return Ok((set, report));
        }
        Change::Revoke { key } => {
            let entry = set.keys.iter_mut().find(|entry| entry.key == key).ok_or(RotateError::NoSuchKey { key })?;
            let (purpose, was_active) = (entry.purpose, entry.state == KeyState::Active);
            entry.state = KeyState::Revoked;
            if !was_active {
                let report = RotateReport {
                    version: set.version,
                    key: None,
                    replaced: Some(key),
                    lost: Vec::new(),
                    own: Vec::new(),
                };
                return Ok((set, report));
            }
            let made = make_key(dir, purpose, set.version)?;
            set.keys.push(KeyEntry { purpose, key: made, state: KeyState::Active });
            let report = RotateReport {
                version: set.version,
                key: Some(made),
                replaced: Some(key),
                lost: Vec::new(),
                own: Vec::new(),
            };
            return Ok((set, report));
        }
    };
    let (key, replaced) = replace(dir, &mut set, purpose, old, now, margin_ms)?;
    let report = RotateReport { version: set.version, key: Some(key), replaced, lost: Vec::new(), own: Vec::new() };
    Ok((set, report))
}

/// A new key for a purpose, and the one that it replaces.
fn replace(
    dir: &Path,
    set: &mut KeySet,
    purpose: KeyPurpose,
    old: OldKey,
    now: u64,
    margin_ms: u64,
) -> Result<(PeerId, Option<PeerId>), RotateError> {
    let key = make_key(dir, purpose, set.version)?;
    let mut replaced = None;
    for entry in set.keys.iter_mut().filter(|e| e.purpose == purpose && e.state == KeyState::Active) {
        replaced = Some(entry.key);
        entry.state = match old {
            OldKey::Retire { good_for_ms } => {
                let not_issued_after = now.saturating_add(margin_ms);
                KeyState::Retiring { not_issued_after, dead_after: not_issued_after.saturating_add(good_for_ms) }
            }
            OldKey::Revoke => KeyState::Revoked,
        };
    }
    set.keys.push(KeyEntry { purpose, key, state: KeyState::Active });
    Ok((key, replaced))
}

fn make_key(dir: &Path, purpose: KeyPurpose, version: u64) -> Result<PeerId, RotateError> {
    let path = keys_dir(dir).join(format!("{}-{version}.key", purpose_name(purpose)));
    Ok(node::load_or_create_key(&path, None)?.peer_id())
}

/// Signs a key set that a manager asks for, with the root key, which may be on another machine: `request` and the answer
/// are files to be carried.
///
/// # Errors
/// [`RotateError`].
pub fn sign_key_set(request: &[u8], root_key: &Path, passphrase: Option<&str>) -> Result<Vec<u8>, RotateError> {
    let set: KeySet = codec::decode(request).map_err(|error| RotateError::Request { reason: error.to_string() })?;
    let root = node::load_key(root_key, passphrase)?;
    let wrong = |reason: String| Err(RotateError::Request { reason });
    let first = set.handovers.first().map_or(root.peer_id(), Signed::signer);
    if set.network != NetworkId::of_root(&first) {
        return wrong(format!("it is of another network than the root key {}", root.peer_id()));
    }
    match root_after(&first, &set.handovers) {
        Ok(signer) if signer == root.peer_id() => {}
        Ok(signer) => return wrong(format!("the root key {signer} is to sign it, not {}", root.peer_id())),
        Err(refusal) => return wrong(refusal.to_string()),
    }
    Ok(codec::encode(&Signed::sign(&set, &root)))
}

/// The word of a network's root key that another key is to follow it: signed where the root key is, and kept until it is
/// needed. `network` is needed where the root key is not the network's first.
///
/// # Errors
/// [`RotateError`].
pub fn sign_handover(
    root_key: &Path,
    passphrase: Option<&str>,
    to: PeerId,
    network: Option<NetworkId>,
) -> Result<Vec<u8>, RotateError> {
    let root = node::load_key(root_key, passphrase)?;
    let network = network.unwrap_or(NetworkId::of_root(&root.peer_id()));
    Ok(codec::encode(&Signed::sign(&RootHandover { network, root: to, at: now_ms() }, &root)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::keys::ManagerKeys;
    use protocol::manifest::{KeyPolicy, Manifest};
    use protocol::trust::{AuditHead, Heartbeat};
    use protocol::{ContentId, Digest, RefusalCode};
    use serde_json::json;

    #[test]
    fn a_retired_key_signs_no_more_and_a_stolen_one_never_did() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("m");
        let made = crate::init(&dir, crate::InitOptions::default()).unwrap();
        let (keys, before) = ManagerKeys::load(&dir, 0).unwrap();
        let manifest = |published_at| Manifest {
            network: before.network(),
            content: ContentId::from_bytes([0; 16]),
            root: Digest::from_bytes([0; 32]),
            length: 1,
            chunk_size: 65_536,
            segments: vec![],
            key_commitment: Digest::from_bytes([0; 32]),
            policy: KeyPolicy::AtRelease,
            published_at,
        };
        let now = now_ms();
        let old = keys.sign(KeyPurpose::Catalogue, &manifest(now - 1));
        let late = keys.sign(KeyPurpose::Catalogue, &manifest(now + 60_000));
        let retire = OldKey::Retire { good_for_ms: 1000 };
        let report = rotate(&dir, &made.root_key, None, KeyPurpose::Catalogue, retire).unwrap();
        assert_eq!(report.version, 2);
        assert_eq!(report.replaced, Some(keys.signer(KeyPurpose::Catalogue).peer_id()));

        let (keys, after) = ManagerKeys::load(&dir, 0).unwrap();
        assert_eq!(keys.signer(KeyPurpose::Catalogue).peer_id(), report.key.unwrap());
        assert!(keys.opener(&report.replaced.unwrap()).is_some(), "the old private key is kept");
        let open = |signed, at| after.open(signed, KeyPurpose::Catalogue, |m: &Manifest| m.published_at, at);
        assert!(open(&old, now).is_ok());
        assert_eq!(open(&late, now + 60_000).unwrap_err().code, RefusalCode::KeyRetired);
        assert_eq!(open(&old, now + 10_000).unwrap_err().code, RefusalCode::KeyRetired);

        let newest = keys.sign(KeyPurpose::Catalogue, &manifest(now));
        rotate(&dir, &made.root_key, None, KeyPurpose::Catalogue, OldKey::Revoke).unwrap();
        let (_, after) = ManagerKeys::load(&dir, 0).unwrap();
        let refused = after.open(&newest, KeyPurpose::Catalogue, |m| m.published_at, now).unwrap_err();
        assert_eq!(refused.code, RefusalCode::KeyRetired);

        let error = rotate(&dir, &dir.join("key"), None, KeyPurpose::Ticket, OldKey::Revoke).unwrap_err();
        assert!(matches!(error, RotateError::WrongRoot { .. }), "{error}");
    }

    #[test]
    fn what_the_log_is_verified_by_outlives_the_key_that_signed_it() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("m");
        let made = crate::init(&dir, crate::InitOptions::default()).unwrap();
        let (keys, trust) = ManagerKeys::load(&dir, 0).unwrap();
        let head = AuditHead { number: 7, digest: Digest::from_bytes([7; 32]) };
        let heartbeat = Heartbeat {
            network: trust.network(),
            at: now_ms(),
            epoch: 0,
            key_set_version: 1,
            key_set: trust.signed_key_set().digest(),
            restore: 0,
            audit: Some(head),
        };
        let signed = keys.sign(KeyPurpose::Revocation, &heartbeat);
        let retire = OldKey::Retire { good_for_ms: 1000 };
        rotate(&dir, &made.root_key, None, KeyPurpose::Revocation, retire).unwrap();
        rotate(&dir, &made.root_key, None, KeyPurpose::Settlement, retire).unwrap();
        let trust = load_key_set(&dir, 0).unwrap();
        // Long after both are dead, another key is replaced.
        let change = Change::Rotate { purpose: KeyPurpose::Catalogue, old: retire };
        let (set, _) = next_set(&dir, &trust, change, now_ms() + 60_000, 0).unwrap();
        let of = |purpose| set.keys.iter().filter(|entry| entry.purpose == purpose).count();
        assert_eq!((of(KeyPurpose::Revocation), of(KeyPurpose::Settlement)), (2, 1));
        let set = Signed::sign(&set, &node::load_key(&made.root_key, None).unwrap());
        let hex = |bytes: &[u8]| data_encoding::HEXLOWER.encode(bytes);
        let lines = [
            json!({"version": 4, "key_set": hex(&codec::encode(&set))}),
            json!({
                "number": head.number, "digest": head.digest, "at": heartbeat.at, "restore": 0,
                "heartbeat": hex(&codec::encode(&signed)),
            }),
        ];
        let text = lines.map(|line| line.to_string()).join("\n");
        let heads = crate::read_heads(&[("heads".to_owned(), text)], Some(trust.root())).unwrap();
        assert_eq!((heads.len(), heads[0].standing), (1, crate::Standing::Proven));
    }
}
