//! Names of things: fixed-size newtypes, so that a transaction id cannot be passed where a content id is meant, each
//! with the one text form that users see in every command and log.

use std::fmt;
use std::str::FromStr;

use bincode::{Decode, Encode};
use data_encoding::HEXLOWER_PERMISSIVE;

/// Text that is not the id it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} expected, got '{got}': {why}")]
pub struct IdError {
    what: &'static str,
    got: String,
    why: String,
}

impl IdError {
    pub(crate) fn new(what: &'static str, got: &str, why: impl Into<String>) -> Self {
        // Input may be anything and of any length: show its start only.
        let got = got.chars().take(64).flat_map(char::escape_default).collect();
        IdError { what, got, why: why.into() }
    }
}

/// A node: its Ed25519 public key. The text form is the libp2p peer ID, the base58 of the identity multihash of the
/// key in libp2p's protobuf form (libp2p peer-id specification), which always starts with `12D3KooW`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct PeerId([u8; 32]);

/// identity multihash, 36 bytes long; protobuf: key type 1 (Ed25519), 32 bytes of key.
const PEER_ID_PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];

/// Length of the text form: 51 digits, and before them the one that stands for the leading zero byte, which is also what
/// a digit 0 is written as.
const PEER_ID_TEXT: usize = 52;

impl PeerId {
    /// The peer whose Ed25519 public key is `key`.
    pub const fn from_bytes(key: [u8; 32]) -> Self {
        PeerId(key)
    }

    /// The Ed25519 public key.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The text form. Accounts of the ledger are called by it, so that a manager makes hundreds of it with each batch of
    /// receipts: at five digits a division this takes a seventh of the time of the general way.
    fn text(&self) -> [u8; PEER_ID_TEXT] {
        const DIGITS: &[u8; 58] = b"123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
        const FIVE_DIGITS: u64 = 58 * 58 * 58 * 58 * 58;
        // The whole as one number, 32 bits a limb, highest first.
        let mut limbs = [0u64; 10];
        let bytes = [0, 0].into_iter().chain(PEER_ID_PREFIX).chain(self.0);
        for (place, byte) in bytes.enumerate() {
            if let Some(limb) = limbs.get_mut(place / 4) {
                *limb = *limb << 8 | u64::from(byte);
            }
        }
        let mut text = [0; PEER_ID_TEXT];
        for five in text.rchunks_mut(5) {
            let mut rest = 0;
            for limb in &mut limbs {
                let value = rest << 32 | *limb;
                (*limb, rest) = (value / FIVE_DIGITS, value % FIVE_DIGITS);
            }
            for digit in five.iter_mut().rev() {
                let [lowest, ..] = (rest % 58).to_le_bytes();
                *digit = DIGITS.get(usize::from(lowest)).copied().unwrap_or_default();
                rest /= 58;
            }
        }
        text
    }

    /// Last six characters of the text form: for people's eyes, never for comparison.
    pub fn short(&self) -> String {
        let text = self.to_string();
        text.get(text.len().saturating_sub(6)..).unwrap_or_default().to_owned()
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.text()).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerId({self})")
    }
}

impl FromStr for PeerId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let fail = |why: &str| IdError::new("a peer ID (12D3KooW…)", text, why);
        if text.len() > 64 {
            return Err(fail("too long"));
        }
        if text.is_empty() {
            return Err(fail("it is empty"));
        }
        let bytes = bs58::decode(text).into_vec().map_err(|e| fail(&format!("not base58: {e}")))?;
        if text.starts_with("12D3KooW") && bytes.len() != PEER_ID_PREFIX.len() + 32 {
            return Err(fail("it is cut off, or has characters too many: they are 52"));
        }
        let key = bytes.strip_prefix(&PEER_ID_PREFIX).ok_or_else(|| {
            fail("not an Ed25519 peer ID; other key types and hashed IDs are not used in Willcall networks")
        })?;
        key.try_into().map(PeerId).map_err(|_| fail("the key in it is not 32 bytes long"))
    }
}

impl serde::Serialize for PeerId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for PeerId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        pub struct $name([u8; $len]);

        impl $name {
            /// From its bytes.
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                $name(bytes)
            }

            /// Its bytes.
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&HEXLOWER_PERMISSIVE.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                HEXLOWER_PERMISSIVE
                    .decode(text.as_bytes())
                    .ok()
                    .and_then(|bytes| bytes.try_into().ok())
                    .map($name)
                    .ok_or_else(|| IdError::new($what, text, concat!("not ", stringify!($len), " bytes in hexadecimal")))
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

hex_id!(
    /// A BLAKE3 digest of 32 bytes, as 64 hexadecimal characters.
    Digest, 32, "a digest"
);
hex_id!(
    /// A network: a digest of its root key, so that documents of one network are void in another.
    NetworkId, 32, "a network id"
);
hex_id!(
    /// One publication of some files: random, part of the encryption of every frame.
    ContentId, 16, "a content id"
);
hex_id!(
    /// What a random number of 16 bytes tells apart: invitations, outbox incarnations, commitment salts.
    Nonce, 16, "a 16-byte number"
);

impl Digest {
    /// Digest of `parts`, each preceded by its length, under a context of its own (BLAKE3 key derivation mode), so that
    /// the digest of one kind of thing is never that of another.
    pub fn of(context: &'static str, parts: &[&[u8]]) -> Digest {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Digest(*hasher.finalize().as_bytes())
    }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        pub struct $name([u8; 16]);

        impl $name {
            /// A new id: UUID version 7 (RFC 9562) of a time in unix milliseconds and ten random bytes.
            pub fn new(now: u64, random: [u8; 10]) -> Self {
                $name(uuid::Builder::from_unix_timestamp_millis(now, &random).into_uuid().into_bytes())
            }

            /// From its bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                $name(bytes)
            }

            /// Its bytes; they sort by time of making.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&uuid::Uuid::from_bytes(self.0), f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                uuid::Uuid::try_parse(text)
                    .map(|id| $name(id.into_bytes()))
                    .map_err(|e| IdError::new($what, text, e.to_string()))
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

uuid_id!(
    /// One sale, or one replication order: what deliveries, receipts and money are counted under.
    TransactionId, "a transaction id (UUID)"
);
uuid_id!(
    /// What a merchant sells.
    ProductId, "a product id (UUID)"
);

/// A network address: a libp2p multiaddr in text, `/ip4/192.0.2.1/tcp/4001`, at most 256 bytes of printable ASCII.
/// `node` parses it in full; here it is only known to be harmless to store, log and pass on.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode)]
pub struct Address(String);

impl Address {
    const MAX: usize = 256;

    /// Checks the outer form of `text`.
    ///
    /// # Errors
    /// [`IdError`] when it is empty, too long, not printable ASCII or does not begin with a slash.
    pub fn new(text: &str) -> Result<Self, IdError> {
        let fail = |why: &str| IdError::new("an address such as /ip4/192.0.2.1/tcp/4001", text, why);
        if text.len() > Self::MAX {
            return Err(fail("longer than 256 bytes"));
        }
        if !text.starts_with('/') {
            return Err(fail("it must begin with a slash"));
        }
        if !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(fail("only printable ASCII is allowed"));
        }
        Ok(Address(text.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<C> Decode<C> for Address {
    fn decode<D: bincode::de::Decoder<Context = C>>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
        let text = String::decode(decoder)?;
        Address::new(&text).map_err(|e| bincode::error::DecodeError::OtherString(e.to_string()))
    }
}

bincode::impl_borrow_decode!(Address);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Address {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        Address::new(text)
    }
}

impl serde::Serialize for Address {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for Address {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A peer and where it may be reached.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, serde::Serialize, serde::Deserialize)]
pub struct PeerAddrs {
    /// The peer.
    pub peer: PeerId,
    /// Addresses without a `/p2p/` part; at most [`PeerAddrs::MAX_ADDRS`] of [`PeerAddrs::MAX_BYTES`] together.
    pub addrs: Vec<Address>,
}

impl PeerAddrs {
    /// More addresses than this are cut off: a node has a handful.
    pub const MAX_ADDRS: usize = 16;
    /// Addresses past so many bytes are cut off as well: tickets and placements name 32 peers and reckon with 1 KiB
    /// each, and no peer's long addresses may push the others' ticket past its limit.
    pub const MAX_BYTES: usize = 960;

    /// A peer at these addresses.
    pub fn new(peer: PeerId, mut addrs: Vec<Address>) -> Self {
        let mut bytes = 0;
        addrs.truncate(Self::MAX_ADDRS);
        addrs.retain(|addr| {
            bytes += addr.as_str().len();
            bytes <= Self::MAX_BYTES
        });
        PeerAddrs { peer, addrs }
    }
}

impl From<PeerId> for PeerAddrs {
    fn from(peer: PeerId) -> Self {
        PeerAddrs { peer, addrs: Vec::new() }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn peer_id_text_is_libp2ps() {
        // Vector from the libp2p peer-id specification's Ed25519 key.
        let key =
            HEXLOWER_PERMISSIVE.decode(b"1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e").unwrap();
        let peer = PeerId::from_bytes(key.try_into().unwrap());
        assert_eq!(peer.to_string(), "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq");
        assert_eq!(peer.to_string().parse::<PeerId>().unwrap(), peer);
    }

    #[test]
    fn peer_id_text_is_base58_for_any_key() {
        let mut keys = vec![[0; 32], [0xff; 32], [0x80; 32]];
        for place in 0..32 {
            let mut key = [0; 32];
            key[place] = 1;
            keys.push(key);
        }
        keys.extend((0..500_u64).map(|n| *blake3::hash(&n.to_le_bytes()).as_bytes()));
        for key in keys {
            let whole = [PEER_ID_PREFIX.as_slice(), &key].concat();
            assert_eq!(PeerId::from_bytes(key).to_string(), bs58::encode(whole).into_string());
        }
    }

    #[test]
    fn foreign_peer_ids_are_refused_with_a_reason() {
        let rsa = "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC";
        assert!(rsa.parse::<PeerId>().unwrap_err().to_string().contains("not an Ed25519 peer ID"));
        assert!("nonsense!".parse::<PeerId>().unwrap_err().to_string().contains("not base58"));
        assert!("x".repeat(1000).parse::<PeerId>().unwrap_err().to_string().len() < 200);
    }

    #[test]
    fn transaction_ids_sort_by_time() {
        let a = TransactionId::new(1_000, [9; 10]);
        let b = TransactionId::new(1_001, [0; 10]);
        assert!(a < b);
        assert_eq!(a.to_string().parse::<TransactionId>().unwrap(), a);
    }

    #[test]
    fn addresses_with_control_characters_are_refused() {
        assert!(Address::new("/ip4/127.0.0.1/tcp/1").is_ok());
        assert!(Address::new("/ip4/127.0.0.1\n/tcp/1").is_err());
        assert!(Address::new("127.0.0.1:80").is_err());
    }
}
