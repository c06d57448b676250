//! One place for the byte form of every document and message, because bincode's own entry points accept trailing
//! bytes and unbounded lengths, and because the codec must be replaceable without touching a document.
//!
//! Form: one version byte, then bincode 2 "standard" (little endian, variable-length integers). Decoding checks the
//! length against the type's limit before it reads, bounds what may be allocated, and refuses left-over bytes.

use bincode::config;

/// A type with a byte form of its own on the wire or on disk.
pub trait Wire: bincode::Encode + bincode::Decode<()> {
    /// Largest encoded length in bytes, version byte included. Longer input is refused unread.
    const MAX: usize;
    /// The version byte that is written, and the only one that is read.
    const VERSION: u8 = 1;
}

/// Why bytes are not a document of the expected type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Longer than the type's limit.
    #[error("{len} bytes, at most {max} are allowed")]
    TooLarge {
        /// Length given, bytes.
        len: usize,
        /// Limit of the type, bytes.
        max: usize,
    },
    /// No bytes at all, or cut off, or not of this type.
    #[error("not a well-formed message: {0}")]
    Malformed(String),
    /// Another version than the one that this build reads.
    #[error("version {found}, this build reads version {supported}")]
    Version {
        /// Version byte found.
        found: u8,
        /// Version byte this build reads.
        supported: u8,
    },
    /// Bytes are left over after the document.
    #[error("{0} bytes left over after the end")]
    Trailing(usize),
}

/// Encodes `value` with its version byte. Infallible for our types: they hold no maps, cells or foreign strings that
/// could fail; should the codec fail all the same, the result is empty, which no decoder accepts.
pub fn encode<T: Wire>(value: &T) -> Vec<u8> {
    // Most documents and rows are shorter: growing byte by byte from one would copy them half a dozen times.
    let mut out = Vec::with_capacity(T::MAX.min(512));
    out.push(T::VERSION);
    match bincode::encode_into_std_write(value, &mut out, config::standard()) {
        Ok(_) => out,
        Err(_) => Vec::new(),
    }
}

/// Decodes exactly one `T` from the whole of `bytes`.
///
/// # Errors
/// [`CodecError`] when the bytes are too long, cut off, of another version or followed by more.
pub fn decode<T: Wire>(bytes: &[u8]) -> Result<T, CodecError> {
    if bytes.len() > T::MAX {
        return Err(CodecError::TooLarge { len: bytes.len(), max: T::MAX });
    }
    let (&version, body) = bytes.split_first().ok_or_else(|| CodecError::Malformed("empty".to_owned()))?;
    if version != T::VERSION {
        return Err(CodecError::Version { found: version, supported: T::VERSION });
    }
    let (value, used) = decode_bounded::<T>(body).map_err(|e| CodecError::Malformed(e.to_string()))?;
    match body.len() - used {
        0 => Ok(value),
        left => Err(CodecError::Trailing(left)),
    }
}

/// bincode's limit is a const parameter and counts memory to be allocated, which for lists of small integers is
/// several times the encoded length: the tiers give each message at most 16 times its own length (4 KiB at least).
fn decode_bounded<T: Wire>(body: &[u8]) -> Result<(T, usize), bincode::error::DecodeError> {
    const KIB: usize = 1024;
    const MIB: usize = 1024 * KIB;
    let base = config::standard();
    match body.len() {
        0..=256 => bincode::decode_from_slice(body, base.with_limit::<{ 4 * KIB }>()),
        257..=4096 => bincode::decode_from_slice(body, base.with_limit::<{ 64 * KIB }>()),
        4097..=65_536 => bincode::decode_from_slice(body, base.with_limit::<{ MIB }>()),
        65_537..=1_048_576 => bincode::decode_from_slice(body, base.with_limit::<{ 16 * MIB }>()),
        _ => bincode::decode_from_slice(body, base.with_limit::<{ 256 * MIB }>()),
    }
}

/// Declares the byte limit of types.
#[macro_export]
macro_rules! wire {
    ($($ty:ty => $max:expr),+ $(,)?) => {
        $(impl $crate::codec::Wire for $ty { const MAX: usize = $max; })+
    };
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, bincode::Encode, bincode::Decode)]
    struct Sample {
        numbers: Vec<u64>,
        text: String,
    }
    wire!(Sample => 4096);

    #[test]
    fn round_trip_and_golden_bytes() {
        let value = Sample { numbers: vec![1, 300], text: "ab".into() };
        let bytes = encode(&value);
        assert_eq!(bytes, [1, 2, 1, 251, 44, 1, 2, b'a', b'b']);
        assert_eq!(decode::<Sample>(&bytes).unwrap(), value);
    }

    #[test]
    fn nine_bytes_that_claim_a_huge_list_are_refused_without_allocating() {
        let bytes = [1, 253, 255, 255, 255, 255, 255, 255, 255, 255];
        assert!(matches!(decode::<Sample>(&bytes), Err(CodecError::Malformed(_))));
    }

    #[test]
    fn trailing_cut_off_long_and_foreign_input_have_their_own_names() {
        let mut bytes = encode(&Sample { numbers: vec![7], text: String::new() });
        assert!(matches!(decode::<Sample>(&bytes[..2]), Err(CodecError::Malformed(_))));
        bytes.push(0);
        assert_eq!(decode::<Sample>(&bytes), Err(CodecError::Trailing(1)));
        bytes[0] = 9;
        assert_eq!(decode::<Sample>(&bytes), Err(CodecError::Version { found: 9, supported: 1 }));
        assert!(matches!(decode::<Sample>(&[1; 5000]), Err(CodecError::TooLarge { len: 5000, max: 4096 })));
        assert!(decode::<Sample>(&[]).is_err());
    }
}
