//! One network on the loopback: a manager, seeders in temporary directories, content, and tickets for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use delivery::ContentStore;
use protocol::manifest::{KeyPolicy, MIN_CHUNK_SIZE, Manifest, SEGMENT_CHUNKS, Segment, chunk_value, content_root};
use protocol::replication::{Placement, ReplicationOrder};
use protocol::ticket::{Endorsement, Lease, Payer, Ticket, TransactionData};
use protocol::trust::{Invitation, InvitedRole, JoinLine, KeyPurpose};
use protocol::{
    Address, ContentId, Currency, Digest, Keypair, NetworkId, Nonce, PeerAddrs, PeerId, ProductId, Signed,
    TransactionId,
};
use seeder::{Config, Running};

use crate::manager::{Manager, Office};

/// Longest time that anything in these tests takes on a busy machine; reaching it is a failure.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
pub(crate) const DAY: u64 = 24 * 60 * 60 * 1000;
pub(crate) const CHUNK: usize = MIN_CHUNK_SIZE as usize;

pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

/// A content as it was published.
#[derive(Clone)]
pub(crate) struct Goods {
    pub(crate) bytes: Vec<u8>,
    pub(crate) manifest: Manifest,
    pub(crate) signed: Signed<Manifest>,
}

impl Goods {
    pub(crate) fn digest(&self) -> Digest {
        self.signed.digest()
    }

    pub(crate) fn chunk(&self, index: u32) -> &[u8] {
        let start = index as usize * CHUNK;
        &self.bytes[start..(start + CHUNK).min(self.bytes.len())]
    }

    fn values(&self) -> Vec<[u8; 32]> {
        let only = self.bytes.len() <= CHUNK;
        let chunks = self.bytes.chunks(CHUNK).enumerate();
        chunks.map(|(i, chunk)| chunk_value((i * CHUNK) as u64, chunk, only)).collect()
    }

    pub(crate) fn store(&self, store: &ContentStore) {
        let mut writer = store.writer(self.bytes.len() as u64).unwrap();
        self.bytes.chunks(CHUNK).for_each(|chunk| writer.append_chunk(chunk).unwrap());
        writer.finish(self.values(), &self.signed, &self.manifest).unwrap();
    }
}

pub(crate) struct World {
    pub(crate) office: Arc<Office>,
    pub(crate) manager: Manager,
    pub(crate) merchant: Keypair,
    dir: tempfile::TempDir,
}

/// What a ticket says; tests change what they try out.
pub(crate) struct Terms {
    pub(crate) network: NetworkId,
    pub(crate) manifest: Digest,
    pub(crate) client: PeerId,
    pub(crate) transaction: TransactionId,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) allowance: u64,
    pub(crate) sources: Vec<PeerId>,
    pub(crate) staleness: u64,
    pub(crate) endorsed_by: Keypair,
    pub(crate) signed_by: Keypair,
}

impl World {
    pub(crate) async fn new(gossip: bool) -> Self {
        let office = Office::new();
        let manager = Manager::start(&office, None, gossip).await;
        World { office, manager, merchant: Keypair::from_seed(&[150; 32]), dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn join(&self) -> JoinLine {
        let invitation = Some(Invitation { role: InvitedRole::Seeder, token: Nonce::from_bytes([1; 16]) });
        JoinLine { root: self.office.root.peer_id(), managers: vec![self.manager.at.clone()], invitation }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Signs a content of `chunks` chunks and a bit.
    pub(crate) fn publish(&self, seed: u8, chunks: usize) -> Goods {
        let mut bytes = vec![0; chunks * CHUNK - 7];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
        let mut goods =
            Goods { manifest: self.manifest(seed, &bytes), signed: self.sign(&self.manifest(seed, &bytes)), bytes };
        let values = goods.values();
        goods.manifest.root = content_root(&values, goods.bytes.len() as u64, MIN_CHUNK_SIZE).unwrap();
        let segments = values.chunks(SEGMENT_CHUNKS as usize);
        goods.manifest.segments = segments.map(|part| Segment { values: part.to_vec() }.digest()).collect();
        goods.signed = self.sign(&goods.manifest);
        self.office.says.lock().unwrap().manifests.insert(goods.digest(), goods.signed.clone());
        goods
    }

    fn sign(&self, manifest: &Manifest) -> Signed<Manifest> {
        Signed::sign(manifest, self.office.key(KeyPurpose::Catalogue))
    }

    fn manifest(&self, seed: u8, bytes: &[u8]) -> Manifest {
        Manifest {
            network: self.office.network,
            content: ContentId::from_bytes([seed; 16]),
            root: Digest::from_bytes([0; 32]),
            length: bytes.len() as u64,
            chunk_size: MIN_CHUNK_SIZE,
            segments: Vec::new(),
            key_commitment: Digest::from_bytes([0; 32]),
            policy: KeyPolicy::AtRelease,
            published_at: now(),
        }
    }

    /// Sets up a seeder that holds `goods`, with everything that waits made short.
    pub(crate) fn set_up(&self, name: &str, goods: &[&Goods], edit: impl FnOnce(&mut Config)) -> Config {
        let mut config = Config::new(&self.join(), name, 1 << 30);
        config.listen = vec![Address::new("/ip4/127.0.0.1/tcp/0").unwrap()];
        config.min_free = 0;
        config.report_ms = 200;
        config.receipt_batch_ms = 20;
        config.receipt_interval_ms = 50;
        config.receipt_direct_ms = 100;
        config.retry_ms = 50;
        config.call_ms = 5_000;
        config.replication_patience_ms = 5_000;
        edit(&mut config);
        let dir = self.path(name);
        seeder::init_with(&dir, &config).unwrap();
        let store = ContentStore::open(config.content_path(&dir)).unwrap();
        goods.iter().for_each(|goods| goods.store(&store));
        config
    }

    /// A running, enrolled seeder that holds `goods`.
    pub(crate) async fn seeder(&self, name: &str, goods: &[&Goods], edit: impl FnOnce(&mut Config)) -> Running {
        self.set_up(name, goods, edit);
        let running = self.start(name).await;
        let peer = running.peer_id();
        let held = goods.len();
        self.office
            .until("a report", |heard| heard.reports.get(&peer).filter(|report| report.held.len() >= held).map(|_| ()))
            .await;
        running
    }

    /// Starts the seeder that was set up under this name.
    pub(crate) async fn start(&self, name: &str) -> Running {
        let dir = self.path(name);
        eventually("the start", || async {
            match seeder::start(&dir, Config::load(&dir).unwrap()).await {
                Ok(running) => Some(running),
                // Of one that was killed, the last task may still be going.
                Err(error) if error.to_string().contains("in use") => None,
                Err(error) => panic!("{error}"),
            }
        })
        .await
    }

    pub(crate) fn terms(&self, goods: &Goods, client: PeerId, seeder: PeerId) -> Terms {
        Terms {
            network: self.office.network,
            manifest: goods.digest(),
            client,
            transaction: TransactionId::new(now(), rand::random()),
            start: now() - 1000,
            end: now() + 7 * DAY,
            allowance: u64::MAX / 2,
            sources: vec![seeder],
            staleness: 0,
            endorsed_by: self.merchant.clone(),
            signed_by: self.office.key(KeyPurpose::Ticket).clone(),
        }
    }

    pub(crate) fn ticket(&self, goods: &Goods, client: PeerId, seeder: PeerId) -> Ticket {
        self.make(self.terms(goods, client, seeder))
    }

    pub(crate) fn make(&self, terms: Terms) -> Ticket {
        let data = TransactionData {
            network: terms.network,
            transaction: terms.transaction,
            product: ProductId::new(1, [0; 10]),
            manifest: terms.manifest,
            client: terms.client,
            merchant: self.merchant.peer_id(),
            remuneration: Digest::from_bytes([0; 32]),
            formed_at: terms.start,
        };
        let data = Signed::sign(&data, &terms.signed_by);
        let endorsement = Endorsement {
            transaction_data: data.digest(),
            payment: Digest::from_bytes([0; 32]),
            authorised_at: terms.start,
        };
        let endorsement = Signed::sign(&endorsement, &terms.endorsed_by);
        let lease = Lease {
            transaction_data: data.digest(),
            endorsement: endorsement.digest(),
            client: terms.client,
            generation: 0,
            delivery: 1,
            issued_at: terms.start,
            start: terms.start,
            end: terms.end,
            allowance: terms.allowance,
            sources: terms.sources,
            rate: 1000,
            currency: Currency::USD,
            ceiling: 1_000_000,
            payer: Payer::Merchant,
            staleness: terms.staleness,
        };
        Ticket { lease: Signed::sign(&lease, &terms.signed_by), data, endorsement: Some(endorsement) }
    }

    pub(crate) fn placement(&self, goods: &Goods, seeder: PeerId, sources: &[PeerAddrs]) -> Placement {
        let order = ReplicationOrder {
            network: self.office.network,
            order: TransactionId::new(now(), rand::random()),
            manifest: goods.digest(),
            seeder,
            issued_at: now(),
            until: now() + DAY,
            allowance: u64::MAX / 2,
            rate: 1,
            currency: Currency::USD,
            ceiling: 1_000_000,
        };
        let order = Signed::sign(&order, self.office.key(KeyPurpose::Ticket));
        Placement { order, sources: sources.to_vec() }
    }
}

/// Tries until it works: for states that another task reaches on its own.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut attempt: impl FnMut() -> F) -> T {
    let begin = std::time::Instant::now();
    loop {
        if let Some(value) = attempt().await {
            return value;
        }
        assert!(begin.elapsed() < LIMIT, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Stops a seeder; a task that hangs fails the test.
pub(crate) async fn stop(running: Running) {
    let supervisor = running.supervisor().clone();
    running.stop(Duration::from_secs(20)).await.unwrap();
    assert_eq!(supervisor.failure(), None);
}

/// Ends a seeder without letting it say or store anything more, as far as a process can do that to itself.
pub(crate) async fn kill(running: Running) {
    let _ = running.stop(Duration::ZERO).await;
}
