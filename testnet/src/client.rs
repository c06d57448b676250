//! Clients as commands use them: a home, purchases over HTTP, and fetches that can be watched and broken off.

use std::path::PathBuf;

use client_node::{
    BuyRequest, FetchError, FetchOptions, FetchOutcome, FetchPhase, FetchProgress, Home, Purchase, Target,
};
use protocol::ticket::TicketEnvelope;
use protocol::{PeerId, ProductId, TransactionId};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::network::NetworkError;
use crate::nodes::Merchant;
use crate::wait::{LIMIT, Late};

/// A client's home on disk.
#[derive(Clone, Debug)]
pub struct Client {
    home: Home,
    out: PathBuf,
}

impl Client {
    pub(crate) async fn open(dir: PathBuf) -> Result<Client, NetworkError> {
        let out = dir.join("goods");
        let home = tokio::task::spawn_blocking(move || Home::open(&dir.join("home"), None)).await;
        Ok(Client { home: home.map_err(|_| NetworkError::Down("the runtime".to_owned()))??, out })
    }

    /// Its home.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// Its peer ID.
    pub fn peer(&self) -> PeerId {
        self.home.peer_id()
    }

    /// Where its goods go.
    pub fn out(&self) -> &PathBuf {
        &self.out
    }

    /// Buys over HTTP with a voucher, for this client or, with `client`, for another.
    ///
    /// # Errors
    /// [`NetworkError::Shop`].
    pub async fn buy(
        &self,
        merchant: &Merchant,
        product: ProductId,
        voucher: &str,
        client: Option<PeerId>,
    ) -> Result<Purchase, NetworkError> {
        let request = BuyRequest {
            merchant_url: merchant.url()?,
            product,
            provider: "prepaid".to_owned(),
            token: voucher.to_owned(),
            client,
            idempotency_key: None,
            place: None,
            wait: LIMIT,
        };
        let bought = Box::pin(client_node::buy(&self.home, request)).await?;
        client_node::handed_over(&self.home, &bought).await.map_err(client_node::ShopError::from)?;
        Ok(bought)
    }

    /// Begins to fetch; see [`Client::options`] for the usual options.
    pub fn fetch(&self, target: Target, options: FetchOptions) -> Fetch {
        let (sender, progress) = watch::channel(FetchProgress::default());
        let cancel = CancellationToken::new();
        let (home, out, token) = (self.home.clone(), self.out.clone(), cancel.clone());
        let task =
            tokio::spawn(
                async move { Box::pin(client_node::fetch(&home, target, &out, options, sender, token)).await },
            );
        Fetch { progress, cancel, task }
    }

    /// Fetches to the end with the usual options.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn fetch_all(&self, target: Target) -> Result<FetchOutcome, FetchError> {
        self.fetch(target, Client::options()).done().await
    }

    /// As a user's, with less patience.
    pub fn options() -> FetchOptions {
        let mut options = FetchOptions { manager_patience: LIMIT, ..FetchOptions::default() };
        options.limits.patience = LIMIT;
        options.limits.discovery_every = std::time::Duration::from_secs(1);
        options
    }

    /// As [`Client::options`], with a download of at most so many bytes a second.
    pub fn slow_options(bytes_per_second: u64) -> FetchOptions {
        let mut options = Client::options();
        options.limits.bytes_per_second = Some(bytes_per_second);
        options
    }
}

/// A fetch that runs. Dropping it stops it.
#[derive(Debug)]
pub struct Fetch {
    progress: watch::Receiver<FetchProgress>,
    cancel: CancellationToken,
    task: JoinHandle<Result<FetchOutcome, FetchError>>,
}

impl Fetch {
    /// Where it stands.
    pub fn progress(&self) -> FetchProgress {
        self.progress.borrow().clone()
    }

    /// A view of its own of where it stands.
    pub fn watch(&self) -> watch::Receiver<FetchProgress> {
        self.progress.clone()
    }

    /// Whether it ended.
    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits until so many chunks are there, or it is past the transfer.
    ///
    /// # Errors
    /// [`Late`], also when it ended before.
    pub async fn chunks(&mut self, chunks: u32) -> Result<FetchProgress, Late> {
        self.until(&format!("{chunks} chunks"), |p| p.transfer.have_chunks >= chunks || is_past(p.phase)).await
    }

    /// Waits until its progress is as told.
    ///
    /// # Errors
    /// [`Late`], also when it ended before.
    pub async fn until(
        &mut self,
        what: &str,
        mut is: impl FnMut(&FetchProgress) -> bool,
    ) -> Result<FetchProgress, Late> {
        let late = || Late { what: what.to_owned(), limit: LIMIT };
        let found = tokio::time::timeout(LIMIT, self.progress.wait_for(|progress| is(progress))).await;
        found.map_err(|_| late())?.map(|progress| progress.clone()).map_err(|_| late())
    }

    /// Breaks it off, as Ctrl-C does, and waits for its end.
    ///
    /// # Errors
    /// [`FetchError::Cancelled`], unless it was over already.
    pub async fn stop(self) -> Result<FetchOutcome, FetchError> {
        self.cancel.cancel();
        self.done().await
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn done(mut self) -> Result<FetchOutcome, FetchError> {
        match (&mut self.task).await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(FetchError::Cancelled),
            },
        }
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

fn is_past(phase: FetchPhase) -> bool {
    !matches!(phase, FetchPhase::Preparing | FetchPhase::Checking | FetchPhase::Fetching)
}

/// What a purchase of this program is fetched by.
///
/// # Errors
/// [`NetworkError::NoTicket`] while the order is pending.
pub(crate) fn ticket_of(purchase: &Purchase) -> Result<(TransactionId, TicketEnvelope), NetworkError> {
    let missing = || NetworkError::NoTicket { order: purchase.order.clone(), state: purchase.state.clone() };
    Ok((purchase.transaction.ok_or_else(missing)?, purchase.ticket.clone().ok_or_else(missing)?))
}
