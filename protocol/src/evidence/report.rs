//! What the check of a file of evidence comes to.

use std::collections::BTreeMap;

use super::{DeliveryRecord, Exporter};
use crate::amount::Amount;
use crate::api::TransactionState;
use crate::ids::{Digest, PeerId, ProductId, TransactionId};

/// Whose word a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Claimant {
    /// The network's root key signed it.
    RootSigned,
    /// One of the manager's keys signed it.
    ManagerSigned,
    /// The merchant's key signed it.
    MerchantSigned,
    /// The client's key signed it.
    ClientSigned,
    /// The merchant says so and signed nothing.
    MerchantAsserts,
    /// Whoever put the file together says so.
    ExporterAsserts,
}

impl Claimant {
    /// For people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Claimant::RootSigned => "the root key signed",
            Claimant::ManagerSigned => "the manager signed",
            Claimant::MerchantSigned => "the merchant signed",
            Claimant::ClientSigned => "the client signed",
            Claimant::MerchantAsserts => "the merchant asserts",
            Claimant::ExporterAsserts => "the exporter asserts",
        }
    }
}

/// One thing that the file says.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Line {
    /// Whose word it is.
    pub claimed_by: Claimant,
    /// The section that it is in.
    pub section: String,
    /// What is claimed.
    pub claim: String,
    /// Why the claim does not hold; absent where it does.
    pub problem: Option<String>,
    /// Which other document vouches for it, where the key that signed it was revoked since.
    pub vouched_by: Option<String>,
    /// It holds for what its signer signed, and that it was the signer's to say is not proven by the file.
    pub unproven: bool,
}

/// What one seeder was acknowledged for.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct SeederShare {
    /// Who.
    pub seeder: PeerId,
    /// Who signed it: the designated client, or whom a lease names instead.
    pub client: PeerId,
    /// In which delivery.
    pub delivery: u32,
    /// Chunks.
    pub chunks: u32,
    /// Their bytes; absent without the manifest.
    pub bytes: Option<u64>,
    /// The client's clock, unix milliseconds.
    pub at: u64,
}

/// What one peer signed to have received, as far as it is in the file: what is absent may have been left out of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Received {
    /// Bytes of the content, each counted once; absent without the manifest, and where no acknowledgement is in the file.
    pub acknowledged_bytes: Option<u64>,
    /// Time of its newest acknowledgement in the file, by its own clock, unix milliseconds.
    pub last_acknowledged_at: Option<u64>,
    /// When it signed that all of it is there, by its own clock, unix milliseconds; absent where no completion is in the
    /// file.
    pub completed_at: Option<u64>,
}

/// A change of hands, by the word of who could give it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Changed {
    /// The generation that began with it.
    pub generation: u32,
    /// Who signed it: the holder until then, or the merchant.
    pub by: PeerId,
    /// The merchant did, because the holder's key was lost.
    pub recovered: bool,
    /// To whom.
    pub to: PeerId,
    /// By the signer's clock, unix milliseconds.
    pub at: u64,
}

/// Where the sale stood, by the manager's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Recorded {
    /// When it stood there, unix milliseconds.
    pub at: u64,
    /// Where.
    pub state: TransactionState,
    /// When it was released, unix milliseconds; of this and what follows, absent where it had not happened by then.
    pub released_at: Option<u64>,
    /// When the first acknowledgement or completion came in, unix milliseconds.
    pub first_at: Option<u64>,
    /// When the completion came in, unix milliseconds.
    pub completed_at: Option<u64>,
    /// When the paid delivery was closed, unix milliseconds.
    pub closed_at: Option<u64>,
}

impl From<&DeliveryRecord> for Recorded {
    fn from(record: &DeliveryRecord) -> Recorded {
        let DeliveryRecord { at, state, released_at, first_at, completed_at, closed_at, .. } = *record;
        Recorded { at, state, released_at, first_at, completed_at, closed_at }
    }
}

/// What follows from the lines that hold. What is absent is not in the file, or does not hold: that there is none such does
/// not follow.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Facts {
    /// Which transaction.
    pub transaction: Option<TransactionId>,
    /// What was sold.
    pub product: Option<ProductId>,
    /// Digest of the signed manifest.
    pub manifest: Option<Digest>,
    /// To whom.
    pub client: Option<PeerId>,
    /// By whom.
    pub merchant: Option<PeerId>,
    /// When the sale was formed, unix milliseconds.
    pub formed_at: Option<u64>,
    /// The merchant signed that it is paid.
    #[serde(skip_serializing_if = "is_absent")]
    pub endorsed: bool,
    /// The manager signed an order to deliver, and a lease is in the file.
    #[serde(skip_serializing_if = "is_absent")]
    pub released: bool,
    /// Bytes of the content.
    pub content_bytes: Option<u64>,
    /// What the designated client signed to have received.
    #[serde(flatten)]
    pub received: Received,
    /// The same of peers that leases name in its place: that the purchase moved to them is the manager's word, where it is
    /// not in `moved`.
    pub others: BTreeMap<PeerId, Received>,
    /// By whose signed word it moved to whom, in order.
    pub moved: Vec<Changed>,
    /// What each seeder was acknowledged for.
    pub seeders: Vec<SeederShare>,
    /// Where it stood, by the manager's word.
    pub record: Option<Recorded>,
    /// By then nothing had been acknowledged to the manager, unix milliseconds …
    pub nothing_acknowledged_by: Option<u64>,
    /// … as far as it knows since this time, when it came back from a backup; absent where it knows all of it.
    pub nothing_acknowledged_since: Option<u64>,
    /// When the manager came back from a backup after the sale was formed, unix milliseconds: what it says to have come
    /// in after this may be what came in before.
    pub manager_restored_at: Option<u64>,
    /// Price, where the merchant opened the commitment to it.
    pub price: Option<Amount>,
    /// Newest key set in the file: later revocations are not known to it.
    pub key_set_version: Option<u64>,
}

/// No file proves that something is not so: it is left out.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_absent(proven: &bool) -> bool {
    !proven
}

/// What a file of evidence proves.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Report {
    /// Who put it together, by its own word.
    pub by: Exporter,
    /// Every line of it holds; what some of them say may yet be `unproven`.
    pub ok: bool,
    /// Line by line.
    pub lines: Vec<Line>,
    /// The key that signed the sale was revoked, and nothing in the file vouches for it.
    pub key_revoked: bool,
    /// What follows.
    pub facts: Facts,
}
