//! What the manager has taken back, as numbered signed epochs. Each epoch is durable before anybody hears of it, and
//! one is made at a time, so that the chain never forks.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use node::NodeHandle;
use protocol::api::{EpochsPage, News};
use protocol::signed::Signed;
use protocol::trust::{KeyPurpose, RevocationEpoch, RevocationState, Revocations as Added, Trust};
use protocol::{Digest, Keypair, NetworkId, PeerId};
use store::{Db, Step, StoreError, WriteTransaction};

use crate::audit;
use crate::context::now_ms;
use crate::tables::EPOCHS;

/// Most entries of each kind in one epoch: an epoch must also fit a gossip message of 64 KiB, and a quarter of that
/// leaves room for certificates to grow.
pub(crate) const MAX_ENTRIES: usize = 256;

/// Everything revoked, and the chain of epochs that says so.
pub(crate) struct Revocations {
    db: Db,
    network: NetworkId,
    signer: RwLock<Keypair>,
    /// Where epochs are announced; none where the chain is looked at alone.
    node: Option<NodeHandle>,
    state: RwLock<RevocationState>,
    /// Number of the first epoch of the chain in force, which says again all that was revoked before it; 0 for none.
    chain: AtomicU64,
    /// Who signed that chain, and when the newest of their epochs, unix milliseconds.
    signers: RwLock<HashMap<PeerId, u64>>,
    /// Held from drawing a number to the state's change.
    making: tokio::sync::Mutex<()>,
}

impl Revocations {
    /// Reads the chain back. Blocks for as long as reading all epochs takes.
    pub(crate) fn load(
        db: Db,
        network: NetworkId,
        signer: Keypair,
        node: Option<NodeHandle>,
    ) -> Result<Self, StoreError> {
        let (mut state, mut chain, mut signers) = (RevocationState::default(), 0, HashMap::new());
        db.read(|txn| {
            EPOCHS.scan::<StoreError>(txn, .., |number, signed| {
                let corrupt = |reason: String| StoreError::Corrupt { table: EPOCHS.name(), reason };
                let epoch = signed.peek().map_err(|e| corrupt(format!("epoch {number}: {e}")))?;
                state.apply(signed.digest(), &epoch).map_err(|e| corrupt(format!("epoch {number}: {e}")))?;
                if epoch.previous.is_none() {
                    chain = number;
                    signers.clear();
                }
                signers.insert(signed.signer(), epoch.at);
                Ok(std::ops::ControlFlow::Continue(()))
            })
        })?;
        let (state, making) = (RwLock::new(state), tokio::sync::Mutex::new(()));
        let (chain, signers) = (AtomicU64::new(chain), RwLock::new(signers));
        Ok(Revocations { db, network, signer: RwLock::new(signer), node, state, chain, signers, making })
    }

    /// Signs further epochs with another key.
    pub(crate) fn set_signer(&self, signer: Keypair) {
        *self.signer.write().unwrap_or_else(PoisonError::into_inner) = signer;
    }

    /// Looks at what is revoked; `look` must not block.
    pub(crate) fn with<R>(&self, look: impl FnOnce(&RevocationState) -> R) -> R {
        look(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Number of the newest epoch, 0 for none.
    pub(crate) fn number(&self) -> u64 {
        self.with(RevocationState::number)
    }

    /// Number of the last epoch before that of a restore, 0 for none: every chain begun since then has a higher one.
    pub(crate) fn before_restore(&self, restore: u64) -> Result<u64, StoreError> {
        let before = self.db.read(|txn| EPOCHS.range_back(txn, ..restore, 1))?;
        Ok(before.first().map_or(0, |(number, _)| *number))
    }

    /// The epochs after the given one that go into one answer. Where a new chain began after it, that is where they begin:
    /// what came between need not be known, and may be signed by a key that is void.
    pub(crate) fn after(&self, number: u64) -> Result<Vec<Signed<RevocationEpoch>>, StoreError> {
        let Some(from) = number.checked_add(1) else { return Ok(Vec::new()) };
        let from = from.max(self.chain.load(Ordering::Acquire));
        let mut page = EpochsPage::default();
        self.db.read(|txn| EPOCHS.scan::<StoreError>(txn, from.., |_, epoch| Ok(page.add(epoch))))?;
        Ok(page.into_epochs())
    }

    /// The newest epoch.
    pub(crate) fn newest(&self) -> Result<Option<Signed<RevocationEpoch>>, StoreError> {
        Ok(self.db.read(|txn| EPOCHS.last(txn))?.map(|(_, epoch)| epoch))
    }

    /// Begins a new chain after a restore, because others heard epochs that the backup lacks: under the restore number,
    /// unless that was done before. Whoever holds the old one takes it all the same.
    pub(crate) async fn begin_anew(&self, restore: u64) -> Result<(), StoreError> {
        let _making = self.making.lock().await;
        if !RevocationEpoch::NEW_CHAINS.contains(&restore) || self.chain.load(Ordering::Acquire) >= restore {
            return Ok(());
        }
        self.begin(restore).await
    }

    /// Is it an epoch that this manager has in its books?
    pub(crate) fn has_made(&self, number: u64, signed: &Signed<RevocationEpoch>) -> Result<bool, StoreError> {
        Ok(self.db.read(|txn| EPOCHS.get(txn, &number))?.is_some_and(|held| held == *signed))
    }

    /// Begins a new chain above an epoch of the time that a restore forgot, where the one in force begins below: whoever
    /// holds that epoch would wait for its successor.
    pub(crate) async fn begin_above(&self, number: u64) -> Result<(), StoreError> {
        let _making = self.making.lock().await;
        let next = number.saturating_add(1);
        if !RevocationEpoch::NEW_CHAINS.contains(&next) || self.chain.load(Ordering::Acquire) > number {
            return Ok(());
        }
        self.begin(next).await
    }

    /// Begins a new chain under the time in seconds where a key that signed a part of the one in force is void, or about
    /// to be: nobody who is new could follow that. Keys become void by a new key set, and with time.
    pub(crate) async fn renew(&self, trust: &Trust, now: u64) -> Result<(), StoreError> {
        let _making = self.making.lock().await;
        let signer = self.signer.read().unwrap_or_else(PoisonError::into_inner).peer_id();
        // What another key signed would be void itself: a key set is being changed, or names a key that is not here.
        if trust.active_key(KeyPurpose::Revocation) != Some(signer) || self.is_followed(trust, now) {
            return Ok(());
        }
        self.begin(now / 1000).await
    }

    /// Is all of the chain in force good, also by a clock that is ahead as far as is allowed?
    fn is_followed(&self, trust: &Trust, now: u64) -> bool {
        let then = now.saturating_add(trust.grace_ms());
        let signers = self.signers.read().unwrap_or_else(PoisonError::into_inner);
        signers.iter().all(|(key, newest)| trust.still_good(key, KeyPurpose::Revocation, *newest, then).is_ok())
    }

    /// Under `making`. Epochs may have been made faster than seconds pass: the number is one after all of them.
    async fn begin(&self, number: u64) -> Result<(), StoreError> {
        let number = number.max(self.number().saturating_add(1));
        let mut again = parts(self.with(RevocationState::all));
        if again.is_empty() {
            again.push(Added::default());
        }
        let epochs = self.sign_and_store(again, number, None, now_ms()).await?;
        tracing::warn!(number, "a new chain of revocation epochs begins");
        self.announce(epochs).await;
        Ok(())
    }

    /// Revokes what of `added` is not revoked yet: signs and stores the next epochs, then announces them. Returns the
    /// number of the newest epoch.
    pub(crate) async fn revoke(&self, added: Added) -> Result<u64, StoreError> {
        let epochs = self.add(added, now_ms()).await?;
        self.announce(epochs).await;
        Ok(self.number())
    }

    async fn announce(&self, epochs: Vec<Signed<RevocationEpoch>>) {
        let Some(node) = &self.node else { return };
        for epoch in epochs {
            crate::news::publish(node, &self.network, &News::Epoch(epoch)).await;
        }
    }

    async fn add(&self, added: Added, now: u64) -> Result<Vec<Signed<RevocationEpoch>>, StoreError> {
        let _making = self.making.lock().await;
        let fresh = self.fresh(added);
        let (number, previous) = self.with(|state| (state.number(), state.last()));
        self.sign_and_store(parts(fresh), number + 1, previous, now).await
    }

    /// What of `added` is not revoked yet.
    pub(crate) fn fresh(&self, added: Added) -> Added {
        self.with(|state| Added {
            transactions: added.transactions.into_iter().filter(|id| !state.has_transaction(id)).collect(),
            peers: added.peers.into_iter().filter(|peer| !state.has_peer(peer)).collect(),
            contents: added.contents.into_iter().filter(|id| !state.has_content(id)).collect(),
            moved: added.moved.into_iter().filter(|m| m.generation > state.generation(&m.transaction)).collect(),
        })
    }

    /// Under `making`.
    async fn sign_and_store(
        &self,
        parts: Vec<Added>,
        first: u64,
        mut previous: Option<Digest>,
        now: u64,
    ) -> Result<Vec<Signed<RevocationEpoch>>, StoreError> {
        let signer = self.signer.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut epochs = Vec::new();
        for (number, added) in (first..).zip(parts) {
            let epoch = RevocationEpoch { network: self.network, number, previous, at: now, added };
            let signed = Signed::sign(&epoch, &signer);
            previous = Some(signed.digest());
            epochs.push((epoch, signed));
        }
        if epochs.is_empty() {
            return Ok(Vec::new());
        }
        let stored = epochs.clone();
        let put = move |txn: &WriteTransaction<'_>| {
            stored.iter().try_for_each(|(epoch, signed)| put_epoch(txn, epoch, signed))
        };
        self.db.write_step(Step::ManagerRevocation, put).await?;
        for (epoch, signed) in &epochs {
            self.apply(epoch, signed);
        }
        Ok(epochs.into_iter().map(|(_, signed)| signed).collect())
    }

    /// Takes an epoch that this manager signed before it came back from an older backup, and that the mesh still has.
    /// The caller has checked its signature. False when it is not the next one.
    pub(crate) async fn adopt(
        &self,
        epoch: RevocationEpoch,
        signed: Signed<RevocationEpoch>,
    ) -> Result<bool, StoreError> {
        let _making = self.making.lock().await;
        if !self.with(|state| epoch.number == state.number() + 1 && epoch.previous == state.last()) {
            return Ok(false);
        }
        let stored = (epoch.clone(), signed.clone());
        self.db.write(move |txn| put_epoch(txn, &stored.0, &stored.1)).await?;
        self.apply(&epoch, &signed);
        Ok(true)
    }

    /// Under `making`, with the epoch that comes next: it cannot fail to apply.
    fn apply(&self, epoch: &RevocationEpoch, signed: &Signed<RevocationEpoch>) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let mut signers = self.signers.write().unwrap_or_else(PoisonError::into_inner);
        if epoch.previous.is_none() {
            self.chain.store(epoch.number, Ordering::Release);
            signers.clear();
        }
        signers.insert(signed.signer(), epoch.at);
        drop(signers);
        if let Err(error) = state.apply(signed.digest(), epoch) {
            tracing::error!(number = epoch.number, %error, "own revocation epoch does not follow; restart the manager");
        }
    }
}

fn put_epoch(
    txn: &WriteTransaction<'_>,
    epoch: &RevocationEpoch,
    signed: &Signed<RevocationEpoch>,
) -> Result<(), StoreError> {
    let Added { transactions, peers, contents, moved } = &epoch.added;
    let (sales, peers, contents, moved) = (transactions.len(), peers.len(), contents.len(), moved.len());
    let what = format!("{sales} transactions, {peers} peers, {contents} contents, {moved} moves");
    let detail = format!("{what}; digest {}", signed.digest());
    audit::note(txn, epoch.at, "revocation", epoch.number, detail)?;
    EPOCHS.put(txn, &epoch.number, signed)
}

/// Cuts what is to be revoked into epochs of a bounded size.
fn parts(mut added: Added) -> Vec<Added> {
    fn cut<T>(list: &mut Vec<T>) -> Vec<T> {
        let rest = list.split_off(list.len().min(MAX_ENTRIES));
        std::mem::replace(list, rest)
    }
    let mut parts = Vec::new();
    while !added.is_empty() {
        parts.push(Added {
            transactions: cut(&mut added.transactions),
            peers: cut(&mut added.peers),
            contents: cut(&mut added.contents),
            moved: cut(&mut added.moved),
        });
    }
    parts
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::keys::first_key_set;
    use protocol::TransactionId;
    use protocol::trust::{KeyEntry, KeySet, KeyState};

    #[tokio::test]
    async fn epochs_chain_survive_a_restart_and_repeat_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let network = NetworkId::from_bytes([1; 32]);
        let signer = Keypair::from_seed(&[2; 32]);
        let open = || Db::open(dir.path().join("m.redb"), store::Options::new(1)).unwrap();
        let peer = PeerId::from_bytes([3; 32]);
        {
            let revocations = Revocations::load(open(), network, signer.clone(), None).unwrap();
            let peers = |peers: Vec<PeerId>| Added { peers, ..Added::default() };
            assert_eq!(revocations.add(peers(vec![peer]), 1).await.unwrap().len(), 1);
            assert_eq!(revocations.add(peers(vec![peer]), 2).await.unwrap().len(), 0);
            let many = (0..600u64).map(|i| TransactionId::new(i, [0; 10])).collect();
            let epochs = revocations.add(Added { transactions: many, ..Added::default() }, 3).await.unwrap();
            assert_eq!(epochs.len(), 3);
            assert_eq!(epochs[0].verify(&signer.peer_id()).unwrap().number, 2);
            for epoch in &epochs {
                assert!(epoch.body().len() < 32 * 1024);
            }
        }
        let revocations = Revocations::load(open(), network, signer.clone(), None).unwrap();
        // What a seeder holds that heard two epochs more than the backup that this manager came back from.
        let mut ahead = revocations.with(Clone::clone);
        for _ in 0..2 {
            let lost = RevocationEpoch {
                network,
                number: ahead.number() + 1,
                previous: ahead.last(),
                at: 4,
                added: Added::default(),
            };
            ahead.apply(Signed::sign(&lost, &signer).digest(), &lost).unwrap();
        }
        assert_eq!(revocations.number(), 4);
        assert!(revocations.with(|s| s.has_peer(&peer) && s.has_transaction(&TransactionId::new(599, [0; 10]))));
        assert_eq!(revocations.after(1).unwrap().len(), 3);
        assert!(revocations.after(u64::MAX).unwrap().is_empty());

        revocations.begin_anew(1_795_000_000).await.unwrap();
        revocations.begin_anew(1_795_000_000).await.unwrap();
        let late = TransactionId::new(7, [7; 10]);
        revocations.add(Added { transactions: vec![late], ..Added::default() }, 5).await.unwrap();
        for signed in revocations.after(ahead.number()).unwrap() {
            ahead.apply(signed.digest(), &signed.peek().unwrap()).unwrap();
        }
        assert_eq!(ahead.number(), revocations.number());
        assert!(ahead.has_transaction(&late) && ahead.has_peer(&peer));
    }

    /// What a newcomer takes of the chain, by the clock `now`; the epoch's number or why it stops.
    fn followed(revocations: &Revocations, trust: &Trust, now: u64) -> Result<u64, protocol::Refusal> {
        let mut state = RevocationState::default();
        for signed in revocations.after(0).unwrap() {
            let epoch = trust.open(&signed, KeyPurpose::Revocation, |epoch| epoch.at, now)?;
            state.apply(signed.digest(), &epoch)?;
        }
        Ok(state.number())
    }

    #[tokio::test]
    async fn a_chain_whose_key_dies_with_time_or_was_given_up_while_nobody_ran_is_said_again() {
        let dir = tempfile::tempdir().unwrap();
        let [root, old, new] = [1, 2, 3].map(|seed| Keypair::from_seed(&[seed; 32]));
        let network = NetworkId::of_root(&root.peer_id());
        let db = Db::open(dir.path().join("m.redb"), store::Options::new(1)).unwrap();
        let load = |signer: &Keypair| Revocations::load(db.clone(), network, signer.clone(), None).unwrap();
        const DAY: u64 = 24 * 60 * 60 * 1000;
        let begin = 1_795_000_000_000;
        let entry = |key: &Keypair, state| KeyEntry { purpose: KeyPurpose::Revocation, key: key.peer_id(), state };
        let trust = |version, keys| {
            let first = first_key_set(&root, &[], new.peer_id(), 1, &root.peer_id(), begin).peek().unwrap();
            Trust::new(root.peer_id(), Signed::sign(&KeySet { version, keys, ..first }, &root), 600_000).unwrap()
        };
        let sale = |n| Added { transactions: vec![TransactionId::new(n, [0; 10])], ..Added::default() };

        let first = trust(1, vec![entry(&old, KeyState::Active)]);
        let revocations = load(&old);
        revocations.add(sale(1), begin).await.unwrap();
        revocations.renew(&first, begin).await.unwrap();
        assert_eq!(revocations.number(), 1, "there is nothing to say again");

        let (not_issued_after, dead_after) = (begin + DAY, begin + 401 * DAY);
        let retiring = entry(&old, KeyState::Retiring { not_issued_after, dead_after });
        let second = trust(2, vec![retiring, entry(&new, KeyState::Active)]);
        revocations.renew(&second, begin).await.unwrap();
        assert_eq!(revocations.number(), 1, "it does not sign with the new key yet");
        revocations.set_signer(new.clone());
        revocations.add(sale(2), begin + 2 * DAY).await.unwrap();
        revocations.renew(&second, dead_after - 700_000).await.unwrap();
        assert_eq!(followed(&revocations, &second, dead_after - 1), Ok(2));
        assert!(followed(&revocations, &second, dead_after).is_err());
        let late = dead_after - 500_000;
        revocations.renew(&second, late).await.unwrap();
        assert_eq!(followed(&revocations, &second, dead_after + 400 * DAY), Ok(late / 1000));
        revocations.renew(&second, dead_after + DAY).await.unwrap();
        assert_eq!(revocations.number(), late / 1000, "once is enough");

        // More epochs than seconds; then the key is stolen, and the manager dies before it said them again.
        for n in 3..30 {
            revocations.add(sale(n), late).await.unwrap();
        }
        drop(revocations);
        let stolen = trust(3, vec![entry(&new, KeyState::Revoked), entry(&old, KeyState::Active)]);
        let revocations = load(&old);
        assert!(followed(&revocations, &stolen, late).is_err());
        revocations.renew(&stolen, late + 1000).await.unwrap();
        let number = followed(&revocations, &stolen, late).unwrap();
        assert!(number > late / 1000 + 26, "{number}");
        assert!(revocations.with(|state| (1..30).all(|n| state.has_transaction(&TransactionId::new(n, [0; 10])))));
        // And so after a restore that is not later than they are.
        revocations.begin_anew(late / 1000 + 2).await.unwrap();
        assert_eq!(revocations.number(), number, "a newer chain was begun");
        revocations.add(sale(30), late).await.unwrap();
        revocations.begin_anew(number + 1).await.unwrap();
        assert_eq!(revocations.number(), number + 2);
        revocations.begin_anew(number + 1).await.unwrap();
        assert_eq!(revocations.number(), number + 2);
    }
}
