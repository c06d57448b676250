//! The manager's composition: read from top to bottom it is the order of starting, and the reverse is the order of
//! stopping.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use delivery::{ContentStore, FileError};
use node::{
    AcceptError, ControlServer, ControlStartError, DhtMode, DirLock, DirLockError, Health, MetricsServer,
    MetricsServerError, Node, NodeConfig, NodeHandle, ReachConfig, ShutdownError, Stopped, SubscribeError, Supervisor,
};
use protocol::clock::ClockState;
use protocol::trust::{InvitedRole, JoinLine, KeyPurpose, Trust};
use protocol::{Address, PeerId};
use serde_json::Value;
use store::{Db, OpenError, Options, StoreError};
use tokio::sync::watch;

use crate::archive::Archive;
use crate::audit_fetch::Audits;
use crate::catalogue::Catalogue;
use crate::config::Config;
use crate::context::{Context, now_ms};
use crate::demand::Demand;
use crate::enrol::{self, InviteError};
use crate::keys::{KeysError, ManagerKeys};
use crate::placement::Placements;
use crate::publish::{self, PublishError, PublishProgress, PublishRequest, Published};
use crate::receipts::Telling;
use crate::registry::Registry;
use crate::restore::{Restore, RestoreError};
use crate::revocations::Revocations;
use crate::tables::SCHEMA;
use crate::transactions::announcing::Announcing;
use crate::workers::Workers;
use crate::{
    archive, audit_fetch, control, keys, mesh, news, placement, receipts, recovery, restore, sales, statements,
};

/// The database in the manager's folder.
pub(crate) const STORE: &str = "manager.redb";

/// Time for tasks to end when the start fails half way.
const ABORT_DEADLINE: Duration = Duration::from_secs(5);

/// Why the manager did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The directory is in use.
    #[error(transparent)]
    Lock(#[from] DirLockError),
    /// The database.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is gone, and what it held with it.
    #[error(
        "{} is missing or empty, although this manager ran here before: put it back, or run `willcall manager restore BACKUP`",
        path.display()
    )]
    StoreMissing {
        /// Where it should be.
        path: std::path::PathBuf,
    },
    /// The database's content.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The network's keys.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The node's key.
    #[error(transparent)]
    NodeKey(#[from] node::KeyFileError),
    /// The count of restores.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// What moved out of the database.
    #[error(transparent)]
    Archive(#[from] archive::OpenError),
    /// The origin's content.
    #[error(transparent)]
    Content(#[from] FileError),
    /// The ports that were chosen before.
    #[error("cannot use the file 'ports' in {}: {source}", dir.display())]
    Ports {
        /// The directory.
        dir: std::path::PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The network host.
    #[error(transparent)]
    Node(#[from] node::StartError),
    /// The network host ended during the start.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// Gossip.
    #[error(transparent)]
    Subscribe(#[from] SubscribeError),
    /// A service.
    #[error(transparent)]
    Accept(#[from] AcceptError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlStartError),
    /// The metrics.
    #[error(transparent)]
    Metrics(#[from] MetricsServerError),
    /// The node's key is not the one that the key set names.
    #[error("the key set names other managers than this node {peer}; restore {} from a backup", path.display())]
    NotThisManager {
        /// This node.
        peer: PeerId,
        /// Its key file.
        path: std::path::PathBuf,
    },
    /// A thread.
    #[error("a thread failed at the start: {0}")]
    Thread(String),
}

/// What lies on disk, opened.
struct Opened {
    lock: DirLock,
    db: Db,
    archive: Archive,
    restore: Restore,
    keys: ManagerKeys,
    trust: Trust,
    node_key: protocol::Keypair,
    content: ContentStore,
}

/// Starts the manager of `dir`, which [`crate::init`] made.
///
/// # Errors
/// [`StartError`]: one line with what to do.
pub async fn start(dir: &Path, config: Config) -> Result<Running, StartError> {
    let supervisor = Supervisor::new();
    match start_under(&supervisor, dir, config).await {
        Ok((ctx, lock)) => Ok(Running { ctx, supervisor, _lock: lock }),
        Err(error) => {
            // What was started already ends; the reason that counts is the first.
            if let Err(hanging) = supervisor.shutdown(ABORT_DEADLINE).await {
                tracing::warn!(error = %hanging, "tasks aborted after a failed start");
            }
            Err(error)
        }
    }
}

async fn start_under(
    supervisor: &Supervisor,
    dir: &Path,
    config: Config,
) -> Result<(Arc<Context>, DirLock), StartError> {
    let (path, opening) = (dir.to_owned(), config.clone());
    let opened = tokio::task::spawn_blocking(move || open(&path, &opening))
        .await
        .map_err(|e| StartError::Thread(e.to_string()))??;
    let Opened { lock, db, archive, restore, keys, trust, node_key, content } = opened;

    let (node, addresses) = start_node(supervisor, dir, &config, node_key).await?;
    let (placements, nudges) = Placements::new(db.clone(), &node);
    let (loading, network) = (db.clone(), trust.network());
    let (signer, handle, away_ms) = (keys.signer(KeyPurpose::Revocation), node.clone(), config.seeder_away_ms);
    let grace_ms = config.clock_grace_ms;
    let (revocations, registry) = tokio::task::spawn_blocking(move || {
        let revocations = Revocations::load(loading.clone(), network, signer, Some(handle))?;
        Ok::<_, StoreError>((revocations, Registry::load(loading, away_ms, grace_ms)?))
    })
    .await
    .map_err(|e| StartError::Thread(e.to_string()))??;
    revocations.begin_anew(restore.number).await?;
    let refusals = node.metrics().counter_by("refusals", "Requests refused, by service and code", ["service", "code"]);
    let recalled = AtomicBool::new(recovery::is_done(&db, restore.number)?);
    let ctx = Arc::new(Context {
        catalogue: Catalogue::new(db.clone()),
        archive,
        db,
        keys,
        peer: node.peer_id(),
        node: node.clone(),
        dir: dir.to_owned(),
        content,
        registry,
        revocations,
        placements,
        demand: Demand::new(config.demand_ms),
        audits: Audits::new(&node),
        restore: restore.number,
        restored_at: restore.at,
        recalled,
        started_at: now_ms(),
        started: Instant::now(),
        marks: Telling::default(),
        announcing: Announcing::default(),
        held: Mutex::default(),
        clock: Mutex::new(ClockState::Unknown),
        refusals,
        last_beat: Mutex::default(),
        workers: Workers::new(),
        publishing: tokio::sync::Mutex::new(()),
        trust: RwLock::new(Arc::new(trust)),
        addresses: RwLock::new(addresses),
        config,
    });

    if let Some(trouble) = ctx.keys_trouble() {
        tracing::error!("{trouble}");
    }
    news::start(&ctx, supervisor).await?;
    mesh::start(&ctx, supervisor).await?;
    placement::start(&ctx, supervisor, nudges);
    receipts::start(Arc::clone(&ctx), supervisor).await?;
    sales::start(Arc::clone(&ctx), supervisor).await?;
    statements::start(Arc::clone(&ctx), supervisor);
    recovery::start(&ctx, supervisor);
    archive::start(Arc::clone(&ctx), supervisor);
    audit_fetch::start(Arc::clone(&ctx), supervisor);
    let answering = Arc::clone(&ctx);
    ControlServer::start(supervisor, dir, move |request, progress| {
        let ctx = Arc::clone(&answering);
        async move { control::answer(&ctx, request, Some(progress)).await }
    })
    .await?;
    if let Some(address) = ctx.config.metrics {
        let (db, watched) = (ctx.db.clone(), supervisor.clone());
        let health = move || {
            let reasons: Vec<String> = db.failed().into_iter().chain(watched.failure()).collect();
            Health { ok: reasons.is_empty(), reasons }
        };
        MetricsServer::start(supervisor, address, ctx.node.metrics().clone(), health).await?;
    }
    tracing::info!(peer = %ctx.peer, network = %ctx.network(), "manager started");
    Ok((ctx, lock))
}

/// Blocks.
fn open(dir: &Path, config: &Config) -> Result<Opened, StartError> {
    let lock = DirLock::acquire(dir)?;
    let (keys, trust) = ManagerKeys::load(dir, config.clock_grace_ms)?;
    let key_path = dir.join("key");
    let node_key = node::load_key(&key_path, None)?;
    if !trust.key_set().managers.contains(&node_key.peer_id()) {
        return Err(StartError::NotThisManager { peer: node_key.peer_id(), path: key_path });
    }
    let path = dir.join(STORE);
    // An empty one would know no seeder and no sale, and begin revocations anew.
    if node::listen_memory::is_remembered(dir) && store::is_absent(&path) {
        return Err(StartError::StoreMissing { path });
    }
    let db = Db::open(path, Options::new(SCHEMA))?;
    let archive = Archive::open(dir, &db)?;
    let restore = restore::count_start(dir, &db)?;
    keys::remember(&db, &trust)?;
    let content = ContentStore::open(config.origin_path(dir).join("content"))?;
    Ok(Opened { lock, db, archive, restore, keys, trust, node_key, content })
}

async fn start_node(
    supervisor: &Supervisor,
    dir: &Path,
    config: &Config,
    keypair: protocol::Keypair,
) -> Result<(NodeHandle, Vec<Address>), StartError> {
    let ports = |source| StartError::Ports { dir: dir.to_owned(), source };
    let node = Node::start(
        NodeConfig {
            listen: node::listen_memory::recall(dir, &config.listen).map_err(ports)?,
            external: config.external.clone(),
            dht: DhtMode::Server,
            reach: ReachConfig {
                punch: true,
                relay: config.relay.clone(),
                dial_back: true,
                lan: config.lan,
                ..ReachConfig::default()
            },
            agent: concat!("willcall-manager/", env!("CARGO_PKG_VERSION")).to_owned(),
            allow_key_log: config.allow_key_log,
            gossip_memory: Duration::from_millis(config.gossip_memory_ms),
            ..NodeConfig::new(keypair)
        },
        supervisor,
    )
    .await?;
    let addresses = node.listen_addresses().await?;
    node::listen_memory::remember(dir, &addresses).map_err(ports)?;
    Ok((node, addresses))
}

/// A manager that runs until [`Running::stop`].
pub struct Running {
    ctx: Arc<Context>,
    supervisor: Supervisor,
    // Released last.
    _lock: DirLock,
}

impl Running {
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.ctx
    }

    /// This manager's peer ID.
    pub fn peer_id(&self) -> PeerId {
        self.ctx.peer
    }

    /// Where it can be reached.
    pub fn addresses(&self) -> Vec<Address> {
        self.ctx.own_addrs().addrs
    }

    /// The network host.
    pub fn handle(&self) -> &NodeHandle {
        &self.ctx.node
    }

    /// The tasks.
    pub fn supervisor(&self) -> &Supervisor {
        &self.supervisor
    }

    /// The line by which anybody joins.
    pub fn join_line(&self) -> JoinLine {
        self.ctx.join_line()
    }

    /// A line with an invitation for `uses` peers, good for the configured time.
    ///
    /// # Errors
    /// [`InviteError`].
    pub async fn invite(&self, role: InvitedRole, uses: u32) -> Result<JoinLine, InviteError> {
        Ok(enrol::invite(&self.ctx, role, uses, self.ctx.config.invitation_ms).await?.0)
    }

    /// A line for the origin, which runs in this process with a directory and a key of its own. An origin that was
    /// enrolled before gets its certificate again.
    ///
    /// # Errors
    /// [`InviteError`].
    pub async fn origin_invitation(&self) -> Result<JoinLine, InviteError> {
        self.invite(InvitedRole::Seeder, 1).await
    }

    /// Makes the seeder `peer` the origin: it gets every product and is listed in every lease.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn set_origin(&self, peer: PeerId) -> Result<(), StoreError> {
        self.ctx.registry.set_origin(peer).await?;
        self.ctx.placements.wake();
        Ok(())
    }

    /// The origin's directory; publications lie in its folder `content`.
    pub fn origin_dir(&self) -> std::path::PathBuf {
        self.ctx.config.origin_path(&self.ctx.dir)
    }

    /// The origin's content, for an origin in this process: a store of one folder is opened once.
    pub fn origin_content(&self) -> ContentStore {
        self.ctx.content.clone()
    }

    /// Puts files on sale. Dropping the future stops it.
    ///
    /// # Errors
    /// [`PublishError`]; nothing is left of a publication that failed.
    pub async fn publish(
        &self,
        request: PublishRequest,
        progress: watch::Sender<PublishProgress>,
    ) -> Result<Published, PublishError> {
        publish::publish(&self.ctx, request, progress).await
    }

    /// Answers a control command as the control socket does.
    ///
    /// # Errors
    /// [`node::ControlError`] with a code and a line for people.
    pub async fn control(&self, request: Value) -> Result<Value, node::ControlError> {
        control::answer(&self.ctx, request, None).await
    }

    /// Returns, with the reason, when the manager cannot go on; never in a healthy one.
    pub async fn failed(&self) -> String {
        self.supervisor.failed().await
    }

    /// Stops everything and closes the database.
    ///
    /// # Errors
    /// [`ShutdownError`] names what did not end in time.
    pub async fn stop(self, deadline: Duration) -> Result<(), ShutdownError> {
        let (supervisor, closed) = (self.supervisor.clone(), self.ctx.db.closed());
        supervisor.shutdown_and_close(self, closed, deadline).await
    }
}
