//! What is on sale. A product is written once, when its content is whole on disk, and afterwards only marked as withdrawn,
//! or given a new manifest of the same bytes where the key that signed its manifest was revoked. Purchases made before keep
//! pointing at what they were made of.

use std::ops::Bound;

use protocol::api::ProductInfo;
use protocol::cipher::ContentSecret;
use protocol::manifest::Manifest;
use protocol::trust::{KeyPurpose, RevocationState, Trust};
use protocol::{ContentId, Digest, ProductId, Refusal, RefusalCode, Signed};
use store::{Db, StoreError, Txn, WriteTransaction};

use crate::tables::{MANIFESTS, PRODUCT_OF_CONTENT, PRODUCT_OF_MANIFEST, PRODUCTS, ProductRecord, ProductRef};
use crate::{audit, placement};

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

    /// At most `limit` products that can be bought now, in order of id, after the given one.
    pub(crate) fn product_page(
        &self,
        after: Option<ProductId>,
        limit: usize,
        sellable: impl Fn(&ProductRecord, &Signed<Manifest>) -> bool,
    ) -> Result<Vec<ProductInfo>, StoreError> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.db.read(|txn| {
            let mut page = Vec::new();
            PRODUCTS.scan::<StoreError>(txn, (start, Bound::Unbounded), |id, record| {
                if page.len() >= limit {
                    return Ok(std::ops::ControlFlow::Break(()));
                }
                if !record.withdrawn && MANIFESTS.get(txn, &record.manifest)?.is_some_and(|m| sellable(&record, &m)) {
                    page.push(info(id, &record));
                }
                Ok(std::ops::ControlFlow::Continue(()))
            })?;
            Ok(page)
        })
    }

    /// Gives a product another manifest of the same bytes, unless it has another one than `before` by now. What was sold
    /// under the one before stays named by it. Blocks.
    pub(crate) fn replace_manifest_blocking(
        &self,
        id: ProductId,
        before: Digest,
        signed: Signed<Manifest>,
        published_at: u64,
    ) -> Result<bool, StoreError> {
        self.db.write_blocking(move |txn| {
            let Some(mut record) = PRODUCTS.get(txn, &id)?.filter(|record| record.manifest == before) else {
                return Ok(false);
            };
            let digest = signed.digest();
            record.manifest = digest;
            record.published_at = published_at;
            PRODUCTS.put(txn, &id, &record)?;
            MANIFESTS.put(txn, &digest, &signed)?;
            PRODUCT_OF_MANIFEST.put(txn, &digest, &ProductRef { id })?;
            // Nobody is to copy what nobody can be sent.
            placement::cancel(txn, &before)?;
            audit::note(txn, published_at, "republished", id, format!("manifest {digest} for {before}"))?;
            Ok(true)
        })
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

/// Why content with this manifest can be delivered to nobody, although it may be here: the key that signed it was revoked,
/// or is over. `None` where it can.
pub(crate) fn void(trust: &Trust, signed: &Signed<Manifest>, published_at: u64, now: u64) -> Option<Refusal> {
    let refusal = trust.still_good(&signed.signer(), KeyPurpose::Catalogue, published_at, now).err()?;
    let detail = format!("the product's manifest is void, nobody could fetch it: {}", refusal.detail);
    // An entry that was dead goes out of the key set in time; it is one case to those who sell.
    Some(Refusal::new(RefusalCode::KeyRetired, detail))
}

/// Whether it can be sold, and why not: the name in lists.
pub(crate) fn state(
    record: &ProductRecord,
    signed: Option<&Signed<Manifest>>,
    (trust, revoked): (&Trust, &RevocationState),
    now: u64,
) -> &'static str {
    match signed {
        _ if revoked.has_content(&record.content) => "taken-down",
        _ if record.withdrawn => "withdrawn",
        Some(signed) if void(trust, signed, record.published_at, now).is_some() => "void",
        _ => "on-sale",
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
