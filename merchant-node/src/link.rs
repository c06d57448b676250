//! Everything that comes from the manager besides the orders themselves: the network's keys, this merchant's
//! certificate, the catalogue, and whether the manager can be reached at all. All of it is kept, so that a merchant
//! that starts while the manager is away can take orders.

mod catalogue;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use node::{NodeHandle, Protocol};
use protocol::api::{
    MESH_PROTOCOL, MeshRequest, MeshResponse, SALES_PROTOCOL, SalesRequest, SalesResponse, TransactionState,
};
use protocol::certificate::MerchantCert;
use protocol::codec::Wire;
use protocol::ticket::TransactionData;
use protocol::trust::{DEFAULT_CLOCK_GRACE_MS, Heartbeat, JoinLine, KeyPurpose, KeySet, RevocationState, Trust};
use protocol::{Nonce, PeerAddrs, PeerId, Refusal, RefusalCode, Signed};
use store::{Db, StoreError, WriteTransaction};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use self::catalogue::Shelf;
use crate::clock::{back_off, now_ms};
use crate::config::Config;
use crate::tables::{CERTIFICATE, KEY_SET, PRODUCTS, REVOKED, Revoked};

pub(crate) use self::catalogue::MAX_PRODUCTS;

const SALES: Protocol = Protocol::new(SALES_PROTOCOL);
const MESH: Protocol = Protocol::new(MESH_PROTOCOL);

/// A certificate that holds is asked for anew no more often than this.
const RENEW_EVERY: Duration = Duration::from_secs(60 * 60);

const OTHER_NETWORK: &str = "the sale was made in another network than this shop's join line names now";
const NO_MANAGER: &str = "the manager of this shop's join line is not one that the network's key set names";
const NOT_RESTORED: &str = "the manager does not know this sale, and does not say that it was restored from a backup \
                            since; if it was, its operator is to say so: `willcall manager restored`";

/// Why the manager did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum AskError {
    /// Not reached, not now, or nothing sensible came back: worth another try.
    #[error("{0}")]
    Away(String),
    /// A no that only a change can lift.
    #[error(transparent)]
    Refused(Refusal),
}

impl AskError {
    fn of(refusal: Refusal) -> Self {
        if refusal.code == RefusalCode::Internal {
            tracing::warn!(%refusal, "the manager could not answer; its own log says why");
        }
        match refusal.code {
            RefusalCode::Overloaded | RefusalCode::ShuttingDown | RefusalCode::Internal => {
                AskError::Away(refusal.to_string())
            }
            _ => AskError::Refused(refusal.compared_with(now_ms(), DEFAULT_CLOCK_GRACE_MS)),
        }
    }

    fn unexpected() -> Self {
        AskError::Away("the manager answered something else than was asked".to_owned())
    }
}

/// What the network's managers say of a sale that was released to this merchant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It stands so.
    Known(TransactionState),
    /// They came back from a backup that was made before it, and know nothing of it: nobody can deliver it any more.
    Forgotten,
    /// They know nothing of it, and that proves nothing; why.
    Unclear(&'static str),
}

/// Why keys, certificate or catalogue could not be brought up to date.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RefreshError {
    #[error("{what}: {source}")]
    Ask { what: &'static str, source: AskError },
    #[error("{what} does not hold: {source}")]
    Untrusted { what: &'static str, source: Refusal },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The manager as last seen.
#[derive(Clone, Debug, Default)]
struct Contact {
    last: u64,
    trouble: Option<String>,
    enrolment: Option<String>,
    /// Why this merchant may not sell any more.
    revoked: Option<String>,
}

/// The connection to the manager.
pub(crate) struct Link {
    node: NodeHandle,
    db: Db,
    join: JoinLine,
    name: String,
    call: Duration,
    grace_ms: u64,
    trust: RwLock<Option<Arc<Trust>>>,
    /// With whose key signed it.
    certificate: RwLock<Option<(PeerId, MerchantCert)>>,
    /// When another certificate was last asked for in vain.
    not_renewed: Mutex<Option<Instant>>,
    /// What the manager has on sale.
    shelf: Shelf,
    contact: Mutex<Contact>,
    reachable: watch::Sender<Option<bool>>,
    wake: Notify,
}

fn read<T: Clone>(lock: &RwLock<T>) -> T {
    lock.read().unwrap_or_else(PoisonError::into_inner).clone()
}

fn set<T>(lock: &RwLock<T>, value: T) {
    *lock.write().unwrap_or_else(PoisonError::into_inner) = value;
}

impl Link {
    /// With what is in the store. Blocks for the reading.
    pub(crate) fn load(node: NodeHandle, db: Db, join: JoinLine, config: &Config) -> Result<Self, StoreError> {
        let (keys, certificate, revoked, products) = db.read(|txn| {
            Ok::<_, StoreError>((
                KEY_SET.get(txn, &())?,
                CERTIFICATE.get(txn, &())?,
                REVOKED.get(txn, &())?,
                PRODUCTS.range(txn, .., MAX_PRODUCTS)?,
            ))
        })?;
        // Stored keys were verified when they came; a changed join line makes them void.
        let trust = keys.and_then(|signed| Trust::new(join.root, signed, config.clock_grace_ms).ok());
        let me = node.peer_id();
        let certificate = certificate.and_then(|signed| Some((signed.signer(), signed.peek().ok()?)));
        let certificate = certificate.filter(|(_, c)| c.merchant == me && c.network == join.network());
        let revoked = revoked.filter(|revoked| revoked.network == join.network()).map(|revoked| revoked.why);
        let products = products.into_iter().map(|(id, stored)| (id, stored.0)).collect();
        Ok(Link {
            node,
            db,
            join,
            name: config.name.clone(),
            call: Duration::from_millis(config.call_ms),
            grace_ms: config.clock_grace_ms,
            trust: RwLock::new(trust.map(Arc::new)),
            certificate: RwLock::new(certificate),
            not_renewed: Mutex::default(),
            shelf: Shelf::of(products),
            contact: Mutex::new(Contact { revoked, ..Contact::default() }),
            reachable: watch::Sender::new(None),
            wake: Notify::new(),
        })
    }

    pub(crate) fn trust(&self) -> Option<Arc<Trust>> {
        read(&self.trust)
    }

    pub(crate) fn certificate(&self) -> Option<MerchantCert> {
        read(&self.certificate).map(|(_, certificate)| certificate)
    }

    pub(crate) fn join(&self) -> &JoinLine {
        &self.join
    }

    /// Says when the manager can be reached; `None` before the first try.
    pub(crate) fn reachable(&self) -> watch::Receiver<Option<bool>> {
        self.reachable.subscribe()
    }

    /// Why nothing can be sold yet, if that is so.
    pub(crate) fn not_ready(&self) -> Option<String> {
        if self.trust().is_some() && self.certificate().is_some() {
            return None;
        }
        let contact = self.contact().clone();
        Some(match contact.enrolment.or(contact.trouble) {
            Some(why) => format!("this merchant is not enrolled yet: {why}"),
            None => "this merchant is not enrolled yet: the manager is being asked".to_owned(),
        })
    }

    /// The manager's word that this merchant's certificate was revoked.
    pub(crate) fn revoked(&self) -> Option<String> {
        self.contact().revoked.clone()
    }

    /// What is wrong with the manager, if anything.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.contact().trouble.clone()
    }

    /// When the manager last answered, unix milliseconds; 0 for never.
    pub(crate) fn last_contact(&self) -> u64 {
        self.contact().last
    }

    /// Fetches keys and catalogue now instead of at the next regular time.
    pub(crate) fn nudge(&self) {
        self.wake.notify_one();
    }

    fn contact(&self) -> MutexGuard<'_, Contact> {
        self.contact.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask<Req: Wire, Resp: Wire>(&self, protocol: Protocol, request: &Req) -> Result<Resp, AskError> {
        let mut trouble = "the join line names no manager".to_owned();
        for manager in &self.join.managers {
            match self.node.call::<Req, Resp>(manager, protocol, request, self.call).await {
                Ok(answer) => {
                    let mut contact = self.contact();
                    contact.last = now_ms();
                    contact.trouble = None;
                    drop(contact);
                    self.reachable.send_if_modified(|seen| seen.replace(true) != Some(true));
                    return Ok(answer);
                }
                Err(error) => trouble = format!("manager {}: {error}", short(manager)),
            }
        }
        self.contact().trouble = Some(trouble.clone());
        let lost = self.reachable.send_if_modified(|seen| seen.replace(false) != Some(false));
        if lost {
            tracing::warn!(%trouble, "the manager cannot be reached; orders wait");
            self.wake.notify_one();
        }
        Err(AskError::Away(trouble))
    }

    /// Asks the manager about sales.
    pub(crate) async fn sales(&self, request: SalesRequest) -> Result<SalesResponse, AskError> {
        match self.ask(SALES, &request).await? {
            SalesResponse::Refused(refusal) => Err(AskError::of(refusal)),
            answer => Ok(answer),
        }
    }

    /// What became of sales, by the word of every manager of the join line. One that was restored says so, signed, in its
    /// heartbeat: that it does not know a sale counts only if the sale was formed before that.
    pub(crate) async fn fates(&self, sales: &[TransactionData]) -> Result<Vec<Fate>, AskError> {
        let away = |why: String| AskError::Away(why);
        let trust = self.trust().ok_or_else(|| away("the network's keys are missing".to_owned()))?;
        if self.join.managers.is_empty() {
            return Err(away("the join line names no manager".to_owned()));
        }
        let mut fates = vec![Fate::Forgotten; sales.len()];
        for manager in &self.join.managers {
            let failed = |error| away(format!("manager {}: {error}", short(manager)));
            let transactions = sales.iter().map(|sale| sale.transaction).collect();
            let question = SalesRequest::Status { transactions };
            let states = match self.node.call(manager, SALES, &question, self.call).await.map_err(failed)? {
                SalesResponse::States(states) if states.len() == sales.len() => states,
                SalesResponse::Refused(refusal) => return Err(AskError::of(refusal)),
                _ => return Err(AskError::unexpected()),
            };
            let heard = self.node.call(manager, MESH, &MeshRequest::Heartbeat, self.call).await.map_err(failed)?;
            let MeshResponse::Heartbeat(signed) = heard else { return Err(AskError::unexpected()) };
            let opened = trust.open(&signed, KeyPurpose::Revocation, |heartbeat: &Heartbeat| heartbeat.at, now_ms());
            let restore = opened.map_err(|refusal| away(format!("manager {}: {refusal}", short(manager))))?.restore;
            let named = trust.key_set().managers.contains(&manager.peer);
            for ((fate, sale), state) in fates.iter_mut().zip(sales).zip(states) {
                match (state, &fate) {
                    (Some(state), _) => *fate = Fate::Known(state),
                    (None, Fate::Known(_)) => {}
                    (None, _) if sale.network != trust.network() => *fate = Fate::Unclear(OTHER_NETWORK),
                    (None, _) if !named => *fate = Fate::Unclear(NO_MANAGER),
                    // A restore's number is its time in seconds.
                    (None, _) if sale.formed_at / 1000 > restore => *fate = Fate::Unclear(NOT_RESTORED),
                    (None, _) => {}
                }
            }
        }
        Ok(fates)
    }

    /// Fetches the network's keys.
    pub(crate) async fn fetch_keys(&self) -> Result<(), RefreshError> {
        let failed = |source| RefreshError::Ask { what: "the network's keys", source };
        let signed = match self.ask(MESH, &MeshRequest::KeySet).await.map_err(failed)? {
            MeshResponse::KeySet(signed) => signed,
            MeshResponse::Refused(refusal) => return Err(failed(AskError::of(refusal))),
            _ => return Err(failed(AskError::unexpected())),
        };
        self.show_keys(&signed).await;
        self.take_keys(signed).await
    }

    /// A manager that came back from a backup may have forgotten the key set that is held here, or have another one of the
    /// same number since: it is shown this one.
    async fn show_keys(&self, theirs: &Signed<KeySet>) {
        let (Some(trust), Ok(set)) = (self.trust(), theirs.peek()) else { return };
        let (held, version) = (trust.signed_key_set(), trust.key_set().version);
        if held == theirs || set.version > version {
            return;
        }
        match self.ask(MESH, &MeshRequest::NewerKeySet(Box::new(held.clone()))).await {
            Ok(MeshResponse::Noted) => tracing::warn!(version, "the manager was shown the key set that is held here"),
            Ok(_) => tracing::error!(version, "the manager does not take the key set that is held here"),
            Err(error) => tracing::debug!(%error, "the manager was not shown the key set"),
        }
    }

    async fn take_keys(&self, signed: Signed<KeySet>) -> Result<(), RefreshError> {
        let untrusted = |source| RefreshError::Untrusted { what: "the key set", source };
        let trust = match self.trust() {
            Some(held) if *held.signed_key_set() == signed => return Ok(()),
            Some(held) => {
                let mut trust = Trust::clone(&held);
                trust.update(signed).map_err(untrusted)?;
                trust
            }
            None => Trust::new(self.join.root, signed, self.grace_ms).map_err(untrusted)?,
        };
        let keep = trust.signed_key_set().clone();
        self.db.write(move |txn| KEY_SET.put(txn, &(), &keep)).await?;
        tracing::info!(version = trust.key_set().version, "network keys taken");
        set(&self.trust, Some(Arc::new(trust)));
        Ok(())
    }

    /// Uses the invitation, unless that was done before, and gets another certificate when it is time.
    async fn enrol(&self) -> Result<(), RefreshError> {
        let (held, trust, now) = (read(&self.certificate), self.trust(), now_ms());
        let (Some((signer, certificate)), Some(trust)) = (held, trust) else { return self.ask_certificate().await };
        if !certificate.is_due(&signer, &trust, now) {
            return Ok(());
        }
        let holds = certificate.holds_until(&signer, &trust) > now;
        {
            let mut failed = self.not_renewed.lock().unwrap_or_else(PoisonError::into_inner);
            if holds && failed.is_some_and(|at| at.elapsed() < RENEW_EVERY) {
                return Ok(());
            }
            *failed = Some(Instant::now());
        }
        match self.ask_certificate().await {
            Ok(()) => {
                *self.not_renewed.lock().unwrap_or_else(PoisonError::into_inner) = None;
                Ok(())
            }
            // What is held is good for a while yet.
            Err(RefreshError::Ask { source, .. }) if holds => {
                tracing::warn!(%source, "the certificate could not be renewed");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn ask_certificate(&self) -> Result<(), RefreshError> {
        let failed = |source| RefreshError::Ask { what: "enrolment", source };
        let held = self.db.read(|txn| CERTIFICATE.get(txn, &()))?;
        let token = match &self.join.invitation {
            Some(invitation) => invitation.token,
            // Who is enrolled needs none.
            None if held.is_some() => Nonce::from_bytes([0; 16]),
            None => {
                let refusal = Refusal::new(RefusalCode::BadInvitation, "the join line in config.toml carries none");
                return Err(failed(AskError::Refused(refusal)));
            }
        };
        let request = SalesRequest::Enrol { token, name: self.name.clone(), held };
        let SalesResponse::Enrolled(signed) = self.sales(request).await.map_err(failed)? else {
            return Err(failed(AskError::unexpected()));
        };
        let untrusted = |source| RefreshError::Untrusted { what: "the certificate", source };
        let trust = self.trust().ok_or_else(|| failed(AskError::Away("the network's keys are missing".to_owned())))?;
        let (me, signer) = (self.node.peer_id(), signed.signer());
        let certificate =
            MerchantCert::check(&signed, &me, &trust, &RevocationState::default(), now_ms()).map_err(untrusted)?;
        self.db.write(move |txn| CERTIFICATE.put(txn, &(), &signed)).await?;
        tracing::info!(name = %certificate.name, until = certificate.until, "enrolled as a merchant");
        set(&self.certificate, Some((signer, certificate)));
        Ok(())
    }

    /// Whether the manager sells through this merchant, by its last word: kept, so that a shop that starts while the manager
    /// is away takes no money for what it cannot sell.
    async fn note_revoked(&self, why: Option<String>) -> Result<(), StoreError> {
        let before = self.revoked();
        if before == why {
            return Ok(());
        }
        let keep = why.clone().map(|why| Revoked { network: self.join.network(), why });
        let put = move |txn: &WriteTransaction<'_>| match &keep {
            Some(revoked) => REVOKED.put(txn, &(), revoked),
            None => REVOKED.delete(txn, &()).map(drop),
        };
        self.db.write(put).await?;
        match (&before, &why) {
            (None, Some(why)) => {
                tracing::error!(why, "this merchant's certificate was revoked: it sells nothing any more");
            }
            (Some(_), None) => tracing::warn!("this merchant's certificate is good again"),
            _ => {}
        }
        self.contact().revoked = why;
        Ok(())
    }

    async fn refresh(&self) -> Result<(), RefreshError> {
        self.fetch_keys().await?;
        let enrolled = self.enrol().await;
        self.contact().enrolment = enrolled.as_ref().err().map(ToString::to_string);
        enrolled?;
        match self.fetch_catalogue(Instant::now()).await {
            Err(RefreshError::Ask { source: AskError::Refused(refusal), .. })
                if refusal.code == RefusalCode::NotEnrolled =>
            {
                tracing::warn!(%refusal, "the manager has forgotten this merchant, and is shown its certificate");
                let enrolled = self.ask_certificate().await;
                self.contact().enrolment = enrolled.as_ref().err().map(ToString::to_string);
                enrolled?;
                self.fetch_catalogue(Instant::now()).await
            }
            fetched => fetched,
        }
    }

    /// Keeps keys, enrolment and catalogue up to date until the node stops.
    pub(crate) async fn run(self: Arc<Self>, config: Config, supervisor: node::Supervisor) -> Result<(), StoreError> {
        let token = supervisor.token();
        let mut failures = 0;
        loop {
            let refreshed = tokio::select! {
                refreshed = Box::pin(self.refresh()) => refreshed,
                () = token.cancelled() => return Ok(()),
            };
            let wait = match refreshed {
                Ok(()) => {
                    failures = 0;
                    Duration::from_millis(config.refresh_ms)
                }
                Err(RefreshError::Store(error)) => return Err(error),
                Err(error) => {
                    let wait = back_off(failures, config.retry_min_ms, config.retry_max_ms);
                    failures = failures.saturating_add(1);
                    tracing::warn!(%error, wait_ms = wait.as_millis(), "not up to date with the manager");
                    wait
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.wake.notified() => {}
                () = token.cancelled() => return Ok(()),
            }
        }
    }
}

fn short(manager: &PeerAddrs) -> String {
    let peer: PeerId = manager.peer;
    format!("…{}", peer.short())
}
