//! A network on paper: keys, products and tickets.

use std::path::Path;
use std::sync::Arc;

use delivery::{Content, ContentStore};
use protocol::certificate::SeederCert;
use protocol::cipher::{ContentSecret, FrameCipher, TAG_LEN};
use protocol::codec;
use protocol::manifest::{self, KeyPolicy, MIN_CHUNK_SIZE, Manifest, SEGMENT_CHUNKS, Segment};
use protocol::pack::{self, Entry, EntryKind, FileList};
use protocol::ticket::{Endorsement, KeyGrant, Lease, Payer, Ticket, TicketEnvelope, TransactionData};
use protocol::trust::{
    Heartbeat, JoinLine, KeyEntry, KeyPurpose, KeySet, KeyState, Moved, RevocationEpoch, Revocations,
};
use protocol::{ContentId, Currency, Digest, Keypair, NetworkId, PeerAddrs, PeerId, ProductId, Signed, TransactionId};
use rand::SeedableRng;

use crate::home::now_ms;

pub(super) const CHUNK: usize = MIN_CHUNK_SIZE as usize;
pub(super) const PAYLOAD: usize = CHUNK - TAG_LEN;
const HOUR: u64 = 3_600_000;

pub(super) fn keypair(n: u8) -> Keypair {
    Keypair::from_seed(&[n; 32])
}

/// The root key is key 100, all other keys of the network are key 101, the merchant is key 102.
pub(super) struct World {
    pub(super) root: Keypair,
    pub(super) key: Keypair,
    pub(super) merchant: Keypair,
    pub(super) network: NetworkId,
}

impl World {
    pub(super) fn new() -> World {
        let (root, key, merchant) = (keypair(100), keypair(101), keypair(102));
        let network = NetworkId::of_root(&root.peer_id());
        World { root, key, merchant, network }
    }

    pub(super) fn key_set(&self, version: u64, managers: &[PeerId]) -> Signed<KeySet> {
        let entry = |purpose| KeyEntry { purpose, key: self.key.peer_id(), state: KeyState::Active };
        let keys = KeySet {
            network: self.network,
            version,
            issued_at: now_ms(),
            keys: KeyPurpose::ALL.map(entry).to_vec(),
            managers: managers.to_vec(),
            gossip_shards: 1,
            next_root: None,
            handovers: Vec::new(),
        };
        Signed::sign(&keys, &self.root)
    }

    pub(super) fn heartbeat(&self, ahead: u64) -> Signed<Heartbeat> {
        let key_set = Digest::from_bytes([0; 32]);
        let heartbeat = Heartbeat {
            network: self.network,
            at: now_ms().wrapping_add(ahead),
            epoch: 0,
            key_set_version: 1,
            key_set,
            restore: 0,
            audit: None,
        };
        Signed::sign(&heartbeat, &self.key)
    }

    /// The first epoch of revocations: leases of this sale before that generation are void.
    pub(super) fn voided(&self, sale: &Sale, generation: u32) -> Signed<RevocationEpoch> {
        let moved = vec![Moved { transaction: sale.transaction, generation }];
        self.revoked(Revocations { moved, ..Revocations::default() })
    }

    /// A chain of revocation epochs, each of one content that nobody has.
    pub(super) fn epochs(&self, count: u64) -> Vec<Signed<RevocationEpoch>> {
        let mut chain: Vec<Signed<RevocationEpoch>> = Vec::new();
        for number in 1..=count {
            let content = ContentId::from_bytes((u128::from(number) << 64 | u128::from(u64::MAX / 3)).to_le_bytes());
            chain.push(self.next_epoch(&chain, Revocations { contents: vec![content], ..Revocations::default() }));
        }
        chain
    }

    /// The epoch that follows on a chain.
    pub(super) fn next_epoch(&self, chain: &[Signed<RevocationEpoch>], added: Revocations) -> Signed<RevocationEpoch> {
        let (number, previous) = (chain.len() as u64 + 1, chain.last().map(Signed::digest));
        Signed::sign(&RevocationEpoch { network: self.network, number, previous, at: now_ms(), added }, &self.key)
    }

    /// The first epoch of revocations.
    pub(super) fn revoked(&self, added: Revocations) -> Signed<RevocationEpoch> {
        self.next_epoch(&[], added)
    }

    pub(super) fn join(&self, managers: Vec<PeerAddrs>) -> JoinLine {
        JoinLine { root: self.root.peer_id(), managers, invitation: None }
    }

    pub(super) fn certificate(&self, seeder: PeerId) -> Signed<SeederCert> {
        let cert = SeederCert {
            network: self.network,
            seeder,
            name: "a seeder".to_owned(),
            capacity: 1 << 40,
            from: now_ms() - 1000,
            until: now_ms() + HOUR,
        };
        Signed::sign(&cert, &self.key)
    }

    /// Publishes a pack as it is, however wrong it may be.
    pub(super) fn publish_bytes(&self, pack: &[u8], policy: KeyPolicy) -> Product {
        let secret = ContentSecret::from_bytes([9; 32]);
        let content = ContentId::from_bytes([1; 16]);
        let count = pack.len().div_ceil(PAYLOAD).max(1) as u32;
        let cipher = FrameCipher::new(&secret, content, count).unwrap();
        let mut bytes = Vec::new();
        let mut values = Vec::new();
        for index in 0..count {
            let start = index as usize * PAYLOAD;
            let mut frame = pack[start..(start + PAYLOAD).min(pack.len())].to_vec();
            cipher.seal(index, &mut frame).unwrap();
            values.push(manifest::chunk_value(bytes.len() as u64, &frame, count == 1));
            bytes.extend_from_slice(&frame);
        }
        let segments = values.chunks(SEGMENT_CHUNKS as usize).map(|part| Segment { values: part.to_vec() });
        let segments: Vec<Segment> = segments.collect();
        let manifest = Manifest {
            network: self.network,
            content,
            root: manifest::content_root(&values, bytes.len() as u64, MIN_CHUNK_SIZE).unwrap(),
            length: bytes.len() as u64,
            chunk_size: MIN_CHUNK_SIZE,
            segments: segments.iter().map(Segment::digest).collect(),
            key_commitment: secret.commitment(),
            policy,
            published_at: now_ms(),
        };
        let signed = Signed::sign(&manifest, &self.key);
        Product { bytes, values, segments, digest: signed.digest(), signed, manifest, secret }
    }

    pub(super) fn publish(&self, files: &Files, policy: KeyPolicy) -> Product {
        self.publish_bytes(&files.pack(), policy)
    }

    pub(super) fn ticket(&self, product: &Product, client: PeerId, sale: &Sale) -> TicketEnvelope {
        let now = now_ms();
        let data = TransactionData {
            network: self.network,
            transaction: sale.transaction,
            product: sale.product,
            manifest: product.digest,
            client,
            merchant: self.merchant.peer_id(),
            remuneration: Digest::from_bytes([0; 32]),
            formed_at: sale.formed_at,
        };
        let signed_data = Signed::sign(&data, &self.key);
        let endorsement = Endorsement {
            transaction_data: signed_data.digest(),
            payment: Digest::from_bytes([0; 32]),
            authorised_at: now,
        };
        let endorsement = Signed::sign(&endorsement, &self.merchant);
        let lease = Lease {
            transaction_data: signed_data.digest(),
            endorsement: endorsement.digest(),
            client,
            generation: sale.generation,
            delivery: 1,
            issued_at: now,
            start: (now + sale.ahead).saturating_sub(sale.age),
            end: (now + sale.ahead).saturating_sub(sale.age) + sale.lifetime,
            allowance: 1 << 40,
            sources: sale.sources.iter().map(|source| source.peer).collect(),
            rate: 1,
            currency: Currency::USD,
            ceiling: 1 << 40,
            payer: Payer::Merchant,
            staleness: 0,
        };
        let mut rng = rand::rngs::StdRng::seed_from_u64(3);
        let grant = KeyGrant::seal(&product.secret, &data, &lease, &mut rng).unwrap();
        TicketEnvelope {
            ticket: Ticket {
                data: signed_data,
                endorsement: Some(endorsement),
                lease: Signed::sign(&lease, &self.key),
            },
            grant: (product.manifest.policy == KeyPolicy::AtRelease).then_some(grant),
            join: self.join(sale.managers.clone()),
            sources: sale.sources.clone(),
            title: "An album".to_owned(),
        }
    }

    /// The key as the manager gives it out against the completion.
    pub(super) fn grant(&self, product: &Product, envelope: &TicketEnvelope) -> KeyGrant {
        let (data, lease) = (envelope.ticket.data.peek().unwrap(), envelope.ticket.lease.peek().unwrap());
        let mut rng = rand::rngs::StdRng::seed_from_u64(4);
        KeyGrant::seal(&product.secret, &data, &lease, &mut rng).unwrap()
    }
}

/// What a ticket says besides the product.
#[derive(Clone)]
pub(super) struct Sale {
    pub(super) transaction: TransactionId,
    pub(super) product: ProductId,
    pub(super) sources: Vec<PeerAddrs>,
    pub(super) managers: Vec<PeerAddrs>,
    /// How long ago the lease began, and how long it lasts, milliseconds.
    pub(super) age: u64,
    pub(super) lifetime: u64,
    /// How far the manager's clock is ahead of this one, milliseconds.
    pub(super) ahead: u64,
    pub(super) generation: u32,
    /// When the manager formed it, unix milliseconds.
    pub(super) formed_at: u64,
}

impl Sale {
    pub(super) fn new(sources: Vec<PeerAddrs>, managers: Vec<PeerAddrs>) -> Sale {
        Sale {
            transaction: TransactionId::new(now_ms(), rand::random()),
            product: ProductId::new(now_ms(), [5; 10]),
            sources,
            managers,
            age: 0,
            lifetime: 7 * 24 * HOUR,
            ahead: 0,
            generation: 0,
            formed_at: now_ms(),
        }
    }
}

pub(super) struct Product {
    pub(super) bytes: Vec<u8>,
    pub(super) values: Vec<[u8; 32]>,
    pub(super) segments: Vec<Segment>,
    pub(super) signed: Signed<Manifest>,
    pub(super) manifest: Manifest,
    pub(super) digest: Digest,
    pub(super) secret: ContentSecret,
}

impl Product {
    pub(super) fn chunk(&self, index: u32) -> &[u8] {
        let start = index as usize * CHUNK;
        &self.bytes[start..(start + CHUNK).min(self.bytes.len())]
    }

    /// In a store below `root`, complete.
    pub(super) fn stored(&self, root: &Path) -> Arc<Content> {
        let store = ContentStore::open(root).unwrap();
        let mut writer = store.writer(self.bytes.len() as u64).unwrap();
        for chunk in self.bytes.chunks(CHUNK) {
            writer.append_chunk(chunk).unwrap();
        }
        writer.finish(self.values.clone(), &self.signed, &self.manifest).unwrap()
    }
}

/// Files to be published: paths and what is there.
pub(super) struct Files {
    pub(super) list: FileList,
    pub(super) contents: Vec<Vec<u8>>,
}

impl Files {
    pub(super) fn folder(name: &str) -> Files {
        Files { list: FileList { name: name.into(), single_file: false, entries: Vec::new() }, contents: Vec::new() }
    }

    pub(super) fn single(name: &str, contents: Vec<u8>) -> Files {
        let mut files = Files::folder(name).file(name, contents);
        files.list.single_file = true;
        files
    }

    pub(super) fn entry(mut self, path: &str, kind: EntryKind) -> Files {
        self.list.entries.push(Entry { path: path.into(), kind });
        self
    }

    pub(super) fn file(mut self, path: &str, contents: Vec<u8>) -> Files {
        let size = contents.len() as u64;
        self.contents.push(contents);
        self.entry(path, EntryKind::File { size, executable: false })
    }

    pub(super) fn program(mut self, path: &str, contents: Vec<u8>) -> Files {
        let size = contents.len() as u64;
        self.contents.push(contents);
        self.entry(path, EntryKind::File { size, executable: true })
    }

    pub(super) fn dir(self, path: &str) -> Files {
        self.entry(path, EntryKind::Folder)
    }

    pub(super) fn link(self, path: &str, target: &str) -> Files {
        self.entry(path, EntryKind::Link { target: target.into() })
    }

    /// Header, list, contents; nothing is checked.
    pub(super) fn pack(&self) -> Vec<u8> {
        let list = codec::encode(&self.list);
        let mut bytes = pack::header(list.len() as u64).to_vec();
        bytes.extend_from_slice(&list);
        bytes.extend(self.contents.iter().flatten());
        bytes
    }

    /// Is exactly this in `place`?
    pub(super) fn assert_in(&self, place: &Path) {
        let mut contents = self.contents.iter();
        for entry in &self.list.entries {
            let path = if self.list.single_file { place.to_owned() } else { place.join(&entry.path) };
            match &entry.kind {
                EntryKind::File { executable, .. } => {
                    use std::os::unix::fs::PermissionsExt;
                    assert!(std::fs::read(&path).unwrap() == *contents.next().unwrap(), "{path:?}");
                    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
                    assert_eq!(mode & 0o100 != 0, *executable, "{path:?}");
                }
                EntryKind::Folder => assert!(std::fs::symlink_metadata(&path).unwrap().is_dir(), "{path:?}"),
                EntryKind::Link { target } => {
                    assert_eq!(std::fs::read_link(&path).unwrap(), Path::new(target), "{path:?}");
                }
            }
        }
    }
}

/// Bytes that are different at every place.
pub(super) fn noise(length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

/// Everything below a folder, relative, sorted.
pub(super) fn listing(root: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            names.push(entry.path().strip_prefix(root).unwrap().display().to_string());
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            }
        }
    }
    names.sort();
    names
}
