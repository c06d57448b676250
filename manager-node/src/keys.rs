//! The network's private keys at the manager. They are apart from the node key and from the root key, so that the root
//! key can be moved off the machine after `init` and each other key be replaced alone.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::{fs, io};

use protocol::signed::{Document, Signed};
use protocol::trust::{KeyEntry, KeyPurpose, KeySet, KeyState, Trust};
use protocol::{Keypair, PeerId, codec};
use store::{Db, StoreError, Table, Txn};

use crate::audit;
use crate::init::write_file;

/// Why the network's keys could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// A key file.
    #[error(transparent)]
    File(#[from] node::KeyFileError),
    /// The system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The key set file is not one.
    #[error("{} is not a key set signed by its root key: {reason}; restore it from a backup", path.display())]
    KeySet {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The key set names a key whose private half is not here.
    #[error("no key file in {} holds the key set's {purpose} key {key}; restore it from a backup", dir.display())]
    Missing {
        /// Where key files are.
        dir: PathBuf,
        /// What the key is for.
        purpose: &'static str,
        /// The public key.
        key: PeerId,
    },
    /// No key of this purpose is active.
    #[error("the key set in {} has no active {purpose} key; sign a new key set with the root key", path.display())]
    NoneActive {
        /// The key set file.
        path: PathBuf,
        /// What the key would be for.
        purpose: &'static str,
    },
}

/// The name of a purpose in file names and messages.
pub(crate) const fn purpose_name(purpose: KeyPurpose) -> &'static str {
    match purpose {
        KeyPurpose::Catalogue => "catalogue",
        KeyPurpose::Ticket => "ticket",
        KeyPurpose::Enrolment => "enrolment",
        KeyPurpose::Revocation => "revocation",
        KeyPurpose::Settlement => "settlement",
        KeyPurpose::ReceiptSealing => "receipt-sealing",
    }
}

/// Folder of the network keys below the manager's directory.
pub(crate) fn keys_dir(dir: &Path) -> PathBuf {
    dir.join("keys")
}

/// File of the signed key set below the manager's directory.
pub(crate) fn key_set_path(dir: &Path) -> PathBuf {
    dir.join("keyset")
}

/// File of a newer key set that others showed to this manager, and of which it may lack private keys.
pub(crate) fn newer_key_set_path(dir: &Path) -> PathBuf {
    dir.join("keyset-newer")
}

/// The private keys, replaced as a whole when a new key set comes into force.
pub(crate) struct ManagerKeys {
    held: RwLock<Arc<Held>>,
    /// Held by whoever puts a key set in force.
    changing: Mutex<()>,
}

/// Private keys by purpose: the active ones, and older ones that something may still be sealed to.
struct Held {
    active: [Keypair; KeyPurpose::ALL.len()],
    all: HashMap<PeerId, Keypair>,
    /// Purposes whose active key is not here: the manager came back from a backup from before that was made. What stands in
    /// `active` is the one before, whose signatures nobody takes.
    missing: Vec<KeyPurpose>,
}

impl ManagerKeys {
    /// Loads the key set and every private key, and checks that they fit together. Where others showed a newer key set, that
    /// is in force, with as many of its keys as are here.
    pub(crate) fn load(dir: &Path, clock_grace_ms: u64) -> Result<(ManagerKeys, Trust), KeysError> {
        let own = load_own_key_set(dir, clock_grace_ms)?;
        let keys = ManagerKeys::fitting(dir, &own)?;
        let trust = load_key_set(dir, clock_grace_ms)?;
        let keys = if trust.signed_key_set() == own.signed_key_set() { keys } else { keys.followed_by(dir, &trust)? };
        Ok((keys, trust))
    }

    /// The private keys for a key set, every active one of them.
    pub(crate) fn fitting(dir: &Path, trust: &Trust) -> Result<ManagerKeys, KeysError> {
        let all = read_keys(dir)?;
        let active = |purpose: KeyPurpose| {
            let (name, key) = active_key(dir, trust, purpose)?;
            let missing = || KeysError::Missing { dir: keys_dir(dir), purpose: name, key };
            all.get(&key).cloned().ok_or_else(missing)
        };
        let active = [
            active(KeyPurpose::Catalogue)?,
            active(KeyPurpose::Ticket)?,
            active(KeyPurpose::Enrolment)?,
            active(KeyPurpose::Revocation)?,
            active(KeyPurpose::Settlement)?,
            active(KeyPurpose::ReceiptSealing)?,
        ];
        Ok(ManagerKeys::new(Held { active, all, missing: Vec::new() }))
    }

    /// The private keys for a key set that others showed, as far as they are here.
    pub(crate) fn followed_by(&self, dir: &Path, trust: &Trust) -> Result<ManagerKeys, KeysError> {
        let all = read_keys(dir)?;
        let (mut active, mut missing) = (self.held().active.clone(), Vec::new());
        for (signer, purpose) in active.iter_mut().zip(KeyPurpose::ALL) {
            let (_, key) = active_key(dir, trust, purpose)?;
            match all.get(&key) {
                Some(keypair) => *signer = keypair.clone(),
                None => missing.push(purpose),
            }
        }
        Ok(ManagerKeys::new(Held { active, all, missing }))
    }

    fn new(held: Held) -> ManagerKeys {
        ManagerKeys { held: RwLock::new(Arc::new(held)), changing: Mutex::new(()) }
    }

    /// Purposes whose active key this manager lost.
    pub(crate) fn missing(&self) -> Vec<KeyPurpose> {
        self.held().missing.clone()
    }

    /// Waits for the turn to put a key set in force.
    pub(crate) fn turn(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts other keys in the place of these.
    pub(crate) fn replace(&self, keys: ManagerKeys) {
        let held = keys.held.into_inner().unwrap_or_else(PoisonError::into_inner);
        *self.held.write().unwrap_or_else(PoisonError::into_inner) = held;
    }

    fn held(&self) -> Arc<Held> {
        Arc::clone(&self.held.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The active key of a purpose.
    pub(crate) fn signer(&self, purpose: KeyPurpose) -> Keypair {
        let held = self.held();
        let [catalogue, ticket, enrolment, revocation, settlement, sealing] = &held.active;
        match purpose {
            KeyPurpose::Catalogue => catalogue,
            KeyPurpose::Ticket => ticket,
            KeyPurpose::Enrolment => enrolment,
            KeyPurpose::Revocation => revocation,
            KeyPurpose::Settlement => settlement,
            KeyPurpose::ReceiptSealing => sealing,
        }
        .clone()
    }

    /// The private half of a public key, also of a retired one: receipts may have been sealed to it long ago.
    pub(crate) fn opener(&self, key: &PeerId) -> Option<Keypair> {
        self.held().all.get(key).cloned()
    }

    /// Signs a document with the active key of `purpose`.
    pub(crate) fn sign<T: Document>(&self, purpose: KeyPurpose, document: &T) -> Signed<T> {
        Signed::sign(document, &self.signer(purpose))
    }
}

/// The private keys in the folder.
fn read_keys(dir: &Path) -> Result<HashMap<PeerId, Keypair>, KeysError> {
    let keys_dir = keys_dir(dir);
    let io_error = |source| KeysError::Io { path: keys_dir.clone(), source };
    let mut all = HashMap::new();
    for entry in fs::read_dir(&keys_dir).map_err(io_error)? {
        let path = entry.map_err(io_error)?.path();
        if path.extension().is_some_and(|e| e == "key") {
            let keypair = node::load_key(&path, None)?;
            all.insert(keypair.peer_id(), keypair);
        }
    }
    Ok(all)
}

/// Public halves of the private keys in the folder.
pub(crate) fn keys_here(dir: &Path) -> Result<HashSet<PeerId>, KeysError> {
    Ok(read_keys(dir)?.into_keys().collect())
}

/// The active key of a purpose, with the purpose's name.
fn active_key(dir: &Path, trust: &Trust, purpose: KeyPurpose) -> Result<(&'static str, PeerId), KeysError> {
    let name = purpose_name(purpose);
    let none = || KeysError::NoneActive { path: key_set_path(dir), purpose: name };
    Ok((name, trust.active_key(purpose).ok_or_else(none)?))
}

/// What is wrong where keys are missing, and what to do.
pub(crate) fn lacking(version: u64, missing: &[KeyPurpose]) -> Option<String> {
    let name = purpose_name(*missing.first()?);
    let all: Vec<&str> = missing.iter().map(|purpose| purpose_name(*purpose)).collect();
    Some(format!(
        "key set {version}, which others hold, names keys that this manager does not have ({}): it came back from a backup \
         from before them. Replace them: willcall manager keys rotate {name}",
        all.join(", ")
    ))
}

/// Reads the key set in force: the one that others showed, where that is newer than this manager's own.
pub(crate) fn load_key_set(dir: &Path, clock_grace_ms: u64) -> Result<Trust, KeysError> {
    let mut trust = load_own_key_set(dir, clock_grace_ms)?;
    let path = newer_key_set_path(dir);
    let bad = |reason: String| KeysError::KeySet { path: path.clone(), reason };
    match fs::read(&path) {
        Ok(bytes) => {
            let signed = codec::decode(&bytes).map_err(|e| bad(e.to_string()))?;
            trust.update_from_others(signed).map_err(|e| bad(e.to_string()))?;
            Ok(trust)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(trust),
        Err(source) => Err(KeysError::Io { path, source }),
    }
}

/// Makes a key set this manager's own: it has all of its keys. A crash in between leaves an older one beside it, which is
/// passed over.
pub(crate) fn store_own_key_set(dir: &Path, signed: &Signed<KeySet>) -> Result<(), (PathBuf, io::Error)> {
    let (path, newer) = (key_set_path(dir), newer_key_set_path(dir));
    write_file(&path, &codec::encode(signed)).map_err(|source| (path, source))?;
    match fs::remove_file(&newer) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err((newer, error)),
        _ => Ok(()),
    }
}

/// Reads this manager's own key set. It tells by itself who signed it and which root key was the first: no private half
/// need be here.
pub(crate) fn load_own_key_set(dir: &Path, clock_grace_ms: u64) -> Result<Trust, KeysError> {
    let path = key_set_path(dir);
    let bytes = fs::read(&path).map_err(|source| KeysError::Io { path: path.clone(), source })?;
    let bad = |reason: String| KeysError::KeySet { path: path.clone(), reason };
    let signed: Signed<KeySet> = codec::decode(&bytes).map_err(|e| bad(e.to_string()))?;
    let handovers = signed.peek().map_err(|e| bad(e.to_string()))?.handovers;
    let first = handovers.first().map_or(signed.signer(), Signed::signer);
    Trust::new(first, signed.clone(), clock_grace_ms).map_err(|e| bad(e.to_string()))
}

/// Every key set that was in force while this manager ran: what was signed under an old one is proven with it.
const KEY_SETS: Table<u64, Signed<KeySet>> = Table::new("key-sets");

/// Keeps the key set in force for later.
pub(crate) fn remember(db: &Db, trust: &Trust) -> Result<(), StoreError> {
    let (version, signed) = (trust.key_set().version, trust.signed_key_set().clone());
    let issued_at = trust.key_set().issued_at;
    db.write_blocking(move |txn| {
        if KEY_SETS.get(txn, &version)?.as_ref() != Some(&signed) {
            audit::note(txn, issued_at, "key-set", version, format!("digest {}", signed.digest()))?;
        }
        KEY_SETS.put(txn, &version, &signed)
    })
}

/// The newest key sets, newest first.
pub(crate) fn remembered(txn: &impl Txn, most: usize) -> Result<Vec<Signed<KeySet>>, StoreError> {
    Ok(KEY_SETS.range_back(txn, .., most)?.into_iter().map(|(_, signed)| signed).collect())
}

/// The first key set of a network.
pub(crate) fn first_key_set(
    root: &Keypair,
    keys: &[(KeyPurpose, PeerId)],
    manager: PeerId,
    gossip_shards: u16,
    next_root: &PeerId,
    now: u64,
) -> Signed<KeySet> {
    let set = KeySet {
        network: protocol::NetworkId::of_root(&root.peer_id()),
        version: 1,
        issued_at: now,
        keys: keys.iter().map(|&(purpose, key)| KeyEntry { purpose, key, state: KeyState::Active }).collect(),
        managers: vec![manager],
        gossip_shards,
        next_root: Some(protocol::root::commitment(next_root)),
        handovers: Vec::new(),
    };
    Signed::sign(&set, root)
}
