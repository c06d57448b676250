//! The key sets that come with a file, and what a document proves by them without asking anybody.

use crate::ids::{NetworkId, PeerId};
use crate::refusal::{Refusal, RefusalCode};
use crate::signed::{Document, Signed};
use crate::trust::{KeyPurpose, KeySet, KeyState, Trust};

/// Key sets of one network, each signed by its root key, none of them a fork of another.
pub struct KeySets {
    root: PeerId,
    /// Newest first.
    sets: Vec<Trust>,
}

impl KeySets {
    /// None yet.
    pub fn new(root: PeerId) -> Self {
        KeySets { root, sets: Vec::new() }
    }

    /// Takes one; gives its version. The same one again changes nothing.
    ///
    /// # Errors
    /// As [`Trust::new`], and as [`Trust::update`] where it cannot be of one history with those that are here: these stay.
    pub fn add(&mut self, signed: Signed<KeySet>) -> Result<u64, Refusal> {
        let trust = Trust::new(self.root, signed, 0)?;
        let version = trust.key_set().version;
        if self.sets.iter().any(|held| held.signed_key_set() == trust.signed_key_set()) {
            return Ok(version);
        }
        self.sets.iter().try_for_each(|held| held.check_beside(&trust))?;
        let place = self.sets.partition_point(|held| held.key_set().version > version);
        self.sets.insert(place, trust);
        Ok(version)
    }

    /// The network.
    pub fn network(&self) -> NetworkId {
        NetworkId::of_root(&self.root)
    }

    /// The newest.
    pub fn newest(&self) -> Option<&KeySet> {
        self.sets.first().map(Trust::key_set)
    }

    /// Does any of them call the key that signed this revoked?
    pub fn is_revoked<T>(&self, signed: &Signed<T>, purpose: KeyPurpose) -> bool {
        self.sets
            .iter()
            .flat_map(|trust| &trust.key_set().keys)
            .any(|entry| entry.purpose == purpose && entry.key == signed.signer() && entry.state == KeyState::Revoked)
    }

    /// Opens a document of the network as of the time when it was issued. A key that any of the sets calls revoked
    /// proves nothing: whoever stole it can give any time. Of any other key the newest set that names it says until when
    /// it signed, and what a set without it is newer than is too late: an older set takes nothing of that back.
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
        let Some(newest) = self.sets.first() else {
            return Err(Refusal::new(RefusalCode::UnknownKey, "no key set that holds came with it"));
        };
        let names = |trust: &&Trust| trust.key_for(signed, purpose).is_ok();
        // That none names the key is said of the newest.
        let judge = self.sets.iter().find(names).unwrap_or(newest);
        let without = self.sets.iter().take_while(|trust| !names(trust)).map(Trust::key_set);
        let document = judge.open(signed, purpose, issued_at, at)?;
        match without.min_by_key(|set| set.issued_at).filter(|set| set.issued_at <= at) {
            None => Ok(document),
            Some(set) => {
                let detail = format!("key set version {} had no longer the key that signed this by then", set.version);
                Err(Refusal::new(RefusalCode::KeyRetired, detail))
            }
        }
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
