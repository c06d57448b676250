//! Keys and the two things done with them: signing a document for one purpose, and sealing a secret to a key. A node
//! has one Ed25519 key for both; `docs/decisions/0002-one-key-for-signing-and-sealing.md` argues why that is sound.

use std::fmt;

use curve25519_dalek::edwards::{CompressedEdwardsY, EdwardsPoint};
use curve25519_dalek::scalar::Scalar;
use curve25519_dalek::traits::IsIdentity;
use ed25519_dalek::Signer;
use hpke::{Deserializable, OpModeR, OpModeS, Serializable};
use rand_core::CryptoRng;
use zeroize::Zeroizing;

use crate::ids::PeerId;
use crate::sealing::{Recipient, ToPoint};

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

    /// The secret scalar, as X25519 takes it.
    #[cfg(test)]
    pub(crate) fn scalar_bytes(&self) -> [u8; 32] {
        self.signing.to_scalar_bytes()
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
    seal_with(usable_point(to)?, info, plain, rng)
}

/// [`seal`] to a key that [`is_usable`] took before. Asking again whether it lies in the prime-order group costs more than
/// a signature.
///
/// # Errors
/// [`SealError::BadKey`] for bytes that are no point of the curve at all.
pub fn seal_to_checked(to: &PeerId, info: &[u8], plain: &[u8], rng: &mut impl CryptoRng) -> Result<Vec<u8>, SealError> {
    let point = CompressedEdwardsY(*to.as_bytes()).decompress().ok_or(SealError::BadKey)?;
    seal_with(point, info, plain, rng)
}

fn seal_with(to: EdwardsPoint, info: &[u8], plain: &[u8], rng: &mut impl CryptoRng) -> Result<Vec<u8>, SealError> {
    let to = Recipient::new(to);
    let (encapped, text) =
        hpke::single_shot_seal_with_rng::<Aead, Kdf, ToPoint>(&OpModeS::Base, &to, info, plain, b"", rng)
            .map_err(|_| SealError::Seal)?;
    let mut out = Vec::with_capacity(ENCAPPED_LEN + text.len());
    out.extend_from_slice(&encapped.to_bytes());
    out.extend_from_slice(&text);
    Ok(out)
}

/// True when `key` is usable as an identity: canonical, not of low order, in the prime-order group.
pub fn is_usable(key: &PeerId) -> bool {
    usable_point(key).is_ok()
}

fn usable_point(peer: &PeerId) -> Result<EdwardsPoint, SealError> {
    // Decompression accepts y >= p; only the canonical bytes are a peer's name.
    if !is_canonical(peer.as_bytes()) {
        return Err(SealError::BadKey);
    }
    let point = CompressedEdwardsY(*peer.as_bytes()).decompress().ok_or(SealError::BadKey)?;
    // Of the eight points of low order only the neutral element is in the prime-order group. It and the point of order
    // two are the only ones whose sign could be written in two ways.
    if point.is_identity() || !is_in_prime_order_group(&point) {
        return Err(SealError::BadKey);
    }
    Ok(point)
}

/// Whether y, without the sign of x in the topmost bit, is below p = 2^255 - 19.
fn is_canonical(bytes: &[u8; 32]) -> bool {
    let [lowest, middle @ .., highest] = bytes;
    *lowest < 0xed || highest & 0x7f != 0x7f || middle.iter().any(|byte| *byte != 0xff)
}

/// Whether [l]P is the neutral element, l the order of the base point; what `EdwardsPoint::is_torsion_free` says in more time.
/// Asked as [l - 1]P = -P, since l - 1 is a scalar and can go the way of verification: in variable time, which public
/// keys may take, and with an addition only where a digit is not 0, of which the upper half of l has one.
fn is_in_prime_order_group(point: &EdwardsPoint) -> bool {
    EdwardsPoint::vartime_double_scalar_mul_basepoint(&-Scalar::ONE, point, &Scalar::ZERO) == -point
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
    fn the_prime_order_group_is_found_as_by_the_longer_way() {
        use curve25519_dalek::constants::{ED25519_BASEPOINT_POINT, EIGHT_TORSION};
        let mut rng = rng();
        let mut of_the_group: Vec<EdwardsPoint> = [1_u64, 2, 3, 8, 255]
            .into_iter()
            .map(|n| ED25519_BASEPOINT_POINT * Scalar::from(n))
            .chain([-ED25519_BASEPOINT_POINT, EdwardsPoint::default()])
            .collect();
        for _ in 0..60 {
            let mut wide = [0; 64];
            rand_core::Rng::fill_bytes(&mut rng, &mut wide);
            of_the_group.push(ED25519_BASEPOINT_POINT * Scalar::from_bytes_mod_order_wide(&wide));
        }
        for point in of_the_group {
            for (n, torsion) in EIGHT_TORSION.iter().enumerate() {
                let shifted = point + torsion;
                assert_eq!(is_in_prime_order_group(&shifted), n == 0);
                assert_eq!(is_in_prime_order_group(&shifted), shifted.is_torsion_free());
                let peer = PeerId::from_bytes(shifted.compress().to_bytes());
                assert_eq!(is_usable(&peer), n == 0 && !point.is_identity());
            }
        }
    }

    #[test]
    fn usable_keys_are_those_of_the_definition() {
        // As the documentation of `is_usable` says it, in so many words.
        let by_definition = |bytes: [u8; 32]| {
            let compressed = CompressedEdwardsY(bytes);
            compressed.decompress().is_some_and(|point| {
                point.compress() == compressed && !point.is_small_order() && point.is_torsion_free()
            })
        };
        let mut rng = rng();
        let mut cases: Vec<[u8; 32]> = Vec::new();
        // Around 0 and p, with both signs: y of 0, 1, 2, p - 1 .. p + 18 are in it.
        for low in 0..=255 {
            for (middle, high) in [(0xff, 0x7f), (0xff, 0xff), (0, 0), (0, 0x80)] {
                let mut bytes = [middle; 32];
                (bytes[0], bytes[31]) = (low, high);
                cases.push(bytes);
            }
        }
        for _ in 0..400 {
            let mut bytes = [0; 32];
            rand_core::Rng::fill_bytes(&mut rng, &mut bytes);
            cases.push(bytes);
            cases.push(*Keypair::from_seed(&bytes).peer_id().as_bytes());
        }
        for bytes in cases {
            assert_eq!(is_usable(&PeerId::from_bytes(bytes)), by_definition(bytes), "{bytes:?}");
        }
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
