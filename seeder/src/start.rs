//! Where a seeder is put together. Read from top to bottom this is the order of the start; tasks stop in any order,
//! because what each must not lose is on disk.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use delivery::ContentStore;
use node::{
    ControlServer, DhtMode, DirLock, Health, MetricsServer, Node, NodeConfig, NodeHandle, ReachConfig, ShutdownError,
    Supervisor, listen_memory,
};
use protocol::{Address, PeerAddrs, PeerId, Refusal};
use store::{Db, Options};

use crate::clock::now_ms;
use crate::config::Config;
use crate::context::{Parts, Seeder};
use crate::denied::Denied;
use crate::init::key_path;
use crate::manager::ManagerLink;
use crate::network::{Network, TakeError};
use crate::tables::SCHEMA;
use crate::{
    acquaintance, announcing, control, garbage, gossip, outbox, post, public, reach, replication, scrub, serving, sync,
    upkeep,
};

/// Why a seeder did not start. Each is one line with what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A value in the configuration.
    #[error("configuration: {key} {reason}")]
    Config {
        /// The key.
        key: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Another process runs on this directory.
    #[error(transparent)]
    Lock(#[from] node::DirLockError),
    /// The key file.
    #[error(transparent)]
    Key(#[from] node::KeyFileError),
    /// The database.
    #[error(transparent)]
    Open(#[from] store::OpenError),
    /// The database, once open.
    #[error(transparent)]
    Store(#[from] store::StoreError),
    /// The content folder.
    #[error(transparent)]
    Content(#[from] delivery::FileError),
    /// What an earlier run stored is of another network, or damaged.
    #[error("what is stored here does not fit the join line: {0}; use the line that this seeder was set up with")]
    Network(protocol::Refusal),
    /// The network host.
    #[error(transparent)]
    Node(#[from] node::StartError),
    /// The note of ports that the system chose.
    #[error("cannot read or write the note of ports in {dir}: {source}")]
    Ports {
        /// The seeder's directory.
        dir: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// A service of this process has the protocol already.
    #[error(transparent)]
    Accept(#[from] node::AcceptError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] node::ControlStartError),
    /// The metrics page.
    #[error(transparent)]
    Metrics(#[from] node::MetricsServerError),
    /// The network host stopped while it was being started.
    #[error(transparent)]
    Stopped(#[from] node::Stopped),
}

impl From<TakeError> for StartError {
    fn from(error: TakeError) -> Self {
        match error {
            TakeError::Refused(refusal) => StartError::Network(refusal),
            // Nothing is taken at the start that could contradict what is held.
            TakeError::Fork(text) => StartError::Network(Refusal::new(protocol::RefusalCode::KeyRetired, text)),
            TakeError::Store(error) => StartError::Store(error),
        }
    }
}

/// A running seeder.
pub struct Running {
    seeder: Arc<Seeder>,
    metrics: Option<MetricsServer>,
    _control: ControlServer,
    _lock: DirLock,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("peer", &self.seeder.peer).finish_non_exhaustive()
    }
}

/// Starts the seeder of `dir`.
///
/// # Errors
/// [`StartError`].
pub async fn start(dir: &Path, config: Config) -> Result<Running, StartError> {
    Box::pin(start_at(dir, config, None)).await
}

/// As [`start`], over a content store that this process has open already: the origin beside a manager, which publishes
/// into the same store. It must be the one at [`Config::content_path`].
///
/// # Errors
/// [`StartError`].
pub async fn start_sharing(dir: &Path, config: Config, contents: ContentStore) -> Result<Running, StartError> {
    Box::pin(start_at(dir, config, Some(contents))).await
}

async fn start_at(dir: &Path, config: Config, shared: Option<ContentStore>) -> Result<Running, StartError> {
    let join = config.check().map_err(|(key, reason)| StartError::Config { key, reason })?;
    let lock = DirLock::acquire(dir)?;
    let keypair = node::load_key(&key_path(dir), None)?;
    let path = dir.join("seeder.redb");
    // What it holds of goods lies elsewhere, and it is enrolled anew: so it serves on, but poorer.
    if listen_memory::is_remembered(dir) && store::is_absent(&path) {
        tracing::error!(
            path = %path.display(),
            "the database is gone although this seeder ran here before: what it had not sent to the manager yet is not paid"
        );
    }
    let db = Db::open(path, Options::new(SCHEMA))?;
    let contents = match shared {
        Some(contents) => contents,
        None => ContentStore::open(config.content_path(dir))?,
    };
    let network = Network::load(&db, &join, keypair.peer_id(), config.clock_grace_ms)?;
    outbox::open(&db).await?;
    let denied = Denied::load(&db, &config.deny)?;

    let supervisor = Supervisor::new();
    let ports = |source| StartError::Ports { dir: dir.display().to_string(), source };
    let node_config = NodeConfig {
        listen: listen_memory::recall(dir, &config.listen).map_err(ports)?,
        external: config.external.clone(),
        bootstrap: join.managers.clone(),
        dht: DhtMode::Server,
        reach: ReachConfig {
            probe: true,
            reserve: config.use_relays,
            punch: true,
            relay: config.relay.clone(),
            dial_back: true,
            // Where it says itself how it is reached, the router need not be asked.
            upnp: config.upnp && config.external.is_empty(),
            lan: config.lan,
        },
        agent: concat!("willcall-seeder/", env!("CARGO_PKG_VERSION")).to_owned(),
        allow_key_log: config.allow_key_log,
        gossip_heartbeat: Duration::from_millis(config.gossip_heartbeat_ms),
        gossip_memory: Duration::from_millis(config.gossip_memory_ms),
        ..NodeConfig::new(keypair.clone())
    };
    let node = Node::start(node_config, &supervisor).await?;
    let actual = node.listen_addresses().await?;
    listen_memory::remember(dir, &actual).map_err(ports)?;

    let manager = ManagerLink::new(node.clone(), join.managers.clone(), Duration::from_millis(config.call_ms));
    let metrics_address = config.metrics;
    let parts = Parts { keypair, config, db, contents, node, network, manager, denied, supervisor: supervisor.clone() };
    let seeder = Arc::new(Seeder::new(parts));
    seeder.set_addresses(reach::addresses(&seeder));

    let services = async {
        serving::start(&seeder).await?;
        sync::serve_nudges(&seeder).await?;
        public::serve(&seeder).await?;
        let each = || Arc::clone(&seeder);
        supervisor.spawn_critical("contact with the manager", sync::keep_contact(each(), join));
        supervisor.spawn_critical("own addresses", reach::follow(each()));
        supervisor.spawn_critical("news", gossip::hear_news(each()));
        supervisor.spawn_critical("receipts in the mesh", gossip::pass_receipts(each()));
        supervisor.spawn_critical("receipt batches", post::make_batches(each()));
        supervisor.spawn_critical("receipt post", post::send_batches(each()));
        supervisor.spawn_critical("replication queue", replication::work(each()));
        supervisor.spawn_critical("scrubbing", scrub::look_into(each()));
        supervisor.spawn_critical("damaged contents", scrub::mend_damaged(each()));
        supervisor.spawn_critical("takedowns", upkeep::purge(each()));
        supervisor.spawn_critical("acquaintance with other seeders", acquaintance::get_acquainted(each()));
        supervisor.spawn_critical("announcements", announcing::announce(each()));
        supervisor.spawn_critical("pruning", upkeep::prune(each()));
        supervisor.spawn_critical("garbage collection", garbage::collect(each()));
        let control = control::start(&seeder, dir).await?;
        let metrics = match metrics_address {
            Some(address) => {
                let (watched, metrics) = (each(), seeder.node.metrics().clone());
                Some(MetricsServer::start(&supervisor, address, metrics, move || health(&watched)).await?)
            }
            None => None,
        };
        Ok::<_, StartError>((control, metrics))
    };
    match Box::pin(services).await {
        Ok((control, metrics)) => {
            tracing::info!(peer = %seeder.peer, addresses = ?seeder.addresses(), "seeder started");
            Ok(Running { seeder, metrics, _control: control, _lock: lock })
        }
        Err(error) => {
            // What was started is stopped again before the directory is given back.
            let _ = supervisor.shutdown(Duration::from_secs(5)).await;
            Err(error)
        }
    }
}

fn health(seeder: &Seeder) -> Health {
    let mut reasons = Vec::new();
    let serving = seeder.network.certificate(now_ms());
    let failed = seeder.db.failed();
    let ok = serving.is_ok() && failed.is_none();
    reasons.extend(serving.err().map(|refusal| refusal.to_string()));
    reasons.extend(failed);
    reasons.extend(seeder.network.fork());
    let clock = seeder.network.clock(now_ms());
    reasons.extend(clock.is_off().then(|| format!("this machine's clock is {clock} by the manager's")));
    let notes = &seeder.notes;
    reasons.extend(
        [&notes.manager, &notes.storage, &notes.quota, &notes.receipts, &notes.announcing]
            .into_iter()
            .filter_map(|note| note.get()),
    );
    Health { ok, reasons }
}

impl Running {
    /// The network host.
    pub fn handle(&self) -> &NodeHandle {
        &self.seeder.node
    }

    /// This seeder.
    pub fn peer_id(&self) -> PeerId {
        self.seeder.peer
    }

    /// Where others reach it.
    pub fn addresses(&self) -> Vec<Address> {
        self.seeder.addresses()
    }

    /// This seeder and where others reach it.
    pub fn peer_addrs(&self) -> PeerAddrs {
        PeerAddrs::new(self.seeder.peer, self.seeder.addresses())
    }

    /// Where metrics are served, if they are.
    pub fn metrics_address(&self) -> Option<std::net::SocketAddr> {
        self.metrics.as_ref().map(MetricsServer::address)
    }

    /// The content store; the process may publish into it.
    pub fn contents(&self) -> &ContentStore {
        &self.seeder.contents
    }

    /// The owner of its tasks.
    pub fn supervisor(&self) -> &Supervisor {
        &self.seeder.supervisor
    }

    /// Contacts the manager now instead of at the next regular time: after something was published into
    /// [`Running::contents`].
    pub fn report_now(&self) {
        self.seeder.wake.sync.notify_one();
        self.seeder.wake.announce.notify_one();
    }

    /// For tests of everybody who deals with such a machine: while this is on, a bit of each chunk is wrong that is sent,
    /// after the chunk was read and checked, as when memory fails.
    pub fn turn_bits(&self, on: bool) {
        self.seeder.chunks.turn_bits(on);
    }

    /// What the control command `status` answers. Reads the disk.
    ///
    /// # Errors
    /// [`store::StoreError`].
    pub fn status(&self) -> Result<serde_json::Value, store::StoreError> {
        control::status(&self.seeder)
    }

    /// Waits until the seeder was asked to leave and everything that was to be done before is done: the process may end.
    pub async fn drained(&self) {
        self.seeder.drain.left().await;
    }

    /// Waits until something brings the seeder down, and gives the reason; for ever in a healthy one.
    pub async fn failed(&self) -> String {
        self.seeder.supervisor.failed().await
    }

    /// Stops, within `deadline`. Streams end by name, what was sent on them is stored, and the folder is free again.
    ///
    /// # Errors
    /// [`ShutdownError`] names what did not end in time.
    pub async fn stop(self, deadline: Duration) -> Result<(), ShutdownError> {
        let (supervisor, closed) = (self.seeder.supervisor.clone(), self.seeder.db.closed());
        supervisor.shutdown_and_close(self, closed, deadline).await
    }
}
