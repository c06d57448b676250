//! What this seeder knows of its network: keys, revocations, its own certificate and when the manager was last heard.
//! All of it is on disk before it counts, so that a restart while the manager is away serves at once and forgets no
//! revocation.

use std::ops::ControlFlow;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use protocol::api::EpochsPage;
use protocol::certificate::SeederCert;
use protocol::clock::ClockState;
use protocol::trust::{Heartbeat, JoinLine, KeyPurpose, KeySet, RevocationEpoch, RevocationState, Trust, Update};
use protocol::utc::Utc;
use protocol::{NetworkId, PeerId, Refusal, RefusalCode, Signed};
use store::{Db, StoreError};
use tokio::sync::watch;

use crate::clock::now_ms;
use crate::heads;
use crate::tables::{CERTIFICATE, EPOCHS, FORK, ForkNote, HEARTBEAT, KEY_SET};

/// Why a document of the network was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TakeError {
    /// It is not good.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The network's keys signed two different documents where there can be one: the first stays.
    #[error("{0}")]
    Fork(String),
    /// It is good, and could not be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The network as this seeder sees it. Readers get what is in force now; writers take turns.
pub(crate) struct Network {
    pub(crate) id: NetworkId,
    me: PeerId,
    root: PeerId,
    grace_ms: u64,
    db: Db,
    view: RwLock<View>,
    taking: tokio::sync::Mutex<()>,
    version: watch::Sender<u64>,
}

#[derive(Default)]
struct View {
    trust: Option<Arc<Trust>>,
    revoked: Arc<RevocationState>,
    /// Number of the first epoch of the newest chain; 0 for none.
    chain: u64,
    certificate: Option<(Signed<SeederCert>, SeederCert)>,
    heartbeat: Option<Heartbeat>,
    /// Until when all that the manager had revoked is known here: the time of the newest heartbeat whose epochs are all held.
    informed: Option<u64>,
    fork: Option<String>,
    /// This machine's clock by the manager's, and when it was compared, unix milliseconds.
    clock: Option<(ClockState, u64)>,
}

impl View {
    fn look_what_is_known(&mut self) {
        let known = self.heartbeat.as_ref().filter(|heartbeat| heartbeat.epoch <= self.revoked.number());
        self.informed = known.map(|heartbeat| heartbeat.at).or(self.informed);
    }
}

/// Epochs that are being taken.
struct Following {
    /// Where the last one of them stands.
    state: RevocationState,
    fresh: Vec<(Signed<RevocationEpoch>, RevocationEpoch)>,
}

/// What a slow answer may make of a comparison, whatever grace is configured.
const CLOCK_NOISE_MS: u64 = 5000;
/// The clock is compared with the manager's so often …
const CLOCK_EVERY_MS: u64 = 30 * 60 * 1000;
/// … and a comparison says nothing any more after this time.
const CLOCK_KNOWN_MS: u64 = 24 * 60 * 60 * 1000;

impl Network {
    /// What an earlier run left in `db`. Blocks.
    pub(crate) fn load(db: &Db, join: &JoinLine, me: PeerId, grace_ms: u64) -> Result<Network, TakeError> {
        let (key_set, certificate, heartbeat, fork) = db.read(|txn| {
            let (key_set, certificate) = (KEY_SET.get(txn, &())?, CERTIFICATE.get(txn, &())?);
            Ok::<_, StoreError>((key_set, certificate, HEARTBEAT.get(txn, &())?, FORK.get(txn, &())?))
        })?;
        let trust = key_set.map(|signed| Trust::new(join.root, signed, grace_ms)).transpose()?;
        let (mut revoked, mut chain) = (RevocationState::default(), 0);
        // Their signatures were checked before they were stored.
        db.read(|txn| {
            EPOCHS.scan(txn, .., |number, signed| {
                let epoch = signed.peek().map_err(Refusal::from)?;
                if epoch.previous.is_none() {
                    chain = number;
                }
                revoked.apply(signed.digest(), &epoch)?;
                Ok::<_, TakeError>(ControlFlow::Continue(()))
            })
        })?;
        let certificate = match certificate {
            Some(signed) => Some((signed.clone(), signed.peek().map_err(Refusal::from)?)),
            None => None,
        };
        let heartbeat = heartbeat.and_then(|signed| signed.peek().ok());
        let mut view = View {
            trust: trust.map(Arc::new),
            revoked: Arc::new(revoked),
            chain,
            certificate,
            heartbeat,
            informed: None,
            fork: fork.map(|fork| fork.text),
            clock: None,
        };
        view.look_what_is_known();
        Ok(Network {
            id: join.network(),
            me,
            root: join.root,
            grace_ms,
            db: db.clone(),
            view: RwLock::new(view),
            taking: tokio::sync::Mutex::new(()),
            version: watch::Sender::new(0),
        })
    }

    /// Is woken at each change.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Wakes those who wait for a change: something else than the network decides what may be served.
    pub(crate) fn look_again(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    pub(crate) fn trust(&self) -> Option<Arc<Trust>> {
        self.view().trust.clone()
    }

    pub(crate) fn revoked(&self) -> Arc<RevocationState> {
        Arc::clone(&self.view().revoked)
    }

    pub(crate) fn heartbeat(&self) -> Option<Heartbeat> {
        self.view().heartbeat.clone()
    }

    /// Until when all revocations are known here, unix milliseconds. That the manager lives is no sign of it: a heartbeat may
    /// name epochs that did not come.
    pub(crate) fn informed(&self) -> Option<u64> {
        self.view().informed
    }

    /// What an operator should look at: two different documents where there can be one. It stays until a newer key set
    /// comes: whoever can sign that is the network's root key, and has looked at it.
    pub(crate) fn fork(&self) -> Option<String> {
        self.view().fork.clone()
    }

    /// This machine's clock by the manager's. A manager that cannot be reached makes it unknown in time, never wrong.
    pub(crate) fn clock(&self, now: u64) -> ClockState {
        match self.view().clock {
            Some((state, at)) if now.abs_diff(at) <= CLOCK_KNOWN_MS => state,
            _ => ClockState::Unknown,
        }
    }

    /// Is it time to compare clocks?
    pub(crate) fn clock_is_due(&self, now: u64) -> bool {
        // A clock that was set since is compared anew, too.
        self.view().clock.is_none_or(|(state, at)| state.is_off() || now.abs_diff(at) > CLOCK_EVERY_MS)
    }

    /// Compares this machine's clock, which showed `now` when the manager signed `heartbeat`, with the manager's.
    ///
    /// # Errors
    /// Those of [`Trust::open`]: whose word it is decides whether it says anything.
    pub(crate) fn compare_clock(
        &self,
        heartbeat: &Signed<Heartbeat>,
        now: u64,
    ) -> Result<(ClockState, Heartbeat), Refusal> {
        // Whether the key is still good must not be judged by a clock that may be off.
        let trust = self.known_trust()?;
        let heartbeat = trust.open(heartbeat, KeyPurpose::Revocation, |h| h.at, heartbeat.peek()?.at)?;
        let state = ClockState::compare(now, heartbeat.at, trust.grace_ms().max(CLOCK_NOISE_MS));
        if !self.clock(now).is_off()
            && let Some(trouble) = clock_trouble(state)
        {
            tracing::error!("{trouble}");
        }
        self.view.write().unwrap_or_else(PoisonError::into_inner).clock = Some((state, now));
        Ok((state, heartbeat))
    }

    /// Is there a certificate, good or not?
    pub(crate) fn is_enrolled(&self) -> bool {
        self.view().certificate.is_some()
    }

    /// The manager took it back, whatever the certificate says.
    pub(crate) fn is_revoked(&self) -> bool {
        self.view().revoked.has_peer(&self.me)
    }

    /// The certificate that is here, good or not.
    pub(crate) fn held_certificate(&self) -> Option<Signed<SeederCert>> {
        self.view().certificate.as_ref().map(|(signed, _)| signed.clone())
    }

    /// When the certificate ends, unix milliseconds.
    pub(crate) fn certificate_until(&self) -> Option<u64> {
        self.view().certificate.as_ref().map(|(_, cert)| cert.until)
    }

    /// Until when the certificate holds: to its end, or for as long as the key counts that signed it.
    pub(crate) fn certificate_holds_until(&self) -> Option<u64> {
        let view = self.view();
        let (signed, cert) = view.certificate.as_ref()?;
        Some(view.trust.as_ref().map_or(0, |trust| cert.holds_until(&signed.signer(), trust)))
    }

    /// This seeder's certificate, if it may serve now.
    ///
    /// # Errors
    /// `not-enrolled`, with why in its words. By no other name: a client hears of it, and would take what is said of this
    /// seeder's certificate (revoked, expired) for what is said of its ticket, which is as good as it was.
    pub(crate) fn certificate(&self, now: u64) -> Result<Signed<SeederCert>, Refusal> {
        let view = self.view();
        let (Some(trust), Some((signed, cert))) = (&view.trust, &view.certificate) else {
            return Err(not_enrolled("this seeder is not enrolled yet").retry_after(30_000));
        };
        if view.revoked.has_peer(&self.me) {
            return Err(not_enrolled("this seeder's certificate was revoked"));
        }
        if trust.still_good(&signed.signer(), KeyPurpose::Enrolment, cert.from, now).is_err() {
            let detail = "the key that signed this seeder's certificate is void; the manager is asked for another one";
            return Err(not_enrolled(detail).retry_after(5_000));
        }
        // A manager that is back gives another one, and a clock may be set.
        let in_time = trust.check_time("seeder's certificate", cert.from, cert.until, now);
        in_time.map_err(|refusal| not_enrolled(refusal.detail).retry_after(30_000).at(now))?;
        Ok(signed.clone())
    }

    /// Takes a key set if it is newer.
    pub(crate) async fn take_key_set(&self, signed: Signed<KeySet>) -> Result<Update, TakeError> {
        let _turn = self.taking.lock().await;
        let trust = match self.trust() {
            None => Trust::new(self.root, signed.clone(), self.grace_ms)?,
            Some(trust) => {
                let mut trust = Trust::clone(&trust);
                match trust.update(signed.clone()) {
                    Ok(Update::Taken) => trust,
                    Ok(Update::NotNewer) => return Ok(Update::NotNewer),
                    Err(refusal) if refusal.code == RefusalCode::KeyRetired => {
                        return Err(self.fork_seen(refusal.detail).await?);
                    }
                    Err(refusal) => return Err(refusal.into()),
                }
            }
        };
        self.db
            .write(move |txn| {
                KEY_SET.put(txn, &(), &signed)?;
                FORK.delete(txn, &()).map(drop)
            })
            .await?;
        tracing::info!(version = trust.key_set().version, "key set taken");
        self.write(|view| {
            view.trust = Some(Arc::new(trust));
            view.fork = None;
        });
        Ok(Update::Taken)
    }

    /// Takes the next revocation epoch.
    ///
    /// # Errors
    /// `stale-revocations` when epochs before it are missing.
    pub(crate) async fn take_epoch(&self, signed: Signed<RevocationEpoch>) -> Result<Update, TakeError> {
        self.take_epochs(vec![signed]).await
    }

    /// Takes the next revocation epochs, with one write: a flush for each would keep whoever was away for long from catching
    /// up. `Taken` where any was.
    ///
    /// # Errors
    /// What is wrong with the first that is not good; those before it are taken.
    pub(crate) async fn take_epochs(&self, page: Vec<Signed<RevocationEpoch>>) -> Result<Update, TakeError> {
        let _turn = self.taking.lock().await;
        let trust = self.known_trust()?;
        let mut follows = Following { state: self.view().revoked.place(), fresh: Vec::new() };
        let mut wrong = None;
        for signed in page {
            if let Err(error) = self.follow(&trust, &mut follows, signed) {
                wrong = Some(error);
                break;
            }
            // Checking the signatures of a whole page takes a while.
            tokio::task::yield_now().await;
        }
        let update = if follows.fresh.is_empty() { Update::NotNewer } else { self.put_epochs(follows.fresh).await? };
        match wrong {
            None => Ok(update),
            Some(TakeError::Fork(text)) => Err(self.fork_seen(text).await?),
            Some(error) => Err(error),
        }
    }

    /// Checks one epoch more.
    fn follow(&self, trust: &Trust, follows: &mut Following, signed: Signed<RevocationEpoch>) -> Result<(), TakeError> {
        let epoch = trust.open(&signed, KeyPurpose::Revocation, |e| e.at, now_ms())?;
        self.is_ours(epoch.network)?;
        let before = follows.fresh.iter().find(|(_, before)| before.number == epoch.number);
        let held = match before {
            Some((held, _)) => Some(held.clone()),
            None => self.db.read(|txn| EPOCHS.get(txn, &epoch.number))?,
        };
        match held {
            Some(held) if held == signed => return Ok(()),
            Some(_) => {
                let text = format!("two different revocation epochs {}: the first is kept", epoch.number);
                return Err(TakeError::Fork(text));
            }
            None => {}
        }
        if follows.state.apply(signed.digest(), &epoch)? == Update::Taken {
            follows.fresh.push((signed, epoch));
        }
        Ok(())
    }

    /// Under `taking`, with epochs that were checked and follow from what is held.
    async fn put_epochs(&self, fresh: Vec<(Signed<RevocationEpoch>, RevocationEpoch)>) -> Result<Update, TakeError> {
        let fresh = Arc::new(fresh);
        let stored = Arc::clone(&fresh);
        self.db
            .write(move |txn| stored.iter().try_for_each(|(signed, epoch)| EPOCHS.put(txn, &epoch.number, signed)))
            .await?;
        for (_, epoch) in fresh.iter() {
            tracing::info!(epoch = epoch.number, "revocation epoch taken");
        }
        if fresh.iter().any(|(_, epoch)| epoch.added.peers.contains(&self.me)) {
            tracing::error!("this seeder's certificate was revoked: it serves nobody from now on");
        }
        let mut applied = Ok(Update::NotNewer);
        self.write(|view| {
            // In place: a copy of all that was ever revoked for each epoch would keep a newcomer busy for hours. It is copied
            // only where somebody looks at it at this moment.
            let revoked = Arc::make_mut(&mut view.revoked);
            for (signed, epoch) in fresh.iter() {
                applied = revoked.apply(signed.digest(), epoch);
                if applied.is_err() {
                    break;
                }
                if epoch.previous.is_none() {
                    view.chain = epoch.number;
                }
            }
            view.look_what_is_known();
        });
        Ok(applied?)
    }

    /// Number of the epoch with which the newest chain begins, 0 for none: what came before it is said again there, and may
    /// be signed by a key that is void.
    pub(crate) fn chain(&self) -> u64 {
        self.view().chain
    }

    /// The first epochs held after the given number, as many as go into one answer.
    pub(crate) fn epochs_after(&self, number: u64) -> Result<Vec<Signed<RevocationEpoch>>, StoreError> {
        number.checked_add(1).map_or_else(|| Ok(Vec::new()), |from| epochs_from(&self.db, from))
    }

    /// Takes a heartbeat if it is newer.
    pub(crate) async fn take_heartbeat(&self, signed: Signed<Heartbeat>) -> Result<Update, TakeError> {
        let _turn = self.taking.lock().await;
        let now = now_ms();
        let trust = self.known_trust()?;
        let heartbeat = trust.open(&signed, KeyPurpose::Revocation, |h| h.at, now)?;
        self.is_ours(heartbeat.network)?;
        // One from the future would hide all that follow.
        trust.check_time("heartbeat", heartbeat.at, u64::MAX, now)?;
        match self.heartbeat() {
            Some(known) if known.at == heartbeat.at && known != heartbeat => {
                let text = format!("two different heartbeats of {}: the first is kept", Utc(heartbeat.at));
                return Err(self.fork_seen(text).await?);
            }
            Some(known) if known.at >= heartbeat.at => return Ok(Update::NotNewer),
            _ => {}
        }
        let same_version = heartbeat.key_set_version == trust.key_set().version;
        if same_version && heartbeat.key_set != trust.signed_key_set().digest() {
            let text = format!("the manager names another key set of version {}", heartbeat.key_set_version);
            self.note_fork(text).await?;
        }
        if let Some(text) = heads::contradiction(&self.db, &heartbeat)? {
            self.note_fork(text).await?;
        }
        let kept = heartbeat.clone();
        self.db
            .write(move |txn| {
                heads::keep(txn, &kept, &signed)?;
                HEARTBEAT.put(txn, &(), &signed)
            })
            .await?;
        self.write(|view| {
            view.heartbeat = Some(heartbeat);
            view.look_what_is_known();
        });
        Ok(Update::Taken)
    }

    async fn fork_seen(&self, text: String) -> Result<TakeError, StoreError> {
        self.note_fork(text.clone()).await?;
        Ok(TakeError::Fork(text))
    }

    /// Tells the operator, now and after a restart.
    async fn note_fork(&self, text: String) -> Result<(), StoreError> {
        if self.fork().as_ref() == Some(&text) {
            return Ok(());
        }
        tracing::error!("{text}; tell the network's operator");
        let note = ForkNote { text: text.clone() };
        self.db.write(move |txn| FORK.put(txn, &(), &note)).await?;
        self.write(|view| view.fork = Some(text));
        Ok(())
    }

    /// Takes this seeder's own certificate, if it holds longer than the one that is here.
    pub(crate) async fn take_certificate(&self, signed: Signed<SeederCert>) -> Result<Update, TakeError> {
        let _turn = self.taking.lock().await;
        let trust = self.known_trust()?;
        let cert = SeederCert::check(&signed, &self.me, &trust, &self.revoked(), now_ms())?;
        let holds_until = cert.holds_until(&signed.signer(), &trust);
        if self.certificate_holds_until().is_some_and(|held| held >= holds_until) {
            return Ok(Update::NotNewer);
        }
        let stored = signed.clone();
        self.db.write(move |txn| CERTIFICATE.put(txn, &(), &stored)).await?;
        self.write(|view| view.certificate = Some((signed, cert)));
        Ok(Update::Taken)
    }

    fn known_trust(&self) -> Result<Arc<Trust>, Refusal> {
        let unknown = || Refusal::new(RefusalCode::NotEnrolled, "the network's keys are not known here yet");
        self.trust().ok_or_else(unknown)
    }

    fn is_ours(&self, network: NetworkId) -> Result<(), Refusal> {
        if network == self.id {
            return Ok(());
        }
        Err(Refusal::new(RefusalCode::WrongNetwork, "a document of another network"))
    }

    // A thread that panicked while it held this lock was between plain assignments.
    fn view(&self) -> RwLockReadGuard<'_, View> {
        self.view.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, change: impl FnOnce(&mut View)) {
        change(&mut self.view.write().unwrap_or_else(PoisonError::into_inner));
        self.version.send_modify(|version| *version += 1);
    }
}

/// The first epochs from the given number on, as many as go into one answer.
pub(crate) fn epochs_from(db: &Db, from: u64) -> Result<Vec<Signed<RevocationEpoch>>, StoreError> {
    let mut page = EpochsPage::default();
    db.read(|txn| EPOCHS.scan::<StoreError>(txn, from.., |_, epoch| Ok(page.add(epoch))))?;
    Ok(page.into_epochs())
}

/// What follows from this machine's clock, where it is off.
pub(crate) fn clock_trouble(clock: ClockState) -> Option<String> {
    let refused = clock.refused_by_it()?;
    Some(format!(
        "this machine's clock is {clock} by the manager's: {refused} are refused here, and no new ticket names this \
         seeder; set it"
    ))
}

fn not_enrolled(why: impl Into<String>) -> Refusal {
    Refusal::new(RefusalCode::NotEnrolled, why)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use protocol::trust::{KeyEntry, KeyState, Revocations};
    use protocol::{Digest, Keypair, TransactionId};

    use super::*;
    use crate::tables::SCHEMA;

    /// Epochs from `first` on that follow from `previous`, each of which revokes one sale of `sales`.
    fn chain(
        network: NetworkId,
        key: &Keypair,
        (first, mut previous): (u64, Option<Digest>),
        sales: std::ops::Range<u64>,
    ) -> Vec<Signed<RevocationEpoch>> {
        let mut epochs = Vec::new();
        for (number, sale) in (first..).zip(sales) {
            let added = Revocations { transactions: vec![TransactionId::new(sale, [0; 10])], ..Revocations::default() };
            let epoch = Signed::sign(&RevocationEpoch { network, number, previous, at: 1, added }, key);
            previous = Some(epoch.digest());
            epochs.push(epoch);
        }
        epochs
    }

    #[tokio::test]
    async fn a_page_of_epochs_is_taken_up_to_the_first_that_is_wrong() {
        let [root, key, me] = [1, 2, 3].map(|seed| Keypair::from_seed(&[seed; 32]));
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path().join("s.redb"), store::Options::new(SCHEMA)).unwrap();
        let join = JoinLine { root: root.peer_id(), managers: Vec::new(), invitation: None };
        let network = Network::load(&db, &join, me.peer_id(), 1000).unwrap();
        let entry = KeyEntry { purpose: KeyPurpose::Revocation, key: key.peer_id(), state: KeyState::Active };
        let keys = KeySet {
            network: network.id,
            version: 1,
            issued_at: 1,
            keys: vec![entry],
            managers: Vec::new(),
            gossip_shards: 1,
            next_root: None,
            handovers: Vec::new(),
        };
        network.take_key_set(Signed::sign(&keys, &root)).await.unwrap();
        let good = chain(network.id, &key, (1, None), 0..20);
        let held = |n: u64| network.revoked().has_transaction(&TransactionId::new(n, [0; 10]));
        let code = |taken: Result<Update, TakeError>| match taken {
            Err(TakeError::Refused(refusal)) => refusal.code,
            other => panic!("{other:?}"),
        };

        // One is missing.
        let gap = [&good[..3], &good[4..6]].concat();
        assert_eq!(code(network.take_epochs(gap).await), RefusalCode::StaleRevocations);
        assert_eq!((network.revoked().number(), held(2), held(3)), (3, true, false));
        // What is held is passed over, also twice in one page.
        let again = [&good[1..8], &good[6..8]].concat();
        assert_eq!(network.take_epochs(again.clone()).await.unwrap(), Update::Taken);
        assert_eq!(network.take_epochs(again).await.unwrap(), Update::NotNewer);
        assert_eq!(network.take_epochs(Vec::new()).await.unwrap(), Update::NotNewer);
        // By another key.
        let stranger = Keypair::from_seed(&[9; 32]);
        let forged = chain(network.id, &stranger, (10, Some(good[8].digest())), 77..78);
        assert_eq!(code(network.take_epochs([&good[8..9], &forged].concat()).await), RefusalCode::UnknownKey);
        assert_eq!(network.revoked().number(), 9);
        // Two of one number in one page, and what follows from the second.
        let second = chain(network.id, &key, (11, Some(good[9].digest())), 77..79);
        let both = [&good[9..11], &second].concat();
        assert!(matches!(network.take_epochs(both).await, Err(TakeError::Fork(_))));
        assert!(network.fork().unwrap().contains("revocation epochs 11"));
        assert_eq!((network.revoked().number(), held(10), held(77)), (11, true, false));
        assert_eq!(network.take_epochs(good[11..].to_vec()).await.unwrap(), Update::Taken);

        // A restart knows what all of them said, and a new chain begins anywhere.
        let number = RevocationEpoch::NEW_CHAINS.start;
        let anew = chain(network.id, &key, (number, None), 100..102);
        assert_eq!(network.take_epochs(anew).await.unwrap(), Update::Taken);
        assert_eq!((network.chain(), network.epochs_after(0).unwrap().len()), (number, 22));
        let again = Network::load(&db, &join, me.peer_id(), 1000).unwrap();
        assert_eq!((again.chain(), again.revoked().number()), (number, number + 1));
        assert_eq!(again.revoked().all(), network.revoked().all());
        assert!((0..20).chain(100..102).all(held));
    }
}
