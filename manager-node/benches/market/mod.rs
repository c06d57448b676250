//! A manager with a product, a merchant, a client and seeders that are keys and no nodes: what is measured is the
//! manager's own work, through its own services, without the network and without the others' signatures in the time.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each bench uses its own part of it")]

use std::time::Duration;

use manager_node::{Config, InitOptions, PublishProgress, PublishRequest, Running};
use protocol::api::{MeshRequest, MeshResponse, Reserve, SalesRequest, SalesResponse, SeederReport};
use protocol::receipt::{Ack, DeliveryId, OutboxPlace, Receipt, ReceiptBatch, SealedBatch};
use protocol::ticket::{Endorsement, TicketEnvelope, TransactionData, payment_commitment};
use protocol::trust::{InvitedRole, KeyPurpose, KeyState};
use protocol::{
    Address, Amount, ChunkSet, Currency, Digest, Keypair, NetworkId, Nonce, PeerId, ProductId, Signed, TransactionId,
};
use rand::RngExt;
use tokio::sync::watch;

pub const PRICE: Amount = Amount { minor: 999, currency: Currency::USD };
/// Chunks of the product; each seeder is acknowledged for as many as any other.
pub const CHUNKS: u32 = 16;
const CHUNK_SIZE: u32 = 64 * 1024;

pub struct Market {
    pub running: Running,
    pub merchant: Keypair,
    pub client: Keypair,
    pub seeders: Vec<Keypair>,
    pub product: ProductId,
    pub manifest: Digest,
    pub network: NetworkId,
    pub sealed_to: PeerId,
    // Deleted last.
    pub dir: tempfile::TempDir,
}

pub fn random_key() -> Keypair {
    Keypair::from_seed(&rand::rng().random())
}

pub fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from(since.as_millis()).unwrap()
}

/// Without bounds that a shop of this rate would have to raise, and without work of its own beside what is measured.
fn config() -> Config {
    Config {
        listen: vec![Address::new("/ip4/127.0.0.1/tcp/0").unwrap()],
        max_reservations: 1_000_000,
        credit_limit: Amount::MAX_MINOR * 1000,
        sales_ms: 86_400_000,
        placement_ms: 86_400_000,
        fee_millionths: 20_000,
        ..Config::default()
    }
}

impl Market {
    pub async fn open(seeders: usize) -> Market {
        Self::open_in(tempfile::tempdir().unwrap(), seeders).await
    }

    pub async fn open_in(dir: tempfile::TempDir, seeders: usize) -> Market {
        let path = dir.path().join("manager");
        let config = config();
        let options = InitOptions { listen: config.listen.clone(), config, ..InitOptions::default() };
        manager_node::init(&path, options).unwrap();
        let running = manager_node::start(&path, Config::load(&path).unwrap()).await.unwrap();

        let goods = dir.path().join("goods.bin");
        let mut bytes = vec![0; (CHUNKS * CHUNK_SIZE - CHUNK_SIZE / 2) as usize];
        rand::Rng::fill_bytes(&mut rand::rng(), &mut bytes);
        std::fs::write(&goods, bytes).unwrap();
        let request = PublishRequest {
            chunk_size: Some(CHUNK_SIZE),
            shares: vec!["Band=70".to_owned()],
            rate: Some(1_000_000),
            ..PublishRequest::new(goods, "An album", "9.99")
        };
        let published = running.publish(request, watch::Sender::new(PublishProgress::default())).await.unwrap();
        assert_eq!(published.chunks, CHUNKS);

        let MeshResponse::KeySet(keys) = running.mesh(random_key().peer_id(), MeshRequest::KeySet).await.unwrap()
        else {
            panic!("no key set")
        };
        let keys = keys.peek().unwrap();
        let sealing = |entry: &&protocol::trust::KeyEntry| {
            entry.purpose == KeyPurpose::ReceiptSealing && entry.state == KeyState::Active
        };
        let mut market = Market {
            merchant: random_key(),
            client: random_key(),
            seeders: Vec::new(),
            product: published.product,
            manifest: published.manifest,
            network: keys.network,
            sealed_to: keys.keys.iter().find(sealing).unwrap().key,
            running,
            dir,
        };
        let token = market.token(InvitedRole::Merchant).await;
        let enrol = SalesRequest::Enrol { token, name: "Shop".into(), held: None };
        market.running.sales(market.merchant.peer_id(), enrol).await.unwrap();
        for n in 0..seeders {
            market.enrol_seeder(n).await;
        }
        market
    }

    async fn token(&self, role: InvitedRole) -> Nonce {
        self.running.invite(role, 1).await.unwrap().invitation.unwrap().token
    }

    async fn enrol_seeder(&mut self, n: usize) {
        let (key, token) = (random_key(), self.token(InvitedRole::Seeder).await);
        let enrol = MeshRequest::Enrol { token, name: format!("seeder {n}"), capacity: 1 << 40, held: None };
        self.running.mesh(key.peer_id(), enrol).await.unwrap();
        self.seeders.push(key);
        self.report(n).await;
    }

    /// Seeder `n` says that it is there and holds the product: it is listed in leases for the next minutes.
    pub async fn report(&self, n: usize) {
        let addrs = vec![Address::new(&format!("/ip4/10.{}.{}.1/tcp/4001", n / 256, n % 256)).unwrap()];
        let report =
            SeederReport { addrs, held: vec![self.manifest], first: true, free: 1 << 40, ..SeederReport::default() };
        self.running.mesh(self.seeders[n].peer_id(), MeshRequest::Report(report)).await.unwrap();
    }

    pub fn order(&self, order: &str, client: PeerId) -> Reserve {
        Reserve {
            order: order.into(),
            body: Digest::of("bench body", &[order.as_bytes()]),
            product: self.product,
            client,
            price: PRICE,
            salt: Nonce::from_bytes([1; 16]),
            payment: payment_commitment(&Nonce::from_bytes([2; 16]), order, &PRICE),
        }
    }

    /// Steps 4 to 6 of a purchase.
    pub async fn reserve(&self, request: Reserve) -> Signed<TransactionData> {
        match self.running.sales(self.merchant.peer_id(), SalesRequest::Reserve(request)).await.unwrap() {
            SalesResponse::Reserved { data, .. } => data,
            other => panic!("{other:?}"),
        }
    }

    /// What the merchant signs for step 7.
    pub fn endorse(&self, data: &Signed<TransactionData>, payment: Digest) -> (TransactionId, Signed<Endorsement>) {
        let endorsement = Endorsement { transaction_data: data.digest(), payment, authorised_at: now_ms() };
        (data.peek().unwrap().transaction, Signed::sign(&endorsement, &self.merchant))
    }

    /// Steps 7 and 8.
    pub async fn release(&self, transaction: TransactionId, endorsement: Signed<Endorsement>) -> TicketEnvelope {
        let release = SalesRequest::Release { transaction, endorsement };
        match self.running.sales(self.merchant.peer_id(), release).await.unwrap() {
            SalesResponse::Released { ticket, .. } => *ticket,
            other => panic!("{other:?}"),
        }
    }

    /// A whole purchase for the market's client.
    pub async fn buy(&self, order: &str) -> (TransactionId, TicketEnvelope) {
        let request = self.order(order, self.client.peer_id());
        let payment = request.payment;
        let data = self.reserve(request).await;
        let (id, endorsement) = self.endorse(&data, payment);
        (id, self.release(id, endorsement).await)
    }

    /// A receipt of seeder `n` for its part of a delivery that `of` seeders share, one after the other.
    pub fn receipt(&self, transaction: TransactionId, n: usize, of: u32) -> Receipt {
        let (part, place) = (CHUNKS / of, u32::try_from(n).unwrap() % of);
        self.receipt_for(transaction, n, place * part..(place + 1) * part)
    }

    fn receipt_for(&self, transaction: TransactionId, n: usize, chunks: std::ops::Range<u32>) -> Receipt {
        let ack = Ack {
            network: self.network,
            delivery: DeliveryId { transaction, delivery: 1 },
            manifest: self.manifest,
            seeder: self.seeders[n].peer_id(),
            chunks: ChunkSet::from_range(chunks),
            at: now_ms(),
        };
        Receipt { ack: Signed::sign(&ack, &self.client), completion: None, first_at: 1, last_at: 2 }
    }

    /// A receipt of seeder `n` for a whole delivery.
    pub fn receipt_of_all(&self, transaction: TransactionId, n: usize) -> Receipt {
        self.receipt_for(transaction, n, 0..CHUNKS)
    }

    pub fn outbox(&self, n: usize) -> Outbox {
        Outbox {
            key: self.seeders[n].clone(),
            sealed_to: self.sealed_to,
            place: OutboxPlace {
                network: self.network,
                incarnation: Nonce::from_bytes(rand::rng().random()),
                number: 1,
                previous: Digest::from_bytes([0; 32]),
            },
        }
    }

    pub async fn send(&self, seeder: PeerId, batch: Signed<SealedBatch>) {
        match self.running.mesh(seeder, MeshRequest::Receipts(batch)).await.unwrap() {
            MeshResponse::Mark(_) => {}
            other => panic!("{other:?}"),
        }
    }

    pub async fn close(self) -> tempfile::TempDir {
        self.running.stop(Duration::from_secs(30)).await.unwrap();
        self.dir
    }
}

/// One seeder's outbox.
pub struct Outbox {
    pub key: Keypair,
    sealed_to: PeerId,
    place: OutboxPlace,
}

impl Outbox {
    /// Seals the next batch.
    pub fn batch(&mut self, receipts: Vec<Receipt>) -> Signed<SealedBatch> {
        let batch = ReceiptBatch { receipts };
        let (place, now) = (&self.place, now_ms());
        let sealed = SealedBatch::seal(&batch, place, &self.key, self.sealed_to, now, &mut rand::rng()).unwrap();
        self.place.previous = sealed.peek().unwrap().running();
        self.place.number += 1;
        sealed
    }
}

/// Middle value.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
