//! What every service and chore of a seeder shares, made once at the start.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use delivery::{ContentStore, Pace, Rate};
use node::{NodeHandle, Supervisor};
use protocol::{Address, Digest, Keypair, PeerId};
use store::Db;
use tokio::sync::Notify;

use crate::acquaintance::Acquaintances;
use crate::chunks::ChunkReader;
use crate::config::Config;
use crate::counts::Counts;
use crate::denied::{Denied, Unwanted};
use crate::drain::Drain;
use crate::garbage::{LettingGo, Moving};
use crate::manager::ManagerLink;
use crate::network::Network;
use crate::room::{Room, Usage};
use crate::scrub::Suspects;
use crate::serving::{Deliveries, Shares};

/// The shared state of a running seeder.
pub(crate) struct Seeder {
    pub(crate) peer: PeerId,
    pub(crate) keypair: Keypair,
    pub(crate) config: Config,
    pub(crate) db: Db,
    pub(crate) contents: ContentStore,
    pub(crate) node: NodeHandle,
    pub(crate) network: Network,
    pub(crate) manager: ManagerLink,
    pub(crate) chunks: Arc<ChunkReader>,
    /// Contents that a chunk was found damaged of.
    pub(crate) suspects: Arc<Suspects>,
    pub(crate) deliveries: Deliveries,
    pub(crate) counts: Counts,
    pub(crate) supervisor: Supervisor,
    pub(crate) wake: Wake,
    pub(crate) notes: Notes,
    pub(crate) upload: Upload,
    /// Chunks being read from disk at once, shared by clients.
    pub(crate) reads: Arc<Shares>,
    pub(crate) served: Served,
    pub(crate) drain: Drain,
    pub(crate) moving: Moving,
    pub(crate) unwanted: Unwanted,
    pub(crate) letting_go: LettingGo,
    /// Held while a report is made and told, and while it is asked what may go: neither overtakes the other, or the manager
    /// would have that as held which it just let go of.
    pub(crate) telling: tokio::sync::Mutex<()>,
    /// Held while a place for a copy is made: two could not take the same room.
    pub(crate) placing: Mutex<()>,
    pub(crate) denied: Denied,
    pub(crate) acquaintances: Acquaintances,
    addresses: RwLock<Vec<Address>>,
}

/// How fast chunks are sent; changed by command while the seeder runs.
pub(crate) struct Upload {
    /// All deliveries together …
    pub(crate) process: Arc<Pace>,
    /// … which clients share by turns.
    pub(crate) shares: Arc<Shares>,
    /// Each delivery.
    pub(crate) per_delivery: Rate,
    /// Deliveries that have a chunk to send.
    pub(crate) sending: Arc<AtomicU32>,
}

/// One of those, until it is dropped.
pub(crate) struct Sending(Arc<AtomicU32>);

impl Sending {
    pub(crate) fn begin(all: &Arc<AtomicU32>) -> Sending {
        all.fetch_add(1, Relaxed);
        Sending(Arc::clone(all))
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Upload {
    /// Bytes per second; 0 for no limit.
    pub(crate) fn new(process: u64, per_delivery: u64) -> Self {
        Upload {
            process: Arc::new(Pace::new(Rate::new(process))),
            // One line, which is busy with one piece at a time.
            shares: Shares::new(1),
            per_delivery: Rate::new(per_delivery),
            sending: Arc::default(),
        }
    }
}

/// Nudges for the chores: each does its round at once instead of at its next regular time.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    /// Contact with the manager.
    pub(crate) sync: Notify,
    /// The manager was silent for a while and lives again: whoever waits to try it once more need not.
    pub(crate) returned: Notify,
    /// Fetching of contents.
    pub(crate) replicate: Notify,
    /// Looking for what may be removed …
    pub(crate) collect: Notify,
    /// … also for an order that needs so many bytes.
    room: AtomicU64,
    /// Announcements in the DHT.
    pub(crate) announce: Notify,
    /// Sending of receipt batches.
    pub(crate) post: Notify,
    /// When orders that were known were last tried again because the manager said them again.
    again: Mutex<Option<Instant>>,
    /// When the manager was last asked for news because of a stranger.
    stranger: Mutex<Option<Instant>>,
}

/// Orders that the manager says again are tried again no sooner.
const AGAIN: Duration = Duration::from_secs(5);
/// What is signed by or sealed to a key that is not known here may be of a newer key set, or of anybody: the manager is asked
/// because of such things no more often than this.
const STRANGERS_EVERY: Duration = Duration::from_secs(10);

impl Wake {
    /// An order came that waits here already: each report brings it, and trying it may make for another report.
    pub(crate) fn replicate_again(&self) {
        let mut again = self.again.lock().unwrap_or_else(PoisonError::into_inner);
        if again.is_none_or(|at| at.elapsed() >= AGAIN) {
            *again = Some(Instant::now());
            self.replicate.notify_one();
        }
    }

    /// A key was met that is not known here.
    pub(crate) fn stranger(&self) {
        let mut asked = self.stranger.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.is_none_or(|at| at.elapsed() >= STRANGERS_EVERY) {
            *asked = Some(Instant::now());
            self.sync.notify_one();
        }
    }

    /// An order of so many bytes finds no room: what has copies enough may go for it. The largest of several comes first, the
    /// others ask again.
    pub(crate) fn make_room(&self, bytes: u64) {
        self.room.fetch_max(bytes, Relaxed);
        self.collect.notify_one();
    }

    pub(crate) fn take_room(&self) -> u64 {
        self.room.swap(0, Relaxed)
    }
}

/// When each content was last asked for since the start, for the choice of what goes first: an entry for each content held.
#[derive(Debug, Default)]
pub(crate) struct Served(Mutex<HashMap<Digest, u64>>);

impl Served {
    /// Unix milliseconds; 0 for not since the start: then its accounts tell.
    pub(crate) fn last(&self, content: &Digest) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(content).copied().unwrap_or(0)
    }

    pub(crate) fn note(&self, content: Digest, now: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(content, now);
    }

    pub(crate) fn forget(&self, content: &Digest) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(content);
    }
}

/// What `status` tells people beside the counts: the newest trouble of each kind, or none.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    /// Why the manager could not be reached or refused.
    pub(crate) manager: Note,
    /// Why content could not be fetched or stored.
    pub(crate) storage: Note,
    /// Why there is more content than there should be.
    pub(crate) quota: Note,
    /// Why receipts do not get through.
    pub(crate) receipts: Note,
    /// How far announcements in the DHT are behind.
    pub(crate) announcing: Note,
}

/// One line for people that comes and goes.
#[derive(Debug, Default)]
pub(crate) struct Note(Mutex<Option<String>>);

impl Note {
    pub(crate) fn set(&self, text: impl Into<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(text.into());
    }

    pub(crate) fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The parts of a [`Seeder`] that are made before it.
pub(crate) struct Parts {
    pub(crate) keypair: Keypair,
    pub(crate) config: Config,
    pub(crate) db: Db,
    pub(crate) contents: ContentStore,
    pub(crate) node: NodeHandle,
    pub(crate) network: Network,
    pub(crate) manager: ManagerLink,
    pub(crate) supervisor: Supervisor,
    pub(crate) denied: Denied,
}

impl Seeder {
    pub(crate) fn new(parts: Parts) -> Self {
        let counts = Counts::register(parts.node.metrics());
        let suspects = Arc::<Suspects>::default();
        let chunks = Arc::new(ChunkReader::new(counts.clone(), Arc::clone(&suspects)));
        let reads = Shares::new(parts.config.reads_at_once);
        let upload = Upload::new(parts.config.upload_limit, parts.config.upload_limit_per_delivery);
        let deliveries = Deliveries::new(&parts.config, &upload);
        Seeder {
            peer: parts.keypair.peer_id(),
            keypair: parts.keypair,
            config: parts.config,
            db: parts.db,
            contents: parts.contents,
            node: parts.node,
            network: parts.network,
            manager: parts.manager,
            chunks,
            suspects,
            deliveries,
            counts,
            supervisor: parts.supervisor,
            wake: Wake::default(),
            notes: Notes::default(),
            upload,
            reads,
            served: Served::default(),
            drain: Drain::default(),
            moving: Moving::default(),
            unwanted: Unwanted::default(),
            letting_go: LettingGo::default(),
            telling: tokio::sync::Mutex::default(),
            placing: Mutex::default(),
            denied: parts.denied,
            acquaintances: Acquaintances::default(),
            addresses: RwLock::default(),
        }
    }

    /// Where others reach this seeder.
    pub(crate) fn addresses(&self) -> Vec<Address> {
        self.addresses.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_addresses(&self, addresses: Vec<Address>) {
        *self.addresses.write().unwrap_or_else(PoisonError::into_inner) = addresses;
    }

    /// Bytes that may still be placed here: of the capacity, and of the disk.
    pub(crate) fn room(&self) -> Room {
        if self.drain.is_leaving() {
            return Room::default();
        }
        let usage = Usage::of(self);
        if usage.disk_bytes.is_none() {
            tracing::warn!(path = %self.contents.root().display(), "what the disk has left is not known: offering no room");
        }
        usage.room(&self.config)
    }
}
