//! The network itself: set up in a temporary folder through the roles' own interfaces, watched through what they tell
//! their operators, and gone without a trace when it is dropped.

use std::path::{Path, PathBuf};
use std::time::Duration;

use client_node::Purchase;
use manager_node::{PublishProgress, PublishRequest, Published};
use node::Supervisor;
use protocol::manifest::KeyPolicy;
use protocol::ticket::TicketEnvelope;
use protocol::trust::{InvitedRole, JoinLine};
use protocol::{Amount, Currency, PeerId, ProductId, TransactionId};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;

use crate::books::Books;
use crate::client::{Client, ticket_of};
use crate::goods::Goods;
use crate::line::Line;
use crate::nodes::{Manager, Merchant, Seeder};
use crate::plan::Plan;
use crate::wait::{Late, until};

/// Room that a seeder offers.
const CAPACITY: u64 = 1 << 40;
/// Lines asked for at once: the manager's bound.
const LINES: usize = 1000;
/// So often, and with such pauses, the folder is tried to be taken away: two seconds.
const REMOVALS: u32 = 200;
const BETWEEN_REMOVALS: Duration = Duration::from_millis(10);

/// Why a network did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A node did not start.
    #[error("{node} does not start: {reason}")]
    Start {
        /// Which.
        node: String,
        /// Why.
        reason: String,
    },
    /// A node did not stop in time.
    #[error("{node} does not stop: {reason}")]
    Stop {
        /// Which.
        node: String,
        /// What did not end.
        reason: String,
    },
    /// A node that is down was asked for something.
    #[error("{0} is down")]
    Down(String),
    /// A node could not be set up.
    #[error("{node} cannot be set up: {reason}")]
    Init {
        /// Which.
        node: String,
        /// Why.
        reason: String,
    },
    /// Something did not happen in time.
    #[error(transparent)]
    Late(#[from] Late),
    /// The manager said no to a command.
    #[error(transparent)]
    Control(#[from] node::ControlError),
    /// A control socket did not answer, or said no.
    #[error(transparent)]
    Call(#[from] node::ControlCallError),
    /// A node's network part ended.
    #[error(transparent)]
    Stopped(#[from] node::Stopped),
    /// Nothing was published.
    #[error(transparent)]
    Publish(#[from] manager_node::PublishError),
    /// No voucher.
    #[error(transparent)]
    Voucher(#[from] merchant_node::IssueError),
    /// The shop.
    #[error(transparent)]
    Shop(#[from] client_node::ShopError),
    /// A client's home.
    #[error(transparent)]
    Home(#[from] client_node::HomeError),
    /// A file.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The order has no ticket.
    #[error("order {order} has no ticket, it is {state}")]
    NoTicket {
        /// The order.
        order: String,
        /// Where it stands.
        state: String,
    },
    /// The books do not add up.
    #[error("the ledger does not add up: {0}")]
    Books(String),
}

/// On which terms something is sold.
#[derive(Clone, Debug)]
pub struct Terms {
    /// In dollars.
    pub price: String,
    /// When key and money move.
    pub policy: KeyPolicy,
    /// Bytes of a chunk.
    pub chunk_size: u32,
    /// How long a lease is good, milliseconds; the manager's default when absent.
    pub lease_ms: Option<u64>,
    /// After so long without word of the manager seeders refuse, milliseconds; 0 for never.
    pub staleness_ms: u64,
}

impl Default for Terms {
    fn default() -> Self {
        Terms {
            price: "9.99".to_owned(),
            policy: KeyPolicy::AtRelease,
            chunk_size: 64 * 1024,
            lease_ms: None,
            staleness_ms: 0,
        }
    }
}

/// A network in a temporary folder.
pub struct Network {
    /// The manager with its origin.
    pub manager: Manager,
    /// The merchants.
    pub merchants: Vec<Merchant>,
    /// The seeders, in the order of their numbers; some may be down.
    pub seeders: Vec<Seeder>,
    plan: Plan,
    supervisor: Supervisor,
    // Last: the folder goes when everything else is gone.
    dir: Folder,
}

/// Where the network lives. A network that is dropped in the middle of its work still has tasks that are on their way out
/// and write a last file: what could not be taken away at first is once they are gone.
struct Folder(TempDir);

impl Folder {
    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let mut gone = false;
        for _ in 0..REMOVALS {
            match std::fs::remove_dir_all(self.path()) {
                // Still gone a moment later: whoever was about to make it anew has done so by then.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && gone => return,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => gone = true,
                Ok(()) | Err(_) => gone = false,
            }
            std::thread::sleep(BETWEEN_REMOVALS);
        }
    }
}

impl Network {
    /// Starts everything and waits until everybody is enrolled.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn start(plan: Plan) -> Result<Network, NetworkError> {
        let dir = Folder(tempfile::Builder::new().prefix("willcall-net-").tempdir()?);
        let manager_dir = dir.path().join("manager");
        let options = manager_node::InitOptions { config: plan.manager_config(), ..Default::default() };
        let init = |error: String| NetworkError::Init { node: "manager".to_owned(), reason: error };
        manager_node::init(&manager_dir, options).map_err(|error| init(error.to_string()))?;
        let mut manager = Manager { dir: manager_dir, running: None };
        manager.start().await?;
        let supervisor = Supervisor::new();
        let mut network = Network { manager, merchants: Vec::new(), seeders: Vec::new(), plan, supervisor, dir };
        for number in 0..network.plan.merchants {
            network.add_merchant(number).await?;
        }
        for _ in 0..network.plan.seeders {
            network.add_seeder().await?;
        }
        network.until_enrolled().await?;
        Ok(network)
    }

    /// The network's folder.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A line with an invitation.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn invite(&self, role: InvitedRole) -> Result<JoinLine, NetworkError> {
        let invited = self.manager.running()?.manager().invite(role, 1).await;
        invited.map_err(|error| NetworkError::Init { node: format!("{role:?}"), reason: error.to_string() })
    }

    async fn add_merchant(&mut self, number: usize) -> Result<(), NetworkError> {
        let name = format!("merchant-{number}");
        let (dir, join) = (self.folder(&name), self.invite(InvitedRole::Merchant).await?);
        let made = merchant_node::init(&dir, merchant_node::InitOptions::new(join, &name));
        let mut config = made.map_err(|e| NetworkError::Init { node: name, reason: e.to_string() })?.config;
        self.plan.tweak_merchant(number, &mut config);
        let mut merchant = Merchant { dir, config, running: None };
        merchant.start().await?;
        self.merchants.push(merchant);
        Ok(())
    }

    /// Sets up one more seeder and starts it; its number is the highest. It may not be enrolled yet.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn add_seeder(&mut self) -> Result<usize, NetworkError> {
        let number = self.seeders.len();
        let name = format!("seeder-{number}");
        let (dir, join) = (self.folder(&name), self.invite(InvitedRole::Seeder).await?);
        let mut config = seeder::Config::new(&join, &name, CAPACITY);
        self.plan.tweak_seeder(number, &mut config);
        let line = match (self.plan.speed)(number) {
            Some(speed) => Some(Line::start(&self.supervisor, Some(speed)).await?),
            None => None,
        };
        if let Some(address) = line.as_ref().and_then(Line::address) {
            config.external = vec![address];
        }
        let made = seeder::init_with(&dir, &config);
        let peer = made.map_err(|e| NetworkError::Init { node: name.clone(), reason: e.to_string() })?.peer;
        let mut seeder = Seeder { name, dir, config, line, running: None, peer };
        seeder.start().await?;
        self.seeders.push(seeder);
        Ok(number)
    }

    async fn until_enrolled(&self) -> Result<(), NetworkError> {
        let merchants = || async { self.merchants.iter().all(is_ready).then_some(()) };
        until("the merchants' enrolment", merchants).await?;
        let wanted = self.seeders.iter().filter(|seeder| seeder.running.is_some()).count() + 1;
        let seeders = || async { (self.seeders_here().await.ok()? >= wanted).then_some(()) };
        Ok(until("the seeders' enrolment", seeders).await?)
    }

    /// Seeders that report to the manager, the origin included.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn seeders_here(&self) -> Result<usize, NetworkError> {
        let answer = self.manager.control(json!({"cmd": "seeders", "limit": LINES})).await?;
        Ok(rows(&answer, "seeders").iter().filter(|line| line.get("here") == Some(&Value::Bool(true))).count())
    }

    /// Whether a seeder reported to the manager lately.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn is_here(&self, seeder: PeerId) -> Result<bool, NetworkError> {
        let answer = self.manager.control(json!({"cmd": "seeders", "limit": LINES})).await?;
        let name = Value::String(seeder.to_string());
        let lines = rows(&answer, "seeders");
        let line = lines.iter().find(|line| line.get("peer") == Some(&name));
        Ok(line.and_then(|line| line.get("here")) == Some(&Value::Bool(true)))
    }

    /// Publishes goods and waits until they are copied and on sale at every merchant.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn publish(&self, goods: &Goods, terms: &Terms) -> Result<Published, NetworkError> {
        let title = goods.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let request = PublishRequest {
            policy: Some(terms.policy),
            chunk_size: Some(terms.chunk_size),
            lease_ms: terms.lease_ms,
            staleness_ms: terms.staleness_ms,
            shares: vec!["The Band=60".to_owned()],
            ..PublishRequest::new(&goods.path, title, &terms.price)
        };
        let progress = watch::Sender::new(PublishProgress::default());
        let published = Box::pin(self.manager.running()?.manager().publish(request, progress)).await?;
        let copies = self.plan.manager_config().copies.min(u32::try_from(self.seeders.len()).unwrap_or(u32::MAX));
        self.until_copies(published.product, usize::try_from(copies).unwrap_or(0) + 1).await?;
        for merchant in &self.merchants {
            let url = merchant.url()?;
            merchant.running()?.nudge();
            let on_sale = || async {
                let offers = client_node::products(&url).await.ok()?;
                offers.iter().any(|offer| offer.id == published.product).then_some(())
            };
            until("the product's offer", on_sale).await?;
        }
        Ok(published)
    }

    /// Makes goods of this size and publishes them.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn publish_noise(
        &self,
        name: &str,
        bytes: u64,
        terms: &Terms,
    ) -> Result<(Goods, Published), NetworkError> {
        let goods = Goods::write(self.dir(), name, bytes, bytes)?;
        let published = self.publish(&goods, terms).await?;
        Ok((goods, published))
    }

    /// Waits until so many seeders, the origin included, hold a product.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn until_copies(&self, product: ProductId, copies: usize) -> Result<(), NetworkError> {
        let copied = || async {
            let answer = self.manager.control(json!({"cmd": "product", "id": product})).await.ok()?;
            (rows(&answer, "holders").len() >= copies).then_some(())
        };
        Ok(until(&format!("{copies} copies"), copied).await?)
    }

    /// A voucher of the first merchant, worth so many cents.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn voucher(&self, cents: u64) -> Result<String, NetworkError> {
        let merchant = self.merchants.first().ok_or_else(|| NetworkError::Down("merchant".to_owned()))?;
        let amount = Amount { minor: cents, currency: Currency::USD };
        let codes = merchant.running()?.issue_vouchers(amount, 1).await?;
        Ok(codes.first().map(ToString::to_string).unwrap_or_default())
    }

    /// A client with a home in the network's folder; the same one for the same name.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn client(&self, name: &str) -> Result<Client, NetworkError> {
        Client::open(self.folder(name)).await
    }

    /// Buys from the first merchant for this client, with a voucher of its own.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn buy(&self, client: &Client, product: ProductId) -> Result<Purchase, NetworkError> {
        let merchant = self.merchants.first().ok_or_else(|| NetworkError::Down("merchant".to_owned()))?;
        client.buy(merchant, product, &self.voucher(10_000).await?, None).await
    }

    /// Buys as [`Network::buy`] does; the ticket must come.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn ticket(
        &self,
        client: &Client,
        product: ProductId,
    ) -> Result<(TransactionId, TicketEnvelope), NetworkError> {
        ticket_of(&self.buy(client, product).await?)
    }

    /// What the manager says of a transaction.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn transaction(&self, id: TransactionId) -> Result<Value, NetworkError> {
        self.manager.control(json!({"cmd": "transaction", "id": id})).await
    }

    /// Waits until the manager has a transaction in this state.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn until_state(&self, id: TransactionId, state: &str) -> Result<Value, NetworkError> {
        let there = || async {
            let found = self.transaction(id).await.ok()?;
            (found.get("state").and_then(Value::as_str) == Some(state)).then_some(found)
        };
        Ok(until(&format!("transaction {id} being {state}"), there).await?)
    }

    /// Waits until the seeders of a transaction's first delivery are credited with `chunks` chunks together, and gives how
    /// many they are.
    ///
    /// # Errors
    /// [`NetworkError`] when they are not in time.
    pub async fn until_counted(&self, id: TransactionId, chunks: u64) -> Result<u64, NetworkError> {
        let there = || async {
            let found = self.transaction(id).await.ok()?;
            let seeders = found.pointer("/deliveries/0/seeders").and_then(Value::as_array)?;
            let counted = seeders.iter().filter_map(|seeder| seeder.get("chunks")?.as_u64()).sum::<u64>();
            (counted >= chunks).then_some(counted)
        };
        Ok(until(&format!("{chunks} chunks of transaction {id} being counted"), there).await?)
    }

    /// Takes a transaction, seeder, merchant or content back.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn revoke(&self, kind: &str, id: impl std::fmt::Display) -> Result<Value, NetworkError> {
        self.manager.control(json!({"cmd": "revoke", "kind": kind, "id": id.to_string()})).await
    }

    /// The receipts as the manager took them, the newest first.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn receipts(&self) -> Result<Vec<Value>, NetworkError> {
        Ok(rows(&self.manager.control(json!({"cmd": "receipts", "limit": LINES})).await?, "receipts"))
    }

    /// The manager's books, added up.
    ///
    /// # Errors
    /// [`NetworkError::Books`] when they do not add up.
    pub async fn books(&self) -> Result<Books, NetworkError> {
        let ledger = self.manager.control(json!({"cmd": "ledger", "limit": LINES})).await?;
        Books::read(&ledger).map_err(NetworkError::Books)
    }

    /// Stops everything in order: seeders first, which may still hand over receipts.
    ///
    /// # Errors
    /// The first node that did not stop in time.
    pub async fn stop(mut self) -> Result<(), NetworkError> {
        let seeders = futures::future::join_all(self.seeders.iter_mut().map(Seeder::stop)).await;
        let merchants = futures::future::join_all(self.merchants.iter_mut().map(Merchant::stop)).await;
        let manager = self.manager.stop().await;
        let lines = self.supervisor.shutdown(Duration::from_secs(5)).await;
        seeders.into_iter().chain(merchants).collect::<Result<(), _>>()?;
        manager?;
        lines.map_err(|error| NetworkError::Stop { node: "a line".to_owned(), reason: error.to_string() })
    }
}

fn is_ready(merchant: &Merchant) -> bool {
    merchant.running.as_ref().is_some_and(|running| running.not_ready().is_none())
}

/// The array under `name`.
pub(crate) fn rows(value: &Value, name: &str) -> Vec<Value> {
    value.get(name).and_then(Value::as_array).cloned().unwrap_or_default()
}
