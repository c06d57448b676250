//! How a network gets another root key, because the first one is lost, stolen or simply old. The network keeps its name,
//! which is made of the first root key, and every join line stays good: each key set carries the signed handovers that
//! lead from the first root key to the one that signs now.
//!
//! A handover can be signed long before it is needed, and kept apart from the key that it names. A key set can name the
//! next root key by its digest alone: whoever holds such a set takes no other, so that a thief of the root key in force
//! cannot hand the network to himself.

use bincode::{Decode, Encode};

use crate::document;
use crate::ids::{Digest, NetworkId, PeerId};
use crate::refusal::{Refusal, RefusalCode};
use crate::signed::Signed;
use crate::trust::KeySet;

/// The root key's word that another key takes its place.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RootHandover {
    /// The network.
    pub network: NetworkId,
    /// The root key that follows.
    pub root: PeerId,
    /// When it was signed, unix milliseconds.
    pub at: u64,
}

document!(RootHandover => RootHandover, 128; network);

impl RootHandover {
    /// Most handovers in a network's life: a root key is used a few times a year and kept for years.
    pub const MAX: usize = 8;
}

/// By which a key set names the root key that will follow, without showing it.
pub fn commitment(root: &PeerId) -> Digest {
    Digest::of("willcall 2026-11 next root", &[root.as_bytes()])
}

/// The root key that is in force after `handovers`, which begin with one by the `first` root key.
///
/// # Errors
/// `too-large` for more than [`RootHandover::MAX`]; `bad-manager-signature` when one is not signed by the root key before;
/// `wrong-network`.
pub fn root_after(first: &PeerId, handovers: &[Signed<RootHandover>]) -> Result<PeerId, Refusal> {
    if handovers.len() > RootHandover::MAX {
        return Err(Refusal::new(RefusalCode::TooLarge, "more than 8 handovers of the root key"));
    }
    let network = NetworkId::of_root(first);
    let mut root = *first;
    for signed in handovers {
        let handover = signed.verify(&root).map_err(|e| e.refusal(RefusalCode::BadManagerSignature))?;
        if handover.network != network {
            return Err(Refusal::new(RefusalCode::WrongNetwork, "a handover of another network's root key"));
        }
        root = handover.root;
    }
    Ok(root)
}

/// The handovers of a newer key set that an older one does not have yet.
pub(crate) fn handovers_after<'a>(older: &KeySet, newer: &'a KeySet) -> Result<&'a [Signed<RootHandover>], Refusal> {
    newer.handovers.strip_prefix(older.handovers.as_slice()).ok_or_else(|| {
        let detail = format!("key set {} is signed by a root key that was replaced", newer.version);
        Refusal::new(RefusalCode::KeyRetired, detail)
    })
}

/// May the root key that signed `newer` follow the one that signed `held`?
pub(crate) fn check_next(held: &KeySet, newer: &KeySet) -> Result<(), Refusal> {
    match (handovers_after(held, newer)?.first(), held.next_root) {
        (Some(next), Some(named)) if commitment(&next.peek()?.root) != named => {
            let detail = "the root key goes to another key than the one that was named for it";
            Err(Refusal::new(RefusalCode::BadManagerSignature, detail))
        }
        _ => Ok(()),
    }
}
