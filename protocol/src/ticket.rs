//! The ticket: what stands for the payment on its way from the sale to the goods, and the one flat list of checks by
//! which a seeder decides, alone and offline, whether to serve.

use std::fmt;

use bincode::{Decode, Encode};

use crate::amount::{Amount, Currency};
use crate::cipher::ContentSecret;
use crate::codec::{self, Wire};
use crate::ids::{Digest, NetworkId, Nonce, PeerAddrs, PeerId, ProductId, TransactionId};
use crate::keys::{self, Keypair, SealError};
use crate::refusal::{Refusal, RefusalCode};
use crate::signed::Signed;
use crate::text::{self, TextError};
use crate::trust::{JoinLine, KeyPurpose, RevocationState, Trust};
use crate::{document, wire};

/// The sale itself: formed by the manager once the payment data are in; never changes.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TransactionData {
    /// The network.
    pub network: NetworkId,
    /// The transaction.
    pub transaction: TransactionId,
    /// What was bought.
    pub product: ProductId,
    /// Digest of the signed manifest of its content.
    pub manifest: Digest,
    /// The client that the buyer designated.
    pub client: PeerId,
    /// The merchant that sold it.
    pub merchant: PeerId,
    /// [`remuneration_commitment`]: binds the price without showing it to seeders.
    pub remuneration: Digest,
    /// Unix milliseconds.
    pub formed_at: u64,
}

/// The merchant's word that it is paid.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Endorsement {
    /// Digest of the signed transaction data.
    pub transaction_data: Digest,
    /// [`payment_commitment`]: binds payment authorisation and amount without showing them.
    pub payment: Digest,
    /// When the payment was authorised, unix milliseconds.
    pub authorised_at: u64,
}

/// Who pays the seeders for a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Payer {
    /// The merchant, out of the sale.
    Merchant,
    /// The network (replication).
    Network,
}

/// The manager's order to deliver: releases one transaction to one client for a time.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Lease {
    /// Digest of the signed transaction data.
    pub transaction_data: Digest,
    /// Digest of the signed endorsement.
    pub endorsement: Digest,
    /// The client now entitled: the designated one until the purchase was moved.
    pub client: PeerId,
    /// Counts up with each move to another client.
    pub generation: u32,
    /// Counts the full downloads of this purchase, from 1.
    pub delivery: u32,
    /// When it was signed, unix milliseconds.
    pub issued_at: u64,
    /// Valid from, unix milliseconds …
    pub start: u64,
    /// … until.
    pub end: u64,
    /// Most bytes that any one seeder sends for it.
    pub allowance: u64,
    /// Seeders that were chosen for it, at most [`Lease::MAX_SOURCES`]; others serve it with the small window.
    pub sources: Vec<PeerId>,
    /// What a seeder earns: millionths of the currency's minor unit per MiB.
    pub rate: u64,
    /// Currency of rate and ceiling.
    pub currency: Currency,
    /// Most that is paid for this delivery to all seeders together: millionths of the minor unit.
    pub ceiling: u64,
    /// Who pays.
    pub payer: Payer,
    /// A seeder that has not heard from the manager for longer than this refuses (milliseconds); 0 means it never does.
    pub staleness: u64,
}

impl Lease {
    /// Most listed sources.
    pub const MAX_SOURCES: usize = 32;
}

document! {
    TransactionData => TransactionData, 512,
    Endorsement => Endorsement, 256,
    Lease => Lease, 2048,
}

/// Salted commitment to what a product costs.
pub fn remuneration_commitment(salt: &Nonce, amount: &Amount) -> Digest {
    Digest::of(
        "willcall 2026-11 remuneration commitment",
        &[salt.as_bytes(), &amount.minor.to_le_bytes(), amount.currency.as_str().as_bytes()],
    )
}

/// Salted commitment to a payment authorisation and its amount.
pub fn payment_commitment(salt: &Nonce, authorisation: &str, amount: &Amount) -> Digest {
    Digest::of(
        "willcall 2026-11 payment commitment",
        &[salt.as_bytes(), authorisation.as_bytes(), &amount.minor.to_le_bytes(), amount.currency.as_str().as_bytes()],
    )
}

/// The content secret, sealed to the client (HPKE).
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KeyGrant {
    sealed: Vec<u8>,
}

impl KeyGrant {
    /// HPKE `info`: who may open it, for what.
    fn info(data: &TransactionData, client: &PeerId, generation: u32) -> Vec<u8> {
        let mut info = b"willcall key grant 1".to_vec();
        info.extend_from_slice(data.network.as_bytes());
        info.extend_from_slice(data.transaction.as_bytes());
        info.extend_from_slice(data.manifest.as_bytes());
        info.extend_from_slice(client.as_bytes());
        info.extend_from_slice(&generation.to_le_bytes());
        info
    }

    /// Seals `secret` to the lease's client.
    ///
    /// # Errors
    /// [`SealError::BadKey`] when the client's key is unusable.
    pub fn seal(
        secret: &ContentSecret,
        data: &TransactionData,
        lease: &Lease,
        rng: &mut impl rand_core::CryptoRng,
    ) -> Result<Self, SealError> {
        let info = Self::info(data, &lease.client, lease.generation);
        Ok(KeyGrant { sealed: keys::seal(&lease.client, &info, secret.as_bytes(), rng)? })
    }

    /// [`KeyGrant::seal`] for a client whose key [`keys::is_usable`] took when the purchase was reserved.
    ///
    /// # Errors
    /// [`SealError::BadKey`] when the client's key is no key at all.
    pub fn seal_to_checked(
        secret: &ContentSecret,
        data: &TransactionData,
        lease: &Lease,
        rng: &mut impl rand_core::CryptoRng,
    ) -> Result<Self, SealError> {
        let info = Self::info(data, &lease.client, lease.generation);
        Ok(KeyGrant { sealed: keys::seal_to_checked(&lease.client, &info, secret.as_bytes(), rng)? })
    }

    /// Opens it with the client's key.
    ///
    /// # Errors
    /// [`SealError::Open`] when it is for somebody or something else.
    pub fn open(&self, client: &Keypair, data: &TransactionData, lease: &Lease) -> Result<ContentSecret, SealError> {
        let info = Self::info(data, &client.peer_id(), lease.generation);
        let plain = client.open(&info, &self.sealed)?;
        plain.as_slice().try_into().map(ContentSecret::from_bytes).map_err(|_| SealError::Open)
    }
}

/// What a client shows to a seeder.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Ticket {
    /// The sale.
    pub data: Signed<TransactionData>,
    /// That it is paid. A ticket without it opens nothing.
    pub endorsement: Option<Signed<Endorsement>>,
    /// That it is released.
    pub lease: Signed<Lease>,
}

/// What the client keeps: the ticket, and beside it what only the client needs. The `.ticket` file is its byte form,
/// the `willcall:` line its text form.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TicketEnvelope {
    /// What seeders are shown.
    pub ticket: Ticket,
    /// The content key, where the product's policy gives it out at release.
    pub grant: Option<KeyGrant>,
    /// How to join the network that the ticket is of.
    pub join: JoinLine,
    /// Addresses of the listed sources, as far as known.
    pub sources: Vec<PeerAddrs>,
    /// What was bought, for people; at most 200 bytes.
    pub title: String,
}

wire! {
    Ticket => 4 * 1024,
    TicketEnvelope => 64 * 1024,
}

/// Why a file or line is no ticket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketTextError {
    /// As a line of text.
    #[error("not a ticket: {0}")]
    Text(#[from] TextError),
    /// As a file.
    #[error("not a ticket file, or cut off or damaged: {0}; copy it again")]
    File(#[from] codec::CodecError),
}

impl TicketEnvelope {
    const PREFIX: &'static str = "willcall:";

    /// Reads a ticket from what a file holds: the byte form, or the line of text.
    ///
    /// # Errors
    /// [`TicketTextError`].
    pub fn from_file_bytes(bytes: &[u8]) -> Result<Self, TicketTextError> {
        match std::str::from_utf8(bytes) {
            Ok(text) if text.trim_start().starts_with(Self::PREFIX) => Ok(text.parse()?),
            _ => Ok(codec::decode(bytes)?),
        }
    }

    /// The byte form.
    pub fn to_file_bytes(&self) -> Vec<u8> {
        codec::encode(self)
    }
}

impl fmt::Display for TicketEnvelope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::to_line(Self::PREFIX, self))
    }
}

impl std::str::FromStr for TicketEnvelope {
    type Err = TextError;

    fn from_str(line: &str) -> Result<Self, TextError> {
        text::from_line(Self::PREFIX, line)
    }
}

/// What admission knows besides the ticket. The peer comes from the transport handshake, never from a message.
#[derive(Debug)]
pub struct Admission<'a> {
    /// Whose key the connection proved.
    pub peer: PeerId,
    /// This seeder.
    pub seeder: PeerId,
    /// The network's keys.
    pub trust: &'a Trust,
    /// What is revoked.
    pub revoked: &'a RevocationState,
    /// Until when this seeder knows all that was revoked, unix milliseconds of the manager's clock: the time of its newest
    /// heartbeat whose epochs it holds; `None` for never.
    pub informed: Option<u64>,
    /// A delivery that is under way goes on for this long past the lease, milliseconds; 0 for a new one.
    pub continuation_ms: u64,
    /// Now, unix milliseconds.
    pub now: u64,
}

/// What the holder of an older generation is told, before a delivery and in the middle of one.
pub const MOVED_ON: &str =
    "this lease is void: the purchase was moved to another device, or more was acknowledged than the lease allows";

/// A ticket that passed every check.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// The sale.
    pub data: TransactionData,
    /// The order to deliver.
    pub lease: Lease,
    /// This seeder is one of the listed sources.
    pub listed: bool,
}

impl Ticket {
    /// Every check of a ticket that does not depend on the content or on what was sent before, in the order of cost:
    /// wrong-network, wrong-client, not-yet-valid, expired, bad-endorsement, unknown-key, key-retired,
    /// bad-manager-signature, revoked, stale-revocations. (Before it: overloaded, shutting-down, too-large, malformed,
    /// unsupported-version; after it: content-not-held, allowance-spent.)
    ///
    /// # Errors
    /// The first check that fails.
    pub fn check(&self, admission: &Admission<'_>) -> Result<Admitted, Refusal> {
        let Admission { trust, now, .. } = *admission;
        let data = self.data.peek()?;
        let lease = self.lease.peek()?;
        if lease.sources.len() > Lease::MAX_SOURCES {
            return Err(Refusal::new(RefusalCode::Malformed, "more than 32 listed sources"));
        }

        if data.network != trust.network() {
            return Err(Refusal::new(RefusalCode::WrongNetwork, "a ticket of another network"));
        }
        if lease.client != admission.peer {
            return Err(Refusal::new(RefusalCode::WrongClient, "the ticket names another client than this peer"));
        }
        trust.check_time("ticket", lease.start, lease.end.saturating_add(admission.continuation_ms), now)?;

        let endorsement = self.endorsement.as_ref().ok_or_else(|| bad_endorsement("the ticket carries none"))?;
        if endorsement.digest() != lease.endorsement {
            return Err(bad_endorsement("it is not the one that the lease names"));
        }
        let endorsed = endorsement.verify(&data.merchant).map_err(|e| bad_endorsement(&e.to_string()))?;
        let data_digest = self.data.digest();
        if endorsed.transaction_data != data_digest {
            return Err(bad_endorsement("it endorses another transaction"));
        }

        let lease_key = trust.key_for(&self.lease, KeyPurpose::Ticket)?;
        let data_key = trust.key_for(&self.data, KeyPurpose::Ticket)?;
        // Only the lease's key must be alive: the lease names the signed transaction data by digest and so vouches for
        // them. A purchase must stay deliverable after the key that signed it years ago was rotated out.
        lease_key.check_state(lease.issued_at, now)?;
        self.lease.check_signature(&lease_key.key).map_err(|e| e.refusal(RefusalCode::BadManagerSignature))?;
        self.data.check_signature(&data_key.key).map_err(|e| e.refusal(RefusalCode::BadManagerSignature))?;
        if lease.transaction_data != data_digest {
            return Err(Refusal::new(RefusalCode::BadManagerSignature, "the lease is for another transaction"));
        }

        if admission.revoked.has_transaction(&data.transaction) {
            return Err(Refusal::new(RefusalCode::Revoked, "this transaction was revoked"));
        }
        if admission.revoked.has_moved_on(&data.transaction, lease.generation) {
            return Err(Refusal::new(RefusalCode::Revoked, MOVED_ON));
        }
        check_staleness(lease.staleness, admission.informed, trust, now)?;
        let listed = lease.sources.contains(&admission.seeder);
        Ok(Admitted { data, lease, listed })
    }
}

fn bad_endorsement(why: &str) -> Refusal {
    Refusal::new(RefusalCode::BadEndorsement, format!("merchant's endorsement: {why}"))
}

/// May a seeder serve by a lease with this [`Lease::staleness`] that knows all revocations until `informed`, as in
/// [`Admission`]? Asked again while the delivery runs.
///
/// # Errors
/// `stale-revocations`.
pub fn check_staleness(staleness: u64, informed: Option<u64>, trust: &Trust, now: u64) -> Result<(), Refusal> {
    if staleness == 0 {
        return Ok(());
    }
    if now.saturating_sub(informed.unwrap_or(0)) > staleness.saturating_add(trust.grace_ms()) {
        let detail = "this seeder has not heard from the manager for longer than the product allows";
        return Err(Refusal::new(RefusalCode::StaleRevocations, detail).retry_after(60_000).at(now));
    }
    Ok(())
}

// The largest parts of a ticket must fit into it, whatever is changed above.
const _: () = assert!(
    <Signed<TransactionData> as Wire>::MAX + <Signed<Endorsement> as Wire>::MAX + <Signed<Lease> as Wire>::MAX + 8
        <= <Ticket as Wire>::MAX
);
