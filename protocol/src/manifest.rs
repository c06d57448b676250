//! What a product's bytes are, without saying what is in them: the manifest binds the BLAKE3 root of the ciphertext,
//! and lists of chaining values let every chunk be verified alone, the moment it arrives, with no proof bytes.
//!
//! Chaining values: BLAKE3 paper, section 2.4 and 5.1; the `hazmat` module of the blake3 crate.

use bincode::{Decode, Encode};
use blake3::hazmat::{self, HasherExt, Mode};

use crate::ids::{ContentId, Digest, NetworkId};
use crate::refusal::{Refusal, RefusalCode};
use crate::{document, wire};

/// When the content key and the money move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyPolicy {
    /// The key comes with the ticket, payment is captured at release.
    AtRelease,
    /// The key comes, and payment is captured, only against the client's signed completion over the ciphertext.
    OnCompletion,
}

impl KeyPolicy {
    /// The name in commands and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            KeyPolicy::AtRelease => "at-release",
            KeyPolicy::OnCompletion => "on-completion",
        }
    }
}

impl std::str::FromStr for KeyPolicy {
    type Err = crate::ids::IdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "at-release" => Ok(KeyPolicy::AtRelease),
            "on-completion" => Ok(KeyPolicy::OnCompletion),
            other => Err(crate::ids::IdError::new("a policy", other, "it is at-release or on-completion")),
        }
    }
}

/// What a product's ciphertext is. Its digest, as signed for the catalogue, is what tickets name.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Manifest {
    /// The network.
    pub network: NetworkId,
    /// The publication.
    pub content: ContentId,
    /// BLAKE3 of the whole ciphertext.
    pub root: Digest,
    /// Length of the ciphertext, bytes; never 0.
    pub length: u64,
    /// Bytes in each chunk but the last: a power of two from 64 KiB to 4 MiB.
    pub chunk_size: u32,
    /// Digest of each segment of chaining values, in order.
    pub segments: Vec<Digest>,
    /// Commitment to the content key: two keys for one ciphertext would be found out.
    pub key_commitment: Digest,
    /// When key and money move.
    pub policy: KeyPolicy,
    /// Unix milliseconds.
    pub published_at: u64,
}

document!(Manifest => Manifest, 40 * 1024);

/// Chaining values in one segment, except in the last, which may be shorter.
pub const SEGMENT_CHUNKS: u32 = 1024;
/// Most chunks in one content.
pub const MAX_CHUNKS: u32 = 1 << 20;
/// Smallest chunk, bytes.
pub const MIN_CHUNK_SIZE: u32 = 64 * 1024;
/// Largest chunk, bytes.
pub const MAX_CHUNK_SIZE: u32 = 4 * 1024 * 1024;
/// Chunk size where nobody says otherwise, bytes.
pub const DEFAULT_CHUNK_SIZE: u32 = 1024 * 1024;

impl Manifest {
    /// Checks what arithmetic later relies on; to be called once, right after the signature was checked.
    ///
    /// # Errors
    /// `malformed` with what is wrong; `wrong-network`.
    pub fn check(&self, network: NetworkId) -> Result<(), Refusal> {
        let fail = |why: &str| Err(Refusal::new(RefusalCode::Malformed, format!("manifest: {why}")));
        if self.network != network {
            return Err(Refusal::new(RefusalCode::WrongNetwork, "a manifest of another network"));
        }
        if !is_chunk_size(self.chunk_size) {
            return fail("the chunk size is no power of two from 64 KiB to 4 MiB");
        }
        if self.length == 0 || self.length.div_ceil(u64::from(self.chunk_size)) > u64::from(MAX_CHUNKS) {
            return fail("the length is 0 or more than 2^20 chunks");
        }
        if self.segments.len() != self.chunks().div_ceil(SEGMENT_CHUNKS) as usize {
            return fail("the number of segments does not fit the length");
        }
        Ok(())
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.length.div_ceil(u64::from(self.chunk_size.max(1)))).unwrap_or(u32::MAX)
    }

    /// Length of chunk `index` in bytes; 0 past the end.
    pub fn chunk_len(&self, index: u32) -> u32 {
        let left = self.length.saturating_sub(self.chunk_offset(index));
        u32::try_from(left.min(u64::from(self.chunk_size))).unwrap_or(self.chunk_size)
    }

    /// Where chunk `index` begins in the ciphertext, bytes.
    pub fn chunk_offset(&self, index: u32) -> u64 {
        u64::from(index) * u64::from(self.chunk_size)
    }

    /// Number of segments of chaining values.
    pub fn segment_count(&self) -> u32 {
        self.chunks().div_ceil(SEGMENT_CHUNKS)
    }

    /// The chunks whose chaining values stand in segment `segment`.
    pub fn segment_chunks(&self, segment: u32) -> std::ops::Range<u32> {
        let start = segment.saturating_mul(SEGMENT_CHUNKS).min(self.chunks());
        start..start.saturating_add(SEGMENT_CHUNKS).min(self.chunks())
    }

    /// Checks a segment against the manifest.
    ///
    /// # Errors
    /// `malformed` when it is not the segment that was published.
    pub fn check_segment(&self, index: u32, segment: &Segment) -> Result<(), Refusal> {
        match self.segments.get(index as usize) {
            Some(digest) if *digest == segment.digest() => Ok(()),
            Some(_) => Err(Refusal::new(RefusalCode::Malformed, format!("segment {index} is not the one published"))),
            None => Err(Refusal::new(RefusalCode::BadWant, format!("there is no segment {index}"))),
        }
    }

    /// True when `bytes` are chunk `index`, by its chaining value from a checked segment.
    pub fn verifies(&self, index: u32, chaining_value: &[u8; 32], bytes: &[u8]) -> bool {
        bytes.len() == self.chunk_len(index) as usize
            && chunk_value(self.chunk_offset(index), bytes, self.chunks() == 1) == *chaining_value
    }
}

/// True for the powers of two from 64 KiB to 4 MiB.
pub fn is_chunk_size(bytes: u32) -> bool {
    bytes.is_power_of_two() && (MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&bytes)
}

/// Chaining values of up to 1,024 chunks in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Segment {
    /// One value a chunk.
    pub values: Vec<[u8; 32]>,
}

wire!(Segment => SEGMENT_CHUNKS as usize * 32 + 16);

impl Segment {
    /// What the manifest holds of it.
    pub fn digest(&self) -> Digest {
        Digest::of("willcall 2026-11 segment of chaining values", &[self.values.as_flattened()])
    }
}

/// The BLAKE3 chaining value of one chunk at `offset` in the content. Where the content is a single chunk there is no
/// tree above it, and its value is the root hash itself.
pub fn chunk_value(offset: u64, bytes: &[u8], only_chunk: bool) -> [u8; 32] {
    if only_chunk {
        return *blake3::hash(bytes).as_bytes();
    }
    blake3::Hasher::new().set_input_offset(offset).update(bytes).finalize_non_root()
}

/// The BLAKE3 root of a content of `length` bytes from the chaining values of its chunks, in order. `None` when their
/// number does not fit.
pub fn content_root(values: &[[u8; 32]], length: u64, chunk_size: u32) -> Option<Digest> {
    let chunks = length.div_ceil(u64::from(chunk_size));
    match values {
        [only] if chunks == 1 => Some(Digest::from_bytes(*only)),
        _ if values.len() as u64 != chunks || chunks < 2 => None,
        _ => {
            let (left, right) = split(values, length, chunk_size)?;
            let (left, right) = (subtree(left.0, left.1, chunk_size)?, subtree(right.0, right.1, chunk_size)?);
            Some(Digest::from_bytes(*hazmat::merge_subtrees_root(&left, &right, Mode::Hash).as_bytes()))
        }
    }
}

type Part<'a> = (&'a [[u8; 32]], u64);

fn split(values: &[[u8; 32]], length: u64, chunk_size: u32) -> Option<(Part<'_>, Part<'_>)> {
    // The left subtree is a power of two of bytes, hence of chunks.
    let left_len = hazmat::left_subtree_len(length);
    let (left, right) = values.split_at_checked(usize::try_from(left_len / u64::from(chunk_size)).ok()?)?;
    Some(((left, left_len), (right, length - left_len)))
}

fn subtree(values: &[[u8; 32]], length: u64, chunk_size: u32) -> Option<[u8; 32]> {
    match values {
        [] => None,
        [one] => Some(*one),
        _ => {
            let (left, right) = split(values, length, chunk_size)?;
            let (left, right) = (subtree(left.0, left.1, chunk_size)?, subtree(right.0, right.1, chunk_size)?);
            Some(hazmat::merge_subtrees_non_root(&left, &right, Mode::Hash))
        }
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CHUNK: usize = MIN_CHUNK_SIZE as usize;

    fn check_root(length: usize) {
        let bytes: Vec<u8> = (0..length).map(|i| (i * 31 % 251) as u8).collect();
        let only = length <= CHUNK;
        let values: Vec<[u8; 32]> =
            bytes.chunks(CHUNK).enumerate().map(|(i, chunk)| chunk_value((i * CHUNK) as u64, chunk, only)).collect();
        let root = content_root(&values, length as u64, MIN_CHUNK_SIZE).unwrap();
        assert_eq!(root.as_bytes(), blake3::hash(&bytes).as_bytes(), "length {length}");
    }

    #[test]
    fn root_of_chunks_is_blake3_at_the_edges() {
        for length in [1, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK, 8 * CHUNK]
        {
            check_root(length);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn root_of_chunks_is_blake3(length in 1usize..20 * CHUNK) {
            check_root(length);
        }
    }

    #[test]
    fn a_chunk_verifies_at_its_place_only() {
        let bytes = vec![7u8; 2 * CHUNK];
        let manifest = Manifest {
            network: NetworkId::from_bytes([0; 32]),
            content: ContentId::from_bytes([0; 16]),
            root: Digest::from_bytes([0; 32]),
            length: bytes.len() as u64,
            chunk_size: MIN_CHUNK_SIZE,
            segments: vec![Digest::from_bytes([0; 32])],
            key_commitment: Digest::from_bytes([0; 32]),
            policy: KeyPolicy::AtRelease,
            published_at: 0,
        };
        let value = chunk_value(CHUNK as u64, &bytes[CHUNK..], false);
        assert!(manifest.verifies(1, &value, &bytes[CHUNK..]));
        assert!(!manifest.verifies(0, &value, &bytes[..CHUNK]));
        assert!(!manifest.verifies(1, &value, &bytes[CHUNK + 1..]));
    }
}
