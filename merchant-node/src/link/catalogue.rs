//! The catalogue as the manager has it: fetched as a whole, now and then and when somebody looks, by one task for all who
//! wait for it. Whoever asks for what is not there costs neither the manager a fetch of its own nor the shop a place.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use node::Supervisor;
use protocol::ProductId;
use protocol::RefusalCode;
use protocol::api::{ProductInfo, SalesRequest, SalesResponse};
use store::StoreError;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use super::{AskError, Link, RefreshError, read, set};
use crate::clock::now_ms;
use crate::tables::{PRODUCTS, StoredProduct};

/// Products that are fetched and kept, a few hundred bytes each; what the manager has beyond them is not offered.
pub(crate) const MAX_PRODUCTS: usize = 100_000;
/// Longest title, bytes, by the protocol.
const MAX_TITLE: usize = 200;
/// A catalogue younger than this is shown as it is, milliseconds: a crowd of buyers asks the manager once a second.
const FRESH_MS: u64 = 1000;
/// How long somebody who looks at the products waits for a newer catalogue.
const FRESH_WAIT: Duration = Duration::from_secs(2);
/// How long a purchase of a product that is not known waits for it.
const PRODUCT_WAIT: Duration = Duration::from_secs(10);
/// An unknown product makes the catalogue be fetched at once, but no more often than this: who asks sooner waits.
const FETCH_PAUSE: Duration = Duration::from_millis(250);
/// A manager that gave it out rests for as long as that took, and this at most: anybody can ask for what it does not have.
const MOST_REST: Duration = Duration::from_secs(10);

/// The catalogue.
#[derive(Debug, Default)]
pub(crate) struct Catalogue {
    pub(crate) products: BTreeMap<ProductId, ProductInfo>,
    /// When it was last fetched, unix milliseconds; 0 when it comes from the store.
    pub(crate) fetched_at: u64,
}

/// Where the catalogue is kept, and who waits for a newer one.
pub(super) struct Shelf {
    catalogue: RwLock<Arc<Catalogue>>,
    /// The last fetch; held while one is under way.
    last: Mutex<Option<Fetch>>,
    /// When somebody last asked for a fetch that begins after that.
    wanted: watch::Sender<Option<Instant>>,
    /// When the last fetch that ended, well or not, had begun.
    ended: watch::Sender<Option<Instant>>,
}

/// A fetch, and when the next one may begin.
#[derive(Clone, Copy)]
struct Fetch {
    began: Instant,
    next: Instant,
}

impl Shelf {
    /// With what is in the store.
    pub(super) fn of(products: BTreeMap<ProductId, ProductInfo>) -> Self {
        Shelf {
            catalogue: RwLock::new(Arc::new(Catalogue { products, fetched_at: 0 })),
            last: Mutex::new(None),
            wanted: watch::Sender::new(None),
            ended: watch::Sender::new(None),
        }
    }
}

impl Link {
    pub(crate) fn catalogue(&self) -> Arc<Catalogue> {
        read(&self.shelf.catalogue)
    }

    /// A product; one that is not known is looked for at the manager first.
    pub(crate) async fn product(&self, id: ProductId) -> Option<ProductInfo> {
        if let Some(product) = self.catalogue().products.get(&id) {
            return Some(product.clone());
        }
        self.look(PRODUCT_WAIT).await;
        self.catalogue().products.get(&id).cloned()
    }

    /// Looks for news in the catalogue, where the copy here is not of this moment. A manager that is away or slow costs
    /// the caller only a short wait: what is here is as good as it was.
    pub(crate) async fn freshen(&self) {
        if now_ms().saturating_sub(self.catalogue().fetched_at) >= FRESH_MS {
            self.look(FRESH_WAIT).await;
        }
    }

    /// Asks again at once, a short while at most, after the manager refused a sale as revoked: that may be this merchant or
    /// one product, and its answer to this tells which.
    pub(crate) async fn refused_as_revoked(&self) {
        self.look(FRESH_WAIT).await;
    }

    /// Products after the given one.
    pub(crate) fn page(&self, after: Option<ProductId>, limit: usize) -> Vec<ProductInfo> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.catalogue().products.range((from, Bound::Unbounded)).take(limit).map(|(_, p)| p.clone()).collect()
    }

    /// Waits until a fetch that begins from now on has ended; not longer than `limit`, after which it goes on for others.
    async fn look(&self, limit: Duration) {
        let (asked, mut ended) = (Instant::now(), self.shelf.ended.subscribe());
        self.shelf.wanted.send_modify(|wanted| *wanted = (*wanted).max(Some(asked)));
        let since = ended.wait_for(|began| began.is_some_and(|began| began >= asked));
        if tokio::time::timeout(limit, since).await.is_err() {
            tracing::debug!("catalogue not refreshed in time");
        }
    }

    /// Fetches the catalogue whenever somebody waits for it, until the node stops.
    pub(crate) async fn serve_looks(self: Arc<Self>, supervisor: Supervisor) -> Result<(), StoreError> {
        let (token, mut wanted) = (supervisor.token(), self.shelf.wanted.subscribe());
        loop {
            tokio::select! {
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                }
                () = token.cancelled() => return Ok(()),
            }
            let Some(asked) = *wanted.borrow_and_update() else { continue };
            let fetched = tokio::select! {
                fetched = Box::pin(self.fetch_catalogue(asked)) => fetched,
                () = token.cancelled() => return Ok(()),
            };
            match fetched {
                Ok(()) => {}
                Err(RefreshError::Store(error)) => return Err(error),
                Err(error) => tracing::debug!(%error, "catalogue not fetched"),
            }
        }
    }

    /// Fetches the catalogue, unless that was begun by somebody else since `asked`.
    pub(super) async fn fetch_catalogue(&self, asked: Instant) -> Result<(), RefreshError> {
        let mut last = self.shelf.last.lock().await;
        if let Some(fetch) = *last {
            if fetch.began >= asked {
                return Ok(());
            }
            tokio::time::sleep_until(fetch.next).await;
        }
        let began = Instant::now();
        *last = Some(Fetch { began, next: began + FETCH_PAUSE });
        let fetched = self.fetch_now().await;
        if fetched.is_ok() {
            let rest = began.elapsed().min(MOST_REST).max(FETCH_PAUSE.saturating_sub(began.elapsed()));
            *last = Some(Fetch { began, next: Instant::now() + rest });
        }
        self.shelf.ended.send_replace(Some(began));
        fetched
    }

    async fn fetch_now(&self) -> Result<(), RefreshError> {
        let products = self.pages().await?;
        if products != self.catalogue().products {
            let keep: Vec<_> = products.iter().map(|(id, info)| (*id, StoredProduct(info.clone()))).collect();
            self.db
                .write(move |txn| {
                    PRODUCTS.delete_range(txn, .., MAX_PRODUCTS)?;
                    keep.iter().try_for_each(|(id, product)| PRODUCTS.put(txn, id, product))
                })
                .await?;
            tracing::info!(products = products.len(), "catalogue changed");
        }
        set(&self.shelf.catalogue, Arc::new(Catalogue { products, fetched_at: now_ms() }));
        Ok(())
    }

    async fn pages(&self) -> Result<BTreeMap<ProductId, ProductInfo>, RefreshError> {
        let failed = |source| RefreshError::Ask { what: "the catalogue", source };
        let mut products = BTreeMap::new();
        let mut after = None;
        while products.len() < MAX_PRODUCTS {
            let answer = self.sales(SalesRequest::Products { after }).await;
            match &answer {
                Ok(_) => self.note_revoked(None).await?,
                Err(AskError::Refused(refusal)) if refusal.code == RefusalCode::Revoked => {
                    self.note_revoked(Some(refusal.detail.clone())).await?;
                }
                Err(_) => {}
            }
            let SalesResponse::Products(page) = answer.map_err(failed)? else {
                return Err(failed(AskError::unexpected()));
            };
            let full = page.len() >= SalesResponse::PRODUCTS_PAGE;
            let last = page.iter().map(|product| product.id).max();
            products.extend(page.into_iter().filter(|p| p.title.len() <= MAX_TITLE).map(|p| (p.id, p)));
            // A page that does not lead further would be asked for ever.
            if !full || last <= after {
                break;
            }
            after = last;
        }
        products.retain(|_, product| product.price.minor <= protocol::Amount::MAX_MINOR);
        Ok(products)
    }
}
