//! The network's private keys at the manager. They are apart from the node key and from the root key, so that the root
//! key can be moved off the machine after `init` and each other key be replaced alone.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::{fs, io};

use protocol::signed::{Document, Signed};
use protocol::trust::{KeyEntry, KeyPurpose, KeySet, KeyState, Trust};
use protocol::{Keypair, PeerId, codec};
use store::{Db, StoreError, Table, Txn};

use crate::audit;

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
}

impl ManagerKeys {
    /// Loads the key set and every private key, and checks that they fit together.
    pub(crate) fn load(dir: &Path, clock_grace_ms: u64) -> Result<(ManagerKeys, Trust), KeysError> {
        let trust = load_key_set(dir, clock_grace_ms)?;
        Ok((ManagerKeys::fitting(dir, &trust)?, trust))
    }

    /// The private keys for a key set.
    pub(crate) fn fitting(dir: &Path, trust: &Trust) -> Result<ManagerKeys, KeysError> {
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
        let active = |purpose: KeyPurpose| {
            let name = purpose_name(purpose);
            let key = trust
                .active_key(purpose)
                .ok_or_else(|| KeysError::NoneActive { path: key_set_path(dir), purpose: name })?;
            all.get(&key).cloned().ok_or_else(|| KeysError::Missing { dir: keys_dir.clone(), purpose: name, key })
        };
        let active = [
            active(KeyPurpose::Catalogue)?,
            active(KeyPurpose::Ticket)?,
            active(KeyPurpose::Enrolment)?,
            active(KeyPurpose::Revocation)?,
            active(KeyPurpose::Settlement)?,
            active(KeyPurpose::ReceiptSealing)?,
        ];
        Ok(ManagerKeys { held: RwLock::new(Arc::new(Held { active, all })), changing: Mutex::new(()) })
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

/// Reads the key set. It tells by itself who signed it and which root key was the first: no private half need be here.
pub(crate) fn load_key_set(dir: &Path, clock_grace_ms: u64) -> Result<Trust, KeysError> {
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
