//! DHKEM(X25519, HKDF-SHA256) of RFC 9180 to a recipient whose key is known as an Ed25519 point. What is sent and derived is
//! to the byte what the `hpke` crate makes of the X25519 key; it takes two multiplications instead of three, and the longer
//! one on the Edwards curve, where curve25519-dalek is twice as fast. A manager seals a key for every sale.

use std::fmt;

use curve25519_dalek::edwards::EdwardsPoint;
use hpke::kdf::{HkdfSha256, Kdf};
use hpke::kem::{Kem, SharedSecret, X25519HkdfSha256};
use hpke::{Deserializable, HpkeError, Serializable};
use rand_core::CryptoRng;
use zeroize::Zeroizing;

type PublicKey = <X25519HkdfSha256 as Kem>::PublicKey;
type PrivateKey = <X25519HkdfSha256 as Kem>::PrivateKey;
type EncappedKey = <X25519HkdfSha256 as Kem>::EncappedKey;

/// "KEM" and the KEM's number: what RFC 9180 section 4.1 calls the suite of the KEM.
const SUITE: &[u8; 5] = b"KEM\x00\x20";

/// The KEM. It only seals, and only in base mode.
pub(crate) struct ToPoint;

/// To whom: a point of the prime-order group other than the neutral element, as Ed25519 has it.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Recipient(EdwardsPoint);

impl Recipient {
    pub(crate) fn new(point: EdwardsPoint) -> Self {
        Recipient(point)
    }
}

impl fmt::Debug for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Recipient").field(&self.0.compress()).finish()
    }
}

impl Serializable for Recipient {
    type OutputSize = <PublicKey as Serializable>::OutputSize;

    /// As the X25519 key: the birational map of RFC 7748 section 4.1.
    fn write_exact(&self, buf: &mut [u8]) {
        buf.copy_from_slice(self.0.to_montgomery().as_bytes());
    }
}

impl Deserializable for Recipient {
    /// An X25519 key has lost the sign that the point has.
    fn from_bytes(_: &[u8]) -> Result<Self, HpkeError> {
        Err(HpkeError::ValidationError)
    }
}

impl Kem for ToPoint {
    type PublicKey = Recipient;
    type PrivateKey = PrivateKey;
    type EncappedKey = EncappedKey;
    type NSecret = <X25519HkdfSha256 as Kem>::NSecret;
    const KEM_ID: u16 = X25519HkdfSha256::KEM_ID;

    fn sk_to_pk(secret: &PrivateKey) -> Recipient {
        Recipient(EdwardsPoint::mul_base_clamped(secret.to_bytes().into()))
    }

    fn derive_keypair(ikm: &[u8]) -> (PrivateKey, Recipient) {
        let (secret, _) = X25519HkdfSha256::derive_keypair(ikm);
        let public = Self::sk_to_pk(&secret);
        (secret, public)
    }

    /// Never asked for: whoever opens has the X25519 key.
    fn decap(_: &PrivateKey, _: Option<&Recipient>, _: &EncappedKey) -> Result<SharedSecret<Self>, HpkeError> {
        Err(HpkeError::DecapError)
    }

    /// RFC 9180 section 4.1, `Encap`.
    fn encap_with_rng(
        recipient: &Recipient,
        sender: Option<(&PrivateKey, &Recipient)>,
        rng: &mut impl CryptoRng,
    ) -> Result<(SharedSecret<Self>, EncappedKey), HpkeError> {
        if sender.is_some() {
            return Err(HpkeError::EncapError);
        }
        let (ephemeral, public) = X25519HkdfSha256::gen_keypair_with_rng(rng);
        let encapped = public.to_bytes();
        let ephemeral = Zeroizing::new(<[u8; 32]>::from(ephemeral.to_bytes()));
        // What the ladder makes of the u-coordinates, and of a point that is in the group it is never zero.
        let shared = Zeroizing::new(recipient.0.mul_clamped(*ephemeral).to_montgomery().to_bytes());
        if *shared == [0; 32] {
            return Err(HpkeError::EncapError);
        }
        let mut context = Vec::with_capacity(64);
        context.extend_from_slice(&encapped);
        context.extend_from_slice(&recipient.to_bytes());
        let mut secret = SharedSecret::default();
        HkdfSha256::extract_and_expand(&*shared, SUITE, &context, &mut secret.0)?;
        Ok((secret, EncappedKey::from_bytes(&encapped)?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use curve25519_dalek::edwards::CompressedEdwardsY;
    use hpke::aead::ChaCha20Poly1305;
    use hpke::{OpModeR, OpModeS};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::Keypair;

    #[test]
    fn what_is_sealed_is_to_the_byte_what_the_crate_seals_to_the_x25519_key() {
        let mut rng = StdRng::seed_from_u64(11);
        for _ in 0..50 {
            let keypair = Keypair::generate(&mut rng);
            let point = CompressedEdwardsY(*keypair.peer_id().as_bytes()).decompress().unwrap();
            let (info, plain): ([u8; 40], [u8; 64]) = (rng.random(), rng.random());
            let seed = rng.random();
            let (first, second) = (&mut StdRng::seed_from_u64(seed), &mut StdRng::seed_from_u64(seed));
            let ours = hpke::single_shot_seal_with_rng::<ChaCha20Poly1305, HkdfSha256, ToPoint>(
                &OpModeS::Base,
                &Recipient(point),
                &info,
                &plain,
                b"",
                first,
            )
            .unwrap();
            let montgomery = point.to_montgomery();
            let theirs = hpke::single_shot_seal_with_rng::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
                &OpModeS::Base,
                &PublicKey::from_bytes(montgomery.as_bytes()).unwrap(),
                &info,
                &plain,
                b"",
                second,
            )
            .unwrap();
            assert_eq!((ours.0.to_bytes(), &ours.1), (theirs.0.to_bytes(), &theirs.1));
            assert_eq!(first.random::<u64>(), second.random::<u64>(), "and both drew as much");
            let opened = hpke::single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
                &OpModeR::Base,
                &PrivateKey::from_bytes(&keypair.scalar_bytes()).unwrap(),
                &ours.0,
                &info,
                &ours.1,
                b"",
            );
            assert_eq!(opened.unwrap(), plain);
        }
    }

    #[test]
    fn what_it_cannot_do_is_an_error() {
        let mut rng = StdRng::seed_from_u64(12);
        let (secret, public) = ToPoint::derive_keypair(&[7; 32]);
        assert_eq!(public, ToPoint::sk_to_pk(&secret));
        assert_eq!(public.to_bytes(), X25519HkdfSha256::derive_keypair(&[7; 32]).1.to_bytes());
        let sender = Some((&secret, &public));
        assert_eq!(ToPoint::encap_with_rng(&public, sender, &mut rng).err(), Some(HpkeError::EncapError));
        let (_, encapped) = ToPoint::encap_with_rng(&public, None, &mut rng).unwrap();
        assert_eq!(ToPoint::decap(&secret, None, &encapped).err(), Some(HpkeError::DecapError));
        assert_eq!(Recipient::from_bytes(&public.to_bytes()).err(), Some(HpkeError::ValidationError));
        // The neutral element, which `keys::is_usable` takes for no key.
        let nobody = Recipient(EdwardsPoint::default());
        assert_eq!(ToPoint::encap_with_rng(&nobody, None, &mut rng).err(), Some(HpkeError::EncapError));
    }
}
