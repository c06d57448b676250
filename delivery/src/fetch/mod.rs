//! Fetching one content from many seeders at once: the streams, disks and timers around the machines of
//! [`protocol::fetching`]. One task a seeder talks; one coordinator owns the scheduler and decides.

mod acks;
mod buffers;
mod connect;
mod coordinator;
mod end;
mod error;
mod incoming;
mod progress;
mod route;
mod session;
mod settle;
mod sources;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use futures::future::BoxFuture;
use protocol::deliver::Credential;
use protocol::fetching::SchedulerConfig;
use protocol::receipt::{Completion, DeliveryId};
use protocol::trust::{RevocationState, Trust};
use protocol::{ChunkSet, Digest, Keypair, PeerAddrs, PeerId, Refusal, Signed};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

pub use acks::{AckMemory, AckStore};
pub use connect::Connect;
pub use error::FetchError;
pub use progress::{Clock, Phase, Progress, SourceProgress, Stall, StallCause};
pub use route::is_missing as has_no_route;
pub use settle::{SettleJob, settle};

use crate::content_store::ContentStore;
use crate::pace::{Pace, Pacing, Rate};

/// Asked for more seeders when those known do not do: looks into the DHT, asks the manager, reads a configuration. It
/// is asked again from time to time, never twice at once, and dropped when it takes longer than
/// [`FetchLimits::discovery_timeout`].
pub type MoreSources = Arc<dyn Fn() -> BoxFuture<'static, Vec<PeerAddrs>> + Send + Sync>;

/// What is to be fetched, by what right, from where, and where to.
pub struct FetchJob {
    /// Opens streams: a [`node::NodeHandle`].
    pub connect: Arc<dyn Connect>,
    /// Where the content is put; a part of it may be there already.
    pub store: ContentStore,
    /// Digest of the signed manifest, as the ticket or order names it.
    pub manifest: Digest,
    /// Only these chunks (those that exist); all when `None`.
    pub only: Option<ChunkSet>,
    /// The right. A newer one for the same delivery counts from the next stream on; those that run go on.
    pub credential: watch::Receiver<Credential>,
    /// What it is counted under.
    pub delivery: DeliveryId,
    /// Signs acknowledgements; the credential must name its peer ID.
    pub keypair: Keypair,
    /// Seeders known at the start, the best first. Of one that is named twice the addresses come together.
    pub sources: Vec<PeerAddrs>,
    /// Seeders that sent something else than the content in an earlier run: never talked to, whoever names them.
    pub banned: Vec<PeerId>,
    /// Finds more.
    pub more_sources: Option<MoreSources>,
    /// The network's keys.
    pub trust: Arc<Trust>,
    /// What is revoked.
    pub revoked: Arc<RevocationState>,
    /// Remembers the newest acknowledgement to each seeder.
    pub acks: Arc<dyn AckStore>,
    /// Where it stands, at most ten times a second.
    pub progress: watch::Sender<Progress>,
    /// Counts [`FetchReport::adopted_bytes`], also of a fetch that fails.
    pub adopted: Arc<AtomicU64>,
    /// Bounds and patience.
    pub limits: FetchLimits,
    /// Ends the fetch; what was fetched stays.
    pub cancel: CancellationToken,
}

/// Bounds of a fetch, and how long it waits for what.
#[derive(Clone, Debug)]
pub struct FetchLimits {
    /// Seeders talked to at once; further ones wait for a place. Sixteen fill any line, and their buffers stay small.
    pub sessions: usize,
    /// While all of these are slow and others wait, there is a place for one more each time that this has passed, up to twice
    /// as many.
    pub places_every: Duration,
    /// Chunks between network and disk, bytes over all seeders; readers wait at this bound. Never less than 8 MiB, two
    /// of the largest chunks.
    pub buffer_bytes: u64,
    /// Most bytes a second over all seeders; `None` for no limit.
    pub bytes_per_second: Option<u64>,
    /// Further limits: those that are shared with other transfers, or changed while this one runs.
    pub pacing: Pacing,
    /// Without a new chunk for this long, the fetch fails and says why.
    pub patience: Duration,
    /// To open a stream.
    pub open_timeout: Duration,
    /// For each message of the greeting, and for a message of ours to be taken.
    pub message_timeout: Duration,
    /// A seeder whose bytes trickle has this long for a chunk.
    pub slowest_chunk: Duration,
    /// What is stored is made durable at this interval: at most so much is fetched again after a crash …
    pub sync_every: Duration,
    /// … or after so many bytes.
    pub sync_bytes: u64,
    /// How long to wait for the seeders' last word at the end.
    pub finish_timeout: Duration,
    /// First interval between two searches for more seeders; doubles up to 16 times.
    pub discovery_every: Duration,
    /// For one search.
    pub discovery_timeout: Duration,
    /// The scheduler's numbers.
    pub scheduler: SchedulerConfig,
}

impl Default for FetchLimits {
    fn default() -> Self {
        FetchLimits {
            sessions: 16,
            places_every: Duration::from_secs(30),
            buffer_bytes: 64 * 1024 * 1024,
            bytes_per_second: None,
            pacing: Pacing::default(),
            patience: Duration::from_secs(120),
            open_timeout: Duration::from_secs(10),
            message_timeout: Duration::from_secs(15),
            slowest_chunk: Duration::from_secs(600),
            sync_every: Duration::from_secs(3),
            sync_bytes: 512 * 1024 * 1024,
            // A seeder that was killed may be back by then.
            finish_timeout: Duration::from_secs(8),
            discovery_every: Duration::from_secs(5),
            discovery_timeout: Duration::from_secs(20),
            scheduler: SchedulerConfig::default(),
        }
    }
}

impl FetchLimits {
    /// All limits on the rate together.
    fn own_pacing(&self) -> Pacing {
        match self.bytes_per_second {
            // A rate of 0 would mean none.
            Some(rate) => self.pacing.clone().and(Arc::new(Pace::new(Rate::new(rate.max(1))))),
            None => self.pacing.clone(),
        }
    }

    /// So many places there are at first; later at most twice as many.
    fn first_places(&self) -> usize {
        self.sessions.clamp(1, Semaphore::MAX_PERMITS / 2)
    }

    /// A place for each seeder that is talked to at once.
    fn places(&self) -> Arc<Semaphore> {
        Arc::new(Semaphore::new(self.first_places()))
    }
}

/// What a fetch did. Of a fetch that failed, [`FetchError::NoSource`] tells as much.
#[derive(Clone, Debug)]
pub struct FetchReport {
    /// Bytes of new chunks.
    pub bytes: u64,
    /// New chunks.
    pub chunks: u32,
    /// Bytes of chunks that came twice.
    pub duplicate_bytes: u64,
    /// Bytes of chunks that were on disk and not noted, because an earlier run was killed.
    pub adopted_bytes: u64,
    /// How long it took until everything was durable.
    pub duration: Duration,
    /// Every seeder that was tried.
    pub sources: Vec<SourceReport>,
    /// The client's word that all of it is here; `None` when only some chunks were asked for.
    pub completion: Option<Signed<Completion>>,
    /// Seeders that served and did not confirm the last acknowledgement, which is what they are paid by; [`settle`] gives
    /// it to them later.
    pub owed: Vec<PeerAddrs>,
}

impl FetchReport {
    /// Seeders that sent something else than the content.
    pub fn banned(&self) -> impl Iterator<Item = &SourceReport> {
        self.sources.iter().filter(|source| source.banned)
    }
}

/// One seeder's part in a fetch.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct SourceReport {
    /// Who.
    pub peer: PeerId,
    /// Chunks from it that were new.
    pub chunks: u32,
    /// Bytes of verified chunks from it, duplicates included.
    pub bytes: u64,
    /// Its last refusal.
    pub last_refusal: Option<Refusal>,
    /// Why the last stream to it ended, for people; `None` when it did in order.
    pub last_reason: Option<String>,
    /// The same in a few words, without addresses.
    #[serde(skip)]
    pub last_brief: Option<String>,
    /// Its certificate is by a key that the keys given to the fetch do not have: there may be newer ones.
    #[serde(skip)]
    pub unknown_key: bool,
    /// It sent something else than the content.
    pub banned: bool,
    /// The chunk in whose place it sent something else, where it was one.
    pub bad_chunk: Option<u32>,
}

impl SourceReport {
    /// One that served so much, and of which nothing else is known.
    pub fn of(peer: PeerId, chunks: u32, bytes: u64) -> SourceReport {
        let (last_refusal, last_reason, last_brief, bad_chunk) = (None, None, None, None);
        let (unknown_key, banned) = (false, false);
        SourceReport { peer, chunks, bytes, last_refusal, last_reason, last_brief, unknown_key, banned, bad_chunk }
    }
}

/// Fetches. Returns when everything asked for is verified, written and durable, and the seeders have the final
/// acknowledgements as far as they could be reached.
///
/// # Errors
/// [`FetchError`]; what was fetched stays in the store in every case.
pub async fn fetch(job: FetchJob) -> Result<FetchReport, FetchError> {
    Ok(fetch_stored(job).await?.settle().await)
}

/// As [`fetch`], but returns as soon as everything is durable: what can be done with the content need not wait for
/// seeders that may be gone.
///
/// # Errors
/// [`FetchError`], as of [`fetch`].
pub async fn fetch_stored(job: FetchJob) -> Result<Stored, FetchError> {
    Box::pin(coordinator::Coordinator::new(job).run()).await
}

/// A fetch of which everything is here, and the seeders are still to be told so. Dropped before [`Stored::settle`], it
/// tells nobody: what [`Stored::report`] says to be owed can be given with [`settle`](settle()) all the same.
pub struct Stored {
    report: FetchReport,
    coordinator: Box<coordinator::Coordinator>,
}

impl Stored {
    /// What the fetch did. Every seeder that served is owed its last acknowledgement as yet.
    pub fn report(&self) -> &FetchReport {
        &self.report
    }

    /// Tells the seeders, within [`FetchLimits::finish_timeout`]. The report then says who could not be told.
    pub async fn settle(self) -> FetchReport {
        let Stored { report, mut coordinator } = self;
        Box::pin(coordinator.settle(report)).await
    }
}
