//! Streams are what the roles live on, and the ready-made libp2p parts for them fall short: one drops inbound streams
//! silently, picks a relayed connection where a direct one exists, and can wait for ever; the other holds whole
//! messages in memory. This one has a bounded queue per protocol, a bound per peer, a name for each drop, a time limit
//! on each open, and forgets everything about a connection that closed.

mod accept;
mod behaviour;
mod connection;
mod dialling;
mod error;
mod faster;
mod open;
mod parked;
mod stream;
mod uses;

pub use accept::{Accept, AcceptError, AcceptLimits};
pub use error::OpenError;
pub use stream::{ConnInfo, Stream, Transport};

pub(crate) use behaviour::{Behaviour, Event, NotEd25519, PeerCrowded};
pub(crate) use error::root_cause;
#[cfg(test)]
pub(crate) use open::ToConnection;
pub(crate) use open::{StreamRequest, Want};

use libp2p::StreamProtocol;

/// Name of a stream protocol, such as `/willcall/deliver/1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Protocol {
    name: &'static str,
    bulk: bool,
}

impl Protocol {
    /// A protocol of this name. Meant for constants: a name without a leading slash does not compile there.
    pub const fn new(name: &'static str) -> Self {
        assert!(matches!(name.as_bytes().first(), Some(b'/')), "a protocol name begins with a slash");
        Self { name, bulk: false }
    }

    /// One that moves goods: its streams wait for a direct connection, and go over a relay only where that was set up to
    /// carry so much.
    pub const fn bulk(name: &'static str) -> Self {
        Self { bulk: true, ..Self::new(name) }
    }

    /// The name.
    pub const fn as_str(self) -> &'static str {
        self.name
    }

    pub(crate) const fn is_bulk(self) -> bool {
        self.bulk
    }

    pub(crate) const fn to_libp2p(self) -> StreamProtocol {
        StreamProtocol::new(self.name)
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}
