//! What a node trusts and how it stays up to date: the network's root key, the key set that the root key signs, the
//! manager's heartbeat and revocation epochs, and the one line of text by which a node joins.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use bincode::{Decode, Encode};

use crate::document;
use crate::ids::{ContentId, Digest, NetworkId, Nonce, PeerAddrs, PeerId, TransactionId};
use crate::refusal::{Refusal, RefusalCode};
use crate::root::{self, RootHandover};
use crate::signed::{Document, Purpose, Signed};
use crate::text::{self, TextError};
use crate::wire;

/// Clocks may differ by this much, milliseconds, in both directions, unless a node is configured otherwise.
pub const DEFAULT_CLOCK_GRACE_MS: u64 = 10 * 60 * 1000;

impl NetworkId {
    /// The network whose root key is `root`.
    pub fn of_root(root: &PeerId) -> Self {
        NetworkId::from_bytes(*Digest::of("willcall 2026-11 network id", &[root.as_bytes()]).as_bytes())
    }
}

/// What a key of the network may sign or open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum KeyPurpose {
    /// Manifests.
    Catalogue,
    /// Transaction data, leases and replication orders.
    Ticket,
    /// Certificates of merchants and seeders.
    Enrolment,
    /// Revocation epochs and heartbeats.
    Revocation,
    /// Marks, statements, and what is said of a delivery in evidence.
    Settlement,
    /// Receipt batches are sealed to it; it signs nothing.
    ReceiptSealing,
}

impl KeyPurpose {
    /// Every purpose.
    pub const ALL: [KeyPurpose; 6] = [
        KeyPurpose::Catalogue,
        KeyPurpose::Ticket,
        KeyPurpose::Enrolment,
        KeyPurpose::Revocation,
        KeyPurpose::Settlement,
        KeyPurpose::ReceiptSealing,
    ];

    fn signs(self, purpose: Purpose) -> bool {
        matches!(
            (self, purpose),
            (KeyPurpose::Catalogue, Purpose::Manifest)
                | (KeyPurpose::Ticket, Purpose::TransactionData | Purpose::Lease | Purpose::ReplicationOrder)
                | (KeyPurpose::Enrolment, Purpose::MerchantCert | Purpose::SeederCert)
                | (KeyPurpose::Revocation, Purpose::RevocationEpoch | Purpose::Heartbeat)
                | (
                    KeyPurpose::Settlement,
                    Purpose::Mark | Purpose::Statement | Purpose::DeliveryRecord | Purpose::NonDelivery
                )
        )
    }
}

/// Whether a key is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum KeyState {
    /// In use.
    Active,
    /// Issues nothing after `not_issued_after`, and what it issued is void from `dead_after` on (unix milliseconds).
    Retiring {
        /// Documents issued later are refused.
        not_issued_after: u64,
        /// Everything it signed is refused from then on.
        dead_after: u64,
    },
    /// Everything that it signed is refused.
    Revoked,
}

/// One key of the network.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KeyEntry {
    /// What it may do.
    pub purpose: KeyPurpose,
    /// The public key.
    pub key: PeerId,
    /// Whether it is in use.
    pub state: KeyState,
}

impl KeyEntry {
    /// `key-retired` when what this key signed at `issued` is void `now`.
    pub(crate) fn check_state(&self, issued: u64, now: u64) -> Result<(), Refusal> {
        let detail = match self.state {
            KeyState::Active => return Ok(()),
            KeyState::Retiring { not_issued_after, dead_after } if issued <= not_issued_after && now < dead_after => {
                return Ok(());
            }
            KeyState::Retiring { .. } => "the key that signed this was retired",
            KeyState::Revoked => "the key that signed this was revoked",
        };
        Err(Refusal::new(RefusalCode::KeyRetired, detail).at(now))
    }
}

/// The network's keys, signed by the root key. A higher version replaces a lower one.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KeySet {
    /// The network.
    pub network: NetworkId,
    /// Counts up with each change.
    pub version: u64,
    /// Unix milliseconds.
    pub issued_at: u64,
    /// The keys, at most [`KeySet::MAX_KEYS`].
    pub keys: Vec<KeyEntry>,
    /// Peer IDs of the managers, at most 16.
    pub managers: Vec<PeerId>,
    /// Number of gossip topics that receipts are spread over.
    pub gossip_shards: u16,
    /// Names the root key that will follow this one: [`crate::root::commitment`].
    pub next_root: Option<Digest>,
    /// From the network's first root key to the one that signs this, at most [`RootHandover::MAX`].
    pub handovers: Vec<Signed<RootHandover>>,
}

impl KeySet {
    /// Most keys in a set: six purposes, with room for the retiring and revoked ones of years.
    pub const MAX_KEYS: usize = 256;
}

/// The manager's sign of life: tells "nothing new" from "cut off".
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Heartbeat {
    /// The network.
    pub network: NetworkId,
    /// The manager's clock, unix milliseconds.
    pub at: u64,
    /// Number of the newest revocation epoch.
    pub epoch: u64,
    /// Version of the newest key set.
    pub key_set_version: u64,
    /// Digest of the newest signed key set.
    pub key_set: Digest,
    /// Counts up each time the manager was restored from a backup: seeders then send marked receipts again.
    pub restore: u64,
    /// The newest entry of the manager's audit log; absent where there is none. Whoever keeps it can tell later whether
    /// the log that the manager shows is the one that it had.
    pub audit: Option<AuditHead>,
}

/// An entry of the manager's audit log, which stands for it and all before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, serde::Serialize, serde::Deserialize)]
pub struct AuditHead {
    /// The entry's number, 1 for the first.
    pub number: u64,
    /// Its digest.
    pub digest: Digest,
}

/// What became void since the last epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Revocations {
    /// Transactions that are delivered no more (refund, chargeback, abuse).
    pub transactions: Vec<TransactionId>,
    /// Certificates of these peers are void.
    pub peers: Vec<PeerId>,
    /// Content that is to be purged.
    pub contents: Vec<ContentId>,
    /// Purchases that moved to another peer: leases of older generations are void.
    pub moved: Vec<Moved>,
}

/// A purchase that changed hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Moved {
    /// Which.
    pub transaction: TransactionId,
    /// The lowest generation that is still served.
    pub generation: u32,
}

impl Revocations {
    /// Entries of the kind of which there are most.
    pub fn most(&self) -> usize {
        let Revocations { transactions, peers, contents, moved } = self;
        [transactions.len(), peers.len(), contents.len(), moved.len()].into_iter().max().unwrap_or(0)
    }

    /// Nothing is revoked by it.
    pub fn is_empty(&self) -> bool {
        self.most() == 0
    }
}

/// A numbered change of what is revoked. Epochs are applied in order, without gaps.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RevocationEpoch {
    /// The network.
    pub network: NetworkId,
    /// 1 for the first.
    pub number: u64,
    /// Digest of the epoch before, absent in the first.
    pub previous: Option<Digest>,
    /// Unix milliseconds.
    pub at: u64,
    /// What is added.
    pub added: Revocations,
}

impl RevocationEpoch {
    /// A manager that came back from an older backup no longer knows its last epochs, and must not number new ones like
    /// them. It begins a new chain: an epoch without a predecessor whose number is the time in unix seconds, higher than
    /// any count of epochs, and which, with those after it, says again everything that the manager knows to be revoked.
    pub const NEW_CHAINS: std::ops::Range<u64> = 1_000_000_000..1_000_000_000_000;

    /// Most entries of each kind in one epoch; more go into the next.
    pub const MAX_ENTRIES: usize = 1024;
}

document! {
    KeySet => KeySet, 32 * 1024,
    Heartbeat => Heartbeat, 256; network,
    RevocationEpoch => RevocationEpoch, 96 * 1024; network,
}

/// What a node needs to judge the network's documents: the root key, the newest key set under it, and clock grace.
/// It never calls anyone.
#[derive(Clone, Debug)]
pub struct Trust {
    network: NetworkId,
    root: PeerId,
    signed: Signed<KeySet>,
    keys: KeySet,
    grace_ms: u64,
}

/// What became of a key set or epoch that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update {
    /// It is newer and was taken.
    Taken,
    /// It is the one held, or older.
    NotNewer,
}

impl Trust {
    /// Trust in `root`, through the key set `signed`.
    ///
    /// # Errors
    /// `bad-manager-signature` when the root key did not sign it, `wrong-network` when it is of another network.
    pub fn new(root: PeerId, signed: Signed<KeySet>, grace_ms: u64) -> Result<Self, Refusal> {
        let network = NetworkId::of_root(&root);
        let keys = Self::check(network, &root, &signed)?;
        Ok(Trust { network, root, signed, keys, grace_ms })
    }

    fn check(network: NetworkId, first: &PeerId, signed: &Signed<KeySet>) -> Result<KeySet, Refusal> {
        let signer = root::root_after(first, &signed.peek()?.handovers)?;
        let keys = signed.verify(&signer).map_err(|e| e.refusal(RefusalCode::BadManagerSignature))?;
        if keys.network != network {
            return Err(Refusal::new(RefusalCode::WrongNetwork, "a key set of another network"));
        }
        if keys.keys.len() > KeySet::MAX_KEYS || keys.managers.len() > 16 {
            return Err(Refusal::new(RefusalCode::TooLarge, "a key set with too many entries"));
        }
        Ok(keys)
    }

    /// Takes a newer key set.
    ///
    /// # Errors
    /// As [`Trust::new`]; also `key-retired` for a second, different key set of the version held, or a newer one by a
    /// root key that was replaced: a fork, of which the old one is kept and the operator is to be told;
    /// `bad-manager-signature` when the root key goes to another than the one that was named.
    pub fn update(&mut self, signed: Signed<KeySet>) -> Result<Update, Refusal> {
        if signed == self.signed {
            return Ok(Update::NotNewer);
        }
        let keys = Self::check(self.network, &self.root, &signed)?;
        if keys.version == self.keys.version {
            return Err(self.second());
        }
        if keys.version < self.keys.version {
            return Ok(Update::NotNewer);
        }
        root::check_next(&self.keys, &keys)?;
        self.signed = signed;
        self.keys = keys;
        Ok(Update::Taken)
    }

    /// Takes a newer key set, or another one of the version held that was made before it. For a manager that came back from
    /// a backup, had no word of the other one, and used its number again: everybody else holds that one.
    ///
    /// # Errors
    /// As [`Trust::update`], but for the fork.
    pub fn update_from_others(&mut self, signed: Signed<KeySet>) -> Result<Update, Refusal> {
        let keys = Self::check(self.network, &self.root, &signed)?;
        if keys.version != self.keys.version {
            return self.update(signed);
        }
        if keys.issued_at >= self.keys.issued_at {
            return Ok(Update::NotNewer);
        }
        root::check_next(&self.keys, &keys)?;
        self.signed = signed;
        self.keys = keys;
        Ok(Update::Taken)
    }

    /// Can both key sets be of one network's history? Each was checked by itself before.
    ///
    /// # Errors
    /// `key-retired` for two of one version, or a newer one by a root key that was replaced; `bad-manager-signature` when
    /// the root key goes to another than the one that was named.
    pub(crate) fn check_beside(&self, other: &Trust) -> Result<(), Refusal> {
        let (older, newer) = match self.keys.version.cmp(&other.keys.version) {
            Ordering::Less => (&self.keys, &other.keys),
            Ordering::Greater => (&other.keys, &self.keys),
            Ordering::Equal => return Err(self.second()),
        };
        match older.version.checked_add(1) == Some(newer.version) {
            true => root::check_next(older, newer),
            // A set between them may have named another root key.
            false => root::handovers_after(older, newer).map(drop),
        }
    }

    /// What is said of a second set of the version held.
    fn second(&self) -> Refusal {
        let detail = format!("two different key sets of version {}: the first is kept", self.keys.version);
        Refusal::new(RefusalCode::KeyRetired, detail)
    }

    /// Is it a key set of this network, whatever its version?
    ///
    /// # Errors
    /// As [`Trust::new`].
    pub fn verify_key_set(&self, signed: &Signed<KeySet>) -> Result<(), Refusal> {
        Self::check(self.network, &self.root, signed).map(drop)
    }

    /// The network.
    pub fn network(&self) -> NetworkId {
        self.network
    }

    /// The network's first root key, of which its name is made: what join lines carry.
    pub fn root(&self) -> PeerId {
        self.root
    }

    /// The key set in force.
    pub fn key_set(&self) -> &KeySet {
        &self.keys
    }

    /// The key set as it was signed, to pass on.
    pub fn signed_key_set(&self) -> &Signed<KeySet> {
        &self.signed
    }

    /// How far clocks may differ, milliseconds.
    pub fn grace_ms(&self) -> u64 {
        self.grace_ms
    }

    /// The key that new documents of this purpose are sealed to or signed with.
    pub fn active_key(&self, purpose: KeyPurpose) -> Option<PeerId> {
        self.keys
            .keys
            .iter()
            .find(|entry| entry.purpose == purpose && entry.state == KeyState::Active)
            .map(|entry| entry.key)
    }

    /// Verifies a document that one of the network's keys must have signed. `issued_at` reads the time of issue out of
    /// the document, for keys that are retiring.
    ///
    /// # Errors
    /// `unknown-key`, `key-retired`, `bad-manager-signature`, `wrong-network`, in this order; or the codec's names.
    pub fn open<T: Document>(
        &self,
        signed: &Signed<T>,
        purpose: KeyPurpose,
        issued_at: impl Fn(&T) -> u64,
        now: u64,
    ) -> Result<T, Refusal> {
        let entry = self.key_for(signed, purpose)?;
        entry.check_state(issued_at(&signed.peek()?), now)?;
        let document = signed.verify(&entry.key).map_err(|e| e.refusal(RefusalCode::BadManagerSignature))?;
        match document.network() {
            Some(network) if network != self.network => {
                Err(Refusal::new(RefusalCode::WrongNetwork, "a document of another network"))
            }
            _ => Ok(document),
        }
    }

    /// Is what `key` signed for `purpose` at `issued_at` good `now`? For documents whose signature was verified before.
    ///
    /// # Errors
    /// `unknown-key`, `key-retired`.
    pub fn still_good(&self, key: &PeerId, purpose: KeyPurpose, issued_at: u64, now: u64) -> Result<(), Refusal> {
        let entry = self.keys.keys.iter().find(|entry| entry.purpose == purpose && entry.key == *key);
        entry.ok_or_else(|| self.unknown_key())?.check_state(issued_at, now)
    }

    fn unknown_key(&self) -> Refusal {
        let detail = format!("key set version {} holds no such key for this purpose", self.keys.version);
        Refusal::new(RefusalCode::UnknownKey, detail)
    }

    /// The entry of the key that `signed` names, if it may sign such documents for `purpose`, whatever its state.
    pub(crate) fn key_for<T: Document>(&self, signed: &Signed<T>, purpose: KeyPurpose) -> Result<&KeyEntry, Refusal> {
        let mut entries = self.keys.keys.iter();
        entries
            .find(|entry| entry.purpose == purpose && purpose.signs(T::PURPOSE) && entry.key == signed.signer())
            .ok_or_else(|| self.unknown_key())
    }

    /// `not-yet-valid` or `expired` when `now` is outside of `from..until` by more than the grace.
    ///
    /// # Errors
    /// The refusal, carrying `now`, with by how much time it failed.
    pub fn check_time(&self, what: &str, from: u64, until: u64, now: u64) -> Result<(), Refusal> {
        check_time(what, from, until, now, self.grace_ms)
    }
}

/// As [`Trust::check_time`], with an explicit grace.
///
/// # Errors
/// `not-yet-valid` or `expired`, carrying `now`.
pub fn check_time(what: &str, from: u64, until: u64, now: u64, grace_ms: u64) -> Result<(), Refusal> {
    if now.saturating_add(grace_ms) < from {
        let detail = format!("the {what} begins in {} s by this node's clock", (from - now) / 1000);
        return Err(Refusal::new(RefusalCode::NotYetValid, detail).at(now));
    }
    if now > until.saturating_add(grace_ms) {
        let detail = format!("the {what} ended {} s ago by this node's clock", (now - until) / 1000);
        return Err(Refusal::new(RefusalCode::Expired, detail).at(now));
    }
    Ok(())
}

/// Everything revoked so far, and the number of the last epoch applied.
#[derive(Clone, Debug, Default)]
pub struct RevocationState {
    number: u64,
    last: Option<Digest>,
    transactions: BTreeSet<TransactionId>,
    peers: BTreeSet<PeerId>,
    contents: BTreeSet<ContentId>,
    /// Lowest generation that is good, of purchases that moved.
    generations: BTreeMap<TransactionId, u32>,
}

impl RevocationState {
    /// Applies an epoch whose signature was checked. The next one in order is taken, older ones are passed over. One that
    /// begins a new chain (see [`RevocationEpoch::NEW_CHAINS`]) is taken from anywhere; what was revoked before stays so.
    ///
    /// # Errors
    /// `stale-revocations` when epochs between are missing (fetch them first); `bad-manager-signature` when it does
    /// not follow from the one held, or is another one of the same number: a fork, of which the first is kept;
    /// `too-large` when it has more than [`RevocationEpoch::MAX_ENTRIES`] of a kind.
    pub fn apply(&mut self, digest: Digest, epoch: &RevocationEpoch) -> Result<Update, Refusal> {
        if self.check(digest, epoch)? == Update::NotNewer {
            return Ok(Update::NotNewer);
        }
        self.transactions.extend(&epoch.added.transactions);
        self.peers.extend(&epoch.added.peers);
        self.contents.extend(&epoch.added.contents);
        for moved in &epoch.added.moved {
            let lowest = self.generations.entry(moved.transaction).or_default();
            *lowest = moved.generation.max(*lowest);
        }
        self.number = epoch.number;
        self.last = Some(digest);
        Ok(Update::Taken)
    }

    /// What [`RevocationState::apply`] would say, with nothing changed.
    ///
    /// # Errors
    /// As there.
    pub fn check(&self, digest: Digest, epoch: &RevocationEpoch) -> Result<Update, Refusal> {
        if epoch.number == self.number && self.last.is_some_and(|last| last != digest) {
            let detail = format!("two different revocation epochs {}: the first is kept", epoch.number);
            return Err(Refusal::new(RefusalCode::BadManagerSignature, detail));
        }
        if epoch.number <= self.number {
            return Ok(Update::NotNewer);
        }
        if epoch.added.most() > RevocationEpoch::MAX_ENTRIES {
            return Err(Refusal::new(
                RefusalCode::TooLarge,
                "a revocation epoch with more than 1024 entries of a kind",
            ));
        }
        let begins = epoch.previous.is_none() && RevocationEpoch::NEW_CHAINS.contains(&epoch.number);
        if !begins && epoch.number - self.number != 1 {
            let detail = format!("epoch {} came, the newest held is {}", epoch.number, self.number);
            return Err(Refusal::new(RefusalCode::StaleRevocations, detail));
        }
        if !begins && epoch.previous != self.last {
            let detail = format!("revocation epoch {} does not follow from the one held", epoch.number);
            return Err(Refusal::new(RefusalCode::BadManagerSignature, detail));
        }
        Ok(Update::Taken)
    }

    /// The same place in the chain, with nothing revoked: to see whether epochs follow one another before any of them counts.
    pub fn place(&self) -> RevocationState {
        RevocationState { number: self.number, last: self.last, ..RevocationState::default() }
    }

    /// Everybody whose certificate was revoked.
    pub fn peers(&self) -> impl Iterator<Item = &PeerId> {
        self.peers.iter()
    }

    /// Number of the last epoch applied, 0 for none.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Digest of the last epoch applied.
    pub fn last(&self) -> Option<Digest> {
        self.last
    }

    /// All of it.
    pub fn all(&self) -> Revocations {
        Revocations {
            transactions: self.transactions.iter().copied().collect(),
            peers: self.peers.iter().copied().collect(),
            contents: self.contents.iter().copied().collect(),
            moved: self
                .generations
                .iter()
                .map(|(&transaction, &generation)| Moved { transaction, generation })
                .collect(),
        }
    }

    /// The lowest generation of a purchase that is still served: 0 for one that never moved.
    pub fn generation(&self, id: &TransactionId) -> u32 {
        self.generations.get(id).copied().unwrap_or(0)
    }

    /// Did this purchase move on from this generation?
    pub fn has_moved_on(&self, id: &TransactionId, generation: u32) -> bool {
        generation < self.generation(id)
    }

    /// Was this transaction revoked?
    pub fn has_transaction(&self, id: &TransactionId) -> bool {
        self.transactions.contains(id)
    }

    /// Was this peer's certificate revoked?
    pub fn has_peer(&self, peer: &PeerId) -> bool {
        self.peers.contains(peer)
    }

    /// Was this content taken down?
    pub fn has_content(&self, id: &ContentId) -> bool {
        self.contents.contains(id)
    }
}

/// What an invitation lets a node become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InvitedRole {
    /// A merchant.
    Merchant,
    /// A seeder.
    Seeder,
}

/// A right to be enrolled, given out by the manager's operator.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Invitation {
    /// As what.
    pub role: InvitedRole,
    /// The secret that proves it.
    pub token: Nonce,
}

/// The one line by which a node joins a network: `willcall-join:…`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct JoinLine {
    /// The network's root key.
    pub root: PeerId,
    /// Where the managers are, at most 8.
    pub managers: Vec<PeerAddrs>,
    /// Present in lines for merchants and seeders.
    pub invitation: Option<Invitation>,
}

wire!(JoinLine => 8 * 1024);

impl JoinLine {
    const PREFIX: &'static str = "willcall-join:";

    /// The network's id.
    pub fn network(&self) -> NetworkId {
        NetworkId::of_root(&self.root)
    }

    /// The same line without the invitation: what may be shown to anybody.
    #[must_use]
    pub fn public(&self) -> JoinLine {
        JoinLine { invitation: None, ..self.clone() }
    }
}

impl fmt::Display for JoinLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::to_line(Self::PREFIX, self))
    }
}

impl FromStr for JoinLine {
    type Err = TextError;

    fn from_str(line: &str) -> Result<Self, TextError> {
        let join: JoinLine = text::from_line(Self::PREFIX, line)?;
        if join.managers.is_empty() || join.managers.len() > 8 {
            return Err(TextError::Codec(crate::codec::CodecError::Malformed(
                "a join line names one to eight managers".to_owned(),
            )));
        }
        Ok(join)
    }
}
