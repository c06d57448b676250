//! One small network with fixed keys, so that every test of this crate speaks of the same manager, merchant, client
//! and seeders, and golden vectors come out the same on every machine.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part of it")]

pub mod samples;

use std::convert::Infallible;

use protocol::amount::{Amount, Currency};
use protocol::deliver::Grant;
use protocol::ids::{Address, NetworkId, Nonce, PeerAddrs, ProductId, TransactionId};
use protocol::receipt::{Ack, DeliveryId};
use protocol::ticket::{
    Admission, Endorsement, Lease, Payer, Ticket, TransactionData, payment_commitment, remuneration_commitment,
};
use protocol::trust::{DEFAULT_CLOCK_GRACE_MS, KeyEntry, KeyPurpose, KeySet, KeyState, RevocationState, Trust};
use protocol::{ChunkSet, Digest, Keypair, PeerId, Signed};

/// The time in every sample, unix milliseconds.
pub const NOW: u64 = 1_790_000_000_000;
pub const HOUR: u64 = 3_600_000;
pub const DAY: u64 = 24 * HOUR;
pub const MIB: u64 = 1 << 20;

/// A key pair by its number.
pub fn key(n: u8) -> Keypair {
    Keypair::from_seed(&[n; 32])
}

pub fn root() -> Keypair {
    key(1)
}
pub fn manager() -> Keypair {
    key(10)
}
pub fn merchant() -> Keypair {
    key(11)
}
pub fn client() -> Keypair {
    key(12)
}
pub fn seeder() -> Keypair {
    key(13)
}
pub fn stranger() -> Keypair {
    key(14)
}
/// A ticket key whose time is over, one that retires, one that was revoked.
pub fn retired_key() -> Keypair {
    key(20)
}
pub fn revoked_key() -> Keypair {
    key(21)
}

/// The network's key for a purpose.
pub fn network_key(purpose: KeyPurpose) -> Keypair {
    key(2 + KeyPurpose::ALL.iter().position(|p| *p == purpose).unwrap() as u8)
}

pub fn network() -> NetworkId {
    NetworkId::of_root(&root().peer_id())
}

pub fn key_set() -> KeySet {
    let entry = |purpose, key: Keypair, state| KeyEntry { purpose, key: key.peer_id(), state };
    let mut keys: Vec<KeyEntry> =
        KeyPurpose::ALL.iter().map(|p| entry(*p, network_key(*p), KeyState::Active)).collect();
    let retiring = KeyState::Retiring { not_issued_after: NOW - 10 * DAY, dead_after: NOW - DAY };
    keys.push(entry(KeyPurpose::Ticket, retired_key(), retiring));
    keys.push(entry(KeyPurpose::Ticket, revoked_key(), KeyState::Revoked));
    KeySet {
        network: network(),
        version: 3,
        issued_at: NOW - DAY,
        keys,
        managers: vec![manager().peer_id()],
        gossip_shards: 4,
        next_root: Some(Digest::from_bytes([0xd7; 32])),
        handovers: Vec::new(),
    }
}

pub fn trust() -> Trust {
    Trust::new(root().peer_id(), Signed::sign(&key_set(), &root()), DEFAULT_CLOCK_GRACE_MS).unwrap()
}

pub fn transaction() -> TransactionId {
    TransactionId::new(NOW - HOUR, *b"0123456789")
}

pub fn product() -> ProductId {
    ProductId::new(NOW - 30 * DAY, *b"albumalbum")
}

pub fn price() -> Amount {
    Amount { minor: 999, currency: Currency::USD }
}

pub fn salt(n: u8) -> Nonce {
    Nonce::from_bytes([n; 16])
}

/// Digest of the signed manifest that tickets of this world name.
pub fn manifest_digest() -> Digest {
    Digest::from_bytes([0x3a; 32])
}

pub fn transaction_data() -> TransactionData {
    TransactionData {
        network: network(),
        transaction: transaction(),
        product: product(),
        manifest: manifest_digest(),
        client: client().peer_id(),
        merchant: merchant().peer_id(),
        remuneration: remuneration_commitment(&salt(1), &price()),
        formed_at: NOW - HOUR,
    }
}

pub fn endorsement(data: &Signed<TransactionData>) -> Endorsement {
    Endorsement {
        transaction_data: data.digest(),
        payment: payment_commitment(&salt(2), "pi_42", &price()),
        authorised_at: NOW - HOUR + 1000,
    }
}

pub fn lease(data: &Signed<TransactionData>, endorsement: &Signed<Endorsement>) -> Lease {
    Lease {
        transaction_data: data.digest(),
        endorsement: endorsement.digest(),
        client: client().peer_id(),
        generation: 0,
        delivery: 1,
        issued_at: NOW - HOUR + 2000,
        start: NOW - HOUR + 2000,
        end: NOW + 7 * DAY,
        allowance: 1200 * MIB,
        sources: vec![seeder().peer_id()],
        rate: 12_000,
        currency: Currency::USD,
        ceiling: 14_400_000,
        payer: Payer::Merchant,
        staleness: DAY,
    }
}

/// A ticket's parts before they are signed, each to be spoilt by a test; [`Parts::ticket`] signs them in order.
pub struct Parts {
    pub data: TransactionData,
    pub data_key: Keypair,
    pub merchant_key: Keypair,
    pub lease_key: Keypair,
    pub change_endorsement: fn(&mut Endorsement),
    pub change_lease: fn(&mut Lease),
}

impl Default for Parts {
    fn default() -> Self {
        Parts {
            data: transaction_data(),
            data_key: network_key(KeyPurpose::Ticket),
            merchant_key: merchant(),
            lease_key: network_key(KeyPurpose::Ticket),
            change_endorsement: |_| {},
            change_lease: |_| {},
        }
    }
}

impl Parts {
    pub fn ticket(&self) -> Ticket {
        let data = Signed::sign(&self.data, &self.data_key);
        let mut endorsed = endorsement(&data);
        (self.change_endorsement)(&mut endorsed);
        let endorsement = Signed::sign(&endorsed, &self.merchant_key);
        let mut leased = lease(&data, &endorsement);
        (self.change_lease)(&mut leased);
        Ticket { data, endorsement: Some(endorsement), lease: Signed::sign(&leased, &self.lease_key) }
    }
}

pub fn ticket() -> Ticket {
    Parts::default().ticket()
}

pub fn admission<'a>(trust: &'a Trust, revoked: &'a RevocationState) -> Admission<'a> {
    Admission {
        peer: client().peer_id(),
        seeder: seeder().peer_id(),
        trust,
        revoked,
        informed: Some(NOW - 60_000),
        continuation_ms: 0,
        now: NOW,
    }
}

pub fn delivery() -> DeliveryId {
    DeliveryId { transaction: transaction(), delivery: 1 }
}

pub fn grant(listed: bool, allowance: u64) -> Grant {
    Grant {
        delivery: delivery(),
        generation: 0,
        manifest: manifest_digest(),
        client: client().peer_id(),
        allowance,
        listed,
        rate: 12_000,
        until: NOW + 7 * DAY,
    }
}

pub fn ack_of(chunks: ChunkSet, at: u64) -> Ack {
    Ack {
        network: network(),
        delivery: delivery(),
        manifest: manifest_digest(),
        seeder: seeder().peer_id(),
        chunks,
        at,
    }
}

pub fn addrs(peer: PeerId) -> PeerAddrs {
    PeerAddrs::new(peer, vec![Address::new("/ip4/192.0.2.1/tcp/4001").unwrap()])
}

/// Bytes that look random and are the same for the same seed, whatever version of a random number library is used.
pub struct Fixed(blake3::OutputReader);

impl Fixed {
    pub fn new(seed: u64) -> Self {
        Fixed(blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof())
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes) % n.max(1)
    }

    /// True `percent` times out of a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

impl rand_core::TryRng for Fixed {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.below(1 << 32) as u32)
    }
    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(self.below(u64::MAX))
    }
    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        self.0.fill(out);
        Ok(())
    }
}

impl rand_core::TryCryptoRng for Fixed {}
