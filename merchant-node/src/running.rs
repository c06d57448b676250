//! What a merchant consists of, in the order in which it is started; stopping goes the other way.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use node::{
    ControlServer, ControlStartError, DhtMode, DirLock, DirLockError, KeyFileError, MetricsServer, MetricsServerError,
    Node, NodeConfig, NodeHandle, ShutdownError, Supervisor,
};
use protocol::{Address, Amount, PeerAddrs, PeerId};
use store::{Db, OpenError, Options, StoreError};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::config::{Config, ConfigError};
use crate::http::{self, Bounded, STOP_GRACE};
use crate::init::KEY;
use crate::link::Link;
use crate::orders::{Desk, run_chore};
use crate::payments::{IssueError, PaymentProvider, Prepaid, VoucherCode};
use crate::shop::{Counts, Shop};
use crate::{backup, clock, control, tables};

/// The database in the merchant's folder.
pub(crate) const STORE: &str = "merchant.redb";

/// Where a merchant answers.
#[derive(Clone, Debug)]
pub(crate) struct Addresses {
    pub(crate) node: Vec<Address>,
    pub(crate) http: SocketAddr,
    pub(crate) metrics: Option<SocketAddr>,
}

/// Why a merchant did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another process has the folder.
    #[error(transparent)]
    Lock(#[from] DirLockError),
    /// The database cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is gone, and what it held with it.
    #[error(
        "{} is missing or empty, although this merchant ran here before: put it back, or run `willcall merchant restore BACKUP`",
        path.display()
    )]
    StoreMissing {
        /// Where it should be.
        path: PathBuf,
    },
    /// The database cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The node's key.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// The network part.
    #[error(transparent)]
    Node(#[from] node::StartError),
    /// The node stopped while it was being started.
    #[error(transparent)]
    Stopped(#[from] node::Stopped),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlStartError),
    /// The metrics server.
    #[error(transparent)]
    Metrics(#[from] MetricsServerError),
    /// The HTTP API's address.
    #[error(
        "cannot serve HTTP on {address}: {source}; choose another `http` in config.toml (port 0 takes any free one)"
    )]
    Http {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file in the folder.
    #[error("cannot use {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Two payment providers of one name.
    #[error("two payment providers are called '{0}'")]
    Provider(&'static str),
}

/// A merchant at work. Dropping it asks its tasks to stop without waiting for them.
pub struct Running {
    supervisor: Supervisor,
    node: NodeHandle,
    shop: Arc<Shop>,
    addresses: Addresses,
    announced: Vec<Address>,
    // Last, so that nobody else gets the folder before everything else is gone.
    _lock: DirLock,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("peer", &self.peer_id()).field("addresses", &self.addresses).finish()
    }
}

/// Starts the merchant of `dir`, with vouchers as the way to pay.
///
/// # Errors
/// [`StartError`], one line with what to do. Nothing keeps running then.
pub async fn start(dir: &Path, config: Config) -> Result<Running, StartError> {
    Box::pin(start_with(dir, config, Vec::new())).await
}

/// Starts the merchant of `dir`, with further ways to pay beside vouchers.
///
/// # Errors
/// As [`start`].
pub async fn start_with(
    dir: &Path,
    config: Config,
    providers: Vec<Arc<dyn PaymentProvider>>,
) -> Result<Running, StartError> {
    let supervisor = Supervisor::new();
    let started = Box::pin(compose(dir, config, providers, &supervisor)).await;
    if started.is_err() {
        // The reason for not starting is the one to report, not what did not stop in time.
        let _ = supervisor.shutdown(STOP_GRACE).await;
    }
    started
}

async fn compose(
    dir: &Path,
    config: Config,
    providers: Vec<Arc<dyn PaymentProvider>>,
    supervisor: &Supervisor,
) -> Result<Running, StartError> {
    config.check()?;
    let join = config.join_line()?;
    let lock = DirLock::acquire(dir)?;
    let path = dir.join(STORE);
    // An empty one would know no order and no voucher.
    if node::listen_memory::is_remembered(dir) && store::is_absent(&path) {
        return Err(StartError::StoreMissing { path });
    }
    let db = Db::open(path, Options::new(tables::SCHEMA))?;
    let keypair = node::load_key(&dir.join(KEY), None)?;

    let file = |name: &str| {
        let path = dir.join(name);
        move |source| StartError::File { path, source }
    };
    let mut network = NodeConfig::new(keypair.clone());
    network.listen = node::listen_memory::recall(dir, &config.listen).map_err(file("listen addresses"))?;
    network.external = config.external.clone();
    network.dht = DhtMode::Off;
    network.gossip = false;
    network.agent = concat!("willcall-merchant/", env!("CARGO_PKG_VERSION")).to_owned();
    network.allow_key_log = config.allow_key_log;
    let metrics = network.metrics.clone();
    let node = Node::start(network, supervisor).await?;
    let listening = node.listen_addresses().await?;
    node::listen_memory::remember(dir, &listening).map_err(file("listen addresses"))?;

    let link = Arc::new(Link::load(node.clone(), db.clone(), join, &config)?);
    let prepaid = Prepaid::new(db.clone(), &keypair);
    let mut by_name: BTreeMap<&'static str, Arc<dyn PaymentProvider>> = BTreeMap::new();
    by_name.insert(prepaid.name(), Arc::new(prepaid.clone()));
    for provider in providers {
        let name = provider.name();
        if by_name.insert(name, provider).is_some() {
            return Err(StartError::Provider(name));
        }
    }
    let listener = bind_http(dir, config.http).await?;
    let http = listener.local_addr().map_err(|source| StartError::Http { address: config.http, source })?;
    let shop = Arc::new(Shop {
        places: Arc::new(Semaphore::new(config.purchases_at_once.clamp(1, Semaphore::MAX_PERMITS))),
        counts: Counts::register(&metrics),
        restored_at: backup::restored_at(dir).map_err(file("the time of the last restore"))?,
        config: config.clone(),
        keypair,
        db,
        link: Arc::clone(&link),
        desk: Desk::default(),
        prepaid,
        providers: by_name,
        supervisor: supervisor.clone(),
    });

    supervisor.spawn_critical("manager link", Arc::clone(&link).run(config.clone(), supervisor.clone()));
    supervisor.spawn_critical("catalogue", link.serve_looks(supervisor.clone()));
    supervisor.spawn_critical("orders", run_chore(Arc::clone(&shop)));
    let listener = Bounded::new(listener, config.http_connections, supervisor.clone());
    serve_http(supervisor, listener, http::router(Arc::clone(&shop)));

    let mut addresses = Addresses { node: listening.clone(), http, metrics: None };
    if let Some(address) = config.metrics {
        let watched = Arc::clone(&shop);
        let server = MetricsServer::start(supervisor, address, metrics, move || watched.health()).await?;
        addresses.metrics = Some(server.address());
    }
    let (operated, told) = (Arc::clone(&shop), addresses.clone());
    ControlServer::start(supervisor, dir, move |request, _| {
        Box::pin(control::answer(Arc::clone(&operated), told.clone(), request))
    })
    .await?;

    let announced = if config.external.is_empty() { listening } else { config.external };
    tracing::info!(peer = %node.peer_id(), %http, "merchant started");
    Ok(Running { supervisor: supervisor.clone(), node, shop, addresses, announced, _lock: lock })
}

/// Listens for HTTP; a port that the system chose is kept for the next start.
async fn bind_http(dir: &Path, wanted: SocketAddr) -> Result<TcpListener, StartError> {
    let path = dir.join("http-address");
    let file = |source| StartError::File { path: path.clone(), source };
    let mut address = wanted;
    if wanted.port() == 0 {
        match std::fs::read_to_string(&path) {
            // A file that holds something else is passed over: it is only a memory.
            Ok(text) => {
                let kept = text.trim().parse::<SocketAddr>().ok().filter(|kept| kept.ip() == wanted.ip());
                address = kept.unwrap_or(wanted);
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(file(error)),
        }
    }
    let failed = |source| StartError::Http { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let actual = listener.local_addr().map_err(failed)?;
    if wanted.port() == 0 && actual != address {
        let temporary = dir.join("http-address.new");
        std::fs::write(&temporary, format!("{actual}\n")).map_err(file)?;
        std::fs::rename(&temporary, &path).map_err(file)?;
    }
    Ok(listener)
}

fn serve_http(supervisor: &Supervisor, listener: Bounded, router: axum::Router) {
    let token = supervisor.token();
    supervisor.spawn_critical("http", async move {
        let stop = token.clone().cancelled_owned();
        let serve = axum::serve(listener, router).with_graceful_shutdown(stop).into_future();
        tokio::select! {
            result = serve => result,
            () = async { token.cancelled().await; tokio::time::sleep(STOP_GRACE).await } => Ok(()),
        }
    });
}

impl Running {
    /// The merchant's peer ID.
    pub fn peer_id(&self) -> PeerId {
        self.node.peer_id()
    }

    /// The merchant and the addresses that it announces; often none, because a merchant only calls.
    pub fn addresses(&self) -> PeerAddrs {
        PeerAddrs::new(self.peer_id(), self.announced.clone())
    }

    /// Where the HTTP API is served.
    pub fn http_address(&self) -> SocketAddr {
        self.addresses.http
    }

    /// Where metrics are served, if they are.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.addresses.metrics
    }

    /// The node.
    pub fn handle(&self) -> &NodeHandle {
        &self.node
    }

    /// The owner of its tasks.
    pub fn supervisor(&self) -> &Supervisor {
        &self.supervisor
    }

    /// Why it cannot sell now; `None` when it can.
    pub fn not_ready(&self) -> Option<String> {
        self.shop.link.not_ready()
    }

    /// Does now what its chores do at their times: refreshes keys and catalogue, looks at open orders.
    pub fn nudge(&self) {
        self.shop.link.nudge();
        self.shop.desk.all_due();
        self.shop.desk.nudge.notify_one();
    }

    /// Issues `count` vouchers worth `amount` each.
    ///
    /// # Errors
    /// [`IssueError`].
    pub async fn issue_vouchers(&self, amount: Amount, count: u32) -> Result<Vec<VoucherCode>, IssueError> {
        self.shop.prepaid.issue(amount, count, clock::now_ms()).await
    }

    /// Waits until it came down by itself and gives the reason.
    pub async fn failed(&self) -> String {
        self.supervisor.failed().await
    }

    /// Stops it: requests under way have two seconds, then everything ends, and the folder is free again.
    ///
    /// # Errors
    /// [`ShutdownError`] names what did not end within `deadline`.
    pub async fn stop(self, deadline: Duration) -> Result<(), ShutdownError> {
        let (supervisor, closed) = (self.supervisor.clone(), self.shop.db.closed());
        supervisor.shutdown_and_close(self, closed, deadline).await
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.supervisor.stop();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use protocol::trust::{Invitation, InvitedRole, JoinLine};
    use protocol::{Currency, Digest, Keypair, Nonce, ProductId};

    use super::*;
    use crate::init::{InitOptions, init};
    use crate::orders::{Order, RefundError, Stage};
    use crate::tables::KeyRecord;

    /// A shop whose manager is away.
    async fn alone(dir: &Path) -> Running {
        let [root, manager] = [1, 2].map(|seed| Keypair::from_seed(&[seed; 32]).peer_id());
        let nowhere = Address::new("/ip4/127.0.0.1/tcp/9").unwrap();
        let invitation = Some(Invitation { role: InvitedRole::Merchant, token: Nonce::from_bytes([3; 16]) });
        let join = JoinLine { root, managers: vec![PeerAddrs::new(manager, vec![nowhere])], invitation };
        let mut options = InitOptions::new(join, "shop");
        options.http = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
        init(dir, options).unwrap();
        start(dir, Config::load(dir).unwrap()).await.unwrap()
    }

    /// One that was sold, and whose payment nobody here can take.
    fn released() -> Order {
        Order {
            id: Nonce::from_bytes([4; 16]),
            key: "k".into(),
            created_at: clock::now_ms(),
            updated_at: 0,
            product: ProductId::from_bytes([5; 16]),
            client: Keypair::from_seed(&[6; 32]).peer_id(),
            amount: Amount { minor: 999, currency: Currency::USD },
            provider: "elsewhere".into(),
            reference: "r".into(),
            authorisation: Nonce::from_bytes([7; 16]),
            authorised_at: 1,
            price_salt: Nonce::from_bytes([8; 16]),
            payment_salt: Nonce::from_bytes([9; 16]),
            stage: Stage::Released,
            ends_as: None,
            before_refund: None,
            policy: Some(protocol::manifest::KeyPolicy::AtRelease),
            data: None,
            expires_at: 0,
            endorsement: None,
            failure: None,
        }
    }

    #[tokio::test]
    async fn a_refund_of_an_order_that_moves_at_that_moment_is_made_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let running = Box::pin(alone(dir.path())).await;
        let (shop, order) = (Arc::clone(&running.shop), released());
        let record = KeyRecord { request: Digest::from_bytes([0; 32]), order: order.id, answer: None };
        shop.place(order.clone(), record).await.unwrap();

        // The word that the payment was taken waits for the disk while the refund looks at the order.
        let (began, mut begun) = tokio::sync::mpsc::unbounded_channel();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let (db, wait) = (shop.db.clone(), std::sync::Mutex::new(wait));
        let held = tokio::spawn(async move {
            db.write(move |_| {
                let _ = began.send(());
                let _ = wait.lock().unwrap().recv();
                Ok::<_, StoreError>(())
            })
            .await
        });
        begun.recv().await.unwrap();
        let mut taken = order.clone();
        taken.stage = Stage::Done;
        let mut moving = Box::pin(shop.save(Stage::Released, taken, None));
        let mut refunding = Box::pin(shop.refund(order.id));
        assert!(futures::poll!(&mut moving).is_pending() && futures::poll!(&mut refunding).is_pending());
        go.send(()).unwrap();
        let (moved, refunded) = tokio::join!(moving, refunding);
        assert!(moved.unwrap());
        assert!(matches!(refunded, Err(RefundError::Waits(_))), "{refunded:?}");
        assert_eq!(shop.order(&order.id).unwrap().unwrap().stage, Stage::Voiding);
        held.await.unwrap().unwrap();
        drop(shop);
        running.stop(Duration::from_secs(20)).await.unwrap();
    }
}
