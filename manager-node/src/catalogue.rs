//! What is on sale. A product is written once, when its content is whole on disk, and only ever marked as withdrawn
//! afterwards: purchases made before keep pointing at it.

use std::ops::Bound;

use protocol::api::ProductInfo;
use protocol::cipher::ContentSecret;
use protocol::manifest::Manifest;
use protocol::{ContentId, Digest, ProductId, Signed};
use store::{Db, StoreError, Txn, WriteTransaction};

use crate::tables::{MANIFESTS, PRODUCT_OF_CONTENT, PRODUCT_OF_MANIFEST, PRODUCTS, ProductRecord, ProductRef};

/// A product with everything that selling and delivering it takes.
#[derive(Clone, Debug)]
pub(crate) struct Product {
    /// As merchants see it.
    pub(crate) info: ProductInfo,
    /// What its bytes are.
    pub(crate) manifest: Signed<Manifest>,
    /// What they are encrypted with.
    pub(crate) secret: ContentSecret,
    /// Rights holders and their part of the price, millionths.
    pub(crate) shares: Vec<(String, u32)>,
    /// How long a lease is good, milliseconds.
    pub(crate) lease_ms: u64,
    /// What seeders earn: millionths of the minor unit of the price's currency per MiB.
    pub(crate) rate: u64,
    /// As [`protocol::ticket::Lease::staleness`], milliseconds.
    pub(crate) staleness_ms: u64,
    /// No longer on sale.
    pub(crate) withdrawn: bool,
}

/// Front of the product tables.
#[derive(Clone)]
pub(crate) struct Catalogue {
    db: Db,
}

impl Catalogue {
    pub(crate) fn new(db: Db) -> Self {
        Catalogue { db }
    }

    /// A product that is on sale; `None` when there is none, or none any more.
    pub(crate) fn product(&self, id: &ProductId) -> Result<Option<Product>, StoreError> {
        Ok(self.any_product(id)?.filter(|product| !product.withdrawn))
    }

    /// A product, on sale or not.
    pub(crate) fn any_product(&self, id: &ProductId) -> Result<Option<Product>, StoreError> {
        self.db.read(|txn| load(txn, id))
    }

    /// The product, on sale or not, whose signed manifest has this digest.
    pub(crate) fn product_by_manifest(&self, digest: &Digest) -> Result<Option<Product>, StoreError> {
        self.db.read(|txn| match PRODUCT_OF_MANIFEST.get(txn, digest)? {
            Some(ProductRef { id }) => load(txn, &id),
            None => Ok(None),
        })
    }

    /// The signed manifest of this digest.
    pub(crate) fn manifest(&self, digest: &Digest) -> Result<Option<Signed<Manifest>>, StoreError> {
        self.db.read(|txn| MANIFESTS.get(txn, digest))
    }

    /// The product, on sale or not, of this content.
    pub(crate) fn product_by_content(&self, content: &ContentId) -> Result<Option<ProductId>, StoreError> {
        self.db.read(|txn| Ok(PRODUCT_OF_CONTENT.get(txn, content)?.map(|found| found.id)))
    }

    /// At most `limit` products on sale, in order of id, after the given one.
    pub(crate) fn product_page(&self, after: Option<ProductId>, limit: usize) -> Result<Vec<ProductInfo>, StoreError> {
        let records = self.record_page(after, limit, |record| !record.withdrawn)?;
        Ok(records.iter().map(|(id, record)| info(*id, record)).collect())
    }

    /// At most `limit` stored products that `wanted` takes, in order of id, after the given one.
    pub(crate) fn record_page(
        &self,
        after: Option<ProductId>,
        limit: usize,
        wanted: impl Fn(&ProductRecord) -> bool,
    ) -> Result<Vec<(ProductId, ProductRecord)>, StoreError> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.db.read(|txn| {
            let mut page = Vec::new();
            PRODUCTS.scan::<StoreError>(txn, (start, Bound::Unbounded), |id, record| {
                if page.len() >= limit {
                    return Ok(std::ops::ControlFlow::Break(()));
                }
                if wanted(&record) {
                    page.push((id, record));
                }
                Ok(std::ops::ControlFlow::Continue(()))
            })?;
            Ok(page)
        })
    }

    /// Number of products, withdrawn ones included.
    pub(crate) fn count(&self) -> Result<u64, StoreError> {
        self.db.read(|txn| PRODUCTS.len(txn))
    }

    /// Puts a product on sale. Its content must be whole on disk before. Blocks.
    pub(crate) fn add_blocking(
        &self,
        id: ProductId,
        record: ProductRecord,
        manifest: Signed<Manifest>,
    ) -> Result<(), StoreError> {
        self.db.write_blocking(move |txn| {
            PRODUCTS.put(txn, &id, &record)?;
            MANIFESTS.put(txn, &record.manifest, &manifest)?;
            PRODUCT_OF_MANIFEST.put(txn, &record.manifest, &ProductRef { id })?;
            PRODUCT_OF_CONTENT.put(txn, &record.content, &ProductRef { id })
        })
    }
}

/// Marks a product as withdrawn, within the caller's transaction.
pub(crate) fn withdraw(txn: &WriteTransaction<'_>, id: &ProductId) -> Result<(), StoreError> {
    if let Some(mut record) = PRODUCTS.get(txn, id)? {
        record.withdrawn = true;
        PRODUCTS.put(txn, id, &record)?;
    }
    Ok(())
}

fn load(txn: &impl Txn, id: &ProductId) -> Result<Option<Product>, StoreError> {
    let Some(record) = PRODUCTS.get(txn, id)? else { return Ok(None) };
    let manifest = MANIFESTS.get(txn, &record.manifest)?.ok_or_else(|| StoreError::Corrupt {
        table: MANIFESTS.name(),
        reason: format!("the manifest of product {id} is missing"),
    })?;
    Ok(Some(Product {
        info: info(*id, &record),
        manifest,
        secret: ContentSecret::from_bytes(record.secret),
        shares: record.shares,
        lease_ms: record.lease_ms,
        rate: record.rate,
        staleness_ms: record.staleness_ms,
        withdrawn: record.withdrawn,
    }))
}

pub(crate) fn info(id: ProductId, record: &ProductRecord) -> ProductInfo {
    ProductInfo {
        id,
        title: record.title.clone(),
        price: record.price,
        manifest: record.manifest,
        policy: record.policy,
        plain_bytes: record.plain_bytes,
        content_bytes: record.content_bytes,
        files: record.files,
    }
}
