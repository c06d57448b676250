//! Why a stream could not be opened is what decides whether a caller tries again, elsewhere, or not at all.

use std::time::Duration;

use libp2p::Multiaddr;
use libp2p::swarm::DialError;
use protocol::PeerId;

use super::Protocol;
use crate::address::address_from_libp2p;
use crate::reach::CircuitLimit;

/// Why no stream to a peer was opened.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    /// No connection could be made.
    #[error("cannot connect to {peer}: {reason}")]
    Dial {
        /// The peer.
        peer: PeerId,
        /// What happened at each address that was tried.
        reason: String,
    },
    /// Only a relay leads to the peer, and it does not carry goods.
    #[error(
        "{peer} is behind a translation that lets nobody in, and its relay carries {}, no goods; allow UDP here or there, or \
         forward a port",
        limit.map_or_else(|| "an unknown amount".to_owned(), |limit| limit.to_string())
    )]
    RelayedOnly {
        /// The peer.
        peer: PeerId,
        /// What the relay lets through, if it said so.
        limit: Option<CircuitLimit>,
    },
    /// The peer is connected but does not speak the protocol. As protocols are negotiated along with the first bytes,
    /// this mostly shows at the first read instead, as [`std::io::ErrorKind::Unsupported`].
    #[error("{peer} does not speak {protocol}")]
    Unsupported {
        /// The peer.
        peer: PeerId,
        /// The protocol asked for.
        protocol: Protocol,
    },
    /// It took longer than the caller allowed.
    #[error("no stream to {peer} within {limit:?}")]
    Timeout {
        /// The peer.
        peer: PeerId,
        /// The time allowed.
        limit: Duration,
    },
    /// The connection closed while the stream was being opened.
    #[error("the connection to {peer} closed while a stream was being opened")]
    Closed {
        /// The peer.
        peer: PeerId,
    },
    /// Too many streams are being opened by this node; try again later.
    #[error("this node is already opening {limit} streams; try again later")]
    Busy {
        /// The bound, [`crate::Limits::pending_opens`].
        limit: usize,
    },
    /// The target is this node itself.
    #[error("the target is this node itself")]
    Myself,
    /// This node is stopping.
    #[error("this node is stopping")]
    Stopped,
}

impl OpenError {
    /// One word for metrics.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Dial { .. } => "dial",
            Self::RelayedOnly { .. } => "relayed-only",
            Self::Unsupported { .. } => "unsupported",
            Self::Timeout { .. } => "timeout",
            Self::Closed { .. } => "closed",
            Self::Busy { .. } => "busy",
            Self::Myself => "myself",
            Self::Stopped => "stopped",
        }
    }
}

/// The reasons of a failed dial, a line for each address, and whether they say more than "there was nothing to dial".
pub(super) fn dial_reasons(error: &DialError) -> (Vec<String>, bool) {
    let reason = match error {
        DialError::NoAddresses => return (vec!["no address is known".to_owned()], false),
        DialError::DialPeerConditionFalse(_) => return (vec!["already connecting".to_owned()], false),
        DialError::Transport(attempts) => {
            let each = attempts.iter().map(|(address, error)| format!("{}: {}", shown(address), root_cause(error)));
            return (each.collect(), true);
        }
        DialError::WrongPeerId { obtained, address } => {
            format!("{}: another peer answers there ({obtained})", shown(address))
        }
        DialError::Denied { cause } => format!("refused by this node: {}", root_cause(cause)),
        other => other.to_string(),
    };
    (vec![reason], true)
}

/// Without the peer, which the error names already.
fn shown(address: &Multiaddr) -> String {
    address_from_libp2p(address).map_or_else(|| address.to_string(), |address| address.to_string())
}

/// The innermost cause: the layers above it only say that a layer failed.
pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
