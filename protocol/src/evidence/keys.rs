//! The key sets that come with a file, and what a document proves by them without asking anybody.

use crate::ids::{NetworkId, PeerId};
use crate::refusal::{Refusal, RefusalCode};
use crate::signed::{Document, Signed};
use crate::trust::{KeyPurpose, KeySet, KeyState, Trust};

/// Key sets of one network, each signed by its root key.
pub struct KeySets {
    root: PeerId,
    sets: Vec<Trust>,
}

impl KeySets {
    /// None yet.
    pub fn new(root: PeerId) -> Self {
        KeySets { root, sets: Vec::new() }
    }

    /// Takes one; gives its version.
    ///
    /// # Errors
    /// As [`Trust::new`].
    pub fn add(&mut self, signed: Signed<KeySet>) -> Result<u64, Refusal> {
        let trust = Trust::new(self.root, signed, 0)?;
        let version = trust.key_set().version;
        self.sets.push(trust);
        Ok(version)
    }

    /// The network.
    pub fn network(&self) -> NetworkId {
        NetworkId::of_root(&self.root)
    }

    /// The newest.
    pub fn newest(&self) -> Option<&KeySet> {
        self.sets.iter().map(Trust::key_set).max_by_key(|set| set.version)
    }

    /// Does any of them call the key that signed this revoked?
    pub fn is_revoked<T>(&self, signed: &Signed<T>, purpose: KeyPurpose) -> bool {
        self.sets
            .iter()
            .flat_map(|trust| &trust.key_set().keys)
            .any(|entry| entry.purpose == purpose && entry.key == signed.signer() && entry.state == KeyState::Revoked)
    }

    /// Opens a document of the network as of the time when it was issued. A key that any of the sets calls revoked
    /// proves nothing: whoever stole it can give any time.
    ///
    /// # Errors
    /// As [`Trust::open`].
    pub fn open<T: Document>(
        &self,
        signed: &Signed<T>,
        purpose: KeyPurpose,
        issued_at: impl Fn(&T) -> u64,
    ) -> Result<T, Refusal> {
        let at = issued_at(&signed.peek()?);
        if self.is_revoked(signed, purpose) {
            return Err(Refusal::new(RefusalCode::KeyRetired, "the key that signed this was revoked"));
        }
        let mut refusal = Refusal::new(RefusalCode::UnknownKey, "no key set that holds came with it");
        for trust in &self.sets {
            match trust.open(signed, purpose, &issued_at, at) {
                Ok(document) => return Ok(document),
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }

    /// The same for a document whose key was revoked, whatever the time: for who has another reason to believe it.
    pub(super) fn open_revoked<T: Document>(&self, signed: &Signed<T>, purpose: KeyPurpose) -> Result<T, Refusal> {
        let key = self.sets.iter().find_map(|trust| trust.key_for(signed, purpose).ok());
        let key = key.ok_or_else(|| Refusal::new(RefusalCode::UnknownKey, "no key set that holds knows its key"))?.key;
        let document = signed.verify(&key).map_err(|error| error.refusal(RefusalCode::BadManagerSignature))?;
        match document.network() {
            Some(network) if network != self.network() => {
                Err(Refusal::new(RefusalCode::WrongNetwork, "a document of another network"))
            }
            _ => Ok(document),
        }
    }
}
