//! Puts files on sale. Nothing of a publication is visible before its ciphertext is whole on the origin's disk, and one
//! that is stopped, by whatever, leaves nothing behind; each draws a secret of its own.

pub(crate) mod again;
pub(crate) mod pack;
pub(crate) mod scan;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use delivery::{ContentStore, CreateError, FinishError};
use protocol::cipher::ContentSecret;
use protocol::manifest::{self, KeyPolicy, Manifest};
use protocol::trust::KeyPurpose;
use protocol::{Amount, ContentId, Currency, Digest, ProductId};
use rand::RngExt;
use serde::{Deserialize, Serialize};
use store::StoreError;
use tokio::sync::watch;

use crate::context::{Context, now_ms};
use crate::enrol::MAX_NAME;
use crate::pricing;
use crate::tables::ProductRecord;
use pack::{Layout, PackingError};
use scan::ScanError;

/// Longest title, bytes.
const MAX_TITLE: usize = 200;
/// Most rights holders of one product: a label, a publisher, a band with all its members.
const MAX_SHARES: usize = 32;

/// What to publish and on which terms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct PublishRequest {
    /// A file or folder.
    pub path: PathBuf,
    /// For people, at most 200 bytes.
    pub title: String,
    /// Lowest price, in the currency's major unit: `9.99`.
    pub price: String,
    /// Currency of the price. Default: the configured one.
    #[serde(default)]
    pub currency: Option<Currency>,
    /// Rights holders and their part of the price, each `NAME=PERCENT`.
    #[serde(default)]
    pub shares: Vec<String>,
    /// When key and money move. Default: at release.
    #[serde(default)]
    pub policy: Option<KeyPolicy>,
    /// Bytes of a chunk: a power of two from 65536 to 4194304. Default: 1048576.
    #[serde(default)]
    pub chunk_size: Option<u32>,
    /// How long a lease is good, milliseconds. Default: the configured time.
    #[serde(default)]
    pub lease_ms: Option<u64>,
    /// What seeders earn: millionths of the minor unit per MiB. Default: the configured rate.
    #[serde(default)]
    pub rate: Option<u64>,
    /// Seeders that have not heard from the manager for longer refuse, milliseconds. Default: 0, they never do.
    #[serde(default)]
    pub staleness_ms: u64,
}

impl PublishRequest {
    /// A publication on default terms.
    pub fn new(path: impl Into<PathBuf>, title: impl Into<String>, price: impl Into<String>) -> Self {
        PublishRequest {
            path: path.into(),
            title: title.into(),
            price: price.into(),
            currency: None,
            shares: Vec::new(),
            policy: None,
            chunk_size: None,
            lease_ms: None,
            rate: None,
            staleness_ms: 0,
        }
    }
}

/// How far a publication is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub struct PublishProgress {
    /// Bytes of ciphertext stored.
    pub done: u64,
    /// Bytes there will be; 0 while the files are still being listed.
    pub total: u64,
}

/// Whether the origin serves it yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OriginState {
    /// It has reported that it holds it.
    Held,
    /// It has not within the time limit; it will when it runs.
    Waiting,
    /// No origin was set up.
    None,
}

/// A product that is on sale.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Published {
    /// The product.
    pub product: ProductId,
    /// As given.
    pub title: String,
    /// Lowest price.
    pub price: Amount,
    /// Digest of the signed manifest.
    pub manifest: Digest,
    /// The publication.
    pub content: ContentId,
    /// BLAKE3 of the ciphertext.
    pub root: Digest,
    /// Number of files.
    pub files: u32,
    /// Bytes of all files.
    pub plain_bytes: u64,
    /// Bytes of ciphertext.
    pub content_bytes: u64,
    /// Number of chunks.
    pub chunks: u32,
    /// Whether the origin serves it yet.
    pub origin: OriginState,
}

/// Why nothing was published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Terms that make no sense.
    #[error("{0}")]
    Terms(String),
    /// The files cannot be published as they lie there.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// More than a content can be.
    #[error(
        "{bytes} bytes are more than 2^20 chunks of {chunk_size} bytes; choose a larger chunk size (at most 4194304) or \
         publish in parts"
    )]
    TooLarge {
        /// Bytes to be published.
        bytes: u64,
        /// Chunk size chosen.
        chunk_size: u32,
    },
    /// Reading, encrypting or storing.
    #[error(transparent)]
    Packing(#[from] PackingError),
    /// No place for the content.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The content could not be completed.
    #[error(transparent)]
    Finish(#[from] FinishError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nothing to be published again.
    #[error("there is no product {0}")]
    NoProduct(ProductId),
    /// Withdrawn or taken down.
    #[error("product {0} is not on sale any more: it is not published again")]
    OffSale(ProductId),
    /// The origin lost it.
    #[error(
        "the origin has no whole copy of product {product} any more (content {manifest}): take it down, and publish it \
         from its files as a new product"
    )]
    NoContent {
        /// Which.
        product: ProductId,
        /// The name of its content.
        manifest: Digest,
    },
    /// The key that manifests are signed with is not here.
    #[error("{0}")]
    KeyLost(String),
    /// The publishing thread.
    #[error("the publishing thread failed: {0}")]
    Thread(String),
}

/// Nobody would take what the key before the lost one signed.
fn may_sign(ctx: &Context) -> Result<(), PublishError> {
    ctx.may_sign(KeyPurpose::Catalogue).map_err(|refusal| PublishError::KeyLost(refusal.detail))
}

impl PublishError {
    /// Short name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            PublishError::Terms(_) => "bad-terms",
            PublishError::Scan(_) | PublishError::Packing(PackingError::Read { .. }) => "cannot-publish",
            PublishError::Packing(PackingError::Changed { .. }) => "file-changed",
            PublishError::Packing(PackingError::Stopped) => "stopped",
            PublishError::TooLarge { .. } => "too-large",
            PublishError::KeyLost(_) => "key-retired",
            PublishError::NoProduct(_) => "not-found",
            PublishError::OffSale(_) => "wrong-state",
            PublishError::NoContent { .. } => "content-not-held",
            PublishError::Create(CreateError::NoSpace(_)) => "disk-full",
            _ => "internal",
        }
    }
}

/// Terms that have been checked as far as they can be without the files.
struct Terms {
    title: String,
    price: Amount,
    shares: Vec<(String, u32)>,
    policy: KeyPolicy,
    chunk_size: u32,
    lease_ms: u64,
    rate: u64,
    staleness_ms: u64,
}

/// Sets a flag when it is dropped: the publishing thread ends with the future that waits for it.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Publishes. Dropping the future stops it, until the product is registered.
pub(crate) async fn publish(
    ctx: &Arc<Context>,
    request: PublishRequest,
    progress: watch::Sender<PublishProgress>,
) -> Result<Published, PublishError> {
    let terms = check_terms(ctx, &request)?;
    // One at a time: a second one would only share the disk with the first.
    let _turn = ctx.publishing.lock().await;
    let stop = Arc::new(AtomicBool::new(false));
    let _stop = StopOnDrop(Arc::clone(&stop));
    let working = Arc::clone(ctx);
    let mut published =
        tokio::task::spawn_blocking(move || publish_blocking(&working, &request.path, terms, &stop, &progress))
            .await
            .map_err(|e| PublishError::Thread(e.to_string()))??;
    tracing::info!(
        product = %published.product, manifest = %published.manifest, bytes = published.content_bytes, "published"
    );
    ctx.placements.wake();
    published.origin = wait_for_origin(ctx, &published.manifest).await?;
    Ok(published)
}

fn check_terms(ctx: &Context, request: &PublishRequest) -> Result<Terms, PublishError> {
    let bad = |text: String| Err(PublishError::Terms(text));
    let title = request.title.trim().to_owned();
    if title.is_empty() || title.len() > MAX_TITLE || title.chars().any(char::is_control) {
        return bad("a title has 1 to 200 bytes and no control characters".to_owned());
    }
    let config = &ctx.config;
    let currency = request.currency.unwrap_or(config.currency);
    let price = Amount::parse(&request.price, currency).map_err(|e| PublishError::Terms(e.to_string()))?;
    let rate = match request.rate {
        Some(rate) => rate,
        None if price.minor == 0 => 0,
        None if currency != config.currency => {
            return bad(format!(
                "the configured rate is in {}; give the rate for {currency}, in millionths of its minor unit per MiB",
                config.currency
            ));
        }
        None => config.rate,
    };
    let chunk_size = request.chunk_size.unwrap_or(manifest::DEFAULT_CHUNK_SIZE);
    if !manifest::is_chunk_size(chunk_size) {
        return bad(format!("{chunk_size} is no chunk size; choose a power of two from 65536 to 4194304"));
    }
    let lease_ms = request.lease_ms.unwrap_or(config.lease_ms);
    if lease_ms == 0 {
        return bad("a lease of 0 milliseconds would never be good".to_owned());
    }
    Ok(Terms {
        title,
        price,
        shares: parse_shares(&request.shares).map_err(PublishError::Terms)?,
        policy: request.policy.unwrap_or(KeyPolicy::AtRelease),
        chunk_size,
        lease_ms,
        rate,
        staleness_ms: request.staleness_ms,
    })
}

fn parse_shares(texts: &[String]) -> Result<Vec<(String, u32)>, String> {
    if texts.len() > MAX_SHARES {
        return Err(format!("{} shares, at most {MAX_SHARES} are possible", texts.len()));
    }
    let mut shares: Vec<(String, u32)> = Vec::with_capacity(texts.len());
    for text in texts {
        let shown: String = text.chars().take(80).flat_map(char::escape_default).collect();
        let (name, percent) =
            text.rsplit_once('=').ok_or_else(|| format!("share '{shown}' is not NAME=PERCENT, such as Band=70"))?;
        let name = name.trim();
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(format!("share '{shown}': a name has 1 to {MAX_NAME} bytes and no control characters"));
        }
        let part = pricing::parse_percent(percent.trim().trim_end_matches('%'))
            .ok_or_else(|| format!("share '{shown}': a percentage has 0 to 100 with at most four decimals"))?;
        if shares.iter().any(|(other, _)| other == name) {
            return Err(format!("'{name}' has two shares; give one"));
        }
        shares.push((name.to_owned(), part));
    }
    Ok(shares)
}

fn publish_blocking(
    ctx: &Context,
    path: &Path,
    terms: Terms,
    stop: &AtomicBool,
    progress: &watch::Sender<PublishProgress>,
) -> Result<Published, PublishError> {
    let scan = scan::scan(path, &ctx.dir)?;
    let layout = Layout::new(scan.plain_len(), terms.chunk_size)
        .ok_or(PublishError::TooLarge { bytes: scan.plain_len(), chunk_size: terms.chunk_size })?;
    let ceiling = pricing::ceiling_micros(terms.rate, layout.cipher, ctx.config.ceiling_slack_millionths);
    pricing::check_split(terms.price, &terms.shares, ctx.config.fee_millionths, ceiling)
        .map_err(PublishError::Terms)?;

    let secret = ContentSecret::generate(&mut rand::rng());
    let content = ContentId::from_bytes(rand::rng().random());
    let mut writer = ContentStore::writer(&ctx.content, layout.cipher)?;
    progress.send_replace(PublishProgress { done: 0, total: layout.cipher });
    let packed = pack::pack(
        &scan,
        layout,
        (&secret, content),
        stop,
        |_, chunk| writer.append_chunk(chunk).map_err(|e| e.to_string()),
        |done| {
            progress.send_replace(PublishProgress { done, total: layout.cipher });
        },
    )?;
    let now = now_ms();
    let manifest = Manifest {
        network: ctx.network(),
        content,
        root: packed.root,
        length: layout.cipher,
        chunk_size: terms.chunk_size,
        segments: packed.segments,
        key_commitment: secret.commitment(),
        policy: terms.policy,
        published_at: now,
    };
    may_sign(ctx)?;
    let signed = ctx.keys.sign(KeyPurpose::Catalogue, &manifest);
    // Durable and whole before anybody can buy it.
    writer.finish(packed.values, &signed, &manifest)?;

    let id = ProductId::new(now, rand::rng().random());
    let digest = signed.digest();
    let files = u32::try_from(scan.list.file_count()).unwrap_or(u32::MAX);
    let record = ProductRecord {
        title: terms.title.clone(),
        price: terms.price,
        manifest: digest,
        content,
        policy: terms.policy,
        plain_bytes: scan.file_bytes,
        content_bytes: layout.cipher,
        files,
        secret: *secret.as_bytes(),
        shares: terms.shares,
        lease_ms: terms.lease_ms,
        rate: terms.rate,
        staleness_ms: terms.staleness_ms,
        published_at: now,
        withdrawn: false,
    };
    if let Err(error) = ctx.catalogue.add_blocking(id, record, signed) {
        // Without its product the content is worth nothing, its secret is lost.
        if let Err(removing) = ctx.content.remove(&digest) {
            tracing::warn!(%digest, error = %removing, "content of a failed publication left");
        }
        return Err(error.into());
    }
    Ok(Published {
        product: id,
        title: terms.title,
        price: terms.price,
        manifest: digest,
        content,
        root: manifest.root,
        files,
        plain_bytes: scan.file_bytes,
        content_bytes: layout.cipher,
        chunks: layout.frames,
        origin: OriginState::None,
    })
}

async fn wait_for_origin(ctx: &Context, manifest: &Digest) -> Result<OriginState, StoreError> {
    let mut arrivals = ctx.registry.arrivals();
    let Some(origin) = ctx.registry.origin() else { return Ok(OriginState::None) };
    let held = async {
        loop {
            arrivals.borrow_and_update();
            if ctx.registry.holds(&origin, manifest)? {
                return Ok(OriginState::Held);
            }
            if arrivals.changed().await.is_err() {
                return Ok(OriginState::Waiting);
            }
        }
    };
    match tokio::time::timeout(Duration::from_millis(ctx.config.origin_wait_ms), held).await {
        Ok(state) => state,
        Err(_) => {
            tracing::warn!(%manifest, "the origin has not reported the new content yet");
            Ok(OriginState::Waiting)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn shares_are_names_and_percentages() {
        let parse = |texts: &[&str]| parse_shares(&texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>());
        assert_eq!(
            parse(&["Band=70", "A=B = 12.5%"]).unwrap(),
            [("Band".to_owned(), 700_000), ("A=B".to_owned(), 125_000)]
        );
        for bad in [&["Band"][..], &["=5"], &["Band=x"], &["Band=101"], &["Band=1", "Band=2"], &["a\nb=1"]] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
