//! What a client remembers of each network it met, so that a ticket can be used while the manager is away: how to join,
//! the newest key set, and what was revoked.

use std::path::PathBuf;

use protocol::codec::{self, Wire};
use protocol::signed::Signed;
use protocol::trust::{JoinLine, KeyPurpose, KeySet, RevocationEpoch, RevocationState, Trust, Update};
use protocol::{Digest, NetworkId, Refusal};

use crate::epochs::{Epochs, in_order};
use crate::home::{FileError, make_private_dir, read_file, replace_file};

/// The folder of networks. All methods block.
#[derive(Clone, Debug)]
pub(crate) struct Networks {
    dir: PathBuf,
}

/// Longest text of a join line: twice its bytes, as its reader allows.
const MAX_JOIN_TEXT: usize = 2 * <JoinLine as Wire>::MAX;

impl Networks {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Networks { dir }
    }

    fn folder(&self, network: &NetworkId) -> PathBuf {
        self.dir.join(network.to_string())
    }

    /// Remembers how to join, without an invitation that may be in the line.
    pub(crate) fn remember(&self, join: &JoinLine) -> Result<(), FileError> {
        /// As many as the reader of a join line takes.
        const MOST: usize = 8;
        let mut join = join.public();
        join.managers.truncate(MOST);
        let folder = self.folder(&join.network());
        make_private_dir(&folder)?;
        replace_file(&folder.join("join"), format!("{join}\n").as_bytes(), true)
    }

    /// The join lines of all networks known. What is damaged is passed over: a ticket or a join line brings it back.
    pub(crate) fn list(&self) -> Result<Vec<JoinLine>, FileError> {
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => crate::home::At::at(other, "list", &self.dir)?,
        };
        let mut joins = Vec::new();
        for entry in entries.flatten() {
            let Some(network) = entry.file_name().to_str().and_then(|name| name.parse::<NetworkId>().ok()) else {
                continue;
            };
            match self.join(&network)? {
                Some(join) => joins.push(join),
                None => tracing::warn!(%network, "the join line of this network is missing or damaged; passed over"),
            }
        }
        joins.sort_by_key(|join| join.root);
        Ok(joins)
    }

    pub(crate) fn join(&self, network: &NetworkId) -> Result<Option<JoinLine>, FileError> {
        let text = read_file(&self.folder(network).join("join"), MAX_JOIN_TEXT)?;
        let join = text.and_then(|bytes| String::from_utf8(bytes).ok()).and_then(|text| text.parse::<JoinLine>().ok());
        Ok(join.filter(|join| join.network() == *network))
    }

    /// Trust from the key set that is remembered, if there is one that its root key signed.
    pub(crate) fn trust(&self, join: &JoinLine, grace_ms: u64) -> Result<Option<Trust>, FileError> {
        let bytes = read_file(&self.folder(&join.network()).join("keyset"), <Signed<KeySet>>::MAX)?;
        let signed = bytes.and_then(|bytes| codec::decode::<Signed<KeySet>>(&bytes).ok());
        Ok(signed.and_then(|signed| Trust::new(join.root, signed, grace_ms).ok()))
    }

    pub(crate) fn save_key_set(&self, trust: &Trust) -> Result<(), FileError> {
        let folder = self.folder(&trust.network());
        make_private_dir(&folder)?;
        replace_file(&folder.join("keyset"), &codec::encode(trust.signed_key_set()), true)
    }

    /// Everything revoked, as far as it is remembered.
    pub(crate) fn revocations(&self, trust: &Trust, now: u64) -> Result<RevocationState, FileError> {
        self.epochs(&trust.network()).read(trust, now)
    }

    /// Checks epochs that are to follow on `place`, and remembers those that do, up to the first that is refused.
    pub(crate) fn take_epochs(
        &self,
        mut place: RevocationState,
        trust: &Trust,
        epochs: &[Signed<RevocationEpoch>],
        now: u64,
    ) -> Result<Taken, FileError> {
        let mut taken = Taken { epochs: Vec::new(), refused: None };
        let mut verified = Vec::new();
        for signed in epochs {
            let digest = signed.digest();
            let opened = trust.open(signed, KeyPurpose::Revocation, |epoch| epoch.at, now);
            match opened.and_then(|epoch| Ok((in_order(&mut place, trust, digest, &epoch)?, epoch))) {
                Ok((Update::Taken, epoch)) => {
                    verified.push((epoch.number, signed));
                    taken.epochs.push((digest, epoch));
                }
                Ok((Update::NotNewer, _)) => {}
                Err(refusal) => {
                    taken.refused = Some(refusal);
                    break;
                }
            }
        }
        if !verified.is_empty() {
            self.epochs(&trust.network()).save(verified)?;
        }
        Ok(taken)
    }

    fn epochs(&self, network: &NetworkId) -> Epochs {
        Epochs::new(self.folder(network).join("epochs"))
    }
}

/// What was taken of some epochs.
pub(crate) struct Taken {
    /// In order, with their digests.
    pub(crate) epochs: Vec<(Digest, RevocationEpoch)>,
    /// Why the others were not.
    pub(crate) refused: Option<Refusal>,
}
