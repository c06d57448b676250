//! A command's connection to one network: a node that lives as long as the command and listens nowhere, unless a seeder
//! behind a translation has to dial it while it dials the seeder, and the calls
//! to the network's managers, of whom any that answers will do.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use node::{DhtMode, Node, NodeConfig, NodeHandle, Protocol, ReachConfig, StartError, Supervisor};
use protocol::api::{
    Answer, MAILBOX_PROTOCOL, MESH_PROTOCOL, MailboxRequest, MailboxResponse, MeshRequest, MeshResponse,
};
use protocol::codec::Wire;
use protocol::trust::{Heartbeat, JoinLine, KeyPurpose, RevocationState, Trust};
use protocol::{PeerAddrs, Refusal, RefusalCode, Signed};

use crate::home::{FileError, Home, blocking, now_ms};

const MAILBOX: Protocol = Protocol::new(MAILBOX_PROTOCOL);
pub(crate) const MESH: Protocol = Protocol::new(MESH_PROTOCOL);
/// A manager on the other side of the world answers within two seconds; this leaves room for a loaded one.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a busy manager is asked before its refusal is taken for an answer.
const BUSY_ATTEMPTS: u32 = 4;
/// Tasks of a client end within milliseconds of the signal.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Revocation epochs fetched in one run: 64 full answers, after which the next run goes on.
const MAX_EPOCHS: usize = 64 * MeshResponse::EPOCHS_PAGE;

/// A join line names eight at most; half as many again from memory bound the time that a fruitless search takes.
const MAX_MANAGERS: usize = 12;

/// How a command connects.
#[derive(Clone, Debug)]
pub struct LinkOptions {
    /// How far clocks may differ, milliseconds.
    pub clock_grace_ms: u64,
    /// Start although `SSLKEYLOGFILE` is set.
    pub allow_key_log: bool,
    /// Seeders that are asked for what is public where no manager answers, and that lead to others.
    pub seeders: Vec<PeerAddrs>,
    /// Look for seeders on the local network by multicast.
    pub lan: bool,
}

impl Default for LinkOptions {
    fn default() -> Self {
        LinkOptions {
            clock_grace_ms: protocol::trust::DEFAULT_CLOCK_GRACE_MS,
            allow_key_log: false,
            seeders: Vec::new(),
            lan: false,
        }
    }
}

/// Why a manager did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// None of them answered.
    #[error("no manager of the network answers ({}); check the connection, or try again later", tried.join("; "))]
    Away {
        /// Each one tried, with what happened.
        tried: Vec<String>,
    },
    /// It said no.
    #[error("the manager refuses: {0}")]
    Refused(Refusal),
    /// Its answer does not fit the question.
    #[error("the manager's answer is not one to {0}; update this program, or tell the network's operator")]
    Unfitting(&'static str),
}

/// Why the network's keys are not known.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// This client has never met the network, and neither a manager nor a seeder answers.
    #[error(
        "manager-needed: this machine has not met network {network} before and needs its key set once, but no seeder \
         that it knows gives it, and {source}; name a seeder that is up with --seeder"
    )]
    ManagerNeeded {
        /// The network.
        network: protocol::NetworkId,
        /// Why no manager could be asked.
        source: ManagerError,
    },
    /// What the manager gave is not signed by the network's root key.
    #[error("the key set that the manager gave is not this network's: {0}; check the join line or the ticket")]
    Bad(Refusal),
    /// The home cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// A running link.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    home: Home,
    node: NodeHandle,
    supervisor: Supervisor,
    join: JoinLine,
    options: LinkOptions,
    trust: Arc<Mutex<Option<Arc<Trust>>>>,
}

impl Link {
    pub(crate) async fn start(home: &Home, join: &JoinLine, options: LinkOptions) -> Result<Link, StartError> {
        let join = with_known_managers(home, join).await;
        let supervisor = Supervisor::new();
        let config = NodeConfig {
            bootstrap: join.managers.iter().chain(&options.seeders).cloned().collect(),
            dht: DhtMode::Client,
            gossip: false,
            reach: ReachConfig { punch: true, lan: options.lan, ..ReachConfig::default() },
            allow_key_log: options.allow_key_log,
            ..NodeConfig::new(home.keypair().clone())
        };
        let node = Node::start(config, &supervisor).await?;
        Ok(Link { home: home.clone(), node, supervisor, join, options, trust: Arc::default() })
    }

    pub(crate) fn node(&self) -> &NodeHandle {
        &self.node
    }

    pub(crate) fn seeders(&self) -> &[PeerAddrs] {
        &self.options.seeders
    }

    pub(crate) fn supervisor(&self) -> &Supervisor {
        &self.supervisor
    }

    /// Ends the node and its tasks.
    pub(crate) async fn stop(&self) {
        if let Err(error) = self.supervisor.shutdown(STOP_TIMEOUT).await {
            tracing::warn!(%error, "not everything stopped in time");
        }
    }

    pub(crate) fn network(&self) -> protocol::NetworkId {
        self.join.network()
    }

    /// Are managers or seeders known, and does no road of this machine lead to any of them? Where the local network is looked
    /// at somebody may be found all the same.
    pub(crate) fn has_no_route(&self) -> bool {
        let mut all = self.join.managers.iter().chain(&self.options.seeders).peekable();
        all.peek().is_some() && all.all(delivery::has_no_route)
    }

    /// Managers that the key set names, once it is known; until then those of the join line.
    fn managers(&self) -> Vec<PeerAddrs> {
        let named = self.known_trust().map(|trust| trust.key_set().managers.clone()).unwrap_or_default();
        let all = self.join.managers.iter();
        all.filter(|manager| named.is_empty() || named.contains(&manager.peer)).cloned().collect()
    }

    /// Asks one manager after the other; one that is busy is asked again when it says so.
    async fn call<Req: Wire, Resp: Answer>(&self, protocol: Protocol, request: &Req) -> Result<Resp, ManagerError> {
        let mut tried = Vec::new();
        for manager in self.managers() {
            for attempt in 1..=BUSY_ATTEMPTS {
                match self.node.call::<Req, Resp>(&manager, protocol, request, CALL_TIMEOUT).await {
                    Ok(response) => match response.refusal() {
                        Some(busy) if busy.code == RefusalCode::Overloaded && attempt < BUSY_ATTEMPTS => {
                            let wait = Duration::from_millis(busy.retry_after_ms.clamp(100, 5000));
                            tokio::time::sleep(wait * attempt).await;
                        }
                        _ => return Ok(response),
                    },
                    Err(error) => {
                        tried.push(error.to_string());
                        break;
                    }
                }
            }
        }
        if tried.is_empty() {
            tried.push("the ticket or join line names none that the network's key set does".to_owned());
        }
        Err(ManagerError::Away { tried })
    }

    /// A refusal for time says how far this machine's clock is off.
    fn refused(&self, refusal: Refusal) -> ManagerError {
        ManagerError::Refused(refusal.compared_with(now_ms(), self.options.clock_grace_ms))
    }

    pub(crate) async fn mailbox(&self, request: &MailboxRequest) -> Result<MailboxResponse, ManagerError> {
        match self.call(MAILBOX, request).await? {
            MailboxResponse::Refused(refusal) => Err(self.refused(refusal)),
            response => Ok(response),
        }
    }

    pub(crate) async fn mesh(&self, request: &MeshRequest) -> Result<MeshResponse, ManagerError> {
        match self.call(MESH, request).await? {
            MeshResponse::Refused(refusal) => Err(self.refused(refusal)),
            response => Ok(response),
        }
    }

    pub(crate) fn known_trust(&self) -> Option<Arc<Trust>> {
        self.trust.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_trust(&self, trust: Arc<Trust>) {
        *self.trust.lock().unwrap_or_else(PoisonError::into_inner) = Some(trust);
    }

    /// The network's keys: those remembered at once, else those that a manager or seeder gives now. True when they are fresh.
    pub(crate) async fn trust(&self) -> Result<(Arc<Trust>, bool), TrustError> {
        let (networks, join, grace) = (self.home.networks(), self.join.clone(), self.options.clock_grace_ms);
        if let Some(trust) = blocking(move || networks.trust(&join, grace)).await? {
            let trust = Arc::new(trust);
            self.set_trust(Arc::clone(&trust));
            return Ok((trust, false));
        }
        match self.refresh().await {
            Ok(trust) => Ok((trust, true)),
            Err(RefreshError::Manager(source)) => {
                Err(TrustError::ManagerNeeded { network: self.join.network(), source })
            }
            Err(RefreshError::Refused(refusal)) => Err(TrustError::Bad(refusal)),
            Err(RefreshError::File(error)) => Err(error.into()),
        }
    }

    /// Asks for the key set in force, checks it, and remembers it.
    pub(crate) async fn refresh(&self) -> Result<Arc<Trust>, RefreshError> {
        let version = |response: &MeshResponse| match response {
            MeshResponse::KeySet(signed) => {
                let trust = Trust::new(self.join.root, signed.clone(), self.options.clock_grace_ms);
                trust.ok().map(|trust| trust.key_set().version)
            }
            _ => None,
        };
        let MeshResponse::KeySet(signed) = self.public(&MeshRequest::KeySet, version).await? else {
            return Err(ManagerError::Unfitting("a question for the key set").into());
        };
        let trust = match self.known_trust() {
            Some(known) => {
                let mut trust = Trust::clone(&known);
                trust.update(signed)?;
                trust
            }
            None => Trust::new(self.join.root, signed, self.options.clock_grace_ms)?,
        };
        let trust = Arc::new(trust);
        self.set_trust(Arc::clone(&trust));
        // A ticket may come from anybody: managers that the network's own key set does not name are not remembered.
        let join = JoinLine { managers: self.managers(), ..self.join.clone() };
        let (networks, saved) = (self.home.networks(), Arc::clone(&trust));
        blocking(move || {
            networks.save_key_set(&saved)?;
            if join.managers.is_empty() { Ok(()) } else { networks.remember(&join) }
        })
        .await?;
        Ok(trust)
    }

    /// The manager's sign of life by its own word, which is as new as can be.
    pub(crate) async fn managers_sign_of_life(&self, trust: &Trust) -> Result<Heartbeat, RefreshError> {
        match self.mesh(&MeshRequest::Heartbeat).await? {
            MeshResponse::Heartbeat(signed) => {
                Ok(trust.open(&signed, KeyPurpose::Revocation, |heartbeat: &Heartbeat| heartbeat.at, now_ms())?)
            }
            _ => Err(ManagerError::Unfitting("a question for the heartbeat").into()),
        }
    }

    /// The manager's newest sign of life that anybody asked has heard.
    pub(crate) async fn sign_of_life(&self, trust: &Trust) -> Result<Heartbeat, RefreshError> {
        let open = |signed: &Signed<Heartbeat>| {
            trust.open(signed, KeyPurpose::Revocation, |heartbeat: &Heartbeat| heartbeat.at, now_ms())
        };
        let at = |response: &MeshResponse| match response {
            MeshResponse::Heartbeat(signed) => open(signed).ok().map(|heartbeat| heartbeat.at),
            _ => None,
        };
        match self.public(&MeshRequest::Heartbeat, at).await? {
            MeshResponse::Heartbeat(signed) => Ok(open(&signed)?),
            _ => Err(ManagerError::Unfitting("a question for the heartbeat").into()),
        }
    }

    /// What is remembered as revoked.
    pub(crate) async fn revocations(&self, trust: &Arc<Trust>) -> Result<RevocationState, FileError> {
        let (networks, trust) = (self.home.networks(), Arc::clone(trust));
        blocking(move || networks.revocations(&trust, now_ms())).await
    }

    /// Fetches revocation epochs that came since. What was taken when it fails, or is given up, is in `state`.
    pub(crate) async fn refresh_revocations(
        &self,
        trust: &Arc<Trust>,
        state: &mut RevocationState,
    ) -> Result<(), RefreshError> {
        let mut taken = 0;
        while taken < MAX_EPOCHS {
            let last = |response: &MeshResponse| match response {
                MeshResponse::Epochs(epochs) => epochs.iter().try_fold(0, |_, signed| {
                    trust
                        .open(signed, KeyPurpose::Revocation, |epoch| epoch.at, now_ms())
                        .ok()
                        .map(|epoch| epoch.number)
                }),
                _ => None,
            };
            let request = MeshRequest::Epochs { after: state.number() };
            let MeshResponse::Epochs(epochs) = self.public(&request, last).await? else {
                return Err(ManagerError::Unfitting("a question for revocations").into());
            };
            if epochs.is_empty() {
                break;
            }
            let (networks, trust, place) = (self.home.networks(), Arc::clone(trust), state.place());
            let new = blocking(move || networks.take_epochs(place, &trust, &epochs, now_ms())).await?;
            for (digest, epoch) in &new.epochs {
                state.apply(*digest, epoch)?;
            }
            if let Some(refusal) = new.refused {
                return Err(RefreshError::Refused(refusal));
            }
            if new.epochs.is_empty() {
                break;
            }
            taken += new.epochs.len();
        }
        Ok(())
    }
}

/// The line, with the managers that are remembered for its network behind its own.
async fn with_known_managers(home: &Home, join: &JoinLine) -> JoinLine {
    let (networks, network) = (home.networks(), join.network());
    // A memory that cannot be read is no reason not to use the line at hand.
    let known = blocking(move || networks.join(&network)).await.ok().flatten();
    let mut join = join.clone();
    for manager in known.into_iter().flat_map(|known| known.managers) {
        if join.managers.len() < MAX_MANAGERS && !join.managers.contains(&manager) {
            join.managers.push(manager);
        }
    }
    join
}

/// Why something newer could not be had from a manager.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RefreshError {
    #[error(transparent)]
    Manager(#[from] ManagerError),
    #[error("the manager's documents do not verify: {0}")]
    Refused(#[from] Refusal),
    #[error(transparent)]
    File(#[from] FileError),
}

/// True for refusals that a newer key set may lift.
pub(crate) fn wants_newer_keys(refusal: &Refusal) -> bool {
    matches!(refusal.code, RefusalCode::UnknownKey | RefusalCode::KeyRetired)
}
