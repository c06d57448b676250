//! Keys as bytes whose order is the order of the values: a range over a table is a range over time, number or peer
//! only if no encoding gets in between.

use protocol::{ContentId, Digest, NetworkId, Nonce, PeerId, ProductId, TransactionId};

/// A key with an order-preserving byte form: `a < b` exactly when the bytes of `a` sort before those of `b`.
///
/// Implemented for unsigned integers (big endian), byte arrays, the ids of `protocol`, `()` (a table of one row),
/// tuples of two or three whose parts are fixed in size except the last, and `String`, which has no fixed size and so
/// can only stand alone or last.
pub trait KeyBytes: Sized {
    /// Appends the byte form.
    fn append(&self, out: &mut Vec<u8>);

    /// Reads the byte form back; `None` when `bytes` is not exactly one key.
    fn parse(bytes: &[u8]) -> Option<Self>;
}

/// A key whose byte form always has the same length.
pub trait FixedKey: KeyBytes {
    /// That length, bytes.
    const LEN: usize;
}

/// What a table with key `K` can be asked with: `K` itself, or `&str` in place of a `String`.
pub trait KeyLike<K> {
    /// Appends the bytes that `K` would have.
    fn append_key(&self, out: &mut Vec<u8>);
}

impl<K: KeyBytes> KeyLike<K> for K {
    fn append_key(&self, out: &mut Vec<u8>) {
        self.append(out);
    }
}

impl KeyLike<String> for str {
    fn append_key(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.as_bytes());
    }
}

impl<A: FixedKey> KeyLike<(A, String)> for (A, &str) {
    fn append_key(&self, out: &mut Vec<u8>) {
        self.0.append(out);
        out.extend_from_slice(self.1.as_bytes());
    }
}

/// The first part or parts of a tuple key, for [`Table::prefix`](crate::Table::prefix).
pub trait PrefixOf<K>: FixedKey {}

impl<A: FixedKey, B: KeyBytes> PrefixOf<(A, B)> for A {}
impl<A: FixedKey, B: FixedKey, C: KeyBytes> PrefixOf<(A, B, C)> for A {}
impl<A: FixedKey, B: FixedKey, C: KeyBytes> PrefixOf<(A, B, C)> for (A, B) {}

macro_rules! integer_keys {
    ($($int:ty),+) => {$(
        impl KeyBytes for $int {
            fn append(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_be_bytes());
            }

            fn parse(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(<$int>::from_be_bytes)
            }
        }

        impl FixedKey for $int {
            const LEN: usize = size_of::<$int>();
        }
    )+};
}
integer_keys!(u8, u16, u32, u64, u128);

impl<const N: usize> KeyBytes for [u8; N] {
    fn append(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok()
    }
}

impl<const N: usize> FixedKey for [u8; N] {
    const LEN: usize = N;
}

macro_rules! id_keys {
    ($($id:ty: $len:literal),+ $(,)?) => {$(
        impl KeyBytes for $id {
            fn append(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(self.as_bytes());
            }

            fn parse(bytes: &[u8]) -> Option<Self> {
                <[u8; $len]>::parse(bytes).map(<$id>::from_bytes)
            }
        }

        impl FixedKey for $id {
            const LEN: usize = $len;
        }
    )+};
}
id_keys!(
    PeerId: 32,
    Digest: 32,
    NetworkId: 32,
    ContentId: 16,
    Nonce: 16,
    TransactionId: 16,
    ProductId: 16,
);

impl KeyBytes for () {
    fn append(&self, _: &mut Vec<u8>) {}

    fn parse(bytes: &[u8]) -> Option<Self> {
        bytes.is_empty().then_some(())
    }
}

impl KeyBytes for String {
    fn append(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.as_bytes());
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        str::from_utf8(bytes).ok().map(str::to_owned)
    }
}

impl<A: FixedKey, B: KeyBytes> KeyBytes for (A, B) {
    fn append(&self, out: &mut Vec<u8>) {
        self.0.append(out);
        self.1.append(out);
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (a, b) = bytes.split_at_checked(A::LEN)?;
        Some((A::parse(a)?, B::parse(b)?))
    }
}

impl<A: FixedKey, B: FixedKey> FixedKey for (A, B) {
    const LEN: usize = A::LEN + B::LEN;
}

impl<A: FixedKey, B: FixedKey, C: KeyBytes> KeyBytes for (A, B, C) {
    fn append(&self, out: &mut Vec<u8>) {
        self.0.append(out);
        self.1.append(out);
        self.2.append(out);
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (a, rest) = bytes.split_at_checked(A::LEN)?;
        let (b, c) = rest.split_at_checked(B::LEN)?;
        Some((A::parse(a)?, B::parse(b)?, C::parse(c)?))
    }
}

impl<A: FixedKey, B: FixedKey, C: FixedKey> FixedKey for (A, B, C) {
    const LEN: usize = A::LEN + B::LEN + C::LEN;
}

/// The smallest byte string greater than all that begin with `prefix`; `None` when there is none (all bytes 255).
pub(crate) fn end_of_prefix(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return Some(end);
        }
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes<K: KeyBytes>(key: &K) -> Vec<u8> {
        let mut out = Vec::new();
        key.append(&mut out);
        out
    }

    proptest! {
        #[test]
        fn byte_order_is_key_order(a: ([u8; 3], u64, String), b: ([u8; 3], u64, String)) {
            prop_assert_eq!(bytes(&a).cmp(&bytes(&b)), a.cmp(&b));
            prop_assert_eq!(<([u8; 3], u64, String)>::parse(&bytes(&a)), Some(a));
        }

        #[test]
        fn near_tuples_keep_their_order(a in (0u8..3, 0u32..600, 0u16..600), b in (0u8..3, 0u32..600, 0u16..600)) {
            prop_assert_eq!(bytes(&a).cmp(&bytes(&b)), a.cmp(&b));
            prop_assert_eq!(<(u8, u32, u16)>::parse(&bytes(&a)), Some(a));
        }

        #[test]
        fn a_prefix_ends_after_all_that_begin_with_it(prefix: [u8; 2], tail: Vec<u8>) {
            let longer = [&prefix[..], &tail].concat();
            if let Some(end) = end_of_prefix(&prefix) {
                prop_assert!(longer < end);
                let next = u16::from_be_bytes(prefix) + 1;
                prop_assert!(end.as_slice() <= next.to_be_bytes().as_slice());
            } else {
                prop_assert_eq!(prefix, [255, 255]);
            }
        }
    }

    #[test]
    fn keys_of_a_wrong_length_do_not_parse() {
        assert_eq!(u64::parse(&[0; 7]), None);
        assert_eq!(<(u64, u8)>::parse(&[0; 8]), None);
        assert_eq!(<(u64, u8)>::parse(&[0; 10]), None);
        assert_eq!(<(u64, String)>::parse(&[0, 0, 0, 0, 0, 0, 0, 1, 0xff]), None, "not UTF-8");
        assert_eq!(<()>::parse(&[1]), None);
        assert_eq!(PeerId::parse(&[9; 32]), Some(PeerId::from_bytes([9; 32])));
    }
}
