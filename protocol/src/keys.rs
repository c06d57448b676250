//! Keys and the two things done with them: signing a document for one purpose, and sealing a secret to a key. A node
//! has one Ed25519 key for both; `docs/decisions/0002-one-key-for-signing-and-sealing.md` argues why that is sound.

use std::fmt;

use curve25519_dalek::edwards::CompressedEdwardsY;
use ed25519_dalek::Signer;
use hpke::{Deserializable, OpModeR, OpModeS, Serializable};
use rand_core::CryptoRng;
use zeroize::Zeroizing;

use crate::ids::PeerId;

type Kem = hpke::kem::X25519HkdfSha256;
type Kdf = hpke::kdf::HkdfSha256;
type Aead = hpke::aead::ChaCha20Poly1305;

/// Length of the encapsulated key that precedes every sealed text, bytes.
const ENCAPPED_LEN: usize = 32;

/// An Ed25519 key pair: a node's identity, or one of the network's keys.
#[derive(Clone)]
pub struct Keypair {
    signing: ed25519_dalek::SigningKey,
}

impl Keypair {
    /// The key pair of a 32-byte seed (RFC 8032 private key).
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Keypair { signing: ed25519_dalek::SigningKey::from_bytes(seed) }
    }

    /// A new key pair.
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        let mut seed = Zeroizing::new([0u8; 32]);
        rng.fill_bytes(seed.as_mut());
        Self::from_seed(&seed)
    }

    /// The seed, wiped when dropped.
    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.signing.to_bytes())
    }

    /// The public key as a peer ID. For network keys, too: it is the one name of a public key here.
    pub fn peer_id(&self) -> PeerId {
        PeerId::from_bytes(self.signing.verifying_key().to_bytes())
    }

    /// Ed25519 signature over `message` as it is; documents are signed through [`crate::signed::Signed`].
    pub(crate) fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.signing.sign(message).to_bytes()
    }

    /// Opens what was sealed to this key's public half under the same `info`.
    ///
    /// # Errors
    /// [`SealError`] when it was sealed to another key, for another use, or was changed.
    pub fn open(&self, info: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (encapped, text) = sealed.split_at_checked(ENCAPPED_LEN).ok_or(SealError::Open)?;
        let encapped = <Kem as hpke::Kem>::EncappedKey::from_bytes(encapped).map_err(|_| SealError::Open)?;
        let scalar = Zeroizing::new(self.signing.to_scalar_bytes());
        let secret = <Kem as hpke::Kem>::PrivateKey::from_bytes(scalar.as_ref()).map_err(|_| SealError::Open)?;
        hpke::single_shot_open::<Aead, Kdf, Kem>(&OpModeR::Base, &secret, &encapped, info, text, b"")
            .map(Zeroizing::new)
            .map_err(|_| SealError::Open)
    }
}

impl fmt::Debug for Keypair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keypair({})", self.peer_id())
    }
}

/// Why something could not be sealed or opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The recipient's public key is no point of the prime-order group in canonical form: nobody could hold it safely.
    #[error("the recipient's key is not a usable Ed25519 key")]
    BadKey,
    /// The sealed text was made for another key or another use, or was changed on its way.
    #[error("sealed for another key or use, or damaged")]
    Open,
    /// The cipher failed.
    #[error("sealing failed")]
    Seal,
}

/// Seals `plain` to the holder of `to` with HPKE (RFC 9180): base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256,
/// ChaCha20-Poly1305. `info` names the use and must be the same when opening. The result is the 32-byte encapsulated
/// key followed by the ciphertext: 48 bytes longer than `plain`.
///
/// # Errors
/// [`SealError::BadKey`] for public keys that are non-canonical, of low order or outside the prime-order group.
pub fn seal(to: &PeerId, info: &[u8], plain: &[u8], rng: &mut impl CryptoRng) -> Result<Vec<u8>, SealError> {
    seal_with(&sealing_key(to)?, info, plain, rng)
}

/// [`seal`] to a key that [`is_usable`] took before. Asking again whether it lies in the prime-order group costs more than
/// a signature.
///
/// # Errors
/// [`SealError::BadKey`] for bytes that are no point of the curve at all.
pub fn seal_to_checked(to: &PeerId, info: &[u8], plain: &[u8], rng: &mut impl CryptoRng) -> Result<Vec<u8>, SealError> {
    let point = CompressedEdwardsY(*to.as_bytes()).decompress().ok_or(SealError::BadKey)?;
    seal_with(&point.to_montgomery().to_bytes(), info, plain, rng)
}

fn seal_with(montgomery: &[u8; 32], info: &[u8], plain: &[u8], rng: &mut impl CryptoRng) -> Result<Vec<u8>, SealError> {
    let public = <Kem as hpke::Kem>::PublicKey::from_bytes(montgomery).map_err(|_| SealError::BadKey)?;
    let (encapped, text) =
        hpke::single_shot_seal_with_rng::<Aead, Kdf, Kem>(&OpModeS::Base, &public, info, plain, b"", rng)
            .map_err(|_| SealError::Seal)?;
    let mut out = encapped.to_bytes().to_vec();
    out.extend_from_slice(&text);
    Ok(out)
}

/// True when `key` is usable as an identity: canonical, not of low order, in the prime-order group.
pub fn is_usable(key: &PeerId) -> bool {
    sealing_key(key).is_ok()
}

/// Ed25519 -> X25519 by the birational map (RFC 7748 section 4.1).
fn sealing_key(peer: &PeerId) -> Result<[u8; 32], SealError> {
    let compressed = CompressedEdwardsY(*peer.as_bytes());
    let point = compressed.decompress().ok_or(SealError::BadKey)?;
    // Decompression accepts y >= p; only the canonical bytes are a peer's name.
    if point.compress() != compressed || point.is_small_order() || !point.is_torsion_free() {
        return Err(SealError::BadKey);
    }
    Ok(point.to_montgomery().to_bytes())
}

/// Strict Ed25519 verification (RFC 8032 with canonical encodings and no low-order keys).
pub(crate) fn verify_strict(key: &PeerId, message: &[u8], signature: &[u8; 64]) -> bool {
    ed25519_dalek::VerifyingKey::from_bytes(key.as_bytes())
        .and_then(|key| key.verify_strict(message, &ed25519_dalek::Signature::from_bytes(signature)))
        .is_ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn rng() -> rand::rngs::StdRng {
        rand::rngs::StdRng::seed_from_u64(7)
    }

    #[test]
    fn sealed_to_one_key_and_use_only() {
        let mut rng = rng();
        let (alice, eve) = (Keypair::generate(&mut rng), Keypair::generate(&mut rng));
        let sealed = seal(&alice.peer_id(), b"use a", b"secret", &mut rng).unwrap();
        assert_eq!(sealed.len(), 6 + 48);
        assert_eq!(alice.open(b"use a", &sealed).unwrap().as_slice(), b"secret");
        assert_eq!(alice.open(b"use b", &sealed), Err(SealError::Open));
        assert_eq!(eve.open(b"use a", &sealed), Err(SealError::Open));
        let mut changed = sealed.clone();
        changed[40] ^= 1;
        assert_eq!(alice.open(b"use a", &changed), Err(SealError::Open));
        assert_eq!(alice.open(b"use a", &sealed[..20]), Err(SealError::Open));
    }

    #[test]
    fn low_order_and_non_canonical_keys_are_refused() {
        let mut identity = [0u8; 32];
        identity[0] = 1;
        let order_two = {
            let mut y = [0xff; 32];
            y[0] = 0xec;
            y[31] = 0x7f;
            y
        };
        let non_canonical = {
            let mut y = [0xff; 32];
            y[0] = 0xee; // p + 1, that is, 1 again
            y[31] = 0x7f;
            y
        };
        for key in [identity, order_two, non_canonical, [0; 32]] {
            let peer = PeerId::from_bytes(key);
            assert!(!is_usable(&peer), "{key:?}");
            assert_eq!(seal(&peer, b"", b"x", &mut rng()), Err(SealError::BadKey));
        }
    }
}
