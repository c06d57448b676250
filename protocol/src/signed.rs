//! Signed documents. A signature covers a domain prefix, the purpose and the exact bytes that are passed on, never a
//! re-encoding of what was decoded from them; so a signature made for one kind of document is good for no other, and
//! a codec change cannot invalidate old signatures.

use std::marker::PhantomData;

use bincode::{Decode, Encode};

use crate::codec::{self, CodecError, Wire};
use crate::ids::{Digest, NetworkId, PeerId};
use crate::keys::{self, Keypair};
use crate::refusal::{Refusal, RefusalCode};

/// What a signed document is for. The number is signed with the document and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[repr(u8)]
pub enum Purpose {
    /// [`crate::trust::KeySet`]
    KeySet,
    /// [`crate::trust::Heartbeat`]
    Heartbeat,
    /// [`crate::trust::RevocationEpoch`]
    RevocationEpoch,
    /// [`crate::certificate::MerchantCert`]
    MerchantCert,
    /// [`crate::certificate::SeederCert`]
    SeederCert,
    /// [`crate::manifest::Manifest`]
    Manifest,
    /// [`crate::ticket::TransactionData`]
    TransactionData,
    /// [`crate::ticket::Endorsement`]
    Endorsement,
    /// [`crate::ticket::Lease`]
    Lease,
    /// [`crate::replication::ReplicationOrder`]
    ReplicationOrder,
    /// [`crate::receipt::Ack`]
    Ack,
    /// [`crate::receipt::Completion`]
    Completion,
    /// [`crate::receipt::SealedBatch`]
    ReceiptBatch,
    /// [`crate::receipt::Mark`]
    Mark,
    /// [`crate::statement::Statement`]
    Statement,
    /// [`crate::evidence::DeliveryRecord`]
    DeliveryRecord,
    /// [`crate::evidence::NonDelivery`]
    NonDelivery,
    /// [`crate::entitlement::Move`]
    Move,
    /// [`crate::entitlement::Recovery`]
    Recovery,
    /// [`crate::root::RootHandover`]
    RootHandover,
}

/// First bytes of every signed message.
const DOMAIN: &[u8; 20] = b"willcall signature 1";

/// A document that is signed on its own.
pub trait Document: Wire {
    /// What it is for.
    const PURPOSE: Purpose;

    /// The network that it names, where [`crate::trust::Trust::open`] is the place that compares it. The others name
    /// theirs in a check of their own, whose order matters, or by the digest of another document.
    fn network(&self) -> Option<NetworkId> {
        None
    }
}

/// Declares the purpose and byte limit of documents, and the field that [`crate::signed::Document::network`] reads.
#[macro_export]
macro_rules! document {
    ($($ty:ty => $purpose:ident, $max:expr $(; $network:ident)?),+ $(,)?) => { $(
        impl $crate::codec::Wire for $ty { const MAX: usize = $max; }
        impl $crate::signed::Document for $ty {
            const PURPOSE: $crate::signed::Purpose = $crate::signed::Purpose::$purpose;
            $(fn network(&self) -> Option<$crate::ids::NetworkId> { Some(self.$network) })?
        }
        impl $crate::codec::Wire for $crate::signed::Signed<$ty> {
            const MAX: usize = $max + $crate::signed::Signed::<$ty>::OVERHEAD;
        }
    )+ };
}

/// A document's exact bytes, whose key signed them, and the signature. Nothing in it is trusted before
/// [`Signed::verify`] (for a known peer's key) or [`crate::trust::Trust::open`] (for the network's keys).
pub struct Signed<T> {
    purpose: Purpose,
    signer: PeerId,
    body: Vec<u8>,
    signature: [u8; 64],
    document: PhantomData<fn() -> T>,
}

impl<T> Signed<T> {
    /// Bytes that a signature adds to a document at most: codec version, purpose, signer, length, signature.
    pub const OVERHEAD: usize = 1 + 1 + 32 + 9 + 64;

    /// Whose key is said to have signed.
    pub fn signer(&self) -> PeerId {
        self.signer
    }

    /// The exact bytes that are signed.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    fn message(&self) -> Vec<u8> {
        let mut message = Vec::with_capacity(DOMAIN.len() + 1 + self.body.len());
        message.extend_from_slice(DOMAIN);
        message.push(self.purpose as u8);
        message.extend_from_slice(&self.body);
        message
    }

    /// Digest of the whole signed document, signature included: how other documents name it.
    pub fn digest(&self) -> Digest {
        Digest::of(
            "willcall 2026-11 signed document",
            &[&[self.purpose as u8], self.signer.as_bytes(), &self.body, &self.signature],
        )
    }
}

impl<T: Document> Signed<T> {
    /// Signs `document` with `keypair`.
    pub fn sign(document: &T, keypair: &Keypair) -> Self {
        let mut signed = Signed {
            purpose: T::PURPOSE,
            signer: keypair.peer_id(),
            body: codec::encode(document),
            signature: [0; 64],
            document: PhantomData,
        };
        signed.signature = keypair.sign(&signed.message());
        signed
    }

    /// Checks that `signer` signed this document, and decodes it.
    ///
    /// # Errors
    /// [`SignatureError`]; callers translate it into the refusal that fits the place.
    pub fn verify(&self, signer: &PeerId) -> Result<T, SignatureError> {
        self.check_signature(signer)?;
        Ok(codec::decode(&self.body)?)
    }

    /// [`Signed::verify`] for those who decoded the document before, to refuse it cheaply.
    pub(crate) fn check_signature(&self, signer: &PeerId) -> Result<(), SignatureError> {
        if self.signer != *signer {
            return Err(SignatureError::Signer { expected: *signer, found: self.signer });
        }
        if self.purpose != T::PURPOSE || !keys::verify_strict(signer, &self.message(), &self.signature) {
            return Err(SignatureError::Invalid);
        }
        Ok(())
    }

    /// The same signer and signature over another document: what a forger would present, and nothing accepts.
    #[must_use]
    pub fn with_body_forged(&self, document: &T) -> Self {
        Signed { body: codec::encode(document), ..self.clone() }
    }

    /// Decodes the document WITHOUT checking the signature: for cheap checks that come before it, and for display.
    ///
    /// # Errors
    /// [`CodecError`] when the bytes are no such document.
    pub fn peek(&self) -> Result<T, CodecError> {
        codec::decode(&self.body)
    }
}

/// Why a signature does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// Another key signed than the one that had to.
    #[error("signed by {found}, not by {expected}")]
    Signer {
        /// Whose signature was needed.
        expected: PeerId,
        /// Whose it says it is.
        found: PeerId,
    },
    /// The signature does not fit purpose, key and bytes.
    #[error("the signature does not verify")]
    Invalid,
    /// Signed, but not a document that this build reads.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

impl SignatureError {
    /// The refusal for this error, where `invalid` names a signature that does not hold.
    pub fn refusal(&self, invalid: RefusalCode) -> Refusal {
        match self {
            SignatureError::Codec(error) => error.clone().into(),
            other => Refusal::new(invalid, other.to_string()),
        }
    }
}

impl<T> Clone for Signed<T> {
    fn clone(&self) -> Self {
        Signed {
            purpose: self.purpose,
            signer: self.signer,
            body: self.body.clone(),
            signature: self.signature,
            document: PhantomData,
        }
    }
}

impl<T> PartialEq for Signed<T> {
    fn eq(&self, other: &Self) -> bool {
        self.purpose == other.purpose
            && self.signer == other.signer
            && self.body == other.body
            && self.signature == other.signature
    }
}

impl<T> Eq for Signed<T> {}

impl<T: Document + std::fmt::Debug> std::fmt::Debug for Signed<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signed").field("signer", &self.signer).field("document", &self.peek()).finish()
    }
}

impl<T> Encode for Signed<T> {
    fn encode<E: bincode::enc::Encoder>(&self, encoder: &mut E) -> Result<(), bincode::error::EncodeError> {
        self.purpose.encode(encoder)?;
        self.signer.encode(encoder)?;
        self.body.encode(encoder)?;
        self.signature.encode(encoder)
    }
}

impl<C, T: Document> Decode<C> for Signed<T> {
    fn decode<D: bincode::de::Decoder<Context = C>>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
        let purpose = Purpose::decode(decoder)?;
        if purpose != T::PURPOSE {
            return Err(bincode::error::DecodeError::Other("a signed document of another purpose"));
        }
        let signer = PeerId::decode(decoder)?;
        let body = Vec::<u8>::decode(decoder)?;
        if body.len() > T::MAX {
            return Err(bincode::error::DecodeError::Other("a signed document that is longer than its kind may be"));
        }
        let signature = <[u8; 64]>::decode(decoder)?;
        Ok(Signed { purpose, signer, body, signature, document: PhantomData })
    }
}

impl<'de, C, T: Document> bincode::BorrowDecode<'de, C> for Signed<T> {
    fn borrow_decode<D: bincode::de::BorrowDecoder<'de, Context = C>>(
        decoder: &mut D,
    ) -> Result<Self, bincode::error::DecodeError> {
        <Self as Decode<C>>::decode(decoder)
    }
}
