//! A purchase outlives the device that it was made for. Whoever holds it can hand it on to another key (a new phone, a
//! reinstalled machine), and where the old key is lost the merchant who sold it can. Both are documents of their own,
//! so that the manager can show later by whose word a purchase changed hands; the lease of the next generation, which
//! only the manager signs, is what seeders go by.

use bincode::{Decode, Encode};

use crate::document;
use crate::ids::{NetworkId, PeerId, TransactionId};
use crate::keys;
use crate::refusal::{Refusal, RefusalCode};
use crate::signed::{Document, Signed};

/// The holder's word: from now on this purchase is for another peer. Signed by the key that held it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Move {
    /// The network.
    pub network: NetworkId,
    /// Which purchase.
    pub transaction: TransactionId,
    /// Who is to have it.
    pub to: PeerId,
    /// Number of the generation that begins with it: one more than that of the lease held. A word that was used once
    /// fits no second time.
    pub generation: u32,
    /// Unix milliseconds.
    pub at: u64,
}

/// The merchant's word for a buyer whose key is lost: this purchase is for another peer. Signed by the merchant that
/// sold it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Recovery {
    /// The network.
    pub network: NetworkId,
    /// Which purchase.
    pub transaction: TransactionId,
    /// Who is to have it.
    pub to: PeerId,
    /// Number of the generation that begins with it.
    pub generation: u32,
    /// Unix milliseconds.
    pub at: u64,
}

document! {
    Move => Move, 256; network,
    Recovery => Recovery, 256; network,
}

/// Most generations that holders may begin by themselves: enough for a life of devices, and too few for a purchase that
/// is passed round a school. Past it the merchant decides.
pub const MAX_MOVES: u32 = 16;
/// Most generations of one purchase in all: by its holders' words, by the merchant's, and by leases that became void.
pub const MAX_GENERATIONS: u32 = 64;

impl Move {
    /// Checks that `holder` signed it, for a peer that can hold a purchase.
    ///
    /// # Errors
    /// `not-entitled` for another's signature, `wrong-network`, `malformed` when it leads nowhere.
    pub fn check(signed: &Signed<Move>, holder: &PeerId, network: &NetworkId) -> Result<Move, Refusal> {
        let word = open(signed, holder, network)?;
        check_target(&word.to)?;
        if word.to == *holder {
            return Err(Refusal::new(RefusalCode::Malformed, "a purchase moves to another peer than the one it is at"));
        }
        Ok(word)
    }
}

impl Recovery {
    /// Checks that `merchant` signed it, for a peer that can hold a purchase.
    ///
    /// # Errors
    /// As [`Move::check`].
    pub fn check(signed: &Signed<Recovery>, merchant: &PeerId, network: &NetworkId) -> Result<Recovery, Refusal> {
        let word = open(signed, merchant, network)?;
        check_target(&word.to)?;
        Ok(word)
    }
}

fn open<T: Document>(signed: &Signed<T>, by: &PeerId, network: &NetworkId) -> Result<T, Refusal> {
    let word = signed.verify(by).map_err(|e| e.refusal(RefusalCode::NotEntitled))?;
    match word.network() {
        Some(named) if named == *network => Ok(word),
        _ => Err(Refusal::new(RefusalCode::WrongNetwork, "a word about a purchase in another network")),
    }
}

/// The content key is sealed to the new peer: a key that cannot be sealed to would lose the purchase.
fn check_target(to: &PeerId) -> Result<(), Refusal> {
    if keys::is_usable(to) {
        return Ok(());
    }
    Err(Refusal::new(RefusalCode::Malformed, "the new peer's key is not a usable Ed25519 key"))
}
