//! What is said of a delivery afterwards: the client's acknowledgements and completion, the receipts that seeders make
//! of them, sealed batches on their way to the manager, and the manager's mark of what it has.

use bincode::{Decode, Encode};

use crate::ids::{Digest, NetworkId, Nonce, PeerId, TransactionId};
use crate::keys::{self, Keypair, SealError};
use crate::ranges::ChunkSet;
use crate::refusal::{Refusal, RefusalCode};
use crate::signed::Signed;
use crate::{codec, document, wire};

/// One download of one purchase (or, with delivery 0, one replication): what acks, receipts and money are counted under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct DeliveryId {
    /// The transaction or replication order.
    pub transaction: TransactionId,
    /// Which download.
    pub delivery: u32,
}

impl std::fmt::Display for DeliveryId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}#{}", self.transaction, self.delivery)
    }
}

/// The client's word: these chunks came from this seeder, and were verified. A later one is a strict superset.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Ack {
    /// The network.
    pub network: NetworkId,
    /// The delivery.
    pub delivery: DeliveryId,
    /// Digest of the signed manifest.
    pub manifest: Digest,
    /// The seeder that sent the chunks.
    pub seeder: PeerId,
    /// The chunks.
    pub chunks: ChunkSet,
    /// The client's clock, unix milliseconds.
    pub at: u64,
}

/// The client's word: the whole ciphertext is here and verified.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Completion {
    /// The network.
    pub network: NetworkId,
    /// The delivery.
    pub delivery: DeliveryId,
    /// Digest of the signed manifest.
    pub manifest: Digest,
    /// The client's clock, unix milliseconds.
    pub at: u64,
}

/// What a seeder reports of one delivery.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Receipt {
    /// The last acknowledgement.
    pub ack: Signed<Ack>,
    /// The completion, where the client gave it to this seeder.
    pub completion: Option<Signed<Completion>>,
    /// When the first chunk was sent, by the seeder's clock, unix milliseconds.
    pub first_at: u64,
    /// When the last acknowledgement came.
    pub last_at: u64,
}

impl Receipt {
    /// Digest of the receipt: how people and the manager name it.
    pub fn id(&self) -> Digest {
        self.ack.digest()
    }
}

/// What is inside of a sealed batch.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ReceiptBatch {
    /// At most [`ReceiptBatch::MAX_RECEIPTS`].
    pub receipts: Vec<Receipt>,
}

impl ReceiptBatch {
    /// Most receipts in one batch: with the usual few ranges each they fill about half of a gossip message.
    pub const MAX_RECEIPTS: usize = 64;
    /// Most encoded bytes of receipts in one batch; a batch must fit a gossip message of 64 KiB sealed and signed.
    pub const MAX_BYTES: usize = 48 * 1024;
}

/// A batch on its way: opaque to the mesh, but for who sent it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct SealedBatch {
    /// The network.
    pub network: NetworkId,
    /// Who sends it.
    pub seeder: PeerId,
    /// Drawn anew when an outbox is made: numbers are without gaps within it.
    pub incarnation: Nonce,
    /// 1 for the first.
    pub number: u64,
    /// Running hash of all batches before, all zeros before the first.
    pub previous: Digest,
    /// The key in the key set that it is sealed to.
    pub sealed_to: PeerId,
    /// HPKE of the encoded [`ReceiptBatch`].
    pub sealed: Vec<u8>,
    /// The seeder's clock, unix milliseconds.
    pub at: u64,
}

/// The manager's word: everything of this outbox up to `number` is safe with it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Mark {
    /// The network.
    pub network: NetworkId,
    /// Whose batches.
    pub seeder: PeerId,
    /// Which outbox.
    pub incarnation: Nonce,
    /// Up to and including this number.
    pub number: u64,
    /// Running hash after it.
    pub running: Digest,
    /// As in the heartbeat: a higher one than before means that the manager may have lost marked receipts.
    pub restore: u64,
    /// Unix milliseconds.
    pub at: u64,
}

document! {
    Ack => Ack, 4 * 1024,
    Completion => Completion, 256,
    SealedBatch => ReceiptBatch, ReceiptBatch::MAX_BYTES + 1024,
    Mark => Mark, 256; network,
}
wire! {
    Receipt => 5 * 1024,
    ReceiptBatch => ReceiptBatch::MAX_BYTES,
}

impl SealedBatch {
    const INFO: &'static [u8] = b"willcall receipt batch 1";

    fn info(network: &NetworkId, seeder: &PeerId, incarnation: &Nonce, number: u64) -> Vec<u8> {
        let mut info = Self::INFO.to_vec();
        info.extend_from_slice(network.as_bytes());
        info.extend_from_slice(seeder.as_bytes());
        info.extend_from_slice(incarnation.as_bytes());
        info.extend_from_slice(&number.to_le_bytes());
        info
    }

    /// Seals and signs a batch. `place` is where it stands in the outbox.
    ///
    /// # Errors
    /// [`SealError::BadKey`] when the key set's key is unusable.
    pub fn seal(
        batch: &ReceiptBatch,
        place: &OutboxPlace,
        seeder: &Keypair,
        to: PeerId,
        now: u64,
        rng: &mut impl rand_core::CryptoRng,
    ) -> Result<Signed<SealedBatch>, SealError> {
        let peer = seeder.peer_id();
        let info = Self::info(&place.network, &peer, &place.incarnation, place.number);
        let sealed = keys::seal(&to, &info, &codec::encode(batch), rng)?;
        let document = SealedBatch {
            network: place.network,
            seeder: peer,
            incarnation: place.incarnation,
            number: place.number,
            previous: place.previous,
            sealed_to: to,
            sealed,
            at: now,
        };
        Ok(Signed::sign(&document, seeder))
    }

    /// Opens it with the private half of `sealed_to`.
    ///
    /// # Errors
    /// `bad-receipt` when it does not open, `malformed` when it opens to something else.
    pub fn open(&self, key: &Keypair) -> Result<ReceiptBatch, Refusal> {
        let info = Self::info(&self.network, &self.seeder, &self.incarnation, self.number);
        let plain = key.open(&info, &self.sealed).map_err(|e| Refusal::new(RefusalCode::BadReceipt, e.to_string()))?;
        let batch: ReceiptBatch = codec::decode(&plain)?;
        if batch.receipts.len() > ReceiptBatch::MAX_RECEIPTS {
            return Err(Refusal::new(RefusalCode::TooLarge, "more than 64 receipts in a batch"));
        }
        Ok(batch)
    }

    /// Running hash after this batch.
    pub fn running(&self) -> Digest {
        let number = self.number.to_le_bytes();
        Digest::of("willcall 2026-11 outbox running hash", &[self.previous.as_bytes(), &number, &self.sealed])
    }
}

/// Where a batch stands in its outbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutboxPlace {
    /// The network.
    pub network: NetworkId,
    /// The outbox.
    pub incarnation: Nonce,
    /// Its number.
    pub number: u64,
    /// Running hash of all before it.
    pub previous: Digest,
}

impl Ack {
    /// Checks that `client` signed it, for the given delivery from the given seeder.
    ///
    /// # Errors
    /// `bad-ack` with what does not fit.
    pub fn check(
        signed: &Signed<Ack>,
        client: &PeerId,
        network: &NetworkId,
        delivery: DeliveryId,
        manifest: &Digest,
        seeder: &PeerId,
    ) -> Result<Ack, Refusal> {
        let ack = signed.verify(client).map_err(|e| e.refusal(RefusalCode::BadAck))?;
        let names = (&ack.network, ack.delivery, &ack.manifest, &ack.seeder);
        if names != (network, delivery, manifest, seeder) {
            return Err(Refusal::new(RefusalCode::BadAck, "it names another delivery, content or seeder"));
        }
        Ok(ack)
    }
}

impl Completion {
    /// Checks that `client` signed it for the given delivery.
    ///
    /// # Errors
    /// `bad-receipt` with what does not fit.
    pub fn check(
        signed: &Signed<Completion>,
        client: &PeerId,
        network: &NetworkId,
        delivery: DeliveryId,
        manifest: &Digest,
    ) -> Result<Completion, Refusal> {
        let completion = signed.verify(client).map_err(|e| e.refusal(RefusalCode::BadReceipt))?;
        if (&completion.network, completion.delivery, &completion.manifest) != (network, delivery, manifest) {
            return Err(Refusal::new(RefusalCode::BadReceipt, "a completion of another delivery"));
        }
        Ok(completion)
    }
}
