//! What a client remembers of each network it met, so that a ticket can be used while the manager is away: how to join,
//! the newest key set, and what was revoked.

use std::path::PathBuf;

use protocol::codec::{self, Wire};
use protocol::signed::Signed;
use protocol::trust::{JoinLine, KeyPurpose, KeySet, RevocationEpoch, RevocationState, Trust, Update};
use protocol::{NetworkId, Refusal};

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

    /// Everything revoked, as far as it is remembered: epochs are applied in order. Those that follow one that is missing or
    /// no longer verifies are left out, up to where a new chain begins.
    pub(crate) fn revocations(&self, trust: &Trust, now: u64) -> Result<RevocationState, FileError> {
        let mut state = RevocationState::default();
        for number in self.epochs(&trust.network())? {
            let path = self.epoch_path(&trust.network(), number);
            let Some(bytes) = read_file(&path, <Signed<RevocationEpoch>>::MAX)? else { continue };
            let Ok(signed) = codec::decode(&bytes) else { continue };
            if let Err(refusal) = apply(&mut state, trust, &signed, now) {
                tracing::debug!(number, %refusal, "a remembered revocation epoch is passed over");
            }
        }
        Ok(state)
    }

    /// Numbers of the epochs that are remembered, in order.
    fn epochs(&self, network: &NetworkId) -> Result<Vec<u64>, FileError> {
        let dir = self.folder(network).join("epochs");
        let entries = match std::fs::read_dir(&dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => crate::home::At::at(other, "list", &dir)?,
        };
        let number = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse::<u64>().ok();
        let mut numbers: Vec<u64> = entries.flatten().filter_map(number).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Applies an epoch and remembers it.
    pub(crate) fn take_epoch(
        &self,
        state: &mut RevocationState,
        trust: &Trust,
        signed: &Signed<RevocationEpoch>,
        now: u64,
    ) -> Result<Update, EpochError> {
        let update = apply(state, trust, signed, now)?;
        if update == Update::Taken {
            let path = self.epoch_path(&trust.network(), state.number());
            if let Some(parent) = path.parent() {
                make_private_dir(parent)?;
            }
            // Not worth a disk flush each: a lost one is asked for again.
            replace_file(&path, &codec::encode(signed), false)?;
        }
        Ok(update)
    }

    fn epoch_path(&self, network: &NetworkId, number: u64) -> PathBuf {
        self.folder(network).join("epochs").join(format!("{number:020}"))
    }
}

/// Why an epoch was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EpochError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    File(#[from] FileError),
}

fn apply(
    state: &mut RevocationState,
    trust: &Trust,
    signed: &Signed<RevocationEpoch>,
    now: u64,
) -> Result<Update, Refusal> {
    let epoch = trust.open(signed, KeyPurpose::Revocation, |epoch| epoch.at, now)?;
    if epoch.network != trust.network() {
        return Err(Refusal::new(protocol::RefusalCode::WrongNetwork, "an epoch of another network"));
    }
    state.apply(signed.digest(), &epoch)
}
